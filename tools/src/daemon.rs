//! The daemon: a volume, its mount and its control socket in this process, until somebody asks it to stop.
//!
//! Owns: the order in which these are put together and taken apart. `polluxd` and `pollux up` are both this.
//!
//! | step | on failure, or at the end |
//! |---|---|
//! | device opened, one queue for each reactor | controller shut down |
//! | volume mounted on the reactors | everything written, checkpoint, shards ended |
//! | mount(2) and session threads | unmounted |
//! | control socket | conversations ended, socket removed |
//! | wait for SIGINT, SIGTERM, the end of the session (umount(8)), or the end of the device (gone, or wanted back) | |
//!
//! The end: the mount is taken away, politely for `POLITE_PERIOD` and then by force, so that nothing more is
//! accepted; then everything accepted is written and made durable. A second signal during the first part ends the
//! politeness; during the second it ends the process at once (what was acknowledged as durable stays so).

use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use fs_core::relocate::{RelocateProgress, RelocateScope};
use fs_core::request::{CloneRange, Reply, Request, ScrubPlace, SyncScope};
use fs_core::types::{FileOffset, ShardId};
use fs_core::{FsError, Volume};
use nix::errno::Errno;
use nvme::{Controller, LatencyRecording, QueueOptions};
use reactor::ReactorHandle;
use serde_json::{Value, json};

use crate::config::Config;
use crate::control::location;
use crate::control::protocol::{Command, Progress, SharedRange};
use crate::control::server::{ControlServer, Handler, Tell};
use crate::device::{self, Device, DeviceSpec};
use crate::failure::{During, Failure};
use crate::fuse::{FrontEnd, MountPoint, Mounted, Urgency, collect_mapped_pages};
use crate::quantity::CoreList;
use crate::report::{self, DaemonReport};
use crate::signals::{Alarm, Signals, Woken};

/// How long programs that use the mount may hold up its end.
const POLITE_PERIOD: Duration = Duration::from_millis(1_000);

/// How often an unmount is tried in that time.
const POLITE_INTERVAL: Duration = Duration::from_millis(100);

/// How long the kernel may take to hand over what programs stored through mappings.
const COLLECT_PERIOD: Duration = Duration::from_secs(1);

/// How long the session threads may take to leave once the mount is gone.
const LEAVE_PERIOD: Duration = Duration::from_secs(1);

/// Session threads at least: one may wait for a full mailbox while another reads on.
const SESSION_THREADS: usize = 2;

/// What a daemon is started with.
pub struct Daemon {
    /// The device.
    pub device: DeviceSpec,
    /// Where to mount.
    pub point: MountPoint,
    /// Cores of the reactors; the configuration's or all if not given.
    pub cores: Option<CoreList>,
    /// Where the control socket goes, if not where clients look for it.
    pub socket: Option<PathBuf>,
    /// Everything else.
    pub config: Config,
}

/// A daemon that has mounted.
pub struct Ready<'a> {
    /// The mount point.
    pub mount: &'a Path,
    /// The control socket.
    pub socket: &'a Path,
    /// Figures at the start.
    pub report: DaemonReport,
}

/// A failed assertion on any thread ends the process. A reactor that is missing would leave its files hanging for
/// ever; after a restart everything that was durable is there, without a repair.
fn end_with_first_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        eprintln!(
            "pollux: internal error, see above; the daemon ends at once. What was synced is safe: start it again. \
             `umount -l` frees the mount point (`pollux up` does it by itself)."
        );
        std::process::abort();
    }));
}

