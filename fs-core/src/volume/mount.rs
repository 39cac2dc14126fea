//! Mounting: from a device to running shards.
//!
//! Owns: [`Volume::mount`] and the order of its steps.
//!
//! 1. Find the newest superblock and load every group's bitmap as of its epoch; nothing is written before both are
//!    known to be good.
//! 2. If the intent log is empty, write the next superblock generation, of the same epoch, with a new incarnation. From
//!    now on this generation and the one before name the same state.
//! 3. Start each shard on its reactor. If the log is not empty, each replays its part in memory; a checkpoint with a new
//!    incarnation makes that the volume's state. If the log is damaged, what comes before the damage is
//!    replayed, and the volume is read-only.
//! 4. Start the coordinator. Finish the truncations that a crash has interrupted, and begin to delete what it left without a name.
//!
//! Mounting takes time in proportion to the number of groups and the length of the log, not to files or extents.
//!
//! # Legal crash outcomes
//! Before step 2 nothing has changed. After it the state is the same, found under a new generation. Before the
//! checkpoint of step 3 is durable, the old superblock and its log are what is found; it writes to neither.

use std::future::Future;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use reactor::{Context, OneshotSender, ReactorHandle, Receiver, mailbox, oneshot};

use crate::alloc::{Allocator, LoadedGroup, LoadedGroups, ReadGroupsError, SpaceCounter, read_groups};
use crate::data::DelallocShared;
use crate::disk::{UnsupportedDevice, VolumeDisk};
use crate::error::FsError;
use crate::format::superblock::Superblock;
use crate::log::read_log;
use crate::shard::message::{PeerCall, PeerMessage, RequestMessage};
use crate::shard::{MailboxSlots, Shard, ShardParts};
use crate::superblock::{self, LogArea, SuperblockError};
use crate::tree::TreeIdentity;
use crate::types::{BLOCK_SIZE, BlockCount, Epoch, ShardId};

use super::coordinator::{
    CHECKPOINT_SLOTS, Coordinator, CoordinatorMessage, call_all, epoch_after, keep_commit_interval,
};
use super::{ShardShared, Volume, VolumeShared};

/// Part of the page memory that a shard may fill with dirty pages.
const DIRTY_SHARE: u64 = 2;

/// How a volume is mounted.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// Memory for file contents, clean and dirty, in bytes; shared equally by the shards.
    pub page_memory: u64,
    /// Memory for tree nodes that could be read again, in bytes; shared equally by the shards.
    pub tree_memory: u64,
    /// The longest time that accepted changes stay volatile without an fsync.
    pub commit_interval: Duration,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self { page_memory: 512 << 20, tree_memory: 256 << 20, commit_interval: Duration::from_secs(5) }
    }
}

/// Why a volume could not be mounted. Nothing was changed on the device, unless it says so.
#[derive(Clone, Debug, thiserror::Error)]
pub enum MountError {
    /// The device's block size cannot be used.
    #[error(transparent)]
    Device(#[from] UnsupportedDevice),
    /// No superblock to go by.
    #[error(transparent)]
    Superblock(#[from] SuperblockError),
    /// The volume uses features with which this version must not write.
    #[error(
        "{device} was used by a newer version of Pollux, with features that this one must not write to: use that version"
    )]
    NewerFeatures {
        /// Name of the device.
        device: String,
    },
    /// The free-space bitmaps are damaged.
    #[error("{device}: {error}; `pollux fsck` tells more")]
    Groups {
        /// Name of the device.
        device: String,
        /// What is wrong.
        error: ReadGroupsError,
    },
    /// The device failed, or a reactor would not start a task.
    #[error("{device}: {error}")]
    Failed {
        /// Name of the device.
        device: String,
        /// What happened.
        error: FsError,
    },
    /// A mount needs a reactor.
    #[error("no reactor to mount on")]
    NoReactors,
}

struct Mailboxes {
    requests: Receiver<RequestMessage>,
    peers: Receiver<PeerMessage>,
}

/// What the shards share, and the receiving ends of its mailboxes.
struct Shared {
    volume: Arc<VolumeShared>,
    /// Of each shard.
    mailboxes: Vec<Mailboxes>,
    /// The coordinator's.
    checkpoints: Receiver<CoordinatorMessage>,
}

impl Volume {
    /// Mounts the volume on the device of these reactors, all of which have a queue of it. Runs in a task of the
    /// first. Shards are dealt out to the reactors in turn.
    ///
    /// # Errors
    /// [`MountError`].
    pub async fn mount(
        ctx: &Context,
        handles: &[ReactorHandle],
        options: MountOptions,
    ) -> Result<Self, MountError> {
        Self::mount_with(ctx, handles, options, MailboxSlots::default()).await
    }

