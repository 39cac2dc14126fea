//! A filesystem in memory, to compare volumes with.
//!
//! Owns: [`Model`], what one client's directory tree must look like, and [`Op`], what can be done to it. A model is
//! cheap to copy: a copy shares every node that neither side has changed since.
//!
//! Excludes: times that the volume chooses, space, and who holds what open (`client`).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::rc::Rc;

use crate::error::FsError;
use crate::request::{AllocateMode, FileKind, RenameMode, SetXattrMode, SyncScope};
use crate::types::BLOCK_SIZE;

/// A node of a model; never used again.
pub(super) type NodeId = u32;

/// The client's own directory.
pub(super) const TOP: NodeId = 0;

/// Longest name.
const MAX_NAME: usize = 255;

/// Explicit time stamps are below this many seconds, the volume's clock is far above.
pub(super) const EXPLICIT_TIMES: i64 = 1 << 20;

/// One block of contents.
pub(super) type Block = Rc<[u8]>;

/// What a file holds: blocks that are absent read as zeroes, and so does what lies behind the size in the last one.
#[derive(Clone, Debug, Default)]
pub(super) struct Contents {
    /// Bytes.
    pub(super) size: u64,
    /// By index; each has [`BLOCK_SIZE`] bytes.
    pub(super) blocks: BTreeMap<u64, Block>,
}

impl Contents {
    /// Copies `length` bytes from `offset` on, as far as the file goes.
    pub(super) fn read(&self, offset: u64, length: u64) -> Vec<u8> {
        let end = self.size.min(offset.saturating_add(length));
        let mut bytes = Vec::new();
        let mut at = offset;
        while at < end {
            let (index, start) = (at / BLOCK_SIZE, at % BLOCK_SIZE);
            let step = (BLOCK_SIZE - start).min(end - at);
            match self.blocks.get(&index) {
                Some(block) => bytes.extend_from_slice(&block[start as usize..(start + step) as usize]),
                None => bytes.resize(bytes.len() + step as usize, 0),
            }
            at += step;
        }
        bytes
    }

    fn change(&mut self, offset: u64, length: u64, byte: impl Fn(u64) -> u8) {
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let (index, start) = (at / BLOCK_SIZE, at % BLOCK_SIZE);
            let step = (BLOCK_SIZE - start).min(end - at);
            let mut block = match self.blocks.get(&index) {
                Some(block) => block.to_vec(),
                None => vec![0; BLOCK_SIZE as usize],
            };
            for place in 0..step {
                block[(start + place) as usize] = byte(at + place - offset);
            }
            self.blocks.insert(index, block.into());
            at += step;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.change(offset, data.len() as u64, |index| data[index as usize]);
        self.size = self.size.max(offset + data.len() as u64);
    }

    fn zero(&mut self, offset: u64, length: u64) {
        let (first, end) = (offset.div_ceil(BLOCK_SIZE), (offset + length) / BLOCK_SIZE);
        if first >= end {
            self.change(offset, length, |_| 0);
            return;
        }
        self.blocks.retain(|index, _| !(first..end).contains(index));
        self.change(offset, first * BLOCK_SIZE - offset, |_| 0);
        self.change(end * BLOCK_SIZE, offset + length - end * BLOCK_SIZE, |_| 0);
    }

    /// Takes whole blocks out.
    fn collapse(&mut self, offset: u64, length: u64) {
        let (first, count) = (offset / BLOCK_SIZE, length / BLOCK_SIZE);
        let blocks = std::mem::take(&mut self.blocks).into_iter();
        let kept = blocks.filter(|(index, _)| !(first..first + count).contains(index));
        self.blocks =
            kept.map(|(index, block)| (if index < first { index } else { index - count }, block)).collect();
        self.size -= length;
    }

    /// Puts whole blocks of zeroes in.
    fn insert(&mut self, offset: u64, length: u64) {
        let (first, count) = (offset / BLOCK_SIZE, length / BLOCK_SIZE);
        let blocks = std::mem::take(&mut self.blocks).into_iter();
        self.blocks =
            blocks.map(|(index, block)| (if index < first { index } else { index + count }, block)).collect();
        self.size += length;
    }

