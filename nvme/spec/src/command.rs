//! The submission queue entry (§4.2): common layout, builders for the host, views for the controller.
//!
//! A builder leaves the command identifier and the data pointer alone: both belong to the queue. A view splits the
//! command's own dwords into fields and checks nothing.

use bitfield_struct::bitfield;
use core::mem::{offset_of, size_of};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::feature::{FeatureId, FeatureSelect};
use crate::identify::Cns;
use crate::ids::{CommandId, NamespaceId, QueueId};
use crate::log::LogPageId;
use crate::opcode::{AdminOpcode, NvmOpcode};

/// A submission queue entry, 64 bytes (§4.2, figure "Command Format").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SubmissionEntry {
    /// Opcode; its meaning depends on the queue.
    pub opcode: u8,
    /// Fused operation and kind of data pointer.
    pub flags: CommandFlags,
    /// Command identifier.
    pub cid: U16,
    /// Namespace identifier.
    pub nsid: U32,
    /// Command dword 2.
    pub cdw2: U32,
    /// Command dword 3.
    pub cdw3: U32,
    /// Metadata pointer.
    pub mptr: U64,
    /// First PRP entry of the data pointer.
    pub prp1: U64,
    /// Second PRP entry of the data pointer, or address of the PRP list.
    pub prp2: U64,
    /// Command dword 10.
    pub cdw10: U32,
    /// Command dword 11.
    pub cdw11: U32,
    /// Command dword 12.
    pub cdw12: U32,
    /// Command dword 13.
    pub cdw13: U32,
    /// Command dword 14.
    pub cdw14: U32,
    /// Command dword 15.
    pub cdw15: U32,
}

const _: () = {
    assert!(size_of::<SubmissionEntry>() == crate::SQE_BYTES);
    assert!(offset_of!(SubmissionEntry, nsid) == 4);
    assert!(offset_of!(SubmissionEntry, mptr) == 16);
    assert!(offset_of!(SubmissionEntry, prp1) == 24);
    assert!(offset_of!(SubmissionEntry, cdw10) == 40);
    assert!(offset_of!(SubmissionEntry, cdw15) == 60);
};

/// Byte 1 of a submission queue entry (§4.2, dword 0).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CommandFlags {
    /// Fused operation: 0 none, 1 first, 2 second.
    #[bits(2)]
    pub fuse: u8,
    #[bits(4)]
    pub reserved: u8,
    /// PRP or SGL for data transfer: 0 PRP, 1 and 2 SGL.
    #[bits(2)]
    pub psdt: u8,
}

/// Dword 12 of read, write, compare, write zeroes and verify (§6.6, §6.9, §6.14, §6.15, §6.17).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct ReadWriteDw12 {
    /// Logical blocks, less one.
    pub blocks_z: u16,
    #[bits(4)]
    __: u8,
    /// Directive type (write).
    #[bits(4)]
    pub dtype: u8,
    __: bool,
    /// Deallocate (write zeroes).
    pub deac: bool,
    /// Protection information.
    #[bits(4)]
    pub prinfo: u8,
    /// Force unit access.
    pub fua: bool,
    /// Limited retry.
    pub lr: bool,
}

/// Dword 11 of Create I/O Completion Queue (§5.3).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct CreateCqDw11 {
    /// Physically contiguous.
    pub pc: bool,
    /// Interrupts enabled.
    pub ien: bool,
    #[bits(14)]
    __: u16,
    /// Interrupt vector.
    pub iv: u16,
}

/// Dword 11 of Create I/O Submission Queue (§5.4).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct CreateSqDw11 {
    /// Physically contiguous.
    pub pc: bool,
    /// Queue priority: 0 urgent to 3 low, used with weighted arbitration.
    #[bits(2)]
    pub qprio: u8,
    #[bits(13)]
    __: u16,
    /// Completion queue that the submission queue's commands complete to.
    pub cqid: u16,
}

