//! Model-specific registers that a vCPU of a machine that boots starts with: as firmware would leave them.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::kvm::{KvmError, failed};

const IA32_MISC_ENABLE: u32 = 0x1a0;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;

/// Fast string operations: Linux warns, and copies slowly, where firmware left them off.
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// Memory type ranges are on, and memory is write-back unless told otherwise.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Sets what firmware would have set.
///
/// # Errors
/// When KVM refuses one of them.
pub fn set_for_boot(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries = [
        entry(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(IA32_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
    ];
    let refused = || KvmError::Call {
        operation: "set the MSRs that firmware sets",
        source: vmm_sys_util::errno::Error::new(libc::EINVAL),
    };
    let msrs = Msrs::from_entries(&entries).map_err(|_| refused())?;
    // KVM stops at the first that it does not take, and says how many it took.
    match vcpu.set_msrs(&msrs) {
        Ok(taken) if taken == entries.len() => Ok(()),
        Ok(_) => Err(refused()),
        Err(source) => Err(failed("set the MSRs that firmware sets")(source)),
    }
}
