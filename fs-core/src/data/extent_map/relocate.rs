//! Plans of a relocation: which runs and references lie where, and turning references to a new place.
//!
//! Owns: [`Span`], a stretch of blocks with its copy; [`next_span`]; [`references`]; [`move_reference`].
//!
//! Invariants:
//! - a reference goes to the new place only if its run there still is what was copied: same generation, same checksums
//!   (a preallocation that was filled meanwhile, or blocks that have no run any more, stay where they are);
//! - the first reference to a block of the new place makes its run, every other one adds to it: what was shared is shared;
//! - a block of the new place that lost all its references meanwhile belongs to the allocator, and is not used again;
//! - of a new place that another shard lends, only what it has lent is used.
//!
//! Excludes: locks (callers hold the mmap lock, shared, and the range of the reference), copying, cancellation.

use std::collections::BTreeSet;

use super::{
    Batch, BlockCount, BlockNr, Extent, ExtentKind, Generation, InodeNr, Key, Plan, Range, Run, Runs,
    block_at, drop_reference, next_extent, put_reference, remap_around, run_key,
};
use crate::format::extent::{
    BACKREF, Backref, MAX_RUN_BLOCKS, PHYSICAL, RUN, borrower_of, owner_of_set_aside, physical_block,
};
use crate::types::{BLOCK_SIZE, ShardId};

use super::lend::{Piece, refer_to_lent};
use super::share::add_reference;

/// Items that one transaction of a relocation changes at most.
pub(crate) const MOVE_ITEMS: u32 = 96;

/// Items that turning a reference changes beside runs: the remains to its left and right, itself, each an extent and a
/// back-reference, and the old two.
const ITEMS_PER_REFERENCE: u32 = 8;

/// Items that a piece of it changes: what is left of the old run, and the new run with what it was cut from.
const ITEMS_PER_PIECE: u32 = 3 + 3;

/// References that are looked up at once.
const REFERENCES_AT_ONCE: usize = 48;

/// What a block of a span held when it was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Origin {
    generation: Generation,
    /// `None` for a preallocation.
    checksum: Option<u32>,
}

/// Consecutive blocks of a group that move together.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    /// First block.
    pub(crate) start: BlockNr,
    /// What all of them hold.
    pub(crate) kind: ExtentKind,
    origins: Vec<Origin>,
}

/// Where a span goes.
#[derive(Clone, Debug)]
pub(crate) struct Destination {
    /// First block.
    pub(crate) start: BlockNr,
    /// Generation of the runs there.
    pub(crate) generation: Generation,
    /// Blocks that no run has yet; they are not committed.
    pub(crate) fresh: Vec<bool>,
    /// Whose blocks they are, if another shard's: that has lent them.
    pub(crate) lender: Option<ShardId>,
}

/// An extent that has blocks of a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reference {
    /// Inode, or the object of what was set aside of one, or of a borrower.
    pub(crate) object: InodeNr,
    /// File offset of its first byte.
    pub(crate) offset: u64,
    start: BlockNr,
    blocks: u64,
}

impl Reference {
    /// The file that it belongs to; `None` if blocks are lent to another shard.
    pub(crate) fn owner(&self) -> Option<InodeNr> {
        if borrower_of(self.object).is_some() {
            return None;
        }
        Some(owner_of_set_aside(self.object).unwrap_or(self.object))
    }

    /// The shard that it is lent to, if it is.
    pub(crate) fn borrower(&self) -> Option<ShardId> {
        borrower_of(self.object)
    }

    /// Its blocks.
    pub(crate) fn block_range(&self) -> Range<u64> {
        self.start.get()..self.start.get() + self.blocks
    }

    /// Its bytes of the file.
    pub(crate) fn bytes(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.blocks * BLOCK_SIZE)
    }
}

impl Span {
    /// Blocks.
    pub(crate) fn blocks(&self) -> u64 {
        self.origins.len() as u64
    }

    /// Block numbers.
    pub(crate) fn range(&self) -> Range<u64> {
        self.start.get()..self.start.get() + self.blocks()
    }

    /// Keeps only the first `blocks`.
    pub(crate) fn shorten(&mut self, blocks: u64) {
        self.origins.truncate(usize::try_from(blocks).unwrap_or(usize::MAX));
    }

    /// The checksum that block `at` of the span must have; `None` for a preallocation.
    pub(crate) fn checksum(&self, at: u64) -> Option<u32> {
        self.origins[at as usize].checksum
    }

