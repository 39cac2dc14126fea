//! Asynchronous events (§5.2) and what they are about: health and changed namespaces.
//!
//! Invariants:
//! - at most `AERL + 1` requests are held, and at most one event of a kind waits;
//! - after an event was reported, no other of its type is until its log page was read (with RAE 0);
//! - health and the changed namespaces outlive a reset, requests and waiting events do not.
//!
//! | event | raised by | wanted if |
//! |---|---|---|
//! | error | doorbells, `report_error` | always |
//! | SMART / health | temperature, spare, reliability, read-only | its bit of Asynchronous Event Configuration |
//! | namespace attribute changed | attach, detach, resize, a change of format | its bit |
//! | firmware activation starting | `report_firmware_activation` | its bit |

use std::collections::{BTreeSet, VecDeque};

use nvme_spec::event::{AsyncEventCode, AsyncEventType};
use nvme_spec::feature::AsyncEventConfiguration;
use nvme_spec::log::{AsyncEvent, CHANGED_NAMESPACES_BYTES, CriticalWarning, LogPageId};
use nvme_spec::{Status, StatusCode, SubmissionEntry};

use super::AdminState;
use crate::controller::{Core, Outcome};
use crate::locks::lock;

/// Threshold of the spare capacity in percent.
pub(super) const SPARE_THRESHOLD: u8 = 10;
/// What the composite temperature sensor reads until told otherwise, in kelvins.
const TEMPERATURE: u16 = 310;
/// First entry of a changed namespace list that overflowed.
const OVERFLOWED: u32 = u32::MAX;

/// Requests and events.
#[derive(Debug, Default)]
pub(crate) struct EventQueue {
    /// Command identifiers of the held requests, oldest first.
    requests: VecDeque<u16>,
    /// Events not reported yet.
    events: VecDeque<AsyncEvent>,
    /// For each event type, the log page that must be read before another is reported.
    masked: [Option<LogPageId>; 8],
}

impl EventQueue {
    /// Queues an event unless the same one waits already, or what was reported last says so too.
    fn add(&mut self, event: AsyncEvent) {
        if self.masked_by(event) != Some(event.page()) && !self.events.contains(&event) {
            self.events.push_back(event);
        }
    }

    fn masked_by(&self, event: AsyncEvent) -> Option<LogPageId> {
        self.masked[usize::from(event.event_type())]
    }

    /// Pairs the next event that may be reported with the oldest request.
    fn next_report(&mut self) -> Option<(u16, AsyncEvent)> {
        let index = self.events.iter().position(|event| self.masked_by(*event).is_none())?;
        let cid = self.requests.pop_front()?;
        let event = self.events.remove(index)?;
        self.masked[usize::from(event.event_type())] = Some(event.page());
        // The log page will tell these as well.
        let (kind, page) = (event.kind(), event.page());
        self.events.retain(|other| other.kind() != kind || other.page() != page);
        Some((cid, event))
    }

    /// The log page was read: its events are known, and may come again.
    pub(super) fn rearm(&mut self, page: LogPageId) {
        for masked in &mut self.masked {
            masked.take_if(|by| *by == page);
        }
        self.events.retain(|event| event.page() != page);
    }
}

/// What the SMART log and its events are about. Survives resets.
#[derive(Debug)]
pub(crate) struct Health {
    /// Composite temperature in kelvins.
    pub(crate) temperature: u16,
    /// Available spare in percent.
    pub(crate) spare: u8,
    pub(crate) reliability_degraded: bool,
}

impl Default for Health {
    fn default() -> Self {
        Self { temperature: TEMPERATURE, spare: 100, reliability_degraded: false }
    }
}

/// Namespaces that changed since the host read the list (§5.14.1.4).
#[derive(Debug, Default)]
pub(crate) struct ChangedNamespaceIds(BTreeSet<u32>);

