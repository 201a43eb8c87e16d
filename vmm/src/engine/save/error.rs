//! Why a machine cannot be saved.

use std::io;

use runnel_snapshot::capture::{CaptureError, raw};
use runnel_snapshot::section::SectionError;
use runnel_snapshot::state::StateError;
use runnel_snapshot::units::ChunkIndex;
use runnel_snapshot::volume::VolumeName;

use crate::config::ResourceId;
use crate::engine::description::DescriptionError;
use crate::microvm::SaveError as MachineSaveError;

/// Why a machine cannot be saved. It runs on, or stays paused, as it was.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// Its state.
    #[error("the machine's state cannot be saved")]
    State(#[from] MachineSaveError),
    /// Its description.
    #[error(transparent)]
    Description(#[from] DescriptionError),
    /// A section.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// Its memory.
    #[error("guest memory cannot be read")]
    Memory(#[source] io::Error),
    /// A drive.
    #[error("drive {id} cannot be read")]
    Drive {
        /// Which drive.
        id: ResourceId,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A drive that is to be left out is not there.
    #[error("`excluded_drives` names {0}, and the machine has no such drive")]
    NoDrive(ResourceId),
    /// The image.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The raw memory file.
    #[error(transparent)]
    Raw(#[from] raw::RawError),
    /// The capture waits for a chunk, and the machine for the capture.
    #[error(
        "it was given up, since the machine waited for it while {0} of {1} is missing ({2}); the machine runs on"
    )]
    Stalled(ChunkIndex, VolumeName, String),
    /// The state's form.
    #[error(transparent)]
    Encode(#[from] StateError),
}
