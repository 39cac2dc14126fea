//! A mounted volume: what front ends hold, and what its shards share.
//!
//! Owns: [`Volume`] (mount, requests, unmount), `VolumeShared` (the few atomics that all shards see) and the
//! reports. Mounting is in `volume/mount.rs`, checkpoints in `volume/coordinator.rs`.
//!
//! A `Volume` is a handle: cheap to clone, usable from any thread. A request goes to the mailbox of the shard that
//! owns its first inode and is answered on that shard's reactor. A write takes the short way: space is reserved and
//! the data queued by the calling thread, and it is accepted when [`Volume::write`] returns.
//!
//! Memory ordering: `open_epoch` is raised with release and read with acquire, so that a shard that sees a new epoch
//! also sees what was acknowledged before it was opened; the other atomics are figures and use relaxed order.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use reactor::{Context, ReactorHandle, Sender, oneshot};
use serde::Serialize;
use uuid::Uuid;

use crate::alloc::SpaceCounter;
use crate::data::{DataReport, DelallocShared, WriteParts};
use crate::error::FsError;
use crate::format::group::VolumeLayout;
use crate::request::{KillPrivileges, Reply, Request, SpaceReport, SyncScope, WriteSource};
use crate::shard::message::{PeerCall, PeerMessage, PeerReply, RequestMessage};
use crate::superblock::LogArea;
use crate::types::{BLOCK_SIZE, BlockCount, BlockNr, Epoch, FileOffset, InodeNr, ShardId};

use self::coordinator::{CoordinatorMessage, call_all};

pub(crate) mod coordinator;
mod mount;
mod resize;

pub use self::mount::{MountError, MountOptions};
pub use self::resize::{ResizeError, ResizeReport};

/// What other threads and shards may touch of a shard.
pub(crate) struct ShardShared {
    /// The reactor that hosts it.
    pub(crate) reactor: ReactorHandle,
    /// Requests of front ends.
    pub(crate) requests: Sender<RequestMessage>,
    /// Calls of shards and coordinator.
    pub(crate) peers: Sender<PeerMessage>,
    /// Its free space.
    pub(crate) counter: Arc<SpaceCounter>,
    /// Its delalloc queues.
    pub(crate) delalloc: Arc<DelallocShared>,
    last_commit: AtomicU64,
}

/// What the shards of a volume share.
pub(crate) struct VolumeShared {
    shards: Vec<ShardShared>,
    open_epoch: AtomicU64,
    durable_epoch: AtomicU64,
    closing_for_log: AtomicBool,
    log_limit: AtomicUsize,
    /// Where the log lies, as the current superblock says.
    log_area: Mutex<Option<LogArea>>,
    data_written: AtomicBool,
    stopping: AtomicBool,
    failure: OnceLock<String>,
    damage: AtomicU64,
    checkpoints: AtomicU64,
    checkpoint_nanos: AtomicU64,
    log_writes: AtomicU64,
    coordinator: Sender<CoordinatorMessage>,
    warnings: Mutex<Vec<String>>,
    /// Key of the directory hash.
    pub(crate) hash_seed: [u8; 16],
    /// Identity of the volume.
    pub(crate) uuid: Uuid,
    label: String,
    /// Where the groups lie, as the current superblock says.
    layout: Mutex<VolumeLayout>,
    /// Blocks of the device.
    device_blocks: BlockCount,
    /// Groups from this one on do not change owners, as long as the lease is held.
    shrinking: Mutex<Option<(u64, Weak<()>)>>,
}

impl VolumeShared {
    /// The shared part of `shard`.
    pub(crate) fn shard(&self, shard: ShardId) -> &ShardShared {
        &self.shards[shard.index()]
    }

    /// Every shard's number.
    pub(crate) fn shard_ids(&self) -> impl Iterator<Item = ShardId> + use<> {
        (0..self.shards.len()).map(|index| {
            let number = u8::try_from(index).expect("a volume has at most 64 shards");
            ShardId::new(number).expect("a volume has at most 64 shards")
        })
    }

    /// Number of shards.
    pub(crate) fn shard_count(&self) -> usize {
        self.shards.len()
    }

    /// The epoch that new transactions belong to.
    pub(crate) fn open_epoch(&self) -> Epoch {
        Epoch::new(self.open_epoch.load(Ordering::Acquire)) // pairs with close_epoch
    }

    /// Closes the open epoch and returns it.
    pub(crate) fn close_epoch(&self) -> Epoch {
        Epoch::new(self.open_epoch.fetch_add(1, Ordering::AcqRel)) // pairs with open_epoch
    }

