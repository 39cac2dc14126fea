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
//! Excludes: what is done about the controller as a whole (`keeper`, `recovery`).

mod build;
mod nvm;
mod recover;

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use nvme_spec::command::QueueInterrupt;
use nvme_spec::identify::Oncs;
use nvme_spec::registers::Version;
use nvme_spec::{NamespaceId, QueueId, Status, StatusCode, StatusType};
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
use crate::queue::Queue;
use crate::sgl::{DataPointers, Pointing};
use crate::slots::MAX_SLOTS;
use crate::stats::{Latencies, QueueCounters, QueueCounts};
use crate::transport::Listen;
use crate::wake::Wake;
use build::CommandBuilder;
pub use nvm::{NvmAbilities, NvmRequest, RejectedNvm};
use recover::{Aborting, Stage};
pub use recover::{MAX_RESETS, MAX_RETRIES, MAX_TIMEOUTS};

/// Polls between two looks at the clock for overdue commands.
pub const WATCH_POLLS: u32 = 1024;
/// Largest transfer of a command that options may ask for.
pub const MAX_TRANSFER: usize = 64 << 20;
/// Bytes of one Write Zeroes or Verify: controllers may take long for it and MDTS does not bound it.
const MAX_ZEROES_BYTES: u64 = 32 << 20;
/// Unit of CRDT1 to 3.
const RETRY_DELAY_UNIT: Duration = Duration::from_millis(100);
/// Longest delay of a retry, whatever CRDT says, which goes up to almost two hours: requests are answered in bounded time.
pub const MAX_RETRY_DELAY: Duration = Duration::from_secs(10);

/// Whether a queue's owner can sleep until the device interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupts {
    /// Polled only.
    Disabled,
    /// An interrupt vector, if the transport has one left.
    Enabled,
}

/// Whether the time of each request is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LatencyRecording {
    /// No clock read on the I/O path.
    Off,
    /// Two clock reads a request.
    On,
}

/// What a queue pair is to be like.
#[derive(Clone, Debug)]
pub struct QueueOptions {
    /// Namespace; the controller's default if `None`.
    pub namespace: Option<NamespaceId>,
    /// Requests at once; less if the controller allows less.
    pub depth: u16,
    /// Bytes of the buffer pool.
    pub pool_bytes: usize,
    /// Bytes of the largest command; less if the controller allows less.
    pub max_transfer: usize,
    /// Time that a command is given before it is aborted.
    pub command_timeout: Duration,
    /// Interrupts.
    pub interrupts: Interrupts,
    /// Latencies.
    pub latency: LatencyRecording,
    /// How commands point to their data.
    pub data_pointers: DataPointers,
}

impl Default for QueueOptions {
    fn default() -> Self {
        Self {
            namespace: None,
            depth: 256,
            pool_bytes: 64 << 20,
            max_transfer: 1 << 20,
            command_timeout: Duration::from_secs(30),
            interrupts: Interrupts::Enabled,
            latency: LatencyRecording::Off,
            data_pointers: DataPointers::Automatic,
        }
    }
}

/// When a command in flight was first seen by the watchdog.
#[derive(Clone, Copy, Debug)]
struct Watch {
    sequence: u32,
    since: Option<Instant>,
}

/// Finds overdue commands without a clock read at submit: a command's time begins when the watchdog first sees it, so
/// it is given its timeout and at most two check intervals more.
#[derive(Debug)]
struct Watchdog {
    seen: Box<[Watch]>,
    polls_left: u32,
    next_check: Instant,
    timeout: Duration,
    interval: Duration,
}

/// What a request must be like to go out as one command without a list.
#[derive(Clone, Copy, Debug)]
struct Simple {
    lba_shift: u8,
    /// Bytes of a block less one.
    lba_mask: usize,
    /// 0 if no request is simple.
    max_bytes: usize,
    /// `max_bytes` while nobody waits who must not be overtaken.
    usual_max_bytes: usize,
    lba_count: u64,
}

impl Simple {
    fn new(namespace: &Namespace, max_transfer: usize, list_free_bytes: usize) -> Self {
        // Where commands should not cross boundaries, each is looked at.
        let max_bytes = if namespace.optimal_boundary == 0 { max_transfer.min(list_free_bytes) } else { 0 };
        Self {
            lba_shift: namespace.lba_shift,
            lba_mask: namespace.lba_size() as usize - 1,
            max_bytes,
            usual_max_bytes: max_bytes,
            lba_count: namespace.blocks,
        }
    }
}

