//! What the namespace of one shard asks of another's.
//!
//! Owns: [`NamespaceCall`] and [`NamespaceReply`], and who answers what. Operations put the same questions to their
//! own shard, which are then answered by a function call: one code path whether an operation spans shards or not.
//!
//! Calls that end something (apply, leave, abort, unlock) are answered in the peer's mailbox loop itself: they need
//! neither a task nor anything else that could have run out, so whatever holds a resource can always give it back.

use std::rc::Rc;

use crate::alloc::Priority;
use crate::error::FsError;
use crate::format::items::{EntryTarget, InodeRecord};
use crate::request::{Attributes, Name};
use crate::shard::Shard;
use crate::shard::message::{PeerCall, PeerReply};
use crate::types::{Epoch, InodeNr, ShardId};

use super::change::Change;
use super::transaction::{Joining, TransactionId};

/// A question to a shard's namespace.
#[derive(Debug)]
pub(crate) enum NamespaceCall {
    /// Attributes of an inode; counts one lookup on it. → [`NamespaceReply::Entry`]
    Enter {
        /// Inode.
        inode: InodeNr,
    },
    /// What a name stands for, whatever locks are held. → [`NamespaceReply::Found`]
    Find {
        /// Directory.
        directory: InodeNr,
        /// Name.
        name: Name,
    },
    /// The directory that holds a directory. → [`NamespaceReply::Inode`]
    Parent {
        /// Directory.
        directory: InodeNr,
    },
    /// A number for a new inode. → [`NamespaceReply::Inode`]
    NewInode,
    /// Writes a file's data. → [`NamespaceReply::Done`]
    Flush {
        /// File.
        inode: InodeNr,
    },
    /// Takes the volume's rename lock; a question to the first shard. → [`NamespaceReply::Done`]
    LockRename {
        /// For whom.
        transaction: TransactionId,
    },
    /// Gives it back. → [`NamespaceReply::Done`]
    UnlockRename {
        /// For whom.
        transaction: TransactionId,
    },
    /// Takes inode locks, exclusive, in the given order. → [`NamespaceReply::Locked`]
    Lock {
        /// For whom.
        transaction: TransactionId,
        /// Inodes, in ascending order.
        inodes: Vec<InodeNr>,
    },
    /// Gives all of a transaction's inode locks back. → [`NamespaceReply::Done`]
    Unlock {
        /// Whose.
        transaction: TransactionId,
    },
    /// Makes sure that changes will commit. → [`NamespaceReply::Done`]
    Prepare {
        /// Of which transaction.
        transaction: TransactionId,
        /// Changes of this shard's inodes.
        changes: Vec<Change>,
        /// Whether the reserve may be used.
        priority: Priority,
    },
    /// Stays in an epoch until the changes are applied. → [`NamespaceReply::Joined`]
    Join {
        /// Which.
        transaction: TransactionId,
        /// The epoch that its leader is in.
        epoch: Epoch,
    },
    /// Undoes a join. → [`NamespaceReply::Done`]
    Leave {
        /// Which.
        transaction: TransactionId,
    },
    /// Commits prepared changes in the epoch joined. → [`NamespaceReply::Done`]
    Apply {
        /// Which.
        transaction: TransactionId,
    },
    /// Forgets prepared changes. → [`NamespaceReply::Done`]
    Abort {
        /// Which.
        transaction: TransactionId,
    },
}

/// An answer.
#[derive(Debug)]
pub(crate) enum NamespaceReply {
    /// Done.
    Done,
    /// Attributes.
    Entry(Box<Attributes>),
    /// What the name stands for, if it exists.
    Found(Option<EntryTarget>),
    /// An inode number.
    Inode(InodeNr),
    /// Records of the inodes locked, in their order; `None` of those that do not exist.
    Locked(Vec<Option<InodeRecord>>),
    /// Whether the epoch could be joined.
    Joined(Joining),
}

impl Shard {
    /// Answers a call that needs no waiting; gives any other back.
    pub(crate) fn answer_namespace_now(
        self: &Rc<Self>,
        call: NamespaceCall,
    ) -> Result<Result<NamespaceReply, FsError>, NamespaceCall> {
        match call {
            NamespaceCall::Unlock { transaction } => self.unlock_here(transaction),
            NamespaceCall::UnlockRename { transaction } => self.unlock_rename_here(transaction),
            NamespaceCall::Leave { transaction } => self.leave_prepared(transaction),
            NamespaceCall::Abort { transaction } => self.abort_prepared(transaction),
            NamespaceCall::Apply { transaction } => {
                return Ok(self.apply_prepared(transaction).map(|()| NamespaceReply::Done));
            }
            NamespaceCall::NewInode => return Ok(self.new_inode_number().map(NamespaceReply::Inode)),
            waits => return Err(waits),
        }
        Ok(Ok(NamespaceReply::Done))
    }

