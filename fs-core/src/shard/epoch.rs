//! A shard's view of the volume's epochs: when it may apply a transaction, and when it freezes.
//!
//! Owns: [`EpochGate`] and the end of an epoch: for a checkpoint the shard freezes, for the intent log only the records
//! of what it changed are cut off. The volume's open epoch is one atomic ([`crate::volume::VolumeShared::open_epoch`]); the
//! coordinator closes it by raising it. A shard follows, at the latest when it is asked to checkpoint, at the
//! earliest when a transaction finds that it would belong to the new epoch.
//!
//! | state | meets | does |
//! |---|---|---|
//! | current = open | transaction | applies it in the current epoch |
//! | current < open, nothing joined | transaction, checkpoint or commit | ends the current epoch, then as above |
//! | current < open, cross-shard transactions joined | transaction, checkpoint or commit | waits for them |
//!
//! Invariants:
//! - nothing of epoch N+1 is applied before all of N is: a transaction that begins after another was acknowledged is
//!   never in an earlier epoch than it;
//! - freezing is one synchronous step; the frozen state is handed to exactly one checkpoint;
//! - a joined transaction waits for nothing but its participants, so the wait for it is short.

use std::cell::{Cell, RefCell};

use crate::alloc::FrozenGroups;
use crate::format::log::Section;
use crate::tree::FrozenTree;
use crate::types::Epoch;
use crate::volume::Closing;

use super::Shard;
use super::log::LogCut;
use super::signal::Signal;

/// A shard's state as of the end of an epoch.
pub(crate) struct Frozen {
    /// The epoch.
    pub(crate) epoch: Epoch,
    /// The tree; `None` if the epoch changed nothing.
    pub(crate) tree: Option<FrozenTree>,
    /// Bitmaps of the groups that changed.
    pub(crate) groups: FrozenGroups,
    /// Sequence number of the next new inode.
    pub(crate) next_inode: u64,
    /// Inodes of the shard.
    pub(crate) inodes: u64,
}

/// Where a shard stands in the sequence of epochs.
pub(crate) struct EpochGate {
    current: Cell<Epoch>,
    joined: Cell<u32>,
    changed: Cell<bool>,
    frozen: RefCell<Option<Frozen>>,
    cut: RefCell<Option<(Epoch, LogCut)>>,
    moved: Signal,
}

impl EpochGate {
    /// A gate that stands at `current`, the first epoch of this mount.
    pub(crate) fn new(current: Epoch) -> Self {
        Self {
            current: Cell::new(current),
            joined: Cell::new(0),
            changed: Cell::new(false),
            frozen: RefCell::new(None),
            cut: RefCell::new(None),
            moved: Signal::default(),
        }
    }

    /// The epoch that the shard applies transactions in.
    pub(crate) fn current(&self) -> Epoch {
        self.current.get()
    }

    /// Notes that the current epoch changes something.
    pub(crate) fn mark_changed(&self) {
        self.changed.set(true);
    }
}

impl Shard {
    /// Waits until the shard may apply a transaction of the open epoch. The caller must not await between this and
    /// its application.
    pub(crate) async fn enter_epoch(&self) -> Epoch {
        loop {
            if let Some(epoch) = self.try_enter_epoch() {
                return epoch;
            }
            self.epochs.moved.wait().await;
        }
    }

    /// As [`enter_epoch`](Self::enter_epoch); `None` while joined transactions hold the shard in a closed epoch.
    pub(crate) fn try_enter_epoch(&self) -> Option<Epoch> {
        let open = self.volume.open_epoch();
        assert!(self.epochs.current() <= open, "a shard is never ahead of its volume");
        if self.epochs.current() < open {
            if self.epochs.joined.get() > 0 {
                return None;
            }
            self.end_epoch();
        }
        Some(self.epochs.current())
    }

    /// Joins the open epoch: the shard does not freeze it before [`leave_epoch`](Self::leave_epoch).
    pub(crate) async fn join_epoch(&self) -> Epoch {
        let epoch = self.enter_epoch().await;
        self.epochs.joined.set(self.epochs.joined.get() + 1);
        epoch
    }

    /// Joins `epoch` for a transaction that another shard leads; `false` (rejoin) if this shard is past it.
    pub(crate) async fn join_epoch_of_leader(&self, epoch: Epoch) -> bool {
        loop {
            let current = self.epochs.current();
            if current > epoch {
                return false;
            }
            if current == epoch {
                self.epochs.joined.set(self.epochs.joined.get() + 1);
                return true;
            }
            // The leader has seen a newer epoch than this shard: follow it.
            if self.try_enter_epoch().is_none() {
                self.epochs.moved.wait().await;
            }
        }
    }

    /// Ends a stay begun by one of the join functions.
    pub(crate) fn leave_epoch(&self) {
        let joined = self.epochs.joined.get();
        assert!(joined > 0, "leave follows join");
        self.epochs.joined.set(joined - 1);
        if joined == 1 {
            self.epochs.moved.notify();
        }
    }

    /// Waits for the end of `epoch` on this shard and takes its frozen state.
    pub(crate) async fn take_frozen(&self, epoch: Epoch) -> Frozen {
        loop {
            if self.epochs.current() > epoch || self.try_enter_epoch().is_some() {
                let frozen = self.epochs.frozen.borrow_mut().take();
                let frozen = frozen.expect("the coordinator closes an epoch once, and asks for it once");
                assert_eq!(frozen.epoch, epoch, "checkpoints run one at a time");
                return frozen;
            }
            self.epochs.moved.wait().await;
        }
    }

    /// Waits for the end of `epoch` on this shard and takes what it changed.
    pub(crate) async fn take_cut(&self, epoch: Epoch) -> LogCut {
        loop {
            if self.epochs.current() > epoch || self.try_enter_epoch().is_some() {
                let cut = self.epochs.cut.borrow_mut().take();
                let (of, cut) = cut.expect("the coordinator closes an epoch once, and asks for it once");
                assert_eq!(of, epoch, "epochs are logged one at a time");
                return cut;
            }
            self.epochs.moved.wait().await;
        }
    }

    /// Goes on to the next epoch, in one step.
    fn end_epoch(&self) {
        let epoch = self.epochs.current();
        let records = self.log.cut();
        match self.volume.closing() {
            Closing::Checkpoint => self.freeze(epoch),
            Closing::Log => {
                let (next_inode, inodes) = (self.next_inode.get(), self.inode_count.get());
                let section = records.map(|records| Section { shard: self.id, next_inode, inodes, records });
                let previous = self.epochs.cut.borrow_mut().replace((epoch, LogCut { section }));
                assert!(previous.is_none(), "an epoch closes only after the one before was taken");
            }
        }
        let next = epoch.next().expect("2⁶⁴ epochs do not pass");
        self.epochs.current.set(next);
        self.epochs.moved.notify();
    }

    fn freeze(&self, epoch: Epoch) {
        let groups = self.alloc.borrow_mut().freeze(epoch);
        let changed = self.epochs.changed.replace(false);
        let frozen = Frozen {
            epoch,
            tree: changed.then(|| self.tree.borrow().freeze()),
            groups,
            next_inode: self.next_inode.get(),
            inodes: self.inode_count.get(),
        };
        let previous = self.epochs.frozen.borrow_mut().replace(frozen);
        assert!(previous.is_none(), "an epoch closes only after the one before it is durable");
    }
}
