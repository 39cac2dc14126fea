//! Device addresses: which are free, of those that the IOMMU translates. Pure arithmetic.
//!
//! Addresses are handed out in rising order and start again at the bottom when the top is reached, so that one that was
//! given back is used again as late as possible: a device that still writes to it then meets a fault, not somebody's data.
//!
//! Invariants: what is free lies in the ranges that were given; free extents neither touch nor overlap.
//!
//! Excludes: mapping anything there.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// Addresses below are not handed out: 0 looks like "none" to some devices, and small numbers are what damaged pointers
/// look like.
const LOWEST: u64 = 1 << 20;

/// Free addresses.
#[derive(Clone, Debug)]
pub(super) struct IovaAllocator {
    /// First address to last.
    free: BTreeMap<u64, u64>,
    /// Where the next search begins.
    next: u64,
}

impl IovaAllocator {
    /// Everything in `ranges`, which may overlap and come in any order, but for the lowest MiB.
    pub(super) fn new(ranges: impl IntoIterator<Item = RangeInclusive<u64>>) -> Self {
        let mut allocator = Self { free: BTreeMap::new(), next: 0 };
        for range in ranges {
            let (first, last) = ((*range.start()).max(LOWEST), *range.end());
            if first <= last {
                allocator.insert(first, last);
            }
        }
        allocator
    }

    /// Takes `bytes` at a multiple of `alignment`, a power of two. `None` if there is no such extent, or `bytes` is 0.
    pub(super) fn allocate(&mut self, bytes: u64, alignment: u64) -> Option<u64> {
        debug_assert!(alignment.is_power_of_two());
        let span = bytes.checked_sub(1)?;
        let from_next = self.find(self.next, span, alignment);
        let (extent, start) = from_next.or_else(|| self.find(0, span, alignment))?;
        let last = start + span;
        let extent_last = self.free.remove(&extent).expect("`find` returns a key of the map");
        if extent < start {
            self.free.insert(extent, start - 1);
        }
        if last < extent_last {
            self.free.insert(last + 1, extent_last);
        }
        self.next = last.wrapping_add(1);
        Some(start)
    }

    /// Gives back what [`allocate`](Self::allocate) gave out.
    ///
    /// # Panics
    /// If part of it is free already: then two owners had it.
    pub(super) fn release(&mut self, start: u64, bytes: u64) {
        let last = start + (bytes - 1);
        let overlaps = self.free.range(..=last).next_back().is_some_and(|(_, &end)| end >= start);
        assert!(!overlaps, "IOVA {start:#x} is released twice");
        self.insert(start, last);
    }

    /// The first place at or above `from`: its extent, and the aligned address.
    fn find(&self, from: u64, span: u64, alignment: u64) -> Option<(u64, u64)> {
        let begin = self.free.range(..=from).next_back().map_or(from, |(&first, _)| first);
        self.free.range(begin..).find_map(|(&first, &last)| {
            let start = first.max(from).checked_next_multiple_of(alignment)?;
            let end = start.checked_add(span)?;
            (end <= last).then_some((first, start))
        })
    }

    /// Adds an extent and merges it with its neighbours.
    fn insert(&mut self, mut first: u64, mut last: u64) {
        // Neighbours begin at most one past our end, and end at least one before our begin.
        let reach = last.saturating_add(1);
        while let Some((&start, &end)) = self.free.range(..=reach).next_back() {
            if end.saturating_add(1) < first {
                break;
            }
            self.free.remove(&start);
            first = first.min(start);
            last = last.max(end);
        }
        self.free.insert(first, last);
    }

