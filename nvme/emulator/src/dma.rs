//! The memory a controller can reach: what was mapped, and nothing else.
//!
//! Owns: [`DmaSpace`] (the role of an IOMMU), its regions, the per-queue [`DmaView`] that translates addresses
//! without a lock, and the log of accesses that hit nothing.
//!
//! Invariants:
//! - an access is served only if it lies wholly within one mapped region;
//! - regions whose address the space chose never adjoin (a guard gap follows each) and an address is never given out
//!   twice in the life of a space, so that an overrun and a use after unmap are always seen;
//! - a region's pages outlive every view that can still name them.
//!
//! Memory ordering: unmapping increments `generation` with release order *after* the table changed; a view loads it
//! with acquire order before each command and takes the new table when it differs. A command already executing may
//! finish with the old table, as a transfer already on the bus would.
//!
//! Excludes: PRP walking (`prp`), copying to and from files (`dma::payload`).

mod attach;
mod payload;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use nvme_sigbus::Watch;
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

pub use attach::{AttachedRegion, DmaAccess};
pub(crate) use payload::{Payload, PayloadCursor, SegmentList, ZEROES};

use crate::locks::lock;

/// Regions one space can hold at once; the limit of VFIO's type 1 IOMMU.
pub const MAX_REGIONS: usize = 65_535;
/// Accesses outside the mappings that are kept with their details; beyond that they are only counted.
pub const MAX_LOGGED_DMA_FAULTS: usize = 64;

/// Granularity of mappings, in bytes.
const MAP_ALIGN: u64 = 4096;
/// Alignment of a region's device address: lets large pages and large PRP pages be used.
const IOVA_ALIGN: u64 = 2 << 20;
/// First device address given out: far from 0, so that a forgotten address field faults.
const FIRST_IOVA: u64 = 1 << 32;
/// One past the last device address given out: 48-bit, as common IOMMUs.
const IOVA_LIMIT: u64 = 1 << 48;

/// Why memory could not be mapped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DmaError {
    /// The size is zero or not a multiple of 4 KiB.
    #[error("cannot map {bytes} bytes: the size must be a multiple of 4096 and not zero")]
    BadSize {
        /// Bytes asked for.
        bytes: usize,
    },
    /// There are already [`MAX_REGIONS`] regions.
    #[error("cannot map another region: {MAX_REGIONS} are mapped already")]
    TooManyRegions,
    /// The address space of the device is used up.
    #[error("cannot map {bytes} bytes: the device's 48-bit address space is used up")]
    NoAddressSpace {
        /// Bytes asked for.
        bytes: usize,
    },
    /// The system gave no memory.
    #[error("cannot map {bytes} bytes: {detail}")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// The system's reason.
        detail: String,
    },
    /// An address or offset is not a multiple of 4 KiB.
    #[error("cannot map at {what} {value:#x}: it must be a multiple of 4096")]
    Misaligned {
        /// What is misaligned.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// The region would reach beyond the 64-bit address space.
    #[error("cannot map {bytes} bytes at {iova:#x}: they exceed the address space")]
    Wraps {
        /// Device address asked for.
        iova: u64,
        /// Bytes asked for.
        bytes: usize,
    },
    /// Something is mapped there already.
    #[error("cannot map {bytes} bytes at {iova:#x}: {other_bytes} bytes are mapped at {other:#x}")]
    Overlap {
        /// Device address asked for.
        iova: u64,
        /// Bytes asked for.
        bytes: usize,
        /// Device address of what is in the way.
        other: u64,
        /// Bytes of what is in the way.
        other_bytes: usize,
    },
    /// The file cannot be mapped.
    #[error("cannot map {bytes} bytes at offset {offset} of the file: {detail}")]
    File {
        /// Bytes asked for.
        bytes: usize,
        /// Where in the file.
        offset: u64,
        /// The reason.
        detail: String,
    },
    /// There is no region of this address and size.
    #[error("cannot unmap {bytes} bytes at {iova:#x}: no region has this address and size")]
    NotMapped {
        /// Device address.
        iova: u64,
        /// Bytes.
        bytes: usize,
    },
}

