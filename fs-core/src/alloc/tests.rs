//! The allocator against a reference model: two shards, checkpoints, crashes, groups changing owner.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::format::group::{CLUSTER_BLOCKS, SLOTS_PER_GROUP, SlotIdentity, VolumeLayout};
use crate::types::{BLOCK_SIZE, BlockCount, BlockNr, Epoch, ShardId};

const SHARDS: u8 = 2;
const IDENTITY: SlotIdentity = SlotIdentity { volume: 77, shards: SHARDS };

/// Blocks in use by somebody, as the model sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    shard: usize,
    start: u64,
    len: u64,
}

/// What a superblock of an epoch stands for.
#[derive(Clone, Debug)]
struct Snapshot {
    epoch: Epoch,
    digest: u64,
    pieces: Vec<Piece>,
}

struct World {
    layout: VolumeLayout,
    medium: HashMap<u64, Vec<u8>>,
    counters: Vec<Arc<SpaceCounter>>,
    allocators: Vec<Allocator>,
    reservations: Vec<(usize, Reservation)>,
    pieces: Vec<Piece>,
    /// Freed, with the number of freezes that had happened on that shard.
    pins: Vec<(Piece, Option<Epoch>)>,
    /// Superblocks on the medium that a mount may use, oldest first; two at most.
    durable: Vec<Snapshot>,
    /// A checkpoint whose images are not written yet.
    pending: Option<(Snapshot, Vec<GroupImage>)>,
    closed: Epoch,
    digest: u64,
}

impl World {
    fn new(blocks: u64) -> Self {
        let layout = VolumeLayout::plan(BlockCount::new(blocks), SHARDS).unwrap();
        let counters: Vec<_> = (0..SHARDS).map(|_| SpaceCounter::new()).collect();
        let allocators = (0..SHARDS)
            .map(|shard| {
                let shard = ShardId::new(shard).unwrap();
                let groups = (0..layout.groups())
                    .filter(|group| group % u64::from(SHARDS) == u64::from(shard.get()))
                    .map(|group| fresh(&layout, group, shard))
                    .collect();
                let counter = Arc::clone(&counters[shard.index()]);
                Allocator::new(shard, layout, IDENTITY, counter, Epoch::new(0), groups)
            })
            .collect();
        let mut world = Self {
            layout,
            medium: HashMap::new(),
            counters,
            allocators,
            reservations: Vec::new(),
            pieces: Vec::new(),
            pins: Vec::new(),
            durable: Vec::new(),
            pending: None,
            closed: Epoch::new(0),
            digest: 0,
        };
        world.checkpoint();
        world
    }

    /// Nothing handed out may be used, pinned, needed by a retained superblock, or the volume's own.
    fn check_new(&self, new: Piece) {
        let overlaps =
            |other: &Piece| new.start < other.start + other.len && other.start < new.start + new.len;
        assert!(!self.pieces.iter().any(overlaps), "{new:?} is in use");
        assert!(!self.pins.iter().any(|(pin, _)| overlaps(pin)), "{new:?} is pinned");
        for snapshot in &self.durable {
            assert!(!snapshot.pieces.iter().any(overlaps), "{new:?} is needed by epoch {}", snapshot.epoch);
        }
        let group = self.layout.group_of(BlockNr::new(new.start)).unwrap();
        assert_eq!(self.layout.group_of(BlockNr::new(new.start + new.len - 1)), Some(group));
        let bit = (new.start - self.layout.group_start(group).get()) as usize;
        for own in self.layout.overhead(group) {
            assert!(bit + new.len as usize <= own.start || own.end <= bit, "{new:?} is the volume's own");
        }
    }

    fn allocate_data(&mut self, index: usize, want: u64) -> bool {
        let (shard, reservation) = &mut self.reservations[index];
        let left = reservation.data_blocks();
        if left == 0 {
            return false;
        }
        let (start, len) = self.allocators[*shard].allocate_data(BlockCount::new(want), reservation);
        assert!(len.get() >= 1 && len.get() <= want && len.get() <= 256);
        assert_eq!(reservation.data_blocks(), left - len.get());
        self.allocators[*shard].commit_data(start, len);
        let piece = Piece { shard: *shard, start: start.get(), len: len.get() };
        self.check_new(piece);
        self.pieces.push(piece);
        true
    }

