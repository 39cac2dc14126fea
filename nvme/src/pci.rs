//! PCI as sysfs shows it: NVMe controllers, the drivers and IOMMU groups they are in, and who uses them.
//!
//! Everything is read from a [`Sysfs`], so that tests and tools can look at a tree of their own.
//!
//! Invariants: but for [`bind()`] and [`unbind()`] nothing is written to, and no device is opened; what a system does not show (no IOMMU, no kernel
//! driver) is `None` or empty, never an error; a device that disappears while it is looked at is left out.
//!
//! Excludes: opening devices (the VFIO transport).

mod address;
mod bind;
mod group;
mod in_use;
mod open_files;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

pub use address::{PciAddress, PciAddressError, PciAddressProblem};
pub use bind::{BindError, Outcome as BindOutcome, Plan as BindPlan, Step as BindStep, bind, unbind};
pub use group::{GroupMember, IommuGroup, group, vfio_nodes};
use in_use::Uses;
pub use in_use::{BlockDevice, InUse};
pub use open_files::who_has_open;

/// Class code of NVM Express controllers: mass storage, non-volatile memory, NVMe I/O (PCI Code and ID Assignment).
pub const NVME_CLASS: u32 = 0x01_08_02;

/// Where the system shows itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sysfs {
    sys: PathBuf,
    proc: PathBuf,
    dev: PathBuf,
    run: PathBuf,
}

impl Default for Sysfs {
    /// The running system.
    fn default() -> Self {
        Self::under("/")
    }
}

impl Sysfs {
    /// `sys`, `proc`, `dev` and `run` below `root`.
    pub fn under(root: impl AsRef<Path>) -> Self {
        let root = root.as_ref();
        let below = |name| root.join(name);
        Self { sys: below("sys"), proc: below("proc"), dev: below("dev"), run: below("run") }
    }

    /// A path below `/proc`.
    pub fn proc(&self, path: impl AsRef<Path>) -> PathBuf {
        self.proc.join(path)
    }

    /// A path below `/dev`.
    pub fn dev(&self, path: impl AsRef<Path>) -> PathBuf {
        self.dev.join(path)
    }

    /// A path below `/run`.
    pub fn run(&self, path: impl AsRef<Path>) -> PathBuf {
        self.run.join(path)
    }

    /// A path below `/sys`.
    pub fn sys(&self, path: impl AsRef<Path>) -> PathBuf {
        self.sys.join(path)
    }

    /// The directory of a PCI function.
    pub fn function(&self, address: PciAddress) -> PathBuf {
        self.sys.join("bus/pci/devices").join(address.to_string())
    }
}

/// Why PCI could not be looked at.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PciError {
    /// A file or directory of sysfs.
    #[error("cannot read {path}: {source}", path = path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// No such function.
    #[error("{0}: there is no such PCI device; `pollux list` shows the NVMe controllers of this host")]
    Absent(PciAddress),
    /// A function of another kind.
    #[error(
        "{address}: not an NVMe controller (its class is {class:#08x}, not {NVME_CLASS:#08x}); `pollux list` shows those there are"
    )]
    NotNvme {
        /// Where.
        address: PciAddress,
        /// Its class code.
        class: u32,
    },
    /// Other devices of the group are in use by the kernel.
    #[error("{}", group::in_the_way(*address, *group, others))]
    GroupNotViable {
        /// The device that is wanted.
        address: PciAddress,
        /// Its group.
        group: u32,
        /// The devices in the way; at least one.
        others: Vec<GroupMember>,
    },
}

/// An NVMe controller on PCI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciController {
    /// Where it is.
    pub address: PciAddress,
    /// PCI vendor.
    pub vendor_id: u16,
    /// PCI device.
    pub device_id: u16,
    /// The driver it is bound to.
    pub driver: Option<String>,
    /// Number of its IOMMU group; `None` if no IOMMU is on.
    pub iommu_group: Option<u32>,
    /// The node of memory and processors that it is close to; `None` if the system does not know.
    pub numa_node: Option<u32>,
    /// What the kernel calls it, such as `nvme0`; `None` unless the kernel's driver has it.
    pub kernel_name: Option<String>,
    /// Model, if the kernel's driver shows it.
    pub model: Option<String>,
    /// Serial number, if the kernel's driver shows it.
    pub serial: Option<String>,
    /// Revision of the firmware, if the kernel's driver shows it.
    pub firmware: Option<String>,
    /// The kernel's block devices on it: namespaces and their partitions.
    pub block_devices: Vec<BlockDevice>,
    /// Programs that have a node of the controller itself open, the kernel's or VFIO's, as far as the caller may see them.
    pub opened_by: Vec<InUse>,
}

impl PciController {
    /// Everything that uses the controller now; empty if it is free to be bound.
    pub fn in_use(&self) -> impl Iterator<Item = &InUse> {
        self.block_devices.iter().flat_map(|device| &device.in_use).chain(&self.opened_by)
    }

