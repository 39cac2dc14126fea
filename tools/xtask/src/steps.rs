//! Running steps and keeping their outcomes.
//!
//! Owns: [`Steps`], the list of what ran, and its closing table. A step is a command or a function; its output goes
//! straight to the terminal, so that a test runner's own closing lines stay readable in a log.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

/// How a step ended.
enum Outcome {
    Passed,
    Failed(String),
    Skipped(String),
}

struct Step {
    name: String,
    outcome: Outcome,
    took: Duration,
}

/// The steps of one run, in order.
pub(crate) struct Steps {
    root: PathBuf,
    steps: Vec<Step>,
}

impl Steps {
    /// No steps yet; commands run in `root`.
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root, steps: Vec::new() }
    }

    /// The workspace's folder.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Runs `cargo` with `arguments`.
    pub(crate) fn cargo(&mut self, name: &str, arguments: &[&str]) {
        self.cargo_with(name, arguments, &[]);
    }

    /// Runs `cargo` with `arguments` and further environment variables.
    pub(crate) fn cargo_with(&mut self, name: &str, arguments: &[&str], environment: &[(&str, &str)]) {
        let mut command = cargo(&self.root);
        command.args(arguments).envs(environment.iter().copied());
        self.command(name, &mut command);
    }

    /// Runs a command; anything but exit code 0 is a failure.
    pub(crate) fn command(&mut self, name: &str, command: &mut Command) {
        announce(name);
        let started = Instant::now();
        let outcome = match command.status() {
            Ok(status) if status.success() => Outcome::Passed,
            Ok(status) => Outcome::Failed(status.to_string()),
            Err(error) => {
                Outcome::Failed(format!("cannot run {}: {error}", command.get_program().to_string_lossy()))
            }
        };
        self.steps.push(Step { name: name.into(), outcome, took: started.elapsed() });
    }

    /// Runs a check written in Rust: the problems it finds fail the step.
    pub(crate) fn check(&mut self, name: &str, check: impl FnOnce(&Path) -> anyhow::Result<Vec<String>>) {
        announce(name);
        let started = Instant::now();
        let outcome = match check(&self.root) {
            Ok(problems) if problems.is_empty() => Outcome::Passed,
            Ok(problems) => {
                for problem in &problems {
                    eprintln!("error: {problem}");
                }
                Outcome::Failed(format!("{} found", problems.len()))
            }
            Err(error) => Outcome::Failed(format!("{error:#}")),
        };
        self.steps.push(Step { name: name.into(), outcome, took: started.elapsed() });
    }

    /// Notes a step that cannot run here.
    pub(crate) fn skip(&mut self, name: &str, reason: &str) {
        announce(name);
        println!("SKIPPED: {reason}");
        self.steps.push(Step {
            name: name.into(),
            outcome: Outcome::Skipped(reason.into()),
            took: Duration::ZERO,
        });
    }

    /// Notes a failure found outside a step of its own.
    pub(crate) fn fail(&mut self, name: &str, reason: &str) {
        announce(name);
        eprintln!("error: {reason}");
        self.steps.push(Step {
            name: name.into(),
            outcome: Outcome::Failed(reason.into()),
            took: Duration::ZERO,
        });
    }

    /// Prints the closing table. The exit code is 1 if a step failed.
    pub(crate) fn report(&self) -> ExitCode {
        println!();
        let mut failed = 0;
        for step in &self.steps {
            let seconds = step.took.as_secs_f32();
            match &step.outcome {
                Outcome::Passed => println!("  ok       {:<32} {seconds:>7.1} s", step.name),
                Outcome::Failed(why) => {
                    failed += 1;
                    println!("  FAILED   {:<32} {seconds:>7.1} s  {why}", step.name);
                }
                Outcome::Skipped(why) => println!("  SKIPPED  {:<32}            {why}", step.name),
            }
        }
        if failed == 0 {
            return ExitCode::SUCCESS;
        }
        println!("\n{failed} of {} steps failed", self.steps.len());
        ExitCode::FAILURE
    }
}

/// A `cargo` command in `root`, with the toolchain that runs this task.
pub(crate) fn cargo(root: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    command
}

/// Whether `cargo NAME` is installed.
pub(crate) fn has_cargo_command(root: &Path, name: &str) -> bool {
    cargo(root).args([name, "--version"]).output().is_ok_and(|output| output.status.success())
}

fn announce(name: &str) {
    println!("\n==> {name}");
}
