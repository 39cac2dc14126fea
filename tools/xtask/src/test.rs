//! `cargo xtask test`: the test tiers, from the fastest to those that mount and run real programs.
//!
//! Owns: which tiers exist and what each needs.
//!
//! | tier | is | needs |
//! |---|---|---|
//! | unit | tests of all crates but `hw-tests`, apart from those marked `#[ignore]` | nothing |
//! | doc | documentation tests | nothing |
//! | models | protocols between threads in every interleaving, `unsafe` under Miri | Miri: a nightly toolchain |
//! | campaigns | 200 seeds of the simulation (`cargo xtask sim`), 100,000 crash states (`cargo xtask crash`) | nothing |
//! | planted | bugs made on purpose, each of which a general test has to notice | nothing |
//! | fuzz | each fuzz target for half a minute | coverage guidance: a C++ compiler |
//! | mount | `hw-tests`, and all of `pollux-tools` with its `#[ignore]`d tests, on release builds of the programs: real mounts, real programs | `/dev/fuse`, root or fusermount3, Debian packages |
//! | hw-tests | the suites by device (`cargo xtask hw-tests`) | QEMU, a kernel package |
//!
//! Outside `hw-tests`, a test that needs more than a compiler carries `#[ignore = "what it needs"]`. The mount tier
//! finds the built programs in the folder named by the environment variable `POLLUX_BIN_DIR`.

use clap::Args;

use crate::steps::{Steps, has_cargo_command};
use crate::{campaign, fuzz, hw_tests, models, packages, planted};

/// Every crate but the one whose tests all mount.
const NOT_MOUNTING: &[&str] = &["--workspace", "--exclude", "hw-tests"];

/// Crates of the mount tier.
const MOUNT_CRATES: &[&str] = &["--package", "pollux-tools", "--package", "hw-tests"];

/// Test programs from the crate registry, kept in `target/tools`. Installing one that is there does nothing.
const INSTALLED_TOOLS: &[&str] = &["pjdfstest@0.2.2", "fsx@0.3.2"];

/// The test that needs loop devices.
const DIFFERENTIAL: &str = "pollux_does_what_btrfs_and_xfs_do";

/// Which tiers run.
#[derive(Args)]
pub(crate) struct TestOptions {
    /// Leave out the tier that mounts and runs real programs
    #[arg(long)]
    pub(crate) no_mount: bool,
}

/// Runs the tiers.
pub(crate) fn run(steps: &mut Steps, options: &TestOptions) {
    let runner = Runner::find(steps);
    runner.unit(steps);
    steps.cargo("doc tests", &["test", "--quiet", "--locked", "--workspace", "--doc"]);
    models::run(steps);
    campaign::of_tests(steps);
    planted::run(steps, &planted::PlantedOptions::default());
    fuzz::run_all(steps);
    if options.no_mount {
        steps.skip("mount tests", "left out with --no-mount");
    } else {
        mount(steps, runner);
    }
    hw_tests::run(steps, &hw_tests::HwTestsOptions::default());
}

fn mount(steps: &mut Steps, runner: Runner) {
    if let Some(reason) = packages::why_no_mount() {
        steps.skip("mount tests", &reason);
        return;
    }
    let missing = packages::missing();
    if !missing.is_empty() {
        println!("\ninstalling {} for the mount tests", missing.join(", "));
        if let Err(reason) = packages::install(&missing) {
            steps.fail("mount tests", &reason);
            return;
        }
    }
    steps.cargo(
        "release build",
        &[
            "build",
            "--quiet",
            "--locked",
            "--release",
            "--package",
            "pollux-tools",
            "--package",
            "hw-tests",
            "--bin",
            "pollux",
            "--bin",
            "polluxd",
            "--bin",
            "relay",
        ],
    );
    install_tools(steps);
    runner.mount(steps);
}

/// Test programs that are no Debian packages.
pub(crate) fn install_tools(steps: &mut Steps) {
    let tools = steps.root().join("target/tools");
    for tool in INSTALLED_TOOLS {
        let arguments = ["install", "--quiet", "--locked", "--root", &tools.to_string_lossy(), tool];
        steps.cargo(&format!("install {tool}"), &arguments);
    }
}

/// Which program runs the tests.
#[derive(Clone, Copy)]
enum Runner {
    Nextest,
    CargoTest,
}

impl Runner {
    fn find(steps: &Steps) -> Self {
        if has_cargo_command(steps.root(), "nextest") {
            return Self::Nextest;
        }
        println!("cargo-nextest is not installed (`cargo install --locked cargo-nextest`); using cargo test");
        Self::CargoTest
    }

    fn unit(self, steps: &mut Steps) {
        match self {
            Self::Nextest => {
                let options = ["nextest", "run", "--locked", "--no-fail-fast", "--status-level", "slow"];
                steps.cargo("unit tests", &[&options, NOT_MOUNTING].concat());
            }
            Self::CargoTest => {
                let options = ["test", "--quiet", "--locked", "--no-fail-fast", "--all-targets"];
                steps.cargo("unit tests", &[&options, NOT_MOUNTING].concat());
            }
        }
    }

    fn mount(self, steps: &mut Steps) {
        let binaries = target_folder(steps).join("release");
        let binaries = binaries.to_string_lossy();
        let environment = [("POLLUX_BIN_DIR", &*binaries)];
        let mut arguments = match self {
            Self::Nextest => {
                vec!["nextest", "run", "--locked", "--no-fail-fast", "--status-level", "pass"]
            }
            Self::CargoTest => vec!["test", "--locked", "--no-fail-fast", "--lib", "--tests"],
        };
        arguments.extend(MOUNT_CRATES);
        // One at a time: each of these keeps a daemon, a mount and often all cores busy.
        match self {
            Self::Nextest => {
                arguments.extend(["--run-ignored", "all", "--test-threads", "1"]);
            }
            Self::CargoTest => arguments.extend(["--", "--include-ignored", "--test-threads", "1"]),
        }
        if let Some(reason) = packages::why_no_loop() {
            steps.skip("differential with btrfs and XFS", &reason);
            arguments.extend(match self {
                Self::Nextest => ["-E", "not binary(differential)"],
                Self::CargoTest => ["--skip", DIFFERENTIAL],
            });
        }
        steps.cargo_with("mount tests", &arguments, &environment);
    }
}

pub(crate) fn target_folder(steps: &Steps) -> std::path::PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => steps.root().join(folder),
        None => steps.root().join("target"),
    }
}
