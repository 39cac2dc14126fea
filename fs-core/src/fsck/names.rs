//! What inodes and names say of each other, across all shards.
//!
//! Owns: [`Names`]: a short record of every inode, one of every name, and the intents. Inodes arrive in order and
//! stay so; names are sorted once; then both are gone over together. 24 bytes a name and 32 an inode: ten million
//! files take half a gigabyte.
//!
//! Excludes: what can be said of an inode on its own (`scan.rs`).

use crate::format::items::Intent;
use crate::request::FileKind;
use crate::types::{InodeNr, ShardId};

use super::finding::{Finding, Findings};

/// What is kept of an inode.
#[derive(Clone, Copy, Debug)]
pub(super) struct InodeSummary {
    pub(super) nr: InodeNr,
    pub(super) parent: InodeNr,
    pub(super) subdirectories: u64,
    pub(super) links: u32,
    pub(super) kind: FileKind,
}

/// What is kept of a name.
#[derive(Clone, Copy, Debug)]
pub(super) struct NameReference {
    pub(super) target: InodeNr,
    pub(super) directory: InodeNr,
    pub(super) kind: FileKind,
}

/// The intents of one shard, in the order of their inodes.
#[derive(Debug, Default)]
pub(super) struct Intents {
    list: Vec<(InodeNr, Intent)>,
}

impl Intents {
    pub(super) fn add(&mut self, inode: InodeNr, intent: Intent) {
        self.list.push((inode, intent));
    }

    fn of(&self, inode: InodeNr) -> impl Iterator<Item = Intent> {
        let from = self.list.partition_point(|(of, _)| *of < inode);
        self.list[from..].iter().take_while(move |(of, _)| *of == inode).map(|(_, intent)| *intent)
    }

    pub(super) fn truncates(&self, inode: InodeNr) -> bool {
        self.of(inode).any(|intent| matches!(intent, Intent::Truncate(_)))
    }

    /// Whether its contents are being moved.
    pub(super) fn shifts(&self, inode: InodeNr) -> bool {
        self.of(inode).any(|intent| matches!(intent, Intent::Collapse(_) | Intent::Insert(_)))
    }

    pub(super) fn clones(&self, inode: InodeNr) -> bool {
        self.of(inode).any(|intent| matches!(intent, Intent::Clone { .. }))
    }

    /// Whether something of the inode may be set aside.
    pub(super) fn sets_aside(&self, inode: InodeNr) -> bool {
        self.of(inode).any(|intent| matches!(intent, Intent::Clone { .. } | Intent::DropReplaced))
    }

    fn is_orphan(&self, inode: InodeNr) -> bool {
        self.of(inode).any(|intent| intent == Intent::Orphan)
    }
}

/// See the module documentation.
#[derive(Debug, Default)]
pub(super) struct Names {
    /// By shard, in rising order of numbers.
    inodes: Vec<Vec<InodeSummary>>,
    /// Inodes that exist and of which nothing is known.
    unknown: Vec<InodeNr>,
    references: Vec<NameReference>,
    intents: Vec<Intents>,
}

/// How a directory is connected to the root.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Connection {
    Unvisited,
    OnTheWay,
    Reached,
    Lost,
}

/// A directory and where it is named.
struct Place {
    directory: InodeNr,
    named_in: Option<InodeNr>,
    connection: Connection,
}

impl Names {
    pub(super) fn new(shards: u8) -> Self {
        let mut names = Self::default();
        names.inodes.resize_with(usize::from(shards), Vec::new);
        names.intents.resize_with(usize::from(shards), Intents::default);
        names
    }

    pub(super) fn inode(&mut self, inode: InodeSummary) {
        self.inodes[inode.nr.shard().index()].push(inode);
    }

    pub(super) fn unknown(&mut self, inode: InodeNr) {
        self.unknown.push(inode);
    }

    pub(super) fn reference(&mut self, reference: NameReference) {
        self.references.push(reference);
    }

    pub(super) fn intents(&mut self, shard: ShardId, intents: Intents) {
        self.intents[shard.index()] = intents;
    }

    /// Compares everything with everything.
    pub(super) fn check(mut self, findings: &mut Findings) {
        self.unknown.sort_unstable();
        self.references.sort_unstable_by_key(|reference| {
            (reference.target.shard(), reference.target, reference.directory)
        });
        self.check_references(findings);
        self.check_intents(findings);
        let mut places = self.check_inodes(findings);
        let root = InodeNr::ROOT;
        if self.find(root).is_none_or(|inode| inode.kind != FileKind::Directory) && !self.is_unknown(root) {
            findings.add(Finding::NoRoot { root });
        }
        self.check_connections(&mut places, findings);
    }

    fn find(&self, inode: InodeNr) -> Option<&InodeSummary> {
        let shard = self.inodes.get(inode.shard().index())?;
        shard.binary_search_by_key(&inode, |summary| summary.nr).ok().map(|index| &shard[index])
    }

