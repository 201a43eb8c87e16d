//! The socket's file: made for one monitor, found again by nobody else, gone when the monitor is.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Why the API's socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody listens there, or there is something else.
    #[error("Failed to open the API socket at: {}. Check that it is not already used.", .0.display())]
    InUse(PathBuf),
    /// The kernel refuses.
    #[error("Failed to open the API socket at: {}.", path.display())]
    Failed {
        /// Where.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
}

/// A listening socket. Its file goes away with it.
#[derive(Debug)]
pub struct ApiSocket {
    pub(super) listener: UnixListener,
    file: SocketFile,
}

/// Removes the file when dropped, unless it is another one by now.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode of the file that was made.
    identity: (u64, u64),
}

impl ApiSocket {
    /// Makes the socket, for its owner alone. A socket that nobody listens at any more, left behind by a monitor
    /// that was killed, is replaced.
    ///
    /// # Errors
    /// When somebody listens there, or there is another file, or the kernel refuses.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let failed = |source| BindError::Failed {
            path: path.to_owned(),
            source,
        };
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                if !is_abandoned(path) {
                    return Err(BindError::InUse(path.to_owned()));
                }
                fs::remove_file(path).map_err(failed)?;
                UnixListener::bind(path).map_err(failed)?
            }
            bound => bound.map_err(failed)?,
        };
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let identity = identity(path).map_err(failed)?;
        Ok(Self {
            listener,
            file: SocketFile {
                path: path.to_owned(),
                identity,
            },
        })
    }

    pub(super) fn into_parts(self) -> (UnixListener, SocketFile) {
        (self.listener, self.file)
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Whether there is a socket at which nobody listens.
fn is_abandoned(path: &Path) -> bool {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    is_socket
        && matches!(UnixStream::connect(path), Err(error) if error.kind() == io::ErrorKind::ConnectionRefused)
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|found| found == self.identity)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!("cannot remove the API socket {:?}: {error}", self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_a_killed_monitor_left_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        // Closing a listener leaves its file, as a kill does.
        drop(UnixListener::bind(&path).unwrap());
        let socket = ApiSocket::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_in_use_and_another_file_stay_as_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let first = ApiSocket::bind(&path).unwrap();
        assert!(matches!(ApiSocket::bind(&path), Err(BindError::InUse(_))));
        UnixStream::connect(&path).unwrap();
        drop(first);

        fs::write(&path, "precious").unwrap();
        assert!(matches!(ApiSocket::bind(&path), Err(BindError::InUse(_))));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn a_file_that_took_the_sockets_place_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let socket = ApiSocket::bind(&path).unwrap();
        fs::rename(&path, folder.path().join("moved")).unwrap();
        fs::write(&path, "another").unwrap();
        drop(socket);
        assert!(path.exists());
    }
}
