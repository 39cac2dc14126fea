//! QEMU's NVMe controller without a guest, as a device under test.
//!
//! Owns: [`Machine`] (a running QEMU whose PCI host is whoever opens its [`spec`](Machine::spec)), its options
//! ([`Configuration`], [`matrix`]), and the cases that only QEMU makes possible ([`cases`]).
//!
//! Invariants: QEMU ends with its [`Machine`] and with this process; its directory goes with it; every wait has a deadline.
//!
//! Excludes: being the PCI host (the driver's `qtest` transport), what is true of every device ([`suite`](crate::suite)).

mod cases;
mod configuration;
mod monitor;
mod process;
mod write_log;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};
use serde_json::json;

pub use cases::cases;
pub use configuration::{Board, Configuration, Disk, Layer, Runs, matrix};
pub use monitor::Monitor;
use process::Process;
pub use write_log::{Entry, WriteLog};

/// The program.
const QEMU: &str = "qemu-system-x86_64";
/// How the names of its directories begin; the owner's process identifier follows.
const DIRECTORY: &str = "pollux-qemu-";
/// Free bytes that a file system in memory must have to be used.
const ENOUGH_SHARED_MEMORY: u64 = 2 << 30;

/// Whether QEMU is there; if not, how to get it.
pub fn missing() -> Option<String> {
    crate::need(QEMU, "qemu-system-x86").err().map(|error| error.to_string())
}

/// A running QEMU.
pub struct Machine {
    /// First, so that QEMU has ended when its files go.
    process: Process,
    monitor: Mutex<Monitor>,
    directory: tempfile::TempDir,
    slot: u8,
}

impl Machine {
    /// Starts QEMU and waits until it listens.
    ///
    /// # Errors
    /// QEMU is missing or does not start, with what it printed.
    pub fn start(configuration: &Configuration) -> Result<Self> {
        if let Some(missing) = missing() {
            anyhow::bail!(missing);
        }
        let fast = fast_directory();
        sweep(&fast);
        let directory = tempfile::Builder::new()
            .prefix(&format!("{DIRECTORY}{}-", std::process::id()))
            .tempdir_in(&fast)
            .context("a directory for QEMU")?;
        let path = directory.path();
        for (index, disk) in configuration.disks.iter().enumerate() {
            fs::File::create(path.join(format!("disk{index}")))?.set_len(disk.bytes)?;
            if disk.layer == Layer::WriteLog {
                fs::File::create(path.join(format!("log{index}")))?;
            }
        }
        let log = path.join("qemu.log");
        let arguments = configuration.command_line(path);
        let process = Process::start(QEMU, &arguments, &log)?;
        let started = || -> Result<Monitor> {
            let monitor = Monitor::new(process.connect(&path.join("qmp"))?)?;
            ensure!(path.join("qtest").exists(), "it made no socket {}", path.join("qtest").display());
            Ok(monitor)
        };
        let monitor = started().with_context(|| {
            let printed = fs::read_to_string(&log).unwrap_or_default();
            format!("configuration {}: {QEMU} {}\n{printed}", configuration.name, arguments.join(" "))
        })?;
        Ok(Self { process, monitor: Mutex::new(monitor), directory, slot: configuration::SLOT })
    }

    /// The device spec of its controller.
    pub fn spec(&self) -> String {
        format!("qtest:{}", self.path().display())
    }

    /// Its directory: `qtest`, `ram`, `disk0` and so on, `log0` where writes are recorded.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The file behind a disk.
    pub fn disk(&self, index: usize) -> PathBuf {
        self.path().join(format!("disk{index}"))
    }

    /// Its monitor.
    pub fn monitor(&self) -> MutexGuard<'_, Monitor> {
        self.monitor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// kill -9.
    pub fn kill(&self) {
        self.process.kill();
    }

    /// Takes the controller off the bus, as a hand does: nobody is asked. Needs [`Board::Pc`].
    ///
    /// # Errors
    /// The monitor's.
    pub fn pull(&self) -> Result<()> {
        let eject = format!("o /w 0xae08 {:#x}", 1_u32 << self.slot);
        let mut monitor = self.monitor();
        monitor.human("o /w 0xae10 0")?;
        monitor.human(&eject).map(drop)
    }

    /// Asks for the controller to be unplugged (`device_del`), and has the bus do it.
    ///
    /// # Errors
    /// The monitor's.
    pub fn unplug(&self) -> Result<()> {
        self.monitor().execute("device_del", &json!({ "id": configuration::DEVICE_ID }))?;
        self.pull()
    }
}

/// A directory in memory if there is one with room: QEMU's RAM and disks are written a lot and kept by nobody.
fn fast_directory() -> PathBuf {
    let memory = Path::new("/dev/shm");
    let room = nix::sys::statvfs::statvfs(memory)
        .is_ok_and(|found| found.blocks_available() * found.fragment_size() >= ENOUGH_SHARED_MEMORY);
    if room { memory.to_owned() } else { std::env::temp_dir() }
}

/// Removes what processes left that were killed: nobody else would give that memory back.
fn sweep(place: &Path) {
    let entries = fs::read_dir(place).into_iter().flatten().filter_map(Result::ok);
    for entry in entries {
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|name| name.strip_prefix(DIRECTORY)?.split('-').next()?.parse::<u32>().ok());
        if owner.is_some_and(|owner| !Path::new("/proc").join(owner.to_string()).exists()) {
            // Another process may do the same, or it may be another user's.
            let _left = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed step of a test is the failure of the test")]

    use super::*;

    #[test]
    fn what_a_killed_process_left_is_removed_and_what_a_living_one_uses_is_not() {
        let place = tempfile::tempdir().unwrap();
        let mut ended = std::process::Command::new("true").spawn().unwrap();
        ended.wait().unwrap();
        let left = place.path().join(format!("{DIRECTORY}{}-a", ended.id()));
        let used = place.path().join(format!("{DIRECTORY}{}-b", std::process::id()));
        let foreign = place.path().join(format!("{DIRECTORY}notes"));
        for directory in [&left, &used, &foreign] {
            fs::create_dir(directory).unwrap();
            fs::write(directory.join("ram"), "x").unwrap();
        }
        sweep(place.path());
        assert_eq!([left, used, foreign].map(|path| path.exists()), [false, true, true]);
    }
}
