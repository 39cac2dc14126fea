//! Clones: two files, or two places of one, that share blocks.
//!
//! Owns: [`Shard::clone_range`] (FICLONERANGE and, where it can share, `copy_file_range(2)`), [`Shard::deduplicate`]
//! (FIDEDUPERANGE), and what a crash or a failure in the middle of one leaves to do.
//!
//! | step | holds | what |
//! |---|---|---|
//! | 1 | inode locks X, then mmap locks X, of both files in the order of their numbers | nobody changes size or contents |
//! | 2 | the same | what was accepted before is applied; both ranges are written back, their ordered extents awaited |
//! | 2½ | the same | deduplication only: both ranges are read from the device and compared |
//! | 3 | and the target's range X, nothing of the source's | extents are shared, piece by piece |
//! | 4 | inode and mmap locks | what the target had there is dropped, if it was much |
//!
//! **The source's range is not locked**: reads of it, buffered or direct, take their shared range and go on all the
//! time. Its extents stay because whatever would replace them needs one of the locks of step 1: a write is applied under
//! the inode or the mmap lock, and relocation takes the mmap lock too.
//!
//! A clone that one transaction can hold is one transaction. A longer one goes slice by slice under an
//! [`Intent::Clone`]: a slice moves what the target had to an object of its own and puts the shared extents in its
//! place; where the target has nothing, hundreds of extents at once ([`share_many`]). The last one sets the size; from then on the clone stands, and what was set aside is dropped under an
//! [`Intent::DropReplaced`].
//!
//! # Legal crash outcomes
//! All of a clone or nothing of it, whatever its length: a mount that finds an `Intent::Clone` moves back what was set
//! aside, before it serves the file. A failure (no space, a damaged node) does the same at once.
//!
//! Excludes: what is different when the source lives on another shard (`clone/cross.rs`).

use std::ops::Range;
use std::rc::Rc;

use crate::MAX_FILE_SIZE;
use crate::alloc::Priority;
use crate::batch::{Batch, Interrupt, Plan};
use crate::error::FsError;
use crate::format::extent::set_aside_of;
use crate::format::items::{InodeRecord, Intent, intent_key};
use crate::locks::{Guard, InodeClass, LockOrder, MmapClass, RangeGuard};
use crate::namespace::inode::{put_intent, store};
use crate::planted::{Bug, is_planted};
use crate::request::{CloneRange, Cloned};
use crate::shard::transact::Credit;
use crate::shard::{Inode, Shard};
use crate::types::{BLOCK_SIZE, InodeNr};

use super::apply::{MmapLock, load_regular};
use super::extent_map::{
    ItemBudget, Limits, SET_ASIDE_ITEMS, SHARE_ITEMS, data_segments, drop_range, next_extent, set_aside,
    share, share_many,
};
use super::file::pages_of;
use super::page::PAGE_SIZE;

mod cross;

/// Items of one transaction of a clone, the inode and the intent not counted.
const SLICE_ITEMS: u32 = 96;

/// Bytes that a deduplication compares at once.
const COMPARED_AT_ONCE: u64 = 1 << 20;

/// Items of a transaction that drops what was set aside.
const DROP_ITEMS: ItemBudget = ItemBudget::new(4 * ItemBudget::ONE_STEP.get());

/// The inode and two intents.
const HEAD_ITEMS: u32 = 3;

/// Times that data written meanwhile is written back again before the clone gives up.
const FLUSH_ROUNDS: u32 = 8;

/// Why blocks are shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// The target becomes what the source is.
    Clone,
    /// They are the same already.
    Deduplicate,
}

/// A clone whose ranges are known to fit both files, in whole blocks.
#[derive(Clone, Debug)]
struct Job {
    purpose: Purpose,
    source: InodeNr,
    /// First byte of the source.
    from: u64,
    target: InodeNr,
    /// Bytes of the target, in whole blocks.
    range: Range<u64>,
    /// Where the last byte that counts ends in the target.
    end: u64,
}

impl Job {
    fn source_range(&self, range: &Range<u64>) -> Range<u64> {
        let shift = |at: u64| at - self.range.start + self.from;
        shift(range.start)..shift(range.end)
    }
}

/// How far a clone has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Progress {
    /// The target shares everything before this.
    shared: u64,
    /// Nothing of what the target had is left before this.
    cleared: u64,
    extents: u64,
}

