//! Admin commands for whoever holds a controller: features, log pages, identify data, format.
//!
//! Owns: [`CommandError`], [`FormatError`] and these methods of [`Controller`]. Each blocks until the controller has
//! answered, after a reset that is under way.
//!
//! Invariants:
//! - data moves through the admin queue's own page of 4 KiB, in as many commands as that takes, so no limit of the
//!   controller (MDTS) is ever met and no memory of a caller is given to it;
//! - log pages are read without acknowledging the events behind them: that is the keeper's;
//! - a namespace is formatted only while no queue is open on it, and none can be opened meanwhile.
//!
//! Excludes: commands that give the controller memory to keep (host memory buffer), or take it from its owner (queue
//! numbers).

use std::time::Duration;

use nvme_spec::command::GetLogPage;
use nvme_spec::feature::{
    Arbitration, AsyncEventConfiguration, ErrorRecovery, FeatureCapabilities, FeatureId, FeatureSelect,
    TemperatureSelect, TemperatureThreshold, ThresholdSelect, Timestamp, VolatileWriteCache,
};
use nvme_spec::format::{FormatDw10, SecureErase};
use nvme_spec::identify::{Cns, Fna, Lpa, NamespaceIdType, Oacs, Oncs, namespace_descriptors};
use nvme_spec::log::{
    ChangedNamespaces, CommandEffectsLog, ErrorEntry, FirmwareSlotLog, LogPageId, SmartLog,
};
use nvme_spec::registers::Version;
use nvme_spec::{IDENTIFY_BYTES, NamespaceId, SubmissionEntry};
use thiserror::Error;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::{Controller, Shared};
use crate::admin::{AdminError, AdminQueue};
use crate::bring_up::Problem;
use crate::handshake::Link;
use crate::identity::{ControllerInfo, MAX_LBA_SHIFT, MIN_LBA_SHIFT, NamespaceProblem};

/// Bytes of a log page that are read at once.
const PIECE: usize = IDENTIFY_BYTES;
/// Time that a format is given unless the options say otherwise: large media are overwritten.
pub const FORMAT_TIMEOUT: Duration = Duration::from_secs(3600);

/// Why an admin command on behalf of a caller failed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CommandError {
    /// The controller refused it, or failed.
    #[error("{0}")]
    Admin(#[from] AdminError),
    /// The controller says that it lacks what this takes.
    #[error("the controller does not support {0}")]
    Unsupported(&'static str),
    /// The caller asked for something that cannot be.
    #[error("{0}")]
    Argument(&'static str),
}

/// Why a namespace was not formatted, or is not known to have been.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The command, or the look at the namespace after it.
    #[error("{0}")]
    Command(#[from] CommandError),
    /// There is no such namespace.
    #[error("there is no namespace {0}")]
    NoSuchNamespace(u32),
    /// A queue is open on a namespace that the format would touch.
    #[error("namespace {0} is in use: close its queues first")]
    InUse(u32),
    /// The namespace has no such LBA format.
    #[error("namespace {nsid} has no LBA format {index} (it has {formats})")]
    NoSuchFormat {
        /// The namespace.
        nsid: u32,
        /// The format asked for.
        index: u8,
        /// Formats that there are, counted from 0.
        formats: usize,
    },
    /// This driver could not use the namespace afterwards.
    #[error("with LBA format {index} it could not be used: {problem}")]
    UselessFormat {
        /// The format asked for.
        index: u8,
        /// Why.
        problem: NamespaceProblem,
    },
    /// The format was done, but the namespaces could not be read again.
    #[error("formatted, but the namespaces cannot be read again: {0}")]
    Rescan(String),
}

impl From<AdminError> for FormatError {
    fn from(error: AdminError) -> Self {
        FormatError::Command(error.into())
    }
}

/// How to format a namespace (NVMe 1.4 §5.23). Always without metadata and end-to-end protection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FormatOptions {
    /// Index into the namespace's LBA formats.
    pub lba_format: u8,
    /// What is done about the old data beyond making it unreadable.
    pub secure_erase: SecureErase,
    /// Time that the controller is given. A controller that takes longer is reset.
    pub timeout: Duration,
}

impl Default for FormatOptions {
    fn default() -> Self {
        Self { lba_format: 0, secure_erase: SecureErase::NONE, timeout: FORMAT_TIMEOUT }
    }
}

/// Which feature, of what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// The feature.
    pub id: FeatureId,
    /// The namespace, for features that belong to one; else [`NamespaceId::NONE`].
    pub nsid: NamespaceId,
    /// Dword 11: the value to set; in Get Features what narrows the question down, 0 for most features.
    pub dword_11: u32,
}

