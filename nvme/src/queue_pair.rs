//! One I/O queue pair and one namespace behind [`BlockDevice`].
//!
//! Owns: a `Queue`, the requests on it, the DMA pool that their buffers come from, PRP list pages for every command
//! slot, deadlines, counters.
//!
//! Invariants:
//! - the I/O path (submit, ring, poll) neither allocates, locks, counts references, reads a register nor calls the system,
//!   and reads the clock only if latencies are recorded, or every [`WATCH_POLLS`] polls;
//! - one submission doorbell a [`ring`](BlockDevice::ring), at most one completion doorbell a poll round;
//! - an error of the protocol ends the controller; an overdue command is aborted, then its queue deleted, then the
//!   controller reset (`recover`);
//! - a request completes with a fault, or is repeated, only once the controller cannot touch its buffer any more, or with a
//!   substitute for a buffer that it may touch for ever.
//!
//! Parts: how it comes to be (`create`), what it is to be like (`options`), the usual request's way (`usual`), that of all others
//! (here, `nvm`, `build`), and what is done about failures (`recover`).
//!
//! Excludes: what is done about the controller as a whole (`keeper`, `recovery`).

mod build;
mod create;
mod nvm;
mod options;
mod recover;
mod usual;

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use nvme_spec::command::QueueInterrupt;
use nvme_spec::identify::Oncs;
use nvme_spec::registers::Version;
use nvme_spec::{QueueId, Status, StatusCode, StatusType};
use reactor::block::{
    BlockDevice, Completion, Durability, Geometry, IoError, LbaCount, LbaRange, OpTag, RejectReason,
    Rejected, Request,
};
use reactor::clock::Instant;
use reactor::dma::{DmaBuffer, DmaPool, DmaRegion};

use crate::controller::{Controller, Keeper, QueueError, Shared};
use crate::copy::Sources;
use crate::fault::{Fault, Life, Pulse};
use crate::identity::{ControllerInfo, Namespace};
use crate::lane::Lane;
use crate::ops::{Cutter, Kind, MAX_COUNT_16, Ops};
use crate::planted::{Bug, is_planted};
use crate::queue::{ProtocolError, Queue};
use crate::stats::{Latencies, QueueCounters, add};
use crate::sync::publish_then_look;
use crate::transport::Listen;
use crate::wake::Wake;
use build::CommandBuilder;
pub use nvm::{NvmAbilities, NvmRequest, RejectedNvm};
pub use options::{Interrupts, LatencyRecording, QueueOptions, RUN, RUN_LOOKS, RUNS_FROM, Taking};
use recover::{Aborting, Stage, Watch, Watchdog};
pub use recover::{MAX_RESETS, MAX_RETRIES, MAX_TIMEOUTS};
use usual::{Broken, Simple};

/// Polls between two looks at the clock for overdue commands.
pub const WATCH_POLLS: u32 = 1024;
/// Largest transfer of a command that options may ask for.
pub const MAX_TRANSFER: usize = 64 << 20;
/// Longest delay of a retry, whatever CRDT says, which goes up to almost two hours: requests are answered in bounded time.
pub const MAX_RETRY_DELAY: Duration = Duration::from_secs(10);

/// One I/O queue pair for one namespace, used by one thread.
pub struct QueuePair {
    queue: Queue,
    ops: Ops,
    /// First block of each command slot's command, for error messages.
    first_lbas: Box<[u64]>,
    /// Operations with blocks left to send, in order of submission.
    backlog: VecDeque<u16>,
    /// Operations that need no command any more.
    done: VecDeque<u16>,
    /// The next poll has more to do than to take completions: somebody is in `done`, `backlog` or `delayed`, or the interrupt is
    /// not masked. May be set without need, never the other way round.
    attention: bool,
    /// Sources of the operations that are copies.
    copies: Box<[Option<Sources>]>,
    /// A fused pair in the backlog waits for two free slots: nobody may overtake it.
    pair_waiting: bool,
    abilities: NvmAbilities,
    cutter: Cutter,
    simple: Simple,
    builder: CommandBuilder,
    geometry: Geometry,
    oncs: Oncs,
    latencies: Option<Arc<Latencies>>,
    counters: Arc<QueueCounters>,
    watchdog: Watchdog,
    taking: Taking,
    wake: Option<(Wake, u16)>,
    listening: bool,
    /// Requests that are repeated after a delay, with the time from which on.
    delayed: Vec<(Instant, u16)>,
    /// Delays that the controller asks for by number in a status (CRDT1 to 3, NVMe 1.4 §5.15.2.2).
    retry_delays: [Duration; 3],
    stage: Stage,
    /// The controller's pulse while commands may go out; [`Pulse::NONE`] otherwise.
    pulse: Pulse,
    aborting: Option<Aborting>,
    /// The keeper was asked to look at the controller.
    looking: bool,
    /// The slots were emptied after the controller stopped.
    settled: bool,
    lane: Arc<Lane>,
    namespace: Namespace,
    pool: DmaPool,
    pool_region: Arc<dyn DmaRegion>,
    shared: Arc<Shared>,
    controller: Arc<Controller>,
}

