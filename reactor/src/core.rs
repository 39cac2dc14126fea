//! One reactor's own thread: the loop's round, and everything it touches.
//!
//! A round is, each step with a budget: completions → closures and wake-ups from outside → timers → tasks → queued
//! submissions → one ring of the device.
//!
//! Invariants:
//! - no `RefCell` of this crate is borrowed while foreign code (a task, a closure, a waker) runs;
//! - after [`Core::shutdown`] no task lives, none starts, and the device has answered or the drain limit has passed.
//!
//! Excludes: when rounds are made and when to sleep (`runtime`, `sim`).

use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use crate::block::BlockDevice;
use crate::clock::{Clock, Instant};
use crate::context::Context;
use crate::disk::Disk;
use crate::handle::{Shared, SpawnError};
use crate::random::{Random, mix};
use crate::task::{Entered, LocalFuture, LocalReady, ROOT, TaskTable};
use crate::timers::Timers;

/// Tasks of one reactor, at most, unless configured otherwise.
pub const DEFAULT_MAX_TASKS: usize = 1 << 16;

/// How a reactor goes about its work.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReactorConfig {
    /// How long to look for work before sleeping.
    pub idle_spin: Duration,
    /// Device completions handled in one round, at most.
    pub completion_budget: usize,
    /// Closures and wake-ups from other threads taken in one round, at most (of each).
    pub mailbox_budget: usize,
    /// Timers fired in one round, at most.
    pub timer_budget: usize,
    /// Tasks polled in one round, at most.
    pub task_budget: usize,
    /// Tasks at one time, at most.
    pub max_tasks: usize,
}

impl Default for ReactorConfig {
    fn default() -> Self {
        Self {
            idle_spin: Duration::from_micros(50),
            completion_budget: 128,
            mailbox_budget: 256,
            timer_budget: 256,
            task_budget: 256,
            max_tasks: DEFAULT_MAX_TASKS,
        }
    }
}

/// In which order ready tasks run.
pub(crate) enum Schedule {
    /// First in, first out.
    Fifo,
    /// Any of the ready ones, by seed; what happens is folded into a trace hash.
    Seeded { order: Random, trace: Cell<u64> },
}

/// What a [`Core`] is made of.
pub(crate) struct CoreParts {
    pub(crate) shared: Arc<Shared>,
    pub(crate) config: ReactorConfig,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) seed: u64,
    pub(crate) schedule: Schedule,
}

/// Everything of a reactor that belongs to its thread.
pub(crate) struct Core {
    shared: Arc<Shared>,
    config: ReactorConfig,
    clock: Arc<dyn Clock>,
    random: Random,
    schedule: Schedule,
    tasks: RefCell<TaskTable>,
    ready: Rc<LocalReady>,
    timers: RefCell<Timers>,
    disk: OnceCell<Disk>,
    /// The root future was woken.
    root_ready: Cell<bool>,
    stopping: Cell<bool>,
}

impl Core {
    pub(crate) fn new(parts: CoreParts) -> Rc<Self> {
        let random = Random::new(parts.seed, u64::from(parts.shared.id.get()));
        Rc::new(Self {
            random,
            tasks: RefCell::new(TaskTable::new(parts.config.max_tasks)),
            shared: parts.shared,
            config: parts.config,
            clock: parts.clock,
            schedule: parts.schedule,
            ready: Rc::default(),
            timers: RefCell::default(),
            disk: OnceCell::new(),
            root_ready: Cell::new(false),
            stopping: Cell::new(false),
        })
    }

