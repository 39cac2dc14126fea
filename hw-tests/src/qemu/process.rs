//! A QEMU process that does not outlive this one.
//!
//! Invariants: the process is signalled only while somebody can still wait for it; it is killed when its [`Process`] is
//! dropped, and by the kernel when this process dies (setpriv asks for that; the kernel means the thread that starts the
//! process, so a thread does that and stays until the end).

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long a socket may take to be there, on the slowest machine.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How often somebody looks.
const TICK: Duration = Duration::from_millis(5);

/// A running process.
pub(super) struct Process {
    child: Arc<Mutex<Child>>,
    ending: Arc<(Mutex<bool>, Condvar)>,
    keeper: Option<JoinHandle<()>>,
    id: u32,
    log: PathBuf,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Process {
    /// Starts `program`; what it prints goes to `log`.
    pub(super) fn start(program: &str, arguments: &[String], log: &Path) -> Result<Self> {
        let output = File::create(log).with_context(|| log.display().to_string())?;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", program]).args(arguments);
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let ending = Arc::new((Mutex::new(false), Condvar::new()));
        let theirs = Arc::clone(&ending);
        let (sender, started) = mpsc::channel();
        let keeper = std::thread::Builder::new().name("qemu".into()).spawn(move || {
            let _listening = sender.send(command.spawn());
            let (ended, changed) = &*theirs;
            let mut ended = lock(ended);
            while !*ended {
                ended = changed.wait(ended).unwrap_or_else(PoisonError::into_inner);
            }
        })?;
        let child = started.recv()?.context("cannot run setpriv: `apt-get install util-linux`")?;
        let id = child.id();
        Ok(Self { child: Arc::new(Mutex::new(child)), ending, keeper: Some(keeper), id, log: log.to_owned() })
    }

    pub(super) fn id(&self) -> u32 {
        self.id
    }

    /// kill -9, and waits for the end.
    pub(super) fn kill(&self) {
        let mut child = lock(&self.child);
        // Both fail only for a process that has ended and was waited for.
        let _gone = child.kill();
        let _reaped = child.wait();
    }

    /// Connects to a socket that it makes.
    pub(super) fn connect(&self, socket: &Path) -> Result<UnixStream> {
        let start = Instant::now();
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => return Ok(stream),
                Err(error) if start.elapsed() > START_LIMIT => {
                    return Err(error).with_context(|| format!("no socket {}", socket.display()));
                }
                Err(_) => {}
            }
            if let Some(status) = lock(&self.child).try_wait()? {
                let printed = fs::read_to_string(&self.log).unwrap_or_default();
                bail!("it ended with {status} before it listened: {printed}");
            }
            std::thread::sleep(TICK);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        *lock(&self.ending.0) = true;
        self.ending.1.notify_all();
        if let Some(keeper) = self.keeper.take() {
            let _ended = keeper.join();
        }
    }
}
