//! Identify data structures (§5.15.2), those of 1.4 with 2.0's additions that reuse reserved fields.

use bitfield_struct::bitfield;
use bitflags::bitflags;
use core::mem::{offset_of, size_of};
use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::open_enum::open_enum;

open_enum! {
    /// Controller or Namespace Structure: what Identify returns (§5.15.1).
    pub struct Cns(u8) {
        NAMESPACE = 0x00, "Identify Namespace";
        CONTROLLER = 0x01, "Identify Controller";
        ACTIVE_NAMESPACES = 0x02, "Active Namespace ID list";
        NAMESPACE_DESCRIPTORS = 0x03, "Namespace Identification Descriptor list";
        NVM_SETS = 0x04, "NVM Set list";
        NAMESPACE_COMMAND_SET = 0x05, "I/O Command Set specific Identify Namespace";
        CONTROLLER_COMMAND_SET = 0x06, "I/O Command Set specific Identify Controller";
        ALLOCATED_NAMESPACES = 0x10, "Allocated Namespace ID list";
        ALLOCATED_NAMESPACE = 0x11, "Identify Namespace of an allocated namespace";
        ATTACHED_CONTROLLERS = 0x12, "Controllers attached to a namespace";
        CONTROLLERS = 0x13, "Controller list";
    }
}

bitflags! {
    /// Optional Admin Command Support, OACS.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Oacs: u16 {
        /// Security Send and Receive.
        const SECURITY = 1 << 0;
        /// Format NVM.
        const FORMAT = 1 << 1;
        /// Firmware Commit and Image Download.
        const FIRMWARE = 1 << 2;
        /// Namespace Management and Attachment.
        const NAMESPACE_MANAGEMENT = 1 << 3;
        /// Device Self-test.
        const SELF_TEST = 1 << 4;
        /// Directives.
        const DIRECTIVES = 1 << 5;
        /// NVMe-MI Send and Receive.
        const MI = 1 << 6;
        /// Virtualization Management.
        const VIRTUALIZATION = 1 << 7;
        /// Doorbell Buffer Config.
        const DOORBELL_BUFFER = 1 << 8;
        /// Get LBA Status.
        const LBA_STATUS = 1 << 9;
        const _ = !0;
    }
}

bitflags! {
    /// Optional NVM Command Support, ONCS.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Oncs: u16 {
        /// Compare.
        const COMPARE = 1 << 0;
        /// Write Uncorrectable.
        const WRITE_UNCORRECTABLE = 1 << 1;
        /// Dataset Management.
        const DATASET_MANAGEMENT = 1 << 2;
        /// Write Zeroes.
        const WRITE_ZEROES = 1 << 3;
        /// Save field of Set Features and select field of Get Features.
        const FEATURE_SAVE = 1 << 4;
        /// Reservations.
        const RESERVATIONS = 1 << 5;
        /// Timestamp feature.
        const TIMESTAMP = 1 << 6;
        /// Verify.
        const VERIFY = 1 << 7;
        /// Copy.
        const COPY = 1 << 8;
        const _ = !0;
    }
}

bitflags! {
    /// Log Page Attributes, LPA.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Lpa: u8 {
        /// SMART log per namespace.
        const SMART_PER_NAMESPACE = 1 << 0;
        /// Commands Supported and Effects log page.
        const COMMAND_EFFECTS = 1 << 1;
        /// Extended data for Get Log Page: offsets and 32-bit lengths.
        const EXTENDED_DATA = 1 << 2;
        /// Telemetry.
        const TELEMETRY = 1 << 3;
        /// Persistent event log.
        const PERSISTENT_EVENT = 1 << 4;
        const _ = !0;
    }
}

bitflags! {
    /// Volatile Write Cache, VWC.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Vwc: u8 {
        /// A volatile write cache is present.
        const PRESENT = 1 << 0;
        /// Low bit of the behaviour of a flush of all namespaces; alone it is reserved.
        const FLUSH_ALL_LOW = 1 << 1;
        /// High bit: the behaviour is reported; with the low bit a flush of all namespaces is supported.
        const FLUSH_ALL_HIGH = 1 << 2;
        const _ = !0;
    }
}

