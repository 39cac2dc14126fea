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
//! Parts: the I/O queues (`queues`); log pages and identify data (`commands`), features, formats.
//!
//! Excludes: the I/O path; what is done about faults and events (`keeper`, `recovery`).

mod commands;
mod features;
mod format;
mod queues;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use nvme_spec::NamespaceId;
use nvme_spec::log::SmartLog;
use reactor::dma::DmaRegion;
use zerocopy::IntoBytes;

use crate::admin::{AdminError, AdminQueue};
use crate::bring_up::{self, BringUpError};
use crate::event::{ControllerEvent, EventLog};
use crate::fault::{Curable, Fault, Health, Life, Pulse};
use crate::handshake::{HandshakeError, Link, shutdown_timeout};
use crate::identity::{ControllerInfo, Namespace, NamespaceEntry};
use crate::keeper::{self, Desk};
use crate::queue_pair::{QueueOptions, QueuePair};
use crate::shadow::ShadowMemory;
use crate::transport::{Timing, Transport};
use crate::wake;
pub(crate) use commands::command_set_limits;
pub use commands::{CommandError, NamespaceUid};
use features::Settings;
pub use features::{Feature, MAX_SETTINGS, Persistence};
use format::Formatting;
pub use format::{FORMAT_TIMEOUT, FormatError, FormatOptions};
pub use queues::QueueError;

/// Active namespaces that the driver keeps.
pub const MAX_NAMESPACES: usize = 1024;
/// I/O queue pairs that are asked for if the options do not say.
pub const DEFAULT_QUEUES: u16 = 64;

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
