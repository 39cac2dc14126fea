//! Suites that no one here wrote, on a mounted volume.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use hw_tests::{Daemon, Scratch, fsck_clean, text, tool};

#[test]
fn pjdfstest_passes() -> Result<()> {
    let program = tool("pjdfstest", "0.2.2")?;
    let scratch = Scratch::new()?;
    // The suite changes users: they must reach the mount.
    fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o755))?;
    let other = scratch.path().join("other-file-system");
    fs::create_dir(&other)?;
    let daemon = Daemon::up(&scratch, &["--size", "1GiB"])?;
    let work = scratch.mount().join("pjdfstest");
    fs::create_dir(&work)?;
    fs::set_permissions(&work, fs::Permissions::from_mode(0o777))?;
    let output = Command::new(program)
        .arg("-c")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("pjdfstest.toml"))
        .arg("-p")
        .arg(&work)
        .arg("-s")
        .arg(&other)
        .current_dir(&work)
        .stdin(Stdio::null())
        .output()
        .context("running pjdfstest")?;
    let said = text(&output);
    let summary = said.lines().find(|line| line.starts_with("Summary:")).context(said.clone())?;
    println!("{summary}");
    for line in said.lines().filter(|line| line.contains("FAILED") || line.contains("skipped")) {
        println!("{line}");
    }
    ensure!(summary.starts_with("Summary: 0 failed,"), "{said}");
    let passed: u32 =
        summary.split(", ").find_map(|part| part.strip_suffix(" passed")?.parse().ok()).unwrap_or(0);
    ensure!(passed >= 380, "{summary}: the suite was not run");
    daemon.stop()?;
    fsck_clean(&scratch)
}

/// File System eXerciser: what is read is what was written, through every way in. `POLLUX_FSX_OPERATIONS` is how many operations
/// each configuration does.
#[test]
fn fsx_passes() -> Result<()> {
    let program = tool("fsx", "0.3.2")?;
    let operations = std::env::var("POLLUX_FSX_OPERATIONS").unwrap_or_else(|_| "20000".to_owned());
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "1GiB"])?;
    for (configuration, seed) in [("fsx.toml", "1"), ("fsx-blocks.toml", "2")] {
        let output = Command::new(&program)
            .arg("-f")
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join(configuration))
            .args(["-N", &operations, "-S", seed, "-P"])
            .arg(scratch.path())
            .arg(scratch.mount().join(configuration))
            .stdin(Stdio::null())
            .output()
            .context("running fsx")?;
        let said = text(&output);
        ensure!(output.status.success(), "{configuration}, seed {seed}: {}\n{said}", output.status);
        ensure!(said.contains("All operations completed"), "{configuration} was not run to its end: {said}");
    }
    daemon.stop()?;
    fsck_clean(&scratch)
}
