//! The simulated disk: its volatile cache, power cuts and faults.

use super::*;
use crate::sim::{SimOptions, Simulator};
use crate::{Context, Disk};
use proptest::prelude::*;

const BLOCK: usize = 512;

fn options() -> SimDiskOptions {
    SimDiskOptions { lba_size: BLOCK as u32, blocks: 64, pool_bytes: 1 << 20, ..SimDiskOptions::default() }
}

fn block(image: &DiskImage, lba: u64) -> u8 {
    let mut bytes = [0; BLOCK];
    image.read(lba * BLOCK as u64, &mut bytes);
    assert!(bytes.iter().all(|&byte| byte == bytes[0]), "a block of 512 bytes is never torn");
    bytes[0]
}

async fn write(disk: &Disk, lba: u64, count: usize, byte: u8, durability: Durability) -> Result<(), IoError> {
    let mut buffer = disk.pool().alloc(count * BLOCK).await.unwrap();
    buffer.fill(0, count * BLOCK, byte);
    disk.write(Lba::new(lba), buffer, durability).await.0
}

fn run<T, Fut: Future<Output = T>>(disk: &SimDisk, f: impl FnOnce(Context) -> Fut) -> T {
    let sim = Simulator::new(SimOptions { disk: Some(disk.clone()), ..SimOptions::default() });
    sim.block_on(0, f).unwrap()
}

#[test]
fn flush_keeps_what_had_completed_and_a_cut_decides_the_rest() {
    for (policy, later) in
        [(CutPolicy::DropAll, 0), (CutPolicy::KeepAll, 2), (CutPolicy::Select(vec![true]), 2)]
    {
        let disk = SimDisk::new(options());
        run(&disk, |ctx| async move {
            write(ctx.disk(), 1, 1, 1, Durability::Cached).await.unwrap();
            ctx.disk().flush().await.unwrap();
            write(ctx.disk(), 2, 1, 2, Durability::Cached).await.unwrap();
            write(ctx.disk(), 3, 1, 3, Durability::Durable).await.unwrap();
        });
        assert_eq!(disk.unsettled_writes(), 1);
        disk.power_cut(&policy);
        let image = disk.image();
        assert_eq!((block(&image, 1), block(&image, 2), block(&image, 3)), (1, later, 3), "{policy:?}");
    }
}

#[test]
fn write_that_completes_after_the_flush_was_submitted_is_not_covered() {
    let disk = SimDisk::new(options());
    run(&disk, |ctx| async move {
        let mut buffer = ctx.disk().pool().try_alloc(BLOCK).unwrap();
        buffer.fill(0, BLOCK, 9);
        let write = ctx.disk().write(Lba::new(0), buffer, Durability::Cached);
        let flush = ctx.disk().flush();
        flush.await.unwrap();
        write.await.0.unwrap();
    });
    assert_eq!(block(&disk.image(), 0), 9);
    disk.power_cut(&CutPolicy::DropAll);
    assert_eq!(block(&disk.image(), 0), 0);
}

#[test]
fn durable_write_is_not_undone_by_an_older_cached_one() {
    let disk = SimDisk::new(options());
    run(&disk, |ctx| async move {
        write(ctx.disk(), 0, 4, 1, Durability::Cached).await.unwrap();
        write(ctx.disk(), 1, 2, 2, Durability::Durable).await.unwrap();
    });
    disk.power_cut(&CutPolicy::KeepAll);
    assert_eq!((0..4).map(|lba| block(&disk.image(), lba)).collect::<Vec<_>>(), [1, 2, 2, 1]);
}

#[test]
fn power_cut_fails_what_is_in_flight_and_new_queues_work() {
    let disk = SimDisk::new(options());
    let cut = disk.clone();
    let (before, after) = run(&disk, |ctx| async move {
        let mut buffer = ctx.disk().pool().try_alloc(BLOCK).unwrap();
        buffer.fill(0, BLOCK, 5);
        let write = ctx.disk().write(Lba::new(0), buffer, Durability::Cached);
        cut.power_cut(&CutPolicy::DropAll);
        (write.await.0, ctx.disk().flush().await)
    });
    assert_eq!((before, after), (Err(power_lost()), Err(power_lost())));
    assert_eq!(disk.write_count(), 0);
    run(&disk, |ctx| async move { write(ctx.disk(), 0, 1, 6, Durability::Durable).await }).unwrap();
    assert_eq!(block(&disk.image(), 0), 6);
}

