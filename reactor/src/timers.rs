//! Timers of one reactor, ordered by deadline, then by age.
//!
//! Invariants: a timer is listed exactly while its [`Sleep`](crate::Sleep) waits; cancelling removes it at once, so
//! the list is never longer than the number of living sleeps. Excludes: the clock.

use std::collections::BTreeMap;
use std::task::Waker;

use crate::clock::Instant;

/// Timers of one reactor, at most: more means that something leaks sleeps.
pub const MAX_TIMERS: usize = 1 << 20;

/// Names a waiting timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TimerKey {
    deadline: Instant,
    age: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Timers {
    waiting: BTreeMap<TimerKey, Waker>,
    next_age: u64,
}

impl Timers {
    /// Lists a timer.
    ///
    /// # Panics
    /// Beyond [`MAX_TIMERS`].
    pub(crate) fn insert(&mut self, deadline: Instant, waker: Waker) -> TimerKey {
        assert!(self.waiting.len() < MAX_TIMERS, "more than {MAX_TIMERS} timers wait on one reactor");
        let key = TimerKey { deadline, age: self.next_age };
        self.next_age += 1;
        self.waiting.insert(key, waker);
        key
    }

    /// Whom to wake from now on.
    pub(crate) fn update(&mut self, key: TimerKey, waker: &Waker) {
        if let Some(listed) = self.waiting.get_mut(&key) {
            listed.clone_from(waker);
        }
    }

    /// Takes a timer out; nothing if it has fired.
    pub(crate) fn cancel(&mut self, key: TimerKey) {
        self.waiting.remove(&key);
    }

    /// The earliest deadline.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.waiting.first_key_value().map(|(key, _)| key.deadline)
    }

    /// Takes out the earliest timer if its time has come.
    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<Waker> {
        let entry = self.waiting.first_entry()?;
        (entry.key().deadline <= now).then(|| entry.remove())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::park::CountingWaker;
    use proptest::prelude::*;

    proptest! {
        /// Against a sorted list: timers fire at their deadline, not before, in order, and never after a cancel.
        #[test]
        fn timers_fire_in_order_of_deadline_and_not_after_cancel(
            deadlines in prop::collection::vec(0_u64..50, 1..60),
            cancel in prop::collection::vec(any::<bool>(), 60),
            step in 1_u64..10,
        ) {
            let mut timers = Timers::default();
            let wakers: Vec<_> = deadlines.iter().map(|_| CountingWaker::new()).collect();
            let keys: Vec<_> = deadlines
                .iter()
                .zip(&wakers)
                .map(|(&at, waker)| timers.insert(Instant::from_nanos(at), waker.waker()))
                .collect();
            for (key, _) in keys.iter().zip(&cancel).filter(|(_, cancel)| **cancel) {
                timers.cancel(*key);
            }
            let mut now = 0;
            while now < 60 {
                while let Some(waker) = timers.pop_due(Instant::from_nanos(now)) {
                    waker.wake();
                }
                for ((&at, waker), &cancelled) in deadlines.iter().zip(&wakers).zip(&cancel) {
                    prop_assert_eq!(waker.count(), usize::from(at <= now && !cancelled));
                }
                prop_assert!(timers.next_deadline().is_none_or(|next| next > Instant::from_nanos(now)));
                now += step;
            }
            prop_assert_eq!(timers.next_deadline(), None);
        }
    }
}
