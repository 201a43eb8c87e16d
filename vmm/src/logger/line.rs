//! One line of the log.

use std::error::Error;
use std::fmt::{self, Write};
use std::thread;

use runnel_snapshot::causes::with_causes;
use tracing::Event;
use tracing::field::{Field, Visit};

use super::timestamp::Timestamp;
use crate::config::InstanceId;

/// Bytes of a message that are written: an API body can be 50 KiB.
const MESSAGE_BYTES_MAX: usize = 8 << 10;

/// Time, instance, thread, what else is wanted, and the message.
pub(super) fn of(event: &Event<'_>, id: &InstanceId, show_level: bool, show_origin: bool) -> String {
    let metadata = event.metadata();
    let mut line = String::new();
    let thread = thread::current();
    let thread = thread.name().unwrap_or("-");
    // Writing to a String does not fail.
    let _ = write!(line, "{} [{id}:{thread}", Timestamp::now());
    if show_level {
        let _ = write!(line, ":{}", metadata.level());
    }
    if show_origin {
        let (file, number) = (metadata.file().unwrap_or("?"), metadata.line().unwrap_or(0));
        let _ = write!(line, ":{file}:{number}");
    }
    line.push_str("] ");
    let mut message = Message::default();
    event.record(&mut message);
    line.push_str(&message.finish());
    line.push('\n');
    line
}

#[derive(Default)]
struct Message {
    text: String,
    fields: String,
}

impl Visit for Message {
    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.record_debug(field, &format_args!("{}", with_causes(value)));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.text, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

impl Message {
    /// The message and its fields, on one line: what a guest or a client says cannot begin another.
    fn finish(self) -> String {
        let mut text = self.text + &self.fields;
        if text.len() > MESSAGE_BYTES_MAX {
            let end = (0..=MESSAGE_BYTES_MAX)
                .rev()
                .find(|&end| text.is_char_boundary(end))
                .unwrap_or(0);
            text.truncate(end);
            text.push('…');
        }
        if text.contains(|c: char| c.is_control()) {
            text = text
                .chars()
                .flat_map(|c| {
                    if c.is_control() {
                        c.escape_default().collect()
                    } else {
                        vec![c]
                    }
                })
                .collect();
        }
        text
    }
}
