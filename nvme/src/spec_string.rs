//! Device specs, the `--device` argument of every tool: [`DeviceSpec`] and its parser.
//!
//! ```text
//! emu:PATH[,size=4GiB][,lba=512|4096][,mode=inline|threaded][,mdts=N][,latency=80us][,queues=N][,ns=ID]
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
//! Excludes: opening the device. A path cannot hold a comma: there it ends.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use nvme_emulator::{MAX_DSTRD, MAX_METADATA, MAX_NSID, SglSupport, ShadowDoorbells, WriteCache};
use nvme_spec::NamespaceId;
use thiserror::Error;

use crate::pci::{PciAddress, PciAddressError};

/// Largest device size that a spec can name: sizes stay within a file offset.
pub const MAX_SIZE: u64 = i64::MAX as u64;
/// Longest latency of an embedded controller that a spec can ask for.
pub const MAX_LATENCY: Duration = Duration::from_secs(10);
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

/// Reads a size with an optional suffix: `4096`, `64k`, `1MiB`, `4GiB`, `1T`. One letter or `iB` forms are powers of 1024,
/// as fio has them; `kB`, `MB` and so on are powers of 1000.
///
/// # Errors
/// A sentence that says what is expected.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, suffix) = text.split_at(digits);
    let expected = "expected a size such as 4096, 64KiB, 512MiB or 4GiB";
    let number: u64 = number.parse().map_err(|_| {
        if number.is_empty() { expected.to_owned() } else { format!("{number} is too large; {expected}") }
    })?;
    let scale = match suffix.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(format!("`{suffix}` is not a unit; {expected}")),
    };
    number
        .checked_mul(scale)
        .filter(|&bytes| bytes <= MAX_SIZE)
        .ok_or_else(|| format!("the size exceeds {MAX_SIZE} bytes"))
}

/// Reads `80us` or `5ms`.
fn parse_latency(text: &str) -> Option<Duration> {
    let (number, unit_us) =
        text.strip_suffix("us").map(|n| (n, 1)).or_else(|| text.strip_suffix("ms").map(|n| (n, 1000)))?;
    let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    let us = number.parse::<u64>().ok().filter(|_| digits)?.checked_mul(unit_us)?;
    let latency = Duration::from_micros(us);
    (!latency.is_zero() && latency <= MAX_LATENCY).then_some(latency)
}

/// Writes a size as [`parse_size`] reads it, in the largest binary unit that divides it.
struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
            if self.0 != 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

const COMMON_OPTIONS: &str = "queues, ns";
const EMULATED_OPTIONS: &str =
    "size, lba, mode, mdts, latency, sgls, shadow, cache, mpsmin, dstrd, meta, nsID=SIZE, queues, ns";

/// Options as they were found; which of them a scheme has is decided while they are read.
#[derive(Default)]
struct Options {
    size: Option<u64>,
    lba: Option<LbaSize>,
    mode: Option<EmulatedMode>,
    mdts: Option<u8>,
    latency: Option<Duration>,
    sgls: Option<SglSupport>,
    shadow: Option<ShadowDoorbells>,
    cache: Option<WriteCache>,
    mpsmin: Option<u8>,
    dstrd: Option<u8>,
    metadata: Option<u16>,
    /// Sorted by identifier.
    more_namespaces: Vec<(NamespaceId, u64)>,
    queues: Option<u16>,
    namespace: Option<NamespaceId>,
}

fn set<T>(key: &'static str, place: &mut Option<T>, value: T) -> Result<(), SpecProblem> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(SpecProblem::Twice(key.to_owned())),
    }
}

fn number(key: &'static str, value: &str, min: u32, max: u32) -> Result<u32, SpecProblem> {
    value.parse().ok().filter(|number| (min..=max).contains(number)).ok_or_else(|| SpecProblem::Value {
        key: key.to_owned(),
        value: value.to_owned(),
        expected: format!("expected a number from {min} to {max}"),
    })
}

fn one_of<T>(
    key: &'static str,
    value: &str,
    found: Option<T>,
    expected: &'static str,
) -> Result<T, SpecProblem> {
    found.ok_or_else(|| SpecProblem::Value {
        key: key.to_owned(),
        value: value.to_owned(),
        expected: expected.to_owned(),
    })
}

/// A size that is not 0.
fn whole_size(key: &str, value: &str) -> Result<u64, SpecProblem> {
    parse_size(value)
        .and_then(|size| if size == 0 { Err("the size must not be 0".to_owned()) } else { Ok(size) })
        .map_err(|expected| SpecProblem::Value { key: key.to_owned(), value: value.to_owned(), expected })
}

fn on_off<T>(key: &'static str, value: &str, on: T, off: T) -> Result<T, SpecProblem> {
    let found = match value {
        "on" => Some(on),
        "off" => Some(off),
        _ => None,
    };
    one_of(key, value, found, "expected on or off")
}

