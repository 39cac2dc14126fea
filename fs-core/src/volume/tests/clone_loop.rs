//! The clone loop: files that are stored into, cut, punched and read, and at the same time cloned, deduplicated, dropped and
//! relocated, within and between shards.
//!
//! Owns: [`clone_loop`], one seed of it; [`Source`], a file that changes, with everything that it has ever held; [`Copies`], who
//! clones. What the mount's loop (`hw-tests/tests/clone_loop`) does with threads and real time, this one does in virtual time.
//!
//! What must hold:
//! - a block read from a source is one that was there between the beginning and the end of the read;
//! - a clone has all blocks as of one moment between its beginning and its end, and keeps them whatever happens to the source;
//! - clones and relocation both get on: each goes on until the other has done its share;
//! - on a volume that is all but full, where the same goes on, whatever is refused for lack of space has changed nothing, and nothing that
//!   was accepted fails later;
//! - afterwards `fsck` finds nothing, and the copies are the same after a remount, or after a power cut behind a sync.

use std::cell::{Cell, RefCell};
use std::ops::{ControlFlow, Range};

use futures_util::future::{join, join_all, join3};

use super::client::Rng;
use super::clone::{clone, deduplicate, sync_file};
use super::lending::{file, unlink};
use super::world::{SeedNote, Shape, fsck, seeds};
use super::*;
use crate::relocate::{RelocateError, RelocateScope};
use crate::request::{AllocateMode, AttributeChange, Caller, CloneRange, GroupFigures};
use crate::types::BLOCK_SIZE;

/// Seeds of an ordinary test run.
const SEEDS: u64 = 12;

/// Blocks of a source.
const BLOCKS: u64 = 48;

/// Sources, each with a writer, a reader and somebody who clones it.
const SOURCES: u64 = 4;

/// Clones that each of them makes at least.
const CLONES: u64 = 5;

/// Relocations at least, of all who relocate.
const RELOCATIONS: u64 = 6;

/// Who relocate.
const RELOCATORS: u64 = 2;

/// Blocks of each shard that are left where there is little room.
const LITTLE_ROOM: u64 = 260;

/// Copies that one cloner keeps.
const KEPT: usize = 4;

/// What a block holds: who wrote it, and which of his writes it was. 0 is nothing: zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Stamp {
    source: u64,
    number: u64,
}

impl Stamp {
    /// A block of it.
    fn block(self, block: u64) -> Vec<u8> {
        if self == Self::default() {
            return vec![0; BLOCK_SIZE as usize];
        }
        let words = [self.source << 32 | block, self.number];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.repeat(BLOCK_SIZE as usize / bytes.len())
    }

    /// What stands in a block that was read.
    ///
    /// # Panics
    /// If nobody can have written it.
    fn of(bytes: &[u8], block: u64) -> Self {
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let found = Self { source: word(0) >> 32, number: word(8) };
        assert_eq!(found.block(block), bytes, "block {block} is not a whole block of anybody's");
        found
    }
}

/// A file that one writer changes, and every change of it.
struct Source {
    inode: InodeNr,
    number: u64,
    /// For each block: after how many changes it got which contents.
    blocks: RefCell<Vec<Vec<(usize, Stamp)>>>,
    /// Changes that have begun, and that are acknowledged.
    begun: Cell<usize>,
    ended: Cell<usize>,
}

impl Source {
    fn new(inode: InodeNr, number: u64) -> Self {
        let blocks = RefCell::new(vec![vec![(0, Stamp::default())]; BLOCKS as usize]);
        Self { inode, number, blocks, begun: Cell::new(0), ended: Cell::new(0) }
    }

    /// Notes that `range` is about to be written to, or to become a hole.
    fn begin(&self, range: &Range<u64>, is_hole: bool) -> Stamp {
        let moment = self.begun.get() + 1;
        self.begun.set(moment);
        let written = Stamp { source: self.number, number: moment as u64 };
        let stamp = if is_hole { Stamp::default() } else { written };
        for block in range.clone() {
            self.blocks.borrow_mut()[block as usize].push((moment, stamp));
        }
        stamp
    }

