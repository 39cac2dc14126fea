//! A program that prints a line for each case, read as it runs.
//!
//! Owns: [`Stream`]. Invariants: a program that falls silent for longer than it may is ended with its process group; so is one whose
//! [`Stream`] is dropped, and one that is running when SIGINT or SIGTERM comes (first asked by SIGTERM, so that it clears up).

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use pollux::signals::{Alarm, Signals, Woken};

/// How often signals are looked for.
const LOOK: Duration = Duration::from_millis(50);
/// Time to clear up after SIGTERM.
const GRACE: Duration = Duration::from_secs(10);

/// What came next.
pub enum Next {
    /// A line of standard output.
    Line(String),
    /// It has ended.
    Ended(ExitStatus),
    /// It said nothing for too long, and was ended.
    Silent,
}

/// A running program.
pub struct Stream {
    child: Child,
    lines: Receiver<String>,
}

impl Stream {
    /// Starts it; its standard error goes where ours goes.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(mut command: Command) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
        let mut child = command.spawn().with_context(|| format!("starting {command:?}"))?;
        let output = child.stdout.take().context("a pipe from the program")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n') {
                let Ok(line) = line else { break };
                if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, lines })
    }

    /// Waits for the next line, or the end, for as long as `patience`.
    ///
    /// # Errors
    /// SIGINT or SIGTERM came; the program has been ended.
    pub fn next(&mut self, signals: &Signals, quiet: &Alarm, patience: Duration) -> Result<Next> {
        let start = Instant::now();
        loop {
            match self.lines.recv_timeout(LOOK) {
                Ok(line) => return Ok(Next::Line(line)),
                Err(RecvTimeoutError::Disconnected) => {
                    // Nobody holds the pipe any more: it has ended, or is about to.
                    return Ok(Next::Ended(self.child.wait()?));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            if signals.wait(quiet, Some(Duration::ZERO))? == Woken::Signal {
                self.end();
                bail!("interrupted");
            }
            if start.elapsed() > patience {
                self.end();
                return Ok(Next::Silent);
            }
        }
    }

    fn signal(&self, signal: Signal) {
        if let Ok(group) = i32::try_from(self.child.id()) {
            let _ended = killpg(Pid::from_raw(group), signal);
        }
    }

    fn end(&mut self) {
        self.signal(Signal::SIGTERM);
        let asked = Instant::now();
        while asked.elapsed() < GRACE && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(LOOK);
        }
        self.signal(Signal::SIGKILL);
        let _reaped = self.child.wait();
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.end();
        }
    }
}
