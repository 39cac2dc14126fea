//! The configuration space of a PCI function, through VFIO's region for it (PCI Local Bus Specification 3.0 §6).
//!
//! VFIO virtualizes most of it; the command register's bits for memory space, bus master and INTx reach the device.
//!
//! Invariants: every access is checked: one that did not happen is an error, or "gone".

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

const COMMAND: u64 = 0x04;
/// Revision and class code: unlike the identifiers before them, VFIO reads them from the device.
const REVISION: u64 = 0x08;
const STATUS: u64 = 0x06;
const CAPABILITIES: u64 = 0x34;

const MEMORY_SPACE: u16 = 1 << 1;
const BUS_MASTER: u16 = 1 << 2;
const INTX_DISABLE: u16 = 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Capability identifier of MSI-X (§6.8.2).
const MSIX: u8 = 0x11;
/// Capabilities that fit in 192 bytes: a longer chain is a circle.
const MAX_CAPABILITIES: usize = 48;

/// Whether the device may start transfers of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BusMaster {
    Off,
    On,
}

/// Where the MSI-X table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MsixTable {
    /// The BAR.
    pub(super) bar: u8,
    /// Offset of the first entry in it.
    pub(super) offset: u64,
    /// Entries.
    pub(super) entries: u32,
}

/// The configuration space of one function.
#[derive(Clone, Debug)]
pub(super) struct Config {
    device: Arc<File>,
    /// Where it begins in the descriptor.
    offset: u64,
}

impl Config {
    pub(super) fn new(device: Arc<File>, offset: u64) -> Self {
        Self { device, offset }
    }

    fn read<const N: usize>(&self, register: u64) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.device.read_exact_at(&mut bytes, self.offset + register)?;
        Ok(bytes)
    }

    fn read16(&self, register: u64) -> io::Result<u16> {
        self.read(register).map(u16::from_le_bytes)
    }

    /// Turns memory space on and INTx off, and bus master as asked.
    ///
    /// # Errors
    /// The system's, or that the device does not keep it.
    pub(super) fn enable(&self, master: BusMaster) -> io::Result<()> {
        let wanted = match master {
            BusMaster::On => MEMORY_SPACE | INTX_DISABLE | BUS_MASTER,
            BusMaster::Off => MEMORY_SPACE | INTX_DISABLE,
        };
        let command = self.read16(COMMAND)?;
        if command == u16::MAX {
            return Err(io::Error::other("it does not answer"));
        }
        let kept = command & !BUS_MASTER;
        self.device.write_all_at(&(kept | wanted).to_le_bytes(), self.offset + COMMAND)?;
        let now = self.read16(COMMAND)?;
        if now & (wanted | BUS_MASTER) != wanted {
            return Err(io::Error::other(format!("the command register stays at {now:#06x}")));
        }
        Ok(())
    }

    /// Forbids the device to start transfers, and leaves the rest.
    pub(super) fn stop_bus_master(&self) -> io::Result<()> {
        let command = self.read16(COMMAND)? & !BUS_MASTER;
        self.device.write_all_at(&command.to_le_bytes(), self.offset + COMMAND)
    }

    /// Whether nobody answers any more.
    pub(super) fn is_gone(&self) -> bool {
        self.read(REVISION).map_or(true, |bytes| u32::from_le_bytes(bytes) == u32::MAX)
    }

    /// Where the MSI-X table is, if there is one.
    pub(super) fn msix_table(&self) -> io::Result<Option<MsixTable>> {
        if self.read16(STATUS)? & STATUS_CAPABILITIES == 0 {
            return Ok(None);
        }
        let [mut at] = self.read::<1>(CAPABILITIES)?;
        for _ in 0..MAX_CAPABILITIES {
            // The lowest two bits are reserved; offsets below 64 are not capabilities.
            at &= !3;
            if at < 0x40 {
                break;
            }
            let [id, next] = self.read(at.into())?;
            if id == MSIX {
                let control = self.read16(u64::from(at) + 2)?;
                let table = u32::from_le_bytes(self.read(u64::from(at) + 4)?);
                return Ok(Some(MsixTable {
                    bar: (table & 7) as u8,
                    offset: u64::from(table & !7),
                    entries: u32::from(control & 0x7ff) + 1,
                }));
            }
            at = next;
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A configuration space in a file, which keeps what is written to it.
    fn space(bytes: &[u8]) -> (Config, Arc<File>) {
        const OFFSET: u64 = 4096;
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.write_all_at(bytes, OFFSET).unwrap();
        (Config::new(Arc::clone(&file), OFFSET), file)
    }

    #[test]
    fn enabling_keeps_other_bits_and_closing_takes_bus_master_only() {
        let mut bytes = [0; 256];
        bytes[4..6].copy_from_slice(&0x0145u16.to_le_bytes());
        let (config, _) = space(&bytes);
        config.enable(BusMaster::On).unwrap();
        assert_eq!(config.read16(COMMAND).unwrap(), 0x0547);
        config.stop_bus_master().unwrap();
        assert_eq!(config.read16(COMMAND).unwrap(), 0x0543);
        config.enable(BusMaster::Off).unwrap();
        assert_eq!(config.read16(COMMAND).unwrap(), 0x0543);
    }

    #[test]
    fn a_function_that_does_not_answer_is_gone() {
        let (config, file) = space(&[0xff; 256]);
        assert!(config.is_gone());
        assert!(config.enable(BusMaster::Off).is_err(), "all ones are no success");
        file.set_len(0).unwrap();
        assert!(config.is_gone());
        let (config, _) = space(&[0; 256]);
        assert!(!config.is_gone());
    }

    #[test]
    fn the_msix_table_is_found_along_the_chain() {
        let mut bytes = [0; 256];
        bytes[6] = 1 << 4;
        bytes[0x34] = 0x40;
        bytes[0x40..0x42].copy_from_slice(&[0x01, 0x53]);
        bytes[0x50..0x52].copy_from_slice(&[MSIX, 0]);
        bytes[0x52..0x54].copy_from_slice(&0x8040u16.to_le_bytes());
        bytes[0x54..0x58].copy_from_slice(&0x2003u32.to_le_bytes());
        let table = MsixTable { bar: 3, offset: 0x2000, entries: 0x41 };
        assert_eq!(space(&bytes).0.msix_table().unwrap(), Some(table));
        // A circle ends.
        bytes[0x41] = 0x40;
        assert_eq!(space(&bytes).0.msix_table().unwrap(), None);
        bytes[6] = 0;
        assert_eq!(space(&bytes).0.msix_table().unwrap(), None);
    }
}
