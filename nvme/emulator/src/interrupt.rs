//! Interrupt vectors: MSI-X in spirit, an eventfd each in practice.
//!
//! Invariants: a message for a masked vector is kept as pending (one bit, as MSI-X does) and sent when the mask is lifted.
//! There are two masks, that of the vector and that of the registers INTMS/INTMC; either holds a message back.
//!
//! Memory ordering: `state` changes by read-modify-write only, so of a poster and an unmasker that race at least one
//! sends.
//!
//! Excludes: deciding when a message is due (`queue`, `controller`).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::locks::lock;

/// The vector itself is masked.
pub(crate) const MASK_VECTOR: u8 = 1 << 0;
/// The vector is masked through INTMS.
pub(crate) const MASK_REGISTER: u8 = 1 << 1;
const PENDING: u8 = 1 << 7;
const MASKS: u8 = MASK_VECTOR | MASK_REGISTER;

/// Whether a vector's messages are let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VectorMask {
    /// Messages are kept as one pending message.
    Masked,
    /// Messages are sent; a pending one at once.
    Unmasked,
}

/// Passes interrupts on to somebody whose eventfds must not be written to by the controller's own threads. Never blocks.
pub(crate) trait Relay: Send + Sync {
    fn raise(&self, vector: u16);
}

/// Where a vector's messages go.
enum Receiver {
    Eventfd(OwnedFd),
    /// Somebody else sends them, who knows the vector by this number.
    Relay(Arc<dyn Relay>, u16),
}

/// One vector. Alone in its cache lines: each message changes it, and different queues send from different cores.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct Vector {
    state: AtomicU8,
    receiver: Mutex<Option<Receiver>>,
    sent: AtomicU64,
}

impl Vector {
    pub(crate) fn connect(&self, eventfd: Option<OwnedFd>) {
        *lock(&self.receiver) = eventfd.map(Receiver::Eventfd);
    }

    /// Has `relay` send the messages, as those of `vector`.
    pub(crate) fn relay(&self, relay: Arc<dyn Relay>, vector: u16) {
        *lock(&self.receiver) = Some(Receiver::Relay(relay, vector));
    }

    pub(crate) fn raise(&self) {
        let state = self.state.load(Ordering::Acquire);
        if state & MASKS != 0 && self.state.fetch_or(PENDING, Ordering::AcqRel) & MASKS != 0 {
            return;
        }
        self.send();
    }

    pub(crate) fn mask(&self, which: u8) {
        self.state.fetch_or(which, Ordering::AcqRel);
    }

    pub(crate) fn unmask(&self, which: u8) {
        let before = self.state.fetch_and(!which, Ordering::AcqRel);
        if before & PENDING != 0 && before & MASKS & !which == 0 {
            self.send();
        }
    }

    /// Whether the register mask holds the vector back.
    pub(crate) fn is_register_masked(&self) -> bool {
        self.state.load(Ordering::Acquire) & MASK_REGISTER != 0
    }

    /// Forgets masks and what is pending; the connection stays.
    pub(crate) fn reset(&self, which: u8) {
        self.state.fetch_and(!(which | PENDING), Ordering::AcqRel);
    }

    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    fn send(&self) {
        self.state.fetch_and(!PENDING, Ordering::AcqRel);
        let guard = lock(&self.receiver);
        let Some(receiver) = guard.as_ref() else { return };
        self.sent.fetch_add(1, Ordering::Relaxed);
        match receiver {
            Receiver::Eventfd(eventfd) => signal(eventfd.as_fd()),
            Receiver::Relay(relay, vector) => relay.raise(*vector),
        }
    }
}

/// Adds 1 to an eventfd.
pub(crate) fn signal(eventfd: BorrowedFd<'_>) {
    // Its owner may have made it blocking again: one that has no room is not written to.
    let mut room = [PollFd::new(eventfd, PollFlags::POLLOUT)];
    if poll(&mut room, PollTimeout::ZERO) == Ok(0) {
        return;
    }
    // A full counter (EAGAIN) means that the host has not read the earlier messages: it is told already.
    if let Err(errno) = nix::unistd::write(eventfd, &1u64.to_ne_bytes())
        && errno != nix::errno::Errno::EAGAIN
    {
        tracing::error!(%errno, "interrupt eventfd cannot be written");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::eventfd::{EfdFlags, EventFd};

    fn read(eventfd: &EventFd) -> Option<u64> {
        eventfd.read().ok()
    }

    /// A client that made its eventfd blocking again, and filled it, held the controller up for ever.
    #[test]
    fn a_full_eventfd_that_blocks_holds_nobody_up() {
        let eventfd = EventFd::from_flags(EfdFlags::empty()).unwrap();
        eventfd.write(u64::MAX - 1).unwrap();
        let vector = Vector::default();
        vector.connect(Some(eventfd.as_fd().try_clone_to_owned().unwrap()));
        vector.raise();
        assert_eq!(read(&eventfd), Some(u64::MAX - 1));
    }

    #[test]
    fn masked_message_is_sent_once_when_the_last_mask_is_lifted() {
        let eventfd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        let vector = Vector::default();
        vector.connect(Some(eventfd.as_fd().try_clone_to_owned().unwrap()));
        vector.raise();
        assert_eq!(read(&eventfd), Some(1));
        vector.mask(MASK_VECTOR);
        vector.mask(MASK_REGISTER);
        vector.raise();
        vector.raise();
        vector.unmask(MASK_VECTOR);
        assert_eq!(read(&eventfd), None);
        vector.unmask(MASK_REGISTER);
        assert_eq!(read(&eventfd), Some(1));
        vector.mask(MASK_VECTOR);
        vector.unmask(MASK_VECTOR);
        assert_eq!(read(&eventfd), None);
    }
}