impl Options {
    fn parse<'a>(scheme: &'static str, parts: impl Iterator<Item = &'a str>) -> Result<Self, SpecProblem> {
        let mut options = Self::default();
        for part in parts {
            let (key, value) =
                part.split_once('=').ok_or_else(|| SpecProblem::NotAnOption(part.to_owned()))?;
            let known = options.common(key, value)? || scheme == "emu" && options.emulated(key, value)?;
            if !known {
                let known = if scheme == "emu" { EMULATED_OPTIONS } else { COMMON_OPTIONS };
                return Err(SpecProblem::UnknownOption { key: key.to_owned(), scheme, known });
            }
        }
        Ok(options)
    }

    fn common(&mut self, key: &str, value: &str) -> Result<bool, SpecProblem> {
        match key {
            "queues" => {
                let queues = number("queues", value, 1, u32::from(MAX_QUEUES))?;
                set("queues", &mut self.queues, queues as u16)?;
            }
            "ns" => {
                let nsid = number("ns", value, 1, u32::MAX - 1)?;
                set("ns", &mut self.namespace, NamespaceId::new(nsid))?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn emulated(&mut self, key: &str, value: &str) -> Result<bool, SpecProblem> {
        match key {
            "size" => set("size", &mut self.size, whole_size("size", value)?)?,
            "lba" => {
                let lba = match value {
                    "512" => Some(LbaSize::B512),
                    "4096" | "4k" | "4KiB" => Some(LbaSize::B4096),
                    _ => None,
                };
                set("lba", &mut self.lba, one_of("lba", value, lba, "expected 512 or 4096")?)?;
            }
            "mode" => {
                let mode = match value {
                    "inline" => Some(EmulatedMode::Inline),
                    "threaded" => Some(EmulatedMode::Threaded),
                    _ => None,
                };
                set("mode", &mut self.mode, one_of("mode", value, mode, "expected inline or threaded")?)?;
            }
            "mdts" => set("mdts", &mut self.mdts, number("mdts", value, 0, 20)? as u8)?,
            "latency" => {
                let expected = "expected microseconds or milliseconds up to 10 s, as 80us or 5ms";
                set("latency", &mut self.latency, one_of("latency", value, parse_latency(value), expected)?)?;
            }
            _ => return self.controller(key, value),
        }
        Ok(true)
    }

    /// What a tester of initiators wants to vary.
    fn controller(&mut self, key: &str, value: &str) -> Result<bool, SpecProblem> {
        match key {
            "sgls" => {
                let sgls = match value {
                    "on" => Some(SglSupport::Byte),
                    "dword" => Some(SglSupport::Dword),
                    "off" => Some(SglSupport::Absent),
                    _ => None,
                };
                set("sgls", &mut self.sgls, one_of("sgls", value, sgls, "expected on, dword or off")?)?;
            }
            "shadow" => {
                let shadow = on_off("shadow", value, ShadowDoorbells::Offered, ShadowDoorbells::Absent)?;
                set("shadow", &mut self.shadow, shadow)?;
            }
            "cache" => {
                let cache = on_off("cache", value, WriteCache::Host, WriteCache::Absent)?;
                set("cache", &mut self.cache, cache)?;
            }
            "mpsmin" => {
                let shift = parse_size(value)
                    .ok()
                    .filter(|bytes| bytes.is_power_of_two() && (4096..=65536).contains(bytes))
                    .map(|bytes| (bytes / 4096).trailing_zeros() as u8);
                let expected = "expected 4KiB, 8KiB, 16KiB, 32KiB or 64KiB";
                set("mpsmin", &mut self.mpsmin, one_of("mpsmin", value, shift, expected)?)?;
            }
            "dstrd" => {
                let dstrd = number("dstrd", value, 0, u32::from(MAX_DSTRD))?;
                set("dstrd", &mut self.dstrd, dstrd as u8)?;
            }
            "meta" => {
                let bytes = number("meta", value, 0, u32::from(MAX_METADATA))?;
                set("meta", &mut self.metadata, bytes as u16)?;
            }
            _ => return self.namespace(key, value),
        }
        Ok(true)
    }

    /// `nsID=SIZE`.
    fn namespace(&mut self, key: &str, value: &str) -> Result<bool, SpecProblem> {
        let Some(id) = key.strip_prefix("ns").filter(|id| id.starts_with(|c: char| c.is_ascii_digit()))
        else {
            return Ok(false);
        };
        let nsid = id.parse().ok().filter(|nsid| (2..=MAX_NSID).contains(nsid) && !id.starts_with('0'));
        let nsid = NamespaceId::new(nsid.ok_or_else(|| SpecProblem::Value {
            key: key.to_owned(),
            value: value.to_owned(),
            expected: format!(
                "identifiers of further namespaces are 2 to {MAX_NSID}; the size of namespace 1 is `size`"
            ),
        })?);
        let size = whole_size(key, value)?;
        match self.more_namespaces.binary_search_by_key(&nsid, |(nsid, _)| *nsid) {
            Ok(_) => return Err(SpecProblem::Twice(key.to_owned())),
            Err(place) => self.more_namespaces.insert(place, (nsid, size)),
        }
        Ok(true)
    }
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
    Ok(EmulatedSpec {
        backing,
        size: options.size,
        lba: options.lba,
        mode: options.mode,
        mdts: options.mdts,
        latency: options.latency,
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
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn spec(text: &str) -> DeviceSpec {
        let parsed: DeviceSpec = text.parse().unwrap();
        assert_eq!(parsed.to_string().parse::<DeviceSpec>().unwrap(), parsed, "{text}");
        parsed
    }

    fn problem(text: &str) -> String {
        text.parse::<DeviceSpec>().unwrap_err().to_string()
    }

    #[test]
    fn every_documented_form_parses() {
        let file = spec("emu:/var/lib/p.img,size=4GiB,lba=512,queues=4,ns=2");
        assert_eq!((file.queues, file.namespace), (Some(4), Some(NamespaceId::new(2))));
        let Target::Emulated(emulated) = file.target else { panic!() };
        assert_eq!(emulated.backing, EmulatedBacking::File("/var/lib/p.img".into()));
        assert_eq!((emulated.size, emulated.lba), (Some(4 << 30), Some(LbaSize::B512)));

        let memory = spec("emu:mem,size=64m,mode=threaded,mdts=5");
        let Target::Emulated(emulated) = memory.target else { panic!() };
        assert_eq!(emulated.backing, EmulatedBacking::Memory);
        assert_eq!((emulated.mode, emulated.mdts), (Some(EmulatedMode::Threaded), Some(5)));

        for (text, us) in [("80us", 80), ("5ms", 5_000), ("10000ms", 10_000_000)] {
            let Target::Emulated(emulated) = spec(&format!("emu:x,latency={text}")).target else { panic!() };
            assert_eq!(emulated.latency, Some(Duration::from_micros(us)));
        }

        assert_eq!(spec("emu:./mem").to_string(), "emu:./mem");
        assert_eq!(spec("pci:0000:01:00.0").to_string(), "pci:0000:01:00.0");
        assert_eq!(spec("pci:01:00.0"), spec("pci:0000:01:00.0"));
        assert_eq!(spec("qtest:/tmp/q,queues=2").target, Target::Qtest("/tmp/q".into()));
        assert_eq!(spec("vfio-user:/run/x/cntrl,ns=3").namespace, Some(NamespaceId::new(3)));
    }

    #[test]
    fn what_a_controller_offers_can_be_chosen() {
        let text = "emu:x,sgls=dword,shadow=on,cache=off,mpsmin=16k,dstrd=2,meta=8,ns7=1GiB,ns2=16MiB,ns=7";
        let parsed = spec(text);
        assert_eq!(parsed.namespace, Some(NamespaceId::new(7)));
        let Target::Emulated(emulated) = parsed.target else { panic!() };
        assert_eq!(emulated.sgls, Some(SglSupport::Dword));
        assert_eq!(emulated.shadow, Some(ShadowDoorbells::Offered));
        assert_eq!(emulated.cache, Some(WriteCache::Absent));
        assert_eq!((emulated.mpsmin, emulated.dstrd, emulated.metadata), (Some(2), Some(2), Some(8)));
        let more = [(NamespaceId::new(2), 16 << 20), (NamespaceId::new(7), 1 << 30)];
        assert_eq!(emulated.more_namespaces, more);
        for (text, again) in
            [("sgls=on", "sgls=on"), ("sgls=off", "sgls=off"), ("mpsmin=4096", "mpsmin=4KiB")]
        {
            assert_eq!(spec(&format!("emu:x,{text}")).to_string(), format!("emu:x,{again}"));
        }
        assert_eq!(namespace_path(Path::new("/d/x"), NamespaceId::new(7)), Path::new("/d/x.ns7"));
    }

    #[test]
    fn every_malformed_spec_says_what_to_do() {
        for (text, says) in [
            ("", "must begin with"),
            ("disk.img", "must begin with"),
            ("nvme:x", "must begin with"),
            ("emu:", "a file or `mem`"),
            ("emu:,size=1GiB", "a file or `mem`"),
            ("emu:mem", "write `emu:mem,size=1GiB`"),
            ("emu:x,", "`` is not of the form `option=value`"),
            ("emu:x,size", "`size` is not of the form"),
            ("emu:x,size=", "such as 4096"),
            ("emu:x,size=0", "must not be 0"),
            ("emu:x,size=-1", "such as 4096"),
            ("emu:x,size=4 GiB", "` GiB` is not a unit"),
            ("emu:x,size=99999999999999999999", "too large"),
            ("emu:x,size=9999999TiB", "exceeds"),
            ("emu:x,size=1000", "not a multiple of the block size of 512"),
            ("emu:x,size=512,lba=4096", "not a multiple of the block size of 4096"),
            ("emu:x,lba=1024", "expected 512 or 4096"),
            ("emu:x,mode=fast", "expected inline or threaded"),
            ("emu:x,latency=80", "as 80us or 5ms"),
            ("emu:x,latency=0us", "as 80us or 5ms"),
            ("emu:x,latency=+1us", "as 80us or 5ms"),
            ("emu:x,latency=10001ms", "up to 10 s"),
            ("emu:x,latency=1us,mode=inline", "needs `mode=threaded`"),
            ("emu:x,queues=0", "from 1 to 65534"),
            ("emu:x,queues=65535", "from 1 to 65534"),
            ("emu:x,ns=0", "from 1 to 4294967294"),
            ("emu:x,ns=1,ns=2", "`ns` is given twice"),
            ("emu:x,speed=9", "those are size, lba, mode, mdts, latency, sgls, shadow"),
            ("emu:x,sgls=byte", "expected on, dword or off"),
            ("emu:x,shadow=yes", "expected on or off"),
            ("emu:x,cache=", "expected on or off"),
            ("emu:x,cache=on,cache=off", "`cache` is given twice"),
            ("emu:x,mpsmin=2k", "expected 4KiB"),
            ("emu:x,mpsmin=12k", "expected 4KiB"),
            ("emu:x,mpsmin=128k", "expected 4KiB"),
            ("emu:x,dstrd=11", "from 0 to 10"),
            ("emu:x,meta=129", "from 0 to 128"),
            ("emu:x,ns1=1MiB", "the size of namespace 1 is `size`"),
            ("emu:x,ns02=1MiB", "identifiers of further namespaces are 2 to 65535"),
            ("emu:x,ns65536=1MiB", "identifiers of further namespaces are 2 to 65535"),
            ("emu:x,ns2=0", "must not be 0"),
            ("emu:x,ns2=1MiB,ns2=2MiB", "`ns2` is given twice"),
            ("emu:x,ns2=1536,lba=4096", "`ns2=1536` is not a multiple of the block size of 4096"),
            ("emu:x,nsx=1", "`nsx` is not an option"),
            ("pci:0000:01:00.0,ns2=1MiB", "those are queues, ns"),
            ("pci:", "such as `0000:01:00.0`"),
            ("pci:01:00", "the function is missing"),
            ("pci:0000:01:20.0", "`pollux list`"),
            ("pci:0000:01:00.8", "`pollux list`"),
            ("pci:0000:01:00.0,size=1GiB", "those are queues, ns"),
            ("pci:0000:+1:00.0", "`pollux list`"),
            ("vfio-user:", "the path of a socket"),
            ("qtest:", "the directory with QEMU's socket"),
            ("qtest:/tmp/q,size=1GiB", "those are queues, ns"),
        ] {
            let message = problem(text);
            assert!(message.contains(says), "{text}: {message}");
            assert!(message.starts_with(&format!("device spec `{text}`")), "{message}");
        }
    }

    #[test]
    fn suffixes_are_those_of_fio() {
        for (text, bytes) in
            [("1k", 1024), ("1KiB", 1024), ("1kB", 1000), ("3G", 3 << 30), ("7", 7), ("2TiB", 2 << 40)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_options_that_parse_round_trip(options in prop::collection::vec((
            prop::sample::select(vec!["size", "lba", "mode", "mdts", "latency", "sgls", "shadow", "cache", "mpsmin",
                "dstrd", "meta", "ns", "ns2", "ns7", "ns65535", "ns65536", "queues"]),
            prop::sample::select(vec!["on", "off", "dword", "0", "1", "2", "8", "512", "4096", "4k", "8KiB", "64k",
                "1MiB", "inline", "threaded", "80us"]),
        ), 0..5)) {
            let options: String = options.iter().map(|(key, value)| format!(",{key}={value}")).collect();
            if let Ok(parsed) = format!("emu:x{options}").parse::<DeviceSpec>() {
                prop_assert_eq!(parsed.to_string().parse::<DeviceSpec>().unwrap(), parsed);
            }
        }

        #[test]
        fn no_string_panics_and_what_parses_round_trips(text in "(emu|pci|vfio-user|qtest)?:?[a-z0-9:.,=/GiB]{0,40}") {
            if let Ok(parsed) = text.parse::<DeviceSpec>() {
                prop_assert_eq!(parsed.to_string().parse::<DeviceSpec>().unwrap(), parsed);
            }
        }
    }
}
