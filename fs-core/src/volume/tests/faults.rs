//! Devices that fail, and devices that give back something else than was written.

use std::cell::RefCell;
use std::rc::Rc;

use reactor::block::{Lba, LbaCount, LbaRange};
use reactor::sim::{SimDisk, Tearing};

use super::client::{Client, Ending, Rng, is_device_failure, top_name};
use super::history::History;
use super::model::{Made, Op, TOP};
use super::oracle::{Verdict, judge};
use super::world::{SeedNote, Shape, Trouble, fsck, mount, prepared, seeds, session};
use super::*;
use crate::request::SyncScope;
use crate::types::BLOCK_SIZE;

/// Seeds of an ordinary test run.
const SEEDS: u64 = 6;

/// Bits that are inverted, one after the other, in each image of an ordinary run.
const FLIPS: u64 = 40;

/// Clients of a run.
const CLIENTS: usize = 2;

fn all(shape: &Shape) -> LbaRange {
    LbaRange { start: Lba::new(0), count: LbaCount::new(shape.blocks) }
}

#[test]
fn failed_writes_are_reported_by_sync_and_nothing_durable_is_lost() {
    let shape = Shape { seed: 3, ..super::crash::short_shape() };
    for scope in [SyncScope::Data, SyncScope::File, SyncScope::Volume] {
        let (disk, history) = prepared(&shape, 1);
        let history = Rc::new(RefCell::new(history));
        let (own, range) = (disk.clone(), all(&shape));
        session(&shape, &disk, &history, 10, async move |client: &mut Client| {
            let node = client.model.next_node();
            let name = "file".to_owned();
            let write = |stamp, offset| {
                let data = super::client::stamped(0, stamp, offset, 30_000);
                Op::Write { node, offset, data }
            };
            let make = Op::Create { parent: TOP, name, made: Made::Regular, permissions: 0o600 };
            let sync = Op::Sync { node, scope };
            for op in [make, write(1, 0), sync.clone()] {
                assert_eq!(client.step(&op).await, Ending::Finished);
            }
            client.device_may_fail = true;
            assert_eq!(client.step(&write(2, 10_000)).await, Ending::Finished);
            own.fail_writes(range);
            let inode = client.inodes[&node];
            let synced = client.volume.call(Request::Sync { inode, scope }).await;
            let error = synced.expect_err("a sync that wrote nothing is not acknowledged");
            assert!(is_device_failure(&error), "{error}");
            Ending::DeviceGone
        });
        disk.clear_faults();
        disk.power_cut(&CutPolicy::DropAll);
        judge_now(&shape, &disk, &history).unwrap_or_else(|why| panic!("{why}"));
    }
}

pub(super) fn judge_now(
    shape: &Shape,
    disk: &SimDisk,
    history: &Rc<RefCell<History>>,
) -> Result<(), Trouble> {
    fsck(shape, disk)?;
    let history = history.borrow();
    let history: &History = &history;
    let run = async |_: &Context, volume: &Volume| {
        let judged = judge(volume, history, &history.mark()).await;
        judged.map(|_| ()).map_err(|verdict| Trouble(verdict.to_string()))
    };
    shape.mounted(disk, 50, run).map_err(|error| Trouble(format!("does not mount: {error}")))?
}

/// Clients on a device of which a part fails from some moment on.
pub(super) fn failing_device(seed: u64) -> Result<(), Trouble> {
    let shape = Shape::random(seed);
    let mut rng = Rng::new(seed ^ 0xfa11);
    let (disk, history) = prepared(&shape, CLIENTS);
    let history = Rc::new(RefCell::new(history));
    let parts = 1 << rng.below(5);
    let start = rng.below(parts) * (shape.blocks / parts);
    let range = LbaRange { start: Lba::new(start), count: LbaCount::new(shape.blocks / parts) };
    let (own, reads) = (disk.clone(), rng.below(3) == 0);
    session(&shape, &disk, &history, 10, async move |client: &mut Client| {
        client.device_may_fail = true;
        if client.run(20).await == Ending::DeviceGone {
            return Ending::DeviceGone;
        }
        if reads {
            own.fail_reads(range);
        } else {
            own.fail_writes(range);
        }
        // The others run into it whenever they come to it.
        let _ended = client.run(60).await;
        Ending::DeviceGone
    });
    disk.clear_faults();
    let policies =
        [CutPolicy::DropAll, CutPolicy::KeepAll, CutPolicy::Random { seed, tearing: Tearing::Sectors }];
    disk.power_cut(&policies[rng.below(3) as usize]);
    judge_now(&shape, &disk, &history)
}

