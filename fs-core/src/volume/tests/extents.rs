//! Lists of extents: of a mount, and of what it leaves on the device with a log that nobody has replayed yet.

use reactor::sim::SimDisk;

use super::clone::{clone, pattern, sync_file, whole};
use super::world::Shape;
use super::*;
use crate::dump::extents;
use crate::request::{AllocateMode, ExtentRow, ExtentState};
use crate::types::BLOCK_SIZE;

fn shape() -> Shape {
    let mount = MountOptions { commit_interval: Duration::from_secs(3600), ..MountOptions::default() };
    Shape { seed: 11, shards: 2, reactors: 1, blocks: 32 * 1024, mount }
}

async fn online(volume: &Volume, inode: InodeNr) -> Vec<ExtentRow> {
    let (mut rows, mut next) = (Vec::new(), Some(0));
    while let Some(offset) = next {
        let offset = FileOffset::new(offset);
        let Ok(Reply::ExtentList(list)) = volume.call(Request::ListExtents { inode, offset }).await else {
            panic!("the list cannot be had")
        };
        rows.extend(list.rows);
        next = list.next;
    }
    rows
}

fn offline(shape: &Shape, disk: &SimDisk, path: &str) -> Vec<ExtentRow> {
    let mut rows = Vec::new();
    let take = async |ctx: Context| {
        let mut take = |row| {
            rows.push(row);
            Ok(())
        };
        extents(&ctx, path.as_bytes(), &mut take).await
    };
    shape.simulator(disk, 77).block_on(0, take).unwrap().unwrap();
    rows
}

/// Numbers of pieces: data alone, shared, lent, preallocated, holes, queued.
fn figures(rows: &[ExtentRow]) -> [usize; 6] {
    let mut figures = [0; 6];
    for row in rows {
        match row.state {
            ExtentState::Data { sharing, .. } => {
                figures[0] += usize::from(!sharing.shared);
                figures[1] += usize::from(sharing.shared);
                figures[2] += usize::from(sharing.lent);
            }
            ExtentState::Preallocated { .. } => figures[3] += 1,
            ExtentState::Hole => figures[4] += 1,
            ExtentState::Queued => figures[5] += 1,
        }
    }
    figures
}

async fn alternating(volume: &Volume, inode: InodeNr, blocks: u64) {
    for block in (0..blocks).step_by(2) {
        write(volume, inode, block * BLOCK_SIZE, &pattern(3, block)).await;
    }
    sync_file(volume, inode).await;
}

/// A directory of another shard than the root's.
async fn far_directory(volume: &Volume) -> (String, InodeNr) {
    for number in 0..100 {
        let name = format!("d{number}");
        let inode = create(volume, Volume::ROOT, &name, NewInode::Directory).await.inode;
        if inode.shard() != Volume::ROOT.shard() {
            return (name, inode);
        }
    }
    panic!("directories are spread")
}

#[test]
fn list_of_a_mount_and_of_its_image_after_a_power_cut_are_the_same() {
    let shape = shape();
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        let source = create(volume, Volume::ROOT, "source", NewInode::Regular).await.inode;
        let (name, directory) = far_directory(volume).await;
        // The first fsync is a checkpoint; what follows lies in the log alone.
        alternating(volume, source, 600).await;
        let mode = AllocateMode::KeepSize;
        let (offset, length) = (FileOffset::new(1000 * BLOCK_SIZE), 8 * BLOCK_SIZE);
        volume.call(Request::Allocate { inode: source, offset, length, mode }).await.unwrap();
        let before = volume.report().await.unwrap().checkpoints;
        let near = create(volume, Volume::ROOT, "near", NewInode::Regular).await.inode;
        write(volume, near, 3 * BLOCK_SIZE, &pattern(1, 0)).await;
        let far = create(volume, directory, "far", NewInode::Regular).await.inode;
        write(volume, source, 0, &pattern(9, 9)).await;
        sync_file(volume, source).await;
        clone(volume, whole(near, far)).await.unwrap();
        sync_file(volume, far).await;
        assert_eq!(volume.report().await.unwrap().checkpoints, before, "it is in the log");
        let lists = [online(volume, source).await, online(volume, near).await, online(volume, far).await];
        assert_eq!(figures(&lists[0]), [300, 0, 0, 1, 300, 0]);
        assert_eq!(figures(&lists[1]), [0, 1, 0, 0, 1, 0]);
        assert_eq!(figures(&lists[2]), [0, 1, 1, 0, 1, 0], "its block is borrowed");
        (lists, format!("/{name}/far"))
    };
    let (lists, far) = shape.mounted(&disk, 1, run).unwrap();
    let disk = shape.disk(disk.image_after_cut(&CutPolicy::DropAll));
    assert_eq!(offline(&shape, &disk, "/source"), lists[0]);
    assert_eq!(offline(&shape, &disk, "near"), lists[1]);
    assert_eq!(offline(&shape, &disk, &far), lists[2]);
}

#[test]
fn accepted_data_is_listed_as_queued_until_it_is_written() {
    let shape = shape();
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        let file = create(volume, Volume::ROOT, "file", NewInode::Regular).await.inode;
        assert_eq!(online(volume, file).await, []);
        write(volume, file, 5 * BLOCK_SIZE, &pattern(1, 1)).await;
        let rows = online(volume, file).await;
        let place = |row: &ExtentRow| (row.offset / BLOCK_SIZE, row.length / BLOCK_SIZE, row.state);
        let places: Vec<_> = rows.iter().map(place).collect();
        assert_eq!(places, [(0, 5, ExtentState::Hole), (5, 1, ExtentState::Queued)]);
        sync_file(volume, file).await;
        assert_eq!(figures(&online(volume, file).await), [1, 0, 0, 0, 1, 0]);
        let directory = Request::ListExtents { inode: Volume::ROOT, offset: FileOffset::new(0) };
        assert_eq!(volume.call(directory).await, Err(FsError::IsDirectory));
    };
    shape.mounted(&disk, 1, run).unwrap();
}
