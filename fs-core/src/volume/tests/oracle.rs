//! The oracle: whether what a volume holds after a crash is a legal outcome.
//!
//! Owns: [`judge`]. Names and attributes must be those of some moment of the history that is not before the last
//! acknowledged sync, and for all clients the same moment as far as one can have known of the other; each block of a
//! file must have contents that it had since its last sync, whole.

use std::collections::BTreeMap;

use super::client::{list, name_of, top_name};
use super::history::{History, Mark, Version};
use super::model::{CanonNode, EXPLICIT_TIMES, NodeId, canon_line};
use super::*;
use crate::request::FileKind;
use crate::types::BLOCK_SIZE;

/// Why a volume was not judged legal.
#[derive(Debug, thiserror::Error)]
pub(super) enum Verdict {
    /// Something could not be read.
    #[error("{0}")]
    Error(#[from] FsError),
    /// Something was read that nobody wrote, or that is too old.
    #[error("{0}")]
    Illegal(String),
}

/// A file found by a walk.
struct FoundFile {
    inode: InodeNr,
    size: u64,
}

/// A client's tree on a volume.
#[derive(Default)]
struct Found {
    canon: String,
    files: BTreeMap<String, FoundFile>,
    inodes: BTreeMap<String, InodeNr>,
    numbers: BTreeMap<InodeNr, usize>,
}

async fn attributes(volume: &Volume, inode: InodeNr) -> Result<Attributes, FsError> {
    match volume.call(Request::GetAttributes { inode }).await? {
        Reply::Attributes(attributes) => Ok(attributes),
        other => panic!("attributes: {other:?}"),
    }
}

async fn bytes(volume: &Volume, request: Request) -> Result<Vec<u8>, FsError> {
    match volume.call(request).await? {
        Reply::Data(data) => Ok(data),
        other => panic!("{other:?}"),
    }
}

async fn xattrs(volume: &Volume, inode: InodeNr) -> Result<BTreeMap<String, Vec<u8>>, FsError> {
    let names = bytes(volume, Request::ListXattr { inode }).await?;
    let mut found = BTreeMap::new();
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let value = bytes(volume, Request::GetXattr { inode, name: name.into() }).await?;
        found.insert(name_of(name), value);
    }
    Ok(found)
}

/// Walks a tree in the order of [`super::model::Model::canon`].
async fn walk(volume: &Volume, top: InodeNr) -> Result<Found, FsError> {
    let mut found = Found::default();
    let mut stack = vec![(String::new(), top, top)];
    while let Some((path, inode, parent)) = stack.pop() {
        let attributes = attributes(volume, inode).await?;
        let target = match attributes.kind {
            FileKind::Symlink => name_of(&bytes(volume, Request::ReadLink { inode }).await?),
            _ => String::new(),
        };
        let count = found.numbers.len();
        let number = *found.numbers.entry(inode).or_insert(count);
        let accessed = attributes.accessed.secs();
        let line = CanonNode {
            number,
            kind: attributes.kind,
            permissions: attributes.permissions,
            uid: attributes.uid,
            gid: attributes.gid,
            links: attributes.links,
            accessed: Some(accessed).filter(|seconds| *seconds < EXPLICIT_TIMES),
            target: &target,
            xattrs: &xattrs(volume, inode).await?,
        };
        canon_line(&mut found.canon, &path, &line);
        found.inodes.insert(path.clone(), inode);
        match attributes.kind {
            FileKind::Regular => {
                found.files.insert(path, FoundFile { inode, size: attributes.size });
            }
            FileKind::Directory => {
                if inode != top {
                    let up = volume.call(Request::Lookup { parent: inode, name: (*b"..").into() }).await?;
                    assert!(matches!(&up, Reply::Entry(up) if up.inode == parent), "{path}/..: {up:?}");
                }
                let mut entries = list(volume, inode, 64).await?;
                entries.sort_by(|a, b| b.name.cmp(&a.name));
                for entry in entries {
                    let name = name_of(&entry.name);
                    let looked_up = lookup(volume, inode, &name).await?;
                    assert_eq!(
                        (looked_up.inode, looked_up.kind),
                        (entry.inode, entry.kind),
                        "{path}/{name}: listing and lookup disagree"
                    );
                    stack.push((format!("{path}/{name}"), entry.inode, inode));
                }
            }
            _ => {}
        }
    }
    Ok(found)
}

