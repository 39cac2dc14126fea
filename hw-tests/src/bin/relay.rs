//! Two programs and one file: one writes a number and signals, the other reads at once on another core.
//!
//! `relay FILE ROUNDS` writes; it starts itself as `relay --reader FILE`, pinned to another core where there is one.
//! A pipe carries the signal and the answer. Exit 0: no read was stale.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.as_slice() {
        [flag, file] if flag == "--reader" => read(file),
        [file, rounds] => write(file, rounds.parse().context("ROUNDS is a number")?),
        _ => bail!("usage: relay FILE ROUNDS"),
    }
}

fn pin(core: usize) {
    let mut set = CpuSet::new();
    // On a machine of one core both programs share it, which is no less a test.
    let _unpinned = set.set(core).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
}

fn write(path: &str, rounds: u64) -> Result<()> {
    pin(0);
    let file = OpenOptions::new().create(true).write(true).truncate(false).open(path)?;
    let own = std::env::current_exe()?;
    let mut reader =
        Command::new(own).args(["--reader", path]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut signal = reader.stdin.take().context("a pipe to the reader")?;
    let mut answer = reader.stdout.take().context("a pipe from the reader")?;
    for round in 1..=rounds {
        // The place wanders over block borders, so that the number is sometimes in two blocks.
        let offset = (round * 1021) % 65_536;
        file.write_all_at(&round.to_le_bytes(), offset)?;
        signal.write_all(&offset.to_le_bytes())?;
        let mut seen = [0; 8];
        answer.read_exact(&mut seen)?;
        let seen = u64::from_le_bytes(seen);
        ensure!(seen == round, "stale read in round {round}: saw {seen} at offset {offset}");
    }
    drop(signal);
    ensure!(reader.wait()?.success(), "the reader failed");
    println!("{rounds} rounds, none stale");
    Ok(())
}

fn read(path: &str) -> Result<()> {
    pin(1);
    let file = File::open(path)?;
    let (mut signal, mut answer) = (std::io::stdin().lock(), std::io::stdout().lock());
    let mut offset = [0; 8];
    while signal.read_exact(&mut offset).is_ok() {
        let mut seen = [0; 8];
        file.read_exact_at(&mut seen, u64::from_le_bytes(offset))?;
        answer.write_all(&seen)?;
        answer.flush()?;
    }
    Ok(())
}
