//! Damaged images: every one is found, or is harmless.

use super::*;
use crate::format::node::{ENTRY_SIZE, HEADER_SIZE, SLOT_SIZE, check};

/// The nodes of a tree of three levels, with what is expected of each.
fn nodes() -> Vec<(Expected, Box<NodeImage>)> {
    let mut bench = Bench::new(5);
    for offset in 0..60 {
        bench.insert(key(offset % 3, offset), &vec![offset as u8; 900 + 13 * offset as usize]);
    }
    let root = bench.checkpoint();
    let mut walk = Walk::new(identity(), root);
    let mut nodes = Vec::new();
    while let Some(expected) = walk.next_node() {
        let image = bench.device[&expected.ptr.address].clone();
        walk.supply(&image).unwrap();
        nodes.push((expected, image));
    }
    assert!(nodes.len() > 10 && nodes[0].0.level == 2);
    nodes
}

/// The first node of each level.
fn samples() -> Vec<(Expected, Box<NodeImage>)> {
    let nodes = nodes();
    (0..3).map(|level| nodes.iter().find(|(expected, _)| expected.level == level).unwrap().clone()).collect()
}

/// Checks an image whose checksum the parent knows. If it passes, it must be exactly what its contents encode to, and
/// it must be fit for use.
fn check_forged(expected: &Expected, image: &NodeImage) -> Result<(), NodeError> {
    let ptr = BlockPtr { crc: crc32c::crc32c(image), ..expected.ptr };
    let expected = Expected { ptr, ..*expected };
    let gauge = Gauge::default();
    let node = Node::load(Box::new(*image), &expected, &gauge)?;
    assert!(*node.encode(identity()) == *image, "two images of the same contents");
    if expected.level > 0 {
        return Ok(());
    }
    let leaf = leaf_of(&node);
    let mut changed = leaf.clone();
    let found: Vec<_> = leaf.items().map(|(key, value)| (key, value.len())).collect();
    for (key, length) in found {
        let index = changed.search(&key).unwrap();
        assert_eq!(changed.value(index).len(), length);
        assert!(changed.replace(index, &[]));
        changed.remove(index);
    }
    assert_eq!(changed.used(), 0);
    Ok(())
}

#[test]
fn every_flipped_bit_is_found() {
    for (expected, mut image) in samples() {
        for bit in 0..NODE_SIZE * 8 {
            image[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(check(&image, &expected), Err(NodeError::Checksum { .. })), "bit {bit}");
            image[bit / 8] ^= 1 << (bit % 8);
        }
        assert!(check(&image, &expected).is_ok());
    }
}

#[test]
fn every_field_with_every_awkward_value_is_found_or_harmless() {
    for (expected, image) in samples() {
        let table = if expected.level == 0 { 4 * SLOT_SIZE } else { 4 * ENTRY_SIZE };
        for at in 0..HEADER_SIZE + table {
            for width in [1, 2, 4, 8] {
                let field = &image[at..at + width];
                let mut bytes = [0; 8];
                bytes[..width].copy_from_slice(field);
                let value = u64::from_le_bytes(bytes);
                for new in [0, 1, u64::MAX, value.wrapping_add(1), value.wrapping_sub(1), value ^ 0x5a5a] {
                    let mut forged = image.clone();
                    forged[at..at + width].copy_from_slice(&new.to_le_bytes()[..width]);
                    let outcome = check_forged(&expected, &forged);
                    // Keys and child pointers may take other values; nothing in the header may.
                    assert!(at >= HEADER_SIZE || forged == image || outcome.is_err(), "header byte {at}");
                }
            }
        }
    }
}

