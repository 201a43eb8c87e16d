//! A machine: its RAM, its VM, its devices, its vCPUs.
//!
//! **The order contract.** vCPUs stop before devices are saved; devices resume before vCPUs. A machine is built with
//! its vCPUs standing, and nothing runs before [`Microvm::unpause`].
//!
//! ```text
//! build ──► standing ──unpause──► running ──pause──► standing (devices frozen) ──unpause──► running
//! restore ────▲                                          │ save
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::VcpuFd;
use runnel_devices::event_loop::{Frozen, StillBusy};
use runnel_devices::virtio::block::FileStore;
use runnel_snapshot::block_store::{BlockStore, GuestRam};
use runnel_snapshot::machine::Paused;
use runnel_snapshot::section::{SavedSection, Section};
use vm_memory::{Bytes, GuestAddress};

use crate::acpi::{self, AcpiError};
use crate::board::{Board, BoardError, BoardSaveError, Builder, Parts, StoreError, Stores};
use crate::boot::{self, BootError};
use crate::compatibility::{self, Incompatible};
use crate::config::{self, BootSource, MicrovmConfig};
use crate::cpuid::{self, Topology};
use crate::exit::EndSignal;
use crate::kvm::{DirtyLog, Kvm, KvmError, Vm, failed};
use crate::layout::{BadRamSize, RamLayout};
use crate::memory::{self, MemoryError};
use crate::msrs;
use crate::page_walk::{self, Bearings};
use crate::state::{self, Clock, Host, Interrupts, Resumption, StateError, Timer};
use crate::vcpu::{self, Stuck, VcpuError, Vcpus};
use crate::vmgenid::VmGenIdError;

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
    /// The tables cannot be written.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// A device cannot be had.
    #[error(transparent)]
    Board(#[from] BoardError),
    /// No VM generation identifier.
    #[error(transparent)]
    VmGenId(#[from] VmGenIdError),
    /// A vCPU cannot be had.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// Devices that have not begun cannot be stopped.
    #[error(transparent)]
    Devices(#[from] StillBusy),
}

/// Why a machine cannot be paused; it runs on.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// vCPUs wait for guest memory.
    #[error("the vCPUs cannot be stopped")]
    Vcpus(#[from] Stuck),
    /// Devices wait for guest memory or for their stores.
    #[error("the devices cannot be stopped")]
    Devices(#[from] StillBusy),
}

/// Why a machine cannot be rebuilt from what was saved of it.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// What the kernel held.
    #[error(transparent)]
    State(#[from] StateError),
    /// A device.
    #[error(transparent)]
    Board(#[from] BoardError),
    /// No VM generation identifier.
    #[error(transparent)]
    VmGenId(#[from] VmGenIdError),
    /// A vCPU's thread.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A section that nothing here belongs to.
    #[error(
        "the image has a section {kind:?} {id:?} that this Runnel does not know: resume it with a newer one"
    )]
    UnknownSection {
        /// Its kind.
        kind: String,
        /// Which one of its kind.
        id: String,
    },
    /// Devices that have not begun cannot be stopped.
    #[error(transparent)]
    Devices(#[from] StillBusy),
}

/// Why a saved machine cannot be resumed on this host.
#[derive(Debug, thiserror::Error)]
pub enum CompatibilityError {
    /// KVM cannot be asked.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// It lacks something.
    #[error(transparent)]
    Incompatible(#[from] Incompatible),
}

/// Why a machine cannot be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// It runs.
    #[error("the machine runs: pause it first")]
    NotPaused,
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// What the kernel holds.
    #[error(transparent)]
    State(#[from] StateError),
    /// A device.
    #[error(transparent)]
    Board(#[from] BoardSaveError),
}

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

/// A machine that stands: its devices are frozen, and what it stands since.
#[derive(Debug)]
struct Standing {
    _frozen: Frozen,
    since: Since,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Since {
    Build,
    Restore,
    Pause,
}

/// A machine. Dropping it ends its threads.
#[derive(Debug)]
pub struct Microvm {
    // Fields drop in this order: vCPUs end, then the devices go on into their end, then the VM goes, RAM last.
    vcpus: Vcpus,
    /// `None` while the machine runs.
    standing: Option<Standing>,
    board: Board,
    vm: Vm,
    ram: Arc<GuestRam>,
    layout: RamLayout,
}

impl Microvm {
    /// Builds a machine that boots, its drives over the files that `config` names. Its vCPUs stand.
    ///
    /// # Errors
    /// When something that it is to be made of cannot be had; nothing is left of it then.
    pub fn build(config: &MicrovmConfig, end: &EndSignal) -> Result<Self, BuildError> {
        Self::build_over(config, end, &mut open_file)
    }

    /// Builds a machine that boots, its drives over what `stores` opens. Its vCPUs stand.
    ///
    /// # Errors
    /// As for [`build`](Self::build).
    pub fn build_over(
        config: &MicrovmConfig,
        end: &EndSignal,
        stores: &mut Stores<'_>,
    ) -> Result<Self, BuildError> {
        let source = config.boot_source.as_ref().ok_or(BuildError::NoBootSource)?;
        let layout = RamLayout::new(config.machine.memory.bytes())?;
        let ram = Arc::new(memory::booted(layout)?);
        let entry = load_kernel(
            &ram,
            layout,
            source,
            config.command_line().as_deref().unwrap_or_default(),
        )?;

        let kvm = Kvm::open()?;
        let vm = create_vm(&kvm, &ram, dirty_log(config))?;
        let parts = Parts {
            config,
            vm: &vm,
            ram: Arc::clone(&ram),
            end,
            stores: &mut |drive| stores(drive),
        };
        let board = Builder::boot(parts)?;
        let topology = topology(config);
        let virtio = board.virtio_slots().collect();
        acpi::write(
            &ram,
            &acpi::Description {
                vcpus: topology.vcpus,
                virtio,
            },
        )?;
        board.vmgenid().write_new(&ram)?;

        let fds = create_vcpus(&kvm, &vm, topology)?;
        for (number, fd) in (0..).zip(&fds) {
            let refused = |source| VcpuError::Kvm { vcpu: number, source };
            msrs::set_for_boot(fd).map_err(refused)?;
            if number == 0 {
                vcpu::set_up_boot_vcpu(fd, entry.address).map_err(refused)?;
            }
        }
        let vcpus = Vcpus::start(fds, board.buses(), end)?;
        Ok(Self::standing(vcpus, board, vm, ram, layout, Since::Build)?)
    }

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
        for (fd, number) in fds.iter().zip(0u32..) {
            let mut saved = state::take::<state::vcpu::Vcpu<'_>>(&mut sections, &number.to_string())?;
            saved.set_forward(lead);
            state::vcpu::Vcpu::restore((fd, &host), saved)?;
        }
        Interrupts::restore(&vm, state::take::<Interrupts<'_>>(&mut sections, "")?)?;
        Timer::restore(&vm, state::take::<Timer<'_>>(&mut sections, "")?)?;
        Clock::restore((&vm, lead), saved_clock)?;
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

    /// Saves everything but the volumes.
    ///
    /// # Errors
    /// When the machine does not stand, or something of it cannot be saved.
    pub fn save(&self) -> Result<Vec<SavedSection>, SaveError> {
        let paused = self.paused().ok_or(SaveError::NotPaused)?;
        let host = Host::of(&Kvm::open()?)?;
        let mut sections = state::save(&self.vm, &self.vcpus, &host, &paused)?;
        sections.extend(self.board.save(&paused)?);
        Ok(sections)
    }

    fn standing(
        vcpus: Vcpus,
        board: Board,
        vm: Vm,
        ram: Arc<GuestRam>,
        layout: RamLayout,
        since: Since,
    ) -> Result<Self, StillBusy> {
        // None is at work: no driver has kicked one since it was made.
        let frozen = board.freeze(&|| false)?;
        Ok(Self {
            vcpus,
            standing: Some(Standing {
                _frozen: frozen,
                since,
            }),
            board,
            vm,
            ram,
            layout,
        })
    }

    /// What a host must have for this machine.
    ///
    /// # Errors
    /// When the machine does not stand, or KVM does not tell.
    pub fn compatibility(&self) -> Result<BTreeMap<String, serde_json::Value>, SaveError> {
        let _paused = self.paused().ok_or(SaveError::NotPaused)?;
        let boot_vcpu = self.vcpus.fds().next().ok_or(SaveError::NotPaused)?;
        let cpuid = boot_vcpu
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("read CPUID leaves"))?;
        let mut record = compatibility::record(cpuid.as_slice());
        let xcrs = boot_vcpu
            .get_xcrs()
            .map_err(failed("read extended control registers"))?;
        let xcr0 = xcrs.xcrs.iter().find(|register| register.xcr == 0);
        record.extend(compatibility::of_vcpu(
            xcr0.map_or(0, |register| register.value),
            boot_vcpu.get_tsc_khz().unwrap_or(0),
        ));
        let kvm = Kvm::open()?;
        record.extend([compatibility::of_kvm(&|capability| kvm.extension(capability))]);
        Ok(record)
    }

    /// Lets the devices, and then the vCPUs run.
    pub fn unpause(&mut self) {
        let since = self.standing.take().map(|standing| standing.since);
        if since == Some(Since::Restore) {
            self.board.resume();
            self.board.vmgenid().tell();
        }
        if matches!(since, Some(Since::Restore | Since::Pause)) {
            self.vcpus.tell_of_pause();
        }
        self.vcpus.let_run();
    }

    /// Stops the vCPUs, and then the devices, and waits until they stand; asks `give_up` now and then, since
    /// whatever waits for a page of guest RAM cannot be interrupted.
    ///
    /// # Errors
    /// What did not stop before `give_up` said true; the machine runs on then.
    pub fn pause(&mut self, give_up: &dyn Fn() -> bool) -> Result<(), PauseError> {
        if self.standing.is_some() {
            return Ok(());
        }
        self.vcpus.stand(give_up)?;
        match self.board.freeze(give_up) {
            Ok(frozen) => {
                self.standing = Some(Standing {
                    _frozen: frozen,
                    since: Since::Pause,
                });
                Ok(())
            }
            Err(busy) => {
                self.vcpus.let_run();
                Err(busy.into())
            }
        }
    }

    /// Asks the vCPUs that are in no fault to stand, and does not wait: a stalled machine's. Else its guest would see
    /// processors that vanish for minutes, and call them hung. [`let_go`](Self::let_go) takes it back, and so do
    /// [`pause`](Self::pause) and [`unpause`](Self::unpause). Devices go on: they wait for nobody.
    pub fn hold(&self) {
        self.vcpus.ask_to_stand();
    }

    /// Lets vCPUs run that were held; not those of a machine that was paused meanwhile.
    pub fn let_go(&self) {
        if self.standing.is_none() {
            self.vcpus.tell_of_hold();
            self.vcpus.let_run();
        }
    }

    /// Vouches that the machine stands; `None` if it does not.
    #[must_use]
    pub fn paused(&self) -> Option<Paused<'_>> {
        self.standing.as_ref().map(|_| Paused::until(|| {}))
    }

    /// The pages of RAM, by their first address, that the vCPUs need first when they run again; the first vCPU's
    /// first, as far as page tables that `can_be_read` lead. The machine must stand.
    #[must_use]
    pub fn first_pages(&self, can_be_read: &dyn Fn(GuestAddress) -> bool) -> Vec<GuestAddress> {
        let mut pages = Vec::new();
        for fd in self.vcpus.fds() {
            let (Ok(regs), Ok(sregs)) = (fd.get_regs(), fd.get_sregs()) else {
                continue;
            };
            let read = |at: GuestAddress| {
                if can_be_read(at) {
                    self.ram.read_obj(at).ok()
                } else {
                    None
                }
            };
            pages.extend(page_walk::first_pages(
                Bearings {
                    regs: &regs,
                    sregs: &sregs,
                },
                read,
            ));
        }
        pages
    }

    /// Guest RAM.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
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

/// Opens the file that the drive's configuration names.
///
/// # Errors
/// When it cannot be a drive.
pub fn open_file(drive: &config::Drive) -> Result<Arc<dyn BlockStore>, StoreError> {
    Ok(Arc::new(FileStore::open(&drive.path, drive.is_read_only)?))
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

fn dirty_log(config: &MicrovmConfig) -> DirtyLog {
    if config.machine.track_dirty_pages {
        DirtyLog::On
    } else {
        DirtyLog::Off
    }
}

fn topology(config: &MicrovmConfig) -> Topology {
    Topology {
        vcpus: config.machine.vcpus.get(),
        smt: config.machine.smt,
    }
}

fn create_vm(kvm: &Kvm, ram: &GuestRam, log: DirtyLog) -> Result<Vm, KvmError> {
    let mut vm = kvm.create_vm()?;
    vm.set_ram(ram.clone(), log)?;
    vm.create_interrupt_controllers()?;
    Ok(vm)
}

/// vCPUs that know what they are, and nothing more: everything else depends on CPUID.
fn create_vcpus(kvm: &Kvm, vm: &Vm, topology: Topology) -> Result<Vec<VcpuFd>, BuildError> {
    let supported = kvm.supported_cpuid()?;
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
