//! How often the doorbell page is looked at.
//!
//! Owns: the decision between looking again and pausing. After a doorbell the page is looked at without pause for `spin`; then
//! pauses begin at the shortest and double up to the longest, so that a client that does nothing costs next to nothing.
//!
//! If the thread was away from its core for longer than [`AWAY`] without having asked for it, somebody else wants that core: perhaps
//! the client itself, which cannot ring before it gets it. Spinning until the scheduler intervenes would then cost a time slice for each
//! round trip; so for [`CROWDED`] the thread pauses as soon as there is nothing to do, and is back after the shortest pause.
//!
//! Excludes: the clock, which is the caller's, and the page (`doorbells`).

use std::time::{Duration, Instant};

/// Time between two looks at the clock that only a thread that lost its core needs.
const AWAY: Duration = Duration::from_micros(300);
/// How long a core is taken for crowded after that.
const CROWDED: Duration = Duration::from_millis(100);

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Look,
    Pause(Duration),
}

/// See the module.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    spin: Duration,
    shortest: Duration,
    longest: Duration,
    /// The next pause.
    pause: Duration,
    /// When a doorbell was last found.
    idle_since: Instant,
    last_look: Instant,
    crowded_until: Option<Instant>,
}

impl Pace {
    pub(super) fn new(now: Instant, spin: Duration, shortest: Duration, longest: Duration) -> Self {
        let pause = shortest;
        Self { spin, shortest, longest, pause, idle_since: now, last_look: now, crowded_until: None }
    }

    /// What to do after looks at the page, of which the last ended at `now`; `rung` says whether a doorbell was found.
    pub(super) fn next(&mut self, now: Instant, rung: bool) -> Next {
        let since = now.saturating_duration_since(self.last_look);
        self.last_look = now;
        if rung {
            // The time went into commands.
            self.idle_since = now;
            self.pause = self.shortest;
            return Next::Look;
        }
        if since > AWAY {
            self.crowded_until = Some(now + CROWDED);
        }
        let crowded = self.crowded_until.is_some_and(|end| now < end);
        if !crowded && now.saturating_duration_since(self.idle_since) < self.spin {
            return Next::Look;
        }
        let pause = self.pause;
        self.pause = (pause * 2).min(self.longest);
        Next::Pause(pause)
    }

    /// Notes the end of a pause, which is no sign of a crowded core however long it was.
    pub(super) fn slept(&mut self, now: Instant) {
        self.last_look = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    fn pace(start: Instant) -> Pace {
        Pace::new(start, 100 * US, 50 * US, 1000 * US)
    }

    #[test]
    fn it_looks_on_for_a_while_and_then_pauses_longer_and_longer() {
        let start = Instant::now();
        let mut pace = pace(start);
        assert_eq!(pace.next(start + 99 * US, false), Next::Look);
        let mut now = start + 100 * US;
        for expected in [50, 100, 200, 400, 800, 1000, 1000] {
            assert_eq!(pace.next(now, false), Next::Pause(expected * US));
            now += 10_000 * US; // longer than asked for
            pace.slept(now);
        }
        assert_eq!(pace.next(now, true), Next::Look);
        assert_eq!(pace.next(now + 99 * US, false), Next::Look);
        assert_eq!(pace.next(now + 100 * US, false), Next::Pause(50 * US), "a doorbell ends the long pauses");
    }

    /// Client and server on one core did 450 round trips a second: each spun until the scheduler took the core away.
    #[test]
    fn it_does_not_spin_where_somebody_else_wants_the_core() {
        let start = Instant::now();
        let mut pace = Pace::new(start, 10_000 * US, 50 * US, 1000 * US);
        assert_eq!(pace.next(start + 10 * US, false), Next::Look);
        assert_eq!(pace.next(start + 3000 * US, false), Next::Pause(50 * US));
        pace.slept(start + 3050 * US);
        assert_eq!(pace.next(start + 3051 * US, true), Next::Look);
        assert_eq!(pace.next(start + 3052 * US, false), Next::Pause(50 * US), "not so soon again");
        let later = start + 200_000 * US;
        pace.slept(later);
        assert_eq!(pace.next(later, true), Next::Look);
        assert_eq!(pace.next(later + 10 * US, false), Next::Look, "it is tried again");
    }

    #[test]
    fn a_long_command_is_no_sign_of_a_crowded_core() {
        let start = Instant::now();
        let mut pace = pace(start);
        assert_eq!(pace.next(start + 50_000 * US, true), Next::Look);
        assert_eq!(pace.next(start + 50_010 * US, false), Next::Look);
    }
}