    fn is_unknown(&self, inode: InodeNr) -> bool {
        self.unknown.binary_search(&inode).is_ok()
    }

    fn references_to(&self, inode: InodeNr) -> &[NameReference] {
        let key = |reference: &NameReference| (reference.target.shard(), reference.target);
        let wanted = (inode.shard(), inode);
        let from = self.references.partition_point(|reference| key(reference) < wanted);
        let count = self.references[from..].iter().take_while(|reference| reference.target == inode).count();
        &self.references[from..from + count]
    }

    /// Every name leads to an inode of the kind it says.
    fn check_references(&self, findings: &mut Findings) {
        for reference in &self.references {
            let (directory, inode) = (reference.directory, reference.target);
            match self.find(inode) {
                None if self.is_unknown(inode) => {}
                None => findings.add(Finding::DanglingEntry { directory, inode }),
                Some(summary) if summary.kind != reference.kind => findings.add(Finding::EntryKind {
                    directory,
                    inode,
                    entry: reference.kind,
                    record: summary.kind,
                }),
                Some(_) => {}
            }
        }
    }

    /// Every intent fits an inode.
    fn check_intents(&self, findings: &mut Findings) {
        for (inode, intent) in self.intents.iter().flat_map(|intents| &intents.list) {
            let inode = *inode;
            match (self.find(inode), intent) {
                (None, _) if self.is_unknown(inode) => {}
                (None, _) => findings.add(Finding::IntentWithoutInode { inode }),
                (Some(summary), Intent::Orphan) if summary.links > 0 => {
                    findings.add(Finding::WrongIntent { inode });
                }
                (Some(summary), intent) if *intent != Intent::Orphan && summary.kind != FileKind::Regular => {
                    findings.add(Finding::WrongIntent { inode });
                }
                (Some(_), _) => {}
            }
        }
    }

    /// Every inode has as many names as links, or is to be deleted. Returns the directories.
    fn check_inodes(&self, findings: &mut Findings) -> Vec<Place> {
        let mut places = Vec::new();
        for (shard, inodes) in self.inodes.iter().enumerate() {
            for summary in inodes {
                let (inode, stored) = (summary.nr, summary.links);
                let references = self.references_to(inode);
                let counted = references.len() as u64;
                if stored == 0 && !self.intents[shard].is_orphan(inode) {
                    findings.add(Finding::NoIntent { inode });
                }
                if summary.kind == FileKind::Directory {
                    places.extend(check_directory(summary, references, findings));
                } else if u64::from(stored) != counted {
                    findings.add(Finding::Links { inode, stored, counted });
                }
            }
        }
        places.sort_unstable_by_key(|place| place.directory);
        places
    }

    /// Every directory that is not to be deleted leads to the root.
    fn check_connections(&self, places: &mut [Place], findings: &mut Findings) {
        let index_of = |places: &[Place], directory: InodeNr| {
            places.binary_search_by_key(&directory, |place| place.directory).ok()
        };
        let mut way = Vec::new();
        for first in 0..places.len() {
            let mut next = Some(first);
            let end = loop {
                let Some(index) = next else { break Connection::Lost };
                match places[index].connection {
                    Connection::Unvisited if places[index].directory == InodeNr::ROOT => {
                        places[index].connection = Connection::Reached;
                        break Connection::Reached;
                    }
                    Connection::Unvisited => {
                        places[index].connection = Connection::OnTheWay;
                        way.push(index);
                        next = places[index].named_in.and_then(|parent| index_of(places, parent));
                    }
                    // Back where this way has been already: a cycle.
                    Connection::OnTheWay | Connection::Lost => break Connection::Lost,
                    Connection::Reached => break Connection::Reached,
                }
            };
            for index in way.drain(..) {
                places[index].connection = end;
                if end == Connection::Lost {
                    findings.add(Finding::Unreachable { directory: places[index].directory });
                }
            }
        }
    }
}

fn check_directory(
    summary: &InodeSummary,
    references: &[NameReference],
    findings: &mut Findings,
) -> Option<Place> {
    let (directory, stored) = (summary.nr, summary.links);
    let names = references.len() as u64;
    let counted = if stored == 0 { 0 } else { 2 + summary.subdirectories };
    if u64::from(stored) != counted || stored == 0 && summary.subdirectories > 0 {
        findings.add(Finding::DirectoryLinks { directory, stored, counted });
    }
    let is_root = directory == InodeNr::ROOT;
    let expected_names = u64::from(!is_root && stored > 0);
    if names != expected_names && (names > 0 || stored == 0) {
        findings.add(Finding::DirectoryNames { directory, names });
    }
    let named_in = references.first().map(|reference| reference.directory);
    let expected_parent = if is_root { Some(directory) } else { named_in };
    if let Some(named_in) = expected_parent.filter(|parent| stored > 0 && *parent != summary.parent) {
        findings.add(Finding::Parent { directory, stored: summary.parent, named_in });
    }
    (stored > 0).then_some(Place { directory, named_in, connection: Connection::Unvisited })
}
