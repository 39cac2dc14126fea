//! The ioctls of VFIO (linux/vfio.h), with the kernel's error numbers kept.
//!
//! Invariants: what is passed to the kernel is as long as its `argsz` says.
//!
//! Excludes: what the answers mean.
#![allow(unsafe_code)] // ioctl: descriptors and buffers that live during the call.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use vfio_bindings::bindings::vfio as sys;

use super::info::Info;

/// Longest answer that is asked for again with room for all of it.
const LARGEST_INFO: usize = 64 << 10;

/// Calls by their number behind `VFIO_BASE`.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Call {
    ApiVersion = 0,
    CheckExtension = 1,
    SetIommu = 2,
    GroupStatus = 3,
    SetContainer = 4,
    DeviceDescriptor = 6,
    DeviceInfo = 7,
    RegionInfo = 8,
    IrqInfo = 9,
    SetIrqs = 10,
    Reset = 11,
    IommuInfo = 12,
    Map = 13,
    Unmap = 14,
}

impl Call {
    /// `_IO(VFIO_TYPE, VFIO_BASE + n)`: VFIO encodes neither direction nor size.
    const fn request(self) -> libc::Ioctl {
        ((sys::VFIO_TYPE as u32) << 8 | (sys::VFIO_BASE + self as u32)) as libc::Ioctl
    }
}

/// A call whose argument is a number or nothing.
fn plain(fd: BorrowedFd<'_>, call: Call, argument: libc::c_ulong) -> Result<i32, Errno> {
    // SAFETY: the descriptor is open; calls made through here take their argument by value.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), call.request(), argument) })
}

/// A call whose argument is memory.
///
/// # Safety
/// The kernel reads and writes at most the memory that `argument` points to.
unsafe fn with<T>(fd: BorrowedFd<'_>, call: Call, argument: *mut T) -> Result<i32, Errno> {
    // SAFETY: the descriptor is open; the caller vouches for the memory.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), call.request(), argument) })
}

const fn size_of_u32<T>() -> u32 {
    size_of::<T>() as u32
}

pub(super) fn api_version(container: BorrowedFd<'_>) -> Result<u32, Errno> {
    plain(container, Call::ApiVersion, 0).map(|version| version as u32)
}

/// Whether the container knows the second version of the type 1 IOMMU.
pub(super) fn has_type1(container: BorrowedFd<'_>) -> bool {
    plain(container, Call::CheckExtension, sys::VFIO_TYPE1v2_IOMMU.into()).is_ok_and(|known| known == 1)
}

/// Puts the type 1 IOMMU behind a container that holds a group.
pub(super) fn set_type1(container: BorrowedFd<'_>) -> Result<(), Errno> {
    plain(container, Call::SetIommu, sys::VFIO_TYPE1v2_IOMMU.into()).map(drop)
}

/// Whether every device of the group is free for VFIO.
pub(super) fn group_is_viable(group: BorrowedFd<'_>) -> Result<bool, Errno> {
    let mut status = sys::vfio_group_status { argsz: size_of_u32::<sys::vfio_group_status>(), flags: 0 };
    // SAFETY: `status` is as long as its `argsz`.
    unsafe { with(group, Call::GroupStatus, &raw mut status) }?;
    Ok(status.flags & sys::VFIO_GROUP_FLAGS_VIABLE != 0)
}

pub(super) fn set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut fd = container.as_raw_fd();
    // SAFETY: the call reads one `int`.
    unsafe { with(group, Call::SetContainer, &raw mut fd) }.map(drop)
}

