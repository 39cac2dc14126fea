//! Relocation: moving everything out of a group while the volume is in use.
//!
//! Owns: [`Shard::relocate`], one bounded step of emptying a group of this shard. Whoever relocates asks for step after
//! step; the shard keeps nothing in between but that the group is closed.
//!
//! | step | does |
//! |---|---|
//! | [`RelocateStep::Data`] | moves the next runs: verified copy, then reference by reference |
//! | [`RelocateStep::Nodes`] | copies tree nodes of the group, as a change of theirs would |
//! | [`RelocateStep::Settle`] | a checkpoint, after which what the steps before it gave up becomes free; it gives the intent log's next segment another place |
//!
//! A reference is turned under the mmap lock, shared, and the range lock, exclusive, of its file, in one transaction that
//! looks again whether it still is what was copied, adds the new reference and drops the old one. So a reader, which
//! holds its range, sees one place or the other; a clone, which holds the mmap lock, never finds that what it has looked
//! up is gone. The locks are tried; who is busy is passed over and come back to, and after [`TRIES`] rounds waited for,
//! with nothing else in hand.
//!
//! Invariants:
//! - sharing stays: all references of a block go to the same copy, or a round that cannot end leaves the rest where it
//!   is for the next pass (then, and only then, the block exists twice);
//! - what is lent to other shards moves too, before what is not (`relocate/lent.rs`); what stays of it is named;
//! - a block that does not match its checksum stays, and is named.
//!
//! # Legal crash outcomes
//! Each transaction alone: some references moved, others not. A group is closed only in memory.
//!
//! Excludes: which groups, in what order, until when (`crate::relocate`).

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use reactor::block::Durability;

use crate::alloc::{CloseError, Priority};
use crate::data::extent_map::relocate::{
    Destination, Found, Reference, Span, first_reference, has_room, move_reference, next_span, references,
};
use crate::error::FsError;
use crate::format::extent::ExtentKind;
use crate::format::node::Key;
use crate::locks::{Guard, LockOrder, MmapClass, Mode, RangeGuard};
use crate::planted::{Bug, is_planted};
use crate::request::{GroupLease, RelocateStep, Relocated};
use crate::types::{BLOCK_SIZE, BlockCount, BlockNr, Generation, InodeNr, ShardId};

use super::transact::{Credit, Loader, TransactionSpace};
use super::{Inode, Shard};

pub(crate) mod lent;

/// Blocks after which a step ends, and the rest of a span: 16 MiB.
const BLOCKS_PER_STEP: u64 = 4096;

/// Spans after which a step ends.
const SPANS_PER_STEP: u32 = 64;

/// Tree nodes that a step copies.
const NODES_PER_STEP: u64 = 64;

/// Rounds over the references of a span in which locks are only tried.
const TRIES: u32 = 4;

/// Pause after a round in which some were busy.
const RETRY_PAUSE: Duration = Duration::from_micros(200);

/// Rounds after which the rest of a span is left for the next pass: somebody makes references as fast as they are moved.
const ROUNDS: u32 = 64;

/// The locks of a reference. Fields are dropped in order: the reverse of how they were taken.
pub(crate) struct ReferenceLocks {
    _range: RangeGuard,
    _mmap: Option<Guard<MmapClass>>,
}

/// A span on its way.
struct Journey {
    span: Span,
    to: Destination,
}

impl Shard {
    /// Does a step of emptying `group`, which is closed by it.
    ///
    /// # Errors
    /// [`FsError::Invalid`] if the group is not this shard's; [`FsError::NoSpace`] if the shard cannot do without its
    /// free blocks, or has no room for what is in it; failures of the device.
    pub(crate) async fn relocate(
        self: &Rc<Self>,
        group: u64,
        step: RelocateStep,
        lease: &GroupLease,
    ) -> Result<Relocated, FsError> {
        if step == RelocateStep::Open {
            self.alloc.borrow_mut().open(group);
            return Ok(Relocated::default());
        }
        self.close_group(group, lease).await?;
        let blocks = self.alloc.borrow().blocks_of(group);
        let mut done = Relocated::default();
        match step {
            RelocateStep::Data(from) => self.relocate_data(blocks, from, &mut done).await?,
            RelocateStep::Nodes(from) => self.relocate_nodes(&blocks, from, &mut done).await?,
            RelocateStep::Settle => self.settle(&blocks, &mut done).await?,
            RelocateStep::Close | RelocateStep::Open => {}
        }
        done.group = self.alloc.borrow().figures_of(group).ok_or(FsError::Invalid)?;
        Ok(done)
    }

