//! Writes an image so that nobody ever sees half of one: into a hidden directory beside the target, everything
//! synchronised, then one rename that refuses to replace anything.
//!
//! A writer that is dropped removes what it wrote; what one that was killed left behind is removed by the next one.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::fs::RenameFlags;
use sha2::Digest as _;

use super::below::{BelowImage, Taken};
use super::folder::looks_like_image;
use super::layout::{BLOBS, INDEX_JSON, IndexJson, Layout, MARKER, REF_NAME};
use super::manifest::{Descriptor, IMAGE, MANIFEST, ManifestDraft, ManifestError, Urls};
use super::partial::{Partial, sweep};
use super::reference::is_tag;
use crate::blobs::Blob;
use crate::digest::BlobDigest;

/// Bytes after which a blob's way to stable storage begins, so that little is left to wait for at its end.
const WRITEBACK_BYTES: u64 = 16 << 20;

/// Why an image could not be published. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The target is taken.
    #[error("{0} exists already: choose another path, or remove it first")]
    Exists(PathBuf),
    /// The target is in an image, and would go with it.
    #[error("{target} would lie in the image {image}: give a path outside of it")]
    InImage {
        /// The path that was asked for.
        target: PathBuf,
        /// The directory that it is in.
        image: PathBuf,
    },
    /// The target has no parent or no name.
    #[error("{0} cannot be an image's path: give a directory's name in an existing directory")]
    BadTarget(PathBuf),
    /// The system refused.
    #[error("{what} {path} failed")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's reason: no space, no permission.
        #[source]
        source: io::Error,
    },
    /// A layer of the image below that cannot be had.
    #[error(
        "layer {0} of the image below cannot be read here, and no URL of it is known: save all of the machine, in place of \
         what changed"
    )]
    Nowhere(BlobDigest),
    /// The name is no tag.
    #[error("{0:?} cannot be an image's name: up to 128 letters, digits and . _ - can")]
    BadName(String),
    /// The manifest cannot be written.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
}

fn io_error<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> PublishError + 'a {
    move |source| PublishError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

/// An image that is being written.
#[derive(Debug)]
pub struct Publication {
    target: PathBuf,
    parent: PathBuf,
    partial: Partial,
    next_blob: AtomicU64,
    /// Layers that the image has, and that are not with it.
    left: Mutex<Urls>,
}

impl Publication {
    /// Begins an image at `target`, which must not exist, in a directory that does.
    ///
    /// # Errors
    /// When the target exists or the directory cannot be written.
    pub fn begin(target: &Path) -> Result<Self, PublishError> {
        let (parent, name) = look_at_target(target)?;
        sweep(&parent, Some(name)).map_err(io_error("reading", &parent))?;
        let partial =
            Partial::create_directory(&parent, name).map_err(io_error("creating an image in", &parent))?;
        let publication = Self {
            target: target.to_owned(),
            parent,
            partial,
            next_blob: AtomicU64::new(0),
            left: Mutex::default(),
        };
        let blobs = publication.partial.path().join(BLOBS);
        let made = DirBuilder::new().mode(0o700).recursive(true).create(&blobs);
        made.map_err(io_error("creating", &blobs))?;
        Ok(publication)
    }

    /// Begins a blob whose name is known when it is finished.
    ///
    /// # Errors
    /// When its file cannot be created.
    pub fn blob(&self) -> Result<BlobWriter, PublishError> {
        let number = self.next_blob.fetch_add(1, Ordering::Relaxed);
        let directory = self.partial.path().join(BLOBS);
        let path = directory.join(format!("unfinished-{number}"));
        let file = create(&path)?;
        Ok(BlobWriter {
            directory,
            path,
            file,
            hash: sha2::Sha256::default(),
            bytes: 0,
            bytes_started: 0,
        })
    }

