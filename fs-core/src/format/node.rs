//! Tree nodes as stored: keys, items, child pointers, and the check that every node passes before it is used.
//!
//! Owns: the wire structures of a node of [`NODE_SIZE`] bytes, [`Key`] and [`BlockPtr`], [`check`] (raw image → typed
//! error or [`CheckedNode`]) and the two encoders.
//!
//! A node is a header, then either a *leaf* (level 0: a table of slots growing up, values growing down from the end)
//! or an *inner* node (a table of entries: key and child pointer). The parent knows its child's address, epoch and
//! CRC32C; the checksum inside the parent and not inside the child is what finds lost, stale and misdirected writes.
//!
//! Invariants of a checked node:
//! - checksum, magic, volume, shard, address, epoch and level are those its parent expects;
//! - keys rise strictly and lie in the bounds that the parent gives;
//! - a leaf's values lie end to end in the order of their keys, from the last byte of the node downwards; all that is
//!   neither header, table nor value is zero. So an image is a function of its contents, and no deleted byte leaks;
//! - an inner node has at least one child; the key of its first is zero, for that child begins where the node does;
//! - no child is newer than its parent.
//!
//! *Legal crash outcomes*: a node is written before the superblock that reaches it and never again in place, so a torn
//! node is unreachable; a reachable node that fails its check is damage.
//!
//! Excludes: what items mean, residency, change (see [`crate::tree`]); whether an address lies on the device (whoever
//! reads it finds out).

use std::fmt;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::types::{BLOCK_SIZE, BlockNr, Epoch, ShardId};

/// Blocks of a node, contiguous on the device.
pub const NODE_BLOCKS: u64 = 4;

/// Bytes of a node.
pub const NODE_SIZE: usize = (NODE_BLOCKS * BLOCK_SIZE) as usize;

/// Bytes of a node's header.
pub const HEADER_SIZE: usize = 64;

/// Bytes of a leaf's slot.
pub const SLOT_SIZE: usize = size_of::<RawSlot>();

/// Bytes of an inner node's entry.
pub const ENTRY_SIZE: usize = size_of::<RawEntry>();

/// Bytes that the slots and values of a leaf share.
pub const LEAF_CAPACITY: usize = NODE_SIZE - HEADER_SIZE;

/// Children that an inner node can have.
pub const INNER_CAPACITY: usize = (NODE_SIZE - HEADER_SIZE) / ENTRY_SIZE;

/// Bytes of the largest value.
///
/// A full leaf and one more item always split into two leaves: some cut leaves at most half of everything plus half
/// an item on its larger side, `(LEAF_CAPACITY + i) / 2 + i / 2` for the largest item `i`, so any `i` up to half of
/// the capacity would do. A third keeps three of the largest items in one leaf.
pub const MAX_VALUE: usize = 5120;

/// Highest level of a node; leaves have level 0.
///
/// A tree grows a level when its root has more than [`INNER_CAPACITY`] children, of which each came out of a split of
/// a full node: more than 150^level changes, so level 11 is out of reach of 2⁶⁴ changes.
pub const MAX_LEVEL: u8 = 11;

/// First four bytes of a node.
pub const NODE_MAGIC: [u8; 4] = *b"PlxN";

/// Version of this layout.
pub const NODE_VERSION: u16 = 1;

/// The bytes of a node as stored.
pub type NodeImage = [u8; NODE_SIZE];

/// A node's image of zeroes, on the heap.
pub fn zeroed_image() -> Box<NodeImage> {
    vec![0; NODE_SIZE].into_boxed_slice().try_into().expect("the slice has an image's length")
}

/// What an item is: the second part of its key. The tree knows no kind in particular.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ItemKind(u8);

impl ItemKind {
    /// The kind with this number.
    pub const fn new(value: u8) -> Self {
        Self(value)
    }

    /// The kind's number.
    pub const fn get(self) -> u8 {
        self.0
    }
}

impl fmt::Display for ItemKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The key of an item. Keys are ordered by object, then kind, then offset, then minor number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Whose item: an inode, a group, an intent.
    pub object: u64,
    /// What kind of item.
    pub kind: ItemKind,
    /// Position within the kind: a file offset, a block number, a hash.
    pub offset: u64,
    /// Tells items of the same offset apart: the snapshot, or the owner's offset in a back-reference.
    pub minor: u64,
}

