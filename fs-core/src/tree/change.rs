//! Insertion and removal.
//!
//! Owns: the recursion that copies a path, the split of full nodes on the way back up, the joining of small ones and
//! the removal of empty ones; batches of changes, leaf by leaf.
//!
//! A change first descends without changing anything, which finds what is missing and records the way; the recursion
//! follows that record, so it never searches and never misses. Neighbours are joined only if they are in memory.
//!
//! Invariant: a change takes no key's path out of memory. So what was touched can be changed until something is
//! evicted, whatever other transactions do in between.
//!
//! Excludes: search, freezing, eviction.

use std::rc::Rc;

use super::leaf::{Leaf, Side};
use super::merge::{ItemChange, bytes_put, max_leaves};
use super::node::{Body, Child, Cohort, Gauge, Inner, Node, NodeState};
use super::{Missing, NodeSpace, Path, Tree, leaf_of};
use crate::format::node::{INNER_CAPACITY, Key, KeyBounds, LEAF_CAPACITY, MAX_LEVEL, MAX_VALUE};
use crate::types::Epoch;

/// A leaf that uses fewer bytes than this looks for a neighbour to join.
const SMALL_LEAF: usize = LEAF_CAPACITY / 3;

/// Two leaves are joined if what they use together is not more: room for growth remains.
const JOINED_LEAF: usize = LEAF_CAPACITY * 3 / 4;

const _: () = assert!(MAX_LEVEL as usize + 1 < u8::MAX as usize && INNER_CAPACITY >= 4);

/// Nodes that one insertion or removal allocates at most in a tree of `height` levels.
///
/// An insertion copies `height` nodes, splits each and may add a root. A removal copies `height` nodes and joins each
/// but the root with one neighbour, which is copied.
pub const fn max_nodes_per_change(height: u8) -> u64 {
    2 * height as u64 + 1
}

/// Nodes at the root that a transaction may copy and make: the root itself, its half, and a root above them.
const NODES_AT_ROOT: u64 = 3;

/// What an insertion met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// There was no item of that key.
    New,
    /// An item of that key has got a new value.
    Replaced,
}

/// What a change needs to know on its way.
pub(super) struct Change<'a> {
    epoch: Epoch,
    cohort: Cohort,
    fanout: usize,
    gauge: &'a Gauge,
    space: &'a mut dyn NodeSpace,
    /// Whether a leaf was split.
    restructured: bool,
}

/// What a node that was split gives to its parent, to stand right of it.
struct Split {
    separator: Key,
    right: Rc<Node>,
}

/// What a removal leaves of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Remains {
    /// Enough.
    Enough,
    /// So little that it should join a neighbour.
    Little,
    /// Nothing.
    Nothing,
}

impl Tree {
    /// Inserts an item, or gives it a new value. `epoch` must not be less than that of any change before.
    ///
    /// # Errors
    /// The node that is needed first; nothing was changed.
    ///
    /// # Panics
    /// If the value is longer than [`MAX_VALUE`], or epochs run backwards.
    pub fn insert(
        &mut self,
        key: Key,
        value: &[u8],
        epoch: Epoch,
        space: &mut dyn NodeSpace,
    ) -> Result<Inserted, Missing> {
        assert!(value.len() <= MAX_VALUE, "a value of {} bytes is too long for a tree item", value.len());
        let path = match self.hint.get() {
            Some(path) if path.bounds.contains(&key) => path,
            _ => self.descend(&key)?.1,
        };
        let (root, mut change) = self.begin(epoch, space);
        let (inserted, splits) = insert_into(root, path.steps(), &key, value, &mut change);
        grow(root, splits, &mut change);
        let level = root.level();
        // A leaf that was split holds other keys now, and those above it may have been split too.
        let hint = if change.restructured { None } else { Some(path) };
        self.root_level = level;
        self.hint.set(hint);
        Ok(inserted)
    }

