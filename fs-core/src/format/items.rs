//! On-disk form of the namespace's items: inodes, symbolic links, extended attributes, directory entries, intents.
//!
//! Owns: for each item the raw record as it lies in the tree and the checked type that the rest of the crate works
//! with, the keys under which they lie, and the conversions in both directions.
//!
//! | item | key (object, kind, offset, minor) | value |
//! |---|---|---|
//! | intent | 0, [`INTENT`], inode, intent's code | [`RawIntent`] |
//! | inode | inode, [`INODE`], 0, 0 | [`RawInode`] |
//! | symbolic link | inode, [`SYMLINK`], 0, 0 | the target's bytes |
//! | attribute | inode, [`XATTR`], hash of the name, 0 | one [`RawXattr`] with name and value for each name of that hash |
//! | entry by name | directory, [`DIR_HASH`], hash of the name, 0 | one [`RawHashEntry`] with its name for each name of that hash |
//! | entry by sequence | directory, [`DIR_SEQ`], sequence, 0 | [`RawSequenceEntry`] with its name |
//!
//! Invariants (checked by `fsck`, relied upon nowhere without a check):
//! - the two items of a directory entry agree; the inode's `entries` counts them and its `size` is the sum of their
//!   names' lengths; every sequence is below the inode's `next_sequence` and at least [`FIRST_SEQUENCE`];
//! - a directory's link count is 2 + its subdirectories, or 0 once it is removed; any other inode's is its number of
//!   entries in all directories of all shards;
//! - a link count is 0 exactly if there is an intent `Intent::Orphan` for the inode;
//! - `xattr_names` is the sum of the lengths of the attributes' names, each with one byte for the NUL of a listing;
//! - reserved bytes are zero.
//!
//! Every byte is input: decoding never panics and never allocates more than the value's own length.
//!
//! # Legal crash outcomes
//! Items change in transactions only, so all of the above holds in every state that a crash can leave.
//!
//! Excludes: extents and runs (`format/extent.rs`), the node that holds the items.

use reactor::WallTime;
use zerocopy::byteorder::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::MAX_FILE_SIZE;
use crate::error::FsError;
use crate::format::node::{ItemKind, Key, MAX_VALUE};
use crate::request::FileKind;
use crate::types::{BLOCK_SIZE, Generation, InodeNr};

/// Kind of an intent: an operation that takes several transactions and is finished after a crash.
pub const INTENT: ItemKind = ItemKind::new(0x08);
/// Kind of an inode.
pub const INODE: ItemKind = ItemKind::new(0x10);
/// Kind of a symbolic link's target.
pub const SYMLINK: ItemKind = ItemKind::new(0x14);
/// Kind of an extended attribute.
pub const XATTR: ItemKind = ItemKind::new(0x18);
/// Kind of a directory entry found by its name.
pub const DIR_HASH: ItemKind = ItemKind::new(0x20);
/// Kind of a directory entry found by its sequence number.
pub const DIR_SEQ: ItemKind = ItemKind::new(0x24);

/// Longest name of an entry or attribute, in bytes.
pub const MAX_NAME: usize = 255;
/// Longest target of a symbolic link, in bytes.
pub const MAX_SYMLINK: usize = 4095;
/// Longest value of an extended attribute, in bytes.
pub const MAX_XATTR_VALUE: usize = 4000;
/// Sum of the lengths of an inode's attribute names, NULs included: what `listxattr(2)` can return.
pub const MAX_XATTR_NAMES: u32 = 65_536;
/// Most bytes of the entries that share one hash. More are refused; it takes a dozen names whose keyed 64-bit hashes
/// are equal to get there.
pub const MAX_CHAIN: usize = MAX_VALUE;
/// Sequence of a directory's first entry; `.` and `..` have the cookies 1 and 2.
pub const FIRST_SEQUENCE: u64 = 3;

