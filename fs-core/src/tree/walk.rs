//! A walk over every node of a stored tree, for checks and dumps.
//!
//! Owns: [`Walk`], which says what to read next and checks what was read. It knows no device, so that it serves
//! synchronous and asynchronous callers; it holds at most the unread children of one node per level.
//!
//! No damage makes a walk endless: levels fall by one from parent to child, and a node with two children or an item
//! passes its check under one parent only, since it holds a key within its bounds. What can be reached twice is a chain
//! of single children above an empty leaf, and that is no longer than the tree is high.
//!
//! Excludes: the meaning of items; what lies in memory.

use super::TreeRoot;
use crate::format::node::{CheckedNode, Expected, KeyBounds, NodeError, NodeImage, TreeIdentity, check};

/// A walk in key order, parents before children.
///
/// ```text
/// while let Some(expected) = walk.next_node() {
///     let image = …read expected.ptr.address…;
///     match walk.supply(&image) { Ok(node) => …, Err(damage) => …the subtree is skipped… }
/// }
/// ```
pub struct Walk {
    /// Nodes to visit, the next one last.
    pending: Vec<Expected>,
    current: Option<Expected>,
}

impl Walk {
    /// A walk over the tree with this root.
    pub fn new(identity: TreeIdentity, root: TreeRoot) -> Self {
        let root = Expected { identity, ptr: root.ptr, level: root.level, bounds: KeyBounds::ALL };
        Self { pending: vec![root], current: None }
    }

    /// The node to read next; `None` at the end. A node that is not supplied is skipped, with all below it.
    pub fn next_node(&mut self) -> Option<Expected> {
        self.current = self.pending.pop();
        self.current
    }

    /// Checks the node that was asked for last.
    ///
    /// # Errors
    /// What is wrong with it; everything below it is skipped.
    ///
    /// # Panics
    /// If no node was asked for since the last call.
    pub fn supply<'image>(&mut self, image: &'image NodeImage) -> Result<CheckedNode<'image>, NodeError> {
        let expected = self.current.take().expect("a node is supplied once, after it was asked for");
        let node = check(image, &expected)?;
        let first = self.pending.len();
        self.pending.extend(node.children());
        self.pending[first..].reverse();
        Ok(node)
    }
}
