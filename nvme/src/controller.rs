//! A controller: brought up, identified, and handing out I/O queues.
//!
//! Owns: the admin queue (under a mutex), the controller's identity, the numbers of its I/O queues, and its end.
//! `Controller` is `Send + Sync`; each [`QueuePair`] belongs to one thread.
//!
//! Invariants:
//! - memory that the controller was given is released only after the controller was told to forget it (queue deleted,
//!   controller reset) or was proven quiet; else it stays in `kept` until then;
//! - after a fault nothing is submitted until the controller is back, and every queue is woken to see it;
//! - dropping the last handle shuts the controller down in an orderly way, within bounded time.
//!
//! *Locks*, in this order: the admin queue; then, never two at once, the desk, the sleepers, the events, the namespaces. The
//! admin queue is held for as long as an admin command or a reset takes, so no queue takes it on the I/O path.
//!
//! Excludes: the I/O path; what is done about faults and events (`keeper`, `recovery`).

mod commands;
mod features;
mod format;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use nvme_spec::command::QueueInterrupt;
use nvme_spec::log::SmartLog;
use nvme_spec::{NamespaceId, QueueId, SubmissionEntry};
use reactor::dma::DmaRegion;
use thiserror::Error;
use zerocopy::IntoBytes;

use crate::admin::{ADMIN_TIMEOUT, AdminError, AdminQueue};
use crate::bring_up::{self, BringUpError};
use crate::event::{ControllerEvent, EventLog};
use crate::fault::{Curable, Fault, Health, Life, Pulse};
use crate::handshake::{HandshakeError, Link, shutdown_timeout};
use crate::identity::{ControllerInfo, Namespace, NamespaceEntry, NamespaceProblem};
use crate::keeper::{self, Desk, MAX_CREATION_FAILURES};
use crate::lane::Lane;
use crate::queue::{Queue, QueueShape};
use crate::queue_pair::{QueueOptions, QueuePair};
use crate::shadow::ShadowMemory;
use crate::transport::{Timing, Transport, TransportError};
use crate::wake;
pub(crate) use commands::command_set_limits;
pub use commands::{CommandError, NamespaceUid};
use features::Settings;
pub use features::{Feature, MAX_SETTINGS, Persistence};
use format::Formatting;
pub use format::{FORMAT_TIMEOUT, FormatError, FormatOptions};

/// Active namespaces that the driver keeps.
pub const MAX_NAMESPACES: usize = 1024;
/// I/O queue pairs that are asked for if the options do not say.
pub const DEFAULT_QUEUES: u16 = 64;

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

/// How to bring a controller up.
#[derive(Clone, Debug, Default)]
pub struct ControllerOptions {
    /// I/O queue pairs to ask for; [`DEFAULT_QUEUES`] if `None`.
    pub queues: Option<u16>,
    /// Namespace that [`Controller::default_namespace`] gives; the lowest that can be used if `None`.
    pub namespace: Option<NamespaceId>,
    /// Who sends admin commands while nobody waits for them.
    pub keeper: Keeper,
    /// What follows a fault that a reset may cure.
    pub recovery: Recovery,
}

/// Who looks after a controller: takes its events, aborts what is overdue, resets it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Keeper {
    /// A thread of its own, asleep unless there is something to do. Queues never wait for it.
    #[default]
    Thread,
    /// Whoever polls a queue. Polling may then block for as long as a reset takes. For single-threaded programs and tests.
    Polled,
}

/// What follows a fault that a reset of the controller may cure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recovery {
    /// Abort, delete the queue, reset the controller, and repeat what can be repeated.
    #[default]
    Automatic,
    /// The controller has failed.
    Off,
}

/// An NVMe controller in use.
pub struct Controller {
    shared: Arc<Shared>,
    keeper: Option<JoinHandle<()>>,
}

