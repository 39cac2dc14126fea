//! Commits by way of the intent log: what they cost, and what a mount makes of a log.
//!
//! That nothing is lost at any crash point is the crash campaigns' matter: their fsyncs go through the log.

use super::world::{Shape, fsck};
use super::*;
use crate::disk::VolumeDisk;
use crate::request::SyncScope;
use crate::superblock::{Superblock, read_newest};
use crate::types::BLOCK_SIZE;

fn shape(shards: u8) -> Shape {
    let mount = MountOptions { page_memory: 16 << 20, tree_memory: 16 << 20, ..MountOptions::default() };
    Shape { seed: 7, shards, reactors: 1, blocks: 17 * 1024, mount }
}

async fn fsync(volume: &Volume, inode: InodeNr) {
    volume.call(Request::Sync { inode, scope: SyncScope::File }).await.unwrap();
}

/// Commands of the device: writes and flushes.
fn commands(disk: &SimDisk) -> (u64, u64) {
    (disk.write_count(), disk.flush_count())
}

async fn cost(disk: &SimDisk, work: impl Future<Output = ()>) -> (u64, u64) {
    let before = commands(disk);
    work.await;
    let after = commands(disk);
    (after.0 - before.0, after.1 - before.1)
}

fn superblock_of(shape: &Shape, disk: &SimDisk) -> Superblock {
    let sim = shape.simulator(disk, 9);
    let read = |ctx: Context| async move {
        let disk = VolumeDisk::new(ctx.disk().clone()).unwrap();
        read_newest(&disk).await.unwrap().0
    };
    sim.block_on(0, read).unwrap()
}

#[test]
fn small_write_and_fsync_cost_a_data_write_a_flush_and_a_log_write() {
    let shape = shape(1);
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        let file = create(volume, Volume::ROOT, "file", NewInode::Regular).await.inode;
        let write_and_sync = async |round: u8| {
            write(volume, file, 0, &[round; 4096]).await;
            fsync(volume, file).await;
        };
        let checkpoint = cost(&disk, write_and_sync(1)).await;
        println!("by a checkpoint: {checkpoint:?}, by the log: (2, 1)");
        for round in 2..5 {
            assert_eq!(cost(&disk, write_and_sync(round)).await, (2, 1), "data and log, a flush");
        }
        assert_eq!(cost(&disk, fsync(volume, file)).await, (0, 0), "nothing has changed");
        let directory = async {
            create(volume, Volume::ROOT, "directory", NewInode::Directory).await;
            fsync(volume, Volume::ROOT).await;
        };
        assert_eq!(cost(&disk, directory).await, (1, 0), "no data was written");
        let report = volume.report().await.unwrap();
        assert_eq!((report.log_writes, report.checkpoints), (4, 1));
    };
    shape.mounted(&disk, 1, run).unwrap();
}

#[test]
fn one_log_write_serves_every_shard() {
    let shape = shape(2);
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        let mut shards = std::collections::BTreeSet::new();
        create(volume, Volume::ROOT, "first", NewInode::Directory).await;
        fsync(volume, Volume::ROOT).await;
        for number in 0..8 {
            let name = format!("directory {number}");
            let made = create(volume, Volume::ROOT, &name, NewInode::Directory).await.inode;
            shards.insert(made.shard());
        }
        assert_eq!(shards.len(), 2);
        assert_eq!(cost(&disk, fsync(volume, Volume::ROOT)).await, (1, 0));
    };
    shape.mounted(&disk, 1, run).unwrap();
}

#[test]
fn epoch_that_does_not_fit_into_the_log_is_made_durable_by_a_checkpoint() {
    let shape = shape(1);
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        create(volume, Volume::ROOT, "first", NewInode::Directory).await;
        fsync(volume, Volume::ROOT).await;
        for number in 0..600 {
            create(volume, Volume::ROOT, &format!("directory {number}"), NewInode::Directory).await;
        }
        fsync(volume, Volume::ROOT).await;
        let report = volume.report().await.unwrap();
        assert_eq!((report.log_writes, report.checkpoints), (0, 2));
    };
    shape.mounted(&disk, 1, run).unwrap();
    let image = disk.image_after_cut(&CutPolicy::DropAll);
    let run = async |_: &Context, volume: &Volume| {
        assert!(lookup(volume, Volume::ROOT, "directory 599").await.is_ok());
    };
    shape.mounted(&shape.disk(image), 2, run).unwrap();
}

