//! The time stamp counters of a machine that was saved: at the frequency that the guest knows, where they stood, and in
//! step with one another.
//!
//! The counters are read one after the other when a machine is saved, so their values differ although the counters
//! agree; what really differs between vCPUs, if anything, is the offset to the host's counter. So the first vCPU's value
//! is restored, and the others get its offset plus the difference of the offsets then. Only after its counter may a
//! vCPU's deadline be set: KVM computes when it fires by the counter of that moment.

use kvm_ioctls::VcpuFd;

use super::section::{VcpuStateError, refused, write_msrs};
use super::state::TscState;
use crate::kvm::tsc_offset;
use crate::msrs::{IA32_TSC, IA32_TSC_DEADLINE};

/// How far two frequencies may be apart and count as one, in millionths: what KVM itself tolerates, and what clocks drift.
const TOLERANCE_PPM: u64 = 250;

/// Why the guest's time cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum TscError {
    /// The host counts at another pace and cannot scale.
    #[error(
        "tsc_khz: the machine's time stamp counter runs at {machine} kHz and this host's at {host} kHz, and this host \
         cannot scale it: resume it on a host of the same frequency or with TSC scaling"
    )]
    Frequency {
        /// The machine's.
        machine: u32,
        /// The host's.
        host: u32,
    },
    /// A frequency that cannot be.
    #[error("a time stamp counter at 0 kHz cannot be")]
    Zero,
    /// KVM refused.
    #[error(transparent)]
    State(#[from] VcpuStateError),
}

/// Restores the counters and deadlines of all vCPUs, in order of their numbers.
///
/// # Errors
/// When this host cannot run them at the machine's frequency, or KVM refuses.
pub fn restore_tscs(vcpus: &[(&VcpuFd, TscState)], can_scale: bool) -> Result<(), TscError> {
    let Some((first, first_state)) = vcpus.first() else {
        return Ok(());
    };
    for (fd, state) in vcpus {
        set_frequency(fd, state.khz, can_scale)?;
    }
    write_msrs(first, &[(IA32_TSC, first_state.value)])?;
    let base = tsc_offset::read(first);
    for (fd, state) in &vcpus[1..] {
        let offset = in_step(base, first_state.offset, state.offset);
        if offset.is_none_or(|offset| tsc_offset::write(fd, offset).is_err()) {
            // The same value within a second: KVM takes that for a wish to be in step.
            write_msrs(fd, &[(IA32_TSC, first_state.value)])?;
        }
    }
    for (fd, state) in vcpus {
        write_msrs(fd, &[(IA32_TSC_DEADLINE, state.deadline)])?;
    }
    Ok(())
}

/// The offset of a vCPU whose offset was `then`, now that the first one's is `base` and was `base_then`.
fn in_step(base: Option<u64>, base_then: Option<u64>, then: Option<u64>) -> Option<u64> {
    Some(base?.wrapping_add(then?.wrapping_sub(base_then?)))
}

fn set_frequency(fd: &VcpuFd, machine: u32, can_scale: bool) -> Result<(), TscError> {
    if machine == 0 {
        return Err(TscError::Zero);
    }
    let host = fd
        .get_tsc_khz()
        .map_err(refused("read the frequency of a time stamp counter"))?;
    if is_same(machine, host) {
        return Ok(());
    }
    if !can_scale {
        return Err(TscError::Frequency { machine, host });
    }
    Ok(fd
        .set_tsc_khz(machine)
        .map_err(refused("set the frequency of a time stamp counter"))?)
}

/// Whether two frequencies count as one.
fn is_same(one: u32, other: u32) -> bool {
    u64::from(one.abs_diff(other)) * 1_000_000 <= u64::from(one) * TOLERANCE_PPM
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_that_were_in_step_are_in_step_again_and_a_difference_is_kept() {
        assert_eq!(in_step(Some(1000), Some(7), Some(7)), Some(1000));
        assert_eq!(in_step(Some(1000), Some(7), Some(4)), Some(997));
        assert_eq!(in_step(Some(1), Some(7), Some(4)), Some(1u64.wrapping_sub(3)));
        assert_eq!(in_step(Some(1000), None, Some(4)), None);
    }

    #[test]
    fn frequencies_within_the_tolerance_are_one() {
        assert!(is_same(2_000_000, 2_000_500));
        assert!(!is_same(2_000_000, 2_000_501));
        assert!(is_same(2_000_000, 1_999_500));
        assert!(!is_same(2_600_000, 3_000_000));
    }
}
