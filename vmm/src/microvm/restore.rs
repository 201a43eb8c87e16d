//! Rebuilding a machine that was saved.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::VcpuFd;
use runnel_snapshot::block_store::GuestRam;
use runnel_snapshot::section::{SavedSection, Section};

use super::{CompatibilityError, Microvm, RestoreError, Since, create_vm, dirty_log};
use crate::board::{Builder, Parts, Stores};
use crate::compatibility;
use crate::config::MicrovmConfig;
use crate::cpuid::{self, Topology};
use crate::exit::EndSignal;
use crate::kvm::{Kvm, failed};
use crate::layout::RamLayout;
use crate::state::{self, Clock, Host, Interrupts, Resumption, Timer};
use crate::vcpu::Vcpus;

/// What a machine is rebuilt from.
pub struct Saved<'a> {
    /// What it is made of: as saved, with whatever is overridden.
    pub config: &'a MicrovmConfig,
    /// Its RAM, perhaps still on its way.
    pub ram: Arc<GuestRam>,
    /// Where RAM is.
    pub layout: RamLayout,
    /// All of its sections.
    pub sections: Vec<SavedSection>,
    /// Opens what stands behind drives.
    pub stores: &'a mut Stores<'a>,
    /// With which time it goes on.
    pub clock: Resumption,
}

impl Microvm {
    /// Rebuilds a machine that was saved. Its vCPUs stand.
    ///
    /// Nothing of RAM is read before [`unpause`](Self::unpause), but the page of VMGenID is written: whoever maps RAM
    /// from afar makes that page the machine's own before.
    ///
    /// # Errors
    /// When this host cannot carry it, or a section is missing or makes no sense; nothing is left of it then.
    pub fn restore(saved: Saved<'_>, end: &EndSignal) -> Result<Self, RestoreError> {
        let Saved {
            config,
            ram,
            layout,
            mut sections,
            stores,
            clock,
        } = saved;
        let kvm = Kvm::open()?;
        let host = Host::of(&kvm)?;
        let vm = create_vm(&kvm, &ram, dirty_log(config))?;
        let parts = Parts {
            config,
            vm: &vm,
            ram: Arc::clone(&ram),
            end,
            stores: &mut |drive| stores(drive),
        };
        let board = Builder::restore(parts, &mut sections)?;
        let fds = (0..config.machine.vcpus.get()).map(|number| vm.create_vcpu(number));
        let fds: Vec<VcpuFd> = fds.collect::<Result<_, _>>()?;
        let saved_clock = state::take::<Clock<'_>>(&mut sections, "")?;
        let lead = saved_clock.lead(clock);
        let mut first = None;
        for (fd, number) in fds.iter().zip(0u32..) {
            let mut saved = state::take::<state::vcpu::Vcpu<'_>>(&mut sections, &number.to_string())?;
            saved.set_forward(lead);
            first.get_or_insert((fd, saved.clone()));
            state::vcpu::Vcpu::restore((fd, &host), saved)?;
        }
        Interrupts::restore(&vm, state::take::<Interrupts<'_>>(&mut sections, "")?)?;
        Timer::restore(&vm, state::take::<Timer<'_>>(&mut sections, "")?)?;
        let since_set = first.map_or(Ok(Duration::ZERO), |(fd, set)| state::tsc::since_set(fd, &set))?;
        Clock::restore((&vm, lead + since_set), saved_clock)?;
        if let Some(unknown) = sections.first() {
            return Err(RestoreError::UnknownSection {
                kind: unknown.kind.clone(),
                id: unknown.id.clone(),
            });
        }
        board.vmgenid().write_new(&ram)?;
        let vcpus = Vcpus::start(fds, board.buses(), end)?;
        Ok(Self::standing(vcpus, board, vm, ram, layout, Since::Restore)?)
    }
}

/// Holds what a saved machine needs against what this host has. Before [`Microvm::restore`].
///
/// # Errors
/// What this host lacks, by name.
pub fn check_compatibility(record: &BTreeMap<String, serde_json::Value>) -> Result<(), CompatibilityError> {
    let kvm = Kvm::open()?;
    let one = Topology { vcpus: 1, smt: false };
    let offered = cpuid::of_vcpu(&kvm.supported_cpuid()?, 0, one);
    let capability = |capability| kvm.extension(capability);
    if compatibility::check(record, offered.as_slice(), &capability).is_ok() {
        return Ok(());
    }
    // A KVM that runs guests on the bare processor gives them more than it says that it supports, and shows it only
    // in a vCPU that exists.
    let vcpu = kvm.create_vm()?.create_vcpu(0)?;
    vcpu.set_cpuid2(&offered).map_err(failed("take CPUID leaves"))?;
    let given = vcpu
        .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
        .map_err(failed("read CPUID leaves"))?;
    Ok(compatibility::check(record, given.as_slice(), &capability)?)
}
