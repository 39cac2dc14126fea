//! The FUSE front end: a kernel request becomes a request to the volume, its result becomes the reply.
//!
//! Owns: [`FrontEnd`] (fuser's `Filesystem`), [`VolumeFront`] (what it needs of a volume) and the agreement with the
//! kernel about caching.
//!
//! | path | thread |
//! |---|---|
//! | request → [`VolumeFront::submit`] | a session thread, which at once reads the next request |
//! | reply | the reactor that served it, straight to the kernel; of a single request the session thread (`fuse/handoff.rs`) |
//! | write | copied into the delalloc queue and acknowledged on the session thread, unless there is no room |
//! | what needs no volume (open, flush of an unwritten file, ACL attributes) | the session thread |
//!
//! Agreement with the kernel:
//! - the daemon is the only writer, so names, absent names, attributes and pages stay valid until the kernel itself
//!   changes them ([`CACHE_TIME`]; pages are dropped on request only);
//! - no writeback cache: write(2) returns when the volume has accepted the data;
//! - open and opendir are refused once with ENOSYS, which saves their round trips for good. So there are no file
//!   handles; inodes stay alive through their lookup count;
//! - the kernel checks permissions (`default_permissions`) and applies the umask; set-uid and set-gid bits are dropped
//!   here, as it asks (HANDLE_KILLPRIV_V2). fuser does not pass on the flag that accompanies a truncation: any
//!   caller but root is taken to lack CAP_FSETID;
//! - copy_file_range shares blocks where the volume can, so plain `cp` clones; FICLONE never reaches a FUSE server;
//! - access times are not kept on reads (FUSE leaves them to the server), as with the mount option `noatime`.
//!
//! Invariant: no lock is held while a request is submitted or a reply is sent.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use fs_core::request::{
    AttributeChange, Attributes, Caller, CloneRange, ExtentSummary, KillPrivileges, Name, NewInode, Reply,
    Request, SyncScope, WriteSource,
};
use fs_core::types::{FileOffset, InodeNr};
use fs_core::{FsError, Volume, WriteOutcome};
use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyWrite, ReplyXattr, TimeOrNow, WriteFlags,
};

use super::handoff::Handoff;
use super::translate;
use crate::extents::{self, LIST_ATTRIBUTE};

/// How long the kernel may keep names and attributes. Nobody else changes them, so long; the kernel adds this to its
/// clock, so not the maximum.
const CACHE_TIME: Duration = Duration::from_secs(24 * 3600);

/// Largest read or write request: what the kernel allows without a higher `fs.fuse.max_pages_limit`.
pub(super) const MAX_TRANSFER: u32 = 1 << 20;

/// Read-ahead and asynchronous direct I/O requests that the kernel may have waiting.
const MAX_BACKGROUND: u16 = 64;

/// Directory entries asked for at once: what fills the buffer of a C library's readdir with names of usual length.
const DIRECTORY_BATCH: u32 = 256;

/// Bytes of one copy_file_range at most: whole blocks in a reply of 32 bits.
const MAX_COPY: u64 = (u32::MAX as u64) & !4095;

/// An attribute that every file has and no listing shows: how it lies on the device, as JSON.
pub(crate) const EXTENTS_ATTRIBUTE: &str = "pollux.extents";

/// Parts of the set of written inodes; a power of two. Session threads rarely meet in one.
const WRITTEN_PARTS: usize = 16;

/// What a front end needs of a volume. See [`Volume`], whose methods these are.
pub trait VolumeFront: Send + Sync + 'static {
    /// Sends a request; `reply` runs where it was served.
    fn submit(&self, request: Request, reply: impl FnOnce(Result<Reply, FsError>) + Send + 'static);

    /// Accepts a write without waiting, if there is room.
    fn write(
        &self,
        inode: InodeNr,
        offset: FileOffset,
        data: &[u8],
        source: WriteSource,
        kill_privileges: KillPrivileges,
    ) -> WriteOutcome;
}

impl VolumeFront for Volume {
    fn submit(&self, request: Request, reply: impl FnOnce(Result<Reply, FsError>) + Send + 'static) {
        Volume::submit(self, request, reply);
    }

