//! The copy-on-write B+tree of a shard, in memory.
//!
//! Owns: [`Tree`] and its nodes; which of them are in memory; what is dirty; what a frozen state looks like.
//!
//! The tree is synchronous and knows no device. An operation that needs a node that is not in memory returns
//! [`Missing`] and has changed nothing; the caller reads the node, hands the image to [`Tree::supply`] and tries again.
//! After a successful [`Tree::touch`] a change of that key never misses, until the next [`Tree::evict`]; changes of
//! other keys take nothing out of memory.
//!
//! **Copy on write.** A change copies every node on its path that was made before the last [`Tree::freeze`], to an
//! address from the [`NodeSpace`], and frees the old address; nodes made since are changed in place. So freezing is
//! O(1): it keeps the root, and the live tree turns away from it by copying. Freeze for checkpoints only, not at the
//! end of every epoch: each freeze costs the next change a new path.
//!
//! **Readers** hold a [`Value`] as long as they like: a change of its leaf then works on a copy.
//!
//! Invariants:
//! - all leaves have level 0, children one level less than their parents;
//! - an inner node has a child; a leaf without items is there only if no neighbour could take its keys in memory;
//! - keys of a child are at least the key of its entry (but for the first) and less than the next one's;
//! - no node is newer than its parent, and epochs given to changes never fall;
//! - every address taken from the space belongs to a node of the tree, or was given back exactly once.
//!
//! *Legal crash outcomes*: the device sees nothing but images from [`FrozenTree`], at addresses that no durable
//! superblock reaches (the space's duty); until a superblock names the new root, the old tree is what is found.
//!
//! Excludes: reading and writing of images, allocation, the meaning of items, ordering against the intent log.

mod change;
mod cursor;
mod evict;
mod freeze;
mod leaf;
mod merge;
mod node;
mod relocate;
#[cfg(test)]
mod tests;
mod walk;

use std::cell::{Cell, RefCell};
use std::fmt;
use std::ops::{ControlFlow, Deref};
use std::rc::Rc;

use self::node::{Body, Child, Cohort, Gauge, Node};
pub use crate::format::node::{
    BlockPtr, Expected, INNER_CAPACITY, ItemKind, Key, KeyBounds, MAX_LEVEL, MAX_VALUE, NODE_BLOCKS,
    NODE_SIZE, NodeError, NodeImage, TreeIdentity,
};
pub use change::{Inserted, max_nodes_per_change};
pub use cursor::Cursor;
pub use evict::{EVICT_VISITS, Eviction};
pub use freeze::{DirtyNode, DirtyNodes, FrozenTree};
pub use walk::Walk;

use crate::types::{BlockNr, Epoch};

/// Where nodes get their places.
pub trait NodeSpace {
    /// The first of [`NODE_BLOCKS`] contiguous blocks that are free and in no durable superblock's reach. Cannot fail:
    /// the caller has reserved [`max_nodes_per_change`] nodes for each change.
    fn allocate_node(&mut self) -> BlockNr;

    /// Takes back a node's place. Superblocks and frozen trees may still need its contents.
    fn free_node(&mut self, address: BlockNr);

    /// Takes back the place of a node that was never frozen: nothing was written there and nothing will be, so it may
    /// be given out again at once.
    fn discard_node(&mut self, address: BlockNr) {
        self.free_node(address);
    }
}

/// The root of a stored tree, as the superblock keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TreeRoot {
    /// Where the root lies.
    pub ptr: BlockPtr,
    /// Its level; 0 if it is a leaf.
    pub level: u8,
}

/// A node that an operation needs and that is not in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    expected: Expected,
}

impl Missing {
    /// Where to read the node's [`NODE_BLOCKS`] blocks.
    pub fn address(&self) -> BlockNr {
        self.expected.ptr.address
    }

    /// All that is known of the node.
    pub fn expected(&self) -> &Expected {
        &self.expected
    }
}

/// A value, by reference to the leaf that holds it. Cheap to clone. While one is alive, a change of the leaf copies it.
#[derive(Clone)]
pub struct Value {
    node: Rc<Node>,
    start: usize,
    length: usize,
}

impl Deref for Value {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.node.body {
            Body::Leaf(leaf) => leaf.bytes(self.start, self.length),
            Body::Inner(_) => unreachable!("values are made of leaves"),
        }
    }
}

impl AsRef<[u8]> for Value {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Value").field(&&**self).finish()
    }
}

/// The way from the root to a leaf.
#[derive(Clone, Copy, Debug)]
struct Path {
    indexes: [u16; MAX_LEVEL as usize],
    depth: usize,
    /// Keys that take this way.
    bounds: KeyBounds,
}

impl Path {
    /// The way to a root that is a leaf.
    const ROOT: Self = Self { indexes: [0; MAX_LEVEL as usize], depth: 0, bounds: KeyBounds::ALL };

    fn push(&mut self, index: usize) {
        self.indexes[self.depth] = u16::try_from(index).expect("a node has fewer than 2¹⁶ children");
        self.depth += 1;
    }