/// Dword 10 of the queue creation commands: identifier and size (§5.3, §5.4).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct CreateQueueDw10 {
    /// Queue identifier.
    pub qid: u16,
    /// Entries, less one.
    pub qsize_z: u16,
}

/// Dword 10 of Identify (§5.15).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct IdentifyDw10 {
    /// Controller or namespace structure, see [`Cns`].
    pub cns: u8,
    __: u8,
    /// Controller identifier.
    pub cntid: u16,
}

/// Dword 10 of Abort (§5.1).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct AbortDw10 {
    /// Submission queue of the command to abort.
    pub sqid: u16,
    /// Command to abort.
    pub cid: u16,
}

/// Dword 10 of Get Features (§5.13).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct GetFeaturesDw10 {
    /// Feature identifier, see [`FeatureId`].
    pub fid: u8,
    /// Which value, see [`FeatureSelect`].
    #[bits(3)]
    pub sel: u8,
    #[bits(21)]
    __: u32,
}

/// Dword 10 of Set Features (§5.21).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct SetFeaturesDw10 {
    /// Feature identifier, see [`FeatureId`].
    pub fid: u8,
    #[bits(23)]
    __: u32,
    /// Save the value across resets.
    pub sv: bool,
}

/// Dword 10 of Get Log Page (§5.14).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct GetLogPageDw10 {
    /// Log page identifier, see [`LogPageId`].
    pub lid: u8,
    /// Log specific field.
    #[bits(7)]
    pub lsp: u8,
    /// Retain asynchronous event.
    pub rae: bool,
    /// Dwords to return less one, low half.
    pub numdl_z: u16,
}

/// Dword 11 of Dataset Management (§6.7).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct DsmDw11 {
    /// Integral dataset for read.
    pub idr: bool,
    /// Integral dataset for write.
    pub idw: bool,
    /// Deallocate.
    pub ad: bool,
    #[bits(29)]
    __: u32,
}

/// One range of a Dataset Management command (§6.7).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DsmRange {
    /// Context attributes.
    pub attributes: U32,
    /// Logical blocks; not zero-based.
    pub blocks: U32,
    /// First logical block.
    pub slba: U64,
}

/// Ranges that one Dataset Management command can carry (§6.7).
pub const DSM_MAX_RANGES: usize = 256;

const _: () = assert!(size_of::<DsmRange>() == 16);

/// Whether a write must be durable when it completes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForceUnitAccess {
    /// It may rest in the volatile cache.
    No,
    /// It must have reached the medium.
    Yes,
}

/// Whether write zeroes may deallocate the blocks (§6.17).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeallocateZeroes {
    /// The blocks stay allocated.
    No,
    /// The controller should deallocate them.
    Yes,
}

/// What the host asks of a new completion queue's interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueInterrupt {
    /// Polled.
    Disabled,
    /// Interrupts on this vector.
    Vector(u16),
}

/// The commands' first logical block and block count, with the flags of dword 12.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadWrite {
    /// First logical block.
    pub slba: u64,
    /// Count and flags.
    pub dw12: ReadWriteDw12,
}

/// What Get Log Page asks for (§5.14).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GetLogPage {
    /// Log page identifier.
    pub lid: LogPageId,
    /// Dwords to return, less one.
    pub dwords_z: u32,
    /// Offset in bytes.
    pub offset: u64,
    /// Keep the event that this page reports armed as it is.
    pub retain_event: bool,
}

/// Builders: what a host sends.
impl SubmissionEntry {
    #[inline]
    fn admin(opcode: AdminOpcode) -> Self {
        Self { opcode: opcode.0, ..Self::default() }
    }

    #[inline]
    fn nvm(opcode: NvmOpcode, nsid: NamespaceId) -> Self {
        Self { opcode: opcode.0, nsid: U32::new(nsid.get()), ..Self::default() }
    }