    /// Makes several changes, in whole or not at all: `Some` inserts an item or gives it a new value, `None` removes
    /// it if it is there.
    ///
    /// # Errors
    /// The node that is needed first; nothing was changed.
    ///
    /// # Panics
    /// As [`Tree::insert`].
    pub fn apply<'change>(
        &mut self,
        changes: impl Iterator<Item = (&'change Key, Option<&'change [u8]>)> + Clone,
        epoch: Epoch,
        space: &mut dyn NodeSpace,
    ) -> Result<(), Missing> {
        self.touch_all(changes.clone().map(|(key, _)| key))?;
        let mut changes = changes.peekable();
        let mut group = Vec::new();
        while let Some((key, _)) = changes.peek() {
            let (node, path) =
                self.descend(key).expect("it was touched, and changes take nothing out of memory");
            group.clear();
            while let Some(change) = changes.next_if(|(key, _)| path.bounds.contains(key)) {
                group.push(change);
            }
            let leaf = leaf_of(&node);
            let merged =
                if leaf.is_worth_merging(group.len()) { leaf.merge(&group, SMALL_LEAF) } else { None };
            drop(node);
            match merged {
                Some(leaves) => self.replace_leaf(path, leaves, epoch, space),
                None => self.apply_one_by_one(&group, epoch, space),
            }
        }
        Ok(())
    }

    /// Nodes that [`apply`](Self::apply) allocates for these changes at most. Afterwards they miss nothing.
    ///
    /// # Errors
    /// The node that is needed first.
    pub fn nodes_needed<'change>(
        &self,
        changes: impl Iterator<Item = (&'change Key, Option<&'change [u8]>)>,
    ) -> Result<u64, Missing> {
        let levels = u64::from(self.height().max(2)) - 1;
        let mut changes = changes.peekable();
        let mut nodes = NODES_AT_ROOT;
        while let Some((key, _)) = changes.peek() {
            let (node, path) = self.descend(key)?;
            let (mut count, mut bytes, mut removes) = (0, 0, false);
            while let Some(change) = changes.next_if(|(key, _)| path.bounds.contains(key)) {
                count += 1;
                bytes += bytes_put(&change);
                removes |= change.1.is_none();
            }
            // A removal may leave so little that its leaf is not merged after all.
            nodes += levels
                * if !removes && leaf_of(&node).is_worth_merging(count) {
                    1 + max_leaves(bytes) as u64
                } else {
                    2 * count as u64
                };
        }
        Ok(nodes)
    }

    /// [`Tree::touch`] of several keys, cheapest in key order.
    ///
    /// # Errors
    /// The node that is needed first.
    pub fn touch_all<'key>(&self, keys: impl Iterator<Item = &'key Key>) -> Result<(), Missing> {
        let mut within: Option<KeyBounds> = None;
        for key in keys {
            if !within.is_some_and(|bounds| bounds.contains(key)) {
                within = Some(self.descend(key)?.1.bounds);
            }
        }
        Ok(())
    }

    /// Puts `leaves` in the place of the leaf at the end of `path`.
    fn replace_leaf(&mut self, path: Path, leaves: Vec<Leaf>, epoch: Epoch, space: &mut dyn NodeSpace) {
        let hint = if leaves.len() == 1 { Some(path) } else { None };
        let (root, mut change) = self.begin(epoch, space);
        let splits = replace_below(root, path.steps(), leaves, &mut change);
        grow(root, splits, &mut change);
        let level = root.level();
        self.root_level = level;
        self.hint.set(hint);
    }

    /// Makes changes whose keys are of one leaf at first.
    fn apply_one_by_one(&mut self, mut changes: &[ItemChange<'_>], epoch: Epoch, space: &mut dyn NodeSpace) {
        while let Some(((key, value), rest)) = changes.split_first() {
            let missed = match value {
                Some(value) => self.insert(**key, value, epoch, space).err(),
                None => self.remove(key, epoch, space).err(),
            };
            assert_eq!(missed, None, "changes take nothing out of memory");
            changes = self.apply_to_same_leaf(rest, epoch, space);
        }
    }

    /// Makes the next changes that concern the leaf of the last insertion, and that neither split it nor leave it small.
    /// Returns those that remain.
    fn apply_to_same_leaf<'a, 'change>(
        &mut self,
        changes: &'a [ItemChange<'change>],
        epoch: Epoch,
        space: &mut dyn NodeSpace,
    ) -> &'a [ItemChange<'change>] {
        let Some(path) = self.hint.get() else { return changes };
        if !changes.first().is_some_and(|(key, _)| path.bounds.contains(key)) {
            return changes;
        }
        let (root, mut change) = self.begin(epoch, space);
        let leaf = own_leaf(root, path.steps(), &mut change);
        let mut near = 0;
        let in_place = |(key, value): &&ItemChange<'_>| {
            path.bounds.contains(key) && leaf.change_in_place(key, *value, SMALL_LEAF, &mut near)
        };
        let made = changes.iter().take_while(in_place).count();
        &changes[made..]
    }

    /// Removes the item of `key`; false if there was none, and then nothing was changed.
    ///
    /// # Errors
    /// The node that is needed first; nothing was changed.
    ///
    /// # Panics
    /// If epochs run backwards.
    pub fn remove(&mut self, key: &Key, epoch: Epoch, space: &mut dyn NodeSpace) -> Result<bool, Missing> {
        let (node, path) = self.descend(key)?;
        let Ok(index) = leaf_of(&node).search(key) else { return Ok(false) };
        drop(node);
        self.hint.set(None);
        let (root, mut change) = self.begin(epoch, space);
        let remains = remove_from(root, path.steps(), index, &mut change);
        shrink(root, remains, &mut change);
        let level = root.level();
        self.root_level = level;
        Ok(true)
    }

    /// The root's place, for a change of a tree whose path is in memory.
    fn begin<'a>(&'a mut self, epoch: Epoch, space: &'a mut dyn NodeSpace) -> (&'a mut Rc<Node>, Change<'a>) {
        self.forget_recent();
        let root = self.root.node_mut().expect("the path, of which the root is part, is in memory");
        assert!(epoch >= root.epoch, "change of epoch {epoch} after one of epoch {}", root.epoch);
        let (cohort, fanout, gauge) = (self.cohort.get(), self.fanout, &self.gauge);
        (root, Change { epoch, cohort, fanout, gauge, space, restructured: false })
    }
}

