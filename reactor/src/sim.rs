//! The simulator: any number of reactors in one thread, in virtual time, in an order drawn from a seed.
//!
//! The tasks are the same as on real reactors, and so is the code of the reactors' rounds; only who goes next, and
//! what time it is, is decided here.
//!
//! Invariants:
//! - the same program with the same seed does the same things in the same order: [`Simulator::trace_hash`] says so;
//! - time moves only when nothing can run (a jump to the next timer or device event), and by a few hundred
//!   nanoseconds per round, so that no two rounds happen at the same moment;
//! - if nothing can run and nothing will ever happen, [`Simulator::block_on`] says so instead of hanging.
//!
//! Excludes: threads. A task that waits for another OS thread is a deadlock here.

mod disk;
mod failing;
mod image;
mod miswrite;

use std::cell::Cell;
use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Poll, Waker};
use std::time::Duration;

use crate::bell::Bell;
use crate::block::BlockDevice;
use crate::clock::{Clock, Instant, WallTime};
use crate::context::Context;
use crate::core::{Core, CoreParts, ReactorConfig, Schedule};
use crate::handle::{ReactorHandle, ReactorId, Shared};
use crate::random::{Random, mix};
use crate::task::TaskHeader;

pub use disk::{CutPolicy, SimDisk, SimDiskOptions, Tearing};
pub use failing::{Repeat, RequestKind};
pub use image::DiskImage;
pub use miswrite::Miswrite;

/// Calendar time at which virtual time starts: 2026-01-01T00:00:00Z.
const START: i64 = 1_767_225_600;

/// Virtual time that one round takes, at most.
const MAX_ROUND_NANOS: u64 = 500;

/// Rounds in a row that may make no progress although a device without [`next_event`](BlockDevice::next_event) holds
/// operations; then it counts as hung.
const MAX_BARREN_ROUNDS: u32 = 100_000;

/// Tasks of one simulated reactor unless configured otherwise.
const SIM_MAX_TASKS: usize = 8192;

/// Virtual time, shared by everything in one simulation.
#[derive(Debug, Default)]
pub struct VirtualClock(AtomicU64);

impl VirtualClock {
    /// A clock at its origin.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Moves on by `duration`.
    pub fn advance(&self, duration: Duration) {
        self.advance_to(self.now().saturating_add(duration));
    }

    /// Moves on to `time`; never back.
    pub fn advance_to(&self, time: Instant) {
        // Relaxed: one thread; the atomic is there because clocks are shared types.
        self.0.fetch_max(time.as_nanos(), Ordering::Relaxed);
    }
}

impl Clock for VirtualClock {
    fn now(&self) -> Instant {
        Instant::from_nanos(self.0.load(Ordering::Relaxed))
    }

    fn wall(&self) -> WallTime {
        let start = WallTime::new(START, 0).unwrap_or(WallTime::EPOCH);
        start.saturating_add(self.now().duration_since(Instant::ZERO))
    }
}

/// What a simulation is made of.
#[derive(Debug)]
pub struct SimOptions {
    /// Decides everything that is left to chance.
    pub seed: u64,
    /// Number of reactors.
    pub reactors: u16,
    /// The reactors' budgets.
    pub config: ReactorConfig,
    /// A disk that every reactor gets a queue of; it is put on virtual time.
    pub disk: Option<SimDisk>,
    /// Rounds before [`Simulator::block_on`] gives up.
    pub max_rounds: u64,
}

impl Default for SimOptions {
    fn default() -> Self {
        let config = ReactorConfig { max_tasks: SIM_MAX_TASKS, ..ReactorConfig::default() };
        Self { seed: 0, reactors: 1, config, disk: None, max_rounds: u64::MAX }
    }
}

/// Why a simulation did not come to its end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SimError {
    /// Nothing can run, and nothing will happen that would change that.
    #[error("deadlock at {time} ns after {rounds} rounds (seed {seed}): {reactors}")]
    Deadlock {
        /// The simulation's seed.
        seed: u64,
        /// Virtual time in nanoseconds.
        time: u64,
        /// Rounds so far.
        rounds: u64,
        /// What each reactor is waiting for.
        reactors: String,
    },
    /// [`SimOptions::max_rounds`] was reached.
    #[error("no end after {rounds} rounds (seed {seed}): {reactors}")]
    TooManyRounds {
        /// The simulation's seed.
        seed: u64,
        /// Rounds so far.
        rounds: u64,
        /// What each reactor is doing.
        reactors: String,
    },
}

