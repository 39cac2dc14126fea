//! The admin queue: one command at a time, each with a deadline.
//!
//! Invariants: a command that is not answered in time fails the controller, since its buffer must not be reused while
//! the controller may still write to it.
//!
//! Excludes: asynchronous events, aborts and resets (the recovery work), which want several commands outstanding.

use std::sync::Arc;
use std::time::Duration;

use nvme_spec::command::GetLogPage;
use nvme_spec::identify::{Cns, IdentifyController, IdentifyNamespace, NamespaceList};
use nvme_spec::log::{LogPageId, SmartLog};
use nvme_spec::{AdminOpcode, CommandId, IDENTIFY_BYTES, NamespaceId, QueueId, Status, SubmissionEntry};
use reactor::dma::DmaRegion;
use thiserror::Error;
use vm_memory::Bytes;
use zerocopy::{FromBytes, IntoBytes};

use crate::fault::Fault;
use crate::handshake::{Backoff, HandshakeError, Link};
use crate::queue::{Queue, QueueShape, Reaped};
use crate::transport::TransportError;

/// Commands that fit the admin queue.
pub(crate) const ADMIN_SLOTS: u16 = 31;
/// Entries that both admin queues may have at most (AQA is 12 bits wide).
pub(crate) const ADMIN_MAX_ENTRIES: u32 = 4096;
/// Time that an admin command is given.
pub const ADMIN_TIMEOUT: Duration = Duration::from_secs(30);

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
}

impl AdminQueue {
    pub(crate) fn new(link: &Link, dstrd: u8) -> Result<Self, TransportError> {
        let shape = QueueShape::for_depth(QueueId::ADMIN, ADMIN_SLOTS, ADMIN_MAX_ENTRIES, dstrd);
        let queue = Queue::new(Arc::clone(&link.transport), shape)?;
        let data = link.transport.allocate(IDENTIFY_BYTES)?;
        Ok(Self { queue, data })
    }

    /// Where the controller finds the queues.
    pub(crate) fn addresses(&self) -> crate::handshake::AdminQueueAddresses {
        let shape = QueueShape::for_depth(QueueId::ADMIN, ADMIN_SLOTS, ADMIN_MAX_ENTRIES, 0);
        crate::handshake::AdminQueueAddresses {
            sq_entries: shape.sq_entries,
            cq_entries: shape.cq_entries,
            sq_iova: self.queue.sq_iova(),
            cq_iova: self.queue.cq_iova(),
        }
    }

    /// Sends a command, waits for its completion, and returns the completion's dword 0.
    pub(crate) fn execute(&mut self, link: &Link, entry: SubmissionEntry) -> Result<u32, AdminError> {
        if let Some(fault) = link.health.fault() {
            return Err(AdminError::Failed(fault.clone()));
        }
        let (_, cid) = self.queue.push(entry, 0);
        self.queue.ring();
        match self.await_completion(link, cid, entry.opcode) {
            Ok(reaped) if reaped.status.is_success() => Ok(reaped.dw0),
            Ok(reaped) => {
                Err(AdminError::Status { opcode: AdminOpcode(entry.opcode), status: reaped.status })
            }
            Err(fault) => {
                link.health.fail(fault.clone());
                Err(AdminError::Failed(fault))
            }
        }
    }

    fn await_completion(&mut self, link: &Link, cid: CommandId, opcode: u8) -> Result<Reaped, Fault> {
        let deadline = link.timing.now() + ADMIN_TIMEOUT;
        let mut backoff = Backoff::new();
        loop {
            let late = link.timing.now() >= deadline;
            let polled = self.queue.poll();
            self.queue.ring_completions();
            match polled {
                Ok(Some(reaped)) => return Ok(reaped),
                Ok(None) => {}
                Err(error) => return Err(Fault::Protocol { queue: QueueId::ADMIN, error }),
            }
            if late {
                return Err(timeout_fault(link, QueueId::ADMIN, cid, opcode, ADMIN_TIMEOUT));
            }
            backoff.wait(&*link.timing);
        }
    }

    fn execute_with_data(&mut self, link: &Link, mut entry: SubmissionEntry) -> Result<u32, AdminError> {
        // What a controller leaves out reads as zero, not as the last command's data.
        self.data
            .slice()
            .write_slice(&[0; IDENTIFY_BYTES], 0)
            .expect("the data page has the size of an Identify structure");
        entry.prp1.set(self.data.iova());
        self.execute(link, entry)
    }

    fn copy_data<T: FromBytes + IntoBytes>(&self) -> Box<T> {
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
        let page = GetLogPage {
            lid: LogPageId::SMART,
            dwords_z: (size_of::<SmartLog>() / 4 - 1) as u32,
            offset: 0,
            retain_event: true,
        };
        self.execute_with_data(link, SubmissionEntry::get_log_page(NamespaceId::BROADCAST, page))?;
        Ok(self.copy_data())
    }
}

/// The fault of a command that is overdue: a removed or failed controller is named as such.
pub(crate) fn timeout_fault(
    link: &Link,
    queue: QueueId,
    command: CommandId,
    opcode: u8,
    timeout: Duration,
) -> Fault {
    match link.status() {
        Err(HandshakeError::Removed { .. }) => Fault::Removed,
        Err(HandshakeError::Transport(error)) => Fault::Transport(error),
        Ok(csts) if csts.cfs() => Fault::FatalStatus { csts: csts.into() },
        Ok(csts) => Fault::CommandTimeout {
            queue,
            command,
            opcode,
            timeout_ms: timeout.as_millis() as u64,
            csts: csts.into(),
        },
        Err(_) => Fault::Removed,
    }
}

impl AdminQueue {
    /// Never releases the queue's memory: the controller may still write to it.
    pub(crate) fn leak(&self) {
        let [sq, cq] = self.queue.memory();
        std::mem::forget((sq, cq, Arc::clone(&self.data)));
    }
}