bitflags! {
    /// Optional Asynchronous Events Supported, OAES; the bits of Asynchronous Event Configuration.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Oaes: u32 {
        /// Namespace attribute notices.
        const NAMESPACE_ATTRIBUTE = 1 << 8;
        /// Firmware activation notices.
        const FIRMWARE_ACTIVATION = 1 << 9;
        /// Asymmetric namespace access change notices.
        const ANA_CHANGE = 1 << 11;
        /// Predictable latency event aggregate log change notices.
        const PREDICTABLE_LATENCY = 1 << 12;
        /// LBA status information notices.
        const LBA_STATUS = 1 << 13;
        /// Endurance group event aggregate log change notices.
        const ENDURANCE_GROUP = 1 << 14;
        const _ = !0;
    }
}

bitflags! {
    /// Fused Operation Support, FUSES.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Fuses: u16 {
        /// Compare and Write.
        const COMPARE_AND_WRITE = 1 << 0;
        const _ = !0;
    }
}

bitflags! {
    /// Format NVM Attributes, FNA.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Fna: u8 {
        /// A format applies to all namespaces.
        const FORMAT_ALL = 1 << 0;
        /// A secure erase applies to all namespaces.
        const ERASE_ALL = 1 << 1;
        /// Cryptographic erase is supported.
        const CRYPTOGRAPHIC_ERASE = 1 << 2;
        /// A format of the broadcast identifier is *not* supported (2.0).
        const NO_BROADCAST = 1 << 3;
        const _ = !0;
    }
}

open_enum! {
    /// Whether, and how aligned, SGLs are supported: SGLS bits 1:0.
    pub struct SglSupport(u8) {
        NONE = 0, "not supported";
        BYTE = 1, "supported, any alignment";
        DWORD = 2, "supported, dword aligned";
    }
}

/// SGL Support, SGLS.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Sgls {
    /// Support and alignment, see [`SglSupport`].
    #[bits(2)]
    pub support: u8,
    /// Keyed SGL data block descriptors.
    pub keyed: bool,
    #[bits(5)]
    __: u8,
    /// Recommended number of descriptors of a command; 0 is no recommendation (2.0).
    pub threshold: u8,
    /// Bit buckets.
    pub bit_bucket: bool,
    /// A byte aligned contiguous metadata buffer.
    pub byte_aligned_metadata: bool,
    /// SGLs that are longer than the data.
    pub longer_than_data: bool,
    /// A metadata pointer to an SGL of one descriptor.
    pub metadata_sgl: bool,
    /// Offsets in the address field.
    pub offset_address: bool,
    /// Transport SGL data blocks.
    pub transport: bool,
    #[bits(10)]
    __: u16,
}

bitflags! {
    /// Namespace Features, NSFEAT.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Nsfeat: u8 {
        /// Thin provisioning: capacity may be less than size.
        const THIN = 1 << 0;
        /// The namespace's own atomicity fields count.
        const ATOMICS = 1 << 1;
        /// Deallocated or unwritten block error.
        const DEALLOCATED_ERROR = 1 << 2;
        /// NGUID and EUI64 are never used again.
        const IDS_NOT_REUSED = 1 << 3;
        /// Preferred granularities and alignments are given.
        const PREFERRED = 1 << 4;
        const _ = !0;
    }
}

/// I/O Command Set specific Identify Controller of the NVM command set, 4096 bytes (NVM Command Set 1.0 §4.1.5.4).
/// CNS 06h with command set 0. The size limits are `1 << value` pages of CAP.MPSMIN; 0 is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IdentifyControllerNvm {
    /// Verify size limit.
    pub vsl: u8,
    /// Write zeroes size limit.
    pub wzsl: u8,
    /// Write uncorrectable size limit.
    pub wusl: u8,
    /// Dataset management ranges limit; 0 is none.
    pub dmrl: u8,
    /// Dataset management range size limit in blocks; 0 is none.
    pub dmrsl: U32,
    /// Dataset management size limit in blocks; 0 is none.
    pub dmsl: U64,
    /// Reserved.
    pub reserved_16: [u8; 4080],
}

const _: () = {
    assert!(size_of::<IdentifyControllerNvm>() == crate::IDENTIFY_BYTES);
    assert!(offset_of!(IdentifyControllerNvm, dmrsl) == 4);
    assert!(offset_of!(IdentifyControllerNvm, dmsl) == 8);
};

