//! An OCI image layout directory, read (image-spec 1.1, image-layout.md). It may come from a stranger: names are
//! digests that were parsed, links are not followed, and nothing is read beyond its cap.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::manifest::{Descriptor, IMAGE, MANIFEST, Urls};
use super::reference::Wanted;
use crate::blobs::{Blob, BlobError, BlobStore, read_verified};
use crate::digest::BlobDigest;
use crate::units::ByteRange;

/// The file that makes a directory a layout, and its content.
pub(super) const MARKER: (&str, &str) = ("oci-layout", r#"{"imageLayoutVersion":"1.0.0"}"#);
/// The file that lists the manifests.
pub(super) const INDEX_JSON: &str = "index.json";
/// The folder of the blobs.
pub(super) const BLOBS: &str = "blobs/sha256";
/// The folder of that, and of those that other algorithms name.
pub(super) const BLOBS_OF_ALL: &str = "blobs";
/// Annotation of a manifest's descriptor: the image's name.
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// The longest `oci-layout`.
const MARKER_BYTES_MAX: u64 = 4 << 10;
/// The version that [`MARKER`] gives.
const LAYOUT_VERSION: &str = "1.0.0";
/// The longest `index.json`: some thousands of images.
pub const INDEX_JSON_BYTES_MAX: u64 = 4 << 20;

/// Why a directory is no image layout.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// A file cannot be read.
    #[error("{path} cannot be read: is it an image's directory?")]
    Read {
        /// Which file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// A file makes no sense.
    #[error("{path} is not usable: {reason}")]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The layout is of another version of the OCI image specification.
    #[error(
        "{path} is of an image layout of version {found:?}, and this Runnel reads {LAYOUT_VERSION:?}: use a newer Runnel"
    )]
    Newer {
        /// The file that says so.
        path: PathBuf,
        /// Which version.
        found: String,
    },
    /// No image, or not the one that was asked for.
    #[error(
        "{path} holds no image {wanted}: it has {present}, each of which is asked for with its @sha256:…"
    )]
    NoSuchImage {
        /// The directory.
        path: PathBuf,
        /// What was asked for.
        wanted: String,
        /// What there is.
        present: String,
    },
    /// It lists nothing of Runnel's.
    #[error("{0} lists no image of Runnel")]
    Empty(PathBuf),
    /// A blob of the image cannot be opened.
    #[error("the image in {path} is not complete")]
    Blob {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: BlobError,
    },
}

/// `index.json`.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct IndexJson {
    pub(super) schema_version: u32,
    #[serde(default)]
    pub(super) media_type: String,
    pub(super) manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Marker {
    image_layout_version: String,
}

/// The images that an `index.json` lists.
#[derive(Debug)]
pub struct Listing {
    manifests: Vec<Descriptor>,
    /// Manifests that are none of Runnel's.
    others: usize,
}

impl Listing {
    /// Reads the list; whoever has it from outside caps it at [`INDEX_JSON_BYTES_MAX`].
    ///
    /// # Errors
    /// When it is no such list.
    pub fn parse(text: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(text).map(Self::of)
    }

    fn of(index: IndexJson) -> Self {
        let is_image = |descriptor: &Descriptor| {
            // Copy tools may leave the artifact type out; the manifest itself has the last word.
            descriptor.media_type == MANIFEST
                && descriptor.artifact_type.as_ref().is_none_or(|kind| kind == IMAGE)
        };
        let all = index.manifests.len();
        let manifests: Vec<_> = index.manifests.into_iter().filter(is_image).collect();
        let others = all - manifests.len();
        Self { manifests, others }
    }

    /// The images, each with its name if it has one.
    pub fn images(&self) -> impl Iterator<Item = (Blob, Option<&str>)> {
        self.manifests.iter().map(|descriptor| {
            (
                descriptor.blob(),
                descriptor.annotations.get(REF_NAME).map(String::as_str),
            )
        })
    }

    /// The manifest that is wanted, if it is there and it is clear which.
    #[must_use]
    pub fn choose(&self, wanted: &Wanted) -> Option<Blob> {
        let named = |tag: &str| {
            self.images()
                .find(|(_, name)| *name == Some(tag))
                .map(|(blob, _)| blob)
        };
        match wanted {
            Wanted::Pinned(digest) => self
                .images()
                .map(|(blob, _)| blob)
                .find(|blob| blob.digest == *digest),
            Wanted::Named(tag) => named(tag),
            Wanted::Only => match &self.manifests[..] {
                [only] => Some(only.blob()),
                _ => named("latest"),
            },
        }
    }