    /// Notes that the last change has not reached `range`: it was refused there.
    fn take_back(&self, range: &Range<u64>) {
        let moment = self.begun.get() + 1;
        self.begun.set(moment);
        for block in range.clone() {
            let changes = &mut self.blocks.borrow_mut()[block as usize];
            let before = changes[changes.len() - 2].1;
            changes.push((moment, before));
        }
    }

    fn end(&self) {
        self.ended.set(self.begun.get());
    }

    fn at(&self, moment: usize, block: u64) -> Stamp {
        let blocks = self.blocks.borrow();
        let changes = &blocks[block as usize];
        changes[changes.partition_point(|(since, _)| *since <= moment) - 1].1
    }

    /// Checks blocks that were read, or shared, between `since` and now.
    ///
    /// # Panics
    /// If they are not those of one moment, or of one and the next, which was then in the middle of it.
    fn check(&self, what: &str, first: u64, found: &[Stamp], since: usize) {
        let moments = since..=self.begun.get();
        let fits = |moment: usize| {
            found.iter().zip(first..).all(|(stamp, block)| {
                *stamp == self.at(moment, block) || *stamp == self.at(moment + 1, block)
            })
        };
        assert!(
            moments.clone().any(fits),
            "{what}: blocks {first} + {} of source {} are of no moment of {moments:?}; the first that fits none alone: {:?}",
            found.len(),
            self.number,
            found
                .iter()
                .zip(first..)
                .find(|(stamp, block)| { moments.clone().all(|moment| **stamp != self.at(moment, *block)) }),
        );
    }
}

/// Blocks of a file, zeroes beyond its end.
async fn stamps(volume: &Volume, inode: InodeNr, range: Range<u64>, is_direct: bool) -> Vec<Stamp> {
    let (offset, length) =
        (FileOffset::new(range.start * BLOCK_SIZE), (range.end - range.start) * BLOCK_SIZE);
    let length = length as u32;
    let request = if is_direct {
        Request::ReadDirect { inode, offset, length }
    } else {
        Request::Read { inode, offset, length }
    };
    let mut bytes = match volume.call(request).await {
        Ok(Reply::Data(bytes)) => bytes,
        other => panic!("read of inode {inode}, blocks {range:?}: {other:?}"),
    };
    bytes.resize(length as usize, 0);
    bytes.chunks(BLOCK_SIZE as usize).zip(range).map(|(bytes, block)| Stamp::of(bytes, block)).collect()
}

async fn resize(volume: &Volume, inode: InodeNr, blocks: u64) {
    let change = AttributeChange { size: Some(blocks * BLOCK_SIZE), ..AttributeChange::default() };
    let changed = volume.call(Request::SetAttributes { inode, change }).await;
    assert!(matches!(changed, Ok(Reply::Attributes(_))), "resize: {changed:?}");
}

/// How much space there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Room {
    #[default]
    Plenty,
    /// Anything may be refused for want of it.
    Little,
}

/// When all can stop.
#[derive(Default)]
struct Shares {
    room: Room,
    /// Clones, stores and others that were refused.
    refused: Cell<u64>,
    clones: Cell<u64>,
    relocations: Cell<u64>,
    /// References that relocation has turned.
    references: Cell<u64>,
}

impl Shares {
    fn are_done(&self) -> bool {
        self.clones.get() >= CLONES * SOURCES && self.relocations.get() >= RELOCATIONS
    }

    /// Counts a refusal.
    ///
    /// # Panics
    /// If there is plenty of space.
    fn refuse(&self, what: &str) {
        assert_eq!(self.room, Room::Little, "{what}: no space");
        self.refused.set(self.refused.get() + 1);
    }
}

async fn pause(ctx: &Context, rng: &mut Rng) {
    match rng.below(4) {
        0 => ctx.sleep(Duration::from_micros(rng.below(400))).await,
        _ => ctx.yield_now().await,
    }
}