    fn set_size(&mut self, size: u64) {
        if size < self.size {
            let end = size.next_multiple_of(BLOCK_SIZE);
            self.blocks.retain(|index, _| *index < end / BLOCK_SIZE);
            if self.blocks.contains_key(&(size / BLOCK_SIZE)) {
                self.change(size, end - size, |_| 0);
            }
        }
        self.size = size;
    }
}

/// A file, directory or link.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) kind: FileKind,
    pub(super) permissions: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) links: u32,
    /// Access time in seconds, if it was set.
    pub(super) accessed: Option<i64>,
    /// Modification time in seconds, if it was set and nothing was written since.
    pub(super) modified: Option<i64>,
    pub(super) xattrs: BTreeMap<String, Vec<u8>>,
    /// Target of a symbolic link.
    pub(super) target: String,
    /// Entries of a directory.
    pub(super) entries: BTreeMap<String, NodeId>,
    /// Where a directory lies.
    pub(super) parent: NodeId,
    pub(super) contents: Rc<Contents>,
}

/// What to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Made {
    Regular,
    Directory,
    Symlink(String),
    Fifo,
}

/// Something that changes a tree, or makes changes durable. A copy is repeated until everything is copied; where two
/// ranges differ, or cannot share, a deduplication does nothing.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Create { parent: NodeId, name: String, made: Made, permissions: u16 },
    Link { node: NodeId, parent: NodeId, name: String },
    Unlink { parent: NodeId, name: String },
    RemoveDirectory { parent: NodeId, name: String },
    Rename { parent: NodeId, name: String, new_parent: NodeId, new_name: String, mode: RenameMode },
    Write { node: NodeId, offset: u64, data: Rc<[u8]> },
    Truncate { node: NodeId, size: u64 },
    Allocate { node: NodeId, offset: u64, length: u64, mode: AllocateMode },
    Copy { source: NodeId, from: u64, node: NodeId, offset: u64, length: u64 },
    Deduplicate { source: NodeId, from: u64, node: NodeId, offset: u64, length: u64 },
    SetOwner { node: NodeId, permissions: u16, uid: u32 },
    SetTimes { node: NodeId, accessed: i64, modified: i64 },
    SetXattr { node: NodeId, name: String, value: Vec<u8>, mode: SetXattrMode },
    RemoveXattr { node: NodeId, name: String },
    Sync { node: NodeId, scope: SyncScope },
    Flush { node: NodeId },
    Forget { node: NodeId },
}

/// A directory tree.
#[derive(Clone, Debug)]
pub(super) struct Model {
    pub(super) nodes: BTreeMap<NodeId, Rc<Node>>,
    next: NodeId,
}

impl Model {
    /// An empty directory.
    pub(super) fn new(permissions: u16) -> Self {
        let top = Node { links: 2, ..Node::new(FileKind::Directory, permissions) };
        Self { nodes: BTreeMap::from([(TOP, Rc::new(top))]), next: TOP + 1 }
    }

