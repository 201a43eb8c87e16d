//! The deadline of a local APIC's timer that fired while it was being saved.
//!
//! In TSC-deadline mode (Intel SDM vol. 3A §11.5.4.1) the timer's interrupt and the deadline's return to zero belong
//! together, and KVM does both on its own, whenever the host's timer fires: also between two reads of a vCPU that
//! stands. Read in the wrong order the interrupt is in neither of them, and a guest that waits for it before it sets
//! the next deadline waits for ever. [`vcpu`](super::vcpu) reads the deadline first; what is here repairs images that
//! were saved otherwise, as Firecracker does (`fix_zero_tsc_deadline_msr`).

use kvm_bindings::kvm_lapic_state;

use super::msrs::{IA32_TSC, IA32_TSC_DEADLINE, Msr};

/// Offsets of the local APIC's registers (Intel SDM vol. 3A, table 11-1).
const IN_SERVICE: usize = 0x100;
const REQUESTED: usize = 0x200;
const TIMER: usize = 0x320;

/// Bits of the timer's register.
const MASKED: u32 = 1 << 16;
const MODE: u32 = 0b11 << 17;
const MODE_DEADLINE: u32 = 0b10 << 17;

/// Makes a deadline that is gone, without its interrupt being anywhere, *now*: the guest gets its interrupt as soon as
/// it runs. One that had set none gets one too many, which it ignores as hardware makes every guest do: a write to the
/// register may always come too late.
pub(super) fn repair(lapic: &kvm_lapic_state, msrs: &mut [Msr]) {
    let Some(counter) = msrs.iter().find(|msr| msr.0 == IA32_TSC).map(|msr| msr.1) else {
        return;
    };
    let timer = register(lapic, TIMER);
    let vector = timer & 0xff;
    let is_awaited = timer & (MASKED | MODE) == MODE_DEADLINE
        && !has(lapic, REQUESTED, vector)
        && !has(lapic, IN_SERVICE, vector);
    if !is_awaited {
        return;
    }
    for Msr(_, deadline) in msrs.iter_mut().filter(|msr| **msr == Msr(IA32_TSC_DEADLINE, 0)) {
        *deadline = counter;
    }
}

fn register(lapic: &kvm_lapic_state, offset: usize) -> u32 {
    let bytes = [0, 1, 2, 3].map(|byte| lapic.regs[offset + byte].to_ne_bytes()[0]);
    u32::from_le_bytes(bytes)
}

/// Whether `vector` is in the set of 256 that begins at `offset`, 32 in each register, registers 16 bytes apart.
fn has(lapic: &kvm_lapic_state, offset: usize, vector: u32) -> bool {
    let at = offset + (vector / 32) as usize * 16;
    register(lapic, at) >> (vector % 32) & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    const VECTOR: u8 = 0xec;

    fn lapic(timer: u32, set: Option<usize>) -> kvm_lapic_state {
        let mut lapic = kvm_lapic_state::default();
        for (byte, value) in timer.to_le_bytes().into_iter().enumerate() {
            lapic.regs[TIMER + byte] = value.cast_signed();
        }
        if let Some(set) = set {
            let bit = usize::from(VECTOR) % 32;
            let at = set + usize::from(VECTOR) / 32 * 16 + bit / 8;
            lapic.regs[at] = (1u8 << (bit % 8)).cast_signed();
        }
        lapic
    }

    fn deadline_after(timer: u32, set: Option<usize>, deadline: u64) -> u64 {
        let mut msrs = [Msr(IA32_TSC_DEADLINE, deadline), Msr(IA32_TSC, 1_000)];
        repair(&lapic(timer, set), &mut msrs);
        msrs[0].1
    }

    #[test]
    fn a_tick_that_was_lost_while_saving_comes_at_once() {
        assert_eq!(deadline_after(MODE_DEADLINE | u32::from(VECTOR), None, 0), 1_000);
    }

    #[test]
    fn a_timer_that_lost_nothing_stays_as_it_was() {
        let on = MODE_DEADLINE | u32::from(VECTOR);
        assert_eq!(deadline_after(on, None, 5_000), 5_000, "it is to fire yet");
        assert_eq!(deadline_after(on, Some(REQUESTED), 0), 0, "its interrupt waits");
        assert_eq!(deadline_after(on, Some(IN_SERVICE), 0), 0, "the guest is at it");
        assert_eq!(deadline_after(on | MASKED, None, 0), 0, "nobody wants it");
        assert_eq!(deadline_after(u32::from(VECTOR), None, 0), 0, "it counts down");
    }
}
