//! Who uses a controller: mounts, swap, programs, and whatever is stacked on its block devices, up to the top of the stack.
//!
//! Invariants: a use that this module reports is one; what it cannot see (files that other users' programs have open, mounts of other
//! mount namespaces, ZFS pools) it does not guess. [`bind()`](super::bind()) finds out about most of that by opening the namespaces
//! exclusively.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use super::open_files::OpenFiles;
use super::{PciError, Sysfs, entries, link_name, text};

/// Block devices looked at from one namespace at most: a stack of RAID, LVM and encryption has a handful.
const MAX_STACK: usize = 256;

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
    /// It is one of several devices of a file system that is mounted (btrfs).
    Member {
        /// Block device.
        device: String,
        /// The file system.
        of: String,
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
        /// What that is, in words.
        what: String,
    },
    /// It is offered to other hosts (the kernel's NVMe target).
    Exported {
        /// Block device.
        device: String,
        /// The subsystem's name.
        subsystem: String,
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
    /// Somebody has claimed it, who cannot be seen from here.
    Claimed {
        /// Path of the node.
        node: PathBuf,
    },
}

impl fmt::Display for InUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            InUse::Mounted { device, at } => write!(f, "{device} is mounted on {}", at.display()),
            InUse::Member { device, of } => write!(f, "{device} belongs to {of}"),
            InUse::Swap { device } => write!(f, "{device} is swap space in use"),
            InUse::Held { device, by, what } => write!(f, "{device} is held by {by} ({what})"),
            InUse::Exported { device, subsystem } => {
                write!(f, "{device} is offered to other hosts as {subsystem}")
            }
            InUse::Open { node, pid, program } => {
                write!(f, "{} is open in process {pid} ({program})", node.display())
            }
            InUse::Claimed { node } => write!(
                f,
                "{} is claimed by the kernel for somebody who is not seen from here, such as a container's mount or a ZFS pool",
                node.display()
            ),
        }
    }
}

/// A block device of a controller: a namespace or one of its partitions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockDevice {
    /// Its name, such as `nvme0n1`.
    pub name: String,
    /// Whether it is a partition.
    pub is_partition: bool,
    /// Bytes, if shown.
    pub bytes: Option<u64>,
    /// Who uses it, and what is built on it.
    pub in_use: Vec<InUse>,
}

/// What uses block devices, at one moment.
pub(super) struct Uses<'a> {
    sysfs: &'a Sysfs,
    mounts: String,
    swaps: Vec<String>,
    /// Loop devices and what they are on.
    loops: Vec<(String, PathBuf)>,
    /// Block devices of mounted btrfs file systems, with the file system.
    members: Vec<(String, String)>,
    /// Nodes that the kernel's NVMe target offers, with the subsystem.
    exports: Vec<(PathBuf, String)>,
    open: OpenFiles,
}

impl<'a> Uses<'a> {
    /// Looks at the system.
    pub(super) fn look(sysfs: &'a Sysfs) -> Self {
        let swaps = fs::read_to_string(sysfs.proc("swaps")).unwrap_or_default();
        Self {
            mounts: fs::read_to_string(sysfs.proc("self/mountinfo")).unwrap_or_default(),
            swaps: swaps.lines().skip(1).filter_map(|line| device_of(sysfs, first_word(line))).collect(),
            loops: loops(sysfs),
            members: members(sysfs),
            exports: exports(sysfs),
            open: OpenFiles::scan(sysfs),
            sysfs,
        }
    }

    /// Programs that have `node` open.
    pub(super) fn open(&self, node: &Path) -> Vec<InUse> {
        self.open.of(self.sysfs, node)
    }

    /// Namespaces of the controller in `directory` (`…/nvme/nvme0`), and their partitions.
    pub(super) fn block_devices(&self, directory: &Path) -> Result<Vec<BlockDevice>, PciError> {
        let mut names = BTreeSet::new();
        for entry in entries(directory)? {
            let Some(namespace) = namespace_name(&entry) else { continue };
            names.extend(partitions(self.sysfs, &namespace)?.into_iter().map(|name| (name, true)));
            names.insert((namespace, false));
        }
        let described = |(name, is_partition): (String, bool)| {
            let mut in_use = Vec::new();
            self.add_uses(&name, &mut BTreeSet::new(), &mut in_use)?;
            // sysfs counts in units of 512 bytes, whatever the block size.
            let size = text(&self.class(&name).join("size"));
            let bytes = size.and_then(|size| size.parse::<u64>().ok()?.checked_mul(512));
            Ok(BlockDevice { name, is_partition, bytes, in_use })
        };
        names.into_iter().map(described).collect()
    }

    fn class(&self, name: &str) -> PathBuf {
        self.sysfs.sys("class/block").join(name)
    }

