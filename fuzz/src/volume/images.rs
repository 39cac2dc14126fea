//! The volumes that inputs change.
//!
//! Owns: [`bases`]. There are three, all with the same files:
//!
//! | base | shards | log |
//! |---|---|---|
//! | 0 | 2 | not replayed: the power went after several fsyncs |
//! | 1 | 2 | empty: the volume was unmounted |
//! | 2 | 1 | not replayed |
//!
//! The device is larger than its volume, by less than a group: what is written behind the end is seen there.

use std::sync::OnceLock;
use std::time::Duration;

use fs_core::mkfs::{Force, FormatOptions, Owner, format};
use fs_core::request::{
    AllocateMode, Attributes, Caller, CloneRange, KillPrivileges, NewInode, SetXattrMode, SyncScope,
    WriteSource,
};
use fs_core::types::{BLOCK_SIZE, FileOffset, InodeNr};
use fs_core::{FsError, MountOptions, Reply, Request, Volume};
use reactor::sim::{CutPolicy, DiskImage, SimDisk, SimDiskOptions, SimOptions, Simulator};
use reactor::{Context, ReactorHandle};

use super::map::Map;

/// Number of [`bases`].
pub const BASES: usize = 3;

/// Blocks of the device behind the end of the volume.
pub const BEHIND: u64 = 64;

/// Rounds of the simulator after which something counts as hung: a hundred times what honest volumes need.
pub const MAX_ROUNDS: u64 = 2_000_000;

/// Bytes of a queue's buffer pool.
const POOL_BYTES: usize = 2 << 20;

/// A volume, and where everything in it lies.
#[derive(Debug)]
pub struct Base {
    /// The device.
    pub image: DiskImage,
    /// The volume on it.
    pub map: Map,
}

/// The volumes.
pub fn bases() -> &'static [Base; BASES] {
    static MADE: OnceLock<[Base; BASES]> = OnceLock::new();
    MADE.get_or_init(|| [made(2, Ending::PowerCut), made(2, Ending::Unmount), made(1, Ending::PowerCut)])
}

/// How the last mount of a volume came to its end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    PowerCut,
    Unmount,
}

/// A simulated device with this image.
pub fn disk(image: DiskImage) -> SimDisk {
    let options = SimDiskOptions {
        blocks: image.len() / BLOCK_SIZE,
        pool_bytes: POOL_BYTES,
        latency: Duration::from_micros(10)..=Duration::from_micros(10),
        ..SimDiskOptions::default()
    };
    SimDisk::from_image(options, image)
}

/// A reactor with a queue of `disk`.
pub fn simulator(disk: &SimDisk) -> Simulator {
    let options = SimOptions { disk: Some(disk.clone()), max_rounds: MAX_ROUNDS, ..SimOptions::default() };
    Simulator::new(options)
}

/// Little memory, so that tree nodes are read again; and nothing becomes durable by itself.
pub fn mount_options() -> MountOptions {
    MountOptions {
        page_memory: 4 << 20,
        tree_memory: 128 << 10,
        commit_interval: Duration::from_secs(36_000),
    }
}

fn made(shards: u8, ending: Ending) -> Base {
    let blocks = ((16 * u64::from(shards)) << 9) + BEHIND;
    let disk = disk(DiskImage::zeroed(blocks * BLOCK_SIZE));
    let options =
        FormatOptions { shards, label: "fuzz".to_owned(), force: Force::Refuse, owner: Owner::ROOT };
    let formatted = simulator(&disk).block_on(0, |ctx: Context| async move { format(&ctx, &options).await });
    formatted.expect("formatting ends").expect("an empty device can be formatted");
    mounted(&disk, async |volume| {
        fill(volume).await;
        volume.unmount().await.expect("an idle volume unmounts");
    });
    mounted(&disk, async |volume| {
        log(volume).await;
        if ending == Ending::Unmount {
            volume.unmount().await.expect("an idle volume unmounts");
        }
    });
    let image = disk.image_after_cut(&CutPolicy::DropAll);
    let map = Map::of(&image);
    Base { image, map }
}

fn mounted(disk: &SimDisk, work: impl AsyncFnOnce(&Volume)) {
    let sim = simulator(disk);
    let handles: Vec<ReactorHandle> = vec![sim.handle(0)];
    let done = sim.block_on(0, |ctx: Context| async move {
        let volume = Volume::mount(&ctx, &handles, mount_options()).await.expect("the volume mounts");
        work(&volume).await;
    });
    done.expect("the work ends");
}

async fn done(volume: &Volume, request: Request) -> Reply {
    let shown = format!("{request:?}");
    volume.call(request).await.unwrap_or_else(|error: FsError| panic!("{shown}: {error}"))
}

async fn create(volume: &Volume, parent: InodeNr, name: &str, new: NewInode) -> Attributes {
    let (name, caller) = (name.as_bytes().into(), Caller { uid: 0, gid: 0 });
    match done(volume, Request::Create { parent, name, new, permissions: 0o755, caller }).await {
        Reply::Entry(attributes) => attributes,
        other => panic!("create: {other:?}"),
    }
}

async fn write(volume: &Volume, inode: InodeNr, offset: u64, data: &[u8]) {
    let (source, kill_privileges) = (WriteSource::Call, KillPrivileges::Keep);
    let offset = FileOffset::new(offset);
    done(volume, Request::Write { inode, offset, data: data.into(), source, kill_privileges }).await;
}

async fn file(volume: &Volume, parent: InodeNr, name: &str, data: &[u8]) -> InodeNr {
    let inode = create(volume, parent, name, NewInode::Regular).await.inode;
    if !data.is_empty() {
        write(volume, inode, 0, data).await;
    }
    inode
}

