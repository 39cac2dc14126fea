//! Bounded mailboxes: many senders on any thread, one receiving task.
//!
//! Invariants:
//! - a message that was accepted is received, unless the receiver goes away; nothing is dropped because of fullness;
//! - a full mailbox holds the sender up ([`Sender::send`]) or gives the message back ([`Sender::try_send`]);
//! - messages of one sender arrive in the order in which they were accepted;
//! - senders that wait are woken in the order of their first polls, one per message taken.
//!
//! The messages travel through a lock-free queue. A lock is touched only by those who have found the mailbox empty
//! or full and are about to wait, and by who wakes them.
//!
//! *Memory ordering*: Dekker's pattern twice, through `mailbox/gate.rs`: who waits registers, fences, and looks again; who
//! changes the queue changes it, fences, and looks for somebody registered. One of the two sees the other.
//!
//! Excludes: credits and reply slots (built from several mailboxes by their users). A producer that is preempted in
//! the middle of a push delays the messages behind its own; where that matters, use one mailbox per producer.

mod gate;

use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize as Count;
use std::task::{Context, Poll};

use crossbeam_queue::ArrayQueue;

use crate::handle::{ReactorHandle, ReactorId};
use crate::sync::{AtomicBool, Ordering};
use crate::task::current_reactor;

use gate::{Gate, Place};

/// Why a message was not taken; it comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError<T> {
    /// No room now.
    #[error("the mailbox is full")]
    Full(T),
    /// The receiver is gone.
    #[error("the mailbox is closed")]
    Closed(T),
}

/// The receiver is gone; the message comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the mailbox is closed")]
pub struct Closed<T>(pub T);

struct Mailbox<T> {
    queue: ArrayQueue<T>,
    owner: ReactorId,
    closed: AtomicBool,
    senders: Count,
    /// Where the receiver waits for messages.
    arrivals: Gate,
    /// Where senders wait for room.
    room: Gate,
}

/// A mailbox for up to `capacity` messages, received by a task of `owner`.
///
/// # Panics
/// If `capacity` is zero.
pub fn mailbox<T: Send + 'static>(capacity: usize, owner: &ReactorHandle) -> (Sender<T>, Receiver<T>) {
    let mailbox = Arc::new(Mailbox {
        queue: ArrayQueue::new(capacity),
        owner: owner.id(),
        closed: AtomicBool::new(false),
        senders: Count::new(1),
        arrivals: Gate::new(),
        room: Gate::new(),
    });
    (Sender { mailbox: Arc::clone(&mailbox) }, Receiver { mailbox, place: Place::default() })
}

/// The sending side; any thread.
pub struct Sender<T> {
    mailbox: Arc<Mailbox<T>>,
}

impl<T: Send + 'static> Sender<T> {
    /// Sends `message` if there is room now; wakes the receiver's reactor if it sleeps.
    ///
    /// # Errors
    /// The mailbox is full or closed; the message comes back.
    pub fn try_send(&self, message: T) -> Result<(), SendError<T>> {
        if self.is_closed() {
            return Err(SendError::Closed(message));
        }
        self.mailbox.queue.push(message).map_err(SendError::Full)?;
        self.mailbox.arrivals.call_one();
        Ok(())
    }

    /// Sends `message`, waiting for room. For tasks of any reactor. Cancel-safe: dropped, the message is not sent.
    pub fn send(&self, message: T) -> Sending<'_, T> {
        Sending { sender: self, message: Some(message), place: Place::default() }
    }

    /// Sends `message`, blocking the thread until there is room.
    ///
    /// # Errors
    /// The receiver is gone.
    ///
    /// # Panics
    /// On a reactor's thread.
    pub fn send_blocking(&self, message: T) -> Result<(), Closed<T>> {
        match self.try_send(message) {
            Ok(()) => Ok(()),
            Err(SendError::Closed(message)) => Err(Closed(message)),
            Err(SendError::Full(message)) => crate::park::wait_for(self.send(message)),
        }
    }

    /// Whether the receiver is gone.
    pub fn is_closed(&self) -> bool {
        self.mailbox.closed.load(Ordering::Acquire)
    }

    /// Messages in the mailbox now.
    pub fn len(&self) -> usize {
        self.mailbox.queue.len()
    }

    /// Whether the mailbox is empty now.
    pub fn is_empty(&self) -> bool {
        self.mailbox.queue.is_empty()
    }

    /// Messages the mailbox holds at most.
    pub fn capacity(&self) -> usize {
        self.mailbox.queue.capacity()
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        // Relaxed: the new sender comes from a living one, so the count cannot be zero.
        self.mailbox.senders.fetch_add(1, Ordering::Relaxed);
        Self { mailbox: Arc::clone(&self.mailbox) }
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        // AcqRel: the receiver that sees zero sees everything that was sent.
        if self.mailbox.senders.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.mailbox.arrivals.call_all();
        }
    }
}