/// Changes a source until all have done their share.
async fn write_on(ctx: &Context, volume: &Volume, source: &Source, shares: &Shares, mut rng: Rng) {
    let inode = source.inode;
    while !shares.are_done() {
        let first = rng.below(BLOCKS);
        let range = first..BLOCKS.min(first + 1 + rng.below(6));
        let offset = FileOffset::new(first * BLOCK_SIZE);
        match rng.below(16) {
            0 => {
                source.begin(&(first..BLOCKS), true);
                resize(volume, inode, first).await;
                source.end();
                resize(volume, inode, BLOCKS).await;
            }
            1 => {
                source.begin(&range, true);
                let (length, mode) = ((range.end - first) * BLOCK_SIZE, AllocateMode::PunchHole);
                let punched = volume.call(Request::Allocate { inode, offset, length, mode }).await;
                if punched == Err(FsError::NoSpace) {
                    shares.refuse("punch");
                    source.take_back(&range);
                } else {
                    assert_eq!(punched, Ok(Reply::Done));
                }
                source.end();
            }
            kind => {
                let stamp = source.begin(&range, false);
                let data: Vec<u8> = range.clone().flat_map(|block| stamp.block(block)).collect();
                let reached = first + store(volume, inode, offset, data, kind).await / BLOCK_SIZE;
                if reached < range.end {
                    shares.refuse("store");
                    source.take_back(&(reached..range.end));
                }
                source.end();
            }
        }
        pause(ctx, &mut rng).await;
    }
}

/// Writes, on one of the ways there are. Returns how many bytes found space.
async fn store(volume: &Volume, inode: InodeNr, offset: FileOffset, data: Vec<u8>, kind: u64) -> u64 {
    let kill_privileges = KillPrivileges::Keep;
    let source = if kind < 9 { WriteSource::Mapping } else { WriteSource::Call };
    let is_direct = kind < 5;
    // Short: nobody has seen the write when it is acknowledged.
    if !is_direct
        && let WriteOutcome::Accepted(written) = volume.write(inode, offset, &data, source, kill_privileges)
    {
        return u64::from(written);
    }
    let data: Box<[u8]> = data.into();
    let request = match is_direct {
        true => Request::WriteDirect { inode, offset, data, kill_privileges },
        false => Request::Write { inode, offset, data, source, kill_privileges },
    };
    match volume.call(request).await {
        Ok(Reply::Written(written)) => u64::from(written),
        Err(FsError::NoSpace) => 0,
        other => panic!("write: {other:?}"),
    }
}

/// Has a source written back, while it is being written to, until all have done their share.
async fn sync_on(ctx: &Context, volume: &Volume, source: &Source, shares: &Shares, mut rng: Rng) {
    while !shares.are_done() {
        sync_file(volume, source.inode).await;
        ctx.sleep(Duration::from_micros(rng.below(1500))).await;
    }
}

/// Reads a source until all have done their share.
async fn read_on(ctx: &Context, volume: &Volume, source: &Source, shares: &Shares, mut rng: Rng) {
    while !shares.are_done() {
        let first = rng.below(BLOCKS);
        let (since, range) = (source.ended.get(), first..BLOCKS.min(first + 1 + rng.below(4)));
        let found = stamps(volume, source.inode, range.clone(), rng.below(2) == 0).await;
        for (stamp, block) in found.iter().zip(range) {
            source.check("read", block, std::slice::from_ref(stamp), since);
        }
        pause(ctx, &mut rng).await;
    }
}

/// A clone, and what it has to hold.
struct Copy {
    home: InodeNr,
    name: String,
    inode: InodeNr,
    blocks: Vec<Stamp>,
}

impl Copy {
    async fn check(&self, volume: &Volume, what: &str) {
        let found = stamps(volume, self.inode, 0..BLOCKS, false).await;
        assert_eq!(found, self.blocks, "{what}: {}, inode {}", self.name, self.inode);
    }
}

/// Who clones a source, and what he has.
struct Copies<'a> {
    ctx: &'a Context,
    volume: &'a Volume,
    homes: &'a [InodeNr],
    source: &'a Source,
    shares: &'a Shares,
    rng: Rng,
    made: u64,
    kept: Vec<Copy>,
}

