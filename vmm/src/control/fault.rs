//! Why a request was refused or failed: the text behind `fault_message`.

use runnel_snapshot::causes::with_causes;

use super::guest::GuestError;
use crate::config::ConfigError;

/// Why a request was refused or failed. Texts and prefixes are Firecracker's where it has the same case: clients
/// look for them.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// Too early.
    #[error("The requested operation is not supported before starting the microVM.")]
    PreBoot,
    /// Too late.
    #[error("The requested operation is not supported after starting the microVM.")]
    PostBoot,
    /// What was given makes no machine.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There is nothing to boot.
    #[error("Start microvm error: Cannot start microvm without kernel configuration.")]
    NoKernel,
    /// The machine could not be booted.
    #[error("Start microvm error: {0}")]
    Start(String),
    /// Something was configured before.
    #[error(
        "Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources."
    )]
    LoadNotAllowed,
    /// The machine could not be loaded.
    #[error("Load snapshot error: {0}")]
    Load(String),
    /// The machine runs, and its snapshot would be torn.
    #[error(
        "Create snapshot error: the microVM is running: pause it first (PATCH /vm, state Paused), \
         or save an image (image_path)"
    )]
    SaveWhileRunning,
    /// The snapshot could not be made.
    #[error("Create snapshot error: {0}")]
    Create(String),
    /// The log cannot go there.
    #[error("Logger error: {0}")]
    Logger(String),
    /// The machine could not do it.
    #[error("Internal VMM error: {0}")]
    Internal(String),
}

impl Fault {
    pub(super) fn start(error: GuestError) -> Self {
        Self::Start(with_causes(error.as_ref()))
    }

    pub(super) fn load(error: GuestError) -> Self {
        Self::Load(with_causes(error.as_ref()))
    }

    pub(super) fn create(error: GuestError) -> Self {
        Self::Create(with_causes(error.as_ref()))
    }

    pub(super) fn logger(error: GuestError) -> Self {
        Self::Logger(with_causes(error.as_ref()))
    }

    pub(super) fn internal(error: GuestError) -> Self {
        Self::Internal(with_causes(error.as_ref()))
    }
}