/// Identify Controller data structure, 4096 bytes (§5.15.2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IdentifyController {
    /// PCI vendor id.
    pub vid: U16,
    /// PCI subsystem vendor id.
    pub ssvid: U16,
    /// Serial number, ASCII, padded with spaces.
    pub sn: [u8; 20],
    /// Model number, ASCII, padded with spaces.
    pub mn: [u8; 40],
    /// Firmware revision, ASCII, padded with spaces.
    pub fr: [u8; 8],
    /// Recommended arbitration burst, as a power of two.
    pub rab: u8,
    /// IEEE OUI.
    pub ieee: [u8; 3],
    /// Multi-path and namespace sharing.
    pub cmic: u8,
    /// Maximum data transfer size: `1 << mdts` pages of CAP.MPSMIN; 0 means no limit.
    pub mdts: u8,
    /// Controller id.
    pub cntlid: U16,
    /// Version, as the register.
    pub ver: U32,
    /// RTD3 resume latency in microseconds.
    pub rtd3r: U32,
    /// RTD3 entry latency in microseconds.
    pub rtd3e: U32,
    /// Optional asynchronous events supported.
    pub oaes: U32,
    /// Controller attributes.
    pub ctratt: U32,
    /// Read recovery levels supported.
    pub rrls: U16,
    /// Reserved.
    pub reserved_102: [u8; 9],
    /// Controller type: 1 is an I/O controller.
    pub cntrltype: u8,
    /// FRU globally unique identifier.
    pub fguid: [u8; 16],
    /// Command retry delay times 1 to 3 in units of 100 ms.
    pub crdt: [U16; 3],
    /// Reserved.
    pub reserved_134: [u8; 119],
    /// NVM subsystem report.
    pub nvmsr: u8,
    /// VPD write cycle information.
    pub vwci: u8,
    /// Management endpoint capabilities.
    pub mec: u8,
    /// Optional admin commands, see [`Oacs`].
    pub oacs: U16,
    /// Abort command limit, less one.
    pub acl_z: u8,
    /// Asynchronous event request limit, less one.
    pub aerl_z: u8,
    /// Firmware updates: bit 0 slot 1 read-only, bits 3:1 slots, bit 4 activation without reset.
    pub frmw: u8,
    /// Log page attributes, see [`Lpa`].
    pub lpa: u8,
    /// Error log page entries, less one.
    pub elpe_z: u8,
    /// Power states, less one.
    pub npss_z: u8,
    /// Admin vendor specific command configuration.
    pub avscc: u8,
    /// Autonomous power state transition attributes.
    pub apsta: u8,
    /// Warning composite temperature in kelvins.
    pub wctemp: U16,
    /// Critical composite temperature in kelvins.
    pub cctemp: U16,
    /// Maximum time for firmware activation in units of 100 ms.
    pub mtfa: U16,
    /// Host memory buffer preferred size in units of 4 KiB.
    pub hmpre: U32,
    /// Host memory buffer minimum size in units of 4 KiB.
    pub hmmin: U32,
    /// Total NVM capacity in bytes.
    pub tnvmcap: U128,
    /// Unallocated NVM capacity in bytes.
    pub unvmcap: U128,
    /// Replay protected memory block support.
    pub rpmbs: U32,
    /// Extended device self-test time in minutes.
    pub edstt: U16,
    /// Device self-test options.
    pub dsto: u8,
    /// Firmware update granularity in units of 4 KiB.
    pub fwug: u8,
    /// Keep alive support: granularity in units of 100 ms.
    pub kas: U16,
    /// Host controlled thermal management attributes.
    pub hctma: U16,
    /// Minimum thermal management temperature in kelvins.
    pub mntmt: U16,
    /// Maximum thermal management temperature in kelvins.
    pub mxtmt: U16,
    /// Sanitize capabilities.
    pub sanicap: U32,
    /// Host memory buffer minimum descriptor entry size in units of 4 KiB.
    pub hmminds: U32,
    /// Host memory maximum descriptors entries.
    pub hmmaxd: U16,
    /// NVM set identifier maximum.
    pub nsetidmax: U16,
    /// Endurance group identifier maximum.
    pub endgidmax: U16,
    /// ANA transition time in seconds.
    pub anatt: u8,
    /// Asymmetric namespace access capabilities.
    pub anacap: u8,
    /// ANA group identifier maximum.
    pub anagrpmax: U32,
    /// Number of ANA group identifiers.
    pub nanagrpid: U32,
    /// Persistent event log size in units of 64 KiB.
    pub pels: U32,
    /// Domain identifier (2.0).
    pub domainid: U16,
    /// Reserved.
    pub reserved_358: [u8; 10],
    /// Max endurance group capacity (2.0).
    pub megcap: U128,
    /// Reserved.
    pub reserved_384: [u8; 128],
    /// Submission queue entry size: bits 3:0 required, 7:4 maximum, as powers of two.
    pub sqes: u8,
    /// Completion queue entry size: bits 3:0 required, 7:4 maximum, as powers of two.
    pub cqes: u8,
    /// Maximum outstanding commands; 0 if not reported.
    pub maxcmd: U16,
    /// Largest namespace identifier that may be valid.
    pub nn: U32,
    /// Optional NVM commands, see [`Oncs`].
    pub oncs: U16,
    /// Fused operations: bit 0 compare and write.
    pub fuses: U16,
    /// Format NVM attributes.
    pub fna: u8,
    /// Volatile write cache, see [`Vwc`].
    pub vwc: u8,
    /// Atomic write unit normal in blocks, less one.
    pub awun_z: U16,
    /// Atomic write unit power fail in blocks, less one.
    pub awupf_z: U16,
    /// NVM vendor specific command configuration.
    pub nvscc: u8,
    /// Namespace write protection capabilities.
    pub nwpc: u8,
    /// Atomic compare and write unit in blocks, less one.
    pub acwu_z: U16,
    /// Copy descriptor formats supported (2.0).
    pub cdfs: U16,
    /// SGL support: bits 1:0, 1 supported, 2 supported with dword alignment.
    pub sgls: U32,
    /// Maximum number of allowed namespaces; 0 if not reported.
    pub mnan: U32,
    /// Maximum domain namespace attachments (2.0).
    pub maxdna: U128,
    /// Maximum I/O controller namespace attachments (2.0).
    pub maxcna: U32,
    /// Reserved.
    pub reserved_564: [u8; 204],
    /// NVM subsystem NVMe qualified name, UTF-8, zero-terminated.
    pub subnqn: [u8; 256],
    /// Reserved.
    pub reserved_1024: [u8; 768],
    /// NVMe over Fabrics.
    pub fabrics: [u8; 256],
    /// Power state descriptors.
    pub psd: [[u8; 32]; 32],
    /// Vendor specific.
    pub vs: [u8; 1024],
}

