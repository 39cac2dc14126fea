//! Devices as the tools use them: from a spec on the command line to reactors with a queue each.
//!
//! Owns: [`Device`] (a controller and the reactors on its queues), one-reactor runs for offline tools
//! ([`on_one_reactor`]), and the words in which device errors reach a user.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use fs_core::MountError;
use fs_core::disk::VolumeDisk;
use fs_core::format::group::LayoutError;
use fs_core::mkfs::{self, Force, FormatError, FormatOptions, FormatReport, Owner};
use fs_core::superblock::SuperblockError;
use nvme::stats::{Latencies, LatencyClass, LatencySnapshot, QueueCounters};
use nvme::{Controller, QueueOptions, QueuePair};
use nvme_spec::identify::{IdentifyController, IdentifyNamespace};
use reactor::block::BlockDevice;
use reactor::{Clock, Context, CoreId, Options, ReactorConfig, ReactorId, Runtime, SystemClock};

use crate::failure::{During, Failure};
use crate::quantity::show_size;
use crate::report::{LatencyReport, QueueReport};
use crate::scratch::{self, Marker};
use nvme::spec_string::{EmulatedBacking, EmulatedSpec, Target, namespace_path};

pub use nvme::spec_string::{DeviceSpec, parse_size};

/// Reactors started if nobody says how many.
const DEFAULT_CORES: usize = 8;

/// Shards of a new volume if nobody says how many: for each core, at most, and bytes of the device for each.
const SHARDS_PER_CORE: usize = 2;
const DEFAULT_SHARD_LIMIT: u8 = 16;
const DEFAULT_SHARD_BYTES: u64 = 64 << 20;

/// Parses a device spec of the command line.
///
/// # Errors
/// What is wrong with it, where, and what is possible.
pub fn parse(text: &str) -> Result<DeviceSpec, String> {
    text.parse::<DeviceSpec>().map_err(|error| error.to_string())
}

/// The cores that reactors run on if nobody says which.
pub fn default_cores() -> Vec<usize> {
    let mut cores: Vec<usize> = CoreId::available().into_iter().map(CoreId::get).collect();
    cores.truncate(DEFAULT_CORES);
    if cores.is_empty() { vec![0] } else { cores }
}

/// A controller in use, with one reactor for each of its queues.
pub struct Device {
    controller: Arc<Controller>,
    runtime: Option<Runtime>,
    queues: QueueFigures,
    name: String,
}

impl Device {
    /// Opens the device and starts a reactor on each of `cores`.
    ///
    /// # Errors
    /// The device cannot be opened, or has too few queues.
    pub fn start(
        spec: &DeviceSpec,
        cores: &[usize],
        config: ReactorConfig,
        queue: QueueOptions,
    ) -> Result<Self, Failure> {
        Self::over(open(spec)?, &spec.to_string(), cores, config, queue)
    }

    /// Starts a reactor on each of `cores` over a controller that is up, and called `name` in messages.
    ///
    /// # Errors
    /// It has too few queues.
    pub fn over(
        controller: Arc<Controller>,
        name: &str,
        cores: &[usize],
        config: ReactorConfig,
        queue: QueueOptions,
    ) -> Result<Self, Failure> {
        let name = name.to_owned();
        let queues = QueueFigures::default();
        let options = Options {
            cores: cores.iter().copied().map(CoreId::new).collect(),
            config,
            clock: Arc::new(SystemClock::new()),
            seed: seed(),
        };
        let (opened, figures) = (controller.clone(), queues.clone());
        let device = move |reactor| {
            let queue = opened.create_queue(&queue)?;
            figures.note(reactor, &queue);
            Ok::<_, nvme::QueueError>(Some(Box::new(queue) as Box<dyn BlockDevice>))
        };
        let runtime = Runtime::start(options, device).map_err(|error| {
            Failure::new(format!("cannot use {name}: {error}"))
                .remedy("name fewer cores with --cores, or more queues in the device spec: ,queues=N")
        })?;
        Ok(Self { controller, runtime: Some(runtime), queues, name })
    }

