//! Model-specific registers: what a vCPU of a machine that boots starts with, as firmware would leave it, and what a
//! vCPU's state consists of.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::kvm::{KvmError, failed};

/// The time stamp counter. Restored on its own, in step with those of the other vCPUs.
pub const IA32_TSC: u32 = 0x10;
/// When the local APIC's timer is to fire. Restored after the counter.
pub const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// Registers that belong to a vCPU's state although not every KVM lists them: KVM's paravirtual ones (system time, wall
/// clock, asynchronous page faults, steal time, end of interrupt, poll control, migration control) and the supervisor
/// part of XSAVE.
const ALWAYS: [u32; 11] = [
    0x11,
    0x12,
    0x4b56_4d00,
    0x4b56_4d01,
    0x4b56_4d02,
    0x4b56_4d03,
    0x4b56_4d04,
    0x4b56_4d05,
    0x4b56_4d06,
    0x4b56_4d07,
    0xda0,
];

/// The registers of a vCPU's state, but for those of time, given those that KVM lists.
#[must_use]
pub fn of_state(listed: &[u32]) -> Vec<u32> {
    let mut all: Vec<u32> = listed.iter().chain(&ALWAYS).copied().collect();
    all.retain(|index| ![IA32_TSC, IA32_TSC_DEADLINE].contains(index));
    all.sort_unstable();
    all.dedup();
    all
}

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
