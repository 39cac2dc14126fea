//! Plans on inode records, and attributes made of them.
//!
//! Owns: reading and writing [`InodeRecord`]s through a batch, and [`attributes`].
//! Invariant: a record is read, changed and put back within one plan, so no change is ever lost.
//!
//! Excludes: volatile state (the shard's inode table), sizes of dirty files (overlaid by the data path).

use crate::batch::{Batch, Plan};
use crate::error::FsError;
use crate::format::items::{InodeRecord, Intent, inode_key, intent_key};
use crate::request::{Attributes, FileKind};
use crate::types::{BLOCK_SIZE, InodeNr};

/// Units of `st_blocks`, in bytes.
const SECTOR: u64 = 512;

/// Set-user-id bit of a mode.
const SET_USER_ID: u16 = 0o4000;
/// Set-group-id bit of a mode.
const SET_GROUP_ID: u16 = 0o2000;
/// Execution by the group: without it the set-group-id bit means mandatory locking, and stays.
const GROUP_EXECUTE: u16 = 0o0010;

/// The record of `inode`, if it exists.
pub(crate) fn find(batch: &Batch<'_>, inode: InodeNr) -> Plan<Option<InodeRecord>> {
    let Some(value) = batch.get(&inode_key(inode))? else { return Ok(None) };
    Ok(Some(InodeRecord::decode(&value).map_err(|error| error.of("inode", inode))?))
}

/// The record of `inode`.
///
/// # Errors
/// [`FsError::NotFound`] if there is none.
pub(crate) fn load(batch: &Batch<'_>, inode: InodeNr) -> Plan<InodeRecord> {
    find(batch, inode)?.ok_or_else(|| FsError::NotFound.into())
}

/// As [`load`], of a directory that is linked into the tree.
///
/// # Errors
/// [`FsError::NotDirectory`]; [`FsError::NotFound`] also of a removed directory.
pub(crate) fn load_directory(batch: &Batch<'_>, directory: InodeNr) -> Plan<InodeRecord> {
    let record = load(batch, directory)?;
    if record.kind != FileKind::Directory {
        return Err(FsError::NotDirectory.into());
    }
    if record.links == 0 {
        return Err(FsError::NotFound.into());
    }
    Ok(record)
}

/// Puts a record back.
pub(crate) fn store(batch: &mut Batch<'_>, inode: InodeNr, record: &InodeRecord) {
    batch.put(inode_key(inode), record.encode());
}

/// Notes an intent for `inode`.
pub(crate) fn put_intent(batch: &mut Batch<'_>, inode: InodeNr, intent: Intent) {
    batch.put(intent_key(inode, intent), intent.encode());
}

/// What `stat(2)` tells of a record; sizes and times of unwritten data are not in it.
pub(crate) fn attributes(inode: InodeNr, record: &InodeRecord) -> Attributes {
    Attributes {
        inode,
        kind: record.kind,
        permissions: record.permissions,
        links: record.links,
        uid: record.uid,
        gid: record.gid,
        device: record.device,
        size: record.size,
        sectors: record.blocks.saturating_mul(BLOCK_SIZE / SECTOR),
        accessed: record.accessed,
        modified: record.modified,
        changed: record.changed,
        created: record.created,
        generation: record.generation.get(),
    }
}

/// The permissions that are left when an unprivileged caller has changed a file.
pub(crate) fn without_privileges(permissions: u16) -> u16 {
    let group = if permissions & GROUP_EXECUTE != 0 { SET_GROUP_ID } else { 0 };
    permissions & !(SET_USER_ID | group)
}
