//! What a controller and its namespaces say of themselves, checked.
//!
//! Owns: [`ControllerInfo`], [`Namespace`] and the arithmetic that stands between Identify data and the rest of the
//! driver. Identify data is input: nothing of it is used before it passed here.
//!
//! Excludes: sending Identify.

use std::fmt;

use nvme_spec::NamespaceId;
use nvme_spec::identify::{
    CommandSet, IdentifyController, IdentifyControllerNvm, IdentifyNamespace, LBA_FORMATS, NamespaceIdType,
    Nsfeat, Oncs, Vwc, namespace_descriptors,
};
use nvme_spec::registers::{Cap, Version};
use thiserror::Error;

use crate::copy::CopyLimits;

/// Largest logical block that the driver works with, as a power of two: 64 KiB.
pub const MAX_LBA_SHIFT: u8 = 16;
/// Smallest logical block (NVMe 1.4 §5.15.2.1), as a power of two.
pub const MIN_LBA_SHIFT: u8 = 9;

/// Identify data that cannot be right, or that this driver cannot work with.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// Entry sizes do not include the standard ones.
    #[error("{field} is {value:#04x}: {bytes}-byte queue entries are not supported by the controller")]
    EntrySize {
        /// SQES or CQES.
        field: &'static str,
        /// Its value.
        value: u8,
        /// The standard size.
        bytes: u32,
    },
    /// An administrative or discovery controller.
    #[error("controller type {0} has no I/O queues")]
    NotAnIoController(u8),
    /// The active namespace list is not ascending or leaves the range of identifiers.
    #[error("active namespace list is not ascending within 1..={nn}: {id} after {previous}")]
    NamespaceList {
        /// The offending identifier.
        id: u32,
        /// Its predecessor.
        previous: u32,
        /// Identify Controller's NN.
        nn: u32,
    },
    /// More namespaces than the driver keeps.
    #[error("more than {0} active namespaces")]
    TooManyNamespaces(usize),
}

/// Why a namespace cannot be used; the controller and other namespaces can.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum NamespaceProblem {
    /// NSZE is 0.
    #[error("it is empty")]
    Empty,
    /// NCAP exceeds NSZE.
    #[error("its capacity of {ncap} blocks exceeds its size of {nsze} blocks")]
    CapacityBeyondSize {
        /// Capacity in blocks.
        ncap: u64,
        /// Size in blocks.
        nsze: u64,
    },
    /// FLBAS names a format that is not there.
    #[error("its LBA format {index} does not exist ({formats} do)")]
    NoSuchFormat {
        /// The format named.
        index: usize,
        /// Formats offered.
        formats: usize,
    },
    /// LBADS is out of range.
    #[error("its blocks of 2^{0} bytes are not supported (512 bytes to 64 KiB are)")]
    BlockSize(u8),
    /// Size in bytes exceeds 64 bits.
    #[error("its size of {nsze} blocks of 2^{lbads} bytes overflows 64 bits")]
    TooLarge {
        /// Size in blocks.
        nsze: u64,
        /// Block size as a power of two.
        lbads: u8,
    },
    /// Of an I/O command set other than NVM: its blocks are not read and written as blocks are.
    #[error("it uses the {0} command set, which is not supported (the NVM command set is)")]
    CommandSet(CommandSet),
    /// The descriptor of its I/O command set is not one byte long, or there are several that differ.
    #[error("the controller does not say clearly which command set it uses (Identify, CNS 03h)")]
    AmbiguousCommandSet,
    /// Formatted with metadata.
    #[error("it is formatted with {0} bytes of metadata a block, which is not supported yet")]
    Metadata(u16),
    /// Formatted with end-to-end protection.
    #[error("it is formatted with end-to-end protection type {0}, which is not supported yet")]
    Protection(u8),
    /// MDTS is less than a block.
    #[error(
        "its blocks of {lba_size} bytes exceed the controller's largest transfer of {max_transfer} bytes"
    )]
    BlockBeyondTransfer {
        /// Block size.
        lba_size: u32,
        /// Largest transfer.
        max_transfer: u64,
    },
}

