//! The mixed campaign: clients beside relocation, scrub and deduplication, remounts, and in the end a device that fails
//! or loses power, all from one seed.
//!
//! Owns: [`mixed`], and [`Size`], by which a seed that fails is made smaller.

use std::cell::RefCell;
use std::ops::ControlFlow;
use std::rc::Rc;

use futures_util::future::join;
use reactor::block::{Lba, LbaCount, LbaRange};
use reactor::sim::{DiskImage, SimDisk, Tearing};

use super::client::{Client, Ending, Rng};
use super::clone::patterns;
use super::crash::go_on;
use super::faults::judge_now;
use super::history::History;
use super::stats::{add, count};
use super::world::{Shape, Trouble, empty_history, fsck, prepared, session};
use super::*;
use crate::relocate::RelocateScope;
use crate::request::{CloneRange, ScrubPlace, SyncScope};

/// How much of a seed is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) clients: usize,
    /// Operations of each client in a session.
    pub(super) ops: usize,
    /// Sessions that end with an unmount, before the one that may not.
    pub(super) sessions: u64,
    /// Rounds of relocation, scrub and deduplication in a session.
    pub(super) tasks: u32,
}

impl Size {
    pub(super) const FULL: Self = Self { clients: 3, ops: 60, sessions: 2, tasks: 1 };

    /// Smaller ones, the smallest first.
    pub(super) fn smaller(&self) -> Vec<Self> {
        let mut smaller = Vec::new();
        let mut less = |size: Self| {
            if size != *self {
                smaller.push(size);
            }
        };
        less(Self { sessions: 0, ..self.clone() });
        less(Self { tasks: 0, ..self.clone() });
        less(Self { clients: 1, ..self.clone() });
        less(Self { ops: self.ops / 4, ..self.clone() });
        less(Self { ops: self.ops / 2, ..self.clone() });
        less(Self { clients: self.clients - usize::from(self.clients > 1), ..self.clone() });
        less(Self { sessions: self.sessions.saturating_sub(1), ..self.clone() });
        less(Self { ops: self.ops - self.ops.div_ceil(8), ..self.clone() });
        less(Self { ops: self.ops.saturating_sub(1), ..self.clone() });
        smaller
    }
}

/// What a seed's run came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct State {
    /// Of all that happened, and of what is left on the device.
    pub(super) hash: u64,
}

/// The image that a seed begins with. A volume's identity is not drawn from the seed: two runs that have to be the same begin with one image.
pub(super) fn beginning(seed: u64, size: &Size) -> DiskImage {
    prepared(&Shape::random(seed), size.clients).0.image()
}

/// How the last session ends.
#[derive(Clone, Copy)]
enum Disaster {
    None,
    FailingWrites,
    FailingReads,
    PowerCut,
}

/// Runs a seed; `last` holds what was done, for who asks after a failure.
///
/// # Errors
/// What is wrong after the disaster. What goes wrong before panics.
pub(super) fn mixed(
    seed: u64,
    size: &Size,
    image: &DiskImage,
    last: &mut dyn FnMut(&Rc<RefCell<History>>),
) -> Result<State, Trouble> {
    let shape = Shape::random(seed);
    let disk = shape.disk(image.clone());
    let history = Rc::new(RefCell::new(empty_history(size.clients)));
    last(&history);
    let mut hash = 0_u64;
    for salt in 0..size.sessions {
        let of_session = size.clone();
        let outcome = session(&shape, &disk, &history, 10 + salt, async move |client: &mut Client| {
            client.check_all().await.expect("what was unmounted is there");
            work(client, &of_session).await;
            client.check_all().await.expect("what was done is there");
            Ending::Finished
        });
        count("mounts", "clean remounts");
        hash = hash.rotate_left(7) ^ outcome.trace;
    }
    let trace = last_session(&shape, size, &disk, &history)?;
    add("device", "writes", disk.write_count());
    add("device", "flushes", disk.flush_count());
    Ok(State { hash: hash.rotate_left(7) ^ trace ^ disk.image().content_hash() })
}

