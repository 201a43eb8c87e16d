//! The time stamp counters of all vCPUs: in step with each other, and with KVM's clock.
//!
//! Each vCPU's counter is read a moment after the one before. Restored so, they would differ by these moments, and
//! Linux would give up the TSC as its clock. What really differs is only what the guest itself added, and that the
//! guest's writes leave in `IA32_TSC_ADJUST`.
//!
//! A machine whose clock is set forward has its counters set forward, too: a guest may keep its time by them, and what
//! it has asked the deadline timer for is a value of its counter. Otherwise a timer that is overdue would wait for as
//! long as it had to when the machine was saved.

use std::time::Duration;

use super::msrs::{IA32_TSC, IA32_TSC_ADJUST, Msr};
use super::vcpu::VcpuState;

/// Makes all counters those of one moment: the first vCPU's.
pub(super) fn put_in_step(vcpus: &mut [VcpuState]) {
    let value = |state: &VcpuState, index| state.msrs.iter().find(|msr| msr.0 == index).map(|msr| msr.1);
    let Some(first) = vcpus.first() else { return };
    let Some(counter) = value(first, IA32_TSC) else {
        return;
    };
    let added_first = value(first, IA32_TSC_ADJUST).unwrap_or(0);
    for state in &mut vcpus[1..] {
        let added = value(state, IA32_TSC_ADJUST).unwrap_or(0);
        let counter = counter.wrapping_add(added).wrapping_sub(added_first);
        for Msr(_, own) in state.msrs.iter_mut().filter(|msr| msr.0 == IA32_TSC) {
            *own = counter;
        }
    }
}

impl VcpuState {
    /// Sets the counter forward by `lead`, as far as its frequency is known.
    pub fn set_forward(&mut self, lead: Duration) {
        let ticks = lead.as_nanos() * u128::from(self.tsc_khz) / 1_000_000;
        for Msr(_, counter) in self.msrs.iter_mut().filter(|msr| msr.0 == IA32_TSC) {
            // Counters wrap, and so may these ticks: both at 64 bits.
            *counter = counter.wrapping_add(ticks as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_is_set_forward_by_its_own_frequency_and_the_deadline_stays() {
        const IA32_TSC_DEADLINE: u32 = 0x6e0;
        let mut vcpu = VcpuState {
            tsc_khz: 2_500_000,
            msrs: vec![Msr(IA32_TSC, 1000), Msr(IA32_TSC_DEADLINE, 5000)],
            ..VcpuState::default()
        };
        vcpu.set_forward(Duration::from_secs(600));
        assert_eq!(
            vcpu.msrs,
            [Msr(IA32_TSC, 1_500_000_001_000), Msr(IA32_TSC_DEADLINE, 5000)]
        );
    }

    #[test]
    fn counters_differ_only_by_what_the_guest_added() {
        let vcpu = |counter, added| VcpuState {
            msrs: vec![Msr(IA32_TSC, counter), Msr(IA32_TSC_ADJUST, added)],
            ..VcpuState::default()
        };
        let mut vcpus = [vcpu(1000, 0), vcpu(1037, 0), vcpu(1950, 10u64.wrapping_neg())];
        put_in_step(&mut vcpus);
        let counters: Vec<u64> = vcpus.iter().map(|state| state.msrs[0].1).collect();
        assert_eq!(counters, [1000, 1000, 990]);
    }
}