/// Reactors in one thread.
pub struct Simulator {
    seed: u64,
    clock: Arc<VirtualClock>,
    cores: Vec<Rc<Core>>,
    order: Random,
    rounds: Cell<u64>,
    max_rounds: u64,
    barren: Cell<u32>,
    trace: Cell<u64>,
}

impl Simulator {
    /// A simulation at time zero, with nothing to do yet.
    ///
    /// # Panics
    /// Without reactors.
    pub fn new(options: SimOptions) -> Self {
        let SimOptions { seed, reactors, config, disk, max_rounds } = options;
        assert!(reactors > 0, "a simulation needs a reactor");
        let clock = VirtualClock::new();
        if let Some(disk) = &disk {
            disk.set_clock(Arc::clone(&clock) as Arc<dyn Clock>);
        }
        let cores = (0..reactors).map(ReactorId::new).map(|id| {
            let order = Random::new(mix(seed, 0x6f72_6465_7221), u64::from(id.get()));
            let core = Core::new(CoreParts {
                shared: Shared::new(id, config.max_tasks, Bell::silent()),
                config: config.clone(),
                clock: Arc::clone(&clock) as Arc<dyn Clock>,
                seed,
                schedule: Schedule::Seeded { order, trace: Cell::new(0) },
            });
            if let Some(disk) = &disk {
                core.attach(disk.queue(id));
            }
            core
        });
        Self {
            seed,
            cores: cores.collect(),
            clock,
            order: Random::new(seed, u64::MAX),
            rounds: Cell::new(0),
            max_rounds,
            barren: Cell::new(0),
            trace: Cell::new(0),
        }
    }

    /// Gives reactor `index` a device of its own; only if [`SimOptions::disk`] gave it none.
    ///
    /// # Panics
    /// If the reactor has a device.
    pub fn attach(&self, index: usize, device: Box<dyn BlockDevice>) {
        self.cores[index].attach(device);
    }

    /// Reactor `index` as other threads would see it.
    pub fn handle(&self, index: usize) -> ReactorHandle {
        ReactorHandle { shared: Arc::clone(self.cores[index].shared()) }
    }

    /// Reactor `index` as its tasks see it.
    pub fn context(&self, index: usize) -> Context {
        Context::new(Rc::clone(&self.cores[index]))
    }

    /// Number of reactors.
    pub fn reactors(&self) -> usize {
        self.cores.len()
    }

    /// Virtual time.
    pub fn clock(&self) -> Arc<VirtualClock> {
        Arc::clone(&self.clock)
    }

    /// Starts a task on reactor `index`; it runs in [`block_on`](Self::block_on) and its kin.
    ///
    /// # Panics
    /// If the reactor's task slots are all taken.
    pub fn spawn<F, Fut>(&self, index: usize, task: F)
    where
        F: FnOnce(Context) -> Fut,
        Fut: Future<Output = ()> + 'static,
    {
        let context = self.context(index);
        let spawned = self.context(index).spawn(task(context));
        assert_eq!(spawned, Ok(()), "reactor {index} has no room for a task");
    }

    /// Runs everything until the future made by `f` on reactor `index` is ready.
    ///
    /// # Errors
    /// Nothing can run any more, or the limit of rounds is reached. The future is dropped, the tasks stay.
    pub fn block_on<F, Fut>(&self, index: usize, f: F) -> Result<Fut::Output, SimError>
    where
        F: FnOnce(Context) -> Fut,
        Fut: Future,
    {
        let core = &self.cores[index];
        let mut future = pin!(f(self.context(index)));
        let header = TaskHeader::root(core.shared());
        let waker = Waker::from(Arc::clone(&header));
        waker.wake_by_ref();
        let output = loop {
            if core.take_root_ready() {
                header.begin_poll();
                let _entered = core.enter();
                if let Poll::Ready(output) = future.as_mut().poll(&mut std::task::Context::from_waker(&waker))
                {
                    break Ok(output);
                }
            }
            match self.step() {
                Ok(true) => {}
                Ok(false) => break Err(self.deadlock()),
                Err(error) => break Err(error),
            }
        };
        if header.end() {
            // An entry of this root is still queued: it must not be taken for the next one's.
            while !core.take_root_ready() && self.step() == Ok(true) {}
        }
        output
    }

    /// Runs until nothing can run and nothing is going to happen: every task has ended or waits for ever.
    ///
    /// # Errors
    /// The limit of rounds is reached.
    pub fn run_until_idle(&self) -> Result<(), SimError> {
        while self.step()? {}
        Ok(())
    }

