//! Ranges taken out of a file, and holes put into it: what lies behind them moves.
//!
//! Owns: [`Shard::collapse`] and [`Shard::insert_hole`] (`fallocate(2)` with FALLOC_FL_COLLAPSE_RANGE and FALLOC_FL_INSERT_RANGE), and
//! the finishing of both after a crash.
//!
//! Only references move, no data: an extent gets another place in the file, in the tree. The inode, mmap and range locks are held
//! exclusively, the range from its first byte to the end of all files. A collapse goes from the front to the back and drops what is in its
//! way, an insertion from the back to the front; each transaction moves a few extents and says in its intent how far it came. The last
//! one sets the size.
//!
//! # Legal crash outcomes
//! All or nothing: a mount that finds the intent goes on where it says, before it serves the file.

use std::ops::Range;
use std::rc::Rc;

use crate::MAX_FILE_SIZE;
use crate::batch::{Batch, Plan};
use crate::error::FsError;
use crate::format::items::{InodeRecord, Intent, Shift, intent_key};
use crate::locks::LockOrder;
use crate::namespace::inode::{find, put_intent, store};
use crate::shard::transact::Credit;
use crate::shard::{Inode, Shard};
use crate::types::{BLOCK_SIZE, InodeNr};

use super::apply::{MmapLock, load_regular};
use super::extent_map::{ItemBudget, SET_ASIDE_ITEMS, drop_range, extent_before, move_extent, next_extent};

/// Items that one step changes at most: something dropped, something moved.
const STEP_ITEMS: u32 = ItemBudget::ONE_STEP.get() + SET_ASIDE_ITEMS;

/// Items of one transaction, the inode and the intent not counted.
const SHIFT_ITEMS: u32 = 2 * STEP_ITEMS;

/// The inode and the intent.
const HEAD_ITEMS: u32 = 2;

/// What a transaction has come to.
enum Shifted {
    /// There is more to move.
    On(Intent),
    /// Everything has moved, and the size is set.
    Ended,
}

impl Shard {
    /// Takes `range` out of a file.
    ///
    /// # Errors
    /// [`FsError::Invalid`] for a range that is not of whole blocks or reaches to the end of the file; what the inode is; failures of
    /// the device.
    pub(super) async fn collapse(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        range: &Range<u64>,
    ) -> Result<(), FsError> {
        let shift = Shift { first: range.start, length: range.end - range.start, reached: range.end };
        self.shift(inode, Intent::Collapse(shift), shift, |size, _| {
            if range.end >= size { Err(FsError::Invalid) } else { Ok(()) }
        })
        .await
    }

    /// Puts a hole of the length of `range` where it begins.
    ///
    /// # Errors
    /// [`FsError::Invalid`] for a range that is not of whole blocks or begins at the end of the file or behind it;
    /// [`FsError::FileTooLarge`]; what the inode is; failures of the device.
    pub(super) async fn insert_hole(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        range: &Range<u64>,
    ) -> Result<(), FsError> {
        let length = range.end - range.start;
        let shift = Shift { first: range.start, length, reached: MAX_FILE_SIZE };
        self.shift(inode, Intent::Insert(shift), shift, |size, allocated| {
            if range.start >= size {
                return Err(FsError::Invalid);
            }
            // Preallocated blocks may lie behind the end.
            let end = size.max(allocated).checked_add(length).filter(|end| *end <= MAX_FILE_SIZE);
            end.map(|_| ()).ok_or(FsError::FileTooLarge)
        })
        .await
    }

