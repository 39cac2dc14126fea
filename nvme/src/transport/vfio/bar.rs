//! A BAR: mapped where it can be, by system calls elsewhere.
//!
//! Invariants:
//! - an access is inside the BAR and naturally aligned, or an error;
//! - mapped registers are touched by volatile loads and stores of 32 bits only; nobody has a reference to them;
//! - every mapping is [watched](nvme_sigbus): once the device is gone, reads give all ones and writes are lost.
//!
//! *Memory ordering*: stores to DMA memory that were made before a doorbell are visible to the device before the doorbell
//! is: x86 keeps stores in order, and a release fence precedes (and is a barrier that reaches devices elsewhere).
//!
//! Excludes: what the registers mean.
#![allow(unsafe_code)] // Volatile access to mapped registers.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use nix::libc;
use nvme_sigbus::Watch;

use super::sys::RegionInfo;
use crate::transport::TransportError;

/// Bytes of a page: what can be mapped is a whole number of them.
const PAGE: u64 = 4096;

/// The parts of a region that can be mapped: whole pages inside of it, in order, that do not overlap. Those of a region
/// that says nothing are all of it.
pub(super) fn mappable_areas(region: &RegionInfo) -> Vec<(u64, u64)> {
    if !region.mappable {
        return Vec::new();
    }
    let mut areas: Vec<(u64, u64)> = Vec::new();
    let mut listed = region.areas.clone().unwrap_or_else(|| vec![(0, region.bytes)]);
    listed.sort_unstable();
    for (offset, bytes) in listed {
        let after = areas.last().map_or(0, |(offset, bytes)| offset + bytes);
        let start = offset.max(after).checked_next_multiple_of(PAGE);
        let end = offset.saturating_add(bytes).min(region.bytes) / PAGE * PAGE;
        if let Some(start) = start.filter(|&start| start < end) {
            areas.push((start, end - start));
        }
    }
    areas
}

/// A mapped part of a BAR.
struct Area {
    /// Where it begins in the BAR.
    offset: u64,
    bytes: u64,
    /// Dropped first by [`Bar`]'s `drop`: the slot goes before the mapping.
    watch: Option<Watch>,
    start: NonNull<u8>,
}

// SAFETY: the pages are registers of a device: every thread may access them, by volatile loads and stores.
unsafe impl Send for Area {}
// SAFETY: as above.
unsafe impl Sync for Area {}

impl Area {
    /// Where 32 bits at `offset` of the BAR are mapped, if they are.
    #[inline]
    fn register(&self, offset: u64) -> Option<*mut u32> {
        let inside = offset.wrapping_sub(self.offset);
        if inside >= self.bytes || !offset.is_multiple_of(4) {
            return None;
        }
        // SAFETY: less than `bytes` from the start of the mapping.
        Some(unsafe { self.start.as_ptr().add(inside as usize) }.cast())
    }

    fn is_gone(&self) -> bool {
        self.watch.as_ref().is_some_and(Watch::is_gone)
    }
}

/// A BAR of a device.
pub(super) struct Bar {
    device: Arc<File>,
    /// Where the region begins in the device's descriptor.
    offset: u64,
    bytes: u64,
    areas: Vec<Area>,
}

impl Bar {
    /// Maps what can be mapped of a region.
    ///
    /// # Errors
    /// The handler of vanishing registers cannot be installed. That a part cannot be mapped is none: it is then reached
    /// by system calls.
    pub(super) fn new(device: Arc<File>, region: &RegionInfo) -> io::Result<Self> {
        let mut bar = Self { device, offset: region.offset, bytes: region.bytes, areas: Vec::new() };
        for (offset, bytes) in mappable_areas(region) {
            match map(&bar.device, region.offset + offset, bytes, None) {
                Ok(start) => {
                    // Pushed before it is watched, so that it is unmapped whatever happens.
                    bar.areas.push(Area { offset, bytes, watch: None, start });
                    let watch = Watch::new(start.as_ptr() as usize, bytes as usize)?;
                    bar.areas.last_mut().expect("pushed above").watch = Some(watch);
                }
                Err(error) => tracing::warn!(offset, bytes, %error, "registers cannot be mapped"),
            }
        }
        Ok(bar)
    }

    /// Bytes of the BAR.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether all of `bytes` from `offset` on are mapped.
    pub(super) fn is_mapped(&self, offset: u64, bytes: u64) -> bool {
        self.areas
            .iter()
            .any(|area| offset >= area.offset && offset.saturating_add(bytes) <= area.offset + area.bytes)
    }

