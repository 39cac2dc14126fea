//! A batch: the tree changes of one transaction of one shard, gathered before any is applied.
//!
//! Owns: [`Batch`], which a *plan* reads and writes; [`Interrupt`], why a plan stopped; [`Changes`], what a plan that
//! came to its end leaves behind; [`ItemList`], for plans that put hundreds of small items.
//!
//! A plan is a synchronous closure. It reads items through the batch, which looks at its own changes first and at
//! the tree second, and it only ever changes the batch. When the tree would need a node that is not in memory, the
//! plan stops with [`Interrupt::Missing`]; the transaction loop fetches the node and runs the plan again from its
//! beginning. So a half-made change is never visible, the tree needs no lock, and key → value-or-delete is exactly
//! what an intent log carries.
//!
//! Invariants:
//! - a plan has no effect but its batch, and may run any number of times;
//! - between a plan's end and the commit of its changes there is no await.
//!
//! Excludes: space, epochs, durability (the transaction's business).

use std::collections::BTreeMap;
use std::ops::Range;

use reactor::WallTime;

use crate::error::FsError;
use crate::tree::{Key, Missing, Tree};
use crate::types::{BlockCount, BlockNr};

/// Why a plan stopped.
#[derive(Debug)]
pub(crate) enum Interrupt {
    /// A tree node is not in memory: load it, then run the plan again.
    Missing(Missing),
    /// The operation fails; nothing was changed.
    Failed(FsError),
}

impl From<Missing> for Interrupt {
    fn from(missing: Missing) -> Self {
        Self::Missing(missing)
    }
}

impl From<FsError> for Interrupt {
    fn from(error: FsError) -> Self {
        Self::Failed(error)
    }
}

/// What a step of a plan returns.
pub(crate) type Plan<T> = Result<T, Interrupt>;

/// What a plan may know beside the tree.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BatchContext {
    /// Time of the transaction, for time stamps.
    pub(crate) now: WallTime,
    /// Key of the directory hash.
    pub(crate) hash_seed: [u8; 16],
}

/// Items to put, in key order, their values one behind the other.
#[derive(Debug, Default)]
pub(crate) struct ItemList {
    items: Vec<(Key, Range<usize>)>,
    bytes: Vec<u8>,
}

impl ItemList {
    /// An empty list with room for so many items and bytes of values.
    pub(crate) fn with_capacity(items: usize, bytes: usize) -> Self {
        Self { items: Vec::with_capacity(items), bytes: Vec::with_capacity(bytes) }
    }

    /// Adds an item behind all others.
    ///
    /// # Panics
    /// If its key is not the largest.
    pub(crate) fn push(&mut self, key: Key, value: &[u8]) {
        assert!(self.items.last().is_none_or(|(last, _)| *last < key), "items are listed in key order");
        let start = self.bytes.len();
        self.bytes.extend_from_slice(value);
        self.items.push((key, start..self.bytes.len()));
    }

    /// The value that was listed last, to be changed.
    pub(crate) fn last_mut(&mut self) -> &mut [u8] {
        let place = self.items.last().map_or(0..0, |(_, place)| place.clone());
        &mut self.bytes[place]
    }

    /// Bytes of all values.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Items listed.
    pub(crate) fn len(&self) -> usize {
        self.items.len()
    }

    fn iter(&self) -> impl Iterator<Item = (&Key, Option<&[u8]>)> + Clone {
        self.items.iter().map(|(key, place)| (key, Some(&self.bytes[place.clone()])))
    }
}

/// Tree changes being gathered.
pub(crate) struct Batch<'tree> {
    tree: &'tree Tree,
    context: BatchContext,
    changes: BTreeMap<Key, Option<Vec<u8>>>,
    list: ItemList,
    committed: Vec<(BlockNr, BlockCount)>,
    freed: Vec<(BlockNr, BlockCount)>,
    returns: bool,
}

/// The changes of a finished plan.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    items: BTreeMap<Key, Option<Vec<u8>>>,
    list: ItemList,
    /// Data blocks that were allocated and are referenced from now on.
    pub(crate) committed: Vec<(BlockNr, BlockCount)>,
    /// Data blocks that nothing references any more.
    pub(crate) freed: Vec<(BlockNr, BlockCount)>,
    /// Whether borrowed blocks are to be given back.
    pub(crate) returns: bool,
}

impl Changes {
    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.items.is_empty() && self.list.items.is_empty()
    }

    /// Items to put (`Some`) or to delete (`None`): the few, then the many, each in key order.
    pub(crate) fn items(&self) -> impl Iterator<Item = (&Key, Option<&[u8]>)> + Clone {
        let few = self.items.iter().map(|(key, value)| (key, value.as_deref()));
        few.chain(self.list.iter())
    }

    /// Keys of the items.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &Key> {
        self.items().map(|(key, _)| key)
    }
}

