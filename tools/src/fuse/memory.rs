//! A volume in memory, for tests of the front end: small, obviously right, and asynchronous like the real one.
//!
//! Requests are served one at a time by a thread of its own, so replies come from another thread than the session's.
//! Every [`SLOW_EVERY`]th write is refused the fast way, so that both ways are taken.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};

use fs_core::request::{
    AttributeChange, Attributes, DirectoryEntry, FileKind, KillPrivileges, Name, NewInode, RenameMode, Reply,
    Request, SpaceReport, SyncScope, TimeChange, WriteSource,
};
use fs_core::types::{FileOffset, InodeNr};
use fs_core::{FsError, WriteOutcome};
use reactor::WallTime;

use super::VolumeFront;

const SLOW_EVERY: u64 = 3;

/// What the tests look at afterwards.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) volume_syncs: u64,
    pub(super) file_syncs: u64,
    pub(super) flushes: u64,
    pub(super) requests: u64,
}

struct Node {
    attributes: Attributes,
    data: Vec<u8>,
    entries: BTreeMap<Name, InodeNr>,
    parent: InodeNr,
    xattrs: BTreeMap<Name, Vec<u8>>,
}

pub(super) struct State {
    nodes: HashMap<InodeNr, Node>,
    next: u64,
    pub(super) seen: Seen,
}

type Job = Box<dyn FnOnce(&mut State) + Send>;

/// The handle, as the front end holds it.
#[derive(Clone)]
pub(super) struct MemoryVolume {
    state: Arc<Mutex<State>>,
    jobs: mpsc::Sender<Job>,
    writes: Arc<AtomicU64>,
}

fn new_attributes(inode: InodeNr, kind: FileKind, permissions: u16) -> Attributes {
    let now = WallTime::from(std::time::SystemTime::now());
    Attributes {
        inode,
        kind,
        permissions,
        links: if kind == FileKind::Directory { 2 } else { 1 },
        uid: 0,
        gid: 0,
        device: 0,
        size: 0,
        sectors: 0,
        accessed: now,
        modified: now,
        changed: now,
        created: now,
        generation: 1,
    }
}

impl MemoryVolume {
    pub(super) fn new() -> Self {
        let root = Node {
            attributes: new_attributes(InodeNr::ROOT, FileKind::Directory, 0o755),
            data: Vec::new(),
            entries: BTreeMap::new(),
            parent: InodeNr::ROOT,
            xattrs: BTreeMap::new(),
        };
        let nodes = HashMap::from([(InodeNr::ROOT, root)]);
        let state = Arc::new(Mutex::new(State { nodes, next: 2, seen: Seen::default() }));
        let (jobs, queue) = mpsc::channel::<Job>();
        let served = state.clone();
        std::thread::spawn(move || {
            for job in queue {
                job(&mut served.lock().unwrap());
            }
        });
        Self { state, jobs, writes: Arc::default() }
    }

    pub(super) fn look<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.state.lock().unwrap())
    }
}

impl VolumeFront for MemoryVolume {
    fn submit(&self, request: Request, reply: impl FnOnce(Result<Reply, FsError>) + Send + 'static) {
        self.jobs.send(Box::new(move |state| reply(state.serve(request)))).unwrap();
    }

    fn write(
        &self,
        inode: InodeNr,
        offset: FileOffset,
        data: &[u8],
        _source: WriteSource,
        _kill_privileges: KillPrivileges,
    ) -> WriteOutcome {
        if self.writes.fetch_add(1, Ordering::Relaxed).is_multiple_of(SLOW_EVERY) {
            return WriteOutcome::Slow;
        }
        match self.state.lock().unwrap().write(inode, offset.get(), data) {
            Ok(written) => WriteOutcome::Accepted(written),
            Err(error) => WriteOutcome::Failed(error),
        }
    }
}

impl State {
    fn node(&mut self, inode: InodeNr) -> Result<&mut Node, FsError> {
        self.nodes.get_mut(&inode).ok_or(FsError::NotFound)
    }

