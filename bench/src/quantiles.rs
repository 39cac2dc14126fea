//! Quantiles of durations, exact: all of them are kept.

use std::time::Duration;

use serde_json::{Value, json};

/// Count, median, 99.9th percentile and the largest, in nanoseconds.
pub(crate) fn summary(mut took: Vec<Duration>) -> Value {
    took.sort_unstable();
    let at = |part: f64| {
        let index = (took.len() as f64 * part).ceil() as usize;
        took.get(index.saturating_sub(1)).map_or(0, |took| nanos(*took))
    };
    json!({ "count": took.len(), "p50_ns": at(0.5), "p999_ns": at(0.999), "worst_ns": at(1.0) })
}

/// As a number that JSON has.
pub(crate) fn nanos(took: Duration) -> u64 {
    u64::try_from(took.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_members() {
        let of = |count: u64| summary((1..=count).map(Duration::from_nanos).collect());
        assert_eq!(of(1000), json!({ "count": 1000, "p50_ns": 500, "p999_ns": 999, "worst_ns": 1000 }));
        assert_eq!(of(0)["worst_ns"], 0);
    }
}
