//! `Range` of a request (RFC 9110 §14.2): one range of bytes; everything else is as if it had not been asked for.

use runnel_snapshot::units::ByteRange;

/// What a `Range` comes to, given the length of what it is a range of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// All of it: no range, several, or text that is none. The RFC lets a server ignore these.
    Whole,
    /// These bytes, at least one.
    Part(ByteRange),
    /// A range that begins behind the end.
    Beyond,
}

/// Reads a `Range` header.
pub(super) fn parse(header: Option<&[u8]>, len: u64) -> Asked {
    let asked = header
        .and_then(|value| std::str::from_utf8(value).ok())
        .and_then(|text| text.trim().strip_prefix("bytes="))
        .and_then(|range| range.trim().split_once('-'));
    let Some((first, last)) = asked else {
        return Asked::Whole;
    };
    match (number(first), number(last)) {
        (Some(first), Some(last)) if first <= last => part(first, last, len),
        (Some(first), None) if last.is_empty() => part(first, u64::MAX, len),
        // The last bytes, however many there are.
        (None, Some(count)) if first.is_empty() => match count.min(len) {
            0 => Asked::Beyond,
            count => part(len - count, u64::MAX, len),
        },
        _ => Asked::Whole,
    }
}

/// Digits alone: `parse` would also take a sign.
fn number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit());
    digits.then(|| text.parse().unwrap_or(u64::MAX))
}

fn part(first: u64, last: u64, len: u64) -> Asked {
    if first >= len {
        return Asked::Beyond;
    }
    Asked::Part(ByteRange {
        start: first,
        len: last.min(len - 1) - first + 1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_range_is_understood_and_cut_at_the_end() {
        let part = |start, len| Asked::Part(ByteRange { start, len });
        for (text, expected) in [
            ("bytes=0-0", part(0, 1)),
            ("bytes=2-5", part(2, 4)),
            ("bytes=2-", part(2, 8)),
            ("bytes=-3", part(7, 3)),
            ("bytes=-30", part(0, 10)),
            ("bytes=9-99999999999999999999999", part(9, 1)),
            ("bytes=10-", Asked::Beyond),
            ("bytes=10-12", Asked::Beyond),
            ("bytes=-0", Asked::Beyond),
        ] {
            assert_eq!(parse(Some(text.as_bytes()), 10), expected, "{text}");
        }
        assert_eq!(parse(Some(b"bytes=-5"), 0), Asked::Beyond);
    }

    #[test]
    fn what_is_not_one_range_is_ignored() {
        for text in [
            "",
            "bytes=",
            "bytes=-",
            "bytes=5-2",
            "bytes=+1-2",
            "bytes=0-1,3-4",
            "pages=0-1",
            "bytes=a-b",
        ] {
            assert_eq!(parse(Some(text.as_bytes()), 10), Asked::Whole, "{text}");
        }
        assert_eq!(parse(Some(&[0xff]), 10), Asked::Whole);
        assert_eq!(parse(None, 10), Asked::Whole);
    }
}
