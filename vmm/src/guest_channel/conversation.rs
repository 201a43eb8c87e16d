//! Who is there, what was asked, and what is still to be sent: the protocol without threads and clocks.

use std::collections::VecDeque;
use std::time::Duration;

use super::line::{FromGuest, Generation, HookId, Line, Lines};

/// How much is kept for a guest that does not read. More than anybody has to be told at once: one `restored`, and one
/// `prepare` with its `resumed`.
pub const OUTBOX_BYTES_MAX: usize = 1024;

/// What is kept free for `resumed`, which must follow each `prepare`.
const RESUMED_BYTES: usize = "resumed \n".len() + 16;

/// What the guest said to what it was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is ready.
    Ready,
    /// It cannot, and why.
    Failed(String),
}

/// Why the guest was not asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAsked {
    /// Nobody is there.
    #[error("no agent in the guest has announced itself on the guest channel; the machine runs on")]
    Nobody,
    /// It has not read what it was told before.
    #[error("the guest's agent does not read what it is told; the machine runs on")]
    Deaf,
}

/// What was asked and has not been taken back by `resumed`.
#[derive(Clone, Debug)]
struct Asked {
    id: HookId,
    answer: Option<Answer>,
}

/// What a line, or the end of one, came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// There is no line yet.
    Nothing,
    /// It changed something.
    News,
    /// It is no line of the protocol, or it comes too late; what there is of it.
    Ignored(Vec<u8>),
}

/// One guest's conversation.
#[derive(Clone, Debug, Default)]
pub struct Conversation {
    pub(super) lines: Lines,
    pub(super) has_agent: bool,
    asked: Option<Asked>,
    pub(super) outbox: VecDeque<u8>,
    ignored_lines: u64,
}

impl Conversation {
    /// One that goes on, nothing of which was asked.
    pub(super) fn going_on(lines: Lines, has_agent: bool) -> Self {
        Self {
            lines,
            has_agent,
            ..Self::default()
        }
    }

    /// Hears one byte of the guest's.
    pub(super) fn hear(&mut self, byte: u8) -> Heard {
        let line = match self.lines.push(byte) {
            None => return Heard::Nothing,
            Some(Line::Overlong) => return self.ignore(Vec::new()),
            Some(Line::Whole(line)) => line,
        };
        match (FromGuest::parse(&line), &mut self.asked) {
            (Some(FromGuest::Hello), asked) => {
                self.has_agent = true;
                // Who began anew has prepared nothing.
                fail(asked, "the agent in the guest was started again meanwhile");
                Heard::News
            }
            (Some(FromGuest::Bye), asked) => {
                self.has_agent = false;
                fail(asked, "the agent in the guest has ended");
                Heard::News
            }
            (Some(FromGuest::Ready(id)), Some(asked)) if asked.id == id && asked.answer.is_none() => {
                asked.answer = Some(Answer::Ready);
                Heard::News
            }
            (Some(FromGuest::Failed(id, why)), Some(asked)) if asked.id == id && asked.answer.is_none() => {
                asked.answer = Some(Answer::Failed(why));
                Heard::News
            }
            _ => self.ignore(line),
        }
    }

    fn ignore(&mut self, line: Vec<u8>) -> Heard {
        self.ignored_lines = self.ignored_lines.saturating_add(1);
        Heard::Ignored(line)
    }

    /// Asks the guest to prepare for the snapshot `id`. [`let_go`](Self::let_go) takes it back.
    ///
    /// # Errors
    /// When nobody is there who could be asked.
    pub fn ask(&mut self, id: HookId, deadline: Duration) -> Result<(), NotAsked> {
        if !self.has_agent {
            return Err(NotAsked::Nobody);
        }
        self.let_go();
        let prepare = format!("prepare {id} {}\n", deadline.as_millis());
        if self.outbox.len() + prepare.len() + RESUMED_BYTES > OUTBOX_BYTES_MAX {
            return Err(NotAsked::Deaf);
        }
        self.outbox.extend(prepare.bytes());
        self.asked = Some(Asked { id, answer: None });
        Ok(())
    }

    /// What the guest said to what it was asked last, if it has.
    #[must_use]
    pub fn answer(&self) -> Option<&Answer> {
        self.asked.as_ref()?.answer.as_ref()
    }

    /// Tells the guest that the snapshot is over, if it was asked. Whether it was.
    pub fn let_go(&mut self) -> bool {
        let Some(asked) = self.asked.take() else {
            return false;
        };
        self.outbox.extend(format!("resumed {}\n", asked.id).bytes());
        true
    }

    /// Tells the guest that it goes on from an image. Before anything else: there is room for it.
    pub fn restored(&mut self, generation: Generation) {
        // The port may hold the half of a line, which ends here.
        self.outbox.extend(format!("\nrestored {generation}\n").bytes());
    }

    /// Takes what is to be sent, as much as fits into `buffer`; how much that is.
    pub fn take(&mut self, buffer: &mut [u8]) -> usize {
        let bytes = buffer.len().min(self.outbox.len());
        for (to, from) in buffer.iter_mut().zip(self.outbox.drain(..bytes)) {
            *to = from;
        }
        bytes
    }

