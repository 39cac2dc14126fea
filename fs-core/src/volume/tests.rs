//! Whole volumes on the simulator: several shards on several reactors, in virtual time, on a disk that forgets.

use std::time::Duration;

use reactor::sim::{CutPolicy, SimDisk, SimDiskOptions, SimOptions, Simulator};
use reactor::{Context, ReactorHandle};

use super::*;
use crate::mkfs::{Force, FormatOptions, Owner, format};
use crate::request::{Attributes, Caller, FileKind, NewInode, RenameMode};

mod campaign;
mod client;
mod clone;
mod clone_loop;
mod crash;
mod extents;
mod fail_at;
mod faults;
mod full;
mod golden;
mod history;
mod lending;
mod log;
mod mixed;
mod model;
mod oracle;
mod planted;
mod relocate;
mod relocate_lent;
mod resize;
mod scrub;
mod shift;
mod simulate;
mod stats;
mod sweep;
mod unreplayed;
mod world;

const SHARDS: u8 = 3;
const REACTORS: u16 = 2;

pub(super) fn disk(blocks: u64, seed: u64) -> SimDisk {
    SimDisk::new(SimDiskOptions { blocks, seed, ..SimDiskOptions::default() })
}

pub(super) fn formatted(blocks: u64, seed: u64) -> SimDisk {
    let disk = disk(blocks, seed);
    let sim = Simulator::new(SimOptions { seed, disk: Some(disk.clone()), ..SimOptions::default() });
    let options =
        FormatOptions { shards: SHARDS, label: "test".to_owned(), force: Force::Refuse, owner: Owner::ROOT };
    sim.block_on(0, |ctx: Context| async move { format(&ctx, &options).await }).unwrap().unwrap();
    disk
}

/// Mounts on a fresh set of reactors and runs `f` with the volume.
pub(super) fn with_volume<T>(disk: &SimDisk, seed: u64, f: impl AsyncFnOnce(&Context, &Volume) -> T) -> T {
    let options = SimOptions { seed, reactors: REACTORS, disk: Some(disk.clone()), ..SimOptions::default() };
    let sim = Simulator::new(options);
    let handles: Vec<ReactorHandle> = (0..usize::from(REACTORS)).map(|index| sim.handle(index)).collect();
    sim.block_on(0, |ctx: Context| async move {
        // Whatever the last mount or a power cut has left is sound without recovery.
        crate::fsck::tests::assert_clean(&ctx).await;
        let volume = Volume::mount(&ctx, &handles, MountOptions::default()).await.expect("the volume mounts");
        f(&ctx, &volume).await
    })
    .unwrap()
}

pub(super) async fn create(volume: &Volume, parent: InodeNr, name: &str, new: NewInode) -> Attributes {
    let request = Request::Create {
        parent,
        name: name.as_bytes().into(),
        new,
        permissions: 0o755,
        caller: Caller { uid: 0, gid: 0 },
    };
    match volume.call(request).await {
        Ok(Reply::Entry(attributes)) => attributes,
        other => panic!("create {name}: {other:?}"),
    }
}

pub(super) async fn lookup(volume: &Volume, parent: InodeNr, name: &str) -> Result<Attributes, FsError> {
    match volume.call(Request::Lookup { parent, name: name.as_bytes().into() }).await? {
        Reply::Entry(attributes) => Ok(attributes),
        other => panic!("lookup {name}: {other:?}"),
    }
}

pub(super) async fn write(volume: &Volume, inode: InodeNr, offset: u64, data: &[u8]) {
    let request = Request::Write {
        inode,
        offset: FileOffset::new(offset),
        data: data.into(),
        source: WriteSource::Call,
        kill_privileges: KillPrivileges::Keep,
    };
    match volume.write(inode, FileOffset::new(offset), data, WriteSource::Call, KillPrivileges::Keep) {
        WriteOutcome::Accepted(written) => assert_eq!(written as usize, data.len()),
        WriteOutcome::Slow => {
            assert_eq!(volume.call(request).await, Ok(Reply::Written(data.len() as u32)));
        }
        WriteOutcome::Failed(error) => panic!("write: {error}"),
    }
}

pub(super) async fn read(volume: &Volume, inode: InodeNr, offset: u64, length: u32) -> Vec<u8> {
    match volume.call(Request::Read { inode, offset: FileOffset::new(offset), length }).await {
        Ok(Reply::Data(data)) => data,
        other => panic!("read: {other:?}"),
    }
}

pub(super) async fn sync(volume: &Volume) {
    let request = Request::Sync { inode: Volume::ROOT, scope: SyncScope::Volume };
    assert_eq!(volume.call(request).await, Ok(Reply::Done));
}

