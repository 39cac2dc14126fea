//! IOMMU groups: the smallest set of devices that the IOMMU can tell from others, which VFIO hands out as a whole.
//!
//! Excludes: what a group's node in `/dev` allows.

use std::path::Path;

use super::{PciAddress, PciError, Sysfs, driver, entries, hex, is_vfio_driver, link_name, text};

/// Base class and subclass of PCI bridges, which may keep their driver.
const BRIDGE_CLASS: u32 = 0x06_04;

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
    /// Whether the group can be handed out for the device at `address`, which is looked at by the caller.
    ///
    /// # Errors
    /// [`PciError::GroupNotViable`] with the first device in the way.
    pub fn check_viable(&self, address: PciAddress) -> Result<(), PciError> {
        let in_the_way =
            self.members.iter().find(|member| member.address != address && !member.stands_aside());
        match in_the_way {
            None => Ok(()),
            Some(other) => Err(PciError::GroupNotViable {
                address,
                group: self.id,
                other: other.address,
                driver: other.driver.clone().unwrap_or_default(),
            }),
        }
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
