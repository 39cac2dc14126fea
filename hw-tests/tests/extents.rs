//! `pollux dump --extents` of a mount, and of the same volume once it is not mounted.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use hw_tests::{Daemon, Random, Scratch, pollux, run, text};

/// Rows of a table: offset, length and flags. Where it lies is left out.
fn rows(output: &str) -> Vec<(u64, u64, String)> {
    let fields = output.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    fields
        .filter(|fields| fields.len() == 4 && fields[0] != "offset")
        .filter_map(|fields| Some((fields[0].parse().ok()?, fields[1].parse().ok()?, fields[3].to_owned())))
        .collect()
}

fn listed(arguments: &[&str]) -> Result<String> {
    let output = pollux(&[&["dump"], arguments].concat())?;
    ensure!(output.status.success(), "{}", text(&output));
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn extents_are_listed_on_the_mount_and_in_the_image_alike() -> Result<()> {
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "1GiB"])?;
    let path = scratch.mount().join("file");
    let shown = path.display().to_string();
    let file = fs::File::create(&path)?;
    let contents = Random(3).bytes(4096);
    for block in 0..1500_u64 {
        file.write_all_at(&contents, block * 8192)?;
    }
    run(Command::new("fallocate").args(["--offset", "64MiB", "--length", "64KiB"]).arg(&path))?;
    file.write_all_at(&contents, (64 << 20) + 8192)?;
    file.sync_all()?;
    let cloned = pollux(&["clone", &shown, &scratch.mount().join("copy").display().to_string()])?;
    ensure!(cloned.status.success(), "{}", text(&cloned));
    file.write_all_at(&contents, 0)?;
    file.sync_all()?;

    let table = listed(&["--extents", &shown])?;
    let found = rows(&table);
    ensure!(found.len() > 3000, "{} rows: {table}", found.len());
    ensure!(
        found[0] == (0, 4096, "-".to_owned()),
        "a block that was written again is shared: {:?}",
        found[0]
    );
    ensure!(found[1] == (4096, 4096, "hole".to_owned()), "{:?}", found[1]);
    ensure!(found[2] == (8192, 4096, "shared".to_owned()), "{:?}", found[2]);
    ensure!(found.iter().any(|row| row.2.starts_with("prealloc")), "{table}");
    let end = found.iter().try_fold(0, |end, row| (row.0 == end).then_some(end + row.1));
    ensure!(end == Some((64 << 20) + (64 << 10)), "gaps, or an end at {end:?}");
    let last = table.lines().last().context("an empty table")?;
    ensure!(last.contains("extents, ") && last.ends_with("shared"), "{last}");

    for (path, words) in [
        ("/proc/self/status", "not on a Pollux volume"),
        (&*scratch.mount().join("nothing").display().to_string(), "No such file"),
        (&*scratch.mount().display().to_string(), "regular file"),
    ] {
        let refused = pollux(&["dump", "--extents", path])?;
        ensure!(!refused.status.success() && text(&refused).contains(words), "{path}: {}", text(&refused));
    }

    drop(file);
    daemon.stop()?;
    let device = format!("emu:{}", scratch.image().display());
    let offline = listed(&["--device", &device, "--extents", "/file"])?;
    ensure!(offline == table, "the image says otherwise than the mount did");
    let refused = pollux(&["dump", "--device", &device, "--extents", "/nothing"])?;
    ensure!(text(&refused).contains("\"/nothing\" does not exist"), "{}", text(&refused));
    Ok(())
}
