//! What an image holds of the channel, beside the registers of its port: whether an agent is there, and the line that
//! the guest was saying.
//!
//! What was asked is not in it: an image is another machine, which is told that it was restored.

use runnel_snapshot::machine::Paused;
use runnel_snapshot::section::Section;
use serde::{Deserialize, Serialize};

use super::conversation::Conversation;
use super::line::{Generation, LINE_BYTES_MAX, Lines};
use super::port::{GuestChannel, GuestChannelError};

/// [`GuestChannel`] as plain data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChannelState {
    /// Whether an agent has announced itself.
    pub has_agent: bool,
    /// What the guest had said of a line.
    pub line: Vec<u8>,
    /// That line is too long to mean anything.
    pub is_overlong: bool,
}

impl Section for GuestChannel {
    const KIND: &'static str = "guest-channel";
    const VERSION: u32 = 1;
    type State = ChannelState;
    type Deps = ();
    type Error = GuestChannelError;

    fn save(&self, _: &Paused<'_>) -> Result<ChannelState, GuestChannelError> {
        let conversation = self.conversation();
        Ok(ChannelState {
            has_agent: conversation.has_agent,
            line: conversation.lines.partial.clone(),
            is_overlong: conversation.lines.is_overlong,
        })
    }

    fn restore((): (), state: ChannelState) -> Result<Self, GuestChannelError> {
        if state.line.len() > LINE_BYTES_MAX {
            return Err(GuestChannelError::Line(state.line.len()));
        }
        let lines = Lines {
            partial: state.line,
            is_overlong: state.is_overlong,
        };
        let conversation = Conversation::going_on(lines, state.has_agent);
        let generation = Generation::new().map_err(GuestChannelError::Random)?;
        Self::with(conversation, Some(generation))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::sync::atomic::Ordering;
    use std::time::Duration;

    use super::*;
    use crate::guest_channel::{Answer, HookId};

    fn save(channel: &GuestChannel) -> ChannelState {
        let state = channel.save(&Paused::until(|| ())).unwrap();
        // Through JSON, as an image has it.
        serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap()
    }

    #[test]
    fn an_agent_and_the_line_that_it_was_saying_are_there_after_a_restore() {
        let channel = GuestChannel::new().unwrap();
        channel.sink().write_all(b"hello 1\nrea").unwrap();

        let restored = GuestChannel::restore((), save(&channel)).unwrap();

        assert!(restored.has_agent().load(Ordering::Relaxed));
        assert_eq!(save(&restored), save(&channel));
        let id = HookId::new().unwrap();
        restored.ask(id, Duration::from_secs(1)).unwrap();
        restored
            .sink()
            .write_all(format!("dy {id}\n").as_bytes())
            .unwrap();
        assert_eq!(restored.answer(Duration::ZERO), Some(Answer::Ready));
    }

    #[test]
    fn what_was_asked_of_the_saved_machine_is_not_asked_of_the_restored_one() {
        let channel = GuestChannel::new().unwrap();
        channel.sink().write_all(b"hello 1\n").unwrap();
        let id = HookId::new().unwrap();
        channel.ask(id, Duration::from_secs(1)).unwrap();

        let restored = GuestChannel::restore((), save(&channel)).unwrap();

        restored
            .sink()
            .write_all(format!("ready {id}\n").as_bytes())
            .unwrap();
        assert_eq!(restored.answer(Duration::ZERO), None);
        assert_eq!(restored.conversation().ignored_lines(), 1);
        restored.let_go();
        assert!(!restored.conversation().has_more());
    }

    #[test]
    fn a_line_that_is_longer_than_lines_are_is_refused() {
        let state = |bytes| ChannelState {
            has_agent: true,
            line: vec![b'x'; bytes],
            is_overlong: false,
        };
        assert!(GuestChannel::restore((), state(LINE_BYTES_MAX)).is_ok());
        let refused = GuestChannel::restore((), state(LINE_BYTES_MAX + 1));
        assert!(matches!(refused, Err(GuestChannelError::Line(257))));
    }
}
