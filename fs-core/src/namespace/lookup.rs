//! Finding names, listing directories, lookup counts.
//!
//! Owns: the requests that read names, and the answers to other shards' questions about names here.
//!
//! A lookup count says how often a front end has been told of an inode and has not yet forgotten it. It lives with the
//! inode's shard, in memory only: a new mount begins with none.
//!
//! Invariants:
//! - while an entry is being resolved its directory is locked (shared at least), so the inode behind it exists and a
//!   lookup counted on it comes before any removal of the name;
//! - a directory that was removed is empty and takes no new entries.

use std::rc::Rc;

use crate::batch::{Batch, Plan};
use crate::error::FsError;
use crate::format::items::{EntryTarget, MAX_NAME, symlink_key};
use crate::request::{Attributes, DirectoryEntry, FileKind, Name};
use crate::shard::Shard;
use crate::types::InodeNr;

use super::{directory, inode};

/// Entries that one answer lists at most.
const MAX_LISTING: u32 = 4096;

/// Cookie of `.`.
const COOKIE_SELF: u64 = 1;
/// Cookie of `..`.
const COOKIE_PARENT: u64 = 2;

/// Checks the name of an entry to be looked up.
///
/// # Errors
/// [`FsError::NameTooLong`].
pub(super) fn check_length(name: &[u8]) -> Result<(), FsError> {
    if name.len() > MAX_NAME { Err(FsError::NameTooLong) } else { Ok(()) }
}

impl Shard {
    /// Serves a lookup: finds `name` and counts one lookup on what it names.
    pub(super) async fn lookup(self: &Rc<Self>, parent: InodeNr, name: Name) -> Result<Attributes, FsError> {
        check_length(&name)?;
        let held = self.lock_shared(parent).await;
        let found = self.resolve(parent, &name).await;
        let entered = match found {
            Ok(target) => self.enter(target).await,
            Err(error) => Err(error),
        };
        self.unlock_one(held);
        entered
    }

    async fn resolve(&self, parent: InodeNr, name: &[u8]) -> Result<InodeNr, FsError> {
        self.view(|batch| {
            let record = inode::load(batch, parent)?;
            if record.kind != FileKind::Directory {
                return Err(FsError::NotDirectory.into());
            }
            match name {
                b"." => Ok(parent),
                b".." => Ok(record.parent),
                _ => {
                    let entry = directory::find(batch, parent, name)?.ok_or(FsError::NotFound)?;
                    Ok(entry.target.inode)
                }
            }
        })
        .await
    }

    /// Attributes of an inode of this shard; counts one lookup.
    pub(super) async fn enter_here(&self, inode: InodeNr) -> Result<Attributes, FsError> {
        let attributes = self.attributes_of(inode).await?;
        // Nothing was awaited since the record was read.
        let state = self.inode(inode);
        state.lookups.set(state.lookups.get() + 1);
        Ok(attributes)
    }

    /// What `name` stands for in a directory of this shard, whatever locks are held.
    pub(super) async fn find_here(
        &self,
        directory: InodeNr,
        name: &[u8],
    ) -> Result<Option<EntryTarget>, FsError> {
        self.view(|batch| {
            inode::load_directory(batch, directory)?;
            Ok(directory::find(batch, directory, name)?.map(|entry| entry.target))
        })
        .await
    }

    /// The directory that holds a directory of this shard.
    pub(super) async fn parent_here(&self, directory: InodeNr) -> Result<InodeNr, FsError> {
        self.view(|batch| Ok(inode::load_directory(batch, directory)?.parent)).await
    }

    /// Serves a listing.
    pub(super) async fn read_directory(
        &self,
        inode: InodeNr,
        after: u64,
        limit: u32,
    ) -> Result<Vec<DirectoryEntry>, FsError> {
        let limit = limit.min(MAX_LISTING) as usize;
        let held = self.lock_shared(inode).await;
        let listed = self.view(|batch| list_all(batch, inode, after, limit)).await;
        self.unlock_one(held);
        listed
    }

    /// Serves `readlink(2)`.
    pub(super) async fn read_link(&self, inode: InodeNr) -> Result<Vec<u8>, FsError> {
        self.view(|batch| {
            if inode::load(batch, inode)?.kind != FileKind::Symlink {
                return Err(FsError::Invalid.into());
            }
            let target = batch.get(&symlink_key(inode))?;
            Ok(target.ok_or_else(|| FsError::Damaged {
                what: "a symbolic link has no target".to_owned(),
                block: None,
                inode: Some(inode),
            })?)
        })
        .await
    }

    /// Takes lookups back; the last of an inode without a name lets it be deleted.
    pub(super) fn forget(self: &Rc<Self>, inode: InodeNr, lookups: u64) {
        let Some(state) = self.inode_in_use(inode) else { return };
        let left = state.lookups.get().saturating_sub(lookups);
        state.lookups.set(left);
        drop(state);
        if left == 0 {
            self.forgotten(inode);
        }
    }
}

fn list_all(batch: &Batch<'_>, inode: InodeNr, after: u64, limit: usize) -> Plan<Vec<DirectoryEntry>> {
    let record = inode::load(batch, inode)?;
    if record.kind != FileKind::Directory {
        return Err(FsError::NotDirectory.into());
    }
    if record.links == 0 {
        return Ok(Vec::new());
    }
    let own = [(COOKIE_SELF, inode, &b"."[..]), (COOKIE_PARENT, record.parent, b"..")];
    let own = own.into_iter().filter(|(cookie, ..)| *cookie > after).take(limit);
    let mut listed: Vec<DirectoryEntry> = own
        .map(|(cookie, inode, name)| DirectoryEntry {
            inode,
            kind: FileKind::Directory,
            name: name.into(),
            cookie,
        })
        .collect();
    listed.extend(directory::list(batch, inode, after, limit - listed.len())?);
    Ok(listed)
}
