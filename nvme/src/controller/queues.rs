//! The I/O queues of a controller: made, created on it, deleted, and given back.
//!
//! Owns: [`QueueError`] and these methods of [`Shared`]. All of them work under the admin queue's lock.
//!
//! Invariants:
//! - a queue number is free, held by one owner, or stranded: the controller may still have a queue that nobody holds;
//! - the memory of a queue that the controller was not proven to have forgotten stays in `kept`;
//! - a queue that is being created when the controller fails is created once more after its reset.
//!
//! Excludes: what goes through a queue (`queue_pair`), and its creation after a reset (`keeper`).

use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use nvme_spec::command::QueueInterrupt;
use nvme_spec::{QueueId, SubmissionEntry};
use reactor::dma::DmaRegion;
use thiserror::Error;

use super::{Admin, Shared};
use crate::admin::{ADMIN_TIMEOUT, AdminError};
use crate::fault::{Curable, Fault, Life};
use crate::identity::{Namespace, NamespaceEntry, NamespaceProblem};
use crate::keeper::MAX_CREATION_FAILURES;
use crate::lane::Lane;
use crate::queue::{Queue, QueueShape};
use crate::transport::TransportError;

/// Why a queue could not be created.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum QueueError {
    /// All are in use.
    #[error("{device}: all {granted} I/O queues are in use")]
    NoQueueLeft {
        /// Device name.
        device: String,
        /// Queue pairs that the controller granted.
        granted: u16,
    },
    /// There is no such namespace.
    #[error("{device} has no active namespace {nsid} (active: {available})")]
    NoSuchNamespace {
        /// Device name.
        device: String,
        /// Namespace asked for.
        nsid: u32,
        /// Those there are.
        available: String,
    },
    /// The namespace cannot be used.
    #[error("namespace {nsid} of {device} cannot be used: {problem}")]
    Namespace {
        /// Device name.
        device: String,
        /// The namespace.
        nsid: u32,
        /// Why.
        problem: NamespaceProblem,
    },
    /// The namespace is being formatted.
    #[error("namespace {nsid} of {device} is being formatted: try again when that is done")]
    Formatting {
        /// Device name.
        device: String,
        /// The namespace.
        nsid: u32,
    },
    /// An option is out of range.
    #[error("{0}")]
    Option(&'static str),
    /// DMA memory or interrupts.
    #[error("{0}")]
    Transport(#[from] TransportError),
    /// The system refused a descriptor.
    #[error("cannot make an interrupt descriptor: {0}")]
    Descriptor(String),
    /// The controller refused a command, or failed.
    #[error("{0}")]
    Admin(#[from] AdminError),
}

impl Shared {
    /// Takes a queue number, and makes the controller know the queue. `namespace` is what the queue was planned for.
    pub(crate) fn attach_queue(
        &self,
        namespace: &Namespace,
        slots: u16,
        interrupt: impl FnOnce(QueueId) -> Result<QueueInterrupt, QueueError>,
        waker: Option<&Arc<OwnedFd>>,
    ) -> Result<(Queue, Arc<Lane>), QueueError> {
        let mut admin = self.lock_running();
        let number = admin.free_queues.pop_first().ok_or_else(|| QueueError::NoQueueLeft {
            device: self.name.clone(),
            granted: self.granted_queues,
        })?;
        let id = QueueId::new(number);
        let mut attempts = 0;
        let attached = match interrupt(id) {
            Err(error) => Err(error),
            Ok(interrupt) => loop {
                attempts += 1;
                let attached = self.try_attach(&mut admin, id, namespace, slots, interrupt, waker);
                let fault = match &attached {
                    Err(QueueError::Admin(AdminError::Failed(fault))) => fault.clone(),
                    _ => break attached,
                };
                if attempts >= MAX_CREATION_FAILURES || self.curable(&fault) == Curable::No {
                    break attached;
                }
                // Cut off by a reset, or the reason for one: once more after it.
                self.fail(fault);
                drop(admin);
                admin = self.lock_running();
            },
        };
        if attached.is_err() {
            admin.free_queues.insert(number);
        } else {
            admin.users.insert(number, namespace.nsid);
        }
        if let Err(QueueError::Admin(AdminError::Failed(fault))) = &attached {
            self.fail(fault.clone());
        }
        drop(admin);
        let mut sleepers = self.sleepers.lock().unwrap_or_else(PoisonError::into_inner);
        sleepers.retain(|sleeper| sleeper.strong_count() > 0);
        sleepers.extend(waker.map(Arc::downgrade));
        attached
    }

    /// One attempt at [`attach_queue`](Self::attach_queue).
    fn try_attach(
        &self,
        admin: &mut Admin,
        id: QueueId,
        namespace: &Namespace,
        slots: u16,
        interrupt: QueueInterrupt,
        waker: Option<&Arc<OwnedFd>>,
    ) -> Result<(Queue, Arc<Lane>), QueueError> {
        if admin.formatting.is_some_and(|formatting| formatting.touches(namespace.nsid)) {
            return Err(QueueError::Formatting { device: self.name.clone(), nsid: namespace.nsid.get() });
        }
        // Formatted between the caller's look and this lock: what the caller planned is void.
        let unchanged =
            |entry: &NamespaceEntry| entry.checked.as_ref().is_ok_and(|now| now.is_like(namespace));
        if !self.namespaces().iter().any(unchanged) {
            return Err(QueueError::Option("the namespace changed while the queue was being created"));
        }
        let (queue, lane) = self.make_queue(id, slots, interrupt, waker)?;
        match self.create_on_device(admin, &lane) {
            Ok(()) => Ok((queue, lane)),
            Err(error) => {
                if matches!(error, AdminError::Failed(_)) {
                    admin.kept.extend(queue.memory());
                }
                Err(error.into())
            }
        }
    }

    fn make_queue(
        &self,
        id: QueueId,
        slots: u16,
        interrupt: QueueInterrupt,
        waker: Option<&Arc<OwnedFd>>,
    ) -> Result<(Queue, Arc<Lane>), QueueError> {
        let cap = self.info.cap;
        let shape = QueueShape::for_depth(id, slots, u32::from(cap.mqes_z()) + 1, cap);
        let queue = Queue::new(Arc::clone(&self.link.transport), shape, self.shadow.as_ref())?;
        let mut create_cq = SubmissionEntry::create_io_cq(id, (shape.cq_entries - 1) as u16, interrupt);
        create_cq.prp1.set(queue.cq_iova());
        let mut create_sq = SubmissionEntry::create_io_sq(id, (shape.sq_entries - 1) as u16, id);
        create_sq.prp1.set(queue.sq_iova());
        Ok((queue, Arc::new(Lane::new(id, create_cq, create_sq, waker.cloned(), self.link.health.pulse()))))
    }

    /// Creates both queues of a lane. If the second is refused, the first is deleted again.
    pub(crate) fn create_on_device(&self, admin: &mut Admin, lane: &Lane) -> Result<(), AdminError> {
        let link = &self.link;
        admin.queue.execute(link, lane.create_cq)?;
        admin.queue.execute(link, lane.create_sq).map_err(|error| match error {
            AdminError::Failed(_) => error,
            // If it cannot be deleted, it may still be written to: that is a failure.
            AdminError::Status { .. } => match admin
                .queue
                .execute(link, SubmissionEntry::delete_io_cq(lane.id))
            {
                Ok(_) => error,
                Err(AdminError::Failed(fault)) => AdminError::Failed(fault),
                Err(AdminError::Status { .. }) => AdminError::Failed(Fault::CannotDelete { queue: lane.id }),
            },
        })?;
        admin.live.insert(lane.id.get());
        Ok(())
    }

    /// Deletes both queues of a lane, which ends every command on them.
    pub(crate) fn delete_on_device(
        &self,
        admin: &mut Admin,
        id: QueueId,
        timeout: Duration,
    ) -> Result<(), AdminError> {
        let link = &self.link;
        admin.queue.execute_within(link, SubmissionEntry::delete_io_sq(id), timeout)?;
        admin.queue.execute_within(link, SubmissionEntry::delete_io_cq(id), timeout)?;
        admin.live.remove(&id.get());
        Ok(())
    }

    /// Takes a queue away from the controller. On success no command of it is outstanding any more and its memory may
    /// be released; otherwise its memory is kept for as long as the controller.
    pub(crate) fn detach_queue(
        &self,
        lane: &Arc<Lane>,
        queue: &Queue,
        extra: &[Arc<dyn DmaRegion>],
    ) -> Result<(), AdminError> {
        let mut admin = self.lock_running();
        self.desk.withdraw(lane);
        admin.users.remove(&lane.id.get());
        let deleted = if admin.live.contains(&lane.id.get()) {
            self.delete_on_device(&mut admin, lane.id, ADMIN_TIMEOUT)
        } else {
            // The controller was reset and never told of it again, or it is quiet, or nobody can say.
            match self.link.health.life() {
                Life::Abandoned => {
                    Err(AdminError::Failed(self.link.health.cause().unwrap_or(Fault::ShutDown)))
                }
                _ => Ok(()),
            }
        };
        match &deleted {
            Ok(()) => {
                admin.free_queues.insert(lane.id.get());
            }
            Err(_) => {
                admin.stranded.insert(lane.id.get());
                admin.kept.extend(queue.memory());
                admin.kept.extend(extra.iter().map(Arc::clone));
            }
        }
        self.report(deleted)
    }
}
