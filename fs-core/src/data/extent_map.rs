//! The extent map: plans over a [`Batch`] that find, drop and insert extents with their runs and back-references.
//!
//! Owns: every change of the items of `format/extent.rs`. Invariants: those of that module, before and after each
//! function here, so that a plan may stop between any two of them.
//!
//! Cost: a function that may meet any number of items takes an [`ItemBudget`] and says how far it came; its caller
//! continues in another transaction. So a transaction is bounded whatever the file looks like.
//!
//! Excludes: inode records (callers add and subtract `blocks`), locks (callers hold the byte range exclusively for a
//! change, at least shared for a look), the device.

use std::ops::Range;

use crate::batch::{Batch, Plan};
use crate::error::FsError;
use crate::format::extent::{
    Backref, EXTENT, Extent, ExtentKind, MAX_RUN_BLOCKS, Return, Run, RunHead, backref_key,
    check_extent_offset, extent_key, return_key, run_key,
};
use crate::request::Sharing;
use crate::tree::Key;
use crate::types::{BLOCK_SIZE, BlockCount, BlockNr, Generation, InodeNr};

/// Items that dropping a piece of an extent changes, beside its runs: the remains to its left and right, each an
/// extent and a back-reference.
const ITEMS_PER_EXTENT: u32 = 4;

/// Items that dropping a piece of a run changes: what lies left of it, itself, what lies right.
const ITEMS_PER_RUN: u32 = 3;

/// Items that [`insert_extent`] puts.
pub(crate) const INSERT_ITEMS: u32 = 3;

/// Items that [`fill_preallocated`] may put.
pub(crate) const FILL_ITEMS: u32 = ITEMS_PER_EXTENT + 2 + ITEMS_PER_RUN;

/// An extent with its place in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapped {
    /// File offset of its first byte.
    pub(crate) offset: u64,
    /// Where it lies.
    pub(crate) extent: Extent,
}

impl Mapped {
    /// File offset behind its last byte.
    pub(crate) fn end(&self) -> u64 {
        self.offset + self.extent.blocks.get() * BLOCK_SIZE
    }
}

/// A piece of a file that has data on the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DataSegment {
    /// File offset of its first byte.
    pub(crate) offset: u64,
    /// First block.
    pub(crate) start: BlockNr,
    /// CRC32C of each block; there are as many blocks as checksums.
    pub(crate) checksums: Vec<u32>,
}

impl DataSegment {
    /// File offset behind its last byte.
    pub(crate) fn end(&self) -> u64 {
        self.offset + self.checksums.len() as u64 * BLOCK_SIZE
    }
}

/// How many items a plan may still change.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ItemBudget(u32);

impl ItemBudget {
    /// A budget of `items` changed items. One piece of an extent is always dropped, whatever the budget.
    pub(crate) const fn new(items: u32) -> Self {
        Self(items)
    }

    /// The fewest items that suffice for one step of [`drop_range`].
    pub(crate) const ONE_STEP: Self = Self(ITEMS_PER_EXTENT + ITEMS_PER_RUN);

    /// The plain number.
    pub(crate) const fn get(self) -> u32 {
        self.0
    }

    fn spend(&mut self, items: u32) {
        self.0 = self.0.saturating_sub(items);
    }
}

/// What [`drop_range`] has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dropped {
    /// Blocks that the file's extents cover less than before.
    pub(crate) blocks: u64,
    /// Nothing is left of the range before this offset; the range's end if the work is done.
    pub(crate) up_to: u64,
}

/// What [`insert_extent`] inserts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewExtent<'a> {
    /// First block.
    pub(crate) start: BlockNr,
    /// Blocks, 1 to [`MAX_RUN_BLOCKS`].
    pub(crate) blocks: BlockCount,
    /// The epoch in which the blocks were allocated.
    pub(crate) generation: Generation,
    /// CRC32C of each block; empty for a preallocation.
    pub(crate) checksums: &'a [u32],
}

/// The first extent of `inode` that ends behind `offset`, whether it begins before it or not.
pub(crate) fn next_extent(batch: &Batch<'_>, inode: InodeNr, offset: u64) -> Plan<Option<Mapped>> {
    let key = extent_key(inode, offset);
    if let Some(before) = of_inode(inode, batch.prev(&key)?)?
        && before.end() > offset
    {
        return Ok(Some(before));
    }
    of_inode(inode, batch.next(&key)?)
}