/// The first difference of two texts, line by line.
fn difference(found: &str, expected: &str) -> String {
    let (mut found, mut expected) = (found.lines(), expected.lines());
    loop {
        match (found.next(), expected.next()) {
            (None, None) => return "none".to_owned(),
            (found, expected) if found == expected => {}
            (found, expected) => {
                return format!("\n  found    {found:?}\n  expected {expected:?}");
            }
        }
    }
}

/// Walks all clients' trees and says which version of each was found.
///
/// # Errors
/// What is not legal.
pub(super) async fn judge(volume: &Volume, history: &History, mark: &Mark) -> Result<Vec<usize>, Verdict> {
    let mut found = Vec::new();
    for client in 0..history.clients() {
        let name = top_name(client);
        let top = lookup(volume, Volume::ROOT, &name).await.map_err(|error| missing(&name, error))?;
        found.push(walk(volume, top.inode).await?);
    }
    let kept = find_cut(history, mark, &found).map_err(Verdict::Illegal)?;
    for (client, found) in found.iter().enumerate() {
        judge_data(volume, history, mark, client, kept[client], found).await?;
    }
    Ok(kept)
}

/// A name that is not there is a name that is lost.
fn missing(name: &str, error: FsError) -> Verdict {
    match error {
        FsError::NotFound => Verdict::Illegal(format!("{name} is not there")),
        error => Verdict::Error(error),
    }
}

/// The earliest version of each client that fits what was found and the others' versions.
fn find_cut(history: &History, mark: &Mark, found: &[Found]) -> Result<Vec<usize>, String> {
    let mut kept: Vec<usize> = vec![0; found.len()];
    loop {
        let before = kept.clone();
        for client in 0..found.len() {
            let others = (0..found.len()).filter(|other| *other != client);
            let implied =
                others.map(|other| history.implied(mark, client, other, kept[other])).max().unwrap_or(0);
            let least = implied.max(kept[client]);
            let candidates = history.candidates(mark, client).filter(|(number, _)| *number >= least);
            let fits = |(number, version): &(usize, &Version)| {
                *version.canon == found[client].canon
                    && history.has_inodes(client, *number, &found[client].inodes)
            };
            kept[client] = candidates.into_iter().find(fits).map(|(number, _)| number).ok_or_else(|| {
                let (number, version) =
                    history.candidates(mark, client).last().expect("a client has a newest version");
                let any =
                    (0..=number).rev().find(|number| fits(&(*number, history.version(client, *number))));
                format!(
                    "client {client}: names and attributes are those of version {any:?}; legal are {least} \
                     (or the floor {:?}) to {number} ({}); difference to the newest: {}",
                    history.candidates(mark, client).next().map(|(number, _)| number),
                    version.op,
                    difference(&found[client].canon, &version.canon),
                )
            })?;
        }
        if kept == before {
            return Ok(kept);
        }
    }
}

async fn judge_data(
    volume: &Volume,
    history: &History,
    mark: &Mark,
    client: usize,
    kept: usize,
    found: &Found,
) -> Result<(), Verdict> {
    let version = history.version(client, kept);
    let mut paths = BTreeMap::new();
    let mut stack = vec![(String::new(), super::model::TOP)];
    while let Some((path, node)) = stack.pop() {
        for (name, child) in &version.nodes[&node].entries {
            stack.push((format!("{path}/{name}"), *child));
        }
        paths.insert(path, node);
    }
    for (path, file) in &found.files {
        let node = paths[path];
        judge_size(history, mark, client, node, kept, file.size)
            .map_err(|why| Verdict::Illegal(format!("client {client} {path}: {why}")))?;
        let mut blocks: Vec<u64> = (0..file.size.min(1 << 20).div_ceil(BLOCK_SIZE)).collect();
        for version in history.window(mark, client, node, 0, 0) {
            let written = version.nodes.get(&node).into_iter().flat_map(|node| node.contents.blocks.keys());
            blocks.extend(written.filter(|block| **block * BLOCK_SIZE < file.size));
        }
        blocks.sort_unstable();
        blocks.dedup();
        for block in blocks {
            let versions = history.window(mark, client, node, block, kept);
            let length = (file.size - block * BLOCK_SIZE).min(BLOCK_SIZE) as u32;
            let offset = FileOffset::new(block * BLOCK_SIZE);
            let data = bytes(volume, Request::Read { inode: file.inode, offset, length }).await;
            let data = data?;
            judge_block(node, block, &data, versions).map_err(|why| {
                let ops: Vec<&str> = versions.iter().map(|version| &*version.op).collect();
                let size = file.size;
                Verdict::Illegal(format!(
                    "client {client} {path} block {block} (size {size}): {why}; since then: {ops:#?}"
                ))
            })?;
        }
    }
    Ok(())
}

