//! Words of DMA memory, read and written where they are: for queue entries, doorbell buffers and lists.
//!
//! Owns: [`DmaCells`]. Buffers for data are copied to and from through volatile slices; what a driver touches on every command
//! goes through here, at the price of a load or a store.
//!
//! Invariants:
//! - the mapping lives as long as the cells (they hold it), so the base stays valid;
//! - every access is aligned and inside the region: both are checked, each time;
//! - memory that a device may write is only touched by atomic accesses.
//!
//! *Memory ordering*: the caller's, by argument. [`DmaCells::store_entry`] is relaxed: publish it by a fence or a doorbell.
//!
//! Excludes: mapping memory for a device. `modelled.rs` stands in for this file when protocols are model-checked.

#![allow(unsafe_code, reason = "DMA memory: single words are accessed in place")]

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vm_memory::MmapRegion;

use super::DmaRegion;

/// Sizes of entries divide this, so that the place of an entry is checked by one comparison. What is left at the end of a region
/// beyond a multiple of it is in no table.
const TABLE_UNIT: usize = 64;

/// A word of 32 bits that a device shares.
pub type DeviceWord = AtomicU32;

/// Direct access to the words of a region.
pub struct DmaCells {
    base: NonNull<u8>,
    bytes: usize,
    /// Bytes that tables of entries take part in: whole [`TABLE_UNIT`]s.
    table_bytes: usize,
    region: Arc<dyn DmaRegion>,
    /// Keeps `base` valid, whatever the region does.
    _mapping: Arc<MmapRegion>,
}

// SAFETY: the memory is reached through atomic accesses only, and the mapping is owned; nothing is tied to a thread.
unsafe impl Send for DmaCells {}

impl DmaCells {
    /// The words of `region`.
    ///
    /// # Panics
    /// If the region does not lie within its own mapping, or does not begin at a page: a bug of the transport.
    pub fn new(region: Arc<dyn DmaRegion>) -> Self {
        let (mapping, offset) = region.mapping();
        let bytes = region.slice().len();
        let end = offset.checked_add(bytes);
        assert!(end.is_some_and(|end| end <= mapping.size()), "a DMA region lies within its mapping");
        let start = NonNull::new(mapping.as_ptr()).expect("a mapping has an address");
        // SAFETY: `offset` is within the mapping, by the assertion above; the mapping is one allocation.
        let base = unsafe { start.add(offset) };
        assert!(base.cast::<u64>().is_aligned(), "a DMA region begins at a page");
        Self { base, bytes, table_bytes: bytes / TABLE_UNIT * TABLE_UNIT, region, _mapping: mapping }
    }

    /// The region.
    pub fn region(&self) -> &Arc<dyn DmaRegion> {
        &self.region
    }

    /// The address of `bytes` bytes at `offset`, of words of `word` bytes.
    #[inline(always)]
    fn at(&self, offset: usize, bytes: usize, word: usize) -> NonNull<u8> {
        let inside = offset <= self.bytes && bytes <= self.bytes - offset;
        assert!(inside && offset.is_multiple_of(word), "access outside of a DMA region, or misaligned");
        // SAFETY: `offset` is within the region, which lies within the mapping.
        unsafe { self.base.add(offset) }
    }

    /// The `index`th entry of a table of entries of `bytes` bytes, a power of two up to [`TABLE_UNIT`].
    #[inline(always)]
    fn entry(&self, index: u32, bytes: usize) -> NonNull<u8> {
        assert!(bytes.is_power_of_two() && bytes <= TABLE_UNIT, "entries of {bytes} bytes");
        const { assert!(usize::BITS == 64, "the product below does not wrap") };
        let offset = index as usize * bytes;
        assert!(offset < self.table_bytes, "entry outside of a DMA region");
        // SAFETY: `offset` is a multiple of `bytes` below a larger multiple of it, so that the entry ends within the region, which
        // lies within the mapping.
        unsafe { self.base.add(offset) }
    }

    /// `N` words of 32 bits from byte `offset` on, as the device sees them: little-endian.
    ///
    /// # Panics
    /// If they are misaligned or not inside the region; so do the others.
    #[inline(always)]
    pub fn words_32<const N: usize>(&self, offset: usize) -> &[AtomicU32; N] {
        let words = self.at(offset, N * 4, 4).cast::<[AtomicU32; N]>();
        // SAFETY: aligned and inside a mapping that lives as long as `self`. All accesses of this process to these words
        // are atomic, or copies by a volatile slice while the device leaves them alone.
        unsafe { words.as_ref() }
    }

