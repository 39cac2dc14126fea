//! What stands in for the words of DMA memory while protocols are model-checked (`--cfg loom`): the same interface, on loom's
//! atomics, so that the driver's own queues run in a model.
//!
//! Owns: [`DeviceWord`], [`DmaCells`] and [`ModelledRegion`], from which both sides of a model take the same words.
//!
//! Invariants: a relaxed store counts as a plain write, of the kind that others may not read or write at the same time without
//! being ordered with it; every other store, and the loads that see it, may race. So the model fails not only when a stale
//! value is read, but also when nothing orders a read before the write that would spoil it.
//!
//! Excludes: devices, and the real thing (`cells.rs`).

#![allow(unsafe_code, reason = "DMA memory, in a model: accesses from several threads are what is looked at")]

use std::fmt;
use std::sync::{Arc, OnceLock};

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU32, Ordering};
use vm_memory::{MmapRegion, VolatileSlice};

use super::{DmaRegion, HeapRegion};

/// A word of 32 bits that a device shares.
#[derive(Debug)]
pub struct DeviceWord {
    value: AtomicU32,
    /// Nothing: loom keeps account of who accesses it when.
    plain: UnsafeCell<()>,
}

// SAFETY: the cell holds nothing, and its accounts are loom's, which runs one thread at a time.
unsafe impl Sync for DeviceWord {}

impl DeviceWord {
    fn new() -> Self {
        Self { value: AtomicU32::new(0), plain: UnsafeCell::new(()) }
    }

    /// Loads it.
    pub fn load(&self, order: Ordering) -> u32 {
        self.plain.with(|_| ());
        self.value.load(order)
    }

    /// Stores it.
    pub fn store(&self, value: u32, order: Ordering) {
        if order == Ordering::Relaxed {
            self.plain.with_mut(|_| ());
        }
        self.value.store(value, order);
    }
}

/// Memory in a model.
#[derive(Debug)]
pub struct ModelledRegion {
    words: Arc<[DeviceWord]>,
    iova: u64,
}

impl ModelledRegion {
    /// `words` zeroes, at a device's address that is a multiple of the page size.
    pub fn new(words: usize, iova: u64) -> Self {
        Self { words: (0..words).map(|_| DeviceWord::new()).collect(), iova }
    }
}

/// Bytes that nobody looks at.
fn backing() -> &'static HeapRegion {
    static BACKING: OnceLock<Arc<HeapRegion>> = OnceLock::new();
    BACKING.get_or_init(|| HeapRegion::new(1).expect("a page of memory"))
}

impl DmaRegion for ModelledRegion {
    fn slice(&self) -> VolatileSlice<'_> {
        backing().slice()
    }

    fn iova(&self) -> u64 {
        self.iova
    }

    fn mapping(&self) -> (Arc<MmapRegion>, usize) {
        backing().mapping()
    }

    fn words(&self) -> Arc<[DeviceWord]> {
        Arc::clone(&self.words)
    }
}

/// Direct access to the words of a region.
pub struct DmaCells {
    region: Arc<dyn DmaRegion>,
    words: Arc<[DeviceWord]>,
}

impl DmaCells {
    /// The words of `region`.
    ///
    /// # Panics
    /// If it is not a [`ModelledRegion`].
    pub fn new(region: Arc<dyn DmaRegion>) -> Self {
        Self { words: region.words(), region }
    }

    /// The region.
    pub fn region(&self) -> &Arc<dyn DmaRegion> {
        &self.region
    }

    /// The word of 32 bits at byte `offset`.
    pub fn load_32(&self, offset: usize, order: Ordering) -> u32 {
        u32::from_le(self.words[offset / 4].load(order))
    }

    /// Stores a word of 32 bits at byte `offset`.
    pub fn store_32(&self, offset: usize, value: u32, order: Ordering) {
        self.words[offset / 4].store(value.to_le(), order);
    }

    /// The words of the `index`th entry of a table of entries of `N` words of 32 bits each: little-endian.
    ///
    /// # Panics
    /// If the table has fewer entries.
    pub fn entry_32<const N: usize>(&self, index: u32) -> &[DeviceWord; N] {
        self.words[index as usize * N..][..N].try_into().expect("a slice of that length")
    }

    /// Stores the `index`th entry of a table of entries of `N` words of 64 bits each, given as words in memory order. Relaxed.
    ///
    /// # Panics
    /// If the table has fewer entries.
    pub fn store_entry<const N: usize>(&self, index: u32, entry: [u64; N]) {
        let halves = entry.iter().flat_map(|word| [*word as u32, (*word >> 32) as u32]);
        for (word, half) in self.words[index as usize * N * 2..][..N * 2].iter().zip(halves) {
            word.store(half, Ordering::Relaxed);
        }
    }

    /// Sets every word to zero.
    pub fn clear(&self) {
        for word in &*self.words {
            word.store(0, Ordering::Relaxed);
        }
    }
}

impl fmt::Debug for DmaCells {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaCells").field("iova", &self.region.iova()).finish_non_exhaustive()
    }
}
