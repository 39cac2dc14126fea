//! The transport to an embedded controller in the same process: registers are calls, DMA memory is the controller's own
//! [`DmaSpace`](nvme_emulator::DmaSpace), interrupts are eventfds.
//!
//! *Memory ordering*: a doorbell call is at least a release for whoever executes the commands (inline it is the same
//! thread).
//!
//! Excludes: how the controller is configured, which whoever makes it decides.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nvme_emulator::{EmulatedController, MappedRegion, VectorMask};
use reactor::dma::{DmaRegion, PAGE_SIZE};
use vm_memory::{MmapRegion, VolatileSlice};

use super::{Listen, Transport, TransportError};

/// The way to an embedded controller.
pub struct EmbeddedTransport {
    controller: Arc<EmulatedController>,
    name: String,
    /// `None` if the system gave no descriptor: then only register reads tell that the device is gone.
    removal: Option<EventFd>,
}

impl EmbeddedTransport {
    /// A transport to `controller`, named `name` in messages.
    pub fn new(controller: Arc<EmulatedController>, name: impl Into<String>) -> Self {
        let removal = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).ok();
        Self { controller, name: name.into(), removal }
    }

    /// Asks for the device back, as a kernel does that wants to unbind its driver.
    pub fn request_removal(&self) {
        if let Some(removal) = &self.removal {
            // Fails only if the counter is full: then it is readable.
            let _ = removal.write(1);
        }
    }

    /// The controller behind it.
    pub fn controller(&self) -> &Arc<EmulatedController> {
        &self.controller
    }
}

struct EmbeddedRegion(Arc<MappedRegion>);

impl DmaRegion for EmbeddedRegion {
    fn slice(&self) -> VolatileSlice<'_> {
        self.0.slice()
    }

    fn iova(&self) -> u64 {
        self.0.iova()
    }

    fn mapping(&self) -> (Arc<MmapRegion>, usize) {
        (self.0.mapping(), 0)
    }
}

impl Transport for EmbeddedTransport {
    fn name(&self) -> &str {
        &self.name
    }

    fn bar_bytes(&self) -> u64 {
        self.controller.bar_bytes()
    }

    fn read32(&self, offset: u64) -> Result<u32, TransportError> {
        Ok(self.controller.read32(offset))
    }

    fn read64(&self, offset: u64) -> Result<u64, TransportError> {
        Ok(self.controller.read64(offset))
    }

    fn write32(&self, offset: u64, value: u32) -> Result<(), TransportError> {
        self.controller.write32(offset, value);
        Ok(())
    }

    fn write64(&self, offset: u64, value: u64) -> Result<(), TransportError> {
        self.controller.write64(offset, value);
        Ok(())
    }

    fn doorbell(&self, offset: u64, value: u32) {
        self.controller.doorbell(offset, value);
    }

    fn allocate(&self, bytes: usize) -> Result<Arc<dyn DmaRegion>, TransportError> {
        let rounded = bytes.next_multiple_of(PAGE_SIZE);
        let region = self
            .controller
            .memory()
            .map(rounded)
            .map_err(|error| TransportError::Memory { bytes, reason: error.to_string() })?;
        Ok(Arc::new(EmbeddedRegion(region)))
    }

    fn interrupt_vectors(&self) -> u16 {
        self.controller.interrupt_vectors()
    }

    fn connect_interrupt(&self, vector: u16, eventfd: BorrowedFd<'_>) -> Result<(), TransportError> {
        let refused = |reason: String| TransportError::Interrupt { vector, reason };
        let eventfd = eventfd.try_clone_to_owned().map_err(|error| refused(error.to_string()))?;
        self.controller.set_interrupt(vector, eventfd).map_err(|error| refused(error.to_string()))
    }

    fn listen(&self, vector: u16, listen: Listen) {
        let mask = match listen {
            Listen::Off => VectorMask::Masked,
            Listen::On => VectorMask::Unmasked,
        };
        // Fails for a vector that does not exist only, and then it was never connected.
        let _ = self.controller.mask_interrupt(vector, mask);
    }

    fn removal_event(&self) -> Option<BorrowedFd<'_>> {
        self.removal.as_ref().map(AsFd::as_fd)
    }

    fn reset_function(&self) -> Result<(), TransportError> {
        self.controller.reset_function();
        Ok(())
    }

    fn revoke_dma(&self) -> Result<(), TransportError> {
        self.controller.memory().revoke();
        Ok(())
    }
}
