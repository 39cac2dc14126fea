//! The space counter of a shard: what may still be promised.
//!
//! Owns: [`SpaceCounter`], shared by any number of threads, and [`Reservation`], a promise drawn from it.
//!
//! A front end accepts a write only with a reservation, on whatever thread it runs; the shard later turns promises
//! into blocks, and must never find that it cannot. There are two kinds: *data blocks*, which may lie anywhere, and
//! *nodes*, each a whole aligned cluster of [`CLUSTER_BLOCKS`] blocks. Let F be the shard's free blocks, C its free
//! whole clusters, and let promises for D data blocks and N nodes be out.
//!
//! Invariants:
//! - `blocks` = F − D − 4N ≥ 0 and `clusters` = C − N ≥ 0;
//! - `blocks` is lowered before `clusters`, and raised after it. So whenever a promise for data is out and no free
//!   block lies outside whole clusters (F = 4C), 4C ≥ D + 4N with D ≥ 1 gives C > N: a cluster may be broken, and
//!   `clusters` says so, because nobody who lowered it will yet fail and put it back;
//! - data breaks a cluster only by lowering `clusters`, that is, never one that is promised.
//!
//! Of both, a floor is left that only [`Priority::Reserve`] goes below: for what gives space back.
//!
//! Excludes: which blocks they are (the allocator's business).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::format::group::CLUSTER_BLOCKS;

/// Smallest floor, in clusters: 4 MiB of nodes. A transaction of a truncation alone may need 247, in a tree of four
/// levels.
const MIN_FLOOR_CLUSTERS: u64 = 256;

/// Largest floor, in clusters: 256 MiB of nodes.
const MAX_FLOOR_CLUSTERS: u64 = 16_384;

/// A shard keeps this part of its clusters as the floor, within the two limits.
const FLOOR_DIVISOR: u64 = 32;

/// Of a shard that has given nearly all of its groups away, so many of four clusters are the floor. What is left, a quarter, holds its tree:
/// so its levels are few enough for a truncation of 247 nodes at four levels, 167 at three and 87 at two. With the floor a quarter,
/// nothing could be deleted on such a shard.
const MOST_FLOOR_QUARTERS: u64 = 3;

/// Who may go below the floor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// Leaves the floor alone.
    Normal,
    /// Unlink, truncate, checkpoint: what gives space back, or without which nothing goes on.
    Reserve,
}

/// Space of one shard that is not promised yet. See the module documentation.
#[derive(Debug, Default)]
pub struct SpaceCounter {
    /// Free blocks not promised. Pairs with itself in `reserve` and `Reservation::drop`.
    blocks: AtomicU64,
    /// Free whole clusters not promised. Lowered after `blocks`, raised before it.
    clusters: AtomicU64,
    floor_clusters: AtomicU64,
    // Gauges, written by the allocator only.
    free: AtomicU64,
    pinned: AtomicU64,
    capacity: AtomicU64,
}

impl SpaceCounter {
    /// A counter of a shard that has nothing yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Promises `data_blocks` blocks and `nodes` tree nodes, or nothing.
    pub fn reserve(
        self: &Arc<Self>,
        data_blocks: u64,
        nodes: u64,
        priority: Priority,
    ) -> Option<Reservation> {
        let blocks = nodes.checked_mul(CLUSTER_BLOCKS)?.checked_add(data_blocks)?;
        if blocks == 0 {
            return Some(Reservation { counter: Arc::clone(self), data_blocks: 0, nodes: 0 });
        }
        self.take(blocks, nodes, priority).then(|| Reservation {
            counter: Arc::clone(self),
            data_blocks,
            nodes,
        })
    }

    /// Blocks that a writer can still be promised.
    pub fn available(&self) -> u64 {
        let floor = self.floor_clusters.load(Ordering::Relaxed) * CLUSTER_BLOCKS;
        self.blocks.load(Ordering::Relaxed).saturating_sub(floor)
    }

