//! Memory that somebody else owns, mapped where they say: what a server feeds with its client's DMA mappings.
//!
//! Owns: [`DmaSpace::attach`], [`AttachedRegion`], the kind of access a region grants.
//!
//! Invariants: no two regions of a space overlap, whoever chose their addresses; attached ones may adjoin, but an access
//! that spans two is refused as any other that leaves its region. What an attached region does not grant is refused
//! like memory that is not there.
//!
//! A file that shrinks under its mapping does no harm: what vanished reads as ones, and writes to it are lost (`nvme-sigbus`).

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nvme_sigbus::Watch;
use vm_memory::{FileOffset, MmapRegion};

use super::{DmaDirection, DmaError, DmaSpace, MAP_ALIGN, MAX_REGIONS, Region};
use crate::locks::lock;

/// What the controller may do to a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaAccess {
    /// It may read.
    ReadOnly,
    /// It may write.
    WriteOnly,
    /// It may do both.
    ReadWrite,
}

impl DmaAccess {
    #[inline]
    pub(super) fn allows(self, direction: DmaDirection) -> bool {
        match direction {
            DmaDirection::FromHost => self != Self::WriteOnly,
            DmaDirection::ToHost => self != Self::ReadOnly,
        }
    }

    fn protection(self) -> libc::c_int {
        match self {
            Self::ReadOnly => libc::PROT_READ,
            // Many processors cannot map memory for writing alone.
            Self::WriteOnly | Self::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        }
    }
}

/// A part of a file that the controller can reach. It stays mapped until this is dropped, or
/// [`detach`](DmaSpace::detach) takes it away.
#[derive(Debug)]
pub struct AttachedRegion {
    space: DmaSpace,
    region: Arc<Region>,
}

impl AttachedRegion {
    /// Device address of the first byte.
    pub fn iova(&self) -> u64 {
        self.region.iova
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.region.len()
    }

    /// What the controller may do.
    pub fn access(&self) -> DmaAccess {
        self.region.access
    }
}

impl Drop for AttachedRegion {
    fn drop(&mut self) {
        self.space.unmap(&self.region);
    }
}

impl DmaSpace {
    /// Maps `bytes` bytes of the file behind `fd`, from `offset` on, at device address `iova`. All three are multiples
    /// of 4 KiB. Controller and owner of the file see each other's stores.
    ///
    /// # Errors
    /// [`DmaError`]: something is misaligned, empty, beyond the address space or the end of the file, overlaps what is
    /// mapped already, or the system refuses (a file opened for reading cannot be mapped for writing).
    pub fn attach(
        &self,
        iova: u64,
        fd: OwnedFd,
        offset: u64,
        bytes: usize,
        access: DmaAccess,
    ) -> Result<AttachedRegion, DmaError> {
        if bytes == 0 || !(bytes as u64).is_multiple_of(MAP_ALIGN) {
            return Err(DmaError::BadSize { bytes });
        }
        for (what, value) in [("device address", iova), ("file offset", offset)] {
            if !value.is_multiple_of(MAP_ALIGN) {
                return Err(DmaError::Misaligned { what, value });
            }
        }
        let end = iova.checked_add(bytes as u64).ok_or(DmaError::Wraps { iova, bytes })?;
        let pages = map_file(fd, offset, bytes, access)?;
        let watch = Watch::new(pages.as_ptr() as usize, bytes).map_err(|error| DmaError::File {
            bytes,
            offset,
            detail: error.to_string(),
        })?;
        let mut mappings = lock(&self.shared.mappings);
        if mappings.table.len() >= MAX_REGIONS {
            return Err(DmaError::TooManyRegions);
        }
        if let Some(other) = mappings.overlapping(iova, end) {
            return Err(DmaError::Overlap {
                iova,
                bytes,
                other: other.iova,
                other_bytes: other.pages.size(),
            });
        }
        let region = Arc::new(Region { iova, _watch: Some(watch), pages: Arc::new(pages), access });
        mappings.insert(Arc::clone(&region));
        self.shared.generation.fetch_add(1, Ordering::Release);
        Ok(AttachedRegion { space: self.clone(), region })
    }

