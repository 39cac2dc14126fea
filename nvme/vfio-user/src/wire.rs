//! Layout of messages. Numbers are little-endian; structures mirror those of `linux/vfio.h` where the protocol says so.
//!
//! Excludes: the version message's JSON (`version`), descriptors (`channel`).

use bitflags::bitflags;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Protocol version that is spoken.
pub const VERSION_MAJOR: u16 = 0;
/// Minor version that is spoken.
pub const VERSION_MINOR: u16 = 1;
/// Bytes of a header.
pub const HEADER_BYTES: usize = 16;
/// Most bytes of data that one region access carries.
pub const MAX_DATA: usize = 64 << 10;
/// Longest message that is sent or taken, header included.
pub const MAX_MESSAGE: usize = HEADER_BYTES + 32 + MAX_DATA;
/// Mappable areas of a region that are taken note of.
pub const MAX_SPARSE_AREAS: usize = 8;

/// What a message asks for, or answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Command(pub u16);

impl Command {
    /// Agree on a version; the first message.
    pub const VERSION: Self = Self(1);
    /// Give the server memory.
    pub const DMA_MAP: Self = Self(2);
    /// Take memory back.
    pub const DMA_UNMAP: Self = Self(3);
    /// Numbers of regions and interrupt kinds.
    pub const DEVICE_GET_INFO: Self = Self(4);
    /// Size, rights and mappable areas of a region.
    pub const DEVICE_GET_REGION_INFO: Self = Self(5);
    /// Descriptors that stand for stores into a region.
    pub const DEVICE_GET_REGION_IO_FDS: Self = Self(6);
    /// Number of vectors of an interrupt kind.
    pub const DEVICE_GET_IRQ_INFO: Self = Self(7);
    /// Connect, mask or trigger vectors.
    pub const DEVICE_SET_IRQS: Self = Self(8);
    /// Load from a region.
    pub const REGION_READ: Self = Self(9);
    /// Store to a region.
    pub const REGION_WRITE: Self = Self(10);
    /// The server reads memory that it cannot map.
    pub const DMA_READ: Self = Self(11);
    /// The server writes memory that it cannot map.
    pub const DMA_WRITE: Self = Self(12);
    /// Reset the device.
    pub const DEVICE_RESET: Self = Self(13);

    /// The specification's name, as far as it is known here.
    pub fn name(self) -> &'static str {
        match self {
            Self::VERSION => "VERSION",
            Self::DMA_MAP => "DMA_MAP",
            Self::DMA_UNMAP => "DMA_UNMAP",
            Self::DEVICE_GET_INFO => "DEVICE_GET_INFO",
            Self::DEVICE_GET_REGION_INFO => "DEVICE_GET_REGION_INFO",
            Self::DEVICE_GET_REGION_IO_FDS => "DEVICE_GET_REGION_IO_FDS",
            Self::DEVICE_GET_IRQ_INFO => "DEVICE_GET_IRQ_INFO",
            Self::DEVICE_SET_IRQS => "DEVICE_SET_IRQS",
            Self::REGION_READ => "REGION_READ",
            Self::REGION_WRITE => "REGION_WRITE",
            Self::DMA_READ => "DMA_READ",
            Self::DMA_WRITE => "DMA_WRITE",
            Self::DEVICE_RESET => "DEVICE_RESET",
            _ => "unknown command",
        }
    }
}

impl std::fmt::Display for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.name(), self.0)
    }
}

/// The `flags` field of a header.
pub mod type_and_flags {
    /// Bits that hold the type.
    pub const TYPE_MASK: u32 = 0xf;
    /// A command.
    pub const COMMAND: u32 = 0;
    /// An answer.
    pub const REPLY: u32 = 1;
    /// No answer is wanted.
    pub const NO_REPLY: u32 = 1 << 4;
    /// The command failed; the error field may say why.
    pub const ERROR: u32 = 1 << 5;
}

/// Numbers of a PCI device's regions.
pub mod region {
    /// BAR0; the others follow.
    pub const BAR0: u32 = 0;
    /// BAR4.
    pub const BAR4: u32 = 4;
    /// Expansion ROM.
    pub const ROM: u32 = 6;
    /// Configuration space.
    pub const CONFIG: u32 = 7;
    /// Legacy VGA.
    pub const VGA: u32 = 8;
    /// Regions of a PCI device.
    pub const COUNT: u32 = 9;
}

/// Kinds of interrupts of a PCI device.
pub mod irq_index {
    /// Legacy pin.
    pub const INTX: u32 = 0;
    /// MSI.
    pub const MSI: u32 = 1;
    /// MSI-X.
    pub const MSIX: u32 = 2;
    /// Device errors.
    pub const ERR: u32 = 3;
    /// The owner wants the device back.
    pub const REQ: u32 = 4;
    /// How many there are.
    pub const COUNT: u32 = 5;
}

/// Begins every message.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawHeader {
    /// Chosen by the sender of the command, repeated in the reply.
    pub id: U16,
    /// [`Command`].
    pub command: U16,
    /// Bytes of the whole message.
    pub size: U32,
    /// [`type_and_flags`].
    pub flags: U32,
    /// errno of a failed command.
    pub error: U32,
}

