//! Space inside a file: preallocation, holes, and finding them.
//!
//! Owns: [`Shard::allocate`] (`fallocate(2)`), [`Shard::seek`] (SEEK_DATA, SEEK_HOLE) and [`Shard::count_extents`].
//!
//! A hole is punched in whole blocks; what the range covers of its first and last block is overwritten with zeroes
//! like any write. Preallocated blocks are taken when `fallocate` is called, so a later write of them needs no new
//! blocks; they read as zeroes, and seek as a hole, until they are written.
//!
//! # Legal crash outcomes
//! Each block of the range old or new, and preallocated blocks hold nothing: their extents say so until data was
//! written to them. The size changes only after the space is there.

use std::ops::Range;
use std::rc::Rc;

use crate::MAX_FILE_SIZE;
use crate::alloc::{Priority, Reservation};
use crate::batch::{Batch, Plan};
use crate::error::FsError;
use crate::format::extent::{ExtentKind, MAX_RUN_BLOCKS};
use crate::locks::{LockOrder, RangeGuard};
use crate::namespace::inode::store;
use crate::request::{AllocateMode, ExtentSummary, SeekWhat};
use crate::shard::transact::Credit;
use crate::shard::{Inode, Shard};
use crate::types::{BLOCK_SIZE, BlockCount, FileOffset, Generation, InodeNr};

use super::NODES_PER_WRITE;
use super::apply::{MmapLock, load_regular};
use super::extent_map::{
    INSERT_ITEMS, ItemBudget, NewExtent, drop_range, insert_extent, is_shared, next_extent,
};
use super::file::{bytes_of, pages_of, within_page};
use super::queue::Charge;

/// Items that one transaction of a punch drops.
const DROP_ITEMS: ItemBudget = ItemBudget::new(2 * ItemBudget::ONE_STEP.get());

/// Times that a preallocation writes back what was written meanwhile, before it holds the range and does without.
const FLUSH_ROUNDS: u32 = 8;

/// Extents that a search looks at before it lets others run.
const EXTENTS_PER_VIEW: u32 = 256;

/// Whether an operation may make the file longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SizeRule {
    Extend,
    Keep,
}

impl Shard {
    /// `fallocate(2)`.
    ///
    /// # Errors
    /// [`FsError::Invalid`] for an empty range, [`FsError::FileTooLarge`], [`FsError::NoSpace`] (a part may be
    /// allocated), what the inode is, failures of the device.
    pub(crate) async fn allocate(
        self: &Rc<Self>,
        nr: InodeNr,
        offset: FileOffset,
        length: u64,
        mode: AllocateMode,
    ) -> Result<(), FsError> {
        if length == 0 {
            return Err(FsError::Invalid);
        }
        let end = offset.get().checked_add(length).filter(|end| *end <= MAX_FILE_SIZE);
        let range = offset.get()..end.ok_or(FsError::FileTooLarge)?;
        let inode = self.inode(nr);
        let outcome = match mode {
            AllocateMode::Extend => self.preallocate(&inode, &range, SizeRule::Extend).await,
            AllocateMode::KeepSize => self.preallocate(&inode, &range, SizeRule::Keep).await,
            AllocateMode::PunchHole => self.punch(&inode, &range).await,
            AllocateMode::ZeroRange => self.zero(&inode, &range, SizeRule::Extend).await,
            AllocateMode::ZeroRangeKeepSize => self.zero(&inode, &range, SizeRule::Keep).await,
            AllocateMode::Collapse => self.collapse(&inode, &range).await,
            AllocateMode::Insert => self.insert_hole(&inode, &range).await,
            AllocateMode::Unshare => {
                self.preallocate(&inode, &range, SizeRule::Extend).await?;
                self.unshare(&inode, &range).await
            }
        };
        drop(inode);
        self.release_inode(nr);
        outcome
    }

    async fn zero(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        range: &Range<u64>,
        rule: SizeRule,
    ) -> Result<(), FsError> {
        self.punch(inode, range).await?;
        self.preallocate(inode, range, rule).await
    }