const _: () = {
    assert!(size_of::<IdentifyController>() == crate::IDENTIFY_BYTES);
    assert!(offset_of!(IdentifyController, mdts) == 77);
    assert!(offset_of!(IdentifyController, rtd3e) == 88);
    assert!(offset_of!(IdentifyController, cntrltype) == 111);
    assert!(offset_of!(IdentifyController, crdt) == 128);
    assert!(offset_of!(IdentifyController, nvmsr) == 253);
    assert!(offset_of!(IdentifyController, oacs) == 256);
    assert!(offset_of!(IdentifyController, aerl_z) == 259);
    assert!(offset_of!(IdentifyController, tnvmcap) == 280);
    assert!(offset_of!(IdentifyController, sanicap) == 328);
    assert!(offset_of!(IdentifyController, anagrpmax) == 344);
    assert!(offset_of!(IdentifyController, megcap) == 368);
    assert!(offset_of!(IdentifyController, sqes) == 512);
    assert!(offset_of!(IdentifyController, nn) == 516);
    assert!(offset_of!(IdentifyController, oncs) == 520);
    assert!(offset_of!(IdentifyController, vwc) == 525);
    assert!(offset_of!(IdentifyController, sgls) == 536);
    assert!(offset_of!(IdentifyController, subnqn) == 768);
    assert!(offset_of!(IdentifyController, fabrics) == 1792);
    assert!(offset_of!(IdentifyController, psd) == 2048);
    assert!(offset_of!(IdentifyController, vs) == 3072);
};

impl IdentifyController {
    /// Optional NVM commands.
    pub fn oncs(&self) -> Oncs {
        Oncs::from_bits_retain(self.oncs.get())
    }

    /// Optional admin commands.
    pub fn oacs(&self) -> Oacs {
        Oacs::from_bits_retain(self.oacs.get())
    }

    /// Log page attributes.
    pub fn lpa(&self) -> Lpa {
        Lpa::from_bits_retain(self.lpa)
    }

    /// Volatile write cache.
    pub fn vwc(&self) -> Vwc {
        Vwc::from_bits_retain(self.vwc)
    }

    /// Optional asynchronous events.
    pub fn oaes(&self) -> Oaes {
        Oaes::from_bits_retain(self.oaes.get())
    }

    /// Fused operations.
    pub fn fuses(&self) -> Fuses {
        Fuses::from_bits_retain(self.fuses.get())
    }

    /// Format NVM attributes.
    pub fn fna(&self) -> Fna {
        Fna::from_bits_retain(self.fna)
    }

