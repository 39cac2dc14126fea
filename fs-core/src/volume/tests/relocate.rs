//! Relocation: what moves, what stays the same meanwhile and afterwards, and what a crash in the middle leaves.

use std::cell::{Cell, RefCell};
use std::ops::ControlFlow;
use std::rc::Rc;

use futures_util::future::join;

use super::client::{Client, Ending};
use super::clone::{clone, pattern, patterns, space, sync_file, whole};
use super::crash::{Collector, crash_of};
use super::model::{Op, TOP};
use super::world::{SeedNote, Shape, fsck, prepared, seeds, session};
use super::*;
use crate::relocate::{RelocateError, RelocateProgress, RelocateScope};
use crate::request::{AllocateMode, AttributeChange, CloneRange, GroupFigures};
use crate::types::BLOCK_SIZE;

/// Seeds of an ordinary test run.
const SEEDS: u64 = 4;

/// Seeds whose crashes an ordinary test run enumerates.
const CRASH_SEEDS: u64 = 2;

fn shape() -> Shape {
    let mount = MountOptions { commit_interval: Duration::from_millis(20), ..MountOptions::default() };
    Shape { seed: 21, shards: 1, reactors: 1, blocks: 64 * 1024, mount }
}

fn go_on(_: RelocateProgress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

async fn groups(volume: &Volume, shard: u8) -> Vec<GroupFigures> {
    match volume.call(Request::Groups { shard: ShardId::new(shard).unwrap() }).await {
        Ok(Reply::Groups(groups)) => groups,
        other => panic!("groups: {other:?}"),
    }
}

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

/// The group that holds most.
async fn fullest(volume: &Volume) -> GroupFigures {
    groups(volume, 0).await.into_iter().max_by_key(GroupFigures::in_use).unwrap()
}

#[test]
fn emptied_group_is_free_and_files_and_their_sharing_stay() {
    let shape = shape();
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        let long = create(volume, Volume::ROOT, "long", NewInode::Regular).await.inode;
        write(volume, long, 0, &patterns(1, 1500)).await;
        let pieces = alternating(volume, "pieces", 2, 300).await;
        let copy = create(volume, Volume::ROOT, "copy", NewInode::Regular).await.inode;
        clone(volume, whole(pieces, copy)).await.unwrap();
        let part = create(volume, Volume::ROOT, "part", NewInode::Regular).await.inode;
        let at = |block: u64| FileOffset::new(block * BLOCK_SIZE);
        let (source_offset, target_offset, length) = (at(100), at(7), 333 * BLOCK_SIZE);
        let range = CloneRange { source: long, source_offset, target: part, target_offset, length };
        clone(volume, range).await.unwrap();
        let reserved = create(volume, Volume::ROOT, "reserved", NewInode::Regular).await.inode;
        let (offset, length, mode) = (FileOffset::new(0), 400 * BLOCK_SIZE, AllocateMode::Extend);
        let request = Request::Allocate { inode: reserved, offset, length, mode };
        assert_eq!(volume.call(request).await, Ok(Reply::Done));
        write(volume, reserved, 50 * BLOCK_SIZE, &patterns(5, 20)).await;
        sync(volume).await;
        let before = space(volume).await;
        let group = fullest(volume).await;
        assert!(group.in_use() > 1500, "{group:?}");

        let report = volume.relocate(RelocateScope::Group(group.group), go_on).await.unwrap();
        assert!(report.blocks >= 2000 && report.references > report.blocks / 256, "{report:?}");
        let after = groups(volume, 0).await.into_iter().find(|now| now.group == group.group).unwrap();
        assert_eq!((after.in_use(), after.pinned), (0, 0), "{report:?}");
        assert_eq!((report.groups_emptied, report.groups_left, report.left.len()), (1, 0, 0), "{report:?}");
        let now = space(volume).await;
        assert!(
            before.free.abs_diff(now.free) < 100,
            "what was shared is shared: {before:?} {now:?} {report:?}"
        );

        assert_eq!(read(volume, long, 0, 1 << 23).await, patterns(1, 1500));
        assert_eq!(read(volume, pieces, 0, 1 << 23).await, patterns(2, 300));
        assert_eq!(read(volume, copy, 0, 1 << 23).await, patterns(2, 300));
        let there = read(volume, part, 7 * BLOCK_SIZE, 1 << 23).await;
        assert_eq!(there, patterns(1, 1500)[100 * 4096..433 * 4096]);
        let there = read(volume, reserved, 0, 1 << 23).await;
        assert_eq!(there[50 * 4096..70 * 4096], patterns(5, 20));
        assert!(there[..50 * 4096].iter().chain(&there[70 * 4096..]).all(|byte| *byte == 0));
        // Preallocated blocks are still there to be written to.
        write(volume, reserved, 300 * BLOCK_SIZE, &patterns(6, 100)).await;
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    fsck(&shape, &disk).unwrap();
    let run = async |_: &Context, volume: &Volume| {
        let inode = lookup(volume, Volume::ROOT, "copy").await.unwrap().inode;
        assert_eq!(read(volume, inode, 0, 1 << 23).await, patterns(2, 300));
        let inode = lookup(volume, Volume::ROOT, "reserved").await.unwrap().inode;
        assert_eq!(read(volume, inode, 300 * BLOCK_SIZE, 1 << 23).await, patterns(6, 100));
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 2, run).unwrap();
}

/// A relocation once loaded the same leaf for ever: changed nodes had all of the tree's memory, so it was dropped each time.
#[test]
fn nodes_are_relocated_with_no_memory_left_for_any() {
    let mount =
        MountOptions { tree_memory: 4 << 14, commit_interval: Duration::from_secs(3600), ..shape().mount };
    let shape = Shape { mount, ..shape() };
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        let mut files = Vec::new();
        for number in 0..3000 {
            files
                .push(create(volume, Volume::ROOT, &format!("file {number}"), NewInode::Regular).await.inode);
        }
        volume.shared.checkpoint_now().await.unwrap();
        let used: Vec<GroupFigures> =
            groups(volume, 0).await.into_iter().filter(|group| group.in_use() > 0).collect();
        for inode in &files[..2000] {
            let change = AttributeChange { permissions: Some(0o600), ..AttributeChange::default() };
            let request = Request::SetAttributes { inode: *inode, change };
            assert!(matches!(volume.call(request).await, Ok(Reply::Attributes(_))));
        }
        let (shard, lease) = (ShardId::FIRST, crate::request::GroupLease::default());
        let step = crate::request::RelocateStep::Nodes(crate::format::node::Key::MIN);
        let mut nodes = 0;
        for GroupFigures { group, .. } in used {
            let request = Request::Relocate { shard, group, step, lease: lease.clone() };
            let Ok(Reply::Relocated(done)) = volume.call(request).await else { panic!("group {group}") };
            nodes += done.nodes;
        }
        assert!(nodes > 10, "{nodes}");
        drop(lease);
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    fsck(&shape, &disk).unwrap();
}

#[test]
fn group_that_does_not_exist_is_named_with_those_that_do() {
    let shape = shape();
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        let last = groups(volume, 0).await.last().unwrap().group;
        let refused = volume.relocate(RelocateScope::Group(last + 1), go_on).await;
        assert_eq!(refused, Err(RelocateError::NoGroup { group: last + 1, last }));
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
}

#[test]
fn cancelled_relocation_has_moved_less_and_leaves_the_group_open() {
    let shape = shape();
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        let file = alternating(volume, "file", 3, 900).await;
        let long = create(volume, Volume::ROOT, "long", NewInode::Regular).await.inode;
        for part in 0..12 {
            write(volume, long, part * 1000 * BLOCK_SIZE, &patterns(part as u8, 1000)).await;
            sync_file(volume, long).await;
        }
        sync(volume).await;
        let before = space(volume).await;
        let mut steps = 0;
        let stop = |_| {
            steps += 1;
            if steps == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let report = volume.relocate(RelocateScope::All, stop).await.unwrap();
        assert!(report.cancelled && report.blocks < 12_000, "{report:?}");
        for _ in 0..3 {
            write(volume, file, 0, &pattern(3, 0)).await;
            sync(volume).await;
        }
        // A group that stayed closed would be missed here.
        let after = space(volume).await;
        assert!(before.available.abs_diff(after.available) < 100, "{before:?} {after:?}");
        assert_eq!(read(volume, file, 0, 1 << 23).await, patterns(3, 900));
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    fsck(&shape, &disk).unwrap();
}

#[test]
fn group_whose_lease_is_dropped_opens_at_the_next_checkpoint() {
    let shape = shape();
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        let file = alternating(volume, "file", 3, 100).await;
        sync(volume).await;
        let before = space(volume).await.available;
        let (shard, group) = (ShardId::FIRST, fullest(volume).await.group);
        let lease = crate::request::GroupLease::default();
        let step = crate::request::RelocateStep::START;
        let request = Request::Relocate { shard, group, step, lease: lease.clone() };
        assert!(matches!(volume.call(request).await, Ok(Reply::Relocated(_))));
        sync(volume).await;
        assert!(space(volume).await.available + 1000 < before, "the group is closed");
        drop(lease);
        write(volume, file, 0, &pattern(3, 0)).await;
        volume.shared.checkpoint_now().await.unwrap();
        write(volume, file, 0, &pattern(3, 0)).await;
        volume.shared.checkpoint_now().await.unwrap();
        assert!(before.abs_diff(space(volume).await.available) < 300);
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
}

#[test]
fn damaged_block_stays_and_is_named_and_everything_else_moves() {
    let shape = shape();
    let disk = shape.formatted();
    let own = disk.clone();
    let image = disk.clone();
    let run = async move |_: &Context, volume: &Volume| {
        let file = create(volume, Volume::ROOT, "file", NewInode::Regular).await.inode;
        write(volume, file, 0, &patterns(9, 600)).await;
        sync(volume).await;
        let image = image.image();
        let wanted = pattern(9, 200);
        let mut block = vec![0; BLOCK_SIZE as usize];
        let place = (0..64 * 1024_u64).find(|number| {
            image.read(number * BLOCK_SIZE, &mut block);
            block == wanted
        });
        let place = place.expect("the block is on the device");
        own.flip_bit(place * BLOCK_SIZE + 77, 2);
        let group = groups(volume, 0)
            .await
            .into_iter()
            .rfind(|group| group.in_use() > 0 && group.group * 4096 <= place);
        let group = group.unwrap().group;
        let report = volume.relocate(RelocateScope::Group(group), go_on).await.unwrap();
        assert_eq!((report.groups_left, report.left.len()), (1, 1), "{report:?}");
        assert!(report.left[0].contains(&format!("block {place}: ")), "{report:?}");
        assert_eq!(read(volume, file, 100 * BLOCK_SIZE, 4096).await, pattern(9, 100));
        let bad = Request::Read { inode: file, offset: FileOffset::new(200 * BLOCK_SIZE), length: 4096 };
        let cached = volume.call(bad).await;
        assert!(matches!(cached, Ok(Reply::Data(data)) if data == pattern(9, 200)), "it was in memory");
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
}

/// First blocks of the intent log's segments.
fn log(volume: &Volume) -> Vec<u64> {
    volume.shared.log_in(&(0..u64::MAX)).into_iter().map(|(start, _)| start.get()).collect()
}

#[test]
fn every_group_can_be_emptied_also_that_of_the_intent_log() {
    let shape = shape();
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        let file = alternating(volume, "file", 3, 100).await;
        sync(volume).await;
        let before = log(volume);
        for round in 0..3 {
            let report = volume.relocate(RelocateScope::All, go_on).await.unwrap();
            assert!(report.groups_emptied > 0 && report.groups_left == 0, "round {round}: {report:?}");
        }
        let after = log(volume);
        assert!(before.iter().all(|segment| !after.contains(segment)), "{before:?} {after:?}");
        // Nothing but the log in the group, and nothing that changes: it moves all the same.
        let (group, segment) = (after[0] / 4096, after[0]);
        volume.relocate(RelocateScope::Group(group), go_on).await.unwrap();
        assert!(!log(volume).contains(&segment));
        let commits = volume.shared.log_writes.load(std::sync::atomic::Ordering::Relaxed);
        write(volume, file, 0, &pattern(7, 0)).await;
        sync_file(volume, file).await;
        assert!(
            volume.shared.log_writes.load(std::sync::atomic::Ordering::Relaxed) > commits,
            "an fsync goes to the log in its new place"
        );
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    fsck(&shape, &disk).unwrap();
}

#[test]
fn log_without_another_place_in_one_piece_stays_and_is_named() {
    let shape = shape();
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        let file = create(volume, Volume::ROOT, "file", NewInode::Regular).await.inode;
        volume.shared.checkpoint_now().await.unwrap();
        let mut block = 0;
        loop {
            let offset = FileOffset::new(block * BLOCK_SIZE);
            let (length, mode) = (64 * BLOCK_SIZE, AllocateMode::Extend);
            let request = Request::Allocate { inode: file, offset, length, mode };
            if volume.call(request).await != Ok(Reply::Done) {
                break;
            }
            block += 64;
        }
        // Half of the space is free, in pieces of 16 blocks.
        for hole in (0..block).step_by(32) {
            let (offset, length) = (FileOffset::new(hole * BLOCK_SIZE), 16 * BLOCK_SIZE);
            let request = Request::Allocate { inode: file, offset, length, mode: AllocateMode::PunchHole };
            assert_eq!(volume.call(request).await, Ok(Reply::Done));
        }
        for _ in 0..3 {
            volume.shared.note_commit(ShardId::FIRST, volume.shared.open_epoch());
            volume.shared.checkpoint_now().await.unwrap();
        }
        let (before, group) = (log(volume), log(volume)[0] / 4096);
        let report = volume.relocate(RelocateScope::Group(group), go_on).await.unwrap();
        let named = report.left.iter().filter(|why| why.contains(&format!("group {group}: blocks"))).count();
        assert!(named > 0 && report.left[0].contains("the intent log"), "{report:?}");
        assert_eq!(log(volume), before);
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    fsck(&shape, &disk).unwrap();
}

#[test]
fn every_write_may_be_the_last_while_the_intent_log_moves() {
    let shape = shape();
    let (disk, history) = prepared(&shape, 0);
    let history = Rc::new(RefCell::new(history));
    let collector = Collector::watch(&disk, &history, 7);
    let own = Rc::clone(&collector);
    let run = async |_: &Context, volume: &Volume| {
        let file = alternating(volume, "file", 3, 40).await;
        sync(volume).await;
        let before = log(volume);
        own.recording.set(true);
        for segment in &before {
            volume.relocate(RelocateScope::Group(segment / 4096), go_on).await.unwrap();
            // By the log, in its new place.
            write(volume, file, 0, &pattern(3, 0)).await;
            sync_file(volume, file).await;
        }
        own.recording.set(false);
        let after = log(volume);
        assert!(before.iter().all(|segment| !after.contains(segment)), "{before:?} {after:?}");
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    let states = collector.states();
    assert!(states.len() > 20, "{} states", states.len());
    for (what, image) in states {
        let disk = shape.disk(image);
        fsck(&shape, &disk).unwrap_or_else(|why| panic!("{what}: {why}"));
        let run = async |_: &Context, volume: &Volume| {
            let inode = lookup(volume, Volume::ROOT, "file").await.unwrap().inode;
            assert_eq!(read(volume, inode, 0, 1 << 20).await, patterns(3, 40), "{what}");
            write(volume, inode, 0, &pattern(4, 0)).await;
            sync_file(volume, inode).await;
            volume.unmount().await.unwrap();
        };
        shape.mounted(&disk, 2, run).unwrap();
        fsck(&shape, &disk).unwrap_or_else(|why| panic!("{what}, worked on: {why}"));
    }
}

/// Files of [`FULL_BLOCKS`] until there is no space, and one of single blocks for the rest; returns how many.
async fn fill(volume: &Volume) -> u8 {
    let rest = create(volume, Volume::ROOT, "rest", NewInode::Regular).await.inode;
    let mut files = 0;
    loop {
        let name = format!("full {files}");
        let inode = create(volume, Volume::ROOT, &name, NewInode::Regular).await.inode;
        let written = super::client::write_all(volume, inode, 0, &patterns(files, FULL_BLOCKS)).await;
        if written == Ok(()) {
            files += 1;
            continue;
        }
        assert_eq!(written, Err(FsError::NoSpace));
        let name = name.into_bytes().into();
        assert_eq!(volume.call(Request::Unlink { parent: Volume::ROOT, name }).await, Ok(Reply::Done));
        assert_eq!(volume.call(Request::Forget { inode, lookups: 1 }).await, Ok(Reply::Done));
        let mut block = 0;
        while super::client::write_all(volume, rest, block * BLOCK_SIZE, &pattern(7, block)).await.is_ok() {
            block += 1;
        }
        return files;
    }
}

/// Blocks of a file of [`fill`].
const FULL_BLOCKS: u64 = 160;

async fn check_full(volume: &Volume, files: impl Iterator<Item = u8>) {
    for number in files {
        let inode = lookup(volume, Volume::ROOT, &format!("full {number}")).await.unwrap().inode;
        assert_eq!(read(volume, inode, 0, 1 << 22).await, patterns(number, FULL_BLOCKS), "file {number}");
        volume.call(Request::Forget { inode, lookups: 1 }).await.unwrap();
    }
}

#[test]
fn full_volume_is_relocated_as_far_as_it_goes_and_says_what_is_missing() {
    let shape = Shape { blocks: 20 * 1024, ..shape() };
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        let files = fill(volume).await;
        sync(volume).await;
        let relocated = volume.relocate(RelocateScope::All, go_on).await;
        let refused = matches!(&relocated, Err(RelocateError::NoSpace { blocks, .. }) if *blocks > 0);
        assert!(refused || matches!(&relocated, Ok(report) if report.groups_left > 0), "{relocated:?}");
        check_full(volume, 0..files).await;
        // It has not used up what deleting needs.
        for number in (0..files).step_by(3) {
            let name = format!("full {number}");
            let inode = lookup(volume, Volume::ROOT, &name).await.unwrap().inode;
            let name = name.into_bytes().into();
            assert_eq!(volume.call(Request::Unlink { parent: Volume::ROOT, name }).await, Ok(Reply::Done));
            // Of the lookup, and of the creation.
            assert_eq!(volume.call(Request::Forget { inode, lookups: 2 }).await, Ok(Reply::Done));
        }
        volume.shared.checkpoint_now().await.unwrap();
        volume.shared.checkpoint_now().await.unwrap();
        let report = volume.relocate(RelocateScope::All, go_on).await.unwrap();
        assert!(report.groups_emptied > 0, "with a third of it free: {report:?}");
        check_full(volume, (0..files).filter(|number| number % 3 > 0)).await;
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    fsck(&shape, &disk).unwrap();
}

/// Empties every group `times` times.
async fn relocate_all(volume: &Volume, times: u32) -> u64 {
    let mut moved = 0;
    for _ in 0..times {
        match volume.relocate(RelocateScope::All, go_on).await {
            Ok(report) => moved += report.blocks,
            Err(error) => panic!("relocation: {error}"),
        }
    }
    moved
}

/// Lets a client work, the first one as long as a relocation takes that runs beside it.
async fn beside_relocation(client: &mut Client, ops: usize, times: u32, moved: &Rc<Cell<u64>>) -> Ending {
    if client.number > 0 {
        return client.run(ops).await;
    }
    // Something to move, on the device.
    let sync = Op::Sync { node: TOP, scope: SyncScope::Volume };
    if client.run(30).await != Ending::Finished || client.step(&sync).await != Ending::Finished {
        return Ending::DeviceGone;
    }
    let volume = client.volume.clone();
    let ended = Cell::new(false);
    let relocation = async {
        moved.set(moved.get() + relocate_all(&volume, times).await);
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
    join(working, relocation).await.0
}

/// Clients beside a relocation; returns the blocks that it moved.
pub(super) fn relocating(seed: u64) -> u64 {
    let shape = Shape::random(seed);
    let (disk, history) = prepared(&shape, 3);
    let history = Rc::new(std::cell::RefCell::new(history));
    let all = Rc::new(Cell::new(0));
    for salt in 10..12 {
        let moved = Rc::clone(&all);
        session(&shape, &disk, &history, salt, async move |client: &mut Client| {
            client.check_all().await.expect("what was unmounted is there");
            let ending = beside_relocation(client, 300, 3, &moved).await;
            client.check_all().await.expect("what was done is there");
            ending
        });
    }
    all.get()
}

#[test]
fn clients_beside_a_relocation_see_what_the_model_says() {
    for seed in seeds(SEEDS) {
        let _note = SeedNote(seed);
        let moved = relocating(seed);
        assert!(moved > 200, "{moved} blocks are too few to say anything");
    }
}

#[test]
fn every_write_of_a_relocation_beside_clients_may_be_the_last() {
    for seed in seeds(CRASH_SEEDS) {
        let _note = SeedNote(seed);
        let moved = Rc::new(Cell::new(0_u64));
        let (script_moved, seed_moved) = (Rc::clone(&moved), moved);
        let script = async move |client: &mut Client| beside_relocation(client, 40, 1, &script_moved).await;
        crash_of(seed, script).unwrap_or_else(|why| panic!("{why}"));
        assert!(seed_moved.get() > 0, "seed {seed}: {} blocks moved", seed_moved.get());
    }
}