    /// `N` words of 64 bits from byte `offset` on, as the device sees them: little-endian.
    #[inline(always)]
    pub fn words_64<const N: usize>(&self, offset: usize) -> &[AtomicU64; N] {
        let words = self.at(offset, N * 8, 8).cast::<[AtomicU64; N]>();
        // SAFETY: as in `words_32`.
        unsafe { words.as_ref() }
    }

    /// The word of 32 bits at byte `offset`.
    #[inline(always)]
    pub fn load_32(&self, offset: usize, order: Ordering) -> u32 {
        u32::from_le(self.words_32::<1>(offset)[0].load(order))
    }

    /// Stores a word of 32 bits at byte `offset`.
    #[inline(always)]
    pub fn store_32(&self, offset: usize, value: u32, order: Ordering) {
        self.words_32::<1>(offset)[0].store(value.to_le(), order);
    }

    /// Stores a word of 64 bits at byte `offset`.
    #[inline(always)]
    pub fn store_64(&self, offset: usize, value: u64, order: Ordering) {
        self.words_64::<1>(offset)[0].store(value.to_le(), order);
    }

    /// The words of the `index`th entry of a table of entries of `N` words of 32 bits each: little-endian.
    ///
    /// # Panics
    /// If the table has fewer entries.
    #[inline(always)]
    pub fn entry_32<const N: usize>(&self, index: u32) -> &[DeviceWord; N] {
        let entry = self.entry(index, N * 4);
        // SAFETY: the base is aligned to 8 bytes, hence the entry to 4; the rest as in `words_32`.
        unsafe { entry.cast::<[AtomicU32; N]>().as_ref() }
    }

    /// Stores the `index`th entry of a table of entries of `N` words of 64 bits each, given as words in memory order. Relaxed.
    ///
    /// # Panics
    /// If the table has fewer entries.
    #[inline(always)]
    pub fn store_entry<const N: usize>(&self, index: u32, entry: [u64; N]) {
        let entry_at = self.entry(index, N * 8);
        // SAFETY: the base is aligned to 8 bytes, hence the entry; the rest as in `words_32`.
        let cells = unsafe { entry_at.cast::<[AtomicU64; N]>().as_ref() };
        for (cell, word) in cells.iter().zip(entry) {
            cell.store(word, Ordering::Relaxed);
        }
    }

    /// Sets every word to zero.
    pub fn clear(&self) {
        for offset in (0..self.bytes & !7).step_by(8) {
            self.store_64(offset, 0, Ordering::Relaxed);
        }
    }
}

impl fmt::Debug for DmaCells {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaCells").field("iova", &self.region.iova()).field("bytes", &self.bytes).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dma::HeapRegion;

    #[test]
    fn words_are_where_copies_find_them() {
        let region = HeapRegion::new(4096).unwrap();
        let cells = DmaCells::new(Arc::clone(&region) as Arc<dyn DmaRegion>);
        cells.store_entry(1, [1, 2, 3, 4, 5, 6, 7, u64::from_le_bytes(*b"the last")]);
        cells.store_32(4092, 0x0403_0201, Ordering::Release);
        let mut bytes = [0; 8];
        region.slice().subslice(120, 8).unwrap().copy_to(&mut bytes);
        assert_eq!(&bytes, b"the last");
        assert_eq!(cells.words_64::<2>(64 + 24)[0].load(Ordering::Relaxed), 4u64.to_le());
        assert_eq!(cells.load_32(4092, Ordering::Acquire), 0x0403_0201);
        cells.clear();
        assert_eq!(cells.load_32(64, Ordering::Relaxed), 0);
    }

    #[test]
    fn the_mapping_outlives_the_region() {
        let cells = DmaCells::new(HeapRegion::new(4096).unwrap());
        cells.store_64(0, 7, Ordering::Relaxed);
        assert_eq!(cells.load_32(0, Ordering::Relaxed), 7);
    }

    #[test]
    fn what_is_outside_or_misaligned_is_refused() {
        let cells = DmaCells::new(HeapRegion::new(4096).unwrap());
        cells.store_entry(63, [0; 8]);
        assert_eq!(cells.entry_32::<4>(255)[0].load(Ordering::Relaxed), 0);
        for access in [
            (|cells: &DmaCells| cells.store_32(4096, 0, Ordering::Relaxed)) as fn(&DmaCells),
            |cells| cells.store_entry(64, [0; 8]),
            |cells| cells.store_entry(u32::MAX, [0; 8]),
            |cells| assert_eq!(cells.entry_32::<4>(256)[0].load(Ordering::Relaxed), 0),
            |cells| cells.store_64(4, 0, Ordering::Relaxed),
            |cells| cells.store_32(usize::MAX - 3, 0, Ordering::Relaxed),
        ] {
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| access(&cells)));
            assert!(outcome.is_err());
        }
    }
}
