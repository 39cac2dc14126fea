//! Sizes: truncation, extension, and the end of a file's contents.
//!
//! Owns: [`Shard::set_size`], [`Shard::drop_all_extents`], and the finishing of truncations after a crash.
//!
//! A truncation that cuts a block in two writes the block anew, with zeroes behind the new end, and inserts it in the
//! same transaction that sets the size: copy on write makes the tail, the size and the first of the dropped extents
//! one step. What one transaction cannot drop follows in further ones, under an intent and with all locks held.
//!
//! # Legal crash outcomes
//! The old size with the old contents, or the new size with the new contents; nothing behind the new size is ever
//! seen again. A crash between the transactions of a long truncation leaves the new size and the intent, and the next
//! mount drops the rest before it serves the file.

use std::rc::Rc;

use reactor::DmaBuffer;
use reactor::block::Durability;

use crate::MAX_FILE_SIZE;
use crate::alloc::{Priority, Reservation};
use crate::batch::{Batch, Plan};
use crate::error::FsError;
use crate::format::items::{Intent, intent_key};
use crate::locks::{LockOrder, RangeGuard};
use crate::namespace::inode::{find, put_intent, store};
use crate::planted::{Bug, is_planted};
use crate::shard::transact::Credit;
use crate::shard::{Inode, Shard};
use crate::types::{BLOCK_SIZE, BlockCount, BlockNr, Generation, InodeNr};

use super::apply::{MmapLock, load_regular};
use super::extent_map::{INSERT_ITEMS, ItemBudget, NewExtent, data_segments, drop_range, insert_extent};
use super::file::pages_of;
use super::page::{PAGE_SIZE, zeroed_page};

/// Items that one transaction of a truncation drops.
const DROP_ITEMS: ItemBudget = ItemBudget::new(2 * ItemBudget::ONE_STEP.get());

/// Items of a transaction of a truncation: the dropped ones, the tail (its old extent too), the inode, the intent.
/// So few that the smallest reserve of a shard has room for their nodes.
const TRUNCATION_ITEMS: u32 = DROP_ITEMS.get() + ItemBudget::ONE_STEP.get() + INSERT_ITEMS + 2;

/// The last block of a truncated file, as it was written anew.
struct Tail {
    start: BlockNr,
    generation: Generation,
    checksum: u32,
}

impl Shard {
    /// Sets the size of a file: cuts it, or extends it with zeroes.
    ///
    /// # Errors
    /// [`FsError::FileTooLarge`], what the inode is, failures of the device. The size is then what it was.
    pub(crate) async fn set_size(self: &Rc<Self>, nr: InodeNr, size: u64) -> Result<(), FsError> {
        if size > MAX_FILE_SIZE {
            return Err(FsError::FileTooLarge);
        }
        let inode = self.inode(nr);
        let outcome = self.set_size_of(&inode, size).await;
        drop(inode);
        self.release_inode(nr);
        outcome
    }

    async fn set_size_of(self: &Rc<Self>, inode: &Rc<Inode>, size: u64) -> Result<(), FsError> {
        // Memory and space before locks.
        let buffer = self.dma_buffer(1).await?;
        let space = self.reserve(1, 0, Priority::Reserve).await.ok();
        let mut order = LockOrder::new();
        let _inode_lock = inode.lock.exclusive(&mut order).await;
        let _mmap_lock = inode.mmap_lock.exclusive(&mut order).await;
        self.apply_pending(inode, &order, MmapLock::Held).await?;
        let stored = self.view(|batch| load_regular(batch, inode.nr)).await?.size;
        let visible = inode.data.borrow().size(stored);
        if size >= visible {
            return self.extend(inode, size).await;
        }
        let _range = self.lock_without_ordered(inode, size - size % BLOCK_SIZE, &order).await;
        self.truncate(inode, size, buffer, space).await?;
        if size == 0 {
            inode.data.borrow_mut().truncated_to_zero = true;
        }
        Ok(())
    }

    /// Locks everything from `start` on, at a moment at which no ordered extent is there. The caller holds the inode
    /// lock, so nothing but mapped writes makes pages dirty there, or the mmap lock too, then nothing does.
    pub(super) async fn lock_without_ordered(
        &self,
        inode: &Rc<Inode>,
        start: u64,
        order: &LockOrder,
    ) -> RangeGuard {
        let range = start..u64::MAX;
        let pages = pages_of(&range);
        let ended = Rc::clone(&inode.data.borrow().ordered_ended);
        loop {
            while inode.data.borrow().has_ordered(&pages) && !is_planted(Bug::TruncationDuringWriteBack) {
                ended.wait().await;
            }
            let guard = inode.ranges.exclusive(range.clone(), &mut order.clone()).await;
            if !inode.data.borrow().has_ordered(&pages) || is_planted(Bug::TruncationDuringWriteBack) {
                return guard;
            }
        }
    }

