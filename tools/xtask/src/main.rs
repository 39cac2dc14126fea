//! `cargo xtask`: the menu of the project's build tasks.
//!
//! Owns: which checks and test tiers exist, in which order they run, and the closing table that says for each step
//! whether it passed, failed or was skipped and why.
//!
//! Invariants: a step that could not run is reported as skipped with its reason and the command that would enable
//! it, never as passed; one failing step does not hide the ones after it; the exit code is 0 only if none failed.
//!
//! Excludes: the tests themselves, and anything that builds on the project's own crates (this one knows
//! the list of planted bugs only).

mod bench;
mod campaign;
mod check;
mod conventions;
mod direction;
mod fuzz;
mod hw_tests;
mod kill;
mod models;
mod packages;
mod planted;
mod steps;
mod test;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};

use crate::steps::Steps;

/// The project's build tasks.
#[derive(Parser)]
#[command(name = "cargo xtask", after_help = "Example:\n  cargo xtask check && cargo xtask test")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Format, clippy, rustdoc, dependency direction, conventions, cargo-deny
    Check,
    /// Unit, property and documentation tests, then the tiers that mount
    Test(test::TestOptions),
    /// The suites on the embedded controller, on QEMU, in a guest, on a real drive
    HwTests(hw_tests::HwTestsOptions),
    /// Measure, and compare with the goals
    Bench(bench::BenchOptions),
    /// Run a fuzz target for a time, or one saved input
    Fuzz(fuzz::FuzzOptions),
    /// Simulate: clients, tasks, faults, power cuts and remounts in virtual time
    Sim(campaign::SimOptions),
    /// Cut the power at every write of short workloads, and judge what is left
    Crash(campaign::CrashOptions),
    /// kill -9 of the daemon under load, over and over
    Kill(kill::KillOptions),
    /// Protocols between threads in every interleaving, and `unsafe` under Miri
    Models,
    /// Plant bugs one at a time, and see that each is caught
    Planted(planted::PlantedOptions),
    /// check, then test: what CI runs
    Ci(test::TestOptions),
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(steps) => steps.report(),
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<Steps> {
    let root = workspace_root()?;
    let mut steps = Steps::new(root);
    match &arguments.task {
        Task::Check => check::run(&mut steps),
        Task::Test(options) => test::run(&mut steps, options),
        Task::HwTests(options) => hw_tests::run(&mut steps, options),
        Task::Bench(options) => bench::run(&mut steps, options),
        Task::Fuzz(options) => fuzz::run(&mut steps, options),
        Task::Sim(options) => campaign::sim(&mut steps, options),
        Task::Crash(options) => campaign::crash(&mut steps, options),
        Task::Kill(options) => kill::run(&mut steps, options),
        Task::Models => models::run(&mut steps),
        Task::Planted(options) => planted::run(&mut steps, options),
        Task::Ci(options) => {
            check::run(&mut steps);
            test::run(&mut steps, options);
        }
    }
    Ok(steps)
}

/// The folder of the workspace's `Cargo.toml`: two above this crate's.
fn workspace_root() -> anyhow::Result<PathBuf> {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let root = here.ancestors().nth(2).context("this crate lies two folders below the workspace")?;
    Ok(root.to_path_buf())
}
