//! One shard's items in key order: what can be said of each inode on its own.
//!
//! Owns: [`Scan`], which takes a shard's items as the walk yields them, checks each against its key and each inode
//! against its record, and passes on what can only be judged with other shards' items: names, references, runs.
//! It holds one inode at a time.
//!
//! Excludes: reading nodes, links between inodes (`names.rs`).

use crate::format::extent::{self, BACKREF, Backref, EXTENT, Extent, ExtentKind, RETURN, RUN, Return, Run};
use crate::format::items::{
    DIR_HASH, DIR_SEQ, FIRST_SEQUENCE, HashEntry, INODE, INTENT, InodeRecord, Intent, SYMLINK, SequenceEntry,
    XATTR, Xattr,
};
use crate::format::node::Key;
use crate::namespace::directory::name_hash;
use crate::request::FileKind;
use crate::types::{BLOCK_SIZE, BlockNr, Generation, InodeNr, ShardId};

use super::finding::{Finding, Findings, User};
use super::lending::{Accounts, Loan};
use super::names::{InodeSummary, Intents, NameReference, Names};
use super::pairs::{DigestKey, Pairs, Reference, SetDigest};
use super::physical::{RunNature, Sweep};
use super::space::SpaceMap;
use super::{Counts, DataCheck};

/// What scans of all shards add to.
pub(super) struct Tables<'a> {
    pub(super) findings: &'a mut Findings,
    pub(super) space: &'a mut SpaceMap,
    pub(super) names: &'a mut Names,
    pub(super) pairs: &'a mut Pairs,
    pub(super) loans: &'a mut Accounts,
    pub(super) shards: u8,
    pub(super) counts: &'a mut Counts,
    /// Directories of which the two kinds of entries differ.
    pub(super) differing: &'a mut Vec<InodeNr>,
    pub(super) key: &'a DigestKey,
    pub(super) hash_seed: &'a [u8; 16],
    pub(super) data: DataCheck,
}

/// A run whose data is to be verified.
pub(super) struct DataRun {
    pub(super) start: BlockNr,
    pub(super) checksums: Vec<u32>,
}

/// The inode whose items are being scanned.
struct OpenInode {
    nr: InodeNr,
    record: Option<InodeRecord>,
    /// The record is there and could not be decoded.
    damaged: bool,
    symlink: Option<u64>,
    attribute_names: u64,
    extents_end: u64,
    blocks: u64,
    /// First extent with data that reaches behind the end.
    behind_end: Option<u64>,
    by_hash: SetDigest,
    by_sequence: SetDigest,
    entries: u64,
    names_bytes: u64,
    subdirectories: u64,
}

/// See the module documentation.
pub(super) struct Scan {
    shard: ShardId,
    open: Option<OpenInode>,
    sweep: Sweep,
    intents: Intents,
    pub(super) data_runs: Vec<DataRun>,
    pub(super) inodes: u64,
    pub(super) highest: Option<InodeNr>,
}

impl Scan {
    pub(super) fn new(shard: ShardId) -> Self {
        Self {
            shard,
            open: None,
            sweep: Sweep::new(shard),
            intents: Intents::default(),
            data_runs: Vec::new(),
            inodes: 0,
            highest: None,
        }
    }

    /// Takes the next item.
    pub(super) fn item(&mut self, key: Key, value: &[u8], tables: &mut Tables<'_>) {
        tables.counts.items += 1;
        if let Some(start) = extent::physical_block(&key) {
            self.close(tables);
            self.physical_item(key, start, value, tables);
        } else if key.object == 0 {
            self.intent_item(key, value, tables);
        } else {
            self.inode_item(key, value, tables);
        }
    }

    /// Ends the scan.
    pub(super) fn finish(mut self, tables: &mut Tables<'_>) -> (u64, Option<InodeNr>) {
        self.close(tables);
        self.sweep.finish(tables.findings);
        tables.names.intents(self.shard, self.intents);
        (self.inodes, self.highest)
    }

    fn stray(&self, key: Key, tables: &mut Tables<'_>) {
        tables.findings.add(Finding::StrayItem { shard: self.shard, key });
    }

