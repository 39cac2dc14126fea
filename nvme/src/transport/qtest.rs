//! The transport to QEMU's NVMe controller without a guest, over QEMU's qtest protocol. For development and tests.
//!
//! This process is the PCI host: it finds the NVMe function on bus 0, assigns its BARs, and reads and writes registers by
//! messages (some 100 µs each). QEMU's RAM is a file that both map; it is the DMA memory, and offsets in it are the
//! addresses that the device uses. MSI-X messages arrive as stores into a page of it, which a thread turns into writes to
//! eventfds.
//!
//! `DIR/qtest` is the socket (QEMU listens: `-qtest unix:DIR/qtest,server=on,wait=off`), `DIR/ram` the file
//! (`-object memory-backend-file,mem-path=DIR/ram,share=on,…`).
//!
//! Invariants:
//! - one process at a time has the RAM file, by a lock on it;
//! - the function is reset before it may reach memory, and stops being a bus master with the transport;
//! - every message has a deadline; a QEMU that misses it, ends, or says what makes no sense counts as removed, and so does
//!   a function that left the bus: reads give all ones, writes do nothing.
//!
//! *Memory ordering*: a doorbell is a system call, which orders everything before it.
//!
//! Excludes: starting QEMU.

mod connection;
mod function;
mod interrupts;
mod ram;

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nvme_spec::registers::DOORBELL_BASE;
use reactor::dma::DmaRegion;
use thiserror::Error;

use self::connection::{Connection, RequestError};
use self::function::{BusMaster, Function};
use self::interrupts::Interrupts;
use self::ram::Ram;
use super::{Listen, Transport, TransportError};

/// How long QEMU may take to answer.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(20);
/// Name of the socket in its directory.
pub const SOCKET_NAME: &str = "qtest";
/// Name of the RAM file in its directory.
pub const RAM_NAME: &str = "ram";

