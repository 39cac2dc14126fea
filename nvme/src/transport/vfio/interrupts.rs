//! MSI-X vectors behind eventfds, and the two notifications of VFIO itself.
//!
//! All vectors are enabled together: kernels before 6.5 cannot add one later. Those that nobody connected raise nothing. That
//! is done before the controller is enabled: a controller may look only then whether its admin queue has MSI-X, as QEMU's
//! does, and stay silent for good.
//!
//! A vector is held back by its mask bit in the MSI-X table, where the kernel lets that be mapped: a store, no system
//! call. The function keeps what it holds back pending (PCI Local Bus Specification 3.0 §6.8.3). Elsewhere nothing is
//! held back.
//!
//! Excludes: who waits on the eventfds.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX,
};

use super::bar::Bar;
use super::sys;
use crate::transport::{Listen, TransportError};

/// Vectors that are used at most.
const MAX_VECTORS: u32 = 128;
/// Bytes of an entry of the MSI-X table, and where its mask is (§6.8.2.9).
const ENTRY: u64 = 16;
const VECTOR_CONTROL: u64 = 12;
const MASKED: u32 = 1;

/// The mapped MSI-X table.
pub(super) struct Table {
    /// The BAR that it is in.
    pub(super) bar: Arc<Bar>,
    /// Where in it.
    pub(super) offset: u64,
    pub(super) entries: u32,
}

/// The interrupts of a device.
pub(super) struct Interrupts {
    device: Arc<File>,
    vectors: u32,
    /// How many are enabled; 0 before the first attempt that succeeded.
    enabled: Mutex<u32>,
    table: Option<Table>,
}

impl Interrupts {
    /// `count` is what the device has.
    pub(super) fn new(device: Arc<File>, count: u32, table: Option<Table>) -> Self {
        Self { device, vectors: count.min(MAX_VECTORS), enabled: Mutex::new(0), table }
    }

    /// Vectors that can be connected.
    pub(super) fn vectors(&self) -> u16 {
        self.vectors as u16
    }

    /// Enables the vectors. What does not work is told by the first connection, which tries again.
    pub(super) fn prepare(&self) {
        let mut enabled = self.enabled.lock().unwrap_or_else(PoisonError::into_inner);
        if *enabled == 0 && self.vectors > 0 {
            *enabled = self.enable(0).unwrap_or(0);
        }
    }

    /// Makes a vector write to an eventfd.
    pub(super) fn connect(&self, vector: u16, eventfd: BorrowedFd<'_>) -> Result<(), TransportError> {
        let refused = |reason: String| TransportError::Interrupt { vector, reason };
        let wanted = u32::from(vector);
        if wanted >= self.vectors {
            return Err(refused(format!("the device has {} vectors", self.vectors)));
        }
        let mut enabled = self.enabled.lock().unwrap_or_else(PoisonError::into_inner);
        if *enabled == 0 {
            *enabled = self.enable(wanted).map_err(|errno| refused(errno.to_string()))?;
        }
        if wanted >= *enabled {
            return Err(refused(format!("the system has only {} vectors for this device", *enabled)));
        }
        sys::connect_irqs(self.device.as_fd(), VFIO_PCI_MSIX_IRQ_INDEX, wanted, &[Some(eventfd)])
            .map(drop)
            .map_err(|errno| refused(errno.to_string()))
    }

    /// Enables all vectors, or as many as the system has, if `wanted` is among them.
    fn enable(&self, wanted: u32) -> Result<u32, nix::errno::Errno> {
        let mut count = self.vectors;
        loop {
            let nobody = vec![None; count as usize];
            match sys::connect_irqs(self.device.as_fd(), VFIO_PCI_MSIX_IRQ_INDEX, 0, &nobody)? {
                0 => return Ok(count),
                available if available < count && available > wanted => count = available,
                _ => return Err(nix::errno::Errno::ENOSPC),
            }
        }
    }

    /// Lets a vector through or holds it back.
    pub(super) fn listen(&self, vector: u16, listen: Listen) {
        let Some(table) = &self.table else { return };
        if u32::from(vector) < table.entries {
            let mask = match listen {
                Listen::Off => MASKED,
                Listen::On => 0,
            };
            table.bar.doorbell(table.offset + u64::from(vector) * ENTRY + VECTOR_CONTROL, mask);
        }
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        if *self.enabled.get_mut().unwrap_or_else(PoisonError::into_inner) > 0 {
            // A device that is gone has none left.
            let _ = sys::disconnect_irqs(self.device.as_fd(), VFIO_PCI_MSIX_IRQ_INDEX);
        }
    }
}

/// Makes `eventfd` tell that the device is to be given back or has met an error that cannot be corrected. Returns whether
/// the kernel can tell of the first.
pub(super) fn tell_of_removal(device: &File, eventfd: BorrowedFd<'_>) -> bool {
    let connect = |index| {
        sys::irq_count(device.as_fd(), index).is_ok_and(|count| count > 0)
            && sys::connect_irqs(device.as_fd(), index, 0, &[Some(eventfd)]).is_ok()
    };
    // Devices without error reporting have no error interrupt.
    let _ = connect(VFIO_PCI_ERR_IRQ_INDEX);
    connect(VFIO_PCI_REQ_IRQ_INDEX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::vfio::sys::RegionInfo;
    use nix::sys::eventfd::EventFd;

    #[test]
    fn holding_back_sets_the_mask_of_that_vector_only() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(8192).unwrap();
        let region = RegionInfo { bytes: 8192, mappable: true, ..RegionInfo::default() };
        let bar = Arc::new(Bar::new(Arc::clone(&file), &region).unwrap());
        let table = Table { bar: Arc::clone(&bar), offset: 0x1000, entries: 2 };
        let interrupts = Interrupts::new(file, 2, Some(table));
        interrupts.listen(1, Listen::Off);
        interrupts.listen(2, Listen::Off);
        assert_eq!([bar.read(0x100c), bar.read(0x101c), bar.read(0x102c)], [Ok(0), Ok(1), Ok(0)]);
        interrupts.listen(1, Listen::On);
        assert_eq!(bar.read(0x101c), Ok(0));
    }

    #[test]
    fn a_vector_that_does_not_exist_is_refused() {
        let null = Arc::new(File::open("/dev/null").unwrap());
        let interrupts = Interrupts::new(Arc::clone(&null), 1000, None);
        assert_eq!(interrupts.vectors(), 128);
        let eventfd = EventFd::new().unwrap();
        let error = interrupts.connect(128, eventfd.as_fd()).unwrap_err().to_string();
        assert!(error.contains("128 vectors"), "{error}");
        assert!(interrupts.connect(0, eventfd.as_fd()).is_err(), "no device takes it");
        assert!(!tell_of_removal(&null, eventfd.as_fd()));
    }
}