/// The last extent of `inode` that begins before `offset`.
pub(crate) fn extent_before(batch: &Batch<'_>, inode: InodeNr, offset: u64) -> Plan<Option<Mapped>> {
    let Some(last) = offset.checked_sub(1) else { return Ok(None) };
    of_inode(inode, batch.prev(&extent_key(inode, last))?)
}

/// The pieces of `range` that have data, in order, with their checksums. What is in none is a hole or preallocated.
pub(crate) fn data_segments(batch: &Batch<'_>, inode: InodeNr, range: Range<u64>) -> Plan<Vec<DataSegment>> {
    let mut segments: Vec<DataSegment> = Vec::new();
    let mut offset = range.start;
    while offset < range.end {
        let Some(mapped) = next_extent(batch, inode, offset)? else { break };
        if mapped.offset >= range.end {
            break;
        }
        if mapped.extent.kind == ExtentKind::Data {
            let from = mapped.offset.max(offset);
            let to = mapped.end().min(range.end);
            append_segment(batch, inode, &mapped, from..to, &mut segments)?;
        }
        offset = mapped.end();
    }
    Ok(segments)
}

/// Whether another extent, here or in another shard, covers a block of `mapped` too.
pub(crate) fn is_shared(batch: &Batch<'_>, inode: InodeNr, mapped: &Mapped) -> Plan<bool> {
    Ok(sharing(batch, inode, mapped)?.shared)
}

/// With whom `mapped` shares its blocks.
pub(crate) fn sharing(batch: &Batch<'_>, inode: InodeNr, mapped: &Mapped) -> Plan<Sharing> {
    let mut sharing = Sharing::default();
    let mut runs = Runs::of(batch, inode, mapped);
    while runs.position < mapped.extent.blocks.get() {
        let run = runs.next()?.2;
        sharing.lent |= run.lender.is_some();
        sharing.shared |= run.lender.is_some() || run.references > 1;
    }
    Ok(sharing)
}

/// Adds the piece `range` of `mapped` to `segments`, to the last one if it goes on there on the device too.
fn append_segment(
    batch: &Batch<'_>,
    inode: InodeNr,
    mapped: &Mapped,
    range: Range<u64>,
    segments: &mut Vec<DataSegment>,
) -> Plan<()> {
    let first = (range.start - mapped.offset) / BLOCK_SIZE;
    let last = (range.end - mapped.offset).div_ceil(BLOCK_SIZE);
    let mut runs = Runs::of(batch, inode, mapped);
    while runs.position < last {
        let (at, _, run) = runs.next()?;
        let from = first.max(at);
        let to = last.min(at + run.blocks.get());
        if from >= to {
            continue;
        }
        let checksums = &run.checksums[(from - at) as usize..(to - at) as usize];
        let offset = mapped.offset + from * BLOCK_SIZE;
        let start = block_at(mapped.extent.start, from);
        match segments.last_mut() {
            Some(last)
                if last.end() == offset && block_at(last.start, last.checksums.len() as u64) == start =>
            {
                last.checksums.extend_from_slice(checksums);
            }
            _ => segments.push(DataSegment { offset, start, checksums: checksums.to_vec() }),
        }
    }
    Ok(())
}

/// Drops what extents of `inode` cover of `range` (whole blocks): holes remain. References are taken back, and
/// blocks without any are freed.
pub(crate) fn drop_range(
    batch: &mut Batch<'_>,
    inode: InodeNr,
    range: Range<u64>,
    budget: &mut ItemBudget,
) -> Plan<Dropped> {
    let mut dropped = Dropped { blocks: 0, up_to: range.start };
    while dropped.up_to < range.end {
        let mapped = next_extent(batch, inode, dropped.up_to)?.filter(|mapped| mapped.offset < range.end);
        let Some(mapped) = mapped else {
            dropped.up_to = range.end;
            break;
        };
        if dropped.blocks > 0 && budget.0 < ItemBudget::ONE_STEP.0 {
            dropped.up_to = dropped.up_to.max(mapped.offset);
            break;
        }
        let from = dropped.up_to.max(mapped.offset);
        let reached = drop_piece(batch, inode, &mapped, from..mapped.end().min(range.end), budget)?;
        dropped.blocks += (reached - from) / BLOCK_SIZE;
        dropped.up_to = reached;
    }
    Ok(dropped)
}

