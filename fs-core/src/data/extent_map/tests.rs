//! The plans against a model of two files that share blocks, with the format's invariants checked after every step.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use reactor::WallTime;

use super::share::Sharing;
use super::*;
use crate::batch::{BatchContext, Interrupt};
use crate::format::extent::{BACKREF, RUN, physical_block};
use crate::format::node::TreeIdentity;
use crate::tree::{NodeSpace, Tree};
use crate::types::{Epoch, ShardId};

const FILES: [InodeNr; 2] = [InodeNr::new(64), InodeNr::new(128)];
const FILE_BLOCKS: u64 = 96;

struct EndlessSpace(u64);

impl NodeSpace for EndlessSpace {
    fn allocate_node(&mut self) -> BlockNr {
        self.0 += NODE_STEP;
        BlockNr::new(self.0)
    }

    fn free_node(&mut self, _address: BlockNr) {}
}

const NODE_STEP: u64 = 4;

/// What a block of a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    Data { at: u64, checksum: u32 },
    Preallocated { at: u64 },
}

impl Block {
    fn at(self) -> u64 {
        match self {
            Self::Data { at, .. } | Self::Preallocated { at } => at,
        }
    }
}

struct Bench {
    tree: Tree,
    space: EndlessSpace,
    next_block: u64,
    files: [BTreeMap<u64, Block>; 2],
    used: BTreeSet<u64>,
}

impl Bench {
    fn new() -> Self {
        let mut space = EndlessSpace(0);
        let shard = ShardId::new(0).unwrap();
        let tree = Tree::empty(TreeIdentity { volume: 1, shard }, Epoch::new(1), &mut space);
        Self { tree, space, next_block: 1000, files: Default::default(), used: BTreeSet::new() }
    }

