//! What touches the system when drivers are bound: writes to sysfs and to the records, and block devices held open.
//!
//! Excludes: what is to be done (`plan`).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::OFlag;

/// Carries single steps out. Tests have their own kernel behind it.
pub(super) trait Hands {
    /// Writes to a file of sysfs.
    fn write(&mut self, path: &Path, value: &str) -> io::Result<()>;

    /// Opens a block device exclusively; `None` if there is no such node. Whoever mounts it, swaps to it or builds on it has
    /// claimed it, and keeps others from that; so do we.
    fn hold(&mut self, node: &Path) -> io::Result<Option<File>>;

    /// Replaces a record.
    fn remember(&mut self, path: &Path, text: &str) -> io::Result<()>;

    /// Removes a record.
    fn forget(&mut self, path: &Path) -> io::Result<()>;
}

/// The running system.
pub(super) struct System;

impl Hands for System {
    fn write(&mut self, path: &Path, value: &str) -> io::Result<()> {
        // In one call: sysfs takes each as a line of its own.
        OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
    }

    fn hold(&mut self, node: &Path) -> io::Result<Option<File>> {
        let opened = OpenOptions::new().read(true).custom_flags(OFlag::O_EXCL.bits()).open(node);
        match opened {
            Ok(file) if file.metadata()?.file_type().is_block_device() => Ok(Some(file)),
            Ok(_) => Ok(None),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn remember(&mut self, path: &Path, text: &str) -> io::Result<()> {
        let directory = path.parent().ok_or(io::ErrorKind::NotFound)?;
        // The run directory itself is not ours to make.
        fs::DirBuilder::new()
            .mode(0o755)
            .create(directory.parent().ok_or(io::ErrorKind::NotFound)?)
            .or_else(exists)?;
        fs::DirBuilder::new().mode(0o755).create(directory).or_else(exists)?;
        let new = path.with_extension("new");
        fs::write(&new, text)?;
        fs::rename(&new, path)
    }

    fn forget(&mut self, path: &Path) -> io::Result<()> {
        fs::remove_file(path).or_else(|error| if is_absent(&error) { Ok(()) } else { Err(error) })
    }
}

fn exists(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::AlreadyExists { Ok(()) } else { Err(error) }
}

/// No such file, or a node that no device is behind.
fn is_absent(error: &io::Error) -> bool {
    use nix::errno::Errno;
    matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::ENOENT | Errno::ENXIO | Errno::ENODEV))
}
