//! The admin queue: one command at a time, each with a deadline, beside the asynchronous event requests, which have none, and at
//! most one long command, which others overtake.
//!
//! Invariants:
//! - a command that is not answered in time is a fault of the controller, since its buffer must not be reused while the
//!   controller may still write to it: whoever sent it reports [`AdminError::Failed`] to the controller's health;
//! - while one waits, removal and CSTS.CFS are looked for, so that a dead controller is noticed before the deadline;
//! - at most [`MAX_EVENT_REQUESTS`] event requests are outstanding, and what they reported is kept until it is taken.
//!
//! Excludes: what events mean, and recovery (`keeper`, `recovery`).

use std::sync::Arc;
use std::time::Duration;

use nvme_spec::command::GetLogPage;
use nvme_spec::feature::FeatureId;
use nvme_spec::identify::{Cns, IdentifyController, IdentifyNamespace, NamespaceList};
use nvme_spec::log::{AsyncEvent, LogPageId, SmartLog};
use nvme_spec::registers::Cap;
use nvme_spec::{AdminOpcode, CommandId, IDENTIFY_BYTES, NamespaceId, QueueId, Status, SubmissionEntry};
use reactor::dma::DmaRegion;
use thiserror::Error;
use vm_memory::Bytes;
use zerocopy::{FromBytes, IntoBytes};

use crate::fault::Fault;
use crate::handshake::{Backoff, Link};
use crate::queue::{Queue, QueueShape, Reaped};
use crate::transport::TransportError;

/// Commands that fit the admin queue.
pub(crate) const ADMIN_SLOTS: u16 = 31;
/// Entries that both admin queues may have at most (AQA is 12 bits wide).
pub(crate) const ADMIN_MAX_ENTRIES: u32 = 4096;
/// Time that an admin command is given.
pub const ADMIN_TIMEOUT: Duration = Duration::from_secs(30);
/// Asynchronous event requests that the driver keeps outstanding, if the controller holds as many (AERL).
pub(crate) const MAX_EVENT_REQUESTS: u8 = 4;
/// Time between two looks at CSTS while a command is awaited.
pub(crate) const STATUS_INTERVAL: Duration = Duration::from_millis(100);

/// Owner of the one command that somebody waits for.
const AWAITED: u16 = 0;
/// Owner of event requests.
const EVENT: u16 = 1;
/// Owner of the command of [`AdminQueue::begin`].
const LONG: u16 = 2;

/// Why an admin command failed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum AdminError {
    /// The controller refused it.
    #[error("{opcode}: {status}")]
    Status {
        /// The command.
        opcode: AdminOpcode,
        /// The controller's answer.
        status: Status,
    },
    /// The controller has failed, now or before.
    #[error("the controller failed: {0}")]
    Failed(Fault),
}

/// The admin queue pair and a page of data.
pub(crate) struct AdminQueue {
    queue: Queue,
    data: Arc<dyn DmaRegion>,
    /// Event requests that the controller holds.
    armed: u8,
    /// Event requests that it refused: not sent again.
    refused: u8,
    /// Completion of the long command, until it is taken.
    long: Option<Reaped>,
    /// Dword 0 of events reported and not taken yet.
    reported: Vec<AsyncEvent>,
}

impl AdminQueue {
    pub(crate) fn new(link: &Link, cap: Cap) -> Result<Self, TransportError> {
        let shape = QueueShape::for_depth(QueueId::ADMIN, ADMIN_SLOTS, ADMIN_MAX_ENTRIES, cap);
        let queue = Queue::new(Arc::clone(&link.transport), shape, None)?;
        let data = link.transport.allocate(IDENTIFY_BYTES)?;
        let reported = Vec::with_capacity(usize::from(MAX_EVENT_REQUESTS));
        Ok(Self { queue, data, armed: 0, refused: 0, long: None, reported })
    }

    /// Forgets everything outstanding: the controller was disabled.
    pub(crate) fn restart(&mut self) {
        self.queue.restart();
        (self.armed, self.refused, self.long) = (0, 0, None);
        self.reported.clear();
    }

    /// Where the controller finds the queues.
    pub(crate) fn addresses(&self) -> crate::handshake::AdminQueueAddresses {
        let shape = QueueShape::for_depth(QueueId::ADMIN, ADMIN_SLOTS, ADMIN_MAX_ENTRIES, Cap::new());
        crate::handshake::AdminQueueAddresses {
            sq_entries: shape.sq_entries,
            cq_entries: shape.cq_entries,
            sq_iova: self.queue.sq_iova(),
            cq_iova: self.queue.cq_iova(),
        }
    }

