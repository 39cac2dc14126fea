//! Durations, core lists, sizes and rates as people write and read them.
//!
//! Owns: parsing of `1.5s` and `0,2-3`, and the way sizes, rates and times are printed: sizes with binary prefixes,
//! rates with decimal ones. Excludes: parsing sizes, which device specs do too ([`crate::device::parse_size`]).

use std::time::Duration;

/// Core numbers above this are a typing error.
const MAX_CORE: usize = 4095;

/// Parses a time in seconds: `3`, `0.5`, with or without `s`.
///
/// # Errors
/// Says what is wrong with the text.
pub fn parse_seconds(text: &str) -> Result<Duration, String> {
    let number = text.strip_suffix('s').unwrap_or(text);
    let seconds: f64 =
        number.parse().map_err(|_| format!("`{text}` is not a time in seconds such as 3 or 0.5"))?;
    Duration::try_from_secs_f64(seconds).map_err(|_| format!("`{text}` is not a time in seconds"))
}

/// Core ids, ascending and without repetition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CoreList(Vec<usize>);

impl CoreList {
    /// The ids.
    pub fn ids(&self) -> &[usize] {
        &self.0
    }
}

/// Parses a list of core ids such as `0,2-3`.
///
/// # Errors
/// Says what is wrong with the text.
pub fn parse_cores(text: &str) -> Result<CoreList, String> {
    let malformed = || format!("`{text}` is not a list of core ids such as 0,2-3");
    let mut ids = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first: usize = first.trim().parse().map_err(|_| malformed())?;
        let last: usize = last.trim().parse().map_err(|_| malformed())?;
        if first > last {
            return Err(malformed());
        }
        if last > MAX_CORE {
            return Err(format!("core {last} is beyond the limit of {MAX_CORE}"));
        }
        ids.extend(first..=last);
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(CoreList(ids))
}

/// A size with a binary prefix and three significant digits.
pub fn show_size(bytes: u64) -> String {
    show(bytes as f64, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"])
}

/// A rate in operations per second, with a decimal prefix.
pub fn show_rate(per_second: f64) -> String {
    show(per_second, 1000.0, &["", "k", "M", "G"]).trim_end().to_owned()
}

/// A time in nanoseconds, in the unit that suits it.
pub fn show_nanos(nanos: u64) -> String {
    if nanos < 1_000 {
        return format!("{nanos} ns");
    }
    show(nanos as f64 / 1e3, 1000.0, &["us", "ms", "s", "ks"])
}

/// A moment, in seconds since 1970, as date and time in UTC.
pub fn show_utc(seconds: u64) -> String {
    let (mut days, of_day) = (seconds / 86_400, seconds % 86_400);
    let is_leap =
        |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    // 400 years have 146,097 days; the loops below are short then.
    let mut year = 1970 + days / 146_097 * 400;
    days %= 146_097;
    while days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let february = 28 + u64::from(is_leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    let (hour, minute) = (of_day / 3600, of_day / 60 % 60);
    format!("{year}-{month:02}-{:02} {hour:02}:{minute:02} UTC", days + 1)
}

fn show(value: f64, step: f64, units: &[&str]) -> String {
    let mut value = value;
    let mut unit = 0;
    while value >= step && unit + 1 < units.len() {
        value /= step;
        unit += 1;
    }
    let digits = if value >= 100.0 || (unit == 0 && value.fract() == 0.0) {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_may_have_fractions_but_must_be_times() {
        assert_eq!(parse_seconds("3"), Ok(Duration::from_secs(3)));
        assert_eq!(parse_seconds("0.5s"), Ok(Duration::from_millis(500)));
        for text in ["", "s", "-1", "NaN", "1e300", "inf"] {
            assert!(parse_seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn core_lists_have_ranges_and_no_repetition() {
        assert_eq!(parse_cores("3,0-1,1").map(|list| list.ids().to_vec()), Ok(vec![0, 1, 3]));
        for text in ["", "a", "1-", "3-1", "1,,2", "99999999"] {
            assert!(parse_cores(text).is_err(), "{text}");
        }
    }

    #[test]
    fn moments_are_dates_in_utc() {
        assert_eq!(show_utc(0), "1970-01-01 00:00 UTC");
        assert_eq!(show_utc(951_782_400 + 3_660), "2000-02-29 01:01 UTC");
        assert_eq!(show_utc(1_798_761_599), "2026-12-31 23:59 UTC");
        assert_eq!(show_utc(4_107_542_400), "2100-03-01 00:00 UTC");
        assert!(show_utc(u64::MAX).ends_with("UTC"));
    }

    #[test]
    fn figures_have_three_digits_and_a_unit() {
        assert_eq!(show_size(512), "512 B");
        assert_eq!(show_size(4 << 30), "4.00 GiB");
        assert_eq!(show_rate(123_456.0), "123 k");
        assert_eq!(show_rate(12.0), "12");
        assert_eq!(show_nanos(950), "950 ns");
        assert_eq!(show_nanos(12_345), "12.3 us");
    }
}
