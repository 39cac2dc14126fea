//! Many changes of one leaf at once.
//!
//! Owns: whether changes are worth it, and the leaves that a leaf becomes by them.
//!
//! One by one, each change searches the leaf and moves a part of its table. A merge copies every item once, whatever the
//! number of changes, and leaves values without gaps between them.
//!
//! Invariant: of the leaves that a merge yields, each but the last is more than half full.
//!
//! Excludes: the nodes above ([`super::change`]).

use std::ops::Range;

use super::leaf::Leaf;
use crate::format::node::{Key, LEAF_CAPACITY, SLOT_SIZE};

/// A key with its new value; `None` removes the item.
pub(super) type ItemChange<'a> = (&'a Key, Option<&'a [u8]>);

/// Changes that are made one by one: fewer than this, …
const LEAST_CHANGES: usize = 8;

/// … or fewer than one for so many items of the leaf.
const ITEMS_FOR_EACH: usize = 8;

/// A piece of a merged leaf: old items that stay, then what a change puts behind them.
struct Step {
    kept: Range<usize>,
    put: Option<usize>,
}

/// What a leaf becomes, as far as it is known before anything is copied.
struct Outline {
    steps: Vec<Step>,
    /// Bytes of all items with their slots.
    bytes: usize,
    /// All changes lie behind what there was.
    behind: bool,
}

/// The leaves of a merge, filled one after the other.
struct Filling {
    full: Vec<Leaf>,
    open: Leaf,
    /// Bytes after which the next leaf begins.
    target: usize,
}

/// Leaves that a merge of changes of so many bytes, slots included, yields at most.
pub(super) const fn max_leaves(bytes: usize) -> usize {
    2 * (LEAF_CAPACITY + bytes).div_ceil(LEAF_CAPACITY) + 1
}

/// Bytes that a change puts, its slot included.
pub(super) fn bytes_put(change: &ItemChange<'_>) -> usize {
    change.1.map_or(0, |value| SLOT_SIZE + value.len())
}

impl Leaf {
    /// Whether `changes` are better merged than made one by one.
    pub(super) fn is_worth_merging(&self, changes: usize) -> bool {
        changes >= LEAST_CHANGES && changes * ITEMS_FOR_EACH >= self.len()
    }

    /// What this leaf becomes by `changes`, in key order; `None` if less than `least` bytes would remain.
    pub(super) fn merge(&self, changes: &[ItemChange<'_>], least: usize) -> Option<Vec<Leaf>> {
        let outline = self.outline(changes);
        if outline.bytes < least {
            return None;
        }
        let leaves = outline.bytes.div_ceil(LEAF_CAPACITY);
        // As with single insertions: ascending ones leave full leaves behind.
        let target = if outline.behind { LEAF_CAPACITY } else { outline.bytes.div_ceil(leaves) };
        let mut filling = Filling { full: Vec::with_capacity(leaves), open: Leaf::new(), target };
        for step in outline.steps {
            for index in step.kept {
                let (start, length) = self.value_place(index);
                filling.room_for(length).push(&self.key(index), self.bytes(start, length));
            }
            if let Some((key, Some(value))) = step.put.map(|put| changes[put]) {
                filling.room_for(value.len()).push(key, value);
            }
        }
        filling.full.push(filling.open);
        Some(filling.full)
    }

    fn outline(&self, changes: &[ItemChange<'_>]) -> Outline {
        let mut outline =
            Outline { steps: Vec::with_capacity(changes.len() + 1), bytes: self.used(), behind: true };
        let mut next = 0;
        for (number, (key, value)) in changes.iter().enumerate() {
            let found = self.search_near(key, next);
            let (Ok(index) | Err(index)) = found;
            outline.behind &= index == self.len();
            let kept = next..index;
            next = index;
            if found.is_ok() {
                outline.bytes -= SLOT_SIZE + self.value_place(index).1;
                next += 1;
            }
            outline.bytes += bytes_put(&changes[number]);
            outline.steps.push(Step { kept, put: value.map(|_| number) });
        }
        outline.steps.push(Step { kept: next..self.len(), put: None });
        outline
    }
}

impl Filling {
    /// The leaf that takes the next item, whose value has `length` bytes.
    fn room_for(&mut self, length: usize) -> &mut Leaf {
        if self.open.len() > 0 && (self.open.used() >= self.target || !self.open.has_room(length)) {
            self.full.push(std::mem::replace(&mut self.open, Leaf::new()));
        }
        &mut self.open
    }
}
