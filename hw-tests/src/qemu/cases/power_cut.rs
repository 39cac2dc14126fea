//! Every state that a power cut may leave of a disk, made from QEMU's record of what was written to it.
//!
//! A workload on a mounted volume notes each version of each file: how long the record was when it was begun, and when it was
//! acknowledged as durable. Then, for each flush in the record and for subsets of what was written after it, an image
//! is built and looked at with the embedded controller.
//!
//! Legal after a cut: fsck is clean, the volume mounts, and each file holds its last acknowledged version or one that was begun
//! later. A disk may keep any of the writes after the last flush, in parts of 512 bytes, but for superblocks, which are written
//! through.
//!
//! Excludes: making crash states without a device (`fs-core`, `volume/tests/crash`).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::volume::{Daemon, mkfs};
use crate::qemu::{Configuration, Entry, Layer, Machine, WriteLog};
use crate::suite::{Environment, MachineCase, Verdict};
use crate::{Random, text};

pub(super) const CASES: &[MachineCase] =
    &[MachineCase { suite: "power-cut", name: "what_was_fsynced_before_a_cut_is_there_after_it", run: cuts }];

const VOLUME_BYTES: u64 = 64 << 20;
/// Files that the workload replaces over and over.
const FILES: u64 = 12;
/// Replacements.
const ROUNDS: u64 = 90;
/// Images that are looked at, unless the environment variable says how many.
const CUTS: usize = 210;
const CUTS_VARIABLE: &str = "POLLUX_CUTS";
/// What a disk writes at once.
const SECTOR: usize = 512;
const SEED: u64 = 20;
/// What an entry of the intent log begins with.
const LOG_MAGIC: &[u8] = b"PLXINTNT";

/// A version of a file; `None`: it was deleted.
struct Version {
    contents: Option<Vec<u8>>,
    begun: u64,
    /// Length of the record when it was acknowledged.
    durable: u64,
}

type History = BTreeMap<String, Vec<Version>>;

fn cuts(environment: &Environment) -> Result<Verdict> {
    let scratch = environment.scratch_root.join("power-cut");
    fs::create_dir_all(&scratch)?;
    let recorded = Configuration::new("recorded").bytes(VOLUME_BYTES).layer(Layer::WriteLog);
    let machine = Machine::start(&recorded)?;
    let record = machine.path().join("log0");
    mkfs(environment, &machine.spec())?;
    let empty = fs::metadata(&record)?.len();
    let history = workload(environment, &machine.spec(), &scratch, &record)?;
    machine.kill();

    let log = WriteLog::parse(fs::read(&record)?)?;
    let cuts = Cut::choose(&log, empty);
    let wanted = match std::env::var(CUTS_VARIABLE) {
        Ok(count) => count.parse().with_context(|| format!("{CUTS_VARIABLE}={count}"))?,
        Err(_) => CUTS,
    };
    let step = (cuts.len() as f64 / wanted as f64).max(1.0);
    let image = machine.path().join("cut.img");
    let mut disk = Disk::new(&log);
    let mut demanded = 0;
    for index in 0..wanted.min(cuts.len()) {
        let cut = &cuts[(index as f64 * step) as usize];
        disk.leave(cut, &image)?;
        demanded += look(environment, &image, &scratch, &history, cut.length)
            .with_context(|| format!("seed {SEED}, {cut:?}"))?;
    }
    ensure!(cuts.len() >= wanted, "the workload flushed too little: {} cuts only", cuts.len());
    ensure!(demanded > wanted, "only {demanded} files had to be there in {wanted} images");
    Ok(Verdict::Passed)
}

/// Replaces, appends by replacing, and deletes files; each step is made durable.
fn workload(environment: &Environment, device: &str, scratch: &Path, record: &Path) -> Result<History> {
    let daemon = Daemon::mount(environment, device, scratch)?;
    let root = daemon.path();
    let length = || -> Result<u64> { Ok(fs::metadata(record)?.len()) };
    let mut random = Random(SEED);
    let mut history = History::new();
    for round in 0..ROUNDS {
        let name = format!("file-{}", random.below(FILES));
        let begun = length()?;
        let contents = if round % 9 == 8 && root.join(&name).exists() {
            fs::remove_file(root.join(&name))?;
            None
        } else {
            let bytes = random.below(60_000) + 1;
            let contents = random.bytes(usize::try_from(bytes)?);
            let new = root.join("new");
            let mut file = File::create(&new)?;
            file.write_all(&contents)?;
            file.sync_all()?;
            fs::rename(&new, root.join(&name))?;
            Some(contents)
        };
        File::open(root)?.sync_all()?;
        let durable = length()?;
        history.entry(name).or_default().push(Version { contents, begun, durable });
    }
    daemon.stop()?;
    Ok(history)
}

/// A moment and what is lost by it.
#[derive(Debug)]
struct Cut {
    /// Entries before this one are on the medium.
    flushed: usize,
    /// Those from there up to this one were written and may be lost.
    written: usize,
    /// Length of the record then.
    length: u64,
    kept: Kept,
}

#[derive(Clone, Copy, Debug)]
enum Kept {
    Nothing,
    /// Entries, by a seed.
    Some(u64),
    /// Sectors, by a seed.
    Torn(u64),
}

