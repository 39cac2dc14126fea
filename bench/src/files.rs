//! Loads on a directory, through system calls.
//!
//! Owns: the file of extents that do not lie side by side, and what is done with it; write and fsync; create and unlink.
//! A load leaves the directory as it found it, but for the prepared file.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use nix::fcntl::{OFlag, PosixFadviseAdvice};
use serde_json::{Value, json};

use crate::quantiles::{nanos, summary};

const BLOCK: u64 = 4096;
/// The prepared file.
const SOURCE: &str = "source";
/// Bytes of a small file.
const SMALL: usize = 100;
/// Small files that exist at once.
const SMALL_FILES: u64 = 1000;
/// Blocks of the file that is written and synced.
const SYNCED_BLOCKS: u64 = 1024;
/// Reads of each kind that a measurement during clones needs.
const READS: usize = 1000;
/// Clones at most to get them.
const CLONES: u32 = 100;

/// Options of `files`.
#[derive(Args)]
pub(crate) struct Files {
    /// Where
    #[arg(long)]
    dir: PathBuf,
    #[arg(long)]
    row: Row,
    /// Seconds of the loads that repeat
    #[arg(long, default_value_t = 2)]
    seconds: u64,
    /// Blocks of the prepared file
    #[arg(long, default_value_t = 262_144)]
    blocks: u64,
}

/// A load.
#[derive(Clone, Copy, ValueEnum)]
enum Row {
    /// Make the file whose every block is an extent
    Prepare,
    /// Clone it, and sync the clone
    Clone,
    /// Read it, alone and during clones
    CloneReaders,
    /// Write 4 KiB and fsync
    WriteFsync,
    /// Create, write and unlink files of 100 bytes
    CreateUnlink,
}

