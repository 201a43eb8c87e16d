//! Model-specific registers: all that KVM asks to be saved, its own paravirtual ones (0x4b564d00 to 07) among them, and
//! some that it keeps without saying so.

use std::ops::RangeInclusive;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::{Host, StateError};
use crate::kvm::failed;

/// The time stamp counter.
pub(super) const IA32_TSC: u32 = 0x10;
/// What the guest has added to it.
pub(super) const IA32_TSC_ADJUST: u32 = 0x3b;
/// When the local APIC's timer fires, in ticks of the counter.
pub(super) const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// What firmware says of memory types (Intel SDM vol. 3A §13.11): KVM keeps these registers and does not list them.
const MEMORY_TYPES: [RangeInclusive<u32>; 5] = [
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x2ff..=0x2ff,
];

/// Which extended state supervisors use. Not every KVM lists it.
const IA32_XSS: u32 = 0xda0;

/// The registers that are saved where KVM lists `listed`; whatever a vCPU turns out not to have is left out.
pub(super) fn to_save(listed: &[u32]) -> Vec<u32> {
    let beside = MEMORY_TYPES.into_iter().flatten().chain([IA32_XSS]);
    let mut all = listed.to_vec();
    all.extend(beside.filter(|index| !listed.contains(index)));
    all
}

/// Registers in one call; KVM takes 256.
const BATCH: usize = 128;

/// What the vendors' manuals and KVM's documentation call those registers that hosts differ in.
const NAMES: [(u32, &str); 25] = [
    (IA32_TSC, "IA32_TSC"),
    (0x3a, "IA32_FEATURE_CONTROL"),
    (IA32_TSC_ADJUST, "IA32_TSC_ADJUST"),
    (0x48, "IA32_SPEC_CTRL"),
    (0x49, "IA32_PRED_CMD"),
    (0x8b, "IA32_BIOS_SIGN_ID"),
    (0xce, "MSR_PLATFORM_INFO"),
    (0x10a, "IA32_ARCH_CAPABILITIES"),
    (0x122, "IA32_TSX_CTRL"),
    (0x1a0, "IA32_MISC_ENABLE"),
    (0x1c4, "IA32_XFD"),
    (0x1c5, "IA32_XFD_ERR"),
    (0x277, "IA32_PAT"),
    (0x345, "IA32_PERF_CAPABILITIES"),
    (0x6a0, "IA32_U_CET"),
    (0x6a2, "IA32_S_CET"),
    (IA32_TSC_DEADLINE, "IA32_TSC_DEADLINE"),
    (0x2ff, "IA32_MTRR_DEF_TYPE"),
    (IA32_XSS, "IA32_XSS"),
    (0xc000_0080, "IA32_EFER"),
    (0xc000_0103, "IA32_TSC_AUX"),
    (0xc001_0015, "MSR_K7_HWCR"),
    (0xc001_011f, "MSR_AMD64_VIRT_SPEC_CTRL"),
    (0x4b56_4d01, "MSR_KVM_SYSTEM_TIME_NEW"),
    (0x4b56_4d03, "MSR_KVM_STEAL_TIME"),
];

/// A register as a message names it: by its name if it is a known one, and its number.
pub(super) fn name(index: u32) -> String {
    match NAMES.iter().find(|(number, _)| *number == index) {
        Some((_, name)) => format!("{name} (MSR {index:#x})"),
        None => format!("MSR {index:#x}"),
    }
}

/// One register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr(pub u32, pub u64);

/// Reads every register that is saved and that this vCPU has.
pub(super) fn read(vcpu: &VcpuFd, host: &Host) -> Result<Vec<Msr>, StateError> {
    let mut found = Vec::new();
    let mut left = host.msrs.as_slice();
    while !left.is_empty() {
        let batch = &left[..left.len().min(BATCH)];
        let mut msrs = batch_of(batch.iter().map(|index| Msr(*index, 0)))?;
        // KVM stops at the first that it cannot read: one that this vCPU's CPUID does not have.
        let read = vcpu.get_msrs(&mut msrs).map_err(failed("read MSRs"))?;
        found.extend(
            msrs.as_slice()
                .iter()
                .take(read)
                .map(|entry| Msr(entry.index, entry.data)),
        );
        let next = if read < batch.len() { read + 1 } else { read };
        left = &left[next..];
    }
    Ok(found)
}

/// Reads one register.
pub(super) fn read_one(vcpu: &VcpuFd, index: u32) -> Result<u64, StateError> {
    let mut msrs = batch_of([Msr(index, 0)].into_iter())?;
    let read = vcpu.get_msrs(&mut msrs).map_err(failed("read MSRs"))?;
    let entry = msrs.as_slice().iter().take(read).next();
    Ok(entry.map_or(0, |entry| entry.data))
}

/// Sets registers, in an order in which each finds what it depends on: the counter before the deadline that is
/// counted by it.
pub(super) fn write(vcpu: &VcpuFd, saved: &[Msr]) -> Result<(), StateError> {
    let mut ordered = saved.to_vec();
    ordered.sort_by_key(|msr| match msr.0 {
        IA32_TSC => 1,
        IA32_TSC_DEADLINE => 2,
        _ => 0,
    });
    let mut left = ordered.as_slice();
    while !left.is_empty() {
        let batch = &left[..left.len().min(BATCH)];
        let written = vcpu
            .set_msrs(&batch_of(batch.iter().copied())?)
            .map_err(failed("set MSRs"))?;
        left = &left[written.min(left.len())..];
        if written < batch.len() {
            let Msr(index, value) = batch[written];
            // A register at rest that this host does not have, or lets nobody write, is no loss.
            if value != 0 {
                return Err(StateError::Msr { index, value });
            }
            left = &left[1..];
        }
    }
    Ok(())
}

fn batch_of(msrs: impl Iterator<Item = Msr>) -> Result<Msrs, StateError> {
    let entries: Vec<_> = msrs
        .map(|Msr(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        })
        .collect();
    Msrs::from_entries(&entries).map_err(|_| StateError::TooMany {
        what: "MSRs",
        found: entries.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kvm_does_not_list_is_saved_too_and_nothing_twice() {
        let all = to_save(&[IA32_TSC, 0x2ff, IA32_XSS]);
        assert_eq!(all[..3], [IA32_TSC, 0x2ff, IA32_XSS]);
        for index in [0x200, 0x20f, 0x250, 0x258, 0x259, 0x268, 0x26f, 0x2ff, IA32_XSS] {
            assert_eq!(
                all.iter().filter(|other| **other == index).count(),
                1,
                "{index:#x}"
            );
        }
        assert_eq!(all.len(), 1 + 16 + 1 + 2 + 8 + 1 + 1);
    }

    #[test]
    fn a_register_that_a_host_lacks_is_refused_by_its_name() {
        let refusal = |index| StateError::Msr { index, value: 0x1800 }.to_string();
        assert!(refusal(0xda0).contains("IA32_XSS (MSR 0xda0) with the value 0x1800"));
        assert!(refusal(0xbeef).contains("the register MSR 0xbeef with"));
    }
}
