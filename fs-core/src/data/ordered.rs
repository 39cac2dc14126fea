//! Ordered extents: pieces of write-back in flight.
//!
//! Owns: [`NewData`] and what its insertion changes; [`OrderedExtent`], and the way from dirty pages to a file extent:
//!
//! | step | holds | what |
//! |---|---|---|
//! | prepare | a slot, a DMA buffer | both are awaited before any lock |
//! | create | range lock X | gaps of partial pages are filled; then in one synchronous step: blocks allocated, pages copied and checksummed, pages dirty → ordered |
//! | write | nothing | the device writes |
//! | insert | range lock X | transactions drop what the range had and insert extent, run, back-reference, size and times |
//! | end | range lock X, then nothing | pages ordered → clean (or dirty again), space and budget given back, waiters woken |
//!
//! A failure in any step after *create* makes the pages dirty again and is noted for `fsync`.
//!
//! Invariants:
//! - nobody waits for an ordered extent while holding a range lock: its insertion needs one;
//! - a page is in at most one ordered extent, so two versions of a page never race to the device;
//! - blocks of an extent that is not inserted yet are *uncommitted* for the allocator: no checkpoint stores them as
//!   used, so a crash does not leak them.
//!
//! # Legal crash outcomes
//! A block of a file is what it was before, or what an inserted extent holds. The data was completely written before
//! the transaction that inserts its extent begins, and the checkpoint flushes before it names that transaction.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;

use reactor::DmaBuffer;
use reactor::block::Durability;

use crate::alloc::{Priority, Reservation};
use crate::batch::{Batch, Plan};
use crate::error::FsError;
use crate::format::extent::ExtentKind;
use crate::format::items::InodeRecord;
use crate::locks::{LockOrder, RangeGuard};
use crate::namespace::inode::{find, store};
use crate::shard::{Inode, Shard};
use crate::types::{BLOCK_SIZE, BlockCount, BlockNr, Generation, InodeNr};

use super::extent_map::{
    FILL_ITEMS, INSERT_ITEMS, ItemBudget, NewExtent, drop_range, fill_preallocated, insert_extent,
    next_extent,
};
use super::file::{NextWriteBack, bytes_of};
use super::page::PAGE_SIZE;
use super::queue::Charge;
use super::{MAX_ORDERED, OrderedSlot, add, block_after};

/// Items of old extents that one transaction of an insertion drops.
const DROP_ITEMS: ItemBudget = ItemBudget::new(2 * ItemBudget::ONE_STEP.get());

/// Items that one transaction of an insertion changes: what is dropped, what is inserted, the inode.
pub(super) const INSERTION_ITEMS: u32 = max(DROP_ITEMS.get() + INSERT_ITEMS, FILL_ITEMS) + 1;

const fn max(left: u32, right: u32) -> u32 {
    if left > right { left } else { right }
}

/// Whose blocks new data is written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Blocks allocated for it, which nothing references yet.
    Fresh,
    /// Blocks that the file has preallocated there.
    Preallocated,
}

/// New data of a file with its place on the device.
#[derive(Debug)]
pub(super) struct NewData {
    /// Pages of the file.
    pub(super) pages: Range<u64>,
    pub(super) place: Place,
    pub(super) start: BlockNr,
    pub(super) generation: Generation,
    /// CRC32C of each page.
    pub(super) checksums: Vec<u32>,
}

impl NewData {
    pub(super) fn block_of(&self, page: u64) -> BlockNr {
        block_after(self.start, page - self.pages.start)
    }

    fn checksums_of(&self, pages: &Range<u64>) -> &[u32] {
        &self.checksums[(pages.start - self.pages.start) as usize..(pages.end - self.pages.start) as usize]
    }

    /// Puts the pages from `from` on in the place of what `inode` has there, as many as one transaction can. Returns
    /// where the rest begins, and changes the blocks of `record`.
    pub(super) fn insert(
        &self,
        batch: &mut Batch<'_>,
        inode: InodeNr,
        record: &mut InodeRecord,
        from: u64,
    ) -> Plan<u64> {
        let range = bytes_of(&(from..self.pages.end));
        if self.place == Place::Preallocated {
            let checksums = self.checksums_of(&(from..self.pages.end));
            fill_preallocated(batch, inode, range.start, self.block_of(from), checksums)?;
            return Ok(self.pages.end);
        }
        let dropped = drop_range(batch, inode, range.clone(), &mut DROP_ITEMS.clone())?;
        let up_to = dropped.up_to / BLOCK_SIZE;
        let new = NewExtent {
            start: self.block_of(from),
            blocks: BlockCount::new(up_to - from),
            generation: self.generation,
            checksums: self.checksums_of(&(from..up_to)),
        };
        insert_extent(batch, inode, range.start, new);
        record.blocks = (record.blocks + (up_to - from)).saturating_sub(dropped.blocks);
        Ok(up_to)
    }
}

