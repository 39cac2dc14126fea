//! The embedded controller behind a vfio-user socket, in a process of its own that can die.
//!
//! Owns: [`Server`] (a running `pollux serve`) and the cases of its death.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::harness::is_mounted;
use crate::run;
use crate::suite::{Environment, MachineCase, Verdict};

pub(super) const CASES: &[MachineCase] = &[MachineCase {
    suite: "serve",
    name: "a_server_killed_under_a_volume_gives_errors_and_no_hang",
    run: killed_under_a_volume,
}];

/// What starting, mounting and ending may take on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running `pollux serve`.
pub struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    /// Serves `device` on a socket in `directory`.
    ///
    /// # Errors
    /// It cannot be started, or makes no socket.
    pub fn start(environment: &Environment, device: &str, directory: &Path) -> Result<Self> {
        let socket = directory.join("cntrl");
        // One that a killed server left would be taken for this one's.
        if socket.exists() {
            fs::remove_file(&socket)?;
        }
        let log = directory.join("serve.log");
        let output = fs::File::create(&log)?;
        let mut command = Command::new(environment.bin_dir.join("pollux"));
        command.args(["serve", "--device", device, "--socket"]).arg(&socket);
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = command.spawn().with_context(|| format!("starting {command:?}"))?;
        let mut server = Self { child, socket };
        let start = Instant::now();
        while !server.socket.exists() {
            if let Some(status) = server.child.try_wait()? {
                bail!("pollux serve ended with {status}:\n{}", fs::read_to_string(&log).unwrap_or_default());
            }
            ensure!(start.elapsed() < PATIENCE, "pollux serve made no socket {}", server.socket.display());
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }

    /// The device spec of what it serves.
    pub fn spec(&self) -> String {
        format!("vfio-user:{}", self.socket.display())
    }

    /// kill -9.
    ///
    /// # Errors
    /// The system's.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Fails if it has ended.
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn killed_under_a_volume(environment: &Environment) -> Result<Verdict> {
    if !Path::new("/dev/fuse").exists() {
        return Verdict::skipped("no /dev/fuse: modprobe fuse");
    }
    let directory = tempfile::Builder::new().prefix("serve-").tempdir_in(&environment.scratch_root)?;
    let image = format!("emu:{},size=256MiB", directory.path().join("disk.img").display());
    let mut server = Server::start(environment, &image, directory.path())?;
    let pollux = |arguments: &[&str]| run(Command::new(environment.bin_dir.join("pollux")).args(arguments));
    pollux(&["mkfs", "--device", &server.spec()])?;
    let mount = directory.path().join("m");
    fs::create_dir(&mount)?;
    let mut daemon = Mounted::start(environment, &server.spec(), &mount)?;
    let kept = vec![7; 100_000];
    let mut file = fs::File::create(mount.join("kept"))?;
    file.write_all(&kept)?;
    file.sync_all().context("fsync while the server lives")?;

    server.kill()?;
    // What is written now can be accepted, but never be durable; and whoever asks is told.
    let mut late = fs::File::create(mount.join("late"));
    let told = late.as_mut().map_or(true, |file| file.write_all(&kept).is_err() || file.sync_all().is_err());
    ensure!(told, "fsync reported success after the device's server had been killed");
    drop(file);
    drop(late);
    daemon.end()?;

    // Its data is on the image: another server gives it to another daemon.
    let server = Server::start(environment, &image, directory.path())?;
    let mut daemon = Mounted::start(environment, &server.spec(), &mount)?;
    ensure!(fs::read(mount.join("kept"))? == kept, "what was fsynced before is not there");
    daemon.end()?;
    pollux(&["fsck", "--device", &server.spec()])?;
    Ok(Verdict::Passed)
}

/// A `polluxd` with its mount, on any device.
struct Mounted {
    child: Child,
    mount: PathBuf,
}

impl Mounted {
    fn start(environment: &Environment, spec: &str, mount: &Path) -> Result<Self> {
        let mut command = Command::new(environment.bin_dir.join("polluxd"));
        command.args(["--device", spec, "--cores", "0", "--mount"]).arg(mount).stdin(Stdio::null());
        let child = command.spawn().with_context(|| format!("starting {command:?}"))?;
        let mut daemon = Self { child, mount: mount.to_owned() };
        let start = Instant::now();
        while !is_mounted(mount)? {
            if let Some(status) = daemon.child.try_wait()? {
                bail!("polluxd on {spec} ended with {status} before it mounted");
            }
            ensure!(start.elapsed() < PATIENCE, "polluxd on {spec} has not mounted after {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(daemon)
    }

    /// Asks it to end, and insists that it does, well or not.
    fn end(&mut self) -> Result<()> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id())?);
        // A daemon that lost its device may have ended by itself.
        let _ended = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let start = Instant::now();
        while self.child.try_wait()?.is_none() {
            ensure!(start.elapsed() < PATIENCE, "polluxd has not ended after {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
        ensure!(!is_mounted(&self.mount)?, "polluxd has ended and is still mounted");
        Ok(())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ended = self.child.kill();
            let _reaped = self.child.wait();
        }
        let _not_mounted = nix::mount::umount2(&self.mount, nix::mount::MntFlags::MNT_DETACH);
    }
}
