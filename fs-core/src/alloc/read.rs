//! Reading all groups of a volume at mount.
//!
//! Owns: [`read_groups`], and the check that what was read is what the superblock stands for.
//!
//! Excludes: choosing among slots ([`super::load`]), who gets which group.

use futures_util::stream::{self, StreamExt};

use crate::disk::VolumeDisk;
use crate::error::FsError;
use crate::format::group::SLOTS_PER_GROUP;
use crate::format::superblock::Superblock;
use crate::types::{BlockCount, ShardId};

use super::load::{GroupLoadError, GroupWarning, LoadedGroup, assemble};

/// Reads that are in flight at once.
const GROUP_READS: usize = 64;

/// Why the groups of a volume could not be loaded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadGroupsError {
    /// A group has no usable bitmap.
    #[error(transparent)]
    Group(#[from] GroupLoadError),
    /// Every group has a bitmap, but they are not the ones that the superblock stands for: one was lost, or is
    /// damaged and an older one took its place. Nothing may be allocated from them.
    #[error("the bitmaps are not those of the superblock: digest {found:#018x}, expected {expected:#018x}")]
    Digest {
        /// Digest in the superblock.
        expected: u64,
        /// Digest of what was read.
        found: u64,
    },
    /// The device failed.
    #[error(transparent)]
    Io(#[from] FsError),
}

/// The groups of a volume.
#[derive(Debug, Default)]
pub struct LoadedGroups {
    /// By shard, each in rising order.
    pub by_shard: Vec<Vec<LoadedGroup>>,
    /// Slots that are damaged, or were torn by a power cut.
    pub warnings: Vec<GroupWarning>,
}

impl LoadedGroups {
    /// Takes the groups of one shard out.
    pub fn take(&mut self, shard: ShardId) -> Vec<LoadedGroup> {
        self.by_shard.get_mut(shard.index()).map(std::mem::take).unwrap_or_default()
    }
}

/// Reads the bitmaps of every group.
///
/// # Errors
/// [`ReadGroupsError`]. Nothing is written in any case.
pub async fn read_groups(
    disk: &VolumeDisk,
    superblock: &Superblock,
) -> Result<LoadedGroups, ReadGroupsError> {
    let layout = &superblock.layout;
    let mut loaded = LoadedGroups::default();
    loaded.by_shard.resize_with(usize::from(superblock.shard_count()), Vec::new);
    let mut found = 0_u64;
    let mut groups = stream::iter(0..layout.groups())
        .map(|number| read_group(disk, superblock, number))
        .buffered(GROUP_READS);
    while let Some(group) = groups.next().await {
        let mut group = group?;
        found = found.wrapping_add(group.contribution);
        loaded.warnings.append(&mut group.warnings);
        loaded.by_shard[group.owner.index()].push(group);
    }
    let expected = superblock.group_digest;
    if found != expected {
        return Err(ReadGroupsError::Digest { expected, found });
    }
    Ok(loaded)
}

/// Reads the bitmap of one group. A slot that the device cannot return counts as damaged.
///
/// # Errors
/// [`ReadGroupsError::Group`]; [`ReadGroupsError::Io`] if none of its slots can be read.
pub(crate) async fn read_group(
    disk: &VolumeDisk,
    superblock: &Superblock,
    number: u64,
) -> Result<LoadedGroup, ReadGroupsError> {
    let layout = &superblock.layout;
    let slot_blocks = layout.slot_blocks().get();
    let all = BlockCount::new(slot_blocks * SLOTS_PER_GROUP as u64);
    let bytes = match disk.read(layout.slot_start(number, 0), all).await {
        Ok(bytes) => bytes,
        Err(error) => {
            let mut bytes = Vec::new();
            let mut readable = false;
            for slot in 0..SLOTS_PER_GROUP {
                let slot = disk.read(layout.slot_start(number, slot), layout.slot_blocks()).await;
                readable |= slot.is_ok();
                bytes.extend(slot.unwrap_or_else(|_| vec![0; layout.slot_bytes()]));
            }
            if !readable {
                return Err(ReadGroupsError::Io(error));
            }
            bytes
        }
    };
    let slot_bytes = layout.slot_bytes();
    let slots = std::array::from_fn(|slot| &bytes[slot * slot_bytes..(slot + 1) * slot_bytes]);
    Ok(assemble(layout, superblock.identity(), number, slots, superblock.epoch)?)
}
