//! A client: random operations on a directory tree of its own, each compared with the model.
//!
//! Owns: [`Client`], which does one [`Op`] after the other, and the generator of operations. What was done goes into
//! a [`History`], by which a crash is judged.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use reactor::WallTime;

use super::history::{Clears, History};
use super::model::{EXPLICIT_TIMES, Made, Model, NodeId, Op, TOP};
use super::stats::count;
use super::*;
use crate::request::{
    AllocateMode, AttributeChange, Caller, CloneRange, FileKind, NewInode, RenameMode, SeekWhat,
    SetXattrMode, SyncScope, TimeChange,
};
use crate::types::BLOCK_SIZE;

/// Names of entries; few, so that operations meet.
const NAMES: u64 = 7;

/// Most blocks of an ordinary file.
const FILE_BLOCKS: u64 = 24;

/// Nodes beyond which nothing new is made.
const MAX_NODES: usize = 40;

/// A small random generator (SplitMix64), the same everywhere.
#[derive(Clone, Debug)]
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// A number below `limit`, which is not 0.
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// One of `items`.
    pub(super) fn pick<T: Clone>(&mut self, items: &[T]) -> Option<T> {
        if items.is_empty() { None } else { Some(items[self.below(items.len() as u64) as usize].clone()) }
    }
}

/// Bytes that name who wrote them, when, and where, so that a foreign block is known for one.
pub(super) fn stamped(client: usize, op: usize, offset: u64, length: u64) -> Rc<[u8]> {
    let tag = Rng::new((client as u64) << 32 | op as u64).next() | 1;
    let byte = |at: u64| (tag.wrapping_mul(at / 8 + 1).rotate_left(17) >> (at % 8 * 8)) as u8;
    (offset..offset + length).map(byte).collect()
}

/// How a client's script ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// All was done.
    Finished,
    /// The device failed.
    DeviceGone,
}

/// What a client takes for the failure of the device.
pub(super) fn is_device_failure(error: &FsError) -> bool {
    matches!(error, FsError::Io(_) | FsError::ReadOnly | FsError::ShuttingDown)
}

/// Makes the directory of client `number`.
pub(super) async fn make_top(volume: &Volume, number: usize) -> InodeNr {
    create(volume, Volume::ROOT, &top_name(number), NewInode::Directory).await.inode
}

/// The directory of client `number`, in the root.
pub(super) fn top_name(number: usize) -> String {
    format!("client{number}")
}

/// See the module documentation.
pub(super) struct Client {
    pub(super) number: usize,
    pub(super) model: Model,
    pub(super) volume: Volume,
    pub(super) inodes: BTreeMap<NodeId, InodeNr>,
    pub(super) history: Rc<RefCell<History>>,
    /// Whether the device may fail.
    pub(super) device_may_fail: bool,
    /// Whether what takes space may be refused.
    pub(super) may_be_full: bool,
    /// Operations refused for want of space.
    pub(super) refused: u64,
    lookups: BTreeMap<NodeId, u64>,
    rng: Rng,
    /// The last copy: source, its offset, target, its offset, length.
    copied: Option<(NodeId, u64, NodeId, u64, u64)>,
}

impl Client {
    pub(super) fn new(
        number: usize,
        seed: u64,
        volume: Volume,
        top: InodeNr,
        history: Rc<RefCell<History>>,
    ) -> Self {
        let mut model = history.borrow().model_of(number);
        for node in model.nodes.clone().into_keys() {
            model.drop_nameless(node);
        }
        Self {
            number,
            model,
            volume,
            inodes: BTreeMap::from([(TOP, top)]),
            history,
            device_may_fail: false,
            may_be_full: false,
            refused: 0,
            lookups: BTreeMap::from([(TOP, 1)]),
            rng: Rng::new(seed ^ (number as u64 + 1) << 40),
            copied: None,
        }
    }

    /// Does `count` random operations.
    pub(super) async fn run(&mut self, count: usize) -> Ending {
        for _ in 0..count {
            let op = self.random_op();
            if self.step(&op).await == Ending::DeviceGone {
                return Ending::DeviceGone;
            }
        }
        Ending::Finished
    }

    /// True once in `part` times.
    pub(super) fn chance(&mut self, part: u64) -> bool {
        self.rng.below(part) == 0
    }

