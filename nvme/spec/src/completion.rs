//! The completion queue entry (§4.6).

use core::mem::{offset_of, size_of};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::ids::{CommandId, QueueId};
use crate::status::Status;

/// A completion queue entry, 16 bytes. The phase tag is bit 0 of the last word, so a consumer reads
/// [`PHASE_DWORD_OFFSET`] first, with acquire ordering, and the rest only once the phase has flipped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CompletionEntry {
    /// Command specific result.
    pub dw0: U32,
    /// Reserved in 1.4, command specific from 2.0 on.
    pub dw1: U32,
    /// Submission queue head pointer at the time of the completion.
    pub sq_head: U16,
    /// Submission queue of the command.
    pub sq_id: U16,
    /// Command identifier given at submission.
    pub cid: U16,
    /// Phase tag (bit 0) and status (bits 15:1).
    pub status_phase: U16,
}

/// Offset of the dword that holds the phase tag.
pub const PHASE_DWORD_OFFSET: usize = 12;
/// The phase tag in the dword at [`PHASE_DWORD_OFFSET`].
pub const PHASE_DWORD_BIT: u32 = 1 << 16;

const _: () = {
    assert!(size_of::<CompletionEntry>() == crate::CQE_BYTES);
    assert!(offset_of!(CompletionEntry, sq_head) == 8);
    assert!(offset_of!(CompletionEntry, cid) == PHASE_DWORD_OFFSET);
    assert!(offset_of!(CompletionEntry, status_phase) == 14);
};

impl CompletionEntry {
    /// The status, without the phase tag.
    pub fn status(&self) -> Status {
        Status::from(self.status_phase.get() >> 1)
    }

    /// The phase tag.
    pub fn phase(&self) -> bool {
        self.status_phase.get() & 1 != 0
    }

    /// Sets status and phase tag.
    pub fn set_status(&mut self, status: Status, phase: bool) {
        self.status_phase.set(u16::from(status) << 1 | u16::from(phase));
    }

    /// The command that this entry completes.
    pub fn command_id(&self) -> CommandId {
        CommandId::new(self.cid.get())
    }

    /// The submission queue that the command came from.
    pub fn queue_id(&self) -> QueueId {
        QueueId::new(self.sq_id.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::StatusCode;

    #[test]
    fn phase_and_status_share_a_word() {
        let mut entry = CompletionEntry::default();
        entry.set_status(Status::from_code(StatusCode::INVALID_OPCODE).with_dnr(true), true);
        assert_eq!(entry.status_phase.get(), 0x8003);
        assert!(entry.phase());
        assert_eq!(entry.status().code(), StatusCode::INVALID_OPCODE);
        let bytes = entry.as_bytes();
        let dword = u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
        assert_ne!(dword & PHASE_DWORD_BIT, 0);
    }
}
