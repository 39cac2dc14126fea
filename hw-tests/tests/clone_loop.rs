//! Clones beside relocation, deduplication, mapped writes, writes, truncations and reads, all of the same files at once.
//!
//! Owns: the model. A block of a source says in each of its words whose it is and which generation was written last. Whoever
//! writes a block announces the generation first and confirms it afterwards, so what a reader may see lies between what was
//! confirmed before it began and what is announced after it has ended; so does what a clone may hold.
//!
//! | party | works on | may be seen |
//! |---|---|---|
//! | mapped writer | even blocks of a source, through a shared mapping | word by word |
//! | writer | odd blocks of it, with pwrite(2) | block by block (a buffered read: word by word) |
//! | truncator | what follows these blocks; the only one, so it knows every byte | a word, or zeroes |
//! | reader | a source, buffered and direct | |
//! | cloner | files of its own: clones of sources and of each other, cut, extended, stored into; it knows every byte | |
//! | operator | `pollux relocate --all` and `pollux dedupe` over and over | |
//!
//! A run lasts `POLLUX_LOOP_SECONDS` (20), and longer if a party has hardly got anywhere by then; one that does not get
//! anywhere at all fails the test.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hw_tests::{Daemon, Random, Scratch, fsck_clean, pollux, read_file, run, text};
use nix::fcntl::PosixFadviseAdvice;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

const BLOCK: u64 = 4096;

/// Words of a block.
const WORDS: usize = 512;

/// Blocks of a source that are always there.
const FIRM: u64 = 1024;

/// Blocks behind them that come and go.
const TAIL: u64 = 256;

/// Files of a cloner.
const SLOTS: usize = 4;

/// How much longer than asked for a run may take until every party has got somewhere.
const PATIENCE: u32 = 10;

/// Rounds that every party has to make.
const FEW: u64 = 20;

/// Relocations of everything, each followed by a deduplication, that there have to be.
const RELOCATIONS: u64 = 2;

/// What a word says: whose block it is in, and the generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    source: u64,
    block: u64,
    generation: u64,
}

impl Stamp {
    fn word(self) -> u64 {
        // Never zero, which is what was never written.
        (self.source + 1) << 56 | self.block << 40 | self.generation
    }

    fn of(word: u64) -> Self {
        Self {
            source: (word >> 56).wrapping_sub(1),
            block: (word >> 40) & 0xffff,
            generation: word & 0xff_ffff_ffff,
        }
    }

    fn block_of_it(self) -> Vec<u8> {
        self.word().to_le_bytes().repeat(WORDS)
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")))
}

/// A file that everybody writes to, and what is known of it.
struct Source {
    number: u64,
    path: PathBuf,
    /// Of each firm block, the generation that is about to be written.
    announced: Vec<AtomicU64>,
    /// And the one that has been written.
    confirmed: Vec<AtomicU64>,
    /// The newest generation in the tail.
    tail: AtomicU64,
}

impl Source {
    fn create(number: u64, path: PathBuf) -> Result<Self> {
        let file = File::create(&path)?;
        for block in 0..FIRM {
            let stamp = Stamp { source: number, block, generation: 1 };
            file.write_all_at(&stamp.block_of_it(), block * BLOCK)?;
        }
        file.sync_all()?;
        let ones = || (0..FIRM).map(|_| AtomicU64::new(1)).collect();
        Ok(Self { number, path, announced: ones(), confirmed: ones(), tail: AtomicU64::new(0) })
    }

