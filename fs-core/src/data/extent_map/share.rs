//! Plans of a clone: giving a second file references to what a first one has, and setting extents aside.
//!
//! Both go step by step: each call does a bounded piece and says how far it came.
//!
//! Invariants: those of the extent map, before and after each call. A run that two files share is changed by neither:
//! whatever a file writes goes to blocks of its own.

use super::{
    Batch, BlockCount, BlockNr, Extent, ExtentKind, InodeNr, Mapped, Plan, Range, Run, Runs, block_at,
    next_extent, put_reference, put_run_around, remap_around, run_key,
};
use crate::error::FsError;
use crate::types::BLOCK_SIZE;

/// Runs that one step of [`share`] gives a reference to.
const RUNS_PER_STEP: u32 = 8;

/// Items that one step of [`share`] changes at most: the edges of the first and last run, each run, the new extent
/// and its back-reference.
pub(crate) const SHARE_ITEMS: u32 = 2 + RUNS_PER_STEP + 2;

/// Items that one step of [`set_aside`] changes at most: two runs split, the extent with what remains left and right
/// of it, its new place.
pub(crate) const SET_ASIDE_ITEMS: u32 = 4 + 6 + 2;

/// What a step of [`share`] has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sharing {
    /// Offset in the source up to which nothing is left to do.
    pub(crate) up_to: u64,
    /// Blocks that the target has more than before; 0 for a hole.
    pub(crate) blocks: u64,
}

/// The next piece of `range` (whole blocks) of `source` that has data, or the hole before it.
///
/// The piece may be longer than one step can share.
pub(super) fn piece(batch: &Batch<'_>, source: InodeNr, range: &Range<u64>) -> Plan<(u64, Option<Mapped>)> {
    let mut from = range.start;
    loop {
        let mapped = next_extent(batch, source, from)?.filter(|mapped| mapped.offset < range.end);
        let Some(mapped) = mapped else { return Ok((range.end, None)) };
        match mapped.extent.kind {
            // What was preallocated and never written is a hole in the clone.
            ExtentKind::Preallocated if mapped.end() >= range.end => return Ok((range.end, None)),
            ExtentKind::Preallocated => from = mapped.end(),
            ExtentKind::Data if mapped.offset > range.start => return Ok((mapped.offset, None)),
            ExtentKind::Data => return Ok((mapped.end().min(range.end), Some(mapped))),
        }
    }
}

/// Gives `target` references to the beginning of `range` (whole blocks) of `source`, at file offset `offset`, where it
/// has nothing.
pub(crate) fn share(
    batch: &mut Batch<'_>,
    source: InodeNr,
    range: &Range<u64>,
    target: InodeNr,
    offset: u64,
) -> Plan<Sharing> {
    let (end, mapped) = piece(batch, source, range)?;
    let Some(mapped) = mapped else { return Ok(Sharing { up_to: end, blocks: 0 }) };
    let first = (range.start - mapped.offset) / BLOCK_SIZE;
    let last = (end - mapped.offset) / BLOCK_SIZE;
    let (mut reached, mut position, mut runs) = (first, 0, 0);
    while position < last && runs < RUNS_PER_STEP {
        let (at, start, run) = Runs { batch, inode: source, mapped: &mapped, position }.next()?;
        position = at + run.blocks.get();
        let (from, to) = (first.max(at), last.min(position));
        if from < to {
            add_reference(batch, start, &run, from - at..to - at)?;
            (reached, runs) = (to, runs + 1);
        }
    }
    let blocks = reached - first;
    let start = block_at(mapped.extent.start, first);
    let extent = Extent { start, blocks: BlockCount::new(blocks), ..mapped.extent };
    put_reference(batch, target, offset, &extent);
    Ok(Sharing { up_to: range.start + blocks * BLOCK_SIZE, blocks })
}

/// Adds a reference to the blocks `range` of a run, which is split for it.
pub(super) fn add_reference(batch: &mut Batch<'_>, start: BlockNr, run: &Run, range: Range<u64>) -> Plan<()> {
    if range == (0..run.blocks.get()) {
        let references = run.references.checked_add(1).ok_or(FsError::TooManyLinks)?;
        batch.put(run_key(start), run.encode_with(references));
        return Ok(());
    }
    put_run_around(batch, start, run, &range);
    let mut part = run.part(range.start, range.end);
    part.references = part.references.checked_add(1).ok_or(FsError::TooManyLinks)?;
    batch.put(run_key(block_at(start, range.start)), part.encode());
    Ok(())
}

/// Moves the first extent that `from` has in `range` (whole blocks), or its part in there, to `to`, which has nothing
/// there. Returns where that piece ends and its blocks; `None` if there is none.
pub(crate) fn set_aside(
    batch: &mut Batch<'_>,
    from: InodeNr,
    to: InodeNr,
    range: &Range<u64>,
) -> Plan<Option<(u64, u64)>> {
    move_extent(batch, from, to, range, |offset| offset)
}

/// Moves the first extent that `from` has in `range` (whole blocks), or its part in there, to `to`, at the offset that `place` makes of
/// its own; there may be nothing but what is moved. Returns where that piece ended and its blocks; `None` if there is none.
pub(crate) fn move_extent(
    batch: &mut Batch<'_>,
    from: InodeNr,
    to: InodeNr,
    range: &Range<u64>,
    place: impl FnOnce(u64) -> u64,
) -> Plan<Option<(u64, u64)>> {
    let Some(mapped) = next_extent(batch, from, range.start)?.filter(|mapped| mapped.offset < range.end)
    else {
        return Ok(None);
    };
    let start = range.start.max(mapped.offset);
    let end = range.end.min(mapped.end());
    let (first, last) = ((start - mapped.offset) / BLOCK_SIZE, (end - mapped.offset) / BLOCK_SIZE);
    split_run(batch, from, &mapped, first)?;
    split_run(batch, from, &mapped, last)?;
    remap_around(batch, from, &mapped, first..last);
    let moved = block_at(mapped.extent.start, first);
    let extent = Extent { start: moved, blocks: BlockCount::new(last - first), ..mapped.extent };
    put_reference(batch, to, place(start), &extent);
    Ok(Some((end, last - first)))
}

/// Splits the run of an extent that reaches over its block `at`, so that extents may begin and end there.
fn split_run(batch: &mut Batch<'_>, inode: InodeNr, mapped: &Mapped, at: u64) -> Plan<()> {
    let mut position = 0;
    while position < at {
        let (begin, start, run) = Runs { batch, inode, mapped, position }.next()?;
        position = begin + run.blocks.get();
        if position > at {
            put_run_around(batch, start, &run, &(0..at - begin));
            batch.put(run_key(start), run.part(0, at - begin).encode());
        }
    }
    Ok(())
}