/// What is wrong with an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ItemError {
    /// Too short or too long for its kind.
    #[error("wrong length")]
    Length,
    /// The mode names no kind of inode.
    #[error("unknown kind of inode")]
    FileKind,
    /// A name is empty, too long, or holds a byte that no name may hold.
    #[error("impossible name")]
    Name,
    /// A time stamp's nanoseconds reach a second.
    #[error("impossible time stamp")]
    Time,
    /// A size that no file can have, or a count that no volume has room for.
    #[error("impossible size or count")]
    Number,
    /// Reserved bytes are not zero.
    #[error("reserved bytes are not zero")]
    Reserved,
    /// An unknown code.
    #[error("unknown intent")]
    Intent,
    /// The chain of names with one hash names one twice, or is empty.
    #[error("impossible chain of names")]
    Chain,
}

impl ItemError {
    /// The error a program sees.
    pub(crate) fn of(self, what: &'static str, inode: InodeNr) -> FsError {
        FsError::Damaged { what: format!("{what}: {self}"), block: None, inode: Some(inode) }
    }
}

/// Blocks of a file, or entries of a directory, at most: blocks of the largest file.
const MOST: u64 = MAX_FILE_SIZE / BLOCK_SIZE;

/// A time stamp: seconds since 1970 and nanoseconds.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawTime {
    /// Seconds, negative before 1970.
    pub seconds: I64,
    /// Nanoseconds, below 10⁹.
    pub nanoseconds: U32,
}

/// An inode as it is stored.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawInode {
    /// Kind and permissions, as `st_mode`.
    pub mode: U32,
    /// Owner.
    pub uid: U32,
    /// Group.
    pub gid: U32,
    /// Links.
    pub links: U32,
    /// Device number.
    pub device: U32,
    /// Sum of the lengths of the attributes' names, NULs included.
    pub xattr_names: U32,
    /// Bytes.
    pub size: U64,
    /// Blocks of 4 KiB that the extents cover.
    pub blocks: U64,
    /// Distinguishes uses of the inode number.
    pub generation: U64,
    /// Last access.
    pub accessed: RawTime,
    /// Last change of the contents.
    pub modified: RawTime,
    /// Last change of the inode.
    pub changed: RawTime,
    /// Birth.
    pub created: RawTime,
    /// Directories: the directory that holds it.
    pub parent: U64,
    /// Directories: sequence of the next entry.
    pub next_sequence: U64,
    /// Directories: entries.
    pub entries: U64,
    /// Zero.
    pub reserved: [u8; 16],
}

/// An intent as it is stored.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawIntent {
    /// 1: `Intent::Orphan`, 2: `Intent::Truncate`, 3: `Intent::Clone`, 4: `Intent::DropReplaced`, 5: `Intent::Collapse`,
    /// 6: `Intent::Insert`; as the key's minor.
    pub code: u8,
    /// Zero.
    pub reserved: [u8; 7],
    /// Truncate: the size in bytes. Clone: first byte of what is replaced. Collapse, Insert: first byte of the range. Zero otherwise.
    pub argument: U64,
    /// Clone: end of what is replaced so far. Collapse, Insert: bytes of the range. Zero otherwise.
    pub end: U64,
}

/// The rest of a stored `Intent::Collapse` or `Intent::Insert`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawShift {
    /// As of every intent.
    pub head: RawIntent,
    /// Old place, in bytes, of what is moved next: everything before it (Collapse), or from it on (Insert), has moved.
    pub reached: U64,
}

/// Head of an attribute; name and value follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawXattr {
    /// Bytes of the name.
    pub name_length: u8,
    /// Zero.
    pub reserved: u8,
    /// Bytes of the value.
    pub value_length: U16,
}

/// Head of a directory entry found by name; the name follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawHashEntry {
    /// Sequence of the entry.
    pub sequence: U64,
    /// Inode.
    pub inode: U64,
    /// Kind of the inode: the upper four bits of its mode.
    pub kind: u8,
    /// Bytes of the name.
    pub name_length: u8,
}

/// Head of a directory entry found by sequence; the name is the rest of the value.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawSequenceEntry {
    /// Inode.
    pub inode: U64,
    /// Kind of the inode: the upper four bits of its mode.
    pub kind: u8,
}

const _: () =
    assert!(size_of::<RawXattr>() + MAX_NAME + MAX_XATTR_VALUE <= MAX_CHAIN && MAX_SYMLINK <= MAX_VALUE);