    fn write(&mut self, inode: InodeNr, offset: u64, data: &[u8]) -> Result<u32, FsError> {
        let node = self.node(inode)?;
        let start = usize::try_from(offset).map_err(|_| FsError::FileTooLarge)?;
        let end = start + data.len();
        if node.data.len() < end {
            node.data.resize(end, 0);
        }
        node.data[start..end].copy_from_slice(data);
        node.attributes.size = node.data.len() as u64;
        node.attributes.modified = WallTime::from(std::time::SystemTime::now());
        Ok(u32::try_from(data.len()).unwrap())
    }

    fn serve(&mut self, request: Request) -> Result<Reply, FsError> {
        self.seen.requests += 1;
        match request {
            Request::Lookup { parent, name } => {
                let inode = *self.node(parent)?.entries.get(&name).ok_or(FsError::NotFound)?;
                Ok(Reply::Entry(self.node(inode)?.attributes.clone()))
            }
            Request::GetAttributes { inode } => Ok(Reply::Attributes(self.node(inode)?.attributes.clone())),
            Request::SetAttributes { inode, change } => self.change(inode, &change),
            Request::Create { parent, name, new, permissions, .. } => {
                self.create(parent, name, new, permissions)
            }
            Request::ReadLink { inode } => Ok(Reply::Data(self.node(inode)?.data.clone())),
            Request::Unlink { parent, name } | Request::RemoveDirectory { parent, name } => {
                let inode = self.node(parent)?.entries.get(&name).copied().ok_or(FsError::NotFound)?;
                if !self.node(inode)?.entries.is_empty() {
                    return Err(FsError::NotEmpty);
                }
                self.node(parent)?.entries.remove(&name);
                self.node(inode)?.attributes.links -= 1;
                Ok(Reply::Done)
            }
            Request::Rename { parent, name, new_parent, new_name, mode } => {
                let inode = self.node(parent)?.entries.get(&name).copied().ok_or(FsError::NotFound)?;
                let replaced = self.node(new_parent)?.entries.get(&new_name).copied();
                match (mode, replaced) {
                    (RenameMode::NoReplace, Some(_)) => return Err(FsError::Exists),
                    (RenameMode::Exchange, None) => return Err(FsError::NotFound),
                    (RenameMode::Exchange, Some(other)) => self.node(parent)?.entries.insert(name, other),
                    _ => self.node(parent)?.entries.remove(&name),
                };
                self.node(new_parent)?.entries.insert(new_name, inode);
                Ok(Reply::Done)
            }
            Request::Link { inode, new_parent, new_name } => {
                self.node(new_parent)?.entries.insert(new_name, inode);
                let node = self.node(inode)?;
                node.attributes.links += 1;
                Ok(Reply::Entry(node.attributes.clone()))
            }
            Request::Read { inode, offset, length } | Request::ReadDirect { inode, offset, length } => {
                let data = &self.node(inode)?.data;
                let start = usize::try_from(offset.get()).unwrap().min(data.len());
                let end = (start + length as usize).min(data.len());
                Ok(Reply::Data(data[start..end].to_vec()))
            }
            Request::Write { inode, offset, data, .. } | Request::WriteDirect { inode, offset, data, .. } => {
                Ok(Reply::Written(self.write(inode, offset.get(), &data)?))
            }
            Request::ReadDirectory { inode, after, limit } => self.list(inode, after, limit),
            Request::Flush { .. } => {
                self.seen.flushes += 1;
                Ok(Reply::Done)
            }
            Request::Sync { scope, .. } => {
                match scope {
                    SyncScope::Volume => self.seen.volume_syncs += 1,
                    SyncScope::Data | SyncScope::File => self.seen.file_syncs += 1,
                }
                Ok(Reply::Done)
            }
            Request::StatFs => {
                let report = SpaceReport { blocks: 1000, free: 600, available: 500, ..Default::default() };
                Ok(Reply::Space(report))
            }
            Request::GetXattr { inode, name } => {
                let value = self.node(inode)?.xattrs.get(&name).cloned();
                value.map(Reply::Data).ok_or(FsError::NoAttribute)
            }
            Request::SetXattr { inode, name, value, .. } => {
                self.node(inode)?.xattrs.insert(name, value.into());
                Ok(Reply::Done)
            }
            Request::ListXattr { inode } => {
                let names = self.node(inode)?.xattrs.keys().flat_map(|name| [name, &b"\0"[..]].concat());
                Ok(Reply::Data(names.collect()))
            }
            Request::RemoveXattr { inode, name } => {
                self.node(inode)?.xattrs.remove(&name).map(|_| Reply::Done).ok_or(FsError::NoAttribute)
            }
            Request::Forget { .. } => Ok(Reply::Done),
            Request::Allocate { .. }
            | Request::Seek { .. }
            | Request::Clone(_)
            | Request::Deduplicate(_)
            | Request::CopyRange(_)
            | Request::CountExtents { .. }
            | Request::ListExtents { .. }
            | Request::Scrub { .. }
            | Request::Groups { .. }
            | Request::Relocate { .. } => Err(FsError::NotSupported),
        }
    }

