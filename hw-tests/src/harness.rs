//! Harness of the end-to-end tests: real daemons, real mounts, real programs.
//!
//! Owns: [`Scratch`] (a directory that cleans up after itself), [`Daemon`] (a `pollux up` process and its mount) and
//! the helpers that run programs and compare trees.
//!
//! Rules that the tests keep:
//! - every process is ended by its own id, every mount is detached, also when a test fails;
//! - waiting has a deadline that only a broken system meets; no test is decided by timing;
//! - a test that lacks something (FUSE, fio, sqlite3) fails and says what to install. Leaving tests out is the
//!   business of `cargo xtask test`, which says so.

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long a daemon may take to mount, on the slowest machine.
const MOUNT_DEADLINE: Duration = Duration::from_secs(60);

/// How long a daemon may take to end, on the slowest machine.
const END_DEADLINE: Duration = Duration::from_secs(60);

/// Where the binaries under test are: `POLLUX_BIN_DIR`, or beside the test's own.
pub fn binary(name: &str) -> Result<PathBuf> {
    if let Some(directory) = std::env::var_os("POLLUX_BIN_DIR") {
        return Ok(Path::new(&directory).join(name));
    }
    let own = std::env::current_exe().context("finding the test binary")?;
    let found =
        own.ancestors().skip(1).take(2).map(|directory| directory.join(name)).find(|path| path.is_file());
    found
        .with_context(|| format!("{name} is not built: run `cargo build --bins` with the same profile first"))
}

/// A directory for one test, with its mount detached and its files removed at the end.
pub struct Scratch {
    directory: tempfile::TempDir,
}

impl Scratch {
    /// A fresh directory.
    pub fn new() -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("pollux-test-")
            .tempdir()
            .context("making a scratch directory")?;
        Ok(Self { directory })
    }

    /// The image in it.
    pub fn image(&self) -> PathBuf {
        self.path().join("p.img")
    }

    /// The mount point in it.
    pub fn mount(&self) -> PathBuf {
        self.path().join("m")
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nothing is mounted any more unless a test failed half-way.
        let _not_mounted = nix::mount::umount2(&self.mount(), nix::mount::MntFlags::MNT_DETACH);
    }
}

/// A running `pollux up` with its mount.
pub struct Daemon {
    child: Child,
    log: PathBuf,
    mount: PathBuf,
}

impl Daemon {
    /// Starts `pollux up` on the scratch directory's image and waits for the mount.
    pub fn up(scratch: &Scratch, arguments: &[&str]) -> Result<Self> {
        ensure!(Path::new("/dev/fuse").exists(), "FUSE is missing here (no /dev/fuse): `modprobe fuse`");
        let log = scratch.path().join("daemon.log");
        let output = fs::OpenOptions::new().create(true).append(true).open(&log)?;
        let mut command = Command::new(binary("pollux")?);
        command
            .arg("up")
            .arg("--image")
            .arg(scratch.image())
            .arg("--mount")
            .arg(scratch.mount())
            .args(arguments);
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = command.spawn().context("starting pollux up")?;
        let mut daemon = Self { child, log, mount: scratch.mount() };
        daemon.wait_for_mount()?;
        Ok(daemon)
    }

    fn wait_for_mount(&mut self) -> Result<()> {
        let start = Instant::now();
        while !is_mounted(&self.mount)? {
            if let Some(status) = self.child.try_wait()? {
                bail!("pollux up ended with {status} before it mounted:\n{}", self.log());
            }
            ensure!(start.elapsed() < MOUNT_DEADLINE, "no mount after {MOUNT_DEADLINE:?}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// What the daemon has printed.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The daemon's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// CPU time used so far, user and system.
    pub fn cpu_time(&self) -> Result<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid()))?;
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
        let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("CLK_TCK")?;
        Ok(Duration::from_millis(ticks * 1000 / u64::try_from(per_second)?))
    }

    /// Ctrl-C: waits for the end and returns its status and how long it took.
    pub fn interrupt(mut self) -> Result<(ExitStatus, Duration)> {
        let start = Instant::now();
        self.signal(Signal::SIGINT)?;
        let status = self.wait(END_DEADLINE)?;
        ensure!(!is_mounted(&self.mount)?, "still mounted after the daemon has ended:\n{}", self.log());
        Ok((status, start.elapsed()))
    }

    /// As [`Self::interrupt`], and insists on success.
    pub fn stop(self) -> Result<()> {
        let log = self.log.clone();
        let (status, _) = self.interrupt()?;
        ensure!(
            status.success(),
            "pollux up ended with {status}:\n{}",
            fs::read_to_string(log).unwrap_or_default()
        );
        Ok(())
    }

