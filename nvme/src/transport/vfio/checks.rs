//! What must be so before a controller is opened, looked up in sysfs: each thing that is not has its own error, which says
//! what to do.
//!
//! Excludes: what only opening tells (permissions, who was faster).

use std::fs;
use std::io;
use std::mem;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::VfioError;
use crate::pci::{self, InUse, PciAddress, PciController, Sysfs};

/// Bit of CAP_IPC_LOCK in a set of capabilities: locking memory without limit.
const CAP_IPC_LOCK: u32 = 14;

/// What is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Way {
    /// The group's number.
    pub(super) group: u32,
    /// The node that is opened: the group's, or the device's own.
    pub(super) node: PathBuf,
    /// What is behind it.
    pub(super) through: Through,
}

/// How a node leads to the IOMMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Through {
    /// The node is a group's: it goes into a container.
    Container,
    /// The node is a device's: it is bound to this node of iommufd.
    Iommufd(PathBuf),
}

/// Finds the way to a controller.
///
/// # Errors
/// The first thing that stands against opening it.
pub(super) fn check(sysfs: &Sysfs, address: PciAddress) -> Result<Way, VfioError> {
    let controller = pci::controller(sysfs, address)?;
    check_driver(&controller)?;
    let group = controller.iommu_group.ok_or(VfioError::NoGroup { address })?;
    let found = pci::group(sysfs, group)?;
    if found.without_iommu || sysfs.dev(format!("vfio/noiommu-{group}")).exists() {
        return Err(VfioError::WithoutIommu { address, group });
    }
    found.check_viable(&[address])?;
    match &mut *pci::vfio_nodes(sysfs, address, group) {
        [node, iommufd] => {
            let (node, iommufd) = (mem::take(node), mem::take(iommufd));
            Ok(Way { group, node, through: Through::Iommufd(iommufd) })
        }
        [node] => Ok(Way { group, node: mem::take(node), through: Through::Container }),
        _ => Err(VfioError::NoNode { address, node: sysfs.dev(format!("vfio/{group}")) }),
    }
}

fn check_driver(controller: &PciController) -> Result<(), VfioError> {
    let address = controller.address;
    match &controller.driver {
        Some(_) if controller.is_on_vfio() => Ok(()),
        None => Err(VfioError::NoDriver { address }),
        Some(driver) => {
            let uses: Vec<String> = controller.in_use().map(ToString::to_string).collect();
            let in_use =
                if uses.is_empty() { String::new() } else { format!(" and in use: {}", uses.join(", ")) };
            Err(VfioError::OtherDriver { address, driver: driver.clone(), in_use })
        }
    }
}

/// The error for a node that cannot be opened.
pub(super) fn refused(sysfs: &Sysfs, address: PciAddress, node: &Path, error: io::Error) -> VfioError {
    let node = node.to_owned();
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EACCES | Errno::EPERM) => VfioError::Permission { address, node },
        Some(Errno::ENOENT | Errno::ENODEV) => VfioError::NoNode { address, node },
        Some(Errno::EBUSY) => {
            let by =
                others(sysfs, &node).unwrap_or("another program (run this as root to see which)".to_owned());
            VfioError::Busy { address, node, by }
        }
        _ => VfioError::Open { address, node, source: error },
    }
}

/// The other programs that have a node open, as far as they can be seen.
pub(super) fn others(sysfs: &Sysfs, node: &Path) -> Option<String> {
    let own = std::process::id();
    let holders = pci::who_has_open(sysfs, node);
    let named: Vec<String> = holders
        .iter()
        .filter(|open| !matches!(open, InUse::Open { pid, .. } if *pid == own))
        .filter_map(program_of)
        .collect();
    (!named.is_empty()).then(|| named.join(", "))
}

fn program_of(open: &InUse) -> Option<String> {
    match open {
        InUse::Open { pid, program, .. } => Some(format!("process {pid} ({program})")),
        _ => None,
    }
}

/// How much memory this process may lock; `None` if there is no limit for it.
pub(super) fn lock_limit(sysfs: &Sysfs) -> Option<u64> {
    let status = fs::read_to_string(sysfs.proc("self/status")).unwrap_or_default();
    let effective = field(&status, "CapEff:").and_then(|set| u64::from_str_radix(set, 16).ok());
    if effective.is_some_and(|set| set >> CAP_IPC_LOCK & 1 == 1) {
        return None;
    }
    let limits = fs::read_to_string(sysfs.proc("self/limits")).unwrap_or_default();
    // Soft limit, in bytes, or `unlimited`.
    field(&limits, "Max locked memory")?.parse().ok()
}

