//! Submission queue entries of a queue pair's commands, with their PRPs.
//!
//! Owns: the memory behind data pointers that is not the caller's: a PRP list for every command slot (also the range list
//! of a deallocate), and a page of zeroes where the controller lacks Write Zeroes.
//!
//! Invariants: a slot's list is written only while the slot is free, so never under a command in flight.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use nvme_spec::command::{DeallocateZeroes, DsmRange, ForceUnitAccess};
use nvme_spec::identify::Oncs;
use nvme_spec::{NamespaceId, NvmOpcode, SubmissionEntry};
use reactor::dma::DmaRegion;
use vm_memory::Bytes;
use zerocopy::IntoBytes;

use crate::identity::{ControllerInfo, Namespace};
use crate::ops::{Kind, Op};
use crate::prp::{self, DataPages, ListMemory};
use crate::transport::{Transport, TransportError};

/// Builds commands for one namespace.
pub(super) struct CommandBuilder {
    nsid: NamespaceId,
    lba_shift: u8,
    page_size: usize,
    zeroes: DeallocateZeroes,
    lists: Arc<dyn DmaRegion>,
    list_pages: usize,
    zero_page: Option<Arc<dyn DmaRegion>>,
}

impl CommandBuilder {
    pub(super) fn new(
        transport: &dyn Transport,
        namespace: &Namespace,
        info: &ControllerInfo,
        slots: u16,
        max_transfer: usize,
    ) -> Result<Self, TransportError> {
        let page_size = info.page_size as usize;
        // One page at least: a deallocate's range list lives there too.
        let list_pages = prp::list_pages(max_transfer, page_size).max(1);
        let zero_page = match info.oncs.contains(Oncs::WRITE_ZEROES) {
            true => None,
            false => Some(transport.allocate(page_size)?),
        };
        let zeroes = if namespace.zeroes_deallocate { DeallocateZeroes::Yes } else { DeallocateZeroes::No };
        Ok(Self {
            nsid: namespace.nsid,
            lba_shift: namespace.lba_shift,
            page_size,
            zeroes,
            lists: transport.allocate(usize::from(slots) * list_pages * page_size)?,
            list_pages,
            zero_page,
        })
    }

    /// Memory that the device may read while commands are in flight.
    pub(super) fn memory(&self) -> Vec<Arc<dyn DmaRegion>> {
        std::iter::once(&self.lists).chain(&self.zero_page).map(Arc::clone).collect()
    }

    /// The command for the next `blocks` blocks of `op`, using the list of the free slot `slot`.
    pub(super) fn build(&self, op: &Op, blocks: u64, slot: u16) -> SubmissionEntry {
        let lba = op.next_lba;
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
                self.with_prps(entry, DataPages::Repeated { page_iova: page.iova() }, blocks, slot)
            }
            Kind::WriteZeroes => SubmissionEntry::write_zeroes(self.nsid, lba, blocks_z, self.zeroes),
            Kind::Deallocate => self.deallocate(lba, blocks, slot),
            Kind::Flush | Kind::Nothing => SubmissionEntry::flush(self.nsid),
        }
    }

    fn with_data(&self, entry: SubmissionEntry, op: &Op, blocks: u64, slot: u16) -> SubmissionEntry {
        let buffer = op.buffer.as_ref().expect("reads and writes have a buffer while they are in use");
        let iova = buffer.iova() + op.next_offset;
        self.with_prps(entry, DataPages::Contiguous { iova }, blocks, slot)
    }

    fn with_prps(
        &self,
        mut entry: SubmissionEntry,
        data: DataPages,
        blocks: u64,
        slot: u16,
    ) -> SubmissionEntry {
        let bytes = (blocks << self.lba_shift) as usize;
        let first = usize::from(slot) * self.list_pages * self.page_size;
        let list = ListMemory { iova: self.lists.iova() + first as u64, pages: self.list_pages };
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
        range.slba.set(lba);
        range.blocks.set(blocks as u32);
        let at = usize::from(slot) * self.list_pages * self.page_size;
        self.lists.slice().write_slice(range.as_bytes(), at).expect("a slot's list lies within the lists");
        let mut entry = SubmissionEntry::deallocate(self.nsid, 0);
        entry.prp1.set(self.lists.iova() + at as u64);
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
        Kind::Flush | Kind::Nothing => NvmOpcode::FLUSH,
    }
}
