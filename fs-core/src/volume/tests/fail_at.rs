//! Fail at N: under each operation the first request to the device fails, then the second, and so on until none fails any more; once, and
//! for ever. The same with promises of space.
//!
//! Owns: [`Job`], what is done; [`Fault`], what fails; [`Held`], what has to be given back by whoever took it.
//!
//! What must hold, whichever fails:
//! - the operation succeeds, or says why it does not in an errno that fits; an operation that lacks space has changed nothing;
//! - everything ends: work that follows, and an unmount;
//! - after a failure that is over, either the volume is read-only and says why, or work goes on, an unmount succeeds, and buffers, promises of
//!   space, running requests and locks are as if nothing had failed;
//! - a mount without the fault finds what the oracle calls legal, and the check finds nothing.
//!
//! Excludes: faults at random under many clients (`faults`, `mixed`), a volume that is really full (`full`).

use std::cell::RefCell;
use std::ops::ControlFlow;
use std::rc::Rc;

use reactor::sim::{DiskImage, Repeat, RequestKind, SimDiskOptions};

use super::client::{Client, Ending, is_device_failure, top_name};
use super::crash::{beginning, from_environment, go_on, short_beginning, short_shape, singles};
use super::faults::judge_now;
use super::history::History;
use super::model::Op;
use super::world::{Shape, empty_history, mount, session};
use super::*;
use crate::alloc::shortage;
use crate::relocate::RelocateScope;
use crate::request::{AttributeChange, SyncScope};

/// Requests of one kind that no operation of these needs.
const MOST: u64 = 2_000;

/// One in so many of the numbers is tried, unless `POLLUX_FAIL_STRIDE` says otherwise.
const STRIDE: usize = 1;

/// Bytes of buffers with which a volume can just be used.
const SMALLEST_POOL: usize = 1 << 20;

/// What is done while something fails.
#[derive(Clone, Debug)]
enum Job {
    Ops(Vec<Op>),
    Relocate,
    Unmount,
}

impl Job {
    fn all() -> Vec<Self> {
        singles().into_iter().map(Self::Ops).chain([Self::Relocate, Self::Unmount]).collect()
    }

    fn name(&self) -> String {
        match self {
            Self::Ops(ops) => ops.iter().map(super::client::brief).collect::<Vec<_>>().join("; "),
            Self::Relocate => "relocate".to_owned(),
            Self::Unmount => "unmount".to_owned(),
        }
    }

    async fn run(&self, client: &mut Client) -> Ending {
        match self {
            Self::Ops(ops) => {
                for op in ops {
                    if client.step(op).await == Ending::DeviceGone {
                        return Ending::DeviceGone;
                    }
                }
                Ending::Finished
            }
            Self::Relocate => {
                let moved = client.volume.relocate(RelocateScope::All, |_| ControlFlow::Continue(())).await;
                match moved {
                    Ok(_) => Ending::Finished,
                    Err(error) => {
                        assert!(client.device_may_fail || client.may_be_full, "relocation: {error}");
                        Ending::DeviceGone
                    }
                }
            }
            Self::Unmount => Ending::Finished,
        }
    }
}

/// What fails.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Nothing,
    Device(RequestKind, u64, Repeat),
    Space(u64, Repeat),
    /// So few operations at once, so few bytes of buffers: the next one waits.
    Scarce {
        slots: u16,
        pool: usize,
    },
}

impl Fault {
    fn disk(self, shape: &Shape, image: &DiskImage) -> SimDisk {
        let Self::Scarce { slots, pool } = self else { return shape.disk(image.clone()) };
        let options = SimDiskOptions {
            blocks: shape.blocks,
            seed: shape.seed,
            queue_depth: slots,
            pool_bytes: pool,
            ..SimDiskOptions::default()
        };
        SimDisk::from_image(options, image.clone())
    }

    fn is_for_ever(self) -> bool {
        matches!(self, Self::Device(_, _, Repeat::ForEver))
    }

    fn begin(self, disk: &SimDisk) {
        match self {
            Self::Nothing | Self::Scarce { .. } => {}
            Self::Device(kind, after, repeat) => disk.fail_request(kind, after, repeat),
            Self::Space(after, Repeat::Once) => shortage::plan(after, 1),
            Self::Space(after, Repeat::ForEver) => shortage::plan(after, u64::MAX),
        }
    }

    /// Ends it. Returns how often it struck.
    fn end(self, disk: &SimDisk) -> u64 {
        disk.stop_failing() + shortage::end()
    }
}

/// What is given back by whoever took it, at a moment when nobody needs any.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    /// Bytes of the reactor's pool that are in use.
    pool: usize,
    /// Of each shard: blocks promised or kept back, requests that run, bytes of data that are only in memory.
    shards: Vec<(u64, u32)>,
    dirty: u64,
}