/// Memory that this process has locked, in bytes; mappings for devices count.
pub(super) fn locked(sysfs: &Sysfs) -> u64 {
    let status = fs::read_to_string(sysfs.proc("self/status")).unwrap_or_default();
    field(&status, "VmLck:").and_then(|kilobytes| kilobytes.parse::<u64>().ok()).unwrap_or_default() << 10
}

/// First word behind a name at the beginning of a line.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next())
}

/// Whether `needed` more bytes can be locked.
///
/// # Errors
/// They cannot, with how to raise the limit.
pub(super) fn check_lock_limit(sysfs: &Sysfs, address: PciAddress, needed: u64) -> Result<(), VfioError> {
    match lock_limit(sysfs) {
        Some(limit) if limit.saturating_sub(locked(sysfs)) < needed => {
            let advice = lock_advice(sysfs, limit, needed);
            let advice =
                format!("{advice}; the buffers of each queue come on top, 64 MiB if nobody says otherwise");
            Err(VfioError::LockedMemory { address, advice })
        }
        _ => Ok(()),
    }
}

/// What to say when memory cannot be locked.
pub(super) fn lock_advice(sysfs: &Sysfs, limit: u64, needed: u64) -> String {
    let locked = locked(sysfs);
    let enough = locked.saturating_add(needed);
    format!(
        "this process may lock {limit} bytes of memory (RLIMIT_MEMLOCK), has locked {locked}, and needs {needed} more; allow at \
         least {enough}: `ulimit -l {}`, `LimitMEMLOCK={enough}` in a systemd unit, or a line `memlock` in \
         /etc/security/limits.conf",
        enough.div_ceil(1024),
    )
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

    /// A controller that can be opened.
    fn ready() -> FakeSystem {
        let system = FakeSystem::new();
        system.function(ADDRESS, NVME, Some("vfio-pci"), Some(7));
        system.write("dev/vfio/7", "");
        system
    }

    fn error(system: &FakeSystem) -> String {
        check(&system.sysfs(), address()).unwrap_err().to_string()
    }

    #[test]
    fn a_controller_on_vfio_has_a_way() {
        let system = ready();
        let way = check(&system.sysfs(), address()).unwrap();
        assert_eq!((way.group, way.node), (7, system.sysfs().dev("vfio/7")));
        assert_eq!(way.through, Through::Container);
    }

    #[test]
    fn a_controller_with_a_node_of_its_own_has_a_way_if_the_group_has_none() {
        let system = FakeSystem::new();
        system.function(ADDRESS, NVME, Some("vfio-pci"), Some(7));
        system.write(&format!("sys/bus/pci/devices/{ADDRESS}/vfio-dev/vfio3/dev"), "511:3\n");
        system.write("dev/vfio/devices/vfio3", "");
        assert!(error(&system).contains("modprobe vfio-pci"), "there is no iommufd: {}", error(&system));
        system.write("dev/iommu", "");
        let way = check(&system.sysfs(), address()).unwrap();
        assert_eq!(way.node, system.sysfs().dev("vfio/devices/vfio3"));
        assert_eq!(way.through, Through::Iommufd(system.sysfs().dev("iommu")));
        system.write("dev/vfio/7", "");
        let both = check(&system.sysfs(), address()).unwrap();
        assert_eq!(both.through, Through::Container, "the group's way is the one that was proved");
    }

    /// A device's own node is opened by everybody; who was second learns it when the device is bound to iommufd.
    #[test]
    fn the_others_that_have_a_node_open_are_named_and_this_program_is_not() {
        let system = FakeSystem::new();
        let node = system.sysfs().dev("vfio/devices/vfio3");
        for (pid, program) in [(77, "qemu"), (std::process::id(), "pollux")] {
            system.write(&format!("proc/{pid}/comm"), program);
            system.link(&format!("proc/{pid}/fd/5"), &node.to_string_lossy());
            let others = others(&system.sysfs(), &node);
            assert_eq!(others.as_deref(), Some("process 77 (qemu)"));
        }
        assert_eq!(others(&system.sysfs(), &system.sysfs().dev("vfio/devices/vfio4")), None);
    }

    #[test]
    fn an_absent_device_and_one_of_another_kind_are_told_apart() {
        assert!(error(&FakeSystem::new()).contains("0000:01:00.0: there is no such PCI device"));
        let system = FakeSystem::new();
        system.function(ADDRESS, "0x020000", Some("vfio-pci"), Some(7));
        assert!(error(&system).contains("not an NVMe controller"));
    }

    #[test]
    fn a_controller_without_driver_or_with_another_is_to_be_bound() {
        let system = FakeSystem::new();
        system.function(ADDRESS, NVME, None, Some(7));
        assert!(
            error(&system).contains("bound to no driver; `pollux bind 0000:01:00.0`"),
            "{}",
            error(&system)
        );
        system.function(ADDRESS, NVME, Some("nvme"), Some(7));
        let message = error(&system);
        assert!(
            message.contains("driver nvme;") && message.contains("`pollux bind 0000:01:00.0`"),
            "{message}"
        );
    }

    #[test]
    fn a_controller_in_use_says_by_what() {
        let system = FakeSystem::new();
        system.function(ADDRESS, NVME, Some("nvme"), Some(7));
        system.write(&format!("sys/bus/pci/devices/{ADDRESS}/nvme/nvme3/nvme3n1/size"), "8");
        system.write("proc/self/mountinfo", "1 0 259:0 / /home rw - ext4 /dev/nvme3n1 rw\n");
        assert!(error(&system).contains("in use: nvme3n1 is mounted on /home"), "{}", error(&system));
    }

    #[test]
    fn without_iommu_there_is_advice() {
        let system = FakeSystem::new();
        system.function(ADDRESS, NVME, Some("vfio-pci"), None);
        let message = error(&system);
        assert!(message.contains("intel_iommu=on") && message.contains("no IOMMU group"), "{message}");
    }

    #[test]
    fn noiommu_mode_is_refused() {
        let system = ready();
        system.write("sys/kernel/iommu_groups/7/name", "vfio-noiommu\n");
        assert!(error(&system).contains("noiommu"), "{}", error(&system));
        let system = ready();
        system.write("dev/vfio/noiommu-7", "");
        assert!(error(&system).contains("noiommu"), "{}", error(&system));
    }

    #[test]
    fn the_device_in_the_way_of_a_group_is_named() {
        let system = ready();
        system.function("0000:01:00.1", "0x020000", Some("e1000e"), Some(7));
        let message = error(&system);
        assert!(message.contains("0000:01:00.1, bound to the driver e1000e"), "{message}");
    }

    #[test]
    fn a_missing_node_names_the_module() {
        let system = FakeSystem::new();
        system.function(ADDRESS, NVME, Some("vfio-pci"), Some(7));
        assert!(error(&system).contains("modprobe vfio-pci"), "{}", error(&system));
    }

    #[test]
    fn refusals_of_the_node_say_what_to_do() {
        let system = ready();
        let sysfs = system.sysfs();
        let node = sysfs.dev("vfio/7");
        let says = |errno: Errno| refused(&sysfs, address(), &node, errno.into()).to_string();
        assert!(says(Errno::EACCES).contains("chown"), "{}", says(Errno::EACCES));
        assert!(says(Errno::EBUSY).contains("another program"), "{}", says(Errno::EBUSY));
        assert!(says(Errno::ENODEV).contains("modprobe vfio-pci"), "{}", says(Errno::ENODEV));
        assert!(says(Errno::EIO).contains("Input/output error"), "{}", says(Errno::EIO));
        system.link("proc/41/fd/3", node.to_str().unwrap());
        system.write("proc/41/comm", "polluxd\n");
        assert!(says(Errno::EBUSY).contains("process 41 (polluxd)"), "{}", says(Errno::EBUSY));
    }

    #[test]
    fn the_limit_on_locked_memory_says_how_much_is_needed() {
        let system = ready();
        let limits = |soft: &str| {
            system.write(
                "proc/self/limits",
                &format!("Limit  Soft Hard Units\nMax locked memory  {soft} {soft} bytes\n"),
            );
        };
        let check = || check_lock_limit(&system.sysfs(), address(), 16 << 20);
        system.write("proc/self/status", "Name: x\nCapEff:\t0000000000000000\nVmLck:\t    1024 kB\n");
        limits("65536");
        let message = check().unwrap_err().to_string();
        assert!(
            message.contains("needs 16777216 more") && message.contains("`ulimit -l 17408`"),
            "{message}"
        );
        limits("17825792");
        check().unwrap();
        limits("unlimited");
        check().unwrap();
        limits("0");
        system.write("proc/self/status", "CapEff:\t0000000000004000\n");
        check().unwrap();
    }
}
