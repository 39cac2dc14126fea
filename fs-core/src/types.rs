//! The units of the core: block numbers, offsets, inode and shard numbers, epochs, generations.
//!
//! Owns: one newtype for each, with a private field, so that an index, a count and a size cannot be mixed up.
//! Invariants: a [`ShardId`] is below [`MAX_SHARDS`]; the low [`SHARD_BITS`] bits of an [`InodeNr`] name its shard.
//!
//! Excludes: wire forms (the format modules store these as little-endian integers) and any policy.

use std::fmt;

/// Bytes of a block: the unit of allocation and of checksums.
pub const BLOCK_SIZE: u64 = 4096;

/// Bits of an inode number that name its shard.
pub const SHARD_BITS: u32 = 6;

/// Bits of an inode number that number a shard's inodes. The two above them are clear: with them the keys of the tree
/// tell blocks and set-aside contents from inodes.
pub const SEQUENCE_BITS: u32 = 56;

/// Shards a volume can have.
pub const MAX_SHARDS: u8 = 1 << SHARD_BITS;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u64);

        impl $name {
            /// Wraps the plain number.
            pub const fn new(value: u64) -> Self {
                Self(value)
            }

            /// The plain number.
            pub const fn get(self) -> u64 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// Index of a block of [`BLOCK_SIZE`] bytes, counted from the start of the volume.
    BlockNr
}
number! {
    /// A number of blocks of [`BLOCK_SIZE`] bytes.
    BlockCount
}
number! {
    /// A byte offset in a file.
    FileOffset
}
number! {
    /// An inode number; its low [`SHARD_BITS`] bits name the shard that owns the inode.
    InodeNr
}
number! {
    /// A volume-wide unit of durability; epochs are numbered without gaps and never reused within an incarnation.
    Epoch
}
number! {
    /// Distinguishes successive uses of the same number or place: of an inode number, of a run of blocks.
    Generation
}

impl BlockNr {
    /// The first byte of the block; `None` beyond 2⁶⁴ bytes.
    pub const fn byte_offset(self) -> Option<u64> {
        self.0.checked_mul(BLOCK_SIZE)
    }

    /// The block `count` blocks further on.
    pub const fn checked_add(self, count: BlockCount) -> Option<Self> {
        match self.0.checked_add(count.0) {
            Some(value) => Some(Self(value)),
            None => None,
        }
    }

    /// Blocks from `start` up to this one; `None` if `start` lies behind it.
    pub const fn checked_since(self, start: Self) -> Option<BlockCount> {
        match self.0.checked_sub(start.0) {
            Some(value) => Some(BlockCount(value)),
            None => None,
        }
    }
}

impl BlockCount {
    /// Blocks needed to hold `bytes` bytes.
    pub const fn covering(bytes: u64) -> Self {
        Self(bytes.div_ceil(BLOCK_SIZE))
    }

    /// The count in bytes; `None` beyond 2⁶⁴.
    pub const fn bytes(self) -> Option<u64> {
        self.0.checked_mul(BLOCK_SIZE)
    }

    /// Sum of two counts.
    pub const fn checked_add(self, other: Self) -> Option<Self> {
        match self.0.checked_add(other.0) {
            Some(value) => Some(Self(value)),
            None => None,
        }
    }

    /// Difference of two counts; `None` if `other` is larger.
    pub const fn checked_sub(self, other: Self) -> Option<Self> {
        match self.0.checked_sub(other.0) {
            Some(value) => Some(Self(value)),
            None => None,
        }
    }
}

impl FileOffset {
    /// The offset `bytes` bytes further on.
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(value) => Some(Self(value)),
            None => None,
        }
    }

    /// Bytes from `start` up to this offset; `None` if `start` lies behind it.
    pub const fn checked_since(self, start: Self) -> Option<u64> {
        self.0.checked_sub(start.0)
    }

    /// The start of the block that holds this byte.
    pub const fn block_start(self) -> Self {
        Self(self.0 - self.0 % BLOCK_SIZE)
    }

    /// Whether the offset is a multiple of [`BLOCK_SIZE`].
    pub const fn is_block_aligned(self) -> bool {
        self.0.is_multiple_of(BLOCK_SIZE)
    }
}

