//! Loads on a volume in this process: reactors on their cores, the driver, the embedded controller, no kernel.
//!
//! Owns: [`Opened`] (controller, reactors, volume), the loads' command line, and what a load on several reactors adds up to. The
//! loads are in [`loads`], what makes many files and extents in [`many`].

pub(crate) mod loads;
mod many;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use clap::{Args, ValueEnum};
use fs_core::mkfs::{Force, FormatOptions, Owner, format};
use fs_core::{MountOptions, Volume};
use nvme::{Controller, QueueOptions};
use pollux::device::{self, Device, DeviceSpec};
use pollux::quantity::{CoreList, parse_cores};
use reactor::{Context, ReactorConfig, SystemClock};
use serde_json::{Value, json};

/// Options of `library`.
#[derive(Args)]
pub(crate) struct Library {
    #[arg(long)]
    row: Row,
    /// The device; it is formatted
    #[arg(long, value_parser = device::parse)]
    device: DeviceSpec,
    /// Cores of the reactors; the load runs on each, in a directory of its own
    #[arg(long, value_parser = parse_cores, default_value = "0")]
    cores: CoreList,
    /// Seconds of the loads that repeat
    #[arg(long, default_value_t = 2)]
    seconds: u64,
    /// Requests at once
    #[arg(long, default_value_t = 128)]
    depth: usize,
    /// Files
    #[arg(long, default_value_t = 1_000_000)]
    files: u64,
    /// Extents
    #[arg(long, default_value_t = 10_000_000)]
    extents: u64,
    /// Blocks of the file that is read or written
    #[arg(long, default_value_t = 65_536)]
    blocks: u64,
}

/// A load.
#[derive(Clone, Copy, ValueEnum)]
enum Row {
    /// Read 4 KiB at random, past the cache
    RandomRead,
    /// Write every block of a file once, at random, past the cache
    RandomWrite,
    /// Write 4 KiB and fsync
    WriteFsync,
    /// Create, write and unlink files of 100 bytes
    CreateUnlink,
    /// Mount after a crash, with many files and extents
    MountAfterCrash,
    /// Memory that inodes in the cache take
    InodeMemory,
}

impl Library {
    pub(crate) fn run(&self) -> Result<()> {
        let found = match self.row {
            Row::RandomRead | Row::RandomWrite | Row::WriteFsync | Row::CreateUnlink => self.timed()?,
            Row::MountAfterCrash => self.mount_after_crash()?,
            Row::InodeMemory => self.inode_memory()?,
        };
        println!("{found}");
        Ok(())
    }

    fn open(&self) -> Result<Opened> {
        let controller = device::open(&self.device)?;
        format_on(&controller, u8::try_from(self.cores.ids().len())?)?;
        Opened::mount(controller, &self.device, &self.cores)
    }

    /// The load on every reactor at once; operations and rates are added up. It finds nothing in memory.
    fn timed(&self) -> Result<Value> {
        let opened = self.open()?;
        let (row, depth, blocks) = (self.row, self.depth, self.blocks);
        let period = Duration::from_secs(self.seconds);
        let blocks_before = match row {
            Row::RandomRead | Row::RandomWrite => blocks,
            Row::WriteFsync => loads::SYNCED_BLOCKS,
            _ => 0,
        };
        let places =
            opened.run(0, move |_, volume| async move { loads::places(&volume, blocks_before).await })?;
        let opened = Opened::mount(opened.unmount_only()?, &self.device, &self.cores)?;
        let started: Vec<_> = places
            .into_iter()
            .enumerate()
            .map(|(reactor, place)| {
                opened.start(reactor, move |ctx, volume| async move {
                    match row {
                        Row::RandomRead => {
                            loads::random_read(&ctx, &volume, place.file, blocks, depth, period).await
                        }
                        Row::RandomWrite => {
                            loads::random_write(&ctx, &volume, place.file, blocks, depth).await
                        }
                        Row::WriteFsync => loads::write_fsync(&ctx, &volume, place.file, period).await,
                        _ => loads::create_unlink(&ctx, &volume, place.home, period).await,
                    }
                })
            })
            .collect::<Result<_>>()?;
        let mut per_second = 0.0;
        let mut operations = 0;
        for running in started {
            let (took, done) = running.wait()?;
            operations += done;
            per_second += done as f64 / took.as_secs_f64();
        }
        opened.unmount()?;
        Ok(json!({ "operations": operations, "per_second": per_second, "ns": 1e9 / per_second }))
    }

