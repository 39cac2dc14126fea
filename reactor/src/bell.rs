//! Sleep and wake of one reactor: the announcement, the second look, and the one eventfd write.
//!
//! | state | event | next | action |
//! |---|---|---|---|
//! | Awake | reactor announces | Asleep | reactor looks at its queues once more |
//! | Awake | ring | Awake | none: the reactor will look before it sleeps |
//! | Asleep | ring | Rung | one eventfd write |
//! | Asleep | reactor retracts (second look found work, or a timer) | Awake | none |
//! | Rung | ring | Rung | none: one write is enough |
//! | Rung | reactor retracts | Awake | the eventfd is drained when it is readable |
//!
//! *Memory ordering*: this is Dekker's pattern. The waker publishes work, then a SeqCst fence, then reads the state;
//! the reactor writes the state, then a SeqCst fence, then looks for work. At least one of them sees the other, so
//! work published before [`Bell::ring`] is never slept through.
//!
//! Excludes: what counts as work, device interrupts, how long to sleep.

use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::planted::Bug;
use crate::sync::{AtomicBool, AtomicU8, Ordering, fence_unless};

const AWAKE: u8 = 0;
const ASLEEP: u8 = 1;
const RUNG: u8 = 2;

/// What a waker rings and a reactor sleeps on.
#[derive(Debug)]
pub(crate) struct Bell {
    state: AtomicU8,
    /// A wake-up without a message: the reactor must go round once more.
    requested: AtomicBool,
    /// Absent in the simulator, which never sleeps.
    eventfd: Option<EventFd>,
}

impl Bell {
    /// A bell with an eventfd if the system gives one.
    pub(crate) fn with_eventfd() -> nix::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self { eventfd: Some(EventFd::from_flags(flags)?), ..Self::silent() })
    }

    /// A bell for a reactor that never blocks.
    pub(crate) fn silent() -> Self {
        Self { state: AtomicU8::new(AWAKE), requested: AtomicBool::new(false), eventfd: None }
    }

    /// Called after work was published. Returns whether this call had to wake the reactor.
    pub(crate) fn ring(&self) -> bool {
        // Pairs with the fence in `announce`.
        fence_unless(Bug::RingFenceMissing);
        // Relaxed: ordered by the fences; the exchange below decides.
        if self.state.load(Ordering::Relaxed) != ASLEEP
            || self.state.compare_exchange(ASLEEP, RUNG, Ordering::AcqRel, Ordering::Relaxed).is_err()
        {
            return false;
        }
        if let Some(eventfd) = &self.eventfd {
            // The counter cannot be full (one write per announcement), so the only errors are our own bugs.
            let written = eventfd.write(1);
            debug_assert!(written.is_ok(), "eventfd write: {written:?}");
        }
        true
    }

    /// Asks for one more round of the loop without any other work.
    pub(crate) fn request(&self) {
        // Release: pairs with the acquire in `take_request`.
        self.requested.store(true, Ordering::Release);
        self.ring();
    }

    /// Whether a round was asked for since the last call.
    pub(crate) fn take_request(&self) -> bool {
        self.requested.swap(false, Ordering::AcqRel)
    }

    /// The reactor is about to sleep. It must now look for work once more and [`retract`](Self::retract) afterwards.
    pub(crate) fn announce(&self) {
        self.state.store(ASLEEP, Ordering::Relaxed);
        // Pairs with the fence in `ring`.
        fence_unless(Bug::AnnounceFenceMissing);
    }

    /// The reactor is awake again. Returns whether somebody rang, so that the eventfd may be readable.
    pub(crate) fn retract(&self) -> bool {
        self.state.swap(AWAKE, Ordering::AcqRel) == RUNG
    }

    /// Empties the eventfd.
    pub(crate) fn drain(&self) {
        if let Some(eventfd) = &self.eventfd {
            // EAGAIN: the ringer has not written yet; the token of this ring ends a later sleep early, no harm.
            let _ = eventfd.read();
        }
    }

    /// What to poll for readability.
    pub(crate) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.eventfd.as_ref().map(AsFd::as_fd)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn ring_writes_only_to_a_sleeper_and_only_once() {
        let bell = Bell::with_eventfd().unwrap();
        assert!(!bell.ring(), "awake");
        bell.announce();
        assert!(bell.ring());
        assert!(!bell.ring(), "already rung");
        assert!(bell.retract());
        bell.drain();
        bell.announce();
        assert!(!bell.retract(), "nobody rang");
    }

    #[test]
    fn request_is_seen_once_even_when_nobody_slept() {
        let bell = Bell::with_eventfd().unwrap();
        bell.request();
        assert!(bell.take_request());
        assert!(!bell.take_request());
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use crate::planted::assert_caught;
    use loom::sync::Arc;
    use loom::thread;

    /// In every interleaving: the reactor sees the work in its second look, or somebody has rung.
    fn sleep_and_ring() {
        loom::model(|| {
            let bell = Arc::new(Bell::silent());
            let work = Arc::new(AtomicBool::new(false));
            let waker = {
                let (bell, work) = (Arc::clone(&bell), Arc::clone(&work));
                thread::spawn(move || {
                    work.store(true, Ordering::Relaxed);
                    bell.ring()
                })
            };
            bell.announce();
            let seen = work.load(Ordering::Relaxed);
            // Not retracted: a reactor that saw nothing would now be blocked until the bell.
            let rung = waker.join().unwrap();
            assert!(seen || rung, "asleep, with work, and nobody rang");
        });
    }

    #[test]
    fn loom_work_published_before_the_ring_is_never_slept_through() {
        sleep_and_ring();
    }

    #[test]
    fn loom_a_missing_fence_on_either_side_of_the_bell_is_caught() {
        assert_caught(Bug::RingFenceMissing, sleep_and_ring);
        assert_caught(Bug::AnnounceFenceMissing, sleep_and_ring);
    }

    /// Two wakers, one sleep: at most one of them pays for the system call.
    #[test]
    fn loom_one_sleep_costs_at_most_one_ring() {
        loom::model(|| {
            let bell = Arc::new(Bell::silent());
            let other = Arc::clone(&bell);
            bell.announce();
            let waker = thread::spawn(move || other.ring());
            let here = bell.ring();
            assert!(here ^ waker.join().unwrap());
            assert!(bell.retract());
        });
    }
}
