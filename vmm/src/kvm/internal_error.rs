//! What KVM says when it cannot go on with a vCPU.

use std::fmt::Write as _;

use kvm_ioctls::VcpuFd;

/// `KVM_INTERNAL_ERROR_EMULATION`: an instruction that KVM had to emulate and could not.
const EMULATION: u32 = 1;

/// Describes the `KVM_EXIT_INTERNAL_ERROR` with which `vcpu` just came back.
pub fn describe_internal_error(vcpu: &mut VcpuFd) -> String {
    let run = vcpu.get_kvm_run();
    // SAFETY: the vCPU just came back with KVM_EXIT_INTERNAL_ERROR, for which the kernel fills in this member; any
    // bits are a valid value of it.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let mut text = match internal.suberror {
        EMULATION => "its emulator does not know an instruction".to_owned(),
        other => format!("internal error {other}"),
    };
    let words = usize::try_from(internal.ndata)
        .unwrap_or(0)
        .min(internal.data.len());
    for word in &internal.data[..words] {
        let _ = write!(text, " {word:#x}"); // writing to a String cannot fail
    }
    if let Ok(regs) = vcpu.get_regs() {
        let _ = write!(text, ", at RIP {:#x}", regs.rip);
    }
    text
}
