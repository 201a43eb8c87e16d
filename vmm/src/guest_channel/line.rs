//! What the guest says: bytes become lines, and lines what they mean.

use std::fmt;
use std::io;
use std::str::FromStr;

use rustix::rand::{GetRandomFlags, getrandom};

/// The longest line, without its end. The longest that means something has a reason in it, for people.
pub const LINE_BYTES_MAX: usize = 256;

/// The version of the protocol that is spoken here.
const VERSION: u32 = 1;

/// Which snapshot is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HookId(u64);

impl HookId {
    /// One that nobody has had.
    ///
    /// # Errors
    /// When the kernel gives no randomness.
    pub fn new() -> io::Result<Self> {
        Ok(Self(u64::from_ne_bytes(random()?)))
    }
}

impl fmt::Display for HookId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A text that names no snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("16 hexadecimal digits name a snapshot")]
pub struct BadHookId;

impl FromStr for HookId {
    type Err = BadHookId;

    fn from_str(text: &str) -> Result<Self, BadHookId> {
        let is_digit = |c: u8| matches!(c, b'0'..=b'9' | b'a'..=b'f');
        if text.len() != 16 || !text.bytes().all(is_digit) {
            return Err(BadHookId);
        }
        u64::from_str_radix(text, 16).map(Self).map_err(|_| BadHookId)
    }
}

/// What tells a machine that was resumed from an image from all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generation(u128);

impl Generation {
    /// One that no machine has had.
    ///
    /// # Errors
    /// When the kernel gives no randomness.
    pub fn new() -> io::Result<Self> {
        Ok(Self(u128::from_ne_bytes(random()?)))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// So few bytes come whole.
fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    match getrandom(&mut bytes, GetRandomFlags::empty())? {
        all if all == N => Ok(bytes),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// What a line of the guest's means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromGuest {
    /// An agent is there.
    Hello,
    /// What was asked for is done.
    Ready(HookId),
    /// It cannot be done, and why: printable, but the guest's words.
    Failed(HookId, String),
    /// The agent ends.
    Bye,
}

impl FromGuest {
    /// Reads a line without its end; `None` if it is none of this protocol's.
    #[must_use]
    pub fn parse(line: &[u8]) -> Option<Self> {
        let line = std::str::from_utf8(line).ok()?;
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "hello" => {
                let version = rest.split(' ').next()?;
                (version.parse() == Ok(VERSION)).then_some(Self::Hello)
            }
            "ready" => Some(Self::Ready(rest.parse().ok()?)),
            "failed" => {
                let (id, reason) = rest.split_once(' ').unwrap_or((rest, ""));
                Some(Self::Failed(id.parse().ok()?, printable(reason)))
            }
            "bye" if rest.is_empty() => Some(Self::Bye),
            _ => None,
        }
    }
}

/// Nothing of the guest's moves a cursor on the terminal of whoever reads it.
fn printable(text: &str) -> String {
    let shown = |c: char| if c == ' ' || c.is_ascii_graphic() { c } else { '?' };
    text.chars().map(shown).collect()
}

/// A line that has come to its end.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// All of it, without its end.
    Whole(Vec<u8>),
    /// It was longer than [`LINE_BYTES_MAX`], and is forgotten.
    Overlong,
}

/// Cuts what the guest says into lines.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Lines {
    /// What there is of a line whose end has not come.
    pub(super) partial: Vec<u8>,
    /// That line is longer than it may be.
    pub(super) is_overlong: bool,
}

impl Lines {
    /// One byte more. A line if that was its end; those of nothing are left out.
    pub(super) fn push(&mut self, byte: u8) -> Option<Line> {
        if byte == b'\n' {
            let mut line = std::mem::take(&mut self.partial);
            if std::mem::take(&mut self.is_overlong) {
                return Some(Line::Overlong);
            }
            // A terminal that was not told otherwise ends lines so.
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            return (!line.is_empty()).then_some(Line::Whole(line));
        }
        if self.partial.len() == LINE_BYTES_MAX {
            self.is_overlong = true;
        } else {
            self.partial.push(byte);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &[u8]) -> Vec<Line> {
        let mut lines = Lines::default();
        text.iter().filter_map(|byte| lines.push(*byte)).collect()
    }

    #[test]
    fn lines_mean_what_the_protocol_says_and_others_nothing() {
        let id = HookId(0x1f);
        for (line, meaning) in [
            ("hello 1", FromGuest::Hello),
            ("hello 1 web, by hand", FromGuest::Hello),
            ("ready 000000000000001f", FromGuest::Ready(id)),
            (
                "failed 000000000000001f no room \u{1b}[2J\u{fc}",
                FromGuest::Failed(id, "no room ?[2J?".into()),
            ),
            ("failed 000000000000001f", FromGuest::Failed(id, String::new())),
            ("bye", FromGuest::Bye),
        ] {
            assert_eq!(FromGuest::parse(line.as_bytes()), Some(meaning), "{line}");
        }
        for line in [
            "hello",
            "hello 2",
            "hello  1",
            "HELLO 1",
            "ready",
            "ready 1f",
            "ready 000000000000001F",
            "ready +00000000000001f",
            "ready 000000000000001f ",
            "bye bye",
            "prepare 000000000000001f 5000",
            "resumed 000000000000001f",
        ] {
            assert_eq!(FromGuest::parse(line.as_bytes()), None, "{line}");
        }
        assert_eq!(FromGuest::parse(b"failed \xff"), None);
    }

    #[test]
    fn lines_are_cut_at_their_cap_and_the_next_one_is_whole_again() {
        let longest = vec![b'a'; LINE_BYTES_MAX];
        let mut text = longest.clone();
        text.push(b'\n');
        text.extend(vec![b'b'; LINE_BYTES_MAX + 1]);
        text.extend(b"\n\n\r\nbye\r\n");
        assert_eq!(
            lines(&text),
            [Line::Whole(longest), Line::Overlong, Line::Whole(b"bye".to_vec())]
        );
        let mut endless = Lines::default();
        assert!((0..1_000_000).all(|_| endless.push(b'x').is_none()));
        assert_eq!(endless.partial.len(), LINE_BYTES_MAX);
    }

    #[test]
    fn names_come_back_as_they_were_written_and_are_never_the_same() {
        let (first, second) = (HookId::new().unwrap(), HookId::new().unwrap());
        assert_ne!(first, second);
        assert_eq!(first.to_string().parse(), Ok(first));
        assert_eq!(Generation::new().unwrap().to_string().len(), 32);
        assert_ne!(Generation::new().unwrap(), Generation::new().unwrap());
    }
}
