//! On-disk form of file contents' items: extents, runs, back-references.
//!
//! Owns: for each item the raw record as it lies in the tree, the checked type that the rest of the crate works with,
//! the keys, and the conversions in both directions.
//!
//! | item | key (object, kind, offset, minor) | value |
//! |---|---|---|
//! | extent | inode (or [`SET_ASIDE`] + inode, or `lent_to`), [`EXTENT`], file offset in bytes, 0 | [`RawExtent`] |
//! | run | [`PHYSICAL`] + first block, [`RUN`], 0, 0 | [`RawRun`], then the CRC32C of each block (none if preallocated) |
//! | back-reference | [`PHYSICAL`] + first block, [`BACKREF`], inode, file offset in bytes | [`RawBackref`] |
//! | return | 0, [`RETURN`], lender, first block | [`RawReturn`] |
//!
//! Invariants (checked by `fsck`, relied upon nowhere without a check):
//! - extents of an inode do not overlap; what no extent covers is a hole; offsets are multiples of the block size;
//! - each extent has exactly one back-reference, of the same blocks, inode and file offset, and the reverse;
//! - an extent covers whole runs, of its own generation and kind; a run is split where references begin or end;
//! - a run's reference count is the number of extents that cover it, at least 1; runs do not overlap;
//! - `blocks` of an inode is the sum of its extents' blocks;
//! - no byte of a block behind the end of its file is other than zero;
//! - a run has checksums exactly if its extents hold data; preallocated blocks have never been written and read as
//!   zeroes.
//!
//! - extents set aside exist only while their inode has an intent `Clone` or `DropReplaced`; in everything else they
//!   are extents like others.
//!
//! # Blocks of another shard
//! A shard lends blocks to another one as it would share them with a file: the borrower is an object of its own
//! (`lent_to`) in the lender's tree, whose extents lie at the offsets that their blocks have on the device, so that a
//! block is lent to a shard at most once. The borrower has a run of its own for what it has borrowed, with checksums, and
//! counts its own references in it: its reads, clones and writes never ask the lender. When its last reference goes, the
//! run becomes a *return* in the same transaction, which ends after the lender has dropped the borrower's extent.
//!
//! - the blocks that are lent to a shard are those of its borrowed runs and of its returns, but for returns that the
//!   lender has taken back already;
//! - generations and checksums of a borrowed run are those of the lender's.
//!
//! Every byte is input: decoding never panics and never allocates more than the value's own length.
//!
//! # Legal crash outcomes
//! The three items of an extent change in one transaction, together with the inode's size. Data reaches the medium
//! before the superblock that names the tree in which its extent is, so no extent leads to a block that was not
//! written.
//!
//! Excludes: the changes themselves (`data/extent_map.rs`), the bitmap of free blocks.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::FsError;
use crate::tree::{ItemKind, Key};
use crate::types::{BLOCK_SIZE, BlockCount, BlockNr, Generation, InodeNr, ShardId};

/// Kind of a file extent.
pub const EXTENT: ItemKind = ItemKind::new(0x30);
/// Kind of a run.
pub const RUN: ItemKind = ItemKind::new(0x80);
/// Kind of a back-reference.
pub const BACKREF: ItemKind = ItemKind::new(0x84);
/// Kind of a return.
pub const RETURN: ItemKind = ItemKind::new(0x0c);

/// Set in the object of items that belong to a block of the volume; the rest is the block's number.
pub const PHYSICAL: u64 = 1 << 63;

/// Set in the object of extents that a clone has set aside; the rest is the inode whose extents they were.
pub const SET_ASIDE: u64 = 1 << 62;

/// Most blocks of an extent or a run: 1 MiB. A run's item then takes 1,040 bytes.
pub const MAX_RUN_BLOCKS: u64 = 256;

