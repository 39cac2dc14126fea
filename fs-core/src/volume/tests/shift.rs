//! Ranges taken out of files, holes put into them, blocks no longer shared: long ones, what is refused, and what a crash leaves.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use futures_util::future::join;

use super::clone::{clone, pattern, patterns, space, sync_file, whole};
use super::crash::Collector;
use super::history::History;
use super::world::{Shape, fsck, prepared};
use super::*;
use crate::MAX_FILE_SIZE;
use crate::request::{AllocateMode, ExtentSummary};
use crate::types::BLOCK_SIZE;

/// Blocks of the files here, each an extent of its own.
const BLOCKS: u64 = 160;

fn shape() -> Shape {
    let mount = MountOptions { commit_interval: Duration::from_secs(60), ..MountOptions::default() };
    Shape { seed: 91, shards: 1, reactors: 1, blocks: 16 * 1024, mount }
}

async fn allocate(
    volume: &Volume,
    inode: InodeNr,
    offset: u64,
    length: u64,
    mode: AllocateMode,
) -> Result<(), FsError> {
    let offset = FileOffset::new(offset);
    volume.call(Request::Allocate { inode, offset, length, mode }).await.map(drop)
}

/// A file whose neighbouring blocks do not lie beside each other.
async fn in_pieces(volume: &Volume, name: &str, tag: u8) -> InodeNr {
    let inode = create(volume, Volume::ROOT, name, NewInode::Regular).await.inode;
    for first in 0..2 {
        for block in (first..BLOCKS).step_by(2) {
            write(volume, inode, block * BLOCK_SIZE, &pattern(tag, block)).await;
        }
        sync_file(volume, inode).await;
    }
    inode
}

/// What the file holds when it is done: without blocks 3 to 49, or with 47 more in their place.
fn expected(mode: AllocateMode) -> Vec<u8> {
    let mut bytes = patterns(1, BLOCKS);
    let (from, to) = (3 * 4096, 50 * 4096);
    match mode {
        AllocateMode::Collapse => drop(bytes.drain(from..to)),
        _ => drop(bytes.splice(from..from, std::iter::repeat_n(0, to - from))),
    }
    bytes
}

#[test]
fn long_move_of_contents_is_there_as_a_whole_or_not_at_all_after_a_crash() {
    for mode in [AllocateMode::Collapse, AllocateMode::Insert] {
        let shape = shape();
        let (disk, history) = prepared(&shape, 0);
        let history: Rc<RefCell<History>> = Rc::new(RefCell::new(history));
        let collector = Collector::watch(&disk, &history, 5);
        let own = Rc::clone(&collector);
        let run = async |ctx: &Context, volume: &Volume| {
            let file = in_pieces(volume, "file", 1).await;
            own.recording.set(true);
            let done = Cell::new(false);
            // Checkpoints in the middle, so that crashes find the intent.
            let moving = async {
                allocate(volume, file, 3 * BLOCK_SIZE, 47 * BLOCK_SIZE, mode).await.unwrap();
                done.set(true);
            };
            let syncing = async {
                while !done.get() {
                    sync(volume).await;
                    ctx.yield_now().await;
                }
            };
            join(moving, syncing).await;
            sync(volume).await;
            assert_eq!(read(volume, file, 0, 1 << 22).await, expected(mode));
            volume.unmount().await.unwrap();
        };
        shape.mounted(&disk, 1, run).unwrap();
        let (mut old, mut new) = (0, 0);
        for (number, (what, image)) in collector.states().into_iter().enumerate() {
            let disk = shape.disk(image);
            fsck(&shape, &disk).unwrap_or_else(|why| panic!("{mode:?}, {what}: {why}"));
            let run = async |_: &Context, volume: &Volume| {
                let file = lookup(volume, Volume::ROOT, "file").await.unwrap();
                let found = read(volume, file.inode, 0, 1 << 22).await;
                assert_eq!(file.size, found.len() as u64);
                let is_new = found == expected(mode);
                assert!(is_new || found == patterns(1, BLOCKS), "{mode:?}, {what}: half of it");
                volume.unmount().await.unwrap();
                is_new
            };
            if shape.mounted(&disk, number as u64, run).unwrap() {
                new += 1;
            } else {
                old += 1;
            }
            fsck(&shape, &disk).unwrap_or_else(|why| panic!("{mode:?}, {what}, recovered: {why}"));
        }
        assert!(new > 8, "{mode:?}: {old} states before and {new} after");
    }
}

