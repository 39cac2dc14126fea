//! The front-end boundary: requests that a front end sends to a volume, and what comes back.
//!
//! Owns: [`Request`], [`Reply`] and their parts. They are plain data and `Send`: a front end builds a request on
//! whatever thread it runs, the owning shard serves it on its reactor, and the reply is produced there.
//!
//! Excludes: the FUSE protocol, paths (a front end walks them), permission checks (the kernel's, with
//! `default_permissions`).

use reactor::WallTime;

pub use crate::alloc::GroupFigures;
use crate::format::node::Key;
use crate::types::{BlockNr, FileOffset, InodeNr, ShardId};

/// A name of a directory entry or attribute: 1 to 255 bytes, any but `/` and NUL; not checked by the type.
pub type Name = Box<[u8]>;

/// What an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// Regular file.
    Regular,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Block device node.
    BlockDevice,
    /// Character device node.
    CharDevice,
    /// Named pipe.
    Fifo,
    /// Unix domain socket.
    Socket,
}

/// What `stat(2)` tells of an inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Inode number.
    pub inode: InodeNr,
    /// Kind of the inode.
    pub kind: FileKind,
    /// Permission bits, with set-uid, set-gid and sticky (the lower 12 bits of `st_mode`).
    pub permissions: u16,
    /// Links: directories count `.` and their subdirectories.
    pub links: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of device nodes, as the kernel encodes it.
    pub device: u32,
    /// Bytes.
    pub size: u64,
    /// Space taken, in units of 512 bytes, dirty data included.
    pub sectors: u64,
    /// Last access.
    pub accessed: WallTime,
    /// Last change of contents.
    pub modified: WallTime,
    /// Last change of the inode.
    pub changed: WallTime,
    /// Birth.
    pub created: WallTime,
    /// Distinguishes reuses of an inode number.
    pub generation: u64,
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// User of new inodes.
    pub uid: u32,
    /// Group of new inodes, unless their directory is set-gid.
    pub gid: u32,
}

/// A new time stamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeChange {
    /// The volume's clock.
    Now,
    /// This time.
    To(WallTime),
}

/// Attributes to change; `None` leaves one alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttributeChange {
    /// New lower 12 bits of the mode.
    pub permissions: Option<u16>,
    /// New owner.
    pub uid: Option<u32>,
    /// New group.
    pub gid: Option<u32>,
    /// New size: truncates or extends with zeroes.
    pub size: Option<u64>,
    /// New access time.
    pub accessed: Option<TimeChange>,
    /// New modification time.
    pub modified: Option<TimeChange>,
    /// Whether set-uid and set-gid bits fall (a size change by an unprivileged writer).
    pub kill_privileges: KillPrivileges,
}

/// Whether a change drops set-uid and (for group-executable files) set-gid bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KillPrivileges {
    /// Bits stay.
    #[default]
    Keep,
    /// Bits fall.
    Drop,
}

/// What `rename` does with an existing destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenameMode {
    /// Replace it.
    Replace,
    /// Fail with [`crate::FsError::Exists`] (RENAME_NOREPLACE).
    NoReplace,
    /// Swap the two names (RENAME_EXCHANGE).
    Exchange,
}

/// What a new inode is made as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NewInode {
    /// Empty regular file.
    Regular,
    /// Directory.
    Directory,
    /// Symbolic link with its target (1 to 4,095 bytes).
    Symlink(Box<[u8]>),
    /// Device node, with the device number.
    BlockDevice(u32),
    /// Device node, with the device number.
    CharDevice(u32),
    /// Named pipe.
    Fifo,
    /// Unix domain socket.
    Socket,
}

/// What `setxattr` does with an existing attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetXattrMode {
    /// Create or replace.
    Set,
    /// Fail if it exists (XATTR_CREATE).
    Create,
    /// Fail if it does not (XATTR_REPLACE).
    Replace,
}

/// How much `fsync` covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncScope {
    /// The file's data and what is needed to read it (fdatasync).
    Data,
    /// The file's data and attributes.
    File,
    /// The whole volume.
    Volume,
}

/// What `fallocate` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllocateMode {
    /// Reserve space and extend the size.
    Extend,
    /// Reserve space, leave the size (FALLOC_FL_KEEP_SIZE).
    KeepSize,
    /// Make a hole (FALLOC_FL_PUNCH_HOLE).
    PunchHole,
    /// Make the range read as zeroes; extends the size (FALLOC_FL_ZERO_RANGE).
    ZeroRange,
    /// The same, size left alone.
    ZeroRangeKeepSize,
    /// Take the range out: what lies behind it moves to its place (FALLOC_FL_COLLAPSE_RANGE). Whole blocks before the file's end.
    Collapse,
    /// Put a hole in: what lies behind it moves on (FALLOC_FL_INSERT_RANGE). Whole blocks, inside the file.
    Insert,
    /// Reserve space and extend the size, and give the file blocks of its own where it shares them (FALLOC_FL_UNSHARE_RANGE).
    Unshare,
}

