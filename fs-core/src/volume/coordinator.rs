//! The coordinator: closes epochs and makes them durable, for all shards of a volume at once.
//!
//! Owns: commits, checkpoints, the commit interval, the end of the intent log, and the superblock. One task on the
//! first reactor makes epochs durable one at a time; requests that arrive meanwhile share the next.
//!
//! A **commit** (fsync) writes what an epoch changed to the intent log:
//!
//! | step | what | why in this order |
//! |---|---|---|
//! | 1 | raise the open epoch from N to N+1 | later transactions belong to N+1 |
//! | 2 | every shard applies what it joined in N, and cuts its records off | nothing of N+1 is among them |
//! | 3 | flush, if data was written since the last flush | the log must not name what a power cut could take back |
//! | 4 | one entry for all shards, in one durable write | the commit point |
//!
//! A **checkpoint** writes the trees themselves. It comes instead of a commit when there is no log yet, when the records
//! do not fit or do not tell all, when space is wanted, and at unmount; and after a commit that has filled half of the log.
//!
//! | step | what | why in this order |
//! |---|---|---|
//! | 1 | raise the open epoch from N to N+1 | later transactions belong to N+1 |
//! | 2 | every shard applies what it joined in N, freezes, writes nodes and bitmaps | the new state, beside the old one |
//! | 3 | flush | no superblock may name what a power cut could take back; this covers the data of N too |
//! | 4 | superblock of the next generation to both rings, each write durable | the commit point; the log begins anew in its other segment |
//! | 5 | tell the shards that N is durable | what was freed before N may be used again |
//!
//! # Legal crash outcomes
//! Before the write of step 4 is on the medium: the state of the last commit or checkpoint. After it: the state of N on
//! every shard. Never a mixture: one entry holds the changes of all shards, one block names all roots.

use std::sync::Arc;

use futures_util::future::join_all;
use reactor::{Context, OneshotSender, Receiver};

use crate::disk::VolumeDisk;
use crate::error::FsError;
use crate::format::log::MAX_SEGMENT_BLOCKS;
use crate::format::superblock::Superblock;
use crate::log::{Found, LogWriter};
use crate::planted::{Bug, is_planted};
use crate::shard::checkpoint::ShardRoot;
use crate::shard::message::{PeerCall, PeerReply};
use crate::superblock::{self, LogArea};
use crate::types::{Epoch, ShardId};

use super::resize::{Resize, ResizeError};
use super::{Closing, VolumeShared};

/// Checkpoint requests that may wait at once.
pub(super) const CHECKPOINT_SLOTS: usize = 4096;

/// A segment of the log is this part of the volume, within limits.
const LOG_PART: u64 = 1024;

/// Blocks of a segment at least.
const MIN_SEGMENT_BLOCKS: u32 = 8;

/// What the coordinator's mailbox holds.
pub(crate) enum CoordinatorMessage {
    /// Make everything durable that was committed before; answer when it is.
    Commit(OneshotSender<Result<(), FsError>>),
    /// The same by a checkpoint.
    Checkpoint(OneshotSender<Result<(), FsError>>),
    /// Change the volume's size.
    Resize(Resize, OneshotSender<Result<(), ResizeError>>),
    /// End.
    Stop,
}

/// The coordinator's own state.
pub(super) struct Coordinator {
    ctx: Context,
    pub(super) disk: VolumeDisk,
    pub(super) volume: Arc<VolumeShared>,
    pub(super) superblock: Superblock,
    log: Option<LogWriter>,
}

/// How an epoch is to be made durable; the greater way does what the lesser does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    Commit,
    Checkpoint,
}

impl Coordinator {
    /// A coordinator of a volume in the state of `superblock`, whose log is empty or not yet replayed.
    pub(super) fn new(
        ctx: Context,
        disk: VolumeDisk,
        volume: Arc<VolumeShared>,
        superblock: Superblock,
    ) -> Self {
        let mut coordinator = Self { ctx, disk, volume, superblock, log: None };
        coordinator.begin_log();
        coordinator
    }

    /// Brings the shards to the state that the log describes, and makes it the superblock's. A damaged log leaves
    /// the volume read-only, and the device as it is.
    ///
    /// # Errors
    /// What cannot be replayed; the device's.
    pub(super) async fn replay(&mut self, log: &Found) -> Result<(), FsError> {
        self.log = None;
        self.all_shards(|shard| PeerCall::Replay(log.sections_of(shard))).await?;
        match &log.damage {
            Some(damage) => self.volume.fail(damage),
            None => self.checkpoint().await?,
        }
        Ok(())
    }