    async fn punch(self: &Rc<Self>, inode: &Rc<Inode>, range: &Range<u64>) -> Result<(), FsError> {
        // The two blocks at the edges become dirty: their space and budget come before the locks. Without space for
        // them a punch of whole blocks still works: it is what makes space.
        let space = self.reserve(2, NODES_PER_WRITE, Priority::Reserve).await.ok();
        let charge = self.data.shared.budget().charge_beyond(2);
        let mut order = LockOrder::new();
        let _inode_lock = inode.lock.exclusive(&mut order).await;
        let _mmap_lock = inode.mmap_lock.exclusive(&mut order).await;
        self.apply_pending(inode, &order, MmapLock::Held).await?;
        let _range = self.lock_without_ordered(inode, bytes_of(&pages_of(range)).start, &order).await;
        self.zero_edges(inode, range, space, charge).await?;
        let whole = range.start.next_multiple_of(BLOCK_SIZE)..range.end - range.end % BLOCK_SIZE;
        let mut from = whole.start;
        loop {
            let plan = |batch: &mut Batch<'_>| plan_punch(batch, inode, from..whole.end);
            let (up_to, size, version) = self.transact(Credit::reserve(DROP_ITEMS.get() + 1), plan).await?;
            let mut data = self.data_of(inode);
            data.synced(version);
            data.size_stored(size);
            if from < whole.end {
                data.drop_pages(from / BLOCK_SIZE..up_to / BLOCK_SIZE);
            }
            from = up_to;
            if from >= whole.end {
                return Ok(());
            }
        }
    }

    /// Overwrites with zeroes what `range` covers of blocks that it does not cover wholly.
    async fn zero_edges(
        &self,
        inode: &Rc<Inode>,
        range: &Range<u64>,
        mut space: Option<Reservation>,
        mut charge: Charge,
    ) -> Result<(), FsError> {
        let stored = self.view(|batch| load_regular(batch, inode.nr)).await?.size;
        let end = range.end.min(inode.data.borrow().size(stored));
        let (first, last) = (range.start / BLOCK_SIZE, range.end / BLOCK_SIZE);
        for index in if first == last { vec![first] } else { vec![first, last] } {
            let within = within_page(index, range.start..end.max(range.start));
            let covers_all = within_page(index, range.clone()).len() as u64 == BLOCK_SIZE;
            if within.is_empty() || covers_all || !self.load_page(inode, index).await? {
                continue;
            }
            let mut data = self.data_of(inode);
            if data.zero_in_page(index, &within) {
                let kept = space.as_mut().and_then(|space| space.split(1, space.nodes() / 2));
                data.keep_charge(charge.split(1));
                if let Some(kept) = kept {
                    data.keep_space(kept);
                }
                self.data.list_dirty(inode.nr, &mut data);
            }
        }
        Ok(())
    }