/// What `lseek` looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeekWhat {
    /// Next byte that is not in a hole.
    Data,
    /// Next hole; the end of the file counts as one.
    Hole,
}

/// A range of one file that a range of another, or of the same, is to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CloneRange {
    /// File whose contents are wanted.
    pub source: InodeNr,
    /// First byte in it.
    pub source_offset: FileOffset,
    /// File that changes.
    pub target: InodeNr,
    /// First byte in it.
    pub target_offset: FileOffset,
    /// Bytes; 0 for everything up to the source's end.
    pub length: u64,
}

/// What a clone has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cloned {
    /// Bytes of the target that are now the source's.
    pub bytes: u64,
    /// Extents that the two share for it.
    pub extents: u64,
}

/// Where a scrub of a shard goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScrubPlace {
    /// Tree nodes, from this key on.
    Nodes(Key),
    /// Data, from this block on.
    Data(BlockNr),
}

impl ScrubPlace {
    /// Where a scrub begins.
    pub const START: Self = Self::Nodes(Key::MIN);
}

/// Keeps a group closed: whoever empties it holds one, and it opens again some time after the last clone is dropped.
#[derive(Clone, Debug, Default)]
pub struct GroupLease(std::sync::Arc<()>);

impl GroupLease {
    pub(crate) fn downgrade(&self) -> std::sync::Weak<()> {
        std::sync::Arc::downgrade(&self.0)
    }
}

/// A step of emptying a group; a relocation goes through all of them in this order, several times if need be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelocateStep {
    /// Allocate nothing there any more.
    Close,
    /// Move data from this block on.
    Data(BlockNr),
    /// Copy tree nodes, from this key on.
    Nodes(Key),
    /// Make it durable, so that what was left becomes free.
    Settle,
    /// Allocate there again; the lease ends.
    Open,
}

impl RelocateStep {
    /// Where a pass begins.
    pub const START: Self = Self::Data(BlockNr::new(0));
}

/// What a step of a relocation has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Relocated {
    /// How to go on; `None` at the end of a pass.
    pub next: Option<RelocateStep>,
    /// Blocks that moved.
    pub blocks: u64,
    /// References that were turned to them.
    pub references: u64,
    /// Tree nodes that moved.
    pub nodes: u64,
    /// What could not be moved, each with its place and the reason.
    pub left: Vec<String>,
    /// What the group holds now.
    pub group: GroupFigures,
}

/// What a step of a scrub has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubStep {
    /// Where to go on; `None` at the end of the shard.
    pub next: Option<ScrubPlace>,
    /// Blocks verified.
    pub blocks: u64,
    /// What is wrong, each with its place and the files it belongs to.
    pub damage: Vec<String>,
}

/// How a file lies on the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExtentSummary {
    /// Extents, preallocated ones included.
    pub extents: u64,
    /// Those of which at least one block belongs to another extent too.
    pub shared: u64,
    /// Blocks of all of them.
    pub blocks: u64,
}

/// With whom an extent shares its blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sharing {
    /// At least one of its blocks belongs to another extent too.
    pub shared: bool,
    /// At least one of its blocks is borrowed from another shard (and so is shared, or was).
    pub lent: bool,
}

/// What a piece of a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentState {
    /// Data on the device.
    Data {
        /// First byte on the device.
        physical: u64,
        /// Who else has it.
        sharing: Sharing,
    },
    /// Blocks that were never written and read as zeroes.
    Preallocated {
        /// First byte on the device.
        physical: u64,
        /// Who else has them.
        sharing: Sharing,
    },
    /// No blocks.
    Hole,
    /// Data in memory, on its way to a place that is not known yet.
    Queued,
}

/// A piece of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtentRow {
    /// Its first byte in the file.
    pub offset: u64,
    /// Its bytes.
    pub length: u64,
    /// What it is.
    pub state: ExtentState,
}

/// A part of a file's list of pieces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExtentList {
    /// The pieces, in order and without gaps.
    pub rows: Vec<ExtentRow>,
    /// Where the list goes on; `None` at its end.
    pub next: Option<u64>,
}

/// Where a write came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteSource {
    /// write(2) and relatives.
    Call,
    /// The kernel's write-back of a shared mapping: never extends the file.
    Mapping,
}

