//! `hw-tests`: the suites on every device of a tier, and the table device × suite × result.
//!
//! Owns: the command line, the order of the run, the closing table. The suite on a device is a process of its own (`hw-suite`); cases that
//! bring a machine share one process for each tier (they may share the machine), which is started again behind a case that died or hung.
//!
//! Invariants: what could not run is printed as skipped, never as passed; nothing this program started outlives it.
//!
//! Exit codes: 0 nothing failed, 1 something failed, 2 nothing could run.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use hw_tests::report::{Line, Outcome, Row, rows, table, totals};
use hw_tests::runner::{die_with_parent, end_with_parent};
use hw_tests::stream::{Next, Stream};
use hw_tests::suite::{Environment, MachineCase, Verdict, cases};
use hw_tests::tiers::{Target, Tier};
use pollux::signals::{Alarm, Signals};
use serde_json::json;

/// What `hw-suite` may take for a line: its own deadline of a case, and a little.
const SUITE_PATIENCE: Duration = Duration::from_secs(150);
/// What a case with a machine of its own may take: a guest boots in 20 s and more, and then runs a whole suite.
const MACHINE_PATIENCE: Duration = Duration::from_secs(420);

/// Run the suites on the devices of a tier
#[derive(Parser)]
#[command(after_help = "\
The programs of this workspace are looked for in POLLUX_BIN_DIR, else beside this one.

Exit codes: 0 nothing failed, 1 something failed, 2 it could not run.

Example:
  hw-tests --tier emu
  hw-tests --device pci:0000:01:00.0 --destroy-data")]
struct Arguments {
    /// Tiers to run: emu, qtest, guest, or all
    #[arg(long, value_name = "TIER", default_value = "all")]
    tier: String,

    /// Run the suite on this device instead of the tiers
    #[arg(long, value_name = "SPEC")]
    device: Option<String>,

    /// Only cases whose SUITE/NAME contains this
    #[arg(long, value_name = "TEXT", default_value = "")]
    filter: String,

    /// Allow the contents of the device to be lost
    #[arg(long)]
    destroy_data: bool,

    /// Print what would run
    #[arg(long)]
    list: bool,

    /// Print the table as one JSON document on standard output, and the rest on standard error
    #[arg(long)]
    json: bool,

    /// Run a tier's own cases in this process, behind the first N (what the runner starts)
    #[arg(long, value_name = "N", hide = true)]
    machines_from: Option<usize>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("hw-tests: {error:#}");
            ExitCode::from(2)
        }
    }
}

impl Arguments {
    fn tiers(&self) -> Result<Vec<Tier>> {
        if self.tier == "all" {
            return Ok(Tier::ALL.to_vec());
        }
        let named = Tier::ALL.into_iter().find(|tier| tier.to_string() == self.tier);
        Ok(vec![named.with_context(|| format!("there is no tier `{}`: emu, qtest, guest, all", self.tier))?])
    }

    fn machine_cases(&self, tier: Tier) -> Vec<MachineCase> {
        let chosen = |case: &MachineCase| path(case).contains(&self.filter);
        tier.machine_cases().into_iter().filter(chosen).collect()
    }

    fn run(&self) -> Result<ExitCode> {
        let tiers = self.tiers()?;
        if self.list {
            self.print_list(&tiers);
            return Ok(ExitCode::SUCCESS);
        }
        let bin_dir = bin_dir()?;
        if let Some(from) = self.machines_from {
            die_with_parent()?;
            let scratch_root = std::env::current_dir()?;
            self.run_machines_here(tiers[0], from, &Environment { bin_dir, scratch_root });
            return Ok(ExitCode::SUCCESS);
        }
        // Before any other thread: they inherit the mask.
        let signals = Signals::block().context("blocking SIGINT and SIGTERM")?;
        end_with_parent()?;
        let scratch = tempfile::Builder::new().prefix("pollux-hw-").tempdir()?;
        let environment = Environment { bin_dir, scratch_root: scratch.path().to_owned() };
        let quiet = Alarm::new()?;
        let mut session =
            Session { arguments: self, environment, signals, quiet, lines: vec![], rows: vec![] };
        let started = Instant::now();
        let skipped = match &self.device {
            Some(device) => session.one_device(device).map(|()| Vec::new())?,
            None => session.tiers(&tiers)?,
        };
        Ok(session.conclude(&skipped, started.elapsed()))
    }

    fn print_list(&self, tiers: &[Tier]) {
        for case in cases() {
            let name = format!("{}/{}", case.suite, case.name);
            if name.contains(&self.filter) {
                println!("on every device: {name}");
            }
        }
        for &tier in tiers {
            for target in tier.targets() {
                println!("{tier}: the suite on {}", target.name);
            }
            self.machine_cases(tier).iter().for_each(|case| println!("{tier}: {}", path(case)));
        }
    }