/// Drops `range` of one extent as far as the budget goes, at least the first of its runs, and returns how far.
fn drop_piece(
    batch: &mut Batch<'_>,
    inode: InodeNr,
    mapped: &Mapped,
    range: Range<u64>,
    budget: &mut ItemBudget,
) -> Plan<u64> {
    budget.spend(ITEMS_PER_EXTENT);
    let first = (range.start - mapped.offset) / BLOCK_SIZE;
    let last = (range.end - mapped.offset) / BLOCK_SIZE;
    let mut reached = first;
    let mut position = 0;
    while position < last {
        if reached > first && budget.0 < ITEMS_PER_RUN {
            break;
        }
        let (at, start, run) = Runs { batch, inode, mapped, position }.next()?;
        position = at + run.blocks.get();
        let (from, to) = (first.max(at), last.min(position));
        if from < to {
            budget.spend(ITEMS_PER_RUN);
            drop_reference(batch, start, &run, from - at..to - at);
            reached = to;
        }
    }
    remap_around(batch, inode, mapped, first..reached);
    Ok(mapped.offset + reached * BLOCK_SIZE)
}

/// Takes one reference from the blocks `range` of a run, which is split for it. Blocks without any are freed, or go back
/// to their lender.
fn drop_reference(batch: &mut Batch<'_>, start: BlockNr, run: &Run, range: Range<u64>) {
    batch.delete(run_key(start));
    put_run_around(batch, start, run, &range);
    let first = block_at(start, range.start);
    let mut part = run.part(range.start, range.end);
    part.references -= 1;
    match part.lender {
        _ if part.references > 0 => batch.put(run_key(first), part.encode()),
        None => batch.free_blocks(first, part.blocks),
        Some(lender) => {
            let back = Return { blocks: part.blocks, generation: part.generation };
            batch.put(return_key(lender, first), back.encode());
            batch.note_return();
        }
    }
}

/// Puts what lies left and right of the blocks `range` of a run as runs of their own.
fn put_run_around(batch: &mut Batch<'_>, start: BlockNr, run: &Run, range: &Range<u64>) {
    if range.start > 0 {
        batch.put(run_key(start), run.part(0, range.start).encode());
    }
    if range.end < run.blocks.get() {
        let right = run.part(range.end, run.blocks.get());
        batch.put(run_key(block_at(start, range.end)), right.encode());
    }
}

/// Removes the blocks `range` of an extent and its back-reference; what lies left and right of it remains.
fn remap_around(batch: &mut Batch<'_>, inode: InodeNr, mapped: &Mapped, range: Range<u64>) {
    batch.delete(extent_key(inode, mapped.offset));
    batch.delete(backref_key(mapped.extent.start, inode, mapped.offset));
    let mut keep = |from: u64, to: u64| {
        if from < to {
            let extent = Extent {
                start: block_at(mapped.extent.start, from),
                blocks: BlockCount::new(to - from),
                ..mapped.extent
            };
            put_reference(batch, inode, mapped.offset + from * BLOCK_SIZE, &extent);
        }
    };
    keep(0, range.start);
    keep(range.end, mapped.extent.blocks.get());
}

fn put_reference(batch: &mut Batch<'_>, inode: InodeNr, offset: u64, extent: &Extent) {
    batch.put(extent_key(inode, offset), extent.encode());
    batch.put(backref_key(extent.start, inode, offset), Backref { blocks: extent.blocks }.encode());
}

/// Inserts an extent of `inode` with its run and back-reference where nothing is mapped. Its blocks come from the
/// allocator and belong to nobody yet.
pub(crate) fn insert_extent(batch: &mut Batch<'_>, inode: InodeNr, offset: u64, new: NewExtent<'_>) {
    let blocks = new.blocks.get();
    assert!((1..=MAX_RUN_BLOCKS).contains(&blocks), "an extent has 1 to 256 blocks");
    assert!(new.checksums.is_empty() || new.checksums.len() as u64 == blocks, "one checksum per block");
    let kind = if new.checksums.is_empty() { ExtentKind::Preallocated } else { ExtentKind::Data };
    let run = Run {
        blocks: new.blocks,
        lender: None,
        references: 1,
        generation: new.generation,
        checksums: new.checksums.to_vec(),
    };
    batch.commit_blocks(new.start, new.blocks);
    batch.put(run_key(new.start), run.encode());
    let extent = Extent { kind, start: new.start, blocks: new.blocks, generation: new.generation };
    put_reference(batch, inode, offset, &extent);
}

