//! Discovery on trees that look like sysfs.

use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::*;

/// A machine made of files.
pub(crate) struct FakeSystem {
    root: TempDir,
}

impl FakeSystem {
    pub(crate) fn new() -> Self {
        Self { root: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn sysfs(&self) -> Sysfs {
        Sysfs::under(self.root.path())
    }

    pub(crate) fn write(&self, path: &str, contents: &str) {
        let path = self.root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, contents).unwrap();
    }

    pub(crate) fn link(&self, path: &str, target: &str) {
        let path = self.root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let _ = fs::remove_file(&path);
        symlink(target, path).unwrap();
    }

    /// A function with its class, and a driver and group if it has them.
    pub(crate) fn function(&self, address: &str, class: &str, driver: Option<&str>, group: Option<u32>) {
        let directory = format!("sys/bus/pci/devices/{address}");
        self.write(&format!("{directory}/class"), &format!("{class}\n"));
        self.write(&format!("{directory}/vendor"), "0x144d\n");
        self.write(&format!("{directory}/device"), "0xa80a\n");
        self.write(&format!("{directory}/numa_node"), "-1\n");
        if let Some(driver) = driver {
            self.link(&format!("{directory}/driver"), &format!("../../../../bus/pci/drivers/{driver}"));
        }
        if let Some(group) = group {
            self.link(
                &format!("{directory}/iommu_group"),
                &format!("../../../../kernel/iommu_groups/{group}"),
            );
            self.write(&format!("sys/kernel/iommu_groups/{group}/devices/{address}"), "");
        }
    }

    /// What the kernel's driver shows of a controller with one namespace and one partition.
    fn kernel_controller(&self, address: &str) {
        let directory = format!("sys/bus/pci/devices/{address}/nvme/nvme0");
        self.write(&format!("{directory}/model"), "Model 9                 \n");
        self.write(&format!("{directory}/serial"), "S1\n");
        self.write(&format!("{directory}/firmware_rev"), "1.0\n");
        self.write(&format!("{directory}/nvme0c0n1/size"), "8\n");
        self.write("sys/class/block/nvme0n1/dev", "259:0\n");
        self.write("sys/class/block/nvme0n1/size", "2048\n");
        self.write("sys/class/block/nvme0n1/nvme0n1p1/partition", "1\n");
        self.write("sys/class/block/nvme0n1p1/dev", "259:1\n");
    }
}

const NVME: &str = "0x010802";

fn address(text: &str) -> PciAddress {
    text.parse().unwrap()
}

#[test]
fn a_host_without_pci_has_no_controllers() {
    assert_eq!(controllers(&FakeSystem::new().sysfs()).unwrap(), []);
}

#[test]
fn only_nvme_controllers_are_found_in_order() {
    let system = FakeSystem::new();
    system.function("0000:02:00.0", NVME, None, None);
    system.function("0000:01:00.0", NVME, Some("vfio-pci"), Some(3));
    system.function("0000:00:1f.2", "0x010601", Some("ahci"), Some(4));
    system.function("0000:03:00.0", "0x010803", None, None);
    system.write("sys/bus/pci/devices/nonsense", "");
    let found = controllers(&system.sysfs()).unwrap();
    let addresses: Vec<_> = found.iter().map(|found| found.address.to_string()).collect();
    assert_eq!(addresses, ["0000:01:00.0", "0000:02:00.0"]);
    assert_eq!((found[0].vendor_id, found[0].device_id), (0x144d, 0xa80a));
    assert_eq!((found[0].iommu_group, found[1].iommu_group), (Some(3), None));
    assert!(found[0].is_on_vfio() && !found[1].is_on_vfio());
    assert_eq!((&found[0].model, found[0].numa_node), (&None, None));
    assert_eq!(found[0].in_use().count(), 0);
}

#[test]
fn the_kernels_driver_tells_model_and_namespaces() {
    let system = FakeSystem::new();
    system.function("0000:01:00.0", NVME, Some("nvme"), Some(3));
    system.kernel_controller("0000:01:00.0");
    system.write("sys/bus/pci/devices/0000:01:00.0/numa_node", "1\n");
    let found = controller(&system.sysfs(), address("01:00.0")).unwrap();
    assert_eq!(found.kernel_name.as_deref(), Some("nvme0"));
    assert_eq!((found.model.as_deref(), found.serial.as_deref()), (Some("Model 9"), Some("S1")));
    assert_eq!((found.firmware.as_deref(), found.numa_node), (Some("1.0"), Some(1)));
    let names: Vec<_> = found.block_devices.iter().map(|device| device.name.as_str()).collect();
    assert_eq!(names, ["nvme0n1", "nvme0n1p1"]);
    assert_eq!(found.block_devices[0].bytes, Some(1 << 20));
    assert_eq!(found.in_use().count(), 0);
}

#[test]
fn every_kind_of_use_is_told() {
    let system = FakeSystem::new();
    system.function("0000:01:00.0", NVME, Some("nvme"), Some(3));
    system.kernel_controller("0000:01:00.0");
    system.write("proc/self/mountinfo", "30 22 259:1 / /mnt/a\\040b rw - xfs /dev/nvme0n1p1 rw\n");
    system.write("proc/swaps", "Filename Type Size Used Priority\n/dev/nvme0n1 partition 1 0 -2\n");
    system.write("sys/class/block/nvme0n1p1/holders/dm-0", "");
    system.link("proc/77/fd/5", "/dev/vfio/3");
    system.link("proc/77/fd/6", "/dev/null");
    system.write("proc/77/comm", "qemu\n");
    let found = controller(&system.sysfs(), address("01:00.0")).unwrap();
    let uses: Vec<_> = found.in_use().map(ToString::to_string).collect();
    assert_eq!(
        uses,
        [
            "nvme0n1 is swap space in use",
            "nvme0n1p1 is mounted on /mnt/a b",
            "nvme0n1p1 is held by dm-0",
            "/dev/vfio/3 is open in process 77 (qemu)",
        ]
    );
}

#[test]
fn an_address_without_a_controller_is_told_apart_from_another_device() {
    let system = FakeSystem::new();
    system.function("0000:00:1f.2", "0x010601", Some("ahci"), None);
    let absent = controller(&system.sysfs(), address("05:00.0")).unwrap_err();
    assert!(matches!(absent, PciError::Absent(_)), "{absent}");
    let other = controller(&system.sysfs(), address("00:1f.2")).unwrap_err();
    assert!(other.to_string().contains("its class is 0x010601"), "{other}");
}

#[test]
fn a_group_is_viable_with_bridges_and_free_devices_only() {
    let system = FakeSystem::new();
    system.function("0000:01:00.0", NVME, Some("vfio-pci"), Some(3));
    system.function("0000:00:01.0", "0x060400", Some("pcieport"), Some(3));
    system.function("0000:01:00.1", "0x020000", None, Some(3));
    system.function("0000:01:00.2", "0x020000", Some("pci-stub"), Some(3));
    let wanted = address("01:00.0");
    group(&system.sysfs(), 3).unwrap().check_viable(wanted).unwrap();

    system.function("0000:01:00.3", "0x020000", Some("e1000e"), Some(3));
    let found = group(&system.sysfs(), 3).unwrap();
    assert_eq!(found.members.len(), 5);
    let error = found.check_viable(wanted).unwrap_err().to_string();
    assert!(error.contains("0000:01:00.3, bound to the driver e1000e"), "{error}");
}
