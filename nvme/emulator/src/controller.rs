//! The controller as its users hold it, and the path of a command through it.
//!
//! Owns: [`EmulatedController`], register access and doorbells, fetch → execute → complete.
//!
//! Invariants:
//! - commands are executed only in state `Ready`;
//! - the I/O path takes the lock of its own submission queue, of its completion queue while posting, and none shared
//!   by all; the controller's own lock (`admin`) is taken there only for errors and events;
//! - a command completes exactly once, or is held (asynchronous event request), or vanishes in a reset.
//!
//! With fault rules or a latency model, commands leave this path for `faults::detour` between fetch and execute.
//!
//! Excludes: the reset handshake (`handshake`), what commands do (`admin`, `io`), threads (`worker`).

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nvme_spec::log::{AsyncEvent, LogPageId};
use nvme_spec::registers::{self, Doorbell};
use nvme_spec::{CompletionEntry, Status, StatusCode, SubmissionEntry};

use crate::admin::AdminState;
use crate::config::{ControllerConfig, Mode, WriteCache};
use crate::dma::DmaSpace;
use crate::error::EmulatorError;
use crate::faults::FaultPlan;
use crate::faults::book::FaultBook;
use crate::gate::Gate;
use crate::interrupt::{MASK_REGISTER, MASK_VECTOR, Relay, Vector, VectorMask};
use crate::keep_alive::KeepAlive;
use crate::latency::{Clock, Latency};
use crate::locks::lock;
use crate::namespace::Namespace;
use crate::namespaces::NamespaceTable;
use crate::power_cut::{CutPolicy, CutReport};
use crate::queue::{CompletionSlot, DoorbellCheck, Posted, SubmissionQueue, SubmissionSlot, bump};
use crate::queue_watch::{QueueWatch, WatchSlot};
use crate::registers::{Registers, State};
use crate::worker::{self, WorkerSet};

/// Bytes of BAR0 before the doorbells end are rounded up to this.
const BAR_ALIGN: u64 = 4096;
/// Vectors that INTMS and INTMC can mask.
const REGISTER_VECTORS: usize = 32;
/// Async event type: error.
pub(crate) const EVENT_ERROR: u8 = 0;
/// Error event: write to a doorbell that belongs to no queue.
const INFO_INVALID_DOORBELL: u8 = 0;
/// Error event: a doorbell value that cannot be.
const INFO_INVALID_DOORBELL_VALUE: u8 = 1;

/// An NVMe controller. Shared by all threads that drive it; registers may be accessed and doorbells rung from any.
///
/// Dropping the last handle ends its threads and closes its images.
pub struct EmulatedController {
    pub(crate) core: Arc<Core>,
    threads: Vec<JoinHandle<()>>,
}

impl EmulatedController {
    /// Makes a controller and opens its namespaces' backings. It is powered on and disabled.
    ///
    /// # Errors
    /// The configuration makes no sense, an image cannot be opened, or a thread cannot be started.
    pub fn new(config: ControllerConfig) -> Result<Arc<Self>, EmulatorError> {
        config.validate()?;
        let mode = config.mode;
        let mut controller = Self { core: Arc::new(Core::new(config)?), threads: Vec::new() };
        if let Mode::Threaded(options) = mode {
            for index in 0..usize::from(options.workers) {
                let thread = worker::spawn(&controller.core, index, options.spin);
                controller.threads.push(thread.map_err(EmulatorError::Thread)?);
            }
        }
        Ok(Arc::new(controller))
    }

    /// The memory that the controller can reach.
    pub fn memory(&self) -> &DmaSpace {
        &self.core.dma
    }

    /// Bytes of BAR0: registers and doorbells.
    pub fn bar_bytes(&self) -> u64 {
        let pairs = u64::from(self.core.config.io_queues) + 1;
        let doorbells = (2 * pairs) << (2 + self.core.config.dstrd);
        (registers::DOORBELL_BASE + doorbells).next_multiple_of(BAR_ALIGN)
    }

    /// Reads a 32-bit register of BAR0. Reserved ones, and doorbells, read as 0.
    pub fn read32(&self, offset: u64) -> u32 {
        self.core.registers.reads.fetch_add(1, Ordering::Relaxed);
        self.core.read_register(offset)
    }

    /// Reads a 64-bit register of BAR0, or two adjacent 32-bit ones.
    pub fn read64(&self, offset: u64) -> u64 {
        self.core.registers.reads.fetch_add(1, Ordering::Relaxed);
        let high = self.core.read_register(offset.wrapping_add(4));
        u64::from(self.core.read_register(offset)) | u64::from(high) << 32
    }