    /// The cases of `tier` behind the first `from`, in this process, each announced before it begins.
    fn run_machines_here(&self, tier: Tier, from: usize, environment: &Environment) {
        for case in self.machine_cases(tier).iter().skip(from) {
            println!("begin {}", path(case));
            let start = Instant::now();
            let (outcome, reason) = match (case.run)(environment) {
                Ok(Verdict::Passed) => (Outcome::Passed, String::new()),
                Ok(Verdict::Skipped(reason)) => (Outcome::Skipped, reason),
                Err(error) => (Outcome::Failed, format!("{error:#}")),
            };
            if outcome == Outcome::Failed {
                reason.lines().for_each(|line| eprintln!("  {}: {line}", path(case)));
            }
            println!("{}", Line::new(case.suite, case.name, outcome, start.elapsed(), &reason));
        }
    }
}

fn path(case: &MachineCase) -> String {
    format!("{}/{}", case.suite, case.name)
}

fn bin_dir() -> Result<PathBuf> {
    if let Some(directory) = std::env::var_os("POLLUX_BIN_DIR") {
        return std::path::absolute(Path::new(&directory)).context("POLLUX_BIN_DIR");
    }
    let own = std::env::current_exe()?;
    Ok(own.parent().context("the directory of this program")?.to_owned())
}

/// A run.
struct Session<'a> {
    arguments: &'a Arguments,
    environment: Environment,
    signals: Signals,
    quiet: Alarm,
    lines: Vec<Line>,
    rows: Vec<Row>,
}