impl Files {
    pub(crate) fn run(&self) -> Result<()> {
        let found = match self.row {
            Row::Prepare => self.prepare()?,
            Row::Clone => self.clone_once()?,
            Row::CloneReaders => self.readers()?,
            Row::WriteFsync => self.write_fsync()?,
            Row::CreateUnlink => self.create_unlink()?,
        };
        println!("{found}");
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Even blocks are on the device before odd ones are written.
    fn prepare(&self) -> Result<Value> {
        let path = self.path(SOURCE);
        let file = OpenOptions::new().write(true).create(true).truncate(true).open(&path)?;
        // Otherwise XFS allocates beyond the end, and odd blocks fill what even ones have left.
        file.set_len(self.blocks * BLOCK)?;
        for first in 0..2 {
            for block in (first..self.blocks).step_by(2) {
                file.write_all_at(&pattern(block), block * BLOCK)
                    .with_context(|| format!("writing block {block} of {}", path.display()))?;
            }
            file.sync_all()?;
        }
        Ok(json!({ "blocks": self.blocks }))
    }

    fn clone_once(&self) -> Result<Value> {
        let target = self.path("clone");
        let (from, to) = (File::open(self.path(SOURCE))?, File::create(&target)?);
        to.sync_all()?;
        let began = Instant::now();
        copy_whole(&from, &to)?;
        let cloned = began.elapsed();
        let began = Instant::now();
        to.sync_all()?;
        let synced = began.elapsed();
        check_block(&to, &target, self.blocks - 1)?;
        drop(to);
        fs::remove_file(&target)?;
        File::open(&self.dir)?.sync_all()?;
        Ok(json!({ "clone_ns": nanos(cloned), "fsync_ns": nanos(synced) }))
    }

    fn readers(&self) -> Result<Value> {
        let (stop, during) = (AtomicBool::new(false), AtomicBool::new(false));
        let source = self.path(SOURCE);
        let target = self.path("clone");
        let counts = [(); 2].map(|()| std::sync::atomic::AtomicUsize::new(0));
        let (clones, reads) = std::thread::scope(|scope| -> Result<_> {
            let readers = [Mode::Buffered, Mode::Direct].map(|mode| {
                let (source, stop, during, count) = (&source, &stop, &during, &counts[mode as usize]);
                let reader = Reader { mode, blocks: self.blocks, stop, during, count };
                scope.spawn(move || reader.run(source))
            });
            std::thread::sleep(Duration::from_secs(self.seconds));
            let cloned = self.clone_while_read(&source, &target, &during, &counts);
            stop.store(true, Ordering::Release);
            let reads = readers.map(|reader| reader.join().expect("a reader does not panic"));
            Ok((cloned?, reads))
        })?;
        let [buffered, direct] = reads;
        let show = |(quiet, busy): (Vec<Duration>, Vec<Duration>)| json!({ "quiet": summary(quiet), "during": summary(busy) });
        Ok(json!({ "clones": clones, "buffered": show(buffered?), "direct": show(direct?) }))
    }

    fn clone_while_read(
        &self,
        source: &Path,
        target: &Path,
        during: &AtomicBool,
        counts: &[std::sync::atomic::AtomicUsize; 2],
    ) -> Result<u32> {
        let mut clones = 0;
        while clones < CLONES && counts.iter().any(|count| count.load(Ordering::Relaxed) < READS) {
            let (from, to) = (File::open(source)?, File::create(target)?);
            during.store(true, Ordering::Release);
            let copied = copy_whole(&from, &to);
            during.store(false, Ordering::Release);
            copied?;
            clones += 1;
            fs::remove_file(target)?;
        }
        Ok(clones)
    }

    fn write_fsync(&self) -> Result<Value> {
        let path = self.path("synced");
        let file = File::create(&path)?;
        file.write_all_at(&vec![1; (SYNCED_BLOCKS * BLOCK) as usize], 0)?;
        file.sync_all()?;
        let (began, mut done) = (Instant::now(), 0);
        while began.elapsed() < Duration::from_secs(self.seconds) {
            let block = (done * 611) % SYNCED_BLOCKS;
            file.write_all_at(&pattern(done), block * BLOCK)?;
            file.sync_all()?;
            done += 1;
        }
        let took = began.elapsed();
        fs::remove_file(&path)?;
        Ok(rate(took, done))
    }

    fn create_unlink(&self) -> Result<Value> {
        let folder = self.path("small");
        fs::create_dir(&folder)?;
        let (began, mut done) = (Instant::now(), 0);
        while began.elapsed() < Duration::from_secs(self.seconds) {
            for number in 0..SMALL_FILES {
                let file = File::create_new(folder.join(format!("file{number}")))?;
                file.write_all_at(&[7; SMALL], 0)?;
            }
            for number in 0..SMALL_FILES {
                fs::remove_file(folder.join(format!("file{number}")))?;
            }
            done += SMALL_FILES;
        }
        let took = began.elapsed();
        fs::remove_dir(&folder)?;
        Ok(rate(took, done))
    }
}

/// Operations and what each took.
pub(crate) fn rate(took: Duration, operations: u64) -> Value {
    json!({ "operations": operations, "ns": nanos(took) as f64 / operations.max(1) as f64 })
}

fn pattern(block: u64) -> Vec<u8> {
    let mut bytes = vec![(block % 251) as u8; BLOCK as usize];
    bytes[..8].copy_from_slice(&block.to_le_bytes());
    bytes
}

fn check_block(file: &File, path: &Path, block: u64) -> Result<()> {
    // The file was opened for writing only.
    let file = File::open(path).with_context(|| format!("{file:?} cannot be opened again"))?;
    let mut bytes = vec![0; BLOCK as usize];
    file.read_exact_at(&mut bytes, block * BLOCK)?;
    ensure!(bytes == pattern(block), "block {block} of {} has wrong contents", path.display());
    Ok(())
}

fn copy_whole(from: &File, to: &File) -> Result<()> {
    let mut left = usize::try_from(from.metadata()?.len())?;
    let (mut source, mut target) = (0_i64, 0_i64);
    while left > 0 {
        let copied = nix::fcntl::copy_file_range(from, Some(&mut source), to, Some(&mut target), left)
            .context("copy_file_range")?;
        ensure!(copied > 0, "copy_file_range ended {left} bytes early");
        left -= copied;
    }
    Ok(())
}

/// How a reader reads.
#[derive(Clone, Copy)]
enum Mode {
    /// Through the kernel's cache, from which each block is evicted after it.
    Buffered,
    /// Past it.
    Direct,
}

/// Reads random blocks until told to stop.
struct Reader<'a> {
    mode: Mode,
    blocks: u64,
    stop: &'a AtomicBool,
    during: &'a AtomicBool,
    count: &'a std::sync::atomic::AtomicUsize,
}

impl Reader<'_> {
    /// What each read took: while nothing was cloned, and those that began during a clone.
    fn run(&self, path: &Path) -> Result<(Vec<Duration>, Vec<Duration>)> {
        let flags = if let Mode::Direct = self.mode { OFlag::O_DIRECT.bits() } else { 0 };
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        nix::fcntl::posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM)?;
        nix::fcntl::posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        // Direct I/O wants memory that is aligned like its blocks.
        let mut memory = vec![0; 2 * BLOCK as usize];
        let start = memory.as_ptr().align_offset(BLOCK as usize);
        let buffer = &mut memory[start..start + BLOCK as usize];
        let (mut state, mut quiet, mut busy) = (self.mode as u64 + 1, Vec::new(), Vec::new());
        while !self.stop.load(Ordering::Acquire) {
            let block = next_random(&mut state) % self.blocks;
            let during = self.during.load(Ordering::Acquire);
            let began = Instant::now();
            file.read_exact_at(buffer, block * BLOCK)?;
            let took = began.elapsed();
            ensure!(buffer == pattern(block), "block {block} has wrong contents");
            if during {
                busy.push(took);
                self.count.store(busy.len(), Ordering::Relaxed);
            } else if busy.is_empty() {
                quiet.push(took);
            }
            if let Mode::Buffered = self.mode {
                let (offset, length) = (i64::try_from(block * BLOCK)?, i64::try_from(BLOCK)?);
                nix::fcntl::posix_fadvise(&file, offset, length, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
            }
        }
        Ok((quiet, busy))
    }
}

/// Numbers that are random enough to choose blocks (an LCG's high bits).
pub(crate) fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}
