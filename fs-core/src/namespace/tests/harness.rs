//! A whole volume under the simulator, and a walk over it that checks what must always hold.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use reactor::Context;
use reactor::sim::{CutPolicy, SimDisk, SimDiskOptions, SimOptions, Simulator, Tearing};

use crate::error::FsError;
use crate::fsck;
use crate::mkfs::{self, Force, FormatOptions, Owner};
use crate::request::{
    AttributeChange, Attributes, Caller, DirectoryEntry, FileKind, NewInode, RenameMode, Reply, Request,
    SyncScope,
};
use crate::types::InodeNr;
use crate::volume::{MountOptions, Volume};

/// Bytes of the simulated device: four shards fit.
const DEVICE_BYTES: u64 = 256 << 20;

/// Virtual time that deletions in the background may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Shape of a simulated machine and volume.
#[derive(Clone, Copy, Debug)]
pub(super) struct Machine {
    pub(super) seed: u64,
    pub(super) reactors: u16,
    pub(super) shards: u8,
}

impl Machine {
    fn disk(self) -> SimDisk {
        let blocks = DEVICE_BYTES / 4096;
        SimDisk::new(SimDiskOptions { blocks, seed: self.seed, ..SimDiskOptions::default() })
    }

    fn simulator(self, disk: &SimDisk) -> Simulator {
        let options = SimOptions {
            seed: self.seed,
            reactors: self.reactors,
            disk: Some(disk.clone()),
            ..SimOptions::default()
        };
        Simulator::new(options)
    }

    /// Formats, mounts, runs `test` in a task of the first reactor, unmounts, and checks the volume offline. Returns
    /// what the test returned, and the simulation's trace.
    pub(super) fn run<T>(self, test: impl AsyncFnOnce(&Client) -> T) -> (T, u64) {
        let disk = self.disk();
        let simulator = self.simulator(&disk);
        let value = simulator.block_on(0, async |ctx| {
            format(&ctx, self.shards).await;
            self.use_volume(&simulator, ctx, test).await
        });
        (value.unwrap_or_else(|error| panic!("{self:?}: {error}")), simulator.trace_hash())
    }

    /// As [`run`](Self::run), then mounts again in a new simulation and runs `after` there.
    pub(super) fn run_twice<T>(
        self,
        test: impl AsyncFnOnce(&Client) -> T,
        after: impl AsyncFnOnce(&Client, T),
    ) {
        let disk = self.disk();
        let first = self.simulator(&disk);
        let value = first.block_on(0, async |ctx| {
            format(&ctx, self.shards).await;
            self.use_volume(&first, ctx, test).await
        });
        let value = value.unwrap_or_else(|error| panic!("{self:?}: {error}"));
        drop(first);
        let second = self.simulator(&disk);
        let after = async |client: &Client| after(client, value).await;
        let ended = second.block_on(0, async |ctx| self.use_volume(&second, ctx, after).await);
        ended.unwrap_or_else(|error| panic!("{self:?}, second mount: {error}"));
    }

    /// Formats, mounts, runs `test` and cuts the power after `writes` more writes have reached the device, whether the
    /// test has ended by then or not; then checks the volume offline, and runs `after` on a new mount of it. Returns
    /// whether the power went before the test had ended, and what `after` returned.
    pub(super) fn run_and_crash<T>(
        self,
        writes: u64,
        test: impl AsyncFnOnce(&Client),
        after: impl AsyncFnOnce(&Client) -> T,
    ) -> (bool, T) {
        let disk = self.disk();
        let first = self.simulator(&disk);
        let ran = first.block_on(0, async |ctx| {
            format(&ctx, self.shards).await;
            let client = self.mount(&first, ctx).await;
            disk.crash_after_writes(writes);
            test(&client).await;
        });
        ran.unwrap_or_else(|error| panic!("{self:?}: {error}"));
        let struck = disk.has_crashed();
        disk.power_cut(&CutPolicy::Random { seed: self.seed ^ writes, tearing: Tearing::Sectors });
        drop(first);
        let second = self.simulator(&disk);
        let ended = second.block_on(0, async |ctx| {
            expect_clean(&ctx).await;
            self.use_volume(&second, ctx, after).await
        });
        (struck, ended.unwrap_or_else(|error| panic!("{self:?}, after {writes} writes: {error}")))
    }

