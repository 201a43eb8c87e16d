//! Images: a machine at rest, as an OCI image layout on disk or an OCI artifact in a registry.
//!
//! A manifest names the machine state (its *config*) and, for each volume, the layers, the index of their chunks and
//! the index's root. Blobs never change; an image appears whole, by a rename, or not at all.
//!
//! ```text
//! IMAGE/oci-layout, index.json          → manifest
//! IMAGE/blobs/sha256/<manifest>         → state, layers, indexes, roots (also inline), working set
//! ```

pub mod adoption;
pub mod below;
pub mod chunk_reader;
pub mod complete;
mod first_chunks;
pub mod folder;
pub mod layout;
pub mod manifest;
pub(crate) mod partial;
pub mod publication;
pub mod reference;
pub mod source;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::blobs::{Blob, BlobError, BlobStore, read_verified};
use crate::digest::BlobDigest;
use crate::index::{IndexReader, RootError};
use crate::source::{ChunkId, SourceVolume};
use crate::state::{MachineState, STATE_BYTES_MAX, StateError};
use crate::volume::VolumeName;
use crate::working_set::{Misfit, WORKING_SET_BYTES_MAX, WorkingSet, WorkingSetError};
pub use first_chunks::MisplacedChunk;
use layout::{Layout, LayoutError};
use manifest::{ImageManifest, ImageVolume, MANIFEST_BYTES_MAX, ManifestError};

/// Why an image cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The directory is no image layout.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A blob that is needed at once cannot be had.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// The manifest makes no sense.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The machine state makes no sense.
    #[error(transparent)]
    State(#[from] StateError),
    /// The machine state does not fit to the manifest.
    #[error(transparent)]
    FirstChunk(#[from] MisplacedChunk),
    /// It is thin: a layer is on another host.
    #[error(
        "the image in {path} is thin: its layer {layer} is at {url}. An agent reads it from there, as `runnel resume` does by \
         itself; `runnel image complete` fetches what is missing"
    )]
    Thin {
        /// The directory.
        path: PathBuf,
        /// The first layer that is not in it.
        layer: BlobDigest,
        /// Where that can be had.
        url: String,
    },
    /// The working set makes no sense.
    #[error("working set {digest}")]
    WorkingSet {
        /// The blob.
        digest: BlobDigest,
        /// What is wrong.
        #[source]
        source: WorkingSetError,
    },
    /// The working set does not fit to the manifest.
    #[error("working set {digest}")]
    Misfit {
        /// The blob.
        digest: BlobDigest,
        /// What is wrong.
        #[source]
        source: Misfit,
    },
}

impl ImageError {
    /// Whether something of the image is missing or makes no sense, in place of not being what was asked for, not being
    /// Runnel's to judge, or not being readable just now.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Layout(
                LayoutError::Read { source, .. }
                | LayoutError::Blob {
                    source: BlobError::Read { source, .. },
                    ..
                },
            )
            | Self::Blob(BlobError::Read { source, .. }) => {
                use std::io::ErrorKind;
                // Of a file that grows shorter while it is read, too.
                matches!(source.kind(), ErrorKind::NotFound | ErrorKind::UnexpectedEof)
            }
            Self::Layout(LayoutError::NoSuchImage { .. } | LayoutError::Empty(_)) | Self::Thin { .. } => {
                false
            }
            // It is of another kind, or newer.
            Self::Layout(LayoutError::Newer { .. })
            | Self::Manifest(
                ManifestError::Kind { .. }
                | ManifestError::Newer { .. }
                | ManifestError::Root {
                    source: RootError::Newer(_),
                    ..
                },
            )
            | Self::State(StateError::Newer { .. })
            | Self::WorkingSet {
                source: WorkingSetError::Newer(_),
                ..
            } => false,
            _ => true,
        }
    }
}

/// An image whose manifest was read and checked, over the store of its blobs.
#[derive(Clone)]
pub struct Image {
    /// What it consists of.
    pub manifest: Arc<ImageManifest>,
    /// Where the blobs are.
    pub store: Arc<dyn BlobStore>,
}

impl Image {
    /// Opens the image in a directory, or that of them which `wanted` names. Every blob must be there and have its
    /// length; digests are checked as bytes are read.
    ///
    /// # Errors
    /// When it is no image, incomplete, or of a newer Runnel.
    pub fn open_directory(path: &Path, wanted: &reference::Wanted) -> Result<Self, ImageError> {
        let (image, away) = Self::open_thin(path, wanted)?;
        match away.first() {
            None => Ok(image),
            Some(layer) => Err(ImageError::Thin {
                path: path.to_owned(),
                layer: layer.digest,
                url: image.manifest.urls[&layer.digest][0].clone(),
            }),
        }
    }

