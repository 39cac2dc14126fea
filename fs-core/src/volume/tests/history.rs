//! What clients did, in which order, and what was acknowledged as durable.
//!
//! Owns: [`History`], and [`Mark`], a moment of it. A crash at that moment is judged by the mark (`oracle`).

use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use super::model::{Model, Node, NodeId, Op};
use super::*;
use crate::request::{AllocateMode, RenameMode, SyncScope};

/// Blocks of a file that an operation leaves no older contents in.
#[derive(Clone, Debug)]
pub(super) struct Clears {
    pub(super) node: NodeId,
    pub(super) blocks: Range<u64>,
}

/// A client's tree after an operation.
pub(super) struct Version {
    pub(super) nodes: BTreeMap<NodeId, Rc<Node>>,
    pub(super) canon: Rc<str>,
    pub(super) op: String,
    pub(super) clears: Option<Clears>,
    /// A file whose contents were written before the operation took effect.
    pub(super) flushed: Option<NodeId>,
    /// A file that the operation makes at least so long, whatever was written beyond.
    pub(super) reaches: Option<(NodeId, u64)>,
    /// When the operation began and was acknowledged, on a clock that counts such events of all clients.
    began: u64,
    ended: Option<u64>,
    model: Model,
}

/// What of a client's history is durable.
#[derive(Clone, Debug, Default, Hash)]
struct Floor {
    /// Names and attributes as of this version.
    names: usize,
    /// All data as of this version.
    data: usize,
    /// A file's data as of this version.
    files: BTreeMap<NodeId, usize>,
}

#[derive(Default)]
struct Track {
    versions: Vec<Version>,
    /// Versions that are acknowledged, beyond the first.
    acknowledged: usize,
    floor: Floor,
    /// What every client had had acknowledged when the running operation began.
    at_begin: Vec<usize>,
    /// Inodes of nodes, as far as replies told them.
    inodes: BTreeMap<NodeId, InodeNr>,
}

/// What of a client's history a crash meets.
#[derive(Clone, Debug, Hash)]
struct MarkOfClient {
    /// Versions begun, the first included.
    versions: usize,
    floor: Floor,
    acknowledged_ended: u64,
}

/// A moment.
#[derive(Clone, Debug, Hash)]
pub(super) struct Mark(Vec<MarkOfClient>);

/// See the module documentation.
#[derive(Default)]
pub(super) struct History {
    tracks: Vec<Track>,
    clock: u64,
}

impl History {
    /// A history that begins with these trees, all of them durable.
    pub(super) fn of(models: Vec<Model>) -> Self {
        let mut history = Self::default();
        for model in models {
            let mut track = Track::default();
            track.versions.push(Version {
                nodes: model.nodes.clone(),
                canon: model.canon().into(),
                op: "start".to_owned(),
                clears: None,
                flushed: None,
                reaches: None,
                began: 0,
                ended: Some(0),
                model,
            });
            history.tracks.push(track);
        }
        history
    }

    /// What each client did, one operation a line.
    pub(super) fn told(&self) -> Vec<String> {
        let told = |(number, track): (usize, &Track)| {
            let lines = track.versions.iter().enumerate().skip(1);
            let line = |(at, version): (usize, &Version)| {
                let ended = if version.ended.is_some() { "" } else { " (not acknowledged)" };
                format!("  client {number}, {at}: {}{ended}\n", version.op)
            };
            lines.map(line).collect()
        };
        self.tracks.iter().enumerate().map(told).collect()
    }

    pub(super) fn clients(&self) -> usize {
        self.tracks.len()
    }

    /// The newest tree of a client.
    pub(super) fn model_of(&self, client: usize) -> Model {
        self.tracks[client].versions.last().expect("a history has a beginning").model.clone()
    }

    /// Notes that `op` begins, which leaves the tree as `after` says. Returns the number of the version.
    pub(super) fn begin(&mut self, client: usize, op: &Op, after: &Model, clears: Option<Clears>) -> usize {
        self.clock += 1;
        let acknowledged = self.tracks.iter().map(|track| track.acknowledged).collect();
        let began = self.clock;
        let track = &mut self.tracks[client];
        assert_eq!(track.versions.len(), track.acknowledged + 1, "a client does one thing at a time");
        let before = track.versions.last().expect("a history has a beginning");
        let flushed = match op {
            Op::Rename { parent, name, new_parent, new_name, mode: RenameMode::Replace } => {
                let replaces = before.nodes[new_parent].entries.contains_key(new_name);
                before.nodes[parent].entries.get(name).copied().filter(|_| replaces)
            }
            _ => None,
        };
        let reaches = match op {
            Op::Allocate {
                node,
                offset,
                length,
                mode: AllocateMode::Extend | AllocateMode::ZeroRange | AllocateMode::Unshare,
            } => Some((*node, offset + length)),
            _ => None,
        };
        let unchanged = before.nodes.len() == after.nodes.len()
            && before
                .nodes
                .iter()
                .zip(&after.nodes)
                .all(|(old, new)| old.0 == new.0 && Rc::ptr_eq(old.1, new.1));
        let canon = if unchanged { Rc::clone(&before.canon) } else { after.canon().into() };
        track.at_begin = acknowledged;
        track.versions.push(Version {
            nodes: after.nodes.clone(),
            canon,
            op: super::client::brief(op),
            clears,
            flushed,
            reaches,
            began,
            ended: None,
            model: after.clone(),
        });
        track.versions.len() - 1
    }