    async fn use_volume<T>(
        self,
        simulator: &Simulator,
        ctx: Context,
        test: impl AsyncFnOnce(&Client) -> T,
    ) -> T {
        let client = self.mount(simulator, ctx).await;
        let value = test(&client).await;
        client.volume.unmount().await.unwrap();
        expect_clean(&client.ctx).await;
        value
    }

    async fn mount(self, simulator: &Simulator, ctx: Context) -> Client {
        let handles: Vec<_> = (0..usize::from(self.reactors)).map(|index| simulator.handle(index)).collect();
        let volume = Volume::mount(&ctx, &handles, MountOptions::default()).await.unwrap();
        Client { volume, ctx }
    }
}

async fn format(ctx: &Context, shards: u8) {
    let options = FormatOptions { shards, label: "sim".to_owned(), force: Force::Refuse, owner: Owner::ROOT };
    mkfs::format(ctx, &options).await.unwrap();
}

async fn expect_clean(ctx: &Context) {
    let report = fsck::check(ctx, &mut |_| {}).await.unwrap();
    assert!(report.is_clean(), "{:#?}", report.findings);
}

/// What a front end does, in words of this test.
#[derive(Clone)]
pub(super) struct Client {
    pub(super) volume: Volume,
    pub(super) ctx: Context,
}

pub(super) fn caller() -> Caller {
    Caller { uid: 1000, gid: 1001 }
}

fn entry(reply: Reply) -> Attributes {
    match reply {
        Reply::Entry(attributes) | Reply::Attributes(attributes) => attributes,
        other => panic!("{other:?} instead of attributes"),
    }
}

impl Client {
    pub(super) async fn call(&self, request: Request) -> Result<Reply, FsError> {
        self.volume.call(request).await
    }

    pub(super) async fn make(
        &self,
        parent: InodeNr,
        name: &str,
        new: NewInode,
    ) -> Result<Attributes, FsError> {
        let permissions = 0o755;
        let request =
            Request::Create { parent, name: name.as_bytes().into(), new, permissions, caller: caller() };
        self.call(request).await.map(entry)
    }

    pub(super) async fn directory(&self, parent: InodeNr, name: &str) -> InodeNr {
        self.make(parent, name, NewInode::Directory).await.unwrap().inode
    }

    pub(super) async fn file(&self, parent: InodeNr, name: &str) -> InodeNr {
        self.make(parent, name, NewInode::Regular).await.unwrap().inode
    }

    pub(super) async fn lookup(&self, parent: InodeNr, name: &str) -> Result<Attributes, FsError> {
        self.call(Request::Lookup { parent, name: name.as_bytes().into() }).await.map(entry)
    }

    pub(super) async fn attributes(&self, inode: InodeNr) -> Result<Attributes, FsError> {
        self.call(Request::GetAttributes { inode }).await.map(entry)
    }

    pub(super) async fn change(
        &self,
        inode: InodeNr,
        change: AttributeChange,
    ) -> Result<Attributes, FsError> {
        self.call(Request::SetAttributes { inode, change }).await.map(entry)
    }

    pub(super) async fn unlink(&self, parent: InodeNr, name: &str) -> Result<(), FsError> {
        self.call(Request::Unlink { parent, name: name.as_bytes().into() }).await.map(drop)
    }

    pub(super) async fn remove_directory(&self, parent: InodeNr, name: &str) -> Result<(), FsError> {
        self.call(Request::RemoveDirectory { parent, name: name.as_bytes().into() }).await.map(drop)
    }

    pub(super) async fn link(
        &self,
        inode: InodeNr,
        new_parent: InodeNr,
        name: &str,
    ) -> Result<Attributes, FsError> {
        self.call(Request::Link { inode, new_parent, new_name: name.as_bytes().into() }).await.map(entry)
    }

