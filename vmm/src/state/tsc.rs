//! The time stamp counters of all vCPUs in step.
//!
//! Each vCPU's counter is read a moment after the one before. Restored so, they would differ by these moments, and
//! Linux would give up the TSC as its clock. What really differs is only what the guest itself added, and that the
//! guest's writes leave in `IA32_TSC_ADJUST`.

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

#[cfg(test)]
mod tests {
    use super::*;

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
