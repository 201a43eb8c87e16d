//! A working set in a file of its own: what a monitor records, and `runnel image optimize` puts with the image. It
//! appears whole, by a rename, or not at all.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::{WORKING_SET_BYTES_MAX, WorkingSet, WorkingSetError};
use crate::image::folder::looks_like_image;
use crate::image::partial::{Partial, sweep};

/// Why there is no such file, or none that can be read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
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
    /// Something else is in its place.
    #[error("{0} is no file, and is not replaced by a working set: choose another path")]
    Taken(PathBuf),
    /// It would be part of an image, which never changes.
    #[error("{path} would lie in the image {image}: give a path outside of it")]
    InImage {
        /// The path that was asked for.
        path: PathBuf,
        /// The directory that it is in.
        image: PathBuf,
    },
    /// What is in it is no working set.
    #[error("{path} cannot be used")]
    WorkingSet {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: WorkingSetError,
    },
}

fn io_error<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> FileError + 'a {
    move |source| FileError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

/// Reads the working set in a file.
///
/// # Errors
/// When it cannot be read, or is none.
pub fn read_file(path: &Path) -> Result<WorkingSet, FileError> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(io_error("opening", path))?;
    file.take(WORKING_SET_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(io_error("reading", path))?;
    WorkingSet::parse(&bytes).map_err(|source| FileError::WorkingSet {
        path: path.to_owned(),
        source,
    })
}

/// A file that will hold a working set: made before anything is recorded, so that nothing is recorded in vain. Dropped
/// without being written it is gone, and what was at its path stays.
#[derive(Debug)]
pub struct WorkingSetFile {
    target: PathBuf,
    parent: PathBuf,
    partial: Partial,
}

impl WorkingSetFile {
    /// Makes it, hidden beside `target`, for its owner alone.
    ///
    /// # Errors
    /// When the folder cannot be written, or something that is no file is there.
    pub fn create(target: &Path) -> Result<Self, FileError> {
        let name = target.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| io_error("creating", target)(io::ErrorKind::InvalidFilename.into()))?;
        if fs::symlink_metadata(target).is_ok_and(|about| !about.is_file()) {
            return Err(FileError::Taken(target.to_owned()));
        }
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        if looks_like_image(parent) {
            return Err(FileError::InImage {
                path: target.to_owned(),
                image: parent.to_owned(),
            });
        }
        sweep(parent, Some(name)).map_err(io_error("reading", parent))?;
        Ok(Self {
            partial: Partial::create_file(parent, name).map_err(io_error("creating", target))?,
            target: target.to_owned(),
            parent: parent.to_owned(),
        })
    }

    /// Where it will be.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Writes it and gives it its name, in place of an older one.
    ///
    /// # Errors
    /// When the storage refuses.
    pub fn write(self, working_set: &WorkingSet) -> Result<(), FileError> {
        let (file, path) = (self.partial.file(), self.partial.path());
        file.write_all_at(&working_set.to_bytes(), 0)
            .map_err(io_error("writing", path))?;
        file.sync_all().map_err(io_error("synchronising", path))?;
        fs::rename(path, &self.target).map_err(io_error("renaming", path))?;
        File::open(&self.parent)
            .and_then(|folder| folder.sync_all())
            .map_err(io_error("synchronising", &self.parent))
    }
}