    /// Indexes of children, from the root down.
    fn steps(&self) -> &[u16] {
        &self.indexes[..self.depth]
    }
}

/// The leaves that were looked at last, with the ways to them: plans look at neighbouring items of a few places in turns.
#[derive(Default)]
struct Recent {
    leaves: [Option<(Path, Rc<Node>)>; Self::COUNT],
    next: usize,
}

impl Recent {
    const COUNT: usize = 4;

    fn find(&self, key: &Key) -> Option<(Rc<Node>, Path)> {
        let (path, node) = self.leaves.iter().flatten().find(|(path, _)| path.bounds.contains(key))?;
        Some((Rc::clone(node), *path))
    }

    fn note(&mut self, path: Path, node: &Rc<Node>) {
        self.leaves[self.next] = Some((path, Rc::clone(node)));
        self.next = (self.next + 1) % Self::COUNT;
    }
}

/// A copy-on-write B+tree.
pub struct Tree {
    identity: TreeIdentity,
    root: Child,
    root_level: u8,
    gauge: Gauge,
    cohort: Cell<Cohort>,
    /// The way of the last change, for the next one. Its nodes are of the tree's cohort, so they are in memory.
    hint: Cell<Option<Path>>,
    /// Leaves that were looked at last. Emptied by whatever changes or drops nodes.
    recent: RefCell<Recent>,
    /// Where eviction goes on.
    hand: Cell<Key>,
    /// Children of an inner node at most; less than the format's limit only in tests.
    fanout: usize,
}

impl Tree {
    /// A tree without items: one leaf, dirty, at a place from `space`.
    pub fn empty(identity: TreeIdentity, epoch: Epoch, space: &mut dyn NodeSpace) -> Self {
        let gauge = Gauge::default();
        let body = Body::Leaf(leaf::Leaf::new());
        let root = Node::new(space.allocate_node(), epoch, Cohort::FIRST, body, &gauge);
        Self::with_root(identity, Child::resident(Rc::new(root)), 0, gauge)
    }

    /// The stored tree with this root; nothing of it is in memory.
    pub fn open(identity: TreeIdentity, root: TreeRoot) -> Self {
        Self::with_root(identity, Child::absent(root.ptr), root.level, Gauge::default())
    }

    fn with_root(identity: TreeIdentity, root: Child, root_level: u8, gauge: Gauge) -> Self {
        Self {
            identity,
            root,
            root_level,
            gauge,
            cohort: Cell::new(Cohort::FIRST),
            hint: Cell::new(None),
            recent: RefCell::default(),
            hand: Cell::new(Key::MIN),
            fanout: INNER_CAPACITY,
        }
    }

    /// What the tree's nodes say that they belong to.
    pub fn identity(&self) -> TreeIdentity {
        self.identity
    }

    /// Levels of the tree; 1 if the root is a leaf.
    pub fn height(&self) -> u8 {
        self.root_level.saturating_add(1)
    }

    /// Bytes of memory that nodes take, those of frozen trees and of [`Value`]s included.
    pub fn resident_bytes(&self) -> usize {
        self.gauge.bytes()
    }

    /// The value of `key`.
    ///
    /// # Errors
    /// The node that is needed first.
    pub fn get(&self, key: &Key) -> Result<Option<Value>, Missing> {
        let (node, _) = self.descend(key)?;
        let leaf = leaf_of(&node);
        Ok(leaf.search(key).ok().map(|index| value_at(&node, index)))
    }

    /// What `read` makes of the value of `key`; `None` if there is no such item.
    ///
    /// # Errors
    /// The node that is needed first.
    pub fn with<T>(&self, key: &Key, read: impl FnOnce(&[u8]) -> T) -> Result<Option<T>, Missing> {
        let (node, _) = self.descend(key)?;
        let leaf = leaf_of(&node);
        Ok(leaf.search(key).ok().map(|index| read(leaf.value(index))))
    }

