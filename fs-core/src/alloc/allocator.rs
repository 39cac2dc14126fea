//! The allocator of a shard: turns promises into blocks, and freed blocks into free ones when that is safe.
//!
//! Owns: [`Allocator`], the shard's groups, their pins, and the policy of placement:
//! - nodes take whole clusters, first fit, so that they stay together and distant groups stay empty;
//! - short data takes pieces of clusters that are broken already, if one is long enough;
//! - long data takes whole clusters, next fit within a group, then the next group; a bounded search settles for the
//!   longest run it has met;
//! - whole clusters are broken for data only while none that is promised, and nothing of the floor, would be lost.
//!
//! Invariants:
//! - no block is handed out twice, nor while it is pinned;
//! - the counter always equals what the bitmaps say (see [`super::counter`]); with a reservation in hand no
//!   allocation fails;
//! - what is freed between two freezes becomes free when the second freeze after it is durable;
//! - nothing is allocated in a closed group; what becomes free there is not in the counter before it is opened again.
//!
//! Excludes: I/O (a freeze returns images to write), epochs (the shard says when one ends).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};

use crate::format::group::{CLUSTER_BLOCKS, SlotIdentity, VolumeLayout};
use crate::planted::{Bug, is_planted};
use crate::types::{BlockCount, BlockNr, Epoch, ShardId};

use super::bitmap::{BitRun, CLUSTER_BITS, WORD_BITS};
use super::counter::{Reservation, SpaceCounter};
use super::group::{Group, GroupTransfer};
use super::load::LoadedGroup;

mod resize;

/// Blocks of one data allocation at most: 1 MiB, the longest run and file extent.
pub const MAX_ALLOCATION: BlockCount = BlockCount::new(256);

/// Words of bitmap that a search looks at before it settles for the best it has found: 4 GiB of volume.
const SEARCH_WORDS: usize = 16_384;

/// Words of bitmap that the search for pieces of broken clusters looks at before it settles for the best of them.
const BROKEN_WINDOW: usize = 64;

/// Groups that a shard never gives away. One: what a shard cannot give away, others cannot fill, and the floor stays in any case.
const MIN_OWNED_GROUPS: usize = 1;

/// Why blocks could not be freed. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FreeError {
    /// In no group of this shard, or across the end of one.
    #[error("blocks {start} + {count} are not in one group of this shard")]
    NotOwned {
        /// First block.
        start: BlockNr,
        /// Blocks.
        count: BlockCount,
    },
    /// Some are free already, or are the volume's own structures: whatever said they were in use is damaged.
    #[error("blocks {start} + {count} are not all in use")]
    NotUsed {
        /// First block.
        start: BlockNr,
        /// Blocks.
        count: BlockCount,
    },
}

/// Why a group could not be closed. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseError {
    /// Another shard's, or nobody's.
    #[error("group {group} does not belong to this shard")]
    NotOwned {
        /// The group.
        group: u64,
    },
    /// The shard cannot do without the group's free blocks.
    #[error("the free space of group {group} is promised already: free {} KiB first", needed * 4)]
    Needed {
        /// The group.
        group: u64,
        /// Blocks that are missing.
        needed: u64,
    },
}

/// What a group holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GroupFigures {
    /// Number of the group.
    pub group: u64,
    /// Blocks that can ever be free.
    pub capacity: u64,
    /// Free blocks.
    pub free: u64,
    /// Blocks freed and not yet free.
    pub pinned: u64,
}

impl GroupFigures {
    /// Blocks of data and nodes, those of unfinished writes included.
    pub fn in_use(&self) -> u64 {
        self.capacity.saturating_sub(self.free + self.pinned)
    }
}

/// Bytes to write to the device, beginning at a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupImage {
    /// First block.
    pub block: BlockNr,
    /// Whole blocks.
    pub bytes: Vec<u8>,
}

/// What a freeze leaves to be written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FrozenGroups {
    /// Bitmap slots, to be on the medium before the superblock of the epoch is.
    pub images: Vec<GroupImage>,
    /// To be added (wrapping) to [`group_digest`](crate::format::superblock::Superblock::group_digest).
    pub digest_delta: u64,
}