    async fn extend(&self, inode: &Rc<Inode>, size: u64) -> Result<(), FsError> {
        let plan = |batch: &mut Batch<'_>| {
            let mut record = load_regular(batch, inode.nr)?;
            record.size = size;
            inode.data.borrow().unsynced.fold_into(&mut record);
            store(batch, inode.nr, &record);
            Ok(inode.data.borrow().unsynced.version)
        };
        let version = self.transact(Credit::reserve(1), plan).await?;
        let mut data = inode.data.borrow_mut();
        data.synced(version);
        data.size_stored(size);
        Ok(())
    }

    async fn truncate(
        &self,
        inode: &Rc<Inode>,
        size: u64,
        buffer: DmaBuffer,
        space: Option<Reservation>,
    ) -> Result<(), FsError> {
        let tail_start = size - size % BLOCK_SIZE;
        let tail =
            if size == tail_start { None } else { self.write_tail(inode, size, buffer, space).await? };
        let plan = |batch: &mut Batch<'_>| plan_truncation(batch, inode, size, tail.as_ref());
        let truncated = self.transact(Credit::reserve(TRUNCATION_ITEMS), plan).await;
        let (mut from, version) = match truncated {
            Ok(truncated) => truncated,
            Err(error) => {
                if let Some(tail) = &tail {
                    self.give_back_blocks(tail.start, 1);
                }
                return Err(error);
            }
        };
        {
            let mut data = self.data_of(inode);
            data.drop_pages(size.div_ceil(BLOCK_SIZE)..u64::MAX);
            if size > tail_start
                && !is_planted(Bug::TruncationKeepsTail)
                && let Some(page) = data.page(size / BLOCK_SIZE)
            {
                page.zero(&((size % BLOCK_SIZE) as usize..PAGE_SIZE));
            }
            data.synced(version);
            data.size_set();
        }
        while from < MAX_FILE_SIZE {
            let dropped = self.transact(Credit::reserve(TRUNCATION_ITEMS), |batch| {
                plan_further_drop(batch, inode.nr, Intent::Truncate(size), from)
            });
            from = dropped.await.inspect_err(|error| {
                // What lies behind the end now would be seen again if the file grew.
                self.volume.fail(&format!("truncation of inode {} stopped half-way: {error}", inode.nr));
            })?;
        }
        Ok(())
    }

    /// Writes the block that `size` cuts in two to a new place, zeroes behind the cut; `None` if it is a hole.
    async fn write_tail(
        &self,
        inode: &Rc<Inode>,
        size: u64,
        mut buffer: DmaBuffer,
        space: Option<Reservation>,
    ) -> Result<Option<Tail>, FsError> {
        let (index, cut) = (size / BLOCK_SIZE, (size % BLOCK_SIZE) as usize);
        let start = index * BLOCK_SIZE;
        let segments = self.view(|batch| data_segments(batch, inode.nr, start..start + BLOCK_SIZE)).await?;
        if segments.is_empty() {
            return Ok(None);
        }
        self.load_page(inode, index).await?;
        let mut bytes = zeroed_page();
        {
            let mut data = inode.data.borrow_mut();
            let page = data.page(index).ok_or_else(|| FsError::Io("a page was lost".to_owned()))?;
            let kept = if is_planted(Bug::TruncationKeepsTail) { PAGE_SIZE } else { cut };
            bytes[..kept].copy_from_slice(&page.bytes()[..kept]);
        }
        buffer.write_at(0, &bytes[..]);
        let mut space = space.ok_or(FsError::NoSpace)?;
        let (start, _one) = self.alloc.borrow_mut().allocate_data(BlockCount::new(1), &mut space);
        let generation = Generation::new(self.epochs.current().get());
        let (written, _buffer) = self.ctx.disk().write(self.lba_of(start), buffer, Durability::Cached).await;
        self.volume.note_data_written();
        if let Err(error) = written {
            self.give_back_blocks(start, 1);
            return Err(error.into());
        }
        Ok(Some(Tail { start, generation, checksum: crc32c::crc32c(&bytes[..]) }))
    }

    /// Drops everything that an inode without names and users has on the device, in bounded transactions that draw
    /// on the reserve.
    ///
    /// # Errors
    /// What stood against it; a part may be dropped.
    pub(crate) async fn drop_all_extents(self: &Rc<Self>, nr: InodeNr) -> Result<(), FsError> {
        let inode = self.inode(nr);
        let order = LockOrder::new();
        {
            let mut data = self.data_of(&inode);
            data.discard_pending();
        }
        let _range = self.lock_without_ordered(&inode, 0, &order).await;
        self.data_of(&inode).drop_pages(0..u64::MAX);
        let mut from = 0;
        while from < MAX_FILE_SIZE {
            from =
                self.transact(Credit::reserve(TRUNCATION_ITEMS), |batch| plan_drop(batch, nr, from)).await?;
        }
        Ok(())
    }

    /// Forgets whatever is in memory of a deleted inode's contents.
    pub(crate) fn forget_inode(&self, nr: InodeNr) {
        let Some(inode) = self.inode_in_use(nr) else { return };
        let mut data = self.data_of(&inode);
        data.discard_pending();
        data.drop_pages(0..u64::MAX);
        data.size_set();
        let version = data.unsynced.version;
        data.synced(version);
        // Nobody is left to tell.
        let _reported = data.report_error();
    }

    /// Finishes a truncation that a crash interrupted.
    ///
    /// # Errors
    /// What stood against it.
    pub(crate) async fn finish_truncation(self: &Rc<Self>, nr: InodeNr, size: u64) -> Result<(), FsError> {
        let inode = self.inode(nr);
        let mut order = LockOrder::new();
        let _inode_lock = inode.lock.exclusive(&mut order).await;
        let _mmap_lock = inode.mmap_lock.exclusive(&mut order).await;
        let _range = self.lock_without_ordered(&inode, size - size % BLOCK_SIZE, &order).await;
        let mut from = size.next_multiple_of(BLOCK_SIZE);
        while from < MAX_FILE_SIZE {
            let dropped = self.transact(Credit::reserve(TRUNCATION_ITEMS), |batch| {
                plan_further_drop(batch, nr, Intent::Truncate(size), from)
            });
            from = dropped.await?;
        }
        Ok(())
    }
}