    async fn preallocate(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        range: &Range<u64>,
        rule: SizeRule,
    ) -> Result<(), FsError> {
        let whole = bytes_of(&pages_of(range));
        let mut order = LockOrder::new();
        let _inode_lock = inode.lock.exclusive(&mut order).await;
        let _mmap_lock = inode.mmap_lock.exclusive(&mut order).await;
        self.apply_pending(inode, &order, MmapLock::Held).await?;
        let _range = self.lock_flushed(inode, &whole, &order).await?;
        let mut from = whole.start;
        while from < whole.end {
            from = self.preallocate_step(inode, from..whole.end).await?;
        }
        let plan = |batch: &mut Batch<'_>| {
            let mut record = load_regular(batch, inode.nr)?;
            let data = inode.data.borrow();
            data.unsynced.fold_into(&mut record);
            if rule == SizeRule::Extend {
                record.size = record.size.max(range.end);
            }
            record.changed = batch.now();
            store(batch, inode.nr, &record);
            Ok((record.size, data.unsynced.version))
        };
        let (size, version) = self.transact(Credit::normal(1), plan).await?;
        let mut data = inode.data.borrow_mut();
        data.synced(version);
        data.size_stored(size);
        Ok(())
    }

    /// Locks everything from `range` on when nothing in it is dirty or being written: then its extents say what is
    /// there. The caller holds inode and mmap lock.
    pub(super) async fn lock_flushed(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        range: &Range<u64>,
        order: &LockOrder,
    ) -> Result<RangeGuard, FsError> {
        let pages = pages_of(range);
        for _ in 0..FLUSH_ROUNDS {
            self.flush_range(inode, range).await?;
            let guard = self.lock_without_ordered(inode, range.start, order).await;
            if inode.data.borrow().next_dirty(pages.start).is_none_or(|run| run.start >= pages.end) {
                return Ok(guard);
            }
        }
        // Both locks are held, so nothing can make pages dirty but a failed write-back, which the flush reports.
        Err(FsError::Io("data of the range cannot be written".to_owned()))
    }

    /// Preallocates the first hole of `range`, or a part of it. Returns how far nothing is left to do.
    async fn preallocate_step(&self, inode: &Rc<Inode>, range: Range<u64>) -> Result<u64, FsError> {
        let hole = self.view(|batch| first_hole(batch, inode.nr, &range)).await?;
        let wanted = (hole.end - hole.start) / BLOCK_SIZE;
        if wanted == 0 {
            return Ok(hole.end);
        }
        let wanted = wanted.min(MAX_RUN_BLOCKS);
        let nodes = self.nodes_for(INSERT_ITEMS + 1);
        let mut space = self.reserve(wanted, nodes, Priority::Normal).await?;
        let (start, blocks) = self.alloc.borrow_mut().allocate_data(BlockCount::new(wanted), &mut space);
        let generation = Generation::new(self.epochs.current().get());
        let plan = |batch: &mut Batch<'_>| {
            let mut record = load_regular(batch, inode.nr)?;
            let new = NewExtent { start, blocks, generation, checksums: &[] };
            insert_extent(batch, inode.nr, hole.start, new);
            record.blocks += blocks.get();
            store(batch, inode.nr, &record);
            Ok(())
        };
        let inserted = self.transact_with(&mut space, plan).await;
        if inserted.is_err() {
            self.give_back_blocks(start, blocks.get());
        }
        inserted.map(|()| hole.start + blocks.get() * BLOCK_SIZE)
    }

    /// The next byte at or after `offset` that is data, or that is in a hole. The end of the file counts as a hole.
    ///
    /// # Errors
    /// [`FsError::NoData`] if there is none; what the inode is.
    pub(crate) async fn seek(
        self: &Rc<Self>,
        nr: InodeNr,
        offset: FileOffset,
        what: SeekWhat,
    ) -> Result<u64, FsError> {
        let inode = self.inode(nr);
        let found = self.seek_in(&inode, offset.get(), what).await;
        drop(inode);
        self.release_inode(nr);
        found
    }

    /// Counts the extents of a file.
    ///
    /// # Errors
    /// What the inode is; failures of the device.
    pub(crate) async fn count_extents(self: &Rc<Self>, nr: InodeNr) -> Result<ExtentSummary, FsError> {
        let inode = self.inode(nr);
        let counted = self.count_extents_of(&inode).await;
        drop(inode);
        self.release_inode(nr);
        counted
    }

    async fn count_extents_of(&self, inode: &Rc<Inode>) -> Result<ExtentSummary, FsError> {
        let _range = inode.ranges.shared(0..u64::MAX, &mut LockOrder::new()).await;
        self.view(|batch| load_regular(batch, inode.nr)).await?;
        let mut summary = ExtentSummary::default();
        let mut next = Some(0);
        while let Some(from) = next {
            let counted = self.view(|batch| count_some(batch, inode.nr, from)).await;
            let (some, rest) = counted?;
            summary.extents += some.extents;
            summary.shared += some.shared;
            summary.blocks += some.blocks;
            next = rest;
            self.ctx.yield_now().await;
        }
        Ok(summary)
    }

    async fn seek_in(&self, inode: &Rc<Inode>, offset: u64, what: SeekWhat) -> Result<u64, FsError> {
        let start = offset - offset % BLOCK_SIZE;
        let _range = inode.ranges.shared(start..u64::MAX, &mut LockOrder::new()).await;
        let mut at = offset;
        loop {
            let stored = self.view(|batch| load_regular(batch, inode.nr)).await?.size;
            let size = inode.data.borrow().size(stored);
            if at >= size {
                // From within the file, its end is the hole that was looked for.
                return if what == SeekWhat::Hole && offset < size { Ok(size) } else { Err(FsError::NoData) };
            }
            let next = self.view(|batch| next_on_device(batch, inode.nr, at)).await?;
            let on_device = match next {
                Found::Data(range) => range,
                Found::Nothing => u64::MAX..u64::MAX,
                Found::GoOn(from) => {
                    let memory = next_in_memory(inode, at);
                    if memory.start >= from {
                        if what == SeekWhat::Hole {
                            return Ok(at);
                        }
                        at = from;
                        continue;
                    }
                    u64::MAX..u64::MAX
                }
            };
            let memory = next_in_memory(inode, at);
            let data = if memory.start < on_device.start { memory } else { on_device };
            match what {
                SeekWhat::Data if data.start < size => return Ok(data.start.max(offset)),
                SeekWhat::Data => return Err(FsError::NoData),
                SeekWhat::Hole if data.start > at => return Ok(at),
                SeekWhat::Hole => at = data.end,
            }
        }
    }
}