/// Figures of an allocator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AllocatorStats {
    /// Groups owned.
    pub groups: u64,
    /// Groups of which nothing is used or pinned.
    pub empty_groups: u64,
    /// Blocks that can be free.
    pub capacity: u64,
    /// Free blocks.
    pub free_blocks: u64,
    /// Free blocks in whole clusters, divided by the blocks of a cluster.
    pub free_clusters: u64,
    /// Blocks freed and not yet free.
    pub pinned: u64,
}

/// Freed blocks that wait, and the freeze that they wait for.
#[derive(Debug)]
struct Pins {
    /// Epoch whose freeze ended the stretch in which they were freed.
    closed_by: Epoch,
    runs: Vec<(u64, BitRun)>,
}

/// The groups of one shard. See the module documentation.
#[derive(Debug)]
pub struct Allocator {
    shard: ShardId,
    layout: VolumeLayout,
    identity: SlotIdentity,
    counter: Arc<SpaceCounter>,
    groups: BTreeMap<u64, Group>,
    /// Groups with free whole clusters, and with free blocks in broken ones.
    with_clusters: BTreeSet<u64>,
    with_broken: BTreeSet<u64>,
    /// Group in which the last long data allocation was.
    data_group: u64,
    /// Freed since the last freeze, as (group, blocks).
    open_pins: Vec<(u64, BitRun)>,
    /// Freed before that, in order of epochs.
    closed_pins: Vec<Pins>,
    /// The epoch whose images are not durable yet.
    frozen: Option<Epoch>,
    pinned: u64,
    /// Groups in which nothing is allocated, as long as somebody holds the lease.
    closed: BTreeMap<u64, Weak<()>>,
    /// Empty groups that leave the volume with the next checkpoint, or come back.
    leaving: Vec<Group>,
}

impl Allocator {
    /// The allocator of `shard`, over the groups that belong to it, as of the end of epoch `closed`.
    ///
    /// # Panics
    /// If a group belongs to another shard.
    pub fn new(
        shard: ShardId,
        layout: VolumeLayout,
        identity: SlotIdentity,
        counter: Arc<SpaceCounter>,
        closed: Epoch,
        groups: Vec<LoadedGroup>,
    ) -> Self {
        let mut allocator = Self {
            shard,
            layout,
            identity,
            counter,
            groups: BTreeMap::new(),
            with_clusters: BTreeSet::new(),
            with_broken: BTreeSet::new(),
            data_group: 0,
            open_pins: Vec::new(),
            closed_pins: Vec::new(),
            frozen: None,
            pinned: 0,
            closed: BTreeMap::new(),
            leaving: Vec::new(),
        };
        let mut runs = Vec::new();
        for loaded in groups {
            assert_eq!(loaded.owner, shard, "a shard is given its own groups");
            let number = loaded.group.number;
            allocator.pinned += loaded.group.pinned as u64;
            runs.extend(loaded.pinned.into_iter().map(|run| (number, run)));
            allocator.insert(loaded.group);
        }
        // Nodes fill groups from the first on; data begins beside them.
        allocator.data_group = allocator.groups.keys().nth(1).copied().unwrap_or(0);
        if !runs.is_empty() {
            allocator.closed_pins.push(Pins { closed_by: closed, runs });
        }
        allocator.counter.set_pinned(allocator.pinned);
        allocator
    }

    /// Takes 1 to `want` consecutive data blocks, at most what is reserved and at most [`MAX_ALLOCATION`]. They are
    /// kept from others, but a freeze does not count them as used before [`commit_data`](Self::commit_data): if the
    /// write that took them does not come to its end before a crash, nobody owns them.
    ///
    /// # Panics
    /// If nothing is wanted or reserved, or if the reservation is another shard's.
    pub fn allocate_data(&mut self, want: BlockCount, from: &mut Reservation) -> (BlockNr, BlockCount) {
        assert!(from.is_of(&self.counter), "space is allocated where it was reserved");
        let want = want.min(MAX_ALLOCATION).get().min(from.data_blocks()) as usize;
        assert!(want > 0, "at least one block is wanted and reserved");
        let (number, run) = self.place_data(want);
        self.take(number, run);
        from.consume_data(run.len as u64);
        (self.groups[&number].block(run.start), BlockCount::new(run.len as u64))
    }

