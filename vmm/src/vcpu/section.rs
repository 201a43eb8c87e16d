//! A vCPU's registers, out of KVM and back.
//!
//! The order of the way back is a contract with KVM: CPUID first, since everything else is checked against it; XCR0
//! before the XSAVE area that it governs; special registers before the local APIC, whose base they hold; the local APIC
//! before the deadline of its timer, and that after the time stamp counter (see [`super::time`]); pending events last.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, Xsave, kvm_msr_entry};
use kvm_ioctls::{Cap, VcpuFd};
use runnel_snapshot::machine::Paused;
use runnel_snapshot::section::Section;
use vmm_sys_util::errno;

use super::state::{TscState, VcpuState};
use crate::kvm::{Kvm, KvmError, Vm, failed, tsc_offset};
use crate::msrs::{self, IA32_TSC, IA32_TSC_DEADLINE};

/// The most MSRs that one call takes (`KVM_MAX_MSR_ENTRIES` is 256).
const MSRS_PER_CALL: usize = 128;

/// The longest XSAVE area that is accepted: with AMX it is 11 KiB.
const XSAVE_BYTES_MAX: usize = 64 << 10;
/// The shortest: the legacy area and its header, as `struct kvm_xsave`.
const XSAVE_BYTES_MIN: usize = 4096;
/// The most MSRs that are accepted; KVM lists about a hundred.
const MSRS_MAX: usize = 4096;

/// Why a vCPU's state cannot be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// This host's KVM does not take an MSR.
    #[error("this host's KVM does not take MSR {index:#x} with the value {value:#x}")]
    Msr {
        /// Its number.
        index: u32,
        /// The value in the image.
        value: u64,
    },
    /// A field that cannot be.
    #[error("the vCPU's state has {found} {what}, which cannot be")]
    Field {
        /// Of what there are too many or too few.
        what: &'static str,
        /// How many.
        found: usize,
    },
}

/// A vCPU that stands still, as a section.
pub struct VcpuSection<'v> {
    /// KVM's object.
    pub fd: &'v VcpuFd,
    /// What saving and restoring need to know of the host.
    pub host: &'v HostRegisters,
}

/// What this host's KVM has to save.
#[derive(Clone, Debug)]
pub struct HostRegisters {
    /// Bytes of the XSAVE area.
    pub xsave_bytes: usize,
    /// The MSRs that a vCPU's state consists of.
    pub msrs: Vec<u32>,
    /// Whether a time stamp counter can run at another frequency than the host's.
    pub can_scale_tsc: bool,
}

impl HostRegisters {
    /// Asks KVM.
    ///
    /// # Errors
    /// When KVM does not say.
    pub fn of(kvm: &Kvm, vm: &Vm) -> Result<Self, KvmError> {
        let xsave_bytes = usize::try_from(vm.extension(Cap::Xsave2)).unwrap_or(0);
        Ok(Self {
            xsave_bytes: xsave_bytes.max(XSAVE_BYTES_MIN),
            msrs: msrs::of_state(kvm.msrs_to_save()?.as_slice()),
            can_scale_tsc: kvm.extension(Cap::TscControl) > 0,
        })
    }
}

