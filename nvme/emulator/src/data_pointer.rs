//! A command's data pointer (§4.2, DPTR): PRPs or SGLs, resolved to pieces of mapped memory.
//!
//! Invariants: a resolved list has exactly the bytes asked for. Admin commands use PRPs only (§4.1.1).
//!
//! Excludes: walking PRPs (`prp`) and SGLs (`sgl`).

use nvme_spec::{StatusCode, SubmissionEntry};

use crate::config::SglSupport;
use crate::dma::{DmaDirection, DmaView, Payload, SegmentList};
use crate::faults::diversion::Diversion;
use crate::prp::{self, PrpPointer};
use crate::sgl;

/// What resolves the data pointers of one queue's commands; borrowed from the queue.
#[derive(Debug)]
pub(crate) struct DataPath<'a> {
    pub(crate) view: &'a mut DmaView,
    pub(crate) segments: &'a mut SegmentList,
    /// Memory page as a power of two.
    pub(crate) page_shift: u32,
    pub(crate) sgls: SglSupport,
    /// Where the data goes instead, if a fault rule says so.
    pub(crate) diversion: &'a mut Option<Box<Diversion>>,
}

impl DataPath<'_> {
    /// Refuses a kind of pointer that is not supported, whether or not the command has data.
    #[inline]
    pub(crate) fn check_kind(&self, entry: &SubmissionEntry) -> Result<(), StatusCode> {
        match (entry.flags.psdt(), self.sgls) {
            (0, _) | (1 | 2, SglSupport::Byte | SglSupport::Dword) => Ok(()),
            _ => Err(StatusCode::INVALID_FIELD),
        }
    }

    /// Resolves `len` bytes of `entry`'s data pointer.
    #[inline]
    pub(crate) fn resolve(
        &mut self,
        entry: &SubmissionEntry,
        len: u64,
        direction: DmaDirection,
    ) -> Result<(), StatusCode> {
        let (sgls, page_shift) = (self.sgls, self.page_shift);
        let walk = |view: &mut DmaView, list: &mut SegmentList| {
            if entry.flags.psdt() != 0 {
                return sgl::walk(entry, sgls, len, direction, view, list);
            }
            let pointer = PrpPointer { prp1: entry.prp1.get(), prp2: entry.prp2.get(), page_shift };
            prp::walk(pointer, len, direction, view, list)
        };
        match self.diversion {
            None => walk(self.view, self.segments),
            Some(diversion) => diversion.resolve(len, direction, self.view, self.segments, walk),
        }
    }

    /// What was resolved last.
    pub(crate) fn payload(&self) -> Payload<'_> {
        Payload::new(self.view, self.segments)
    }
}
