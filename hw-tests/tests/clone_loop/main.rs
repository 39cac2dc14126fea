//! Clones beside relocation, deduplication, mapped writes, writes, truncations and reads, all of the same files at once.
//!
//! Owns: the parties and when they end. A block of a source says in each of its words whose it is and which generation was written last. Whoever
//! writes a block announces the generation first and confirms it afterwards, so what a reader may see lies between what was
//! confirmed before it began and what is announced after it has ended; so does what a clone may hold.
//!
//! | party | works on | may be seen |
//! |---|---|---|
//! | mapped writer | even blocks of a source, through a shared mapping | word by word |
//! | writer | odd blocks of it, with pwrite(2), buffered and direct | block by block (a buffered read: word by word) |
//! | truncator | what follows these blocks; the only one, so it knows every byte | a word, or zeroes |
//! | reader | a source, buffered and direct | |
//! | cloner | files of its own: clones of sources and of each other, cut, extended, stored into, with holes; it knows every byte | |
//! | operator | `pollux relocate --all`, `--shrink-to`, `pollux grow` and `pollux dedupe` over and over | |
//!
//! A run lasts `POLLUX_LOOP_SECONDS` (20), and longer if a party has hardly got anywhere by then; one that does not get
//! anywhere at all fails the test.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hw_tests::{Daemon, Random, Scratch, fsck_clean, pollux, read_file, run, text};

mod slot;
mod source;

use slot::{Slot, evict, map, store};
use source::{BLOCK, FIRM, Seen, Source, Stamp, TAIL, WORDS};

/// Files of a cloner.
const SLOTS: usize = 4;

/// How much longer than asked for a run may take until every party has got somewhere.
const PATIENCE: u32 = 10;

/// Rounds that every party has to make.
const FEW: u64 = 20;

/// Relocations of everything, each followed by a deduplication, that there have to be.
const RELOCATIONS: u64 = 2;

/// How far everybody is, and when to end.
#[derive(Default)]
struct Loop {
    stop: AtomicBool,
    /// The daemon is being killed: errors are no wonder.
    killed: AtomicBool,
    /// Nobody stores into mappings any more: without a daemon behind them that would end this process.
    stored: RwLock<bool>,
    stores: AtomicU64,
    writes: AtomicU64,
    truncations: AtomicU64,
    reads: AtomicU64,
    clones: AtomicU64,
    relocations: AtomicU64,
    /// References that relocation has moved.
    moved: AtomicU64,
    /// How often the volume has become smaller, and then larger.
    shrunk: AtomicU64,
    least_shrunk: u64,
    /// Bytes that deduplication has shared.
    deduplicated: AtomicU64,
}

