//! Crash enumeration: the power goes at every write, and what is left must be a legal outcome.
//!
//! A workload runs once. After each write that the disk has taken, the images that a power cut at that moment could
//! leave are kept, together with what was acknowledged by then. Afterwards each image is checked, mounted, judged by
//! the oracle, worked on, unmounted, and checked again; some also crash again while they are mounted.

use std::cell::{Cell, RefCell};
use std::collections::hash_map::{DefaultHasher, Entry};
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::rc::Rc;

use reactor::sim::{DiskImage, SimDisk, Tearing};

use super::client::{Client, Ending, Rng};
use super::history::{History, Mark};
use super::model::{Made, Op, TOP};
use super::oracle::judge;
use super::world::{SeedNote, Shape, Trouble, fsck, prepared, seeds, session};
use super::*;
use crate::request::{AllocateMode, RenameMode, SetXattrMode, SyncScope};

/// Unsettled writes of which every subset is tried, unless `POLLUX_SUBSETS` says otherwise (12 in campaigns).
const SUBSETS: usize = 2;

/// Random outcomes tried at each crash, of each kind.
const RANDOM_OUTCOMES: u64 = 1;

/// One recovery in this many is interrupted by a second crash.
const SECOND_CRASHES: u64 = 16;

/// One state in this many is worked on, unmounted and checked once more.
const WORKED_ON: u64 = 4;

/// Clients of random workloads.
const CLIENTS: usize = 2;

/// Operations of each client of a random workload.
const OPS: usize = 40;

/// Random workloads of an ordinary test run.
const SEEDS: u64 = 2;

/// Pairs of operations of an ordinary test run; `POLLUX_PAIRS` asks for more.
const PAIRS: usize = 6;

