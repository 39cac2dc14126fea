//! The command line of `pollux`: one subcommand for each task.
//!
//! Owns: names and options, which are a contract that scripts rely on, and the exit codes. What each subcommand does
//! is in a module of its own below this one.
//!
//! | exit code | means |
//! |---|---|
//! | 0 | success |
//! | 1 | the operation failed; standard error says what, where and what to do |
//! | 2 | the command line makes no sense |
//! | 3 | `scrub` only: damage found |
//! | 4, 8 | `fsck` only, as fsck(8): errors found; could not run |
//!
//! Rules: with `--json` standard output is one JSON document and nothing else; progress goes to standard error;
//! only `mkscratch` asks anything, and only on a terminal.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::failure::Failure;

mod bind;
mod clone;
mod dedupe;
mod dump;
mod fsck;
mod grow;
mod identify;
mod list;
mod mkfs;
mod mkscratch;
mod perf;
mod relocate;
mod scrub;
mod serve;
mod smart;
mod status;
mod sync;
mod up;

const EXIT_CODES: &str = "\
Exit codes:
  0  success
  1  the operation failed; standard error says what, on which device or path, and what to do
  2  the command line makes no sense
  scrub: 3 damage found
  fsck: 0 clean, 4 errors found, 8 could not run

Device specs:
  emu:PATH[,size=4GiB][,lba=512|4096][,queues=N][,ns=ID]   embedded controller on a sparse file
  emu:mem,size=1GiB[,...]                                  embedded controller in memory
    [,mode=inline|threaded][,latency=80us][,mdts=N]        emu: how and how fast, and (pollux help serve) what it offers
  pci:ADDR[,queues=N][,ns=ID]                              controller bound to vfio-pci
  vfio-user:PATH[,queues=N][,ns=ID]                        controller behind a vfio-user socket

Example:
  pollux up --image ./pollux.img --size 4GiB --mount ./pollux-mnt";

/// A copy-on-write filesystem in user space, on its own poll-mode NVMe driver.
#[derive(Parser)]
#[command(name = "pollux", version, after_help = EXIT_CODES)]
pub struct Pollux {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    Up(up::Up),
    Mkfs(mkfs::Mkfs),
    Mkscratch(mkscratch::Mkscratch),
    Fsck(fsck::Fsck),
    Dump(dump::Dump),
    List(list::List),
    Bind(bind::Bind),
    Unbind(bind::Unbind),
    Identify(identify::Identify),
    Smart(smart::Smart),
    Perf(perf::Perf),
    Serve(serve::Serve),
    Status(status::Status),
    Clone(clone::Clone),
    Dedupe(dedupe::Dedupe),
    Relocate(relocate::Relocate),
    Grow(grow::Grow),
    Scrub(scrub::Scrub),
    Sync(sync::Sync),
}

impl Pollux {
    /// Carries out the task and reports how it went.
    pub fn run(&self) -> ExitCode {
        let outcome = match &self.task {
            Task::Up(up) => up.run(),
            Task::Mkfs(mkfs) => mkfs.run(),
            Task::Mkscratch(mkscratch) => mkscratch.run(),
            Task::Fsck(fsck) => fsck.run(),
            Task::Dump(dump) => dump.run(),
            Task::List(list) => list.run(),
            Task::Bind(bind) => bind.run(),
            Task::Unbind(unbind) => unbind.run(),
            Task::Identify(identify) => identify.run(),
            Task::Smart(smart) => smart.run(),
            Task::Perf(perf) => perf.run(),
            Task::Serve(serve) => serve.run(),
            Task::Status(status) => status.run(),
            Task::Clone(clone) => clone.run(),
            Task::Dedupe(dedupe) => dedupe.run(),
            Task::Relocate(relocate) => relocate.run(),
            Task::Grow(grow) => grow.run(),
            Task::Scrub(scrub) => scrub.run(),
            Task::Sync(sync) => sync.run(),
        };
        outcome.map_or_else(|failure| failure.report("pollux"), |()| ExitCode::SUCCESS)
    }
}

/// The daemon to talk to.
#[derive(clap::Args)]
struct Daemon {
    /// Any path on the mount; may be left out if there is only one
    #[arg(value_name = "MOUNT")]
    mount: Option<PathBuf>,

    /// The daemon's control socket, or any path on its mount
    #[arg(long, value_name = "PATH", conflicts_with = "mount")]
    socket: Option<PathBuf>,
}

impl Daemon {
    fn socket(&self) -> Result<PathBuf, Failure> {
        use crate::control::location;
        match self.socket.as_deref().or(self.mount.as_deref()) {
            Some(path) => location::of_path(path),
            None => location::of_only_mount(),
        }
    }
}

/// Prints a document as the only thing on standard output.
fn print_json(document: &impl serde::Serialize) -> Result<(), Failure> {
    use crate::failure::During;

    let text = serde_json::to_string_pretty(document).during("cannot write JSON")?;
    crate::output::outln!("{text}");
    Ok(())
}
