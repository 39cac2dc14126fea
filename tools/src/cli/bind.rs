//! `pollux bind` and `pollux unbind`: a controller to vfio-pci, and back to the kernel's driver.

use clap::Args;
use nvme::PciAddress;
use nvme::pci::{self, Sysfs};

use crate::failure::{During, Failure};
use crate::output::outln;

/// Bind an NVMe controller to vfio-pci, so that `pci:ADDR` devices can be opened
#[derive(Args)]
#[command(after_help = "\
Refuses a controller with a mounted or held namespace, and one whose IOMMU group holds a device that the kernel uses.
To use the device without root afterwards, give the group's node to the user: chown USER /dev/vfio/GROUP

Example:
  pollux bind 0000:01:00.0")]
pub(super) struct Bind {
    /// PCI address, as `pollux list` shows it
    #[arg(value_name = "ADDR")]
    address: PciAddress,
}

impl Bind {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let sysfs = Sysfs::default();
        pci::bind(&sysfs, self.address).during("cannot bind to vfio-pci")?;
        let found = pci::controller(&sysfs, self.address).during("cannot look at it again")?;
        match found.iommu_group {
            Some(group) => outln!("{}: bound to vfio-pci; its node is /dev/vfio/{group}", self.address),
            None => outln!("{}: bound to vfio-pci", self.address),
        }
        Ok(())
    }
}

/// Give an NVMe controller back to the kernel's driver
#[derive(Args)]
#[command(after_help = "\
Example:
  pollux unbind 0000:01:00.0")]
pub(super) struct Unbind {
    /// PCI address, as `pollux list` shows it
    #[arg(value_name = "ADDR")]
    address: PciAddress,
}

impl Unbind {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let sysfs = Sysfs::default();
        pci::unbind(&sysfs, self.address).during("cannot unbind")?;
        let found = pci::controller(&sysfs, self.address).during("cannot look at it again")?;
        match found.driver {
            Some(driver) => outln!("{}: bound to {driver}", self.address),
            None => outln!("{}: bound to no driver: the kernel has none for it", self.address),
        }
        Ok(())
    }
}