const _: () = assert!(size_of::<RawTime>() == 12);
const _: () = assert!(size_of::<RawInode>() == 136 && std::mem::offset_of!(RawInode, accessed) == 48);
const _: () =
    assert!(std::mem::offset_of!(RawInode, parent) == 96 && std::mem::offset_of!(RawInode, reserved) == 120);
const _: () = assert!(size_of::<RawIntent>() == 24 && size_of::<RawShift>() == 32);
const _: () = assert!(size_of::<RawXattr>() == 4);
const _: () = assert!(size_of::<RawHashEntry>() == 18 && size_of::<RawSequenceEntry>() == 9);

/// Bits of a mode below the kind.
const PERMISSIONS: u32 = 0o7777;

/// The stored code of a kind: the upper four bits of `st_mode`.
pub(crate) const fn kind_code(kind: FileKind) -> u8 {
    match kind {
        FileKind::Fifo => 1,
        FileKind::CharDevice => 2,
        FileKind::Directory => 4,
        FileKind::BlockDevice => 6,
        FileKind::Regular => 8,
        FileKind::Symlink => 10,
        FileKind::Socket => 12,
    }
}

fn kind_from_code(code: u32) -> Result<FileKind, ItemError> {
    Ok(match code {
        1 => FileKind::Fifo,
        2 => FileKind::CharDevice,
        4 => FileKind::Directory,
        6 => FileKind::BlockDevice,
        8 => FileKind::Regular,
        10 => FileKind::Symlink,
        12 => FileKind::Socket,
        _ => return Err(ItemError::FileKind),
    })
}

/// Whether `name` can be the name of a directory entry.
pub(crate) fn is_entry_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME
        && name != b"."
        && name != b".."
        && !name.iter().any(|byte| *byte == 0 || *byte == b'/')
}

/// Key of an inode's record.
pub(crate) fn inode_key(inode: InodeNr) -> Key {
    Key::new(inode.get(), INODE, 0, 0)
}

/// Key of a symbolic link's target.
pub(crate) fn symlink_key(inode: InodeNr) -> Key {
    Key::new(inode.get(), SYMLINK, 0, 0)
}

/// Key of the attributes whose names have this hash.
pub(crate) fn xattr_key(inode: InodeNr, hash: u64) -> Key {
    Key::new(inode.get(), XATTR, hash, 0)
}

/// Key of the entries whose names have this hash.
pub(crate) fn hash_key(directory: InodeNr, hash: u64) -> Key {
    Key::new(directory.get(), DIR_HASH, hash, 0)
}

/// Key of the entry with this sequence.
pub(crate) fn sequence_key(directory: InodeNr, sequence: u64) -> Key {
    Key::new(directory.get(), DIR_SEQ, sequence, 0)
}

/// Key of an intent of an inode.
pub(crate) fn intent_key(inode: InodeNr, intent: Intent) -> Key {
    Key::new(0, INTENT, inode.get(), u64::from(intent.code()))
}

/// An inode's record, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InodeRecord {
    /// Kind.
    pub(crate) kind: FileKind,
    /// Lower 12 bits of the mode.
    pub(crate) permissions: u16,
    /// Owner.
    pub(crate) uid: u32,
    /// Group.
    pub(crate) gid: u32,
    /// Links.
    pub(crate) links: u32,
    /// Device number.
    pub(crate) device: u32,
    /// Sum of the lengths of the attributes' names, NULs included.
    pub(crate) xattr_names: u32,
    /// Bytes; for a regular file those on the device.
    pub(crate) size: u64,
    /// Blocks of 4 KiB that the extents cover.
    pub(crate) blocks: u64,
    /// Distinguishes uses of the inode number.
    pub(crate) generation: Generation,
    /// Last access.
    pub(crate) accessed: WallTime,
    /// Last change of the contents.
    pub(crate) modified: WallTime,
    /// Last change of the inode.
    pub(crate) changed: WallTime,
    /// Birth.
    pub(crate) created: WallTime,
    /// Directories: the directory that holds it; itself for the root.
    pub(crate) parent: InodeNr,
    /// Directories: sequence of the next entry.
    pub(crate) next_sequence: u64,
    /// Directories: entries.
    pub(crate) entries: u64,
}

