//! Giving controllers to vfio-pci and back to the kernel, by the files of sysfs (Documentation/ABI/testing/sysfs-bus-pci).
//!
//! Invariants: a controller that anybody uses is left where it is; a controller that vfio-pci does not take goes back to
//! the driver it had.
//!
//! Excludes: giving the group's node to a user.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::{PciAddress, PciController, PciError, Sysfs, controller, driver, group};

const VFIO_PCI: &str = "vfio-pci";

/// Why a controller could not be given to another driver.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BindError {
    /// There is no such controller, or its group is not viable.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// Somebody uses it.
    #[error("{address}: in use: {uses}")]
    InUse {
        /// Where.
        address: PciAddress,
        /// By what.
        uses: String,
    },
    /// No IOMMU: vfio-pci would have it, but nobody could use it.
    #[error(
        "{address}: it is in no IOMMU group; turn the IOMMU on in the firmware and for the kernel (`intel_iommu=on`)"
    )]
    NoGroup {
        /// Where.
        address: PciAddress,
    },
    /// The driver vfio-pci is not there.
    #[error("{address}: the kernel has no driver vfio-pci; load it with `modprobe vfio-pci`")]
    NoVfio {
        /// Where.
        address: PciAddress,
    },
    /// sysfs refused.
    #[error("{address}: cannot write {path}: {source}{hint}", path = path.display())]
    Write {
        /// Where.
        address: PciAddress,
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
        /// What may be done about it, with a separator before it.
        hint: &'static str,
    },
    /// vfio-pci was asked and did not take it.
    #[error("{address}: vfio-pci does not take it; the kernel log says why")]
    NotTaken {
        /// Where.
        address: PciAddress,
    },
}

/// Binds a controller to vfio-pci. Does nothing if it is there already.
///
/// # Errors
/// It is in use, its group is not viable, or the system refuses.
pub fn bind(sysfs: &Sysfs, address: PciAddress) -> Result<(), BindError> {
    let found = controller(sysfs, address)?;
    if found.is_on_vfio() {
        return Ok(());
    }
    check_free(&found)?;
    let id = found.iommu_group.ok_or(BindError::NoGroup { address })?;
    group(sysfs, id)?.check_viable(address)?;
    if !sysfs.sys("bus/pci/drivers").join(VFIO_PCI).exists() {
        return Err(BindError::NoVfio { address });
    }
    let moved = offer(sysfs, address, VFIO_PCI);
    if moved.is_ok() && driver(&sysfs.function(address)).as_deref() == Some(VFIO_PCI) {
        return Ok(());
    }
    // Back to where it was; what went wrong first is what is told.
    let _ = offer(sysfs, address, "");
    moved.and(Err(BindError::NotTaken { address }))
}

/// Gives a controller back to the kernel's driver, if there is one. Does nothing if it is not on VFIO.
///
/// # Errors
/// A program has it open, or the system refuses.
pub fn unbind(sysfs: &Sysfs, address: PciAddress) -> Result<(), BindError> {
    let found = controller(sysfs, address)?;
    if found.driver.is_some() && !found.is_on_vfio() {
        return Ok(());
    }
    // The kernel would wait for as long as the device is open.
    check_free(&found)?;
    offer(sysfs, address, "")
}

fn check_free(found: &PciController) -> Result<(), BindError> {
    let uses: Vec<String> = found.in_use().map(ToString::to_string).collect();
    if uses.is_empty() {
        return Ok(());
    }
    Err(BindError::InUse { address: found.address, uses: uses.join(", ") })
}

/// Takes the device from its driver and has the kernel look for another: only `wanted`, or any that matches if empty.
fn offer(sysfs: &Sysfs, address: PciAddress, wanted: &str) -> Result<(), BindError> {
    let directory = sysfs.function(address);
    // An empty line clears it; nothing at all would be no write.
    write(address, &directory.join("driver_override"), &format!("{wanted}\n"))?;
    if driver(&directory).is_some() {
        write(address, &directory.join("driver/unbind"), &address.to_string())?;
    }
    write(address, &sysfs.sys("bus/pci/drivers_probe"), &address.to_string())
}