    /// Writes a 32-bit register of BAR0. Inline, a doorbell write executes the commands it announces before it returns;
    /// with threads it wakes one.
    pub fn write32(&self, offset: u64, value: u32) {
        if offset >= registers::DOORBELL_BASE {
            return self.core.doorbell(offset, value);
        }
        self.core.registers.writes.fetch_add(1, Ordering::Relaxed);
        self.core.write_register(offset, value);
    }

    /// Writes a 64-bit register of BAR0, or two adjacent 32-bit ones, the lower first.
    pub fn write64(&self, offset: u64, value: u64) {
        if offset >= registers::DOORBELL_BASE {
            return self.core.doorbell(offset, value as u32);
        }
        self.core.registers.writes.fetch_add(1, Ordering::Relaxed);
        self.core.write_register(offset, value as u32);
        self.core.write_register(offset.wrapping_add(4), (value >> 32) as u32);
    }

    /// Writes the doorbell at `offset` of BAR0: what [`write32`](Self::write32) does there, without the detour.
    pub fn doorbell(&self, offset: u64, value: u32) {
        self.core.doorbell(offset, value);
    }

    /// Interrupt vectors: one for each I/O queue pair and one for the admin queue.
    pub fn interrupt_vectors(&self) -> u16 {
        self.core.config.io_queues + 1
    }

    /// Makes `vector` write 1 to `eventfd` when a completion queue with interrupts enabled got entries.
    ///
    /// # Errors
    /// [`EmulatorError::NoVector`].
    pub fn set_interrupt(&self, vector: u16, eventfd: OwnedFd) -> Result<(), EmulatorError> {
        self.vector(vector).map(|v| v.connect(Some(eventfd)))
    }

    /// Has `relay` send the messages of `vector`.
    pub(crate) fn relay_interrupt(&self, vector: u16, relay: Arc<dyn Relay>) -> Result<(), EmulatorError> {
        self.vector(vector).map(|v| v.relay(relay, vector))
    }

    /// Disconnects `vector`.
    ///
    /// # Errors
    /// [`EmulatorError::NoVector`].
    pub fn clear_interrupt(&self, vector: u16) -> Result<(), EmulatorError> {
        self.vector(vector).map(|v| v.connect(None))
    }

    /// Masks or unmasks `vector`, as the vector's mask bit in an MSI-X table does.
    ///
    /// # Errors
    /// [`EmulatorError::NoVector`].
    pub fn mask_interrupt(&self, vector: u16, mask: VectorMask) -> Result<(), EmulatorError> {
        self.vector(vector).map(|v| match mask {
            VectorMask::Masked => v.mask(MASK_VECTOR),
            VectorMask::Unmasked => v.unmask(MASK_VECTOR),
        })
    }

    fn vector(&self, vector: u16) -> Result<&Vector, EmulatorError> {
        let count = self.interrupt_vectors();
        self.core.vectors.get(usize::from(vector)).ok_or(EmulatorError::NoVector { vector, count })
    }

    /// Executes one arbitration round: of each submission queue in turn, up to the arbitration burst, and what waited there
    /// and has become due. Returns how much that was. For [`Mode::Stepped`]; harmless otherwise.
    pub fn step(&self) -> usize {
        self.core.round(0, 1)
    }

    /// Cuts the power and returns it: everything in flight is gone, registers and features are as after power-on, and
    /// `policy` decides which unflushed writes survive. Mappings and interrupt connections stay. With
    /// [`WriteCache::Modelled`] only; otherwise a completed write always survives.
    pub fn power_cut(&self, policy: CutPolicy) -> CutReport {
        self.core.power_cut(policy)
    }

    /// Moves the controller's time, by which delays and the latency model go; inline, what has become due is carried out
    /// before this returns. With [`Mode::Threaded`] time moves by itself, and this does nothing.
    pub fn advance(&self, by: Duration) {
        self.core.advance(by);
    }

