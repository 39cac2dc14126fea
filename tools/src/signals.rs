//! SIGINT and SIGTERM as events that a program waits for beside others.
//!
//! Owns: [`Signals`]. The two signals are blocked before the first thread starts and read from a signalfd. A blocked
//! signal is queued even if its disposition was inherited as *ignored* (as a shell does for a background job, or
//! nohup's relatives): Linux looks at the mask first, so the daemon can always be asked to stop.
//!
//! Invariant: [`Signals::block`] runs on the main thread, before any other exists; threads inherit the mask. Children
//! started through `std::process::Command` get an empty mask again.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// The two signals that ask a daemon to stop, blocked and readable.
pub struct Signals {
    descriptor: SignalFd,
}

/// What ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// SIGINT or SIGTERM.
    Signal,
    /// The [`Alarm`].
    Alarm,
    /// The descriptor beside it.
    Descriptor,
    /// Neither, in the given time.
    Timeout,
}

impl Signals {
    /// Blocks SIGINT and SIGTERM in this thread and those it starts.
    ///
    /// # Errors
    /// The system's.
    pub fn block() -> nix::Result<Self> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGINT);
        set.add(Signal::SIGTERM);
        set.thread_block()?;
        let descriptor = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Self { descriptor })
    }

    /// Waits for a signal or the alarm; a signal wins. `timeout` of `None` waits as long as it takes.
    ///
    /// # Errors
    /// The system's.
    pub fn wait(&self, alarm: &Alarm, timeout: Option<Duration>) -> nix::Result<Woken> {
        self.wait_beside(alarm, None, timeout)
    }

    /// As [`wait`](Self::wait), also for a descriptor that becomes readable, if there is one; signal and alarm win.
    ///
    /// # Errors
    /// The system's.
    pub fn wait_beside(
        &self,
        alarm: &Alarm,
        descriptor: Option<BorrowedFd<'_>>,
        timeout: Option<Duration>,
    ) -> nix::Result<Woken> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            if self.descriptor.read_signal()?.is_some() {
                return Ok(Woken::Signal);
            }
            let remaining = match deadline {
                None => PollTimeout::NONE,
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    // Rounded up, so that the last millisecond is slept and not spun away.
                    PollTimeout::try_from(left + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX)
                }
            };
            let mut descriptors = vec![
                PollFd::new(self.descriptor.as_fd(), PollFlags::POLLIN),
                PollFd::new(alarm.as_fd(), PollFlags::POLLIN),
            ];
            descriptors.extend(descriptor.map(|descriptor| PollFd::new(descriptor, PollFlags::POLLIN)));
            match poll(&mut descriptors, remaining) {
                Ok(0) => return Ok(Woken::Timeout),
                Ok(_) if descriptors[0].any() == Some(true) => {}
                Ok(_) if descriptors[1].any() == Some(true) => return Ok(Woken::Alarm),
                Ok(_) if descriptors.get(2).and_then(PollFd::any) == Some(true) => {
                    return Ok(Woken::Descriptor);
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// A flag that, once raised, ends every wait.
#[derive(Debug)]
pub struct Alarm {
    event: EventFd,
}

impl Alarm {
    /// A quiet alarm.
    ///
    /// # Errors
    /// The system's.
    pub fn new() -> nix::Result<Self> {
        let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { event })
    }

    /// Raises it, for good.
    pub fn raise(&self) {
        // Fails only if the counter is full: then it is raised.
        let _full = self.event.write(1);
    }

    /// Whether it is raised.
    pub fn is_raised(&self) -> bool {
        is_readable(self.event.as_fd())
    }
}

/// Whether reading from a descriptor would not wait.
pub fn is_readable(descriptor: BorrowedFd<'_>) -> bool {
    matches!(poll(&mut [PollFd::new(descriptor, PollFlags::POLLIN)], PollTimeout::ZERO), Ok(1))
}

/// Readable while a signal waits to be read.
impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl AsFd for Alarm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raised_alarm_ends_the_wait_and_stays_raised() {
        let signals = Signals::block().unwrap();
        let alarm = Alarm::new().unwrap();
        assert!(!alarm.is_raised());
        assert_eq!(signals.wait(&alarm, Some(Duration::ZERO)).unwrap(), Woken::Timeout);
        alarm.raise();
        assert!(alarm.is_raised());
        assert_eq!(signals.wait(&alarm, None).unwrap(), Woken::Alarm);
        assert_eq!(signals.wait(&alarm, None).unwrap(), Woken::Alarm);
    }

    #[test]
    fn a_readable_descriptor_ends_the_wait_unless_the_alarm_does() {
        let signals = Signals::block().unwrap();
        let (alarm, other) = (Alarm::new().unwrap(), Alarm::new().unwrap());
        let wait = || signals.wait_beside(&alarm, Some(other.as_fd()), Some(Duration::ZERO)).unwrap();
        assert_eq!(wait(), Woken::Timeout);
        other.raise();
        assert_eq!(wait(), Woken::Descriptor);
        assert_eq!(signals.wait(&alarm, Some(Duration::ZERO)).unwrap(), Woken::Timeout);
        alarm.raise();
        assert_eq!(wait(), Woken::Alarm);
    }

    #[test]
    fn blocked_signal_is_read_before_the_alarm() {
        let signals = Signals::block().unwrap();
        let alarm = Alarm::new().unwrap();
        alarm.raise();
        nix::sys::signal::raise(Signal::SIGTERM).unwrap();
        assert_eq!(signals.wait(&alarm, None).unwrap(), Woken::Signal);
        assert_eq!(signals.wait(&alarm, None).unwrap(), Woken::Alarm);
    }
}