impl Daemon {
    /// Runs until asked to stop; `announce` is called once everything is ready.
    ///
    /// # Errors
    /// What could not be put together, or not be written at the end.
    pub fn run(self, signals: &Signals, announce: impl FnOnce(&Ready<'_>)) -> Result<(), Failure> {
        let cores = self.reactor_cores();
        let queue = QueueOptions { latency: LatencyRecording::On, ..QueueOptions::default() };
        let device = Device::start(&self.device, &cores, self.config.reactor(), queue)?;
        self.run_on(device, signals, announce)
    }

    fn reactor_cores(&self) -> Vec<usize> {
        self.cores.as_ref().map_or_else(device::default_cores, |cores| cores.ids().to_vec())
    }

    /// [`Self::run`] on a device that is open already; it is stopped at the end.
    ///
    /// # Errors
    /// As there.
    pub fn run_on(
        self,
        device: Device,
        signals: &Signals,
        announce: impl FnOnce(&Ready<'_>),
    ) -> Result<(), Failure> {
        end_with_first_panic();
        let outcome = self.serve(&device, signals, announce);
        let stopped = device.stop();
        outcome.and(stopped)
    }

    fn serve(
        &self,
        device: &Device,
        signals: &Signals,
        announce: impl FnOnce(&Ready<'_>),
    ) -> Result<(), Failure> {
        let runtime = device.runtime();
        let volume = Volume::mount_blocking(runtime.handles(), self.config.volume())
            .map_err(|error| device::mount_failure(&self.device, &error))?;
        for warning in volume.warnings() {
            tracing::warn!(device = %self.device, "{warning}");
        }
        let outcome = self.serve_mount(device, &volume, signals, announce);
        let written = finish(&volume, signals)
            .during(format_args!("not everything could be written to {}", self.device));
        outcome.and(written)
    }

    fn serve_mount(
        &self,
        device: &Device,
        volume: &Volume,
        signals: &Signals,
        announce: impl FnOnce(&Ready<'_>),
    ) -> Result<(), Failure> {
        let front = FrontEnd::new(volume.clone()).beside_reactors(&self.reactor_cores());
        let threads = device.runtime().handles().len().max(SESSION_THREADS);
        let source = self.device.to_string();
        let mounted = Mounted::mount(front, &self.point, &source, self.config.extras(), threads)?;
        let outcome = self.serve_control(device, volume, &mounted, signals, announce);
        let unmounted = leave(mounted, signals);
        outcome.and(unmounted)
    }

    fn serve_control(
        &self,
        device: &Device,
        volume: &Volume,
        mounted: &Mounted,
        signals: &Signals,
        announce: impl FnOnce(&Ready<'_>),
    ) -> Result<(), Failure> {
        let figures = Arc::new(Figures::new(device, volume, mounted.path(), &self.device));
        let usual = location::for_daemon(mounted.device());
        let (socket, link) = match &self.socket {
            // Without a usual place the mount's paths do not lead to the socket, its own path still does.
            Some(socket) => (socket.clone(), usual.ok()),
            None => (usual?, None),
        };
        let _server = ControlServer::start(&socket, link.as_deref(), figures.clone())?;
        let report = figures.report().map_err(Failure::new)?;
        announce(&Ready { mount: mounted.path(), socket: &socket, report });
        let removal = device.controller().removal_event();
        let woken = signals.wait_beside(mounted.ended(), removal, None).during("cannot wait for signals")?;
        if woken == Woken::Descriptor {
            // Without this the kernel would wait for its device for as long as this process lives.
            tracing::warn!(device = %self.device, "the device has gone or is wanted back: unmounting");
        }
        Ok(())
    }
}

/// Takes the mount away, so that nothing more is accepted.
fn leave(mounted: Mounted, signals: &Signals) -> Result<(), Failure> {
    let shown = mounted.path().display().to_string();
    let impatient = Instant::now() + POLITE_PERIOD;
    loop {
        match mounted.unmount(Urgency::Polite) {
            Ok(()) => break,
            Err(error) if is_busy(&error) && Instant::now() < impatient => {}
            Err(error) => {
                tracing::warn!(mount = %shown, %error, "in use; detaching it, programs that use it get errors");
                force(&mounted).during(format_args!("cannot unmount {shown}"))?;
                break;
            }
        }
        let woken = signals.wait(mounted.ended(), Some(POLITE_INTERVAL)).during("cannot wait for signals")?;
        if woken == Woken::Signal {
            force(&mounted).during(format_args!("cannot unmount {shown}"))?;
            break;
        }
    }
    let deadline = Instant::now() + LEAVE_PERIOD;
    while !mounted.ended().is_raised() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            // Without root nobody can end a session that programs still use; its threads end with the process.
            tracing::warn!(mount = %shown, "programs still use the detached mount");
            return Ok(());
        }
        signals.wait(mounted.ended(), Some(left)).during("cannot wait for signals")?;
    }
    mounted.join().during(format_args!("the FUSE session at {shown} ended badly"))
}

fn is_busy(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::EBUSY as i32) || error.kind() == io::ErrorKind::ResourceBusy
}

/// Collects what programs stored through mappings, then detaches the mount under them.
fn force(mounted: &Mounted) -> io::Result<()> {
    let (sender, collected) = mpsc::channel();
    let root = mounted.path().to_path_buf();
    // On a thread of its own: it waits for the kernel, which waits for this daemon.
    let collector = std::thread::Builder::new().name("collect".into());
    let started = collector.spawn(move || sender.send(collect_mapped_pages(&root)));
    match started.map(|_| collected.recv_timeout(COLLECT_PERIOD)) {
        Ok(Ok(Ok(()))) => {}
        _ => tracing::warn!("stores through shared mappings that were not synced may be lost"),
    }
    mounted.unmount(Urgency::Now)
}

/// Writes everything and ends the volume; a signal meanwhile ends the process.
fn finish(volume: &Volume, signals: &Signals) -> Result<(), FsError> {
    let Ok(done) = Alarm::new() else {
        return volume.unmount_blocking();
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            if let Ok(Woken::Signal) = signals.wait(&done, None) {
                eprintln!("a second signal: ending without writing what was not yet made durable");
                std::process::exit(1);
            }
        });
        let outcome = volume.unmount_blocking();
        done.raise();
        outcome
    })
}

