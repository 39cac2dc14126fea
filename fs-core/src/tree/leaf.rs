//! A leaf in memory: the slotted page of the format, changed in place.
//!
//! Owns: search, insertion, removal, division and joining of a leaf's items.
//!
//! Invariants:
//! - slots are sorted; every value lies between `heap` and the end of the page; values do not overlap;
//! - `live` is the sum of the values' lengths; what else lies above `heap` is garbage that compaction reclaims.
//!
//! The page differs from its stored image: its header is unused and its values lie in any order, with garbage between
//! them. [`Leaf::items`] is what gets encoded, so that the image stays canonical.
//!
//! Excludes: addresses, epochs, neighbours.

use std::cmp::Ordering;

use zerocopy::IntoBytes;

use crate::format::node::{
    HEADER_SIZE, Key, LEAF_CAPACITY, MAX_VALUE, NODE_SIZE, NodeImage, RawSlot, SLOT_SIZE, slots, zeroed_image,
};

/// Slots that a search looks at one by one before it halves.
const NEAR: usize = 8;

/// Items of a leaf.
#[derive(Clone)]
pub(super) struct Leaf {
    page: Box<NodeImage>,
    count: usize,
    heap: usize,
    live: usize,
}

impl Leaf {
    /// A leaf without items.
    pub(super) fn new() -> Self {
        Self { page: zeroed_image(), count: 0, heap: NODE_SIZE, live: 0 }
    }

    /// The leaf whose image, with `count` items, has passed the check.
    pub(super) fn adopt(image: Box<NodeImage>, count: usize) -> Self {
        let heap = slots(&image, count).last().map_or(NODE_SIZE, RawSlot::start);
        Self { page: image, count, heap, live: NODE_SIZE - heap }
    }

    /// Number of items.
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// Bytes in use, of [`LEAF_CAPACITY`].
    pub(super) fn used(&self) -> usize {
        self.count * SLOT_SIZE + self.live
    }

    #[inline]
    fn slots(&self) -> &[RawSlot] {
        slots(&self.page, self.count)
    }

    /// The key at `index`.
    #[inline]
    pub(super) fn key(&self, index: usize) -> Key {
        self.slots()[index].key.get()
    }

    /// Where the value at `index` lies: first byte and length.
    #[inline]
    pub(super) fn value_place(&self, index: usize) -> (usize, usize) {
        let slot = &self.slots()[index];
        (slot.start(), slot.length())
    }

    /// The value at `index`.
    pub(super) fn value(&self, index: usize) -> &[u8] {
        let (start, length) = self.value_place(index);
        self.bytes(start, length)
    }

    /// Bytes of the page.
    #[inline]
    pub(super) fn bytes(&self, start: usize, length: usize) -> &[u8] {
        &self.page[start..start + length]
    }

    /// The index of `key`, or the index where it would be inserted.
    #[inline]
    pub(super) fn search(&self, key: &Key) -> Result<usize, usize> {
        self.slots().binary_search_by(|slot| slot.key.get().cmp(key))
    }

    /// As [`search`](Self::search); fastest for a key behind all others, as in sorted batches.
    #[inline]
    pub(super) fn search_from_end(&self, key: &Key) -> Result<usize, usize> {
        match self.slots().last() {
            Some(last) if last.key.get() >= *key => self.search(key),
            _ => Err(self.count),
        }
    }

    /// The items in key order.
    pub(super) fn items(&self) -> impl Iterator<Item = (Key, &[u8])> {
        self.slots().iter().map(|slot| (slot.key.get(), self.bytes(slot.start(), slot.length())))
    }

    /// Whether an item with a value of `length` bytes still fits.
    pub(super) fn has_room(&self, length: usize) -> bool {
        self.used() + SLOT_SIZE + length <= LEAF_CAPACITY
    }

    /// Makes a change (a new value, or removal) if that concerns this leaf alone: nothing to split, and at least `least`
    /// bytes left in use if it is a removal. A removal of what is not there is such a change too. `near` is where the
    /// change before, of a smaller key, was made; it is moved on.
    pub(super) fn change_in_place(
        &mut self,
        key: &Key,
        value: Option<&[u8]>,
        least: usize,
        near: &mut usize,
    ) -> bool {
        let found = self.search_near(key, *near);
        *near = found.unwrap_or_else(|index| index);
        match (found, value) {
            (Ok(index), Some(value)) => {
                let fits = self.used() - self.value_place(index).1 + value.len() <= LEAF_CAPACITY;
                fits && self.replace(index, value)
            }
            (Err(index), Some(value)) => {
                let fits = self.has_room(value.len());
                if fits {
                    self.insert(index, key, value);
                }
                fits
            }
            (Ok(index), None) => {
                let enough = self.used() - self.value_place(index).1 - SLOT_SIZE >= least;
                if enough {
                    self.remove(index);
                }
                enough
            }
            (Err(_), None) => true,
        }
    }

    /// As [`search`](Self::search); fastest for a key that lies at `near` or a little behind.
    #[inline]
    pub(super) fn search_near(&self, key: &Key, near: usize) -> Result<usize, usize> {
        let slots = self.slots();
        if near > 0 && slots.get(near - 1).is_none_or(|slot| slot.key.get() >= *key) {
            return self.search(key);
        }
        for (passed, slot) in slots[near..].iter().take(NEAR).enumerate() {
            match slot.key.get().cmp(key) {
                Ordering::Less => {}
                Ordering::Equal => return Ok(near + passed),
                Ordering::Greater => return Err(near + passed),
            }
        }
        let low = slots.len().min(near + NEAR);
        let found = slots[low..].binary_search_by(|slot| slot.key.get().cmp(key));
        found.map(|index| low + index).map_err(|index| low + index)
    }

