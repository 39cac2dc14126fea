//! A queue pair as both the admin queue and the I/O queues use it: entries, doorbells, command slots.
//!
//! Owns: the memory of one submission and one completion queue, their rings, and which commands are in flight.
//!
//! Invariants:
//! - at most `slots` commands are in flight, fewer than the submission queue's entries;
//! - the completion queue has room for every command in flight and for the completions that the device was not told of, so it
//!   is never full for the device, though its head is rung late;
//! - a completion is copied once and checked before it is believed: queue, head, identifier, generation.
//!
//! *Memory ordering*: the dword with the phase tag is loaded with acquire before the rest of the entry. Entries of the
//! submission queue are stored before a release fence, which precedes the doorbell.
//!
//! Excludes: what commands mean; deadlines; what happens after a protocol error (the controller fails).

use std::fmt;
use std::sync::Arc;

use nvme_spec::completion::{PHASE_DWORD_BIT, PHASE_DWORD_OFFSET};
use nvme_spec::registers::{Cap, Doorbell, doorbell_offset};
use nvme_spec::{CQE_BYTES, CommandId, CompletionEntry, QueueId, SQE_BYTES, Status, SubmissionEntry};
use reactor::dma::{DeviceWord, DmaCells, DmaRegion};
use thiserror::Error;

use crate::planted::{Bug, is_planted};
use crate::ring::{CompletionRing, SubmissionRing};
use crate::shadow::{ShadowDoorbells, ShadowMemory};
use crate::slots::{BadCid, Command, CommandSlots};
use crate::sync::{Ordering, fence_unless, order_unless};
use crate::transport::{Transport, TransportError, aligned};

/// Fewest completion queue entries beyond the submission queue's, if the controller allows them: see [`Queue::ring_completions`].
pub(crate) const MIN_SLACK: u32 = 32;

/// Completions in a cache line of the processors that this runs on.
const ENTRIES_PER_LINE: u32 = 64 / CQE_BYTES as u32;

/// Dwords of a completion.
const CQE_DWORDS: usize = CQE_BYTES / 4;

/// How a controller broke the queue protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// A completion names another submission queue.
    #[error("completion for submission queue {sq_id} on this completion queue")]
    ForeignQueue {
        /// The queue named.
        sq_id: u16,
    },
    /// A completion's identifier is beyond those in use.
    #[error("completion of command {cid:#06x}, which is out of range")]
    CidOutOfRange {
        /// The identifier.
        cid: u16,
    },
    /// A completion's identifier is of no command in flight: unknown or completed twice.
    #[error("completion of command {cid:#06x}, which is not in flight")]
    CidNotInFlight {
        /// The identifier.
        cid: u16,
    },
    /// A completion's identifier is of an earlier command in the same slot.
    #[error("stale completion of command {cid:#06x}")]
    CidStale {
        /// The identifier.
        cid: u16,
    },
    /// A completion reports a submission queue head that cannot be.
    #[error("completion of command {cid:#06x} with impossible submission queue head {sq_head}")]
    BadSqHead {
        /// The identifier.
        cid: u16,
        /// The head.
        sq_head: u16,
    },
}

/// Sizes and identity of a queue pair.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueShape {
    pub(crate) id: QueueId,
    /// Commands in flight at most.
    pub(crate) slots: u16,
    pub(crate) sq_entries: u32,
    pub(crate) cq_entries: u32,
    pub(crate) dstrd: u8,
    /// Bytes of the controller's memory page, which queues must begin.
    pub(crate) page_bytes: usize,
}

impl QueueShape {
    /// The shape for up to `slots` commands in flight on a controller whose queues have at most `max_entries`.
    pub(crate) fn for_depth(id: QueueId, slots: u16, max_entries: u32, cap: Cap) -> Self {
        let slots = u32::from(slots).min(max_entries.saturating_sub(1)).max(1) as u16;
        let sq_entries = u32::from(slots) + 1;
        let slack = (sq_entries / 2).max(MIN_SLACK);
        let cq_entries = (sq_entries + slack).min(max_entries.max(sq_entries));
        Self { id, slots, sq_entries, cq_entries, dstrd: cap.dstrd(), page_bytes: 4096 << cap.mpsmin() }
    }
}

