//! Making a volume.
//!
//! Owns: [`format()`], which turns a device into an empty volume, and refuses one that holds something; [`occupant`], which
//! tells what that is.
//!
//! Order: the superblock rings and the places of foreign signatures are zeroed and flushed first, so that whatever
//! was there is gone as a whole; then trees and bitmaps are written and flushed; the superblock comes last.
//!
//! *Legal crash outcomes*: what was there before, if nothing was written yet; then no volume; then the new one.
//!
//! Excludes: creating images and devices, asking the user.

mod signature;

use std::sync::Arc;

pub use signature::{Occupant, occupant};

use reactor::Context;
use reactor::block::Durability;

use crate::alloc::{self, Allocator, Priority, Reservation, SpaceCounter};
use crate::disk::{UnsupportedDevice, VolumeDisk};
use crate::error::FsError;
use crate::format::group::{LayoutError, RESERVED_BLOCKS, VolumeLayout};
use crate::format::items::{InodeRecord, inode_key};
use crate::format::superblock::{MAX_LABEL_BYTES, RING_SLOTS, RING_STARTS};
use crate::request::FileKind;
use crate::superblock::{self, ShardRecord, Superblock, SuperblockError};
use crate::tree::{NodeSpace, Tree};
use crate::types::{BLOCK_SIZE, BlockCount, BlockNr, Epoch, Generation, InodeNr, ShardId};

/// The epoch that a new volume is in.
const FIRST_EPOCH: Epoch = Epoch::new(1);

/// Nodes that an empty tree and its first items may take.
const FIRST_NODES: u64 = 16;

/// Blocks told to be unneeded in one request: 1 GiB.
const DEALLOCATE_BLOCKS: u64 = 1 << 18;

/// Whether to overwrite what is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Force {
    /// Refuse a device that holds something known.
    #[default]
    Refuse,
    /// Overwrite it.
    Overwrite,
}

/// Whose the root directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl Owner {
    /// The superuser.
    pub const ROOT: Self = Self { uid: 0, gid: 0 };
}

/// What to make.
#[derive(Clone, Debug)]
pub struct FormatOptions {
    /// Number of shards: 1 to [`MAX_SHARDS`](crate::types::MAX_SHARDS).
    pub shards: u8,
    /// The volume's name: up to 64 bytes without NUL; may be empty.
    pub label: String,
    /// Whether to overwrite what is there.
    pub force: Force,
    /// Owner of the root directory: whoever is to create the first files, as nobody else may.
    pub owner: Owner,
}

/// What was made.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct FormatReport {
    /// The volume's identity.
    pub uuid: String,
    /// Its name.
    pub label: String,
    /// Its bytes; a rest of the device may be unused.
    pub bytes: u64,
    /// Bytes of an allocation group.
    pub group_bytes: u64,
    /// Number of groups.
    pub groups: u64,
    /// Number of shards.
    pub shards: u8,
    /// What was overwritten, if something known was there.
    pub overwritten: Option<String>,
}

/// Why no volume was made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The device cannot hold one.
    #[error(transparent)]
    Device(#[from] UnsupportedDevice),
    /// The device is too small for the shards, or too large. Nothing was changed.
    #[error("{device}: {error}")]
    Layout {
        /// Name of the device.
        device: String,
        /// What is wrong.
        error: LayoutError,
    },
    /// The label is too long or has a NUL in it. Nothing was changed.
    #[error("a label has at most {MAX_LABEL_BYTES} bytes and no NUL")]
    Label,
    /// The device holds something. Nothing was changed.
    #[error("{device} holds {what}; --force overwrites it")]
    Occupied {
        /// Name of the device.
        device: String,
        /// What it holds.
        what: String,
    },
    /// The device failed. If anything was written, the device holds no volume.
    #[error("{0}")]
    Io(FsError),
}

impl From<FsError> for FormatError {
    fn from(error: FsError) -> Self {
        Self::Io(error)
    }
}

impl From<SuperblockError> for FormatError {
    fn from(error: SuperblockError) -> Self {
        Self::Io(error.into())
    }
}

/// Makes an empty volume on the reactor's device.
///
/// # Errors
/// [`FormatError`]; see there for what has happened to the device.
pub async fn format(ctx: &Context, options: &FormatOptions) -> Result<FormatReport, FormatError> {
    let disk = VolumeDisk::new(ctx.disk().clone())?;
    if options.label.len() > MAX_LABEL_BYTES || options.label.contains('\0') {
        return Err(FormatError::Label);
    }
    let layout = VolumeLayout::plan(disk.blocks(), options.shards)
        .map_err(|error| FormatError::Layout { device: disk.name().to_owned(), error })?;
    let found = occupant(&disk).await?.map(|occupant| occupant.to_string());
    if let (Force::Refuse, Some(what)) = (options.force, &found) {
        return Err(FormatError::Occupied { device: disk.name().to_owned(), what: what.clone() });
    }
    clear(&disk, &layout).await?;
    let mut superblock = blank_superblock(ctx, layout, options);
    populate(ctx, &disk, &mut superblock, options.owner).await?;
    disk.flush().await?;
    if let Some(warning) = superblock::write(&disk, &superblock).await? {
        return Err(FormatError::Io(FsError::Io(format!("{}: {warning}", disk.name()))));
    }
    let (stored, _) = superblock::read_newest(&disk).await?;
    if stored != superblock {
        let name = disk.name();
        return Err(FormatError::Io(FsError::Io(format!(
            "{name}: the superblock did not read back as written"
        ))));
    }
    Ok(FormatReport {
        uuid: superblock.uuid.to_string(),
        label: superblock.label,
        bytes: layout.blocks().get() * BLOCK_SIZE,
        group_bytes: BLOCK_SIZE << layout.group_shift(),
        groups: layout.groups(),
        shards: options.shards,
        overwritten: found,
    })
}

