//! The superblock on disk: the one place from which everything else of a volume is found.
//!
//! Owns: [`Superblock`], its wire form of one 4 KiB block ([`Superblock::encode`], [`Superblock::decode`]), and
//! where the copies lie ([`RING_STARTS`], [`RING_SLOTS`]).
//!
//! There are two rings of [`RING_SLOTS`] slots, 16 MiB apart. Generation g is written to slot g mod 8 of both, so
//! that each generation has a twin and the last eight generations are on the medium.
//!
//! Invariants:
//! - magic, checksum and version stand at the same place in every version of the format, so that any version can
//!   say "newer than I know";
//! - a superblock that decodes describes a possible volume: everything in it that is used as a number of blocks,
//!   shards or bits has been checked against the format's limits;
//! - without features that are unknown here it is encoded to the same bytes again: reserved ones are zero.
//!
//! *Legal crash outcomes*: while generation g is written, slot g mod 8 of either ring may be torn, or hold g − 8
//! still. Generation g − 1 lies elsewhere and is complete.
//!
//! Excludes: reading and writing the rings, and choosing the newest copy (`crate::superblock`).

use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::format::group::{CLUSTER_BLOCKS, LayoutError, SlotIdentity, VolumeLayout};
use crate::format::log::MAX_SEGMENT_BLOCKS;
use crate::format::node::{BlockPtr, MAX_LEVEL, TreeIdentity};
use crate::tree::TreeRoot;
use crate::types::{BLOCK_SIZE, BlockCount, BlockNr, Epoch, Generation, MAX_SHARDS, ShardId};

/// Slots of a ring, one block each.
pub const RING_SLOTS: u64 = 8;

/// First blocks of the two rings.
pub const RING_STARTS: [BlockNr; 2] = [BlockNr::new(16), BlockNr::new(4160)];

/// Version of the format that this code writes, and the newest that it reads.
pub const FORMAT_VERSION: u32 = 1;

/// Bytes of a label at most.
pub const MAX_LABEL_BYTES: usize = 64;

const MAGIC: [u8; 8] = *b"POLLUXFS";

/// What a superblock says of one shard: where its tree and its log begin, and its counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardRecord {
    /// The tree's root.
    pub tree: TreeRoot,
    /// Sequence number of the shard's next new inode: never given twice.
    pub next_inode: u64,
    /// Inodes of the shard.
    pub inodes: u64,
}

impl ShardRecord {
    /// A record that names nothing yet.
    pub const BLANK: Self = Self {
        tree: TreeRoot { ptr: BlockPtr { address: BlockNr::new(0), epoch: Epoch::new(0), crc: 0 }, level: 0 },
        next_inode: 0,
        inodes: 0,
    };
}

/// Where the intent log lies: two segments in groups of the first shard, used in turn. With each generation the log
/// begins anew in the segment that the one before did not use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogArea {
    /// First blocks of the segments.
    pub segments: [BlockNr; 2],
    /// Blocks of each.
    pub blocks: u32,
    /// The segment that continues this superblock's state: 0 or 1.
    pub current: u8,
}

impl LogArea {
    /// First block of the log that continues the superblock's state.
    pub fn head(&self) -> BlockNr {
        self.segments[usize::from(self.current & 1)]
    }

    /// The area as the next superblock has it.
    pub fn switched(self) -> Self {
        Self { current: 1 - (self.current & 1), ..self }
    }

    fn check(self, layout: &VolumeLayout) -> Option<Self> {
        let inside = |start: BlockNr| {
            let last = start.checked_add(BlockCount::new(u64::from(self.blocks) - 1))?;
            let group = layout.group_of(start)?;
            (layout.group_of(last)? == group).then_some(start)
        };
        if self.blocks == 0 || self.blocks > MAX_SEGMENT_BLOCKS || self.current > 1 {
            return None;
        }
        let [first, second] = self.segments;
        let distance = inside(first)?.get().abs_diff(inside(second)?.get());
        (distance >= u64::from(self.blocks)).then_some(self)
    }
}