#[test]
fn each_kind_of_damage_has_its_error() {
    let samples = samples();
    let (leaf, leaf_image) = &samples[0];
    let (inner, inner_image) = &samples[1];
    let forge = |image: &NodeImage, at: usize, byte: u8| {
        let mut forged = Box::new(*image);
        forged[at] = byte;
        forged
    };
    let leaf_with = |at, byte| check_forged(leaf, &forge(leaf_image, at, byte)).unwrap_err();
    let inner_with = |at, byte| check_forged(inner, &forge(inner_image, at, byte)).unwrap_err();

    assert!(matches!(leaf_with(0, 0), NodeError::Magic { .. }));
    assert_eq!(leaf_with(4, 2), NodeError::Version { found: 2 });
    assert!(matches!(leaf_with(6, 1), NodeError::Level { expected: 0, found: 1 }));
    assert!(matches!(leaf_with(7, 6), NodeError::Shard { found: 6, .. }));
    assert_eq!(leaf_with(8, 0), NodeError::Volume);
    assert!(matches!(leaf_with(23, 1), NodeError::Address { .. }));
    assert!(matches!(leaf_with(31, 1), NodeError::Epoch { .. }));
    assert_eq!(leaf_with(32, 0), NodeError::Reserved);
    assert_eq!(inner_with(32, 0), NodeError::Count { found: 0 });
    assert!(matches!(leaf_with(33, 0xff), NodeError::Count { .. }));
    assert!(matches!(inner_with(33, 0xff), NodeError::Count { .. }));
    assert_eq!(leaf_with(40, 1), NodeError::Reserved);
    assert_eq!(leaf_with(HEADER_SIZE + 27, 1), NodeError::Reserved);
    assert_eq!(leaf_with(HEADER_SIZE + SLOT_SIZE * 10, 1), NodeError::Reserved);
    assert!(matches!(leaf_with(HEADER_SIZE + SLOT_SIZE + 24, 0), NodeError::Order { index: 1 }));
    assert_eq!(inner_with(HEADER_SIZE, 1), NodeError::Order { index: 0 });
    assert_eq!(inner_with(HEADER_SIZE + 2 * ENTRY_SIZE + 24, 0), NodeError::Order { index: 2 });
    assert!(matches!(leaf_with(HEADER_SIZE + 28, 0), NodeError::Value { index: 0 }));
    assert!(matches!(leaf_with(HEADER_SIZE + SLOT_SIZE + 30, 0), NodeError::Value { index: 1 }));
    // Byte 32 of an entry is its child's address, byte 47 the top of its epoch.
    assert!(matches!(inner_with(HEADER_SIZE + 47, 0xff), NodeError::Child { index: 0 }));
    let mut nowhere = Box::new(**inner_image);
    nowhere[HEADER_SIZE + 32..HEADER_SIZE + 40].fill(0);
    assert_eq!(check_forged(inner, &nowhere), Err(NodeError::Child { index: 0 }));
    let narrow = Expected { bounds: KeyBounds { low: Key::MAX, high: None }, ..*leaf };
    assert_eq!(check_forged(&narrow, leaf_image), Err(NodeError::Bounds { index: 0 }));
}

#[test]
fn a_stale_or_misdirected_node_is_not_taken_in() {
    let nodes = nodes();
    let (expected, _) = &nodes[1];
    let sibling = nodes[2..].iter().find(|(other, _)| other.level == expected.level).unwrap();
    assert!(matches!(check(&sibling.1, expected), Err(NodeError::Checksum { .. })));
    // Even if the checksums collided.
    assert!(matches!(check_forged(expected, &sibling.1), Err(NodeError::Address { .. })));
}

#[test]
fn a_damaged_node_stays_missing() {
    let mut bench = Bench::new(4);
    for offset in 0..50 {
        bench.insert(key(1, offset), &[1; 1000]);
    }
    let root = bench.checkpoint();
    let tree = Tree::open(identity(), root);
    let missing = tree.touch(&key(1, 20)).unwrap_err();
    let mut image = bench.device[&missing.address()].clone();
    image[100] ^= 1;
    assert!(matches!(tree.supply(missing, image), Err(NodeError::Checksum { .. })));
    assert_eq!(tree.touch(&key(1, 20)), Err(missing));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn forged_images_are_refused_or_harmless(
        level in 0..3usize,
        changes in proptest::collection::vec((0..NODE_SIZE, any::<u8>()), 1..8),
        table in proptest::collection::vec((0..400usize, any::<u8>()), 0..4),
    ) {
        thread_local! {
            static SAMPLES: Vec<(Expected, Box<NodeImage>)> = samples();
        }
        SAMPLES.with(|samples| {
            let (expected, image) = &samples[level];
            let mut forged = image.clone();
            for (at, byte) in changes.iter().chain(&table) {
                forged[*at] = *byte;
            }
            let _: Result<(), NodeError> = check_forged(expected, &forged);
        });
    }

    #[test]
    fn noise_is_refused(level in 0..=255u8, seed in any::<u64>()) {
        let mut state = seed;
        let mut image = crate::format::node::zeroed_image();
        for byte in image.iter_mut() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = (state >> 56) as u8;
        }
        let ptr = BlockPtr { address: BlockNr::new(4), epoch: Epoch::new(1), crc: 0 };
        let expected = Expected { identity: identity(), ptr, level, bounds: KeyBounds::ALL };
        prop_assert!(check_forged(&expected, &image).is_err());
    }
}