fn judge_size(
    history: &History,
    mark: &Mark,
    client: usize,
    node: NodeId,
    kept: usize,
    size: u64,
) -> Result<(), String> {
    let versions = history.window(mark, client, node, u64::MAX - 1, kept);
    let sizes: Vec<u64> =
        versions.iter().filter_map(|version| Some(version.nodes.get(&node)?.contents.size)).collect();
    let (least, most) = (sizes.iter().min().copied().unwrap_or(0), sizes.iter().max().copied().unwrap_or(0));
    let reached = |version: &Version| version.reaches.filter(|(file, _)| *file == node).map(|(_, end)| end);
    let allocated = versions.iter().filter_map(reached).any(|end| end == size);
    // Between two sizes, the end of anything that was written.
    let between = size.is_multiple_of(BLOCK_SIZE) && (least..=most).contains(&size);
    if between || allocated || sizes.contains(&size) {
        Ok(())
    } else {
        Err(format!("size {size}; legal are {sizes:?}"))
    }
}

fn judge_block(node: NodeId, block: u64, data: &[u8], versions: &[Version]) -> Result<(), String> {
    let mut was_behind_the_end = false;
    for version in versions {
        let Some(node) = version.nodes.get(&node) else {
            was_behind_the_end = true;
            continue;
        };
        if node.contents.size <= block * BLOCK_SIZE {
            was_behind_the_end = true;
            continue;
        }
        let expected = node.contents.blocks.get(&block);
        let zero = data.iter().all(|byte| *byte == 0);
        if was_behind_the_end && zero {
            return Ok(());
        }
        match expected {
            Some(expected) if expected[..data.len()] == *data => return Ok(()),
            None if zero => return Ok(()),
            _ => {}
        }
    }
    let newest =
        versions.iter().rev().find_map(|version| version.nodes.get(&node)?.contents.blocks.get(&block));
    let differs = newest.and_then(|newest| (0..data.len()).find(|at| newest[*at] != data[*at]));
    Err(format!(
        "has none of the contents of {} versions; it begins {:02x?}, the newest {:02x?}, first difference at {differs:?}",
        versions.len(),
        &data[..data.len().min(16)],
        newest.map(|newest| &newest[..16]),
    ))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use super::super::client::{Client, Ending};
    use super::super::crash::short_shape;
    use super::super::faults::judge_now;
    use super::super::model::{Made, Op, TOP};
    use super::super::world::{Trouble, prepared, session};
    use super::*;
    use crate::request::{RenameMode, SyncScope};

    /// Who knows that the two files change places.
    #[derive(Clone, Copy)]
    enum Exchange {
        Told,
        Untold,
    }

    /// Two files that look alike are synced and then change places. Returns what is said of the volume.
    fn exchanged(exchange: Exchange, sizes: [u64; 2]) -> Result<(), Trouble> {
        let shape = short_shape();
        let (disk, history) = prepared(&shape, 1);
        let history = Rc::new(RefCell::new(history));
        session(&shape, &disk, &history, 10, async move |client: &mut Client| {
            for (name, size) in ["a", "b"].into_iter().zip(sizes) {
                let node = client.model.next_node();
                let make = Op::Create {
                    parent: TOP,
                    name: name.to_owned(),
                    made: Made::Regular,
                    permissions: 0o600,
                };
                for op in [make, Op::Truncate { node, size }, Op::Sync { node, scope: SyncScope::Volume }] {
                    assert_eq!(client.step(&op).await, Ending::Finished);
                }
            }
            let (name, new_name, mode) = ("a".to_owned(), "b".to_owned(), RenameMode::Exchange);
            let op = Op::Rename { parent: TOP, name, new_parent: TOP, new_name, mode };
            if let Exchange::Told = exchange {
                return client.step(&op).await;
            }
            let top = client.inodes[&TOP];
            let (name, new_name) = ((*b"a").into(), (*b"b").into());
            let rename = Request::Rename { parent: top, name, new_parent: top, new_name, mode };
            assert_eq!(client.volume.call(rename).await, Ok(Reply::Done));
            Ending::Finished
        });
        judge_now(&shape, &disk, &history)
    }

    #[test]
    fn files_that_look_alike_may_have_changed_places() {
        exchanged(Exchange::Told, [1, 2 << 30]).unwrap_or_else(|why| panic!("{why}"));
    }

    #[test]
    fn files_that_nobody_let_change_places_are_noticed() {
        let why = exchanged(Exchange::Untold, [0, 0]).expect_err("the files changed places").to_string();
        assert!(why.contains("names and attributes"), "{why}");
    }
}