    fn write(
        &self,
        inode: InodeNr,
        offset: FileOffset,
        data: &[u8],
        source: WriteSource,
        kill_privileges: KillPrivileges,
    ) -> WriteOutcome {
        Volume::write(self, inode, offset, data, source, kill_privileges)
    }
}

/// The front end of one mount.
pub struct FrontEnd<V> {
    volume: V,
    written: WrittenSet,
    handoff: Handoff,
}

impl<V: VolumeFront> FrontEnd<V> {
    /// A front end of `volume`.
    pub fn new(volume: V) -> Self {
        Self { volume, written: WrittenSet::default(), handoff: Handoff::default() }
    }

    /// Session threads reply to single requests themselves where no reactor runs: `cores` are the reactors'.
    #[must_use]
    pub fn beside_reactors(mut self, cores: &[usize]) -> Self {
        self.handoff = Handoff::beside(cores);
        self
    }

    fn submit(&self, request: Request, reply: impl FnOnce(Result<Reply, FsError>) + Send + 'static) {
        self.handoff.submit(&self.volume, request, reply);
    }

    fn create(&self, create: Create<'_>, reply: ReplyEntry) {
        self.submit(create.into(), move |result| answer_entry(result, reply));
    }

    fn empty(&self, request: Request, reply: ReplyEmpty) {
        self.submit(request, move |result| match result {
            Ok(_) => reply.ok(),
            Err(error) => reply.error(translate::errno(&error)),
        });
    }
}

/// Whether a file was opened with `O_DIRECT`.
fn is_direct(flags: OpenFlags) -> bool {
    flags.0 & libc::O_DIRECT != 0
}

/// What makes an inode, by whichever request.
struct Create<'a> {
    header: &'a fuser::Request,
    parent: INodeNo,
    name: &'a OsStr,
    new: NewInode,
    mode: u32,
}

impl From<Create<'_>> for Request {
    fn from(create: Create<'_>) -> Self {
        Request::Create {
            parent: translate::inode(create.parent),
            name: name(create.name),
            new: create.new,
            permissions: translate::permissions(create.mode),
            caller: Caller { uid: create.header.uid(), gid: create.header.gid() },
        }
    }
}

/// Inodes written since their last flush. A flush of any other inode has nothing to start and nothing to report.
/// Its size is bounded by the inodes that the kernel remembers.
#[derive(Default)]
struct WrittenSet {
    parts: [Mutex<HashSet<InodeNr>>; WRITTEN_PARTS],
}

impl WrittenSet {
    fn part(&self, inode: InodeNr) -> std::sync::MutexGuard<'_, HashSet<InodeNr>> {
        let index = (inode.sequence() as usize) % WRITTEN_PARTS;
        self.parts[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, inode: InodeNr) {
        self.part(inode).insert(inode);
    }

    fn take(&self, inode: InodeNr) -> bool {
        self.part(inode).remove(&inode)
    }
}

fn name(name: &OsStr) -> Name {
    name.as_bytes().into()
}

fn generation(attributes: &Attributes) -> Generation {
    Generation(attributes.generation)
}

/// The reply to a request was of another kind: a bug of the volume, shown as an I/O error.
fn unexpected(reply: &Reply) -> Errno {
    tracing::error!(?reply, "the volume answered with another kind of reply");
    Errno::EIO
}

fn answer_entry(result: Result<Reply, FsError>, reply: ReplyEntry) {
    match result {
        Ok(Reply::Entry(found)) => {
            reply.entry(&CACHE_TIME, &translate::attributes(&found), generation(&found));
        }
        Ok(other) => reply.error(unexpected(&other)),
        Err(error) => reply.error(translate::errno(&error)),
    }
}

fn answer_attributes(result: Result<Reply, FsError>, reply: ReplyAttr) {
    match result {
        Ok(Reply::Attributes(found)) => reply.attr(&CACHE_TIME, &translate::attributes(&found)),
        Ok(other) => reply.error(unexpected(&other)),
        Err(error) => reply.error(translate::errno(&error)),
    }
}