    /// Data blocks that were allocated are referenced from now on.
    ///
    /// # Panics
    /// If they were not allocated, or were committed before.
    pub fn commit_data(&mut self, start: BlockNr, count: BlockCount) {
        let (number, run) = self.taken(start, count);
        self.groups.get_mut(&number).expect("taken blocks are in a group of this shard").commit(run);
    }

    /// Data blocks that were allocated are not needed after all. They are free again at once, and not reserved.
    ///
    /// # Panics
    /// If they were not allocated, or were committed.
    pub fn abandon_data(&mut self, start: BlockNr, count: BlockCount) {
        let (number, run) = self.taken(start, count);
        let group = self.groups.get_mut(&number).expect("taken blocks are in a group of this shard");
        let clusters = group.abandon(run) as u64;
        self.became_free(number, count.get(), clusters);
    }

    /// Takes these very blocks, which a log says were allocated; nothing may be reserved yet. `false` if they are not
    /// all free, or not in one group of this shard. See [`commit_data`](Self::commit_data).
    pub fn claim(&mut self, start: BlockNr, count: BlockCount) -> bool {
        let Some(number) = self.layout.group_of(start) else { return false };
        let Some(group) = self.groups.get_mut(&number) else { return false };
        let bit = (start.get() - group.start.get()) as usize;
        let room = self.layout.bitmap_bits() - bit;
        let Some(len) = usize::try_from(count.get()).ok().filter(|len| *len <= room) else { return false };
        let run = BitRun { start: bit, len };
        if !group.is_free(run) {
            return false;
        }
        let clusters = group.free_clusters;
        group.allocate(run);
        let broken = (clusters - group.free_clusters) as u64;
        self.counter.claimed(count.get(), broken);
        self.index(number);
        true
    }

    /// Where blocks that were allocated lie.
    fn taken(&self, start: BlockNr, count: BlockCount) -> (u64, BitRun) {
        let number = self.layout.group_of(start).expect("what was allocated is in the volume");
        let first = start.get() - self.layout.group_start(number).get();
        let run = BitRun { start: first as usize, len: count.get() as usize };
        assert!(run.start + run.len <= self.layout.bitmap_bits(), "what was allocated is in one group");
        (number, run)
    }

    /// Takes the four blocks of a tree node.
    ///
    /// # Panics
    /// If no node is reserved, or if the reservation is another shard's.
    pub fn allocate_node(&mut self, from: &mut Reservation) -> BlockNr {
        assert!(from.is_of(&self.counter), "space is allocated where it was reserved");
        from.consume_node();
        let number = *self.with_clusters.first().expect("a promised node has a whole cluster");
        let group = self.groups.get_mut(&number).expect("the index names groups that are there");
        let words = group.words();
        let run = group
            .find_clusters(group.node_cursor..words, 1)
            .or_else(|| group.find_clusters(0..words, 1))
            .expect("the index names groups with a whole cluster");
        group.node_cursor = run.start / WORD_BITS;
        let address = group.block(run.start);
        self.take(number, run);
        self.groups.get_mut(&number).expect("the index names groups that are there").commit(run);
        address
    }

    /// Data blocks are not used any more. They become free when no superblock generation needs them.
    ///
    /// # Errors
    /// [`FreeError`]; whatever named these blocks is damaged. Nothing was changed.
    pub fn free(&mut self, start: BlockNr, count: BlockCount) -> Result<(), FreeError> {
        if count.get() == 0 {
            return Ok(());
        }
        let not_owned = FreeError::NotOwned { start, count };
        let number = self.layout.group_of(start).ok_or(not_owned)?;
        let group = self.groups.get_mut(&number).ok_or(not_owned)?;
        let bit = (start.get() - group.start.get()) as usize;
        let len = usize::try_from(count.get()).map_err(|_| not_owned)?;
        if len > self.layout.bitmap_bits() - bit {
            return Err(not_owned);
        }
        let run = BitRun { start: bit, len };
        if !group.may_free(&self.layout, run) {
            return Err(FreeError::NotUsed { start, count });
        }
        group.pin(run);
        if is_planted(Bug::ReuseBeforeDurable) {
            let clusters = group.unpin(run) as u64;
            self.became_free(number, count.get(), clusters);
            return Ok(());
        }
        self.pinned += count.get();
        self.counter.set_pinned(self.pinned);
        match self.open_pins.last_mut() {
            Some((last, pins)) if *last == number && pins.start + pins.len == bit => pins.len += len,
            _ => self.open_pins.push((number, run)),
        }
        Ok(())
    }

