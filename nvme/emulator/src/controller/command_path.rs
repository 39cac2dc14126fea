//! The path of a command: doorbell, arbitration, fetch, execute, complete.
//!
//! Invariants:
//! - commands are executed only in state `Ready`;
//! - the I/O path takes the lock of its own submission queue, of its completion queue while posting, and none shared
//!   by all; the controller's own lock (`admin`) is taken there only for errors and events;
//! - a command completes exactly once, or is held (asynchronous event request), or vanishes in a reset.
//!
//! With fault rules or a latency model, commands leave this path for `faults::detour` between fetch and execute.
//!
//! Excludes: what commands do (`admin`, `io`), threads (`worker`).

use std::sync::atomic::Ordering;
use std::time::Duration;

use nvme_spec::log::{AsyncEvent, LogPageId};
use nvme_spec::registers::{self, Doorbell};
use nvme_spec::{CompletionEntry, Status, StatusCode, SubmissionEntry};

use super::Core;
use crate::config::Mode;
use crate::locks::lock;
use crate::queue::{CompletionSlot, DoorbellCheck, Posted, SubmissionQueue, SubmissionSlot, bump};
use crate::registers::State;

/// Async event type: error.
const EVENT_ERROR: u8 = 0;
/// Error event: write to a doorbell that belongs to no queue.
const INFO_INVALID_DOORBELL: u8 = 0;
/// Error event: a doorbell value that cannot be.
const INFO_INVALID_DOORBELL_VALUE: u8 = 1;

/// A submission queue on whose behalf commands are run, with its lock held.
pub(crate) struct Lane<'a> {
    pub(crate) qid: u16,
    pub(crate) slot: &'a SubmissionSlot,
    pub(crate) completion: &'a CompletionSlot,
    /// To be told at the end.
    vector: Option<u16>,
}

/// What executing a command led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Completed with this dword 0.
    Done(u32),
    /// Completes later, or never.
    Held,
}

impl Core {
    #[inline]
    pub(crate) fn is_ready(&self) -> bool {
        self.registers.state() == State::Ready
    }

    /// A doorbell write (§3.1.24, §3.1.25).
    #[inline]
    pub(crate) fn doorbell(&self, offset: u64, value: u32) {
        if !self.is_ready() {
            return;
        }
        let at = registers::doorbell_at(self.config.dstrd, offset);
        let Some((qid, which, slot)) =
            at.and_then(|(q, w)| Some((q.get(), w, self.submission.get(usize::from(q.get()))?)))
        else {
            return self.bad_doorbell(DoorbellCheck::NoQueue);
        };
        match which {
            Doorbell::SubmissionTail => match slot.ring_doorbell(value) {
                DoorbellCheck::Accepted => self.notify(qid),
                bad => self.bad_doorbell(bad),
            },
            Doorbell::CompletionHead => {
                let (check, stalled) = self.completion[usize::from(qid)].ring_doorbell(value);
                if check != DoorbellCheck::Accepted {
                    self.bad_doorbell(check);
                } else if stalled {
                    self.resume(qid);
                }
            }
        }
    }

    /// Sees to it that the queue is looked at.
    #[inline]
    pub(crate) fn notify(&self, qid: u16) {
        match self.config.mode {
            Mode::Inline => {
                self.run_queue(qid, u32::MAX);
            }
            Mode::Stepped => {}
            Mode::Threaded(_) => self.workers.wake_for(qid),
        }
    }

    /// A completion queue that was full got room.
    #[cold]
    fn resume(&self, cqid: u16) {
        if cqid == 0 {
            self.post_late();
        }
        for (qid, slot) in (0..).zip(&self.submission) {
            if slot.exists() && slot.cqid() == cqid {
                slot.kick();
                self.notify(qid);
            }
        }
    }

    #[cold]
    fn bad_doorbell(&self, check: DoorbellCheck) {
        tracing::warn!(?check, "invalid doorbell write");
        let information = match check {
            DoorbellCheck::BadValue => INFO_INVALID_DOORBELL_VALUE,
            DoorbellCheck::NoQueue | DoorbellCheck::Accepted => INFO_INVALID_DOORBELL,
        };
        let event = AsyncEvent::new()
            .with_event_type(EVENT_ERROR)
            .with_information(information)
            .with_log_page(LogPageId::ERROR.0);
        self.report_event(event);
    }

