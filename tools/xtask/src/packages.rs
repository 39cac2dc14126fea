//! Programs from Debian that some test tiers run: which, whether they are there, how to get them.
//!
//! Owns: the table [`PROGRAMS`] and the one place where a task changes the machine (`apt-get install`, only as root,
//! and only on request of a tier or a measurement that needs the program).

use std::path::{Path, PathBuf};
use std::process::Command;

/// A program and the Debian package that holds it.
pub(crate) struct Program {
    name: &'static str,
    package: &'static str,
}

/// What the mount tiers run. fusermount3 is not among them: as root the daemon mounts without it.
pub(crate) const PROGRAMS: &[Program] = &[
    Program { name: "fio", package: "fio" },
    Program { name: "sqlite3", package: "sqlite3" },
    Program { name: "git", package: "git" },
    Program { name: "diff", package: "diffutils" },
    Program { name: "setfattr", package: "attr" },
    Program { name: "pgbench", package: "postgresql" },
    Program { name: "mkfs.btrfs", package: "btrfs-progs" },
    Program { name: "mkfs.xfs", package: "xfsprogs" },
];

/// Packages of programs that are missing.
pub(crate) fn missing() -> Vec<&'static str> {
    PROGRAMS.iter().filter(|program| find(program.name).is_none()).map(|program| program.package).collect()
}

/// Packages of those `programs` (name and package) that are missing.
pub(crate) fn missing_of(programs: &[(&str, &'static str)]) -> Vec<&'static str> {
    programs.iter().filter(|(name, _)| find(name).is_none()).map(|(_, package)| *package).collect()
}

/// The command that installs `packages`.
pub(crate) fn install_command(packages: &[&str]) -> String {
    format!("apt-get install --yes --no-install-recommends {}", packages.join(" "))
}

/// Installs `packages`, as root on Debian.
///
/// # Errors
/// Says why they could not be installed.
pub(crate) fn install(packages: &[&str]) -> Result<(), String> {
    if !is_root() {
        return Err(format!("not root; run: sudo {}", install_command(packages)));
    }
    // A fresh machine has no package lists; a failure here shows itself in the next step.
    let _ = Command::new("apt-get").args(["update", "--quiet"]).status();
    let status = Command::new("apt-get")
        .args(["install", "--quiet", "--yes", "--no-install-recommends"])
        .args(packages)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .status()
        .map_err(|error| format!("cannot run apt-get: {error}; install {}", packages.join(", ")))?;
    if status.success() {
        return Ok(());
    }
    Err(format!("`{}` failed", install_command(packages)))
}

/// Sees to it that `program` is there, if need be by installing `package`.
///
/// # Errors
/// Says why it could not be installed.
pub(crate) fn ensure(program: &str, package: &str) -> Result<(), String> {
    if find(program).is_some() {
        return Ok(());
    }
    println!("installing {package}");
    install(&[package])
}

/// Why this machine cannot mount, if so.
pub(crate) fn why_no_mount() -> Option<String> {
    if !Path::new("/dev/fuse").exists() {
        return Some("/dev/fuse is missing: run `modprobe fuse` (in a container: --device /dev/fuse)".into());
    }
    if std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").is_err() {
        return Some("/dev/fuse cannot be opened by this user".into());
    }
    if !is_root() && find("fusermount3").is_none() {
        return Some("not root and no fusermount3: apt-get install fuse3".into());
    }
    None
}

/// Why this machine cannot mount btrfs and XFS from files, if so.
pub(crate) fn why_no_loop() -> Option<String> {
    if !is_root() {
        return Some("not root: only root mounts loop devices".into());
    }
    if !Path::new("/dev/loop-control").exists() {
        return Some(
            "/dev/loop-control is missing: run `modprobe loop` (in a container: --privileged)".into(),
        );
    }
    ["btrfs", "xfs"].into_iter().find(|name| !kernel_has(name)).map(|name| {
        format!("the kernel has no {name}: run `modprobe {name}`, or install a kernel that has it")
    })
}

/// Whether the kernel knows a file system, with its module loaded if need be.
fn kernel_has(name: &str) -> bool {
    let listed = || {
        let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
        known.lines().any(|line| line.split_whitespace().last() == Some(name))
    };
    // Where there is no module to load, the list says so.
    listed() || Command::new("modprobe").arg("--quiet").arg(name).status().is_ok_and(|_| listed())
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|candidate| candidate.is_file())
}
