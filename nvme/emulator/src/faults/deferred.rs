//! Commands and completions of one queue that wait: for a time, or for a release.
//!
//! Invariants: what is due at the same time leaves in the order it came; a queue's list goes away with the queue, so
//! that a reset forgets what waits.
//!
//! Excludes: carrying out what has become due (`detour`).

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use nvme_spec::{CompletionEntry, SubmissionEntry};

use super::HeldAbort;
use super::book::{Fate, Forgery, RuleId, Verdict};

/// [`DeferredList::next_due_ns`] of a list in which nothing waits for a time.
pub(crate) const NEVER_NS: u64 = u64::MAX;

/// A command that is to be executed later.
#[derive(Debug)]
pub(super) struct WaitingCommand {
    pub(super) entry: SubmissionEntry,
    pub(super) verdict: Verdict,
}

/// What is to be done later.
#[derive(Debug)]
pub(super) enum Deferred {
    Execute(Box<WaitingCommand>),
    /// The command was executed; this completes it.
    Post(CompletionEntry, Option<Forgery>),
}

#[derive(Debug)]
struct Timed {
    due_ns: u64,
    sequence: u64,
    what: Deferred,
}

impl PartialEq for Timed {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Timed {}

impl PartialOrd for Timed {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Timed {
    /// The heap has its greatest on top: that is what is due first.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.due_ns, other.sequence).cmp(&(self.due_ns, self.sequence))
    }
}

#[derive(Debug)]
struct Held {
    rule: RuleId,
    releases: u64,
    abort: HeldAbort,
    command: Box<WaitingCommand>,
}

/// What waits in one queue.
#[derive(Debug, Default)]
pub(crate) struct DeferredList {
    timed: BinaryHeap<Timed>,
    held: Vec<Held>,
    sequence: u64,
}

impl DeferredList {
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.timed.is_empty() && self.held.is_empty()
    }

    /// When the first of what waits for a time is due.
    pub(super) fn next_due_ns(&self) -> u64 {
        self.timed.peek().map_or(NEVER_NS, |first| first.due_ns)
    }

    pub(super) fn at(&mut self, due_ns: u64, what: Deferred) {
        self.sequence += 1;
        self.timed.push(Timed { due_ns, sequence: self.sequence, what });
    }

    pub(super) fn hold(&mut self, rule: RuleId, releases: u64, abort: HeldAbort, command: WaitingCommand) {
        self.held.push(Held { rule, releases, abort, command: Box::new(command) });
    }

    /// The first that is due now.
    pub(super) fn pop_due(&mut self, now_ns: u64) -> Option<Deferred> {
        if self.next_due_ns() > now_ns {
            return None;
        }
        self.timed.pop().map(|first| first.what)
    }

    /// Makes due at once what may go.
    pub(super) fn let_go(&mut self, may_go: impl Fn(RuleId, u64) -> bool) {
        let mut index = 0;
        while index < self.held.len() {
            if may_go(self.held[index].rule, self.held[index].releases) {
                let held = self.held.remove(index);
                self.at(0, Deferred::Execute(held.command));
            } else {
                index += 1;
            }
        }
    }

    /// Makes a command that has not been executed complete as aborted at once; false if there is none that may be.
    pub(crate) fn abort(&mut self, cid: u16) -> bool {
        let wanted = |command: &WaitingCommand| command.entry.cid.get() == cid;
        let held = self.held.iter().position(|h| wanted(&h.command) && h.abort == HeldAbort::Obeyed);
        if let Some(index) = held {
            let mut command = self.held.remove(index).command;
            command.verdict.fate = Fate::Abort;
            self.at(0, Deferred::Execute(command));
            return true;
        }
        let mut timed = std::mem::take(&mut self.timed).into_vec();
        let mut found = false;
        for waiting in &mut timed {
            if let Deferred::Execute(command) = &mut waiting.what
                && wanted(command)
                && !found
            {
                found = command.verdict.fate != Fate::Abort;
                command.verdict.fate = Fate::Abort;
                waiting.due_ns = 0;
            }
        }
        self.timed = timed.into();
        found
    }

    /// Whether a command of this identifier waits, or its completion does.
    pub(super) fn contains(&self, cid: u16) -> bool {
        let timed = self.timed.iter().map(|waiting| match &waiting.what {
            Deferred::Execute(command) => command.entry.cid.get(),
            Deferred::Post(entry, _) => entry.cid.get(),
        });
        let mut all = timed.chain(self.held.iter().map(|held| held.command.entry.cid.get()));
        all.any(|waiting| waiting == cid)
    }
}
