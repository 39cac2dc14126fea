//! Transactions of one shard: reserve, plan, commit.
//!
//! Owns: the loop that runs a plan until every node it needs is in memory, the step that applies its changes, and
//! the ladder that finds space before it reports that there is none.
//!
//! Order of resources: space first, then the epoch; nothing is awaited between entering the epoch and the end of the
//! commit. See [`crate::batch`] for what a plan may do.

use std::pin::pin;
use std::time::Duration;

use crate::alloc::{FreeError, Priority, Reservation};
use crate::batch::{Batch, BatchContext, Changes, Interrupt, Plan};
use crate::error::FsError;
use crate::tree::{INNER_CAPACITY, Missing, NODE_BLOCKS, NodeSpace};
use crate::types::{BlockNr, Epoch};

use super::Shard;
use super::message::{PeerCall, PeerReply};

/// Checkpoints that the search for space may cost: what an epoch frees is reusable when the next is durable.
const RECLAIM_CHECKPOINTS: u32 = 2;

/// Checkpoints that it may cost while what others have freed would suffice, and they take it first.
const CONTENDED_CHECKPOINTS: u32 = 100;

/// Times that what gives space back waits for the others of its kind to return what they hold of the reserve.
const RESERVE_WAITS: u32 = 200;

/// How long each of these waits takes.
const RESERVE_WAIT: Duration = Duration::from_millis(1);

/// How long the search for space waits for deletions.
const DELETION_WAIT: Duration = Duration::from_secs(10);

/// Items of a transaction at most. Fewer than half of what an inner node holds, so that no node is split twice by one.
const MAX_ITEMS: u32 = 128;

/// Changes made one by one that cost about as much as a list of ordinary length.
const LIST_ITEMS: u32 = 32;

/// Nodes at the root that a transaction may copy and make; see [`Shard::nodes_for`].
const NODES_AT_ROOT: u64 = 3 + 4;

const _: () = assert!((MAX_ITEMS as usize) < INNER_CAPACITY / 2);

/// Nodes that a plan may miss before eviction has to wait for it: with little memory, plans that run at the same time
/// could otherwise take each other's nodes away for ever.
const MISSES_BEFORE_HOLD: u32 = 16;

/// Loads what a plan misses.
pub(super) struct Loader<'a> {
    shard: &'a Shard,
    misses: u32,
}

impl<'a> Loader<'a> {
    pub(super) fn new(shard: &'a Shard) -> Self {
        Self { shard, misses: 0 }
    }

    pub(super) async fn load(&mut self, missing: Missing) -> Result<(), FsError> {
        self.misses += 1;
        if self.misses == MISSES_BEFORE_HOLD {
            self.shard.begin_node_hold();
        }
        self.shard.load(missing).await
    }
}

impl Drop for Loader<'_> {
    fn drop(&mut self) {
        if self.misses >= MISSES_BEFORE_HOLD {
            self.shard.end_node_hold();
        }
    }
}

/// What a transaction may cost at most.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Credit {
    /// Items put or deleted.
    pub(crate) items: u32,
    /// Whether the reserve may be used.
    pub(crate) priority: Priority,
}

impl Credit {
    /// A transaction that takes space.
    pub(crate) const fn normal(items: u32) -> Self {
        Self { items, priority: Priority::Normal }
    }

    /// A transaction that gives space back, or without which nothing could go on.
    pub(crate) const fn reserve(items: u32) -> Self {
        Self { items, priority: Priority::Reserve }
    }
}

pub(super) struct TransactionSpace<'a> {
    pub(super) shard: &'a Shard,
    pub(super) reservation: &'a mut Reservation,
}

impl NodeSpace for TransactionSpace<'_> {
    fn allocate_node(&mut self) -> BlockNr {
        self.shard.alloc.borrow_mut().allocate_node(self.reservation)
    }

    fn free_node(&mut self, address: BlockNr) {
        let freed = self.shard.alloc.borrow_mut().free_node(address);
        self.shard.expect_freed(freed);
    }

    fn discard_node(&mut self, address: BlockNr) {
        self.shard.alloc.borrow_mut().discard_node(address);
    }
}

impl Shard {
    /// Tree nodes to reserve for `items` changed items.
    ///
    /// On every level but the root's, each change copies and makes two nodes at most (a copy and a half of a split,
    /// or a copy and a copied neighbour). The root is copied once, split once (to split again it would have to fill
    /// up again) and gets one root above it. Between this and the commit the tree may grow by a level, whose lower
    /// one has two nodes then, to be copied and split once each.
    pub(crate) fn nodes_for(&self, items: u32) -> u64 {
        assert!(items <= MAX_ITEMS, "a transaction is bounded");
        let levels = u64::from(self.tree.borrow().height().max(2)) - 1;
        u64::from(items) * 2 * levels + NODES_AT_ROOT
    }