impl Feature {
    /// A feature of the whole controller.
    pub fn of_controller(id: FeatureId) -> Self {
        Self { id, nsid: NamespaceId::NONE, dword_11: 0 }
    }

    /// The same with this dword 11.
    #[must_use]
    pub fn with_dword_11(self, dword_11: u32) -> Self {
        Self { dword_11, ..self }
    }

    /// The same of a namespace.
    #[must_use]
    pub fn of_namespace(self, nsid: NamespaceId) -> Self {
        Self { nsid, ..self }
    }
}

/// Whether a setting outlives resets (§5.21: SV).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Persistence {
    /// Until the next reset of the controller, of which the driver may do one at any time.
    UntilReset,
    /// Saved, where the controller can save the feature.
    Saved,
}

/// An identifier of a namespace (§5.15.2.4).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NamespaceUid {
    /// IEEE extended unique identifier.
    Eui64([u8; 8]),
    /// Namespace globally unique identifier.
    Nguid([u8; 16]),
    /// UUID.
    Uuid([u8; 16]),
    /// I/O command set; 0 is NVM (2.0).
    CommandSet(u8),
    /// Something else, or of a length that it should not have.
    Other(NamespaceIdType, Vec<u8>),
}

/// Features.
impl Controller {
    /// A feature's value: dword 0 of the completion (§5.13).
    ///
    /// # Errors
    /// The controller refused the command, or failed.
    pub fn get_feature(&self, feature: Feature, select: FeatureSelect) -> Result<u32, CommandError> {
        Ok(self.shared.command(|queue, link| queue.execute_with_data(link, get_entry(feature, select)))?)
    }

    /// A feature's value and its data, of which as much as `data` holds is copied (§5.13).
    ///
    /// # Errors
    /// `data` is longer than 4 KiB; the controller refused the command, or failed.
    pub fn get_feature_data(
        &self,
        feature: Feature,
        select: FeatureSelect,
        data: &mut [u8],
    ) -> Result<u32, CommandError> {
        if data.len() > PIECE {
            return Err(CommandError::Argument("a feature has at most 4 KiB of data"));
        }
        let (value, page) = self.shared.command(|queue, link| {
            let value = queue.execute_with_data(link, get_entry(feature, select))?;
            Ok((value, queue.copy_data::<[u8; PIECE]>()))
        })?;
        data.copy_from_slice(&page[..data.len()]);
        Ok(value)
    }

    /// What can be done with a feature (§5.13, SEL 3).
    ///
    /// # Errors
    /// The controller cannot tell (ONCS), refused the command, or failed.
    pub fn feature_capabilities(&self, id: FeatureId) -> Result<FeatureCapabilities, CommandError> {
        if !self.info().oncs.contains(Oncs::FEATURE_SAVE) {
            return Err(CommandError::Unsupported("feature capabilities (ONCS)"));
        }
        let feature = Feature::of_controller(id);
        Ok(self.get_feature(feature, FeatureSelect::SUPPORTED_CAPABILITIES)?.into())
    }

    /// Sets a feature; `data` is what it takes beside dword 11 (§5.21). Returns dword 0 of the completion. A reset of the
    /// controller, of which the driver may do one at any time, undoes what is not saved.
    ///
    /// # Errors
    /// The feature belongs to the driver (queue numbers, host memory buffer), `data` is too long, it cannot be saved; the
    /// controller refused the command, or failed.
    pub fn set_feature(
        &self,
        feature: Feature,
        persistence: Persistence,
        data: &[u8],
    ) -> Result<u32, CommandError> {
        if matches!(feature.id, FeatureId::NUMBER_OF_QUEUES | FeatureId::HOST_MEMORY_BUFFER) {
            return Err(CommandError::Argument("queue numbers and the host memory buffer are the driver's"));
        }
        if data.len() > PIECE {
            return Err(CommandError::Argument("a feature has at most 4 KiB of data"));
        }
        if persistence == Persistence::Saved && !self.info().oncs.contains(Oncs::FEATURE_SAVE) {
            return Err(CommandError::Unsupported("saving features (ONCS)"));
        }
        let mut entry = SubmissionEntry::set_features(feature.id, feature.dword_11);
        entry.nsid.set(feature.nsid.get());
        if persistence == Persistence::Saved {
            entry.cdw10.set(entry.set_features_view().with_sv(true).into());
        }
        Ok(self.shared.command(|queue, link| queue.execute_with_bytes(link, entry, data))?)
    }