/// Which way an access went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaDirection {
    /// The controller read host memory.
    FromHost,
    /// The controller wrote host memory.
    ToHost,
}

/// An access of the controller outside what was mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaFault {
    /// Device address of the first byte.
    pub iova: u64,
    /// Bytes.
    pub len: u64,
    /// Which way.
    pub direction: DmaDirection,
}

impl fmt::Display for DmaFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = match self.direction {
            DmaDirection::FromHost => "read",
            DmaDirection::ToHost => "write",
        };
        write!(f, "{verb} of {} bytes at {:#x}, which is not mapped for it", self.len, self.iova)
    }
}

/// One mapped region: its pages and where the device sees them.
#[derive(Debug)]
struct Region {
    iova: u64,
    /// Pages of somebody else's file may vanish. Dropped before the mapping.
    _watch: Option<Watch>,
    pages: Arc<MmapRegion>,
    access: DmaAccess,
}

impl Region {
    fn len(&self) -> u64 {
        self.pages.size() as u64
    }

    /// One past the last device address; never wraps, as that was checked when the region was mapped.
    fn end(&self) -> u64 {
        self.iova + self.len()
    }

    /// Offset of `iova` in the region if all of `len` bytes lie in it and may be accessed in this direction.
    #[inline]
    fn offset_of(&self, iova: u64, len: u64, direction: DmaDirection) -> Option<usize> {
        let offset = iova.checked_sub(self.iova)?;
        let end = offset.checked_add(len)?;
        (end <= self.len() && self.access.allows(direction)).then_some(offset as usize)
    }
}

/// Regions sorted by address; immutable, replaced as a whole.
type Table = Arc<Vec<Arc<Region>>>;

#[derive(Debug)]
struct Mappings {
    table: Table,
    next_iova: u64,
}

impl Mappings {
    /// A region that shares addresses with `start..end`.
    fn overlapping(&self, start: u64, end: u64) -> Option<&Arc<Region>> {
        let before_end = self.table.partition_point(|region| region.iova < end);
        // Regions do not overlap each other, so the last that begins before `end` reaches furthest.
        self.table[..before_end].last().filter(|region| region.end() > start)
    }

    /// Puts a region that overlaps none into the table.
    fn insert(&mut self, region: Arc<Region>) {
        let mut table = Vec::clone(&self.table);
        let at = table.partition_point(|other| other.iova < region.iova);
        table.insert(at, region);
        self.table = Arc::new(table);
    }

    /// Reserves addresses for `bytes` bytes and a guard gap on either side.
    fn reserve(&mut self, bytes: usize) -> Result<u64, DmaError> {
        let full = DmaError::NoAddressSpace { bytes };
        let mut iova = self.next_iova;
        loop {
            let end = iova.checked_add(bytes as u64 + IOVA_ALIGN).filter(|end| *end <= IOVA_LIMIT);
            let Some(end) = end else { return Err(full) };
            match self.overlapping(iova - IOVA_ALIGN, end).map(|other| other.end()) {
                // Ends: each round begins behind one more region.
                Some(other) => {
                    let behind =
                        other.checked_add(IOVA_ALIGN).and_then(|a| a.checked_next_multiple_of(IOVA_ALIGN));
                    let Some(behind) = behind else { return Err(full) };
                    iova = behind;
                }
                None => {
                    self.next_iova = end.next_multiple_of(IOVA_ALIGN);
                    return Ok(iova);
                }
            }
        }
    }
}

#[derive(Debug)]
struct Shared {
    /// Incremented at each change of the table. See the module's *Memory ordering*.
    generation: AtomicU64,
    mappings: Mutex<Mappings>,
    fault_count: AtomicU64,
    faults: Mutex<Vec<DmaFault>>,
}

/// The device addresses of one controller. Cheap to clone; clones are the same space.
#[derive(Clone, Debug)]
pub struct DmaSpace {
    shared: Arc<Shared>,
}