    fn open(&self, flags: i32) -> Result<File> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&self.path);
        file.with_context(|| self.path.display().to_string())
    }

    /// One more generation of a block, which has one writer; `write` gets it there.
    fn renew(&self, block: u64, write: impl FnOnce(Stamp) -> Result<()>) -> Result<()> {
        let generation = self.announced[block as usize].fetch_add(1, Ordering::SeqCst) + 1;
        write(Stamp { source: self.number, block, generation })?;
        self.confirmed[block as usize].store(generation, Ordering::SeqCst);
        Ok(())
    }

    fn confirmed(&self) -> Vec<u64> {
        self.confirmed.iter().map(|generation| generation.load(Ordering::SeqCst)).collect()
    }

    /// Checks a firm block that was looked at after `confirmed` was its generation.
    fn check(&self, bytes: &[u8], block: u64, confirmed: u64, seen: Seen) -> Result<()> {
        let announced = self.announced[block as usize].load(Ordering::SeqCst);
        let first = words(bytes).next();
        for (place, word) in words(bytes).enumerate() {
            let stamp = Stamp::of(word);
            ensure!(
                (stamp.source, stamp.block) == (self.number, block)
                    && (confirmed..=announced).contains(&stamp.generation),
                "{seen:?}: word {place} of block {block} of {} is {word:#x} ({stamp:?}), which is none of the generations \
                 {confirmed}..={announced}",
                self.path.display()
            );
            let whole = block % 2 == 1 && seen != Seen::Buffered;
            ensure!(
                !whole || Some(word) == first,
                "{seen:?}: block {block} of {} is torn: {:#x} and {word:#x}",
                self.path.display(),
                first.unwrap_or(0)
            );
        }
        Ok(())
    }

    /// Checks what a clone has of the tail.
    fn check_tail(&self, bytes: &[u8]) -> Result<()> {
        let newest = self.tail.load(Ordering::SeqCst);
        for (place, word) in words(bytes).enumerate() {
            let (stamp, block) = (Stamp::of(word), FIRM + (place / WORDS) as u64);
            let own = (stamp.source, stamp.block) == (self.number, block) && stamp.generation <= newest;
            ensure!(word == 0 || own, "word {place} of the tail of a clone of {} is {word:#x}", self.number);
        }
        Ok(())
    }
}

/// Where a block was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Buffered,
    Direct,
    Clone,
}

/// How far everybody is, and when to end.
#[derive(Default)]
struct Loop {
    stop: AtomicBool,
    stores: AtomicU64,
    writes: AtomicU64,
    truncations: AtomicU64,
    reads: AtomicU64,
    clones: AtomicU64,
    relocations: AtomicU64,
    /// References that relocation has moved.
    moved: AtomicU64,
    /// Bytes that deduplication has shared.
    deduplicated: AtomicU64,
}

impl Loop {
    /// One party: `round` over and over. A failure ends the others, too.
    fn party(&self, count: &AtomicU64, mut round: impl FnMut() -> Result<()>) -> Result<()> {
        while !self.stop.load(Ordering::SeqCst) {
            if let Err(error) = round() {
                self.stop.store(true, Ordering::SeqCst);
                return Err(error);
            }
            count.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }

    /// What there is to count, what it has come to, and what it has to reach.
    fn counts(&self) -> [(&'static str, u64, u64); 8] {
        let of = |count: &AtomicU64| count.load(Ordering::SeqCst);
        [
            ("rounds of mapped stores", of(&self.stores), FEW),
            ("writes", of(&self.writes), FEW),
            ("truncations", of(&self.truncations), FEW),
            ("reads", of(&self.reads), FEW),
            ("clones", of(&self.clones), FEW),
            ("relocations", of(&self.relocations), RELOCATIONS),
            ("references moved", of(&self.moved), FEW),
            ("bytes deduplicated", of(&self.deduplicated), BLOCK),
        ]
    }

    fn report(&self) -> String {
        self.counts().map(|(what, count, _)| format!("{count} {what}")).join(", ")
    }

    /// Waits until time is up and everybody has got somewhere.
    fn watch(&self, daemon: &Daemon, length: Duration) -> Result<()> {
        let began = Instant::now();
        while !self.stop.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(50));
            let enough = self.counts().iter().all(|(_, count, least)| count >= least);
            if began.elapsed() >= length && enough {
                self.stop.store(true, Ordering::SeqCst);
            } else if began.elapsed() >= length * PATIENCE {
                let message = format!("somebody got nowhere in {:?}: {}", began.elapsed(), self.report());
                // Said at once: a store into a mapping whose daemon has gone ends this process.
                eprintln!("{message}");
                self.stop.store(true, Ordering::SeqCst);
                // Whoever waits for ever gets an error then.
                daemon.signal(nix::sys::signal::Signal::SIGKILL)?;
                bail!("{message}");
            }
        }
        Ok(())
    }
}