    #[cfg(test)]
    fn extents(&self) -> Vec<(u64, u64)> {
        self.free.iter().map(|(&first, &last)| (first, last)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    /// What an Intel IOMMU of 39 bits reports: a hole where interrupts are sent to.
    fn vtd() -> IovaAllocator {
        IovaAllocator::new([0..=0xfedf_ffff, 0xfef0_0000..=(1 << 39) - 1])
    }

    #[test]
    fn addresses_rise_and_avoid_the_interrupt_window() {
        let mut iovas = IovaAllocator::new([0xfed0_0000..=0xfedf_ffff, 0xfef0_0000..=0xffff_ffff]);
        assert_eq!(iovas.allocate(MIB, MIB), Some(0xfed0_0000));
        assert_eq!(iovas.allocate(MIB, MIB), Some(0xfef0_0000));
        assert_eq!(iovas.allocate(2 * MIB, 2 * MIB), Some(0xff00_0000));
    }

    #[test]
    fn address_zero_is_never_handed_out() {
        assert_eq!(vtd().allocate(4096, 4096), Some(LOWEST));
        assert_eq!(IovaAllocator::new([0..=LOWEST - 1]).allocate(1, 1), None);
    }

    #[test]
    fn an_address_given_back_is_used_last() {
        let mut iovas = IovaAllocator::new([LOWEST..=LOWEST + 4 * MIB - 1]);
        let first = iovas.allocate(MIB, MIB).unwrap();
        iovas.release(first, MIB);
        let others: Vec<_> = (0..3).map(|_| iovas.allocate(MIB, MIB).unwrap()).collect();
        assert!(!others.contains(&first));
        assert_eq!(iovas.allocate(MIB, MIB), Some(first));
        assert_eq!(iovas.allocate(1, 1), None);
    }

    #[test]
    fn the_top_of_the_address_space_does_not_overflow() {
        let mut iovas = IovaAllocator::new([u64::MAX - 4095..=u64::MAX]);
        assert_eq!(iovas.allocate(8192, 1), None);
        let start = iovas.allocate(4096, 4096).unwrap();
        assert_eq!(iovas.allocate(1, 1), None);
        iovas.release(start, 4096);
        assert_eq!(iovas.allocate(4096, 4096), Some(start));
        assert_eq!(iovas.allocate(1, 1 << 63), None);
    }

    #[test]
    fn nothing_and_too_much_are_refused() {
        let mut iovas = vtd();
        assert_eq!(iovas.allocate(0, 4096), None);
        assert_eq!(iovas.allocate(1 << 40, 4096), None);
        assert_eq!(IovaAllocator::new([]).allocate(4096, 4096), None);
    }

    #[test]
    fn overlapping_and_touching_ranges_are_one() {
        let iovas = IovaAllocator::new([3 * MIB..=4 * MIB - 1, MIB..=2 * MIB, 2 * MIB..=3 * MIB - 1]);
        assert_eq!(iovas.extents(), [(MIB, 4 * MIB - 1)]);
    }

    #[test]
    #[should_panic(expected = "released twice")]
    fn a_double_release_is_caught() {
        let mut iovas = vtd();
        let start = iovas.allocate(8192, 4096).unwrap();
        iovas.release(start + 4096, 4096);
        iovas.release(start, 8192);
    }

    proptest! {
        #[test]
        fn what_is_given_out_is_valid_and_disjoint_and_comes_back_whole(
            holes in prop::collection::vec((0u64..64, 1u64..8), 0..4),
            steps in prop::collection::vec((any::<bool>(), 1u64..9, 0u32..4, any::<prop::sample::Index>()), 1..80),
        ) {
            const UNIT: u64 = 4096;
            // 64 units above the lowest address, less the holes.
            let mut usable = [true; 64];
            for (at, length) in holes {
                usable.iter_mut().skip(at as usize).take(length as usize).for_each(|unit| *unit = false);
            }
            let ranges = (0..64u64).filter(|&unit| usable[unit as usize]).map(|unit| {
                let first = LOWEST + unit * UNIT;
                first..=first + UNIT - 1
            });
            let mut iovas = IovaAllocator::new(ranges);
            let whole = iovas.extents();
            let mut taken = [false; 64];
            let mut live: Vec<(u64, u64)> = Vec::new();
            for (release, units, shift, pick) in steps {
                if release && !live.is_empty() {
                    let (start, bytes) = live.swap_remove(pick.index(live.len()));
                    iovas.release(start, bytes);
                    let first = ((start - LOWEST) / UNIT) as usize;
                    taken[first..first + (bytes / UNIT) as usize].fill(false);
                    continue;
                }
                let (bytes, alignment) = (units * UNIT, UNIT << shift);
                match iovas.allocate(bytes, alignment) {
                    Some(start) => {
                        prop_assert_eq!(start % alignment, 0);
                        let first = ((start - LOWEST) / UNIT) as usize;
                        for unit in first..first + units as usize {
                            prop_assert!(usable[unit] && !taken[unit]);
                            taken[unit] = true;
                        }
                        live.push((start, bytes));
                    }
                    None => {
                        // There was indeed no room: LOWEST is aligned to every alignment used here.
                        let step = 1usize << shift;
                        let room = (0..64).step_by(step).any(|at| {
                            (at..at + units as usize).all(|unit| unit < 64 && usable[unit] && !taken[unit])
                        });
                        prop_assert!(!room);
                    }
                }
            }
            for (start, bytes) in live {
                iovas.release(start, bytes);
            }
            prop_assert_eq!(iovas.extents(), whole);
        }
    }
}
