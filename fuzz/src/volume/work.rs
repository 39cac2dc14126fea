//! What is done with a mounted volume: everything that can be reached is looked at, and some of it is changed.
//!
//! Owns: [`Worker`]. It follows directory entries and believes nothing: numbers of entries, attributes and bytes are bounded, for
//! directories may lead back to themselves, and files may say that they are as large as files can be.
//!
//! Excludes: judging contents. What is worth knowing is which requests fail as no request to a sound volume may.

use std::collections::BTreeSet;

use fs_core::request::{
    AllocateMode, AttributeChange, Attributes, Caller, CloneRange, DirectoryEntry, FileKind, KillPrivileges,
    NewInode, RelocateStep, RenameMode, ScrubPlace, SeekWhat, SetXattrMode, SyncScope, WriteSource,
};
use fs_core::types::{BLOCK_SIZE, FileOffset, InodeNr, ShardId};
use fs_core::{FsError, Reply, Request, Volume};

use super::images::pattern;

/// Inodes that are looked at: ten times what a base has.
const MOST_INODES: usize = 600;
/// Parts of a listing, of a scrub, of a relocation.
const MOST_STEPS: usize = 200;
/// Bytes that are read at the start of a file and at its end.
const READ: u32 = 512 << 10;
/// Files that are changed.
const CHANGED: usize = 6;

/// Someone who uses a volume.
pub struct Worker<'a> {
    volume: &'a Volume,
    /// What was found by the last walk: each inode with a name that leads to it.
    found: Vec<(InodeNr, DirectoryEntry)>,
    /// Requests that failed as none to a sound volume may.
    pub wrong: Vec<String>,
}

impl<'a> Worker<'a> {
    /// Someone who knows nothing of the volume yet.
    pub fn new(volume: &'a Volume) -> Self {
        Self { volume, found: Vec::new(), wrong: Vec::new() }
    }

    async fn call(&mut self, request: Request) -> Option<Reply> {
        let shown: String = format!("{request:?}").chars().take(200).collect();
        match self.volume.call(request).await {
            Ok(reply) => Some(reply),
            Err(error) => {
                let amiss = matches!(
                    error,
                    FsError::Io(_) | FsError::Damaged { .. } | FsError::ReadOnly | FsError::ShuttingDown
                );
                if amiss {
                    self.wrong.push(format!("{shown}: {error}"));
                }
                None
            }
        }
    }

    /// Looks at everything that names lead to, and scrubs.
    pub async fn walk(&mut self) {
        self.found.clear();
        let mut seen = BTreeSet::from([Volume::ROOT]);
        let mut directories = vec![Volume::ROOT];
        while let Some(directory) = directories.pop() {
            for entry in self.entries(directory).await {
                let dots = *entry.name == *b"." || *entry.name == *b"..";
                if dots || self.found.len() == MOST_INODES {
                    continue;
                }
                self.found.push((directory, entry.clone()));
                if !seen.insert(entry.inode) {
                    continue;
                }
                if entry.kind == FileKind::Directory {
                    directories.push(entry.inode);
                }
                self.look(directory, &entry).await;
            }
        }
        self.call(Request::StatFs).await;
        for shard in (0..self.volume.shards()).filter_map(ShardId::new) {
            self.scrub(shard).await;
        }
    }

    async fn entries(&mut self, inode: InodeNr) -> Vec<DirectoryEntry> {
        let (mut entries, mut after) = (Vec::new(), 0);
        for _ in 0..MOST_STEPS {
            let request = Request::ReadDirectory { inode, after, limit: 7 };
            let Some(Reply::Directory(more)) = self.call(request).await else { break };
            let Some(last) = more.last() else { break };
            after = last.cookie;
            entries.extend(more);
        }
        entries
    }

