//! What a check can find: one variant for each kind of damage.
//!
//! Owns: [`Finding`] and the bounded list of them.
//!
//! Excludes: how they are found.

use crate::alloc::GroupLoadError;
use crate::error::FsError;
use crate::format::extent::ExtentError;
use crate::format::items::ItemError;
use crate::format::node::{Key, NodeError};
use crate::request::FileKind;
use crate::types::{BlockCount, BlockNr, InodeNr, ShardId};

/// Findings kept with their details; more are counted only.
pub const MAX_FINDINGS: usize = 10_000;

/// Who uses blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum User {
    /// A tree node of a shard.
    Node(ShardId),
    /// A run of a shard.
    Run(ShardId),
    /// The intent log.
    Log,
}

impl User {
    pub(super) fn shard(self) -> ShardId {
        match self {
            Self::Node(shard) | Self::Run(shard) => shard,
            Self::Log => ShardId::FIRST,
        }
    }
}

impl std::fmt::Display for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Node(shard) => write!(f, "a tree node of shard {shard}"),
            Self::Run(shard) => write!(f, "a run of shard {shard}"),
            Self::Log => write!(f, "the intent log"),
        }
    }
}

macro_rules! findings {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty),* $(,)? } => $message:literal,)*) => {
        /// One piece of damage.
        #[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
        #[non_exhaustive]
        #[allow(missing_docs)] // the fields are what the message says
        pub enum Finding {
            $($(#[$doc])* #[error($message)] $name { $($field: $type),* },)*
        }

        impl Finding {
            /// Name of the kind of damage, for programs.
            pub fn code(&self) -> &'static str {
                match self {
                    $(Self::$name { .. } => stringify!($name),)*
                }
            }
        }
    };
}