    /// Does one operation and compares its outcome.
    pub(super) async fn step(&mut self, op: &Op) -> Ending {
        let mut after = self.model.clone();
        let expected = after.apply(op);
        let made = after.next_node() != self.model.next_node();
        if let Some(ending) = self.look_up_for(op).await {
            return ending;
        }
        let index = self.history.borrow_mut().begin(self.number, op, &after, clears(op));
        let actual = self.perform(op).await;
        count("operations", kind(op));
        if let Err(error) = &actual {
            count("refused", error.to_string().split(':').next().unwrap_or_default());
        }
        if let Err(error) = &actual
            && self.device_may_fail
            && is_device_failure(error)
        {
            return Ending::DeviceGone;
        }
        if self.may_be_full && actual == Err(FsError::NoSpace) && takes_space(op, &self.model) {
            self.history.borrow_mut().refuse(self.number);
            self.refused += 1;
            self.adopt_refused(op).await;
            return Ending::Finished;
        }
        let told = actual.as_ref().map(|_| ()).map_err(Clone::clone);
        assert_eq!(told, expected, "client {} op {index}: {}", self.number, brief(op));
        self.history.borrow_mut().acknowledge(self.number, op);
        if let (true, Ok(Some(attributes))) = (made, &actual) {
            let node = self.model.next_node();
            self.inodes.insert(node, attributes.inode);
            self.history.borrow_mut().know(self.number, node, attributes.inode);
            self.lookups.insert(node, 1);
        }
        if let (Op::Link { node, .. }, Ok(_)) = (op, &actual) {
            *self.lookups.entry(*node).or_default() += 1;
        }
        let before = std::mem::replace(&mut self.model, after);
        if let Op::Forget { node } = op {
            self.lookups.remove(node);
        }
        self.model.nodes.clone().into_keys().filter(|id| !self.lookups.contains_key(id)).for_each(|id| {
            self.model.drop_nameless(id);
        });
        self.check_after(op, &before).await
    }

    /// A range that was to be zeroed may have been zeroed in part when space ran out.
    async fn adopt_refused(&mut self, op: &Op) {
        if let Op::Copy { node, offset, .. } = op {
            let mut after = self.model.clone();
            assert_eq!(after.apply(op), Ok(()));
            let (old, new) = (&self.model.node(*node).contents, &after.node(*node).contents);
            let found = read(&self.volume, self.inodes[node], 0, new.size as u32).await;
            let (old, new) = (old.read(0, u64::MAX), new.read(0, u64::MAX));
            assert!(found.len() >= old.len() && found.len() <= new.len(), "{}", brief(op));
            let legal = |at: usize| found[at] == new[at] || old.get(at).map_or(0, |old| *old) == found[at];
            assert!((0..found.len()).all(legal), "{} left something foreign", brief(op));
            let from = (*offset as usize).min(found.len());
            if found != old {
                self.adopt(&Op::Write { node: *node, offset: from as u64, data: found[from..].into() });
            }
            return;
        }
        let Op::Allocate { node, offset, length, .. } = op else { return };
        let old = self.model.node(*node).contents.read(*offset, *length);
        let found = read(&self.volume, self.inodes[node], *offset, old.len() as u32).await;
        assert_eq!(found.len(), old.len(), "what is refused does not change the size");
        let legal = |(found, old): (&u8, &u8)| *found == 0 || found == old;
        assert!(found.iter().zip(&old).all(legal), "{} left something foreign", brief(op));
        if found != old {
            self.adopt(&Op::Write { node: *node, offset: *offset, data: found.into() });
        }
    }

    /// Takes what was found for what is there from now on.
    fn adopt(&mut self, found: &Op) {
        assert_eq!(self.model.apply(found), Ok(()));
        let mut history = self.history.borrow_mut();
        history.begin(self.number, found, &self.model, None);
        history.acknowledge(self.number, found);
    }

    /// Like a kernel, a client holds a lookup on whatever it uses.
    async fn look_up_for(&mut self, op: &Op) -> Option<Ending> {
        let used = match op {
            Op::Create { parent, .. }
            | Op::Unlink { parent, .. }
            | Op::RemoveDirectory { parent, .. }
            | Op::Rename { parent, .. } => vec![*parent],
            Op::Link { node, parent, .. } => vec![*node, *parent],
            Op::Copy { source, node, .. } | Op::Deduplicate { source, node, .. } => vec![*source, *node],
            Op::Write { node, .. }
            | Op::Truncate { node, .. }
            | Op::Allocate { node, .. }
            | Op::SetOwner { node, .. }
            | Op::SetTimes { node, .. }
            | Op::SetXattr { node, .. }
            | Op::RemoveXattr { node, .. }
            | Op::Sync { node, .. }
            | Op::Flush { node }
            | Op::Forget { node } => vec![*node],
        };
        let also = if let Op::Rename { new_parent, .. } = op { Some(*new_parent) } else { None };
        for node in used.into_iter().chain(also) {
            if let Err(error) = self.know(node).await {
                assert!(self.device_may_fail && is_device_failure(&error), "lookup of {node}: {error}");
                return Some(Ending::DeviceGone);
            }
        }
        None
    }