    fn allocate_node(&mut self, index: usize) -> bool {
        let (shard, reservation) = &mut self.reservations[index];
        if reservation.nodes() == 0 {
            return false;
        }
        let start = self.allocators[*shard].allocate_node(reservation);
        assert!(start.get().is_multiple_of(CLUSTER_BLOCKS));
        let piece = Piece { shard: *shard, start: start.get(), len: CLUSTER_BLOCKS };
        self.check_new(piece);
        self.pieces.push(piece);
        true
    }

    fn reserve(&mut self, shard: usize, data: u64, nodes: u64, priority: Priority) -> bool {
        let Some(reservation) = self.counters[shard].reserve(data, nodes, priority) else { return false };
        self.reservations.push((shard, reservation));
        true
    }

    fn free(&mut self, index: usize, skip: u64, len: u64) {
        let piece = self.pieces.swap_remove(index);
        let (skip, len) = (skip.min(piece.len - 1), len.max(1));
        let middle = Piece { start: piece.start + skip, len: len.min(piece.len - skip), ..piece };
        let after = middle.start + middle.len;
        let rest = [
            Piece { len: skip, ..piece },
            Piece { start: after, len: piece.start + piece.len - after, ..piece },
        ];
        self.pieces.extend(rest.into_iter().filter(|rest| rest.len > 0));
        let (start, count) = (BlockNr::new(middle.start), BlockCount::new(middle.len));
        let allocator = &mut self.allocators[middle.shard];
        allocator.free(start, count).unwrap();
        assert_eq!(allocator.free(start, count), Err(FreeError::NotUsed { start, count }));
        self.pins.push((middle, None));
    }

    fn begin_checkpoint(&mut self) {
        assert!(self.pending.is_none());
        let epoch = self.closed.next().unwrap();
        self.closed = epoch;
        let mut images = Vec::new();
        for allocator in &mut self.allocators {
            let frozen = allocator.freeze(epoch);
            images.extend(frozen.images);
            self.digest = self.digest.wrapping_add(frozen.digest_delta);
        }
        for (_, closed_by) in &mut self.pins {
            closed_by.get_or_insert(epoch);
        }
        self.pending = Some((Snapshot { epoch, digest: self.digest, pieces: self.pieces.clone() }, images));
    }

    fn end_checkpoint(&mut self) {
        let (snapshot, images) = self.pending.take().expect("a checkpoint was begun");
        for image in images {
            self.write(&image, image.bytes.len());
        }
        let epoch = snapshot.epoch;
        self.durable.push(snapshot);
        if self.durable.len() > 2 {
            self.durable.remove(0);
        }
        let released: u64 = self
            .pins
            .iter()
            .filter(|(_, closed_by)| closed_by.is_some_and(|closed_by| closed_by < epoch))
            .map(|(pin, _)| pin.len)
            .sum();
        let mut said = 0;
        for allocator in &mut self.allocators {
            said += allocator.releasable(epoch).iter().map(|(_, count)| count.get()).sum::<u64>();
            allocator.durable(epoch);
        }
        assert_eq!(said, released);
        self.pins.retain(|(_, closed_by)| closed_by.is_none_or(|closed_by| closed_by >= epoch));
    }

    fn checkpoint(&mut self) {
        if self.pending.is_none() {
            self.begin_checkpoint();
        }
        self.end_checkpoint();
    }

    fn write(&mut self, image: &GroupImage, bytes: usize) {
        for (index, block) in image.bytes[..bytes].chunks(BLOCK_SIZE as usize).enumerate() {
            let place = self.medium.entry(image.block.get() + index as u64).or_insert_with(|| vec![0; 4096]);
            place[..block.len()].copy_from_slice(block);
        }
    }

    /// Power cut, with any part of a begun checkpoint on the medium; then a mount of the newest superblock, or of
    /// the one before.
    fn crash(&mut self, mut kept: u64, fall_back: bool) {
        if let Some((_, images)) = self.pending.take() {
            for image in images {
                match kept % 3 {
                    0 => {}
                    1 => self.write(&image, image.bytes.len()),
                    _ => self.write(&image, 512 * (1 + (kept % 7) as usize).min(image.bytes.len() / 512)),
                }
                kept = kept.rotate_right(3) ^ 0x55;
            }
        }
        if fall_back && self.durable.len() == 2 {
            self.durable.pop();
        }
        self.reservations.clear();
        self.mount();
    }

