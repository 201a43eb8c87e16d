//! Machine state out of a machine that stands still, and back into one that was just made: the sections that KVM keeps.
//!
//! The order back is fixed: interrupt controllers before vCPUs, since local APICs speak to them; vCPUs before their
//! counters; the clock last, when nothing is left that takes long.

use std::collections::BTreeMap;

use kvm_ioctls::VcpuFd;
use runnel_snapshot::machine::Paused;
use runnel_snapshot::section::{SavedSection, Section, SectionError};

use crate::clock::Clock;
use crate::interrupts::{InterruptControllers, IntervalTimer};
use crate::kvm::{KvmError, Vm};
use crate::vcpu::{HostRegisters, TscError, VcpuSection, VcpuStateError, Vcpus, restore_tscs};

/// Why machine state cannot be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A section.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A vCPU.
    #[error("the state of vCPU {vcpu} cannot be saved or restored")]
    Vcpu {
        /// Its number.
        vcpu: u8,
        /// Why.
        #[source]
        source: VcpuStateError,
    },
    /// Time.
    #[error(transparent)]
    Tsc(#[from] TscError),
    /// The image lacks something.
    #[error("the image has no section {kind:?} {id:?}: it is incomplete")]
    Missing {
        /// What kind.
        kind: &'static str,
        /// Which one.
        id: String,
    },
    /// The image has something that this Runnel does not know.
    #[error(
        "the image has a section {kind:?} {id:?} that this Runnel does not know: resume it with a newer Runnel"
    )]
    Unknown {
        /// What kind.
        kind: String,
        /// Which one.
        id: String,
    },
    /// The image has something twice.
    #[error("the image has two sections {kind:?} {id:?}")]
    Twice {
        /// What kind.
        kind: String,
        /// Which one.
        id: String,
    },
}

/// The sections of an image, to be taken one by one; what is left at the end was not understood.
#[derive(Debug, Default)]
pub struct Sections(BTreeMap<(String, String), SavedSection>);

impl Sections {
    /// Sorts the sections of an image.
    ///
    /// # Errors
    /// When two have the same kind and identifier.
    pub fn new(sections: Vec<SavedSection>) -> Result<Self, StateError> {
        let mut sorted = BTreeMap::new();
        for section in sections {
            let key = (section.kind.clone(), section.id.clone());
            if let Some(SavedSection { kind, id, .. }) = sorted.insert(key, section) {
                return Err(StateError::Twice { kind, id });
            }
        }
        Ok(Self(sorted))
    }

    /// Takes a section as it is.
    ///
    /// # Errors
    /// When there is none.
    pub fn take_saved(&mut self, kind: &'static str, id: &str) -> Result<SavedSection, StateError> {
        let key = (kind.to_owned(), id.to_owned());
        self.0.remove(&key).ok_or(StateError::Missing { kind, id: key.1 })
    }

    /// Takes the state of an `S`.
    ///
    /// # Errors
    /// When there is none, or it is newer than this Runnel, or malformed.
    pub fn take<S: Section>(&mut self, id: &str) -> Result<S::State, StateError> {
        Ok(self.take_saved(S::KIND, id)?.state_of::<S>()?)
    }

    /// Everything was taken.
    ///
    /// # Errors
    /// Names a section that was not: dropping state that somebody saved would change the machine.
    pub fn finish(self) -> Result<(), StateError> {
        match self.0.into_values().next() {
            Some(SavedSection { kind, id, .. }) => Err(StateError::Unknown { kind, id }),
            None => Ok(()),
        }
    }
}

/// Saves what KVM keeps of a machine.
///
/// # Errors
/// When KVM does not tell.
pub fn save_kvm(
    vm: &Vm,
    vcpus: &Vcpus,
    host: &HostRegisters,
    paused: &Paused<'_>,
) -> Result<Vec<SavedSection>, StateError> {
    // The clock first: it goes on while the rest is read.
    let clock = Clock { vm, catch_up: false };
    let mut sections = vec![saved(&clock, "", clock.save(paused)?)?];
    for (number, fd) in (0u8..).zip(vcpus.fds()) {
        let vcpu = VcpuSection { fd: &fd, host };
        let state = vcpu
            .save(paused)
            .map_err(|source| StateError::Vcpu { vcpu: number, source })?;
        sections.push(saved(&vcpu, number.to_string(), state)?);
    }
    let controllers = InterruptControllers(vm);
    sections.push(saved(&controllers, "", controllers.save(paused)?)?);
    let timer = IntervalTimer(vm);
    sections.push(saved(&timer, "", timer.save(paused)?)?);
    Ok(sections)
}

fn saved<S: Section>(_: &S, id: impl Into<String>, state: S::State) -> Result<SavedSection, SectionError> {
    SavedSection::of::<S>(id, &state)
}

/// Restores what KVM keeps into a machine that was just made. `catch_up`: see [`Clock`].
///
/// # Errors
/// When the image lacks something, or this host cannot carry it.
pub fn restore_kvm(
    vm: &Vm,
    fds: &[VcpuFd],
    host: &HostRegisters,
    sections: &mut Sections,
    catch_up: bool,
) -> Result<(), StateError> {
    InterruptControllers::restore(
        InterruptControllers(vm),
        sections.take::<InterruptControllers<'_>>("")?,
    )?;
    IntervalTimer::restore(IntervalTimer(vm), sections.take::<IntervalTimer<'_>>("")?)?;
    let mut times = Vec::with_capacity(fds.len());
    for (vcpu, fd) in (0u8..).zip(fds) {
        let state = sections.take::<VcpuSection<'_>>(&vcpu.to_string())?;
        times.push((fd, state.tsc));
        VcpuSection::restore(VcpuSection { fd, host }, state)
            .map_err(|source| StateError::Vcpu { vcpu, source })?;
    }
    restore_tscs(&times, host.can_scale_tsc)?;
    Clock::restore(Clock { vm, catch_up }, sections.take::<Clock<'_>>("")?)?;
    for fd in fds {
        // Tells the guest's watchdogs that they were not asleep, but the machine was. A guest that does not use KVM's
        // clock cannot be told.
        match fd.kvmclock_ctrl() {
            Err(error) if error.errno() != libc::EINVAL => {
                return Err(KvmError::Call {
                    operation: "tell the guest that it was paused",
                    source: error,
                }
                .into());
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(kind: &str, id: &str) -> SavedSection {
        SavedSection {
            kind: kind.into(),
            id: id.into(),
            version: 1,
            state: serde_json::Value::Null,
        }
    }

    #[test]
    fn sections_that_are_missing_unknown_or_twice_are_named() {
        let twice = Sections::new(vec![section("vcpu", "0"), section("vcpu", "0")]).unwrap_err();
        assert_eq!(twice.to_string(), r#"the image has two sections "vcpu" "0""#);
        let mut sections = Sections::new(vec![section("vcpu", "0"), section("teleporter", "")]).unwrap();
        assert!(matches!(
            sections.take_saved("vcpu", "1"),
            Err(StateError::Missing { .. })
        ));
        sections.take_saved("vcpu", "0").unwrap();
        assert!(matches!(sections.finish(), Err(StateError::Unknown { kind, .. }) if kind == "teleporter"));
    }
}
