//! Changes: what an operation does to the items of one inode, as a value.
//!
//! Owns: [`Change`] and [`plan_changes`], the plan that carries a list of them out. An operation decides, under its
//! locks, on a list of changes; each belongs to the shard of its inode, and the list of a shard is one transaction
//! there, alone or as part of a transaction that spans shards.
//!
//! Invariants:
//! - a change reads and writes by point lookups of keys that the locks hold still ([`LendingChange`] says what else it
//!   relies on). So once its plan has been rehearsed and no node is evicted, it can neither miss a node nor fail;
//! - each change leaves its own shard's items consistent; the list as a whole keeps the counts between shards.
//!
//! Excludes: deciding (the operations), volatile state ([`Effects`] tells what has to follow).

use crate::batch::{Batch, Plan};
use crate::data::LendingChange;
use crate::error::FsError;
use crate::format::items::{EntryTarget, InodeRecord, Intent, symlink_key};
use crate::planted::{Bug, is_planted};
use crate::request::{FileKind, Name};
use crate::types::{InodeNr, ShardId};

use super::{directory, inode};

/// Most links an inode can have.
pub const MAX_LINKS: u32 = i32::MAX as u32;

/// A new inode, but for its number and its times.
#[derive(Clone, Debug)]
pub(crate) struct NewRecord {
    /// Kind.
    pub(crate) kind: FileKind,
    /// Lower 12 bits of the mode.
    pub(crate) permissions: u16,
    /// Owner.
    pub(crate) uid: u32,
    /// Group.
    pub(crate) gid: u32,
    /// Device number of device nodes.
    pub(crate) device: u32,
    /// Target of a symbolic link.
    pub(crate) target: Option<Box<[u8]>>,
    /// The directory it is born in.
    pub(crate) parent: InodeNr,
}

/// A step of a namespace operation.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    /// Adds an entry.
    InsertEntry {
        /// Directory.
        directory: InodeNr,
        /// Name.
        name: Name,
        /// What it names.
        target: EntryTarget,
    },
    /// Removes an entry that names `expected`.
    RemoveEntry {
        /// Directory.
        directory: InodeNr,
        /// Name.
        name: Name,
        /// What it names.
        expected: InodeNr,
    },
    /// Lets an entry that names `expected` name something else.
    ReplaceEntry {
        /// Directory.
        directory: InodeNr,
        /// Name.
        name: Name,
        /// What it names.
        expected: InodeNr,
        /// What it names afterwards.
        target: EntryTarget,
    },
    /// Makes an inode.
    CreateInode {
        /// Number, never used before.
        inode: InodeNr,
        /// The rest.
        new: NewRecord,
    },
    /// One more name for an inode that is not a directory.
    AddLink {
        /// Inode.
        inode: InodeNr,
    },
    /// One name less for an inode that is not a directory; the last makes it an orphan.
    DropLink {
        /// Inode.
        inode: InodeNr,
    },
    /// An empty directory loses its name and becomes an orphan.
    DropDirectory {
        /// Directory.
        directory: InodeNr,
    },
    /// A directory gains a subdirectory.
    AddSubdirectory {
        /// Directory.
        directory: InodeNr,
    },
    /// A directory loses a subdirectory.
    DropSubdirectory {
        /// Directory.
        directory: InodeNr,
    },
    /// A directory moves into another one.
    SetParent {
        /// Directory.
        directory: InodeNr,
        /// Where it lies from now on.
        parent: InodeNr,
    },
    /// The inode was renamed: its change time moves.
    Touch {
        /// Inode.
        inode: InodeNr,
    },
    /// Blocks change hands between shards.
    Lending(LendingChange),
}

impl Change {
    /// The shard that carries it out.
    pub(crate) fn shard(&self) -> ShardId {
        let inode = match self {
            Self::Lending(change) => return change.shard(),
            Self::InsertEntry { directory, .. }
            | Self::RemoveEntry { directory, .. }
            | Self::ReplaceEntry { directory, .. }
            | Self::DropDirectory { directory }
            | Self::AddSubdirectory { directory }
            | Self::DropSubdirectory { directory }
            | Self::SetParent { directory, .. } => *directory,
            Self::CreateInode { inode, .. }
            | Self::AddLink { inode }
            | Self::DropLink { inode }
            | Self::Touch { inode } => *inode,
        };
        inode.shard()
    }

    /// Items it changes at most.
    pub(crate) fn items(&self) -> u32 {
        match self {
            // Two items of the entry, and the directory's inode.
            Self::InsertEntry { .. } | Self::RemoveEntry { .. } | Self::ReplaceEntry { .. } => 3,
            // The inode, and a target or an intent.
            Self::CreateInode { .. } | Self::DropLink { .. } | Self::DropDirectory { .. } => 2,
            Self::AddLink { .. }
            | Self::AddSubdirectory { .. }
            | Self::DropSubdirectory { .. }
            | Self::SetParent { .. }
            | Self::Touch { .. } => 1,
            Self::Lending(change) => change.items(),
        }
    }
}

