//! [`format`] on the simulator's disk.

use reactor::sim::{CutPolicy, DiskImage, SimDisk, SimDiskOptions, SimOptions, Simulator, Tearing};
use reactor::{Lba, LbaCount, LbaRange};

use super::*;
use crate::alloc::read_groups;
use crate::disk::tests::with_disk;
use crate::tree::Walk;

fn sim_disk(lba_size: u32, bytes: u64) -> SimDisk {
    SimDisk::new(SimDiskOptions {
        lba_size,
        blocks: bytes / u64::from(lba_size),
        ..SimDiskOptions::default()
    })
}

fn options(shards: u8) -> FormatOptions {
    FormatOptions {
        shards,
        label: "Kastor".to_owned(),
        force: Force::Refuse,
        owner: Owner { uid: 1000, gid: 100 },
    }
}

pub(crate) fn format_on(disk: &SimDisk, options: &FormatOptions) -> Result<FormatReport, FormatError> {
    let simulator = Simulator::new(SimOptions { disk: Some(disk.clone()), ..SimOptions::default() });
    simulator.block_on(0, async |ctx| format(&ctx, options).await).unwrap()
}

/// A new volume is complete: superblock twice, bitmaps that match it and count just the roots, trees that hold just
/// the root directory.
fn check_new_volume(disk: &SimDisk, shards: u8) {
    with_disk(disk, async |disk| {
        let (superblock, warnings) = superblock::read_newest(&disk).await.unwrap();
        assert_eq!(warnings, []);
        assert_eq!((superblock.generation.get(), superblock.epoch.get()), (1, 1));
        assert_eq!((superblock.shard_count(), superblock.label.as_str()), (shards, "Kastor"));
        let mut groups = read_groups(&disk, &superblock).await.unwrap();
        assert_eq!(groups.warnings, []);
        for shard in (0..shards).filter_map(ShardId::new) {
            let record = superblock.shard(shard).unwrap();
            let counter = SpaceCounter::new();
            let own = groups.take(shard);
            assert!(own.len() >= 16, "every shard has sixteen groups");
            let (layout, identity) = (superblock.layout, superblock.identity());
            Allocator::new(shard, layout, identity, Arc::clone(&counter), superblock.epoch, own);
            assert_eq!((counter.capacity() - counter.free(), counter.pinned()), (4, 0), "one node is in use");
            let mut walk = Walk::new(superblock.tree_identity(shard), record.tree);
            let root = walk.next_node().unwrap();
            let image = disk.read(root.ptr.address, BlockCount::new(4)).await.unwrap();
            let node = walk.supply(image.as_slice().try_into().unwrap()).unwrap();
            let items: Vec<_> = node.items().collect();
            if shard == InodeNr::ROOT.shard() {
                let [(key, value)] = items[..] else { panic!("{items:?}") };
                assert_eq!(key, inode_key(InodeNr::ROOT));
                let root = InodeRecord::decode(value).unwrap();
                assert_eq!((root.kind, root.links, root.parent), (FileKind::Directory, 2, InodeNr::ROOT));
                assert_eq!((root.uid, root.gid), (1000, 100));
                assert_eq!((record.next_inode, record.inodes), (2, 1));
            } else {
                assert!(items.is_empty());
                assert_eq!((record.next_inode, record.inodes), (1, 0));
            }
        }
    });
}

#[test]
fn new_volume_is_complete() {
    for (lba_size, bytes, shards) in
        [(512, 64 << 20, 1), (4096, 64 << 20, 2), (4096, 300 << 20, 5), (512, 33 << 20, 1)]
    {
        let disk = sim_disk(lba_size, bytes);
        let report = format_on(&disk, &options(shards)).unwrap();
        assert!(report.bytes <= bytes && report.bytes + (1 << 20) > bytes);
        assert_eq!((report.shards, report.overwritten), (shards, None));
        check_new_volume(&disk, shards);
    }
}

#[test]
fn device_too_small_for_the_shards_is_left_alone() {
    let disk = sim_disk(4096, 64 << 20);
    let before = disk.image().content_hash();
    let Err(FormatError::Layout { error, device }) = format_on(&disk, &options(3)) else { panic!() };
    assert!(matches!(error, LayoutError::TooSmall { shards: 3, available: 0x400_0000, .. }), "{error}");
    assert_eq!(device, "sim:0");
    for bytes in [0, 4096, 1 << 20, 30 << 20] {
        assert!(matches!(format_on(&sim_disk(4096, bytes), &options(1)), Err(FormatError::Layout { .. })));
    }
    assert!(matches!(format_on(&disk, &options(0)), Err(FormatError::Layout { .. })));
    assert!(matches!(format_on(&disk, &options(65)), Err(FormatError::Layout { .. })));
    assert_eq!(disk.image().content_hash(), before);
}

#[test]
fn occupied_device_is_refused_unless_forced() {
    let disk = sim_disk(4096, 64 << 20);
    format_on(&disk, &options(1)).unwrap();
    let before = disk.image().content_hash();
    let Err(FormatError::Occupied { what, .. }) = format_on(&disk, &options(2)) else { panic!() };
    assert!(what.contains("Pollux") && what.contains("Kastor"), "{what}");
    assert_eq!(disk.image().content_hash(), before);
    let report = format_on(&disk, &FormatOptions { force: Force::Overwrite, ..options(2) }).unwrap();
    assert_eq!(report.overwritten, Some(what));
    check_new_volume(&disk, 2);
}