impl Key {
    /// The smallest key.
    pub const MIN: Self = Self::new(0, ItemKind::new(0), 0, 0);

    /// The largest key.
    pub const MAX: Self = Self::new(u64::MAX, ItemKind::new(u8::MAX), u64::MAX, u64::MAX);

    /// A key of these parts.
    pub const fn new(object: u64, kind: ItemKind, offset: u64, minor: u64) -> Self {
        Self { object, kind, offset, minor }
    }

    /// The next larger key; `None` after [`Key::MAX`].
    pub const fn successor(&self) -> Option<Self> {
        let Self { object, kind, offset, minor } = *self;
        if minor < u64::MAX {
            return Some(Self::new(object, kind, offset, minor + 1));
        }
        if offset < u64::MAX {
            return Some(Self::new(object, kind, offset + 1, 0));
        }
        if kind.get() < u8::MAX {
            return Some(Self::new(object, ItemKind::new(kind.get() + 1), 0, 0));
        }
        if object < u64::MAX {
            return Some(Self::new(object + 1, ItemKind::new(0), 0, 0));
        }
        None
    }

    /// The next smaller key; `None` before [`Key::MIN`].
    pub const fn predecessor(&self) -> Option<Self> {
        let Self { object, kind, offset, minor } = *self;
        if minor > 0 {
            return Some(Self::new(object, kind, offset, minor - 1));
        }
        if offset > 0 {
            return Some(Self::new(object, kind, offset - 1, u64::MAX));
        }
        if kind.get() > 0 {
            return Some(Self::new(object, ItemKind::new(kind.get() - 1), u64::MAX, u64::MAX));
        }
        if object > 0 {
            return Some(Self::new(object - 1, ItemKind::new(u8::MAX), u64::MAX, u64::MAX));
        }
        None
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "({} {} {} {})", self.object, self.kind, self.offset, self.minor)
    }
}

/// The keys that a node may hold: `low ..` or `low .. high`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyBounds {
    /// The smallest key allowed.
    pub low: Key,
    /// The smallest key above `low` that is no longer allowed; `None` if there is no end.
    pub high: Option<Key>,
}

impl KeyBounds {
    /// Every key.
    pub const ALL: Self = Self { low: Key::MIN, high: None };

    /// Whether `key` lies within.
    pub fn contains(&self, key: &Key) -> bool {
        *key >= self.low && self.high.is_none_or(|high| *key < high)
    }
}

/// A pointer to a node: where it lies and what it must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockPtr {
    /// First of the node's [`NODE_BLOCKS`] blocks.
    pub address: BlockNr,
    /// Epoch of the node's last change.
    pub epoch: Epoch,
    /// CRC32C of the node's image.
    pub crc: u32,
}

/// What a node belongs to: stored in every node, so that a block of another volume or shard is not taken for ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TreeIdentity {
    /// First eight bytes of the volume's UUID, read as little-endian.
    pub volume: u64,
    /// The shard whose tree it is.
    pub shard: ShardId,
}

/// All that is known of a node before it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Volume and shard.
    pub identity: TreeIdentity,
    /// What the parent (or the superblock) says.
    pub ptr: BlockPtr,
    /// Level: 0 for leaves.
    pub level: u8,
    /// Keys it may hold.
    pub bounds: KeyBounds,
}

