//! A channel for one value: replies to requests.
//!
//! | state | event | next |
//! |---|---|---|
//! | Empty | receiver polls | Waiting |
//! | Empty, Waiting | send | Sent (wakes) |
//! | Empty, Waiting | sender dropped | Canceled (wakes) |
//! | Empty, Waiting, Sent | receiver dropped | Abandoned: a later send gives the value back |
//! | Sent | receiver polls | Taken |
//!
//! Invariants: sending never blocks and never fails for want of room, so a reply can always be given. The lock is
//! held for the exchange of a pointer, never across foreign code. Excludes: streams of values (mailboxes).

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// The sender went away without sending.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the sender went away without a reply")]
pub struct Canceled;

enum State<T> {
    Empty,
    Waiting(Waker),
    Sent(T),
    Canceled,
    Abandoned,
    Taken,
}

struct Channel<T>(Mutex<State<T>>);

impl<T> Channel<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Every critical section is one assignment, so poison carries no meaning.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A channel for one value, between any two threads or tasks.
pub fn oneshot<T: Send>() -> (OneshotSender<T>, OneshotReceiver<T>) {
    let channel = Arc::new(Channel(Mutex::new(State::Empty)));
    (OneshotSender { channel: Some(Arc::clone(&channel)) }, OneshotReceiver { channel })
}

/// The side that sends, once; from any thread.
pub struct OneshotSender<T> {
    /// Present until the value is sent.
    channel: Option<Arc<Channel<T>>>,
}

impl<T> OneshotSender<T> {
    /// Sends `value` and wakes the receiver.
    ///
    /// # Errors
    /// The receiver is gone; the value comes back.
    pub fn send(mut self, value: T) -> Result<(), T> {
        let channel = self.channel.take().expect("present until the value is sent");
        let mut state = channel.lock();
        if matches!(*state, State::Abandoned) {
            return Err(value);
        }
        let before = std::mem::replace(&mut *state, State::Sent(value));
        drop(state);
        if let State::Waiting(waker) = before {
            waker.wake();
        }
        Ok(())
    }

    /// Whether the receiver is gone, so that nobody is interested in the value any more.
    pub fn is_abandoned(&self) -> bool {
        self.channel.as_ref().is_some_and(|channel| matches!(*channel.lock(), State::Abandoned))
    }
}

impl<T> Drop for OneshotSender<T> {
    fn drop(&mut self) {
        let Some(channel) = self.channel.take() else { return };
        let mut state = channel.lock();
        if matches!(*state, State::Abandoned) {
            return;
        }
        let before = std::mem::replace(&mut *state, State::Canceled);
        drop(state);
        if let State::Waiting(waker) = before {
            waker.wake();
        }
    }
}

impl<T> fmt::Debug for OneshotSender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OneshotSender").finish_non_exhaustive()
    }
}

/// The side that waits for the value: a future.
#[must_use = "the value comes from awaiting the receiver"]
pub struct OneshotReceiver<T> {
    channel: Arc<Channel<T>>,
}

impl<T> OneshotReceiver<T> {
    /// Blocks the thread until the value is there.
    ///
    /// # Errors
    /// The sender went away.
    ///
    /// # Panics
    /// On a reactor's thread.
    pub fn recv_blocking(self) -> Result<T, Canceled> {
        crate::park::wait_for(self)
    }
}

impl<T> Future for OneshotReceiver<T> {
    type Output = Result<T, Canceled>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.channel.lock();
        match &mut *state {
            State::Empty => *state = State::Waiting(cx.waker().clone()),
            State::Waiting(waker) => waker.clone_from(cx.waker()),
            State::Canceled => return Poll::Ready(Err(Canceled)),
            State::Sent(_) => {
                if let State::Sent(value) = std::mem::replace(&mut *state, State::Taken) {
                    return Poll::Ready(Ok(value));
                }
            }
            State::Taken | State::Abandoned => panic!("a finished oneshot receiver was polled again"),
        }
        Poll::Pending
    }
}

impl<T> Drop for OneshotReceiver<T> {
    fn drop(&mut self) {
        // The value, if it was sent and not taken, is dropped after the lock.
        let before = std::mem::replace(&mut *self.channel.lock(), State::Abandoned);
        drop(before);
    }
}

impl<T> fmt::Debug for OneshotReceiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OneshotReceiver").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::park::CountingWaker;

    #[test]
    fn value_sent_from_another_thread_arrives() {
        let (sender, receiver) = oneshot();
        let thread = std::thread::spawn(move || sender.send(7));
        assert_eq!(receiver.recv_blocking(), Ok(7));
        assert_eq!(thread.join().unwrap(), Ok(()));
    }

    #[test]
    fn dropped_sender_wakes_and_cancels() {
        let (sender, mut receiver) = oneshot::<u8>();
        let wakes = CountingWaker::new();
        let waker = wakes.waker();
        assert!(Pin::new(&mut receiver).poll(&mut Context::from_waker(&waker)).is_pending());
        drop(sender);
        assert_eq!(wakes.count(), 1);
        assert_eq!(receiver.recv_blocking(), Err(Canceled));
    }

    #[test]
    fn value_for_a_receiver_that_left_comes_back() {
        let (sender, receiver) = oneshot();
        drop(receiver);
        assert!(sender.is_abandoned());
        assert_eq!(sender.send(5), Err(5));
    }
}
