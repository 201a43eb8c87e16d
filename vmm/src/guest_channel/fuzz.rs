//! What is heard of a guest, for whoever lets it say strange things.

use std::time::Duration;

use super::conversation::Heard;
use super::{Answer, Conversation, FromGuest, HookId, LINE_BYTES_MAX, OUTBOX_BYTES_MAX};

/// The snapshot that the guest is asked about whenever it can be.
const ASKED: &str = "0123456789abcdef";

/// Hears `bytes`, and asks after each line. Whether the last line was understood.
///
/// # Panics
/// When more is kept than there is a cap for, or one reader disagrees with the other.
#[must_use]
pub fn hears(bytes: &[u8]) -> bool {
    let id: HookId = ASKED.parse().expect("it names a snapshot");
    let mut conversation = Conversation::default();
    let mut is_understood = false;
    let mut line = Vec::new();
    for byte in bytes {
        let heard = conversation.hear(*byte);
        assert!(conversation.lines.partial.len() <= LINE_BYTES_MAX);
        if *byte != b'\n' {
            assert_eq!(heard, Heard::Nothing);
            line.push(*byte);
            continue;
        }
        is_understood = heard == Heard::News;
        if is_understood {
            let plain = line.strip_suffix(b"\r").unwrap_or(&line);
            assert!(FromGuest::parse(plain).is_some(), "{plain:?}");
        }
        line.clear();
        if let Some(Answer::Failed(why)) = conversation.answer() {
            assert!(why.len() <= LINE_BYTES_MAX && why.chars().all(|c| c == ' ' || c.is_ascii_graphic()));
        }
        // Nobody reads: what waits to be sent must not grow without end.
        if conversation.answer().is_some() {
            conversation.let_go();
        }
        let _ = conversation.ask(id, Duration::MAX);
        conversation.let_go();
        let _ = conversation.ask(id, Duration::ZERO);
        assert!(conversation.outbox.len() <= OUTBOX_BYTES_MAX);
    }
    conversation.take(&mut [0; OUTBOX_BYTES_MAX]);
    assert!(!conversation.has_more(), "all of it fits");
    is_understood
}