    fn intent_item(&mut self, key: Key, value: &[u8], tables: &mut Tables<'_>) {
        if key.kind == RETURN {
            return self.return_item(key, value, tables);
        }
        if key.kind != INTENT {
            tables.findings.add(Finding::UnknownItem { shard: self.shard, key });
            return;
        }
        let inode = InodeNr::new(key.offset);
        match Intent::decode(value) {
            Ok(intent)
                if inode.shard() == self.shard && crate::format::items::intent_key(inode, intent) == key =>
            {
                tables.counts.intents += 1;
                self.intents.add(inode, intent);
            }
            Ok(_) => self.stray(key, tables),
            Err(error) => tables.findings.add(Finding::Item { shard: self.shard, key, error }),
        }
    }

    fn return_item(&mut self, key: Key, value: &[u8], tables: &mut Tables<'_>) {
        let decoded = Return::decode(value).and_then(|back| {
            let (lender, start) = extent::return_of_key(&key, back.blocks)?;
            Ok((lender, start, back))
        });
        match decoded {
            Ok((lender, start, back)) => {
                self.borrowed(key, lender, (start, back.blocks.get()), back.generation, tables);
            }
            Err(error) => tables.findings.add(Finding::ExtentItem { shard: self.shard, key, error }),
        }
    }

    /// This shard says that it has borrowed blocks.
    fn borrowed(
        &self,
        key: Key,
        lender: ShardId,
        blocks: (BlockNr, u64),
        generation: Generation,
        tables: &mut Tables<'_>,
    ) {
        if lender == self.shard || lender.get() >= tables.shards {
            return tables.findings.add(Finding::StrayLoan { shard: self.shard, key });
        }
        let (borrower, group) = (self.shard, tables.space.group_of(blocks.0));
        let loan = Loan { lender, borrower, group, start: blocks.0, blocks: blocks.1, generation };
        tables.loans.borrowed(tables.key, &loan);
    }

    fn physical_item(&mut self, key: Key, start: BlockNr, value: &[u8], tables: &mut Tables<'_>) {
        let shard = self.shard;
        if key.kind == RUN {
            if key.offset != 0 || key.minor != 0 {
                return self.stray(key, tables);
            }
            match Run::decode(value) {
                Ok(run) => {
                    tables.counts.runs += 1;
                    let preallocated = u64::from(run.kind() == ExtentKind::Preallocated);
                    let nature = RunNature { generation: run.generation.get(), preallocated };
                    self.sweep.run(start, run.blocks, run.references, nature, tables.findings);
                    let inside = match run.lender {
                        Some(lender) => {
                            let blocks = (start, run.blocks.get());
                            self.borrowed(key, lender, blocks, run.generation, tables);
                            tables.space.holds(start, run.blocks)
                        }
                        None => tables.space.mark(start, run.blocks, User::Run(shard), tables.findings),
                    };
                    // Borrowed blocks, too: their borrower reads them by checksums of its own.
                    if tables.data == DataCheck::Verify && inside && preallocated == 0 {
                        self.data_runs.push(DataRun { start, checksums: run.checksums });
                    }
                }
                Err(error) => tables.findings.add(Finding::ExtentItem { shard, key, error }),
            }
        } else if key.kind == BACKREF {
            match Backref::decode(value) {
                Ok(backref) => {
                    let nature = self.sweep.backref(start, backref.blocks, tables.findings);
                    tables.pairs.add_backref(&Reference {
                        inode: InodeNr::new(key.offset),
                        offset: key.minor,
                        start,
                        blocks: backref.blocks,
                        generation: nature.generation,
                        preallocated: nature.preallocated,
                    });
                }
                Err(error) => tables.findings.add(Finding::ExtentItem { shard, key, error }),
            }
        } else {
            tables.findings.add(Finding::UnknownItem { shard, key });
        }
    }