    /// Looks every name on the way to `node` up that is not held.
    pub(super) async fn know(&mut self, node: NodeId) -> Result<InodeNr, FsError> {
        if self.lookups.contains_key(&node) {
            return Ok(self.inodes[&node]);
        }
        let paths = self.model.paths();
        let path = paths.iter().find(|(_, id)| *id == node).map(|(path, _)| path.clone());
        let path = path.expect("a node that is not held has a name");
        let mut place = TOP;
        for name in path.split('/').skip(1) {
            let child = self.model.node(place).entries[name];
            if !self.lookups.contains_key(&child) {
                let found = lookup(&self.volume, self.inodes[&place], name).await?;
                let known = *self.inodes.entry(child).or_insert(found.inode);
                assert_eq!(found.inode, known, "{path} is another inode than it was");
                self.history.borrow_mut().know(self.number, child, known);
                self.lookups.insert(child, 1);
            }
            place = child;
        }
        Ok(self.inodes[&node])
    }

    async fn perform(&mut self, op: &Op) -> Result<Option<Attributes>, FsError> {
        let request = match op {
            Op::Write { node, offset, data } if self.chance(3) => {
                return write_all_direct(&self.volume, self.inodes[node], *offset, data).await.map(|()| None);
            }
            Op::Write { node, offset, data } => {
                return write_all(&self.volume, self.inodes[node], *offset, data).await.map(|()| None);
            }
            Op::Copy { source, from, node, offset, length } => {
                let mut range = self.range(*source, *from, *node, *offset);
                // A copy that makes its own source longer would go on there.
                range.length = (*length).min(self.model.node(*source).contents.size.saturating_sub(*from));
                return copy_all(&self.volume, range).await.map(|()| None);
            }
            Op::Deduplicate { source, from, node, offset, length } => {
                let mut range = self.range(*source, *from, *node, *offset);
                range.length = *length;
                return match self.volume.call(Request::Deduplicate(range)).await {
                    Ok(Reply::Deduplicated(_)) | Err(FsError::Invalid | FsError::NotSupported) => Ok(None),
                    Ok(other) => panic!("{op:?}: {other:?}"),
                    Err(error) => Err(error),
                };
            }
            _ => self.request(op),
        };
        match self.volume.call(request).await? {
            Reply::Entry(attributes) | Reply::Attributes(attributes) => Ok(Some(attributes)),
            Reply::Done => Ok(None),
            other => panic!("{op:?}: {other:?}"),
        }
    }

    fn range(&self, source: NodeId, from: u64, node: NodeId, offset: u64) -> CloneRange {
        CloneRange {
            source: self.inodes[&source],
            source_offset: FileOffset::new(from),
            target: self.inodes[&node],
            target_offset: FileOffset::new(offset),
            length: 0,
        }
    }

    fn request(&self, op: &Op) -> Request {
        let at = |node: &NodeId| self.inodes[node];
        let change = |node: &NodeId, change| Request::SetAttributes { inode: self.inodes[node], change };
        let text = |name: &str| -> Box<[u8]> { name.as_bytes().into() };
        match op {
            Op::Create { parent, name, made, permissions } => Request::Create {
                parent: at(parent),
                name: text(name),
                new: match made {
                    Made::Regular => NewInode::Regular,
                    Made::Directory => NewInode::Directory,
                    Made::Symlink(target) => NewInode::Symlink(text(target)),
                    Made::Fifo => NewInode::Fifo,
                },
                permissions: *permissions,
                caller: Caller { uid: 0, gid: 0 },
            },
            Op::Link { node, parent, name } => {
                Request::Link { inode: at(node), new_parent: at(parent), new_name: text(name) }
            }
            Op::Unlink { parent, name } => Request::Unlink { parent: at(parent), name: text(name) },
            Op::RemoveDirectory { parent, name } => {
                Request::RemoveDirectory { parent: at(parent), name: text(name) }
            }
            Op::Rename { parent, name, new_parent, new_name, mode } => Request::Rename {
                parent: at(parent),
                name: text(name),
                new_parent: at(new_parent),
                new_name: text(new_name),
                mode: *mode,
            },
            Op::Truncate { node, size } => {
                change(node, AttributeChange { size: Some(*size), ..AttributeChange::default() })
            }
            Op::SetOwner { node, permissions, uid } => {
                let (permissions, uid) = (Some(*permissions), Some(*uid));
                change(node, AttributeChange { permissions, uid, ..AttributeChange::default() })
            }
            Op::SetTimes { node, accessed, modified } => {
                let time = |seconds| {
                    Some(TimeChange::To(WallTime::new(seconds, 0).expect("no nanoseconds are valid")))
                };
                let (accessed, modified) = (time(*accessed), time(*modified));
                change(node, AttributeChange { accessed, modified, ..AttributeChange::default() })
            }
            Op::Allocate { node, offset, length, mode } => {
                let offset = FileOffset::new(*offset);
                Request::Allocate { inode: at(node), offset, length: *length, mode: *mode }
            }
            Op::SetXattr { node, name, value, mode } => Request::SetXattr {
                inode: at(node),
                name: text(name),
                value: value.clone().into(),
                mode: *mode,
            },
            Op::RemoveXattr { node, name } => Request::RemoveXattr { inode: at(node), name: text(name) },
            Op::Sync { node, scope } => Request::Sync { inode: at(node), scope: *scope },
            Op::Flush { node } => Request::Flush { inode: at(node) },
            Op::Forget { node } => {
                Request::Forget { inode: at(node), lookups: self.lookups.get(node).copied().unwrap_or(0) }
            }
            Op::Write { .. } | Op::Copy { .. } | Op::Deduplicate { .. } => {
                unreachable!("these have ways of their own")
            }
        }
    }

