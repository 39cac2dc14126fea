//! Stopping a controller that has a fault, and bringing it back if a reset can cure that.
//!
//! | step | on success | otherwise |
//! |---|---|---|
//! | CC.EN=0, CSTS.RDY=0 | proven quiet | function reset, then the same |
//! | DMA revoked | proven quiet, for good | abandoned: memory is never reused |
//! | CC.EN=1, Identify | the same controller as before | failed: another one answers |
//! | shadow doorbells, event requests, features that were set before, namespaces | running, next epoch | once more after a function reset, then failed |
//!
//! I/O queues are not created here: each owner does so when it sees the new epoch, after it has cleared its rings.
//!
//! Invariants:
//! - no request is completed or repeated before the controller was proven quiet;
//! - the whole is bounded: every wait below has a deadline, and there are [`REVIVAL_ATTEMPTS`] attempts;
//! - all of it happens under the admin queue's lock, off the reactors (but see [`Keeper::Polled`](crate::Keeper)).

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use crate::bring_up::{self, Problem};
use crate::controller::{Admin, Shared};
use crate::event::ControllerEvent;
use crate::fault::{Curable, Fault, Life, LifeEvent};
use crate::handshake::HandshakeError;

/// Attempts to bring a controller back after one fault.
pub const REVIVAL_ATTEMPTS: u32 = 2;

/// How a controller was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stopped {
    /// CSTS.RDY is 0.
    Disabled,
    /// It is not there any more.
    Gone,
    /// It cannot reach memory any more.
    Revoked,
    /// It was not.
    Not,
}

enum Setback {
    /// Trying again may help.
    Problem(String),
    /// It will not.
    Final(Fault),
}

impl From<Problem> for Setback {
    fn from(problem: Problem) -> Self {
        Setback::Problem(problem.to_string())
    }
}

impl Shared {
    /// Brings a stopping controller to its end, or back into use. Does nothing to one that is not stopping.
    pub(crate) fn recover(&self, admin: &mut Admin) {
        let health = &self.link.health;
        if health.life() != Life::Stopping {
            return;
        }
        match self.stop() {
            Stopped::Disabled => {}
            Stopped::Gone => {
                health.fail(Fault::Removed, Curable::No);
            }
            Stopped::Revoked => self.give_up("the controller does not stop"),
            Stopped::Not => {
                self.give_up("the controller does not stop");
                tracing::error!(device = %self.name, "the controller does not stop: its memory is not reused");
                health.apply(LifeEvent::Stuck);
                self.wake_queues();
                return;
            }
        }
        admin.forget_queues();
        if self.desk.is_closing() {
            health.fail(Fault::ShutDown, Curable::No);
        }
        if health.fault().is_some() {
            health.apply(LifeEvent::Quiet);
            self.wake_queues();
            return;
        }
        health.apply(LifeEvent::Reset);
        self.revive_or_end(admin);
    }

    fn stop(&self) -> Stopped {
        let cap = self.info.cap;
        match self.link.disable(cap) {
            Ok(()) => return Stopped::Disabled,
            Err(HandshakeError::Removed { .. }) => return Stopped::Gone,
            Err(error) => tracing::warn!(device = %self.name, %error, "the controller does not stop"),
        }
        if self.link.transport.reset_function().is_ok() {
            match self.link.disable(cap) {
                Ok(()) => return Stopped::Disabled,
                Err(HandshakeError::Removed { .. }) => return Stopped::Gone,
                Err(error) => tracing::warn!(device = %self.name, %error, "not even after a function reset"),
            }
        }
        match self.link.transport.revoke_dma() {
            Ok(()) => Stopped::Revoked,
            Err(_) => Stopped::Not,
        }
    }

    /// Makes the present cause the final fault.
    fn give_up(&self, reason: &str) {
        let cause = Box::new(self.link.health.cause().unwrap_or(Fault::Removed));
        self.link.health.fail(Fault::ResetFailed { cause, reason: reason.to_owned() }, Curable::No);
    }

    fn revive_or_end(&self, admin: &mut Admin) {
        let health = &self.link.health;
        let cause = health.cause().unwrap_or(Fault::Removed);
        let mut reason = String::new();
        for attempt in 0..REVIVAL_ATTEMPTS {
            if attempt > 0 {
                if self.stop() != Stopped::Disabled {
                    break;
                }
                // Where the transport cannot, another plain attempt is all there is.
                let _ = self.link.transport.reset_function();
            }
            match self.revive(admin) {
                Ok(()) => {
                    // Relaxed: a count orders nothing.
                    self.resets.fetch_add(1, Ordering::Relaxed);
                    self.note(ControllerEvent::Reset { fault: cause.clone() });
                    tracing::warn!(device = %self.name, fault = %cause, "the controller was reset and is back");
                    health.apply(LifeEvent::Revived);
                    self.wake_queues();
                    return;
                }
                Err(Setback::Problem(problem)) => {
                    tracing::warn!(device = %self.name, %problem, attempt, "the controller did not come back");
                    reason = problem;
                }
                Err(Setback::Final(fault)) => {
                    health.fail(fault, Curable::No);
                    break;
                }
            }
        }
        // Resetting becomes stopping again, now with a final fault: one level down it ends.
        self.give_up(&reason);
        self.recover(admin);
    }

    fn revive(&self, admin: &mut Admin) -> Result<(), Setback> {
        let link = &self.link;
        let page_shift = self.info.page_size.trailing_zeros() as u8;
        admin.queue.restart();
        link.enable(self.info.cap, page_shift, admin.queue.addresses()).map_err(Problem::from)?;
        let raw = admin.queue.identify_controller(link).map_err(Problem::from)?;
        let known = &self.info.raw;
        if (raw.sn, raw.mn) != (known.sn, known.mn) {
            let name = |model: &[u8], serial: &[u8]| {
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
                format!("{} {}", text(model), text(serial))
            };
            return Err(Setback::Final(Fault::Replaced {
                expected: name(&known.mn, &known.sn),
                found: name(&raw.mn, &raw.sn),
            }));
        }
        let granted =
            bring_up::set_up(link, &mut admin.queue, &self.info, &self.options, self.shadow.as_ref())?;
        if granted < self.granted_queues {
            return Err(Setback::Problem(format!(
                "it grants {granted} I/O queues instead of {}",
                self.granted_queues
            )));
        }
        self.restore_settings(admin).map_err(Problem::from)?;
        let namespaces = bring_up::list_namespaces(link, &mut admin.queue, &self.info)?;
        *self.namespaces.write().unwrap_or_else(PoisonError::into_inner) = namespaces.into();
        Ok(())
    }
}
