//! Relocations as a whole: which groups are emptied, in which order, and when one counts as done.
//!
//! Owns: [`Relocation`], which says what to ask the volume next and takes the answers, so that it serves callers on
//! reactors and on ordinary threads; [`Volume::relocate`] and [`Volume::relocate_blocking`], which drive it.
//!
//! | a group | goes on with |
//! |---|---|
//! | holds something, and the last pass moved something, or there is no reason why it is there | another pass, up to `MAX_PASSES` |
//! | holds something that no pass can move | is *left*, with the reasons |
//! | holds only blocks that superblocks still need | checkpoints, up to `MAX_SETTLES` |
//! | is free | is *emptied* |
//!
//! After that it is opened again. Of several groups the emptiest come first: they make room for the others.
//!
//! Invariant: memory is bounded by the number of groups and `LEFT_TOLD`. Interrupted at any moment, a relocation has simply
//! moved less: its lease ends with it, and a group without a lease opens.
//!
//! Excludes: how a step is done (`shard/relocate.rs`).

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use serde::Serialize;

use crate::alloc::reserve_of;
use crate::error::FsError;
use crate::request::{GroupFigures, GroupLease, RelocateStep, Relocated, Reply, Request};
use crate::types::{BLOCK_SIZE, ShardId};
use crate::volume::Volume;

/// Times that a group is gone through.
const MAX_PASSES: u32 = 8;

/// Checkpoints that a group may take to become free.
const MAX_SETTLES: u32 = 4;

/// Reasons that a report holds.
const LEFT_TOLD: usize = 1000;

/// What is to be emptied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelocateScope {
    /// One group.
    Group(u64),
    /// Every group that holds something, one after the other.
    All,
    /// Every group from this one on. All are closed before the first is emptied, and stay closed: see [`Relocation::opening`].
    Tail(u64),
}

/// How far a relocation is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RelocateProgress {
    /// Groups dealt with.
    pub groups_done: u64,
    /// Groups in all.
    pub groups: u64,
    /// Blocks dealt with, nodes included.
    pub blocks_done: u64,
    /// Blocks in all, as of the beginning.
    pub blocks: u64,
}

/// What a relocation has done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RelocateReport {
    /// Groups that are free now.
    pub groups_emptied: u64,
    /// Groups that still hold something.
    pub groups_left: u64,
    /// Blocks of data that were moved.
    pub blocks: u64,
    /// References that were turned to their new places.
    pub references: u64,
    /// Tree nodes that were moved.
    pub nodes: u64,
    /// What could not be moved, and why; not more than a thousand.
    pub left: Vec<String>,
    /// Whether it was ended before its time.
    pub cancelled: bool,
}

/// Why a relocation could not be done, or not to its end. What was moved is moved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RelocateError {
    /// There is no such group.
    #[error("there is no group {group}: the volume has groups 0 to {last}")]
    NoGroup {
        /// The group asked for.
        group: u64,
        /// The last one there is.
        last: u64,
    },
    /// The groups before a tail cannot hold what the volume holds.
    #[error("what the volume holds needs at least {groups} groups")]
    TooSmall {
        /// Groups that might do.
        groups: u64,
    },
    /// What is in the group has no other place.
    #[error("no room for the {} MiB in group {group}: free as much in shard {shard} first", (blocks * BLOCK_SIZE).div_ceil(1 << 20))]
    NoSpace {
        /// The group.
        group: u64,
        /// Its shard.
        shard: u8,
        /// Blocks in it.
        blocks: u64,
    },
    /// The volume.
    #[error(transparent)]
    Volume(#[from] FsError),
}

/// A group to be emptied.
#[derive(Clone, Debug)]
struct Job {
    shard: ShardId,
    figures: GroupFigures,
    lease: GroupLease,
    step: RelocateStep,
    pass: u32,
    settles: u32,
    /// Whether this pass has moved anything.
    moved: bool,
    left: Vec<String>,
}

