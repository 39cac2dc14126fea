//! Memory of a device through iommufd (linux/iommufd.h), for kernels that give each device a node of its own and have no nodes for groups.
//!
//! Owns: [`Iommufd`] (an address space with one device attached to it), and the calls that make it and map memory in it.
//!
//! | call | on | for |
//! |---|---|---|
//! | VFIO_DEVICE_BIND_IOMMUFD | device | the device belongs to this process, and can be asked and configured from here on |
//! | IOMMU_IOAS_ALLOC | iommufd | an address space |
//! | VFIO_DEVICE_ATTACH_IOMMUFD_PT | device | what the device can reach is what is mapped there |
//! | IOMMU_IOAS_IOVA_RANGES | iommufd | after attaching, since the device's IOMMU narrows them |
//! | IOMMU_IOAS_MAP, IOMMU_IOAS_UNMAP | iommufd | at addresses chosen here |
//!
//! Invariants:
//! - what is passed to the kernel is as long as its first field says;
//! - the address space and its mappings end with the descriptor, once the device is closed.
//!
//! The order of the calls and their contents are tested against a kernel made for that: no kernel at hand is built with iommufd.
//!
//! Excludes: which addresses are used (`dma`); everything else that a device is asked (`sys`), which is as with groups.
#![allow(unsafe_code)] // ioctl: descriptors and buffers that live during the call.

use std::fmt;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::libc;
use vfio_bindings::bindings::vfio as bindings;

/// Ranges of addresses that are taken note of at most.
const MAX_RANGES: usize = 4096;

const FIXED_ADDRESS: u32 = 1;
const WRITABLE: u32 = 1 << 1;
const READABLE: u32 = 1 << 2;

/// What is asked of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Bind,
    Attach,
    AllocateSpace,
    Ranges,
    Map,
    Unmap,
}

impl Call {
    /// `_IO(type, number)`: neither family encodes direction or size.
    const fn request(self) -> libc::Ioctl {
        const VFIO: u32 = (bindings::VFIO_TYPE as u32) << 8 | bindings::VFIO_BASE;
        const IOMMUFD: u32 = (b';' as u32) << 8;
        let number = match self {
            Call::Bind => VFIO + 18,
            Call::Attach => VFIO + 19,
            Call::AllocateSpace => IOMMUFD + 0x81,
            Call::Ranges => IOMMUFD + 0x84,
            Call::Map => IOMMUFD + 0x85,
            Call::Unmap => IOMMUFD + 0x86,
        };
        number as libc::Ioctl
    }
}

/// Whoever answers calls: the kernel, or a test.
pub(super) trait Kernel: Send + Sync {
    /// Makes a call whose argument is a struct of `words`; the length that it begins with is not beyond them. An `array` is one that
    /// the word of that index is to point to.
    ///
    /// # Safety
    /// Memory that the struct names besides is what the call needs it to be.
    unsafe fn call(
        &self,
        fd: BorrowedFd<'_>,
        call: Call,
        words: &mut [u64],
        array: Option<(usize, &mut [u64])>,
    ) -> Result<(), Errno>;
}

/// The real one.
pub(super) struct Linux;

impl Kernel for Linux {
    unsafe fn call(
        &self,
        fd: BorrowedFd<'_>,
        call: Call,
        words: &mut [u64],
        array: Option<(usize, &mut [u64])>,
    ) -> Result<(), Errno> {
        assert!(low(words[0]) as usize <= size_of_val(words), "the struct is as long as it says");
        if let Some((index, array)) = array {
            words[index] = array.as_mut_ptr().expose_provenance() as u64;
        }
        // SAFETY: the descriptor is open; the struct is as long as its first field says, and the array lives during the call; the
        // caller vouches for the rest.
        Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), call.request(), words.as_mut_ptr()) }).map(drop)
    }
}

/// Two fields of 32 bits, the first at the lower address.
fn pair(first: u32, second: u32) -> u64 {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first.to_ne_bytes());
    bytes[4..].copy_from_slice(&second.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

/// The field of 32 bits at the lower address.
fn low(word: u64) -> u32 {
    let [a, b, c, d, ..] = word.to_ne_bytes();
    u32::from_ne_bytes([a, b, c, d])
}

/// A step of opening that the kernel refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) step: &'static str,
    pub(super) errno: Errno,
}