impl DmaSpace {
    pub(crate) fn new() -> Self {
        let mappings = Mappings { table: Arc::default(), next_iova: FIRST_IOVA };
        Self {
            shared: Arc::new(Shared {
                generation: AtomicU64::new(0),
                mappings: Mutex::new(mappings),
                fault_count: AtomicU64::new(0),
                faults: Mutex::new(Vec::new()),
            }),
        }
    }

    /// Maps `bytes` of fresh zeroed memory (a multiple of 4 KiB) that driver and controller share. It stays mapped
    /// until the region is dropped.
    ///
    /// # Errors
    /// [`DmaError`] if the size is bad or something is exhausted.
    pub fn map(&self, bytes: usize) -> Result<Arc<MappedRegion>, DmaError> {
        if bytes == 0 || !(bytes as u64).is_multiple_of(MAP_ALIGN) {
            return Err(DmaError::BadSize { bytes });
        }
        let pages =
            MmapRegion::new(bytes).map_err(|e| DmaError::OutOfMemory { bytes, detail: e.to_string() })?;
        let mut mappings = lock(&self.shared.mappings);
        if mappings.table.len() >= MAX_REGIONS {
            return Err(DmaError::TooManyRegions);
        }
        let iova = mappings.reserve(bytes)?;
        let region =
            Arc::new(Region { iova, _watch: None, pages: Arc::new(pages), access: DmaAccess::ReadWrite });
        mappings.insert(Arc::clone(&region));
        self.shared.generation.fetch_add(1, Ordering::Release);
        Ok(Arc::new(MappedRegion { space: self.clone(), region }))
    }

    /// Accesses of the controller outside the mappings since the space was made.
    pub fn fault_count(&self) -> u64 {
        self.shared.fault_count.load(Ordering::Relaxed)
    }

    /// The first [`MAX_LOGGED_DMA_FAULTS`] accesses outside the mappings, in the order they were seen.
    pub fn faults(&self) -> Vec<DmaFault> {
        lock(&self.shared.faults).clone()
    }

    /// Takes every mapping away at once, as an IOMMU that blocks a device does: later accesses fail and are logged.
    /// The regions stay usable for the host.
    pub fn revoke(&self) {
        let mut mappings = lock(&self.shared.mappings);
        mappings.table = Arc::default();
        self.shared.generation.fetch_add(1, Ordering::Release);
    }

    pub(crate) fn view(&self) -> DmaView {
        let mut view = DmaView {
            space: self.clone(),
            generation: u64::MAX,
            table: Arc::default(),
            last: 0,
            before: 0,
            sink: None,
        };
        view.refresh();
        view
    }

    /// Takes this region out of the table, if it is still there.
    fn unmap(&self, region: &Arc<Region>) {
        let mut mappings = lock(&self.shared.mappings);
        let mut table = Vec::clone(&mappings.table);
        // By identity: another may have been attached at the same address since.
        table.retain(|other| !Arc::ptr_eq(other, region));
        mappings.table = Arc::new(table);
        self.shared.generation.fetch_add(1, Ordering::Release);
    }

    pub(crate) fn record(&self, fault: DmaFault) {
        self.shared.fault_count.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(target: "nvme_emulator::dma", %fault, "access outside the mappings");
        let mut faults = lock(&self.shared.faults);
        if faults.len() < MAX_LOGGED_DMA_FAULTS {
            faults.push(fault);
        }
    }
}

/// Memory that driver and controller share; unmapped when dropped.
///
/// Drop it only when the controller has no command in flight that names it: later accesses fail and are logged.
#[derive(Debug)]
pub struct MappedRegion {
    space: DmaSpace,
    region: Arc<Region>,
}

