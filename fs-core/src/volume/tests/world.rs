//! What a campaign runs on: a disk, reactors, memory limits, and clients.
//!
//! Owns: [`Shape`] and [`session`], one mount with clients on it. Everything follows from the seed.

use std::cell::RefCell;
use std::rc::Rc;

use reactor::oneshot;
use reactor::sim::{DiskImage, SimDisk, SimDiskOptions, SimError, SimOptions, Simulator};

use super::client::{Client, Ending, Rng, make_top};
use super::history::History;
use super::model::Model;
use super::*;
use crate::fsck::{DataCheck, check_with};
use crate::mkfs::{FormatOptions, Owner, format};
use crate::shard::MailboxSlots;

/// Rounds of the simulator beyond which a session counts as hung. The longest, which fills a volume with small files, needs more than
/// half a million.
const MAX_ROUNDS: u64 = 2_000_000;

/// Bytes of each queue's buffer pool.
const POOL_BYTES: usize = 4 << 20;

/// Seeds of a campaign, unless the environment says otherwise.
pub(super) fn seeds(default: u64) -> std::ops::Range<u64> {
    let asked = std::env::var("POLLUX_SEEDS").ok().and_then(|text| text.parse().ok());
    let first = std::env::var("POLLUX_FIRST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    first..first + asked.unwrap_or(default)
}

/// What a campaign found.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Trouble(pub(super) String);

/// Checks the volume on `disk`, contents too.
///
/// # Errors
/// What is wrong with it.
pub(super) fn fsck(shape: &Shape, disk: &SimDisk) -> Result<(), Trouble> {
    let options = SimOptions {
        seed: shape.seed,
        disk: Some(disk.clone()),
        max_rounds: MAX_ROUNDS,
        ..SimOptions::default()
    };
    let check = async |ctx: &Context| check_with(ctx, DataCheck::Verify, &mut |_| ()).await;
    let sim = Simulator::new(options);
    let report = sim.block_on(0, |ctx: Context| async move { check(&ctx).await }).expect("a check ends");
    match report {
        Ok(report) if report.is_clean() => Ok(()),
        Ok(report) => Err(Trouble(format!("fsck: {:#?}", report.findings))),
        Err(error) => Err(Trouble(format!("fsck: {error}"))),
    }
}

/// Says which seed it was when a test fails.
pub(super) struct SeedNote(pub(super) u64);

impl Drop for SeedNote {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failed with seed {} (POLLUX_FIRST_SEED={} POLLUX_SEEDS=1 repeats it)", self.0, self.0);
        }
    }
}

/// How a volume is made and mounted.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    pub(super) seed: u64,
    pub(super) shards: u8,
    pub(super) reactors: u16,
    pub(super) blocks: u64,
    pub(super) mount: MountOptions,
}

impl Shape {
    /// 1 to 4 shards on 1 to 3 reactors, with little memory.
    pub(super) fn random(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let shards = 1 + rng.below(4) as u8;
        let mount = MountOptions {
            page_memory: u64::from(shards) * (4 << 20),
            tree_memory: u64::from(shards) * (4 << 14) * (1 + rng.below(4)),
            commit_interval: Duration::from_millis(2 + rng.below(40)),
        };
        Self { seed, shards, reactors: 1 + rng.below(3) as u16, blocks: 9 * 1024 * u64::from(shards), mount }
    }

    /// With one seed in four, mailboxes that hold next to nothing: shards that call each other find both full. Not with all of them,
    /// as nobody overtakes anybody then, and some races need that.
    fn mailboxes(&self) -> MailboxSlots {
        if self.seed % 4 == 3 { MailboxSlots { requests: 2, peers: 1 } } else { MailboxSlots::default() }
    }

    fn disk_options(&self) -> SimDiskOptions {
        SimDiskOptions {
            blocks: self.blocks,
            seed: self.seed,
            pool_bytes: POOL_BYTES,
            ..SimDiskOptions::default()
        }
    }

    /// A disk with this image, and the power on.
    pub(super) fn disk(&self, image: DiskImage) -> SimDisk {
        SimDisk::from_image(self.disk_options(), image)
    }

    /// A disk with an empty volume.
    pub(super) fn formatted(&self) -> SimDisk {
        let disk = SimDisk::new(self.disk_options());
        let options = SimOptions { seed: self.seed, disk: Some(disk.clone()), ..SimOptions::default() };
        let sim = Simulator::new(options);
        let options = FormatOptions {
            shards: self.shards,
            label: String::new(),
            force: Force::Refuse,
            owner: Owner::ROOT,
        };
        sim.block_on(0, |ctx: Context| async move { format(&ctx, &options).await })
            .expect("formatting ends")
            .expect("the disk can be formatted");
        disk
    }