/// Whether a slice was more than nothing. If not, nor will the next be: extents or runs contradict each other.
fn got_on(before: Progress, reached: Progress, job: &Job) -> Result<(), FsError> {
    if (reached.shared, reached.cleared) > (before.shared, before.cleared) {
        return Ok(());
    }
    let at = reached.shared - job.range.start + job.from;
    Err(FsError::Damaged {
        what: format!("extents at byte {at}, and the runs of their blocks, contradict each other"),
        block: None,
        inode: Some(job.source),
    })
}

/// The locks of step 1. Fields are dropped in order: the reverse of how they were taken.
struct CloneLocks {
    mmap: Vec<Guard<MmapClass>>,
    _inodes: Vec<Guard<InodeClass>>,
    order: LockOrder,
}

impl Shard {
    /// Makes a range of the target, a file of this shard, the same as a range of the source by sharing its blocks.
    ///
    /// # Errors
    /// [`FsError::Invalid`] for ranges that overlap in one file, reach beyond the source's end, or are not of whole
    /// blocks (but for an end that is the source's and not inside the target); [`FsError::FileTooLarge`]; what the
    /// inodes are; [`FsError::NoSpace`]; failures of the device. Nothing has changed then.
    pub(crate) async fn clone_range(self: &Rc<Self>, clone: CloneRange) -> Result<Cloned, FsError> {
        let cloned = self.share_blocks(clone, Purpose::Clone).await?;
        Ok(cloned.unwrap_or_default())
    }

    /// Lets two ranges that hold the same bytes share their blocks; `None` if they differ.
    ///
    /// # Errors
    /// As of [`clone_range`](Self::clone_range); [`FsError::Invalid`] also for ranges that reach beyond the target's end.
    pub(crate) async fn deduplicate(self: &Rc<Self>, range: CloneRange) -> Result<Option<Cloned>, FsError> {
        self.share_blocks(range, Purpose::Deduplicate).await
    }

    async fn share_blocks(
        self: &Rc<Self>,
        clone: CloneRange,
        purpose: Purpose,
    ) -> Result<Option<Cloned>, FsError> {
        if clone.target.shard() != self.id {
            return Err(FsError::NotFound); // requests are sent to the target's shard
        }
        if clone.source.shard() != self.id {
            return self.share_across(clone, purpose).await;
        }
        let source = self.inode(clone.source);
        let target = self.inode(clone.target);
        let outcome = self.clone_between(&source, &target, &clone, purpose).await;
        drop((source, target));
        self.release_inode(clone.source);
        self.release_inode(clone.target);
        outcome
    }

    async fn clone_between(
        self: &Rc<Self>,
        source: &Rc<Inode>,
        target: &Rc<Inode>,
        clone: &CloneRange,
        purpose: Purpose,
    ) -> Result<Option<Cloned>, FsError> {
        let mut locks = self.lock_for_clone(source, target).await;
        if purpose == Purpose::Deduplicate && is_planted(Bug::ComparisonUnlocked) {
            locks.mmap.clear();
        }
        self.drain();
        if !is_planted(Bug::CloneWithoutFence) {
            self.apply_pending(source, &locks.order, MmapLock::Held).await?;
        }
        self.apply_pending(target, &locks.order, MmapLock::Held).await?;
        let source_size = self.visible_size(source.nr).await?;
        let Some(job) = self.plan_job(source_size, target, clone, purpose).await? else {
            return Ok(Some(Cloned::default()));
        };
        if purpose == Purpose::Deduplicate && !self.is_same(source, target, &job).await? {
            return Ok(None);
        }
        let range = self.lock_for_sharing(source, target, &job, &locks.order).await?;
        let extents = self.share_range(target, &job).await?;
        drop(range);
        Ok(Some(self.end_clone(&job, extents).await))
    }

    /// What follows a clone that stands.
    async fn end_clone(&self, job: &Job, extents: u64) -> Cloned {
        if let Err(error) = self.drop_set_aside(job.target).await {
            // The next clone to this file, or the next mount, tries again.
            tracing::warn!(inode = %job.target, %error, "what a clone replaced is not dropped yet");
        }
        Cloned { bytes: job.end - job.range.start, extents }
    }

