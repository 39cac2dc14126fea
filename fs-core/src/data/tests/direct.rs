//! Direct I/O: what it leaves in memory, what goes on beside it, and what it does at the edges.

use futures_util::future::join;

use super::*;

const BLOCK: usize = BLOCK_SIZE as usize;

/// Data blocks that were read from the device.
async fn pages_read(client: &Client) -> u64 {
    client.volume.report().await.unwrap().shards.iter().map(|shard| shard.data.pages_read).sum()
}

async fn dirty_bytes(client: &Client) -> u64 {
    client.volume.report().await.unwrap().dirty_bytes
}

#[test]
fn direct_write_is_on_the_device_when_it_is_answered() {
    let world = World::small(1);
    world.mounted(|_, client| async move {
        let inode = client.create("file").await;
        let data = pattern(1, 5 * BLOCK);
        assert_eq!(client.write_direct(inode, 0, &data).await, Ok(5 * BLOCK as u32));
        assert_eq!(dirty_bytes(&client).await, 0);
        let before = pages_read(&client).await;
        assert_eq!(client.read_direct(inode, 0, 8 * BLOCK as u32).await.unwrap(), data);
        assert_eq!(pages_read(&client).await - before, 5, "nothing of it is in memory");
        assert_eq!(client.read_direct(inode, 0, 8 * BLOCK as u32).await.unwrap(), data);
        assert_eq!(pages_read(&client).await - before, 10, "a direct read leaves nothing in memory");
        assert_eq!(client.read(inode, 0, 8 * BLOCK as u32).await.unwrap(), data);
        assert_eq!(client.read_direct(inode, 0, 8 * BLOCK as u32).await.unwrap(), data);
        assert_eq!(pages_read(&client).await - before, 15, "what is in memory is used");
    });
}

#[test]
fn buffered_and_direct_see_each_other_whatever_was_written_back() {
    let world = World::small(2);
    world.mounted(|_, client| async move {
        let inode = client.create("file").await;
        let mut model = pattern(1, 40 * BLOCK);
        client.write(inode, 0, &model).await.unwrap(); // queued, nothing on the device
        for (round, first) in [3, 3, 17, 38].into_iter().enumerate() {
            let at = first * BLOCK;
            let data = pattern(round as u64 + 2, 2 * BLOCK);
            client.write_direct(inode, at as u64, &data).await.unwrap();
            model[at..at + data.len()].copy_from_slice(&data);
            assert!(client.read(inode, 0, 1 << 20).await.unwrap() == model, "buffered read, round {round}");
            let data = pattern(round as u64 + 20, 3 * BLOCK / 2);
            client.write(inode, at as u64 - 100, &data).await.unwrap();
            model[at - 100..at - 100 + data.len()].copy_from_slice(&data);
            assert!(client.read_direct(inode, 0, 1 << 20).await.unwrap() == model, "direct, round {round}");
        }
        client.sync(inode).await.unwrap();
        assert!(client.read_direct(inode, 0, 1 << 20).await.unwrap() == model, "after fsync");
    });
}

#[test]
fn direct_writes_within_a_file_go_side_by_side() {
    let latency = Duration::from_millis(1);
    let options = SimDiskOptions { latency: latency..=latency, ..SimDiskOptions::default() };
    let world = World::new(3, options, MountOptions::default());
    world.mounted(|ctx, client| async move {
        let inode = client.create("file").await;
        client.write_direct(inode, 0, &pattern(1, 8 * BLOCK)).await.unwrap();
        let write = async |block: usize| {
            let data = pattern(block as u64, BLOCK);
            client.write_direct(inode, (block * BLOCK) as u64, &data).await.unwrap();
        };
        let began = ctx.now();
        join(join(write(0), write(2)), join(write(4), write(6))).await;
        let together = ctx.now() - began;
        assert!(together < 2 * latency, "four writes took {together:?}");
        let began = ctx.now();
        join(write(1), write(1)).await;
        assert!(ctx.now() - began >= 2 * latency, "writes of one block go one after the other");
    });
}

