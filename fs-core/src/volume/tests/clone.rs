//! Clones: what they share, what they cost, what a crash or a lack of space leaves of them, and who goes on meanwhile.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use futures_util::future::join;

use super::crash::Collector;
use super::history::History;
use super::world::{Shape, fsck, prepared};
use super::*;
use crate::request::{AllocateMode, AttributeChange, CloneRange, Cloned, SpaceReport};
use crate::types::BLOCK_SIZE;

fn shape() -> Shape {
    let mount = MountOptions { commit_interval: Duration::from_millis(20), ..MountOptions::default() };
    Shape { seed: 9, shards: 1, reactors: 1, blocks: 32 * 1024, mount }
}

pub(super) fn pattern(tag: u8, block: u64) -> Vec<u8> {
    (0..BLOCK_SIZE).map(|at| tag ^ (block as u8).wrapping_mul(31) ^ (at % 251) as u8).collect()
}

pub(super) fn patterns(tag: u8, blocks: u64) -> Vec<u8> {
    (0..blocks).flat_map(|block| pattern(tag, block)).collect()
}

pub(super) async fn sync_file(volume: &Volume, inode: InodeNr) {
    assert_eq!(volume.call(Request::Sync { inode, scope: SyncScope::File }).await, Ok(Reply::Done));
}

/// A file whose every block is an extent of its own: even blocks are on the device before odd ones are written.
async fn alternating(volume: &Volume, name: &str, tag: u8, blocks: u64) -> InodeNr {
    let inode = create(volume, Volume::ROOT, name, NewInode::Regular).await.inode;
    for first in 0..2 {
        for block in (first..blocks).step_by(2) {
            write(volume, inode, block * BLOCK_SIZE, &pattern(tag, block)).await;
        }
        sync_file(volume, inode).await;
    }
    inode
}

pub(super) fn whole(source: InodeNr, target: InodeNr) -> CloneRange {
    let start = FileOffset::new(0);
    CloneRange { source, source_offset: start, target, target_offset: start, length: 0 }
}

pub(super) async fn clone(volume: &Volume, range: CloneRange) -> Result<Cloned, FsError> {
    match volume.call(Request::Clone(range)).await? {
        Reply::Cloned(cloned) => Ok(cloned),
        other => panic!("clone: {other:?}"),
    }
}

pub(super) async fn deduplicate(volume: &Volume, range: CloneRange) -> Result<Option<Cloned>, FsError> {
    match volume.call(Request::Deduplicate(range)).await? {
        Reply::Deduplicated(outcome) => Ok(outcome),
        other => panic!("deduplicate: {other:?}"),
    }
}

pub(super) async fn space(volume: &Volume) -> SpaceReport {
    match volume.call(Request::StatFs).await {
        Ok(Reply::Space(space)) => space,
        other => panic!("statfs: {other:?}"),
    }
}

async fn unlink_name(volume: &Volume, name: &str) {
    let unlinked = volume.call(Request::Unlink { parent: Volume::ROOT, name: name.as_bytes().into() }).await;
    assert_eq!(unlinked, Ok(Reply::Done));
}

pub(super) async fn unlink(volume: &Volume, name: &str, inode: InodeNr) {
    unlink_name(volume, name).await;
    assert_eq!(volume.call(Request::Forget { inode, lookups: 1 }).await, Ok(Reply::Done));
}

