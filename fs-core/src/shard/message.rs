//! What reaches a shard: requests of front ends, and calls of its peers.
//!
//! Owns: the message types and [`Shard::call`]. Two mailboxes keep the two apart: requests may have to wait for a
//! slot, calls of peers never wait behind them. Replies travel by oneshot channels, which need no mailbox slot at
//! all, and a shard answers calls in tasks of their own, so it always goes on emptying its mailbox: two shards with
//! full mailboxes cannot wait for each other.

use reactor::{OneshotSender, oneshot};

use crate::alloc::GroupTransfer;
use crate::data::{LendingCall, LendingReply};
use crate::error::FsError;
use crate::format::group::VolumeLayout;
use crate::format::log::Section;
use crate::namespace::{NamespaceCall, NamespaceReply};
use crate::request::{Reply, Request};
use crate::types::{BlockNr, Epoch, FileOffset, InodeNr, ShardId};
use crate::volume::ShardReport;

use super::Shard;
use super::checkpoint::ShardRoot;
use super::log::LogCut;

/// Takes a request's result, on the shard's reactor.
pub(crate) type ReplyTo = Box<dyn FnOnce(Result<Reply, FsError>) + Send>;

/// What a shard's request mailbox holds.
pub(crate) enum RequestMessage {
    /// A request and who wants to know its result.
    Serve(Request, ReplyTo),
    /// Nothing comes after this.
    Stop,
}

/// What one shard (or the volume's coordinator) asks of another.
#[derive(Debug)]
pub(crate) enum PeerCall {
    /// Freeze this epoch, once its transactions are applied, and write what it changed. → [`PeerReply::Frozen`]
    Checkpoint(Epoch),
    /// End this epoch, once its transactions are applied, and tell what it changed. → [`PeerReply::Cut`]
    CutLog(Epoch),
    /// Take two segments of so many blocks for the intent log. → [`PeerReply::Log`]
    MakeLog(u32),
    /// Give another place to a segment of so many blocks, which is in no superblock's use, if its group is closed. → [`PeerReply::LogMoved`]
    MoveLog(BlockNr, u32),
    /// Do again what the log says. → [`PeerReply::Done`]
    Replay(Vec<Section>),
    /// The superblock of this epoch is durable. → [`PeerReply::Done`]
    Durable(Epoch),
    /// Read a file's bytes: inode, first byte, length. → [`PeerReply::Data`]
    Read(InodeNr, FileOffset, u32),
    /// Write all data accepted before now. → [`PeerReply::Done`]
    FlushData,
    /// Wait until unlinked inodes that nobody uses are deleted. → [`PeerReply::Done`]
    FinishDeletions,
    /// Give an empty allocation group away, one below this number. → [`PeerReply::Transfer`]
    SurrenderGroup(u64),
    /// A step of a change of the volume's size. → [`PeerReply::Resized`]
    Resize(ResizeStep),
    /// Finish what a crash interrupted. → [`PeerReply::Done`]
    Recover,
    /// → [`PeerReply::Report`]
    Report,
    /// End the shard's tasks. → [`PeerReply::Done`]
    Stop,
    /// The namespace's own. → [`PeerReply::Namespace`]
    Namespace(NamespaceCall),
    /// Clones between shards, and blocks that go back. → [`PeerReply::Lending`]
    Lending(LendingCall),
}

/// A step of a change of the volume's size. The coordinator takes it between two checkpoints.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ResizeStep {
    /// The volume ends further behind; of the new groups the shard takes every one whose number says so. Yields how many.
    Grow(VolumeLayout),
    /// Take the shard's groups from this one on out of hands, if all of them are closed and empty. Yields how many; with any that is not, none.
    Detach(u64),
    /// Take them back.
    Reattach,
    /// The volume ends before them. Yields their part in the digest of all groups.
    Shrink(VolumeLayout),
}

/// What a peer answers.
#[derive(Debug)]
pub(crate) enum PeerReply {
    /// Done.
    Done,
    /// Bytes.
    Data(Vec<u8>),
    /// The shard's root as of the epoch.
    Frozen(ShardRoot),
    /// What the epoch changed.
    Cut(LogCut),
    /// First blocks of the segments, if there was room.
    Log(Option<[BlockNr; 2]>),
    /// Where the segment is now, if it has moved.
    LogMoved(Option<BlockNr>),
    /// A group, if one could be spared.
    Transfer(Option<GroupTransfer>),
    /// What a step of a change of size has come to; `None` if it could not be. See [`ResizeStep`].
    Resized(Option<u64>),
    /// Figures.
    Report(Box<ShardReport>),
    /// The namespace's own.
    Namespace(NamespaceReply),
    /// To a [`PeerCall::Lending`].
    Lending(LendingReply),
}

/// A call in a shard's peer mailbox.
pub(crate) struct PeerMessage {
    /// What is asked.
    pub(crate) call: PeerCall,
    /// Where the answer goes.
    pub(crate) reply: OneshotSender<Result<PeerReply, FsError>>,
}

impl Shard {
    /// Asks `peer` and waits for its answer.
    ///
    /// # Errors
    /// The peer's error, or [`FsError::ShuttingDown`] if it has stopped.
    pub(crate) async fn call(&self, peer: ShardId, call: PeerCall) -> Result<PeerReply, FsError> {
        self.volume.call_shard(peer, call).await
    }
}

impl crate::volume::VolumeShared {
    /// Asks shard `peer`, from a task of any reactor.
    pub(crate) async fn call_shard(&self, peer: ShardId, call: PeerCall) -> Result<PeerReply, FsError> {
        let (reply, answer) = oneshot();
        let message = PeerMessage { call, reply };
        self.shard(peer).peers.send(message).await.map_err(|_| FsError::ShuttingDown)?;
        answer.await.map_err(|_| FsError::ShuttingDown)?
    }
}