    /// Whether it is bound to vfio-pci or a driver derived from it.
    pub fn is_on_vfio(&self) -> bool {
        self.driver.as_deref().is_some_and(is_vfio_driver)
    }
}

/// Drivers that hand a device to user space through VFIO: vfio-pci, and those for single devices, named after it.
pub(crate) fn is_vfio_driver(name: &str) -> bool {
    name == "vfio-pci" || name.ends_with("_vfio_pci") || name.ends_with("-vfio-pci")
}

/// The NVMe controllers of this system, in order of address. Empty where there is no PCI.
///
/// # Errors
/// The list of PCI devices is there and cannot be read.
pub fn controllers(sysfs: &Sysfs) -> Result<Vec<PciController>, PciError> {
    let uses = Uses::look(sysfs);
    let mut found = Vec::new();
    for name in entries(&sysfs.sys("bus/pci/devices"))? {
        let Ok(address) = name.parse::<PciAddress>() else { continue };
        match look_at(sysfs, address, &uses) {
            Ok(controller) => found.push(controller),
            // Gone since the list was read, or something else than NVMe.
            Err(PciError::Absent(_) | PciError::NotNvme { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    found.sort_by_key(|controller| controller.address);
    Ok(found)
}

/// One NVMe controller.
///
/// # Errors
/// There is nothing at this address, or something else.
pub fn controller(sysfs: &Sysfs, address: PciAddress) -> Result<PciController, PciError> {
    look_at(sysfs, address, &Uses::look(sysfs))
}

fn look_at(sysfs: &Sysfs, address: PciAddress, uses: &Uses<'_>) -> Result<PciController, PciError> {
    let directory = sysfs.function(address);
    let class = hex(&directory.join("class")).ok_or(PciError::Absent(address))?;
    if class != NVME_CLASS {
        return Err(PciError::NotNvme { address, class });
    }
    let iommu_group = group::of(&directory);
    let kernel_name = entries(&directory.join("nvme"))?.into_iter().min();
    let shown = |name: &str| {
        let kernel = directory.join("nvme").join(kernel_name.as_deref()?);
        text(&kernel.join(name)).filter(|shown| !shown.is_empty())
    };
    let block_devices = match &kernel_name {
        Some(name) => uses.block_devices(&directory.join("nvme").join(name))?,
        None => Vec::new(),
    };
    Ok(PciController {
        address,
        vendor_id: hex(&directory.join("vendor")).unwrap_or_default() as u16,
        device_id: hex(&directory.join("device")).unwrap_or_default() as u16,
        driver: driver(&directory),
        iommu_group,
        // -1 where the firmware does not say.
        numa_node: text(&directory.join("numa_node")).and_then(|node| node.parse().ok()),
        model: shown("model"),
        serial: shown("serial"),
        firmware: shown("firmware_rev"),
        opened_by: nodes(&directory, iommu_group, kernel_name.as_deref(), &block_devices)?
            .iter()
            .flat_map(|node| uses.open(node))
            .collect(),
        block_devices,
        kernel_name,
    })
}

/// Nodes of the controller itself: of its IOMMU group, and those for commands to it and to its namespaces.
fn nodes(
    directory: &Path,
    group: Option<u32>,
    kernel_name: Option<&str>,
    block_devices: &[BlockDevice],
) -> Result<Vec<PathBuf>, PciError> {
    let dev = Path::new("/dev");
    let mut nodes: Vec<PathBuf> = group.map(|group| dev.join(format!("vfio/{group}"))).into_iter().collect();
    for name in entries(&directory.join("vfio-dev"))? {
        nodes.push(dev.join("vfio/devices").join(name));
    }
    nodes.extend(kernel_name.map(|name| dev.join(name)));
    // `nvme0n1` is `ng0n1` for commands.
    let namespaces = block_devices.iter().filter(|device| !device.is_partition);
    let numbers = namespaces.filter_map(|device| device.name.strip_prefix("nvme"));
    nodes.extend(numbers.map(|numbers| dev.join(format!("ng{numbers}"))));
    Ok(nodes)
}

/// Name of the driver of the device in `directory`.
fn driver(directory: &Path) -> Option<String> {
    link_name(&directory.join("driver"))
}

/// Last component of where a link points.
fn link_name(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    Some(target.file_name()?.to_string_lossy().into_owned())
}

/// Contents of a file without the white space around it.
fn text(path: &Path) -> Option<String> {
    Some(String::from_utf8_lossy(&fs::read(path).ok()?).trim().to_owned())
}

/// A number that sysfs shows as `0x…`.
fn hex(path: &Path) -> Option<u32> {
    u32::from_str_radix(text(path)?.trim_start_matches("0x"), 16).ok()
}

/// Names in a directory, sorted; none if it does not exist.
fn entries(path: &Path) -> Result<Vec<String>, PciError> {
    let failed = |source| PciError::Read { path: path.to_owned(), source };
    let directory = match fs::read_dir(path) {
        Ok(directory) => directory,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut names = Vec::new();
    for entry in directory {
        names.push(entry.map_err(failed)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
pub(crate) mod tests;
