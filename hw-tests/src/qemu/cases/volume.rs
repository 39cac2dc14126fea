//! A volume on QEMU's controller: errors of the medium below it, and the end of QEMU.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::qemu::configuration::fails;
use crate::qemu::{Configuration, Layer, Machine};
use crate::suite::{Environment, MachineCase, Verdict};
use crate::{Random, is_mounted, run};

pub(super) const CASES: &[MachineCase] = &[
    MachineCase { suite: "qemu", name: "an_unreadable_block_is_eio_for_its_file_alone", run: unreadable },
    MachineCase { suite: "qemu", name: "a_killed_qemu_gives_eio_and_the_daemon_ends", run: killed },
];

/// How long a daemon may take to mount or end, on the slowest machine.
const LIMIT: Duration = Duration::from_secs(90);

/// A running polluxd.
pub(super) struct Daemon {
    child: Child,
    mount: PathBuf,
    log: PathBuf,
}

impl Daemon {
    /// Mounts `device` at `scratch/m`.
    pub(super) fn mount(environment: &Environment, device: &str, scratch: &Path) -> Result<Self> {
        ensure!(Path::new("/dev/fuse").exists(), "FUSE is missing here (no /dev/fuse): `modprobe fuse`");
        let mount = scratch.join("m");
        fs::create_dir_all(&mount)?;
        let log = scratch.join("daemon.log");
        let output = File::create(&log)?;
        let child = Command::new(environment.bin_dir.join("polluxd"))
            .args(["--device", device, "--cores", "0", "--mount"])
            .arg(&mount)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("starting polluxd of {}", environment.bin_dir.display()))?;
        let mut daemon = Self { child, mount, log };
        let start = Instant::now();
        while !is_mounted(&daemon.mount)? {
            if let Some(status) = daemon.child.try_wait()? {
                bail!("polluxd ended with {status} before it mounted:\n{}", daemon.log());
            }
            ensure!(start.elapsed() < LIMIT, "no mount after {LIMIT:?}:\n{}", daemon.log());
            std::thread::sleep(Duration::from_millis(3));
        }
        Ok(daemon)
    }

    pub(super) fn path(&self) -> &Path {
        &self.mount
    }

    pub(super) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(super) fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// SIGINT, and waits for the end.
    pub(super) fn interrupt(&mut self) -> Result<std::process::ExitStatus> {
        if self.is_running()? {
            kill(Pid::from_raw(i32::try_from(self.child.id())?), Signal::SIGINT)?;
        }
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ensure!(start.elapsed() < LIMIT, "polluxd has not ended after {LIMIT:?}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(3));
        }
    }

    /// As [`Self::interrupt`], and insists on success.
    pub(super) fn stop(mut self) -> Result<()> {
        let status = self.interrupt()?;
        ensure!(status.success(), "polluxd ended with {status}:\n{}", self.log());
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _gone = self.child.kill();
            let _reaped = self.child.wait();
        }
        let _not_mounted = nix::mount::umount2(&self.mount, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// An empty volume.
pub(super) fn mkfs(environment: &Environment, device: &str) -> Result<()> {
    run(Command::new(environment.bin_dir.join("pollux")).args(["mkfs", "--device", device])).map(drop)
}

fn scratch(environment: &Environment, name: &str) -> Result<PathBuf> {
    let path = environment.scratch_root.join(name);
    fs::create_dir_all(&path)?;
    Ok(path)
}

fn unreadable(environment: &Environment) -> Result<Verdict> {
    let marker = Random(77).bytes(64 << 10);
    let scratch = scratch(environment, "unreadable")?;
    let machine = Machine::start(&Configuration::new("whole"))?;
    mkfs(environment, &machine.spec())?;
    let daemon = Daemon::mount(environment, &machine.spec(), &scratch)?;
    fs::write(daemon.path().join("marked"), &marker)?;
    fs::write(daemon.path().join("other"), b"fine")?;
    daemon.stop()?;
    let image = fs::read(machine.disk(0))?;
    // A block in the middle of the file's data.
    let wanted = &marker[32 << 10..(32 << 10) + 512];
    let place = image.chunks(512).position(|block| block == wanted).context("the data is not on the disk")?;

    let rule = vec![fails("read", place as u64, 5)];
    let broken = Machine::start(&Configuration::new("unreadable").layer(Layer::Debug(rule)))?;
    fs::copy(machine.disk(0), broken.disk(0))?;
    drop(machine);
    let mut daemon = Daemon::mount(environment, &broken.spec(), &scratch)?;
    let error =
        fs::read(daemon.path().join("marked")).err().context("the file with the bad block was read")?;
    ensure!(error.raw_os_error() == Some(5), "EIO was expected: {error}");
    ensure!(fs::read(daemon.path().join("other"))? == b"fine", "another file has other contents");
    fs::write(daemon.path().join("new"), b"still up")?;
    File::open(daemon.path().join("new"))?.sync_all()?;
    ensure!(daemon.is_running()?, "the daemon ended over an unreadable block:\n{}", daemon.log());
    daemon.stop()?;
    Ok(Verdict::Passed)
}

fn killed(environment: &Environment) -> Result<Verdict> {
    let scratch = scratch(environment, "killed")?;
    let machine = Machine::start(&Configuration::new("killed"))?;
    mkfs(environment, &machine.spec())?;
    let mut daemon = Daemon::mount(environment, &machine.spec(), &scratch)?;
    let mut file = File::create(daemon.path().join("file"))?;
    file.write_all(&[1; 100_000])?;
    file.sync_all()?;
    machine.kill();
    // In bounded time there is an error: at the write, or at the fsync that must not lie.
    let outcome = file.write_all(&[2; 100_000]).and_then(|()| file.sync_all());
    let error = outcome.err().context("an fsync succeeded although the device is gone")?;
    ensure!(
        matches!(error.raw_os_error(), Some(libc::EIO | libc::ENOTCONN | libc::EROFS)),
        "EIO was expected: {error}"
    );
    drop(file);
    let status = daemon.interrupt()?;
    ensure!(!status.success(), "polluxd says that everything was written, but the device is gone");
    ensure!(!daemon.log().contains("panicked"), "polluxd panicked:\n{}", daemon.log());
    Ok(Verdict::Passed)
}