    /// Whether an access failed because the device did not answer.
    pub(super) fn is_gone(&self) -> bool {
        self.areas.iter().any(Area::is_gone)
    }

    /// Reads 32 bits; all ones once the device is gone.
    pub(super) fn read(&self, offset: u64) -> Result<u32, TransportError> {
        self.check(offset)?;
        for area in &self.areas {
            if let Some(register) = area.register(offset) {
                // SAFETY: inside a live mapping and aligned.
                let value = unsafe { register.read_volatile() };
                return Ok(if area.is_gone() { u32::MAX } else { value });
            }
        }
        let mut bytes = [0; 4];
        match self.device.read_exact_at(&mut bytes, self.offset + offset) {
            Ok(()) => Ok(u32::from_le_bytes(bytes)),
            // VFIO refuses access to registers of a device that is gone, or in low power.
            Err(error) => {
                tracing::debug!(offset, %error, "register does not answer");
                Ok(u32::MAX)
            }
        }
    }

    /// Writes 32 bits; does nothing once the device is gone.
    pub(super) fn write(&self, offset: u64, value: u32) -> Result<(), TransportError> {
        self.check(offset)?;
        if !self.store(offset, value) {
            // A failure shows in the next read.
            let written = self.device.write_all_at(&value.to_le_bytes(), self.offset + offset);
            if let Err(error) = written {
                tracing::debug!(offset, %error, "register does not answer");
            }
        }
        Ok(())
    }

    /// Writes a doorbell.
    #[inline]
    pub(super) fn doorbell(&self, offset: u64, value: u32) {
        // Release: pairs with the device's reads of what the doorbell announces.
        fence(Ordering::Release);
        if !self.store(offset, value) {
            // Doorbells outside of any mapping: slow, but they work. A loss shows as a command that times out.
            let _ = self.device.write_all_at(&value.to_le_bytes(), self.offset + offset);
        }
    }

    /// Stores to a mapped register; `false` if it is not mapped.
    #[inline]
    fn store(&self, offset: u64, value: u32) -> bool {
        for area in &self.areas {
            if let Some(register) = area.register(offset) {
                // SAFETY: inside a live mapping and aligned.
                unsafe { register.write_volatile(value) };
                return true;
            }
        }
        false
    }

    /// Puts the device's pages back after a reset, where an access met them switched off.
    ///
    /// # Errors
    /// The system's: then they stay gone.
    pub(super) fn map_anew(&self) -> io::Result<()> {
        for area in self.areas.iter().filter(|area| area.is_gone()) {
            map(&self.device, self.offset + area.offset, area.bytes, Some(area.start))?;
            area.watch.as_ref().inspect(|watch| watch.mapped_anew());
        }
        Ok(())
    }

    fn check(&self, offset: u64) -> Result<(), TransportError> {
        let inside = offset.checked_add(4).is_some_and(|end| end <= self.bytes);
        if inside && offset.is_multiple_of(4) {
            return Ok(());
        }
        let reason = format!("it is not a place for 32 bits in a BAR of {:#x} bytes", self.bytes);
        Err(TransportError::Register { offset, reason })
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        for area in &mut self.areas {
            area.watch = None;
            // SAFETY: mapped by `new`; nobody has a pointer into it beyond a call.
            unsafe { libc::munmap(area.start.as_ptr().cast(), area.bytes as usize) };
        }
    }
}

