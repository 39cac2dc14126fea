//! Plans of lending: blocks of one shard's groups in files of another shard.
//!
//! Owns: the lender's side ([`lend`], [`take_back`]) and the borrower's ([`pieces`], [`survey`], [`borrow`],
//! [`end_return`]); for relocation, [`copies_lacking`], [`lend_copy`], [`receive`] and [`refer_to_lent`]. What they keep true is written in `format/extent.rs`, "Blocks of another shard".
//!
//! Invariants: those of the extent map, before and after each call. What is lent to a shard is what it has borrowed or
//! is about to return: so `lend` goes with `borrow`, and `take_back` with `end_return`, in one transaction of both.
//!
//! Excludes: messages, and who may call when (`data/lending.rs`).

use crate::error::FsError;
use crate::format::extent::{
    Extent, ExtentKind, RETURN, Return, Run, borrower_of, lent_offset, lent_to, physical_block, return_key,
    return_of_key, run_key,
};
use crate::format::extent::{MAX_RUN_BLOCKS, RUN};
use crate::types::ShardId;

use super::relocate::{first_reference, references};
use super::share::{add_reference, piece};
use super::{
    BLOCK_SIZE, Batch, BlockCount, BlockNr, Dropped, Generation, InodeNr, ItemBudget, Plan, Range, Runs,
    block_at, damaged, drop_range, next_extent, put_reference, share,
};

/// A piece of a file that has data, as another shard needs to know it: part of one run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// File offset of its first byte.
    pub(crate) offset: u64,
    /// First block.
    pub(crate) start: BlockNr,
    /// Generation of the blocks.
    pub(crate) generation: Generation,
    /// CRC32C of each block; there are as many blocks as checksums, at least one.
    pub(crate) checksums: Vec<u32>,
    /// The shard whose blocks they are.
    pub(crate) owner: ShardId,
}

impl Piece {
    /// Blocks.
    pub(crate) fn blocks(&self) -> u64 {
        self.checksums.len() as u64
    }

    /// File offset behind its last byte.
    pub(crate) fn end(&self) -> u64 {
        self.offset + self.blocks() * BLOCK_SIZE
    }

    /// The first `blocks` blocks of the piece.
    pub(crate) fn beginning(&self, blocks: u64) -> Self {
        Self { checksums: self.checksums[..blocks as usize].to_vec(), ..*self }
    }
}

/// Parts of pieces that are borrowed at once: each changes a run and what remains of it on both sides, or a return.
pub(crate) const PARTS_AT_ONCE: usize = 12;

/// Blocks of the volume: the first, and how many.
pub(crate) type Blocks = (BlockNr, u64);

/// The next pieces of `range` (whole blocks) of `inode` of `shard`, `limit` or a few more, and the offset up to which
/// there are no others.
pub(crate) fn pieces(
    batch: &Batch<'_>,
    shard: ShardId,
    inode: InodeNr,
    range: &Range<u64>,
    limit: usize,
) -> Plan<(Vec<Piece>, u64)> {
    let (mut found, mut at) = (Vec::new(), range.start);
    while at < range.end && found.len() < limit {
        let (end, mapped) = piece(batch, inode, &(at..range.end))?;
        let Some(mapped) = mapped else {
            at = end;
            continue;
        };
        let (first, last) = ((at - mapped.offset) / BLOCK_SIZE, (end - mapped.offset) / BLOCK_SIZE);
        let mut runs = Runs::of(batch, inode, &mapped);
        while runs.position < last {
            let (position, start, run) = runs.next()?;
            let (from, to) = (first.max(position), last.min(position + run.blocks.get()));
            if from < to {
                found.push(Piece {
                    offset: mapped.offset + from * BLOCK_SIZE,
                    start: block_at(start, from - position),
                    generation: run.generation,
                    checksums: run.checksums[(from - position) as usize..(to - position) as usize].to_vec(),
                    owner: run.lender.unwrap_or(shard),
                });
            }
        }
        at = end;
    }
    Ok((found, at))
}

