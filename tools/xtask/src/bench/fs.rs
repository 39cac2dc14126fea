//! The filesystem's figures: Pollux beside the kernel's filesystems, beside a FUSE server that does nothing, and beside itself.
//!
//! Owns: which rows there are and their order; the namespace of mounts in which all of it happens. The rows are in
//! [`rows`], what is mounted where in [`place`].
//!
//! Kernel filesystems lie on loop devices on files on a tmpfs, Pollux on the embedded controller in memory. What is compared is
//! measured in turn, round by round, by processes of their own (`fs-bench`).
//!
//! Invariant: everything is mounted in a namespace of this run's own, and loop devices go with their mounts. So
//! nothing is left behind, however the run ends.

mod place;
mod rows;

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};

use super::{Report, build};
use crate::packages;

use place::Kind;

/// Set where the namespace is this run's own.
const INSIDE: &str = "POLLUX_BENCH_NAMESPACE";

/// What the names of scratch directories begin with; the process follows.
const SCRATCH: &str = "pollux-bench-";

/// How the filesystem is measured.
#[derive(Args)]
pub(crate) struct FsOptions {
    /// Write the figures into docs/benchmarks.md; only with all rows
    #[arg(long, conflicts_with = "only")]
    pub(super) write: bool,
    /// Filesystems of the kernel to compare with
    #[arg(long, value_delimiter = ',', default_value = "btrfs,xfs,ext4")]
    vs: Vec<Kind>,
    /// Rows to measure, all if none is named
    #[arg(long, value_delimiter = ',')]
    only: Vec<Row>,
    /// Rounds of each alternating measurement
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of each run that has no end of its own
    #[arg(long, default_value_t = 2)]
    seconds: u64,
}

/// A row of the table, or a few.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Row {
    /// A clone of 262,144 extents by copy_file_range, and the fsync after it
    Clone,
    /// The same inside fs-core alone
    CloneCore,
    /// Reads of the source during clones
    CloneReaders,
    /// Random reads and writes against the raw driver on a modelled drive
    Modelled,
    /// Instructions of a read and a write
    Instructions,
    /// 4 KiB write and fsync
    WriteFsync,
    /// Create and unlink of files of 100 bytes
    CreateUnlink,
    /// The mount against a FUSE server that answers from memory
    Mount,
    /// Two reactors against two processes
    TwoReactors,
    /// Mount after a crash
    MountAfterCrash,
    /// Memory of cached inodes
    InodeMemory,
}

impl FsOptions {
    /// The command that gives these figures again.
    pub(super) fn command_line(&self) -> String {
        let vs: Vec<&str> = self.vs.iter().map(|kind| kind.name()).collect();
        format!(
            "cargo xtask bench fs --vs {} --rounds {} --seconds {}",
            vs.join(","),
            self.rounds,
            self.seconds
        )
    }
}

/// What the rows use.
struct Tools {
    bench: PathBuf,
    pollux: PathBuf,
    clone: PathBuf,
    /// The tmpfs.
    scratch: PathBuf,
}

/// Takes every figure that can be taken here.
pub(super) fn measure(root: &Path, options: &FsOptions) -> anyhow::Result<Report> {
    if std::env::var_os(INSIDE).is_none() {
        return Err(enter_namespace());
    }
    let mut report = Report::default();
    remove_what_was_interrupted();
    let scratch = std::env::temp_dir().join(format!("{SCRATCH}{}", std::process::id()));
    std::fs::create_dir(&scratch)?;
    let outcome = place::mount_tmpfs(&scratch).and_then(|tmpfs| {
        let tools = Tools {
            bench: build(root, &["--package", "pollux-bench", "--bin", "fs-bench"], "fs-bench")?,
            pollux: build(root, &["--package", "pollux-tools", "--bin", "pollux"], "pollux")?,
            clone: build(root, &["--package", "fs-core", "--bench", "clone"], "clone")?,
            scratch: scratch.clone(),
        };
        let vs = available(&options.vs, &mut report);
        for row in Row::value_variants() {
            if options.only.is_empty() || options.only.contains(row) {
                println!("-- {row:?}");
                if let Err(error) = rows::measure(*row, &tools, &vs, options, &mut report) {
                    report.broken(format!("{row:?}: {error:#}"));
                }
            }
        }
        drop(tmpfs);
        Ok(())
    });
    std::fs::remove_dir(&scratch).with_context(|| format!("removing {}", scratch.display()))?;
    outcome.map(|()| report)
}

/// Empty directories of runs that were interrupted: all else has gone with their namespaces.
fn remove_what_was_interrupted() {
    let Ok(entries) = std::fs::read_dir(std::env::temp_dir()) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix(SCRATCH));
        // One that is alive has its tmpfs there, which only its own namespace shows.
        if owner.is_some_and(|owner| !Path::new("/proc").join(owner).exists()) {
            let _not_empty = std::fs::remove_dir(entry.path());
        }
    }
}

/// Becomes the same command in a mount namespace; returns only if that fails.
fn enter_namespace() -> anyhow::Error {
    let Ok(program) = std::env::current_exe() else {
        return anyhow::anyhow!("this program's own path is unknown");
    };
    let error = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "--"])
        .arg(program)
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "1")
        .exec();
    anyhow::Error::new(error).context("cannot run unshare (package util-linux), which needs root")
}

/// Those filesystems that this machine has.
fn available(wanted: &[Kind], report: &mut Report) -> Vec<Kind> {
    let mut found = Vec::new();
    for kind in wanted {
        match usable(*kind) {
            Ok(()) => found.push(*kind),
            Err(error) => report.missing.push(format!("{}: {error:#}", kind.name())),
        }
    }
    found
}

fn usable(kind: Kind) -> anyhow::Result<()> {
    let (program, package) = kind.maker();
    packages::ensure(program, package).map_err(anyhow::Error::msg)?;
    // The kernel loads a module when it is asked to; it may have none.
    let _loaded = Command::new("modprobe").args(["-q", kind.name()]).status();
    let known = std::fs::read_to_string("/proc/filesystems")?;
    let known = known.lines().any(|line| line.split_whitespace().last() == Some(kind.name()));
    ensure!(known, "the kernel has no {}", kind.name());
    Ok(())
}