/// Turns preallocated blocks, from `offset` of the file on, into data with these checksums. They must lie in one
/// preallocated extent, at `start` on the device.
pub(crate) fn fill_preallocated(
    batch: &mut Batch<'_>,
    inode: InodeNr,
    offset: u64,
    start: BlockNr,
    checksums: &[u32],
) -> Plan<()> {
    let mapped = next_extent(batch, inode, offset)?.filter(|mapped| mapped.offset <= offset);
    let mapped = mapped.ok_or_else(|| damaged("preallocated extent is gone", start, inode))?;
    let first = (offset - mapped.offset) / BLOCK_SIZE;
    let last = first + checksums.len() as u64;
    let fits = mapped.extent.kind == ExtentKind::Preallocated
        && block_at(mapped.extent.start, first) == start
        && last <= mapped.extent.blocks.get();
    if !fits {
        return Err(damaged("preallocated extent lies elsewhere", start, inode).into());
    }
    let mut position = 0;
    while position < last {
        let (at, run_start, run) = Runs { batch, inode, mapped: &mapped, position }.next()?;
        position = at + run.blocks.get();
        let (from, to) = (first.max(at), last.min(position));
        if from >= to {
            continue;
        }
        put_run_around(batch, run_start, &run, &(from - at..to - at));
        let mut filled = run.part(from - at, to - at);
        filled.checksums = checksums[(from - first) as usize..(to - first) as usize].to_vec();
        batch.put(run_key(block_at(run_start, from - at)), filled.encode());
    }
    remap_around(batch, inode, &mapped, first..last);
    let extent =
        Extent { kind: ExtentKind::Data, start, blocks: BlockCount::new(last - first), ..mapped.extent };
    put_reference(batch, inode, offset, &extent);
    Ok(())
}

/// The runs of an extent, one after the other.
struct Runs<'a, 'tree> {
    batch: &'a Batch<'tree>,
    inode: InodeNr,
    mapped: &'a Mapped,
    /// Blocks of the extent before the next run.
    position: u64,
}

impl<'a, 'tree> Runs<'a, 'tree> {
    fn of(batch: &'a Batch<'tree>, inode: InodeNr, mapped: &'a Mapped) -> Self {
        Self { batch, inode, mapped, position: 0 }
    }

    /// The next run: its position in the extent, its first block, itself. Only called while blocks are left.
    fn next(&mut self) -> Plan<(u64, BlockNr, Run)> {
        let at = self.position;
        let extent = &self.mapped.extent;
        let start = block_at(extent.start, at);
        let Some(value) = self.batch.get(&run_key(start))? else {
            return Err(damaged("extent without a run", start, self.inode).into());
        };
        let run = Run::decode(&value).map_err(|error| error.of("run", Some(start), Some(self.inode)))?;
        check_run(&run.head(), start, extent, at, self.inode)?;
        self.position = at + run.blocks.get();
        Ok((at, start, run))
    }
}

/// Checks that a run, at `start`, is what an extent of `inode` has from its block `at` on.
fn check_run(run: &RunHead, start: BlockNr, extent: &Extent, at: u64, inode: InodeNr) -> Result<(), FsError> {
    let wrong = if run.generation != extent.generation {
        "extent and run are of different generations"
    } else if run.kind != extent.kind {
        "extent and run are of different kinds"
    } else if at + run.blocks.get() > extent.blocks.get() {
        "extent ends within a run"
    } else {
        return Ok(());
    };
    Err(damaged(wrong, start, inode))
}

/// The extent in `item`, if it is one of `inode`.
fn of_inode(inode: InodeNr, item: Option<(Key, Vec<u8>)>) -> Plan<Option<Mapped>> {
    let Some((key, value)) = item else { return Ok(None) };
    if key.object != inode.get() || key.kind != EXTENT {
        return Ok(None);
    }
    Ok(Some(decode_mapped(inode, key.offset, &value)?))
}

fn decode_mapped(inode: InodeNr, offset: u64, value: &[u8]) -> Result<Mapped, FsError> {
    let decoded = Extent::decode(value).and_then(|extent| {
        check_extent_offset(offset, extent.blocks)?;
        Ok(Mapped { offset, extent })
    });
    decoded.map_err(|error| error.of("extent", None, Some(inode)))
}

fn block_at(start: BlockNr, blocks: u64) -> BlockNr {
    start.checked_add(BlockCount::new(blocks)).expect("decoding bounds block numbers and counts")
}

fn damaged(what: &str, block: BlockNr, inode: InodeNr) -> FsError {
    FsError::Damaged { what: what.to_owned(), block: Some(block), inode: Some(inode) }
}

mod bulk;
pub(crate) mod lend;
pub(crate) mod relocate;
mod share;
#[cfg(test)]
mod tests;

pub(crate) use bulk::{Limits, share_many};
pub(crate) use share::{SET_ASIDE_ITEMS, SHARE_ITEMS, move_extent, set_aside, share};
