//! IOMMU groups: the smallest set of devices that the IOMMU can tell from others, which VFIO hands out as a whole.
//!
//! Excludes: what a group's node in `/dev` allows.

use std::fs;
use std::path::{Path, PathBuf};

use super::{NVME_CLASS, PciAddress, PciError, Sysfs, driver, entries, hex, is_vfio_driver, link_name, text};

/// Base class and subclass of PCI bridges, which may keep their driver.
const BRIDGE_CLASS: u32 = 0x06_04;

/// Nodes that a program must be allowed to open for a controller that is bound to vfio-pci: its group's; or, where the kernel was
/// built with nodes for devices alone, the device's own and iommufd's. Empty while they are not there (yet).
pub fn vfio_nodes(sysfs: &Sysfs, address: PciAddress, group: u32) -> Vec<PathBuf> {
    let of_group = sysfs.dev(format!("vfio/{group}"));
    if of_group.exists() {
        return vec![of_group];
    }
    let iommufd = sysfs.dev("iommu");
    let devices = fs::read_dir(sysfs.function(address).join("vfio-dev")).into_iter().flatten().flatten();
    let mut nodes = devices.map(|entry| sysfs.dev("vfio/devices").join(entry.file_name()));
    match nodes.find(|node| node.exists()) {
        Some(node) if iommufd.exists() => vec![node, iommufd],
        _ => Vec::new(),
    }
}

/// A group and what is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IommuGroup {
    /// Its number: the node is `/dev/vfio/ID`.
    pub id: u32,
    /// Made by vfio's noiommu mode: there is no IOMMU behind it.
    pub without_iommu: bool,
    /// Its PCI functions, in order of address.
    pub members: Vec<GroupMember>,
}

/// A PCI function of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupMember {
    /// Where it is.
    pub address: PciAddress,
    /// Its class code.
    pub class: u32,
    /// The driver it is bound to.
    pub driver: Option<String>,
}

impl GroupMember {
    /// Whether VFIO hands the group out although this is in it: unbound, bound to VFIO, held back, or a bridge.
    fn stands_aside(&self) -> bool {
        match self.driver.as_deref() {
            None | Some("pci-stub" | "pcieport") => true,
            Some(driver) => is_vfio_driver(driver) || self.class >> 8 == BRIDGE_CLASS,
        }
    }
}

impl IommuGroup {
    /// Whether the group can be handed out for the devices `wanted`, which are looked at by the caller.
    ///
    /// # Errors
    /// [`PciError::GroupNotViable`], in the name of the first of `wanted`, with the devices in the way.
    pub fn check_viable(&self, wanted: &[PciAddress]) -> Result<(), PciError> {
        let in_the_way = |member: &&GroupMember| !wanted.contains(&member.address) && !member.stands_aside();
        let others: Vec<GroupMember> = self.members.iter().filter(in_the_way).cloned().collect();
        match wanted.first() {
            Some(&address) if !others.is_empty() => {
                Err(PciError::GroupNotViable { address, group: self.id, others })
            }
            _ => Ok(()),
        }
    }
}

/// Says which devices keep a group from being handed out, and what could be done.
pub(super) fn in_the_way(address: PciAddress, group: u32, others: &[GroupMember]) -> String {
    let named: Vec<String> = others
        .iter()
        .map(|other| {
            let driver = other.driver.as_deref().unwrap_or("none");
            format!("{}, bound to the driver {driver} ({})", other.address, kind(other.class))
        })
        .collect();
    let (nvme, rest): (Vec<_>, Vec<_>) = others.iter().partition(|other| other.class == NVME_CLASS);
    let mut ways = Vec::new();
    if !nvme.is_empty() {
        let all: Vec<String> = nvme.iter().map(|other| other.address.to_string()).collect();
        ways.push(format!(
            "bind the controllers together, if nobody uses them: `pollux bind {address} {}`",
            all.join(" ")
        ));
    }
    for other in rest {
        let at = other.address;
        ways.push(format!(
            "take {at} from its driver, if nobody needs it: `echo {at} > /sys/bus/pci/devices/{at}/driver/unbind`"
        ));
    }
    ways.push("or put the drive into a slot with a group of its own".to_owned());
    format!(
        "{address}: IOMMU group {group} also holds {}, and is handed out as a whole; {}",
        named.join(" and "),
        ways.join("; ")
    )
}

/// The kind of device of a class code (PCI Code and ID Assignment).
fn kind(class: u32) -> &'static str {
    match class >> 16 {
        _ if class == NVME_CLASS => "another NVMe controller",
        0x01 => "a storage controller",
        0x02 => "a network controller",
        0x03 => "a display controller",
        0x04 => "a multimedia device",
        0x06 => "a bridge",
        0x0c => "a serial bus controller, such as USB",
        0x12 => "an accelerator",
        _ => "a device of another kind",
    }
}

/// A group by its number.
///
/// # Errors
/// Its list of devices cannot be read.
pub fn group(sysfs: &Sysfs, id: u32) -> Result<IommuGroup, PciError> {
    let directory = sysfs.sys("kernel/iommu_groups").join(id.to_string());
    let mut members = Vec::new();
    for name in entries(&directory.join("devices"))? {
        // A group can hold devices of other buses; VFIO counts them, but they have no PCI address to name.
        let Ok(address) = name.parse::<PciAddress>() else { continue };
        let function = sysfs.function(address);
        let Some(class) = hex(&function.join("class")) else { continue };
        members.push(GroupMember { address, class, driver: driver(&function) });
    }
    members.sort_by_key(|member| member.address);
    let without_iommu = text(&directory.join("name")).as_deref() == Some("vfio-noiommu");
    Ok(IommuGroup { id, without_iommu, members })
}

/// The group of the device in `directory`.
pub(super) fn of(directory: &Path) -> Option<u32> {
    link_name(&directory.join("iommu_group"))?.parse().ok()
}
