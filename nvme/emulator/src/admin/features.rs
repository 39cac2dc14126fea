//! Get and Set Features (§5.13, §5.21).
//!
//! Invariants: nothing can be saved, so "saved" reads as the default and a save is refused. A reset restores the defaults.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use nvme_spec::feature::{
    Arbitration, AsyncEventConfiguration, FeatureCapabilities, FeatureId, FeatureSelect,
    InterruptVectorConfiguration, NumberOfQueues, VolatileWriteCache,
};
use nvme_spec::identify::Oncs;
use nvme_spec::{NamespaceId, StatusCode, SubmissionEntry};

use crate::controller::{Core, Outcome};
use crate::locks::lock;
use crate::queue::{CompletionSlot, SubmissionQueue, SubmissionSlot};

use super::feature_data::TimestampClock;

/// Asynchronous Event Configuration: namespace attribute and firmware activation notices.
const NOTICES: u32 = 0b11 << 8;
/// Default over-temperature threshold: no warning ever.
const DEFAULT_OVER: u16 = 0xffff;
/// TMPSEL of a set: all sensors.
const ALL_SENSORS: u32 = 0xf;
/// Error recovery: the deallocated-error bit, which no namespace here supports.
const DULBE: u32 = 1 << 16;
/// Arbitration after a reset: no limit to the burst.
const DEFAULT_ARBITRATION: u32 = 7;

/// Features that nothing but Get Features looks at, and those that log pages need.
#[derive(Debug)]
pub(crate) struct Features {
    arbitration: u32,
    /// Over and under threshold of the composite temperature, in kelvins.
    temperature: [u16; 2],
    /// Error recovery by namespace.
    error_recovery: BTreeMap<u32, u32>,
    /// Vectors with coalescing disabled.
    uncoalesced: Vec<u16>,
    write_atomicity: u32,
    async_events: u32,
    pub(super) timestamp: TimestampClock,
    /// ACRE of Host Behavior Support.
    pub(super) advanced_retry: u8,
}

impl Default for Features {
    fn default() -> Self {
        Self {
            arbitration: DEFAULT_ARBITRATION,
            temperature: [DEFAULT_OVER, 0],
            error_recovery: BTreeMap::new(),
            uncoalesced: Vec::new(),
            write_atomicity: 0,
            async_events: 0,
            timestamp: TimestampClock::default(),
            advanced_retry: 0,
        }
    }
}

impl Features {
    /// Whether a temperature is beyond a threshold.
    pub(super) fn is_beyond_threshold(&self, kelvin: u16) -> bool {
        kelvin >= self.temperature[0] || kelvin <= self.temperature[1]
    }

    /// The events that the host wants.
    pub(super) fn async_events(&self) -> AsyncEventConfiguration {
        self.async_events.into()
    }
}

/// Whether a feature belongs to a namespace; `None` if there is no such feature.
fn is_namespace_specific(core: &Core, feature: FeatureId) -> Option<bool> {
    let cache = core.has_volatile_cache();
    let timestamp = core.config.oncs.contains(Oncs::TIMESTAMP);
    match feature {
        FeatureId::ERROR_RECOVERY => Some(true),
        FeatureId::VOLATILE_WRITE_CACHE => cache.then_some(false),
        FeatureId::TIMESTAMP => timestamp.then_some(false),
        FeatureId::ARBITRATION
        | FeatureId::POWER_MANAGEMENT
        | FeatureId::TEMPERATURE_THRESHOLD
        | FeatureId::NUMBER_OF_QUEUES
        | FeatureId::INTERRUPT_COALESCING
        | FeatureId::INTERRUPT_VECTOR_CONFIGURATION
        | FeatureId::WRITE_ATOMICITY_NORMAL
        | FeatureId::ASYNC_EVENT_CONFIGURATION
        | FeatureId::KEEP_ALIVE_TIMER
        | FeatureId::HOST_BEHAVIOR_SUPPORT => Some(false),
        _ => None,
    }
}

impl Core {
    /// Defaults, as after power-on.
    pub(crate) fn reset_features(&self) {
        let timestamp = TimestampClock::reset_at(self.now_ns());
        lock(&self.admin).features = Features { timestamp, ..Features::default() };
        self.burst.store(DEFAULT_ARBITRATION as u8, Ordering::Relaxed);
        self.keep_alive.set(0, 0);
        self.cache_enabled.store(self.has_volatile_cache(), Ordering::Relaxed);
        self.granted_queues.store(self.config.io_queues, Ordering::Relaxed);
    }

