//! The machine loses its power while programs write and synchronise.
//!
//! Owns: the workload, its acknowledgements, and what the drives of the second boot hold. QEMU writes a log of what it did to
//! the drive, in order, so one killed machine gives several drives: besides the one that it left behind, those of a drive
//! with a volatile cache, whose power went at some point of the log and which kept nothing, or any part, of what was not yet
//! flushed.
//!
//! Invariant: an acknowledgement counts for a drive if the guest had sent it when the log was no longer than what the drive was made
//! of.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{DRIVE, MIB, MOUNT, drives, image};
use crate::Random;
use crate::guest::machine::{Guest, GuestOptions, boot, missing};
use crate::guest::write_log::{Entry, WriteLog};
use crate::suite::{Environment, Verdict};

/// Bytes of the drive.
const DRIVE_BYTES: u64 = 256 * MIB;

/// Acknowledgements after which the power goes.
const ACKNOWLEDGED: usize = 40;

/// How long the workload may take until then.
const WORK_LIMIT: Duration = Duration::from_secs(120);

/// Drives with a cache, beside the one that was left behind.
const CACHED_DRIVES: usize = 5;

/// Seed of what the caches kept.
const SEED: u64 = 7;

/// What is made of the log.
struct Crashed {
    image: PathBuf,
    /// Files that must be there: those numbered below.
    acknowledged: usize,
    what: String,
}

/// The length of the log when an acknowledgement was there.
type Acknowledgement = usize;

/// Runs the workload, kills the machine, and looks at what is left.
pub(super) fn survives(environment: &Environment) -> Result<Verdict> {
    if let Some(reason) = missing(environment) {
        return Ok(Verdict::Skipped(reason));
    }
    let directory = drives(environment)?;
    let (left_behind, acknowledgements) = work_and_die(environment, directory.path())?;
    let log = fs::read(directory.path().join("log")).context("reading the log of writes")?;
    let mut crashed = vec![Crashed {
        image: left_behind,
        acknowledged: acknowledgements.len(),
        what: "the drive as it was left".into(),
    }];
    let mut random = Random(SEED);
    for index in 0..CACHED_DRIVES {
        crashed.push(with_cache(directory.path(), &log, &acknowledgements, index, &mut random)?);
    }
    check(environment, &crashed)?;
    Ok(Verdict::Passed)
}

/// Contents of file `$1`, also when it is checked.
const CONTENTS: &str = "contents() { echo \"file $1\"; head -c $(($1 * 977 % 20000)) /bin/busybox; }\n";

