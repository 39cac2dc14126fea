//! What the controller consists of.
//!
//! Owns: [`Core`], which the threads share, and its making.
//!
//! Invariant: the locks are taken in the order handshake, submission queues, completion queues, `admin`.
//!
//! Excludes: what is done with the parts.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16};
use std::sync::{Arc, Mutex};

use crate::admin::AdminState;
use crate::config::{ControllerConfig, Mode, WriteCache};
use crate::dma::DmaSpace;
use crate::error::EmulatorError;
use crate::faults::book::FaultBook;
use crate::gate::Gate;
use crate::interrupt::Vector;
use crate::keep_alive::KeepAlive;
use crate::latency::{Clock, Latency};
use crate::locks::lock;
use crate::namespace::Namespace;
use crate::namespaces::NamespaceTable;
use crate::queue::{CompletionSlot, SubmissionSlot};
use crate::queue_watch::WatchSlot;
use crate::registers::Registers;
use crate::worker::WorkerSet;

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
    pub(super) clock: Clock,
    /// Told when a queue begins.
    pub(crate) queue_watch: WatchSlot,
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
}