    /// Set Features.
    pub(super) fn set_features(
        &self,
        queue: &mut SubmissionQueue,
        entry: &SubmissionEntry,
    ) -> Result<Outcome, StatusCode> {
        let view = entry.set_features_view();
        let (feature, value) = (FeatureId(view.fid()), entry.cdw11.get());
        let nsid = entry.namespace_id();
        let of_namespace = is_namespace_specific(self, feature).ok_or(StatusCode::INVALID_FIELD)?;
        if view.sv() {
            return Err(StatusCode::FEATURE_NOT_SAVEABLE);
        }
        if !of_namespace && nsid != NamespaceId::NONE && nsid != NamespaceId::BROADCAST {
            return Err(StatusCode::FEATURE_NOT_NAMESPACE_SPECIFIC);
        }
        match feature {
            FeatureId::NUMBER_OF_QUEUES => return self.set_number_of_queues(value),
            FeatureId::VOLATILE_WRITE_CACHE => self.set_write_cache(value)?,
            FeatureId::POWER_MANAGEMENT => check(value & 0x1f == 0)?, // only state 0 exists
            FeatureId::TEMPERATURE_THRESHOLD => self.set_temperature(value)?,
            FeatureId::ERROR_RECOVERY => self.set_error_recovery(nsid, value)?,
            FeatureId::INTERRUPT_VECTOR_CONFIGURATION => self.set_vector(value)?,
            FeatureId::ARBITRATION => {
                self.burst.store(Arbitration::from(value).ab(), Ordering::Relaxed);
                lock(&self.admin).features.arbitration = value & !0xf8;
            }
            // Interrupts are never held back.
            FeatureId::INTERRUPT_COALESCING => return Err(StatusCode::FEATURE_NOT_CHANGEABLE),
            FeatureId::WRITE_ATOMICITY_NORMAL => lock(&self.admin).features.write_atomicity = value & 1,
            FeatureId::ASYNC_EVENT_CONFIGURATION => {
                check(value & !(0xff | NOTICES) == 0)?;
                lock(&self.admin).features.async_events = value;
                self.report_warnings();
            }
            FeatureId::KEEP_ALIVE_TIMER => self.keep_alive.set(value, self.now_ns()),
            FeatureId::TIMESTAMP | FeatureId::HOST_BEHAVIOR_SUPPORT => {
                self.set_feature_data(queue, feature, entry)?;
            }
            _ => return Err(StatusCode::INVALID_FIELD),
        }
        Ok(Outcome::Done(0))
    }

    /// Number of Queues (§5.21.1.7): once, before any I/O queue exists. Queues come in pairs here, so the smaller of the
    /// two wishes is granted for both.
    fn set_number_of_queues(&self, value: u32) -> Result<Outcome, StatusCode> {
        let wish = NumberOfQueues::from(value);
        check(wish.submission_z() != u16::MAX && wish.completion_z() != u16::MAX)?;
        let any = self.submission[1..].iter().any(SubmissionSlot::exists)
            || self.completion[1..].iter().any(CompletionSlot::exists);
        if any {
            return Err(StatusCode::COMMAND_SEQUENCE_ERROR);
        }
        let largest = wish.submission_z().max(wish.completion_z());
        let granted_z = largest.min(self.config.io_queues - 1);
        self.granted_queues.store(granted_z + 1, Ordering::Relaxed);
        let granted = NumberOfQueues::new().with_submission_z(granted_z).with_completion_z(granted_z);
        Ok(Outcome::Done(granted.into()))
    }

    /// Volatile Write Cache (§5.21.1.6): what is in the cache when it is disabled is written back.
    fn set_write_cache(&self, value: u32) -> Result<(), StatusCode> {
        let enabled = VolatileWriteCache::from(value).wce();
        self.cache_enabled.store(enabled, Ordering::Relaxed);
        if enabled {
            Ok(())
        } else {
            self.namespaces.list().iter().try_for_each(crate::namespace::Namespace::flush)
        }
    }

    /// Temperature Threshold (§5.21.1.4): only the composite sensor exists.
    fn set_temperature(&self, value: u32) -> Result<(), StatusCode> {
        let (sensor, kind) = (value >> 16 & 0xf, value >> 20 & 3);
        check((sensor == 0 || sensor == ALL_SENSORS) && kind <= 1)?;
        lock(&self.admin).features.temperature[kind as usize] = value as u16;
        self.report_warnings();
        Ok(())
    }

    fn set_error_recovery(&self, nsid: NamespaceId, value: u32) -> Result<(), StatusCode> {
        check(value & DULBE == 0)?;
        let mut admin = lock(&self.admin);
        if nsid == NamespaceId::BROADCAST {
            let all = self.namespaces.list();
            admin.features.error_recovery = all.iter().map(|n| (n.nsid().get(), value)).collect();
        } else {
            let nsid = self.namespace(nsid)?.nsid();
            admin.features.error_recovery.insert(nsid.get(), value);
        }
        Ok(())
    }

    fn set_vector(&self, value: u32) -> Result<(), StatusCode> {
        let setting = InterruptVectorConfiguration::from(value);
        check(usize::from(setting.vector()) < self.vectors.len())?;
        let uncoalesced = &mut lock(&self.admin).features.uncoalesced;
        uncoalesced.retain(|v| *v != setting.vector());
        if setting.coalescing_disable() {
            uncoalesced.push(setting.vector());
        }
        Ok(())
    }