#[test]
fn nothing_reaches_the_medium_after_the_crash_point() {
    let disk = SimDisk::new(options());
    disk.crash_after_writes(2);
    let results = run(&disk, |ctx| async move {
        let mut results = Vec::new();
        for lba in 0..4 {
            results.push(write(ctx.disk(), lba, 1, 7, Durability::Durable).await.is_ok());
        }
        results.push(ctx.disk().flush().await.is_ok());
        results
    });
    assert_eq!(results, [true, true, false, false, false]);
    assert!(disk.has_crashed());
    disk.power_cut(&CutPolicy::KeepAll);
    assert_eq!((0..4).map(|lba| block(&disk.image(), lba)).collect::<Vec<_>>(), [7, 7, 0, 0]);
}

#[test]
fn injected_faults_hit_their_range_and_nothing_else() {
    let disk = SimDisk::new(options());
    disk.fail_writes(LbaRange { start: Lba::new(2), count: LbaCount::new(1) });
    disk.fail_reads(LbaRange { start: Lba::new(5), count: LbaCount::new(2) });
    run(&disk, |ctx| async move {
        let read = |lba| ctx.disk().read(Lba::new(lba), ctx.disk().pool().try_alloc(BLOCK).unwrap());
        assert!(write(ctx.disk(), 0, 2, 1, Durability::Cached).await.is_ok());
        assert!(matches!(write(ctx.disk(), 1, 2, 2, Durability::Cached).await, Err(IoError::Medium { .. })));
        assert!(read(4).await.0.is_ok());
        assert!(read(6).await.0.is_err());
        assert!(read(7).await.0.is_ok());
    });
    assert_eq!((block(&disk.image(), 1), block(&disk.image(), 2)), (1, 0), "a failed write changes nothing");
    disk.flip_bit(1, 3);
    let mut bytes = [0; 2];
    disk.image().read(0, &mut bytes);
    assert_eq!(bytes, [1, 1 ^ 8]);
}

#[test]
fn requests_outside_the_disk_are_refused() {
    let disk = SimDisk::new(options());
    run(&disk, |ctx| async move {
        for (lba, count) in [(64, 1), (63, 2), (u64::MAX, 1)] {
            let result = write(ctx.disk(), lba, count, 1, Durability::Cached).await;
            assert!(matches!(result, Err(IoError::InvalidRange { .. })), "{lba} {count}");
        }
        let everything = LbaRange { start: Lba::new(1), count: LbaCount::new(u64::MAX) };
        assert!(ctx.disk().write_zeroes(everything).await.is_err());
    });
}

#[derive(Clone, Debug)]
enum Step {
    Write { lba: u64, count: usize, durable: bool },
    Zero { lba: u64, count: u64 },
    Flush,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0_u64..12, 1_usize..4, any::<bool>())
            .prop_map(|(lba, count, durable)| Step::Write { lba, count, durable }),
        1 => (0_u64..12, 1_u64..4).prop_map(|(lba, count)| Step::Zero { lba, count }),
        1 => Just(Step::Flush),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Against a model that lists, for each block, every value a power cut may leave: the last durable one and all
    /// later ones. Then a cut at random, with tearing, leaves one of them in every block; and without a cut the last.
    #[test]
    fn every_block_is_the_durable_or_a_later_value_after_a_cut(
        steps in prop::collection::vec(step(), 1..40),
        seed in any::<u64>(),
        tear in any::<bool>(),
    ) {
        let disk = SimDisk::new(options());
        let mut legal: Vec<Vec<u8>> = vec![vec![0]; 16];
        for (index, step) in steps.iter().enumerate() {
            let value = index as u8 + 1;
            let (range, value, durable) = match *step {
                Step::Write { lba, count, durable } => (lba as usize..lba as usize + count, value, durable),
                Step::Zero { lba, count } => (lba as usize..(lba + count) as usize, 0, false),
                Step::Flush => {
                    for values in &mut legal {
                        *values = vec![*values.last().unwrap()];
                    }
                    continue;
                }
            };
            for values in &mut legal[range] {
                if durable {
                    values.clear();
                }
                values.push(value);
            }
        }
        run(&disk, |ctx| async move {
            for (index, step) in steps.iter().enumerate() {
                match *step {
                    Step::Write { lba, count, durable } => {
                        let durability = if durable { Durability::Durable } else { Durability::Cached };
                        write(ctx.disk(), lba, count, index as u8 + 1, durability).await.unwrap();
                    }
                    Step::Zero { lba, count } => {
                        let range = LbaRange { start: Lba::new(lba), count: LbaCount::new(count) };
                        ctx.disk().write_zeroes(range).await.unwrap();
                    }
                    Step::Flush => ctx.disk().flush().await.unwrap(),
                }
            }
        });
        for (lba, values) in legal.iter().enumerate() {
            prop_assert_eq!(block(&disk.image(), lba as u64), *values.last().unwrap());
            prop_assert_eq!(block(&disk.durable_image(), lba as u64), values[0]);
        }
        let tearing = if tear { Tearing::Sectors } else { Tearing::None };
        disk.power_cut(&CutPolicy::Random { seed, tearing });
        for (lba, values) in legal.iter().enumerate() {
            let left = block(&disk.image(), lba as u64);
            prop_assert!(values.contains(&left), "block {} holds {}, legal are {:?}", lba, left, values);
        }
        prop_assert_eq!(disk.unsettled_writes(), 0);
    }
}