pub(super) fn from_environment(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// What a crash left behind.
struct CrashState {
    /// Which write it was, and what became of the unsettled ones.
    what: String,
    image: DiskImage,
    /// Of the contents.
    hash: u64,
    /// Moments at which the power could have gone so; the first and the last.
    marks: Vec<Mark>,
}

/// Collects crash states of a running disk.
pub(super) struct Collector {
    states: RefCell<Vec<CrashState>>,
    /// Where in the list an image is, by the hash of its contents.
    known: RefCell<HashMap<u64, usize>>,
    pub(super) recording: Cell<bool>,
    outcomes: Outcomes,
    seed: u64,
}

/// How much is tried at each crash.
#[derive(Clone, Copy)]
struct Outcomes {
    /// Unsettled writes of which every subset is tried.
    subsets: usize,
    /// Random outcomes of each kind: whole writes, torn at 512 bytes, torn at 4 KiB.
    random: u64,
    /// Where there are more unsettled writes than `subsets`: every prefix, all but one, and only one, up to so many.
    structured: usize,
}

impl Outcomes {
    fn asked() -> Self {
        Self {
            subsets: from_environment("POLLUX_SUBSETS", SUBSETS),
            random: from_environment("POLLUX_RANDOM", RANDOM_OUTCOMES as usize) as u64,
            structured: from_environment("POLLUX_STRUCTURED", 0),
        }
    }

    /// What is tried in a mount after a crash, whatever was asked for: there are many of these.
    const SECOND: Self = Self { subsets: SUBSETS, random: RANDOM_OUTCOMES, structured: 0 };

    /// What may become of `unsettled` writes at the write of this seed.
    fn policies(self, unsettled: usize, seed: u64) -> Vec<CutPolicy> {
        let mut policies = vec![CutPolicy::DropAll, CutPolicy::KeepAll];
        let mut select = |keep: &dyn Fn(usize) -> bool| {
            policies.push(CutPolicy::Select((0..unsettled).map(keep).collect()));
        };
        if unsettled <= self.subsets {
            for bits in 1..1_usize << unsettled {
                select(&|index| bits >> index & 1 == 1);
            }
        } else {
            for at in 0..unsettled.min(self.structured) {
                select(&|index| index < at);
                select(&|index| index != at);
                select(&|index| index == at);
            }
        }
        for round in 0..self.random {
            for tearing in [Tearing::None, Tearing::Sectors, Tearing::Blocks] {
                policies.push(CutPolicy::Random { seed: seed ^ round, tearing });
            }
        }
        policies
    }
}

impl Collector {
    /// Watches `disk`, beside which `history` is made.
    pub(super) fn watch(disk: &SimDisk, history: &Rc<RefCell<History>>, seed: u64) -> Rc<Self> {
        Self::watch_for(disk, history, seed, Outcomes::asked())
    }

    fn watch_for(disk: &SimDisk, history: &Rc<RefCell<History>>, seed: u64, outcomes: Outcomes) -> Rc<Self> {
        let collector = Rc::new(Self {
            states: RefCell::default(),
            known: RefCell::default(),
            recording: Cell::new(false),
            outcomes,
            seed,
        });
        let (own, history) = (Rc::clone(&collector), Rc::clone(history));
        disk.observe_writes(move |disk| {
            if own.recording.get() {
                own.collect(disk, &history.borrow().mark());
            }
        });
        collector
    }

    /// The states so far: which write it was, and what was left.
    pub(super) fn states(&self) -> Vec<(String, DiskImage)> {
        self.take().into_iter().map(|state| (state.what, state.image)).collect()
    }

    fn collect(&self, disk: &SimDisk, mark: &Mark) {
        let unsettled = disk.unsettled_writes();
        let policies = self.outcomes.policies(unsettled, self.seed ^ disk.write_count() << 20);
        for policy in policies {
            let what = format!("write {}, {policy:?} of {unsettled}", disk.write_count());
            self.keep(what, disk.image_after_cut(&policy), mark);
        }
    }

    fn keep(&self, what: String, image: DiskImage, mark: &Mark) {
        let mut states = self.states.borrow_mut();
        let hash = image.content_hash();
        match self.known.borrow_mut().entry(hash) {
            Entry::Occupied(known) => {
                let marks = &mut states[*known.get()].marks;
                marks.truncate(1);
                marks.push(mark.clone());
            }
            Entry::Vacant(place) => {
                place.insert(states.len());
                states.push(CrashState { what, image, hash, marks: vec![mark.clone()] });
            }
        }
    }

    fn take(&self) -> Vec<CrashState> {
        self.known.take();
        self.states.take()
    }
}

/// What a campaign went through.
#[derive(Default)]
pub(super) struct Tally {
    /// States judged.
    pub(super) states: u64,
    /// States of a crash in the mount after a crash.
    pub(super) second: u64,
    /// States by the hash of image and mark, across workloads.
    pub(super) distinct: HashSet<u64>,
}

impl Tally {
    fn note(&mut self, state: &CrashState) {
        self.states += 1;
        let mut hasher = DefaultHasher::new();
        (state.hash, &state.marks[0]).hash(&mut hasher);
        self.distinct.insert(hasher.finish());
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { states, second, distinct } = self;
        write!(f, "{states} crash states, {} distinct; {second} of second crashes", distinct.len())
    }
}

/// Judges every state.
///
/// # Errors
/// The first that is not legal.
fn judge_all(
    shape: &Shape,
    history: &Rc<RefCell<History>>,
    states: Vec<CrashState>,
    tally: &mut Tally,
) -> Result<(), Trouble> {
    for state in states {
        tally.note(&state);
        let number = tally.states;
        let crash_again = number % SECOND_CRASHES == 1;
        let work = if number.is_multiple_of(WORKED_ON) { Work::Go } else { Work::None };
        let told = |why: Trouble| Trouble(format!("{}: {}", state.what, why.0));
        let disk = shape.disk(state.image.clone());
        fsck(shape, &disk).map_err(told)?;
        let collector = crash_again.then(|| Collector::watch_for(&disk, history, number, Outcomes::SECOND));
        if let Some(collector) = &collector {
            collector.recording.set(true);
        }
        recover(shape, &disk, history, &state.marks, work).map_err(told)?;
        for second in collector.map(|collector| collector.take()).into_iter().flatten() {
            tally.second += 1;
            let disk = shape.disk(second.image);
            let recovered = recover(shape, &disk, history, &state.marks, Work::None);
            recovered
                .map_err(|why| told(Trouble(format!("then, in the mount, {}: {}", second.what, why.0))))?;
        }
    }
    Ok(())
}

/// Whether a recovered volume is worked on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    Go,
    None,
}

