//! fio as a load: random writes with checksums, fsync after every few.
//!
//! Owns: its command line, and the check of its files by the logs that it leaves when it ends.
//!
//! A job writes one block after the other, and syncs after each [`SYNCED`] of them before it goes on. So a write in its log says that the
//! sync before it has succeeded, and everything before that is durable.
//!
//! *Legal crash outcomes*: a durable block is what fio wrote, by both of its checksums, at its place; any other is that, or zeroes.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use hw_tests::kill::BLOCK;
use hw_tests::read_file;

const JOBS: usize = 3;

/// Writes between two syncs.
const SYNCED: usize = 4;

/// Bytes of a job's file. It is not written twice in a round.
const SIZE: usize = 32 << 20;

/// First word of a block that fio can verify.
const MAGIC: u16 = 0xacca;

/// Bytes of fio's header before its own checksum, with it, and with that of the data.
const HEADER: [usize; 3] = [36, 40, 44];

/// fio in its current directory; its logs go to a directory of their own.
pub(crate) fn command(logs: &Path, seed: u64) -> Result<Command> {
    fs::create_dir(logs)?;
    let mut command = Command::new("fio");
    for job in 0..JOBS {
        // Jobs of one name would number files and logs differently.
        command.args([
            format!("--name=job{job}"),
            format!("--filename=job{job}"),
            "--per_job_logs=0".to_owned(),
        ]);
        command.args([format!("--write_lat_log={}", logs.join(format!("job{job}")).display())]);
        command.args([
            "--directory=.",
            "--thread",
            "--rw=randwrite",
            "--bs=4k",
            "--ioengine=psync",
            "--log_offset=1",
        ]);
        command.args(["--verify=crc32c", "--do_verify=0", "--verify_state_save=0"]);
        command.args([format!("--fsync={SYNCED}"), format!("--size={SIZE}"), format!("--randseed={seed}")]);
    }
    Ok(command)
}

pub(crate) fn has_begun(root: &Path) -> bool {
    fs::read_dir(root).is_ok_and(|entries| entries.count() == JOBS)
}

/// Checks each job's file; returns how many writes were durable.
pub(crate) fn check(root: &Path, logs: &Path) -> Result<u64> {
    let mut durable = 0;
    for job in 0..JOBS {
        let log = logs.join(format!("job{job}_clat.log"));
        // Killed before it had written anything.
        let Ok(log) = fs::read_to_string(&log) else { continue };
        let written: Vec<usize> = log.lines().map(offset).collect::<Result<_>>()?;
        let acknowledged = &written[..written.len().saturating_sub(1) / SYNCED * SYNCED];
        let path = root.join(format!("job{job}"));
        if !acknowledged.is_empty() || path.exists() {
            check_file(&path, acknowledged)?;
        }
        durable += acknowledged.len() as u64;
    }
    Ok(durable)
}

/// The place in the file of a line of the log: milliseconds, latency, direction, size, offset, priority.
fn offset(line: &str) -> Result<usize> {
    let offset = line.split(", ").nth(4).and_then(|word| word.parse().ok());
    offset.with_context(|| format!("`{line}` in fio's log"))
}

fn check_file(path: &Path, acknowledged: &[usize]) -> Result<()> {
    let bytes = read_file(path)?;
    let mut whole = vec![false; SIZE / BLOCK];
    for (index, block) in bytes.chunks(BLOCK).enumerate() {
        if block.iter().all(|byte| *byte == 0) {
            continue;
        }
        ensure!(
            is_whole(block, index * BLOCK),
            "block {index} of {} is torn or foreign: it begins with {:02x?}",
            path.display(),
            &block[..block.len().min(HEADER[2])]
        );
        whole[index] = true;
    }
    for (number, offset) in acknowledged.iter().enumerate() {
        let block = offset / BLOCK;
        ensure!(
            whole.get(block) == Some(&true),
            "write {number} of {} in {}, to block {block}, was synced and is lost",
            acknowledged.len(),
            path.display()
        );
    }
    Ok(())
}

/// Whether fio wrote these bytes, to this place.
fn is_whole(block: &[u8], place: usize) -> bool {
    let number =
        |at: usize| block.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes);
    let [own, head, data] = HEADER;
    // fio's checksum is the usual one, not inverted in the end.
    let sum = |bytes: &[u8]| Some(!crc32c::crc32c(bytes));
    block.len() == BLOCK
        && block.starts_with(&MAGIC.to_le_bytes())
        && block[16..24] == (place as u64).to_le_bytes()
        && number(own) == sum(&block[..own])
        && number(head) == sum(&block[data..])
}