/// A relocation on its way. See the module documentation.
#[derive(Debug)]
pub struct Relocation {
    scope: RelocateScope,
    shards: u8,
    /// Shards whose groups are known.
    listed: u8,
    /// Groups to come, the next one last.
    waiting: Vec<(ShardId, GroupFigures, GroupLease)>,
    /// How many of them are closed, if all have to be before the first is emptied.
    closed: usize,
    /// Groups that are done with and stay closed.
    held: Vec<(ShardId, u64, GroupLease)>,
    /// Every group of the volume.
    all: Vec<(ShardId, GroupFigures)>,
    last_group: u64,
    current: Option<Job>,
    progress: RelocateProgress,
    report: RelocateReport,
}

impl Relocation {
    /// A relocation on a volume of `shards` shards.
    pub fn new(scope: RelocateScope, shards: u8) -> Self {
        Self {
            scope,
            shards,
            listed: 0,
            waiting: Vec::new(),
            closed: 0,
            held: Vec::new(),
            all: Vec::new(),
            last_group: 0,
            current: None,
            progress: RelocateProgress::default(),
            report: RelocateReport::default(),
        }
    }

    /// What to ask the volume; `None` at the end.
    pub fn request(&self) -> Option<Request> {
        if self.listed < self.shards {
            return ShardId::new(self.listed).map(|shard| Request::Groups { shard });
        }
        if let Some((shard, figures, lease)) = self.to_close() {
            let (shard, group, lease) = (*shard, figures.group, lease.clone());
            return Some(Request::Relocate { shard, group, step: RelocateStep::Close, lease });
        }
        let job = self.current.as_ref()?;
        let (group, lease) = (job.figures.group, job.lease.clone());
        Some(Request::Relocate { shard: job.shard, group, step: job.step, lease })
    }

    /// Takes the answer to what was asked last.
    ///
    /// # Errors
    /// [`RelocateError`]; then this is the end.
    pub fn supply(&mut self, answer: Result<Reply, FsError>) -> Result<(), RelocateError> {
        match answer {
            Ok(Reply::Groups(groups)) => self.list(groups),
            Ok(Reply::Relocated(done)) => {
                if self.to_close().is_some() {
                    self.has_closed(done.group);
                } else {
                    self.advance(done);
                }
                Ok(())
            }
            Err(FsError::NoSpace) => self.no_space(),
            Ok(other) => Err(FsError::Io(format!("the volume gave a wrong answer: {other:?}")).into()),
            Err(error) => Err(error.into()),
        }
    }

    /// Ends it as soon as the group at hand is open again.
    pub fn cancel(&mut self) {
        self.report.cancelled = true;
        self.listed = self.shards;
        let waiting = self.waiting.drain(..).map(|(shard, figures, lease)| (shard, figures.group, lease));
        self.held.extend(waiting);
        if let Some(job) = &mut self.current {
            job.step = RelocateStep::Open;
        }
    }

    /// Requests that open the groups which a [tail](RelocateScope::Tail) has left closed.
    pub fn opening(&self) -> Vec<Request> {
        let waiting = self.waiting.iter().map(|(shard, figures, lease)| (*shard, figures.group, lease));
        let current = self.current.iter().map(|job| (job.shard, job.figures.group, &job.lease));
        let held = self.held.iter().map(|(shard, group, lease)| (*shard, *group, lease));
        let closed = waiting.chain(current).chain(held);
        closed
            .map(|(shard, group, lease)| {
                let step = RelocateStep::Open;
                Request::Relocate { shard, group, step, lease: lease.clone() }
            })
            .collect()
    }

    /// How far it is.
    pub fn progress(&self) -> RelocateProgress {
        let blocks = self.progress.blocks.max(self.progress.blocks_done);
        RelocateProgress { blocks, ..self.progress }
    }

    /// What it has done so far.
    pub fn report(&self) -> &RelocateReport {
        &self.report
    }

    /// What it has done.
    pub fn into_report(self) -> RelocateReport {
        self.report
    }

