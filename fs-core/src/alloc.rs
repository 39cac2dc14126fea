//! Space: promises of it, and the blocks behind them.
//!
//! Owns: [`SpaceCounter`] and [`Reservation`] (what may be promised, from any thread), [`Allocator`] (a shard's
//! groups and which blocks of them to use), and how both are found again at mount ([`LoadedGroup`]).
//!
//! Every allocation is backed by a reservation made before, so it cannot fail; every free waits until no superblock
//! that a mount may fall back to needs the blocks. Life of a block:
//!
//! | from | event | to |
//! |---|---|---|
//! | free | allocated in epoch N | used; set in the bitmap of N |
//! | used | freed in epoch N | pinned; clear in the bitmap of N, and not to be had |
//! | pinned | the epoch after N is durable | free |
//!
//! A group that is being emptied is *closed*: nothing is allocated there. That is only in memory; a mount finds it open.
//!
//! *Legal crash outcomes*: the bitmaps of the newest superblock's epoch, or of the epoch before if that superblock is
//! lost in both rings. Loading finds the same used and the same pinned blocks as the allocator that wrote them had.
//!
//! Excludes: reference counts of runs (items of the tree), I/O.

mod allocator;
mod bitmap;
mod counter;
mod group;
mod load;
mod read;
#[cfg(test)]
mod tests;

pub use allocator::{
    Allocator, AllocatorStats, CloseError, FreeError, FrozenGroups, GroupFigures, GroupImage, MAX_ALLOCATION,
};
pub(crate) use counter::reserve_of;
#[cfg(test)]
pub(crate) use counter::shortage;
pub use counter::{Priority, Reservation, SpaceCounter};
pub use group::GroupTransfer;
pub use load::{GroupLoadError, GroupWarning, LoadedGroup, assemble, fresh};
pub(crate) use read::read_group;
pub use read::{LoadedGroups, ReadGroupsError, read_groups};
