//! The volume of format version 1 that has to stay readable for ever, as it was left by a power cut.
//!
//! | file of `fs-core/golden` | holds |
//! |---|---|
//! | `v1.image.zlib` | the blocks that are not zero: number (8 bytes, little-endian) and contents of each, compressed |
//! | `v1.files` | a line for each name: path, kind, size, and CRC32C of its contents or target |
//! | `v1.dump` | `pollux dump` of all parts of it |
//!
//! The image was made by [`golden_image_is_made`], once. It is never made again for a version that people have: a change
//! after which these tests fail is a change after which their volumes cannot be read. What to do then is in [`ADVICE`].

use std::fmt::Write;
use std::path::{Path, PathBuf};

use reactor::sim::DiskImage;

use super::clone::{clone, pattern, patterns, sync_file, whole};
use super::world::{Shape, fsck};
use super::*;
use crate::dump::{Part, Selection, dump};
use crate::request::{AllocateMode, CloneRange, SetXattrMode};
use crate::types::BLOCK_SIZE;

mod documented;

/// Bytes of the image in the repository at most.
const LIMIT: usize = 1 << 20;

const ADVICE: &str = "the format of version 1 is not what it was: volumes that exist would be misread. Keep \
    reading version 1 as it is, and give what is new a feature flag or a version of its own, with a golden image of \
    its own (docs/testing.md, Golden image). If only the text of `pollux dump` has changed, set GOLDEN_DUMP=write and \
    run this test once";

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}

fn shape() -> Shape {
    let mount = MountOptions { commit_interval: Duration::from_secs(36_000), ..MountOptions::default() };
    Shape { seed: 1, shards: 2, reactors: 1, blocks: 16 * 1024, mount }
}

fn pack(image: &DiskImage) -> Vec<u8> {
    let mut plain = Vec::new();
    let mut block = vec![0; BLOCK_SIZE as usize];
    for number in 0..image.len() / BLOCK_SIZE {
        image.read(number * BLOCK_SIZE, &mut block);
        if block.iter().any(|byte| *byte != 0) {
            plain.extend_from_slice(&number.to_le_bytes());
            plain.extend_from_slice(&block);
        }
    }
    miniz_oxide::deflate::compress_to_vec_zlib(&plain, 10)
}

fn golden() -> SimDisk {
    let path = folder().join("v1.image.zlib");
    let packed = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert!(packed.len() <= LIMIT, "{} is larger than {LIMIT} bytes", path.display());
    let plain = miniz_oxide::inflate::decompress_to_vec_zlib(&packed).expect("the image is compressed");
    let mut image = DiskImage::zeroed(shape().blocks * BLOCK_SIZE);
    for record in plain.chunks_exact(8 + BLOCK_SIZE as usize) {
        let (number, block) = record.split_first_chunk().unwrap();
        image.write(u64::from_le_bytes(*number) * BLOCK_SIZE, block);
    }
    shape().disk(image)
}

fn dumped(disk: &SimDisk) -> String {
    let mut text = Vec::new();
    for part in [Part::Superblock, Part::Groups, Part::Nodes, Part::Items] {
        let selection = Selection { part, ..Selection::default() };
        let sim = shape().simulator(disk, 3);
        let summary = sim.block_on(0, async |ctx: Context| dump(&ctx, &selection, &mut text).await);
        assert_eq!(summary.unwrap().unwrap().damaged, 0, "{ADVICE}");
    }
    String::from_utf8(text).unwrap()
}

/// A line for each name below `directory`.
async fn describe(volume: &Volume, directory: InodeNr, path: &str, lines: &mut String) {
    let list = Request::ReadDirectory { inode: directory, after: 0, limit: 1000 };
    let Ok(Reply::Directory(mut entries)) = volume.call(list).await else {
        panic!("{path} cannot be listed")
    };
    entries.retain(|entry| !matches!(&*entry.name, b"." | b".."));
    entries.sort_by(|left, right| left.name.cmp(&right.name));
    for entry in entries {
        let name = String::from_utf8(entry.name.to_vec()).unwrap();
        let path = format!("{path}/{name}");
        let found = lookup(volume, directory, &name).await.unwrap();
        let contents = match found.kind {
            FileKind::Regular => read(volume, found.inode, 0, u32::try_from(found.size).unwrap()).await,
            FileKind::Symlink => match volume.call(Request::ReadLink { inode: found.inode }).await {
                Ok(Reply::Data(target)) => target,
                other => panic!("{path}: {other:?}"),
            },
            _ => Vec::new(),
        };
        let crc = crc32c::crc32c(&contents);
        let (kind, mode, links) = (found.kind, found.permissions, found.links);
        writeln!(lines, "{path} {kind:?} {mode:04o} links {links} size {} crc {crc:08x}", found.size)
            .unwrap();
        let names = match volume.call(Request::ListXattr { inode: found.inode }).await {
            Ok(Reply::Data(names)) => names,
            other => panic!("{path}: {other:?}"),
        };
        for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            let value = volume.call(Request::GetXattr { inode: found.inode, name: name.into() }).await;
            let Ok(Reply::Data(value)) = value else { panic!("{path}: {value:?}") };
            let crc = crc32c::crc32c(&value);
            writeln!(lines, "{path} attribute {} crc {crc:08x}", name.escape_ascii()).unwrap();
        }
        if found.kind == FileKind::Directory {
            Box::pin(describe(volume, found.inode, &path, lines)).await;
        }
    }
}

