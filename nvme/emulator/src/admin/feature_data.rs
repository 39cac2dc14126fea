//! Features whose value is a data structure: Timestamp (§5.21.1.14), Host Behavior Support (§5.21.1.22).

use nvme_spec::feature::{FeatureId, FeatureSelect, HostBehavior, Timestamp};
use nvme_spec::{StatusCode, SubmissionEntry};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::controller::Core;
use crate::dma::DmaDirection;
use crate::locks::lock;
use crate::queue::SubmissionQueue;

/// Timestamp attribute: origin is Set Features.
const ORIGIN_HOST: u8 = 1 << 1;
const NS_PER_MS: u64 = 1_000_000;

/// The clock of the Timestamp feature: a reading, and the controller's time of it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct TimestampClock {
    milliseconds: u64,
    since_ns: u64,
    set_by_host: bool,
}

impl TimestampClock {
    /// Starts from 0 at a reset.
    pub(super) fn reset_at(since_ns: u64) -> Self {
        Self { since_ns, ..Self::default() }
    }

    fn read(self, now_ns: u64) -> Timestamp {
        let elapsed = now_ns.saturating_sub(self.since_ns) / NS_PER_MS;
        let mut timestamp = Timestamp::from_millis(self.milliseconds.wrapping_add(elapsed));
        timestamp.attributes = if self.set_by_host { ORIGIN_HOST } else { 0 };
        timestamp
    }
}

impl Core {
    /// Takes the data of a Set Features, if the feature has any.
    pub(super) fn set_feature_data(
        &self,
        queue: &mut SubmissionQueue,
        feature: FeatureId,
        entry: &SubmissionEntry,
    ) -> Result<(), StatusCode> {
        let mut take = |bytes: &mut [u8]| {
            let mut data = queue.data_path();
            data.resolve(entry, bytes.len() as u64, DmaDirection::FromHost)?;
            data.payload().cursor().take(bytes);
            Ok::<_, StatusCode>(())
        };
        match feature {
            FeatureId::TIMESTAMP => {
                let mut raw = [0; size_of::<Timestamp>()];
                take(&mut raw)?;
                let milliseconds = Timestamp::read_from_bytes(&raw).map_or(0, |value| value.as_millis());
                let clock = TimestampClock { milliseconds, since_ns: self.now_ns(), set_by_host: true };
                lock(&self.admin).features.timestamp = clock;
            }
            FeatureId::HOST_BEHAVIOR_SUPPORT => {
                let mut raw = [0; size_of::<HostBehavior>()];
                take(&mut raw)?;
                let [acre, ..] = raw;
                if acre > 1 {
                    return Err(StatusCode::INVALID_FIELD);
                }
                lock(&self.admin).features.advanced_retry = acre;
            }
            _ => {}
        }
        Ok(())
    }

    /// Returns the data of a Get Features, if the feature has any.
    pub(super) fn get_feature_data(
        &self,
        queue: &mut SubmissionQueue,
        feature: FeatureId,
        select: FeatureSelect,
        entry: &SubmissionEntry,
    ) -> Result<(), StatusCode> {
        let current = select == FeatureSelect::CURRENT;
        if !current && select != FeatureSelect::DEFAULT && select != FeatureSelect::SAVED {
            return Ok(());
        }
        match feature {
            FeatureId::TIMESTAMP => {
                let clock = lock(&self.admin).features.timestamp;
                let value = if current { clock.read(self.now_ns()) } else { Timestamp::default() };
                self.reply(queue, entry, value.as_bytes())
            }
            FeatureId::HOST_BEHAVIOR_SUPPORT => {
                let mut value = HostBehavior::new_zeroed();
                value.acre = if current { lock(&self.admin).features.advanced_retry } else { 0 };
                self.reply(queue, entry, value.as_bytes())
            }
            _ => Ok(()),
        }
    }
}