    #[inline]
    fn with_slba(mut self, slba: u64, dw12: u32) -> Self {
        self.cdw10.set(slba as u32);
        self.cdw11.set((slba >> 32) as u32);
        self.cdw12.set(dw12);
        self
    }

    /// Read (§6.9).
    #[inline]
    pub fn read(nsid: NamespaceId, slba: u64, blocks_z: u16) -> Self {
        Self::nvm(NvmOpcode::READ, nsid).with_slba(slba, u32::from(blocks_z))
    }

    /// Write (§6.15).
    #[inline]
    pub fn write(nsid: NamespaceId, slba: u64, blocks_z: u16, fua: ForceUnitAccess) -> Self {
        // As `ReadWriteDw12` has it, without its calls: this is on the I/O path.
        let dw12 = u32::from(blocks_z) | u32::from(fua == ForceUnitAccess::Yes) << 30;
        Self::nvm(NvmOpcode::WRITE, nsid).with_slba(slba, dw12)
    }

    /// Write Zeroes (§6.17).
    pub fn write_zeroes(nsid: NamespaceId, slba: u64, blocks_z: u16, deallocate: DeallocateZeroes) -> Self {
        let dw12 =
            ReadWriteDw12::new().with_blocks_z(blocks_z).with_deac(deallocate == DeallocateZeroes::Yes);
        Self::nvm(NvmOpcode::WRITE_ZEROES, nsid).with_slba(slba, dw12.into())
    }

    /// Flush (§6.8).
    pub fn flush(nsid: NamespaceId) -> Self {
        Self::nvm(NvmOpcode::FLUSH, nsid)
    }

    /// Dataset Management with the deallocate attribute; the ranges are the data (§6.7).
    pub fn deallocate(nsid: NamespaceId, ranges_z: u8) -> Self {
        let mut entry = Self::nvm(NvmOpcode::DATASET_MANAGEMENT, nsid);
        entry.cdw10.set(u32::from(ranges_z));
        entry.cdw11.set(DsmDw11::new().with_ad(true).into());
        entry
    }

    /// Identify of an I/O command set's own structures; command set 0 is NVM (2.0 §5.17).
    pub fn identify_command_set(cns: Cns, nsid: NamespaceId, command_set: u8) -> Self {
        let mut entry = Self::identify(cns, nsid);
        entry.cdw11.set(u32::from(command_set) << 24);
        entry
    }

    /// Identify (§5.15).
    pub fn identify(cns: Cns, nsid: NamespaceId) -> Self {
        let mut entry = Self::admin(AdminOpcode::IDENTIFY);
        entry.nsid.set(nsid.get());
        entry.cdw10.set(IdentifyDw10::new().with_cns(cns.0).into());
        entry
    }

    /// Create I/O Completion Queue, physically contiguous; its address goes to PRP1 (§5.3).
    pub fn create_io_cq(queue: QueueId, entries_z: u16, interrupt: QueueInterrupt) -> Self {
        let mut dw11 = CreateCqDw11::new().with_pc(true);
        if let QueueInterrupt::Vector(vector) = interrupt {
            dw11 = dw11.with_ien(true).with_iv(vector);
        }
        let mut entry = Self::admin(AdminOpcode::CREATE_IO_CQ);
        entry.cdw10.set(CreateQueueDw10::new().with_qid(queue.get()).with_qsize_z(entries_z).into());
        entry.cdw11.set(dw11.into());
        entry
    }

    /// Create I/O Submission Queue, physically contiguous; its address goes to PRP1 (§5.4).
    pub fn create_io_sq(queue: QueueId, entries_z: u16, completion_queue: QueueId) -> Self {
        let mut entry = Self::admin(AdminOpcode::CREATE_IO_SQ);
        entry.cdw10.set(CreateQueueDw10::new().with_qid(queue.get()).with_qsize_z(entries_z).into());
        entry.cdw11.set(CreateSqDw11::new().with_pc(true).with_cqid(completion_queue.get()).into());
        entry
    }