    /// The last epoch that a power cut cannot take back.
    pub(crate) fn durable_epoch(&self) -> Epoch {
        Epoch::new(self.durable_epoch.load(Ordering::Acquire)) // pairs with set_durable
    }

    /// Notes what the epoch that is closed next is closed for.
    fn set_closing(&self, closing: Closing) {
        self.closing_for_log.store(closing == Closing::Log, Ordering::Release); // published by close_epoch
    }

    /// What the epoch before the open one was closed for. Only for a shard that has yet to end it.
    pub(crate) fn closing(&self) -> Closing {
        // Acquire pairs with set_closing; the coordinator changes it only after every shard has ended the epoch.
        if self.closing_for_log.load(Ordering::Acquire) { Closing::Log } else { Closing::Checkpoint }
    }

    /// Bytes of records that an epoch may have on a shard; 0 without a log.
    pub(crate) fn log_limit(&self) -> usize {
        self.log_limit.load(Ordering::Relaxed)
    }

    /// Notes where the log lies.
    fn set_log_area(&self, area: Option<LogArea>) {
        let blocks = area.map_or(0, |area| area.blocks as usize);
        self.log_limit.store(blocks * BLOCK_SIZE as usize, Ordering::Relaxed);
        *self.log_area.lock().unwrap_or_else(PoisonError::into_inner) = area;
    }

    /// The segments of the log that lie in a stretch of blocks: the first block of each, and its length.
    pub(crate) fn log_in(&self, blocks: &Range<u64>) -> Vec<(BlockNr, u64)> {
        let area = *self.log_area.lock().unwrap_or_else(PoisonError::into_inner);
        let segments =
            area.iter().flat_map(|area| area.segments.map(|start| (start, u64::from(area.blocks))));
        segments.filter(|(start, _)| blocks.contains(&start.get())).collect()
    }

    /// Where the groups lie.
    fn layout(&self) -> VolumeLayout {
        *self.layout.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Groups from this one on do not change owners: they are to leave the volume.
    pub(crate) fn surrender_limit(&self) -> u64 {
        let shrinking = self.shrinking.lock().unwrap_or_else(PoisonError::into_inner);
        let limit = shrinking.as_ref().filter(|(_, lease)| lease.strong_count() > 0);
        limit.map_or(u64::MAX, |(first, _)| *first)
    }

    /// Notes that data was written to the device: it is in its cache, perhaps not on its medium. To be called after
    /// the write, before its extent is put into the tree.
    pub(crate) fn note_data_written(&self) {
        self.data_written.store(true, Ordering::Release); // pairs with take_data_written
    }

    /// Whether data was written since the last call.
    fn take_data_written(&self) -> bool {
        self.data_written.swap(false, Ordering::AcqRel) // pairs with note_data_written
    }

    fn set_durable(&self, epoch: Epoch) {
        self.durable_epoch.store(epoch.get(), Ordering::Release); // pairs with durable_epoch
    }

    /// Notes that `shard` has changed something in `epoch`.
    pub(crate) fn note_commit(&self, shard: ShardId, epoch: Epoch) {
        self.shard(shard).last_commit.store(epoch.get(), Ordering::Release); // pairs with last_commit
    }

    /// The newest epoch that changed anything on any shard.
    pub(crate) fn last_commit(&self) -> Epoch {
        // Acquire pairs with note_commit: whoever was told of a commit sees its epoch here.
        let newest = self.shards.iter().map(|shard| shard.last_commit.load(Ordering::Acquire)).max();
        Epoch::new(newest.unwrap_or(0))
    }

    /// The shards other than `shard`, the one with the most space first.
    pub(crate) fn peers_by_space(&self, shard: ShardId) -> Vec<ShardId> {
        let mut peers: Vec<ShardId> = self.shard_ids().filter(|peer| *peer != shard).collect();
        peers.sort_by_key(|peer| std::cmp::Reverse(self.shard(*peer).counter.available()));
        peers
    }

    /// Makes the volume read-only for good; the first reason is kept.
    pub(crate) fn fail(&self, reason: &str) {
        if self.failure.set(reason.to_owned()).is_ok() {
            tracing::error!(reason, "the volume is read-only from now on");
        }
    }

    /// # Errors
    /// [`FsError::ReadOnly`] once the volume has failed.
    pub(crate) fn check_writable(&self) -> Result<(), FsError> {
        if self.failure.get().is_some() { Err(FsError::ReadOnly) } else { Ok(()) }
    }

    /// Counts damage that was found, and says so.
    pub(crate) fn note_damage(&self, shard: ShardId, what: &str) {
        self.damage.fetch_add(1, Ordering::Relaxed);
        tracing::error!(%shard, what, "damage found");
    }

    /// Keeps a warning for the reports.
    fn note_warning(&self, warning: String) {
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).push(warning);
    }

