//! Sweeps: everything that a volume's metadata or a device can have wrong, one thing at a time.
//!
//! Owns: the small volume that is swept, [`Tree`], which is all that a walk finds, and [`examine`], which reads a damaged
//! volume and says what came of it. `bits` inverts every bit of the metadata; `writes` has a device that does one write
//! wrong.
//!
//! The rule: what is read is right, or an error, or the volume is read-only and says why; and whatever a mount meets,
//! the check finds, too. Excludes: many faults at once (`faults`), crashes (`crash`).

use std::collections::BTreeMap;

use reactor::sim::DiskImage;

use super::client::list;
use super::clone::{clone, pattern, patterns, sync_file, whole};
use super::world::{Shape, fsck};
use super::*;
use crate::request::{AllocateMode, SetXattrMode};
use crate::types::BLOCK_SIZE;

mod bits;
mod writes;

/// What a walk found at each path, or why it could not. A directory's listing has a line of its own, its path with a
/// slash.
pub(super) type Tree = BTreeMap<String, Result<String, FsError>>;

/// Little memory; nothing is committed but by those who ask.
fn shape() -> Shape {
    let mount = MountOptions { commit_interval: Duration::from_secs(36_000), ..MountOptions::default() };
    Shape { seed: 5, shards: 2, reactors: 1, blocks: 16 * 1024, mount }
}

/// Says what was examined when a test panics.
struct Note(String);

impl Drop for Note {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("while examining {}", self.0);
        }
    }
}

/// Whether times are part of what is read. They are the same only if what was done took the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Times {
    Compared,
    LeftOut,
}

/// Reads everything.
async fn tree(volume: &Volume, times: Times) -> Tree {
    let mut tree = Tree::new();
    below(volume, Volume::ROOT, "", times, &mut tree).await;
    tree
}

async fn below(volume: &Volume, directory: InodeNr, path: &str, times: Times, tree: &mut Tree) {
    let entries = list(volume, directory, 64).await;
    tree.insert(format!("{path}/"), entries.as_ref().map(|_| String::new()).map_err(Clone::clone));
    for entry in entries.unwrap_or_default() {
        let name = String::from_utf8(entry.name.to_vec()).expect("names of these tests are text");
        let path = format!("{path}/{name}");
        tree.insert(path.clone(), describe(volume, directory, &name, times).await);
        if entry.kind == FileKind::Directory {
            Box::pin(below(volume, entry.inode, &path, times, tree)).await;
        }
    }
}

async fn bytes(volume: &Volume, request: Request) -> Result<Vec<u8>, FsError> {
    match volume.call(request).await? {
        Reply::Data(data) => Ok(data),
        other => panic!("{other:?}"),
    }
}

/// Everything about an inode that a program can see.
async fn describe(volume: &Volume, directory: InodeNr, name: &str, times: Times) -> Result<String, FsError> {
    let found = lookup(volume, directory, name).await?;
    let inode = found.inode;
    let contents = match found.kind {
        FileKind::Regular => {
            let whole = Request::Read { inode, offset: FileOffset::new(0), length: found.size as u32 };
            bytes(volume, whole).await?
        }
        FileKind::Symlink => bytes(volume, Request::ReadLink { inode }).await?,
        _ => Vec::new(),
    };
    let mut line = format!(
        "{inode} {:?} {:o} {}:{} links {} size {} sectors {} crc {:08x}",
        found.kind,
        found.permissions,
        found.uid,
        found.gid,
        found.links,
        found.size,
        found.sectors,
        crc32c::crc32c(&contents),
    );
    if times == Times::Compared {
        line += &format!(" modified {:?} created {:?}", found.modified, found.created);
    }
    let names = bytes(volume, Request::ListXattr { inode }).await?;
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let value = bytes(volume, Request::GetXattr { inode, name: name.into() }).await?;
        line += &format!(" {}={:08x}", name.escape_ascii(), crc32c::crc32c(&value));
    }
    Ok(line)
}

/// How far a walk found what it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reading {
    /// All of it.
    Same,
    /// Part of it; the rest were errors.
    Errors,
}

/// Compares what was found with what was there: it may be an error, and nothing else.
fn compare(expected: &Tree, found: &Tree) -> Result<Reading, String> {
    let refused = |path: &str| {
        let above = path.match_indices('/').flat_map(|(at, _)| [&path[..at], &path[..=at]]);
        above.chain([path]).any(|above| matches!(found.get(above), Some(Err(_))))
    };
    let mut reading = Reading::Same;
    for (path, line) in expected {
        match found.get(path) {
            Some(Ok(found)) if Ok(found) == line.as_ref() => {}
            Some(Err(FsError::Damaged { .. } | FsError::Io(_))) => reading = Reading::Errors,
            None if refused(path) => reading = Reading::Errors,
            other => return Err(format!("{path} is\n  {other:?}, and was\n  {line:?}")),
        }
    }
    match found.keys().find(|path| !expected.contains_key(*path)) {
        Some(path) => Err(format!("{path} was not there: {:?}", found[path])),
        None => Ok(reading),
    }
}