/// A piece of write-back in flight.
#[derive(Debug)]
pub(crate) struct OrderedExtent {
    data: NewData,
    space: RefCell<Option<Reservation>>,
    charge: RefCell<Option<Charge>>,
    ended: Cell<bool>,
}

impl OrderedExtent {
    /// Whether it is inserted or has failed.
    pub(super) fn has_ended(&self) -> bool {
        self.ended.get()
    }

    /// Pages of the file.
    pub(super) fn pages(&self) -> &Range<u64> {
        &self.data.pages
    }
}

/// Where a run of pages may be put.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    /// Preallocated blocks at its beginning, if there are any.
    pub(super) preallocated: Option<(BlockNr, Generation)>,
    /// Pages, from the first, that can go there together.
    pub(super) pages: u64,
}

/// What one transaction of an insertion has done.
struct Inserted {
    /// Pages before this one are inserted.
    up_to: u64,
    size: u64,
    version: u64,
}

impl Shard {
    /// Makes an ordered extent of the first dirty pages of `run` and starts it. Returns the page to go on with.
    ///
    /// # Errors
    /// What stood against it; the pages are still dirty and the error is noted.
    pub(super) async fn write_run(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        run: Range<u64>,
    ) -> Result<u64, FsError> {
        let created = self.prepare_and_create(inode, run.clone()).await;
        match created {
            Ok(Some((extent, buffer, slot))) => {
                let next = extent.data.pages.end;
                let shard = Rc::clone(self);
                let (owner, task_extent) = (Rc::clone(inode), Rc::clone(&extent));
                let task = async move { shard.carry_out(owner, task_extent, buffer, slot).await };
                if let Err(error) = self.ctx.spawn(task) {
                    let error = FsError::Io(error.to_string());
                    self.end_failed(inode, &extent, extent.data.pages.start, error.clone());
                    return Err(error);
                }
                Ok(next)
            }
            Ok(None) => Ok(run.start),
            Err(error) => {
                inode.data.borrow_mut().note_error(error.clone());
                self.data.note_write_error();
                Err(error)
            }
        }
    }

    async fn prepare_and_create(
        &self,
        inode: &Rc<Inode>,
        run: Range<u64>,
    ) -> Result<Option<(Rc<OrderedExtent>, DmaBuffer, OrderedSlot)>, FsError> {
        self.volume.check_writable()?;
        let slot = self.data.ordered_slot(MAX_ORDERED).await;
        let pages = (run.end - run.start).min(self.transfer_blocks());
        let buffer = self.dma_buffer(pages).await?;
        let guard = inode.ranges.exclusive(bytes_of(&run), &mut LockOrder::new()).await;
        let next = inode.data.borrow().next_write_back(run.start, run.start + pages);
        let NextWriteBack::Run(run) = next else { return Ok(None) };
        let partial = inode.data.borrow().partial_pages(run.clone());
        self.fill_pages(inode, &partial).await?;
        let target = self.view(|batch| find_target(batch, inode.nr, &run)).await?;
        let run = run.start..run.end.min(run.start + target.pages);
        let (extent, buffer) = self.create(inode, run, target, buffer)?;
        drop(guard);
        Ok(Some((extent, buffer, slot)))
    }

