//! The data path on a simulated device, through the volume's front door, against files kept as byte arrays.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use reactor::sim::{CutPolicy, SimDisk, SimDiskOptions, SimOptions, Simulator, Tearing};
use reactor::{Context, Lba, LbaCount, LbaRange, Random};

use crate::error::FsError;
use crate::mkfs::{Force, FormatOptions, Owner, format};
use crate::request::{
    AllocateMode, AttributeChange, Attributes, Caller, KillPrivileges, NewInode, Reply, Request, SeekWhat,
    SyncScope, WriteSource,
};
use crate::types::{BLOCK_SIZE, FileOffset, InodeNr};
use crate::volume::{MountOptions, Volume, WriteOutcome};

mod direct;
mod faults;
mod fsx;
mod random;

/// A simulated machine with a formatted disk.
struct World {
    sim: Simulator,
    disk: SimDisk,
    options: MountOptions,
}

impl World {
    fn new(seed: u64, disk_options: SimDiskOptions, options: MountOptions) -> Self {
        let disk = SimDisk::new(SimDiskOptions { seed, ..disk_options });
        let sim = Simulator::new(SimOptions { seed, disk: Some(disk.clone()), ..SimOptions::default() });
        let world = Self { sim, disk, options };
        let format_options =
            FormatOptions { shards: 1, label: String::new(), force: Force::Refuse, owner: Owner::ROOT };
        world.run(|ctx| async move { format(&ctx, &format_options).await }).unwrap();
        world
    }

    /// A disk of 64 MiB and little memory.
    fn small(seed: u64) -> Self {
        let options = MountOptions { page_memory: 8 << 20, tree_memory: 4 << 20, ..MountOptions::default() };
        Self::new(seed, SimDiskOptions::default(), options)
    }

    fn run<F, T>(&self, task: impl FnOnce(Context) -> F) -> T
    where
        F: Future<Output = T>,
    {
        self.sim.block_on(0, task).unwrap()
    }

    /// Mounts, runs `task`, unmounts.
    fn mounted<F, T>(&self, task: impl FnOnce(Context, Client) -> F) -> T
    where
        F: Future<Output = T>,
    {
        let handle = self.sim.handle(0);
        let options = self.options.clone();
        self.run(|ctx| async move {
            let volume = Volume::mount(&ctx, &[handle], options).await.unwrap();
            let result = task(ctx.clone(), Client { volume: volume.clone() }).await;
            volume.unmount().await.unwrap();
            crate::fsck::tests::assert_clean(&ctx).await;
            result
        })
    }
}

/// A program that uses the volume.
#[derive(Clone)]
struct Client {
    volume: Volume,
}

impl Client {
    async fn create(&self, name: &str) -> InodeNr {
        self.try_create(name).await.unwrap()
    }

    async fn try_create(&self, name: &str) -> Result<InodeNr, FsError> {
        let request = Request::Create {
            parent: InodeNr::ROOT,
            name: name.as_bytes().into(),
            new: NewInode::Regular,
            permissions: 0o644,
            caller: Caller { uid: 0, gid: 0 },
        };
        match self.volume.call(request).await? {
            Reply::Entry(attributes) => Ok(attributes.inode),
            other => panic!("{other:?}"),
        }
    }

    /// Writes as a front end does: the short way if there is room.
    async fn write(&self, inode: InodeNr, offset: u64, data: &[u8]) -> Result<u32, FsError> {
        let (source, kill_privileges) = (WriteSource::Call, KillPrivileges::Keep);
        match self.volume.write(inode, FileOffset::new(offset), data, source, kill_privileges) {
            WriteOutcome::Accepted(written) => Ok(written),
            WriteOutcome::Failed(error) => Err(error),
            WriteOutcome::Slow => self.write_slow(inode, offset, data, source).await,
        }
    }

    async fn write_slow(
        &self,
        inode: InodeNr,
        offset: u64,
        data: &[u8],
        source: WriteSource,
    ) -> Result<u32, FsError> {
        let kill_privileges = KillPrivileges::Keep;
        let offset = FileOffset::new(offset);
        let request = Request::Write { inode, offset, data: data.into(), source, kill_privileges };
        match self.volume.call(request).await? {
            Reply::Written(written) => Ok(written),
            other => panic!("{other:?}"),
        }
    }

    async fn read(&self, inode: InodeNr, offset: u64, length: u32) -> Result<Vec<u8>, FsError> {
        match self.volume.call(Request::Read { inode, offset: FileOffset::new(offset), length }).await? {
            Reply::Data(data) => Ok(data),
            other => panic!("{other:?}"),
        }
    }