    /// Whether both ranges hold the same bytes. They are written back first; what is accepted meanwhile is applied
    /// after the locks are given back.
    async fn is_same(
        self: &Rc<Self>,
        source: &Rc<Inode>,
        target: &Rc<Inode>,
        job: &Job,
    ) -> Result<bool, FsError> {
        self.flush_range(source, &job.source_range(&job.range)).await?;
        self.flush_range(target, &job.range).await?;
        let mut at = job.range.start;
        while at < job.range.end {
            let piece = at..job.range.end.min(at + COMPARED_AT_ONCE);
            let left = self.bytes_on_device(source.nr, &job.source_range(&piece)).await?;
            let right = self.bytes_on_device(target.nr, &piece).await?;
            if left != right {
                return Ok(false);
            }
            at = piece.end;
        }
        Ok(true)
    }

    /// What the device has of a range of whole blocks, verified.
    pub(super) async fn bytes_on_device(
        &self,
        inode: InodeNr,
        range: &Range<u64>,
    ) -> Result<Vec<u8>, FsError> {
        let segments = self.view(|batch| data_segments(batch, inode, range.clone())).await?;
        let mut bytes = vec![0; (range.end - range.start) as usize];
        let first = range.start / BLOCK_SIZE;
        self.read_segments(inode, &segments, |index, page| {
            let at = (index - first) as usize * PAGE_SIZE;
            bytes[at..at + PAGE_SIZE].copy_from_slice(page);
        })
        .await?;
        Ok(bytes)
    }

    async fn lock_for_clone(&self, source: &Rc<Inode>, target: &Rc<Inode>) -> CloneLocks {
        let mut both = vec![source, target];
        both.sort_unstable_by_key(|inode| inode.nr);
        both.dedup_by_key(|inode| inode.nr);
        let mut order = LockOrder::new();
        let mut inodes = Vec::with_capacity(2);
        for inode in &both {
            inodes.push(inode.lock.exclusive(&mut order).await);
        }
        let mut mmap = Vec::with_capacity(2);
        for inode in &both {
            mmap.push(inode.mmap_lock.exclusive(&mut order).await);
        }
        CloneLocks { mmap, _inodes: inodes, order }
    }

    /// Checks the ranges against the files, which are locked; `None` if there is nothing to do.
    async fn plan_job(
        &self,
        source_size: u64,
        target: &Inode,
        clone: &CloneRange,
        purpose: Purpose,
    ) -> Result<Option<Job>, FsError> {
        let (from, to) = (clone.source_offset.get(), clone.target_offset.get());
        let target_size = self.visible_size(target.nr).await?;
        let length = match clone.length {
            0 => source_size.checked_sub(from).ok_or(FsError::Invalid)?,
            length => length,
        };
        let source_end = from.checked_add(length).filter(|end| *end <= source_size);
        let source_end = source_end.ok_or(FsError::Invalid)?;
        let target_end = to.checked_add(length).filter(|end| *end <= MAX_FILE_SIZE);
        let target_end = target_end.ok_or(FsError::FileTooLarge)?;
        let at_end = source_end == source_size
            && match purpose {
                Purpose::Clone => target_end >= target_size,
                Purpose::Deduplicate => target_end == target_size,
            };
        let aligned = from.is_multiple_of(BLOCK_SIZE)
            && to.is_multiple_of(BLOCK_SIZE)
            && (length.is_multiple_of(BLOCK_SIZE) || at_end);
        let overlap = clone.source == target.nr && from < target_end && to < source_end;
        let beyond = purpose == Purpose::Deduplicate && target_end > target_size;
        if !aligned || overlap || beyond {
            return Err(FsError::Invalid);
        }
        let range = to..target_end.next_multiple_of(BLOCK_SIZE);
        let job = Job { purpose, source: clone.source, from, target: target.nr, range, end: target_end };
        Ok((length > 0).then_some(job))
    }