    /// A tree node is not used any more.
    ///
    /// # Errors
    /// As [`free`](Self::free).
    pub fn free_node(&mut self, address: BlockNr) -> Result<(), FreeError> {
        self.free(address, BlockCount::new(CLUSTER_BLOCKS))
    }

    /// A tree node's place was never written to and never will be: it is free again at once.
    ///
    /// # Panics
    /// If the place is not in use: only what was just allocated is discarded.
    pub fn discard_node(&mut self, address: BlockNr) {
        let number = self.layout.group_of(address).expect("a node that was allocated is in the volume");
        let group =
            self.groups.get_mut(&number).expect("a node that was allocated is in a group of this shard");
        let run = BitRun { start: (address.get() - group.start.get()) as usize, len: CLUSTER_BITS };
        assert!(group.may_free(&self.layout, run), "a node that was allocated is in use");
        group.pin(run);
        let clusters = group.unpin(run) as u64;
        self.became_free(number, CLUSTER_BLOCKS, clusters);
    }

    /// Ends epoch `epoch` for this shard: returns the bitmaps that changed in it. What is freed from now on belongs
    /// to the next one.
    ///
    /// # Panics
    /// If the epoch frozen before is not durable yet.
    pub fn freeze(&mut self, epoch: Epoch) -> FrozenGroups {
        assert!(self.frozen.is_none(), "epochs become durable one after the other");
        self.frozen = Some(epoch);
        let runs = std::mem::take(&mut self.open_pins);
        if !runs.is_empty() {
            self.closed_pins.push(Pins { closed_by: epoch, runs });
        }
        let mut frozen = FrozenGroups::default();
        for group in self.groups.values_mut() {
            if let Some((images, delta)) = group.freeze(&self.layout, self.identity, epoch, self.shard) {
                frozen.images.extend(images);
                frozen.digest_delta = frozen.digest_delta.wrapping_add(delta);
            }
        }
        frozen
    }

    /// What [`durable`](Self::durable) of `epoch` is going to make free: not needed by anybody any more, and not
    /// yet handed out again. To be deallocated on the device in between.
    pub fn releasable(&self, epoch: Epoch) -> Vec<(BlockNr, BlockCount)> {
        let pins = self.closed_pins.iter().filter(|pins| pins.closed_by < epoch);
        pins.flat_map(|pins| &pins.runs)
            .map(|(number, run)| {
                let start = self.layout.group_start(*number).get() + run.start as u64;
                (BlockNr::new(start), BlockCount::new(run.len as u64))
            })
            .collect()
    }

    /// The superblock of `epoch` is durable: what was freed in the epochs before it becomes free.
    ///
    /// # Panics
    /// If `epoch` is not the one frozen last.
    pub fn durable(&mut self, epoch: Epoch) {
        assert_eq!(self.frozen.take(), Some(epoch), "what becomes durable was frozen");
        for group in self.groups.values_mut() {
            group.durable();
        }
        let kept = self.closed_pins.iter().position(|pins| pins.closed_by >= epoch);
        let kept = kept.unwrap_or(self.closed_pins.len());
        for pins in self.closed_pins.drain(..kept).collect::<Vec<_>>() {
            for (number, run) in pins.runs {
                let group = self.groups.get_mut(&number).expect("a group with pins stays");
                let clusters = group.unpin(run) as u64;
                self.pinned -= run.len as u64;
                self.became_free(number, run.len as u64, clusters);
            }
        }
        self.counter.set_pinned(self.pinned);
        self.open_abandoned();
    }