fn answer_data(result: Result<Reply, FsError>, reply: ReplyData) {
    match result {
        Ok(Reply::Data(data)) => reply.data(&data),
        Ok(other) => reply.error(unexpected(&other)),
        Err(error) => reply.error(translate::errno(&error)),
    }
}

/// `size` is the caller's buffer; 0 asks for the size alone.
fn answer_xattr(result: Result<Reply, FsError>, size: u32, reply: ReplyXattr) {
    match result {
        Ok(Reply::Data(data)) => match u32::try_from(data.len()) {
            Ok(length) if size == 0 => reply.size(length),
            Ok(length) if length <= size => reply.data(&data),
            _ => reply.error(Errno::ERANGE),
        },
        Ok(other) => reply.error(unexpected(&other)),
        Err(error) => reply.error(translate::errno(&error)),
    }
}

fn answer_directory(result: Result<Reply, FsError>, mut reply: ReplyDirectory) {
    match result {
        Ok(Reply::Directory(entries)) => {
            for entry in &entries {
                let number = translate::number(entry.inode);
                let kind = translate::file_type(entry.kind);
                if reply.add(number, entry.cookie, kind, OsStr::from_bytes(&entry.name)) {
                    break;
                }
            }
            reply.ok();
        }
        Ok(other) => reply.error(unexpected(&other)),
        Err(error) => reply.error(translate::errno(&error)),
    }
}

fn answer_statfs(result: Result<Reply, FsError>, reply: ReplyStatfs) {
    match result {
        Ok(Reply::Space(space)) => {
            // An inode needs no place of its own: what limits their number is space.
            let free_inodes = space.available;
            let inodes = space.inodes.saturating_add(free_inodes);
            reply.statfs(space.blocks, space.free, space.available, inodes, free_inodes, 4096, 255, 4096);
        }
        Ok(other) => reply.error(unexpected(&other)),
        Err(error) => reply.error(translate::errno(&error)),
    }
}

/// The value of [`EXTENTS_ATTRIBUTE`].
fn describe_extents(reply: Reply) -> Reply {
    match reply {
        Reply::Extents(ExtentSummary { extents, shared, blocks }) => {
            let json = serde_json::json!({ "extents": extents, "shared": shared, "blocks": blocks });
            Reply::Data(json.to_string().into_bytes())
        }
        other => other,
    }
}

/// The value of an attribute that lists extents.
fn encode_list(reply: Reply) -> Reply {
    match reply {
        Reply::ExtentList(list) => Reply::Data(extents::encode(&list)),
        other => other,
    }
}

fn answer_written(result: Result<Reply, FsError>, reply: ReplyWrite) {
    match result {
        Ok(Reply::Written(bytes)) => reply.written(bytes),
        Ok(other) => reply.error(unexpected(&other)),
        Err(error) => reply.error(translate::errno(&error)),
    }
}

/// ACLs are not offered; the kernel asks for them at every `ls -l`, so it is told without a visit to the volume.
fn is_acl(name: &OsStr) -> bool {
    name.as_bytes().starts_with(b"system.posix_acl_")
}

