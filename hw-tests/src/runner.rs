//! A child process with a deadline for each case.
//!
//! Owns: [`Runner`], which starts a case, waits for it and clears up after it, and [`end_case`], the child's side.
//!
//! Invariants: a case that panics, dies or hangs is one failed line and not the end of the run; when a case has ended, none of its processes
//! runs any more, nothing is mounted in its directory, and the directory is gone. That holds after SIGINT and SIGTERM, too.
//!
//! Excludes: what a case does, how lines are counted (`report`).

use std::fs::{self, File};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use pollux::signals::{Alarm, Signals, Woken};

use crate::report::{Line, Outcome};
use crate::suite::Verdict;

/// What a child says by its exit code: skipped, the reason is on standard output.
const SKIPPED: u8 = 77;

/// How often a running case is looked at.
const LOOK: Duration = Duration::from_millis(3);

/// How long a killed process may take to be gone; one that waits for a device in the kernel may stay longer.
const TAKEN_DOWN: Duration = Duration::from_secs(10);

/// Lines of a failed case that are shown; the rest stays out of the way.
const SHOWN_LINES: usize = 60;

/// Runs cases, one at a time.
pub struct Runner {
    signals: Signals,
    quiet: Alarm,
    scratch: tempfile::TempDir,
    deadline: Duration,
    started: usize,
}

impl Runner {
    /// A runner that gives each case `deadline`. Must be made on the main thread, before there are others.
    ///
    /// # Errors
    /// The system's.
    pub fn new(deadline: Duration) -> Result<Self> {
        let scratch =
            tempfile::Builder::new().prefix("pollux-hw-").tempdir().context("a scratch directory")?;
        let signals = Signals::block().context("blocking SIGINT and SIGTERM")?;
        let quiet = Alarm::new().context("an event descriptor")?;
        Ok(Self { signals, quiet, scratch, deadline, started: 0 })
    }

    /// Runs one case: `command` gets `--scratch DIR` and ends by [`end_case`].
    ///
    /// # Errors
    /// It could not be started, or SIGINT or SIGTERM came.
    pub fn run(&mut self, suite: &str, name: &str, mut command: Command) -> Result<Line> {
        self.started += 1;
        let directory = self.scratch.path().join(format!("case-{}", self.started));
        fs::create_dir(&directory).with_context(|| directory.display().to_string())?;
        let (output, errors) = (directory.join("stdout"), directory.join("stderr"));
        command.arg("--scratch").arg(&directory);
        command.stdin(Stdio::null()).stdout(File::create(&output)?).stderr(File::create(&errors)?);
        command.process_group(0);
        let start = Instant::now();
        let mut child = command.spawn().with_context(|| format!("starting {command:?}"))?;
        let ended = self.wait(&mut child, start);
        let took = start.elapsed();
        end_group(&mut child);
        let (output, errors) = (lossy(&output), lossy(&errors));
        unmount_below(&directory);
        fs::remove_dir_all(&directory).with_context(|| directory.display().to_string())?;
        let Some(status) = ended? else {
            show(suite, name, &output, &errors);
            let reason = format!("hung: ended after {} s", self.deadline.as_secs());
            return Ok(Line::new(suite, name, Outcome::Failed, took, &reason));
        };
        let (outcome, reason) = judge(status, &output, &errors);
        if outcome == Outcome::Failed {
            show(suite, name, &output, &errors);
        }
        Ok(Line::new(suite, name, outcome, took, &reason))
    }

    /// `None` if it took too long.
    fn wait(&self, child: &mut Child, start: Instant) -> Result<Option<ExitStatus>> {
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(Some(status));
            }
            if start.elapsed() > self.deadline {
                return Ok(None);
            }
            if self.signals.wait(&self.quiet, Some(LOOK))? == Woken::Signal {
                bail!("interrupted");
            }
        }
    }
}

/// What a case has come to, from the end of its process.
fn judge(status: ExitStatus, output: &str, errors: &str) -> (Outcome, String) {
    let last = |text: &str| text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("").to_owned();
    match (status.code(), status.signal()) {
        (Some(0), _) => (Outcome::Passed, String::new()),
        (Some(code), _) if code == i32::from(SKIPPED) => (Outcome::Skipped, last(output)),
        (Some(1), _) => {
            let first = errors.lines().rfind(|line| line.starts_with("failed: "));
            (Outcome::Failed, first.map_or_else(|| last(errors), |line| line[8..].to_owned()))
        }
        (Some(101), _) => {
            let message = errors.lines().skip_while(|line| !line.contains("panicked at")).take(2);
            (Outcome::Failed, message.collect::<Vec<_>>().join(" "))
        }
        (Some(code), _) => (Outcome::Failed, format!("exit code {code}: {}", last(errors))),
        (None, signal) => (Outcome::Failed, format!("killed by signal {}", signal.unwrap_or(0))),
    }
}

