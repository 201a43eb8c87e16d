//! The keyboard controller of a PC, as far as a machine without a keyboard needs it.
//!
//! A guest that writes 0xfe to the command port pulls the reset line (`reboot=k`), and the monitor hears of it through
//! an event. The one key combination that an operator presses from outside is Ctrl+Alt+Del, which Linux takes for
//! «reboot in good order» ([`I8042::press_ctrl_alt_del`]); for it, the keyboard answers its driver's commands with an
//! acknowledgement, identifies itself, and speaks scan code set 2 without translation.
//!
//! The status port says «ready for commands» at all times, so that a guest that polls it does not wait in vain. There
//! is no mouse port.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::bus::{BusDevice, Offset};
use crate::interrupt::Interrupt;

mod state;

pub use state::{I8042Deps, I8042State};

/// Addresses that the controller answers at: 0x60 to 0x64 of a PC.
pub const ADDRESS_COUNT: u64 = 5;

/// Where in that range data passes: port 0x60.
const DATA: Offset = Offset(0);
/// Where commands are written and the status is read: port 0x64.
const COMMAND: Offset = Offset(4);

/// Bytes that wait for the guest; more than the longest that is ever sent at once.
const OUTPUT_BYTES_MAX: usize = 16;

/// Commands of the controller.
const READ_CONTROL: u8 = 0x20;
const WRITE_CONTROL: u8 = 0x60;
const READ_OUTPUT_PORT: u8 = 0xd0;
const WRITE_OUTPUT_PORT: u8 = 0xd1;
/// The controller's test of itself, and of the keyboard's wires; what they answer when all is well.
const TEST_CONTROLLER: u8 = 0xaa;
const CONTROLLER_WELL: u8 = 0x55;
const TEST_KEYBOARD: u8 = 0xab;
const KEYBOARD_WELL: u8 = 0;
/// Tests of a mouse port, and its data. Answered at once in a way that says there is none: a driver that hears
/// nothing waits half a second each.
const TEST_MOUSE: u8 = 0xa9;
const MOUSE_STUCK: u8 = 1;
const LOOP_MOUSE: u8 = 0xd3;
const WRITE_MOUSE: u8 = 0xd4;
/// «Pulse output line 0», which is the processor's reset.
const RESET: u8 = 0xfe;

/// The commands whose byte comes next, at the data port.
const COMMANDS_WITH_A_BYTE: [u8; 4] = [WRITE_CONTROL, WRITE_OUTPUT_PORT, LOOP_MOUSE, WRITE_MOUSE];

/// Status: a byte waits at the data port.
const STATUS_OUTPUT_FULL: u8 = 0x01;
/// Status: the next byte to the data port belongs to a command.
const STATUS_COMMAND: u8 = 0x08;
/// Status: the keyboard is not locked.
const STATUS_UNLOCKED: u8 = 0x10;

/// Control: bytes of the keyboard raise the line.
const CONTROL_INTERRUPT: u8 = 0x01;
/// Control: the self-test has passed.
const CONTROL_SYSTEM: u8 = 0x04;

/// What the keyboard answers to every command.
const ACKNOWLEDGE: u8 = 0xfa;
const KEYBOARD_IDENTIFY: u8 = 0xf2;
const KEYBOARD_RESET: u8 = 0xff;

/// Ctrl, Alt and Del pressed, and released in turn: scan code set 2, where 0xf0 is a release.
const CTRL_ALT_DEL: [u8; 11] = [0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14];

/// Why keys are not pressed, or a saved controller is not rebuilt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum I8042Error {
    /// Nobody listens.
    #[error("the guest does not listen to its keyboard: its driver is not loaded, or not yet")]
    NoDriver,
    /// It has not read what came before.
    #[error("the guest has not read {0} bytes of its keyboard yet: try again")]
    Busy(usize),
    /// A saved controller holds more than it can.
    #[error("a saved keyboard controller holds {0} bytes, and has room for {OUTPUT_BYTES_MAX}")]
    Overfull(usize),
    /// A saved controller waits for the byte of a command that takes none.
    #[error("a saved keyboard controller waits for a byte of command {0:#x}, which takes none")]
    Command(u8),
}

/// What the guest can see and change.
#[derive(Debug)]
struct Registers {
    control: u8,
    output_port: u8,
    /// A command whose byte comes next.
    command: Option<u8>,
    /// What waits at the data port.
    output: VecDeque<u8>,
}

/// The controller. See the module documentation.
#[derive(Debug)]
pub struct I8042 {
    reset: EventFd,
    /// Kept beside the event, whose reader consumes it.
    was_reset: AtomicBool,
    /// The keyboard's line.
    interrupt: Option<Interrupt>,
    /// A leaf lock, held for one access.
    registers: Mutex<Registers>,
}