    /// The fault rules.
    pub fn faults(&self) -> FaultPlan<'_> {
        FaultPlan::new(&self.core)
    }

    /// Removes the device by surprise: registers read as all ones, writes and doorbells do nothing, what is in flight
    /// never completes. When this returns no memory is touched any more. What was written stays written.
    pub fn remove(&self) {
        self.core.remove();
    }

    /// Puts a removed device back, disabled, as after power-on. Does nothing if it is there.
    pub fn reinsert(&self) {
        self.core.reinsert();
    }

    /// Whether the device is removed.
    pub fn is_removed(&self) -> bool {
        self.core.registers.state() == State::Removed
    }

    /// Resets the function, as FLR does a PCI one: what is in flight is gone, registers and features are as after power-on,
    /// mappings, interrupt connections and data stay. Works where a disable is not acted on.
    pub fn reset_function(&self) {
        self.core.reset_function();
    }

    /// Writes that a power cut could lose now.
    pub fn unflushed_writes(&self) -> usize {
        self.core.namespaces.list().iter().map(|n| n.store().unflushed()).sum()
    }

    /// What has happened so far.
    pub fn counters(&self) -> Counters {
        self.core.counters()
    }

    /// Has `watch` told when queues begin, in place of whoever was told before.
    pub(crate) fn watch_queues(&self, watch: Option<Arc<dyn QueueWatch>>) {
        self.core.queue_watch.set(watch);
    }

    /// The configuration the controller was made with.
    pub fn config(&self) -> &ControllerConfig {
        &self.core.config
    }
}

impl Drop for EmulatedController {
    fn drop(&mut self) {
        self.core.workers.stop();
        for thread in self.threads.drain(..) {
            // A panicked thread has reported itself.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for EmulatedController {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmulatedController")
            .field("state", &self.core.registers.state())
            .field("mode", &self.core.config.mode)
            .finish_non_exhaustive()
    }
}

/// Counters since the controller was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Register reads.
    pub register_reads: u64,
    /// Register writes, doorbells not counted.
    pub register_writes: u64,
    /// Interrupt messages sent.
    pub interrupts: u64,
    /// Accesses outside the mappings.
    pub dma_faults: u64,
    /// One for each possible queue pair, the admin queue first.
    pub queues: Vec<QueueCounters>,
}

/// Counters of one queue pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueCounters {
    /// Writes to the submission queue's doorbell.
    pub submission_doorbells: u64,
    /// Writes to the completion queue's doorbell.
    pub completion_doorbells: u64,
    /// Commands executed.
    pub commands: u64,
    /// Read commands that succeeded.
    pub reads: u64,
    /// Write commands that succeeded.
    pub writes: u64,
}

