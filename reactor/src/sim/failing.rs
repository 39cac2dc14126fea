//! Requests that a device refuses by their number.
//!
//! Owns: [`RequestKind`], [`Repeat`], and [`Plan`], which counts. Invariant: requests that are not counted are not refused. Excludes: which
//! blocks fail ([`super::SimDisk::fail_reads`]), writes that are acknowledged and wrong ([`super::Miswrite`]).

use crate::block::Request;

/// Requests that are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// Reads.
    Read,
    /// Writes, zeroings, deallocations.
    Write,
    /// Flushes.
    Flush,
}

impl RequestKind {
    fn of(request: &Request) -> Self {
        match request {
            Request::Read { .. } => Self::Read,
            Request::Write { .. } | Request::WriteZeroes(_) | Request::Deallocate(_) => Self::Write,
            Request::Flush => Self::Flush,
        }
    }
}

/// How often one fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repeat {
    /// Those that follow succeed.
    Once,
    /// All that follow fail, too.
    ForEver,
}

/// Which requests of a disk fail.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    kind: RequestKind,
    /// Requests of the kind that succeed before.
    left: u64,
    repeat: Repeat,
    /// Requests that were refused.
    refused: u64,
}

impl Plan {
    pub(super) fn new(kind: RequestKind, after: u64, repeat: Repeat) -> Self {
        Self { kind, left: after, repeat, refused: 0 }
    }

    pub(super) fn refused(&self) -> u64 {
        self.refused
    }

    /// Whether this request fails.
    pub(super) fn refuses(&mut self, request: &Request) -> bool {
        if RequestKind::of(request) != self.kind || (self.repeat == Repeat::Once && self.refused > 0) {
            return false;
        }
        if self.left > 0 {
            self.left -= 1;
            return false;
        }
        self.refused += 1;
        true
    }
}
