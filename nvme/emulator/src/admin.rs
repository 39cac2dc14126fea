//! The admin command set (§5), and what the controller remembers between commands.
//!
//! Owns: dispatch of admin commands, the error log, abort. In submodules: queue creation and deletion, identify, features,
//! log pages, asynchronous events, format.
//!
//! Invariants: [`AdminState`] is behind one lock, taken last and never while anything is executed or posted. At most
//! `AERL + 1` event requests are held, and at most one event of a kind waits.
//!
//! Excludes: the I/O path, which comes here only to log an error.

mod effects;
mod events;
mod feature_data;
mod features;
mod format;
mod identify;
mod log_pages;
mod queues;

use std::collections::VecDeque;

use nvme_spec::log::ErrorEntry;
use nvme_spec::{AdminOpcode, CompletionEntry, Status, StatusCode, SubmissionEntry};

use crate::controller::{Core, Outcome};
use crate::dma::DmaDirection;
use crate::locks::lock;
use crate::queue::SubmissionQueue;
use crate::shadow::ShadowBuffers;
use events::{ChangedNamespaceIds, EventQueue, Health};
use features::Features;

/// Entries of the error log (ELPE + 1).
pub(crate) const ERROR_LOG_ENTRIES: usize = 64;
/// Dword 0 of an abort that did nothing.
const NOT_ABORTED: u32 = 1;
/// Parameter error location: none in particular.
const NO_LOCATION: u16 = 0xffff;

/// What outlives a command.
#[derive(Debug, Default)]
pub(crate) struct AdminState {
    pub(crate) features: Features,
    events: EventQueue,
    pub(crate) health: Health,
    changed_namespaces: ChangedNamespaceIds,
    /// Shadow doorbells, once the host has configured them.
    pub(crate) shadow: Option<ShadowBuffers>,
    /// Newest first.
    error_log: VecDeque<ErrorEntry>,
    error_count: u64,
    media_errors: u64,
    /// Completions for which the admin completion queue had no room.
    pub(crate) late: VecDeque<CompletionEntry>,
    pub(crate) power_cycles: u64,
    unsafe_shutdowns: u64,
    /// Shut down with notification, or never enabled, since power came.
    pub(crate) clean_shutdown: bool,
}

impl AdminState {
    /// A reset: what belongs to commands and queues is gone, logs stay.
    pub(crate) fn forget_commands(&mut self) {
        self.events = EventQueue::default();
        self.shadow = None;
        self.late.clear();
    }

    /// Power came back.
    pub(crate) fn power_returned(&mut self) {
        self.power_cycles += 1;
        self.unsafe_shutdowns += u64::from(!self.clean_shutdown);
        self.clean_shutdown = true;
    }

    pub(crate) fn log_error(&mut self, qid: u16, command: &SubmissionEntry, status: Status) {
        self.error_count += 1;
        if matches!(status.code(), StatusCode::UNRECOVERED_READ_ERROR | StatusCode::WRITE_FAULT) {
            self.media_errors += 1;
        }
        let mut entry = ErrorEntry::default();
        entry.error_count.set(self.error_count);
        entry.sq_id.set(qid);
        entry.cid = command.cid;
        entry.status_phase.set(u16::from(status) << 1);
        entry.parameter_location.set(NO_LOCATION);
        entry.nsid = command.nsid;
        if qid != 0 {
            entry.lba.set(command.read_write().slba);
        }
        self.error_log.truncate(ERROR_LOG_ENTRIES - 1);
        self.error_log.push_front(entry);
    }
}

impl Core {
    /// Executes one admin command.
    pub(crate) fn execute_admin(
        &self,
        queue: &mut SubmissionQueue,
        entry: &SubmissionEntry,
    ) -> Result<Outcome, StatusCode> {
        let opcode = AdminOpcode(entry.opcode);
        if !self.supports_admin(opcode) {
            return Err(StatusCode::INVALID_OPCODE);
        }
        // Admin commands use PRPs (§4.1.1), and none is fused.
        if entry.flags.fuse() != 0 || entry.flags.psdt() != 0 {
            return Err(StatusCode::INVALID_FIELD);
        }
        match opcode {
            AdminOpcode::DELETE_IO_SQ => self.delete_submission_queue(entry),
            AdminOpcode::CREATE_IO_SQ => self.create_submission_queue(queue.page_shift, entry),
            AdminOpcode::GET_LOG_PAGE => self.get_log_page(queue, entry),
            AdminOpcode::DELETE_IO_CQ => self.delete_completion_queue(entry),
            AdminOpcode::CREATE_IO_CQ => self.create_completion_queue(queue.page_shift, entry),
            AdminOpcode::IDENTIFY => self.identify(queue, entry),
            AdminOpcode::ABORT => Ok(self.abort(queue, entry)),
            AdminOpcode::SET_FEATURES => self.set_features(queue, entry),
            AdminOpcode::GET_FEATURES => self.get_features(queue, entry),
            AdminOpcode::DOORBELL_BUFFER_CONFIG => self.configure_doorbell_buffers(queue.page_shift, entry),
            AdminOpcode::FORMAT_NVM => self.format_nvm(entry),
            AdminOpcode::ASYNC_EVENT_REQUEST => self.hold_event_request(entry),
            AdminOpcode::KEEP_ALIVE => {
                self.keep_alive.restart(self.now_ns());
                Ok(Outcome::Done(0))
            }
            _ => Err(StatusCode::INVALID_OPCODE),
        }
    }

    /// Copies a data structure to the host.
    fn reply(
        &self,
        queue: &mut SubmissionQueue,
        entry: &SubmissionEntry,
        bytes: &[u8],
    ) -> Result<(), StatusCode> {
        let mut data = queue.data_path();
        data.resolve(entry, bytes.len() as u64, DmaDirection::ToHost)?;
        data.payload().cursor().put(bytes);
        Ok(())
    }

    /// Abort (§5.1): finds commands that have not been begun, and held event requests. What is being executed
    /// finishes first. `queue` is the admin submission queue.
    fn abort(&self, queue: &mut SubmissionQueue, entry: &SubmissionEntry) -> Outcome {
        let (target, cid) = entry.abort_target();
        let (qid, cid) = (target.get(), cid.get());
        let aborted = if qid == 0 {
            self.abort_event_request(cid) || queue.mark_abort(&self.submission[0], cid)
        } else if let Some(slot) = self.submission.get(usize::from(qid)) {
            let marked = lock(&slot.queue).as_mut().is_some_and(|queue| queue.mark_abort(slot, cid));
            self.notify(qid); // what waits inside the controller completes now
            marked
        } else {
            false
        };
        Outcome::Done(if aborted { 0 } else { NOT_ABORTED })
    }
}
