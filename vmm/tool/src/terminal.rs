//! The terminal in raw mode: every key goes to the guest, Ctrl-C too.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

/// A terminal in raw mode until this is dropped.
#[derive(Debug)]
pub(crate) struct RawTerminal {
    terminal: OwnedFd,
    before: Termios,
}

impl RawTerminal {
    /// Puts a terminal into raw mode; nothing, if `stream` is none.
    ///
    /// # Errors
    /// When the terminal cannot be set.
    pub(crate) fn enter(stream: impl AsFd) -> io::Result<Option<Self>> {
        if !isatty(&stream) {
            return Ok(None);
        }
        let terminal = stream.as_fd().try_clone_to_owned()?;
        let before = tcgetattr(&terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&terminal, OptionalActions::Drain, &raw)?;
        Ok(Some(Self { terminal, before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // A terminal that has hung up wants no settings.
        let _ = tcsetattr(&self.terminal, OptionalActions::Drain, &self.before);
    }
}
