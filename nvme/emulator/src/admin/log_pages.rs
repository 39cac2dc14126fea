//! Get Log Page (§5.14): error information, SMART / health, firmware slots, changed namespaces; what
//! the controller supports is in `effects`.

use std::sync::atomic::Ordering;

use nvme_spec::log::{ErrorEntry, FirmwareSlotLog, LogPageId, SmartLog};
use nvme_spec::{NamespaceId, StatusCode, SubmissionEntry};
use zerocopy::{FromZeros, IntoBytes};

use super::ERROR_LOG_ENTRIES;
use super::effects::supported_pages_log;
use super::events::SPARE_THRESHOLD;
use super::identify::FIRMWARE_REVISION;
use crate::controller::{Core, Outcome};
use crate::dma::DmaDirection;
use crate::locks::lock;
use crate::queue::{QueueStats, SubmissionQueue};

/// 512-byte units in a data unit of the SMART log.
const SECTORS_PER_DATA_UNIT: u64 = 1000;

impl Core {
    /// Get Log Page. What is asked for beyond the page's end reads as zeroes.
    pub(super) fn get_log_page(
        &self,
        queue: &mut SubmissionQueue,
        entry: &SubmissionEntry,
    ) -> Result<Outcome, StatusCode> {
        let wanted = entry.log_page();
        let bytes = (u64::from(wanted.dwords_z) + 1) * 4;
        self.check_mdts(bytes)?;
        let page = match wanted.lid {
            LogPageId::ERROR => self.error_log(),
            LogPageId::SMART => {
                let nsid = entry.namespace_id();
                if nsid != NamespaceId::NONE && nsid != NamespaceId::BROADCAST {
                    return Err(StatusCode::INVALID_FIELD); // not kept by namespace (LPA)
                }
                self.smart_log().as_bytes().to_vec()
            }
            LogPageId::FIRMWARE_SLOT => firmware_log().as_bytes().to_vec(),
            LogPageId::CHANGED_NAMESPACES => lock(&self.admin).changed_namespaces.page(),
            LogPageId::COMMAND_EFFECTS => self.command_effects_log(),
            LogPageId::SUPPORTED => supported_pages_log(),
            _ => return Err(StatusCode::INVALID_LOG_PAGE),
        };
        if wanted.offset > page.len() as u64 || !wanted.offset.is_multiple_of(4) {
            return Err(StatusCode::INVALID_FIELD);
        }
        let mut data = queue.data_path();
        data.resolve(entry, bytes, DmaDirection::ToHost)?;
        let rest = &page[wanted.offset as usize..];
        let given = rest.len().min(bytes as usize);
        let mut cursor = data.payload().cursor();
        cursor.put(&rest[..given]);
        cursor.put_zeroes(bytes as usize - given);
        if !wanted.retain_event {
            self.rearm_events(wanted.lid);
        }
        Ok(Outcome::Done(0))
    }

    fn error_log(&self) -> Vec<u8> {
        let admin = lock(&self.admin);
        let mut page = Vec::with_capacity(ERROR_LOG_ENTRIES * size_of::<ErrorEntry>());
        for error in &admin.error_log {
            page.extend_from_slice(error.as_bytes());
        }
        page.resize(ERROR_LOG_ENTRIES * size_of::<ErrorEntry>(), 0);
        page
    }

    fn smart_log(&self) -> SmartLog {
        let total = |of: fn(&QueueStats) -> &std::sync::atomic::AtomicU64| {
            self.submission.iter().map(|slot| of(&slot.stats).load(Ordering::Relaxed)).sum::<u64>()
        };
        let units = |sectors: u64| u128::from(sectors.div_ceil(SECTORS_PER_DATA_UNIT));
        let admin = lock(&self.admin);
        let mut page = SmartLog::new_zeroed();
        page.critical_warning = self.critical_warnings(&admin).bits();
        page.temperature.set(admin.health.temperature);
        page.available_spare = admin.health.spare;
        page.spare_threshold = SPARE_THRESHOLD;
        page.data_units_read.set(units(total(|s| &s.sectors_read)));
        page.data_units_written.set(units(total(|s| &s.sectors_written)));
        page.host_reads.set(u128::from(total(|s| &s.reads)));
        page.host_writes.set(u128::from(total(|s| &s.writes)));
        page.power_cycles.set(u128::from(admin.power_cycles));
        page.unsafe_shutdowns.set(u128::from(admin.unsafe_shutdowns));
        page.media_errors.set(u128::from(admin.media_errors));
        page.error_entries.set(u128::from(admin.error_count));
        page
    }
}

fn firmware_log() -> FirmwareSlotLog {
    let mut page = FirmwareSlotLog::new_zeroed();
    page.afi = 1;
    page.revisions[0] = *FIRMWARE_REVISION;
    page
}