    /// One arbitration round over the queues `first`, `first + step`, …: up to the burst from each. Returns the number of
    /// commands executed.
    pub(crate) fn round(&self, first: usize, step: usize) -> usize {
        if !self.is_ready() {
            return 0;
        }
        if first == 0 {
            self.check_keep_alive();
        }
        let burst = match self.burst.load(Ordering::Relaxed) {
            7.. => u32::MAX,
            ab => 1 << ab,
        };
        let mut executed = 0;
        let mut now = None;
        for qid in (first..self.submission.len()).step_by(step) {
            let slot = &self.submission[qid];
            let mut due =
                || slot.due_ns().is_some_and(|due| due <= *now.get_or_insert_with(|| self.now_ns()));
            // What a shadow tail says is only known by looking.
            if slot.has_work() || slot.is_shadowed() || due() {
                executed += self.run_queue(qid as u16, burst) as usize;
            }
        }
        executed
    }

    /// Whether a round over these queues would find something to do.
    pub(crate) fn has_work(&self, first: usize, step: usize) -> bool {
        self.is_ready() && self.submission.iter().skip(first).step_by(step).any(SubmissionSlot::has_work)
    }

    /// When the next of what waits in these queues is due, in the controller's nanoseconds.
    pub(crate) fn next_due_ns(&self, first: usize, step: usize) -> Option<u64> {
        let slots = self.submission.iter().skip(first).step_by(step);
        let keep_alive = if first == 0 { self.keep_alive.deadline_ns() } else { None };
        if self.is_ready() { slots.filter_map(SubmissionSlot::due_ns).chain(keep_alive).min() } else { None }
    }

    pub(crate) fn now_ns(&self) -> u64 {
        self.clock.now_ns()
    }

    pub(super) fn advance(&self, by: Duration) {
        self.clock.advance(by);
        if self.config.mode == Mode::Inline {
            self.check_keep_alive();
            for (qid, slot) in (0..).zip(&self.submission) {
                if slot.due_ns().is_some_and(|due| due <= self.now_ns()) {
                    self.run_queue(qid, u32::MAX);
                }
            }
        }
    }

    /// Executes up to `burst` commands of a queue and what has become due; returns their number.
    #[inline]
    fn run_queue(&self, qid: u16, burst: u32) -> u32 {
        let slot = &self.submission[usize::from(qid)];
        let mut guard = lock(&slot.queue);
        slot.take_kick();
        let Some(queue) = guard.as_mut() else { return 0 };
        let completion = &self.completion[usize::from(slot.cqid())];
        let mut lane = Lane { qid, slot, completion, vector: None };
        let mut executed = 0;
        let mut due = 0;
        if let Some(entry) = queue.unposted.take() {
            self.complete(&mut lane, queue, entry);
        }
        if !queue.deferred.is_empty() {
            due += self.run_deferred(&mut lane, queue);
        }
        while executed < burst && queue.unposted.is_none() && self.is_ready() {
            let (entry, aborted) = match queue.fetch(slot) {
                Ok(Some(fetched)) => fetched,
                Ok(None) => break,
                Err(_) => {
                    self.fail("a submission queue's memory is not mapped");
                    break;
                }
            };
            executed += 1;
            // After the fetch, whose acquire load of the tail makes rules visible that were added before the doorbell.
            if self.faults.commands_armed() || self.latency.is_modelled() {
                self.detour(&mut lane, queue, entry, aborted);
                continue;
            }
            let result = if aborted {
                Err(StatusCode::ABORT_REQUESTED)
            } else {
                self.execute(qid, slot, queue, &entry)
            };
            let (dw0, status) = match result {
                Ok(Outcome::Done(dw0)) => (dw0, Status::SUCCESS),
                Ok(Outcome::Held) => continue,
                Err(code) => (0, self.command_failed(qid, &entry, code)),
            };
            let done = completion_entry(qid, queue.head(), entry.cid.get(), dw0, status);
            self.complete(&mut lane, queue, done);
        }
        if !queue.deferred.is_empty() {
            due += self.run_deferred(&mut lane, queue);
        }
        bump(&slot.stats.commands, u64::from(executed));
        if let Some(vector) = lane.vector {
            self.raise(vector);
        }
        executed + due
    }

