//! Time as an argument: monotonic [`Instant`], calendar [`WallTime`], and the [`Clock`] that yields both.
//!
//! Invariants: an [`Instant`] never goes backwards on one clock; arithmetic on it saturates or is checked, so a
//! foreign duration cannot panic. Excludes: timers (the reactor's), time zones, formatting of dates.

use std::fmt;
use std::ops::{Add, Sub};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Nanoseconds of one second.
const NANOS_PER_SEC: u32 = 1_000_000_000;

/// A moment of a monotonic clock, in nanoseconds since that clock's arbitrary origin (584 years of range).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(u64);

impl Instant {
    /// The clock's origin.
    pub const ZERO: Instant = Instant(0);

    /// The moment `nanos` nanoseconds after the clock's origin.
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since the clock's origin.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// `self + duration`, or `None` beyond the range of the clock.
    pub fn checked_add(self, duration: Duration) -> Option<Instant> {
        let nanos = u64::try_from(duration.as_nanos()).ok()?;
        self.0.checked_add(nanos).map(Instant)
    }

    /// `self + duration`, or the last moment of the clock's range.
    #[must_use]
    pub fn saturating_add(self, duration: Duration) -> Instant {
        self.checked_add(duration).unwrap_or(Instant(u64::MAX))
    }

    /// The time from `earlier` to `self`, or `None` if `earlier` is later.
    pub fn checked_duration_since(self, earlier: Instant) -> Option<Duration> {
        self.0.checked_sub(earlier.0).map(Duration::from_nanos)
    }

    /// The time from `earlier` to `self`, or zero if `earlier` is later.
    pub fn duration_since(self, earlier: Instant) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;

    /// Saturates at the end of the clock's range.
    fn add(self, duration: Duration) -> Instant {
        self.saturating_add(duration)
    }
}

impl Sub<Instant> for Instant {
    type Output = Duration;

    /// Zero if `earlier` is later than `self`.
    fn sub(self, earlier: Instant) -> Duration {
        self.duration_since(earlier)
    }
}

/// A point of calendar time (UTC) for time stamps: seconds since 1970, negative before, plus nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WallTime {
    secs: i64,
    nanos: u32,
}

impl WallTime {
    /// 1970-01-01T00:00:00Z.
    pub const EPOCH: WallTime = WallTime { secs: 0, nanos: 0 };

    /// `secs` seconds since 1970 and `subsec_nanos` nanoseconds after that; `None` unless `subsec_nanos` is below 10⁹.
    pub const fn new(secs: i64, subsec_nanos: u32) -> Option<Self> {
        if subsec_nanos < NANOS_PER_SEC { Some(Self { secs, nanos: subsec_nanos }) } else { None }
    }

    /// Whole seconds since 1970, rounded towards the past.
    pub const fn secs(self) -> i64 {
        self.secs
    }

    /// Nanoseconds after [`secs`](Self::secs); below 10⁹.
    pub const fn subsec_nanos(self) -> u32 {
        self.nanos
    }

    /// `self + duration`, saturating at the end of the range.
    #[must_use]
    pub fn saturating_add(self, duration: Duration) -> WallTime {
        let nanos = self.nanos + duration.subsec_nanos();
        let carry = i64::from(nanos >= NANOS_PER_SEC);
        let secs = i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
        WallTime { secs: self.secs.saturating_add(secs).saturating_add(carry), nanos: nanos % NANOS_PER_SEC }
    }
}

impl From<SystemTime> for WallTime {
    fn from(time: SystemTime) -> Self {
        match time.duration_since(UNIX_EPOCH) {
            Ok(after) => WallTime::EPOCH.saturating_add(after),
            Err(before) => {
                let before = before.duration();
                let secs = i64::try_from(before.as_secs()).unwrap_or(i64::MAX);
                match before.subsec_nanos() {
                    0 => WallTime { secs: -secs, nanos: 0 },
                    nanos => WallTime { secs: (-secs).saturating_sub(1), nanos: NANOS_PER_SEC - nanos },
                }
            }
        }
    }
}

impl fmt::Display for WallTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:09}", self.secs, self.nanos)
    }
}

/// A source of time. Reactors and everything on them read no other.
pub trait Clock: Send + Sync {
    /// Monotonic time.
    fn now(&self) -> Instant;

    /// Calendar time, for time stamps only: it may jump in either direction.
    fn wall(&self) -> WallTime;
}

/// The machine's clocks; [`Instant::ZERO`] is the moment of construction.
#[derive(Clone, Debug)]
pub struct SystemClock {
    origin: std::time::Instant,
}

impl SystemClock {
    /// A clock whose origin is now.
    pub fn new() -> Self {
        Self { origin: std::time::Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Instant {
        Instant::ZERO.saturating_add(self.origin.elapsed())
    }

    fn wall(&self) -> WallTime {
        WallTime::from(SystemTime::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instant_arithmetic_saturates_at_both_ends() {
        let late = Instant::from_nanos(u64::MAX - 1);
        assert_eq!(late + Duration::from_secs(1), Instant::from_nanos(u64::MAX));
        assert_eq!(late.checked_add(Duration::MAX), None);
        assert_eq!(Instant::ZERO - late, Duration::ZERO);
        assert_eq!(Instant::ZERO.checked_duration_since(late), None);
    }

    #[test]
    fn wall_time_refuses_a_full_second_of_nanoseconds() {
        assert_eq!(WallTime::new(1, 1_000_000_000), None);
        assert!(WallTime::new(1, 999_999_999).is_some());
    }

    #[test]
    fn wall_time_before_1970_counts_nanoseconds_forwards() {
        let time = WallTime::from(UNIX_EPOCH - Duration::from_millis(1_250));
        assert_eq!((time.secs(), time.subsec_nanos()), (-2, 750_000_000));
        assert_eq!(time.saturating_add(Duration::from_millis(1_250)), WallTime::EPOCH);
    }
}