/// What the handle, its queues and the keeper share.
pub(crate) struct Shared {
    pub(crate) link: Link,
    pub(crate) name: String,
    pub(crate) info: ControllerInfo,
    pub(crate) options: ControllerOptions,
    pub(crate) namespaces: RwLock<Arc<[NamespaceEntry]>>,
    pub(crate) granted_queues: u16,
    /// Given to the controller as long as it runs.
    pub(crate) shadow: Option<ShadowMemory>,
    admin: Mutex<Admin>,
    pub(crate) desk: Desk,
    /// Wake descriptors of the queues in use.
    sleepers: Mutex<Vec<Weak<OwnedFd>>>,
    pub(crate) events: Mutex<EventLog>,
    /// Times that the controller was reset and came back.
    pub(crate) resets: AtomicU32,
}

/// The admin queue and what is known of the I/O queues on the controller. Whoever holds it is the only one who stops, resets
/// or shuts down the controller.
pub(crate) struct Admin {
    pub(crate) queue: AdminQueue,
    free_queues: BTreeSet<u16>,
    /// Queues that exist on the controller.
    pub(crate) live: BTreeSet<u16>,
    /// Queues that somebody holds, and their namespaces.
    users: BTreeMap<u16, NamespaceId>,
    /// Queues that nobody holds and the controller may still have.
    stranded: BTreeSet<u16>,
    /// Memory that a queue left behind without the controller's consent: until the controller is proven quiet.
    kept: Vec<Arc<dyn DmaRegion>>,
    /// Features that were set, for the time after a reset.
    settings: Settings,
    /// A format that is under way.
    formatting: Option<Formatting>,
}

