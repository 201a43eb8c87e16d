//! The state of a vCPU, as plain data.

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs,
};
use serde::{Deserialize, Serialize};

/// Everything that KVM knows of a vCPU. KVM's own structures are carried as their bytes: their layout is part of the
/// kernel's interface and never changes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VcpuState {
    /// What the guest is told of its processor.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Whether it runs, halts, or waits to be started.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers, descriptor tables.
    pub sregs: kvm_sregs,
    /// Floating point and vector registers: the XSAVE area, without the zeros at its end.
    pub xsave: Vec<u8>,
    /// XCR0.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debugregs: kvm_debugregs,
    /// The local APIC.
    pub lapic: kvm_lapic_state,
    /// Model-specific registers by number, but for those of time.
    pub msrs: Vec<(u32, u64)>,
    /// Exceptions, interrupts and NMIs that are on their way.
    pub events: kvm_vcpu_events,
    /// Its time.
    pub tsc: TscState,
}

/// A vCPU's time stamp counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TscState {
    /// How fast it counts, in kHz.
    pub khz: u32,
    /// What it stood at.
    pub value: u64,
    /// What is added to the host's counter to get it, where KVM tells. It is compared between the vCPUs of one machine
    /// and means nothing else.
    #[serde(default)]
    pub offset: Option<u64>,
    /// When the local APIC's timer is to fire: `IA32_TSC_DEADLINE`, 0 for never.
    pub deadline: u64,
}