#[test]
fn writes_that_are_not_of_whole_blocks_are_written_through() {
    let world = World::small(4);
    world.mounted(|_, client| async move {
        let inode = client.create("file").await;
        let mut model = pattern(1, 2 * BLOCK + 700);
        assert_eq!(client.write_direct(inode, 0, &model).await, Ok(model.len() as u32));
        assert_eq!(client.attributes(inode).await.size, model.len() as u64);
        assert_eq!(dirty_bytes(&client).await, 0);
        let data = pattern(2, 512);
        client.write_direct(inode, 512, &data).await.unwrap();
        model[512..1024].copy_from_slice(&data);
        assert_eq!(dirty_bytes(&client).await, 0);
        assert!(client.read_direct(inode, 0, 1 << 20).await.unwrap() == model);
        assert_eq!(client.write_direct(inode, 0, &[]).await, Ok(0));
        let far = crate::MAX_FILE_SIZE - BLOCK_SIZE;
        assert_eq!(client.write_direct(inode, far, &pattern(3, 2 * BLOCK)).await, Err(FsError::FileTooLarge));
    });
}

#[test]
fn direct_write_fills_preallocated_blocks_and_what_lies_between_them() {
    let world = World::small(5);
    world.mounted(|_, client| async move {
        let inode = client.create("file").await;
        for first in [2, 6, 300] {
            client.allocate(inode, first * BLOCK_SIZE, 2 * BLOCK_SIZE, AllocateMode::KeepSize).await.unwrap();
        }
        let sectors = client.attributes(inode).await.sectors;
        let data = pattern(1, 310 * BLOCK);
        assert_eq!(client.write_direct(inode, 0, &data).await, Ok(data.len() as u32));
        assert!(client.read(inode, 0, 4 << 20).await.unwrap() == data);
        let more = client.attributes(inode).await.sectors - sectors;
        assert_eq!(more * 512, (310 - 6) * BLOCK_SIZE, "preallocated blocks are used");
    });
}

#[test]
fn mapped_and_direct_writes_of_the_same_blocks_leave_one_of_both() {
    const BLOCKS: u64 = 4;
    const ROUNDS: u64 = 150;
    // Every block of a write holds nothing but the number of the write.
    let stamped = |number: u64| number.to_le_bytes().repeat(BLOCK / 8);
    let world = World::small(6);
    world.mounted(|ctx, client| async move {
        let inode = client.create("file").await;
        client.write(inode, 0, &vec![0; BLOCKS as usize * BLOCK]).await.unwrap();
        let write = async |direct: bool| {
            let random = Random::new(6, u64::from(direct));
            for round in 0..ROUNDS {
                let (at, data) = (random.below(BLOCKS) * BLOCK_SIZE, stamped(2 * round + u64::from(direct)));
                let written = match direct {
                    true => client.write_direct(inode, at, &data).await,
                    false => client.write_slow(inode, at, &data, WriteSource::Mapping).await,
                };
                assert_eq!(written, Ok(BLOCK as u32));
                ctx.sleep(Duration::from_micros(random.below(60))).await;
            }
        };
        let flush = async || {
            for _ in 0..ROUNDS {
                client.sync(inode).await.unwrap();
            }
        };
        join(join(write(true), write(true)), join(write(false), join(flush(), flush()))).await;
        let found = client.read(inode, 0, 1 << 20).await.unwrap();
        client.sync(inode).await.unwrap();
        assert!(client.read_direct(inode, 0, 1 << 20).await.unwrap() == found);
        for block in found.chunks(BLOCK) {
            assert!(block.chunks(8).all(|word| word == &block[..8]), "a block of two writes");
        }
    });
}

#[test]
fn blocks_that_wait_for_a_checkpoint_are_no_lack_of_space() {
    const BLOCKS: u64 = 4096;
    const WRITERS: u64 = 64;
    let world = World::small(7);
    world.mounted(|_, client| async move {
        let inode = client.create("file").await;
        for first in (0..BLOCKS).step_by(256) {
            client.write_direct(inode, first * BLOCK_SIZE, &pattern(first, 256 * BLOCK)).await.unwrap();
        }
        // Each write frees as much as it takes; together they take several times what is free.
        let write = async |writer: u64| {
            let random = Random::new(7, writer);
            for round in 0..400 {
                let (at, data) = (random.below(BLOCKS) * BLOCK_SIZE, pattern(round, BLOCK));
                let written = client.write_direct(inode, at, &data).await;
                assert_eq!(written, Ok(BLOCK as u32), "writer {writer}, round {round}");
            }
        };
        futures_util::future::join_all((0..WRITERS).map(write)).await;
    });
}