    fn mount(&mut self) {
        let snapshot = self.durable.last().unwrap().clone();
        let (layout, slot_blocks) = (self.layout, self.layout.slot_blocks().get());
        let mut by_shard: BTreeMap<usize, Vec<LoadedGroup>> = BTreeMap::new();
        let mut digest = 0_u64;
        for group in 0..layout.groups() {
            let slots: [Vec<u8>; SLOTS_PER_GROUP] = std::array::from_fn(|slot| {
                let start = layout.slot_start(group, slot).get();
                let blocks = (start..start + slot_blocks)
                    .map(|block| self.medium.get(&block).cloned().unwrap_or_else(|| vec![0; 4096]));
                blocks.flatten().collect()
            });
            let slots = [0, 1, 2].map(|slot: usize| &slots[slot][..]);
            let loaded = assemble(&layout, IDENTITY, group, slots, snapshot.epoch).unwrap();
            digest = digest.wrapping_add(loaded.contribution);
            by_shard.entry(loaded.owner.index()).or_default().push(loaded);
        }
        assert_eq!(digest, snapshot.digest, "exactly the slots of the superblock's epoch are chosen");
        self.counters = (0..SHARDS).map(|_| SpaceCounter::new()).collect();
        self.allocators = (0..SHARDS)
            .map(|shard| {
                let counter = Arc::clone(&self.counters[usize::from(shard)]);
                let groups = by_shard.remove(&usize::from(shard)).unwrap_or_default();
                let shard = ShardId::new(shard).unwrap();
                Allocator::new(shard, layout, IDENTITY, counter, snapshot.epoch, groups)
            })
            .collect();
        self.pieces = snapshot.pieces.clone();
        self.closed = snapshot.epoch;
        self.digest = snapshot.digest;
        let next = snapshot.epoch.next().unwrap();
        let runs = self.allocators.iter().flat_map(|allocator| allocator.releasable(next));
        let pins: Vec<_> = runs.map(|(start, count)| (start.get(), count.get())).collect();
        // What the last epoch freed is pinned. After a fall back the state before may be gone; then less is.
        if let [before, snapshot] = &self.durable[..] {
            let freed: BTreeSet<u64> =
                blocks_of(&before.pieces).difference(&blocks_of(&snapshot.pieces)).copied().collect();
            let pinned = pins.iter().flat_map(|(start, len)| *start..start + len).collect();
            assert_eq!(freed, pinned);
        }
        let pin = |(start, len)| (Piece { shard: 0, start, len }, Some(snapshot.epoch));
        self.pins = pins.into_iter().map(pin).collect();
    }

    /// The counters are what the bitmaps are, and those are what the model is.
    fn check(&self) {
        let mut stats = AllocatorStats::default();
        for (shard, allocator) in self.allocators.iter().enumerate() {
            let own = allocator.stats();
            let counter = &self.counters[shard];
            assert_eq!(
                (counter.free(), counter.pinned(), counter.capacity()),
                (own.free_blocks, own.pinned, own.capacity)
            );
            let promised = |amount: fn(&Reservation) -> u64| -> u64 {
                self.reservations.iter().filter(|(of, _)| *of == shard).map(|(_, r)| amount(r)).sum()
            };
            let (data, nodes) = (promised(Reservation::data_blocks), promised(Reservation::nodes));
            assert_eq!(
                counter.unpromised(),
                (own.free_blocks - data - CLUSTER_BLOCKS * nodes, own.free_clusters - nodes)
            );
            stats.groups += own.groups;
            stats.capacity += own.capacity;
            stats.free_blocks += own.free_blocks;
            stats.pinned += own.pinned;
        }
        assert_eq!(stats.groups, self.layout.groups());
        let used: u64 = self.pieces.iter().map(|piece| piece.len).sum();
        let pinned: u64 = self.pins.iter().map(|(pin, _)| pin.len).sum();
        assert_eq!(stats.pinned, pinned);
        assert_eq!(stats.free_blocks, stats.capacity - used - pinned);
    }
}

