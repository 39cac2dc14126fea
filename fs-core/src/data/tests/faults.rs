//! Failing, lying and full devices.

use super::*;

fn everything() -> LbaRange {
    LbaRange { start: Lba::new(0), count: LbaCount::new(1 << 40) }
}

#[test]
fn failed_write_back_is_reported_once_and_the_data_survives() {
    let world = World::small(11);
    let disk = world.disk.clone();
    world.mounted(|_, client| async move {
        let inode = client.create("a").await;
        client.sync(inode).await.unwrap();
        client.write(inode, 0, &pattern(11, 100_000)).await.unwrap();
        disk.fail_writes(everything());
        assert!(matches!(client.sync(inode).await, Err(FsError::Io(_))));
        // Still dirty, still failing: said again, and nothing is lost.
        assert!(matches!(client.sync(inode).await, Err(FsError::Io(_))));
        assert_eq!(client.read(inode, 0, 200_000).await.unwrap(), pattern(11, 100_000));
        disk.clear_faults();
        client.sync(inode).await.unwrap();
        client.sync(inode).await.unwrap();
        assert_eq!(client.read(inode, 0, 200_000).await.unwrap(), pattern(11, 100_000));
    });
}

#[test]
fn failure_in_the_background_is_told_to_the_next_close() {
    let world = World::small(12);
    let disk = world.disk.clone();
    world.mounted(|ctx, client| async move {
        let inode = client.create("a").await;
        client.volume.call(Request::Sync { inode, scope: SyncScope::Volume }).await.unwrap();
        client.write(inode, 0, &pattern(12, 4096)).await.unwrap();
        // Only data is on its way: the commit interval fails before it comes to metadata.
        disk.fail_writes(everything());
        let flushed = client.volume.call(Request::Sync { inode, scope: SyncScope::File }).await;
        assert!(matches!(flushed, Err(FsError::Io(_))));
        ctx.sleep(Duration::from_micros(1)).await;
        disk.clear_faults();
        assert_eq!(client.close(inode).await, Ok(()), "fsync has told it");
        client.sync(inode).await.unwrap();
    });
}

#[test]
fn changed_data_is_damage_and_not_data() {
    let world = World::small(13);
    let marker = pattern(13, 8192);
    let data = marker.clone();
    let inode = world.mounted(|_, client| async move {
        let inode = client.create("a").await;
        client.write(inode, 0, &data).await.unwrap();
        inode
    });
    let image = world.disk.image();
    let mut block = vec![0; 4096];
    let place = (0..image.len() / 4096).find(|index| {
        image.read(index * 4096, &mut block);
        block == marker[4096..]
    });
    world.disk.flip_bit(place.unwrap() * 4096 + 1000, 3);
    world.mounted(|_, client| async move {
        assert_eq!(client.read(inode, 0, 4096).await.unwrap(), marker[..4096]);
        let damaged = client.read(inode, 0, 8192).await;
        assert!(matches!(damaged, Err(FsError::Damaged { block: Some(_), .. })), "{damaged:?}");
        // A write of part of the block cannot be merged with what is lost, a write of all of it can.
        client.write(inode, 4096, &[7; 4096]).await.unwrap();
        assert_eq!(client.read(inode, 4096, 4096).await.unwrap(), [7; 4096]);
    });
}

#[test]
fn full_volume_refuses_writes_and_keeps_what_it_accepted() {
    let options = MountOptions { page_memory: 16 << 20, tree_memory: 4 << 20, ..MountOptions::default() };
    let world = World::new(14, SimDiskOptions { blocks: 8 * 1024, ..SimDiskOptions::default() }, options);
    let (preallocated, inodes, accepted) = world.mounted(|_, client| async move {
        let mut inodes = Vec::new();
        let mut accepted = 0;
        let preallocated = client.create("preallocated").await;
        client.allocate(preallocated, 0, 1 << 20, AllocateMode::Extend).await.unwrap();
        let full = 'fill: loop {
            let inode = match client.try_create(&format!("file{}", inodes.len())).await {
                Ok(inode) => inode,
                Err(error) => break error,
            };
            inodes.push(inode);
            for piece in 0..4 {
                let data = pattern(accepted, 1 << 20);
                match client.write(inode, piece << 20, &data).await {
                    Ok(written) if written as usize == data.len() => accepted += 1,
                    Ok(short) => panic!("{short} bytes of a piece that takes one extent"),
                    Err(error) => break 'fill error,
                }
            }
        };
        assert_eq!(full, FsError::NoSpace);
        // What was preallocated in time can be written all the same.
        client.write(preallocated, 5000, &pattern(99, 100_000)).await.unwrap();
        client.sync(preallocated).await.unwrap();
        assert!(accepted >= 16, "only {accepted} MiB of 32 went in");
        client.sync(inodes[0]).await.unwrap();
        // Truncation works on the full volume, and makes room.
        client.truncate(inodes[0], 100).await.unwrap();
        client.write(inodes[1], 0, &pattern(4, 1 << 20)).await.unwrap();
        (preallocated, inodes, accepted)
    });
    world.mounted(|_, client| async move {
        assert!(client.read(preallocated, 5000, 100_000).await.unwrap() == pattern(99, 100_000));
        assert_eq!(client.read(inodes[0], 0, 4096).await.unwrap(), pattern(0, 1 << 20)[..100]);
        for piece in 4..accepted {
            let (inode, offset) = (inodes[piece as usize / 4], (piece % 4) << 20);
            assert!(
                client.read(inode, offset, 1 << 20).await.unwrap() == pattern(piece, 1 << 20),
                "piece {piece}"
            );
        }
    });
}

