//! Features: read and set by whoever holds a controller, and set again after a reset, which forgets them.
//!
//! Owns: [`Feature`], these methods of [`Controller`], and [`Settings`]: what was set and not saved.
//!
//! Invariants:
//! - what was set last is what is set again, in the order of setting, after the driver's own settings;
//! - at most [`MAX_SETTINGS`] are kept; one more is refused before it reaches the controller;
//! - a setting that is refused after a reset is reported, and does not keep the controller from coming back.
//!
//! Excludes: features that are the driver's (queue numbers, host memory buffer), and what it sets for itself (`bring_up`).

use nvme_spec::feature::{
    Arbitration, AsyncEventConfiguration, ErrorRecovery, FeatureCapabilities, FeatureId, FeatureSelect,
    TemperatureSelect, TemperatureThreshold, ThresholdSelect, Timestamp, VolatileWriteCache,
};
use nvme_spec::identify::Oncs;
use nvme_spec::{NamespaceId, SubmissionEntry};
use reactor::clock::Instant;
use zerocopy::{FromBytes, IntoBytes};

use super::commands::{CommandError, PIECE};
use super::{Admin, Controller, Shared};
use crate::admin::AdminError;
use crate::event::ControllerEvent;
use crate::lane::Lane;

/// Features, counted once for each namespace, sensor and vector, that are set again after a reset.
pub const MAX_SETTINGS: usize = 256;

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
    /// For as long as this [`Controller`]: what a reset by the driver undoes is set again.
    UntilReset,
    /// Saved, where the controller can save the feature.
    Saved,
}

/// A feature as it was set.
#[derive(Debug)]
struct Setting {
    feature: Feature,
    data: Box<[u8]>,
    at: Instant,
}

/// What was set and not saved, in that order.
#[derive(Debug, Default)]
pub(super) struct Settings(Vec<Setting>);

impl Feature {
    /// The part of dword 11 that says which of several values of a feature is meant.
    fn instance(self) -> u32 {
        match self.id {
            // Sensor and threshold type.
            FeatureId::TEMPERATURE_THRESHOLD => self.dword_11 & 0x003f_0000,
            // The vector.
            FeatureId::INTERRUPT_VECTOR_CONFIGURATION => self.dword_11 & 0xffff,
            _ => 0,
        }
    }

    fn replaces(self, other: Feature) -> bool {
        (self.id, self.nsid, self.instance()) == (other.id, other.nsid, other.instance())
    }
}

impl Settings {
    fn has_room(&self, feature: Feature) -> bool {
        self.0.len() < MAX_SETTINGS || self.0.iter().any(|setting| feature.replaces(setting.feature))
    }

    fn forget(&mut self, feature: Feature) {
        self.0.retain(|setting| !feature.replaces(setting.feature));
    }

    fn keep(&mut self, feature: Feature, data: &[u8], at: Instant) {
        self.forget(feature);
        self.0.push(Setting { feature, data: data.into(), at });
    }
}

impl Setting {
    /// Its data now: a clock has gone on since it was set.
    fn data_at(&self, now: Instant) -> Box<[u8]> {
        match Timestamp::read_from_bytes(&self.data[..]) {
            Ok(stamp) if self.feature.id == FeatureId::TIMESTAMP => {
                let passed = now.duration_since(self.at).as_millis() as u64;
                Timestamp::from_millis(stamp.as_millis().wrapping_add(passed)).as_bytes().into()
            }
            _ => self.data.clone(),
        }
    }
}

impl Shared {
    /// Sets again what a reset made the controller forget, but for what needs a queue.
    ///
    /// # Errors
    /// The controller failed. A refusal is reported as an event.
    pub(crate) fn restore_settings(&self, admin: &mut Admin) -> Result<(), AdminError> {
        self.restore(admin, |feature| feature.id != FeatureId::INTERRUPT_VECTOR_CONFIGURATION)
    }

    /// [`Self::restore_settings`] for the interrupt vector of a queue that was created again: controllers may refuse to
    /// configure one that no queue uses (§5.21.1.9).
    ///
    /// # Errors
    /// As there.
    pub(crate) fn restore_vector(&self, admin: &mut Admin, lane: &Lane) -> Result<(), AdminError> {
        let vector = lane.create_cq.cdw11.get() >> 16;
        self.restore(admin, |feature| {
            feature.id == FeatureId::INTERRUPT_VECTOR_CONFIGURATION && feature.instance() == vector
        })
    }

    fn restore(&self, admin: &mut Admin, which: impl Fn(Feature) -> bool) -> Result<(), AdminError> {
        let Admin { queue, settings, .. } = admin;
        for setting in settings.0.iter().filter(|setting| which(setting.feature)) {
            let feature = setting.feature;
            let mut entry = SubmissionEntry::set_features(feature.id, feature.dword_11);
            entry.nsid.set(feature.nsid.get());
            let data = setting.data_at(self.link.timing.now());
            match queue.execute_with_bytes(&self.link, entry, &data) {
                Ok(_) => {}
                Err(AdminError::Status { status, .. }) => {
                    tracing::warn!(device = %self.name, feature = %feature.id, %status, "cannot be set again after the reset");
                    self.note(ControllerEvent::SettingLost { feature });
                }
                Err(error @ AdminError::Failed(_)) => return Err(error),
            }
        }
        Ok(())
    }
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

    /// Sets a feature; `data` is what it takes beside dword 11 (§5.21). Returns dword 0 of the completion. What is not
    /// saved is set again after each reset by the driver; if the controller refuses it then,
    /// [`SettingLost`](crate::ControllerEvent::SettingLost) says so.
    ///
    /// # Errors
    /// The feature belongs to the driver (queue numbers, host memory buffer), `data` is too long, it cannot be saved, more than
    /// [`MAX_SETTINGS`] are set already; the
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
        let (shared, now) = (&self.shared, self.shared.link.timing.now());
        let mut admin = shared.lock_running();
        if persistence == Persistence::UntilReset && !admin.settings.has_room(feature) {
            return Err(CommandError::Argument("more features are set than are set again after a reset"));
        }
        let value = shared.report(admin.queue.execute_with_bytes(&shared.link, entry, data))?;
        match persistence {
            Persistence::UntilReset => admin.settings.keep(feature, data, now),
            // The controller goes back to it by itself.
            Persistence::Saved => admin.settings.forget(feature),
        }
        Ok(value)
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