/// A volume with three entries in its log, after a power cut.
fn with_log(shape: &Shape) -> SimDisk {
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        for name in ["zero", "one", "two", "three"] {
            let file = create(volume, Volume::ROOT, name, NewInode::Regular).await.inode;
            write(volume, file, 0, name.as_bytes()).await;
            fsync(volume, file).await;
        }
    };
    shape.mounted(&disk, 1, run).unwrap();
    shape.disk(disk.image_after_cut(&CutPolicy::DropAll))
}

async fn names_there(volume: &Volume) -> usize {
    let mut there = 0;
    for name in ["zero", "one", "two", "three"] {
        if let Ok(file) = lookup(volume, Volume::ROOT, name).await {
            assert_eq!(read(volume, file.inode, 0, 100).await, name.as_bytes());
            there += 1;
        }
    }
    there
}

#[test]
fn mount_replays_the_log_and_leaves_an_empty_one() {
    let shape = shape(2);
    let disk = with_log(&shape);
    let before = superblock_of(&shape, &disk);
    fsck(&shape, &disk).unwrap();
    let run = async |_: &Context, volume: &Volume| {
        assert_eq!(names_there(volume).await, 4);
        assert_eq!(volume.report().await.unwrap().read_only, None);
    };
    shape.mounted(&disk, 2, run).unwrap();
    let after = superblock_of(&shape, &disk);
    assert!(after.epoch.get() > before.epoch.get() + 2, "the log's epochs are in the superblock");
    assert_ne!(after.incarnation, before.incarnation);
    assert_ne!(after.log.unwrap().head(), before.log.unwrap().head());
    fsck(&shape, &disk).unwrap();
}

#[test]
fn damaged_log_is_replayed_to_the_damage_and_the_volume_is_read_only() {
    let shape = shape(1);
    let disk = with_log(&shape);
    let head = superblock_of(&shape, &disk).log.unwrap().head().get();
    disk.flip_bit((head + 1) * BLOCK_SIZE + 200, 3);
    let found = fsck(&shape, &disk).expect_err("the damage is found");
    assert!(found.to_string().contains("the intent log is damaged: entry 2"), "{found}");
    let image = disk.image();
    let run = async |_: &Context, volume: &Volume| {
        assert_eq!(names_there(volume).await, 2);
        let reason = volume.report().await.unwrap().read_only.expect("it is read-only");
        assert!(reason.contains("the intent log is damaged: entry 2"), "{reason}");
    };
    shape.mounted(&disk, 2, run).unwrap();
    assert!(disk.image() == image, "nothing was written");
}

#[test]
fn torn_last_entry_takes_only_its_own_epoch_with_it() {
    let shape = shape(1);
    let disk = with_log(&shape);
    let head = superblock_of(&shape, &disk).log.unwrap().head().get();
    disk.flip_bit((head + 2) * BLOCK_SIZE + 200, 3);
    fsck(&shape, &disk).unwrap();
    let run = async |_: &Context, volume: &Volume| {
        assert_eq!(names_there(volume).await, 3);
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 2, run).unwrap();
    fsck(&shape, &disk).unwrap();
}

#[test]
fn lost_superblock_leaves_the_one_before_with_its_log() {
    let shape = shape(2);
    let disk = with_log(&shape);
    // The mount replays, and its checkpoint becomes the newest superblock; both copies of that are damaged.
    let before = superblock_of(&shape, &disk);
    shape.mounted(&disk, 2, async |_: &Context, _: &Volume| ()).unwrap();
    let lost = superblock_of(&shape, &disk);
    assert_eq!(lost.generation.get(), before.generation.get() + 1);
    for slot in lost.slots() {
        disk.flip_bit(slot.get() * BLOCK_SIZE + 130, 1);
    }
    assert_eq!(superblock_of(&shape, &disk), before);
    fsck(&shape, &disk).unwrap();
    let run = async |_: &Context, volume: &Volume| {
        assert_eq!(names_there(volume).await, 4);
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 3, run).unwrap();
    fsck(&shape, &disk).unwrap();
}