/// Mounts, judges, and works on.
fn recover(
    shape: &Shape,
    disk: &SimDisk,
    history: &Rc<RefCell<History>>,
    marks: &[Mark],
    work: Work,
) -> Result<(), Trouble> {
    let history = history.borrow();
    let history: &History = &history;
    let run = async |_: &Context, volume: &Volume| -> Result<(), Trouble> {
        for mark in marks {
            let judged = judge(volume, history, mark).await;
            judged.map_err(|verdict| Trouble(verdict.to_string()))?;
        }
        if work == Work::Go {
            go_on(volume).await.map_err(|error| Trouble(format!("going on after the crash: {error}")))?;
            volume.unmount().await.map_err(|error| Trouble(format!("unmount after the crash: {error}")))?;
        }
        Ok(())
    };
    shape.mounted(disk, 77, run).map_err(|error| Trouble(format!("does not mount: {error}")))??;
    if work == Work::Go {
        fsck(shape, disk)?;
    }
    Ok(())
}

/// The volume takes new work after a crash.
pub(super) async fn go_on(volume: &Volume) -> Result<(), FsError> {
    let file = create(volume, Volume::ROOT, "afterwards", NewInode::Regular).await;
    let data: Vec<u8> = (0..50_000_u32).map(|at| (at % 241) as u8).collect();
    super::client::write_all(volume, file.inode, 100, &data).await?;
    volume.call(Request::Sync { inode: file.inode, scope: SyncScope::File }).await?;
    assert_eq!(read(volume, file.inode, 100, 50_000).await, data);
    volume.call(Request::Unlink { parent: Volume::ROOT, name: (*b"afterwards").into() }).await?;
    volume.call(Request::Forget { inode: file.inode, lookups: 1 }).await?;
    Ok(())
}

/// Random workloads of concurrent clients.
pub(super) fn crash_random(seed: u64) -> Result<(), Trouble> {
    crash_of(seed, async |client: &mut Client| client.run(OPS).await)
}

/// The same, counted into `tally`.
pub(super) fn crash_random_into(seed: u64, tally: &mut Tally) -> Result<(), Trouble> {
    crash_into(seed, async |client: &mut Client| client.run(OPS).await, tally)
}

/// Workloads of clients that each run `script`.
pub(super) fn crash_of(
    seed: u64,
    script: impl AsyncFn(&mut Client) -> Ending + 'static,
) -> Result<(), Trouble> {
    let mut tally = Tally::default();
    crash_into(seed, script, &mut tally)?;
    println!("seed {seed}: {tally}");
    Ok(())
}

fn crash_into(
    seed: u64,
    script: impl AsyncFn(&mut Client) -> Ending + 'static,
    tally: &mut Tally,
) -> Result<(), Trouble> {
    let shape = Shape::random(seed);
    let (disk, history) = prepared(&shape, CLIENTS);
    let history = Rc::new(RefCell::new(history));
    let collector = Collector::watch(&disk, &history, seed);
    collector.recording.set(true);
    session(&shape, &disk, &history, 10, script);
    judge_all(&shape, &history, collector.take(), tally)
}

fn make(parent: u32, name: &str, made: Made) -> Op {
    Op::Create { parent, name: name.to_owned(), made, permissions: 0o644 }
}