    /// Answers a call.
    ///
    /// # Errors
    /// The operation's.
    pub(crate) async fn answer_namespace(
        self: &Rc<Self>,
        call: NamespaceCall,
    ) -> Result<NamespaceReply, FsError> {
        let call = match self.answer_namespace_now(call) {
            Ok(answer) => return answer,
            Err(call) => call,
        };
        match call {
            NamespaceCall::Enter { inode } => {
                Ok(NamespaceReply::Entry(Box::new(self.enter_here(inode).await?)))
            }
            NamespaceCall::Find { directory, name } => {
                Ok(NamespaceReply::Found(self.find_here(directory, &name).await?))
            }
            NamespaceCall::Parent { directory } => {
                Ok(NamespaceReply::Inode(self.parent_here(directory).await?))
            }
            NamespaceCall::Flush { inode } => {
                self.flush_here(inode).await?;
                Ok(NamespaceReply::Done)
            }
            NamespaceCall::LockRename { transaction } => {
                self.lock_rename_here(transaction).await;
                Ok(NamespaceReply::Done)
            }
            NamespaceCall::Lock { transaction, inodes } => {
                Ok(NamespaceReply::Locked(self.lock_here(transaction, &inodes).await?))
            }
            NamespaceCall::Prepare { transaction, changes, priority } => {
                self.prepare(transaction, changes, priority).await?;
                Ok(NamespaceReply::Done)
            }
            NamespaceCall::Join { transaction, epoch } => {
                Ok(NamespaceReply::Joined(self.join_prepared(transaction, epoch).await))
            }
            NamespaceCall::NewInode
            | NamespaceCall::Unlock { .. }
            | NamespaceCall::UnlockRename { .. }
            | NamespaceCall::Leave { .. }
            | NamespaceCall::Abort { .. }
            | NamespaceCall::Apply { .. } => unreachable!("answered at once"),
        }
    }

    /// Puts a question to the namespace of `shard`, which may be this one.
    ///
    /// # Errors
    /// The answer's, or [`FsError::ShuttingDown`].
    pub(super) async fn ask(
        self: &Rc<Self>,
        shard: ShardId,
        call: NamespaceCall,
    ) -> Result<NamespaceReply, FsError> {
        if shard == self.id {
            return self.answer_namespace(call).await;
        }
        if shard.index() >= self.volume.shard_count() {
            return Err(FsError::NotFound);
        }
        match self.call(shard, PeerCall::Namespace(call)).await? {
            PeerReply::Namespace(reply) => Ok(reply),
            other => Err(misanswered(shard, &other)),
        }
    }

    /// Attributes of `inode`, on whatever shard; counts one lookup.
    pub(super) async fn enter(self: &Rc<Self>, inode: InodeNr) -> Result<Attributes, FsError> {
        match self.ask(inode.shard(), NamespaceCall::Enter { inode }).await? {
            NamespaceReply::Entry(attributes) => Ok(*attributes),
            other => Err(misanswered(inode.shard(), &other)),
        }
    }

    /// What `name` stands for in `directory`, on whatever shard.
    pub(super) async fn find(
        self: &Rc<Self>,
        directory: InodeNr,
        name: &Name,
    ) -> Result<Option<EntryTarget>, FsError> {
        let call = NamespaceCall::Find { directory, name: name.clone() };
        match self.ask(directory.shard(), call).await? {
            NamespaceReply::Found(found) => Ok(found),
            other => Err(misanswered(directory.shard(), &other)),
        }
    }

    /// The directory that holds `directory`.
    pub(super) async fn parent_of(self: &Rc<Self>, directory: InodeNr) -> Result<InodeNr, FsError> {
        match self.ask(directory.shard(), NamespaceCall::Parent { directory }).await? {
            NamespaceReply::Inode(parent) => Ok(parent),
            other => Err(misanswered(directory.shard(), &other)),
        }
    }

    /// A number for a new inode of `shard`.
    pub(super) async fn new_inode_of(self: &Rc<Self>, shard: ShardId) -> Result<InodeNr, FsError> {
        match self.ask(shard, NamespaceCall::NewInode).await? {
            NamespaceReply::Inode(inode) => Ok(inode),
            other => Err(misanswered(shard, &other)),
        }
    }
}

/// The error of an answer that does not fit its question. It cannot happen, and a panic would take all shards of the
/// reactor along.
pub(super) fn misanswered(shard: ShardId, answer: &dyn std::fmt::Debug) -> FsError {
    FsError::Io(format!("shard {shard} gave a wrong answer: {answer:?}"))
}