    /// Free blocks, whether promised or not; pinned ones are not among them.
    pub fn free(&self) -> u64 {
        self.free.load(Ordering::Relaxed)
    }

    /// Blocks freed that an older superblock generation still needs.
    pub fn pinned(&self) -> u64 {
        self.pinned.load(Ordering::Relaxed)
    }

    /// Blocks of the shard that can hold data or nodes, used or not.
    pub fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Relaxed)
    }

    fn take(&self, blocks: u64, nodes: u64, priority: Priority) -> bool {
        #[cfg(test)]
        if priority == Priority::Normal && shortage::strikes() {
            return false;
        }
        let floor = match priority {
            Priority::Normal => self.floor_clusters.load(Ordering::Relaxed),
            Priority::Reserve => 0,
        };
        if !lower(&self.blocks, blocks, floor * CLUSTER_BLOCKS) {
            return false;
        }
        if nodes > 0 && !lower(&self.clusters, nodes, floor) {
            self.blocks.fetch_add(blocks, Ordering::AcqRel);
            return false;
        }
        true
    }

    fn give_back(&self, blocks: u64, clusters: u64) {
        if clusters > 0 {
            self.clusters.fetch_add(clusters, Ordering::AcqRel);
        }
        if blocks > 0 {
            self.blocks.fetch_add(blocks, Ordering::AcqRel);
        }
    }

    /// Takes up to `wanted` clusters for data, none below the floor.
    pub(super) fn break_clusters(&self, wanted: u64) -> u64 {
        let floor = self.floor_clusters.load(Ordering::Relaxed);
        let mut granted = 0;
        let update = self.clusters.fetch_update(Ordering::AcqRel, Ordering::Acquire, |clusters| {
            granted = wanted.min(clusters.saturating_sub(floor));
            (granted > 0).then(|| clusters - granted)
        });
        if update.is_ok() { granted } else { 0 }
    }

    /// Takes one cluster for data, from the floor too. The caller holds a promise for data and has found no free
    /// block outside whole clusters.
    pub(super) fn break_last_cluster(&self) {
        assert!(lower(&self.clusters, 1, 0), "a promise for data is always satisfiable");
    }

    /// Gives back clusters taken for data and not broken.
    pub(super) fn keep_clusters(&self, clusters: u64) {
        self.give_back(0, clusters);
    }

    /// More has become free: `blocks` blocks, which made `clusters` clusters whole.
    pub(super) fn released(&self, blocks: u64, clusters: u64) {
        self.free.fetch_add(blocks, Ordering::Relaxed);
        self.give_back(blocks, clusters);
    }

    /// Promised blocks have been allocated.
    pub(super) fn allocated(&self, blocks: u64) {
        let before = self.free.fetch_sub(blocks, Ordering::Relaxed);
        assert!(before >= blocks, "what is allocated was free");
    }

    /// Free blocks have been taken without a promise, and clusters broken by that; no promises are out.
    pub(super) fn claimed(&self, blocks: u64, clusters: u64) {
        self.allocated(blocks);
        assert!(lower(&self.blocks, blocks, 0), "what is claimed was free and not promised");
        assert!(lower(&self.clusters, clusters, 0), "what is claimed was free and not promised");
    }

    /// Sets the gauge of pinned blocks.
    pub(super) fn set_pinned(&self, blocks: u64) {
        self.pinned.store(blocks, Ordering::Relaxed);
    }

    /// A group joins: `capacity` blocks, of which `blocks` are free in `clusters` whole clusters and outside them.
    pub(super) fn join(&self, capacity: u64, blocks: u64, clusters: u64) {
        self.set_capacity(self.capacity() + capacity);
        self.released(blocks, clusters);
    }

    /// A group that is all free leaves, if what it holds is not promised and the floor stays. `false`: it does not.
    pub(super) fn leave(&self, blocks: u64, clusters: u64) -> bool {
        if !self.take(blocks, clusters, Priority::Normal) {
            return false;
        }
        self.allocated(blocks);
        self.set_capacity(self.capacity() - blocks);
        true
    }

    /// A group of `capacity` blocks is taken out of use: its free blocks, if they are not promised and the floor stays.
    /// `false`: nothing has changed.
    pub(super) fn close(&self, capacity: u64, blocks: u64, clusters: u64) -> bool {
        if blocks > 0 && !self.take(blocks, clusters, Priority::Normal) {
            return false;
        }
        self.allocated(blocks);
        self.set_capacity(self.capacity() - capacity);
        true
    }

    fn set_capacity(&self, capacity: u64) {
        self.floor_clusters.store(reserve_of(capacity) / CLUSTER_BLOCKS, Ordering::Relaxed);
        self.capacity.store(capacity, Ordering::Relaxed);
    }

    /// Unpromised blocks and clusters, for tests.
    #[cfg(test)]
    pub(super) fn unpromised(&self) -> (u64, u64) {
        (self.blocks.load(Ordering::SeqCst), self.clusters.load(Ordering::SeqCst))
    }
}

