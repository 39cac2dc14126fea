//! A controller: brought up, identified, and handing out I/O queues.
//!
//! Owns: the admin queue (under a mutex), the controller's identity, the numbers of its I/O queues, and its end.
//! `Controller` is `Send + Sync`; each [`QueuePair`] belongs to one thread.
//!
//! Invariants:
//! - memory that the controller was given is released only after the controller was told to forget it (queue deleted) or
//!   was proven quiet; else it stays in `kept` until the controller itself goes;
//! - after the first fault nothing is submitted any more, and every queue is woken to see it;
//! - dropping the last handle shuts the controller down in an orderly way, within bounded time.
//!
//! Excludes: the I/O path, and recovery: a failed controller stays failed.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use nvme_spec::command::QueueInterrupt;
use nvme_spec::feature::{FeatureId, NumberOfQueues};
use nvme_spec::log::SmartLog;
use nvme_spec::registers::{self, Cap, Doorbell, doorbell_offset};
use nvme_spec::{NamespaceId, QueueId, SubmissionEntry};
use reactor::clock::Instant;
use reactor::dma::DmaRegion;
use thiserror::Error;
use zerocopy::IntoBytes;

use crate::admin::{AdminError, AdminQueue};
use crate::fault::{Fault, Health, Life, LifeEvent};
use crate::handshake::{HandshakeError, Link, shutdown_timeout};
use crate::identity::{
    ControllerInfo, IdentityError, Namespace, NamespaceEntry, NamespaceProblem, check_namespace_list,
};
use crate::queue::{Queue, QueueShape};
use crate::queue_pair::{QueueOptions, QueuePair};
use crate::transport::{Timing, Transport, TransportError};
use crate::wake;

/// Active namespaces that the driver keeps.
pub const MAX_NAMESPACES: usize = 1024;
/// I/O queue pairs that are asked for if the options do not say.
pub const DEFAULT_QUEUES: u16 = 64;

/// Why a controller could not be brought up.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum BringUpError {
    /// Registers.
    #[error("{device}: {source}")]
    Handshake {
        /// Device name.
        device: String,
        /// What went wrong.
        source: HandshakeError,
    },
    /// DMA memory.
    #[error("{device}: {source}")]
    Transport {
        /// Device name.
        device: String,
        /// What went wrong.
        source: TransportError,
    },
    /// Admin commands.
    #[error("{device}: {source}")]
    Admin {
        /// Device name.
        device: String,
        /// What went wrong.
        source: AdminError,
    },
    /// Identify data.
    #[error("{device}: {source}")]
    Identity {
        /// Device name.
        device: String,
        /// What went wrong.
        source: IdentityError,
    },
}

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
    #[error("{device} has no namespace {nsid} (it has {available})")]
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

/// How to bring a controller up.
#[derive(Clone, Debug, Default)]
pub struct ControllerOptions {
    /// I/O queue pairs to ask for; [`DEFAULT_QUEUES`] if `None`.
    pub queues: Option<u16>,
    /// Namespace that [`Controller::default_namespace`] gives; the lowest that can be used if `None`.
    pub namespace: Option<NamespaceId>,
}

/// An NVMe controller in use.
pub struct Controller {
    link: Link,
    name: String,
    info: ControllerInfo,
    namespaces: Vec<NamespaceEntry>,
    default_namespace: Option<NamespaceId>,
    granted_queues: u16,
    admin: Mutex<Admin>,
    stop: Mutex<Option<Instant>>,
}

struct Admin {
    queue: AdminQueue,
    free_queues: BTreeSet<u16>,
    /// Wake descriptors of the queues in use.
    wakers: Vec<Weak<OwnedFd>>,
    /// Memory that a queue left behind without the controller's consent.
    kept: Vec<Arc<dyn DmaRegion>>,
}