    /// Writes both ranges back and locks the target's, at a moment at which its extents say all that is there.
    async fn lock_for_sharing(
        self: &Rc<Self>,
        source: &Rc<Inode>,
        target: &Rc<Inode>,
        job: &Job,
        order: &LockOrder,
    ) -> Result<(RangeGuard, Option<RangeGuard>), FsError> {
        let source_range = job.source_range(&job.range);
        for _ in 0..FLUSH_ROUNDS {
            let is_flushed = !is_planted(Bug::CloneOfDirtyRange);
            if is_flushed {
                self.flush_range(source, &source_range).await?;
            }
            self.flush_range(target, &job.range).await?;
            let guard = target.ranges.exclusive(job.range.clone(), &mut order.clone()).await;
            if is_planted(Bug::SourceRangeLocked) && source.nr != target.nr {
                let whole = source.ranges.exclusive(source_range.clone(), &mut LockOrder::new()).await;
                return Ok((guard, Some(whole)));
            }
            if (!is_flushed || source.is_settled(&source_range)) && target.is_settled(&job.range) {
                return Ok((guard, None));
            }
        }
        // All four locks are held: nothing but a failed write-back, which the flush reports, makes pages dirty.
        Err(FsError::Io("data of the range cannot be written".to_owned()))
    }

    /// Shares the whole of the job's range. Returns the extents that the target has got.
    async fn share_range(&self, target: &Rc<Inode>, job: &Job) -> Result<u64, FsError> {
        // Nothing changes between the rehearsal and the commit: everything that could is locked.
        let whole = |batch: &mut Batch<'_>| plan_whole(batch, target, job);
        let extents = match self.rehearse(whole).await? {
            Some(_) => {
                let cloned = self.transact(Credit::normal(SLICE_ITEMS + HEAD_ITEMS), whole).await?;
                let (extents, ended) = cloned.ok_or_else(|| FsError::Io("a clone grew".to_owned()))?;
                self.clone_stands(target, job, ended);
                extents
            }
            None => self.share_in_slices(target, job).await?,
        };
        Ok(extents)
    }

    async fn share_in_slices(&self, target: &Rc<Inode>, job: &Job) -> Result<u64, FsError> {
        self.drop_set_aside(job.target).await?;
        let mut progress = Progress { shared: job.range.start, cleared: job.range.start, extents: 0 };
        while progress.shared < job.range.end {
            let slice = self.share_slice(job, progress).await;
            match slice.and_then(|reached| got_on(progress, reached, job).map(|()| reached)) {
                Ok(reached) => progress = reached,
                Err(error) => {
                    self.undo_after_failure(job, progress, &error).await;
                    return Err(error);
                }
            }
            // Slices are short; between them the shard serves others.
            self.ctx.yield_now().await;
        }
        self.end_slices(target, job, progress).await
    }

    /// The next slice: many extents where the target has nothing, else a few.
    async fn share_slice(&self, job: &Job, progress: Progress) -> Result<Progress, FsError> {
        if progress.shared < progress.cleared {
            let many = |batch: &mut Batch<'_>| plan_many(batch, job, progress);
            let reached = self.transact_list(Priority::Normal, many).await?;
            if reached != progress {
                return Ok(reached);
            }
        }
        let credit = Credit::normal(SLICE_ITEMS + HEAD_ITEMS);
        self.transact(credit, |batch| plan_slice(batch, job, progress)).await
    }

    /// Commits a long clone whose slices are all there.
    async fn end_slices(&self, target: &Rc<Inode>, job: &Job, progress: Progress) -> Result<u64, FsError> {
        let ended = self.transact(Credit::reserve(HEAD_ITEMS), |batch| plan_end(batch, target, job)).await;
        match ended {
            Ok(ended) => {
                self.clone_stands(target, job, ended);
                Ok(progress.extents)
            }
            Err(error) => {
                self.undo_after_failure(job, progress, &error).await;
                Err(error)
            }
        }
    }

    /// The transaction that ends the clone is committed.
    fn clone_stands(&self, target: &Rc<Inode>, job: &Job, ended: Ended) {
        let mut data = self.data_of(target);
        data.drop_pages(pages_of(&job.range));
        data.synced(ended.version);
        data.size_stored(ended.size);
    }

    async fn undo_after_failure(&self, job: &Job, progress: Progress, error: &FsError) {
        if progress.cleared == job.range.start {
            return; // the first slice failed: there is no intent
        }
        tracing::warn!(source = %job.source, target = %job.target, %error, "a clone failed and is undone");
        if let Err(second) = self.undo_clone(job.target, job.range.start..progress.cleared).await {
            // A part of the clone is visible, and a mount undoes it.
            self.volume.fail(&format!("a clone to inode {} could not be undone: {second}", job.target));
        }
    }

