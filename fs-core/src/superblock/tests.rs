//! The rings on a simulated disk: every kind of damage, and power cuts between and within the two writes.

use reactor::sim::{CutPolicy, SimDisk, SimDiskOptions, Tearing};
use reactor::{Lba, LbaCount, LbaRange};

use super::*;
use crate::disk::tests::with_disk;
use crate::format::superblock::tests::{example, fix_checksum};
use crate::types::Epoch;

const BLOCKS: u64 = 16_384;

fn blank() -> SimDisk {
    SimDisk::new(SimDiskOptions { blocks: BLOCKS, ..SimDiskOptions::default() })
}

fn of_generation(generation: u64) -> Superblock {
    let mut superblock = example();
    superblock.generation = Generation::new(generation);
    superblock.epoch = Epoch::new(generation + 100);
    superblock
}

/// A disk on which generations 1 to `last` were written.
fn written_to(last: u64) -> SimDisk {
    let disk = blank();
    with_disk(&disk, async |disk| {
        for generation in 1..=last {
            assert_eq!(write(&disk, &of_generation(generation)).await, Ok(None));
        }
    });
    disk
}

fn newest(disk: &SimDisk) -> Result<(u64, Vec<SuperblockWarning>), SuperblockError> {
    let found = with_disk(disk, async |disk| read_newest(&disk).await)?;
    assert_eq!(found.0, of_generation(found.0.generation.get()));
    Ok((found.0.generation.get(), found.1))
}

fn block_of(ring: usize, generation: u64) -> u64 {
    RING_STARTS[ring].get() + generation % 8
}

fn damage(disk: &SimDisk, ring: usize, generation: u64) {
    disk.flip_bit(block_of(ring, generation) * 4096 + 700, 3);
}

fn overwrite(disk: &SimDisk, block: u64, bytes: &[u8]) {
    with_disk(disk, async |disk| disk.write(BlockNr::new(block), bytes, Durability::Durable).await.unwrap());
}

#[test]
fn newest_of_many_generations_is_found_without_warnings() {
    for last in [1, 2, 7, 8, 9, 16, 30] {
        assert_eq!(newest(&written_to(last)), Ok((last, vec![])));
    }
}

#[test]
fn damaged_twin_is_named_and_the_other_is_used() {
    for ring in [0, 1] {
        let disk = written_to(11);
        damage(&disk, ring, 11);
        let (generation, warnings) = newest(&disk).unwrap();
        assert_eq!(generation, 11);
        let [SuperblockWarning::TwinDamaged { generation, block, .. }] = &warnings[..] else {
            panic!("{warnings:?}")
        };
        assert_eq!((generation.get(), block.get()), (11, block_of(ring, 11)));
    }
}

#[test]
fn twin_whose_magic_is_gone_counts_as_damaged() {
    let disk = written_to(11);
    disk.flip_bit(block_of(1, 11) * 4096, 0);
    let (generation, warnings) = newest(&disk).unwrap();
    assert_eq!(generation, 11);
    assert!(matches!(warnings[..], [SuperblockWarning::TwinDamaged { .. }]), "{warnings:?}");
}

#[test]
fn damaged_generation_gives_way_to_the_one_before_and_says_so() {
    let disk = written_to(11);
    damage(&disk, 0, 11);
    damage(&disk, 1, 11);
    let (generation, warnings) = newest(&disk).unwrap();
    assert_eq!(generation, 10);
    let [SuperblockWarning::NewerUnreadable { used, newer, .. }] = &warnings[..] else {
        panic!("{warnings:?}")
    };
    assert_eq!((used.get(), newer.get()), (10, 11));
}

#[test]
fn one_damage_in_each_of_two_generations_is_survived() {
    let disk = written_to(11);
    damage(&disk, 0, 11);
    damage(&disk, 1, 11);
    damage(&disk, 1, 10);
    let (generation, warnings) = newest(&disk).unwrap();
    assert_eq!((generation, warnings.len()), (10, 2));
}

#[test]
fn old_damage_is_reported_too() {
    let disk = written_to(11);
    damage(&disk, 0, 7);
    let (generation, warnings) = newest(&disk).unwrap();
    assert_eq!(generation, 11);
    assert!(matches!(warnings[..], [SuperblockWarning::OldDamaged { .. }]), "{warnings:?}");
}

#[test]
fn all_copies_damaged_is_told_from_not_pollux() {
    let disk = written_to(11);
    for generation in 4..12 {
        damage(&disk, 0, generation);
        damage(&disk, 1, generation);
    }
    assert!(matches!(newest(&disk), Err(SuperblockError::AllDamaged { .. })));
    assert!(matches!(newest(&blank()), Err(SuperblockError::NotPollux { .. })));
    let foreign = blank();
    overwrite(&foreign, 16, &[0x5a; 8 * 4096]);
    overwrite(&foreign, 4160, &[0x5a; 8 * 4096]);
    assert!(matches!(newest(&foreign), Err(SuperblockError::NotPollux { .. })));
    let tiny = SimDisk::new(SimDiskOptions { blocks: 8, ..SimDiskOptions::default() });
    assert!(matches!(newest(&tiny), Err(SuperblockError::NotPollux { .. })));
}

#[test]
fn wiped_rings_of_a_volume_count_as_damage() {
    let disk = written_to(3);
    overwrite(&disk, 32, &{
        let mut block = vec![0; 4096];
        block[..8].copy_from_slice(b"PLXGROUP");
        block
    });
    overwrite(&disk, 16, &[0; 8 * 4096]);
    overwrite(&disk, 4160, &[0x77; 8 * 4096]);
    assert!(matches!(newest(&disk), Err(SuperblockError::AllDamaged { .. })));
}