fn write(address: PciAddress, path: &Path, text: &str) -> Result<(), BindError> {
    fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| io::Write::write_all(&mut file, text.as_bytes()))
        .map_err(|source| {
            let denied = source.kind() == io::ErrorKind::PermissionDenied;
            let hint = if denied { "; only root may bind drivers" } else { "" };
            BindError::Write { address, path: path.to_owned(), source, hint }
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::tests::FakeSystem;

    const ADDRESS: &str = "0000:01:00.0";
    const NVME: &str = "0x010802";

    fn address() -> PciAddress {
        ADDRESS.parse().unwrap()
    }

    /// A controller on `driver`, with the files that binding writes to.
    fn system(driver: Option<&str>) -> FakeSystem {
        let system = FakeSystem::new();
        system.function(ADDRESS, NVME, driver, Some(7));
        system.write(&format!("sys/bus/pci/devices/{ADDRESS}/driver_override"), "");
        system.write("sys/bus/pci/drivers_probe", "");
        for driver in ["nvme", VFIO_PCI] {
            system.write(&format!("sys/bus/pci/drivers/{driver}/unbind"), "");
        }
        system
    }

    fn read(system: &FakeSystem, path: &str) -> String {
        fs::read_to_string(system.sysfs().sys(path)).unwrap()
    }

    #[test]
    fn a_controller_is_taken_from_its_driver_and_offered_to_vfio_only() {
        let system = system(Some("nvme"));
        // Nobody acts on the files here, so it stays where it is, and is given back.
        let error = bind(&system.sysfs(), address()).unwrap_err().to_string();
        assert!(error.contains("vfio-pci does not take it"), "{error}");
        assert_eq!(read(&system, "bus/pci/drivers/nvme/unbind"), ADDRESS);
        assert_eq!(read(&system, "bus/pci/drivers_probe"), ADDRESS);
        let override_file = format!("bus/pci/devices/{ADDRESS}/driver_override");
        assert!(read(&system, &override_file).starts_with('\n'), "the override was cleared");
    }

    #[test]
    fn a_controller_on_vfio_stays_and_goes_back() {
        let system = system(Some(VFIO_PCI));
        bind(&system.sysfs(), address()).unwrap();
        assert_eq!(read(&system, "bus/pci/drivers_probe"), "");
        unbind(&system.sysfs(), address()).unwrap();
        assert_eq!(read(&system, "bus/pci/drivers/vfio-pci/unbind"), ADDRESS);
        assert_eq!(read(&system, "bus/pci/drivers_probe"), ADDRESS);
    }

    #[test]
    fn a_controller_of_the_kernel_need_not_be_given_back() {
        let system = system(Some("nvme"));
        unbind(&system.sysfs(), address()).unwrap();
        assert_eq!(read(&system, "bus/pci/drivers/nvme/unbind"), "");
    }

    #[test]
    fn what_is_used_is_left_alone() {
        let mounted = system(Some("nvme"));
        mounted.write(&format!("sys/bus/pci/devices/{ADDRESS}/nvme/nvme0/nvme0n1/size"), "8");
        mounted.write("proc/self/mountinfo", "1 0 259:0 / /home rw - ext4 /dev/nvme0n1 rw\n");
        let error = bind(&mounted.sysfs(), address()).unwrap_err().to_string();
        assert!(error.contains("nvme0n1 is mounted on /home"), "{error}");
        assert_eq!(read(&mounted, "bus/pci/drivers/nvme/unbind"), "");

        let open = system(Some(VFIO_PCI));
        open.link("proc/41/fd/3", "/dev/vfio/7");
        let error = unbind(&open.sysfs(), address()).unwrap_err().to_string();
        assert!(error.contains("/dev/vfio/7 is open in process 41"), "{error}");
        assert_eq!(read(&open, "bus/pci/drivers/vfio-pci/unbind"), "");
    }

    #[test]
    fn nothing_is_touched_where_vfio_could_not_use_it() {
        let lonely = FakeSystem::new();
        lonely.function(ADDRESS, NVME, Some("nvme"), None);
        assert!(matches!(bind(&lonely.sysfs(), address()), Err(BindError::NoGroup { .. })));

        let crowded = system(Some("nvme"));
        crowded.function("0000:01:00.1", "0x020000", Some("e1000e"), Some(7));
        let error = bind(&crowded.sysfs(), address()).unwrap_err().to_string();
        assert!(error.contains("0000:01:00.1, bound to the driver e1000e"), "{error}");

        let unloaded = FakeSystem::new();
        unloaded.function(ADDRESS, NVME, Some("nvme"), Some(7));
        let error = bind(&unloaded.sysfs(), address()).unwrap_err().to_string();
        assert!(error.contains("modprobe vfio-pci"), "{error}");
    }
}