    /// For looking up many keys in order.
    pub fn cursor(&self) -> Cursor<'_> {
        Cursor::new(self)
    }

    /// The first item at or after `from`.
    ///
    /// # Errors
    /// The node that is needed first.
    pub fn next(&self, from: &Key) -> Result<Option<(Key, Value)>, Missing> {
        let mut from = *from;
        loop {
            let (node, path) = self.descend(&from)?;
            let leaf = leaf_of(&node);
            let (Ok(index) | Err(index)) = leaf.search(&from);
            if index < leaf.len() {
                return Ok(Some((leaf.key(index), value_at(&node, index))));
            }
            match path.bounds.high {
                Some(high) => from = high,
                None => return Ok(None),
            }
        }
    }

    /// The last item at or before `to`.
    ///
    /// # Errors
    /// The node that is needed first.
    pub fn prev(&self, to: &Key) -> Result<Option<(Key, Value)>, Missing> {
        let mut to = *to;
        loop {
            let (node, path) = self.descend(&to)?;
            let leaf = leaf_of(&node);
            let end = leaf.search(&to).map_or_else(|index| index, |index| index + 1);
            if let Some(index) = end.checked_sub(1) {
                return Ok(Some((leaf.key(index), value_at(&node, index))));
            }
            match path.bounds.low.predecessor() {
                Some(before) => to = before,
                None => return Ok(None),
            }
        }
    }

    /// Visits the items from `from` to `to`, both included, in key order, until `visit` breaks.
    ///
    /// # Errors
    /// The node that is needed next. Items before it have been visited: go on behind the last one seen.
    pub fn scan(
        &self,
        from: &Key,
        to: &Key,
        mut visit: impl FnMut(&Key, &[u8]) -> ControlFlow<()>,
    ) -> Result<(), Missing> {
        let mut from = *from;
        while from <= *to {
            let (node, path) = self.descend(&from)?;
            let leaf = leaf_of(&node);
            let (Ok(start) | Err(start)) = leaf.search(&from);
            for index in start..leaf.len() {
                let key = leaf.key(index);
                if key > *to || visit(&key, leaf.value(index)).is_break() {
                    return Ok(());
                }
            }
            match path.bounds.high {
                Some(high) => from = high,
                None => return Ok(()),
            }
        }
        Ok(())
    }

    /// Makes sure that `key` can be read, inserted or removed without a miss, until the next [`Tree::evict`].
    ///
    /// # Errors
    /// The node that is needed first.
    pub fn touch(&self, key: &Key) -> Result<(), Missing> {
        self.descend(key).map(drop)
    }

    /// Takes in the image of a node that was missing. If the tree has changed so that the node is no longer missing
    /// there, nothing happens: the operation that missed it finds out when it is tried again.
    ///
    /// # Errors
    /// What is wrong with the image. The node stays missing.
    pub fn supply(&self, missing: Missing, image: Box<NodeImage>) -> Result<(), NodeError> {
        let wanted = missing.expected;
        let mut bounds = KeyBounds::ALL;
        let mut level = self.root_level;
        let mut parent: Option<(Rc<Node>, usize)> = None;
        while level > wanted.level {
            let child = match &parent {
                Some((node, index)) => inner_of(node).child(*index).visit(),
                None => self.root.visit(),
            };
            let Ok(node) = child else { return Ok(()) };
            let inner = inner_of(&node);
            let index = inner.route(&wanted.bounds.low);
            bounds = inner.child_bounds(index, &bounds);
            level -= 1;
            parent = Some((node, index));
        }
        let child = match &parent {
            Some((node, index)) => inner_of(node).child(*index),
            None => &self.root,
        };
        if level == wanted.level && child.visit().is_err_and(|ptr| ptr == wanted.ptr) {
            let expected = Expected { bounds, ..wanted };
            child.fill(Node::load(image, &expected, &self.gauge)?);
        }
        Ok(())
    }

    /// The leaf that may hold `key`, and the way to it.
    fn descend(&self, key: &Key) -> Result<(Rc<Node>, Path), Missing> {
        if let Some(found) = self.recent.borrow().find(key) {
            return Ok(found);
        }
        let (node, path) = self.descend_from_root(key)?;
        self.recent.borrow_mut().note(path, &node);
        Ok((node, path))
    }

    /// Lets go of the leaves that were looked at last.
    fn forget_recent(&self) {
        let mut recent = self.recent.borrow_mut();
        if recent.leaves.iter().any(Option::is_some) {
            *recent = Recent::default();
        }
    }

    fn descend_from_root(&self, key: &Key) -> Result<(Rc<Node>, Path), Missing> {
        let mut path = Path::ROOT;
        let mut level = self.root_level;
        let mut node = self.root.visit().map_err(|ptr| self.missing(ptr, level, &path))?;
        while let Body::Inner(inner) = &node.body {
            let index = inner.route(key);
            path.bounds = inner.child_bounds(index, &path.bounds);
            path.push(index);
            level -= 1;
            let child = inner.child(index).visit().map_err(|ptr| self.missing(ptr, level, &path))?;
            node = child;
        }
        Ok((node, path))
    }

    fn missing(&self, ptr: BlockPtr, level: u8, path: &Path) -> Missing {
        Missing { expected: Expected { identity: self.identity, ptr, level, bounds: path.bounds } }
    }
}

fn value_at(node: &Rc<Node>, index: usize) -> Value {
    let (start, length) = leaf_of(node).value_place(index);
    Value { node: Rc::clone(node), start, length }
}

fn leaf_of(node: &Node) -> &leaf::Leaf {
    match &node.body {
        Body::Leaf(leaf) => leaf,
        Body::Inner(_) => unreachable!("levels fall by one to 0, the leaves"),
    }
}

fn inner_of(node: &Node) -> &node::Inner {
    match &node.body {
        Body::Inner(inner) => inner,
        Body::Leaf(_) => unreachable!("nodes above level 0 are inner nodes"),
    }
}
