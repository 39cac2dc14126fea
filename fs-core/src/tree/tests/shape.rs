//! Splits and joins at their limits, residency, memory.

use super::*;
use crate::format::node::{LEAF_CAPACITY, SLOT_SIZE};

fn leaves(bench: &Bench, root: TreeRoot) -> usize {
    bench.stored_nodes(root).values().filter(|(level, _)| *level == 0).count()
}

#[test]
fn ascending_insertion_fills_leaves() {
    let mut bench = Bench::new(INNER_CAPACITY);
    let items = 60_000;
    for offset in 0..items {
        bench.insert(key(1, offset), &[7; 24]);
    }
    let root = bench.checkpoint();
    let per_leaf = LEAF_CAPACITY / (SLOT_SIZE + 24);
    assert_eq!(leaves(&bench, root), (items as usize).div_ceil(per_leaf));
    assert_eq!(root.level, 1);
}

#[test]
fn descending_insertion_between_full_leaves_does_not_cut_a_leaf_per_item() {
    let mut bench = Bench::new(INNER_CAPACITY);
    for offset in (0..1000).chain(1_000_000..1_001_000) {
        bench.insert(key(1, offset), &[7; 100]);
    }
    let root = bench.checkpoint();
    let before = leaves(&bench, root);
    for offset in (500_000..502_000).rev() {
        bench.insert(key(1, offset), &[7; 100]);
    }
    let root = bench.checkpoint();
    let per_leaf = LEAF_CAPACITY / (SLOT_SIZE + 100);
    assert!(leaves(&bench, root) - before <= 2 * 2000 / per_leaf + 2);
}

#[test]
fn largest_item_splits_a_full_leaf_at_every_position() {
    // Leaves filled to the last byte, in several patterns of sizes.
    let patterns: [&[usize]; 4] =
        [&[0; 510], &[MAX_VALUE, MAX_VALUE, MAX_VALUE, 832], &[8128, 0], &[508; 30]];
    for pattern in patterns {
        let sizes: Vec<_> = pattern.iter().map(|size| (*size).min(MAX_VALUE)).collect();
        for position in 0..=sizes.len() {
            let mut bench = Bench::new(INNER_CAPACITY);
            for (index, size) in sizes.iter().enumerate() {
                bench.insert(key(1, 10 * index as u64), &vec![1; *size]);
            }
            let new = Key::new(1, ItemKind::new(2), 0, 0);
            let new = if position == 0 { new } else { key(1, 10 * position as u64 - 5) };
            bench.insert(new, &[9; MAX_VALUE]);
            let items = items_of(&bench.tree).unwrap();
            assert_eq!(items.len(), sizes.len() + 1);
            assert_eq!(items[&new], [9; MAX_VALUE]);
            let root = bench.checkpoint();
            assert_eq!(bench.stored(root), items);
        }
    }
}

#[test]
fn value_that_grows_in_a_full_leaf_splits_it() {
    for index in 0..255u64 {
        let mut bench = Bench::new(INNER_CAPACITY);
        for offset in 0..255 {
            bench.insert(key(1, offset), &[1; 32]);
        }
        assert_eq!(bench.tree.height(), 1);
        assert_eq!(bench.insert(key(1, index), &[2; MAX_VALUE]), Inserted::Replaced);
        assert_eq!(bench.tree.height(), 2);
        let items = items_of(&bench.tree).unwrap();
        assert_eq!((items.len(), &items[&key(1, index)][..]), (255, &[2; MAX_VALUE][..]));
    }
}

#[test]
fn removing_everything_gives_all_nodes_back() {
    for fanout in [4, INNER_CAPACITY] {
        for step in [1, 7, 499] {
            let mut bench = Bench::new(fanout);
            let count = 500;
            for offset in 0..count {
                bench.insert(key(1, offset), &[3; 2000]);
            }
            bench.checkpoint();
            for index in 0..count {
                assert!(bench.remove(&key(1, index * step % count)));
            }
            assert_eq!((bench.tree.height(), bench.space.used.len()), (1, 1));
            assert!(!bench.remove(&key(1, 0)));
        }
    }
}

