//! QEMU's RAM file as DMA memory: locked, mapped whole, cut into regions.
//!
//! Invariants:
//! - a page belongs to at most one region, which is all zeroes when it is handed out;
//! - nothing below [`FIRST_BYTE`] or at or above [`RAM_LIMIT`] is handed out: there the machine has other things than RAM;
//! - the file is locked until the last region is gone.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::libc;
use reactor::dma::{DmaRegion, PAGE_SIZE};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use super::QtestError;
use crate::transport::TransportError;
use crate::transport::slab::Extents;

/// A PC's first megabyte holds video memory and firmware.
const FIRST_BYTE: usize = 1 << 20;
/// RAM is contiguous from 0 up to here on both of QEMU's PC machines.
const RAM_LIMIT: usize = 2 << 30;
/// Less is no use: queues alone need some megabytes.
const MIN_RAM: usize = 16 << 20;

const ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// The file, mapped.
pub(super) struct Ram {
    mapping: Arc<MmapRegion>,
    free: Mutex<Extents>,
    /// Held for its lock.
    _lock: Flock<File>,
}

impl Ram {
    pub(super) fn open(path: &Path) -> Result<Arc<Self>, QtestError> {
        let refused = |reason: String| QtestError::Ram { path: path.to_owned(), reason };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|error| refused(error.to_string()))?;
        let mapped = file.try_clone().map_err(|error| refused(error.to_string()))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            Errno::EWOULDBLOCK => QtestError::InUse { path: path.to_owned() },
            other => refused(format!("cannot lock it: {other}")),
        })?;
        let bytes = lock.metadata().map_err(|error| refused(error.to_string()))?.len();
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX).min(RAM_LIMIT) / PAGE_SIZE * PAGE_SIZE;
        if bytes < MIN_RAM {
            return Err(refused(format!("it has {bytes} bytes, at least {MIN_RAM} are needed")));
        }
        let mapping = MmapRegion::build(
            Some(FileOffset::new(mapped, 0)),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
        )
        .map_err(|error| refused(format!("cannot map it: {error}")))?;
        let mut free = Extents::new(bytes / PAGE_SIZE);
        // First fit: these are the first pages.
        free.take(FIRST_BYTE / PAGE_SIZE).expect("there is more memory than that");
        Ok(Arc::new(Self { mapping: Arc::new(mapping), free: Mutex::new(free), _lock: lock }))
    }

    /// Zeroed memory of `bytes`, rounded up to whole pages.
    pub(super) fn allocate(self: &Arc<Self>, bytes: usize) -> Result<Arc<dyn DmaRegion>, TransportError> {
        let refused = |reason: &str| TransportError::Memory { bytes, reason: reason.to_owned() };
        let pages = bytes.div_ceil(PAGE_SIZE);
        if pages == 0 {
            return Err(refused("a region has at least one byte"));
        }
        let found = self.free.lock().unwrap_or_else(PoisonError::into_inner).take(pages);
        let page = found.ok_or_else(|| refused("QEMU's RAM is used up; give it more (`-m`)"))?;
        let region = Region { ram: Arc::clone(self), page, pages };
        for index in 0..pages {
            let slice = region.slice().subslice(index * PAGE_SIZE, PAGE_SIZE);
            slice.expect("a region's pages lie in it").copy_from(&ZERO_PAGE);
        }
        Ok(Arc::new(region))
    }
}

/// Pages with one owner.
struct Region {
    ram: Arc<Ram>,
    page: usize,
    pages: usize,
}

impl DmaRegion for Region {
    fn slice(&self) -> VolatileSlice<'_> {
        let whole = self.ram.mapping.as_volatile_slice();
        whole.subslice(self.page * PAGE_SIZE, self.pages * PAGE_SIZE).expect("a region lies in the file")
    }

    fn iova(&self) -> u64 {
        (self.page * PAGE_SIZE) as u64
    }

    fn mapping(&self) -> (Arc<MmapRegion>, usize) {
        (Arc::clone(&self.ram.mapping), self.page * PAGE_SIZE)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.ram.free.lock().unwrap_or_else(PoisonError::into_inner).give(self.page, self.pages);
    }
}