fn work_and_die(environment: &Environment, directory: &Path) -> Result<(PathBuf, Vec<Acknowledgement>)> {
    let drive = image(directory, "drive", DRIVE_BYTES)?;
    let log = directory.join("log");
    File::create(&log)?;
    let node = json!({
        "driver": "blklogwrites", "node-name": "logged", "log-sector-size": 512,
        "file": { "driver": "raw", "file": { "driver": "file", "filename": drive } },
        "log": { "driver": "file", "filename": log },
    });
    let options = GuestOptions::new("before the power cut")
        .with("-blockdev", node.to_string())
        .with("-device", "pcie-root-port,id=slot0,slot=1,chassis=1")
        .with("-device", "nvme,serial=power,drive=logged,bus=slot0");
    let mut guest = boot(environment, &options)?;
    guest.bind(DRIVE)?;
    let device = format!("pci:{DRIVE}");
    guest.ok(&format!("pollux mkfs --device {device}"))?;
    guest.mount(&device)?;
    guest.ok(&format!(
        "{CONTENTS} mkdir {MOUNT}/d0 {MOUNT}/d1 {MOUNT}/d2 && pollux sync {MOUNT} || exit 1\n\
         {{ while :; do cp -r /bin/busybox /modules {MOUNT}/d1/ ; rm -r {MOUNT}/d1/modules; done; }} >/dev/null 2>&1 &\n\
         {{ n=0; while :; do contents $n >/tmp/file; dd if=/tmp/file of={MOUNT}/d$((n % 3))/f$n bs=32k conv=fsync || break; \
         echo acknowledged $n; n=$((n + 1)); done; }} >/dev/events 2>/dev/null &"
    ))?;
    let mut acknowledgements = Vec::new();
    let start = Instant::now();
    while acknowledgements.len() < ACKNOWLEDGED {
        let told = guest.events().lines().len();
        // Looked at after the acknowledgement: what it stands for is in the log.
        let length = usize::try_from(fs::metadata(&log)?.len())?;
        acknowledgements.resize(told.max(acknowledgements.len()), length);
        ensure!(
            start.elapsed() < WORK_LIMIT,
            "{} acknowledgements after {WORK_LIMIT:?}\n{}",
            acknowledgements.len(),
            guest.console()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    guest.kill();
    Ok((drive, acknowledgements))
}

/// A drive with a volatile cache whose power went.
fn with_cache(
    directory: &Path,
    log: &[u8],
    acknowledgements: &[Acknowledgement],
    index: usize,
    random: &mut Random,
) -> Result<Crashed> {
    // The first two as late as is known and with the cache lost or half lost, the others wherever they may be.
    let last = *acknowledgements.last().context("an acknowledgement")?;
    let first = acknowledgements[acknowledgements.len() / 4];
    let cut =
        if index < 2 { last } else { first + usize::try_from(random.below((last - first + 1) as u64))? };
    let entries = WriteLog::new(log.get(..cut).unwrap_or(log))?.entries();
    let flushed = entries.iter().rposition(Entry::is_flush).unwrap_or(0);
    let path = image(directory, &format!("crashed{index}"), DRIVE_BYTES)?;
    let file = File::options().write(true).open(&path)?;
    let (mut kept, mut lost) = (0, 0);
    for (position, entry) in entries.iter().enumerate() {
        let durable = position < flushed || bypasses_cache(entry);
        let survives = durable || (index > 0 && random.below(2) == 0);
        match (durable, survives) {
            (true, _) => {}
            (false, true) => kept += 1,
            (false, false) => lost += 1,
        }
        if survives {
            entry.apply(&file)?;
        }
    }
    let acknowledged = acknowledgements.iter().filter(|length| **length <= cut).count();
    let what =
        format!("a cut after {} writes, of those not flushed {kept} kept and {lost} lost", entries.len());
    Ok(Crashed { image: path, acknowledged, what })
}

/// Superblocks (rings A and B of docs/on-disk-format.md) and entries of the intent log are written past the cache, which QEMU's log
/// does not show.
fn bypasses_cache(entry: &Entry<'_>) -> bool {
    const BLOCK: u64 = 4096;
    entry.starts_with(b"PLXINTNT")
        || [16..24, 4160..4168].iter().any(|ring: &std::ops::Range<u64>| {
            entry.offset() >= ring.start * BLOCK && entry.offset() + entry.length() <= ring.end * BLOCK
        })
}

/// Boots with all drives, looks for everything that was acknowledged, and goes on writing.
fn check(environment: &Environment, crashed: &[Crashed]) -> Result<()> {
    let mut options = GuestOptions::new("after the power cut");
    for (index, crashed) in crashed.iter().enumerate() {
        let node = format!("drive{index}");
        let slot = index + 16;
        options = options
            .drive(&node, &crashed.image)
            .with("-device", format!("nvme,serial=power{index},drive={node},addr={slot:x}.0"));
    }
    let mut guest = boot(environment, &options)?;
    for (index, crashed) in crashed.iter().enumerate() {
        let address = format!("0000:00:{:02x}.0", index + 16);
        let outcome = examine(&mut guest, &address, crashed.acknowledged);
        outcome.with_context(|| format!("{}, {} files acknowledged", crashed.what, crashed.acknowledged))?;
    }
    Ok(())
}

fn examine(guest: &mut Guest, address: &str, acknowledged: usize) -> Result<()> {
    guest.bind(address)?;
    let device = format!("pci:{address}");
    guest.ok(&format!("pollux fsck --device {device}"))?;
    guest.mount(&device)?;
    guest.ok(&format!(
        "{CONTENTS} n=0; while [ $n -lt {acknowledged} ]; do \
         contents $n | cmp - {MOUNT}/d$((n % 3))/f$n || exit 1; n=$((n + 1)); done"
    ))?;
    guest.ok(&format!(
        "cp -r /modules {MOUNT}/after && pollux sync {MOUNT} && diff -r /modules {MOUNT}/after"
    ))?;
    guest.unmount()?;
    guest.ok(&format!("pollux fsck --device {device}"))?;
    Ok(())
}
