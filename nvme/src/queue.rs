//! A queue pair as both the admin queue and the I/O queues use it: entries, doorbells, command slots.
//!
//! Owns: the memory of one submission and one completion queue, their rings, and which commands are in flight.
//!
//! Invariants:
//! - at most `slots` commands are in flight, fewer than the submission queue's entries;
//! - the completion queue has more entries than commands can be in flight, so the device can never overrun it, though
//!   its head is rung once a poll round;
//! - a completion is copied once and checked before it is believed: queue, head, identifier, generation.
//!
//! *Memory ordering*: the dword with the phase tag is loaded with acquire before the rest of the entry. Entries of the
//! submission queue are stored before a release fence, which precedes the doorbell.
//!
//! Excludes: what commands mean; deadlines; what happens after a protocol error (the controller fails).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use nvme_spec::completion::{PHASE_DWORD_BIT, PHASE_DWORD_OFFSET};
use nvme_spec::registers::{Cap, Doorbell, doorbell_offset};
use nvme_spec::{CQE_BYTES, CommandId, CompletionEntry, QueueId, SQE_BYTES, Status, SubmissionEntry};
use reactor::dma::DmaRegion;
use thiserror::Error;
use vm_memory::Bytes;
use zerocopy::IntoBytes;

use crate::ring::{CompletionRing, SubmissionRing};
use crate::shadow::{ShadowDoorbells, ShadowMemory};
use crate::slots::{BadCid, Command, CommandSlots};
use crate::transport::{Transport, TransportError, aligned};

/// Completion queue entries beyond the submission queue's: the device may run ahead of a head that is rung late.
pub(crate) const CQ_SLACK: u32 = 8;
/// Bytes of memory set to zero at a time.
const ZEROES_BYTES: usize = 4096;

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
        let cq_entries = (sq_entries + CQ_SLACK).min(max_entries.max(sq_entries));
        Self { id, slots, sq_entries, cq_entries, dstrd: cap.dstrd(), page_bytes: 4096 << cap.mpsmin() }
    }
}