    /// Sends a command, waits for its completion, and returns the completion's dword 0.
    pub(crate) fn execute(&mut self, link: &Link, entry: SubmissionEntry) -> Result<u32, AdminError> {
        self.execute_within(link, entry, ADMIN_TIMEOUT)
    }

    /// [`Self::execute`] with a deadline of its own.
    pub(crate) fn execute_within(
        &mut self,
        link: &Link,
        entry: SubmissionEntry,
        timeout: Duration,
    ) -> Result<u32, AdminError> {
        if let Some(fault) = link.health.obstacle() {
            return Err(AdminError::Failed(fault));
        }
        let (_, cid) = self.queue.push(entry, AWAITED);
        self.queue.ring();
        let reaped = self.await_completion(link, cid, entry.opcode, timeout).map_err(AdminError::Failed)?;
        outcome(entry.opcode, reaped)
    }

    /// Sends a command that may take long, without waiting for it. There is one at a time: the caller sees to that.
    pub(crate) fn begin(&mut self, link: &Link, entry: SubmissionEntry) -> Result<CommandId, AdminError> {
        if let Some(fault) = link.health.obstacle() {
            return Err(AdminError::Failed(fault));
        }
        self.long = None;
        let (_, cid) = self.queue.push(entry, LONG);
        self.queue.ring();
        Ok(cid)
    }

    /// What became of the command of [`Self::begin`], of this opcode, if it is back.
    pub(crate) fn finished(&mut self, opcode: u8) -> Option<Result<u32, AdminError>> {
        if let Err(fault) = self.take_completions() {
            return Some(Err(AdminError::Failed(fault)));
        }
        self.long.take().map(|reaped| outcome(opcode, reaped))
    }

    fn await_completion(
        &mut self,
        link: &Link,
        cid: CommandId,
        opcode: u8,
        timeout: Duration,
    ) -> Result<Reaped, Fault> {
        let start = link.timing.now();
        let mut next_look = start + STATUS_INTERVAL;
        let mut backoff = Backoff::new();
        loop {
            let now = link.timing.now();
            let answer = self.take_completions()?;
            if let Some(reaped) = answer {
                return Ok(reaped);
            }
            if now >= start + timeout {
                return Err(timeout_fault(link, QueueId::ADMIN, cid, opcode, timeout));
            }
            if now >= next_look {
                next_look = now + STATUS_INTERVAL;
                link.check_status()?;
            }
            backoff.wait(&*link.timing);
        }
    }

    /// Takes whatever completions there are; returns that of the awaited command, if it is among them.
    pub(crate) fn take_completions(&mut self) -> Result<Option<Reaped>, Fault> {
        let mut answer = None;
        let outcome = loop {
            match self.queue.poll() {
                Ok(Some(reaped)) if reaped.command.owner == EVENT => self.event_completed(reaped),
                Ok(Some(reaped)) if reaped.command.owner == LONG => self.long = Some(reaped),
                Ok(Some(reaped)) => answer = Some(reaped),
                Ok(None) => break Ok(answer),
                Err(error) => break Err(Fault::Protocol { queue: QueueId::ADMIN, error }),
            }
        };
        self.queue.ring_all_completions();
        outcome
    }

    fn event_completed(&mut self, reaped: Reaped) {
        self.armed = self.armed.saturating_sub(1);
        if reaped.status.is_success() {
            self.reported.push(AsyncEvent::from(reaped.dw0));
        } else {
            // The controller holds fewer than it said, or none: what it refuses is not offered again.
            self.refused = self.refused.saturating_add(1);
        }
    }

    /// Sends event requests until the controller holds as many as it can (NVMe 1.4 §5.2), or we want. Never waits.
    pub(crate) fn arm_events(&mut self, aerl_z: u8) {
        let wanted = aerl_z.saturating_add(1).min(MAX_EVENT_REQUESTS);
        while u32::from(self.armed) + u32::from(self.refused) < u32::from(wanted)
            && self.queue.slots().has_free()
        {
            self.queue.push(SubmissionEntry::async_event_request(), EVENT);
            self.armed += 1;
        }
        self.queue.ring();
    }

    /// What was reported since the last call.
    pub(crate) fn take_events(&mut self) -> Vec<AsyncEvent> {
        std::mem::take(&mut self.reported)
    }

    /// Sends a command whose data, of up to 4 KiB, goes to the controller.
    pub(crate) fn execute_with_bytes(
        &mut self,
        link: &Link,
        mut entry: SubmissionEntry,
        bytes: &[u8],
    ) -> Result<u32, AdminError> {
        let mut page = [0; IDENTIFY_BYTES];
        page[..bytes.len()].copy_from_slice(bytes);
        self.data.slice().write_slice(&page, 0).expect("the data page has the size of an Identify structure");
        entry.prp1.set(self.data.iova());
        self.execute(link, entry)
    }