/// A namespace that can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its identifier.
    pub nsid: NamespaceId,
    /// Bytes of a logical block as a power of two.
    pub lba_shift: u8,
    /// Logical blocks.
    pub blocks: u64,
    /// Blocks allocated, as the controller reports.
    pub utilisation: u64,
    /// Boundary in blocks that a command should not cross; 0 if there is none.
    pub optimal_boundary: u16,
    /// Whether write zeroes may ask to deallocate (DLFEAT).
    pub zeroes_deallocate: bool,
    /// Blocks of the largest atomic compare and write, if the namespace has its own limit (NACWU).
    pub compare_and_write: Option<u32>,
    /// Limits of one Copy command; `None` if they allow none.
    pub copy: Option<CopyLimits>,
    /// Namespace globally unique identifier; zeroes if there is none.
    pub nguid: [u8; 16],
    /// IEEE extended unique identifier; zeroes if there is none.
    pub eui64: [u8; 8],
}

impl Namespace {
    /// Bytes of a logical block.
    pub fn lba_size(&self) -> u32 {
        1 << self.lba_shift
    }

    /// Whether whatever was planned for `other` holds for this one: the same namespace, blocks of the same size, and as many.
    pub(crate) fn is_like(&self, other: &Namespace) -> bool {
        (self.nsid, self.lba_shift) == (other.nsid, other.lba_shift) && self.blocks >= other.blocks
    }

    /// Checks Identify Namespace data. `max_transfer` is the controller's limit in bytes, if it has one.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn check(
        nsid: NamespaceId,
        raw: &IdentifyNamespace,
        max_transfer: Option<u64>,
    ) -> Result<Self, NamespaceProblem> {
        let (nsze, ncap) = (raw.nsze.get(), raw.ncap.get());
        if nsze == 0 {
            return Err(NamespaceProblem::Empty);
        }
        if ncap > nsze {
            return Err(NamespaceProblem::CapacityBeyondSize { ncap, nsze });
        }
        let index = raw.format_index();
        let formats = usize::from(raw.nlbaf_z) + 1;
        if index >= formats.min(LBA_FORMATS) {
            return Err(NamespaceProblem::NoSuchFormat { index, formats });
        }
        let format = raw.lbaf[index];
        if !(MIN_LBA_SHIFT..=MAX_LBA_SHIFT).contains(&format.lbads) {
            return Err(NamespaceProblem::BlockSize(format.lbads));
        }
        if nsze > u64::MAX >> format.lbads {
            return Err(NamespaceProblem::TooLarge { nsze, lbads: format.lbads });
        }
        if format.ms.get() != 0 {
            return Err(NamespaceProblem::Metadata(format.ms.get()));
        }
        if raw.dps & 7 != 0 {
            return Err(NamespaceProblem::Protection(raw.dps & 7));
        }
        let lba_size = 1 << format.lbads;
        if let Some(max_transfer) = max_transfer.filter(|&limit| limit < u64::from(lba_size)) {
            return Err(NamespaceProblem::BlockBeyondTransfer { lba_size, max_transfer });
        }
        Ok(Self {
            nsid,
            lba_shift: format.lbads,
            blocks: nsze,
            utilisation: raw.nuse.get(),
            optimal_boundary: raw.noiob.get(),
            zeroes_deallocate: raw.dlfeat & (1 << 3) != 0,
            // Counted from zero, and yet 0 is "as the controller".
            compare_and_write: (raw.nsfeat().contains(Nsfeat::ATOMICS) && raw.nacwu_z.get() != 0)
                .then(|| u32::from(raw.nacwu_z.get()) + 1),
            copy: CopyLimits::of(raw),
            nguid: raw.nguid,
            eui64: raw.eui64,
        })
    }
}

/// A namespace as the controller lists it.
#[derive(Clone, Debug)]
pub struct NamespaceEntry {
    /// Its identifier.
    pub nsid: NamespaceId,
    /// Identify data as the controller gave it; zeroes if it gives none, as of a namespace without blocks.
    pub raw: Box<IdentifyNamespace>,
    /// The checked form, or why it cannot be used.
    pub checked: Result<Namespace, NamespaceProblem>,
}