    fn note_log_write(&self) {
        self.log_writes.fetch_add(1, Ordering::Relaxed);
    }

    fn note_checkpoint(&self, took: Duration) {
        self.checkpoints.fetch_add(1, Ordering::Relaxed);
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.checkpoint_nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    /// Whether the volume is being unmounted.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire) // pairs with unmount
    }

    /// Makes everything committed before durable, by way of the log if it can. Data that is not on the device yet is not
    /// part of it.
    pub(crate) async fn commit_now(&self) -> Result<(), FsError> {
        if self.last_commit() <= self.durable_epoch() {
            return self.check_writable();
        }
        self.ask_coordinator(CoordinatorMessage::Commit).await
    }

    /// As [`commit_now`](Self::commit_now), and the log is empty after that, and what was freed nearer to being free.
    pub(crate) async fn checkpoint_now(&self) -> Result<(), FsError> {
        self.ask_coordinator(CoordinatorMessage::Checkpoint).await
    }

    async fn ask_coordinator(
        &self,
        message: fn(reactor::OneshotSender<Result<(), FsError>>) -> CoordinatorMessage,
    ) -> Result<(), FsError> {
        let (reply, done) = oneshot();
        let message = message(reply);
        self.coordinator.send(message).await.map_err(|_| FsError::ShuttingDown)?;
        done.await.map_err(|_| FsError::ShuttingDown)?
    }

    /// Makes everything accepted before durable, data included.
    pub(crate) async fn sync_volume(&self) -> Result<(), FsError> {
        let flushed = call_all(self, |_| PeerCall::FlushData).await.map(|_| ());
        // Even if some data could not be written, the rest is made durable.
        self.commit_now().await?;
        flushed
    }

    /// Space of the whole volume.
    pub(crate) fn space(&self) -> SpaceReport {
        let mut report = SpaceReport { blocks: self.layout().blocks().get(), ..SpaceReport::default() };
        for shard in &self.shards {
            report.free += shard.counter.free() + shard.counter.pinned();
            report.available += shard.counter.available() + shard.counter.pinned();
            report.dirty_bytes += shard.delalloc.dirty_bytes();
        }
        report
    }
}

/// What an epoch is closed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Closing {
    /// A new superblock.
    Checkpoint,
    /// An entry of the intent log.
    Log,
}

/// What became of a write on its short way.
#[derive(Debug)]
pub enum WriteOutcome {
    /// Accepted: this many bytes, visible to whoever asks from now on.
    Accepted(u32),
    /// There is no room right now: send a [`Request::Write`], which waits for it.
    Slow,
    /// Can never be done.
    Failed(FsError),
}

/// Handle of a mounted volume. See the module documentation.
#[derive(Clone)]
pub struct Volume {
    shared: Arc<VolumeShared>,
}

impl Volume {
    /// The root directory.
    pub const ROOT: InodeNr = InodeNr::ROOT;

    /// Sends a request; `reply` is called with its result on the reactor that served it, or dropped if the volume
    /// stops first. Blocks only while the shard's mailbox is full: not for use on a reactor (see [`Self::call`]).
    pub fn submit(&self, request: Request, reply: impl FnOnce(Result<Reply, FsError>) + Send + 'static) {
        let shard = match self.route(&request) {
            Ok(shard) => shard,
            Err(error) => return reply(Err(error)),
        };
        let message = RequestMessage::Serve(request, Box::new(reply));
        if let Err(closed) = self.shared.shard(shard).requests.send_blocking(message)
            && let RequestMessage::Serve(_, reply) = closed.0
        {
            reply(Err(FsError::ShuttingDown));
        }
    }

    /// Sends a request and waits for its result, in a task of any reactor.
    ///
    /// # Errors
    /// The operation's.
    pub async fn call(&self, request: Request) -> Result<Reply, FsError> {
        let shard = self.route(&request)?;
        let (sender, result) = oneshot();
        let message = RequestMessage::Serve(request, Box::new(move |outcome| drop(sender.send(outcome))));
        self.shared.shard(shard).requests.send(message).await.map_err(|_| FsError::ShuttingDown)?;
        result.await.map_err(|_| FsError::ShuttingDown)?
    }

