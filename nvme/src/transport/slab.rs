//! DMA memory for transports that map file descriptors: [`SlabMemory`], the [`DmaMapper`] that a transport implements, and
//! the [`SlabPool`] that cuts slabs into regions.
//!
//! Mapping is slow and the number of mappings bounded, so small regions share slabs. Large ones have a slab of their own.
//!
//! Invariants:
//! - a page belongs to at most one region, and a region lies in one slab;
//! - a region is all zeroes when it is handed out, whoever had its pages before;
//! - a slab is unmapped only when no region lies in it; one empty shared slab is kept. A region that is never dropped
//!   (quarantine) therefore keeps its slab mapped;
//! - slab memory is allocated before it is touched: running out is an error, never SIGBUS.
//!
//! *Memory ordering*: zeroing is by plain stores; the doorbell that announces the region publishes them.
//!
//! Excludes: IOVAs and how memory is mapped, which is the transport's [`DmaMapper`].

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use reactor::dma::{DmaRegion, PAGE_SIZE};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use super::TransportError;

/// Bytes that slabs are a multiple of: a huge page.
pub const SLAB_UNIT: usize = 2 << 20;
/// Bytes of a slab that small regions share.
pub const SHARED_SLAB: usize = 16 << 20;
/// Regions larger than this have a slab of their own.
pub const LARGEST_SHARED: usize = 4 << 20;

const ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// Zeroed memory behind a descriptor, present when it is made: huge pages if the system has enough free, else normal
/// ones.
#[derive(Debug)]
pub struct SlabMemory {
    mapping: Arc<MmapRegion>,
    page_bytes: usize,
}

impl SlabMemory {
    /// Allocates `bytes`, rounded up to whole [`SLAB_UNIT`]s.
    ///
    /// # Errors
    /// What the system says of normal pages; that there are no huge ones is none.
    pub fn new(bytes: usize) -> io::Result<Self> {
        let whole = whole_units(bytes)?;
        Self::with_pages(whole, MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB, SLAB_UNIT)
            .or_else(|_| Self::of_normal_pages(bytes))
    }

    /// [`Self::new`], without huge pages.
    fn of_normal_pages(bytes: usize) -> io::Result<Self> {
        Self::with_pages(whole_units(bytes)?, MFdFlags::empty(), PAGE_SIZE)
    }

    fn with_pages(bytes: usize, pages: MFdFlags, page_bytes: usize) -> io::Result<Self> {
        let fd = memfd_create("pollux-dma", pages | MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        ftruncate(&fd, bytes as i64)?;
        // Who maps it elsewhere can rely on its size, and so can we if the descriptor is passed on.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals))?;
        // Takes every page now, so that a shortage is an error here instead of a signal at the first touch.
        fallocate(&fd, FallocateFlags::empty(), 0, bytes as i64)?;
        let file = FileOffset::new(OwnedFd::into(fd), 0);
        // MAP_POPULATE: mapping for a device pins pages, which takes twenty times as long if they are absent.
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        let mapping = MmapRegion::build(Some(file), bytes, libc::PROT_READ | libc::PROT_WRITE, flags)
            .map_err(io::Error::other)?;
        Ok(Self { mapping: Arc::new(mapping), page_bytes })
    }

    /// The descriptor to map. The memory begins at [`offset`](Self::offset) of it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.mapping.file_offset().expect("`with_pages` maps a file").file().as_fd()
    }

    /// Where in the descriptor the memory begins, in bytes.
    pub fn offset(&self) -> u64 {
        0
    }

    /// Bytes.
    pub fn bytes(&self) -> usize {
        self.mapping.size()
    }

    /// Virtual address of the first byte, for interfaces that map by address. Mapped while `self` lives.
    pub fn address(&self) -> u64 {
        self.mapping.as_ptr() as u64
    }

    /// Bytes of a page. An IOVA must be a multiple of it for large IOMMU pages to be used.
    pub fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// All of it.
    pub fn slice(&self) -> VolatileSlice<'_> {
        self.mapping.as_volatile_slice()
    }
}

/// Bytes rounded up to whole [`SLAB_UNIT`]s.
fn whole_units(bytes: usize) -> io::Result<usize> {
    bytes
        .checked_next_multiple_of(SLAB_UNIT)
        .filter(|&bytes| bytes > 0 && i64::try_from(bytes).is_ok())
        .ok_or_else(|| io::Error::from(Errno::EINVAL))
}

/// Makes memory reachable for the device.
pub trait DmaMapper: Send + Sync {
    /// Maps all of `memory` for reading and writing, and returns the IOVA of its first byte: page aligned,
    /// [`SLAB_UNIT`] aligned where possible. It stays mapped until [`unmap`](Self::unmap).
    ///
    /// # Errors
    /// It cannot be mapped; then nothing of it is.
    fn map(&self, memory: &SlabMemory) -> Result<u64, TransportError>;

