//! The admin command set (§5), and what the controller remembers between commands.
//!
//! Owns: dispatch of admin commands, asynchronous events, abort. In submodules: queue creation and deletion, identify,
//! features, log pages.
//!
//! Invariants: [`AdminState`] is behind one lock, taken last and never while anything is executed or posted. At most
//! `AERL + 1` event requests are held, and at most one event of a kind waits.
//!
//! Excludes: the I/O path, which comes here only to log an error.

mod features;
mod identify;
mod log_pages;
mod queues;

use std::collections::VecDeque;

use nvme_spec::log::{AsyncEvent, ErrorEntry, LogPageId};
use nvme_spec::{AdminOpcode, CompletionEntry, Status, StatusCode, SubmissionEntry};

use crate::controller::{Core, Outcome};
use crate::dma::DmaDirection;
use crate::locks::lock;
use crate::queue::SubmissionQueue;
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
    /// Command identifiers of the held event requests, oldest first.
    event_requests: VecDeque<u16>,
    /// Events not reported yet.
    events: VecDeque<AsyncEvent>,
    /// Event types reported and not yet re-armed by reading their log page; one bit each.
    masked_types: u8,
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
        self.event_requests.clear();
        self.events.clear();
        self.masked_types = 0;
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

    /// Queues an event unless its type is masked or the same one waits already.
    fn add_event(&mut self, event: AsyncEvent) {
        let masked = self.masked_types & 1 << event.event_type() != 0;
        if !masked && !self.events.contains(&event) {
            self.events.push_back(event);
        }
    }

    /// Pairs the next event with the oldest request.
    fn next_report(&mut self) -> Option<(u16, AsyncEvent)> {
        if self.event_requests.is_empty() {
            return None;
        }
        let event = self.events.pop_front()?;
        self.masked_types |= 1 << event.event_type();
        self.events.retain(|e| e.event_type() != event.event_type());
        self.event_requests.pop_front().map(|cid| (cid, event))
    }

    /// The log page of these events was read.
    fn rearm(&mut self, event_type: u8) {
        self.masked_types &= !(1 << event_type);
        self.events.retain(|e| e.event_type() != event_type);
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
        let known = matches!(
            opcode,
            AdminOpcode::DELETE_IO_SQ
                | AdminOpcode::CREATE_IO_SQ
                | AdminOpcode::GET_LOG_PAGE
                | AdminOpcode::DELETE_IO_CQ
                | AdminOpcode::CREATE_IO_CQ
                | AdminOpcode::IDENTIFY
                | AdminOpcode::ABORT
                | AdminOpcode::SET_FEATURES
                | AdminOpcode::GET_FEATURES
                | AdminOpcode::ASYNC_EVENT_REQUEST
        );
        if !known {
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
            AdminOpcode::SET_FEATURES => self.set_features(entry),
            AdminOpcode::GET_FEATURES => self.get_features(entry),
            AdminOpcode::ASYNC_EVENT_REQUEST => self.hold_event_request(entry),
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

    /// Asynchronous Event Request (§5.2): held until something happens.
    fn hold_event_request(&self, entry: &SubmissionEntry) -> Result<Outcome, StatusCode> {
        let mut admin = lock(&self.admin);
        if admin.event_requests.len() > usize::from(self.config.aerl_z) {
            return Err(StatusCode::AER_LIMIT_EXCEEDED);
        }
        admin.event_requests.push_back(entry.cid.get());
        drop(admin);
        self.deliver_events();
        Ok(Outcome::Held)
    }

    /// Something happened that the host may want to know.
    pub(crate) fn report_event(&self, event: AsyncEvent) {
        lock(&self.admin).add_event(event);
        self.deliver_events();
    }

    fn deliver_events(&self) {
        loop {
            let Some((cid, event)) = lock(&self.admin).next_report() else { break };
            self.post_admin(cid, event.into(), Status::SUCCESS);
        }
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

    fn abort_event_request(&self, cid: u16) -> bool {
        let mut admin = lock(&self.admin);
        let Some(index) = admin.event_requests.iter().position(|held| *held == cid) else { return false };
        admin.event_requests.remove(index);
        drop(admin);
        self.post_admin(cid, 0, Status::from_code(StatusCode::ABORT_REQUESTED));
        true
    }
}

/// Event type that reading a log page re-arms.
fn event_type_of(page: LogPageId) -> Option<u8> {
    match page {
        LogPageId::ERROR => Some(0),
        LogPageId::SMART => Some(1),
        LogPageId::CHANGED_NAMESPACES => Some(2),
        _ => None,
    }
}