    /// Adds the uses of a block device, and those of what is built on it.
    fn add_uses(
        &self,
        name: &str,
        seen: &mut BTreeSet<String>,
        found: &mut Vec<InUse>,
    ) -> Result<(), PciError> {
        if seen.len() >= MAX_STACK || !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let (device, class, node) = (name.to_owned(), self.class(name), Path::new("/dev").join(name));
        found.extend(mounted(name, text(&class.join("dev")).as_deref(), &self.aliases(name), &self.mounts));
        if self.swaps.iter().any(|swap| swap == name) {
            found.push(InUse::Swap { device: device.clone() });
        }
        let of = self.members.iter().find(|(member, _)| member == name);
        found.extend(of.map(|(_, of)| InUse::Member { device: device.clone(), of: of.clone() }));
        let exports = self.exports.iter().filter(|(exported, _)| *exported == node);
        found.extend(
            exports.map(|(_, subsystem)| InUse::Exported {
                device: device.clone(),
                subsystem: subsystem.clone(),
            }),
        );
        found.extend(self.open(&node));
        let on_it = self.loops.iter().filter(|(_, backing)| *backing == node).map(|(name, _)| name.clone());
        for by in entries(&class.join("holders"))?.into_iter().chain(on_it) {
            let what = self.kind(&by);
            found.push(InUse::Held { device: device.clone(), by: by.clone(), what });
            for partition in partitions(self.sysfs, &by)? {
                self.add_uses(&partition, seen, found)?;
            }
            self.add_uses(&by, seen, found)?;
        }
        Ok(())
    }

    /// The names under which a file system on a block device may be mounted.
    fn aliases(&self, name: &str) -> Vec<String> {
        let mapped = text(&self.class(name).join("dm/name")).map(|mapped| format!("/dev/mapper/{mapped}"));
        [format!("/dev/{name}")].into_iter().chain(mapped).collect()
    }

    /// What a block device that is built on others is, in words.
    fn kind(&self, name: &str) -> String {
        let class = self.class(name);
        if let Some(mapped) = text(&class.join("dm/name")) {
            let uuid = text(&class.join("dm/uuid")).unwrap_or_default();
            let kind = match uuid.split('-').next() {
                Some("LVM") => "LVM volume",
                Some("CRYPT") => "encrypted volume",
                Some("mpath") => "multipath device",
                _ => "device mapper volume",
            };
            return format!("{kind} {mapped}");
        }
        if let Some(level) = text(&class.join("md/level")) {
            return format!("RAID array, {level}");
        }
        let known = [("loop", "loop device"), ("bcache", "bcache"), ("drbd", "DRBD"), ("md", "RAID array")];
        let kind = known.iter().find(|(prefix, _)| name.starts_with(prefix));
        kind.map_or("another block device", |(_, kind)| kind).to_owned()
    }
}

/// Partitions of a block device.
fn partitions(sysfs: &Sysfs, name: &str) -> Result<Vec<String>, PciError> {
    let class = sysfs.sys("class/block").join(name);
    let entries = entries(&class)?;
    Ok(entries.into_iter().filter(|entry| class.join(entry).join("partition").exists()).collect())
}

/// The block device behind a path such as `/dev/dm-0` or `/dev/mapper/swap`.
fn device_of(sysfs: &Sysfs, path: &str) -> Option<String> {
    let below = Path::new(path).strip_prefix("/dev").ok()?;
    let name =
        link_name(&sysfs.dev(below)).or_else(|| Some(below.file_name()?.to_string_lossy().into_owned()));
    name.map(|name| name.trim_end_matches(r"\040(deleted)").to_owned())
}

fn loops(sysfs: &Sysfs) -> Vec<(String, PathBuf)> {
    let directory = sysfs.sys("class/block");
    let names = entries(&directory).unwrap_or_default().into_iter().filter(|name| name.starts_with("loop"));
    names
        .filter_map(|name| {
            let backing = text(&directory.join(&name).join("loop/backing_file"))?;
            Some((name, PathBuf::from(backing)))
        })
        .collect()
}

/// btrfs shows only one device of a file system in the list of mounts.
fn members(sysfs: &Sysfs) -> Vec<(String, String)> {
    let directory = sysfs.sys("fs/btrfs");
    let mut found = Vec::new();
    for uuid in entries(&directory).unwrap_or_default() {
        for device in entries(&directory.join(&uuid).join("devices")).unwrap_or_default() {
            found.push((device, format!("the mounted btrfs file system {uuid}")));
        }
    }
    found
}

fn exports(sysfs: &Sysfs) -> Vec<(PathBuf, String)> {
    let directory = sysfs.sys("kernel/config/nvmet/subsystems");
    let mut found = Vec::new();
    for subsystem in entries(&directory).unwrap_or_default() {
        let namespaces = directory.join(&subsystem).join("namespaces");
        for namespace in entries(&namespaces).unwrap_or_default() {
            let path = text(&namespaces.join(namespace).join("device_path"));
            found.extend(path.map(|path| (PathBuf::from(path), subsystem.clone())));
        }
    }
    found
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

/// Mounts of a block device, by its number, or by one of its names where the file system has a number of its own (btrfs).
/// Format: proc_pid_mountinfo(5).
fn mounted(name: &str, number: Option<&str>, nodes: &[String], mounts: &str) -> Vec<InUse> {
    let mut found = Vec::new();
    for line in mounts.lines() {
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let mut fields = before.split(' ');
        let (Some(device), Some(at)) = (fields.nth(2), fields.nth(1)) else { continue };
        let source = after.split(' ').nth(1);
        if Some(device) == number || source.is_some_and(|source| nodes.iter().any(|node| node == source)) {
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
        let at = |name: &str, number| mounted(name, number, &[format!("/dev/{name}")], mounts);
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