    fn inode_item(&mut self, key: Key, value: &[u8], tables: &mut Tables<'_>) {
        let nr = InodeNr::new(key.object);
        if self.open.as_ref().is_none_or(|open| open.nr != nr) {
            self.close(tables);
            self.open = Some(OpenInode::new(nr));
        }
        let single = key.kind == INODE || key.kind == SYMLINK;
        let borrower = extent::borrower_of(nr);
        if (extent::owner_of_set_aside(nr).is_some() || borrower.is_some()) && key.kind != EXTENT {
            return self.stray(key, tables);
        }
        if let Some(borrower) = borrower {
            self.lent(key, value, borrower, tables);
        }
        if borrower.is_none() && nr.shard() != self.shard || key.minor != 0 || single && key.offset != 0 {
            return self.stray(key, tables);
        }
        let Some(open) = self.open.as_mut() else { return };
        let result = match key.kind {
            INODE => open.record_item(value),
            SYMLINK => {
                open.symlink = Some(value.len() as u64);
                Ok(())
            }
            XATTR => open.attribute_item(key, value, tables),
            DIR_HASH => open.hash_item(key, value, tables),
            DIR_SEQ => open.sequence_item(key, value, tables),
            EXTENT => {
                open.extent_item(self.shard, key, value, tables);
                Ok(())
            }
            _ => {
                tables.findings.add(Finding::UnknownItem { shard: self.shard, key });
                Ok(())
            }
        };
        if let Err(error) = result {
            tables.findings.add(Finding::Item { shard: self.shard, key, error });
        }
        let wanted = match key.kind {
            SYMLINK => Some(FileKind::Symlink),
            DIR_HASH | DIR_SEQ => Some(FileKind::Directory),
            EXTENT => Some(FileKind::Regular),
            _ => None,
        };
        if let (Some(wanted), Some(record)) = (wanted, &open.record)
            && record.kind != wanted
        {
            tables.findings.add(Finding::WrongItem { inode: nr, kind: record.kind, key });
        }
    }

    /// This shard says that it has lent the blocks of an extent. What cannot be decoded is named with the extent.
    fn lent(&self, key: Key, value: &[u8], borrower: ShardId, tables: &mut Tables<'_>) {
        let Ok(extent) = Extent::decode(value) else { return };
        let (start, blocks, generation) = (extent.start, extent.blocks.get(), extent.generation);
        let possible = borrower != self.shard
            && borrower.get() < tables.shards
            && key.offset == extent::lent_offset(start)
            && extent.kind == ExtentKind::Data;
        if !possible {
            return tables.findings.add(Finding::StrayLoan { shard: self.shard, key });
        }
        let (lender, group) = (self.shard, tables.space.group_of(start));
        tables.loans.lent(tables.key, &Loan { lender, borrower, group, start, blocks, generation });
    }

    /// All items of the inode have been seen.
    fn close(&mut self, tables: &mut Tables<'_>) {
        let Some(open) = self.open.take() else { return };
        if extent::borrower_of(open.nr).is_some() {
            return;
        }
        if open.nr.shard() != self.shard {
            return;
        }
        if let Some(owner) = extent::owner_of_set_aside(open.nr) {
            if !self.intents.sets_aside(owner) {
                tables.findings.add(Finding::SetAside { shard: self.shard, inode: owner });
            }
            return;
        }
        let Some(record) = &open.record else {
            if open.damaged {
                self.inodes += 1;
                tables.names.unknown(open.nr);
            } else {
                tables.findings.add(Finding::NoInode { shard: self.shard, inode: open.nr });
            }
            return;
        };
        self.inodes += 1;
        self.highest = Some(open.nr);
        tables.counts.inodes += 1;
        let unfinished =
            self.intents.truncates(open.nr) || self.intents.clones(open.nr) || self.intents.shifts(open.nr);
        open.check(record, unfinished, tables);
        tables.names.inode(InodeSummary {
            nr: open.nr,
            kind: record.kind,
            links: record.links,
            parent: record.parent,
            subdirectories: open.subdirectories,
        });
    }
}

impl OpenInode {
    fn new(nr: InodeNr) -> Self {
        Self {
            nr,
            record: None,
            damaged: false,
            symlink: None,
            attribute_names: 0,
            extents_end: 0,
            blocks: 0,
            behind_end: None,
            by_hash: SetDigest::default(),
            by_sequence: SetDigest::default(),
            entries: 0,
            names_bytes: 0,
            subdirectories: 0,
        }
    }

    fn record_item(&mut self, value: &[u8]) -> Result<(), crate::format::items::ItemError> {
        self.damaged = true;
        self.record = Some(InodeRecord::decode(value)?);
        self.damaged = false;
        Ok(())
    }

    fn attribute_item(
        &mut self,
        key: Key,
        value: &[u8],
        tables: &mut Tables<'_>,
    ) -> Result<(), crate::format::items::ItemError> {
        for attribute in Xattr::decode_chain(value)? {
            self.attribute_names += attribute.name.len() as u64 + 1;
            self.check_hash(key, &attribute.name, tables);
        }
        Ok(())
    }

