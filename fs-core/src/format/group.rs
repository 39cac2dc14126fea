//! Allocation groups on disk: where they lie, and the slots that hold their bitmaps.
//!
//! Owns: [`VolumeLayout`], the arithmetic of a volume's groups; the wire form of a bitmap slot ([`encode`],
//! [`decode`]); [`contribution`], what a slot adds to the superblock's digest of all groups.
//!
//! A volume is cut into groups of 2^k blocks, group g beginning at block g << k. Every group begins with
//! [`SLOTS_PER_GROUP`] slots (group 0 after the first [`RESERVED_BLOCKS`] blocks), each able to hold the group's
//! bitmap: one bit a block, set when the block is in use. A slot names the epoch that it belongs to. Of the valid
//! slots, the one with the highest epoch that is not above the superblock's counts.
//!
//! Invariants:
//! - blocks outside the volume, the slots themselves and the superblock rings are always marked as used;
//! - a slot whose checksum holds but whose contents break a rule here is refused like a torn one.
//!
//! *Legal crash outcomes*: slots of an epoch are written before the superblock that names the epoch. After a power
//! cut in between, any subset of them is on the medium, whole or torn. A torn one fails its checksum; a whole one
//! has an epoch above the superblock's and does not count. Neither damages the two newest older slots, because
//! there are three: the slots that the newest and the last but one superblock generation need are never the one
//! being written.
//!
//! Excludes: which blocks to hand out (the allocator's business).

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::format::superblock::{RING_SLOTS, RING_STARTS};
use crate::types::{BLOCK_SIZE, BlockCount, BlockNr, Epoch, MAX_SHARDS, ShardId};

/// Slots that a group's bitmap rotates through: one for the newest superblock generation, one for the generation
/// before it, and one being written.
pub const SLOTS_PER_GROUP: usize = 3;

/// Blocks at the start of a volume that hold no bitmap and no data: boot sectors, ring A, room for later.
pub const RESERVED_BLOCKS: u64 = 32;

/// Blocks of a tree node; a node begins at a multiple of this.
pub const CLUSTER_BLOCKS: u64 = 4;

/// Smallest group: 2^9 blocks, 2 MiB.
pub const MIN_GROUP_SHIFT: u8 = 9;

/// Largest group: 2^18 blocks, 1 GiB.
pub const MAX_GROUP_SHIFT: u8 = 18;

/// Groups that every shard has at least when a volume is made.
pub const GROUPS_PER_SHARD: u64 = 16;

/// Blocks of the largest volume this format describes: 2^40 blocks, 4 PiB.
pub const MAX_VOLUME_BLOCKS: u64 = 1 << 40;

/// Fewest blocks that make a last, shorter group worth having.
const MIN_TAIL_BLOCKS: u64 = 256;

const HEADER_BYTES: usize = 64;
const MAGIC: [u8; 8] = *b"PLXGROUP";

/// Why a volume cannot have a layout.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Not enough room for the shards asked for.
    #[error("{shards} shard(s) need at least {} MiB, the device has {} MiB", needed.div_ceil(1 << 20), available >> 20)]
    TooSmall {
        /// Shards asked for.
        shards: u8,
        /// Bytes they need.
        needed: u64,
        /// Bytes there are.
        available: u64,
    },
    /// More blocks than the format can describe.
    #[error("a volume has at most {MAX_VOLUME_BLOCKS} blocks of 4 KiB, not {blocks}")]
    TooLarge {
        /// Blocks asked for.
        blocks: u64,
    },
    /// A field of a stored layout is out of its range.
    #[error("impossible layout: {blocks} blocks in groups of 2^{group_shift}")]
    Impossible {
        /// Blocks of the volume.
        blocks: u64,
        /// Binary logarithm of a group's blocks.
        group_shift: u8,
    },
    /// Shards must number 1 to [`MAX_SHARDS`].
    #[error("a volume has 1 to {MAX_SHARDS} shards, not {shards}")]
    Shards {
        /// Shards asked for.
        shards: u8,
    },
}

/// Where the groups of a volume lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeLayout {
    blocks: u64,
    group_shift: u8,
}

