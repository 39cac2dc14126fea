//! A local event: tasks of one reactor wait for something that another task of it will announce.
//!
//! Owns: [`Signal`]. A waiter that began to wait before [`Signal::notify`] is woken by it; conditions are looked at
//! again after every wake-up, so a signal carries no value and cannot be missed by a task that checks, then waits,
//! without an await between the two.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::task::{Poll, Waker};

/// An event of one reactor.
#[derive(Debug, Default)]
pub(crate) struct Signal {
    round: Cell<u64>,
    waiting: RefCell<Vec<Waker>>,
}

impl Signal {
    /// Wakes every task that waits now.
    pub(crate) fn notify(&self) {
        self.round.set(self.round.get() + 1);
        for waker in self.waiting.take() {
            waker.wake();
        }
    }

    /// Waits for the next [`notify`](Self::notify).
    pub(crate) async fn wait(&self) {
        let round = self.round.get();
        poll_fn(|context| {
            if self.round.get() != round {
                return Poll::Ready(());
            }
            self.waiting.borrow_mut().push(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}