    pub(super) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[&id]
    }

    fn edit(&mut self, id: NodeId) -> &mut Node {
        Rc::make_mut(self.nodes.get_mut(&id).expect("ops name nodes that are there"))
    }

    /// The node that [`Op::Create`] makes next.
    pub(super) fn next_node(&self) -> NodeId {
        self.next
    }

    /// Forgets a node that has no name left.
    pub(super) fn drop_nameless(&mut self, id: NodeId) {
        if self.nodes.get(&id).is_some_and(|node| node.links == 0) {
            self.nodes.remove(&id);
        }
    }

    /// Nodes of a kind that have a name.
    pub(super) fn of_kind(&self, kind: FileKind) -> Vec<NodeId> {
        self.nodes.iter().filter(|(_, node)| node.kind == kind && node.links > 0).map(|(id, _)| *id).collect()
    }

    /// Does `op`, or says why it cannot be done; then nothing has changed.
    pub(super) fn apply(&mut self, op: &Op) -> Result<(), FsError> {
        match op {
            Op::Create { parent, name, made, permissions } => self.create(*parent, name, made, *permissions),
            Op::Link { node, parent, name } => self.link(*node, *parent, name),
            Op::Unlink { parent, name } => self.remove(*parent, name, false),
            Op::RemoveDirectory { parent, name } => self.remove(*parent, name, true),
            Op::Rename { .. } => self.rename(op),
            Op::Write { node, offset, data } => {
                self.change_contents(*node, |contents| contents.write(*offset, data));
                Ok(())
            }
            Op::Truncate { node, size } => {
                self.change_contents(*node, |contents| contents.set_size(*size));
                Ok(())
            }
            Op::Allocate { node, offset, length, mode } => {
                let end = offset + length;
                let size = self.node(*node).contents.size;
                let whole = (offset | length).is_multiple_of(BLOCK_SIZE);
                let refused = match mode {
                    AllocateMode::Collapse => !whole || end >= size,
                    AllocateMode::Insert => !whole || *offset >= size,
                    _ => false,
                };
                if refused {
                    return Err(FsError::Invalid);
                }
                self.change_contents(*node, |contents| {
                    let inside = (*length).min(contents.size.saturating_sub(*offset));
                    match mode {
                        AllocateMode::KeepSize => {}
                        AllocateMode::Extend | AllocateMode::Unshare => {
                            contents.size = contents.size.max(end);
                        }
                        AllocateMode::Collapse => contents.collapse(*offset, *length),
                        AllocateMode::Insert => contents.insert(*offset, *length),
                        AllocateMode::PunchHole | AllocateMode::ZeroRangeKeepSize => {
                            contents.zero(*offset, inside);
                        }
                        AllocateMode::ZeroRange => {
                            contents.zero(*offset, inside);
                            contents.size = contents.size.max(end);
                        }
                    }
                });
                Ok(())
            }
            Op::Copy { source, from, node, offset, length } => {
                let data = self.node(*source).contents.read(*from, *length);
                let length = data.len() as u64;
                if source == node && *from < offset + length && *offset < from + length {
                    return Err(FsError::Invalid);
                }
                if !data.is_empty() {
                    self.change_contents(*node, |contents| contents.write(*offset, &data));
                }
                Ok(())
            }
            Op::SetOwner { node, permissions, uid } => {
                let node = self.edit(*node);
                (node.permissions, node.uid) = (*permissions, *uid);
                Ok(())
            }
            Op::SetTimes { node, accessed, modified } => {
                let node = self.edit(*node);
                (node.accessed, node.modified) = (Some(*accessed), Some(*modified));
                Ok(())
            }
            Op::SetXattr { node, name, value, mode } => {
                let there = self.node(*node).xattrs.contains_key(name);
                match mode {
                    SetXattrMode::Create if there => return Err(FsError::Exists),
                    SetXattrMode::Replace if !there => return Err(FsError::NoAttribute),
                    _ => {}
                }
                self.edit(*node).xattrs.insert(name.clone(), value.clone());
                Ok(())
            }
            Op::RemoveXattr { node, name } => {
                if !self.node(*node).xattrs.contains_key(name) {
                    return Err(FsError::NoAttribute);
                }
                self.edit(*node).xattrs.remove(name);
                Ok(())
            }
            Op::Deduplicate { .. } | Op::Sync { .. } | Op::Flush { .. } | Op::Forget { .. } => Ok(()),
        }
    }

    fn change_contents(&mut self, node: NodeId, change: impl FnOnce(&mut Contents)) {
        let node = self.edit(node);
        node.modified = None;
        change(Rc::make_mut(&mut node.contents));
    }

    fn create(&mut self, parent: NodeId, name: &str, made: &Made, permissions: u16) -> Result<(), FsError> {
        if name.len() > MAX_NAME {
            return Err(FsError::NameTooLong);
        }
        if self.node(parent).entries.contains_key(name) {
            return Err(FsError::Exists);
        }
        let mut node = match made {
            Made::Regular => Node::new(FileKind::Regular, permissions),
            Made::Directory => Node { links: 2, parent, ..Node::new(FileKind::Directory, permissions) },
            Made::Symlink(target) => {
                Node { target: target.clone(), ..Node::new(FileKind::Symlink, permissions) }
            }
            Made::Fifo => Node::new(FileKind::Fifo, permissions),
        };
        node.uid = 0;
        if *made == Made::Directory {
            self.edit(parent).links += 1;
        }
        self.edit(parent).modified = None;
        let id = self.next;
        self.edit(parent).entries.insert(name.to_owned(), id);
        self.nodes.insert(id, Rc::new(node));
        self.next += 1;
        Ok(())
    }

    fn link(&mut self, node: NodeId, parent: NodeId, name: &str) -> Result<(), FsError> {
        if name.len() > MAX_NAME {
            return Err(FsError::NameTooLong);
        }
        if self.node(parent).entries.contains_key(name) {
            return Err(FsError::Exists);
        }
        if self.node(node).kind == FileKind::Directory {
            return Err(FsError::NotPermitted);
        }
        if self.node(node).links == 0 {
            return Err(FsError::NotFound);
        }
        self.edit(node).links += 1;
        self.edit(parent).modified = None;
        self.edit(parent).entries.insert(name.to_owned(), node);
        Ok(())
    }

    fn remove(&mut self, parent: NodeId, name: &str, directory: bool) -> Result<(), FsError> {
        if name.len() > MAX_NAME {
            return Err(FsError::NameTooLong);
        }
        let id = *self.node(parent).entries.get(name).ok_or(FsError::NotFound)?;
        match (self.node(id).kind == FileKind::Directory, directory) {
            (true, false) => return Err(FsError::IsDirectory),
            (false, true) => return Err(FsError::NotDirectory),
            (true, true) if !self.node(id).entries.is_empty() => return Err(FsError::NotEmpty),
            _ => {}
        }
        self.edit(parent).entries.remove(name);
        self.edit(parent).modified = None;
        self.drop_name(id, parent);
        Ok(())
    }

    /// The node has lost a name in `parent`.
    fn drop_name(&mut self, id: NodeId, parent: NodeId) {
        if self.node(id).kind == FileKind::Directory {
            self.edit(parent).links -= 1;
            self.edit(id).links = 0;
        } else {
            self.edit(id).links -= 1;
        }
    }

    fn is_within(&self, inner: NodeId, outer: NodeId) -> bool {
        let mut place = inner;
        while place != outer && place != TOP {
            place = self.node(place).parent;
        }
        place == outer
    }

    fn rename(&mut self, op: &Op) -> Result<(), FsError> {
        let Op::Rename { parent, name, new_parent, new_name, mode } = op else { return Ok(()) };
        let (parent, new_parent) = (*parent, *new_parent);
        if name.len() > MAX_NAME || new_name.len() > MAX_NAME {
            return Err(FsError::NameTooLong);
        }
        let source = *self.node(parent).entries.get(name).ok_or(FsError::NotFound)?;
        let target = self.node(new_parent).entries.get(new_name).copied();
        let is_directory = |model: &Self, id: NodeId| model.node(id).kind == FileKind::Directory;
        match (mode, target) {
            (RenameMode::NoReplace, Some(_)) => return Err(FsError::Exists),
            (RenameMode::Exchange, None) => return Err(FsError::NotFound),
            _ => {}
        }
        let exchanged = target.filter(|_| *mode == RenameMode::Exchange);
        if parent != new_parent {
            let into_itself = is_directory(self, source) && self.is_within(new_parent, source);
            let other = exchanged.is_some_and(|id| is_directory(self, id) && self.is_within(parent, id));
            if into_itself || other {
                return Err(FsError::Invalid);
            }
        }
        match (mode, target) {
            (_, Some(target)) if target == source => return Ok(()),
            (RenameMode::Replace, Some(target)) => {
                match (is_directory(self, source), is_directory(self, target)) {
                    (true, false) => return Err(FsError::NotDirectory),
                    (false, true) => return Err(FsError::IsDirectory),
                    (true, true) if !self.node(target).entries.is_empty() => return Err(FsError::NotEmpty),
                    _ => {}
                }
            }
            _ => {}
        }
        self.edit(parent).modified = None;
        self.edit(new_parent).modified = None;
        self.edit(parent).entries.remove(name);
        if let Some(target) = exchanged {
            self.edit(parent).entries.insert(name.clone(), target);
            self.move_directory(target, new_parent, parent);
        } else if let Some(target) = target {
            self.drop_name(target, new_parent);
        }
        self.edit(new_parent).entries.insert(new_name.clone(), source);
        self.move_directory(source, parent, new_parent);
        Ok(())
    }

    fn move_directory(&mut self, id: NodeId, from: NodeId, to: NodeId) {
        if self.node(id).kind == FileKind::Directory {
            self.edit(from).links -= 1;
            self.edit(to).links += 1;
            self.edit(id).parent = to;
        }
    }

    /// Every named node by the first path to it, in order of the walk.
    pub(super) fn paths(&self) -> Vec<(String, NodeId)> {
        let mut found = Vec::new();
        let mut seen = std::collections::BTreeSet::new();
        self.visit(TOP, "", &mut |path, id| {
            if seen.insert(id) {
                found.push((path.to_owned(), id));
            }
        });
        found
    }

    fn visit(&self, id: NodeId, path: &str, f: &mut impl FnMut(&str, NodeId)) {
        f(path, id);
        for (name, child) in &self.node(id).entries {
            self.visit(*child, &format!("{path}/{name}"), f);
        }
    }

    /// Names and attributes as text; sizes and times that writes change are not in it. Equal to what a walk of the
    /// same tree on a volume gives.
    pub(super) fn canon(&self) -> String {
        let mut numbers = BTreeMap::new();
        let mut text = String::new();
        self.visit(TOP, "", &mut |path, id| {
            let count = numbers.len();
            let number = *numbers.entry(id).or_insert(count);
            let node = self.node(id);
            canon_line(
                &mut text,
                path,
                &CanonNode {
                    number,
                    kind: node.kind,
                    permissions: node.permissions,
                    uid: node.uid,
                    gid: node.gid,
                    links: node.links,
                    accessed: node.accessed,
                    target: &node.target,
                    xattrs: &node.xattrs,
                },
            );
        });
        text
    }
}