/// Ends whatever was on the device: all at once, as far as programs are concerned that look for it.
async fn clear(disk: &VolumeDisk, layout: &VolumeLayout) -> Result<(), FormatError> {
    let zeroes = vec![0; (RESERVED_BLOCKS * BLOCK_SIZE) as usize];
    let ring = &zeroes[..(RING_SLOTS * BLOCK_SIZE) as usize];
    disk.write(RING_STARTS[1], ring, Durability::Cached).await?;
    disk.write(BlockNr::new(0), &zeroes, Durability::Cached).await?;
    disk.flush().await?;
    // Copies of partition tables and signatures of disk arrays lie at the end. They go after the old superblock has
    // gone for good: a volume may have had data there.
    let last = disk.blocks().get() - RING_SLOTS;
    disk.write(BlockNr::new(last), ring, Durability::Cached).await?;
    let blocks = layout.blocks().get();
    for start in (0..blocks).step_by(DEALLOCATE_BLOCKS as usize) {
        let count = BlockCount::new(DEALLOCATE_BLOCKS.min(blocks - start));
        // Only a hint: a device that cannot do it keeps old contents in blocks that nothing refers to.
        if let Err(error) = disk.deallocate(BlockNr::new(start), count).await {
            tracing::debug!(%error, "the device does not deallocate");
            break;
        }
    }
    Ok(())
}

fn blank_superblock(ctx: &Context, layout: VolumeLayout, options: &FormatOptions) -> Superblock {
    let random = || {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&ctx.random().to_le_bytes());
        bytes[8..].copy_from_slice(&ctx.random().to_le_bytes());
        bytes
    };
    Superblock {
        compatible: 0,
        read_only_compatible: 0,
        uuid: uuid::Builder::from_random_bytes(random()).into_uuid(),
        label: options.label.clone(),
        generation: Generation::new(1),
        epoch: FIRST_EPOCH,
        incarnation: ctx.random(),
        layout,
        hash_seed: random(),
        group_digest: 0,
        log: None,
        shards: vec![ShardRecord::BLANK; usize::from(options.shards)],
    }
}

/// Writes trees and bitmaps, and records them in the superblock.
async fn populate(
    ctx: &Context,
    disk: &VolumeDisk,
    superblock: &mut Superblock,
    owner: Owner,
) -> Result<(), FormatError> {
    let layout = superblock.layout;
    for shard in (0..superblock.shard_count()).filter_map(ShardId::new) {
        let shards = u64::from(superblock.shard_count());
        let groups = (0..layout.groups()).filter(|group| group % shards == u64::from(shard.get()));
        let groups = groups.map(|group| alloc::fresh(&layout, group, shard)).collect();
        let counter = SpaceCounter::new();
        let identity = superblock.identity();
        let allocator = Allocator::new(shard, layout, identity, Arc::clone(&counter), Epoch::new(0), groups);
        let reservation = counter.reserve(0, FIRST_NODES, Priority::Reserve);
        let reservation = reservation.expect("an empty shard has room for a few nodes");
        let mut space = FirstNodes { allocator, reservation };
        let mut tree = Tree::empty(superblock.tree_identity(shard), FIRST_EPOCH, &mut space);
        let mut record = ShardRecord { next_inode: 1, ..ShardRecord::BLANK };
        if InodeNr::ROOT.shard() == shard {
            let mut root = InodeRecord::new(FileKind::Directory, 0o755, owner.uid, owner.gid, ctx.wall());
            root.parent = InodeNr::ROOT;
            let key = inode_key(InodeNr::ROOT);
            tree.insert(key, &root.encode(), FIRST_EPOCH, &mut space).expect("a new tree is in memory");
            record.next_inode = InodeNr::ROOT.sequence() + 1;
            record.inodes = 1;
        }
        let frozen = tree.freeze();
        for node in frozen.dirty_nodes() {
            let (address, image) = node.seal();
            disk.write(address, &image[..], Durability::Cached).await?;
        }
        record.tree = frozen.root();
        superblock.shards[shard.index()] = record;
        let groups = space.allocator.freeze(FIRST_EPOCH);
        for image in groups.images {
            disk.write(image.block, &image.bytes, Durability::Cached).await?;
        }
        superblock.group_digest = superblock.group_digest.wrapping_add(groups.digest_delta);
    }
    Ok(())
}

struct FirstNodes {
    allocator: Allocator,
    reservation: Reservation,
}

impl NodeSpace for FirstNodes {
    fn allocate_node(&mut self) -> BlockNr {
        self.allocator.allocate_node(&mut self.reservation)
    }

    fn free_node(&mut self, address: BlockNr) {
        self.allocator.discard_node(address);
    }
}

#[cfg(test)]
pub(crate) mod tests;