    /// The synchronous part: blocks, copies, checksums, page states.
    fn create(
        &self,
        inode: &Rc<Inode>,
        run: Range<u64>,
        target: Target,
        mut buffer: DmaBuffer,
    ) -> Result<(Rc<OrderedExtent>, DmaBuffer), FsError> {
        let mut data = self.data_of(inode);
        let mut wanted = run.end - run.start;
        if target.preallocated.is_none() {
            wanted = wanted.min(self.top_up(&mut data, wanted));
            if wanted == 0 {
                return Err(FsError::NoSpace);
            }
        }
        let (place, start, generation, blocks) = match target.preallocated {
            Some((start, generation)) => (Place::Preallocated, start, generation, wanted),
            None => {
                let space = data.space_mut().expect("topped up just now");
                let (start, count) = self.alloc.borrow_mut().allocate_data(BlockCount::new(wanted), space);
                let generation = Generation::new(self.epochs.current().get());
                (Place::Fresh, start, generation, count.get())
            }
        };
        let pages = run.start..run.start + blocks;
        // There may be less contiguous space than there are pages.
        buffer.shorten(blocks as usize * PAGE_SIZE);
        let mut checksums = Vec::with_capacity(blocks as usize);
        for (at, (_, page)) in data.pages_in(pages.clone()).enumerate() {
            checksums.push(crc32c::crc32c(page.bytes()));
            buffer.write_at(at * PAGE_SIZE, page.bytes());
        }
        let unused = if place == Place::Fresh { 0 } else { blocks };
        let (space, charge) = data.order(pages.clone(), unused);
        let extent = Rc::new(OrderedExtent {
            data: NewData { pages, place, start, generation, checksums },
            space: RefCell::new(space),
            charge: RefCell::new(charge),
            ended: Cell::new(false),
        });
        data.ordered.push(Rc::clone(&extent));
        add(&self.data.ordered_pages, blocks);
        Ok((extent, buffer))
    }

    /// Sees that blocks are promised for `wanted` dirty pages; after failures they may not be. Returns for how many.
    fn top_up(&self, data: &mut super::DataGuard<'_>, wanted: u64) -> u64 {
        let missing = wanted.saturating_sub(data.promised_blocks());
        if missing > 0 {
            let more = self
                .counter
                .reserve(missing, 0, Priority::Normal)
                .or_else(|| self.counter.reserve(missing, 0, Priority::Reserve));
            if let Some(more) = more {
                data.keep_space(more);
            }
        }
        data.promised_blocks()
    }

    /// The asynchronous life of an ordered extent.
    async fn carry_out(
        self: Rc<Self>,
        inode: Rc<Inode>,
        extent: Rc<OrderedExtent>,
        buffer: DmaBuffer,
        slot: OrderedSlot,
    ) {
        let lba = self.lba_of(extent.data.start);
        let (written, buffer) = self.ctx.disk().write(lba, buffer, Durability::Cached).await;
        drop(buffer);
        self.volume.note_data_written();
        let inserted = match written {
            Ok(()) => self.insert(&inode, &extent).await,
            Err(error) => Err((extent.data.pages.start, FsError::from(error))),
        };
        match inserted {
            Ok(guard) => {
                self.end_clean(&inode, &extent, extent.data.pages.end);
                drop(guard);
            }
            Err((reached, error)) => self.end_failed(&inode, &extent, reached, error),
        }
        drop(slot);
        self.relieve_page_memory();
        let nr = inode.nr;
        drop(inode);
        self.release_inode(nr);
    }

    /// Inserts the extent, in as many transactions as its range needs; the range stays locked on success.
    async fn insert(&self, inode: &Rc<Inode>, extent: &OrderedExtent) -> Result<RangeGuard, (u64, FsError)> {
        let mut reached = extent.data.pages.start;
        let mut guard: Option<RangeGuard> = None;
        loop {
            let own = extent.space.borrow_mut().take();
            let (mut space, turn) = self.insertion_space(own).await.map_err(|error| (reached, error))?;
            let held = match guard.take() {
                Some(held) => held,
                None => inode.ranges.exclusive(bytes_of(&extent.data.pages), &mut LockOrder::new()).await,
            };
            let plan = |batch: &mut Batch<'_>| plan_insertion(batch, inode, extent, reached);
            let inserted = self.transact_with(&mut space, plan).await.map_err(|error| (reached, error))?;
            drop((space, turn));
            let mut data = inode.data.borrow_mut();
            data.size_stored(inserted.size);
            data.synced(inserted.version);
            drop(data);
            reached = inserted.up_to;
            if reached == extent.data.pages.end {
                return Ok(held);
            }
            guard = Some(held);
        }
    }

