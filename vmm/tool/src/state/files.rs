//! Files and folders that are their owner's alone.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;

use rustix::fs::FlockOperation;

use super::error::{StateError, io_error};

/// The longest path of a unix socket on Linux, with the zero behind it (unix(7)).
pub(super) const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Refuses a path that no socket can have.
///
/// # Errors
/// When it is too long.
pub(crate) fn check_socket(path: &Path) -> Result<(), StateError> {
    if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
        return Err(StateError::TooLong(path.to_owned()));
    }
    Ok(())
}

/// Locks a folder, unless somebody else has.
pub(super) fn try_lock(folder: &Path) -> io::Result<File> {
    let folder = File::open(folder)?;
    rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive)?;
    Ok(folder)
}

/// Sees to it that nobody else can put anything into a folder, under whatever name.
pub(super) fn check_parent(path: &Path) -> Result<(), StateError> {
    let found = fs::metadata(path).map_err(io_error("reading", path))?;
    let (owner, mode) = (found.uid(), found.mode() & 0o7777);
    // A sticky bit keeps others from removing what is there, and not from making what is not.
    if owner != own_uid() || mode & 0o022 != 0 {
        return Err(StateError::Shared {
            path: path.to_owned(),
            owner,
            mode,
        });
    }
    Ok(())
}

pub(super) fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Makes a folder, or sees to it that one which is there is nobody else's.
pub(super) fn private_folder(path: &Path) -> Result<(), StateError> {
    let made = DirBuilder::new().mode(0o700).create(path);
    match made {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(source) => return Err(io_error("creating", path)(source)),
    }
    let found = fs::symlink_metadata(path).map_err(io_error("reading", path))?;
    let (owner, mode) = (found.uid(), found.mode() & 0o7777);
    if !found.is_dir() || owner != own_uid() || mode & 0o077 != 0 {
        return Err(StateError::Exposed {
            path: path.to_owned(),
            owner,
            mode,
        });
    }
    Ok(())
}

/// Writes a file so that nobody reads half of it.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let unfinished = path.with_extension("new");
    fs::write(&unfinished, bytes)?;
    fs::rename(&unfinished, path)
}
