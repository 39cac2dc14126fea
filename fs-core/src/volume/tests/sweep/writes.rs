//! A device that acknowledges every write and does one of them wrong: not at all, in part, at another place, or only
//! until the power goes.
//!
//! A workload of single operations runs on two mounts; all is read back after each operation, and after a power cut at
//! the end. It runs once for each of its writes and each way of going wrong.

use reactor::block::{Lba, LbaRange};
use reactor::sim::Miswrite;

use super::super::client::Rng;
use super::super::crash::from_environment;
use super::*;
use crate::request::{AttributeChange, CloneRange};
use crate::superblock::{LogArea, read_newest};

/// One in so many writes is tried, unless `POLLUX_SWEEP_WRITES` says otherwise.
const STRIDE: usize = 1;

/// Places where a misdirected write goes.
const PLACES: usize = 2;

/// One request, or one way to make things durable. Names are in the root, or in a directory of another shard.
#[derive(Clone, Copy, Debug)]
enum Step {
    Make(&'static str),
    MakeDirectory(&'static str),
    /// Blocks from the first on, all of this tag.
    Write(&'static str, u64, u64, u8),
    Clone(&'static str, &'static str),
    Attribute(&'static str),
    Truncate(&'static str, u64),
    Unlink(&'static str),
    SyncFile(&'static str),
    Checkpoint,
}

/// What each of the two mounts does. Never more than one file has data that is not synced: what is durable is what there
/// was after some step.
const MOUNTS: [&[Step]; 2] = [
    &[
        Step::Make("a"),
        Step::Write("a", 0, 5, 1),
        Step::SyncFile("a"),
        Step::MakeDirectory("d0"),
        Step::MakeDirectory("d1"),
        Step::MakeDirectory("d2"),
        Step::Make("d1/b"),
        Step::Write("d1/b", 2, 3, 2),
        Step::SyncFile("d1/b"),
        Step::Checkpoint,
        Step::Clone("a", "c"),
        Step::Clone("a", "d1/e"),
        Step::Checkpoint,
        Step::Write("a", 1, 2, 3),
        Step::SyncFile("a"),
    ],
    &[
        Step::Attribute("a"),
        Step::SyncFile("a"),
        Step::Truncate("a", 4),
        Step::SyncFile("a"),
        Step::Unlink("c"),
        Step::Checkpoint,
        Step::Write("d1/e", 4, 4, 4),
        Step::SyncFile("d1/e"),
        Step::Write("a", 0, 1, 5),
        Step::SyncFile("a"),
    ],
];

impl Step {
    fn makes_durable(self) -> bool {
        matches!(self, Self::SyncFile(_) | Self::Checkpoint)
    }

    async fn run(self, volume: &Volume) -> Result<(), FsError> {
        match self {
            Self::Make(path) => make(volume, path, NewInode::Regular).await.map(|_| ()),
            Self::MakeDirectory(path) => make(volume, path, NewInode::Directory).await.map(|_| ()),
            Self::Write(path, first, count, tag) => {
                let data: Vec<u8> = (first..first + count).flat_map(|block| pattern(tag, block)).collect();
                let request = Request::Write {
                    inode: find(volume, path).await?,
                    offset: FileOffset::new(first * BLOCK_SIZE),
                    data: data.into(),
                    source: WriteSource::Call,
                    kill_privileges: KillPrivileges::Keep,
                };
                volume.call(request).await.map(|_| ())
            }
            Self::Clone(from, to) => {
                let start = FileOffset::new(0);
                let range = CloneRange {
                    source: find(volume, from).await?,
                    source_offset: start,
                    target: make(volume, to, NewInode::Regular).await?,
                    target_offset: start,
                    length: 0,
                };
                volume.call(Request::Clone(range)).await.map(|_| ())
            }
            Self::Attribute(path) => {
                let inode = find(volume, path).await?;
                let (name, value) = ((*b"user.long").into(), [9; 3000].as_slice().into());
                volume
                    .call(Request::SetXattr { inode, name, value, mode: SetXattrMode::Set })
                    .await
                    .map(|_| ())
            }
            Self::Truncate(path, blocks) => {
                let inode = find(volume, path).await?;
                let change =
                    AttributeChange { size: Some(blocks * BLOCK_SIZE), ..AttributeChange::default() };
                volume.call(Request::SetAttributes { inode, change }).await.map(|_| ())
            }
            Self::Unlink(path) => {
                let (parent, name) = split(volume, path).await?;
                volume.call(Request::Unlink { parent, name }).await.map(|_| ())
            }
            Self::SyncFile(path) => {
                let inode = find(volume, path).await?;
                volume.call(Request::Sync { inode, scope: SyncScope::File }).await.map(|_| ())
            }
            Self::Checkpoint => volume.shared.checkpoint_now().await.map(|_| ()),
        }
    }
}

async fn split(volume: &Volume, path: &str) -> Result<(InodeNr, Box<[u8]>), FsError> {
    match path.split_once('/') {
        None => Ok((Volume::ROOT, path.as_bytes().into())),
        Some((directory, name)) => {
            Ok((lookup(volume, Volume::ROOT, directory).await?.inode, name.as_bytes().into()))
        }
    }
}

async fn find(volume: &Volume, path: &str) -> Result<InodeNr, FsError> {
    let (parent, name) = split(volume, path).await?;
    match volume.call(Request::Lookup { parent, name }).await? {
        Reply::Entry(found) => Ok(found.inode),
        other => panic!("{path}: {other:?}"),
    }
}

async fn make(volume: &Volume, path: &str, new: NewInode) -> Result<InodeNr, FsError> {
    let (parent, name) = split(volume, path).await?;
    let caller = Caller { uid: 0, gid: 0 };
    match volume.call(Request::Create { parent, name, new, permissions: 0o755, caller }).await? {
        Reply::Entry(made) => Ok(made.inode),
        other => panic!("{path}: {other:?}"),
    }
}

/// How a run of the workload went.
#[derive(Default)]
struct Run {
    /// At the beginning and after each step that was done.
    trees: Vec<Tree>,
    /// How many steps were done when the last one that makes durable was.
    durable: usize,
    /// The same of the one before.
    durable_before: usize,
    /// Whether the write had gone wrong before the last step that made durable was begun.
    met_before_last: bool,
    /// What ended it, if something did.
    trouble: Option<FsError>,
}

impl Run {
    async fn step(&mut self, volume: &Volume, disk: &SimDisk, step: Step) -> Result<(), FsError> {
        let met = disk.miswritten().is_some();
        step.run(volume).await?;
        self.trees.push(tree(volume, Times::LeftOut).await);
        if step.makes_durable() {
            self.durable_before = std::mem::replace(&mut self.durable, self.trees.len() - 1);
            self.met_before_last = met;
        }
        Ok(())
    }
}

/// Does the workload on `disk`, until something fails, and cuts the power.
fn work(shape: &Shape, disk: &SimDisk) -> Run {
    let mut run = Run::default();
    for (number, steps) in MOUNTS.iter().enumerate() {
        let own = disk.clone();
        let mounted = shape.mounted(disk, 20 + number as u64, async |_: &Context, volume: &Volume| {
            if run.trees.is_empty() {
                run.trees.push(tree(volume, Times::LeftOut).await);
            }
            for step in *steps {
                if let Err(error) = run.step(volume, &own, *step).await {
                    run.trouble = Some(error);
                    return;
                }
            }
            if number == 0
                && let Err(error) = volume.unmount().await
            {
                run.trouble = Some(error);
            }
        });
        if mounted.is_err() || run.trouble.is_some() {
            break;
        }
    }
    disk.power_cut(&CutPolicy::DropAll);
    run
}

/// The volume and what the workload makes of it when nothing goes wrong.
struct Reference {
    shape: Shape,
    empty: DiskImage,
    run: Run,
    /// Writes of the workload.
    writes: u64,
    /// Blocks that are in use at the end.
    used: Vec<u64>,
    log: LogArea,
}

impl Reference {
    fn new() -> Self {
        let shape = shape();
        let empty = shape.formatted().image();
        let disk = shape.disk(empty.clone());
        let run = work(&shape, &disk);
        assert_eq!(run.trouble, None, "nothing goes wrong");
        let steps: usize = MOUNTS.iter().map(|steps| steps.len()).sum();
        assert_eq!((run.trees.len(), run.durable), (steps + 1, steps));
        let image = disk.image();
        let mut block = vec![0; BLOCK_SIZE as usize];
        let mut holds = |number: &u64| {
            image.read(number * BLOCK_SIZE, &mut block);
            block.iter().any(|byte| *byte != 0)
        };
        let used = (0..shape.blocks).filter(|number| holds(number)).collect();
        let log = crate::disk::tests::with_disk(&disk, async |disk| {
            read_newest(&disk).await.unwrap().0.log.expect("volumes have a log")
        });
        Self { empty, writes: disk.write_count(), run, used, log, shape }
    }

    fn in_log(&self, first: u64, count: u64) -> bool {
        let blocks = u64::from(self.log.blocks);
        self.log.segments.iter().any(|start| first < start.get() + blocks && start.get() < first + count)
    }

    /// Whether the entry that the write destroyed, or was, may have been the last one of the log when the power went.
    fn hits_tail(&self, run: &Run, met: LbaRange, how: Miswrite) -> bool {
        let count = met.count.get();
        let landed = match how {
            Miswrite::Misdirected(to) => self.in_log(to.get(), count),
            Miswrite::Lost | Miswrite::Torn(_) | Miswrite::Stale => false,
        };
        !run.met_before_last && (landed || self.in_log(met.start.get(), count))
    }

    /// One run in which write `number` goes wrong.
    fn try_one(&self, number: u64, how: Miswrite) -> Result<Outcome, String> {
        let disk = self.shape.disk(self.empty.clone());
        disk.miswrite(number, how);
        let run = work(&self.shape, &disk);
        let met = disk.miswritten().ok_or("the write never came")?;
        for (step, (expected, found)) in self.run.trees.iter().zip(&run.trees).enumerate() {
            compare(expected, found).map_err(|why| format!("read after step {step}: {why}"))?;
        }
        match &run.trouble {
            None | Some(FsError::Damaged { .. } | FsError::Io(_) | FsError::ReadOnly) => {}
            Some(other) => return Err(format!("step {} says no more than {other}", run.trees.len())),
        }
        // The step that failed may have been done in part: it makes no more than one change.
        let begun = (run.trees.len() + usize::from(run.trouble.is_some())).clamp(1, self.run.trees.len());
        let trees = &self.run.trees[..begun];
        let tail = if self.hits_tail(&run, met, how) { run.durable_before..run.durable } else { 0..0 };
        let legal = Legal { now: &trees[run.durable..], tail: &trees[tail], ever: trees };
        examine(&self.shape, &disk, Times::LeftOut, &legal)
            .map_err(|why| format!("at {met:?}, after the cut: {why}"))
    }
}

/// Tries all writes with what `ways` makes of the random numbers.
fn sweep(ways: impl Fn(&Reference, &mut Rng) -> Vec<Miswrite>) -> BTreeMap<Outcome, u64> {
    let reference = Reference::new();
    let mut rng = Rng::new(from_environment("POLLUX_FIRST_SEED", 1) as u64);
    let stride = from_environment("POLLUX_SWEEP_WRITES", STRIDE);
    let mut outcomes = BTreeMap::new();
    for number in (0..reference.writes).step_by(stride) {
        for how in ways(&reference, &mut rng) {
            let what = format!("write {number} of {}: {how:?}", reference.writes);
            let _note = Note(what.clone());
            let outcome = reference.try_one(number, how).unwrap_or_else(|why| panic!("{what}: {why}"));
            *outcomes.entry(outcome).or_default() += 1;
        }
    }
    println!("{} runs: {outcomes:?}", outcomes.values().sum::<u64>());
    outcomes
}

#[test]
fn lost_and_torn_writes_are_errors_never_wrong_data() {
    let outcomes = sweep(|_, _| vec![Miswrite::Lost, Miswrite::Torn(1), Miswrite::Torn(5)]);
    assert!(outcomes.contains_key(&Outcome::Errors), "{outcomes:?}");
}

#[test]
fn stale_blocks_are_errors_never_wrong_data() {
    let outcomes = sweep(|_, _| vec![Miswrite::Stale]);
    assert!(outcomes.contains_key(&Outcome::Errors), "{outcomes:?}");
}

#[test]
fn misdirected_writes_are_errors_never_wrong_data() {
    let outcomes = sweep(|reference, rng| {
        let place =
            |_| Miswrite::Misdirected(Lba::new(rng.pick(&reference.used).expect("blocks are in use")));
        (0..PLACES).map(place).collect()
    });
    assert!(outcomes.contains_key(&Outcome::Errors), "{outcomes:?}");
}
