//! The keeper: whoever sends admin commands when nobody waits for them. It takes the controller's events, runs the queues'
//! errands, and recovers a controller that has stopped.
//!
//! Owns: the [`Desk`] (errands, bell, closing time), the keeper's thread, and [`Shared::turn`], one round of its work.
//!
//! | woken by | does |
//! |---|---|
//! | the bell: an errand | Abort, Delete or Create by admin command, or a look at CSTS; answers the queue's lane |
//! | the bell: a fault | `recovery` |
//! | the admin queue's interrupt | reads the log page of each event, re-arms |
//! | the transport's removal event | looks whether the device is still there |
//!
//! Invariants:
//! - everything here happens under the admin queue's lock, so errands, recovery and callers' commands never interleave;
//! - an errand asked before the controller's life changed is dropped: its queue sees the change;
//! - a controller that reports events without end cannot keep the thread busy: at most [`EVENTS_A_TURN`] a turn, and
//!   [`EVENT_PAUSE`] after each turn that had some.
//!
//! Excludes: what recovery does, and requests (`queue_pair`).

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nvme_spec::event::{AsyncEventCode, AsyncEventType};
use nvme_spec::identify::NamespaceList;
use nvme_spec::log::{AsyncEvent, ErrorEntry, FirmwareSlotLog, LogPageId};
use nvme_spec::{CommandId, NamespaceId, QueueId, SubmissionEntry};

use crate::admin::{AdminError, RetainEvent, timeout_fault};
use crate::bring_up::{self, Problem};
use crate::controller::{Admin, Shared};
use crate::event::ControllerEvent;
use crate::fault::{Fault, Life};
use crate::lane::{Answer, Ask, Creation, Errand, Lane};
use crate::transport::Listen;

/// Time that an abort or the deletion of a stuck queue is given before the controller is reset.
pub const ESCALATION_TIMEOUT: Duration = Duration::from_secs(5);
/// Times in a row that a controller may fail when one and the same queue is to be created.
pub const MAX_CREATION_FAILURES: u32 = 3;
/// Events handled in one turn.
pub(crate) const EVENTS_A_TURN: usize = 16;
/// Pause after a turn with events.
pub(crate) const EVENT_PAUSE: Duration = Duration::from_millis(1);
/// Time between two looks at the admin queue where the transport has no interrupt for it.
const POLL_INTERVAL_MS: u16 = 1000;

/// Where queues leave errands, and how the keeper is called.
#[derive(Debug)]
pub(crate) struct Desk {
    asks: Mutex<VecDeque<Ask>>,
    bell: EventFd,
    closing: AtomicBool,
}

impl Desk {
    pub(crate) fn new() -> io::Result<Self> {
        let bell = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Self { asks: Mutex::default(), bell, closing: AtomicBool::new(false) })
    }

    pub(crate) fn asks(&self) -> MutexGuard<'_, VecDeque<Ask>> {
        self.asks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the keeper.
    pub(crate) fn ring(&self) {
        // EAGAIN says that the counter is full: it is readable, which is all that is wanted.
        let _ = self.bell.write(1);
    }

    /// Leaves an errand. A lane has one at a time.
    pub(crate) fn ask(&self, ask: Ask) {
        self.asks().push_back(ask);
        self.ring();
    }

    /// Takes a lane's errand back. Only under the admin queue's lock: then it is not being run either.
    pub(crate) fn withdraw(&self, lane: &Arc<Lane>) {
        self.asks().retain(|ask| !Arc::ptr_eq(&ask.lane, lane));
    }

    fn next(&self) -> Option<Ask> {
        self.asks().pop_front()
    }

    /// No more recovery, and the keeper's thread ends.
    pub(crate) fn close(&self) {
        // Release: pairs with the acquire in `is_closing`; nothing else hangs on it.
        self.closing.store(true, Ordering::Release);
        self.ring();
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }
}

/// Starts the keeper's thread. It ends soon after the desk was closed.
pub(crate) fn spawn(shared: &Arc<Shared>) -> io::Result<JoinHandle<()>> {
    let mut ears = Ears::new(shared)?;
    let shared = Arc::clone(shared);
    std::thread::Builder::new().name("nvme-keeper".to_owned()).spawn(move || {
        while !shared.desk.is_closing() {
            shared.turn();
            ears.wait(&shared);
        }
    })
}

/// What the keeper's thread sleeps on.
struct Ears {
    epoll: Epoll,
    interrupt: Option<EventFd>,
    /// The transport's removal event is still listened to.
    removal: bool,
}

const BELL: u64 = 0;
const INTERRUPT: u64 = 1;
const REMOVAL: u64 = 2;

