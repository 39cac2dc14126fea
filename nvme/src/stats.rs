//! Counters and latency histograms of one queue: written by its owner, readable from any thread.
//!
//! Invariants: one writer, so that counting needs no locked instruction; a reader sees each value, not a consistent set.

use std::sync::atomic::{AtomicU64, Ordering};

/// Sub-buckets of each power of two: a recorded value is off by at most 1/32.
const SUB_BITS: u32 = 5;
const SUB_BUCKETS: usize = 1 << SUB_BITS;
/// Powers of two that are told apart, from 2^5 ns on: the last bucket holds everything from about 39 hours up.
const POWERS: usize = 43;
const BUCKETS: usize = SUB_BUCKETS * POWERS;

/// Counts of one queue since it was created. Alone in their cache lines: the owner writes them all the time, and what lies beside
/// them may be another core's.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct QueueCounters {
    /// Requests accepted.
    pub(crate) requests: AtomicU64,
    /// Requests completed with success.
    pub(crate) completed: AtomicU64,
    /// Requests completed with an error.
    pub(crate) errors: AtomicU64,
    /// Commands sent to the device; a request may take several or none.
    pub(crate) commands: AtomicU64,
    /// Bytes of completed reads.
    pub(crate) bytes_read: AtomicU64,
    /// Bytes of completed writes.
    pub(crate) bytes_written: AtomicU64,
    /// Doorbell writes of both queues.
    pub(crate) doorbells: AtomicU64,
    /// Times that a request was sent again, because of a status or a reset.
    pub(crate) retried: AtomicU64,
    /// Commands that were overdue.
    pub(crate) timeouts: AtomicU64,
}

/// Adds to a counter that only this thread writes.
#[inline(always)]
pub(crate) fn add(counter: &AtomicU64, n: u64) {
    // Relaxed: a count orders nothing.
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

/// A plain copy of [`QueueCounters`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueCounts {
    /// Requests accepted.
    pub requests: u64,
    /// Requests completed with success.
    pub completed: u64,
    /// Requests completed with an error.
    pub errors: u64,
    /// Commands sent to the device.
    pub commands: u64,
    /// Bytes of completed reads.
    pub bytes_read: u64,
    /// Bytes of completed writes.
    pub bytes_written: u64,
    /// Doorbell writes of both queues.
    pub doorbells: u64,
    /// Times that a request was sent again, because of a status or a reset.
    pub retried: u64,
    /// Commands that were overdue.
    pub timeouts: u64,
}

impl QueueCounters {
    /// Requests accepted and not handed out yet, for the owner: each is counted on both occasions.
    #[inline]
    pub(crate) fn in_flight(&self) -> u64 {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        get(&self.requests).wrapping_sub(get(&self.completed)).wrapping_sub(get(&self.errors))
    }

    /// The values now.
    pub fn read(&self) -> QueueCounts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        QueueCounts {
            requests: get(&self.requests),
            completed: get(&self.completed),
            errors: get(&self.errors),
            commands: get(&self.commands),
            bytes_read: get(&self.bytes_read),
            bytes_written: get(&self.bytes_written),
            doorbells: get(&self.doorbells),
            retried: get(&self.retried),
            timeouts: get(&self.timeouts),
        }
    }
}

/// What a latency is recorded under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LatencyClass {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flush, write zeroes, deallocate.
    Other,
}

/// Latencies of one queue, from submit to completion, by class.
#[derive(Debug, Default)]
pub struct Latencies {
    read: LatencyHistogram,
    write: LatencyHistogram,
    other: LatencyHistogram,
}

impl Latencies {
    /// The histogram of a class.
    pub fn class(&self, class: LatencyClass) -> &LatencyHistogram {
        match class {
            LatencyClass::Read => &self.read,
            LatencyClass::Write => &self.write,
            LatencyClass::Other => &self.other,
        }
    }
}

/// A log-linear histogram of nanoseconds, 32 buckets to each power of two.
#[derive(Debug)]
pub struct LatencyHistogram {
    buckets: Box<[AtomicU64]>,
    sum_ns: AtomicU64,
}

impl Default for LatencyHistogram {
    fn default() -> Self {
        Self { buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(), sum_ns: AtomicU64::new(0) }
    }
}