findings! {
    /// A group has no usable bitmap.
    Bitmap { error: GroupLoadError } => "{error}",
    /// The slots of a group's bitmap cannot be read.
    BitmapUnreadable { group: u64, error: FsError } => "group {group}: {error}",
    /// The bitmaps are not those that the superblock was written with.
    BitmapDigest { expected: u64, found: u64 } =>
        "the bitmaps are not those of the superblock: digest {found:#018x}, expected {expected:#018x}",
    /// The intent log cannot be replayed to its end.
    Log { what: String } => "{what}",
    /// Blocks with two users.
    UsedTwice { start: BlockNr, count: BlockCount, user: User } =>
        "block {start} + {count}, used by {user}, has another user",
    /// Blocks used outside of the volume, or over the volume's own structures.
    Misplaced { start: BlockNr, count: BlockCount, user: User } =>
        "block {start} + {count}, used by {user}, is not for data",
    /// Blocks used in a group of another shard.
    ForeignGroup { start: BlockNr, owner: ShardId, user: User } =>
        "block {start}, used by {user}, lies in a group of shard {owner}",
    /// Blocks marked as used that nobody uses.
    Leaked { start: BlockNr, count: BlockCount } => "block {start} + {count} is marked as used, and nobody uses it",
    /// Blocks in use that are marked as free: the next writer would overwrite them.
    NotMarked { start: BlockNr, count: BlockCount } => "block {start} + {count} is used, and marked as free",

    /// A tree node is not what its parent says, or makes no sense.
    Node { shard: ShardId, address: BlockNr, level: u8, error: NodeError } =>
        "shard {shard}: node at block {address}, level {level}: {error}",
    /// A tree node cannot be read.
    NodeUnreadable { shard: ShardId, address: BlockNr, error: FsError } =>
        "shard {shard}: node at block {address}: {error}",

    /// An item of the namespace cannot be decoded.
    Item { shard: ShardId, key: Key, error: ItemError } => "shard {shard}: item {key}: {error}",
    /// An item of file contents cannot be decoded.
    ExtentItem { shard: ShardId, key: Key, error: ExtentError } => "shard {shard}: item {key}: {error}",
    /// An item of a kind that this version does not know.
    UnknownItem { shard: ShardId, key: Key } => "shard {shard}: item {key} is of no known kind",
    /// An item where no item may be: of another shard, or with a number in its key that must be zero.
    StrayItem { shard: ShardId, key: Key } => "shard {shard}: item {key} does not belong there",
    /// Extents that a clone has set aside, and no clone that would need them.
    SetAside { shard: ShardId, inode: InodeNr } =>
        "shard {shard}: extents of inode {inode} are set aside, and no clone needs them",
    /// Items of an inode that has no record.
    NoInode { shard: ShardId, inode: InodeNr } => "shard {shard}: inode {inode} has items and no record",
    /// An item that inodes of this kind do not have.
    WrongItem { inode: InodeNr, kind: FileKind, key: Key } => "inode {inode}, {kind:?}, has item {key}",

    /// A symbolic link whose target is missing or not as long as its size says.
    SymlinkTarget { inode: InodeNr, size: u64, length: Option<u64> } =>
        "symbolic link {inode} has size {size}, its target has {length:?}",
    /// The sum of an inode's attribute names is wrong.
    AttributeNames { inode: InodeNr, stored: u32, counted: u64 } =>
        "inode {inode}: attribute names of {counted} bytes, its record says {stored}",
    /// An attribute or entry lies under a hash that is not its name's.
    NameHash { inode: InodeNr, name: String } => "inode {inode}: {name:?} lies under a hash that is not its own",
    /// Two extents of a file overlap.
    ExtentOverlap { inode: InodeNr, offset: u64 } => "inode {inode}: the extent at {offset} overlaps the one before",
    /// An extent with data behind the end of its file.
    ExtentBehindEnd { inode: InodeNr, offset: u64, size: u64 } =>
        "inode {inode}: the extent at {offset} reaches behind the end at {size}",
    /// The sum of an inode's extents is wrong.
    InodeBlocks { inode: InodeNr, stored: u64, counted: u64 } =>
        "inode {inode} has {counted} blocks, its record says {stored}",
    /// An inode number that the shard has not given out yet.
    NextInode { shard: ShardId, next: u64, inode: InodeNr } =>
        "shard {shard}: inode {inode} exists, and sequence {next} is to be given out next",
    /// The superblock's count of a shard's inodes is wrong.
    InodeCount { shard: ShardId, stored: u64, counted: u64 } =>
        "shard {shard} has {counted} inodes, the superblock says {stored}",

    /// Two runs overlap.
    RunOverlap { shard: ShardId, start: BlockNr } => "shard {shard}: the run at block {start} overlaps the one before",
    /// The reference count of a run is not the number of its back-references.
    RunReferences { shard: ShardId, start: BlockNr, stored: u32, counted: u64 } =>
        "shard {shard}: block {start} has {counted} references, its run says {stored}",
    /// A back-reference to blocks without a run.
    NoRun { shard: ShardId, start: BlockNr, count: BlockCount } =>
        "shard {shard}: block {start} + {count} has references and no run",
    /// One extent covers runs of different generations or kinds.
    RunMixed { shard: ShardId, start: BlockNr } =>
        "shard {shard}: the run at block {start} differs from another one of the same extent",
    /// An extent without a back-reference.
    NoBackref { inode: InodeNr, offset: u64, start: BlockNr, count: BlockCount } =>
        "inode {inode}: the extent at {offset} to block {start} + {count} has no back-reference",
    /// A back-reference without an extent.
    NoExtent { inode: InodeNr, offset: u64, start: BlockNr, count: BlockCount } =>
        "block {start} + {count} has a reference from inode {inode} at {offset}, which has no such extent",
    /// Extent and run differ in generation or kind.
    ExtentMismatch { inode: InodeNr, offset: u64, start: BlockNr } =>
        "inode {inode}: the extent at {offset} and its run at block {start} differ in generation or kind",
    /// What one shard has lent is not what the other one has borrowed.
    Lending { lender: ShardId, borrower: ShardId, group: u64, lent: u64, borrowed: u64 } =>
        "group {group}: shard {lender} has lent shard {borrower} {lent} blocks, which accounts for {borrowed}, or for others",
    /// A loan of a shard to itself, or of a shard that does not exist, or not at its place.
    StrayLoan { shard: ShardId, key: Key } => "shard {shard}: item {key} lends or borrows what cannot be",
    /// Data does not match its checksum.
    DataChecksum { block: BlockNr, expected: u32, found: u32 } =>
        "data block {block}: checksum is {found:#010x}, expected {expected:#010x}",
    /// Data cannot be read.
    DataUnreadable { start: BlockNr, error: FsError } => "data at block {start}: {error}",

    /// An entry that can be found by name and not by sequence.
    NoSequenceEntry { directory: InodeNr, name: String, sequence: u64 } =>
        "directory {directory}: entry {name:?} is not listed under its sequence {sequence}",
    /// An entry that is listed and cannot be found by name.
    NoHashEntry { directory: InodeNr, name: String, sequence: u64 } =>
        "directory {directory}: entry {name:?}, listed under sequence {sequence}, cannot be found by its name",
    /// A sequence number that the directory has not given out.
    EntrySequence { directory: InodeNr, sequence: u64, next: u64 } =>
        "directory {directory}: an entry has sequence {sequence}, the next one is {next}",
    /// The count of a directory's entries is wrong.
    EntryCount { directory: InodeNr, stored: u64, counted: u64 } =>
        "directory {directory} has {counted} entries, its record says {stored}",
    /// The size of a directory is not the sum of its names.
    DirectorySize { directory: InodeNr, stored: u64, counted: u64 } =>
        "directory {directory} has names of {counted} bytes, its record says {stored}",
    /// An entry that names an inode that does not exist.
    DanglingEntry { directory: InodeNr, inode: InodeNr } => "directory {directory} names inode {inode}, which does not exist",
    /// An entry that says another kind than its inode.
    EntryKind { directory: InodeNr, inode: InodeNr, entry: FileKind, record: FileKind } =>
        "directory {directory} names inode {inode} as {entry:?}, which is {record:?}",
    /// The link count of an inode that is not a directory is wrong.
    Links { inode: InodeNr, stored: u32, counted: u64 } =>
        "inode {inode} has {counted} names, its record says {stored}",
    /// The link count of a directory is wrong.
    DirectoryLinks { directory: InodeNr, stored: u32, counted: u64 } =>
        "directory {directory} should have {counted} links, its record says {stored}",
    /// A directory with several names, or a named root.
    DirectoryNames { directory: InodeNr, names: u64 } => "directory {directory} has {names} names",
    /// A directory that says it lies elsewhere than where it is named.
    Parent { directory: InodeNr, stored: InodeNr, named_in: InodeNr } =>
        "directory {directory} is named in {named_in}, its record says {stored}",
    /// A directory that cannot be reached from the root.
    Unreachable { directory: InodeNr } => "directory {directory} cannot be reached from the root",
    /// There is no root directory.
    NoRoot { root: InodeNr } => "inode {root}, the root directory, does not exist or is no directory",
    /// An inode without links and without the intent to delete it.
    NoIntent { inode: InodeNr } => "inode {inode} has no links and will never be deleted",
    /// An intent to delete an inode that has links, or to truncate what is no file.
    WrongIntent { inode: InodeNr } => "inode {inode} has an intent that does not fit it",
    /// An intent for an inode that does not exist.
    IntentWithoutInode { inode: InodeNr } => "there is an intent for inode {inode}, which does not exist",
}

impl serde::Serialize for Finding {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let mut out = serializer.serialize_struct("Finding", 2)?;
        out.serialize_field("code", self.code())?;
        out.serialize_field("message", &self.to_string())?;
        out.end()
    }
}

/// The first findings, and their number.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) list: Vec<Finding>,
    pub(super) total: u64,
}

impl Findings {
    pub(super) fn add(&mut self, finding: Finding) {
        self.total += 1;
        if self.list.len() < MAX_FINDINGS {
            self.list.push(finding);
        }
    }
}
