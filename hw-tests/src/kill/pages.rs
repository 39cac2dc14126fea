//! The load of a database: writers that append to logs, pages that are overwritten in place, checkpoints and backups.
//!
//! Owns: the formats of record and page, and the check. As PostgreSQL does it:
//!
//! | part | does | journal |
//! |---|---|---|
//! | writers, each with a log | records of any length, fdatasync after some; a page for each record | `log WRITER RECORD` up to here durable |
//! | segments of a log | created empty or zeroed, or an old one renamed and overwritten; the directory is synced | `gone WRITER RECORD` up to here no longer needed |
//! | checkpointer | fsync of the data file | `page PAGE NUMBER` at least this one, for each page |
//! | | then a clone of it, synced, renamed over the last | `copy PAGE NUMBER` likewise in the clone |
//!
//! *Legal crash outcomes*: every record that the journal demands is in a segment, whole; each half of a page (4 KiB) is whole, of this
//! page, and not older than the journal says. The halves may differ: the page was torn between two blocks, as PostgreSQL expects.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};

use super::{BLOCK, Journal, clone_into, lines, numbers, sync_directory, together, word};
use crate::harness::{Random, read_file};

/// Writers, each of which owns every so-manieth page.
const WRITERS: u64 = 3;

/// Pages of the data file.
const PAGES: u64 = 192;

/// Blocks of a page.
const HALVES: u64 = 2;

/// Bytes of a segment.
const SEGMENT: u64 = 128 << 10;

/// Segments of a writer that are kept before the oldest is used again.
const KEPT: usize = 4;

/// Largest payload of a record, in bytes.
const PAYLOAD: u64 = 9_000;

/// Words before the payload: magic, writer, number, length, checksum.
const HEADER: usize = 5 * 8;

const RECORD_MAGIC: u64 = 0x6c6f_675f_7265_6331;
const PAGE_MAGIC: u64 = 0x7061_6765_5f5f_5f31;

const DATA: &str = "data";
const COPY: &str = "copy";

/// What all parts know.
struct Load<'a> {
    journal: &'a Journal,
    seed: u64,
    data: File,
    /// The newest number that was written to each page.
    written: Vec<AtomicU64>,
}

/// Runs in the current directory until the daemon is gone.
///
/// # Errors
/// The one that ended it.
pub fn run(journal: &Journal, seed: u64) -> Result<()> {
    let data = OpenOptions::new().read(true).write(true).create_new(true).open(DATA)?;
    for page in 0..PAGES {
        data.write_all_at(&page_bytes(seed, page, 1), page * HALVES * BLOCK as u64)?;
    }
    data.sync_all()?;
    sync_directory(Path::new("."))?;
    (0..PAGES).try_for_each(|page| journal.say(&format!("page {page} 1")))?;
    let written = (0..PAGES).map(|_| AtomicU64::new(1)).collect();
    let load = Load { journal, seed, data, written };
    let load = &load;
    let mut parts: Vec<Box<dyn FnOnce() -> Result<()> + Send + '_>> = vec![Box::new(|| load.checkpoints())];
    for writer in 0..WRITERS {
        parts.push(Box::new(move || load.writer(writer)));
    }
    journal.ready()?;
    together(parts)
}