impl VolumeLayout {
    /// The layout of a stored volume of `blocks` blocks in groups of 2^`group_shift`.
    ///
    /// # Errors
    /// [`LayoutError::Impossible`] or [`LayoutError::TooLarge`]: no volume is made like this.
    pub fn new(blocks: BlockCount, group_shift: u8) -> Result<Self, LayoutError> {
        let blocks = blocks.get();
        if blocks > MAX_VOLUME_BLOCKS {
            return Err(LayoutError::TooLarge { blocks });
        }
        let layout = Self { blocks, group_shift };
        let impossible = LayoutError::Impossible { blocks, group_shift };
        if !(MIN_GROUP_SHIFT..=MAX_GROUP_SHIFT).contains(&group_shift)
            || !blocks.is_multiple_of(CLUSTER_BLOCKS)
            || usable_blocks(blocks, group_shift) != blocks
            || layout.groups() < GROUPS_PER_SHARD
        {
            return Err(impossible);
        }
        Ok(layout)
    }

    /// The layout of a new volume: the largest groups of which every shard still gets [`GROUPS_PER_SHARD`].
    /// A remainder of the device too short for a group is left unused.
    ///
    /// # Errors
    /// [`LayoutError::TooSmall`], [`LayoutError::TooLarge`], [`LayoutError::Shards`].
    pub fn plan(device_blocks: BlockCount, shards: u8) -> Result<Self, LayoutError> {
        if shards == 0 || shards > MAX_SHARDS {
            return Err(LayoutError::Shards { shards });
        }
        let device_blocks = device_blocks.get();
        if device_blocks > MAX_VOLUME_BLOCKS {
            return Err(LayoutError::TooLarge { blocks: device_blocks });
        }
        let wanted = GROUPS_PER_SHARD * u64::from(shards);
        for group_shift in (MIN_GROUP_SHIFT..=MAX_GROUP_SHIFT).rev() {
            let layout = Self { blocks: usable_blocks(device_blocks, group_shift), group_shift };
            if layout.groups() >= wanted {
                return Ok(layout);
            }
        }
        let needed = ((wanted - 1) << MIN_GROUP_SHIFT) + MIN_TAIL_BLOCKS;
        Err(LayoutError::TooSmall {
            shards,
            needed: needed * BLOCK_SIZE,
            available: device_blocks * BLOCK_SIZE,
        })
    }

    /// The layout of the same volume with another end, at most `blocks` blocks from its beginning.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn resized(&self, blocks: BlockCount) -> Result<Self, LayoutError> {
        Self::new(BlockCount::new(usable_blocks(blocks.get(), self.group_shift)), self.group_shift)
    }

    /// Blocks of the volume: a multiple of [`CLUSTER_BLOCKS`].
    pub const fn blocks(&self) -> BlockCount {
        BlockCount::new(self.blocks)
    }

    /// Binary logarithm of a full group's blocks.
    pub const fn group_shift(&self) -> u8 {
        self.group_shift
    }

    /// Number of groups; the last may be shorter than the others.
    pub const fn groups(&self) -> u64 {
        self.blocks.div_ceil(1 << self.group_shift)
    }

    /// The group that holds `block`; `None` outside the volume.
    pub fn group_of(&self, block: BlockNr) -> Option<u64> {
        (block.get() < self.blocks).then(|| block.get() >> self.group_shift)
    }

    /// First block of `group`.
    pub const fn group_start(&self, group: u64) -> BlockNr {
        BlockNr::new(group << self.group_shift)
    }

    /// Blocks of `group` that lie in the volume.
    pub fn group_blocks(&self, group: u64) -> u64 {
        let start = group << self.group_shift;
        self.blocks.saturating_sub(start).min(1 << self.group_shift)
    }

    /// Bits of a group's bitmap, those behind the volume's end included.
    pub const fn bitmap_bits(&self) -> usize {
        1 << self.group_shift
    }

    /// Blocks of one bitmap slot.
    pub const fn slot_blocks(&self) -> BlockCount {
        BlockCount::new((HEADER_BYTES as u64 + (1 << self.group_shift) / 8).div_ceil(BLOCK_SIZE))
    }

    /// Bytes of one bitmap slot.
    pub const fn slot_bytes(&self) -> usize {
        (self.slot_blocks().get() * BLOCK_SIZE) as usize
    }

    /// First block of slot `slot` (below [`SLOTS_PER_GROUP`]) of `group`.
    pub fn slot_start(&self, group: u64, slot: usize) -> BlockNr {
        debug_assert!(slot < SLOTS_PER_GROUP);
        let first = self.group_start(group).get() + if group == 0 { RESERVED_BLOCKS } else { 0 };
        BlockNr::new(first + slot as u64 * self.slot_blocks().get())
    }

    /// Ranges of `group`, as bits of its bitmap, that are never handed out: its slots, the reserved start of the
    /// volume, the superblock rings, and what lies behind the end of the volume. They may overlap.
    pub fn overhead(&self, group: u64) -> Vec<std::ops::Range<usize>> {
        let start = self.group_start(group).get();
        let bits = self.bitmap_bits() as u64;
        let slots_end = self.slot_start(group, SLOTS_PER_GROUP - 1).get() + self.slot_blocks().get();
        let mut ranges = vec![(start, slots_end), (start + self.group_blocks(group), start + bits)];
        ranges.extend(RING_STARTS.iter().map(|ring| (ring.get(), ring.get() + RING_SLOTS)));
        ranges
            .into_iter()
            .map(|(from, to)| (from.max(start), to.min(start + bits)))
            .filter(|(from, to)| from < to)
            .map(|(from, to)| (from - start) as usize..(to - start) as usize)
            .collect()
    }
}

