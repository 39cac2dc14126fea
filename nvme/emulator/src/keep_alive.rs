//! The keep alive timer (§7.12): a host that asked for it must say that it lives, or the controller stops with CSTS.CFS.
//!
//! Owns: the timeout (feature 0Fh) and when it expires, in the controller's time. Off (0) after each reset, as it is for
//! controllers on a bus unless the host sets it.
//!
//! Memory ordering: the deadline is a number that stands for itself; relaxed.
//!
//! Excludes: what expiry does (`controller`); keep alive by traffic (CTRATT), which is not offered.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use nvme_spec::{Status, StatusCode, SubmissionEntry};

use crate::controller::Core;
use crate::locks::lock;

/// KAS: granularity of the timeout in units of 100 ms.
pub(crate) const KAS: u16 = 1;
const GRANULARITY_MS: u32 = 100 * KAS as u32;
const NS_PER_MS: u64 = 1_000_000;
/// Queue and command of an error that belongs to none.
const NO_COMMAND: u16 = 0xffff;

/// The timer.
#[derive(Debug, Default)]
pub(crate) struct KeepAlive {
    /// 0: off.
    timeout_ms: AtomicU32,
    /// When it expires; 0 if it does not run.
    deadline_ns: AtomicU64,
}

impl KeepAlive {
    /// Sets the timeout, rounded up to the granularity, and starts the timer; 0 ends it.
    pub(crate) fn set(&self, timeout_ms: u32, now_ns: u64) {
        let rounded = timeout_ms.div_ceil(GRANULARITY_MS).saturating_mul(GRANULARITY_MS);
        self.timeout_ms.store(rounded, Ordering::Relaxed);
        self.restart(now_ns);
    }

    pub(crate) fn timeout_ms(&self) -> u32 {
        self.timeout_ms.load(Ordering::Relaxed)
    }

    /// The host lives.
    pub(crate) fn restart(&self, now_ns: u64) {
        let deadline_ns = match self.timeout_ms() {
            0 => 0,
            timeout_ms => now_ns.saturating_add(u64::from(timeout_ms) * NS_PER_MS),
        };
        self.deadline_ns.store(deadline_ns, Ordering::Relaxed);
    }

    /// When the timer expires, if it runs.
    #[inline]
    pub(crate) fn deadline_ns(&self) -> Option<u64> {
        let deadline_ns = self.deadline_ns.load(Ordering::Relaxed);
        (deadline_ns != 0).then_some(deadline_ns)
    }

    fn stop(&self) {
        self.deadline_ns.store(0, Ordering::Relaxed);
    }
}

impl Core {
    /// Stops the controller if the host has not been heard of in time.
    #[inline]
    pub(crate) fn check_keep_alive(&self) {
        if self.keep_alive.deadline_ns().is_some_and(|deadline_ns| deadline_ns <= self.now_ns()) {
            self.keep_alive_expired();
        }
    }

    #[cold]
    fn keep_alive_expired(&self) {
        self.keep_alive.stop();
        let mut nothing = SubmissionEntry::default();
        nothing.cid.set(NO_COMMAND);
        lock(&self.admin).log_error(NO_COMMAND, &nothing, Status::from_code(StatusCode::KEEP_ALIVE_EXPIRED));
        self.fail("the host's keep alive timer expired");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_rounded_up_and_extremes_do_not_overflow() {
        let timer = KeepAlive::default();
        timer.set(101, 5);
        assert_eq!((timer.timeout_ms(), timer.deadline_ns()), (200, Some(200 * NS_PER_MS + 5)));
        timer.set(u32::MAX, u64::MAX - 1);
        assert!(timer.timeout_ms() >= u32::MAX - GRANULARITY_MS && timer.deadline_ns() == Some(u64::MAX));
        timer.set(0, 5);
        assert_eq!((timer.timeout_ms(), timer.deadline_ns()), (0, None));
        timer.restart(9);
        assert_eq!(timer.deadline_ns(), None);
    }
}
