//! The block-device boundary: what a storage engine asks of one queue of a device.
//!
//! Owns: the vocabulary ([`Geometry`], [`Request`], [`Completion`], [`IoError`]) and the trait [`BlockDevice`].
//! A `BlockDevice` is *one queue*, used by exactly one reactor. It is synchronous and never blocks:
//! [`submit`](BlockDevice::submit) queues, [`ring`](BlockDevice::ring) tells the device, and
//! [`process_completions`](BlockDevice::process_completions) hands back what has finished.
//!
//! Invariants:
//! - a buffer moves into the request at submit and comes back in exactly one completion (or in the rejection);
//! - an implementation never completes a request from inside `submit`;
//! - every accepted request is completed, with an error at worst, in bounded time.
//!
//! Excludes: futures and waking (the operation slots' business), queues of several devices, retries.

use std::fmt;
use std::os::fd::BorrowedFd;

use crate::dma::{DmaBuffer, DmaPool};

/// A logical block address, in units of [`Geometry::lba_size`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lba(u64);

impl Lba {
    /// The address `value`, in logical blocks.
    pub const fn new(value: u64) -> Self {
        Self(value)
    }

    /// The address in logical blocks.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Lba {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A number of logical blocks, in units of [`Geometry::lba_size`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LbaCount(u64);

impl LbaCount {
    /// A count of `value` logical blocks.
    pub const fn new(value: u64) -> Self {
        Self(value)
    }

    /// The count in logical blocks.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for LbaCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a device is, as far as a storage engine needs to know. Constant while the device is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of one logical block: a power of two of at least 512.
    pub lba_size: u32,
    /// Logical blocks of the device.
    pub lba_count: LbaCount,
    /// Bytes beyond which the implementation splits a transfer. A larger request is legal.
    pub preferred_transfer: u32,
    /// Whether completed writes may be lost by a power cut until a flush: if not, a flush is free.
    pub volatile_write_cache: bool,
    /// Whether the device acts on [`Request::Deallocate`]; if not, the request succeeds and does nothing.
    pub deallocate: bool,
    /// Requests the queue holds at once.
    pub queue_depth: u16,
    /// Name of the device for messages, such as `emu:/var/lib/p.img` or `pci:0000:01:00.0`.
    pub name: String,
}

impl Geometry {
    /// Bytes of the device.
    pub fn size_bytes(&self) -> u64 {
        self.lba_count.get() * u64::from(self.lba_size)
    }
}

/// Whether a write may rest in the device's volatile cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Completed means accepted; a later flush makes it durable.
    Cached,
    /// Completed means durable (Force Unit Access).
    Durable,
}

/// A range of logical blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LbaRange {
    /// First block.
    pub start: Lba,
    /// Number of blocks.
    pub count: LbaCount,
}

/// One request. Transfer lengths are the buffers' and must be multiples of the logical block size.
#[derive(Debug)]
pub enum Request {
    /// Fills `buffer` from the device.
    Read {
        /// First block.
        lba: Lba,
        /// Destination.
        buffer: DmaBuffer,
    },
    /// Writes `buffer` to the device.
    Write {
        /// First block.
        lba: Lba,
        /// Source.
        buffer: DmaBuffer,
        /// When the write counts as done.
        durability: Durability,
    },
    /// Makes every write completed before its submission durable.
    Flush,
    /// Makes the range read as zeroes, without a transfer.
    WriteZeroes(LbaRange),
    /// Tells the device that the range's contents are no longer needed.
    Deallocate(LbaRange),
}

/// Names a request from submit to completion; chosen by the submitter, opaque to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OpTag(pub u64);

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IoError {
    /// The request lies outside the device or is not a multiple of the block size.
    #[error(
        "request outside the device or not aligned to its {lba_size}-byte blocks: lba {lba}, {bytes} bytes"
    )]
    InvalidRange {
        /// First block asked for.
        lba: u64,
        /// Bytes asked for.
        bytes: u64,
        /// The device's block size.
        lba_size: u32,
    },
    /// The medium could not return or take the data; other blocks may be fine.
    #[error("medium error at lba {lba}: {detail}")]
    Medium {
        /// First block of the failed command.
        lba: u64,
        /// The device's own words, such as a status code.
        detail: String,
    },
    /// The command failed for another reason.
    #[error("device refused the command: {detail}")]
    Command {
        /// The device's own words, such as a status code.
        detail: String,
    },
    /// A comparison found other data than expected.
    #[error("the data at lba {lba} and after it is not what was expected")]
    Mismatch {
        /// First block of the command that compared.
        lba: u64,
    },
    /// The device lacks what the request takes.
    #[error("not supported: {what}")]
    Unsupported {
        /// What is missing.
        what: &'static str,
    },
    /// The device answered too late; the outcome of a write is unknown.
    #[error("device did not answer in time")]
    Timeout,
    /// The device has failed or was removed: everything later fails the same way.
    #[error("device failed: {detail}")]
    DeviceFailed {
        /// The first fatal error.
        detail: String,
    },
}

/// A finished request.
#[derive(Debug)]
pub struct Completion {
    /// The tag given at submit.
    pub tag: OpTag,
    /// How it went.
    pub result: Result<(), IoError>,
    /// The request's buffer, if it had one.
    pub buffer: Option<DmaBuffer>,
}

/// A request that was not accepted, with its buffer.
#[derive(Debug)]
pub struct Rejected {
    /// The request as it was given.
    pub request: Request,
    /// Why: [`RejectReason::QueueFull`] asks to try again after completions.
    pub reason: RejectReason,
}

/// Why a request was not accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RejectReason {
    /// No room now; process completions and submit again.
    QueueFull,
    /// Never acceptable.
    Error(IoError),
}

/// One queue of a block device, used by one reactor.
pub trait BlockDevice {
    /// What the device is.
    fn geometry(&self) -> &Geometry;

    /// The pool that buffers for this device come from.
    fn pool(&self) -> &DmaPool;

    /// Queues a request. The device need not see it before [`ring`](Self::ring).
    ///
    /// # Errors
    /// Gives the request back: the queue is full, or the request can never be served.
    fn submit(&mut self, tag: OpTag, request: Request) -> Result<(), Rejected>;

    /// Tells the device of everything submitted since the last call, in one step.
    fn ring(&mut self);

    /// Passes up to `budget` finished requests to `sink` and returns their number.
    fn process_completions(&mut self, budget: usize, sink: &mut dyn FnMut(Completion)) -> usize;

    /// Requests accepted and not yet completed.
    fn in_flight(&self) -> usize;

    /// A descriptor that becomes readable when completions arrive while armed; `None` if the device can only be
    /// polled. Drained by [`arm_interrupt`](Self::arm_interrupt).
    fn interrupt(&self) -> Option<BorrowedFd<'_>>;

    /// Asks for an interrupt on the next completion. Returns `true` if completions are already waiting: then poll,
    /// do not sleep.
    fn arm_interrupt(&mut self) -> bool;

    /// Virtual time at which the device has something to do next; simulated devices only.
    fn next_event(&self) -> Option<crate::clock::Instant> {
        None
    }
}