    /// kill -9, and clears the dead mount away.
    pub fn kill(mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        let status = self.wait(END_DEADLINE)?;
        ensure!(
            status.signal() == Some(Signal::SIGKILL as i32),
            "ended with {status} before it was killed:\n{}",
            self.log()
        );
        Ok(())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.pid())?), signal).context("signalling the daemon")
    }

    fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ensure!(
                start.elapsed() < deadline,
                "the daemon has not ended after {deadline:?}:\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
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

/// Whether a FUSE filesystem is mounted at `path`.
pub fn is_mounted(path: &Path) -> Result<bool> {
    let path = path.to_str().context("a printable path")?;
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(table.lines().any(|line| line.split(' ').nth(4) == Some(path)))
}

/// Runs the `pollux` command.
pub fn pollux<S: AsRef<OsStr>>(arguments: &[S]) -> Result<Output> {
    Command::new(binary("pollux")?).args(arguments).stdin(Stdio::null()).output().context("running pollux")
}

/// `pollux fsck` of the scratch directory's image must find it clean.
pub fn fsck_clean(scratch: &Scratch) -> Result<()> {
    let device = format!("emu:{}", scratch.image().display());
    let output = pollux(&["fsck", "--device", &device])?;
    ensure!(output.status.code() == Some(0), "fsck: {}\n{}", output.status, text(&output));
    Ok(())
}

/// Runs a program and insists on success; its standard output is returned.
pub fn run(command: &mut Command) -> Result<String> {
    let shown = format!("{command:?}");
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("running {shown}"))?;
    ensure!(output.status.success(), "{shown}: {}\n{}", output.status, text(&output));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a shell command line and insists on success.
pub fn shell(line: &str) -> Result<String> {
    run(Command::new("sh").arg("-c").arg(line))
}

/// Both output streams of a finished program.
pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Insists that a program is installed, and names the Debian package if not.
pub fn need(program: &str, package: &str) -> Result<()> {
    let found = Command::new("sh").arg("-c").arg(format!("command -v {program}")).output()?;
    ensure!(found.status.success(), "{program} is missing: `apt-get install {package}`");
    Ok(())
}

/// A program that is no Debian package, from where `cargo xtask test` installs it.
pub fn tool(name: &str, version: &str) -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools");
    let path = root.join("bin").join(name);
    ensure!(
        path.is_file(),
        "{name} is missing: `cargo install --locked --root target/tools {name}@{version}`, or run `cargo xtask test`"
    );
    Ok(path)
}

/// A seeded generator (SplitMix64) for test data.
pub struct Random(pub u64);

impl Random {
    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound.max(1)
    }

    /// `length` bytes.
    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            bytes.extend_from_slice(&self.next_u64().to_le_bytes());
        }
        bytes.truncate(length);
        bytes
    }
}

/// Writes a tree of `files` files of 0 to 64 KiB into `root`, in nested directories, with some links and modes.
pub fn make_tree(root: &Path, files: u64, seed: u64) -> Result<()> {
    let mut random = Random(seed);
    fs::create_dir_all(root)?;
    let mut directories = vec![root.to_owned()];
    for index in 0..files {
        let slot = usize::try_from(random.below(directories.len() as u64))?;
        let directory = directories[slot].clone();
        if index % 16 == 0 {
            let child = directory.join(format!("dir-{index}"));
            fs::create_dir(&child)?;
            directories.push(child);
        }
        let path = directory.join(format!("file-{index}"));
        let length = if random.below(4) == 0 { random.below(65_536) } else { random.below(6_000) };
        fs::File::create(&path)?.write_all(&random.bytes(usize::try_from(length)?))?;
        match index % 50 {
            7 => {
                std::os::unix::fs::symlink(format!("file-{index}"), directory.join(format!("link-{index}")))?;
            }
            13 => fs::hard_link(&path, directory.join(format!("hard-{index}")))?,
            _ => {}
        }
    }
    Ok(())
}

/// Insists that two trees have the same names, kinds, contents, link targets and modes.
///
/// Without `diff`: busybox's follows links.
pub fn same_tree(left: &Path, right: &Path) -> Result<()> {
    let (names, others) = (names(left)?, names(right)?);
    ensure!(names == others, "{} has {names:?}, {} has {others:?}", left.display(), right.display());
    for name in names {
        same_entry(&left.join(&name), &right.join(&name))?;
    }
    Ok(())
}

fn names(directory: &Path) -> Result<Vec<std::ffi::OsString>> {
    let entries = fs::read_dir(directory).with_context(|| directory.display().to_string())?;
    let mut names = entries.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

fn same_entry(left: &Path, right: &Path) -> Result<()> {
    let both = || format!("{} and {}", left.display(), right.display());
    let (one, other) = (left.symlink_metadata()?, right.symlink_metadata()?);
    ensure!(one.mode() == other.mode(), "{}: kind and mode {:o}, {:o}", both(), one.mode(), other.mode());
    if one.is_dir() {
        return same_tree(left, right);
    }
    if one.is_symlink() {
        ensure!(fs::read_link(left)? == fs::read_link(right)?, "{} point to different places", both());
    } else if one.is_file() {
        ensure!(read_file(left)? == read_file(right)?, "{} differ", both());
    }
    Ok(())
}

/// The whole of a small file.
pub fn read_file(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path)
        .and_then(|mut file| file.read_to_end(&mut bytes))
        .with_context(|| path.display().to_string())?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed step of a test is the failure of the test")]

    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn trees_differ_by_name_contents_link_and_mode() {
        let directory = tempfile::tempdir().unwrap();
        let (left, right) = (directory.path().join("l"), directory.path().join("r"));
        make_tree(&left, 60, 1).unwrap();
        let again = || {
            let _absent = fs::remove_dir_all(&right);
            make_tree(&right, 60, 1).unwrap();
        };
        let changes: [fn(&Path); 5] = [
            |root| fs::write(root.join("new"), "x").unwrap(),
            |root| fs::remove_dir_all(root.join("dir-0")).unwrap(),
            |root| fs::write(root.join("file-0"), "other").unwrap(),
            |root| fs::set_permissions(root.join("file-0"), fs::Permissions::from_mode(0o600)).unwrap(),
            |root| {
                fs::remove_file(root.join("file-0")).unwrap();
                std::os::unix::fs::symlink("file-1", root.join("file-0")).unwrap();
            },
        ];
        again();
        same_tree(&left, &right).unwrap();
        for (n, change) in changes.into_iter().enumerate() {
            again();
            change(&right);
            assert!(same_tree(&left, &right).is_err(), "change {n} was not seen");
        }
    }
}
