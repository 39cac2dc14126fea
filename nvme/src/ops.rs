//! Requests of a queue pair between submit and completion, and how they are cut into commands.
//!
//! Owns: [`Ops`] (a fixed table of requests) and [`Cutter`] (block counts of commands: transfer limit, optimal boundary).
//!
//! Invariants:
//! - an operation is in use from submit until its completion was handed out, exactly once;
//! - its buffer stays in the table while any of its commands is in flight;
//! - after its first error no further command of it is sent.
//!
//! Excludes: commands' encoding, and the queue.

use std::time::Duration;

use reactor::block::{IoError, OpTag};
use reactor::clock::Instant;
use reactor::dma::DmaBuffer;

use crate::stats::LatencyClass;

/// What an operation's commands are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    /// A write with force unit access.
    WriteDurable,
    Flush,
    WriteZeroes,
    /// Writes of a page of zeroes, for controllers without Write Zeroes.
    WriteZeroPage,
    Deallocate,
    Compare,
    /// A fused pair: two commands, always together.
    CompareAndWrite,
    Verify,
    Copy,
    /// Nothing to do on this device.
    Nothing,
}

impl Kind {
    /// Whether commands of this kind may be sent again when it is not known whether they took effect: the second time has
    /// the effect that the first had, or would have had.
    pub(crate) fn is_repeatable(self) -> bool {
        match self {
            Kind::Read
            | Kind::Write
            | Kind::WriteDurable
            | Kind::Flush
            | Kind::WriteZeroes
            | Kind::WriteZeroPage
            | Kind::Deallocate
            | Kind::Compare
            | Kind::Verify
            // Sources and destination do not overlap.
            | Kind::Copy
            | Kind::Nothing => true,
            // Once it took effect, the comparison fails.
            Kind::CompareAndWrite => false,
        }
    }

    /// Whether its commands are not cut and built as those of the others are.
    #[inline]
    pub(crate) fn is_composite(self) -> bool {
        matches!(self, Kind::CompareAndWrite | Kind::Copy)
    }

    pub(crate) fn latency_class(self) -> LatencyClass {
        match self {
            Kind::Read => LatencyClass::Read,
            Kind::Write | Kind::WriteDurable => LatencyClass::Write,
            _ => LatencyClass::Other,
        }
    }
}

/// One request: what every request needs, in one cache line, and the rest behind it.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct Op {
    pub(crate) tag: OpTag,
    pub(crate) buffer: Option<DmaBuffer>,
    /// First block.
    pub(crate) lba: u64,
    /// When it was submitted, if latencies are recorded.
    pub(crate) started: Instant,
    /// Commands in flight; of a free entry, the next free one or [`NONE`].
    pub(crate) outstanding: u32,
    pub(crate) kind: Kind,
    pub(crate) in_use: bool,
    /// One command is all there is to it, and nothing unusual has happened to it: `rest` says nothing.
    pub(crate) simple: bool,
    pub(crate) rest: Box<Rest>,
}

/// What a request needs that takes several commands, has to wait, or fails.
#[derive(Debug, Default)]
pub(crate) struct Rest {
    /// Waits for command slots, in the backlog.
    pub(crate) in_backlog: bool,
    /// Blocks not sent yet, from `next_lba` and `next_offset` bytes into the buffer on.
    pub(crate) blocks_left: u64,
    pub(crate) next_lba: u64,
    pub(crate) next_offset: u64,
    /// To be sent again, whole, once nothing is outstanding.
    pub(crate) repeat: bool,
    /// Blocks of the whole request.
    blocks: u64,
    /// Repetitions because of a status.
    pub(crate) retries: u8,
    /// Repetitions because of a reset.
    pub(crate) resets: u8,
    /// Times that one of its commands was overdue.
    pub(crate) timeouts: u8,
    /// Time to wait before it is repeated.
    pub(crate) delay: Duration,
    pub(crate) error: Option<IoError>,
}

const _: () = assert!(size_of::<Op>() == 64);

impl Op {
    fn empty() -> Self {
        Self {
            tag: OpTag(0),
            buffer: None,
            lba: 0,
            started: Instant::ZERO,
            outstanding: 0,
            kind: Kind::Nothing,
            in_use: false,
            simple: false,
            rest: Box::default(),
        }
    }