/// What is wrong with an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExtentError {
    /// Too short or too long for its kind, or for the blocks it counts.
    #[error("wrong length")]
    Length,
    /// No blocks, or more than [`MAX_RUN_BLOCKS`].
    #[error("impossible number of blocks")]
    Blocks,
    /// An unknown kind of extent.
    #[error("unknown kind of extent")]
    Kind,
    /// A run that nothing references.
    #[error("run without references")]
    References,
    /// Reserved bytes are not zero.
    #[error("reserved bytes are not zero")]
    Reserved,
    /// A lender that cannot be a shard.
    #[error("impossible lender")]
    Lender,
    /// A block number beyond what a key can name, or a file offset that is no multiple of the block size or too
    /// large.
    #[error("impossible position")]
    Position,
}

impl ExtentError {
    /// The error a program sees.
    pub(crate) fn of(self, what: &'static str, block: Option<BlockNr>, inode: Option<InodeNr>) -> FsError {
        FsError::Damaged { what: format!("{what}: {self}"), block, inode }
    }
}

/// An extent as it is stored.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawExtent {
    /// First block.
    pub start: U64,
    /// Generation of the run: the epoch in which its blocks were allocated.
    pub generation: U64,
    /// Blocks.
    pub blocks: U32,
    /// 1: data, 2: preallocated.
    pub kind: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

/// Head of a run as it is stored; the checksums follow, one U32 for each block.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawRun {
    /// Blocks.
    pub blocks: U16,
    /// 0: the blocks are this shard's own; else 1 + the shard that they are borrowed from.
    pub lender: U16,
    /// Extents that cover the run.
    pub references: U32,
    /// The epoch in which the blocks were allocated.
    pub generation: U64,
}

/// A back-reference as it is stored.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawBackref {
    /// Blocks.
    pub blocks: U32,
    /// Zero.
    pub reserved: [u8; 4],
}

/// Blocks to be given back to their lender, as stored.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawReturn {
    /// Blocks.
    pub blocks: U32,
    /// Zero.
    pub reserved: [u8; 4],
    /// The epoch in which the blocks were allocated.
    pub generation: U64,
}

const _: () = assert!(size_of::<RawReturn>() == 16 && std::mem::offset_of!(RawReturn, generation) == 8);
const _: () = assert!(size_of::<RawExtent>() == 24 && std::mem::offset_of!(RawExtent, kind) == 20);
const _: () = assert!(size_of::<RawRun>() == 16 && std::mem::offset_of!(RawRun, generation) == 8);
const _: () = assert!(size_of::<RawBackref>() == 8);

/// What the blocks of an extent hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExtentKind {
    /// Data, with checksums.
    Data,
    /// Nothing yet: they read as zeroes.
    Preallocated,
}

/// Where a piece of a file lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    /// What the blocks hold.
    pub(crate) kind: ExtentKind,
    /// First block.
    pub(crate) start: BlockNr,
    /// Blocks, 1 to [`MAX_RUN_BLOCKS`].
    pub(crate) blocks: BlockCount,
    /// Generation of its runs.
    pub(crate) generation: Generation,
}

impl Extent {
    /// Checks a stored extent.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn decode(value: &[u8]) -> Result<Self, ExtentError> {
        let raw = RawExtent::read_from_bytes(value).map_err(|_| ExtentError::Length)?;
        if raw.reserved != [0; 3] {
            return Err(ExtentError::Reserved);
        }
        let kind = match raw.kind {
            1 => ExtentKind::Data,
            2 => ExtentKind::Preallocated,
            _ => return Err(ExtentError::Kind),
        };
        let blocks = checked_blocks(raw.blocks.get())?;
        let start = checked_start(raw.start.get(), blocks)?;
        Ok(Self { kind, start, blocks, generation: Generation::new(raw.generation.get()) })
    }

    /// The extent as it is stored.
    pub(crate) fn raw(&self) -> RawExtent {
        let kind = match self.kind {
            ExtentKind::Data => 1,
            ExtentKind::Preallocated => 2,
        };
        RawExtent {
            start: self.start.get().into(),
            generation: self.generation.get().into(),
            blocks: stored_blocks(self.blocks),
            kind,
            reserved: [0; 3],
        }
    }

    /// Its bytes.
    pub(crate) fn encode(&self) -> Vec<u8> {
        self.raw().as_bytes().to_vec()
    }
}

