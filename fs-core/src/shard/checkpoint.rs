//! A shard's part in a checkpoint: writing what an epoch changed.
//!
//! Owns: [`ShardRoot`] and the calls that the coordinator makes ([`crate::volume::coordinator`] has the whole
//! sequence). A frozen epoch is written while transactions of the next one go on: they copy the nodes they change.
//!
//! # Legal crash outcomes
//! Until the superblock that names the new root is durable, nothing written here is referenced: nodes go to blocks
//! that no retained superblock generation uses, bitmaps to the slot that the last checkpoint did not write.

use std::pin::Pin;

use futures_util::stream::{FuturesUnordered, StreamExt};
use reactor::block::Durability;

use crate::alloc::Priority;
use crate::error::FsError;
use crate::tree::TreeRoot;
use crate::types::{BlockCount, BlockNr, Epoch};

use super::Shard;
use super::message::ResizeStep;

/// Node and bitmap writes that a checkpoint keeps in flight on a shard.
const CHECKPOINT_WRITES: usize = 32;

/// Shorter stretches of freed blocks are not worth a command.
const MIN_DEALLOCATION: BlockCount = BlockCount::new(16);

/// Deallocations after one checkpoint; the rest of what was freed is not told to the device.
const MAX_DEALLOCATIONS: usize = 1024;

/// What the superblock records of a shard.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ShardRoot {
    /// Root of the tree.
    pub(crate) tree: TreeRoot,
    /// Sequence number of the next new inode.
    pub(crate) next_inode: u64,
    /// Inodes of the shard.
    pub(crate) inodes: u64,
    /// What the epoch's bitmaps add to the digest of all groups.
    pub(crate) digest_delta: u64,
}

type Writes = FuturesUnordered<Pin<Box<dyn Future<Output = Result<(), FsError>>>>>;

impl Shard {
    /// Freezes `epoch` and writes what it changed; the writes are completed, not yet flushed, on return.
    pub(crate) async fn checkpoint(&self, epoch: Epoch) -> Result<ShardRoot, FsError> {
        let frozen = self.take_frozen(epoch).await;
        let mut writes = Writes::new();
        let digest_delta = frozen.groups.digest_delta;
        for group in frozen.groups.images {
            self.queue_write(&mut writes, group.block, group.bytes).await?;
        }
        let mut tree = self.last_root.get();
        if let Some(frozen_tree) = &frozen.tree {
            for node in frozen_tree.dirty_nodes() {
                let (address, image) = node.seal();
                self.queue_write(&mut writes, address, image.to_vec()).await?;
            }
            tree = frozen_tree.root();
        }
        while let Some(written) = writes.next().await {
            written?;
        }
        if let Some(frozen_tree) = &frozen.tree {
            frozen_tree.mark_written();
            self.relieve_tree_memory();
        }
        self.last_root.set(tree);
        Ok(ShardRoot { tree, next_inode: frozen.next_inode, inodes: frozen.inodes, digest_delta })
    }

    /// Takes two segments of `blocks` blocks for the intent log. The next checkpoint makes that durable.
    pub(crate) async fn make_log(&self, blocks: u32) -> Option<[BlockNr; 2]> {
        let wanted = BlockCount::new(u64::from(blocks));
        let mut space = self.counter.reserve(2 * wanted.get(), 0, Priority::Normal)?;
        // No epoch may end between taking the blocks and noting that they are in use.
        let mut alloc = self.alloc.borrow_mut();
        let mut segments = Vec::new();
        for _ in 0..2 {
            let (start, count) = alloc.allocate_data(wanted, &mut space);
            if count == wanted {
                segments.push(start);
                continue;
            }
            // Free space is in pieces.
            alloc.abandon_data(start, count);
            segments.into_iter().for_each(|start| alloc.abandon_data(start, wanted));
            return None;
        }
        segments.iter().for_each(|start| alloc.commit_data(*start, wanted));
        segments.try_into().ok()
    }

    /// Gives a segment of the intent log another place, if its group is being emptied. Only a segment that the current superblock does
    /// not use: the next one uses it, and makes the new place durable. The old one becomes free as all freed blocks do.
    ///
    /// # Errors
    /// The segment is not in use.
    pub(crate) fn move_log(&self, segment: BlockNr, blocks: u32) -> Result<Option<BlockNr>, FsError> {
        let wanted = BlockCount::new(u64::from(blocks));
        if !self.alloc.borrow().is_closed_at(segment) {
            return Ok(None);
        }
        let Some(mut space) = self.counter.reserve(wanted.get(), 0, Priority::Normal) else {
            return Ok(None);
        };
        // No epoch may end in between.
        let mut alloc = self.alloc.borrow_mut();
        let (start, count) = alloc.allocate_data(wanted, &mut space);
        if count < wanted {
            alloc.abandon_data(start, count);
            return Ok(None);
        }
        alloc.commit_data(start, wanted);
        alloc.free(segment, wanted).map_err(|error| FsError::Damaged {
            what: format!("the intent log's place: {error}"),
            block: Some(segment),
            inode: None,
        })?;
        Ok(Some(start))
    }

    /// Takes a step of a change of the volume's size; see [`ResizeStep`].
    pub(crate) fn resize_volume(&self, step: ResizeStep) -> Option<u64> {
        let mut alloc = self.alloc.borrow_mut();
        match step {
            ResizeStep::Grow(layout) => {
                let shards = self.volume.shard_count() as u64;
                let own = |group: &u64| group % shards == u64::from(self.id.get());
                let added: Vec<u64> = (alloc.layout().groups()..layout.groups()).filter(own).collect();
                let count = added.len() as u64;
                alloc.grow(layout, added.into_iter());
                Some(count)
            }
            ResizeStep::Detach(first) => alloc.detach(first),
            ResizeStep::Reattach => {
                alloc.reattach();
                Some(0)
            }
            ResizeStep::Shrink(layout) => Some(alloc.shrink(layout)),
        }
    }

    /// Notes that `epoch` is durable: what was freed before it may be used again.
    /// The longer stretches of it are first deallocated on the device.
    pub(crate) async fn epoch_is_durable(&self, epoch: Epoch) {
        let mut freed = self.alloc.borrow().releasable(epoch);
        freed.sort_unstable();
        for (start, count) in
            joined(freed).filter(|(_, count)| *count >= MIN_DEALLOCATION).take(MAX_DEALLOCATIONS)
        {
            if let Err(error) = self.disk.deallocate(start, count).await {
                // Only a hint to the device: without it the blocks are free all the same.
                tracing::warn!(shard = %self.id, %error, "deallocation failed");
                break;
            }
        }
        self.alloc.borrow_mut().durable(epoch);
    }

    /// Starts a write, after others if the window is full.
    async fn queue_write(&self, writes: &mut Writes, block: BlockNr, bytes: Vec<u8>) -> Result<(), FsError> {
        while writes.len() >= CHECKPOINT_WRITES {
            if let Some(written) = writes.next().await {
                written?;
            }
        }
        let disk = self.disk.clone();
        writes.push(Box::pin(async move { disk.write(block, &bytes, Durability::Cached).await }));
        Ok(())
    }
}

/// Joins runs that touch each other; they come sorted.
fn joined(runs: Vec<(BlockNr, BlockCount)>) -> impl Iterator<Item = (BlockNr, BlockCount)> {
    let mut runs = runs.into_iter().peekable();
    std::iter::from_fn(move || {
        let (start, mut count) = runs.next()?;
        while let Some((_, more)) = runs.next_if(|(next, _)| start.checked_add(count) == Some(*next)) {
            count = count.checked_add(more)?;
        }
        Some((start, count))
    })
}