    /// Sends a request and waits for its result, on an ordinary thread.
    ///
    /// # Errors
    /// The operation's.
    pub fn call_blocking(&self, request: Request) -> Result<Reply, FsError> {
        let (sender, result) = oneshot();
        self.submit(request, move |outcome| drop(sender.send(outcome)));
        result.recv_blocking().map_err(|_| FsError::ShuttingDown)?
    }

    /// Accepts a write of at most [`crate::MAX_WRITE`] bytes without visiting the owner's reactor, if there is room.
    pub fn write(
        &self,
        inode: InodeNr,
        offset: FileOffset,
        data: &[u8],
        source: WriteSource,
        kill_privileges: KillPrivileges,
    ) -> WriteOutcome {
        let Some(shard) = self.shared.shards.get(inode.shard().index()) else {
            return WriteOutcome::Failed(FsError::NotFound);
        };
        if let Err(error) = self.shared.check_writable() {
            return WriteOutcome::Failed(error);
        }
        if self.shared.is_stopping() {
            return WriteOutcome::Failed(FsError::ShuttingDown);
        }
        let parts = WriteParts { inode, offset, data, source, kill_privileges };
        if let Err(error) = parts.check() {
            return WriteOutcome::Failed(error);
        }
        if data.is_empty() {
            return WriteOutcome::Accepted(0);
        }
        let Ok((charge, space)) = parts.try_reserve(shard.delalloc.budget(), &shard.counter) else {
            return WriteOutcome::Slow;
        };
        shard
            .delalloc
            .accept(parts.into_entry(charge, space))
            .map_or(WriteOutcome::Slow, WriteOutcome::Accepted)
    }

    /// Writes everything, makes it durable and ends the shards. Requests sent meanwhile fail with
    /// [`FsError::ShuttingDown`]. To be called in a task of any reactor.
    ///
    /// # Errors
    /// What could not be written; the shards have ended all the same.
    pub async fn unmount(&self) -> Result<(), FsError> {
        if self.shared.stopping.swap(true, Ordering::AcqRel) {
            return Err(FsError::ShuttingDown);
        }
        let deleted = call_all(&self.shared, |_| PeerCall::FinishDeletions).await.map(|_| ());
        let synced = deleted.and(self.shared.sync_volume().await);
        // The next mount has nothing to do again.
        let synced = synced.and(self.shared.checkpoint_now().await);
        for shard in &self.shared.shards {
            // An error means that the shard has already ended.
            let _ended = shard.requests.send(RequestMessage::Stop).await;
        }
        let stopped = call_all(&self.shared, |_| PeerCall::Stop).await.map(|_| ());
        let _ended = self.shared.coordinator.send(CoordinatorMessage::Stop).await;
        synced.and(stopped)
    }

    /// As [`Self::unmount`], on an ordinary thread.
    ///
    /// # Errors
    /// As there.
    pub fn unmount_blocking(&self) -> Result<(), FsError> {
        let (sender, result) = oneshot();
        let volume = self.clone();
        let reactor = self.shared.shards[0].reactor.clone();
        let started = reactor.spawn_with(move |ctx: Context| {
            let task = async move { drop(sender.send(volume.unmount().await)) };
            if let Err(error) = ctx.spawn(task) {
                tracing::error!(%error, "unmount could not start");
            }
        });
        started.map_err(|_| FsError::ShuttingDown)?;
        result.recv_blocking().map_err(|_| FsError::ShuttingDown)?
    }

    /// Figures of the volume and its shards, in a task of any reactor.
    ///
    /// # Errors
    /// [`FsError::ShuttingDown`].
    pub async fn report(&self) -> Result<VolumeReport, FsError> {
        let replies = call_all(&self.shared, |_| PeerCall::Report).await?;
        let shards = replies.into_iter().filter_map(|(_, reply)| match reply {
            PeerReply::Report(report) => Some(*report),
            _ => None,
        });
        Ok(self.shared.report(shards.collect()))
    }

