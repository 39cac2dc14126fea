//! What a queue does about commands that fail, are overdue, or were cut off by a reset.
//!
//! | stage | means | commands go out | leaves when |
//! |---|---|---|---|
//! | `Running` | in use | yes | the controller's pulse changes: `Paused`; an abort did not help: `Deleting` |
//! | `Deleting` | the keeper deletes the queue | no | deleted: cleared, `Creating`; the controller is reset instead: `Paused` |
//! | `Paused` | the controller is stopping or being reset | no | it runs: cleared, `Creating`; it has failed: everything completes with the fault |
//! | `Creating` | the keeper creates the queue | no | created: `Running`; the controller is reset again: `Paused` |
//!
//! While commands do not go out, requests are accepted until the queue is full, and wait: whoever submits them sees a pause.
//!
//! Invariants:
//! - the queue's memory is cleared only when the controller does not know the queue: deleted, or reset and not created yet;
//! - completions that were posted before that are taken first, so what succeeded is not repeated;
//! - a request is repeated whole, at most [`MAX_RETRIES`] times for its status, [`MAX_RESETS`] times for resets, and
//!   [`MAX_TIMEOUTS`] times for having been overdue itself; then it fails;
//! - a request whose repetition could do harm is not repeated: it fails, its outcome unknown.

use nvme_spec::CommandId;

use super::nvm::fail_pair;
use super::*;
use crate::admin::timeout_fault;
use crate::controller::Recovery;
use crate::lane::{Answer, Ask, Errand};
use reactor::dma::HeapRegion;

/// Times that a request is repeated because the controller said that it may succeed later (DNR is 0).
pub const MAX_RETRIES: u8 = 4;
/// Times that a request is repeated after its queue was deleted or the controller reset.
pub const MAX_RESETS: u8 = 4;
/// Times that a request is repeated after one of its own commands was overdue.
pub const MAX_TIMEOUTS: u8 = 1;
/// Longest time that an abort is given to show in a completion.
const LONGEST_GRACE: Duration = Duration::from_secs(5);

/// Where the queue stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Running,
    Paused,
    /// Since the controller had this pulse.
    Deleting(Pulse),
    /// Since the controller had this pulse.
    Creating(Pulse),
}

/// An overdue command that was asked to be aborted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Aborting {
    command: CommandId,
    opcode: u8,
    give_up_at: Instant,
}

/// When a command in flight was first seen by the watchdog.
#[derive(Clone, Copy, Debug)]
pub(super) struct Watch {
    pub(super) sequence: u32,
    pub(super) since: Option<Instant>,
}

/// Finds overdue commands without a clock read at submit: a command's time begins when the watchdog first sees it, so
/// it is given its timeout and at most two check intervals more.
#[derive(Debug)]
pub(super) struct Watchdog {
    pub(super) seen: Box<[Watch]>,
    pub(super) polls_left: u32,
    pub(super) next_check: Instant,
    pub(super) timeout: Duration,
    pub(super) interval: Duration,
}

impl Watchdog {
    fn forget(&mut self) {
        self.seen.fill(Watch { sequence: 0, since: None });
    }
}

impl QueuePair {
    /// After the pulse changed: stops sending, or says why nothing can be accepted any more.
    #[cold]
    pub(super) fn pause_or_fail(&mut self) -> Result<(), IoError> {
        if self.may_send() {
            return Ok(());
        }
        let life = self.shared.link.health.life();
        if life.is_final() || life == Life::Stopping && self.shared.link.health.fault().is_some() {
            return Err(IoError::DeviceFailed { detail: self.fault_text() });
        }
        if self.stage == Stage::Running {
            self.pause();
        }
        Ok(())
    }

    fn pause(&mut self) {
        self.stage = Stage::Paused;
        self.pulse = Pulse::NONE;
        (self.aborting, self.looking) = (None, false);
    }