/// What came of reading a damaged volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    /// Everything is as it was, and the check is content.
    Harmless,
    /// Everything is as it was, and the check has found the damage.
    Reported,
    /// Part of it is an error.
    Errors,
    /// The volume is read-only, and says why.
    ReadOnly,
    /// The volume is not mounted.
    Refused,
    /// The last entry of the log is not there, as if the power had gone before it was written.
    TailLost,
}

/// What a volume may hold, each time any of these.
struct Legal<'a> {
    now: &'a [Tree],
    /// What there was before the last entry of the log, if that is what is damaged: nothing tells it from an entry whose
    /// write a power cut has prevented.
    tail: &'a [Tree],
    /// For a volume that is read-only.
    ever: &'a [Tree],
}

impl Legal<'_> {
    fn judge(&self, found: &Tree, clean: bool) -> Result<Outcome, String> {
        let closest = |trees: &[Tree]| {
            let readings: Vec<_> = trees.iter().map(|tree| compare(tree, found)).collect();
            let best = readings.iter().find(|reading| **reading == Ok(Reading::Same));
            best.or(readings.iter().find(|reading| reading.is_ok())).or(readings.last()).cloned()
        };
        match closest(self.now).expect("something is legal") {
            Ok(Reading::Same) if clean => Ok(Outcome::Harmless),
            Ok(Reading::Same) => Ok(Outcome::Reported),
            Ok(Reading::Errors) => Ok(Outcome::Errors),
            Err(why) => match closest(self.tail) {
                Some(Ok(_)) => Ok(Outcome::TailLost),
                _ => Err(format!("shows what is wrong: {why}")),
            },
        }
    }
}

/// Checks and mounts the volume on `disk`, reads all of it, makes something new, and unmounts.
///
/// # Errors
/// What breaks the rule of this module.
fn examine(shape: &Shape, disk: &SimDisk, times: Times, legal: &Legal<'_>) -> Result<Outcome, String> {
    let check = fsck(shape, disk);
    let clean = check.is_ok();
    let mounted = shape.mounted(disk, 70, async |_: &Context, volume: &Volume| {
        let found = tree(volume, times).await;
        let read_only = volume.report().await.ok().and_then(|report| report.read_only);
        let made = volume
            .call(Request::Create {
                parent: Volume::ROOT,
                name: (*b"made after the damage").into(),
                new: NewInode::Directory,
                permissions: 0o755,
                caller: Caller { uid: 0, gid: 0 },
            })
            .await;
        let unmounted = volume.unmount().await;
        (found, read_only, made.map(|_| ()), unmounted)
    });
    let outcome = match mounted {
        Err(_) => Outcome::Refused,
        Ok((found, Some(why), ..)) => match legal.ever.iter().find(|tree| compare(tree, &found).is_ok()) {
            Some(_) => Outcome::ReadOnly,
            None => return Err(format!("is read-only ({why}), and shows what never was: {found:#?}")),
        },
        Ok((found, None, made, unmounted)) => {
            let outcome = legal.judge(&found, clean)?;
            if clean && outcome != Outcome::Errors {
                made.map_err(|error| format!("the check is content, and nothing can be made: {error}"))?;
                unmounted
                    .map_err(|error| format!("the check is content, and it does not unmount: {error}"))?;
                fsck(shape, disk).map_err(|why| format!("is not clean after an unmount: {why}"))?;
            }
            outcome
        }
    };
    match outcome {
        Outcome::Errors | Outcome::ReadOnly | Outcome::Refused if clean => {
            Err(format!("comes to {outcome:?}, and the check is content"))
        }
        _ => Ok(outcome),
    }
}

/// The volume that is swept: names and contents of all kinds in both shards, clones within and between them, an orphan,
/// trees with inner nodes, and a log that was not replayed.
struct Swept {
    shape: Shape,
    image: DiskImage,
    /// Before the first entry of the log, and after each.
    trees: Vec<Tree>,
}

impl Swept {
    fn new() -> Self {
        let shape = shape();
        let disk = shape.formatted();
        let mut trees = Vec::new();
        let run = async |_: &Context, volume: &Volume| {
            let near_and_far = fill_trees(volume).await;
            fill_log(volume, near_and_far, &mut trees).await;
        };
        shape.mounted(&disk, 1, run).expect("a new volume mounts");
        Self { image: disk.image_after_cut(&CutPolicy::DropAll), shape, trees }
    }

    /// The same after a mount and an unmount: nothing is read to mount it but superblock, bitmaps and what orphans need.
    fn unmounted() -> Self {
        let Self { shape, image, trees } = Self::new();
        let disk = shape.disk(image);
        let run = async |_: &Context, volume: &Volume| {
            volume.unmount().await.expect("an idle volume unmounts");
        };
        shape.mounted(&disk, 2, run).expect("a volume that lost power mounts");
        Self { image: disk.image(), shape, trees }
    }

