//! Tasks of one reactor: their slots, their wakers, and the two queues of those that are ready.
//!
//! | state of a slot | event | next |
//! |---|---|---|
//! | Free | spawn | Live, queued |
//! | Live, idle | wake | Live, queued |
//! | Live, queued | wake | Live, queued (once) |
//! | Live, queued | taken from the queue | polled; wakes from now on queue it again |
//! | polled | pending | Live |
//! | polled | ready, not queued again | Free |
//! | polled | ready, queued again meanwhile | Zombie, until that entry is taken from the queue; then Free |
//! | any | wake of a waker whose task has ended | unchanged: the waker belongs to the task, not to the slot |
//!
//! Invariants: a task is in the queues at most once and a slot is not reused while an entry names it. So the queues,
//! as long as there are slots, never overflow, and an entry always means the task it was made for.
//!
//! *Memory ordering*: a wake is a release of what the waker wrote, the start of a poll an acquire: both are
//! read-modify-writes of the same byte, so the chain holds even when several wakes fall together.
//!
//! Excludes: when to poll (`core`), sleeping (`bell`).

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Wake, Waker};

use crate::handle::{ReactorId, Shared, SpawnError};
use crate::planted::Bug;
use crate::sync::{AtomicU8, Ordering, order_unless};

/// In a ready queue.
const QUEUED: u8 = 1;
/// The task has ended.
const ENDED: u8 = 2;

/// The slot number of the future given to `block_on`, which lives outside the table.
pub(crate) const ROOT: u32 = u32::MAX;

pub(crate) type LocalFuture = Pin<Box<dyn Future<Output = ()>>>;

/// What a waker points to.
pub(crate) struct TaskHeader {
    shared: Arc<Shared>,
    slot: u32,
    state: AtomicU8,
}

impl TaskHeader {
    fn new(shared: &Arc<Shared>, slot: u32) -> Arc<Self> {
        Arc::new(Self { shared: Arc::clone(shared), slot, state: AtomicU8::new(0) })
    }

    /// The header of a root future.
    pub(crate) fn root(shared: &Arc<Shared>) -> Arc<Self> {
        Self::new(shared, ROOT)
    }

    /// From here on wakes queue the task again.
    pub(crate) fn begin_poll(&self) {
        self.state.fetch_and(!QUEUED, order_unless(Bug::PollRelaxed, Ordering::AcqRel));
    }

    /// The task is over. Returns whether a queue still names its slot.
    pub(crate) fn end(&self) -> bool {
        self.state.fetch_or(ENDED, Ordering::AcqRel) & QUEUED != 0
    }
}

impl Wake for TaskHeader {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let order = order_unless(Bug::WakeRelaxed, Ordering::AcqRel);
        if self.state.fetch_or(QUEUED, order) & (QUEUED | ENDED) == 0 && !push_local(&self.shared, self.slot)
        {
            self.shared.push_ready(self.slot);
        }
    }
}

/// The queue of tasks woken on the reactor's own thread.
pub(crate) type LocalReady = RefCell<VecDeque<u32>>;

struct Current {
    shared: Arc<Shared>,
    ready: Rc<LocalReady>,
}

thread_local! {
    /// The reactor whose code this thread is running.
    static CURRENT: RefCell<Option<Current>> = const { RefCell::new(None) };
}

/// Queues `slot` if this thread is running the reactor of `shared`.
fn push_local(shared: &Arc<Shared>, slot: u32) -> bool {
    // An error means that the thread is ending: then it is no reactor any more.
    CURRENT
        .try_with(|current| match &*current.borrow() {
            Some(current) if Arc::ptr_eq(&current.shared, shared) => {
                current.ready.borrow_mut().push_back(slot);
                true
            }
            _ => false,
        })
        .unwrap_or(false)
}

/// The reactor whose code this thread is running, if any.
pub(crate) fn current_reactor() -> Option<ReactorId> {
    CURRENT.try_with(|current| current.borrow().as_ref().map(|current| current.shared.id)).ok().flatten()
}

/// While it lives, this thread runs code of one reactor.
pub(crate) struct Entered {
    outer: Option<Current>,
}

impl Entered {
    pub(crate) fn new(shared: &Arc<Shared>, ready: &Rc<LocalReady>) -> Self {
        let entering = Current { shared: Arc::clone(shared), ready: Rc::clone(ready) };
        Self { outer: CURRENT.with(|current| current.replace(Some(entering))) }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let outer = self.outer.take();
        // An error means that the thread is ending: nothing to restore.
        let _ = CURRENT.try_with(|current| current.replace(outer));
    }
}

enum Slot {
    Free,
    /// `body` is out while the task is being polled.
    Live {
        header: Arc<TaskHeader>,
        body: Option<TaskBody>,
    },
    Zombie,
}

/// What a poll needs; moved out of the table for its duration, so that the task may spawn.
pub(crate) struct TaskBody {
    pub(crate) future: LocalFuture,
    pub(crate) waker: Waker,
}