    /// Undoes one [`map`](Self::map), with its address and length. The memory is freed afterwards: an implementation that
    /// fails must see to it that the device cannot reach it anyhow, or keep the descriptor open.
    fn unmap(&self, iova: u64, bytes: u64);
}

/// DMA memory by way of a mapper.
pub struct SlabPool<M: DmaMapper> {
    mapper: M,
    max_slabs: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Shared slabs and large ones.
    slabs: Vec<Entry>,
    /// Slabs that are mapped, or being mapped or unmapped: what the limit counts.
    mapped: usize,
}

struct Entry {
    slab: Arc<Slab>,
    free: Extents,
    /// Pages that had an owner before, and so must be zeroed.
    used: Vec<bool>,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Shared,
    Large,
}

struct Slab {
    memory: SlabMemory,
    iova: u64,
}

impl<M: DmaMapper + 'static> SlabPool<M> {
    /// A pool that has at most `max_slabs` slabs mapped at a time.
    pub fn new(mapper: M, max_slabs: usize) -> Arc<Self> {
        Arc::new(Self { mapper, max_slabs, state: Mutex::default() })
    }

    /// The mapper.
    pub fn mapper(&self) -> &M {
        &self.mapper
    }

    /// Slabs that are mapped now.
    pub fn mapped_slabs(&self) -> usize {
        self.lock().mapped
    }

    /// Zeroed memory of `bytes`, rounded up to whole pages, contiguous for the device.
    ///
    /// # Errors
    /// There is no memory, no room in the number of slabs, or it cannot be mapped.
    pub fn allocate(self: &Arc<Self>, bytes: usize) -> Result<Arc<dyn DmaRegion>, TransportError> {
        let refused = |reason: String| TransportError::Memory { bytes, reason };
        let pages = bytes.div_ceil(PAGE_SIZE);
        if pages == 0 {
            return Err(refused("a region has at least one byte".into()));
        }
        let kind = if bytes > LARGEST_SHARED { Kind::Large } else { Kind::Shared };
        {
            let mut state = self.lock();
            let found = if kind == Kind::Shared { state.take(pages) } else { None };
            if let Some((slab, page)) = found {
                drop(state);
                return Ok(self.region(slab, page, pages));
            }
            if state.mapped >= self.max_slabs {
                let limit = self.max_slabs;
                return Err(refused(format!(
                    "the transport maps at most {limit} pieces of memory at a time"
                )));
            }
            state.mapped += 1;
        }
        // Not under the lock: this takes milliseconds.
        let mapped = self.map_slab(if kind == Kind::Large { bytes } else { SHARED_SLAB });
        let mut state = self.lock();
        let mut entry = match mapped {
            Ok(slab) => Entry::new(slab, kind),
            Err(error) => {
                state.mapped -= 1;
                return Err(match error {
                    TransportError::Memory { reason, .. } => refused(reason),
                    other => other,
                });
            }
        };
        let page = entry.take(pages).expect("a new slab has room for what it was made for");
        let slab = Arc::clone(&entry.slab);
        state.slabs.push(entry);
        drop(state);
        Ok(self.region(slab, page, pages))
    }

    fn map_slab(&self, bytes: usize) -> Result<Arc<Slab>, TransportError> {
        let failed = |error: io::Error| TransportError::Memory { bytes, reason: error.to_string() };
        let memory = SlabMemory::new(bytes).map_err(failed)?;
        match self.mapper.map(&memory) {
            Ok(iova) => Ok(Arc::new(Slab { memory, iova })),
            // Huge pages are a convenience, and not everybody takes them: a server that insists on sealed memory does not.
            Err(refused) if memory.page_bytes > PAGE_SIZE => {
                tracing::debug!(%refused, "huge pages are refused: normal ones instead");
                drop(memory);
                let memory = SlabMemory::of_normal_pages(bytes).map_err(failed)?;
                let iova = self.mapper.map(&memory)?;
                Ok(Arc::new(Slab { memory, iova }))
            }
            Err(refused) => Err(refused),
        }
    }

    fn region(self: &Arc<Self>, slab: Arc<Slab>, page: usize, pages: usize) -> Arc<dyn DmaRegion> {
        Arc::new(SlabRegion { pool: Arc::clone(self), slab, page, pages })
    }

    /// Gives pages back, and the slab if it is not needed any more.
    fn release(&self, slab: &Arc<Slab>, page: usize, pages: usize) {
        let surplus = self.lock().give(slab, page, pages);
        if let Some(surplus) = surplus {
            self.unmap(&surplus);
            self.lock().mapped -= 1;
        }
    }
}

impl<M: DmaMapper> SlabPool<M> {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unmap(&self, slab: &Slab) {
        self.mapper.unmap(slab.iova, slab.memory.bytes() as u64);
    }
}

