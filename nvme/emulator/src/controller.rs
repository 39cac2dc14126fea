//! The controller as its users hold it.
//!
//! Owns: [`EmulatedController`]: registers and doorbells, interrupts, time, power and removal as the outside sees them.
//!
//! | below | |
//! |---|---|
//! | `shared` | what the controller consists of, shared with its threads |
//! | `register_file` | what registers read as, and what writes to them do |
//! | `command_path` | doorbells, arbitration, fetch → execute → complete |
//! | `counters` | what happened so far |
//!
//! Excludes: the reset handshake (`handshake`), what commands do (`admin`, `io`), threads (`worker`).

mod command_path;
mod counters;
mod register_file;
mod shared;

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use nvme_spec::registers;

use crate::config::{ControllerConfig, Mode};
use crate::dma::DmaSpace;
use crate::error::EmulatorError;
use crate::faults::FaultPlan;
use crate::interrupt::{MASK_VECTOR, Relay, Vector, VectorMask};
use crate::power_cut::{CutPolicy, CutReport};
use crate::queue_watch::QueueWatch;
use crate::registers::State;
use crate::worker;
pub(crate) use command_path::{Lane, Outcome, completion_entry};
pub use counters::{Counters, QueueCounters};
pub(crate) use shared::Core;

/// Bytes of BAR0 before the doorbells end are rounded up to this.
const BAR_ALIGN: u64 = 4096;

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
    /// [`WriteCache::Modelled`](crate::WriteCache::Modelled) only; otherwise a completed write always survives.
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