impl Section for VcpuSection<'_> {
    const KIND: &'static str = "vcpu";
    const VERSION: u32 = 1;
    type State = VcpuState;
    type Deps = Self;
    type Error = VcpuStateError;

    fn save(&self, _: &Paused<'_>) -> Result<VcpuState, VcpuStateError> {
        let fd = self.fd;
        // First: it makes KVM bring pending events into the form that the other calls report.
        let mp_state = fd.get_mp_state().map_err(failed("read whether a vCPU runs"))?;
        let cpuid = fd
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("read a vCPU's CPUID leaves"))?;
        let times = read_msrs(fd, &[IA32_TSC, IA32_TSC_DEADLINE])?;
        let time = |index| times.iter().find(|msr| msr.0 == index).map_or(0, |msr| msr.1);
        Ok(VcpuState {
            cpuid: cpuid.as_slice().to_vec(),
            mp_state,
            regs: fd.get_regs().map_err(failed("read a vCPU's registers"))?,
            sregs: fd
                .get_sregs()
                .map_err(failed("read a vCPU's special registers"))?,
            xsave: read_xsave(fd, self.host.xsave_bytes)?,
            xcrs: fd.get_xcrs().map_err(failed("read a vCPU's XCR0"))?,
            debugregs: fd
                .get_debug_regs()
                .map_err(failed("read a vCPU's debug registers"))?,
            lapic: fd.get_lapic().map_err(failed("read a local APIC"))?,
            msrs: read_msrs(fd, &self.host.msrs)?,
            events: fd
                .get_vcpu_events()
                .map_err(failed("read a vCPU's pending events"))?,
            tsc: TscState {
                khz: fd
                    .get_tsc_khz()
                    .map_err(failed("read the frequency of a time stamp counter"))?,
                value: time(IA32_TSC),
                offset: tsc_offset::read(fd),
                deadline: time(IA32_TSC_DEADLINE),
            },
        })
    }

    fn restore(vcpu: Self, state: VcpuState) -> Result<Self, VcpuStateError> {
        check(&state)?;
        let fd = vcpu.fd;
        let cpuid = CpuId::from_entries(&state.cpuid).map_err(|_| VcpuStateError::Field {
            what: "CPUID leaves",
            found: state.cpuid.len(),
        })?;
        fd.set_cpuid2(&cpuid)
            .map_err(failed("set a vCPU's CPUID leaves"))?;
        fd.set_mp_state(state.mp_state)
            .map_err(failed("set whether a vCPU runs"))?;
        fd.set_regs(&state.regs)
            .map_err(failed("set a vCPU's registers"))?;
        fd.set_sregs(&state.sregs)
            .map_err(failed("set a vCPU's special registers"))?;
        fd.set_xcrs(&state.xcrs).map_err(failed("set a vCPU's XCR0"))?;
        write_xsave(fd, vcpu.host.xsave_bytes, &state.xsave)?;
        fd.set_debug_regs(&state.debugregs)
            .map_err(failed("set a vCPU's debug registers"))?;
        fd.set_lapic(&state.lapic).map_err(failed("set a local APIC"))?;
        write_msrs(fd, &state.msrs)?;
        fd.set_vcpu_events(&state.events)
            .map_err(failed("set a vCPU's pending events"))?;
        Ok(vcpu)
    }
}

fn check(state: &VcpuState) -> Result<(), VcpuStateError> {
    let fields = [
        ("bytes of XSAVE area", state.xsave.len(), XSAVE_BYTES_MAX),
        ("MSRs", state.msrs.len(), MSRS_MAX),
        ("CPUID leaves", state.cpuid.len(), KVM_MAX_CPUID_ENTRIES),
    ];
    match fields.into_iter().find(|(_, found, most)| found > most) {
        Some((what, found, _)) => Err(VcpuStateError::Field { what, found }),
        None => Ok(()),
    }
}

/// An XSAVE area of at least `bytes`.
fn xsave_area(bytes: usize) -> Result<Xsave, VcpuStateError> {
    let extra = bytes.max(XSAVE_BYTES_MIN) - XSAVE_BYTES_MIN;
    Xsave::new(extra.div_ceil(size_of::<u32>())).map_err(|_| VcpuStateError::Field {
        what: "bytes of XSAVE area",
        found: bytes,
    })
}

fn read_xsave(fd: &VcpuFd, bytes: usize) -> Result<Vec<u8>, VcpuStateError> {
    let mut area = xsave_area(bytes)?;
    // SAFETY: the area is as long as KVM_CAP_XSAVE2 says that KVM writes.
    unsafe { fd.get_xsave2(&mut area) }.map_err(failed("read a vCPU's vector registers"))?;
    let words = area
        .as_fam_struct_ref()
        .xsave
        .region
        .iter()
        .chain(area.as_slice());
    let mut saved: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
    while saved.last() == Some(&0) {
        saved.pop();
    }
    Ok(saved)
}

