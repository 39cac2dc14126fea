//! A write that a device acknowledges and does not do as it was told.
//!
//! Owns: [`Miswrite`], the ways in which it goes wrong, and [`Plan`], the one write of a disk that does.
//!
//! Invariants: exactly one write of a plan goes wrong, and it is answered with success. Excludes: errors that the
//! device admits ([`super::SimDisk::fail_writes`]).

use crate::block::{Lba, LbaCount, LbaRange};

/// What becomes of the write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Miswrite {
    /// Nothing is stored.
    Lost,
    /// It is stored from this block on, if it fits on the disk there; otherwise it is lost.
    Misdirected(Lba),
    /// Only its first sectors of 512 bytes are stored, so many.
    Torn(u64),
    /// Readers see it until the power goes. Then what was there before is there again.
    Stale,
}

/// The write that is going to go wrong, or has gone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    /// Writes that are done right before.
    left: u64,
    how: Miswrite,
    /// Where the write should have gone.
    met: Option<LbaRange>,
}

impl Plan {
    pub(super) fn new(after: u64, how: Miswrite) -> Self {
        Self { left: after, how, met: None }
    }

    pub(super) fn met(&self) -> Option<LbaRange> {
        self.met
    }

    /// Whether the write that begins at `start` goes wrong, and how.
    pub(super) fn strike(&mut self, start: Lba, count: LbaCount) -> Option<Miswrite> {
        if self.met.is_some() {
            return None;
        }
        if self.left > 0 {
            self.left -= 1;
            return None;
        }
        self.met = Some(LbaRange { start, count });
        Some(self.how)
    }
}
