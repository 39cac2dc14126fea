//! Reactors on real threads: starting, pinning, spinning, sleeping, stopping.
//!
//! | state of a reactor's thread | event | next |
//! |---|---|---|
//! | Working | a round found something to do | Working |
//! | Working | a round found nothing | Spinning |
//! | Spinning | a round found something to do | Working |
//! | Spinning | `idle_spin` has passed | Asleep, unless the second look finds something |
//! | Asleep | bell, device interrupt, next timer | Working |
//! | any but Asleep | stop | Draining: tasks dropped, operations awaited |
//! | Draining | device quiet, or [`DRAIN_LIMIT`] | ended |
//!
//! Invariants: a reactor sleeps only after it has announced that (`bell`) and has then looked once more at its
//! inboxes and at the device. Excludes: what a round does (`core`).

use std::fmt;
use std::future::Future;
use std::hint;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc;
use std::task::{Poll, Waker};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use crate::bell::Bell;
use crate::block::BlockDevice;
use crate::clock::{Clock, Instant};
use crate::context::Context;
use crate::core::{Core, CoreParts, ReactorConfig, Schedule};
use crate::handle::{ReactorHandle, ReactorId, Shared};
use crate::task::{TaskHeader, current_reactor};

/// How long a stopping reactor waits for its device to answer.
pub const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// How long a reactor sleeps when its device holds operations and has no interrupt.
const POLLED_DEVICE_NAP: Duration = Duration::from_micros(100);

/// How long a reactor sleeps when the system gave it no eventfd to be woken by.
const BELL_LESS_NAP: Duration = Duration::from_millis(1);

/// A processor of the machine, by the operating system's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CoreId(usize);

impl CoreId {
    /// Processor number `id`.
    pub const fn new(id: usize) -> Self {
        Self(id)
    }

    /// The number.
    pub const fn get(self) -> usize {
        self.0
    }

    /// The processors this process may run on; empty if the system does not say.
    pub fn available() -> Vec<CoreId> {
        core_affinity::get_core_ids().unwrap_or_default().into_iter().map(|core| CoreId(core.id)).collect()
    }
}

/// How to start a [`Runtime`].
#[derive(Clone)]
pub struct Options {
    /// One reactor is started for each, and pinned there. A processor that does not exist costs a warning.
    pub cores: Vec<CoreId>,
    /// Budgets and limits.
    pub config: ReactorConfig,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Seed of the reactors' randomness.
    pub seed: u64,
}

/// Why a runtime did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError<E> {
    /// No cores were given, or more than 65,535.
    #[error("a runtime needs between 1 and 65535 cores, not {0}")]
    CoreCount(usize),
    /// A thread or an eventfd could not be made.
    #[error("{reactor} could not be started: {source}")]
    System {
        /// Which reactor.
        reactor: ReactorId,
        /// What the system says.
        source: io::Error,
    },
    /// A reactor's device could not be opened.
    #[error("{reactor} could not open its device: {source}")]
    Device {
        /// Which reactor.
        reactor: ReactorId,
        /// What the device factory says.
        source: E,
    },
}

/// What went wrong at the end of a runtime.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StopError {
    /// A task panicked, and its reactor went down with it.
    #[error("{reactor} panicked")]
    Panicked {
        /// Which reactor.
        reactor: ReactorId,
    },
    /// The device did not answer within [`DRAIN_LIMIT`].
    #[error("{reactor} stopped with {operations} operations unanswered")]
    Undrained {
        /// Which reactor.
        reactor: ReactorId,
        /// Operations in flight.
        operations: usize,
    },
}

/// Running reactors.
pub struct Runtime {
    handles: Vec<ReactorHandle>,
    /// Each yields the number of operations left unanswered.
    threads: Vec<JoinHandle<usize>>,
}