bitflags! {
    /// What a device is and can.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DeviceFlags: u32 {
        /// It can be reset.
        const RESET = 1 << 0;
        /// It is a PCI device.
        const PCI = 1 << 1;
    }

    /// What can be done with a region.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct RegionFlags: u32 {
        /// Loads.
        const READ = 1 << 0;
        /// Stores.
        const WRITE = 1 << 1;
        /// Mapping, of all of it or of the areas in the capability.
        const MMAP = 1 << 2;
        /// Capabilities follow.
        const CAPS = 1 << 3;
    }

    /// What the server may do with memory, and how.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DmaFlags: u32 {
        /// It may read.
        const READ = 1 << 0;
        /// It may write.
        const WRITE = 1 << 1;
        /// By mapping the descriptor; also the meaning if neither is said.
        const MMAP = 1 << 2;
        /// By reading and writing the descriptor.
        const FILE_IO = 1 << 3;
    }

    /// Variants of an unmapping.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct UnmapFlags: u32 {
        /// Report what was written; not supported here.
        const DIRTY_BITMAP = 1 << 0;
        /// Everything; address and size are 0.
        const ALL = 1 << 1;
    }

    /// Properties of a kind of interrupts.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct IrqInfoFlags: u32 {
        /// An eventfd can be connected.
        const EVENTFD = 1 << 0;
        /// Vectors can be masked.
        const MASKABLE = 1 << 1;
        /// The number of connected vectors cannot grow.
        const NORESIZE = 1 << 3;
    }

    /// What to do to vectors: one kind of data and one action.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct IrqSetFlags: u32 {
        /// No data.
        const DATA_NONE = 1 << 0;
        /// A byte for each vector.
        const DATA_BOOL = 1 << 1;
        /// A descriptor for each vector.
        const DATA_EVENTFD = 1 << 2;
        /// Hold interrupts back.
        const ACTION_MASK = 1 << 3;
        /// Let them through.
        const ACTION_UNMASK = 1 << 4;
        /// Connect, disconnect or trigger.
        const ACTION_TRIGGER = 1 << 5;
    }
}

