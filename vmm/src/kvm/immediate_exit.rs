//! The flag in a vCPU's shared page that makes `KVM_RUN` come back at once.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::VcpuFd;

/// `kvm_run.immediate_exit` of one vCPU (Documentation/virt/kvm/api.rst, 5 "The kvm_run structure").
///
/// A signal alone can arrive just before `KVM_RUN` enters the kernel, and be lost. So whoever kicks a vCPU sets this
/// flag first: then `KVM_RUN` finishes what an earlier exit left half done and returns `EINTR`.
#[derive(Debug)]
pub struct ImmediateExit {
    flag: NonNull<u8>,
    /// Keeps the page mapped.
    _vcpu: Arc<Mutex<VcpuFd>>,
}

// SAFETY: the page is mapped for as long as `_vcpu` lives, whichever thread that is in, and the flag is only ever
// accessed as an atomic.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above: all accesses of ours are atomic.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    /// The flag of `vcpu`, which does not run.
    #[must_use]
    pub fn of(vcpu: &Arc<Mutex<VcpuFd>>) -> Self {
        let mut fd = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        let flag = NonNull::from(&mut fd.get_kvm_run().immediate_exit);
        Self {
            flag,
            _vcpu: Arc::clone(vcpu),
        }
    }

    /// Makes `KVM_RUN` return at once, or not any longer.
    pub fn set(&self, on: bool) {
        // SAFETY: `flag` points into the page shared with KVM, which stays mapped and in place while `_vcpu` lives;
        // a byte is always aligned; the kernel reads it once with READ_ONCE, and nobody else writes it.
        let flag = unsafe { AtomicU8::from_ptr(self.flag.as_ptr()) };
        flag.store(u8::from(on), Ordering::SeqCst);
    }
}