impl Load<'_> {
    fn writer(&self, writer: u64) -> Result<()> {
        let mut random = Random(self.seed ^ (writer + 1) << 32);
        let folder = PathBuf::from(format!("log{writer}"));
        fs::create_dir(&folder)?;
        sync_directory(Path::new("."))?;
        // Number of each segment that is there, and the last record in it.
        let mut segments: Vec<(u64, u64)> = Vec::new();
        let (mut file, mut place, mut record) = (None, SEGMENT, 0);
        loop {
            record += 1;
            let bytes = record_bytes(self.seed, writer, record);
            if place + bytes.len() as u64 > SEGMENT {
                file = Some(self.next_segment(&folder, writer, &mut segments, &mut random)?);
                place = 0;
            }
            let segment = file.as_ref().context("a segment")?;
            segment.write_all_at(&bytes, place)?;
            place += bytes.len() as u64;
            if let Some(last) = segments.last_mut() {
                last.1 = record;
            }
            if random.below(3) == 0 {
                segment.sync_data()?;
                self.journal.say(&format!("log {writer} {record}"))?;
            }
            let page = random.below(PAGES / WRITERS) * WRITERS + writer;
            let number = self.written[page as usize].load(Ordering::SeqCst) + 1;
            self.data.write_all_at(&page_bytes(self.seed, page, number), page * HALVES * BLOCK as u64)?;
            self.written[page as usize].store(number, Ordering::SeqCst);
        }
    }

    /// The segment that follows: a new one, or the oldest under another name, with its old records in it.
    fn next_segment(
        &self,
        folder: &Path,
        writer: u64,
        segments: &mut Vec<(u64, u64)>,
        random: &mut Random,
    ) -> Result<File> {
        let (number, last) = segments.last().map_or((0, 0), |(number, last)| (number + 1, *last));
        let path = folder.join(format!("{number:06}"));
        if let Some((previous, _)) = segments.last() {
            File::open(folder.join(format!("{previous:06}")))?.sync_data()?;
            self.journal.say(&format!("log {writer} {last}"))?;
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let file = if segments.len() >= KEPT {
            let (old, last_in_it) = segments.remove(0);
            self.journal.say(&format!("gone {writer} {last_in_it}"))?;
            fs::rename(folder.join(format!("{old:06}")), &path)?;
            options.open(&path)?
        } else {
            let file = options.create_new(true).open(&path)?;
            if random.below(2) == 0 {
                file.write_all_at(&vec![0; SEGMENT as usize], 0)?;
                file.sync_all()?;
            }
            file
        };
        sync_directory(folder)?;
        segments.push((number, last));
        Ok(file)
    }

    fn checkpoints(&self) -> Result<()> {
        let mut random = Random(self.seed ^ 0xc0de);
        loop {
            std::thread::sleep(std::time::Duration::from_millis(random.below(40)));
            let written = self.now();
            self.data.sync_data()?;
            self.tell("page", &written)?;
            if random.below(2) == 0 {
                let written = self.now();
                let copy = File::create("copy.new")?;
                clone_into(&self.data, &copy)?;
                copy.sync_all()?;
                fs::rename("copy.new", COPY)?;
                sync_directory(Path::new("."))?;
                self.tell(COPY, &written)?;
            }
        }
    }

    fn now(&self) -> Vec<u64> {
        self.written.iter().map(|number| number.load(Ordering::SeqCst)).collect()
    }

    fn tell(&self, what: &str, numbers: &[u64]) -> Result<()> {
        let all = numbers.iter().enumerate().map(|(page, number)| format!("{what} {page} {number}"));
        self.journal.say(&all.collect::<Vec<_>>().join("\n"))
    }
}

fn record_bytes(seed: u64, writer: u64, record: u64) -> Vec<u8> {
    let mut random = Random(seed ^ writer << 48 ^ record << 8);
    let length = random.below(PAYLOAD);
    let payload = random.bytes(length as usize);
    let words = [RECORD_MAGIC ^ seed, writer, record, length];
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.extend(checksum(&[&bytes, &payload]).to_le_bytes());
    bytes.extend(payload);
    bytes
}

/// A page: its halves say whose they are, and are different in every byte from one number to the next.
fn page_bytes(seed: u64, page: u64, number: u64) -> Vec<u8> {
    (0..HALVES)
        .flat_map(|half| {
            let words = [PAGE_MAGIC ^ seed, page, half, number];
            let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            bytes.extend(Random(seed ^ page << 40 ^ number << 1 ^ half).bytes(BLOCK - bytes.len() - 8));
            bytes.extend(checksum(&[&bytes]).to_le_bytes());
            bytes
        })
        .collect()
}

/// FNV-1a, by words: enough to tell a record that is whole.
fn checksum(parts: &[&[u8]]) -> u64 {
    let step = |sum: u64, word: u64| (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3);
    parts.iter().flat_map(|part| part.chunks(8)).fold(0xcbf2_9ce4_8422_2325, |sum, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        step(sum, u64::from_le_bytes(word)).rotate_left(23)
    })
}