    fn hash_item(
        &mut self,
        key: Key,
        value: &[u8],
        tables: &mut Tables<'_>,
    ) -> Result<(), crate::format::items::ItemError> {
        for entry in HashEntry::decode_chain(value)? {
            self.check_hash(key, &entry.name, tables);
            let numbers = [entry.sequence, entry.target.inode.get(), entry.target.kind as u64];
            self.by_hash.add(tables.key, &numbers, &entry.name);
        }
        Ok(())
    }

    fn sequence_item(
        &mut self,
        key: Key,
        value: &[u8],
        tables: &mut Tables<'_>,
    ) -> Result<(), crate::format::items::ItemError> {
        let (directory, sequence) = (self.nr, key.offset);
        let entry = SequenceEntry::decode(value)?;
        let numbers = [sequence, entry.target.inode.get(), entry.target.kind as u64];
        self.by_sequence.add(tables.key, &numbers, &entry.name);
        self.entries += 1;
        self.names_bytes += entry.name.len() as u64;
        self.subdirectories += u64::from(entry.target.kind == FileKind::Directory);
        tables.counts.entries += 1;
        if let Some(next) = self.record.as_ref().map(|record| record.next_sequence)
            && !(FIRST_SEQUENCE..next).contains(&sequence)
        {
            tables.findings.add(Finding::EntrySequence { directory, sequence, next });
        }
        tables.names.reference(NameReference {
            target: entry.target.inode,
            directory,
            kind: entry.target.kind,
        });
        Ok(())
    }

    fn extent_item(&mut self, shard: ShardId, key: Key, value: &[u8], tables: &mut Tables<'_>) {
        let (inode, offset) = (self.nr, key.offset);
        let extent = match Extent::decode(value).and_then(|extent| {
            extent::check_extent_offset(offset, extent.blocks)?;
            Ok(extent)
        }) {
            Ok(extent) => extent,
            Err(error) => return tables.findings.add(Finding::ExtentItem { shard, key, error }),
        };
        tables.counts.extents += 1;
        if offset < self.extents_end {
            tables.findings.add(Finding::ExtentOverlap { inode, offset });
        }
        let end = offset + extent.blocks.get() * BLOCK_SIZE;
        self.extents_end = self.extents_end.max(end);
        self.blocks += extent.blocks.get();
        let size = self.record.as_ref().map_or(u64::MAX, |record| record.size);
        let preallocated = u64::from(extent.kind == ExtentKind::Preallocated);
        if preallocated == 0 && end > size.checked_next_multiple_of(BLOCK_SIZE).unwrap_or(u64::MAX) {
            self.behind_end.get_or_insert(offset);
        }
        tables.pairs.add_extent(&Reference {
            inode,
            offset,
            start: extent.start,
            blocks: extent.blocks,
            generation: extent.generation.get(),
            preallocated,
        });
    }

    fn check_hash(&self, key: Key, name: &[u8], tables: &mut Tables<'_>) {
        if name_hash(tables.hash_seed, name) != key.offset {
            let name = String::from_utf8_lossy(name).into_owned();
            tables.findings.add(Finding::NameHash { inode: self.nr, name });
        }
    }

    /// Compares the record with what was counted. An inode that is being deleted may have lost part of its items.
    fn check(&self, record: &InodeRecord, unfinished: bool, tables: &mut Tables<'_>) {
        let (inode, size) = (self.nr, record.size);
        let mut add = |finding| tables.findings.add(finding);
        if record.blocks != self.blocks {
            add(Finding::InodeBlocks { inode, stored: record.blocks, counted: self.blocks });
        }
        let named = record.links > 0;
        if let Some(offset) = self.behind_end.filter(|_| named && !unfinished) {
            add(Finding::ExtentBehindEnd { inode, offset, size });
        }
        if named && u64::from(record.xattr_names) != self.attribute_names {
            let (stored, counted) = (record.xattr_names, self.attribute_names);
            add(Finding::AttributeNames { inode, stored, counted });
        }
        if record.kind == FileKind::Symlink && self.symlink != Some(size) {
            add(Finding::SymlinkTarget { inode, size, length: self.symlink });
        }
        if record.kind == FileKind::Directory {
            if record.entries != self.entries {
                add(Finding::EntryCount { directory: inode, stored: record.entries, counted: self.entries });
            }
            if size != self.names_bytes {
                add(Finding::DirectorySize { directory: inode, stored: size, counted: self.names_bytes });
            }
            if self.by_hash != self.by_sequence {
                tables.differing.push(inode);
            }
        }
    }
}
