//! A node in memory, and the link from a parent to its child.
//!
//! Owns: [`Node`], [`Inner`], [`Child`], the states of a node between change and device, and the gauge of memory.
//!
//! | state | means | leaves it by |
//! |---|---|---|
//! | `Dirty` | changed since it was last encoded; its checksum is unknown | sealing → `Sealed` |
//! | `Sealed` | encoded, checksum known, perhaps not on the device yet | `mark_written` → `Written` |
//! | `Written` | the device has it (or it came from there): may be dropped | copy for a change → a new `Dirty` node |
//!
//! Invariants:
//! - only a `Written` node is ever absent: its link then holds address, epoch and checksum;
//! - a node that is not `Written` has a parent in the same tree that is not `Written` either;
//! - a node of an older cohort than the tree's is never changed: it may belong to a frozen tree.
//!
//! Excludes: when nodes are changed, dropped or loaded.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use super::leaf::Leaf;
use crate::format::node::{
    self, BlockPtr, CheckedNode, Expected, Header, INNER_CAPACITY, Key, KeyBounds, NODE_SIZE, NodeError,
    NodeImage, TreeIdentity,
};
use crate::types::{BlockNr, Epoch};

/// Memory that one node is counted as, in bytes: the page of a leaf; about the tables of an inner node.
pub(super) const NODE_MEMORY: usize = NODE_SIZE + 256;

/// Counts the nodes of a tree that are in memory, whoever holds them.
#[derive(Clone, Debug, Default)]
pub(super) struct Gauge(Rc<Cell<usize>>);

impl Gauge {
    pub(super) fn bytes(&self) -> usize {
        self.0.get() * NODE_MEMORY
    }
}

/// One node on the gauge for as long as it lives.
struct Counted(Gauge);

impl Counted {
    fn new(gauge: &Gauge) -> Self {
        gauge.0.set(gauge.0.get() + 1);
        Self(gauge.clone())
    }
}

impl Clone for Counted {
    fn clone(&self) -> Self {
        Self::new(&self.0)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.0.set(self.0.0.get() - 1);
    }
}

/// Where a node is between change and device; see the module's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NodeState {
    /// Changed, not encoded.
    Dirty,
    /// Encoded; its checksum.
    Sealed(u32),
    /// On the device; its checksum.
    Written(u32),
}

/// Counts freezes of a tree: a node made or copied since the last one may be changed in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Cohort(u64);

impl Cohort {
    /// Of nodes that were loaded.
    pub(super) const LOADED: Self = Self(0);
    /// Of a new tree.
    pub(super) const FIRST: Self = Self(1);

    pub(super) fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// A node in memory.
#[derive(Clone)]
pub(super) struct Node {
    pub(super) address: BlockNr,
    pub(super) epoch: Epoch,
    pub(super) cohort: Cohort,
    pub(super) state: Cell<NodeState>,
    pub(super) body: Body,
    _counted: Counted,
}

/// Contents of a node.
#[derive(Clone)]
pub(super) enum Body {
    /// Items.
    Leaf(Leaf),
    /// Children.
    Inner(Inner),
}

impl Node {
    /// A new node, changed and nowhere stored.
    pub(super) fn new(address: BlockNr, epoch: Epoch, cohort: Cohort, body: Body, gauge: &Gauge) -> Self {
        Self {
            address,
            epoch,
            cohort,
            state: Cell::new(NodeState::Dirty),
            body,
            _counted: Counted::new(gauge),
        }
    }

    /// Checks an image and makes a node of it.
    pub(super) fn load(image: Box<NodeImage>, expected: &Expected, gauge: &Gauge) -> Result<Self, NodeError> {
        let checked = node::check(&image, expected)?;
        let body = if checked.level() == 0 {
            let count = checked.count();
            Body::Leaf(Leaf::adopt(image, count))
        } else {
            Body::Inner(Inner::from_checked(&checked))
        };
        let node = Self::new(expected.ptr.address, expected.ptr.epoch, Cohort::LOADED, body, gauge);
        node.state.set(NodeState::Written(expected.ptr.crc));
        Ok(node)
    }

