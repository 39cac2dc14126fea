//! Making inodes.
//!
//! Owns: [`Shard::create_entry`] and where new directories go ([`Shard::place_directory`]).
//!
//! Invariants: an inode appears together with its first name; a file is born in its directory's shard, so that making,
//! writing, reading and removing it touch one shard; only directories are spread.

use std::rc::Rc;

use crate::alloc::Priority;
use crate::error::FsError;
use crate::format::items::{EntryTarget, InodeRecord, MAX_SYMLINK, is_entry_name};
use crate::request::{Attributes, Caller, FileKind, Name, NewInode};
use crate::shard::Shard;
use crate::types::{InodeNr, ShardId};

use super::change::{Change, NewRecord};
use super::lockset::Locks;
use super::lookup::check_length;

/// Set-group-id bit of a mode: on a directory it hands its group down.
const SET_GROUP_ID: u16 = 0o2000;

/// A new directory goes to no shard that has less than this part of the average space available.
const CROWDED_DIVISOR: u64 = 2;

/// What is to be made.
#[derive(Clone, Debug)]
pub(crate) struct Creation {
    /// Directory.
    pub(crate) parent: InodeNr,
    /// Name.
    pub(crate) name: Name,
    /// Kind, with what belongs to it.
    pub(crate) new: NewInode,
    /// Lower 12 bits of the mode.
    pub(crate) permissions: u16,
    /// Owner.
    pub(crate) caller: Caller,
}

/// Checks a name that is to be given.
///
/// # Errors
/// [`FsError::NameTooLong`], [`FsError::Exists`] for `.` and `..`, [`FsError::NotFound`] for none,
/// [`FsError::Invalid`] for a byte that no name may hold.
pub(super) fn check_new_name(name: &[u8]) -> Result<(), FsError> {
    check_length(name)?;
    match name {
        b"" => Err(FsError::NotFound),
        b"." | b".." => Err(FsError::Exists),
        _ if is_entry_name(name) => Ok(()),
        _ => Err(FsError::Invalid),
    }
}

impl Creation {
    fn kind(&self) -> FileKind {
        match self.new {
            NewInode::Regular => FileKind::Regular,
            NewInode::Directory => FileKind::Directory,
            NewInode::Symlink(_) => FileKind::Symlink,
            NewInode::BlockDevice(_) => FileKind::BlockDevice,
            NewInode::CharDevice(_) => FileKind::CharDevice,
            NewInode::Fifo => FileKind::Fifo,
            NewInode::Socket => FileKind::Socket,
        }
    }

    fn check(&self) -> Result<(), FsError> {
        check_new_name(&self.name)?;
        match &self.new {
            NewInode::Symlink(target) if target.is_empty() => Err(FsError::NotFound),
            NewInode::Symlink(target) if target.len() > MAX_SYMLINK => Err(FsError::NameTooLong),
            NewInode::Symlink(target) if target.contains(&0) => Err(FsError::Invalid),
            _ => Ok(()),
        }
    }

    fn record(&self, parent: &InodeRecord) -> NewRecord {
        let kind = self.kind();
        let (mut gid, mut permissions) = (self.caller.gid, self.permissions);
        if parent.permissions & SET_GROUP_ID != 0 {
            gid = parent.gid;
            if kind == FileKind::Directory {
                permissions |= SET_GROUP_ID;
            }
        }
        let device = match self.new {
            NewInode::BlockDevice(device) | NewInode::CharDevice(device) => device,
            _ => 0,
        };
        let target = match &self.new {
            NewInode::Symlink(target) => Some(target.clone()),
            _ => None,
        };
        NewRecord { kind, permissions, uid: self.caller.uid, gid, device, target, parent: self.parent }
    }
}

impl Shard {
    /// Makes an inode and its first name; counts one lookup.
    pub(super) async fn create_entry(self: &Rc<Self>, creation: Creation) -> Result<Attributes, FsError> {
        creation.check()?;
        let locks = self.lock(self.new_transaction(), [creation.parent]).await?;
        let created = self.create_locked(&locks, &creation).await;
        self.unlock(locks).await;
        created
    }

    async fn create_locked(
        self: &Rc<Self>,
        locks: &Locks,
        creation: &Creation,
    ) -> Result<Attributes, FsError> {
        let parent = locks.record(creation.parent)?;
        if self.find(creation.parent, &creation.name).await?.is_some() {
            return Err(FsError::Exists);
        }
        let new = creation.record(parent);
        let kind = new.kind;
        let shard = if kind == FileKind::Directory { self.place_directory() } else { self.id };
        let inode = self.new_inode_of(shard).await?;
        let (directory, name) = (creation.parent, creation.name.clone());
        let mut changes = vec![
            Change::CreateInode { inode, new },
            Change::InsertEntry { directory, name, target: EntryTarget { inode, kind } },
        ];
        if kind == FileKind::Directory {
            changes.push(Change::AddSubdirectory { directory });
        }
        self.commit_changes(locks.transaction(), changes, Priority::Normal).await?;
        self.enter(inode).await
    }

    /// The shard for a new directory: each in turn, but none that is much fuller than the others.
    fn place_directory(&self) -> ShardId {
        let shards: Vec<ShardId> = self.volume.shard_ids().collect();
        let available = |shard: &ShardId| self.volume.shard(*shard).counter.available();
        let average = shards.iter().map(available).sum::<u64>() / shards.len() as u64;
        let turn = self.names.next_directory.get();
        self.names.next_directory.set(turn.wrapping_add(1));
        let start = self.id.index().wrapping_add(turn);
        let in_turn = (0..shards.len()).map(|step| shards[start.wrapping_add(step) % shards.len()]);
        let mut roomy = in_turn.filter(|shard| available(shard) >= average / CROWDED_DIVISOR);
        roomy.next().unwrap_or(self.id)
    }
}
