//! Committing an operation's changes: on one shard, or on several in the same epoch.
//!
//! Owns: [`Shard::commit_changes`], the protocol between shards, and the changes prepared here.
//!
//! A transaction that spans shards is led by the shard that runs the operation, which holds the locks of all inodes
//! concerned:
//!
//! | step | on each participant | may fail | then |
//! |---|---|---|---|
//! | prepare | space reserved; the plan rehearsed, which finds every error and brings every node into memory; nodes stay there from now on | yes | abort all |
//! | join | the shard stays in the leader's epoch | it may be past it: rejoin | all leave, and join the newer epoch |
//! | apply | plan and commit in one step, leave the epoch | no | |
//! | unlock | | no | |
//!
//! | state of a participant | prepare | join | leave | apply | abort |
//! |---|---|---|---|---|---|
//! | none | prepared | – | – | – | none |
//! | prepared | – | joined, or prepared (rejoin) | prepared | – | none |
//! | joined | – | – | prepared | none, committed | none |
//!
//! Invariants:
//! - between joining and leaving an epoch a transaction waits for nothing but the answers of its participants, and
//!   those wait at most for transactions that are joined already; so a freeze never waits long;
//! - all parts are committed in one epoch, and a superblock names one epoch of all shards, so after a crash a
//!   transaction happened on all its shards or on none;
//! - what a plan looks up is held still by locks, and by keys; nodes in memory stay there. So applying cannot fail. Should
//!   it fail all the same, the volume fails before its epoch can close: what is half done never becomes durable.
//!
//! # Legal crash outcomes
//! All of a transaction's changes, or none.

use std::collections::BTreeMap;
use std::rc::Rc;

use crate::alloc::{Priority, Reservation};
use crate::error::FsError;
use crate::planted::{Bug, is_planted};
use crate::shard::transact::Credit;
use crate::shard::{NodeHold, Shard};
use crate::types::{Epoch, ShardId};

use super::change::{Change, Effects, plan_changes};
use super::peer::{NamespaceCall, NamespaceReply, misanswered};

/// Names a transaction while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct TransactionId {
    leader: ShardId,
    number: u64,
}

/// Whether a participant could join the leader's epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Joining {
    /// It stays in the epoch until it applies or leaves.
    Joined,
    /// It is past the epoch: the leader has to begin again in a newer one.
    Rejoin,
}

/// Changes of a transaction that are sure to commit.
pub(crate) struct Prepared {
    changes: Vec<Change>,
    reservation: Reservation,
    joined: Option<Epoch>,
    _hold: NodeHold,
}

fn items_of(changes: &[Change]) -> u32 {
    changes.iter().map(Change::items).sum()
}

impl Shard {
    /// A name for a new transaction that this shard leads.
    pub(crate) fn new_transaction(&self) -> TransactionId {
        let number = self.names.next_transaction.get();
        self.names.next_transaction.set(number + 1);
        TransactionId { leader: self.id, number }
    }

    /// Commits `changes`, whose inodes the caller has locked, all or none.
    ///
    /// # Errors
    /// What stands against one of them, [`FsError::NoSpace`], [`FsError::ReadOnly`]; then nothing has changed.
    pub(crate) async fn commit_changes(
        self: &Rc<Self>,
        transaction: TransactionId,
        changes: Vec<Change>,
        priority: Priority,
    ) -> Result<(), FsError> {
        if changes.iter().all(|change| change.shard() == self.id) {
            let credit = Credit { items: items_of(&changes), priority };
            let effects = self.transact(credit, |batch| plan_changes(batch, &changes)).await?;
            self.follow_up(effects);
            return Ok(());
        }
        let mut parts: BTreeMap<ShardId, Vec<Change>> = BTreeMap::new();
        for change in changes {
            parts.entry(change.shard()).or_default().push(change);
        }
        let shards: Vec<ShardId> = parts.keys().copied().collect();
        let prepared = self.prepare_all(transaction, parts, priority).await;
        let joined = match prepared {
            Ok(()) => self.join_all(transaction, &shards).await,
            Err(error) => Err(error),
        };
        if let Err(error) = joined {
            for shard in shards {
                self.end_quietly(shard, NamespaceCall::Abort { transaction }).await;
            }
            return Err(error);
        }
        self.apply_all(transaction, &shards).await
    }

    async fn prepare_all(
        self: &Rc<Self>,
        transaction: TransactionId,
        parts: BTreeMap<ShardId, Vec<Change>>,
        priority: Priority,
    ) -> Result<(), FsError> {
        for (shard, changes) in parts {
            self.ask(shard, NamespaceCall::Prepare { transaction, changes, priority }).await?;
        }
        self.volume.check_writable()
    }

    /// Brings all participants into one epoch. Every repetition has seen the volume's epoch move on, which takes a
    /// whole checkpoint.
    async fn join_all(
        self: &Rc<Self>,
        transaction: TransactionId,
        shards: &[ShardId],
    ) -> Result<(), FsError> {
        loop {
            // The leader stays in the epoch itself, whether it takes part or not, so that the epoch cannot close
            // while others still join it.
            let epoch = self.join_epoch().await;
            let outcome = self.join_each(transaction, shards, epoch).await;
            self.leave_epoch();
            match outcome {
                Ok(Joining::Joined) => return Ok(()),
                Ok(Joining::Rejoin) => self.ctx.yield_now().await,
                Err(error) => return Err(error),
            }
        }
    }