    /// Compares what `op` touched.
    async fn check_after(&mut self, op: &Op, before: &Model) -> Ending {
        let checked = match op {
            Op::Write { node, offset, data } => self.check_range(*node, *offset, data.len() as u64).await,
            Op::Allocate { node, offset, mode: AllocateMode::Collapse | AllocateMode::Insert, .. } => {
                // Sparse files are long.
                self.check_range(*node, *offset, 2 * FILE_BLOCKS * BLOCK_SIZE).await
            }
            Op::Allocate { node, offset, length, .. }
            | Op::Copy { node, offset, length, .. }
            | Op::Deduplicate { node, offset, length, .. } => self.check_range(*node, *offset, *length).await,
            Op::Truncate { node, size } => self.check_range(*node, *size, BLOCK_SIZE).await,
            Op::SetXattr { node, name, .. } | Op::RemoveXattr { node, name } => {
                self.check_xattr(*node, name).await
            }
            Op::Create { parent, .. }
            | Op::Link { parent, .. }
            | Op::Unlink { parent, .. }
            | Op::RemoveDirectory { parent, .. } => self.check_directory(*parent).await,
            Op::Rename { parent, new_parent, name, .. } => {
                let first = self.check_directory(*parent).await;
                let moved = before.node(*parent).entries.get(name).copied();
                let moved = moved.filter(|id| self.lookups.contains_key(id));
                match (first, moved) {
                    (Ok(()), Some(moved)) => match self.check_attributes(moved).await {
                        Ok(()) => self.check_directory(*new_parent).await,
                        Err(error) => Err(error),
                    },
                    (Ok(()), None) => self.check_directory(*new_parent).await,
                    (error, _) => error,
                }
            }
            Op::SetOwner { node, .. } | Op::SetTimes { node, .. } | Op::Sync { node, .. } => {
                self.check_attributes(*node).await
            }
            Op::Flush { .. } | Op::Forget { .. } => self.check_something().await,
        };
        match checked {
            Ok(()) => Ending::Finished,
            Err(error) if self.device_may_fail && is_device_failure(&error) => Ending::DeviceGone,
            Err(error) => panic!("client {}: looking at the outcome of {}: {error}", self.number, brief(op)),
        }
    }

    /// Compares a node at random, its contents too.
    async fn check_something(&mut self) -> Result<(), FsError> {
        let files = self.model.of_kind(FileKind::Regular);
        let Some(node) = self.rng.pick(&files) else { return Ok(()) };
        self.know(node).await?;
        self.check_whole_file(node).await?;
        self.check_seek(node).await
    }

    async fn check_attributes(&self, id: NodeId) -> Result<(), FsError> {
        let reply = self.volume.call(Request::GetAttributes { inode: self.inodes[&id] }).await?;
        let Reply::Attributes(found) = reply else { panic!("attributes: {reply:?}") };
        let node = self.model.node(id);
        let whose = format!("client {} node {id}", self.number);
        assert_eq!(found.kind, node.kind, "{whose}");
        assert_eq!(
            (found.permissions, found.uid, found.gid, found.links),
            (node.permissions, node.uid, node.gid, node.links),
            "{whose}: mode, owner, group, links"
        );
        match node.kind {
            FileKind::Regular => assert_eq!(found.size, node.contents.size, "{whose}: size"),
            FileKind::Symlink => assert_eq!(found.size, node.target.len() as u64, "{whose}: size"),
            _ => {}
        }
        for (found, set) in [(found.accessed, node.accessed), (found.modified, node.modified)] {
            match set {
                Some(seconds) => assert_eq!((found.secs(), found.subsec_nanos()), (seconds, 0), "{whose}"),
                None => {
                    assert!(found.secs() > EXPLICIT_TIMES || node.accessed.is_some(), "{whose}: {found:?}");
                }
            }
        }
        Ok(())
    }

