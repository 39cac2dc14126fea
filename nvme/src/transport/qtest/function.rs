//! The NVMe function on QEMU's PCI bus: found, given addresses, switched on, reset.
//!
//! Owns: PCI configuration by the ports 0xcf8 and 0xcfc (PCI Local Bus 3.0 §3.2.2.3.2), the addresses of the BARs.
//!
//! Invariants: offsets read from configuration space are masked or checked; the walk of capabilities is bounded.

use std::sync::{Mutex, PoisonError};

use nvme_spec::registers::DOORBELL_BASE;

use super::connection::{Connection, RequestError};
use crate::pci::NVME_CLASS;

const CONFIG_ADDRESS: u64 = 0xcf8;
const CONFIG_DATA: u64 = 0xcfc;
/// Configuration access is on.
const CONFIG_ENABLE: u32 = 1 << 31;

/// Registers of configuration space.
const ID: u8 = 0x00;
const COMMAND: u8 = 0x04;
const CLASS: u8 = 0x08;
const BAR0: u8 = 0x10;
const CAPABILITIES: u8 = 0x34;

/// Bits of the command register.
const MEMORY_SPACE: u32 = 1 << 1;
const BUS_MASTER: u32 = 1 << 2;
/// Interrupts by wire are off.
const NO_INTX: u32 = 1 << 10;

const CAP_MSIX: u8 = 0x11;
const CAP_EXPRESS: u8 = 0x10;
/// More capabilities than fit into configuration space.
const MAX_CAPABILITIES: usize = 48;
/// Device Capabilities: the function can be reset by itself. Device Control: do so.
const FLR_CAPABLE: u32 = 1 << 28;
const INITIATE_FLR: u32 = 1 << 15;
/// MSI-X is on, and no vector is held back.
const MSIX_ENABLE: u32 = 1 << 31;

/// Where BARs are put: PCI memory of both of QEMU's PC machines, below the chipset's own devices.
const WINDOW: std::ops::Range<u64> = 0xe000_0000..0xfe00_0000;

/// Whether the function may reach memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BusMaster {
    On,
    Off,
}

/// A BAR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Bar {
    pub(super) address: u64,
    pub(super) bytes: u64,
}

/// Where the MSI-X table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MsixTable {
    capability: u8,
    pub(super) address: u64,
    pub(super) entries: u16,
}

/// The function.
#[derive(Debug)]
pub(super) struct Function {
    /// Device and function number, in bits 8 to 15 of the configuration address.
    devfn: u8,
    /// Its vendor and device.
    id: u32,
    /// BAR0.
    pub(super) registers: Bar,
    bars: [Bar; 6],
    express: Option<u8>,
    pub(super) msix: Option<MsixTable>,
    /// Held for the two messages of a configuration access.
    access: Mutex<()>,
}

impl Function {
    /// Looks for an NVMe function on bus 0, and gives addresses to its BARs. The inner error says what is missing.
    pub(super) fn find(connection: &Connection) -> Result<Result<Self, String>, RequestError> {
        let Some(mut function) = Self::search(connection)? else {
            return Ok(Err(
                "QEMU has no NVMe function on PCI bus 0; add `-device nvme,…` to its command line".into(),
            ));
        };
        function.write(connection, COMMAND, NO_INTX)?;
        if let Err(problem) = function.assign(connection)? {
            return Ok(Err(problem));
        }
        function.registers = function.bars[0];
        if function.registers.bytes <= DOORBELL_BASE {
            let bytes = function.registers.bytes;
            return Ok(Err(format!("its BAR0 has {bytes:#x} bytes, which no doorbells fit in")));
        }
        function.express = function.capability(connection, CAP_EXPRESS)?;
        function.msix = function.find_msix(connection)?;
        Ok(Ok(function))
    }

    fn search(connection: &Connection) -> Result<Option<Self>, RequestError> {
        for device in 0..32 {
            let mut function = Self {
                devfn: device << 3,
                id: 0,
                registers: Bar::default(),
                bars: [Bar::default(); 6],
                express: None,
                msix: None,
                access: Mutex::default(),
            };
            function.id = function.read(connection, ID)?;
            if function.id == u32::MAX {
                continue;
            }
            if function.read(connection, CLASS)? >> 8 == NVME_CLASS {
                return Ok(Some(function));
            }
        }
        Ok(None)
    }

    fn read(&self, connection: &Connection, register: u8) -> Result<u32, RequestError> {
        let _alone = self.access.lock().unwrap_or_else(PoisonError::into_inner);
        connection.write("outl", CONFIG_ADDRESS, self.selector(register))?;
        connection.read("inl", CONFIG_DATA).map(|value| value as u32)
    }

    fn write(&self, connection: &Connection, register: u8, value: u32) -> Result<(), RequestError> {
        let _alone = self.access.lock().unwrap_or_else(PoisonError::into_inner);
        connection.write("outl", CONFIG_ADDRESS, self.selector(register))?;
        connection.write("outl", CONFIG_DATA, value.into())
    }

