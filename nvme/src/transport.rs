//! What the driver needs of the way to a controller: registers, DMA memory, interrupts; and of time.
//!
//! Owns: the traits [`Transport`] and [`Timing`]. Everything above is the same for every transport.
//!
//! *Memory ordering*: [`Transport::doorbell`] is called after a release fence; the transport keeps stores to DMA memory
//! that precede it visible to the device before the doorbell is. A register read is not an ordering point.
//!
//! Excludes: the meaning of any register.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use reactor::clock::{Clock, Instant, SystemClock};
use reactor::dma::DmaRegion;
use thiserror::Error;

pub(crate) mod aligned;
pub mod embedded;
#[cfg(test)]
pub(crate) mod fake;
pub mod qtest;
pub mod slab;
pub mod vfio;
pub mod vfio_user;

/// Why the way to the controller failed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TransportError {
    /// No DMA memory.
    #[error("cannot get {bytes} bytes of DMA memory: {reason}")]
    Memory {
        /// Bytes asked for.
        bytes: usize,
        /// The system's or the transport's words.
        reason: String,
    },
    /// A register access failed.
    #[error("register {offset:#x} cannot be accessed: {reason}")]
    Register {
        /// Offset in BAR0.
        offset: u64,
        /// The transport's words.
        reason: String,
    },
    /// An interrupt could not be set up.
    #[error("interrupt vector {vector} cannot be set up: {reason}")]
    Interrupt {
        /// The vector.
        vector: u16,
        /// The system's or the transport's words.
        reason: String,
    },
    /// The transport cannot do this.
    #[error("the transport cannot {0}")]
    Unsupported(&'static str),
    /// The device or the system refused.
    #[error("cannot {what}: {reason}")]
    Failed {
        /// What was asked for.
        what: &'static str,
        /// The system's words.
        reason: String,
    },
}

/// The way to one controller. Calls may block for microseconds, and for milliseconds on transports by message, except
/// for [`doorbell`](Self::doorbell), which is on the I/O path.
pub trait Transport: Send + Sync {
    /// Name of the device for messages, such as `emu:/var/lib/p.img`.
    fn name(&self) -> &str;

    /// Bytes of BAR0 that can be accessed.
    fn bar_bytes(&self) -> u64;

    /// Reads a 32-bit register. A removed device reads as all ones.
    ///
    /// # Errors
    /// The access itself failed.
    fn read32(&self, offset: u64) -> Result<u32, TransportError>;

    /// Reads a 64-bit register.
    ///
    /// # Errors
    /// The access itself failed.
    fn read64(&self, offset: u64) -> Result<u64, TransportError>;

    /// Writes a 32-bit register.
    ///
    /// # Errors
    /// The access itself failed.
    fn write32(&self, offset: u64, value: u32) -> Result<(), TransportError>;

    /// Writes a 64-bit register.
    ///
    /// # Errors
    /// The access itself failed.
    fn write64(&self, offset: u64, value: u64) -> Result<(), TransportError>;

    /// Writes a doorbell: posted, never blocks, loss shows as a command that times out.
    fn doorbell(&self, offset: u64, value: u32);

    /// Zeroed memory that the device can reach, page aligned, contiguous for the device, mapped while the region lives.
    ///
    /// # Errors
    /// There is none.
    fn allocate(&self, bytes: usize) -> Result<Arc<dyn DmaRegion>, TransportError>;

    /// Interrupt vectors that [`connect_interrupt`](Self::connect_interrupt) takes; 0 if the device can only be polled.
    fn interrupt_vectors(&self) -> u16;

    /// Makes `vector` write to `eventfd`.
    ///
    /// # Errors
    /// The vector does not exist or the system refuses.
    fn connect_interrupt(&self, vector: u16, eventfd: BorrowedFd<'_>) -> Result<(), TransportError>;

    /// Lets `vector` through (`true`) or holds it back. What arrives while it is held back may be lost: look at the
    /// queue after letting it through. A hint: a transport without masks ignores it.
    fn listen(&self, vector: u16, listen: Listen);

    /// Takes the device's access to memory away, when it cannot be proven quiet otherwise.
    ///
    /// # Errors
    /// The transport cannot. Then memory that the device was given is never used again.
    fn revoke_dma(&self) -> Result<(), TransportError>;

    /// Resets the whole function (PCI: FLR), for a controller that ignores CC.EN. Registers are as after power-on
    /// afterwards, mappings and interrupt connections stay. May block for as long as [`FUNCTION_RESET_LIMIT`].
    ///
    /// # Errors
    /// The transport cannot, or the reset failed.
    fn reset_function(&self) -> Result<(), TransportError> {
        Err(TransportError::Unsupported("reset the function"))
    }

    /// A descriptor that becomes readable once the device has gone or its owner wants it back; `None` if only register
    /// reads tell. Once the device has gone, reads give all ones and writes do nothing: neither fails.
    fn removal_event(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Longest time that [`Transport::reset_function`] may take.
pub const FUNCTION_RESET_LIMIT: Duration = Duration::from_secs(10);

/// Whether an interrupt is wanted now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listen {
    /// The owner polls.
    Off,
    /// The owner is about to sleep.
    On,
}

/// Time, as bring-up, admin commands and deadlines see it.
pub trait Timing: Send + Sync {
    /// Monotonic time.
    fn now(&self) -> Instant;

    /// Lets `duration` pass.
    fn pause(&self, duration: Duration);
}

/// The system's time.
#[derive(Default)]
pub struct SystemTiming(SystemClock);

impl Timing for SystemTiming {
    fn now(&self) -> Instant {
        self.0.now()
    }

    fn pause(&self, duration: Duration) {
        std::thread::sleep(duration);
    }
}
