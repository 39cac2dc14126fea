//! What a controller is made of: every knob, its default and its limits.

use std::path::PathBuf;
use std::time::Duration;

use nvme_spec::identify::Oncs;

use crate::error::EmulatorError;
use crate::latency::{LatencyModel, MAX_LATENCY};

/// Largest number of I/O queue pairs.
pub const MAX_IO_QUEUES: u16 = 256;
/// Largest number of namespaces.
pub const MAX_NAMESPACES: usize = 1024;
/// Largest namespace identifier.
pub const MAX_NSID: u32 = 0xffff;
/// Largest number of worker threads.
pub const MAX_WORKERS: u16 = 16;
/// Largest CAP.DSTRD: stride of 4 KiB.
pub const MAX_DSTRD: u8 = 10;
/// Largest metadata of a block in bytes.
pub const MAX_METADATA: u16 = 128;
/// Largest namespace in bytes: 8 EiB less one, the largest file offset.
pub const MAX_NAMESPACE_BYTES: u64 = i64::MAX as u64;
/// Logical block size of an image that is opened without one, if its length allows.
pub const DEFAULT_LBA_SIZE: u32 = 4096;

/// Optional commands that the controller can serve.
pub const SUPPORTED_ONCS: Oncs = Oncs::COMPARE
    .union(Oncs::DATASET_MANAGEMENT)
    .union(Oncs::WRITE_ZEROES)
    .union(Oncs::FEATURE_SAVE)
    .union(Oncs::TIMESTAMP)
    .union(Oncs::VERIFY)
    .union(Oncs::COPY);

/// How commands are executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A doorbell write executes what it announces before it returns, on the caller's thread. Deterministic.
    Inline,
    /// Doorbell writes only note the tail; [`step`](crate::EmulatedController::step) executes one arbitration round.
    /// For tests that need commands to wait.
    Stepped,
    /// The controller's own threads execute commands and carry out resets.
    Threaded(ThreadOptions),
}

/// The controller's own threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadOptions {
    /// Number of threads, 1 to [`MAX_WORKERS`]. Queue `q` is served by thread `q % workers`, so that with more than one
    /// a slow flush of one queue need not hold up another.
    pub workers: u16,
    /// How long an idle thread looks for work before it sleeps.
    pub spin: Duration,
}

impl Default for ThreadOptions {
    fn default() -> Self {
        Self { workers: 1, spin: Duration::from_micros(20) }
    }
}

/// Where a volatile write cache lies, if there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteCache {
    /// None: a completed write is durable. Each write to an image is synchronous.
    Absent,
    /// The host's page cache: a completed write survives the death of the process, and that of the host once flushed.
    Host,
    /// Modelled: a [`power_cut`](crate::EmulatedController::power_cut) decides what becomes of unflushed writes. Writes
    /// of all queues to one namespace take turns.
    Modelled {
        /// Bytes of unflushed writes that the cache holds before it writes the oldest back by itself.
        capacity: u64,
    },
}

impl WriteCache {
    /// A modelled cache of 256 MiB.
    pub const MODELLED: Self = Self::Modelled { capacity: 256 << 20 };
}

/// Fused operations that are offered (Identify Controller, FUSES).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FusedOperations {
    /// None.
    Absent,
    /// Compare and write.
    CompareAndWrite,
}

/// Whether the host may keep doorbells in memory (§5.7, §7.13).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShadowDoorbells {
    /// It must write registers.
    Absent,
    /// It may, for I/O queues.
    Offered,
}

/// SGLs for the data of I/O commands (Identify Controller, SGLS).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SglSupport {
    /// PRPs only.
    Absent,
    /// Any address and length.
    Byte,
    /// Addresses and lengths of data blocks in whole dwords.
    Dword,
}

/// What to do if an image does or does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CreateMode {
    /// It must exist.
    OpenExisting,
    /// Opened if it exists (its length must be the size given, if one is), else created with the size given.
    OpenOrCreate,
    /// It must not exist.
    CreateNew,
}

/// Where a namespace's bytes rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Memory of this process, allocated as it is written.
    Memory,
    /// A sparse file.
    File {
        /// The image.
        path: PathBuf,
        /// What to do if it does or does not exist.
        create: CreateMode,
    },
}

/// One namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceConfig {
    /// Its identifier, 1 to [`MAX_NSID`]. Gaps are allowed.
    pub nsid: u32,
    /// Bytes of a logical block: 512, 1024, 2048 or 4096. Left out: 4096, or 512 if an image's length demands it.
    pub lba_size: Option<u32>,
    /// Bytes. Needed for memory and to create an image.
    pub size_bytes: Option<u64>,
    /// Where its bytes rest.
    pub backing: Backing,
    /// Metadata bytes of each block. With metadata, a namespace is described but its data cannot be read or written:
    /// such commands get Invalid Namespace or Format. At most 128.
    pub metadata: u16,
    /// NOIOB: blocks of the optimal I/O boundary that is reported; 0 for none. Nothing depends on it.
    pub optimal_boundary: u16,
}