#[test]
fn impossible_moves_are_refused_and_change_nothing() {
    let shape = shape();
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        let file = in_pieces(volume, "file", 1).await;
        let size = BLOCKS * BLOCK_SIZE;
        let refused = [
            (AllocateMode::Collapse, 100, BLOCK_SIZE, FsError::Invalid),
            (AllocateMode::Collapse, 0, BLOCK_SIZE + 1, FsError::Invalid),
            (AllocateMode::Collapse, size - BLOCK_SIZE, BLOCK_SIZE, FsError::Invalid),
            (AllocateMode::Collapse, size, BLOCK_SIZE, FsError::Invalid),
            (AllocateMode::Collapse, 0, 0, FsError::Invalid),
            (AllocateMode::Insert, 100, BLOCK_SIZE, FsError::Invalid),
            (AllocateMode::Insert, 0, 4095, FsError::Invalid),
            (AllocateMode::Insert, size, BLOCK_SIZE, FsError::Invalid),
            (AllocateMode::Insert, 0, MAX_FILE_SIZE, FsError::FileTooLarge),
            (AllocateMode::Insert, BLOCK_SIZE, MAX_FILE_SIZE, FsError::FileTooLarge),
        ];
        for (mode, offset, length, error) in refused {
            let done = allocate(volume, file, offset, length, mode).await;
            assert_eq!(done, Err(error), "{mode:?} {offset} + {length}");
        }
        let folder = create(volume, Volume::ROOT, "folder", NewInode::Directory).await.inode;
        assert!(allocate(volume, folder, 0, BLOCK_SIZE, AllocateMode::Insert).await.is_err());
        assert_eq!(read(volume, file, 0, 1 << 22).await, patterns(1, BLOCKS));
        // Preallocated blocks behind the end move too, and count.
        let behind = MAX_FILE_SIZE - 4 * BLOCK_SIZE;
        allocate(volume, file, behind, BLOCK_SIZE, AllocateMode::KeepSize).await.unwrap();
        let done = allocate(volume, file, 0, 4 * BLOCK_SIZE, AllocateMode::Insert).await;
        assert_eq!(done, Err(FsError::FileTooLarge));
        allocate(volume, file, 0, 3 * BLOCK_SIZE, AllocateMode::Insert).await.unwrap();
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    fsck(&shape, &disk).unwrap();
}

#[test]
fn unshared_file_has_blocks_of_its_own_and_the_same_contents() {
    let shape = Shape { shards: 3, blocks: 48 * 1024, ..shape() };
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        let source = in_pieces(volume, "source", 1).await;
        let mut before = space(volume).await;
        // Of the same shard and of others.
        for number in 0..6 {
            let folder =
                create(volume, Volume::ROOT, &format!("folder{number}"), NewInode::Directory).await.inode;
            let copy = create(volume, folder, "copy", NewInode::Regular).await.inode;
            clone(volume, whole(source, copy)).await.unwrap();
            sync(volume).await;
            let shared = space(volume).await;
            assert!(before.free - shared.free < BLOCKS, "a clone takes no blocks: {before:?}, {shared:?}");
            let length = BLOCKS * BLOCK_SIZE;
            allocate(volume, copy, 0, length, AllocateMode::Unshare).await.unwrap();
            sync(volume).await;
            let own = space(volume).await;
            assert!(shared.free - own.free >= BLOCKS - 8, "it has its own blocks now: {shared:?}, {own:?}");
            let summary = volume.call(Request::CountExtents { inode: copy }).await;
            assert!(matches!(summary, Ok(Reply::Extents(ExtentSummary { shared: 0, .. }))), "{summary:?}");
            assert_eq!(read(volume, copy, 0, 1 << 22).await, patterns(1, BLOCKS));
            before = own;
        }
        assert_eq!(read(volume, source, 0, 1 << 22).await, patterns(1, BLOCKS));
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    fsck(&shape, &disk).unwrap();
}