    /// What there is, for people: the first few.
    #[must_use]
    pub fn describe(&self) -> String {
        const SHOWN: usize = 8;
        let shown = self.images().take(SHOWN).map(|(blob, name)| match name {
            Some(name) => format!("{} (@{})", name.chars().take(60).collect::<String>(), blob.digest),
            None => format!("@{}", blob.digest),
        });
        match self.manifests.len() {
            0 => "no image".into(),
            more @ SHOWN.. => format!("{more} images: {}, …", shown.collect::<Vec<_>>().join(", ")),
            _ => shown.collect::<Vec<_>>().join(", "),
        }
    }
}

/// A layout whose list of manifests was read.
#[derive(Debug)]
pub struct Layout {
    path: PathBuf,
    listing: Listing,
}

impl Layout {
    /// Reads the list of a directory.
    ///
    /// # Errors
    /// When it is no layout, or of a version that Runnel does not read.
    pub fn open(path: &Path) -> Result<Self, LayoutError> {
        let (file, _) = MARKER;
        let marker: Marker = read_json(&path.join(file), MARKER_BYTES_MAX)?;
        if marker.image_layout_version != LAYOUT_VERSION {
            return Err(LayoutError::Newer {
                path: path.join(file),
                found: marker.image_layout_version.chars().take(40).collect(),
            });
        }
        Ok(Self {
            path: path.to_owned(),
            listing: Listing::of(read_json(&path.join(INDEX_JSON), INDEX_JSON_BYTES_MAX)?),
        })
    }

    /// The layout, if it lists an image at all.
    ///
    /// # Errors
    /// When it lists none.
    pub fn with_images(self) -> Result<Self, LayoutError> {
        if self.listing.manifests.is_empty() {
            return Err(LayoutError::Empty(self.path.join(INDEX_JSON)));
        }
        Ok(self)
    }

    /// Whether it holds images of another kind alone: somebody else's.
    #[must_use]
    pub fn is_foreign(&self) -> bool {
        self.listing.manifests.is_empty() && self.listing.others > 0
    }

    /// Whether it holds images of another kind, alone or beside others.
    #[must_use]
    pub fn has_foreign(&self) -> bool {
        self.listing.others > 0
    }

    /// The images, each with its name if it has one.
    pub fn images(&self) -> impl Iterator<Item = (Blob, Option<&str>)> {
        self.listing.images()
    }

    /// The manifest that is wanted.
    ///
    /// # Errors
    /// When there is none, or several and none is preferred.
    pub fn choose(&self, wanted: &Wanted) -> Result<Blob, LayoutError> {
        self.listing
            .choose(wanted)
            .ok_or_else(|| LayoutError::NoSuchImage {
                path: self.path.clone(),
                wanted: match wanted {
                    Wanted::Only => "that is the only one, or named latest".into(),
                    Wanted::Named(tag) => format!("named {tag}"),
                    Wanted::Pinned(digest) => format!("with digest {digest}"),
                },
                present: self.listing.describe(),
            })
    }

    /// Reads a small blob whole and holds it against its digest.
    ///
    /// # Errors
    /// When it is missing, larger than `bytes_max`, or not what its digest says.
    pub fn read(&self, blob: &Blob, bytes_max: u64) -> Result<Vec<u8>, LayoutError> {
        let incomplete = |source| LayoutError::Blob {
            path: self.path.clone(),
            source,
        };
        let store = self.open_blobs([*blob])?;
        read_verified(&store, blob, bytes_max).map_err(incomplete)
    }

    /// Opens blobs for reading by range.
    ///
    /// # Errors
    /// When one is missing or has another length.
    pub fn open_blobs(&self, blobs: impl IntoIterator<Item = Blob>) -> Result<DirectoryBlobs, LayoutError> {
        let opened = self.open_blobs_or_missing(blobs);
        opened.map_err(|source| LayoutError::Blob {
            path: self.path.clone(),
            source,
        })
    }

    /// Like [`Self::open_blobs`], with the blob's own error.
    pub(crate) fn open_blobs_or_missing(
        &self,
        blobs: impl IntoIterator<Item = Blob>,
    ) -> Result<DirectoryBlobs, BlobError> {
        let open = |blob: Blob| Ok((blob.digest, Arc::new(self.open_blob(&blob)?)));
        let files = blobs
            .into_iter()
            .map(open)
            .collect::<Result<HashMap<_, _>, BlobError>>()?;
        Ok(DirectoryBlobs {
            layout: self.path.clone(),
            files: RwLock::new(files),
        })
    }

    /// Opens one blob, which must have its length.
    ///
    /// # Errors
    /// When it is missing or has another length.
    pub fn open_blob(&self, blob: &Blob) -> Result<File, BlobError> {
        open_blob(&self.path, blob)
    }

