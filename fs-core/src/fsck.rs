//! The offline check: is every invariant of the format true of the volume on a device?
//!
//! Owns: [`check`], which reads everything and writes nothing, and its report.
//!
//! | pass | reads | checks |
//! |---|---|---|
//! | groups | every bitmap, the intent log | checksums, owners, the digest in the superblock |
//! | trees | every node of every shard, in key order | nodes against their parents; items against their keys; every inode against its record; runs against references; marks every block reached |
//! | details | the same again, if extents and back-references, or the two kinds of directory entries, differ | which ones |
//! | loans | memory | what is lent against what is borrowed, across shards |
//! | names | memory | links, kinds, parents, cycles, intents, across shards |
//! | space | every bitmap again | marked = reached |
//!
//! Memory: two digests of constant size for extents and back-references, 32 bytes an inode and 24 a name, one bit for
//! each block of groups in use.
//!
//! A volume that was not unmounted is clean: the superblock and its log describe a whole state, the one that the next mount
//! begins with. That state is checked: the log's items are laid over those of the trees, in memory, and its blocks over the
//! bitmaps (`crate::log::state`). Of a log that is damaged it is what comes before the damage, as for a mount.
//! What a crash may leave behind (a torn slot that nobody needs) is a note, not a finding.
//!
//! Every byte is input: nothing here panics on it, and every loop is bounded by what lies on the device.
//!
//! Excludes: repair.

mod finding;
mod lending;
mod names;
mod pairs;
mod physical;
mod scan;
mod space;

pub use finding::{Finding, MAX_FINDINGS, User};

use reactor::Context;

use crate::disk::{UnsupportedDevice, VolumeDisk};
use crate::format::extent::{self, BACKREF, Backref, EXTENT, Extent, ExtentKind, RUN, Run};
use crate::format::items::{DIR_HASH, DIR_SEQ, HashEntry, SequenceEntry};
use crate::format::node::{Expected, Key, NodeImage};
use crate::log::read_log;
use crate::log::state::{Replayed, read_image};
use crate::superblock::{self, Superblock, SuperblockError};
use crate::tree::{NODE_BLOCKS, Walk};
use crate::types::{BLOCK_SIZE, BlockCount, BlockNr, InodeNr, ShardId};

use finding::Findings;
use lending::Accounts;
use names::Names;
use pairs::{BUCKETS, DigestKey, Pairs, Reference};
use physical::{RunNature, Sweep};
use scan::{DataRun, Scan, Tables};
use space::{LogChange, SpaceMap};

/// Nodes between two calls of the progress function.
const PROGRESS_NODES: u64 = 64;

/// Whether file contents are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DataCheck {
    /// Metadata only.
    #[default]
    Skip,
    /// Every data block is read and compared with its checksum.
    Verify,
}

/// What the check is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Reading bitmaps; in groups.
    Groups,
    /// Walking trees; in nodes, of a number not known before.
    Trees,
    /// Walking them again for details; in nodes.
    Details,
    /// Comparing names; no progress within.
    Names,
    /// Comparing bitmaps; in groups.
    Space,
}

/// How far the check is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The pass.
    pub phase: Phase,
    /// Units done.
    pub done: u64,
    /// Units in all, if known.
    pub total: Option<u64>,
}

/// What was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counts {
    /// Shards.
    pub shards: u64,
    /// Allocation groups.
    pub groups: u64,
    /// Tree nodes.
    pub nodes: u64,
    /// Items.
    pub items: u64,
    /// Inodes.
    pub inodes: u64,
    /// Directory entries.
    pub entries: u64,
    /// File extents.
    pub extents: u64,
    /// Runs.
    pub runs: u64,
    /// Intents.
    pub intents: u64,
    /// Blocks in use by nodes and runs.
    pub used_blocks: u64,
    /// Data blocks whose checksums were compared.
    pub data_blocks: u64,
}

/// The result of a check.
#[derive(Clone, Debug, serde::Serialize)]
pub struct CheckReport {
    /// The damage, at most [`MAX_FINDINGS`] pieces of it.
    pub findings: Vec<Finding>,
    /// Number of findings, those not listed included.
    pub total_findings: u64,
    /// What is worth knowing and no damage.
    pub notes: Vec<String>,
    /// What was looked at.
    pub counts: Counts,
}

impl CheckReport {
    /// Whether no damage was found.
    pub fn is_clean(&self) -> bool {
        self.total_findings == 0
    }
}