    /// A temperature threshold in kelvins (§5.21.1.4).
    ///
    /// # Errors
    /// As [`get_feature`](Self::get_feature).
    pub fn temperature_threshold(
        &self,
        sensor: TemperatureSelect,
        which: ThresholdSelect,
    ) -> Result<u16, CommandError> {
        let asked = TemperatureThreshold::new().with_tmpsel(sensor.0 & 0xf).with_thsel(which.0 & 3);
        let feature = Feature::of_controller(FeatureId::TEMPERATURE_THRESHOLD).with_dword_11(asked.into());
        let value = TemperatureThreshold::from(self.get_feature(feature, FeatureSelect::CURRENT)?);
        Ok(value.kelvin())
    }

    /// Sets a temperature threshold in kelvins: beyond it the controller reports an event (§5.21.1.4).
    ///
    /// # Errors
    /// As [`set_feature`](Self::set_feature).
    pub fn set_temperature_threshold(
        &self,
        sensor: TemperatureSelect,
        which: ThresholdSelect,
        kelvin: u16,
    ) -> Result<(), CommandError> {
        let value = TemperatureThreshold::new()
            .with_tmpsel(sensor.0 & 0xf)
            .with_thsel(which.0 & 3)
            .with_kelvin(kelvin);
        self.set_dword(FeatureId::TEMPERATURE_THRESHOLD, value.into())
    }

    /// Whether the volatile write cache is on (§5.21.1.6).
    ///
    /// # Errors
    /// There is none; otherwise as [`get_feature`](Self::get_feature).
    pub fn write_cache(&self) -> Result<VolatileWriteCache, CommandError> {
        self.need_write_cache()?;
        self.get_dword(FeatureId::VOLATILE_WRITE_CACHE).map(Into::into)
    }

    /// Turns the volatile write cache on or off (§5.21.1.6). Off makes every completed write durable, and slow.
    ///
    /// # Errors
    /// There is none; otherwise as [`set_feature`](Self::set_feature).
    pub fn set_write_cache(&self, value: VolatileWriteCache) -> Result<(), CommandError> {
        self.need_write_cache()?;
        self.set_dword(FeatureId::VOLATILE_WRITE_CACHE, value.into())
    }

    /// Arbitration between submission queues (§5.21.1.1).
    ///
    /// # Errors
    /// As [`get_feature`](Self::get_feature).
    pub fn arbitration(&self) -> Result<Arbitration, CommandError> {
        self.get_dword(FeatureId::ARBITRATION).map(Into::into)
    }

    /// Sets the arbitration between submission queues (§5.21.1.1).
    ///
    /// # Errors
    /// As [`set_feature`](Self::set_feature).
    pub fn set_arbitration(&self, value: Arbitration) -> Result<(), CommandError> {
        self.set_dword(FeatureId::ARBITRATION, value.into())
    }

    /// Which events the controller reports (§5.21.1.11).
    ///
    /// # Errors
    /// As [`get_feature`](Self::get_feature).
    pub fn event_configuration(&self) -> Result<AsyncEventConfiguration, CommandError> {
        self.get_dword(FeatureId::ASYNC_EVENT_CONFIGURATION).map(Into::into)
    }

    /// Chooses the events that the controller reports, in place of those that the driver chose (§5.21.1.11).
    ///
    /// # Errors
    /// As [`set_feature`](Self::set_feature).
    pub fn set_event_configuration(&self, value: AsyncEventConfiguration) -> Result<(), CommandError> {
        self.set_dword(FeatureId::ASYNC_EVENT_CONFIGURATION, value.into())
    }

    /// Error recovery of a namespace (§5.21.1.5).
    ///
    /// # Errors
    /// As [`get_feature`](Self::get_feature).
    pub fn error_recovery(&self, nsid: NamespaceId) -> Result<ErrorRecovery, CommandError> {
        let feature = Feature::of_controller(FeatureId::ERROR_RECOVERY).of_namespace(nsid);
        self.get_feature(feature, FeatureSelect::CURRENT).map(Into::into)
    }