    /// The reactors.
    pub fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().expect("taken only by stop, which consumes self")
    }

    /// The controller.
    pub fn controller(&self) -> &Arc<Controller> {
        &self.controller
    }

    /// Figures of the queues.
    pub fn queues(&self) -> QueueFigures {
        self.queues.clone()
    }

    /// Stops the reactors and shuts the controller down.
    ///
    /// # Errors
    /// A reactor or the controller did not end as it should.
    pub fn stop(mut self) -> Result<(), Failure> {
        let stopped = match self.runtime.take() {
            Some(runtime) => runtime.stop().during(format_args!("the reactors of {} ended badly", self.name)),
            None => Ok(()),
        };
        let shut = self.controller.shutdown().during(format_args!("{} did not shut down", self.name));
        stopped.and(shut)
    }
}

fn seed() -> u64 {
    // Randomness of reactors spreads load; nothing secret hangs on it.
    SystemClock::new().wall().subsec_nanos().into()
}

/// Opens the device and brings its controller up.
///
/// # Errors
/// Why it cannot be opened, and what to do.
pub fn open(spec: &DeviceSpec) -> Result<Arc<Controller>, Failure> {
    nvme::open(spec, nvme::OpenOptions::default()).map_err(|error| {
        let failure = Failure::new(format!("cannot open the device: {error}"));
        match files(spec).first() {
            Some(path) if !path.exists() => {
                failure.remedy(format!("to create it, add a size: emu:{},size=4GiB", path.display()))
            }
            _ => failure,
        }
    })
}

/// Runs `task` on a reactor of this thread, with a queue of the device, and shuts the device down.
///
/// # Errors
/// The device cannot be opened or does not shut down.
pub fn on_one_reactor<T, F, Fut>(spec: &DeviceSpec, task: F) -> Result<T, Failure>
where
    F: FnOnce(Context) -> Fut,
    Fut: Future<Output = T>,
{
    over_one_reactor(&open(spec)?, spec, task)
}

/// As [`on_one_reactor`], over a controller that is up.
///
/// # Errors
/// It gives no queue, or does not shut down.
pub(crate) fn over_one_reactor<T, F, Fut>(
    controller: &Arc<Controller>,
    spec: &DeviceSpec,
    task: F,
) -> Result<T, Failure>
where
    F: FnOnce(Context) -> Fut,
    Fut: Future<Output = T>,
{
    let queue =
        controller.create_queue(&QueueOptions::default()).during(format_args!("cannot use {spec}"))?;
    let outcome = reactor::block_on(Some(Box::new(queue)), Arc::new(SystemClock::new()), seed(), task);
    controller.shutdown().during(format_args!("{spec} did not shut down"))?;
    Ok(outcome)
}

/// What a controller and its namespaces say about themselves.
pub struct Identity {
    /// Identify Controller data.
    pub controller: Box<IdentifyController>,
    /// Bytes of the smallest memory page, CAP.MPSMIN: the unit of MDTS.
    pub smallest_page: u64,
    /// The active namespaces.
    pub namespaces: Vec<NamespaceIdentity>,
}

/// What one namespace says about itself.
pub struct NamespaceIdentity {
    /// Its identifier.
    pub nsid: u32,
    /// Identify Namespace data.
    pub data: Box<IdentifyNamespace>,
    /// Why it cannot be used.
    pub problem: Option<String>,
}

/// Asks the device what it is.
///
/// # Errors
/// It cannot be opened.
pub fn identify(spec: &DeviceSpec) -> Result<Identity, Failure> {
    let controller = open(spec)?;
    let info = controller.info();
    let identity = Identity {
        controller: info.raw.clone(),
        smallest_page: 4096 << info.cap.mpsmin(),
        namespaces: controller
            .namespaces()
            .iter()
            .map(|entry| NamespaceIdentity {
                nsid: entry.nsid.get(),
                data: entry.raw.clone(),
                problem: entry.checked.as_ref().err().map(ToString::to_string),
            })
            .collect(),
    };
    controller.shutdown().during(format_args!("{spec} did not shut down"))?;
    Ok(identity)
}