impl Copies<'_> {
    /// Clones until all have done their share.
    async fn run(mut self) -> Vec<Copy> {
        while !self.shares.are_done() {
            match self.rng.below(8) {
                0 if self.kept.len() > 1 => self.clone_of_a_clone().await,
                1 if !self.kept.is_empty() => {
                    let copy = self.rng.below(self.kept.len() as u64) as usize;
                    self.deduplicate(copy).await;
                }
                2 | 3 => self.drop_one().await,
                _ => self.clone_of_the_source().await,
            }
            pause(self.ctx, &mut self.rng).await;
        }
        self.kept
    }

    /// A copy to clone to: a new one, on any shard, or one that has contents. `None` if there is no space for a new one.
    async fn target(&mut self) -> Option<usize> {
        if self.kept.len() < KEPT {
            let home = self.rng.pick(self.homes).expect("every shard has a directory");
            let name = format!("copy-{}-{}", self.source.number, self.made);
            self.made += 1;
            let request = Request::Create {
                parent: home,
                name: name.as_bytes().into(),
                new: NewInode::Regular,
                permissions: 0o644,
                caller: Caller { uid: 0, gid: 0 },
            };
            let inode = match self.volume.call(request).await {
                Ok(Reply::Entry(entry)) => entry.inode,
                Err(FsError::NoSpace) => {
                    self.shares.refuse("create");
                    return None;
                }
                other => panic!("create {name}: {other:?}"),
            };
            self.kept.push(Copy { home, name, inode, blocks: vec![Stamp::default(); BLOCKS as usize] });
            return Some(self.kept.len() - 1);
        }
        Some(self.rng.below(KEPT as u64) as usize)
    }

    async fn clone_of_the_source(&mut self) {
        let Some(number) = self.target().await else { return self.drop_one().await };
        let first = if self.rng.below(2) == 0 { 0 } else { self.rng.below(BLOCKS) };
        let since = self.source.ended.get();
        let at = FileOffset::new(first * BLOCK_SIZE);
        let copy = &mut self.kept[number];
        let (source, target) = (self.source.inode, copy.inode);
        // To the end of the source, wherever that is then.
        let range = CloneRange { source, source_offset: at, target, target_offset: at, length: 0 };
        let end = match clone(self.volume, range).await {
            Ok(cloned) => first + cloned.bytes / BLOCK_SIZE,
            // The source was cut to before the beginning.
            Err(FsError::Invalid) if first > 0 => first,
            Err(FsError::NoSpace) => {
                self.shares.refuse("clone");
                first // all or nothing
            }
            Err(error) => panic!("clone of source {}: {error}", self.source.number),
        };
        let found = stamps(self.volume, target, 0..BLOCKS, false).await;
        let (cloned, all) = (first as usize..end as usize, 0..BLOCKS as usize);
        for block in all.filter(|block| !cloned.contains(block)) {
            assert_eq!(found[block], copy.blocks[block], "{}: block {block} was not cloned", copy.name);
        }
        self.source.check("clone", first, &found[cloned], since);
        copy.blocks = found;
        self.shares.clones.set(self.shares.clones.get() + 1);
        if self.rng.below(2) == 0 {
            // So soon some of it is still the same.
            self.deduplicate(number).await;
        }
    }

    async fn clone_of_a_clone(&mut self) {
        let from = self.rng.below(self.kept.len() as u64) as usize;
        let to = (from + 1) % self.kept.len();
        let (source, target, start) = (self.kept[from].inode, self.kept[to].inode, FileOffset::new(0));
        let range = CloneRange { source, source_offset: start, target, target_offset: start, length: 0 };
        let cloned = match clone(self.volume, range).await {
            Ok(cloned) => (cloned.bytes / BLOCK_SIZE) as usize,
            Err(FsError::NoSpace) => {
                self.shares.refuse("clone of a clone");
                0
            }
            Err(error) => panic!("clone of a clone: {error}"),
        };
        let blocks = self.kept[from].blocks[..cloned].to_vec();
        self.kept[to].blocks[..cloned].copy_from_slice(&blocks);
        self.kept[to].check(self.volume, "clone of a clone").await;
    }

    /// A copy and its source are the same or not: the copy stays what it is.
    async fn deduplicate(&mut self, copy: usize) {
        let first = self.rng.below(BLOCKS);
        let at = FileOffset::new(first * BLOCK_SIZE);
        // The less, the more often it is the same.
        let length = (1 + self.rng.below((BLOCKS - first).min(4))) * BLOCK_SIZE;
        let (source, target) = (self.source.inode, self.kept[copy].inode);
        let range = CloneRange { source, source_offset: at, target, target_offset: at, length };
        match deduplicate(self.volume, range).await {
            Ok(_) | Err(FsError::Invalid) => {} // one of them is too short
            Err(FsError::NoSpace) => self.shares.refuse("deduplication"),
            Err(error) => panic!("deduplication: {error}"),
        }
        self.kept[copy].check(self.volume, "deduplicated").await;
    }

    async fn drop_one(&mut self) {
        if self.kept.is_empty() {
            return;
        }
        let copy = self.kept.swap_remove(self.rng.below(self.kept.len() as u64) as usize);
        copy.check(self.volume, "before its end").await;
        unlink(self.volume, copy.home, &copy.name, copy.inode).await;
    }
}