impl Controller {
    /// Resets the controller, brings it up and identifies it. Blocks for as long as the controller takes.
    ///
    /// # Errors
    /// Whatever went wrong, with the register or command that it went wrong at.
    pub fn bring_up(
        transport: Arc<dyn Transport>,
        timing: Arc<dyn Timing>,
        options: &ControllerOptions,
    ) -> Result<Arc<Self>, BringUpError> {
        let name = transport.name().to_owned();
        let link = Link { transport, timing, health: Health::new() };
        let result = BringUp { link: &link, options }.run();
        match result {
            Ok(found) => Ok(Arc::new(Self {
                granted_queues: found.granted,
                admin: Mutex::new(Admin {
                    queue: found.admin,
                    free_queues: (1..=found.granted).collect(),
                    wakers: Vec::new(),
                    kept: Vec::new(),
                }),
                default_namespace: options.namespace,
                info: found.info,
                namespaces: found.namespaces,
                stop: Mutex::new(None),
                name,
                link,
            })),
            Err(problem) => Err(problem.named(name)),
        }
    }

    /// Name of the device, such as `emu:/var/lib/p.img`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the controller is.
    pub fn info(&self) -> &ControllerInfo {
        &self.info
    }

    /// Its active namespaces, ascending, with those that cannot be used.
    pub fn namespaces(&self) -> &[NamespaceEntry] {
        &self.namespaces
    }

    /// I/O queue pairs that can exist at once.
    pub fn max_queues(&self) -> u16 {
        self.granted_queues
    }

    /// The namespace that the options named, or else the lowest that can be used.
    ///
    /// # Errors
    /// It does not exist or cannot be used.
    pub fn default_namespace(&self) -> Result<&Namespace, QueueError> {
        match self.default_namespace {
            Some(nsid) => self.namespace(nsid),
            None => {
                if let Some(usable) = self.namespaces.iter().find_map(|entry| entry.checked.as_ref().ok()) {
                    return Ok(usable);
                }
                self.namespace(self.namespaces.first().map_or(NamespaceId::new(1), |entry| entry.nsid))
            }
        }
    }

    /// A namespace by its identifier.
    ///
    /// # Errors
    /// It does not exist or cannot be used.
    pub fn namespace(&self, nsid: NamespaceId) -> Result<&Namespace, QueueError> {
        let entry = self.namespaces.iter().find(|entry| entry.nsid == nsid).ok_or_else(|| {
            let ids: Vec<String> = self.namespaces.iter().map(|entry| entry.nsid.to_string()).collect();
            QueueError::NoSuchNamespace {
                device: self.name.clone(),
                nsid: nsid.get(),
                available: if ids.is_empty() { "none".to_owned() } else { ids.join(", ") },
            }
        })?;
        entry.checked.as_ref().map_err(|problem| QueueError::Namespace {
            device: self.name.clone(),
            nsid: nsid.get(),
            problem: problem.clone(),
        })
    }

    /// The SMART / Health log page.
    ///
    /// # Errors
    /// The controller refused the command, or failed.
    pub fn smart_log(&self) -> Result<Box<SmartLog>, AdminError> {
        self.lock_admin().queue.smart_log(&self.link)
    }

    /// The first fatal error, if there was one.
    pub fn fault(&self) -> Option<&Fault> {
        self.link.health.fault()
    }

    /// Whether the controller is in use, stopping, or stopped.
    pub fn life(&self) -> Life {
        self.link.health.life()
    }

    /// Creates an I/O queue pair for one namespace, for the calling thread. Blocks for a few admin commands.
    ///
    /// # Errors
    /// No queue is left, the namespace cannot be used, or the controller refused or failed.
    pub fn create_queue(self: &Arc<Self>, options: &QueueOptions) -> Result<QueuePair, QueueError> {
        let namespace = match options.namespace {
            Some(nsid) => self.namespace(nsid)?,
            None => self.default_namespace()?,
        };
        QueuePair::create(self, namespace, options)
    }

