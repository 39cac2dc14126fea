//! Device specs, the `--device` argument of every tool: [`DeviceSpec`] and its parser.
//!
//! ```text
//! emu:PATH[,size=4GiB][,lba=512|4096][,mode=inline|threaded][,mdts=N][,latency=80us][,iops=400000][,queues=N][,ns=ID]
//!         [,sgls=on|dword|off][,shadow=on|off][,cache=on|off][,mpsmin=4KiB..64KiB][,dstrd=N][,meta=BYTES][,nsID=SIZE]…
//! emu:mem,size=1GiB[,…]
//! pci:0000:01:00.0[,queues=N][,ns=ID]
//! vfio-user:/run/x/cntrl[,queues=N][,ns=ID]
//! qtest:DIR[,queues=N][,ns=ID]
//! ```
//!
//! Invariants: parsing touches nothing outside the string; what parses is displayed so that it parses to the same again; every
//! error says what is wrong, where, and what to write instead.
//!
//! Parts: the options (`options`).
//!
//! Excludes: opening the device. A path cannot hold a comma: there it ends.

mod options;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use nvme_emulator::{SglSupport, ShadowDoorbells, WriteCache};
use nvme_spec::NamespaceId;
use thiserror::Error;

use crate::pci::{PciAddress, PciAddressError};
pub use options::parse_size;
use options::{Options, Size};

/// Largest device size that a spec can name: sizes stay within a file offset.
pub const MAX_SIZE: u64 = i64::MAX as u64;
/// Longest latency of an embedded controller that a spec can ask for.
pub const MAX_LATENCY: Duration = Duration::from_secs(10);
/// Highest rate of commands that a spec can limit an embedded controller to.
pub const MAX_IOPS: u32 = 100_000_000;
/// Queue pairs that a spec can ask for at most (NVMe 1.4 §5.21.1.7).
pub const MAX_QUEUES: u16 = u16::MAX - 1;

/// A device and how to open it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSpec {
    /// Where it is.
    pub target: Target,
    /// I/O queue pairs to ask for; the driver's default if `None`.
    pub queues: Option<u16>,
    /// Namespace; the lowest active one if `None`.
    pub namespace: Option<NamespaceId>,
}

/// Where a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Target {
    /// The embedded controller.
    Emulated(EmulatedSpec),
    /// A controller bound to vfio-pci.
    Pci(PciAddress),
    /// A controller served over a vfio-user socket.
    VfioUser(PathBuf),
    /// The controller of a QEMU without a guest, by the directory with its socket and RAM file. For development.
    Qtest(PathBuf),
}

/// The embedded controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmulatedSpec {
    /// What it stores to.
    pub backing: EmulatedBacking,
    /// Bytes of its namespace. Required in memory; for a file, the size that it is created with or must have.
    pub size: Option<u64>,
    /// Bytes of a logical block; what suits the backing if `None`.
    pub lba: Option<LbaSize>,
    /// Who executes commands; what suits the backing if `None`.
    pub mode: Option<EmulatedMode>,
    /// Identify Controller's MDTS; the emulator's default if `None`.
    pub mdts: Option<u8>,
    /// How long each I/O command takes, whole microseconds; as fast as it goes if `None`. Threads are needed for it, and used
    /// unless `mode` says otherwise.
    pub latency: Option<Duration>,
    /// Most commands begun in a second, over all queues; only with a latency.
    pub iops: Option<u32>,
    /// SGLs; the emulator's default if `None`, as for all that follows.
    pub sgls: Option<SglSupport>,
    /// Shadow doorbells.
    pub shadow: Option<ShadowDoorbells>,
    /// The volatile write cache: `Host` (on) or `Absent` (off).
    pub cache: Option<WriteCache>,
    /// CAP.MPSMIN: memory pages have at least `4096 << mpsmin` bytes.
    pub mpsmin: Option<u8>,
    /// CAP.DSTRD: doorbells are `4 << dstrd` bytes apart.
    pub dstrd: Option<u8>,
    /// Metadata bytes of each block, of all namespaces. What has metadata is described, but refuses its data.
    pub metadata: Option<u16>,
    /// Namespaces beside the first and their bytes, by identifier. Of a file each is a file of its own: see
    /// [`namespace_path`].
    pub more_namespaces: Vec<(NamespaceId, u64)>,
}

/// The file of the namespace `nsid`, not the first, of a controller whose first one is in `first`.
pub fn namespace_path(first: &Path, nsid: NamespaceId) -> PathBuf {
    let mut path = first.as_os_str().to_owned();
    path.push(format!(".ns{nsid}"));
    path.into()
}

