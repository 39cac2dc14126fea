//! Requests that only NVMe has: compare, compare-and-write, verify, copy.
//!
//! Owns: [`NvmRequest`], what each comes to on this device, and the commands that are not cut as reads and writes are:
//! fused pairs and copies.
//!
//! Invariants:
//! - the two commands of a fused pair are neighbours in the submission queue and are announced by one doorbell write
//!   (NVMe 1.4 §6.2); they are sent together or not at all;
//! - while a pair waits for two free slots, requests that come later wait behind it;
//! - a compare-and-write is never sent twice: once it took effect, the same comparison fails.
//!
//! Excludes: completions, which are those of [`BlockDevice`].

use nvme_spec::identify::Fuses;
use reactor::block::Lba;

use super::*;
use crate::copy::{CopyError, CopyLimits, Sources};
use crate::identity::ControllerInfo;
use crate::ops::Op;

/// A request beyond [`Request`]. It completes as they do.
#[derive(Debug)]
pub enum NvmRequest {
    /// Compares blocks with the buffer (NVMe 1.4 §6.6): [`IoError::Mismatch`] if they differ.
    Compare {
        /// First block.
        lba: Lba,
        /// What is expected.
        buffer: DmaBuffer,
    },
    /// Compares blocks with the first half of the buffer and, if they are equal, writes the second half over them: nobody's
    /// write comes in between (NVMe 1.4 §6.2). [`IoError::Mismatch`] if they differ; then nothing was written. If it fails
    /// otherwise, it may have been written or not.
    CompareAndWrite {
        /// First block.
        lba: Lba,
        /// What is expected, then what is to be written: as many blocks each.
        buffer: DmaBuffer,
    },
    /// Has the device check that it can read the blocks, without a transfer (NVMe 1.4 §6.14).
    Verify(LbaRange),
    /// Copies blocks within the namespace, without a transfer (NVM Command Set 1.0 §3.2.2). Not atomic: if it fails, any part
    /// of the destination may have been written.
    Copy {
        /// What is copied, one behind the other. None overlaps the destination.
        sources: Vec<LbaRange>,
        /// Where the first block goes; the others follow.
        destination: Lba,
    },
}

/// An [`NvmRequest`] that was not accepted, with its buffer.
#[derive(Debug)]
pub struct RejectedNvm {
    /// The request as it was given.
    pub request: NvmRequest,
    /// Why: [`RejectReason::QueueFull`] asks to try again after completions.
    pub reason: RejectReason,
}

/// What of these requests a device can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NvmAbilities {
    /// Compare (ONCS).
    pub compare: bool,
    /// Blocks of the largest compare-and-write; 0 if there is none (FUSES, ACWU, NACWU).
    pub compare_and_write: u32,
    /// Verify (ONCS).
    pub verify: bool,
    /// Limits of one Copy command, which requests need not keep to; `None` if there is none (ONCS, MSRC, MSSRL, MCL).
    pub copy: Option<CopyLimits>,
}

impl NvmAbilities {
    pub(super) fn of(
        info: &ControllerInfo,
        namespace: &Namespace,
        max_transfer_blocks: u64,
        slots: u16,
    ) -> Self {
        let fused = info.raw.fuses().contains(Fuses::COMPARE_AND_WRITE) && slots >= 2;
        let atomic = namespace.compare_and_write.unwrap_or(u32::from(info.raw.acwu_z.get()) + 1);
        let most = u64::from(atomic).min(max_transfer_blocks).min(MAX_COUNT_16);
        Self {
            compare: info.oncs.contains(Oncs::COMPARE),
            compare_and_write: if fused { most as u32 } else { 0 },
            verify: info.oncs.contains(Oncs::VERIFY),
            copy: namespace.copy.filter(|_| info.oncs.contains(Oncs::COPY)),
        }
    }
}

/// What a request comes to.
struct Plan {
    kind: Kind,
    lba: u64,
    blocks: u64,
    sources: Option<Sources>,
}

impl Plan {
    fn of(kind: Kind, lba: u64, blocks: u64) -> Self {
        let kind = if blocks == 0 { Kind::Nothing } else { kind };
        Self { kind, lba, blocks, sources: None }
    }
}

impl QueuePair {
    /// What of [`NvmRequest`] the device can do.
    pub fn nvm_abilities(&self) -> NvmAbilities {
        self.abilities
    }

    /// Queues a request that only NVMe has, as [`BlockDevice::submit`] does the others.
    ///
    /// # Errors
    /// Gives the request back: the queue is full, or the request can never be served: [`IoError::Unsupported`] where the
    /// controller or the namespace lacks what it takes.
    pub fn submit_nvm(&mut self, tag: OpTag, request: NvmRequest) -> Result<(), RejectedNvm> {
        if self.shared.link.health.pulse() != self.pulse
            && let Err(error) = self.pause_or_fail()
        {
            return Err(RejectedNvm { request, reason: RejectReason::Error(error) });
        }
        let plan = match self.plan_nvm(&request) {
            Ok(plan) => plan,
            Err(error) => return Err(RejectedNvm { request, reason: RejectReason::Error(error) }),
        };
        if !self.ops.has_free() {
            return Err(RejectedNvm { request, reason: RejectReason::QueueFull });
        }
        let buffer = match request {
            NvmRequest::Compare { buffer, .. } | NvmRequest::CompareAndWrite { buffer, .. } => Some(buffer),
            NvmRequest::Verify(_) | NvmRequest::Copy { .. } => None,
        };
        let index = self.accept(tag, (plan.kind, plan.lba, plan.blocks), buffer);
        self.copies[usize::from(index)] = plan.sources;
        self.dispatch(index);
        Ok(())
    }

