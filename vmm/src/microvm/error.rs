//! Why a machine cannot be built, rebuilt, paused or saved.

use std::io;
use std::path::PathBuf;

use runnel_devices::event_loop::StillBusy;

use crate::acpi::AcpiError;
use crate::board::{BoardError, BoardSaveError};
use crate::boot::BootError;
use crate::compatibility::Incompatible;
use crate::kvm::KvmError;
use crate::layout::BadRamSize;
use crate::memory::MemoryError;
use crate::state::StateError;
use crate::vcpu::{Stuck, VcpuError};
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