/// What an embedded controller stores to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EmulatedBacking {
    /// Memory, lost with the process.
    Memory,
    /// A sparse file.
    File(PathBuf),
}

/// Logical block sizes of the embedded controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LbaSize {
    /// 512 bytes.
    B512,
    /// 4096 bytes.
    B4096,
}

impl LbaSize {
    /// Bytes of a block.
    pub const fn bytes(self) -> u32 {
        match self {
            LbaSize::B512 => 512,
            LbaSize::B4096 => 4096,
        }
    }
}

/// Who executes the embedded controller's commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmulatedMode {
    /// The thread that rings the doorbell.
    Inline,
    /// A thread of the controller.
    Threaded,
}

/// What is wrong with a device spec.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("device spec `{spec}`: {problem}")]
pub struct SpecError {
    /// The spec as it was given.
    pub spec: String,
    /// What is wrong, and what to write.
    pub problem: SpecProblem,
}

/// What is wrong with a part of a device spec.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SpecProblem {
    /// No scheme, or an unknown one.
    #[error("it must begin with `emu:`, `pci:` or `vfio-user:`, as in `emu:disk.img,size=4GiB`")]
    Scheme,
    /// Nothing after the scheme.
    #[error("nothing follows `{scheme}:`; write {example}")]
    NoTarget {
        /// The scheme.
        scheme: &'static str,
        /// What could follow.
        example: &'static str,
    },
    /// An option that the scheme does not have.
    #[error("`{key}` is not an option of `{scheme}:` devices; those are {known}")]
    UnknownOption {
        /// The option.
        key: String,
        /// The scheme.
        scheme: &'static str,
        /// What could be written.
        known: &'static str,
    },
    /// An option without a value.
    #[error("`{0}` is not of the form `option=value`")]
    NotAnOption(String),
    /// An option given twice.
    #[error("`{0}` is given twice")]
    Twice(String),
    /// A value that does not fit.
    #[error("`{key}={value}`: {expected}")]
    Value {
        /// The option.
        key: String,
        /// Its value.
        value: String,
        /// What is expected.
        expected: String,
    },
    /// A memory device without a size.
    #[error("a device in memory needs a size; write `emu:mem,size=1GiB`")]
    MemoryWithoutSize,
    /// A latency without threads.
    #[error("`latency` needs `mode=threaded`: inline, commands complete in the call that submits them")]
    LatencyInline,
    /// A rate without a latency.
    #[error("`iops` needs `latency`, such as `latency=80us,iops=400000`")]
    IopsAlone,
    /// A size that is no whole number of blocks.
    #[error("`{key}={size}` is not a multiple of the block size of {lba} bytes")]
    SizeNotOfBlocks {
        /// The option.
        key: String,
        /// Bytes.
        size: u64,
        /// Bytes of a block.
        lba: u32,
    },
    /// Not a PCI address.
    #[error("{0}; `pollux list` shows those there are")]
    PciAddress(#[from] PciAddressError),
}

impl FromStr for DeviceSpec {
    type Err = SpecError;

    fn from_str(spec: &str) -> Result<Self, SpecError> {
        parse(spec).map_err(|problem| SpecError { spec: spec.to_owned(), problem })
    }
}

fn parse(spec: &str) -> Result<DeviceSpec, SpecProblem> {
    let (scheme, rest) = spec.split_once(':').ok_or(SpecProblem::Scheme)?;
    let mut parts = rest.split(',');
    let target = parts.next().unwrap_or_default();
    match scheme {
        "emu" => {
            if target.is_empty() {
                return Err(SpecProblem::NoTarget { scheme: "emu", example: "a file or `mem`" });
            }
            let options = Options::parse("emu", parts)?;
            Ok(DeviceSpec {
                queues: options.queues,
                namespace: options.namespace,
                target: Target::Emulated(emulated(target, options)?),
            })
        }
        "pci" => {
            if target.is_empty() {
                return Err(SpecProblem::NoTarget {
                    scheme: "pci",
                    example: "an address such as `0000:01:00.0`",
                });
            }
            let options = Options::parse("pci", parts)?;
            Ok(DeviceSpec {
                target: Target::Pci(target.parse()?),
                queues: options.queues,
                namespace: options.namespace,
            })
        }
        "vfio-user" => {
            if target.is_empty() {
                return Err(SpecProblem::NoTarget { scheme: "vfio-user", example: "the path of a socket" });
            }
            let options = Options::parse("vfio-user", parts)?;
            Ok(DeviceSpec {
                target: Target::VfioUser(PathBuf::from(target)),
                queues: options.queues,
                namespace: options.namespace,
            })
        }
        "qtest" => {
            if target.is_empty() {
                return Err(SpecProblem::NoTarget {
                    scheme: "qtest",
                    example: "the directory with QEMU's socket and RAM file",
                });
            }
            let options = Options::parse("qtest", parts)?;
            Ok(DeviceSpec {
                target: Target::Qtest(PathBuf::from(target)),
                queues: options.queues,
                namespace: options.namespace,
            })
        }
        _ => Err(SpecProblem::Scheme),
    }
}