fn blocks_of(pieces: &[Piece]) -> BTreeSet<u64> {
    pieces.iter().flat_map(|piece| piece.start..piece.start + piece.len).collect()
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Reserve { shard: usize, data: u64, nodes: u64, priority: Priority },
    Data { index: usize, want: u64 },
    Nodes { index: usize },
    Drop { index: usize },
    Split { index: usize, data: u64, nodes: u64 },
    Free { index: usize, skip: u64, len: u64 },
    FreeEvery { nth: usize, skip: u64, len: u64 },
    Fill { shard: usize, want: u64 },
    UseEverything,
    Begin,
    End,
    Checkpoint,
    Crash { kept: u64, fall_back: bool },
    Transfer { from: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let priority = || prop_oneof![3 => Just(Priority::Normal), 1 => Just(Priority::Reserve)];
    prop_oneof![
        6 => (0..2_usize, 0..700_u64, 0..60_u64, priority())
            .prop_map(|(shard, data, nodes, priority)| Step::Reserve { shard, data, nodes, priority }),
        8 => (any::<usize>(), prop_oneof![1..6_u64, 1..300_u64]).prop_map(|(index, want)| Step::Data { index, want }),
        4 => any::<usize>().prop_map(|index| Step::Nodes { index }),
        2 => any::<usize>().prop_map(|index| Step::Drop { index }),
        1 => (any::<usize>(), 0..100_u64, 0..10_u64).prop_map(|(index, data, nodes)| Step::Split { index, data, nodes }),
        6 => (any::<usize>(), 0..8_u64, 1..300_u64).prop_map(|(index, skip, len)| Step::Free { index, skip, len }),
        1 => (1..5_usize, 0..4_u64, 1..4_u64).prop_map(|(nth, skip, len)| Step::FreeEvery { nth, skip, len }),
        1 => (0..2_usize, 1..300_u64).prop_map(|(shard, want)| Step::Fill { shard, want }),
        1 => Just(Step::UseEverything),
        2 => Just(Step::Begin),
        2 => Just(Step::End),
        2 => Just(Step::Checkpoint),
        1 => (any::<u64>(), any::<bool>()).prop_map(|(kept, fall_back)| Step::Crash { kept, fall_back }),
        2 => (0..2_usize).prop_map(|from| Step::Transfer { from }),
    ]
}

impl World {
    fn run(&mut self, step: Step) {
        let reservations = self.reservations.len();
        match step {
            Step::Reserve { shard, data, nodes, priority } => {
                self.reserve(shard, data, nodes, priority);
            }
            Step::Data { index, want } if reservations > 0 => {
                self.allocate_data(index % reservations, want);
            }
            Step::Nodes { index } if reservations > 0 => while self.allocate_node(index % reservations) {},
            Step::Drop { index } if reservations > 0 => {
                drop(self.reservations.swap_remove(index % reservations));
            }
            Step::Split { index, data, nodes } if reservations > 0 => {
                let (shard, reservation) = &mut self.reservations[index % reservations];
                let shard = *shard;
                if let Some(part) = reservation.split(data, nodes) {
                    self.reservations.push((shard, part));
                }
            }
            Step::Free { index, skip, len } if !self.pieces.is_empty() => {
                self.free(index % self.pieces.len(), skip, len);
            }
            Step::FreeEvery { nth, skip, len } => {
                for index in (0..self.pieces.len()).rev().step_by(nth) {
                    self.free(index, skip, len);
                }
            }
            Step::Fill { shard, want } => {
                while self.reserve(shard, want, 0, Priority::Normal) {
                    while self.allocate_data(self.reservations.len() - 1, want) {}
                }
            }
            Step::UseEverything => {
                for index in 0..reservations {
                    while self.allocate_data(index, 17) {}
                }
                for index in 0..reservations {
                    while self.allocate_node(index) {}
                }
            }
            Step::Begin if self.pending.is_none() => self.begin_checkpoint(),
            Step::End if self.pending.is_some() => self.end_checkpoint(),
            Step::Checkpoint => self.checkpoint(),
            Step::Crash { kept, fall_back } => self.crash(kept, fall_back),
            Step::Transfer { from } => {
                if let Some(group) = self.allocators[from].surrender(u64::MAX) {
                    self.allocators[1 - from].adopt(group);
                }
            }
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn allocator_agrees_with_the_model(
        blocks in prop_oneof![Just(32 * 512_u64), Just(31 * 512 + 260), Just(32 * 1024)],
        steps in proptest::collection::vec(step(), 1..120),
    ) {
        let mut world = World::new(blocks);
        world.check();
        for step in steps {
            world.run(step);
            world.check();
        }
        // All that was ever freed becomes free, and every promise can be kept.
        world.run(Step::UseEverything);
        world.reservations.clear();
        for _ in 0..3 {
            world.checkpoint();
        }
        while !world.pieces.is_empty() {
            world.free(0, 0, u64::MAX);
        }
        for _ in 0..3 {
            world.checkpoint();
        }
        world.check();
        prop_assert!(world.pins.is_empty());
        let capacity: u64 = world.counters.iter().map(|counter| counter.capacity()).sum();
        prop_assert_eq!(world.counters.iter().map(|counter| counter.free()).sum::<u64>(), capacity);
    }
}

/// A write-back that was cut short left its blocks marked as used, with nobody to free them.
#[test]
fn blocks_of_unfinished_writes_are_not_in_the_images() {
    let mut world = World::new(32 * 512);
    let free = world.counters[0].free();
    let mut reservation = world.counters[0].reserve(8, 0, Priority::Normal).unwrap();
    let (start, len) = world.allocators[0].allocate_data(BlockCount::new(8), &mut reservation);
    assert_eq!(world.allocators[0].freeze(Epoch::new(100)).images, []);
    world.allocators[0].durable(Epoch::new(100));
    world.allocators[0].commit_data(start, BlockCount::new(len.get() - 1));
    assert_eq!(world.allocators[0].freeze(Epoch::new(101)).images.len(), 1);
    world.allocators[0].durable(Epoch::new(101));
    let last = BlockNr::new(start.get() + len.get() - 1);
    world.allocators[0].abandon_data(last, BlockCount::new(1));
    drop(reservation);
    assert_eq!(world.allocators[0].freeze(Epoch::new(102)).images, []);
    assert_eq!(world.counters[0].free(), free - len.get() + 1);
}

#[test]
fn freed_blocks_wait_for_the_epoch_after_the_one_that_freed_them() {
    let mut world = World::new(32 * 512);
    assert!(world.reserve(0, 1, 0, Priority::Normal));
    assert!(world.allocate_data(0, 1));
    world.checkpoint();
    let free = world.counters[0].free();
    world.free(0, 0, 1);
    assert_eq!((world.counters[0].free(), world.counters[0].pinned()), (free, 1));
    world.checkpoint();
    assert_eq!((world.counters[0].free(), world.counters[0].pinned()), (free, 1));
    world.checkpoint();
    assert_eq!((world.counters[0].free(), world.counters[0].pinned()), (free + 1, 0));
}

#[test]
fn discarded_node_is_free_at_once() {
    let mut world = World::new(32 * 512);
    let before = world.counters[0].unpromised();
    assert!(world.reserve(0, 0, 1, Priority::Normal));
    assert!(world.allocate_node(0));
    let node = world.pieces.pop().unwrap();
    world.allocators[0].discard_node(BlockNr::new(node.start));
    world.check();
    assert_eq!(world.counters[0].unpromised(), before);
}

#[test]
fn fragmented_and_full_shard_keeps_its_promises() {
    let mut world = World::new(32 * 512);
    world.run(Step::Fill { shard: 0, want: 3 });
    world.run(Step::FreeEvery { nth: 2, skip: 1, len: 1 });
    world.checkpoint();
    world.checkpoint();
    // Hardly a whole cluster beyond the floor, but single blocks: promises for data are kept from those.
    let blocks = world.counters[0].available();
    assert!(blocks > 500);
    assert!(world.reserve(0, blocks, 0, Priority::Normal));
    let clusters = world.allocators[0].stats().free_clusters;
    let nodes = clusters - 1;
    assert!(world.reserve(0, 0, nodes, Priority::Reserve), "data leaves the floor's clusters whole");
    world.run(Step::UseEverything);
    world.check();
    assert_eq!(world.reservations[0].1.data_blocks() + world.reservations[1].1.nodes(), 0);
}

#[test]
fn data_leaves_the_floor_in_whole_clusters() {
    let mut world = World::new(32 * 512);
    world.run(Step::Fill { shard: 0, want: 4 });
    world.run(Step::FreeEvery { nth: 2, skip: 1, len: 1 });
    world.checkpoint();
    world.checkpoint();
    let blocks = world.counters[0].available();
    assert!(world.reserve(0, blocks, 0, Priority::Normal));
    world.run(Step::UseEverything);
    // 64 clusters are the floor of so small a shard; every one of them can still become a node.
    let nodes = world.allocators[0].stats().free_clusters;
    assert!(nodes >= 64, "{nodes} whole clusters are left");
    assert!(world.reserve(0, 0, nodes, Priority::Reserve));
    world.run(Step::UseEverything);
    world.check();
}

#[test]
fn large_allocations_are_contiguous_while_space_is() {
    let mut world = World::new(32 * 512);
    assert!(world.reserve(0, 1024, 0, Priority::Normal));
    for _ in 0..4 {
        assert!(world.allocate_data(0, 1000));
    }
    assert!(world.pieces.iter().all(|piece| piece.len == 256));
}

#[test]
fn freeing_foreign_or_structural_blocks_is_an_error_without_effect() {
    let mut world = World::new(32 * 512);
    let allocator = &mut world.allocators[0];
    let free =
        |allocator: &mut Allocator, block, count| allocator.free(BlockNr::new(block), BlockCount::new(count));
    assert!(matches!(free(allocator, 512, 1), Err(FreeError::NotOwned { .. })), "a group of the other shard");
    assert!(matches!(free(allocator, u64::MAX, 1), Err(FreeError::NotOwned { .. })));
    assert!(matches!(free(allocator, 1000, u64::MAX), Err(FreeError::NotOwned { .. })));
    assert!(matches!(free(allocator, 500, 20), Err(FreeError::NotOwned { .. })), "across the end of a group");
    assert!(matches!(free(allocator, 16, 1), Err(FreeError::NotUsed { .. })), "a superblock");
    assert!(matches!(free(allocator, 32, 1), Err(FreeError::NotUsed { .. })), "a bitmap slot");
    assert!(matches!(free(allocator, 200, 1), Err(FreeError::NotUsed { .. })), "a free block");
    assert_eq!(allocator.free(BlockNr::new(200), BlockCount::new(0)), Ok(()));
    world.check();
}

#[test]
fn only_an_empty_and_durably_unchanged_group_leaves() {
    let mut world = World::new(32 * 512);
    assert!(world.reserve(0, 0, 1, Priority::Normal));
    assert!(world.allocate_node(0));
    let mut left = 0;
    while let Some(group) = world.allocators[0].surrender(u64::MAX) {
        assert_ne!(group.group(), 0, "group 0 holds a node");
        world.allocators[1].adopt(group);
        left += 1;
    }
    assert_eq!(left, 13, "three of sixteen groups stay: without them the floor would not be free");
    assert!(
        world.allocators[1].surrender(u64::MAX).is_some_and(|group| group.group() % 2 == 1),
        "adopted ones are not durable"
    );
}

#[test]
fn abandoned_slot_cannot_come_back_when_its_epoch_is_used_again() {
    let mut world = World::new(32 * 512);
    assert!(world.reserve(0, 600, 0, Priority::Normal));
    assert!(world.allocate_data(0, 8));
    world.begin_checkpoint();
    world.crash(u64::MAX / 3 * 2 / 2, false);
    // The same epoch number once more, without touching the group again; then the next.
    world.checkpoint();
    world.crash(0, false);
    assert!(world.pieces.is_empty());
    world.checkpoint();
    world.crash(0, true);
    world.check();
}

#[test]
fn damage_of_the_current_slot_shows_in_the_digest() {
    let mut world = World::new(32 * 512);
    assert!(world.reserve(0, 600, 0, Priority::Normal));
    assert!(world.allocate_data(0, 8));
    world.checkpoint();
    let layout = world.layout;
    let load = |world: &World, group: u64| {
        let slots = [0, 1, 2].map(|slot| {
            let start = layout.slot_start(group, slot).get();
            world.medium.get(&start).cloned().unwrap_or_else(|| vec![0; 4096])
        });
        let slots = [0, 1, 2].map(|slot: usize| &slots[slot][..]);
        assemble(&layout, IDENTITY, group, slots, world.closed)
    };
    let digest = |world: &World| {
        (0..layout.groups())
            .fold(0_u64, |sum, group| sum.wrapping_add(load(world, group).unwrap().contribution))
    };
    assert_eq!(digest(&world), world.digest);
    let group = layout.group_of(BlockNr::new(world.pieces[0].start)).unwrap();
    let newest = layout.slot_start(group, 1).get();
    world.medium.get_mut(&newest).unwrap()[100] ^= 1;
    assert_ne!(digest(&world), world.digest, "an older slot took its place");
    assert_eq!(load(&world, group).unwrap().warnings.len(), 1);
    let oldest = layout.slot_start(group, 0).get();
    world.medium.get_mut(&oldest).unwrap().fill(0);
    let error = load(&world, group).unwrap_err();
    assert_eq!(error.group, group);
    assert!(error.to_string().contains("checksum"));
}