    /// A checkpoint. It moves the segment of the intent log that comes next, if that is in the group; another one moves the other.
    async fn settle(&self, group: &Range<u64>, done: &mut Relocated) -> Result<(), FsError> {
        let before = self.volume.log_in(group);
        self.close_epoch_for_space().await?;
        for _ in &before {
            if self.volume.log_in(group).is_empty() {
                break;
            }
            // Even if nothing else has changed.
            self.volume.note_commit(self.id, self.epochs.current());
            self.close_epoch_for_space().await?;
        }
        let after = self.volume.log_in(group);
        let moved = before.iter().filter(|segment| !after.contains(segment));
        done.blocks += moved.map(|(_, blocks)| blocks).sum::<u64>();
        done.left.extend(after.iter().map(|(start, blocks)| {
            format!(
                "blocks {start} + {blocks}: the intent log, for which there is no other place in one piece"
            )
        }));
        Ok(())
    }

    /// Closes a group. If its free blocks are promised, epochs are closed first to find others.
    async fn close_group(&self, group: u64, lease: &GroupLease) -> Result<(), FsError> {
        let mut checkpoints = 0;
        loop {
            let closed = self.alloc.borrow_mut().close(group, lease.downgrade());
            match closed {
                Ok(()) => return Ok(()),
                Err(CloseError::NotOwned { .. }) => return Err(FsError::Invalid),
                // Another shard may have a group to spare.
                Err(CloseError::Needed { .. }) if self.adopt_group().await? => continue,
                Err(CloseError::Needed { .. }) if checkpoints == 2 => return Err(FsError::NoSpace),
                Err(CloseError::Needed { .. }) => self.close_epoch_for_space().await?,
            }
            checkpoints += 1;
        }
    }

    async fn relocate_data(
        self: &Rc<Self>,
        group: Range<u64>,
        from: BlockNr,
        done: &mut Relocated,
    ) -> Result<(), FsError> {
        let mut at = from.get().max(group.start);
        let mut spans = 0;
        let mut borrowers = BTreeSet::new();
        while at < group.end {
            if done.blocks >= BLOCKS_PER_STEP || spans == SPANS_PER_STEP {
                done.next = Some(RelocateStep::Data(BlockNr::new(at)));
                return self.finish_returns_of(&borrowers).await;
            }
            spans += 1;
            let rest = at..group.end;
            match self.view(|batch| next_span(batch, &rest)).await? {
                Found::Nothing => break,
                Found::Span(span) => {
                    at = span.start.get() + self.relocate_span(span, &mut borrowers, done).await?;
                    self.ctx.yield_now().await;
                }
            }
        }
        done.next = Some(RelocateStep::Nodes(Key::MIN));
        self.finish_returns_of(&borrowers).await
    }

    /// Moves as much of the beginning of `span` as goes to one place. Returns the blocks that were dealt with.
    async fn relocate_span(
        self: &Rc<Self>,
        mut span: Span,
        borrowers: &mut BTreeSet<ShardId>,
        done: &mut Relocated,
    ) -> Result<u64, FsError> {
        let bytes = match span.kind {
            ExtentKind::Preallocated => Vec::new(),
            ExtentKind::Data => {
                let (bytes, bad) = self.read_span(&span).await?;
                if let Some(bad) = bad {
                    if bad == 0 {
                        let start = span.start;
                        done.left.push(format!("block {start}: it does not match its checksum"));
                        return Ok(1);
                    }
                    span.shorten(bad);
                }
                bytes
            }
        };
        let to = self.find_destination(&mut span).await?;
        let blocks = span.blocks();
        let mut journey = Journey { span, to };
        let moved = match journey.span.kind {
            ExtentKind::Preallocated => self.move_references(&mut journey, done).await,
            ExtentKind::Data => {
                let bytes = &bytes[..(blocks * BLOCK_SIZE) as usize];
                match self.disk.write(journey.to.start, bytes, Durability::Cached).await {
                    Ok(()) => {
                        // No log may name the copy before a flush.
                        self.volume.note_data_written();
                        match self.move_lent(&mut journey, borrowers, done).await {
                            Ok(()) => self.move_references(&mut journey, done).await,
                            Err(error) => Err(error),
                        }
                    }
                    Err(error) => Err(error),
                }
            }
        };
        self.give_back_fresh(&journey.to);
        moved.map(|()| blocks)
    }

    /// The blocks of a span, and the first that is not what its checksum says.
    async fn read_span(&self, span: &Span) -> Result<(Vec<u8>, Option<u64>), FsError> {
        let count = BlockCount::new(span.blocks());
        let bytes = match self.disk.read(span.start, count).await {
            Ok(bytes) => bytes,
            Err(_) if span.blocks() == 1 => return Ok((Vec::new(), Some(0))),
            Err(_) => {
                // As far as it can be read.
                let mut bytes = Vec::new();
                for at in 0..span.blocks() {
                    let block = BlockNr::new(span.start.get() + at);
                    match self.disk.read(block, BlockCount::new(1)).await {
                        Ok(block) => bytes.extend(block),
                        Err(_) => break,
                    }
                }
                bytes
            }
        };
        let blocks = bytes.chunks_exact(BLOCK_SIZE as usize);
        let good =
            blocks.zip(0..).take_while(|(block, at)| Some(crc32c::crc32c(block)) == span.checksum(*at));
        let good = good.count() as u64;
        if good < span.blocks() && good == 0 {
            self.volume.note_damage(self.id, &format!("data block {}: wrong checksum", span.start));
        }
        Ok((bytes, (good < span.blocks()).then_some(good)))
    }