/// What a controller is.
#[derive(Clone)]
pub struct ControllerInfo {
    /// Capabilities register.
    pub cap: Cap,
    /// Version register.
    pub version: Version,
    /// Serial number, without padding.
    pub serial: String,
    /// Model, without padding.
    pub model: String,
    /// Firmware revision, without padding.
    pub firmware: String,
    /// Memory page size in bytes that CC.MPS was set to.
    pub page_size: u32,
    /// Largest transfer of a command in bytes; `None` if there is no limit.
    pub max_transfer: Option<u64>,
    /// Largest Verify in bytes (VSL, 2.0); `None` if there is no limit, or the controller does not tell.
    pub max_verify: Option<u64>,
    /// Largest Write Zeroes in bytes (WZSL, 2.0); `None` if there is no limit, or the controller does not tell.
    pub max_zeroes: Option<u64>,
    /// Blocks of the largest range of a deallocate (DMRSL and DMSL, 2.0); `None` if there is no limit, or the controller
    /// does not tell.
    pub max_deallocate: Option<u64>,
    /// Largest namespace identifier.
    pub nn: u32,
    /// Optional NVM commands.
    pub oncs: Oncs,
    /// Whether there is a volatile write cache.
    pub volatile_write_cache: bool,
    /// Identify data as the controller gave it.
    pub raw: Box<IdentifyController>,
}

impl ControllerInfo {
    /// Checks Identify Controller data.
    ///
    /// # Errors
    /// The first thing that makes the controller unusable.
    pub fn check(
        cap: Cap,
        version: Version,
        page_size: u32,
        raw: Box<IdentifyController>,
    ) -> Result<Self, IdentityError> {
        check_entry_size("SQES", raw.sqes, 6)?;
        check_entry_size("CQES", raw.cqes, 4)?;
        // 0 is "not reported", as controllers before 1.4 do.
        if raw.cntrltype > 1 {
            return Err(IdentityError::NotAnIoController(raw.cntrltype));
        }
        Ok(Self {
            cap,
            version,
            serial: ascii(&raw.sn),
            model: ascii(&raw.mn),
            firmware: ascii(&raw.fr),
            page_size,
            max_transfer: max_transfer(raw.mdts, cap.mpsmin()),
            max_verify: None,
            max_zeroes: None,
            max_deallocate: None,
            nn: raw.nn.get(),
            oncs: raw.oncs(),
            volatile_write_cache: raw.vwc().contains(Vwc::PRESENT),
            raw,
        })
    }

    /// Takes the limits of the NVM command set over (NVM Command Set 1.0 §4.1.5.4). Any bytes will do.
    pub(crate) fn apply_limits(&mut self, raw: &IdentifyControllerNvm) {
        self.max_verify = max_transfer(raw.vsl, self.cap.mpsmin());
        self.max_zeroes = max_transfer(raw.wzsl, self.cap.mpsmin());
        let limits = [u64::from(raw.dmrsl.get()), raw.dmsl.get()];
        self.max_deallocate = limits.into_iter().filter(|&blocks| blocks != 0).min();
    }
}

impl fmt::Debug for ControllerInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControllerInfo")
            .field("model", &self.model)
            .field("serial", &self.serial)
            .field("firmware", &self.firmware)
            .field("version", &self.version)
            .field("max_transfer", &self.max_transfer)
            .finish_non_exhaustive()
    }
}

fn check_entry_size(field: &'static str, value: u8, shift: u8) -> Result<(), IdentityError> {
    let (required, maximum) = (value & 0xf, value >> 4);
    if required <= shift && shift <= maximum {
        Ok(())
    } else {
        Err(IdentityError::EntrySize { field, value, bytes: 1 << shift })
    }
}

