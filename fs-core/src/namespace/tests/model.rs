//! Random operations, each compared with a model in memory: result, errno, and at the end the whole tree.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::harness::{Client, Machine};
use crate::error::FsError;
use crate::request::{FileKind, NewInode, RenameMode};
use crate::types::InodeNr;

const ROOT: usize = 0;
const NAMES: [&str; 4] = ["a", "b", "c", "d"];

#[derive(Debug)]
struct Node {
    inode: InodeNr,
    is_directory: bool,
    links: u32,
    lookups: u64,
    parent: usize,
    entries: BTreeMap<&'static str, usize>,
}

/// What POSIX says.
struct Model {
    nodes: Vec<Node>,
}

impl Model {
    fn new() -> Self {
        let inode = InodeNr::ROOT;
        let root =
            Node { inode, is_directory: true, links: 2, lookups: 0, parent: ROOT, entries: BTreeMap::new() };
        Self { nodes: vec![root] }
    }

    fn find(&self, directory: usize, name: &str) -> Result<Option<usize>, FsError> {
        let node = &self.nodes[directory];
        if !node.is_directory {
            return Err(FsError::NotDirectory);
        }
        if node.links == 0 {
            return Err(FsError::NotFound);
        }
        Ok(node.entries.get(name).copied())
    }

    fn create(&mut self, parent: usize, name: &'static str, is_directory: bool) -> Result<usize, FsError> {
        if self.find(parent, name)?.is_some() {
            return Err(FsError::Exists);
        }
        let links = if is_directory { 2 } else { 1 };
        let (inode, entries) = (InodeNr::new(0), BTreeMap::new());
        self.nodes.push(Node { inode, is_directory, links, lookups: 1, parent, entries });
        let new = self.nodes.len() - 1;
        self.nodes[parent].entries.insert(name, new);
        self.nodes[parent].links += u32::from(is_directory);
        Ok(new)
    }

    fn remove(&mut self, parent: usize, name: &'static str, directory: bool) -> Result<(), FsError> {
        let target = self.find(parent, name)?.ok_or(FsError::NotFound)?;
        match (self.nodes[target].is_directory, directory) {
            (true, false) => return Err(FsError::IsDirectory),
            (false, true) => return Err(FsError::NotDirectory),
            _ => {}
        }
        if !self.nodes[target].entries.is_empty() {
            return Err(FsError::NotEmpty);
        }
        self.nodes[parent].entries.remove(name);
        self.drop_name(parent, target);
        Ok(())
    }

    fn drop_name(&mut self, parent: usize, target: usize) {
        if self.nodes[target].is_directory {
            self.nodes[parent].links -= 1;
            self.nodes[target].links = 0;
        } else {
            self.nodes[target].links -= 1;
        }
    }

    fn link(&mut self, target: usize, parent: usize, name: &'static str) -> Result<(), FsError> {
        if self.find(parent, name)?.is_some() {
            return Err(FsError::Exists);
        }
        if self.nodes[target].is_directory {
            return Err(FsError::NotPermitted);
        }
        if self.nodes[target].links == 0 {
            return Err(FsError::NotFound);
        }
        self.nodes[target].links += 1;
        self.nodes[target].lookups += 1;
        self.nodes[parent].entries.insert(name, target);
        Ok(())
    }

    fn is_within(&self, mut inner: usize, outer: usize) -> bool {
        while inner != outer && inner != ROOT {
            inner = self.nodes[inner].parent;
        }
        inner == outer
    }