/// Lends what `via` (a file, or another borrower) has in `range` to `borrower`, which has none of these blocks.
pub(crate) fn lend(batch: &mut Batch<'_>, via: InodeNr, range: &Range<u64>, borrower: ShardId) -> Plan<()> {
    let mut at = range.start;
    while at < range.end {
        let mapped = next_extent(batch, via, at)?.filter(|mapped| mapped.offset <= at);
        let mapped = mapped.ok_or_else(|| damaged("what is to be lent is gone", BlockNr::new(0), via))?;
        let start = block_at(mapped.extent.start, (at - mapped.offset) / BLOCK_SIZE);
        let shared = share(batch, via, &(at..range.end), lent_to(borrower), lent_offset(start))?;
        if shared.blocks == 0 {
            return Err(damaged("what is to be lent has no data", start, via).into());
        }
        at = shared.up_to;
    }
    Ok(())
}

/// Takes blocks back that were lent to `borrower`, as far as the budget goes. The offsets of what is said to be dropped
/// are those of [`lent_offset`].
pub(crate) fn take_back(
    batch: &mut Batch<'_>,
    borrower: ShardId,
    blocks: Blocks,
    budget: &mut ItemBudget,
) -> Plan<Dropped> {
    let first = lent_offset(blocks.0);
    drop_range(batch, lent_to(borrower), first..first + blocks.1 * BLOCK_SIZE, budget)
}

/// What a borrower has of some blocks.
enum Holding {
    /// A run of its own: its first block, itself, the part of it that is meant.
    Run(BlockNr, Run, Range<u64>),
    /// A return that has not ended.
    Return,
    /// Either, but of another generation.
    Other,
    /// Nothing.
    Nothing,
}

/// What this shard has of the blocks of `piece` from its block `position` on, and up to which block of it that is true.
fn holding(batch: &Batch<'_>, piece: &Piece, position: u64) -> Plan<(Holding, u64)> {
    let (at, rest) = (block_at(piece.start, position), piece.blocks() - position);
    // Both are always looked up, so that a rehearsal meets the nodes of either.
    let returned = next_return(batch, piece.owner, at, rest)?;
    if let Some((start, run)) = run_covering(batch, at)? {
        let first = at.get() - start.get();
        let count = rest.min(run.blocks.get() - first);
        if run.generation != piece.generation {
            return Ok((Holding::Other, position + count));
        }
        return Ok((Holding::Run(start, run, first..first + count), position + count));
    }
    let before_run = next_run(batch, at, rest)?.map_or(rest, |run| run.get() - at.get());
    Ok(match returned {
        Some((start, back)) if start <= at => {
            let count = start.get() + back.blocks.get() - at.get();
            let is_same = back.generation == piece.generation;
            (if is_same { Holding::Return } else { Holding::Other }, position + before_run.min(count))
        }
        Some((start, _)) => (Holding::Nothing, position + before_run.min(start.get() - at.get())),
        None => (Holding::Nothing, position + before_run),
    })
}

/// What a borrower has to know of a piece before it borrows it.
pub(crate) struct Survey {
    /// Blocks of the piece that it has neither borrowed nor to return: their owner has to lend them.
    pub(crate) lacking: Vec<Range<u64>>,
    /// Parts of the piece that it has, or lacks, in different ways.
    pub(crate) parts: usize,
    /// The block of the piece up to which this was looked at.
    pub(crate) end: u64,
}

/// Looks at the first `limit` parts of a piece.
pub(crate) fn survey(batch: &Batch<'_>, piece: &Piece, limit: usize) -> Plan<Survey> {
    let mut survey = Survey { lacking: Vec::new(), parts: 0, end: 0 };
    while survey.end < piece.blocks() && survey.parts < limit {
        let (holding, end) = holding(batch, piece, survey.end)?;
        match holding {
            Holding::Nothing => survey.lacking.push(survey.end..end),
            Holding::Other => return Err(not_as_lent(piece, survey.end).into()),
            Holding::Run(..) | Holding::Return => {}
        }
        survey.parts += 1;
        survey.end = end;
    }
    Ok(survey)
}