    /// Get Features.
    pub(super) fn get_features(
        &self,
        queue: &mut SubmissionQueue,
        entry: &SubmissionEntry,
    ) -> Result<Outcome, StatusCode> {
        let (feature, select) = entry.get_features_view();
        let of_namespace = is_namespace_specific(self, feature).ok_or(StatusCode::INVALID_FIELD)?;
        let value = match select {
            FeatureSelect::CURRENT => self.current_value(feature, entry)?,
            FeatureSelect::DEFAULT | FeatureSelect::SAVED => self.default_value(feature, entry)?,
            FeatureSelect::SUPPORTED_CAPABILITIES => {
                let changeable = feature != FeatureId::INTERRUPT_COALESCING;
                FeatureCapabilities::new()
                    .with_namespace_specific(of_namespace)
                    .with_changeable(changeable)
                    .into()
            }
            _ => return Err(StatusCode::INVALID_FIELD),
        };
        self.get_feature_data(queue, feature, select, entry)?;
        Ok(Outcome::Done(value))
    }

    fn current_value(&self, feature: FeatureId, entry: &SubmissionEntry) -> Result<u32, StatusCode> {
        let admin = lock(&self.admin);
        let features = &admin.features;
        Ok(match feature {
            FeatureId::ARBITRATION => features.arbitration,
            FeatureId::TEMPERATURE_THRESHOLD => {
                u32::from(features.temperature[temperature_kind(entry)? as usize])
            }
            FeatureId::ERROR_RECOVERY => self.error_recovery(features, entry.namespace_id())?,
            FeatureId::VOLATILE_WRITE_CACHE => {
                VolatileWriteCache::new().with_wce(self.cache_enabled.load(Ordering::Relaxed)).into()
            }
            FeatureId::NUMBER_OF_QUEUES => {
                let granted_z = self.granted_queues.load(Ordering::Relaxed) - 1;
                NumberOfQueues::new().with_submission_z(granted_z).with_completion_z(granted_z).into()
            }
            FeatureId::INTERRUPT_VECTOR_CONFIGURATION => {
                let vector = self.asked_vector(entry)?;
                let disabled = features.uncoalesced.contains(&vector);
                vector_value(vector).with_coalescing_disable(disabled).into()
            }
            FeatureId::WRITE_ATOMICITY_NORMAL => features.write_atomicity,
            FeatureId::ASYNC_EVENT_CONFIGURATION => features.async_events,
            FeatureId::KEEP_ALIVE_TIMER => self.keep_alive.timeout_ms(),
            _ => 0, // power management: state 0; no coalescing; data structures
        })
    }

    /// Error Recovery of a namespace (§5.21.1.5). No namespace (0) is answered with what all of them have: hosts ask like that
    /// who take the feature for the controller's. If they differ, there is no such answer.
    fn error_recovery(&self, features: &Features, nsid: NamespaceId) -> Result<u32, StatusCode> {
        let of = |nsid: NamespaceId| features.error_recovery.get(&nsid.get()).copied().unwrap_or(0);
        if nsid != NamespaceId::NONE {
            return Ok(of(self.namespace(nsid)?.nsid()));
        }
        let all = self.namespaces.list();
        let mut values = all.iter().map(|namespace| of(namespace.nsid()));
        let first = values.next().unwrap_or(0);
        if values.all(|value| value == first) {
            Ok(first)
        } else {
            Err(StatusCode::INVALID_NAMESPACE_OR_FORMAT)
        }
    }

    fn default_value(&self, feature: FeatureId, entry: &SubmissionEntry) -> Result<u32, StatusCode> {
        Ok(match feature {
            FeatureId::ARBITRATION => DEFAULT_ARBITRATION,
            FeatureId::TEMPERATURE_THRESHOLD if temperature_kind(entry)? == 0 => u32::from(DEFAULT_OVER),
            FeatureId::VOLATILE_WRITE_CACHE => VolatileWriteCache::new().with_wce(true).into(),
            FeatureId::NUMBER_OF_QUEUES => {
                let largest_z = self.config.io_queues - 1;
                NumberOfQueues::new().with_submission_z(largest_z).with_completion_z(largest_z).into()
            }
            FeatureId::INTERRUPT_VECTOR_CONFIGURATION => vector_value(self.asked_vector(entry)?).into(),
            _ => 0,
        })
    }

    fn asked_vector(&self, entry: &SubmissionEntry) -> Result<u16, StatusCode> {
        let vector = InterruptVectorConfiguration::from(entry.cdw11.get()).vector();
        check(usize::from(vector) < self.vectors.len())?;
        Ok(vector)
    }
}

fn vector_value(vector: u16) -> InterruptVectorConfiguration {
    InterruptVectorConfiguration::new().with_vector(vector)
}

/// Which threshold a Get Features asks for: 0 over, 1 under.
fn temperature_kind(entry: &SubmissionEntry) -> Result<u32, StatusCode> {
    let value = entry.cdw11.get();
    let (sensor, kind) = (value >> 16 & 0xf, value >> 20 & 3);
    check(sensor == 0 && kind <= 1)?;
    Ok(kind)
}

fn check(good: bool) -> Result<(), StatusCode> {
    if good { Ok(()) } else { Err(StatusCode::INVALID_FIELD) }
}