    /// Allocates nothing in a group from now on, until it is opened or `lease` has no holder any more (which a
    /// checkpoint notices). Closing a closed group gives it the new lease.
    ///
    /// # Errors
    /// [`CloseError`].
    pub fn close(&mut self, number: u64, lease: Weak<()>) -> Result<(), CloseError> {
        let group = self.groups.get(&number).ok_or(CloseError::NotOwned { group: number })?;
        if !self.closed.contains_key(&number) {
            let (blocks, clusters) = (group.free_blocks as u64, group.free_clusters as u64);
            if !self.counter.close(group.capacity as u64, blocks, clusters) {
                let needed = blocks.saturating_sub(self.counter.available());
                return Err(CloseError::Needed { group: number, needed });
            }
        }
        self.closed.insert(number, lease);
        self.index(number);
        Ok(())
    }

    /// Opens a group that was closed.
    pub fn open(&mut self, number: u64) {
        if self.closed.remove(&number).is_none() {
            return;
        }
        let group = &self.groups[&number];
        let (blocks, clusters) = (group.free_blocks as u64, group.free_clusters as u64);
        self.counter.join(group.capacity as u64, blocks, clusters);
        self.index(number);
    }

    /// Whether a block lies in a closed group.
    pub fn is_closed_at(&self, block: BlockNr) -> bool {
        self.layout.group_of(block).is_some_and(|number| self.closed.contains_key(&number))
    }

    /// Opens what nobody has a lease for any more.
    fn open_abandoned(&mut self) {
        let abandoned = |(number, lease): (&u64, &Weak<()>)| (lease.strong_count() == 0).then_some(*number);
        let abandoned: Vec<u64> = self.closed.iter().filter_map(abandoned).collect();
        abandoned.into_iter().for_each(|number| self.open(number));
    }

    /// Where the volume's groups lie.
    pub fn layout(&self) -> &VolumeLayout {
        &self.layout
    }

    /// What each group of the shard holds, in rising order.
    pub fn figures(&self) -> Vec<GroupFigures> {
        self.groups.keys().filter_map(|number| self.figures_of(*number)).collect()
    }

    /// What a group of the shard holds.
    pub fn figures_of(&self, number: u64) -> Option<GroupFigures> {
        let group = self.groups.get(&number)?;
        Some(GroupFigures {
            group: number,
            capacity: group.capacity as u64,
            free: group.free_blocks as u64,
            pinned: group.pinned as u64,
        })
    }

    /// The blocks of a group, by number.
    pub fn blocks_of(&self, number: u64) -> std::ops::Range<u64> {
        let start = self.layout.group_start(number).get();
        start..start + self.layout.group_blocks(number)
    }

    /// Blocks of a group have become free: to be had, if it is open.
    fn became_free(&mut self, number: u64, blocks: u64, clusters: u64) {
        if !self.closed.contains_key(&number) {
            self.counter.released(blocks, clusters);
        }
        self.index(number);
    }

    /// Gives an empty group below `limit` away, if this shard can spare one: none of it is promised, the floor stays, and so do a
    /// few groups.
    pub fn surrender(&mut self, limit: u64) -> Option<GroupTransfer> {
        if self.groups.len() <= MIN_OWNED_GROUPS {
            return None;
        }
        let number = *self
            .groups
            .range(..limit)
            .rev()
            .find(|(number, group)| group.may_leave() && !self.closed.contains_key(*number))?
            .0;
        let group = &self.groups[&number];
        if !self.counter.leave(group.free_blocks as u64, group.free_clusters as u64) {
            return None;
        }
        let group = Box::new(self.groups.remove(&number)?);
        self.with_clusters.remove(&number);
        self.with_broken.remove(&number);
        Some(GroupTransfer { group })
    }

    /// Takes over a group that another shard has given away.
    pub fn adopt(&mut self, transfer: GroupTransfer) {
        let mut group = *transfer.group;
        group.mark_changed();
        self.insert(group);
    }

    /// Figures as of now.
    pub fn stats(&self) -> AllocatorStats {
        let mut stats = AllocatorStats { groups: self.groups.len() as u64, ..AllocatorStats::default() };
        for group in self.groups.values() {
            stats.empty_groups += u64::from(group.free_blocks == group.capacity);
            stats.capacity += group.capacity as u64;
            stats.free_blocks += group.free_blocks as u64;
            stats.free_clusters += group.free_clusters as u64;
            stats.pinned += group.pinned as u64;
        }
        stats
    }

