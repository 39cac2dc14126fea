//! `pollux relocate` on a mount, beside programs that write, read and clone.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, ensure};
use hw_tests::{Daemon, Random, Scratch, fsck_clean, pollux, read_file, run, text};

/// Files that lie still, each with a clone beside it.
const STILL: u64 = 6;

/// Bytes of each.
const LENGTH: usize = 8 << 20;

/// What writes, clones, reads again and deletes, until it is told to stop. Returns how often.
fn busy(folder: &Path, stop: &AtomicBool) -> Result<u64> {
    let mut random = Random(11);
    let (file, copy) = (folder.join("busy"), folder.join("copy"));
    let mut rounds = 0;
    while !stop.load(Ordering::Relaxed) {
        let length = 1 + random.below(3 << 20) as usize;
        let contents = random.bytes(length);
        fs::write(&file, &contents)?;
        if rounds % 3 == 0 {
            fs::File::open(&file)?.sync_all()?;
        }
        run(Command::new("cp").arg(&file).arg(&copy))?;
        ensure!(read_file(&copy)? == contents, "round {rounds}: the copy differs");
        fs::remove_file(&file)?;
        ensure!(read_file(&copy)? == contents, "round {rounds}: the copy differs without its source");
        rounds += 1;
    }
    Ok(rounds)
}

fn relocate(mount: &Path, arguments: &[&str]) -> Result<(Option<i32>, String)> {
    let mut all = vec!["relocate".as_ref(), mount.as_os_str()];
    all.extend(arguments.iter().map(|argument| argument.as_ref() as &std::ffi::OsStr));
    let output = pollux(&all)?;
    Ok((output.status.code(), text(&output)))
}

#[test]
fn relocation_beside_programs_loses_nothing() -> Result<()> {
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "1GiB"])?;
    let mount = scratch.mount();
    let mut random = Random(10);
    let mut still = Vec::new();
    for number in 0..STILL {
        let contents = random.bytes(LENGTH);
        let (file, folder) = (mount.join(format!("file{number}")), mount.join(format!("folder{number}")));
        fs::write(&file, &contents)?;
        fs::create_dir(&folder)?;
        // Directories are of several shards: some of these clones are of another than their source.
        run(Command::new("cp").arg(&file).arg(folder.join("clone")))?;
        still.extend([(file, contents.clone()), (folder.join("clone"), contents)]);
    }
    let stop = AtomicBool::new(false);
    let rounds = std::thread::scope(|scope| -> Result<u64> {
        let working = scope.spawn(|| busy(&mount, &stop));
        for _ in 0..4 {
            let (code, said) = relocate(&mount, &["--all"])?;
            // What is written while it is moved may stay.
            ensure!(matches!(code, Some(0 | 1)) && said.contains("groups emptied"), "{code:?}: {said}");
        }
        stop.store(true, Ordering::Relaxed);
        working.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    ensure!(rounds > 3, "only {rounds} rounds beside four relocations");
    for (file, contents) in &still {
        ensure!(read_file(file)? == *contents, "{} differs", file.display());
    }
    // Without clones between shards nothing is lent, and everything has another place, the intent log, too.
    for number in 0..STILL {
        fs::remove_dir_all(mount.join(format!("folder{number}")))?;
    }
    still.retain(|(file, _)| file.exists());
    ensure!(still.len() as u64 == STILL, "{} files are left", still.len());
    ensure!(pollux(&["sync".as_ref(), mount.as_os_str()])?.status.success(), "sync");
    // Deletions go on in the background, and hold what they delete.
    let mut tries = 0;
    loop {
        let (code, said) = relocate(&mount, &["--all"])?;
        if code == Some(0) {
            ensure!(!said.contains("left:"), "{said}");
            break;
        }
        tries += 1;
        ensure!(tries < 20 && !said.contains("intent log"), "{code:?}: {said}");
    }
    let (code, said) = relocate(&mount, &["--group", "100000"])?;
    ensure!(code == Some(1) && said.contains("there is no group 100000"), "{code:?}: {said}");
    daemon.stop()?;
    fsck_clean(&scratch)?;
    let daemon = Daemon::up(&scratch, &[])?;
    for (file, contents) in &still {
        ensure!(read_file(file)? == *contents, "{} differs after a remount", file.display());
    }
    daemon.stop()
}