/// Pieces of damage that a scrub tells its client; the log has all.
const DAMAGE_TOLD: usize = 10_000;

/// What the control socket shows.
struct Figures {
    started: Instant,
    volume: Volume,
    reactors: Vec<ReactorHandle>,
    controller: Arc<Controller>,
    queues: device::QueueFigures,
    mount: String,
    device: String,
}

impl Figures {
    fn new(device: &Device, volume: &Volume, mount: &Path, spec: &DeviceSpec) -> Self {
        Self {
            started: Instant::now(),
            volume: volume.clone(),
            reactors: device.runtime().handles().to_vec(),
            controller: device.controller().clone(),
            queues: device.queues(),
            mount: mount.display().to_string(),
            device: spec.to_string(),
        }
    }

    fn report(&self) -> Result<DaemonReport, String> {
        let volume = report::of_volume(&self.volume, &self.reactors[0])?;
        Ok(DaemonReport {
            daemon: report::ProcessReport {
                version: env!("CARGO_PKG_VERSION").into(),
                pid: std::process::id(),
                uptime_ns: u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX),
                mount: self.mount.clone(),
                device: self.device.clone(),
            },
            controller: report::of_controller(&self.controller),
            reactors: self.reactors.iter().map(report::of_reactor).collect(),
            queues: self.queues.report(),
            volume,
        })
    }

    fn deduplicate(&self, range: SharedRange) -> Result<Value, String> {
        if range.length == 0 {
            return Err("a range of no bytes".to_owned());
        }
        let request = Request::Deduplicate(CloneRange {
            source: crate::fuse::inode_of(range.source),
            source_offset: FileOffset::new(range.source_offset),
            target: crate::fuse::inode_of(range.target),
            target_offset: FileOffset::new(range.target_offset),
            length: range.length,
        });
        match self.volume.call_blocking(request) {
            Ok(Reply::Deduplicated(shared)) => {
                Ok(json!({ "same": shared.is_some(), "extents": shared.map_or(0, |shared| shared.extents) }))
            }
            Ok(other) => Err(format!("the volume gave a wrong answer: {other:?}")),
            // Deleted, cut off or written to since the client looked; or nonsense.
            Err(error @ (FsError::NotFound | FsError::IsDirectory)) => {
                Ok(json!({ "same": false, "extents": 0, "why": error.to_string() }))
            }
            Err(FsError::Invalid | FsError::FileTooLarge) => {
                let why = "no range of whole blocks that lies within both files";
                Ok(json!({ "same": false, "extents": 0, "why": why }))
            }
            Err(error) => Err(error.to_string()),
        }
    }

    fn sync(&self) -> Result<Value, String> {
        let started = Instant::now();
        let request = Request::Sync { inode: Volume::ROOT, scope: SyncScope::Volume };
        self.volume.call_blocking(request).map_err(|error| error.to_string())?;
        Ok(json!({ "took_ns": u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX) }))
    }
}