#[test]
fn clone_shares_its_blocks_until_one_side_writes() {
    let shape = shape();
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        let blocks = 2000;
        let source = create(volume, Volume::ROOT, "source", NewInode::Regular).await.inode;
        write(volume, source, 0, &patterns(1, blocks)[..blocks as usize * 4096 - 100]).await;
        let target = create(volume, Volume::ROOT, "target", NewInode::Regular).await.inode;
        sync(volume).await;
        let before = space(volume).await;

        let cloned = clone(volume, whole(source, target)).await.unwrap();
        assert_eq!(cloned.bytes, blocks * 4096 - 100);
        assert!(cloned.extents >= 8, "{cloned:?}");
        sync(volume).await;
        let after = space(volume).await;
        assert!(before.free - after.free < 100, "{before:?} {after:?}: a clone takes no data blocks");
        assert_eq!(
            read(volume, target, 0, 1 << 24).await,
            patterns(1, blocks)[..blocks as usize * 4096 - 100]
        );

        write(volume, source, 5000, &[0xee; 3000]).await;
        write(volume, target, 100_000, &[0xdd; 10]).await;
        sync(volume).await;
        let (old, mut source_now) = (patterns(1, blocks), patterns(1, blocks));
        source_now[5000..8000].fill(0xee);
        let mut target_now = old.clone();
        target_now[100_000..100_010].fill(0xdd);
        assert_eq!(read(volume, source, 0, 300_000).await, source_now[..300_000]);
        assert_eq!(read(volume, target, 0, 300_000).await, target_now[..300_000]);

        unlink(volume, "source", source).await;
        sync(volume).await;
        assert_eq!(read(volume, target, 0, 300_000).await, target_now[..300_000]);
        unlink(volume, "target", target).await;
        for _ in 0..4 {
            write(volume, create(volume, Volume::ROOT, "x", NewInode::Regular).await.inode, 0, b"x").await;
            sync(volume).await;
            unlink_name(volume, "x").await;
        }
        let end = space(volume).await;
        assert!(
            end.free > before.free + blocks - 100,
            "{before:?} {end:?}: the last reference frees the blocks"
        );
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    fsck(&shape, &disk).unwrap();
}

#[test]
fn ranges_holes_and_preallocation_are_cloned_as_they_read() {
    let shape = shape();
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        let source = create(volume, Volume::ROOT, "source", NewInode::Regular).await.inode;
        write(volume, source, 4 * 4096, &patterns(1, 10)).await;
        write(volume, source, 40 * 4096, &patterns(2, 3)).await;
        let prealloc = Request::Allocate {
            inode: source,
            offset: FileOffset::new(20 * 4096),
            length: 5 * 4096,
            mode: AllocateMode::KeepSize,
        };
        assert_eq!(volume.call(prealloc).await, Ok(Reply::Done));
        let target = alternating(volume, "target", 7, 60).await;
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
        // Within one file, and beyond its end.
        let inside = CloneRange { source: target, target_offset: FileOffset::new(70 * 4096), ..range };
        assert_eq!(clone(volume, inside).await.unwrap().bytes, 41 * 4096);
        let copy = expected[2 * 4096..43 * 4096].to_vec();
        expected.resize(70 * 4096, 0);
        expected.extend(copy);
        assert_eq!(read(volume, target, 0, 1 << 20).await, expected);
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    fsck(&shape, &disk).unwrap();
}