impl InodeRecord {
    /// A new inode without contents, with one link (a directory: two).
    pub(crate) fn new(kind: FileKind, permissions: u16, uid: u32, gid: u32, now: WallTime) -> Self {
        let links = if kind == FileKind::Directory { 2 } else { 1 };
        Self {
            kind,
            permissions: permissions & 0o7777,
            uid,
            gid,
            links,
            device: 0,
            xattr_names: 0,
            size: 0,
            blocks: 0,
            generation: Generation::new(1),
            accessed: now,
            modified: now,
            changed: now,
            created: now,
            parent: InodeNr::new(0),
            next_sequence: FIRST_SEQUENCE,
            entries: 0,
        }
    }

    /// Checks a stored record.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn decode(value: &[u8]) -> Result<Self, ItemError> {
        let raw = RawInode::read_from_bytes(value).map_err(|_| ItemError::Length)?;
        let mode = raw.mode.get();
        if raw.reserved != [0; 16] {
            return Err(ItemError::Reserved);
        }
        let most = [(raw.size, MAX_FILE_SIZE), (raw.blocks, MOST), (raw.entries, MOST)];
        if most.iter().any(|(stored, most)| stored.get() > *most) {
            return Err(ItemError::Number);
        }
        Ok(Self {
            kind: kind_from_code(mode >> 12)?,
            permissions: (mode & PERMISSIONS) as u16,
            uid: raw.uid.get(),
            gid: raw.gid.get(),
            links: raw.links.get(),
            device: raw.device.get(),
            xattr_names: raw.xattr_names.get(),
            size: raw.size.get(),
            blocks: raw.blocks.get(),
            generation: Generation::new(raw.generation.get()),
            accessed: decode_time(raw.accessed)?,
            modified: decode_time(raw.modified)?,
            changed: decode_time(raw.changed)?,
            created: decode_time(raw.created)?,
            parent: InodeNr::new(raw.parent.get()),
            next_sequence: raw.next_sequence.get(),
            entries: raw.entries.get(),
        })
    }

    /// The record as it is stored.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mode = u32::from(kind_code(self.kind)) << 12 | u32::from(self.permissions);
        let raw = RawInode {
            mode: mode.into(),
            uid: self.uid.into(),
            gid: self.gid.into(),
            links: self.links.into(),
            device: self.device.into(),
            xattr_names: self.xattr_names.into(),
            size: self.size.into(),
            blocks: self.blocks.into(),
            generation: self.generation.get().into(),
            accessed: encode_time(self.accessed),
            modified: encode_time(self.modified),
            changed: encode_time(self.changed),
            created: encode_time(self.created),
            parent: self.parent.get().into(),
            next_sequence: self.next_sequence.into(),
            entries: self.entries.into(),
            reserved: [0; 16],
        };
        raw.as_bytes().to_vec()
    }
}

fn decode_time(raw: RawTime) -> Result<WallTime, ItemError> {
    WallTime::new(raw.seconds.get(), raw.nanoseconds.get()).ok_or(ItemError::Time)
}

fn encode_time(time: WallTime) -> RawTime {
    RawTime { seconds: time.secs().into(), nanoseconds: time.subsec_nanos().into() }
}

/// An operation that a crash must not leave half done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Intent {
    /// The inode has no name: it is deleted when nobody uses it, at the latest at the next mount.
    Orphan,
    /// What lies behind this size, in bytes, is being dropped.
    Truncate(u64),
    /// Contents are being replaced by a clone; these bytes are, and what they held is set aside. To be undone.
    Clone {
        /// First byte.
        start: u64,
        /// Where what is replaced so far ends.
        end: u64,
    },
    /// What a clone set aside is being dropped.
    DropReplaced,
    /// A range is being taken out of a file, and what lies behind it moves to its place.
    Collapse(Shift),
    /// A hole is being put into a file, and what lies behind it moves on.
    Insert(Shift),
}

/// How far the contents of a file have moved, all in bytes and whole blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shift {
    /// First byte of the range that is taken out or put in.
    pub(crate) first: u64,
    /// Its length, and how far the rest moves.
    pub(crate) length: u64,
    /// Old place of what moves next: everything before it (collapse), or from it on (insert), has moved.
    pub(crate) reached: u64,
}

