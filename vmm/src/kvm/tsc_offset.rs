//! The offset of a vCPU's time stamp counter to the host's (Documentation/virt/kvm/devices/vcpu.rst §4.1, Linux 5.16).
//!
//! `kvm-ioctls` has the attributes of vCPUs on other architectures only.

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

#[allow(missing_docs)]
mod requests {
    use super::{KVMIO, ioctl_iow_nr, kvm_device_attr};

    ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
    ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
}
use requests::{KVM_GET_DEVICE_ATTR, KVM_SET_DEVICE_ATTR};

fn attribute(value: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: value as u64,
    }
}

/// The offset, or `None` where this KVM does not tell.
#[must_use]
pub fn read(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0;
    let attribute = attribute(&raw mut offset);
    // SAFETY: the kernel writes eight bytes at the address, where `offset` lives until after the call.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) };
    (result == 0).then_some(offset)
}

/// Sets the offset.
///
/// # Errors
/// When this KVM cannot.
pub fn write(vcpu: &VcpuFd, mut offset: u64) -> Result<(), errno::Error> {
    let attribute = attribute(&raw mut offset);
    // SAFETY: the kernel reads eight bytes at the address, where `offset` lives until after the call.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) };
    if result == 0 {
        Ok(())
    } else {
        Err(errno::Error::last())
    }
}
