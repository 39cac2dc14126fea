//! A namespace in a sparse file.
//!
//! Owns: the image's descriptor and the exclusive advisory lock on it.
//!
//! Invariants: the image remembers nothing but its length; one process at a time has it open for use. Writes go straight
//! to the file, so a killed process loses nothing that completed: the host's page cache plays the volatile cache, and
//! a flush is `fdatasync`.
//!
//! Legal crash outcomes (of the host): everything before the last flush, and every write with FUA, is there. Of later
//! writes any subset of sectors may be.
//!
//! A failed `fdatasync` is final: the kernel may have dropped the dirty pages and would report success next time. From
//! then on flushes and writes fail; reads go on.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};

use super::{Durability, Store, StoreError};
use crate::config::CreateMode;
use crate::dma::{PayloadCursor, ZEROES};
use crate::error::EmulatorError;

/// An open, locked image.
pub(crate) struct FileStore {
    file: Flock<File>,
    /// The file system cannot punch holes; known after the first try.
    no_holes: AtomicBool,
    /// A flush failed. See the module.
    broken: AtomicBool,
}

impl FileStore {
    /// Opens or creates the image and returns it with its length in bytes.
    pub(crate) fn open(
        path: &Path,
        size: Option<u64>,
        create: CreateMode,
    ) -> Result<(Self, u64), EmulatorError> {
        let failed = |source| EmulatorError::Open { path: path.to_owned(), source };
        let (file, fresh) = open_or_create(path, size, create)?;
        let file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(file, errno)| {
            if errno == Errno::EWOULDBLOCK {
                EmulatorError::InUse { path: path.to_owned(), holder: lock_holder(&file) }
            } else {
                failed(errno.into())
            }
        })?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(EmulatorError::NotAFile { path: path.to_owned() });
        }
        let mut length = metadata.len();
        match size {
            // A new image, or one whose creator died before it set the size.
            Some(expected) if fresh || (length == 0 && create == CreateMode::OpenOrCreate) => {
                file.set_len(expected).and_then(|()| file.sync_all()).map_err(failed)?;
                sync_parent(path).map_err(failed)?;
                length = expected;
            }
            Some(expected) if expected != length => {
                return Err(EmulatorError::SizeMismatch { path: path.to_owned(), actual: length, expected });
            }
            _ => {}
        }
        Ok((Self { file, no_holes: AtomicBool::new(false), broken: AtomicBool::new(false) }, length))
    }

    fn check_writable(&self) -> Result<(), StoreError> {
        if self.broken.load(Ordering::Acquire) {
            return Err(StoreError::Write(io::Error::other("an earlier flush failed")));
        }
        Ok(())
    }

    /// Remembers that data may have been lost behind our back.
    fn flush_failed(&self, error: io::Error) -> StoreError {
        tracing::error!(%error, "flushing the image failed: it takes no more writes");
        self.broken.store(true, Ordering::Release);
        StoreError::Write(error)
    }

    fn write_zeroes(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        while len > 0 {
            let step = len.min(ZEROES.len() as u64);
            self.file.write_all_at(&ZEROES[..step as usize], offset)?;
            offset += step;
            len -= step;
        }
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        if !self.no_holes.load(Ordering::Relaxed) {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            let (at, bytes) = (offset.cast_signed(), len.cast_signed());
            loop {
                match fallocate(&*self.file, flags, at, bytes) {
                    Ok(()) => return Ok(()),
                    Err(Errno::EINTR) => {}
                    Err(Errno::EOPNOTSUPP) => break,
                    Err(errno) => return Err(errno.into()),
                }
            }
            self.no_holes.store(true, Ordering::Relaxed);
        }
        self.write_zeroes(offset, len)
    }
}

fn open_or_create(path: &Path, size: Option<u64>, create: CreateMode) -> Result<(File, bool), EmulatorError> {
    let failed = |source| EmulatorError::Open { path: path.to_owned(), source };
    if create != CreateMode::CreateNew {
        match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => return Ok((file, false)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if create == CreateMode::OpenExisting || size.is_none() {
                    return Err(EmulatorError::Missing { path: path.to_owned() });
                }
            }
            Err(e) if e.kind() == io::ErrorKind::IsADirectory => {
                return Err(EmulatorError::NotAFile { path: path.to_owned() });
            }
            Err(e) => return Err(failed(e)),
        }
    }
    if size.is_none() {
        return Err(EmulatorError::Config(format!("creating image {} needs a size", path.display())));
    }
    match OpenOptions::new().read(true).write(true).create_new(true).open(path) {
        Ok(file) => Ok((file, true)),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            Err(EmulatorError::Exists { path: path.to_owned() })
        }
        Err(e) => Err(failed(e)),
    }
}

/// Makes the image's directory entry durable.
fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

/// Looks up who holds the lock on `file` in `/proc/locks`; best effort, for the message only.
fn lock_holder(file: &File) -> Option<u32> {
    let inode = file.metadata().ok()?.ino().to_string();
    let table = std::fs::read_to_string("/proc/locks").ok()?;
    table.lines().find_map(|line| {
        // "1: FLOCK  ADVISORY  WRITE 4711 fe:00:1234 0 EOF"
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, "FLOCK", _, _, pid, place, ..] = fields[..] else { return None };
        (place.rsplit(':').next() == Some(&inode)).then(|| pid.parse().ok()).flatten()
    })
}

impl Store for FileStore {
    fn read(&self, offset: u64, len: usize, into: &mut PayloadCursor<'_>) -> Result<(), StoreError> {
        into.put_from_file(&self.file, offset, len).map_err(StoreError::Read)
    }

    fn write(
        &self,
        offset: u64,
        len: usize,
        from: &mut PayloadCursor<'_>,
        when: Durability,
    ) -> Result<(), StoreError> {
        self.check_writable()?;
        match when {
            Durability::Cached => from.take_to_file(&self.file, offset, len, 0).map_err(StoreError::write),
            Durability::Durable => {
                let done = from.take_to_file(&self.file, offset, len, libc::RWF_DSYNC);
                done.map_err(|error| match StoreError::write(error) {
                    // Whether the write or the sync failed cannot be told apart.
                    StoreError::Write(error) => self.flush_failed(error),
                    other => other,
                })
            }
        }
    }

    fn clear(&self, offset: u64, len: u64, when: Durability) -> Result<(), StoreError> {
        self.check_writable()?;
        if len == 0 {
            return Ok(());
        }
        self.punch(offset, len).map_err(StoreError::write)?;
        if when == Durability::Durable { self.flush() } else { Ok(()) }
    }

    fn flush(&self) -> Result<(), StoreError> {
        self.check_writable()?;
        self.file.sync_data().map_err(|error| self.flush_failed(error))
    }

    fn allocated(&self) -> u64 {
        // `st_blocks` counts 512-byte units whatever the file system's block size.
        self.file.metadata().map_or(0, |m| m.blocks() * 512)
    }

    fn resize(&self, bytes: u64) -> Result<(), StoreError> {
        self.check_writable()?;
        self.file.set_len(bytes).and_then(|()| self.file.sync_all()).map_err(StoreError::write)
    }

    fn is_read_only(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    fn read_host(&self, offset: u64, dst: &mut [u8]) -> Result<(), StoreError> {
        self.file.read_exact_at(dst, offset).map_err(StoreError::Read)
    }

    fn write_host(&self, offset: u64, src: &[u8]) -> Result<(), StoreError> {
        self.check_writable()?;
        self.file.write_all_at(src, offset).map_err(StoreError::write)
    }
}