    /// Nodes for one transaction of an insertion. While space is plentiful insertions do not wait for each other;
    /// when it is not, they draw on the reserve one at a time.
    pub(super) async fn insertion_space(
        &self,
        own: Option<Reservation>,
    ) -> Result<(Reservation, Option<super::InsertionTurn>), FsError> {
        let needed = self.nodes_for(INSERTION_ITEMS);
        let missing = needed.saturating_sub(own.as_ref().map_or(0, Reservation::nodes));
        let (mut space, turn) = match self.counter.reserve(0, missing, Priority::Normal) {
            Some(space) => (space, None),
            None => {
                let turn = self.data.insertion_turn().await;
                (self.reserve(0, missing, Priority::Reserve).await?, Some(turn))
            }
        };
        if let Some(own) = own {
            space.merge(own);
        }
        Ok((space, turn))
    }

    /// Everything before page `end` is inserted: what was not changed meanwhile is clean.
    fn end_clean(&self, inode: &Rc<Inode>, extent: &Rc<OrderedExtent>, end: u64) {
        let mut data = self.data_of(inode);
        data.end_ordered_clean(extent.data.pages.start..end);
        self.data.queue_for_eviction(inode.nr, &mut data, extent.data.pages.start..end);
        self.data.count_written(end - extent.data.pages.start);
        self.end(&mut data, extent);
    }

    /// From page `reached` on nothing is inserted: the pages are dirty again.
    fn end_failed(&self, inode: &Rc<Inode>, extent: &Rc<OrderedExtent>, reached: u64, error: FsError) {
        let rest = reached..extent.data.pages.end;
        if extent.data.place == Place::Fresh && !rest.is_empty() {
            self.give_back_blocks(extent.data.block_of(reached), rest.end - rest.start);
        }
        let mut data = self.data_of(inode);
        data.end_ordered_clean(extent.data.pages.start..reached);
        if error == FsError::NotFound {
            // The inode was deleted, and its pages with it.
            data.end_ordered_clean(rest);
        } else {
            tracing::warn!(inode = %inode.nr, %error, "write-back failed; the data stays in memory");
            if let Some(charge) = extent.charge.borrow_mut().take() {
                data.end_ordered_failed(rest, charge);
            }
            data.note_error(error);
            self.data.note_write_error();
            self.data.list_dirty(inode.nr, &mut data);
        }
        self.end(&mut data, extent);
    }

    fn end(&self, data: &mut super::DataGuard<'_>, extent: &Rc<OrderedExtent>) {
        drop(extent.space.borrow_mut().take());
        drop(extent.charge.borrow_mut().take());
        extent.ended.set(true);
        let pages = extent.data.pages.end - extent.data.pages.start;
        self.data.ordered_pages.set(self.data.ordered_pages.get() - pages);
        data.ordered.retain(|other| !Rc::ptr_eq(other, extent));
        data.ordered_ended.notify();
        self.data.progress.notify();
    }

    /// Gives back blocks that were allocated and never became part of a file.
    pub(super) fn give_back_blocks(&self, start: BlockNr, blocks: u64) {
        self.alloc.borrow_mut().abandon_data(start, BlockCount::new(blocks));
    }
}

/// Looks whether the pages of `run` have preallocated blocks.
pub(super) fn find_target(batch: &Batch<'_>, inode: InodeNr, run: &Range<u64>) -> Plan<Target> {
    let mut page = run.start;
    while page < run.end {
        let Some(mapped) = next_extent(batch, inode, page * BLOCK_SIZE)? else { break };
        let first = mapped.offset / BLOCK_SIZE;
        if first >= run.end {
            break;
        }
        if mapped.extent.kind == ExtentKind::Preallocated {
            if first > run.start {
                return Ok(Target { preallocated: None, pages: first - run.start });
            }
            let skipped = run.start - first;
            let start = block_after(mapped.extent.start, skipped);
            let pages = mapped.extent.blocks.get() - skipped;
            return Ok(Target { preallocated: Some((start, mapped.extent.generation)), pages });
        }
        page = mapped.end() / BLOCK_SIZE;
    }
    Ok(Target { preallocated: None, pages: run.end - run.start })
}

fn plan_insertion(batch: &mut Batch<'_>, inode: &Inode, extent: &OrderedExtent, from: u64) -> Plan<Inserted> {
    let nr = inode.nr;
    let Some(mut record) = find(batch, nr)? else { return Err(FsError::NotFound.into()) };
    let up_to = extent.data.insert(batch, nr, &mut record, from)?;
    let data = inode.data.borrow();
    record.size = data.size_on_device(record.size, up_to * BLOCK_SIZE);
    data.unsynced.fold_into(&mut record);
    store(batch, nr, &record);
    Ok(Inserted { up_to, size: record.size, version: data.unsynced.version })
}