/// Blocks of a volume on a device of `device_blocks`: whole clusters, and no last group that is too short.
fn usable_blocks(device_blocks: u64, group_shift: u8) -> u64 {
    let aligned = device_blocks - device_blocks % CLUSTER_BLOCKS;
    let tail = aligned % (1 << group_shift);
    if tail < MIN_TAIL_BLOCKS { aligned - tail } else { aligned }
}

/// What tells the slots of one volume from those of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotIdentity {
    /// The first eight bytes of the volume's UUID, as a number.
    pub volume: u64,
    /// Shards of the volume.
    pub shards: u8,
}

/// A bitmap slot's checked contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotContents {
    /// Epoch whose state this is.
    pub epoch: Epoch,
    /// Shard that owns the group.
    pub owner: ShardId,
    /// One bit a block, lowest bit of the first word first; set means used.
    pub bitmap: Box<[u64]>,
    /// The slot's part in the digest of all groups.
    pub contribution: u64,
}

/// Why a bitmap slot does not count.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// Not as long as a slot.
    #[error("slot of {bytes} bytes")]
    Length {
        /// Bytes given.
        bytes: usize,
    },
    /// Nothing was ever written here, or something else was.
    #[error("no bitmap here")]
    Blank,
    /// Torn or damaged.
    #[error("checksum is {computed:08x}, the slot says {stored:08x}")]
    Checksum {
        /// Checksum stored.
        stored: u32,
        /// Checksum of the contents.
        computed: u32,
    },
    /// Belongs to another volume, or to an earlier one on the same device.
    #[error("bitmap of another volume")]
    WrongVolume,
    /// A misdirected write.
    #[error("bitmap of group {found}")]
    WrongGroup {
        /// Group named in the slot.
        found: u64,
    },
    /// The owner is not a shard of this volume.
    #[error("owner is shard {owner}")]
    Owner {
        /// Shard named in the slot.
        owner: u8,
    },
    /// A block that holds the volume's own structures is marked as free.
    #[error("block {block} of the volume's own structures is marked as free")]
    OverheadFree {
        /// The block.
        block: BlockNr,
    },
    /// The header's count of free blocks is not the bitmap's.
    #[error("{counted} blocks are free, the header says {stored}")]
    Count {
        /// Count stored.
        stored: u32,
        /// Count of clear bits.
        counted: u32,
    },
    /// Bytes that must be zero are not.
    #[error("reserved bytes are in use")]
    Reserved,
}

/// Header of a bitmap slot, at its start; the bitmap follows, zeroes fill the last block.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawSlotHeader {
    magic: [u8; 8],
    /// CRC32C of the whole slot with this field zero.
    crc: U32,
    free_blocks: U32,
    volume: U64,
    group: U64,
    epoch: U64,
    owner: u8,
    reserved: [u8; 23],
}

const _: () = assert!(size_of::<RawSlotHeader>() == HEADER_BYTES);