    pub(super) async fn rename(
        &self,
        from: (InodeNr, &str),
        to: (InodeNr, &str),
        mode: RenameMode,
    ) -> Result<(), FsError> {
        let (parent, name) = (from.0, from.1.as_bytes().into());
        let (new_parent, new_name) = (to.0, to.1.as_bytes().into());
        self.call(Request::Rename { parent, name, new_parent, new_name, mode }).await.map(drop)
    }

    pub(super) async fn forget(&self, inode: InodeNr, lookups: u64) {
        self.call(Request::Forget { inode, lookups }).await.unwrap();
    }

    pub(super) async fn sync(&self) -> Result<(), FsError> {
        let request = Request::Sync { inode: InodeNr::ROOT, scope: SyncScope::Volume };
        self.call(request).await.map(drop)
    }

    /// All entries of a directory, `limit` at a time, `.` and `..` included.
    pub(super) async fn list(&self, inode: InodeNr, limit: u32) -> Result<Vec<DirectoryEntry>, FsError> {
        let (mut all, mut after) = (Vec::new(), 0);
        loop {
            let Reply::Directory(listed) = self.call(Request::ReadDirectory { inode, after, limit }).await?
            else {
                panic!("a listing lists");
            };
            let Some(last) = listed.last() else { return Ok(all) };
            after = last.cookie;
            all.extend(listed);
        }
    }

    /// Inodes of all shards, once the deletions that go on have ended: waits until there are `expected`.
    pub(super) async fn expect_inodes(&self, expected: u64) {
        let deadline = self.ctx.now().saturating_add(PATIENCE);
        loop {
            let report = self.volume.report().await.unwrap();
            let found: u64 = report.shards.iter().map(|shard| shard.inodes).sum();
            if found == expected {
                return;
            }
            assert!(self.ctx.now() < deadline, "{found} inodes instead of {expected}");
            self.ctx.sleep(Duration::from_millis(10)).await;
        }
    }

    /// Walks everything from the root, checks each directory and each link count, and returns paths with their
    /// attributes. Counts no lookup that it does not give back.
    pub(super) async fn walk(&self) -> BTreeMap<String, Attributes> {
        let mut found = BTreeMap::new();
        let mut names: BTreeMap<InodeNr, u32> = BTreeMap::new();
        let mut directories = BTreeSet::new();
        let root = self.attributes(InodeNr::ROOT).await.unwrap();
        let mut waiting = vec![(String::new(), root, InodeNr::ROOT)];
        while let Some((path, attributes, parent)) = waiting.pop() {
            let inode = attributes.inode;
            assert!(directories.insert(inode), "{path}: a directory with two names");
            let listed = self.list(inode, 3).await.unwrap();
            let own: Vec<_> = listed.iter().take(2).map(|entry| (&*entry.name, entry.inode)).collect();
            assert_eq!(own, [(&b"."[..], inode), (&b".."[..], parent)], "{path}");
            let (mut subdirectories, mut length) = (0, 0);
            for entry in &listed[2..] {
                let name = String::from_utf8(entry.name.to_vec()).unwrap();
                length += entry.name.len() as u64;
                let child = self.lookup(inode, &name).await.unwrap();
                self.forget(child.inode, 1).await;
                assert_eq!((child.inode, child.kind), (entry.inode, entry.kind), "{path}/{name}");
                *names.entry(child.inode).or_default() += 1;
                let path = format!("{path}/{name}");
                if child.kind == FileKind::Directory {
                    subdirectories += 1;
                    waiting.push((path.clone(), child.clone(), inode));
                }
                assert_eq!(found.insert(path, child), None);
            }
            assert_eq!(attributes.links, 2 + subdirectories, "{path}: links of a directory");
            assert_eq!(attributes.size, length, "{path}: size of a directory");
        }
        for (path, attributes) in &found {
            if attributes.kind != FileKind::Directory {
                assert_eq!(attributes.links, names[&attributes.inode], "{path}: links");
            }
        }
        found
    }

    /// Walks, and checks that there are no other inodes than those found. Nobody may hold lookups.
    pub(super) async fn check(&self) -> BTreeMap<String, Attributes> {
        let found = self.walk().await;
        let inodes: BTreeSet<InodeNr> = found.values().map(|attributes| attributes.inode).collect();
        self.expect_inodes(inodes.len() as u64 + 1).await;
        found
    }
}
