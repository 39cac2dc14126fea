//! `pollux grow` and `pollux relocate --shrink-to` on a mount, and the image file cut and extended between mounts.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use hw_tests::{Daemon, Random, Scratch, fsck_clean, pollux, run, same_tree, text};

const MIB: u64 = 1 << 20;

/// Runs a command of `pollux` on the mount; what it printed.
fn on_mount(mount: &Path, arguments: &[&str]) -> Result<(Option<i32>, String)> {
    let mut all: Vec<&std::ffi::OsStr> = arguments.iter().map(std::convert::AsRef::as_ref).collect();
    all.push(mount.as_os_str());
    let output = pollux(&all)?;
    Ok((output.status.code(), text(&output)))
}

/// Bytes of the mounted filesystem, as statfs says.
fn size_of(mount: &Path) -> Result<u64> {
    let stat = nix::sys::statvfs::statvfs(mount)?;
    Ok(stat.blocks() * stat.fragment_size())
}

#[test]
fn volume_shrinks_and_grows_with_its_files_and_its_image() -> Result<()> {
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "512MiB"])?;
    let mount = scratch.mount();
    let mut random = Random(5);
    let source = scratch.path().join("source");
    fs::create_dir(&source)?;
    for number in 0..40 {
        let length = 1 + usize::try_from(random.below(2 * MIB))?;
        fs::write(source.join(format!("file{number}")), random.bytes(length))?;
    }
    // Something before it that goes, so that the tree lies at the end.
    fs::write(mount.join("filler"), vec![1; 300 << 20])?;
    run(Command::new("sync").arg("-f").arg(&mount))?;
    run(Command::new("cp").arg("-r").arg(&source).arg(mount.join("tree")))?;
    fs::remove_file(mount.join("filler"))?;

    let (code, said) = on_mount(&mount, &["relocate", "--shrink-to", "8MiB"])?;
    ensure!(code == Some(1) && said.contains("the smallest size is"), "{code:?}: {said}");
    let (code, said) = on_mount(&mount, &["grow", "--to", "1GiB"])?;
    ensure!(code == Some(1) && said.contains("make the device larger first"), "{code:?}: {said}");

    let (code, said) = on_mount(&mount, &["relocate", "--shrink-to", "200MiB"])?;
    ensure!(code == Some(0) && said.contains("512 MiB before"), "{code:?}: {said}");
    let small = size_of(&mount)?;
    ensure!(small <= 200 * MIB && small > 190 * MIB, "{small} bytes after shrinking");
    same_tree(&source, &mount.join("tree"))?;
    daemon.stop()?;
    fs::File::options().write(true).open(scratch.image())?.set_len(200 * MIB)?;
    fsck_clean(&scratch)?;

    let daemon = Daemon::up(&scratch, &[])?;
    same_tree(&source, &mount.join("tree")).context("in the image that was cut")?;
    daemon.stop()?;
    fs::File::options().write(true).open(scratch.image())?.set_len(700 * MIB)?;
    let daemon = Daemon::up(&scratch, &[])?;
    ensure!(size_of(&mount)? == small, "a volume grows when it is told to");
    let (code, said) = on_mount(&mount, &["grow", "--json"])?;
    ensure!(code == Some(0) && said.contains(&format!("\"bytes\": {}", 700 * MIB)), "{code:?}: {said}");
    ensure!(size_of(&mount)? == 700 * MIB);
    let (code, said) = on_mount(&mount, &["grow"])?;
    ensure!(code == Some(0) && said.contains("nothing was changed"), "{code:?}: {said}");
    let large = vec![2; 400 << 20];
    fs::write(mount.join("large"), &large)?;
    same_tree(&source, &mount.join("tree"))?;
    daemon.kill()?;
    fsck_clean(&scratch)?;
    let daemon = Daemon::up(&scratch, &[])?;
    ensure!(size_of(&mount)? == 700 * MIB);
    same_tree(&source, &mount.join("tree"))?;
    daemon.stop()?;
    fsck_clean(&scratch)
}