    /// Compares `length` bytes from `offset` on, and a little around them.
    async fn check_range(&self, id: NodeId, offset: u64, length: u64) -> Result<(), FsError> {
        self.check_attributes(id).await?;
        let start = offset.saturating_sub(self.model.node(id).contents.size % 97 * 64);
        self.check_bytes(id, start, length + (offset - start) + 3000).await
    }

    async fn check_bytes(&self, id: NodeId, offset: u64, length: u64) -> Result<(), FsError> {
        let expected = self.model.node(id).contents.read(offset, length);
        let request = Request::Read {
            inode: self.inodes[&id],
            offset: FileOffset::new(offset),
            length: u32::try_from(length).expect("reads are short"),
        };
        let reply = self.volume.call(request).await?;
        let Reply::Data(found) = reply else { panic!("read: {reply:?}") };
        let whose = format!("client {} node {id}, {length} bytes at {offset}", self.number);
        assert_eq!(found.len(), expected.len(), "{whose}: length");
        if let Some(at) = (0..found.len()).find(|at| found[*at] != expected[*at]) {
            panic!("{whose}: byte {at} is {:#x}, should be {:#x}", found[at], expected[at]);
        }
        Ok(())
    }

    async fn check_whole_file(&self, id: NodeId) -> Result<(), FsError> {
        self.check_attributes(id).await?;
        let contents = &self.model.node(id).contents;
        let dense = contents.size.min(1 << 21);
        self.check_bytes(id, 0, dense).await?;
        for index in contents.blocks.keys().filter(|index| **index * BLOCK_SIZE >= dense) {
            self.check_bytes(id, index * BLOCK_SIZE, BLOCK_SIZE).await?;
        }
        Ok(())
    }

    /// What a seek skips, or stops at, must be zeroes as far as it says so.
    async fn check_seek(&mut self, id: NodeId) -> Result<(), FsError> {
        let contents = Rc::clone(&self.model.node(id).contents);
        if contents.size == 0 {
            return Ok(());
        }
        let from = self.rng.below(contents.size);
        let inode = self.inodes[&id];
        let ask = |what| Request::Seek { inode, offset: FileOffset::new(from), what };
        let data = self.volume.call(ask(SeekWhat::Data)).await;
        let skipped = match data {
            Ok(Reply::Offset(data)) => from..data,
            Err(FsError::NoData) => from..contents.size,
            Err(error) => return Err(error),
            other => panic!("seek: {other:?}"),
        };
        assert!(skipped.end <= contents.size, "data is found inside the file only");
        let skipped_blocks = skipped.start.div_ceil(BLOCK_SIZE)..skipped.end.div_ceil(BLOCK_SIZE);
        for (index, block) in contents.blocks.range(skipped_blocks) {
            let whole = block.iter().all(|byte| *byte == 0);
            assert!(whole, "node {id}: SEEK_DATA from {from} skips block {index}, which is not zero");
        }
        match self.volume.call(ask(SeekWhat::Hole)).await? {
            Reply::Offset(hole) if hole == contents.size => Ok(()),
            Reply::Offset(hole) => {
                assert!((from..contents.size).contains(&hole), "hole at {hole} from {from}");
                let block = contents.blocks.get(&(hole / BLOCK_SIZE));
                assert!(block.is_none_or(|block| block.iter().all(|byte| *byte == 0)), "no hole at {hole}");
                Ok(())
            }
            other => panic!("seek: {other:?}"),
        }
    }

    async fn check_xattr(&self, id: NodeId, name: &str) -> Result<(), FsError> {
        let request = Request::GetXattr { inode: self.inodes[&id], name: name.as_bytes().into() };
        let expected = self.model.node(id).xattrs.get(name);
        match (self.volume.call(request).await, expected) {
            (Ok(Reply::Data(found)), Some(value)) => assert_eq!(&found, value, "attribute {name}"),
            (Err(FsError::NoAttribute), None) => {}
            (Err(error), _) => return Err(error),
            (found, expected) => panic!("attribute {name}: {found:?}, should be {expected:?}"),
        }
        Ok(())
    }