    /// SGL support.
    pub fn sgls(&self) -> Sgls {
        self.sgls.get().into()
    }
}

/// LBA format (§5.15.2.1, figure "LBA Format Data Structure").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LbaFormat {
    /// Metadata bytes for each block.
    pub ms: U16,
    /// Block size as a power of two; 0 marks an unused format, less than 9 is invalid.
    pub lbads: u8,
    /// Relative performance in bits 1:0, 0 is best.
    pub rp: u8,
}

/// Entries of [`IdentifyNamespace::lbaf`] (2.0; 1.4 has the first 16).
pub const LBA_FORMATS: usize = 64;

/// Identify Namespace data structure, 4096 bytes (§5.15.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IdentifyNamespace {
    /// Size in logical blocks.
    pub nsze: U64,
    /// Capacity in logical blocks.
    pub ncap: U64,
    /// Utilisation in logical blocks.
    pub nuse: U64,
    /// Features: bit 0 thin provisioning, 1 own atomics, 2 deallocated-block error, 4 performance fields.
    pub nsfeat: u8,
    /// LBA formats, less one.
    pub nlbaf_z: u8,
    /// Formatted LBA size: see [`Self::format_index`]; bit 4 says metadata is appended to the data.
    pub flbas: u8,
    /// Metadata capabilities.
    pub mc: u8,
    /// End-to-end protection capabilities.
    pub dpc: u8,
    /// End-to-end protection in use: bits 2:0 type, 0 none.
    pub dps: u8,
    /// Multi-path and sharing.
    pub nmic: u8,
    /// Reservation capabilities.
    pub rescap: u8,
    /// Format progress indicator.
    pub fpi: u8,
    /// Deallocate features: bits 2:0 what deallocated blocks read as (1 zeroes, 2 ones), bit 3 deallocate in write zeroes.
    pub dlfeat: u8,
    /// Atomic write unit normal, less one.
    pub nawun_z: U16,
    /// Atomic write unit power fail, less one.
    pub nawupf_z: U16,
    /// Atomic compare and write unit, less one.
    pub nacwu_z: U16,
    /// Atomic boundary size normal, less one.
    pub nabsn_z: U16,
    /// Atomic boundary offset.
    pub nabo: U16,
    /// Atomic boundary size power fail, less one.
    pub nabspf_z: U16,
    /// Optimal I/O boundary in blocks; 0 if none.
    pub noiob: U16,
    /// NVM capacity in bytes.
    pub nvmcap: U128,
    /// Preferred write granularity, less one.
    pub npwg_z: U16,
    /// Preferred write alignment, less one.
    pub npwa_z: U16,
    /// Preferred deallocate granularity, less one.
    pub npdg_z: U16,
    /// Preferred deallocate alignment, less one.
    pub npda_z: U16,
    /// Optimal write size, less one.
    pub nows_z: U16,
    /// Maximum single source range length of copy (2.0).
    pub mssrl: U16,
    /// Maximum copy length (2.0).
    pub mcl: U32,
    /// Maximum source range count of copy, less one (2.0).
    pub msrc_z: u8,
    /// Reserved.
    pub reserved_81: [u8; 11],
    /// ANA group identifier.
    pub anagrpid: U32,
    /// Reserved.
    pub reserved_96: [u8; 3],
    /// Attributes: bit 0 write protected.
    pub nsattr: u8,
    /// NVM set.
    pub nvmsetid: U16,
    /// Endurance group.
    pub endgid: U16,
    /// Namespace globally unique identifier.
    pub nguid: [u8; 16],
    /// IEEE extended unique identifier.
    pub eui64: [u8; 8],
    /// LBA formats.
    pub lbaf: [LbaFormat; LBA_FORMATS],
    /// Vendor specific.
    pub vs: [u8; 3712],
}

const _: () = {
    assert!(size_of::<IdentifyNamespace>() == crate::IDENTIFY_BYTES);
    assert!(offset_of!(IdentifyNamespace, flbas) == 26);
    assert!(offset_of!(IdentifyNamespace, dlfeat) == 33);
    assert!(offset_of!(IdentifyNamespace, noiob) == 46);
    assert!(offset_of!(IdentifyNamespace, nvmcap) == 48);
    assert!(offset_of!(IdentifyNamespace, anagrpid) == 92);
    assert!(offset_of!(IdentifyNamespace, nguid) == 104);
    assert!(offset_of!(IdentifyNamespace, lbaf) == 128);
    assert!(offset_of!(IdentifyNamespace, vs) == 384);
};