    /// As [`Self::mount`]; tests choose how soon mailboxes are full.
    pub(crate) async fn mount_with(
        ctx: &Context,
        handles: &[ReactorHandle],
        options: MountOptions,
        slots: MailboxSlots,
    ) -> Result<Self, MountError> {
        let disk = VolumeDisk::new(ctx.disk().clone())?;
        let device = disk.name().to_owned();
        let failed = |error: FsError| MountError::Failed { device: device.clone(), error };
        let (found, warnings) = superblock::read_newest(&disk).await?;
        let mut warnings: Vec<String> = warnings.iter().map(ToString::to_string).collect();
        if found.must_be_read_only() {
            return Err(MountError::NewerFeatures { device });
        }
        let groups = read_groups(&disk, &found).await;
        let groups = groups.map_err(|error| MountError::Groups { device: device.clone(), error })?;
        warnings.extend(groups.warnings.iter().map(ToString::to_string));
        let log = read_log(&disk, &found).await;
        let in_use = !log.entries.is_empty() || log.damage.is_some();
        warnings.extend(log.damage.clone());
        let mut superblock = found;
        superblock.incarnation = ctx.random();
        if !in_use {
            superblock.generation = superblock.generation.next().expect("2⁶⁴ superblocks are not written");
            superblock.log = superblock.log.map(LogArea::switched);
            warnings.extend(superblock::write(&disk, &superblock).await?.map(|warning| warning.to_string()));
        }
        for warning in &warnings {
            tracing::warn!(device, warning);
        }
        let Shared { volume: shared, mailboxes, checkpoints } =
            share(&superblock, disk.blocks(), log.last_epoch(), handles, (&options, slots), warnings)?;
        start_shards(&shared, &superblock, mailboxes, groups, &options).await.map_err(failed)?;
        let mut coordinator = Coordinator::new(ctx.clone(), disk, Arc::clone(&shared), superblock);
        if in_use {
            coordinator.replay(&log).await.map_err(failed)?;
        }
        spawn(ctx, coordinator.run(checkpoints)).map_err(failed)?;
        spawn(ctx, keep_commit_interval(ctx.clone(), Arc::clone(&shared), options.commit_interval))
            .map_err(failed)?;
        if shared.check_writable().is_ok() {
            // Truncations are finished before anyone can write behind their end; deletions go on in the background.
            call_all(&shared, |_| PeerCall::Recover).await.map_err(failed)?;
        }
        Ok(Self { shared })
    }

    /// As [`Self::mount`], on an ordinary thread.
    ///
    /// # Errors
    /// As there.
    pub fn mount_blocking(handles: &[ReactorHandle], options: MountOptions) -> Result<Self, MountError> {
        let (sender, result) = oneshot();
        let all = handles.to_vec();
        let start = move |ctx: Context| {
            let own = ctx.clone();
            let task = async move {
                // If nobody waits any more, the volume is dropped as it is: nothing was changed since.
                let _abandoned = sender.send(Self::mount(&own, &all, options).await);
            };
            if let Err(error) = ctx.spawn(task) {
                tracing::error!(%error, "mount could not start");
            }
        };
        let first = handles.first().ok_or(MountError::NoReactors)?;
        let stopped =
            |_| MountError::Failed { device: "the device".to_owned(), error: FsError::ShuttingDown };
        first.spawn_with(start).map_err(|_| stopped(()))?;
        result.recv_blocking().map_err(|_| stopped(()))?
    }
}

fn spawn(ctx: &Context, task: impl Future<Output = ()> + 'static) -> Result<(), FsError> {
    ctx.spawn(task).map_err(|error| FsError::Io(error.to_string()))
}

