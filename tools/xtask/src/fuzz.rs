//! `cargo xtask fuzz`: a fuzz target of the crate `pollux-fuzz`, for as long as one likes; and each of them for a while, as a part
//! of `cargo xtask test`.
//!
//! Owns: the command line, and the choice of the engine:
//!
//! | engine | where | how inputs are found |
//! |---|---|---|
//! | libFuzzer (`fuzz/coverage`) | a C++ compiler is there | mutations of inputs that reached new code, kept in `target/fuzz/corpus` |
//! | the crate's own | everywhere; `--plain` | random ones, and mutations of the corpus |
//!
//! Excludes: targets and the making up of inputs.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Context;
use clap::Args;

use crate::steps::{Steps, cargo};

/// Targets: the folders of `fuzz/corpus` have the same names.
const TARGETS: &[&str] =
    &["control", "driver", "fsck", "log", "mount", "node", "spec", "superblock", "vfio_user"];

/// Seconds that `cargo xtask test` gives each target.
const SECONDS_EACH: u64 = 30;

/// Megabytes that a run may come to.
const MEMORY_LIMIT_MB: u32 = 512;

/// Longest input, in bytes: as in `fuzz/src/campaign.rs`.
const LONGEST: u32 = 768;

/// Seconds that one input may take.
const SLOWEST: u32 = 60;

/// What makes the compiler count which code an input reaches. The instrumentation is the stable compiler's own.
const INSTRUMENTATION: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
     -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 --cfg fuzzing";

/// Where the instrumented build goes; build scripts are not instrumented because the target is named.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// What runs.
#[derive(Args)]
pub(crate) struct FuzzOptions {
    /// Target: control, driver, fsck, log, mount, node, spec, superblock, vfio_user
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
    /// Without coverage: the same inputs for the same seed, on every machine
    #[arg(long)]
    plain: bool,
}

/// Builds the target with assertions, and runs it.
pub(crate) fn run(steps: &mut Steps, options: &FuzzOptions) {
    // One input needs no guidance.
    if !options.plain && options.replay.is_none() && has_cpp_compiler() {
        guided(steps, &options.target, options.seconds, options.seed);
    } else {
        plain(steps, options);
    }
}

/// Each target for a while.
pub(crate) fn run_all(steps: &mut Steps) {
    for target in TARGETS {
        let options = FuzzOptions {
            target: (*target).to_owned(),
            seconds: SECONDS_EACH,
            seed: 1,
            replay: None,
            plain: false,
        };
        run(steps, &options);
    }
}

fn plain(steps: &mut Steps, options: &FuzzOptions) {
    let (seconds, seed) = (options.seconds.to_string(), options.seed.to_string());
    let replay = options.replay.as_ref().map(|path| path.to_string_lossy().into_owned());
    let mut arguments =
        vec!["run", "--quiet", "--locked", "--profile", "campaign", "--package", "pollux-fuzz"];
    arguments.extend(["--", &options.target]);
    arguments.extend(["--seconds", &seconds, "--seed", &seed]);
    if let Some(path) = &replay {
        arguments.extend(["--replay", path]);
    }
    steps.cargo(&format!("fuzz {}", options.target), &arguments);
}

/// What cc-rs looks for.
fn has_cpp_compiler() -> bool {
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    Command::new(compiler).arg("--version").output().is_ok_and(|output| output.status.success())
}

fn guided(steps: &mut Steps, target: &str, seconds: u64, seed: u64) {
    let root = steps.root().to_path_buf();
    let name = format!("fuzz {target}");
    if !TARGETS.contains(&target) {
        steps.fail(&name, &format!("no target {target}; there are {}", TARGETS.join(", ")));
        return;
    }
    let program = match build_guided(&root).and_then(|program| {
        std::fs::create_dir_all(found(&root, target)).context("cannot make target/fuzz")?;
        Ok(program)
    }) {
        Ok(program) => program,
        Err(error) => {
            steps.fail(&name, &format!("{error:#}; --plain does without libFuzzer"));
            return;
        }
    };
    let mut command = Command::new(program);
    command.current_dir(&root).env("POLLUX_FUZZ_TARGET", target);
    // New inputs go to the first folder; the repository's are only read.
    command.arg(found(&root, target)).arg(root.join("fuzz/corpus").join(target));
    command.args([
        format!("-max_total_time={seconds}"),
        format!("-seed={seed}"),
        format!("-rss_limit_mb={MEMORY_LIMIT_MB}"),
        format!("-max_len={LONGEST}"),
        format!("-timeout={SLOWEST}"),
        format!("-artifact_prefix={}/", root.join("target/fuzz").display()),
        "-verbosity=0".to_owned(),
        "-print_final_stats=1".to_owned(),
    ]);
    steps.command(&name, &mut command);
}

/// Where inputs that reach new code are kept.
fn found(root: &Path, target: &str) -> PathBuf {
    root.join("target/fuzz/corpus").join(target)
}

/// Builds the instrumented program.
fn build_guided(root: &Path) -> anyhow::Result<PathBuf> {
    let folder = root.join("target/fuzz-coverage");
    let mut command = cargo(root);
    command.args(["build", "--quiet", "--locked", "--target", TRIPLE]);
    command.args(["--manifest-path", "fuzz/coverage/Cargo.toml"]);
    command.env("CARGO_TARGET_DIR", &folder).env("RUSTFLAGS", INSTRUMENTATION);
    let status = command.stdin(Stdio::null()).status().context("cannot run cargo")?;
    anyhow::ensure!(status.success(), "the instrumented build fails ({status})");
    Ok(folder.join(TRIPLE).join("debug/pollux-fuzz-coverage"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_a_corpus_and_every_corpus_a_target() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
        let mut folders: Vec<String> = std::fs::read_dir(corpus)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        folders.sort();
        assert_eq!(folders, TARGETS);
    }
}
