//! What this machine's KVM can run, as the monitor finds it out.

use std::fmt;
use std::sync::OnceLock;

use runnel_vmm::kvm::{self, Guests};

/// Which guests a machine runs. Each level includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// None: there is no usable `/dev/kvm`.
    NoKvm,
    /// The bare test guest: KVM interprets guest code.
    Bare,
    /// Unmodified Linux.
    Linux,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoKvm => "no usable /dev/kvm",
            Self::Bare => "a KVM that runs bare guests",
            Self::Linux => "a KVM that runs Linux",
        })
    }
}

/// The level of this machine; probed once a process, in a few milliseconds.
#[must_use]
pub fn of_this_machine() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| match kvm::describe().guests {
        None => Level::NoKvm,
        Some(Guests::Bare) => Level::Bare,
        Some(Guests::Linux) => Level::Linux,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_include_the_ones_before() {
        assert!(Level::NoKvm < Level::Bare && Level::Bare < Level::Linux);
    }

    #[test]
    fn a_machine_with_kvm_runs_bare_guests_at_least() {
        assert_eq!(of_this_machine() >= Level::Bare, kvm::describe().error.is_none());
    }
}