impl MappedRegion {
    /// The whole region, as the host sees it; page aligned.
    pub fn slice(&self) -> VolatileSlice<'_> {
        self.region.pages.as_volatile_slice()
    }

    /// Device address of the first byte; the region is contiguous from there.
    pub fn iova(&self) -> u64 {
        self.region.iova
    }

    /// The mapping behind the region: all of it.
    pub fn mapping(&self) -> Arc<MmapRegion> {
        Arc::clone(&self.region.pages)
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.region.pages.size()
    }

    /// Whether the region has no bytes; never the case.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Drop for MappedRegion {
    fn drop(&mut self) {
        self.space.unmap(&self.region);
    }
}

/// Bytes of a view's sink; longer dropped pieces go there part by part.
const SINK_BYTES: usize = 64 << 10;
/// [`Place::region`] of the sink: no table is that long.
const SINK: usize = usize::MAX;

/// A place in mapped memory that a view resolved; valid until the view is refreshed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    region: usize,
    offset: usize,
}

/// An access outside the mappings; already logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unmapped;

/// A queue's own copy of the table: translation without a lock.
#[derive(Debug)]
pub(crate) struct DmaView {
    space: DmaSpace,
    generation: u64,
    table: Table,
    /// Regions of the last two translations: entries and data usually take turns, and a search gets longer with every queue
    /// that others have.
    last: usize,
    before: usize,
    /// Where dropped data goes; made when it is first needed.
    sink: Option<MmapRegion>,
}

impl DmaView {
    /// Takes the current table if it changed. Invalidates every [`Place`].
    #[inline]
    pub(crate) fn refresh(&mut self) {
        // Acquire: partner of the release increments in `map` and `unmap`.
        if self.space.shared.generation.load(Ordering::Acquire) != self.generation {
            self.refresh_slow();
        }
    }

    #[cold]
    fn refresh_slow(&mut self) {
        let mappings = lock(&self.space.shared.mappings);
        // Changed only under the lock that is held, so table and generation belong together.
        self.generation = self.space.shared.generation.load(Ordering::Relaxed);
        self.table = Arc::clone(&mappings.table);
        (self.last, self.before) = (0, 0);
    }

    /// Resolves `len` bytes at `iova`, or logs the fault.
    #[inline]
    pub(crate) fn resolve(&mut self, iova: u64, len: u64, dir: DmaDirection) -> Result<Place, Unmapped> {
        if let Some(offset) = self.table.get(self.last).and_then(|r| r.offset_of(iova, len, dir)) {
            return Ok(Place { region: self.last, offset });
        }
        std::mem::swap(&mut self.last, &mut self.before);
        if let Some(offset) = self.table.get(self.last).and_then(|r| r.offset_of(iova, len, dir)) {
            return Ok(Place { region: self.last, offset });
        }
        self.resolve_slow(iova, len, dir)
    }

    fn resolve_slow(&mut self, iova: u64, len: u64, direction: DmaDirection) -> Result<Place, Unmapped> {
        let after = self.table.partition_point(|region| region.iova <= iova);
        let found =
            after.checked_sub(1).and_then(|i| Some((i, self.table[i].offset_of(iova, len, direction)?)));
        let Some((region, offset)) = found else {
            self.space.record(DmaFault { iova, len, direction });
            return Err(Unmapped);
        };
        self.last = region;
        Ok(Place { region, offset })
    }

    /// Device address of a resolved place.
    pub(crate) fn address_of(&self, place: Place) -> u64 {
        // Dropped data has no address.
        self.table.get(place.region).map_or(u64::MAX, |region| region.iova + place.offset as u64)
    }