    pub(crate) fn execute_with_data(
        &mut self,
        link: &Link,
        mut entry: SubmissionEntry,
    ) -> Result<u32, AdminError> {
        // What a controller leaves out reads as zero, not as the last command's data.
        self.data
            .slice()
            .write_slice(&[0; IDENTIFY_BYTES], 0)
            .expect("the data page has the size of an Identify structure");
        entry.prp1.set(self.data.iova());
        self.execute(link, entry)
    }

    pub(crate) fn copy_data<T: FromBytes + IntoBytes>(&self) -> Box<T> {
        const { assert!(size_of::<T>() <= IDENTIFY_BYTES) };
        let mut value = Box::new(T::new_zeroed());
        self.data
            .slice()
            .read_slice(value.as_mut().as_mut_bytes(), 0)
            .expect("the data page has the size of an Identify structure");
        value
    }

    pub(crate) fn identify_controller(&mut self, link: &Link) -> Result<Box<IdentifyController>, AdminError> {
        self.execute_with_data(link, SubmissionEntry::identify(Cns::CONTROLLER, NamespaceId::NONE))?;
        Ok(self.copy_data())
    }

    pub(crate) fn identify_namespace(
        &mut self,
        link: &Link,
        nsid: NamespaceId,
    ) -> Result<Box<IdentifyNamespace>, AdminError> {
        self.execute_with_data(link, SubmissionEntry::identify(Cns::NAMESPACE, nsid))?;
        Ok(self.copy_data())
    }

    /// Identifiers of active namespaces above `after`: one page of the list, as the controller gives it.
    pub(crate) fn active_namespaces(
        &mut self,
        link: &Link,
        after: NamespaceId,
    ) -> Result<Box<NamespaceList>, AdminError> {
        self.execute_with_data(link, SubmissionEntry::identify(Cns::ACTIVE_NAMESPACES, after))?;
        Ok(self.copy_data())
    }

    pub(crate) fn smart_log(&mut self, link: &Link) -> Result<Box<SmartLog>, AdminError> {
        self.log_page(link, LogPageId::SMART, RetainEvent::Yes)
    }

    /// The beginning of a log page, of up to 4 KiB.
    pub(crate) fn log_page<T: FromBytes + IntoBytes>(
        &mut self,
        link: &Link,
        lid: LogPageId,
        retain: RetainEvent,
    ) -> Result<Box<T>, AdminError> {
        let page = GetLogPage {
            lid,
            dwords_z: (size_of::<T>() / 4 - 1) as u32,
            offset: 0,
            retain_event: retain == RetainEvent::Yes,
        };
        self.execute_with_data(link, SubmissionEntry::get_log_page(NamespaceId::BROADCAST, page))?;
        Ok(self.copy_data())
    }

    /// Tells the controller that the host understands delays in the status of commands (CRD, §5.21.1.22).
    pub(crate) fn enable_retry_delays(&mut self, link: &Link) -> Result<u32, AdminError> {
        let mut behaviour = [0; HOST_BEHAVIOUR_BYTES];
        behaviour[0] = 1; // ACRE
        let entry = SubmissionEntry::set_features(FeatureId::HOST_BEHAVIOR_SUPPORT, 0);
        self.execute_with_bytes(link, entry, &behaviour)
    }
}

/// Dword 0 of a completion, or the status that is not success.
fn outcome(opcode: u8, reaped: Reaped) -> Result<u32, AdminError> {
    match reaped.status.is_success() {
        true => Ok(reaped.dw0),
        false => Err(AdminError::Status { opcode: AdminOpcode(opcode), status: reaped.status }),
    }
}

/// Bytes of the Host Behavior Support data structure (§5.21.1.22).
const HOST_BEHAVIOUR_BYTES: usize = 512;

/// Whether reading a log page leaves the event that it describes pending (RAE, §5.14).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RetainEvent {
    Yes,
    /// The event is acknowledged and may be raised again.
    No,
}

/// The fault of a command that is overdue: a removed or failed controller is named as such.
pub(crate) fn timeout_fault(
    link: &Link,
    queue: QueueId,
    command: CommandId,
    opcode: u8,
    timeout: Duration,
) -> Fault {
    if let Err(fault) = link.check_status() {
        return fault;
    }
    // All ones only if it went in between, which the next look will tell.
    let csts = link.status().map_or(u32::MAX, u32::from);
    Fault::CommandTimeout { queue, command, opcode, timeout_ms: timeout.as_millis() as u64, csts }
}

impl AdminQueue {
    /// Never releases the queue's memory: the controller may still write to it.
    pub(crate) fn leak(&self) {
        let [sq, cq] = self.queue.memory();
        std::mem::forget((sq, cq, Arc::clone(&self.data)));
    }
}
