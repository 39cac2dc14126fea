//! Memory that a client has given.
//!
//! Owns: the client's mappings by IOVA, their number, and the check of what is behind them.
//!
//! Invariant: everything is taken away when this is dropped. A command that is being executed may finish with memory
//! that was unmapped meanwhile, as a transfer on the bus would; the pages stay valid until then.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use vfio_user_protocol::{DmaFlags, DmaMap, DmaUnmap, UnmapFlags};

use super::ClientMemory;
use crate::dma::{AttachedRegion, DmaAccess, DmaError, DmaSpace};

/// Mappings that a client may have.
pub(super) const MAX_MAPPINGS: usize = 1024;

struct Mapping {
    bytes: u64,
    /// `None`: memory without a descriptor, which the controller cannot reach.
    _region: Option<AttachedRegion>,
}

/// A client's mappings.
pub(super) struct Memory {
    space: DmaSpace,
    allowed: ClientMemory,
    mappings: BTreeMap<u64, Mapping>,
}

impl Memory {
    pub(super) fn new(space: &DmaSpace, allowed: ClientMemory) -> Self {
        Self { space: space.clone(), allowed, mappings: BTreeMap::new() }
    }

    pub(super) fn map(&mut self, request: &DmaMap, fd: Option<OwnedFd>) -> Result<(), Errno> {
        let (iova, bytes) = (request.address.get(), request.size.get());
        let flags = DmaFlags::from_bits(request.flags.get()).ok_or(Errno::EINVAL)?;
        if self.mappings.len() >= MAX_MAPPINGS {
            return Err(Errno::ENOSPC);
        }
        let end = iova.checked_add(bytes).filter(|&end| end > iova).ok_or(Errno::EINVAL)?;
        if self.overlaps(iova, end) {
            return Err(Errno::EEXIST);
        }
        let access = match (flags.contains(DmaFlags::READ), flags.contains(DmaFlags::WRITE)) {
            (true, true) => Some(DmaAccess::ReadWrite),
            (true, false) => Some(DmaAccess::ReadOnly),
            (false, true) => Some(DmaAccess::WriteOnly),
            (false, false) => None,
        };
        let region = match (fd, access) {
            (Some(fd), Some(access)) => {
                self.check(&fd)?;
                let bytes = usize::try_from(bytes).map_err(|_| Errno::EINVAL)?;
                let attached = self.space.attach(iova, fd, request.offset.get(), bytes, access);
                Some(attached.map_err(|error| refused(&error))?)
            }
            _ => {
                tracing::debug!(iova, bytes, "memory without a descriptor cannot be reached");
                None
            }
        };
        self.mappings.insert(iova, Mapping { bytes, _region: region });
        Ok(())
    }

    pub(super) fn unmap(&mut self, request: &DmaUnmap) -> Result<(), Errno> {
        let flags = UnmapFlags::from_bits(request.flags.get()).ok_or(Errno::EINVAL)?;
        let (iova, bytes) = (request.address.get(), request.size.get());
        if flags.contains(UnmapFlags::DIRTY_BITMAP) {
            return Err(Errno::ENOTSUP);
        }
        if flags.contains(UnmapFlags::ALL) {
            if (iova, bytes) != (0, 0) {
                return Err(Errno::EINVAL);
            }
            self.mappings.clear();
            return Ok(());
        }
        match self.mappings.get(&iova) {
            Some(mapping) if mapping.bytes == bytes => {
                self.mappings.remove(&iova);
                Ok(())
            }
            // Parts cannot be unmapped.
            Some(_) => Err(Errno::EINVAL),
            None => Err(Errno::ENOENT),
        }
    }

    fn overlaps(&self, iova: u64, end: u64) -> bool {
        let before = self.mappings.range(..end).next_back();
        // Ends are beyond beginnings and were checked against overflow when they were mapped.
        before.is_some_and(|(start, mapping)| start + mapping.bytes > iova)
    }

    /// Seals the file behind `fd` against shrinking if that is possible.
    fn check(&self, fd: &OwnedFd) -> Result<(), Errno> {
        // Fails for what is no memfd, or was made without room for seals.
        let _ = fcntl(fd.as_fd(), FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK));
        if self.allowed == ClientMemory::Any {
            return Ok(());
        }
        let seals = fcntl(fd.as_fd(), FcntlArg::F_GET_SEALS).unwrap_or(0);
        let sealed = SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK);
        let huge = nix::sys::statfs::fstatfs(fd)
            .is_ok_and(|system| system.filesystem_type() == nix::sys::statfs::HUGETLBFS_MAGIC);
        if sealed && !huge {
            return Ok(());
        }
        tracing::warn!("memory of the client is refused: it is not a memfd sealed against shrinking");
        Err(Errno::EPERM)
    }
}

fn refused(error: &DmaError) -> Errno {
    tracing::warn!(%error, "memory of the client cannot be mapped");
    match error {
        DmaError::Overlap { .. } => Errno::EEXIST,
        DmaError::TooManyRegions => Errno::ENOSPC,
        _ => Errno::EINVAL,
    }
}