/// The descriptor of a device, by the name that sysfs gives it.
pub(super) fn device(group: BorrowedFd<'_>, name: &std::ffi::CStr) -> Result<OwnedFd, Errno> {
    // SAFETY: the call reads a string, which is terminated.
    let fd = unsafe { with(group, Call::DeviceDescriptor, name.as_ptr().cast_mut()) }?;
    // SAFETY: the call returns a descriptor that is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// An answer that may have capabilities behind it: asked for once, and again if it is longer than its header. `index` is
/// stored where region and interrupt headers have it.
fn info(fd: BorrowedFd<'_>, call: Call, header: usize, index: Option<u32>) -> Result<Info, Errno> {
    let mut length = header;
    loop {
        // In units of 8 bytes, so that it is aligned.
        let mut words = vec![0u64; length.div_ceil(8)];
        words[0] = u64::from_ne_bytes(pair(length as u32, 0));
        if let Some(index) = index {
            words[1] = u64::from_ne_bytes(pair(index, 0));
        }
        // SAFETY: the buffer has at least the `length` bytes that its first field says.
        unsafe { with(fd, call, words.as_mut_ptr()) }?;
        let info = Info::new(words.iter().flat_map(|word| word.to_ne_bytes()).collect());
        let needed = info.u32_at(0) as usize;
        if needed <= length || needed > LARGEST_INFO {
            return Ok(info);
        }
        length = needed;
    }
}

fn pair(first: u32, second: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first.to_ne_bytes());
    bytes[4..].copy_from_slice(&second.to_ne_bytes());
    bytes
}

/// What a device is.
pub(super) struct DeviceInfo {
    pub(super) flags: u32,
    pub(super) regions: u32,
}

pub(super) fn device_info(device: BorrowedFd<'_>) -> Result<DeviceInfo, Errno> {
    let info = info(device, Call::DeviceInfo, size_of::<sys::vfio_device_info>(), None)?;
    Ok(DeviceInfo { flags: info.u32_at(4), regions: info.u32_at(8) })
}

/// A region of a device: a BAR, or its configuration space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct RegionInfo {
    /// Bytes; 0 if there is none.
    pub(super) bytes: u64,
    /// Where it begins in the device's descriptor.
    pub(super) offset: u64,
    /// Whether parts of it can be mapped.
    pub(super) mappable: bool,
    /// Which parts, as (offset, bytes); all of it if `None`.
    pub(super) areas: Option<Vec<(u64, u64)>>,
    /// Whether the MSI-X table in it can be mapped as well.
    pub(super) msix_mappable: bool,
}

pub(super) fn region_info(device: BorrowedFd<'_>, index: u32) -> Result<RegionInfo, Errno> {
    let info = info(device, Call::RegionInfo, size_of::<sys::vfio_region_info>(), Some(index))?;
    let (flags, first) = (info.u32_at(4), info.u32_at(12));
    let has_capabilities = flags & sys::VFIO_REGION_INFO_FLAG_CAPS != 0;
    Ok(RegionInfo {
        bytes: info.u64_at(16),
        offset: info.u64_at(24),
        mappable: flags & sys::VFIO_REGION_INFO_FLAG_MMAP != 0,
        areas: has_capabilities.then(|| info.sparse_areas(first)).flatten(),
        msix_mappable: has_capabilities && info.msix_mappable(first),
    })
}

/// Interrupts of one kind that a device has.
pub(super) fn irq_count(device: BorrowedFd<'_>, index: u32) -> Result<u32, Errno> {
    let info = info(device, Call::IrqInfo, size_of::<sys::vfio_irq_info>(), Some(index))?;
    Ok(if info.u32_at(4) & sys::VFIO_IRQ_INFO_EVENTFD == 0 { 0 } else { info.u32_at(12) })
}