#[test]
fn damaged_volume_still_counts_as_one() {
    let disk = sim_disk(4096, 64 << 20);
    format_on(&disk, &options(1)).unwrap();
    disk.flip_bit(17 * 4096 + 100, 0);
    disk.flip_bit(4161 * 4096 + 100, 0);
    assert!(matches!(format_on(&disk, &options(1)), Err(FormatError::Occupied { .. })));
}

#[test]
fn foreign_file_system_is_refused_and_gone_when_forced() {
    let mut image = DiskImage::zeroed(64 << 20);
    image.write(1080, &[0x53, 0xef]);
    image.write((64 << 20) - 4096, b"EFI PART");
    let disk = SimDisk::from_image(SimDiskOptions::default(), image);
    let Err(FormatError::Occupied { what, .. }) = format_on(&disk, &options(1)) else { panic!() };
    assert!(what.contains("ext4"));
    format_on(&disk, &FormatOptions { force: Force::Overwrite, ..options(1) }).unwrap();
    let mut bytes = [1; 2];
    disk.image().read(1080, &mut bytes);
    assert_eq!(bytes, [0; 2]);
    disk.image().read((64 << 20) - 4096, &mut bytes);
    assert_eq!(bytes, [0; 2]);
    check_new_volume(&disk, 1);
}

#[test]
fn label_is_checked() {
    let disk = sim_disk(4096, 64 << 20);
    for label in ["x".repeat(65), "a\0b".to_owned()] {
        assert_eq!(format_on(&disk, &FormatOptions { label, ..options(1) }), Err(FormatError::Label));
    }
    assert!(format_on(&disk, &FormatOptions { label: "é".repeat(32), ..options(1) }).is_ok());
}

#[test]
fn power_cut_during_format_leaves_old_volume_none_or_new_one() {
    let old = sim_disk(4096, 64 << 20);
    format_on(&old, &options(1)).unwrap();
    let image = old.image();
    let mut seen = [0; 3];
    for writes in 0..60 {
        for seed in 0..4 {
            let disk = SimDisk::from_image(SimDiskOptions::default(), image.clone());
            disk.crash_after_writes(writes);
            let done = format_on(&disk, &FormatOptions { force: Force::Overwrite, ..options(2) }).is_ok();
            disk.power_cut(&CutPolicy::Random { seed, tearing: Tearing::Sectors });
            let found = with_disk(&disk, async |disk| superblock::read_newest(&disk).await);
            match found {
                Ok((superblock, _)) if superblock.shard_count() == 1 => {
                    assert!(!done);
                    seen[0] += 1;
                }
                Ok(_) => {
                    seen[2] += 1;
                    with_disk(&disk, async |disk| {
                        let (superblock, _) = superblock::read_newest(&disk).await.unwrap();
                        assert!(read_groups(&disk, &superblock).await.is_ok());
                    });
                }
                Err(SuperblockError::AllDamaged { .. } | SuperblockError::NotPollux { .. }) => {
                    assert!(!done);
                    seen[1] += 1;
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
    assert!(seen.iter().all(|count| *count > 0), "all three outcomes occur: {seen:?}");
}

#[test]
fn write_errors_are_reported() {
    let disk = sim_disk(4096, 64 << 20);
    disk.fail_writes(LbaRange { start: Lba::new(4161), count: LbaCount::new(1) });
    assert!(matches!(format_on(&disk, &options(1)), Err(FormatError::Io(_))));
    disk.clear_faults();
    format_on(&disk, &options(1)).unwrap();
    disk.fail_reads(LbaRange { start: Lba::new(0), count: LbaCount::new(16_384) });
    assert!(matches!(format_on(&disk, &options(1)), Err(FormatError::Io(_))));
}

#[test]
fn loading_notices_a_bitmap_that_is_not_the_superblocks() {
    let disk = sim_disk(4096, 64 << 20);
    format_on(&disk, &options(1)).unwrap();
    let load = |disk: &SimDisk| {
        with_disk(disk, async |disk| {
            let (superblock, _) = superblock::read_newest(&disk).await.unwrap();
            read_groups(&disk, &superblock).await.map(|groups| groups.by_shard.len())
        })
    };
    assert_eq!(load(&disk), Ok(1));
    // The same bitmap, valid in itself, of a group of another format of the device.
    disk.flip_bit(32 * 4096 + 300, 0);
    assert!(matches!(load(&disk), Err(alloc::ReadGroupsError::Group(_))));
    disk.flip_bit(32 * 4096 + 300, 0);
    disk.fail_reads(LbaRange { start: Lba::new(33), count: LbaCount::new(1) });
    assert_eq!(load(&disk), Ok(1), "an unreadable slot that is not needed does no harm");
    disk.fail_reads(LbaRange { start: Lba::new(32), count: LbaCount::new(1) });
    assert!(load(&disk).is_err());
}