#[test]
fn fresh_volume_mounts_empty_and_unmounts() {
    let disk = formatted(32 * 1024, 1);
    for _ in 0..3 {
        with_volume(&disk, 2, async |_, volume| {
            let listing =
                volume.call(Request::ReadDirectory { inode: Volume::ROOT, after: 0, limit: 100 }).await;
            let Ok(Reply::Directory(entries)) = listing else { panic!("{listing:?}") };
            assert!(entries.iter().all(|entry| matches!(&*entry.name, b"." | b"..")), "{entries:?}");
            assert!(volume.warnings().is_empty(), "{:?}", volume.warnings());
            volume.unmount().await.unwrap();
        });
    }
}

#[test]
fn files_and_directories_survive_a_remount() {
    let disk = formatted(32 * 1024, 1);
    let contents: Vec<u8> = (0..300_000_u32).map(|i| (i % 251) as u8).collect();
    with_volume(&disk, 3, async |_, volume| {
        for number in 0..20 {
            let directory = create(volume, Volume::ROOT, &format!("d{number}"), NewInode::Directory).await;
            assert_eq!(directory.kind, FileKind::Directory);
            let file = create(volume, directory.inode, "file", NewInode::Regular).await;
            write(volume, file.inode, 0, &contents[..10_000 * number]).await;
            assert_eq!(read(volume, file.inode, 0, 1 << 20).await, &contents[..10_000 * number]);
        }
        volume.unmount().await.unwrap();
    });
    with_volume(&disk, 4, async |_, volume| {
        for number in 0..20 {
            let directory = lookup(volume, Volume::ROOT, &format!("d{number}")).await.unwrap();
            let file = lookup(volume, directory.inode, "file").await.unwrap();
            assert_eq!(file.size, 10_000 * number as u64);
            assert_eq!(read(volume, file.inode, 0, 1 << 20).await, &contents[..10_000 * number]);
        }
        volume.unmount().await.unwrap();
    });
}

#[test]
fn synced_state_survives_a_power_cut() {
    let disk = formatted(32 * 1024, 1);
    with_volume(&disk, 5, async |_, volume| {
        let file = create(volume, Volume::ROOT, "synced", NewInode::Regular).await;
        write(volume, file.inode, 0, b"durable").await;
        sync(volume).await;
        let later = create(volume, Volume::ROOT, "later", NewInode::Regular).await;
        write(volume, later.inode, 0, &[7; 100_000]).await;
    });
    disk.power_cut(&CutPolicy::DropAll);
    with_volume(&disk, 6, async |_, volume| {
        let file = lookup(volume, Volume::ROOT, "synced").await.unwrap();
        assert_eq!(read(volume, file.inode, 0, 100).await, b"durable");
        assert_eq!(lookup(volume, Volume::ROOT, "later").await, Err(FsError::NotFound));
        volume.unmount().await.unwrap();
    });
}

#[test]
fn commit_interval_makes_changes_durable_without_fsync() {
    let disk = formatted(32 * 1024, 1);
    with_volume(&disk, 7, async |ctx, volume| {
        let file = create(volume, Volume::ROOT, "old", NewInode::Regular).await;
        write(volume, file.inode, 0, b"old enough").await;
        ctx.sleep(Duration::from_secs(6)).await;
    });
    disk.power_cut(&CutPolicy::DropAll);
    with_volume(&disk, 8, async |_, volume| {
        let file = lookup(volume, Volume::ROOT, "old").await.unwrap();
        assert_eq!(read(volume, file.inode, 0, 100).await, b"old enough");
        volume.unmount().await.unwrap();
    });
}

#[test]
fn rename_moves_directories_between_shards() {
    let disk = formatted(32 * 1024, 1);
    with_volume(&disk, 9, async |_, volume| {
        let mut directories = Vec::new();
        for number in 0..6 {
            directories
                .push(create(volume, Volume::ROOT, &format!("d{number}"), NewInode::Directory).await.inode);
        }
        let moved = create(volume, directories[0], "moved", NewInode::Directory).await.inode;
        for step in 1..directories.len() {
            let request = Request::Rename {
                parent: directories[step - 1],
                name: (*b"moved").into(),
                new_parent: directories[step],
                new_name: (*b"moved").into(),
                mode: RenameMode::NoReplace,
            };
            assert_eq!(volume.call(request).await, Ok(Reply::Done));
            assert_eq!(lookup(volume, directories[step], "moved").await.unwrap().inode, moved);
            assert_eq!(lookup(volume, directories[step - 1], "moved").await, Err(FsError::NotFound));
        }
        volume.unmount().await.unwrap();
    });
}
