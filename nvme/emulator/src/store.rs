//! Where a namespace's bytes rest.
//!
//! Owns: [`Store`], what every backing does, and its errors. Backings: [`memory`] (sparse, in this process), [`file`](mod@file)
//! (a sparse image), [`write_cache`] (either of them behind a modelled volatile write cache).
//!
//! Invariants: offsets and lengths are in bytes, multiples of 512, and already checked against the namespace's size.
//! All calls may come from several threads at once. Overlapping concurrent writes may end in any mix of whole sectors;
//! no sector is torn while power is on.
//!
//! Legal crash outcomes are each backing's own.
//!
//! Excludes: logical blocks, statuses (`namespace`).

pub(crate) mod file;
pub(crate) mod memory;
pub(crate) mod write_cache;

use std::io;

use crate::dma::PayloadCursor;
use crate::power_cut::{CutReport, PowerCut};

/// Bytes of a sector: the smallest unit anything here deals in.
pub(crate) const SECTOR: u64 = 512;

/// When a write counts as done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Durability {
    /// Accepted.
    Cached,
    /// Survives a power cut.
    Durable,
}

/// Why a store could not serve a request.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// The file system under an image is full.
    #[error("the file system under the image is full")]
    NoSpace,
    /// The bytes cannot be read.
    #[error("cannot read: {0}")]
    Read(#[source] io::Error),
    /// The bytes cannot be written, or not made durable.
    #[error("cannot write or flush: {0}")]
    Write(#[source] io::Error),
}

impl StoreError {
    pub(crate) fn write(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                Self::NoSpace
            }
            _ => Self::Write(error),
        }
    }
}

/// A namespace's bytes.
pub(crate) trait Store: Send + Sync {
    /// Reads `len` bytes at `offset`.
    fn read(&self, offset: u64, len: usize, into: &mut PayloadCursor<'_>) -> Result<(), StoreError>;

    /// Writes `len` bytes at `offset`.
    fn write(
        &self,
        offset: u64,
        len: usize,
        from: &mut PayloadCursor<'_>,
        when: Durability,
    ) -> Result<(), StoreError>;

    /// Makes the range read as zeroes and gives its space back where that is possible.
    fn clear(&self, offset: u64, len: u64, when: Durability) -> Result<(), StoreError>;

    /// Makes everything completed before durable.
    fn flush(&self) -> Result<(), StoreError>;

    /// Bytes of real space in use, as far as known.
    fn allocated(&self) -> u64;

    /// Changes the size. What is cut off has been cleared; what is new reads as zeroes.
    fn resize(&self, bytes: u64) -> Result<(), StoreError>;

    /// Whether the store has failed for good and takes no more writes.
    fn is_read_only(&self) -> bool {
        false
    }

    /// Reads into host memory.
    fn read_host(&self, offset: u64, dst: &mut [u8]) -> Result<(), StoreError>;

    /// Writes from host memory, cached.
    fn write_host(&self, offset: u64, src: &[u8]) -> Result<(), StoreError>;

    /// Power fails and returns: decides the fate of what was not durable. Nothing is lost without a modelled cache.
    fn power_cut(&self, _cut: &mut PowerCut) -> CutReport {
        CutReport::default()
    }

    /// Writes that a power cut may lose now.
    fn unflushed(&self) -> usize {
        0
    }
}