impl QueuePair {
    /// The queue pair's identifier on the controller.
    pub fn id(&self) -> QueueId {
        self.queue.id()
    }

    /// Counters, readable from any thread.
    pub fn counters(&self) -> Arc<QueueCounters> {
        Arc::clone(&self.counters)
    }

    /// Latencies, readable from any thread; `None` unless they are recorded.
    pub fn latencies(&self) -> Option<Arc<Latencies>> {
        self.latencies.clone()
    }

    /// The controller that the queue belongs to.
    pub fn controller(&self) -> &Arc<Controller> {
        &self.controller
    }

    fn now_if_recording(&self) -> Option<Instant> {
        self.latencies.as_ref().map(|_| self.shared.link.timing.now())
    }

    /// Requests accepted and not handed out yet: each is counted on both occasions.
    #[inline]
    fn requests_in_flight(&self) -> usize {
        self.counters.in_flight() as usize
    }

    /// What a request comes to on this device: kind, first block, blocks.
    fn plan(&self, request: &Request) -> Result<(Kind, u64, u64), IoError> {
        match request {
            Request::Read { lba, buffer } => {
                Ok((Kind::Read, lba.get(), self.blocks_of(lba.get(), buffer.len())?))
            }
            Request::Write { lba, buffer, durability } => {
                let blocks = self.blocks_of(lba.get(), buffer.len())?;
                Ok((self.write_kind(*durability), lba.get(), blocks))
            }
            Request::Flush if self.geometry.volatile_write_cache && !is_planted(Bug::FlushDropped) => {
                Ok((Kind::Flush, 0, 1))
            }
            Request::Flush => Ok((Kind::Nothing, 0, 0)),
            Request::WriteZeroes(range) => {
                let (lba, count) = self.check_range(range)?;
                let kind = if count == 0 {
                    Kind::Nothing
                } else if self.oncs.contains(Oncs::WRITE_ZEROES) {
                    Kind::WriteZeroes
                } else {
                    Kind::WriteZeroPage
                };
                Ok((kind, lba, count))
            }
            Request::Deallocate(range) => {
                let (lba, count) = self.check_range(range)?;
                if count == 0 || !self.geometry.deallocate {
                    return Ok((Kind::Nothing, 0, 0));
                }
                Ok((Kind::Deallocate, lba, count))
            }
        }
    }

    fn blocks_of(&self, lba: u64, bytes: usize) -> Result<u64, IoError> {
        let lba_size = self.geometry.lba_size;
        let blocks = bytes as u64 / u64::from(lba_size);
        let aligned = (bytes as u64).is_multiple_of(u64::from(lba_size));
        match lba.checked_add(blocks) {
            Some(end) if aligned && blocks > 0 && end <= self.geometry.lba_count.get() => Ok(blocks),
            _ => Err(IoError::InvalidRange { lba, bytes: bytes as u64, lba_size }),
        }
    }

    fn check_range(&self, range: &LbaRange) -> Result<(u64, u64), IoError> {
        let (lba, count) = (range.start.get(), range.count.get());
        match lba.checked_add(count) {
            Some(end) if end <= self.geometry.lba_count.get() => Ok((lba, count)),
            _ => Err(IoError::InvalidRange {
                lba,
                bytes: count.saturating_mul(u64::from(self.geometry.lba_size)),
                lba_size: self.geometry.lba_size,
            }),
        }
    }

    /// Notes whether a fused pair waits: then no request is simple, so that none overtakes it.
    fn set_pair_waiting(&mut self, waiting: bool) {
        self.pair_waiting = waiting;
        self.simple.max_bytes = if waiting { 0 } else { self.simple.usual_max_bytes };
    }

