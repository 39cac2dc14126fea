//! Nodes that have to leave their places.
//!
//! Owns: finding the nodes of a tree that lie in a stretch of the device, and copying the way to one, which gives each
//! node on it a new place. Items do not change.
//!
//! Excludes: keeping new nodes out of the stretch (the allocator's), the checkpoint that writes the copies.

use std::ops::Range;
use std::rc::Rc;

use super::change::{begin_copy, copy_way};
use super::node::{Body, Child, Node};
use super::{Missing, NodeSpace, Path, Tree};
use crate::format::node::{Expected, Key, KeyBounds};
use crate::types::Epoch;

impl Tree {
    /// A key whose way leads through the first node, in key order from `from` on, that lies in `blocks`. Of leaves only
    /// the addresses are looked at, so only inner nodes may be missing. Nodes that are new since the last freeze do not
    /// count: they cannot be copied before the next one.
    ///
    /// # Errors
    /// The node that is needed first.
    pub fn first_node_in(&self, blocks: &Range<u64>, from: &Key) -> Result<Option<Key>, Missing> {
        self.find_in(&self.root, self.root_level, KeyBounds::ALL, blocks, from)
    }

    fn find_in(
        &self,
        child: &Child,
        level: u8,
        bounds: KeyBounds,
        blocks: &Range<u64>,
        from: &Key,
    ) -> Result<Option<Key>, Missing> {
        let resident = child.peek();
        let stored = if resident.is_some() { None } else { child.ptr() };
        let old = resident.as_ref().filter(|node| node.cohort != self.cohort.get());
        let address = old.map(|node| node.address).or(stored.map(|ptr| ptr.address));
        if address.is_some_and(|address| blocks.contains(&address.get())) {
            return Ok(Some(bounds.low.max(*from)));
        }
        if level == 0 {
            return Ok(None);
        }
        let node = match (resident, stored) {
            (Some(node), _) => node,
            (None, Some(ptr)) => {
                return Err(Missing { expected: Expected { identity: self.identity, ptr, level, bounds } });
            }
            (None, None) => unreachable!("a node that is not in memory has a pointer"),
        };
        let Body::Inner(inner) = &node.body else { return Ok(None) };
        let first = if *from > bounds.low { inner.route(from) } else { 0 };
        for index in first..inner.len() {
            let below = inner.child_bounds(index, &bounds);
            if let Some(key) = self.find_in(inner.child(index), level - 1, below, blocks, from)? {
                return Ok(Some(key));
            }
        }
        Ok(None)
    }

    /// Copies every node on the way to `key` that was not copied since the last freeze. Takes at most
    /// [`height`](Self::height) nodes from `space`. Returns how many of the old places lay in `blocks`.
    ///
    /// # Errors
    /// The node that is needed first; nothing was changed.
    ///
    /// # Panics
    /// If epochs run backwards.
    pub fn copy_path(
        &mut self,
        key: &Key,
        blocks: &Range<u64>,
        epoch: Epoch,
        space: &mut dyn NodeSpace,
    ) -> Result<u64, Missing> {
        let (_, path): (Rc<Node>, Path) = self.descend(key)?;
        let (root, mut change) = begin_copy(self, epoch, space);
        Ok(copy_way(root, path.steps(), blocks, &mut change))
    }
}