/// How a volume is made.
#[derive(Clone, Debug)]
pub struct Formatting {
    /// Number of shards; by cores and size of the device if `None`.
    pub shards: Option<u8>,
    /// Name of the volume.
    pub label: String,
    /// Whether to overwrite what is there.
    pub force: Force,
}

/// A volume that was made.
pub struct Formatted {
    /// What was made.
    pub report: FormatReport,
    /// The scratch marker that was on the device and is there again.
    pub scratch: Option<Marker>,
}

/// Makes an empty volume. If that fails, a file that was created for it is removed. A scratch marker stays.
///
/// # Errors
/// Says why not, and what to do.
pub fn format(spec: &DeviceSpec, formatting: &Formatting) -> Result<Formatted, Failure> {
    let format = |ctx: Context| async move {
        let bytes = ctx.disk().geometry().size_bytes();
        let shards = formatting.shards.unwrap_or_else(|| default_shards(bytes, default_cores().len()));
        let label = formatting.label.clone();
        let disk = VolumeDisk::new(ctx.disk().clone())?;
        let scratch = scratch::read_on(&disk).await?;
        // An ordinary user could not create the first file in a directory of root's.
        let owner = Owner { uid: nix::unistd::geteuid().as_raw(), gid: nix::unistd::getegid().as_raw() };
        let options = FormatOptions { shards, label, force: formatting.force, owner };
        let report = mkfs::format(&ctx, &options).await?;
        if let Some(marker) = &scratch {
            scratch::renew_on(&disk, marker).await?;
        }
        Ok(Formatted { report, scratch })
    };
    let created: Vec<PathBuf> = files(spec).into_iter().filter(|path| !path.exists()).collect();
    let formatted =
        on_one_reactor(spec, format).and_then(|made| made.map_err(|error| format_failure(&error)));
    if formatted.is_err() {
        // A file that this call has made holds nothing; it may not even have come to that.
        created.iter().for_each(|path| drop(std::fs::remove_file(path)));
    }
    formatted
}

/// The files that a device lives in.
fn files(spec: &DeviceSpec) -> Vec<PathBuf> {
    let Target::Emulated(EmulatedSpec { backing: EmulatedBacking::File(first), more_namespaces, .. }) =
        &spec.target
    else {
        return Vec::new();
    };
    let more = more_namespaces.iter().map(|(nsid, _)| namespace_path(first, *nsid));
    std::iter::once(first.clone()).chain(more).collect()
}

/// A small multiple of the cores, as far as each shard gets a reasonable share of the device.
fn default_shards(bytes: u64, cores: usize) -> u8 {
    let by_cores = u8::try_from(cores.saturating_mul(SHARDS_PER_CORE)).unwrap_or(DEFAULT_SHARD_LIMIT);
    let by_size = u8::try_from(bytes / DEFAULT_SHARD_BYTES).unwrap_or(DEFAULT_SHARD_LIMIT);
    by_cores.min(by_size).clamp(1, DEFAULT_SHARD_LIMIT)
}

fn format_failure(error: &FormatError) -> Failure {
    let failure = Failure::new(format!("cannot format: {error}"));
    match error {
        FormatError::Layout { device, error: LayoutError::TooSmall { shards, needed, available } } => {
            let (needed, available) = (show_size(*needed), show_size(*available));
            Failure::new(format!("cannot format {device}: it has {available}, {shards} shards need {needed}"))
                .remedy("use a larger device, or fewer shards: --shards N")
        }
        FormatError::Occupied { .. } => failure.remedy("if its contents may be lost: pollux mkfs --force"),
        FormatError::Layout { .. } => {
            failure.remedy("use a device of another size, or other shards: --shards N")
        }
        _ => failure,
    }
}

/// Says why a volume cannot be mounted or checked.
pub fn mount_failure(spec: &DeviceSpec, error: &MountError) -> Failure {
    match error {
        MountError::Superblock(error) => superblock_failure(spec, error),
        _ => Failure::new(format!("cannot mount {spec}: {error}")),
    }
}