    /// Inserts an item at `index`, which must keep the order; the item must fit.
    pub(super) fn insert(&mut self, index: usize, key: &Key, value: &[u8]) {
        assert!(value.len() <= MAX_VALUE && self.has_room(value.len()), "the item fits the leaf");
        let table_end = HEADER_SIZE + self.count * SLOT_SIZE;
        if table_end + SLOT_SIZE + value.len() > self.heap {
            self.compact();
        }
        let slot = HEADER_SIZE + index * SLOT_SIZE;
        self.page.copy_within(slot..table_end, slot + SLOT_SIZE);
        self.count += 1;
        self.place(index, key, value);
    }

    /// Replaces the value at `index`; false, with the item removed, if the new value does not fit.
    pub(super) fn replace(&mut self, index: usize, value: &[u8]) -> bool {
        assert!(value.len() <= MAX_VALUE, "the value is no longer than allowed");
        let (start, length) = self.value_place(index);
        let key = self.key(index);
        if value.len() <= length {
            self.page[start..start + value.len()].copy_from_slice(value);
            self.live -= length - value.len();
            self.write_slot(index, RawSlot::new(&key, start, value.len()));
            return true;
        }
        self.remove(index);
        let fits = self.has_room(value.len());
        if fits {
            self.insert(index, &key, value);
        }
        fits
    }

    /// Removes the item at `index`.
    pub(super) fn remove(&mut self, index: usize) {
        let (start, length) = self.value_place(index);
        let slot = HEADER_SIZE + index * SLOT_SIZE;
        self.page.copy_within(slot + SLOT_SIZE..HEADER_SIZE + self.count * SLOT_SIZE, slot);
        self.count -= 1;
        self.live -= length;
        if self.count == 0 {
            self.heap = NODE_SIZE;
        } else if start == self.heap {
            self.heap += length;
        }
    }

    /// Cuts the leaf so that an item of `length` bytes fits in at `index`. Returns the new right half, and whether
    /// the new item belongs to it.
    pub(super) fn split(&mut self, index: usize, length: usize) -> (Leaf, Side) {
        let (at, side) = self.cut(index, length);
        let mut right = Self::new();
        for item in at..self.count {
            right.push(&self.key(item), self.value(item));
        }
        self.count = at;
        self.live -= right.live;
        self.compact();
        (right, side)
    }

    /// Where to cut: the index of the first old item that goes right, and where the new one goes.
    ///
    /// An item behind all others leaves the old ones together, so that ascending insertion fills leaves. Otherwise
    /// the cut is the one that divides the bytes best.
    fn cut(&self, index: usize, length: usize) -> (usize, Side) {
        if index == self.count {
            return (index, Side::Right);
        }
        let total = self.used() + SLOT_SIZE + length;
        let (mut best, mut best_larger) = ((index, Side::Right), usize::MAX);
        let mut left = 0;
        // The new item is taken to lie before the old one of the same index; a cut lies behind each of them.
        let mut consider = |left: usize, at: usize, side: Side| {
            let larger = left.max(total - left);
            if larger < best_larger {
                (best, best_larger) = ((at, side), larger);
            }
        };
        for (item, slot) in self.slots().iter().enumerate() {
            if item == index {
                if item > 0 {
                    consider(left, item, Side::Right);
                }
                left += SLOT_SIZE + length;
                consider(left, item, Side::Left);
            } else if item > 0 {
                consider(left, item, if index < item { Side::Left } else { Side::Right });
            }
            left += SLOT_SIZE + slot.length();
        }
        assert!(best_larger <= LEAF_CAPACITY, "MAX_VALUE lets every leaf be split in two");
        best
    }

    /// Appends all items of `right`, whose keys are larger and which must fit.
    pub(super) fn append(&mut self, right: &Leaf) {
        assert!(self.used() + right.used() <= LEAF_CAPACITY, "both leaves fit into one");
        self.compact();
        for (key, value) in right.items() {
            self.push(&key, value);
        }
    }

    /// Adds an item behind all others, for which there is room; the page must be compact.
    pub(super) fn push(&mut self, key: &Key, value: &[u8]) {
        self.count += 1;
        self.place(self.count - 1, key, value);
    }

    /// Puts a value at the bottom of the heap and its slot into the table.
    fn place(&mut self, index: usize, key: &Key, value: &[u8]) {
        self.heap -= value.len();
        self.live += value.len();
        self.page[self.heap..self.heap + value.len()].copy_from_slice(value);
        self.write_slot(index, RawSlot::new(key, self.heap, value.len()));
    }

    #[inline]
    fn write_slot(&mut self, index: usize, slot: RawSlot) {
        let at = HEADER_SIZE + index * SLOT_SIZE;
        self.page[at..at + SLOT_SIZE].copy_from_slice(slot.as_bytes());
    }

    /// Moves all values together.
    fn compact(&mut self) {
        if self.heap + self.live == NODE_SIZE {
            return;
        }
        let mut compact = Self::new();
        for (key, value) in self.items() {
            compact.push(&key, value);
        }
        *self = compact;
    }
}

/// A half of a node that was split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// The half with the smaller keys.
    Left,
    /// The half with the larger keys.
    Right,
}