/// What a journal demands.
#[derive(Default)]
struct Demanded {
    /// Of each writer, up to which record.
    durable: BTreeMap<u64, u64>,
    gone: BTreeMap<u64, u64>,
    /// Of each page of `data` and `copy`, which number at least.
    pages: BTreeMap<(String, u64), u64>,
}

impl Demanded {
    fn of(journal: &Path) -> Result<Self> {
        let mut demanded = Self::default();
        for line in lines(journal)? {
            let table = match line[0].as_str() {
                "log" => &mut demanded.durable,
                "gone" => &mut demanded.gone,
                "page" | COPY => {
                    let [page, number] = numbers(&line)?[..] else { anyhow::bail!("{line:?}") };
                    let file = if line[0] == COPY { COPY } else { DATA };
                    demanded.pages.insert((file.to_owned(), page), number);
                    continue;
                }
                _ => continue,
            };
            let [writer, record] = numbers(&line)?[..] else { anyhow::bail!("{line:?}") };
            table.insert(writer, record);
        }
        Ok(demanded)
    }
}

/// Checks what a load has left in `root`; returns how many facts the journal demanded.
///
/// # Errors
/// Says what is missing, torn or foreign.
pub fn check(root: &Path, journal: &Path, seed: u64) -> Result<u64> {
    let demanded = Demanded::of(journal)?;
    let mut facts = demanded.pages.len() as u64;
    for file in [DATA, COPY] {
        let of_it = demanded.pages.iter().filter(|((name, _), _)| name == file);
        let least: BTreeMap<u64, u64> = of_it.map(|((_, page), number)| (*page, *number)).collect();
        // Nobody was told yet that the first clone is there.
        if least.is_empty() {
            continue;
        }
        check_pages(&root.join(file), seed, &least)?;
    }
    for (writer, durable) in &demanded.durable {
        let gone = demanded.gone.get(writer).copied().unwrap_or(0);
        let found = records(&root.join(format!("log{writer}")), seed, *writer)?;
        for record in gone + 1..=*durable {
            ensure!(
                found.contains(&record),
                "record {record} of log {writer} is lost: up to {durable} were acknowledged, up to {gone} recycled, {} are there",
                found.len()
            );
        }
        facts += durable.saturating_sub(gone);
    }
    Ok(facts)
}

fn check_pages(path: &Path, seed: u64, least: &BTreeMap<u64, u64>) -> Result<()> {
    let bytes = read_file(path)?;
    ensure!(
        bytes.len() == PAGES as usize * HALVES as usize * BLOCK,
        "{} has {} bytes",
        path.display(),
        bytes.len()
    );
    for (index, half) in (0..).zip(bytes.chunks(BLOCK)) {
        let (page, place) = (index / HALVES, index % HALVES);
        let place_of_it = || format!("block {index} of {} (page {page})", path.display());
        let number = word(half, 3).unwrap_or(0);
        let start = place as usize * BLOCK;
        let whole = page_bytes(seed, page, number)[start..start + BLOCK] == *half;
        ensure!(whole, "{} is torn or foreign: it begins with {:02x?}", place_of_it(), &half[..32]);
        let least = least.get(&page).copied().unwrap_or(0);
        ensure!(number >= least, "{} has number {number}, {least} was acknowledged", place_of_it());
    }
    Ok(())
}

/// The records that are whole in the segments of a writer.
fn records(folder: &Path, seed: u64, writer: u64) -> Result<HashSet<u64>> {
    let mut found = HashSet::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let bytes = read_file(&entry?.path())?;
        let mut rest = &bytes[..];
        while let Some(number) = word(rest, 2) {
            let length = word(rest, 3).and_then(|length| usize::try_from(length).ok()).unwrap_or(usize::MAX);
            let end = length.saturating_add(HEADER);
            if word(rest, 0) != Some(RECORD_MAGIC ^ seed)
                || end > rest.len()
                || record_bytes(seed, writer, number) != rest[..end]
            {
                break;
            }
            found.insert(number);
            rest = &rest[end..];
        }
    }
    Ok(found)
}