impl NamespaceConfig {
    /// Namespace 1 of `size_bytes` bytes in memory.
    pub fn memory(size_bytes: u64) -> Self {
        Self::new(Some(size_bytes), Backing::Memory)
    }

    /// Namespace 1 in the existing image `path`.
    pub fn image(path: impl Into<PathBuf>) -> Self {
        let backing = Backing::File { path: path.into(), create: CreateMode::OpenExisting };
        Self::new(None, backing)
    }

    /// Namespace 1 over `backing`, of `size_bytes` bytes where that must be said.
    pub fn new(size_bytes: Option<u64>, backing: Backing) -> Self {
        Self { nsid: 1, lba_size: None, size_bytes, backing, metadata: 0, optimal_boundary: 0 }
    }

    /// With the namespace identifier `nsid`.
    #[must_use]
    pub fn with_nsid(mut self, nsid: u32) -> Self {
        self.nsid = nsid;
        self
    }

    /// With `metadata` bytes of metadata for each block.
    #[must_use]
    pub fn with_metadata(mut self, metadata: u16) -> Self {
        self.metadata = metadata;
        self
    }

    /// With an optimal I/O boundary of `blocks` blocks.
    #[must_use]
    pub fn with_optimal_boundary(mut self, blocks: u16) -> Self {
        self.optimal_boundary = blocks;
        self
    }

    /// With logical blocks of `lba_size` bytes.
    #[must_use]
    pub fn with_lba_size(mut self, lba_size: u32) -> Self {
        self.lba_size = Some(lba_size);
        self
    }

    /// Checks every field against its limits.
    ///
    /// # Errors
    /// [`EmulatorError::Config`] naming the field.
    pub fn validate(&self) -> Result<(), EmulatorError> {
        let nsid = self.nsid;
        check(
            (1..=MAX_NSID).contains(&nsid),
            format!("namespace identifier {nsid}, must be 1 to {MAX_NSID}"),
        )?;
        if let Some(lba) = self.lba_size {
            check(
                lba.is_power_of_two() && (512..=4096).contains(&lba),
                format!("namespace {nsid}: lba size {lba}, must be 512, 1024, 2048 or 4096"),
            )?;
        }
        if let Some(bytes) = self.size_bytes {
            let lba = u64::from(self.lba_size.unwrap_or(512));
            check(
                bytes > 0 && bytes <= MAX_NAMESPACE_BYTES && bytes.is_multiple_of(lba),
                format!("namespace {nsid}: size {bytes} is not a whole number of {lba}-byte blocks"),
            )?;
        }
        check(
            self.metadata <= MAX_METADATA,
            format!(
                "namespace {nsid}: {} bytes of metadata, at most {MAX_METADATA} are possible",
                self.metadata
            ),
        )?;
        check(
            self.size_bytes.is_some() || self.backing != Backing::Memory,
            format!("namespace {nsid}: memory needs a size"),
        )
    }
}

/// A controller. Start from [`Default`] and change what matters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControllerConfig {
    /// The namespaces, in any order.
    pub namespaces: Vec<NamespaceConfig>,
    /// I/O queue pairs, 1 to [`MAX_IO_QUEUES`]; there is one interrupt vector for each and one for the admin queue.
    pub io_queues: u16,
    /// CAP.MQES: entries of the largest I/O queue less one, at least 1.
    pub mqes_z: u16,
    /// MDTS: transfers are limited to `4096 << mdts` bytes, at most 16; 0 means no limit.
    pub mdts: u8,
    /// CAP.DSTRD: doorbells are `4 << dstrd` bytes apart.
    pub dstrd: u8,
    /// CAP.MPSMAX: memory pages may be up to `4096 << mpsmax` bytes, at most 4 (64 KiB).
    pub mpsmax: u8,
    /// CAP.TO in units of 500 ms.
    pub to: u8,
    /// Asynchronous event requests held at once, less one.
    pub aerl_z: u8,
    /// Optional commands to offer, of [`SUPPORTED_ONCS`].
    pub oncs: Oncs,
    /// CAP.MPSMIN: memory pages are at least `4096 << mpsmin` bytes, at most `mpsmax`. The unit of MDTS.
    pub mpsmin: u8,
    /// SGLs for I/O commands.
    pub sgls: SglSupport,
    /// Fused operations. Compare-and-write needs the Compare command in [`oncs`](Self::oncs).
    pub fused: FusedOperations,
    /// Shadow doorbells (Doorbell Buffer Config).
    pub shadow_doorbells: ShadowDoorbells,
    /// The volatile write cache.
    pub write_cache: WriteCache,
    /// Serial number, at most 20 printable ASCII characters.
    pub serial: String,
    /// Model, at most 40 printable ASCII characters.
    pub model: String,
    /// How commands are executed.
    pub mode: Mode,
    /// How long I/O commands take, beyond what executing them does. Not with [`Mode::Inline`], where nothing could complete
    /// them later.
    pub latency: Option<LatencyModel>,
}

