//! A controller's faults, and the life it leads through and after them.
//!
//! Owns: [`Fault`], the state machine [`Life`], and `Health`, which every queue reads.
//!
//! | state \\ event | `Fault` | `Quiet` | `Reset` | `Revived` | `Stuck` |
//! |---|---|---|---|---|---|
//! | `Running` | `Stopping` | – | – | – | – |
//! | `Stopping` | – | `Quiet` | `Resetting` | – | `Abandoned` |
//! | `Resetting` | `Stopping` | – | – | `Running`, next epoch | – |
//! | `Quiet`, `Abandoned` | – | – | – | – | – |
//!
//! (– stays.) In `Stopping` the controller was told to stop but may still write to memory, so outstanding requests are
//! held. In `Resetting` it was proven not to (CSTS.RDY is 0) and is being brought up again; requests that can be repeated
//! are, once it is `Running`. In `Quiet` it was proven not to (or the device is gone, or its DMA was revoked) for good:
//! requests complete with the fault. In `Abandoned` no proof came before the deadline: requests complete, and their memory
//! is never used again.
//!
//! Invariants:
//! - only a fault that a reset can cure leads to `Resetting`; any other is kept as the final one, the first of them wins,
//!   and every later request fails with it;
//! - a controller never leaves `Quiet` and `Abandoned`;
//! - the epoch grows with each revival, so that one load tells a queue that it is running *and* that nothing has been
//!   reset behind its back.

use std::sync::{OnceLock, PoisonError};

use nvme_spec::{CommandId, QueueId};
use thiserror::Error;

use crate::planted::Bug;
use crate::queue::ProtocolError;
use crate::sync::{AtomicU32, Mutex, Ordering, order_unless};
use crate::transport::TransportError;

/// Why a controller is not used any more.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Fault {
    /// The controller broke the queue protocol.
    #[error("queue {queue}: {error}")]
    Protocol {
        /// Queue pair.
        queue: QueueId,
        /// What it did.
        error: ProtocolError,
    },
    /// A command was not completed in time.
    #[error(
        "queue {queue}: command {command} (opcode {opcode:#04x}) was not completed within {timeout_ms} ms, CSTS is {csts:#x}"
    )]
    CommandTimeout {
        /// Queue pair.
        queue: QueueId,
        /// The command.
        command: CommandId,
        /// Its opcode.
        opcode: u8,
        /// What it was given.
        timeout_ms: u64,
        /// Controller status at that time.
        csts: u32,
    },
    /// CSTS.CFS is set.
    #[error("the controller reports a fatal error (CSTS.CFS, CSTS is {csts:#x})")]
    FatalStatus {
        /// Controller status.
        csts: u32,
    },
    /// Registers read as all ones.
    #[error("the device was removed (CSTS reads as all ones)")]
    Removed,
    /// The way to the device broke.
    #[error("{0}")]
    Transport(#[from] TransportError),
    /// A reset did not bring the controller back.
    #[error("{cause}; resetting it failed: {reason}")]
    ResetFailed {
        /// What made the reset necessary.
        cause: Box<Fault>,
        /// What went wrong.
        reason: String,
    },
    /// After a reset, another controller answered.
    #[error("after a reset the device calls itself {found}, not {expected}")]
    Replaced {
        /// Model and serial number before.
        expected: String,
        /// Model and serial number now.
        found: String,
    },
    /// After a reset, a namespace in use was another.
    #[error("after a reset namespace {nsid} has another size or block size")]
    NamespaceChanged {
        /// The namespace.
        nsid: u32,
    },
    /// After a reset, a queue was refused that there was before.
    #[error("queue {queue} cannot be created again: {reason}")]
    CannotCreate {
        /// Queue pair.
        queue: QueueId,
        /// The command and the controller's answer.
        reason: String,
    },
    /// A queue that was half created cannot be deleted.
    #[error("queue {queue} can neither be used nor deleted")]
    CannotDelete {
        /// Queue pair.
        queue: QueueId,
    },
    /// The controller was shut down by its owner.
    #[error("the controller was shut down")]
    ShutDown,
}

impl Fault {
    /// Whether a reset of the controller may cure it. A controller that broke the protocol is not given another chance:
    /// what it said before cannot be believed either.
    pub fn is_curable(&self) -> bool {
        matches!(self, Fault::CommandTimeout { .. } | Fault::FatalStatus { .. })
    }
}

