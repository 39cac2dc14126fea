//! `cargo xtask bench`: measurements that documents quote, with their goals.
//!
//! Owns: the command line, [`Measured`] (a figure and whether it reaches its goal), and the page docs/benchmarks.md, whose marked
//! part `--write` replaces. What is measured, and how, is in the submodules.
//!
//! Invariants: a figure that could not be taken is named with the reason, never left out; goals are ratios or counts, so
//! that they hold on any machine.

mod driver;
mod machine;

use anyhow::Context;
use clap::{Args, Subcommand};

use crate::steps::Steps;

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
}

impl Report {
    fn note(&mut self, what: impl Into<String>, figure: impl Into<String>, goal: &str, reached: bool) {
        let (what, figure, goal) = (what.into(), figure.into(), goal.to_owned());
        println!("{what}: {figure} (goal: {goal}{})", if reached { "" } else { ", MISSED" });
        self.measured.push(Measured { what, figure, goal, reached });
    }

    fn problems(&self) -> Vec<String> {
        let missed = self.measured.iter().filter(|measured| !measured.reached);
        missed.map(|m| format!("{}: {} misses the goal of {}", m.what, m.figure, m.goal)).collect()
    }

    fn page(&self, command: &str) -> String {
        let mut text = format!("{}\n`{command}`\n\n| | | goal | |\n|---|---|---|---|\n", machine::describe());
        for Measured { what, figure, goal, reached } in &self.measured {
            let mark = if *reached { "reached" } else { "**missed**" };
            text.push_str(&format!("| {what} | {figure} | {goal} | {mark} |\n"));
        }
        for missing in &self.missing {
            text.push_str(&format!("\nNot measured: {missing}\n"));
        }
        text
    }
}

/// Measures, prints, and on request writes the figures down.
pub(crate) fn run(steps: &mut Steps, options: &BenchOptions) {
    let Subject::Driver(options) = &options.subject;
    steps.check("bench driver", |root| {
        let report = driver::measure(root, options)?;
        for missing in &report.missing {
            println!("NOT MEASURED: {missing}");
        }
        if options.write {
            let page = root.join("docs/benchmarks.md");
            let text =
                std::fs::read_to_string(&page).with_context(|| format!("cannot read {}", page.display()))?;
            let text = replace_marked(&text, "driver", &report.page(&options.command_line()))?;
            std::fs::write(&page, text).with_context(|| format!("cannot write {}", page.display()))?;
            println!("written to {}", page.display());
        }
        Ok(report.problems())
    });
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
}