impl Runtime {
    /// Starts one reactor per core. `device` is called on each reactor's thread and opens its queue, if it has one.
    ///
    /// # Errors
    /// The first reactor that did not start; the others have been stopped again.
    pub fn start<E, F>(options: Options, device: F) -> Result<Runtime, StartError<E>>
    where
        E: Send + 'static,
        F: Fn(ReactorId) -> Result<Option<Box<dyn BlockDevice>>, E> + Send + Sync + 'static,
    {
        let Options { cores, config, clock, seed } = options;
        let count = cores.len();
        let last = count.checked_sub(1).and_then(|last| u16::try_from(last).ok());
        let Some(last) = last.filter(|&last| last < u16::MAX) else {
            return Err(StartError::CoreCount(count));
        };
        let device = Arc::new(device);
        let (report, reports) = mpsc::channel();
        let mut runtime = Runtime { handles: Vec::new(), threads: Vec::new() };
        for (index, core) in (0..=last).zip(cores) {
            let reactor = ReactorId::new(index);
            let system = |source| StartError::System { reactor, source };
            let bell = Bell::with_eventfd().map_err(|errno| system(errno.into()))?;
            let shared = Shared::new(reactor, config.max_tasks, bell);
            let parts = CoreParts {
                shared: Arc::clone(&shared),
                config: config.clone(),
                clock: Arc::clone(&clock),
                seed,
                schedule: Schedule::Fifo,
            };
            let (device, report) = (Arc::clone(&device), report.clone());
            let body = move || run_thread(parts, core, &*device, report);
            let thread =
                thread::Builder::new().name(format!("reactor-{index}")).spawn(body).map_err(system)?;
            runtime.handles.push(ReactorHandle { shared });
            runtime.threads.push(thread);
        }
        drop(report);
        // Every thread reports once; one that panicked inside the factory hangs up instead.
        let mut first_error = None;
        let mut silent: Vec<ReactorId> = runtime.handles.iter().map(ReactorHandle::id).collect();
        for (reactor, result) in reports {
            silent.retain(|&id| id != reactor);
            if let Err(source) = result {
                first_error.get_or_insert(StartError::Device { reactor, source });
            }
        }
        if let Some(&reactor) = silent.first() {
            let source = io::Error::other("the thread panicked while it opened its device");
            first_error.get_or_insert(StartError::System { reactor, source });
        }
        match first_error {
            Some(error) => Err(error),
            None => Ok(runtime),
        }
    }

    /// The reactors, by number.
    pub fn handles(&self) -> &[ReactorHandle] {
        &self.handles
    }

    /// Drops every task, waits until the devices are quiet, ends the threads. What must be finished is finished by
    /// the caller before.
    ///
    /// # Errors
    /// The first reactor that did not end as it should; all have ended.
    pub fn stop(mut self) -> Result<(), StopError> {
        self.stop_all()
    }

    fn stop_all(&mut self) -> Result<(), StopError> {
        for handle in &self.handles {
            handle.shared.request_stop();
        }
        let mut result = Ok(());
        for (thread, handle) in self.threads.drain(..).zip(&self.handles) {
            let reactor = handle.id();
            let outcome = match thread.join() {
                Ok(0) => Ok(()),
                Ok(operations) => Err(StopError::Undrained { reactor, operations }),
                Err(_) => Err(StopError::Panicked { reactor }),
            };
            result = result.and(outcome);
        }
        result
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        if let Err(error) = self.stop_all() {
            tracing::error!(%error, "runtime stopped badly");
        }
    }
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runtime").field("reactors", &self.handles.len()).finish_non_exhaustive()
    }
}

/// Closes the inbox of a reactor however its thread ends, so that nobody waits for a dead reactor.
struct CloseOnExit(Arc<Shared>);

impl Drop for CloseOnExit {
    fn drop(&mut self) {
        self.0.close();
    }
}

fn run_thread<E>(
    parts: CoreParts,
    core_id: CoreId,
    device: &(impl Fn(ReactorId) -> Result<Option<Box<dyn BlockDevice>>, E> + ?Sized),
    report: mpsc::Sender<(ReactorId, Result<(), E>)>,
) -> usize {
    let reactor = parts.shared.id;
    let _close = CloseOnExit(Arc::clone(&parts.shared));
    if !core_affinity::set_for_current(core_affinity::CoreId { id: core_id.get() }) {
        tracing::warn!(%reactor, core = core_id.get(), "could not pin the reactor to its core");
    }
    let core = Core::new(parts);
    let opened = device(reactor).map(|device| {
        if let Some(device) = device {
            core.attach(device);
        }
    });
    let failed = opened.is_err();
    // The receiver outlives the start; a failed send means that the starter has panicked, and the stop comes anyway.
    let _ = report.send((reactor, opened));
    // The starter waits until every sender is gone.
    drop(report);
    if failed { 0 } else { run(&core) }
}

/// Rounds until the stop, then the drain. Returns the number of operations left unanswered.
fn run(core: &Rc<Core>) -> usize {
    let shared = Arc::clone(core.shared());
    let entered = core.enter();
    run_until(core, &mut || shared.stop_requested());
    finish(core, entered)
}

