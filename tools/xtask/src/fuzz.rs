//! `cargo xtask fuzz`: a fuzz target of the crate `pollux-fuzz`, for as long as one likes.
//!
//! Owns: the command line. Excludes: targets and the making up of inputs, and the short campaigns of `cargo xtask test`, which
//! are ordinary tests of that crate.

use std::path::PathBuf;

use clap::Args;

use crate::steps::Steps;

/// What runs.
#[derive(Args)]
pub(crate) struct FuzzOptions {
    /// Target: driver, spec, vfio_user
    target: String,
    /// Seconds
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Where randomness begins
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Run this input and nothing else
    #[arg(long)]
    replay: Option<PathBuf>,
}

/// Builds the target with assertions, and runs it.
pub(crate) fn run(steps: &mut Steps, options: &FuzzOptions) {
    let (seconds, seed) = (options.seconds.to_string(), options.seed.to_string());
    let replay = options.replay.as_ref().map(|path| path.to_string_lossy().into_owned());
    let mut arguments = vec!["run", "--quiet", "--locked", "--package", "pollux-fuzz", "--", &options.target];
    arguments.extend(["--seconds", &seconds, "--seed", &seed]);
    if let Some(path) = &replay {
        arguments.extend(["--replay", path]);
    }
    steps.cargo(&format!("fuzz {}", options.target), &arguments);
}
