//! A vCPU's section.
//!
//! **Order on save**: the run state first, for reading it finishes an INIT under way; then the events once, for
//! reading them puts what a pending exception carries into CR2 or DR6; MSRs before the local APIC, for its timer may
//! fire at any time, which sets an interrupt in the APIC and takes the deadline out of its MSR: seen in this order such
//! a tick comes twice at worst, and never not at all (`deadline`); events last and for good, for other calls may
//! change what is pending.
//!
//! **Order on restore**: CPUID first, for everything else is checked against it; the TSC's frequency before its
//! value; system registers before the local APIC, whose base they hold; the APIC before the MSRs, for the deadline
//! timer needs its mode; the TSC before the deadline; events last, for other calls clear what is pending.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use runnel_snapshot::machine::Paused;
use runnel_snapshot::section::Section;
use serde::{Deserialize, Serialize};

use super::msrs::{self, Msr};
use super::{Host, StateError, deadline, xsave};
use crate::kvm::failed;

/// A vCPU that exists in KVM, and stands.
#[derive(Debug)]
pub struct Vcpu<'a> {
    /// Its KVM object.
    pub fd: &'a VcpuFd,
    /// What this host has.
    pub host: &'a Host,
}

/// All registers of a vCPU.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    /// What it says of itself.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// The frequency of its time stamp counter; 0 if the host did not know.
    pub tsc_khz: u32,
    /// Whether it runs, or waits to be started.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, tables and control registers.
    pub sregs: kvm_sregs,
    /// Which extended state is enabled.
    pub xcrs: kvm_xcrs,
    /// Extended state, in words, without the zeros at the end.
    pub xsave: Vec<u32>,
    /// Debug registers.
    pub debug_regs: kvm_debugregs,
    /// The local APIC.
    pub lapic: kvm_lapic_state,
    /// Model-specific registers.
    pub msrs: Vec<Msr>,
    /// Exceptions, interrupts and NMIs under way.
    pub events: kvm_vcpu_events,
}

/// Differences below this are how hosts of one kind differ; guests correct for as much (250 parts in a million, as
/// KVM itself has it).
const TSC_TOLERANCE_PPM: u64 = 250;

impl<'a> Section for Vcpu<'a> {
    const KIND: &'static str = "vcpu";
    const VERSION: u32 = 1;
    type State = VcpuState;
    type Deps = (&'a VcpuFd, &'a Host);
    type Error = StateError;

    fn save(&self, _: &Paused<'_>) -> Result<VcpuState, StateError> {
        let Self { fd, host } = *self;
        // First, for this call finishes an INIT that is under way, and that changes registers.
        let mp_state = fd.get_mp_state().map_err(failed("read a vCPU's run state"))?;
        let events = || fd.get_vcpu_events().map_err(failed("read pending events"));
        let _ = events()?; // only for what it does to CR2 and DR6
        let msrs = msrs::read(fd, host)?;
        let lapic = fd.get_lapic().map_err(failed("read the local APIC"))?;
        Ok(VcpuState {
            cpuid: fd
                .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
                .map_err(failed("read CPUID leaves"))?
                .as_slice()
                .to_vec(),
            tsc_khz: fd.get_tsc_khz().unwrap_or(0),
            mp_state,
            regs: fd.get_regs().map_err(failed("read general registers"))?,
            sregs: fd.get_sregs().map_err(failed("read system registers"))?,
            xcrs: fd.get_xcrs().map_err(failed("read extended control registers"))?,
            xsave: xsave::read(fd, host.xsave_bytes)?,
            debug_regs: fd.get_debug_regs().map_err(failed("read debug registers"))?,
            lapic,
            msrs,
            events: events()?,
        })
    }

    fn restore((fd, host): Self::Deps, mut state: VcpuState) -> Result<Self, StateError> {
        deadline::repair(&state.lapic, &mut state.msrs);
        let cpuid = CpuId::from_entries(&state.cpuid).map_err(|_| StateError::TooMany {
            what: "CPUID leaves",
            found: state.cpuid.len(),
        })?;
        fd.set_cpuid2(&cpuid).map_err(failed("take CPUID leaves"))?;
        set_tsc_frequency(fd, host, state.tsc_khz)?;
        fd.set_mp_state(state.mp_state)
            .map_err(failed("set a vCPU's run state"))?;
        fd.set_regs(&state.regs)
            .map_err(failed("set general registers"))?;
        fd.set_sregs(&state.sregs)
            .map_err(failed("set system registers"))?;
        fd.set_xcrs(&state.xcrs)
            .map_err(failed("set extended control registers"))?;
        xsave::write(fd, &state.xsave, host.xsave_bytes)?;
        fd.set_debug_regs(&state.debug_regs)
            .map_err(failed("set debug registers"))?;
        fd.set_lapic(&state.lapic).map_err(failed("set the local APIC"))?;
        msrs::write(fd, &state.msrs)?;
        fd.set_vcpu_events(&state.events)
            .map_err(failed("set pending events"))?;
        Ok(Self { fd, host })
    }
}

fn set_tsc_frequency(fd: &VcpuFd, host: &Host, wanted: u32) -> Result<(), StateError> {
    let own = fd.get_tsc_khz().unwrap_or(0);
    let differ_by = u64::from(own.abs_diff(wanted)) * 1_000_000;
    if wanted == 0 || differ_by <= u64::from(wanted) * TSC_TOLERANCE_PPM {
        return Ok(());
    }
    if !host.can_scale_tsc {
        return Err(StateError::TscFrequency { wanted, host: own });
    }
    Ok(fd
        .set_tsc_khz(wanted)
        .map_err(failed("scale the time stamp counter"))?)
}