impl Shift {
    fn check(self, least: u64) -> Option<Self> {
        let whole = (self.first | self.length | self.reached).is_multiple_of(BLOCK_SIZE);
        let inside = self.length > 0 && self.reached >= least && self.reached <= crate::MAX_FILE_SIZE;
        (whole && inside).then_some(self)
    }
}

impl Intent {
    fn code(self) -> u8 {
        match self {
            Self::Orphan => 1,
            Self::Truncate(_) => 2,
            Self::Clone { .. } => 3,
            Self::DropReplaced => 4,
            Self::Collapse(_) => 5,
            Self::Insert(_) => 6,
        }
    }

    fn decode_shift(value: &[u8]) -> Result<Self, ItemError> {
        let raw = RawShift::read_from_bytes(value).map_err(|_| ItemError::Length)?;
        if raw.head.reserved != [0; 7] {
            return Err(ItemError::Reserved);
        }
        let (first, length) = (raw.head.argument.get(), raw.head.end.get());
        let shift = Shift { first, length, reached: raw.reached.get() };
        let end = first.checked_add(length).filter(|end| *end <= crate::MAX_FILE_SIZE);
        let end = end.ok_or(ItemError::Intent)?;
        let decoded = match raw.head.code {
            5 => shift.check(end).map(Self::Collapse),
            6 => shift.check(first).map(Self::Insert),
            _ => None,
        };
        decoded.ok_or(ItemError::Intent)
    }

    /// Checks a stored intent.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn decode(value: &[u8]) -> Result<Self, ItemError> {
        if matches!(value.first(), Some(5 | 6)) {
            return Self::decode_shift(value);
        }
        let raw = RawIntent::read_from_bytes(value).map_err(|_| ItemError::Length)?;
        if raw.reserved != [0; 7] {
            return Err(ItemError::Reserved);
        }
        match (raw.code, raw.argument.get(), raw.end.get()) {
            (1, 0, 0) => Ok(Self::Orphan),
            (2, size, 0) => Ok(Self::Truncate(size)),
            (3, start, end)
                if start <= end
                    && end <= crate::MAX_FILE_SIZE
                    && (start | end).is_multiple_of(BLOCK_SIZE) =>
            {
                Ok(Self::Clone { start, end })
            }
            (4, 0, 0) => Ok(Self::DropReplaced),
            _ => Err(ItemError::Intent),
        }
    }

    /// The intent as it is stored.
    pub(crate) fn encode(self) -> Vec<u8> {
        let (argument, end) = match self {
            Self::Orphan | Self::DropReplaced => (0, 0),
            Self::Truncate(size) => (size, 0),
            Self::Clone { start, end } => (start, end),
            Self::Collapse(shift) | Self::Insert(shift) => (shift.first, shift.length),
        };
        let head =
            RawIntent { code: self.code(), reserved: [0; 7], argument: argument.into(), end: end.into() };
        match self {
            Self::Collapse(shift) | Self::Insert(shift) => {
                RawShift { head, reached: shift.reached.into() }.as_bytes().to_vec()
            }
            _ => head.as_bytes().to_vec(),
        }
    }
}

/// A directory entry, without its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EntryTarget {
    /// Inode.
    pub(crate) inode: InodeNr,
    /// Its kind.
    pub(crate) kind: FileKind,
}

/// A directory entry found by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HashEntry {
    /// Sequence of the entry.
    pub(crate) sequence: u64,
    /// What it names.
    pub(crate) target: EntryTarget,
    /// Name.
    pub(crate) name: Box<[u8]>,
}

impl HashEntry {
    /// Checks the entries of one hash.
    ///
    /// # Errors
    /// What is wrong with them.
    pub(crate) fn decode_chain(mut value: &[u8]) -> Result<Vec<Self>, ItemError> {
        let mut entries: Vec<Self> = Vec::new();
        while !value.is_empty() {
            let (raw, rest) = RawHashEntry::read_from_prefix(value).map_err(|_| ItemError::Length)?;
            let (name, rest) =
                rest.split_at_checked(usize::from(raw.name_length)).ok_or(ItemError::Length)?;
            if !is_entry_name(name) {
                return Err(ItemError::Name);
            }
            if entries.iter().any(|entry| *entry.name == *name) {
                return Err(ItemError::Chain);
            }
            let kind = kind_from_code(raw.kind.into())?;
            let target = EntryTarget { inode: InodeNr::new(raw.inode.get()), kind };
            entries.push(Self { sequence: raw.sequence.get(), target, name: name.into() });
            value = rest;
        }
        if entries.is_empty() { Err(ItemError::Chain) } else { Ok(entries) }
    }