/// Whether a controller may be used, and whether its memory may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Life {
    /// In use.
    Running = 0,
    /// Told to stop, not yet known to have stopped.
    Stopping = 1,
    /// Proven to touch no memory, and being brought up again.
    Resetting = 2,
    /// Proven to touch no memory, for good.
    Quiet = 3,
    /// Not proven to touch no memory.
    Abandoned = 4,
}

/// What moves a [`Life`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LifeEvent {
    /// A fatal error, or an orderly shutdown.
    Fault,
    /// The controller was proven quiet, for good.
    Quiet,
    /// The controller was proven quiet and will be brought up again.
    Reset,
    /// It is up again.
    Revived,
    /// The deadline for that passed.
    Stuck,
}

impl Life {
    pub(crate) fn after(self, event: LifeEvent) -> Life {
        match (self, event) {
            (Life::Running | Life::Resetting, LifeEvent::Fault) => Life::Stopping,
            (Life::Stopping, LifeEvent::Quiet) => Life::Quiet,
            (Life::Stopping, LifeEvent::Reset) => Life::Resetting,
            (Life::Stopping, LifeEvent::Stuck) => Life::Abandoned,
            (Life::Resetting, LifeEvent::Revived) => Life::Running,
            (Life::Running, LifeEvent::Quiet | LifeEvent::Reset | LifeEvent::Revived | LifeEvent::Stuck)
            | (Life::Stopping, LifeEvent::Fault | LifeEvent::Revived)
            | (Life::Resetting, LifeEvent::Quiet | LifeEvent::Reset | LifeEvent::Stuck)
            | (Life::Quiet | Life::Abandoned, _) => self,
        }
    }

    fn from_bits(bits: u32) -> Life {
        match bits & LIFE_MASK {
            0 => Life::Running,
            1 => Life::Stopping,
            2 => Life::Resetting,
            3 => Life::Quiet,
            _ => Life::Abandoned,
        }
    }

    /// Whether nothing can change any more.
    pub fn is_final(self) -> bool {
        matches!(self, Life::Quiet | Life::Abandoned)
    }
}

const LIFE_BITS: u32 = 3;
const LIFE_MASK: u32 = (1 << LIFE_BITS) - 1;

/// Life and epoch in one word, as a queue compares them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pulse(u32);

impl Pulse {
    /// Equal to no pulse of a running controller.
    pub(crate) const NONE: Pulse = Pulse(LIFE_MASK);

    pub(crate) fn life(self) -> Life {
        Life::from_bits(self.0)
    }
}

/// Life, epoch and faults, readable from every queue.
#[derive(Debug)]
pub(crate) struct Health {
    /// `epoch << LIFE_BITS | life`.
    pulse: AtomicU32,
    /// What made the controller stop last; set before the life changes.
    cause: Mutex<Option<Fault>>,
    last: OnceLock<Fault>,
}

impl Health {
    pub(crate) fn new() -> Self {
        Self { pulse: AtomicU32::new(0), cause: Mutex::new(None), last: OnceLock::new() }
    }

    /// One load of a line that changes only with the controller's life.
    #[inline]
    pub(crate) fn pulse(&self) -> Pulse {
        // Acquire: pairs with the release in `apply`, so that a queue that sees a state also sees the fault.
        Pulse(self.pulse.load(order_unless(Bug::PulseReadRelaxed, Ordering::Acquire)))
    }

    pub(crate) fn life(&self) -> Life {
        self.pulse().life()
    }