fn files_of(disk: &SimDisk) -> String {
    let run = async |_: &Context, volume: &Volume| {
        assert_eq!(volume.report().await.unwrap().read_only, None, "{ADVICE}");
        let mut lines = String::new();
        describe(volume, Volume::ROOT, "", &mut lines).await;
        volume.unmount().await.unwrap();
        lines
    };
    shape().mounted(disk, 2, run).unwrap_or_else(|error| panic!("{error}: {ADVICE}"))
}

async fn file(volume: &Volume, parent: InodeNr, name: &str, data: &[u8]) -> InodeNr {
    let inode = create(volume, parent, name, NewInode::Regular).await.inode;
    for (number, piece) in data.chunks(64 << 10).enumerate() {
        write(volume, inode, (number as u64) << 16, piece).await;
    }
    inode
}

async fn allocate(volume: &Volume, inode: InodeNr, blocks: std::ops::Range<u64>, mode: AllocateMode) {
    let (offset, length) =
        (FileOffset::new(blocks.start * BLOCK_SIZE), (blocks.end - blocks.start) * BLOCK_SIZE);
    volume.call(Request::Allocate { inode, offset, length, mode }).await.unwrap();
}

/// Directories in the root until there is one of each shard: `near`, and `far` of the other.
async fn directories(volume: &Volume) -> (InodeNr, InodeNr) {
    let (mut near, mut far) = (None, None);
    for number in 0..40 {
        let made =
            create(volume, Volume::ROOT, &format!("directory {number}"), NewInode::Directory).await.inode;
        let place = if made.shard() == Volume::ROOT.shard() { &mut near } else { &mut far };
        place.get_or_insert(made);
    }
    (near.unwrap(), far.unwrap())
}

/// Everything that the format has a word for: first in the trees, then in the log.
async fn fill(volume: &Volume) {
    let (near, far) = directories(volume).await;
    let big = file(volume, near, "big", &patterns(1, 300)).await;
    let holes = file(volume, near, "holes", b"").await;
    for block in [0, 7, 8, 900] {
        write(volume, holes, block * BLOCK_SIZE + 100, &pattern(2, block)[..3000]).await;
    }
    allocate(volume, holes, 20..50, AllocateMode::Extend).await;
    allocate(volume, holes, 1000..1010, AllocateMode::KeepSize).await;
    sync(volume).await;
    allocate(volume, big, 10..12, AllocateMode::PunchHole).await;
    let near_clone = file(volume, near, "clone", b"").await;
    clone(volume, whole(big, near_clone)).await.unwrap();
    write(volume, near_clone, 4 * BLOCK_SIZE, &pattern(3, 4)).await;
    let far_clone = file(volume, far, "clone from the other shard", b"").await;
    clone(volume, whole(big, far_clone)).await.unwrap();
    let (start, to) = (FileOffset::new(0), FileOffset::new(64 * BLOCK_SIZE));
    let range = CloneRange {
        source: far_clone,
        source_offset: start,
        target: far_clone,
        target_offset: to,
        length: 8 * BLOCK_SIZE,
    };
    clone(volume, range).await.unwrap();
    let attribute = async |inode, name: &str, value: &[u8]| {
        let (name, value) = (name.as_bytes().into(), value.into());
        let set = Request::SetXattr { inode, name, value, mode: SetXattrMode::Set };
        volume.call(set).await.unwrap();
    };
    attribute(big, "user.colour", b"green").await;
    attribute(big, "user.long", &[7; 3000]).await;
    attribute(far, "security.x", b"").await;
    create(volume, far, "link", NewInode::Symlink(b"../directory 0/big".as_slice().into())).await;
    create(volume, near, "fifo", NewInode::Fifo).await;
    create(volume, near, "socket", NewInode::Socket).await;
    create(volume, near, "null", NewInode::CharDevice(0x103)).await;
    create(volume, near, "disk", NewInode::BlockDevice(0x800)).await;
    let new_name = "Zweitname ä ☂".as_bytes().into();
    volume.call(Request::Link { inode: big, new_parent: far, new_name }).await.unwrap();
    for number in 0..150 {
        file(volume, if number % 2 == 0 { near } else { far }, &format!("small {number}"), b"small").await;
    }
    orphan(volume, near, "deleted while open").await;
    sync(volume).await;
    volume.shared.checkpoint_now().await.unwrap();
    // From here on, the log.
    let logged = file(volume, far, "only in the log", &patterns(4, 5)).await;
    sync_file(volume, logged).await;
    write(volume, holes, 8 * BLOCK_SIZE, &pattern(5, 8)).await;
    attribute(logged, "user.in", b"the log").await;
    volume.call(Request::Unlink { parent: near, name: b"small 4".as_slice().into() }).await.unwrap();
    sync_file(volume, holes).await;
    orphan(volume, far, "deleted in the log").await;
    sync_file(volume, logged).await;
}

