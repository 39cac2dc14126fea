//! From slots on the device to groups in memory.
//!
//! Owns: [`assemble`], which chooses among a group's slots; [`fresh`], the group of a new volume.
//!
//! The newest slot whose epoch is not above the closed one is the group's state. If that slot is of the closed epoch
//! itself, what the slot before it had in use and this one has not was freed in that epoch, and is pinned again: the
//! superblock generation before still needs it. An older state was durable before, so nothing of it is pinned.
//!
//! A slot that is damaged cannot be told from one that was torn by a power cut during the next checkpoint. Whether
//! the right slots were found shows in the sum of their contributions, which the superblock holds: whoever loads all
//! groups compares it.
//!
//! Excludes: reading the slots, comparing the digest.

use crate::format::group::{SLOTS_PER_GROUP, SlotContents, SlotError, SlotIdentity, VolumeLayout, decode};
use crate::types::{Epoch, ShardId};

use super::bitmap::{BitRun, Bitmap};
use super::group::{Group, Slot};

/// A group that no slot describes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("group {group}: no usable bitmap (slots: {})", describe(errors))]
pub struct GroupLoadError {
    /// The group.
    pub group: u64,
    /// What is wrong with each slot; a slot of an epoch above the closed one is `None`.
    pub errors: [Option<SlotError>; SLOTS_PER_GROUP],
}

fn describe(errors: &[Option<SlotError>]) -> String {
    let words: Vec<String> = errors
        .iter()
        .map(|error| {
            error.as_ref().map_or_else(|| "of an epoch that was never closed".to_owned(), ToString::to_string)
        })
        .collect();
    words.join("; ")
}

/// Something about a group's slots that did not prevent loading.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("group {group}, bitmap slot {slot}: {error}")]
pub struct GroupWarning {
    /// The group.
    pub group: u64,
    /// The slot.
    pub slot: usize,
    /// What is wrong with it.
    pub error: SlotError,
}

/// A group as the device describes it, to be given to its owner's [`super::Allocator`].
#[derive(Debug)]
pub struct LoadedGroup {
    /// The shard that owns it.
    pub owner: ShardId,
    /// Part of the chosen slot in the digest of all groups.
    pub contribution: u64,
    /// Slots that are damaged, or were torn by a power cut.
    pub warnings: Vec<GroupWarning>,
    pub(super) group: Group,
    pub(super) pinned: Vec<BitRun>,
}

impl LoadedGroup {
    /// Number of the group.
    pub fn number(&self) -> u64 {
        self.group.number
    }

    /// The bitmap: one bit a block, set where it is used.
    pub fn used(&self) -> &[u64] {
        self.group.used_words()
    }
}

/// Chooses among the slots of `group` for a volume whose last closed epoch is `closed`.
///
/// # Errors
/// [`GroupLoadError`] if no slot can be used.
pub fn assemble(
    layout: &VolumeLayout,
    identity: SlotIdentity,
    group: u64,
    slots: [&[u8]; SLOTS_PER_GROUP],
    closed: Epoch,
) -> Result<LoadedGroup, GroupLoadError> {
    let decoded = slots.map(|bytes| decode(layout, identity, group, bytes));
    let states = [0, 1, 2].map(|slot: usize| match &decoded[slot] {
        Ok(contents) if contents.epoch <= closed => Slot::Holds(contents.epoch),
        Ok(_) => Slot::Abandoned,
        Err(_) => Slot::Blank,
    });
    let usable = || decoded.iter().flatten().filter(|contents| contents.epoch <= closed);
    let newest: Option<&SlotContents> = usable().max_by_key(|contents| contents.epoch);
    let Some(newest) = newest else {
        return Err(GroupLoadError { group, errors: decoded.map(Result::err) });
    };
    let before =
        usable().filter(|contents| contents.epoch < newest.epoch).max_by_key(|contents| contents.epoch);
    let pinned = match before {
        Some(before) if newest.epoch == closed => freed_between(&before.bitmap, &newest.bitmap),
        _ => Vec::new(),
    };
    let warnings = decoded
        .iter()
        .enumerate()
        .filter_map(|(slot, result)| match result {
            Ok(_) | Err(SlotError::Blank | SlotError::WrongVolume) => None,
            Err(error) => Some(GroupWarning { group, slot, error: error.clone() }),
        })
        .collect();
    let used = Bitmap::from_words(newest.bitmap.clone());
    Ok(LoadedGroup {
        owner: newest.owner,
        contribution: newest.contribution,
        warnings,
        group: Group::new(layout, group, used, &pinned, states, newest.contribution),
        pinned,
    })
}

/// The empty group of a new volume, owned by `owner`; its first freeze writes it.
pub fn fresh(layout: &VolumeLayout, group: u64, owner: ShardId) -> LoadedGroup {
    let mut used = Bitmap::zeroes(layout.bitmap_bits());
    for range in layout.overhead(group) {
        used.set(BitRun { start: range.start, len: range.len() });
    }
    let group = Group::new(layout, group, used, &[], [Slot::Blank; SLOTS_PER_GROUP], 0);
    LoadedGroup { owner, contribution: 0, warnings: Vec::new(), group, pinned: Vec::new() }
}

fn freed_between(before: &[u64], after: &[u64]) -> Vec<BitRun> {
    let freed = before.iter().zip(after).map(|(before, after)| before & !after).collect();
    Bitmap::from_words(freed).set_runs()
}
