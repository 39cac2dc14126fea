//! Who uses a controller: mounts, swap, stacked block devices, programs.
//!
//! Invariants: a use that this module reports is one; what it cannot see (files that other users' programs have open) it
//! does not guess.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use super::{PciError, Sysfs, entries, text};

/// A use that stands against taking a controller away.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum InUse {
    /// A file system is mounted from it.
    Mounted {
        /// Block device, such as `nvme0n1p2`.
        device: String,
        /// Where.
        at: PathBuf,
    },
    /// It is swapped to.
    Swap {
        /// Block device.
        device: String,
    },
    /// Another block device is built on it.
    Held {
        /// Block device.
        device: String,
        /// The other, such as `dm-0` or `md127`.
        by: String,
    },
    /// A program has its node open.
    Open {
        /// Path of the node.
        node: PathBuf,
        /// The program.
        pid: u32,
        /// Its name.
        program: String,
    },
}

impl fmt::Display for InUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            InUse::Mounted { device, at } => write!(f, "{device} is mounted on {}", at.display()),
            InUse::Swap { device } => write!(f, "{device} is swap space in use"),
            InUse::Held { device, by } => write!(f, "{device} is held by {by}"),
            InUse::Open { node, pid, program } => {
                write!(f, "{} is open in process {pid} ({program})", node.display())
            }
        }
    }
}

/// A block device of a controller: a namespace or one of its partitions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockDevice {
    /// Its name, such as `nvme0n1`.
    pub name: String,
    /// Bytes, if shown.
    pub bytes: Option<u64>,
    /// Who uses it.
    pub in_use: Vec<InUse>,
}

/// Namespaces of the controller in `directory` (`…/nvme/nvme0`), and their partitions.
pub(super) fn block_devices(sysfs: &Sysfs, directory: &Path) -> Result<Vec<BlockDevice>, PciError> {
    let mut names = BTreeSet::new();
    for entry in entries(directory)? {
        let Some(namespace) = namespace_name(&entry) else { continue };
        let class = sysfs.sys("class/block").join(&namespace);
        names.extend(entries(&class)?.into_iter().filter(|name| class.join(name).join("partition").exists()));
        names.insert(namespace);
    }
    let mounts = fs::read_to_string(sysfs.proc("self/mountinfo")).unwrap_or_default();
    let swaps = fs::read_to_string(sysfs.proc("swaps")).unwrap_or_default();
    names
        .into_iter()
        .map(|name| {
            let class = sysfs.sys("class/block").join(&name);
            let mut in_use = mounted(&name, text(&class.join("dev")).as_deref(), &mounts);
            if swaps.lines().any(|line| first_word(line) == format!("/dev/{name}")) {
                in_use.push(InUse::Swap { device: name.clone() });
            }
            let holders = entries(&class.join("holders"))?;
            in_use.extend(holders.into_iter().map(|by| InUse::Held { device: name.clone(), by }));
            // sysfs counts in units of 512 bytes, whatever the block size.
            let bytes = text(&class.join("size")).and_then(|size| size.parse::<u64>().ok()?.checked_mul(512));
            Ok(BlockDevice { name, bytes, in_use })
        })
        .collect()
}

/// The block device of an entry of the controller's directory: `nvme0n1`, or with multipath `nvme0c1n1`, which is a path
/// to `nvme0n1`.
fn namespace_name(entry: &str) -> Option<String> {
    let rest = entry.strip_prefix("nvme")?;
    let (controller, namespace) = rest.split_once('n')?;
    let subsystem = controller.split_once('c').map_or(controller, |(subsystem, _)| subsystem);
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let is_path = controller.split_once('c').is_none_or(|(_, path)| digits(path));
    (digits(subsystem) && digits(namespace) && is_path).then(|| format!("nvme{subsystem}n{namespace}"))
}

/// Mounts of a block device, by its number, or by its name where the file system has a number of its own (btrfs).
/// Format: proc_pid_mountinfo(5).
fn mounted(name: &str, number: Option<&str>, mounts: &str) -> Vec<InUse> {
    let node = format!("/dev/{name}");
    let mut found = Vec::new();
    for line in mounts.lines() {
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let mut fields = before.split(' ');
        let (Some(device), Some(at)) = (fields.nth(2), fields.nth(1)) else { continue };
        let source = after.split(' ').nth(1);
        if Some(device) == number || source == Some(&node) {
            found.push(InUse::Mounted { device: name.to_owned(), at: PathBuf::from(unescape(at)) });
        }
    }
    found
}

fn first_word(line: &str) -> &str {
    line.split_whitespace().next().unwrap_or_default()
}

/// Undoes the octal escapes of mountinfo (`\040` for a blank).
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let escape = tail.get(..3).filter(|_| *first == b'\\').and_then(|digits| {
            digits.iter().try_fold(0u8, |value, digit| match digit {
                b'0'..=b'7' => value.checked_mul(8)?.checked_add(digit - b'0'),
                _ => None,
            })
        });
        bytes.push(escape.unwrap_or(*first));
        rest = if escape.is_some() { &tail[3..] } else { tail };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Programs that have `node` open, as far as the caller may look into their descriptors: all of them for root, one's own
/// otherwise. The caller's own process is among them.
pub fn who_has_open(sysfs: &Sysfs, node: &Path) -> Vec<InUse> {
    let Ok(processes) = entries(&sysfs.proc("")) else { return Vec::new() };
    let mut found = Vec::new();
    for pid in processes.iter().filter_map(|name| name.parse::<u32>().ok()) {
        let directory = sysfs.proc(pid.to_string());
        let Ok(descriptors) = entries(&directory.join("fd")) else { continue };
        let opens =
            |name: &String| fs::read_link(directory.join("fd").join(name)).is_ok_and(|target| target == node);
        if descriptors.iter().any(opens) {
            let program = text(&directory.join("comm")).unwrap_or_default();
            found.push(InUse::Open { node: node.to_owned(), pid, program });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn multipath_names_lead_to_the_namespace() {
        assert_eq!(namespace_name("nvme0n1").as_deref(), Some("nvme0n1"));
        assert_eq!(namespace_name("nvme2c13n4").as_deref(), Some("nvme2n4"));
        for other in ["nvme0", "nvme0n", "nvmen1", "nvme0cn1", "ng0n1", "nvme0n1p1", "power", "nvme-subsys0"]
        {
            assert_eq!(namespace_name(other), None, "{other}");
        }
    }

    #[test]
    fn mount_points_are_unescaped() {
        assert_eq!(unescape(r"/mnt/a\040b\134c"), r"/mnt/a b\c");
        assert_eq!(unescape(r"/mnt/\04"), r"/mnt/\04");
        assert_eq!(unescape(r"/mnt/\777\9"), r"/mnt/\777\9");
    }

    #[test]
    fn a_mount_is_found_by_number_and_by_name() {
        let mounts = "\
            22 1 259:2 / / rw,noatime shared:1 - ext4 /dev/root rw\n\
            30 22 0:45 /sub /srv rw - btrfs /dev/nvme0n1p2 rw\n\
            31 22 0:5 / /dev rw - devtmpfs devtmpfs rw\n\
            nonsense\n";
        let at = |name, number| mounted(name, number, mounts);
        assert_eq!(
            at("nvme0n1p1", Some("259:2")),
            [InUse::Mounted { device: "nvme0n1p1".into(), at: "/".into() }]
        );
        assert_eq!(
            at("nvme0n1p2", Some("259:3")),
            [InUse::Mounted { device: "nvme0n1p2".into(), at: "/srv".into() }]
        );
        assert_eq!(at("nvme0n1p", None), []);
    }
}