async fn groups_of(volume: &Volume, shard: u8) -> Vec<GroupFigures> {
    match volume.call(Request::Groups { shard: ShardId::new(shard).expect("a shard of the volume") }).await {
        Ok(Reply::Groups(groups)) => groups,
        other => panic!("groups: {other:?}"),
    }
}

/// Empties groups until all have done their share.
async fn relocate_on(volume: &Volume, shards: u8, shares: &Shares, mut rng: Rng) {
    while !shares.are_done() {
        let mut groups = groups_of(volume, rng.below(u64::from(shards)) as u8).await;
        groups.retain(|group| group.in_use() > 0);
        let scope = match rng.pick(&groups) {
            Some(group) if rng.below(4) > 0 => RelocateScope::Group(group.group),
            _ => RelocateScope::All,
        };
        match volume.relocate(scope, |_| ControlFlow::Continue(())).await {
            Ok(report) => shares.references.set(shares.references.get() + report.references),
            // Another shard has taken the group over.
            Err(RelocateError::Volume(FsError::Invalid)) => {}
            Err(RelocateError::NoSpace { .. } | RelocateError::Volume(FsError::NoSpace)) => {
                shares.refuse("relocation");
            }
            Err(error) => panic!("relocation: {error}"),
        }
        shares.relocations.set(shares.relocations.get() + 1);
    }
}

/// Takes all space but a little for a file that stays. Sources and copies share the rest.
async fn take_space(volume: &Volume, home: InodeNr, name: &str) {
    let inode = file(volume, home, name).await;
    let mut end = 0;
    for blocks in [1024, 64, 8] {
        let allocate = |offset| Request::Allocate {
            inode,
            offset: FileOffset::new(offset * BLOCK_SIZE),
            length: blocks * BLOCK_SIZE,
            mode: AllocateMode::Extend,
        };
        while volume.call(allocate(end)).await == Ok(Reply::Done) {
            end += blocks;
        }
    }
    resize(volume, inode, end.saturating_sub(LITTLE_ROOM)).await;
}

/// A directory on each shard.
async fn homes(volume: &Volume, shards: u8) -> Vec<InodeNr> {
    let mut homes = vec![None; usize::from(shards)];
    let mut number = 0;
    while homes.contains(&None) {
        let made = create(volume, Volume::ROOT, &format!("d{number}"), NewInode::Directory).await.inode;
        homes[made.shard().index()].get_or_insert(made);
        number += 1;
    }
    homes.into_iter().flatten().collect()
}

