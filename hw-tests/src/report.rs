//! What a case printed, and the table made of it.
//!
//! Owns: [`Line`] (one case, as `hw-suite` prints it and others read it), [`Row`] and [`table`].
//!
//! `case SUITE/NAME passed|failed|skipped MILLISms [one-line reason]`
//!
//! Invariant: what is printed is read back as the same, whatever the reason contains.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Error, Result, bail, ensure};

/// How a case ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Everything held.
    Passed,
    /// Something did not, or it took too long, or it died.
    Failed,
    /// It could not run.
    Skipped,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Outcome::Passed => "passed",
            Outcome::Failed => "failed",
            Outcome::Skipped => "skipped",
        })
    }
}

/// One case that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// The suite.
    pub suite: String,
    /// The case.
    pub name: String,
    /// How it ended.
    pub outcome: Outcome,
    /// How long it took, in milliseconds when printed.
    pub took: Duration,
    /// Why it did not pass.
    pub reason: String,
}

impl Line {
    /// A line; of `reason` no more is kept than fits on one.
    pub fn new(suite: &str, name: &str, outcome: Outcome, took: Duration, reason: &str) -> Self {
        let reason = reason.split_whitespace().collect::<Vec<_>>().join(" ");
        let took = Duration::from_millis(u64::try_from(took.as_millis()).unwrap_or(u64::MAX));
        Self { suite: suite.to_owned(), name: name.to_owned(), outcome, took, reason }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "case {}/{} {} {}ms", self.suite, self.name, self.outcome, self.took.as_millis())?;
        if self.reason.is_empty() { Ok(()) } else { write!(f, " {}", self.reason) }
    }
}

impl FromStr for Line {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut words = text.trim_end().splitn(5, ' ');
        ensure!(words.next() == Some("case"), "a line of a case begins with `case`: {text:?}");
        let (suite, name) = words
            .next()
            .and_then(|path| path.split_once('/'))
            .with_context(|| format!("SUITE/NAME is missing: {text:?}"))?;
        let outcome = match words.next() {
            Some("passed") => Outcome::Passed,
            Some("failed") => Outcome::Failed,
            Some("skipped") => Outcome::Skipped,
            other => bail!("{other:?} is no outcome: {text:?}"),
        };
        let millis = words.next().and_then(|word| word.strip_suffix("ms")?.parse().ok());
        let took = Duration::from_millis(millis.with_context(|| format!("no time: {text:?}"))?);
        Ok(Self::new(suite, name, outcome, took, words.next().unwrap_or("")))
    }
}

/// One suite on one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// What the device is called.
    pub device: String,
    /// The suite.
    pub suite: String,
    /// Cases that passed.
    pub passed: usize,
    /// Cases that failed.
    pub failed: usize,
    /// Cases that could not run.
    pub skipped: usize,
    /// Time of all of them.
    pub took: Duration,
}

/// The rows of one device, a suite each, in the order in which the suites began.
pub fn rows(device: &str, lines: &[Line]) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for line in lines {
        let known = rows.iter().position(|row| row.suite == line.suite);
        let at = known.unwrap_or_else(|| {
            let (device, suite) = (device.to_owned(), line.suite.clone());
            rows.push(Row { device, suite, passed: 0, failed: 0, skipped: 0, took: Duration::ZERO });
            rows.len() - 1
        });
        let row = &mut rows[at];
        *match line.outcome {
            Outcome::Passed => &mut row.passed,
            Outcome::Failed => &mut row.failed,
            Outcome::Skipped => &mut row.skipped,
        } += 1;
        row.took += line.took;
    }
    rows
}

/// The closing table.
pub fn table(rows: &[Row]) -> String {
    let width = |title: &str, of: fn(&Row) -> &str| {
        rows.iter().map(|row| of(row).chars().count()).chain([title.len()]).max().unwrap_or(0)
    };
    let device = width("device", |row| &row.device);
    let suite = width("suite", |row| &row.suite);
    let mut text = format!("{:device$}  {:suite$}  passed  failed  skipped     time\n", "device", "suite");
    for row in rows {
        let failed = if row.failed > 0 { format!("{} !", row.failed) } else { row.failed.to_string() };
        text += &format!(
            "{:device$}  {:suite$}  {:>6}  {failed:>6}  {:>7}  {:>5.1} s\n",
            row.device,
            row.suite,
            row.passed,
            row.skipped,
            row.took.as_secs_f32()
        );
    }
    text
}

/// `N passed, M failed, K skipped`.
pub fn totals(lines: &[Line]) -> String {
    let count = |outcome| lines.iter().filter(|line| line.outcome == outcome).count();
    format!(
        "{} passed, {} failed, {} skipped",
        count(Outcome::Passed),
        count(Outcome::Failed),
        count(Outcome::Skipped)
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed step of a test is the failure of the test")]

    use super::*;

    fn line(suite: &str, outcome: Outcome, reason: &str) -> Line {
        Line::new(suite, "n", outcome, Duration::from_micros(12_900), reason)
    }

    #[test]
    fn a_line_is_read_back_as_it_was_printed() {
        for outcome in [Outcome::Passed, Outcome::Failed, Outcome::Skipped] {
            for reason in ["", "why", "two words 7ms passed", "of\nseveral\n  lines\t"] {
                let line = line("io", outcome, reason);
                assert_eq!(line.to_string().parse::<Line>().unwrap(), line);
            }
        }
        assert_eq!(line("io", Outcome::Failed, "a\nb").to_string(), "case io/n failed 12ms a b");
    }

    #[test]
    fn what_is_no_line_is_refused() {
        for text in
            ["", "case", "case io passed 1ms", "case io/n won 1ms", "case io/n passed 1s", "hw-suite: 1"]
        {
            assert!(text.parse::<Line>().is_err(), "{text}");
        }
    }

    #[test]
    fn rows_count_each_suite_once() {
        let lines = [
            line("io", Outcome::Passed, ""),
            line("admin", Outcome::Skipped, "x"),
            line("io", Outcome::Failed, "x"),
        ];
        let rows = rows("emu:mem", &lines);
        assert_eq!(rows.len(), 2);
        assert_eq!((rows[0].passed, rows[0].failed, rows[0].skipped), (1, 1, 0));
        assert_eq!((rows[1].passed, rows[1].failed, rows[1].skipped), (0, 0, 1));
        assert_eq!(totals(&lines), "1 passed, 1 failed, 1 skipped");
        assert!(table(&rows).contains("1 !"), "{}", table(&rows));
    }
}
