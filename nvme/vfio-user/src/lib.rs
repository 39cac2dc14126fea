//! The vfio-user protocol (version 0, as libvfio-user and SPDK speak it): the layout of its messages, and a [`Channel`] that
//! carries them. Client (`nvme`) and server (`nvme-emulator`) share this and nothing else.
//!
//! Invariants: nothing here trusts the peer. Sizes are bounded before anything is allocated, every wait has an end,
//! descriptors that arrive are owned and counted, and what cannot be parsed is an error.
//!
//! Excludes: what a message does; retries; everything about NVMe.

mod channel;
mod version;
mod wire;

pub use channel::{Channel, ChannelError, Header, MAX_DESCRIPTORS, Message, Reply};
pub use version::{Capabilities, VersionError, parse_version, version_body};
pub use wire::{
    Command, DeviceFlags, DeviceInfo, DmaFlags, DmaMap, DmaUnmap, HEADER_BYTES, IrqInfo, IrqInfoFlags,
    IrqSet, IrqSetFlags, MAX_DATA, MAX_MESSAGE, MAX_SPARSE_AREAS, RawHeader, RegionAccess, RegionFlags,
    RegionInfo, SparseArea, SparseHeader, UnmapFlags, VERSION_MAJOR, VERSION_MINOR, irq_index,
    parse_sparse_areas, region, region_info_body, type_and_flags,
};