    /// Adds a blob that is at hand.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn add(&self, bytes: &[u8]) -> Result<Blob, PublishError> {
        let mut blob = self.blob()?;
        blob.write(bytes)?;
        blob.finish()
    }

    /// Takes a blob over from another image: as a link where it can be, else as a copy that shares its blocks where
    /// it can. It is not hashed again: its digest was checked when it was made, and is again when it is read.
    ///
    /// # Errors
    /// When it is not there, or cannot be copied.
    pub fn take_over(&self, from: &Layout, blob: &Blob) -> Result<(), PublishError> {
        let source_path = from.blob_path(&blob.digest);
        let path = self.partial.path().join(BLOBS).join(blob.digest.hex());
        let mut source = from
            .open_blob(blob)
            .map_err(|error| io_error("opening", &source_path)(io::Error::other(error)))?;
        match fs::hard_link(&source_path, &path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
            Err(_) => {} // another file system, another owner: copy
        }
        let mut copy = create(&path)?;
        if rustix::fs::ioctl_ficlone(&copy, &source).is_err() {
            io::copy(&mut source, &mut copy).map_err(io_error("writing", &path))?;
        }
        copy.sync_all().map_err(io_error("synchronising", &path))
    }

    /// Takes a layer over from the image below; of one that is not on this host, where it is.
    ///
    /// # Errors
    /// When it is not there, cannot be copied, or is nobody knows where.
    pub fn take_over_layer(&self, below: &BelowImage, layer: &Blob) -> Result<(), PublishError> {
        match below.layer(layer) {
            Some(Taken::From(layout)) => self.take_over(layout, layer),
            Some(Taken::Left(urls)) => {
                let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
                left.insert(layer.digest, urls);
                Ok(())
            }
            None => Err(PublishError::Nowhere(layer.digest)),
        }
    }

    /// The layers that were not taken over, and where they are.
    #[must_use]
    pub fn left(&self) -> Urls {
        self.left.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Publishes the image: from here on it is there, whole, and stays.
    ///
    /// # Errors
    /// When it cannot be written, or the target exists by now.
    pub fn publish(self, draft: &ManifestDraft, name: Option<&str>) -> Result<Blob, PublishError> {
        if let Some(name) = name.filter(|name| !is_tag(name)) {
            return Err(PublishError::BadName(name.to_owned()));
        }
        let manifest = self.add(&draft.to_bytes()?)?;
        let mut descriptor = Descriptor::new(MANIFEST, manifest);
        descriptor.artifact_type = Some(IMAGE.to_owned());
        if let Some(name) = name {
            descriptor
                .annotations
                .insert(REF_NAME.to_owned(), name.to_owned());
        }
        let index = IndexJson {
            schema_version: 2,
            media_type: "application/vnd.oci.image.index.v1+json".to_owned(),
            manifests: vec![descriptor],
        };
        self.write_file(
            INDEX_JSON,
            &serde_json::to_vec_pretty(&index).map_err(ManifestError::Json)?,
        )?;
        self.write_file(MARKER.0, MARKER.1.as_bytes())?;
        for directory in [
            self.partial.path().join(BLOBS),
            self.partial.path().join("blobs"),
            self.partial.path().to_owned(),
        ] {
            sync_directory(&directory)?;
        }
        let at = rustix::fs::CWD;
        match rustix::fs::renameat_with(at, self.partial.path(), at, &self.target, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            Err(rustix::io::Errno::EXIST) => return Err(PublishError::Exists(self.target.clone())),
            Err(error) => return Err(io_error("publishing", &self.target)(error.into())),
        }
        sync_directory(&self.parent)?;
        Ok(manifest)
    }

    fn write_file(&self, name: &str, bytes: &[u8]) -> Result<(), PublishError> {
        let path = self.partial.path().join(name);
        let mut file = create(&path)?;
        file.write_all(bytes).map_err(io_error("writing", &path))?;
        file.sync_all().map_err(io_error("synchronising", &path))
    }
}

/// Whether an image can be made at `target`, as far as that shows.
///
/// # Errors
/// When it exists, or its directory does not or is an image.
pub fn check_target(target: &Path) -> Result<(), PublishError> {
    let (parent, _) = look_at_target(target)?;
    let found = fs::metadata(&parent).map_err(io_error("finding", &parent))?;
    match found.is_dir() {
        true => Ok(()),
        false => Err(PublishError::BadTarget(target.to_owned())),
    }
}

/// The directory and the name of an image that is to be made.
fn look_at_target(target: &Path) -> Result<(PathBuf, &str), PublishError> {
    let bad = || PublishError::BadTarget(target.to_owned());
    let name = target.file_name().ok_or_else(bad)?.to_str().ok_or_else(bad)?;
    let parent = match target.parent() {
        Some(parent) if parent.as_os_str().is_empty() => PathBuf::from("."),
        Some(parent) => parent.to_owned(),
        None => return Err(bad()),
    };
    if fs::symlink_metadata(target).is_ok() {
        return Err(PublishError::Exists(target.to_owned()));
    }
    if looks_like_image(&parent) {
        return Err(PublishError::InImage {
            target: target.to_owned(),
            image: parent,
        });
    }
    Ok((parent, name))
}

/// A blob that is being written, its digest running along.
#[derive(Debug)]
pub struct BlobWriter {
    directory: PathBuf,
    path: PathBuf,
    file: File,
    hash: sha2::Sha256,
    bytes: u64,
    /// How many of them are on their way to stable storage.
    bytes_started: u64,
}

impl BlobWriter {
    /// Appends `bytes`.
    ///
    /// # Errors
    /// When they cannot be written: no space.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), PublishError> {
        self.file
            .write_all(bytes)
            .map_err(io_error("writing", &self.path))?;
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        if self.bytes - self.bytes_started >= WRITEBACK_BYTES {
            start_writeback(&self.file, self.bytes_started, self.bytes - self.bytes_started);
            self.bytes_started = self.bytes;
        }
        Ok(())
    }

    /// How many bytes were written.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Brings the blob to stable storage and gives it its name.
    ///
    /// # Errors
    /// When the storage failed.
    pub fn finish(self) -> Result<Blob, PublishError> {
        self.file
            .sync_all()
            .map_err(io_error("synchronising", &self.path))?;
        let blob = Blob {
            digest: BlobDigest::from_hash(self.hash),
            bytes: self.bytes,
        };
        let path = self.directory.join(blob.digest.hex());
        // The same content twice is the same blob.
        fs::rename(&self.path, &path).map_err(io_error("renaming", &self.path))?;
        Ok(blob)
    }
}

/// Asks the kernel to begin writing; a hint, since whoever needs the bytes on stable storage synchronises.
fn start_writeback(file: &File, offset: u64, len: u64) {
    let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else {
        return;
    };
    // SAFETY: the descriptor is open as long as `file` is borrowed; no memory is involved.
    let _ = unsafe { libc::sync_file_range(file.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE) };
}

/// Images hold guests' memory: their owner alone may read them.
fn create(path: &Path) -> Result<File, PublishError> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(io_error("creating", path))
}

fn sync_directory(path: &Path) -> Result<(), PublishError> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(io_error("synchronising", path))
}