/// MDTS, VSL or WZSL in bytes: units of CAP.MPSMIN, 0 is no limit, and so is more than 64 bits hold.
fn max_transfer(mdts: u8, mpsmin: u8) -> Option<u64> {
    if mdts == 0 {
        return None;
    }
    1u64.checked_shl(u32::from(mdts) + 12 + u32::from(mpsmin))
}

/// Text as controllers give it: printable ASCII, what is not shown as `?`, padding removed.
fn ascii(bytes: &[u8]) -> String {
    let text: String = bytes
        .iter()
        .map(|&byte| match byte {
            b' '..=b'~' => char::from(byte),
            0 => ' ',
            _ => '?',
        })
        .collect();
    text.trim().to_owned()
}

/// Checks the I/O command set in a namespace's identification descriptors (2.0 §5.17.2.3): NVM, which it also is if none is named.
///
/// # Errors
/// It is of another command set, or of nobody knows which.
pub(crate) fn check_command_set(descriptors: &[u8]) -> Result<(), NamespaceProblem> {
    let sets = namespace_descriptors(descriptors).filter(|(kind, _)| *kind == NamespaceIdType::CSI);
    let mut found = None;
    for (_, id) in sets {
        match id {
            &[set] if found.is_none_or(|before| before == set) => found = Some(set),
            _ => return Err(NamespaceProblem::AmbiguousCommandSet),
        }
    }
    match CommandSet(found.unwrap_or(0)) {
        CommandSet::NVM => Ok(()),
        other => Err(NamespaceProblem::CommandSet(other)),
    }
}

