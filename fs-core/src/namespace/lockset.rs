//! Locks of the inodes of an operation, on whatever shards they live.
//!
//! Owns: [`Locks`], taken in (shard, inode) order with one message a shard; the table of locks held here for
//! transactions of other shards; the volume's rename lock.
//!
//! | lock | order | where |
//! |---|---|---|
//! | rename lock of the volume ([`RenameClass`]) | 0 | first shard |
//! | inode lock | 1, then shard, then inode | the inode's shard |
//!
//! The order needs no distinction between directories and other inodes, because an operation looks names up before it
//! locks and again afterwards: it knows all inodes when it begins to lock, and begins anew if a name has changed its
//! meaning meanwhile. That happens only when another operation has succeeded, so somebody always gets ahead.
//!
//! Invariant: whoever waits for a lock of the set holds only earlier ones, and no epoch, range or page.
//!
//! Excludes: what the locks protect (the operations).

use std::collections::BTreeMap;
use std::rc::Rc;

use crate::error::FsError;
use crate::format::items::InodeRecord;
use crate::locks::{Guard, InodeClass, InodeGuard, LockClass, LockOrder};
use crate::shard::{Inode, Shard};
use crate::types::{InodeNr, ShardId};

use super::inode;
use super::peer::{NamespaceCall, NamespaceReply, misanswered};
use super::transaction::TransactionId;

/// The lock under which directories change their places: without it two renames could make a cycle.
pub(crate) enum RenameClass {}

impl LockClass for RenameClass {
    const RANK: u8 = 0;
    const NAME: &'static str = "rename lock";
}

/// The rename lock, held.
pub(crate) type RenameGuard = Guard<RenameClass>;

/// Inode locks held on this shard for one transaction.
pub(crate) type HeldLocks = Vec<HeldLock>;

/// One inode lock, held. The inode stays in the shard's table as long as this lives: its lock would otherwise be made
/// anew, free, for the next who asks.
pub(crate) struct HeldLock {
    state: Rc<Inode>,
    guard: InodeGuard,
}

/// The locks of one operation. Ends with [`Shard::unlock`].
#[must_use = "locks on other shards are given back by a message only"]
pub(crate) struct Locks {
    transaction: TransactionId,
    shards: Vec<ShardId>,
    records: BTreeMap<InodeNr, InodeRecord>,
}

impl Locks {
    /// The transaction that holds them.
    pub(super) fn transaction(&self) -> TransactionId {
        self.transaction
    }

    /// The record of a locked inode, as of when it was locked: what locks hold still is true until they end.
    ///
    /// # Errors
    /// [`FsError::NotFound`] if the inode does not exist.
    pub(super) fn record(&self, inode: InodeNr) -> Result<&InodeRecord, FsError> {
        self.records.get(&inode).ok_or(FsError::NotFound)
    }
}

impl Shard {
    /// Takes the exclusive locks of `inodes`, in whatever order they are given.
    ///
    /// # Errors
    /// [`FsError::NotFound`] for an inode of a shard that does not exist; what stood against reading the records.
    pub(super) async fn lock(
        self: &Rc<Self>,
        transaction: TransactionId,
        inodes: impl IntoIterator<Item = InodeNr>,
    ) -> Result<Locks, FsError> {
        let mut inodes: Vec<InodeNr> = inodes.into_iter().collect();
        inodes.sort_by_key(|inode| (inode.shard(), *inode));
        inodes.dedup();
        let mut order = LockOrder::new();
        let mut locks = Locks { transaction, shards: Vec::new(), records: BTreeMap::new() };
        for group in inodes.chunk_by(|left, right| left.shard() == right.shard()) {
            for inode in group {
                order.enter::<InodeClass>(*inode, 0);
            }
            if let Err(error) = self.lock_on(&mut locks, group).await {
                self.unlock(locks).await;
                return Err(error);
            }
        }
        Ok(locks)
    }

    async fn lock_on(self: &Rc<Self>, locks: &mut Locks, inodes: &[InodeNr]) -> Result<(), FsError> {
        let shard = inodes[0].shard();
        let call = NamespaceCall::Lock { transaction: locks.transaction, inodes: inodes.to_vec() };
        match self.ask(shard, call).await? {
            NamespaceReply::Locked(records) => {
                locks.shards.push(shard);
                let found = inodes.iter().zip(records);
                locks.records.extend(found.filter_map(|(inode, record)| Some((*inode, record?))));
                Ok(())
            }
            other => Err(misanswered(shard, &other)),
        }
    }