    fn change(&mut self, inode: InodeNr, change: &AttributeChange) -> Result<Reply, FsError> {
        let node = self.node(inode)?;
        if let Some(size) = change.size {
            node.data.resize(usize::try_from(size).unwrap(), 0);
            node.attributes.size = size;
        }
        node.attributes.permissions = change.permissions.unwrap_or(node.attributes.permissions);
        node.attributes.uid = change.uid.unwrap_or(node.attributes.uid);
        node.attributes.gid = change.gid.unwrap_or(node.attributes.gid);
        if let Some(TimeChange::To(time)) = change.modified {
            node.attributes.modified = time;
        }
        Ok(Reply::Attributes(node.attributes.clone()))
    }

    fn create(&mut self, parent: InodeNr, name: Name, new: NewInode, mode: u16) -> Result<Reply, FsError> {
        if self.node(parent)?.entries.contains_key(&name) {
            return Err(FsError::Exists);
        }
        let inode = InodeNr::new(self.next * 64);
        self.next += 1;
        let (kind, data) = match new {
            NewInode::Regular => (FileKind::Regular, Vec::new()),
            NewInode::Directory => (FileKind::Directory, Vec::new()),
            NewInode::Symlink(target) => (FileKind::Symlink, target.into()),
            NewInode::Fifo => (FileKind::Fifo, Vec::new()),
            _ => return Err(FsError::NotSupported),
        };
        let mut attributes = new_attributes(inode, kind, mode);
        attributes.size = data.len() as u64;
        let node = Node {
            attributes: attributes.clone(),
            data,
            entries: BTreeMap::new(),
            parent,
            xattrs: BTreeMap::new(),
        };
        self.nodes.insert(inode, node);
        self.node(parent)?.entries.insert(name, inode);
        Ok(Reply::Entry(attributes))
    }

    fn list(&mut self, inode: InodeNr, after: u64, limit: u32) -> Result<Reply, FsError> {
        let node = self.node(inode)?;
        let dots: [(Name, InodeNr); 2] = [(b"."[..].into(), inode), (b".."[..].into(), node.parent)];
        let entries = dots.into_iter().chain(node.entries.clone());
        let wanted: Vec<(u64, (Name, InodeNr))> = (1..)
            .zip(entries)
            .skip(usize::try_from(after).unwrap())
            .take(usize::try_from(limit).unwrap())
            .collect();
        let listed = wanted.into_iter().map(|(cookie, (name, inode))| {
            let kind = self.node(inode)?.attributes.kind;
            Ok(DirectoryEntry { inode, kind, name, cookie })
        });
        listed.collect::<Result<_, _>>().map(Reply::Directory)
    }
}
