//! What the tree costs per item: sorted and random insertion, lookup, scan, removal, sealing, loading.

use std::hint::black_box;
use std::ops::ControlFlow;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use fs_core::tree::{FrozenTree, ItemKind, Key, NODE_BLOCKS, NodeSpace, Tree, TreeIdentity};
use fs_core::types::{BlockNr, Epoch, ShardId};

const ITEMS: u64 = 262_144;

/// About the size of a file extent.
const VALUE: [u8; 32] = [0x5a; 32];

/// Space without end.
struct Endless(u64);

impl NodeSpace for Endless {
    fn allocate_node(&mut self) -> BlockNr {
        self.0 += NODE_BLOCKS;
        BlockNr::new(self.0)
    }

    fn free_node(&mut self, _: BlockNr) {}
}

fn key(index: u64) -> Key {
    Key::new(65, ItemKind::new(1), index * 8192, 0)
}

/// The indexes below [`ITEMS`], a power of two, in an order without pattern.
fn shuffled() -> impl Iterator<Item = u64> {
    (0..ITEMS).map(|index| index.wrapping_mul(0x9E37_79B1).wrapping_add(12_345) % ITEMS)
}

fn identity() -> TreeIdentity {
    TreeIdentity { volume: 1, shard: ShardId::FIRST }
}

fn empty() -> (Tree, Endless) {
    let mut space = Endless(0);
    (Tree::empty(identity(), Epoch::new(1), &mut space), space)
}

fn fill(order: impl Iterator<Item = u64>) -> (Tree, Endless) {
    let (mut tree, mut space) = empty();
    for index in order {
        tree.insert(key(index), &VALUE, Epoch::new(1), &mut space).expect("all is in memory");
    }
    (tree, space)
}

fn seal(frozen: &FrozenTree) {
    for node in frozen.dirty_nodes() {
        black_box(node.seal());
    }
}

fn tree(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("tree");
    group.throughput(Throughput::Elements(ITEMS)).sample_size(10);
    group.bench_function("insert ascending", |bencher| bencher.iter_with_large_drop(|| fill(0..ITEMS)));
    group.bench_function("insert random", |bencher| bencher.iter_with_large_drop(|| fill(shuffled())));

    let (tree, _) = fill(0..ITEMS);
    group.bench_function("get random", |bencher| {
        bencher.iter(|| {
            for index in shuffled() {
                black_box(tree.with(&key(index), |value| value[0]).expect("all is in memory"));
            }
        });
    });
    group.bench_function("scan", |bencher| {
        bencher.iter(|| {
            let mut sum = 0;
            tree.scan(&Key::MIN, &Key::MAX, |key, value| {
                sum += key.offset + value.len() as u64;
                ControlFlow::Continue(())
            })
            .expect("all is in memory");
            sum
        });
    });
    group.bench_function("replace after a freeze, ascending", |bencher| {
        bencher.iter_batched(
            || {
                let (tree, space) = fill(0..ITEMS);
                (tree.freeze(), tree, space)
            },
            |(frozen, mut tree, mut space)| {
                for index in 0..ITEMS {
                    tree.insert(key(index), &VALUE, Epoch::new(2), &mut space).expect("all is in memory");
                }
                (frozen, tree)
            },
            BatchSize::PerIteration,
        );
    });
    group.bench_function("remove ascending", |bencher| {
        bencher.iter_batched(
            || fill(0..ITEMS),
            |(mut tree, mut space)| {
                for index in 0..ITEMS {
                    tree.remove(&key(index), Epoch::new(1), &mut space).expect("all is in memory");
                }
                tree
            },
            BatchSize::PerIteration,
        );
    });
    group.bench_function("seal", |bencher| {
        bencher.iter_batched(|| fill(0..ITEMS).0.freeze(), |frozen| seal(&frozen), BatchSize::PerIteration);
    });
    group.finish();
}

criterion_group!(benches, tree);
criterion_main!(benches);