async fn attribute(volume: &Volume, inode: InodeNr, name: &str, length: usize) {
    let (name, value) = (name.as_bytes().into(), vec![7; length].into());
    done(volume, Request::SetXattr { inode, name, value, mode: SetXattrMode::Set }).await;
}

async fn sync(volume: &Volume, inode: InodeNr) {
    done(volume, Request::Sync { inode, scope: SyncScope::File }).await;
}

/// Bytes of which no two blocks are the same.
pub fn pattern(seed: u8, blocks: u64) -> Vec<u8> {
    (0..blocks * BLOCK_SIZE).map(|at| (at / 97) as u8 ^ (at / BLOCK_SIZE) as u8 ^ seed).collect()
}

/// Two directories, of different shards if there are several.
async fn directories(volume: &Volume) -> (InodeNr, InodeNr) {
    let near = create(volume, Volume::ROOT, "near", NewInode::Directory).await.inode;
    for number in 0..16 {
        let name = format!("far {number}");
        let far = create(volume, Volume::ROOT, &name, NewInode::Directory).await.inode;
        if far.shard() != near.shard() || volume.shards() == 1 {
            return (near, far);
        }
        done(volume, Request::RemoveDirectory { parent: Volume::ROOT, name: name.as_bytes().into() }).await;
    }
    panic!("directories are spread over the shards");
}

/// What lies in the trees: everything that the format has a word for.
async fn fill(volume: &Volume) {
    let (near, far) = directories(volume).await;
    let big = file(volume, near, "big", &pattern(1, 24)).await;
    let holes = file(volume, near, "holes", b"begins").await;
    for block in [7, 8, 90] {
        write(volume, holes, block * BLOCK_SIZE + 100, &pattern(2, 1)[..3000]).await;
    }
    for (from, blocks, mode) in [(20, 6, AllocateMode::Extend), (100, 4, AllocateMode::KeepSize)] {
        let (offset, length) = (FileOffset::new(from * BLOCK_SIZE), blocks * BLOCK_SIZE);
        done(volume, Request::Allocate { inode: holes, offset, length, mode }).await;
    }
    sync(volume, holes).await;
    sync(volume, big).await;
    for (parent, name) in [(near, "clone"), (far, "clone elsewhere")] {
        let target = file(volume, parent, name, b"").await;
        let start = FileOffset::new(0);
        let range = CloneRange { source: big, source_offset: start, target, target_offset: start, length: 0 };
        done(volume, Request::Clone(range)).await;
        write(volume, target, 4 * BLOCK_SIZE, &pattern(3, 2)).await;
    }
    for parent in [near, far] {
        // A few large values make trees of two levels.
        for number in 0..8 {
            let small = file(volume, parent, &format!("small {number}"), b"small").await;
            attribute(volume, small, "user.long", 2500).await;
        }
        create(volume, parent, "pipe", NewInode::Fifo).await;
        create(volume, parent, "null", NewInode::CharDevice(0x103)).await;
    }
    attribute(volume, far, "user.empty", 0).await;
    create(volume, far, "link", NewInode::Symlink(b"../near/big".as_slice().into())).await;
    let new_name = b"second name".as_slice().into();
    done(volume, Request::Link { inode: big, new_parent: far, new_name }).await;
    let deep = create(volume, near, "deep", NewInode::Directory).await.inode;
    create(volume, deep, "deeper", NewInode::Directory).await;
}

/// What the log tells, in several entries.
async fn log(volume: &Volume) {
    let directory = async |name: &str| {
        let name = name.as_bytes().into();
        match volume.call(Request::Lookup { parent: Volume::ROOT, name }).await {
            Ok(Reply::Entry(found)) => Some(found.inode),
            _ => None,
        }
    };
    let near = directory("near").await.expect("it was made");
    let mut far = None;
    for number in 0..16 {
        far = far.or(directory(&format!("far {number}")).await);
    }
    let far = far.expect("one was kept");
    let logged = file(volume, far, "only in the log", &pattern(4, 3)).await;
    sync(volume, logged).await;
    let name = b"holes".as_slice().into();
    let Ok(Reply::Entry(holes)) = volume.call(Request::Lookup { parent: near, name }).await else {
        panic!("it was made")
    };
    write(volume, holes.inode, 8 * BLOCK_SIZE, &pattern(5, 1)).await;
    attribute(volume, logged, "user.in", 30).await;
    done(volume, Request::Unlink { parent: near, name: b"small 4".as_slice().into() }).await;
    sync(volume, holes.inode).await;
    // Kept by a lookup: an orphan.
    let orphan = file(volume, far, "orphan", &pattern(6, 2)).await;
    sync(volume, orphan).await;
    done(volume, Request::Unlink { parent: far, name: b"orphan".as_slice().into() }).await;
    sync(volume, logged).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::map::LogEntry;

    #[test]
    fn bases_have_trees_of_two_levels_and_a_log() {
        for (number, base) in bases().iter().enumerate() {
            let inner = base.map.nodes.iter().filter(|node| node.expected.level > 0).count();
            assert!(inner >= usize::from(base.map.shards()), "base {number}: {inner} inner nodes");
            let entries: &[LogEntry] = &base.map.log;
            assert_eq!(entries.is_empty(), number == 1, "base {number}: {} entries", entries.len());
            assert!(!base.map.slots.is_empty());
        }
    }

    #[test]
    fn bases_are_the_same_in_each_process() {
        let again = made(2, Ending::PowerCut);
        assert_eq!(again.image.content_hash(), bases()[0].image.content_hash());
    }
}
