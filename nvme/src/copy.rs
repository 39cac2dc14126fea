//! Source ranges of copies and how they are cut into commands (NVM Command Set 1.0 §3.2.2): arithmetic only.
//!
//! Invariants:
//! - a copy's progress is one number, the blocks copied so far: sources are laid end to end, and block `n` of them goes to
//!   block `n` of the destination;
//! - no command exceeds what the namespace takes: ranges (MSRC), blocks of a range (MSSRL), blocks altogether (MCL);
//! - sources and destination do not overlap, so doing it twice is as good as once.
//!
//! Excludes: the ranges' encoding.

use nvme_spec::identify::IdentifyNamespace;
use reactor::block::LbaRange;

/// Ranges of a command at most: a page of them.
pub(crate) const MAX_RANGES: usize = 128;

/// What a namespace takes in one Copy command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyLimits {
    /// Source ranges.
    pub ranges: u16,
    /// Blocks of a source range.
    pub range_blocks: u16,
    /// Blocks of all ranges together.
    pub blocks: u32,
}

impl CopyLimits {
    /// From Identify Namespace; `None` if the fields do not allow a copy of even one block.
    pub(crate) fn of(raw: &IdentifyNamespace) -> Option<Self> {
        let limits =
            Self { ranges: u16::from(raw.msrc_z) + 1, range_blocks: raw.mssrl.get(), blocks: raw.mcl.get() };
        (limits.range_blocks > 0 && limits.blocks > 0).then_some(limits)
    }
}

/// A part of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    /// Blocks of all parts before it.
    at: u64,
    lba: u64,
    blocks: u64,
}

/// The sources of one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sources {
    parts: Box<[Part]>,
    blocks: u64,
}

/// Why a copy cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CopyError {
    /// This range, or the destination as one, leaves the namespace.
    OutOfRange { lba: u64, blocks: u64 },
    /// A source overlaps the destination.
    Overlap,
}

impl Sources {
    /// Checks `ranges` and a destination of the same length in a namespace of `size` blocks. Empty ranges are left out.
    pub(crate) fn new(ranges: &[LbaRange], destination: u64, size: u64) -> Result<Self, CopyError> {
        let mut blocks = 0u64;
        let mut parts = Vec::with_capacity(ranges.len());
        for range in ranges {
            let (lba, count) = (range.start.get(), range.count.get());
            check_range(lba, count, size)?;
            if count > 0 {
                parts.push(Part { at: blocks, lba, blocks: count });
                blocks = blocks.checked_add(count).ok_or(CopyError::OutOfRange { lba, blocks: count })?;
            }
        }
        check_range(destination, blocks, size)?;
        let overlaps = |part: &Part| part.lba < destination + blocks && destination < part.lba + part.blocks;
        if parts.iter().any(overlaps) {
            return Err(CopyError::Overlap);
        }
        Ok(Self { parts: parts.into(), blocks })
    }

    /// Blocks altogether.
    pub(crate) fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The ranges of the command that goes on after `done` blocks, each passed to `emit`: first block and blocks.
    /// Returns their number and their blocks, at least one of each unless everything is done.
    pub(crate) fn next(
        &self,
        done: u64,
        limits: CopyLimits,
        mut emit: impl FnMut(usize, u64, u64),
    ) -> (usize, u64) {
        let most = usize::from(limits.ranges).min(MAX_RANGES);
        // The part that block `done` lies in: the last that does not begin after it.
        let mut part = self.parts.partition_point(|part| part.at <= done).saturating_sub(1);
        let (mut ranges, mut blocks) = (0, 0);
        let mut at = done;
        while ranges < most && blocks < u64::from(limits.blocks) && at < self.blocks {
            let Part { at: start, lba, blocks: length } = self.parts[part];
            let offset = at - start;
            let count =
                (length - offset).min(u64::from(limits.range_blocks)).min(u64::from(limits.blocks) - blocks);
            emit(ranges, lba + offset, count);
            (ranges, blocks, at) = (ranges + 1, blocks + count, at + count);
            if at == start + length {
                part += 1;
            }
        }
        (ranges, blocks)
    }
}

