//! Inodes without a name.
//!
//! Owns: what becomes of an inode when its last name goes: it stays usable as long as a front end holds a lookup on it,
//! then it is deleted, in bounded transactions that may draw on the reserve. Also the same after a crash.
//!
//! | state | on disk | last name goes | last lookup goes | deletion ends | mount |
//! |---|---|---|---|---|---|
//! | named | links > 0 | orphan, or doomed without lookups | named | – | named |
//! | orphan | links = 0, intent | – | doomed | – | doomed |
//! | doomed | links = 0, intent; extents and attributes fewer and fewer | – | – | gone | doomed |
//!
//! Invariants:
//! - an inode has an intent exactly as long as its link count is 0; both change in one transaction, and the inode goes
//!   in the same transaction as its intent;
//! - nobody can find a doomed inode: no entry names it, no front end knows it.
//!
//! # Legal crash outcomes
//! Every state above; a mount goes on with every intent it finds.

use std::rc::Rc;

use futures_util::future::FutureExt;

use crate::batch::{Batch, Plan};
use crate::error::FsError;
use crate::format::items::{INTENT, Intent, inode_key, intent_key, symlink_key};
use crate::format::node::Key;
use crate::locks::LockOrder;
use crate::shard::Shard;
use crate::shard::transact::Credit;
use crate::types::InodeNr;

use super::xattr;

/// Inodes that a shard deletes at once.
const MAX_DELETERS: u32 = 4;

/// Attribute items that one transaction deletes.
const XATTRS_AT_ONCE: u32 = 16;

/// Items of the last transaction of a deletion: inode, symlink target, intents.
const FINAL_ITEMS: u32 = 4;

/// Intents that recovery reads at once.
const INTENTS_AT_ONCE: usize = 256;

impl Shard {
    /// An inode of this shard has lost its last name; in the step of the commit.
    pub(super) fn note_orphan(self: &Rc<Self>, inode: InodeNr) {
        let used = self.inode_in_use(inode).is_some_and(|state| state.lookups.get() > 0);
        if used {
            self.names.orphans.borrow_mut().insert(inode);
        } else {
            self.delete_later(inode);
        }
    }

    /// A front end has given its last lookup of `inode` back.
    pub(super) fn forgotten(self: &Rc<Self>, inode: InodeNr) {
        if self.names.orphans.borrow_mut().remove(&inode) {
            self.delete_later(inode);
        } else {
            self.release_inode(inode);
        }
    }

    fn delete_later(self: &Rc<Self>, inode: InodeNr) {
        self.names.doomed.borrow_mut().push_back(inode);
        self.names.deletions.set(self.names.deletions.get() + 1);
        if self.names.deleters.get() >= MAX_DELETERS {
            return;
        }
        self.names.deleters.set(self.names.deleters.get() + 1);
        let shard = Rc::clone(self);
        if let Err(error) = self.ctx.spawn(async move { shard.delete_doomed().await }) {
            // The next deletion, or the next mount, takes care of it.
            self.names.deleters.set(self.names.deleters.get() - 1);
            tracing::warn!(shard = %self.id, %error, "deletion put off");
        }
    }

    async fn delete_doomed(self: &Rc<Self>) {
        loop {
            let next = self.names.doomed.borrow_mut().pop_front();
            let Some(inode) = next else { break };
            if let Err(error) = self.delete_inode(inode).await {
                // Its intent stays: the next mount tries again.
                tracing::warn!(shard = %self.id, %inode, %error, "an unlinked inode could not be deleted");
            }
            self.names.deletions.set(self.names.deletions.get() - 1);
            self.names.deleted.notify();
        }
        self.names.deleters.set(self.names.deleters.get() - 1);
    }

    /// Whether unlinked inodes are being deleted.
    pub(crate) fn has_deletions(&self) -> bool {
        self.names.deletions.get() > 0
    }

    /// Waits until the deletions that have begun by now, and those that begin meanwhile, have ended. For callers that
    /// hold no lock.
    pub(crate) async fn finish_deletions(&self) {
        while self.names.deletions.get() > 0 && self.names.deleters.get() > 0 {
            self.names.deleted.wait().await;
        }
    }