impl InodeNr {
    /// The root directory: the first inode of the first shard.
    pub const ROOT: Self = Self(1 << SHARD_BITS);

    /// The shard that owns the inode.
    pub const fn shard(self) -> ShardId {
        ShardId((self.0 & (MAX_SHARDS as u64 - 1)) as u8)
    }

    /// The inode's number within its shard.
    pub const fn sequence(self) -> u64 {
        self.0 >> SHARD_BITS
    }

    /// The inode `sequence` of `shard`; `None` if the sequence does not fit its [`SEQUENCE_BITS`].
    pub const fn from_parts(shard: ShardId, sequence: u64) -> Option<Self> {
        if sequence >> SEQUENCE_BITS != 0 {
            return None;
        }
        Some(Self(sequence << SHARD_BITS | shard.0 as u64))
    }
}

impl Epoch {
    /// The epoch after this one; `None` after the last, 2⁶⁴ − 1.
    pub const fn next(self) -> Option<Self> {
        match self.0.checked_add(1) {
            Some(value) => Some(Self(value)),
            None => None,
        }
    }

    /// The epoch before this one; `None` before 0.
    pub const fn previous(self) -> Option<Self> {
        match self.0.checked_sub(1) {
            Some(value) => Some(Self(value)),
            None => None,
        }
    }
}

impl Generation {
    /// The generation after this one; `None` after the last.
    pub const fn next(self) -> Option<Self> {
        match self.0.checked_add(1) {
            Some(value) => Some(Self(value)),
            None => None,
        }
    }
}

/// A shard of the volume, below [`MAX_SHARDS`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShardId(u8);

impl ShardId {
    /// The shard that every volume has: the root directory's.
    pub const FIRST: Self = Self(0);

    /// The shard `value`; `None` unless it is below [`MAX_SHARDS`].
    pub const fn new(value: u8) -> Option<Self> {
        if value < MAX_SHARDS { Some(Self(value)) } else { None }
    }

    /// The plain number.
    pub const fn get(self) -> u8 {
        self.0
    }

    /// The plain number, to index an array of [`MAX_SHARDS`] elements or fewer.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inode_number_names_its_shard() {
        let shard = ShardId::new(63).unwrap();
        let inode = InodeNr::from_parts(shard, 5).unwrap();
        assert_eq!((inode.shard(), inode.sequence(), inode.get()), (shard, 5, 5 * 64 + 63));
        assert_eq!(InodeNr::from_parts(shard, (1 << 56) - 1).unwrap().get(), u64::MAX >> 2);
        assert_eq!(InodeNr::from_parts(shard, 1 << 56), None);
    }

    #[test]
    fn shard_numbers_stop_at_the_limit() {
        assert!(ShardId::new(MAX_SHARDS - 1).is_some());
        assert!(ShardId::new(MAX_SHARDS).is_none());
    }

    #[test]
    fn conversions_refuse_to_overflow() {
        assert_eq!(BlockNr::new(1 << 52).byte_offset(), None);
        assert_eq!(BlockNr::new(u64::MAX).checked_add(BlockCount::new(1)), None);
        assert_eq!(BlockNr::new(1).checked_since(BlockNr::new(2)), None);
        assert_eq!(BlockCount::covering(4097), BlockCount::new(2));
        assert_eq!(BlockCount::covering(u64::MAX), BlockCount::new(1 << 52));
        assert_eq!(Epoch::new(u64::MAX).next(), None);
        assert_eq!(Epoch::new(0).previous(), None);
        assert_eq!(FileOffset::new(4097).block_start(), FileOffset::new(4096));
    }
}
