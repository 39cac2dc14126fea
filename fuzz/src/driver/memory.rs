//! DMA memory whose release is noticed, cut from an arena that a thread keeps.
//!
//! Owns: [`Memory`], the regions that one run's driver was given. An abandoned controller's memory is leaked on purpose; from
//! the arena, what leaks is a few words.
//!
//! Invariants: regions of one run never overlap, and their addresses depend on the run alone.

use std::cell::RefCell;
use std::sync::{Arc, Weak};

use reactor::dma::{DmaRegion, HeapRegion, PAGE_SIZE};
use vm_memory::volatile_memory::VolatileMemory;
use vm_memory::{Bytes, MmapRegion, VolatileSlice};

/// Bytes that one run's driver can have.
pub(super) const ARENA_BYTES: usize = 8 << 20;
/// Address of the first region: above 4 GiB, so that a truncation is noticed.
const FIRST_IOVA: u64 = 1 << 32;

thread_local! {
    static ARENA: RefCell<Option<Arc<MmapRegion>>> = const { RefCell::new(None) };
}

fn arena() -> Arc<MmapRegion> {
    ARENA.with_borrow_mut(|kept| {
        let arena = kept.get_or_insert_with(|| {
            HeapRegion::new(ARENA_BYTES).expect("a machine that fuzzes has a few MiB").mapping().0
        });
        Arc::clone(arena)
    })
}

struct Piece {
    arena: Arc<MmapRegion>,
    offset: usize,
    bytes: usize,
}

impl DmaRegion for Piece {
    fn slice(&self) -> VolatileSlice<'_> {
        self.arena.get_slice(self.offset, self.bytes).expect("the piece was cut from the arena")
    }

    fn iova(&self) -> u64 {
        iova_of(self.offset)
    }

    fn mapping(&self) -> (Arc<MmapRegion>, usize) {
        (Arc::clone(&self.arena), self.offset)
    }
}

fn iova_of(offset: usize) -> u64 {
    FIRST_IOVA + offset as u64
}

/// An access that an IOMMU would stop.
#[derive(Debug)]
pub(super) struct Unmapped;

/// What one run's driver was given.
#[derive(Default)]
pub(super) struct Memory {
    pieces: Vec<Weak<Piece>>,
    used: usize,
}

impl Memory {
    /// A zeroed region, while the arena has room.
    pub(super) fn allocate(&mut self, bytes: usize) -> Option<Arc<dyn DmaRegion>> {
        let bytes = bytes.max(1).next_multiple_of(PAGE_SIZE);
        // A page of gap catches overruns.
        let next = self.used.checked_add(bytes)?.checked_add(PAGE_SIZE)?;
        if next > ARENA_BYTES {
            return None;
        }
        let piece = Arc::new(Piece { arena: arena(), offset: self.used, bytes });
        self.used = next;
        zero(&piece.slice());
        self.pieces.push(Arc::downgrade(&piece));
        Some(piece)
    }

    /// Regions that are not released.
    pub(super) fn alive(&self) -> usize {
        self.pieces.iter().filter(|piece| piece.strong_count() > 0).count()
    }

    fn find(&self, iova: u64, bytes: usize) -> Result<(Arc<Piece>, usize), Unmapped> {
        let end = iova.checked_add(bytes as u64).ok_or(Unmapped)?;
        let found = self.pieces.iter().filter_map(Weak::upgrade).find(|piece| {
            let start = piece.iova();
            iova >= start && end <= start + piece.bytes as u64
        });
        let piece = found.ok_or(Unmapped)?;
        let offset = (iova - piece.iova()) as usize;
        Ok((piece, offset))
    }

    pub(super) fn read(&self, iova: u64, into: &mut [u8]) -> Result<(), Unmapped> {
        let (piece, offset) = self.find(iova, into.len())?;
        piece.slice().read_slice(into, offset).map_err(|_| Unmapped)
    }

    pub(super) fn write(&self, iova: u64, data: &[u8]) -> Result<(), Unmapped> {
        let (piece, offset) = self.find(iova, data.len())?;
        piece.slice().write_slice(data, offset).map_err(|_| Unmapped)
    }
}

fn zero(slice: &VolatileSlice<'_>) {
    const ZEROES: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
    for offset in (0..slice.len()).step_by(PAGE_SIZE) {
        slice.write_slice(&ZEROES, offset).expect("a region is whole pages long");
    }
}