/// A request to a volume. Unless said otherwise the first inode is the one whose shard serves it.
#[derive(Clone, Debug)]
pub enum Request {
    /// Finds a name; counts one lookup on the inode found. → [`Reply::Entry`]
    Lookup {
        /// Directory.
        parent: InodeNr,
        /// Name, `.` and `..` allowed.
        name: Name,
    },
    /// Gives lookups back; an unlinked inode without lookups is deleted. → [`Reply::Done`]
    Forget {
        /// Inode.
        inode: InodeNr,
        /// Lookups given back.
        lookups: u64,
    },
    /// → [`Reply::Attributes`]
    GetAttributes {
        /// Inode.
        inode: InodeNr,
    },
    /// → [`Reply::Attributes`]
    SetAttributes {
        /// Inode.
        inode: InodeNr,
        /// What changes.
        change: AttributeChange,
    },
    /// → [`Reply::Data`]
    ReadLink {
        /// Symbolic link.
        inode: InodeNr,
    },
    /// Makes an inode and its first name; counts one lookup. → [`Reply::Entry`]
    Create {
        /// Directory.
        parent: InodeNr,
        /// Name.
        name: Name,
        /// What to make.
        new: NewInode,
        /// Lower 12 bits of the mode, umask already applied.
        permissions: u16,
        /// Owner of the new inode.
        caller: Caller,
    },
    /// Removes a name that is not a directory's. → [`Reply::Done`]
    Unlink {
        /// Directory.
        parent: InodeNr,
        /// Name.
        name: Name,
    },
    /// Removes an empty directory. → [`Reply::Done`]
    RemoveDirectory {
        /// Directory that holds it.
        parent: InodeNr,
        /// Name.
        name: Name,
    },
    /// → [`Reply::Done`]
    Rename {
        /// Directory of the old name.
        parent: InodeNr,
        /// Old name.
        name: Name,
        /// Directory of the new name.
        new_parent: InodeNr,
        /// New name.
        new_name: Name,
        /// What happens to an existing destination.
        mode: RenameMode,
    },
    /// Adds a name to an inode that is not a directory; counts one lookup. Served by the shard of `new_parent`.
    /// → [`Reply::Entry`]
    Link {
        /// Inode.
        inode: InodeNr,
        /// Directory of the new name.
        new_parent: InodeNr,
        /// New name.
        new_name: Name,
    },
    /// → [`Reply::Data`], short only at the end of the file.
    Read {
        /// Inode.
        inode: InodeNr,
        /// First byte.
        offset: FileOffset,
        /// Bytes.
        length: u32,
    },
    /// A read that leaves nothing in memory, as with `O_DIRECT`. → [`Reply::Data`], short only at the end of the file.
    ReadDirect {
        /// Inode.
        inode: InodeNr,
        /// First byte.
        offset: FileOffset,
        /// Bytes.
        length: u32,
    },
    /// A write; [`crate::Volume::write`] is the fast way in. → [`Reply::Written`]
    Write {
        /// Inode.
        inode: InodeNr,
        /// First byte.
        offset: FileOffset,
        /// Data.
        data: Box<[u8]>,
        /// Where it came from.
        source: WriteSource,
        /// Whether set-uid and set-gid bits fall.
        kill_privileges: KillPrivileges,
    },
    /// A write that is answered when the device has the data, as with `O_DIRECT`: not durable without [`Request::Sync`], but
    /// in nobody's memory. What is not of whole blocks goes through the page cache, and is written back. →
    /// [`Reply::Written`]
    WriteDirect {
        /// Inode.
        inode: InodeNr,
        /// First byte.
        offset: FileOffset,
        /// Data.
        data: Box<[u8]>,
        /// Whether set-uid and set-gid bits fall.
        kill_privileges: KillPrivileges,
    },
    /// A handle was closed: starts write-back after a truncation to zero; reports earlier failures. → [`Reply::Done`]
    Flush {
        /// Inode.
        inode: InodeNr,
    },
    /// → [`Reply::Done`], when durable.
    Sync {
        /// Inode; ignored for [`SyncScope::Volume`].
        inode: InodeNr,
        /// How much.
        scope: SyncScope,
    },
    /// Lists a directory in the order of the entries' sequence numbers. → [`Reply::Directory`]
    ReadDirectory {
        /// Directory.
        inode: InodeNr,
        /// Cookie of the last entry seen; 0 at first.
        after: u64,
        /// Entries wanted at most.
        limit: u32,
    },
    /// → [`Reply::Space`]
    StatFs,
    /// → [`Reply::Data`]
    GetXattr {
        /// Inode.
        inode: InodeNr,
        /// Attribute, namespace prefix included.
        name: Name,
    },
    /// → [`Reply::Done`]
    SetXattr {
        /// Inode.
        inode: InodeNr,
        /// Attribute.
        name: Name,
        /// Value.
        value: Box<[u8]>,
        /// What happens to an existing one.
        mode: SetXattrMode,
    },
    /// → [`Reply::Data`]: the names, each ended by NUL.
    ListXattr {
        /// Inode.
        inode: InodeNr,
    },
    /// → [`Reply::Done`]
    RemoveXattr {
        /// Inode.
        inode: InodeNr,
        /// Attribute.
        name: Name,
    },
    /// → [`Reply::Done`]
    Allocate {
        /// Inode.
        inode: InodeNr,
        /// First byte.
        offset: FileOffset,
        /// Bytes.
        length: u64,
        /// What to do.
        mode: AllocateMode,
    },
    /// Makes a range share its blocks with another; all or nothing. Served by the shard of the target.
    /// → [`Reply::Cloned`]
    Clone(CloneRange),
    /// As [`Request::Clone`], but only if the two ranges hold the same bytes already; neither size nor times change. Served
    /// by the shard of the target. → [`Reply::Deduplicated`]
    Deduplicate(CloneRange),
    /// `copy_file_range(2)`: shares what can be shared, copies what cannot; a length of 0 copies nothing. Served by the
    /// shard of the target. → [`Reply::Cloned`], of fewer bytes than asked for at the source's end and wherever the way
    /// of doing it changes; 0 only at the source's end.
    CopyRange(CloneRange),
    /// Verifies a bounded part of what a shard has on the device. → [`Reply::Scrubbed`]
    Scrub {
        /// The shard, which serves the request.
        shard: ShardId,
        /// Where to begin.
        from: ScrubPlace,
    },
    /// What the groups of a shard hold. → [`Reply::Groups`]
    Groups {
        /// The shard, which serves the request.
        shard: ShardId,
    },
    /// Does a bounded part of emptying a group. → [`Reply::Relocated`]
    Relocate {
        /// The shard that owns the group and serves the request.
        shard: ShardId,
        /// The group. It is closed by the first step.
        group: u64,
        /// What to do.
        step: RelocateStep,
        /// The same for all steps of a group.
        lease: GroupLease,
    },
    /// How what was written back of a file lies on the device. → [`Reply::Extents`]
    CountExtents {
        /// File.
        inode: InodeNr,
    },
    /// Where a bounded part of a file lies, from an offset on. → [`Reply::ExtentList`]
    ListExtents {
        /// File.
        inode: InodeNr,
        /// Where to begin; a block that it lies in is listed from its start.
        offset: FileOffset,
    },
    /// → [`Reply::Offset`]
    Seek {
        /// Inode.
        inode: InodeNr,
        /// Where to start.
        offset: FileOffset,
        /// What to look for.
        what: SeekWhat,
    },
}

