//! Why the folder cannot be used, or a machine not be found.

use std::io;
use std::path::{Path, PathBuf};

use runnel_snapshot::shell::shell_word;

use super::files::{SOCKET_PATH_BYTES_MAX, own_uid};
use super::name::MachineName;

/// Why the folder cannot be used, or a machine not be found.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    /// There is no place for it.
    #[error(
        "XDG_RUNTIME_DIR is not set, and /run/runnel is root's: set it to a directory of your own, as a login session does"
    )]
    NoPlace,
    /// The variable means another folder in each directory.
    #[error(
        "XDG_RUNTIME_DIR is {0:?}: it must be an absolute path, as that which a login session sets; without it, root uses /run/runnel"
    )]
    Relative(PathBuf),
    /// What the variable names is not there, or somebody else's.
    #[error(
        "XDG_RUNTIME_DIR is {path}, and nothing can be kept there: set it to a directory that is there and yours alone (`mkdir -m 700 {word}`), as a login session does",
        word = shell_word(path)
    )]
    Runtime {
        /// What it names.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Others could put something there.
    #[error(
        "XDG_RUNTIME_DIR is {word}, of user {owner} with mode {mode:o}, so that others could put machines and sockets there: it must be of user {own}, and nobody else's to write, as that which a login session makes (mode 700): `chmod 700 {word}` if it is yours, or set it to another",
        word = shell_word(path),
        own = own_uid()
    )]
    Shared {
        /// What the variable names.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Its permissions.
        mode: u32,
    },
    /// Others could come in.
    #[error(
        "{path} must be yours and nobody else's, and is of user {owner} with mode {mode:o}: `chmod 700 {word}` if it is yours (user {own}), or have it removed",
        word = shell_word(path),
        own = own_uid()
    )]
    Exposed {
        /// Which folder.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Its permissions.
        mode: u32,
    },
    /// Sockets in it could not be bound.
    #[error(
        "{0} is too long for a unix socket (at most {SOCKET_PATH_BYTES_MAX} bytes): set XDG_RUNTIME_DIR to a shorter path, or give a shorter name"
    )]
    TooLong(PathBuf),
    /// The system refused.
    #[error("{what} {path} failed")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The name is taken.
    #[error(
        "a machine named {name} runs already (process {pid}): choose another --name, or end it with `runnel stop {name}`"
    )]
    Taken {
        /// The name.
        name: MachineName,
        /// Whose it is.
        pid: i32,
    },
    /// The name is just being taken.
    #[error("a machine named {0} is just being started: choose another --name")]
    BeingTaken(MachineName),
    /// No such machine.
    #[error("no machine named {name} runs{hint}: `runnel ps` lists them")]
    Unknown {
        /// The name.
        name: MachineName,
        /// What is known of it.
        hint: String,
    },
    /// No number is free.
    #[error("there is no free name: give one with --name")]
    NoFreeName,
}

pub(super) fn io_error<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StateError + 'a {
    move |source| StateError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}
