//! The image that another one lies over: in a directory of this host, or on another host.
//!
//! Layers of one that is here are taken over; of those that are not, where they can be had. An image with such layers is
//! *thin*: its own changes, its index and its state are with it, and what it lies over is not.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use super::layout::{Layout, LayoutError};
use super::manifest::{ImageManifest, ImageVolume, Urls};
use crate::blobs::{Blob, BlobError, BlobStore};
use crate::digest::BlobDigest;
use crate::index::IndexReader;
use crate::units::ByteRange;

/// An image of another host, of which somebody on this one can get the index.
pub trait AwayImage: Send + Sync {
    /// The store of the segments of a volume's index. Waits for them as long as `goes_on` says so.
    ///
    /// # Errors
    /// When they cannot be had.
    fn index(
        &self,
        volume: &ImageVolume,
        goes_on: &dyn Fn() -> bool,
    ) -> Result<Arc<dyn BlobStore>, BlobError>;

    /// Where a blob of the image can be had: none if that is not known.
    fn urls(&self, blob: &BlobDigest) -> Vec<String>;
}

/// Where the image is that another one lies over.
#[derive(Clone)]
pub enum BelowImage {
    /// In a directory of this host. Layers that are not there can be had elsewhere.
    Here {
        /// The directory.
        layout: Arc<Layout>,
        /// What its manifest says of where they are.
        urls: Arc<Urls>,
    },
    /// On another host.
    Away(Arc<dyn AwayImage>),
}

/// What becomes of a blob of the image below.
pub(crate) enum Taken<'a> {
    /// It is with the new image too.
    From(&'a Layout),
    /// It stays where it is.
    Left(Vec<String>),
}

impl BelowImage {
    /// A directory in which every layer is.
    #[must_use]
    pub fn whole(layout: Arc<Layout>) -> Self {
        let urls = Arc::default();
        Self::Here { layout, urls }
    }

    /// The directory of an image with that manifest.
    #[must_use]
    pub fn of(layout: Arc<Layout>, manifest: &ImageManifest) -> Self {
        let urls = Arc::new(manifest.urls.clone());
        Self::Here { layout, urls }
    }

    /// Whether a volume can be taken over: of one that is here, nothing has been removed.
    #[must_use]
    pub fn has(&self, volume: &ImageVolume) -> bool {
        match self {
            Self::Here { layout, urls } => {
                let is_there = |blob: &Blob| layout.open_blob(blob).is_ok() || layout.lacks(blob, urls);
                let mut blobs = volume.layers.iter().chain([&volume.index]);
                blobs.all(is_there)
            }
            Self::Away(_) => true,
        }
    }

    /// Sees to it that a diff can lie over a volume: of one on another host, gets the index, which may take a while, for as
    /// long as `goes_on` says so.
    ///
    /// # Errors
    /// When its index cannot be had, or nobody knows where its layers are.
    pub fn make_ready(&self, volume: &ImageVolume, goes_on: &dyn Fn() -> bool) -> Result<(), BelowError> {
        let Self::Away(image) = self else { return Ok(()) };
        image.index(volume, goes_on)?;
        let mut layers = volume.layers.iter();
        match layers.find(|layer| image.urls(&layer.digest).is_empty()) {
            None => Ok(()),
            Some(layer) => Err(BelowError::Nowhere(layer.digest)),
        }
    }

    /// Whether all of a volume is here.
    #[must_use]
    pub fn has_here(&self, volume: &ImageVolume) -> bool {
        let Self::Here { layout, .. } = self else {
            return false;
        };
        let mut blobs = volume.layers.iter().chain([&volume.index]);
        blobs.all(|blob| layout.open_blob(blob).is_ok())
    }

    /// What becomes of a layer of it; `None` if it is not here, and nobody knows where it is.
    pub(crate) fn layer(&self, layer: &Blob) -> Option<Taken<'_>> {
        match self {
            Self::Here { layout, urls } if layout.lacks(layer, urls) => {
                Some(Taken::Left(urls[&layer.digest].clone()))
            }
            // One that is missing is told by whoever takes it.
            Self::Here { layout, .. } => Some(Taken::From(layout)),
            Self::Away(image) => Some(image.urls(&layer.digest))
                .filter(|urls| !urls.is_empty())
                .map(Taken::Left),
        }
    }

    /// The store of the segments of a volume's index.
    ///
    /// # Errors
    /// When they cannot be had, or `goes_on` ended the wait for them.
    pub(crate) fn index_store(
        &self,
        volume: &ImageVolume,
        goes_on: &dyn Fn() -> bool,
    ) -> Result<Arc<dyn BlobStore>, BelowError> {
        match self {
            Self::Here { layout, .. } => Ok(Arc::new(layout.open_blobs([volume.index])?)),
            Self::Away(image) => Ok(image.index(volume, goes_on)?),
        }
    }

    /// The index of a volume.
    ///
    /// # Errors
    /// As [`Self::index_store`].
    pub(crate) fn index(
        &self,
        volume: &ImageVolume,
        goes_on: &dyn Fn() -> bool,
    ) -> Result<IndexReader, BelowError> {
        Ok(IndexReader::new(
            self.index_store(volume, goes_on)?,
            volume.index,
            volume.root.clone(),
            volume.layer_bytes(),
        ))
    }
}

impl fmt::Display for BelowImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Here { layout, .. } => layout.path().display().fmt(f),
            Self::Away(_) => f.write_str("another host"),
        }
    }
}

/// Why the index of the image below cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BelowError {
    /// Its directory.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Its blob.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// A layer.
    #[error("its layer {0} cannot be read here, and no URL of it is known")]
    Nowhere(BlobDigest),
}

/// A store of one blob, in a file that somebody handed over. Like every store, it believes nothing.
#[derive(Debug)]
pub struct OneBlob {
    digest: BlobDigest,
    file: File,
}

impl OneBlob {
    /// Of a file that should hold the blob of that digest.
    #[must_use]
    pub fn new(digest: BlobDigest, file: File) -> Self {
        Self { digest, file }
    }
}

impl BlobStore for OneBlob {
    fn read_range(&self, blob: &Blob, offset: u64, into: &mut [u8]) -> Result<(), BlobError> {
        let store = || "the agent".to_owned();
        let range = ByteRange {
            start: offset,
            len: into.len() as u64,
        };
        if blob.digest != self.digest {
            return Err(BlobError::Missing {
                digest: blob.digest,
                store: store(),
            });
        }
        let read = self.file.read_exact_at(into, offset);
        read.map_err(|source| BlobError::Read {
            digest: blob.digest,
            store: store(),
            range,
            source,
        })
    }
}