/// An entry of a directory listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryEntry {
    /// Inode.
    pub inode: InodeNr,
    /// Kind of the inode.
    pub kind: FileKind,
    /// Name.
    pub name: Name,
    /// Where to go on after this entry.
    pub cookie: u64,
}

/// Space of a volume, as `statvfs(3)` shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpaceReport {
    /// Blocks of 4 KiB in all.
    pub blocks: u64,
    /// Blocks not in use (waiting to be freed included).
    pub free: u64,
    /// Blocks a writer can still get.
    pub available: u64,
    /// Inodes in use.
    pub inodes: u64,
    /// Data accepted and not yet on the device, in bytes.
    pub dirty_bytes: u64,
}

/// What a request returns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Nothing but success.
    Done,
    /// An inode found or made.
    Entry(Attributes),
    /// An inode's attributes.
    Attributes(Attributes),
    /// Bytes.
    Data(Vec<u8>),
    /// Bytes written.
    Written(u32),
    /// Entries, in order; empty at the end.
    Directory(Vec<DirectoryEntry>),
    /// Space.
    Space(SpaceReport),
    /// An offset in bytes.
    Offset(u64),
    /// A step of a scrub.
    Scrubbed(ScrubStep),
    /// What each group of a shard holds, in rising order.
    Groups(Vec<GroupFigures>),
    /// A step of a relocation.
    Relocated(Relocated),
    /// Figures of a file's extents.
    Extents(ExtentSummary),
    /// Pieces of a file.
    ExtentList(ExtentList),
    /// Whether two ranges were the same, and what they share now; `None` if they differ.
    Deduplicated(Option<Cloned>),
    /// What was cloned or copied.
    Cloned(Cloned),
}