    /// Holds the lock of the cause, for a test.
    #[cfg(test)]
    pub(crate) fn hold_cause(&self) -> impl std::ops::Deref<Target = Option<Fault>> {
        self.cause.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops a running or reviving controller because of `fault`. Returns whether this was the one that did. A fault that
    /// no reset cures is kept even if the controller is stopping already.
    pub(crate) fn fail(&self, fault: Fault, curable: Curable) -> bool {
        let mut cause = self.cause.lock().unwrap_or_else(PoisonError::into_inner);
        let stops = matches!(self.life(), Life::Running | Life::Resetting);
        let ends = curable == Curable::No && !self.life().is_final() && self.last.set(fault.clone()).is_ok();
        if stops {
            *cause = Some(fault);
            self.apply(LifeEvent::Fault);
        }
        stops || ends
    }

    /// [`Self::fail`] if the pulse is still `pulse`, that of a running controller: whoever finds a fault without holding back
    /// a reset may find one that was dealt with in the meantime.
    pub(crate) fn fail_since(&self, pulse: Pulse, fault: Fault, curable: Curable) -> bool {
        let mut cause = self.cause.lock().unwrap_or_else(PoisonError::into_inner);
        // A running controller stops under the lock only.
        if self.pulse() != pulse || pulse.life() != Life::Running {
            return false;
        }
        if curable == Curable::No {
            // The first final fault is kept.
            let _ = self.last.set(fault.clone());
        }
        *cause = Some(fault);
        self.apply(LifeEvent::Fault);
        true
    }

    pub(crate) fn apply(&self, event: LifeEvent) {
        let next = |pulse: u32| {
            let life = Life::from_bits(pulse);
            let after = life.after(event);
            let epoch = pulse >> LIFE_BITS;
            let epoch = if after == Life::Running && life != after { epoch.wrapping_add(1) } else { epoch };
            Some(epoch << LIFE_BITS | after as u32)
        };
        // AcqRel: the release publishes the fault and whatever was read to prove the controller quiet.
        let _ = self.pulse.fetch_update(
            order_unless(Bug::PulseRelaxed, Ordering::AcqRel),
            Ordering::Acquire,
            next,
        );
    }

    /// The fault that ended the controller.
    pub(crate) fn fault(&self) -> Option<&Fault> {
        self.last.get()
    }

    /// What the controller stopped for last: the final fault if there is one.
    pub(crate) fn cause(&self) -> Option<Fault> {
        self.last.get().cloned().or_else(|| self.cause.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// Why no command can be sent now; `None` if one can.
    pub(crate) fn obstacle(&self) -> Option<Fault> {
        match self.life() {
            Life::Running | Life::Resetting => None,
            Life::Stopping | Life::Quiet | Life::Abandoned => self.cause(),
        }
    }
}

/// Whether a reset may be tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Curable {
    Yes,
    No,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_final_fault_is_kept_and_the_last_states_are_final() {
        let health = Health::new();
        health.apply(LifeEvent::Quiet);
        assert_eq!(health.life(), Life::Running);
        assert!(health.fail(Fault::Removed, Curable::No));
        assert!(!health.fail(Fault::ShutDown, Curable::No));
        assert_eq!(health.fault(), Some(&Fault::Removed));
        assert_eq!(health.life(), Life::Stopping);
        health.apply(LifeEvent::Quiet);
        health.apply(LifeEvent::Stuck);
        assert_eq!(health.life(), Life::Quiet);
        assert!(!health.fail(Fault::ShutDown, Curable::No));
    }

    #[test]
    fn a_revived_controller_has_another_pulse() {
        let health = Health::new();
        let before = health.pulse();
        assert!(health.fail(Fault::FatalStatus { csts: 3 }, Curable::Yes));
        assert!(!health.fail(Fault::FatalStatus { csts: 7 }, Curable::Yes));
        assert_eq!((health.fault(), health.obstacle()), (None, Some(Fault::FatalStatus { csts: 3 })));
        health.apply(LifeEvent::Reset);
        assert_eq!(health.obstacle(), None);
        health.apply(LifeEvent::Revived);
        assert_eq!(health.life(), Life::Running);
        assert_ne!(health.pulse(), before);
        assert_ne!(health.pulse(), Pulse::NONE);
    }

    #[test]
    fn a_fault_that_was_dealt_with_does_not_stop_the_controller_again() {
        let health = Health::new();
        let before = health.pulse();
        assert!(health.fail_since(before, Fault::FatalStatus { csts: 3 }, Curable::Yes));
        assert!(!health.fail_since(before, Fault::FatalStatus { csts: 3 }, Curable::Yes));
        health.apply(LifeEvent::Reset);
        assert!(!health.fail_since(health.pulse(), Fault::FatalStatus { csts: 3 }, Curable::Yes));
        health.apply(LifeEvent::Revived);
        assert!(!health.fail_since(before, Fault::FatalStatus { csts: 3 }, Curable::Yes));
        assert_eq!(health.life(), Life::Running);
    }

    #[test]
    fn a_final_fault_while_stopping_for_a_curable_one_is_final() {
        let health = Health::new();
        assert!(health.fail(Fault::FatalStatus { csts: 3 }, Curable::Yes));
        assert!(health.fail(Fault::Removed, Curable::No));
        assert_eq!((health.fault(), health.life()), (Some(&Fault::Removed), Life::Stopping));
        assert_eq!(health.cause(), Some(Fault::Removed));
    }
}
