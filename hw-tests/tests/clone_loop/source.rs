//! The files that everybody writes to, and what is known of them.
//!
//! Owns: [`Source`] and the stamps in its blocks; the checks of what was seen of it.
//!
//! Invariant: each block has one writer, which announces a generation before it writes it and confirms it afterwards.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};

pub(crate) const BLOCK: u64 = 4096;

/// Words of a block.
pub(crate) const WORDS: usize = 512;

/// Blocks of a source that are always there.
pub(crate) const FIRM: u64 = 1024;

/// Blocks behind them that come and go.
pub(crate) const TAIL: u64 = 256;

/// What a word says: whose block it is in, and the generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) source: u64,
    pub(crate) block: u64,
    pub(crate) generation: u64,
}

impl Stamp {
    pub(crate) fn word(self) -> u64 {
        // Never zero, which is what was never written.
        (self.source + 1) << 56 | self.block << 40 | self.generation
    }

    pub(crate) fn of(word: u64) -> Self {
        Self {
            source: (word >> 56).wrapping_sub(1),
            block: (word >> 40) & 0xffff,
            generation: word & 0xff_ffff_ffff,
        }
    }

    pub(crate) fn block_of_it(self) -> Vec<u8> {
        self.word().to_le_bytes().repeat(WORDS)
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")))
}

/// A file that everybody writes to, and what is known of it.
pub(crate) struct Source {
    pub(crate) number: u64,
    pub(crate) path: PathBuf,
    /// Of each firm block, the generation that is about to be written.
    pub(crate) announced: Vec<AtomicU64>,
    /// And the one that has been written.
    pub(crate) confirmed: Vec<AtomicU64>,
    /// And the one that a crash must leave.
    pub(crate) durable: Vec<AtomicU64>,
    /// The newest generation in the tail.
    pub(crate) tail: AtomicU64,
}

impl Source {
    pub(crate) fn create(number: u64, path: PathBuf) -> Result<Self> {
        let file = File::create(&path)?;
        for block in 0..FIRM {
            let stamp = Stamp { source: number, block, generation: 1 };
            file.write_all_at(&stamp.block_of_it(), block * BLOCK)?;
        }
        file.sync_all()?;
        let ones = || (0..FIRM).map(|_| AtomicU64::new(1)).collect();
        Ok(Self {
            number,
            path,
            announced: ones(),
            confirmed: ones(),
            durable: ones(),
            tail: AtomicU64::new(0),
        })
    }

    pub(crate) fn open(&self, flags: i32) -> Result<File> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&self.path);
        file.with_context(|| self.path.display().to_string())
    }

    /// One more generation of a block, which has one writer; `write` gets it there.
    pub(crate) fn renew(&self, block: u64, write: impl FnOnce(Stamp) -> Result<()>) -> Result<()> {
        let generation = self.announced[block as usize].fetch_add(1, Ordering::SeqCst) + 1;
        write(Stamp { source: self.number, block, generation })?;
        self.confirmed[block as usize].store(generation, Ordering::SeqCst);
        Ok(())
    }

    /// Syncs what one of the two writers has written: the one of the blocks from `first` on, every other.
    pub(crate) fn sync(&self, first: usize, sync: impl FnOnce() -> io::Result<()>) -> Result<()> {
        let confirmed = self.confirmed();
        sync()?;
        for (durable, confirmed) in self.durable.iter().zip(confirmed).skip(first).step_by(2) {
            durable.store(confirmed, Ordering::SeqCst);
        }
        Ok(())
    }

    pub(crate) fn confirmed(&self) -> Vec<u64> {
        self.confirmed.iter().map(|generation| generation.load(Ordering::SeqCst)).collect()
    }

    /// Checks a firm block that was looked at after `confirmed` was its generation.
    pub(crate) fn check(&self, bytes: &[u8], block: u64, confirmed: u64, seen: Seen) -> Result<()> {
        let announced = self.announced[block as usize].load(Ordering::SeqCst);
        let first = words(bytes).next();
        for (place, word) in words(bytes).enumerate() {
            let stamp = Stamp::of(word);
            ensure!(
                (stamp.source, stamp.block) == (self.number, block)
                    && (confirmed..=announced).contains(&stamp.generation),
                "{seen:?}: word {place} of block {block} of {} is {word:#x} ({stamp:?}), which is none of the generations \
                 {confirmed}..={announced}",
                self.path.display()
            );
            let whole = block % 2 == 1 && seen != Seen::Buffered;
            ensure!(
                !whole || Some(word) == first,
                "{seen:?}: block {block} of {} is torn: {:#x} and {word:#x}",
                self.path.display(),
                first.unwrap_or(0)
            );
        }
        Ok(())
    }

    /// Checks what a clone has of the tail.
    pub(crate) fn check_tail(&self, bytes: &[u8]) -> Result<()> {
        let newest = self.tail.load(Ordering::SeqCst);
        for (place, word) in words(bytes).enumerate() {
            let (stamp, block) = (Stamp::of(word), FIRM + (place / WORDS) as u64);
            let own = (stamp.source, stamp.block) == (self.number, block) && stamp.generation <= newest;
            ensure!(word == 0 || own, "word {place} of the tail of a clone of {} is {word:#x}", self.number);
        }
        Ok(())
    }
}

/// Where a block was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    Buffered,
    Direct,
    Clone,
}
