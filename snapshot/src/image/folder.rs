//! A folder of images: what is in it, how much it takes, and how one goes.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::layout::{BLOBS, BLOBS_OF_ALL, INDEX_JSON, Layout, MARKER};
use super::manifest::{ImageManifest, MANIFEST_BYTES_MAX};
use super::partial::{abandoned, path_beside, sweep};
use super::reference::Wanted;
use super::{Image, ImageError};
use crate::blobs::Blob;
use crate::digest::BlobDigest;

/// An image of a folder.
#[derive(Clone, Debug)]
pub struct ListedImage {
    /// Its directory.
    pub path: PathBuf,
    /// Its name in the layout, a tag.
    pub name: Option<String>,
    /// What it consists of.
    pub manifest: ImageManifest,
    /// The layers that are on other hosts: of a thin image.
    pub elsewhere: Vec<Blob>,
}

impl ListedImage {
    /// What the blobs that are with the image take together. Those that it shares with others count with each.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        let blobs = self.manifest.blobs().into_iter();
        let here = blobs.filter(|blob| !self.elsewhere.contains(blob));
        here.fold(0, |sum, blob| sum.saturating_add(blob.bytes))
    }

    /// The length of its volumes together.
    #[must_use]
    pub fn volume_bytes(&self) -> u64 {
        self.manifest
            .volumes
            .iter()
            .map(|volume| volume.root.volume_bytes())
            .fold(0, u64::saturating_add)
    }
}

/// Why a folder of images cannot be listed, or an image not be removed.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// The system refused.
    #[error("{what} {path} failed")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// It is no image, and only images are removed.
    #[error("{0} is not removed, since it is no image: it has neither oci-layout nor index.json and blobs")]
    NoImage(PathBuf),
    /// It is a layout of something else, or of something else too.
    #[error("{0} is not removed, since it holds images of another kind: remove the directory yourself")]
    Foreign(PathBuf),
    /// It has something that does not belong to an image, and would be lost.
    #[error(
        "{path} is not removed, since {stranger} is no part of an image: move it elsewhere, or remove the directory yourself"
    )]
    Stranger {
        /// The directory.
        path: PathBuf,
        /// What is in it, a path.
        stranger: PathBuf,
    },
}

fn io_error<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> FolderError + 'a {
    move |source| FolderError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

/// What is in a folder, in the order of paths.
#[derive(Debug, Default)]
pub struct Listing {
    /// The images.
    pub images: Vec<ListedImage>,
    /// Directories that should hold an image, and what is wrong with it.
    pub broken: Vec<(PathBuf, ImageError)>,
    /// Directories of something else, which nobody but their owner removes.
    pub others: Vec<(PathBuf, NoImage)>,
}

/// Why a directory is not taken for an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoImage {
    /// It has something of an image.
    #[error("it lacks oci-layout, and has not both index.json and blobs: a copy that was cut short, perhaps")]
    Incomplete,
    /// It has nothing of an image.
    #[error("it has neither oci-layout nor index.json and blobs")]
    Unlike,
    /// It is somebody else's layout.
    #[error("it holds images of another kind")]
    Foreign,
}

/// What is right in `folder`. Files and hidden directories are passed over.
///
/// # Errors
/// When the folder cannot be read.
pub fn list(folder: &Path) -> Result<Listing, FolderError> {
    let mut listing = Listing::default();
    for path in visible(folder)? {
        if looks_like_image(&path) {
            listing.look_at(path);
        } else if path.is_dir() {
            let reason = match [INDEX_JSON, BLOBS_OF_ALL].iter().any(|part| has(&path, part)) {
                true => NoImage::Incomplete,
                false => NoImage::Unlike,
            };
            listing.others.push((path, reason));
        }
    }
    Ok(listing)
}

/// Whether a directory was meant to be an image, whatever became of it: it has a layout's marker, or its list and blobs.
#[must_use]
pub fn looks_like_image(path: &Path) -> bool {
    path.is_dir() && (has(path, MARKER.0) || has(path, INDEX_JSON) && has(path, BLOBS))
}

fn has(path: &Path, name: &str) -> bool {
    path.join(name).symlink_metadata().is_ok()
}

impl Listing {
    fn look_at(&mut self, path: PathBuf) {
        let opened = Layout::open(&path);
        if opened.as_ref().is_ok_and(Layout::is_foreign) {
            // Nothing is wrong with it.
            return self.others.push((path, NoImage::Foreign));
        }
        let layout = match opened.and_then(Layout::with_images) {
            Ok(layout) => layout,
            Err(error) => return self.broken.push((path, error.into())),
        };
        for (blob, name) in layout.images() {
            match read_whole(&layout, &blob) {
                Ok((manifest, elsewhere)) => self.images.push(ListedImage {
                    path: path.clone(),
                    name: name.map(str::to_owned),
                    manifest,
                    elsewhere,
                }),
                Err(error) => self.broken.push((path.clone(), error)),
            }
        }
    }
}

