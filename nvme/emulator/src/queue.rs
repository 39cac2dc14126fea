//! Submission and completion queues as the controller holds them.
//!
//! Owns: ring positions, the phase tag, fetching and posting of entries, the doorbells' values and their checks.
//!
//! Invariants:
//! - a submission slot's `queue` is used by one thread at a time (its lock); different queues never share a lock but that
//!   of a completion queue they both complete to;
//! - both halves of a fused pair are fetched before the first is handed out;
//! - an entry is posted only where the host has freed a slot (head doorbell), so no unread completion is overwritten;
//! - locks are taken in the order: submission queue 0, submission queue n, completion queue, the controller's own.
//!
//! Memory ordering:
//! - a doorbell value is stored with release and loaded with acquire order: what the host wrote before ringing is seen;
//! - the dword with the phase tag is stored last, with release order; the host's partner is its acquire load of it;
//! - `stalled` and the head doorbell form a store-load pair on both sides, each with a sequentially consistent fence in
//!   between: either the poster sees the freed slot or the doorbell write sees that someone is stalled.
//!
//! Below: `submission` and `completion`, each its slot in the controller and the queue that comes and goes in it.
//!
//! Excludes: what commands mean; how a shadow doorbell is read and its event index written (`shadow`).

mod completion;
mod submission;

pub(crate) use completion::{CompletionQueue, CompletionSlot, Overrun, PhaseTag, Posted};
pub(crate) use submission::{QueueStats, SubmissionQueue, SubmissionSlot, bump};

/// Where and how large a ring is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingShape {
    pub(crate) iova: u64,
    /// Entries, at least 2.
    pub(crate) entries: u32,
}

impl RingShape {
    fn next(self, index: u32) -> u32 {
        if index + 1 == self.entries { 0 } else { index + 1 }
    }

    /// Steps forward from `from` to `to`.
    fn distance(self, from: u32, to: u32) -> u32 {
        if to >= from { to - from } else { to + self.entries - from }
    }
}

/// What a doorbell write was found to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DoorbellCheck {
    Accepted,
    /// There is no such queue.
    NoQueue,
    /// The value is outside the ring, or frees entries that were never posted.
    BadValue,
}