    /// One poll round while the queue is not running as it was.
    #[cold]
    pub(super) fn transition_round(&mut self, budget: usize, sink: &mut dyn FnMut(Completion)) -> usize {
        if self.shared.options.keeper == Keeper::Polled {
            self.shared.turn();
        }
        let pulse = self.shared.link.health.pulse();
        if pulse.life().is_final() {
            return self.failed_round(budget, sink);
        }
        match self.stage {
            _ if pulse.life() != Life::Running => self.pause(),
            Stage::Deleting(asked) | Stage::Creating(asked) if asked != pulse => self.pause(),
            Stage::Running if pulse != self.pulse => self.pause(),
            Stage::Running => {}
            Stage::Paused => self.start_over(pulse),
            Stage::Deleting(_) => {
                // Honest completions still come in.
                let delivered = self.poll_round(budget, sink);
                if self.lane.answer() == Answer::Deleted {
                    self.start_over(pulse);
                }
                return delivered;
            }
            Stage::Creating(_) if self.lane.answer() == Answer::Created => {
                (self.stage, self.pulse) = (Stage::Running, pulse);
                return self.poll_round(budget, sink);
            }
            Stage::Creating(_) => {}
        }
        self.hand_out_done(budget, sink)
    }

    /// Whether the next poll would get on with a transition, as far as that can be told without polling.
    pub(super) fn transition_due(&self) -> bool {
        let pulse = self.shared.link.health.pulse();
        match self.stage {
            Stage::Running => pulse != self.pulse,
            _ if self.shared.options.keeper == Keeper::Polled => true,
            Stage::Paused => {
                pulse.life() == Life::Running || pulse.life().is_final() && self.requests_in_flight() > 0
            }
            Stage::Deleting(asked) | Stage::Creating(asked) => {
                pulse != asked || self.lane.answer() != Answer::Pending
            }
        }
    }

    pub(super) fn hand_out_done(&mut self, budget: usize, sink: &mut dyn FnMut(Completion)) -> usize {
        let mut delivered = 0;
        while delivered < budget
            && let Some(index) = self.done.pop_front()
        {
            self.hand_out(index, sink);
            delivered += 1;
        }
        delivered
    }

    /// Asks the keeper for something.
    fn ask(&mut self, errand: Errand, pulse: Pulse) {
        self.lane.expect();
        self.shared.desk.ask(Ask { lane: Arc::clone(&self.lane), errand, pulse });
        if self.shared.options.keeper == Keeper::Polled {
            self.shared.turn();
        }
    }

    /// The controller does not know the queue any more: takes what had completed, clears the rings, and lines up what is to
    /// be repeated.
    fn start_over(&mut self, pulse: Pulse) {
        if let Err(fault) = self.take_leftovers().and_then(|()| self.check_namespace()) {
            self.shared.fail(fault);
            return;
        }
        self.queue.restart();
        // Sequence numbers begin again: what was seen under the old ones is no measure for the new.
        self.watchdog.forget();
        (self.aborting, self.looking) = (None, false);
        for index in 0..self.ops.capacity() as u16 {
            self.repeat_after_reset(index);
        }
        (self.stage, self.pulse) = (Stage::Creating(pulse), Pulse::NONE);
        self.ask(Errand::Create, pulse);
    }

    fn take_leftovers(&mut self) -> Result<(), Fault> {
        while let Some(reaped) =
            self.queue.poll().map_err(|error| Fault::Protocol { queue: self.queue.id(), error })?
        {
            let (slot, owner) = (reaped.command.slot, reaped.command.owner);
            if let Some(index) = self.command_completed(slot, owner, reaped.status) {
                self.finish_later(index);
            }
        }
        Ok(())
    }

    fn check_namespace(&self) -> Result<(), Fault> {
        let nsid = self.namespace.nsid;
        match self.controller.namespace(nsid) {
            Ok(now) if now.lba_shift == self.namespace.lba_shift && now.blocks >= self.namespace.blocks => {
                Ok(())
            }
            _ => Err(Fault::NamespaceChanged { nsid: nsid.get() }),
        }
    }

    fn repeat_after_reset(&mut self, index: u16) {
        let op = self.ops.get(index);
        if !op.in_use || op.outstanding == 0 {
            return;
        }
        op.unfold(self.simple.lba_shift);
        op.outstanding = 0;
        op.rest.resets += 1;
        if !op.kind.is_repeatable() || op.rest.timeouts > MAX_TIMEOUTS {
            op.fail(IoError::Timeout);
        } else if op.rest.resets > MAX_RESETS {
            let detail = format!("reset {} times with this request on it", op.rest.resets);
            op.fail(IoError::DeviceFailed { detail });
        }
        if op.rest.error.is_none() {
            op.rewind();
            add(&self.counters.retried, 1);
            self.defer(index);
        } else if !op.rest.in_backlog {
            op.rest.repeat = false;
            self.finish_later(index);
        }
    }