    /// Runs until virtual time has moved on by `duration`, or nothing is going to happen.
    ///
    /// # Errors
    /// The limit of rounds is reached.
    pub fn run_for(&self, duration: Duration) -> Result<(), SimError> {
        let end = self.clock.now().saturating_add(duration);
        while self.clock.now() < end && (self.runnable() || self.next_event().is_some_and(|next| next <= end))
        {
            self.step()?;
        }
        self.clock.advance_to(end);
        Ok(())
    }

    /// One round of one reactor that has something to do, or a jump in time. `false`: nothing will ever happen.
    fn step(&self) -> Result<bool, SimError> {
        let candidates = self.cores.iter().filter(|core| self.can_run(core)).count();
        if candidates == 0 {
            return Ok(self.jump());
        }
        self.rounds.set(self.rounds.get() + 1);
        if self.rounds.get() > self.max_rounds {
            return Err(self.too_many_rounds());
        }
        let pick = self.order.index(candidates);
        let core = self.cores.iter().filter(|core| self.can_run(core)).nth(pick);
        let core = core.expect("counted a moment ago");
        self.trace.set(mix(self.trace.get(), u64::from(core.shared().id.get())));
        self.clock.advance(Duration::from_nanos(1 + self.order.below(MAX_ROUND_NANOS)));
        let _entered = core.enter();
        let progress = core.turn();
        self.barren.set(if progress { 0 } else { self.barren.get() + 1 });
        Ok(true)
    }

    fn runnable(&self) -> bool {
        self.cores.iter().any(|core| self.can_run(core))
    }

    fn can_run(&self, core: &Core) -> bool {
        let now = self.clock.now();
        core.has_ready()
            || core.next_timer().is_some_and(|timer| timer <= now)
            || core.disk().is_some_and(|disk| match disk.next_event() {
                Some(event) => event <= now,
                None => disk.in_flight() > 0 && self.barren.get() < MAX_BARREN_ROUNDS,
            })
    }

    fn next_event(&self) -> Option<Instant> {
        let of_core = |core: &Rc<Core>| {
            let device = core.disk().and_then(crate::disk::Disk::next_event);
            core.next_timer().into_iter().chain(device).min()
        };
        self.cores.iter().filter_map(of_core).min()
    }

    /// Moves time to the next thing that happens. `false`: nothing will.
    fn jump(&self) -> bool {
        match self.next_event() {
            Some(time) => {
                self.clock.advance_to(time);
                true
            }
            None => false,
        }
    }

    /// A hash of everything that happened so far: which reactor went when, which task, completion or timer it was.
    /// Equal for the same program with the same seed.
    pub fn trace_hash(&self) -> u64 {
        let start = mix(self.trace.get(), self.clock.now().as_nanos());
        self.cores.iter().fold(start, |hash, core| mix(hash, core.trace_hash()))
    }

    /// The same as [`trace_hash`](Self::trace_hash).
    pub fn state_hash(&self) -> u64 {
        self.trace_hash()
    }

    /// Folds `value` into the [trace hash](Self::trace_hash): for results that the program thinks worth comparing.
    pub fn note(&self, value: u64) {
        self.trace.set(mix(self.trace.get(), value));
    }

    fn deadlock(&self) -> SimError {
        SimError::Deadlock {
            seed: self.seed,
            time: self.clock.now().as_nanos(),
            rounds: self.rounds.get(),
            reactors: self.report(),
        }
    }

    fn too_many_rounds(&self) -> SimError {
        SimError::TooManyRounds { seed: self.seed, rounds: self.rounds.get(), reactors: self.report() }
    }

    fn report(&self) -> String {
        let describe = |core: &Rc<Core>| {
            let in_flight = core.disk().map_or(0, crate::disk::Disk::in_flight);
            let (id, tasks) = (core.shared().id, core.live_tasks());
            format!(
                "{id}: {tasks} tasks alive, {in_flight} operations in flight, next timer {:?}",
                core.next_timer()
            )
        };
        self.cores.iter().map(describe).collect::<Vec<_>>().join("; ")
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        for core in &self.cores {
            let _entered = core.enter();
            core.shutdown();
        }
    }
}

impl fmt::Debug for Simulator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Simulator").field("seed", &self.seed).field("reactors", &self.report()).finish()
    }
}

#[cfg(test)]
mod tests;