    /// The checksums of its data.
    pub(crate) fn checksums(&self, range: &Range<u64>) -> Vec<u32> {
        self.origins[range.start as usize..range.end as usize]
            .iter()
            .filter_map(|origin| origin.checksum)
            .collect()
    }

    /// Whether `run`, which lies at `at` of the span, is what was copied from there.
    fn is_copy_of(&self, at: u64, run: &Run) -> bool {
        let origins = &self.origins[at as usize..(at + run.blocks.get()) as usize];
        origins.iter().enumerate().all(|(index, origin)| {
            origin.generation == run.generation && origin.checksum == run.checksums.get(index).copied()
        })
    }
}

/// What [`next_span`] has found.
#[derive(Clone, Debug)]
pub(crate) enum Found {
    /// Blocks that can be moved.
    Span(Span),
    /// No run in the rest of the blocks.
    Nothing,
}

/// The next runs that begin in `blocks`, as many as lie together, hold the same kind and fit one extent.
pub(crate) fn next_span(batch: &Batch<'_>, blocks: &Range<u64>) -> Plan<Found> {
    let Some((start, run)) = next_run(batch, blocks.start, blocks.end)? else { return Ok(Found::Nothing) };
    let mut span = Span { start, kind: run.kind(), origins: Vec::new() };
    let mut next = Some(run);
    while let Some(run) = next {
        span.origins.extend(
            (0..run.blocks.get() as usize).map(|index| Origin {
                generation: run.generation,
                checksum: run.checksums.get(index).copied(),
            }),
        );
        let end = span.range().end;
        let fits = |(start, run): &(BlockNr, Run)| {
            start.get() == end
                && run.kind() == span.kind
                && span.blocks() + run.blocks.get() <= MAX_RUN_BLOCKS
        };
        next = next_run(batch, end, blocks.end.min(end + 1))?.filter(fits).map(|(_, run)| run);
    }
    Ok(Found::Span(span))
}

fn next_run(batch: &Batch<'_>, from: u64, end: u64) -> Plan<Option<(BlockNr, Run)>> {
    let mut next = Some(run_key(BlockNr::new(from)));
    while let Some(key) = next
        && let Some((key, value)) = batch.next(&key)?
        && let Some(block) = physical_block(&key)
        && block.get() < end
    {
        if key.kind == RUN {
            let run = Run::decode(&value).map_err(|error| error.of("run", Some(block), None))?;
            return Ok(Some((block, run)));
        }
        // References of a block come after its run, and a run begins wherever one does.
        next = (block.get() + 1 < PHYSICAL).then(|| run_key(BlockNr::new(block.get() + 1)));
    }
    Ok(None)
}

/// The shards that any of `blocks` is lent to.
pub(crate) fn borrowers(batch: &Batch<'_>, blocks: &Range<u64>) -> Plan<BTreeSet<ShardId>> {
    let mut next = Some(first_reference(blocks));
    let mut borrowers = BTreeSet::new();
    while let Some(from) = next {
        let (found, rest) = references(batch, blocks, from)?;
        borrowers.extend(found.iter().filter_map(Reference::borrower));
        next = rest;
    }
    Ok(borrowers)
}

/// Where the search for references to `blocks` begins: extents may begin before them.
pub(crate) fn first_reference(blocks: &Range<u64>) -> Key {
    run_key(BlockNr::new(blocks.start.saturating_sub(MAX_RUN_BLOCKS - 1)))
}

/// Some references that have any of `blocks`, from a key on, and where to go on.
pub(crate) fn references(
    batch: &Batch<'_>,
    blocks: &Range<u64>,
    from: Key,
) -> Plan<(Vec<Reference>, Option<Key>)> {
    let mut found = Vec::new();
    let mut next = Some(from);
    while let Some(from) = next
        && let Some((key, value)) = batch.next(&from)?
        && let Some(start) = physical_block(&key)
        && start.get() < blocks.end
    {
        if found.len() == REFERENCES_AT_ONCE {
            return Ok((found, Some(key)));
        }
        if key.kind == BACKREF {
            let backref =
                Backref::decode(&value).map_err(|error| error.of("back-reference", Some(start), None))?;
            if start.get() + backref.blocks.get() > blocks.start {
                let object = InodeNr::new(key.offset);
                found.push(Reference { object, offset: key.minor, start, blocks: backref.blocks.get() });
            }
        }
        next = key.successor();
    }
    Ok((found, None))
}

