//! Controller registers (§3.1): offsets in BAR0, bit fields, doorbells.

use bitfield_struct::bitfield;
use core::fmt;

use crate::ids::QueueId;

/// Controller Capabilities, 64 bits (§3.1.1).
pub const CAP: u64 = 0x00;
/// Version, 32 bits (§3.1.2).
pub const VS: u64 = 0x08;
/// Interrupt Mask Set, 32 bits (§3.1.3).
pub const INTMS: u64 = 0x0c;
/// Interrupt Mask Clear, 32 bits (§3.1.4).
pub const INTMC: u64 = 0x10;
/// Controller Configuration, 32 bits (§3.1.5).
pub const CC: u64 = 0x14;
/// Controller Status, 32 bits (§3.1.6).
pub const CSTS: u64 = 0x1c;
/// NVM Subsystem Reset, 32 bits (§3.1.7).
pub const NSSR: u64 = 0x20;
/// Admin Queue Attributes, 32 bits (§3.1.8).
pub const AQA: u64 = 0x24;
/// Admin Submission Queue Base Address, 64 bits (§3.1.9).
pub const ASQ: u64 = 0x28;
/// Admin Completion Queue Base Address, 64 bits (§3.1.10).
pub const ACQ: u64 = 0x30;
/// Controller Memory Buffer Location, 32 bits (§3.1.11).
pub const CMBLOC: u64 = 0x38;
/// Controller Memory Buffer Size, 32 bits (§3.1.12).
pub const CMBSZ: u64 = 0x3c;
/// First doorbell (§3.1.24).
pub const DOORBELL_BASE: u64 = 0x1000;
/// What [`NSSR`] takes to reset the subsystem: "NVMe" in ASCII (§3.1.7).
pub const NSSR_MAGIC: u32 = 0x4e56_4d65;

/// Which of a queue pair's two doorbells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doorbell {
    /// Submission queue tail.
    SubmissionTail,
    /// Completion queue head.
    CompletionHead,
}

/// Offset in BAR0 of a doorbell: `0x1000 + (2 * queue + completion) * (4 << CAP.DSTRD)` (§3.1.24, §3.1.25).
pub const fn doorbell_offset(dstrd: u8, queue: QueueId, which: Doorbell) -> u64 {
    let completion = match which {
        Doorbell::SubmissionTail => 0,
        Doorbell::CompletionHead => 1,
    };
    DOORBELL_BASE + (2 * queue.get() as u64 + completion) * (4 << (dstrd & 0xf))
}

/// The inverse of [`doorbell_offset`]: `None` if no doorbell lies at `offset`.
pub const fn doorbell_at(dstrd: u8, offset: u64) -> Option<(QueueId, Doorbell)> {
    if offset < DOORBELL_BASE {
        return None;
    }
    let stride = 4 << (dstrd & 0xf);
    let relative = offset - DOORBELL_BASE;
    let index = relative / stride;
    if !relative.is_multiple_of(stride) || index / 2 > u16::MAX as u64 {
        return None;
    }
    let which = if index.is_multiple_of(2) { Doorbell::SubmissionTail } else { Doorbell::CompletionHead };
    Some((QueueId::new((index / 2) as u16), which))
}

/// Controller Capabilities (§3.1.1, with 2.0's CRMS).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Cap {
    /// Entries of the largest I/O queue, less one.
    pub mqes_z: u16,
    /// Queues must be physically contiguous.
    pub cqr: bool,
    /// Arbitration mechanisms beside round robin: bit 0 weighted, bit 1 vendor specific.
    #[bits(2)]
    pub ams: u8,
    #[bits(5)]
    __: u8,
    /// Longest time for CSTS.RDY to follow CC.EN, in units of 500 ms.
    pub to: u8,
    /// Doorbell stride: `4 << dstrd` bytes.
    #[bits(4)]
    pub dstrd: u8,
    /// NVM subsystem reset supported.
    pub nssrs: bool,
    /// Command sets supported: bit 0 NVM, bit 6 several by CC.CSS, bit 7 admin only.
    pub css: u8,
    /// Boot partitions supported.
    pub bps: bool,
    /// Controller power scope (2.0).
    #[bits(2)]
    pub cps: u8,
    /// Smallest memory page: `1 << (12 + mpsmin)` bytes.
    #[bits(4)]
    pub mpsmin: u8,
    /// Largest memory page: `1 << (12 + mpsmax)` bytes.
    #[bits(4)]
    pub mpsmax: u8,
    /// Persistent memory region supported.
    pub pmrs: bool,
    /// Controller memory buffer supported.
    pub cmbs: bool,
    /// NVM subsystem shutdown supported (2.0).
    pub nsss: bool,
    /// Controller ready modes supported (2.0).
    #[bits(2)]
    pub crms: u8,
    #[bits(3)]
    __: u8,
}

impl Cap {
    /// [`Self::css`]: the NVM command set is supported.
    pub const CSS_NVM: u8 = 1 << 0;
    /// [`Self::css`]: several I/O command sets can be selected with CC.CSS 6.
    pub const CSS_SEVERAL: u8 = 1 << 6;
    /// [`Self::css`]: no I/O command set.
    pub const CSS_ADMIN_ONLY: u8 = 1 << 7;
}