    /// Moves back what a clone has set aside of `range`, in place of what it shared. The caller holds the locks.
    async fn undo_clone(&self, target: InodeNr, mut range: Range<u64>) -> Result<(), FsError> {
        while !range.is_empty() {
            let credit = Credit::reserve(SLICE_ITEMS + HEAD_ITEMS);
            range.start = self.transact(credit, |batch| plan_undo(batch, target, &range)).await?;
            self.ctx.yield_now().await;
        }
        Ok(())
    }

    /// Drops what was set aside of `inode`. The caller holds its inode lock, so that no other clone sets more aside.
    ///
    /// # Errors
    /// What stood against it; a part may be dropped.
    pub(crate) async fn drop_set_aside(&self, inode: InodeNr) -> Result<(), FsError> {
        loop {
            let credit = Credit { items: DROP_ITEMS.get() + HEAD_ITEMS, priority: Priority::Reserve };
            if self.transact(credit, |batch| plan_drop_set_aside(batch, inode)).await? {
                return Ok(());
            }
            self.ctx.yield_now().await;
        }
    }

    /// Undoes a clone that a crash interrupted.
    ///
    /// # Errors
    /// What stood against it.
    pub(crate) async fn undo_clone_after_crash(
        self: &Rc<Self>,
        nr: InodeNr,
        range: Range<u64>,
    ) -> Result<(), FsError> {
        let inode = self.inode(nr);
        let mut order = LockOrder::new();
        let _inode_lock = inode.lock.exclusive(&mut order).await;
        let _mmap_lock = inode.mmap_lock.exclusive(&mut order).await;
        let _range = inode.ranges.exclusive(0..u64::MAX, &mut order).await;
        if range.is_empty() {
            let plan = |batch: &mut Batch<'_>| {
                batch.delete(intent_key(nr, Intent::Clone { start: 0, end: 0 }));
                Ok(())
            };
            return self.transact(Credit::reserve(HEAD_ITEMS), plan).await;
        }
        self.undo_clone(nr, range).await
    }

    /// Drops what a clone that stands has set aside, after a crash.
    ///
    /// # Errors
    /// What stood against it.
    pub(crate) async fn drop_set_aside_after_crash(self: &Rc<Self>, nr: InodeNr) -> Result<(), FsError> {
        let inode = self.inode(nr);
        let _inode_lock = inode.lock.exclusive(&mut LockOrder::new()).await;
        self.drop_set_aside(nr).await
    }
}

/// What the last transaction of a clone has stored.
#[derive(Clone, Copy, Debug)]
struct Ended {
    size: u64,
    version: u64,
}

/// A whole clone in one transaction, with the extents shared; `None`, and a batch to be thrown away, if it does not fit.
fn plan_whole(batch: &mut Batch<'_>, target: &Inode, job: &Job) -> Plan<Option<(u64, Ended)>> {
    let mut record = load_regular(batch, job.target)?;
    let mut at = job.range.start;
    while at < job.range.end {
        if batch.changed() + ItemBudget::ONE_STEP.get() > SLICE_ITEMS {
            return Ok(None);
        }
        let dropped = drop_range(batch, job.target, at..job.range.end, &mut ItemBudget::ONE_STEP.clone())?;
        record.blocks = record.blocks.saturating_sub(dropped.blocks);
        at = dropped.up_to;
    }
    let (mut at, mut extents) = (job.range.start, 0);
    while at < job.range.end {
        if batch.changed() + SHARE_ITEMS > SLICE_ITEMS {
            return Ok(None);
        }
        let source = job.source_range(&(at..job.range.end));
        let shared = share(batch, job.source, &source, job.target, at)?;
        record.blocks += shared.blocks;
        extents += u64::from(shared.blocks > 0);
        at += shared.up_to - source.start;
    }
    let ended = end_record(batch, target, job, &mut record);
    store(batch, job.target, &record);
    Ok(Some((extents, ended)))
}

