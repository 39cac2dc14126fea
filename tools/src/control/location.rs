//! Where control sockets lie, so that any path on a mount leads to its daemon.
//!
//! Owns: the rule. The socket of a mount with device number `0:57` is `0-57.sock` in the runtime folder of the user
//! who runs the daemon:
//!
//! | who | folder | if that cannot be used |
//! |---|---|---|
//! | root | `/run/pollux` | `/tmp/pollux-0` |
//! | others | `$XDG_RUNTIME_DIR/pollux` | `/tmp/pollux-UID` |
//!
//! The kernel gives a device number to one mount at a time, so a socket of that name can only be left over from a
//! daemon that died. A daemon started with `--socket` leaves a symbolic link there instead. A folder counts only if it
//! belongs to root or to the user who asks and nobody else may write to it: in `/tmp` anybody can make one.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};
use nix::unistd::{Uid, geteuid};

use crate::failure::{During, Failure};
use crate::fuse::{MountEntry, mounts};

/// Name of a mount's socket in a runtime folder.
fn file_name(device: (u32, u32)) -> String {
    format!("{}-{}.sock", device.0, device.1)
}

fn run_folder() -> PathBuf {
    PathBuf::from("/run/pollux")
}

fn session_folder() -> Option<PathBuf> {
    let folder = PathBuf::from(std::env::var_os("XDG_RUNTIME_DIR")?);
    folder.is_absolute().then(|| folder.join("pollux"))
}

fn temporary_folder(user: Uid) -> PathBuf {
    PathBuf::from(format!("/tmp/pollux-{user}"))
}

/// Whether `folder` is a directory (no link) of root or of this user that nobody else may write to.
fn is_trusted(folder: &Path) -> bool {
    fs::symlink_metadata(folder).is_ok_and(|metadata| {
        let owned = metadata.uid() == 0 || metadata.uid() == geteuid().as_raw();
        metadata.is_dir() && owned && metadata.mode() & 0o022 == 0
    })
}

/// Where a daemon of this user puts the socket of the mount `device`; the folder is made.
///
/// # Errors
/// No folder can be used; the last error.
pub fn for_daemon(device: (u32, u32)) -> Result<PathBuf, Failure> {
    let user = geteuid();
    let preferred = if user.is_root() { Some(run_folder()) } else { session_folder() };
    let mut last = None;
    for folder in preferred.into_iter().chain([temporary_folder(user)]) {
        match make(&folder) {
            Ok(()) => return Ok(folder.join(file_name(device))),
            Err(error) => last = Some((folder, error)),
        }
    }
    let (folder, error) = last.expect("the temporary folder is always tried");
    Err(Failure::new(format!("cannot make {} for the control socket: {error}", folder.display()))
        .remedy("give another place with --socket PATH"))
}

fn make(folder: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o755).create(folder) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    if is_trusted(folder) {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        "it belongs to somebody else, or others may write to it",
    ))
}

/// The socket of the daemon that serves `path`: the path of a socket itself, or anything on a mount.
///
/// # Errors
/// Says what `path` is instead.
pub fn of_path(path: &Path) -> Result<PathBuf, Failure> {
    use std::os::unix::fs::FileTypeExt;

    let shown = path.display();
    let metadata = fs::metadata(path).map_err(|error| {
        let failure = Failure::new(format!("cannot look at {shown}: {error}"));
        if error.raw_os_error() == Some(libc::ENOTCONN) {
            return failure.remedy(format!("its daemon has died; detach the mount: umount -l {shown}"));
        }
        failure
    })?;
    if metadata.file_type().is_socket() {
        return Ok(path.to_path_buf());
    }
    let device = (number(major(metadata.dev()))?, number(minor(metadata.dev()))?);
    let table = mounts().during("cannot read the table of mounts")?;
    if !table.iter().any(|entry| entry.is_pollux() && entry.device == device) {
        return Err(Failure::new(format!("{shown} is neither on a Pollux mount nor a control socket"))
            .remedy("give a path on the mount, or the socket with --socket PATH"));
    }
    of_device(device).ok_or_else(|| no_socket(&shown.to_string()))
}

/// The socket of the only Pollux mount of this host.
///
/// # Errors
/// There is none, or more than one.
pub fn of_only_mount() -> Result<PathBuf, Failure> {
    let table = mounts().during("cannot read the table of mounts")?;
    let ours: Vec<MountEntry> = table.into_iter().filter(MountEntry::is_pollux).collect();
    match ours.as_slice() {
        [] => Err(Failure::new("nothing of Pollux is mounted on this host")
            .remedy("start a daemon: pollux up; or name its socket: --socket PATH")),
        [only] => of_device(only.device).ok_or_else(|| no_socket(&only.path.display().to_string())),
        several => {
            let paths: Vec<String> = several.iter().map(|entry| entry.path.display().to_string()).collect();
            Err(Failure::usage(format!("several volumes are mounted: {}", paths.join(", ")))
                .remedy("name one of these paths"))
        }
    }
}

fn of_device(device: (u32, u32)) -> Option<PathBuf> {
    let folders = [run_folder(), temporary_folder(Uid::from_raw(0)), temporary_folder(geteuid())];
    let sockets = session_folder()
        .into_iter()
        .chain(folders)
        .filter(|folder| is_trusted(folder))
        .map(|folder| folder.join(file_name(device)));
    sockets.into_iter().find(|socket| socket.exists())
}

fn no_socket(path: &str) -> Failure {
    Failure::new(format!("no control socket of the daemon that serves {path} can be found"))
        .remedy("it may run for another user, or have its own --socket PATH: name it")
}

fn number(value: u64) -> Result<u32, Failure> {
    u32::try_from(value).during("device number")
}