impl ChangedNamespaceIds {
    /// The log page.
    pub(super) fn page(&self) -> Vec<u8> {
        let room = CHANGED_NAMESPACES_BYTES / size_of::<u32>();
        let mut page: Vec<u8> = if self.0.len() > room {
            OVERFLOWED.to_le_bytes().to_vec()
        } else {
            self.0.iter().flat_map(|nsid| nsid.to_le_bytes()).collect()
        };
        page.resize(CHANGED_NAMESPACES_BYTES, 0);
        page
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

impl Core {
    /// Asynchronous Event Request (§5.2): held until something happens.
    pub(super) fn hold_event_request(&self, entry: &SubmissionEntry) -> Result<Outcome, StatusCode> {
        let mut admin = lock(&self.admin);
        let requests = &mut admin.events.requests;
        if requests.len() > usize::from(self.config.aerl_z) {
            return Err(StatusCode::AER_LIMIT_EXCEEDED);
        }
        requests.push_back(entry.cid.get());
        drop(admin);
        self.deliver_events();
        Ok(Outcome::Held)
    }

    /// Something happened that the host may want to know.
    pub(crate) fn report_event(&self, event: AsyncEvent) {
        lock(&self.admin).events.add(event);
        self.deliver_events();
    }

    /// The host may be told again what a log page says.
    pub(super) fn rearm_events(&self, page: LogPageId) {
        let mut admin = lock(&self.admin);
        admin.events.rearm(page);
        if page == LogPageId::CHANGED_NAMESPACES {
            admin.changed_namespaces.clear();
        }
        drop(admin);
        self.deliver_events();
    }

    fn deliver_events(&self) {
        loop {
            let Some((cid, event)) = lock(&self.admin).events.next_report() else { break };
            self.post_admin(cid, event.into(), Status::SUCCESS);
        }
    }

    pub(super) fn abort_event_request(&self, cid: u16) -> bool {
        let mut admin = lock(&self.admin);
        let requests = &mut admin.events.requests;
        let Some(index) = requests.iter().position(|held| *held == cid) else { return false };
        requests.remove(index);
        drop(admin);
        self.post_admin(cid, 0, Status::from_code(StatusCode::ABORT_REQUESTED));
        true
    }

    /// What is wrong with the controller's health.
    pub(super) fn critical_warnings(&self, admin: &AdminState) -> CriticalWarning {
        let health = &admin.health;
        let read_only = self.namespaces.list().iter().any(|n| n.store().is_read_only());
        let mut warnings = CriticalWarning::empty();
        warnings.set(CriticalWarning::TEMPERATURE, admin.features.is_beyond_threshold(health.temperature));
        warnings.set(CriticalWarning::SPARE, health.spare < SPARE_THRESHOLD);
        warnings.set(CriticalWarning::RELIABILITY, health.reliability_degraded);
        warnings.set(CriticalWarning::READ_ONLY, read_only);
        warnings
    }

    /// Reports what is wrong with the health and the host wants to know (§5.21.1.11).
    pub(crate) fn report_warnings(&self) {
        let wanted = {
            let admin = lock(&self.admin);
            let configured = CriticalWarning::from_bits_retain(admin.features.async_events().smart());
            self.critical_warnings(&admin) & configured
        };
        let codes = [
            (CriticalWarning::TEMPERATURE, AsyncEventCode::TEMPERATURE),
            (CriticalWarning::SPARE, AsyncEventCode::SPARE),
            (CriticalWarning::RELIABILITY | CriticalWarning::READ_ONLY, AsyncEventCode::RELIABILITY),
        ];
        for (warnings, code) in codes {
            if wanted.intersects(warnings) {
                self.report_event(AsyncEvent::from_code(code, LogPageId::SMART));
            }
        }
    }

    /// A namespace came, went, or became another.
    pub(crate) fn namespace_changed(&self, nsid: u32) {
        lock(&self.admin).changed_namespaces.0.insert(nsid);
        self.report_notice(
            AsyncEventCode::NAMESPACE_ATTRIBUTE_CHANGED,
            LogPageId::CHANGED_NAMESPACES,
            |wanted| wanted.namespace_attributes(),
        );
    }

    /// Reports a notice if the host wants this kind.
    pub(crate) fn report_notice(
        &self,
        code: AsyncEventCode,
        page: LogPageId,
        is_wanted: impl Fn(AsyncEventConfiguration) -> bool,
    ) {
        let configured = lock(&self.admin).features.async_events();
        if is_wanted(configured) {
            let event = AsyncEvent::from_code(code, page);
            debug_assert_eq!(event.kind(), AsyncEventType::NOTICE);
            self.report_event(event);
        }
    }
}