impl Session<'_> {
    /// The suite on a device that somebody else made.
    fn one_device(&mut self, device: &str) -> Result<()> {
        let lines = self.suite_on(device, &[], self.arguments.destroy_data)?;
        self.keep(device, lines);
        Ok(())
    }

    /// Returns the tiers that could not run, with the reason.
    fn tiers(&mut self, tiers: &[Tier]) -> Result<Vec<(Tier, String)>> {
        let mut skipped = Vec::new();
        for &tier in tiers {
            if let Some(reason) = tier.missing(&self.environment) {
                self.say(&format!("tier {tier} SKIPPED: {reason}"));
                skipped.push((tier, reason));
                continue;
            }
            for target in tier.targets() {
                self.target(&target)?;
            }
            self.machines(tier)?;
        }
        Ok(skipped)
    }

    fn target(&mut self, target: &Target) -> Result<()> {
        let chosen = |part: &str| {
            cases().iter().any(|case| {
                let name = format!("{}/{}", case.suite, case.name);
                name.contains(part) && name.contains(&self.arguments.filter)
            })
        };
        let parts: Vec<&str> = target.parts.iter().map(String::as_str).collect();
        if !(parts.is_empty() && chosen("") || parts.iter().any(|part| chosen(part))) {
            return Ok(());
        }
        self.say(&format!("\n--- the suite on {}", target.name));
        let directory =
            tempfile::Builder::new().prefix("device-").tempdir_in(&self.environment.scratch_root)?;
        let started = Instant::now();
        let outcome = (target.make)(&self.environment, directory.path())
            .and_then(|made| self.suite_on(&made.spec, &parts, true).map(|lines| (lines, made)));
        match outcome {
            Ok((lines, _made)) => self.keep(&target.name, lines),
            Err(error) if error.to_string() == INTERRUPTED => return Err(error),
            Err(error) => {
                let reason = format!("{error:#}");
                let line = Line::new("device", "made", Outcome::Failed, started.elapsed(), &reason);
                self.say(&line.to_string());
                self.keep(&target.name, vec![line]);
            }
        }
        Ok(())
    }

    /// Runs `hw-suite`.
    fn suite_on(&mut self, spec: &str, parts: &[&str], destroy: bool) -> Result<Vec<Line>> {
        let mut lines = Vec::new();
        let whole = [""];
        let parts = if parts.is_empty() { &whole[..] } else { parts };
        for part in parts {
            let mut command = Command::new(self.own("hw-suite")?);
            command.env("POLLUX_BIN_DIR", &self.environment.bin_dir);
            command.args(["--device", spec, "--filter", &self.arguments.filter, "--part", part]);
            command.args(destroy.then_some("--destroy-data"));
            let mut stream = Stream::start(command)?;
            loop {
                match stream.next(&self.signals, &self.quiet, SUITE_PATIENCE)? {
                    Next::Line(text) => {
                        if let Ok(line) = text.parse::<Line>() {
                            self.say(&text);
                            lines.push(line);
                        }
                    }
                    Next::Ended(status) if matches!(status.code(), Some(0 | 1)) => break,
                    Next::Ended(status) => bail!("hw-suite on {spec} ended with {status}"),
                    Next::Silent => {
                        bail!("hw-suite on {spec} was silent for {SUITE_PATIENCE:?} and was ended")
                    }
                }
            }
        }
        Ok(lines)
    }

    /// The cases of a tier that bring a machine of their own.
    fn machines(&mut self, tier: Tier) -> Result<()> {
        let chosen = self.arguments.machine_cases(tier);
        if chosen.is_empty() {
            return Ok(());
        }
        self.say(&format!("\n--- cases of tier {tier} with machines of their own"));
        let mut lines: Vec<Line> = Vec::new();
        while lines.len() < chosen.len() {
            self.machines_from(tier, &chosen, &mut lines)?;
        }
        self.keep(&format!("{tier} machines"), lines);
        Ok(())
    }

    /// Runs those that `lines` does not have yet, up to the first that kills or hangs its process.
    fn machines_from(&mut self, tier: Tier, chosen: &[MachineCase], lines: &mut Vec<Line>) -> Result<()> {
        let directory =
            tempfile::Builder::new().prefix("machines-").tempdir_in(&self.environment.scratch_root)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.env("POLLUX_BIN_DIR", &self.environment.bin_dir).current_dir(directory.path());
        command.args(["--tier", &tier.to_string(), "--filter", &self.arguments.filter]);
        command.args(["--machines-from", &lines.len().to_string()]);
        let mut stream = Stream::start(command)?;
        let mut began = Instant::now();
        let reason = loop {
            match stream.next(&self.signals, &self.quiet, MACHINE_PATIENCE)? {
                Next::Line(text) if text.starts_with("begin ") => began = Instant::now(),
                Next::Line(text) => {
                    if let Ok(line) = text.parse::<Line>() {
                        self.say(&text);
                        lines.push(line);
                    }
                }
                Next::Ended(status) if status.success() && lines.len() == chosen.len() => return Ok(()),
                Next::Ended(status) => break format!("its process ended with {status}"),
                Next::Silent => break format!("hung: ended after {} s", MACHINE_PATIENCE.as_secs()),
            }
        };
        hw_tests::runner::unmount_below(directory.path());
        if let Some(case) = chosen.get(lines.len()) {
            let line = Line::new(case.suite, case.name, Outcome::Failed, began.elapsed(), &reason);
            self.say(&line.to_string());
            lines.push(line);
        }
        Ok(())
    }

    /// Another program of this crate.
    fn own(&self, name: &str) -> Result<PathBuf> {
        let beside = std::env::current_exe()?.with_file_name(name);
        let candidates = [self.environment.bin_dir.join(name), beside];
        let found = candidates.into_iter().find(|path| path.is_file());
        found.with_context(|| format!("{name} is not built: `cargo build -p hw-tests --bins`"))
    }

    fn keep(&mut self, device: &str, lines: Vec<Line>) {
        self.rows.extend(rows(device, &lines));
        self.lines.extend(lines);
    }

    fn say(&self, text: &str) {
        if self.arguments.json { eprintln!("{text}") } else { println!("{text}") }
    }

    /// Prints the table; the exit code.
    fn conclude(&self, skipped: &[(Tier, String)], took: Duration) -> ExitCode {
        if self.arguments.json {
            println!("{:#}", self.document(skipped));
        } else {
            println!("\n{}", table(&self.rows));
        }
        for (tier, reason) in skipped {
            self.say(&format!("tier {tier} was SKIPPED and counts as nothing: {reason}"));
        }
        self.say(&format!("hw-tests: {} in {:.0} s", totals(&self.lines), took.as_secs_f32()));
        if self.lines.iter().any(|line| line.outcome == Outcome::Failed) {
            return ExitCode::FAILURE;
        }
        if self.lines.is_empty() {
            let why = if skipped.is_empty() { "no case matches the filter" } else { "no tier could run" };
            eprintln!("hw-tests: {why}");
            return ExitCode::from(2);
        }
        ExitCode::SUCCESS
    }

    fn document(&self, skipped: &[(Tier, String)]) -> serde_json::Value {
        let rows = self.rows.iter().map(|row| {
            json!({
                "device": row.device, "suite": row.suite, "passed": row.passed, "failed": row.failed,
                "skipped": row.skipped, "took_ms": row.took.as_millis() as u64,
            })
        });
        let failed = self.lines.iter().filter(|line| line.outcome == Outcome::Failed);
        let failed = failed
            .map(|line| json!({ "case": format!("{}/{}", line.suite, line.name), "reason": line.reason }));
        let tiers =
            skipped.iter().map(|(tier, reason)| json!({ "tier": tier.to_string(), "reason": reason }));
        json!({
            "rows": rows.collect::<Vec<_>>(),
            "failed": failed.collect::<Vec<_>>(),
            "skipped_tiers": tiers.collect::<Vec<_>>(),
        })
    }
}

/// What [`Stream::next`] says after a signal.
const INTERRUPTED: &str = "interrupted";
