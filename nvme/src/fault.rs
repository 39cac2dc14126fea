//! The first fatal error of a controller, and the life it leads afterwards.
//!
//! Owns: [`Fault`] and the state machine [`Life`].
//!
//! | state \ event | `Fault` | `Quiet` | `Stuck` |
//! |---|---|---|---|
//! | `Running` | `Stopping` | – | – |
//! | `Stopping` | – | `Quiet` | `Abandoned` |
//! | `Quiet` | – | – | – |
//! | `Abandoned` | – | – | – |
//!
//! (– stays.) In `Stopping` the controller was told to stop but may still write to memory, so outstanding requests are
//! held. In `Quiet` it was proven not to (CSTS.RDY is 0, the device is gone, or its DMA was revoked): requests complete
//! with the fault. In `Abandoned` neither happened before the deadline: requests complete, and their memory is never
//! used again.
//!
//! Invariants: the first fault is kept and every later request fails with it; a controller never leaves the last two
//! states (a reset makes a new one: recovery has its place as a fourth event, leading from `Quiet` to `Running`).

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use nvme_spec::{CommandId, QueueId};
use thiserror::Error;

use crate::queue::ProtocolError;
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
    /// The controller was shut down by its owner.
    #[error("the controller was shut down")]
    ShutDown,
}

/// Whether a controller may be used, and whether its memory may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Life {
    /// In use.
    Running = 0,
    /// Told to stop, not yet known to have stopped.
    Stopping = 1,
    /// Proven to touch no memory.
    Quiet = 2,
    /// Not proven to touch no memory.
    Abandoned = 3,
}

/// What moves a [`Life`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LifeEvent {
    /// The first fatal error, or an orderly shutdown.
    Fault,
    /// The controller was proven quiet.
    Quiet,
    /// The deadline for that passed.
    Stuck,
}

impl Life {
    pub(crate) fn after(self, event: LifeEvent) -> Life {
        match (self, event) {
            (Life::Running, LifeEvent::Fault) => Life::Stopping,
            (Life::Stopping, LifeEvent::Quiet) => Life::Quiet,
            (Life::Stopping, LifeEvent::Stuck) => Life::Abandoned,
            (Life::Running, LifeEvent::Quiet | LifeEvent::Stuck)
            | (Life::Stopping, LifeEvent::Fault)
            | (Life::Quiet | Life::Abandoned, _) => self,
        }
    }

    fn from_bits(bits: u8) -> Life {
        match bits {
            0 => Life::Running,
            1 => Life::Stopping,
            2 => Life::Quiet,
            _ => Life::Abandoned,
        }
    }
}

/// Life and first fault, readable from every queue.
#[derive(Debug)]
pub(crate) struct Health {
    life: AtomicU8,
    fault: OnceLock<Fault>,
}

impl Health {
    pub(crate) fn new() -> Self {
        Self { life: AtomicU8::new(Life::Running as u8), fault: OnceLock::new() }
    }

    /// One load of a line that changes at most three times in a controller's life.
    pub(crate) fn life(&self) -> Life {
        // Acquire: pairs with the release in `apply`, so that a queue that sees a state also sees the fault.
        Life::from_bits(self.life.load(Ordering::Acquire))
    }

    pub(crate) fn is_running(&self) -> bool {
        self.life() == Life::Running
    }

    /// Keeps the first fault. Returns whether this was it.
    pub(crate) fn fail(&self, fault: Fault) -> bool {
        let first = self.fault.set(fault).is_ok();
        if first {
            self.apply(LifeEvent::Fault);
        }
        first
    }

    pub(crate) fn apply(&self, event: LifeEvent) {
        // AcqRel: the release publishes the fault and whatever was read to prove the controller quiet.
        let _ = self.life.fetch_update(Ordering::AcqRel, Ordering::Acquire, |bits| {
            Some(Life::from_bits(bits).after(event) as u8)
        });
    }

    pub(crate) fn fault(&self) -> Option<&Fault> {
        self.fault.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_fault_is_kept_and_the_last_states_are_final() {
        let health = Health::new();
        health.apply(LifeEvent::Quiet);
        assert_eq!(health.life(), Life::Running);
        assert!(health.fail(Fault::Removed));
        assert!(!health.fail(Fault::ShutDown));
        assert_eq!(health.fault(), Some(&Fault::Removed));
        assert_eq!(health.life(), Life::Stopping);
        health.apply(LifeEvent::Quiet);
        health.apply(LifeEvent::Stuck);
        assert_eq!(health.life(), Life::Quiet);
    }
}
