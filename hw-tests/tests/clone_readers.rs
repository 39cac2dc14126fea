//! Readers of a file that is being cloned, as xfstests' generic/733 looks at them, and stricter: buffered and direct ones, and
//! how long the slowest read takes.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hw_tests::{Daemon, Random, Scratch, fsck_clean};
use nix::fcntl::PosixFadviseAdvice;

const BLOCK: u64 = 4096;

/// Blocks of the file that the big one is made of; each is an extent of its own.
const BASE: u64 = 16 * 1024;

/// How often the big file holds it: 262,144 extents.
const TIMES: u64 = 40;

/// Clones of the big file at most, until the readers have read enough.
const CLONES: u32 = 12;

/// Reads that each reader has to end during a clone.
const READS: usize = 100;

fn pattern(block: u64) -> Vec<u8> {
    let mut bytes = vec![(block % 251) as u8; BLOCK as usize];
    bytes[..8].copy_from_slice(&block.to_le_bytes());
    bytes
}

fn copy_range(from: &File, to: &File, at: u64, length: u64) -> Result<()> {
    let (mut source, mut target, mut left) = (0_i64, i64::try_from(at)?, usize::try_from(length)?);
    while left > 0 {
        let copied = nix::fcntl::copy_file_range(from, Some(&mut source), to, Some(&mut target), left)?;
        ensure!(copied > 0, "copy_file_range ended {left} bytes early");
        left -= copied;
    }
    Ok(())
}

/// A file whose every block is an extent: even blocks are on the device before odd ones are written.
fn alternating(path: &Path) -> Result<File> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
    for first in 0..2 {
        for block in (first..BASE).step_by(2) {
            file.write_all_at(&pattern(block), block * BLOCK)?;
        }
        file.sync_all()?;
    }
    Ok(file)
}

/// How a reader reads.
#[derive(Clone, Copy, Debug)]
enum Mode {
    /// Through the kernel's cache, from which each block is evicted after it.
    Buffered,
    /// Past it.
    Direct,
}

/// Reads random blocks of the big file until told to stop; returns what each took.
fn read_until(path: &Path, mode: Mode, stop: &AtomicBool) -> Result<Vec<Duration>> {
    let flags = match mode {
        Mode::Buffered => 0,
        Mode::Direct => nix::libc::O_DIRECT,
    };
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    // Direct I/O wants memory that is aligned like its blocks.
    let mut memory = vec![0; 2 * BLOCK as usize];
    let start = memory.as_ptr().align_offset(BLOCK as usize);
    let buffer = &mut memory[start..start + BLOCK as usize];
    let mut random = Random(mode as u64 + 1);
    let mut took = Vec::new();
    while !stop.load(Ordering::Acquire) {
        let block = random.below(BASE * TIMES);
        let (began, offset) = (Instant::now(), block * BLOCK);
        file.read_exact_at(buffer, offset).with_context(|| format!("{mode:?} read of block {block}"))?;
        took.push(began.elapsed());
        ensure!(buffer == pattern(block % BASE), "{mode:?} read of block {block} has wrong contents");
        if let Mode::Buffered = mode {
            let (offset, length) = (i64::try_from(offset)?, i64::try_from(BLOCK)?);
            nix::fcntl::posix_fadvise(&file, offset, length, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        }
    }
    Ok(took)
}

/// Both readers at work during one clone: how long it took, and their reads.
fn during_a_clone(source: &Path, target: &Path) -> Result<(Duration, [Vec<Duration>; 2])> {
    let (from, to) = (File::open(source)?, File::create(target)?);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers = [Mode::Buffered, Mode::Direct].map(|mode| {
            let stop = &stop;
            scope.spawn(move || read_until(source, mode, stop))
        });
        let began = Instant::now();
        let cloned = copy_range(&from, &to, 0, BASE * TIMES * BLOCK);
        let took = began.elapsed();
        stop.store(true, Ordering::Release);
        let reads = readers.map(|reader| reader.join().expect("a reader does not panic"));
        cloned?;
        let [buffered, direct] = reads;
        Ok((took, [buffered?, direct?]))
    })
}

#[test]
fn readers_of_the_source_go_on_during_clones() -> Result<()> {
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "4GiB"])?;
    let base = alternating(&scratch.mount().join("base"))?;
    let source = scratch.mount().join("source");
    let big = File::create(&source)?;
    for time in 0..TIMES {
        copy_range(&base, &big, time * BASE * BLOCK, BASE * BLOCK)?;
    }
    big.sync_all()?;
    let (mut reads, mut slowest, mut clones) = ([0; 2], Duration::ZERO, Duration::ZERO);
    for number in 0..CLONES {
        let target = scratch.mount().join(format!("clone{number}"));
        let (took, [buffered, direct]) = during_a_clone(&source, &target)?;
        for read in buffered.iter().chain(&direct) {
            slowest = slowest.max(*read);
        }
        // A reader that had to wait for the clone would end a read or two in each.
        let few = 3;
        ensure!(
            buffered.len() > few && direct.len() > few,
            "{} buffered and {} direct reads during a clone of {took:?}",
            buffered.len(),
            direct.len()
        );
        clones += took;
        reads = [reads[0] + buffered.len(), reads[1] + direct.len()];
        std::fs::remove_file(&target)?;
        if reads.iter().all(|count| *count >= READS) && clones >= Duration::from_secs(1) {
            break;
        }
    }
    println!("{reads:?} reads during {clones:?} of cloning, the slowest {slowest:?}");
    if reads.iter().any(|count| *count < READS) {
        bail!("{reads:?} buffered and direct reads during {CLONES} clones, fewer than {READS} each");
    }
    drop((base, big));
    daemon.stop()?;
    fsck_clean(&scratch)
}
