//! The tree against a model, and the shape it keeps.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::ControlFlow;

use proptest::prelude::*;

use super::*;
use crate::types::ShardId;

mod damage;
mod golden;
mod model;
mod shape;

fn identity() -> TreeIdentity {
    TreeIdentity { volume: 0x1122_3344_5566_7788, shard: ShardId::new(5).unwrap() }
}

fn key(object: u64, offset: u64) -> Key {
    Key::new(object, ItemKind::new(3), offset, 0)
}

/// Space that never gives a freed place out again, except for discarded ones, and knows what is in use.
#[derive(Default)]
struct TestSpace {
    next: u64,
    discarded: Vec<BlockNr>,
    used: BTreeSet<BlockNr>,
    allocations: u64,
}

impl NodeSpace for TestSpace {
    fn allocate_node(&mut self) -> BlockNr {
        self.allocations += 1;
        let address = self.discarded.pop().unwrap_or_else(|| {
            self.next += NODE_BLOCKS;
            BlockNr::new(self.next)
        });
        assert!(self.used.insert(address), "block {address} is in use already");
        address
    }

    fn free_node(&mut self, address: BlockNr) {
        assert!(self.used.remove(&address), "block {address} was freed before");
    }

    fn discard_node(&mut self, address: BlockNr) {
        self.free_node(address);
        self.discarded.push(address);
    }
}

/// A tree with its space and its device.
struct Bench {
    tree: Tree,
    space: TestSpace,
    device: HashMap<BlockNr, Box<NodeImage>>,
    epoch: Epoch,
}

impl Bench {
    fn new(fanout: usize) -> Self {
        let mut space = TestSpace::default();
        let epoch = Epoch::new(7);
        let mut tree = Tree::empty(identity(), epoch, &mut space);
        tree.fanout = fanout;
        Self { tree, space, device: HashMap::new(), epoch }
    }

    /// Tries `operation` until it misses nothing.
    fn retry<T>(&mut self, mut operation: impl FnMut(&mut Self) -> Result<T, Missing>) -> T {
        for _ in 0..10_000 {
            match operation(self) {
                Ok(value) => return value,
                Err(missing) => {
                    let image = self.device[&missing.address()].clone();
                    self.tree.supply(missing, image).unwrap();
                }
            }
        }
        panic!("an operation keeps missing nodes");
    }

    /// Runs a change, checking the documented limit of allocations.
    fn change<T>(&mut self, mut operation: impl FnMut(&mut Self) -> Result<T, Missing>) -> T {
        self.retry(|bench| {
            let (before, height) = (bench.space.allocations, bench.tree.height());
            let outcome = operation(bench);
            let allocated = bench.space.allocations - before;
            match &outcome {
                Ok(_) => {
                    assert!(
                        allocated <= max_nodes_per_change(height),
                        "{allocated} nodes at height {height}"
                    );
                }
                Err(_) => assert_eq!(allocated, 0, "a miss must change nothing"),
            }
            outcome
        })
    }

    fn insert(&mut self, key: Key, value: &[u8]) -> Inserted {
        self.change(|bench| bench.tree.insert(key, value, bench.epoch, &mut bench.space))
    }

    fn remove(&mut self, key: &Key) -> bool {
        self.change(|bench| bench.tree.remove(key, bench.epoch, &mut bench.space))
    }

    /// Seals and writes a frozen tree; afterwards its nodes may be dropped.
    fn write(&mut self, frozen: &FrozenTree) -> TreeRoot {
        for node in frozen.dirty_nodes() {
            let (address, image) = node.seal();
            assert_eq!(address, node.address());
            self.device.insert(address, image);
        }
        let root = frozen.root();
        frozen.mark_written();
        assert!(frozen.dirty_nodes().next().is_none());
        root
    }

    fn checkpoint(&mut self) -> TreeRoot {
        let frozen = self.tree.freeze();
        self.epoch = self.epoch.next().unwrap();
        self.write(&frozen)
    }

    /// The items of a stored tree, read from the device.
    fn stored(&mut self, root: TreeRoot) -> BTreeMap<Key, Vec<u8>> {
        let live = std::mem::replace(&mut self.tree, Tree::open(identity(), root));
        let items = self.retry(|bench| items_of(&bench.tree));
        self.tree = live;
        items
    }

    /// Nodes of a stored tree: level of each, by address.
    fn stored_nodes(&self, root: TreeRoot) -> BTreeMap<BlockNr, (u8, usize)> {
        let mut walk = Walk::new(identity(), root);
        let mut nodes = BTreeMap::new();
        while let Some(expected) = walk.next_node() {
            let node = walk.supply(&self.device[&expected.ptr.address]).unwrap();
            assert!(nodes.insert(expected.ptr.address, (node.level(), node.count())).is_none());
        }
        nodes
    }
}

fn items_of(tree: &Tree) -> Result<BTreeMap<Key, Vec<u8>>, Missing> {
    let mut items = BTreeMap::new();
    tree.scan(&Key::MIN, &Key::MAX, |key, value| {
        assert!(items.insert(*key, value.to_vec()).is_none());
        ControlFlow::Continue(())
    })?;
    Ok(items)
}