/// The next slice of a long clone.
fn plan_slice(batch: &mut Batch<'_>, job: &Job, before: Progress) -> Plan<Progress> {
    let mut record = load_regular(batch, job.target)?;
    let mut now = before;
    while now.shared < job.range.end && batch.changed() + SET_ASIDE_ITEMS.max(SHARE_ITEMS) <= SLICE_ITEMS {
        if now.cleared == now.shared {
            // Clear as far as one extent of the target, or everything up to its next one.
            match set_aside(batch, job.target, set_aside_of(job.target), &(now.cleared..job.range.end))? {
                Some((end, blocks)) => {
                    record.blocks = record.blocks.saturating_sub(blocks);
                    now.cleared = end;
                }
                None => now.cleared = job.range.end,
            }
            continue;
        }
        let source = job.source_range(&(now.shared..now.cleared));
        let shared = share(batch, job.source, &source, job.target, now.shared)?;
        record.blocks += shared.blocks;
        now.extents += u64::from(shared.blocks > 0);
        now.shared += shared.up_to - source.start;
    }
    if now == before {
        return Err(Interrupt::Failed(FsError::Io("a clone gets nowhere".to_owned())));
    }
    put_intent(batch, job.target, Intent::Clone { start: job.range.start, end: now.cleared });
    store(batch, job.target, &record);
    Ok(now)
}

/// A slice where the target has nothing, and of extents that are shared whole; nothing is done if there are none.
fn plan_many(batch: &mut Batch<'_>, job: &Job, before: Progress) -> Plan<Progress> {
    let source = job.source_range(&(before.shared..before.cleared));
    let shared = share_many(batch, job.source, &source, (job.target, before.shared), Limits::SLICE)?;
    let mut now = before;
    now.shared += shared.up_to - source.start;
    if shared.extents > 0 {
        let mut record = load_regular(batch, job.target)?;
        record.blocks += shared.blocks;
        now.extents += shared.extents;
        store(batch, job.target, &record);
    }
    Ok(now)
}

/// The transaction with which a long clone stands.
fn plan_end(batch: &mut Batch<'_>, target: &Inode, job: &Job) -> Plan<Ended> {
    let mut record = load_regular(batch, job.target)?;
    let ended = end_record(batch, target, job, &mut record);
    batch.delete(intent_key(job.target, Intent::Clone { start: 0, end: 0 }));
    put_intent(batch, job.target, Intent::DropReplaced);
    store(batch, job.target, &record);
    Ok(ended)
}

fn end_record(batch: &Batch<'_>, target: &Inode, job: &Job, record: &mut InodeRecord) -> Ended {
    let data = target.data.borrow();
    record.size = data.size_on_device(record.size, job.range.end).max(job.end);
    data.unsynced.fold_into(record);
    if job.purpose == Purpose::Clone {
        record.modified = batch.now();
        record.changed = batch.now();
    }
    Ended { size: record.size, version: data.unsynced.version }
}

/// Moves the beginning of `range` back to the target. Returns where the rest begins.
fn plan_undo(batch: &mut Batch<'_>, target: InodeNr, range: &Range<u64>) -> Plan<u64> {
    let mut record = load_regular(batch, target)?;
    let aside = set_aside_of(target);
    let mut at = range.start;
    while at < range.end && batch.changed() + ItemBudget::ONE_STEP.get() + SET_ASIDE_ITEMS <= SLICE_ITEMS {
        // As far as the first piece that was set aside, and no further than one step can drop.
        let piece = next_extent(batch, aside, at)?
            .map_or(range.end, |mapped| if mapped.offset > at { mapped.offset } else { mapped.end() });
        let piece = at..piece.min(range.end);
        let dropped = drop_range(batch, target, piece, &mut ItemBudget::ONE_STEP.clone())?;
        record.blocks = record.blocks.saturating_sub(dropped.blocks);
        if let Some((_, blocks)) = set_aside(batch, aside, target, &(at..dropped.up_to))? {
            record.blocks += blocks;
        }
        at = dropped.up_to;
    }
    let intent = Intent::Clone { start: at, end: range.end };
    if at == range.end {
        batch.delete(intent_key(target, intent));
    } else {
        put_intent(batch, target, intent);
    }
    store(batch, target, &record);
    Ok(at)
}

/// Drops some of what was set aside; whether nothing is left.
fn plan_drop_set_aside(batch: &mut Batch<'_>, inode: InodeNr) -> Plan<bool> {
    let key = intent_key(inode, Intent::DropReplaced);
    if batch.get(&key)?.is_none() {
        return Ok(true);
    }
    let dropped = drop_range(batch, set_aside_of(inode), 0..MAX_FILE_SIZE, &mut DROP_ITEMS.clone())?;
    if dropped.up_to < MAX_FILE_SIZE {
        return Ok(false);
    }
    batch.delete(key);
    Ok(true)
}