#[test]
fn page_written_again_during_its_write_back_is_written_twice() {
    let slow = Duration::from_millis(5)..=Duration::from_millis(5);
    let options = MountOptions { commit_interval: Duration::from_secs(3600), ..MountOptions::default() };
    let world = World::new(15, SimDiskOptions { latency: slow, ..SimDiskOptions::default() }, options);
    let inode = world.mounted(|ctx, client| async move {
        let inode = client.create("a").await;
        client.write(inode, 0, &[1; 4096]).await.unwrap();
        let (done, other) = (Rc::new(Cell::new(false)), client.clone());
        let flag = Rc::clone(&done);
        ctx.spawn(async move {
            other.sync(inode).await.unwrap();
            flag.set(true);
        })
        .unwrap();
        ctx.sleep(Duration::from_millis(2)).await;
        client.write(inode, 100, &[2; 50]).await.unwrap();
        assert_eq!(client.read(inode, 99, 52).await.unwrap()[..2], [1, 2]);
        assert!(!done.get(), "the first version is still on its way");
        client.sync(inode).await.unwrap();
        inode
    });
    world.mounted(|_, client| async move {
        let read = client.read(inode, 0, 4096).await.unwrap();
        assert_eq!((read[99], read[100], read[149], read[150]), (1, 2, 2, 1));
    });
}

#[test]
fn truncation_during_write_back_leaves_nothing_behind_the_end() {
    let slow = Duration::from_millis(5)..=Duration::from_millis(5);
    let world = World::new(
        16,
        SimDiskOptions { latency: slow, ..SimDiskOptions::default() },
        MountOptions::default(),
    );
    let inode = world.mounted(|ctx, client| async move {
        let inode = client.create("a").await;
        client.write(inode, 0, &[1; 1 << 20]).await.unwrap();
        let other = client.clone();
        ctx.spawn(async move { other.sync(inode).await.unwrap() }).unwrap();
        ctx.sleep(Duration::from_millis(2)).await;
        client.truncate(inode, 10_000).await.unwrap();
        client.truncate(inode, 20_000).await.unwrap();
        assert!(client.read(inode, 10_000, 10_000).await.unwrap().iter().all(|byte| *byte == 0));
        inode
    });
    world.mounted(|_, client| async move {
        let read = client.read(inode, 0, 1 << 20).await.unwrap();
        assert!(read.len() == 20_000 && read[..10_000].iter().all(|byte| *byte == 1));
        assert!(read[10_000..].iter().all(|byte| *byte == 0));
        assert_eq!(client.attributes(inode).await.sectors, 3 * 8);
    });
}

#[test]
fn power_cut_keeps_what_was_synced_and_shows_old_or_new_for_the_rest() {
    for seed in 0..8 {
        let world = World::small(seed);
        let handle = world.sim.handle(0);
        let options = world.options.clone();
        let inode = world.run(|ctx| async move {
            let volume = Volume::mount(&ctx, &[handle], options).await.unwrap();
            let client = Client { volume };
            let inode = client.create("a").await;
            client.write(inode, 0, &[1; 300_000]).await.unwrap();
            client.sync(inode).await.unwrap();
            client.write(inode, 100_000, &[2; 100_000]).await.unwrap();
            let other = client.clone();
            ctx.spawn(async move { drop(other.sync(inode).await) }).unwrap();
            ctx.sleep(Duration::from_micros(50 + seed * 40)).await;
            inode
        });
        world.disk.power_cut(&CutPolicy::Random { seed, tearing: Tearing::Sectors });
        let disk = SimDisk::from_image(SimDiskOptions::default(), world.disk.image());
        let sim = Simulator::new(SimOptions { seed, disk: Some(disk.clone()), ..SimOptions::default() });
        let after = World { sim, disk, options: world.options.clone() };
        after.mounted(|_, client| async move {
            let read = client.read(inode, 0, 400_000).await.unwrap();
            assert_eq!(read.len(), 300_000);
            for (index, block) in read.chunks(4096).enumerate() {
                let start = index * 4096;
                let old = block.iter().all(|byte| *byte == 1);
                let new = block.iter().enumerate().all(|(at, byte)| {
                    let within = (100_000..200_000).contains(&(start + at));
                    *byte == if within { 2 } else { 1 }
                });
                assert!(old || new, "block {index} is neither old nor new");
            }
        });
    }
}
