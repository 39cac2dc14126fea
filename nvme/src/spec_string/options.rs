//! The options behind a device spec's target: their values, and which scheme has which.
//!
//! Owns: [`Options`], sizes as users write them ([`parse_size`], [`Size`]).
//!
//! Invariants: an option is given once; an unknown one is an error that lists those there are.
//!
//! Excludes: what options mean together (`spec_string`).

use std::fmt;
use std::time::Duration;

use nvme_emulator::{MAX_DSTRD, MAX_METADATA, MAX_NSID, SglSupport, ShadowDoorbells, WriteCache};
use nvme_spec::NamespaceId;

use super::{EmulatedMode, LbaSize, MAX_IOPS, MAX_LATENCY, MAX_QUEUES, MAX_SIZE, SpecProblem};

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

/// Writes a size as [`parse_size`] reads it, in the largest binary unit that divides it.
pub(super) struct Size(pub(super) u64);

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

/// Reads `80us` or `5ms`.
fn parse_latency(text: &str) -> Option<Duration> {
    let (number, unit_us) =
        text.strip_suffix("us").map(|n| (n, 1)).or_else(|| text.strip_suffix("ms").map(|n| (n, 1000)))?;
    let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    let us = number.parse::<u64>().ok().filter(|_| digits)?.checked_mul(unit_us)?;
    let latency = Duration::from_micros(us);
    (!latency.is_zero() && latency <= MAX_LATENCY).then_some(latency)
}

const COMMON_OPTIONS: &str = "queues, ns";
const EMULATED_OPTIONS: &str =
    "size, lba, mode, mdts, latency, iops, sgls, shadow, cache, mpsmin, dstrd, meta, nsID=SIZE, queues, ns";

/// Options as they were found; which of them a scheme has is decided while they are read.
#[derive(Default)]
pub(super) struct Options {
    pub(super) size: Option<u64>,
    pub(super) lba: Option<LbaSize>,
    pub(super) mode: Option<EmulatedMode>,
    pub(super) mdts: Option<u8>,
    pub(super) latency: Option<Duration>,
    pub(super) iops: Option<u32>,
    pub(super) sgls: Option<SglSupport>,
    pub(super) shadow: Option<ShadowDoorbells>,
    pub(super) cache: Option<WriteCache>,
    pub(super) mpsmin: Option<u8>,
    pub(super) dstrd: Option<u8>,
    pub(super) metadata: Option<u16>,
    /// Sorted by identifier.
    pub(super) more_namespaces: Vec<(NamespaceId, u64)>,
    pub(super) queues: Option<u16>,
    pub(super) namespace: Option<NamespaceId>,
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
    pub(super) fn parse<'a>(
        scheme: &'static str,
        parts: impl Iterator<Item = &'a str>,
    ) -> Result<Self, SpecProblem> {
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
            "iops" => set("iops", &mut self.iops, number("iops", value, 1, MAX_IOPS)?)?,
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
