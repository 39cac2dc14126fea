//! Hard links.
//!
//! Owns: `link(2)`. The inode may live on another shard than the directory of its new name.

use std::rc::Rc;

use crate::alloc::Priority;
use crate::error::FsError;
use crate::format::items::EntryTarget;
use crate::request::{Attributes, FileKind, Name};
use crate::shard::Shard;
use crate::types::InodeNr;

use super::change::{Change, MAX_LINKS};
use super::create::check_new_name;
use super::lockset::Locks;

impl Shard {
    /// Gives an inode one more name; counts one lookup.
    pub(super) async fn link(
        self: &Rc<Self>,
        inode: InodeNr,
        new_parent: InodeNr,
        new_name: Name,
    ) -> Result<Attributes, FsError> {
        check_new_name(&new_name)?;
        let locks = self.lock(self.new_transaction(), [inode, new_parent]).await?;
        let linked = self.link_locked(&locks, inode, new_parent, new_name).await;
        self.unlock(locks).await;
        linked
    }

    async fn link_locked(
        self: &Rc<Self>,
        locks: &Locks,
        inode: InodeNr,
        directory: InodeNr,
        name: Name,
    ) -> Result<Attributes, FsError> {
        let record = locks.record(inode)?;
        if self.find(directory, &name).await?.is_some() {
            return Err(FsError::Exists);
        }
        if record.kind == FileKind::Directory {
            return Err(FsError::NotPermitted);
        }
        if record.links == 0 {
            return Err(FsError::NotFound);
        }
        if record.links >= MAX_LINKS {
            return Err(FsError::TooManyLinks);
        }
        let target = EntryTarget { inode, kind: record.kind };
        let changes = vec![Change::InsertEntry { directory, name, target }, Change::AddLink { inode }];
        self.commit_changes(locks.transaction(), changes, Priority::Normal).await?;
        self.enter(inode).await
    }
}
