//! A program with a filesystem inside: format, mount, write, sync, power cut, mount again, read.
//!
//! `cargo run -p fs-core --example embedded`. It runs on the simulator's disk; on a real one only the device differs.

use std::error::Error;

use fs_core::mkfs::{Force, FormatOptions, Owner, format};
use fs_core::request::{Caller, KillPrivileges, NewInode, SyncScope, WriteSource};
use fs_core::types::FileOffset;
use fs_core::{MountOptions, Reply, Request, Volume, WriteOutcome};
use reactor::Context;
use reactor::sim::{CutPolicy, SimDisk, SimDiskOptions, SimOptions, Simulator};

fn main() -> Result<(), Box<dyn Error>> {
    let disk = SimDisk::new(SimDiskOptions { blocks: 32 * 1024, ..SimDiskOptions::default() });
    let reactors =
        || Simulator::new(SimOptions { reactors: 2, disk: Some(disk.clone()), ..SimOptions::default() });

    let options =
        FormatOptions { shards: 2, label: "example".to_owned(), force: Force::Refuse, owner: Owner::ROOT };
    let report = reactors().block_on(0, |ctx: Context| async move { format(&ctx, &options).await })??;
    println!("formatted {} bytes in {} groups", report.bytes, report.groups);

    let sim = reactors();
    let handles = [sim.handle(0), sim.handle(1)];
    sim.block_on(0, |ctx: Context| async move {
        let volume = Volume::mount(&ctx, &handles, MountOptions::default()).await?;
        let file = Request::Create {
            parent: Volume::ROOT,
            name: (*b"greeting").into(),
            new: NewInode::Regular,
            permissions: 0o644,
            caller: Caller { uid: 0, gid: 0 },
        };
        let Reply::Entry(file) = volume.call(file).await? else { unreachable!("a new file is an entry") };
        let outcome = volume.write(
            file.inode,
            FileOffset::new(0),
            b"still here",
            WriteSource::Call,
            KillPrivileges::Keep,
        );
        let WriteOutcome::Accepted(bytes) = outcome else { unreachable!("there is room on a new volume") };
        println!("wrote {bytes} bytes");
        volume.call(Request::Sync { inode: file.inode, scope: SyncScope::File }).await?;
        Ok::<(), Box<dyn Error>>(())
    })??;

    disk.power_cut(&CutPolicy::DropAll);
    println!("power cut");

    let sim = reactors();
    let handles = [sim.handle(0), sim.handle(1)];
    sim.block_on(0, |ctx: Context| async move {
        let volume = Volume::mount(&ctx, &handles, MountOptions::default()).await?;
        let name = Request::Lookup { parent: Volume::ROOT, name: (*b"greeting").into() };
        let Reply::Entry(file) = volume.call(name).await? else { unreachable!("a lookup gives an entry") };
        let read = Request::Read { inode: file.inode, offset: FileOffset::new(0), length: 4096 };
        let Reply::Data(data) = volume.call(read).await? else { unreachable!("a read gives data") };
        println!("read {:?}", String::from_utf8_lossy(&data));
        volume.unmount().await?;
        Ok::<(), Box<dyn Error>>(())
    })?
}