    /// Blocks outside of closed groups; the span is cut to as many as lie together.
    async fn find_destination(&self, span: &mut Span) -> Result<Destination, FsError> {
        let mut space = self.reserve(span.blocks(), 0, Priority::Normal).await?;
        let wanted = BlockCount::new(span.blocks());
        let (start, count) = self.alloc.borrow_mut().allocate_data(wanted, &mut space);
        span.shorten(count.get());
        let generation = Generation::new(self.epochs.current().get());
        Ok(Destination { start, generation, fresh: vec![true; count.get() as usize], lender: None })
    }

    /// Blocks that no reference has come to need.
    fn give_back_fresh(&self, to: &Destination) {
        let mut at = 0;
        for stretch in to.fresh.chunk_by(|left, right| left == right) {
            let start = BlockNr::new(to.start.get() + at);
            if stretch[0] {
                self.alloc.borrow_mut().abandon_data(start, BlockCount::new(stretch.len() as u64));
            }
            at += stretch.len() as u64;
        }
    }

    /// Turns every reference to the span, round after round, until there is none or no more can be done.
    async fn move_references(
        self: &Rc<Self>,
        journey: &mut Journey,
        done: &mut Relocated,
    ) -> Result<(), FsError> {
        let blocks = journey.span.range();
        for round in 0..ROUNDS {
            let (mut moved, mut busy) = (0, 0);
            let mut next = Some(first_reference(&blocks));
            while let Some(from) = next {
                let (found, rest) = self.view(|batch| references(batch, &blocks, from)).await?;
                next = rest;
                let (turned, passed_over) = self.move_some(journey, found, round, done).await?;
                moved += turned;
                busy += passed_over;
            }
            if moved == 0 && busy == 0 {
                return Ok(());
            }
            if busy > 0 {
                self.ctx.sleep(RETRY_PAUSE).await;
            }
        }
        Ok(())
    }

    /// Turns those of `found` whose locks can be had. Returns the blocks turned, and how many files were busy.
    async fn move_some(
        self: &Rc<Self>,
        journey: &mut Journey,
        found: Vec<Reference>,
        round: u32,
        done: &mut Relocated,
    ) -> Result<(u64, u64), FsError> {
        // What is lent since the span was chosen stays for the next pass.
        let (locked, busy) = self.lock_some(found, journey.span.kind);
        let references: Vec<Reference> = locked.iter().map(|(reference, _)| *reference).collect();
        let mut moved = self.turn(journey, &references, done).await?;
        drop(locked);
        references.iter().filter_map(Reference::owner).for_each(|nr| self.release_inode(nr));
        if round >= TRIES {
            for reference in &busy {
                moved += self.wait_and_turn(journey, reference, done).await?;
            }
        }
        Ok((moved, busy.len() as u64))
    }

    /// Locks those references of files whose locks are free. Returns them, and the others. Whoever drops the locks releases
    /// the inodes afterwards.
    pub(crate) fn lock_some(
        &self,
        found: Vec<Reference>,
        kind: ExtentKind,
    ) -> (Vec<(Reference, ReferenceLocks)>, Vec<Reference>) {
        let mut by_inode: BTreeMap<InodeNr, Vec<Reference>> = BTreeMap::new();
        for reference in found {
            if let Some(owner) = reference.owner() {
                by_inode.entry(owner).or_default().push(reference);
            }
        }
        let (mut locked, mut busy) = (Vec::new(), Vec::new());
        for (nr, references) in by_inode {
            let inode = self.inode(nr);
            for reference in references {
                match try_lock(&inode, &reference, kind) {
                    Some(locks) => locked.push((reference, locks)),
                    None => busy.push(reference),
                }
            }
            drop(inode);
            self.release_inode(nr);
        }
        (locked, busy)
    }

    /// Waits for the locks of a reference, in their order. `inode` is its file.
    pub(crate) async fn wait_for(inode: &Inode, reference: &Reference) -> ReferenceLocks {
        let mut order = LockOrder::new();
        let mmap = match is_planted(Bug::RelocationWithoutMmapLock) {
            true => None,
            false => Some(inode.mmap_lock.shared(&mut order).await),
        };
        let range = inode.ranges.exclusive(reference.bytes(), &mut order).await;
        ReferenceLocks { _range: range, _mmap: mmap }
    }

