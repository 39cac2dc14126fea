//! Direct I/O on a mount: beside buffered I/O and mappings of the same file, and many requests at once.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::Command;

use anyhow::{Result, ensure};
use hw_tests::{Daemon, Random, Scratch, fsck_clean, need, read_file, run};

const BLOCK: usize = 4096;

/// What direct I/O may be aligned to at least.
const SECTOR: usize = 512;

/// Bytes of the file.
const LENGTH: usize = 4 << 20;

/// Bytes of one request at most.
const MOST: usize = 300 * SECTOR;

const ROUNDS: u32 = 2_000;

#[test]
fn direct_and_buffered_io_of_a_file_see_each_other() -> Result<()> {
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "1GiB"])?;
    let path = scratch.mount().join("file");
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    let buffered = options.open(&path)?;
    let direct = options.custom_flags(libc::O_DIRECT).open(&path)?;
    // Direct I/O wants memory that is aligned like its blocks.
    let mut memory = vec![0; MOST + BLOCK];
    let start = memory.as_ptr().align_offset(BLOCK);
    let buffer = &mut memory[start..start + MOST];
    let mut random = Random(7);
    let mut model = random.bytes(LENGTH);
    direct.set_len(LENGTH as u64)?;
    buffered.write_all_at(&model, 0)?;
    for round in 0..ROUNDS {
        // Every other request is of whole blocks.
        let unit = if random.below(2) == 0 { BLOCK } else { SECTOR };
        let length = unit * (1 + random.below((MOST / unit) as u64) as usize);
        let at = unit * random.below(((LENGTH - length) / unit) as u64 + 1) as usize;
        let (place, buffer) = (at..at + length, &mut buffer[..length]);
        match random.below(4) {
            0 => {
                model[place.clone()].copy_from_slice(&random.bytes(length));
                buffer.copy_from_slice(&model[place]);
                direct.write_all_at(buffer, at as u64)?;
            }
            1 => {
                model[place.clone()].copy_from_slice(&random.bytes(length));
                buffered.write_all_at(&model[place], at as u64)?;
            }
            2 => {
                direct.read_exact_at(buffer, at as u64)?;
                ensure!(buffer == &model[place], "round {round}: direct read of {length} bytes at {at}");
            }
            _ => {
                buffered.read_exact_at(buffer, at as u64)?;
                ensure!(buffer == &model[place], "round {round}: buffered read of {length} bytes at {at}");
            }
        }
        if random.below(100) == 0 {
            buffered.sync_data()?;
        }
    }
    drop((buffered, direct));
    ensure!(read_file(&path)? == model, "before the unmount");
    daemon.stop()?;
    fsck_clean(&scratch)?;
    let daemon = Daemon::up(&scratch, &[])?;
    ensure!(read_file(&path)? == model, "after a remount");
    daemon.stop()
}

#[test]
fn fio_verifies_direct_writes_at_depth() -> Result<()> {
    need("fio", "fio")?;
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "2GiB"])?;
    run(Command::new("fio").args([
        "--name=direct",
        &format!("--directory={}", scratch.mount().display()),
        "--rw=randwrite",
        "--bsrange=4k-64k",
        "--size=128m",
        "--numjobs=2",
        "--direct=1",
        "--ioengine=libaio",
        "--iodepth=16",
        "--verify=crc32c",
        "--verify_state_save=0",
        "--group_reporting",
    ]))?;
    daemon.stop()?;
    fsck_clean(&scratch)
}