#[test]
fn newer_version_and_unknown_features_are_errors_of_their_own() {
    for (offset, value) in [(12, 9), (40, 1)] {
        let disk = written_to(4);
        let mut block = of_generation(5).encode();
        block[offset] = value;
        fix_checksum(&mut *block);
        overwrite(&disk, block_of(0, 5), &*block);
        match newest(&disk) {
            Err(SuperblockError::NewerVersion { version, .. }) => assert_eq!((offset, version), (12, 9)),
            Err(SuperblockError::UnknownFeatures { features, .. }) => assert_eq!((offset, features), (40, 1)),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn shrunk_device_is_named() {
    let disk = written_to(4);
    let mut bytes = vec![0; 5000 * 4096];
    disk.image().read(0, &mut bytes);
    let image = reactor::sim::DiskImage::from_bytes(&bytes);
    let shrunk = SimDisk::from_image(SimDiskOptions { blocks: 5000, ..SimDiskOptions::default() }, image);
    let Err(SuperblockError::DeviceTooShort { device_bytes, volume_bytes, .. }) = newest(&shrunk) else {
        panic!()
    };
    assert_eq!((device_bytes, volume_bytes), (5000 * 4096, BLOCKS * 4096));
    // So short that the second ring is cut off: the first still tells.
    let image = reactor::sim::DiskImage::from_bytes(&bytes[..1000 * 4096]);
    let shrunk = SimDisk::from_image(SimDiskOptions { blocks: 1000, ..SimDiskOptions::default() }, image);
    assert!(matches!(newest(&shrunk), Err(SuperblockError::DeviceTooShort { .. })));
}

#[test]
fn misplaced_copy_does_not_count() {
    let disk = written_to(4);
    overwrite(&disk, block_of(0, 5), &*of_generation(30).encode());
    let (generation, warnings) = newest(&disk).unwrap();
    assert_eq!(generation, 4);
    assert!(matches!(warnings[..], [SuperblockWarning::NewerUnreadable { .. }]), "{warnings:?}");
}

#[test]
fn unreadable_slots_are_like_damaged_ones_and_an_unreadable_device_is_an_error() {
    let disk = written_to(11);
    let slot = |ring| LbaRange { start: Lba::new(block_of(ring, 11)), count: LbaCount::new(1) };
    disk.fail_reads(slot(0));
    let (generation, warnings) = newest(&disk).unwrap();
    assert_eq!(generation, 11);
    assert!(matches!(warnings[..], [SuperblockWarning::TwinDamaged { .. }]), "{warnings:?}");
    disk.fail_reads(slot(1));
    assert_eq!(newest(&disk).unwrap().0, 10);
    disk.fail_reads(LbaRange { start: Lba::new(0), count: LbaCount::new(BLOCKS) });
    assert!(matches!(newest(&disk), Err(SuperblockError::Io(_))));
}

#[test]
fn one_failed_write_is_a_warning_and_two_are_an_error() {
    let disk = written_to(11);
    let slot = |ring| LbaRange { start: Lba::new(block_of(ring, 12)), count: LbaCount::new(1) };
    disk.fail_writes(slot(0));
    let warning = with_disk(&disk, async |disk| write(&disk, &of_generation(12)).await).unwrap();
    let Some(SuperblockWarning::TwinNotWritten { block, .. }) = warning else { panic!("{warning:?}") };
    assert_eq!(block.get(), block_of(0, 12));
    let (generation, warnings) = newest(&disk).unwrap();
    assert_eq!(generation, 12);
    assert!(matches!(warnings[..], [SuperblockWarning::TwinOutdated { .. }]), "{warnings:?}");
    disk.fail_writes(slot(1));
    let result = with_disk(&disk, async |disk| write(&disk, &of_generation(12)).await);
    assert!(matches!(result, Err(SuperblockError::Io(_))));
}

#[test]
fn power_cut_at_every_write_leaves_this_generation_or_the_one_before() {
    for writes in 0..=2 {
        for seed in 0..64 {
            let disk = written_to(11);
            disk.crash_after_writes(writes);
            let result = with_disk(&disk, async |disk| write(&disk, &of_generation(12)).await);
            assert_eq!(result.is_ok(), writes > 0);
            disk.power_cut(&CutPolicy::Random { seed, tearing: Tearing::Sectors });
            let (generation, _) = newest(&disk).unwrap();
            assert_eq!(generation, if writes == 0 { 11 } else { 12 });
        }
    }
}

#[test]
fn torn_write_is_as_if_it_had_not_begun() {
    let image = of_generation(12).encode();
    for ring in [0, 1] {
        for sectors in 1..8 {
            let disk = written_to(11);
            let mut torn = of_generation(4).encode();
            torn[..sectors * 512].copy_from_slice(&image[..sectors * 512]);
            if ring == 1 {
                overwrite(&disk, block_of(0, 12), &*image);
            }
            overwrite(&disk, block_of(ring, 12), &*torn);
            // Sectors behind the shard records are zero in both: with them missing the block is whole.
            let whole = torn == image;
            let (generation, warnings) = newest(&disk).unwrap();
            assert_eq!(generation, if ring == 1 || whole { 12 } else { 11 });
            assert_eq!(warnings.is_empty(), ring == 1 && whole);
        }
    }
}