#[test]
fn one_write_goes_wrong_and_is_acknowledged() {
    // What blocks 1 and 9 hold when everything has settled, and what readers saw of block 1 before.
    for (how, one, nine, seen) in [
        (Miswrite::Lost, 1, 0, 1),
        (Miswrite::Misdirected(Lba::new(9)), 1, 2, 1),
        (Miswrite::Misdirected(Lba::new(64)), 1, 0, 1),
        (Miswrite::Torn(0), 1, 0, 1),
        (Miswrite::Torn(1), 2, 0, 2),
        (Miswrite::Stale, 1, 0, 2),
    ] {
        for durability in [Durability::Cached, Durability::Durable] {
            let disk = SimDisk::new(options());
            disk.miswrite(1, how);
            run(&disk, |ctx| async move {
                write(ctx.disk(), 1, 1, 1, durability).await.unwrap();
                write(ctx.disk(), 1, 1, 2, durability).await.unwrap();
                write(ctx.disk(), 5, 1, 5, durability).await.unwrap();
                ctx.disk().flush().await.unwrap();
            });
            let met = LbaRange { start: Lba::new(1), count: LbaCount::new(1) };
            assert_eq!(disk.miswritten(), Some(met), "{how:?}");
            assert_eq!(block(&disk.image(), 1), seen, "{how:?}");
            disk.power_cut(&CutPolicy::DropAll);
            let image = disk.image();
            let found = (block(&image, 1), block(&image, 5), block(&image, 9));
            assert_eq!(found, (one, 5, nine), "{how:?} {durability:?}");
        }
    }
}

#[test]
fn torn_write_keeps_its_first_sectors() {
    let disk = SimDisk::new(options());
    disk.miswrite(0, Miswrite::Torn(2));
    run(&disk, |ctx| async move { write(ctx.disk(), 3, 4, 7, Durability::Durable).await.unwrap() });
    let blocks: Vec<u8> = (3..7).map(|lba| block(&disk.image(), lba)).collect();
    assert_eq!(blocks, [7, 7, 0, 0]);
}

#[test]
fn requests_fail_by_their_number() {
    for (kind, repeat, failed) in [
        (RequestKind::Write, Repeat::Once, [false, true, false, false, false]),
        (RequestKind::Write, Repeat::ForEver, [false, true, true, false, false]),
        (RequestKind::Flush, Repeat::ForEver, [false, false, false, false, true]),
        (RequestKind::Read, Repeat::Once, [false; 5]),
    ] {
        let disk = SimDisk::new(options());
        disk.fail_request(kind, 1, repeat);
        let found = std::rc::Rc::new(std::cell::Cell::new([false; 5]));
        let told = std::rc::Rc::clone(&found);
        run(&disk, |ctx| async move {
            let mut found = [false; 5];
            for (place, lba) in [3, 4, 5].into_iter().enumerate() {
                found[place] = write(ctx.disk(), lba, 1, 1, Durability::Cached).await.is_err();
            }
            found[3] = ctx.disk().flush().await.is_err();
            found[4] = ctx.disk().flush().await.is_err();
            told.set(found);
        });
        assert_eq!(found.get(), failed, "{kind:?} {repeat:?}");
        assert_eq!(disk.stop_failing(), failed.iter().filter(|failed| **failed).count() as u64);
    }
}