/// One I/O queue pair for one namespace, used by one thread.
pub struct QueuePair {
    queue: Queue,
    ops: Ops,
    /// First block of each command slot's command, for error messages.
    first_lbas: Box<[u64]>,
    /// Operations with blocks left to send, in order of submission.
    backlog: VecDeque<u16>,
    /// Operations that need no command.
    done: VecDeque<u16>,
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
    /// Counts, of which `counters` is a copy for other threads.
    tally: QueueCounts,
    counters: Arc<QueueCounters>,
    watchdog: Watchdog,
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
    pub(crate) fn create(
        controller: &Arc<Controller>,
        namespace: &Namespace,
        options: &QueueOptions,
    ) -> Result<Self, QueueError> {
        if options.depth == 0 || options.depth > MAX_SLOTS {
            return Err(QueueError::Option("queue depth must lie between 1 and 4096"));
        }
        if options.command_timeout.is_zero() {
            return Err(QueueError::Option("the command timeout must not be zero"));
        }
        let info = controller.info();
        let shared = controller.shared();
        let transport = &shared.link.transport;
        let max_transfer = transfer_limit(controller, namespace, options)?;
        let wake = match options.interrupts {
            Interrupts::Enabled if transport.interrupt_vectors() > 0 => {
                Some(Wake::new().map_err(|error| QueueError::Descriptor(error.to_string()))?)
            }
            _ => None,
        };
        let pool_region = transport.allocate(options.pool_bytes)?;
        let mut vector = None;
        let interrupt = |id: QueueId| {
            let Some(wake) = wake.as_ref().filter(|_| id.get() < transport.interrupt_vectors()) else {
                return Ok(QueueInterrupt::Disabled);
            };
            transport.connect_interrupt(id.get(), wake.eventfd().as_fd())?;
            transport.listen(id.get(), Listen::Off);
            vector = Some(id.get());
            Ok(QueueInterrupt::Vector(id.get()))
        };
        let max_entries = u32::from(info.cap.mqes_z()) + 1;
        let slots = u32::from(options.depth).min(max_entries - 1) as u16;
        let pointing = Pointing::choose(options.data_pointers, info.raw.sgls())
            .ok_or(QueueError::Option("SGLs were asked for, which the controller does not take"))?;
        let builder = CommandBuilder::new(&**transport, namespace, info, slots, max_transfer, pointing)?;
        let (queue, lane) =
            shared.attach_queue(namespace, slots, interrupt, wake.as_ref().map(Wake::eventfd))?;
        let now = shared.link.timing.now();
        let interval = (options.command_timeout / 8).clamp(Duration::from_millis(1), Duration::from_secs(1));
        Ok(Self {
            ops: Ops::new(slots),
            first_lbas: vec![0; usize::from(slots)].into(),
            backlog: VecDeque::with_capacity(usize::from(slots)),
            done: VecDeque::with_capacity(usize::from(slots)),
            copies: vec![None; usize::from(slots)].into(),
            pair_waiting: false,
            abilities: NvmAbilities::of(info, namespace, (max_transfer as u64) >> namespace.lba_shift, slots),
            simple: Simple::new(namespace, max_transfer, builder.list_free_bytes()),
            cutter: cutter(info, namespace, max_transfer as u64),
            builder,
            geometry: Geometry {
                lba_size: namespace.lba_size(),
                lba_count: LbaCount::new(namespace.blocks),
                preferred_transfer: max_transfer as u32,
                volatile_write_cache: info.volatile_write_cache,
                deallocate: info.oncs.contains(Oncs::DATASET_MANAGEMENT),
                queue_depth: slots,
                name: controller.name().to_owned(),
            },
            oncs: info.oncs,
            latencies: (options.latency == LatencyRecording::On).then(Arc::default),
            tally: QueueCounts::default(),
            counters: Arc::default(),
            watchdog: Watchdog {
                seen: vec![Watch { sequence: 0, since: None }; usize::from(slots)].into(),
                polls_left: WATCH_POLLS,
                next_check: now + interval,
                timeout: options.command_timeout,
                interval,
            },
            wake: wake.zip(vector),
            listening: false,
            delayed: Vec::with_capacity(usize::from(slots)),
            retry_delays: info
                .raw
                .crdt
                .map(|delay| (RETRY_DELAY_UNIT * u32::from(delay.get())).min(MAX_RETRY_DELAY)),
            stage: Stage::Running,
            // If the controller has been reset since the queue was attached, the first look takes care of it.
            pulse: lane.born,
            aborting: None,
            looking: false,
            settled: false,
            lane,
            namespace: namespace.clone(),
            pool: DmaPool::new(Arc::clone(&pool_region)),
            pool_region,
            queue,
            shared: Arc::clone(shared),
            controller: Arc::clone(controller),
        })
    }

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

    #[inline]
    fn now_if_recording(&self) -> Option<Instant> {
        self.latencies.as_ref().map(|_| self.shared.link.timing.now())
    }