impl I8042 {
    /// A controller that signals `reset` when the guest asks for a reset, and has no line for its keyboard.
    #[must_use]
    pub fn new(reset: EventFd) -> Self {
        Self::assemble(reset, None, Registers::power_on())
    }

    /// A controller with a keyboard.
    #[must_use]
    pub fn with_keyboard(deps: I8042Deps) -> Self {
        Self::assemble(deps.reset, Some(deps.interrupt), Registers::power_on())
    }

    fn assemble(reset: EventFd, interrupt: Option<Interrupt>, registers: Registers) -> Self {
        let registers = Mutex::new(registers);
        Self {
            reset,
            was_reset: AtomicBool::new(false),
            interrupt,
            registers,
        }
    }

    /// Whether the guest has asked for a reset.
    #[must_use]
    pub fn was_reset(&self) -> bool {
        self.was_reset.load(Ordering::Acquire)
    }

    /// Presses Ctrl+Alt+Del and releases it.
    ///
    /// # Errors
    /// When the guest does not listen, or has not read what came before.
    pub fn press_ctrl_alt_del(&self) -> Result<(), I8042Error> {
        let mut registers = self.registers();
        if self.interrupt.is_none() || registers.control & CONTROL_INTERRUPT == 0 {
            return Err(I8042Error::NoDriver);
        }
        if !registers.output.is_empty() {
            return Err(I8042Error::Busy(registers.output.len()));
        }
        registers.output.extend(CTRL_ALT_DEL);
        self.announce(&registers);
        Ok(())
    }

    /// Raises the line once more. Called after a restore, when the interrupt controller has its state back and before
    /// the vCPUs run.
    pub fn reassert(&self) {
        self.announce(&self.registers());
    }

    /// Raises the line if a byte waits and the guest wants to hear of it. A driver reads one byte an interrupt.
    fn announce(&self, registers: &Registers) {
        if let Some(line) = &self.interrupt
            && registers.control & CONTROL_INTERRUPT != 0
            && !registers.output.is_empty()
        {
            line.signal();
        }
    }

