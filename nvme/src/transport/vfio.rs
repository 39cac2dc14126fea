//! The transport to a controller on PCI that is bound to vfio-pci: registers are mapped, DMA memory goes through the
//! IOMMU, interrupts are eventfds.
//!
//! Opening looks first at everything that sysfs tells (`checks`), so that the usual obstacles have an error that says what
//! to do. Then: container, group, IOMMU, device (or, where there are nodes for devices alone: device, iommufd), bus master, BAR0.
//!
//! Invariants:
//! - the device is a bus master only while the transport lives, and reaches only memory that is mapped for it;
//! - when it is dropped: bus master off, interrupts off, BAR unmapped, device closed, then the group given back, also
//!   while somebody still holds a DMA region;
//! - nobody waits for a device that is gone: it is closed by a thread of its own;
//! - a device that is removed reads as all ones: whether by SIGBUS, by a failing call, or by a bus that answers zeroes.
//!
//! *Memory ordering*: see `bar`.
//!
//! The crate vfio-ioctls is not used, only its bindings: it keeps no error numbers where they matter here, and its device
//! panics when dropped after a hot removal, which would end a daemon that ends with the first panic.
//!
//! Excludes: binding drivers.

mod bar;
mod checks;
mod config;
mod dma;
mod info;
mod interrupts;
mod iommufd;
mod iova;
mod sys;

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nvme_spec::registers::DOORBELL_BASE;
use reactor::dma::DmaRegion;
use thiserror::Error;
use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_PCI_BAR0_REGION_INDEX,
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
};

use self::bar::Bar;
use self::checks::{Through, Way};
use self::config::{BusMaster, Config};
use self::dma::{Iommu, Mapper};
use self::interrupts::{Interrupts, Table};
use self::iommufd::{Iommufd, Linux};
use super::slab::{SHARED_SLAB, SlabPool};
use super::{Listen, Transport, TransportError};
use crate::pci::{PciAddress, PciError, Sysfs};

/// Why a controller on PCI could not be opened.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VfioError {
    /// There is none, or its group is not viable.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// It has no driver.
    #[error("{address}: bound to no driver; `pollux bind {address}` binds it to vfio-pci")]
    NoDriver {
        /// Where.
        address: PciAddress,
    },
    /// It has another driver.
    #[error("{address}: bound to the driver {driver}{in_use}; `pollux bind {address}` binds it to vfio-pci")]
    OtherDriver {
        /// Where.
        address: PciAddress,
        /// The driver.
        driver: String,
        /// What it is used for, with ` and in use: ` before it; empty if it is not.
        in_use: String,
    },
    /// No IOMMU.
    #[error(
        "{address}: it is in no IOMMU group; turn the IOMMU on in the firmware (VT-d, AMD-Vi) and for the kernel (`intel_iommu=on` \
         on its command line; AMD's is on by itself)"
    )]
    NoGroup {
        /// Where.
        address: PciAddress,
    },
    /// A group without protection.
    #[error(
        "{address}: group {group} is in VFIO's noiommu mode, where a device can write to any memory; turn the IOMMU on instead"
    )]
    WithoutIommu {
        /// Where.
        address: PciAddress,
        /// The group.
        group: u32,
    },
    /// The group's node is not there.
    #[error("{address}: {node} does not exist; load the module with `modprobe vfio-pci`", node = node.display())]
    NoNode {
        /// Where.
        address: PciAddress,
        /// The node.
        node: PathBuf,
    },
    /// The caller may not open the node.
    #[error("{address}: no permission for {node}; give it to the user, as with `chown $USER {node}`", node = node.display())]
    Permission {
        /// Where.
        address: PciAddress,
        /// The node.
        node: PathBuf,
    },
    /// Somebody else has it.
    #[error("{address}: {node} is in use by {by}", node = node.display())]
    Busy {
        /// Where.
        address: PciAddress,
        /// The node.
        node: PathBuf,
        /// Who.
        by: String,
    },
    /// Another error of opening the node.
    #[error("{address}: cannot open {node}: {source}", node = node.display())]
    Open {
        /// Where.
        address: PciAddress,
        /// The node.
        node: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Not enough memory can be locked.
    #[error("{address}: {advice}")]
    LockedMemory {
        /// Where.
        address: PciAddress,
        /// The limit, what is needed, and how to raise it.
        advice: String,
    },
    /// A step of opening failed.
    #[error("{address}: cannot {step}: {errno}{hint}")]
    Step {
        /// Where.
        address: PciAddress,
        /// Which.
        step: &'static str,
        /// The kernel's reason.
        errno: Errno,
        /// What may be done about it, with a separator before it.
        hint: &'static str,
    },
    /// The device is not what it should be.
    #[error("{address}: {problem}")]
    Device {
        /// Where.
        address: PciAddress,
        /// What is wrong.
        problem: String,
    },
}