impl Figures {
    /// Verifies shard after shard, step by step, as long as the client listens.
    fn scrub(&self, progress: Tell<'_>) -> Result<Value, String> {
        let space = match self.volume.call_blocking(Request::StatFs) {
            Ok(Reply::Space(space)) => space,
            Ok(other) => return Err(format!("the volume gave a wrong answer: {other:?}")),
            Err(error) => return Err(error.to_string()),
        };
        let total = space.blocks - space.free;
        let (mut done, mut damage) = (0, Vec::new());
        for shard in (0..self.volume.shards()).filter_map(ShardId::new) {
            let mut place = Some(ScrubPlace::START);
            while let Some(from) = place {
                let step = match self.volume.call_blocking(Request::Scrub { shard, from }) {
                    Ok(Reply::Scrubbed(step)) => step,
                    Ok(other) => return Err(format!("the volume gave a wrong answer: {other:?}")),
                    Err(error) => return Err(error.to_string()),
                };
                done += step.blocks;
                damage.extend(step.damage);
                damage.truncate(DAMAGE_TOLD);
                place = step.next;
                let told = progress(Progress { done: done.min(total), total });
                told.map_err(|error| format!("the client has gone: {error}"))?;
            }
        }
        Ok(json!({ "blocks": done, "damage": damage }))
    }

    /// Empties groups as long as the client listens.
    fn relocate(&self, scope: RelocateScope, progress: Tell<'_>) -> Result<Value, String> {
        let report =
            self.volume.relocate_blocking(scope, telling(progress)).map_err(|error| error.to_string())?;
        serde_json::to_value(report).map_err(|error| format!("cannot write JSON: {error}"))
    }

    fn grow(&self, to: Option<u64>) -> Result<Value, String> {
        let report = self.volume.grow_blocking(to).map_err(|error| error.to_string())?;
        serde_json::to_value(report).map_err(|error| format!("cannot write JSON: {error}"))
    }

    /// Makes the volume smaller, unless the client goes away before.
    fn shrink(&self, to: u64, progress: Tell<'_>) -> Result<Value, String> {
        let report = self.volume.shrink_blocking(to, telling(progress)).map_err(|error| error.to_string())?;
        serde_json::to_value(report).map_err(|error| format!("cannot write JSON: {error}"))
    }
}

/// Tells a client how far a relocation is, as long as it listens.
fn telling(progress: Tell<'_>) -> impl FnMut(RelocateProgress) -> ControlFlow<()> {
    move |now| match progress(Progress { done: now.blocks_done.min(now.blocks), total: now.blocks }) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    }
}

impl Handler for Figures {
    fn handle(&self, command: Command, progress: Tell<'_>) -> Result<Value, String> {
        match command {
            Command::Status => {
                serde_json::to_value(self.report()?).map_err(|error| format!("cannot write JSON: {error}"))
            }
            Command::Sync => self.sync(),
            Command::Scrub => self.scrub(progress),
            Command::Relocate(scope) => self.relocate(scope, progress),
            Command::Grow(to) => self.grow(to),
            Command::Shrink(to) => self.shrink(to, progress),
            Command::Dedupe(range) => self.deduplicate(range),
        }
    }
}