fn emulated(target: &str, options: Options) -> Result<EmulatedSpec, SpecProblem> {
    let backing = match target {
        "mem" => EmulatedBacking::Memory,
        path => EmulatedBacking::File(PathBuf::from(path)),
    };
    if backing == EmulatedBacking::Memory && options.size.is_none() {
        return Err(SpecProblem::MemoryWithoutSize);
    }
    // Without `lba`, the smallest block must fit at least.
    let lba = options.lba.unwrap_or(LbaSize::B512).bytes();
    let first = options.size.map(|size| ("size".to_owned(), size));
    let more = options.more_namespaces.iter().map(|(nsid, size)| (format!("ns{nsid}"), *size));
    if let Some((key, size)) =
        first.into_iter().chain(more).find(|(_, size)| !size.is_multiple_of(u64::from(lba)))
    {
        return Err(SpecProblem::SizeNotOfBlocks { key, size, lba });
    }
    if options.latency.is_some() && options.mode == Some(EmulatedMode::Inline) {
        return Err(SpecProblem::LatencyInline);
    }
    if options.iops.is_some() && options.latency.is_none() {
        return Err(SpecProblem::IopsAlone);
    }
    Ok(EmulatedSpec {
        backing,
        size: options.size,
        lba: options.lba,
        mode: options.mode,
        mdts: options.mdts,
        latency: options.latency,
        iops: options.iops,
        sgls: options.sgls,
        shadow: options.shadow,
        cache: options.cache,
        mpsmin: options.mpsmin,
        dstrd: options.dstrd,
        metadata: options.metadata,
        more_namespaces: options.more_namespaces,
    })
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            Target::Emulated(emulated) => emulated.fmt(f)?,
            Target::Pci(address) => write!(f, "pci:{address}")?,
            Target::VfioUser(path) => write!(f, "vfio-user:{}", path.display())?,
            Target::Qtest(path) => write!(f, "qtest:{}", path.display())?,
        }
        if let Some(queues) = self.queues {
            write!(f, ",queues={queues}")?;
        }
        if let Some(nsid) = self.namespace {
            write!(f, ",ns={nsid}")?;
        }
        Ok(())
    }
}

impl fmt::Display for EmulatedSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.backing {
            EmulatedBacking::Memory => write!(f, "emu:mem")?,
            EmulatedBacking::File(path) => write!(f, "emu:{}", path.display())?,
        }
        if let Some(size) = self.size {
            write!(f, ",size={}", Size(size))?;
        }
        if let Some(lba) = self.lba {
            write!(f, ",lba={}", lba.bytes())?;
        }
        match self.mode {
            Some(EmulatedMode::Inline) => write!(f, ",mode=inline")?,
            Some(EmulatedMode::Threaded) => write!(f, ",mode=threaded")?,
            None => {}
        }
        if let Some(mdts) = self.mdts {
            write!(f, ",mdts={mdts}")?;
        }
        if let Some(latency) = self.latency {
            write!(f, ",latency={}us", latency.as_micros())?;
        }
        if let Some(iops) = self.iops {
            write!(f, ",iops={iops}")?;
        }
        self.fmt_controller(f)
    }
}

impl EmulatedSpec {
    fn fmt_controller(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sgls = self.sgls.map(|sgls| match sgls {
            SglSupport::Byte => "on",
            SglSupport::Dword => "dword",
            SglSupport::Absent => "off",
        });
        let shadow = self.shadow.map(|shadow| if shadow == ShadowDoorbells::Absent { "off" } else { "on" });
        let cache = self.cache.map(|cache| if cache == WriteCache::Absent { "off" } else { "on" });
        for (key, value) in [("sgls", sgls), ("shadow", shadow), ("cache", cache)] {
            if let Some(value) = value {
                write!(f, ",{key}={value}")?;
            }
        }
        if let Some(mpsmin) = self.mpsmin {
            write!(f, ",mpsmin={}", Size(4096 << mpsmin))?;
        }
        if let Some(dstrd) = self.dstrd {
            write!(f, ",dstrd={dstrd}")?;
        }
        if let Some(metadata) = self.metadata {
            write!(f, ",meta={metadata}")?;
        }
        self.more_namespaces.iter().try_for_each(|(nsid, size)| write!(f, ",ns{nsid}={}", Size(*size)))
    }
}

#[cfg(test)]
mod tests;
