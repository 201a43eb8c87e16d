//! KVM's clock, from which guests read the time that has passed since they booted.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvm_bindings::{KVM_CLOCK_REALTIME, kvm_clock_data};
use runnel_snapshot::machine::Paused;
use runnel_snapshot::section::Section;
use serde::{Deserialize, Serialize};

use super::StateError;
use crate::kvm::{Vm, failed};

/// The clock of a VM.
#[derive(Debug)]
pub struct Clock<'a> {
    /// Whose.
    pub vm: &'a Vm,
}

/// What it showed, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockState {
    /// What the guest's clock showed, in nanoseconds.
    pub guest_ns: u64,
    /// What the host's wall clock showed, in nanoseconds since 1970.
    pub host_wall_ns: u64,
}

/// With which time a guest goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Resumption {
    /// As if no time had passed.
    #[default]
    WhereItWas,
    /// Forward by what the hosts' wall clocks say has passed (`clock_realtime`).
    Forward,
}

impl ClockState {
    /// By how much the machine's clocks are to be ahead of what they showed. Never behind.
    #[must_use]
    pub fn lead(self, resumption: Resumption) -> Duration {
        self.lead_at(resumption, wall_ns())
    }

    fn lead_at(self, resumption: Resumption, now_ns: u64) -> Duration {
        match resumption {
            Resumption::WhereItWas => Duration::ZERO,
            Resumption::Forward => Duration::from_nanos(now_ns.saturating_sub(self.host_wall_ns)),
        }
    }
}

impl<'a> Section for Clock<'a> {
    const KIND: &'static str = "clock";
    const VERSION: u32 = 1;
    type State = ClockState;
    /// Whose, and by how much it is to be ahead: the time stamp counters are as much ahead by now.
    type Deps = (&'a Vm, Duration);
    type Error = StateError;

    fn save(&self, _: &Paused<'_>) -> Result<ClockState, StateError> {
        let clock = self.vm.fd().get_clock().map_err(failed("read the clock"))?;
        let has_wall_time = clock.flags & KVM_CLOCK_REALTIME != 0;
        let host_wall_ns = if has_wall_time { clock.realtime } else { wall_ns() };
        Ok(ClockState {
            guest_ns: clock.clock,
            host_wall_ns,
        })
    }

    fn restore((vm, lead): Self::Deps, state: ClockState) -> Result<Self, StateError> {
        let lead_ns = u64::try_from(lead.as_nanos()).unwrap_or(u64::MAX);
        let clock = kvm_clock_data {
            clock: state.guest_ns.saturating_add(lead_ns),
            ..Default::default()
        };
        vm.fd().set_clock(&clock).map_err(failed("set the clock"))?;
        Ok(Self { vm })
    }
}

fn wall_ns() -> u64 {
    let passed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(passed.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_goes_on_where_it_was_or_forward_and_never_back() {
        let state = ClockState {
            guest_ns: 5_000,
            host_wall_ns: 1_000_000,
        };
        let lead_ns = |resumption, now_ns| state.lead_at(resumption, now_ns).as_nanos();
        assert_eq!(lead_ns(Resumption::WhereItWas, 2_000_000), 0);
        assert_eq!(lead_ns(Resumption::Forward, 1_600_000), 600_000);
        // A host whose clock is behind.
        assert_eq!(lead_ns(Resumption::Forward, 400_000), 0);
    }
}