    /// Compares the listing of a directory, taken in small steps.
    async fn check_directory(&mut self, id: NodeId) -> Result<(), FsError> {
        self.check_attributes(id).await?;
        let limit = 1 + self.rng.below(5) as u32;
        let listed = list(&self.volume, self.inodes[&id], limit).await?;
        let found: BTreeMap<String, InodeNr> =
            listed.iter().map(|entry| (name_of(&entry.name), entry.inode)).collect();
        assert_eq!(found.len(), listed.len(), "an entry is listed once: {listed:?}");
        let node = self.model.node(id);
        assert!(
            found.keys().eq(node.entries.keys()),
            "{:?}, should be {:?}",
            found.keys(),
            node.entries.keys()
        );
        for (name, child) in &node.entries {
            if let Some(inode) = self.inodes.get(child) {
                assert_eq!(found[name], *inode, "{name}");
            }
        }
        Ok(())
    }

    /// Compares everything.
    pub(super) async fn check_all(&mut self) -> Result<(), FsError> {
        for (_, id) in self.model.paths() {
            self.know(id).await?;
            match self.model.node(id).kind {
                FileKind::Regular => self.check_whole_file(id).await?,
                FileKind::Directory => self.check_directory(id).await?,
                _ => self.check_attributes(id).await?,
            }
            for name in self.model.node(id).xattrs.clone().keys() {
                self.check_xattr(id, name).await?;
            }
        }
        Ok(())
    }

    fn random_op(&mut self) -> Op {
        loop {
            if let Some(op) = self.try_random_op() {
                return op;
            }
        }
    }

    fn name(&mut self) -> String {
        if self.rng.below(40) == 0 {
            return "long".repeat(64)[..254 + self.rng.below(2) as usize].to_owned() + "x";
        }
        format!("n{}", self.rng.below(NAMES))
    }

    /// A directory and a name in it, of an entry that is there if there is any.
    fn entry(&mut self, directory: NodeId) -> String {
        let names: Vec<String> = self.model.node(directory).entries.keys().cloned().collect();
        match self.rng.pick(&names) {
            Some(name) if self.rng.below(8) > 0 => name,
            _ => self.name(),
        }
    }

    fn try_random_op(&mut self) -> Option<Op> {
        let directories = self.model.of_kind(FileKind::Directory);
        let files: Vec<NodeId> = {
            // Unlinked files that are held, too.
            let held = self.model.nodes.iter().filter(|(_, node)| node.kind == FileKind::Regular);
            held.map(|(id, _)| *id).collect()
        };
        let named: Vec<NodeId> = self.model.paths().into_iter().map(|(_, id)| id).collect();
        let parent = self.rng.pick(&directories)?;
        let crowded = self.model.nodes.len() >= MAX_NODES;
        Some(match self.rng.below(100) {
            0..18 if !crowded => self.random_create(parent),
            0..18 => Op::Unlink { parent, name: self.entry(parent) },
            18..21 => Op::Link { node: self.rng.pick(&named)?, parent, name: self.name() },
            21..26 => Op::Unlink { parent, name: self.entry(parent) },
            26..29 => Op::RemoveDirectory { parent, name: self.entry(parent) },
            29..42 => {
                let (new_parent, modes) = (
                    self.rng.pick(&directories)?,
                    [RenameMode::Replace, RenameMode::Replace, RenameMode::NoReplace, RenameMode::Exchange],
                );
                let new_name = if self.rng.below(2) == 0 { self.entry(new_parent) } else { self.name() };
                let name = self.entry(parent);
                Op::Rename { parent, name, new_parent, new_name, mode: self.rng.pick(&modes)? }
            }
            42..64 => {
                let node = self.rng.pick(&files)?;
                self.random_write(node)
            }
            64..67 => self.random_copy(&files)?,
            67..70 => Op::Truncate { node: self.rng.pick(&files)?, size: self.random_offset() },
            70..76 => {
                let modes = [
                    AllocateMode::Extend,
                    AllocateMode::KeepSize,
                    AllocateMode::PunchHole,
                    AllocateMode::PunchHole,
                    AllocateMode::ZeroRange,
                    AllocateMode::ZeroRangeKeepSize,
                    AllocateMode::Unshare,
                    AllocateMode::Collapse,
                    AllocateMode::Collapse,
                    AllocateMode::Insert,
                ];
                let (node, mut offset) = (self.rng.pick(&files)?, self.random_offset());
                let mut length = 1 + self.rng.below(8 * BLOCK_SIZE);
                let mode = self.rng.pick(&modes)?;
                // Others are refused.
                if matches!(mode, AllocateMode::Collapse | AllocateMode::Insert) && self.rng.below(8) > 0 {
                    offset -= offset % BLOCK_SIZE;
                    length = length.next_multiple_of(BLOCK_SIZE);
                }
                Op::Allocate { node, offset, length, mode }
            }
            76..79 => {
                let permissions = [0o600, 0o644, 0o755, 0o700];
                let (node, uid) = (self.rng.pick(&named)?, self.rng.below(3) as u32);
                Op::SetOwner { node, permissions: self.rng.pick(&permissions)?, uid }
            }
            79..81 => {
                let (accessed, modified) = (self.rng.below(1000) as i64, self.rng.below(1000) as i64);
                Op::SetTimes { node: self.rng.pick(&named)?, accessed, modified }
            }
            81..86 => {
                let modes =
                    [SetXattrMode::Set, SetXattrMode::Set, SetXattrMode::Create, SetXattrMode::Replace];
                let length = if self.rng.below(4) == 0 { 3000 } else { self.rng.below(200) as usize };
                let value = vec![self.rng.next() as u8; length];
                let name = format!("user.x{}", self.rng.below(3));
                Op::SetXattr { node: self.rng.pick(&named)?, name, value, mode: self.rng.pick(&modes)? }
            }
            86..88 => {
                let name = format!("user.x{}", self.rng.below(3));
                Op::RemoveXattr { node: self.rng.pick(&named)?, name }
            }
            88..91 => {
                let scopes = [SyncScope::Data, SyncScope::File];
                Op::Sync { node: self.rng.pick(&files)?, scope: self.rng.pick(&scopes)? }
            }
            91 => Op::Sync { node: TOP, scope: SyncScope::Volume },
            92..94 => Op::Flush { node: self.rng.pick(&files)? },
            _ => {
                let held: Vec<NodeId> = self.lookups.keys().copied().filter(|node| *node != TOP).collect();
                Op::Forget { node: self.rng.pick(&held)? }
            }
        })
    }

