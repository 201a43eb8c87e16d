//! What stands where a PC's BIOS begins: real-mode code that resets the machine.
//!
//! A Linux guest that is to reboot asks whoever booted it, in an order of its own. On hardware-reduced ACPI it skips the
//! reset register of the tables and the keyboard controller (`efi_reboot_required` in arch/x86/kernel/reboot.c): it asks
//! EFI, which is not there, and then goes back to real mode and jumps to f000:fff0, as if there were a BIOS. Without
//! code there it would run through whatever RAM holds, for ever.

use runnel_snapshot::block_store::GuestRam;
use vm_memory::{Bytes, GuestMemoryError};

use crate::layout;
use crate::power;

/// The port of ACPI's reset register.
const RESET_PORT: [u8; 2] = (layout::POWER_PORTS.start + power::RESET.0 as u16).to_le_bytes();

/// Writes the reset register; the machine has ended by then, and the processor waits until that is noticed.
const CODE: [u8; 10] = [
    0xfa, // cli
    0xba,
    RESET_PORT[0],
    RESET_PORT[1], // mov dx, RESET_PORT
    0xb0,
    power::RESET_VALUE, // mov al, RESET_VALUE
    0xee,               // out dx, al
    0xf4,               // hlt
    0xeb,
    0xfd, // jmp to the hlt
];

/// Writes the code.
///
/// # Errors
/// When RAM is not there.
pub(super) fn write(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    const { assert!(CODE.len() as u64 <= layout::RESET_VECTOR.bytes) };
    ram.write_slice(&CODE, layout::RESET_VECTOR.address())
}