/// A checked superblock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Features that code which does not know them may ignore.
    pub compatible: u64,
    /// Features that code which does not know them may only read past.
    pub read_only_compatible: u64,
    /// The volume's identity.
    pub uuid: Uuid,
    /// The user's name for it: at most [`MAX_LABEL_BYTES`] bytes.
    pub label: String,
    /// Number of this superblock; each one written is one higher.
    pub generation: Generation,
    /// The last closed epoch: the state that this superblock describes.
    pub epoch: Epoch,
    /// Random number of the mount that wrote it.
    pub incarnation: u64,
    /// Where the groups lie.
    pub layout: VolumeLayout,
    /// Key of the directory hash.
    pub hash_seed: [u8; 16],
    /// Sum of the contributions of every group's current bitmap slot (`format::group::contribution`).
    pub group_digest: u64,
    /// The intent log; `None` before the first checkpoint has made it.
    pub log: Option<LogArea>,
    /// One for each shard: 1 to [`MAX_SHARDS`].
    pub shards: Vec<ShardRecord>,
}

/// Features of [`Superblock::read_only_compatible`] that this code knows.
const KNOWN_READ_ONLY_COMPATIBLE: u64 = 0;

/// Incompatible features that this code knows.
const KNOWN_INCOMPATIBLE: u64 = 0;

