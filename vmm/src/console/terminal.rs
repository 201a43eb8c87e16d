//! The terminal in raw mode: every key goes to the guest, Ctrl+C included.

use std::fs::File;

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

/// A terminal in raw mode; as it was again once this is dropped.
#[derive(Debug)]
pub(super) struct RawTerminal {
    terminal: File,
    before: Termios,
}

impl RawTerminal {
    /// Puts `input` into raw mode, if it is a terminal.
    pub(super) fn enter(input: &File) -> Option<Self> {
        if !isatty(input) {
            return None;
        }
        let terminal = input.try_clone().ok()?;
        let before = tcgetattr(&terminal).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        // Output is still processed: what the monitor itself says is made for terminals.
        raw.output_modes = before.output_modes;
        tcsetattr(&terminal, OptionalActions::Now, &raw).ok()?;
        Some(Self { terminal, before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // If it is gone, so is whom it would matter to.
        let _ = tcsetattr(&self.terminal, OptionalActions::Now, &self.before);
    }
}
