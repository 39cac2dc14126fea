//! Interrupts of a client that is not trusted to take them.
//!
//! A client shares its eventfds with the server, and their flags: it can fill one and make it blocking again at any moment, so that
//! a write waits until somebody reads. Nothing that the controller needs may wait for that; so the writes are done by a thread
//! of the session.
//!
//! Invariants: raising an interrupt never blocks; what is raised before an earlier one was written is written with it, as an
//! eventfd would have it; a client that stops reading holds up nothing but its own interrupts. The thread ends with the
//! session: if it is stuck in a write, the counter is emptied.
//!
//! *Memory ordering*: `pending` is set with release before the thread is woken, and taken with acquire; waking itself orders
//! the rest.
//!
//! Excludes: masks (`interrupt`).

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::io::{ReadWriteFlags, preadv2};

use crate::interrupt::{Relay, signal};
use crate::locks::lock;

/// How long the end of the session tries to free a thread that is stuck, before it leaves it behind.
const FREE_TIMEOUT: Duration = Duration::from_secs(2);
const FREE_POLL: Duration = Duration::from_micros(200);
/// `preadv2` at the descriptor's own position.
const NO_OFFSET: u64 = u64::MAX;

#[derive(Default)]
struct Line {
    pending: AtomicBool,
    eventfd: Mutex<Option<Arc<OwnedFd>>>,
}

/// How an eventfd is written to.
type Send = Box<dyn Fn(BorrowedFd<'_>) + std::marker::Send + Sync>;

struct Shared {
    lines: Box<[Line]>,
    stop: AtomicBool,
    send: Send,
}

/// The thread that writes to a client's eventfds.
pub(super) struct Notifier {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    waker: Arc<Waker>,
}

/// What the controller's vectors hold.
struct Waker {
    shared: Arc<Shared>,
    thread: thread::Thread,
}

impl Relay for Waker {
    fn raise(&self, vector: u16) {
        if let Some(line) = self.shared.lines.get(usize::from(vector)) {
            line.pending.store(true, Ordering::Release);
            self.thread.unpark();
        }
    }
}

impl Notifier {
    pub(super) fn start(vectors: u16) -> io::Result<Self> {
        Self::start_with(vectors, Box::new(signal))
    }

    fn start_with(vectors: u16, send: Send) -> io::Result<Self> {
        let lines = (0..vectors).map(|_| Line::default()).collect();
        let shared = Arc::new(Shared { lines, stop: AtomicBool::new(false), send });
        let its = Arc::clone(&shared);
        let handle = thread::Builder::new().name("interrupts".into()).spawn(move || its.run())?;
        let waker = Arc::new(Waker { shared: Arc::clone(&shared), thread: handle.thread().clone() });
        Ok(Self { shared, thread: Some(handle), waker })
    }

    /// Connects a vector. What the controller is given to raise it.
    pub(super) fn connect(&self, vector: u16, eventfd: OwnedFd) -> Arc<dyn Relay> {
        if let Some(line) = self.shared.lines.get(usize::from(vector)) {
            line.pending.store(false, Ordering::Release);
            *lock(&line.eventfd) = Some(Arc::new(eventfd));
        }
        Arc::clone(&self.waker) as _
    }

    /// Empties all counters, so that no write waits any more.
    fn free(&self) {
        for line in &self.shared.lines {
            let Some(eventfd) = lock(&line.eventfd).clone() else { continue };
            let mut value = [0; 8];
            // Whatever the client did to the flags, this does not wait. It fails if there is nothing.
            let _ = preadv2(
                eventfd.as_fd(),
                &mut [IoSliceMut::new(&mut value)],
                NO_OFFSET,
                ReadWriteFlags::NOWAIT,
            );
        }
    }
}

impl Drop for Notifier {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        let Some(thread) = self.thread.take() else { return };
        thread.thread().unpark();
        let deadline = Instant::now() + FREE_TIMEOUT;
        while !thread.is_finished() {
            if Instant::now() >= deadline {
                tracing::warn!(
                    "a client keeps an interrupt's eventfd full; the thread that waits for it is left behind"
                );
                return;
            }
            self.free();
            thread::sleep(FREE_POLL);
        }
        if thread.join().is_err() {
            tracing::error!("the thread that sends interrupts has panicked");
        }
    }
}

impl Shared {
    fn run(&self) {
        while !self.stop.load(Ordering::Acquire) {
            for line in &self.lines {
                if line.pending.load(Ordering::Relaxed) && line.pending.swap(false, Ordering::Acquire) {
                    // Not under the lock: this may wait.
                    let eventfd = lock(&line.eventfd).clone();
                    if let Some(eventfd) = eventfd {
                        (self.send)(eventfd.as_fd());
                    }
                }
                if self.stop.load(Ordering::Acquire) {
                    return;
                }
            }
            thread::park();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::sys::eventfd::{EfdFlags, EventFd};

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(60);

    fn share(eventfd: &EventFd) -> OwnedFd {
        eventfd.as_fd().try_clone_to_owned().unwrap()
    }

    fn wait_readable(eventfd: &EventFd) {
        let mut watched = [PollFd::new(eventfd.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut watched, PollTimeout::from(60_000u16)), Ok(1), "no interrupt came");
    }

    #[test]
    fn what_is_raised_arrives_at_its_own_vector() {
        let notifier = Notifier::start(2).unwrap();
        let eventfds = [0, 1].map(|_| EventFd::new().unwrap());
        let relays = [0, 1].map(|vector| notifier.connect(vector, share(&eventfds[usize::from(vector)])));
        for round in 0..100 {
            let vector = round % 2;
            relays[vector].raise(vector as u16);
            wait_readable(&eventfds[vector]);
            assert_eq!(eventfds[vector].read(), Ok(1));
        }
        relays[0].raise(77); // none such
    }

    /// A blocking eventfd that was filled between the look at it and the write held the whole controller up. Here the look is
    /// left out, so that the thread is in that write for certain.
    #[test]
    fn a_write_that_waits_holds_up_neither_who_raises_nor_the_end_of_the_session() {
        let (done, finished) = mpsc::channel();
        thread::spawn(move || {
            let eventfd = EventFd::from_flags(EfdFlags::empty()).unwrap();
            eventfd.write(u64::MAX - 1).unwrap();
            let (writes, written) = mpsc::channel();
            let send = move |fd: BorrowedFd<'_>| {
                writes.send("begins").unwrap();
                nix::unistd::write(fd, &1u64.to_ne_bytes()).unwrap();
                writes.send("ends").unwrap();
            };
            let notifier = Notifier::start_with(1, Box::new(send)).unwrap();
            let relay = notifier.connect(0, share(&eventfd));
            relay.raise(0);
            assert_eq!(written.recv(), Ok("begins"));
            for _ in 0..1000 {
                relay.raise(0);
            }
            drop(notifier);
            assert_eq!(written.recv(), Ok("ends"), "the thread is not left behind");
            done.send(()).unwrap();
        });
        assert!(finished.recv_timeout(DEADLINE).is_ok(), "it waits for the client");
    }
}