fn map(file: File, length: u64) -> Result<MmapRegion> {
    Ok(MmapRegion::from_file(FileOffset::new(file, 0), usize::try_from(length)?)?)
}

fn store(mapping: &MmapRegion, at: u64, word: u64) -> Result<()> {
    Ok(mapping.as_volatile_slice().store(word, usize::try_from(at)?, Ordering::Release)?)
}

/// Stores into even blocks through a mapping; now and then what was stored is synced.
fn mapped_writer(state: &Loop, source: &Source) -> Result<()> {
    let file = source.open(0)?;
    let mapping = map(file.try_clone()?, FIRM * BLOCK)?;
    let mut random = Random(source.number + 100);
    state.party(&state.stores, || {
        for _ in 0..16 {
            let block = 2 * random.below(FIRM / 2);
            source.renew(block, |stamp| {
                (0..WORDS as u64).try_for_each(|word| store(&mapping, block * BLOCK + word * 8, stamp.word()))
            })?;
        }
        match random.below(4) {
            0 => file.sync_data()?,
            _ => std::thread::sleep(Duration::from_millis(2)),
        }
        Ok(())
    })
}

/// Writes odd blocks.
fn writer(state: &Loop, source: &Source) -> Result<()> {
    let (file, mut random) = (source.open(0)?, Random(source.number + 200));
    state.party(&state.writes, || {
        let block = 2 * random.below(FIRM / 2) + 1;
        source.renew(block, |stamp| Ok(file.write_all_at(&stamp.block_of_it(), block * BLOCK)?))?;
        match random.below(32) {
            0 => file.sync_all()?,
            1..8 => std::thread::sleep(Duration::from_millis(1)),
            _ => {}
        }
        Ok(())
    })
}

/// Cuts the tail off, extends it and writes it; knows each of its bytes. Returns what it is in the end.
fn truncator(state: &Loop, source: &Source) -> Result<Vec<u8>> {
    let (file, mut random) = (source.open(0)?, Random(source.number + 300));
    let (start, mut tail) = (FIRM * BLOCK, Vec::new());
    state.party(&state.truncations, || {
        let generation = source.tail.fetch_add(1, Ordering::SeqCst) + 1;
        let first = random.below(TAIL);
        let blocks = 1 + random.below((TAIL - first).min(16));
        let bytes: Vec<u8> = (FIRM + first..FIRM + first + blocks)
            .flat_map(|block| Stamp { source: source.number, block, generation }.block_of_it())
            .collect();
        let at = (first * BLOCK) as usize;
        file.write_all_at(&bytes, start + first * BLOCK)?;
        tail.resize(tail.len().max(at + bytes.len()), 0);
        tail[at..at + bytes.len()].copy_from_slice(&bytes);

        let size = random.below(TAIL * WORDS as u64) * 8;
        file.set_len(start + size)?;
        tail.resize(size as usize, 0);

        let mut found = vec![0; tail.len() + 1];
        let length = file.read_at(&mut found, start)?;
        ensure!(
            length == tail.len() && found[..length] == tail,
            "the tail of {} has {length} bytes instead of {}; the first that differs is {:?}",
            source.path.display(),
            tail.len(),
            found.iter().zip(&tail).position(|(one, other)| one != other)
        );
        std::thread::sleep(Duration::from_millis(1));
        Ok(())
    })?;
    Ok(tail)
}