/// Allocated blocks with their reference count and checksums.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// Blocks, 1 to [`MAX_RUN_BLOCKS`].
    pub(crate) blocks: BlockCount,
    /// The shard that the blocks are borrowed from; `None` if they are this shard's own.
    pub(crate) lender: Option<ShardId>,
    /// Extents that cover the run, at least 1.
    pub(crate) references: u32,
    /// The epoch in which the blocks were allocated.
    pub(crate) generation: Generation,
    /// CRC32C of each block; empty if they are preallocated.
    pub(crate) checksums: Vec<u32>,
}

/// A run but for its checksums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RunHead {
    /// As of [`Run`].
    pub(crate) blocks: BlockCount,
    /// As of [`Run`].
    pub(crate) lender: Option<ShardId>,
    /// As of [`Run`].
    pub(crate) references: u32,
    /// As of [`Run`].
    pub(crate) generation: Generation,
    /// What the blocks hold.
    pub(crate) kind: ExtentKind,
}

impl RunHead {
    /// Checks a stored run.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn decode(value: &[u8]) -> Result<Self, ExtentError> {
        Self::with_checksums(value).map(|(head, _)| head)
    }

    fn with_checksums(value: &[u8]) -> Result<(Self, &[U32]), ExtentError> {
        let (raw, rest) = RawRun::ref_from_prefix(value).map_err(|_| ExtentError::Length)?;
        let blocks = checked_blocks(raw.blocks.get().into())?;
        let lender = match raw.lender.get() {
            0 => None,
            shard => {
                let shard = u8::try_from(shard - 1).ok().and_then(ShardId::new);
                Some(shard.ok_or(ExtentError::Lender)?)
            }
        };
        if raw.references.get() == 0 {
            return Err(ExtentError::References);
        }
        let checksums = <[U32]>::ref_from_bytes(rest).map_err(|_| ExtentError::Length)?;
        if !checksums.is_empty() && checksums.len() as u64 != blocks.get() {
            return Err(ExtentError::Length);
        }
        if lender.is_some() && checksums.is_empty() {
            return Err(ExtentError::Lender); // preallocated blocks are never lent
        }
        let kind = if checksums.is_empty() { ExtentKind::Preallocated } else { ExtentKind::Data };
        let (references, generation) = (raw.references.get(), Generation::new(raw.generation.get()));
        Ok((Self { blocks, lender, references, generation, kind }, checksums))
    }
}

impl Run {
    /// Checks a stored run.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn decode(value: &[u8]) -> Result<Self, ExtentError> {
        let (head, checksums) = RunHead::with_checksums(value)?;
        let RunHead { blocks, lender, references, generation, kind: _ } = head;
        let checksums = checksums.iter().map(|checksum| checksum.get()).collect();
        Ok(Self { blocks, lender, references, generation, checksums })
    }

    /// The run as it is stored.
    pub(crate) fn encode(&self) -> Vec<u8> {
        self.encode_with(self.references)
    }

    /// As [`encode`](Self::encode), with another number of references.
    pub(crate) fn encode_with(&self, references: u32) -> Vec<u8> {
        let blocks = u16::try_from(self.blocks.get()).expect("a run has at most MAX_RUN_BLOCKS blocks");
        let raw = RawRun {
            blocks: blocks.into(),
            lender: self.lender.map_or(0, |shard| 1 + u16::from(shard.get())).into(),
            references: references.into(),
            generation: self.generation.get().into(),
        };
        let mut value = Vec::with_capacity(size_of::<RawRun>() + 4 * self.checksums.len());
        value.extend_from_slice(raw.as_bytes());
        for checksum in &self.checksums {
            value.extend_from_slice(&checksum.to_le_bytes());
        }
        value
    }

    /// The run but for its checksums.
    pub(crate) fn head(&self) -> RunHead {
        let Self { blocks, lender, references, generation, .. } = *self;
        RunHead { blocks, lender, references, generation, kind: self.kind() }
    }

    /// What the blocks hold.
    pub(crate) fn kind(&self) -> ExtentKind {
        if self.checksums.is_empty() { ExtentKind::Preallocated } else { ExtentKind::Data }
    }

    /// The part of the run from its block `from` up to, not including, `to`.
    pub(crate) fn part(&self, from: u64, to: u64) -> Self {
        assert!(from < to && to <= self.blocks.get(), "a part lies within its run");
        let checksums = match self.kind() {
            ExtentKind::Data => self.checksums[from as usize..to as usize].to_vec(),
            ExtentKind::Preallocated => Vec::new(),
        };
        Self { blocks: BlockCount::new(to - from), checksums, ..*self }
    }
}