async fn held(ctx: &Context, volume: &Volume) -> Held {
    let report = volume.report().await.expect("a shard reports");
    let of_shard = |shard: &ShardReport| (shard.free_blocks - shard.available_blocks, shard.running_requests);
    Held {
        pool: ctx.disk().pool().capacity() - ctx.disk().pool().available(),
        shards: report.shards.iter().map(of_shard).collect(),
        dirty: report.dirty_bytes,
    }
}

/// How a run ended.
struct Ran {
    struck: u64,
    /// Unless the volume was read-only.
    held: Option<Held>,
}

/// Uses every inode that the client knows, under the locks that changes take. Whoever holds one for ever lets this hang.
async fn use_everything(client: &Client) -> Result<(), FsError> {
    for inode in client.inodes.values() {
        let found = match client.volume.call(Request::GetAttributes { inode: *inode }).await {
            Ok(Reply::Attributes(found)) => found,
            Ok(other) => panic!("attributes: {other:?}"),
            Err(FsError::NotFound) => continue,
            Err(error) => return Err(error),
        };
        let size = (found.kind == FileKind::Regular).then_some(found.size);
        let change =
            AttributeChange { permissions: Some(found.permissions), size, ..AttributeChange::default() };
        client.volume.call(Request::SetAttributes { inode: *inode, change }).await?;
    }
    Ok(())
}

/// What follows a fault that is over.
async fn afterwards(ctx: &Context, client: &Client) -> Option<Held> {
    let volume = &client.volume;
    let sync = Request::Sync { inode: Volume::ROOT, scope: SyncScope::Volume };
    let synced = volume.call(sync.clone()).await;
    let read_only = volume.report().await.expect("a shard reports").read_only;
    if let Some(why) = read_only {
        assert!(!why.is_empty(), "a volume says why it is read-only");
        let _refused = volume.unmount().await;
        return None;
    }
    assert_eq!(synced, Ok(Reply::Done), "a sync after what failed was reported");
    use_everything(client).await.expect("what is there can be used");
    go_on(volume).await.expect("work goes on");
    volume.call(sync).await.expect("what was done becomes durable");
    volume.shared.checkpoint_now().await.expect("a checkpoint is written");
    let held = held(ctx, volume).await;
    assert_eq!(volume.unmount().await, Ok(()), "unmount");
    Some(held)
}

/// Does `job` while `fault` lasts, and what follows.
fn run(image: &DiskImage, job: &Job, fault: Fault) -> Ran {
    let shape = Shape { reactors: 1, ..short_shape() };
    let disk = fault.disk(&shape, image);
    let history = Rc::new(RefCell::new(empty_history(1)));
    let sim = shape.simulator(&disk, 10);
    let volume = mount(&sim, &shape).expect("the volume mounts");
    let (own, own_job, own_history) = (disk.clone(), job.clone(), Rc::clone(&history));
    let work = async move |ctx: Context| {
        let top = lookup(&volume, Volume::ROOT, &top_name(0)).await.expect("the client's directory is there");
        let mut client = Client::new(0, 5, volume, top.inode, own_history);
        for op in beginning() {
            assert_eq!(client.step(&op).await, Ending::Finished);
        }
        client.device_may_fail = matches!(fault, Fault::Device(..));
        client.may_be_full = matches!(fault, Fault::Space(..));
        fault.begin(&own);
        let _ending = own_job.run(&mut client).await;
        if fault.is_for_ever() || matches!(own_job, Job::Unmount) {
            let unmounted = client.volume.unmount().await;
            let struck = fault.end(&own);
            if let Err(error) = unmounted {
                assert!(struck > 0 && is_device_failure(&error), "unmount: {error}");
            }
            return Ran { struck, held: None };
        }
        // What was accepted is written while the fault lasts; this may also have to tell of what failed before.
        let told = client.volume.call(Request::Sync { inode: Volume::ROOT, scope: SyncScope::Volume }).await;
        match (fault, told) {
            (_, Ok(_)) => {}
            (Fault::Device(..), Err(error)) if is_device_failure(&error) => {}
            (_, Err(error)) => panic!("a sync of what was accepted: {error}"),
        }
        let struck = fault.end(&own);
        Ran { struck, held: afterwards(&ctx, &client).await }
    };
    let ran = sim.block_on(0, work).expect("everything ends");
    drop(sim);
    disk.power_cut(&CutPolicy::DropAll);
    judge_now(&shape, &disk, &history).unwrap_or_else(|why| panic!("{why}"));
    ran
}

/// An image whose log has something to replay: an orphan, a rename, and data.
fn unreplayed() -> (DiskImage, Rc<RefCell<History>>) {
    let shape = Shape { reactors: 1, ..short_shape() };
    let disk = shape.disk(short_beginning());
    let history = Rc::new(RefCell::new(empty_history(1)));
    session(&shape, &disk, &history, 10, async |client: &mut Client| {
        for op in beginning().into_iter().chain(singles().into_iter().step_by(5).flatten()) {
            assert_eq!(client.step(&op).await, Ending::Finished);
        }
        Ending::DeviceGone
    });
    (disk.image_after_cut(&CutPolicy::DropAll), history)
}