/// Why QEMU's controller cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum QtestError {
    /// There is no such directory.
    #[error("{}: {source}; a `qtest:` device is the directory with QEMU's socket `{SOCKET_NAME}` and RAM file `{RAM_NAME}`", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The RAM file cannot be used.
    #[error("{}: {reason}; start QEMU with `-object memory-backend-file,id=ram,size=512M,share=on,mem-path={}`", path.display(), path.display())]
    Ram {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Another process has it.
    #[error("{} is in use by another process: one at a time can be QEMU's PCI host", path.display())]
    InUse {
        /// The RAM file.
        path: PathBuf,
    },
    /// Nobody listens.
    #[error("cannot connect to {}: {source}; start QEMU with `-qtest unix:{},server=on,wait=off`", path.display(), path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// QEMU refuses a message, says what makes no sense, or does not answer.
    #[error("{}: {source}", path.display())]
    Request {
        /// The socket.
        path: PathBuf,
        /// What happened.
        source: RequestError,
    },
    /// There is no NVMe controller that can be used.
    #[error("{}: {what}", path.display())]
    Device {
        /// The socket.
        path: PathBuf,
        /// What is missing, and what to do.
        what: String,
    },
    /// The system refuses a thread or a descriptor.
    #[error("{}: cannot watch for interrupts: {source}", path.display())]
    System {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// The way to QEMU's controller.
pub struct QtestTransport {
    connection: Arc<Connection>,
    function: Arc<Function>,
    ram: Arc<Ram>,
    interrupts: Interrupts,
    revoked: AtomicBool,
}

impl QtestTransport {
    /// Connects to the QEMU of `directory`, finds its NVMe function, and makes it ready. QEMU has `timeout` to answer each
    /// message.
    ///
    /// # Errors
    /// [`QtestError`].
    pub fn open(directory: &Path, timeout: Duration) -> Result<Self, QtestError> {
        std::fs::read_dir(directory)
            .map_err(|source| QtestError::Directory { path: directory.to_owned(), source })?;
        let socket = directory.join(SOCKET_NAME);
        let ram = Ram::open(&directory.join(RAM_NAME))?;
        let name = format!("qtest:{}", directory.display());
        let connection = Connection::open(name, &socket, timeout)?;
        let requested = |source| QtestError::Request { path: socket.clone(), source };
        let function = Function::find(&connection)
            .map_err(requested)?
            .map_err(|what| QtestError::Device { path: socket.clone(), what })?;
        // Whoever was here before may have left it running, with its own idea of where its memory is.
        function.reset(&connection, BusMaster::Off).map_err(requested)?;
        function.enable(&connection, BusMaster::On).map_err(requested)?;
        let function = Arc::new(function);
        let interrupts = Interrupts::start(&connection, &function, &ram)
            .map_err(|source| QtestError::System { path: socket.clone(), source })?;
        Ok(Self { connection, function, ram, interrupts, revoked: AtomicBool::new(false) })
    }

    fn address(&self, offset: u64, bytes: u64) -> Result<u64, TransportError> {
        let bar = self.function.registers;
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= bar.bytes);
        inside.then(|| bar.address + offset).ok_or_else(|| TransportError::Register {
            offset,
            reason: format!("BAR0 has {:#x} bytes", bar.bytes),
        })
    }

    /// The value of a read: all ones if the function has gone, which QEMU shows as zero.
    fn settled(&self, offset: u64, read: Result<u64, RequestError>) -> Result<u64, TransportError> {
        match read {
            Ok(0) if !self.is_present() => Ok(u64::MAX),
            Ok(value) => Ok(value),
            Err(RequestError::Gone(_)) => Ok(u64::MAX),
            Err(refused) => Err(TransportError::Register { offset, reason: refused.to_string() }),
        }
    }

    fn is_present(&self) -> bool {
        self.function.is_present(&self.connection).unwrap_or(false)
    }
}

impl Drop for QtestTransport {
    fn drop(&mut self) {
        self.interrupts.stop();
        // If QEMU does not answer any more, nobody can stop it; the memory is then a file's that nobody looks at.
        let _ = self.function.enable(&self.connection, BusMaster::Off);
        self.connection.close();
    }
}

impl Transport for QtestTransport {
    fn name(&self) -> &str {
        self.connection.name()
    }

    fn bar_bytes(&self) -> u64 {
        self.function.registers.bytes
    }

    fn read32(&self, offset: u64) -> Result<u32, TransportError> {
        let address = self.address(offset, 4)?;
        // All ones stay all ones in the lower half.
        self.settled(offset, self.connection.read("readl", address)).map(|value| value as u32)
    }

    fn read64(&self, offset: u64) -> Result<u64, TransportError> {
        let address = self.address(offset, 8)?;
        self.settled(offset, self.connection.read("readq", address))
    }

    fn write32(&self, offset: u64, value: u32) -> Result<(), TransportError> {
        let address = self.address(offset, 4)?;
        if offset >= DOORBELL_BASE {
            self.connection.post(address, value);
            return Ok(());
        }
        settled_write(offset, self.connection.write("writel", address, value.into()))
    }

    fn write64(&self, offset: u64, value: u64) -> Result<(), TransportError> {
        let address = self.address(offset, 8)?;
        settled_write(offset, self.connection.write("writeq", address, value))
    }

    fn doorbell(&self, offset: u64, value: u32) {
        if let Ok(address) = self.address(offset, 4) {
            self.connection.post(address, value);
        }
    }

    fn allocate(&self, bytes: usize) -> Result<Arc<dyn DmaRegion>, TransportError> {
        self.ram.allocate(bytes)
    }

    fn interrupt_vectors(&self) -> u16 {
        self.interrupts.vectors()
    }

    fn connect_interrupt(&self, vector: u16, eventfd: BorrowedFd<'_>) -> Result<(), TransportError> {
        self.interrupts.connect(vector, eventfd)
    }

    fn listen(&self, vector: u16, listen: Listen) {
        self.interrupts.listen(vector, listen);
    }

    /// Takes the right to be bus master away, and then resets the function: QEMU waits for what is under way, which
    /// the bus master bit alone does not stop.
    fn revoke_dma(&self) -> Result<(), TransportError> {
        const WHAT: &str = "take memory back from a QEMU that lives and does not answer";
        self.revoked.store(true, Ordering::SeqCst);
        if self.connection.peer_has_ended() || !self.is_present() && !self.connection.is_gone() {
            return Ok(());
        }
        let reset = self.function.reset(&self.connection, BusMaster::Off);
        if reset.is_ok() || self.connection.peer_has_ended() {
            return Ok(());
        }
        Err(TransportError::Unsupported(WHAT))
    }

    fn reset_function(&self) -> Result<(), TransportError> {
        let failed = |reason: String| TransportError::Failed { what: "reset the function", reason };
        if !self.is_present() {
            return Err(failed("the function is gone".to_owned()));
        }
        let master = if self.revoked.load(Ordering::SeqCst) { BusMaster::Off } else { BusMaster::On };
        self.function.reset(&self.connection, master).map_err(|error| failed(error.to_string()))?;
        self.interrupts.restore().map_err(|error| failed(error.to_string()))
    }

    fn removal_event(&self) -> Option<BorrowedFd<'_>> {
        Some(self.connection.removal_event())
    }
}

fn settled_write(offset: u64, written: Result<(), RequestError>) -> Result<(), TransportError> {
    match written {
        Ok(()) | Err(RequestError::Gone(_)) => Ok(()),
        Err(refused) => Err(TransportError::Register { offset, reason: refused.to_string() }),
    }
}

#[cfg(test)]
mod tests;
