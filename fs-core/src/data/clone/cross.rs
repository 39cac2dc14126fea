//! Clones whose source lives on another shard.
//!
//! Owns: the steps of `data/clone.rs` that then go by messages. The target's shard leads: it takes the locks of both
//! files in the same order (shard, inode), those of the source by message, and writes both back. Slices alternate: one
//! transaction of its own sets aside what the target has; one of both shards (three, if the source's blocks are
//! themselves borrowed) lends and borrows. See `data/lending.rs`.
//!
//! A clone between shards always goes by slices, under an `Intent::Clone`: what a crash leaves is undone by the target's
//! shard alone, and what it had borrowed goes back.

use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use crate::alloc::Priority;
use crate::batch::{Batch, Plan};
use crate::error::FsError;
use crate::format::extent::{lent_offset, lent_to, set_aside_of};
use crate::format::items::Intent;
use crate::locks::{Guard, InodeClass, LockOrder, MmapClass, RangeGuard};
use crate::namespace::inode::{put_intent, store};
use crate::namespace::transaction::TransactionId;
use crate::request::{CloneRange, Cloned};
use crate::shard::transact::Credit;
use crate::shard::{Inode, Shard};
use crate::types::{BLOCK_SIZE, BlockCount, BlockNr, InodeNr, ShardId};

use super::super::apply::{MmapLock, load_regular};
use super::super::extent_map::lend::{Blocks, PARTS_AT_ONCE, Piece, borrow, survey};
use super::super::extent_map::{SET_ASIDE_ITEMS, set_aside};
use super::super::lending::{LendingCall, LendingChange, LendingReply, misanswered};
use super::{COMPARED_AT_ONCE, FLUSH_ROUNDS, HEAD_ITEMS, Job, Progress, Purpose, SLICE_ITEMS, got_on};

/// The target's locks; the source's are held for the transaction on its own shard. Fields are dropped in order.
struct TargetLocks {
    _mmap: Guard<MmapClass>,
    _inode: Guard<InodeClass>,
    order: LockOrder,
    source_size: u64,
}

/// A source on another shard, locked for a transaction.
#[derive(Clone, Copy)]
struct Source {
    shard: ShardId,
    transaction: TransactionId,
}

/// A slice as planned under the turn to borrow: pieces with their offsets in the target, and what their owners must lend.
struct Slice {
    pieces: Vec<(u64, Piece)>,
    lends: BTreeMap<ShardId, Vec<Blocks>>,
    /// Offsets in the source of what is lent by the source's own shard.
    from_source: Vec<Range<u64>>,
    /// Offset in the source behind the last piece.
    end: u64,
}

impl Shard {
    /// As `share_blocks`, for a source of another shard.
    pub(super) async fn share_across(
        self: &Rc<Self>,
        clone: CloneRange,
        purpose: Purpose,
    ) -> Result<Option<Cloned>, FsError> {
        let source = Source { shard: clone.source.shard(), transaction: self.new_transaction() };
        if source.shard.index() >= self.volume.shard_count() {
            return Err(FsError::NotFound);
        }
        let target = self.inode(clone.target);
        let outcome = match self.lock_across(source, clone.source, &target).await {
            Ok(locks) => self.share_locked(source, &target, &clone, purpose, &locks).await,
            Err(error) => Err(error),
        };
        let unlocked = self.ask_lending(source.shard, LendingCall::Unlock(source.transaction)).await;
        if let Err(error) = unlocked {
            // Only a shard that has ended does not answer, and its locks ended with it.
            tracing::debug!(shard = %source.shard, %error, "unlock not answered");
        }
        drop(target);
        self.release_inode(clone.target);
        outcome
    }

    async fn lock_across(
        self: &Rc<Self>,
        source: Source,
        nr: InodeNr,
        target: &Rc<Inode>,
    ) -> Result<TargetLocks, FsError> {
        let mut order = LockOrder::new();
        let source_first = source.shard < self.id;
        let lock_source = self.ask_lending(source.shard, LendingCall::LockInode(source.transaction, nr));
        let inode = if source_first {
            order.enter::<InodeClass>(nr, 0);
            lock_source.await?;
            target.lock.exclusive(&mut order).await
        } else {
            let guard = target.lock.exclusive(&mut order).await;
            order.enter::<InodeClass>(nr, 0);
            lock_source.await?;
            guard
        };
        let settle_source = self.ask_lending(source.shard, LendingCall::LockMmap(source.transaction));
        let (mmap, size) = if source_first {
            order.enter::<MmapClass>(nr, 0);
            let size = settle_source.await?;
            (target.mmap_lock.exclusive(&mut order).await, size)
        } else {
            let guard = target.mmap_lock.exclusive(&mut order).await;
            order.enter::<MmapClass>(nr, 0);
            (guard, settle_source.await?)
        };
        let LendingReply::Size(source_size) = size else { return Err(misanswered(&size)) };
        Ok(TargetLocks { _mmap: mmap, _inode: inode, order, source_size })
    }