fn write_xsave(fd: &VcpuFd, bytes: usize, saved: &[u8]) -> Result<(), VcpuStateError> {
    if saved.len() > bytes.max(XSAVE_BYTES_MIN) {
        return Err(VcpuStateError::Field {
            what: "bytes of XSAVE area",
            found: saved.len(),
        });
    }
    let mut area = xsave_area(bytes)?;
    let mut words = saved.chunks(size_of::<u32>()).map(|part| {
        let mut word = [0; size_of::<u32>()];
        word[..part.len()].copy_from_slice(part);
        u32::from_le_bytes(word)
    });
    // SAFETY: the length of the area, which this reference could change, is left as it is.
    let fixed = unsafe { area.as_mut_fam_struct() };
    for (word, saved) in fixed.xsave.region.iter_mut().zip(words.by_ref()) {
        *word = saved;
    }
    for (word, saved) in area.as_mut_slice().iter_mut().zip(words) {
        *word = saved;
    }
    // SAFETY: the area is as long as KVM_CAP_XSAVE2 says that KVM reads.
    unsafe { fd.set_xsave2(&area) }.map_err(failed("set a vCPU's vector registers"))?;
    Ok(())
}

/// Reads those of `indexes` that this vCPU has. KVM stops at the first that it has not; that one is passed over.
fn read_msrs(fd: &VcpuFd, indexes: &[u32]) -> Result<Vec<(u32, u64)>, VcpuStateError> {
    let mut found = Vec::with_capacity(indexes.len());
    let mut rest = indexes;
    while !rest.is_empty() {
        let part = &rest[..rest.len().min(MSRS_PER_CALL)];
        let entries: Vec<_> = part
            .iter()
            .map(|index| kvm_msr_entry {
                index: *index,
                ..Default::default()
            })
            .collect();
        let mut msrs = msr_list(&entries)?;
        let read = fd.get_msrs(&mut msrs).map_err(failed("read a vCPU's MSRs"))?;
        found.extend(msrs.as_slice()[..read].iter().map(|msr| (msr.index, msr.data)));
        rest = &rest[(read + usize::from(read < part.len())).min(rest.len())..];
    }
    Ok(found)
}

/// Writes MSRs. One that KVM does not take but that has its value already is passed over.
pub(super) fn write_msrs(fd: &VcpuFd, msrs: &[(u32, u64)]) -> Result<(), VcpuStateError> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let part = &rest[..rest.len().min(MSRS_PER_CALL)];
        let entries: Vec<_> = part
            .iter()
            .map(|(index, data)| kvm_msr_entry {
                index: *index,
                data: *data,
                ..Default::default()
            })
            .collect();
        let written = fd
            .set_msrs(&msr_list(&entries)?)
            .map_err(failed("set a vCPU's MSRs"))?;
        rest = &rest[written..];
        if written < part.len() {
            let (index, value) = part[written];
            if read_msrs(fd, &[index])? != [(index, value)] {
                return Err(VcpuStateError::Msr { index, value });
            }
            rest = &rest[1..];
        }
    }
    Ok(())
}

fn msr_list(entries: &[kvm_msr_entry]) -> Result<Msrs, VcpuStateError> {
    Msrs::from_entries(entries).map_err(|_| VcpuStateError::Field {
        what: "MSRs",
        found: entries.len(),
    })
}

/// For `map_err` of calls on a vCPU, in this module's neighbours.
pub(super) fn refused(operation: &'static str) -> impl FnOnce(errno::Error) -> VcpuStateError {
    move |source| VcpuStateError::Kvm(failed(operation)(source))
}