/// Builds what the shards share.
fn share(
    superblock: &Superblock,
    device_blocks: BlockCount,
    logged: Option<Epoch>,
    handles: &[ReactorHandle],
    (options, slots): (&MountOptions, MailboxSlots),
    warnings: Vec<String>,
) -> Result<Shared, MountError> {
    let first = handles.first().ok_or(MountError::NoReactors)?;
    let shard_count = u64::from(superblock.shard_count());
    let dirty_pages = options.page_memory / shard_count / DIRTY_SHARE / BLOCK_SIZE;
    let mut shards = Vec::new();
    let mut mailboxes = Vec::new();
    for reactor in handles.iter().cycle().take(superblock.shards.len()) {
        let (requests, request_receiver) = mailbox(slots.requests, reactor);
        let (peers, peer_receiver) = mailbox(slots.peers, reactor);
        mailboxes.push(Mailboxes { requests: request_receiver, peers: peer_receiver });
        shards.push(ShardShared {
            reactor: reactor.clone(),
            requests,
            peers,
            counter: SpaceCounter::new(),
            delalloc: DelallocShared::new(dirty_pages),
            last_commit: AtomicU64::new(0),
        });
    }
    let (coordinator, checkpoints) = mailbox(CHECKPOINT_SLOTS, first);
    let durable = logged.unwrap_or(superblock.epoch);
    let shared = VolumeShared {
        shards,
        open_epoch: AtomicU64::new(epoch_after(durable).get()),
        durable_epoch: AtomicU64::new(durable.get()),
        closing_for_log: AtomicBool::new(false),
        log_limit: AtomicUsize::new(0),
        log_area: Mutex::new(None),
        data_written: AtomicBool::new(false),
        log_writes: AtomicU64::new(0),
        stopping: AtomicBool::new(false),
        failure: OnceLock::new(),
        damage: AtomicU64::new(0),
        checkpoints: AtomicU64::new(0),
        checkpoint_nanos: AtomicU64::new(0),
        coordinator,
        warnings: Mutex::new(warnings),
        hash_seed: superblock.hash_seed,
        uuid: superblock.uuid,
        label: superblock.label.clone(),
        layout: Mutex::new(superblock.layout),
        device_blocks,
        shrinking: Mutex::new(None),
    };
    Ok(Shared { volume: Arc::new(shared), mailboxes, checkpoints })
}

/// Starts every shard on its reactor and waits until all run.
async fn start_shards(
    shared: &Arc<VolumeShared>,
    superblock: &Superblock,
    mailboxes: Vec<Mailboxes>,
    mut groups: LoadedGroups,
    options: &MountOptions,
) -> Result<(), FsError> {
    let mut started = Vec::new();
    for (id, mailboxes) in shared.shard_ids().zip(mailboxes) {
        let start = StartShard {
            id,
            volume: Arc::clone(shared),
            superblock: superblock.clone(),
            groups: groups.take(id),
            mailboxes,
            options: options.clone(),
        };
        let (running, wait) = oneshot();
        let reactor = &shared.shard(id).reactor;
        reactor.spawn_with(move |ctx| start.run(&ctx, running)).map_err(|e| FsError::Io(e.to_string()))?;
        started.push(wait);
    }
    for wait in started {
        wait.await.map_err(|_| FsError::ShuttingDown)??;
    }
    Ok(())
}

/// What a reactor needs to start a shard.
struct StartShard {
    id: ShardId,
    volume: Arc<VolumeShared>,
    superblock: Superblock,
    groups: Vec<LoadedGroup>,
    mailboxes: Mailboxes,
    options: MountOptions,
}

impl StartShard {
    fn run(self, ctx: &Context, running: OneshotSender<Result<(), FsError>>) {
        // If the mount was given up, the shard has nobody to serve and ends with its mailboxes.
        let _abandoned = running.send(self.start(ctx));
    }

    fn start(self, ctx: &Context) -> Result<(), FsError> {
        let Self { id, volume, superblock, groups, mailboxes, options } = self;
        let disk = VolumeDisk::new(ctx.disk().clone()).map_err(|error| FsError::Io(error.to_string()))?;
        let record = superblock.shards[id.index()];
        let shard_count = u64::from(superblock.shard_count());
        let counter = Arc::clone(&volume.shard(id).counter);
        let first = volume.open_epoch();
        let alloc =
            Allocator::new(id, superblock.layout, superblock.identity(), counter, superblock.epoch, groups);
        let memory = |bytes: u64| usize::try_from(bytes / shard_count).unwrap_or(usize::MAX);
        let shard = Shard::new(
            ctx.clone(),
            ShardParts {
                id,
                disk,
                volume,
                identity: TreeIdentity { volume: superblock.identity().volume, shard: id },
                root: record.tree,
                alloc,
                epoch: first,
                next_inode: record.next_inode,
                inodes: record.inodes,
                tree_memory_limit: memory(options.tree_memory),
                page_memory_limit: memory(options.page_memory),
            },
        );
        spawn(ctx, Rc::clone(&shard).serve_requests(mailboxes.requests))?;
        spawn(ctx, Rc::clone(&shard).serve_peers(mailboxes.peers))?;
        spawn(ctx, Rc::clone(&shard).give_back_in_background())?;
        spawn(ctx, shard.write_back_in_background())
    }
}
