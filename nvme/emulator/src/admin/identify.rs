//! Identify (§5.15).

use nvme_spec::identify::{
    Cns, IdentifyController, Lpa, NamespaceIdHeader, NamespaceIdType, NamespaceList, Oacs, Oaes, Oncs, Vwc,
};
use nvme_spec::{IDENTIFY_BYTES, NamespaceId, StatusCode, SubmissionEntry};
use zerocopy::little_endian::U16;
use zerocopy::{FromZeros, IntoBytes};

use super::ERROR_LOG_ENTRIES;
use crate::config::{FusedOperations, SglSupport, ShadowDoorbells};
use crate::controller::{Core, Outcome};
use crate::io::ACWU_Z;
use crate::keep_alive::KAS;
use crate::namespace::Namespace;
use crate::queue::SubmissionQueue;

/// Firmware revision, 8 characters.
pub(super) const FIRMWARE_REVISION: &[u8; 8] = b"1.0     ";
/// Entry sizes as powers of two, maximum and required: 64 bytes.
const SQES: u8 = 0x66;
/// Entry sizes as powers of two, maximum and required: 16 bytes.
const CQES: u8 = 0x44;
/// CNTRLTYPE: an I/O controller.
const IO_CONTROLLER: u8 = 1;
/// FRMW: one slot, read-only.
const FRMW: u8 = 0b11;
/// RTD3E in microseconds: how long a shutdown may take.
const RTD3E_US: u32 = 10_000_000;
/// WCTEMP and CCTEMP in kelvins.
const WARNING_TEMPERATURE: u16 = 343;
const CRITICAL_TEMPERATURE: u16 = 353;
/// LPA: the Supported Log Pages log page (2.0).
const LPA_SUPPORTED_PAGES: u8 = 1 << 5;
/// FUSES: compare and write.
const FUSES_COMPARE_AND_WRITE: u16 = 1;
/// SGLS: bit bucket descriptors.
const SGLS_BIT_BUCKET: u32 = 1 << 16;
/// Largest identifier that an active namespace list can start after.
const LAST_LIST_START: u32 = 0xffff_fffd;

impl Core {
    /// Identify.
    pub(super) fn identify(
        &self,
        queue: &mut SubmissionQueue,
        entry: &SubmissionEntry,
    ) -> Result<Outcome, StatusCode> {
        let nsid = entry.namespace_id();
        match entry.identify_cns() {
            Cns::NAMESPACE => {
                let data = match self.namespace(nsid) {
                    Ok(namespace) => namespace.identify(),
                    // An inactive namespace is described by zeroes.
                    Err(StatusCode::INVALID_FIELD) => FromZeros::new_zeroed(),
                    Err(other) => return Err(other),
                };
                self.reply(queue, entry, data.as_bytes())?;
            }
            Cns::CONTROLLER => self.reply(queue, entry, self.identify_controller().as_bytes())?,
            Cns::ACTIVE_NAMESPACES => {
                if nsid.get() > LAST_LIST_START {
                    return Err(StatusCode::INVALID_NAMESPACE_OR_FORMAT);
                }
                self.reply(queue, entry, self.active_namespaces(nsid).as_bytes())?;
            }
            Cns::NAMESPACE_DESCRIPTORS => {
                let list = self.namespace_descriptors(nsid)?;
                self.reply(queue, entry, &list)?;
            }
            _ => return Err(StatusCode::INVALID_FIELD),
        }
        Ok(Outcome::Done(0))
    }