    /// Whether something is to be sent.
    #[must_use]
    pub fn has_more(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Whether an agent is there.
    #[must_use]
    pub fn has_agent(&self) -> bool {
        self.has_agent
    }

    /// How many lines were ignored.
    #[must_use]
    pub fn ignored_lines(&self) -> u64 {
        self.ignored_lines
    }
}

fn fail(asked: &mut Option<Asked>, why: &str) {
    if let Some(asked) = asked {
        asked.answer = Some(Answer::Failed(why.to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest_channel::LINE_BYTES_MAX;

    const DEADLINE: Duration = Duration::from_secs(5);

    fn say(conversation: &mut Conversation, text: &str) {
        for byte in text.bytes() {
            conversation.hear(byte);
        }
    }

    fn with_agent() -> Conversation {
        let mut conversation = Conversation::default();
        say(&mut conversation, "\nhello 1\n");
        conversation
    }

    fn sent(conversation: &mut Conversation) -> String {
        let mut buffer = [0; OUTBOX_BYTES_MAX];
        let bytes = conversation.take(&mut buffer);
        String::from_utf8(buffer[..bytes].to_vec()).unwrap()
    }

    #[test]
    fn nobody_is_asked_before_hello_and_after_bye() {
        let id = HookId::new().unwrap();
        let mut conversation = Conversation::default();
        assert_eq!(conversation.ask(id, DEADLINE), Err(NotAsked::Nobody));
        say(&mut conversation, "hello 1\n");
        assert_eq!(conversation.ask(id, DEADLINE), Ok(()));
        say(&mut conversation, "bye\n");
        assert!(matches!(conversation.answer(), Some(Answer::Failed(_))));
        assert!(conversation.let_go());
        assert_eq!(conversation.ask(id, DEADLINE), Err(NotAsked::Nobody));
    }

    #[test]
    fn a_guest_is_asked_answers_and_is_let_go_once() {
        let id = HookId::new().unwrap();
        for (line, answer) in [
            (format!("ready {id}\n"), Answer::Ready),
            (
                format!("failed {id} no room\n"),
                Answer::Failed("no room".to_owned()),
            ),
        ] {
            let mut conversation = with_agent();
            conversation.ask(id, DEADLINE).unwrap();
            assert_eq!(conversation.answer(), None);
            say(&mut conversation, &line);
            assert_eq!(conversation.answer(), Some(&answer));
            assert!(conversation.let_go() && !conversation.let_go());
            assert_eq!(
                sent(&mut conversation),
                format!("prepare {id} 5000\nresumed {id}\n")
            );
            assert_eq!(conversation.ignored_lines(), 0);
        }
    }

    #[test]
    fn an_answer_to_another_snapshot_is_none() {
        let (old, new) = (HookId::new().unwrap(), HookId::new().unwrap());
        let mut conversation = with_agent();
        conversation.ask(old, DEADLINE).unwrap();
        conversation.let_go();
        conversation.ask(new, DEADLINE).unwrap();
        say(&mut conversation, &format!("ready {old}\nfailed {old} late\n"));
        assert_eq!(conversation.answer(), None);
        assert_eq!(conversation.ignored_lines(), 2);
        say(
            &mut conversation,
            &format!("ready {new}\nfailed {new} after all\n"),
        );
        assert_eq!(
            conversation.answer(),
            Some(&Answer::Ready),
            "the first one counts"
        );
    }

    #[test]
    fn garbage_and_overlong_lines_are_counted_and_hide_no_answer() {
        let id = HookId::new().unwrap();
        let mut conversation = with_agent();
        conversation.ask(id, DEADLINE).unwrap();
        let overlong = "ready ".repeat(LINE_BYTES_MAX);
        say(
            &mut conversation,
            &format!("login: \u{1b}[0m\n{overlong}\nprepare {id} 5000\nready {id}\n"),
        );
        assert_eq!(conversation.ignored_lines(), 3);
        assert_eq!(conversation.answer(), Some(&Answer::Ready));
    }

    #[test]
    fn an_agent_that_begins_anew_has_prepared_nothing() {
        let id = HookId::new().unwrap();
        let mut conversation = with_agent();
        conversation.ask(id, DEADLINE).unwrap();
        say(&mut conversation, &format!("ready {id}\nhello 1\n"));
        assert!(matches!(conversation.answer(), Some(Answer::Failed(_))));
    }

    #[test]
    fn a_guest_that_does_not_read_is_not_told_more_than_there_is_room_for() {
        let mut conversation = with_agent();
        conversation.restored(Generation::new().unwrap());
        let mut asked = 0;
        while conversation.ask(HookId::new().unwrap(), DEADLINE).is_ok() {
            conversation.let_go();
            asked += 1;
            assert!(asked < OUTBOX_BYTES_MAX);
        }
        assert!(conversation.outbox.len() <= OUTBOX_BYTES_MAX);
        assert_eq!(
            conversation.ask(HookId::new().unwrap(), DEADLINE),
            Err(NotAsked::Deaf)
        );
        let all = sent(&mut conversation);
        assert_eq!(all.matches("prepare").count(), all.matches("resumed").count());
        assert_eq!(
            conversation.ask(HookId::new().unwrap(), DEADLINE),
            Ok(()),
            "it has read"
        );
    }

    #[test]
    fn a_machine_that_goes_on_from_an_image_is_told_on_a_line_of_its_own() {
        let generation = Generation::new().unwrap();
        let mut conversation = Conversation::default();
        conversation.restored(generation);
        assert_eq!(
            sent(&mut conversation),
            format!("\nrestored {generation}\n"),
            "whether an agent has announced itself or not"
        );
        assert!(!conversation.has_more());
    }
}