/// The slots.
pub(crate) struct TaskTable {
    slots: Vec<Slot>,
    free: Vec<u32>,
    limit: usize,
}

impl TaskTable {
    pub(crate) fn new(limit: usize) -> Self {
        Self { slots: Vec::new(), free: Vec::new(), limit: limit.min(ROOT as usize) }
    }

    /// Takes a slot for `future`. The caller wakes the returned waker, which queues the first poll.
    pub(crate) fn insert(&mut self, shared: &Arc<Shared>, future: LocalFuture) -> Result<Waker, SpawnError> {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.slots.len() < self.limit => {
                self.slots.push(Slot::Free);
                (self.slots.len() - 1) as u32
            }
            None => return Err(SpawnError::Full),
        };
        let header = TaskHeader::new(shared, slot);
        let waker = Waker::from(Arc::clone(&header));
        let body = Some(TaskBody { future, waker: waker.clone() });
        self.slots[slot as usize] = Slot::Live { header, body };
        Ok(waker)
    }

    /// A queue entry was taken: the task to poll, or `None` if it ended meanwhile.
    pub(crate) fn begin(&mut self, slot: u32) -> Option<TaskBody> {
        match &mut self.slots[slot as usize] {
            Slot::Live { header, body } => {
                header.begin_poll();
                Some(body.take().expect("a task is polled by one caller at a time"))
            }
            state @ Slot::Zombie => {
                *state = Slot::Free;
                self.free.push(slot);
                None
            }
            Slot::Free => unreachable!("a queue entry keeps its slot from being freed"),
        }
    }

    /// The poll returned pending.
    pub(crate) fn suspend(&mut self, slot: u32, task: TaskBody) {
        match &mut self.slots[slot as usize] {
            Slot::Live { body, .. } => *body = Some(task),
            // All tasks were dropped from inside a poll: this one goes with them.
            Slot::Free | Slot::Zombie => drop(task),
        }
    }

    /// The poll returned ready.
    pub(crate) fn finish(&mut self, slot: u32) {
        let Slot::Live { header, .. } = &self.slots[slot as usize] else { return };
        if header.end() {
            self.slots[slot as usize] = Slot::Zombie;
        } else {
            self.slots[slot as usize] = Slot::Free;
            self.free.push(slot);
        }
    }

    /// Takes every task out, for shutdown. The caller drops them without a borrow of the table.
    pub(crate) fn take_all(&mut self) -> Vec<TaskBody> {
        let mut bodies = Vec::new();
        for state in &mut self.slots {
            if let Slot::Live { header, body } = state {
                bodies.extend(body.take());
                // Slots are not reused after this, so it does not matter whether an entry is left.
                header.end();
                *state = Slot::Zombie;
            }
        }
        bodies
    }

    /// Tasks that have not ended.
    pub(crate) fn live(&self) -> usize {
        self.slots.iter().filter(|slot| matches!(slot, Slot::Live { .. })).count()
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use crate::bell::Bell;
    use crate::planted::assert_caught;
    use loom::sync::Arc as ModelArc;
    use loom::sync::atomic::AtomicBool;
    use loom::thread;

    /// A task is in the queue already when somebody else writes something and wakes it. In every interleaving: the poll sees
    /// what was written, or the task is in the queue again.
    fn wake_while_queued() {
        loom::model(|| {
            let shared = Shared::new(ReactorId::new(0), 1, Bell::silent());
            let header = TaskHeader::new(&shared, 0);
            let written = ModelArc::new(AtomicBool::new(false));
            header.wake_by_ref();
            let waker = {
                let (header, written) = (Arc::clone(&header), ModelArc::clone(&written));
                thread::spawn(move || {
                    written.store(true, Ordering::Relaxed);
                    header.wake();
                })
            };
            assert_eq!(shared.ready.pop(), Some(0));
            header.begin_poll();
            let seen = written.load(Ordering::Relaxed);
            waker.join().unwrap();
            let again = shared.ready.pop().is_some();
            assert!(seen || again, "woken, polled without the news, and not queued again");
            assert!(shared.ready.pop().is_none(), "queued twice");
        });
    }

    #[test]
    fn loom_news_before_a_wake_are_seen_by_a_poll_after_it() {
        wake_while_queued();
    }

    #[test]
    fn loom_a_wake_or_poll_that_orders_nothing_is_caught() {
        assert_caught(Bug::WakeRelaxed, wake_while_queued);
        assert_caught(Bug::PollRelaxed, wake_while_queued);
    }

    /// Wakers of a task that ends meanwhile: the slot is free for another task only if no entry names it.
    #[test]
    fn loom_an_ended_task_knows_whether_a_queue_names_it() {
        loom::model(|| {
            let shared = Shared::new(ReactorId::new(0), 1, Bell::silent());
            let header = TaskHeader::new(&shared, 0);
            let waker = {
                let header = Arc::clone(&header);
                thread::spawn(move || header.wake())
            };
            let named = header.end();
            waker.join().unwrap();
            assert_eq!(shared.ready.pop().is_some(), named);
        });
    }
}