/// The node of `slot`, made free for change: new since the last freeze, and held by nobody else.
fn own<'node>(slot: &'node mut Rc<Node>, change: &mut Change<'_>) -> &'node mut Node {
    if slot.cohort == change.cohort {
        assert_eq!(slot.state.get(), NodeState::Dirty, "nodes are sealed only after a freeze");
        // Copied only if a reader holds a value of it; the copy keeps the address, for the reader's is never written.
        let node = Rc::make_mut(slot);
        node.epoch = change.epoch;
        return node;
    }
    let address = change.space.allocate_node();
    change.space.free_node(slot.address);
    // Without a copy, if no frozen tree and no reader holds the node.
    let node = Rc::make_mut(slot);
    node.address = address;
    node.epoch = change.epoch;
    node.cohort = change.cohort;
    node.state.set(NodeState::Dirty);
    node
}

/// As [`Tree::begin`], for a change of places only.
pub(super) fn begin_copy<'a>(
    tree: &'a mut Tree,
    epoch: Epoch,
    space: &'a mut dyn NodeSpace,
) -> (&'a mut Rc<Node>, Change<'a>) {
    tree.begin(epoch, space)
}

/// Copies the nodes along `steps`. Returns how many of them leave a place in `blocks`.
pub(super) fn copy_way(
    slot: &mut Rc<Node>,
    steps: &[u16],
    blocks: &std::ops::Range<u64>,
    change: &mut Change<'_>,
) -> u64 {
    let before = slot.address;
    let node = own(slot, change);
    let left = u64::from(before != node.address && blocks.contains(&before.get()));
    match &mut node.body {
        Body::Leaf(_) => left,
        Body::Inner(inner) => {
            let (index, steps) = next_step(steps);
            let child = inner.child_mut(index).node_mut().expect("the path is in memory");
            left + copy_way(child, steps, blocks, change)
        }
    }
}

