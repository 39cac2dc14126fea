//! A volume on a device behind a vfio-user server that dies, or stands still for a while, in the middle of the work: errors in bounded
//! time and a daemon that ends, or a pause and nothing else.
//!
//! Needs /dev/fuse and root. Every process is ended by its own id, every mount is detached, also when a test fails.

#![allow(clippy::unwrap_used, reason = "a failed step of a test is the failure of the test")]

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Longer than anything here takes on the slowest machine.
const DEADLINE: Duration = Duration::from_secs(120);

/// A program with its output in a file, killed when it is dropped.
struct Program {
    child: Child,
    log: PathBuf,
}

impl Program {
    fn start(program: &str, arguments: &[&str], log: PathBuf) -> Self {
        let output = File::create(&log).unwrap();
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        Self { child, log }
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    fn wait_until(&mut self, what: &str, reached: impl Fn() -> bool) {
        let start = Instant::now();
        while !reached() {
            assert_eq!(self.child.try_wait().unwrap(), None, "ended before {what}:\n{}", self.log());
            assert!(start.elapsed() < DEADLINE, "no {what} after {DEADLINE:?}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn end(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < DEADLINE, "it has not ended after {DEADLINE:?}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Both fail if it has ended, which is as well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A directory with an image, a server's socket, and a mount point.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Option<Self> {
        if !Path::new("/dev/fuse").exists() || !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs /dev/fuse and root");
            return None;
        }
        let place = Self { folder: tempfile::tempdir().unwrap() };
        fs::create_dir(place.mount()).unwrap();
        Some(place)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn mount(&self) -> PathBuf {
        self.path("mnt")
    }

    fn device(&self) -> String {
        format!("vfio-user:{}", self.path("cntrl").display())
    }

    fn serve(&self) -> Program {
        let image = format!("emu:{},size=256MiB", self.path("image").display());
        let socket = self.path("cntrl");
        // Whoever waits below is to see the new server's socket, not that of one that was killed.
        let _ = fs::remove_file(&socket);
        let arguments = ["serve", "--device", &image, "--socket", socket.to_str().unwrap()];
        let mut server = Program::start(env!("CARGO_BIN_EXE_pollux"), &arguments, self.path("server.log"));
        server.wait_until("the socket", || socket.exists());
        server
    }

    fn pollux(&self, arguments: &[&str]) -> Output {
        let program = env!("CARGO_BIN_EXE_pollux");
        Command::new(program).args(arguments).arg("--device").arg(self.device()).output().unwrap()
    }

    fn succeeds(&self, arguments: &[&str]) {
        let output = self.pollux(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn daemon(&self) -> Program {
        let (device, mount, socket) = (self.device(), self.mount(), self.path("control"));
        let arguments =
            ["--device", &device, "--mount", mount.to_str().unwrap(), "--socket", socket.to_str().unwrap()];
        let mut daemon = Program::start(env!("CARGO_BIN_EXE_polluxd"), &arguments, self.path("daemon.log"));
        daemon.wait_until("the mount", || is_mounted(&mount));
        daemon
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Mounted only if a test failed half-way.
        let _ = umount2(&self.mount(), MntFlags::MNT_DETACH);
    }
}

fn is_mounted(point: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    mounts.lines().any(|line| line.split(' ').nth(1) == point.to_str())
}

fn contents(file: u32) -> Vec<u8> {
    (0..96u32 << 10).map(|at| (file.wrapping_mul(31) ^ at.wrapping_mul(0x9e37_79b9) >> 13) as u8).collect()
}

fn name(file: u32) -> String {
    format!("file {file}")
}

/// Writes and syncs file after file; tells of each that is on the device, and how it ended.
fn work(mount: &Path, synced: &mpsc::Sender<u32>) -> (u32, io::Error) {
    let device = fs::metadata(mount).unwrap().dev();
    for file in 0.. {
        let write = || {
            let mut open = File::create(mount.join(name(file)))?;
            // Once the mount is gone there is the directory below it, which takes anything.
            if open.metadata()?.dev() != device {
                return Err(io::Error::from(ErrorKind::NotConnected));
            }
            open.write_all(&contents(file))?;
            open.sync_all()
        };
        match write() {
            Ok(()) => synced.send(file).unwrap(),
            Err(error) => return (file, error),
        }
    }
    unreachable!("a volume is full at some time")
}

/// Kills the server in the middle of the work.
#[test]
fn a_server_that_is_killed_gives_errors_and_the_daemon_ends() {
    let Some(place) = Place::new() else { return };
    let mut server = place.serve();
    place.succeeds(&["mkfs"]);
    let mut daemon = place.daemon();
    let mount = place.mount();
    let (sender, synced) = mpsc::channel();
    let worker = std::thread::spawn(move || work(&mount, &sender));
    let mut last = synced.recv_timeout(DEADLINE).unwrap();
    for _ in 0..20 {
        last = synced.recv_timeout(DEADLINE).unwrap();
    }
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    // Whatever else it wrote, it comes to an end: the channel closes.
    while let Ok(file) = synced.recv_timeout(DEADLINE) {
        last = file;
    }
    let (failed, error) = worker.join().unwrap();
    assert!(failed > last, "{failed} failed after {last} was safe");
    let errno = error.raw_os_error().map(Errno::from_raw);
    let is_mount_gone = error.kind() == ErrorKind::NotConnected;
    assert!(is_mount_gone || matches!(errno, Some(Errno::EIO | Errno::EROFS)), "{error}");
    let status = daemon.end();
    let log = daemon.log();
    assert!(!status.success(), "not everything could be written:\n{log}");
    assert!(log.contains("the device has gone"), "{log}");
    assert!(!is_mounted(&place.mount()), "{log}");

    // Another server, the same image: everything that was synced is there.
    let _server = place.serve();
    place.succeeds(&["fsck"]);
    let mut daemon = place.daemon();
    for file in 0..=last {
        let found = fs::read(place.mount().join(name(file))).unwrap();
        assert!(found == contents(file), "file {file} holds something else");
    }
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.end().success(), "{}", daemon.log());
}

/// Stops the server for a while, and lets it go on.
#[test]
fn a_server_that_stands_still_for_a_while_is_a_pause() {
    let Some(place) = Place::new() else { return };
    let server = place.serve();
    place.succeeds(&["mkfs"]);
    let mut daemon = place.daemon();
    let file = place.mount().join("file");
    let write = move |n: u32| {
        let mut open = File::create(&file)?;
        open.write_all(&contents(n))?;
        open.sync_all()
    };
    write(1).unwrap();
    for round in 2..5 {
        server.signal(Signal::SIGSTOP);
        let (sender, outcome) = mpsc::channel();
        let write = write.clone();
        let writer = std::thread::spawn(move || sender.send(write(round)).unwrap());
        // Nothing is durable while the server stands still, however long we look.
        let early = outcome.recv_timeout(Duration::from_millis(700));
        assert!(early.is_err(), "synced without a server: {early:?}");
        server.signal(Signal::SIGCONT);
        outcome.recv_timeout(DEADLINE).unwrap().unwrap();
        writer.join().unwrap();
    }
    assert_eq!(fs::read(place.mount().join("file")).unwrap(), contents(4));
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.end().success(), "{}", daemon.log());
    place.succeeds(&["fsck"]);
}

/// Stops the server for good: it holds its socket and answers nothing.
#[test]
fn a_server_that_never_goes_on_is_gone() {
    let Some(place) = Place::new() else { return };
    let server = place.serve();
    place.succeeds(&["mkfs"]);
    let mut daemon = place.daemon();
    let mount = place.mount();
    let (sender, synced) = mpsc::channel();
    let worker = std::thread::spawn(move || work(&mount, &sender));
    let mut last = synced.recv_timeout(DEADLINE).unwrap();
    for _ in 0..20 {
        last = synced.recv_timeout(DEADLINE).unwrap();
    }
    server.signal(Signal::SIGSTOP);
    let began = Instant::now();
    while let Ok(file) = synced.recv_timeout(DEADLINE) {
        last = file;
    }
    let (failed, error) = worker.join().unwrap();
    println!("an error after {:?}: {error}", began.elapsed());
    assert!(failed > last, "{failed} failed after {last} was safe");
    let status = daemon.end();
    println!("the daemon ended after {:?}", began.elapsed());
    let log = daemon.log();
    assert!(!status.success(), "not everything could be written:\n{log}");
    assert!(!is_mounted(&place.mount()), "{log}");
    // Nor does a program without a volume wait for ever.
    let began = Instant::now();
    let output = place.pollux(&["identify"]);
    println!("identify gave up after {:?}", began.elapsed());
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("cntrl"), "{said}");
}
