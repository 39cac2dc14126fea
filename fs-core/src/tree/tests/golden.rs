//! Images of version 1, put together by hand from `docs/on-disk-format.md`: they must be opened for ever, and what is
//! written today must be the same.

use super::*;
use crate::format::node::{HEADER_SIZE, check};

/// An image with a header of these fields.
fn image(level: u8, address: u64, count: u16) -> Box<NodeImage> {
    let mut image = crate::format::node::zeroed_image();
    image[0..4].copy_from_slice(b"PlxN");
    image[4..6].copy_from_slice(&[1, 0]);
    image[6] = level;
    image[7] = 5;
    image[8..16].copy_from_slice(&[0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]);
    image[16..24].copy_from_slice(&address.to_le_bytes());
    image[24..32].copy_from_slice(&[7, 0, 0, 0, 0, 0, 0, 0]);
    image[32..34].copy_from_slice(&count.to_le_bytes());
    image
}

/// A key as stored: (object 0x0102, kind 3, offset, minor 0x0405).
fn stored_key(offset: u64) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[0..2].copy_from_slice(&[2, 1]);
    bytes[8..16].copy_from_slice(&offset.to_le_bytes());
    bytes[16..18].copy_from_slice(&[5, 4]);
    bytes[24] = 3;
    bytes
}

fn golden_key(offset: u64) -> Key {
    Key::new(0x0102, ItemKind::new(3), offset, 0x0405)
}

/// Items (0, "first"), (1, ""), (2, "third").
fn golden_leaf(address: u64) -> Box<NodeImage> {
    let mut leaf = image(0, address, 3);
    for (index, (start, length)) in [(16_379u16, 5u16), (16_379, 0), (16_374, 5)].into_iter().enumerate() {
        let at = HEADER_SIZE + 32 * index;
        leaf[at..at + 28].copy_from_slice(&stored_key(index as u64));
        leaf[at + 28..at + 30].copy_from_slice(&start.to_le_bytes());
        leaf[at + 30..at + 32].copy_from_slice(&length.to_le_bytes());
    }
    leaf[16_379..].copy_from_slice(b"first");
    leaf[16_374..16_379].copy_from_slice(b"third");
    leaf
}

fn ptr(address: u64, crc: u32) -> BlockPtr {
    BlockPtr { address: BlockNr::new(address), epoch: Epoch::new(7), crc }
}

#[test]
fn leaf_of_version_1() {
    // The checksum was computed by another implementation of CRC32C, bit by bit.
    let leaf = golden_leaf(4);
    assert_eq!(crc32c::crc32c(&leaf[..]), bitwise_crc32c(&leaf[..]));
    let root = TreeRoot { ptr: ptr(4, bitwise_crc32c(&leaf[..])), level: 0 };
    let tree = Tree::open(identity(), root);
    let missing = tree.touch(&Key::MIN).unwrap_err();
    tree.supply(missing, leaf.clone()).unwrap();
    let items = items_of(&tree).unwrap();
    let expected = [(0, &b"first"[..]), (1, b""), (2, b"third")];
    assert_eq!(items, expected.map(|(offset, value)| (golden_key(offset), value.to_vec())).into());

    let mut bench = Bench::new(INNER_CAPACITY);
    for (offset, value) in expected.iter().rev() {
        bench.insert(golden_key(*offset), value);
    }
    let root = bench.checkpoint();
    assert_eq!(root.ptr.address, BlockNr::new(4));
    assert!(bench.device[&root.ptr.address] == leaf);
}

#[test]
fn inner_node_of_version_1() {
    let mut inner = image(1, 0x0a0b, 2);
    inner[64 + 28..64 + 32].copy_from_slice(&[0xef, 0xbe, 0xad, 0xde]);
    inner[64 + 32..64 + 40].copy_from_slice(&[4, 0, 0, 0, 0, 0, 0, 0]);
    inner[64 + 40..64 + 48].copy_from_slice(&[6, 0, 0, 0, 0, 0, 0, 0]);
    inner[112..112 + 28].copy_from_slice(&stored_key(9));
    inner[112 + 28..112 + 32].copy_from_slice(&[1, 0, 0, 0]);
    inner[112 + 32..112 + 40].copy_from_slice(&[8, 0, 0, 0, 0, 0, 0, 0x10]);
    inner[112 + 40..112 + 48].copy_from_slice(&[7, 0, 0, 0, 0, 0, 0, 0]);
    let expected = Expected {
        identity: identity(),
        ptr: ptr(0x0a0b, bitwise_crc32c(&inner[..])),
        level: 1,
        bounds: KeyBounds::ALL,
    };
    let node = check(&inner, &expected).unwrap();
    let first = BlockPtr { address: BlockNr::new(4), epoch: Epoch::new(6), crc: 0xdead_beef };
    let second = ptr(0x1000_0000_0000_0008, 1);
    assert_eq!(node.entries().collect::<Vec<_>>(), [(Key::MIN, first), (golden_key(9), second)]);
    let bounds: Vec<_> = node.children().map(|child| (child.ptr, child.level, child.bounds)).collect();
    let low = KeyBounds { low: Key::MIN, high: Some(golden_key(9)) };
    let high = KeyBounds { low: golden_key(9), high: None };
    assert_eq!(bounds, [(first, 0, low), (second, 0, high)]);
    let gauge = Gauge::default();
    assert!(Node::load(inner.clone(), &expected, &gauge).unwrap().encode(identity()) == inner);
}

/// CRC32C as RFC 3720 defines it, one bit at a time.
fn bitwise_crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}