/// Gives back the place of a node that the tree no longer has.
fn release(node: &Node, change: &mut Change<'_>) {
    if node.cohort == change.cohort {
        change.space.discard_node(node.address);
    } else {
        change.space.free_node(node.address);
    }
}

fn new_node(body: Body, change: &mut Change<'_>) -> Rc<Node> {
    let address = change.space.allocate_node();
    Rc::new(Node::new(address, change.epoch, change.cohort, body, change.gauge))
}

fn insert_into(
    slot: &mut Rc<Node>,
    steps: &[u16],
    key: &Key,
    value: &[u8],
    change: &mut Change<'_>,
) -> (Inserted, Vec<Split>) {
    let inner = match &mut own(slot, change).body {
        Body::Leaf(leaf) => return insert_into_leaf(leaf, key, value, change),
        Body::Inner(inner) => inner,
    };
    let (index, steps) = next_step(steps);
    let child = inner.child_mut(index).node_mut().expect("the path is in memory");
    let (inserted, splits) = insert_into(child, steps, key, value, change);
    (inserted, take_in(inner, index, splits, change))
}

/// Puts `leaves` in the place of the leaf at the end of `steps`.
fn replace_below(
    slot: &mut Rc<Node>,
    steps: &[u16],
    leaves: Vec<Leaf>,
    change: &mut Change<'_>,
) -> Vec<Split> {
    if !steps.is_empty() {
        let Body::Inner(inner) = &mut own(slot, change).body else { unreachable!("a leaf ends every path") };
        let (index, steps) = next_step(steps);
        let child = inner.child_mut(index).node_mut().expect("the path is in memory");
        let splits = replace_below(child, steps, leaves, change);
        return take_in(inner, index, splits, change);
    }
    let mut leaves = leaves.into_iter();
    let first = leaves.next().expect("a merge yields a leaf");
    let mut separator = behind(&first);
    renew(slot, Body::Leaf(first), change);
    let mut splits = Vec::new();
    for leaf in leaves {
        let next = behind(&leaf);
        splits.push(Split { separator, right: new_node(Body::Leaf(leaf), change) });
        separator = next;
    }
    splits
}

/// The smallest key that a leaf right of this one may hold.
///
/// Not the first key that one has: of keys that fall into the gap, descending ones too, none may ever cut a leaf of its
/// own off a full one.
fn behind(left: &Leaf) -> Key {
    let last = left.len().checked_sub(1).map(|last| left.key(last));
    last.and_then(|key| key.successor()).unwrap_or(Key::MAX)
}

/// Gives the node of `slot` another body: as if it had been made free for change and rewritten, but without a copy.
fn renew(slot: &mut Rc<Node>, body: Body, change: &mut Change<'_>) {
    let address = if slot.cohort == change.cohort {
        assert_eq!(slot.state.get(), NodeState::Dirty, "nodes are sealed only after a freeze");
        slot.address
    } else {
        let address = change.space.allocate_node();
        change.space.free_node(slot.address);
        address
    };
    *slot = Rc::new(Node::new(address, change.epoch, change.cohort, body, change.gauge));
}

/// The leaf at the end of a path, made free for change with everything above it.
fn own_leaf<'node>(slot: &'node mut Rc<Node>, steps: &[u16], change: &mut Change<'_>) -> &'node mut Leaf {
    match &mut own(slot, change).body {
        Body::Leaf(leaf) => leaf,
        Body::Inner(inner) => {
            let (index, steps) = next_step(steps);
            own_leaf(inner.child_mut(index).node_mut().expect("the path is in memory"), steps, change)
        }
    }
}

