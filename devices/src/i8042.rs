//! The keyboard controller of a PC, as far as a machine without a keyboard needs it: `reboot=k` resets by it.
//!
//! A guest that writes 0xfe to the command port pulls the reset line, and the monitor hears of it through an event.
//! The status port says «nothing to read, ready for commands», so that a guest that polls it before a command does
//! not wait in vain. Everything else is ignored. The controller has no state to save.

use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::bus::{BusDevice, Offset};

/// Addresses that the controller answers at: 0x60 to 0x64 of a PC.
pub const ADDRESS_COUNT: u64 = 5;

/// Where in that range commands are written and the status is read: port 0x64.
const COMMAND: Offset = Offset(4);

/// «Pulse output line 0», which is the processor's reset.
const RESET: u8 = 0xfe;

/// The controller. See the module documentation.
#[derive(Debug)]
pub struct I8042 {
    reset: EventFd,
    /// Kept beside the event, whose reader consumes it.
    was_reset: AtomicBool,
}

impl I8042 {
    /// A controller that signals `reset` when the guest asks for a reset.
    #[must_use]
    pub fn new(reset: EventFd) -> Self {
        Self {
            reset,
            was_reset: AtomicBool::new(false),
        }
    }

    /// Whether the guest has asked for a reset.
    #[must_use]
    pub fn was_reset(&self) -> bool {
        self.was_reset.load(Ordering::Acquire)
    }
}

impl BusDevice for I8042 {
    fn read(&self, _: Offset, data: &mut [u8]) {
        // Both the status and the data port: no byte waits, no command is in progress.
        data.fill(0);
    }

    fn write(&self, offset: Offset, data: &[u8]) {
        if offset == COMMAND && data == [RESET] {
            self.was_reset.store(true, Ordering::Release);
            if let Err(error) = self.reset.write(1) {
                tracing::error!(%error, "the guest's reset could not be signalled");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[test]
    fn only_the_reset_command_at_the_command_port_resets() {
        let reset = EventFd::new(EFD_NONBLOCK).unwrap();
        let controller = I8042::new(reset.try_clone().unwrap());

        controller.write(Offset(0), &[RESET]);
        controller.write(COMMAND, &[0xaa]);
        controller.write(COMMAND, &[RESET, 0]);
        assert!(reset.read().is_err() && !controller.was_reset());

        controller.write(COMMAND, &[RESET]);
        assert!(reset.read().is_ok() && controller.was_reset());
    }

    #[test]
    fn the_status_never_makes_a_guest_wait() {
        let controller = I8042::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let mut status = [0xff];
        controller.read(COMMAND, &mut status);
        assert_eq!(status, [0]);
    }
}