impl Ears {
    fn new(shared: &Shared) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&shared.desk.bell, EpollEvent::new(EpollFlags::EPOLLIN, BELL))?;
        let transport = &shared.link.transport;
        let mut interrupt = None;
        if transport.interrupt_vectors() > 0 {
            let eventfd = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
            match transport.connect_interrupt(QueueId::ADMIN.get(), eventfd.as_fd()) {
                Ok(()) => {
                    epoll.add(&eventfd, EpollEvent::new(EpollFlags::EPOLLIN, INTERRUPT))?;
                    transport.listen(QueueId::ADMIN.get(), Listen::On);
                    interrupt = Some(eventfd);
                }
                Err(error) => {
                    tracing::debug!(device = %shared.name, %error, "events are polled for");
                }
            }
        }
        let removal = transport.removal_event();
        if let Some(descriptor) = removal {
            epoll.add(descriptor, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, REMOVAL))?;
        }
        let removal = removal.is_some();
        Ok(Self { epoll, interrupt, removal })
    }

    fn wait(&mut self, shared: &Shared) {
        let timeout = match self.interrupt {
            Some(_) => EpollTimeout::NONE,
            None => EpollTimeout::from(POLL_INTERVAL_MS),
        };
        let mut heard = [EpollEvent::empty(); 3];
        // An error (EINTR) is as good as a call: a turn without work does no harm.
        let count = self.epoll.wait(&mut heard, timeout).unwrap_or(0);
        // EAGAIN says that nothing was counted.
        let _ = shared.desk.bell.read();
        if let Some(interrupt) = &self.interrupt {
            let _ = interrupt.read();
        }
        if self.removal && heard[..count].iter().any(|event| event.data() == REMOVAL) {
            self.removal = false;
            if let Some(descriptor) = shared.link.transport.removal_event() {
                // Told once: it stays readable.
                let _ = self.epoll.delete(descriptor);
            }
            shared.removal_signalled();
        }
    }
}

impl Shared {
    /// One round of the keeper's work. Blocks for as long as that takes.
    pub(crate) fn turn(&self) {
        let mut admin = self.lock_admin();
        let mut events = 0;
        loop {
            match self.link.health.life() {
                Life::Stopping => self.recover(&mut admin),
                Life::Running => {
                    if let Some(ask) = self.desk.next() {
                        self.run(&mut admin, &ask);
                        continue;
                    }
                    if events >= EVENTS_A_TURN {
                        break;
                    }
                    match self.take_in_events(&mut admin) {
                        Ok(0) if self.link.health.life() == Life::Running => break,
                        Ok(taken) => events += taken,
                        Err(fault) => self.fail(fault),
                    }
                }
                Life::Resetting | Life::Quiet | Life::Abandoned => break,
            }
        }
        drop(admin);
        if events > 0 {
            self.link.timing.pause(EVENT_PAUSE);
        }
    }

    fn removal_signalled(&self) {
        match self.link.check_status() {
            Ok(()) => {
                tracing::warn!(device = %self.name, "the device is wanted back");
                self.note(ControllerEvent::RemovalRequested);
            }
            Err(fault) => self.fail(fault),
        }
    }

