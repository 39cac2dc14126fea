//! Scrubbing: every checksum of a shard, verified on the device while the volume is in use.
//!
//! Owns: [`Shard::scrub`], one bounded step of it. Whoever scrubs asks for step after step; the shard keeps nothing in
//! between, so a scrub that nobody goes on with has simply ended.
//!
//! | place | verified |
//! |---|---|
//! | [`ScrubPlace::Nodes`] | tree nodes of the last checkpoint, in key order |
//! | [`ScrubPlace::Data`] | blocks of runs, in the order of the device |
//!
//! A step takes no lock. What it finds wrong it looks at once more before it reports it: a node, or a run, may have been
//! replaced and its blocks used again while it was being read.
//!
//! Excludes: superblocks and bitmaps, which a mount verifies; whether items make sense together (`fsck`).

use crate::batch::{Batch, Plan};
use crate::error::FsError;
use crate::format::extent::{
    BACKREF, ExtentKind, PHYSICAL, RUN, Run, borrower_of, owner_of_set_aside, physical_block, run_key,
};
use crate::format::node::Key;
use crate::request::{ScrubPlace, ScrubStep};
use crate::tree::{NODE_BLOCKS, Walk};
use crate::types::{BlockCount, BlockNr, InodeNr};

use super::Shard;

/// Nodes that a step verifies.
const NODES_PER_STEP: u64 = 256;

/// Blocks of data after which a step ends: 16 MiB, and the rest of a run.
const BLOCKS_PER_STEP: u64 = 4096;

/// Runs that are looked up at once.
const RUNS_PER_VIEW: usize = 64;

/// Times that a step begins again because a checkpoint replaced what it was reading.
const ROUNDS: u32 = 16;

/// References that a report names of one damaged block.
const REFERENCES_NAMED: usize = 8;

impl Shard {
    /// Verifies a little from `from` on.
    ///
    /// # Errors
    /// The volume could not be read at all; damage is in the step's report.
    pub(crate) async fn scrub(&self, from: ScrubPlace) -> Result<ScrubStep, FsError> {
        match from {
            ScrubPlace::Nodes(key) => self.scrub_nodes(key).await,
            ScrubPlace::Data(block) => self.scrub_data(block).await,
        }
    }

    async fn scrub_nodes(&self, from: Key) -> Result<ScrubStep, FsError> {
        for _ in 0..ROUNDS {
            let root = self.last_root.get();
            let step = self.scrub_nodes_of(root, from).await?;
            // Nodes of the newest root stay where they are; those of an older one may have been overwritten.
            if step.damage.is_empty() || self.last_root.get() == root {
                for damage in &step.damage {
                    self.volume.note_damage(self.id, damage);
                }
                return Ok(step);
            }
        }
        Err(FsError::Io("checkpoints follow each other too fast to scrub between them".to_owned()))
    }