    fn plan_nvm(&self, request: &NvmRequest) -> Result<Plan, IoError> {
        let unsupported = |what| Err(IoError::Unsupported { what });
        match request {
            NvmRequest::Compare { .. } if !self.abilities.compare => {
                unsupported("the controller has no Compare")
            }
            NvmRequest::Compare { lba, buffer } => {
                let lba = lba.get();
                Ok(Plan::of(Kind::Compare, lba, self.blocks_of(lba, buffer.len())?))
            }
            NvmRequest::CompareAndWrite { .. } if self.abilities.compare_and_write == 0 => {
                unsupported("there is no fused Compare and Write on this queue")
            }
            NvmRequest::CompareAndWrite { lba, buffer } => {
                let lba = lba.get();
                let blocks = self.blocks_of(lba, buffer.len() / 2)?;
                if buffer.len() as u64 != 2 * (blocks << self.namespace.lba_shift) {
                    return unsupported("the halves of a Compare and Write are not whole blocks");
                }
                if blocks > u64::from(self.abilities.compare_and_write) {
                    return unsupported("the Compare and Write is larger than one command of the device");
                }
                Ok(Plan::of(Kind::CompareAndWrite, lba, blocks))
            }
            NvmRequest::Verify(_) if !self.abilities.verify => unsupported("the controller has no Verify"),
            NvmRequest::Verify(range) => {
                let (lba, blocks) = self.check_range(range)?;
                Ok(Plan::of(Kind::Verify, lba, blocks))
            }
            NvmRequest::Copy { .. } if self.abilities.copy.is_none() => {
                unsupported("the namespace has no Copy")
            }
            NvmRequest::Copy { sources, destination } => self.plan_copy(sources, destination.get()),
        }
    }

    fn plan_copy(&self, ranges: &[LbaRange], destination: u64) -> Result<Plan, IoError> {
        let lba_size = self.geometry.lba_size;
        let sources =
            Sources::new(ranges, destination, self.geometry.lba_count.get()).map_err(
                |error| match error {
                    CopyError::OutOfRange { lba, blocks } => {
                        let bytes = blocks.saturating_mul(u64::from(lba_size));
                        IoError::InvalidRange { lba, bytes, lba_size }
                    }
                    CopyError::Overlap => {
                        IoError::Unsupported { what: "a source of the copy overlaps its destination" }
                    }
                },
            )?;
        let plan = Plan::of(Kind::Copy, destination, sources.blocks());
        Ok(Plan { sources: Some(sources), ..plan })
    }

    /// Whether an operation has to wait although a slot is free.
    pub(super) fn waits_for_pair(&mut self, index: u16) -> bool {
        self.ops.get(index).kind == Kind::CompareAndWrite && !self.queue.slots().has_free_pair()
    }

    /// Sends the next command of a copy, or a fused pair. At least one slot is free. Returns whether something was sent.
    #[cold]
    pub(super) fn issue_composite(&mut self, index: u16) -> bool {
        if self.ops.get(index).kind == Kind::Copy {
            self.issue_copy(index);
            return true;
        }
        if self.waits_for_pair(index) {
            self.set_pair_waiting(true);
            return false;
        }
        self.issue_pair(index);
        true
    }

    fn issue_copy(&mut self, index: u16) {
        let op = self.ops.get(index);
        let slot = self.queue.slots().peek_free().expect("the caller saw a free slot");
        let sources =
            self.copies[usize::from(index)].as_ref().expect("a copy has sources while it is in use");
        let limits = self.abilities.copy.expect("a copy was accepted only where there is Copy");
        let done = sources.blocks() - op.rest.blocks_left;
        let (entry, blocks) = self.builder.copy(sources, done, limits, op.rest.next_lba, slot);
        self.first_lbas[usize::from(slot)] = op.rest.next_lba;
        op.rest.blocks_left -= blocks;
        op.rest.next_lba += blocks;
        op.outstanding += 1;
        self.queue.push(entry, index);
        add(&self.counters.commands, 1);
    }

    fn issue_pair(&mut self, index: u16) {
        // No doorbell is written between the two: that happens only where the ring is full of entries that were not
        // announced, and then no slot is free.
        let op = self.ops.get(index);
        let blocks = op.rest.blocks_left;
        for half in [Half::Compare, Half::Write] {
            let slot = self.queue.slots().peek_free().expect("two free slots were seen");
            let entry = self.builder.fused(op, blocks, half, slot);
            self.first_lbas[usize::from(slot)] = op.rest.next_lba;
            self.queue.push(entry, index);
        }
        op.rest.blocks_left = 0;
        op.outstanding += 2;
        add(&self.counters.commands, 2);
    }
}

/// A command of a fused pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Half {
    Compare,
    Write,
}

/// Keeps the error of a fused pair that says why: that the other command failed does not.
pub(super) fn fail_pair(op: &mut Op, status: Status, error: IoError) {
    if status.code() != StatusCode::ABORTED_FAILED_FUSED {
        op.rest.error = None;
    }
    op.fail(error);
}
