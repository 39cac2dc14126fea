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

    /// A path below the machine's root.
    pub(crate) fn inside(&self, path: &Path) -> String {
        path.strip_prefix(self.root.path()).unwrap().display().to_string()
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
            "nvme0n1p1 is held by dm-0 (another block device)",
            "/dev/vfio/3 is open in process 77 (qemu)",
        ]
    );
}

/// A controller with one partition, and what was done to it.
fn uses_after(change: impl FnOnce(&FakeSystem)) -> Vec<String> {
    let system = FakeSystem::new();
    system.function("0000:01:00.0", NVME, Some("nvme"), Some(3));
    system.kernel_controller("0000:01:00.0");
    change(&system);
    controller(&system.sysfs(), address("01:00.0")).unwrap().in_use().map(ToString::to_string).collect()
}

#[test]
fn a_stack_of_block_devices_is_followed_to_its_top() {
    let uses = uses_after(|system| {
        system.write("sys/class/block/nvme0n1p1/holders/md127", "");
        system.write("sys/class/block/md127/md/level", "raid1\n");
        system.write("sys/class/block/md127/holders/dm-0", "");
        system.write("sys/class/block/dm-0/dm/name", "vault\n");
        system.write("sys/class/block/dm-0/dm/uuid", "CRYPT-LUKS2-0123-vault\n");
        system.write("sys/class/block/dm-0/holders/dm-1", "");
        system.write("sys/class/block/dm-1/dm/name", "vg0-root\n");
        system.write("sys/class/block/dm-1/dm/uuid", "LVM-abc\n");
        system.write("sys/class/block/dm-1/dev", "254:1\n");
        system.write("proc/self/mountinfo", "1 0 254:1 / / rw - ext4 /dev/mapper/vg0-root rw\n");
    });
    assert_eq!(
        uses,
        [
            "nvme0n1p1 is held by md127 (RAID array, raid1)",
            "md127 is held by dm-0 (encrypted volume vault)",
            "dm-0 is held by dm-1 (LVM volume vg0-root)",
            "dm-1 is mounted on /",
        ]
    );
}

#[test]
fn a_stack_that_leads_back_to_itself_ends() {
    let uses = uses_after(|system| {
        system.write("sys/class/block/nvme0n1p1/holders/dm-0", "");
        system.write("sys/class/block/dm-0/holders/dm-1", "");
        system.write("sys/class/block/dm-1/holders/dm-0", "");
    });
    assert_eq!(uses.len(), 3, "{uses:?}");
}

#[test]
fn uses_that_no_holder_shows_are_found() {
    let looped = uses_after(|system| {
        system.write("sys/class/block/loop3/loop/backing_file", "/dev/nvme0n1p1\n");
        system.write("sys/class/block/loop3/loop3p1/partition", "1\n");
        system.write("sys/class/block/loop3p1/dev", "259:9\n");
        system.write("proc/self/mountinfo", "1 0 259:9 / /mnt rw - vfat /dev/loop3p1 rw\n");
    });
    assert_eq!(looped, ["nvme0n1p1 is held by loop3 (loop device)", "loop3p1 is mounted on /mnt"]);

    let member = uses_after(|system| system.write("sys/fs/btrfs/1234-56/devices/nvme0n1p1", ""));
    assert_eq!(member, ["nvme0n1p1 belongs to the mounted btrfs file system 1234-56"]);

    let exported = uses_after(|system| {
        system.write("sys/kernel/config/nvmet/subsystems/nqn.x/namespaces/1/device_path", "/dev/nvme0n1\n");
    });
    assert_eq!(exported, ["nvme0n1 is offered to other hosts as nqn.x"]);

    // Swap on an encrypted partition, by the name that the mapper gives it.
    let swap = uses_after(|system| {
        system.write("sys/class/block/nvme0n1p1/holders/dm-5", "");
        system.link("dev/mapper/swap", "../dm-5");
        let table = "Filename Type Size Used Priority\n/dev/mapper/swap partition 1 0 -2\n";
        system.write("proc/swaps", table);
    });
    assert_eq!(swap[1], "dm-5 is swap space in use", "{swap:?}");

    // btrfs on LVM: the file system has a number of its own, and is mounted by the mapper's name.
    let mapped = uses_after(|system| {
        system.write("sys/class/block/nvme0n1/holders/dm-0", "");
        system.write("sys/class/block/dm-0/dm/name", "vg0-data\n");
        system.write("proc/self/mountinfo", "1 0 0:45 / /srv rw - btrfs /dev/mapper/vg0-data rw\n");
    });
    assert_eq!(mapped[1], "dm-0 is mounted on /srv", "{mapped:?}");
}

#[test]
fn a_program_with_a_node_open_is_told_once() {
    let uses = uses_after(|system| {
        for descriptor in 3..6 {
            system.link(&format!("proc/9/fd/{descriptor}"), "/dev/nvme0n1");
        }
        system.link("proc/9/fd/6", "/dev/nvme0");
        system.link("proc/10/fd/0", "/dev/nvme10");
        system.write("proc/9/comm", "smartd\n");
    });
    assert_eq!(
        uses,
        ["/dev/nvme0n1 is open in process 9 (smartd)", "/dev/nvme0 is open in process 9 (smartd)"]
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
    group(&system.sysfs(), 3).unwrap().check_viable(&[wanted]).unwrap();

    system.function("0000:01:00.3", "0x020000", Some("e1000e"), Some(3));
    let found = group(&system.sysfs(), 3).unwrap();
    assert_eq!(found.members.len(), 5);
    let error = found.check_viable(&[wanted]).unwrap_err().to_string();
    assert!(error.contains("0000:01:00.3, bound to the driver e1000e"), "{error}");
}