macro_rules! wire {
    ($(#[$doc:meta])* $name:ident, $bytes:literal { $($(#[$field_doc:meta])* $field:ident: $kind:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
        #[repr(C)]
        pub struct $name { $($(#[$field_doc])* pub $field: $kind,)* }

        const _: () = assert!(size_of::<$name>() == $bytes);
    };
}

wire!(
    /// Body of DMA_MAP. A descriptor comes with it.
    DmaMap, 32 {
        /// Bytes of this structure.
        argsz: U32,
        /// [`DmaFlags`].
        flags: U32,
        /// Where in the descriptor the memory begins.
        offset: U64,
        /// IOVA.
        address: U64,
        /// Bytes.
        size: U64,
    }
);
wire!(
    /// Body of DMA_UNMAP.
    DmaUnmap, 24 {
        /// Bytes of this structure, and of the bitmap.
        argsz: U32,
        /// [`UnmapFlags`].
        flags: U32,
        /// IOVA, as it was mapped.
        address: U64,
        /// Bytes, as they were mapped.
        size: U64,
    }
);
wire!(
    /// Body of DEVICE_GET_INFO, both ways.
    DeviceInfo, 16 {
        /// Bytes of this structure.
        argsz: U32,
        /// [`DeviceFlags`].
        flags: U32,
        /// Number of regions.
        regions: U32,
        /// Number of interrupt kinds.
        irqs: U32,
    }
);
wire!(
    /// Body of DEVICE_GET_REGION_INFO, both ways; capabilities may follow.
    RegionInfo, 32 {
        /// Bytes that the reply has, or may have.
        argsz: U32,
        /// [`RegionFlags`].
        flags: U32,
        /// Which region.
        index: U32,
        /// Where in the body the first capability begins; 0 if there is none.
        cap_offset: U32,
        /// Bytes of the region.
        size: U64,
        /// Where in its descriptors the region begins.
        offset: U64,
    }
);
wire!(
    /// Capability with the areas of a region that can be mapped; the areas follow.
    SparseHeader, 16 {
        /// 1.
        id: U16,
        /// 1.
        version: U16,
        /// Where in the body the next capability begins; 0 if there is none.
        next: U32,
        /// Number of areas.
        areas: U32,
        /// Unused.
        reserved: U32,
    }
);
wire!(
    /// An area of a region.
    SparseArea, 16 {
        /// Where in the region it begins.
        offset: U64,
        /// Bytes.
        size: U64,
    }
);
wire!(
    /// Body of DEVICE_GET_IRQ_INFO, both ways.
    IrqInfo, 16 {
        /// Bytes of this structure.
        argsz: U32,
        /// [`IrqInfoFlags`].
        flags: U32,
        /// Which kind.
        index: U32,
        /// Number of vectors.
        count: U32,
    }
);
wire!(
    /// Body of DEVICE_SET_IRQS; data or descriptors come with it.
    IrqSet, 20 {
        /// Bytes of this structure and its data.
        argsz: U32,
        /// [`IrqSetFlags`].
        flags: U32,
        /// Which kind.
        index: U32,
        /// First vector.
        start: U32,
        /// Number of vectors.
        count: U32,
    }
);
wire!(
    /// Body of REGION_READ and REGION_WRITE, both ways; data may follow.
    RegionAccess, 16 {
        /// Where in the region.
        offset: U64,
        /// Which region.
        region: U32,
        /// Bytes.
        count: U32,
    }
);

/// Identifier of the capability with mappable areas.
const CAP_SPARSE_MMAP: u16 = 1;
/// Capabilities that are looked through.
const MAX_CAPABILITIES: usize = 16;

/// The mappable areas in the body of a DEVICE_GET_REGION_INFO reply: `None` if it lists none, or lists them in a way
/// that cannot be. At most [`MAX_SPARSE_AREAS`].
pub fn parse_sparse_areas(body: &[u8]) -> Option<Vec<SparseArea>> {
    let (info, _) = RegionInfo::read_from_prefix(body).ok()?;
    if !RegionFlags::from_bits_retain(info.flags.get()).contains(RegionFlags::CAPS) {
        return None;
    }
    let mut at = info.cap_offset.get() as usize;
    for _ in 0..MAX_CAPABILITIES {
        if at < size_of::<RegionInfo>() {
            return None;
        }
        // The areas' number is part of this capability only; for others it is read and not looked at.
        let (header, areas) = SparseHeader::read_from_prefix(body.get(at..)?).ok()?;
        if header.id.get() == CAP_SPARSE_MMAP {
            let count = header.areas.get() as usize;
            if count > MAX_SPARSE_AREAS {
                return None;
            }
            let bytes = areas.get(..count * size_of::<SparseArea>())?;
            return bytes
                .chunks_exact(size_of::<SparseArea>())
                .map(|b| SparseArea::read_from_bytes(b).ok())
                .collect();
        }
        at = header.next.get() as usize;
    }
    None
}

/// Body of a DEVICE_GET_REGION_INFO reply for a client that takes `room` bytes. Without room for the areas, it says only
/// how much room there should be.
pub fn region_info_body(info: RegionInfo, areas: &[SparseArea], room: usize) -> Vec<u8> {
    let mut info = info;
    let whole = match areas {
        [] => size_of::<RegionInfo>(),
        areas => size_of::<RegionInfo>() + size_of::<SparseHeader>() + size_of_val(areas),
    };
    info.argsz.set(whole as u32);
    if areas.is_empty() || whole > room {
        return info.as_bytes().to_vec();
    }
    info.flags.set(info.flags.get() | RegionFlags::CAPS.bits());
    info.cap_offset.set(size_of::<RegionInfo>() as u32);
    let header = SparseHeader {
        id: CAP_SPARSE_MMAP.into(),
        version: 1.into(),
        next: 0.into(),
        areas: (areas.len() as u32).into(),
        reserved: 0.into(),
    };
    let mut body = Vec::with_capacity(whole);
    body.extend_from_slice(info.as_bytes());
    body.extend_from_slice(header.as_bytes());
    body.extend_from_slice(areas.as_bytes());
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    const AREA: SparseArea = SparseArea { offset: U64::new(0x1000), size: U64::new(0x1000) };

    #[test]
    fn areas_survive_the_way() {
        let info = RegionInfo { size: 0x2000.into(), ..RegionInfo::default() };
        let body = region_info_body(info, &[AREA, AREA], 4096);
        let areas = parse_sparse_areas(&body).unwrap();
        assert_eq!(areas.len(), 2);
        assert_eq!((areas[1].offset.get(), areas[1].size.get()), (0x1000, 0x1000));
    }

    #[test]
    fn areas_that_do_not_fit_are_only_announced() {
        let body = region_info_body(RegionInfo::default(), &[AREA], 32);
        let (info, rest) = RegionInfo::read_from_prefix(&body).unwrap();
        assert_eq!((info.argsz.get(), info.flags.get(), rest.len()), (64, 0, 0));
        assert!(parse_sparse_areas(&body).is_none());
    }

    #[test]
    fn capabilities_that_cannot_be_are_none() {
        let good = region_info_body(RegionInfo::default(), &[AREA], 4096);
        let spoil = |at: usize, bytes: &[u8]| {
            let mut body = good.clone();
            body[at..at + bytes.len()].copy_from_slice(bytes);
            parse_sparse_areas(&body)
        };
        assert!(spoil(12, &[0xff, 0xff, 0xff, 0xff]).is_none(), "offset beyond the end");
        assert!(spoil(12, &[4, 0, 0, 0]).is_none(), "offset into the structure");
        assert!(spoil(40, &[0xff, 0xff, 0xff, 0x0f]).is_none(), "more areas than bytes");
        assert!(spoil(40, &[2, 0, 0, 0]).is_none(), "one area more than there is");
        // A chain that leads to itself: another capability whose successor it is.
        let mut chain = good.clone();
        chain[32] = 9;
        chain[36] = 32;
        assert!(parse_sparse_areas(&chain).is_none());
    }
}