impl Cut {
    /// After each flush with nothing more, with some of what follows it, and with parts of that.
    fn choose(log: &WriteLog, empty: u64) -> Vec<Cut> {
        let entries = log.entries();
        let flushes: Vec<usize> = (0..entries.len())
            .filter(|&index| entries[index].0 == Entry::Flush && entries[index].1 >= empty)
            .collect();
        let mut random = Random(SEED);
        let mut cuts = Vec::new();
        // Nothing was ever flushed: a cut at the end may leave nothing.
        if flushes.is_empty() && !entries.is_empty() {
            let length = entries[entries.len() - 1].1;
            cuts.push(Cut { flushed: 0, written: entries.len(), length, kept: Kept::Nothing });
        }
        for (number, &flush) in flushes.iter().enumerate() {
            let next = flushes.get(number + 1).copied().unwrap_or(entries.len());
            let mut add = |written: usize, kept| {
                cuts.push(Cut { flushed: flush + 1, written, length: entries[written - 1].1, kept });
            };
            add(flush + 1, Kept::Nothing);
            // All of it written and nothing kept, then two in the middle.
            if next > flush + 1 {
                add(next, Kept::Nothing);
                let middle = flush + 2 + random.below((next - flush - 1) as u64) as usize;
                add(middle, Kept::Some(random.next_u64()));
                add(next, Kept::Torn(random.next_u64()));
            }
        }
        cuts
    }
}

/// The medium, entry by entry.
struct Disk<'a> {
    log: &'a WriteLog,
    durable: Vec<u8>,
    applied: usize,
}

impl<'a> Disk<'a> {
    fn new(log: &'a WriteLog) -> Self {
        Self { log, durable: vec![0; VOLUME_BYTES as usize], applied: 0 }
    }

    /// Writes the image that a cut leaves. Cuts come in order.
    fn leave(&mut self, cut: &Cut, image: &Path) -> Result<()> {
        let entries = self.log.entries();
        for (entry, _) in &entries[self.applied..cut.flushed] {
            match entry {
                Entry::Write { offset, data } => {
                    let (start, data) = (usize::try_from(*offset)?, self.log.data(data));
                    let place = self.durable.get_mut(start..start + data.len());
                    place.context("a write behind the end of the disk")?.copy_from_slice(data);
                }
                Entry::Discard(offset, bytes) => {
                    let start = usize::try_from(*offset)?;
                    let place = self.durable.get_mut(start..start + usize::try_from(*bytes)?);
                    place.context("a discard behind the end of the disk")?.fill(0);
                }
                Entry::Flush => {}
            }
        }
        self.applied = cut.flushed;
        let mut file = File::create(image)?;
        file.write_all(&self.durable)?;
        for (entry, _) in &entries[cut.flushed..cut.written] {
            let Entry::Write { offset, data } = entry else { continue };
            let data = self.log.data(data);
            if is_sent_with_fua(*offset, data) {
                file.write_all_at(data, *offset)?;
                continue;
            }
            match cut.kept {
                Kept::Nothing => {}
                Kept::Some(seed) => {
                    if Random(seed ^ offset).below(2) == 0 {
                        file.write_all_at(data, *offset)?;
                    }
                }
                Kept::Torn(seed) => {
                    let mut random = Random(seed ^ offset);
                    for (index, sector) in data.chunks(SECTOR).enumerate() {
                        if random.below(2) == 0 {
                            file.write_all_at(sector, offset + (index * SECTOR) as u64)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// Whether a write is one of those that Pollux asks to be durable by itself (FUA): QEMU 7.2's controller does not pass that on, so the
/// record does not show it. They are the superblocks, in rings of 8 blocks from blocks 16 and 4160 on, and the entries of the intent
/// log, which begin with their magic (docs/on-disk-format.md).
fn is_sent_with_fua(offset: u64, data: &[u8]) -> bool {
    let block = offset / 4096;
    let superblock =
        data.len() == 4096 && [16, 4160].iter().any(|&start| (start..start + 8).contains(&block));
    superblock || data.starts_with(LOG_MAGIC)
}

/// Checks an image. Returns how many files had to be there.
fn look(
    environment: &Environment,
    image: &Path,
    scratch: &Path,
    history: &History,
    length: u64,
) -> Result<usize> {
    let device = format!("emu:{}", image.display());
    let checked =
        Command::new(environment.bin_dir.join("pollux")).args(["fsck", "--device", &device]).output()?;
    ensure!(checked.status.code() == Some(0), "fsck: {}\n{}", checked.status, text(&checked));
    let daemon = Daemon::mount(environment, &device, scratch)?;
    let mut demanded = 0;
    for (name, versions) in history {
        demanded += usize::from(judge(&daemon.path().join(name), versions, length)?);
    }
    daemon.stop()?;
    Ok(demanded)
}

/// Insists that a file holds a legal version. Returns whether it had to be there.
fn judge(path: &PathBuf, versions: &[Version], length: u64) -> Result<bool> {
    let last = versions.iter().rposition(|version| version.durable <= length);
    let begun = versions.iter().skip(last.unwrap_or(0)).filter(|version| version.begun <= length);
    let found = match fs::read(path) {
        Ok(bytes) => Some(bytes),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(error).with_context(|| path.display().to_string()),
    };
    let legal =
        begun.into_iter().any(|version| version.contents == found) || last.is_none() && found.is_none();
    ensure!(
        legal,
        "{}: {} is neither its version {last:?} of {} nor a later one, with {length} bytes of the record written",
        path.display(),
        found.map_or("that it is missing".to_owned(), |bytes| format!(
            "what is there ({} bytes)",
            bytes.len()
        )),
        versions.len(),
    );
    Ok(last.is_some_and(|last| versions[last].contents.is_some()))
}