impl Loop {
    /// One party: `round` over and over. A failure ends the others, too.
    fn party(&self, count: &AtomicU64, mut round: impl FnMut() -> Result<()>) -> Result<()> {
        while !self.stop.load(Ordering::SeqCst) {
            if let Err(error) = round() {
                if self.killed.load(Ordering::SeqCst) {
                    return Ok(());
                }
                self.stop.store(true, Ordering::SeqCst);
                return Err(error);
            }
            count.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Leave to store into a mapping, as long as it is kept.
    fn may_store(&self) -> Option<RwLockReadGuard<'_, bool>> {
        let stored = self.stored.read().expect("a party does not panic");
        (!*stored).then_some(stored)
    }

    /// Kills the daemon in the middle of everything, after `length`.
    fn kill(&self, daemon: Daemon, length: Duration) -> Result<()> {
        let began = Instant::now();
        while began.elapsed() < length && !self.stop.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(20));
        }
        *self.stored.write().expect("a party does not panic") = true;
        self.killed.store(!self.stop.load(Ordering::SeqCst), Ordering::SeqCst);
        let killed = daemon.kill();
        self.stop.store(true, Ordering::SeqCst);
        killed
    }

    /// What there is to count, what it has come to, and what it has to reach.
    fn counts(&self) -> [(&'static str, u64, u64); 9] {
        let of = |count: &AtomicU64| count.load(Ordering::SeqCst);
        [
            ("rounds of mapped stores", of(&self.stores), FEW),
            ("writes", of(&self.writes), FEW),
            ("truncations", of(&self.truncations), FEW),
            ("reads", of(&self.reads), FEW),
            ("clones", of(&self.clones), FEW),
            ("relocations", of(&self.relocations), RELOCATIONS),
            ("references moved", of(&self.moved), FEW),
            ("times smaller and larger", of(&self.shrunk), self.least_shrunk),
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

/// Stores into even blocks through a mapping; now and then what was stored is synced.
fn mapped_writer(state: &Loop, source: &Source) -> Result<()> {
    let file = source.open(0)?;
    let mapping = map(file.try_clone()?, FIRM * BLOCK)?;
    let mut random = Random(source.number + 100);
    state.party(&state.stores, || {
        let Some(permit) = state.may_store() else {
            std::thread::sleep(Duration::from_millis(1));
            return Ok(());
        };
        for _ in 0..16 {
            let block = 2 * random.below(FIRM / 2);
            source.renew(block, |stamp| {
                (0..WORDS as u64).try_for_each(|word| store(&mapping, block * BLOCK + word * 8, stamp.word()))
            })?;
        }
        drop(permit);
        match random.below(4) {
            0 => source.sync(0, || file.sync_data())?,
            _ => std::thread::sleep(Duration::from_millis(2)),
        }
        Ok(())
    })
}

/// Writes odd blocks, some of them past the cache.
fn writer(state: &Loop, source: &Source) -> Result<()> {
    let (file, direct) = (source.open(0)?, source.open(nix::libc::O_DIRECT)?);
    let mut random = Random(source.number + 200);
    let mut memory = vec![0; 2 * BLOCK as usize];
    let buffer = aligned(&mut memory);
    state.party(&state.writes, || {
        let block = 2 * random.below(FIRM / 2) + 1;
        let file = if random.below(3) == 0 { &direct } else { &file };
        source.renew(block, |stamp| {
            buffer.copy_from_slice(&stamp.block_of_it());
            Ok(file.write_all_at(buffer, block * BLOCK)?)
        })?;
        match random.below(32) {
            0 => source.sync(1, || file.sync_all())?,
            1..8 => std::thread::sleep(Duration::from_millis(1)),
            _ => {}
        }
        Ok(())
    })
}

/// A block of `memory` that is aligned like one, as direct I/O wants it.
fn aligned(memory: &mut [u8]) -> &mut [u8] {
    let start = memory.as_ptr().align_offset(BLOCK as usize);
    &mut memory[start..start + BLOCK as usize]
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
    let mut memory = vec![0; 2 * BLOCK as usize];
    let buffer = aligned(&mut memory);
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

/// Clones and what clones are for. Returns its files.
fn cloner(state: &Loop, sources: &[Source], folders: &[PathBuf], number: usize) -> Result<Vec<Slot>> {
    let mut random = Random(number as u64 + 500);
    let mut slots = Vec::with_capacity(SLOTS);
    for slot in 0..SLOTS {
        let path = folders[slot % folders.len()].join(format!("clone{number}-{slot}"));
        slots.push(Slot { path, bytes: Vec::new() });
        slots[slot].open()?.set_len(0)?;
    }
    state.party(&state.clones, || {
        let chosen = random.below(SLOTS as u64) as usize;
        let other = random.below(SLOTS as u64 - 1) as usize;
        let mut slot = slots.remove(chosen);
        let what = match random.below(10) {
            0..3 => {
                slot.clone_source(&sources[random.below(sources.len() as u64) as usize]).map(|()| "its clone")
            }
            3 => slot.clone_range(&slots[other], &mut random).map(|()| "the clone of a range"),
            4 => slot.clone_itself(&mut random).map(|()| "the clone of a range of itself"),
            5 => slot.cut(&mut random).map(|()| "a truncation"),
            6 => match state.may_store() {
                Some(_permit) => slot.store(&mut random).map(|()| "mapped stores"),
                None => Ok("nothing"),
            },
            7 => slot.dig(&mut random).map(|()| "fallocate"),
            8 => evict(&slot.open()?, 0, 0).map(|()| "an eviction"),
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
        resize(state, mount)?;
        let shared = told(&["dedupe", "--json", "--min-length", "4KiB"], mount, &[0])?;
        state.deduplicated.fetch_add(shared["shared_bytes"].as_u64().context("bytes")?, Ordering::SeqCst);
        Ok(())
    })
}

/// Makes the volume smaller and larger again. What shards have lent each other may stand in the way of the first.
fn resize(state: &Loop, mount: &Path) -> Result<()> {
    let mount = mount.display().to_string();
    let smaller = pollux(&["relocate", "--shrink-to", "640MiB", &mount])?;
    ensure!(matches!(smaller.status.code(), Some(0 | 1)), "shrink: {}", text(&smaller));
    state.shrunk.fetch_add(u64::from(smaller.status.success()), Ordering::SeqCst);
    let larger = pollux(&["grow", &mount])?;
    ensure!(larger.status.success(), "grow: {}", text(&larger));
    Ok(())
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

/// How the volume is laid out under the loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// Everything belongs to one shard: nothing is lent, and relocation can empty every group.
    OneShard,
    /// Directories of several shards: most clones are of another shard than their source.
    SeveralShards,
}

fn length() -> Result<Duration> {
    let seconds = std::env::var("POLLUX_LOOP_SECONDS").unwrap_or_else(|_| "20".to_owned());
    Ok(Duration::from_secs(seconds.parse().context("POLLUX_LOOP_SECONDS")?))
}

fn get_along(layout: Layout) -> Result<()> {
    let length = length()?;
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "1GiB"])?;
    let mount = scratch.mount();
    let folders = match layout {
        Layout::OneShard => [""; 4],
        Layout::SeveralShards => ["", "one", "two", "three"],
    };
    let folders = folders.map(|name| mount.join(name));
    for folder in &folders {
        fs::create_dir_all(folder)?;
    }
    let sources =
        [0, 1].map(|number| Source::create(number as u64, folders[number].join(format!("source{number}"))));
    let [one, other] = sources;
    let sources = [one?, other?];
    let state = Loop { least_shrunk: u64::from(layout == Layout::OneShard), ..Loop::default() };
    let (watched, ended) = std::thread::scope(|scope| {
        let ended = scope.spawn(|| everybody(&state, &sources, &folders, &mount));
        let watched = state.watch(&daemon, length);
        (watched, ended.join().expect("nobody panics"))
    });
    watched?;
    let outcome =
        ended.with_context(|| format!("after {}; the daemon says: {}", state.report(), daemon.log()))?;
    println!("{layout:?}: {}", state.report());
    outcome.check(&sources, "in the end")?;
    run(Command::new("sync").arg(&sources[0].path))?;
    daemon.stop()?;
    fsck_clean(&scratch)?;
    let daemon = Daemon::up(&scratch, &[])?;
    outcome.check(&sources, "after a remount")?;
    daemon.stop()
}

#[test]
fn clones_relocation_mapped_writes_reads_and_truncations_get_along() -> Result<()> {
    get_along(Layout::SeveralShards)
}

#[test]
fn clones_relocation_mapped_writes_reads_and_truncations_get_along_in_one_shard() -> Result<()> {
    get_along(Layout::OneShard)
}

/// Kills in a run of 20 s.
const KILLS: u32 = 4;

#[test]
fn kill_nine_in_the_middle_of_clones_relocation_and_writes_leaves_what_was_synced() -> Result<()> {
    let length = length()? / KILLS;
    let scratch = Scratch::new()?;
    let mount = scratch.mount();
    let folders = ["", "one", "two", "three"].map(|name| mount.join(name));
    let mut daemon = Daemon::up(&scratch, &["--size", "1GiB"])?;
    for round in 0..KILLS {
        for folder in &folders {
            fs::create_dir_all(folder)?;
        }
        let [one, other] = [0, 1]
            .map(|number| Source::create(number as u64, folders[number].join(format!("{round}-{number}"))));
        let (sources, state) = ([one?, other?], Loop::default());
        let (killed, ended) = std::thread::scope(|scope| {
            let ended = scope.spawn(|| everybody(&state, &sources, &folders, &mount));
            let killed = state.kill(daemon, length);
            (killed, ended.join().expect("nobody panics"))
        });
        ended.with_context(|| format!("round {round}, after {}", state.report()))?;
        killed?;
        println!("round {round}: {}", state.report());
        let _dead_mount = nix::mount::umount2(&mount, nix::mount::MntFlags::MNT_DETACH);
        fsck_clean(&scratch).context("before the mount")?;
        daemon = Daemon::up(&scratch, &[])?;
        for source in &sources {
            let found = read_file(&source.path)?;
            for ((block, bytes), durable) in (0..FIRM).zip(found.chunks(BLOCK as usize)).zip(&source.durable)
            {
                let durable = durable.load(Ordering::SeqCst);
                source.check(bytes, block, durable, Seen::Direct).context("after kill -9")?;
            }
            ensure!(found.len() as u64 >= FIRM * BLOCK, "{} was cut off", source.path.display());
        }
        // Every block can be read, whoever wrote it.
        for number in 0..2 * SLOTS {
            let (cloner, slot) = (number / SLOTS, number % SLOTS);
            let of_it = &folders[cloner..];
            read_file(&of_it[slot % of_it.len()].join(format!("clone{cloner}-{slot}")))?;
        }
    }
    daemon.stop()?;
    fsck_clean(&scratch)
}