impl IdentifyNamespace {
    /// Index of the LBA format in use: FLBAS bits 3:0, with bits 6:5 above them where more than 16 formats exist.
    pub fn format_index(&self) -> usize {
        let low = usize::from(self.flbas & 0xf);
        if self.nlbaf_z < 16 { low } else { low | usize::from(self.flbas >> 5 & 3) << 4 }
    }
}

impl IdentifyNamespace {
    /// Namespace features.
    pub fn nsfeat(&self) -> Nsfeat {
        Nsfeat::from_bits_retain(self.nsfeat)
    }

    /// LBA formats that exist: what NLBAF says, as far as the structure holds them.
    pub fn formats(&self) -> &[LbaFormat] {
        &self.lbaf[..(usize::from(self.nlbaf_z) + 1).min(LBA_FORMATS)]
    }
}

/// Active Namespace ID list: ascending, zero-filled (§5.15.2.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NamespaceList {
    /// Identifiers greater than the one asked for, zero after the last.
    pub ids: [U32; 1024],
}

const _: () = assert!(size_of::<NamespaceList>() == crate::IDENTIFY_BYTES);

open_enum! {
    /// Type of a namespace identification descriptor (§5.15.2.4).
    pub struct NamespaceIdType(u8) {
        EUI64 = 1, "IEEE extended unique identifier";
        NGUID = 2, "namespace globally unique identifier";
        UUID = 3, "namespace UUID";
        CSI = 4, "command set identifier";
    }
}

open_enum! {
    /// I/O command set of a namespace: the identifier of a descriptor of type CSI (2.0 §5.17.2.3, figure 274).
    pub struct CommandSet(u8) {
        NVM = 0, "NVM";
        KEY_VALUE = 1, "key value";
        ZONED = 2, "zoned";
    }
}

/// Header of a namespace identification descriptor; `length` bytes follow, a length of 0 ends the list (§5.15.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NamespaceIdHeader {
    /// What the identifier is.
    pub id_type: NamespaceIdType,
    /// Bytes of the identifier.
    pub length: u8,
    /// Reserved.
    pub reserved_2: [u8; 2],
}

const _: () = assert!(size_of::<NamespaceIdHeader>() == 4);

/// The descriptors of a Namespace Identification Descriptor list, type and identifier; it ends at a length of 0, and at
/// what cannot be (§5.15.2.4).
pub fn namespace_descriptors(list: &[u8]) -> impl Iterator<Item = (NamespaceIdType, &[u8])> {
    let mut rest = list;
    core::iter::from_fn(move || {
        let (header, after) = NamespaceIdHeader::read_from_prefix(rest).ok()?;
        let id = after.get(..usize::from(header.length)).filter(|id| !id.is_empty())?;
        rest = &after[id.len()..];
        Some((header.id_type, id))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromZeros;

    #[test]
    fn descriptor_lists_end_at_zero_and_at_nonsense() {
        let list = [3, 2, 0, 0, 0xaa, 0xbb, 4, 1, 0, 0, 0, 0, 0, 0, 0, 9];
        let found: [_; 2] = core::array::from_fn(|n| namespace_descriptors(&list).nth(n).unwrap());
        assert_eq!(found[0], (NamespaceIdType::UUID, &[0xaa, 0xbb][..]));
        assert_eq!(found[1], (NamespaceIdType::CSI, &[0][..]));
        assert_eq!(namespace_descriptors(&list).count(), 2);
        assert_eq!(namespace_descriptors(&[1, 8, 0, 0, 1, 2]).count(), 0, "longer than the list");
        assert_eq!(namespace_descriptors(&[1, 8]).count(), 0);
    }

    #[test]
    fn sgl_support_bits_sit_where_the_figure_puts_them() {
        let sgls = Sgls::new().with_support(SglSupport::DWORD.0).with_bit_bucket(true).with_transport(true);
        assert_eq!(u32::from(sgls), 2 | 1 << 16 | 1 << 21);
    }

    #[test]
    fn upper_format_bits_count_only_with_more_than_16_formats() {
        let mut namespace = IdentifyNamespace::new_zeroed();
        namespace.flbas = 0b0110_0010;
        namespace.nlbaf_z = 15;
        assert_eq!(namespace.format_index(), 2);
        namespace.nlbaf_z = 63;
        assert_eq!(namespace.format_index(), 0x32);
    }
}
