//! Waiting for a future on a thread that is no reactor: poll, park, and be unparked by the waker.
//!
//! Excludes: reactors' threads, which must never block (asserted).

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs `future` on this thread, which sleeps in between.
///
/// # Panics
/// On a reactor's thread: blocking there could wait for itself.
pub(crate) fn wait_for<F: Future>(future: F) -> F::Output {
    assert!(crate::task::current_reactor().is_none(), "a blocking call on a reactor's thread");
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            // A wake before this leaves a token, so it is not lost.
            Poll::Pending => thread::park(),
        }
    }
}

/// A waker that counts, for tests.
#[cfg(test)]
pub(crate) struct CountingWaker(std::sync::atomic::AtomicUsize);

#[cfg(test)]
impl CountingWaker {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self(std::sync::atomic::AtomicUsize::new(0)))
    }

    pub(crate) fn waker(self: &Arc<Self>) -> Waker {
        Waker::from(Arc::clone(self))
    }

    pub(crate) fn count(&self) -> usize {
        self.0.load(std::sync::atomic::Ordering::SeqCst)
    }
}

#[cfg(test)]
impl Wake for CountingWaker {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    }
}