    /// Level: 0 for leaves.
    pub(super) fn level(&self) -> u8 {
        match &self.body {
            Body::Leaf(_) => 0,
            Body::Inner(inner) => inner.level,
        }
    }

    /// The pointer to this node; `None` while it has no checksum.
    pub(super) fn ptr(&self) -> Option<BlockPtr> {
        match self.state.get() {
            NodeState::Dirty => None,
            NodeState::Sealed(crc) | NodeState::Written(crc) => {
                Some(BlockPtr { address: self.address, epoch: self.epoch, crc })
            }
        }
    }

    pub(super) fn is_written(&self) -> bool {
        matches!(self.state.get(), NodeState::Written(_))
    }

    /// Encodes the node. Its children must be sealed.
    pub(super) fn encode(&self, identity: TreeIdentity) -> Box<NodeImage> {
        let header = Header { identity, address: self.address, epoch: self.epoch };
        match &self.body {
            Body::Leaf(leaf) => node::encode_leaf(&header, leaf.items()),
            Body::Inner(inner) => {
                let entries = inner.keys.iter().zip(&inner.children).map(|(key, child)| {
                    (*key, child.ptr().expect("children are sealed before their parent"))
                });
                node::encode_inner(&header, inner.level, entries)
            }
        }
    }
}

/// Children of a node, in key order.
#[derive(Clone)]
pub(super) struct Inner {
    pub(super) level: u8,
    /// The smallest key each child may hold; the first is [`Key::MIN`], whatever the node's bounds.
    keys: Vec<Key>,
    children: Vec<Child>,
}

impl Inner {
    pub(super) fn new(level: u8) -> Self {
        // One more than stored: a node overflows before it is split.
        let room = INNER_CAPACITY + 1;
        Self { level, keys: Vec::with_capacity(room), children: Vec::with_capacity(room) }
    }

    fn from_checked(checked: &CheckedNode<'_>) -> Self {
        let mut inner = Self::new(checked.level());
        for (key, ptr) in checked.entries() {
            inner.push(key, Child::absent(ptr));
        }
        inner
    }

    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }

    /// Index of the child that may hold `key`.
    #[inline]
    pub(super) fn route(&self, key: &Key) -> usize {
        self.keys[1..].partition_point(|low| low <= key)
    }

    pub(super) fn child(&self, index: usize) -> &Child {
        &self.children[index]
    }

    pub(super) fn children(&self) -> &[Child] {
        &self.children
    }

    pub(super) fn child_mut(&mut self, index: usize) -> &mut Child {
        &mut self.children[index]
    }

    /// Children `index` and `index + 1`.
    pub(super) fn pair_mut(&mut self, index: usize) -> (&mut Child, &mut Child) {
        let (left, right) = self.children.split_at_mut(index + 1);
        (&mut left[index], &mut right[0])
    }

    /// The smallest key child `index` may hold; [`Key::MIN`] for child 0.
    pub(super) fn key(&self, index: usize) -> Key {
        self.keys[index]
    }

    /// What child `index` may hold, in a node that may hold `bounds`.
    pub(super) fn child_bounds(&self, index: usize, bounds: &KeyBounds) -> KeyBounds {
        KeyBounds {
            low: if index == 0 { bounds.low } else { self.keys[index] },
            high: self.keys.get(index + 1).copied().or(bounds.high),
        }
    }

    pub(super) fn push(&mut self, key: Key, child: Child) {
        self.keys.push(key);
        self.children.push(child);
    }

    pub(super) fn insert(&mut self, index: usize, key: Key, child: Child) {
        self.keys.insert(index, key);
        self.children.insert(index, child);
    }

    /// Takes child `index` away; the one before it has its keys now, or the next one if it was the first.
    pub(super) fn remove(&mut self, index: usize) -> Child {
        self.keys.remove(index);
        if let Some(first) = self.keys.first_mut() {
            *first = Key::MIN;
        }
        self.children.remove(index)
    }