    fn selector(&self, register: u8) -> u64 {
        u64::from(CONFIG_ENABLE | u32::from(self.devfn) << 8 | u32::from(register & 0xfc))
    }

    /// Whether the function is still on the bus.
    pub(super) fn is_present(&self, connection: &Connection) -> Result<bool, RequestError> {
        Ok(self.read(connection, ID)? == self.id)
    }

    /// Sizes every memory BAR and gives it an address (PCI Local Bus 3.0 §6.2.5.1).
    fn assign(&mut self, connection: &Connection) -> Result<Result<(), String>, RequestError> {
        let mut next = WINDOW.start;
        let mut index = 0;
        while index < self.bars.len() {
            let register = bar_register(index);
            self.write(connection, register, u32::MAX)?;
            let low = self.read(connection, register)?;
            let wide = low & 0b111 == 0b100;
            if low == 0 || low & 1 != 0 {
                index += 1;
                continue;
            }
            let mut mask = u64::from(low & !0xf) | 0xffff_ffff << 32;
            if wide && index + 1 < self.bars.len() {
                self.write(connection, register + 4, u32::MAX)?;
                let high = self.read(connection, register + 4)?;
                mask = u64::from(high) << 32 | u64::from(low & !0xf);
            }
            let bytes = mask.wrapping_neg();
            let address = next.checked_next_multiple_of(bytes.max(1)).unwrap_or(u64::MAX);
            let fits = address.checked_add(bytes).is_some_and(|end| end <= WINDOW.end);
            if !bytes.is_power_of_two() || !fits {
                return Ok(Err(format!("its BAR{index} of {bytes:#x} bytes has no place below 4 GiB")));
            }
            self.bars[index] = Bar { address, bytes };
            next = address + bytes;
            index += if wide { 2 } else { 1 };
        }
        Ok(Ok(()))
    }

    /// Writes the BARs' addresses and the command register.
    pub(super) fn enable(&self, connection: &Connection, master: BusMaster) -> Result<(), RequestError> {
        for (index, bar) in self.bars.iter().enumerate().filter(|(_, bar)| bar.bytes > 0) {
            self.write(connection, bar_register(index), bar.address as u32)?;
            if index + 1 < self.bars.len() && self.bars[index + 1].bytes == 0 {
                self.write(connection, bar_register(index + 1), 0)?;
            }
        }
        if let Some(msix) = self.msix {
            self.write(connection, msix.capability, MSIX_ENABLE)?;
        }
        let mut command = MEMORY_SPACE | NO_INTX;
        if master == BusMaster::On {
            command |= BUS_MASTER;
        }
        self.write(connection, COMMAND, command)
    }

    /// Resets the function and switches it on again. QEMU finishes what is under way first.
    pub(super) fn reset(&self, connection: &Connection, master: BusMaster) -> Result<(), RequestError> {
        self.enable(connection, BusMaster::Off)?;
        let control = match self.express {
            Some(express) if self.read(connection, express + 4)? & FLR_CAPABLE != 0 => Some(express + 8),
            _ => None,
        };
        match control {
            Some(control) => {
                let value = self.read(connection, control)? & 0xffff;
                self.write(connection, control, value | INITIATE_FLR)?;
            }
            // A controller reset does the same for everything that matters here: CC.EN = 0.
            None => connection.write("writel", self.registers.address + 0x14, 0)?,
        }
        self.enable(connection, master)
    }

    fn capability(&self, connection: &Connection, wanted: u8) -> Result<Option<u8>, RequestError> {
        let mut at = self.read(connection, CAPABILITIES)? as u8 & 0xfc;
        for _ in 0..MAX_CAPABILITIES {
            // The standard header ends at 0x40.
            if at < 0x40 {
                return Ok(None);
            }
            let [id, next, ..] = self.read(connection, at)?.to_le_bytes();
            if id == wanted {
                // Room for the registers that are used of any of them.
                return Ok((at <= 0xf0).then_some(at));
            }
            at = next & 0xfc;
        }
        Ok(None)
    }

    fn find_msix(&self, connection: &Connection) -> Result<Option<MsixTable>, RequestError> {
        let Some(capability) = self.capability(connection, CAP_MSIX)? else { return Ok(None) };
        let entries = (self.read(connection, capability)? >> 16 & 0x7ff) as u16 + 1;
        let place = self.read(connection, capability + 4)?;
        let offset = u64::from(place & !0b111);
        let bar = self.bars.get((place & 0b111) as usize).copied().unwrap_or_default();
        let inside = offset + u64::from(entries) * 16 <= bar.bytes;
        Ok(inside.then_some(MsixTable { capability, address: bar.address + offset, entries }))
    }
}

fn bar_register(index: usize) -> u8 {
    BAR0 + 4 * index as u8
}
