//! Removing names.
//!
//! Owns: `unlink(2)` and `rmdir(2)`.
//!
//! The name is looked up, the directory and what it names are locked, and the name is looked up again: if it stands
//! for something else by now, all begins anew.

use std::rc::Rc;

use crate::alloc::Priority;
use crate::error::FsError;
use crate::format::items::EntryTarget;
use crate::request::{FileKind, Name};
use crate::shard::Shard;
use crate::types::InodeNr;

use super::change::Change;
use super::lockset::Locks;
use super::lookup::check_length;

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attempt {
    /// Done.
    Done,
    /// A name changed its meaning before it was locked: begin anew.
    Again,
}

/// What is to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Removal {
    /// Any name but a directory's.
    Unlink,
    /// An empty directory.
    Directory,
}

impl Shard {
    /// Removes a name.
    pub(super) async fn remove(
        self: &Rc<Self>,
        parent: InodeNr,
        name: Name,
        removal: Removal,
    ) -> Result<(), FsError> {
        check_length(&name)?;
        match (&*name, removal) {
            (b".", Removal::Directory) => return Err(FsError::Invalid),
            (b"..", Removal::Directory) => return Err(FsError::NotEmpty),
            (b"." | b"..", Removal::Unlink) => return Err(FsError::IsDirectory),
            _ => {}
        }
        loop {
            let target = self.find(parent, &name).await?.ok_or(FsError::NotFound)?;
            check_kind(target, removal)?;
            let locks = self.lock(self.new_transaction(), [parent, target.inode]).await?;
            let attempt = self.remove_locked(&locks, parent, &name, target).await;
            self.unlock(locks).await;
            if attempt? == Attempt::Done {
                return Ok(());
            }
        }
    }

    async fn remove_locked(
        self: &Rc<Self>,
        locks: &Locks,
        parent: InodeNr,
        name: &Name,
        target: EntryTarget,
    ) -> Result<Attempt, FsError> {
        if self.find(parent, name).await? != Some(target) {
            return Ok(Attempt::Again);
        }
        let mut changes =
            vec![Change::RemoveEntry { directory: parent, name: name.clone(), expected: target.inode }];
        if target.kind == FileKind::Directory {
            if locks.record(target.inode)?.entries > 0 {
                return Err(FsError::NotEmpty);
            }
            changes.push(Change::DropSubdirectory { directory: parent });
            changes.push(Change::DropDirectory { directory: target.inode });
        } else {
            changes.push(Change::DropLink { inode: target.inode });
        }
        self.commit_changes(locks.transaction(), changes, Priority::Reserve).await?;
        Ok(Attempt::Done)
    }
}

fn check_kind(target: EntryTarget, removal: Removal) -> Result<(), FsError> {
    match (target.kind == FileKind::Directory, removal) {
        (true, Removal::Unlink) => Err(FsError::IsDirectory),
        (false, Removal::Directory) => Err(FsError::NotDirectory),
        _ => Ok(()),
    }
}