/// Counts [`EXTENTS_PER_VIEW`] extents from `from` on; also where to go on.
fn count_some(batch: &Batch<'_>, inode: InodeNr, from: u64) -> Plan<(ExtentSummary, Option<u64>)> {
    let (mut summary, mut at) = (ExtentSummary::default(), from);
    for _ in 0..EXTENTS_PER_VIEW {
        let Some(mapped) = next_extent(batch, inode, at)? else { return Ok((summary, None)) };
        summary.extents += 1;
        summary.shared += u64::from(is_shared(batch, inode, &mapped)?);
        summary.blocks += mapped.extent.blocks.get();
        at = mapped.end();
    }
    Ok((summary, Some(at)))
}

fn plan_punch(batch: &mut Batch<'_>, inode: &Inode, range: Range<u64>) -> Plan<(u64, u64, u64)> {
    let nr = inode.nr;
    let mut record = load_regular(batch, nr)?;
    let mut up_to = range.end;
    if !range.is_empty() {
        let dropped = drop_range(batch, nr, range.clone(), &mut DROP_ITEMS.clone())?;
        record.blocks = record.blocks.saturating_sub(dropped.blocks);
        up_to = dropped.up_to;
    }
    let data = inode.data.borrow();
    // Dirty pages of the range go, and with them whoever would have stored the size that they gave the file.
    record.size = data.size_on_device(record.size, range.end.max(record.size));
    data.unsynced.fold_into(&mut record);
    record.modified = batch.now();
    record.changed = batch.now();
    store(batch, nr, &record);
    Ok((up_to, record.size, data.unsynced.version))
}

/// The first part of `range`, whole blocks, that no extent covers, or an empty one at its end.
fn first_hole(batch: &Batch<'_>, inode: InodeNr, range: &Range<u64>) -> Plan<Range<u64>> {
    let mut from = range.start;
    while from < range.end {
        match next_extent(batch, inode, from)? {
            Some(mapped) if mapped.offset <= from => from = mapped.end(),
            Some(mapped) => return Ok(from..mapped.offset.min(range.end)),
            None => return Ok(from..range.end),
        }
    }
    Ok(range.end..range.end)
}

/// Whether every block of `range`, whole blocks, is preallocated.
pub(super) fn is_preallocated(batch: &Batch<'_>, inode: InodeNr, range: &Range<u64>) -> Plan<bool> {
    let mut from = range.start;
    while from < range.end {
        match next_extent(batch, inode, from)? {
            Some(mapped) if mapped.offset <= from && mapped.extent.kind == ExtentKind::Preallocated => {
                from = mapped.end();
            }
            _ => return Ok(false),
        }
    }
    Ok(true)
}

/// What a look at some extents has found.
enum Found {
    /// Data, beginning at or after where the search began.
    Data(Range<u64>),
    /// No data up to the end.
    Nothing,
    /// No data before this offset.
    GoOn(u64),
}

fn next_on_device(batch: &Batch<'_>, inode: InodeNr, offset: u64) -> Plan<Found> {
    let mut from = offset;
    for _ in 0..EXTENTS_PER_VIEW {
        match next_extent(batch, inode, from)? {
            None => return Ok(Found::Nothing),
            Some(mapped) if mapped.extent.kind == ExtentKind::Data => {
                return Ok(Found::Data(mapped.offset.max(offset)..mapped.end()));
            }
            Some(mapped) => from = mapped.end(),
        }
    }
    Ok(Found::GoOn(from))
}

/// The first data in memory that is not on the device, at or after `offset`: dirty, being written, or pending.
pub(super) fn next_in_memory(inode: &Inode, offset: u64) -> Range<u64> {
    let data = inode.data.borrow();
    let page = offset / BLOCK_SIZE;
    let dirty = data.next_dirty(page).map(|run| bytes_of(&run));
    let ordered = data.ordered.iter().map(|extent| bytes_of(extent.pages()));
    let pending = data.pending().map(|pending| bytes_of(&pages_of(&pending.range())));
    let pieces = dirty.into_iter().chain(ordered).chain(pending).filter(|piece| piece.end > offset);
    let first = pieces.min_by_key(|piece| piece.start).unwrap_or(u64::MAX..u64::MAX);
    first.start.max(offset)..first.end
}
