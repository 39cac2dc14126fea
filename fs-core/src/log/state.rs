//! What a stored volume becomes when its log is replayed, without a mount: in memory, the device stays as it is.
//!
//! Owns: [`Replayed`], which lays the items of the log's epochs over those of the trees that the superblock names, and
//! knows which data blocks the log takes and gives back. A log is at most 1 MiB, so this is small whatever the volume is.
//!
//! Invariants:
//! - what is seen is what a mount makes of the same volume before it changes anything: the entries before a damaged
//!   one count, nothing behind it does;
//! - tree nodes stay those of the superblock: a log tells items and data blocks, and a mount places new nodes elsewhere.
//!
//! Every byte is input. What the log says of blocks is not judged here, but compared with the bitmaps by `fsck`.
//!
//! Excludes: reading the log (the parent module), the replay of a mount (`crate::shard::log`).

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};

use crate::disk::VolumeDisk;
use crate::error::FsError;
use crate::format::log::{EntryError, Record, records};
use crate::format::node::{CheckedNode, Key, KeyBounds, NodeError, NodeImage, zeroed_image};
use crate::format::superblock::Superblock;
use crate::tree::{NODE_BLOCKS, Walk};
use crate::types::{BlockCount, BlockNr, Epoch, InodeNr, ShardId};

use super::Found;

/// Items of a shard that the log changed: their last value, or `None` if they are deleted.
type Overlay = BTreeMap<Key, Option<Box<[u8]>>>;

/// One shard's part.
#[derive(Clone, Debug, Default)]
struct ShardState {
    overlay: Overlay,
    /// Blocks that data was put in, in the order of the log.
    used: Vec<(BlockNr, BlockCount)>,
    freed: Vec<(BlockNr, BlockCount)>,
    /// Sequence of the next inode and number of inodes, if the log tells them.
    counters: Option<(u64, u64)>,
}

/// The log's part of a volume's state.
#[derive(Clone, Debug, Default)]
pub(crate) struct Replayed {
    shards: Vec<ShardState>,
    entries: usize,
    last: Option<Epoch>,
}

/// Why a shard's items cannot be read to the end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoredError {
    /// The device failed.
    #[error("shard {shard}: node at block {address}: {error}")]
    Unreadable {
        /// Shard whose node it is.
        shard: ShardId,
        /// First block of the node.
        address: BlockNr,
        /// What happened.
        error: FsError,
    },
    /// A tree node is damaged.
    #[error("shard {shard}: node at block {address}: {error}")]
    Node {
        /// Shard whose node it is.
        shard: ShardId,
        /// First block of the node.
        address: BlockNr,
        /// What is wrong.
        error: NodeError,
    },
}

impl Replayed {
    /// What `log` makes of a volume.
    ///
    /// # Errors
    /// A record that makes no sense; a log that was read has none.
    pub(crate) fn new(superblock: &Superblock, log: &Found) -> Result<Self, EntryError> {
        let mut shards = vec![ShardState::default(); usize::from(superblock.shard_count())];
        for section in log.entries.iter().flat_map(|entry| &entry.sections) {
            // The log's reader lets no entry pass that names a shard which is not there.
            let Some(state) = shards.get_mut(section.shard.index()) else { continue };
            for record in records(&section.records) {
                match record? {
                    Record::Put(key, value) => drop(state.overlay.insert(key, Some(value.into()))),
                    Record::Delete(key) => drop(state.overlay.insert(key, None)),
                    Record::Used(start, count) => state.used.push((start, count)),
                    Record::Freed(start, count) => state.freed.push((start, count)),
                }
            }
            state.counters = Some((section.next_inode, section.inodes));
        }
        Ok(Self { shards, entries: log.entries.len(), last: log.last_epoch() })
    }

    /// Number of entries, and the epoch that they lead to, if there are any.
    pub(crate) fn reach(&self) -> Option<(usize, Epoch)> {
        self.last.map(|epoch| (self.entries, epoch))
    }

    /// Blocks that the log puts data in; those of a shard together.
    pub(crate) fn used(&self) -> impl Iterator<Item = (ShardId, BlockNr, BlockCount)> {
        self.each(|state| &state.used)
    }

    /// Blocks that the log gives back.
    pub(crate) fn freed(&self) -> impl Iterator<Item = (ShardId, BlockNr, BlockCount)> {
        self.each(|state| &state.freed)
    }

    fn each(
        &self,
        which: fn(&ShardState) -> &Vec<(BlockNr, BlockCount)>,
    ) -> impl Iterator<Item = (ShardId, BlockNr, BlockCount)> {
        let shards = (0..=u8::MAX).filter_map(ShardId::new).zip(&self.shards);
        shards.flat_map(move |(shard, state)| which(state).iter().map(move |(start, n)| (shard, *start, *n)))
    }