impl<M: DmaMapper> Drop for SlabPool<M> {
    fn drop(&mut self) {
        // Regions hold the pool, so none is left.
        let slabs = std::mem::take(&mut self.lock().slabs);
        for entry in slabs {
            self.unmap(&entry.slab);
        }
    }
}

impl State {
    /// Pages of a shared slab that has room.
    fn take(&mut self, pages: usize) -> Option<(Arc<Slab>, usize)> {
        let shared = self.slabs.iter_mut().filter(|entry| entry.kind == Kind::Shared);
        shared.into_iter().find_map(|entry| Some((Arc::clone(&entry.slab), entry.take(pages)?)))
    }

    /// Takes pages back. Returns the slab if it is to be unmapped.
    fn give(&mut self, slab: &Arc<Slab>, page: usize, pages: usize) -> Option<Arc<Slab>> {
        let index = self
            .slabs
            .iter()
            .position(|entry| Arc::ptr_eq(&entry.slab, slab))
            .expect("a slab is listed while a region lies in it");
        self.slabs[index].free.give(page, pages);
        let empty_shared = self.slabs.iter().filter(|entry| entry.kind == Kind::Shared && entry.is_empty());
        let entry = &self.slabs[index];
        let surplus = entry.is_empty() && (entry.kind == Kind::Large || empty_shared.count() > 1);
        surplus.then(|| self.slabs.swap_remove(index).slab)
    }
}

impl Entry {
    fn new(slab: Arc<Slab>, kind: Kind) -> Self {
        let pages = slab.memory.bytes() / PAGE_SIZE;
        Self { slab, free: Extents::new(pages), used: vec![false; pages], kind }
    }

    fn is_empty(&self) -> bool {
        self.free.free == self.used.len()
    }

    /// Takes pages and zeroes those that need it.
    fn take(&mut self, pages: usize) -> Option<usize> {
        let first = self.free.take(pages)?;
        let whole = self.slab.memory.slice();
        for page in first..first + pages {
            if std::mem::replace(&mut self.used[page], true) {
                let slice = whole.subslice(page * PAGE_SIZE, PAGE_SIZE);
                slice.expect("a slab's pages lie in it").copy_from(&ZERO_PAGE);
            }
        }
        Some(first)
    }
}

/// Free pages of a slab: runs that neither touch nor overlap, first fit.
#[derive(Debug)]
pub(super) struct Extents {
    /// First page to number of pages.
    runs: BTreeMap<usize, usize>,
    free: usize,
}

impl Extents {
    pub(super) fn new(pages: usize) -> Self {
        Self { runs: BTreeMap::from([(0, pages)]), free: pages }
    }

    pub(super) fn take(&mut self, pages: usize) -> Option<usize> {
        let (&first, &length) = self.runs.iter().find(|&(_, &length)| length >= pages)?;
        self.runs.remove(&first);
        if length > pages {
            self.runs.insert(first + pages, length - pages);
        }
        self.free -= pages;
        Some(first)
    }

    pub(super) fn give(&mut self, first: usize, pages: usize) {
        let before = self.runs.range(..first).next_back().map(|(&first, &length)| (first, length));
        let after = self.runs.range(first..).next().map(|(&first, &length)| (first, length));
        assert!(before.is_none_or(|(start, length)| start + length <= first), "pages freed twice");
        assert!(after.is_none_or(|(start, _)| first + pages <= start), "pages freed twice");
        let (mut start, mut length) = (first, pages);
        if let Some((start_before, length_before)) = before.filter(|(s, l)| s + l == first) {
            (start, length) = (start_before, length + length_before);
        }
        if let Some((start_after, length_after)) = after.filter(|(s, _)| *s == first + pages) {
            self.runs.remove(&start_after);
            length += length_after;
        }
        self.runs.insert(start, length);
        self.free += pages;
    }
}

/// Pages of a slab with one owner.
struct SlabRegion<M: DmaMapper + 'static> {
    pool: Arc<SlabPool<M>>,
    slab: Arc<Slab>,
    page: usize,
    pages: usize,
}

impl<M: DmaMapper> DmaRegion for SlabRegion<M> {
    fn slice(&self) -> VolatileSlice<'_> {
        let whole = self.slab.memory.slice();
        whole.subslice(self.page * PAGE_SIZE, self.pages * PAGE_SIZE).expect("a region lies in its slab")
    }

    fn iova(&self) -> u64 {
        self.slab.iova + (self.page * PAGE_SIZE) as u64
    }

    fn mapping(&self) -> (Arc<MmapRegion>, usize) {
        (Arc::clone(&self.slab.memory.mapping), self.page * PAGE_SIZE)
    }
}

impl<M: DmaMapper> Drop for SlabRegion<M> {
    fn drop(&mut self) {
        self.pool.release(&self.slab, self.page, self.pages);
    }
}

#[cfg(test)]
mod tests;