impl<V: VolumeFront> Filesystem for FrontEnd<V> {
    fn init(&mut self, _header: &fuser::Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = InitFlags::FUSE_ASYNC_READ
            | InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_BIG_WRITES
            | InitFlags::FUSE_MAX_PAGES
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_HANDLE_KILLPRIV_V2
            | InitFlags::FUSE_EXPLICIT_INVAL_DATA
            | InitFlags::FUSE_CACHE_SYMLINKS
            | InitFlags::FUSE_NO_OPEN_SUPPORT
            | InitFlags::FUSE_NO_OPENDIR_SUPPORT;
        if let Err(missing) = config.add_capabilities(wanted & config.capabilities()) {
            tracing::warn!(?missing, "the kernel takes back what it offered");
        }
        let lacking = wanted & !config.capabilities();
        if !lacking.is_empty() {
            tracing::info!(?lacking, "this kernel's FUSE is older; slower or without some features");
        }
        // Each of these tells the nearest value that is possible.
        let _adjusted = config.set_max_write(MAX_TRANSFER).or_else(|nearest| config.set_max_write(nearest));
        let _adjusted =
            config.set_max_readahead(MAX_TRANSFER).or_else(|nearest| config.set_max_readahead(nearest));
        let _adjusted = config.set_max_background(MAX_BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _header: &fuser::Request, parent: INodeNo, child: &OsStr, reply: ReplyEntry) {
        let request = Request::Lookup { parent: translate::inode(parent), name: name(child) };
        self.submit(request, move |result| match result {
            Err(FsError::NotFound) => reply.entry(&CACHE_TIME, &translate::no_entry(), Generation(0)),
            result => answer_entry(result, reply),
        });
    }

    fn forget(&self, _header: &fuser::Request, inode: INodeNo, lookups: u64) {
        let inode = translate::inode(inode);
        let _flushes_no_more = self.written.take(inode);
        self.volume.submit(Request::Forget { inode, lookups }, |_no_reply| {});
    }

    fn getattr(
        &self,
        _header: &fuser::Request,
        inode: INodeNo,
        _handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        let request = Request::GetAttributes { inode: translate::inode(inode) };
        self.submit(request, move |result| answer_attributes(result, reply));
    }

    fn setattr(
        &self,
        header: &fuser::Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let new_owner = uid.is_some() || gid.is_some();
        let unprivileged_truncation = size.is_some() && header.uid() != 0;
        let kill_privileges =
            if new_owner || unprivileged_truncation { KillPrivileges::Drop } else { KillPrivileges::Keep };
        let change = AttributeChange {
            permissions: mode.map(translate::permissions),
            uid,
            gid,
            size,
            accessed: atime.map(translate::time_change),
            modified: mtime.map(translate::time_change),
            kill_privileges,
        };
        let request = Request::SetAttributes { inode: translate::inode(inode), change };
        self.submit(request, move |result| answer_attributes(result, reply));
    }

    fn readlink(&self, _header: &fuser::Request, inode: INodeNo, reply: ReplyData) {
        let request = Request::ReadLink { inode: translate::inode(inode) };
        self.submit(request, move |result| answer_data(result, reply));
    }

    fn mknod(
        &self,
        header: &fuser::Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        device: u32,
        reply: ReplyEntry,
    ) {
        match translate::new_inode(mode, device) {
            Ok(new) => self.create(Create { header, parent, name, new, mode }, reply),
            Err(error) => reply.error(translate::errno(&error)),
        }
    }

    fn mkdir(
        &self,
        header: &fuser::Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        self.create(Create { header, parent, name, new: NewInode::Directory, mode }, reply);
    }

    fn symlink(
        &self,
        header: &fuser::Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let new = NewInode::Symlink(target.as_os_str().as_bytes().into());
        self.create(Create { header, parent, name, new, mode: 0o777 }, reply);
    }

    fn unlink(&self, _header: &fuser::Request, parent: INodeNo, child: &OsStr, reply: ReplyEmpty) {
        self.empty(Request::Unlink { parent: translate::inode(parent), name: name(child) }, reply);
    }

    fn rmdir(&self, _header: &fuser::Request, parent: INodeNo, child: &OsStr, reply: ReplyEmpty) {
        self.empty(Request::RemoveDirectory { parent: translate::inode(parent), name: name(child) }, reply);
    }

    fn rename(
        &self,
        _header: &fuser::Request,
        parent: INodeNo,
        old: &OsStr,
        new_parent: INodeNo,
        new: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        match translate::rename_mode(flags) {
            Err(error) => reply.error(translate::errno(&error)),
            Ok(mode) => {
                let request = Request::Rename {
                    parent: translate::inode(parent),
                    name: name(old),
                    new_parent: translate::inode(new_parent),
                    new_name: name(new),
                    mode,
                };
                self.empty(request, reply);
            }
        }
    }

    fn link(
        &self,
        _header: &fuser::Request,
        inode: INodeNo,
        new_parent: INodeNo,
        new: &OsStr,
        reply: ReplyEntry,
    ) {
        let request = Request::Link {
            inode: translate::inode(inode),
            new_parent: translate::inode(new_parent),
            new_name: name(new),
        };
        self.submit(request, move |result| answer_entry(result, reply));
    }

    fn open(&self, _header: &fuser::Request, _inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.error(Errno::ENOSYS);
    }

    fn opendir(&self, _header: &fuser::Request, _inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.error(Errno::ENOSYS);
    }

    fn create(
        &self,
        header: &fuser::Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let create = Create { header, parent, name, new: NewInode::Regular, mode };
        self.submit(create.into(), move |result| match result {
            Ok(Reply::Entry(found)) => {
                let attributes = translate::attributes(&found);
                let flags = FopenFlags::FOPEN_KEEP_CACHE;
                reply.created(&CACHE_TIME, &attributes, generation(&found), FileHandle(0), flags);
            }
            Ok(other) => reply.error(unexpected(&other)),
            Err(error) => reply.error(translate::errno(&error)),
        });
    }

    fn read(
        &self,
        _header: &fuser::Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let (inode, offset) = (translate::inode(inode), FileOffset::new(offset));
        let request = if is_direct(flags) {
            Request::ReadDirect { inode, offset, length: size }
        } else {
            Request::Read { inode, offset, length: size }
        };
        self.submit(request, move |result| answer_data(result, reply));
    }

    fn write(
        &self,
        _header: &fuser::Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        data: &[u8],
        flags: WriteFlags,
        open_flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let inode = translate::inode(inode);
        let offset = FileOffset::new(offset);
        let source = if flags.contains(WriteFlags::FUSE_WRITE_CACHE) {
            WriteSource::Mapping
        } else {
            WriteSource::Call
        };
        let kill_privileges = if flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID) {
            KillPrivileges::Drop
        } else {
            KillPrivileges::Keep
        };
        self.written.note(inode);
        // What the kernel writes back of a mapping may come with the flags of any open file.
        if source == WriteSource::Call && is_direct(open_flags) {
            let request = Request::WriteDirect { inode, offset, data: data.into(), kill_privileges };
            return self.submit(request, move |result| answer_written(result, reply));
        }
        match self.volume.write(inode, offset, data, source, kill_privileges) {
            WriteOutcome::Accepted(bytes) => reply.written(bytes),
            WriteOutcome::Failed(error) => reply.error(translate::errno(&error)),
            WriteOutcome::Slow => {
                let request = Request::Write { inode, offset, data: data.into(), source, kill_privileges };
                self.submit(request, move |result| answer_written(result, reply));
            }
        }
    }

