//! Relocation of blocks that several shards share: they move, stay shared, and nothing is lost with a crash between.

use std::cell::{Cell, RefCell};
use std::ops::ControlFlow;
use std::rc::Rc;

use futures_util::future::join;

use super::clone::{clone, patterns, space, whole};
use super::crash::Collector;
use super::history::History;
use super::lending::{alternating, directories, directories_again, file, settle, shape, unlink};
use super::world::{Shape, Trouble, fsck, prepared};
use super::*;
use crate::relocate::{RelocateReport, RelocateScope};
use crate::request::{AllocateMode, GroupFigures};
use crate::types::BLOCK_SIZE;

/// Blocks of the files.
const BLOCKS: u64 = 300;

async fn groups(volume: &Volume, shard: u8) -> Vec<GroupFigures> {
    match volume.call(Request::Groups { shard: ShardId::new(shard).unwrap() }).await {
        Ok(Reply::Groups(groups)) => groups,
        other => panic!("groups: {other:?}"),
    }
}

/// Empties the group that holds most of a shard's. Returns its number too.
async fn empty_fullest(volume: &Volume, shard: u8) -> (u64, RelocateReport) {
    let fullest = groups(volume, shard).await.into_iter().max_by_key(GroupFigures::in_use).unwrap();
    let scope = RelocateScope::Group(fullest.group);
    let report = volume.relocate(scope, |_| ControlFlow::Continue(())).await.unwrap();
    (fullest.group, report)
}

/// A file of the first shard with a clone on every shard, two on the second.
async fn shared_file(volume: &Volume, homes: &[InodeNr]) -> (InodeNr, Vec<InodeNr>) {
    let source = alternating(volume, homes[0], "source", 1, BLOCKS).await;
    let mut clones = Vec::new();
    for (home, name) in [(1, "second"), (2, "third"), (0, "own"), (1, "inside")] {
        let target = file(volume, homes[home], name).await;
        clone(volume, whole(clones.last().copied().unwrap_or(source), target)).await.unwrap();
        clones.push(target);
    }
    sync(volume).await;
    (source, clones)
}