    /// Finds room for up to `want` data blocks. There is some: the caller holds a promise.
    fn place_data(&mut self, want: usize) -> (u64, BitRun) {
        if want < CLUSTER_BITS
            && let Some(place) = self.find_broken(want).filter(|(_, run)| run.len == want)
        {
            return place;
        }
        let wanted = want.div_ceil(CLUSTER_BITS);
        let mut granted = self.counter.break_clusters(wanted as u64) as usize;
        if granted == 0 {
            if let Some(place) = self.find_broken(want) {
                return place;
            }
            self.counter.break_last_cluster();
            granted = 1;
        }
        let (number, mut run) = self.find_clusters(granted);
        run.len = run.len.min(want);
        self.counter.keep_clusters((granted - run.len.div_ceil(CLUSTER_BITS)) as u64);
        (number, run)
    }

    /// Free blocks in broken clusters, in the first group that has any.
    fn find_broken(&mut self, want: usize) -> Option<(u64, BitRun)> {
        let number = *self.with_broken.first()?;
        let group = self.groups.get_mut(&number).expect("the index names groups that are there");
        let (words, cursor) = (group.words(), group.broken_cursor);
        let windows = (cursor..words).step_by(BROKEN_WINDOW).chain((0..cursor).step_by(BROKEN_WINDOW));
        for window in windows {
            if let Some(run) = group.find_broken(window..window + BROKEN_WINDOW, want) {
                group.broken_cursor = run.start / WORD_BITS;
                return Some((number, run));
            }
        }
        unreachable!("the index names groups with free blocks in broken clusters")
    }

    /// A run of `wanted` whole clusters, or the longest that a bounded search meets. There is at least one.
    fn find_clusters(&mut self, wanted: usize) -> (u64, BitRun) {
        let order = || {
            let after = self.with_clusters.range(self.data_group..);
            after.chain(self.with_clusters.range(..self.data_group)).copied()
        };
        let mut best: Option<(u64, BitRun)> = None;
        let mut searched = 0;
        // Groups that have as much at all, then the others.
        let passes = order()
            .filter(|number| self.groups[number].free_clusters >= wanted)
            .chain(order().filter(|number| self.groups[number].free_clusters < wanted));
        for number in passes {
            if best.is_some() && searched >= SEARCH_WORDS {
                break;
            }
            let group = &self.groups[&number];
            let words = group.words();
            for part in [group.data_cursor..words, 0..group.data_cursor] {
                searched += part.len();
                if let Some(run) = group.find_clusters(part, wanted)
                    && best.is_none_or(|(_, best)| run.len > best.len)
                {
                    best = Some((number, run));
                }
                if best.is_some_and(|(_, run)| run.len == wanted * CLUSTER_BITS) {
                    break;
                }
            }
            if best.is_some_and(|(_, run)| run.len == wanted * CLUSTER_BITS) {
                break;
            }
        }
        let (number, run) = best.expect("clusters taken from the counter exist");
        self.data_group = number;
        self.groups.get_mut(&number).expect("just searched").data_cursor = run.start / WORD_BITS;
        (number, run)
    }

    fn take(&mut self, number: u64, run: BitRun) {
        self.groups.get_mut(&number).expect("space was found in one of the groups").allocate(run);
        self.index(number);
    }

    fn insert(&mut self, group: Group) {
        let number = group.number;
        self.counter.join(group.capacity as u64, group.free_blocks as u64, group.free_clusters as u64);
        let before = self.groups.insert(number, group);
        assert!(before.is_none(), "a group has one owner");
        self.index(number);
    }

    /// Brings the indexes up to date with one group.
    fn index(&mut self, number: u64) {
        let group = &self.groups[&number];
        let open = !self.closed.contains_key(&number);
        set_member(&mut self.with_clusters, number, if open { group.free_clusters } else { 0 });
        set_member(&mut self.with_broken, number, if open { group.broken_blocks() } else { 0 });
    }
}

fn set_member(set: &mut BTreeSet<u64>, number: u64, amount: usize) {
    if amount > 0 {
        set.insert(number);
    } else {
        set.remove(&number);
    }
}