/// A file without a name that a handle keeps, with data.
async fn orphan(volume: &Volume, parent: InodeNr, name: &str) {
    let inode = file(volume, parent, name, &patterns(6, 3)).await;
    sync_file(volume, inode).await;
    volume.call(Request::Unlink { parent, name: name.as_bytes().into() }).await.unwrap();
}

#[test]
#[ignore = "makes the image of a new version of the format; see docs/testing.md"]
fn golden_image_is_made() {
    let shape = shape();
    let disk = shape.formatted();
    shape.mounted(&disk, 1, async |_: &Context, volume: &Volume| fill(volume).await).unwrap();
    let image = disk.image_after_cut(&CutPolicy::DropAll);
    let packed = pack(&image);
    assert!(packed.len() <= LIMIT, "{} bytes are too many", packed.len());
    let disk = shape.disk(image);
    fsck(&shape, &disk).unwrap();
    let dump = dumped(&disk);
    let files = files_of(&disk);
    let folder = folder();
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("v1.image.zlib"), packed).unwrap();
    std::fs::write(folder.join("v1.dump"), dump).unwrap();
    std::fs::write(folder.join("v1.files"), files).unwrap();
}

/// The first line that differs, or nothing.
fn difference(found: &str, expected: &str) -> Option<String> {
    let (mut found, mut expected) = (found.lines(), expected.lines());
    for number in 1.. {
        let (found, expected) = (found.next(), expected.next());
        if found != expected {
            return Some(format!("line {number} is\n  {found:?}, and was\n  {expected:?}"));
        }
        found?;
    }
    None
}

#[test]
fn golden_image_is_clean() {
    fsck(&shape(), &golden()).unwrap_or_else(|found| panic!("{found}: {ADVICE}"));
}

#[test]
fn golden_image_mounts_with_all_its_files() {
    let expected = std::fs::read_to_string(folder().join("v1.files")).unwrap();
    let disk = golden();
    // The first mount replays the log; the second finds what the first has written.
    for _ in 0..2 {
        if let Some(difference) = difference(&files_of(&disk), &expected) {
            panic!("v1.files: {difference}\n{ADVICE}");
        }
        fsck(&shape(), &disk).unwrap();
    }
}

#[test]
fn golden_image_is_dumped_as_ever() {
    let path = folder().join("v1.dump");
    let found = dumped(&golden());
    if std::env::var("GOLDEN_DUMP").is_ok_and(|value| value == "write") {
        std::fs::write(&path, &found).unwrap();
    }
    if let Some(difference) = difference(&found, &std::fs::read_to_string(&path).unwrap()) {
        panic!("{}: {difference}\n{ADVICE}", path.display());
    }
}

#[test]
fn golden_image_has_every_kind_of_item() {
    let dump = std::fs::read_to_string(folder().join("v1.dump")).unwrap();
    let has = |words: &str| dump.lines().any(|line| line.contains(words));
    // Returns exist for an instant only.
    for kind in crate::dump::kind_names().filter(|kind| *kind != "return") {
        assert!(has(&format!(": {kind} ")), "no {kind}");
    }
    for words in ["Preallocated", "Orphan", "borrowed from shard", "log entry 2:", "references 2"] {
        assert!(has(words), "nothing with {words:?}");
    }
}
