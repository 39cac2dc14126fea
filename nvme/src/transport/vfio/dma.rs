//! The IOMMU's side of DMA memory: what a device can reach, by a container with its group in it or by an address space of its own.
//!
//! Invariants:
//! - memory is mapped at addresses that the IOMMU translates, and unmapped as it was mapped;
//! - an address whose unmapping failed is never used again;
//! - after [`revoke`](Mapper::revoke) or [`close`](Mapper::close) nothing is mapped, and nothing will be.
//!
//! Excludes: where memory comes from (slabs), and the device: its descriptor must be closed before `close`.
#![allow(unsafe_code)] // Mapping memory for a device.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use super::checks;
use super::iommufd::Iommufd;
use super::iova::IovaAllocator;
use super::sys;
use crate::pci::Sysfs;
use crate::transport::TransportError;
use crate::transport::slab::{DmaMapper, SLAB_UNIT, SlabMemory};

/// Mappings at most, also if the IOMMU would take more: slabs of 16 MiB reach 64 GiB.
const MAX_MAPPINGS: u32 = 4096;
/// Addresses that every IOMMU for x86 translates, for kernels that do not tell (before 5.4): below the window of
/// interrupts, and from 4 GiB to the 39 bits of the smallest Intel IOMMU.
const CUSTOMARY: [RangeInclusive<u64>; 2] = [0..=0xfedf_ffff, 0x1_0000_0000..=(1 << 39) - 1];

/// The way to the IOMMU. Dropping it gives the device back.
#[derive(Debug)]
pub(super) enum Iommu {
    /// A container and the group in it.
    Container {
        container: OwnedFd,
        /// Held for as long as the container: closing it takes the group out.
        _group: OwnedFd,
    },
    /// An address space that the device is attached to.
    Iommufd(Iommufd),
}

/// What an IOMMU translates.
struct Reach {
    ranges: Vec<RangeInclusive<u64>>,
    /// Mappings that can still be made; `None` if there is no limit, or nobody says.
    mappings: Option<u32>,
}

impl Iommu {
    fn reach(&self) -> Result<Reach, Errno> {
        match self {
            Iommu::Container { container, .. } => {
                let info = sys::iommu_info(container.as_fd())?;
                tracing::debug!(page_sizes = info.page_sizes, "IOMMU of a container");
                let ranges = info.ranges.unwrap_or_else(|| CUSTOMARY.to_vec());
                Ok(Reach { ranges, mappings: info.mappings })
            }
            Iommu::Iommufd(iommufd) => Ok(Reach { ranges: iommufd.ranges()?, mappings: None }),
        }
    }

    /// # Safety
    /// As [`sys::map`].
    unsafe fn map(&self, iova: u64, address: u64, bytes: u64) -> Result<(), Errno> {
        match self {
            // SAFETY: the caller's.
            Iommu::Container { container, .. } => unsafe {
                sys::map(container.as_fd(), iova, address, bytes)
            },
            // SAFETY: the caller's.
            Iommu::Iommufd(iommufd) => unsafe { iommufd.map(iova, address, bytes) },
        }
    }

    fn unmap(&self, iova: u64, bytes: u64) -> Result<u64, Errno> {
        match self {
            Iommu::Container { container, .. } => sys::unmap(container.as_fd(), iova, bytes),
            Iommu::Iommufd(iommufd) => iommufd.unmap(iova, bytes),
        }
    }
}

/// Maps slabs at addresses of its choice.
#[derive(Debug)]
pub(super) struct Mapper {
    sysfs: Sysfs,
    limit: u32,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// `None` once it was closed.
    iommu: Option<Iommu>,
    iovas: IovaAllocator,
    /// Address to bytes.
    mapped: BTreeMap<u64, u64>,
    access: Access,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Granted,
    Revoked,
}