    /// The controller's clock (§5.21.1.14).
    ///
    /// # Errors
    /// It has none (ONCS); otherwise as [`get_feature`](Self::get_feature).
    pub fn timestamp(&self) -> Result<Timestamp, CommandError> {
        self.need_timestamp()?;
        let mut stamp = Timestamp::default();
        let feature = Feature::of_controller(FeatureId::TIMESTAMP);
        self.get_feature_data(feature, FeatureSelect::CURRENT, stamp.as_mut_bytes())?;
        Ok(stamp)
    }

    /// Sets the controller's clock (§5.21.1.14).
    ///
    /// # Errors
    /// It has none (ONCS); otherwise as [`set_feature`](Self::set_feature).
    pub fn set_timestamp(&self, stamp: Timestamp) -> Result<(), CommandError> {
        self.need_timestamp()?;
        let feature = Feature::of_controller(FeatureId::TIMESTAMP);
        self.set_feature(feature, Persistence::UntilReset, stamp.as_bytes()).map(|_| ())
    }

    fn get_dword(&self, id: FeatureId) -> Result<u32, CommandError> {
        self.get_feature(Feature::of_controller(id), FeatureSelect::CURRENT)
    }

    fn set_dword(&self, id: FeatureId, value: u32) -> Result<(), CommandError> {
        let feature = Feature::of_controller(id).with_dword_11(value);
        self.set_feature(feature, Persistence::UntilReset, &[]).map(|_| ())
    }

    fn need_write_cache(&self) -> Result<(), CommandError> {
        match self.info().volatile_write_cache {
            true => Ok(()),
            false => Err(CommandError::Unsupported("a volatile write cache (VWC)")),
        }
    }

    fn need_timestamp(&self) -> Result<(), CommandError> {
        match self.info().oncs.contains(Oncs::TIMESTAMP) {
            true => Ok(()),
            false => Err(CommandError::Unsupported("timestamps (ONCS)")),
        }
    }
}

fn get_entry(feature: Feature, select: FeatureSelect) -> SubmissionEntry {
    let mut entry = SubmissionEntry::get_features(feature.id, select);
    entry.nsid.set(feature.nsid.get());
    entry.cdw11.set(feature.dword_11);
    entry
}