    async fn look(&mut self, parent: InodeNr, entry: &DirectoryEntry) {
        let request = Request::Lookup { parent, name: entry.name.clone() };
        let Some(Reply::Entry(attributes)) = self.call(request).await else { return };
        let inode = attributes.inode;
        self.call(Request::GetAttributes { inode }).await;
        if let Some(Reply::Data(names)) = self.call(Request::ListXattr { inode }).await {
            for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()).take(MOST_STEPS) {
                self.call(Request::GetXattr { inode, name: name.into() }).await;
            }
        }
        match attributes.kind {
            FileKind::Symlink => drop(self.call(Request::ReadLink { inode }).await),
            FileKind::Regular => self.read(&attributes).await,
            _ => {}
        }
        self.call(Request::Forget { inode, lookups: 1 }).await;
    }

    async fn read(&mut self, file: &Attributes) {
        let inode = file.inode;
        for start in [0, file.size.saturating_sub(READ.into())] {
            let offset = FileOffset::new(start);
            self.call(Request::Read { inode, offset, length: READ }).await;
        }
        self.call(Request::ReadDirect { inode, offset: FileOffset::new(0), length: 16 << 10 }).await;
        self.call(Request::CountExtents { inode }).await;
        let mut next = Some(0);
        for _ in 0..MOST_STEPS {
            let Some(offset) = next.take() else { break };
            let request = Request::ListExtents { inode, offset: FileOffset::new(offset) };
            if let Some(Reply::ExtentList(list)) = self.call(request).await {
                next = list.next;
            }
        }
        for what in [SeekWhat::Data, SeekWhat::Hole] {
            self.call(Request::Seek { inode, offset: FileOffset::new(BLOCK_SIZE), what }).await;
        }
    }

    async fn scrub(&mut self, shard: ShardId) {
        let mut from = ScrubPlace::START;
        for _ in 0..MOST_STEPS {
            let Some(Reply::Scrubbed(step)) = self.call(Request::Scrub { shard, from }).await else { return };
            self.wrong.extend(step.damage.iter().map(|damage| format!("scrub: {damage}")));
            match step.next {
                Some(next) => from = next,
                None => return,
            }
        }
    }

    /// Changes some of what the last walk found, in each way that there is.
    pub async fn work(&mut self) {
        let mut files: Vec<(InodeNr, DirectoryEntry)> =
            self.found.iter().filter(|(_, entry)| entry.kind == FileKind::Regular).cloned().collect();
        // Of several directories, and so of several shards.
        files.sort_by_key(|(parent, entry)| (entry.cookie, parent.get()));
        files.truncate(CHANGED);
        for (number, (parent, entry)) in files.iter().enumerate() {
            self.change(*parent, entry, number as u8).await;
            if let Some((_, source)) = files.get(number + 1) {
                self.share(source.inode, entry.inode).await;
            }
        }
        let directories: Vec<InodeNr> = self.found.iter().map(|(parent, _)| *parent).collect();
        for parent in directories.into_iter().collect::<BTreeSet<_>>().into_iter().take(3) {
            self.rename(parent).await;
        }
        for (parent, entry) in files.iter().skip(CHANGED / 2) {
            self.call(Request::Unlink { parent: *parent, name: entry.name.clone() }).await;
        }
        self.call(Request::Sync { inode: Volume::ROOT, scope: SyncScope::Volume }).await;
        self.relocate().await;
    }

    async fn change(&mut self, parent: InodeNr, entry: &DirectoryEntry, number: u8) {
        let inode = entry.inode;
        for (block, blocks) in [(1, 2), (7, 1), (21, 5)] {
            let (source, kill_privileges) = (WriteSource::Call, KillPrivileges::Keep);
            let (offset, data) = (FileOffset::new(block * BLOCK_SIZE + 10), pattern(number, blocks).into());
            self.call(Request::Write { inode, offset, data, source, kill_privileges }).await;
        }
        let modes =
            [AllocateMode::PunchHole, AllocateMode::Extend, AllocateMode::Unshare, AllocateMode::ZeroRange];
        for (place, mode) in modes.into_iter().enumerate() {
            let offset = FileOffset::new((3 * place as u64 + 2) * BLOCK_SIZE);
            self.call(Request::Allocate { inode, offset, length: 2 * BLOCK_SIZE, mode }).await;
        }
        let (name, value) = (b"user.new".as_slice().into(), vec![number; 500].into());
        self.call(Request::SetXattr { inode, name, value, mode: SetXattrMode::Set }).await;
        self.call(Request::RemoveXattr { inode, name: b"user.long".as_slice().into() }).await;
        let new_name = format!("linked {number}").into_bytes().into();
        self.call(Request::Link { inode, new_parent: parent, new_name }).await;
        let scope = if number.is_multiple_of(2) { SyncScope::Data } else { SyncScope::File };
        self.call(Request::Sync { inode, scope }).await;
        if number.is_multiple_of(3) {
            let change = AttributeChange { size: Some(9 * BLOCK_SIZE + 5), ..AttributeChange::default() };
            self.call(Request::SetAttributes { inode, change }).await;
        }
    }

    async fn share(&mut self, source: InodeNr, target: InodeNr) {
        let at = |block: u64| FileOffset::new(block * BLOCK_SIZE);
        let range = |from, to, blocks: u64| CloneRange {
            source,
            source_offset: at(from),
            target,
            target_offset: at(to),
            length: blocks * BLOCK_SIZE,
        };
        self.call(Request::Clone(range(1, 30, 4))).await;
        self.call(Request::Deduplicate(range(1, 30, 2))).await;
        self.call(Request::CopyRange(range(4, 0, 3))).await;
    }

    async fn rename(&mut self, parent: InodeNr) {
        let (name, caller) = (|text: &str| text.as_bytes().into(), Caller { uid: 1, gid: 1 });
        let (new, permissions) = (NewInode::Regular, 0o644);
        let made = self.call(Request::Create { parent, name: name("new"), new, permissions, caller }).await;
        let new = NewInode::Directory;
        self.call(Request::Create { parent, name: name("folder"), new, permissions, caller }).await;
        let (to, mode) = (Volume::ROOT, RenameMode::Replace);
        let old = name("new");
        self.call(Request::Rename { parent, name: old, new_parent: to, new_name: name("moved"), mode }).await;
        self.call(Request::RemoveDirectory { parent, name: name("folder") }).await;
        if let Some(Reply::Entry(file)) = made {
            let (inode, offset) = (file.inode, FileOffset::new(0));
            let (data, kill_privileges) = (pattern(9, 4).into(), KillPrivileges::Keep);
            self.call(Request::WriteDirect { inode, offset, data, kill_privileges }).await;
            self.call(Request::Forget { inode, lookups: 1 }).await;
        }
    }

    /// Empties each shard's first group that has something in it.
    async fn relocate(&mut self) {
        for shard in (0..self.volume.shards()).filter_map(ShardId::new) {
            let Some(Reply::Groups(groups)) = self.call(Request::Groups { shard }).await else { continue };
            let Some(group) = groups.first().map(|figures| figures.group) else { continue };
            let lease = fs_core::request::GroupLease::default();
            let close = RelocateStep::Close;
            self.call(Request::Relocate { shard, group, step: close, lease: lease.clone() }).await;
            let mut next = Some(RelocateStep::START);
            for _ in 0..MOST_STEPS {
                let Some(step) = next.take() else { break };
                let request = Request::Relocate { shard, group, step, lease: lease.clone() };
                if let Some(Reply::Relocated(done)) = self.call(request).await {
                    next = done.next;
                }
            }
            self.call(Request::Relocate { shard, group, step: RelocateStep::Open, lease }).await;
        }
    }
}