    async fn write_direct(&self, inode: InodeNr, offset: u64, data: &[u8]) -> Result<u32, FsError> {
        let (offset, kill_privileges) = (FileOffset::new(offset), KillPrivileges::Keep);
        match self
            .volume
            .call(Request::WriteDirect { inode, offset, data: data.into(), kill_privileges })
            .await?
        {
            Reply::Written(written) => Ok(written),
            other => panic!("{other:?}"),
        }
    }

    async fn read_direct(&self, inode: InodeNr, offset: u64, length: u32) -> Result<Vec<u8>, FsError> {
        match self.volume.call(Request::ReadDirect { inode, offset: FileOffset::new(offset), length }).await?
        {
            Reply::Data(data) => Ok(data),
            other => panic!("{other:?}"),
        }
    }

    async fn attributes(&self, inode: InodeNr) -> Attributes {
        match self.volume.call(Request::GetAttributes { inode }).await.unwrap() {
            Reply::Attributes(attributes) => attributes,
            other => panic!("{other:?}"),
        }
    }

    async fn truncate(&self, inode: InodeNr, size: u64) -> Result<(), FsError> {
        let change = AttributeChange { size: Some(size), ..AttributeChange::default() };
        self.volume.call(Request::SetAttributes { inode, change }).await.map(drop)
    }

    async fn allocate(
        &self,
        inode: InodeNr,
        offset: u64,
        length: u64,
        mode: AllocateMode,
    ) -> Result<(), FsError> {
        self.volume
            .call(Request::Allocate { inode, offset: FileOffset::new(offset), length, mode })
            .await
            .map(drop)
    }

    async fn sync(&self, inode: InodeNr) -> Result<(), FsError> {
        self.volume.call(Request::Sync { inode, scope: SyncScope::File }).await.map(drop)
    }

    async fn close(&self, inode: InodeNr) -> Result<(), FsError> {
        self.volume.call(Request::Flush { inode }).await.map(drop)
    }

    async fn seek(&self, inode: InodeNr, offset: u64, what: SeekWhat) -> Result<u64, FsError> {
        match self.volume.call(Request::Seek { inode, offset: FileOffset::new(offset), what }).await? {
            Reply::Offset(found) => Ok(found),
            other => panic!("{other:?}"),
        }
    }
}

/// Bytes that tell where they belong.
fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let random = Random::new(seed, 0);
    (0..length).map(|_| random.next() as u8).collect()
}

#[test]
fn written_bytes_are_read_back_before_and_after_write_back_and_remount() {
    let world = World::small(1);
    let data = pattern(1, 3 * 1024 * 1024 + 100);
    let (inode, expected) = world.mounted(|_, client| async move {
        let inode = client.create("a").await;
        for (index, piece) in data.chunks(1 << 20).enumerate() {
            let written = client.write(inode, (index << 20) as u64 + 5, piece).await.unwrap();
            assert_eq!(written as usize, piece.len());
        }
        let mut expected = vec![0; 5];
        expected.extend_from_slice(&data);
        assert!(client.read(inode, 0, 8 << 20).await.unwrap() == expected);
        assert_eq!(client.attributes(inode).await.size, expected.len() as u64);
        client.sync(inode).await.unwrap();
        assert!(client.read(inode, 0, 8 << 20).await.unwrap() == expected);
        let attributes = client.attributes(inode).await;
        assert_eq!((attributes.size, attributes.sectors), (expected.len() as u64, (3 * 256 + 1) * 8));
        (inode, expected)
    });
    world.mounted(|_, client| async move {
        assert!(client.read(inode, 0, 8 << 20).await.unwrap() == expected);
        assert_eq!(client.read(inode, 4090, 10).await.unwrap(), expected[4090..4100]);
        assert_eq!(client.read(inode, expected.len() as u64 - 1, 10).await.unwrap().len(), 1);
        assert_eq!(client.read(inode, expected.len() as u64, 10).await.unwrap(), []);
    });
}