    /// Whether the controller is as it was when the queue began to send.
    #[inline]
    fn may_send(&self) -> bool {
        self.shared.link.health.pulse() == self.pulse
    }

    #[inline]
    fn write_kind(&self, durability: Durability) -> Kind {
        match durability {
            Durability::Durable
                if self.geometry.volatile_write_cache && !is_planted(Bug::DurableWriteCached) =>
            {
                Kind::WriteDurable
            }
            Durability::Durable | Durability::Cached => Kind::Write,
        }
    }

    /// Any request: may take several commands, a list, a place in the backlog, or no command at all.
    fn submit_any(&mut self, tag: OpTag, request: Request) -> Result<(), Rejected> {
        if let Err(error) = self.pause_or_fail() {
            return Err(Rejected { request, reason: RejectReason::Error(error) });
        }
        let plan = match self.plan(&request) {
            Ok(plan) => plan,
            Err(error) => return Err(Rejected { request, reason: RejectReason::Error(error) }),
        };
        if !self.ops.has_free() {
            return Err(Rejected { request, reason: RejectReason::QueueFull });
        }
        let buffer = match request {
            Request::Read { buffer, .. } | Request::Write { buffer, .. } => Some(buffer),
            Request::Flush | Request::WriteZeroes(_) | Request::Deallocate(_) => None,
        };
        let index = self.accept(tag, plan, buffer);
        self.dispatch(index);
        Ok(())
    }

    /// Takes an operation for a request. One must be free.
    fn accept(&mut self, tag: OpTag, plan: (Kind, u64, u64), buffer: Option<DmaBuffer>) -> u16 {
        let (kind, lba, blocks) = plan;
        let started = self.now_if_recording();
        let index = self.ops.take().expect("the caller saw a free operation");
        let op = self.ops.get(index);
        op.tag = tag;
        op.begin(kind, lba, if kind == Kind::Nothing { 0 } else { blocks });
        op.started = started.unwrap_or(Instant::ZERO);
        op.buffer = buffer;
        add(&self.counters.requests, 1);
        index
    }

    /// Sends a new operation, or lines it up.
    #[inline]
    fn dispatch(&mut self, index: u16) {
        if self.ops.get(index).rest.blocks_left == 0 {
            self.finish_later(index);
        } else if self.pair_waiting {
            self.defer(index);
        } else {
            self.issue(index);
        }
    }

    /// Sends as much of an operation as command slots allow; the rest goes to the backlog.
    fn issue(&mut self, index: u16) {
        while self.queue.slots().has_free() && self.pulse != Pulse::NONE {
            let op = self.ops.get(index);
            if op.rest.blocks_left == 0 {
                return;
            }
            if op.kind.is_composite() {
                if self.issue_composite(index) {
                    continue;
                }
                break;
            }
            let blocks = self.cutter.next(op.kind, op.rest.next_lba, op.rest.blocks_left);
            let slot = self.queue.slots().peek_free().expect("a free slot was just seen");
            let entry = self.builder.build(op, blocks, slot);
            self.first_lbas[usize::from(slot)] = op.rest.next_lba;
            op.rest.blocks_left -= blocks;
            op.rest.next_lba += blocks;
            if !is_planted(Bug::SplitWithoutOffset) {
                op.rest.next_offset += blocks * u64::from(self.geometry.lba_size);
            }
            op.outstanding += 1;
            let (taken, _) = self.queue.push(entry, index);
            debug_assert_eq!(taken, slot);
            add(&self.counters.commands, 1);
        }
        self.defer(index);
    }

    /// Puts an operation that has blocks left into the backlog, if it is not there.
    fn defer(&mut self, index: u16) {
        let op = self.ops.get(index);
        if op.rest.blocks_left > 0 && !op.rest.in_backlog {
            op.rest.in_backlog = true;
            self.backlog.push_back(index);
            self.attention = true;
        }
    }

    /// Has the next poll hand out an operation that has ended.
    fn finish_later(&mut self, index: u16) {
        self.done.push_back(index);
        self.attention = true;
    }