/// Log pages.
impl Controller {
    /// Fills `data` from `offset` bytes into a log page on (§5.14). Events that the page describes stay pending.
    ///
    /// # Errors
    /// `offset` or length is not a multiple of 4; `offset` or length beyond 4 KiB needs extended data, which the controller
    /// lacks (LPA); the controller refused the command, or failed.
    pub fn read_log(
        &self,
        page: LogPageId,
        nsid: NamespaceId,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), CommandError> {
        if !offset.is_multiple_of(4) || !data.len().is_multiple_of(4) {
            return Err(CommandError::Argument("log pages are read in units of 4 bytes"));
        }
        if offset.checked_add(data.len() as u64).is_none() {
            return Err(CommandError::Argument("the range of the log page wraps around"));
        }
        let extended = self.info().raw.lpa().contains(Lpa::EXTENDED_DATA);
        if !extended && (offset > 0 || data.len() > PIECE) {
            return Err(CommandError::Unsupported("offsets in log pages (LPA)"));
        }
        let mut at = offset;
        for piece in data.chunks_mut(PIECE) {
            let request = GetLogPage {
                lid: page,
                dwords_z: (piece.len() / 4 - 1) as u32,
                offset: at,
                retain_event: true,
            };
            let read = self.shared.command(|queue, link| {
                queue.execute_with_data(link, SubmissionEntry::get_log_page(nsid, request))?;
                Ok(queue.copy_data::<[u8; PIECE]>())
            })?;
            piece.copy_from_slice(&read[..piece.len()]);
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn read_log_as<T: FromBytes + IntoBytes>(&self, page: LogPageId) -> Result<Box<T>, CommandError> {
        let mut value = Box::new(T::new_zeroed());
        self.read_log(page, NamespaceId::BROADCAST, 0, value.as_mut().as_mut_bytes())?;
        Ok(value)
    }

    /// The errors that the controller remembers, newest first (§5.14.1.1). As many as a command can fetch, if the
    /// controller lacks extended log data.
    ///
    /// # Errors
    /// As [`read_log`](Self::read_log).
    pub fn error_log(&self) -> Result<Vec<ErrorEntry>, CommandError> {
        let extended = self.info().raw.lpa().contains(Lpa::EXTENDED_DATA);
        let most = if extended { usize::MAX } else { PIECE / size_of::<ErrorEntry>() };
        let mut entries = vec![ErrorEntry::default(); (usize::from(self.info().raw.elpe_z) + 1).min(most)];
        self.read_log(LogPageId::ERROR, NamespaceId::BROADCAST, 0, entries.as_mut_bytes())?;
        entries.retain(ErrorEntry::is_used);
        Ok(entries)
    }

    /// The SMART / Health log page of one namespace (§5.14.1.2).
    ///
    /// # Errors
    /// The controller keeps none for namespaces (LPA); otherwise as [`read_log`](Self::read_log).
    pub fn namespace_smart_log(&self, nsid: NamespaceId) -> Result<Box<SmartLog>, CommandError> {
        if !self.info().raw.lpa().contains(Lpa::SMART_PER_NAMESPACE) {
            return Err(CommandError::Unsupported("health logs of namespaces (LPA)"));
        }
        let mut log = Box::new(SmartLog::new_zeroed());
        self.read_log(LogPageId::SMART, nsid, 0, log.as_mut().as_mut_bytes())?;
        Ok(log)
    }

    /// What is in the firmware slots (§5.14.1.3).
    ///
    /// # Errors
    /// As [`read_log`](Self::read_log).
    pub fn firmware_log(&self) -> Result<Box<FirmwareSlotLog>, CommandError> {
        self.read_log_as(LogPageId::FIRMWARE_SLOT)
    }

    /// Namespaces that changed since the keeper last took note (§5.14.1.4): mostly none, since it takes note at once.
    ///
    /// # Errors
    /// As [`read_log`](Self::read_log).
    pub fn changed_namespaces(&self) -> Result<Box<ChangedNamespaces>, CommandError> {
        self.read_log_as(LogPageId::CHANGED_NAMESPACES)
    }

    /// The commands that the controller knows, and what they do (§5.14.1.5).
    ///
    /// # Errors
    /// The controller does not tell (LPA); otherwise as [`read_log`](Self::read_log).
    pub fn command_effects(&self) -> Result<Box<CommandEffectsLog>, CommandError> {
        if !self.info().raw.lpa().contains(Lpa::COMMAND_EFFECTS) {
            return Err(CommandError::Unsupported("the commands supported and effects log (LPA)"));
        }
        self.read_log_as(LogPageId::COMMAND_EFFECTS)
    }
}

/// Identify.
impl Controller {
    /// An Identify data structure as the controller gives it (§5.15).
    ///
    /// # Errors
    /// The controller refused the command, or failed.
    pub fn identify(&self, cns: Cns, nsid: NamespaceId) -> Result<Box<[u8; IDENTIFY_BYTES]>, CommandError> {
        Ok(self.shared.command(|queue, link| {
            queue.execute_with_data(link, SubmissionEntry::identify(cns, nsid))?;
            Ok(queue.copy_data())
        })?)
    }

    /// The identifiers of a namespace (§5.15.2.4). What the controller leaves out, or says wrongly, is left out.
    ///
    /// # Errors
    /// The controller refused the command (before 1.3 they all do), or failed.
    pub fn namespace_uids(&self, nsid: NamespaceId) -> Result<Vec<NamespaceUid>, CommandError> {
        let list = self.identify(Cns::NAMESPACE_DESCRIPTORS, nsid)?;
        Ok(namespace_descriptors(&list[..]).map(|(kind, id)| namespace_uid(kind, id)).collect())
    }
}

fn namespace_uid(kind: NamespaceIdType, id: &[u8]) -> NamespaceUid {
    let known = match kind {
        NamespaceIdType::EUI64 => id.try_into().ok().map(NamespaceUid::Eui64),
        NamespaceIdType::NGUID => id.try_into().ok().map(NamespaceUid::Nguid),
        NamespaceIdType::UUID => id.try_into().ok().map(NamespaceUid::Uuid),
        NamespaceIdType::CSI => match id {
            &[command_set] => Some(NamespaceUid::CommandSet(command_set)),
            _ => None,
        },
        _ => None,
    };
    known.unwrap_or_else(|| NamespaceUid::Other(kind, id.to_vec()))
}

/// Format.
impl Controller {
    /// Formats a namespace. **This destroys all data on it**, and on every other namespace where the controller formats or
    /// erases only all at once (FNA, NVMe 1.4 §5.23). Reads the namespaces again afterwards. No admin command of
    /// anybody else gets through meanwhile: queues of other namespaces go on, but cannot be created, closed or recovered.
    ///
    /// # Errors
    /// Nothing was done if the controller lacks the command or the erase, the namespace or format does not exist, the driver
    /// could not use the namespace afterwards, or a queue is open on a namespace that would be touched. Otherwise what
    /// is left of the data is unknown.
    pub fn format_nvm(&self, nsid: NamespaceId, options: &FormatOptions) -> Result<(), FormatError> {
        let info = self.info();
        let fna = info.raw.fna();
        if !info.raw.oacs().contains(Oacs::FORMAT) {
            return Err(CommandError::Unsupported("Format NVM (OACS)").into());
        }
        match options.secure_erase {
            SecureErase::NONE | SecureErase::USER_DATA => {}
            SecureErase::CRYPTOGRAPHIC if fna.contains(Fna::CRYPTOGRAPHIC_ERASE) => {}
            SecureErase::CRYPTOGRAPHIC => {
                return Err(CommandError::Unsupported("cryptographic erase (FNA)").into());
            }
            _ => return Err(CommandError::Argument("unknown secure erase setting").into()),
        }
        let touches_all = fna.contains(Fna::FORMAT_ALL)
            || options.secure_erase != SecureErase::NONE && fna.contains(Fna::ERASE_ALL);
        let shared = &self.shared;
        let mut admin = shared.lock_running();
        shared.check_format(nsid, options.lba_format)?;
        let user = admin.users.values().find(|&&user| touches_all || user == nsid);
        if let Some(user) = user {
            return Err(FormatError::InUse(user.get()));
        }
        let dw10 = FormatDw10::new().with_format_index(options.lba_format).with_ses(options.secure_erase.0);
        let entry = SubmissionEntry::format_nvm(nsid, dw10);
        tracing::warn!(device = %shared.name, %nsid, format = options.lba_format, "formatting");
        let outcome = admin.queue.execute_within(&shared.link, entry, options.timeout);
        // Whatever came of it: what is known of the namespaces may be wrong now.
        let rescanned = match &outcome {
            Err(AdminError::Failed(_)) => Ok(()),
            _ => shared.rescan(&mut admin),
        };
        shared.report(outcome)?;
        rescanned.map_err(|problem| {
            let text = problem.to_string();
            if let Problem::Admin(AdminError::Failed(fault)) = problem {
                shared.fail(fault);
            }
            FormatError::Rescan(text)
        })
    }
}

impl Shared {
    fn check_format(&self, nsid: NamespaceId, index: u8) -> Result<(), FormatError> {
        let namespaces = self.namespaces();
        let entry = namespaces.iter().find(|entry| entry.nsid == nsid);
        let entry = entry.ok_or(FormatError::NoSuchNamespace(nsid.get()))?;
        let formats = entry.raw.formats();
        let format = formats.get(usize::from(index)).ok_or(FormatError::NoSuchFormat {
            nsid: nsid.get(),
            index,
            formats: formats.len(),
        })?;
        let useless = |problem| Err(FormatError::UselessFormat { index, problem });
        if !(MIN_LBA_SHIFT..=MAX_LBA_SHIFT).contains(&format.lbads) {
            return useless(NamespaceProblem::BlockSize(format.lbads));
        }
        if format.ms.get() != 0 {
            return useless(NamespaceProblem::Metadata(format.ms.get()));
        }
        Ok(())
    }
}

/// Limits of the NVM command set's own commands (2.0), where the controller tells them.
pub(crate) fn command_set_limits(
    link: &Link,
    admin: &mut AdminQueue,
    info: &mut ControllerInfo,
) -> Result<(), AdminError> {
    if info.version < Version::V2_0 {
        return Ok(());
    }
    let entry = SubmissionEntry::identify_command_set(Cns::CONTROLLER_COMMAND_SET, NamespaceId::NONE, 0);
    match admin.execute_with_data(link, entry) {
        Ok(_) => {
            info.apply_limits(&admin.copy_data());
            Ok(())
        }
        // Controllers with no other command set need not know it (2.0 §5.17.2).
        Err(AdminError::Status { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;
