//! An allocation group in memory.
//!
//! Owns: [`Group`], with two bitmaps (what the volume uses; what is not to be had, which is that and what is pinned),
//! its counts, and the state of its slots on the device; [`GroupTransfer`], a group on its way to another shard.
//!
//! Slots. A group rotates through [`SLOTS_PER_GROUP`] slots:
//!
//! | slot | is | may be overwritten |
//! |---|---|---|
//! | `Holds(e)`, highest e | the state that the newest superblock uses | no |
//! | `Holds(e)`, second highest e | what the superblock before it uses, or older | no |
//! | `Holds(e)`, any other | history | yes |
//! | `Blank` | empty, torn or damaged | yes |
//! | `Abandoned` | of an epoch that no superblock closed: a crash came first | yes, and **must** be by the next write |
//!
//! The last rule keeps an epoch number that is used again after a crash from bringing the abandoned state back.
//!
//! Excludes: choosing among groups, counters, pins by epoch (the allocator's).

use crate::format::group::{SLOTS_PER_GROUP, SlotIdentity, VolumeLayout, encode};
use crate::planted::{Bug, is_planted};
use crate::types::{BlockNr, Epoch, ShardId};

use super::allocator::GroupImage;
use super::bitmap::{BitRun, Bitmap};

/// What a slot on the device holds. See the module documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    Blank,
    Holds(Epoch),
    Abandoned,
}

/// One allocation group.
#[derive(Clone, Debug)]
pub(super) struct Group {
    pub(super) number: u64,
    pub(super) start: BlockNr,
    /// What is referenced as of now; becomes the next image.
    used: Bitmap,
    /// What is not to be had: used, pinned, or taken by a write that is not finished.
    busy: Bitmap,
    pub(super) free_blocks: usize,
    pub(super) free_clusters: usize,
    pub(super) pinned: usize,
    /// Blocks that can ever be free.
    pub(super) capacity: usize,
    slots: [Slot; SLOTS_PER_GROUP],
    /// Part of the current slot in the digest of all groups; 0 before the first is written.
    contribution: u64,
    changed: Change,
    /// Word at which the next search for a node begins.
    pub(super) node_cursor: usize,
    /// Word at which the next search for long data begins.
    pub(super) data_cursor: usize,
    /// Word at which the next search for pieces of broken clusters begins.
    pub(super) broken_cursor: usize,
}

/// How far the state in memory is from the device's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// The current slot is durable and says the same.
    None,
    /// The image that says the same was handed out and is not durable yet.
    Frozen,
    /// There were changes since.
    Open,
}

impl Group {
    /// A group whose slots say `used`; blocks in `pinned` are not used, and not to be had.
    pub(super) fn new(
        layout: &VolumeLayout,
        number: u64,
        used: Bitmap,
        pinned: &[BitRun],
        slots: [Slot; SLOTS_PER_GROUP],
        contribution: u64,
    ) -> Self {
        let mut busy = used.clone();
        for run in pinned {
            busy.set(*run);
        }
        let mut overhead = Bitmap::zeroes(layout.bitmap_bits());
        for range in layout.overhead(number) {
            overhead.set(BitRun { start: range.start, len: range.len() });
        }
        let written = slots.iter().any(|slot| matches!(slot, Slot::Holds(_)));
        let abandoned = slots.contains(&Slot::Abandoned);
        Self {
            number,
            start: layout.group_start(number),
            free_blocks: busy.count_clear(),
            free_clusters: busy.count_clear_clusters(),
            pinned: pinned.iter().map(|run| run.len).sum(),
            capacity: overhead.count_clear(),
            used,
            busy,
            slots,
            contribution,
            changed: if written && !abandoned { Change::None } else { Change::Open },
            node_cursor: 0,
            data_cursor: 0,
            broken_cursor: 0,
        }
    }

    pub(super) fn used_words(&self) -> &[u64] {
        self.used.words()
    }

    /// Free blocks that lie in broken clusters.
    pub(super) fn broken_blocks(&self) -> usize {
        self.free_blocks - self.free_clusters * super::bitmap::CLUSTER_BITS
    }

