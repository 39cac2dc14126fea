//! What VFIO tells about devices, regions and IOMMUs: a header, and a chain of capabilities behind it (linux/vfio.h).
//! Pure: parsing only.
//!
//! Invariants: nothing in the bytes leads outside of them or around in circles.

use std::ops::RangeInclusive;

use vfio_bindings::bindings::vfio as sys;

/// An answer of the kernel: the header and what follows it.
#[derive(Clone, Debug)]
pub(super) struct Info {
    bytes: Vec<u8>,
}

impl Info {
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        Self { bytes }
    }

    /// A field of 32 bits; 0 beyond the end.
    pub(super) fn u32_at(&self, offset: usize) -> u32 {
        u32_of(&self.bytes, offset).unwrap_or_default()
    }

    /// A field of 64 bits; 0 beyond the end.
    pub(super) fn u64_at(&self, offset: usize) -> u64 {
        u64_of(&self.bytes, offset).unwrap_or_default()
    }

    /// The capability `id` of the chain that begins at `first`, with its header.
    fn capability(&self, first: u32, id: u32) -> Option<&[u8]> {
        let mut at = first as usize;
        while at != 0 {
            let header = self.bytes.get(at..at.checked_add(8)?)?;
            if u32::from(u16::from_ne_bytes([header[0], header[1]])) == id {
                return self.bytes.get(at..);
            }
            let next = u32_of(header, 4)? as usize;
            // Links lead forward, else they would lead in circles.
            at = if next > at { next } else { 0 };
        }
        None
    }

    /// Parts of a region that can be mapped, as (offset, bytes); `None` if the kernel does not say: then all of it.
    pub(super) fn sparse_areas(&self, first: u32) -> Option<Vec<(u64, u64)>> {
        let capability = self.capability(first, sys::VFIO_REGION_INFO_CAP_SPARSE_MMAP)?;
        Some(pairs(capability))
    }

    /// Whether the MSI-X table may be mapped with the rest of its region.
    pub(super) fn msix_mappable(&self, first: u32) -> bool {
        self.capability(first, sys::VFIO_REGION_INFO_CAP_MSIX_MAPPABLE).is_some()
    }

    /// Addresses that the IOMMU translates; `None` if the kernel does not say (before 5.4).
    pub(super) fn iova_ranges(&self, first: u32) -> Option<Vec<RangeInclusive<u64>>> {
        let capability = self.capability(first, sys::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE)?;
        Some(pairs(capability).into_iter().map(|(start, end)| start..=end).collect())
    }

    /// Mappings that may still be made; `None` if the kernel does not say (before 5.10).
    pub(super) fn mappings_left(&self, first: u32) -> Option<u32> {
        u32_of(self.capability(first, sys::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL)?, 8)
    }
}

/// The pairs of 64-bit numbers behind a capability's count, which both capabilities with lists have in common.
fn pairs(capability: &[u8]) -> Vec<(u64, u64)> {
    let count = u32_of(capability, 8).unwrap_or_default() as usize;
    let list = capability.get(16..).unwrap_or_default();
    list.chunks_exact(16).take(count).filter_map(|pair| Some((u64_of(pair, 0)?, u64_of(pair, 8)?))).collect()
}

fn u32_of(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(offset..offset.checked_add(4)?)?.try_into().ok()?))
}

fn u64_of(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(offset..offset.checked_add(8)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A capability: id, version 1, where the next one is, a count, and pairs.
    fn capability(id: u32, next: u32, count: u32, list: &[u64]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&(id as u16).to_ne_bytes());
        bytes.extend_from_slice(&1u16.to_ne_bytes());
        bytes.extend_from_slice(&next.to_ne_bytes());
        bytes.extend_from_slice(&count.to_ne_bytes());
        bytes.extend_from_slice(&0u32.to_ne_bytes());
        list.iter().for_each(|number| bytes.extend_from_slice(&number.to_ne_bytes()));
        bytes
    }

    #[test]
    fn capabilities_are_found_along_the_chain() {
        let mut bytes = vec![0; 32];
        bytes.extend(capability(9, 48, 0, &[]));
        bytes.extend(capability(sys::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, 96, 2, &[0, 9, 16, 31]));
        bytes.extend(capability(sys::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, 0, 65535, &[]));
        let info = Info::new(bytes);
        assert_eq!(info.iova_ranges(32), Some(vec![0..=9, 16..=31]));
        assert_eq!(info.mappings_left(32), Some(65535));
        assert_eq!((info.iova_ranges(0), info.iova_ranges(96)), (None, None));
    }

    #[test]
    fn a_list_longer_than_its_bytes_ends_with_them() {
        let info = Info::new(
            [vec![0; 32], capability(sys::VFIO_REGION_INFO_CAP_SPARSE_MMAP, 0, u32::MAX, &[4096, 8192, 1])]
                .concat(),
        );
        assert_eq!(info.sparse_areas(32), Some(vec![(4096, 8192)]));
        assert_eq!(info.sparse_areas(u32::MAX), None);
    }

    proptest! {
        #[test]
        fn no_bytes_panic_or_hang(bytes in prop::collection::vec(prop_oneof![Just(0u8), 0u8..64, any::<u8>()], 0..256), first in 0u32..300) {
            let info = Info::new(bytes);
            let _ = (info.sparse_areas(first), info.iova_ranges(first), info.mappings_left(first));
            let _ = (info.msix_mappable(first), info.u32_at(first as usize), info.u64_at(usize::MAX));
        }
    }
}