    fn mount_after_crash(&self) -> Result<Value> {
        let opened = self.open()?;
        let (files, extents) = (self.files, self.extents);
        let made =
            opened.run(0, move |_, volume| async move { many::fill(&volume, files, extents).await })?;
        let controller = opened.crash();
        let began = std::time::Instant::now();
        let opened = Opened::mount(controller, &self.device, &self.cores)?;
        let took = began.elapsed();
        let kept = opened.run(0, move |_, volume| async move { many::last_file(&volume, files).await })?;
        ensure!(kept, "the last file that was synced is not there after the crash");
        opened.unmount()?;
        Ok(json!({ "mount_ns": crate::quantiles::nanos(took), "files": files, "extents": made }))
    }

    fn inode_memory(&self) -> Result<Value> {
        let opened = self.open()?;
        let files = self.files;
        opened.run(0, move |_, volume| async move { many::fill(&volume, files, 0).await })?;
        let controller = opened.unmount_only()?;
        let opened = Opened::mount(controller, &self.device, &self.cores)?;
        let before = resident_bytes()?;
        opened.run(0, move |_, volume| async move { many::look_up(&volume, files).await })?;
        let after = resident_bytes()?;
        opened.crash();
        Ok(json!({ "bytes": after.saturating_sub(before), "inodes": files }))
    }
}

/// Memory of this process that is in use.
fn resident_bytes() -> Result<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = statm.split(' ').nth(1).context("/proc/self/statm has a second field")?.parse()?;
    Ok(pages * 4096)
}

/// Makes an empty volume, and leaves the controller as it is: what lies in memory would be gone with it.
pub(crate) fn format_on(controller: &Arc<Controller>, shards: u8) -> Result<()> {
    let queue = controller.create_queue(&QueueOptions::default())?;
    let options = FormatOptions { shards, label: String::new(), force: Force::Overwrite, owner: Owner::ROOT };
    reactor::block_on(Some(Box::new(queue)), Arc::new(SystemClock::new()), 0, |ctx: Context| async move {
        format(&ctx, &options).await
    })?;
    Ok(())
}

/// A volume with its reactors.
pub(crate) struct Opened {
    controller: Arc<Controller>,
    device: Device,
    volume: Volume,
}

/// A load that was started.
struct Running<T>(std::sync::mpsc::Receiver<Result<T>>);

impl<T> Running<T> {
    fn wait(self) -> Result<T> {
        self.0.recv().context("a load has ended without an outcome")?
    }
}

impl Opened {
    fn mount(controller: Arc<Controller>, spec: &DeviceSpec, cores: &CoreList) -> Result<Self> {
        let (queue, config) = (QueueOptions::default(), ReactorConfig::default());
        let device = Device::over(Arc::clone(&controller), &spec.to_string(), cores.ids(), config, queue)?;
        let volume = Volume::mount_blocking(device.runtime().handles(), MountOptions::default())?;
        Ok(Self { controller, device, volume })
    }

    /// Starts a load on a reactor.
    fn start<T, F, Fut>(&self, reactor: usize, load: F) -> Result<Running<T>>
    where
        T: Send + 'static,
        F: FnOnce(Context, Volume) -> Fut + Send + 'static,
        Fut: Future<Output = Result<T>> + 'static,
    {
        let (sender, outcome) = std::sync::mpsc::sync_channel(1);
        let volume = self.volume.clone();
        self.device.runtime().handles()[reactor].spawn_with(move |ctx| {
            let load = load(ctx.clone(), volume);
            let task = async move { drop(sender.send(load.await)) };
            if let Err(error) = ctx.spawn(task) {
                eprintln!("a load could not start: {error}");
            }
        })?;
        Ok(Running(outcome))
    }

    /// Runs a load on a reactor, to its end.
    fn run<T, F, Fut>(&self, reactor: usize, load: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(Context, Volume) -> Fut + Send + 'static,
        Fut: Future<Output = Result<T>> + 'static,
    {
        self.start(reactor, load)?.wait()
    }

    fn unmount(self) -> Result<()> {
        self.unmount_only().map(drop)
    }

    fn unmount_only(self) -> Result<Arc<Controller>> {
        self.volume.unmount_blocking().map_err(|error| anyhow!("unmounting: {error}"))?;
        Ok(self.crash())
    }

    /// Stops the reactors, whatever they are doing. The controller stays up.
    fn crash(self) -> Arc<Controller> {
        let Self { controller, device, volume } = self;
        drop(volume);
        drop(device);
        controller
    }
}