    /// Reactors with queues of `disk`.
    pub(super) fn simulator(&self, disk: &SimDisk, salt: u64) -> Simulator {
        Simulator::new(SimOptions {
            seed: self.seed ^ salt << 32,
            reactors: self.reactors,
            disk: Some(disk.clone()),
            max_rounds: MAX_ROUNDS,
            ..SimOptions::default()
        })
    }

    /// Mounts `disk` and runs `f`, to the end of `f`: the power may be cut after that.
    pub(super) fn mounted<T>(
        &self,
        disk: &SimDisk,
        salt: u64,
        f: impl AsyncFnOnce(&Context, &Volume) -> T,
    ) -> Result<T, MountError> {
        let sim = self.simulator(disk, salt);
        let volume = mount(&sim, self)?;
        Ok(sim.block_on(0, |ctx: Context| async move { f(&ctx, &volume).await }).expect("it ends"))
    }
}

/// Mounts on all reactors.
pub(super) fn mount(sim: &Simulator, shape: &Shape) -> Result<Volume, MountError> {
    let handles: Vec<ReactorHandle> = (0..sim.reactors()).map(|index| sim.handle(index)).collect();
    let (options, slots) = (shape.mount.clone(), shape.mailboxes());
    sim.block_on(0, |ctx: Context| async move { Volume::mount_with(&ctx, &handles, options, slots).await })
        .expect("a mount ends")
}

/// A formatted disk with the empty, durable directories of `clients`, and the history that begins there.
pub(super) fn prepared(shape: &Shape, clients: usize) -> (SimDisk, History) {
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        for number in 0..clients {
            make_top(volume, number).await;
        }
        volume.unmount().await.expect("an idle volume unmounts");
    };
    shape.mounted(&disk, 1, run).expect("a new volume mounts");
    (disk, empty_history(clients))
}

/// A history that begins with empty directories.
pub(super) fn empty_history(clients: usize) -> History {
    History::of((0..clients).map(|_| Model::new(0o755)).collect())
}

/// How a session went.
pub(super) struct Outcome {
    pub(super) trace: u64,
}

/// Mounts `disk`, lets every client of the history run a script of its own at the same time, and unmounts if the
/// device is still there.
pub(super) fn session<F>(
    shape: &Shape,
    disk: &SimDisk,
    history: &Rc<RefCell<History>>,
    salt: u64,
    script: F,
) -> Outcome
where
    F: AsyncFn(&mut Client) -> Ending + 'static,
{
    let sim = shape.simulator(disk, salt);
    let volume = mount(&sim, shape).expect("the volume mounts");
    let script = Rc::new(script);
    let mut running = Vec::new();
    for number in 0..history.borrow().clients() {
        let (sender, ended) = oneshot();
        let (volume, history, script) = (volume.clone(), Rc::clone(history), Rc::clone(&script));
        let seed = shape.seed ^ salt << 20;
        let client = move |_: Context| async move {
            let top = lookup(&volume, Volume::ROOT, &super::client::top_name(number)).await;
            let ending = match top {
                Ok(top) => script(&mut Client::new(number, seed, volume, top.inode, history)).await,
                Err(_) => Ending::DeviceGone,
            };
            let _abandoned = sender.send(ending);
        };
        sim.spawn(number % sim.reactors(), client);
        running.push(ended);
    }
    let endings = run_to_end(&sim, running).expect("the clients come to an end");
    if endings.iter().all(|ending| *ending == Ending::Finished) && !disk.has_crashed() {
        let unmounted = sim.block_on(0, |_| async move { volume.unmount().await }).expect("an unmount ends");
        assert_eq!(unmounted, Ok(()), "unmount");
        fsck(shape, disk).unwrap_or_else(|why| panic!("after unmounting: {why}"));
    }
    Outcome { trace: sim.trace_hash() }
}

fn run_to_end(
    sim: &Simulator,
    running: Vec<reactor::OneshotReceiver<Ending>>,
) -> Result<Vec<Ending>, SimError> {
    sim.block_on(0, |_| async move {
        let mut endings = Vec::new();
        for ended in running {
            endings.push(ended.await.expect("a client tells how it ended"));
        }
        endings
    })
}
