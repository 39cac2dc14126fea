//! The part of a reactor that other threads may touch: its number, its inboxes, its bell and its counters.
//!
//! Invariants:
//! - the ready queue never overflows: a task is queued at most once, and its slot is reused only after its entry
//!   was taken out (see `task`);
//! - after a stop, nothing stays in the inbox: whoever pushes last empties it.
//!
//! Excludes: everything that belongs to the reactor's own thread (`core`).

use std::fmt;
use std::sync::Arc;

use crossbeam_queue::ArrayQueue;

use crate::bell::Bell;
use crate::context::Context;
use crate::stats::{Counters, ReactorStats};
use crate::sync::{AtomicBool, Ordering};

/// Closures that wait to be run on a reactor, at most.
pub const INBOX_CAPACITY: usize = 1024;

/// The number of a reactor within its runtime or simulator, from zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReactorId(u16);

impl ReactorId {
    /// Reactor number `index`.
    pub const fn new(index: u16) -> Self {
        Self(index)
    }

    /// The number.
    pub const fn get(self) -> u16 {
        self.0
    }

    /// The number as an index into a slice of per-reactor values.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for ReactorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "reactor {}", self.0)
    }
}

/// Why a task or closure was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpawnError {
    /// All task slots, or all places in the inbox, are taken. Try again later.
    #[error("the reactor has no room for another task")]
    Full,
    /// The reactor has stopped or is stopping.
    #[error("the reactor has stopped")]
    Stopped,
}

type Job = Box<dyn FnOnce(Context) + Send>;

/// State of a reactor that any thread may reach.
pub(crate) struct Shared {
    pub(crate) id: ReactorId,
    /// Task slots woken from other threads.
    pub(crate) ready: ArrayQueue<u32>,
    inbox: ArrayQueue<Job>,
    pub(crate) bell: Bell,
    pub(crate) counters: Counters,
    stop: AtomicBool,
    closed: AtomicBool,
}

impl Shared {
    /// The shared part of reactor `id` with room for `max_tasks` tasks.
    pub(crate) fn new(id: ReactorId, max_tasks: usize, bell: Bell) -> Arc<Self> {
        Arc::new(Self {
            id,
            // One more for the root future.
            ready: ArrayQueue::new(max_tasks + 1),
            inbox: ArrayQueue::new(INBOX_CAPACITY),
            bell,
            counters: Counters::default(),
            stop: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        })
    }

    /// Queues a woken task from another thread.
    pub(crate) fn push_ready(&self, slot: u32) {
        self.ready.push(slot).expect("a task is queued at most once");
        self.ring();
    }

    /// The next closure to run here.
    pub(crate) fn pop_job(&self) -> Option<Job> {
        self.inbox.pop()
    }

    /// Whether something came from outside that the reactor has not taken yet.
    pub(crate) fn has_work(&self) -> bool {
        !self.ready.is_empty() || !self.inbox.is_empty()
    }

    pub(crate) fn stop_requested(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    pub(crate) fn request_stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.bell.request();
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// No closure is taken from now on; those that wait are dropped.
    pub(crate) fn close(&self) {
        // SeqCst, with the load in `submit`: either the pusher sees the flag or we see its job.
        self.closed.store(true, Ordering::SeqCst);
        while self.inbox.pop().is_some() {}
    }

    fn submit(&self, job: Job) -> Result<(), SpawnError> {
        if self.is_closed() {
            return Err(SpawnError::Stopped);
        }
        self.inbox.push(job).map_err(|_| SpawnError::Full)?;
        crate::sync::fence(Ordering::SeqCst);
        if self.is_closed() {
            while self.inbox.pop().is_some() {}
            return Err(SpawnError::Stopped);
        }
        self.ring();
        Ok(())
    }

    fn ring(&self) {
        if self.bell.ring() {
            self.counters.count_wakeup();
        }
    }
}

/// A reactor as other threads see it.
#[derive(Clone)]
pub struct ReactorHandle {
    pub(crate) shared: Arc<Shared>,
}

impl ReactorHandle {
    /// The reactor's number.
    pub fn id(&self) -> ReactorId {
        self.shared.id
    }

    /// Runs `job` on the reactor's thread, soon. It must not block; it may [spawn](Context::spawn).
    ///
    /// # Errors
    /// [`INBOX_CAPACITY`] closures wait already, or the reactor has stopped. `job` is dropped.
    pub fn spawn_with(&self, job: impl FnOnce(Context) + Send + 'static) -> Result<(), SpawnError> {
        self.shared.submit(Box::new(job))
    }

    /// Makes the reactor go round its loop once more, even if it sleeps.
    pub fn wake(&self) {
        self.shared.bell.request();
    }

    /// What the reactor has done so far.
    pub fn stats(&self) -> ReactorStats {
        self.shared.counters.read()
    }
}

impl fmt::Debug for ReactorHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReactorHandle").field("id", &self.shared.id).finish_non_exhaustive()
    }
}