    /// Delete I/O Submission Queue (§5.6).
    pub fn delete_io_sq(queue: QueueId) -> Self {
        let mut entry = Self::admin(AdminOpcode::DELETE_IO_SQ);
        entry.cdw10.set(u32::from(queue.get()));
        entry
    }

    /// Delete I/O Completion Queue (§5.5).
    pub fn delete_io_cq(queue: QueueId) -> Self {
        let mut entry = Self::admin(AdminOpcode::DELETE_IO_CQ);
        entry.cdw10.set(u32::from(queue.get()));
        entry
    }

    /// Abort (§5.1).
    pub fn abort(queue: QueueId, command: CommandId) -> Self {
        let mut entry = Self::admin(AdminOpcode::ABORT);
        entry.cdw10.set(AbortDw10::new().with_sqid(queue.get()).with_cid(command.get()).into());
        entry
    }

    /// Set Features of the whole controller, not saved (§5.21).
    pub fn set_features(feature: FeatureId, value: u32) -> Self {
        let mut entry = Self::admin(AdminOpcode::SET_FEATURES);
        entry.cdw10.set(SetFeaturesDw10::new().with_fid(feature.0).into());
        entry.cdw11.set(value);
        entry
    }

    /// Get Features of the whole controller (§5.13).
    pub fn get_features(feature: FeatureId, select: FeatureSelect) -> Self {
        let mut entry = Self::admin(AdminOpcode::GET_FEATURES);
        entry.cdw10.set(GetFeaturesDw10::new().with_fid(feature.0).with_sel(select.0 & 7).into());
        entry
    }

    /// Get Log Page (§5.14).
    pub fn get_log_page(nsid: NamespaceId, page: GetLogPage) -> Self {
        let dw10 = GetLogPageDw10::new()
            .with_lid(page.lid.0)
            .with_rae(page.retain_event)
            .with_numdl_z(page.dwords_z as u16);
        let mut entry = Self::admin(AdminOpcode::GET_LOG_PAGE);
        entry.nsid.set(nsid.get());
        entry.cdw10.set(dw10.into());
        entry.cdw11.set(page.dwords_z >> 16);
        entry.cdw12.set(page.offset as u32);
        entry.cdw13.set((page.offset >> 32) as u32);
        entry
    }

    /// Asynchronous Event Request (§5.2).
    pub fn async_event_request() -> Self {
        Self::admin(AdminOpcode::ASYNC_EVENT_REQUEST)
    }
}

/// Views: what a controller receives.
impl SubmissionEntry {
    /// The command identifier.
    pub fn command_id(&self) -> CommandId {
        CommandId::new(self.cid.get())
    }

    /// The namespace identifier.
    pub fn namespace_id(&self) -> NamespaceId {
        NamespaceId::new(self.nsid.get())
    }

    /// First block, count and flags of read, write, compare, write zeroes and verify.
    pub fn read_write(&self) -> ReadWrite {
        ReadWrite {
            slba: u64::from(self.cdw10.get()) | u64::from(self.cdw11.get()) << 32,
            dw12: self.cdw12.get().into(),
        }
    }

    /// Identifier and size of a queue to create.
    pub fn create_queue(&self) -> CreateQueueDw10 {
        self.cdw10.get().into()
    }

    /// Attributes of a completion queue to create.
    pub fn create_cq(&self) -> CreateCqDw11 {
        self.cdw11.get().into()
    }

    /// Attributes of a submission queue to create.
    pub fn create_sq(&self) -> CreateSqDw11 {
        self.cdw11.get().into()
    }

    /// Queue to delete: the low half of dword 10.
    pub fn delete_queue(&self) -> QueueId {
        QueueId::new(self.cdw10.get() as u16)
    }