/// A completion that passed every check; its slot is free again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Taken {
    pub(crate) command: Command,
    pub(crate) status: Status,
}

/// [`Taken`], with the command's result.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reaped {
    pub(crate) command: Command,
    pub(crate) status: Status,
    pub(crate) dw0: u32,
}

/// One submission and one completion queue.
pub(crate) struct Queue {
    id: QueueId,
    transport: Arc<dyn Transport>,
    sq_memory: DmaCells,
    cq_memory: DmaCells,
    sq: SubmissionRing,
    cq: CompletionRing,
    sq_doorbell: u64,
    cq_doorbell: u64,
    slots: CommandSlots,
    /// Completions that need not be told of at once.
    slack: u32,
    shadow: Option<ShadowDoorbells>,
}

impl Queue {
    /// Allocates the memory of a queue pair. The device is not told.
    pub(crate) fn new(
        transport: Arc<dyn Transport>,
        shape: QueueShape,
        shadow: Option<&ShadowMemory>,
    ) -> Result<Self, TransportError> {
        let sq_memory =
            aligned::allocate(&*transport, shape.sq_entries as usize * SQE_BYTES, shape.page_bytes)?;
        // Whole entries of either kind: `DmaCells` wants tables to end so.
        let cq_bytes = (shape.cq_entries as usize * CQE_BYTES).next_multiple_of(SQE_BYTES);
        let cq_memory = aligned::allocate(&*transport, cq_bytes, shape.page_bytes)?;
        Ok(Self {
            id: shape.id,
            sq_memory: DmaCells::new(sq_memory),
            cq_memory: DmaCells::new(cq_memory),
            sq: SubmissionRing::new(shape.sq_entries),
            cq: CompletionRing::new(shape.cq_entries),
            sq_doorbell: doorbell_offset(shape.dstrd, shape.id, Doorbell::SubmissionTail),
            cq_doorbell: doorbell_offset(shape.dstrd, shape.id, Doorbell::CompletionHead),
            slots: CommandSlots::new(shape.slots),
            // A completion queue may be the shorter one; then its head is told each time.
            slack: shape.cq_entries.saturating_sub(shape.sq_entries),
            shadow: shadow.map(|memory| ShadowDoorbells::new(memory, shape)),
            transport,
        })
    }

    /// Back to the state of a fresh queue: the device was told to forget it. Everything in flight is forgotten.
    pub(crate) fn restart(&mut self) {
        // Zeroes have the phase that a fresh completion ring does not expect.
        self.sq_memory.clear();
        self.cq_memory.clear();
        self.sq = SubmissionRing::new(self.sq.entries());
        self.cq = CompletionRing::new(self.cq.entries());
        self.slots.release_all();
        if let Some(shadow) = &mut self.shadow {
            shadow.restart();
        }
    }

    pub(crate) fn id(&self) -> QueueId {
        self.id
    }

    pub(crate) fn sq_iova(&self) -> u64 {
        self.sq_memory.region().iova()
    }

    pub(crate) fn cq_iova(&self) -> u64 {
        self.cq_memory.region().iova()
    }

    /// The queue's memory, to be kept while the device might still use it.
    pub(crate) fn memory(&self) -> [Arc<dyn DmaRegion>; 2] {
        [Arc::clone(self.sq_memory.region()), Arc::clone(self.cq_memory.region())]
    }

    #[inline]
    pub(crate) fn slots(&self) -> &CommandSlots {
        &self.slots
    }

    #[inline]
    pub(crate) fn slots_mut(&mut self) -> &mut CommandSlots {
        &mut self.slots
    }