#[test]
fn only_what_is_the_same_is_deduplicated() {
    let shape = shape();
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        let blocks = 1000;
        let contents = &patterns(3, blocks)[..blocks as usize * 4096 - 7];
        let source = create(volume, Volume::ROOT, "source", NewInode::Regular).await.inode;
        let target = alternating(volume, "target", 3, blocks).await;
        write(volume, source, 0, contents).await;
        let shorter = AttributeChange { size: Some(contents.len() as u64), ..AttributeChange::default() };
        volume.call(Request::SetAttributes { inode: target, change: shorter }).await.unwrap();
        sync(volume).await;
        let before = (space(volume).await, lookup(volume, Volume::ROOT, "target").await.unwrap());
        let same = deduplicate(volume, whole(source, target)).await.unwrap().expect("they are the same");
        assert_eq!(same.bytes, contents.len() as u64);
        for _ in 0..3 {
            write(volume, create(volume, Volume::ROOT, "x", NewInode::Regular).await.inode, 0, b"x").await;
            unlink_name(volume, "x").await;
            sync(volume).await;
        }
        let after = (space(volume).await, lookup(volume, Volume::ROOT, "target").await.unwrap());
        assert!(after.0.free > before.0.free + blocks - 100, "{before:?} {after:?}");
        assert_eq!((after.1.modified, after.1.size), (before.1.modified, before.1.size));
        assert_eq!(read(volume, target, 0, 1 << 24).await, contents);

        // One byte, on the device or only accepted so far, and nothing is shared.
        for (offset, synced) in [(700 * 4096 + 9, true), (3, false)] {
            write(volume, source, offset, b"!").await;
            if synced {
                sync(volume).await;
            }
            assert_eq!(deduplicate(volume, whole(source, target)).await, Ok(None));
        }
        assert_eq!(read(volume, target, 0, 1 << 24).await, contents);
        // Beyond the target's end there is nothing to compare with.
        let beyond = CloneRange {
            target_offset: FileOffset::new(blocks * 4096),
            length: 4096,
            ..whole(source, target)
        };
        assert_eq!(deduplicate(volume, beyond).await, Err(FsError::Invalid));
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    fsck(&shape, &disk).unwrap();
}

#[test]
fn impossible_clones_are_refused_and_change_nothing() {
    let shape = shape();
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        let source = create(volume, Volume::ROOT, "source", NewInode::Regular).await.inode;
        write(volume, source, 0, &patterns(1, 8)[..30_000]).await;
        let target = create(volume, Volume::ROOT, "target", NewInode::Regular).await.inode;
        write(volume, target, 0, &patterns(2, 20)).await;
        let directory = create(volume, Volume::ROOT, "directory", NewInode::Directory).await.inode;
        let nobody = InodeNr::new(1 << 30);
        let range = |source_offset, target_offset, length| CloneRange {
            source,
            source_offset: FileOffset::new(source_offset),
            target,
            target_offset: FileOffset::new(target_offset),
            length,
        };
        let cases = [
            (range(1, 0, 4096), FsError::Invalid),
            (range(0, 1, 4096), FsError::Invalid),
            (range(0, 0, 4095), FsError::Invalid),
            // The source's end may not fall into the middle of a block of the target that goes on.
            (range(0, 0, 30_000), FsError::Invalid),
            (range(0, 0, 32_768), FsError::Invalid),
            (range(40_960, 0, 0), FsError::Invalid),
            (range(30_000, 0, 0), FsError::Invalid),
            (range(0, 0, u64::MAX), FsError::Invalid),
            (range(0, crate::MAX_FILE_SIZE, 4096), FsError::FileTooLarge),
            (CloneRange { target: source, ..range(0, 4096, 8192) }, FsError::Invalid),
            (CloneRange { target: source, ..range(0, 0, 4096) }, FsError::Invalid),
            (CloneRange { source: directory, ..range(0, 0, 4096) }, FsError::IsDirectory),
            (CloneRange { target: directory, ..range(0, 0, 4096) }, FsError::IsDirectory),
            (CloneRange { source: nobody, ..range(0, 0, 4096) }, FsError::NotFound),
        ];
        for (range, error) in cases {
            assert_eq!(clone(volume, range).await, Err(error), "{range:?}");
        }
        let empty = create(volume, Volume::ROOT, "empty", NewInode::Regular).await.inode;
        assert_eq!(clone(volume, whole(empty, target)).await, Ok(Cloned::default()));
        assert_eq!(read(volume, source, 0, 100_000).await, patterns(1, 8)[..30_000]);
        assert_eq!(read(volume, target, 0, 100_000).await, patterns(2, 20));
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    fsck(&shape, &disk).unwrap();
}

