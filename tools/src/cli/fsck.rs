//! `pollux fsck`: the offline check. Read-only; exit codes as fsck(8).

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use clap::Args;
use fs_core::fsck::{self, CheckError, CheckReport, DataCheck, Phase, Progress};
use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::print_json;
use crate::device::{self, DeviceSpec, superblock_failure};
use crate::failure::{Exit, Failure};
use crate::output::outln;
use crate::quantity::show_size;

/// Findings printed one by one; the JSON document has them all.
const PRINTED_FINDINGS: usize = 100;

/// How often a line says how it goes where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Check every invariant of a volume that is not mounted; changes nothing
#[derive(Args)]
#[command(after_help = "\
Exit codes: 0 clean, 4 errors found, 8 could not run (2 if the command line makes no sense).

JSON: {device, clean, total_findings, findings: [{code, message}], notes: [...], counts: {...}}

Example:
  pollux fsck --device emu:./pollux.img")]
pub(super) struct Fsck {
    /// The device
    #[arg(long, value_name = "SPEC", value_parser = device::parse)]
    device: DeviceSpec,

    /// Read the data of files too, and compare its checksums
    #[arg(long)]
    check_data_csum: bool,

    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

impl Fsck {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let report = self.check().map_err(|failure| failure.exit(Exit::CheckImpossible))?;
        if self.json {
            let findings = report.findings.iter();
            let findings: Vec<Value> = findings
                .map(|finding| json!({ "code": finding.code(), "message": finding.to_string() }))
                .collect();
            print_json(&json!({
                "device": self.device.to_string(),
                "clean": report.is_clean(),
                "total_findings": report.total_findings,
                "findings": findings,
                "notes": report.notes,
                "counts": report.counts,
            }))
            .map_err(|failure| failure.exit(Exit::CheckImpossible))?;
        } else {
            self.print(&report);
        }
        if report.is_clean() {
            return Ok(());
        }
        Err(Failure::new(format!(
            "{}: {} errors found; nothing was changed",
            self.device, report.total_findings
        ))
        .remedy("restore what is damaged from a copy")
        .exit(Exit::ErrorsFound))
    }

    fn check(&self) -> Result<CheckReport, Failure> {
        let data = if self.check_data_csum { DataCheck::Verify } else { DataCheck::Skip };
        let mut shown = Shown::new();
        let checked = device::on_one_reactor(&self.device, |ctx| async move {
            fsck::check_with(&ctx, data, &mut |progress| shown.update(progress)).await
        })?;
        checked.map_err(|error| match error {
            CheckError::Superblock(error) => superblock_failure(&self.device, &error),
            error => Failure::new(format!("cannot check {}: {error}", self.device)),
        })
    }

    fn print(&self, report: &CheckReport) {
        let counts = &report.counts;
        for note in &report.notes {
            outln!("note: {note}");
        }
        for finding in report.findings.iter().take(PRINTED_FINDINGS) {
            outln!("error: {finding}");
        }
        let more = report.total_findings.saturating_sub(PRINTED_FINDINGS as u64);
        if more > 0 {
            outln!("error: … and {more} more (--json lists more of them)");
        }
        outln!(
            "{}: {} shards, {} groups, {} nodes, {} items; {} inodes, {} names, {} extents, {} in use",
            self.device,
            counts.shards,
            counts.groups,
            counts.nodes,
            counts.items,
            counts.inodes,
            counts.entries,
            counts.extents,
            show_size(counts.used_blocks.saturating_mul(4096)),
        );
        if self.check_data_csum {
            outln!(
                "{} of file data compared with checksums",
                show_size(counts.data_blocks.saturating_mul(4096))
            );
        }
        outln!("{}", if report.is_clean() { "clean" } else { "NOT clean" });
    }
}

/// The progress as it is shown: a bar on a terminal, now and then a line otherwise, both on standard error.
struct Shown {
    bar: Option<ProgressBar>,
    line: Instant,
}

impl Shown {
    fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(ProgressBar::new_spinner);
        Self { bar, line: Instant::now() }
    }

    fn update(&mut self, progress: Progress) {
        let what = match progress.phase {
            Phase::Groups => "bitmaps",
            Phase::Trees => "tree nodes",
            Phase::Details => "tree nodes once more",
            Phase::Names => "names",
            Phase::Space => "free space",
        };
        let text = match progress.total {
            Some(total) => format!("{what}: {} of {total}", progress.done),
            None => format!("{what}: {}", progress.done),
        };
        match &self.bar {
            Some(bar) => {
                bar.set_message(text);
                bar.tick();
            }
            None if self.line.elapsed() >= LINE_INTERVAL => {
                self.line = Instant::now();
                eprintln!("{text}");
            }
            None => {}
        }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