/// A reference to blocks, as found from the blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Backref {
    /// Blocks, 1 to [`MAX_RUN_BLOCKS`].
    pub(crate) blocks: BlockCount,
}

impl Backref {
    /// Checks a stored back-reference.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn decode(value: &[u8]) -> Result<Self, ExtentError> {
        let raw = RawBackref::read_from_bytes(value).map_err(|_| ExtentError::Length)?;
        if raw.reserved != [0; 4] {
            return Err(ExtentError::Reserved);
        }
        Ok(Self { blocks: checked_blocks(raw.blocks.get())? })
    }

    /// The back-reference as it is stored.
    pub(crate) fn raw(&self) -> RawBackref {
        RawBackref { blocks: stored_blocks(self.blocks), reserved: [0; 4] }
    }

    /// Its bytes.
    pub(crate) fn encode(&self) -> Vec<u8> {
        self.raw().as_bytes().to_vec()
    }
}

/// Blocks that are to be given back to their lender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Return {
    /// Blocks, 1 to [`MAX_RUN_BLOCKS`].
    pub(crate) blocks: BlockCount,
    /// The epoch in which the blocks were allocated.
    pub(crate) generation: Generation,
}

impl Return {
    /// Checks a stored return.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn decode(value: &[u8]) -> Result<Self, ExtentError> {
        let raw = RawReturn::read_from_bytes(value).map_err(|_| ExtentError::Length)?;
        if raw.reserved != [0; 4] {
            return Err(ExtentError::Reserved);
        }
        let blocks = checked_blocks(raw.blocks.get())?;
        Ok(Self { blocks, generation: Generation::new(raw.generation.get()) })
    }

    /// The return as it is stored.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let (blocks, generation) = (stored_blocks(self.blocks), self.generation.get().into());
        RawReturn { blocks, reserved: [0; 4], generation }.as_bytes().to_vec()
    }
}

/// Key of the return of blocks from `start` on to `lender`.
pub(crate) fn return_key(lender: ShardId, start: BlockNr) -> Key {
    Key::new(0, RETURN, lender.get().into(), start.get())
}

/// Lender and first block of a return, by its key.
///
/// # Errors
/// [`ExtentError::Lender`] or [`ExtentError::Position`] if the key is none of a return.
pub(crate) fn return_of_key(key: &Key, blocks: BlockCount) -> Result<(ShardId, BlockNr), ExtentError> {
    let lender = u8::try_from(key.offset).ok().and_then(ShardId::new).ok_or(ExtentError::Lender)?;
    Ok((lender, checked_start(key.minor, blocks)?))
}

/// Key of the extent of `inode` at file offset `offset` in bytes.
pub(crate) fn extent_key(inode: InodeNr, offset: u64) -> Key {
    Key::new(inode.get(), EXTENT, offset, 0)
}

/// The object that keeps what a clone replaces of `inode`, until the clone is whole.
pub(crate) fn set_aside_of(inode: InodeNr) -> InodeNr {
    InodeNr::new(inode.get() | SET_ASIDE)
}

/// The inode whose replaced contents `object` keeps, if it is such an object.
pub(crate) fn owner_of_set_aside(object: InodeNr) -> Option<InodeNr> {
    let owner = InodeNr::new(object.get() & !SET_ASIDE);
    (object.get() & SET_ASIDE != 0 && owner.sequence() > 0).then_some(owner)
}

/// The object that has, in the lender's tree, what is lent to `borrower`: no inode has the sequence number 0.
pub(crate) fn lent_to(borrower: ShardId) -> InodeNr {
    InodeNr::new(SET_ASIDE | u64::from(borrower.get()))
}