    async fn delete_inode(self: &Rc<Self>, inode: InodeNr) -> Result<(), FsError> {
        let state = self.inode(inode);
        // Whoever was still busy with the inode when its last name or lookup went ends first.
        drop(state.lock.exclusive(&mut LockOrder::new()).await);
        let deleted = self.delete_items(inode).await;
        if deleted.is_ok() {
            self.inode_count.set(self.inode_count.get().saturating_sub(1));
            self.forget_inode(inode);
        }
        self.release(state);
        deleted
    }

    async fn delete_items(self: &Rc<Self>, inode: InodeNr) -> Result<(), FsError> {
        self.drop_all_extents(inode).await?;
        self.drop_set_aside(inode).await?;
        let credit = Credit::reserve(XATTRS_AT_ONCE);
        while self.transact(credit, |batch| xattr::delete_some(batch, inode, XATTRS_AT_ONCE)).await? {}
        self.transact(Credit::reserve(FINAL_ITEMS), |batch| delete_record(batch, inode)).await
    }

    /// Takes up what the last mount did not end: deletions and truncations go on in the background, and a file that is
    /// being truncated is locked when this returns. To be awaited before the first request is served: an intent that
    /// is found later may be one that somebody is busy with.
    ///
    /// # Errors
    /// What stood against reading the intents.
    pub(crate) async fn recover_orphans(self: &Rc<Self>) -> Result<(), FsError> {
        let mut orphans = Vec::new();
        let mut next = Some(Key::new(0, INTENT, 0, 0));
        while let Some(from) = next {
            let found = self.view(|batch| intents(batch, from)).await?;
            next = found.last().and_then(|(key, _)| key.successor());
            for (key, intent) in found {
                let inode = InodeNr::new(key.offset);
                match intent {
                    Intent::Orphan => orphans.push(inode),
                    interrupted => self.recover_later(inode, interrupted)?,
                }
            }
        }
        // A deletion waits for whoever has its inode locked: by now that is what was interrupted.
        orphans.into_iter().for_each(|inode| self.delete_later(inode));
        Ok(())
    }

    /// Begins to end an interrupted operation: its locks, which nobody holds yet, are taken in the first step.
    fn recover_later(self: &Rc<Self>, inode: InodeNr, interrupted: Intent) -> Result<(), FsError> {
        let shard = Rc::clone(self);
        let mut finish = Box::pin(async move {
            let recovered = match interrupted {
                Intent::Orphan => Ok(()),
                Intent::Truncate(size) => shard.finish_truncation(inode, size).await,
                Intent::Clone { start, end } => shard.undo_clone_after_crash(inode, start..end).await,
                Intent::DropReplaced => shard.drop_set_aside_after_crash(inode).await,
                Intent::Collapse(_) | Intent::Insert(_) => shard.finish_shift(inode, interrupted).await,
            };
            if let Err(error) = recovered {
                // What was cut off would be seen again if the file grew, and half a clone is seen already.
                shard.volume.fail(&format!("inode {inode}: {interrupted:?} could not be ended: {error}"));
            }
            shard.release_inode(inode);
        });
        if finish.as_mut().now_or_never().is_some() {
            return Ok(());
        }
        self.ctx.spawn(finish).map_err(|error| FsError::Io(error.to_string()))
    }
}

fn delete_record(batch: &mut Batch<'_>, inode: InodeNr) -> Plan<()> {
    batch.delete(inode_key(inode));
    if batch.get(&symlink_key(inode))?.is_some() {
        batch.delete(symlink_key(inode));
    }
    batch.delete(intent_key(inode, Intent::Orphan));
    let truncation = intent_key(inode, Intent::Truncate(0));
    if batch.get(&truncation)?.is_some() {
        batch.delete(truncation);
    }
    Ok(())
}

/// Up to [`INTENTS_AT_ONCE`] intents at or after `from`.
pub(crate) fn intents(batch: &Batch<'_>, from: Key) -> Plan<Vec<(Key, Intent)>> {
    let mut found = Vec::new();
    let mut next = Some(from);
    while let Some(from) = next
        && found.len() < INTENTS_AT_ONCE
        && let Some((key, value)) = batch.next(&from)?
        && (key.object, key.kind) == (0, INTENT)
    {
        let intent = Intent::decode(&value).map_err(|error| error.of("intent", InodeNr::new(key.offset)))?;
        found.push((key, intent));
        next = key.successor();
    }
    Ok(found)
}