    /// Sends from the backlog while there are command slots. Returns an operation that ended there.
    fn issue_backlog(&mut self) -> Option<u16> {
        self.set_pair_waiting(false);
        while self.queue.slots().has_free() && self.pulse != Pulse::NONE {
            let index = self.backlog.pop_front()?;
            let op = self.ops.get(index);
            op.rest.in_backlog = false;
            if op.is_done() {
                let finished = self.finish_or_repeat(index);
                if finished.is_some() {
                    return finished;
                }
                continue;
            }
            if self.waits_for_pair(index) {
                self.ops.get(index).rest.in_backlog = true;
                self.backlog.push_front(index);
                self.set_pair_waiting(true);
                return None;
            }
            self.issue(index);
        }
        None
    }

    /// Accounts for a completed command. Returns its operation if that is finished.
    #[inline(never)]
    fn command_completed(&mut self, slot: u16, index: u16, status: Status) -> Option<u16> {
        let op = self.ops.get(index);
        op.outstanding -= 1;
        if !status.is_success() && !is_planted(Bug::StatusIgnored) {
            self.command_failed(slot, index, status);
        }
        let op = self.ops.get(index);
        if !op.is_done() {
            return None;
        }
        if op.rest.repeat { self.finish_or_repeat(index) } else { Some(index) }
    }

    fn hand_out(&mut self, index: u16, sink: &mut dyn FnMut(Completion)) {
        let op = self.ops.get(index);
        let (kind, started) = (op.kind, op.started);
        let (tag, result, buffer) = self.ops.release(index);
        if result.is_ok() {
            let bytes = buffer.as_ref().map_or(0, DmaBuffer::len);
            self.count_success(kind, bytes);
        } else {
            add(&self.counters.errors, 1);
        }
        if kind == Kind::Copy {
            self.copies[usize::from(index)] = None;
        }
        if let Some(latencies) = &self.latencies {
            record_latency(latencies, &self.shared, kind, started);
        }
        sink(Completion { tag, result, buffer });
    }

    fn count_success(&self, kind: Kind, bytes: usize) {
        let (counters, bytes) = (&*self.counters, bytes as u64);
        match kind {
            Kind::Read => add(&counters.bytes_read, bytes),
            Kind::Compare => {}
            Kind::CompareAndWrite => add(&counters.bytes_written, bytes / 2),
            _ => add(&counters.bytes_written, bytes),
        }
        add(&counters.completed, 1);
    }

    /// One poll round that has more to do than to take completions, or begins when the controller is not as it was.
    #[cold]
    #[inline(never)]
    fn unusual_round(&mut self, budget: usize, sink: &mut dyn FnMut(Completion)) -> usize {
        if self.listening {
            self.stop_listening();
        }
        let delivered = if self.may_send() {
            self.watchdog_tick();
            self.poll_round(budget, sink)
        } else {
            self.transition_round(budget, sink)
        };
        self.attention = !(self.done.is_empty() && self.backlog.is_empty() && self.delayed.is_empty());
        delivered
    }

    /// One poll round of a running controller.
    #[inline(never)]
    fn poll_round(&mut self, budget: usize, sink: &mut dyn FnMut(Completion)) -> usize {
        let handed_out = self.hand_out_done(budget, sink);
        match self.take_completions(budget - handed_out, sink) {
            Ok(taken) => {
                self.send_waiting();
                handed_out + taken
            }
            Err(broken) => handed_out + self.protocol_broken(broken),
        }
    }

    /// Sends what waited for its time or for command slots.
    #[cold]
    #[inline(never)]
    fn send_waiting(&mut self) {
        if !self.delayed.is_empty() {
            self.release_delayed();
        }
        if !self.backlog.is_empty() {
            while let Some(index) = self.issue_backlog() {
                self.finish_later(index);
            }
            self.ring();
        }
    }

    /// Ends the controller. Returns what was handed out before.
    #[cold]
    #[inline(never)]
    fn protocol_broken(&mut self, Broken { delivered, error }: Broken) -> usize {
        self.shared.fail(Fault::Protocol { queue: self.queue.id(), error: *error });
        delivered
    }

    #[inline]
    fn watchdog_tick(&mut self) {
        self.watchdog.polls_left -= 1;
        if self.watchdog.polls_left == 0 {
            self.watch();
        }
    }

    /// Waits, for a moment at most, until a run of completions is complete, if it may. Returns how many to take.
    fn await_run(&self, budget: usize) -> usize {
        if self.requests_in_flight() < RUNS_FROM {
            return budget;
        }
        let run = self.queue.run_of(RUN);
        for _ in 0..RUN_LOOKS {
            if self.queue.has_run(run) {
                break;
            }
            std::hint::spin_loop();
        }
        budget.min(run as usize)
    }

