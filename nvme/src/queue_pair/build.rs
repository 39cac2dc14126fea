//! Submission queue entries of a queue pair's commands, with their data pointers.
//!
//! Owns: the memory behind data pointers that is not the caller's: a list for every command slot (PRPs, SGL descriptors, or
//! the ranges of a deallocate or copy), and a page of zeroes where the controller lacks Write Zeroes.
//!
//! Invariants: a slot's list is written only while the slot is free, so never under a command in flight.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use nvme_spec::command::{DeallocateZeroes, DsmRange, ForceUnitAccess};
use nvme_spec::identify::Oncs;
use nvme_spec::nvm::{CopyRange, Fuse};
use nvme_spec::sgl::SGL_DESCRIPTOR_BYTES;
use nvme_spec::{NamespaceId, NvmOpcode, SglDescriptor, SubmissionEntry};
use reactor::dma::{DmaBuffer, DmaRegion, PAGE_SIZE};
use vm_memory::Bytes;
use zerocopy::IntoBytes;

use super::nvm::Half;
use crate::copy::{CopyLimits, Sources};
use crate::identity::{ControllerInfo, Namespace};
use crate::ops::{Kind, Op};
use crate::planted::{Bug, is_planted};
use crate::prp::{self, DataPages, ListMemory};
use crate::sgl::{self, Piece, Pointing, SegmentMemory, SglAlignment};
use crate::transport::{Transport, TransportError, aligned};

/// Bytes of a slot's list at least: a page of ranges.
const RANGE_LIST_BYTES: usize = 4096;

/// Builds commands for one namespace.
pub(super) struct CommandBuilder {
    nsid: NamespaceId,
    lba_shift: u8,
    page_size: usize,
    zeroes: DeallocateZeroes,
    pointing: Pointing,
    lists: Arc<dyn DmaRegion>,
    /// Bytes of each slot's list.
    list_bytes: usize,
    zero_page: Option<Arc<dyn DmaRegion>>,
}

impl CommandBuilder {
    pub(super) fn new(
        transport: &dyn Transport,
        namespace: &Namespace,
        info: &ControllerInfo,
        slots: u16,
        max_transfer: usize,
        pointing: Pointing,
    ) -> Result<Self, TransportError> {
        let page_size = info.page_size as usize;
        let zero_page = match info.oncs.contains(Oncs::WRITE_ZEROES) {
            true => None,
            false => Some(aligned::allocate(transport, page_size, page_size)?),
        };
        let data_list = match pointing {
            Pointing::Prp => prp::list_bytes(max_transfer, page_size),
            // Only zeroes are in many pieces.
            _ if zero_page.is_some() => sgl::list_bytes(max_transfer.div_ceil(page_size)),
            _ => 0,
        };
        // Powers of two, or whole pages: a list that is shorter than a page lies within one.
        let list_bytes = match data_list.max(RANGE_LIST_BYTES) {
            bytes if bytes < page_size => bytes.next_power_of_two(),
            bytes => bytes.next_multiple_of(page_size),
        };
        let zeroes = if namespace.zeroes_deallocate { DeallocateZeroes::Yes } else { DeallocateZeroes::No };
        Ok(Self {
            nsid: namespace.nsid,
            lba_shift: namespace.lba_shift,
            page_size,
            zeroes,
            pointing,
            lists: aligned::allocate(transport, usize::from(slots) * list_bytes, page_size)?,
            list_bytes,
            zero_page,
        })
    }

    /// Memory that the device may read while commands are in flight.
    pub(super) fn memory(&self) -> Vec<Arc<dyn DmaRegion>> {
        std::iter::once(&self.lists).chain(&self.zero_page).map(Arc::clone).collect()
    }

    /// Bytes of data, from the beginning of a page on, that a command describes without a list.
    pub(super) fn list_free_bytes(&self) -> usize {
        match self.pointing {
            // Buffers begin at pages of 4 KiB: where they lie in larger ones is not looked at.
            Pointing::Prp | Pointing::SglForLists(_) if self.page_size > PAGE_SIZE => 0,
            Pointing::Prp | Pointing::SglForLists(_) => 2 * self.page_size,
            // Descriptors are built with their checks.
            Pointing::Sgl(_) => 0,
        }
    }

    /// A read or write of a whole buffer of at most [`Self::list_free_bytes`].
    #[inline(always)]
    pub(super) fn build_simple(
        &self,
        kind: Kind,
        lba: u64,
        blocks: u64,
        buffer: &DmaBuffer,
    ) -> SubmissionEntry {
        let blocks_z = blocks.wrapping_sub(1) as u16;
        let mut entry = match kind {
            Kind::Read => SubmissionEntry::read(self.nsid, lba, blocks_z),
            Kind::WriteDurable => SubmissionEntry::write(self.nsid, lba, blocks_z, ForceUnitAccess::Yes),
            _ => SubmissionEntry::write(self.nsid, lba, blocks_z, ForceUnitAccess::No),
        };
        let iova = buffer.iova();
        entry.prp1.set(iova);
        if buffer.len() > PAGE_SIZE {
            let second = if is_planted(Bug::SecondPageIsFirst) { iova } else { iova + PAGE_SIZE as u64 };
            entry.prp2.set(second);
        }
        entry
    }

