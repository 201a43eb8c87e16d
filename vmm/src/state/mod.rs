//! What the kernel holds of a machine, as sections: vCPUs, interrupt controllers, interval timer, clock.
//!
//! Each section is a view of a KVM object, which exists before and after: saving reads the object, restoring fills it
//! in. KVM's own structures are kept byte for byte, as the kernel's interface keeps them for ever.
//!
//! **Order on restore** ([`vcpu`] has its own inside): vCPUs, then interrupt controllers and timer, then the clock.
//! Devices are rebuilt before, and rest; when all of this stands they go on, and raise their lines again.

mod clock;
mod deadline;
mod interrupts;
mod msrs;
pub(crate) mod tsc;
pub mod vcpu;
mod xsave;

use kvm_ioctls::Cap;
use runnel_snapshot::machine::Paused;
use runnel_snapshot::section::{SavedSection, Section, SectionError};

use crate::kvm::{Kvm, KvmError, Vm};
use crate::vcpu::Vcpus;
use vcpu::{Vcpu, VcpuState};

pub use clock::{Clock, Resumption};
pub use interrupts::{Interrupts, Timer};
pub use msrs::Msr;

/// Why what the kernel holds cannot be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A list that KVM would not take.
    #[error("a saved vCPU has {found} {what}, more than KVM takes")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        found: usize,
    },
    /// A register that this host does not have, or not with this value.
    #[error(
        "this host's KVM does not take the register {} with the value {value:#x}: resume the machine on a host like its own",
        msrs::name(*index)
    )]
    Msr {
        /// Which register.
        index: u32,
        /// What it held.
        value: u64,
    },
    /// More extended state than this host has.
    #[error(
        "the machine was saved with {found} bytes of extended processor state, and this host has {host}: it lacks an instruction set extension"
    )]
    Xsave {
        /// In the image.
        found: usize,
        /// Here.
        host: usize,
    },
    /// A time stamp counter of another frequency, and no way to scale it.
    #[error(
        "the machine's TSC runs at {wanted} kHz and this host's at {host} kHz, which it cannot scale: resume the machine on a host like its own"
    )]
    TscFrequency {
        /// In the image.
        wanted: u32,
        /// Here.
        host: u32,
    },
    /// A section that should be there is not.
    #[error("the image has no section {kind:?} {id:?}")]
    Missing {
        /// Its kind.
        kind: &'static str,
        /// Which one of its kind.
        id: String,
    },
    /// A section that makes no sense.
    #[error(transparent)]
    Section(#[from] SectionError),
}

/// What saving and restoring need to know of this host.
#[derive(Debug)]
pub struct Host {
    /// The registers to save.
    msrs: Vec<u32>,
    /// Bytes of extended processor state.
    xsave_bytes: usize,
    can_scale_tsc: bool,
}

impl Host {
    /// Asks `kvm`.
    ///
    /// # Errors
    /// When it does not say.
    pub fn of(kvm: &Kvm) -> Result<Self, KvmError> {
        Ok(Self {
            msrs: msrs::to_save(kvm.msrs_to_save()?.as_slice()),
            // 0 where the kernel is older than the question: then it is what every kernel had before.
            xsave_bytes: usize::try_from(kvm.extension(Cap::Xsave2))
                .unwrap_or(0)
                .max(xsave::BYTES_MIN),
            can_scale_tsc: kvm.extension(Cap::TscControl) > 0,
        })
    }
}

/// Saves what the kernel holds of a machine that stands.
///
/// # Errors
/// When KVM does not tell.
pub fn save(
    vm: &Vm,
    vcpus: &Vcpus,
    host: &Host,
    paused: &Paused<'_>,
) -> Result<Vec<SavedSection>, StateError> {
    let mut states: Vec<VcpuState> = vcpus
        .fds()
        .map(|fd| Vcpu { fd: &fd, host }.save(paused))
        .collect::<Result<_, _>>()?;
    let read_clock = || Clock { vm }.save(paused);
    let clock = match vcpus.fds().next() {
        Some(first) => {
            let (counter, clock) = tsc::with_counter(&first, read_clock)?;
            tsc::put_in_step(&mut states, counter);
            clock
        }
        None => read_clock()?,
    };
    let mut sections: Vec<SavedSection> = states
        .iter()
        .zip(0u32..)
        .map(|(state, number)| SavedSection::of::<Vcpu<'_>>(number.to_string(), state))
        .collect::<Result<_, _>>()?;
    sections.push(SavedSection::of::<Interrupts<'_>>(
        "",
        &Interrupts { vm }.save(paused)?,
    )?);
    sections.push(SavedSection::of::<Timer<'_>>("", &Timer { vm }.save(paused)?)?);
    sections.push(SavedSection::of::<Clock<'_>>("", &clock)?);
    Ok(sections)
}

/// Takes the section `kind` `id` out of `saved`.
///
/// # Errors
/// When it is missing, or does not hold what it promises.
pub fn take<S: Section>(saved: &mut Vec<SavedSection>, id: &str) -> Result<S::State, StateError> {
    let at = saved
        .iter()
        .position(|section| section.kind == S::KIND && section.id == id);
    let at = at.ok_or_else(|| StateError::Missing {
        kind: S::KIND,
        id: id.to_owned(),
    })?;
    Ok(saved.swap_remove(at).state_of::<S>()?)
}