/// Blocks of the floor of a shard of so many blocks.
pub(crate) fn reserve_of(capacity: u64) -> u64 {
    let clusters = capacity / CLUSTER_BLOCKS;
    let floor = (clusters / FLOOR_DIVISOR).clamp(MIN_FLOOR_CLUSTERS, MAX_FLOOR_CLUSTERS);
    let floor = floor.min(clusters * MOST_FLOOR_QUARTERS / 4);
    floor * CLUSTER_BLOCKS
}

/// Lowers `value` by `amount` if at least `floor` is left.
fn lower(value: &AtomicU64, amount: u64, floor: u64) -> bool {
    value
        .fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| {
            now.checked_sub(amount).filter(|left| *left >= floor)
        })
        .is_ok()
}

/// A promise of space in one shard. What is left when it is dropped goes back.
#[derive(Debug)]
#[must_use = "dropping a reservation gives it back"]
pub struct Reservation {
    counter: Arc<SpaceCounter>,
    data_blocks: u64,
    nodes: u64,
}

impl Reservation {
    /// Data blocks left.
    pub fn data_blocks(&self) -> u64 {
        self.data_blocks
    }

    /// Tree nodes left.
    pub fn nodes(&self) -> u64 {
        self.nodes
    }

    /// Takes a part off; `None` if there is not as much.
    pub fn split(&mut self, data_blocks: u64, nodes: u64) -> Option<Self> {
        let data_left = self.data_blocks.checked_sub(data_blocks)?;
        let nodes_left = self.nodes.checked_sub(nodes)?;
        (self.data_blocks, self.nodes) = (data_left, nodes_left);
        Some(Self { counter: Arc::clone(&self.counter), data_blocks, nodes })
    }

    /// Adds another reservation of the same shard.
    pub fn merge(&mut self, mut other: Self) {
        assert!(Arc::ptr_eq(&self.counter, &other.counter), "reservations of one shard are merged");
        self.data_blocks += std::mem::take(&mut other.data_blocks);
        self.nodes += std::mem::take(&mut other.nodes);
    }

    pub(super) fn is_of(&self, counter: &Arc<SpaceCounter>) -> bool {
        Arc::ptr_eq(&self.counter, counter)
    }

    pub(super) fn consume_data(&mut self, blocks: u64) {
        self.data_blocks =
            self.data_blocks.checked_sub(blocks).expect("the allocator takes what is reserved");
        self.counter.allocated(blocks);
    }

    pub(super) fn consume_node(&mut self) {
        self.nodes = self.nodes.checked_sub(1).expect("a node is allocated with a reservation for it");
        self.counter.allocated(CLUSTER_BLOCKS);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.counter.give_back(self.data_blocks + self.nodes * CLUSTER_BLOCKS, self.nodes);
    }
}

/// A lack of space that tests make: promises are refused by their number.
#[cfg(test)]
pub(crate) mod shortage {
    use std::cell::Cell;

