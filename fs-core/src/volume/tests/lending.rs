//! Clones between shards: what they share, who frees it, what a crash or a lack of space leaves, and what `fsck` says.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use futures_util::future::join;

use super::client::Rng;
use super::clone::{clone, deduplicate, pattern, patterns, space, sync_file, whole};
use super::crash::Collector;
use super::history::History;
use super::world::{Shape, fsck, prepared};
use super::*;
use crate::request::{AllocateMode, CloneRange, Cloned};
use crate::types::BLOCK_SIZE;

pub(super) fn shape() -> Shape {
    let mount = MountOptions { commit_interval: Duration::from_millis(20), ..MountOptions::default() };
    Shape { seed: 9, shards: 3, reactors: 2, blocks: 64 * 1024, mount }
}

/// One directory on each of `shards` shards, in their order.
pub(super) async fn directories(volume: &Volume, shards: u8) -> Vec<InodeNr> {
    let mut found = vec![None; usize::from(shards)];
    for number in 0..200 {
        let made = create(volume, Volume::ROOT, &format!("d{number}"), NewInode::Directory).await.inode;
        found[made.shard().index()].get_or_insert(made);
    }
    found.into_iter().map(|directory| directory.expect("directories are spread")).collect()
}

pub(super) async fn file(volume: &Volume, directory: InodeNr, name: &str) -> InodeNr {
    create(volume, directory, name, NewInode::Regular).await.inode
}

/// As in `clone.rs`: every block an extent of its own.
pub(super) async fn alternating(
    volume: &Volume,
    directory: InodeNr,
    name: &str,
    tag: u8,
    blocks: u64,
) -> InodeNr {
    let inode = file(volume, directory, name).await;
    for first in 0..2 {
        for block in (first..blocks).step_by(2) {
            write(volume, inode, block * BLOCK_SIZE, &pattern(tag, block)).await;
        }
        sync_file(volume, inode).await;
    }
    inode
}

pub(super) async fn unlink(volume: &Volume, parent: InodeNr, name: &str, inode: InodeNr) {
    let unlinked = volume.call(Request::Unlink { parent, name: name.as_bytes().into() }).await;
    assert_eq!(unlinked, Ok(Reply::Done));
    assert_eq!(volume.call(Request::Forget { inode, lookups: 1 }).await, Ok(Reply::Done));
}

/// Two epochs, after which what was freed is free.
pub(super) async fn settle(volume: &Volume, ctx: &Context) {
    for round in 0..4 {
        let name = format!("settle{round}");
        let inode = file(volume, Volume::ROOT, &name).await;
        write(volume, inode, 0, b"x").await;
        sync(volume).await;
        unlink(volume, Volume::ROOT, &name, inode).await;
        ctx.sleep(Duration::from_millis(50)).await;
    }
    sync(volume).await;
}