/// Gives `inode`, which has nothing there, an extent of the piece at file offset `offset`.
pub(crate) fn borrow(batch: &mut Batch<'_>, inode: InodeNr, offset: u64, piece: &Piece) -> Plan<()> {
    let own = piece.owner == inode.shard();
    let mut position = 0;
    while position < piece.blocks() {
        let (holding, end) = holding(batch, piece, position)?;
        let start = block_at(piece.start, position);
        match holding {
            Holding::Run(first, run, range) => add_reference(batch, first, &run, range)?,
            Holding::Return | Holding::Nothing if own => {
                return Err(damaged("blocks that another shard borrows have no run", start, inode).into());
            }
            Holding::Return => {
                end_return(batch, piece.owner, (start, end - position))?;
                put_borrowed_run(batch, piece, position..end);
            }
            Holding::Other => return Err(not_as_lent(piece, position).into()),
            Holding::Nothing => put_borrowed_run(batch, piece, position..end),
        }
        position = end;
    }
    let (start, blocks) = (piece.start, BlockCount::new(piece.blocks()));
    let extent = Extent { kind: ExtentKind::Data, start, blocks, generation: piece.generation };
    put_reference(batch, inode, offset, &extent);
    Ok(())
}

/// Who borrows has his turn, so what he has must be what its owner says.
fn not_as_lent(piece: &Piece, position: u64) -> FsError {
    let at = block_at(piece.start, position);
    damaged("what is borrowed and what its lender has differ in generation", at, lent_to(piece.owner))
}

fn put_borrowed_run(batch: &mut Batch<'_>, piece: &Piece, range: Range<u64>) {
    let run = Run {
        blocks: BlockCount::new(range.end - range.start),
        lender: Some(piece.owner),
        references: 1,
        generation: piece.generation,
        checksums: piece.checksums[range.start as usize..range.end as usize].to_vec(),
    };
    batch.put(run_key(block_at(piece.start, range.start)), run.encode());
}

/// Where the blocks of a copy, which is to be lent, come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CopySource {
    /// The allocator: nothing has them yet.
    Fresh,
    /// Another shard has borrowed them, and cannot give them back for now: its turn to borrow is taken.
    LentTo(ShardId),
}

/// Blocks of a copy that a relocation lends.
#[derive(Clone, Debug)]
pub(crate) struct CopyPiece {
    /// First block.
    pub(crate) start: BlockNr,
    /// Generation of the copy.
    pub(crate) generation: Generation,
    /// CRC32C of each block; there are as many blocks as checksums, at least one.
    pub(crate) checksums: Vec<u32>,
    /// Where they come from.
    pub(crate) source: CopySource,
}

impl CopyPiece {
    /// What the borrower gets.
    pub(crate) fn blocks(&self) -> Blocks {
        (self.start, self.checksums.len() as u64)
    }
}

/// Those of `blocks`, a copy of this generation, that are not lent to `borrower`, and where they come from. Left out is what is neither
/// fresh nor lent to anybody: nothing keeps such blocks where they are. By now they may be lent as something else.
pub(crate) fn copies_lacking(
    batch: &Batch<'_>,
    borrower: ShardId,
    (blocks, generation): (&Range<u64>, Generation),
    is_fresh: impl Fn(u64) -> bool,
) -> Plan<Vec<(Range<u64>, CopySource)>> {
    let mut lent: Vec<(ShardId, Range<u64>)> = Vec::new();
    let mut next = Some(first_reference(blocks));
    while let Some(from) = next {
        let (found, rest) = references(batch, blocks, from)?;
        lent.extend(found.iter().filter_map(|one| Some((borrower_of(one.object)?, one.block_range()))));
        next = rest;
    }
    let source_of = |block: u64| {
        let mut holders = lent.iter().filter(|(_, range)| range.contains(&block)).map(|(holder, _)| *holder);
        if holders.clone().any(|holder| holder == borrower) {
            return None;
        }
        if is_fresh(block) { Some(CopySource::Fresh) } else { holders.next().map(CopySource::LentTo) }
    };
    let mut found: Vec<(Range<u64>, CopySource)> = Vec::new();
    for block in blocks.clone() {
        let Some(source) = source_of(block) else { continue };
        if source != CopySource::Fresh && !is_of_generation(batch, BlockNr::new(block), generation)? {
            continue;
        }
        match found.last_mut() {
            Some((range, last)) if range.end == block && *last == source => range.end += 1,
            _ => found.push((block..block + 1, source)),
        }
    }
    Ok(found)
}