    fn stop_listening(&mut self) {
        self.listening = false;
        if let Some((_, vector)) = &self.wake {
            self.shared.link.transport.listen(*vector, Listen::Off);
        }
    }
}

impl BlockDevice for QueuePair {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn pool(&self) -> &DmaPool {
        &self.pool
    }

    #[inline]
    fn submit(&mut self, tag: OpTag, request: Request) -> Result<(), Rejected> {
        // Each arm on its own, so that the command is built with a constant opcode.
        match request {
            Request::Read { lba, buffer } => match self.submit_simple(tag, Kind::Read, lba.get(), buffer) {
                Ok(()) => Ok(()),
                Err(buffer) => self.submit_any(tag, Request::Read { lba, buffer }),
            },
            Request::Write { lba, buffer, durability } => {
                match self.submit_simple(tag, self.write_kind(durability), lba.get(), buffer) {
                    Ok(()) => Ok(()),
                    Err(buffer) => self.submit_any(tag, Request::Write { lba, buffer, durability }),
                }
            }
            request => self.submit_any(tag, request),
        }
    }

    #[inline]
    fn ring(&mut self) {
        if self.queue.ring() {
            add(&self.counters.doorbells, 1);
        }
    }

    #[inline]
    fn process_completions(&mut self, budget: usize, sink: &mut dyn FnMut(Completion)) -> usize {
        if self.attention || !self.may_send() {
            return self.unusual_round(budget, sink);
        }
        self.watchdog_tick();
        let budget = if self.taking == Taking::InRuns { self.await_run(budget) } else { budget };
        match self.take_completions(budget, sink) {
            Ok(delivered) => {
                // Failed commands line up to be repeated.
                if self.attention {
                    self.send_waiting();
                }
                delivered
            }
            Err(broken) => self.protocol_broken(broken),
        }
    }

    fn in_flight(&self) -> usize {
        self.requests_in_flight()
    }

    fn interrupt(&self) -> Option<BorrowedFd<'_>> {
        self.wake.as_ref().map(|(wake, _)| wake.as_fd())
    }

    fn arm_interrupt(&mut self) -> bool {
        if self.queue.ring_all_completions() {
            add(&self.counters.doorbells, 1);
        }
        if self.requests_in_flight() > 0 {
            self.watch();
        }
        if let Some((wake, _)) = &self.wake {
            wake.arm((self.requests_in_flight() > 0).then_some(self.watchdog.interval));
            (self.listening, self.attention) = (true, true);
        }
        let listen = || {
            if let Some((_, vector)) = &self.wake {
                self.shared.link.transport.listen(*vector, Listen::On);
            }
        };
        // What arrived before the interrupt was let through is found here, what comes later interrupts.
        publish_then_look(listen, || {
            !self.done.is_empty() || self.queue.has_completion() || self.transition_due()
        })
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        let mut kept = self.builder.memory();
        kept.push(Arc::clone(&self.pool_region));
        let released = self.shared.detach_queue(&self.lane, &self.queue, &kept).is_ok();
        while let Some(index) = self.ops.any_in_use() {
            let (_, _, buffer) = self.ops.release(index);
            if let Some(buffer) = buffer.filter(|_| !released) {
                buffer.quarantine();
            }
        }
    }
}

fn record_latency(latencies: &Latencies, shared: &Shared, kind: Kind, started: Instant) {
    let taken = shared.link.timing.now().duration_since(started);
    latencies.class(kind.latency_class()).record(taken.as_nanos() as u64);
}

fn io_error(kind: Kind, queue: QueueId, lba: u64, status: Status) -> IoError {
    if status.code() == StatusCode::COMPARE_FAILURE && matches!(kind, Kind::Compare | Kind::CompareAndWrite) {
        return IoError::Mismatch { lba };
    }
    let detail = format!("{} at block {lba} on queue {queue}: {status}", build::opcode(kind));
    let code = status.code();
    let of_medium = code.status_type() == StatusType::MEDIA && code != StatusCode::COMPARE_FAILURE;
    if of_medium { IoError::Medium { lba, detail } } else { IoError::Command { detail } }
}

#[cfg(test)]
mod recovery_tests;
#[cfg(test)]
mod tests;