impl Default for ControllerConfig {
    fn default() -> Self {
        Self {
            namespaces: Vec::new(),
            io_queues: 16,
            mqes_z: 1023,
            mdts: 8,
            dstrd: 0,
            mpsmax: 4,
            to: 20,
            aerl_z: 3,
            oncs: SUPPORTED_ONCS,
            mpsmin: 0,
            sgls: SglSupport::Byte,
            fused: FusedOperations::CompareAndWrite,
            shadow_doorbells: ShadowDoorbells::Absent,
            write_cache: WriteCache::Host,
            serial: "POLLUX-EMU-0001".into(),
            model: "Pollux embedded NVMe controller".into(),
            mode: Mode::Inline,
            latency: None,
        }
    }
}

impl ControllerConfig {
    /// A controller with one namespace and defaults for the rest.
    pub fn with_namespace(namespace: NamespaceConfig) -> Self {
        Self { namespaces: vec![namespace], ..Self::default() }
    }

    /// Checks every field against its limits.
    ///
    /// # Errors
    /// [`EmulatorError::Config`] naming the field.
    pub fn validate(&self) -> Result<(), EmulatorError> {
        check(
            (1..=MAX_IO_QUEUES).contains(&self.io_queues),
            format!("io_queues is {}, must be 1 to {MAX_IO_QUEUES}", self.io_queues),
        )?;
        check(self.mqes_z >= 1, format!("mqes_z is {}, must be at least 1", self.mqes_z))?;
        check(self.mdts <= 16, format!("mdts is {}, must be at most 16", self.mdts))?;
        check(self.dstrd <= MAX_DSTRD, format!("dstrd is {}, must be at most {MAX_DSTRD}", self.dstrd))?;
        check(self.mpsmax <= 4, format!("mpsmax is {}, must be at most 4", self.mpsmax))?;
        check(
            self.mpsmin <= self.mpsmax,
            format!("mpsmin is {}, must be at most mpsmax, {}", self.mpsmin, self.mpsmax),
        )?;
        check(
            SUPPORTED_ONCS.contains(self.oncs),
            format!("oncs {:#x} has commands that the controller does not serve", self.oncs.bits()),
        )?;
        for (name, text, limit) in [("serial", &self.serial, 20), ("model", &self.model, 40)] {
            check(
                text.len() <= limit && text.bytes().all(|b| (b' '..=b'~').contains(&b)),
                format!("{name} {text:?} must be at most {limit} printable ASCII characters"),
            )?;
        }
        if let Mode::Threaded(options) = self.mode {
            check(
                (1..=MAX_WORKERS).contains(&options.workers),
                format!("workers is {}, must be 1 to {MAX_WORKERS}", options.workers),
            )?;
        }
        if let Some(model) = &self.latency {
            check(
                self.mode != Mode::Inline,
                "a latency model needs threads or steps; inline, commands complete in the doorbell write"
                    .into(),
            )?;
            check(
                model.jitter_percent <= 100
                    && model.iops_limit != Some(0)
                    && [model.read, model.write, model.flush].iter().all(|latency| *latency <= MAX_LATENCY),
                format!(
                    "latency model {model:?}: at most {MAX_LATENCY:?}, 100 percent, and not 0 commands a second"
                ),
            )?;
        }
        self.validate_namespaces()
    }

    fn validate_namespaces(&self) -> Result<(), EmulatorError> {
        let count = self.namespaces.len();
        check(count <= MAX_NAMESPACES, format!("{count} namespaces, at most {MAX_NAMESPACES} are possible"))?;
        for (i, namespace) in self.namespaces.iter().enumerate() {
            let nsid = namespace.nsid;
            namespace.validate()?;
            let twice = self.namespaces[..i].iter().any(|other| other.nsid == nsid);
            check(!twice, format!("namespace {nsid} is given twice"))?;
        }
        Ok(())
    }
}

fn check(good: bool, message: String) -> Result<(), EmulatorError> {
    if good { Ok(()) } else { Err(EmulatorError::Config(message)) }
}