fn next_step(steps: &[u16]) -> (usize, &[u16]) {
    let (index, steps) = steps.split_first().expect("a path has a step for each inner node");
    (usize::from(*index), steps)
}

fn insert_into_leaf(
    leaf: &mut Leaf,
    key: &Key,
    value: &[u8],
    change: &mut Change<'_>,
) -> (Inserted, Vec<Split>) {
    let (index, inserted) = match leaf.search_from_end(key) {
        Ok(index) if leaf.replace(index, value) => return (Inserted::Replaced, Vec::new()),
        Ok(index) => (index, Inserted::Replaced),
        Err(index) if leaf.has_room(value.len()) => {
            leaf.insert(index, key, value);
            return (Inserted::New, Vec::new());
        }
        Err(index) => (index, Inserted::New),
    };
    change.restructured = true;
    let (mut right, side) = leaf.split(index, value.len());
    match side {
        Side::Left => leaf.insert(index, key, value),
        Side::Right => right.insert(index - leaf.len(), key, value),
    }
    let split = Split { separator: behind(leaf), right: new_node(Body::Leaf(right), change) };
    (inserted, vec![split])
}

/// Takes in what was split off child `index`, and splits the node if it has too many children then.
fn take_in(inner: &mut Inner, index: usize, splits: Vec<Split>, change: &mut Change<'_>) -> Vec<Split> {
    let mut last = index;
    for Split { separator, right } in splits {
        last += 1;
        inner.insert(last, separator, Child::resident(right));
    }
    // As with leaves: ascending insertion leaves full nodes behind.
    let ascending = last + 1 == inner.len();
    split_inner(inner, ascending, change)
}

/// Splits a node with too many children.
fn split_inner(inner: &mut Inner, ascending: bool, change: &mut Change<'_>) -> Vec<Split> {
    let count = inner.len();
    if count <= change.fanout {
        return Vec::new();
    }
    let pieces = count.div_ceil(change.fanout);
    let mut splits = Vec::with_capacity(pieces - 1);
    for piece in (1..pieces).rev() {
        let at = if ascending { piece * change.fanout } else { piece * count / pieces };
        let (separator, right) = inner.split_off(at);
        splits.push(Split { separator, right: new_node(Body::Inner(right), change) });
    }
    splits.reverse();
    splits
}

/// Puts a new root above the old one and what was split off it, if anything was.
fn grow(root: &mut Rc<Node>, mut splits: Vec<Split>, change: &mut Change<'_>) {
    while !splits.is_empty() {
        let level = root.level() + 1;
        assert!(level <= MAX_LEVEL, "a tree cannot grow this high");
        let mut inner = Inner::new(level);
        inner.push(Key::MIN, Child::resident(Rc::clone(root)));
        for Split { separator, right } in splits {
            inner.push(separator, Child::resident(right));
        }
        splits = split_inner(&mut inner, true, change);
        *root = new_node(Body::Inner(inner), change);
    }
}

fn remove_from(slot: &mut Rc<Node>, steps: &[u16], item: usize, change: &mut Change<'_>) -> Remains {
    let inner = match &mut own(slot, change).body {
        Body::Leaf(leaf) => {
            leaf.remove(item);
            return match (leaf.len(), leaf.used()) {
                (0, _) => Remains::Nothing,
                (_, ..SMALL_LEAF) => Remains::Little,
                _ => Remains::Enough,
            };
        }
        Body::Inner(inner) => inner,
    };
    let (index, steps) = next_step(steps);
    let child = inner.child_mut(index).node_mut().expect("the path is in memory");
    match remove_from(child, steps, item, change) {
        Remains::Enough => return Remains::Enough,
        Remains::Nothing if inner.len() == 1 => return Remains::Nothing,
        Remains::Nothing => remove_empty(inner, index, change),
        Remains::Little => {
            // With the right neighbour first: then nothing needs to be copied that is not already.
            if !join(inner, index, change) && index > 0 {
                join(inner, index - 1, change);
            }
        }
    }
    match inner.len() {
        // Of several that had to stay without items, the last one: now the whole node can go.
        1 if holds_nothing(inner.child(0)) => Remains::Nothing,
        count if count < change.fanout / 3 => Remains::Little,
        _ => Remains::Enough,
    }
}