    /// Unmaps the region that lies exactly at `iova` with `bytes` bytes, before its owner drops it. Later accesses fail
    /// and are logged; a command being executed may finish with it.
    ///
    /// # Errors
    /// [`DmaError::NotMapped`]: there is no such region. Nothing was changed.
    pub fn detach(&self, iova: u64, bytes: usize) -> Result<(), DmaError> {
        let found = {
            let mappings = lock(&self.shared.mappings);
            mappings.table.iter().find(|r| r.iova == iova && r.pages.size() == bytes).cloned()
        };
        self.unmap(&found.ok_or(DmaError::NotMapped { iova, bytes })?);
        Ok(())
    }
}

fn map_file(fd: OwnedFd, offset: u64, bytes: usize, access: DmaAccess) -> Result<MmapRegion, DmaError> {
    let refused = |detail: String| DmaError::File { bytes, offset, detail };
    let file = File::from(fd);
    let length = file.metadata().map_err(|error| refused(error.to_string()))?.len();
    if offset.checked_add(bytes as u64).is_none_or(|end| end > length) {
        return Err(refused(format!("it is {length} bytes long")));
    }
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
    MmapRegion::build(Some(FileOffset::new(file, offset)), bytes, access.protection(), flags)
        .map_err(|error| refused(error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::dma::Unmapped;

    const IOVA: u64 = 0x10_0000;

    fn file(bytes: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        file
    }

    fn fd(file: &File) -> OwnedFd {
        file.as_fd().try_clone_to_owned().unwrap()
    }

    #[test]
    fn attached_file_is_read_and_written_at_its_address() {
        let space = DmaSpace::new();
        let file = file(3 * 4096);
        let region = space.attach(IOVA, fd(&file), 4096, 8192, DmaAccess::ReadWrite).unwrap();
        assert_eq!((region.iova(), region.bytes(), region.access()), (IOVA, 8192, DmaAccess::ReadWrite));
        file.write_all_at(b"from the owner", 4096 + 100).unwrap();
        let mut view = space.view();
        let mut bytes = [0; 14];
        assert_eq!(view.read(IOVA + 100, &mut bytes), Ok(()));
        assert_eq!(&bytes, b"from the owner");
        let place = view.resolve(IOVA + 8192 - 4, 4, DmaDirection::ToHost).unwrap();
        view.slice(place, 4).copy_from(b"back");
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, 3 * 4096 - 4).unwrap();
        assert_eq!(&bytes, b"back");
        assert_eq!(space.fault_count(), 0);
    }

    #[test]
    fn access_that_is_not_granted_is_a_fault() {
        let space = DmaSpace::new();
        let file = file(8192);
        let _ro = space.attach(IOVA, fd(&file), 0, 4096, DmaAccess::ReadOnly).unwrap();
        let _wo = space.attach(IOVA + 4096, fd(&file), 4096, 4096, DmaAccess::WriteOnly).unwrap();
        let mut view = space.view();
        let (from, to) = (DmaDirection::FromHost, DmaDirection::ToHost);
        assert!(view.resolve(IOVA, 8, from).is_ok());
        assert_eq!(view.resolve(IOVA, 8, to), Err(Unmapped));
        assert_eq!(view.resolve(IOVA + 4096, 8, from), Err(Unmapped));
        assert!(view.resolve(IOVA + 4096, 8, to).is_ok());
        // Regions may adjoin, but an access belongs to one of them.
        assert_eq!(view.resolve(IOVA + 4092, 8, from), Err(Unmapped));
        assert_eq!(space.fault_count(), 3);
    }

    #[test]
    fn overlaps_are_refused_whoever_came_first() {
        let space = DmaSpace::new();
        let mapped = space.map(8192).unwrap();
        let file = file(16 * 4096);
        let attach = |iova, bytes| space.attach(iova, fd(&file), 0, bytes, DmaAccess::ReadWrite);
        let _first = attach(IOVA, 2 * 4096).unwrap();
        for (iova, pages) in
            [(IOVA, 1), (IOVA + 4096, 1), (IOVA - 4096, 2), (IOVA - 4096, 4), (mapped.iova() + 4096, 1)]
        {
            let refused = attach(iova, pages * 4096);
            assert!(matches!(refused, Err(DmaError::Overlap { .. })), "{iova:#x} {pages}: {refused:?}");
        }
        let _neighbours = (attach(IOVA - 4096, 4096).unwrap(), attach(IOVA + 2 * 4096, 4096).unwrap());
    }

    /// The two kinds of regions share the addresses: those given out must evade those asked for.
    #[test]
    fn addresses_given_out_evade_attached_regions() {
        let space = DmaSpace::new();
        let first = space.map(4096).unwrap();
        let file = file(64 << 20);
        let in_the_way = first.iova() + (2 << 20);
        let region = space.attach(in_the_way, fd(&file), 0, 64 << 20, DmaAccess::ReadWrite).unwrap();
        let second = space.map(4096).unwrap();
        assert!(second.iova() > region.iova() + region.bytes());
        let mut view = space.view();
        for iova in [first.iova(), in_the_way, second.iova()] {
            assert_eq!(view.read(iova, &mut [0; 8]), Ok(()));
        }
    }

    #[test]
    fn detached_region_is_gone_and_its_place_free_for_another() {
        let space = DmaSpace::new();
        let file = file(8192);
        let old = space.attach(IOVA, fd(&file), 0, 8192, DmaAccess::ReadWrite).unwrap();
        assert!(matches!(space.detach(IOVA, 4096), Err(DmaError::NotMapped { .. })));
        assert!(matches!(space.detach(IOVA + 4096, 4096), Err(DmaError::NotMapped { .. })));
        space.detach(IOVA, 8192).unwrap();
        let mut view = space.view();
        assert_eq!(view.read(IOVA, &mut [0; 8]), Err(Unmapped));
        let _new = space.attach(IOVA, fd(&file), 0, 8192, DmaAccess::ReadWrite).unwrap();
        drop(old); // must not take the new one with it
        view.refresh();
        assert_eq!(view.read(IOVA, &mut [0; 8]), Ok(()));
    }

    /// A client that shrank what it shared ended the server.
    #[test]
    fn memory_whose_file_shrinks_reads_as_ones_and_swallows_writes() {
        let space = DmaSpace::new();
        let file = file(8192);
        let _region = space.attach(IOVA, fd(&file), 0, 8192, DmaAccess::ReadWrite).unwrap();
        file.set_len(4096).unwrap();
        let mut view = space.view();
        let mut bytes = [0; 16];
        view.read(IOVA + 4096 - 8, &mut bytes).unwrap();
        assert_eq!(bytes, [0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255]);
        let place = view.resolve(IOVA + 4096, 4, DmaDirection::ToHost).unwrap();
        view.slice(place, 4).copy_from(b"lost");
        assert_eq!(file.metadata().unwrap().len(), 4096);
    }

    #[test]
    fn nonsense_is_refused() {
        let space = DmaSpace::new();
        let file = file(8192);
        let attach = |iova, offset, bytes| space.attach(iova, fd(&file), offset, bytes, DmaAccess::ReadOnly);
        assert!(matches!(attach(IOVA, 0, 0), Err(DmaError::BadSize { .. })));
        assert!(matches!(attach(IOVA, 0, 100), Err(DmaError::BadSize { .. })));
        assert!(matches!(attach(IOVA + 8, 0, 4096), Err(DmaError::Misaligned { .. })));
        assert!(matches!(attach(IOVA, 512, 4096), Err(DmaError::Misaligned { .. })));
        assert!(matches!(attach(u64::MAX - 4095, 0, 8192), Err(DmaError::Wraps { .. })));
        assert!(matches!(attach(IOVA, 4096, 8192), Err(DmaError::File { .. })));
        assert!(matches!(attach(IOVA, u64::MAX - 4095, 8192), Err(DmaError::File { .. })));
    }
}