#[test]
fn lent_blocks_move_with_all_their_references_and_stay_shared() {
    let shape = shape();
    let disk = shape.formatted();
    let run = async |ctx: &Context, volume: &Volume| {
        let homes = directories(volume, 3).await;
        let (source, clones) = shared_file(volume, &homes).await;
        settle(volume, ctx).await;
        let before = space(volume).await;
        let (group, report) = empty_fullest(volume, 0).await;
        assert_eq!((report.groups_emptied, report.left.len()), (1, 0), "{report:?}");
        assert!(report.references >= 5 * BLOCKS, "{report:?}");
        let after = groups(volume, 0).await.into_iter().find(|now| now.group == group);
        assert_eq!(after.map(|now| now.in_use() + now.pinned), Some(0));
        settle(volume, ctx).await;
        let now = space(volume).await;
        assert!(before.free.abs_diff(now.free) < 100, "{before:?} {now:?}: what was shared is shared");
        for inode in clones.iter().chain([&source]) {
            assert_eq!(read(volume, *inode, 0, 1 << 24).await, patterns(1, BLOCKS), "inode {inode}");
        }
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    fsck(&shape, &disk).unwrap();
}

/// Nobody on the lender's own shard has the blocks: the second borrower is lent what the first one has.
#[test]
fn blocks_that_only_borrowers_have_move_and_stay_shared_between_them() {
    let shape = shape();
    let disk = shape.formatted();
    let run = async |ctx: &Context, volume: &Volume| {
        let homes = directories(volume, 3).await;
        let (source, clones) = shared_file(volume, &homes).await;
        unlink(volume, homes[0], "source", source).await;
        unlink(volume, homes[0], "own", clones[2]).await;
        let first_half = Request::Allocate {
            inode: clones[0],
            offset: FileOffset::new(0),
            length: BLOCKS / 2 * BLOCK_SIZE,
            mode: AllocateMode::PunchHole,
        };
        assert_eq!(volume.call(first_half).await, Ok(Reply::Done));
        settle(volume, ctx).await;
        let before = space(volume).await;
        for round in 0..2 {
            let (_, report) = empty_fullest(volume, 0).await;
            assert_eq!((report.groups_emptied, report.left.len()), (1, 0), "round {round}: {report:?}");
            settle(volume, ctx).await;
            let now = space(volume).await;
            assert!(before.free.abs_diff(now.free) < 100, "{before:?} {now:?}: what was shared is shared");
        }
        for inode in [clones[1], clones[3]] {
            assert_eq!(read(volume, inode, 0, 1 << 24).await, patterns(1, BLOCKS), "inode {inode}");
        }
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    fsck(&shape, &disk).unwrap();
}

#[test]
fn every_write_of_a_relocation_of_lent_blocks_may_be_the_last() {
    let shape = shape();
    let (disk, history) = prepared(&shape, 0);
    let history: Rc<RefCell<History>> = Rc::new(RefCell::new(history));
    let collector = Collector::watch(&disk, &history, 4);
    let own = Rc::clone(&collector);
    let run = async |ctx: &Context, volume: &Volume| {
        let homes = directories(volume, 3).await;
        shared_file(volume, &homes).await;
        own.recording.set(true);
        let done = Cell::new(false);
        let relocating = async {
            let (_, report) = empty_fullest(volume, 0).await;
            assert!(report.references >= 5 * BLOCKS && report.left.is_empty(), "{report:?}");
            done.set(true);
        };
        let syncing = async {
            while !done.get() {
                sync(volume).await;
                ctx.yield_now().await;
            }
        };
        join(relocating, syncing).await;
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    let states = collector.states();
    assert!(states.len() > 20, "{} states", states.len());
    for (number, (what, image)) in states.into_iter().enumerate() {
        let disk = shape.disk(image);
        fsck(&shape, &disk).unwrap_or_else(|why| panic!("{what}: {why}"));
        let run = async |_: &Context, volume: &Volume| {
            let homes = directories_again(volume).await;
            for (home, name) in [(0, "source"), (1, "second"), (2, "third"), (0, "own"), (1, "inside")] {
                let inode = lookup(volume, homes[home], name).await.unwrap().inode;
                assert_eq!(read(volume, inode, 0, 1 << 22).await, patterns(1, BLOCKS), "{what}: {name}");
            }
            volume.unmount().await.unwrap();
        };
        shape.mounted(&disk, number as u64, run).unwrap();
        fsck(&shape, &disk).unwrap_or_else(|why| panic!("{what}, recovered: {why}"));
    }
}

/// A program that clones for ever between shards, beside a relocation that never stops. Both must come to an end with
/// every round, whatever the other one does. Returns the clones made and the references turned.
fn clones_beside_relocation(seed: u64) -> Result<(u64, u64), Trouble> {
    let shape = Shape { seed: 300 + seed, reactors: 1 + (seed % 3) as u16, ..shape() };
    let disk = shape.formatted();
    let run = async |ctx: &Context, volume: &Volume| {
        let homes = directories(volume, 3).await;
        let source = alternating(volume, homes[0], "source", 1, BLOCKS).await;
        let near = file(volume, homes[0], "near").await;
        let far = file(volume, homes[1], "far").await;
        let further = file(volume, homes[2], "further").await;
        sync(volume).await;
        let (relocated, ended) = (Cell::new(0_u64), Cell::new(false));
        let relocating = async {
            // Not for ever: a relocation that starves would not end at all.
            for _ in 0..3 {
                let (_, report) = empty_fullest(volume, 0).await;
                relocated.set(relocated.get() + report.references);
            }
            ended.set(true);
        };
        let cloning = async {
            let mut clones = 0;
            while !ended.get() {
                for (from, to) in [(source, far), (far, further), (source, near), (further, far)] {
                    clone(volume, whole(from, to)).await.unwrap();
                    clones += 1;
                }
                ctx.yield_now().await;
            }
            clones
        };
        let (clones, ()) = join(cloning, relocating).await;
        for inode in [source, near, far, further] {
            assert_eq!(read(volume, inode, 0, 1 << 24).await, patterns(1, BLOCKS), "inode {inode}");
        }
        volume.unmount().await.unwrap();
        (clones, relocated.get())
    };
    let counts = shape.mounted(&disk, 1, run).map_err(|error| Trouble(format!("{error:?}")))?;
    fsck(&shape, &disk)?;
    Ok(counts)
}

#[test]
fn neither_clones_between_shards_nor_a_relocation_beside_them_starve() {
    for seed in 0..2 {
        let (clones, references) =
            clones_beside_relocation(seed).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        println!("seed {seed}: {clones} clones, {references} references turned");
        assert!(clones >= 8 && references >= 2 * BLOCKS, "seed {seed}: {clones} {references}");
    }
}