/// Whether the run that has `block` is of this generation.
fn is_of_generation(batch: &Batch<'_>, block: BlockNr, generation: Generation) -> Plan<bool> {
    Ok(run_covering(batch, block)?.is_some_and(|(_, run)| run.generation == generation))
}

/// Lends blocks of a copy to `borrower`, which has none of them.
pub(crate) fn lend_copy(batch: &mut Batch<'_>, borrower: ShardId, piece: &CopyPiece) -> Plan<()> {
    let (start, blocks) = piece.blocks();
    match piece.source {
        CopySource::Fresh => {
            let run = Run {
                blocks: BlockCount::new(blocks),
                lender: None,
                references: 1,
                generation: piece.generation,
                checksums: piece.checksums.clone(),
            };
            batch.commit_blocks(start, run.blocks);
            batch.put(run_key(start), run.encode());
        }
        CopySource::LentTo(_) => {
            let mut position = 0;
            while position < blocks {
                let at = block_at(start, position);
                let found = run_covering(batch, at)?.filter(|(_, run)| run.generation == piece.generation);
                let (first, run) =
                    found.ok_or_else(|| damaged("a copy that is lent is gone", at, lent_to(borrower)))?;
                let from = at.get() - first.get();
                let upto = run.blocks.get().min(from + blocks - position);
                add_reference(batch, first, &run, from..upto)?;
                position += upto - from;
            }
        }
    }
    let kind = ExtentKind::Data;
    let extent = Extent { kind, start, blocks: BlockCount::new(blocks), generation: piece.generation };
    put_reference(batch, lent_to(borrower), lent_offset(start), &extent);
    Ok(())
}

/// Notes blocks that `lender` has lent and no file has yet: they are to be given back unless one comes to need them.
pub(crate) fn receive(batch: &mut Batch<'_>, lender: ShardId, blocks: Blocks, generation: Generation) {
    let back = Return { blocks: BlockCount::new(blocks.1), generation };
    batch.put(return_key(lender, blocks.0), back.encode());
    batch.note_return();
}

