//! Writes an image anew, each volume as one full layer: byte for byte the same machine, without the layers that it lay
//! over. Chunks are read one at a time as the capture comes to them, and verified.

use std::path::Path;
use std::sync::Arc;

use super::{CaptureError, CaptureSettings, ImageContent, Job, VolumeSource};
use crate::image::below::BelowImage;
use crate::image::layout::{Layout, LayoutError};
use crate::image::manifest::ImageVolume;
use crate::image::reference::Wanted;
use crate::image::{Image, ImageError};
use crate::state::MachineState;

/// Why an image cannot be squashed.
#[derive(Debug, thiserror::Error)]
pub enum SquashError {
    /// It cannot be opened.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Its directory is none.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The capture of its volumes.
    #[error(transparent)]
    Capture(#[from] CaptureError),
}

/// Prepares to write the image of a directory, that of them which `wanted` names, anew: the job to run, and the state to
/// run it with. Volumes that are one full layer already are taken over as they are. The settings' chunk size counts for
/// nothing, as chunks keep theirs.
///
/// # Errors
/// When it is no image, incomplete, or of a newer Runnel.
pub fn squash(
    path: &Path,
    wanted: &Wanted,
    settings: CaptureSettings,
) -> Result<(Job, MachineState), SquashError> {
    let image = Image::open_directory(path, wanted)?;
    let layout = Arc::new(Layout::open(path)?);
    let state = image.state()?;
    let source = |volume: &ImageVolume| match is_squashed(volume) {
        true => VolumeSource::Unchanged {
            below: BelowImage::whole(Arc::clone(&layout)),
            volume: volume.clone(),
        },
        false => VolumeSource::Squashed(Arc::new(ImageContent::new(&image, volume))),
    };
    let volumes = image.manifest.volumes.iter();
    let volumes = volumes.map(|volume| (volume.name.clone(), source(volume)));
    let first_chunks = state.first_chunks.iter();
    let first_chunks = first_chunks.map(|first| (first.volume.clone(), first.chunk));
    let mut job = Job::new(settings, volumes.collect())?
        .with_first_chunks(first_chunks.collect())
        .with_parent(image.digest());
    if let Some(working_set) = image.manifest.working_set {
        job = job.with_working_set(Arc::clone(&layout), working_set);
    }
    Ok((job, state))
}

/// Whether a volume is one full layer.
#[must_use]
pub fn is_squashed(volume: &ImageVolume) -> bool {
    volume.has_full_layer && volume.layers.len() == 1
}
