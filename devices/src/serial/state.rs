//! What an image holds of a serial port.

use runnel_snapshot::machine::Paused;
use runnel_snapshot::section::Section;
use serde::{Deserialize, Serialize};

use super::{FIFO_BYTES, Serial, SerialDeps, SerialError};

/// The registers of a 16550A by their names in its data sheet, and what waits in the receive FIFO.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialState {
    /// DLL: the divisor latch, low byte.
    pub divisor_low: u8,
    /// DLM: the divisor latch, high byte.
    pub divisor_high: u8,
    /// IER: which causes may interrupt.
    pub interrupt_enable: u8,
    /// IIR: which causes are pending.
    pub interrupt_identification: u8,
    /// LCR: framing, and whether the divisor latch is visible.
    pub line_control: u8,
    /// LSR: data ready, transmitter empty.
    pub line_status: u8,
    /// MCR: modem outputs and loop-back.
    pub modem_control: u8,
    /// MSR: modem inputs.
    pub modem_status: u8,
    /// SCR: the guest's own byte.
    pub scratch: u8,
    /// Received bytes that the guest has not read.
    pub received: Vec<u8>,
}

/// IER has four causes, the upper half is always zero.
const INTERRUPT_ENABLE_BITS: u8 = 0x0f;
/// IIR as the model keeps it: «none pending», transmitter empty, data ready. The FIFO bits are added when it is read.
const INTERRUPT_IDENTIFICATION_BITS: u8 = 0x07;
/// LSR: data ready, transmitter holding register empty, transmitter idle.
const LINE_STATUS_BITS: u8 = 0x61;
const LINE_STATUS_DATA_READY: u8 = 0x01;
const LINE_STATUS_TRANSMITTER_EMPTY: u8 = 0x60;

impl SerialState {
    /// Holds every register against what the chip can have.
    fn check(&self) -> Result<(), SerialError> {
        let refuse = |register, value| Err(SerialError::Register { register, value });
        if self.received.len() > FIFO_BYTES {
            return Err(SerialError::Fifo(self.received.len()));
        }
        if self.interrupt_enable & !INTERRUPT_ENABLE_BITS != 0 {
            return refuse("IER", self.interrupt_enable);
        }
        let pending = self.interrupt_identification;
        // Bit 0 says that none is pending, the others say which one is: exactly one of both.
        let none = pending & 1 != 0;
        if pending & !INTERRUPT_IDENTIFICATION_BITS != 0 || none != (pending & !1 == 0) {
            return refuse("IIR", pending);
        }
        // The transmitter of this port is always empty; data is ready when there is some.
        let ready = self.line_status & LINE_STATUS_DATA_READY != 0;
        let empty = self.line_status & LINE_STATUS_TRANSMITTER_EMPTY == LINE_STATUS_TRANSMITTER_EMPTY;
        if self.line_status & !LINE_STATUS_BITS != 0 || !empty || ready == self.received.is_empty() {
            return refuse("LSR", self.line_status);
        }
        Ok(())
    }
}

impl Section for Serial {
    const KIND: &'static str = "serial";
    const VERSION: u32 = 1;
    type State = SerialState;
    type Deps = SerialDeps;
    type Error = SerialError;

    fn save(&self, _: &Paused<'_>) -> Result<SerialState, SerialError> {
        let registers = self.uart().state();
        Ok(SerialState {
            divisor_low: registers.baud_divisor_low,
            divisor_high: registers.baud_divisor_high,
            interrupt_enable: registers.interrupt_enable,
            interrupt_identification: registers.interrupt_identification,
            line_control: registers.line_control,
            line_status: registers.line_status,
            modem_control: registers.modem_control,
            modem_status: registers.modem_status,
            scratch: registers.scratch,
            received: registers.in_buffer,
        })
    }

    fn restore(deps: SerialDeps, state: SerialState) -> Result<Self, SerialError> {
        state.check()?;
        let registers = vm_superio::SerialState {
            baud_divisor_low: state.divisor_low,
            baud_divisor_high: state.divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.received,
        };
        Self::from_registers(deps, &registers)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{DATA, INTERRUPT_ENABLE, Screen, deps, raised, read};
    use super::*;
    use crate::bus::{BusDevice as _, Offset};

    fn save(port: &Serial) -> SerialState {
        let state = port.save(&Paused::until(|| ())).unwrap();
        // Through JSON, as an image has it.
        serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap()
    }

    #[test]
    fn a_pending_transmit_interrupt_is_raised_again_after_a_restore() {
        let port = Serial::new(deps(&Screen::default())).unwrap();
        port.write(INTERRUPT_ENABLE, &[2]);
        port.write(DATA, b"x");
        assert!(
            raised(&port),
            "the guest has been interrupted, and has not looked yet"
        );

        let restored = Serial::restore(deps(&Screen::default()), save(&port)).unwrap();

        assert!(raised(&restored));
        assert_eq!(
            read(&restored, Offset(2)) & 0x0f,
            2,
            "the cause is there when the guest looks"
        );
        restored.write(DATA, b"y");
        assert!(raised(&restored), "and the next byte interrupts again");
    }

    #[test]
    fn a_port_without_pending_interrupts_is_quiet_until_it_is_told_to_reassert() {
        let port = Serial::new(deps(&Screen::default())).unwrap();
        let restored = Serial::restore(deps(&Screen::default()), save(&port)).unwrap();
        assert!(!raised(&restored));
        restored.reassert();
        assert!(raised(&restored));
    }

    #[test]
    fn unread_input_and_registers_survive() {
        let port = Serial::new(deps(&Screen::default())).unwrap();
        port.write(Offset(7), &[0x5a]);
        port.offer(b"abc");
        assert_eq!(read(&port, DATA), b'a');

        let restored = Serial::restore(deps(&Screen::default()), save(&port)).unwrap();

        assert_eq!(save(&restored), save(&port));
        assert_eq!(read(&restored, Offset(7)), 0x5a);
        assert_eq!([read(&restored, DATA), read(&restored, DATA)], *b"bc");
    }

    #[test]
    fn registers_that_no_chip_has_are_refused() {
        let good = save(&Serial::new(deps(&Screen::default())).unwrap());
        let spoilt: [fn(&mut SerialState); 7] = [
            |s| s.interrupt_enable = 0x10,
            |s| s.interrupt_identification = 0xc1,
            |s| s.interrupt_identification = 0x00,
            |s| s.interrupt_identification = 0x03,
            |s| s.line_status |= 1,
            |s| s.line_status = 0,
            |s| s.received = vec![0; FIFO_BYTES + 1],
        ];
        for (number, spoil) in spoilt.into_iter().enumerate() {
            let mut state = good.clone();
            spoil(&mut state);
            assert!(
                Serial::restore(deps(&Screen::default()), state).is_err(),
                "case {number}"
            );
        }
    }
}
