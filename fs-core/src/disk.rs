//! The volume's view of its device: blocks of 4 KiB, ordinary memory, transfers of any length.
//!
//! Owns: [`VolumeDisk`], which turns blocks into the device's logical blocks, cuts long transfers to pieces that the
//! DMA pool can serve, and copies between DMA memory and the caller's.
//!
//! Invariants:
//! - a call waits for pool memory only while it has no transfer of its own in flight, so that callers cannot starve
//!   each other of it;
//! - a failed call returns after all its pieces are answered: nothing of it reaches the device later.
//!
//! Excludes: checksums, retries, ordering (a flush covers what has completed before it).

use std::collections::VecDeque;

use reactor::block::Durability;
use reactor::{Disk, DmaBuffer, IoError, Lba, LbaCount, LbaRange, Operation};

use crate::error::FsError;
use crate::types::{BLOCK_SIZE, BlockCount, BlockNr};

/// Bytes of a transfer's piece at most.
pub const MAX_PIECE_BYTES: usize = 1 << 20;

/// Pieces of one call in flight at most.
const PIECES_IN_FLIGHT: usize = 4;

/// Part of the pool that one piece may take at most.
const POOL_SHARE: usize = 4;

const BLOCK_BYTES: usize = BLOCK_SIZE as usize;

/// Why a device cannot hold a volume.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{device} has logical blocks of {lba_size} bytes; 512 to 4096 are supported")]
pub struct UnsupportedDevice {
    /// Name of the device.
    pub device: String,
    /// Its block size.
    pub lba_size: u32,
}

/// A device as a row of 4 KiB blocks. Clones share it.
#[derive(Clone)]
pub struct VolumeDisk {
    disk: Disk,
    lbas_per_block: u64,
    piece_bytes: usize,
}

impl VolumeDisk {
    /// The device behind `disk`.
    ///
    /// # Errors
    /// [`UnsupportedDevice`] if its logical blocks do not divide 4 KiB.
    pub fn new(disk: Disk) -> Result<Self, UnsupportedDevice> {
        let geometry = disk.geometry();
        let lba_size = geometry.lba_size;
        if !(512..=4096).contains(&lba_size) || !lba_size.is_power_of_two() {
            return Err(UnsupportedDevice { device: geometry.name.clone(), lba_size });
        }
        let share = disk.pool().capacity() / POOL_SHARE;
        let piece_bytes = (share - share % BLOCK_BYTES).clamp(BLOCK_BYTES, MAX_PIECE_BYTES);
        Ok(Self { lbas_per_block: BLOCK_SIZE / u64::from(lba_size), piece_bytes, disk })
    }

    /// Whole blocks of the device.
    pub fn blocks(&self) -> BlockCount {
        BlockCount::new(self.disk.geometry().size_bytes() / BLOCK_SIZE)
    }

    /// Name of the device, for messages.
    pub fn name(&self) -> &str {
        &self.disk.geometry().name
    }

    /// The reactor's disk, for transfers that manage their own DMA memory.
    pub fn raw(&self) -> &Disk {
        &self.disk
    }

    /// The device's address of a block.
    pub fn lba(&self, block: BlockNr) -> Lba {
        Lba::new(block.get().saturating_mul(self.lbas_per_block))
    }

    /// Reads `count` blocks.
    ///
    /// # Errors
    /// [`FsError::Io`]: outside the device, or the device failed.
    pub async fn read(&self, start: BlockNr, count: BlockCount) -> Result<Vec<u8>, FsError> {
        let bytes = self.checked_bytes("read", start, count)?;
        let mut data = vec![0; bytes];
        let mut in_flight: VecDeque<(usize, Operation)> = VecDeque::new();
        let (mut next, mut result) = (0, Ok(()));
        while next < bytes || !in_flight.is_empty() {
            if next < bytes && result.is_ok() && in_flight.len() < PIECES_IN_FLIGHT {
                let len = self.piece_bytes.min(bytes - next);
                if let Some(buffer) = self.buffer(len, in_flight.is_empty()).await? {
                    in_flight.push_back((next, self.disk.read(self.lba_at(start, next), buffer)));
                    next += len;
                    continue;
                }
            }
            let Some((offset, operation)) = in_flight.pop_front() else { break };
            match operation.await {
                (Ok(()), buffer) => buffer.read_at(0, &mut data[offset..offset + buffer.len()]),
                (Err(error), _) => result = result.and(Err(self.failed("read", start, count, &error))),
            }
        }
        result.map(|()| data)
    }

