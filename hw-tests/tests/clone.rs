//! Clones on a mount: plain `cp`, `pollux clone`, and what they leave.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use hw_tests::{Daemon, Random, Scratch, fsck_clean, pollux, read_file, run, text};

const SIZE: usize = 64 << 20;

/// Blocks of 4 KiB that the volume has in use.
fn used(mount: &Path) -> Result<u64> {
    let stat = nix::sys::statvfs::statvfs(mount)?;
    Ok(stat.blocks() - stat.blocks_free())
}

fn cp(from: &Path, to: &Path) -> Result<()> {
    run(Command::new("cp").arg(from).arg(to)).map(|_| ())
}

#[test]
fn cp_clones_and_each_side_goes_its_own_way() -> Result<()> {
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "1GiB"])?;
    let (source, copy) = (scratch.mount().join("source"), scratch.mount().join("copy"));
    let contents = Random(7).bytes(SIZE - 1234);
    fs::write(&source, &contents)?;
    run(Command::new("sync").arg(&source))?;
    let before = used(&scratch.mount())?;
    cp(&source, &copy)?;
    let after = used(&scratch.mount())?;
    ensure!(after - before < 1000, "a copy of {SIZE} bytes took {} blocks", after - before);
    ensure!(read_file(&copy)? == contents, "the copy differs");

    let mut changed = contents.clone();
    changed[1_000_000..1_000_100].fill(0);
    let file = fs::OpenOptions::new().write(true).open(&copy)?;
    std::os::unix::fs::FileExt::write_all_at(&file, &[0; 100], 1_000_000)?;
    drop(file);
    ensure!(read_file(&source)? == contents, "a write to the copy is seen in the source");
    fs::remove_file(&source)?;
    ensure!(read_file(&copy)? == changed, "the copy has lost something with its source");
    daemon.stop()?;
    fsck_clean(&scratch)?;
    let daemon = Daemon::up(&scratch, &[])?;
    ensure!(read_file(&copy)? == changed, "the copy is not what it was before the remount");
    daemon.stop()
}

#[test]
fn pollux_clone_tells_what_it_shares_and_refuses_what_it_cannot() -> Result<()> {
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "1GiB"])?;
    let path = |name: &str| scratch.mount().join(name).display().to_string();
    let (source, target) = (path("source"), path("target"));
    let contents = Random(8).bytes(1 << 20);
    fs::write(&source, &contents)?;
    fs::write(&target, vec![1; 3 << 20])?;

    let whole = pollux(&["clone", &source, &target])?;
    ensure!(whole.status.success(), "{}", text(&whole));
    let said = String::from_utf8(whole.stdout)?;
    ensure!(said.contains("1.00 MiB") && said.contains("extents shared"), "{said}");
    let shared = said.split("; ").nth(1).and_then(|rest| rest.split(' ').next()).context(said.clone())?;
    ensure!(shared.parse::<u64>()? > 0, "{said}");
    ensure!(read_file(Path::new(&target))? == contents, "DST becomes SRC, its size too");

    let options = ["--src-offset", "64KiB", "--dst-offset", "512KiB", "--length", "128KiB"];
    let range = pollux(&[&["clone", &source, &target][..], &options].concat())?;
    ensure!(range.status.success(), "{}", text(&range));
    let mut expected = contents.clone();
    expected.copy_within(64 << 10..192 << 10, 512 << 10);
    ensure!(read_file(Path::new(&target))? == expected, "a range was cloned elsewhere");

    let outside = scratch.path().join("outside").display().to_string();
    for (arguments, words) in [
        (vec!["clone", &source, &outside], "different file systems"),
        (vec!["clone", "/proc/self/status", "/proc/self/x"], "not on a Pollux volume"),
        (vec!["clone", &source, &source], "Invalid argument"),
    ] {
        let refused = pollux(&arguments)?;
        let said = text(&refused);
        ensure!(refused.status.code() == Some(1) && said.contains(words), "{arguments:?}: {said}");
    }
    ensure!(!Path::new(&outside).exists(), "a refused clone leaves no file behind");
    daemon.stop()?;
    fsck_clean(&scratch)
}

