//! Whether a file of the host can be what somebody says it is: found out when it is named, not when it is needed.

use std::fs::{FileType, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// What a file will be opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To read it.
    Read,
    /// To read it and to write it.
    ReadWrite,
}

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HostFileError {
    /// It cannot be opened.
    #[error("{path:?} cannot be opened{}: {source}", match access { Access::Read => "", Access::ReadWrite => " for writing" })]
    Open {
        /// Which one.
        path: PathBuf,
        /// What for.
        access: Access,
        /// The kernel's reason.
        source: io::Error,
    },
    /// It is no file with bytes in it.
    #[error("{path:?} is a {kind}; a file or a block device is needed")]
    Kind {
        /// Which one.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
}

/// Opens and closes `path`; a directory, a pipe or a socket is refused.
pub(super) fn check(path: &Path, access: Access) -> Result<(), HostFileError> {
    let failed = |source| HostFileError::Open {
        path: path.to_owned(),
        access,
        source,
    };
    // Before opening for writing: the kernel's word for a directory would be «Is a directory», and for a pipe, none.
    let kind = std::fs::metadata(path).map_err(failed)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(HostFileError::Kind {
            path: path.to_owned(),
            kind: describe(kind),
        });
    }
    OpenOptions::new()
        .read(true)
        .write(access == Access::ReadWrite)
        // Should it have become a pipe meanwhile, opening must not wait for the other end.
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(failed)?;
    Ok(())
}

fn describe(kind: FileType) -> &'static str {
    if kind.is_dir() {
        "directory"
    } else if kind.is_fifo() {
        "named pipe"
    } else if kind.is_socket() {
        "socket"
    } else {
        "character device"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_pass_and_directories_pipes_and_missing_files_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("disk");
        std::fs::write(&file, [0; 512]).unwrap();
        check(&file, Access::Read).unwrap();
        check(&file, Access::ReadWrite).unwrap();

        let directory = check(folder.path(), Access::ReadWrite).unwrap_err();
        assert!(directory.to_string().contains("is a directory"), "{directory}");

        let pipe = folder.path().join("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            0o600.into(),
            0,
        )
        .unwrap();
        assert!(matches!(
            check(&pipe, Access::Read),
            Err(HostFileError::Kind {
                kind: "named pipe",
                ..
            })
        ));

        let missing = check(&folder.path().join("none"), Access::Read).unwrap_err();
        assert!(missing.to_string().contains("none"), "{missing}");
    }
}