/// Maps part of a descriptor, over an older mapping if there is one.
fn map(device: &File, offset: u64, bytes: u64, over: Option<NonNull<u8>>) -> io::Result<NonNull<u8>> {
    let too_large = || io::Error::from(io::ErrorKind::InvalidInput);
    let offset = i64::try_from(offset).map_err(|_| too_large())?;
    let length = usize::try_from(bytes).map_err(|_| too_large())?;
    let (address, fixed) = over.map_or((ptr::null_mut(), 0), |at| (at.as_ptr().cast(), libc::MAP_FIXED));
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping, or one in place of a mapping of the same device and length.
    let start = unsafe {
        libc::mmap(address, length, protection, libc::MAP_SHARED | fixed, device.as_raw_fd(), offset)
    };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn region(bytes: u64, areas: Option<Vec<(u64, u64)>>) -> RegionInfo {
        RegionInfo { bytes, offset: 0, mappable: true, areas, msix_mappable: false }
    }

    /// A device with one BAR of four pages, of which those in `areas` are mapped.
    fn bar(areas: Option<Vec<(u64, u64)>>) -> (Bar, Arc<File>) {
        let device = Arc::new(tempfile::tempfile().unwrap());
        device.set_len(6 * PAGE).unwrap();
        let region = RegionInfo { offset: 2 * PAGE, ..region(4 * PAGE, areas) };
        (Bar::new(Arc::clone(&device), &region).unwrap(), device)
    }

    #[test]
    fn mapped_and_other_registers_are_one_bar() {
        let (bar, device) = bar(Some(vec![(PAGE, PAGE)]));
        assert!(bar.is_mapped(PAGE, PAGE) && !bar.is_mapped(PAGE - 4, 8) && !bar.is_mapped(2 * PAGE, 4));
        for offset in [0, PAGE - 4, PAGE, 2 * PAGE - 4, 2 * PAGE, 4 * PAGE - 4] {
            bar.write(offset, offset as u32 + 1).unwrap();
            assert_eq!(bar.read(offset), Ok(offset as u32 + 1));
            let mut bytes = [0; 4];
            device.read_exact_at(&mut bytes, 2 * PAGE + offset).unwrap();
            assert_eq!(u32::from_le_bytes(bytes), offset as u32 + 1);
        }
        bar.doorbell(PAGE + 8, 77);
        bar.doorbell(3 * PAGE, 78);
        assert_eq!((bar.read(PAGE + 8), bar.read(3 * PAGE)), (Ok(77), Ok(78)));
    }

    #[test]
    fn accesses_outside_or_askew_are_errors() {
        let (bar, _) = bar(None);
        for offset in [4 * PAGE, 4 * PAGE - 2, 1, u64::MAX - 3, u64::MAX] {
            assert!(matches!(bar.read(offset), Err(TransportError::Register { .. })), "{offset:#x}");
            assert!(bar.write(offset, 0).is_err());
        }
    }

    #[test]
    fn a_device_that_is_gone_reads_as_ones_by_both_ways_and_may_come_back() {
        let (bar, device) = bar(Some(vec![(0, 2 * PAGE)]));
        bar.write(8, 5).unwrap();
        device.set_len(0).unwrap();
        assert_eq!((bar.read(8), bar.read(3 * PAGE)), (Ok(u32::MAX), Ok(u32::MAX)));
        assert!(bar.is_gone());
        // The store is lost, although there is a page to take it.
        bar.write(8, 6).unwrap();
        bar.doorbell(PAGE, 1);
        assert_eq!((bar.read(8), bar.read(PAGE)), (Ok(u32::MAX), Ok(u32::MAX)));
        device.set_len(6 * PAGE).unwrap();
        assert_eq!(bar.read(8), Ok(u32::MAX), "it stays gone until it was reset");
        bar.map_anew().unwrap();
        assert_eq!((bar.read(8), bar.is_gone()), (Ok(0), false));
    }

    #[test]
    fn what_cannot_be_mapped_is_left_out() {
        assert_eq!(mappable_areas(&region(4 * PAGE, None)), [(0, 4 * PAGE)]);
        assert_eq!(mappable_areas(&RegionInfo { mappable: false, ..region(4 * PAGE, None) }), []);
        // Less than a page.
        assert_eq!(mappable_areas(&region(PAGE - 1, None)), []);
        // An MSI-X table in the second page.
        let around = vec![(0, PAGE), (2 * PAGE, 2 * PAGE)];
        assert_eq!(mappable_areas(&region(4 * PAGE, Some(around.clone()))), around);
        assert_eq!(mappable_areas(&region(4 * PAGE, Some(vec![]))), []);
        // Askew, beyond the end, overlapping, and senseless.
        let areas = vec![(2 * PAGE - 1, u64::MAX), (1, 2 * PAGE), (9 * PAGE, PAGE), (PAGE, 0)];
        assert_eq!(mappable_areas(&region(4 * PAGE, Some(areas))), [(PAGE, PAGE), (2 * PAGE, 2 * PAGE)]);
    }

    proptest! {
        #[test]
        fn areas_are_pages_inside_the_region_in_order(
            bytes in 0u64..40_000,
            areas in prop::collection::vec((prop_oneof![0u64..50_000, any::<u64>()], prop_oneof![0u64..50_000, any::<u64>()]), 0..6),
        ) {
            let found = mappable_areas(&region(bytes, Some(areas.clone())));
            let mut after = 0;
            for (offset, length) in found {
                prop_assert!(offset % PAGE == 0 && length % PAGE == 0 && length > 0);
                prop_assert!(offset >= after && offset + length <= bytes);
                for page in (offset..offset + length).step_by(PAGE as usize) {
                    let listed = areas.iter().any(|&(start, length)| {
                        start <= page && page + PAGE <= start.saturating_add(length)
                    });
                    prop_assert!(listed);
                }
                after = offset + length;
            }
        }
    }
}
