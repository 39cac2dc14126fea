//! The log without a device: its areas, and which entries a mount takes.

use super::*;
use crate::format::log::tests::example as example_entry;
use crate::format::superblock::tests::example;
use crate::types::Generation;

fn volume() -> Superblock {
    let area = LogArea { segments: [BlockNr::new(600), BlockNr::new(700)], blocks: 8, current: 0 };
    Superblock { log: Some(area), shards: vec![example().shards[0]; 4], ..example() }
}

/// A segment with entries of the epochs after the superblock's.
fn segment(superblock: &Superblock, entries: u64) -> Vec<u8> {
    let sections = example_entry().2;
    let mut bytes = Vec::new();
    let mut place = first_place(superblock);
    for number in 1..=entries {
        let epoch = Epoch::new(superblock.epoch.get() + number);
        let (entry, crc) = encode(&place, epoch, &sections);
        bytes.extend(entry);
        place.sequence += 1;
        place.predecessor = crc;
    }
    bytes.resize(8 * BLOCK_BYTES, 0);
    bytes
}

#[test]
fn every_entry_is_found_in_order() {
    let found = find_entries(&volume(), &segment(&volume(), 3));
    assert_eq!(found.damage, None);
    assert_eq!(found.last_epoch(), Some(Epoch::new(10)));
    assert_eq!(found.sections_of(ShardId::new(3).unwrap()).len(), 3);
    assert_eq!(found.sections_of(ShardId::new(1).unwrap()).len(), 0);
    assert_eq!(find_entries(&volume(), &segment(&volume(), 8)).entries.len(), 8, "a full segment");
}

#[test]
fn torn_last_entry_is_the_end_of_the_log() {
    let mut bytes = segment(&volume(), 3);
    bytes[2 * BLOCK_BYTES + 100] ^= 1;
    let found = find_entries(&volume(), &bytes);
    assert_eq!((found.entries.len(), found.damage), (2, None));
}

#[test]
fn bad_entry_before_a_good_one_is_damage() {
    let mut bytes = segment(&volume(), 3);
    bytes[BLOCK_BYTES..2 * BLOCK_BYTES].fill(0);
    let found = find_entries(&volume(), &bytes);
    assert_eq!(found.entries.len(), 1);
    let damage = found.damage.expect("a later entry is there");
    assert!(damage.contains("entry 2 at block 601"), "{damage}");
}

#[test]
fn stale_entries_of_another_incarnation_or_generation_do_not_count() {
    let stale = segment(&volume(), 3);
    for other in [
        Superblock { incarnation: 1, ..volume() },
        Superblock { generation: Generation::new(17), ..volume() },
    ] {
        let found = find_entries(&other, &stale);
        assert_eq!((found.entries.len(), found.damage), (0, None));
        // Behind entries of its own, they are still stale.
        let mut bytes = segment(&other, 1);
        bytes[BLOCK_BYTES..].copy_from_slice(&stale[BLOCK_BYTES..]);
        let found = find_entries(&other, &bytes);
        assert_eq!((found.entries.len(), found.damage), (1, None));
    }
}

#[test]
fn entry_with_the_wrong_predecessor_is_damage() {
    let superblock = volume();
    let mut bytes = segment(&superblock, 1);
    let place = Place { sequence: 2, predecessor: 1, ..first_place(&superblock) };
    let (entry, _) = encode(&place, Epoch::new(9), &example_entry().2);
    bytes[BLOCK_BYTES..2 * BLOCK_BYTES].copy_from_slice(&entry);
    let found = find_entries(&superblock, &bytes);
    assert_eq!(found.entries.len(), 1);
    assert!(found.damage.is_some_and(|damage| damage.contains("does not follow")));
}

#[test]
fn impossible_epochs_and_shards_are_damage() {
    let superblock = volume();
    let sections = example_entry().2;
    for (epoch, shards) in [(7, 4), (u64::MAX, 4), (8, 3)] {
        let superblock = Superblock { shards: vec![superblock.shards[0]; shards], ..superblock.clone() };
        let (bytes, _) = encode(&first_place(&superblock), Epoch::new(epoch), &sections);
        let found = find_entries(&superblock, &bytes);
        assert_eq!(found.entries.len(), 0);
        assert!(found.damage.is_some(), "epoch {epoch}, {shards} shards");
    }
}