fn finish(core: &Rc<Core>, entered: crate::task::Entered) -> usize {
    core.shutdown();
    let left = core.drain(DRAIN_LIMIT);
    drop(entered);
    left
}

/// Rounds, with spinning and sleeping in between, until `done` says so after one.
fn run_until(core: &Rc<Core>, done: &mut dyn FnMut() -> bool) {
    let mut idle_since: Option<Instant> = None;
    loop {
        let progress = core.turn();
        if done() {
            return;
        }
        if progress || core.has_ready() {
            idle_since = None;
            continue;
        }
        let now = core.clock().now();
        match idle_since {
            None => idle_since = Some(now),
            Some(since) if now - since < core.config().idle_spin => hint::spin_loop(),
            Some(_) => {
                sleep(core, now);
                idle_since = None;
            }
        }
    }
}

/// Blocks until the bell, the device or the next timer, unless the second look finds something.
fn sleep(core: &Core, now: Instant) {
    let shared = core.shared();
    shared.bell.announce();
    let stay = shared.bell.take_request() || shared.has_work();
    if !stay && !device_has_work(core) {
        shared.counters.sleeps.add(1);
        block(core, now);
    }
    shared.bell.retract();
}

fn device_has_work(core: &Core) -> bool {
    core.disk().is_some_and(|disk| disk.device().borrow_mut().arm_interrupt())
}

fn block(core: &Core, now: Instant) {
    let device = core.disk().map(|disk| disk.device().borrow());
    let interrupt = device.as_ref().and_then(|device| device.interrupt());
    let polled = interrupt.is_none() && device.as_ref().is_some_and(|device| device.in_flight() > 0);
    let bell = core.shared().bell.descriptor();
    let timer = core.next_timer().map(|timer| timer.duration_since(now));
    let naps = [polled.then_some(POLLED_DEVICE_NAP), bell.is_none().then_some(BELL_LESS_NAP), timer];
    let timeout = naps.into_iter().flatten().min().map(TimeSpec::from);
    // At most two: the count is fixed, the allocation is not on the I/O path.
    let mut fds: Vec<PollFd<'_>> = bell.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).into_iter().collect();
    fds.extend(interrupt.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
    match ppoll(&mut fds, timeout, None) {
        // Something is readable, or time is up: the next round finds out. A signal is as good as time being up.
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(errno) => tracing::error!(%errno, "a reactor could not sleep"),
    }
    if fds.first().and_then(PollFd::any).unwrap_or(false) && bell.is_some() {
        core.shared().bell.drain();
    }
}

/// Runs one reactor on the calling thread until the future made by `f` is ready; tasks it has spawned are dropped
/// then, and the device is awaited for up to [`DRAIN_LIMIT`].
///
/// # Panics
/// On a reactor's thread.
pub fn block_on<F, Fut>(
    device: Option<Box<dyn BlockDevice>>,
    clock: Arc<dyn Clock>,
    seed: u64,
    f: F,
) -> Fut::Output
where
    F: FnOnce(Context) -> Fut,
    Fut: Future,
{
    assert!(current_reactor().is_none(), "block_on inside a reactor");
    let config = ReactorConfig::default();
    let bell = Bell::with_eventfd().unwrap_or_else(|errno| {
        tracing::warn!(%errno, "no eventfd: wake-ups from other threads take up to a millisecond");
        Bell::silent()
    });
    let shared = Shared::new(ReactorId::new(0), config.max_tasks, bell);
    let _close = CloseOnExit(Arc::clone(&shared));
    let parts = CoreParts { shared: Arc::clone(&shared), config, clock, seed, schedule: Schedule::Fifo };
    let core = Core::new(parts);
    if let Some(device) = device {
        core.attach(device);
    }
    let entered = core.enter();
    let output = {
        let mut future = pin!(f(Context::new(Rc::clone(&core))));
        let header = TaskHeader::root(&shared);
        let waker = Waker::from(Arc::clone(&header));
        waker.wake_by_ref();
        let mut output = None;
        run_until(&core, &mut || {
            if core.take_root_ready() {
                header.begin_poll();
                if let Poll::Ready(value) = future.as_mut().poll(&mut std::task::Context::from_waker(&waker))
                {
                    output = Some(value);
                }
            }
            output.is_some()
        });
        output.expect("the loop ends when there is an output")
    };
    let left = finish(&core, entered);
    if left > 0 {
        tracing::error!(operations = left, "device did not answer before the reactor ended");
    }
    output
}

#[cfg(test)]
mod tests;