    /// Makes the rest of a simple operation say what it implies, because something unusual happens to it. `lba_shift` is that
    /// of the blocks.
    pub(crate) fn unfold(&mut self, lba_shift: u8) {
        if self.simple {
            let blocks = self.buffer.as_ref().map_or(0, DmaBuffer::len) as u64 >> lba_shift;
            self.begin(self.kind, self.lba, blocks);
            self.rest.blocks_left = 0;
        }
    }

    /// A new request: `blocks` blocks from `lba` on, none for a request that needs no command.
    #[inline]
    pub(crate) fn begin(&mut self, kind: Kind, lba: u64, blocks: u64) {
        self.kind = kind;
        (self.lba, self.rest.blocks) = (lba, blocks);
        (self.rest.retries, self.rest.resets, self.rest.timeouts) = (0, 0, 0);
        self.rewind();
    }

    /// Everything remains to be sent.
    #[inline]
    pub(crate) fn rewind(&mut self) {
        self.rest.repeat = false;
        self.simple = false;
        self.rest.next_lba = self.lba;
        self.rest.next_offset = 0;
        self.rest.blocks_left = self.rest.blocks;
    }

    /// Whether nothing remains to be sent or awaited.
    pub(crate) fn is_done(&self) -> bool {
        self.outstanding == 0 && self.rest.blocks_left == 0 && !self.rest.in_backlog
    }

    /// Keeps the first error and sends nothing more.
    pub(crate) fn fail(&mut self, error: IoError) {
        self.rest.error.get_or_insert(error);
        self.simple = false;
        self.rest.blocks_left = 0;
    }
}

/// End of the list of free entries.
const NONE: u16 = u16::MAX;

/// The requests of one queue.
#[derive(Debug)]
pub(crate) struct Ops {
    table: Box<[Op]>,
    /// The entry that is taken next, or [`NONE`].
    free: u16,
}

impl Ops {
    pub(crate) fn new(count: u16) -> Self {
        assert!(count < NONE, "a queue has at most 4096 commands");
        let entry = |index| Op { outstanding: u32::from(index) + 1, ..Op::empty() };
        let mut table: Box<[Op]> = (0..count).map(entry).collect();
        if let Some(last) = table.last_mut() {
            last.outstanding = u32::from(NONE);
        }
        Self { table, free: if count == 0 { NONE } else { 0 } }
    }

    pub(crate) fn capacity(&self) -> usize {
        self.table.len()
    }

    #[inline]
    pub(crate) fn has_free(&self) -> bool {
        self.free != NONE
    }

    /// Takes a free entry, with nothing outstanding.
    pub(crate) fn take(&mut self) -> Option<u16> {
        let index = self.free;
        // The end of the list is beyond the last entry.
        let op = self.table.get_mut(usize::from(index))?;
        debug_assert!(!op.in_use && op.buffer.is_none() && op.rest.error.is_none());
        self.free = op.outstanding as u16;
        (op.in_use, op.outstanding) = (true, 0);
        Some(index)
    }

    #[inline]
    pub(crate) fn get(&mut self, index: u16) -> &mut Op {
        &mut self.table[usize::from(index)]
    }

    /// Frees an entry and gives back what it held.
    pub(crate) fn release(&mut self, index: u16) -> (OpTag, Result<(), IoError>, Option<DmaBuffer>) {
        let op = &mut self.table[usize::from(index)];
        assert!(op.in_use, "operation {index} completed twice");
        op.in_use = false;
        op.rest.in_backlog = false;
        op.rest.blocks_left = 0;
        (op.rest.repeat, op.simple) = (false, false);
        op.outstanding = u32::from(self.free);
        self.free = index;
        (op.tag, op.rest.error.take().map_or(Ok(()), Err), op.buffer.take())
    }

    /// The entry that is taken next, if one is free.
    #[inline(always)]
    pub(crate) fn peek_free(&self) -> Option<u16> {
        // The end of the list is beyond the last entry.
        self.table.get(usize::from(self.free)).map(|_| self.free)
    }