fn bucket_of(ns: u64) -> usize {
    if ns < SUB_BUCKETS as u64 {
        return ns as usize;
    }
    let power = 63 - ns.leading_zeros() - SUB_BITS;
    let sub = (ns >> power) as usize - SUB_BUCKETS;
    ((power as usize + 1) * SUB_BUCKETS + sub).min(BUCKETS - 1)
}

/// Largest value of a bucket.
fn bucket_end(bucket: usize) -> u64 {
    if bucket < SUB_BUCKETS {
        return bucket as u64;
    }
    let power = bucket / SUB_BUCKETS - 1;
    ((bucket % SUB_BUCKETS + SUB_BUCKETS + 1) as u64) << power as u32
}

impl LatencyHistogram {
    pub(crate) fn record(&self, ns: u64) {
        add(&self.buckets[bucket_of(ns)], 1);
        add(&self.sum_ns, ns);
    }

    /// A copy of the counts.
    pub fn snapshot(&self) -> LatencySnapshot {
        let counts = self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect();
        LatencySnapshot { counts, sum_ns: self.sum_ns.load(Ordering::Relaxed) }
    }
}

/// A copy of a [`LatencyHistogram`] that can be asked and merged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LatencySnapshot {
    counts: Vec<u64>,
    sum_ns: u64,
}

impl LatencySnapshot {
    /// Latencies recorded.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Arithmetic mean in nanoseconds; 0 if nothing was recorded.
    pub fn mean_ns(&self) -> u64 {
        self.sum_ns.checked_div(self.count()).unwrap_or(0)
    }

    /// The latency in nanoseconds that the fraction `quantile` (0 to 1) of requests did not exceed, rounded up to the
    /// bucket's end; 0 if nothing was recorded. Quantile 0 is the minimum, 1 the maximum.
    pub fn quantile_ns(&self, quantile: f64) -> u64 {
        let count = self.count();
        let rank = ((quantile.clamp(0.0, 1.0) * count as f64).ceil() as u64).clamp(1, count.max(1));
        let mut seen = 0;
        for (bucket, n) in self.counts.iter().enumerate() {
            seen += n;
            if seen >= rank {
                return bucket_end(bucket);
            }
        }
        0
    }

    /// Adds another's counts.
    pub fn merge(&mut self, other: &LatencySnapshot) {
        if self.counts.len() < other.counts.len() {
            self.counts.resize(other.counts.len(), 0);
        }
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.sum_ns = self.sum_ns.wrapping_add(other.sum_ns);
    }

    /// What was recorded since `earlier`, a snapshot of the same histogram.
    pub fn since(&self, earlier: &LatencySnapshot) -> LatencySnapshot {
        let before = earlier.counts.iter().copied().chain(std::iter::repeat(0));
        let counts = self.counts.iter().zip(before).map(|(now, then)| now.saturating_sub(then)).collect();
        LatencySnapshot { counts, sum_ns: self.sum_ns.wrapping_sub(earlier.sum_ns) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn quantiles_of_known_values() {
        let histogram = LatencyHistogram::default();
        for ns in 1..=1000 {
            histogram.record(ns * 1000);
        }
        let snapshot = histogram.snapshot();
        assert_eq!((snapshot.count(), snapshot.mean_ns()), (1000, 500_500));
        for (quantile, exact) in [(0.5, 500_000.0), (0.99, 990_000.0), (1.0, 1_000_000.0), (0.0, 1000.0)] {
            let got = snapshot.quantile_ns(quantile) as f64;
            assert!(got >= exact && got <= exact * 1.04, "{quantile}: {got}");
        }
        let mut twice = snapshot.clone();
        twice.merge(&snapshot);
        assert_eq!(twice.count(), 2000);
        assert_eq!(twice.since(&snapshot), snapshot);
        assert_eq!(LatencySnapshot::default().quantile_ns(0.5), 0);
    }

    proptest! {
        #[test]
        fn a_bucket_holds_its_values_within_its_precision(ns in 0u64..1 << 46) {
            let end = bucket_end(bucket_of(ns));
            prop_assert!(end >= ns);
            prop_assert!(end - ns <= ns / 32 + 1);
        }

        #[test]
        fn buckets_ascend(a in any::<u64>(), b in any::<u64>()) {
            prop_assert_eq!(a <= b || bucket_of(a) >= bucket_of(b), true);
        }
    }
}
