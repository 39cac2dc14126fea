//! The same random operations on Pollux, btrfs and XFS: the same errno and values after each, the same tree every so often
//! and after a remount.
//!
//! Owns: the run. `POLLUX_DIFFERENTIAL_OPERATIONS` (10,000) and `POLLUX_DIFFERENTIAL_SEED` (1) choose it; the operations
//! follow from the seed.
//!
//! Excludes: the operations (`operation`), what a tree comes to (`tree`), where file systems may differ (`reasons`).
//!
//! Everything runs as root: who may do what is pjdfstest's business.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use hw_tests::{Daemon, Random, Scratch, fsck_clean};

mod kernel;
mod operation;
mod reasons;
mod tree;

use kernel::{Kernel, Mounted};
use operation::{Operation, Outcome, Place};
use tree::Tree;

/// Operations between two comparisons of the trees.
const COMPARED: u64 = 500;

/// Operations between two remounts of Pollux.
const REMOUNTED: u64 = 2_000;

/// Kinds of operations that have to succeed, of 25; a seed may have no luck with some.
const KINDS: usize = 22;

/// Operations that are shown with a failure.
const SHOWN: usize = 25;

/// The three file systems, and what happened.
struct Run {
    ours: Place,
    others: Vec<(Kernel, Place)>,
    /// How often file systems differed for a reason.
    differences: BTreeMap<&'static str, u64>,
    recent: VecDeque<String>,
    /// Operations that succeeded, by kind.
    succeeded: BTreeMap<String, u64>,
}

impl Run {
    fn step(&mut self, number: u64, operation: &Operation) -> Result<()> {
        let ours = self.ours.apply(operation);
        self.remember(number, operation, &ours);
        if let Some(reason) = reasons::refused_by_fuse(operation, &ours) {
            *self.differences.entry(reason).or_default() += 1;
            return Ok(());
        }
        if ours.is_ok() {
            *self.succeeded.entry(operation.kind()).or_default() += 1;
        }
        let theirs: Vec<(Kernel, Outcome)> =
            self.others.iter_mut().map(|(kernel, place)| (*kernel, place.apply(operation))).collect();
        for (kernel, outcome) in &theirs {
            if *outcome == ours {
                continue;
            }
            let Some(reason) = reasons::why(operation, &ours, outcome, *kernel) else {
                bail!("{operation:?} is {} on Pollux; {}", shown(&ours), shown_all(&theirs));
            };
            *self.differences.entry(reason).or_default() += 1;
        }
        Ok(())
    }

    fn remember(&mut self, number: u64, operation: &Operation, outcome: &Outcome) {
        if self.recent.len() == SHOWN {
            self.recent.pop_front();
        }
        self.recent.push_back(format!("{number}: {operation:?}: {}", shown(outcome)));
    }

    fn compare(&self) -> Result<()> {
        let ours = Tree::of(&self.ours.root)?;
        let mut trees = Vec::new();
        for (kernel, place) in &self.others {
            // Where holes are is certain once everything is written.
            rustix::fs::syncfs(std::fs::File::open(&place.root)?)?;
            let theirs = Tree::of(&place.root)?;
            ours.same_as(&theirs).with_context(|| format!("Pollux and {kernel:?}"))?;
            trees.push(theirs);
        }
        rustix::fs::syncfs(std::fs::File::open(&self.ours.root)?)?;
        Tree::of(&self.ours.root)?.has_holes_of(&trees)
    }
}

fn shown(outcome: &Outcome) -> String {
    match outcome {
        Ok(value) => format!("{value:?}"),
        Err(errno) => nix::errno::Errno::from_raw(*errno).to_string(),
    }
}

fn shown_all(outcomes: &[(Kernel, Outcome)]) -> String {
    outcomes
        .iter()
        .map(|(kernel, outcome)| format!("{kernel:?}: {}", shown(outcome)))
        .collect::<Vec<_>>()
        .join("; ")
}

fn asked_for(name: &str, otherwise: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name}={text} is no number")),
        Err(_) => Ok(otherwise),
    }
}

#[test]
fn pollux_does_what_btrfs_and_xfs_do() -> Result<()> {
    let operations = asked_for("POLLUX_DIFFERENTIAL_OPERATIONS", 10_000)?;
    let seed = asked_for("POLLUX_DIFFERENTIAL_SEED", 1)?;
    ensure!(nix::unistd::Uid::effective().is_root(), "this test mounts loop devices and so needs root");
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let scratch = Scratch::new()?;
    let mut mounted = Vec::new();
    for kernel in Kernel::ALL {
        mounted.push((kernel, Mounted::new(kernel, scratch.path())?));
    }
    let mut daemon = Daemon::up(&scratch, &["--size", "2GiB"])?;
    let mut run = Run {
        ours: Place::new(scratch.mount()),
        others: mounted
            .iter()
            .map(|(kernel, mount)| (*kernel, Place::new(mount.root().to_owned())))
            .collect(),
        differences: BTreeMap::new(),
        recent: VecDeque::new(),
        succeeded: BTreeMap::new(),
    };
    let (mut random, began) = (Random(seed), Instant::now());
    for number in 1..=operations {
        let mut done = run.step(number, &Operation::choose(&mut random));
        if number % COMPARED == 0 || number == operations {
            done = done.and_then(|()| run.compare());
        }
        if done.is_ok() && (number % REMOUNTED == 0 || number == operations) {
            run.ours.close_all();
            run.others.iter_mut().for_each(|(_, place)| place.close_all());
            daemon.stop()?;
            fsck_clean(&scratch)?;
            daemon = Daemon::up(&scratch, &[])?;
            done = run.compare().context("after a remount");
        }
        done.with_context(|| {
            let recent: Vec<_> = run.recent.iter().map(String::as_str).collect();
            format!(
                "{}\nagain: POLLUX_DIFFERENTIAL_SEED={seed} POLLUX_DIFFERENTIAL_OPERATIONS={number} cargo test --package hw-tests \
                 --test differential\nafter operation {number}",
                recent.join("\n")
            )
        })?;
    }
    println!(
        "seed {seed}: {operations} operations in {:?}; successful: {:?}",
        began.elapsed(),
        run.succeeded
    );
    run.differences.iter().for_each(|(reason, count)| println!("{count} times: {reason}"));
    // Few operations meet few of each kind.
    let expected = if operations < 5_000 { 1 } else { KINDS };
    ensure!(run.succeeded.len() >= expected, "only these succeeded: {:?}", run.succeeded);
    run.ours.close_all();
    run.others.clear();
    daemon.stop()?;
    fsck_clean(&scratch)
}