/// Turns the blocks that `reference` has of `span` to the span's destination, as many as the transaction has room for.
/// Returns how many; none if the reference is not there any more, or not to what was copied.
pub(crate) fn move_reference(
    batch: &mut Batch<'_>,
    span: &Span,
    to: &mut Destination,
    reference: &Reference,
) -> Plan<u64> {
    let object = reference.object;
    let there = |mapped: &super::Mapped| {
        mapped.offset == reference.offset
            && mapped.extent.start == reference.start
            && mapped.extent.kind == span.kind
    };
    let Some(mapped) = next_extent(batch, object, reference.offset)?.filter(there) else { return Ok(0) };
    let begin = mapped.extent.start.get();
    let first = span.range().start.saturating_sub(begin);
    let last = span.range().end.saturating_sub(begin).min(mapped.extent.blocks.get());
    let (mut reached, mut position) = (first, 0);
    while position < last {
        let (at, start, run) = Runs { batch, inode: object, mapped: &mapped, position }.next()?;
        position = at + run.blocks.get();
        let (from, end) = (first.max(at), last.min(position));
        if from >= end {
            continue;
        }
        let part = run.part(from - at, end - at);
        let place = begin + from - span.range().start;
        if !span.is_copy_of(place, &part) {
            break;
        }
        let turned = refer(batch, to, place, &part)?;
        if turned > 0 {
            drop_reference(batch, start, &run, from - at..from - at + turned);
            reached = from + turned;
        }
        if reached < end {
            break;
        }
    }
    if reached == first {
        return Ok(0);
    }
    remap_around(batch, object, &mapped, first..reached);
    let extent = Extent {
        kind: span.kind,
        start: block_at(to.start, begin + first - span.range().start),
        blocks: BlockCount::new(reached - first),
        generation: to.generation,
    };
    put_reference(batch, object, reference.offset + first * BLOCK_SIZE, &extent);
    Ok(reached - first)
}

/// Whether a transaction has room for one more piece.
pub(crate) fn has_room(batch: &Batch<'_>) -> bool {
    batch.changed() + ITEMS_PER_PIECE + ITEMS_PER_REFERENCE <= MOVE_ITEMS
}

/// Adds a reference to the destination of `part`, which lies at `place` of the span. Returns for how many blocks of it.
fn refer(batch: &mut Batch<'_>, to: &mut Destination, place: u64, part: &Run) -> Plan<u64> {
    if let Some(owner) = to.lender {
        let (offset, start, checksums) = (0, block_at(to.start, place), part.checksums.clone());
        return refer_to_lent(
            batch,
            &Piece { offset, start, generation: to.generation, checksums, owner },
            has_room,
        );
    }
    let mut done = 0;
    while done < part.blocks.get() && has_room(batch) {
        let at = place + done;
        let rest = place + part.blocks.get();
        if to.fresh[at as usize] {
            let end = (at..rest).find(|index| !to.fresh[*index as usize]).unwrap_or(rest);
            let mut new = part.part(done, end - place);
            (new.references, new.generation) = (1, to.generation);
            batch.commit_blocks(block_at(to.start, at), new.blocks);
            batch.put(run_key(block_at(to.start, at)), new.encode());
            to.fresh[at as usize..end as usize].fill(false);
            done = end - place;
            continue;
        }
        // The copy may have lost its references since.
        let Some((start, run)) = run_of(batch, to, at)? else { break };
        let end = rest.min(start + run.blocks.get());
        add_reference(batch, block_at(to.start, start), &run, at - start..end - start)?;
        done = end - place;
    }
    Ok(done)
}

/// The run of the destination that has its block `at`, and where it begins.
fn run_of(batch: &Batch<'_>, to: &Destination, at: u64) -> Plan<Option<(u64, Run)>> {
    let run_at = |index: u64| -> Plan<Option<Run>> {
        let start = block_at(to.start, index);
        let Some(value) = batch.get(&run_key(start))? else { return Ok(None) };
        let run = Run::decode(&value).map_err(|error| error.of("run", Some(start), None))?;
        Ok((run.generation == to.generation).then_some(run))
    };
    if let Some(run) = run_at(at)? {
        return Ok(Some((at, run)));
    }
    let mut index = 0;
    while index < at {
        match if to.fresh[index as usize] { None } else { run_at(index)? } {
            Some(run) if index + run.blocks.get() > at => return Ok(Some((index, run))),
            Some(run) => index += run.blocks.get(),
            None => index += 1,
        }
    }
    Ok(None)
}