/// A clone of this many extents, and readers that count what they can read meanwhile.
fn reads_during_a_clone() -> u64 {
    let shape = shape();
    let disk = shape.formatted();
    let run = async |ctx: &Context, volume: &Volume| {
        let blocks = 3000;
        let source = alternating(volume, "source", 1, blocks).await;
        let target = alternating(volume, "target", 2, 64).await;
        let (done, reads) = (Cell::new(false), Cell::new(0));
        let cloning = async {
            let cloned = clone(volume, whole(source, target)).await.unwrap();
            assert_eq!(cloned, Cloned { bytes: blocks * 4096, extents: blocks });
            done.set(true);
        };
        let reading = async {
            while !done.get() {
                let block = reads.get() * 17 % blocks;
                let found = read(volume, source, block * 4096, 4096).await;
                assert_eq!(found, pattern(1, block));
                reads.set(reads.get() + 1);
                ctx.yield_now().await;
            }
        };
        join(cloning, reading).await;
        assert_eq!(read(volume, target, 0, 1 << 24).await, patterns(1, blocks));
        volume.unmount().await.unwrap();
        reads.get()
    };
    let reads = shape.mounted(&disk, 1, run).unwrap();
    fsck(&shape, &disk).unwrap();
    reads
}

#[test]
fn reads_of_the_source_go_on_during_a_long_clone() {
    // Each read waits for the device.
    let reads = reads_during_a_clone();
    assert!(reads >= 10, "{reads} reads of the source during the clone");
}

#[test]
fn reads_would_wait_for_a_clone_that_locks_its_source() {
    let _planted = ::planted::Planted::new(&crate::planted::SPOT, crate::planted::Bug::SourceRangeLocked);
    let reads = reads_during_a_clone();
    assert!(reads < 10, "{reads} reads of the source, which was locked, during the clone");
}

#[test]
fn long_clone_is_there_as_a_whole_or_not_at_all_after_a_crash() {
    let blocks = 400;
    let shape = shape();
    let (disk, history) = prepared(&shape, 0);
    let history: Rc<RefCell<History>> = Rc::new(RefCell::new(history));
    let collector = Collector::watch(&disk, &history, 5);
    let own = Rc::clone(&collector);
    let run = async |ctx: &Context, volume: &Volume| {
        let source = alternating(volume, "source", 1, blocks).await;
        let target = alternating(volume, "target", 2, blocks / 2).await;
        own.recording.set(true);
        let done = Cell::new(false);
        // Checkpoints in the middle, so that crashes find the intent.
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
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    let states = collector.states();
    let (mut old, mut new, mut undone) = (0, 0, 0);
    for (number, (what, image)) in states.into_iter().enumerate() {
        let disk = shape.disk(image);
        fsck(&shape, &disk).unwrap_or_else(|why| panic!("{what}: {why}"));
        let run = async |_: &Context, volume: &Volume| {
            let target = lookup(volume, Volume::ROOT, "target").await.unwrap();
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
        undone += 1;
    }
    println!("{old} states before, {new} after, of {undone}");
    assert!(old > 20 && new > 2, "{old} states before and {new} after the clone");
}

#[test]
fn clone_that_finds_no_space_half_way_is_undone() {
    let (blocks, mut refused) = (1200, 0);
    // Somebody takes the rest of the space when the clone has come ever further.
    for turns in [0, 4, 8, 16, 32, 64, 10_000] {
        let shape = Shape { blocks: 9 * 1024, ..shape() };
        let disk = shape.formatted();
        let run = async |ctx: &Context, volume: &Volume| {
            let source = alternating(volume, "source", 1, blocks).await;
            let target = alternating(volume, "target", 2, 300).await;
            let filler = create(volume, Volume::ROOT, "filler", NewInode::Regular).await.inode;
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
                let mut length = space(volume).await.available * 4096;
                let mut offset = 0;
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
            };
            let (outcome, ()) = join(cloning, filling).await;
            let found = read(volume, target, 0, 1 << 24).await;
            match &outcome {
                Ok(_) => assert_eq!(found, patterns(1, blocks)),
                Err(FsError::NoSpace) => assert_eq!(found, patterns(2, 300), "{turns} turns"),
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