    fn legal(&self) -> Legal<'_> {
        Legal { now: &self.trees[self.trees.len() - 1..], tail: &[], ever: &self.trees }
    }
}

async fn set_attribute(volume: &Volume, inode: InodeNr, name: &str, value: &[u8]) {
    let (name, value) = (name.as_bytes().into(), value.into());
    volume.call(Request::SetXattr { inode, name, value, mode: SetXattrMode::Set }).await.unwrap();
}

async fn file(volume: &Volume, parent: InodeNr, name: &str, data: &[u8]) -> InodeNr {
    let inode = create(volume, parent, name, NewInode::Regular).await.inode;
    write(volume, inode, 0, data).await;
    inode
}

async fn allocate(volume: &Volume, inode: InodeNr, blocks: std::ops::Range<u64>, mode: AllocateMode) {
    let (offset, length) =
        (FileOffset::new(blocks.start * BLOCK_SIZE), (blocks.end - blocks.start) * BLOCK_SIZE);
    volume.call(Request::Allocate { inode, offset, length, mode }).await.unwrap();
}

/// A directory of another shard than the root's.
async fn far_directory(volume: &Volume) -> InodeNr {
    for number in 0..40 {
        let made = create(volume, Volume::ROOT, &format!("directory {number}"), NewInode::Directory).await;
        if made.inode.shard() != Volume::ROOT.shard() {
            return made.inode;
        }
    }
    panic!("forty directories, all in one shard");
}

async fn orphan(volume: &Volume, parent: InodeNr, name: &str) {
    let inode = file(volume, parent, name, &patterns(6, 3)).await;
    sync_file(volume, inode).await;
    volume.call(Request::Unlink { parent, name: name.as_bytes().into() }).await.unwrap();
}

/// What the trees hold; returns a file of the first shard and a directory of the second.
async fn fill_trees(volume: &Volume) -> (InodeNr, InodeNr) {
    let far = far_directory(volume).await;
    let big = file(volume, Volume::ROOT, "big", &patterns(1, 24)).await;
    let holes = file(volume, Volume::ROOT, "holes", b"").await;
    for block in [0, 7, 8, 40] {
        write(volume, holes, block * BLOCK_SIZE + 100, &pattern(2, block)[..3000]).await;
    }
    allocate(volume, holes, 20..30, AllocateMode::Extend).await;
    allocate(volume, holes, 50..60, AllocateMode::KeepSize).await;
    sync(volume).await;
    allocate(volume, big, 10..12, AllocateMode::PunchHole).await;
    let near_clone = file(volume, Volume::ROOT, "clone", b"").await;
    clone(volume, whole(big, near_clone)).await.unwrap();
    write(volume, near_clone, 4 * BLOCK_SIZE, &pattern(3, 4)).await;
    let far_clone = file(volume, far, "clone from the other shard", b"").await;
    clone(volume, whole(big, far_clone)).await.unwrap();
    for number in 0..6 {
        // Long enough that each tree has an inner node.
        set_attribute(volume, big, &format!("user.{number}"), &[number; 3000]).await;
        set_attribute(volume, far_clone, &format!("user.{number}"), &[number ^ 7; 3000]).await;
    }
    create(volume, far, "link", NewInode::Symlink(b"../big".as_slice().into())).await;
    create(volume, Volume::ROOT, "fifo", NewInode::Fifo).await;
    volume.call(Request::Link { inode: big, new_parent: far, new_name: (*b"second").into() }).await.unwrap();
    orphan(volume, Volume::ROOT, "deleted while open").await;
    sync(volume).await;
    volume.shared.checkpoint_now().await.unwrap();
    (holes, far)
}

/// What only the log holds, and in `trees` what there was before each entry and after the last.
async fn fill_log(volume: &Volume, (holes, far): (InodeNr, InodeNr), trees: &mut Vec<Tree>) {
    trees.push(tree(volume, Times::Compared).await);
    let logged = file(volume, far, "only in the log", &patterns(4, 2)).await;
    sync_file(volume, logged).await;
    trees.push(tree(volume, Times::Compared).await);
    write(volume, holes, 8 * BLOCK_SIZE, &pattern(5, 8)).await;
    volume.call(Request::Unlink { parent: Volume::ROOT, name: (*b"fifo").into() }).await.unwrap();
    sync_file(volume, holes).await;
    trees.push(tree(volume, Times::Compared).await);
    set_attribute(volume, logged, "user.in", b"the log").await;
    write(volume, logged, BLOCK_SIZE, &pattern(8, 1)).await;
    sync_file(volume, logged).await;
    trees.push(tree(volume, Times::Compared).await);
}
