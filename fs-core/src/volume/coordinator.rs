//! The coordinator: closes epochs and makes them durable, for all shards of a volume at once.
//!
//! Owns: the checkpoint sequence, the commit interval, and the superblock. One task on the first reactor runs
//! checkpoints one at a time; requests that arrive meanwhile share the next one.
//!
//! | step | what | why in this order |
//! |---|---|---|
//! | 1 | raise the open epoch from N to N+1 | later transactions belong to N+1 |
//! | 2 | every shard applies what it joined in N, freezes, writes nodes and bitmaps | the new state, beside the old one |
//! | 3 | flush | no superblock may name what a power cut could take back; this covers the data of N too |
//! | 4 | superblock of the next generation to both rings, each write durable | the commit point |
//! | 5 | tell the shards that N is durable | what was freed before N may be used again |
//!
//! # Legal crash outcomes
//! Before the first superblock write of step 4 is on the medium: the state of the last checkpoint. After it: the
//! state of N on every shard. Never a mixture: one block names all roots. In this version an fsync is a checkpoint;
//! the intent log will make it cheaper and use the log head that the superblock already has.

use std::sync::Arc;

use futures_util::future::join_all;
use reactor::{Context, OneshotSender, Receiver};

use crate::disk::VolumeDisk;
use crate::error::FsError;
use crate::format::superblock::Superblock;
use crate::planted::{Bug, is_planted};
use crate::shard::checkpoint::ShardRoot;
use crate::shard::message::{PeerCall, PeerReply};
use crate::superblock;
use crate::types::{Epoch, ShardId};

use super::VolumeShared;

/// Checkpoint requests that may wait at once.
pub(super) const CHECKPOINT_SLOTS: usize = 4096;

/// What the coordinator's mailbox holds.
pub(crate) enum CoordinatorMessage {
    /// Make everything durable that was committed before; answer when it is.
    Checkpoint(OneshotSender<Result<(), FsError>>),
    /// End.
    Stop,
}

/// The coordinator's own state.
pub(super) struct Coordinator {
    pub(super) ctx: Context,
    pub(super) disk: VolumeDisk,
    pub(super) volume: Arc<VolumeShared>,
    pub(super) superblock: Superblock,
}

impl Coordinator {
    /// Serves checkpoint requests until told to stop.
    pub(super) async fn run(mut self, mut mailbox: Receiver<CoordinatorMessage>) {
        loop {
            let mut waiting = Vec::new();
            let mut stop = false;
            match mailbox.recv().await {
                Some(CoordinatorMessage::Checkpoint(reply)) => waiting.push(reply),
                Some(CoordinatorMessage::Stop) | None => return,
            }
            while waiting.len() < CHECKPOINT_SLOTS {
                match mailbox.try_recv() {
                    Some(CoordinatorMessage::Checkpoint(reply)) => waiting.push(reply),
                    Some(CoordinatorMessage::Stop) => stop = true,
                    None => break,
                }
            }
            let result = self.checkpoint_if_needed().await;
            for reply in waiting {
                // Whoever has stopped waiting needs no answer.
                let _abandoned = reply.send(result.clone());
            }
            if stop {
                return;
            }
        }
    }

    async fn checkpoint_if_needed(&mut self) -> Result<(), FsError> {
        self.volume.check_writable()?;
        if self.volume.last_commit() <= self.volume.durable_epoch() {
            return Ok(());
        }
        let started = self.ctx.now();
        let result = self.checkpoint().await;
        match &result {
            Ok(()) => self.volume.note_checkpoint(self.ctx.now().duration_since(started)),
            Err(error) => self.volume.fail(&format!("a checkpoint failed: {error}")),
        }
        result
    }

    async fn checkpoint(&mut self) -> Result<(), FsError> {
        let epoch = self.volume.close_epoch();
        let roots = self.all_shards(|_| PeerCall::Checkpoint(epoch)).await?;
        let mut next = self.superblock.clone();
        next.generation = next.generation.next().expect("2⁶⁴ superblocks are not written");
        next.epoch = epoch;
        for (shard, reply) in roots {
            let PeerReply::Frozen(root) = reply else {
                return Err(FsError::Io(format!("shard {shard} gave a wrong answer to a checkpoint")));
            };
            set_root(&mut next, shard, root);
        }
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
        self.volume.set_durable(epoch);
        self.all_shards(|_| PeerCall::Durable(epoch)).await?;
        Ok(())
    }

    async fn all_shards(
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

/// The epoch that a mount of `superblock` opens.
pub(super) fn first_epoch(superblock: &Superblock) -> Epoch {
    superblock.epoch.next().expect("2⁶⁴ epochs do not pass")
}