/// What has to follow in memory once changes are committed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Effects {
    /// Inodes made.
    pub(crate) created: u64,
    /// Inodes that lost their last name.
    pub(crate) orphans: Vec<InodeNr>,
}

/// Carries `changes` out, in their order.
///
/// # Errors
/// What stands against one of them; then the batch is not to be committed.
pub(crate) fn plan_changes(batch: &mut Batch<'_>, changes: &[Change]) -> Plan<Effects> {
    let mut effects = Effects::default();
    for change in changes {
        plan_change(batch, change, &mut effects)?;
    }
    Ok(effects)
}

fn plan_change(batch: &mut Batch<'_>, change: &Change, effects: &mut Effects) -> Plan<()> {
    match change {
        Change::InsertEntry { directory, name, target } => {
            directory::insert(batch, *directory, name, *target)
        }
        Change::RemoveEntry { directory, name, expected } => {
            directory::remove(batch, *directory, name, *expected)
        }
        Change::ReplaceEntry { directory, name, expected, target } => {
            directory::replace(batch, *directory, name, *expected, *target)
        }
        Change::CreateInode { inode, new } => {
            effects.created += 1;
            create_inode(batch, *inode, new)
        }
        Change::AddLink { inode } => add_link(batch, *inode),
        Change::DropLink { inode } => drop_link(batch, *inode, effects),
        Change::DropDirectory { directory } => drop_directory(batch, *directory, effects),
        Change::AddSubdirectory { directory } => {
            let mut record = inode::load_directory(batch, *directory)?;
            record.links = more_links(record.links)?;
            inode::store(batch, *directory, &record);
            Ok(())
        }
        Change::DropSubdirectory { directory } => {
            let mut record = inode::load_directory(batch, *directory)?;
            if record.links <= 2 {
                return Err(miscounted(*directory).into());
            }
            record.links -= 1;
            inode::store(batch, *directory, &record);
            Ok(())
        }
        Change::SetParent { directory, parent } => {
            let mut record = inode::load_directory(batch, *directory)?;
            record.parent = *parent;
            inode::store(batch, *directory, &record);
            Ok(())
        }
        Change::Touch { inode } => {
            let mut record = inode::load(batch, *inode)?;
            store_changed(batch, *inode, &mut record);
            Ok(())
        }
        Change::Lending(change) => change.plan(batch),
    }
}

fn create_inode(batch: &mut Batch<'_>, inode: InodeNr, new: &NewRecord) -> Plan<()> {
    if inode::find(batch, inode)?.is_some() {
        let what = "an inode number was to be used again".to_owned();
        return Err(FsError::Damaged { what, block: None, inode: Some(inode) }.into());
    }
    let mut record = InodeRecord::new(new.kind, new.permissions, new.uid, new.gid, batch.now());
    record.device = new.device;
    if new.kind == FileKind::Directory {
        record.parent = new.parent;
    }
    if let Some(target) = &new.target {
        record.size = target.len() as u64;
        batch.put(symlink_key(inode), target.to_vec());
    }
    inode::store(batch, inode, &record);
    Ok(())
}

fn add_link(batch: &mut Batch<'_>, inode: InodeNr) -> Plan<()> {
    let mut record = inode::load(batch, inode)?;
    if record.kind == FileKind::Directory {
        return Err(FsError::NotPermitted.into());
    }
    if record.links == 0 {
        return Err(FsError::NotFound.into());
    }
    record.links = more_links(record.links)?;
    store_changed(batch, inode, &mut record);
    Ok(())
}

fn drop_link(batch: &mut Batch<'_>, inode: InodeNr, effects: &mut Effects) -> Plan<()> {
    let mut record = inode::load(batch, inode)?;
    if record.kind == FileKind::Directory || record.links == 0 {
        return Err(miscounted(inode).into());
    }
    record.links -= 1;
    if record.links == 0 {
        if !is_planted(Bug::OrphanWithoutIntent) {
            inode::put_intent(batch, inode, Intent::Orphan);
        }
        effects.orphans.push(inode);
    }
    store_changed(batch, inode, &mut record);
    Ok(())
}

fn drop_directory(batch: &mut Batch<'_>, directory: InodeNr, effects: &mut Effects) -> Plan<()> {
    let mut record = inode::load_directory(batch, directory)?;
    if record.entries > 0 {
        return Err(FsError::NotEmpty.into());
    }
    if record.links != 2 {
        return Err(miscounted(directory).into());
    }
    record.links = 0;
    inode::put_intent(batch, directory, Intent::Orphan);
    effects.orphans.push(directory);
    store_changed(batch, directory, &mut record);
    Ok(())
}

fn more_links(links: u32) -> Result<u32, FsError> {
    if links >= MAX_LINKS { Err(FsError::TooManyLinks) } else { Ok(links + 1) }
}

fn store_changed(batch: &mut Batch<'_>, inode: InodeNr, record: &mut InodeRecord) {
    record.changed = batch.now();
    inode::store(batch, inode, record);
}

fn miscounted(inode: InodeNr) -> FsError {
    FsError::Damaged {
        what: "link count does not match the entries".to_owned(),
        block: None,
        inode: Some(inode),
    }
}