    pub(super) fn words(&self) -> usize {
        self.busy.word_count()
    }

    pub(super) fn find_clusters(&self, words: std::ops::Range<usize>, wanted: usize) -> Option<BitRun> {
        self.busy.find_clusters(words, wanted)
    }

    pub(super) fn find_broken(&self, words: std::ops::Range<usize>, wanted: usize) -> Option<BitRun> {
        self.busy.find_broken(words, wanted)
    }

    pub(super) fn block(&self, bit: usize) -> BlockNr {
        BlockNr::new(self.start.get() + bit as u64)
    }

    /// Whether all of these blocks can be had.
    pub(super) fn is_free(&self, run: BitRun) -> bool {
        self.busy.all_clear(run)
    }

    /// Takes blocks that a search has found. Nobody else gets them, but no image says that they are used.
    pub(super) fn allocate(&mut self, run: BitRun) {
        assert!(self.busy.all_clear(run), "only free blocks are allocated");
        self.free_clusters -= self.busy.clear_clusters_in(run);
        self.free_blocks -= run.len;
        self.busy.set(run);
    }

    /// Blocks that were taken are referenced from now on: the next image says so.
    pub(super) fn commit(&mut self, run: BitRun) {
        assert!(
            self.busy.all_set(run) && self.used.all_clear(run),
            "only blocks that were taken are committed"
        );
        self.used.set(run);
        self.changed = Change::Open;
    }

    /// Blocks that were taken and never referenced are free again. Returns how many clusters became whole.
    pub(super) fn abandon(&mut self, run: BitRun) -> usize {
        assert!(
            self.busy.all_set(run) && self.used.all_clear(run),
            "only blocks that were taken are abandoned"
        );
        let before = self.busy.clear_clusters_in(run);
        self.busy.clear(run);
        let whole = self.busy.clear_clusters_in(run) - before;
        self.free_clusters += whole;
        self.free_blocks += run.len;
        whole
    }

    /// Whether the blocks can be freed: all used, none of the volume's own structures.
    pub(super) fn may_free(&self, layout: &VolumeLayout, run: BitRun) -> bool {
        let end = run.start + run.len;
        end <= self.used.bits()
            && self.used.all_set(run)
            && layout.overhead(self.number).iter().all(|own| end <= own.start || own.end <= run.start)
    }

    /// Blocks stop being used and are pinned.
    pub(super) fn pin(&mut self, run: BitRun) {
        self.used.clear(run);
        self.pinned += run.len;
        self.changed = Change::Open;
    }

    /// Pinned blocks become free. Returns how many clusters became whole.
    pub(super) fn unpin(&mut self, run: BitRun) -> usize {
        assert!(self.busy.all_set(run) && self.used.all_clear(run), "only pinned blocks are released");
        let before = self.busy.clear_clusters_in(run);
        self.busy.clear(run);
        let whole = self.busy.clear_clusters_in(run) - before;
        self.free_clusters += whole;
        self.free_blocks += run.len;
        self.pinned -= run.len;
        whole
    }

    /// The images that record the group's state in `epoch`, if it changed; with the change of the digest.
    pub(super) fn freeze(
        &mut self,
        layout: &VolumeLayout,
        identity: SlotIdentity,
        epoch: Epoch,
        owner: ShardId,
    ) -> Option<(Vec<GroupImage>, u64)> {
        if self.changed != Change::Open {
            return None;
        }
        let recorded = if is_planted(Bug::UnfinishedWritesInBitmaps) { &self.busy } else { &self.used };
        let (bytes, contribution) = encode(layout, identity, self.number, epoch, owner, recorded.words());
        let mut images = Vec::new();
        for slot in self.slots_to_write() {
            self.slots[slot] = Slot::Holds(epoch);
            images.push(GroupImage { block: layout.slot_start(self.number, slot), bytes: bytes.clone() });
        }
        let delta = contribution.wrapping_sub(self.contribution);
        self.contribution = contribution;
        self.changed = Change::Frozen;
        Some((images, delta))
    }

