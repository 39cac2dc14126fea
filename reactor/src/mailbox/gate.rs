//! A line of wakers in front of a condition: who waits, in which order, and whom to call next.
//!
//! Invariants:
//! - a waiter is in line from [`register`](Gate::register) until it is called or leaves;
//! - one that was called and had to register again gets its old place back;
//! - no call is lost: between a change of the condition followed by [`call_one`](Gate::call_one) and a `register`
//!   followed by another look at the condition, at least one side sees the other.
//!
//! Excludes: the condition itself. A call is a hint to look again, not a grant.

use std::collections::VecDeque;
use std::task::Waker;

use crate::planted::Bug;
use crate::sync::{AtomicUsize, Mutex, MutexGuard, Ordering, fence_unless};

/// A waiter's place; empty before the first registration.
#[derive(Debug, Default)]
pub(crate) struct Place(Option<u64>);

impl Place {
    /// Whether the waiter has ever registered and not left.
    pub(crate) fn is_taken(&self) -> bool {
        self.0.is_some()
    }
}

#[derive(Debug)]
pub(crate) struct Gate {
    /// Length of the line, to be read without the lock.
    waiting: AtomicUsize,
    line: Mutex<Line>,
}

#[derive(Debug, Default)]
struct Line {
    waiters: VecDeque<(u64, Waker)>,
    next_ticket: u64,
}

impl Gate {
    pub(crate) fn new() -> Self {
        Self { waiting: AtomicUsize::new(0), line: Mutex::new(Line::default()) }
    }

    /// Whether somebody is in line; a hint.
    pub(crate) fn is_waited_at(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Enters the line, or renews the waker. Returns whether nobody is ahead. The caller looks at the condition
    /// again before it waits.
    pub(crate) fn register(&self, place: &mut Place, waker: &Waker) -> bool {
        let mut line = self.lock();
        let ticket = match place.0 {
            Some(ticket) => ticket,
            None => {
                line.next_ticket += 1;
                line.next_ticket
            }
        };
        place.0 = Some(ticket);
        let index = match line.waiters.binary_search_by_key(&ticket, |(ticket, _)| *ticket) {
            Ok(index) => {
                line.waiters[index].1.clone_from(waker);
                index
            }
            Err(index) => {
                line.waiters.insert(index, (ticket, waker.clone()));
                index
            }
        };
        self.waiting.store(line.waiters.len(), Ordering::Relaxed);
        drop(line);
        // Pairs with the fence in `call_one` and `call_all`.
        fence_unless(Bug::RegisterFenceMissing);
        index == 0
    }

    /// Leaves the line. Returns whether the waiter had ever registered: then it may have been called, and the caller
    /// sees to it that the call is not lost.
    pub(crate) fn leave(&self, place: &mut Place) -> bool {
        let Some(ticket) = place.0.take() else { return false };
        let mut line = self.lock();
        if let Ok(index) = line.waiters.binary_search_by_key(&ticket, |(ticket, _)| *ticket) {
            line.waiters.remove(index);
            self.waiting.store(line.waiters.len(), Ordering::Relaxed);
        }
        drop(line);
        // The caller now looks at the condition on behalf of the others: as in `register`.
        fence_unless(Bug::RegisterFenceMissing);
        true
    }

    /// Calls the first in line. To be called after the condition changed.
    pub(crate) fn call_one(&self) {
        // Pairs with the fence in `register`.
        fence_unless(Bug::CallFenceMissing);
        if self.waiting.load(Ordering::Relaxed) == 0 {
            return;
        }
        let first = {
            let mut line = self.lock();
            let first = line.waiters.pop_front();
            self.waiting.store(line.waiters.len(), Ordering::Relaxed);
            first
        };
        if let Some((_, waker)) = first {
            waker.wake();
        }
    }

    /// Calls everybody. To be called after the condition changed for good.
    pub(crate) fn call_all(&self) {
        // Pairs with the fence in `register`.
        fence_unless(Bug::CallFenceMissing);
        let all = {
            let mut line = self.lock();
            self.waiting.store(0, Ordering::Relaxed);
            std::mem::take(&mut line.waiters)
        };
        for (_, waker) in all {
            waker.wake();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Line> {
        // Nothing inside a critical section can leave the line half changed, so poison carries no meaning.
        self.line.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use crate::park::CountingWaker;
    use crate::planted::assert_caught;
    use loom::sync::Arc;
    use loom::thread;

    /// In every interleaving: who waits sees the change in its second look, or is called.
    fn change_and_wait() {
        loom::model(|| {
            let gate = Arc::new(Gate::new());
            let items = Arc::new(AtomicUsize::new(0));
            let sender = {
                let (gate, items) = (Arc::clone(&gate), Arc::clone(&items));
                thread::spawn(move || {
                    items.store(1, Ordering::Relaxed);
                    gate.call_one();
                })
            };
            let wakes = CountingWaker::new();
            gate.register(&mut Place::default(), &wakes.waker());
            let seen = items.load(Ordering::Relaxed) == 1;
            sender.join().unwrap();
            assert!(seen || wakes.count() == 1);
        });
    }

    #[test]
    fn loom_change_is_seen_or_called_out() {
        change_and_wait();
    }

    #[test]
    fn loom_a_missing_fence_on_either_side_of_the_gate_is_caught() {
        assert_caught(Bug::CallFenceMissing, change_and_wait);
        assert_caught(Bug::RegisterFenceMissing, change_and_wait);
    }

    /// In every interleaving: a call to somebody who is just leaving reaches the next in line.
    #[test]
    fn loom_call_to_a_leaver_reaches_the_next() {
        loom::model(|| {
            let gate = Arc::new(Gate::new());
            let room = Arc::new(AtomicUsize::new(0));
            let mut leaver = Place::default();
            gate.register(&mut leaver, Waker::noop());
            let wakes = CountingWaker::new();
            gate.register(&mut Place::default(), &wakes.waker());
            let receiver = {
                let (gate, room) = (Arc::clone(&gate), Arc::clone(&room));
                thread::spawn(move || {
                    room.store(1, Ordering::Relaxed);
                    gate.call_one();
                })
            };
            if gate.leave(&mut leaver) && room.load(Ordering::Relaxed) == 1 {
                gate.call_one();
            }
            receiver.join().unwrap();
            assert_eq!(wakes.count(), 1);
        });
    }
}
