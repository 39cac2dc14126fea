//! Runs the cases that bring a QEMU of their own, and `hw-suite` on each configuration of the matrix, one after another:
//! `hw-qemu BIN_DIR [FILTER]`. A configuration is named `matrix/NAME`.
//!
//! Excludes: deadlines and tables; cases that hang are ended by whoever started this.

use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use hw_tests::qemu::{self, Configuration, Machine, Runs};
use hw_tests::suite::{Environment, Verdict};

fn main() -> Result<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    let bin_dir = arguments.next().context("usage: hw-qemu BIN_DIR [FILTER]")?.into();
    let filter = arguments.next().unwrap_or_default();
    let scratch = tempfile::Builder::new().prefix("pollux-hw-").tempdir()?;
    let environment = Environment { bin_dir, scratch_root: scratch.path().to_owned() };
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for case in qemu::cases() {
        let name = format!("{}/{}", case.suite, case.name);
        if !name.contains(&filter) {
            continue;
        }
        let start = Instant::now();
        let ended = (case.run)(&environment);
        let took = start.elapsed().as_millis();
        match ended {
            Ok(Verdict::Passed) => {
                passed += 1;
                println!("case {name} passed {took}ms");
            }
            Ok(Verdict::Skipped(reason)) => {
                skipped += 1;
                println!("case {name} skipped {took}ms {reason}");
            }
            Err(error) => {
                failed += 1;
                println!("case {name} failed {took}ms {error:#}");
            }
        }
    }
    for configuration in qemu::matrix() {
        let name = format!("matrix/{}", configuration.name);
        let runs = match configuration.runs {
            Runs::Everything => None,
            Runs::Only(part) => Some(part),
            // Looked at by a case.
            Runs::Refused(_) => continue,
        };
        if !name.contains(&filter) {
            continue;
        }
        let start = Instant::now();
        let ended = suite(&environment, &configuration, runs);
        let took = start.elapsed().as_millis();
        match ended {
            Ok(summary) => {
                passed += 1;
                println!("case {name} passed {took}ms {summary}");
            }
            Err(error) => {
                failed += 1;
                println!("case {name} failed {took}ms {error:#}");
            }
        }
    }
    println!("hw-qemu: {passed} passed, {failed} failed, {skipped} skipped");
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The suite on one configuration; its last line.
fn suite(environment: &Environment, configuration: &Configuration, runs: Option<&str>) -> Result<String> {
    let machine = Machine::start(configuration)?;
    let mut command = Command::new(environment.bin_dir.join("hw-suite"));
    command.args(["--device", &machine.spec()]).env("POLLUX_BIN_DIR", &environment.bin_dir);
    if let Some(part) = runs {
        command.args(["--filter", part]);
    }
    let output = command.output().context("running hw-suite")?;
    let printed = hw_tests::text(&output);
    ensure!(output.status.success(), "hw-suite: {}\n{printed}", output.status);
    let summary = printed.lines().rfind(|line| line.starts_with("hw-suite: ")).unwrap_or_default();
    // A filter that matches nothing proves nothing.
    ensure!(!summary.contains(" 0 passed"), "nothing ran: {summary}");
    Ok(summary.to_owned())
}
