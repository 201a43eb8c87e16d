//! A machine: its RAM, its VM, its devices, its vCPUs.
//!
//! **The order contract.** vCPUs stop before devices are saved; devices resume before vCPUs. A machine is built with
//! its vCPUs standing, and nothing runs before [`Microvm::unpause`].
//!
//! ```text
//! build ──► standing ──unpause──► running ──pause──► standing (devices frozen) ──unpause──► running
//! restore ────▲                                          │ save
//! ```

mod build;
mod error;
mod restore;

use std::collections::BTreeMap;
use std::sync::Arc;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use runnel_devices::event_loop::{Frozen, StillBusy};
use runnel_snapshot::block_store::GuestRam;
use runnel_snapshot::machine::Paused;
use runnel_snapshot::section::SavedSection;
use vm_memory::{Bytes, GuestAddress};

use crate::board::Board;
use crate::compatibility;
use crate::config::MicrovmConfig;
use crate::kvm::{DirtyLog, Kvm, KvmError, Vm, failed};
use crate::layout::RamLayout;
use crate::page_walk::{self, Bearings};
use crate::state::{self, Host};
use crate::vcpu::Vcpus;

pub use build::open_file;
pub use error::{BuildError, CompatibilityError, PauseError, RestoreError, SaveError};
pub use restore::{Saved, check_compatibility};

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

fn dirty_log(config: &MicrovmConfig) -> DirtyLog {
    if config.machine.track_dirty_pages {
        DirtyLog::On
    } else {
        DirtyLog::Off
    }
}

fn create_vm(kvm: &Kvm, ram: &GuestRam, log: DirtyLog) -> Result<Vm, KvmError> {
    let mut vm = kvm.create_vm()?;
    vm.set_ram(ram.clone(), log)?;
    vm.create_interrupt_controllers()?;
    Ok(vm)
}