fn bytes(op: usize, node: u32, offset: u64, length: u64) -> Op {
    Op::Write { node, offset, data: super::client::stamped(0, op, offset, length) }
}

// Nodes of the tree that workloads of one and two operations begin with.
const DIR: u32 = 1;
const OTHER: u32 = 2;
const FILE: u32 = 4;
const OLD: u32 = 5;
const UNSAVED: u32 = 6;

/// The tree they begin with: durable, but for the contents of one file.
pub(super) fn beginning() -> Vec<Op> {
    vec![
        make(TOP, "dir", Made::Directory),
        make(TOP, "other", Made::Directory),
        make(OTHER, "empty", Made::Directory),
        make(DIR, "file", Made::Regular),
        make(OTHER, "old", Made::Regular),
        make(DIR, "unsaved", Made::Regular),
        bytes(1, FILE, 0, 5 * 4096 + 1000),
        bytes(2, OLD, 0, 9000),
        Op::SetXattr { node: FILE, name: "user.a".to_owned(), value: vec![1; 20], mode: SetXattrMode::Set },
        Op::Sync { node: TOP, scope: SyncScope::Volume },
        bytes(3, UNSAVED, 0, 2 * 4096),
    ]
}

/// The operations of which those workloads consist.
fn alphabet() -> Vec<Op> {
    let rename = |parent, name: &str, new_parent, new_name: &str, mode| Op::Rename {
        parent,
        name: name.to_owned(),
        new_parent,
        new_name: new_name.to_owned(),
        mode,
    };
    let allocate = |node, offset, length, mode| Op::Allocate { node, offset, length, mode };
    vec![
        make(DIR, "new", Made::Regular),
        make(OTHER, "sub", Made::Directory),
        make(TOP, "link", Made::Symlink("dir/file".to_owned())),
        Op::Link { node: FILE, parent: OTHER, name: "second".to_owned() },
        Op::Unlink { parent: DIR, name: "file".to_owned() },
        Op::RemoveDirectory { parent: OTHER, name: "empty".to_owned() },
        rename(DIR, "file", OTHER, "moved", RenameMode::NoReplace),
        rename(DIR, "unsaved", OTHER, "old", RenameMode::Replace),
        rename(DIR, "file", OTHER, "empty", RenameMode::Exchange),
        rename(OTHER, "empty", DIR, "here", RenameMode::NoReplace),
        bytes(4, FILE, 4096, 4096),
        bytes(5, FILE, 100, 9000),
        bytes(6, FILE, 5 * 4096 + 1000, 3000),
        bytes(7, FILE, 20 * 4096, 300),
        Op::Copy { source: FILE, from: 0, node: OLD, offset: 0, length: 1 << 20 },
        Op::Copy { source: FILE, from: 4096, node: FILE, offset: 8 * 4096, length: 2 * 4096 },
        Op::Deduplicate { source: FILE, from: 4096, node: FILE, offset: 8 * 4096, length: 2 * 4096 },
        Op::Copy { source: UNSAVED, from: 0, node: FILE, offset: 4096, length: 4096 },
        Op::Truncate { node: FILE, size: 5000 },
        Op::Truncate { node: FILE, size: 0 },
        Op::Truncate { node: OLD, size: 40_000 },
        allocate(FILE, 4096, 2 * 4096, AllocateMode::PunchHole),
        allocate(FILE, 2000, 9000, AllocateMode::ZeroRange),
        allocate(OLD, 0, 60_000, AllocateMode::Extend),
        allocate(FILE, 4096, 2 * 4096, AllocateMode::Collapse),
        allocate(FILE, 4096, 3 * 4096, AllocateMode::Insert),
        Op::SetXattr { node: FILE, name: "user.a".to_owned(), value: vec![2; 900], mode: SetXattrMode::Set },
        Op::SetOwner { node: FILE, permissions: 0o600, uid: 5 },
        Op::Sync { node: FILE, scope: SyncScope::File },
        Op::Sync { node: UNSAVED, scope: SyncScope::Data },
        Op::Sync { node: TOP, scope: SyncScope::Volume },
    ]
}

