//! `cargo xtask bench`: measurements that documents quote, with their goals.
//!
//! Owns: the command line, [`Measured`] (a figure and whether it reaches its goal), and the page docs/benchmarks.md, whose marked
//! part `--write` replaces. What is measured, and how, is in the submodules.
//!
//! Invariants: a figure that could not be taken is named with the reason, never left out; goals are ratios or counts, so
//! that they hold on any machine.

mod driver;
mod fs;
mod machine;

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, ensure};
use clap::{Args, Subcommand};
use serde::Deserialize;

use crate::steps::{Steps, cargo};

/// What is measured.
#[derive(Args)]
pub(crate) struct BenchOptions {
    #[command(subcommand)]
    subject: Subject,
}

#[derive(Subcommand)]
enum Subject {
    /// The NVMe driver: instructions per request, doorbells, two cores, and a peer
    Driver(driver::DriverOptions),
    /// The filesystem: beside kernel filesystems, a FUSE server that does nothing, the raw driver
    Fs(fs::FsOptions),
}

/// A figure.
struct Measured {
    what: String,
    figure: String,
    goal: String,
    reached: bool,
}

/// What came of a subject.
#[derive(Default)]
struct Report {
    measured: Vec<Measured>,
    /// What could not be measured here, and what would enable it.
    missing: Vec<String>,
    /// What was to be measured and failed.
    broken: Vec<String>,
}

impl Report {
    fn note(&mut self, what: impl Into<String>, figure: impl Into<String>, goal: &str, reached: bool) {
        let (what, figure, goal) = (what.into(), figure.into(), goal.to_owned());
        println!("{what}: {figure} (goal: {goal}{})", if reached { "" } else { ", MISSED" });
        self.measured.push(Measured { what, figure, goal, reached });
    }

    fn broken(&mut self, what: String) {
        println!("FAILED: {what}");
        self.broken.push(what);
    }

    fn problems(&self) -> Vec<String> {
        let missed = self.measured.iter().filter(|measured| !measured.reached);
        let missed = missed.map(|m| format!("{}: {} misses the goal of {}", m.what, m.figure, m.goal));
        missed.chain(self.broken.iter().map(|what| format!("not measured: {what}"))).collect()
    }

    fn page(&self, command: &str) -> String {
        let mut text = format!("{}\n`{command}`\n\n| | | goal | |\n|---|---|---|---|\n", machine::describe());
        for Measured { what, figure, goal, reached } in &self.measured {
            let mark = if *reached { "reached" } else { "**missed**" };
            text.push_str(&format!("| {what} | {figure} | {goal} | {mark} |\n"));
        }
        for missing in self.missing.iter().chain(&self.broken) {
            text.push_str(&format!("\nNot measured: {missing}\n"));
        }
        text
    }
}

/// Measures, prints, and on request writes the figures down.
pub(crate) fn run(steps: &mut Steps, options: &BenchOptions) {
    match &options.subject {
        Subject::Driver(options) => steps.check("bench driver", |root| {
            let command = options.write.then(|| options.command_line());
            publish(root, "driver", command, &driver::measure(root, options)?)
        }),
        Subject::Fs(options) => steps.check("bench fs", |root| {
            let command = options.write.then(|| options.command_line());
            publish(root, "fs", command, &fs::measure(root, options)?)
        }),
    }
}

/// Says what was not measured, and writes the part `name` of the page if there is a command to name there.
fn publish(root: &Path, name: &str, command: Option<String>, report: &Report) -> anyhow::Result<Vec<String>> {
    for missing in &report.missing {
        println!("NOT MEASURED: {missing}");
    }
    if let Some(command) = command {
        let page = root.join("docs/benchmarks.md");
        let text =
            std::fs::read_to_string(&page).with_context(|| format!("cannot read {}", page.display()))?;
        let text = replace_marked(&text, name, &report.page(&command))?;
        std::fs::write(&page, text).with_context(|| format!("cannot write {}", page.display()))?;
        println!("written to {}", page.display());
    }
    Ok(report.problems())
}

/// `text` with what stands between the marks of `name` replaced.
fn replace_marked(text: &str, name: &str, part: &str) -> anyhow::Result<String> {
    let (begin, end) = (format!("<!-- {name}: begin -->\n"), format!("<!-- {name}: end -->"));
    let from =
        text.find(&begin).with_context(|| format!("docs/benchmarks.md has no mark {}", begin.trim()))?;
    let from = from + begin.len();
    let length = text[from..].find(&end).with_context(|| format!("docs/benchmarks.md has no mark {end}"))?;
    Ok(format!("{}{part}{}", &text[..from], &text[from + length..]))
}

#[derive(Deserialize)]
struct Artifact {
    target: Option<Target>,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

/// Builds a program for release; returns where it is.
fn build(root: &Path, what: &[&str], name: &str) -> anyhow::Result<PathBuf> {
    let output = cargo(root)
        .args(["build", "--release", "--locked", "--quiet", "--message-format=json-render-diagnostics"])
        .args(what)
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    ensure!(output.status.success(), "cannot build {name}");
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<Artifact>(line).ok())
        .filter(|artifact| artifact.target.as_ref().is_some_and(|target| target.name == name))
        .find_map(|artifact| artifact.executable)
        .with_context(|| format!("cargo does not say where {name} is"))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_marked_part_is_replaced() {
        let text = "before\n<!-- driver: begin -->\nold\n<!-- driver: end -->\nafter\n";
        let replaced = replace_marked(text, "driver", "new\n").expect("both marks are there");
        assert_eq!(replaced, "before\n<!-- driver: begin -->\nnew\n<!-- driver: end -->\nafter\n");
        assert!(replace_marked(text, "fs", "").is_err());
    }

    #[test]
    fn a_missed_goal_is_a_problem() {
        let mut report = Report::default();
        report.note("a", "1", "2", true);
        report.note("b", "3", "2", false);
        assert_eq!(report.problems(), ["b: 3 misses the goal of 2"]);
    }

    #[test]
    fn the_median_is_not_moved_by_an_outlier() {
        assert_eq!(median(vec![3.0, 1.0, 100.0]), 3.0);
        assert!(median(Vec::new()).is_nan());
    }

    #[test]
    fn what_failed_is_a_problem() {
        let mut report = Report::default();
        report.broken("a row: why".to_owned());
        assert_eq!(report.problems(), ["not measured: a row: why"]);
    }
}