    /// Writes whole blocks.
    ///
    /// # Errors
    /// [`FsError::Io`]: outside the device, or the device failed; then any part of it may have been written.
    ///
    /// # Panics
    /// If `data` is not a whole number of blocks.
    pub async fn write(&self, start: BlockNr, data: &[u8], durability: Durability) -> Result<(), FsError> {
        assert!(data.len().is_multiple_of(BLOCK_BYTES), "whole blocks are written");
        let count = BlockCount::covering(data.len() as u64);
        self.checked_bytes("write", start, count)?;
        let mut in_flight: VecDeque<Operation> = VecDeque::new();
        let (mut next, mut result) = (0, Ok(()));
        while next < data.len() || !in_flight.is_empty() {
            if next < data.len() && result.is_ok() && in_flight.len() < PIECES_IN_FLIGHT {
                let len = self.piece_bytes.min(data.len() - next);
                if let Some(mut buffer) = self.buffer(len, in_flight.is_empty()).await? {
                    buffer.write_at(0, &data[next..next + len]);
                    in_flight.push_back(self.disk.write(self.lba_at(start, next), buffer, durability));
                    next += len;
                    continue;
                }
            }
            let Some(operation) = in_flight.pop_front() else { break };
            if let (Err(error), _) = operation.await {
                result = result.and(Err(self.failed("write", start, count, &error)));
            }
        }
        result
    }

    /// Makes everything written and completed before durable.
    ///
    /// # Errors
    /// [`FsError::Io`].
    pub async fn flush(&self) -> Result<(), FsError> {
        self.disk.flush().await.map_err(|error| FsError::Io(format!("{}: flush: {error}", self.name())))
    }

    /// Makes blocks read as zeroes, without transferring them.
    ///
    /// # Errors
    /// [`FsError::Io`].
    pub async fn write_zeroes(&self, start: BlockNr, count: BlockCount) -> Result<(), FsError> {
        let result = self.disk.write_zeroes(self.range(start, count)).await;
        result.map_err(|error| self.failed("zeroing", start, count, &error))
    }

    /// Tells the device that the contents of blocks are not needed any more.
    ///
    /// # Errors
    /// [`FsError::Io`].
    pub async fn deallocate(&self, start: BlockNr, count: BlockCount) -> Result<(), FsError> {
        let result = self.disk.deallocate(self.range(start, count)).await;
        result.map_err(|error| self.failed("deallocation", start, count, &error))
    }

    /// A buffer: waited for if nothing of the caller's is in flight, else only if there is one now.
    async fn buffer(&self, bytes: usize, alone: bool) -> Result<Option<DmaBuffer>, FsError> {
        let pool = self.disk.pool();
        if !alone {
            return Ok(pool.try_alloc(bytes));
        }
        let buffer = pool.alloc(bytes).await;
        buffer.map(Some).map_err(|error| FsError::Io(format!("{}: {error}", self.name())))
    }

    fn checked_bytes(&self, what: &str, start: BlockNr, count: BlockCount) -> Result<usize, FsError> {
        let end = start.checked_add(count).filter(|end| end.get() <= self.blocks().get());
        let bytes = end.and(count.bytes()).and_then(|bytes| usize::try_from(bytes).ok());
        bytes.ok_or_else(|| {
            let blocks = self.blocks();
            FsError::Io(format!("{}: {what} of blocks {start} + {count} of {blocks}", self.name()))
        })
    }

    fn lba_at(&self, start: BlockNr, byte: usize) -> Lba {
        self.lba(BlockNr::new(start.get() + (byte / BLOCK_BYTES) as u64))
    }

    fn range(&self, start: BlockNr, count: BlockCount) -> LbaRange {
        let count = LbaCount::new(count.get().saturating_mul(self.lbas_per_block));
        LbaRange { start: self.lba(start), count }
    }

    fn failed(&self, what: &str, start: BlockNr, count: BlockCount, error: &IoError) -> FsError {
        FsError::Io(format!("{}: {what} of blocks {start} + {count}: {error}", self.name()))
    }
}

#[cfg(test)]
pub(crate) mod tests;