    pub(crate) fn note(&self, event: ControllerEvent) {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).push(event);
    }

    pub(crate) fn take_events(&self) -> Vec<ControllerEvent> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn run(&self, admin: &mut Admin, ask: &Ask) {
        if ask.pulse != self.link.health.pulse() {
            return;
        }
        let lane = &ask.lane;
        let outcome = match ask.errand {
            Errand::Abort { command } => self.abort(admin, lane.id, command),
            Errand::Delete { .. } => {
                self.delete_on_device(admin, lane.id, ESCALATION_TIMEOUT).map(|()| Answer::Deleted)
            }
            Errand::Create => self
                .create_on_device(admin, lane)
                .and_then(|()| self.restore_vector(admin, lane))
                .map(|()| Answer::Created),
            Errand::Look => self.link.check_status().map(|()| Answer::Alive).map_err(AdminError::Failed),
        };
        match outcome {
            Ok(answer) => {
                if answer == Answer::Created {
                    lane.note_creation(Creation::Succeeded);
                }
                tracing::debug!(device = %self.name, queue = %lane.id, errand = ?ask.errand, ?answer, "done for a queue");
                lane.reply(answer);
            }
            Err(AdminError::Failed(fault)) => {
                // Reset after reset would not help: there must be an end for those who wait.
                let hopeless = ask.errand == Errand::Create
                    && lane.note_creation(Creation::Failed) >= MAX_CREATION_FAILURES;
                let reason = fault.to_string();
                self.fail(if hopeless { Fault::CannotCreate { queue: lane.id, reason } } else { fault });
            }
            Err(error @ AdminError::Status { .. }) => {
                tracing::warn!(device = %self.name, queue = %lane.id, errand = ?ask.errand, %error, "refused");
                match ask.errand {
                    Errand::Abort { .. } | Errand::Look => lane.reply(Answer::NotAborted),
                    Errand::Delete { command, opcode, timeout } => {
                        self.fail(timeout_fault(&self.link, lane.id, command, opcode, timeout));
                    }
                    Errand::Create => {
                        self.fail(Fault::CannotCreate { queue: lane.id, reason: error.to_string() });
                    }
                }
            }
        }
    }

    fn abort(&self, admin: &mut Admin, queue: QueueId, command: CommandId) -> Result<Answer, AdminError> {
        self.link.check_status().map_err(AdminError::Failed)?;
        let abort = SubmissionEntry::abort(queue, command);
        let result = admin.queue.execute_within(&self.link, abort, ESCALATION_TIMEOUT)?;
        // Bit 0 set: the command was not aborted (§5.1).
        Ok(if result & 1 == 0 { Answer::Aborted } else { Answer::NotAborted })
    }

    /// Fetches and acknowledges what the controller reported, and re-arms. Returns how many events there were.
    fn take_in_events(&self, admin: &mut Admin) -> Result<usize, Fault> {
        admin.queue.take_completions()?;
        let reported = admin.queue.take_events();
        for &event in &reported {
            match self.read_event(admin, event) {
                Ok(event) => {
                    tracing::info!(device = %self.name, ?event, "controller event");
                    self.note(event);
                }
                Err(Problem::Admin(AdminError::Failed(fault))) => return Err(fault),
                Err(problem) => {
                    let problem = problem.named(self.name.clone());
                    tracing::warn!(?event, %problem, "cannot read what the controller reported");
                    self.note(ControllerEvent::Other(event));
                }
            }
        }
        admin.queue.arm_events(self.info.raw.aerl_z);
        Ok(reported.len())
    }

    /// Reads the log page behind an event, which acknowledges it (§5.2).
    fn read_event(&self, admin: &mut Admin, event: AsyncEvent) -> Result<ControllerEvent, Problem> {
        let (link, queue) = (&self.link, &mut admin.queue);
        let information = event.information();
        Ok(match (event.kind(), event.code()) {
            (AsyncEventType::ERROR, _) => {
                let entry = queue.log_page::<ErrorEntry>(link, LogPageId::ERROR, RetainEvent::No)?;
                let entry = Some(entry).filter(|entry| entry.error_count.get() != 0);
                ControllerEvent::Error { information, entry }
            }
            (AsyncEventType::SMART, _) => {
                let log: Box<nvme_spec::log::SmartLog> =
                    queue.log_page(link, LogPageId::SMART, RetainEvent::No)?;
                ControllerEvent::Health {
                    information,
                    warnings: nvme_spec::log::CriticalWarning::from_bits_retain(log.critical_warning),
                    temperature_k: log.temperature.get(),
                }
            }
            (_, AsyncEventCode::NAMESPACE_ATTRIBUTE_CHANGED) => {
                let list: Box<NamespaceList> =
                    queue.log_page(link, LogPageId::CHANGED_NAMESPACES, RetainEvent::No)?;
                self.rescan(admin)?;
                let ids = || list.ids.iter().map(|id| NamespaceId::new(id.get()));
                let changed = match ids().next() {
                    // More than the list holds (§5.14.1.4).
                    Some(NamespaceId::BROADCAST) => None,
                    _ => Some(ids().take_while(|&id| id != NamespaceId::NONE).collect()),
                };
                ControllerEvent::NamespacesChanged { changed }
            }
            (_, AsyncEventCode::FIRMWARE_ACTIVATION_STARTING) => {
                queue.log_page::<FirmwareSlotLog>(link, LogPageId::FIRMWARE_SLOT, RetainEvent::No)?;
                ControllerEvent::FirmwareActivation
            }
            _ => {
                queue.log_page::<[u8; 512]>(link, event.page(), RetainEvent::No)?;
                ControllerEvent::Other(event)
            }
        })
    }

    /// Reads the list of namespaces again.
    pub(crate) fn rescan(&self, admin: &mut Admin) -> Result<(), Problem> {
        let namespaces = bring_up::list_namespaces(&self.link, &mut admin.queue, &self.info)?;
        *self.namespaces.write().unwrap_or_else(PoisonError::into_inner) = namespaces.into();
        Ok(())
    }
}