    async fn share_locked(
        self: &Rc<Self>,
        source: Source,
        target: &Rc<Inode>,
        clone: &CloneRange,
        purpose: Purpose,
        locks: &TargetLocks,
    ) -> Result<Option<Cloned>, FsError> {
        self.drain();
        self.apply_pending(target, &locks.order, MmapLock::Held).await?;
        let Some(job) = self.plan_job(locks.source_size, target, clone, purpose).await? else {
            return Ok(Some(Cloned::default()));
        };
        if purpose == Purpose::Deduplicate && !self.is_same_across(source, target, &job).await? {
            return Ok(None);
        }
        let range = self.settle_both(source, target, &job, &locks.order).await?;
        let extents = self.share_slices_across(source, target, &job, &locks.order).await?;
        drop(range);
        Ok(Some(self.end_clone(&job, extents).await))
    }

    async fn is_same_across(
        self: &Rc<Self>,
        source: Source,
        target: &Rc<Inode>,
        job: &Job,
    ) -> Result<bool, FsError> {
        self.flush_source(source, job).await?;
        self.flush_range(target, &job.range).await?;
        let mut at = job.range.start;
        while at < job.range.end {
            let piece = at..job.range.end.min(at + COMPARED_AT_ONCE);
            let call = LendingCall::Bytes(source.transaction, job.source_range(&piece));
            let left = match self.ask_lending(source.shard, call).await? {
                LendingReply::Bytes(bytes) => bytes,
                other => return Err(misanswered(&other)),
            };
            if left != self.bytes_on_device(target.nr, &piece).await? {
                return Ok(false);
            }
            at = piece.end;
        }
        Ok(true)
    }

    async fn flush_source(&self, source: Source, job: &Job) -> Result<(), FsError> {
        let call = LendingCall::Flush(source.transaction, job.source_range(&job.range));
        self.ask_lending(source.shard, call).await.map(|_| ())
    }

    /// Writes both ranges back and locks the target's, at a moment at which the extents of both say all that is there.
    async fn settle_both(
        self: &Rc<Self>,
        source: Source,
        target: &Rc<Inode>,
        job: &Job,
        order: &LockOrder,
    ) -> Result<RangeGuard, FsError> {
        for _ in 0..FLUSH_ROUNDS {
            self.flush_source(source, job).await?;
            self.flush_range(target, &job.range).await?;
            let guard = target.ranges.exclusive(job.range.clone(), &mut order.clone()).await;
            let call = LendingCall::IsSettled(source.transaction, job.source_range(&job.range));
            match self.ask_lending(source.shard, call).await? {
                LendingReply::Settled(true) if target.is_settled(&job.range) => return Ok(guard),
                LendingReply::Settled(_) => {}
                other => return Err(misanswered(&other)),
            }
        }
        // All four locks are held: nothing but a failed write-back, which the flush reports, makes pages dirty.
        Err(FsError::Io("data of the range cannot be written".to_owned()))
    }

    async fn share_slices_across(
        self: &Rc<Self>,
        source: Source,
        target: &Rc<Inode>,
        job: &Job,
        order: &LockOrder,
    ) -> Result<u64, FsError> {
        self.drop_set_aside(job.target).await?;
        let mut progress = Progress { shared: job.range.start, cleared: job.range.start, extents: 0 };
        while progress.shared < job.range.end {
            let before = progress;
            let slice = self.slice_across(source, job, &mut progress, order).await;
            if let Err(error) = slice.and_then(|()| got_on(before, progress, job)) {
                self.undo_after_failure(job, progress, &error).await;
                return Err(error);
            }
            self.ctx.yield_now().await;
        }
        self.end_slices(target, job, progress).await
    }