    fn rename(
        &mut self,
        from: (usize, &'static str),
        to: (usize, &'static str),
        mode: RenameMode,
    ) -> Result<(), FsError> {
        let source = self.find(from.0, from.1)?;
        let target = self.find(to.0, to.1)?;
        let source = source.ok_or(FsError::NotFound)?;
        match (mode, target) {
            (RenameMode::NoReplace, Some(_)) => return Err(FsError::Exists),
            (RenameMode::Exchange, None) => return Err(FsError::NotFound),
            _ => {}
        }
        if self.nodes[source].is_directory && from.0 != to.0 && self.is_within(to.0, source) {
            return Err(FsError::Invalid);
        }
        let Some(target) = target else {
            self.move_entry(from, to, source);
            return Ok(());
        };
        if mode == RenameMode::Exchange
            && self.nodes[target].is_directory
            && from.0 != to.0
            && self.is_within(from.0, target)
        {
            return Err(FsError::Invalid);
        }
        if source == target {
            return Ok(());
        }
        if mode == RenameMode::Exchange {
            self.move_entry(from, to, source);
            self.move_entry(to, from, target);
            self.nodes[to.0].entries.insert(to.1, source);
            return Ok(());
        }
        match (self.nodes[source].is_directory, self.nodes[target].is_directory) {
            (true, false) => return Err(FsError::NotDirectory),
            (false, true) => return Err(FsError::IsDirectory),
            _ if !self.nodes[target].entries.is_empty() => return Err(FsError::NotEmpty),
            _ => {}
        }
        self.drop_name(to.0, target);
        self.move_entry(from, to, source);
        Ok(())
    }

    fn move_entry(&mut self, from: (usize, &'static str), to: (usize, &'static str), node: usize) {
        self.nodes[from.0].entries.remove(from.1);
        self.nodes[to.0].entries.insert(to.1, node);
        if self.nodes[node].is_directory {
            self.nodes[from.0].links -= 1;
            self.nodes[to.0].links += 1;
            self.nodes[node].parent = to.0;
        }
    }
}

/// An operation; nodes are chosen by number among all that the model knows and that still exist.
#[derive(Clone, Debug)]
enum Step {
    Create(usize, usize, bool),
    Remove(usize, usize, bool),
    Link(usize, usize, usize),
    Rename(usize, usize, usize, usize, RenameMode),
    Look(usize, usize),
    Forget(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let node = || 0..1000_usize;
    let name = || 0..NAMES.len();
    let mode = prop_oneof![
        3 => Just(RenameMode::Replace),
        1 => Just(RenameMode::NoReplace),
        2 => Just(RenameMode::Exchange),
    ];
    prop_oneof![
        6 => (node(), name(), any::<bool>()).prop_map(|(node, name, kind)| Step::Create(node, name, kind)),
        3 => (node(), name(), any::<bool>()).prop_map(|(node, name, kind)| Step::Remove(node, name, kind)),
        2 => (node(), node(), name()).prop_map(|(target, node, name)| Step::Link(target, node, name)),
        6 => (node(), name(), node(), name(), mode)
            .prop_map(|(from, old, to, new, mode)| Step::Rename(from, old, to, new, mode)),
        2 => (node(), name()).prop_map(|(node, name)| Step::Look(node, name)),
        1 => node().prop_map(Step::Forget),
    ]
}

/// Client and model, step by step.
struct Pair<'a> {
    client: &'a Client,
    model: Model,
}

impl Pair<'_> {
    /// A node that a front end could name: it exists, and lookups are held or it has a name.
    fn pick(&self, number: usize) -> usize {
        let usable = |node: &Node| node.links > 0 || node.lookups > 0;
        let candidates: Vec<usize> =
            (0..self.model.nodes.len()).filter(|index| usable(&self.model.nodes[*index])).collect();
        candidates[number % candidates.len()]
    }

    fn inode(&self, node: usize) -> InodeNr {
        self.model.nodes[node].inode
    }

    async fn run(&mut self, step: Step) {
        match step {
            Step::Create(parent, name, is_directory) => self.create(parent, NAMES[name], is_directory).await,
            Step::Remove(parent, name, directory) => {
                let (parent, name) = (self.pick(parent), NAMES[name]);
                let inode = self.inode(parent);
                let found = if directory {
                    self.client.remove_directory(inode, name).await
                } else {
                    self.client.unlink(inode, name).await
                };
                assert_eq!(found, self.model.remove(parent, name, directory));
            }
            Step::Link(target, parent, name) => {
                let (target, parent, name) = (self.pick(target), self.pick(parent), NAMES[name]);
                let found = self.client.link(self.inode(target), self.inode(parent), name).await;
                let expected = self.model.link(target, parent, name);
                let links = self.model.nodes[target].links;
                assert_eq!(found.map(|attributes| attributes.links), expected.map(|()| links));
            }
            Step::Rename(from, old, to, new, mode) => {
                let (from, to) = (self.pick(from), self.pick(to));
                let (old, new) = (NAMES[old], NAMES[new]);
                let found = self.client.rename((self.inode(from), old), (self.inode(to), new), mode).await;
                assert_eq!(found, self.model.rename((from, old), (to, new), mode));
            }
            Step::Look(parent, name) => {
                let (parent, name) = (self.pick(parent), NAMES[name]);
                let found = self.client.lookup(self.inode(parent), name).await;
                let expected = self.model.find(parent, name).and_then(|found| found.ok_or(FsError::NotFound));
                if let Ok(node) = expected {
                    self.model.nodes[node].lookups += 1;
                }
                assert_eq!(found.map(|attributes| attributes.inode), expected.map(|node| self.inode(node)));
            }
            Step::Forget(node) => {
                let node = self.pick(node);
                let lookups = std::mem::take(&mut self.model.nodes[node].lookups);
                if lookups > 0 {
                    self.client.forget(self.inode(node), lookups).await;
                }
            }
        }
    }

    async fn create(&mut self, parent: usize, name: &'static str, is_directory: bool) {
        let parent = self.pick(parent);
        let new = if is_directory { NewInode::Directory } else { NewInode::Regular };
        let found = self.client.make(self.inode(parent), name, new).await;
        let expected = self.model.create(parent, name, is_directory);
        if let (Ok(attributes), Ok(node)) = (&found, &expected) {
            self.model.nodes[*node].inode = attributes.inode;
        }
        assert_eq!(
            found.map(|attributes| attributes.links),
            expected.map(|node| self.model.nodes[node].links)
        );
    }

    /// Forgets everything and compares the trees.
    async fn finish(mut self) {
        for node in 0..self.model.nodes.len() {
            let lookups = std::mem::take(&mut self.model.nodes[node].lookups);
            if lookups > 0 {
                self.client.forget(self.inode(node), lookups).await;
            }
        }
        let found = self.client.check().await;
        let mut expected = BTreeMap::new();
        let mut waiting = vec![(String::new(), ROOT)];
        while let Some((path, directory)) = waiting.pop() {
            for (name, node) in &self.model.nodes[directory].entries {
                let path = format!("{path}/{name}");
                let target = &self.model.nodes[*node];
                if target.is_directory {
                    waiting.push((path.clone(), *node));
                }
                expected.insert(path, (target.inode, target.is_directory, target.links));
            }
        }
        let found: BTreeMap<_, _> = found
            .into_iter()
            .map(|(path, found)| (path, (found.inode, found.kind == FileKind::Directory, found.links)))
            .collect();
        assert_eq!(found, expected);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn volume_equals_model(
        seed in any::<u64>(),
        machine in prop::sample::select(vec![(1_u16, 1_u8), (1, 4), (2, 2), (3, 4)]),
        steps in proptest::collection::vec(step(), 1..150),
    ) {
        let (reactors, shards) = machine;
        Machine { seed, reactors, shards }.run(async move |client| {
            let mut pair = Pair { client, model: Model::new() };
            for step in steps {
                pair.run(step).await;
            }
            pair.finish().await;
        });
    }
}