    /// What was noticed at mount, such as a damaged superblock that had a twin.
    pub fn warnings(&self) -> Vec<String> {
        self.shared.warnings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The volume's identity.
    pub fn uuid(&self) -> Uuid {
        self.shared.uuid
    }

    /// Shards of the volume.
    pub fn shards(&self) -> u8 {
        u8::try_from(self.shared.shard_count()).unwrap_or(u8::MAX)
    }

    /// The shard that serves a request.
    fn route(&self, request: &Request) -> Result<ShardId, FsError> {
        let shard = match request {
            Request::StatFs | Request::Sync { scope: SyncScope::Volume, .. } => ShardId::FIRST,
            Request::Link { new_parent, .. } => new_parent.shard(),
            Request::Scrub { shard, .. } | Request::Groups { shard } | Request::Relocate { shard, .. } => {
                *shard
            }
            Request::Clone(range) | Request::Deduplicate(range) | Request::CopyRange(range) => {
                range.target.shard()
            }
            Request::Lookup { parent: inode, .. }
            | Request::Create { parent: inode, .. }
            | Request::Unlink { parent: inode, .. }
            | Request::RemoveDirectory { parent: inode, .. }
            | Request::Rename { parent: inode, .. }
            | Request::Forget { inode, .. }
            | Request::GetAttributes { inode }
            | Request::SetAttributes { inode, .. }
            | Request::ReadLink { inode }
            | Request::Read { inode, .. }
            | Request::ReadDirect { inode, .. }
            | Request::Write { inode, .. }
            | Request::WriteDirect { inode, .. }
            | Request::Flush { inode }
            | Request::Sync { inode, .. }
            | Request::ReadDirectory { inode, .. }
            | Request::GetXattr { inode, .. }
            | Request::SetXattr { inode, .. }
            | Request::ListXattr { inode }
            | Request::RemoveXattr { inode, .. }
            | Request::Allocate { inode, .. }
            | Request::CountExtents { inode }
            | Request::ListExtents { inode, .. }
            | Request::Seek { inode, .. } => inode.shard(),
        };
        if self.shared.is_stopping() {
            return Err(FsError::ShuttingDown);
        }
        if shard.index() >= self.shared.shard_count() {
            return Err(FsError::NotFound);
        }
        Ok(shard)
    }
}

/// Figures of one shard.
#[derive(Clone, Debug, Serialize)]
pub struct ShardReport {
    /// Number of the shard.
    pub shard: u8,
    /// Requests served since mount.
    pub requests: u64,
    /// Requests being worked on.
    pub running_requests: u32,
    /// Inodes of the shard.
    pub inodes: u64,
    /// Inodes with state in memory.
    pub inodes_in_memory: u64,
    /// Levels of the tree.
    pub tree_height: u32,
    /// Memory of the tree's nodes, in bytes.
    pub tree_memory_bytes: u64,
    /// Free blocks of 4 KiB.
    pub free_blocks: u64,
    /// Free blocks not promised to anyone.
    pub available_blocks: u64,
    /// Freed blocks that wait for a checkpoint.
    pub pinned_blocks: u64,
    /// Of file contents.
    pub data: DataReport,
}

/// Figures of a volume.
#[derive(Clone, Debug, Serialize)]
pub struct VolumeReport {
    /// Identity.
    pub uuid: String,
    /// Label.
    pub label: String,
    /// Blocks of 4 KiB in all.
    pub blocks: u64,
    /// Free blocks, those that wait for a checkpoint included.
    pub free_blocks: u64,
    /// Blocks a writer can still get.
    pub available_blocks: u64,
    /// Data accepted and not on the device, in bytes.
    pub dirty_bytes: u64,
    /// The epoch that takes changes now.
    pub open_epoch: u64,
    /// The last durable epoch.
    pub durable_epoch: u64,
    /// Checkpoints since mount.
    pub checkpoints: u64,
    /// Their mean duration in nanoseconds.
    pub checkpoint_mean_ns: u64,
    /// Entries written to the intent log since mount.
    pub log_writes: u64,
    /// Damaged blocks met since mount.
    pub damage: u64,
    /// Why the volume is read-only, if it is.
    pub read_only: Option<String>,
    /// What was noticed at mount.
    pub warnings: Vec<String>,
    /// By shard.
    pub shards: Vec<ShardReport>,
}

impl VolumeShared {
    fn report(&self, shards: Vec<ShardReport>) -> VolumeReport {
        let space = self.space();
        let checkpoints = self.checkpoints.load(Ordering::Relaxed);
        VolumeReport {
            uuid: self.uuid.to_string(),
            label: self.label.clone(),
            blocks: space.blocks,
            free_blocks: space.free,
            available_blocks: space.available,
            dirty_bytes: space.dirty_bytes,
            open_epoch: self.open_epoch().get(),
            durable_epoch: self.durable_epoch().get(),
            checkpoints,
            checkpoint_mean_ns: self.checkpoint_nanos.load(Ordering::Relaxed) / checkpoints.max(1),
            log_writes: self.log_writes.load(Ordering::Relaxed),
            damage: self.damage.load(Ordering::Relaxed),
            read_only: self.failure.get().cloned(),
            warnings: self.warnings.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            shards,
        }
    }
}

#[cfg(test)]
mod tests;