    async fn join_each(
        self: &Rc<Self>,
        transaction: TransactionId,
        shards: &[ShardId],
        epoch: Epoch,
    ) -> Result<Joining, FsError> {
        let mut outcome = Ok(Joining::Joined);
        let mut asked = Vec::with_capacity(shards.len());
        for shard in shards {
            let answer = self.ask(*shard, NamespaceCall::Join { transaction, epoch }).await;
            outcome = match answer {
                Ok(NamespaceReply::Joined(joining)) => Ok(joining),
                Ok(other) => Err(misanswered(*shard, &other)),
                Err(error) => Err(error),
            };
            if outcome != Ok(Joining::Joined) {
                break;
            }
            asked.push(*shard);
        }
        if outcome != Ok(Joining::Joined) {
            for shard in asked {
                self.end_quietly(shard, NamespaceCall::Leave { transaction }).await;
            }
        }
        outcome
    }

    async fn apply_all(
        self: &Rc<Self>,
        transaction: TransactionId,
        shards: &[ShardId],
    ) -> Result<(), FsError> {
        let mut outcome = Ok(());
        for shard in shards {
            if is_planted(Bug::PartsInDifferentEpochs) {
                self.ctx.sleep(std::time::Duration::from_micros(500)).await;
            }
            if let Err(error) = self.ask(*shard, NamespaceCall::Apply { transaction }).await {
                self.volume.fail(&format!("shard {shard} could not apply a transaction: {error}"));
                outcome = Err(error);
            }
        }
        outcome
    }

    async fn end_quietly(self: &Rc<Self>, shard: ShardId, call: NamespaceCall) {
        if let Err(error) = self.ask(shard, call).await {
            // Only a shard that has ended does not answer, and what it held ended with it.
            tracing::debug!(%shard, %error, "the end of a transaction was not answered");
        }
    }

    /// Participant: makes sure that `changes` will commit.
    ///
    /// # Errors
    /// What stands against them.
    pub(super) async fn prepare(
        self: &Rc<Self>,
        transaction: TransactionId,
        changes: Vec<Change>,
        priority: Priority,
    ) -> Result<(), FsError> {
        let nodes = self.nodes_for(items_of(&changes));
        let reservation = self.reserve(0, nodes, priority).await?;
        let hold = self.hold_nodes();
        self.rehearse(|batch| plan_changes(batch, &changes)).await?;
        let prepared = Prepared { changes, reservation, joined: None, _hold: hold };
        let previous = self.names.prepared.borrow_mut().insert(transaction, prepared);
        assert!(previous.is_none(), "a transaction is prepared once on a shard");
        Ok(())
    }

    /// Participant: joins the leader's epoch.
    pub(super) async fn join_prepared(&self, transaction: TransactionId, epoch: Epoch) -> Joining {
        if !self.join_epoch_of_leader(epoch).await {
            return Joining::Rejoin;
        }
        let mut table = self.names.prepared.borrow_mut();
        let prepared = table.get_mut(&transaction).expect("a leader prepares before it joins");
        let previous = prepared.joined.replace(epoch);
        assert!(previous.is_none(), "a leader lets everyone leave before it joins again");
        if is_planted(Bug::PartsInDifferentEpochs) {
            self.leave_epoch();
        }
        Joining::Joined
    }

    /// Participant: leaves the epoch without having applied anything.
    pub(super) fn leave_prepared(&self, transaction: TransactionId) {
        let mut table = self.names.prepared.borrow_mut();
        let joined = table.get_mut(&transaction).and_then(|prepared| prepared.joined.take());
        drop(table);
        if joined.is_some() && !is_planted(Bug::PartsInDifferentEpochs) {
            self.leave_epoch();
        }
    }

    /// Participant: forgets what it prepared, if it did.
    pub(super) fn abort_prepared(&self, transaction: TransactionId) {
        self.leave_prepared(transaction);
        drop(self.names.prepared.borrow_mut().remove(&transaction));
    }

    /// Participant: commits what it prepared.
    ///
    /// # Errors
    /// Should it fail against all expectation: the volume is read-only then.
    pub(super) fn apply_prepared(self: &Rc<Self>, transaction: TransactionId) -> Result<(), FsError> {
        let prepared = self.names.prepared.borrow_mut().remove(&transaction);
        let mut prepared = prepared.expect("a leader prepares before it applies");
        let epoch = prepared.joined.take().expect("a leader joins before it applies");
        let late = is_planted(Bug::PartsInDifferentEpochs);
        let epoch = if late { self.epochs.current() } else { epoch };
        let changes = &prepared.changes;
        let committed =
            self.try_commit(epoch, &mut prepared.reservation, &mut |batch| plan_changes(batch, changes));
        let outcome = match committed {
            Ok(effects) => {
                self.follow_up(effects);
                Ok(())
            }
            Err(interrupt) => {
                let reason = format!("a prepared transaction could not be applied: {interrupt:?}");
                self.volume.fail(&reason);
                Err(FsError::Io(reason))
            }
        };
        if !late {
            self.leave_epoch();
        }
        outcome
    }

    /// What follows in memory once changes are committed; in the same step as the commit.
    fn follow_up(self: &Rc<Self>, effects: Effects) {
        self.inode_count.set(self.inode_count.get() + effects.created);
        for inode in effects.orphans {
            self.note_orphan(inode);
        }
    }
}