/// A completion that passed every check; its slot is free again.
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
    sq_memory: Arc<dyn DmaRegion>,
    cq_memory: Arc<dyn DmaRegion>,
    sq: SubmissionRing,
    cq: CompletionRing,
    sq_doorbell: u64,
    cq_doorbell: u64,
    slots: CommandSlots,
    shadow: Option<ShadowDoorbells>,
    /// Doorbell writes, for the counters.
    doorbells: u64,
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
        let cq_memory =
            aligned::allocate(&*transport, shape.cq_entries as usize * CQE_BYTES, shape.page_bytes)?;
        Ok(Self {
            id: shape.id,
            sq_memory,
            cq_memory,
            sq: SubmissionRing::new(shape.sq_entries),
            cq: CompletionRing::new(shape.cq_entries),
            sq_doorbell: doorbell_offset(shape.dstrd, shape.id, Doorbell::SubmissionTail),
            cq_doorbell: doorbell_offset(shape.dstrd, shape.id, Doorbell::CompletionHead),
            slots: CommandSlots::new(shape.slots),
            shadow: shadow.map(|memory| ShadowDoorbells::new(memory, shape)),
            transport,
            doorbells: 0,
        })
    }

    /// Back to the state of a fresh queue: the device was told to forget it. Everything in flight is forgotten.
    pub(crate) fn restart(&mut self) {
        // Zeroes have the phase that a fresh completion ring does not expect.
        for memory in [&self.sq_memory, &self.cq_memory] {
            let slice = memory.slice();
            let zeroes = [0; ZEROES_BYTES];
            let mut at = 0;
            while at < slice.len() {
                let piece = zeroes.len().min(slice.len() - at);
                slice.write_slice(&zeroes[..piece], at).expect("a piece within the queue's memory");
                at += piece;
            }
        }
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
        self.sq_memory.iova()
    }

    pub(crate) fn cq_iova(&self) -> u64 {
        self.cq_memory.iova()
    }

    /// The queue's memory, to be kept while the device might still use it.
    pub(crate) fn memory(&self) -> [Arc<dyn DmaRegion>; 2] {
        [Arc::clone(&self.sq_memory), Arc::clone(&self.cq_memory)]
    }

    pub(crate) fn slots(&self) -> &CommandSlots {
        &self.slots
    }

    pub(crate) fn slots_mut(&mut self) -> &mut CommandSlots {
        &mut self.slots
    }

    pub(crate) fn doorbells(&self) -> u64 {
        self.doorbells
    }

    /// Puts a command into the submission queue, under a fresh identifier. A slot must be free.
    pub(crate) fn push(&mut self, mut entry: SubmissionEntry, owner: u16) -> (u16, CommandId) {
        if self.sq.must_ring() {
            self.ring();
        }
        let position = self.sq.push();
        let (slot, cid) =
            self.slots.take(owner, position.sequence).expect("the caller checked for a free slot");
        entry.cid.set(cid.get());
        self.sq_memory
            .slice()
            .write_slice(entry.as_bytes(), position.index as usize * SQE_BYTES)
            .expect("a ring index lies within the queue's memory");
        (slot, cid)
    }

    /// Tells the device of everything pushed since the last call.
    pub(crate) fn ring(&mut self) {
        if let Some(tail) = self.sq.ring() {
            // Release: the entries before the doorbell that makes the device read them.
            fence(Ordering::Release);
            if self.shadow.as_mut().is_none_or(|shadow| shadow.submission.publish(tail)) {
                self.transport.doorbell(self.sq_doorbell, tail);
                self.doorbells += 1;
            }
        }
    }

    /// Whether a completion waits.
    pub(crate) fn has_completion(&self) -> bool {
        self.load_phase_dword() & PHASE_DWORD_BIT != 0 && self.cq.phase()
            || self.load_phase_dword() & PHASE_DWORD_BIT == 0 && !self.cq.phase()
    }

    fn load_phase_dword(&self) -> u32 {
        let offset = self.cq.head() as usize * CQE_BYTES + PHASE_DWORD_OFFSET;
        // Acquire: the rest of the entry is read after its phase tag; pairs with the device's write order (§4.1).
        let dword: u32 = self
            .cq_memory
            .slice()
            .load(offset, Ordering::Acquire)
            .expect("a ring index lies within the queue's memory");
        u32::from_le(dword)
    }

    /// Takes the next completion, if there is one, and checks it.
    pub(crate) fn poll(&mut self) -> Result<Option<Reaped>, ProtocolError> {
        let last = self.load_phase_dword();
        if (last & PHASE_DWORD_BIT != 0) != self.cq.phase() {
            return Ok(None);
        }
        let entry = self.copy_entry(last);
        self.cq.advance();
        let cid = entry.cid.get();
        if entry.sq_id.get() != self.id.get() {
            return Err(ProtocolError::ForeignQueue { sq_id: entry.sq_id.get() });
        }
        let command = self.slots.find(entry.command_id()).map_err(|bad| match bad {
            BadCid::OutOfRange => ProtocolError::CidOutOfRange { cid },
            BadCid::NotInFlight => ProtocolError::CidNotInFlight { cid },
            BadCid::Stale => ProtocolError::CidStale { cid },
        })?;
        let sq_head = entry.sq_head.get();
        if !self.sq.head_is_possible(command.sequence, u32::from(sq_head)) {
            return Err(ProtocolError::BadSqHead { cid, sq_head });
        }
        self.slots.release(command.slot);
        Ok(Some(Reaped { command, status: entry.status(), dw0: entry.dw0.get() }))
    }

    fn copy_entry(&self, last_dword: u32) -> CompletionEntry {
        let offset = self.cq.head() as usize * CQE_BYTES;
        let slice = self.cq_memory.slice();
        // Relaxed: ordered after the acquire of the phase tag.
        let low: u64 =
            slice.load(offset, Ordering::Relaxed).expect("a ring index lies within the queue's memory");
        let middle: u32 =
            slice.load(offset + 8, Ordering::Relaxed).expect("a ring index lies within the queue's memory");
        let mut entry = CompletionEntry::default();
        let low = u64::from_le(low);
        let middle = u32::from_le(middle);
        entry.dw0.set(low as u32);
        entry.dw1.set((low >> 32) as u32);
        entry.sq_head.set(middle as u16);
        entry.sq_id.set((middle >> 16) as u16);
        entry.cid.set(last_dword as u16);
        entry.status_phase.set((last_dword >> 16) as u16);
        entry
    }

    /// Tells the device how far completions were taken: once a poll round.
    pub(crate) fn ring_completions(&mut self) {
        if let Some(head) = self.cq.ring() {
            // Release: entries were read before the device may overwrite them.
            fence(Ordering::Release);
            if self.shadow.as_mut().is_none_or(|shadow| shadow.completion.publish(head)) {
                self.transport.doorbell(self.cq_doorbell, head);
                self.doorbells += 1;
            }
        }
    }
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
        assert_eq!((shape.slots, shape.sq_entries, shape.cq_entries), (128, 129, 137));
        let tiny = QueueShape::for_depth(QueueId::new(1), 128, 2, Cap::new());
        assert_eq!((tiny.slots, tiny.sq_entries, tiny.cq_entries), (1, 2, 2));
    }
}