/// Connects the interrupts `start..` of a kind to eventfds; `None` connects nothing. Returns how many there could be if
/// the system has too few (0: connected).
pub(super) fn connect_irqs(
    device: BorrowedFd<'_>,
    index: u32,
    start: u32,
    eventfds: &[Option<BorrowedFd<'_>>],
) -> Result<u32, Errno> {
    let header = size_of::<sys::vfio_irq_set>() / 4;
    let bytes = (header + eventfds.len()) * 4;
    let flags = sys::VFIO_IRQ_SET_DATA_EVENTFD | sys::VFIO_IRQ_SET_ACTION_TRIGGER;
    let mut words = vec![bytes as u32, flags, index, start, eventfds.len() as u32];
    words.extend(eventfds.iter().map(|fd| fd.map_or(-1, |fd| fd.as_raw_fd()) as u32));
    // SAFETY: the buffer has the bytes that its first field says.
    unsafe { with(device, Call::SetIrqs, words.as_mut_ptr()) }.map(|available| available as u32)
}

/// Disconnects all interrupts of a kind.
pub(super) fn disconnect_irqs(device: BorrowedFd<'_>, index: u32) -> Result<(), Errno> {
    let flags = sys::VFIO_IRQ_SET_DATA_NONE | sys::VFIO_IRQ_SET_ACTION_TRIGGER;
    let mut words = [size_of_u32::<sys::vfio_irq_set>(), flags, index, 0, 0];
    // SAFETY: the buffer has the bytes that its first field says.
    unsafe { with(device, Call::SetIrqs, words.as_mut_ptr()) }.map(drop)
}

/// Resets the function.
pub(super) fn reset(device: BorrowedFd<'_>) -> Result<(), Errno> {
    plain(device, Call::Reset, 0).map(drop)
}

/// What the IOMMU of a container translates.
pub(super) struct IommuInfo {
    /// Page sizes, one bit each; 0 if the kernel does not say.
    pub(super) page_sizes: u64,
    /// Addresses; `None` if the kernel does not say.
    pub(super) ranges: Option<Vec<std::ops::RangeInclusive<u64>>>,
    /// Mappings that can still be made; `None` if the kernel does not say.
    pub(super) mappings: Option<u32>,
}

pub(super) fn iommu_info(container: BorrowedFd<'_>) -> Result<IommuInfo, Errno> {
    let info = info(container, Call::IommuInfo, size_of::<sys::vfio_iommu_type1_info>(), None)?;
    let flags = info.u32_at(4);
    let first = if flags & sys::VFIO_IOMMU_INFO_CAPS == 0 { 0 } else { info.u32_at(16) };
    Ok(IommuInfo {
        page_sizes: if flags & sys::VFIO_IOMMU_INFO_PGSIZES == 0 { 0 } else { info.u64_at(8) },
        ranges: info.iova_ranges(first),
        mappings: info.mappings_left(first),
    })
}

/// Lets the devices of a container read and write memory of this process.
///
/// # Safety
/// Until it is unmapped, `address` is shared memory of `bytes` that nobody has a reference to.
pub(super) unsafe fn map(
    container: BorrowedFd<'_>,
    iova: u64,
    address: u64,
    bytes: u64,
) -> Result<(), Errno> {
    let mut map = sys::vfio_iommu_type1_dma_map {
        argsz: size_of_u32::<sys::vfio_iommu_type1_dma_map>(),
        flags: sys::VFIO_DMA_MAP_FLAG_READ | sys::VFIO_DMA_MAP_FLAG_WRITE,
        vaddr: address,
        iova,
        size: bytes,
    };
    // SAFETY: `map` is as long as its `argsz`; the caller vouches for the memory.
    unsafe { with(container, Call::Map, &raw mut map) }.map(drop)
}

/// Undoes a [`map`]. Returns how many bytes were mapped there.
pub(super) fn unmap(container: BorrowedFd<'_>, iova: u64, bytes: u64) -> Result<u64, Errno> {
    let mut unmap = sys::vfio_iommu_type1_dma_unmap {
        argsz: size_of_u32::<sys::vfio_iommu_type1_dma_unmap>(),
        iova,
        size: bytes,
        ..Default::default()
    };
    // SAFETY: `unmap` is as long as its `argsz`; its list at the end is empty.
    unsafe { with(container, Call::Unmap, &raw mut unmap) }?;
    Ok(unmap.size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    #[test]
    fn numbers_are_those_of_the_kernel() {
        assert_eq!(Call::ApiVersion.request(), 0x3b64);
        assert_eq!(Call::SetIrqs.request(), 0x3b6e);
        assert_eq!(Call::Unmap.request(), 0x3b72);
    }

    #[test]
    fn a_descriptor_of_something_else_is_refused_with_the_kernels_reason() {
        let null = File::open("/dev/null").unwrap();
        assert_eq!(device_info(null.as_fd()).err(), Some(Errno::ENOTTY));
        assert_eq!(region_info(null.as_fd(), 0).err(), Some(Errno::ENOTTY));
        assert_eq!(iommu_info(null.as_fd()).err(), Some(Errno::ENOTTY));
        assert_eq!(connect_irqs(null.as_fd(), 2, 0, &[None]).err(), Some(Errno::ENOTTY));
        assert_eq!(unmap(null.as_fd(), 0, 4096).err(), Some(Errno::ENOTTY));
        assert!(!has_type1(null.as_fd()));
    }
}