    fn pull_reset(&self) {
        self.was_reset.store(true, Ordering::Release);
        if let Err(error) = self.reset.write(1) {
            tracing::error!(%error, "the guest's reset could not be signalled");
        }
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        // Plain values: a panic elsewhere cannot have left them half changed.
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registers {
    fn power_on() -> Self {
        Self {
            control: CONTROL_SYSTEM,
            output_port: 0,
            command: None,
            output: VecDeque::new(),
        }
    }

    fn status(&self) -> u8 {
        let full = if self.output.is_empty() {
            0
        } else {
            STATUS_OUTPUT_FULL
        };
        let command = if self.command.is_some() { STATUS_COMMAND } else { 0 };
        STATUS_UNLOCKED | full | command
    }

    fn take_command(&mut self, command: u8) {
        self.command = None;
        match command {
            READ_CONTROL => self.answer(&[self.control]),
            READ_OUTPUT_PORT => self.answer(&[self.output_port]),
            TEST_CONTROLLER => self.answer(&[CONTROLLER_WELL]),
            TEST_KEYBOARD => self.answer(&[KEYBOARD_WELL]),
            TEST_MOUSE => self.answer(&[MOUSE_STUCK]),
            _ if COMMANDS_WITH_A_BYTE.contains(&command) => self.command = Some(command),
            _ => {}
        }
    }

    fn take_data(&mut self, byte: u8) {
        match self.command.take() {
            Some(WRITE_CONTROL) => self.control = byte,
            Some(WRITE_OUTPUT_PORT) => self.output_port = byte,
            // Not marked as the mouse's, which is what the driver wants to know.
            Some(LOOP_MOUSE) => self.answer(&[byte]),
            Some(WRITE_MOUSE) => {}
            _ => match byte {
                KEYBOARD_IDENTIFY => self.answer(&[ACKNOWLEDGE, 0xab, 0x83]),
                KEYBOARD_RESET => self.answer(&[ACKNOWLEDGE, 0xaa]),
                _ => self.answer(&[ACKNOWLEDGE]),
            },
        }
    }

    /// An answer takes the place of what was not read: the driver has asked for it, and waits for it alone.
    fn answer(&mut self, bytes: &[u8]) {
        self.output.clear();
        self.output.extend(bytes);
    }
}

/// Ports are one byte wide; wider accesses read all ones and write nothing.
impl BusDevice for I8042 {
    fn read(&self, offset: Offset, data: &mut [u8]) {
        let [value] = data else {
            return;
        };
        let mut registers = self.registers();
        *value = match offset {
            COMMAND => registers.status(),
            DATA => {
                let byte = registers.output.pop_front().unwrap_or(0);
                self.announce(&registers);
                byte
            }
            _ => 0,
        };
    }

    fn write(&self, offset: Offset, data: &[u8]) {
        let &[value] = data else {
            return;
        };
        let mut registers = self.registers();
        match offset {
            COMMAND if value == RESET => return self.pull_reset(),
            COMMAND => registers.take_command(value),
            DATA => registers.take_data(value),
            _ => return,
        }
        self.announce(&registers);
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    pub(super) fn deps() -> I8042Deps {
        I8042Deps {
            reset: EventFd::new(EFD_NONBLOCK).unwrap(),
            interrupt: Interrupt::new().unwrap(),
        }
    }

    pub(super) fn read(controller: &I8042, offset: Offset) -> u8 {
        let mut data = [0xee];
        controller.read(offset, &mut data);
        data[0]
    }

    /// Whether the keyboard's line was raised since the last look.
    pub(super) fn raised(controller: &I8042) -> bool {
        controller.interrupt.as_ref().unwrap().event().read().is_ok()
    }

    /// As a driver does it: the interrupt on.
    pub(super) fn listen(controller: &I8042) {
        controller.write(COMMAND, &[WRITE_CONTROL]);
        controller.write(DATA, &[CONTROL_SYSTEM | CONTROL_INTERRUPT]);
    }

    #[test]
    fn only_the_reset_command_at_the_command_port_resets() {
        let reset = EventFd::new(EFD_NONBLOCK).unwrap();
        let controller = I8042::new(reset.try_clone().unwrap());

        controller.write(DATA, &[RESET]);
        controller.write(COMMAND, &[0xaa]);
        controller.write(COMMAND, &[RESET, 0]);
        assert!(reset.read().is_err() && !controller.was_reset());

        controller.write(COMMAND, &[RESET]);
        assert!(reset.read().is_ok() && controller.was_reset());
    }

    #[test]
    fn the_status_never_makes_a_guest_wait() {
        let controller = I8042::new(EventFd::new(EFD_NONBLOCK).unwrap());
        for byte in 0..=0xfd {
            controller.write(COMMAND, &[byte]);
            assert_eq!(
                read(&controller, COMMAND) & 2,
                0,
                "the input buffer is empty after {byte:#x}"
            );
        }
    }

    #[test]
    fn the_control_register_is_what_was_written() {
        let controller = I8042::with_keyboard(deps());
        controller.write(COMMAND, &[WRITE_CONTROL]);
        assert_ne!(read(&controller, COMMAND) & STATUS_COMMAND, 0);
        controller.write(DATA, &[0x47]);
        controller.write(COMMAND, &[READ_CONTROL]);
        assert_ne!(read(&controller, COMMAND) & STATUS_OUTPUT_FULL, 0);
        assert_eq!(read(&controller, DATA), 0x47);
        assert_eq!(read(&controller, COMMAND) & STATUS_OUTPUT_FULL, 0);
    }

    #[test]
    fn the_keyboard_acknowledges_and_identifies_itself() {
        let controller = I8042::with_keyboard(deps());
        controller.write(DATA, &[0xed]);
        assert_eq!(read(&controller, DATA), ACKNOWLEDGE);
        controller.write(DATA, &[KEYBOARD_IDENTIFY]);
        assert_eq!(
            [(); 3].map(|()| read(&controller, DATA)),
            [ACKNOWLEDGE, 0xab, 0x83]
        );
    }

    #[test]
    fn a_driver_that_looks_for_a_mouse_is_answered_at_once_and_finds_none() {
        const STATUS_MOUSE: u8 = 0x20;
        let controller = I8042::with_keyboard(deps());
        controller.write(COMMAND, &[LOOP_MOUSE]);
        controller.write(DATA, &[0x5a]);
        assert_eq!(
            read(&controller, COMMAND) & (STATUS_OUTPUT_FULL | STATUS_MOUSE),
            STATUS_OUTPUT_FULL
        );
        controller.write(COMMAND, &[TEST_MOUSE]);
        assert_eq!(read(&controller, DATA), MOUSE_STUCK);
        controller.write(COMMAND, &[WRITE_MOUSE]);
        controller.write(DATA, &[0xf2]);
        assert_eq!(
            read(&controller, COMMAND) & STATUS_OUTPUT_FULL,
            0,
            "nobody answers for a mouse"
        );
    }

    #[test]
    fn keys_come_with_an_interrupt_for_each_byte() {
        let controller = I8042::with_keyboard(deps());
        assert_eq!(controller.press_ctrl_alt_del(), Err(I8042Error::NoDriver));
        listen(&controller);
        controller.press_ctrl_alt_del().unwrap();
        assert_eq!(controller.press_ctrl_alt_del(), Err(I8042Error::Busy(11)));
        let mut seen = Vec::new();
        while raised(&controller) {
            seen.push(read(&controller, DATA));
        }
        assert_eq!(seen, CTRL_ALT_DEL);
    }
}