    /// Whether a blob is not there, and can be had elsewhere.
    pub(crate) fn lacks(&self, blob: &Blob, urls: &Urls) -> bool {
        urls.contains_key(&blob.digest) && matches!(self.open_blob(blob), Err(BlobError::Missing { .. }))
    }

    /// Where a blob lies.
    #[must_use]
    pub fn blob_path(&self, digest: &BlobDigest) -> PathBuf {
        self.path.join(BLOBS).join(digest.hex())
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Blobs of a layout, open for reading: an image that is removed while it is in use stays readable, and one that is
/// damaged can be repaired by another file in the place of the damaged one.
#[derive(Debug)]
pub struct DirectoryBlobs {
    layout: PathBuf,
    files: RwLock<HashMap<BlobDigest, Arc<File>>>,
}

impl DirectoryBlobs {
    /// Whether a blob of it was opened.
    #[must_use]
    pub fn has(&self, blob: &Blob) -> bool {
        self.file(blob).is_some()
    }

    fn file(&self, blob: &Blob) -> Option<Arc<File>> {
        let files = self.files.read().unwrap_or_else(PoisonError::into_inner);
        files.get(&blob.digest).cloned()
    }

    /// Opens a blob anew if another file has taken its place; whether one has.
    fn take_replacement(&self, blob: &Blob) -> bool {
        let identity = |file: &File| file.metadata().map(|found| (found.dev(), found.ino())).ok();
        let (Some(old), Ok(new)) = (self.file(blob), open_blob(&self.layout, blob)) else {
            return false;
        };
        if identity(&old) == identity(&new) {
            return false;
        }
        tracing::info!(digest = %blob.digest, "a blob has been replaced");
        let mut files = self.files.write().unwrap_or_else(PoisonError::into_inner);
        files.insert(blob.digest, Arc::new(new));
        true
    }
}

impl BlobStore for DirectoryBlobs {
    fn read_range(&self, blob: &Blob, offset: u64, into: &mut [u8]) -> Result<(), BlobError> {
        let range = ByteRange {
            start: offset,
            len: into.len() as u64,
        };
        if !range.fits_in(blob.bytes) {
            return Err(BlobError::OutOfBounds {
                digest: blob.digest,
                range,
            });
        }
        let store = || self.layout.display().to_string();
        let file = self.file(blob).ok_or_else(|| BlobError::Missing {
            digest: blob.digest,
            store: store(),
        })?;
        file.read_exact_at(into, offset)
            .map_err(|source| BlobError::Read {
                digest: blob.digest,
                store: store(),
                range,
                source,
            })
    }

    fn read_right(
        &self,
        blob: &Blob,
        offset: u64,
        into: &mut [u8],
        are_right: &mut dyn FnMut(&[u8]) -> bool,
    ) -> Result<bool, BlobError> {
        let read = self.read_range(blob, offset, into).map(|()| are_right(into));
        if matches!(read, Ok(true)) || !self.take_replacement(blob) {
            return read;
        }
        self.read_range(blob, offset, into)?;
        Ok(are_right(into))
    }
}

fn open_blob(layout: &Path, blob: &Blob) -> Result<File, BlobError> {
    let path = layout.join(BLOBS).join(blob.digest.hex());
    let store = || layout.display().to_string();
    let file = match open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(BlobError::Missing {
                digest: blob.digest,
                store: store(),
            });
        }
        Err(source) => {
            let range = ByteRange {
                start: 0,
                len: blob.bytes,
            };
            return Err(BlobError::Read {
                digest: blob.digest,
                store: store(),
                range,
                source,
            });
        }
    };
    let found = file
        .metadata()
        .map_or(0, |meta| if meta.is_file() { meta.len() } else { 0 });
    if found != blob.bytes {
        return Err(BlobError::WrongLength {
            digest: blob.digest,
            store: store(),
            expected: blob.bytes,
            found,
        });
    }
    Ok(file)
}

/// Opens a regular file for reading; not a link, and without waiting for a FIFO's writer.
fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    Ok(File::from(rustix::fs::open(path, flags, Mode::empty())?))
}

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path, bytes_max: u64) -> Result<T, LayoutError> {
    let failed = |source| LayoutError::Read {
        path: path.to_owned(),
        source,
    };
    let malformed = |reason| LayoutError::Malformed {
        path: path.to_owned(),
        reason,
    };
    let file = open(path).map_err(failed)?;
    let bytes = file.metadata().map_err(failed)?.len();
    if bytes > bytes_max {
        return Err(malformed(format!(
            "it has {bytes} bytes, and at most {bytes_max} are read"
        )));
    }
    let mut text = vec![0; bytes as usize];
    file.read_exact_at(&mut text, 0).map_err(failed)?;
    serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))
}