    fn flush(
        &self,
        _header: &fuser::Request,
        inode: INodeNo,
        _handle: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        let inode = translate::inode(inode);
        if self.written.take(inode) {
            self.empty(Request::Flush { inode }, reply);
        } else {
            reply.ok();
        }
    }

    fn fsync(
        &self,
        _header: &fuser::Request,
        inode: INodeNo,
        _handle: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        let scope = if datasync { SyncScope::Data } else { SyncScope::File };
        self.empty(Request::Sync { inode: translate::inode(inode), scope }, reply);
    }

    fn fsyncdir(
        &self,
        _header: &fuser::Request,
        inode: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let scope = if inode == INodeNo::ROOT { SyncScope::Volume } else { SyncScope::File };
        self.empty(Request::Sync { inode: translate::inode(inode), scope }, reply);
    }

    fn readdir(
        &self,
        _header: &fuser::Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        let inode = translate::inode(inode);
        let request = Request::ReadDirectory { inode, after: offset, limit: DIRECTORY_BATCH };
        self.submit(request, move |result| answer_directory(result, reply));
    }

    fn statfs(&self, _header: &fuser::Request, _inode: INodeNo, reply: ReplyStatfs) {
        self.submit(Request::StatFs, move |result| answer_statfs(result, reply));
    }

    fn setxattr(
        &self,
        _header: &fuser::Request,
        inode: INodeNo,
        attribute: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        if is_acl(attribute) {
            return reply.error(Errno::EOPNOTSUPP);
        }
        match translate::xattr_mode(flags) {
            Err(error) => reply.error(translate::errno(&error)),
            Ok(mode) => {
                let inode = translate::inode(inode);
                let request = Request::SetXattr { inode, name: name(attribute), value: value.into(), mode };
                self.empty(request, reply);
            }
        }
    }