/// Why a check could not run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    /// The device cannot hold a volume.
    #[error(transparent)]
    Device(#[from] UnsupportedDevice),
    /// No superblock can be used.
    #[error(transparent)]
    Superblock(#[from] SuperblockError),
}

/// Checks the metadata of the volume on the reactor's device. Nothing is written.
///
/// # Errors
/// [`CheckError`] if there is nothing to check; damage is in the report.
pub async fn check(ctx: &Context, progress: &mut dyn FnMut(Progress)) -> Result<CheckReport, CheckError> {
    check_with(ctx, DataCheck::Skip, progress).await
}

/// As [`check`], with or without reading the data of files.
///
/// # Errors
/// As [`check`].
pub async fn check_with(
    ctx: &Context,
    data: DataCheck,
    progress: &mut dyn FnMut(Progress),
) -> Result<CheckReport, CheckError> {
    let disk = VolumeDisk::new(ctx.disk().clone())?;
    let (superblock, warnings) = superblock::read_newest(&disk).await?;
    let mut findings = Findings::default();
    let mut notes: Vec<String> = warnings.iter().map(ToString::to_string).collect();
    let report = |phase, done, total| Progress { phase, done, total };
    let mut groups_progress = |done, total| progress(report(Phase::Groups, done, Some(total)));
    let (space, warnings) = SpaceMap::read(&disk, &superblock, &mut findings, &mut groups_progress).await;
    notes.extend(warnings.iter().map(ToString::to_string));
    let mut key = DigestKey::default();
    key[..8].copy_from_slice(&ctx.random().to_le_bytes());
    key[8..].copy_from_slice(&ctx.random().to_le_bytes());
    let shards = superblock.shard_count();
    let mut checker = Checker {
        disk: &disk,
        superblock: &superblock,
        findings,
        space,
        names: Names::new(shards),
        pairs: Pairs::new(key),
        loans: Accounts::default(),
        counts: Counts { shards: u64::from(shards), groups: superblock.layout.groups(), ..Counts::default() },
        differing: Vec::new(),
        key,
        data,
        complete: true,
        log: Replayed::default(),
    };
    notes.extend(checker.read_log().await);
    for shard in (0..shards).filter_map(ShardId::new) {
        checker.scan_shard(shard, progress).await;
    }
    checker.counts.used_blocks = checker.space.marked();
    if checker.complete {
        checker.find_details(progress).await;
        std::mem::take(&mut checker.loans).compare(&mut checker.findings);
        progress(report(Phase::Names, 0, None));
        std::mem::take(&mut checker.names).check(&mut checker.findings);
        let mut space_progress = |done, total| progress(report(Phase::Space, done, Some(total)));
        let change = LogChange::new(&checker.space, &checker.log, &mut checker.findings);
        let superblock = &superblock;
        checker.space.compare(&disk, superblock, change, &mut checker.findings, &mut space_progress).await;
    } else {
        notes.push(
            "part of the trees cannot be read: links, references and free space were not compared".to_owned(),
        );
    }
    let Checker { findings, counts, .. } = checker;
    Ok(CheckReport { findings: findings.list, total_findings: findings.total, notes, counts })
}

struct Checker<'a> {
    disk: &'a VolumeDisk,
    superblock: &'a Superblock,
    findings: Findings,
    space: SpaceMap,
    names: Names,
    pairs: Pairs,
    loans: Accounts,
    counts: Counts,
    differing: Vec<InodeNr>,
    key: DigestKey,
    data: DataCheck,
    /// Every node could be read: what is not there does not exist.
    complete: bool,
    /// What the log makes of the trees.
    log: Replayed,
}