/// A session that ends as the seed says, and what has to hold afterwards.
fn last_session(
    shape: &Shape,
    size: &Size,
    disk: &SimDisk,
    history: &Rc<RefCell<History>>,
) -> Result<u64, Trouble> {
    let mut rng = Rng::new(shape.seed ^ 0xd15a);
    let disaster = [
        Disaster::None,
        Disaster::FailingWrites,
        Disaster::FailingReads,
        Disaster::PowerCut,
        Disaster::PowerCut,
    ][rng.below(5) as usize];
    let parts = 1 << rng.below(5);
    let start = Lba::new(rng.below(parts) * (shape.blocks / parts));
    let range = LbaRange { start, count: LbaCount::new(shape.blocks / parts) };
    let (writes, before) = (rng.below(4 * size.ops as u64 + 1), size.ops / 4);
    let (own, of_session) = (disk.clone(), size.clone());
    let outcome = session(shape, disk, history, 40, async move |client: &mut Client| {
        if matches!(disaster, Disaster::None) {
            return work(client, &of_session).await;
        }
        client.device_may_fail = true;
        if client.run(before).await == Ending::DeviceGone {
            return Ending::DeviceGone;
        }
        if client.number == 0 {
            match disaster {
                Disaster::None => {}
                Disaster::FailingWrites => own.fail_writes(range),
                Disaster::FailingReads => own.fail_reads(range),
                Disaster::PowerCut => own.crash_after_writes(writes + 1),
            }
        }
        let _ended = work(client, &of_session).await;
        Ending::DeviceGone
    });
    let name = match disaster {
        Disaster::None => return Ok(outcome.trace),
        Disaster::FailingWrites => "failing writes",
        Disaster::FailingReads => "failing reads",
        Disaster::PowerCut => "power cuts at a write",
    };
    count("faults", name);
    disk.clear_faults();
    let random = |tearing| CutPolicy::Random { seed: shape.seed, tearing };
    let policies = [
        CutPolicy::DropAll,
        CutPolicy::KeepAll,
        random(Tearing::None),
        random(Tearing::Sectors),
        random(Tearing::Blocks),
    ];
    let policy = &policies[rng.below(5) as usize];
    count("cuts", format!("{policy:?}").split_inclusive("Random").next().unwrap_or_default());
    disk.power_cut(policy);
    judge_now(shape, disk, history)?;
    count("mounts", "recoveries");
    let run = async |_: &Context, volume: &Volume| {
        go_on(volume).await.map_err(|error| Trouble(format!("going on after the {name}: {error}")))?;
        volume.unmount().await.map_err(|error| Trouble(format!("unmount after the {name}: {error}")))
    };
    shape.mounted(disk, 51, run).map_err(|error| Trouble(format!("does not mount again: {error}")))??;
    fsck(shape, disk)?;
    Ok(outcome.trace)
}

/// A client's share: its operations, beside the volume's tasks if it is the first.
async fn work(client: &mut Client, size: &Size) -> Ending {
    if client.number > 0 {
        return client.run(size.ops).await;
    }
    let volume = client.volume.clone();
    let may_fail = client.device_may_fail;
    let (ops, rounds) = (size.ops, size.tasks);
    let tasks = async {
        for _ in 0..rounds {
            let ended = join(join(relocate(&volume), scrub(&volume)), deduplicate(&volume)).await;
            let ((relocated, scrubbed), deduplicated) = ended;
            for (name, ended) in
                [("relocations", relocated), ("scrubs", scrubbed), ("deduplications", deduplicated)]
            {
                match ended {
                    Ok(blocks) => {
                        count("tasks", name);
                        add("tasks", format!("blocks of {name}"), blocks);
                    }
                    Err(_) if may_fail => count("tasks", format!("{name} ended by a fault")),
                    Err(why) => panic!("{name}: {why}"),
                }
            }
        }
    };
    join(client.run(ops), tasks).await.0
}

async fn relocate(volume: &Volume) -> Result<u64, String> {
    let report = volume.relocate(RelocateScope::All, |_| ControlFlow::Continue(())).await;
    report.map(|report| report.blocks).map_err(|error| error.to_string())
}

async fn scrub(volume: &Volume) -> Result<u64, String> {
    let mut blocks = 0;
    for shard in volume.shared.shard_ids() {
        let mut place = Some(ScrubPlace::START);
        while let Some(from) = place {
            let step = match volume.call(Request::Scrub { shard, from }).await {
                Ok(Reply::Scrubbed(step)) => step,
                other => return Err(format!("{other:?}")),
            };
            if !step.damage.is_empty() {
                return Err(format!("{:?}", step.damage));
            }
            blocks += step.blocks;
            place = step.next;
        }
    }
    Ok(blocks)
}

/// Two files with the same contents come to share them, and keep them.
async fn deduplicate(volume: &Volume) -> Result<u64, String> {
    deduplicate_files(volume).await.map_err(|error| error.to_string())
}

async fn deduplicate_files(volume: &Volume) -> Result<u64, FsError> {
    const BLOCKS: u64 = 12;
    let caller = Caller { uid: 0, gid: 0 };
    let mut files = Vec::new();
    let data = patterns(9, BLOCKS);
    for name in [&b"same"[..], b"also the same"] {
        let new = NewInode::Regular;
        let make =
            Request::Create { parent: Volume::ROOT, name: name.into(), new, permissions: 0o600, caller };
        let Reply::Entry(made) = volume.call(make).await? else { panic!("no entry") };
        super::client::write_all(volume, made.inode, 0, &data).await?;
        volume.call(Request::Sync { inode: made.inode, scope: SyncScope::Data }).await?;
        files.push((name, made.inode));
    }
    let zero = FileOffset::new(0);
    let (source, target, length) = (files[0].1, files[1].1, data.len() as u64);
    let range = CloneRange { source, source_offset: zero, target, target_offset: zero, length };
    let shared = match volume.call(Request::Deduplicate(range)).await? {
        Reply::Deduplicated(Some(shared)) => shared.bytes,
        other => panic!("equal files are not shared: {other:?}"),
    };
    for (name, inode) in files {
        let read = Request::Read { inode, offset: zero, length: length as u32 };
        assert!(matches!(volume.call(read).await?, Reply::Data(found) if found == data), "contents changed");
        volume.call(Request::Unlink { parent: Volume::ROOT, name: name.into() }).await?;
        volume.call(Request::Forget { inode, lookups: 1 }).await?;
    }
    Ok(shared / crate::types::BLOCK_SIZE)
}