    /// Shuts the controller down: queues still in use fail with [`Fault::ShutDown`], the controller writes back what it
    /// caches, and is disabled. Does nothing if the controller has failed or was shut down before.
    ///
    /// # Errors
    /// The controller did not finish in time; it is disabled all the same.
    pub fn shutdown(&self) -> Result<(), HandshakeError> {
        let admin = self.lock_admin();
        if !self.link.health.fail(Fault::ShutDown) {
            return Ok(());
        }
        let notified = self.link.notify_shutdown(shutdown_timeout(self.info.raw.rtd3e.get()));
        let disabled = self.link.disable(self.info.cap);
        match &disabled {
            Ok(()) | Err(HandshakeError::Removed { .. }) => self.link.health.apply(LifeEvent::Quiet),
            Err(_) => self.settle_without_proof(),
        }
        wake_all(&admin);
        notified.and(disabled)
    }

    pub(crate) fn link(&self) -> &Link {
        &self.link
    }

    fn lock_admin(&self) -> MutexGuard<'_, Admin> {
        // A panic while it was held left at worst an admin command unanswered, which the slots account for.
        self.admin.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the first fault, tells the controller to stop, and wakes every queue.
    pub(crate) fn fail(&self, fault: Fault) {
        let text = fault.to_string();
        if self.link.health.fail(fault) {
            tracing::error!(device = %self.name, fault = %text, "controller failed");
        }
        self.drive_stop();
        wake_all(&self.lock_admin());
    }

    /// Moves a stopping controller on, without blocking for long. Called by every queue that waits for it.
    pub(crate) fn drive_stop(&self) {
        if self.link.health.life() != Life::Stopping {
            return;
        }
        let mut stop = self.stop.lock().unwrap_or_else(PoisonError::into_inner);
        let deadline = match *stop {
            Some(deadline) => deadline,
            None => {
                // If the write is lost, the controller stays ready and the deadline decides.
                let _ = self.link.request_stop();
                *stop.insert(self.link.stop_deadline(self.info.cap))
            }
        };
        let late = self.link.timing.now() >= deadline;
        if self.link.stopped() {
            self.link.health.apply(LifeEvent::Quiet);
        } else if late {
            self.settle_without_proof();
        }
    }

    fn settle_without_proof(&self) {
        match self.link.transport.revoke_dma() {
            Ok(()) => self.link.health.apply(LifeEvent::Quiet),
            Err(error) => {
                tracing::error!(device = %self.name, %error, "the controller does not stop: its memory is not reused");
                self.link.health.apply(LifeEvent::Stuck);
            }
        }
    }

    /// Takes a queue number, and makes the controller know the queue.
    pub(crate) fn attach_queue(
        &self,
        slots: u16,
        interrupt: impl FnOnce(QueueId) -> Result<QueueInterrupt, QueueError>,
        waker: Option<&Arc<OwnedFd>>,
    ) -> Result<Queue, QueueError> {
        let mut admin = self.lock_admin();
        let number = admin.free_queues.pop_first().ok_or_else(|| QueueError::NoQueueLeft {
            device: self.name.clone(),
            granted: self.granted_queues,
        })?;
        let id = QueueId::new(number);
        match interrupt(id).and_then(|interrupt| self.create_on_device(&mut admin, id, slots, interrupt)) {
            Ok(queue) => {
                admin.wakers.retain(|waker| waker.strong_count() > 0);
                admin.wakers.extend(waker.map(Arc::downgrade));
                Ok(queue)
            }
            Err(error) => {
                admin.free_queues.insert(number);
                Err(error)
            }
        }
    }

    fn create_on_device(
        &self,
        admin: &mut Admin,
        id: QueueId,
        slots: u16,
        interrupt: QueueInterrupt,
    ) -> Result<Queue, QueueError> {
        let cap = self.info.cap;
        let shape = QueueShape::for_depth(id, slots, u32::from(cap.mqes_z()) + 1, cap.dstrd());
        let queue = Queue::new(Arc::clone(&self.link.transport), shape)?;
        let mut create_cq = SubmissionEntry::create_io_cq(id, (shape.cq_entries - 1) as u16, interrupt);
        create_cq.prp1.set(queue.cq_iova());
        let mut create_sq = SubmissionEntry::create_io_sq(id, (shape.sq_entries - 1) as u16, id);
        create_sq.prp1.set(queue.sq_iova());
        let created = admin.queue.execute(&self.link, create_cq).and_then(|_| {
            admin.queue.execute(&self.link, create_sq).inspect_err(|error| {
                if matches!(error, AdminError::Status { .. }) {
                    let undone = admin.queue.execute(&self.link, SubmissionEntry::delete_io_cq(id));
                    if undone.is_err() {
                        admin.kept.extend(queue.memory());
                    }
                }
            })
        });
        match created {
            Ok(_) => Ok(queue),
            Err(error) => {
                if matches!(error, AdminError::Failed(_)) {
                    admin.kept.extend(queue.memory());
                }
                Err(error.into())
            }
        }
    }

