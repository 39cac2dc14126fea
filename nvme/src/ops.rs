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

/// One request.
#[derive(Debug)]
pub(crate) struct Op {
    pub(crate) tag: OpTag,
    pub(crate) kind: Kind,
    pub(crate) in_use: bool,
    /// Waits for command slots, in the backlog.
    pub(crate) in_backlog: bool,
    pub(crate) buffer: Option<DmaBuffer>,
    /// Blocks not sent yet, from `next_lba` and `next_offset` bytes into the buffer on.
    pub(crate) blocks_left: u64,
    pub(crate) next_lba: u64,
    pub(crate) next_offset: u64,
    /// Commands in flight.
    pub(crate) outstanding: u32,
    /// To be sent again, whole, once nothing is outstanding.
    pub(crate) repeat: bool,
    /// First block and blocks of the whole request.
    lba: u64,
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
    /// When it was submitted, if latencies are recorded.
    pub(crate) started: Instant,
}

impl Op {
    fn empty() -> Self {
        Self {
            tag: OpTag(0),
            kind: Kind::Nothing,
            in_use: false,
            in_backlog: false,
            buffer: None,
            blocks_left: 0,
            next_lba: 0,
            next_offset: 0,
            outstanding: 0,
            repeat: false,
            lba: 0,
            blocks: 0,
            retries: 0,
            resets: 0,
            timeouts: 0,
            delay: Duration::ZERO,
            error: None,
            started: Instant::ZERO,
        }
    }

    /// A new request: `blocks` blocks from `lba` on, none for a request that needs no command.
    #[inline]
    pub(crate) fn begin(&mut self, kind: Kind, lba: u64, blocks: u64) {
        self.kind = kind;
        (self.lba, self.blocks) = (lba, blocks);
        (self.retries, self.resets, self.timeouts) = (0, 0, 0);
        self.rewind();
    }

    /// Everything remains to be sent.
    #[inline]
    pub(crate) fn rewind(&mut self) {
        self.repeat = false;
        self.next_lba = self.lba;
        self.next_offset = 0;
        self.blocks_left = self.blocks;
    }

    /// Whether nothing remains to be sent or awaited.
    pub(crate) fn is_done(&self) -> bool {
        self.outstanding == 0 && self.blocks_left == 0 && !self.in_backlog
    }

    /// Keeps the first error and sends nothing more.
    pub(crate) fn fail(&mut self, error: IoError) {
        self.error.get_or_insert(error);
        self.blocks_left = 0;
    }
}

/// The requests of one queue.
#[derive(Debug)]
pub(crate) struct Ops {
    table: Box<[Op]>,
    free: Vec<u16>,
}

impl Ops {
    pub(crate) fn new(count: u16) -> Self {
        Self { table: (0..count).map(|_| Op::empty()).collect(), free: (0..count).rev().collect() }
    }

    pub(crate) fn in_use(&self) -> usize {
        self.table.len() - self.free.len()
    }

    pub(crate) fn capacity(&self) -> usize {
        self.table.len()
    }

    pub(crate) fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// Takes a free entry, with nothing outstanding.
    pub(crate) fn take(&mut self) -> Option<u16> {
        let index = self.free.pop()?;
        let op = &mut self.table[usize::from(index)];
        debug_assert!(!op.in_use && op.buffer.is_none() && op.error.is_none() && op.outstanding == 0);
        op.in_use = true;
        Some(index)
    }

    pub(crate) fn get(&mut self, index: u16) -> &mut Op {
        &mut self.table[usize::from(index)]
    }

    /// Frees an entry and gives back what it held.
    pub(crate) fn release(&mut self, index: u16) -> (OpTag, Result<(), IoError>, Option<DmaBuffer>) {
        let op = &mut self.table[usize::from(index)];
        assert!(op.in_use, "operation {index} completed twice");
        op.in_use = false;
        op.in_backlog = false;
        op.blocks_left = 0;
        op.outstanding = 0;
        op.repeat = false;
        self.free.push(index);
        (op.tag, op.error.take().map_or(Ok(()), Err), op.buffer.take())
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