/// Adds a reference to borrowed blocks, from the first on as long as they are there and `has_room`. Returns to how many. They may
/// have been given back since they were lent, and borrowed anew as something else.
pub(super) fn refer_to_lent(
    batch: &mut Batch<'_>,
    piece: &Piece,
    has_room: impl Fn(&Batch<'_>) -> bool,
) -> Plan<u64> {
    let mut position = 0;
    while position < piece.blocks() && has_room(batch) {
        let (holding, end) = holding(batch, piece, position)?;
        match holding {
            Holding::Run(first, run, range) => add_reference(batch, first, &run, range)?,
            Holding::Return => {
                end_return(batch, piece.owner, (block_at(piece.start, position), end - position))?;
                put_borrowed_run(batch, piece, position..end);
            }
            Holding::Other | Holding::Nothing => break,
        }
        position = end;
    }
    Ok(position)
}

/// Ends the return of some blocks: they were given back, or are used again.
pub(crate) fn end_return(batch: &mut Batch<'_>, lender: ShardId, blocks: Blocks) -> Plan<()> {
    let (mut at, end) = (blocks.0.get(), blocks.0.get() + blocks.1);
    while at < end {
        let start = BlockNr::new(at);
        let found = next_return(batch, lender, start, 1)?;
        let (first, back) = found.ok_or_else(|| damaged("a return is gone", start, lent_to(lender)))?;
        let behind = first.get() + back.blocks.get();
        let upto = behind.min(end);
        batch.delete(return_key(lender, first));
        for rest in [first.get()..at, upto..behind] {
            if !rest.is_empty() {
                let part = Return { blocks: BlockCount::new(rest.end - rest.start), ..back };
                batch.put(return_key(lender, BlockNr::new(rest.start)), part.encode());
            }
        }
        at = upto;
    }
    Ok(())
}

/// The first returns in the order of their lenders, all to the same one.
pub(crate) fn first_returns(batch: &Batch<'_>, limit: usize) -> Plan<Option<(ShardId, Vec<Blocks>)>> {
    let mut found: Option<(ShardId, Vec<Blocks>)> = None;
    let mut next = Some(return_key(ShardId::FIRST, BlockNr::new(0)));
    while let Some(from) = next
        && let Some((key, value)) = batch.next(&from)?
        && (key.object, key.kind) == (0, RETURN)
    {
        let (lender, start, back) = decode_return(&key, &value)?;
        let list = &mut found.get_or_insert_with(|| (lender, Vec::new()));
        if list.0 != lender || list.1.len() == limit {
            break;
        }
        list.1.push((start, back.blocks.get()));
        next = key.successor();
    }
    Ok(found)
}

/// The first return to `lender` that covers any of `blocks` blocks from `at` on.
fn next_return(
    batch: &Batch<'_>,
    lender: ShardId,
    at: BlockNr,
    blocks: u64,
) -> Plan<Option<(BlockNr, Return)>> {
    let key = return_key(lender, at);
    let of_lender = |item: Option<(super::Key, Vec<u8>)>| match item {
        Some((found, value)) if (found.object, found.kind, found.offset) == (0, RETURN, key.offset) => {
            decode_return(&found, &value).map(|(_, start, back)| Some((start, back)))
        }
        _ => Ok(None),
    };
    if let Some((start, back)) = of_lender(batch.prev(&key)?)?
        && start.get() + back.blocks.get() > at.get()
    {
        return Ok(Some((start, back)));
    }
    Ok(of_lender(batch.next(&key)?)?.filter(|(start, _)| start.get() < at.get() + blocks))
}

fn decode_return(key: &super::Key, value: &[u8]) -> Plan<(ShardId, BlockNr, Return)> {
    let decoded = Return::decode(value).and_then(|back| {
        let (lender, start) = return_of_key(key, back.blocks)?;
        Ok((lender, start, back))
    });
    decoded.map_err(|error| error.of("return", Some(BlockNr::new(key.minor)), None).into())
}

/// The run that covers `block`, with its first block.
fn run_covering(batch: &Batch<'_>, block: BlockNr) -> Plan<Option<(BlockNr, Run)>> {
    let mut probe = block;
    loop {
        // Between a run and the block there may be references, and runs that end before it.
        let Some((key, value)) = batch.prev(&run_key(probe))? else { return Ok(None) };
        let Some(start) = physical_block(&key) else { return Ok(None) };
        if key.kind == RUN {
            let run = decode_run(&value, start)?;
            let covers = start.get() + run.blocks.get() > block.get();
            return Ok(covers.then_some((start, run)));
        }
        if start.get() + MAX_RUN_BLOCKS <= block.get() {
            return Ok(None);
        }
        // References of a block sort behind its run, if one begins there.
        probe = start;
    }
}

/// First block of the next run that begins within `blocks` blocks from `at` on.
fn next_run(batch: &Batch<'_>, at: BlockNr, blocks: u64) -> Plan<Option<BlockNr>> {
    let found = batch.next(&run_key(at))?.and_then(|(key, _)| physical_block(&key));
    // References begin where runs do, so whatever comes next belongs to the next run.
    Ok(found.filter(|start| start.get() < at.get() + blocks))
}

fn decode_run(value: &[u8], start: BlockNr) -> Result<Run, FsError> {
    Run::decode(value).map_err(|error| error.of("run", Some(start), None))
}