/// An address space with one device attached to it.
pub(super) struct Iommufd {
    kernel: Arc<dyn Kernel>,
    fd: OwnedFd,
    space: u32,
}

impl Iommufd {
    /// Binds a device to `iommufd` and attaches it to a new address space there.
    ///
    /// # Errors
    /// The step that was refused. The device stays bound until it is closed.
    pub(super) fn open(
        kernel: Arc<dyn Kernel>,
        iommufd: OwnedFd,
        device: BorrowedFd<'_>,
    ) -> Result<Self, Refused> {
        let refused = |step| move |errno| Refused { step, errno };
        let number = iommufd.as_raw_fd() as u32;
        let mut bind = [pair(16, 0), pair(number, 0)];
        // SAFETY: the struct names no memory.
        unsafe { kernel.call(device, Call::Bind, &mut bind, None) }
            .map_err(refused("bind the device to the IOMMU (VFIO_DEVICE_BIND_IOMMUFD)"))?;
        let mut allocate = [pair(12, 0), 0];
        // SAFETY: the struct names no memory.
        unsafe { kernel.call(iommufd.as_fd(), Call::AllocateSpace, &mut allocate, None) }
            .map_err(refused("make an address space (IOMMU_IOAS_ALLOC)"))?;
        let space = low(allocate[1]);
        let mut attach = [pair(12, 0), pair(space, 0)];
        // SAFETY: the struct names no memory.
        unsafe { kernel.call(device, Call::Attach, &mut attach, None) }
            .map_err(refused("attach the device to its address space (VFIO_DEVICE_ATTACH_IOMMUFD_PT)"))?;
        Ok(Self { kernel, fd: iommufd, space })
    }

    /// The addresses that can be used.
    ///
    /// # Errors
    /// The kernel's, or `EMSGSIZE`: there are more than [`MAX_RANGES`].
    pub(super) fn ranges(&self) -> Result<Vec<RangeInclusive<u64>>, Errno> {
        let mut room = 16;
        loop {
            let mut array = vec![0; 2 * room];
            let mut words = [pair(32, self.space), pair(room as u32, 0), 0, 0];
            // SAFETY: the array has room for as many ranges as the struct says.
            let called =
                unsafe { self.kernel.call(self.fd.as_fd(), Call::Ranges, &mut words, Some((2, &mut array))) };
            // How many there are is told in either case.
            let found = low(words[1]) as usize;
            match called {
                Err(Errno::EMSGSIZE) if room < found && found <= MAX_RANGES => room = found,
                Err(errno) => return Err(errno),
                Ok(()) => {
                    return Ok(array.chunks_exact(2).take(found).map(|range| range[0]..=range[1]).collect());
                }
            }
        }
    }

    /// Lets the device read and write memory of this process.
    ///
    /// # Safety
    /// Until it is unmapped, `address` is shared memory of `bytes` that nobody has a reference to.
    pub(super) unsafe fn map(&self, iova: u64, address: u64, bytes: u64) -> Result<(), Errno> {
        let flags = FIXED_ADDRESS | WRITABLE | READABLE;
        let mut words = [pair(40, flags), pair(self.space, 0), address, bytes, iova];
        // SAFETY: the caller vouches for the memory.
        unsafe { self.kernel.call(self.fd.as_fd(), Call::Map, &mut words, None) }
    }

    /// Undoes a [`map`](Self::map). Returns how many bytes were mapped there.
    pub(super) fn unmap(&self, iova: u64, bytes: u64) -> Result<u64, Errno> {
        let mut words = [pair(24, self.space), iova, bytes];
        // SAFETY: the struct names no memory of this process.
        unsafe { self.kernel.call(self.fd.as_fd(), Call::Unmap, &mut words, None) }?;
        Ok(words[2])
    }
}

impl fmt::Debug for Iommufd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Iommufd").field("fd", &self.fd).field("space", &self.space).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