    /// Takes a queue away from the controller. On success no command of it is outstanding any more and its memory may
    /// be released; otherwise its memory is kept for as long as the controller.
    pub(crate) fn detach_queue(&self, queue: &Queue, extra: &[Arc<dyn DmaRegion>]) -> Result<(), AdminError> {
        let mut admin = self.lock_admin();
        let id = queue.id();
        let deleted = admin
            .queue
            .execute(&self.link, SubmissionEntry::delete_io_sq(id))
            .and_then(|_| admin.queue.execute(&self.link, SubmissionEntry::delete_io_cq(id)));
        match deleted {
            Ok(_) => {
                admin.free_queues.insert(id.get());
                Ok(())
            }
            Err(error) => {
                admin.kept.extend(queue.memory());
                admin.kept.extend(extra.iter().map(Arc::clone));
                Err(error)
            }
        }
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        if let Err(error) = self.shutdown() {
            tracing::warn!(device = %self.name, %error, "shutdown incomplete");
        }
        let deadline = self.link.stop_deadline(self.info.cap);
        // A controller that failed may still be stopping: its memory goes with us, so wait for the proof.
        while self.link.health.life() == Life::Stopping && self.link.timing.now() < deadline {
            self.drive_stop();
            self.link.timing.pause(std::time::Duration::from_micros(100));
        }
        if matches!(self.link.health.life(), Life::Stopping | Life::Abandoned) {
            let admin = self.admin.get_mut().unwrap_or_else(PoisonError::into_inner);
            // Leaked on purpose: the device may write to it until the process ends.
            std::mem::forget(std::mem::take(&mut admin.kept));
            admin.queue.leak();
        }
    }
}

fn wake_all(admin: &Admin) {
    for waker in admin.wakers.iter().filter_map(Weak::upgrade) {
        wake::signal(&waker);
    }
}

enum Problem {
    Handshake(HandshakeError),
    Transport(TransportError),
    Admin(AdminError),
    Identity(IdentityError),
}

impl Problem {
    fn named(self, device: String) -> BringUpError {
        match self {
            Problem::Handshake(source) => BringUpError::Handshake { device, source },
            Problem::Transport(source) => BringUpError::Transport { device, source },
            Problem::Admin(source) => BringUpError::Admin { device, source },
            Problem::Identity(source) => BringUpError::Identity { device, source },
        }
    }
}

macro_rules! problem_from {
    ($($Variant:ident($Error:ty)),*) => {
        $(impl From<$Error> for Problem {
            fn from(error: $Error) -> Self {
                Problem::$Variant(error)
            }
        })*
    };
}
problem_from!(
    Handshake(HandshakeError),
    Transport(TransportError),
    Admin(AdminError),
    Identity(IdentityError)
);

struct BringUp<'a> {
    link: &'a Link,
    options: &'a ControllerOptions,
}

struct Found {
    admin: AdminQueue,
    info: ControllerInfo,
    namespaces: Vec<NamespaceEntry>,
    granted: u16,
}

