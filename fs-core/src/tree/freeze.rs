//! Frozen states of the tree, and the way of dirty nodes to the device.
//!
//! Owns: [`FrozenTree`], the iteration over what must be written for it, sealing.
//!
//! A checkpoint freezes the tree, then seals every dirty node, children first, and writes the images; when all are on
//! the device it marks the same nodes as written, in the same order, and puts [`FrozenTree::root`] into the superblock.
//! If writing fails halfway, the nodes stay sealed and in memory, and the next frozen tree yields them again.
//!
//! Invariants: nodes of a frozen tree never change; a node is sealed after its children and marked after them.

use std::rc::Rc;

use super::node::{Body, Child, Node, NodeState};
use super::{Tree, TreeRoot};
use crate::format::node::{NodeImage, TreeIdentity};
use crate::types::BlockNr;

/// A state of the tree, kept while the live tree goes on.
pub struct FrozenTree {
    identity: TreeIdentity,
    root: Child,
    level: u8,
}

impl Tree {
    /// Keeps the present state. O(1); the next change of every node copies it.
    pub fn freeze(&self) -> FrozenTree {
        self.cohort.set(self.cohort.get().next());
        self.hint.set(None);
        self.forget_recent();
        FrozenTree { identity: self.identity, root: self.root.clone(), level: self.root_level }
    }
}

impl FrozenTree {
    /// The nodes that are not known to be on the device, children before parents. Lazy: the live tree may change and
    /// drop nodes between two steps.
    pub fn dirty_nodes(&self) -> DirtyNodes {
        let stack = self.root.peek().filter(|root| !root.is_written()).map(|root| (root, 0));
        DirtyNodes { identity: self.identity, stack: stack.into_iter().collect() }
    }

    /// What the superblock must point to.
    ///
    /// # Panics
    /// If a dirty node has not been sealed.
    pub fn root(&self) -> TreeRoot {
        let ptr = self.root.ptr().expect("the root was sealed, and so everything before it");
        TreeRoot { ptr, level: self.level }
    }

    /// Notes that the device has every dirty node. Without it they stay in memory and are written again next time.
    ///
    /// # Panics
    /// If one was not sealed.
    pub fn mark_written(&self) {
        self.dirty_nodes().for_each(|node| node.mark_written());
    }
}

/// Iterator of [`FrozenTree::dirty_nodes`].
pub struct DirtyNodes {
    identity: TreeIdentity,
    /// The way to the next node; with each, the child to look at next.
    stack: Vec<(Rc<Node>, usize)>,
}

impl Iterator for DirtyNodes {
    type Item = DirtyNode;

    fn next(&mut self) -> Option<DirtyNode> {
        loop {
            let (node, next) = self.stack.last_mut()?;
            if let Body::Inner(inner) = &node.body
                && *next < inner.len()
            {
                let child = inner.child(*next).peek().filter(|child| !child.is_written());
                *next += 1;
                self.stack.extend(child.map(|child| (child, 0)));
                continue;
            }
            let (node, _) = self.stack.pop()?;
            return Some(DirtyNode { identity: self.identity, node });
        }
    }
}

/// A node that is to be written.
pub struct DirtyNode {
    identity: TreeIdentity,
    node: Rc<Node>,
}

impl DirtyNode {
    /// The first of the blocks to write it to.
    pub fn address(&self) -> BlockNr {
        self.node.address
    }

    /// Where to write the node, and its image. Its checksum is known to the parent from now on. Sealing twice gives
    /// the same image.
    ///
    /// # Panics
    /// If a child has not been sealed before.
    pub fn seal(&self) -> (BlockNr, Box<NodeImage>) {
        let image = self.node.encode(self.identity);
        let crc = crc32c::crc32c(&image[..]);
        match self.node.state.get() {
            NodeState::Dirty => self.node.state.set(NodeState::Sealed(crc)),
            NodeState::Sealed(before) | NodeState::Written(before) => {
                assert_eq!(before, crc, "a sealed node does not change");
            }
        }
        (self.node.address, image)
    }

    /// Notes that the device has the image: the node may be dropped from memory now.
    ///
    /// # Panics
    /// If the node was not sealed, or a child was not marked before.
    pub fn mark_written(&self) {
        let NodeState::Sealed(crc) = self.node.state.get() else {
            assert!(self.node.is_written(), "only what was sealed can have been written");
            return;
        };
        if let Body::Inner(inner) = &self.node.body {
            let written = |child: &Child| child.peek().is_none_or(|child| child.is_written());
            assert!(inner.children().iter().all(written), "children are marked before their parent");
        }
        self.node.state.set(NodeState::Written(crc));
    }
}