    /// The last image handed out is durable.
    pub(super) fn durable(&mut self) {
        if self.changed == Change::Frozen {
            self.changed = Change::None;
        }
    }

    /// Whether nothing of the group is used or pinned, and its current slot says so durably.
    pub(super) fn may_leave(&self) -> bool {
        self.free_blocks == self.capacity && self.changed == Change::None
    }

    /// The volume's end, which lay in this group, has moved from bit `end` to bit `new_end`: what is between is free. Both are at the
    /// border of a cluster, and behind all of the volume's own structures.
    pub(super) fn extend(&mut self, end: usize, new_end: usize) {
        let run = BitRun { start: end, len: new_end - end };
        assert!(self.used.all_set(run), "what lies behind the end counts as used");
        self.used.clear(run);
        self.busy.clear(run);
        self.free_blocks += run.len;
        self.free_clusters += run.len / super::bitmap::CLUSTER_BITS;
        self.capacity += run.len;
        self.changed = Change::Open;
    }

    /// Whether nothing of it is used, pinned or taken.
    pub(super) fn is_empty(&self) -> bool {
        self.free_blocks == self.capacity
    }

    /// Part of the current slot in the digest of all groups.
    pub(super) fn contribution(&self) -> u64 {
        self.contribution
    }

    /// A new owner has to be written down.
    pub(super) fn mark_changed(&mut self) {
        self.changed = Change::Open;
    }

    /// Every abandoned slot; else one that neither of the two newest states is in.
    fn slots_to_write(&self) -> Vec<usize> {
        let abandoned: Vec<usize> =
            (0..SLOTS_PER_GROUP).filter(|slot| self.slots[*slot] == Slot::Abandoned).collect();
        if !abandoned.is_empty() {
            return abandoned;
        }
        let epoch_of = |slot: &usize| match self.slots[*slot] {
            Slot::Holds(epoch) => Some(epoch),
            Slot::Blank | Slot::Abandoned => None,
        };
        let newest = (0..SLOTS_PER_GROUP).filter_map(|slot| epoch_of(&slot)).max();
        let second =
            (0..SLOTS_PER_GROUP).filter_map(|slot| epoch_of(&slot)).filter(|e| Some(*e) != newest).max();
        // One slot for each of the two; whatever else there is may go, blank ones first.
        let keep = [newest, second]
            .map(|wanted| wanted.and_then(|_| (0..SLOTS_PER_GROUP).find(|s| epoch_of(s) == wanted)));
        let slot = (0..SLOTS_PER_GROUP)
            .filter(|slot| !keep.contains(&Some(*slot)))
            .min_by_key(epoch_of)
            .expect("two of three slots are kept at most");
        vec![slot]
    }
}

/// An empty group that has left one shard and not yet joined another.
#[derive(Debug)]
#[must_use = "a group that is dropped is lost until the next mount"]
pub struct GroupTransfer {
    pub(super) group: Box<Group>,
}

impl GroupTransfer {
    /// Number of the group.
    pub fn group(&self) -> u64 {
        self.group.number
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::BlockCount;

    #[test]
    fn the_two_newest_states_are_never_overwritten() {
        let layout = VolumeLayout::plan(BlockCount::new(8192), 1).unwrap();
        let holds = |epoch| Slot::Holds(Epoch::new(epoch));
        let written = |slots| {
            let used = Bitmap::zeroes(layout.bitmap_bits());
            Group::new(&layout, 1, used, &[], slots, 0).slots_to_write()
        };
        assert_eq!(written([holds(5), holds(4), holds(3)]), [2]);
        assert_eq!(written([holds(5), holds(3), holds(4)]), [1]);
        assert_eq!(written([holds(5), Slot::Blank, holds(4)]), [1]);
        assert_eq!(written([holds(4), holds(5), holds(5)]), [2], "one of two equal ones is enough");
        assert_eq!(written([holds(5), Slot::Abandoned, holds(4)]), [1]);
        assert_eq!(written([Slot::Abandoned, Slot::Abandoned, holds(4)]), [0, 1]);
        assert_eq!(written([Slot::Blank; 3]), [0]);
    }
}