const NO_HINT: &str = "";
const HINT_INTERRUPTS: &str = "; the kernel log says why, often that interrupt remapping is missing: turn it on in the firmware (with \
     `intremap=on` for QEMU's IOMMU)";
const HINT_TAKEN: &str = "; another program may have the device, or another device of its IOMMU group";

/// The way to a controller bound to vfio-pci.
pub struct VfioTransport {
    name: String,
    /// Taken by `drop` only.
    open: Option<OpenDevice>,
}

/// An open device. Fields are dropped in this order, after `drop` has stopped the device.
struct OpenDevice {
    interrupts: Interrupts,
    bar: Arc<Bar>,
    config: Config,
    can_reset: bool,
    /// Signalled when the device is to be given back; `None` if the kernel cannot tell.
    removal: Option<OwnedFd>,
    revoked: AtomicBool,
    /// Everything above holds it: after this field nobody does, and it is closed.
    device: Arc<File>,
    memory: Memory,
}

/// The pool; and the end of its mapper, although regions may hold it longer.
struct Memory(Arc<SlabPool<Mapper>>);

impl Drop for Memory {
    fn drop(&mut self) {
        self.0.mapper().close();
    }
}

impl VfioTransport {
    /// Opens the controller at `address` of this system. Blocks for some hundred milliseconds: the function is reset.
    ///
    /// # Errors
    /// What stands against it, and what to do.
    pub fn open(address: PciAddress) -> Result<Arc<Self>, VfioError> {
        Self::open_on(&Sysfs::default(), address)
    }

    /// As [`open`](Self::open), on a system that shows itself in `sysfs`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_on(sysfs: &Sysfs, address: PciAddress) -> Result<Arc<Self>, VfioError> {
        let way = checks::check(sysfs, address)?;
        checks::check_lock_limit(sysfs, address, SHARED_SLAB as u64)?;
        let opening = Opening { sysfs, address };
        let (device, iommu) = match &way.through {
            Through::Container => opening.by_group(&way)?,
            Through::Iommufd(iommufd) => opening.by_iommufd(&way, iommufd)?,
        };
        opening.finish(device, iommu)
    }
}

/// The steps of opening.
struct Opening<'a> {
    sysfs: &'a Sysfs,
    address: PciAddress,
}

