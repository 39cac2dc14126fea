//! A shard's part in the intent log: gathering what an epoch changes, and doing it again after a crash.
//!
//! Owns: [`ShardLog`], the records of the epoch that is open; [`LogCut`], those of one that has ended; the replay.
//!
//! A record is made where a transaction is applied, so their order is the transactions'. An epoch whose records would
//! be more than the log takes, or that changed what records do not tell (the owner of a group), cannot be logged: a
//! checkpoint makes it durable.
//!
//! **Replay** puts the items of the logged epochs into the tree that the superblock names, in memory. First all data
//! blocks that the log says are in use are taken, so that no new tree node is placed on one. The device is
//! changed by the checkpoint that follows only, so a crash in between changes nothing.
//!
//! Excludes: the log itself (`crate::log`), the end of epochs ([`super::epoch`]).

use std::cell::RefCell;

use crate::alloc::Priority;
use crate::batch::Changes;
use crate::error::FsError;
use crate::format::log::{Record, RecordWriter, Section, records};
use crate::tree::Key;
use crate::types::{BlockCount, BlockNr};

use super::Shard;
use super::transact::Credit;

/// Items that one transaction of a replay puts. Few, so that a full volume has the space for their nodes.
const REPLAY_ITEMS: usize = 16;

/// What one epoch has changed on a shard so far.
#[derive(Debug, Default)]
pub(crate) struct ShardLog {
    open: RefCell<Open>,
}

#[derive(Debug, Default)]
struct Open {
    records: RecordWriter,
    /// Not everything is in the records.
    incomplete: bool,
}

/// What an epoch has changed on a shard.
#[derive(Debug)]
pub(crate) struct LogCut {
    /// The changes; `None` if they cannot be logged.
    pub(crate) section: Option<Section>,
}

impl ShardLog {
    /// Notes changes that are being applied; no more than `limit` bytes of them are kept.
    pub(crate) fn note(&self, changes: &Changes, limit: usize) {
        let mut open = self.open.borrow_mut();
        if open.incomplete {
            return;
        }
        let records = &mut open.records;
        changes.items().for_each(|(key, value)| records.item(key, value));
        changes.committed.iter().for_each(|(start, count)| records.used(*start, *count));
        changes.freed.iter().for_each(|(start, count)| records.freed(*start, *count));
        if records.len() > limit {
            open.incomplete = true;
            open.records.take();
        }
    }

    /// Notes a change that records do not tell.
    pub(crate) fn note_untold(&self) {
        let mut open = self.open.borrow_mut();
        open.incomplete = true;
        open.records.take();
    }

    /// Ends the epoch: its records, if they tell all. The next one begins without any.
    pub(crate) fn cut(&self) -> Option<Vec<u8>> {
        let mut open = self.open.take();
        (!open.incomplete).then(|| open.records.take())
    }
}

impl Shard {
    /// Does again what the log says this shard has changed since the superblock.
    ///
    /// # Errors
    /// [`FsError::Damaged`] if it cannot be so; [`FsError::NoSpace`]; the device's.
    pub(crate) async fn replay(&self, sections: Vec<Section>) -> Result<(), FsError> {
        for record in sections.iter().flat_map(|section| records(&section.records)) {
            if let Record::Used(start, count) = record.map_err(|error| damaged(error.to_string(), None))?
                && !self.alloc.borrow_mut().claim(start, count)
            {
                let what = format!("the intent log uses blocks {start} + {count}, which are not free");
                return Err(damaged(what, Some(start)));
            }
        }
        for section in &sections {
            self.replay_section(section).await?;
        }
        Ok(())
    }

    async fn replay_section(&self, section: &Section) -> Result<(), FsError> {
        let mut items: Vec<(Key, Option<&[u8]>)> = Vec::new();
        for record in records(&section.records) {
            match record.map_err(|error| damaged(error.to_string(), None))? {
                Record::Put(key, value) => items.push((key, Some(value))),
                Record::Delete(key) => items.push((key, None)),
                Record::Used(start, count) => self.alloc.borrow_mut().commit_data(start, count),
                Record::Freed(start, count) => self.replay_freed(start, count)?,
            }
            if items.len() == REPLAY_ITEMS {
                self.replay_items(&std::mem::take(&mut items)).await?;
            }
        }
        self.replay_items(&items).await?;
        self.next_inode.set(section.next_inode);
        self.inode_count.set(section.inodes);
        Ok(())
    }

    fn replay_freed(&self, start: BlockNr, count: BlockCount) -> Result<(), FsError> {
        let freed = self.alloc.borrow_mut().free(start, count);
        freed.map_err(|error| {
            damaged(format!("the intent log frees what is not in use: {error}"), Some(start))
        })
    }

    async fn replay_items(&self, items: &[(Key, Option<&[u8]>)]) -> Result<(), FsError> {
        let credit = Credit::reserve(items.len() as u32);
        // Not by way of the search for space: that would ask for a checkpoint, which there must not be yet.
        let nodes = self.nodes_for(credit.items);
        let mut space = self.counter.reserve(0, nodes, Priority::Reserve).ok_or(FsError::NoSpace)?;
        self.transact_with(&mut space, |batch| {
            for (key, value) in items {
                match value {
                    Some(value) => batch.put(*key, value.to_vec()),
                    None => batch.delete(*key),
                }
            }
            Ok(())
        })
        .await
    }
}

fn damaged(what: String, block: Option<BlockNr>) -> FsError {
    FsError::Damaged { what, block, inode: None }
}