/// Version (§3.1.2).
#[bitfield(u32, debug = false)]
#[derive(PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Tertiary.
    pub tertiary: u8,
    /// Minor.
    pub minor: u8,
    /// Major.
    pub major: u16,
}

impl Version {
    /// NVM Express 1.4.
    pub const V1_4: Self = Self::new().with_major(1).with_minor(4);
    /// NVM Express 2.0.
    pub const V2_0: Self = Self::new().with_major(2);
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major(), self.minor(), self.tertiary())
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Version({self})")
    }
}

/// Controller Configuration (§3.1.5).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Cc {
    /// Enable.
    pub en: bool,
    #[bits(3)]
    __: u8,
    /// I/O command set selected: 0 NVM, 6 all supported, 7 admin only.
    #[bits(3)]
    pub css: u8,
    /// Memory page size: `1 << (12 + mps)` bytes.
    #[bits(4)]
    pub mps: u8,
    /// Arbitration mechanism: 0 round robin.
    #[bits(3)]
    pub ams: u8,
    /// Shutdown notification, a [`Shutdown`].
    #[bits(2)]
    pub shn: u8,
    /// Size of an I/O submission queue entry: `1 << iosqes` bytes.
    #[bits(4)]
    pub iosqes: u8,
    /// Size of an I/O completion queue entry: `1 << iocqes` bytes.
    #[bits(4)]
    pub iocqes: u8,
    /// Controller ready independent of media (2.0).
    pub crime: bool,
    #[bits(7)]
    __: u8,
}

/// CC.SHN: shutdown notification (§3.1.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Shutdown {
    /// No notification.
    None = 0,
    /// Normal shutdown.
    Normal = 1,
    /// Abrupt shutdown.
    Abrupt = 2,
}

/// CSTS.SHST: shutdown status (§3.1.6).
pub mod shst {
    /// Normal operation.
    pub const NORMAL: u8 = 0;
    /// Shutdown processing occurs.
    pub const OCCURRING: u8 = 1;
    /// Shutdown processing complete.
    pub const COMPLETE: u8 = 2;
}

/// Controller Status (§3.1.6).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Csts {
    /// Ready.
    pub rdy: bool,
    /// Controller fatal status.
    pub cfs: bool,
    /// Shutdown status, see [`shst`].
    #[bits(2)]
    pub shst: u8,
    /// NVM subsystem reset occurred.
    pub nssro: bool,
    /// Processing paused.
    pub pp: bool,
    /// Shutdown type: 1 if of the whole subsystem (2.0).
    pub st: bool,
    #[bits(25)]
    __: u32,
}

impl Csts {
    /// What a removed device reads as. It also has RDY set, so look for it first.
    pub const ALL_ONES: u32 = u32::MAX;
}

/// Admin Queue Attributes (§3.1.8).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Aqa {
    /// Entries of the admin submission queue, less one.
    #[bits(12)]
    pub asqs_z: u16,
    #[bits(4)]
    __: u8,
    /// Entries of the admin completion queue, less one.
    #[bits(12)]
    pub acqs_z: u16,
    #[bits(4)]
    __: u8,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_sit_where_the_figures_put_them() {
        let cap = Cap::new().with_mqes_z(0x1234).with_to(0x56).with_dstrd(7).with_css(1).with_mpsmax(9);
        assert_eq!(u64::from(cap), 0x1234 | 0x56 << 24 | 7 << 32 | 1 << 37 | 9 << 52);
        let cc = Cc::new().with_en(true).with_mps(1).with_shn(2).with_iosqes(6).with_iocqes(4);
        assert_eq!(u32::from(cc), 1 | 1 << 7 | 2 << 14 | 6 << 16 | 4 << 20);
        assert_eq!(u32::from(Csts::new().with_cfs(true).with_shst(2).with_pp(true)), 0b10_1010);
        assert_eq!(u32::from(Aqa::new().with_asqs_z(31).with_acqs_z(63)), 31 | 63 << 16);
        assert_eq!(u32::from(Version::V1_4), 0x0001_0400);
    }

    #[test]
    fn doorbells_honour_the_stride_and_invert() {
        let queue = QueueId::new(3);
        assert_eq!(doorbell_offset(0, queue, Doorbell::SubmissionTail), 0x1018);
        assert_eq!(doorbell_offset(0, queue, Doorbell::CompletionHead), 0x101c);
        assert_eq!(doorbell_offset(2, queue, Doorbell::CompletionHead), 0x1000 + 7 * 16);
        for dstrd in 0..16 {
            for id in [0, 1, 2, 999, u16::MAX] {
                for which in [Doorbell::SubmissionTail, Doorbell::CompletionHead] {
                    let offset = doorbell_offset(dstrd, QueueId::new(id), which);
                    assert_eq!(doorbell_at(dstrd, offset), Some((QueueId::new(id), which)));
                    assert_eq!(doorbell_at(dstrd, offset + 1), None);
                }
            }
        }
        assert_eq!(doorbell_at(0, CSTS), None);
        assert_eq!(doorbell_at(0, u64::MAX - 3), None);
    }
}
