//! A QEMU process that does not outlive this one.
//!
//! Owns: [`Process`], its thread and its end; [`Monitor`], its QMP socket.
//!
//! Invariants: the process is only ever signalled by who can still wait for it; it is killed when its [`Process`] is dropped,
//! and by the kernel when this process dies (util-linux's setpriv asks for that: the thread that starts the process waits for
//! it, so that the thread's end is this process's end).

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// How often the waiting thread looks.
const TICK: Duration = Duration::from_millis(10);

/// How long a socket may take to be there, and an answer on it.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// A running QEMU.
pub(super) struct Process {
    shared: Arc<Shared>,
    waiter: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    kill: AtomicBool,
    ended: Mutex<Option<ExitStatus>>,
}

impl Shared {
    fn ended(&self) -> Option<ExitStatus> {
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Process {
    /// Starts `program`; what it prints goes to `log`.
    pub(super) fn start(program: &str, arguments: &[String], directory: &Path, log: &Path) -> Result<Self> {
        let output = File::create(log).with_context(|| log.display().to_string())?;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", program]).args(arguments).current_dir(directory);
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let shared = Arc::new(Shared::default());
        let (sender, started) = mpsc::channel();
        let theirs = shared.clone();
        let waiter =
            std::thread::Builder::new().name("guest".into()).spawn(move || match command.spawn() {
                Ok(child) => {
                    let _listening = sender.send(Ok(()));
                    wait(child, &theirs);
                }
                Err(error) => {
                    let _listening = sender.send(Err(error));
                }
            })?;
        started.recv()?.context("cannot run setpriv; `apt-get install util-linux`")?;
        Ok(Self { shared, waiter: Some(waiter) })
    }

    /// How it ended, if it did.
    pub(super) fn ended(&self) -> Option<ExitStatus> {
        self.shared.ended()
    }

    /// kill -9, and waits for the end.
    pub(super) fn kill(&mut self) {
        self.shared.kill.store(true, Ordering::Relaxed);
        if let Some(waiter) = self.waiter.take() {
            let _ended = waiter.join();
        }
    }

    /// Connects to a socket that it makes.
    pub(super) fn connect(&self, socket: &Path) -> Result<UnixStream> {
        let start = Instant::now();
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => return Ok(stream),
                Err(error) if start.elapsed() > ANSWER_LIMIT => {
                    return Err(error).with_context(|| format!("no socket {}", socket.display()));
                }
                Err(_) => {}
            }
            if let Some(status) = self.ended() {
                bail!("QEMU ended with {status} before it listened");
            }
            std::thread::sleep(TICK);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn wait(mut child: Child, shared: &Shared) {
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Some(status),
            Ok(None) => {}
            Err(_) => break None,
        }
        if shared.kill.load(Ordering::Relaxed) {
            let _gone = child.kill();
        }
        std::thread::sleep(TICK);
    };
    *shared.ended.lock().unwrap_or_else(PoisonError::into_inner) = status;
}

/// QEMU's monitor protocol (docs/interop/qmp-intro).
pub(super) struct Monitor {
    reader: BufReader<UnixStream>,
}

impl Monitor {
    /// Greets.
    pub(super) fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        let mut monitor = Self { reader: BufReader::new(stream) };
        let greeting = monitor.next()?;
        ensure!(greeting.get("QMP").is_some(), "not a QMP greeting: {greeting}");
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Carries out one command.
    pub(super) fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.reader.get_mut().write_all(line.as_bytes()).context("writing to the monitor")?;
        loop {
            let message = self.next()?;
            if let Some(error) = message.get("error") {
                bail!("QEMU refuses {command}: {error}");
            }
            if let Some(value) = message.get("return") {
                return Ok(value.clone());
            }
        }
    }

    /// Waits for an event of this name.
    pub(super) fn await_event(&mut self, name: &str) -> Result<()> {
        loop {
            let message = self.next().with_context(|| format!("waiting for the event {name}"))?;
            if message.get("event").and_then(Value::as_str) == Some(name) {
                return Ok(());
            }
        }
    }

    fn next(&mut self) -> Result<Value> {
        let mut line = String::new();
        let length = self.reader.read_line(&mut line).context("reading from the monitor")?;
        ensure!(length > 0, "the monitor's connection has ended");
        serde_json::from_str(&line).with_context(|| format!("not a message of the monitor: {line}"))
    }
}
