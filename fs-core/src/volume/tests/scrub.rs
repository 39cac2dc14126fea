//! Scrubbing: quiet on a sound volume whatever happens meanwhile, and finds every wrong bit of what it verifies.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use futures_util::future::join;
use reactor::sim::DiskImage;

use super::client::{Client, Ending};
use super::world::{Shape, prepared, session};
use super::*;
use crate::request::{ScrubPlace, ScrubStep};
use crate::types::BLOCK_SIZE;

fn shape() -> Shape {
    let mount = MountOptions { commit_interval: Duration::from_millis(20), ..MountOptions::default() };
    Shape { seed: 4, shards: 2, reactors: 2, blocks: 20 * 1024, mount }
}

/// Scrubs all shards.
async fn scrub(volume: &Volume, shards: u8) -> (u64, Vec<String>) {
    let (mut blocks, mut damage) = (0, Vec::new());
    for shard in 0..shards {
        let shard = ShardId::new(shard).unwrap();
        let mut place = Some(ScrubPlace::START);
        while let Some(from) = place {
            let step = match volume.call(Request::Scrub { shard, from }).await {
                Ok(Reply::Scrubbed(step)) => step,
                other => panic!("scrub: {other:?}"),
            };
            assert_ne!(step.next, Some(from), "a step gets somewhere");
            let ScrubStep { next, blocks: verified, damage: found } = step;
            blocks += verified;
            damage.extend(found);
            place = next;
        }
    }
    (blocks, damage)
}

#[test]
fn scrub_beside_busy_clients_finds_nothing_wrong() {
    let shape = shape();
    let (disk, history) = prepared(&shape, 2);
    let history = Rc::new(RefCell::new(history));
    let scrubbed = Rc::new(Cell::new(0));
    let count = Rc::clone(&scrubbed);
    session(&shape, &disk, &history, 10, async move |client: &mut Client| {
        if client.number > 0 {
            return client.run(400).await;
        }
        for _ in 0..6 {
            let volume = client.volume.clone();
            let working = client.run(40);
            let (ending, (blocks, damage)) = join(working, scrub(&volume, 2)).await;
            assert_eq!(ending, Ending::Finished);
            assert_eq!(damage, Vec::<String>::new());
            count.set(count.get() + blocks);
        }
        Ending::Finished
    });
    assert!(scrubbed.get() > 50, "{} blocks are too few to say anything", scrubbed.get());
}

/// A volume with one file of many extents in each shard, unmounted.
fn filled(shape: &Shape) -> DiskImage {
    let disk = shape.formatted();
    let run = async |_: &Context, volume: &Volume| {
        for number in 0..4 {
            let directory = create(volume, Volume::ROOT, &format!("d{number}"), NewInode::Directory).await;
            let file = create(volume, directory.inode, "file", NewInode::Regular).await;
            for block in 0..20_u64 {
                write(volume, file.inode, block * 3 * BLOCK_SIZE, &[number + 1; 5000]).await;
            }
        }
        volume.unmount().await.unwrap();
    };
    shape.mounted(&disk, 1, run).unwrap();
    disk.image()
}

fn scrubbed(shape: &Shape, disk: &SimDisk) -> Option<(u64, Vec<String>)> {
    shape.mounted(disk, 3, async |_: &Context, volume: &Volume| scrub(volume, shape.shards).await).ok()
}

#[test]
fn every_wrong_bit_of_data_is_found_and_its_file_named() {
    let shape = shape();
    let image = filled(&shape);
    let (_, sound) = scrubbed(&shape, &shape.disk(image.clone())).expect("the volume mounts");
    assert_eq!(sound, Vec::<String>::new());
    let mut block = vec![0; BLOCK_SIZE as usize];
    let mut found = 0;
    for number in 0..shape.blocks {
        image.read(number * BLOCK_SIZE, &mut block);
        // A block of the files' contents: one byte all over.
        if block[0] == 0 || block[0] > 4 || block.iter().any(|byte| *byte != block[0]) {
            continue;
        }
        let disk = shape.disk(image.clone());
        disk.flip_bit(number * BLOCK_SIZE + number % BLOCK_SIZE, (number % 8) as u8);
        let (_, damage) = scrubbed(&shape, &disk).expect("the volume mounts");
        let [damage] = &damage[..] else { panic!("block {number}: {damage:?}") };
        let names = damage.contains(&format!("data block {number}: ")) && damage.contains("inode ");
        assert!(names && damage.contains("extent at "), "{damage}");
        found += 1;
    }
    assert!(found >= 40, "{found} blocks of contents");
}

#[test]
fn wrong_bits_of_tree_nodes_are_found_while_the_volume_works_from_memory() {
    let shape = shape();
    let image = filled(&shape);
    let mut block = vec![0; BLOCK_SIZE as usize];
    let mut found = 0;
    for number in 0..shape.blocks {
        image.read(number * BLOCK_SIZE, &mut block);
        if block.iter().all(|byte| *byte == 0) {
            continue;
        }
        let disk = shape.disk(image.clone());
        let own = disk.clone();
        let run = async move |_: &Context, volume: &Volume| {
            // The nodes are in memory, so everything goes on.
            let directory = lookup(volume, Volume::ROOT, "d0").await.unwrap();
            own.flip_bit(number * BLOCK_SIZE + 100, 3);
            let (_, damage) = scrub(volume, 2).await;
            lookup(volume, directory.inode, "file").await.unwrap();
            damage
        };
        let damage = shape.mounted(&disk, 3, run).unwrap();
        let node = |damage: &String| damage.starts_with("tree node at block ");
        assert!(damage.len() <= 1, "one bit is one damage: {damage:?}");
        found += u32::from(damage.iter().any(node));
    }
    assert!(found >= 4, "two trees have nodes of several blocks in use: {found} found");
}
