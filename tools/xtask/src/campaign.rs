//! `cargo xtask sim` and `cargo xtask crash`: the campaigns of `fs-core/src/volume/tests/campaign.rs`.
//!
//! Owns: the command lines, the build with optimisation and assertions (the profile `campaign`), and the environment that
//! a campaign sees, which has none of the caller's `POLLUX_…` variables.
//!
//! Excludes: what the campaigns do, count and find.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::available_parallelism;

use anyhow::{Context, ensure};
use clap::Args;

use crate::steps::{Steps, cargo};

/// Seeds that `cargo xtask test` runs.
const SEEDS_OF_TESTS: u64 = 200;

/// Distinct crash states that it judges; with those of second crashes they are more than 100,000.
const STATES_OF_TESTS: u64 = 55_000;

/// How much of the simulation.
#[derive(Args)]
#[command(after_help = "\
A failure prints its seed, the smallest run found that still fails, and the commands that repeat both.

Example:
  cargo xtask sim --seeds 10000 --seconds 3600")]
pub(crate) struct SimOptions {
    /// How many seeds
    #[arg(long, default_value_t = 200)]
    seeds: u64,
    /// The first of them
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Begin no more seeds after so long
    #[arg(long)]
    seconds: Option<u64>,
    /// Less of each seed than all: clients, operations of each, sessions, rounds of relocation and scrub
    #[arg(long, value_name = "CLIENTS,OPERATIONS,SESSIONS,TASKS", value_parser = size)]
    size: Option<String>,
    /// Print each seed's state
    #[arg(long)]
    verbose: bool,
}

/// How many crashes.
#[derive(Args)]
#[command(after_help = "\
Example:
  cargo xtask crash --ops 2 --shard 0/4 --subsets 12 --random 1024 --structured 64")]
pub(crate) struct CrashOptions {
    /// Operations of a workload: 1, or pairs as well
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=2))]
    ops: u64,
    /// Only every Nth workload, from the Ith on
    #[arg(long, value_name = "I/N", value_parser = part, default_value = "0/1")]
    shard: Part,
    /// Decides the order of workloads and the random outcomes
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Begin no more workloads after so long
    #[arg(long)]
    seconds: Option<u64>,
    /// Only this workload
    #[arg(long)]
    workload: Option<u64>,
    /// Go on with concurrent clients until there are so many distinct states
    #[arg(long)]
    states: Option<u64>,
    /// Every subset of up to so many unflushed writes
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u64).range(0..=12))]
    subsets: u64,
    /// Random outcomes of each kind (whole, torn at 512 bytes, torn at 4 KiB) at each write
    #[arg(long, default_value_t = 2)]
    random: u64,
    /// Of more unflushed writes than that: so many prefixes, without one, only one
    #[arg(long, default_value_t = 16)]
    structured: u64,
}

/// One of several equal parts of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    index: u64,
    of: u64,
}

fn part(text: &str) -> Result<Part, String> {
    let wrong = || format!("`{text}` is not a part such as 0/4, the first of four, or 3/4, the last");
    let (index, of) = text.split_once('/').ok_or_else(wrong)?;
    let part = Part { index: index.parse().map_err(|_| wrong())?, of: of.parse().map_err(|_| wrong())? };
    if part.index < part.of { Ok(part) } else { Err(wrong()) }
}

fn size(text: &str) -> Result<String, String> {
    let parts: Vec<Option<u32>> = text.split(',').map(|part| part.parse().ok()).collect();
    match parts[..] {
        [Some(1..), Some(_), Some(_), Some(_)] => Ok(text.to_owned()),
        _ => Err("four numbers are wanted, the first of them not 0, such as 3,60,2,1".to_owned()),
    }
}