/// Reads firm blocks, in turn from the kernel's cache, from the daemon and past the cache.
fn reader(state: &Loop, source: &Source) -> Result<()> {
    let (buffered, direct) = (source.open(0)?, source.open(nix::libc::O_DIRECT)?);
    // Direct I/O wants memory that is aligned like its blocks.
    let mut memory = vec![0; 2 * BLOCK as usize];
    let start = memory.as_ptr().align_offset(BLOCK as usize);
    let buffer = &mut memory[start..start + BLOCK as usize];
    let mut random = Random(source.number + 400);
    state.party(&state.reads, || {
        let block = random.below(FIRM);
        let confirmed = source.confirmed[block as usize].load(Ordering::SeqCst);
        let seen = if random.below(2) == 0 { Seen::Buffered } else { Seen::Direct };
        let file = if seen == Seen::Direct { &direct } else { &buffered };
        file.read_exact_at(buffer, block * BLOCK).with_context(|| format!("{seen:?}: block {block}"))?;
        source.check(buffer, block, confirmed, seen)?;
        if random.below(4) == 0 {
            evict(&buffered, block * BLOCK, BLOCK)?;
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    })
}

fn evict(file: &File, offset: u64, length: u64) -> Result<()> {
    let (offset, length) = (i64::try_from(offset)?, i64::try_from(length)?);
    Ok(nix::fcntl::posix_fadvise(file, offset, length, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?)
}

/// A file of a cloner, and what must be in it.
struct Slot {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Slot {
    fn open(&self) -> Result<File> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).open(&self.path);
        file.with_context(|| self.path.display().to_string())
    }

    fn check(&self, after: &str) -> Result<()> {
        let found = read_file(&self.path)?;
        ensure!(
            found == self.bytes,
            "{} after {after}: {} bytes instead of {}; the first that differs is {:?}",
            self.path.display(),
            found.len(),
            self.bytes.len(),
            found.iter().zip(&self.bytes).position(|(one, other)| one != other)
        );
        Ok(())
    }

    /// Becomes a clone of a source, whoever writes to it.
    fn clone_source(&mut self, source: &Source) -> Result<()> {
        let (from, to) = (source.open(0)?, self.open()?);
        let confirmed = source.confirmed();
        let length = copy(&from, 0, &to, 0, u64::MAX)?;
        to.set_len(length)?;
        drop(to);
        self.bytes = read_file(&self.path)?;
        ensure!(
            self.bytes.len() as u64 == length && length >= FIRM * BLOCK,
            "a clone of {length} bytes has {}",
            self.bytes.len()
        );
        let (firm, tail) = self.bytes.split_at((FIRM * BLOCK) as usize);
        for ((block, bytes), confirmed) in (0..).zip(firm.chunks(BLOCK as usize)).zip(confirmed) {
            source.check(bytes, block, confirmed, Seen::Clone)?;
        }
        source.check_tail(tail)
    }

    /// Gets a range of another of the cloner's files.
    fn clone_range(&mut self, other: &Self, random: &mut Random) -> Result<()> {
        let (blocks, own) = (other.bytes.len() as u64 / BLOCK, self.bytes.len() as u64 / BLOCK);
        if blocks == 0 {
            return Ok(());
        }
        let from = random.below(blocks);
        let (length, to) = (1 + random.below(blocks - from), random.below(own + 1));
        let (from, length, to) = (from * BLOCK, length * BLOCK, to * BLOCK);
        let copied = copy(&File::open(&other.path)?, from, &self.open()?, to, length)?;
        ensure!(copied == length, "{copied} bytes were cloned instead of {length}");
        let end = (to + length) as usize;
        self.bytes.resize(self.bytes.len().max(end), 0);
        self.bytes[to as usize..end].copy_from_slice(&other.bytes[from as usize..(from + length) as usize]);
        Ok(())
    }

    fn cut(&mut self, random: &mut Random) -> Result<()> {
        let file = self.open()?;
        for _ in 0..2 {
            let size = random.below((FIRM + TAIL) * BLOCK);
            file.set_len(size)?;
            self.bytes.resize(size as usize, 0);
        }
        Ok(())
    }

    fn store(&mut self, random: &mut Random) -> Result<()> {
        let length = self.bytes.len() as u64 / 8 * 8;
        if length == 0 {
            return Ok(());
        }
        let file = self.open()?;
        let mapping = map(file.try_clone()?, length)?;
        for _ in 0..64 {
            let (at, word) = (random.below(length / 8) * 8, random.next_u64());
            store(&mapping, at, word)?;
            self.bytes[at as usize..at as usize + 8].copy_from_slice(&word.to_le_bytes());
        }
        if random.below(2) == 0 {
            file.sync_all()?;
        }
        Ok(())
    }
}

/// Clones up to `length` bytes; how many there were.
fn copy(from: &File, from_offset: u64, to: &File, to_offset: u64, length: u64) -> Result<u64> {
    let (mut source, mut target) = (i64::try_from(from_offset)?, i64::try_from(to_offset)?);
    let mut done = 0;
    while done < length {
        let step = usize::try_from((length - done).min(1 << 30))?;
        match nix::fcntl::copy_file_range(from, Some(&mut source), to, Some(&mut target), step)
            .with_context(|| format!("copy_file_range to {to:?} after {done} bytes"))?
        {
            0 => break,
            copied => done += copied as u64,
        }
    }
    Ok(done)
}

/// Clones and what clones are for. Returns its files.
fn cloner(state: &Loop, sources: &[Source], folders: &[PathBuf], number: usize) -> Result<Vec<Slot>> {
    let mut random = Random(number as u64 + 500);
    let mut slots = Vec::with_capacity(SLOTS);
    for slot in 0..SLOTS {
        let path = folders[slot % folders.len()].join(format!("clone{number}-{slot}"));
        slots.push(Slot { path, bytes: Vec::new() });
        slots[slot].open()?;
    }
    state.party(&state.clones, || {
        let chosen = random.below(SLOTS as u64) as usize;
        let other = (chosen + 1 + random.below(SLOTS as u64 - 1) as usize) % SLOTS;
        let mut slot = slots.remove(chosen);
        let what = match random.below(8) {
            0..3 => {
                slot.clone_source(&sources[random.below(sources.len() as u64) as usize]).map(|()| "its clone")
            }
            3 => slot.clone_range(&slots[other % (SLOTS - 1)], &mut random).map(|()| "the clone of a range"),
            4 => slot.cut(&mut random).map(|()| "a truncation"),
            5 => slot.store(&mut random).map(|()| "mapped stores"),
            6 => evict(&slot.open()?, 0, 0).map(|()| "an eviction"),
            _ => {
                slot.bytes.clear();
                fs::remove_file(&slot.path)?;
                slot.open().map(|_| "its deletion")
            }
        };
        let checked = what.and_then(|what| slot.check(what));
        slots.insert(chosen, slot);
        checked
    })?;
    Ok(slots)
}

/// Runs a command of `pollux` that ends with one of `codes` and prints JSON.
fn told(arguments: &[&str], mount: &Path, codes: &[i32]) -> Result<serde_json::Value> {
    let mount = mount.display().to_string();
    let output = pollux(&[arguments, &[&mount]].concat())?;
    let code = output.status.code().context("killed")?;
    ensure!(codes.contains(&code), "{arguments:?} ended with {code}: {}", text(&output));
    serde_json::from_slice(&output.stdout).with_context(|| format!("{arguments:?}: {}", text(&output)))
}

/// Relocates everything, over and over, and shares what has become the same.
fn operator(state: &Loop, mount: &Path) -> Result<()> {
    state.party(&state.relocations, || {
        // What is written while it is moved, or shared by shards, may stay.
        let moved = told(&["relocate", "--all", "--json"], mount, &[0, 1])?;
        state.moved.fetch_add(moved["references"].as_u64().context("references")?, Ordering::SeqCst);
        let shared = told(&["dedupe", "--json", "--min-length", "4KiB"], mount, &[0])?;
        state.deduplicated.fetch_add(shared["shared_bytes"].as_u64().context("bytes")?, Ordering::SeqCst);
        Ok(())
    })
}

/// What must be in the files after everybody has ended.
struct Outcome {
    slots: Vec<Slot>,
    tails: Vec<Vec<u8>>,
}

fn everybody(state: &Loop, sources: &[Source], folders: &[PathBuf], mount: &Path) -> Result<Outcome> {
    std::thread::scope(|scope| {
        let mut parties = vec![scope.spawn(|| operator(state, mount))];
        let mut truncators = Vec::new();
        for source in sources {
            parties.push(scope.spawn(|| mapped_writer(state, source)));
            parties.push(scope.spawn(|| writer(state, source)));
            parties.push(scope.spawn(|| reader(state, source)));
            truncators.push(scope.spawn(|| truncator(state, source)));
        }
        let cloners =
            [0, 1].map(|number| scope.spawn(move || cloner(state, sources, &folders[number..], number)));
        let mut outcome = Outcome { slots: Vec::new(), tails: Vec::new() };
        for party in parties {
            party.join().expect("a party does not panic")?;
        }
        for truncator in truncators {
            outcome.tails.push(truncator.join().expect("a truncator does not panic")?);
        }
        for cloner in cloners {
            outcome.slots.extend(cloner.join().expect("a cloner does not panic")?);
        }
        Ok(outcome)
    })
}

impl Outcome {
    fn check(&self, sources: &[Source], when: &str) -> Result<()> {
        for slot in &self.slots {
            slot.check(when)?;
        }
        for (source, tail) in sources.iter().zip(&self.tails) {
            let found = read_file(&source.path)?;
            let (firm, end) = found.split_at((FIRM * BLOCK) as usize);
            for ((block, bytes), confirmed) in (0..).zip(firm.chunks(BLOCK as usize)).zip(source.confirmed())
            {
                source.check(bytes, block, confirmed, Seen::Direct).context(when.to_owned())?;
            }
            ensure!(end == tail, "{when}: the tail of {} differs", source.path.display());
        }
        Ok(())
    }
}

#[test]
fn clones_relocation_mapped_writes_reads_and_truncations_get_along() -> Result<()> {
    let seconds = std::env::var("POLLUX_LOOP_SECONDS").unwrap_or_else(|_| "20".to_owned());
    let length = Duration::from_secs(seconds.parse().context("POLLUX_LOOP_SECONDS")?);
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "1GiB"])?;
    let mount = scratch.mount();
    // Directories are of several shards: some clones are of another than their source.
    let folders = ["", "one", "two", "three"].map(|name| mount.join(name));
    for folder in &folders[1..] {
        fs::create_dir(folder)?;
    }
    let sources =
        [Source::create(0, folders[0].join("source"))?, Source::create(1, folders[1].join("source"))?];
    let state = Loop::default();
    let (watched, ended) = std::thread::scope(|scope| {
        let ended = scope.spawn(|| everybody(&state, &sources, &folders, &mount));
        let watched = state.watch(&daemon, length);
        (watched, ended.join().expect("nobody panics"))
    });
    watched?;
    let outcome =
        ended.with_context(|| format!("after {}; the daemon says: {}", state.report(), daemon.log()))?;
    println!("{}", state.report());
    outcome.check(&sources, "in the end")?;
    run(Command::new("sync").arg(&sources[0].path))?;
    daemon.stop()?;
    fsck_clean(&scratch)?;
    let daemon = Daemon::up(&scratch, &[])?;
    outcome.check(&sources, "after a remount")?;
    daemon.stop()
}
