//! How a machine ends, and the code with which the monitor's process then ends.

use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset. A machine is not started again: whoever started it decides.
    Reset,
    /// A vCPU met an exception that it could not deliver.
    TripleFault,
    /// KVM could not go on with a vCPU.
    VcpuFailed {
        /// The vCPU's number.
        vcpu: u8,
        /// What KVM said.
        reason: String,
    },
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest switched itself off"),
            Self::Reset => f.write_str("the guest asked for a reset"),
            Self::TripleFault => f.write_str("the guest ended in a triple fault"),
            Self::VcpuFailed { vcpu, reason } => write!(f, "vCPU {vcpu} cannot go on: {reason}"),
        }
    }
}

/// What the monitor's process ends with. Firecracker's numbers where they mean the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// The guest switched itself off or asked for a reset, or the monitor was asked to end.
    Ok = 0,
    /// Something failed that has no code of its own.
    Failure = 1,
    /// A bug in the monitor.
    Unexpected = 2,
    /// The guest ended in a triple fault. Firecracker ends with 0 here, as if all were well.
    TripleFault = 3,
    /// KVM could not go on with a vCPU.
    VcpuFailed = 4,
    /// The configuration given at the start cannot be had.
    BadConfiguration = 152,
    /// The command line cannot be understood.
    BadArguments = 153,
}

impl From<&Ended> for ExitCode {
    fn from(ended: &Ended) -> Self {
        match ended {
            Ended::PowerOff | Ended::Reset => Self::Ok,
            Ended::TripleFault => Self::TripleFault,
            Ended::VcpuFailed { .. } => Self::VcpuFailed,
        }
    }
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code as u8)
    }
}

/// Where vCPUs and devices say that the machine ended. The first word counts.
#[derive(Clone, Debug)]
pub struct EndSignal {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    ended: OnceLock<Ended>,
    /// Held by whoever sets `ended`, so that nobody falls asleep between looking and waiting.
    waiting: Mutex<()>,
    changed: Condvar,
    event: EventFd,
}

impl EndSignal {
    /// A machine that has not ended.
    ///
    /// # Errors
    /// When no event descriptor can be had.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        Ok(Self {
            shared: Arc::new(Shared {
                ended: OnceLock::new(),
                waiting: Mutex::new(()),
                changed: Condvar::new(),
                event,
            }),
        })
    }

    /// Says that the machine ended. Later words change nothing.
    pub fn end(&self, how: Ended) {
        let guard = self.shared.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let is_first = self.shared.ended.set(how).is_ok();
        drop(guard);
        if is_first {
            self.shared.changed.notify_all();
            // Fails only if the counter is full, and then whoever waits on it is awake.
            let _ = self.shared.event.write(1);
        }
    }

    /// How the machine ended, if it has.
    #[must_use]
    pub fn ended(&self) -> Option<&Ended> {
        self.shared.ended.get()
    }

    /// Waits until the machine ends, but no longer than `at_most`; `None` if it has not ended by then.
    #[must_use]
    pub fn wait(&self, at_most: Duration) -> Option<&Ended> {
        let guard = self.shared.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let not_ended = |(): &mut ()| self.ended().is_none();
        drop(self.shared.changed.wait_timeout_while(guard, at_most, not_ended));
        self.ended()
    }

    /// Readable once the machine has ended, and ever after: nobody reads it.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.shared.event
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_word_about_the_end_counts() {
        let signal = EndSignal::new().unwrap();
        assert_eq!(signal.ended(), None);
        signal.clone().end(Ended::PowerOff);
        signal.end(Ended::TripleFault);
        assert_eq!(signal.ended(), Some(&Ended::PowerOff));
        assert_eq!(signal.event().read().unwrap(), 1);
    }

    #[test]
    fn a_guest_that_wanted_to_end_ends_the_monitor_well_and_another_does_not() {
        assert_eq!(ExitCode::from(&Ended::PowerOff), ExitCode::Ok);
        assert_eq!(ExitCode::from(&Ended::Reset), ExitCode::Ok);
        assert_eq!(ExitCode::from(&Ended::TripleFault) as u8, 3);
        let failed = Ended::VcpuFailed {
            vcpu: 1,
            reason: "emulation".to_owned(),
        };
        assert_eq!(ExitCode::from(&failed) as u8, 4);
    }
}