#[test]
fn cp_of_four_gibibytes_takes_next_to_no_space() -> Result<()> {
    const PIECES: u64 = 64;
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "8GiB"])?;
    let [piece, big, copy] = ["piece", "big", "copy"].map(|name| scratch.mount().join(name));
    let contents = Random(9).bytes(SIZE);
    fs::write(&piece, &contents)?;
    // As many extents as if it had been written in one go, without the time that takes.
    let (from, to) = (fs::File::open(&piece)?, fs::File::create(&big)?);
    for number in 0..PIECES {
        let (mut source, mut target, mut left) = (0, i64::try_from(number * SIZE as u64)?, SIZE);
        while left > 0 {
            let copied = nix::fcntl::copy_file_range(&from, Some(&mut source), &to, Some(&mut target), left)?;
            ensure!(copied > 0, "copy_file_range ended {left} bytes early");
            left -= copied;
        }
    }
    to.sync_all()?;
    let before = used(&scratch.mount())?;
    let began = std::time::Instant::now();
    cp(&big, &copy)?;
    println!("cp of {} MiB took {:?}", (PIECES * SIZE as u64) >> 20, began.elapsed());
    let after = used(&scratch.mount())?;
    // Tree nodes: some hundred bytes for each of 4,096 extents, and what is written anew of the path to them.
    ensure!(after - before < 2000, "a copy of 4 GiB took {} blocks", after - before);
    let copied = fs::File::open(&copy)?;
    ensure!(
        copied.metadata()?.len() == PIECES * SIZE as u64,
        "the copy is {} bytes",
        copied.metadata()?.len()
    );
    let mut found = vec![0; SIZE];
    for number in [0, PIECES / 2, PIECES - 1] {
        std::os::unix::fs::FileExt::read_exact_at(&copied, &mut found, number * SIZE as u64)?;
        ensure!(found == contents, "piece {number} of the copy differs");
    }
    drop((from, to, copied));
    daemon.stop()?;
    fsck_clean(&scratch)
}

#[test]
fn pollux_dedupe_shares_what_is_the_same_and_nothing_else() -> Result<()> {
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "1GiB"])?;
    let folder = scratch.mount().join("folder");
    fs::create_dir(&folder)?;
    let mut random = Random(12);
    let base = random.bytes((8 << 20) + 777);
    // The same; the same with a changed block and a head before it; half of it twice; nothing of it; zeroes.
    let mut moved = random.bytes(64 << 10);
    moved.extend(&base);
    moved[5 << 20] ^= 1;
    let twice = [&base[..1 << 20], &base[..1 << 20]].concat();
    let files = [
        ("base", base.clone()),
        ("folder/same", base.clone()),
        ("folder/moved", moved),
        ("folder/twice", twice),
        ("folder/other", random.bytes(1 << 20)),
        ("folder/zeroes", vec![0; 1 << 20]),
    ];
    for (name, contents) in &files {
        fs::write(scratch.mount().join(name), contents)?;
    }
    let mount = scratch.mount().display().to_string();
    run(Command::new("sync").arg(scratch.mount().join("base")))?;
    let synced = || -> Result<()> {
        let output = pollux(&["sync", &mount])?;
        ensure!(output.status.success(), "{}", text(&output));
        Ok(())
    };
    synced()?;
    let before = used(&scratch.mount())?;
    let told = |arguments: &[&str]| -> Result<serde_json::Value> {
        let output = pollux(&[&["dedupe", "--json", &mount][..], arguments].concat())?;
        ensure!(output.status.success(), "{}", text(&output));
        Ok(serde_json::from_slice(&output.stdout)?)
    };
    let dry = told(&["--dry-run"])?;
    ensure!(
        dry["shared_bytes"] == 0 && used(&scratch.mount())? == before,
        "a dry run changes something: {dry}"
    );
    let done = told(&[])?;
    // All but a block of `moved`, all of `same` and of `twice`.
    let same = (2 * base.len() + (2 << 20) - 4096) as u64;
    ensure!(dry["same_bytes"] == same && done["same_bytes"] == same, "{done} instead of {same} bytes");
    ensure!(done["shared_bytes"] == same && done["files"] == 6, "{done}");
    for (name, contents) in &files {
        ensure!(read_file(&scratch.mount().join(name))? == *contents, "{name} holds something else");
    }
    synced()?;
    let gained = before.saturating_sub(used(&scratch.mount())?);
    ensure!(gained * 4096 > same * 9 / 10, "{gained} blocks were gained of {same} bytes");
    // Another file system, and a file that is none of the volume's.
    let outside = pollux(&["dedupe", &mount, "/proc/self/status"])?;
    ensure!(
        outside.status.code() == Some(1) && text(&outside).contains("another file system"),
        "{}",
        text(&outside)
    );
    daemon.stop()?;
    fsck_clean(&scratch)?;
    let daemon = Daemon::up(&scratch, &[])?;
    for (name, contents) in &files {
        ensure!(read_file(&scratch.mount().join(name))? == *contents, "{name} differs after a remount");
    }
    daemon.stop()
}