    /// Gives the reactor its device.
    ///
    /// # Panics
    /// If it has one.
    pub(crate) fn attach(&self, device: Box<dyn BlockDevice>) {
        assert!(self.disk.set(Disk::new(device)).is_ok(), "{} has a device already", self.shared.id);
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(crate) fn config(&self) -> &ReactorConfig {
        &self.config
    }

    pub(crate) fn clock(&self) -> &dyn Clock {
        &*self.clock
    }

    pub(crate) fn random(&self) -> &Random {
        &self.random
    }

    pub(crate) fn timers(&self) -> &RefCell<Timers> {
        &self.timers
    }

    pub(crate) fn disk(&self) -> Option<&Disk> {
        self.disk.get()
    }

    /// Marks this thread as running this reactor's code.
    pub(crate) fn enter(&self) -> Entered {
        Entered::new(&self.shared, &self.ready)
    }

    pub(crate) fn spawn(&self, future: LocalFuture) -> Result<(), SpawnError> {
        if self.stopping.get() {
            return Err(SpawnError::Stopped);
        }
        let waker = self.tasks.borrow_mut().insert(&self.shared, future)?;
        self.shared.counters.tasks_started.add(1);
        waker.wake();
        Ok(())
    }

    /// One round. Returns whether there was anything to do. The thread must have [entered](Self::enter).
    pub(crate) fn turn(self: &Rc<Self>) -> bool {
        let mut done = self.take_completions();
        done += self.take_from_outside();
        done += self.fire_timers();
        done += self.run_tasks();
        if let Some(disk) = self.disk() {
            done += disk.pump();
            disk.ring();
        }
        let counters = &self.shared.counters;
        counters.loops.add(1);
        if done > 0 {
            counters.busy_loops.add(1);
        }
        done > 0
    }

    fn take_completions(&self) -> usize {
        let Some(disk) = self.disk() else { return 0 };
        let count = disk.process_completions(self.config.completion_budget, &mut |tag| self.trace(1, tag));
        self.shared.counters.completions.add(count);
        count
    }

    fn take_from_outside(self: &Rc<Self>) -> usize {
        let mut count = 0;
        while count < self.config.mailbox_budget {
            let Some(slot) = self.shared.ready.pop() else { break };
            self.ready.borrow_mut().push_back(slot);
            count += 1;
        }
        for _ in 0..self.config.mailbox_budget {
            let Some(job) = self.shared.pop_job() else { break };
            job(Context::new(Rc::clone(self)));
            count += 1;
        }
        count
    }

    fn fire_timers(&self) -> usize {
        if self.timers.borrow().next_deadline().is_none() {
            return 0;
        }
        let now = self.clock.now();
        let mut count = 0;
        while count < self.config.timer_budget {
            let Some(waker) = self.timers.borrow_mut().pop_due(now) else { break };
            self.trace(2, now.as_nanos());
            waker.wake();
            count += 1;
        }
        self.shared.counters.timers.add(count);
        count
    }

    /// Polls the tasks that are ready now; those they wake have their turn in the next round.
    fn run_tasks(&self) -> usize {
        let count = self.ready.borrow().len().min(self.config.task_budget);
        for _ in 0..count {
            let slot = self.next_ready();
            self.trace(3, u64::from(slot));
            if slot == ROOT {
                self.root_ready.set(true);
            } else {
                self.poll_task(slot);
            }
        }
        self.shared.counters.polls.add(count);
        count
    }

    fn next_ready(&self) -> u32 {
        let mut ready = self.ready.borrow_mut();
        let slot = match &self.schedule {
            Schedule::Fifo => ready.pop_front(),
            Schedule::Seeded { order, .. } => {
                let index = order.index(ready.len());
                ready.swap_remove_back(index)
            }
        };
        slot.expect("only this loop takes from the local queue")
    }

    fn poll_task(&self, slot: u32) {
        let Some(mut task) = self.tasks.borrow_mut().begin(slot) else { return };
        match task.future.as_mut().poll(&mut std::task::Context::from_waker(&task.waker)) {
            Poll::Pending => self.tasks.borrow_mut().suspend(slot, task),
            Poll::Ready(()) => {
                // What the future owns is dropped while the slot is still taken: the drop may wake and spawn.
                drop(task);
                self.tasks.borrow_mut().finish(slot);
                self.shared.counters.tasks_finished.add(1);
            }
        }
    }

    /// Whether the root future was woken since the last call.
    pub(crate) fn take_root_ready(&self) -> bool {
        self.root_ready.take()
    }

    /// Whether tasks of this reactor are ready, without looking at device or timers.
    pub(crate) fn has_ready(&self) -> bool {
        !self.ready.borrow().is_empty() || self.root_ready.get() || self.shared.has_work()
    }

    /// When the next timer fires.
    pub(crate) fn next_timer(&self) -> Option<Instant> {
        self.timers.borrow().next_deadline()
    }

    /// Tasks that have not ended.
    pub(crate) fn live_tasks(&self) -> usize {
        self.tasks.borrow().live()
    }

    fn trace(&self, kind: u64, value: u64) {
        if let Schedule::Seeded { trace, .. } = &self.schedule {
            trace.set(mix(trace.get(), mix(kind, value)));
        }
    }

    /// The hash of everything this reactor has done, under a seeded schedule.
    pub(crate) fn trace_hash(&self) -> u64 {
        match &self.schedule {
            Schedule::Fifo => 0,
            Schedule::Seeded { trace, .. } => trace.get(),
        }
    }

    /// Drops every task and takes no new work. Operations in flight are detached; see [`drain`](Self::drain).
    pub(crate) fn shutdown(&self) {
        self.stopping.set(true);
        let tasks = self.tasks.borrow_mut().take_all();
        drop(tasks);
        self.shared.close();
    }

    /// Takes completions until the device holds no operation or `limit` has passed. Returns what it still holds.
    pub(crate) fn drain(&self, limit: Duration) -> usize {
        /// Pause between looks.
        const PAUSE: Duration = Duration::from_micros(100);
        let Some(disk) = self.disk() else { return 0 };
        let deadline = std::time::Instant::now() + limit;
        loop {
            disk.pump();
            disk.ring();
            disk.process_completions(self.config.completion_budget, &mut |_| ());
            let left = disk.in_flight();
            if left == 0 || std::time::Instant::now() >= deadline {
                return left;
            }
            std::thread::sleep(PAUSE);
        }
    }
}