impl Opening<'_> {
    fn failed(&self, step: &'static str) -> impl Fn(Errno) -> VfioError {
        let address = self.address;
        move |errno| VfioError::Step { address, step, errno, hint: NO_HINT }
    }

    fn broken(&self, problem: impl Into<String>) -> VfioError {
        VfioError::Device { address: self.address, problem: problem.into() }
    }

    fn open_node(&self, node: &Path) -> Result<OwnedFd, VfioError> {
        let opened = OpenOptions::new().read(true).write(true).open(node);
        opened.map(OwnedFd::from).map_err(|error| checks::refused(self.sysfs, self.address, node, error))
    }

    /// The device of a group that is put into a container with an IOMMU behind it.
    fn by_group(&self, way: &Way) -> Result<(Arc<File>, Iommu), VfioError> {
        let group = self.open_node(&way.node)?;
        let container = self.open_node(&self.sysfs.dev("vfio/vfio"))?;
        let version = sys::api_version(container.as_fd()).map_err(self.failed("ask VFIO for its version"))?;
        if version != VFIO_API_VERSION || !sys::has_type1(container.as_fd()) {
            return Err(self.broken(format!(
                "the kernel's VFIO (version {version}) has no type 1 IOMMU; load the module with `modprobe vfio_iommu_type1`"
            )));
        }
        if !sys::group_is_viable(group.as_fd()).map_err(self.failed("look at the group"))? {
            // sysfs showed nothing in the way a moment ago.
            return Err(
                self.broken(format!("group {} is not viable: not all of its devices are free", way.group))
            );
        }
        let hinted = |step| {
            let address = self.address;
            move |errno| {
                let hint = if errno == Errno::EPERM { HINT_INTERRUPTS } else { NO_HINT };
                VfioError::Step { address, step, errno, hint }
            }
        };
        sys::set_container(group.as_fd(), container.as_fd())
            .map_err(hinted("put the group into a container"))?;
        sys::set_type1(container.as_fd()).map_err(hinted("set the IOMMU up"))?;
        let name = CString::new(self.address.to_string()).expect("an address has no zero bytes");
        let device = sys::device(group.as_fd(), &name).map_err(self.failed("open the device"))?;
        Ok((Arc::new(File::from(device)), Iommu::Container { container, _group: group }))
    }

    /// The device by its own node, attached to an address space of its own.
    fn by_iommufd(&self, way: &Way, iommufd: &Path) -> Result<(Arc<File>, Iommu), VfioError> {
        let device = self.open_node(&way.node)?;
        let iommufd = self.open_node(iommufd)?;
        let attached = Iommufd::open(Arc::new(Linux), iommufd, device.as_fd()).map_err(|refused| {
            // Everybody may open the node, the first binds the device: EINVAL for the others.
            if matches!(refused.errno, Errno::EBUSY | Errno::EINVAL)
                && let Some(by) = checks::others(self.sysfs, &way.node)
            {
                return VfioError::Busy { address: self.address, node: way.node.clone(), by };
            }
            let hint = match refused.errno {
                Errno::EBUSY | Errno::EINVAL => HINT_TAKEN,
                Errno::EPERM => HINT_INTERRUPTS,
                _ => NO_HINT,
            };
            VfioError::Step { address: self.address, step: refused.step, errno: refused.errno, hint }
        })?;
        Ok((Arc::new(File::from(device)), Iommu::Iommufd(attached)))
    }

    /// From a device's descriptor to a transport.
    fn finish(&self, device: Arc<File>, iommu: Iommu) -> Result<Arc<VfioTransport>, VfioError> {
        let info =
            sys::device_info(device.as_fd()).map_err(self.failed("ask for the device's properties"))?;
        if info.flags & VFIO_DEVICE_FLAGS_PCI == 0 || info.regions <= VFIO_PCI_CONFIG_REGION_INDEX {
            return Err(self.broken("VFIO does not show it as a PCI device"));
        }
        let region = |index| sys::region_info(device.as_fd(), index).map_err(self.failed("look at its BARs"));
        let config = Config::new(Arc::clone(&device), region(VFIO_PCI_CONFIG_REGION_INDEX)?.offset);
        if config.is_gone() {
            return Err(self.broken("the device does not answer: it was removed or lost its power"));
        }
        let configured = |error: io::Error| self.broken(format!("cannot configure it: {error}"));
        // Before BAR0 is touched: with memory space off that is a SIGBUS.
        config.enable(BusMaster::Off).map_err(configured)?;
        let registers = region(VFIO_PCI_BAR0_REGION_INDEX)?;
        if registers.bytes <= DOORBELL_BASE {
            let bytes = registers.bytes;
            return Err(self.broken(format!("BAR0 has {bytes:#x} bytes, which no doorbells fit in")));
        }
        let mapped = |error: io::Error| self.broken(format!("cannot map its registers: {error}"));
        let bar = Arc::new(Bar::new(Arc::clone(&device), &registers).map_err(mapped)?);
        let vectors = sys::irq_count(device.as_fd(), VFIO_PCI_MSIX_IRQ_INDEX).unwrap_or_default();
        let table = self.msix_table(&device, &config, &registers, &bar);
        let mapper =
            Mapper::new(iommu, self.sysfs.clone()).map_err(self.failed("ask what the IOMMU can do"))?;
        let limit = mapper.limit();
        config.enable(BusMaster::On).map_err(configured)?;
        let interrupts = Interrupts::new(Arc::clone(&device), vectors, table);
        interrupts.prepare();
        let open = OpenDevice {
            interrupts,
            bar,
            config,
            can_reset: info.flags & VFIO_DEVICE_FLAGS_RESET != 0,
            removal: self.removal(&device),
            revoked: AtomicBool::new(false),
            device,
            memory: Memory(SlabPool::new(mapper, limit)),
        };
        Ok(Arc::new(VfioTransport { name: format!("pci:{}", self.address), open: Some(open) }))
    }

    /// The MSI-X table, if it can be mapped; it is needed only to hold interrupts back.
    fn msix_table(
        &self,
        device: &Arc<File>,
        config: &Config,
        registers: &sys::RegionInfo,
        bar: &Arc<Bar>,
    ) -> Option<Table> {
        let found = config.msix_table().ok().flatten()?;
        let (region, bar) = if found.bar == 0 {
            (registers.clone(), Arc::clone(bar))
        } else {
            let region = sys::region_info(device.as_fd(), found.bar.into()).ok()?;
            let bar = Bar::new(Arc::clone(device), &region).ok()?;
            (region, Arc::new(bar))
        };
        let mapped = bar.is_mapped(found.offset, u64::from(found.entries) * 16);
        (region.msix_mappable && mapped).then_some(Table {
            bar,
            offset: found.offset,
            entries: found.entries,
        })
    }

    fn removal(&self, device: &File) -> Option<OwnedFd> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let eventfd = OwnedFd::from(EventFd::from_value_and_flags(0, flags).ok()?);
        interrupts::tell_of_removal(device, eventfd.as_fd()).then_some(eventfd)
    }
}

