//! Sizes and durations as people write and read them.

use std::num::NonZero;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Text that is no size or duration.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BadQuantity {
    /// No size.
    #[error("{0:?} is no size: give a number with K, M, G or T (powers of 1024), as in 512M")]
    Size(String),
    /// No whole number of MiB.
    #[error(
        "{0:?} is no size of guest memory: give a whole number of MiB, or one with its unit, as in 512, 512M or 2G"
    )]
    Mebibytes(String),
    /// No duration.
    #[error("{0:?} is no duration: give a number with ms, s, m, h or d, as in 30s")]
    Duration(String),
    /// A number alone.
    #[error("{0} of what? Give it with its unit, ms, s, m, h or d, as in {0}s")]
    Unitless(u64),
}

/// Divides text into its number and its unit.
fn split(text: &str) -> Option<(u64, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number = text[..end].parse().ok()?;
    Some((number, text[end..].trim()))
}

/// Reads `512M`, `2GiB`, `4096`.
///
/// # Errors
/// When it is no size, or beyond 64 bits.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, BadQuantity> {
    let bad = || BadQuantity::Size(text.to_owned());
    let (number, unit) = split(text).ok_or_else(bad)?;
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err(bad()),
    };
    number.checked_mul(1 << shift).ok_or_else(bad)
}

/// Reads a size of guest memory: a bare number is MiB, as in Firecracker's configuration.
///
/// # Errors
/// When it is no size, or not a whole number of MiB.
pub(crate) fn parse_mebibytes(text: &str) -> Result<u64, BadQuantity> {
    if let Ok(mib) = text.parse() {
        return Ok(mib);
    }
    let bytes = parse_bytes(text).ok().filter(|bytes| bytes % (1 << 20) == 0);
    let bytes = bytes.ok_or_else(|| BadQuantity::Mebibytes(text.to_owned()))?;
    Ok(bytes >> 20)
}

/// Reads `30s`, `500ms`, `7d`.
///
/// # Errors
/// When it is no duration.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, BadQuantity> {
    let bad = || BadQuantity::Duration(text.to_owned());
    let (number, unit) = split(text).ok_or_else(bad)?;
    let unit_ms: u64 = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        // `30` may be meant as days where images are removed: nobody guesses.
        "" => return Err(BadQuantity::Unitless(number)),
        _ => return Err(bad()),
    };
    number
        .checked_mul(unit_ms)
        .map(Duration::from_millis)
        .ok_or_else(bad)
}

/// `1.5 GiB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    // 1023.95 would be printed as 1024.0.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value >= 99.95 || value.fract() == 0.0 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// `3d 4h`, `12m 5s`, `8s`: the two largest units.
pub(crate) fn duration(of: Duration) -> String {
    let seconds = of.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, _, _) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

/// `37.2 %`; nothing of nothing is everything.
pub(crate) fn share(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "100 %".to_owned();
    }
    // Never rounded up to a whole that is not one.
    let tenths = u128::from(part) * 1000 / u128::from(whole);
    match tenths {
        1000.. => "100 %".to_owned(),
        0 => "0 %".to_owned(),
        _ => format!("{}.{} %", tenths / 10, tenths % 10),
    }
}

/// `2026-11-23 14:05:09 UTC`, of milliseconds since 1970.
pub(crate) fn instant(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000;
    let (year, month, day) = civil_date(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

/// `2026-11-23T14:05:09Z` (RFC 3339), for scripts.
pub(crate) fn timestamp(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let text = instant(u64::try_from(since.as_millis()).unwrap_or(u64::MAX));
    text.replacen(' ', "T", 1).replace(" UTC", "Z")
}

/// The Gregorian date of a day counted from 1970, by eras of 400 years that begin in March.
fn civil_date(days: u64) -> (u64, u64, u64) {
    const DAYS_TO_1970: u64 = 719_468;
    const ERA_DAYS: u64 = 146_097;
    let days = days + DAYS_TO_1970;
    let (era, day) = (days / ERA_DAYS, days % ERA_DAYS);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    (era * 400 + year + u64::from(month <= 2), month, day_of_month)
}

/// A number of things of which there must be one.
///
/// # Errors
/// When it is 0 or no number.
pub(crate) fn parse_count(text: &str) -> Result<NonZero<usize>, &'static str> {
    text.parse().map_err(|_| "a whole number is needed, at least 1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_units() {
        for (text, expected) in [
            ("0", 0),
            ("4096", 4096),
            ("16K", 16 << 10),
            ("512M", 512 << 20),
            ("2GiB", 2 << 30),
            ("1 T", 1 << 40),
        ] {
            assert_eq!(parse_bytes(text).unwrap(), expected, "{text}");
        }
        for text in [
            "",
            "M",
            "-1",
            "1.5G",
            "12X",
            "99999999999T",
            "18446744073709551616",
        ] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn memory_is_counted_in_mebibytes() {
        for (text, expected) in [("512", 512), ("512M", 512), ("2G", 2048), ("1048576K", 1024)] {
            assert_eq!(parse_mebibytes(text).unwrap(), expected, "{text}");
        }
        for text in ["1000K", "lots", "512X", ""] {
            assert!(
                matches!(parse_mebibytes(text), Err(BadQuantity::Mebibytes(_))),
                "{text}"
            );
        }
    }

    #[test]
    fn durations_are_read_and_written() {
        assert_eq!(parse_duration("30s").unwrap(), Duration::from_secs(30));
        let unitless = parse_duration("30").unwrap_err().to_string();
        assert!(unitless.ends_with("as in 30s"), "{unitless}");
        assert_eq!(parse_duration("250ms").unwrap(), Duration::from_millis(250));
        assert_eq!(parse_duration("7d").unwrap(), Duration::from_secs(7 * 86_400));
        assert!(parse_duration("soon").is_err());
        let written = [8, 725, 7260, 273_600].map(|seconds| duration(Duration::from_secs(seconds)));
        assert_eq!(written, ["8s", "12m 5s", "2h 1m", "3d 4h"]);
    }

    #[test]
    fn sizes_are_written_with_three_digits() {
        for (count, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (512 << 20, "512 MiB"),
            ((1 << 30) - 1, "1.0 GiB"),
            (u64::MAX, "16384 PiB"),
        ] {
            assert_eq!(bytes(count), expected);
        }
    }

    #[test]
    fn a_share_is_whole_only_if_nothing_is_missing() {
        assert_eq!(share(999_999, 1_000_000), "99.9 %");
        assert_eq!(share(5, 5), "100 %");
        assert_eq!(share(0, 0), "100 %");
        assert_eq!(share(0, 9), "0 %");
        assert_eq!(share(u64::MAX / 2, u64::MAX), "49.9 %");
    }

    #[test]
    fn instants_are_dates() {
        assert_eq!(instant(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(instant(951_782_400_000), "2000-02-29 00:00:00 UTC");
        assert_eq!(instant(1_700_000_000_999), "2023-11-14 22:13:20 UTC");
        assert_eq!(
            timestamp(UNIX_EPOCH + Duration::from_secs(951_782_400)),
            "2000-02-29T00:00:00Z"
        );
        assert_eq!(instant(4_107_542_399_000), "2100-02-28 23:59:59 UTC");
    }
}