impl Mapper {
    /// A mapper that owns `iommu`.
    ///
    /// # Errors
    /// The kernel does not say what the IOMMU can do.
    pub(super) fn new(iommu: Iommu, sysfs: Sysfs) -> Result<Self, Errno> {
        let Reach { ranges, mappings } = iommu.reach()?;
        tracing::debug!(?ranges, mappings, "IOMMU");
        let state = State {
            iommu: Some(iommu),
            iovas: IovaAllocator::new(ranges),
            mapped: BTreeMap::new(),
            access: Access::Granted,
        };
        let limit = mappings.map_or(MAX_MAPPINGS, |mappings| mappings.min(MAX_MAPPINGS));
        Ok(Self { sysfs, limit, state: Mutex::new(state) })
    }

    /// Mappings that it makes at most.
    pub(super) fn limit(&self) -> usize {
        self.limit as usize
    }

    /// Takes all memory away from the device, for good.
    ///
    /// # Errors
    /// Something could not be unmapped.
    pub(super) fn revoke(&self) -> Result<(), TransportError> {
        let mut state = self.lock();
        state.access = Access::Revoked;
        let failed = std::mem::take(&mut state.mapped)
            .into_iter()
            .filter_map(|(iova, bytes)| {
                let error = state.unmap(iova, bytes).err()?;
                state.mapped.insert(iova, bytes);
                Some(error)
            })
            .last();
        match failed {
            None => Ok(()),
            Some(reason) => Err(TransportError::Failed { what: "take memory away from the device", reason }),
        }
    }

    /// Gives the group back. What is still mapped is unmapped by that.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.access = Access::Revoked;
        state.mapped.clear();
        state.iommu = None;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What to say about a refused mapping.
    fn reason(&self, errno: Errno, bytes: u64) -> String {
        match (errno, checks::lock_limit(&self.sysfs)) {
            (Errno::ENOMEM, Some(limit)) => checks::lock_advice(&self.sysfs, limit, bytes),
            (Errno::ENOSPC, _) => "the IOMMU takes no more mappings".to_owned(),
            _ => format!("the IOMMU refuses to map it: {errno}"),
        }
    }
}

impl State {
    fn unmap(&self, iova: u64, bytes: u64) -> Result<(), String> {
        let Some(iommu) = &self.iommu else { return Ok(()) };
        match iommu.unmap(iova, bytes) {
            Ok(unmapped) if unmapped == bytes => Ok(()),
            Ok(unmapped) => Err(format!("{unmapped} bytes were mapped at {iova:#x} instead of {bytes}")),
            Err(errno) => Err(format!("{bytes} bytes at {iova:#x} stay mapped: {errno}")),
        }
    }
}

impl DmaMapper for Mapper {
    fn map(&self, memory: &SlabMemory) -> Result<u64, TransportError> {
        let bytes = memory.bytes() as u64;
        let refused = |reason: String| TransportError::Memory { bytes: memory.bytes(), reason };
        let mut state = self.lock();
        let state = &mut *state;
        let iommu = match (&state.iommu, state.access) {
            (Some(iommu), Access::Granted) => iommu,
            _ => return Err(refused("the device's access to memory was taken away".to_owned())),
        };
        let iova = state
            .iovas
            .allocate(bytes, SLAB_UNIT as u64)
            .ok_or_else(|| refused("no device addresses are left".to_owned()))?;
        // SAFETY: the pool keeps the slab until it calls `unmap`, and gives out no references to its memory.
        match unsafe { iommu.map(iova, memory.address(), bytes) } {
            Ok(()) => {
                state.mapped.insert(iova, bytes);
                Ok(iova)
            }
            Err(errno) => {
                state.iovas.release(iova, bytes);
                Err(refused(self.reason(errno, bytes)))
            }
        }
    }

    fn unmap(&self, iova: u64, bytes: u64) {
        let mut state = self.lock();
        // Absent after `revoke` and `close`, which unmap everything.
        if state.mapped.remove(&iova).is_none() {
            return;
        }
        match state.unmap(iova, bytes) {
            Ok(()) => state.iovas.release(iova, bytes),
            // The kernel holds on to the pages while they are mapped, so nobody else gets them.
            Err(reason) => tracing::error!(%reason, "DMA memory cannot be unmapped"),
        }
    }
}