    /// Runs `plan` and commits what it gathered, atomically.
    ///
    /// # Errors
    /// The plan's, [`FsError::NoSpace`] if its worst case finds no space, [`FsError::ReadOnly`] after a failure.
    pub(crate) async fn transact<T>(
        &self,
        credit: Credit,
        plan: impl FnMut(&mut Batch<'_>) -> Plan<T>,
    ) -> Result<T, FsError> {
        let mut reservation = self.reserve(0, self.nodes_for(credit.items), credit.priority).await?;
        self.transact_with(&mut reservation, plan).await
    }

    /// As [`transact`](Self::transact), with space that the caller has reserved.
    pub(crate) async fn transact_with<T>(
        &self,
        reservation: &mut Reservation,
        mut plan: impl FnMut(&mut Batch<'_>) -> Plan<T>,
    ) -> Result<T, FsError> {
        let mut loader = Loader::new(self);
        loop {
            self.volume.check_writable()?;
            let epoch = self.enter_epoch().await;
            match self.try_commit(epoch, reservation, &mut plan) {
                Ok(value) => return Ok(value),
                Err(Interrupt::Failed(error)) => return Err(error),
                Err(Interrupt::Missing(missing)) => loader.load(missing).await?,
            }
        }
    }

    /// As [`transact`](Self::transact), for a plan that puts a list of items: what it costs is known only when it has run.
    pub(crate) async fn transact_list<T>(
        &self,
        priority: Priority,
        mut plan: impl FnMut(&mut Batch<'_>) -> Plan<T>,
    ) -> Result<T, FsError> {
        let mut loader = Loader::new(self);
        let mut reservation = self.reserve(0, self.nodes_for(LIST_ITEMS), priority).await?;
        loop {
            self.volume.check_writable()?;
            let epoch = self.enter_epoch().await;
            match self.gather(&mut plan) {
                Ok((value, changes, nodes)) if nodes <= reservation.nodes() => {
                    self.apply(epoch, &mut reservation, changes);
                    return Ok(value);
                }
                Ok((_, _, nodes)) => {
                    let more = nodes - reservation.nodes();
                    reservation.merge(self.reserve(0, more, priority).await?);
                }
                Err(Interrupt::Failed(error)) => return Err(error),
                Err(Interrupt::Missing(missing)) => loader.load(missing).await?,
            }
        }
    }

    /// What `plan` yields and changes, and the nodes that this takes at most. All of them are in memory.
    fn gather<T>(&self, plan: &mut impl FnMut(&mut Batch<'_>) -> Plan<T>) -> Plan<(T, Changes, u64)> {
        let tree = self.tree.borrow();
        let mut batch = Batch::new(&tree, self.batch_context());
        let value = plan(&mut batch)?;
        let changes = batch.finish();
        let nodes = tree.nodes_needed(changes.items())?;
        Ok((value, changes, nodes))
    }

    /// Runs `plan` without committing anything.
    pub(crate) async fn view<T>(&self, mut plan: impl FnMut(&Batch<'_>) -> Plan<T>) -> Result<T, FsError> {
        let mut loader = Loader::new(self);
        loop {
            let outcome = {
                let tree = self.tree.borrow();
                let batch = Batch::new(&tree, self.batch_context());
                plan(&batch)
            };
            match outcome {
                Ok(value) => return Ok(value),
                Err(Interrupt::Failed(error)) => return Err(error),
                Err(Interrupt::Missing(missing)) => loader.load(missing).await?,
            }
        }
    }

    /// Runs `plan` and loads what it misses, but commits nothing: afterwards, and as long as no node is evicted, the
    /// same plan commits without a miss.
    pub(crate) async fn rehearse<T>(
        &self,
        mut plan: impl FnMut(&mut Batch<'_>) -> Plan<T>,
    ) -> Result<T, FsError> {
        let mut loader = Loader::new(self);
        loop {
            let outcome = {
                let tree = self.tree.borrow();
                let mut batch = Batch::new(&tree, self.batch_context());
                plan(&mut batch).and_then(|value| {
                    tree.touch_all(batch.finish().keys())?;
                    Ok(value)
                })
            };
            match outcome {
                Ok(value) => return Ok(value),
                Err(Interrupt::Failed(error)) => return Err(error),
                Err(Interrupt::Missing(missing)) => loader.load(missing).await?,
            }
        }
    }

    /// Plans and commits in one synchronous step, in `epoch`, which the shard must be in.
    pub(crate) fn try_commit<T>(
        &self,
        epoch: Epoch,
        reservation: &mut Reservation,
        plan: &mut impl FnMut(&mut Batch<'_>) -> Plan<T>,
    ) -> Plan<T> {
        assert_eq!(epoch, self.epochs.current(), "a commit happens in the epoch just entered");
        let (value, changes) = {
            let tree = self.tree.borrow();
            let mut batch = Batch::new(&tree, self.batch_context());
            let value = plan(&mut batch)?;
            let changes = batch.finish();
            tree.touch_all(changes.keys())?;
            (value, changes)
        };
        self.apply(epoch, reservation, changes);
        Ok(value)
    }

    fn apply(&self, epoch: Epoch, reservation: &mut Reservation, changes: Changes) {
        if changes.is_empty() {
            return;
        }
        let mut space = TransactionSpace { shard: self, reservation };
        self.log.note(&changes, self.volume.log_limit());
        let applied = self.tree.borrow_mut().apply(changes.items(), epoch, &mut space);
        applied.expect("every key was touched just before");
        for (start, count) in changes.committed {
            self.alloc.borrow_mut().commit_data(start, count);
        }
        for (start, count) in changes.freed {
            let freed = self.alloc.borrow_mut().free(start, count);
            self.expect_freed(freed);
        }
        if changes.returns {
            self.note_returns();
        }
        self.epochs.mark_changed();
        self.volume.note_commit(self.id, epoch);
    }

    /// Blocks that cannot be freed mean that something names blocks which are not its own.
    fn expect_freed(&self, freed: Result<(), FreeError>) {
        if let Err(error) = freed {
            self.volume.note_damage(self.id, &error.to_string());
            self.volume.fail(&format!("damaged metadata on shard {}: {error}", self.id));
        }
    }

    fn batch_context(&self) -> BatchContext {
        BatchContext { now: self.ctx.wall(), hash_seed: self.volume.hash_seed }
    }

    /// Reserves space. When there is none, asks other shards for an empty group, has accepted writes written, which
    /// hold more than they need, waits for the deletions that are under way, and closes epochs (what they freed becomes free). Takes no lock, and gives up waiting for those who
    /// do, so it may be called with inode and range locks held.
    ///
    /// # Errors
    /// [`FsError::NoSpace`] if all that did not help.
    pub(crate) async fn reserve(
        &self,
        data_blocks: u64,
        nodes: u64,
        priority: Priority,
    ) -> Result<Reservation, FsError> {
        let mut checkpoints = 0;
        let mut waits = 0;
        let mut written_back = false;
        loop {
            if let Some(reservation) = self.counter.reserve(data_blocks, nodes, priority) {
                return Ok(reservation);
            }
            if self.adopt_group().await? {
                continue;
            }
            if priority == Priority::Normal && !written_back {
                written_back = true;
                let reserve = || self.counter.reserve(data_blocks, nodes, priority);
                if let Some(reservation) = self.write_back_for_space(reserve).await {
                    return Ok(reservation);
                }
                continue;
            }
            if priority == Priority::Normal && self.has_deletions() {
                self.wait_for_deletions().await;
            }
            // What one waits for others may take first, and free as much in doing so.
            let comes = self.counter.pinned() >= data_blocks + nodes * NODE_BLOCKS;
            if checkpoints >= RECLAIM_CHECKPOINTS && (!comes || checkpoints >= CONTENDED_CHECKPOINTS) {
                // The reserve is shared: whoever else has some of it gives most of it back soon.
                if priority == Priority::Reserve && waits < RESERVE_WAITS {
                    waits += 1;
                    self.ctx.sleep(RESERVE_WAIT).await;
                    continue;
                }
                return Err(FsError::NoSpace);
            }
            checkpoints += 1;
            self.close_epoch_for_space().await?;
        }
    }

    /// Waits until what is being deleted is gone, but not for ever: a deletion may wait for a lock of the caller's.
    async fn wait_for_deletions(&self) {
        let deletions = pin!(self.finish_deletions());
        let limit = self.ctx.sleep(DELETION_WAIT);
        futures_util::future::select(deletions, pin!(limit)).await;
    }

    /// Makes the open epoch durable even if nothing has changed in it: what was freed in the one before becomes free
    /// only then.
    pub(super) async fn close_epoch_for_space(&self) -> Result<(), FsError> {
        if self.counter.pinned() > 0 {
            self.volume.note_commit(self.id, self.epochs.current());
        }
        self.volume.checkpoint_now().await
    }

    /// Asks the other shards for an empty group; `false` if none can spare one.
    pub(super) async fn adopt_group(&self) -> Result<bool, FsError> {
        let limit = self.volume.surrender_limit();
        for peer in self.volume.peers_by_space(self.id) {
            if let PeerReply::Transfer(Some(group)) = self.call(peer, PeerCall::SurrenderGroup(limit)).await?
            {
                self.log.note_untold();
                self.alloc.borrow_mut().adopt(group);
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Brings a node that a plan misses into memory.
    async fn load(&self, missing: Missing) -> Result<(), FsError> {
        let address = missing.address();
        let image = self.read_node(address).await?;
        let supplied = self.tree.borrow().supply(missing, image);
        supplied.map_err(|error| {
            self.volume.note_damage(self.id, &error.to_string());
            FsError::Damaged { what: error.to_string(), block: Some(address), inode: None }
        })?;
        self.relieve_tree_memory();
        Ok(())
    }
}
