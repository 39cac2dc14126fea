//! The driver's figures.
//!
//! | figure | how |
//! |---|---|
//! | instructions per 4 KiB read and write | callgrind inside the bench `instructions`, twice, the second time with twice the requests: the difference leaves out bring-up. The controller is left out by its function's name |
//! | doorbell writes per request | what the same program counts, likewise |
//! | two queues on two cores | `pollux perf` with one embedded controller and two cores, in turn with two processes of a core and a controller each; medians of their sums |
//! | against a peer | `pollux perf` and the peer's initiator on the same vfio-user socket and core, in turn; medians |
//!
//! Excludes: starting the peer's target, which is whoever's who measures.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail, ensure};
use clap::Args;
use serde::Deserialize;

use super::{Report, build, median};
use crate::packages;

/// Requests of the shorter of two runs.
const REQUESTS: u64 = 12_800;
/// What is counted.
const KINDS: [&str; 2] = ["read", "write"];
/// Depths at which instructions are counted, with the goal for each, if it has one.
const DEPTHS: [(u64, Option<u64>); 3] = [(1, None), (32, Some(250)), (128, Some(250))];
/// Depths of the comparison with a peer, and the ratio to reach.
const PEER_GOALS: [(u32, f64); 3] = [(1, 1.2), (32, 1.2), (128, 1.0)];

/// Loads on two cores: access, further options, words, and the ratio to reach. What was never written the controller need not look
/// for: that is the driver and the queues alone. Writes make the cores take data from each other, which two processes need not.
const TWO_CORES: [(&str, &[&str], &str, Option<f64>); 4] = [
    ("randread", &[], "reads of what nobody wrote", Some(0.95)),
    ("randread", &["--precondition"], "reads of written data", Some(0.95)),
    ("randwrite", &["--precondition"], "writes of written data", None),
    ("randrw", &["--precondition"], "reads and writes of written data", None),
];

/// How the driver is measured.
#[derive(Args)]
pub(crate) struct DriverOptions {
    /// Write the figures into docs/benchmarks.md
    #[arg(long)]
    pub(super) write: bool,
    /// Rounds of each alternating measurement
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of each run
    #[arg(long, default_value_t = 3)]
    seconds: u32,
    /// Socket of a vfio-user target to compare on
    #[arg(long, requires = "peer_command")]
    peer_socket: Option<PathBuf>,
    /// The peer's initiator on that target: a shell command in which {depth} and {seconds} are replaced, pinned to core 1, that
    /// reads 4 KiB at random
    #[arg(long, requires = "peer_socket")]
    peer_command: Option<String>,
    /// What the line of the peer's output begins with that has the IOPS
    #[arg(long, default_value = "Total")]
    peer_line: String,
}

impl DriverOptions {
    /// The command that gives these figures again.
    pub(super) fn command_line(&self) -> String {
        let peer = if self.peer_socket.is_some() { " --peer-socket … --peer-command …" } else { "" };
        format!("cargo xtask bench driver --rounds {} --seconds {}{peer}", self.rounds, self.seconds)
    }
}

/// Takes every figure that can be taken here.
pub(super) fn measure(root: &Path, options: &DriverOptions) -> anyhow::Result<Report> {
    let mut report = Report::default();
    let program = build(root, &["--package", "nvme", "--bench", "instructions"], "instructions")?;
    let pollux = build(root, &["--package", "pollux-tools", "--bin", "pollux"], "pollux")?;
    match packages::ensure("valgrind", "valgrind") {
        Ok(()) => instructions(&program, &mut report)?,
        Err(reason) => report.missing.push(format!("instructions, for want of valgrind: {reason}")),
    }
    two_cores(&pollux, options, &mut report)?;
    match (&options.peer_socket, &options.peer_command) {
        (Some(socket), Some(command)) => peer(&pollux, socket, command, options, &mut report)?,
        _ => report.missing.push("a peer: give --peer-socket and --peer-command (docs/benchmarks.md)".into()),
    }
    Ok(report)
}

fn instructions(program: &Path, report: &mut Report) -> anyhow::Result<()> {
    for (kind, (depth, goal)) in KINDS.into_iter().flat_map(|kind| DEPTHS.map(|depth| (kind, depth))) {
        let (short, long) =
            (count(program, kind, depth, REQUESTS)?, count(program, kind, depth, 2 * REQUESTS)?);
        let each = (long.instructions - short.instructions).div_ceil(REQUESTS);
        let (text, reached) = match goal {
            Some(goal) => (format!("at most {goal}"), each <= goal),
            None => ("none".to_owned(), true),
        };
        report.note(
            format!("instructions per 4 KiB {kind}, depth {depth}"),
            each.to_string(),
            &text,
            reached,
        );
        let doorbells = (long.doorbells - short.doorbells) as f64 / REQUESTS as f64;
        let reached = depth < 128 || doorbells <= 0.1;
        let goal = if depth < 128 { "none" } else { "at most 0.1" };
        report.note(
            format!("doorbell writes per {kind}, depth {depth}"),
            format!("{doorbells:.3}"),
            goal,
            reached,
        );
    }
    Ok(())
}

struct Count {
    instructions: u64,
    doorbells: u64,
}

