//! Looking up many keys in order.
//!
//! Owns: [`Cursor`], which stays in the leaf of the last key. Excludes: changes; a cursor borrows the tree.

use std::rc::Rc;

use super::node::Node;
use super::{Missing, Tree, leaf_of};
use crate::format::node::{Key, KeyBounds};

/// A place in the tree. Keys that rise are looked up fastest; any may be.
pub struct Cursor<'tree> {
    tree: &'tree Tree,
    /// The leaf of the last key, what it may hold, and where in it that key is or would be.
    at: Option<(Rc<Node>, KeyBounds, usize)>,
}

impl<'tree> Cursor<'tree> {
    pub(super) fn new(tree: &'tree Tree) -> Self {
        Self { tree, at: None }
    }

    /// The value of `key`.
    ///
    /// # Errors
    /// The node that is needed first.
    pub fn get(&mut self, key: &Key) -> Result<Option<&[u8]>, Missing> {
        if !self.at.as_ref().is_some_and(|(_, bounds, _)| bounds.contains(key)) {
            let (node, path) = self.tree.descend(key)?;
            self.at = Some((node, path.bounds, 0));
        }
        let Some((node, _, near)) = &mut self.at else { return Ok(None) };
        let leaf = leaf_of(node);
        let found = leaf.search_near(key, *near);
        *near = found.unwrap_or_else(|index| index);
        Ok(found.ok().map(|index| leaf.value(index)))
    }
}