impl OpenDevice {
    /// Whether a register that reads as zero does so because nobody answers: some buses give zeroes then.
    fn is_gone(&self) -> bool {
        self.bar.is_gone() || self.config.is_gone()
    }
}

impl Drop for OpenDevice {
    fn drop(&mut self) {
        // Fails if the device is gone. The kernel does it once more when the descriptor is closed.
        let _ = self.config.stop_bus_master();
    }
}

impl VfioTransport {
    #[inline]
    fn open_device(&self) -> &OpenDevice {
        self.open.as_ref().expect("only `drop` takes it")
    }
}

impl Drop for VfioTransport {
    fn drop(&mut self) {
        let open = self.open.take();
        if open.as_ref().is_some_and(OpenDevice::is_gone) {
            // The kernel resets the function on close. If it has not noticed that the device is gone, it waits for more than
            // a minute for an answer, which nobody here should have to. Without a thread the wait is ours.
            let closing = std::thread::Builder::new().name("vfio-close".to_owned());
            if let Err(error) = closing.spawn(move || drop(open)) {
                tracing::debug!(%error, "a device that is gone was closed without a thread");
            }
        }
    }
}

impl Transport for VfioTransport {
    fn name(&self) -> &str {
        &self.name
    }

    fn bar_bytes(&self) -> u64 {
        self.open_device().bar.bytes()
    }

    fn read32(&self, offset: u64) -> Result<u32, TransportError> {
        let open = self.open_device();
        let value = open.bar.read(offset)?;
        Ok(if value == 0 && open.is_gone() { u32::MAX } else { value })
    }

    fn read64(&self, offset: u64) -> Result<u64, TransportError> {
        let open = self.open_device();
        // In two halves, which every controller understands (NVMe 1.4 §3.1).
        let (low, high) = (open.bar.read(offset)?, open.bar.read(offset.wrapping_add(4))?);
        let value = u64::from(high) << 32 | u64::from(low);
        Ok(if value == 0 && open.is_gone() { u64::MAX } else { value })
    }

    fn write32(&self, offset: u64, value: u32) -> Result<(), TransportError> {
        self.open_device().bar.write(offset, value)
    }

    fn write64(&self, offset: u64, value: u64) -> Result<(), TransportError> {
        self.open_device().bar.write(offset, value as u32)?;
        self.open_device().bar.write(offset.wrapping_add(4), (value >> 32) as u32)
    }

    fn doorbell(&self, offset: u64, value: u32) {
        self.open_device().bar.doorbell(offset, value);
    }

    fn allocate(&self, bytes: usize) -> Result<Arc<dyn DmaRegion>, TransportError> {
        self.open_device().memory.0.allocate(bytes)
    }

    fn interrupt_vectors(&self) -> u16 {
        self.open_device().interrupts.vectors()
    }

    fn connect_interrupt(&self, vector: u16, eventfd: BorrowedFd<'_>) -> Result<(), TransportError> {
        self.open_device().interrupts.connect(vector, eventfd)
    }

    fn listen(&self, vector: u16, listen: Listen) {
        self.open_device().interrupts.listen(vector, listen);
    }

    fn revoke_dma(&self) -> Result<(), TransportError> {
        let open = self.open_device();
        // Before the bit is cleared, so that a reset does not set it again.
        open.revoked.store(true, Ordering::SeqCst);
        if let Err(error) = open.config.stop_bus_master() {
            tracing::warn!(device = self.name, %error, "bus master cannot be switched off");
        }
        // The IOMMU decides, whatever the device does.
        open.memory.0.mapper().revoke()
    }

    fn reset_function(&self) -> Result<(), TransportError> {
        const WHAT: &str = "reset the function";
        let open = self.open_device();
        if !open.can_reset {
            return Err(TransportError::Unsupported(WHAT));
        }
        let failed = |reason: String| TransportError::Failed { what: WHAT, reason };
        sys::reset(open.device.as_fd()).map_err(|errno| failed(errno.to_string()))?;
        if open.config.is_gone() {
            return Err(failed("the device does not answer any more".to_owned()));
        }
        let master = if open.revoked.load(Ordering::SeqCst) { BusMaster::Off } else { BusMaster::On };
        open.config.enable(master).map_err(|error| failed(error.to_string()))?;
        open.bar.map_anew().map_err(|error| failed(error.to_string()))
    }

    fn removal_event(&self) -> Option<BorrowedFd<'_>> {
        self.open_device().removal.as_ref().map(AsFd::as_fd)
    }
}
