//! Attributes of inodes, extended ones included.
//!
//! Owns: the requests: `stat(2)`, and `chmod`, `chown`, `utimensat`, `truncate` as one change of attributes, and the `xattr` family.
//!
//! | what changes | change time | modification time |
//! |---|---|---|
//! | anything, or nothing at all | now | as asked |
//! | the size, even to what it was | now | now, unless asked otherwise |
//!
//! Invariant: what the kernel is told includes writes that were accepted and are not on the device yet.
//!
//! Excludes: who may change what (the kernel's), access times of reads (the kernel's `relatime` policy sets them), the
//! extents behind a new size (`crate::data`).

use std::rc::Rc;

use reactor::WallTime;

use crate::error::FsError;
use crate::format::items::InodeRecord;
use crate::request::{AttributeChange, Attributes, FileKind, KillPrivileges, Name, SetXattrMode, TimeChange};
use crate::shard::Shard;
use crate::shard::transact::Credit;
use crate::types::InodeNr;

use super::{inode, xattr};

/// Items that a change of attributes touches.
const ATTRIBUTE_ITEMS: u32 = 1;

fn time_of(change: TimeChange, now: WallTime) -> WallTime {
    match change {
        TimeChange::Now => now,
        TimeChange::To(time) => time,
    }
}

/// Applies all of `change` but the size itself.
fn apply(record: &mut InodeRecord, change: &AttributeChange, now: WallTime) {
    if let Some(permissions) = change.permissions {
        record.permissions = permissions & 0o7777;
    }
    if change.kill_privileges == KillPrivileges::Drop && record.kind == FileKind::Regular {
        record.permissions = inode::without_privileges(record.permissions);
    }
    record.uid = change.uid.unwrap_or(record.uid);
    record.gid = change.gid.unwrap_or(record.gid);
    if let Some(accessed) = change.accessed {
        record.accessed = time_of(accessed, now);
    }
    match change.modified {
        Some(modified) => record.modified = time_of(modified, now),
        None if change.size.is_some() => record.modified = now,
        None => {}
    }
    record.changed = now;
}

impl Shard {
    /// Attributes of an inode of this shard.
    pub(crate) async fn attributes_of(&self, inode: InodeNr) -> Result<Attributes, FsError> {
        let record = self.view(|batch| inode::load(batch, inode)).await?;
        Ok(self.visible(inode, &record))
    }

    fn visible(&self, inode: InodeNr, record: &InodeRecord) -> Attributes {
        let mut attributes = inode::attributes(inode, record);
        if record.kind == FileKind::Regular
            && let Some(state) = self.inode_in_use(inode)
        {
            state.data.borrow().overlay(&mut attributes);
        }
        attributes
    }

    /// Changes attributes.
    pub(super) async fn set_attributes(
        self: &Rc<Self>,
        inode: InodeNr,
        change: AttributeChange,
    ) -> Result<Attributes, FsError> {
        if let Some(size) = change.size {
            self.resize(inode, size).await?;
        }
        let locks = self.lock(self.new_transaction(), [inode]).await?;
        let changed = self.set_attributes_locked(inode, &change).await;
        let attributes = changed.map(|record| self.visible(inode, &record));
        self.unlock(locks).await;
        attributes
    }

    async fn set_attributes_locked(
        self: &Rc<Self>,
        inode: InodeNr,
        change: &AttributeChange,
    ) -> Result<InodeRecord, FsError> {
        // A truncation must succeed on a full volume, the rest of it included.
        let credit = match change.size {
            Some(_) => Credit::reserve(ATTRIBUTE_ITEMS),
            None => Credit::normal(ATTRIBUTE_ITEMS),
        };
        let state = self.inode(inode);
        let (record, version) = self
            .transact(credit, |batch| {
                let mut record = inode::load(batch, inode)?;
                // What earlier writes did to the record comes before, also if it was not stored yet.
                let unsynced = state.data.borrow().unsynced;
                unsynced.fold_into(&mut record);
                apply(&mut record, change, batch.now());
                inode::store(batch, inode, &record);
                Ok((record, unsynced.version))
            })
            .await?;
        state.data.borrow_mut().synced(version);
        Ok(record)
    }

    async fn resize(self: &Rc<Self>, inode: InodeNr, size: u64) -> Result<(), FsError> {
        let record = self.view(|batch| inode::load(batch, inode)).await?;
        match record.kind {
            FileKind::Regular => self.set_size(inode, size).await,
            FileKind::Directory => Err(FsError::IsDirectory),
            _ => Err(FsError::Invalid),
        }
    }

    /// Serves `getxattr(2)`.
    pub(super) async fn get_xattr(&self, inode: InodeNr, name: Name) -> Result<Vec<u8>, FsError> {
        xattr::check_name(&name)?;
        self.view(|batch| xattr::get(batch, inode, &name)).await
    }

    /// Serves `listxattr(2)`.
    pub(super) async fn list_xattr(&self, inode: InodeNr) -> Result<Vec<u8>, FsError> {
        self.view(|batch| xattr::list(batch, inode)).await
    }

    /// Serves `setxattr(2)`.
    pub(super) async fn set_xattr(
        self: &Rc<Self>,
        inode: InodeNr,
        name: Name,
        value: Box<[u8]>,
        mode: SetXattrMode,
    ) -> Result<(), FsError> {
        xattr::check_name(&name)?;
        xattr::check_value(&value)?;
        self.transact(Credit::normal(xattr::XATTR_ITEMS), |batch| {
            xattr::set(batch, inode, &name, &value, mode)
        })
        .await
    }

    /// Serves `removexattr(2)`.
    pub(super) async fn remove_xattr(self: &Rc<Self>, inode: InodeNr, name: Name) -> Result<(), FsError> {
        xattr::check_name(&name)?;
        self.transact(Credit::normal(xattr::XATTR_ITEMS), |batch| xattr::remove(batch, inode, &name)).await
    }
}