    fn identify_controller(&self) -> IdentifyController {
        let config = &self.config;
        let mut data = IdentifyController::new_zeroed();
        pad(&mut data.sn, &config.serial);
        pad(&mut data.mn, &config.model);
        data.fr = *FIRMWARE_REVISION;
        data.mdts = config.mdts;
        data.ver.set(self.registers.version.into());
        data.rtd3e.set(RTD3E_US);
        data.cntrltype = IO_CONTROLLER;
        data.acl_z = 3;
        data.aerl_z = config.aerl_z;
        data.frmw = FRMW;
        data.oaes.set((Oaes::NAMESPACE_ATTRIBUTE | Oaes::FIRMWARE_ACTIVATION).bits());
        let mut oacs = Oacs::FORMAT;
        oacs.set(Oacs::DOORBELL_BUFFER, config.shadow_doorbells == ShadowDoorbells::Offered);
        data.oacs.set(oacs.bits());
        data.crdt = [1, 5, 10].map(U16::new);
        data.lpa = (Lpa::EXTENDED_DATA | Lpa::COMMAND_EFFECTS).bits() | LPA_SUPPORTED_PAGES;
        data.elpe_z = (ERROR_LOG_ENTRIES - 1) as u8;
        data.wctemp.set(WARNING_TEMPERATURE);
        data.cctemp.set(CRITICAL_TEMPERATURE);
        let namespaces = self.namespaces.list();
        let capacity: u128 = namespaces.iter().map(|n| u128::from(n.size_bytes())).sum();
        data.tnvmcap.set(capacity);
        data.kas.set(KAS);
        data.sqes = SQES;
        data.cqes = CQES;
        data.nn.set(namespaces.largest);
        data.oncs.set(config.oncs.bits());
        if config.fused == FusedOperations::CompareAndWrite {
            data.fuses.set(FUSES_COMPARE_AND_WRITE);
            data.acwu_z.set(ACWU_Z);
        }
        if config.oncs.contains(Oncs::COPY) {
            data.cdfs.set(1); // source range format 0
        }
        data.sgls.set(match config.sgls {
            SglSupport::Absent => 0,
            SglSupport::Byte => 0b01 | SGLS_BIT_BUCKET,
            SglSupport::Dword => 0b10 | SGLS_BIT_BUCKET,
        });
        let flush_all = Vwc::FLUSH_ALL_LOW | Vwc::FLUSH_ALL_HIGH;
        data.vwc = if self.has_volatile_cache() { flush_all | Vwc::PRESENT } else { flush_all }.bits();
        let name = format!("nqn.2014-08.org.nvmexpress:{:>04x}{:>04x}{:<20}", 0, 0, config.serial);
        let name = format!("{name}{:<40}", config.model); // the form of §7.9 for devices without a UUID
        data.subnqn[..name.len()].copy_from_slice(name.as_bytes());
        data
    }

    fn active_namespaces(&self, after: NamespaceId) -> NamespaceList {
        let mut list = NamespaceList::new_zeroed();
        let namespaces = self.namespaces.list();
        let ids = namespaces.iter().map(Namespace::nsid).filter(|id| *id > after);
        for (slot, id) in list.ids.iter_mut().zip(ids) {
            slot.set(id.get());
        }
        list
    }

    fn namespace_descriptors(&self, nsid: NamespaceId) -> Result<Vec<u8>, StatusCode> {
        let namespace = self.namespace(nsid).map_err(|_| StatusCode::INVALID_NAMESPACE_OR_FORMAT)?;
        let mut list = Vec::with_capacity(IDENTIFY_BYTES);
        let mut add = |id_type, id: &[u8]| {
            let header = NamespaceIdHeader { id_type, length: id.len() as u8, reserved_2: [0; 2] };
            list.extend_from_slice(header.as_bytes());
            list.extend_from_slice(id);
        };
        add(NamespaceIdType::EUI64, &namespace.eui64());
        add(NamespaceIdType::NGUID, &namespace.nguid());
        list.resize(IDENTIFY_BYTES, 0);
        Ok(list)
    }
}

/// Copies `text` and fills up with spaces.
fn pad(field: &mut [u8], text: &str) {
    field.fill(b' ');
    let len = text.len().min(field.len());
    field[..len].copy_from_slice(&text.as_bytes()[..len]);
}