impl<T> fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender").field("owner", &self.mailbox.owner).finish_non_exhaustive()
    }
}

/// Future of [`Sender::send`].
#[must_use = "futures do nothing unless awaited"]
pub struct Sending<'a, T> {
    sender: &'a Sender<T>,
    message: Option<T>,
    place: Place,
}

// The message is moved in and out by value, never pinned.
impl<T> Unpin for Sending<'_, T> {}

impl<T: Send + 'static> Sending<'_, T> {
    /// Leaves the line after the message was taken, or for good.
    fn finish(&mut self) {
        let mailbox = &self.sender.mailbox;
        // Whoever leaves looks for more room on behalf of the next in line: it may have been called in our stead.
        if mailbox.room.leave(&mut self.place) && !mailbox.queue.is_full() {
            mailbox.room.call_one();
        }
    }

    fn attempt(&mut self) -> Option<Result<(), Closed<T>>> {
        let message = self.message.take().expect("a finished send was polled again");
        let result = match self.sender.try_send(message) {
            Ok(()) => Ok(()),
            Err(SendError::Closed(message)) => Err(Closed(message)),
            Err(SendError::Full(message)) => {
                self.message = Some(message);
                return None;
            }
        };
        self.finish();
        Some(result)
    }
}

impl<T: Send + 'static> Future for Sending<'_, T> {
    type Output = Result<(), Closed<T>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let room = &this.sender.mailbox.room;
        // A newcomer does not take the room of those who wait.
        if (this.place.is_taken() || !room.is_waited_at())
            && let Some(result) = this.attempt()
        {
            return Poll::Ready(result);
        }
        let room = &this.sender.mailbox.room;
        let first = room.register(&mut this.place, cx.waker());
        if (first || this.sender.is_closed())
            && let Some(result) = this.attempt()
        {
            return Poll::Ready(result);
        }
        Poll::Pending
    }
}

impl<T> Drop for Sending<'_, T> {
    fn drop(&mut self) {
        let mailbox = &self.sender.mailbox;
        if mailbox.room.leave(&mut self.place) && !mailbox.queue.is_full() {
            mailbox.room.call_one();
        }
    }
}

/// The receiving side: one task of the owning reactor.
pub struct Receiver<T> {
    mailbox: Arc<Mailbox<T>>,
    place: Place,
}

impl<T: Send + 'static> Receiver<T> {
    /// The next message, waiting for one; `None` when the mailbox is empty and every sender is gone. Cancel-safe:
    /// dropped, no message is lost.
    ///
    /// # Panics
    /// On a reactor other than the owner.
    pub async fn recv(&mut self) -> Option<T> {
        poll_fn(|cx| self.poll_recv(cx)).await
    }

    /// The next message if there is one.
    pub fn try_recv(&mut self) -> Option<T> {
        self.take()
    }

    /// Polls for the next message, as [`recv`](Self::recv).
    ///
    /// # Panics
    /// On a reactor other than the owner.
    pub fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Option<T>> {
        let here = current_reactor();
        let owner = self.mailbox.owner;
        assert!(here.is_none_or(|here| here == owner), "mailbox of {owner} received elsewhere: {here:?}");
        if let Some(message) = self.take() {
            return Poll::Ready(Some(message));
        }
        self.mailbox.arrivals.register(&mut self.place, cx.waker());
        if let Some(message) = self.take() {
            return Poll::Ready(Some(message));
        }
        // Acquire: pairs with the last sender's decrement. What it sent before is seen by the take that follows.
        if self.mailbox.senders.load(Ordering::Acquire) == 0 {
            return Poll::Ready(self.take());
        }
        Poll::Pending
    }

    /// Messages in the mailbox now.
    pub fn len(&self) -> usize {
        self.mailbox.queue.len()
    }

    /// Whether the mailbox is empty now.
    pub fn is_empty(&self) -> bool {
        self.mailbox.queue.is_empty()
    }

    fn take(&mut self) -> Option<T> {
        let message = self.mailbox.queue.pop()?;
        self.mailbox.room.call_one();
        Some(message)
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.mailbox.closed.store(true, Ordering::SeqCst);
        self.mailbox.room.call_all();
        // A push that raced with the flag is dropped with the last sender.
        while self.mailbox.queue.pop().is_some() {}
    }
}

impl<T> fmt::Debug for Receiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver").field("owner", &self.mailbox.owner).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
