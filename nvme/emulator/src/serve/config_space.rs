//! The PCI configuration space of the served function: an NVMe controller with power management, MSI-X and PCI Express
//! capabilities.
//!
//! Owns: the bytes, and which bits a client can change. Nothing here has an effect on the controller, except that a
//! function level reset is reported to the caller; interrupts are connected by message, not by the MSI-X table.

/// Bytes of a PCI Express function's configuration space.
pub(super) const CONFIG_BYTES: usize = 4096;
/// Bytes of BAR4: MSI-X table and pending bits.
pub(super) const MSIX_BAR_BYTES: usize = 64 << 10;
/// Where in BAR4 the pending bits begin.
const PENDING_OFFSET: u32 = 32 << 10;

const VENDOR: u16 = 0x1b36;
const DEVICE: u16 = 0x0010;
/// Mass storage, non-volatile memory, NVMe (PCI Code and ID Assignment).
const CLASS: [u8; 3] = [0x02, 0x08, 0x01];

const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Memory space, bus master, parity, SERR, INTx disable.
const COMMAND_WRITABLE: u16 = 0x0546;
const BAR_64_BIT: u32 = 0x4;

const POWER_MANAGEMENT: usize = 0x40;
const MSIX: usize = 0x50;
const EXPRESS: usize = 0x60;
/// Device Control of the PCI Express capability; its bit 15 initiates a function level reset.
const DEVICE_CONTROL: usize = EXPRESS + 8;
const INITIATE_FLR: u16 = 1 << 15;
const FLR_CAPABLE: u32 = 1 << 28;
const ROLE_BASED_ERRORS: u32 = 1 << 15;

/// What a write asked for beside changing bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ConfigEffect {
    /// Nothing.
    None,
    /// A function level reset.
    Reset,
}

/// The bytes and the bits of them that can be written.
pub(super) struct ConfigSpace {
    bytes: Box<[u8]>,
    writable: Box<[u8]>,
}

impl ConfigSpace {
    /// The space of a function whose BAR0 has `bar0_bytes` (a power of two) and that has `vectors` interrupt vectors.
    pub(super) fn new(bar0_bytes: u64, vectors: u16) -> Self {
        let mut space = Self { bytes: vec![0; CONFIG_BYTES].into(), writable: vec![0; CONFIG_BYTES].into() };
        space.header(bar0_bytes);
        space.capabilities(vectors);
        space
    }

    fn header(&mut self, bar0_bytes: u64) {
        self.put(0x00, &VENDOR.to_le_bytes());
        self.put(0x02, &DEVICE.to_le_bytes());
        self.allow(0x04, &COMMAND_WRITABLE.to_le_bytes());
        self.put(0x06, &STATUS_CAPABILITIES.to_le_bytes());
        self.put(0x09, &CLASS);
        self.allow(0x0c, &[0xff]); // cache line size
        self.put(0x10, &BAR_64_BIT.to_le_bytes());
        self.allow(0x10, &(!(bar0_bytes - 1)).to_le_bytes());
        self.allow(0x20, &(!(MSIX_BAR_BYTES as u32 - 1)).to_le_bytes());
        self.put(0x2c, &VENDOR.to_le_bytes());
        self.put(0x2e, &0x1100u16.to_le_bytes());
        self.put(0x34, &[POWER_MANAGEMENT as u8]);
        self.allow(0x3c, &[0xff]); // interrupt line
    }