/// What a line of [`Model::canon`] tells.
pub(super) struct CanonNode<'a> {
    pub(super) number: usize,
    pub(super) kind: FileKind,
    pub(super) permissions: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) links: u32,
    pub(super) accessed: Option<i64>,
    pub(super) target: &'a str,
    pub(super) xattrs: &'a BTreeMap<String, Vec<u8>>,
}

/// Adds a node to a canonical text.
pub(super) fn canon_line(text: &mut String, path: &str, node: &CanonNode<'_>) {
    let CanonNode { number, kind, permissions, uid, gid, links, accessed, target, xattrs } = node;
    let _infallible = write!(
        text,
        "{path} #{number} {kind:?} {permissions:o} {uid}:{gid} links={links} atime={accessed:?} →{target}"
    );
    for (name, value) in *xattrs {
        let _infallible = write!(text, " {name}={}:{:08x}", value.len(), crc32c::crc32c(value));
    }
    text.push('\n');
}

impl Node {
    fn new(kind: FileKind, permissions: u16) -> Self {
        Self {
            kind,
            permissions,
            uid: 0,
            gid: 0,
            links: 1,
            accessed: None,
            modified: None,
            xattrs: BTreeMap::new(),
            target: String::new(),
            entries: BTreeMap::new(),
            parent: TOP,
            contents: Rc::default(),
        }
    }
}
