//! One suite for every device: the cases, and what they are told of the device under test.
//!
//! Owns: [`Subject`], [`Case`] and [`cases`]; [`Environment`] and [`MachineCase`] for cases that start a machine themselves.
//!
//! Rules that the cases keep:
//! - a case asks the device what it can do, never which device it is; what it cannot do is [`Verdict::Skipped`] with the reason;
//! - a case opens the device itself and closes it again: devices may be opened by one process at a time;
//! - a case assumes nothing of the contents and leaves nothing behind that the next one trips over: settings are put back;
//! - no timing decides a case. One that hangs is ended by the runner's deadline.
//!
//! Excludes: running the cases (`runner`), counting them (`report`).

mod admin;
mod bring_up;
mod commands;
mod device;
mod identify;
mod io;
mod queues;
mod tools;
mod volume;

use std::fmt;
use std::path::PathBuf;

use anyhow::{Context, Result};
use nvme::spec_string::{EmulatedBacking, Target};

/// What lies behind a device spec, as far as a runner must know: what is lost, and what other processes see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// Gone when the process that opened it ends.
    Memory,
    /// Seen by one process after another; made for tests.
    Shared,
    /// A drive somebody may need: permission is asked for.
    Drive,
}

/// The device under test.
#[derive(Clone, Debug)]
pub struct Subject {
    /// As every `--device` takes it.
    pub spec: String,
    /// What lies behind it.
    pub kind: DeviceKind,
    /// A directory for the case's own files, on a file system that can be mounted on.
    pub scratch: PathBuf,
}

impl Subject {
    /// The device `spec`, with files in `scratch`.
    ///
    /// # Errors
    /// The spec makes no sense.
    pub fn new(spec: &str, scratch: impl Into<PathBuf>) -> Result<Self> {
        let parsed: nvme::DeviceSpec = spec.parse().context("the device under test")?;
        let kind = match &parsed.target {
            Target::Emulated(emulated) if emulated.backing == EmulatedBacking::Memory => DeviceKind::Memory,
            Target::Pci(_) => DeviceKind::Drive,
            _ => DeviceKind::Shared,
        };
        Ok(Self { spec: spec.to_owned(), kind, scratch: scratch.into() })
    }

    /// Whether what one process writes is there for the next.
    pub fn outlives_processes(&self) -> bool {
        self.kind != DeviceKind::Memory
    }
}

/// How a case ended, if nothing was wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Everything held.
    Passed,
    /// It could not run: why, and if a person can change that, how.
    Skipped(String),
}

impl Verdict {
    /// Skipped, because of `reason`.
    ///
    /// # Errors
    /// None: the type is that of a case.
    pub fn skipped(reason: impl fmt::Display) -> Result<Self> {
        Ok(Self::Skipped(reason.to_string()))
    }
}

/// A case that runs on any device.
#[derive(Clone, Copy)]
pub struct Case {
    /// The suite it belongs to.
    pub suite: &'static str,
    /// What must hold, as a name.
    pub name: &'static str,
    /// Runs it.
    pub run: fn(&Subject) -> Result<Verdict>,
}

/// What a case that starts a machine of its own is told.
#[derive(Clone, Debug)]
pub struct Environment {
    /// Where `pollux`, `polluxd`, `hw-suite` and other programs of this workspace are looked for first.
    pub bin_dir: PathBuf,
    /// A directory for the case's own files; emptied by the runner.
    pub scratch_root: PathBuf,
}

/// A case that brings its own machine.
#[derive(Clone, Copy)]
pub struct MachineCase {
    /// The suite it belongs to.
    pub suite: &'static str,
    /// What must hold, as a name.
    pub name: &'static str,
    /// Runs it.
    pub run: fn(&Environment) -> Result<Verdict>,
}

/// Every case that runs on any device, in the order in which they run.
pub fn cases() -> Vec<Case> {
    [
        bring_up::CASES,
        identify::CASES,
        io::CASES,
        queues::CASES,
        commands::CASES,
        admin::CASES,
        tools::CASES,
        volume::CASES,
    ]
    .concat()
}

/// Keeps the device busy until this process is killed: the other half of `bring-up/a_killed_process_leaves_a_usable_device`.
///
/// # Errors
/// The device failed.
pub fn keep_busy(subject: &Subject) -> Result<()> {
    bring_up::keep_busy(subject)
}