/// Reads a manifest of which every blob is there and has its length, but for those that can be had elsewhere, and come with
/// it.
fn read_whole(layout: &Layout, blob: &Blob) -> Result<(ImageManifest, Vec<Blob>), ImageError> {
    let manifest = ImageManifest::parse(&layout.read(blob, MANIFEST_BYTES_MAX)?)?;
    let blobs = manifest.blobs().into_iter();
    let (elsewhere, here): (Vec<_>, Vec<_>) = blobs.partition(|blob| layout.lacks(blob, &manifest.urls));
    layout.open_blobs(here)?;
    Ok((manifest, elsewhere))
}

/// Finds an image of the folder by its digest.
///
/// # Errors
/// When the folder cannot be read.
pub fn find(folder: &Path, digest: &BlobDigest) -> Result<Option<Image>, FolderError> {
    let opened = |path: PathBuf| Image::open_directory(&path, &Wanted::Pinned(*digest)).ok();
    Ok(visible(folder)?.into_iter().find_map(opened))
}

/// Removes an image's directory, also one that is broken. It is gone at once, for everybody who does not have it open;
/// those who have keep it.
///
/// # Errors
/// When it is no image, or cannot be removed.
pub fn remove(path: &Path) -> Result<(), FolderError> {
    check_removal(path)?;
    let hidden =
        path_beside(path).ok_or_else(|| io_error("removing", path)(io::ErrorKind::InvalidInput.into()))?;
    // From here on it is an unfinished image like that of a killed writer: if this is cut short, the next sweep ends it.
    fs::rename(path, &hidden).map_err(io_error("removing", path))?;
    fs::remove_dir_all(&hidden).map_err(io_error("removing", &hidden))
}

/// Sees to it that nothing but an image would go with a directory.
///
/// # Errors
/// When it is no image, or has something else in it.
pub fn check_removal(path: &Path) -> Result<(), FolderError> {
    if !looks_like_image(path) {
        return Err(FolderError::NoImage(path.to_owned()));
    }
    if Layout::open(path).is_ok_and(|layout| layout.has_foreign()) {
        return Err(FolderError::Foreign(path.to_owned()));
    }
    match stranger_in(path)? {
        None => Ok(()),
        Some(stranger) => Err(FolderError::Stranger {
            path: path.to_owned(),
            stranger,
        }),
    }
}

/// Something in an image's directory that no image has there: besides the layout's two files there are blobs alone,
/// called by their digests.
fn stranger_in(path: &Path) -> Result<Option<PathBuf>, FolderError> {
    let in_layout = |name: &str| [MARKER.0, INDEX_JSON, BLOBS_OF_ALL].contains(&name);
    let in_blobs = |name: &str| Path::new(BLOBS).ends_with(name);
    let is_digest = |name: &str| name.len() == 64 && name.bytes().all(|digit| digit.is_ascii_hexdigit());
    Ok(first_but(path, in_layout)?
        .or(first_but(&path.join(BLOBS_OF_ALL), in_blobs)?)
        .or(first_but(&path.join(BLOBS), is_digest)?))
}

/// The first entry of `folder` whose name does not belong there. A broken image may lack the folder.
fn first_but(folder: &Path, belongs: impl Fn(&str) -> bool) -> Result<Option<PathBuf>, FolderError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("reading", folder)(error)),
    };
    for entry in entries {
        let entry = entry.map_err(io_error("reading", folder))?;
        if !entry.file_name().to_str().is_some_and(&belongs) {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

/// What [`prune`] would remove, in the order of paths.
///
/// # Errors
/// When the folder cannot be read.
pub fn unfinished(folder: &Path) -> Result<Vec<PathBuf>, FolderError> {
    abandoned(folder).map_err(io_error("reading", folder))
}

/// Removes what killed writers left in the folder, whatever its name was to be.
///
/// # Errors
/// When the folder cannot be read.
pub fn prune(folder: &Path) -> Result<Vec<PathBuf>, FolderError> {
    sweep(folder, None).map_err(io_error("reading", folder))
}

fn visible(folder: &Path) -> Result<Vec<PathBuf>, FolderError> {
    let entries = fs::read_dir(folder).map_err(io_error("reading", folder))?;
    let mut paths = Vec::new();
    for entry in entries {
        let entry = entry.map_err(io_error("reading", folder))?;
        if !entry.file_name().to_string_lossy().starts_with('.') {
            paths.push(entry.path());
        }
    }
    paths.sort();
    Ok(paths)
}
