//! Whether a directory can be mounted on.
//!
//! Owns: [`MountPoint`], a directory that was there, free and empty when it was looked at, and the errors that name
//! the way out of each other state.
//!
//! | state of the path | `polluxd` | `pollux up` |
//! |---|---|---|
//! | missing | error | created, with its parents |
//! | empty directory | used | used |
//! | directory with entries, or not a directory | error | error |
//! | mount of a dead daemon | error, with the command | detached |
//! | any other mount | error | error |

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::statvfs::statvfs;

use super::mount_table::mount_at;
use super::session::detach;
use crate::failure::{During, Failure};

/// What to do about a mount point that is missing, or left behind by a daemon that died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absent {
    /// Refuse.
    Refuse,
    /// Create it; detach a dead mount.
    Create,
}

/// A directory that can be mounted on.
#[derive(Clone, Debug)]
pub struct MountPoint {
    path: PathBuf,
}

impl MountPoint {
    /// Looks at `path`, and puts it in order if `absent` says so.
    ///
    /// # Errors
    /// Says in which state the path is and what to do.
    pub fn prepare(path: &Path, absent: Absent) -> Result<Self, Failure> {
        let shown = path.display();
        let resolved = match resolve(path) {
            Ok(resolved) => resolved,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if absent == Absent::Refuse {
                    return Err(Failure::new(format!("mount point {shown} does not exist"))
                        .remedy(format!("create it: mkdir -p {shown}")));
                }
                fs::create_dir_all(path).during(format_args!("cannot create mount point {shown}"))?;
                resolve(path).during(format_args!("cannot use mount point {shown}"))?
            }
            Err(error) => return Err(Failure::new(format!("cannot use mount point {shown}: {error}"))),
        };
        free(&resolved, absent)?;
        let metadata = fs::metadata(&resolved).during(format_args!("cannot use mount point {shown}"))?;
        if !metadata.is_dir() {
            return Err(Failure::new(format!("mount point {shown} is not a directory"))
                .remedy("give an empty directory"));
        }
        let mut entries = fs::read_dir(&resolved).during(format_args!("cannot list mount point {shown}"))?;
        if entries.next().is_some() {
            return Err(Failure::new(format!("mount point {shown} is not empty; its files would be hidden"))
                .remedy("give an empty directory, or one that does not exist yet to `pollux up`"));
        }
        Ok(Self { path: resolved })
    }

    /// The directory, as the kernel names it.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Refuses a path that is mounted on; a dead mount of ours is detached first if `absent` says so.
fn free(path: &Path, absent: Absent) -> Result<(), Failure> {
    let shown = path.display();
    let Some(entry) = mount_at(path).during("cannot read the table of mounts")? else {
        return Ok(());
    };
    let dead = entry.is_fuse() && statvfs(path) == Err(Errno::ENOTCONN);
    if !dead {
        return Err(Failure::new(format!(
            "mount point {shown} is busy: {} ({}) is mounted there",
            entry.source, entry.filesystem
        ))
        .remedy(format!("unmount it first: umount {shown}")));
    }
    if absent == Absent::Refuse {
        return Err(Failure::new(format!(
            "the daemon that served {shown} has died and left its mount behind"
        ))
        .remedy(format!("detach it: umount -l {shown}")));
    }
    tracing::info!(path = %shown, "detaching a mount whose daemon has died");
    detach(path).during(format_args!("cannot detach the dead mount at {shown}"))?;
    // Several daemons may have died on top of each other; each turn takes one away.
    free(path, absent)
}

/// The canonical path, found without asking anything of a filesystem mounted at it: that might be dead.
fn resolve(path: &Path) -> io::Result<PathBuf> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return fs::canonicalize(path);
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let candidate = fs::canonicalize(parent)?.join(name);
    if mount_at(&candidate)?.is_some() {
        return Ok(candidate);
    }
    fs::canonicalize(&candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_mount_point_is_refused_or_created() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("a/b");
        let failure = MountPoint::prepare(&path, Absent::Refuse).unwrap_err().to_string();
        assert!(failure.contains("does not exist") && failure.contains("mkdir"), "{failure}");
        assert!(!path.exists());
        assert_eq!(MountPoint::prepare(&path, Absent::Create).unwrap().path(), path.canonicalize().unwrap());
    }

    #[test]
    fn files_in_the_way_are_named() {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("file");
        fs::write(&file, "x").unwrap();
        for absent in [Absent::Refuse, Absent::Create] {
            let failure = MountPoint::prepare(&file, absent).unwrap_err().to_string();
            assert!(failure.contains("not a directory"), "{failure}");
            let failure = MountPoint::prepare(scratch.path(), absent).unwrap_err().to_string();
            assert!(failure.contains("not empty"), "{failure}");
        }
        assert_eq!(fs::read(&file).unwrap(), b"x");
    }

    #[test]
    fn living_mount_is_busy() {
        let failure = MountPoint::prepare(Path::new("/proc"), Absent::Create).unwrap_err().to_string();
        assert!(failure.contains("busy"), "{failure}");
    }

    #[test]
    fn symbolic_link_leads_to_its_target() {
        let scratch = tempfile::tempdir().unwrap();
        let target = scratch.path().join("target");
        fs::create_dir(&target).unwrap();
        let link = scratch.path().join("link");
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let point = MountPoint::prepare(&link, Absent::Refuse).unwrap();
        assert_eq!(point.path(), target.canonicalize().unwrap());
    }
}