/// What is wrong with a node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NodeError {
    /// The image is not the one that the parent points to.
    #[error("node checksum is {found:#010x}, expected {expected:#010x}")]
    Checksum {
        /// CRC32C in the parent.
        expected: u32,
        /// CRC32C of the image.
        found: u32,
    },
    /// Not a node.
    #[error("no tree node: magic {found:02x?}")]
    Magic {
        /// The first bytes.
        found: [u8; 4],
    },
    /// A layout that this program does not know.
    #[error("node layout version {found} is not supported")]
    Version {
        /// The version stored.
        found: u16,
    },
    /// A node of another volume.
    #[error("node belongs to another volume")]
    Volume,
    /// A node of another shard.
    #[error("node belongs to shard {found}, expected {expected}")]
    Shard {
        /// The tree's shard.
        expected: ShardId,
        /// The shard stored.
        found: u8,
    },
    /// A node that belongs elsewhere.
    #[error("node says it lies at block {found}, was read at {expected}")]
    Address {
        /// Where it was read.
        expected: BlockNr,
        /// The address stored.
        found: BlockNr,
    },
    /// An older or newer node of the same place.
    #[error("node of epoch {found}, expected {expected}")]
    Epoch {
        /// Epoch in the parent.
        expected: Epoch,
        /// The epoch stored.
        found: Epoch,
    },
    /// A node of another level, or a level that no tree can have.
    #[error("node of level {found}, expected {expected}")]
    Level {
        /// One less than the parent's.
        expected: u8,
        /// The level stored.
        found: u8,
    },
    /// More items than fit, or an inner node without children.
    #[error("item count {found} is impossible")]
    Count {
        /// The count stored.
        found: usize,
    },
    /// Keys do not rise, or the first of an inner node is not zero.
    #[error("key {index} is out of order")]
    Order {
        /// Index of the later key.
        index: usize,
    },
    /// A key outside of what the parent allows.
    #[error("key {index} is outside the node's bounds")]
    Bounds {
        /// Index of the key.
        index: usize,
    },
    /// A value that does not lie where it must.
    #[error("value {index} is misplaced or too long")]
    Value {
        /// Index of the item.
        index: usize,
    },
    /// A child at block 0, or newer than its parent.
    #[error("child pointer {index} is impossible")]
    Child {
        /// Index of the entry.
        index: usize,
    },
    /// Bytes that must be zero are not.
    #[error("reserved bytes are not zero")]
    Reserved,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    version: U16,
    level: u8,
    shard: u8,
    volume: U64,
    address: U64,
    epoch: U64,
    count: U16,
    reserved: [u8; 30],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawKey {
    object: U64,
    offset: U64,
    minor: U64,
    kind: u8,
    reserved: [u8; 3],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawSlot {
    pub(crate) key: RawKey,
    pub(crate) value_start: U16,
    pub(crate) value_length: U16,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEntry {
    key: RawKey,
    crc: U32,
    address: U64,
    epoch: U64,
}

const _: () = {
    assert!(size_of::<RawHeader>() == HEADER_SIZE);
    assert!(size_of::<RawKey>() == 28);
    assert!(SLOT_SIZE == 32);
    assert!(ENTRY_SIZE == 48);
    assert!(INNER_CAPACITY == 340);
    assert!(NODE_SIZE <= u16::MAX as usize);
    assert!(3 * (SLOT_SIZE + MAX_VALUE) <= LEAF_CAPACITY);
};

impl RawKey {
    pub(crate) fn new(key: &Key) -> Self {
        Self {
            object: key.object.into(),
            offset: key.offset.into(),
            minor: key.minor.into(),
            kind: key.kind.get(),
            reserved: [0; 3],
        }
    }

    #[inline]
    pub(crate) fn get(&self) -> Key {
        Key::new(self.object.get(), ItemKind::new(self.kind), self.offset.get(), self.minor.get())
    }
}

impl RawSlot {
    pub(crate) fn new(key: &Key, start: usize, length: usize) -> Self {
        let narrow = |value: usize| U16::new(u16::try_from(value).expect("positions in a node fit 16 bits"));
        Self { key: RawKey::new(key), value_start: narrow(start), value_length: narrow(length) }
    }

    #[inline]
    pub(crate) fn start(&self) -> usize {
        usize::from(self.value_start.get())
    }

    #[inline]
    pub(crate) fn length(&self) -> usize {
        usize::from(self.value_length.get())
    }
}

/// A node's image that has passed [`check`].
#[derive(Clone, Copy)]
pub struct CheckedNode<'image> {
    image: &'image NodeImage,
    expected: Expected,
    count: usize,
}

/// Checks a node's image against what its parent says of it.
///
/// # Errors
/// One variant per kind of damage, the first one found.
pub fn check<'image>(
    image: &'image NodeImage,
    expected: &Expected,
) -> Result<CheckedNode<'image>, NodeError> {
    let found = crc32c::crc32c(image);
    if found != expected.ptr.crc {
        return Err(NodeError::Checksum { expected: expected.ptr.crc, found });
    }
    let header = RawHeader::ref_from_bytes(&image[..HEADER_SIZE]).expect("a header's bytes");
    check_header(header, expected)?;
    let count = usize::from(header.count.get());
    if expected.level == 0 {
        check_leaf(image, count, expected)?;
    } else {
        check_inner(image, count, expected)?;
    }
    Ok(CheckedNode { image, expected: *expected, count })
}

