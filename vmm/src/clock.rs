//! The machine's clock: what KVM's paravirtual clock counts from.
//!
//! It stands still while the machine does. With `clock_realtime` a resumed machine is told instead that the time since
//! its pause has passed: its clocks jump forward, as after a sleep.

use kvm_bindings::{KVM_CLOCK_REALTIME, kvm_clock_data};
use runnel_snapshot::machine::Paused;
use runnel_snapshot::section::Section;
use serde::{Deserialize, Serialize};

use crate::kvm::{KvmError, Vm};

/// The clock of a VM, as a section.
pub struct Clock<'v> {
    /// Whose clock it is.
    pub vm: &'v Vm,
    /// Whether the time that passed since the pause is to pass for the guest too.
    pub catch_up: bool,
}

/// Where the clock stood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockState {
    /// Nanoseconds since the machine booted.
    pub nanoseconds: u64,
    /// The host's wall clock at that moment, in nanoseconds since 1970, where KVM tells.
    #[serde(default)]
    pub realtime_ns: Option<u64>,
}

impl Section for Clock<'_> {
    const KIND: &'static str = "clock";
    const VERSION: u32 = 1;
    type State = ClockState;
    type Deps = Self;
    type Error = KvmError;

    fn save(&self, _: &Paused<'_>) -> Result<ClockState, KvmError> {
        let clock = self.vm.clock()?;
        let has_realtime = clock.flags & KVM_CLOCK_REALTIME != 0;
        Ok(ClockState {
            nanoseconds: clock.clock,
            realtime_ns: has_realtime.then_some(clock.realtime),
        })
    }

    fn restore(clock: Self, state: ClockState) -> Result<Self, KvmError> {
        clock.vm.set_clock(&clock.wanted(state))?;
        Ok(clock)
    }
}

impl Clock<'_> {
    fn wanted(&self, state: ClockState) -> kvm_clock_data {
        let mut data = kvm_clock_data {
            clock: state.nanoseconds,
            ..Default::default()
        };
        if let (true, Some(realtime)) = (self.catch_up, state.realtime_ns) {
            // KVM adds what has passed on its own wall clock since.
            data.flags = KVM_CLOCK_REALTIME;
            data.realtime = realtime;
        }
        data
    }
}
