//! One driver, one controller, one queue, and the time and the way between them.
//!
//! Owns: [`Clock`] (virtual time, or real time that runs faster), [`Way`] (a transport that counts the memory it gave and
//! can do less than it could), [`Bench`].

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use nvme::transport::embedded::EmbeddedTransport;
use nvme::transport::{Listen, SystemTiming, Timing, Transport, TransportError};
use nvme::{BringUpError, Controller, ControllerOptions, Interrupts, Keeper, QueueOptions, QueuePair};
use nvme_emulator::{
    ControllerConfig, EmulatedController, Mode, NamespaceConfig, ShadowDoorbells, ThreadOptions,
};
use reactor::block::BlockDevice;
use reactor::clock::Instant;
use reactor::dma::DmaRegion;

pub(crate) const BLOCK: usize = 4096;
/// Commands in flight at most; the rings have 5 and 13 entries.
pub(crate) const DEPTH: u16 = 4;
/// What a command is given.
const TIMEOUT: Duration = Duration::from_millis(800);
/// What a command is given with threads: far more than they may be held up on a busy machine.
const THREADS_TIMEOUT: Duration = Duration::from_secs(4);
/// How much faster time goes with threads.
const SPEED: u32 = 10;
/// Virtual pauses are so much longer than asked for, to get on.
const STRETCH: u32 = 4;

/// How a bench runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum World {
    /// One thread, virtual time; commands run in the doorbell.
    Inline,
    /// One thread, virtual time; commands run while somebody waits.
    Stepped,
    /// As `Stepped`, with the doorbells in memory.
    Shadowed,
    /// A thread for the controller, one for the keeper, and ours; real time, faster.
    Threads,
}

/// Time.
pub(crate) struct Clock {
    world: World,
    real: SystemTiming,
    now_ns: AtomicU64,
    device: OnceLock<Weak<EmulatedController>>,
}

impl Clock {
    fn new(world: World) -> Self {
        let real = SystemTiming::default();
        Self { world, real, now_ns: AtomicU64::new(0), device: OnceLock::new() }
    }

    /// Lets the controller get on with what it has to do.
    pub(crate) fn pass(&self, duration: Duration) {
        if self.world == World::Threads {
            return self.real.pause(duration / SPEED);
        }
        self.now_ns.fetch_add(duration.as_nanos() as u64, Ordering::Relaxed);
        if let Some(device) = self.device.get().and_then(Weak::upgrade) {
            device.advance(duration);
            if self.world != World::Inline {
                while device.step() > 0 {}
            }
        }
    }
}

impl Timing for Clock {
    fn now(&self) -> Instant {
        match self.world {
            World::Threads => {
                Instant::ZERO.saturating_add(self.real.now().duration_since(Instant::ZERO) * SPEED)
            }
            _ => Instant::ZERO.saturating_add(Duration::from_nanos(self.now_ns.load(Ordering::Relaxed))),
        }
    }

    fn pause(&self, duration: Duration) {
        match self.world {
            World::Threads => self.pass(duration),
            _ => self.pass(duration * STRETCH),
        }
    }
}

/// What a transport can do about a controller that does not stop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Means {
    /// Reset its function.
    #[default]
    FunctionReset,
    /// Take its memory away.
    Revocation,
    /// Nothing.
    None,
}

/// The way to the controller.
pub(crate) struct Way {
    inner: EmbeddedTransport,
    means: Means,
    given: Mutex<Vec<Weak<dyn DmaRegion>>>,
}

impl Way {
    /// Pieces of memory that the driver holds.
    pub(crate) fn regions_alive(&self) -> usize {
        self.given.lock().unwrap().iter().filter(|region| region.strong_count() > 0).count()
    }
}

impl Transport for Way {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn bar_bytes(&self) -> u64 {
        self.inner.bar_bytes()
    }

    fn read32(&self, offset: u64) -> Result<u32, TransportError> {
        self.inner.read32(offset)
    }

    fn read64(&self, offset: u64) -> Result<u64, TransportError> {
        self.inner.read64(offset)
    }

    fn write32(&self, offset: u64, value: u32) -> Result<(), TransportError> {
        self.inner.write32(offset, value)
    }

    fn write64(&self, offset: u64, value: u64) -> Result<(), TransportError> {
        self.inner.write64(offset, value)
    }

    fn doorbell(&self, offset: u64, value: u32) {
        self.inner.doorbell(offset, value);
    }

