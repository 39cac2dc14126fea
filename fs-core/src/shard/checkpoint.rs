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

use crate::error::FsError;
use crate::tree::TreeRoot;
use crate::types::{BlockNr, Epoch};

use super::Shard;

/// Node and bitmap writes that a checkpoint keeps in flight on a shard.
const CHECKPOINT_WRITES: usize = 32;

/// What the superblock records of a shard.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ShardRoot {
    /// Root of the tree.
    pub(crate) tree: TreeRoot,
    /// Sequence number of the next new inode.
    pub(crate) next_inode: u64,
    /// Inodes of the shard.
    pub(crate) inodes: u64,
}

type Writes = FuturesUnordered<Pin<Box<dyn Future<Output = Result<(), FsError>>>>>;

impl Shard {
    /// Freezes `epoch` and writes what it changed; the writes are completed, not yet flushed, on return.
    pub(crate) async fn checkpoint(&self, epoch: Epoch) -> Result<ShardRoot, FsError> {
        let frozen = self.take_frozen(epoch).await;
        let _writing = self.forbid_eviction();
        let mut writes = Writes::new();
        for group in frozen.groups {
            self.queue_write(&mut writes, group.block, group.bytes).await?;
        }
        let mut tree = self.last_root.get();
        if let Some(frozen_tree) = frozen.tree {
            for node in frozen_tree.dirty_nodes() {
                let (address, image) = node.seal();
                self.queue_write(&mut writes, address, image.to_vec()).await?;
            }
            tree = frozen_tree.root();
        }
        while let Some(written) = writes.next().await {
            written?;
        }
        self.last_root.set(tree);
        Ok(ShardRoot { tree, next_inode: frozen.next_inode, inodes: frozen.inodes })
    }

    /// Notes that `epoch` is durable: what was freed before it may be used again.
    pub(crate) fn epoch_is_durable(&self, epoch: Epoch) {
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
