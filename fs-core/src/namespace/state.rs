//! What the namespace of a shard keeps in memory.
//!
//! Owns: [`NamespaceState`]. Everything in it is volatile: a crash loses locks, lookups and prepared changes, and keeps
//! no trace of them on the device.
//!
//! Excludes: per-inode state (the shard's inode table).

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet, VecDeque};

use crate::locks::{InodeClass, LockClass, WholeLock};
use crate::shard::signal::Signal;
use crate::types::InodeNr;

use super::lockset::{HeldLocks, RenameClass, RenameGuard};
use super::transaction::{Prepared, TransactionId};

const _: () = assert!(RenameClass::RANK < InodeClass::RANK, "the rename lock comes first");

/// The namespace's own part of a shard.
pub(crate) struct NamespaceState {
    /// Number of the next transaction that this shard begins.
    pub(super) next_transaction: Cell<u64>,
    /// Turns among the shards for new directories.
    pub(super) next_directory: Cell<usize>,
    /// Locks held here by transactions of any shard.
    pub(super) held: RefCell<HashMap<TransactionId, HeldLocks>>,
    /// Changes that wait for their epoch.
    pub(super) prepared: RefCell<HashMap<TransactionId, Prepared>>,
    /// The volume's rename lock; used on the first shard only.
    pub(super) rename_lock: WholeLock<RenameClass>,
    /// Who holds it.
    pub(super) rename_held: RefCell<Option<(TransactionId, RenameGuard)>>,
    /// Inodes without names that front ends still use.
    pub(super) orphans: RefCell<HashSet<InodeNr>>,
    /// Inodes to delete.
    pub(super) doomed: RefCell<VecDeque<InodeNr>>,
    /// Deletions that have begun or wait.
    pub(super) deletions: Cell<u64>,
    /// Tasks that delete inodes.
    pub(super) deleters: Cell<u32>,
    /// Told when a deletion has ended.
    pub(super) deleted: Signal,
}

impl Default for NamespaceState {
    fn default() -> Self {
        Self {
            next_transaction: Cell::new(0),
            next_directory: Cell::new(0),
            held: RefCell::default(),
            prepared: RefCell::default(),
            rename_lock: WholeLock::new(InodeNr::ROOT),
            rename_held: RefCell::default(),
            orphans: RefCell::default(),
            doomed: RefCell::default(),
            deletions: Cell::new(0),
            deleters: Cell::new(0),
            deleted: Signal::default(),
        }
    }
}