#[test]
fn clone_between_shards_shares_blocks_and_the_last_owner_frees_them() {
    let shape = shape();
    let disk = shape.formatted();
    let run = async |ctx: &Context, volume: &Volume| {
        let homes = directories(volume, 3).await;
        let blocks = 2000;
        let source = file(volume, homes[0], "source").await;
        write(volume, source, 0, &patterns(1, blocks)[..blocks as usize * 4096 - 100]).await;
        let target = file(volume, homes[1], "target").await;
        sync(volume).await;
        let before = space(volume).await;
        let cloned = clone(volume, whole(source, target)).await.unwrap();
        assert_eq!(cloned.bytes, blocks * 4096 - 100);
        sync(volume).await;
        let after = space(volume).await;
        assert!(before.free - after.free < 100, "{before:?} {after:?}: a clone takes no data blocks");
        let whole_file = &patterns(1, blocks)[..blocks as usize * 4096 - 100];
        assert_eq!(read(volume, target, 0, 1 << 24).await, whole_file);

        // Both sides write; what the other one has stays.
        write(volume, source, 5000, &[0xee; 3000]).await;
        write(volume, target, 100_000, &[0xdd; 10]).await;
        sync(volume).await;
        let (mut source_now, mut target_now) = (whole_file.to_vec(), whole_file.to_vec());
        source_now[5000..8000].fill(0xee);
        target_now[100_000..100_010].fill(0xdd);
        assert_eq!(read(volume, source, 0, 1 << 24).await, source_now);
        assert_eq!(read(volume, target, 0, 1 << 24).await, target_now);

        unlink(volume, homes[0], "source", source).await;
        settle(volume, ctx).await;
        assert_eq!(read(volume, target, 0, 1 << 24).await, target_now);
        let shared = space(volume).await;
        assert!(shared.free < before.free + 100, "{before:?} {shared:?}: the borrower still has them");
        unlink(volume, homes[1], "target", target).await;
        settle(volume, ctx).await;
        let end = space(volume).await;
        assert!(end.free > before.free + blocks - 100, "{before:?} {end:?}: the last reference frees them");
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    fsck(&shape, &disk).unwrap();
}

#[test]
fn borrowed_blocks_are_cloned_on_and_come_home() {
    let shape = shape();
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        let homes = directories(volume, 3).await;
        let blocks = 150;
        let first = alternating(volume, homes[0], "first", 1, blocks).await;
        let second = file(volume, homes[1], "second").await;
        let third = file(volume, homes[2], "third").await;
        let back = file(volume, homes[0], "back").await;
        let inside = file(volume, homes[1], "inside").await;
        for (source, target) in [
            (first, second),
            (second, third),
            (third, back),
            (second, inside),
            (back, third),
            (third, second),
        ] {
            let cloned = clone(volume, whole(source, target)).await.unwrap();
            assert_eq!(cloned, Cloned { bytes: blocks * 4096, extents: blocks }, "{source} {target}");
        }
        // Every other block of one of them goes, and comes again.
        for block in (0..blocks).step_by(2) {
            let hole = Request::Allocate {
                inode: second,
                offset: FileOffset::new(block * 4096),
                length: 4096,
                mode: AllocateMode::PunchHole,
            };
            assert_eq!(volume.call(hole).await, Ok(Reply::Done));
        }
        clone(volume, whole(first, second)).await.unwrap();
        unlink(volume, homes[0], "first", first).await;
        sync(volume).await;
        for inode in [second, third, back, inside] {
            assert_eq!(read(volume, inode, 0, 1 << 24).await, patterns(1, blocks), "inode {inode}");
        }
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    fsck(&shape, &disk).unwrap();
    let run = async |_: &Context, volume: &Volume| {
        let homes = directories_again(volume).await;
        for (directory, name) in [(1, "second"), (2, "third"), (0, "back"), (1, "inside")] {
            let inode = lookup(volume, homes[directory], name).await.unwrap().inode;
            assert_eq!(read(volume, inode, 0, 1 << 24).await, patterns(1, 150), "{name}");
        }
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 2, run).unwrap();
}

pub(super) async fn directories_again(volume: &Volume) -> Vec<InodeNr> {
    let mut found = vec![None; 3];
    for number in 0..200 {
        let directory = lookup(volume, Volume::ROOT, &format!("d{number}")).await.unwrap().inode;
        found[directory.shard().index()].get_or_insert(directory);
    }
    found.into_iter().map(|directory| directory.expect("there is one")).collect()
}

#[test]
fn ranges_go_to_their_place_and_impossible_ones_are_refused() {
    let shape = shape();
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        let homes = directories(volume, 2.max(shape.shards)).await;
        let source = file(volume, homes[2], "source").await;
        write(volume, source, 4 * 4096, &patterns(1, 10)).await;
        write(volume, source, 40 * 4096, &patterns(2, 3)).await;
        let target = alternating(volume, homes[0], "target", 7, 60).await;
        let range = CloneRange {
            source,
            source_offset: FileOffset::new(2 * 4096),
            target,
            target_offset: FileOffset::new(9 * 4096),
            length: 41 * 4096,
        };
        // What the source has is not on the device yet.
        assert_eq!(clone(volume, range).await.unwrap().bytes, 41 * 4096);
        let mut expected = patterns(7, 60);
        let from = read(volume, source, 2 * 4096, 41 * 4096).await;
        expected[9 * 4096..50 * 4096].copy_from_slice(&from);
        assert_eq!(read(volume, target, 0, 1 << 20).await, expected);

        let unaligned = CloneRange { source_offset: FileOffset::new(1), length: 4096, ..range };
        assert_eq!(clone(volume, unaligned).await, Err(FsError::Invalid));
        let beyond = CloneRange { length: 1 << 30, ..range };
        assert_eq!(clone(volume, beyond).await, Err(FsError::Invalid));
        let directory = CloneRange { source: homes[2], ..range };
        assert_eq!(clone(volume, directory).await, Err(FsError::IsDirectory));
        let nobody = InodeNr::from_parts(source.shard(), 1 << 30).unwrap();
        assert_eq!(clone(volume, CloneRange { source: nobody, ..range }).await, Err(FsError::NotFound));
        let nowhere = InodeNr::from_parts(ShardId::new(60).unwrap(), 9).unwrap();
        assert_eq!(clone(volume, CloneRange { source: nowhere, ..range }).await, Err(FsError::NotFound));
        assert_eq!(read(volume, target, 0, 1 << 20).await, expected);
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    fsck(&shape, &disk).unwrap();
}

#[test]
fn deduplication_between_shards_compares_first() {
    let shape = shape();
    let disk = shape.formatted();
    let run = async |ctx: &Context, volume: &Volume| {
        let homes = directories(volume, 3).await;
        let blocks = 600;
        let source = file(volume, homes[1], "source").await;
        let target = alternating(volume, homes[0], "target", 3, blocks).await;
        write(volume, source, 0, &patterns(3, blocks)).await;
        sync(volume).await;
        let before = space(volume).await;
        let same = deduplicate(volume, whole(source, target)).await.unwrap().expect("they are the same");
        assert_eq!(same.bytes, blocks * 4096);
        settle(volume, ctx).await;
        let after = space(volume).await;
        assert!(after.free > before.free + blocks - 100, "{before:?} {after:?}");
        write(volume, source, 77, b"!").await;
        assert_eq!(deduplicate(volume, whole(source, target)).await, Ok(None));
        assert_eq!(read(volume, target, 0, 1 << 24).await, patterns(3, blocks));
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    fsck(&shape, &disk).unwrap();
}

#[test]
fn clones_in_opposite_directions_and_reads_of_their_sources_go_on() {
    let shape = shape();
    let disk = shape.formatted();
    let run = async |ctx: &Context, volume: &Volume| {
        let homes = directories(volume, 3).await;
        let blocks = 300;
        let left = alternating(volume, homes[0], "left", 1, blocks).await;
        let right = alternating(volume, homes[1], "right", 2, blocks).await;
        let (to_left, to_right) =
            (file(volume, homes[0], "to-left").await, file(volume, homes[1], "to-right").await);
        let (done, reads) = (Cell::new(false), Cell::new(0));
        let cloning = async {
            for _ in 0..3 {
                let (one, other) =
                    join(clone(volume, whole(left, to_right)), clone(volume, whole(right, to_left))).await;
                assert_eq!((one.unwrap().extents, other.unwrap().extents), (blocks, blocks));
                // The same two files the other way round: the order of their locks must not depend on the direction.
                let (one, other) =
                    join(clone(volume, whole(left, to_right)), clone(volume, whole(to_right, left))).await;
                assert!(one.is_ok() && other.is_ok(), "{one:?} {other:?}");
            }
            done.set(true);
        };
        let reading = async {
            while !done.get() {
                let block = reads.get() * 17 % blocks;
                assert_eq!(read(volume, right, block * 4096, 4096).await, pattern(2, block));
                reads.set(reads.get() + 1);
                ctx.yield_now().await;
            }
        };
        join(cloning, reading).await;
        assert!(reads.get() >= 10, "{} reads during the clones", reads.get());
        assert_eq!(read(volume, to_right, 0, 1 << 24).await, patterns(1, blocks));
        assert_eq!(read(volume, to_left, 0, 1 << 24).await, patterns(2, blocks));
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    fsck(&shape, &disk).unwrap();
}

/// Clones of the same blocks come and go on three shards, so that returns and loans of a block chase each other.
#[test]
fn blocks_that_are_being_returned_are_borrowed_again() {
    for seed in 0..6 {
        let shape = Shape { seed: 100 + seed, reactors: 1 + (seed % 3) as u16, ..shape() };
        let disk = shape.formatted();
        let run = async |ctx: &Context, volume: &Volume| {
            let homes = directories(volume, 3).await;
            let blocks = 40;
            let source = alternating(volume, homes[0], "source", 5, blocks).await;
            let mut rng = Rng::new(seed);
            let mut clones = Vec::new();
            for number in 0..60 {
                let home = homes[rng.below(3) as usize];
                let name = format!("clone{number}");
                let target = file(volume, home, &name).await;
                let (from, to) = (rng.below(blocks), rng.below(blocks));
                let (from, length) = (from.min(to), from.max(to) - from.min(to) + 1);
                let range = CloneRange {
                    source: clones.last().map_or(source, |(_, _, inode)| *inode),
                    source_offset: FileOffset::new(from * 4096),
                    target,
                    target_offset: FileOffset::new(from * 4096),
                    length: length * 4096,
                };
                let source_is_clone = !clones.is_empty();
                let outcome = clone(volume, range).await;
                assert!(outcome.is_ok() || source_is_clone, "{outcome:?}");
                clones.push((home, name, target));
                if clones.len() > 4 || rng.below(3) == 0 {
                    let (home, name, inode) = clones.remove(rng.below(clones.len() as u64) as usize);
                    unlink(volume, home, &name, inode).await;
                }
                if rng.below(4) == 0 {
                    ctx.sleep(Duration::from_micros(rng.below(3000))).await;
                }
            }
            assert_eq!(read(volume, source, 0, 1 << 24).await, patterns(5, blocks));
            for (_, _, inode) in &clones {
                let found = read(volume, *inode, 0, 1 << 24).await;
                for (block, bytes) in found.chunks(4096).enumerate() {
                    let expected = pattern(5, block as u64);
                    assert!(bytes == expected || bytes.iter().all(|byte| *byte == 0), "block {block}");
                }
            }
            volume.unmount().await.unwrap();
        };
        shape.mounted(&disk, 1, run).unwrap();
        fsck(&shape, &disk).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
    }
}

/// Two clones of the same blocks at once, while the clones before them are being deleted: a block may be lent, borrowed
/// already, or on its way back when either reaches it.
#[test]
fn the_same_blocks_are_borrowed_twice_and_returned_at_once() {
    for seed in 0..8 {
        let shape = Shape { seed: 200 + seed, reactors: 1 + (seed % 3) as u16, ..shape() };
        let disk = shape.formatted();
        let run = async |ctx: &Context, volume: &Volume| {
            let homes = directories(volume, 3).await;
            let blocks = 120;
            let source = alternating(volume, homes[0], "source", 5, blocks).await;
            let twin = file(volume, homes[0], "twin").await;
            clone(volume, whole(source, twin)).await.unwrap();
            let mut rng = Rng::new(seed);
            let mut before: Option<(InodeNr, InodeNr)> = None;
            for round in 0..12 {
                let names = [format!("one{round}"), format!("other{round}")];
                let one = file(volume, homes[1], &names[0]).await;
                let other = file(volume, homes[1], &names[1]).await;
                let (early, late) = (rng.below(400), rng.below(400));
                let deleting = async {
                    if let Some((one, other)) = before {
                        ctx.sleep(Duration::from_micros(early)).await;
                        unlink(volume, homes[1], &format!("one{}", round - 1), one).await;
                        unlink(volume, homes[1], &format!("other{}", round - 1), other).await;
                    }
                };
                let cloning = async {
                    let second = async {
                        ctx.sleep(Duration::from_micros(late)).await;
                        clone(volume, whole(twin, other)).await
                    };
                    join(clone(volume, whole(source, one)), second).await
                };
                let ((first, second), ()) = join(cloning, deleting).await;
                assert_eq!((first.unwrap().extents, second.unwrap().extents), (blocks, blocks));
                for inode in [one, other] {
                    assert_eq!(read(volume, inode, 0, 1 << 24).await, patterns(5, blocks));
                }
                before = Some((one, other));
            }
            volume.unmount().await.unwrap();
        };
        shape.mounted(&disk, 1, run).unwrap();
        fsck(&shape, &disk).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
    }
}

#[test]
fn clone_between_shards_is_whole_or_nothing_after_a_crash() {
    let blocks = 300;
    let shape = shape();
    let (disk, history) = prepared(&shape, 0);
    let history: Rc<RefCell<History>> = Rc::new(RefCell::new(history));
    let collector = Collector::watch(&disk, &history, 5);
    let own = Rc::clone(&collector);
    let run = async |ctx: &Context, volume: &Volume| {
        let homes = directories(volume, 3).await;
        let source = alternating(volume, homes[0], "source", 1, blocks).await;
        let target = alternating(volume, homes[1], "target", 2, blocks / 2).await;
        own.recording.set(true);
        let done = Cell::new(false);
        let cloning = async {
            clone(volume, whole(source, target)).await.unwrap();
            done.set(true);
        };
        let syncing = async {
            while !done.get() {
                sync(volume).await;
                ctx.yield_now().await;
            }
        };
        join(cloning, syncing).await;
        sync(volume).await;
        // And what is borrowed goes back, with crashes in between too.
        unlink(volume, homes[0], "source", source).await;
        write(volume, target, 0, &patterns(1, blocks)).await;
        sync(volume).await;
        ctx.sleep(Duration::from_millis(60)).await;
        sync(volume).await;
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    let (mut old, mut new) = (0, 0);
    for (number, (what, image)) in collector.states().into_iter().enumerate() {
        let disk = shape.disk(image);
        fsck(&shape, &disk).unwrap_or_else(|why| panic!("{what}: {why}"));
        let run = async |_: &Context, volume: &Volume| {
            let homes = directories_again(volume).await;
            let target = lookup(volume, homes[1], "target").await.unwrap();
            let found = read(volume, target.inode, 0, 1 << 22).await;
            let is_old = found == patterns(2, blocks / 2) && target.size == blocks / 2 * 4096;
            let is_new = found == patterns(1, blocks) && target.size == blocks * 4096;
            assert!(is_old || is_new, "{what}: half a clone, {} bytes", found.len());
            volume.unmount().await.unwrap();
            is_new
        };
        if shape.mounted(&disk, number as u64, run).unwrap() {
            new += 1;
        } else {
            old += 1;
        }
        fsck(&shape, &disk).unwrap_or_else(|why| panic!("{what}, recovered: {why}"));
    }
    println!("{old} states before, {new} after");
    assert!(old > 20 && new > 5, "{old} states before and {new} after the clone");
}

#[test]
fn clone_between_shards_that_finds_no_space_is_undone() {
    let (blocks, mut refused) = (500, 0);
    for turns in [0, 8, 16, 32, 64, 128, 10_000] {
        let shape = Shape { shards: 2, blocks: 17 * 1024, ..shape() };
        let disk = shape.formatted();
        let run = async |ctx: &Context, volume: &Volume| {
            let homes = directories(volume, 2).await;
            let source = alternating(volume, homes[0], "source", 1, blocks).await;
            let target = alternating(volume, homes[1], "target", 2, 100).await;
            let fillers = [file(volume, homes[0], "f0").await, file(volume, homes[1], "f1").await];
            sync(volume).await;
            let done = Cell::new(false);
            let cloning = async {
                let outcome = clone(volume, whole(source, target)).await;
                done.set(true);
                outcome
            };
            let filling = async {
                for _ in 0..turns {
                    if !done.get() {
                        ctx.yield_now().await;
                    }
                }
                for filler in fillers {
                    let (mut offset, mut length) = (0, space(volume).await.available * 4096);
                    while length >= 4096 && !done.get() {
                        let fill = Request::Allocate {
                            inode: filler,
                            offset: FileOffset::new(offset),
                            length,
                            mode: AllocateMode::KeepSize,
                        };
                        match volume.call(fill).await {
                            Ok(_) => offset += length,
                            Err(_) => length /= 2,
                        }
                    }
                }
            };
            let (outcome, ()) = join(cloning, filling).await;
            let found = read(volume, target, 0, 1 << 24).await;
            match &outcome {
                Ok(_) => assert_eq!(found, patterns(1, blocks)),
                Err(FsError::NoSpace) => assert_eq!(found, patterns(2, 100), "{turns} turns"),
                Err(error) => panic!("{turns} turns: {error}"),
            }
            volume.unmount().await.unwrap();
            outcome.is_err()
        };
        refused += u32::from(shape.mounted(&disk, 1, run).unwrap());
        fsck(&shape, &disk).unwrap();
    }
    println!("{refused} of 7 clones found no space");
    assert!((1..7).contains(&refused), "{refused} of 7 clones found no space");
}