    fn random_create(&mut self, parent: NodeId) -> Op {
        let made = match self.rng.below(10) {
            0..3 => Made::Directory,
            3 => Made::Symlink("t".repeat(1 + self.rng.below(300) as usize)),
            4 => Made::Fifo,
            _ => Made::Regular,
        };
        let permissions = 0o600 + self.rng.below(0o100) as u16;
        Op::Create { parent, name: self.name(), made, permissions }
    }

    fn random_offset(&mut self) -> u64 {
        let block = self.rng.below(FILE_BLOCKS) * BLOCK_SIZE;
        match self.rng.below(4) {
            0 => block,
            1 => 0,
            _ => block + self.rng.below(BLOCK_SIZE),
        }
    }

    fn random_copy(&mut self, files: &[NodeId]) -> Option<Op> {
        let (source, node) = (self.rng.pick(files)?, self.rng.pick(files)?);
        let block = |offset: u64| offset - offset % BLOCK_SIZE;
        let (mut from, mut offset) = (self.random_offset(), self.random_offset());
        let mut length = 1 + self.rng.below(12 * BLOCK_SIZE);
        match self.rng.below(4) {
            0 => {}
            1 => (from, offset, length) = (0, 0, 1 << 20),
            _ => (from, offset, length) = (block(from), block(offset), length.next_multiple_of(BLOCK_SIZE)),
        }
        if self.rng.below(4) == 0 {
            // Of what was copied last, the most is still the same.
            let (source, from, node, offset, length) = self.copied?;
            if !(files.contains(&source) && files.contains(&node)) {
                return None;
            }
            return Some(Op::Deduplicate { source, from, node, offset, length });
        }
        self.copied = Some((source, from, node, offset, length));
        Some(Op::Copy { source, from, node, offset, length })
    }

    fn random_write(&mut self, node: NodeId) -> Op {
        let size = self.model.node(node).contents.size;
        let offset = match self.rng.below(8) {
            0..3 if size < FILE_BLOCKS * BLOCK_SIZE => size,
            3 if self.rng.below(4) == 0 => (1 << 33) + self.random_offset(),
            _ => self.random_offset(),
        };
        let length = match self.rng.below(8) {
            0..3 => 1 + self.rng.below(300),
            3 => BLOCK_SIZE,
            4 if self.rng.below(4) == 0 => 300 * BLOCK_SIZE / 2,
            _ => 1 + self.rng.below(6 * BLOCK_SIZE),
        };
        let stamp = self.rng.below(1 << 30) as usize;
        Op::Write { node, offset, data: stamped(self.number, stamp, offset, length) }
    }
}

