//! Ctrl-C in the middle of `hw-tests`, and the death of who has started it: nothing of the run stays.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hw_tests::binary;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long a run may take to clear up.
const DEADLINE: Duration = Duration::from_secs(20);

/// A directory with the programs of a run, as `cargo xtask hw-tests` makes one.
fn programs(directory: &Path) -> Result<()> {
    for name in ["pollux", "polluxd"] {
        symlink(binary(name)?, directory.join(name))?;
    }
    for (name, built) in [
        ("hw-tests", env!("CARGO_BIN_EXE_hw-tests")),
        ("hw-suite", env!("CARGO_BIN_EXE_hw-suite")),
        ("hw-probe", env!("CARGO_BIN_EXE_hw-probe")),
    ] {
        symlink(built, directory.join(name))?;
    }
    Ok(())
}

/// A shell that has started a run, and waits for it.
fn start(programs: &Path, scratch: &Path) -> Result<Child> {
    let mut command = Command::new("sh");
    command.args(["-c", "\"$0\" --tier emu --filter volume/; exit $?"]).arg(programs.join("hw-tests"));
    command.env("POLLUX_BIN_DIR", programs).env("TMPDIR", scratch).process_group(0);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    Ok(command.spawn()?)
}

/// Waits until a volume of the run is mounted: from then on there is something to clear up.
fn wait_for_mount(scratch: &Path) -> Result<()> {
    let began = Instant::now();
    while !mounted_below(scratch)? {
        ensure!(began.elapsed() < DEADLINE, "the run mounts nothing");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn mounted_below(scratch: &Path) -> Result<bool> {
    let mounts = fs::read_to_string("/proc/mounts")?;
    Ok(mounts.contains(scratch.to_str().context("a path in UTF-8")?))
}

/// Command lines of processes that work in the scratch directory.
fn processes_of(scratch: &Path) -> Vec<String> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let lines = processes.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    let lines = lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " "));
    lines.filter(|line| line.contains(&*scratch.to_string_lossy())).collect()
}

fn wait_until_clear(scratch: &Path) -> Result<()> {
    let began = Instant::now();
    loop {
        let (processes, mounted) = (processes_of(scratch), mounted_below(scratch)?);
        let left: Vec<_> = fs::read_dir(scratch)?.map(|entry| entry.map(|entry| entry.path())).collect();
        if processes.is_empty() && !mounted && left.is_empty() {
            return Ok(());
        }
        if began.elapsed() > DEADLINE {
            bail!("left behind: processes {processes:?}, mounts: {mounted}, files {left:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn run_that_is_interrupted_leaves_nothing() -> Result<()> {
    let directory = tempfile::tempdir()?;
    programs(directory.path())?;
    for (signal, to_group) in [(Signal::SIGINT, true), (Signal::SIGTERM, true), (Signal::SIGKILL, false)] {
        let scratch = tempfile::tempdir()?;
        let mut shell = start(directory.path(), scratch.path())?;
        wait_for_mount(scratch.path())?;
        let first = i32::try_from(shell.id())?;
        kill(Pid::from_raw(if to_group { -first } else { first }), signal)?;
        wait_until_clear(scratch.path()).with_context(|| format!("after {signal}"))?;
        let _ended = shell.wait()?;
        let said = BufReader::new(shell.stdout.take().context("the shell has an output")?);
        let passed = said.lines().map_while(Result::ok).filter(|line| line.contains("hw-tests:")).count();
        ensure!(passed == 0, "the run came to its end before {signal}");
    }
    Ok(())
}
