//! What a host's KVM offers machines, for whoever asks (`runnel-vmm --describe-host`, `runnel doctor`).

use kvm_ioctls::Cap;
use serde::Serialize;

use super::{Kvm, KvmError, probe};

/// Which guests a KVM runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Guests {
    /// Bare ones alone: it interprets guest code, and knows too little of it for any kernel.
    Bare,
    /// Unmodified Linux, and whatever else runs on this processor.
    Linux,
}

/// What a host's KVM offers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Description {
    /// Why no machine runs here.
    pub error: Option<String>,
    /// The capabilities that machines need and this KVM lacks, as `<linux/kvm.h>` has them without `KVM_CAP_`.
    pub lacks: Vec<String>,
    /// Which guests run; unknown where no machine does.
    pub guests: Option<Guests>,
    /// The most vCPUs of a VM.
    pub vcpus_max: i32,
    /// Whether a guest's time stamp counter can have another frequency than the host's.
    pub scales_tsc: bool,
}

/// Describes this host's KVM. It takes some milliseconds, for a guest of a few instructions is run.
#[must_use]
pub fn describe() -> Description {
    let kvm = match Kvm::open() {
        Ok(kvm) => kvm,
        Err(error) => return Description::of_unusable(&error),
    };
    let (guests, error) = match probe::runs_iret_and_sse(&kvm.fd) {
        Ok(true) => (Some(Guests::Linux), None),
        Ok(false) => (Some(Guests::Bare), None),
        Err(error) => (
            None,
            Some(format!("a guest of a few instructions cannot be run: {error}")),
        ),
    };
    Description {
        error,
        lacks: Vec::new(),
        guests,
        vcpus_max: kvm.extension(Cap::MaxVcpus),
        scales_tsc: kvm.extension(Cap::TscControl) > 0,
    }
}

impl Description {
    fn of_unusable(error: &KvmError) -> Self {
        Self {
            lacks: match error {
                KvmError::Missing { capabilities } => capabilities.iter().map(name).collect(),
                _ => Vec::new(),
            },
            error: Some(error.to_string()),
            guests: None,
            vcpus_max: 0,
            scales_tsc: false,
        }
    }
}

/// `MpState` as `MP_STATE`.
fn name(capability: &Cap) -> String {
    let mut name = String::new();
    for letter in format!("{capability:?}").chars() {
        if letter.is_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(letter.to_ascii_uppercase());
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_have_the_kernels_names() {
        let names =
            [Cap::MpState, Cap::Irqchip, Cap::ImmediateExit, Cap::Pit2].map(|capability| name(&capability));
        assert_eq!(names, ["MP_STATE", "IRQCHIP", "IMMEDIATE_EXIT", "PIT2"]);
    }

    #[test]
    fn a_host_whose_kvm_has_everything_is_asked_which_guests_it_runs() {
        let host = describe();
        assert_eq!(host.guests.is_some(), host.error.is_none(), "{host:?}");
        assert!(host.guests.is_none() || host.vcpus_max > 0, "{host:?}");
    }
}