    fn list(&mut self, groups: Vec<GroupFigures>) -> Result<(), RelocateError> {
        let shard = ShardId::new(self.listed).ok_or(FsError::Invalid)?;
        self.listed += 1;
        self.last_group = groups.iter().map(|group| group.group).chain([self.last_group]).max().unwrap_or(0);
        self.all.extend(groups.into_iter().map(|group| (shard, group)));
        if self.listed < self.shards {
            return Ok(());
        }
        let wanted = |(_, group): &&(ShardId, GroupFigures)| match self.scope {
            RelocateScope::Group(number) => group.group == number,
            RelocateScope::All => group.in_use() > 0,
            RelocateScope::Tail(first) => group.group >= first,
        };
        let wanted = self.all.iter().filter(wanted);
        self.waiting = wanted.map(|(shard, group)| (*shard, *group, GroupLease::default())).collect();
        if let (RelocateScope::Group(group), true) = (self.scope, self.waiting.is_empty()) {
            return Err(RelocateError::NoGroup { group, last: self.last_group });
        }
        if let RelocateScope::Tail(first) = self.scope {
            let groups = groups_needed(&self.all);
            if groups > first {
                return Err(RelocateError::TooSmall { groups });
            }
        }
        self.waiting.sort_by_key(|(_, group, _)| std::cmp::Reverse((group.in_use(), group.group)));
        self.progress.groups = self.waiting.len() as u64;
        self.progress.blocks = self.waiting.iter().map(|(_, group, _)| group.in_use()).sum();
        if self.to_close().is_none() {
            self.next_group();
        }
        Ok(())
    }

    /// The group to be closed before any is emptied.
    fn to_close(&self) -> Option<&(ShardId, GroupFigures, GroupLease)> {
        matches!(self.scope, RelocateScope::Tail(_)).then(|| self.waiting.get(self.closed)).flatten()
    }

    fn has_closed(&mut self, figures: GroupFigures) {
        self.waiting[self.closed].1 = figures;
        self.closed += 1;
        if self.to_close().is_some() {
            return;
        }
        // Nothing comes into these any more.
        let empty = self.waiting.extract_if(.., |(_, figures, _)| figures.in_use() + figures.pinned == 0);
        let empty: Vec<_> = empty.collect();
        self.progress.groups_done += empty.len() as u64;
        self.held.extend(empty.into_iter().map(|(shard, figures, lease)| (shard, figures.group, lease)));
        self.closed = usize::MAX;
        self.next_group();
    }

    fn next_group(&mut self) {
        self.current = self.waiting.pop().map(|(shard, figures, lease)| Job {
            shard,
            figures,
            lease,
            step: RelocateStep::START,
            pass: 1,
            settles: 0,
            moved: false,
            left: Vec::new(),
        });
    }

    fn advance(&mut self, done: Relocated) {
        let Some(job) = &mut self.current else { return };
        if job.step == RelocateStep::Open {
            self.progress.groups_done += 1;
            self.next_group();
            return;
        }
        job.figures = done.group;
        job.moved |= done.blocks + done.nodes > 0;
        job.left.extend(done.left);
        self.progress.blocks_done += done.blocks + done.nodes * crate::format::group::CLUSTER_BLOCKS;
        self.report.blocks += done.blocks;
        self.report.references += done.references;
        self.report.nodes += done.nodes;
        job.step = match done.next {
            Some(next) => next,
            None => job.after_settling(),
        };
        if job.step == RelocateStep::Open {
            self.close_account();
            if matches!(self.scope, RelocateScope::Tail(_))
                && let Some(job) = self.current.take()
            {
                self.held.push((job.shard, job.figures.group, job.lease));
                self.progress.groups_done += 1;
                self.next_group();
            }
        }
    }

