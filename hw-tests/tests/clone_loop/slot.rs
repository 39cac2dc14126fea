//! The files of a cloner, which nobody else writes to.
//!
//! Owns: [`Slot`], a file of which every byte is known, and what is done to it: clones of sources and of other slots, cuts,
//! holes, mapped stores.

use std::fs::{File, OpenOptions};
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, ensure};
use hw_tests::{Random, read_file};
use nix::fcntl::{FallocateFlags, PosixFadviseAdvice};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::source::{BLOCK, FIRM, Seen, Source, TAIL};

/// A file of a cloner, and what must be in it.
pub(crate) struct Slot {
    pub(crate) path: PathBuf,
    pub(crate) bytes: Vec<u8>,
}

impl Slot {
    pub(crate) fn open(&self) -> Result<File> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).open(&self.path);
        file.with_context(|| self.path.display().to_string())
    }

    pub(crate) fn check(&self, after: &str) -> Result<()> {
        let found = read_file(&self.path)?;
        ensure!(
            found == self.bytes,
            "{} after {after}: {} bytes instead of {}; the first that differs is {:?}",
            self.path.display(),
            found.len(),
            self.bytes.len(),
            found.iter().zip(&self.bytes).position(|(one, other)| one != other)
        );
        Ok(())
    }

    /// Becomes a clone of a source, whoever writes to it.
    pub(crate) fn clone_source(&mut self, source: &Source) -> Result<()> {
        let (from, to) = (source.open(0)?, self.open()?);
        let confirmed = source.confirmed();
        let length = copy(&from, 0, &to, 0, u64::MAX)?;
        to.set_len(length)?;
        drop(to);
        self.bytes = read_file(&self.path)?;
        ensure!(
            self.bytes.len() as u64 == length && length >= FIRM * BLOCK,
            "a clone of {length} bytes has {}",
            self.bytes.len()
        );
        let (firm, tail) = self.bytes.split_at((FIRM * BLOCK) as usize);
        for ((block, bytes), confirmed) in (0..).zip(firm.chunks(BLOCK as usize)).zip(confirmed) {
            source.check(bytes, block, confirmed, Seen::Clone)?;
        }
        source.check_tail(tail)
    }

    /// Gets a range of itself, elsewhere.
    pub(crate) fn clone_itself(&mut self, random: &mut Random) -> Result<()> {
        let half = self.bytes.len() as u64 / BLOCK / 2;
        if half == 0 {
            return Ok(());
        }
        let from = random.below(half);
        let length = 1 + random.below(half - from);
        let to = half + random.below(half);
        let (from, length, to) = (from * BLOCK, length * BLOCK, to * BLOCK);
        let file = self.open()?;
        let copied = copy(&file, from, &file, to, length)?;
        ensure!(copied == length, "{copied} bytes were cloned instead of {length}");
        let end = (to + length) as usize;
        self.bytes.resize(self.bytes.len().max(end), 0);
        self.bytes.copy_within(from as usize..(from + length) as usize, to as usize);
        Ok(())
    }

    /// Gets a range of another of the cloner's files.
    pub(crate) fn clone_range(&mut self, other: &Self, random: &mut Random) -> Result<()> {
        let (blocks, own) = (other.bytes.len() as u64 / BLOCK, self.bytes.len() as u64 / BLOCK);
        if blocks == 0 {
            return Ok(());
        }
        let from = random.below(blocks);
        let (length, to) = (1 + random.below(blocks - from), random.below(own + 1));
        let (from, length, to) = (from * BLOCK, length * BLOCK, to * BLOCK);
        let copied = copy(&File::open(&other.path)?, from, &self.open()?, to, length)?;
        ensure!(copied == length, "{copied} bytes were cloned instead of {length}");
        let end = (to + length) as usize;
        self.bytes.resize(self.bytes.len().max(end), 0);
        self.bytes[to as usize..end].copy_from_slice(&other.bytes[from as usize..(from + length) as usize]);
        Ok(())
    }

    pub(crate) fn cut(&mut self, random: &mut Random) -> Result<()> {
        let file = self.open()?;
        for _ in 0..2 {
            let size = random.below((FIRM + TAIL) * BLOCK);
            file.set_len(size)?;
            self.bytes.resize(size as usize, 0);
        }
        Ok(())
    }

    /// Holes, zeroes, blocks that are only allocated.
    pub(crate) fn dig(&mut self, random: &mut Random) -> Result<()> {
        let size = self.bytes.len() as u64;
        let start = random.below(size);
        let end = (start + 1 + random.below(128 * BLOCK)).min(size);
        if start >= end {
            return Ok(());
        }
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (how, zeroes) = match random.below(3) {
            0 => (keep | FallocateFlags::FALLOC_FL_PUNCH_HOLE, true),
            1 => (keep | FallocateFlags::FALLOC_FL_ZERO_RANGE, true),
            _ => (keep, false),
        };
        let length = i64::try_from(end - start)?;
        nix::fcntl::fallocate(&self.open()?, how, i64::try_from(start)?, length)
            .with_context(|| format!("{how:?} of {length} bytes from {start} on"))?;
        if zeroes {
            self.bytes[start as usize..end as usize].fill(0);
        }
        Ok(())
    }

    pub(crate) fn store(&mut self, random: &mut Random) -> Result<()> {
        let length = self.bytes.len() as u64 / 8 * 8;
        if length == 0 {
            return Ok(());
        }
        let file = self.open()?;
        let mapping = map(file.try_clone()?, length)?;
        for _ in 0..64 {
            let (at, word) = (random.below(length / 8) * 8, random.next_u64());
            store(&mapping, at, word)?;
            self.bytes[at as usize..at as usize + 8].copy_from_slice(&word.to_le_bytes());
        }
        if random.below(2) == 0 {
            file.sync_all()?;
        }
        Ok(())
    }
}

/// Clones up to `length` bytes; how many there were.
pub(crate) fn copy(from: &File, from_offset: u64, to: &File, to_offset: u64, length: u64) -> Result<u64> {
    let (mut source, mut target) = (i64::try_from(from_offset)?, i64::try_from(to_offset)?);
    let mut done = 0;
    while done < length {
        let step = usize::try_from((length - done).min(1 << 30))?;
        match nix::fcntl::copy_file_range(from, Some(&mut source), to, Some(&mut target), step)
            .with_context(|| format!("copy_file_range to {to:?} after {done} bytes"))?
        {
            0 => break,
            copied => done += copied as u64,
        }
    }
    Ok(done)
}

pub(crate) fn map(file: File, length: u64) -> Result<MmapRegion> {
    Ok(MmapRegion::from_file(FileOffset::new(file, 0), usize::try_from(length)?)?)
}

pub(crate) fn store(mapping: &MmapRegion, at: u64, word: u64) -> Result<()> {
    Ok(mapping.as_volatile_slice().store(word, usize::try_from(at)?, Ordering::Release)?)
}

pub(crate) fn evict(file: &File, offset: u64, length: u64) -> Result<()> {
    let (offset, length) = (i64::try_from(offset)?, i64::try_from(length)?);
    Ok(nix::fcntl::posix_fadvise(file, offset, length, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?)
}