/// The bytes of the slot that says: in `epoch`, `owner` owns `group`, and `bitmap` is what is used.
/// Returns them with the slot's part in the digest of all groups.
pub fn encode(
    layout: &VolumeLayout,
    identity: SlotIdentity,
    group: u64,
    epoch: Epoch,
    owner: ShardId,
    bitmap: &[u64],
) -> (Vec<u8>, u64) {
    assert_eq!(bitmap.len() * 64, layout.bitmap_bits(), "a bitmap covers its group");
    let mut header = RawSlotHeader {
        magic: MAGIC,
        crc: U32::ZERO,
        free_blocks: U32::new(count_free(bitmap)),
        volume: U64::new(identity.volume),
        group: U64::new(group),
        epoch: U64::new(epoch.get()),
        owner: owner.get(),
        reserved: [0; 23],
    };
    let mut bytes = vec![0; layout.slot_bytes()];
    bytes[..HEADER_BYTES].copy_from_slice(header.as_bytes());
    for (place, word) in bytes[HEADER_BYTES..].chunks_exact_mut(8).zip(bitmap) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    let crc = crc32c::crc32c(&bytes);
    header.crc = U32::new(crc);
    bytes[..HEADER_BYTES].copy_from_slice(header.as_bytes());
    (bytes, contribution(group, epoch, crc))
}

/// Checks the bytes of a slot of `group` and returns what it says.
///
/// # Errors
/// The slot does not count; see [`SlotError`].
pub fn decode(
    layout: &VolumeLayout,
    identity: SlotIdentity,
    group: u64,
    bytes: &[u8],
) -> Result<SlotContents, SlotError> {
    if bytes.len() != layout.slot_bytes() {
        return Err(SlotError::Length { bytes: bytes.len() });
    }
    let Ok((header, rest)) = RawSlotHeader::read_from_prefix(bytes) else {
        return Err(SlotError::Length { bytes: bytes.len() });
    };
    if header.magic != MAGIC {
        return Err(SlotError::Blank);
    }
    let stored = header.crc.get();
    let computed = slot_checksum(&header, rest);
    if stored != computed {
        return Err(SlotError::Checksum { stored, computed });
    }
    if header.volume.get() != identity.volume {
        return Err(SlotError::WrongVolume);
    }
    if header.group.get() != group {
        return Err(SlotError::WrongGroup { found: header.group.get() });
    }
    let owner = ShardId::new(header.owner)
        .filter(|owner| owner.get() < identity.shards)
        .ok_or(SlotError::Owner { owner: header.owner })?;
    let words = layout.bitmap_bits() / 64;
    let bitmap: Box<[u64]> =
        rest.as_chunks::<8>().0.iter().take(words).map(|chunk| u64::from_le_bytes(*chunk)).collect();
    for bit in layout.overhead(group).into_iter().flatten() {
        if bitmap[bit / 64] >> (bit % 64) & 1 == 0 {
            let block = BlockNr::new(layout.group_start(group).get() + bit as u64);
            return Err(SlotError::OverheadFree { block });
        }
    }
    let (stored_free, counted) = (header.free_blocks.get(), count_free(&bitmap));
    if stored_free != counted {
        return Err(SlotError::Count { stored: stored_free, counted });
    }
    let behind = &rest[layout.bitmap_bits() / 8..];
    if header.reserved != [0; 23] || behind.iter().any(|byte| *byte != 0) {
        return Err(SlotError::Reserved);
    }
    let epoch = Epoch::new(header.epoch.get());
    Ok(SlotContents { epoch, owner, bitmap, contribution: contribution(group, epoch, stored) })
}

/// Whether a block begins like a bitmap slot, of whatever volume.
pub fn is_bitmap_slot(block: &[u8]) -> bool {
    block.starts_with(&MAGIC)
}