    #[inline]
    pub(crate) fn execute(
        &self,
        qid: u16,
        slot: &SubmissionSlot,
        queue: &mut SubmissionQueue,
        entry: &SubmissionEntry,
    ) -> Result<Outcome, StatusCode> {
        if qid == 0 { self.execute_admin(queue, entry) } else { self.execute_io(slot, queue, entry) }
    }

    /// Posts a completion, or keeps it in the queue until there is room.
    #[inline]
    pub(crate) fn complete(&self, lane: &mut Lane<'_>, queue: &mut SubmissionQueue, entry: CompletionEntry) {
        let posted = lane.completion.post(entry);
        self.note_posted(lane, queue, entry, posted);
    }

    /// Draws the consequences of posting an entry.
    #[inline]
    pub(crate) fn note_posted(
        &self,
        lane: &mut Lane<'_>,
        queue: &mut SubmissionQueue,
        entry: CompletionEntry,
        posted: Posted,
    ) {
        match posted {
            Posted::Yes(to) => {
                lane.vector = to;
                lane.slot.set_blocked(false);
                queue.last_cid = Some(entry.cid.get());
            }
            Posted::Full => {
                queue.unposted = Some(entry);
                lane.slot.set_blocked(true);
            }
            Posted::Gone => {}
            Posted::Unmapped => self.fail("a completion queue's memory is not mapped"),
        }
    }

    /// Posts a completion to the admin queue from outside its command loop.
    pub(crate) fn post_admin(&self, cid: u16, dw0: u32, status: Status) {
        let head = self.submission[0].head();
        lock(&self.admin).late.push_back(completion_entry(0, head, cid, dw0, status));
        self.post_late();
    }

    /// Posts what waits for room in the admin completion queue.
    fn post_late(&self) {
        let mut vector = None;
        loop {
            let Some(entry) = lock(&self.admin).late.pop_front() else { break };
            match self.completion[0].post(entry) {
                Posted::Yes(to) => vector = to,
                Posted::Full => {
                    lock(&self.admin).late.push_front(entry);
                    break;
                }
                Posted::Gone => {}
                Posted::Unmapped => self.fail("the admin completion queue's memory is not mapped"),
            }
        }
        if let Some(vector) = vector {
            self.raise(vector);
        }
    }

    pub(crate) fn raise(&self, vector: u16) {
        if let Some(vector) = self.vectors.get(usize::from(vector)) {
            vector.raise();
        }
    }

    /// Turns a code into the completion's status and logs the error (§5.14.1.1).
    #[cold]
    pub(crate) fn command_failed(&self, qid: u16, entry: &SubmissionEntry, code: StatusCode) -> Status {
        tracing::debug!(qid, cid = entry.cid.get(), opcode = entry.opcode, status = %code, "command failed");
        let status = Status::from_code(code).with_dnr(!may_succeed_later(code)).with_more(true);
        lock(&self.admin).log_error(qid, entry, status);
        if code == StatusCode::WRITE_FAULT {
            self.report_warnings(); // the medium may be read-only now
        }
        status
    }

    /// A fatal error: CSTS.CFS, and nothing more is executed until a reset.
    #[cold]
    pub(crate) fn fail(&self, why: &str) {
        tracing::error!(why, "controller fatal status");
        self.registers.fail_if_enabled();
    }
}

pub(crate) fn completion_entry(qid: u16, head: u32, cid: u16, dw0: u32, status: Status) -> CompletionEntry {
    let mut entry = CompletionEntry::default();
    entry.dw0.set(dw0);
    entry.sq_head.set(head as u16);
    entry.sq_id.set(qid);
    entry.cid.set(cid);
    entry.set_status(status, false);
    entry
}

/// Whether the same command might succeed if it were sent again (§4.6.1, DNR).
fn may_succeed_later(code: StatusCode) -> bool {
    matches!(
        code,
        StatusCode::ABORT_REQUESTED
            | StatusCode::CAPACITY_EXCEEDED
            | StatusCode::WRITE_FAULT
            | StatusCode::UNRECOVERED_READ_ERROR
            | StatusCode::AER_LIMIT_EXCEEDED
    )
}