/// What a short workload runs on.
pub(super) fn short_shape() -> Shape {
    let mount = MountOptions {
        page_memory: 16 << 20,
        tree_memory: 16 << 20,
        commit_interval: Duration::from_millis(1),
    };
    Shape { seed: 5, shards: 2, reactors: 2, blocks: 17 * 1024, mount }
}

/// Runs each of `workloads` from one beginning, with a crash at every write.
///
/// # Errors
/// The first outcome that is not legal.
pub(super) fn crash_short(workloads: Vec<Vec<Op>>) -> Result<u64, Trouble> {
    let image = short_beginning();
    let mut tally = Tally::default();
    for ops in workloads {
        crash_one(&image, ops, 3, &mut tally)?;
    }
    println!("{tally}");
    Ok(tally.states + tally.second)
}

/// The image that short workloads begin with.
pub(super) fn short_beginning() -> DiskImage {
    prepared(&short_shape(), 1).0.image()
}

/// Runs one workload from that beginning, with a crash at every write.
///
/// # Errors
/// The first outcome that is not legal.
pub(super) fn crash_one(
    image: &DiskImage,
    ops: Vec<Op>,
    seed: u64,
    tally: &mut Tally,
) -> Result<(), Trouble> {
    let shape = short_shape();
    let disk = shape.disk(image.clone());
    let history = Rc::new(RefCell::new(super::world::empty_history(1)));
    let collector = Collector::watch(&disk, &history, seed);
    let names: Vec<String> = ops.iter().map(super::client::brief).collect();
    let own = Rc::clone(&collector);
    session(&shape, &disk, &history, 10, async move |client: &mut Client| {
        for op in beginning() {
            assert_eq!(client.step(&op).await, Ending::Finished);
        }
        own.recording.set(true);
        for op in ops.clone() {
            assert_eq!(client.step(&op).await, Ending::Finished);
        }
        Ending::Finished
    });
    let judged = judge_all(&shape, &history, collector.take(), tally);
    judged.map_err(|why| Trouble(format!("workload {names:?}: {}", why.0)))
}

/// Every single operation, by itself and before an fsync that has nothing to do with it.
pub(super) fn singles() -> Vec<Vec<Op>> {
    let sync = Op::Sync { node: FILE, scope: SyncScope::File };
    alphabet().into_iter().flat_map(|op| [vec![op.clone()], vec![op, sync.clone()]]).collect()
}

/// Pairs of operations, `count` of them, the second of which is possible after the first.
pub(super) fn pairs(seed: u64, count: usize) -> Vec<Vec<Op>> {
    let mut all = Vec::new();
    for first in alphabet() {
        for second in alphabet() {
            all.push(vec![first.clone(), second]);
        }
    }
    let mut rng = Rng::new(seed);
    if count >= all.len() {
        return all;
    }
    (0..count).map(|_| all.swap_remove(rng.below(all.len() as u64) as usize)).collect()
}

#[test]
fn every_write_of_every_single_operation_may_be_the_last() {
    let states = crash_short(singles()).unwrap_or_else(|why| panic!("{why}"));
    assert!(states > 100, "{states} crash states are too few to say anything");
}

#[test]
fn every_write_of_pairs_of_operations_may_be_the_last() {
    for seed in seeds(1) {
        let _note = SeedNote(seed);
        let pairs = pairs(seed, from_environment("POLLUX_PAIRS", PAIRS));
        crash_short(pairs).unwrap_or_else(|why| panic!("{why}"));
    }
}

#[test]
fn every_write_of_concurrent_clients_may_be_the_last() {
    for seed in seeds(SEEDS) {
        let _note = SeedNote(seed);
        crash_random(seed).unwrap_or_else(|why| panic!("{why}"));
    }
}