    /// Gives the locks back.
    pub(super) async fn unlock(self: &Rc<Self>, locks: Locks) {
        let transaction = locks.transaction;
        for shard in locks.shards.into_iter().rev() {
            if let Err(error) = self.ask(shard, NamespaceCall::Unlock { transaction }).await {
                // Only a shard that has ended does not answer, and its locks ended with it.
                tracing::debug!(%shard, %error, "unlock not answered");
            }
        }
    }

    /// Takes locks of this shard's inodes for a transaction of any shard.
    pub(super) async fn lock_here(
        &self,
        transaction: TransactionId,
        inodes: &[InodeNr],
    ) -> Result<Vec<Option<InodeRecord>>, FsError> {
        let mut order = LockOrder::new();
        let mut guards = HeldLocks::with_capacity(inodes.len());
        for inode in inodes {
            let state = self.inode(*inode);
            let guard = state.lock.exclusive(&mut order).await;
            guards.push(HeldLock { state, guard });
        }
        let records =
            self.view(|batch| inodes.iter().map(|inode| inode::find(batch, *inode)).collect()).await;
        let records = match records {
            Ok(records) => records,
            Err(error) => {
                self.give_back(guards);
                return Err(error);
            }
        };
        let previous = self.names.held.borrow_mut().insert(transaction, guards);
        assert!(previous.is_none(), "a transaction locks the inodes of a shard at once");
        Ok(records)
    }

    /// Gives a transaction's locks on this shard back.
    pub(super) fn unlock_here(&self, transaction: TransactionId) {
        let guards = self.names.held.borrow_mut().remove(&transaction);
        self.give_back(guards.unwrap_or_default());
    }

    fn give_back(&self, guards: HeldLocks) {
        for HeldLock { state, guard } in guards.into_iter().rev() {
            drop(guard);
            self.release(state);
        }
    }

    /// Takes the shared lock of a directory of this shard.
    pub(super) async fn lock_shared(&self, directory: InodeNr) -> HeldLock {
        let state = self.inode(directory);
        let guard = state.lock.shared(&mut LockOrder::new()).await;
        HeldLock { state, guard }
    }

    /// Gives one lock back.
    pub(super) fn unlock_one(&self, held: HeldLock) {
        self.give_back(vec![held]);
    }

    /// Gives an inode's volatile state back.
    pub(super) fn release(&self, state: Rc<Inode>) {
        let nr = state.nr;
        drop(state);
        self.release_inode(nr);
    }

    /// Takes the volume's rename lock.
    ///
    /// # Errors
    /// [`FsError::ShuttingDown`].
    pub(super) async fn lock_rename(self: &Rc<Self>, transaction: TransactionId) -> Result<(), FsError> {
        let first = InodeNr::ROOT.shard();
        self.ask(first, NamespaceCall::LockRename { transaction }).await.map(|_| ())
    }

    /// Gives the volume's rename lock back.
    pub(super) async fn unlock_rename(self: &Rc<Self>, transaction: TransactionId) {
        let first = InodeNr::ROOT.shard();
        if let Err(error) = self.ask(first, NamespaceCall::UnlockRename { transaction }).await {
            tracing::debug!(%error, "unlock not answered");
        }
    }

    /// Takes the volume's rename lock, on the first shard.
    pub(super) async fn lock_rename_here(&self, transaction: TransactionId) {
        let guard = self.names.rename_lock.exclusive(&mut LockOrder::new()).await;
        let previous = self.names.rename_held.borrow_mut().replace((transaction, guard));
        assert!(previous.is_none(), "the rename lock is exclusive");
    }

    /// Gives the volume's rename lock back, on the first shard.
    pub(super) fn unlock_rename_here(&self, transaction: TransactionId) {
        let held = self.names.rename_held.borrow_mut().take();
        assert!(
            held.is_some_and(|(holder, _)| holder == transaction),
            "only its holder gives the rename lock back"
        );
    }
}
