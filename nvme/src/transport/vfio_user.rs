//! The transport to a controller in another process, over a vfio-user socket (SPDK's target, `pollux serve`).
//!
//! Registers are messages: tens of microseconds with a server that waits for them, about a millisecond with one that polls
//! now and then. Doorbells are stores into a page that the server shares; where it shares none they are messages that nobody
//! waits for. DMA memory is passed by descriptor, at IOVAs chosen here. Interrupts are eventfds that the server writes to.
//!
//! Invariants:
//! - every message has a deadline; a server that misses it, or sends what makes no sense, counts as removed: register
//!   reads give all ones, writes do nothing, the connection is shut down, [`removal_event`](Transport::removal_event)
//!   fires;
//! - memory is unmapped by message while the connection lives; its end takes the rest.
//!
//! *The end*: the driver disables the controller, then drops its memory, then the transport. Unmapping memory under live
//! queues has been seen to crash servers, so the order matters.
//!
//! *Trust*: a server has our DMA memory mapped for as long as it lives, whatever the messages say. One that was given up for
//! its silence may still write to it. Nothing but I/O data lies there.
//!
//! *Memory ordering*: a doorbell is stored with release, so that the server sees the entries it announces.
//!
//! Excludes: the protocol's messages (`vfio-user-protocol`), cutting slabs (`slab`).

mod connection;
mod device;

use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nvme_spec::registers::{self, Cc, DOORBELL_BASE};
use reactor::dma::DmaRegion;
use thiserror::Error;
use vfio_user_protocol::{
    Command, DmaFlags, DmaMap, DmaUnmap, IrqSet, IrqSetFlags, VersionError, irq_index, region,
};
use zerocopy::IntoBytes;

use super::slab::{DmaMapper, SLAB_UNIT, SlabMemory, SlabPool};
use super::{Listen, Transport, TransportError};
use connection::{Connection, RequestError};
use device::{Device, DoorbellArea};

/// How long a server may take to answer.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
/// Pieces of memory that are mapped at a time: common servers take 64, and somebody else may need some.
const MAX_SLABS: usize = 60;
/// First IOVA given out: far from 0, so that a forgotten address field hits nothing.
const FIRST_IOVA: u64 = 1 << 32;
/// One past the last IOVA given out.
const IOVA_LIMIT: u64 = 1 << 48;

/// Why a server cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VfioUserError {
    /// Nobody is there.
    #[error("cannot connect to {}: {source}{}", path.display(), hint(path, source))]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// It speaks another version.
    #[error("{}: {source}", path.display())]
    Version {
        /// The socket.
        path: PathBuf,
        /// What differs.
        source: VersionError,
    },
    /// It refuses a message, breaks the protocol, or does not answer.
    #[error("{}: {source}", path.display())]
    Request {
        /// The socket.
        path: PathBuf,
        /// What happened.
        source: RequestError,
    },
    /// What it serves is no NVMe controller that can be used.
    #[error("{} {what}", path.display())]
    Device {
        /// The socket.
        path: PathBuf,
        /// Continues the sentence.
        what: String,
    },
}

fn hint(path: &Path, source: &std::io::Error) -> &'static str {
    let is_socket = |path: &Path| std::fs::metadata(path).is_ok_and(|found| found.file_type().is_socket());
    match source.kind() {
        // What is connected to need not be a socket to be refused.
        std::io::ErrorKind::ConnectionRefused if !is_socket(path) => " (it is not a socket)",
        std::io::ErrorKind::NotFound => " (is the server running, and is this its socket?)",
        std::io::ErrorKind::ConnectionRefused => " (the server that left this socket is gone)",
        std::io::ErrorKind::TimedOut => " (the server does not accept; does it serve another client?)",
        std::io::ErrorKind::PermissionDenied => " (connecting needs the right to write to the socket)",
        _ => "",
    }
}

/// The way to a controller behind a socket.
pub struct VfioUserTransport {
    connection: Arc<Connection>,
    pool: Arc<SlabPool<Mapper>>,
    bar_bytes: u64,
    vectors: u16,
    doorbells: Option<DoorbellArea>,
}

impl VfioUserTransport {
    /// Connects to the server at `path`, which has `timeout` to answer each message, and enables the function's memory and
    /// bus mastering.
    ///
    /// # Errors
    /// [`VfioUserError`].
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, VfioUserError> {
        let connection = Connection::open(path, timeout)?;
        let device = Device::explore(&connection, path)?;
        let mapper = Mapper { connection: Arc::clone(&connection), next_iova: AtomicU64::new(FIRST_IOVA) };
        Ok(Self {
            connection,
            pool: SlabPool::new(mapper, MAX_SLABS),
            bar_bytes: device.bar_bytes,
            vectors: device.vectors,
            doorbells: device.doorbells,
        })
    }

    /// Whether doorbells are stores, not messages.
    pub fn maps_doorbells(&self) -> bool {
        self.doorbells.is_some()
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), TransportError> {
        match self.connection.region_read(region::BAR0, offset, bytes) {
            Ok(()) => Ok(()),
            Err(RequestError::Gone(_)) => {
                bytes.fill(0xff);
                Ok(())
            }
            Err(refused) => Err(TransportError::Register { offset, reason: refused.to_string() }),
        }
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), TransportError> {
        match self.connection.region_write(region::BAR0, offset, bytes) {
            Ok(()) | Err(RequestError::Gone(_)) => Ok(()),
            Err(refused) => Err(TransportError::Register { offset, reason: refused.to_string() }),
        }
    }
}

impl Drop for VfioUserTransport {
    /// Memory that was never dropped (quarantine) must not keep the server's only place for a client.
    fn drop(&mut self) {
        self.connection.close();
    }
}