impl Checker<'_> {
    /// Marks the log's blocks, and takes its entries for what follows. Returns what the next mount is going to replay.
    async fn read_log(&mut self) -> Option<String> {
        let area = self.superblock.log?;
        for start in area.segments {
            self.space.mark(start, BlockCount::new(u64::from(area.blocks)), User::Log, &mut self.findings);
        }
        let log = read_log(self.disk, self.superblock).await;
        if let Some(what) = log.damage.clone() {
            self.findings.add(Finding::Log { what });
        }
        match Replayed::new(self.superblock, &log) {
            Ok(replayed) => self.log = replayed,
            Err(error) => self.findings.add(Finding::Log { what: format!("the intent log: {error}") }),
        }
        let (entries, last) = self.log.reach()?;
        let stored = self.superblock.epoch;
        Some(format!(
            "the intent log was replayed in memory, {entries} entries from epoch {stored} to {last}: what was checked is what \
             the next mount finds"
        ))
    }

    async fn scan_shard(&mut self, shard: ShardId, progress: &mut dyn FnMut(Progress)) {
        let Some(record) = self.superblock.shard(shard) else { return };
        let mut walk = Walk::new(self.superblock.tree_identity(shard), record.tree);
        let mut scan = Scan::new(shard);
        while let Some(expected) = walk.next_node() {
            if self.counts.nodes.is_multiple_of(PROGRESS_NODES) {
                progress(Progress { phase: Phase::Trees, done: self.counts.nodes, total: None });
            }
            self.counts.nodes += 1;
            let Some(image) = self.read_node(shard, &expected).await else {
                self.complete = false;
                continue;
            };
            match walk.supply(&image) {
                Ok(node) => {
                    let log = std::mem::take(&mut self.log);
                    let mut tables = tables(self);
                    for (key, value) in log.items(shard, &node) {
                        scan.item(key, value, &mut tables);
                    }
                    self.log = log;
                }
                Err(error) => {
                    let (address, level) = (expected.ptr.address, expected.level);
                    self.findings.add(Finding::Node { shard, address, level, error });
                    self.complete = false;
                }
            }
            for run in std::mem::take(&mut scan.data_runs) {
                self.verify_data(&run).await;
            }
        }
        let (inodes, highest) = scan.finish(&mut tables(self));
        if !self.complete {
            return;
        }
        let (next, stored) = self.log.counters(self.superblock, shard);
        if inodes != stored {
            self.findings.add(Finding::InodeCount { shard, stored, counted: inodes });
        }
        if let Some(inode) = highest.filter(|inode| inode.sequence() >= next) {
            self.findings.add(Finding::NextInode { shard, next, inode });
        }
    }

    /// Reads a node and marks its blocks.
    async fn read_node(&mut self, shard: ShardId, expected: &Expected) -> Option<Box<NodeImage>> {
        let (address, count) = (expected.ptr.address, BlockCount::new(NODE_BLOCKS));
        if !self.space.mark(address, count, User::Node(shard), &mut self.findings) {
            return None;
        }
        match read_image(self.disk, address).await {
            Ok(image) => Some(image),
            Err(error) => {
                self.findings.add(Finding::NodeUnreadable { shard, address, error });
                None
            }
        }
    }

    async fn verify_data(&mut self, run: &DataRun) {
        let start = run.start;
        let bytes = match self.disk.read(start, BlockCount::new(run.checksums.len() as u64)).await {
            Ok(bytes) => bytes,
            Err(error) => return self.findings.add(Finding::DataUnreadable { start, error }),
        };
        for (index, (block, expected)) in
            bytes.chunks_exact(BLOCK_SIZE as usize).zip(&run.checksums).enumerate()
        {
            self.counts.data_blocks += 1;
            let found = crc32c::crc32c(block);
            if found != *expected {
                let block = BlockNr::new(start.get() + index as u64);
                self.findings.add(Finding::DataChecksum { block, expected: *expected, found });
            }
        }
    }

    /// Walks once more for what the digests show to differ, and names it.
    async fn find_details(&mut self, progress: &mut dyn FnMut(Progress)) {
        let buckets = self.pairs.differing();
        if !buckets.contains(&true) && self.differing.is_empty() {
            return;
        }
        self.differing.sort_unstable();
        let (mut details, mut done) = (Details::new(buckets, std::mem::take(&mut self.differing)), 0);
        for shard in (0..self.superblock.shard_count()).filter_map(ShardId::new) {
            let Some(record) = self.superblock.shard(shard) else { continue };
            let mut walk = Walk::new(self.superblock.tree_identity(shard), record.tree);
            details.sweep = Sweep::new(shard);
            while let Some(expected) = walk.next_node() {
                progress(Progress { phase: Phase::Details, done, total: Some(self.counts.nodes) });
                done += 1;
                // Every node was read before; one that cannot be any more leaves its differences unnamed.
                let Ok(image) = read_image(self.disk, expected.ptr.address).await else { continue };
                let Ok(node) = walk.supply(&image) else { continue };
                for (key, value) in self.log.items(shard, &node) {
                    details.item(key, value);
                }
            }
        }
        details.report(&mut self.findings);
    }
}

