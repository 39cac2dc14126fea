//! What a controller reports on its own, and what befell it: kept until somebody asks.
//!
//! Owns: [`ControllerEvent`] and the bounded log of them.
//!
//! Excludes: fetching events from the controller (`keeper`).

use std::collections::VecDeque;

use nvme_spec::NamespaceId;
use nvme_spec::log::{AsyncEvent, CriticalWarning, ErrorEntry};

use crate::controller::Feature;
use crate::fault::Fault;

/// Events kept for [`Controller::take_events`](crate::Controller::take_events): the oldest are dropped beyond that.
pub const MAX_EVENTS: usize = 64;

/// Something that no command asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ControllerEvent {
    /// The controller reported an error (NVMe 1.4 §5.2.1, figure 147).
    Error {
        /// Asynchronous event information: which error.
        information: u8,
        /// The newest entry of the error log.
        entry: Option<Box<ErrorEntry>>,
    },
    /// Its health needs attention (figure 148).
    Health {
        /// Asynchronous event information: 0 reliability, 1 temperature, 2 spare.
        information: u8,
        /// Warnings of the SMART log at that time.
        warnings: CriticalWarning,
        /// Composite temperature in kelvins.
        temperature_k: u16,
    },
    /// Namespaces came, went or changed; [`Controller::namespaces`](crate::Controller::namespaces) has been brought up to date.
    NamespacesChanged {
        /// Which; `None` if more than the controller can list.
        changed: Option<Vec<NamespaceId>>,
    },
    /// New firmware is being activated: commands may be slow.
    FirmwareActivation,
    /// The device's owner wants it back, or it is about to be removed.
    RemovalRequested,
    /// The controller was reset and is back; requests that can be repeated were.
    Reset {
        /// Why.
        fault: Fault,
    },
    /// After a reset, the controller refused a feature that had been set before.
    SettingLost {
        /// The feature, with the value that it was to have.
        feature: Feature,
    },
    /// Another event, its log page read and so acknowledged.
    Other(AsyncEvent),
}

/// The last [`MAX_EVENTS`] events.
#[derive(Debug, Default)]
pub(crate) struct EventLog {
    events: VecDeque<ControllerEvent>,
}

impl EventLog {
    pub(crate) fn push(&mut self, event: ControllerEvent) {
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    pub(crate) fn take(&mut self) -> Vec<ControllerEvent> {
        self.events.drain(..).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_events_are_kept() {
        let mut log = EventLog::default();
        for information in 0..MAX_EVENTS as u8 + 3 {
            log.push(ControllerEvent::Error { information, entry: None });
        }
        let kept = log.take();
        assert_eq!(kept.len(), MAX_EVENTS);
        assert_eq!(kept[0], ControllerEvent::Error { information: 3, entry: None });
        assert!(log.take().is_empty());
    }
}
