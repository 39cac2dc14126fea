//! Creating and deleting I/O queues (§5.3 to §5.6).
//!
//! Invariants: done under the admin submission queue's lock, so one at a time; a completion queue outlives the submission
//! queues that use it.

use nvme_spec::registers::Doorbell;
use nvme_spec::{CQE_BYTES, SQE_BYTES, StatusCode, SubmissionEntry};

use crate::controller::{Core, Outcome};
use crate::dma::DmaDirection;
use crate::locks::lock;
use crate::queue::{CompletionQueue, RingShape, SubmissionQueue};

/// CC.IOSQES: 64-byte entries.
const IOSQES: u8 = 6;
/// CC.IOCQES: 16-byte entries.
const IOCQES: u8 = 4;

impl Core {
    /// Whether the host may use queue identifier `qid` for I/O.
    fn is_io_qid(&self, qid: u16) -> bool {
        let granted = self.granted_queues.load(std::sync::atomic::Ordering::Relaxed);
        (1..=granted).contains(&qid)
    }

    /// The checks that both kinds share, in the order of the commands' status tables.
    fn ring_shape(
        &self,
        page_shift: u32,
        entry: &SubmissionEntry,
        entry_bytes: usize,
        direction: DmaDirection,
    ) -> Result<RingShape, StatusCode> {
        let size_z = entry.create_queue().qsize_z();
        if size_z == 0 || size_z > self.config.mqes_z {
            return Err(StatusCode::INVALID_QUEUE_SIZE);
        }
        let iova = entry.prp1.get();
        if iova & ((1 << page_shift) - 1) != 0 {
            return Err(StatusCode::PRP_OFFSET_INVALID);
        }
        let entries = u32::from(size_z) + 1;
        let bytes = u64::from(entries) * entry_bytes as u64;
        self.dma.view().resolve(iova, bytes, direction)?;
        Ok(RingShape { iova, entries })
    }

    /// Create I/O Completion Queue (§5.3).
    pub(super) fn create_completion_queue(
        &self,
        page_shift: u32,
        entry: &SubmissionEntry,
    ) -> Result<Outcome, StatusCode> {
        let qid = entry.create_queue().qid();
        let attributes = entry.create_cq();
        if !self.is_io_qid(qid) || self.completion[usize::from(qid)].exists() {
            return Err(StatusCode::INVALID_QUEUE_ID);
        }
        if self.registers.cc().iocqes() != IOCQES {
            return Err(StatusCode::INVALID_QUEUE_SIZE);
        }
        if !attributes.pc() {
            return Err(StatusCode::INVALID_FIELD); // CAP.CQR
        }
        let vector = attributes.ien().then(|| attributes.iv());
        if vector.is_some_and(|v| usize::from(v) >= self.vectors.len()) {
            return Err(StatusCode::INVALID_INTERRUPT_VECTOR);
        }
        let ring = self.ring_shape(page_shift, entry, CQE_BYTES, DmaDirection::ToHost)?;
        let slot = &self.completion[usize::from(qid)];
        let mut queue = CompletionQueue::new(ring, vector, &self.dma);
        queue.shadow = self.new_shadow(qid, Doorbell::CompletionHead)?;
        slot.install(&mut lock(&slot.queue), queue);
        self.queue_began(qid, Doorbell::CompletionHead);
        Ok(Outcome::Done(0))
    }

    /// Create I/O Submission Queue (§5.4).
    pub(super) fn create_submission_queue(
        &self,
        page_shift: u32,
        entry: &SubmissionEntry,
    ) -> Result<Outcome, StatusCode> {
        let qid = entry.create_queue().qid();
        let attributes = entry.create_sq();
        let cqid = attributes.cqid();
        if !self.is_io_qid(qid) || self.submission[usize::from(qid)].exists() || !self.is_io_qid(cqid) {
            return Err(StatusCode::INVALID_QUEUE_ID);
        }
        if !self.completion[usize::from(cqid)].exists() {
            return Err(StatusCode::COMPLETION_QUEUE_INVALID);
        }
        if self.registers.cc().iosqes() != IOSQES {
            return Err(StatusCode::INVALID_QUEUE_SIZE);
        }
        if !attributes.pc() {
            return Err(StatusCode::INVALID_FIELD); // CAP.CQR
        }
        let ring = self.ring_shape(page_shift, entry, SQE_BYTES, DmaDirection::FromHost)?;
        let slot = &self.submission[usize::from(qid)];
        let mut queue = SubmissionQueue::new(self.config.fused, ring, cqid, page_shift, &self.dma);
        queue.shadow = self.new_shadow(qid, Doorbell::SubmissionTail)?;
        slot.install(&mut lock(&slot.queue), queue);
        self.queue_began(qid, Doorbell::SubmissionTail);
        Ok(Outcome::Done(0))
    }

    /// Delete I/O Submission Queue (§5.6): the command being executed finishes, waiting ones are dropped.
    pub(super) fn delete_submission_queue(&self, entry: &SubmissionEntry) -> Result<Outcome, StatusCode> {
        let qid = entry.delete_queue().get();
        let slot = self.submission.get(usize::from(qid)).filter(|slot| qid != 0 && slot.exists());
        let slot = slot.ok_or(StatusCode::INVALID_QUEUE_ID)?;
        slot.remove(&mut lock(&slot.queue));
        Ok(Outcome::Done(0))
    }

    /// Delete I/O Completion Queue (§5.5): refused while a submission queue uses it.
    pub(super) fn delete_completion_queue(&self, entry: &SubmissionEntry) -> Result<Outcome, StatusCode> {
        let qid = entry.delete_queue().get();
        let slot = self.completion.get(usize::from(qid)).filter(|slot| qid != 0 && slot.exists());
        let slot = slot.ok_or(StatusCode::INVALID_QUEUE_ID)?;
        if self.submission.iter().any(|sq| sq.exists() && sq.cqid() == qid) {
            return Err(StatusCode::INVALID_QUEUE_DELETION);
        }
        slot.remove(&mut lock(&slot.queue));
        Ok(Outcome::Done(0))
    }
}