    /// How many promises are still made, and for how many of those that follow there is no space; then how many were refused.
    #[derive(Clone, Copy, Default)]
    struct Plan {
        left: u64,
        refusals: u64,
        refused: u64,
    }

    thread_local! {
        static PLAN: Cell<Option<Plan>> = const { Cell::new(None) };
    }

    /// After `left` more promises on this thread there is no space for `refusals` of them.
    pub(crate) fn plan(left: u64, refusals: u64) {
        PLAN.set(Some(Plan { left, refusals, refused: 0 }));
    }

    /// Ends the shortage. Returns how many promises were refused.
    pub(crate) fn end() -> u64 {
        PLAN.take().map_or(0, |plan| plan.refused)
    }

    pub(super) fn strikes() -> bool {
        let Some(mut plan) = PLAN.get() else { return false };
        let strikes = plan.left == 0 && plan.refused < plan.refusals;
        plan.left = plan.left.saturating_sub(1);
        plan.refused += u64::from(strikes);
        PLAN.set(Some(plan));
        strikes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counter(clusters: u64) -> Arc<SpaceCounter> {
        let counter = SpaceCounter::new();
        counter.join(clusters * 4, clusters * 4, clusters);
        counter
    }

    #[test]
    fn dropped_reservation_goes_back_whole() {
        let counter = counter(1000);
        let before = counter.unpromised();
        let mut reservation = counter.reserve(100, 7, Priority::Normal).unwrap();
        assert_eq!(counter.unpromised(), (4000 - 128, 993));
        let part = reservation.split(40, 3).unwrap();
        assert!(reservation.split(61, 0).is_none());
        assert_eq!((reservation.data_blocks(), reservation.nodes()), (60, 4));
        drop(reservation);
        let mut rest = counter.reserve(0, 0, Priority::Normal).unwrap();
        rest.merge(part);
        assert_eq!(counter.unpromised(), (4000 - 52, 997));
        drop(rest);
        assert_eq!(counter.unpromised(), before);
    }

    #[test]
    fn normal_reservations_leave_the_floor() {
        let counter = counter(9600);
        assert_eq!(counter.available(), (9600 - 300) * 4);
        assert!(counter.reserve(9300 * 4 + 1, 0, Priority::Normal).is_none());
        assert!(counter.reserve(0, 9301, Priority::Normal).is_none());
        let all = counter.reserve(9300 * 4, 0, Priority::Normal).unwrap();
        assert_eq!(counter.available(), 0);
        assert!(counter.reserve(1, 0, Priority::Normal).is_none());
        let rest = counter.reserve(0, 300, Priority::Reserve).unwrap();
        assert!(counter.reserve(1, 0, Priority::Reserve).is_none());
        drop((all, rest));
        assert_eq!(counter.unpromised(), (38_400, 9600));
    }

    #[test]
    fn absurd_reservation_is_refused() {
        let counter = counter(1000);
        assert!(counter.reserve(u64::MAX, 1, Priority::Reserve).is_none());
        assert!(counter.reserve(0, u64::MAX, Priority::Reserve).is_none());
        assert_eq!(counter.unpromised(), (4000, 1000));
    }

    #[test]
    fn threads_never_promise_more_than_there_is() {
        let counter = counter(2000);
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let counter = &counter;
                scope.spawn(move || {
                    let mut held = Vec::new();
                    for round in 0..2000_u64 {
                        let priority = if round % 3 == 0 { Priority::Reserve } else { Priority::Normal };
                        held.extend(counter.reserve((round * 7 + thread) % 300, round % 40, priority));
                        if held.len() > 8 {
                            drop(held.swap_remove((round % 8) as usize));
                        }
                        let (blocks, clusters) = counter.unpromised();
                        assert!(blocks <= 8000 && clusters <= 2000);
                    }
                });
            }
        });
        assert_eq!(counter.unpromised(), (8000, 2000));
    }
}
