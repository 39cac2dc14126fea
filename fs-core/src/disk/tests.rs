//! [`VolumeDisk`] on the simulator's disk.

use std::time::Duration;

use reactor::sim::{SimDisk, SimDiskOptions, SimOptions, Simulator};

use super::*;

/// Runs `test` with a view of `disk`, in virtual time.
pub(crate) fn with_disk<T>(disk: &SimDisk, test: impl AsyncFnOnce(VolumeDisk) -> T) -> T {
    let simulator = Simulator::new(SimOptions { disk: Some(disk.clone()), ..SimOptions::default() });
    let run = simulator.block_on(0, async |ctx| test(VolumeDisk::new(ctx.disk().clone()).unwrap()).await);
    run.unwrap()
}

fn sim_disk(lba_size: u32, pool_bytes: usize) -> SimDisk {
    let blocks = (32 << 20) / u64::from(lba_size);
    SimDisk::new(SimDiskOptions { lba_size, blocks, pool_bytes, ..SimDiskOptions::default() })
}

fn pattern(blocks: usize) -> Vec<u8> {
    (0..blocks * 4096).map(|byte| (byte / 4096 * 31 + byte) as u8).collect()
}

#[test]
fn long_transfers_pass_whatever_the_block_size_and_the_pool() {
    for lba_size in [512, 1024, 4096] {
        for pool_bytes in [16 << 10, 64 << 10, 16 << 20] {
            let data = pattern(1000);
            let read = with_disk(&sim_disk(lba_size, pool_bytes), async |disk| {
                disk.write(BlockNr::new(7), &data, Durability::Cached).await.unwrap();
                disk.read(BlockNr::new(7), BlockCount::new(1000)).await.unwrap()
            });
            assert!(read == data, "{lba_size} {pool_bytes}");
        }
    }
}

#[test]
fn callers_do_not_starve_each_other_of_pool_memory() {
    let disk = sim_disk(4096, 16 << 10);
    let simulator = Simulator::new(SimOptions { disk: Some(disk), ..SimOptions::default() });
    let done = std::rc::Rc::new(std::cell::Cell::new(0));
    for task in 0..20_u64 {
        let done = std::rc::Rc::clone(&done);
        simulator.spawn(0, move |ctx| async move {
            let disk = VolumeDisk::new(ctx.disk().clone()).unwrap();
            let data = pattern(50);
            disk.write(BlockNr::new(task * 50), &data, Durability::Cached).await.unwrap();
            assert!(disk.read(BlockNr::new(task * 50), BlockCount::new(50)).await.unwrap() == data);
            done.set(done.get() + 1);
        });
    }
    simulator.run_for(Duration::from_secs(10)).unwrap();
    assert_eq!(done.get(), 20);
}

#[test]
fn failure_names_device_and_blocks_and_comes_after_every_piece() {
    let disk = sim_disk(512, 16 << 20);
    disk.fail_writes(LbaRange { start: Lba::new(300 * 8), count: LbaCount::new(8) });
    disk.fail_reads(LbaRange { start: Lba::new(300 * 8), count: LbaCount::new(8) });
    with_disk(&disk, async |view| {
        let error = view.write(BlockNr::new(0), &pattern(2000), Durability::Cached).await.unwrap_err();
        let FsError::Io(message) = error else { panic!("{error}") };
        assert!(message.contains("sim:0") && message.contains("blocks 0 + 2000"), "{message}");
        assert_eq!(view.raw().in_flight(), 0);
        assert!(view.read(BlockNr::new(0), BlockCount::new(2000)).await.is_err());
        assert_eq!(view.raw().in_flight(), 0);
        assert!(view.read(BlockNr::new(0), BlockCount::new(300)).await.is_ok());
    });
}

#[test]
fn blocks_outside_the_device_are_refused_without_allocating() {
    with_disk(&sim_disk(4096, 16 << 20), async |disk| {
        assert_eq!(disk.blocks(), BlockCount::new(8192));
        for (start, count) in [(8192, 1), (8191, 2), (u64::MAX, 1), (0, u64::MAX), (0, u64::MAX / 4096)] {
            assert!(disk.read(BlockNr::new(start), BlockCount::new(count)).await.is_err());
        }
        assert!(disk.write(BlockNr::new(8192), &[0; 4096], Durability::Cached).await.is_err());
        assert!(disk.read(BlockNr::new(8191), BlockCount::new(1)).await.is_ok());
    });
}

#[test]
fn zeroed_and_deallocated_blocks_are_where_they_were_asked_for() {
    let disk = sim_disk(512, 16 << 20);
    let read = with_disk(&disk, async |disk| {
        disk.write(BlockNr::new(10), &[1; 4 * 4096], Durability::Durable).await.unwrap();
        disk.write_zeroes(BlockNr::new(11), BlockCount::new(2)).await.unwrap();
        disk.flush().await.unwrap();
        disk.read(BlockNr::new(10), BlockCount::new(4)).await.unwrap()
    });
    assert!(read[..4096].iter().all(|byte| *byte == 1) && read[3 * 4096..].iter().all(|byte| *byte == 1));
    assert!(read[4096..3 * 4096].iter().all(|byte| *byte == 0));
}