/// A removal that emptied a leaf gave its keys to a neighbour that was not in memory: an insertion that had been
/// touched in that leaf missed, in the middle of its transaction.
#[test]
fn what_was_touched_stays_in_memory_when_its_leaf_is_emptied() {
    for fanout in [4, INNER_CAPACITY] {
        let mut bench = Bench::new(fanout);
        for offset in 0..120 {
            bench.insert(key(1, 10 * offset), &[1; MAX_VALUE]);
        }
        let nodes = bench.space.used.len();
        bench.checkpoint();
        while bench.tree.evict(0) == Eviction::More {}
        // One leaf of three items in the midst of the tree, and the way to it.
        bench.retry(|bench| bench.tree.touch(&key(1, 300)));
        let resident = bench.tree.resident_bytes();
        for offset in [300, 310, 320] {
            assert_eq!(bench.tree.remove(&key(1, offset), bench.epoch, &mut bench.space), Ok(true));
        }
        assert_eq!(bench.tree.get(&key(1, 320)).unwrap().as_deref(), None);
        let inserted = bench.tree.insert(key(1, 315), &[5; 10], bench.epoch, &mut bench.space);
        assert_eq!(inserted, Ok(Inserted::New));
        assert_eq!(bench.tree.remove(&key(1, 315), bench.epoch, &mut bench.space), Ok(true));
        assert_eq!(bench.tree.resident_bytes(), resident, "nothing else was loaded");
        // The empty leaf is stored and found again, stepped over, and goes with its neighbour.
        let root = bench.checkpoint();
        assert_eq!(bench.stored(root).len(), 117);
        assert_eq!(bench.space.used.len(), nodes);
        while bench.tree.evict(0) == Eviction::More {}
        let next = bench.retry(|bench| bench.tree.next(&key(1, 300))).unwrap();
        assert_eq!(next.0, key(1, 330));
        let prev = bench.retry(|bench| bench.tree.prev(&key(1, 320))).unwrap();
        assert_eq!(prev.0, key(1, 290));
        drop((next, prev));
        for offset in 0..120 {
            bench.remove(&key(1, 10 * offset));
        }
        assert_eq!((bench.tree.height(), bench.space.used.len()), (1, 1));
    }
}

#[test]
fn a_miss_names_the_node_and_changes_nothing() {
    let mut bench = Bench::new(4);
    for offset in 0..200 {
        bench.insert(key(1, offset), &[1; 1000]);
    }
    let root = bench.checkpoint();
    let mut tree = Tree::open(identity(), root);
    let allocations = bench.space.allocations;
    let mut levels = Vec::new();
    while let Err(missing) = tree.insert(key(1, 77), &[2; 10], bench.epoch, &mut bench.space) {
        assert_eq!(bench.space.allocations, allocations);
        levels.push(missing.expected().level);
        tree.supply(missing, bench.device[&missing.address()].clone()).unwrap();
    }
    let expected: Vec<_> = (0..=root.level).rev().collect();
    assert_eq!(levels, expected);
    assert!(root.level >= 2);
}

#[test]
fn an_image_that_came_too_late_is_ignored() {
    let mut bench = Bench::new(4);
    for offset in 0..100 {
        bench.insert(key(1, offset), &[1; 1000]);
    }
    let root = bench.checkpoint();
    while bench.tree.evict(0) == Eviction::More {}
    let mut misses = Vec::new();
    let found = loop {
        match bench.tree.get(&key(1, 50)) {
            Ok(found) => break found,
            Err(missing) => {
                misses.push(missing);
                bench.tree.supply(missing, bench.device[&missing.address()].clone()).unwrap();
            }
        }
    };
    drop(found);
    for offset in 0..100 {
        bench.remove(&key(1, offset));
    }
    assert_eq!(bench.tree.height(), 1);
    for missing in misses {
        // Not even looked at: the tree no longer wants it.
        assert_eq!(bench.tree.supply(missing, Box::new([0xee; NODE_SIZE])), Ok(()));
    }
    assert_eq!(items_of(&bench.tree).unwrap().len(), 0);
    assert_eq!(bench.stored(root).len(), 100);
}