#[test]
fn truncated_tail_reads_as_zeroes_when_the_file_grows_again() {
    let world = World::small(2);
    let inode = world.mounted(|_, client| async move {
        let inode = client.create("a").await;
        client.write(inode, 0, &pattern(2, 20_000)).await.unwrap();
        client.sync(inode).await.unwrap();
        client.truncate(inode, 5000).await.unwrap();
        assert_eq!(client.attributes(inode).await.size, 5000);
        client.truncate(inode, 30_000).await.unwrap();
        let read = client.read(inode, 0, 40_000).await.unwrap();
        assert_eq!(read.len(), 30_000);
        assert_eq!(read[..5000], pattern(2, 20_000)[..5000]);
        assert!(read[5000..].iter().all(|byte| *byte == 0));
        assert_eq!(client.attributes(inode).await.sectors, 16);
        inode
    });
    world.mounted(|_, client| async move {
        let read = client.read(inode, 0, 40_000).await.unwrap();
        assert_eq!(read[..5000], pattern(2, 20_000)[..5000]);
        assert!(read.len() == 30_000 && read[5000..].iter().all(|byte| *byte == 0));
    });
}

#[test]
fn holes_and_data_are_found_wherever_the_data_is() {
    let world = World::small(3);
    world.mounted(|_, client| async move {
        let inode = client.create("a").await;
        client.write(inode, 8 * BLOCK_SIZE, &pattern(3, 4096)).await.unwrap();
        client.truncate(inode, 20 * BLOCK_SIZE).await.unwrap();
        for synced in [false, true] {
            if synced {
                client.sync(inode).await.unwrap();
            }
            assert_eq!(client.seek(inode, 0, SeekWhat::Data).await, Ok(8 * BLOCK_SIZE));
            assert_eq!(client.seek(inode, 0, SeekWhat::Hole).await, Ok(0));
            assert_eq!(client.seek(inode, 8 * BLOCK_SIZE + 1, SeekWhat::Data).await, Ok(8 * BLOCK_SIZE + 1));
            assert_eq!(client.seek(inode, 8 * BLOCK_SIZE, SeekWhat::Hole).await, Ok(9 * BLOCK_SIZE));
            assert_eq!(client.seek(inode, 9 * BLOCK_SIZE, SeekWhat::Data).await, Err(FsError::NoData));
            assert_eq!(client.seek(inode, 20 * BLOCK_SIZE, SeekWhat::Hole).await, Err(FsError::NoData));
        }
        client.allocate(inode, 0, 4 * BLOCK_SIZE, AllocateMode::KeepSize).await.unwrap();
        assert_eq!(
            client.seek(inode, 0, SeekWhat::Data).await,
            Ok(8 * BLOCK_SIZE),
            "preallocated reads as a hole"
        );
        client.write(inode, BLOCK_SIZE, &[1]).await.unwrap();
        assert_eq!(client.seek(inode, 0, SeekWhat::Data).await, Ok(BLOCK_SIZE));
        assert_eq!(client.seek(inode, BLOCK_SIZE, SeekWhat::Hole).await, Ok(2 * BLOCK_SIZE));
    });
}

#[test]
fn write_into_preallocated_blocks_takes_no_others() {
    let world = World::small(4);
    world.mounted(|_, client| async move {
        let inode = client.create("a").await;
        client.allocate(inode, 0, 100 * BLOCK_SIZE, AllocateMode::Extend).await.unwrap();
        let attributes = client.attributes(inode).await;
        assert_eq!((attributes.size, attributes.sectors), (100 * BLOCK_SIZE, 800));
        assert!(client.read(inode, 0, 1 << 20).await.unwrap().iter().all(|byte| *byte == 0));
        client.write(inode, 10 * BLOCK_SIZE + 17, &pattern(4, 30_000)).await.unwrap();
        client.sync(inode).await.unwrap();
        assert_eq!(client.attributes(inode).await.sectors, 800);
        let read = client.read(inode, 10 * BLOCK_SIZE, 40_000).await.unwrap();
        assert!(read[..17].iter().all(|byte| *byte == 0));
        assert_eq!(read[17..30_017], pattern(4, 30_000));
        assert!(read[30_017..].iter().all(|byte| *byte == 0));
    });
}

#[test]
fn stores_through_a_mapping_never_extend_the_file() {
    let world = World::small(5);
    world.mounted(|_, client| async move {
        let inode = client.create("a").await;
        client.write(inode, 0, &[1; 5000]).await.unwrap();
        client.write_slow(inode, 4096, &[2; 4096], WriteSource::Mapping).await.unwrap();
        assert_eq!(client.attributes(inode).await.size, 5000);
        let read = client.read(inode, 0, 10_000).await.unwrap();
        assert_eq!((read.len(), read[4095], read[4096], read[4999]), (5000, 1, 2, 2));
        client.sync(inode).await.unwrap();
        client.truncate(inode, 10_000).await.unwrap();
        let read = client.read(inode, 4096, 10_000).await.unwrap();
        assert!(read[..904].iter().all(|byte| *byte == 2) && read[904..].iter().all(|byte| *byte == 0));
    });
}
