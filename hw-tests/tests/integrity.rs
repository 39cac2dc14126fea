//! Wrong bits on the device under a mounted volume: an error for who reads them, found by a scrub, never wrong data.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use hw_tests::{Daemon, Random, Scratch, pollux, run, text};

const SIZE: usize = 3 << 20;

#[test]
fn scrub_finds_a_wrong_bit_and_names_its_file() -> Result<()> {
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "256MiB"])?;
    let mount = scratch.mount().display().to_string();
    let contents = Random(11).bytes(SIZE);
    let file = scratch.mount().join("file");
    fs::write(&file, &contents)?;
    fs::write(scratch.mount().join("other"), Random(12).bytes(SIZE))?;
    run(Command::new("sync").arg(&file))?;
    ensure!(pollux(&["sync", &mount])?.status.success(), "pollux sync");

    let sound = pollux(&["scrub", &mount])?;
    ensure!(sound.status.code() == Some(0), "{}", text(&sound));
    ensure!(text(&sound).contains("MiB verified"), "{}", text(&sound));

    // The contents lie somewhere in the image, block by block.
    let image = fs::read(scratch.image())?;
    let wanted = &contents[SIZE / 2..SIZE / 2 + 4096];
    let at =
        image.chunks_exact(4096).position(|block| block == wanted).context("the block is in the image")?;
    let place = at as u64 * 4096 + 1234;
    let device = fs::OpenOptions::new().write(true).open(scratch.image())?;
    device.write_all_at(&[image[place as usize] ^ 4], place)?;

    let found = pollux(&["scrub", "--json", &mount])?;
    ensure!(found.status.code() == Some(3), "{}: {}", found.status, text(&found));
    let report: serde_json::Value = serde_json::from_slice(&found.stdout)?;
    let damage = report["damage"].as_array().context("a list")?;
    let inode = std::os::unix::fs::MetadataExt::ino(&fs::metadata(&file)?);
    let one = damage[0].as_str().unwrap_or_default();
    ensure!(damage.len() == 1, "{report}");
    ensure!(one.contains(&format!("data block {at}: ")) && one.contains(&format!("inode {inode},")), "{one}");
    daemon.stop()?;

    // Mounted again, nothing of it is in memory.
    let daemon = Daemon::up(&scratch, &[])?;
    let error = fs::read(&file).expect_err("a damaged block is an error");
    ensure!(error.raw_os_error() == Some(5), "{error}");
    ensure!(fs::read(scratch.mount().join("other"))?.len() == SIZE, "other files are untouched");
    ensure!(daemon.log().contains("does not match its checksum"), "{}", daemon.log());
    daemon.stop()
}

#[test]
fn scrub_without_a_daemon_says_where_it_looked() -> Result<()> {
    let refused = pollux(&["scrub", "/"])?;
    ensure!(refused.status.code() == Some(1) && text(&refused).contains('/'), "{}", text(&refused));
    Ok(())
}