    /// The command for the next `blocks` blocks of `op`, using the list of the free slot `slot`.
    pub(super) fn build(&self, op: &Op, blocks: u64, slot: u16) -> SubmissionEntry {
        let lba = op.rest.next_lba;
        // Counts are zero-based in 16 bits; the cutter keeps them in range.
        let blocks_z = blocks.wrapping_sub(1) as u16;
        match op.kind {
            Kind::Read => self.with_data(SubmissionEntry::read(self.nsid, lba, blocks_z), op, blocks, slot),
            Kind::Write | Kind::WriteDurable => {
                let fua =
                    if op.kind == Kind::WriteDurable { ForceUnitAccess::Yes } else { ForceUnitAccess::No };
                self.with_data(SubmissionEntry::write(self.nsid, lba, blocks_z, fua), op, blocks, slot)
            }
            Kind::WriteZeroPage => {
                let entry = SubmissionEntry::write(self.nsid, lba, blocks_z, ForceUnitAccess::No);
                let page = self.zero_page.as_ref().expect("allocated where Write Zeroes is missing");
                self.with_zeroes(entry, page.iova(), (blocks << self.lba_shift) as usize, slot)
            }
            Kind::WriteZeroes => SubmissionEntry::write_zeroes(self.nsid, lba, blocks_z, self.zeroes),
            Kind::Deallocate => self.deallocate(lba, blocks, slot),
            Kind::Compare => {
                self.with_data(SubmissionEntry::compare(self.nsid, lba, blocks_z), op, blocks, slot)
            }
            Kind::Verify => SubmissionEntry::verify(self.nsid, lba, blocks_z),
            Kind::CompareAndWrite | Kind::Copy => unreachable!("built by `fused` and `copy`"),
            Kind::Flush | Kind::Nothing => SubmissionEntry::flush(self.nsid),
        }
    }

    /// One command of a fused pair of `blocks` blocks (NVMe 1.4 §6.2).
    pub(super) fn fused(&self, op: &Op, blocks: u64, half: Half, slot: u16) -> SubmissionEntry {
        let (lba, blocks_z) = (op.rest.next_lba, blocks.wrapping_sub(1) as u16);
        let buffer = op.buffer.as_ref().expect("a fused pair has a buffer while it is in use");
        let bytes = (blocks << self.lba_shift) as usize;
        let (entry, offset) = match half {
            Half::Compare => (SubmissionEntry::compare(self.nsid, lba, blocks_z).fused(Fuse::FIRST), 0),
            Half::Write => {
                let write = SubmissionEntry::write(self.nsid, lba, blocks_z, ForceUnitAccess::No);
                (write.fused(Fuse::SECOND), bytes as u64)
            }
        };
        self.with_buffer(entry, buffer.iova() + offset, bytes, slot)
    }

    /// The Copy that goes on after `done` blocks of `sources`, and its blocks (NVM Command Set 1.0 §3.2.2).
    pub(super) fn copy(
        &self,
        sources: &Sources,
        done: u64,
        limits: CopyLimits,
        destination: u64,
        slot: u16,
    ) -> (SubmissionEntry, u64) {
        let at = usize::from(slot) * self.list_bytes;
        let slice = self.lists.slice();
        let (ranges, blocks) = sources.next(done, limits, |index, lba, blocks| {
            let mut range = CopyRange::default();
            range.slba.set(lba);
            // At most MSSRL, 16 bits.
            range.blocks_z.set((blocks - 1) as u16);
            slice
                .write_slice(range.as_bytes(), at + index * size_of::<CopyRange>())
                .expect("a slot's list holds a page of ranges");
        });
        // At most 128.
        let ranges_z = ranges.saturating_sub(1) as u8;
        let entry = SubmissionEntry::copy(self.nsid, destination, ranges_z, ForceUnitAccess::No);
        (self.with_list(entry, ranges * size_of::<CopyRange>(), slot), blocks)
    }

    fn with_data(&self, entry: SubmissionEntry, op: &Op, blocks: u64, slot: u16) -> SubmissionEntry {
        let buffer = op.buffer.as_ref().expect("reads and writes have a buffer while they are in use");
        let bytes = (blocks << self.lba_shift) as usize;
        self.with_buffer(entry, buffer.iova() + op.rest.next_offset, bytes, slot)
    }

    /// Points `entry` to contiguous data.
    #[inline]
    fn with_buffer(&self, entry: SubmissionEntry, iova: u64, bytes: usize, slot: u16) -> SubmissionEntry {
        match self.pointing {
            Pointing::SglForLists(_) if prp::fits_command(iova, bytes, self.page_size) => {
                self.with_prps(entry, DataPages::Contiguous { iova }, bytes, slot)
            }
            Pointing::SglForLists(alignment) | Pointing::Sgl(alignment) => {
                let piece = Piece { iova, bytes: bytes as u32 };
                self.with_sgl(entry, 1, std::iter::once(piece), alignment, slot)
            }
            Pointing::Prp => self.with_prps(entry, DataPages::Contiguous { iova }, bytes, slot),
        }
    }