    fn getxattr(
        &self,
        _header: &fuser::Request,
        inode: INodeNo,
        attribute: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        if is_acl(attribute) {
            return reply.error(Errno::EOPNOTSUPP);
        }
        if attribute == EXTENTS_ATTRIBUTE {
            let request = Request::CountExtents { inode: translate::inode(inode) };
            return self.submit(request, move |result| {
                answer_xattr(result.map(describe_extents), size, reply);
            });
        }
        let list = attribute.to_str().and_then(|name| name.strip_prefix(LIST_ATTRIBUTE));
        if let Some(offset) = list.and_then(|offset| offset.parse().ok()) {
            let offset = FileOffset::new(offset);
            let request = Request::ListExtents { inode: translate::inode(inode), offset };
            return self.submit(request, move |result| {
                answer_xattr(result.map(encode_list), size, reply);
            });
        }
        let request = Request::GetXattr { inode: translate::inode(inode), name: name(attribute) };
        self.submit(request, move |result| answer_xattr(result, size, reply));
    }

    fn listxattr(&self, _header: &fuser::Request, inode: INodeNo, size: u32, reply: ReplyXattr) {
        let request = Request::ListXattr { inode: translate::inode(inode) };
        self.submit(request, move |result| answer_xattr(result, size, reply));
    }

    fn removexattr(&self, _header: &fuser::Request, inode: INodeNo, attribute: &OsStr, reply: ReplyEmpty) {
        if is_acl(attribute) {
            return reply.error(Errno::EOPNOTSUPP);
        }
        self.empty(Request::RemoveXattr { inode: translate::inode(inode), name: name(attribute) }, reply);
    }

    fn access(&self, _header: &fuser::Request, _inode: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _header: &fuser::Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _input: &[u8],
        _output_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn fallocate(
        &self,
        _header: &fuser::Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        match translate::allocate_mode(mode) {
            Err(error) => reply.error(translate::errno(&error)),
            Ok(mode) => {
                let inode = translate::inode(inode);
                let offset = FileOffset::new(offset);
                self.empty(Request::Allocate { inode, offset, length, mode }, reply);
            }
        }
    }

    fn lseek(
        &self,
        _header: &fuser::Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let (what, offset) = match (translate::seek_what(whence), u64::try_from(offset)) {
            (Ok(what), Ok(offset)) => (what, FileOffset::new(offset)),
            (Err(error), _) => return reply.error(translate::errno(&error)),
            (_, Err(_negative)) => return reply.error(Errno::ENXIO),
        };
        let request = Request::Seek { inode: translate::inode(inode), offset, what };
        self.submit(request, move |result| match result {
            Ok(Reply::Offset(found)) => match i64::try_from(found) {
                Ok(found) => reply.offset(found),
                Err(_) => reply.error(Errno::EOVERFLOW),
            },
            Ok(other) => reply.error(unexpected(&other)),
            Err(error) => reply.error(translate::errno(&error)),
        });
    }

    fn copy_file_range(
        &self,
        _header: &fuser::Request,
        source: INodeNo,
        _source_handle: FileHandle,
        source_offset: u64,
        target: INodeNo,
        _target_handle: FileHandle,
        target_offset: u64,
        length: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let target = translate::inode(target);
        self.written.note(target);
        let range = CloneRange {
            source: translate::inode(source),
            source_offset: FileOffset::new(source_offset),
            target,
            target_offset: FileOffset::new(target_offset),
            // The reply has 32 bits. The kernel asks for less anyway.
            length: length.min(MAX_COPY),
        };
        self.submit(Request::CopyRange(range), move |result| match result {
            Ok(Reply::Cloned(copied)) => match u32::try_from(copied.bytes) {
                Ok(bytes) => reply.written(bytes),
                Err(_) => reply.error(Errno::EOVERFLOW),
            },
            Ok(other) => reply.error(unexpected(&other)),
            Err(error) => reply.error(translate::errno(&error)),
        });
    }
}