/// The controller proper, shared with its threads.
pub(crate) struct Core {
    pub(crate) config: ControllerConfig,
    pub(crate) registers: Registers,
    pub(crate) dma: DmaSpace,
    pub(crate) namespaces: NamespaceTable,
    pub(crate) gate: Gate,
    pub(crate) submission: Box<[SubmissionSlot]>,
    pub(crate) completion: Box<[CompletionSlot]>,
    pub(crate) vectors: Box<[Vector]>,
    /// One transition at a time. Taken before any queue's lock.
    pub(crate) handshake: Mutex<()>,
    /// CC.EN fell since the handshake last looked.
    pub(crate) reset_requested: AtomicBool,
    pub(crate) admin: Mutex<AdminState>,
    /// Volatile Write Cache feature: writes may rest in the cache.
    pub(crate) cache_enabled: AtomicBool,
    /// Arbitration feature, burst as a power of two.
    pub(crate) burst: AtomicU8,
    /// I/O queues granted by the Number of Queues feature.
    pub(crate) granted_queues: AtomicU16,
    pub(crate) workers: WorkerSet,
    pub(crate) faults: FaultBook,
    pub(crate) latency: Latency,
    pub(crate) keep_alive: KeepAlive,
    clock: Clock,
    /// Told when a queue begins.
    pub(crate) queue_watch: WatchSlot,
}

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
    pub(crate) fn new(config: ControllerConfig) -> Result<Self, EmulatorError> {
        let namespaces = config
            .namespaces
            .iter()
            .map(|namespace| Namespace::open(namespace, &config).map(Arc::new))
            .collect::<Result<Vec<_>, _>>()?;
        let pairs = usize::from(config.io_queues) + 1;
        let workers = match config.mode {
            Mode::Threaded(options) => usize::from(options.workers),
            Mode::Inline | Mode::Stepped => 0,
        };
        let core = Self {
            registers: Registers::new(&config),
            dma: DmaSpace::new(),
            namespaces: NamespaceTable::new(namespaces),
            gate: Gate::default(),
            submission: (0..pairs).map(|_| SubmissionSlot::default()).collect(),
            completion: (0..pairs).map(|_| CompletionSlot::default()).collect(),
            vectors: (0..pairs).map(|_| Vector::default()).collect(),
            handshake: Mutex::new(()),
            reset_requested: AtomicBool::new(false),
            admin: Mutex::default(),
            cache_enabled: AtomicBool::new(true),
            burst: AtomicU8::new(0),
            granted_queues: AtomicU16::new(config.io_queues),
            workers: WorkerSet::new(workers),
            faults: FaultBook::default(),
            latency: Latency::new(config.latency),
            keep_alive: KeepAlive::default(),
            clock: match config.mode {
                Mode::Threaded(_) => Clock::real(),
                Mode::Inline | Mode::Stepped => Clock::virtual_from_zero(),
            },
            queue_watch: WatchSlot::default(),
            config,
        };
        core.reset_features();
        {
            let mut admin = lock(&core.admin);
            admin.power_cycles = 1;
            admin.clean_shutdown = true;
        }
        Ok(core)
    }

    pub(crate) fn has_volatile_cache(&self) -> bool {
        self.config.write_cache != WriteCache::Absent
    }

    fn read_register(&self, offset: u64) -> u32 {
        let value = self.true_register(offset);
        if self.faults.registers_armed() { self.faults.distort(offset, value, self.now_ns()) } else { value }
    }

    fn true_register(&self, offset: u64) -> u32 {
        let r = &self.registers;
        if r.state() == State::Removed {
            return u32::MAX;
        }
        match offset {
            registers::CAP => u64::from(r.cap) as u32,
            o if o == registers::CAP + 4 => (u64::from(r.cap) >> 32) as u32,
            registers::VS => r.version.into(),
            registers::INTMS | registers::INTMC => self.interrupt_mask(),
            registers::CC => r.cc().into(),
            registers::CSTS => r.csts().into(),
            registers::AQA => r.aqa.load(Ordering::Acquire),
            registers::ASQ => r.asq.load(Ordering::Acquire) as u32,
            o if o == registers::ASQ + 4 => (r.asq.load(Ordering::Acquire) >> 32) as u32,
            registers::ACQ => r.acq.load(Ordering::Acquire) as u32,
            o if o == registers::ACQ + 4 => (r.acq.load(Ordering::Acquire) >> 32) as u32,
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        let r = &self.registers;
        if r.state() == State::Removed {
            return;
        }
        let set_half = |register: &std::sync::atomic::AtomicU64, high: bool| {
            let shift = if high { 32 } else { 0 };
            let keep = !(u64::from(u32::MAX) << shift);
            let change = |old: u64| Some((old & keep | u64::from(value) << shift) & !0xfff);
            // The closure always returns a value, so the update cannot fail.
            let _ = register.fetch_update(Ordering::AcqRel, Ordering::Acquire, change);
        };
        match offset {
            registers::INTMS => self.change_interrupt_mask(value, |v| v.mask(MASK_REGISTER)),
            registers::INTMC => self.change_interrupt_mask(value, |v| v.unmask(MASK_REGISTER)),
            registers::CC => self.write_cc(value),
            registers::AQA => r.aqa.store(value & 0x0fff_0fff, Ordering::Release),
            registers::ASQ => set_half(&r.asq, false),
            o if o == registers::ASQ + 4 => set_half(&r.asq, true),
            registers::ACQ => set_half(&r.acq, false),
            o if o == registers::ACQ + 4 => set_half(&r.acq, true),
            _ => tracing::debug!(offset, value, "write to a reserved or read-only register ignored"),
        }
    }

    fn interrupt_mask(&self) -> u32 {
        let masked = self.vectors.iter().take(REGISTER_VECTORS).enumerate();
        masked.fold(0, |mask, (i, v)| mask | u32::from(v.is_register_masked()) << i)
    }

    fn change_interrupt_mask(&self, bits: u32, change: impl Fn(&Vector)) {
        for (i, vector) in self.vectors.iter().take(REGISTER_VECTORS).enumerate() {
            if bits & 1 << i != 0 {
                change(vector);
            }
        }
    }

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

    fn advance(&self, by: Duration) {
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

    fn counters(&self) -> Counters {
        let get = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let pairs = self.submission.iter().zip(&self.completion);
        let queues = pairs.map(|(sq, cq)| QueueCounters {
            submission_doorbells: get(&sq.stats.doorbells),
            completion_doorbells: get(&cq.doorbells),
            commands: get(&sq.stats.commands),
            reads: get(&sq.stats.reads),
            writes: get(&sq.stats.writes),
        });
        Counters {
            register_reads: get(&self.registers.reads),
            register_writes: get(&self.registers.writes),
            interrupts: self.vectors.iter().map(Vector::sent).sum(),
            dma_faults: self.dma.fault_count(),
            queues: queues.collect(),
        }
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