    /// Opens the image in a directory as [`Self::open_directory`] does, also if it is thin: with it come the layers that
    /// are not there and have a URL, which its store does not have.
    ///
    /// # Errors
    /// When it is no image, incomplete, or of a newer Runnel.
    pub fn open_thin(path: &Path, wanted: &reference::Wanted) -> Result<(Self, Vec<Blob>), ImageError> {
        let layout = Layout::open(path)?;
        let descriptor = layout.choose(wanted)?;
        let bytes = layout.read(&descriptor, MANIFEST_BYTES_MAX)?;
        let manifest = ImageManifest::parse(&bytes)?;
        let is_away = |blob: &Blob| layout.lacks(blob, &manifest.urls);
        let (away, here): (Vec<Blob>, Vec<Blob>) = manifest.blobs().into_iter().partition(is_away);
        let store = layout.open_blobs(here)?;
        let image = Self {
            manifest: Arc::new(manifest),
            store: Arc::new(store),
        };
        Ok((image, away))
    }

    /// The manifest's digest: who pins it is protected against every later byte.
    #[must_use]
    pub fn digest(&self) -> BlobDigest {
        self.manifest.digest
    }

    /// Reads the machine state. Its first chunks lie within the image's layers, and are no longer than chunks are.
    ///
    /// # Errors
    /// When it cannot be had, does not match its digest, or is of a newer Runnel.
    pub fn state(&self) -> Result<MachineState, ImageError> {
        let state = MachineState::decode(&self.state_bytes()?)?;
        first_chunks::check(&state.first_chunks, &self.manifest.volumes)?;
        Ok(state)
    }

    /// Reads the recorded working set, if there is one. Each of its chunks is one of the image's volumes.
    ///
    /// # Errors
    /// When it cannot be had, does not match its digest, is not of this image's volumes, or of a newer Runnel. The image
    /// is good without.
    pub fn working_set(&self) -> Result<Option<WorkingSet>, ImageError> {
        let Some(blob) = &self.manifest.working_set else {
            return Ok(None);
        };
        let digest = blob.digest;
        let bytes = read_verified(self.store.as_ref(), blob, WORKING_SET_BYTES_MAX)?;
        let set = WorkingSet::parse(&bytes).map_err(|source| ImageError::WorkingSet { digest, source })?;
        let fits = set.of_volumes(&self.source_volumes());
        fits.map_err(|source| ImageError::Misfit { digest, source })?;
        Ok(Some(set))
    }

    /// The chunks of the working set, in order, for whoever asks for them ahead. None where there is none, nor where it
    /// cannot be used: that is told in the log, and costs the time that it would have saved.
    #[must_use]
    pub fn recorded_chunks(&self) -> Vec<ChunkId> {
        let set = match self.working_set() {
            Ok(set) => set.unwrap_or_default(),
            Err(error) => {
                let (image, error) = (self.digest(), &error as &dyn std::error::Error);
                tracing::warn!(error, %image, "the working set of an image cannot be used");
                return Vec::new();
            }
        };
        // It was held against these volumes as it was read.
        set.of_volumes(&self.source_volumes()).unwrap_or_default()
    }

    /// The volumes, as a source of chunks has them.
    #[must_use]
    pub fn source_volumes(&self) -> Vec<SourceVolume> {
        let volumes = self.manifest.volumes.iter();
        volumes.map(ImageVolume::as_source).collect()
    }

    /// The machine state as it is stored: from the manifest, or else from the store.
    ///
    /// # Errors
    /// When it cannot be had, or does not match its digest.
    pub fn state_bytes(&self) -> Result<Vec<u8>, BlobError> {
        match &self.manifest.state_inline {
            Some(bytes) => Ok(bytes.clone()),
            None => read_verified(self.store.as_ref(), &self.manifest.state, STATE_BYTES_MAX),
        }
    }

    /// The volume of that name.
    #[must_use]
    pub fn volume(&self, name: &VolumeName) -> Option<&ImageVolume> {
        self.manifest.volumes.iter().find(|volume| volume.name == *name)
    }

    /// The index of one of the image's volumes.
    #[must_use]
    pub fn index(&self, volume: &ImageVolume) -> IndexReader {
        IndexReader::new(
            Arc::clone(&self.store),
            volume.index,
            volume.root.clone(),
            volume.layer_bytes(),
        )
    }
}