    /// Notes that the operation begun last was acknowledged.
    pub(super) fn acknowledge(&mut self, client: usize, op: &Op) {
        self.clock += 1;
        let now = self.clock;
        let track = &mut self.tracks[client];
        track.acknowledged += 1;
        let newest = track.versions.last_mut().expect("what is acknowledged was begun");
        newest.ended = Some(now);
        let Op::Sync { node, scope } = op else { return };
        let floors = track.at_begin.clone();
        let own = floors[client];
        if *scope != SyncScope::Volume {
            track.floor.files.insert(*node, own);
        }
        for (track, floor) in self.tracks.iter_mut().zip(floors) {
            track.floor.names = track.floor.names.max(floor);
            if *scope == SyncScope::Volume {
                track.floor.data = track.floor.data.max(floor);
            }
        }
    }

    /// Notes which inode a client's node is.
    pub(super) fn know(&mut self, client: usize, node: NodeId, inode: InodeNr) {
        self.tracks[client].inodes.insert(node, inode);
    }

    /// Whether a version has the inodes at these paths. Files that look alike are told apart by them: two that change
    /// places leave names and attributes as they were.
    pub(super) fn has_inodes(&self, client: usize, number: usize, found: &BTreeMap<String, InodeNr>) -> bool {
        let track = &self.tracks[client];
        let is_there = |(path, node): &(String, NodeId)| {
            track.inodes.get(node).is_none_or(|inode| found.get(path) == Some(inode))
        };
        track.versions[number].model.paths().iter().all(is_there)
    }

    /// Takes the operation begun last back: it was refused for want of space.
    pub(super) fn refuse(&mut self, client: usize) {
        let track = &mut self.tracks[client];
        assert_eq!(track.versions.len(), track.acknowledged + 2, "what is refused was begun");
        track.versions.pop();
    }

    /// Now.
    pub(super) fn mark(&self) -> Mark {
        let of_track = |track: &Track| MarkOfClient {
            versions: track.versions.len(),
            floor: track.floor.clone(),
            acknowledged_ended: self.clock,
        };
        Mark(self.tracks.iter().map(of_track).collect())
    }

    /// A client's versions that a crash at `mark` may leave behind: number and tree.
    pub(super) fn candidates(&self, mark: &Mark, client: usize) -> impl Iterator<Item = (usize, &Version)> {
        let of_client = &mark.0[client];
        let versions = &self.tracks[client].versions[..of_client.versions];
        versions.iter().enumerate().skip(of_client.floor.names)
    }

    /// A client's version.
    pub(super) fn version(&self, client: usize, number: usize) -> &Version {
        &self.tracks[client].versions[number]
    }

    /// The first version of `client` that is there if version `number` of client `other` is: what was acknowledged
    /// before an operation began is not younger than that operation.
    pub(super) fn implied(&self, mark: &Mark, client: usize, other: usize, number: usize) -> usize {
        let began = self.tracks[other].versions[number].began;
        let versions = &self.tracks[client].versions[..mark.0[client].versions];
        let before = |version: &Version| {
            version.ended.is_some_and(|ended| ended < began && ended <= mark.0[client].acknowledged_ended)
        };
        versions.iter().take_while(|version| before(version)).count().saturating_sub(1)
    }

    /// The versions whose contents block `block` of `node` may have after a crash at `mark` that kept names as of
    /// version `kept`.
    pub(super) fn window(
        &self,
        mark: &Mark,
        client: usize,
        node: NodeId,
        block: u64,
        kept: usize,
    ) -> &[Version] {
        let MarkOfClient { versions, floor, .. } = &mark.0[client];
        let versions = &self.tracks[client].versions[..*versions];
        let mut first = floor.data.max(floor.files.get(&node).copied().unwrap_or(0));
        for (number, version) in versions.iter().enumerate().take(kept + 1).skip(first) {
            if version.flushed == Some(node) {
                first = first.max(number - 1);
            }
            if version.clears.as_ref().is_some_and(|c| c.node == node && c.blocks.contains(&block)) {
                first = first.max(number);
            }
        }
        &versions[first..]
    }
}
