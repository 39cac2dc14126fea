//! What a clone costs per extent: a file of 4 KiB extents that do not lie side by side, cloned whole, within a shard and
//! to another one. On the simulator's disk, which takes no time; so what is measured is this crate alone.
//!
//! `cargo bench -p fs-core --bench clone [EXTENTS]` (262,144 unless said otherwise).

use std::time::Instant;

use fs_core::mkfs::{Force, FormatOptions, Owner, format};
use fs_core::request::{Caller, CloneRange, KillPrivileges, NewInode, SyncScope, WriteSource};
use fs_core::types::{FileOffset, InodeNr};
use fs_core::{MountOptions, Reply, Request, Volume, WriteOutcome};
use reactor::Context;
use reactor::sim::{SimDisk, SimDiskOptions, SimOptions, Simulator};

const BLOCK: u64 = 4096;
const ROUNDS: usize = 5;

async fn create(volume: &Volume, parent: InodeNr, name: &str, new: NewInode) -> InodeNr {
    let request = Request::Create {
        parent,
        name: name.as_bytes().into(),
        new,
        permissions: 0o755,
        caller: Caller { uid: 0, gid: 0 },
    };
    match volume.call(request).await {
        Ok(Reply::Entry(entry)) => entry.inode,
        other => panic!("create {name}: {other:?}"),
    }
}

async fn sync(volume: &Volume) {
    let request = Request::Sync { inode: Volume::ROOT, scope: SyncScope::Volume };
    assert_eq!(volume.call(request).await, Ok(Reply::Done));
}

/// Every block is an extent of its own: even blocks are on the device before odd ones are written.
async fn alternating(volume: &Volume, inode: InodeNr, extents: u64) {
    for first in 0..2 {
        for block in (first..extents).step_by(2) {
            let data = [block as u8; BLOCK as usize];
            let offset = FileOffset::new(block * BLOCK);
            match volume.write(inode, offset, &data, WriteSource::Call, KillPrivileges::Keep) {
                WriteOutcome::Accepted(_) => {}
                _ => {
                    let data = data.to_vec().into();
                    let slow = Request::Write {
                        inode,
                        offset,
                        data,
                        source: WriteSource::Call,
                        kill_privileges: KillPrivileges::Keep,
                    };
                    volume.call(slow).await.expect("the write fits");
                }
            }
        }
        sync(volume).await;
    }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let extents: u64 = std::env::args().skip(1).find_map(|text| text.parse().ok()).unwrap_or(262_144);
    let disk = SimDisk::new(SimDiskOptions { blocks: extents * 2 + (1 << 18), ..SimDiskOptions::default() });
    let simulator = || {
        let options = SimOptions { disk: Some(disk.clone()), max_rounds: u64::MAX, ..SimOptions::default() };
        Simulator::new(options)
    };
    let options = FormatOptions { shards: 2, label: String::new(), force: Force::Refuse, owner: Owner::ROOT };
    simulator()
        .block_on(0, |ctx: Context| async move { format(&ctx, &options).await })
        .expect("formatting ends")
        .expect("the disk can be formatted");
    let sim = simulator();
    let handles = [sim.handle(0)];
    sim.block_on(0, |ctx: Context| async move {
        let volume = Volume::mount(&ctx, &handles, MountOptions::default()).await.expect("the volume mounts");
        let mut homes = [None; 2];
        for number in 0..16 {
            let home = create(&volume, Volume::ROOT, &format!("d{number}"), NewInode::Directory).await;
            homes[home.shard().index()].get_or_insert(home);
        }
        let [here, there] = homes.map(|home| home.expect("directories are spread"));
        let source = create(&volume, here, "source", NewInode::Regular).await;
        alternating(&volume, source, extents).await;
        for (what, home) in [("within a shard", here), ("to another shard", there)] {
            let (mut clones, mut syncs) = (Vec::new(), Vec::new());
            for round in 0..ROUNDS {
                let target = create(&volume, home, &format!("{what} {round}"), NewInode::Regular).await;
                sync(&volume).await;
                let start = FileOffset::new(0);
                let range =
                    CloneRange { source, source_offset: start, target, target_offset: start, length: 0 };
                let began = Instant::now();
                let cloned = volume.call(Request::Clone(range)).await;
                clones.push(began.elapsed().as_secs_f64());
                assert!(
                    matches!(cloned, Ok(Reply::Cloned(cloned)) if cloned.extents == extents),
                    "{cloned:?}"
                );
                let began = Instant::now();
                sync(&volume).await;
                syncs.push(began.elapsed().as_secs_f64());
            }
            let per_extent = |times: Vec<f64>| median(times) * 1e6 / extents as f64;
            println!(
                "{what}: {:.3} us an extent, {:.3} us for the sync after it",
                per_extent(clones),
                per_extent(syncs)
            );
        }
        volume.unmount().await.expect("the volume unmounts");
    })
    .expect("the bench ends");
}