/// The shard that `object` has borrowed for, if it is such an object.
pub(crate) fn borrower_of(object: InodeNr) -> Option<ShardId> {
    let owner = InodeNr::new(object.get() & !SET_ASIDE);
    (object.get() & SET_ASIDE != 0 && owner.sequence() == 0).then(|| owner.shard())
}

/// Where the extent of lent blocks lies in the object of their borrower.
pub(crate) fn lent_offset(start: BlockNr) -> u64 {
    start.get() * BLOCK_SIZE
}

/// Key of the run that begins at `start`.
pub(crate) fn run_key(start: BlockNr) -> Key {
    Key::new(PHYSICAL | start.get(), RUN, 0, 0)
}

/// Key of the back-reference of blocks from `start` to `inode`'s file offset `offset` in bytes.
pub(crate) fn backref_key(start: BlockNr, inode: InodeNr, offset: u64) -> Key {
    Key::new(PHYSICAL | start.get(), BACKREF, inode.get(), offset)
}

/// The block that a physical item's key belongs to; `None` for keys of other objects.
pub(crate) fn physical_block(key: &Key) -> Option<BlockNr> {
    (key.object & PHYSICAL != 0).then(|| BlockNr::new(key.object & !PHYSICAL))
}

/// Checks the position that an extent's key gives it, with its length.
///
/// # Errors
/// [`ExtentError::Position`] if it is no multiple of the block size or ends beyond 2⁶³ bytes.
pub(crate) fn check_extent_offset(offset: u64, blocks: BlockCount) -> Result<(), ExtentError> {
    let end = blocks.bytes().and_then(|bytes| offset.checked_add(bytes));
    if offset.is_multiple_of(BLOCK_SIZE) && end.is_some_and(|end| end <= 1 << 63) {
        return Ok(());
    }
    Err(ExtentError::Position)
}

fn checked_blocks(blocks: u32) -> Result<BlockCount, ExtentError> {
    let blocks = u64::from(blocks);
    if (1..=MAX_RUN_BLOCKS).contains(&blocks) {
        Ok(BlockCount::new(blocks))
    } else {
        Err(ExtentError::Blocks)
    }
}

fn checked_start(start: u64, blocks: BlockCount) -> Result<BlockNr, ExtentError> {
    // The bound keeps the sum of any block number and count, in bytes too, far from overflowing.
    if start <= (1 << 51) - blocks.get() { Ok(BlockNr::new(start)) } else { Err(ExtentError::Position) }
}