    /// Serves requests until told to stop.
    pub(super) async fn run(mut self, mut mailbox: Receiver<CoordinatorMessage>) {
        loop {
            let mut waiting = Vec::new();
            let mut resizes = Vec::new();
            let mut way = Way::Commit;
            let mut stop = false;
            let mut next = mailbox.recv().await;
            loop {
                match next {
                    Some(CoordinatorMessage::Commit(reply)) => waiting.push(reply),
                    Some(CoordinatorMessage::Checkpoint(reply)) => {
                        way = Way::Checkpoint;
                        waiting.push(reply);
                    }
                    Some(CoordinatorMessage::Resize(resize, reply)) => resizes.push((resize, reply)),
                    Some(CoordinatorMessage::Stop) => stop = true,
                    None => break,
                }
                if waiting.len() == CHECKPOINT_SLOTS {
                    break;
                }
                next = mailbox.try_recv();
            }
            if waiting.is_empty() && resizes.is_empty() {
                return;
            }
            if !waiting.is_empty() {
                let result = self.make_durable(way).await;
                for reply in waiting {
                    // Whoever has stopped waiting needs no answer.
                    let _abandoned = reply.send(result.clone());
                }
            }
            for (resize, reply) in resizes {
                let _abandoned = reply.send(self.resize(resize).await);
            }
            if stop {
                return;
            }
            if self.log.is_some_and(|log| log.is_half_full()) && self.volume.check_writable().is_ok() {
                // If it fails, the volume has: whoever comes next is told.
                let _told_later = self.make_durable(Way::Checkpoint).await;
            }
        }
    }