/// Why a block is not a superblock to go by.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// All zeroes: never written.
    #[error("empty")]
    Empty,
    /// Something else is written here.
    #[error("no superblock")]
    NoMagic,
    /// Torn or damaged.
    #[error("checksum is {computed:08x}, the superblock says {stored:08x}")]
    Checksum {
        /// Checksum stored.
        stored: u32,
        /// Checksum of the contents.
        computed: u32,
    },
    /// Made by a newer version of Pollux.
    #[error("format version {version}, newer than {FORMAT_VERSION}")]
    NewerVersion {
        /// Version found.
        version: u32,
        /// Generation, where every version has it.
        generation: Generation,
    },
    /// Uses features that this version does not know.
    #[error("unknown incompatible features {features:#x}")]
    Features {
        /// The unknown ones.
        features: u64,
        /// Generation.
        generation: Generation,
    },
    /// The checksum holds, but the contents make no sense.
    #[error("{what}")]
    Nonsense {
        /// What is wrong.
        what: String,
    },
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawShard {
    block: U64,
    epoch: U64,
    crc: U32,
    level: u8,
    reserved: [u8; 3],
    reserved_log: U64,
    next_inode: U64,
    inodes: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawSuperblock {
    // These four stand here in every version.
    magic: [u8; 8],
    /// CRC32C of the block with this field zero.
    crc: U32,
    version: U32,
    generation: U64,

    compatible: U64,
    read_only_compatible: U64,
    incompatible: U64,
    uuid: [u8; 16],
    label: [u8; MAX_LABEL_BYTES],
    epoch: U64,
    incarnation: U64,
    blocks: U64,
    group_shift: u8,
    shards: u8,
    reserved_counts: [u8; 6],
    hash_seed: [u8; 16],
    group_digest: U64,
    log_segments: [U64; 2],
    log_blocks: U32,
    log_current: u8,
    reserved: [u8; 307],
    records: [RawShard; MAX_SHARDS as usize],
    reserved_end: [u8; 512],
}

const _: () = {
    assert!(size_of::<RawShard>() == 48);
    assert!(size_of::<RawSuperblock>() == BLOCK_SIZE as usize);
    assert!(std::mem::offset_of!(RawSuperblock, crc) == 8);
    assert!(std::mem::offset_of!(RawSuperblock, version) == 12);
    assert!(std::mem::offset_of!(RawSuperblock, generation) == 16);
    assert!(std::mem::offset_of!(RawSuperblock, log_segments) == 184);
    assert!(std::mem::offset_of!(RawSuperblock, records) == 512);
};

impl Superblock {
    /// Number of shards of the volume.
    pub fn shard_count(&self) -> u8 {
        self.shards.len() as u8
    }

    /// The record of `shard`, if the volume has that shard.
    pub fn shard(&self, shard: ShardId) -> Option<&ShardRecord> {
        self.shards.get(shard.index())
    }

    /// Whether it uses features with which this version must not write.
    pub fn must_be_read_only(&self) -> bool {
        self.read_only_compatible & !KNOWN_READ_ONLY_COMPATIBLE != 0
    }

    /// What marks the volume's nodes and bitmap slots as its own: the first eight bytes of the UUID.
    pub fn identity(&self) -> SlotIdentity {
        let bytes = self.uuid.as_bytes();
        let mut prefix = [0; 8];
        prefix.copy_from_slice(&bytes[..8]);
        SlotIdentity { volume: u64::from_le_bytes(prefix), shards: self.shard_count() }
    }

    /// What marks the nodes of a shard's tree as its own.
    pub fn tree_identity(&self, shard: ShardId) -> TreeIdentity {
        TreeIdentity { volume: self.identity().volume, shard }
    }

    /// Block of this generation's slot in each ring.
    pub fn slots(&self) -> [BlockNr; 2] {
        slots_of(self.generation)
    }

    /// The block as it is written.
    ///
    /// # Panics
    /// If the label is too long or the shards are too many or none: the makers of superblocks check that.
    pub fn encode(&self) -> Box<[u8; BLOCK_SIZE as usize]> {
        assert!(self.label.len() <= MAX_LABEL_BYTES, "the label was checked");
        assert!((1..=MAX_SHARDS as usize).contains(&self.shards.len()), "the number of shards was checked");
        let mut label = [0; MAX_LABEL_BYTES];
        label[..self.label.len()].copy_from_slice(self.label.as_bytes());
        let mut records = [RawShard::new_zeroed(); MAX_SHARDS as usize];
        for (raw, shard) in records.iter_mut().zip(&self.shards) {
            *raw = RawShard::from(shard);
        }
        let none = LogArea { segments: [BlockNr::new(0); 2], blocks: 0, current: 0 };
        let log = self.log.unwrap_or(none);
        let mut raw = RawSuperblock {
            magic: MAGIC,
            crc: U32::ZERO,
            version: U32::new(FORMAT_VERSION),
            generation: U64::new(self.generation.get()),
            compatible: U64::new(self.compatible),
            read_only_compatible: U64::new(self.read_only_compatible),
            incompatible: U64::ZERO,
            uuid: *self.uuid.as_bytes(),
            label,
            epoch: U64::new(self.epoch.get()),
            incarnation: U64::new(self.incarnation),
            blocks: U64::new(self.layout.blocks().get()),
            group_shift: self.layout.group_shift(),
            shards: self.shard_count(),
            reserved_counts: [0; 6],
            hash_seed: self.hash_seed,
            group_digest: U64::new(self.group_digest),
            log_segments: log.segments.map(|start| U64::new(start.get())),
            log_blocks: U32::new(log.blocks),
            log_current: log.current,
            reserved: [0; 307],
            records,
            reserved_end: [0; 512],
        };
        raw.crc = U32::new(crc32c::crc32c(raw.as_bytes()));
        let mut block = Box::new([0; BLOCK_SIZE as usize]);
        block.copy_from_slice(raw.as_bytes());
        block
    }

    /// Checks a block and returns the superblock in it.
    ///
    /// # Errors
    /// See [`DecodeError`]. A short block is [`DecodeError::NoMagic`].
    pub fn decode(block: &[u8]) -> Result<Self, DecodeError> {
        let Ok(raw) = RawSuperblock::read_from_bytes(block) else { return Err(DecodeError::NoMagic) };
        if block.iter().all(|byte| *byte == 0) {
            return Err(DecodeError::Empty);
        }
        if raw.magic != MAGIC {
            return Err(DecodeError::NoMagic);
        }
        let stored = raw.crc.get();
        let computed = crc32c::crc32c(RawSuperblock { crc: U32::ZERO, ..raw }.as_bytes());
        if stored != computed {
            return Err(DecodeError::Checksum { stored, computed });
        }
        let generation = Generation::new(raw.generation.get());
        if raw.version.get() > FORMAT_VERSION {
            return Err(DecodeError::NewerVersion { version: raw.version.get(), generation });
        }
        let features = raw.incompatible.get() & !KNOWN_INCOMPATIBLE;
        if features != 0 {
            return Err(DecodeError::Features { features, generation });
        }
        let superblock = raw.check(generation)?;
        // A feature that may be ignored may have given reserved bytes a meaning.
        if superblock.compatible == 0
            && superblock.read_only_compatible == 0
            && superblock.encode()[..] != *block
        {
            return Err(DecodeError::Nonsense { what: "reserved bytes are in use".to_owned() });
        }
        Ok(superblock)
    }
}

impl RawSuperblock {
    fn check(&self, generation: Generation) -> Result<Superblock, DecodeError> {
        let nonsense = |what: &str| DecodeError::Nonsense { what: what.to_owned() };
        if self.version.get() == 0 {
            return Err(nonsense("format version 0"));
        }
        if self.shards == 0 || self.shards > MAX_SHARDS {
            return Err(nonsense("impossible number of shards"));
        }
        let layout = VolumeLayout::new(BlockCount::new(self.blocks.get()), self.group_shift)
            .map_err(|error: LayoutError| DecodeError::Nonsense { what: error.to_string() })?;
        let label_end = self.label.iter().position(|byte| *byte == 0).unwrap_or(MAX_LABEL_BYTES);
        let label =
            std::str::from_utf8(&self.label[..label_end]).map_err(|_| nonsense("label is not UTF-8"))?;
        let epoch = Epoch::new(self.epoch.get());
        let mut shards = Vec::with_capacity(usize::from(self.shards));
        for raw in &self.records[..usize::from(self.shards)] {
            shards.push(raw.check(&layout, epoch).ok_or_else(|| nonsense("impossible root of a tree"))?);
        }
        let log = self.check_log(&layout).ok_or_else(|| nonsense("impossible place of the log"))?;
        Ok(Superblock {
            compatible: self.compatible.get(),
            read_only_compatible: self.read_only_compatible.get(),
            uuid: Uuid::from_bytes(self.uuid),
            label: label.to_owned(),
            generation,
            epoch,
            incarnation: self.incarnation.get(),
            layout,
            hash_seed: self.hash_seed,
            group_digest: self.group_digest.get(),
            log,
            shards,
        })
    }
}

impl RawSuperblock {
    /// The log, if there is one; `None` if what is said of it cannot be.
    fn check_log(&self, layout: &VolumeLayout) -> Option<Option<LogArea>> {
        let area = LogArea {
            segments: self.log_segments.map(|start| BlockNr::new(start.get())),
            blocks: self.log_blocks.get(),
            current: self.log_current,
        };
        if area.segments == [BlockNr::new(0); 2] && area.blocks == 0 && area.current == 0 {
            return Some(None);
        }
        area.check(layout).map(Some)
    }
}

impl RawShard {
    fn check(&self, layout: &VolumeLayout, closed: Epoch) -> Option<ShardRecord> {
        let tree = TreeRoot {
            ptr: BlockPtr {
                address: BlockNr::new(self.block.get()),
                epoch: Epoch::new(self.epoch.get()),
                crc: self.crc.get(),
            },
            level: self.level,
        };
        let inside = layout.group_of(tree.ptr.address).is_some();
        let aligned = tree.ptr.address.get().is_multiple_of(CLUSTER_BLOCKS);
        (inside && aligned && tree.ptr.epoch <= closed && tree.level <= MAX_LEVEL).then_some(ShardRecord {
            tree,
            next_inode: self.next_inode.get(),
            inodes: self.inodes.get(),
        })
    }
}

impl From<&ShardRecord> for RawShard {
    fn from(shard: &ShardRecord) -> Self {
        Self {
            block: U64::new(shard.tree.ptr.address.get()),
            epoch: U64::new(shard.tree.ptr.epoch.get()),
            crc: U32::new(shard.tree.ptr.crc),
            level: shard.tree.level,
            reserved: [0; 3],
            reserved_log: U64::new(0),
            next_inode: U64::new(shard.next_inode),
            inodes: U64::new(shard.inodes),
        }
    }
}

/// Blocks of the slots that hold `generation`, one in each ring.
pub fn slots_of(generation: Generation) -> [BlockNr; 2] {
    RING_STARTS.map(|start| BlockNr::new(start.get() + generation.get() % RING_SLOTS))
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A superblock of a made-up volume of 64 MiB with two shards.
    pub(crate) fn example() -> Superblock {
        let layout = VolumeLayout::plan(BlockCount::new(16_384), 2).unwrap();
        let record = |block, crc| ShardRecord {
            tree: TreeRoot {
                ptr: BlockPtr { address: BlockNr::new(block), epoch: Epoch::new(6), crc },
                level: 1,
            },
            next_inode: 40,
            inodes: 17,
        };
        Superblock {
            compatible: 5,
            read_only_compatible: 0,
            uuid: Uuid::from_u128(0x0123_4567_89ab_cdef_0011_2233_4455_6677),
            label: "Zwilling".to_owned(),
            generation: Generation::new(9),
            epoch: Epoch::new(7),
            incarnation: 0xdead_beef,
            layout,
            hash_seed: [3; 16],
            group_digest: 0x55aa,
            log: None,
            shards: vec![record(64, 0xaaaa), record(520, 0xbbbb)],
        }
    }

    /// Stores the checksum that the block should have.
    pub(crate) fn fix_checksum(block: &mut [u8]) {
        block[8..12].fill(0);
        let crc = crc32c::crc32c(block);
        block[8..12].copy_from_slice(&crc.to_le_bytes());
    }

    #[test]
    fn superblock_survives_the_round_trip() {
        let superblock = example();
        assert_eq!(Superblock::decode(&*superblock.encode()), Ok(superblock.clone()));
        assert_eq!(superblock.slots(), [BlockNr::new(17), BlockNr::new(4161)]);
        assert_eq!(
            superblock.identity().volume,
            u64::from_be_bytes([0xef, 0xcd, 0xab, 0x89, 0x67, 0x45, 0x23, 1])
        );
    }

    #[test]
    fn golden_image_of_version_1_is_stable() {
        let block = example().encode();
        assert_eq!(&block[..8], b"POLLUXFS");
        assert_eq!(&block[12..24], [1, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&block[512..520], 64_u64.to_le_bytes());
        assert_eq!(crc32c::crc32c(&*block), GOLDEN_CRC);
    }

    /// Changes only together with [`FORMAT_VERSION`].
    const GOLDEN_CRC: u32 = 115_519_100;

    #[test]
    fn log_has_its_place_and_impossible_ones_are_refused() {
        let area = |first, second, blocks, current| LogArea {
            segments: [BlockNr::new(first), BlockNr::new(second)],
            blocks,
            current,
        };
        let with = |log| Superblock { log: Some(log), ..example() };
        let good = with(area(600, 700, 16, 1));
        assert_eq!(Superblock::decode(&*good.encode()), Ok(good.clone()));
        assert_eq!(&good.encode()[184..192], 600_u64.to_le_bytes());
        assert_eq!(good.log.unwrap().head(), BlockNr::new(700));
        assert_eq!(good.log.unwrap().switched().head(), BlockNr::new(600));
        for bad in [
            area(600, 700, 0, 0),
            area(600, 1200, 257, 0),
            area(600, 700, 16, 2),
            area(600, 615, 16, 0),
            area(600, u64::MAX, 16, 0),
            area(16_380, 700, 16, 0),
            area(1020, 700, 16, 0),
        ] {
            let decoded = Superblock::decode(&*with(bad).encode());
            assert!(matches!(decoded, Err(DecodeError::Nonsense { .. })), "{bad:?}: {decoded:?}");
        }
    }

    #[test]
    fn newer_version_is_told_from_damage() {
        let mut block = example().encode();
        block[12] = 2;
        assert!(matches!(Superblock::decode(&*block), Err(DecodeError::Checksum { .. })));
        fix_checksum(&mut *block);
        let generation = Generation::new(9);
        assert_eq!(Superblock::decode(&*block), Err(DecodeError::NewerVersion { version: 2, generation }));
    }

    #[test]
    fn unknown_incompatible_feature_is_refused_and_read_only_one_is_flagged() {
        let mut block = example().encode();
        block[40] = 4;
        fix_checksum(&mut *block);
        let generation = Generation::new(9);
        assert_eq!(Superblock::decode(&*block), Err(DecodeError::Features { features: 4, generation }));
        let mut block = example().encode();
        block[32] = 1;
        fix_checksum(&mut *block);
        assert!(Superblock::decode(&*block).unwrap().must_be_read_only());
        assert!(!example().must_be_read_only());
    }

    #[test]
    fn reserved_bytes_in_use_are_refused_unless_a_feature_may_use_them() {
        let plain = Superblock { compatible: 0, ..example() };
        // Behind the counts, the log, the label's end and a shard's level; a shard's log; a shard that is not there; the end.
        for reserved in [155, 205, 511, 64 + 20, 512 + 21, 512 + 24, 512 + 2 * 48, 3583, 3584, 4095] {
            let mut block = plain.encode();
            block[reserved] = 1;
            fix_checksum(&mut *block);
            let decoded = Superblock::decode(&*block);
            assert!(matches!(decoded, Err(DecodeError::Nonsense { .. })), "byte {reserved}: {decoded:?}");
            block[24] = 1;
            fix_checksum(&mut *block);
            assert!(
                Superblock::decode(&*block).is_ok(),
                "byte {reserved} may belong to a compatible feature"
            );
        }
    }

    #[test]
    fn blank_and_foreign_blocks_are_told_apart() {
        assert_eq!(Superblock::decode(&[0; 4096]), Err(DecodeError::Empty));
        assert_eq!(Superblock::decode(&[1; 4096]), Err(DecodeError::NoMagic));
        assert_eq!(Superblock::decode(&[]), Err(DecodeError::NoMagic));
    }

    proptest! {
        #[test]
        fn any_changed_bit_is_noticed(bit in 0_usize..4096 * 8) {
            let mut block = example().encode();
            block[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Superblock::decode(&*block).is_err());
        }

        #[test]
        fn forged_fields_never_describe_an_impossible_volume(
            edits in proptest::collection::vec((16_usize..3584, any::<u8>()), 1..12),
        ) {
            let mut block = example().encode();
            for (offset, byte) in edits {
                block[offset] = byte;
            }
            fix_checksum(&mut *block);
            if let Ok(superblock) = Superblock::decode(&*block) {
                prop_assert!(superblock.layout.blocks().get() <= crate::format::group::MAX_VOLUME_BLOCKS);
                prop_assert!((1..=64).contains(&superblock.shard_count()));
                for shard in &superblock.shards {
                    prop_assert!(shard.tree.ptr.address.get() < superblock.layout.blocks().get());
                }
            }
        }
    }
}