impl Transport for VfioUserTransport {
    fn name(&self) -> &str {
        self.connection.name()
    }

    fn bar_bytes(&self) -> u64 {
        self.bar_bytes
    }

    fn read32(&self, offset: u64) -> Result<u32, TransportError> {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn read64(&self, offset: u64) -> Result<u64, TransportError> {
        let mut bytes = [0; 8];
        self.read(offset, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn write32(&self, offset: u64, value: u32) -> Result<(), TransportError> {
        if offset >= DOORBELL_BASE {
            self.doorbell(offset, value);
            return Ok(());
        }
        self.write(offset, &value.to_le_bytes())
    }

    fn write64(&self, offset: u64, value: u64) -> Result<(), TransportError> {
        self.write(offset, &value.to_le_bytes())
    }

    fn doorbell(&self, offset: u64, value: u32) {
        let stored = self.doorbells.as_ref().is_some_and(|area| area.store(offset, value));
        if !stored {
            self.connection.post_write(region::BAR0, offset, value.to_le_bytes());
        }
    }

    fn allocate(&self, bytes: usize) -> Result<Arc<dyn DmaRegion>, TransportError> {
        self.pool.allocate(bytes)
    }

    fn interrupt_vectors(&self) -> u16 {
        self.vectors
    }

    fn connect_interrupt(&self, vector: u16, eventfd: BorrowedFd<'_>) -> Result<(), TransportError> {
        let refused = |reason: String| TransportError::Interrupt { vector, reason };
        if vector >= self.vectors {
            return Err(refused(format!("the server has {} vectors", self.vectors)));
        }
        let request = IrqSet {
            argsz: (size_of::<IrqSet>() as u32).into(),
            flags: (IrqSetFlags::DATA_EVENTFD | IrqSetFlags::ACTION_TRIGGER).bits().into(),
            index: irq_index::MSIX.into(),
            start: u32::from(vector).into(),
            count: 1.into(),
        };
        self.connection
            .request(Command::DEVICE_SET_IRQS, &[request.as_bytes()], &[eventfd])
            .map(drop)
            .map_err(|error| refused(error.to_string()))
    }

    fn listen(&self, _vector: u16, _listen: Listen) {
        // A message each time would cost more than the interrupts it saves: writes to an eventfd, which are the
        // server's expense.
    }

    /// Ends the connection. That proves the device quiet only if the server ended it first by dying: a server that lives
    /// unmaps the memory when it notices, and nothing tells when.
    fn revoke_dma(&self) -> Result<(), TransportError> {
        if self.connection.server_is_gone() {
            return Ok(());
        }
        self.connection.fail("given up by the driver");
        Err(TransportError::Unsupported("take memory back from a server that lives"))
    }

    fn reset_function(&self) -> Result<(), TransportError> {
        let gone = |_| TransportError::Unsupported("reset a function that is gone");
        match self.connection.request(Command::DEVICE_RESET, &[], &[]) {
            Ok(_) => {}
            Err(RequestError::Refused { .. }) => {
                return Err(TransportError::Unsupported("reset the function: the server refuses"));
            }
            Err(error) => return Err(gone(error)),
        }
        device::enable(&self.connection).map_err(gone)?;
        // SPDK's target leaves the registers as they are.
        if Cc::from(self.read32(registers::CC)?).en() {
            return Err(TransportError::Unsupported("reset the function: the server leaves CC.EN set"));
        }
        Ok(())
    }

    fn removal_event(&self) -> Option<BorrowedFd<'_>> {
        Some(self.connection.removal_event())
    }
}

/// Maps slabs at addresses that are never used twice, with a gap after each.
struct Mapper {
    connection: Arc<Connection>,
    next_iova: AtomicU64,
}

impl DmaMapper for Mapper {
    fn map(&self, memory: &SlabMemory) -> Result<u64, TransportError> {
        let bytes = memory.bytes() as u64;
        let refused = |reason: String| TransportError::Memory { bytes: memory.bytes(), reason };
        // Relaxed: the counter publishes nothing, only uniqueness matters.
        let step = bytes + SLAB_UNIT as u64;
        let iova = self.next_iova.fetch_add(step, Ordering::Relaxed);
        if iova > IOVA_LIMIT - step {
            return Err(refused("the device's address space is used up".into()));
        }
        let request = DmaMap {
            argsz: (size_of::<DmaMap>() as u32).into(),
            // Not MMAP: servers of older versions refuse it, and all of them map what comes with a descriptor.
            flags: (DmaFlags::READ | DmaFlags::WRITE).bits().into(),
            offset: memory.offset().into(),
            address: iova.into(),
            size: bytes.into(),
        };
        match self.connection.request(Command::DMA_MAP, &[request.as_bytes()], &[memory.fd()]) {
            Ok(_) => Ok(iova),
            Err(error) => Err(refused(error.to_string())),
        }
    }

    fn unmap(&self, iova: u64, bytes: u64) {
        let request = DmaUnmap {
            argsz: (size_of::<DmaUnmap>() as u32).into(),
            flags: 0.into(),
            address: iova.into(),
            size: bytes.into(),
        };
        match self.connection.request(Command::DMA_UNMAP, &[request.as_bytes()], &[]) {
            // The end of the connection unmaps everything.
            Ok(_) | Err(RequestError::Gone(_)) => {}
            // The server keeps its own mapping of the descriptor: nothing of ours is reached by it, now or later.
            Err(error) => tracing::warn!(device = self.connection.name(), iova, %error, "cannot unmap"),
        }
    }
}

/// The errno of an error reply: 0 where the server does not say.
fn errno(error: u32) -> Errno {
    i32::try_from(error).map_or(Errno::UnknownErrno, Errno::from_raw)
}
