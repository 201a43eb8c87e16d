//! Power-off and reset: ACPI's sleep and reset registers (ACPI 6.5 §4.8.3.7, hardware-reduced), and the keyboard
//! controller's reset line.
//!
//! The power registers have no state to save: a machine that wrote to them has ended.

use runnel_devices::bus::{BusDevice, Offset};
use runnel_devices::i8042::I8042;

use crate::exit::{EndSignal, Ended};

/// The sleep control register, from the first of [`layout::POWER_PORTS`](crate::layout::POWER_PORTS).
pub(crate) const SLEEP_CONTROL: Offset = Offset(0);
/// The sleep status register: there is no sleep to wake from, it always reads 0.
pub(crate) const SLEEP_STATUS: Offset = Offset(1);
/// The reset register.
pub(crate) const RESET: Offset = Offset(2);

/// What the guest writes to the reset register; told in the FADT.
pub(crate) const RESET_VALUE: u8 = 1;
/// The sleep type of soft-off; told in the DSDT's `_S5`.
pub(crate) const SLEEP_TYPE_S5: u8 = 5;

/// In the sleep control register: go to sleep.
const SLEEP_ENABLE: u8 = 1 << 5;
/// In the sleep control register: how deeply, three bits from here.
const SLEEP_TYPE_SHIFT: u8 = 2;

/// ACPI's registers.
#[derive(Debug)]
pub struct PowerRegisters {
    end: EndSignal,
}

impl PowerRegisters {
    /// Registers that end the machine of `end`.
    #[must_use]
    pub fn new(end: EndSignal) -> Self {
        Self { end }
    }
}

impl BusDevice for PowerRegisters {
    fn read(&self, _: Offset, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: Offset, data: &[u8]) {
        match (offset, data) {
            (SLEEP_CONTROL, &[value]) if value & SLEEP_ENABLE != 0 => {
                let kind = value >> SLEEP_TYPE_SHIFT & 7;
                if kind == SLEEP_TYPE_S5 {
                    self.end.end(Ended::PowerOff);
                } else {
                    tracing::warn!("the guest asked for a sleep of type {kind}, which it was not offered");
                }
            }
            (RESET, &[RESET_VALUE]) => self.end.end(Ended::Reset),
            // Clearing status bits that are never set, and whatever a guest writes that read no tables.
            (SLEEP_CONTROL | SLEEP_STATUS | RESET, _) => {}
            _ => tracing::debug!(
                ?offset,
                "the guest wrote something strange to its power registers"
            ),
        }
    }
}

/// The keyboard controller, whose reset line ends the machine.
#[derive(Debug)]
pub struct ResetLine {
    controller: I8042,
    end: EndSignal,
}

impl ResetLine {
    /// A line from `controller` to `end`.
    #[must_use]
    pub fn new(controller: I8042, end: EndSignal) -> Self {
        Self { controller, end }
    }

    /// The controller itself.
    #[must_use]
    pub fn controller(&self) -> &I8042 {
        &self.controller
    }
}

impl BusDevice for ResetLine {
    fn read(&self, offset: Offset, data: &mut [u8]) {
        self.controller.read(offset, data);
    }

    fn write(&self, offset: Offset, data: &[u8]) {
        self.controller.write(offset, data);
        if self.controller.was_reset() {
            self.end.end(Ended::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(writes: &[(Offset, &[u8])]) -> Option<Ended> {
        let end = EndSignal::new().unwrap();
        let registers = PowerRegisters::new(end.clone());
        for (offset, data) in writes {
            registers.write(*offset, data);
        }
        end.ended().cloned()
    }

    #[test]
    fn soft_off_and_reset_end_the_machine() {
        let soft_off = SLEEP_TYPE_S5 << SLEEP_TYPE_SHIFT | SLEEP_ENABLE;
        assert_eq!(after(&[(SLEEP_CONTROL, &[soft_off])]), Some(Ended::PowerOff));
        assert_eq!(after(&[(RESET, &[RESET_VALUE])]), Some(Ended::Reset));
    }

    #[test]
    fn other_writes_change_nothing() {
        let sleep_s3 = 3 << SLEEP_TYPE_SHIFT | SLEEP_ENABLE;
        let without_enable = SLEEP_TYPE_S5 << SLEEP_TYPE_SHIFT;
        let writes: [(Offset, &[u8]); 5] = [
            (SLEEP_CONTROL, &[sleep_s3]),
            (SLEEP_CONTROL, &[without_enable]),
            (SLEEP_STATUS, &[0x80]),
            (RESET, &[RESET_VALUE, 0]),
            (RESET, &[2]),
        ];
        assert_eq!(after(&writes), None);
    }
}