fn stored_blocks(blocks: BlockCount) -> U32 {
    U32::new(u32::try_from(blocks.get()).expect("an extent or run has at most MAX_RUN_BLOCKS blocks"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(blocks: u64, kind: ExtentKind) -> Run {
        let checksums = match kind {
            ExtentKind::Data => (0..blocks as u32).map(|block| block.wrapping_mul(0x9e37_79b9)).collect(),
            ExtentKind::Preallocated => Vec::new(),
        };
        let (blocks, generation) = (BlockCount::new(blocks), Generation::new(9));
        Run { blocks, lender: None, references: 3, generation, checksums }
    }

    #[test]
    fn items_come_back_as_they_were_stored() {
        let extent = Extent {
            kind: ExtentKind::Preallocated,
            start: BlockNr::new(77),
            blocks: BlockCount::new(256),
            generation: Generation::new(5),
        };
        assert_eq!(Extent::decode(&extent.encode()), Ok(extent));
        for kind in [ExtentKind::Data, ExtentKind::Preallocated] {
            let run = run(256, kind);
            assert_eq!(Run::decode(&run.encode()).as_ref(), Ok(&run));
            assert_eq!(run.kind(), kind);
        }
        let backref = Backref { blocks: BlockCount::new(1) };
        assert_eq!(Backref::decode(&backref.encode()), Ok(backref));
        let borrowed = Run { lender: ShardId::new(63), ..run(4, ExtentKind::Data) };
        assert_eq!(Run::decode(&borrowed.encode()).as_ref(), Ok(&borrowed));
        assert_eq!(borrowed.part(1, 2).lender, ShardId::new(63));
        let returned = Return { blocks: BlockCount::new(7), generation: Generation::new(5) };
        assert_eq!(Return::decode(&returned.encode()), Ok(returned));
    }

    #[test]
    fn objects_of_borrowers_and_of_what_is_set_aside_are_told_apart() {
        let shard = ShardId::new(63).unwrap();
        let inode = InodeNr::from_parts(shard, 1).unwrap();
        for (object, owner, borrower) in [
            (inode, None, None),
            (set_aside_of(inode), Some(inode), None),
            (lent_to(shard), None, Some(shard)),
            (lent_to(ShardId::FIRST), None, Some(ShardId::FIRST)),
        ] {
            assert_eq!((owner_of_set_aside(object), borrower_of(object)), (owner, borrower));
        }
    }

    #[test]
    fn parts_of_a_run_carry_their_own_checksums() {
        let whole = run(10, ExtentKind::Data);
        let part = whole.part(3, 7);
        assert_eq!((part.blocks.get(), &part.checksums[..]), (4, &whole.checksums[3..7]));
        assert_eq!(run(10, ExtentKind::Preallocated).part(0, 1).kind(), ExtentKind::Preallocated);
    }

    #[test]
    fn foreign_values_are_refused_by_what_is_wrong_with_them() {
        let extent = Extent {
            kind: ExtentKind::Data,
            start: BlockNr::new(77),
            blocks: BlockCount::new(2),
            generation: Generation::new(5),
        };
        let changed = |at: usize, byte: u8| {
            let mut value = extent.encode();
            value[at] = byte;
            Extent::decode(&value)
        };
        assert_eq!(changed(7, 0xff), Err(ExtentError::Position));
        assert_eq!(changed(16, 0), Err(ExtentError::Blocks));
        assert_eq!(changed(17, 2), Err(ExtentError::Blocks));
        assert_eq!(changed(20, 0), Err(ExtentError::Kind));
        assert_eq!(changed(23, 1), Err(ExtentError::Reserved));
        assert_eq!(Extent::decode(&extent.encode()[1..]), Err(ExtentError::Length));
        let mut unreferenced = run(2, ExtentKind::Data);
        unreferenced.references = 0;
        assert_eq!(Run::decode(&unreferenced.encode()), Err(ExtentError::References));
        let lent = |kind, lender: u8| {
            let mut value = run(2, kind).encode();
            value[2] = lender;
            Run::decode(&value)
        };
        assert_eq!(lent(ExtentKind::Data, 65), Err(ExtentError::Lender));
        assert_eq!(lent(ExtentKind::Preallocated, 1), Err(ExtentError::Lender));
        assert_eq!(Return::decode(&[1; 16]), Err(ExtentError::Reserved));
        let returned = |lender, start| return_of_key(&Key::new(0, RETURN, lender, start), BlockCount::new(1));
        assert_eq!(returned(64, 1), Err(ExtentError::Lender));
        assert_eq!(returned(0, u64::MAX), Err(ExtentError::Position));
        let value = run(2, ExtentKind::Data).encode();
        assert_eq!(Run::decode(&value[..value.len() - 4]), Err(ExtentError::Length));
        assert_eq!(Run::decode(&value[..value.len() - 3]), Err(ExtentError::Length));
        assert_eq!(check_extent_offset(100, BlockCount::new(1)), Err(ExtentError::Position));
        assert_eq!(check_extent_offset(1 << 63, BlockCount::new(1)), Err(ExtentError::Position));
    }

    proptest! {
        #[test]
        fn no_bytes_make_decoding_panic(value in prop::collection::vec(any::<u8>(), 0..1100)) {
            if let Ok(extent) = Extent::decode(&value) {
                prop_assert_eq!(extent.encode(), &value[..]);
            }
            if let Ok(run) = Run::decode(&value) {
                prop_assert_eq!(run.encode(), &value[..]);
            }
            if let Ok(backref) = Backref::decode(&value) {
                prop_assert_eq!(backref.encode(), &value[..]);
            }
            if let Ok(returned) = Return::decode(&value) {
                prop_assert_eq!(returned.encode(), &value[..]);
            }
        }
    }
}