/// Mounts a volume while `fault` lasts. Returns how often it struck.
fn mount_during(image: &DiskImage, history: &Rc<RefCell<History>>, fault: Fault) -> u64 {
    let shape = Shape { reactors: 1, ..short_shape() };
    let disk = shape.disk(image.clone());
    let sim = shape.simulator(&disk, 10);
    fault.begin(&disk);
    let struck = match mount(&sim, &shape) {
        Ok(volume) => {
            let own = disk.clone();
            let unmount = async move |_: Context| {
                let unmounted = volume.unmount().await;
                (fault.end(&own), unmounted)
            };
            let (struck, unmounted) = sim.block_on(0, unmount).expect("an unmount ends");
            assert!(struck > 0 || unmounted == Ok(()), "unmount: {unmounted:?}");
            struck
        }
        Err(error) => {
            let struck = fault.end(&disk);
            assert!(struck > 0, "nothing failed: {error}");
            struck
        }
    };
    drop(sim);
    disk.power_cut(&CutPolicy::DropAll);
    judge_now(&shape, &disk, history).unwrap_or_else(|why| panic!("{why}"));
    struck
}

/// Says what failed when a test does.
struct Note(String);

impl Drop for Note {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.0);
        }
    }
}

/// Tries `fault` with each number, until nothing fails any more. Returns how often something did.
fn fail_at_each(image: &DiskImage, job: &Job, fault: impl Fn(u64) -> Fault) -> u64 {
    let reference = run(image, job, Fault::Nothing);
    let stride = from_environment("POLLUX_FAIL_STRIDE", STRIDE).max(1);
    for (tried, number) in (0_u64..).zip((0..MOST).step_by(stride)) {
        let _note = Note(format!("{}: {:?}", job.name(), fault(number)));
        let ran = run(image, job, fault(number));
        if let (Some(held), Some(reference)) = (&ran.held, &reference.held) {
            assert_eq!(held, reference, "something is not given back");
        }
        if ran.struck == 0 {
            return tried;
        }
    }
    panic!("{} has no end", job.name());
}

fn every_job(fault: impl Fn(u64) -> Fault) -> u64 {
    let image = short_beginning();
    let tried = Job::all().iter().map(|job| fail_at_each(&image, job, &fault)).sum();
    println!("{tried} failures");
    tried
}

#[test]
fn each_write_may_fail_once() {
    assert!(every_job(|number| Fault::Device(RequestKind::Write, number, Repeat::Once)) > 60);
}

#[test]
fn each_write_may_fail_and_all_that_follow() {
    assert!(every_job(|number| Fault::Device(RequestKind::Write, number, Repeat::ForEver)) > 60);
}

#[test]
fn each_flush_may_fail_once_or_with_all_that_follow() {
    for repeat in [Repeat::Once, Repeat::ForEver] {
        assert!(every_job(|number| Fault::Device(RequestKind::Flush, number, repeat)) > 20);
    }
}

#[test]
fn each_read_may_fail_once_or_with_all_that_follow() {
    for repeat in [Repeat::Once, Repeat::ForEver] {
        assert!(every_job(|number| Fault::Device(RequestKind::Read, number, repeat)) > 0);
    }
}

#[test]
fn each_promise_of_space_may_be_refused_once() {
    assert!(every_job(|number| Fault::Space(number, Repeat::Once)) > 60);
}

#[test]
fn each_promise_of_space_may_be_refused_and_all_that_follow() {
    assert!(every_job(|number| Fault::Space(number, Repeat::ForEver)) > 60);
}

#[test]
fn each_request_of_a_mount_may_fail_once_or_with_all_that_follow() {
    let (image, history) = unreplayed();
    for kind in [RequestKind::Read, RequestKind::Write, RequestKind::Flush] {
        for repeat in [Repeat::Once, Repeat::ForEver] {
            let tries = (0..MOST).take_while(|number| {
                let fault = Fault::Device(kind, *number, repeat);
                let _note = Note(format!("mount: {fault:?}"));
                mount_during(&image, &history, fault) > 0
            });
            let tried = tries.count();
            println!("{tried} failures of {kind:?}, {repeat:?}");
            assert!(tried > 1, "a mount that replays a log and an unmount need more");
        }
    }
}

#[test]
fn everything_ends_with_few_queue_slots_and_few_buffers() {
    let image = short_beginning();
    for (slots, pool) in [(1, SMALLEST_POOL), (1, 4 << 20), (3, SMALLEST_POOL)] {
        for job in Job::all() {
            let _note = Note(format!("{}: {slots} slots, {pool} bytes of buffers", job.name()));
            let ran = run(&image, &job, Fault::Scarce { slots, pool });
            assert!(ran.held.is_none_or(|held| held.pool == 0), "buffers are given back");
        }
    }
}