    /// Points `entry` to `bytes` of zeroes, one page over and over.
    fn with_zeroes(
        &self,
        entry: SubmissionEntry,
        page_iova: u64,
        bytes: usize,
        slot: u16,
    ) -> SubmissionEntry {
        let page_size = self.page_size;
        match self.pointing {
            Pointing::SglForLists(_) if bytes <= 2 * page_size => {
                self.with_prps(entry, DataPages::Repeated { page_iova }, bytes, slot)
            }
            Pointing::SglForLists(alignment) | Pointing::Sgl(alignment) => {
                let piece = |n: usize| Piece {
                    iova: page_iova,
                    bytes: (bytes - n * page_size).min(page_size) as u32,
                };
                let count = bytes.div_ceil(page_size);
                self.with_sgl(entry, count, (0..count).map(piece), alignment, slot)
            }
            Pointing::Prp => self.with_prps(entry, DataPages::Repeated { page_iova }, bytes, slot),
        }
    }

    fn with_sgl(
        &self,
        mut entry: SubmissionEntry,
        count: usize,
        pieces: impl Iterator<Item = Piece>,
        alignment: SglAlignment,
        slot: u16,
    ) -> SubmissionEntry {
        let first = usize::from(slot) * self.list_bytes;
        let list = SegmentMemory { iova: self.lists.iova() + first as u64, bytes: self.list_bytes };
        let descriptor = sgl::build(count, pieces, alignment, list, |index, descriptor: SglDescriptor| {
            let at = first + index * SGL_DESCRIPTOR_BYTES;
            // Plain stores: the fence before the doorbell publishes them.
            self.lists
                .slice()
                .write_slice(descriptor.as_bytes(), at)
                .expect("a slot's list lies within the lists");
        })
        .expect("buffers and blocks are dword aligned and lists are sized for the largest command");
        entry.set_sgl(descriptor);
        entry
    }

    fn with_prps(
        &self,
        mut entry: SubmissionEntry,
        data: DataPages,
        bytes: usize,
        slot: u16,
    ) -> SubmissionEntry {
        let first = usize::from(slot) * self.list_bytes;
        let list = ListMemory { iova: self.lists.iova() + first as u64, bytes: self.list_bytes };
        let prps = prp::build(data, bytes, self.page_size, list, |index, entry| {
            self.lists
                .slice()
                // Relaxed: the fence before the doorbell publishes it.
                .store(entry.to_le(), first + index * 8, Ordering::Relaxed)
                .expect("a slot's list lies within the lists");
        })
        .expect("buffers are page aligned and lists are sized for the largest command");
        entry.prp1.set(prps.prp1);
        entry.prp2.set(prps.prp2);
        entry
    }

    fn deallocate(&self, lba: u64, blocks: u64, slot: u16) -> SubmissionEntry {
        let mut range = DsmRange::default();
        range.slba.set(if is_planted(Bug::DeallocateOffByOne) { lba + 1 } else { lba });
        range.blocks.set(blocks as u32);
        self.with_ranges(SubmissionEntry::deallocate(self.nsid, 0), range.as_bytes(), slot)
    }

    /// Makes `ranges`, of at most a page, the data of `entry`.
    fn with_ranges(&self, entry: SubmissionEntry, ranges: &[u8], slot: u16) -> SubmissionEntry {
        let at = usize::from(slot) * self.list_bytes;
        self.lists.slice().write_slice(ranges, at).expect("a slot's list holds a page of ranges");
        self.with_list(entry, ranges.len(), slot)
    }

    /// Makes `bytes` bytes of the slot's list, at most a page, the data of `entry`.
    fn with_list(&self, mut entry: SubmissionEntry, bytes: usize, slot: u16) -> SubmissionEntry {
        let iova = self.lists.iova() + (usize::from(slot) * self.list_bytes) as u64;
        match self.pointing {
            Pointing::Sgl(_) => entry.set_sgl(SglDescriptor::data_block(iova, bytes as u32)),
            Pointing::Prp | Pointing::SglForLists(_) => entry.prp1.set(iova),
        }
        entry
    }
}

/// The opcode that a kind's commands carry.
pub(super) fn opcode(kind: Kind) -> NvmOpcode {
    match kind {
        Kind::Read => NvmOpcode::READ,
        Kind::Write | Kind::WriteDurable | Kind::WriteZeroPage => NvmOpcode::WRITE,
        Kind::WriteZeroes => NvmOpcode::WRITE_ZEROES,
        Kind::Deallocate => NvmOpcode::DATASET_MANAGEMENT,
        Kind::Compare | Kind::CompareAndWrite => NvmOpcode::COMPARE,
        Kind::Verify => NvmOpcode::VERIFY,
        Kind::Copy => NvmOpcode::COPY,
        Kind::Flush | Kind::Nothing => NvmOpcode::FLUSH,
    }
}
