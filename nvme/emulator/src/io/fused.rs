//! Fused compare-and-write (§4.10 and §6.2.1): two adjacent entries of one queue that count as one command.
//!
//! | what is wrong | first | second |
//! |---|---|---|
//! | nothing | success | success |
//! | the blocks differ | Compare Failure | Aborted due to Failed Fused |
//! | no partner where one must be | Aborted due to Missing Fused | Aborted due to Missing Fused |
//! | not a compare with a write | Invalid Field | Aborted due to Failed Fused |
//! | the ranges differ | Invalid Field | Invalid Field |
//! | the compare fails otherwise | its status | Aborted due to Failed Fused |
//! | the write fails | success | its status |
//!
//! Both are executed when the first is; the second's status waits for its turn to complete.
//!
//! Invariants: both entries are fetched before either is executed (`queue`); no other write falls between the two halves
//! (`gate`).

use nvme_spec::{NvmOpcode, StatusCode, SubmissionEntry};

use super::NvmContext;
use crate::config::FusedOperations;
use crate::controller::{Core, Outcome};
use crate::queue::{SubmissionQueue, SubmissionSlot};

/// FUSE: first command of a pair.
pub(crate) const FUSE_FIRST: u8 = 1;
/// FUSE: second command of a pair.
pub(crate) const FUSE_SECOND: u8 = 2;
/// ACWU: blocks of the largest compare-and-write, less one.
pub(crate) const ACWU_Z: u16 = 255;

impl Core {
    /// Executes either half of a pair.
    #[cold]
    pub(super) fn execute_fused(
        &self,
        slot: &SubmissionSlot,
        queue: &mut SubmissionQueue,
        entry: &SubmissionEntry,
    ) -> Result<Outcome, StatusCode> {
        if self.config.fused == FusedOperations::Absent {
            return Err(StatusCode::INVALID_FIELD);
        }
        let done = Ok(Outcome::Done(0));
        match entry.flags.fuse() {
            FUSE_FIRST => {
                let second = queue.fused_second(entry.cid.get()).ok_or(StatusCode::ABORTED_MISSING_FUSED)?;
                let (first, second) = self.compare_and_write(slot, queue, entry, &second);
                queue.set_fused_result(second);
                first.and(done)
            }
            FUSE_SECOND => {
                queue.fused_result(entry.cid.get()).ok_or(StatusCode::ABORTED_MISSING_FUSED)?.and(done)
            }
            _ => Err(StatusCode::INVALID_FIELD),
        }
    }

    /// The results of both halves.
    fn compare_and_write(
        &self,
        slot: &SubmissionSlot,
        queue: &mut SubmissionQueue,
        first: &SubmissionEntry,
        second: &SubmissionEntry,
    ) -> (Result<(), StatusCode>, Result<(), StatusCode>) {
        let failed = Err(StatusCode::ABORTED_FAILED_FUSED);
        if first.opcode != NvmOpcode::COMPARE.0 || second.opcode != NvmOpcode::WRITE.0 {
            return (Err(StatusCode::INVALID_FIELD), failed);
        }
        let (compare, write) = (first.read_write(), second.read_write());
        let range = |c: nvme_spec::command::ReadWrite| (c.slba, c.dw12.blocks_z());
        if range(compare) != range(write) || first.nsid != second.nsid {
            return (Err(StatusCode::INVALID_FIELD), Err(StatusCode::INVALID_FIELD));
        }
        if compare.dw12.blocks_z() > ACWU_Z {
            return (Err(StatusCode::ATOMIC_WRITE_UNIT_EXCEEDED), failed);
        }
        let (namespaces, mut data) = queue.split(&self.namespaces, self.config.sgls);
        let namespace = match namespaces.find(first.namespace_id()) {
            Ok(namespace) => &**namespace,
            Err(status) => return (Err(status), failed),
        };
        let _closed = self.gate.close(self.submission.iter().map(|slot| &slot.writing));
        let mut context = NvmContext { namespace, slot, data: &mut data };
        if let Err(status) = self.compare(&mut context, first) {
            return (Err(status), failed);
        }
        (Ok(()), self.write_ungated(&mut context, second))
    }
}