    async fn make_durable(&mut self, way: Way) -> Result<(), FsError> {
        self.volume.check_writable()?;
        let nothing_new = self.volume.last_commit() <= self.volume.durable_epoch();
        if nothing_new && (way == Way::Commit || self.log.is_none_or(|log| log.is_empty())) {
            return Ok(());
        }
        if way == Way::Commit {
            match self.commit().await {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) => {
                    self.volume.fail(&format!("a commit failed: {error}"));
                    return Err(error);
                }
            }
        }
        let started = self.ctx.now();
        let result = self.checkpoint().await;
        match &result {
            Ok(()) => self.volume.note_checkpoint(self.ctx.now().duration_since(started)),
            Err(error) => self.volume.fail(&format!("a checkpoint failed: {error}")),
        }
        result
    }

    /// Makes the open epoch durable by way of the log; `false` if that cannot be, and it is as if it had not been tried.
    async fn commit(&mut self) -> Result<bool, FsError> {
        let Some(log) = &mut self.log else { return Ok(false) };
        self.volume.set_closing(Closing::Log);
        let epoch = self.volume.close_epoch();
        let mut sections = Vec::new();
        for (shard, reply) in call_all(&self.volume, |_| PeerCall::CutLog(epoch)).await? {
            let PeerReply::Cut(cut) = reply else {
                return Err(FsError::Io(format!("shard {shard} gave a wrong answer to a commit")));
            };
            let Some(section) = cut.section else { return Ok(false) };
            if !section.records.is_empty() {
                sections.push(section);
            }
        }
        if !log.has_room(&sections) {
            return Ok(false);
        }
        if self.volume.take_data_written() && !is_planted(Bug::LogBeforeFlush) {
            self.disk.flush().await?;
        }
        // What failed meanwhile may have left this very epoch half done: it must not become durable.
        self.volume.check_writable()?;
        if !sections.is_empty() {
            log.append(&self.disk, epoch, &sections).await?;
            self.volume.note_log_write();
        }
        self.volume.set_durable(epoch);
        Ok(true)
    }

    pub(super) async fn checkpoint(&mut self) -> Result<(), FsError> {
        let area = match self.superblock.log {
            Some(area) => Some(self.move_log(area.switched()).await?),
            None => self.make_log().await?,
        };
        self.volume.set_closing(Closing::Checkpoint);
        let epoch = self.volume.close_epoch();
        let roots = self.all_shards(|_| PeerCall::Checkpoint(epoch)).await?;
        let mut next = self.superblock.clone();
        next.generation = next.generation.next().expect("2⁶⁴ superblocks are not written");
        next.epoch = epoch;
        next.log = area;
        for (shard, reply) in roots {
            let PeerReply::Frozen(root) = reply else {
                return Err(FsError::Io(format!("shard {shard} gave a wrong answer to a checkpoint")));
            };
            set_root(&mut next, shard, root);
        }
        self.volume.take_data_written();
        if !is_planted(Bug::SuperblockBeforeFlush) {
            self.disk.flush().await?;
        }
        // What failed meanwhile may have left this very epoch half done: it must not become durable.
        self.volume.check_writable()?;
        let written = superblock::write(&self.disk, &next).await;
        if let Some(warning) = written.map_err(|error| FsError::Io(error.to_string()))? {
            tracing::warn!(%warning);
            self.volume.note_warning(warning.to_string());
        }
        self.superblock = next;
        self.begin_log();
        self.volume.set_durable(epoch);
        self.all_shards(|_| PeerCall::Durable(epoch)).await?;
        Ok(())
    }

    /// The log begins anew.
    fn begin_log(&mut self) {
        self.log = LogWriter::of(&self.superblock);
        self.volume.set_log_area(self.superblock.log);
    }

    /// Gives the segment that comes next another place, if its group is being emptied. The one before is still needed: until the
    /// superblock is durable by a crash, after that by whoever finds that superblock damaged.
    async fn move_log(&self, mut area: LogArea) -> Result<LogArea, FsError> {
        let call = PeerCall::MoveLog(area.head(), area.blocks);
        let PeerReply::LogMoved(moved) = self.volume.call_shard(ShardId::FIRST, call).await? else {
            return Err(FsError::Io("shard 0 gave a wrong answer to a checkpoint".to_owned()));
        };
        if let Some(start) = moved {
            area.segments[usize::from(area.current & 1)] = start;
        }
        Ok(area)
    }

    /// Takes the place of the log, if there is room for it. The checkpoint that follows makes that durable.
    async fn make_log(&self) -> Result<Option<LogArea>, FsError> {
        let blocks = self.superblock.layout.blocks().get() / LOG_PART;
        let blocks = (blocks as u32).clamp(MIN_SEGMENT_BLOCKS, MAX_SEGMENT_BLOCKS);
        let reply = self.volume.call_shard(ShardId::FIRST, PeerCall::MakeLog(blocks)).await?;
        let PeerReply::Log(segments) = reply else {
            return Err(FsError::Io("shard 0 gave a wrong answer to a checkpoint".to_owned()));
        };
        Ok(segments.map(|segments| LogArea { segments, blocks, current: 0 }))
    }

    pub(super) async fn all_shards(
        &self,
        call: impl Fn(ShardId) -> PeerCall,
    ) -> Result<Vec<(ShardId, PeerReply)>, FsError> {
        call_all(&self.volume, call).await
    }
}

/// Makes one call of every shard at once; the first error wins, after all have answered.
pub(crate) async fn call_all(
    volume: &VolumeShared,
    call: impl Fn(ShardId) -> PeerCall,
) -> Result<Vec<(ShardId, PeerReply)>, FsError> {
    let calls = volume.shard_ids().map(|shard| {
        let call = call(shard);
        async move { volume.call_shard(shard, call).await.map(|reply| (shard, reply)) }
    });
    join_all(calls).await.into_iter().collect()
}

/// Records a shard's root in a superblock.
pub(super) fn set_root(superblock: &mut Superblock, shard: ShardId, root: ShardRoot) {
    let slot = &mut superblock.shards[shard.index()];
    slot.tree = root.tree;
    slot.next_inode = root.next_inode;
    slot.inodes = root.inodes;
    superblock.group_digest = superblock.group_digest.wrapping_add(root.digest_delta);
}

/// Writes dirty data and checkpoints at every commit interval, so that nothing older is lost even without fsync.
pub(super) async fn keep_commit_interval(
    ctx: Context,
    volume: Arc<VolumeShared>,
    interval: std::time::Duration,
) {
    while !volume.is_stopping() {
        ctx.sleep(interval).await;
        if volume.is_stopping() || volume.check_writable().is_err() {
            continue;
        }
        if let Err(error) = volume.sync_volume().await {
            tracing::warn!(%error, "the periodic commit failed");
        }
    }
}

/// The epoch that a mount opens when `durable` is the last that is durable.
pub(super) fn epoch_after(durable: Epoch) -> Epoch {
    durable.next().expect("2⁶⁴ epochs do not pass")
}