/// The first transaction of a truncation. Returns how far it has dropped, and the version of the unsynced effects.
fn plan_truncation(batch: &mut Batch<'_>, inode: &Inode, size: u64, tail: Option<&Tail>) -> Plan<(u64, u64)> {
    let nr = inode.nr;
    let mut record = load_regular(batch, nr)?;
    let tail_start = size - size % BLOCK_SIZE;
    if let Some(tail) = tail {
        let block = tail_start..tail_start + BLOCK_SIZE;
        let dropped = drop_range(batch, nr, block, &mut ItemBudget::ONE_STEP.clone())?;
        let new = NewExtent {
            start: tail.start,
            blocks: BlockCount::new(1),
            generation: tail.generation,
            checksums: &[tail.checksum],
        };
        insert_extent(batch, nr, tail_start, new);
        record.blocks = (record.blocks + 1).saturating_sub(dropped.blocks);
    }
    let dropped =
        drop_range(batch, nr, size.next_multiple_of(BLOCK_SIZE)..MAX_FILE_SIZE, &mut DROP_ITEMS.clone())?;
    record.blocks = record.blocks.saturating_sub(dropped.blocks);
    let version = {
        let data = inode.data.borrow();
        data.unsynced.fold_into(&mut record);
        data.unsynced.version
    };
    record.size = size;
    record.modified = batch.now();
    record.changed = batch.now();
    if dropped.up_to < MAX_FILE_SIZE {
        put_intent(batch, nr, Intent::Truncate(size));
    }
    store(batch, nr, &record);
    Ok((dropped.up_to, version))
}

/// A further transaction of a truncation; the last one removes the intent. Returns how far it has dropped.
fn plan_further_drop(batch: &mut Batch<'_>, inode: InodeNr, intent: Intent, from: u64) -> Plan<u64> {
    let up_to = plan_drop(batch, inode, from)?;
    if up_to == MAX_FILE_SIZE {
        batch.delete(intent_key(inode, intent));
    }
    Ok(up_to)
}

/// Drops extents from `from` on, as many as one transaction may. Returns how far it has dropped.
fn plan_drop(batch: &mut Batch<'_>, inode: InodeNr, from: u64) -> Plan<u64> {
    let dropped = drop_range(batch, inode, from..MAX_FILE_SIZE, &mut DROP_ITEMS.clone())?;
    if dropped.blocks > 0
        && let Some(mut record) = find(batch, inode)?
    {
        record.blocks = record.blocks.saturating_sub(dropped.blocks);
        store(batch, inode, &record);
    }
    Ok(dropped.up_to)
}
