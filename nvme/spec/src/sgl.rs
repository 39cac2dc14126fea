//! Scatter gather list descriptors (§4.4) and how a command carries one.

use bitfield_struct::bitfield;
use core::mem::{offset_of, size_of};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::command::SubmissionEntry;
use crate::open_enum::open_enum;

open_enum! {
    /// Type of an SGL descriptor (§4.4.1).
    pub struct SglType(u8) {
        DATA_BLOCK = 0x0, "data block";
        BIT_BUCKET = 0x1, "bit bucket";
        SEGMENT = 0x2, "segment";
        LAST_SEGMENT = 0x3, "last segment";
        KEYED_DATA_BLOCK = 0x4, "keyed data block";
        TRANSPORT_DATA_BLOCK = 0x5, "transport data block";
        VENDOR = 0xf, "vendor specific";
    }
}

open_enum! {
    /// Sub type of an SGL descriptor: what its address field holds (§4.4.1).
    pub struct SglSubType(u8) {
        ADDRESS = 0x0, "address";
        OFFSET = 0x1, "offset";
        TRANSPORT = 0xa, "NVMe transport specific";
    }
}

/// Byte 15 of a descriptor (§4.4.1).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SglIdentifier {
    /// Sub type, see [`SglSubType`].
    #[bits(4)]
    pub sub_type: u8,
    /// Type, see [`SglType`].
    #[bits(4)]
    pub kind: u8,
}

/// An SGL descriptor, 16 bytes, as data block, bit bucket, segment and last segment lay it out (§4.4.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SglDescriptor {
    /// First byte of the data, or of the segment (a multiple of 8). Nothing for a bit bucket.
    pub address: U64,
    /// Bytes of the data; of a segment, 16 times its descriptors.
    pub length: U32,
    /// Reserved.
    pub reserved_12: [u8; 3],
    /// Type and sub type.
    pub identifier: SglIdentifier,
}

/// Bytes of a descriptor.
pub const SGL_DESCRIPTOR_BYTES: usize = 16;

const _: () = {
    assert!(size_of::<SglDescriptor>() == SGL_DESCRIPTOR_BYTES);
    assert!(offset_of!(SglDescriptor, length) == 8);
    assert!(offset_of!(SglDescriptor, identifier) == 15);
};

impl SglDescriptor {
    fn new(kind: SglType, address: u64, length: u32) -> Self {
        Self {
            address: U64::new(address),
            length: U32::new(length),
            reserved_12: [0; 3],
            identifier: SglIdentifier::new().with_kind(kind.0),
        }
    }

    /// `length` bytes of data at `address`.
    pub fn data_block(address: u64, length: u32) -> Self {
        Self::new(SglType::DATA_BLOCK, address, length)
    }

    /// `length` bytes of a read that are thrown away.
    pub fn bit_bucket(length: u32) -> Self {
        Self::new(SglType::BIT_BUCKET, 0, length)
    }

    /// A segment whose last descriptor leads to another one. `length` is in bytes.
    pub fn segment(address: u64, length: u32) -> Self {
        Self::new(SglType::SEGMENT, address, length)
    }

    /// The last segment. `length` is in bytes.
    pub fn last_segment(address: u64, length: u32) -> Self {
        Self::new(SglType::LAST_SEGMENT, address, length)
    }

    /// What the descriptor describes.
    pub fn kind(&self) -> SglType {
        SglType(self.identifier.kind())
    }

    /// What its address is.
    pub fn sub_type(&self) -> SglSubType {
        SglSubType(self.identifier.sub_type())
    }
}

open_enum! {
    /// PRP or SGL for data transfer, PSDT (§4.2, dword 0).
    pub struct Psdt(u8) {
        PRP = 0, "PRPs";
        SGL = 1, "SGL, metadata contiguous";
        SGL_METADATA_SGL = 2, "SGL, metadata by SGL";
    }
}

impl SubmissionEntry {
    /// Makes `descriptor` the command's data pointer, in place of PRPs (§4.2).
    pub fn set_sgl(&mut self, descriptor: SglDescriptor) {
        let bytes = u128::from_le_bytes(zerocopy::transmute!(descriptor));
        self.prp1.set(bytes as u64);
        self.prp2.set((bytes >> 64) as u64);
        self.flags.set_psdt(Psdt::SGL.0);
    }

    /// The data pointer read as an SGL descriptor: SGL entry 1. Means something only if PSDT says so.
    pub fn sgl(&self) -> SglDescriptor {
        let bytes = u128::from(self.prp1.get()) | u128::from(self.prp2.get()) << 64;
        zerocopy::transmute!(bytes.to_le_bytes())
    }

    /// How the command points to its data.
    pub fn psdt(&self) -> Psdt {
        Psdt(self.flags.psdt())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_in_a_command_lies_at_byte_24() {
        let mut entry = SubmissionEntry::default();
        entry.set_sgl(SglDescriptor::last_segment(0x1122_3344_5566_7788, 0x30));
        let bytes = entry.as_bytes();
        assert_eq!(bytes[24..32], [0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]);
        assert_eq!(bytes[32..40], [0x30, 0, 0, 0, 0, 0, 0, 0x30]);
        assert_eq!(bytes[1], 0x40);
        assert_eq!(entry.psdt(), Psdt::SGL);
        assert_eq!(entry.sgl(), SglDescriptor::last_segment(0x1122_3344_5566_7788, 0x30));
        assert_eq!(
            (entry.sgl().kind(), entry.sgl().sub_type()),
            (SglType::LAST_SEGMENT, SglSubType::ADDRESS)
        );
    }
}
