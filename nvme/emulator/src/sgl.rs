//! Walking Scatter Gather Lists (§4.4): from the descriptor in a command to pieces of mapped memory.
//!
//! | descriptor | where | here |
//! |---|---|---|
//! | data block | anywhere | served; may be empty |
//! | bit bucket | anywhere | what is read into it is dropped; of a write's source it is ignored (§4.4.1) |
//! | segment, last segment | in the command, or last in a segment | the list goes on there |
//! | keyed, transport, any sub-type but address | – | SGL Descriptor Type Invalid |
//!
//! Invariants: the list that is filled has exactly the bytes asked for, or the walk fails with the status the
//! specification names; nothing is transferred by a failed walk. Each descriptor is read once. At most
//! [`MAX_SEGMENTS`] segments and [`MAX_DESCRIPTORS`] descriptors are looked at, whatever they say: empty ones, and
//! segments that name each other in a circle, end.
//!
//! Excludes: the transfer.

use nvme_spec::{StatusCode, SubmissionEntry};
use zerocopy::IntoBytes;

use crate::config::SglSupport;
use crate::dma::{DmaDirection, DmaView, SegmentList};

/// Segments that one command may chain.
pub(crate) const MAX_SEGMENTS: u32 = 512;
/// Descriptors that one command may have.
pub(crate) const MAX_DESCRIPTORS: u64 = 64 << 10;

/// Bytes of a descriptor.
const DESCRIPTOR: u64 = 16;
/// Descriptors of a segment read at a time.
const BATCH: u64 = 32;
/// The first descriptor's place in a command: the data pointer.
const SGL1: std::ops::Range<usize> = 24..40;

/// SGL Descriptor Type, the high half of the identifier (§4.4, figure "SGL Descriptor Type").
mod kind {
    pub(super) const BIT_BUCKET: u8 = 1;
    pub(super) const SEGMENT: u8 = 2;
    pub(super) const LAST_SEGMENT: u8 = 3;
}

/// A descriptor, split into its fields.
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    address: u64,
    len: u32,
    kind: u8,
    sub_type: u8,
}

impl Descriptor {
    fn parse(raw: &[u8]) -> Self {
        let field = |range: std::ops::Range<usize>| {
            raw[range].iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
        };
        let identifier = raw[15];
        Self {
            address: field(0..8),
            len: field(8..12) as u32,
            kind: identifier >> 4,
            sub_type: identifier & 0xf,
        }
    }

    fn is_segment(self) -> bool {
        self.kind == kind::SEGMENT || self.kind == kind::LAST_SEGMENT
    }

    /// Refuses what is not supported: types, and sub-types that are no plain address.
    fn check_type(self) -> Result<(), StatusCode> {
        let good = self.kind <= kind::LAST_SEGMENT && self.sub_type == 0;
        if good { Ok(()) } else { Err(StatusCode::SGL_TYPE_INVALID) }
    }

    /// The segment that a (last) segment descriptor names: how many descriptors it has.
    fn count(self) -> Result<u64, StatusCode> {
        let len = u64::from(self.len);
        if len == 0 || !len.is_multiple_of(DESCRIPTOR) || !self.address.is_multiple_of(8) {
            return Err(StatusCode::INVALID_SGL_SEGMENT);
        }
        Ok(len / DESCRIPTOR)
    }
}

/// Collects data descriptors until the command's bytes are covered.
struct Collector<'a> {
    view: &'a mut DmaView,
    list: &'a mut SegmentList,
    support: SglSupport,
    direction: DmaDirection,
    /// Bytes still wanted.
    rest: u64,
    /// Descriptors that may still come.
    budget: u64,
}

impl Collector<'_> {
    fn add(&mut self, descriptor: Descriptor) -> Result<(), StatusCode> {
        let len = u64::from(descriptor.len);
        let dropped = descriptor.kind == kind::BIT_BUCKET;
        if dropped && self.direction == DmaDirection::FromHost {
            return Ok(());
        }
        if self.support == SglSupport::Dword
            && !(len.is_multiple_of(4) && (dropped || descriptor.address.is_multiple_of(4)))
        {
            return Err(StatusCode::SGL_GRANULARITY_INVALID);
        }
        if len > self.rest {
            return Err(StatusCode::DATA_SGL_LENGTH_INVALID);
        }
        self.rest -= len;
        if len == 0 {
            return Ok(());
        }
        if dropped {
            self.list.push_dropped(self.view, len as usize)?;
        } else {
            let place = self.view.resolve(descriptor.address, len, self.direction)?;
            self.list.push(place, len as usize);
        }
        Ok(())
    }

    /// Goes through a segment; returns the descriptor of the next one if there is one.
    fn segment(&mut self, of: Descriptor) -> Result<Option<Descriptor>, StatusCode> {
        let mut left = of.count()?;
        self.budget = self.budget.checked_sub(left).ok_or(StatusCode::INVALID_SGL_COUNT)?;
        let mut at = of.address;
        let mut bytes = [0u8; (BATCH * DESCRIPTOR) as usize];
        while left > 0 {
            let batch = left.min(BATCH);
            let raw = &mut bytes[..(batch * DESCRIPTOR) as usize];
            self.view.read(at, raw)?;
            at += batch * DESCRIPTOR;
            for raw in raw.chunks_exact(DESCRIPTOR as usize) {
                left -= 1;
                let descriptor = Descriptor::parse(raw);
                descriptor.check_type()?;
                if !descriptor.is_segment() {
                    self.add(descriptor)?;
                } else if of.kind == kind::LAST_SEGMENT {
                    return Err(StatusCode::INVALID_SGL_SEGMENT);
                } else if left > 0 {
                    return Err(StatusCode::INVALID_SGL_COUNT); // not the last of its segment
                } else {
                    return Ok(Some(descriptor));
                }
            }
        }
        // Only the last segment may end without naming another.
        if of.kind == kind::SEGMENT { Err(StatusCode::INVALID_SGL_SEGMENT) } else { Ok(None) }
    }
}

/// Resolves `len` bytes into `list`, which is cleared first.
pub(crate) fn walk(
    entry: &SubmissionEntry,
    support: SglSupport,
    len: u64,
    direction: DmaDirection,
    view: &mut DmaView,
    list: &mut SegmentList,
) -> Result<(), StatusCode> {
    if support == SglSupport::Absent || entry.flags.psdt() == 3 {
        return Err(StatusCode::INVALID_FIELD);
    }
    list.clear();
    let first = Descriptor::parse(&entry.as_bytes()[SGL1]);
    first.check_type()?;
    let mut collector = Collector { view, list, support, direction, rest: len, budget: MAX_DESCRIPTORS };
    if first.is_segment() {
        let mut next = Some(first);
        let mut segments = 0;
        while let Some(segment) = next {
            segments += 1;
            if segments > MAX_SEGMENTS {
                return Err(StatusCode::INVALID_SGL_COUNT);
            }
            next = collector.segment(segment)?;
        }
    } else {
        collector.add(first)?;
    }
    if collector.rest == 0 { Ok(()) } else { Err(StatusCode::DATA_SGL_LENGTH_INVALID) }
}

#[cfg(test)]
mod tests;