/// What the slot of `group` with `epoch` and checksum `crc` adds (wrapping) to the digest of all groups.
///
/// The superblock holds the sum over every group's current slot. A slot that was lost, that fell back to an older
/// one, or that was written for another group changes the sum, which no checksum inside a slot could show.
pub fn contribution(group: u64, epoch: Epoch, crc: u32) -> u64 {
    mix(group ^ mix(epoch.get() ^ mix(u64::from(crc))))
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

fn slot_checksum(header: &RawSlotHeader, rest: &[u8]) -> u32 {
    let blank = RawSlotHeader { crc: U32::ZERO, ..*header };
    crc32c::crc32c_append(crc32c::crc32c(blank.as_bytes()), rest)
}

fn count_free(bitmap: &[u64]) -> u32 {
    bitmap.iter().map(|word| word.count_zeros()).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const IDENTITY: SlotIdentity = SlotIdentity { volume: 0x1122_3344_5566_7788, shards: 3 };

    fn empty_bitmap(layout: &VolumeLayout, group: u64) -> Box<[u64]> {
        let mut bitmap = vec![0_u64; layout.bitmap_bits() / 64].into_boxed_slice();
        for bit in layout.overhead(group).into_iter().flatten() {
            bitmap[bit / 64] |= 1 << (bit % 64);
        }
        bitmap
    }

    #[test]
    fn plan_gives_every_shard_sixteen_groups_of_the_largest_size() {
        let layout = VolumeLayout::plan(BlockCount::new(1 << 24), 4).unwrap();
        assert_eq!((layout.group_shift(), layout.groups()), (18, 64));
        let layout = VolumeLayout::plan(BlockCount::new((1 << 24) - 4), 4).unwrap();
        assert_eq!((layout.group_shift(), layout.groups()), (18, 64));
        let layout = VolumeLayout::plan(BlockCount::new((1 << 24) - (1 << 18)), 4).unwrap();
        assert_eq!(layout.group_shift(), 17);
        let layout = VolumeLayout::plan(BlockCount::new(16 * 512 + 3), 1).unwrap();
        assert_eq!((layout.group_shift(), layout.groups(), layout.blocks().get()), (9, 16, 8192));
    }

    #[test]
    fn plan_says_what_the_shards_need() {
        let error = VolumeLayout::plan(BlockCount::new(8192), 2).unwrap_err();
        let LayoutError::TooSmall { shards: 2, needed, available } = error else { panic!("{error}") };
        assert_eq!(available, 8192 * 4096);
        assert!(VolumeLayout::plan(BlockCount::new(needed / 4096), 2).is_ok());
        assert!(VolumeLayout::plan(BlockCount::new(needed / 4096 - 1), 2).is_err());
        assert_eq!(VolumeLayout::plan(BlockCount::new(1 << 30), 65), Err(LayoutError::Shards { shards: 65 }));
        assert!(VolumeLayout::plan(BlockCount::new(0), 1).is_err());
        assert!(VolumeLayout::plan(BlockCount::new(u64::MAX), 1).is_err());
    }

    #[test]
    fn stored_layouts_are_those_that_plan_makes() {
        for blocks in [8192, 10_000, 123_456, 1 << 20, (1 << 24) + 300, 1 << 30] {
            for shards in [1, 2, 7, 64] {
                let Ok(layout) = VolumeLayout::plan(BlockCount::new(blocks), shards) else { continue };
                assert_eq!(VolumeLayout::new(layout.blocks(), layout.group_shift()), Ok(layout));
            }
        }
        for (blocks, shift) in
            [(8192, 8), (8192, 19), (8191, 9), (8192 + 4, 9), (4096, 9), (0, 9), (u64::MAX, 9)]
        {
            assert!(VolumeLayout::new(BlockCount::new(blocks), shift).is_err(), "{blocks} {shift}");
        }
    }

    #[test]
    fn structures_of_a_group_never_overlap() {
        for shift in MIN_GROUP_SHIFT..=MAX_GROUP_SHIFT {
            let layout = VolumeLayout::new(BlockCount::new(16 << shift), shift).unwrap();
            for group in 0..16 {
                let mut owned = std::collections::BTreeSet::new();
                for slot in 0..SLOTS_PER_GROUP {
                    let start = layout.slot_start(group, slot).get();
                    for block in start..start + layout.slot_blocks().get() {
                        assert_eq!(layout.group_of(BlockNr::new(block)), Some(group));
                        assert!(owned.insert(block));
                    }
                }
                for ring in RING_STARTS {
                    for block in ring.get()..ring.get() + RING_SLOTS {
                        if layout.group_of(BlockNr::new(block)) == Some(group) {
                            assert!(owned.insert(block), "ring block {block} in a slot of group {group}");
                        }
                    }
                }
                let start = layout.group_start(group).get();
                let overhead: std::collections::BTreeSet<u64> =
                    layout.overhead(group).into_iter().flatten().map(|bit| start + bit as u64).collect();
                assert!(owned.is_subset(&overhead));
                assert_eq!(overhead.len() - owned.len(), if group == 0 { 24 } else { 0 });
            }
        }
    }

    #[test]
    fn blocks_behind_the_end_are_overhead() {
        let layout = VolumeLayout::new(BlockCount::new(16 * 512 + 256), 9).unwrap();
        assert_eq!((layout.groups(), layout.group_blocks(16), layout.group_blocks(15)), (17, 256, 512));
        assert!(layout.overhead(16).contains(&(256..512)));
    }

    #[test]
    fn slot_of_another_volume_group_or_owner_does_not_count() {
        let layout = VolumeLayout::new(BlockCount::new(8192), 9).unwrap();
        let owner = ShardId::new(2).unwrap();
        let bitmap = empty_bitmap(&layout, 3);
        let (bytes, part) = encode(&layout, IDENTITY, 3, Epoch::new(9), owner, &bitmap);
        let contents = decode(&layout, IDENTITY, 3, &bytes).unwrap();
        assert_eq!(contents, SlotContents { epoch: Epoch::new(9), owner, bitmap, contribution: part });
        assert_eq!(decode(&layout, IDENTITY, 4, &bytes), Err(SlotError::WrongGroup { found: 3 }));
        let other = SlotIdentity { volume: 1, ..IDENTITY };
        assert_eq!(decode(&layout, other, 3, &bytes), Err(SlotError::WrongVolume));
        let fewer = SlotIdentity { shards: 2, ..IDENTITY };
        assert_eq!(decode(&layout, fewer, 3, &bytes), Err(SlotError::Owner { owner: 2 }));
        assert_eq!(decode(&layout, IDENTITY, 3, &bytes[1..]), Err(SlotError::Length { bytes: 4095 }));
        assert_eq!(decode(&layout, IDENTITY, 3, &[0; 4096]), Err(SlotError::Blank));
    }

    #[test]
    fn slot_that_frees_overhead_does_not_count() {
        let layout = VolumeLayout::new(BlockCount::new(8192), 9).unwrap();
        let mut bitmap = empty_bitmap(&layout, 8);
        bitmap[1] = 0;
        let (bytes, _) = encode(&layout, IDENTITY, 8, Epoch::new(1), ShardId::default(), &bitmap);
        let block = BlockNr::new(4160);
        assert_eq!(decode(&layout, IDENTITY, 8, &bytes), Err(SlotError::OverheadFree { block }));
    }

    #[test]
    fn slot_with_reserved_bytes_in_use_does_not_count() {
        let layout = VolumeLayout::new(BlockCount::new(8192), 9).unwrap();
        let bitmap = empty_bitmap(&layout, 5);
        let (good, _) = encode(&layout, IDENTITY, 5, Epoch::new(7), ShardId::default(), &bitmap);
        // In the header, and behind the 512 bits.
        for reserved in [41, 63, 128, 4095] {
            let mut bytes = good.clone();
            bytes[reserved] = 1;
            bytes[8..12].fill(0);
            let crc = crc32c::crc32c(&bytes);
            bytes[8..12].copy_from_slice(&crc.to_le_bytes());
            assert_eq!(decode(&layout, IDENTITY, 5, &bytes), Err(SlotError::Reserved), "byte {reserved}");
        }
    }

    proptest! {
        #[test]
        fn any_changed_bit_of_a_slot_is_noticed(bit in 0_usize..4096 * 8) {
            let layout = VolumeLayout::new(BlockCount::new(8192), 9).unwrap();
            let bitmap = empty_bitmap(&layout, 5);
            let (mut bytes, _) = encode(&layout, IDENTITY, 5, Epoch::new(7), ShardId::default(), &bitmap);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(decode(&layout, IDENTITY, 5, &bytes).is_err());
        }

        #[test]
        fn slots_survive_the_round_trip(words in proptest::collection::vec(any::<u64>(), 8), group in 0_u64..16) {
            let layout = VolumeLayout::new(BlockCount::new(8192), 9).unwrap();
            let bitmap: Box<[u64]> =
                empty_bitmap(&layout, group).iter().zip(words).map(|(fixed, random)| fixed | random).collect();
            let (bytes, part) = encode(&layout, IDENTITY, group, Epoch::new(4), ShardId::default(), &bitmap);
            let contents = decode(&layout, IDENTITY, group, &bytes).unwrap();
            prop_assert_eq!(contents.bitmap, bitmap);
            prop_assert_eq!(contents.contribution, part);
        }

        #[test]
        fn foreign_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 4096)) {
            let layout = VolumeLayout::new(BlockCount::new(8192), 9).unwrap();
            let mut bytes = bytes;
            prop_assert!(decode(&layout, IDENTITY, 0, &bytes).is_err());
            bytes[..8].copy_from_slice(&MAGIC);
            prop_assert!(decode(&layout, IDENTITY, 0, &bytes).is_err());
        }
    }
}