    /// The entries of one hash as they are stored.
    pub(crate) fn encode_chain(entries: &[Self]) -> Vec<u8> {
        let mut value = Vec::new();
        for entry in entries {
            let raw = RawHashEntry {
                sequence: entry.sequence.into(),
                inode: entry.target.inode.get().into(),
                kind: kind_code(entry.target.kind),
                name_length: name_length(&entry.name),
            };
            value.extend_from_slice(raw.as_bytes());
            value.extend_from_slice(&entry.name);
        }
        value
    }
}

/// A directory entry found by sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SequenceEntry {
    /// What it names.
    pub(crate) target: EntryTarget,
    /// Name.
    pub(crate) name: Box<[u8]>,
}

impl SequenceEntry {
    /// Checks a stored entry.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn decode(value: &[u8]) -> Result<Self, ItemError> {
        let (raw, name) = RawSequenceEntry::read_from_prefix(value).map_err(|_| ItemError::Length)?;
        if !is_entry_name(name) {
            return Err(ItemError::Name);
        }
        let kind = kind_from_code(raw.kind.into())?;
        let target = EntryTarget { inode: InodeNr::new(raw.inode.get()), kind };
        Ok(Self { target, name: name.into() })
    }

    /// The entry as it is stored.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let raw =
            RawSequenceEntry { inode: self.target.inode.get().into(), kind: kind_code(self.target.kind) };
        let mut value = raw.as_bytes().to_vec();
        value.extend_from_slice(&self.name);
        value
    }
}

/// An extended attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Xattr {
    /// Name, namespace prefix included.
    pub(crate) name: Box<[u8]>,
    /// Value.
    pub(crate) value: Box<[u8]>,
}

impl Xattr {
    /// Checks the attributes of one hash.
    ///
    /// # Errors
    /// What is wrong with them.
    pub(crate) fn decode_chain(mut stored: &[u8]) -> Result<Vec<Self>, ItemError> {
        let mut attributes: Vec<Self> = Vec::new();
        while !stored.is_empty() {
            let (raw, rest) = RawXattr::read_from_prefix(stored).map_err(|_| ItemError::Length)?;
            let (name, rest) =
                rest.split_at_checked(usize::from(raw.name_length)).ok_or(ItemError::Length)?;
            let (value, rest) =
                rest.split_at_checked(usize::from(raw.value_length.get())).ok_or(ItemError::Length)?;
            if raw.reserved != 0 {
                return Err(ItemError::Reserved);
            }
            if name.is_empty() || name.contains(&0) {
                return Err(ItemError::Name);
            }
            if attributes.iter().any(|attribute| *attribute.name == *name) {
                return Err(ItemError::Chain);
            }
            attributes.push(Self { name: name.into(), value: value.into() });
            stored = rest;
        }
        if attributes.is_empty() { Err(ItemError::Chain) } else { Ok(attributes) }
    }

    /// The attributes of one hash as they are stored.
    pub(crate) fn encode_chain(attributes: &[Self]) -> Vec<u8> {
        let mut stored = Vec::new();
        for attribute in attributes {
            let value_length =
                u16::try_from(attribute.value.len()).expect("a value is at most MAX_XATTR_VALUE long");
            let raw = RawXattr {
                name_length: name_length(&attribute.name),
                reserved: 0,
                value_length: value_length.into(),
            };
            stored.extend_from_slice(raw.as_bytes());
            stored.extend_from_slice(&attribute.name);
            stored.extend_from_slice(&attribute.value);
        }
        stored
    }
}

fn name_length(name: &[u8]) -> u8 {
    u8::try_from(name.len()).expect("a name is at most MAX_NAME long")
}

#[cfg(test)]
mod tests;