    fn capabilities(&mut self, vectors: u16) {
        // Power management, version 3, no soft reset; the power state can be written.
        self.put(POWER_MANAGEMENT, &[0x01, MSIX as u8, 0x03, 0x00, 0x08]);
        self.allow(POWER_MANAGEMENT + 4, &[0x03]);
        let last = vectors.saturating_sub(1).min(0x7ff);
        self.put(MSIX, &[0x11, EXPRESS as u8]);
        self.put(MSIX + 2, &last.to_le_bytes());
        self.allow(MSIX + 3, &[0xc0]); // enable, mask
        self.put(MSIX + 4, &4u32.to_le_bytes());
        self.put(MSIX + 8, &(PENDING_OFFSET | 4).to_le_bytes());
        // PCI Express, version 2, endpoint; it is the last.
        self.put(EXPRESS, &[0x10, 0x00, 0x02, 0x00]);
        self.put(EXPRESS + 4, &(FLR_CAPABLE | ROLE_BASED_ERRORS).to_le_bytes());
        self.allow(DEVICE_CONTROL, &[0xff, 0xff]);
    }

    fn put(&mut self, at: usize, value: &[u8]) {
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// Loads; the caller has checked that it lies in the space.
    pub(super) fn read(&self, at: usize, count: usize) -> &[u8] {
        &self.bytes[at..at + count]
    }

    /// Stores what can be stored; the caller has checked that it lies in the space.
    pub(super) fn write(&mut self, at: usize, data: &[u8]) -> ConfigEffect {
        for (offset, &value) in (at..).zip(data) {
            let mask = self.writable[offset];
            self.bytes[offset] = self.bytes[offset] & !mask | value & mask;
        }
        let control = u16::from_le_bytes([self.bytes[DEVICE_CONTROL], self.bytes[DEVICE_CONTROL + 1]]);
        if control & INITIATE_FLR == 0 {
            return ConfigEffect::None;
        }
        self.put(DEVICE_CONTROL, &(control & !INITIATE_FLR).to_le_bytes());
        ConfigEffect::Reset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dword(space: &ConfigSpace, at: usize) -> u32 {
        u32::from_le_bytes(space.read(at, 4).try_into().unwrap())
    }

    #[test]
    fn it_is_an_nvme_controller_with_a_chain_of_capabilities() {
        let space = ConfigSpace::new(0x4000, 17);
        assert_eq!(dword(&space, 0x08) >> 8, 0x01_08_02);
        let mut at = space.read(0x34, 1)[0] as usize;
        let mut found = Vec::new();
        while at != 0 && found.len() < 10 {
            found.push(space.read(at, 1)[0]);
            at = space.read(at + 1, 1)[0] as usize;
        }
        assert_eq!(found, [0x01, 0x11, 0x10]);
        assert_eq!(dword(&space, MSIX) >> 16 & 0x7ff, 16, "the table size is one less than the vectors");
    }

    #[test]
    fn bars_tell_their_size_and_keep_their_address() {
        let mut space = ConfigSpace::new(0x4000, 1);
        space.write(0x10, &[0xff; 8]);
        assert_eq!((dword(&space, 0x10), dword(&space, 0x14)), (0xffff_c004, 0xffff_ffff));
        space.write(0x10, &0xfe00_0000u64.to_le_bytes());
        assert_eq!(dword(&space, 0x10), 0xfe00_0004);
        space.write(0x18, &[0xff; 8]);
        assert_eq!(dword(&space, 0x18), 0);
    }

    #[test]
    fn identity_cannot_be_written() {
        let mut space = ConfigSpace::new(0x4000, 1);
        let before = space.read(0, 4).to_vec();
        space.write(0, &[0xff; 4]);
        assert_eq!(space.read(0, 4), before);
        space.write(4, &[0xff; 2]);
        assert_eq!(space.read(4, 2), COMMAND_WRITABLE.to_le_bytes());
    }

    #[test]
    fn function_level_reset_is_reported_and_not_kept() {
        let mut space = ConfigSpace::new(0x4000, 1);
        assert_eq!(space.write(DEVICE_CONTROL, &[0x10, 0x80]), ConfigEffect::Reset);
        assert_eq!(space.read(DEVICE_CONTROL, 2), [0x10, 0x00]);
        assert_eq!(space.write(4, &[0x06, 0x00]), ConfigEffect::None);
    }
}
