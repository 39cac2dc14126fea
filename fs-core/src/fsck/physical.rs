//! The runs of a shard and the references to them, in the order of the blocks.
//!
//! Owns: [`Sweep`], which goes over runs and back-references once, in key order, and compares at every block the
//! number of references that cover it with the count in its run. It holds the run it is in and the references that
//! cover the present block, no more.
//!
//! Excludes: whether a back-reference has its extent (`pairs.rs`), which blocks are marked (`space.rs`).

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::types::{BlockCount, BlockNr, ShardId};

use super::finding::{Finding, Findings};

/// What an extent must have in common with its runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RunNature {
    pub(super) generation: u64,
    pub(super) preallocated: u64,
}

struct OpenRun {
    end: u64,
    references: u32,
    nature: RunNature,
    reported: bool,
}

/// See the module documentation.
pub(super) struct Sweep {
    shard: ShardId,
    position: u64,
    run: Option<OpenRun>,
    /// References that cover the position: where they end, and what the run was in which they began.
    covering: BinaryHeap<Reverse<(u64, RunNature)>>,
}

impl Sweep {
    pub(super) fn new(shard: ShardId) -> Self {
        Self { shard, position: 0, run: None, covering: BinaryHeap::new() }
    }

    /// Goes on to a run.
    pub(super) fn run(
        &mut self,
        start: BlockNr,
        blocks: BlockCount,
        references: u32,
        nature: RunNature,
        findings: &mut Findings,
    ) {
        self.advance(start.get(), findings);
        let shard = self.shard;
        if self.run.as_ref().is_some_and(|run| run.end > start.get()) {
            findings.add(Finding::RunOverlap { shard, start });
        }
        if self.covering.iter().any(|Reverse((end, other))| *end > start.get() && *other != nature) {
            findings.add(Finding::RunMixed { shard, start });
        }
        let end = start.get().saturating_add(blocks.get());
        self.run = Some(OpenRun { end, references, nature, reported: false });
    }

    /// Goes on to a back-reference. Returns what the run is that it begins in.
    pub(super) fn backref(
        &mut self,
        start: BlockNr,
        blocks: BlockCount,
        findings: &mut Findings,
    ) -> RunNature {
        self.advance(start.get(), findings);
        let run = self.run.as_ref().filter(|run| run.end > start.get());
        let nature = run.map_or_else(RunNature::default, |run| run.nature);
        self.covering.push(Reverse((start.get().saturating_add(blocks.get()), nature)));
        nature
    }

    /// Goes on to the end.
    pub(super) fn finish(mut self, findings: &mut Findings) {
        self.advance(u64::MAX, findings);
    }

    fn advance(&mut self, to: u64, findings: &mut Findings) {
        while self.position < to {
            while self.covering.peek().is_some_and(|Reverse((end, _))| *end <= self.position) {
                self.covering.pop();
            }
            self.run.take_if(|run| run.end <= self.position);
            let first_end = self.covering.peek().map(|Reverse((end, _))| *end);
            let run_end = self.run.as_ref().map(|run| run.end);
            let Some(stop) = [first_end, run_end].into_iter().flatten().min() else {
                self.position = to;
                return;
            };
            let stop = stop.min(to);
            let (shard, start, counted) =
                (self.shard, BlockNr::new(self.position), self.covering.len() as u64);
            match &mut self.run {
                Some(run) if u64::from(run.references) != counted && !run.reported => {
                    run.reported = true;
                    findings.add(Finding::RunReferences { shard, start, stored: run.references, counted });
                }
                Some(_) => {}
                None => {
                    let count = BlockCount::new(stop - self.position);
                    findings.add(Finding::NoRun { shard, start, count });
                }
            }
            self.position = stop;
        }
    }
}
