//! What an image holds of the keyboard controller.

use runnel_snapshot::machine::Paused;
use runnel_snapshot::section::Section;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::{COMMANDS_WITH_A_BYTE, I8042, I8042Error, OUTPUT_BYTES_MAX, Registers};
use crate::interrupt::Interrupt;

/// What a controller with a keyboard is built upon.
#[derive(Debug)]
pub struct I8042Deps {
    /// Signalled when the guest asks for a reset.
    pub reset: EventFd,
    /// The keyboard's line.
    pub interrupt: Interrupt,
}

/// The controller's registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct I8042State {
    /// The control register.
    pub control: u8,
    /// The output port.
    pub output_port: u8,
    /// A command whose byte comes next.
    pub command: Option<u8>,
    /// Bytes that wait for the guest.
    pub output: Vec<u8>,
}

impl Section for I8042 {
    const KIND: &'static str = "i8042";
    const VERSION: u32 = 1;
    type State = I8042State;
    type Deps = I8042Deps;
    type Error = I8042Error;

    fn save(&self, _: &Paused<'_>) -> Result<I8042State, I8042Error> {
        let registers = self.registers();
        Ok(I8042State {
            control: registers.control,
            output_port: registers.output_port,
            command: registers.command,
            output: registers.output.iter().copied().collect(),
        })
    }

    fn restore(deps: I8042Deps, state: I8042State) -> Result<Self, I8042Error> {
        if state.output.len() > OUTPUT_BYTES_MAX {
            return Err(I8042Error::Overfull(state.output.len()));
        }
        if let Some(command) = state.command
            && !COMMANDS_WITH_A_BYTE.contains(&command)
        {
            return Err(I8042Error::Command(command));
        }
        let registers = Registers {
            control: state.control,
            output_port: state.output_port,
            command: state.command,
            output: state.output.into(),
        };
        Ok(Self::assemble(deps.reset, Some(deps.interrupt), registers))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{deps, listen, raised, read};
    use super::super::{COMMAND, CTRL_ALT_DEL, DATA, WRITE_CONTROL};
    use super::*;
    use crate::bus::BusDevice as _;

    fn moved(controller: &I8042) -> I8042 {
        let state = controller.save(&Paused::until(|| ())).unwrap();
        let state = serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap();
        I8042::restore(deps(), state).unwrap()
    }

    #[test]
    fn keys_that_were_half_read_go_on_after_a_restore() {
        let controller = I8042::with_keyboard(deps());
        listen(&controller);
        controller.press_ctrl_alt_del().unwrap();
        assert!(
            raised(&controller),
            "an interrupt that the guest did not get to see"
        );

        let restored = moved(&controller);
        restored.reassert();

        let mut seen = Vec::new();
        while raised(&restored) {
            seen.push(read(&restored, DATA));
        }
        assert_eq!(seen, CTRL_ALT_DEL);
    }

    #[test]
    fn a_command_that_waits_for_its_byte_still_does() {
        let controller = I8042::with_keyboard(deps());
        controller.write(COMMAND, &[WRITE_CONTROL]);
        let restored = moved(&controller);
        restored.write(DATA, &[0x45]);
        assert_eq!(restored.save(&Paused::until(|| ())).unwrap().control, 0x45);
    }

    #[test]
    fn state_that_no_controller_can_have_is_refused() {
        let good = I8042::with_keyboard(deps()).save(&Paused::until(|| ())).unwrap();
        let overfull = I8042State {
            output: vec![0; OUTPUT_BYTES_MAX + 1],
            ..good.clone()
        };
        let command = I8042State {
            command: Some(0x20),
            ..good
        };
        assert_eq!(
            I8042::restore(deps(), overfull).unwrap_err(),
            I8042Error::Overfull(17)
        );
        assert_eq!(
            I8042::restore(deps(), command).unwrap_err(),
            I8042Error::Command(0x20)
        );
    }
}
