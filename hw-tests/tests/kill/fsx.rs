//! fsx as a load: writes, cuts, holes and clones in one file, with a sync after every few.
//!
//! Owns: its command line, and the check. fsx says what it is about to do, so a sync has succeeded once it says what comes next. What it does
//! follows from the seed: run again elsewhere, for so many steps, it leaves the file as it was after them.
//!
//! *Legal crash outcomes*: the size after a step from the last successful sync on, or the end of a block between two of these, since a write
//! need not be there as a whole; and in each block what that block was after one of these steps.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use hw_tests::kill::BLOCK;
use hw_tests::{read_file, run, tool};

/// Its name in the round's directory.
const FILE: &str = "file";

fn program(folder: &Path, file: &Path, seed: u64) -> Result<Command> {
    let mut command = Command::new(tool("fsx", "0.3.2")?);
    command.arg("-f").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kill/fsx.toml"));
    command.args(["-S", &seed.to_string(), "-P"]).arg(folder).arg(file);
    Ok(command)
}

/// fsx in its current directory. What it says goes where the caller sends its outputs.
pub(crate) fn command(folder: &Path, seed: u64) -> Result<Command> {
    fs::create_dir(folder)?;
    let mut command = program(folder, Path::new(FILE), seed)?;
    command.arg("-vv");
    Ok(command)
}

pub(crate) fn has_begun(root: &Path) -> bool {
    root.join(FILE).exists()
}

/// The last step that was begun, and the last sync that has succeeded.
struct Progress {
    begun: u64,
    synced: Option<u64>,
}

impl Progress {
    fn of(said: &str) -> Self {
        let (mut progress, mut syncing) = (Self { begun: 0, synced: None }, None);
        for line in said.lines() {
            let mut words = line.split("] ").nth(1).unwrap_or_default().split_whitespace();
            let Some(step) = words.next().and_then(|word| word.parse().ok()) else { continue };
            progress.synced = syncing.or(progress.synced);
            progress.begun = step;
            syncing = matches!(words.next(), Some("fsync" | "fdatasync")).then_some(step);
        }
        progress
    }
}

/// Checks the file against what it was from the last sync on; returns 1 if there was one.
pub(crate) fn check(root: &Path, said: &Path, seed: u64) -> Result<u64> {
    let progress = Progress::of(&String::from_utf8_lossy(&read_file(said)?));
    let Some(synced) = progress.synced else { return Ok(0) };
    let found = read_file(&root.join(FILE))?;
    let states = (synced..=progress.begun).map(|step| after(step, seed)).collect::<Result<Vec<_>>>()?;
    let range = || format!("steps {synced} (synced) to {} (begun last) of fsx, seed {seed}", progress.begun);
    let sizes: Vec<usize> = states.iter().map(Vec::len).collect();
    ensure!(
        is_legal(found.len(), &sizes),
        "the file has {} bytes, after {} it has {sizes:?}",
        found.len(),
        range()
    );
    for (index, block) in found.chunks(BLOCK).enumerate() {
        let start = index * BLOCK;
        // What a state does not reach is zeroes in it.
        let fits = |state: &Vec<u8>| {
            (0..block.len()).all(|byte| block[byte] == state.get(start + byte).copied().unwrap_or(0))
        };
        ensure!(states.iter().any(fits), "block {index} of the file is as after none of {}", range());
    }
    Ok(1)
}

/// Whether a file that had `sizes` one after the other may have this one after a crash.
fn is_legal(size: usize, sizes: &[usize]) -> bool {
    let (least, most) = (sizes.iter().min().copied().unwrap_or(0), sizes.iter().max().copied().unwrap_or(0));
    sizes.contains(&size) || size.is_multiple_of(BLOCK) && (least..=most).contains(&size)
}

/// The file after so many steps.
fn after(steps: u64, seed: u64) -> Result<Vec<u8>> {
    // In memory, where syncs cost nothing, if there is such a place.
    let memory = PathBuf::from("/dev/shm");
    let parent = if memory.is_dir() { memory } else { std::env::temp_dir() };
    let folder = tempfile::Builder::new().prefix("pollux-fsx-").tempdir_in(parent)?;
    let file = folder.path().join(FILE);
    run(program(folder.path(), &file, seed)?.args(["-N", &steps.to_string()]).stderr(Stdio::null()))
        .with_context(|| format!("{steps} steps of fsx, seed {seed}"))?;
    read_file(&file)
}

#[test]
fn sync_counts_once_the_next_step_is_begun() {
    let said = "[DEBUG fsx] Using seed 5\n[INFO  fsx]  9 fsync\n[INFO  fsx] 10 write 0x1\n[INFO  fsx] 11 fdatasync\n";
    for (said, synced, begun) in [(said, Some(9), 11), ("[INFO  fsx] 1 fsync\n", None, 1), ("", None, 0)] {
        let progress = Progress::of(said);
        assert_eq!((progress.synced, progress.begun), (synced, begun), "{said}");
    }
}

#[test]
fn size_is_one_that_there_was_or_the_end_of_a_block_between_two() {
    let sizes = [5_000, 20_000, 6_000];
    let legal = [5_000, 20_000, 6_000, 8_192, 16_384];
    let illegal = [0, 4_096, 5_001, 8_193, 20_480];
    assert!(
        legal.iter().all(|size| is_legal(*size, &sizes))
            && !illegal.iter().any(|size| is_legal(*size, &sizes))
    );
}