    /// Takes the free entry that [`Self::peek_free`] saw, for a request that one command carries out.
    #[inline(always)]
    pub(crate) fn take_simple(&mut self, tag: OpTag, kind: Kind, lba: u64, buffer: DmaBuffer) {
        let op = &mut self.table[usize::from(self.free)];
        debug_assert!(!op.in_use && op.buffer.is_none() && op.rest.error.is_none());
        self.free = op.outstanding as u16;
        (op.tag, op.kind, op.lba) = (tag, kind, lba);
        (op.in_use, op.simple, op.outstanding) = (true, true, 1);
        // Nothing is dropped: the place is empty.
        std::mem::forget(op.buffer.replace(buffer));
    }

    /// Frees an entry of [`Self::take_simple`], if it is as simple as it was. The caller takes what it holds.
    #[inline(always)]
    pub(crate) fn release_simple(&mut self, index: u16) -> Option<&mut Op> {
        let op = &mut self.table[usize::from(index)];
        if !op.simple {
            return None;
        }
        (op.in_use, op.simple, op.outstanding) = (false, false, u32::from(self.free));
        self.free = index;
        Some(op)
    }

    /// The first entry in use, if any.
    pub(crate) fn any_in_use(&self) -> Option<u16> {
        self.table.iter().position(|op| op.in_use).map(|index| index as u16)
    }
}

/// How many blocks a command takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cutter {
    /// Blocks of the largest transfer.
    pub(crate) transfer: u64,
    /// Blocks between optimal boundaries; 0 if there are none.
    pub(crate) boundary: u64,
    /// Blocks of the largest Write Zeroes.
    pub(crate) zeroes: u64,
    /// Blocks of the largest Verify.
    pub(crate) verify: u64,
    /// Blocks of the largest range of a deallocate.
    pub(crate) deallocate: u64,
}

/// Blocks of the largest command whose count is zero-based in 16 bits.
pub(crate) const MAX_COUNT_16: u64 = 1 << 16;

impl Cutter {
    /// Blocks of the next command of a request at `lba` with `left` blocks to go: at least 1, at most `left`.
    pub(crate) fn next(&self, kind: Kind, lba: u64, left: u64) -> u64 {
        let limit = match kind {
            Kind::Read | Kind::Write | Kind::WriteDurable | Kind::Compare if self.boundary == 0 => {
                self.transfer
            }
            Kind::Read | Kind::Write | Kind::WriteDurable | Kind::Compare => {
                // The boundary need not be a power of two.
                self.transfer.min(self.boundary - lba % self.boundary)
            }
            Kind::WriteZeroPage => self.transfer,
            Kind::WriteZeroes => self.zeroes,
            Kind::Verify => self.verify,
            Kind::Deallocate => self.deallocate,
            Kind::CompareAndWrite | Kind::Copy | Kind::Flush | Kind::Nothing => left,
        };
        limit.min(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn commands_cover_a_request_and_cross_no_boundary(
            lba in 0u64..1 << 40, count in 1u64..5000, transfer in 1u64..300, boundary in 0u64..100,
            kind in prop::sample::select(vec![Kind::Read, Kind::Write, Kind::WriteDurable, Kind::Compare]),
        ) {
            let cutter =
                Cutter { transfer, boundary, zeroes: MAX_COUNT_16, verify: 1, deallocate: u64::from(u32::MAX) };
            let (mut at, mut left) = (lba, count);
            while left > 0 {
                let n = cutter.next(kind, at, left);
                prop_assert!(n >= 1 && n <= left && n <= transfer);
                let zone = |block: u64| block.checked_div(boundary);
                prop_assert_eq!(zone(at), zone(at + n - 1));
                at += n;
                left -= n;
            }
            prop_assert_eq!(at, lba + count);
        }

        #[test]
        fn commands_without_data_keep_to_their_own_limits(
            lba in 0u64..1 << 40, count in 1u64..1 << 20, limit in 1u64..MAX_COUNT_16,
        ) {
            let cutter =
                Cutter { transfer: 1, boundary: 7, zeroes: limit, verify: limit, deallocate: limit };
            for kind in [Kind::WriteZeroes, Kind::Verify, Kind::Deallocate] {
                let mut left = count;
                while left > 0 {
                    let n = cutter.next(kind, lba + (count - left), left);
                    prop_assert_eq!(n, left.min(limit));
                    left -= n;
                }
            }
        }
    }
}
