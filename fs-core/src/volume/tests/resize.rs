//! Growing and shrinking: what becomes of space and contents, what is refused, and what a crash in the middle leaves.

use std::cell::Cell;
use std::ops::ControlFlow;
use std::rc::Rc;

use futures_util::future::join;

use super::client::{Client, Ending};
use super::clone::{clone, patterns, space, sync_file, unlink, whole};
use super::crash::crash_of;
use super::model::{Op, TOP};
use super::world::{SeedNote, Shape, fsck, prepared, seeds, session};
use super::*;
use crate::format::superblock::{RING_SLOTS, RING_STARTS, Superblock};
use crate::relocate::RelocateProgress;
use crate::types::BLOCK_SIZE;
use crate::volume::ResizeError;
use reactor::sim::DiskImage;

/// Seeds of an ordinary test run.
const SEEDS: u64 = 4;

/// Seeds whose crashes an ordinary test run enumerates.
const CRASH_SEEDS: u64 = 2;

/// Blocks of a group of the volumes here, and bytes.
const GROUP_BLOCKS: u64 = 1024;
const GROUP: u64 = GROUP_BLOCKS * BLOCK_SIZE;

fn shape(shards: u8) -> Shape {
    let mount = MountOptions { commit_interval: Duration::from_millis(20), ..MountOptions::default() };
    Shape {
        seed: 33,
        shards,
        reactors: u16::from(shards),
        blocks: u64::from(shards) * 20 * GROUP_BLOCKS,
        mount,
    }
}