#[test]
fn changes_between_two_freezes_take_no_new_places() {
    let mut bench = Bench::new(INNER_CAPACITY);
    for offset in 0..5000 {
        bench.insert(key(1, offset), &[1; 40]);
    }
    bench.checkpoint();
    bench.insert(key(1, 77), &[2; 40]);
    let allocations = bench.space.allocations;
    for _ in 0..10 {
        bench.epoch = bench.epoch.next().unwrap();
        bench.insert(key(1, 77), &[3; 40]);
    }
    assert_eq!(bench.space.allocations, allocations);
    let root = bench.checkpoint();
    assert_eq!(bench.stored(root)[&key(1, 77)], [3; 40]);
}

#[test]
fn nodes_stay_in_memory_until_they_are_on_the_device() {
    let mut bench = Bench::new(4);
    for offset in 0..100 {
        bench.insert(key(1, offset), &[1; 1000]);
    }
    let full = bench.tree.resident_bytes();
    assert_eq!(bench.tree.evict(0), Eviction::Exhausted);
    let frozen = bench.tree.freeze();
    let images: Vec<_> = frozen.dirty_nodes().map(|node| node.seal()).collect();
    assert_eq!(bench.tree.evict(0), Eviction::Exhausted);
    assert_eq!(bench.tree.resident_bytes(), full);
    // Writing failed: another frozen tree yields the same images again.
    drop(frozen);
    let again = bench.tree.freeze();
    assert!(again.dirty_nodes().map(|node| node.seal()).eq(images.iter().cloned()));
    again.mark_written();
    drop(again);
    while bench.tree.evict(0) == Eviction::More {}
    assert_eq!(bench.tree.resident_bytes(), node::NODE_MEMORY);
}

#[test]
fn eviction_spares_what_was_used_lately() {
    let mut bench = Bench::new(INNER_CAPACITY);
    for offset in 0..3000 {
        bench.insert(key(1, offset), &[1; 1000]);
    }
    bench.checkpoint();
    let full = bench.tree.resident_bytes();
    // Cool everything down, keep one key warm.
    for _ in 0..3 {
        bench.tree.evict(full - node::NODE_MEMORY);
    }
    bench.retry(|bench| bench.tree.touch(&key(1, 1500)));
    bench.tree.evict(full / 2);
    assert!(bench.tree.resident_bytes() <= full / 2);
    assert_eq!(bench.tree.touch(&key(1, 1500)), Ok(()));
}

/// When the first child of a node was removed, the next kept its key, although it had got the keys below as well. A
/// split below that key then put a smaller one behind it.
#[test]
fn first_child_begins_where_its_node_does() {
    let mut bench = Bench::new(INNER_CAPACITY);
    for offset in 10..22 {
        bench.insert(key(1, offset), &[1; MAX_VALUE]);
    }
    for offset in 10..13 {
        bench.remove(&key(1, offset));
    }
    for offset in 0..9 {
        bench.insert(key(1, offset), &[2; MAX_VALUE]);
    }
    let root = bench.checkpoint();
    assert_eq!(bench.stored(root).len(), 18);
}

proptest! {
    #[test]
    fn successor_and_predecessor_leave_no_gap(
        left in (0..3u64, 0..3u8, 0..3u64, 0..3u64),
        right in (0..3u64, 0..3u8, 0..3u64, 0..3u64),
    ) {
        // 0, 1 and the largest of each part.
        let wide = |part: u64| if part == 2 { u64::MAX } else { part };
        let key = |(object, kind, offset, minor): (u64, u8, u64, u64)| {
            let kind = if kind == 2 { u8::MAX } else { kind };
            Key::new(wide(object), ItemKind::new(kind), wide(offset), wide(minor))
        };
        let (left, right) = (key(left), key(right));
        if left < right {
            prop_assert!(left.successor().unwrap() <= right);
            prop_assert_eq!(left.successor().unwrap().predecessor(), Some(left));
            prop_assert!(right.predecessor().unwrap() >= left);
            prop_assert_eq!(right.predecessor().unwrap().successor(), Some(right));
        }
    }
}
