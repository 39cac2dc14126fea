//! `cargo xtask models`: protocols between threads in every interleaving (loom), and modules with `unsafe` under Miri.
//!
//! Owns: which crates have models, and which modules Miri runs. Models are built with `--cfg loom` into a target folder of
//! their own, so that an ordinary build stays as it is; with the feature `planted`, so that `cargo xtask planted` runs the same
//! programs.
//!
//! Excludes: the models, which are tests named `loom_…` beside the code that they run.

use std::path::Path;
use std::process::Command;

use crate::steps::{Steps, cargo};

/// Modules with `unsafe` that run under Miri: package, filter, flags. Those that map memory or call the system cannot.
const MIRI: &[(&str, &str, &str)] = &[
    // Miri's model of weak memory knows no atomic accesses of different sizes to the same memory.
    ("reactor", "dma::cells", "-Zmiri-disable-weak-memory-emulation"),
    ("nvme-emulator", "dma::payload", ""),
];

/// What makes a cargo command build the models.
pub(crate) fn choose(command: &mut Command, root: &Path) {
    command.args(["--package", "reactor", "--package", "nvme", "--lib"]);
    command.args(["--features", "reactor/planted,nvme/planted"]);
    command.env("RUSTFLAGS", "--cfg loom").env("CARGO_TARGET_DIR", root.join("target/loom"));
}

/// Runs all models, and Miri where it is.
pub(crate) fn run(steps: &mut Steps) {
    let mut command = cargo(steps.root());
    command.args(["test", "--quiet", "--locked"]);
    choose(&mut command, steps.root());
    command.args(["--", "loom_"]);
    steps.command("models", &mut command);
    miri(steps);
}

fn miri(steps: &mut Steps) {
    let there = nightly(steps.root()).args(["miri", "--version"]).output();
    if !there.is_ok_and(|output| output.status.success()) {
        let install = "rustup toolchain install nightly --component miri,rust-src";
        steps.skip("miri", &format!("no nightly toolchain with Miri; `{install}` enables it"));
        return;
    }
    for (package, filter, flags) in MIRI {
        let mut command = nightly(steps.root());
        command.args(["miri", "test", "--quiet", "--locked", "--package", package, "--lib", filter]);
        command.env("MIRIFLAGS", flags).env("CARGO_TARGET_DIR", steps.root().join("target/miri"));
        steps.command(&format!("miri {package} {filter}"), &mut command);
    }
}

/// `cargo` of the nightly toolchain. Run by rustup: the cargo that runs this task is another's.
fn nightly(root: &Path) -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", "nightly", "cargo"]).current_dir(root);
    // Set by the cargo that runs this task, for its own toolchain.
    for variable in ["RUSTUP_TOOLCHAIN", "CARGO", "RUSTC", "RUSTDOC"] {
        command.env_remove(variable);
    }
    command
}
