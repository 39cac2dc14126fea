//! Loads for a daemon that is killed, and what must be there of them afterwards.
//!
//! Owns: [`Journal`], the log of what a load was told is durable, and one module for each load: what it does, and the check of what it
//! left behind. A load runs in the program `kill-load`, apart from the daemon and from who checks.
//!
//! Invariants:
//! - the journal lies outside of the mount; a line is in it before the next step begins, so it outlives load and daemon;
//! - a line that allows something (a record may go) is written before the deed, one that demands something (a sync has succeeded) after it;
//! - paths are relative to a directory that the load has gone into: what comes after the daemon's end is an error, and never
//!   lands in the file system below the mount;
//! - a load ends with its first error; only the kill may cause one.
//!
//! Excludes: killing, mounting, choosing the moment (`tests/kill`).

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};

pub mod names;
pub mod pages;

/// Bytes of a block, within which a crash tears nothing.
pub const BLOCK: usize = 4096;

/// The line that says that a load has its files and goes on with them until the kill.
const READY: &str = "ready";

/// What a load was told is durable, line by line.
pub struct Journal {
    file: Mutex<File>,
}

impl Journal {
    /// A new one.
    ///
    /// # Errors
    /// Names the file that cannot be made.
    pub fn create(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().append(true).create_new(true).open(path);
        Ok(Self { file: Mutex::new(file.with_context(|| path.display().to_string())?) })
    }

    /// Adds `line`; it outlives this process from here on.
    ///
    /// # Errors
    /// The file system of the journal is full, or another thread has panicked.
    pub fn say(&self, line: &str) -> Result<()> {
        let mut file = self.file.lock().ok().context("a thread panicked with the journal")?;
        file.write_all(format!("{line}\n").as_bytes()).context("writing the journal")
    }

    /// The load has begun.
    ///
    /// # Errors
    /// As [`Self::say`].
    pub fn ready(&self) -> Result<()> {
        self.say(READY)
    }
}

/// Whether the load of the journal at `path` has begun.
pub fn is_ready(path: &Path) -> bool {
    std::fs::read_to_string(path).is_ok_and(|text| text.lines().any(|line| line == READY))
}

/// The lines of a journal, split into words.
///
/// # Errors
/// Names the file that cannot be read.
pub fn lines(path: &Path) -> Result<Vec<Vec<String>>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    Ok(text.lines().map(|line| line.split(' ').map(str::to_owned).collect()).collect())
}

/// The numbers behind the first word of a line.
fn numbers(line: &[String]) -> Result<Vec<u64>> {
    line.iter().skip(1).map(|word| word.parse().with_context(|| format!("{line:?} in the journal"))).collect()
}

/// Runs one load of several threads until one of them fails; which is how each ends.
fn together(threads: Vec<Box<dyn FnOnce() -> Result<()> + Send + '_>>) -> Result<()> {
    std::thread::scope(|scope| {
        let running: Vec<_> = threads.into_iter().map(|thread| scope.spawn(thread)).collect();
        let ends = running.into_iter().map(|thread| thread.join().ok().context("a thread panicked"));
        // Every one ends with an error, since the kill ends them.
        let ends = ends.collect::<Result<Vec<_>>>()?;
        ensure!(ends.iter().all(Result::is_err), "a part of the load ended by itself");
        ends.into_iter().find(Result::is_err).unwrap_or(Ok(()))
    })
}

/// Makes the entries of the directory durable.
fn sync_directory(path: &Path) -> Result<()> {
    Ok(File::open(path)?.sync_all()?)
}

/// Clones a file as a whole; `to` is empty.
fn clone_into(from: &File, to: &File) -> Result<()> {
    let (mut here, mut there, length) = (0, 0, from.metadata()?.len());
    while (here as u64) < length {
        let step = usize::try_from(length - here as u64)?;
        let copied = nix::fcntl::copy_file_range(from, Some(&mut here), to, Some(&mut there), step)?;
        ensure!(copied > 0, "copy_file_range has copied nothing from byte {here} on");
    }
    Ok(())
}

/// A word of something that may be too short for it.
fn word(bytes: &[u8], index: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(index * 8..index * 8 + 8)?.try_into().ok()?))
}