fn check_header(header: &RawHeader, expected: &Expected) -> Result<(), NodeError> {
    if header.magic != NODE_MAGIC {
        return Err(NodeError::Magic { found: header.magic });
    }
    if header.version.get() != NODE_VERSION {
        return Err(NodeError::Version { found: header.version.get() });
    }
    if header.volume.get() != expected.identity.volume {
        return Err(NodeError::Volume);
    }
    let shard = expected.identity.shard;
    if header.shard != shard.get() {
        return Err(NodeError::Shard { expected: shard, found: header.shard });
    }
    let address = BlockNr::new(header.address.get());
    if address != expected.ptr.address {
        return Err(NodeError::Address { expected: expected.ptr.address, found: address });
    }
    let epoch = Epoch::new(header.epoch.get());
    if epoch != expected.ptr.epoch {
        return Err(NodeError::Epoch { expected: expected.ptr.epoch, found: epoch });
    }
    if header.level != expected.level || header.level > MAX_LEVEL {
        return Err(NodeError::Level { expected: expected.level, found: header.level });
    }
    if header.reserved != [0; 30] {
        return Err(NodeError::Reserved);
    }
    Ok(())
}

/// Checks that a key rises, lies within bounds and has zero reserved bytes.
fn check_key(
    index: usize,
    raw: &RawKey,
    previous: &mut Option<Key>,
    bounds: &KeyBounds,
) -> Result<(), NodeError> {
    let key = raw.get();
    if raw.reserved != [0; 3] {
        return Err(NodeError::Reserved);
    }
    if previous.is_some_and(|previous| key <= previous) {
        return Err(NodeError::Order { index });
    }
    if !bounds.contains(&key) {
        return Err(NodeError::Bounds { index });
    }
    *previous = Some(key);
    Ok(())
}

fn check_leaf(image: &NodeImage, count: usize, expected: &Expected) -> Result<(), NodeError> {
    let table_end = HEADER_SIZE + count * SLOT_SIZE;
    if table_end > NODE_SIZE {
        return Err(NodeError::Count { found: count });
    }
    let mut previous = None;
    let mut end = NODE_SIZE;
    for (index, slot) in slots(image, count).iter().enumerate() {
        check_key(index, &slot.key, &mut previous, &expected.bounds)?;
        let (start, length) = (slot.start(), slot.length());
        if length > MAX_VALUE || start < table_end || start + length != end {
            return Err(NodeError::Value { index });
        }
        end = start;
    }
    check_zero(&image[table_end..end])
}

fn check_inner(image: &NodeImage, count: usize, expected: &Expected) -> Result<(), NodeError> {
    if count == 0 || count > INNER_CAPACITY {
        return Err(NodeError::Count { found: count });
    }
    let mut previous = None;
    for (index, entry) in entries(image, count).iter().enumerate() {
        if index == 0 {
            if entry.key.as_bytes() != [0; size_of::<RawKey>()] {
                return Err(NodeError::Order { index });
            }
            previous = Some(expected.bounds.low);
        } else {
            check_key(index, &entry.key, &mut previous, &expected.bounds)?;
        }
        if entry.address.get() == 0 || entry.epoch.get() > expected.ptr.epoch.get() {
            return Err(NodeError::Child { index });
        }
    }
    check_zero(&image[HEADER_SIZE + count * ENTRY_SIZE..])
}

fn check_zero(bytes: &[u8]) -> Result<(), NodeError> {
    if bytes.iter().all(|byte| *byte == 0) { Ok(()) } else { Err(NodeError::Reserved) }
}

/// The first `count` slots of a leaf's image, which must have room for them.
#[inline]
pub(crate) fn slots(image: &NodeImage, count: usize) -> &[RawSlot] {
    <[RawSlot]>::ref_from_bytes(&image[HEADER_SIZE..HEADER_SIZE + count * SLOT_SIZE])
        .expect("a multiple of a slot's size")
}

fn entries(image: &NodeImage, count: usize) -> &[RawEntry] {
    <[RawEntry]>::ref_from_bytes(&image[HEADER_SIZE..HEADER_SIZE + count * ENTRY_SIZE])
        .expect("a multiple of an entry's size")
}

impl<'image> CheckedNode<'image> {
    /// Level: 0 for leaves.
    pub fn level(&self) -> u8 {
        self.expected.level
    }