/// Checks one page of an active namespace list: ascending, above `previous`, at most `nn`, zeroes at the end.
///
/// # Errors
/// The first identifier out of order or range.
pub(crate) fn check_namespace_list(
    ids: impl IntoIterator<Item = u32>,
    mut previous: u32,
    nn: u32,
) -> Result<Vec<NamespaceId>, IdentityError> {
    let mut found = Vec::new();
    for id in ids.into_iter().take_while(|&id| id != 0) {
        if id <= previous || id > nn {
            return Err(IdentityError::NamespaceList { id, previous, nn });
        }
        found.push(NamespaceId::new(id));
        previous = id;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sgl::SglAlignment;
    use nvme_spec::IDENTIFY_BYTES;
    use proptest::prelude::*;
    use zerocopy::{FromBytes, FromZeros};

    fn namespace() -> IdentifyNamespace {
        let mut raw = IdentifyNamespace::new_zeroed();
        raw.nsze.set(1000);
        raw.ncap.set(1000);
        raw.lbaf[0].lbads = 12;
        raw
    }

    fn check(raw: &IdentifyNamespace) -> Result<Namespace, NamespaceProblem> {
        Namespace::check(NamespaceId::new(1), raw, Some(1 << 17))
    }

    #[test]
    fn an_ordinary_namespace_passes() {
        let namespace = check(&namespace()).unwrap();
        assert_eq!((namespace.lba_size(), namespace.blocks), (4096, 1000));
    }

    #[test]
    fn every_impossible_field_is_refused() {
        let mut raw = namespace();
        raw.nsze.set(0);
        assert_eq!(check(&raw), Err(NamespaceProblem::Empty));
        raw = namespace();
        raw.ncap.set(1001);
        assert_eq!(check(&raw), Err(NamespaceProblem::CapacityBeyondSize { ncap: 1001, nsze: 1000 }));
        raw = namespace();
        raw.flbas = 1;
        assert_eq!(check(&raw), Err(NamespaceProblem::NoSuchFormat { index: 1, formats: 1 }));
        raw.nlbaf_z = 255;
        raw.flbas = 0x6f;
        assert_eq!(check(&raw), Err(NamespaceProblem::BlockSize(0)));
        for lbads in (0..=255).filter(|lbads| !(9..=16).contains(lbads)) {
            raw = namespace();
            raw.lbaf[0].lbads = lbads;
            assert_eq!(check(&raw), Err(NamespaceProblem::BlockSize(lbads)));
        }
        raw = namespace();
        raw.nsze.set(u64::MAX);
        assert_eq!(check(&raw), Err(NamespaceProblem::TooLarge { nsze: u64::MAX, lbads: 12 }));
        raw = namespace();
        raw.lbaf[0].ms.set(8);
        assert_eq!(check(&raw), Err(NamespaceProblem::Metadata(8)));
        raw = namespace();
        raw.dps = 0xa;
        assert_eq!(check(&raw), Err(NamespaceProblem::Protection(2)));
        raw = namespace();
        raw.lbaf[0].lbads = 16;
        let small = Namespace::check(NamespaceId::new(1), &raw, Some(4096));
        assert_eq!(small, Err(NamespaceProblem::BlockBeyondTransfer { lba_size: 65536, max_transfer: 4096 }));
    }

    #[test]
    fn mdts_is_guarded() {
        assert_eq!(max_transfer(0, 0), None);
        assert_eq!(max_transfer(5, 0), Some(128 << 10));
        assert_eq!(max_transfer(51, 0), Some(1 << 63));
        for mdts in 52..=255 {
            assert_eq!(max_transfer(mdts, 0), None);
            assert_eq!(max_transfer(mdts, 15), None);
        }
    }

    #[test]
    fn controllers_of_other_kinds_are_refused() {
        let with = |sqes, cqes, cntrltype| {
            let mut raw = Box::new(IdentifyController::new_zeroed());
            (raw.sqes, raw.cqes, raw.cntrltype) = (sqes, cqes, cntrltype);
            ControllerInfo::check(Cap::new(), Version::V1_4, 4096, raw).map(|_| ())
        };
        assert_eq!(with(0x66, 0x44, 1), Ok(()));
        assert_eq!(with(0x00, 0x44, 1), Err(IdentityError::EntrySize { field: "SQES", value: 0, bytes: 64 }));
        assert_eq!(
            with(0x66, 0x55, 1),
            Err(IdentityError::EntrySize { field: "CQES", value: 0x55, bytes: 16 })
        );
        assert_eq!(with(0x66, 0x44, 2), Err(IdentityError::NotAnIoController(2)));
    }

    #[test]
    fn namespace_lists_must_ascend_within_range() {
        let list = |ids: &[u32]| check_namespace_list(ids.iter().copied(), 0, 16).map(|found| found.len());
        assert_eq!(list(&[1, 5, 16, 0, 3]), Ok(3));
        assert_eq!(list(&[0]), Ok(0));
        assert_eq!(list(&[2, 2]), Err(IdentityError::NamespaceList { id: 2, previous: 2, nn: 16 }));
        assert_eq!(list(&[17]), Err(IdentityError::NamespaceList { id: 17, previous: 0, nn: 16 }));
        assert!(list(&[u32::MAX]).is_err());
    }

    #[test]
    fn a_namespace_is_of_the_nvm_command_set_or_refused() {
        const UUID: [u8; 8] = [3, 4, 0, 0, 9, 9, 9, 9];
        let with = |more: &[u8]| check_command_set(&[&UUID[..], more].concat());
        assert_eq!(with(&[]), Ok(()), "a controller that names none");
        assert_eq!(with(&[4, 1, 0, 0, 0]), Ok(()));
        for (set, name) in [(1, "key value"), (2, "zoned"), (0x30, "CommandSet 0x30")] {
            let problem = with(&[4, 1, 0, 0, set]).unwrap_err();
            assert_eq!(problem, NamespaceProblem::CommandSet(CommandSet(set)));
            assert!(problem.to_string().contains(&format!("the {name} command set")), "{problem}");
        }
        for unclear in
            [&[4, 2, 0, 0, 0, 0][..], &[4, 1, 0, 0, 0, 4, 1, 0, 0, 2], &[4, 1, 0, 0, 2, 4, 2, 0, 0, 2, 2]]
        {
            assert_eq!(with(unclear), Err(NamespaceProblem::AmbiguousCommandSet), "{unclear:?}");
        }
    }

    #[test]
    fn text_is_trimmed_and_printable() {
        assert_eq!(ascii(b"  Pollux\x07\0\0  "), "Pollux?");
    }

    /// Bytes of an Identify structure: noise, or zeroes with some bytes changed, which get further.
    fn hostile() -> impl Strategy<Value = Vec<u8>> {
        let noise = prop::collection::vec(any::<u8>(), IDENTIFY_BYTES);
        let spoilt = prop::collection::vec((0..640usize, any::<u8>()), 0..60).prop_map(|changes| {
            let mut bytes = vec![0; IDENTIFY_BYTES];
            changes.into_iter().for_each(|(at, byte)| bytes[at] = byte);
            bytes
        });
        prop_oneof![noise, spoilt]
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_controller_or_an_error(
            bytes in hostile(), limits in hostile(), cap in any::<u64>(), sizes_are_right in any::<bool>(),
        ) {
            let mut raw = Box::new(IdentifyController::read_from_bytes(&bytes[..]).unwrap());
            if sizes_are_right {
                (raw.sqes, raw.cqes, raw.cntrltype) = (0x66, 0x44, 1);
            }
            let Ok(mut info) = ControllerInfo::check(Cap::from(cap), Version::V2_0, 4096, raw) else {
                return Ok(());
            };
            info.apply_limits(&IdentifyControllerNvm::read_from_bytes(&limits[..]).unwrap());
            for limit in [info.max_transfer, info.max_verify, info.max_zeroes] {
                prop_assert!(limit.is_none_or(|bytes| bytes >= 8192 && bytes.is_power_of_two()));
            }
            prop_assert!(info.max_deallocate != Some(0));
            for text in [&info.serial, &info.model, &info.firmware] {
                prop_assert!(text.bytes().all(|byte| (b' '..=b'~').contains(&byte)));
            }
            let _ = (format!("{info:?}"), SglAlignment::offered(info.raw.sgls()));
        }

        #[test]
        fn any_bytes_are_a_namespace_or_an_error(
            bytes in hostile(), max_transfer in prop::option::of(any::<u64>()), lbads in any::<u8>(),
        ) {
            let mut raw = IdentifyNamespace::read_from_bytes(&bytes[..]).unwrap();
            // Where the format in use is a possible one, the other fields get their turn.
            let in_use = raw.format_index();
            if let Some(format) = raw.lbaf.get_mut(in_use) {
                format.lbads = lbads % 32;
                format.ms.set(0);
            }
            raw.dps &= !7;
            prop_assert!(raw.formats().len() <= LBA_FORMATS);
            let Ok(namespace) = Namespace::check(NamespaceId::new(1), &raw, max_transfer) else {
                return Ok(());
            };
            prop_assert!((512..=65536).contains(&namespace.lba_size()));
            prop_assert!(namespace.blocks > 0);
            prop_assert!(namespace.blocks.checked_mul(u64::from(namespace.lba_size())).is_some());
            prop_assert!(max_transfer.is_none_or(|limit| limit >= u64::from(namespace.lba_size())));
            prop_assert!(namespace.compare_and_write.is_none_or(|blocks| (2..=65536).contains(&blocks)));
            if let Some(copy) = namespace.copy {
                prop_assert!(copy.ranges >= 1 && copy.range_blocks >= 1 && copy.blocks >= 1);
            }
        }

        #[test]
        fn any_list_of_namespaces_ascends_or_is_refused(
            ids in prop::collection::vec(any::<u32>(), 0..64), previous in any::<u32>(), nn in any::<u32>(),
        ) {
            if let Ok(found) = check_namespace_list(ids, previous, nn) {
                let all: Vec<u32> = found.iter().map(|id| id.get()).collect();
                prop_assert!(all.is_sorted_by(|a, b| a < b));
                prop_assert!(all.iter().all(|&id| id > previous && id <= nn));
            }
        }

        #[test]
        fn any_descriptors_come_to_an_end(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
            let found: usize = namespace_descriptors(&bytes).map(|(_, id)| id.len() + 4).sum();
            prop_assert!(found <= bytes.len());
        }
    }
}