impl<'tree> Batch<'tree> {
    /// An empty batch over `tree`.
    pub(crate) fn new(tree: &'tree Tree, context: BatchContext) -> Self {
        Self {
            tree,
            context,
            changes: BTreeMap::new(),
            list: ItemList::default(),
            committed: Vec::new(),
            freed: Vec::new(),
            returns: false,
        }
    }

    /// Time of the transaction.
    pub(crate) fn now(&self) -> WallTime {
        self.context.now
    }

    /// Key of the directory hash.
    pub(crate) fn hash_seed(&self) -> &[u8; 16] {
        &self.context.hash_seed
    }

    /// The item of `key`.
    pub(crate) fn get(&self, key: &Key) -> Plan<Option<Vec<u8>>> {
        match self.changes.get(key) {
            Some(change) => Ok(change.clone()),
            None => Ok(self.tree.with(key, <[u8]>::to_vec)?),
        }
    }

    /// The first item at or after `from`.
    pub(crate) fn next(&self, from: &Key) -> Plan<Option<(Key, Vec<u8>)>> {
        let mut from = *from;
        loop {
            let stored = self.tree.next(&from)?;
            let bound = stored.as_ref().map(|(key, _)| *key);
            // The batch's own items up to the stored one come first; a deletion hides the stored item.
            for (key, change) in self.changes.range(from..) {
                if bound.is_some_and(|bound| *key > bound) {
                    break;
                }
                if let Some(value) = change {
                    return Ok(Some((*key, value.clone())));
                }
            }
            let Some((key, value)) = stored else { return Ok(None) };
            if !self.changes.contains_key(&key) {
                return Ok(Some((key, value.to_vec())));
            }
            let Some(successor) = key.successor() else { return Ok(None) };
            from = successor;
        }
    }

    /// The last item at or before `to`.
    pub(crate) fn prev(&self, to: &Key) -> Plan<Option<(Key, Vec<u8>)>> {
        let mut to = *to;
        loop {
            let stored = self.tree.prev(&to)?;
            let bound = stored.as_ref().map(|(key, _)| *key);
            for (key, change) in self.changes.range(..=to).rev() {
                if bound.is_some_and(|bound| *key < bound) {
                    break;
                }
                if let Some(value) = change {
                    return Ok(Some((*key, value.clone())));
                }
            }
            let Some((key, value)) = stored else { return Ok(None) };
            if !self.changes.contains_key(&key) {
                return Ok(Some((key, value.to_vec())));
            }
            let Some(predecessor) = key.predecessor() else { return Ok(None) };
            to = predecessor;
        }
    }

    /// Stores `value` under `key`, in place of an item that is there.
    pub(crate) fn put(&mut self, key: Key, value: Vec<u8>) {
        self.changes.insert(key, Some(value));
    }

    /// Deletes the item of `key`, if there is one.
    pub(crate) fn delete(&mut self, key: Key) {
        self.changes.insert(key, None);
    }

    /// Declares that blocks which [`crate::alloc::Allocator::allocate_data`] gave are referenced from now on.
    pub(crate) fn commit_blocks(&mut self, start: BlockNr, count: BlockCount) {
        self.committed.push((start, count));
    }

    /// Gives data blocks back: they become free when no retained superblock generation needs them.
    pub(crate) fn free_blocks(&mut self, start: BlockNr, count: BlockCount) {
        self.freed.push((start, count));
    }

    /// Declares that a return was put: whoever gives blocks back has work.
    pub(crate) fn note_return(&mut self) {
        self.returns = true;
    }

    /// The tree as it is, without what this plan has gathered.
    pub(crate) fn stored(&self) -> &'tree Tree {
        self.tree
    }

    /// Puts many items at once, which nothing in this plan reads any more and which it did not change before.
    ///
    /// # Panics
    /// If there is such a list already, or if it would say the same item twice.
    pub(crate) fn put_list(&mut self, list: ItemList) {
        assert!(self.list.items.is_empty(), "a plan has one list");
        let twice = |key: &Key| list.items.binary_search_by_key(key, |(listed, _)| *listed).is_ok();
        assert!(!self.changes.keys().any(twice), "an item is changed once");
        self.list = list;
    }

    /// Items put or deleted so far, those of a list not counted.
    pub(crate) fn changed(&self) -> u32 {
        u32::try_from(self.changes.len()).unwrap_or(u32::MAX)
    }

    /// Ends the plan.
    pub(crate) fn finish(self) -> Changes {
        Changes {
            items: self.changes,
            list: self.list,
            committed: self.committed,
            freed: self.freed,
            returns: self.returns,
        }
    }
}