    /// Sequence of the next new inode, and number of inodes, of a shard.
    pub(crate) fn counters(&self, superblock: &Superblock, shard: ShardId) -> (u64, u64) {
        let stored = superblock.shard(shard).map_or((0, 0), |record| (record.next_inode, record.inodes));
        self.shards.get(shard.index()).and_then(|state| state.counters).unwrap_or(stored)
    }

    /// The items that belong where `node`, a leaf of `shard`, stands: its own, as the log has changed them. In key order;
    /// of an inner node none.
    pub(crate) fn items<'a>(
        &'a self,
        shard: ShardId,
        node: &CheckedNode<'a>,
    ) -> impl Iterator<Item = (Key, &'a [u8])> {
        let expected = node.expected();
        let state = self.shards.get(shard.index()).filter(|_| expected.level == 0);
        let bounds = range_of(&expected.bounds);
        let mut logged = state.into_iter().flat_map(move |state| state.overlay.range(bounds)).peekable();
        let mut stored = node.items().peekable();
        std::iter::from_fn(move || {
            loop {
                let logged_first = match (stored.peek(), logged.peek()) {
                    (Some((stored, _)), Some((logged, _))) => **logged <= *stored,
                    (None, Some(_)) => true,
                    (_, None) => return stored.next(),
                };
                if !logged_first {
                    return stored.next();
                }
                let (key, value) = logged.next()?;
                stored.next_if(|(stored, _)| stored == key);
                if let Some(value) = value {
                    return Some((*key, &**value));
                }
            }
        })
    }
}

fn range_of(bounds: &KeyBounds) -> (Bound<Key>, Bound<Key>) {
    (Bound::Included(bounds.low), bounds.high.map_or(Bound::Unbounded, Bound::Excluded))
}

/// A volume on a device, as a mount would find it.
pub(crate) struct Stored {
    pub(crate) disk: VolumeDisk,
    pub(crate) superblock: Superblock,
    pub(crate) log: Replayed,
}

impl Stored {
    /// Shows `visit` the items of a shard in key order, until it breaks. Parts of the tree of which `wanted` says that
    /// nothing in their bounds is of interest are not read; items beside what is of interest may be shown.
    ///
    /// # Errors
    /// The first node that cannot be read.
    pub(crate) async fn scan(
        &self,
        shard: ShardId,
        wanted: impl Fn(&KeyBounds) -> bool,
        mut visit: impl FnMut(Key, &[u8]) -> ControlFlow<()>,
    ) -> Result<(), StoredError> {
        let Some(record) = self.superblock.shard(shard) else { return Ok(()) };
        let mut walk = Walk::new(self.superblock.tree_identity(shard), record.tree);
        while let Some(expected) = walk.next_node() {
            if !wanted(&expected.bounds) {
                continue;
            }
            let address = expected.ptr.address;
            let image = read_image(&self.disk, address).await;
            let image = image.map_err(|error| StoredError::Unreadable { shard, address, error })?;
            let node = walk.supply(&image);
            let node = node.map_err(|error| StoredError::Node { shard, address, error })?;
            for (key, value) in self.log.items(shard, &node) {
                if visit(key, value).is_break() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Shows `visit` the items from `from` to `to`, both included, until it breaks.
    ///
    /// # Errors
    /// As [`Self::scan`].
    pub(crate) async fn range(
        &self,
        shard: ShardId,
        from: Key,
        to: Key,
        mut visit: impl FnMut(Key, &[u8]) -> ControlFlow<()>,
    ) -> Result<(), StoredError> {
        let wanted = |bounds: &KeyBounds| bounds.low <= to && bounds.high.is_none_or(|high| high > from);
        let visit = |key: Key, value: &[u8]| match key {
            key if key < from => ControlFlow::Continue(()),
            key if key > to => ControlFlow::Break(()),
            key => visit(key, value),
        };
        self.scan(shard, wanted, visit).await
    }

    /// The value of an item of an inode, which lies in the inode's shard.
    ///
    /// # Errors
    /// As [`Self::scan`].
    pub(crate) async fn get(&self, inode: InodeNr, key: Key) -> Result<Option<Vec<u8>>, StoredError> {
        let mut found = None;
        let take = |_, value: &[u8]| {
            found = Some(value.to_vec());
            ControlFlow::Break(())
        };
        self.range(inode.shard(), key, key, take).await?;
        Ok(found)
    }
}

/// Reads the blocks of a node.
pub(crate) async fn read_image(disk: &VolumeDisk, address: BlockNr) -> Result<Box<NodeImage>, FsError> {
    let bytes = disk.read(address, BlockCount::new(NODE_BLOCKS)).await?;
    let mut image = zeroed_image();
    image.copy_from_slice(&bytes);
    Ok(image)
}