    fn commit<T>(&mut self, plan: impl FnOnce(&mut Batch<'_>) -> Plan<T>) -> T {
        let now = WallTime::new(1, 0).unwrap();
        let context = BatchContext { now, hash_seed: [0; 16] };
        let mut batch = Batch::new(&self.tree, context);
        let value = plan(&mut batch).unwrap();
        let changes = batch.finish();
        for (key, value) in changes.items() {
            match value {
                Some(value) => drop(self.tree.insert(*key, value, Epoch::new(1), &mut self.space).unwrap()),
                None => drop(self.tree.remove(key, Epoch::new(1), &mut self.space).unwrap()),
            }
        }
        for (start, count) in changes.committed {
            for block in start.get()..start.get() + count.get() {
                assert!(self.used.insert(block), "block {block} is used twice");
            }
        }
        for (start, count) in changes.freed {
            for block in start.get()..start.get() + count.get() {
                assert!(self.used.remove(&block), "block {block} is freed and was not used");
            }
        }
        value
    }

    fn drop_blocks(&mut self, file: usize, first: u64, blocks: u64, budget: u32) {
        let mut at = first * BLOCK_SIZE;
        let end = (first + blocks) * BLOCK_SIZE;
        while at < end {
            let mut items = ItemBudget::new(budget);
            let dropped = self.commit(|batch| drop_range(batch, FILES[file], at..end, &mut items));
            assert!(dropped.up_to > at, "every step gets somewhere");
            let model = &mut self.files[file];
            let before = model.len() as u64;
            model.retain(|block, _| !(at / BLOCK_SIZE..dropped.up_to / BLOCK_SIZE).contains(block));
            assert_eq!(dropped.blocks, before - model.len() as u64);
            at = dropped.up_to;
            self.check();
        }
    }

    fn insert(&mut self, file: usize, first: u64, blocks: u64, kind: ExtentKind) {
        self.drop_blocks(file, first, blocks, 0);
        let at = self.next_block;
        self.next_block += blocks + at % 3;
        let checksums: Vec<u32> = match kind {
            ExtentKind::Data => (at..at + blocks).map(|block| block as u32 * 7).collect(),
            ExtentKind::Preallocated => Vec::new(),
        };
        let new = NewExtent {
            start: BlockNr::new(at),
            blocks: BlockCount::new(blocks),
            generation: Generation::new(at),
            checksums: &checksums,
        };
        self.commit(|batch| {
            insert_extent(batch, FILES[file], first * BLOCK_SIZE, new);
            Ok(())
        });
        for block in 0..blocks {
            let at = at + block;
            let model = match kind {
                ExtentKind::Data => Block::Data { at, checksum: at as u32 * 7 },
                ExtentKind::Preallocated => Block::Preallocated { at },
            };
            self.files[file].insert(first + block, model);
        }
    }

    /// Fills what is preallocated, in one piece on the device, from `first` on, up to `blocks`.
    fn fill(&mut self, file: usize, first: u64, blocks: u64) {
        let mapped = self.commit(|batch| next_extent(batch, FILES[file], first * BLOCK_SIZE));
        let Some(mapped) = mapped.filter(|mapped| {
            mapped.extent.kind == ExtentKind::Preallocated && mapped.offset <= first * BLOCK_SIZE
        }) else {
            return;
        };
        let skipped = first - mapped.offset / BLOCK_SIZE;
        let start = block_at(mapped.extent.start, skipped);
        let blocks = blocks.min(mapped.extent.blocks.get() - skipped);
        let checksums: Vec<u32> = (start.get()..start.get() + blocks).map(|at| at as u32 * 11).collect();
        self.commit(|batch| fill_preallocated(batch, FILES[file], first * BLOCK_SIZE, start, &checksums));
        for block in 0..blocks {
            let at = start.get() + block;
            self.files[file].insert(first + block, Block::Data { at, checksum: at as u32 * 11 });
        }
    }

    /// Lets a file share what the other has in a range, as a clone does, and checks after every step.
    /// Where `limits` are given, many extents at once where that is possible.
    fn share(&mut self, file: usize, first: u64, blocks: u64, to: u64, limits: Option<Limits>) {
        let other = 1 - file;
        self.drop_blocks(other, to, blocks, 0);
        let (from, end) = (first * BLOCK_SIZE, (first + blocks) * BLOCK_SIZE);
        let mut at = from;
        while at < end {
            let offset = to * BLOCK_SIZE + (at - from);
            let many = limits.map(|limits| {
                let target = (FILES[other], offset);
                let many = self.commit(|batch| share_many(batch, FILES[file], &(at..end), target, limits));
                Sharing { up_to: many.up_to, blocks: many.blocks }
            });
            let several = many.filter(|many| many.up_to > at);
            let shared = several.unwrap_or_else(|| {
                self.commit(|batch| {
                    let shared = share(batch, FILES[file], &(at..end), FILES[other], offset)?;
                    assert!(batch.changed() <= SHARE_ITEMS, "{} items", batch.changed());
                    Ok(shared)
                })
            });
            assert!(shared.up_to > at && shared.up_to <= end, "every step gets somewhere");
            let step = at / BLOCK_SIZE..shared.up_to / BLOCK_SIZE;
            let data: Vec<(u64, Block)> = self.files[file]
                .range(step)
                .filter(|(_, block)| matches!(block, Block::Data { .. }))
                .map(|(index, block)| (index - first + to, *block))
                .collect();
            assert_eq!(shared.blocks, data.len() as u64);
            self.files[other].extend(data);
            at = shared.up_to;
            self.check();
        }
    }

    /// Moves what a file has in a range to the other, which has nothing there, as a clone sets it aside.
    fn set_aside(&mut self, file: usize, first: u64, blocks: u64) {
        let other = 1 - file;
        self.drop_blocks(other, first, blocks, 0);
        let (mut at, end) = (first * BLOCK_SIZE, (first + blocks) * BLOCK_SIZE);
        while at < end {
            let moved = self.commit(|batch| {
                let moved = set_aside(batch, FILES[file], FILES[other], &(at..end))?;
                assert!(batch.changed() <= SET_ASIDE_ITEMS, "{} items", batch.changed());
                Ok(moved)
            });
            let (up_to, count) = moved.unwrap_or((end, 0));
            let piece: Vec<(u64, Block)> = self.files[file]
                .range(at / BLOCK_SIZE..up_to / BLOCK_SIZE)
                .map(|(index, block)| (*index, *block))
                .collect();
            assert_eq!(count, piece.len() as u64);
            for (index, block) in piece {
                self.files[file].remove(&index);
                self.files[other].insert(index, block);
            }
            at = up_to;
            self.check();
        }
    }

    /// The invariants of `format/extent.rs`, and the model.
    fn check(&mut self) {
        let mut items = Vec::new();
        let mut from = Some(Key::MIN);
        while let Some(key) = from
            && let Some((key, value)) = self.commit(|batch| batch.next(&key))
        {
            from = key.successor();
            items.push((key, value));
        }
        let mut runs = BTreeMap::new();
        let mut references: BTreeMap<u64, u32> = BTreeMap::new();
        let mut backrefs = BTreeSet::new();
        for (key, value) in &items {
            if key.kind == RUN {
                runs.insert(physical_block(key).unwrap().get(), Run::decode(value).unwrap());
            } else if key.kind == BACKREF {
                let blocks = Backref::decode(value).unwrap().blocks.get();
                backrefs.insert((physical_block(key).unwrap().get(), key.offset, key.minor, blocks));
            }
        }
        for (number, inode) in FILES.iter().enumerate() {
            let mut found = BTreeMap::new();
            for (key, value) in items.iter().filter(|(key, _)| key.object == inode.get()) {
                let extent = Extent::decode(value).unwrap();
                let blocks = extent.blocks.get();
                let back = (extent.start.get(), inode.get(), key.offset, blocks);
                assert!(backrefs.remove(&back), "no back-reference for {back:?}");
                let mut at = 0;
                while at < blocks {
                    let run = &runs[&(extent.start.get() + at)];
                    assert_eq!((run.generation, run.kind()), (extent.generation, extent.kind));
                    *references.entry(extent.start.get() + at).or_default() += 1;
                    for block in 0..run.blocks.get() {
                        let physical = extent.start.get() + at + block;
                        let content = match run.kind() {
                            ExtentKind::Data => {
                                Block::Data { at: physical, checksum: run.checksums[block as usize] }
                            }
                            ExtentKind::Preallocated => Block::Preallocated { at: physical },
                        };
                        let before = found.insert(key.offset / BLOCK_SIZE + at + block, content);
                        assert_eq!(before, None, "extents overlap");
                    }
                    at += run.blocks.get();
                }
                assert_eq!(at, blocks, "an extent covers whole runs");
            }
            assert_eq!(found, self.files[number]);
        }
        assert!(backrefs.is_empty(), "back-references without an extent: {backrefs:?}");
        let counted: BTreeMap<u64, u32> = runs.iter().map(|(start, run)| (*start, run.references)).collect();
        assert_eq!(counted, references);
        let mapped: BTreeSet<u64> = self.files.iter().flatten().map(|(_, block)| block.at()).collect();
        assert_eq!(mapped, self.used, "blocks in use are those that a file has");
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Data,
    Preallocate,
    Fill,
    Drop(u32),
    Share(u64, Option<Limits>),
    SetAside,
}

fn limits() -> impl Strategy<Value = Limits> {
    let few = (1..8usize, 1..12usize, 1..300usize).prop_map(|(extents, items, bytes)| Limits {
        extents,
        items,
        bytes,
    });
    prop_oneof![Just(Limits::SLICE), few]
}

fn step() -> impl Strategy<Value = (Step, usize, u64, u64)> {
    let kind = prop_oneof![
        4 => Just(Step::Data),
        2 => Just(Step::Preallocate),
        2 => Just(Step::Fill),
        3 => (0..30u32).prop_map(Step::Drop),
        4 => (0..FILE_BLOCKS - 24, prop::option::of(limits())).prop_map(|(to, limits)| Step::Share(to, limits)),
        2 => Just(Step::SetAside),
    ];
    (kind, 0..2usize, 0..FILE_BLOCKS - 24, 1..24u64)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn extents_runs_and_references_agree_after_any_sequence_of_changes(steps in prop::collection::vec(step(), 1..30)) {
        let mut bench = Bench::new();
        for (kind, file, first, blocks) in steps {
            match kind {
                Step::Data => bench.insert(file, first, blocks, ExtentKind::Data),
                Step::Preallocate => bench.insert(file, first, blocks, ExtentKind::Preallocated),
                Step::Fill => bench.fill(file, first, blocks),
                Step::Drop(budget) => bench.drop_blocks(file, first, blocks, budget),
                Step::Share(to, limits) => bench.share(file, first, blocks, to, limits),
                Step::SetAside => bench.set_aside(file, first, blocks),
            }
            bench.check();
        }
    }

    #[test]
    fn segments_of_a_range_are_its_data_in_order(steps in prop::collection::vec(step(), 1..20), first in 0..80u64, blocks in 1..40u64) {
        let mut bench = Bench::new();
        for (kind, file, first, blocks) in steps {
            match kind {
                Step::Preallocate => bench.insert(file, first, blocks, ExtentKind::Preallocated),
                Step::Drop(budget) => bench.drop_blocks(file, first, blocks, budget),
                _ => bench.insert(file, first, blocks, ExtentKind::Data),
            }
        }
        let range = first * BLOCK_SIZE..(first + blocks) * BLOCK_SIZE;
        let segments = bench.commit(|batch| data_segments(batch, FILES[0], range));
        let found: Vec<(u64, Block)> = segments.iter().flat_map(|segment| {
            let place = segment.checksums.iter().enumerate();
            place.map(|(index, &checksum)| {
                let at = segment.start.get() + index as u64;
                (segment.offset / BLOCK_SIZE + index as u64, Block::Data { at, checksum })
            })
        }).collect();
        let expected: Vec<(u64, Block)> = bench.files[0].range(first..first + blocks)
            .filter(|(_, block)| matches!(block, Block::Data { .. }))
            .map(|(&index, &block)| (index, block))
            .collect();
        prop_assert_eq!(found, expected);
    }
}

#[test]
fn run_of_another_generation_is_damage() {
    let mut bench = Bench::new();
    bench.insert(0, 0, 4, ExtentKind::Data);
    bench.commit(|batch| {
        let key = run_key(BlockNr::new(1000));
        let mut run = Run::decode(&batch.get(&key)?.unwrap()).unwrap();
        run.generation = Generation::new(3);
        batch.put(key, run.encode());
        Ok(())
    });
    let now = WallTime::new(1, 0).unwrap();
    let context = BatchContext { now, hash_seed: [0; 16] };
    let batch = Batch::new(&bench.tree, context);
    let outcome = data_segments(&batch, FILES[0], 0..BLOCK_SIZE);
    assert!(matches!(outcome, Err(Interrupt::Failed(FsError::Damaged { .. }))));
}

/// Blocks of a copy came home, were used for something else, and that was lent: they are no part of the copy any more. A
/// relocation took them for it, and the volume became read-only.
#[test]
fn blocks_that_are_lent_as_something_else_are_no_copy() {
    use super::lend::{CopyPiece, CopySource, Piece, copies_lacking, lend_copy, receive, refer_to_lent};
    let [lender, holder, borrower] = [0, 1, 2].map(|number| ShardId::new(number).unwrap());
    let (start, now, then) = (BlockNr::new(5000), Generation::new(9), Generation::new(4));
    let mut bench = Bench::new();
    let checksums = vec![1, 2, 3];
    let piece = CopyPiece { start, generation: now, checksums: checksums.clone(), source: CopySource::Fresh };
    bench.commit(|batch| lend_copy(batch, holder, &piece));
    let copy = 5000..5003;
    let lacking = |generation| {
        move |batch: &mut Batch<'_>| copies_lacking(batch, borrower, (&(5000..5003), generation), |_| false)
    };
    assert_eq!(bench.commit(lacking(now)), [(copy, CopySource::LentTo(holder))]);
    assert_eq!(bench.commit(lacking(then)), []);

    // The borrower's side: a return of these blocks, then a run.
    let mut bench = Bench::new();
    let of = |generation| Piece { offset: 0, start, generation, checksums: checksums.clone(), owner: lender };
    bench.commit(|batch| {
        receive(batch, lender, (start, 3), now);
        Ok(())
    });
    assert_eq!(bench.commit(|batch| refer_to_lent(batch, &of(then), |_| true)), 0);
    assert_eq!(bench.commit(|batch| refer_to_lent(batch, &of(now), |_| true)), 3);
    assert_eq!(bench.commit(|batch| refer_to_lent(batch, &of(then), |_| true)), 0);
}