    /// Waits for the locks of one reference, in their order and with nothing else in hand, and turns it.
    async fn wait_and_turn(
        self: &Rc<Self>,
        journey: &mut Journey,
        reference: &Reference,
        done: &mut Relocated,
    ) -> Result<u64, FsError> {
        let Some(nr) = reference.owner() else { return Ok(0) };
        let inode = self.inode(nr);
        let locks = Self::wait_for(&inode, reference).await;
        let turned = if is_written_to(&inode, reference, journey.span.kind) {
            Ok(0) // the ordered extent ends soon, once the range is free
        } else {
            self.turn(journey, std::slice::from_ref(reference), done).await
        };
        drop((locks, inode));
        self.release_inode(nr);
        turned
    }

    /// Turns references whose locks are held, in as many transactions as it takes. Returns the blocks turned.
    async fn turn(
        &self,
        journey: &mut Journey,
        references: &[Reference],
        done: &mut Relocated,
    ) -> Result<u64, FsError> {
        let before = journey.to.fresh.clone();
        let turned = self.turn_references(&journey.span, &mut journey.to, references).await;
        let used = before.iter().zip(&journey.to.fresh).filter(|(before, after)| **before && !**after);
        done.blocks += used.count() as u64;
        let (moved, count) = turned?;
        done.references += count;
        Ok(moved)
    }

    /// As [`Self::turn`]; returns the blocks and the references turned.
    pub(crate) async fn turn_references(
        &self,
        span: &Span,
        place: &mut Destination,
        references: &[Reference],
    ) -> Result<(u64, u64), FsError> {
        let mut rest = references;
        let (mut moved, mut all) = (0, 0);
        while !rest.is_empty() {
            let credit = Credit::reserve(crate::data::extent_map::relocate::MOVE_ITEMS);
            let (turned, count, to) = self
                .transact(credit, |batch| {
                    let mut to = place.clone();
                    let (mut turned, mut count) = (0, 0);
                    for reference in rest {
                        if !has_room(batch) {
                            break;
                        }
                        turned += move_reference(batch, span, &mut to, reference)?;
                        count += 1;
                    }
                    Ok((turned, count, to))
                })
                .await?;
            *place = to;
            all += if turned > 0 { count as u64 } else { 0 };
            moved += turned;
            rest = &rest[count..];
        }
        Ok((moved, all))
    }

    async fn relocate_nodes(
        &self,
        blocks: &Range<u64>,
        from: Key,
        done: &mut Relocated,
    ) -> Result<(), FsError> {
        let mut from = from;
        while done.nodes < NODES_PER_STEP {
            let found = self.view(|_| Ok(self.tree.borrow().first_node_in(blocks, &from)?)).await?;
            let Some(key) = found else {
                done.next = Some(RelocateStep::Settle);
                return Ok(());
            };
            done.nodes += self.copy_path(&key, blocks).await?;
            from = key;
        }
        done.next = Some(RelocateStep::Nodes(from));
        Ok(())
    }

    /// Gives the nodes on the way to `key` new places. Returns how many have left `blocks`.
    async fn copy_path(&self, key: &Key, blocks: &Range<u64>) -> Result<u64, FsError> {
        let mut reservation = self.reserve(0, self.nodes_for(1), Priority::Reserve).await?;
        let mut loader = Loader::new(self);
        loop {
            self.volume.check_writable()?;
            let epoch = self.enter_epoch().await;
            let mut space = TransactionSpace { shard: self, reservation: &mut reservation };
            let copied = self.tree.borrow_mut().copy_path(key, blocks, epoch, &mut space);
            match copied {
                Ok(left) => {
                    self.epochs.mark_changed();
                    self.volume.note_commit(self.id, epoch);
                    return Ok(left.max(1));
                }
                Err(missing) => loader.load(missing).await?,
            }
        }
    }
}

fn try_lock(inode: &Inode, reference: &Reference, kind: ExtentKind) -> Option<ReferenceLocks> {
    let mmap = match is_planted(Bug::RelocationWithoutMmapLock) {
        true => None,
        false => Some(inode.mmap_lock.try_lock(Mode::Shared)?),
    };
    let range = inode.ranges.try_lock(reference.bytes(), Mode::Exclusive)?;
    let locks = ReferenceLocks { _range: range, _mmap: mmap };
    (!is_written_to(inode, reference, kind)).then_some(locks)
}

/// Whether preallocated blocks of the reference are being written to: they must not move before that has ended.
fn is_written_to(inode: &Inode, reference: &Reference, kind: ExtentKind) -> bool {
    kind == ExtentKind::Preallocated && inode.data.borrow().has_ordered_in(&reference.bytes())
}