    /// Requests accepted and not handed out yet: each is counted on both occasions.
    #[inline]
    fn requests_in_flight(&self) -> usize {
        (self.tally.requests - self.tally.completed - self.tally.errors) as usize
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
            Request::Flush if self.geometry.volatile_write_cache => Ok((Kind::Flush, 0, 1)),
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

    /// The blocks of `bytes` at `lba`, if they go out now, as one command whose data needs no list: what most requests do.
    #[inline(always)]
    fn simple_blocks(&self, lba: u64, bytes: usize) -> Option<u64> {
        let simple = &self.simple;
        let blocks = (bytes >> simple.lba_shift) as u64;
        let fits = bytes & simple.lba_mask == 0
            && bytes <= simple.max_bytes
            && lba < simple.lba_count
            && blocks <= simple.lba_count - lba;
        let room = self.ops.has_free() && self.queue.slots().has_free();
        (fits && room && self.shared.link.health.pulse() == self.pulse).then_some(blocks)
    }

    /// Sends a request of so many [simple blocks](Self::simple_blocks).
    #[inline(always)]
    fn submit_simple(&mut self, tag: OpTag, kind: Kind, lba: u64, blocks: u64, buffer: DmaBuffer) {
        let entry = self.builder.build_simple(kind, lba, blocks, &buffer);
        let started = self.now_if_recording();
        let index = self.ops.take_simple(tag, kind, lba, started, buffer);
        self.queue.push(entry, index);
        self.tally.requests += 1;
        self.tally.commands += 1;
    }

    #[inline]
    fn write_kind(&self, durability: Durability) -> Kind {
        match durability {
            Durability::Durable if self.geometry.volatile_write_cache => Kind::WriteDurable,
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
        self.tally.requests += 1;
        index
    }

    /// Sends a new operation, or lines it up.
    #[inline]
    fn dispatch(&mut self, index: u16) {
        if self.ops.get(index).rest.blocks_left == 0 {
            self.done.push_back(index);
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
            op.rest.next_offset += blocks * u64::from(self.geometry.lba_size);
            op.outstanding += 1;
            let (taken, _) = self.queue.push(entry, index);
            debug_assert_eq!(taken, slot);
            self.tally.commands += 1;
        }
        self.defer(index);
    }

    /// Puts an operation that has blocks left into the backlog, if it is not there.
    fn defer(&mut self, index: u16) {
        let op = self.ops.get(index);
        if op.rest.blocks_left > 0 && !op.rest.in_backlog {
            op.rest.in_backlog = true;
            self.backlog.push_back(index);
        }
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
        if !status.is_success() {
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
            self.tally.errors += 1;
        }
        if kind == Kind::Copy {
            self.copies[usize::from(index)] = None;
        }
        if let Some(latencies) = &self.latencies {
            record_latency(latencies, &self.shared, kind, started);
        }
        sink(Completion { tag, result, buffer });
    }

    /// Makes the counts visible to other threads.
    #[inline]
    fn publish_counts(&mut self) {
        self.tally.doorbells = self.queue.doorbells();
        self.counters.publish(&self.tally);
    }

    #[inline]
    fn count_success(&mut self, kind: Kind, bytes: usize) {
        let bytes = bytes as u64;
        match kind {
            Kind::Read => self.tally.bytes_read += bytes,
            Kind::Compare => {}
            Kind::CompareAndWrite => self.tally.bytes_written += bytes / 2,
            _ => self.tally.bytes_written += bytes,
        }
        self.tally.completed += 1;
    }

    /// One poll round of a running controller.
    #[inline]
    fn poll_round(&mut self, budget: usize, sink: &mut dyn FnMut(Completion)) -> usize {
        let mut delivered = if self.done.is_empty() { 0 } else { self.hand_out_done(budget, sink) };
        let mut fault = None;
        while delivered < budget {
            match self.queue.poll() {
                Ok(Some(reaped)) => {
                    let owner = reaped.command.owner;
                    if reaped.status.is_success()
                        && let Some(op) = self.ops.release_simple(owner)
                    {
                        let bytes = op.buffer.as_ref().map_or(0, DmaBuffer::len) as u64;
                        let counted = match op.kind {
                            Kind::Read => &mut self.tally.bytes_read,
                            _ => &mut self.tally.bytes_written,
                        };
                        *counted += bytes;
                        self.tally.completed += 1;
                        if let Some(latencies) = &self.latencies {
                            record_latency(latencies, &self.shared, op.kind, op.started);
                        }
                        sink(Completion { tag: op.tag, result: Ok(()), buffer: op.buffer.take() });
                        delivered += 1;
                    } else if let Some(index) =
                        self.command_completed(reaped.command.slot, owner, reaped.status)
                    {
                        self.hand_out(index, sink);
                        delivered += 1;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    fault = Some(error);
                    break;
                }
            }
        }
        self.queue.ring_completions();
        if delivered > 0 {
            self.publish_counts();
        }
        if let Some(error) = fault {
            self.shared.fail(Fault::Protocol { queue: self.queue.id(), error });
            return delivered;
        }
        if !self.delayed.is_empty() {
            self.release_delayed();
        }
        if !self.backlog.is_empty() {
            while let Some(index) = self.issue_backlog() {
                self.done.push_back(index);
            }
            self.queue.ring();
        }
        delivered
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
            Request::Read { lba, buffer } => match self.simple_blocks(lba.get(), buffer.len()) {
                Some(blocks) => {
                    self.submit_simple(tag, Kind::Read, lba.get(), blocks, buffer);
                    Ok(())
                }
                None => self.submit_any(tag, Request::Read { lba, buffer }),
            },
            Request::Write { lba, buffer, durability } => match self.simple_blocks(lba.get(), buffer.len()) {
                Some(blocks) => {
                    let kind = self.write_kind(durability);
                    self.submit_simple(tag, kind, lba.get(), blocks, buffer);
                    Ok(())
                }
                None => self.submit_any(tag, Request::Write { lba, buffer, durability }),
            },
            request => self.submit_any(tag, request),
        }
    }

    #[inline]
    fn ring(&mut self) {
        self.queue.ring();
    }

    fn process_completions(&mut self, budget: usize, sink: &mut dyn FnMut(Completion)) -> usize {
        if self.listening {
            self.stop_listening();
        }
        if self.shared.link.health.pulse() != self.pulse {
            return self.transition_round(budget, sink);
        }
        self.watchdog.polls_left -= 1;
        if self.watchdog.polls_left == 0 {
            self.watch();
        }
        self.poll_round(budget, sink)
    }

    fn in_flight(&self) -> usize {
        self.requests_in_flight()
    }

    fn interrupt(&self) -> Option<BorrowedFd<'_>> {
        self.wake.as_ref().map(|(wake, _)| wake.as_fd())
    }

    fn arm_interrupt(&mut self) -> bool {
        self.queue.ring_all_completions();
        self.publish_counts();
        if self.requests_in_flight() > 0 {
            self.watch();
        }
        if let Some((wake, vector)) = &self.wake {
            wake.arm((self.requests_in_flight() > 0).then_some(self.watchdog.interval));
            self.shared.link.transport.listen(*vector, Listen::On);
            self.listening = true;
        }
        // Looked at after the interrupt was let through: what arrived before is found here, what comes later interrupts.
        !self.done.is_empty() || self.queue.has_completion() || self.transition_due()
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

/// How many blocks the commands of each kind take.
fn cutter(info: &ControllerInfo, namespace: &Namespace, max_transfer: u64) -> Cutter {
    let blocks = |bytes: u64| (bytes >> namespace.lba_shift).clamp(1, MAX_COUNT_16);
    // Before 2.0 nothing bounds a Verify; some controllers bound it as they do transfers.
    let verify = if info.version < Version::V2_0 { max_transfer } else { u64::MAX };
    Cutter {
        transfer: max_transfer >> namespace.lba_shift,
        boundary: u64::from(namespace.optimal_boundary),
        zeroes: blocks(info.max_zeroes.unwrap_or(u64::MAX).min(MAX_ZEROES_BYTES)),
        verify: blocks(info.max_verify.unwrap_or(verify).min(MAX_ZEROES_BYTES)),
        deallocate: info.max_deallocate.unwrap_or(u64::MAX).clamp(1, u64::from(u32::MAX)),
    }
}

fn record_latency(latencies: &Latencies, shared: &Shared, kind: Kind, started: Instant) {
    let taken = shared.link.timing.now().duration_since(started);
    latencies.class(kind.latency_class()).record(taken.as_nanos() as u64);
}

/// Bytes of the largest command: what the options ask for, the controller allows, and whole blocks and pages make up.
fn transfer_limit(
    controller: &Controller,
    namespace: &Namespace,
    options: &QueueOptions,
) -> Result<usize, QueueError> {
    let lba_size = namespace.lba_size() as usize;
    if !(lba_size..=MAX_TRANSFER).contains(&options.max_transfer) {
        return Err(QueueError::Option("the largest transfer must lie between one block and 64 MiB"));
    }
    let device = controller.info().max_transfer.unwrap_or(u64::MAX);
    let by_count = MAX_COUNT_16 << namespace.lba_shift;
    let limit = (options.max_transfer as u64).min(device).min(by_count) as usize;
    // Checked with the namespace: the device's limit is at least a block.
    Ok(limit / lba_size * lba_size)
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