    /// Decides what becomes of an operation one of whose commands failed.
    #[cold]
    pub(super) fn command_failed(&mut self, slot: u16, owner: u16, status: Status) {
        let queue = self.queue.id();
        let op = self.ops.get(owner);
        let lba = if op.simple { op.lba } else { self.first_lbas[usize::from(slot)] };
        op.unfold(self.simple.lba_shift);
        let aborted = matches!(status.code(), StatusCode::ABORT_REQUESTED | StatusCode::ABORTED_SQ_DELETION);
        if aborted && op.rest.timeouts > MAX_TIMEOUTS {
            op.fail(IoError::Timeout);
        } else if op.rest.error.is_none() && op.rest.retries < MAX_RETRIES && may_repeat(op.kind, status) {
            op.rest.repeat = true;
            op.rest.blocks_left = 0;
            // Delays are few and numbered from 1; 0 is none.
            let delay = usize::from(status.crd()).checked_sub(1).map(|index| self.retry_delays[index]);
            op.rest.delay = op.rest.delay.max(delay.unwrap_or_default());
        } else {
            let error = io_error(op.kind, queue, lba, status);
            match op.kind {
                Kind::CompareAndWrite => fail_pair(op, status, error),
                _ => op.fail(error),
            }
        }
    }

    /// An operation with nothing outstanding: finished, unless it is to be repeated.
    #[cold]
    pub(super) fn finish_or_repeat(&mut self, index: u16) -> Option<u16> {
        let op = self.ops.get(index);
        if !op.rest.repeat || op.rest.error.is_some() {
            op.rest.repeat = false;
            return Some(index);
        }
        op.rest.retries += 1;
        op.rewind();
        let delay = std::mem::take(&mut op.rest.delay);
        add(&self.counters.retried, 1);
        if delay.is_zero() {
            self.defer(index);
        } else {
            op.rest.in_backlog = true; // not done, though nothing is outstanding
            self.delayed.push((self.shared.link.timing.now() + delay, index));
            self.attention = true;
        }
        None
    }

    /// Puts those whose delay has passed into the backlog.
    #[cold]
    pub(super) fn release_delayed(&mut self) {
        let now = self.shared.link.timing.now();
        let mut at = 0;
        while let Some(&(due, index)) = self.delayed.get(at) {
            if due > now {
                at += 1;
                continue;
            }
            self.delayed.swap_remove(at);
            self.backlog.push_back(index);
        }
    }

    /// Looks for overdue commands, if it is time to.
    #[cold]
    pub(super) fn watch(&mut self) {
        self.watchdog.polls_left = WATCH_POLLS;
        let now = self.shared.link.timing.now();
        if now < self.watchdog.next_check || self.stage != Stage::Running {
            return;
        }
        self.watchdog.next_check = now + self.watchdog.interval;
        if let Some(aborting) = self.aborting
            && self.queue.slots().find(aborting.command).is_ok()
        {
            if now >= aborting.give_up_at {
                self.escalate(aborting);
            }
            return;
        }
        self.aborting = None;
        if self.looking && self.lane.answer() == Answer::Pending {
            return;
        }
        self.looking = false;
        let (mut overdue, mut slow) = (None, false);
        for (cid, command) in self.queue.slots().commands() {
            let seen = &mut self.watchdog.seen[usize::from(command.slot)];
            match seen.since {
                Some(since) if seen.sequence == command.sequence => {
                    let age = now.duration_since(since);
                    slow |= age >= self.watchdog.interval;
                    if age >= self.watchdog.timeout {
                        overdue = Some((cid, command));
                    }
                }
                _ => *seen = Watch { sequence: command.sequence, since: Some(now) },
            }
        }
        if let Some((command, found)) = overdue.filter(|_| !is_planted(Bug::OverdueIgnored)) {
            self.overdue(command, found.owner, now);
        } else if slow {
            // A removed or failed controller is not waited for until the timeout.
            self.looking = true;
            self.ask(Errand::Look, self.pulse);
        }
    }

