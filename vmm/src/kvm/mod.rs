//! KVM: everything that asks the kernel for something beyond one safe call of `kvm-ioctls` is here.
//!
//! **Never**: decides what a machine is made of, or knows a device.

mod description;
mod immediate_exit;
mod internal_error;
mod probe;
mod vm;

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, MsrList};
use kvm_ioctls::Cap;
use vmm_sys_util::errno;

pub use description::{Description, Guests, describe};
pub use immediate_exit::ImmediateExit;
pub use internal_error::describe_internal_error;
pub use vm::{DirtyLog, Vm};

/// What KVM refused.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The device cannot be opened.
    #[error("cannot open /dev/kvm: is the kvm module loaded, and may this user use it?")]
    Open(#[source] errno::Error),
    /// The kernel speaks another version.
    #[error("/dev/kvm speaks version {found} of KVM's interface, and {KVM_API_VERSION} is needed")]
    Version {
        /// What it speaks.
        found: i32,
    },
    /// The kernel, or this processor, lacks something.
    #[error("this host's KVM lacks {capabilities:?}: Linux 6.1 or later is needed")]
    Missing {
        /// What it lacks.
        capabilities: Vec<Cap>,
    },
    /// A call failed.
    #[error("KVM cannot {operation}")]
    Call {
        /// What was tried.
        operation: &'static str,
        /// The kernel's reason.
        source: errno::Error,
    },
    /// RAM whose pieces have no address in this process.
    #[error("guest RAM at {start:#x} has no host address")]
    NoHostAddress {
        /// Where the guest sees it.
        start: u64,
    },
}

/// Turns an error of the call that tried to do `operation` into ours; for `map_err`.
pub(crate) fn failed(operation: &'static str) -> impl FnOnce(errno::Error) -> KvmError {
    move |source| KvmError::Call { operation, source }
}

/// What no machine can do without.
const NEEDED: [Cap; 13] = [
    Cap::Irqchip,
    Cap::Pit2,
    Cap::UserMemory,
    Cap::ImmediateExit,
    Cap::Ioeventfd,
    Cap::Irqfd,
    Cap::ExtCpuid,
    Cap::MpState,
    Cap::Xsave,
    Cap::Xcrs,
    Cap::VcpuEvents,
    Cap::Debugregs,
    Cap::AdjustClock,
];

/// The host's KVM, which has all that a machine needs.
#[derive(Debug)]
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
}

impl Kvm {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// When it cannot be opened, or lacks something that every machine needs.
    pub fn open() -> Result<Self, KvmError> {
        let fd = kvm_ioctls::Kvm::new().map_err(KvmError::Open)?;
        let found = fd.get_api_version();
        if u32::try_from(found) != Ok(KVM_API_VERSION) {
            return Err(KvmError::Version { found });
        }
        let capabilities: Vec<Cap> = NEEDED
            .into_iter()
            .filter(|capability| !fd.check_extension(*capability))
            .collect();
        if !capabilities.is_empty() {
            return Err(KvmError::Missing { capabilities });
        }
        Ok(Self { fd })
    }

    /// The number that KVM answers for `capability`; 0 where it is not there.
    #[must_use]
    pub fn extension(&self, capability: Cap) -> i32 {
        self.fd.check_extension_int(capability)
    }

    /// The CPUID leaves that this host's KVM can give a guest.
    ///
    /// # Errors
    /// When KVM does not say.
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        self.fd
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("list the CPUID leaves it supports"))
    }

    /// The model-specific registers that KVM asks to be saved.
    ///
    /// # Errors
    /// When KVM does not say.
    pub fn msrs_to_save(&self) -> Result<MsrList, KvmError> {
        self.fd
            .get_msr_index_list()
            .map_err(failed("list the MSRs it supports"))
    }

    /// Makes an empty VM.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn create_vm(&self) -> Result<Vm, KvmError> {
        Vm::new(&self.fd)
    }
}