/// Simulates.
pub(crate) fn sim(steps: &mut Steps, options: &SimOptions) {
    let mut environment =
        vec![("POLLUX_SEEDS", options.seeds.to_string()), ("POLLUX_FIRST_SEED", options.seed.to_string())];
    environment.extend(options.seconds.map(|seconds| ("POLLUX_SECONDS", seconds.to_string())));
    environment.extend(options.size.clone().map(|size| ("POLLUX_SIZE", size)));
    environment.extend(options.verbose.then(|| ("POLLUX_VERBOSE", "1".to_owned())));
    run(steps, "simulation", "simulation", &environment);
}

/// Enumerates crashes.
pub(crate) fn crash(steps: &mut Steps, options: &CrashOptions) {
    let mut environment = vec![
        ("POLLUX_OPS", options.ops.to_string()),
        ("POLLUX_PART", options.shard.index.to_string()),
        ("POLLUX_PARTS", options.shard.of.to_string()),
        ("POLLUX_FIRST_SEED", options.seed.to_string()),
        ("POLLUX_SUBSETS", options.subsets.to_string()),
        ("POLLUX_RANDOM", options.random.to_string()),
        ("POLLUX_STRUCTURED", options.structured.to_string()),
    ];
    environment.extend(options.seconds.map(|seconds| ("POLLUX_SECONDS", seconds.to_string())));
    environment.extend(options.workload.map(|workload| ("POLLUX_WORKLOAD", workload.to_string())));
    environment.extend(options.states.map(|states| ("POLLUX_STATES", states.to_string())));
    run(steps, "crash states", "crashes", &environment);
}

/// What `cargo xtask test` runs: every pair of operations, less deeply than a campaign, then concurrent clients.
pub(crate) fn of_tests(steps: &mut Steps) {
    let (seed, seconds) = (1, None);
    sim(steps, &SimOptions { seeds: SEEDS_OF_TESTS, seed, seconds, size: None, verbose: false });
    let options = CrashOptions {
        ops: 2,
        shard: Part { index: 0, of: 1 },
        seed,
        seconds,
        workload: None,
        states: Some(STATES_OF_TESTS),
        subsets: 4,
        random: 2,
        structured: 4,
    };
    crash(steps, &options);
}

fn run(steps: &mut Steps, name: &str, test: &str, environment: &[(&str, String)]) {
    let program = match build(steps.root()) {
        Ok(program) => program,
        Err(error) => return steps.fail(name, &format!("{error:#}")),
    };
    let mut command = Command::new(program);
    // As cargo does: the package's folder.
    command.current_dir(steps.root().join("fs-core"));
    let test = format!("volume::tests::campaign::{test}");
    command.args(["--ignored", "--exact", "--nocapture", &test]);
    for (variable, _) in std::env::vars_os() {
        if variable.to_string_lossy().starts_with("POLLUX_") {
            command.env_remove(variable);
        }
    }
    let jobs = available_parallelism().map_or(1, usize::from);
    command.env("POLLUX_JOBS", jobs.to_string());
    command.envs(environment.iter().map(|(name, value)| (name, value)));
    steps.command(name, &mut command);
}

/// Builds the tests of `fs-core` and says where they are.
fn build(root: &Path) -> anyhow::Result<PathBuf> {
    let mut command = cargo(root);
    command.args(["test", "--no-run", "--quiet", "--locked", "--message-format", "json"]);
    command.args(["--profile", "campaign", "--package", "fs-core", "--lib"]);
    let output = command.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    ensure!(output.status.success(), "the campaigns do not build");
    let text = String::from_utf8_lossy(&output.stdout);
    let messages = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let mut programs = messages.filter_map(|message| message["executable"].as_str().map(PathBuf::from));
    programs.next_back().context("cargo names no test program")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_do_not_exist_are_refused() {
        assert_eq!(part("3/4"), Ok(Part { index: 3, of: 4 }));
        for wrong in ["0/0", "4/4", "5/4", "1", "/", "-1/4", "1/4/4", "a/b"] {
            assert!(part(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_are_four_numbers() {
        assert!(size("1,0,0,0").is_ok());
        for wrong in ["", "1,2,3", "1,2,3,4,5", "0,1,1,1", "1,x,1,1", "1,-1,1,1"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