    async fn scrub_nodes_of(&self, root: crate::tree::TreeRoot, from: Key) -> Result<ScrubStep, FsError> {
        let identity = self.tree.borrow().identity();
        let mut walk = Walk::new(identity, root);
        let mut step = ScrubStep { next: Some(ScrubPlace::Data(BlockNr::new(0))), ..ScrubStep::default() };
        let mut nodes = 0;
        while let Some(expected) = walk.next_node() {
            if expected.bounds.high.is_some_and(|high| high <= from) {
                continue; // seen by an earlier step
            }
            if nodes >= NODES_PER_STEP && expected.bounds.low > from {
                step.next = Some(ScrubPlace::Nodes(expected.bounds.low));
                return Ok(step);
            }
            nodes += 1;
            step.blocks += NODE_BLOCKS;
            let address = expected.ptr.address;
            let found = match self.read_node(address).await {
                Ok(image) => walk.supply(&image).map(|_| ()).map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = found {
                step.damage.push(format!("tree node at block {address}, level {}: {error}", expected.level));
            }
        }
        Ok(step)
    }

    async fn scrub_data(&self, from: BlockNr) -> Result<ScrubStep, FsError> {
        let mut step = ScrubStep::default();
        let mut next = Some(from);
        while let Some(start) = next {
            if step.blocks >= BLOCKS_PER_STEP {
                step.next = Some(ScrubPlace::Data(start));
                return Ok(step);
            }
            let (runs, rest) = self.view(|batch| some_runs(batch, start)).await?;
            for (number, (block, run)) in runs.iter().enumerate() {
                if step.blocks >= BLOCKS_PER_STEP && number > 0 {
                    step.next = Some(ScrubPlace::Data(*block));
                    return Ok(step);
                }
                step.blocks += run.blocks.get();
                self.scrub_run(*block, run, &mut step.damage).await?;
            }
            next = rest;
        }
        Ok(step)
    }

    /// Verifies a run, and once more whatever of it is wrong, if it is still there.
    async fn scrub_run(&self, start: BlockNr, run: &Run, damage: &mut Vec<String>) -> Result<(), FsError> {
        if self.wrong_blocks(start, run).await.is_empty() {
            return Ok(());
        }
        let wrong = self.wrong_blocks(start, run).await;
        let still = self.view(|batch| run_at(batch, start)).await?;
        if still
            .as_ref()
            .is_none_or(|still| still.generation != run.generation || still.checksums != run.checksums)
        {
            return Ok(()); // freed, split or written anew meanwhile: what replaced it has a run of its own
        }
        for (block, why) in wrong {
            let users = self.view(|batch| users_of(batch, start, run.blocks)).await?;
            let what = format!("data block {block}: {why}; it belongs to {}", describe(&users));
            self.volume.note_damage(self.id, &what);
            damage.push(what);
        }
        Ok(())
    }

    /// Blocks of a run that are not what their checksums say, with the reason.
    async fn wrong_blocks(&self, start: BlockNr, run: &Run) -> Vec<(BlockNr, String)> {
        let mut wrong = Vec::new();
        let at = |index: u64| start.checked_add(BlockCount::new(index)).unwrap_or(start);
        let bytes = match self.disk.read(start, run.blocks).await {
            Ok(bytes) => bytes,
            Err(_) => {
                // Which of them cannot be read?
                for index in 0..run.blocks.get() {
                    if let Err(error) = self.disk.read(at(index), BlockCount::new(1)).await {
                        wrong.push((at(index), error.to_string()));
                    }
                }
                return wrong;
            }
        };
        let blocks = bytes.chunks_exact(crate::types::BLOCK_SIZE as usize);
        for ((index, block), expected) in (0..).zip(blocks).zip(&run.checksums) {
            let found = crc32c::crc32c(block);
            if found != *expected {
                wrong.push((at(index), format!("checksum is {found:#010x}, expected {expected:#010x}")));
            }
        }
        wrong
    }
}

/// Runs with data at or after a block, and where to go on.
type SomeRuns = (Vec<(BlockNr, Run)>, Option<BlockNr>);

fn some_runs(batch: &Batch<'_>, from: BlockNr) -> Plan<SomeRuns> {
    let mut runs = Vec::new();
    let mut next = Some(run_key(from));
    while let Some(key) = next
        && let Some((key, value)) = batch.next(&key)?
        && let Some(block) = physical_block(&key)
    {
        if runs.len() == RUNS_PER_VIEW {
            return Ok((runs, Some(block)));
        }
        let mut behind = block.get() + 1;
        if key.kind == RUN {
            let run = Run::decode(&value).map_err(|error| error.of("run", Some(block), None))?;
            behind = block.get() + run.blocks.get();
            // Borrowed blocks, too: their borrower reads them by checksums of its own.
            if run.kind() == ExtentKind::Data {
                runs.push((block, run));
            }
        }
        next = (behind < PHYSICAL).then(|| run_key(BlockNr::new(behind)));
    }
    Ok((runs, None))
}

fn run_at(batch: &Batch<'_>, start: BlockNr) -> Plan<Option<Run>> {
    let Some(value) = batch.get(&run_key(start))? else { return Ok(None) };
    Ok(Some(Run::decode(&value).map_err(|error| error.of("run", Some(start), None))?))
}

/// Files, with offsets, that have references beginning in a run.
fn users_of(batch: &Batch<'_>, start: BlockNr, blocks: BlockCount) -> Plan<Vec<(InodeNr, u64)>> {
    let mut users = Vec::new();
    // A reference may begin in a run before this one: extents cover several. They are at most as long as a run can be.
    let first = start.get().saturating_sub(crate::format::extent::MAX_RUN_BLOCKS);
    let mut next = Some(run_key(BlockNr::new(first)));
    while let Some(key) = next
        && let Some((key, value)) = batch.next(&key)?
        && let Some(block) = physical_block(&key)
        && block.get() < start.get() + blocks.get()
        && users.len() < REFERENCES_NAMED
    {
        if key.kind == BACKREF {
            let backref = crate::format::extent::Backref::decode(&value)
                .map_err(|error| error.of("back-reference", Some(block), None))?;
            if block.get() + backref.blocks.get() > start.get() {
                let inode = InodeNr::new(key.offset);
                users.push((owner_of_set_aside(inode).unwrap_or(inode), key.minor));
            }
        }
        next = key.successor();
    }
    Ok(users)
}

fn describe(users: &[(InodeNr, u64)]) -> String {
    if users.is_empty() {
        return "no file".to_owned();
    }
    let named = users.iter().map(|(inode, offset)| match borrower_of(*inode) {
        Some(shard) => format!("files of shard {shard}, which borrows it"),
        None => format!("inode {inode}, extent at {offset}"),
    });
    named.collect::<Vec<_>>().join("; ")
}