    /// Puts a command into the submission queue, under a fresh identifier. A slot must be free.
    #[inline]
    pub(crate) fn push(&mut self, entry: SubmissionEntry, owner: u16) -> (u16, CommandId) {
        self.try_push(entry, owner).expect("the caller checked for a free slot")
    }

    /// [`Self::push`] if a slot is free.
    #[inline(always)]
    pub(crate) fn try_push(&mut self, mut entry: SubmissionEntry, owner: u16) -> Option<(u16, CommandId)> {
        // There is room: fewer commands are in flight than the ring has entries less one.
        let (slot, cid) = self.slots.take(owner, self.sq.next_sequence())?;
        let position = self.sq.push();
        entry.cid.set(cid.get());
        let words: [u64; SQE_BYTES / 8] = zerocopy::transmute!(entry);
        self.sq_memory.store_entry(position.index, words);
        Some((slot, cid))
    }

    /// Tells the device of everything pushed since the last call. Returns whether that took a register write.
    #[inline]
    pub(crate) fn ring(&mut self) -> bool {
        let Some(tail) = self.sq.ring() else { return false };
        // Release: the entries before the doorbell that makes the device read them.
        fence_unless(Bug::TailFenceMissing, Ordering::Release);
        let write = self.shadow.as_mut().is_none_or(|shadow| shadow.submission.publish(tail));
        if write {
            self.transport.doorbell(self.sq_doorbell, tail);
        }
        write
    }

    /// Whether a completion waits.
    #[inline]
    pub(crate) fn has_completion(&self) -> bool {
        let [.., last] = self.next_entry();
        self.has_phase(last.load(Ordering::Relaxed))
    }

    /// How many entries a run has that begins with the next one: at most `most`, so that it ends with a cache line, or with the ring.
    #[inline]
    pub(crate) fn run_of(&self, most: u32) -> u32 {
        let head = self.cq.head();
        let end = (head + most) / ENTRIES_PER_LINE * ENTRIES_PER_LINE;
        let end = if end > head { end } else { head + most };
        end.min(self.cq.entries()) - head
    }

    /// Whether the device has written the last entry of a run of `entries` from [`Self::run_of`]. It writes them in order.
    #[inline]
    pub(crate) fn has_run(&self, entries: u32) -> bool {
        let [.., last] = self.cq_memory.entry_32::<CQE_DWORDS>(self.cq.head() + entries - 1);
        self.has_phase(last.load(Ordering::Relaxed))
    }

    /// The dwords of the entry that comes next.
    #[inline]
    fn next_entry(&self) -> &[DeviceWord; CQE_DWORDS] {
        self.cq_memory.entry_32::<CQE_DWORDS>(self.cq.head())
    }

    #[inline]
    fn has_phase(&self, last_dword: u32) -> bool {
        (u32::from_le(last_dword) & PHASE_DWORD_BIT != 0) == self.cq.phase()
    }

    /// Takes the next completion, if there is one, and checks it.
    pub(crate) fn poll(&mut self) -> Result<Option<Reaped>, ProtocolError> {
        let index = self.cq.head();
        let Some(Taken { command, status }) = self.take().map_err(|error| *error)? else { return Ok(None) };
        // Relaxed: ordered after the acquire of the phase tag. The device was not told that it may overwrite the entry.
        let dw0 = u32::from_le(self.cq_memory.entry_32::<CQE_DWORDS>(index)[0].load(Ordering::Relaxed));
        Ok(Some(Reaped { command, status, dw0 }))
    }