    /// Items of a leaf, or children of an inner node.
    pub fn count(&self) -> usize {
        self.count
    }

    /// What was known of the node before it was read.
    pub fn expected(&self) -> &Expected {
        &self.expected
    }

    /// The items of a leaf in key order; nothing for an inner node.
    pub fn items(&self) -> impl Iterator<Item = (Key, &'image [u8])> + use<'image> {
        let image = self.image;
        let count = if self.expected.level == 0 { self.count } else { 0 };
        slots(image, count)
            .iter()
            .map(move |slot| (slot.key.get(), &image[slot.start()..slot.start() + slot.length()]))
    }

    /// The entries of an inner node in key order; nothing for a leaf. The key of an entry is the smallest that its
    /// child may hold, except for the first: its key is [`Key::MIN`], its child begins where the node does.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = (Key, BlockPtr)> + use<'image> {
        let count = if self.expected.level == 0 { 0 } else { self.count };
        entries(self.image, count).iter().map(|entry| {
            let ptr = BlockPtr {
                address: BlockNr::new(entry.address.get()),
                epoch: Epoch::new(entry.epoch.get()),
                crc: entry.crc.get(),
            };
            (entry.key.get(), ptr)
        })
    }

    /// What to expect of each child of an inner node, in key order; nothing for a leaf.
    pub fn children(&self) -> impl Iterator<Item = Expected> + use<'image> {
        let parent = self.expected;
        let mut entries = self.entries().peekable();
        let mut low = Some(parent.bounds.low);
        std::iter::from_fn(move || {
            let (key, ptr) = entries.next()?;
            let high = entries.peek().map_or(parent.bounds.high, |(key, _)| Some(*key));
            let bounds = KeyBounds { low: low.take().unwrap_or(key), high };
            Some(Expected { ptr, level: parent.level - 1, bounds, ..parent })
        })
    }
}

/// What a node's header says beside its contents.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// Volume and shard.
    pub identity: TreeIdentity,
    /// First of its blocks.
    pub address: BlockNr,
    /// Epoch of its last change.
    pub epoch: Epoch,
}

fn write_header(image: &mut NodeImage, header: &Header, level: u8, count: usize) {
    let raw = RawHeader {
        magic: NODE_MAGIC,
        version: NODE_VERSION.into(),
        level,
        shard: header.identity.shard.get(),
        volume: header.identity.volume.into(),
        address: header.address.get().into(),
        epoch: header.epoch.get().into(),
        count: u16::try_from(count).expect("a node holds fewer than 2¹⁶ items").into(),
        reserved: [0; 30],
    };
    image[..HEADER_SIZE].copy_from_slice(raw.as_bytes());
}

/// The image of a leaf with these items, which must be in order and fit.
///
/// # Panics
/// If they do not fit.
pub fn encode_leaf<'item>(
    header: &Header,
    items: impl Iterator<Item = (Key, &'item [u8])>,
) -> Box<NodeImage> {
    let mut image = zeroed_image();
    let (mut table_end, mut start, mut count) = (HEADER_SIZE, NODE_SIZE, 0);
    for (key, value) in items {
        start -= value.len();
        image[start..start + value.len()].copy_from_slice(value);
        let slot = RawSlot::new(&key, start, value.len());
        image[table_end..table_end + SLOT_SIZE].copy_from_slice(slot.as_bytes());
        table_end += SLOT_SIZE;
        count += 1;
    }
    assert!(table_end <= start, "a leaf's items fit its node");
    write_header(&mut image, header, 0, count);
    image
}

/// The image of an inner node with these entries, which must be in order and fit.
///
/// # Panics
/// If they do not fit.
pub fn encode_inner(
    header: &Header,
    level: u8,
    entries: impl Iterator<Item = (Key, BlockPtr)>,
) -> Box<NodeImage> {
    let mut image = zeroed_image();
    let (mut end, mut count) = (HEADER_SIZE, 0);
    for (key, ptr) in entries {
        let entry = RawEntry {
            key: RawKey::new(&key),
            crc: ptr.crc.into(),
            address: ptr.address.get().into(),
            epoch: ptr.epoch.get().into(),
        };
        image[end..end + ENTRY_SIZE].copy_from_slice(entry.as_bytes());
        end += ENTRY_SIZE;
        count += 1;
    }
    write_header(&mut image, header, level, count);
    image
}