fn check_range(lba: u64, blocks: u64, size: u64) -> Result<(), CopyError> {
    match lba.checked_add(blocks) {
        Some(end) if end <= size => Ok(()),
        _ => Err(CopyError::OutOfRange { lba, blocks }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use reactor::block::{Lba, LbaCount};
    use zerocopy::FromZeros;

    fn range(lba: u64, blocks: u64) -> LbaRange {
        LbaRange { start: Lba::new(lba), count: LbaCount::new(blocks) }
    }

    #[test]
    fn copies_that_cannot_be_are_refused() {
        let new = |ranges: &[LbaRange], destination| Sources::new(ranges, destination, 1000).map(|_| ());
        assert_eq!(new(&[range(0, 10), range(990, 10)], 500), Ok(()));
        assert_eq!(new(&[range(991, 10)], 0), Err(CopyError::OutOfRange { lba: 991, blocks: 10 }));
        assert_eq!(new(&[range(0, 10)], 991), Err(CopyError::OutOfRange { lba: 991, blocks: 10 }));
        assert_eq!(new(&[range(u64::MAX, 2)], 0), Err(CopyError::OutOfRange { lba: u64::MAX, blocks: 2 }));
        assert_eq!(new(&[range(0, 10)], 10), Ok(()), "neighbours do not overlap");
        assert_eq!(new(&[range(0, 10)], 9), Err(CopyError::Overlap));
        assert_eq!(new(&[range(100, 10), range(14, 5)], 0), Err(CopyError::Overlap));
        assert_eq!(new(&[range(7, 0)], 7), Ok(()), "nothing overlaps nothing");
    }

    #[test]
    fn limits_of_zero_are_no_support() {
        let mut raw = IdentifyNamespace::new_zeroed();
        assert_eq!(CopyLimits::of(&raw), None);
        raw.mssrl.set(8);
        assert_eq!(CopyLimits::of(&raw), None);
        raw.mcl.set(4);
        raw.msrc_z = 255;
        assert_eq!(CopyLimits::of(&raw), Some(CopyLimits { ranges: 256, range_blocks: 8, blocks: 4 }));
    }

    proptest! {
        #[test]
        fn commands_copy_every_block_once_in_order_and_within_the_limits(
            ranges in prop::collection::vec((0u64..1 << 40, 0u64..500), 0..20),
            msrc_z in any::<u8>(), mssrl in 1u16..100, mcl in 1u32..300,
        ) {
            let limits = CopyLimits { ranges: u16::from(msrc_z) + 1, range_blocks: mssrl, blocks: mcl };
            let ranges: Vec<_> = ranges.iter().map(|&(lba, blocks)| range(lba, blocks)).collect();
            let expected: Vec<u64> =
                ranges.iter().flat_map(|range| (0..range.count.get()).map(|n| range.start.get() + n)).collect();
            let sources = Sources::new(&ranges, 1 << 50, 1 << 60).unwrap();
            prop_assert_eq!(sources.blocks(), expected.len() as u64);
            let mut copied = Vec::new();
            while (copied.len() as u64) < sources.blocks() {
                let done = copied.len() as u64;
                let mut emitted = 0;
                let (count, blocks) = sources.next(done, limits, |index, lba, blocks| {
                    assert_eq!(index, emitted);
                    emitted += 1;
                    assert!(blocks >= 1 && blocks <= u64::from(mssrl));
                    copied.extend(lba..lba + blocks);
                });
                prop_assert!(count >= 1 && count == emitted);
                prop_assert!(count <= MAX_RANGES && count <= usize::from(limits.ranges));
                prop_assert!(blocks >= 1 && blocks <= u64::from(mcl));
                prop_assert_eq!(copied.len() as u64, done + blocks);
            }
            prop_assert_eq!(copied, expected);
            prop_assert_eq!(sources.next(sources.blocks(), limits, |_, _, _| {}), (0, 0));
        }
    }
}