    /// `check` is given the size, and where the last extent ends.
    async fn shift(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        mut intent: Intent,
        shift: Shift,
        check: impl Fn(u64, u64) -> Result<(), FsError>,
    ) -> Result<(), FsError> {
        if !(shift.first | shift.length).is_multiple_of(BLOCK_SIZE) {
            return Err(FsError::Invalid);
        }
        let mut order = LockOrder::new();
        let _inode_lock = inode.lock.exclusive(&mut order).await;
        let _mmap_lock = inode.mmap_lock.exclusive(&mut order).await;
        self.apply_pending(inode, &order, MmapLock::Held).await?;
        let _range = self.lock_flushed(inode, &(shift.first..MAX_FILE_SIZE), &order).await?;
        let (size, allocated) = self
            .view(|batch| {
                let last = extent_before(batch, inode.nr, MAX_FILE_SIZE)?;
                Ok((load_regular(batch, inode.nr)?.size, last.map_or(0, |last| last.end())))
            })
            .await?;
        check(size, allocated)?;
        self.data_of(inode).drop_pages(shift.first / BLOCK_SIZE..u64::MAX);
        let mut begun = false;
        loop {
            let credit = Credit::reserve(SHIFT_ITEMS + HEAD_ITEMS);
            let planned = |batch: &mut Batch<'_>| {
                let mut record = load_regular(batch, inode.nr)?;
                let version = {
                    let data = inode.data.borrow();
                    data.unsynced.fold_into(&mut record);
                    data.unsynced.version
                };
                Ok((plan_shift(batch, inode.nr, record, intent)?, version))
            };
            let (shifted, version) = self.transact(credit, planned).await.inspect_err(|error| {
                if begun {
                    // Half of the contents are not where they belong.
                    self.volume.fail(&format!("inode {}: {intent:?} stopped half-way: {error}", inode.nr));
                }
            })?;
            inode.data.borrow_mut().synced(version);
            match shifted {
                Shifted::On(reached) => intent = reached,
                Shifted::Ended => {
                    inode.data.borrow_mut().size_set();
                    return Ok(());
                }
            }
            begun = true;
            self.ctx.yield_now().await;
        }
    }

    /// Finishes what a crash interrupted.
    ///
    /// # Errors
    /// What stood against it.
    pub(crate) async fn finish_shift(
        self: &Rc<Self>,
        nr: InodeNr,
        mut intent: Intent,
    ) -> Result<(), FsError> {
        let inode = self.inode(nr);
        let mut order = LockOrder::new();
        let _inode_lock = inode.lock.exclusive(&mut order).await;
        let _mmap_lock = inode.mmap_lock.exclusive(&mut order).await;
        let _range = inode.ranges.exclusive(0..u64::MAX, &mut order).await;
        loop {
            let planned = |batch: &mut Batch<'_>| {
                let Some(record) = find(batch, nr)? else { return Err(FsError::NotFound.into()) };
                plan_shift(batch, nr, record, intent)
            };
            match self.transact(Credit::reserve(SHIFT_ITEMS + HEAD_ITEMS), planned).await? {
                Shifted::On(reached) => intent = reached,
                Shifted::Ended => return Ok(()),
            }
        }
    }
}

/// A transaction of either.
fn plan_shift(
    batch: &mut Batch<'_>,
    inode: InodeNr,
    mut record: InodeRecord,
    intent: Intent,
) -> Plan<Shifted> {
    let size = record.size;
    let (reached, new_size) = match intent {
        Intent::Collapse(mut shift) => {
            let ended = plan_collapse(batch, inode, &mut record, &mut shift)?;
            (Intent::Collapse(shift), ended.then(|| size.saturating_sub(shift.length)))
        }
        Intent::Insert(mut shift) => {
            let ended = plan_insertion(batch, inode, &mut shift)?;
            (Intent::Insert(shift), ended.then(|| size.saturating_add(shift.length).min(MAX_FILE_SIZE)))
        }
        other => unreachable!("{other:?} moves nothing"),
    };
    let shifted = match new_size {
        Some(size) => {
            record.size = size;
            record.modified = batch.now();
            record.changed = batch.now();
            batch.delete(intent_key(inode, reached));
            Shifted::Ended
        }
        None => {
            put_intent(batch, inode, reached);
            Shifted::On(reached)
        }
    };
    store(batch, inode, &record);
    Ok(shifted)
}

/// Moves extents to the front, the first one first; `true` if that was all.
fn plan_collapse(
    batch: &mut Batch<'_>,
    inode: InodeNr,
    record: &mut InodeRecord,
    shift: &mut Shift,
) -> Plan<bool> {
    while batch.changed() + STEP_ITEMS <= SHIFT_ITEMS {
        let next = next_extent(batch, inode, shift.reached)?;
        // What lies in the way of the next extent, up to where the extent itself lies now.
        let new_end = next.map_or(u64::MAX, |next| next.end() - shift.length);
        let in_the_way = shift.reached - shift.length..shift.reached.min(new_end);
        let dropped = drop_range(batch, inode, in_the_way.clone(), &mut ItemBudget::ONE_STEP.clone())?;
        record.blocks = record.blocks.saturating_sub(dropped.blocks);
        if dropped.up_to < in_the_way.end {
            continue;
        }
        let Some(next) = next else { return Ok(true) };
        let piece = shift.reached..next.end();
        move_extent(batch, inode, inode, &piece, |offset| offset - shift.length)?;
        shift.reached = piece.end;
    }
    Ok(false)
}

/// Moves extents to the back, the last one first; `true` if that was all.
fn plan_insertion(batch: &mut Batch<'_>, inode: InodeNr, shift: &mut Shift) -> Plan<bool> {
    while batch.changed() + STEP_ITEMS <= SHIFT_ITEMS {
        let last = extent_before(batch, inode, shift.reached)?.filter(|last| last.end() > shift.first);
        let Some(last) = last else { return Ok(true) };
        let piece = last.offset.max(shift.first)..last.end();
        move_extent(batch, inode, inode, &piece, |offset| offset + shift.length)?;
        shift.reached = piece.start;
    }
    Ok(false)
}
