//! A machine: its RAM, its VM, its vCPUs.
//!
//! **The order contract.** vCPUs stop before devices are saved; devices resume before vCPUs. A machine is built with
//! its vCPUs standing, and nothing runs before [`Microvm::unpause`].

use std::fs::File;
use std::io;
use std::path::PathBuf;

use kvm_bindings::CpuId;
use kvm_ioctls::VcpuFd;
use runnel_snapshot::block_store::GuestRam;

use crate::board::{Board, BoardError};
use crate::boot::{self, BootError};
use crate::config::{BootSource, MicrovmConfig};
use crate::cpuid::{self, Topology};
use crate::exit::EndSignal;
use crate::kvm::{DirtyLog, Kvm, KvmError, Vm, failed};
use crate::layout::{BadRamSize, RamLayout};
use crate::memory::{self, MemoryError};
use crate::msrs;
use crate::vcpu::{self, Stuck, VcpuError, Vcpus};

/// Why a machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// There is nothing to boot.
    #[error("there is no kernel to boot: set a boot source first")]
    NoBootSource,
    /// A file cannot be opened.
    #[error("cannot open the {what} {path:?}")]
    Open {
        /// What it is.
        what: &'static str,
        /// Where it is.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// RAM of a size that cannot be.
    #[error(transparent)]
    RamSize(#[from] BadRamSize),
    /// No RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The kernel cannot be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A device cannot be had.
    #[error(transparent)]
    Board(#[from] BoardError),
    /// A vCPU cannot be had.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
}

/// A machine. Dropping it ends its threads.
#[derive(Debug)]
pub struct Microvm {
    // Fields drop in this order: vCPUs end before the VM goes, and RAM is unmapped last.
    vcpus: Vcpus,
    board: Board,
    vm: Vm,
    ram: GuestRam,
    layout: RamLayout,
}

impl Microvm {
    /// Builds a machine that boots. Its vCPUs stand.
    ///
    /// # Errors
    /// When something that it is to be made of cannot be had; nothing is left of it then.
    pub fn build(config: &MicrovmConfig, end: &EndSignal) -> Result<Self, BuildError> {
        let source = config.boot_source.as_ref().ok_or(BuildError::NoBootSource)?;
        let layout = RamLayout::new(config.machine.memory.bytes())?;
        let ram = memory::booted(layout)?;
        let entry = load_kernel(
            &ram,
            layout,
            source,
            config.command_line().as_deref().unwrap_or_default(),
        )?;

        let kvm = Kvm::open()?;
        let log = if config.machine.track_dirty_pages {
            DirtyLog::On
        } else {
            DirtyLog::Off
        };
        let vm = create_vm(&kvm, &ram, log)?;
        let board = Board::new(config, &vm, end)?;
        let topology = Topology {
            vcpus: config.machine.vcpus.get(),
            smt: config.machine.smt,
        };
        let fds = create_vcpus(&kvm, &vm, topology)?;
        for (number, fd) in (0..).zip(&fds) {
            let refused = |source| VcpuError::Kvm { vcpu: number, source };
            msrs::set_for_boot(fd).map_err(refused)?;
            if number == 0 {
                vcpu::set_up_boot_vcpu(fd, entry.address).map_err(refused)?;
            }
        }
        let vcpus = Vcpus::start(fds, &board.buses, end)?;
        Ok(Self {
            vcpus,
            board,
            vm,
            ram,
            layout,
        })
    }

    /// Lets the vCPUs run.
    pub fn unpause(&self) {
        self.vcpus.let_run();
    }

    /// Makes the vCPUs stand, and waits until they do; asks `give_up` now and then, since a vCPU that waits for a
    /// page of guest RAM cannot be interrupted.
    ///
    /// # Errors
    /// Which vCPUs did not come before `give_up` said true; the machine runs on then.
    pub fn pause(&self, give_up: &dyn Fn() -> bool) -> Result<(), Stuck> {
        self.vcpus.stand(give_up)
    }

    /// Guest RAM.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Where RAM is.
    #[must_use]
    pub fn layout(&self) -> RamLayout {
        self.layout
    }

    /// Its devices.
    #[must_use]
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// Its VM.
    #[must_use]
    pub fn vm(&self) -> &Vm {
        &self.vm
    }
}

fn load_kernel(
    ram: &GuestRam,
    layout: RamLayout,
    source: &BootSource,
    command_line: &str,
) -> Result<boot::Entry, BuildError> {
    let open = |what, path: &PathBuf| {
        File::open(path).map_err(|source| BuildError::Open {
            what,
            path: path.clone(),
            source,
        })
    };
    let mut kernel = open("kernel", &source.kernel)?;
    let mut initrd = source
        .initrd
        .as_ref()
        .map(|path| open("initrd", path))
        .transpose()?;
    let source = boot::Source {
        kernel: &mut kernel,
        initrd: initrd.as_mut(),
        command_line,
    };
    Ok(boot::load(ram, layout, source)?)
}

fn create_vm(kvm: &Kvm, ram: &GuestRam, log: DirtyLog) -> Result<Vm, KvmError> {
    let mut vm = kvm.create_vm()?;
    vm.set_ram(ram.clone(), log)?;
    vm.create_interrupt_controllers()?;
    Ok(vm)
}

/// vCPUs that know what they are, and nothing more: everything else depends on CPUID.
fn create_vcpus(kvm: &Kvm, vm: &Vm, topology: Topology) -> Result<Vec<VcpuFd>, BuildError> {
    let supported: CpuId = kvm.supported_cpuid()?;
    let create = |number| {
        let fd = vm.create_vcpu(number)?;
        fd.set_cpuid2(&cpuid::of_vcpu(&supported, number, topology))
            .map_err(failed("take CPUID leaves"))?;
        Ok(fd)
    };
    (0..topology.vcpus)
        .map(|number| create(number).map_err(|source| VcpuError::Kvm { vcpu: number, source }.into()))
        .collect()
}