/// Ends what the case has left running: it and its children share a process group. Returns when none of them runs any more, since
/// a killed process holds its files and mounts until the kernel has taken it down.
fn end_group(child: &mut Child) {
    let Ok(group) = i32::try_from(child.id()) else { return };
    let _none_left = killpg(Pid::from_raw(group), Signal::SIGKILL);
    let _reaped_before = child.wait();
    let start = Instant::now();
    while runs_any(group) {
        if start.elapsed() > TAKEN_DOWN {
            eprintln!("a process of group {group} still runs {} s after SIGKILL", TAKEN_DOWN.as_secs());
            return;
        }
        std::thread::sleep(LOOK);
    }
}

/// Whether a process of `group` still runs. A zombie does not: it only waits for a parent to ask for its exit code.
fn runs_any(group: i32) -> bool {
    // The usual case, and a cheap one: all of them are reaped.
    if killpg(Pid::from_raw(group), None).is_err() {
        return false;
    }
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.filter(|entry| entry.file_name().as_encoded_bytes()[0].is_ascii_digit()).any(|entry| {
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // "pid (name) state parent group …", and the name may hold anything (proc_pid_stat(5)).
        let mut fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields).split(' ');
        let state = fields.next();
        fields.nth(1) == Some(&group.to_string()) && !matches!(state, Some("Z" | "X"))
    })
}

/// Detaches what is mounted below `directory`, the innermost first.
pub fn unmount_below(directory: &Path) {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    let mut points: Vec<PathBuf> = points.filter(|point| point.starts_with(directory)).collect();
    points.sort();
    for point in points.iter().rev() {
        if let Err(error) = nix::mount::umount2(point, nix::mount::MntFlags::MNT_DETACH) {
            eprintln!("cannot unmount {}: {error}", point.display());
        }
    }
}

fn lossy(path: &Path) -> String {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

fn show(suite: &str, name: &str, output: &str, errors: &str) {
    let lines: Vec<&str> = output.lines().chain(errors.lines()).collect();
    for line in lines.iter().skip(lines.len().saturating_sub(SHOWN_LINES)) {
        eprintln!("  {suite}/{name}: {line}");
    }
}

/// The end of a case's own process: prints what the runner reads.
pub fn end_case(outcome: Result<Verdict>) -> ExitCode {
    match outcome {
        Ok(Verdict::Passed) => ExitCode::SUCCESS,
        Ok(Verdict::Skipped(reason)) => {
            println!("{}", reason.split_whitespace().collect::<Vec<_>>().join(" "));
            ExitCode::from(SKIPPED)
        }
        Err(error) => {
            let text = format!("{error:#}");
            eprintln!("{text}");
            eprintln!("failed: {}", text.split_whitespace().collect::<Vec<_>>().join(" "));
            ExitCode::FAILURE
        }
    }
}

/// A case's own process dies with its runner, however that ends.
///
/// # Errors
/// The system's.
pub fn die_with_parent() -> Result<()> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).context("asking to die with the parent")
}

/// A run ends when who started it does, as if by Ctrl-C: it clears up first.
///
/// # Errors
/// The system's.
pub fn end_with_parent() -> Result<()> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGTERM).context("asking to be told of the parent's end")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed step of a test is the failure of the test")]

    use super::*;

    fn line(script: &str, deadline: Duration) -> Line {
        let mut runner = Runner::new(deadline).unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let line = runner.run("suite", "name", command).unwrap();
        assert_eq!(fs::read_dir(runner.scratch.path()).unwrap().count(), 0, "the case's directory is left");
        line
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn exit_codes_tell_passed_skipped_and_failed_apart() {
        assert_eq!(line("exit 0", LONG).outcome, Outcome::Passed);
        let skipped = line("echo cannot copy; exit 77", LONG);
        assert_eq!((skipped.outcome, &*skipped.reason), (Outcome::Skipped, "cannot copy"));
        let failed = line("echo 'failed: a reason' >&2; echo noise >&2; exit 1", LONG);
        assert_eq!((failed.outcome, &*failed.reason), (Outcome::Failed, "a reason"));
    }

    #[test]
    fn a_panic_and_a_death_are_one_failed_line() {
        let panicked = line("echo \"thread 'main' panicked at x.rs:1:\nboom\" >&2; exit 101", LONG);
        assert_eq!(panicked.outcome, Outcome::Failed);
        assert!(panicked.reason.contains("x.rs:1: boom"), "{}", panicked.reason);
        let killed = line("kill -9 $$", LONG);
        assert_eq!((killed.outcome, &*killed.reason), (Outcome::Failed, "killed by signal 9"));
    }

    #[test]
    fn a_hanging_case_is_ended_with_its_children() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("pid");
        let script = format!("sleep 1000 & echo $! > {}; wait", file.display());
        // A busy machine may take its time to start the shell.
        let hung = [700, 5_000, 30_000].map(Duration::from_millis).into_iter();
        let hung = hung.map(|deadline| line(&script, deadline)).find(|_| file.exists()).unwrap();
        assert_eq!(hung.outcome, Outcome::Failed);
        assert!(hung.reason.contains("hung"), "{}", hung.reason);
        let child = fs::read_to_string(&file).unwrap();
        // A zombie without a parent to reap it counts as ended.
        let state = fs::read_to_string(format!("/proc/{}/stat", child.trim())).unwrap_or_default();
        assert!(state.is_empty() || state.contains(") Z "), "the child still runs: {state}");
    }
}
