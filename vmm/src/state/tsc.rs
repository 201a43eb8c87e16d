//! The time stamp counters of all vCPUs: in step with each other, and with KVM's clock.
//!
//! Each vCPU's counter is read a moment after the one before. Restored so, they would differ by these moments, and
//! Linux would give up the TSC as its clock. What really differs is only what the guest itself added, and that the
//! guest's writes leave in `IA32_TSC_ADJUST`.
//!
//! Linux holds its counters against KVM's clock as well, within a fraction of a millisecond: less than it takes to read
//! or set the state of some vCPUs. So both are saved as of one moment, and the clock is set by what the counters have
//! counted since they were.
//!
//! A machine whose clock is set forward has its counters set forward, too: a guest may keep its time by them, and what
//! it has asked the deadline timer for is a value of its counter. Otherwise a timer that is overdue would wait for as
//! long as it had to when the machine was saved.

use std::time::Duration;

use kvm_ioctls::VcpuFd;

use super::StateError;
use super::msrs::{self, IA32_TSC, IA32_TSC_ADJUST, Msr};
use super::vcpu::VcpuState;

/// The longest that restoring is believed to take. Where KVM interprets its guests a counter is the host's, whatever it
/// was set to, and tells nothing.
const RESTORING_MAX: Duration = Duration::from_secs(10);

/// Does `work`, and says what the counter showed in the middle of it.
pub(super) fn with_counter<T>(
    vcpu: &VcpuFd,
    work: impl FnOnce() -> Result<T, StateError>,
) -> Result<(u64, T), StateError> {
    let before = msrs::read_one(vcpu, IA32_TSC)?;
    let done = work()?;
    let after = msrs::read_one(vcpu, IA32_TSC)?;
    Ok((before.wrapping_add(after.wrapping_sub(before) / 2), done))
}

/// Makes all counters those of one moment: that in which the first vCPU's was `counter`.
pub(super) fn put_in_step(vcpus: &mut [VcpuState], counter: u64) {
    let value = |state: &VcpuState, index| state.msrs.iter().find(|msr| msr.0 == index).map(|msr| msr.1);
    let Some(first) = vcpus.first() else { return };
    let added_first = value(first, IA32_TSC_ADJUST).unwrap_or(0);
    for state in vcpus {
        let added = value(state, IA32_TSC_ADJUST).unwrap_or(0);
        let counter = counter.wrapping_add(added).wrapping_sub(added_first);
        for Msr(_, own) in state.msrs.iter_mut().filter(|msr| msr.0 == IA32_TSC) {
            *own = counter;
        }
    }
}

/// How long it is that a vCPU's counter was set to what this state has; no time where that cannot be told.
pub(crate) fn since_set(vcpu: &VcpuFd, set: &VcpuState) -> Result<Duration, StateError> {
    let counter = set.msrs.iter().find(|msr| msr.0 == IA32_TSC);
    let Some(Msr(_, counter)) = counter else {
        return Ok(Duration::ZERO);
    };
    let ticks = msrs::read_one(vcpu, IA32_TSC)?.wrapping_sub(*counter);
    Ok(duration_of(ticks, set.tsc_khz))
}

fn duration_of(ticks: u64, khz: u32) -> Duration {
    let ns = (u128::from(ticks) * 1_000_000)
        .checked_div(u128::from(khz))
        .unwrap_or(0);
    if ns > RESTORING_MAX.as_nanos() {
        return Duration::ZERO;
    }
    Duration::from_nanos(ns as u64)
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
        put_in_step(&mut vcpus, 1200);
        let counters: Vec<u64> = vcpus.iter().map(|state| state.msrs[0].1).collect();
        assert_eq!(counters, [1200, 1200, 1190]);
    }

    #[test]
    fn what_no_restoring_takes_is_no_time() {
        assert_eq!(duration_of(5_000_000, 2_500_000), Duration::from_millis(2));
        // A counter that is not the one that was set, and one of unknown frequency.
        assert_eq!(duration_of(5000u64.wrapping_neg(), 2_500_000), Duration::ZERO);
        assert_eq!(duration_of(2_500_000_000 * 11, 2_500_000), Duration::ZERO);
        assert_eq!(duration_of(5000, 0), Duration::ZERO);
    }
}
