//! Counters of one reactor, readable from any thread.
//!
//! Invariants: every counter but `wakeups` has one writer, the reactor, so an increment is a load and a store. All
//! are statistics: they order nothing, hence Relaxed throughout. Excludes: device counters.

use std::sync::atomic::{AtomicU64, Ordering};

/// A reading of a reactor's counters since its start. The fields were read one after the other, not at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReactorStats {
    /// Rounds of the loop.
    pub loops: u64,
    /// Rounds that found something to do.
    pub busy_loops: u64,
    /// Times a task was polled.
    pub polls: u64,
    /// Tasks started.
    pub tasks_started: u64,
    /// Tasks finished.
    pub tasks_finished: u64,
    /// Device operations completed.
    pub completions: u64,
    /// Timers fired.
    pub timers: u64,
    /// Times the reactor blocked.
    pub sleeps: u64,
    /// Times another thread had to wake it (eventfd writes).
    pub wakeups: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) loops: Counter,
    pub(crate) busy_loops: Counter,
    pub(crate) polls: Counter,
    pub(crate) tasks_started: Counter,
    pub(crate) tasks_finished: Counter,
    pub(crate) completions: Counter,
    pub(crate) timers: Counter,
    pub(crate) sleeps: Counter,
    wakeups: AtomicU64,
}

/// A counter with one writer.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, amount: usize) {
        let value = self.0.load(Ordering::Relaxed);
        self.0.store(value.wrapping_add(amount as u64), Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Counters {
    /// The one counter that other threads write.
    pub(crate) fn count_wakeup(&self) {
        self.wakeups.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> ReactorStats {
        ReactorStats {
            loops: self.loops.get(),
            busy_loops: self.busy_loops.get(),
            polls: self.polls.get(),
            tasks_started: self.tasks_started.get(),
            tasks_finished: self.tasks_finished.get(),
            completions: self.completions.get(),
            timers: self.timers.get(),
            sleeps: self.sleeps.get(),
            wakeups: self.wakeups.load(Ordering::Relaxed),
        }
    }
}