/// Says why a superblock cannot be used.
pub fn superblock_failure(spec: &DeviceSpec, error: &SuperblockError) -> Failure {
    match error {
        SuperblockError::NotPollux { .. } => Failure::new(format!("{spec} is not a Pollux volume"))
            .remedy(format!("to make it one, losing its contents: pollux mkfs --force --device {spec}")),
        SuperblockError::AllDamaged { .. } => Failure::new(error.to_string())
            .remedy("nothing was changed; restore the superblock or the device from a copy"),
        _ => Failure::new(error.to_string()),
    }
}

/// The spec of an image file. With `size` it is created if it is missing.
///
/// # Errors
/// The path cannot be part of a spec.
pub fn image(path: &Path, size: Option<u64>) -> Result<DeviceSpec, Failure> {
    let text = path.to_str().filter(|text| !text.contains(','));
    let text = text.ok_or_else(|| {
        Failure::usage(format!("image {}: the path has a comma in it, or is no UTF-8", path.display()))
            .remedy("name it otherwise")
    })?;
    let size = size.map(|size| format!(",size={size}")).unwrap_or_default();
    parse(&format!("emu:{text}{size}")).map_err(Failure::usage)
}

/// Whether the device lives in this process's memory: nothing on it outlasts the process.
pub fn is_memory(spec: &DeviceSpec) -> bool {
    matches!(&spec.target, Target::Emulated(EmulatedSpec { backing: EmulatedBacking::Memory, .. }))
}

/// Counters of the queues of a device, readable while it is in use.
#[derive(Clone, Default)]
pub struct QueueFigures {
    queues: Arc<Mutex<Vec<QueueHandle>>>,
}

struct QueueHandle {
    reactor: ReactorId,
    queue: u16,
    counters: Arc<QueueCounters>,
    latencies: Option<Arc<Latencies>>,
}

impl QueueFigures {
    fn note(&self, reactor: ReactorId, queue: &QueuePair) {
        let handle = QueueHandle {
            reactor,
            queue: queue.id().get(),
            counters: queue.counters(),
            latencies: queue.latencies(),
        };
        self.lock().push(handle);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<QueueHandle>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The figures now, by queue.
    pub fn report(&self) -> Vec<QueueReport> {
        let mut reports: Vec<QueueReport> = self.lock().iter().map(QueueHandle::report).collect();
        reports.sort_by_key(|report| report.queue);
        reports
    }
}

impl QueueHandle {
    fn report(&self) -> QueueReport {
        let counts = self.counters.read();
        let class = |class| match &self.latencies {
            Some(latencies) => latency(&latencies.class(class).snapshot()),
            None => LatencyReport::default(),
        };
        QueueReport {
            queue: self.queue,
            reactor: self.reactor.get(),
            requests: counts.requests,
            completed: counts.completed,
            errors: counts.errors,
            commands: counts.commands,
            read_bytes: counts.bytes_read,
            written_bytes: counts.bytes_written,
            doorbells: counts.doorbells,
            retried: counts.retried,
            timeouts: counts.timeouts,
            read_lat_ns: class(LatencyClass::Read),
            write_lat_ns: class(LatencyClass::Write),
            other_lat_ns: class(LatencyClass::Other),
        }
    }
}

fn latency(snapshot: &LatencySnapshot) -> LatencyReport {
    LatencyReport {
        samples: snapshot.count(),
        min: snapshot.quantile_ns(0.0),
        mean: snapshot.mean_ns(),
        p50: snapshot.quantile_ns(0.5),
        p99: snapshot.quantile_ns(0.99),
        p999: snapshot.quantile_ns(0.999),
        max: snapshot.quantile_ns(1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_follow_cores_and_size() {
        assert_eq!(default_shards(4 << 30, 2), 4);
        assert_eq!(default_shards(128 << 20, 2), 2);
        assert_eq!(default_shards(32 << 20, 8), 1);
        assert_eq!(default_shards(1 << 50, 64), 16);
    }

    #[test]
    fn image_path_with_a_comma_is_refused() {
        assert!(image(Path::new("a,b.img"), None).is_err());
        assert!(!is_memory(&image(Path::new("a.img"), Some(1 << 30)).unwrap()));
        assert!(is_memory(&parse("emu:mem,size=1GiB").unwrap()));
    }
}