    /// The group at hand is done with.
    fn close_account(&mut self) {
        let Some(job) = &mut self.current else { return };
        if job.figures.in_use() + job.figures.pinned == 0 {
            self.report.groups_emptied += 1;
            return;
        }
        self.report.groups_left += 1;
        if job.left.is_empty() {
            let blocks = job.figures.in_use();
            job.left.push(format!("{blocks} blocks: in use all the time, or written while they were moved"));
        }
        let group = job.figures.group;
        let room = LEFT_TOLD.saturating_sub(self.report.left.len());
        self.report.left.extend(job.left.drain(..).take(room).map(|why| format!("group {group}: {why}")));
    }

    fn no_space(&mut self) -> Result<(), RelocateError> {
        if let RelocateScope::Tail(first) = self.scope {
            // What remains would do, but for being in pieces, or promised to writes.
            return Err(RelocateError::TooSmall { groups: groups_needed(&self.all).max(first + 1) });
        }
        let Some(job) = &mut self.current else { return Err(FsError::NoSpace.into()) };
        let error = RelocateError::NoSpace {
            group: job.figures.group,
            shard: job.shard.get(),
            blocks: job.figures.in_use(),
        };
        if matches!(self.scope, RelocateScope::Group(_)) || job.step == RelocateStep::Open {
            return Err(error);
        }
        job.left.push(error.to_string());
        job.step = RelocateStep::Open;
        self.close_account();
        Ok(())
    }
}

/// Groups, from the first on, that can hold what all of them hold, and what the shards keep in reserve.
fn groups_needed(all: &[(ShardId, GroupFigures)]) -> u64 {
    let mut by_number: Vec<_> = all.iter().collect();
    by_number.sort_by_key(|(_, group)| group.group);
    let in_use: u64 = all.iter().map(|(_, group)| group.in_use()).sum();
    let mut capacities: BTreeMap<ShardId, u64> = BTreeMap::new();
    for (shard, group) in by_number {
        *capacities.entry(*shard).or_default() += group.capacity;
        let spare: u64 = capacities.values().map(|capacity| capacity - reserve_of(*capacity)).sum();
        if spare >= in_use {
            return group.group + 1;
        }
    }
    all.len() as u64
}

impl Job {
    /// What follows a checkpoint.
    fn after_settling(&mut self) -> RelocateStep {
        // What is left for no reason was on its way: a node of the open epoch, blocks of a write or a deletion that has not ended.
        let worthwhile = self.moved || self.left.is_empty();
        if self.figures.in_use() > 0 && worthwhile && self.pass < MAX_PASSES {
            self.pass += 1;
            self.moved = false;
            self.left.clear();
            return RelocateStep::START;
        }
        if self.figures.in_use() == 0 && self.figures.pinned > 0 && self.settles < MAX_SETTLES {
            self.settles += 1;
            return RelocateStep::Settle;
        }
        RelocateStep::Open
    }
}

impl Volume {
    /// Moves everything out of groups while the volume is in use. `watch` sees how far it is after every step, and may
    /// end it. In a task of any reactor.
    ///
    /// # Errors
    /// [`RelocateError`].
    pub async fn relocate(
        &self,
        scope: RelocateScope,
        mut watch: impl FnMut(RelocateProgress) -> ControlFlow<()>,
    ) -> Result<RelocateReport, RelocateError> {
        let mut relocation = Relocation::new(scope, self.shards());
        while let Some(request) = relocation.request() {
            relocation.supply(self.call(request).await)?;
            if watch(relocation.progress()).is_break() {
                relocation.cancel();
            }
        }
        Ok(relocation.into_report())
    }

    /// As [`Self::relocate`], on an ordinary thread.
    ///
    /// # Errors
    /// [`RelocateError`].
    pub fn relocate_blocking(
        &self,
        scope: RelocateScope,
        mut watch: impl FnMut(RelocateProgress) -> ControlFlow<()>,
    ) -> Result<RelocateReport, RelocateError> {
        let mut relocation = Relocation::new(scope, self.shards());
        while let Some(request) = relocation.request() {
            relocation.supply(self.call_blocking(request))?;
            if watch(relocation.progress()).is_break() {
                relocation.cancel();
            }
        }
        Ok(relocation.into_report())
    }
}