fn go_on(_: RelocateProgress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Everything is on the device, and what was deleted is free.
async fn settle(volume: &Volume) {
    for _ in 0..3 {
        sync(volume).await;
        volume.shared.checkpoint_now().await.unwrap();
    }
}

/// The bytes of the volume.
async fn bytes(volume: &Volume) -> u64 {
    space(volume).await.blocks * BLOCK_SIZE
}

#[test]
fn shrunk_volume_keeps_its_files_and_their_sharing_and_grows_again() {
    for shards in [1, 3] {
        let shape = shape(shards);
        let disk = shape.formatted();
        let run = async |_: &Context, volume: &Volume| {
            let full = bytes(volume).await;
            // What comes after it lies behind it.
            let filler = create(volume, Volume::ROOT, "filler", NewInode::Regular).await.inode;
            for at in (0..15_500).step_by(500) {
                write(volume, filler, at * BLOCK_SIZE, &patterns(77, 500)).await;
            }
            sync_file(volume, filler).await;
            let mut files = Vec::new();
            for number in 0..4_u8 {
                let name = format!("file-{number}");
                let inode = create(volume, Volume::ROOT, &name, NewInode::Regular).await.inode;
                write(volume, inode, 0, &patterns(number, 600)).await;
                sync_file(volume, inode).await;
                files.push(inode);
            }
            let copy = create(volume, Volume::ROOT, "copy", NewInode::Regular).await.inode;
            clone(volume, whole(files[0], copy)).await.unwrap();
            unlink(volume, "filler", filler).await;
            settle(volume).await;
            let before = space(volume).await;

            // Not at the border of a group: it ends before.
            let to = 16 * GROUP + 100 * BLOCK_SIZE;
            let small = volume.shrink(to, go_on).await.unwrap();
            assert_eq!((small.bytes_before, small.bytes, small.groups), (full, 16 * GROUP, 16), "{small:?}");
            assert!(
                shards > 1 || small.relocated.blocks > 1000,
                "hardly anything had to be moved: {small:?}"
            );
            settle(volume).await;
            let now = space(volume).await;
            assert_eq!(now.blocks, 16 * GROUP / BLOCK_SIZE);
            let used = |space: &SpaceReport| space.blocks - space.free;
            assert!(used(&before) > used(&now), "the groups' own blocks have gone: {before:?}, {now:?}");
            assert!(used(&before) - used(&now) < 300, "and nothing else: {before:?}, {now:?}");
            for (number, inode) in (0..).zip(&files) {
                assert_eq!(read(volume, *inode, 0, 1 << 23).await, patterns(number, 600));
            }
            assert_eq!(read(volume, copy, 0, 1 << 23).await, patterns(0, 600));

            let large = volume.grow(None).await.unwrap();
            assert_eq!((large.bytes_before, large.bytes), (16 * GROUP, full));
            let again = space(volume).await;
            assert_eq!(again.blocks, before.blocks);
            settle(volume).await;
            let again = space(volume).await;
            assert!(again.free.abs_diff(before.free) < 100, "{before:?}, {again:?}");
            assert_eq!(volume.grow(None).await.unwrap().bytes, full, "there is nothing more");
            // The new groups are used.
            let more = create(volume, Volume::ROOT, "more", NewInode::Regular).await.inode;
            let blocks = again.available / u64::from(shards) / 2;
            for at in (0..blocks).step_by(500) {
                write(volume, more, at * BLOCK_SIZE, &patterns(9, 500)).await;
            }
            sync_file(volume, more).await;
            volume.unmount().await.unwrap();
        };
        shape.mounted(&disk, 1, run).unwrap();
        fsck(&shape, &disk).unwrap();
        let run = async |_: &Context, volume: &Volume| {
            assert_eq!(volume.warnings(), Vec::<String>::new());
            let inode = lookup(volume, Volume::ROOT, "copy").await.unwrap().inode;
            assert_eq!(read(volume, inode, 0, 1 << 23).await, patterns(0, 600));
            volume.unmount().await.unwrap();
        };
        shape.mounted(&disk, 2, run).unwrap();
    }
}

#[test]
fn volume_grows_onto_a_larger_device_and_its_shorter_last_group_with_it() {
    let small = Shape { blocks: 16 * GROUP_BLOCKS + 300, ..shape(1) };
    let disk = small.formatted();
    let large = Shape { blocks: 40 * GROUP_BLOCKS + 260, ..small.clone() };
    let disk = large.disk(disk.image().resized(large.blocks * BLOCK_SIZE));
    let run = async |_: &Context, volume: &Volume| {
        // With the first change the intent log gets its place.
        create(volume, Volume::ROOT, "file", NewInode::Regular).await;
        settle(volume).await;
        let before = space(volume).await;
        assert_eq!(before.blocks, small.blocks);
        let part = volume.grow(Some(20 * GROUP)).await.unwrap();
        assert_eq!((part.bytes, part.groups), (20 * GROUP, 20));
        let all = volume.grow(None).await.unwrap();
        assert_eq!((all.bytes, all.groups), (large.blocks * BLOCK_SIZE, 41));
        settle(volume).await;
        let gained = space(volume).await.free - before.free;
        assert_eq!(gained, large.blocks - small.blocks - 24 * 3, "all but the slots of 24 groups");
        volume.unmount().await.unwrap();
    };
    large.mounted(&disk, 1, run).unwrap();
    fsck(&large, &disk).unwrap();
    let run = async |_: &Context, volume: &Volume| {
        assert_eq!(bytes(volume).await, large.blocks * BLOCK_SIZE);
        assert_eq!(volume.warnings(), Vec::<String>::new());
        volume.unmount().await.unwrap();
    };
    large.mounted(&disk, 2, run).unwrap();
}

#[test]
fn device_may_be_cut_as_soon_as_the_volume_has_shrunk() {
    let shape = shape(1);
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        let inode = create(volume, Volume::ROOT, "file", NewInode::Regular).await.inode;
        write(volume, inode, 0, &patterns(1, 100)).await;
        sync(volume).await;
        volume.shrink(16 * GROUP, go_on).await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    let cut = Shape { blocks: 16 * GROUP_BLOCKS, ..shape.clone() };
    let mut image = disk.durable_image().resized(cut.blocks * BLOCK_SIZE);
    let slots = RING_STARTS.into_iter().flat_map(|ring| (0..RING_SLOTS).map(move |slot| ring.get() + slot));
    let generation = |image: &DiskImage, slot: u64| {
        let mut block = [0; BLOCK_SIZE as usize];
        image.read(slot * BLOCK_SIZE, &mut block);
        Superblock::decode(&block).ok().map(|superblock| superblock.generation)
    };
    let newest = slots.clone().filter_map(|slot| generation(&image, slot)).max();
    // With the newest superblock, and with the one that counts if that is damaged.
    for damaged in [false, true] {
        if damaged {
            for slot in slots.clone().filter(|slot| generation(&image, *slot) == newest).collect::<Vec<_>>() {
                image.write(slot * BLOCK_SIZE + 100, &[0x5a; 100]);
            }
        }
        let disk = cut.disk(image.clone());
        let run = async |_: &Context, volume: &Volume| {
            assert_eq!(bytes(volume).await, 16 * GROUP);
            let inode = lookup(volume, Volume::ROOT, "file").await.unwrap().inode;
            assert_eq!(read(volume, inode, 0, 1 << 23).await, patterns(1, 100));
            volume.unmount().await.unwrap();
        };
        cut.mounted(&disk, 2, run).unwrap();
    }
}

#[test]
fn sizes_that_cannot_be_are_refused_with_what_is_needed() {
    let shape = shape(1);
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        let full = bytes(volume).await;
        let device = shape.blocks * BLOCK_SIZE;
        let inode = create(volume, Volume::ROOT, "large", NewInode::Regular).await.inode;
        for at in (0..17_000).step_by(500) {
            write(volume, inode, at * BLOCK_SIZE, &patterns(1, 500)).await;
        }
        settle(volume).await;
        let before = space(volume).await;
        let asked = device + GROUP;
        assert_eq!(volume.grow(Some(asked)).await, Err(ResizeError::BeyondDevice { device, asked }));
        let asked = full - 1;
        assert_eq!(volume.grow(Some(asked)).await, Err(ResizeError::WouldShrink { bytes: full, asked }));
        let asked = full + GROUP;
        assert_eq!(volume.shrink(asked, go_on).await, Err(ResizeError::WouldGrow { bytes: full, asked }));
        let refused = volume.shrink(15 * GROUP, go_on).await;
        assert!(
            matches!(refused, Err(ResizeError::Layout { least, .. }) if least == 16 * GROUP),
            "{refused:?}"
        );
        let refused = volume.shrink(16 * GROUP, go_on).await;
        let Err(ResizeError::TooSmall { asked, needed }) = refused else { panic!("{refused:?}") };
        assert!(asked == 16 * GROUP && needed > 16 * GROUP && needed <= full, "{needed} of {full}");
        assert_eq!(space(volume).await, before, "nothing has changed, and nothing is closed");
        let stop = |_: RelocateProgress| ControlFlow::Break(());
        let cancelled = volume.shrink(19 * GROUP, stop).await.unwrap();
        assert_eq!((cancelled.bytes, cancelled.relocated.cancelled), (full, true));
        assert_eq!(space(volume).await.available, before.available, "its groups are open again");
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    fsck(&shape, &disk).unwrap();
}

/// Shrinks as far as it goes and grows back, `times` times; returns how often it shrank.
async fn resize_again_and_again(volume: &Volume, times: u64) -> u64 {
    let mut shrunk = 0;
    for turn in 0..times {
        let full = bytes(volume).await;
        let to = full - (1 + turn % 3) * 3 * GROUP;
        match volume.shrink(to, go_on).await {
            Ok(report) if report.bytes <= to => shrunk += 1,
            // Blocks that are lent to another shard stay where they are.
            Err(ResizeError::Left { .. } | ResizeError::TooSmall { .. } | ResizeError::Layout { .. }) => {}
            other => panic!("shrinking: {other:?}"),
        }
        let grown = volume.grow(None).await.unwrap();
        assert_eq!(grown.bytes, full);
    }
    shrunk
}

/// Lets a client work, the first one as long as the volume's size changes beside it.
async fn beside_resizing(client: &mut Client, ops: usize, times: u64, shrunk: &Rc<Cell<u64>>) -> Ending {
    if client.number > 0 {
        return client.run(ops).await;
    }
    let sync = Op::Sync { node: TOP, scope: SyncScope::Volume };
    if client.run(30).await != Ending::Finished || client.step(&sync).await != Ending::Finished {
        return Ending::DeviceGone;
    }
    let volume = client.volume.clone();
    let ended = Cell::new(false);
    let resizing = async {
        shrunk.set(shrunk.get() + resize_again_and_again(&volume, times).await);
        ended.set(true);
    };
    let working = async {
        while !ended.get() {
            let ending = client.run(5).await;
            if ending != Ending::Finished {
                return ending;
            }
        }
        client.run(5).await
    };
    join(working, resizing).await.0
}

fn larger(seed: u64) -> Shape {
    let shape = Shape::random(seed);
    Shape { blocks: u64::from(shape.shards) * 14 * 1024, ..shape }
}

#[test]
fn clients_beside_changes_of_size_see_what_the_model_says() {
    let all = Rc::new(Cell::new(0));
    for seed in seeds(SEEDS) {
        let _note = SeedNote(seed);
        let shape = larger(seed);
        let (disk, history) = prepared(&shape, 3);
        let history = Rc::new(std::cell::RefCell::new(history));
        for salt in 10..12 {
            let shrunk = Rc::clone(&all);
            session(&shape, &disk, &history, salt, async move |client: &mut Client| {
                client.check_all().await.expect("what was unmounted is there");
                let ending = beside_resizing(client, 300, 3, &shrunk).await;
                client.check_all().await.expect("what was done is there");
                ending
            });
        }
    }
    assert!(all.get() >= SEEDS, "it shrank {} times only", all.get());
}

#[test]
fn every_write_of_a_change_of_size_beside_clients_may_be_the_last() {
    let shrunk = Rc::new(Cell::new(0_u64));
    for seed in seeds(CRASH_SEEDS) {
        let _note = SeedNote(seed);
        let seed_shrunk = Rc::clone(&shrunk);
        let script = async move |client: &mut Client| beside_resizing(client, 40, 1, &seed_shrunk).await;
        crash_of(seed, script).unwrap_or_else(|why| panic!("{why}"));
    }
    assert!(shrunk.get() > 0);
}
