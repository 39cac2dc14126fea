//! A volume on the device: made, mounted, filled, killed, checked.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Case, Subject, Verdict};
use crate::harness::{Random, binary, is_mounted, make_tree, pollux, run, same_tree, text};

const SUITE: &str = "volume";

pub(super) const CASES: &[Case] = &[
    Case { suite: SUITE, name: "a_second_mkfs_is_refused_without_force", run: second_mkfs },
    Case { suite: SUITE, name: "a_tree_survives_unmount_and_remount", run: tree },
    Case { suite: SUITE, name: "what_was_fsynced_survives_kill_nine", run: kill_nine },
    Case { suite: SUITE, name: "a_full_volume_tells_the_writer_and_recovers", run: full },
];

/// What mounting and unmounting may take on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why volumes cannot be tried, if so.
fn obstacle(subject: &Subject) -> Option<String> {
    if !subject.outlives_processes() {
        return Some("the device is gone with the process that made the volume".to_owned());
    }
    let fuse = Path::new("/dev/fuse").exists();
    (!fuse).then(|| "no /dev/fuse: modprobe fuse".to_owned())
}

fn mkfs(subject: &Subject) -> Result<()> {
    run(Command::new(binary("pollux")?).args(["mkfs", "--force", "--device", &subject.spec])).map(drop)
}

fn fsck(subject: &Subject) -> Result<()> {
    let output = pollux(&["fsck", "--device", &subject.spec])?;
    ensure!(output.status.code() == Some(0), "fsck: {}\n{}", output.status, text(&output));
    Ok(())
}

/// A `polluxd` on the device.
struct Mount {
    child: Child,
    path: PathBuf,
}

impl Mount {
    fn start(subject: &Subject) -> Result<Self> {
        let path = subject.scratch.join("mnt");
        fs::create_dir_all(&path)?;
        let mut command = Command::new(binary("polluxd")?);
        command.args(["--device", &subject.spec, "--cores", "0", "--mount"]).arg(&path).stdin(Stdio::null());
        let child = command.spawn().with_context(|| format!("starting {command:?}"))?;
        let mut mount = Self { child, path };
        let start = Instant::now();
        while !is_mounted(&mount.path)? {
            if let Some(status) = mount.child.try_wait()? {
                bail!("polluxd ended with {status} before it mounted");
            }
            ensure!(start.elapsed() < PATIENCE, "polluxd has not mounted after {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(mount)
    }

    fn stop(mut self) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.child.id())?), Signal::SIGTERM)?;
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "polluxd ended with {status}");
                ensure!(!is_mounted(&self.path)?, "polluxd has ended and is still mounted");
                return Ok(());
            }
            ensure!(start.elapsed() < PATIENCE, "polluxd has not ended after {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// kill -9, if it was not stopped.
impl Drop for Mount {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ended = self.child.kill();
            let _reaped = self.child.wait();
        }
        let _not_mounted = nix::mount::umount2(&self.path, nix::mount::MntFlags::MNT_DETACH);
    }
}

fn second_mkfs(subject: &Subject) -> Result<Verdict> {
    if !subject.outlives_processes() {
        return Verdict::skipped("the device is gone with the process that made the volume");
    }
    mkfs(subject)?;
    fsck(subject)?;
    let refused = pollux(&["mkfs", "--device", &subject.spec])?;
    let said = text(&refused);
    ensure!(refused.status.code() == Some(1), "a second mkfs: {}\n{said}", refused.status);
    ensure!(said.contains("--force"), "it does not say what to do: {said}");
    fsck(subject).context("after the refused mkfs")?;
    Ok(Verdict::Passed)
}

fn tree(subject: &Subject) -> Result<Verdict> {
    if let Some(reason) = obstacle(subject) {
        return Verdict::skipped(reason);
    }
    mkfs(subject)?;
    let (tree, mount) = (subject.scratch.join("tree"), Mount::start(subject)?);
    make_tree(&tree, 300, 5)?;
    let copy = mount.path.join("tree");
    run(Command::new("cp").arg("-a").arg(&tree).arg(&copy))?;
    same_tree(&tree, &copy)?;
    mount.stop()?;
    fsck(subject)?;
    let mount = Mount::start(subject)?;
    same_tree(&tree, &mount.path.join("tree")).context("after a remount")?;
    fs::remove_dir_all(mount.path.join("tree"))?;
    mount.stop()?;
    fsck(subject)?;
    Ok(Verdict::Passed)
}

fn kill_nine(subject: &Subject) -> Result<Verdict> {
    if let Some(reason) = obstacle(subject) {
        return Verdict::skipped(reason);
    }
    mkfs(subject)?;
    let mut random = Random(17);
    let mut kept: Vec<(String, Vec<u8>)> = Vec::new();
    for round in 0..3 {
        let mount = Mount::start(subject)?;
        for (name, data) in &kept {
            ensure!(&fs::read(mount.path.join(name))? == data, "{name} changed in round {round}");
        }
        for n in 0..5 {
            let name = format!("kept-{round}-{n}");
            let length = usize::try_from(random.below(100_000))?;
            let data = random.bytes(length);
            let mut file = fs::File::create(mount.path.join(&name))?;
            file.write_all(&data)?;
            file.sync_all()?;
            fs::write(mount.path.join(format!("lost-{round}-{n}")), &data)?;
            kept.push((name, data));
        }
        // Dropped without a stop: kill -9.
        drop(mount);
        fsck(subject).with_context(|| format!("after kill -9 in round {round}"))?;
    }
    let mount = Mount::start(subject)?;
    for (name, data) in &kept {
        ensure!(&fs::read(mount.path.join(name))? == data, "{name} changed at the end");
    }
    mount.stop()?;
    Ok(Verdict::Passed)
}

/// Bytes that filling writes at most: a large drive is not filled.
const FILL_BYTES: u64 = 384 << 20;

fn full(subject: &Subject) -> Result<Verdict> {
    if let Some(reason) = obstacle(subject) {
        return Verdict::skipped(reason);
    }
    mkfs(subject)?;
    let mount = Mount::start(subject)?;
    let free = |path: &Path| -> Result<u64> {
        let found = nix::sys::statvfs::statvfs(path)?;
        Ok(found.blocks_available() * found.fragment_size())
    };
    let empty = free(&mount.path)?;
    if empty > FILL_BYTES {
        mount.stop()?;
        return Verdict::skipped(format!("{} MiB are too much to fill in a test", empty >> 20));
    }
    let data = Random(3).bytes(1 << 20);
    let (mut written, mut refused) = (0_u64, None);
    let mut file = fs::File::create(mount.path.join("big"))?;
    while refused.is_none() && written <= 2 * FILL_BYTES {
        match file.write_all(&data) {
            Ok(()) => written += data.len() as u64,
            Err(error) => refused = Some(error),
        }
    }
    let error = refused.context("the volume took more than it has")?;
    ensure!(error.raw_os_error() == Some(libc::ENOSPC), "a full volume says {error}");
    ensure!(written > empty / 2, "{written} bytes written of {empty} free ones");
    file.sync_all().context("what was accepted is written")?;
    drop(file);
    fs::remove_file(mount.path.join("big")).context("deleting on a full volume")?;
    run(Command::new(binary("pollux")?).arg("sync").arg(&mount.path))?;
    let after = free(&mount.path)?;
    ensure!(after + (8 << 20) > empty, "{empty} bytes were free, {after} are after everything was deleted");
    fs::write(mount.path.join("small"), &data)?;
    mount.stop()?;
    fsck(subject)?;
    Ok(Verdict::Passed)
}
