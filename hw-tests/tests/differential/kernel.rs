//! File systems of the kernel on loop devices over files.
//!
//! Owns: [`Kernel`], which ones, and [`Mounted`], one of them, which is unmounted and detached at the end.
//!
//! Invariant: the loop device belongs to the mount and goes with it (`mount -o loop`), whatever ended the test.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use hw_tests::{need, run};

/// Bytes of a file below one.
const SIZE: u64 = 2 << 30;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    Btrfs,
    Xfs,
}

impl Kernel {
    pub(crate) const ALL: [Self; 2] = [Self::Btrfs, Self::Xfs];

    fn name(self) -> &'static str {
        match self {
            Self::Btrfs => "btrfs",
            Self::Xfs => "xfs",
        }
    }
}

/// A file system that is mounted.
pub(crate) struct Mounted {
    root: PathBuf,
}

impl Mounted {
    /// A fresh one, below `folder`.
    pub(crate) fn new(kernel: Kernel, folder: &Path) -> Result<Self> {
        let (program, package, options): (_, _, &[&str]) = match kernel {
            Kernel::Btrfs => ("mkfs.btrfs", "btrfs-progs", &["-q", "-f"]),
            Kernel::Xfs => ("mkfs.xfs", "xfsprogs", &["-q", "-f", "-m", "reflink=1"]),
        };
        need(program, package)?;
        let (image, root) = (folder.join(format!("{}.img", kernel.name())), folder.join(kernel.name()));
        File::create(&image)?.set_len(SIZE)?;
        run(Command::new(program).args(options).arg(&image))?;
        fs::create_dir(&root)?;
        let mounted = Self { root };
        run(Command::new("mount").args(["-t", kernel.name(), "-o", "loop"]).arg(&image).arg(mounted.root()))?;
        Ok(mounted)
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if nix::mount::umount2(&self.root, nix::mount::MntFlags::empty()).is_err() {
            // Something has a file open; or it was never mounted.
            let _gone = nix::mount::umount2(&self.root, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}
