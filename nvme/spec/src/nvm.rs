//! Commands of the NVM command set beyond read, write, flush, zeroes and deallocate: compare, fused pairs, verify and
//! copy. Copy is of 2.0 (NVM Command Set Specification 1.0 §3.2.2), the others of 1.4.

use bitfield_struct::bitfield;
use core::mem::{offset_of, size_of};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::command::{ForceUnitAccess, ReadWriteDw12, SubmissionEntry};
use crate::ids::NamespaceId;
use crate::opcode::NvmOpcode;
use crate::open_enum::open_enum;

open_enum! {
    /// Fused operation, FUSE (§4.2, dword 0; §6.2).
    pub struct Fuse(u8) {
        NORMAL = 0, "normal operation";
        FIRST = 1, "first command of a fused operation";
        SECOND = 2, "second command of a fused operation";
    }
}

open_enum! {
    /// Descriptor format of a Copy command's source ranges (NVM Command Set 1.0 §3.2.2).
    pub struct CopyFormat(u8) {
        BLOCKS = 0, "source ranges with 32-bit reference tags";
        BLOCKS_EXTENDED = 1, "source ranges with extended reference tags";
    }
}

/// Dword 12 of Copy (NVM Command Set 1.0 §3.2.2).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct CopyDw12 {
    /// Source ranges, less one.
    pub ranges_z: u8,
    /// Format of the ranges, see [`CopyFormat`].
    #[bits(4)]
    pub format: u8,
    /// Protection information of the reads.
    #[bits(4)]
    pub prinfor: u8,
    #[bits(4)]
    __: u8,
    /// Directive type.
    #[bits(4)]
    pub dtype: u8,
    #[bits(2)]
    __: u8,
    /// Protection information of the write.
    #[bits(4)]
    pub prinfow: u8,
    /// Force unit access of the write.
    pub fua: bool,
    /// Limited retry.
    pub lr: bool,
}

/// A source range of Copy, format 0, 32 bytes (NVM Command Set 1.0 §3.2.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CopyRange {
    /// Reserved.
    pub reserved_0: [u8; 8],
    /// First logical block.
    pub slba: U64,
    /// Logical blocks, less one.
    pub blocks_z: U16,
    /// Reserved.
    pub reserved_18: [u8; 6],
    /// Expected initial logical block reference tag.
    pub eilbrt: U32,
    /// Expected logical block application tag.
    pub elbat: U16,
    /// Mask of the expected logical block application tag.
    pub elbatm: U16,
}

/// Ranges that the range count of one Copy command can name.
pub const COPY_MAX_RANGES: usize = 256;

const _: () = {
    assert!(size_of::<CopyRange>() == 32);
    assert!(offset_of!(CopyRange, slba) == 8);
    assert!(offset_of!(CopyRange, blocks_z) == 16);
    assert!(offset_of!(CopyRange, eilbrt) == 24);
};

/// What Copy asks for, without its ranges, which are the command's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copy {
    /// First logical block written to.
    pub sdlba: u64,
    /// Range count and flags.
    pub dw12: CopyDw12,
}

/// Builders.
impl SubmissionEntry {
    fn with_range(opcode: NvmOpcode, nsid: NamespaceId, slba: u64, blocks_z: u16) -> Self {
        let mut entry = Self { opcode: opcode.0, nsid: U32::new(nsid.get()), ..Self::default() };
        entry.cdw10.set(slba as u32);
        entry.cdw11.set((slba >> 32) as u32);
        entry.cdw12.set(ReadWriteDw12::new().with_blocks_z(blocks_z).into());
        entry
    }

    /// Compare (§6.6).
    pub fn compare(nsid: NamespaceId, slba: u64, blocks_z: u16) -> Self {
        Self::with_range(NvmOpcode::COMPARE, nsid, slba, blocks_z)
    }

    /// Verify (§6.14).
    pub fn verify(nsid: NamespaceId, slba: u64, blocks_z: u16) -> Self {
        Self::with_range(NvmOpcode::VERIFY, nsid, slba, blocks_z)
    }

    /// Copy of `ranges_z + 1` ranges of format 0 to `sdlba` (NVM Command Set 1.0 §3.2.2).
    pub fn copy(nsid: NamespaceId, sdlba: u64, ranges_z: u8, fua: ForceUnitAccess) -> Self {
        let dw12 = CopyDw12::new().with_ranges_z(ranges_z).with_fua(fua == ForceUnitAccess::Yes);
        let mut entry = Self::with_range(NvmOpcode::COPY, nsid, sdlba, 0);
        entry.cdw12.set(dw12.into());
        entry
    }

    /// The same command as a part of a fused pair (§6.2).
    pub fn fused(mut self, fuse: Fuse) -> Self {
        self.flags.set_fuse(fuse.0 & 3);
        self
    }
}

/// Views.
impl SubmissionEntry {
    /// Whether the command is a part of a fused pair.
    pub fn fuse(&self) -> Fuse {
        Fuse(self.flags.fuse())
    }

    /// What Copy asks for.
    pub fn copy_view(&self) -> Copy {
        Copy {
            sdlba: u64::from(self.cdw10.get()) | u64::from(self.cdw11.get()) << 32,
            dw12: self.cdw12.get().into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fused_pair_is_marked_in_the_low_bits_of_byte_1() {
        let nsid = NamespaceId::new(3);
        let first = SubmissionEntry::compare(nsid, 0x1_0000_0002, 7).fused(Fuse::FIRST);
        assert_eq!(first.as_bytes()[..2], [0x05, 0x01]);
        assert_eq!((first.read_write().slba, first.read_write().dw12.blocks_z()), (0x1_0000_0002, 7));
        let second = SubmissionEntry::write(nsid, 0, 7, ForceUnitAccess::No).fused(Fuse::SECOND);
        assert_eq!(second.as_bytes()[..2], [0x01, 0x02]);
        assert_eq!(second.fuse(), Fuse::SECOND);
    }

    #[test]
    fn dword_12_of_copy_matches_the_figure() {
        let entry = SubmissionEntry::copy(NamespaceId::new(1), 0x5_0000_0000, 127, ForceUnitAccess::Yes);
        assert_eq!(entry.cdw12.get(), 127 | 1 << 30);
        assert_eq!((entry.cdw10.get(), entry.cdw11.get()), (0, 5));
        let view = entry.copy_view();
        assert_eq!((view.sdlba, view.dw12.ranges_z(), view.dw12.format()), (0x5_0000_0000, 127, 0));
        assert_eq!(u32::from(CopyDw12::new().with_prinfow(0xf)), 0xf << 26);
        assert_eq!(u32::from(CopyDw12::new().with_dtype(0xf)), 0xf << 20);
    }
}
