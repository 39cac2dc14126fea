//! A set of integers kept as disjoint ranges: dirty pages of a file, valid bytes of a page.
//!
//! Invariant: ranges are not empty, do not overlap and do not touch. So a run of dirty pages is one entry however it
//! came about, and walking the set costs its runs, not its members.

use std::collections::BTreeMap;
use std::ops::Range;

/// A set of `u64`, as ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RangeSet {
    /// Start → end.
    ranges: BTreeMap<u64, u64>,
}

impl RangeSet {
    /// Adds every member of `range`.
    pub(crate) fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        // Whatever begins at or before the end and ends at or after the start becomes part of the new range.
        while let Some((&other_start, &other_end)) = self.ranges.range(..=end).next_back() {
            if other_end < start {
                break;
            }
            self.ranges.remove(&other_start);
            start = start.min(other_start);
            end = end.max(other_end);
        }
        self.ranges.insert(start, end);
    }

    /// Removes every member of `range`.
    pub(crate) fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        while let Some((&start, &end)) = self.ranges.range(..range.end).next_back() {
            if end <= range.start {
                break;
            }
            self.ranges.remove(&start);
            if end > range.end {
                self.ranges.insert(range.end, end);
            }
            if start < range.start {
                self.ranges.insert(start, range.start);
                break;
            }
        }
    }

    /// The first run of members at or after `from`; it begins at `from` if that is a member.
    pub(crate) fn next_run(&self, from: u64) -> Option<Range<u64>> {
        if let Some((_, &end)) = self.ranges.range(..=from).next_back()
            && end > from
        {
            return Some(from..end);
        }
        self.ranges.range(from..).next().map(|(&start, &end)| start..end)
    }

    /// Whether every member of `range` is one of the set.
    pub(crate) fn covers(&self, range: Range<u64>) -> bool {
        range.is_empty()
            || self.next_run(range.start).is_some_and(|run| run.start == range.start && run.end >= range.end)
    }

    /// The runs, in order.
    pub(crate) fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.ranges.iter().map(|(&start, &end)| start..end)
    }

    /// Number of runs.
    pub(crate) fn run_count(&self) -> usize {
        self.ranges.len()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_as_a_set_of_integers(
            steps in prop::collection::vec((any::<bool>(), 0..60u64, 0..12u64), 1..60),
            from in 0..70u64,
        ) {
            let mut set = RangeSet::default();
            let mut model = BTreeSet::new();
            for (insert, start, length) in steps {
                if insert {
                    set.insert(start..start + length);
                    model.extend(start..start + length);
                } else {
                    set.remove(start..start + length);
                    model.retain(|value| !(start..start + length).contains(value));
                }
            }
            let members: Vec<u64> = set.runs().flatten().collect();
            prop_assert_eq!(&members, &model.iter().copied().collect::<Vec<_>>());
            // Runs neither touch nor overlap.
            prop_assert!(set.runs().zip(set.runs().skip(1)).all(|(one, next)| one.end < next.start));
            prop_assert_eq!(set.run_count(), set.runs().count());
            prop_assert_eq!(set.next_run(from).map(|run| run.start), model.range(from..).next().copied());
            let run_end = set.next_run(from).map_or(from, |run| run.end);
            prop_assert!(!model.contains(&run_end));
            prop_assert_eq!(set.covers(from..from + 3), (from..from + 3).all(|value| model.contains(&value)));
        }
    }
}