impl Admin {
    /// The controller was proven quiet: it has no I/O queue any more, and uses no memory.
    pub(crate) fn forget_queues(&mut self) {
        self.live.clear();
        self.kept.clear();
        self.free_queues.append(&mut self.stranded);
    }
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
        let keeper_error =
            |error: std::io::Error| BringUpError::Keeper { device: name.clone(), reason: error.to_string() };
        let desk = Desk::new().map_err(keeper_error)?;
        let link = Link { transport, timing, health: Health::new() };
        let found = match bring_up::run(&link, options) {
            Ok(found) => found,
            Err(problem) => return Err(problem.named(name)),
        };
        let shared = Arc::new(Shared {
            granted_queues: found.granted,
            admin: Mutex::new(Admin {
                queue: found.admin,
                free_queues: (1..=found.granted).collect(),
                live: BTreeSet::new(),
                users: BTreeMap::new(),
                stranded: BTreeSet::new(),
                kept: Vec::new(),
                settings: Settings::default(),
                formatting: None,
            }),
            options: options.clone(),
            info: found.info,
            namespaces: RwLock::new(found.namespaces.into()),
            shadow: found.shadow,
            sleepers: Mutex::default(),
            events: Mutex::default(),
            resets: AtomicU32::new(0),
            desk,
            name,
            link,
        });
        let mut controller = Self { keeper: None, shared };
        if options.keeper == Keeper::Thread {
            // On failure the controller is dropped here, which shuts it down.
            let spawned = keeper::spawn(&controller.shared);
            let named = |error: std::io::Error| BringUpError::Keeper {
                device: controller.name().to_owned(),
                reason: error.to_string(),
            };
            controller.keeper = Some(spawned.map_err(named)?);
        }
        Ok(Arc::new(controller))
    }

    /// Name of the device, such as `emu:/var/lib/p.img`.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// What the controller is.
    pub fn info(&self) -> &ControllerInfo {
        &self.shared.info
    }

    /// Its active namespaces, ascending, with those that cannot be used: as of the last time the controller said that they
    /// changed.
    pub fn namespaces(&self) -> Arc<[NamespaceEntry]> {
        self.shared.namespaces()
    }

    /// I/O queue pairs that can exist at once.
    pub fn max_queues(&self) -> u16 {
        self.shared.granted_queues
    }

    /// The namespace that the options named, or else the lowest that can be used.
    ///
    /// # Errors
    /// It does not exist or cannot be used.
    pub fn default_namespace(&self) -> Result<Namespace, QueueError> {
        if let Some(nsid) = self.shared.options.namespace {
            return self.namespace(nsid);
        }
        let namespaces = self.namespaces();
        if let Some(usable) = namespaces.iter().find_map(|entry| entry.checked.as_ref().ok()) {
            return Ok(usable.clone());
        }
        self.namespace(namespaces.first().map_or(NamespaceId::new(1), |entry| entry.nsid))
    }

    /// A namespace by its identifier.
    ///
    /// # Errors
    /// It does not exist or cannot be used.
    pub fn namespace(&self, nsid: NamespaceId) -> Result<Namespace, QueueError> {
        let namespaces = self.namespaces();
        let entry = namespaces.iter().find(|entry| entry.nsid == nsid).ok_or_else(|| {
            let ids: Vec<String> = namespaces.iter().map(|entry| entry.nsid.to_string()).collect();
            QueueError::NoSuchNamespace {
                device: self.name().to_owned(),
                nsid: nsid.get(),
                available: if ids.is_empty() { "none".to_owned() } else { ids.join(", ") },
            }
        })?;
        entry.checked.clone().map_err(|problem| QueueError::Namespace {
            device: self.name().to_owned(),
            nsid: nsid.get(),
            problem,
        })
    }

    /// The SMART / Health log page.
    ///
    /// # Errors
    /// The controller refused the command, or failed.
    pub fn smart_log(&self) -> Result<Box<SmartLog>, AdminError> {
        self.shared.command(AdminQueue::smart_log)
    }

    /// What the controller reported and what befell it since the last call, oldest first. Keeps the last
    /// [`MAX_EVENTS`](crate::event::MAX_EVENTS).
    pub fn take_events(&self) -> Vec<ControllerEvent> {
        if self.shared.options.keeper == Keeper::Polled {
            self.shared.turn();
        }
        self.shared.take_events()
    }

    /// A descriptor that becomes readable, for good, once the device has gone or its owner wants it back; `None` if the way to the
    /// device cannot tell. Whoever holds the controller should let go of it then: behind VFIO the kernel waits for that.
    pub fn removal_event(&self) -> Option<BorrowedFd<'_>> {
        self.shared.link.transport.removal_event()
    }

    /// The fatal error that ended the controller, if there was one.
    pub fn fault(&self) -> Option<&Fault> {
        self.shared.link.health.fault()
    }

    /// Whether the controller is in use, being reset, or at its end.
    pub fn life(&self) -> Life {
        self.shared.link.health.life()
    }

    /// Times that the controller was reset and came back.
    pub fn resets(&self) -> u32 {
        // Relaxed: a count orders nothing.
        self.shared.resets.load(Ordering::Relaxed)
    }

    /// Creates an I/O queue pair for one namespace, for the calling thread. Blocks for a few admin commands, and for a reset
    /// if one is under way.
    ///
    /// # Errors
    /// No queue is left, the namespace cannot be used, or the controller refused or failed.
    pub fn create_queue(self: &Arc<Self>, options: &QueueOptions) -> Result<QueuePair, QueueError> {
        let namespace = match options.namespace {
            Some(nsid) => self.namespace(nsid)?,
            None => self.default_namespace()?,
        };
        QueuePair::create(self, &namespace, options)
    }

    /// Shuts the controller down: queues still in use fail with [`Fault::ShutDown`], the controller writes back what it
    /// caches, and is disabled. Does nothing if the controller has failed or was shut down before.
    ///
    /// # Errors
    /// The controller did not finish in time; it is disabled all the same.
    pub fn shutdown(&self) -> Result<(), HandshakeError> {
        self.shared.shut_down()
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl Shared {
    pub(crate) fn namespaces(&self) -> Arc<[NamespaceEntry]> {
        Arc::clone(&self.namespaces.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn lock_admin(&self) -> MutexGuard<'_, Admin> {
        // A panic while it was held left at worst an admin command unanswered, which the slots account for.
        self.admin.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The admin queue of a controller that runs, after the recovery that is due or under way; of a failed one at once.
    fn lock_running(&self) -> MutexGuard<'_, Admin> {
        loop {
            let admin = self.lock_admin();
            if self.link.health.life() != Life::Stopping {
                return admin;
            }
            drop(admin);
            match self.options.keeper {
                Keeper::Polled => self.turn(),
                // The keeper was woken by whoever reported the fault; it holds the lock until the matter is settled.
                Keeper::Thread => self.link.timing.pause(KEEPER_PAUSE),
            }
        }
    }

    /// Sends admin commands for a caller who waits for them.
    pub(crate) fn command<T>(
        &self,
        send: impl FnOnce(&mut AdminQueue, &Link) -> Result<T, AdminError>,
    ) -> Result<T, AdminError> {
        let mut admin = self.lock_running();
        let outcome = send(&mut admin.queue, &self.link);
        self.report(outcome)
    }

    /// Passes an admin command's outcome on, and the fault in it to the controller's health: like [`Self::fail`], under the
    /// admin queue's lock.
    pub(crate) fn report<T>(&self, outcome: Result<T, AdminError>) -> Result<T, AdminError> {
        if let Err(AdminError::Failed(fault)) = &outcome {
            self.fail(fault.clone());
        }
        outcome
    }

    fn curable(&self, fault: &Fault) -> Curable {
        match self.options.recovery {
            Recovery::Automatic if fault.is_curable() => Curable::Yes,
            _ => Curable::No,
        }
    }

    /// Keeps the fault, and wakes every queue and the keeper. A fault that a reset cures is reported under the admin queue's
    /// lock, or by [`Self::fail_since`]: it must not bring down a controller that was reset for it already.
    pub(crate) fn fail(&self, fault: Fault) {
        let curable = self.curable(&fault);
        self.failed(fault, curable, |fault| self.link.health.fail(fault, curable));
    }

    /// [`Self::fail`], unless the controller's pulse has changed since it was `pulse`.
    pub(crate) fn fail_since(&self, pulse: Pulse, fault: Fault) {
        let curable = self.curable(&fault);
        self.failed(fault, curable, |fault| self.link.health.fail_since(pulse, fault, curable));
    }

    fn failed(&self, fault: Fault, curable: Curable, keep: impl FnOnce(Fault) -> bool) {
        let text = fault.to_string();
        if keep(fault) {
            if curable == Curable::Yes {
                tracing::warn!(device = %self.name, fault = %text, "controller will be reset");
            } else {
                tracing::error!(device = %self.name, fault = %text, "controller failed");
            }
            self.wake_queues();
            self.desk.ring();
        }
    }

    pub(crate) fn wake_queues(&self) {
        let sleepers = self.sleepers.lock().unwrap_or_else(PoisonError::into_inner);
        for sleeper in sleepers.iter().filter_map(Weak::upgrade) {
            wake::signal(&sleeper);
        }
    }

    fn shut_down(&self) -> Result<(), HandshakeError> {
        let mut admin = self.lock_admin();
        if self.link.health.life().is_final() || !self.link.health.fail(Fault::ShutDown, Curable::No) {
            return Ok(());
        }
        let notified = self.link.notify_shutdown(shutdown_timeout(self.info.raw.rtd3e.get()));
        self.recover(&mut admin);
        notified
    }

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

impl Drop for Controller {
    fn drop(&mut self) {
        let shared = &self.shared;
        shared.desk.close();
        if let Some(keeper) = self.keeper.take() {
            // A panicked thread has reported itself.
            let _ = keeper.join();
        }
        if let Err(error) = shared.shut_down() {
            tracing::warn!(device = %shared.name, %error, "shutdown incomplete");
        }
        let mut admin = shared.lock_admin();
        // A controller that failed may not have been stopped yet: its memory goes with us, so wait for the proof.
        shared.recover(&mut admin);
        if shared.link.health.life() == Life::Abandoned {
            // Leaked on purpose: the device may write to it until the process ends.
            std::mem::forget(std::mem::take(&mut admin.kept));
            admin.queue.leak();
            std::mem::forget(shared.shadow.as_ref().map(ShadowMemory::memory));
        }
    }
}

/// Pause of a caller who waits for the keeper to begin.
const KEEPER_PAUSE: Duration = Duration::from_micros(200);

/// Identify data as bytes, for tools that decode it themselves.
impl AsRef<[u8]> for ControllerInfo {
    fn as_ref(&self) -> &[u8] {
        self.raw.as_bytes()
    }
}

#[cfg(test)]
mod tests;
