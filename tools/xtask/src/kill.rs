//! `cargo xtask kill`: kill -9 of the daemon under load, as often as one likes.
//!
//! Owns: the command line, and building the programs under test.
//!
//! Excludes: loads, kills and checks (`hw-tests/tests/kill`), of which `cargo xtask test` runs 20 rounds.

use clap::Args;

use crate::packages;
use crate::steps::Steps;
use crate::test::{install_tools, target_folder};

/// How often, and under what.
#[derive(Args)]
#[command(after_help = "\
A failure keeps image, journals and the daemon's words below target/kill.

Example:
  cargo xtask kill --rounds 1000 --load postgres")]
pub(crate) struct KillOptions {
    /// Kills
    #[arg(long, default_value_t = 100)]
    rounds: u64,
    /// Where randomness begins
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The load: postgres, names, fio or fsx; all in turn unless it is given
    #[arg(long)]
    load: Option<String>,
}

/// Builds and runs.
pub(crate) fn run(steps: &mut Steps, options: &KillOptions) {
    if let Some(reason) = packages::why_no_mount() {
        steps.skip("kill", &reason);
        return;
    }
    if let Err(reason) = packages::ensure("fio", "fio") {
        steps.fail("kill", &reason);
        return;
    }
    let tools = ["build", "--quiet", "--locked", "--release", "--package", "pollux-tools", "--bins"];
    steps.cargo("release build", &tools);
    install_tools(steps);
    let binaries = target_folder(steps).join("release");
    let (binaries, rounds, seed) =
        (binaries.to_string_lossy(), options.rounds.to_string(), options.seed.to_string());
    let mut environment =
        vec![("POLLUX_BIN_DIR", &*binaries), ("POLLUX_KILL_ROUNDS", &*rounds), ("POLLUX_KILL_SEED", &*seed)];
    environment.extend(options.load.as_deref().map(|load| ("POLLUX_KILL_LOAD", load)));
    let test =
        ["test", "--quiet", "--locked", "--package", "hw-tests", "--test", "kill", "--", "--nocapture"];
    steps.cargo_with("kill", &test, &environment);
}