async fn all_at_once(ctx: &Context, volume: &Volume, shape: &Shape, shares: &Shares) -> Vec<Copy> {
    let homes = homes(volume, shape.shards).await;
    let mut sources = Vec::new();
    for number in 1..=SOURCES {
        let home = homes[number as usize % homes.len()];
        let inode = file(volume, home, &format!("source-{number}")).await;
        resize(volume, inode, BLOCKS).await;
        sources.push(Source::new(inode, number));
    }
    if shares.room == Room::Little {
        for (home, number) in homes.iter().zip(0..) {
            take_space(volume, *home, &format!("ballast-{number}")).await;
        }
        sync(volume).await;
    }
    let rng = |salt: u64| Rng::new(shape.seed << 8 ^ salt);
    let changing = join_all(sources.iter().map(|source| async {
        let (writer, reader, syncer) = (source.number, 16 + source.number, 64 + source.number);
        join3(
            write_on(ctx, volume, source, shares, rng(writer)),
            read_on(ctx, volume, source, shares, rng(reader)),
            sync_on(ctx, volume, source, shares, rng(syncer)),
        )
        .await
    }));
    let cloning = join_all(sources.iter().map(|source| {
        let (homes, rng, kept) = (&*homes, rng(32 + source.number), Vec::new());
        Copies { ctx, volume, homes, source, shares, rng, made: 0, kept }.run()
    }));
    let relocating =
        join_all((0..RELOCATORS).map(|number| relocate_on(volume, shape.shards, shares, rng(48 + number))));
    let (_, (copies, _)) = join(changing, join(cloning, relocating)).await;
    copies.into_iter().flatten().collect()
}

/// Runs a seed. Returns how many references relocation has turned.
pub(super) fn clone_loop(seed: u64) -> u64 {
    run_seed(seed, Room::Plenty).references.get()
}

fn run_seed(seed: u64, room: Room) -> Shares {
    let _note = SeedNote(seed);
    let random = Shape::random(seed);
    let shards = 2 + (random.shards & 1);
    let shape = Shape { shards, blocks: 9 * 1024 * u64::from(shards), ..random };
    let disk = shape.formatted();
    let is_cut = seed.is_multiple_of(3);
    let shares = Shares { room, ..Shares::default() };
    let run = async |ctx: &Context, volume: &Volume| {
        let copies = all_at_once(ctx, volume, &shape, &shares).await;
        for copy in &copies {
            copy.check(volume, "at the end").await;
        }
        if is_cut {
            sync(volume).await;
        } else {
            volume.unmount().await.expect("it unmounts");
        }
        copies
    };
    let copies = shape.mounted(&disk, 1, run).expect("a new volume mounts");
    if is_cut {
        disk.power_cut(&CutPolicy::DropAll);
    }
    fsck(&shape, &disk).unwrap_or_else(|why| panic!("afterwards: {why}"));
    let run = async |_: &Context, volume: &Volume| {
        for copy in &copies {
            let inode = lookup(volume, copy.home, &copy.name).await.expect("it is there").inode;
            assert_eq!(inode, copy.inode, "{}", copy.name);
            copy.check(volume, "after a remount").await;
        }
        volume.unmount().await.expect("it unmounts");
    };
    shape.mounted(&disk, 2, run).expect("it mounts again");
    fsck(&shape, &disk).unwrap_or_else(|why| panic!("after a remount: {why}"));
    shares
}

#[test]
fn clones_stores_and_relocation_at_once_leave_every_copy_what_it_was() {
    let seeds = seeds(SEEDS);
    let count = seeds.end - seeds.start;
    let references: u64 = seeds.map(clone_loop).sum();
    println!("{count} seeds, {references} references turned");
    assert!(references >= 20 * count, "{references} references turned in {count} seeds");
}

#[test]
fn what_is_refused_on_an_all_but_full_volume_has_changed_nothing() {
    let seeds = seeds(SEEDS);
    let count = seeds.end - seeds.start;
    let refused: u64 = seeds.map(|seed| run_seed(seed, Room::Little).refused.get()).sum();
    println!("{count} seeds, {refused} refusals");
    assert!(refused >= 5 * count, "{refused} refusals in {count} seeds");
}