    /// One step: makes room in the target, or shares a slice where there is room.
    async fn slice_across(
        self: &Rc<Self>,
        source: Source,
        job: &Job,
        progress: &mut Progress,
        order: &LockOrder,
    ) -> Result<(), FsError> {
        if progress.cleared == progress.shared {
            let credit = Credit::normal(SLICE_ITEMS + HEAD_ITEMS);
            let cleared = progress.cleared;
            progress.cleared = self.transact(credit, |batch| plan_clear(batch, job, cleared)).await?;
            return Ok(());
        }
        let room = progress.shared..progress.cleared;
        let call = LendingCall::Pieces(source.transaction, job.source_range(&room));
        let (pieces, up_to) = match self.ask_lending(source.shard, call).await? {
            LendingReply::Pieces(pieces, up_to) => (pieces, up_to),
            other => return Err(misanswered(&other)),
        };
        if pieces.is_empty() {
            progress.shared = job.target_offset(up_to);
            return Ok(());
        }
        let _turn = self.lending_turn(order).await;
        let slice = self.rehearse(|batch| plan_slice_across(batch, job, &pieces, source)).await?;
        let all = slice.pieces.len() == pieces.len() && slice.end == pieces.last().map_or(0, Piece::end);
        let (extents, reached) = (slice.pieces.len() as u64, if all { up_to } else { slice.end });
        self.commit_lending(slice.into_changes(self.id, source, job), Priority::Normal).await?;
        progress.extents += extents;
        progress.shared = job.target_offset(reached);
        Ok(())
    }
}

impl Job {
    /// Where a byte of the source goes.
    fn target_offset(&self, source: u64) -> u64 {
        source - self.from + self.range.start
    }
}

impl Slice {
    fn into_changes(self, borrower: ShardId, source: Source, job: &Job) -> Vec<LendingChange> {
        let mut changes = Vec::with_capacity(2 + self.lends.len());
        if !self.from_source.is_empty() {
            let (owner, via, ranges) = (source.shard, job.source, self.from_source);
            changes.push(LendingChange::Lend { owner, via, ranges, borrower });
        }
        // What the source has borrowed itself is known to its owner as lent to the source's shard.
        for (owner, blocks) in self.lends {
            let range = |(start, count): Blocks| lent_offset(start)..lent_offset(start) + count * BLOCK_SIZE;
            let ranges = blocks.into_iter().map(range).collect();
            changes.push(LendingChange::Lend { owner, via: lent_to(source.shard), ranges, borrower });
        }
        changes.push(LendingChange::Borrow { target: job.target, pieces: self.pieces });
        changes
    }
}

/// Sets aside what the target has from `from` on, as much as one transaction can. Returns how far it has nothing left.
fn plan_clear(batch: &mut Batch<'_>, job: &Job, from: u64) -> Plan<u64> {
    let mut record = load_regular(batch, job.target)?;
    let mut cleared = from;
    while cleared < job.range.end && batch.changed() + SET_ASIDE_ITEMS <= SLICE_ITEMS {
        match set_aside(batch, job.target, set_aside_of(job.target), &(cleared..job.range.end))? {
            Some((end, blocks)) => {
                record.blocks = record.blocks.saturating_sub(blocks);
                cleared = end;
            }
            None => cleared = job.range.end,
        }
    }
    put_intent(batch, job.target, Intent::Clone { start: job.range.start, end: cleared });
    store(batch, job.target, &record);
    Ok(cleared)
}

/// Chooses as many of `pieces` as one transaction can take, by trying.
fn plan_slice_across(batch: &mut Batch<'_>, job: &Job, pieces: &[Piece], source: Source) -> Plan<Slice> {
    let mut slice = Slice { pieces: Vec::new(), lends: BTreeMap::new(), from_source: Vec::new(), end: 0 };
    let mut parts = 0;
    for piece in pieces {
        if parts == PARTS_AT_ONCE {
            break;
        }
        let survey = survey(batch, piece, PARTS_AT_ONCE - parts)?;
        parts += survey.parts;
        let piece = piece.beginning(survey.end);
        for range in survey.lacking {
            if piece.owner == source.shard {
                let at = |block: u64| piece.offset + block * BLOCK_SIZE;
                slice.from_source.push(at(range.start)..at(range.end));
            } else {
                let start = piece.start.checked_add(BlockCount::new(range.start)).unwrap_or(BlockNr::new(0));
                slice.lends.entry(piece.owner).or_default().push((start, range.end - range.start));
            }
        }
        let offset = job.target_offset(piece.offset);
        borrow(batch, job.target, offset, &piece)?;
        slice.end = piece.end();
        slice.pieces.push((offset, piece));
    }
    Ok(slice)
}