    /// What Identify asks for.
    pub fn identify_cns(&self) -> Cns {
        Cns(IdentifyDw10::from(self.cdw10.get()).cns())
    }

    /// Command set that Identify asks for (2.0 §5.17).
    pub fn identify_csi(&self) -> u8 {
        (self.cdw11.get() >> 24) as u8
    }

    /// What Abort asks for.
    pub fn abort_target(&self) -> (QueueId, CommandId) {
        let dw10 = AbortDw10::from(self.cdw10.get());
        (QueueId::new(dw10.sqid()), CommandId::new(dw10.cid()))
    }

    /// What Get Features asks for.
    pub fn get_features_view(&self) -> (FeatureId, FeatureSelect) {
        let dw10 = GetFeaturesDw10::from(self.cdw10.get());
        (FeatureId(dw10.fid()), FeatureSelect(dw10.sel()))
    }

    /// What Set Features changes; the value is dword 11.
    pub fn set_features_view(&self) -> SetFeaturesDw10 {
        self.cdw10.get().into()
    }

    /// What Get Log Page asks for.
    pub fn log_page(&self) -> GetLogPage {
        let dw10 = GetLogPageDw10::from(self.cdw10.get());
        GetLogPage {
            lid: LogPageId(dw10.lid()),
            dwords_z: u32::from(dw10.numdl_z()) | (self.cdw11.get() & 0xffff) << 16,
            offset: u64::from(self.cdw12.get()) | u64::from(self.cdw13.get()) << 32,
            retain_event: dw10.rae(),
        }
    }

    /// Ranges of a Dataset Management command, less one.
    pub fn dsm_ranges_z(&self) -> u8 {
        self.cdw10.get() as u8
    }

    /// Attributes of a Dataset Management command.
    pub fn dsm(&self) -> DsmDw11 {
        self.cdw11.get().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_is_what_is_viewed() {
        let nsid = NamespaceId::new(7);
        let write = SubmissionEntry::write(nsid, 0x1_2345_6789, 0xfffe, ForceUnitAccess::Yes);
        let view = write.read_write();
        assert_eq!((view.slba, view.dw12.blocks_z(), view.dw12.fua()), (0x1_2345_6789, 0xfffe, true));
        assert_eq!(write.namespace_id(), nsid);
        assert_eq!(write.as_bytes()[..8], [1, 0, 0, 0, 7, 0, 0, 0]);

        let cq = SubmissionEntry::create_io_cq(QueueId::new(3), 255, QueueInterrupt::Vector(9));
        assert_eq!((cq.create_queue().qid(), cq.create_queue().qsize_z()), (3, 255));
        assert_eq!((cq.create_cq().pc(), cq.create_cq().ien(), cq.create_cq().iv()), (true, true, 9));

        let sq = SubmissionEntry::create_io_sq(QueueId::new(3), 255, QueueId::new(5));
        assert_eq!((sq.create_sq().pc(), sq.create_sq().cqid()), (true, 5));

        let page = GetLogPage {
            lid: LogPageId::SMART,
            dwords_z: 0x12_3456,
            offset: 0x9_0000_0004,
            retain_event: true,
        };
        assert_eq!(SubmissionEntry::get_log_page(NamespaceId::BROADCAST, page).log_page(), page);

        let abort = SubmissionEntry::abort(QueueId::new(2), CommandId::new(0xabcd));
        assert_eq!(abort.abort_target(), (QueueId::new(2), CommandId::new(0xabcd)));
    }

    #[test]
    fn dword_12_matches_the_figure() {
        let zeroes = SubmissionEntry::write_zeroes(NamespaceId::new(1), 0, 4, DeallocateZeroes::Yes);
        assert_eq!(zeroes.cdw12.get(), 4 | 1 << 25);
        let write = SubmissionEntry::write(NamespaceId::new(1), 0, 0, ForceUnitAccess::Yes);
        assert_eq!(write.cdw12.get(), 1 << 30);
    }
}
