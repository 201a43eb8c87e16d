//! The time of a line: UTC, with nanoseconds, as `2026-11-23T04:11:37.123456789`.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A moment since 1970.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timestamp(Duration);

impl Timestamp {
    pub(super) fn now() -> Self {
        // A clock before 1970 is one that was never set.
        Self(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        let (year, month, day) = civil(seconds / 86_400);
        let of_day = seconds % 86_400;
        let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
        let nanos = self.0.subsec_nanos();
        write!(
            f,
            "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}"
        )
    }
}

/// The Gregorian date `days` after 1970-01-01.
///
/// Counted from 1 March of year 0, so that the leap day is the last of its year: eras of 400 years have 146,097 days,
/// and the months from March on have 153 days in each five.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_as_on_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000000000"),
            (951_782_400, "2000-02-29T00:00:00.000000000"),
            (951_868_799, "2000-02-29T23:59:59.000000000"),
            (1_709_164_800, "2024-02-29T00:00:00.000000000"),
            (1_795_406_400, "2026-11-23T04:00:00.000000000"),
            (4_107_542_400, "2100-03-01T00:00:00.000000000"),
        ] {
            assert_eq!(Timestamp(Duration::from_secs(seconds)).to_string(), text);
        }
        assert!(
            Timestamp(Duration::new(0, 42))
                .to_string()
                .ends_with(".000000042")
        );
    }
}
