//! Tree nodes and the items in them.
//!
//! An input names a node of a volume and changes places of it, before its checksum is made right.
//!
//! Checks: what passes the check is, encoded again, the same image; items, entries and what is expected of children can be walked,
//! and children lie within their parent's bounds; every item can be shown or is refused.

use fs_core::dump::describe_item;
use fs_core::format::node::{
    BlockPtr, CheckedNode, Expected, HEADER_SIZE, Header, NodeImage, SLOT_SIZE, check, encode_inner,
    encode_leaf,
};

use crate::edit::change;
use crate::script::Script;
use crate::volume::{BASES, bases};

/// Changes of one input.
const CHANGES: usize = 24;
/// Bytes of a header's fields.
const FIELDS: usize = 34;

/// Changes a node, and looks at what can be made of it.
pub fn run(data: &[u8]) {
    let mut script = Script::new(data.to_vec());
    let nodes = &bases()[usize::from(script.byte()) % BASES].map.nodes;
    let node = &nodes[usize::from(script.byte()) % nodes.len()];
    let mut image = node.image.clone();
    let mut expected = node.expected;
    let table = HEADER_SIZE + 16 * SLOT_SIZE;
    for _ in 0..CHANGES {
        if script.is_over() {
            break;
        }
        let (from, to) = script.pick(&[
            (0, image.len()),
            (0, FIELDS),
            (HEADER_SIZE, table),
            (image.len() / 2, image.len()),
        ]);
        change(&mut script, &mut image[from..to]);
    }
    expected.ptr.crc = crc32c::crc32c(&image[..]);
    let Ok(node) = check(&image, &expected) else { return };
    judge(&image, &node, &expected);
}

fn judge(image: &NodeImage, node: &CheckedNode<'_>, expected: &Expected) {
    let BlockPtr { address, epoch, .. } = expected.ptr;
    let header = Header { identity: expected.identity, address, epoch };
    let again = match expected.level {
        0 => encode_leaf(&header, node.items()),
        level => encode_inner(&header, level, node.entries()),
    };
    assert!(*again == *image, "a node that passed its check is encoded to another image");
    for (key, value) in node.items() {
        assert!(expected.bounds.contains(&key), "{key} lies outside of its node");
        let _unknown = describe_item(&key, value);
    }
    let mut low = expected.bounds.low;
    for child in node.children() {
        assert!(child.level + 1 == expected.level && child.ptr.epoch <= epoch, "{child:?} of {expected:?}");
        assert!(child.bounds.low >= low, "{child:?} begins before its place");
        low = child.bounds.low;
        assert!(child.bounds.high.is_none_or(|high| high > low), "{child:?} may hold nothing");
    }
    let children = node.children().count();
    assert_eq!(children, node.entries().len());
}