    /// Takes child `index` away and gives its keys to the next one, instead of the one before.
    pub(super) fn remove_forward(&mut self, index: usize) -> Child {
        self.keys.remove(index + 1);
        self.children.remove(index)
    }

    /// Takes the children from `index` on away, into a new node. Returns the smallest key that may hold, too.
    pub(super) fn split_off(&mut self, index: usize) -> (Key, Inner) {
        let mut right = Self::new(self.level);
        right.keys.extend(self.keys.drain(index..));
        right.children.extend(self.children.drain(index..));
        let low = std::mem::replace(&mut right.keys[0], Key::MIN);
        (low, right)
    }

    /// Appends the children of `right`, whose smallest key allowed is `low`.
    pub(super) fn append(&mut self, low: Key, right: &Inner) {
        let first = self.len();
        self.keys.extend_from_slice(&right.keys);
        self.children.extend_from_slice(&right.children);
        if let Some(key) = self.keys.get_mut(first) {
            *key = low;
        }
    }
}

/// A link from a parent to a child that is in memory or only on the device.
#[derive(Clone)]
pub(super) struct Child {
    link: RefCell<Link>,
    /// Used since the clock's hand last passed.
    hot: Cell<bool>,
}

#[derive(Clone)]
enum Link {
    Absent(BlockPtr),
    Resident(Rc<Node>),
}

impl Child {
    pub(super) fn absent(ptr: BlockPtr) -> Self {
        Self { link: RefCell::new(Link::Absent(ptr)), hot: Cell::new(false) }
    }

    pub(super) fn resident(node: Rc<Node>) -> Self {
        Self { link: RefCell::new(Link::Resident(node)), hot: Cell::new(true) }
    }

    /// The node, marked as used, or where to load it from.
    #[inline]
    pub(super) fn visit(&self) -> Result<Rc<Node>, BlockPtr> {
        self.hot.set(true);
        match &*self.link.borrow() {
            Link::Resident(node) => Ok(Rc::clone(node)),
            Link::Absent(ptr) => Err(*ptr),
        }
    }

    /// The node, if it is in memory. Does not count as use.
    pub(super) fn peek(&self) -> Option<Rc<Node>> {
        match &*self.link.borrow() {
            Link::Resident(node) => Some(Rc::clone(node)),
            Link::Absent(_) => None,
        }
    }

    pub(super) fn is_resident(&self) -> bool {
        matches!(&*self.link.borrow(), Link::Resident(_))
    }

    /// The node of a parent that is being changed.
    #[inline]
    pub(super) fn node_mut(&mut self) -> Option<&mut Rc<Node>> {
        self.hot.set(true);
        match self.link.get_mut() {
            Link::Resident(node) => Some(node),
            Link::Absent(_) => None,
        }
    }

    /// The pointer to store; `None` while the child has no checksum.
    pub(super) fn ptr(&self) -> Option<BlockPtr> {
        match &*self.link.borrow() {
            Link::Resident(node) => node.ptr(),
            Link::Absent(ptr) => Some(*ptr),
        }
    }

    /// Makes a loaded node resident.
    pub(super) fn fill(&self, node: Node) {
        self.hot.set(true);
        *self.link.borrow_mut() = Link::Resident(Rc::new(node));
    }

    /// Whether the child was used since this was last asked.
    pub(super) fn take_hot(&self) -> bool {
        self.hot.take()
    }

    /// Drops the node from memory if it is on the device and nobody else holds it; true if it was.
    pub(super) fn evict(&self) -> bool {
        let mut link = self.link.borrow_mut();
        let Link::Resident(node) = &*link else { return false };
        if !node.is_written() || Rc::strong_count(node) != 1 {
            return false;
        }
        if let Body::Inner(inner) = &node.body
            && inner.children.iter().any(Self::is_resident)
        {
            return false;
        }
        let Some(ptr) = node.ptr() else { return false };
        *link = Link::Absent(ptr);
        true
    }
}