    fn overdue(&mut self, command: CommandId, owner: u16, now: Instant) {
        let queue = self.queue.id();
        if let Ok(csts) = self.shared.link.status()
            && csts.cfs()
        {
            // The controller's fault, not the command's: it does not count against the request.
            self.shared.fail_since(self.pulse, Fault::FatalStatus { csts: csts.into() });
            return;
        }
        let op = self.ops.get(owner);
        op.unfold(self.simple.lba_shift);
        op.rest.timeouts += 1;
        let opcode = build::opcode(op.kind).0;
        let (timeout, pulse) = (self.watchdog.timeout, self.pulse);
        add(&self.counters.timeouts, 1);
        tracing::warn!(device = %self.shared.name, %queue, %command, opcode, "command is overdue");
        if self.shared.options.recovery == Recovery::Off {
            op.rest.error.get_or_insert(IoError::Timeout);
            let fault = timeout_fault(&self.shared.link, queue, command, opcode, timeout);
            self.shared.fail(fault);
            return;
        }
        let grace = (timeout / 4).clamp(self.watchdog.interval, LONGEST_GRACE);
        self.aborting = Some(Aborting { command, opcode, give_up_at: now + grace });
        self.ask(Errand::Abort { command }, pulse);
    }

    /// The abort did not help: the queue has to go, with everything on it.
    fn escalate(&mut self, aborting: Aborting) {
        let Aborting { command, opcode, .. } = aborting;
        let (timeout, pulse) = (self.watchdog.timeout, self.pulse);
        tracing::warn!(
            device = %self.shared.name, queue = %self.queue.id(), %command, answer = ?self.lane.answer(),
            "the abort did not help"
        );
        (self.stage, self.pulse) = (Stage::Deleting(pulse), Pulse::NONE);
        self.ask(Errand::Delete { command, opcode, timeout }, pulse);
    }

    /// One poll round after the end of the controller: hands everything out.
    fn failed_round(&mut self, budget: usize, sink: &mut dyn FnMut(Completion)) -> usize {
        let life = self.shared.link.health.life();
        if !self.settled {
            self.settled = true;
            self.pulse = Pulse::NONE;
            self.queue.slots_mut().release_all();
            self.backlog.clear();
            self.done.clear();
            self.delayed.clear();
        }
        let detail = self.fault_text();
        let mut delivered = 0;
        while delivered < budget
            && let Some(index) = self.ops.any_in_use()
        {
            let op = self.ops.get(index);
            op.fail(IoError::DeviceFailed { detail: detail.clone() });
            if life == Life::Abandoned {
                op.buffer = op.buffer.take().and_then(substitute);
            }
            self.hand_out(index, sink);
            delivered += 1;
        }
        delivered
    }

    fn fault_text(&self) -> String {
        self.controller.fault().map_or_else(|| "unknown fault".to_owned(), ToString::to_string)
    }
}

/// Whether a command with this status may be sent again (§4.6.1). A comparison that failed is an answer. A flush that failed
/// may have lost what it was to make durable, and the next one would succeed all the same: it is repeated only if it was
/// not begun.
fn may_repeat(kind: Kind, status: Status) -> bool {
    let code = status.code();
    let not_begun = [
        StatusCode::NAMESPACE_NOT_READY,
        StatusCode::COMMAND_INTERRUPTED,
        StatusCode::ABORTED_SQ_DELETION,
        StatusCode::ABORT_REQUESTED,
    ];
    !status.dnr()
        && kind.is_repeatable()
        && code != StatusCode::COMPARE_FAILURE
        && (kind != Kind::Flush || not_begun.contains(&code))
}

/// A buffer that the device cannot reach, with the contents of one that it may write to for ever, which is never reused.
fn substitute(buffer: DmaBuffer) -> Option<DmaBuffer> {
    let copied = HeapRegion::new(buffer.len().next_power_of_two().max(4096))
        .ok()
        .and_then(|region| DmaPool::new(region).try_alloc(buffer.len()));
    let copied = copied.map(|mut copy| {
        let mut chunk = [0; 4096];
        let mut at = 0;
        while at < buffer.len() {
            let n = chunk.len().min(buffer.len() - at);
            buffer.read_at(at, &mut chunk[..n]);
            copy.write_at(at, &chunk[..n]);
            at += n;
        }
        copy
    });
    buffer.quarantine();
    copied
}