fn count(program: &Path, kind: &str, depth: u64, requests: u64) -> anyhow::Result<Count> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        // Counted inside the calls of the driver, but not inside the controller that they call.
        .args(["--toggle-collect=*measured_*", "--toggle-collect=*NullTransport*doorbell*"])
        .arg(program)
        .args([kind, &depth.to_string(), &requests.to_string()])
        .output()
        .context("cannot run valgrind")?;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "valgrind failed: {stderr}");
    let collected = stderr.lines().find_map(|line| line.split_once("Collected :")).map(|(_, n)| n.trim());
    let doorbells = stdout.split_whitespace().next();
    Ok(Count {
        instructions: collected.and_then(|n| n.parse().ok()).context("valgrind gives no count")?,
        doorbells: doorbells.and_then(|n| n.parse().ok()).context("the program gives no count")?,
    })
}

#[derive(Deserialize)]
struct Perf {
    iops: f64,
    errors: u64,
}

/// `pollux perf` with 4 KiB requests, without a clock read for each.
fn perf(pollux: &Path, device: &str, access: &str, depth: u32, cores: &str, seconds: u32) -> Command {
    let mut command = Command::new(pollux);
    command
        .args(["perf", "--device", device, "--rw", access, "--bs", "4k", "--no-latency", "--json"])
        .args(["--iodepth", &depth.to_string(), "--cores", cores, "--runtime", &seconds.to_string()])
        .stdout(Stdio::piped());
    command
}

fn iops_of(output: &[u8]) -> anyhow::Result<f64> {
    let perf: Perf = serde_json::from_slice(output).context("pollux perf gives no JSON")?;
    ensure!(perf.errors == 0, "pollux perf had {} errors", perf.errors);
    Ok(perf.iops)
}

fn two_cores(pollux: &Path, options: &DriverOptions, report: &mut Report) -> anyhow::Result<()> {
    const WHAT: &str = "two queues on two cores of one controller, of two processes' sum";
    if std::thread::available_parallelism().map_or(1, std::num::NonZero::get) < 2 {
        report.missing.push(format!("{WHAT}: there is one core"));
        return Ok(());
    }
    let seconds = options.seconds;
    for (access, precondition, words, goal) in TWO_CORES {
        let perf = |cores| {
            let mut command = perf(pollux, "emu:mem,size=64MiB", access, 32, cores, seconds);
            command.args(precondition);
            command
        };
        let (mut together, mut apart) = (Vec::new(), Vec::new());
        for _ in 0..options.rounds {
            together.push(iops_of(&perf("0,1").output()?.stdout)?);
            let first = perf("0").spawn()?;
            let second = perf("1").output()?;
            let first = first.wait_with_output()?;
            apart.push(iops_of(&first.stdout)? + iops_of(&second.stdout)?);
        }
        let (together, apart) = (median(together), median(apart));
        let ratio = together / apart;
        let figure = format!("{:.1} % ({:.2} M of {:.2} M IOPS)", ratio * 100.0, together / 1e6, apart / 1e6);
        let text = goal.map_or("none".to_owned(), |goal| format!("at least {:.0} %", goal * 100.0));
        report.note(format!("{WHAT}, {words}"), figure, &text, goal.is_none_or(|goal| ratio >= goal));
    }
    Ok(())
}

fn peer(
    pollux: &Path,
    socket: &Path,
    command: &str,
    options: &DriverOptions,
    report: &mut Report,
) -> anyhow::Result<()> {
    let device = format!("vfio-user:{}", socket.display());
    for (depth, goal) in PEER_GOALS {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..options.rounds {
            let line = command
                .replace("{depth}", &depth.to_string())
                .replace("{seconds}", &options.seconds.to_string());
            let output = Command::new("sh").args(["-c", &line]).output().context("cannot run sh")?;
            theirs.push(peer_iops(&String::from_utf8_lossy(&output.stdout), &options.peer_line)?);
            ours.push(iops_of(
                &perf(pollux, &device, "randread", depth, "1", options.seconds).output()?.stdout,
            )?);
        }
        let (ours, theirs) = (median(ours), median(theirs));
        let figure = format!("{:.2} ({:.2} M to {:.2} M IOPS)", ours / theirs, ours / 1e6, theirs / 1e6);
        let what = format!("IOPS to the peer's on its target, depth {depth}");
        report.note(what, figure, &format!("at least {goal}"), ours / theirs >= goal);
    }
    Ok(())
}

/// The first number in the line that begins with `line`.
fn peer_iops(output: &str, line: &str) -> anyhow::Result<f64> {
    let Some(found) = output.lines().map(str::trim).find(|candidate| candidate.starts_with(line)) else {
        bail!("the peer prints no line that begins with {line:?}; see --peer-line. It printed:\n{output}")
    };
    found
        .split(|c: char| c.is_whitespace() || c == ':')
        .find_map(|word| word.parse::<f64>().ok())
        .with_context(|| format!("no number in the peer's line {found:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peers_figure_is_found_in_its_line() {
        let output =
            "Device Information   :  IOPS  MiB/s\nTotal                :  1028371.64  4017.08  0.97\n";
        assert_eq!(peer_iops(output, "Total").expect("it is there"), 1_028_371.64);
        assert!(peer_iops("nothing", "Total").is_err());
    }
}