impl BringUp<'_> {
    fn run(&self) -> Result<Found, Problem> {
        let (cap, version) = self.link.capabilities()?;
        self.link.disable(cap)?;
        let mut admin = AdminQueue::new(self.link, cap.dstrd())?;
        // The smallest page that the controller offers: DMA memory is contiguous anyway, and data starts on any of them.
        let page_shift = 12 + cap.mpsmin();
        let found = self
            .link
            .enable(cap, page_shift, admin.addresses())
            .map_err(Problem::from)
            .and_then(|()| self.identify(&mut admin, cap, version, 1 << page_shift));
        match found {
            Ok((info, namespaces, granted)) => Ok(Found { admin, info, namespaces, granted }),
            Err(problem) => {
                // The admin queue's memory is about to go: the controller must have let go of it.
                let stopped = self.link.disable(cap);
                if !matches!(stopped, Ok(()) | Err(HandshakeError::Removed { .. }))
                    && self.link.transport.revoke_dma().is_err()
                {
                    admin.leak();
                }
                Err(problem)
            }
        }
    }

    fn identify(
        &self,
        admin: &mut AdminQueue,
        cap: Cap,
        version: registers::Version,
        page_size: u32,
    ) -> Result<(ControllerInfo, Vec<NamespaceEntry>, u16), Problem> {
        let raw = admin.identify_controller(self.link)?;
        let info = ControllerInfo::check(cap, version, page_size, raw)?;
        let mut namespaces = Vec::new();
        for nsid in self.active_namespaces(admin, &info)? {
            let raw = admin.identify_namespace(self.link, nsid)?;
            let checked = Namespace::check(nsid, &raw, info.max_transfer);
            namespaces.push(NamespaceEntry { nsid, raw, checked });
        }
        let granted = self.request_queues(admin, cap)?;
        Ok((info, namespaces, granted))
    }

    fn active_namespaces(
        &self,
        admin: &mut AdminQueue,
        info: &ControllerInfo,
    ) -> Result<Vec<NamespaceId>, Problem> {
        let mut all: Vec<NamespaceId> = Vec::new();
        loop {
            let after = all.last().map_or(NamespaceId::NONE, |last| *last);
            // Identifiers above 0xfffffffd cannot be asked for (§5.15.2.3).
            if after.get() >= 0xffff_fffe {
                return Ok(all);
            }
            let page = admin.active_namespaces(self.link, after)?;
            let ids = page.ids.iter().map(|id| id.get());
            let found = check_namespace_list(ids, after.get(), info.nn)?;
            let last_page = found.len() < page.ids.len();
            all.extend(found);
            if all.len() > MAX_NAMESPACES {
                return Err(IdentityError::TooManyNamespaces(MAX_NAMESPACES).into());
            }
            if last_page {
                return Ok(all);
            }
        }
    }

    fn request_queues(&self, admin: &mut AdminQueue, cap: Cap) -> Result<u16, Problem> {
        let wanted = self.options.queues.unwrap_or(DEFAULT_QUEUES).clamp(1, u16::MAX - 1);
        let asked = NumberOfQueues::new().with_submission_z(wanted - 1).with_completion_z(wanted - 1);
        let entry = SubmissionEntry::set_features(FeatureId::NUMBER_OF_QUEUES, asked.into());
        let granted = NumberOfQueues::from(admin.execute(self.link, entry)?);
        let queues = u32::from(granted.submission_z().min(granted.completion_z())) + 1;
        // A controller may grant more than asked for; what was not asked for is not used.
        let queues = queues.min(u32::from(wanted)) as u16;
        Ok(queues.min(queues_with_doorbells(self.link.transport.bar_bytes(), cap.dstrd())))
    }
}

/// Queue pairs whose doorbells lie within BAR0.
fn queues_with_doorbells(bar_bytes: u64, dstrd: u8) -> u16 {
    let end = |queue: u16| doorbell_offset(dstrd, QueueId::new(queue), Doorbell::CompletionHead) + 4;
    let room = bar_bytes.saturating_sub(registers::DOORBELL_BASE) / (2 * (4 << dstrd));
    let queues = room.saturating_sub(1).min(u64::from(u16::MAX - 1)) as u16;
    debug_assert!(queues == 0 || end(queues) <= bar_bytes);
    queues
}

/// Identify data as bytes, for tools that decode it themselves.
impl AsRef<[u8]> for ControllerInfo {
    fn as_ref(&self) -> &[u8] {
        self.raw.as_bytes()
    }
}

#[cfg(test)]
mod tests;