fn tables<'a>(checker: &'a mut Checker<'_>) -> Tables<'a> {
    Tables {
        findings: &mut checker.findings,
        space: &mut checker.space,
        names: &mut checker.names,
        pairs: &mut checker.pairs,
        loans: &mut checker.loans,
        shards: checker.superblock.shard_count(),
        counts: &mut checker.counts,
        differing: &mut checker.differing,
        key: &checker.key,
        hash_seed: &checker.superblock.hash_seed,
        data: checker.data,
    }
}

/// An entry of a directory whose two kinds of entries differ: directory, sequence, name, inode, kind.
type EntryDetail = (InodeNr, u64, Box<[u8]>, InodeNr, u8);

/// What the second walk collects: only the parts that differ.
struct Details {
    buckets: [bool; BUCKETS],
    directories: Vec<InodeNr>,
    extents: Vec<Reference>,
    backrefs: Vec<Reference>,
    by_hash: Vec<EntryDetail>,
    by_sequence: Vec<EntryDetail>,
    sweep: Sweep,
    /// The sweep's findings are those of the first walk.
    known: Findings,
}

impl Details {
    fn new(buckets: [bool; BUCKETS], directories: Vec<InodeNr>) -> Self {
        Self {
            buckets,
            directories,
            extents: Vec::new(),
            backrefs: Vec::new(),
            by_hash: Vec::new(),
            by_sequence: Vec::new(),
            sweep: Sweep::new(ShardId::default()),
            known: Findings::default(),
        }
    }

    fn item(&mut self, key: Key, value: &[u8]) {
        let inode = InodeNr::new(key.object);
        match (key.kind, extent::physical_block(&key)) {
            (EXTENT, None) => {
                if let Ok(extent) = Extent::decode(value) {
                    let preallocated = u64::from(extent.kind == ExtentKind::Preallocated);
                    let (start, blocks) = (extent.start, extent.blocks);
                    let generation = extent.generation.get();
                    let reference =
                        Reference { inode, offset: key.offset, start, blocks, generation, preallocated };
                    if self.buckets[reference.bucket()] {
                        self.extents.push(reference);
                    }
                }
            }
            (RUN, Some(start)) => {
                if let Ok(run) = Run::decode(value) {
                    let preallocated = u64::from(run.kind() == ExtentKind::Preallocated);
                    let nature = RunNature { generation: run.generation.get(), preallocated };
                    self.sweep.run(start, run.blocks, run.references, nature, &mut self.known);
                }
            }
            (BACKREF, Some(start)) => {
                if let Ok(backref) = Backref::decode(value) {
                    let nature = self.sweep.backref(start, backref.blocks, &mut self.known);
                    let reference = Reference {
                        inode: InodeNr::new(key.offset),
                        offset: key.minor,
                        start,
                        blocks: backref.blocks,
                        generation: nature.generation,
                        preallocated: nature.preallocated,
                    };
                    if self.buckets[reference.bucket()] {
                        self.backrefs.push(reference);
                    }
                }
            }
            (DIR_HASH, None) if self.directories.binary_search(&inode).is_ok() => {
                for entry in HashEntry::decode_chain(value).unwrap_or_default() {
                    let target = entry.target;
                    self.by_hash.push((inode, entry.sequence, entry.name, target.inode, target.kind as u8));
                }
            }
            (DIR_SEQ, None) if self.directories.binary_search(&inode).is_ok() => {
                if let Ok(entry) = SequenceEntry::decode(value) {
                    let target = entry.target;
                    self.by_sequence.push((inode, key.offset, entry.name, target.inode, target.kind as u8));
                }
            }
            _ => {}
        }
    }

    fn report(mut self, findings: &mut Findings) {
        pairs::report_differences(self.extents, self.backrefs, findings);
        self.by_hash.sort_unstable();
        self.by_sequence.sort_unstable();
        let text = |name: &[u8]| String::from_utf8_lossy(name).into_owned();
        for entry in &self.by_hash {
            if self.by_sequence.binary_search(entry).is_err() {
                let (directory, sequence, name, ..) = entry;
                let (directory, name, sequence) = (*directory, text(name), *sequence);
                findings.add(Finding::NoSequenceEntry { directory, name, sequence });
            }
        }
        for entry in &self.by_sequence {
            if self.by_hash.binary_search(entry).is_err() {
                let (directory, sequence, name, ..) = entry;
                let (directory, name, sequence) = (*directory, text(name), *sequence);
                findings.add(Finding::NoHashEntry { directory, name, sequence });
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