/// Whether a child is known to hold nothing: an empty leaf, or a node with such a one as its only child.
fn holds_nothing(child: &Child) -> bool {
    let Some(node) = child.peek() else { return false };
    match &node.body {
        Body::Leaf(leaf) => leaf.len() == 0,
        Body::Inner(inner) => inner.len() == 1 && holds_nothing(inner.child(0)),
    }
}

/// Takes away child `index`, which holds nothing, if a neighbour can have its keys: one whose edge is in memory down to
/// the leaf, so that no key that could be changed before would miss now. Else the child stays, without items.
fn remove_empty(inner: &mut Inner, index: usize, change: &mut Change<'_>) {
    if index > 0 && edge_is_resident(inner.child(index - 1), Side::Right) {
        release_chain(&inner.remove(index), change);
    } else if index + 1 < inner.len() && edge_is_resident(inner.child(index + 1), Side::Left) {
        release_chain(&inner.remove_forward(index), change);
    }
}

/// Whether the outermost nodes below `child` on one side are in memory.
fn edge_is_resident(child: &Child, side: Side) -> bool {
    let Some(node) = child.peek() else { return false };
    match &node.body {
        Body::Leaf(_) => true,
        Body::Inner(inner) => {
            let outermost = if side == Side::Left { 0 } else { inner.len() - 1 };
            edge_is_resident(inner.child(outermost), side)
        }
    }
}

/// Releases a node that holds nothing: an empty leaf, or a node with such a one as its only child.
fn release_chain(child: &Child, change: &mut Change<'_>) {
    let node = child.peek().expect("what was just emptied is in memory");
    release(&node, change);
    if let Body::Inner(inner) = &node.body {
        assert_eq!(inner.len(), 1, "a node that holds nothing has one child at most");
        release_chain(inner.child(0), change);
    }
}

/// Joins child `left` with its right neighbour if both are in memory and small enough; true if it did.
fn join(inner: &mut Inner, left: usize, change: &mut Change<'_>) -> bool {
    if left + 1 >= inner.len() {
        return false;
    }
    let separator = inner.key(left + 1);
    let (left_child, right_child) = inner.pair_mut(left);
    let (Some(left_slot), Some(right_node)) = (left_child.node_mut(), right_child.node_mut()) else {
        return false;
    };
    let fits = match (&left_slot.body, &right_node.body) {
        (Body::Leaf(left), Body::Leaf(right)) => left.used() + right.used() <= JOINED_LEAF,
        (Body::Inner(left), Body::Inner(right)) => left.len() + right.len() <= change.fanout * 3 / 4,
        _ => unreachable!("children of a node have the same level"),
    };
    if !fits {
        return false;
    }
    match (&mut own(left_slot, change).body, &right_node.body) {
        (Body::Leaf(left), Body::Leaf(right)) => left.append(right),
        (Body::Inner(left), Body::Inner(right)) => left.append(separator, right),
        _ => unreachable!("children of a node have the same level"),
    }
    release(right_node, change);
    inner.remove(left + 1);
    true
}

/// Takes levels off a root that no longer needs them.
fn shrink(root: &mut Rc<Node>, remains: Remains, change: &mut Change<'_>) {
    if remains == Remains::Nothing
        && let Body::Inner(inner) = &root.body
    {
        release_chain(inner.child(0), change);
        own(root, change).body = Body::Leaf(Leaf::new());
    }
    loop {
        let only = match &root.body {
            Body::Inner(inner) if inner.len() == 1 => inner.child(0).peek(),
            _ => None,
        };
        let Some(only) = only else { return };
        release(root, change);
        *root = only;
    }
}
