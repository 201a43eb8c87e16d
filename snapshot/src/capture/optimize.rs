//! Puts a working set with an image: the same machine, with what it touches first laid together, and the order written
//! down. The image's layers stay as they are; over them comes one for each volume of which chunks were recorded.
//! [`squash`](super::squash) takes these away again.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::{CaptureError, CaptureSettings, Job, VolumeSource};
use crate::image::below::BelowImage;
use crate::image::layout::{Layout, LayoutError};
use crate::image::manifest::ImageVolume;
use crate::image::reference::Wanted;
use crate::image::{Image, ImageError};
use crate::source::VolumeId;
use crate::state::MachineState;
use crate::units::ChunkIndex;
use crate::working_set::{Misfit, WorkingSet};

/// Why an image cannot be optimized.
#[derive(Debug, thiserror::Error)]
pub enum OptimizeError {
    /// It cannot be opened, or has a working set that cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Its directory is none.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The working set is not of this image.
    #[error("the working set is not one of this image")]
    Misfit(#[from] Misfit),
    /// Nothing was given, and the image has nothing.
    #[error("no working set was recorded with the image: record one, with `runnel resume --record`")]
    NothingRecorded,
    /// The working set has no chunk.
    #[error("the working set is empty: the machine has touched nothing while it was recorded")]
    Empty,
    /// The capture of its volumes.
    #[error(transparent)]
    Capture(#[from] CaptureError),
}

/// Prepares to write the image of a directory, that of them which `wanted` names, with `recorded` as its working set, or
/// its own if there is none: the job to run, and the state to run it with. Of the settings the level counts alone, for
/// chunks of several parts.
///
/// # Errors
/// When it is no image, incomplete, or of a newer Runnel, or the working set is none of this image.
pub fn optimize(
    path: &Path,
    wanted: &Wanted,
    recorded: Option<WorkingSet>,
    settings: CaptureSettings,
) -> Result<(Job, MachineState), OptimizeError> {
    let image = Image::open_directory(path, wanted)?;
    let layout = Arc::new(Layout::open(path)?);
    let state = image.state()?;
    let recorded = match recorded {
        Some(recorded) => recorded,
        None => image.working_set()?.ok_or(OptimizeError::NothingRecorded)?,
    };
    if recorded.is_empty() {
        return Err(OptimizeError::Empty);
    }
    let mut hot: BTreeMap<VolumeId, Vec<ChunkIndex>> = BTreeMap::new();
    for id in recorded.of_volumes(&image.source_volumes())? {
        hot.entry(id.volume).or_default().push(id.chunk);
    }
    let mut source = |(number, volume): (u16, &ImageVolume)| match hot.remove(&VolumeId(number)) {
        None => VolumeSource::Unchanged {
            below: BelowImage::whole(Arc::clone(&layout)),
            volume: volume.clone(),
        },
        Some(chunks) => VolumeSource::HotFirst {
            store: Arc::clone(&image.store),
            layout: Arc::clone(&layout),
            base: volume.clone(),
            chunks,
        },
    };
    let volumes = (0..).zip(&image.manifest.volumes);
    let volumes = volumes.map(|(number, volume)| (volume.name.clone(), source((number, volume))));
    let first_chunks = state.first_chunks.iter();
    let first_chunks = first_chunks.map(|first| (first.volume.clone(), first.chunk));
    let job = Job::new(settings, volumes.collect())?
        .with_first_chunks(first_chunks.collect())
        .with_parent(image.digest())
        .with_recorded(recorded);
    Ok((job, state))
}