/// Whether an operation may be refused for want of space. What gives space back never is.
fn takes_space(op: &Op, model: &Model) -> bool {
    match op {
        Op::Truncate { node, size } => *size > model.node(*node).contents.size,
        Op::Unlink { .. }
        | Op::RemoveDirectory { .. }
        | Op::Sync { .. }
        | Op::Flush { .. }
        | Op::Forget { .. } => false,
        _ => true,
    }
}

/// Blocks that an operation, once durable, leaves no older contents in.
fn clears(op: &Op) -> Option<Clears> {
    match op {
        Op::Truncate { node, size } => {
            Some(Clears { node: *node, blocks: size.div_ceil(BLOCK_SIZE)..u64::MAX })
        }
        _ => None,
    }
}

/// An operation without the bytes it writes.
pub(super) fn brief(op: &Op) -> String {
    match op {
        Op::Write { node, offset, data } => format!("write node {node}: {} bytes at {offset}", data.len()),
        Op::SetXattr { node, name, value, mode } => {
            format!("set attribute {name} of node {node}: {} bytes, {mode:?}", value.len())
        }
        other => format!("{other:?}"),
    }
}

/// The kind of an operation, in a word.
fn kind(op: &Op) -> String {
    let text = match op {
        Op::Allocate { mode, .. } => format!("{mode:?}"),
        Op::Sync { scope, .. } => format!("Sync{scope:?}"),
        Op::Write { .. } => "Write".to_owned(),
        other => format!("{other:?}"),
    };
    text.split([' ', '{']).next().unwrap_or_default().to_lowercase()
}

/// An entry's name as text.
pub(super) fn name_of(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

/// Everything a directory holds but `.` and `..`, read in steps of `limit`.
pub(super) async fn list(
    volume: &Volume,
    inode: InodeNr,
    limit: u32,
) -> Result<Vec<crate::request::DirectoryEntry>, FsError> {
    let mut listed = Vec::new();
    let mut after = 0;
    loop {
        let reply = volume.call(Request::ReadDirectory { inode, after, limit }).await?;
        let Reply::Directory(entries) = reply else { panic!("listing: {reply:?}") };
        let Some(last) = entries.last() else { break };
        assert!(last.cookie > after, "a listing goes on");
        after = last.cookie;
        listed.extend(entries.into_iter().filter(|entry| !matches!(&*entry.name, b"." | b"..")));
    }
    Ok(listed)
}

/// Copies all of a range, as far as the source goes.
pub(super) async fn copy_all(volume: &Volume, mut range: CloneRange) -> Result<(), FsError> {
    loop {
        let copied = match volume.call(Request::CopyRange(range)).await? {
            Reply::Cloned(copied) => copied.bytes,
            other => panic!("copy: {other:?}"),
        };
        range.length -= copied;
        if copied == 0 || range.length == 0 {
            return Ok(());
        }
        range.source_offset = range.source_offset.checked_add(copied).expect("copies end within files");
        range.target_offset = range.target_offset.checked_add(copied).expect("copies end within files");
    }
}

/// Writes all of `data`, on the short way if there is room.
pub(super) async fn write_all(
    volume: &Volume,
    inode: InodeNr,
    offset: u64,
    data: &[u8],
) -> Result<(), FsError> {
    let (source, kill_privileges) = (WriteSource::Call, KillPrivileges::Keep);
    let mut done = 0;
    while done < data.len() {
        let at = FileOffset::new(offset + done as u64);
        let rest = &data[done..];
        done += match volume.write(inode, at, rest, source, kill_privileges) {
            WriteOutcome::Accepted(written) => written as usize,
            WriteOutcome::Failed(error) => return Err(error),
            WriteOutcome::Slow => {
                let request =
                    Request::Write { inode, offset: at, data: rest.into(), source, kill_privileges };
                match volume.call(request).await? {
                    Reply::Written(written) => written as usize,
                    other => panic!("write: {other:?}"),
                }
            }
        };
    }
    Ok(())
}

/// Writes all of `data`, each piece past the page cache.
pub(super) async fn write_all_direct(
    volume: &Volume,
    inode: InodeNr,
    offset: u64,
    data: &[u8],
) -> Result<(), FsError> {
    let kill_privileges = KillPrivileges::Keep;
    let mut done = 0;
    while done < data.len() {
        let (at, rest) = (FileOffset::new(offset + done as u64), data[done..].into());
        match volume.call(Request::WriteDirect { inode, offset: at, data: rest, kill_privileges }).await? {
            Reply::Written(written) => done += written as usize,
            other => panic!("direct write: {other:?}"),
        }
    }
    Ok(())
}