    /// [`Self::poll`] without the command's result, which I/O commands do not have.
    #[inline(always)]
    pub(crate) fn take(&mut self) -> Result<Option<Taken>, Box<ProtocolError>> {
        let dwords = self.next_entry();
        // Acquire: the rest of the entry is read after its phase tag; pairs with the device's write order (§4.1).
        let last = dwords[PHASE_DWORD_OFFSET / 4].load(order_unless(Bug::PhaseRelaxed, Ordering::Acquire));
        if !self.has_phase(last) && !is_planted(Bug::PhaseUnchecked) {
            return Ok(None);
        }
        // Relaxed: ordered after the acquire of the phase tag. Each dword is read once, and not looked at again.
        let entry: CompletionEntry = zerocopy::transmute!([0, 0, dwords[2].load(Ordering::Relaxed), last]);
        self.cq.advance();
        if entry.sq_id.get() != self.id.get() && !is_planted(Bug::QueueUnchecked) {
            return Err(foreign_queue(entry.sq_id.get()));
        }
        let command = match self.slots.find(entry.command_id()) {
            Ok(command) => command,
            Err(bad) => return Err(bad_cid(bad, entry.cid.get())),
        };
        let sq_head = entry.sq_head.get();
        if !self.sq.head_is_possible(command.sequence, u32::from(sq_head)) && !is_planted(Bug::HeadUnchecked)
        {
            return Err(bad_sq_head(entry.cid.get(), sq_head));
        }
        self.slots.release(command.slot);
        Ok(Some(Taken { command, status: entry.status() }))
    }

    /// Tells the device how far completions were taken, if it has to know: at most once a poll round, and on a queue with slack
    /// much more rarely. The device sees as many entries taken as there are commands in flight, and those that it was not told
    /// of; as long as both fit the completion queue, it never has to wait. Telling it takes a register write, in the cache line
    /// that it reads the submission queue's tail from where doorbells are memory. Returns whether it was written.
    #[inline]
    pub(crate) fn ring_completions(&mut self) -> bool {
        self.ring_completions_beyond(self.slack)
    }

    /// Tells the device how far completions were taken: before the owner sleeps.
    pub(crate) fn ring_all_completions(&mut self) -> bool {
        self.ring_completions_beyond(0)
    }

    #[inline]
    fn ring_completions_beyond(&mut self, slack: u32) -> bool {
        let Some(head) = self.cq.ring_beyond(slack) else { return false };
        self.tell_head(head)
    }

    #[cold]
    #[inline(never)]
    fn tell_head(&mut self, head: u32) -> bool {
        if is_planted(Bug::CompletionDoorbellForgotten) {
            return false;
        }
        // Release: entries were read before the device may overwrite them.
        fence_unless(Bug::HeadFenceMissing, Ordering::Release);
        let write = self.shadow.as_mut().is_none_or(|shadow| shadow.completion.publish(head));
        if write {
            self.transport.doorbell(self.cq_doorbell, head);
        }
        write
    }
}

// In boxes, so that the way of completions that are right is free of them.

#[cold]
#[inline(never)]
fn foreign_queue(sq_id: u16) -> Box<ProtocolError> {
    Box::new(ProtocolError::ForeignQueue { sq_id })
}

#[cold]
#[inline(never)]
fn bad_cid(bad: BadCid, cid: u16) -> Box<ProtocolError> {
    Box::new(match bad {
        BadCid::OutOfRange => ProtocolError::CidOutOfRange { cid },
        BadCid::NotInFlight => ProtocolError::CidNotInFlight { cid },
        BadCid::Stale => ProtocolError::CidStale { cid },
    })
}

#[cold]
#[inline(never)]
fn bad_sq_head(cid: u16, sq_head: u16) -> Box<ProtocolError> {
    Box::new(ProtocolError::BadSqHead { cid, sq_head })
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue")
            .field("id", &self.id)
            .field("sq", &self.sq)
            .field("cq", &self.cq)
            .field("in_flight", &self.slots.in_flight())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_respect_the_controllers_limit() {
        let shape = QueueShape::for_depth(QueueId::new(1), 128, 1024, Cap::new());
        assert_eq!((shape.slots, shape.sq_entries, shape.cq_entries), (128, 129, 193));
        let tiny = QueueShape::for_depth(QueueId::new(1), 128, 2, Cap::new());
        assert_eq!((tiny.slots, tiny.sq_entries, tiny.cq_entries), (1, 2, 2));
    }
}