    fn allocate(&self, bytes: usize) -> Result<Arc<dyn DmaRegion>, TransportError> {
        let region = self.inner.allocate(bytes)?;
        self.given.lock().unwrap().push(Arc::downgrade(&region));
        Ok(region)
    }

    fn interrupt_vectors(&self) -> u16 {
        self.inner.interrupt_vectors()
    }

    fn connect_interrupt(
        &self,
        vector: u16,
        eventfd: std::os::fd::BorrowedFd<'_>,
    ) -> Result<(), TransportError> {
        self.inner.connect_interrupt(vector, eventfd)
    }

    fn listen(&self, vector: u16, listen: Listen) {
        self.inner.listen(vector, listen);
    }

    fn revoke_dma(&self) -> Result<(), TransportError> {
        match self.means {
            Means::None => Err(TransportError::Unsupported("revoke")),
            _ => self.inner.revoke_dma(),
        }
    }

    fn reset_function(&self) -> Result<(), TransportError> {
        match self.means {
            Means::FunctionReset => self.inner.reset_function(),
            _ => Err(TransportError::Unsupported("reset the function")),
        }
    }
}

/// A controller in software.
pub(crate) fn device(world: World) -> Arc<EmulatedController> {
    let mode = match world {
        World::Inline => Mode::Inline,
        World::Stepped | World::Shadowed => Mode::Stepped,
        World::Threads => Mode::Threaded(ThreadOptions::default()),
    };
    let namespace = NamespaceConfig::memory(4 << 20).with_lba_size(BLOCK as u32);
    let shadow_doorbells = match world {
        World::Shadowed => ShadowDoorbells::Offered,
        _ => ShadowDoorbells::Absent,
    };
    let config = ControllerConfig {
        mode,
        shadow_doorbells,
        // The shortest time to become ready; and a queue or two.
        to: 1,
        io_queues: 4,
        ..ControllerConfig::with_namespace(namespace)
    };
    EmulatedController::new(config).unwrap()
}

/// A driver over a controller.
pub(crate) struct Bench {
    pub(crate) world: World,
    pub(crate) clock: Arc<Clock>,
    pub(crate) way: Arc<Way>,
    pub(crate) controller: Arc<Controller>,
    pub(crate) queue: QueuePair,
    pub(crate) device: Arc<EmulatedController>,
}

/// What a queue of the table is like.
pub(crate) fn queue_options(world: World) -> QueueOptions {
    let interrupts = if world == World::Threads { Interrupts::Enabled } else { Interrupts::Disabled };
    QueueOptions {
        depth: DEPTH,
        pool_bytes: 256 << 10,
        command_timeout: if world == World::Threads { THREADS_TIMEOUT } else { TIMEOUT },
        interrupts,
        ..QueueOptions::default()
    }
}

/// The clock of a device, and a way to it.
pub(crate) fn way_to(device: &Arc<EmulatedController>, world: World, means: Means) -> (Arc<Clock>, Arc<Way>) {
    let clock = Arc::new(Clock::new(world));
    clock.device.set(Arc::downgrade(device)).unwrap();
    let inner = EmbeddedTransport::new(Arc::clone(device), "emu:table");
    (clock, Arc::new(Way { inner, means, given: Mutex::default() }))
}

/// Brings up a controller.
pub(crate) fn bring_up(
    world: World,
    clock: &Arc<Clock>,
    way: &Arc<Way>,
) -> Result<Arc<Controller>, BringUpError> {
    let keeper = if world == World::Threads { Keeper::Thread } else { Keeper::Polled };
    let options = ControllerOptions { queues: Some(2), keeper, ..ControllerOptions::default() };
    Controller::bring_up(Arc::clone(way) as _, Arc::clone(clock) as _, &options)
}

impl Bench {
    pub(crate) fn over(device: Arc<EmulatedController>, world: World, means: Means) -> Self {
        let (clock, way) = way_to(&device, world, means);
        let controller = bring_up(world, &clock, &way).unwrap();
        let queue = controller.create_queue(&queue_options(world)).unwrap();
        Self { world, clock, way, controller, queue, device }
    }

    pub(crate) fn new(world: World, means: Means) -> Self {
        Self::over(device(world), world, means)
    }

    /// One round of the queue's owner, and a little time.
    pub(crate) fn round(&mut self, sink: &mut dyn FnMut(reactor::block::Completion)) {
        self.queue.arm_interrupt();
        self.queue.process_completions(64, sink);
        self.queue.ring();
        match self.world {
            World::Threads => std::thread::sleep(Duration::from_micros(100)),
            _ => self.clock.pass(Duration::from_millis(50)),
        }
    }
}
