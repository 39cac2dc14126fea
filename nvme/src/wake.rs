//! The descriptor that a sleeping owner of a queue waits on: interrupts of the device, faults found by other queues, and
//! the time to look for overdue commands, in one.
//!
//! Invariants: nothing here is touched while the owner polls; arming costs two or three system calls.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// Wakes whoever sleeps on the descriptor behind `eventfd`.
pub(crate) fn signal(eventfd: &OwnedFd) {
    // EAGAIN says that the counter is full: it is readable, which is all that is wanted.
    let _ = nix::unistd::write(eventfd, &1u64.to_ne_bytes());
}

/// Interrupt eventfd and watchdog timer behind one epoll descriptor.
#[derive(Debug)]
pub(crate) struct Wake {
    epoll: Epoll,
    eventfd: Arc<OwnedFd>,
    timer: TimerFd,
}

impl Wake {
    pub(crate) fn new() -> io::Result<Self> {
        let eventfd =
            OwnedFd::from(EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
        let timer =
            TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&eventfd, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        epoll.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, 1))?;
        Ok(Self { epoll, eventfd: Arc::new(eventfd), timer })
    }

    /// What a device or another thread writes to.
    pub(crate) fn eventfd(&self) -> &Arc<OwnedFd> {
        &self.eventfd
    }

    /// Forgets what was signalled before, and becomes readable on the next signal or after `look_after`.
    pub(crate) fn arm(&self, look_after: Option<Duration>) {
        let mut count = [0; 8];
        // EAGAIN says that nothing was signalled.
        let _ = nix::unistd::read(&self.eventfd, &mut count);
        // Setting the timer also forgets an expiration. It cannot fail with a valid descriptor and time.
        let _ = match look_after {
            Some(delay) => self
                .timer
                .set(Expiration::OneShot(TimeSpec::from_duration(delay)), TimerSetTimeFlags::empty()),
            None => self.timer.unset(),
        };
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    fn readable(wake: &Wake, timeout: PollTimeout) -> bool {
        let mut fds = [PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, timeout).unwrap() == 1
    }

    #[test]
    fn a_signal_is_seen_until_armed_again() {
        let wake = Wake::new().unwrap();
        assert!(!readable(&wake, PollTimeout::ZERO));
        signal(wake.eventfd());
        signal(wake.eventfd());
        assert!(readable(&wake, PollTimeout::ZERO));
        wake.arm(None);
        assert!(!readable(&wake, PollTimeout::ZERO));
    }

    #[test]
    fn the_watchdog_makes_it_readable() {
        let wake = Wake::new().unwrap();
        wake.arm(Some(Duration::from_nanos(1)));
        assert!(readable(&wake, PollTimeout::NONE));
        wake.arm(None);
        assert!(!readable(&wake, PollTimeout::ZERO));
    }
}