#[test]
fn a_failing_device_loses_nothing_that_was_synced() {
    for seed in seeds(SEEDS) {
        let _note = SeedNote(seed);
        failing_device(seed).unwrap_or_else(|why| panic!("{why}"));
    }
}

/// What came of reading everything on a damaged device.
#[derive(Debug, Default)]
struct Damage {
    harmless: u64,
    refused: u64,
    reported: u64,
}

/// Inverts single bits of what is in use, wherever that is. Everything read is right, or an error.
pub(super) fn flipped_bits(seed: u64) -> Result<(), Trouble> {
    let shape = Shape::random(seed);
    let (disk, history) = prepared(&shape, CLIENTS);
    let history = Rc::new(RefCell::new(history));
    session(&shape, &disk, &history, 10, async |client: &mut Client| client.run(60).await);
    let image = disk.image();
    let mut block = vec![0; BLOCK_SIZE as usize];
    let used: Vec<u64> = (0..shape.blocks)
        .filter(|number| {
            image.read(number * BLOCK_SIZE, &mut block);
            block.iter().any(|byte| *byte != 0)
        })
        .collect();
    let mut rng = Rng::new(seed ^ 0xb17);
    let mut damage = Damage::default();
    for _ in 0..FLIPS {
        let disk = shape.disk(image.clone());
        let block = rng.pick(&used).expect("a volume has used blocks");
        let offset = block * BLOCK_SIZE + rng.below(BLOCK_SIZE);
        disk.flip_bit(offset, rng.below(8) as u8);
        read_damaged(&shape, &disk, &history, &mut damage)
            .map_err(|why| Trouble(format!("byte {offset} (block {block}) has a wrong bit: {}", why.0)))?;
    }
    println!("seed {seed}: {damage:?}");
    Ok(())
}

fn read_damaged(
    shape: &Shape,
    disk: &SimDisk,
    history: &Rc<RefCell<History>>,
    damage: &mut Damage,
) -> Result<(), Trouble> {
    let sim = shape.simulator(disk, 60);
    let volume = match mount(&sim, shape) {
        Ok(volume) => volume,
        Err(_) => {
            damage.refused += 1;
            return Ok(());
        }
    };
    let history = history.borrow();
    let history: &History = &history;
    let verdict = sim.block_on(0, |_| async {
        let verdict = judge(&volume, history, &history.mark()).await.map(|_| ());
        // A volume with damage can be written to, or says that it cannot; it never hangs.
        let top = lookup(&volume, Volume::ROOT, &top_name(0)).await;
        if let Ok(top) = top {
            let (parent, name) = (top.inode, (*b"after damage").into());
            let caller = crate::request::Caller { uid: 0, gid: 0 };
            let new = NewInode::Directory;
            let _either = volume.call(Request::Create { parent, name, new, permissions: 0, caller }).await;
        }
        let _either = volume.unmount().await;
        verdict
    });
    match verdict.map_err(|hang| Trouble(hang.to_string()))? {
        Ok(()) => damage.harmless += 1,
        Err(Verdict::Error(FsError::Damaged { .. } | FsError::Io(_))) => damage.reported += 1,
        Err(Verdict::Error(error)) => return Err(Trouble(format!("says no more than {error:?}"))),
        Err(Verdict::Illegal(why)) => return Err(Trouble(format!("wrong data or names: {why}"))),
    }
    Ok(())
}

#[test]
fn wrong_bits_are_errors_never_wrong_data() {
    for seed in seeds(SEEDS) {
        let _note = SeedNote(seed);
        flipped_bits(seed).unwrap_or_else(|why| panic!("{why}"));
    }
}
