//! How long commands take: a model of a device that is slower than a copy, and the clock it goes by.
//!
//! Owns: [`LatencyModel`], [`Latency`] (the model at work), [`Clock`].
//!
//! A command is executed when it is fetched and completes when its time has passed, so that any number are under way at
//! once. With `iops_limit`, commands begin no closer together than the limit's reciprocal, over all queues: 80 µs and
//! 400,000/s behave as 32 channels do.
//!
//! Invariants: no command completes before its latency has passed; jitter is the same in every run.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nvme_spec::NvmOpcode;

/// Nanoseconds of a second.
const SECOND_NS: u64 = 1_000_000_000;
/// Longest latency of a model.
pub(crate) const MAX_LATENCY: Duration = Duration::from_secs(60);

/// How long I/O commands take. Admin commands take no time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LatencyModel {
    /// Read, compare, verify.
    pub read: Duration,
    /// Write, write zeroes, deallocate and all others.
    pub write: Duration,
    /// Flush.
    pub flush: Duration,
    /// Each latency varies by up to so many percent either way, at most 100.
    pub jitter_percent: u8,
    /// Most commands begun in a second, over all queues.
    pub iops_limit: Option<u32>,
}

impl LatencyModel {
    /// All commands take `latency`, at any rate.
    pub fn uniform(latency: Duration) -> Self {
        Self { read: latency, write: latency, flush: latency, ..Self::default() }
    }

    /// With at most `iops` commands a second.
    #[must_use]
    pub fn limited_to(mut self, iops: u32) -> Self {
        self.iops_limit = Some(iops);
        self
    }
}

/// A model at work.
#[derive(Debug)]
pub(crate) struct Latency {
    model: Option<LatencyModel>,
    /// When the next command may begin.
    next_start_ns: AtomicU64,
    /// Commands so far, from which jitter is drawn.
    commands: AtomicU64,
}

impl Latency {
    pub(crate) fn new(model: Option<LatencyModel>) -> Self {
        Self { model, next_start_ns: AtomicU64::new(0), commands: AtomicU64::new(0) }
    }

    #[inline]
    pub(crate) fn is_modelled(&self) -> bool {
        self.model.is_some()
    }

    /// When a command executed now completes; `None` for now.
    pub(crate) fn due_ns(&self, qid: u16, opcode: NvmOpcode, now_ns: impl Fn() -> u64) -> Option<u64> {
        let model = self.model.as_ref().filter(|_| qid != 0)?;
        let latency = match opcode {
            NvmOpcode::READ | NvmOpcode::COMPARE | NvmOpcode::VERIFY => model.read,
            NvmOpcode::FLUSH => model.flush,
            _ => model.write,
        };
        let start = self.start_ns(model.iops_limit, now_ns());
        let latency_ns = self.with_jitter(latency.as_nanos() as u64, model.jitter_percent);
        Some(start.saturating_add(latency_ns))
    }

    fn start_ns(&self, limit: Option<u32>, now_ns: u64) -> u64 {
        let Some(limit) = limit else { return now_ns };
        let gap = SECOND_NS / u64::from(limit.max(1));
        // Relaxed: nothing but the numbers themselves is passed on.
        let advance = |next: u64| Some(next.max(now_ns) + gap);
        let next = self.next_start_ns.fetch_update(Ordering::Relaxed, Ordering::Relaxed, advance);
        next.unwrap_or_else(|next| next).max(now_ns)
    }

    fn with_jitter(&self, latency_ns: u64, percent: u8) -> u64 {
        if percent == 0 {
            return latency_ns;
        }
        let index = self.commands.fetch_add(1, Ordering::Relaxed);
        // The golden ratio's multiples spread evenly (Weyl); the top bits are a fraction of 2^32.
        let fraction = index.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let span = latency_ns / 100 * u64::from(percent);
        latency_ns - span + ((u128::from(2 * span) * u128::from(fraction)) >> 32) as u64
    }
}

/// The controller's time, in nanoseconds since it was made.
#[derive(Debug)]
pub(crate) enum Clock {
    Real(Instant),
    /// Moves only when told to.
    Virtual(AtomicU64),
}

impl Clock {
    pub(crate) fn real() -> Self {
        Self::Real(Instant::now())
    }

    pub(crate) fn virtual_from_zero() -> Self {
        Self::Virtual(AtomicU64::new(0))
    }

    pub(crate) fn now_ns(&self) -> u64 {
        match self {
            Self::Real(start) => start.elapsed().as_nanos() as u64,
            Self::Virtual(now) => now.load(Ordering::Acquire),
        }
    }

    /// Moves virtual time; real time moves by itself.
    pub(crate) fn advance(&self, by: Duration) {
        if let Self::Virtual(now) = self {
            now.fetch_add(by.as_nanos() as u64, Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limit_spaces_commands_and_idle_time_is_not_saved_up() {
        let model = LatencyModel::uniform(Duration::from_micros(80)).limited_to(400_000);
        let latency = Latency::new(Some(model));
        let due = |now| latency.due_ns(1, NvmOpcode::READ, || now).unwrap();
        assert_eq!([due(0), due(0), due(0)], [80_000, 82_500, 85_000]);
        assert_eq!([due(1_000_000), due(1_000_000)], [1_080_000, 1_082_500]);
    }

    #[test]
    fn jitter_stays_in_its_bounds_and_averages_out() {
        let model =
            LatencyModel { jitter_percent: 50, ..LatencyModel::uniform(Duration::from_nanos(1_000_000)) };
        let latency = Latency::new(Some(model));
        let all: Vec<u64> = (0..1000).map(|_| latency.due_ns(1, NvmOpcode::WRITE, || 0).unwrap()).collect();
        assert!(all.iter().all(|ns| (500_000..=1_500_000).contains(ns)));
        let mean = all.iter().sum::<u64>() / 1000;
        assert!((990_000..1_010_000).contains(&mean), "{mean}");
    }

    #[test]
    fn kinds_of_commands_have_their_own_latency_and_admin_commands_none() {
        let model = LatencyModel {
            read: Duration::from_nanos(1),
            write: Duration::from_nanos(2),
            flush: Duration::from_nanos(3),
            ..LatencyModel::default()
        };
        let latency = Latency::new(Some(model));
        let due = |qid, opcode| latency.due_ns(qid, opcode, || 10);
        assert_eq!(due(1, NvmOpcode::READ), Some(11));
        assert_eq!(due(1, NvmOpcode::WRITE_ZEROES), Some(12));
        assert_eq!(due(1, NvmOpcode::FLUSH), Some(13));
        assert_eq!(due(0, NvmOpcode::READ), None);
        assert_eq!(Latency::new(None).due_ns(1, NvmOpcode::READ, || 10), None);
    }
}