    /// The memory at a resolved place.
    #[inline]
    pub(crate) fn slice(&self, place: Place, len: usize) -> VolatileSlice<'_> {
        let region = self.table.get(place.region).map(|region| &*region.pages);
        region
            .or(self.sink.as_ref())
            .expect("a place is in a region of the table, or in the sink that was made for it")
            .get_slice(place.offset, len)
            .expect("a place and its length were checked against the region when it was resolved")
    }

    /// A place that takes up to [`SINK_BYTES`] bytes which nobody will read.
    pub(crate) fn sink(&mut self) -> Result<Place, Unmapped> {
        if self.sink.is_none() {
            self.sink = Some(MmapRegion::new(SINK_BYTES).map_err(|_| Unmapped)?);
        }
        Ok(Place { region: SINK, offset: 0 })
    }

    /// Copies host memory at `iova` into `dst`.
    pub(crate) fn read(&mut self, iova: u64, dst: &mut [u8]) -> Result<(), Unmapped> {
        let place = self.resolve(iova, dst.len() as u64, DmaDirection::FromHost)?;
        self.slice(place, dst.len()).copy_to(dst);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_never_adjoin_and_addresses_are_not_reused() {
        let space = DmaSpace::new();
        let first = space.map(4096).unwrap();
        let second = space.map(3 << 20).unwrap();
        assert!(second.iova() > first.iova() + 4096);
        let old = second.iova();
        drop(second);
        assert!(space.map(4096).unwrap().iova() > old);
    }

    #[test]
    fn access_must_lie_within_one_region() {
        let space = DmaSpace::new();
        let region = space.map(8192).unwrap();
        let mut view = space.view();
        let mut bytes = [0u8; 16];
        assert_eq!(view.read(region.iova() + 8192 - 16, &mut bytes), Ok(()));
        assert_eq!(view.read(region.iova() + 8192 - 15, &mut bytes), Err(Unmapped));
        assert_eq!(view.read(region.iova() - 1, &mut bytes), Err(Unmapped));
        assert_eq!(view.read(u64::MAX - 3, &mut bytes), Err(Unmapped));
        assert_eq!(space.fault_count(), 3);
        assert_eq!(space.faults()[0].iova, region.iova() + 8192 - 15);
    }

    #[test]
    fn unmapped_region_is_gone_after_refresh() {
        let space = DmaSpace::new();
        let keep = space.map(4096).unwrap();
        let region = space.map(4096).unwrap();
        let mut view = space.view();
        let iova = region.iova();
        assert_eq!(view.read(iova, &mut [0; 8]), Ok(()));
        drop(region);
        view.refresh();
        assert_eq!(view.read(iova, &mut [0; 8]), Err(Unmapped));
        assert_eq!(view.read(keep.iova(), &mut [0; 8]), Ok(()));
    }

    /// Whatever was translated before, and in whichever order, an address leads to its own region or nowhere.
    #[test]
    fn accesses_that_take_turns_find_their_own_regions() {
        let space = DmaSpace::new();
        let mut regions: Vec<_> = (0..4).map(|_| space.map(4096).unwrap()).collect();
        let mut view = space.view();
        for round in 0..64 {
            // Two by turns, three by turns, and everything in between.
            for at in [round % 4, (round / 4) % 4, (round / 16) % 4] {
                let place = view.resolve(regions[at].iova() + 8, 8, DmaDirection::FromHost).unwrap();
                assert_eq!(view.address_of(place), regions[at].iova() + 8);
            }
            assert!(view.resolve(regions[3].iova() + 4090, 8, DmaDirection::FromHost).is_err());
        }
        let gone = regions.remove(0).iova();
        view.refresh();
        for region in &regions {
            assert!(view.resolve(gone, 8, DmaDirection::FromHost).is_err());
            let place = view.resolve(region.iova(), 8, DmaDirection::FromHost).unwrap();
            assert_eq!(view.address_of(place), region.iova());
        }
    }

    #[test]
    fn bad_sizes_are_refused() {
        let space = DmaSpace::new();
        assert!(matches!(space.map(0), Err(DmaError::BadSize { .. })));
        assert!(matches!(space.map(4097), Err(DmaError::BadSize { .. })));
    }

    #[test]
    fn fault_log_is_bounded() {
        let space = DmaSpace::new();
        let mut view = space.view();
        for i in 0..MAX_LOGGED_DMA_FAULTS as u64 + 10 {
            assert_eq!(view.read(i * 8, &mut [0; 8]), Err(Unmapped));
        }
        assert_eq!(space.faults().len(), MAX_LOGGED_DMA_FAULTS);
        assert_eq!(space.fault_count(), MAX_LOGGED_DMA_FAULTS as u64 + 10);
    }
}
