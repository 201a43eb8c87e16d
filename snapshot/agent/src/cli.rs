//! The agent's command line, for `runnel-agent` itself and for whoever starts it.

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use crate::agent::AgentSettings;
use crate::remote::{Credentials, CredentialsError, RemoteSettings};

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
pub enum ArgumentsError {
    /// There is no place for the socket.
    #[error("XDG_RUNTIME_DIR is not set, and /run/runnel is root's: name a socket with --socket")]
    NoSocket,
    /// There is no place for drives.
    #[error("neither XDG_CACHE_HOME nor HOME is set: name a directory with --drive-pages")]
    NoCache,
    /// The credentials cannot be read.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
}

/// What an agent is told.
#[derive(Clone, Debug, Args)]
pub struct AgentArguments {
    /// Where to listen [default: agent/agent.sock in $XDG_RUNTIME_DIR/runnel or, for root, in /run/runnel]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,

    /// Directory for pages of memory, on tmpfs: machines map them, and they outlive the agent [default:
    /// /dev/shm/runnel-<uid>]
    #[arg(long, value_name = "DIR")]
    pub memory_pages: Option<PathBuf>,

    /// Directory for pages of drives, on a disk [default: $XDG_CACHE_HOME/runnel, ~/.cache/runnel or, for root,
    /// /var/cache/runnel]
    #[arg(long, value_name = "DIR")]
    pub drive_pages: Option<PathBuf>,

    /// Certificates of the authorities to trust, in PEM, in place of the system's
    #[arg(long, value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,

    /// Who to be at registries: a file as `skopeo login --authfile` writes it
    #[arg(long, value_name = "FILE")]
    pub credentials: Option<PathBuf>,

    /// Bytes that background fill reads a second, for each image [default: no limit]
    #[arg(long, value_name = "BYTES")]
    pub fill_rate: Option<NonZeroU64>,

    /// Seconds that a server may be silent in the middle of an answer
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub silence: u64,

    /// Seconds that finding, connecting to and shaking hands with a server may each take
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub connect_timeout: u64,

    /// Seconds that an image is kept which no machine uses
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub keep_unused: u64,
}

impl AgentArguments {
    /// The settings that they come to.
    ///
    /// # Errors
    /// When there is no place for something, or the credentials cannot be read.
    pub fn settings(&self) -> Result<AgentSettings, ArgumentsError> {
        let socket = match &self.socket {
            Some(path) => path.clone(),
            None => default_socket().ok_or(ArgumentsError::NoSocket)?,
        };
        let memory = self.memory_pages.clone().unwrap_or_else(default_memory_pages);
        let drives = match &self.drive_pages {
            Some(path) => path.clone(),
            None => default_drive_pages().ok_or(ArgumentsError::NoCache)?,
        };
        let credentials = match &self.credentials {
            Some(path) => Credentials::read(path)?,
            None => Credentials::default(),
        };
        Ok(AgentSettings {
            remote: RemoteSettings {
                connect_deadline: Duration::from_secs(self.connect_timeout),
                idle_deadline: Duration::from_secs(self.silence),
                authorities: self.tls_ca.clone(),
                credentials,
                ..RemoteSettings::default()
            },
            fill_bytes_per_second: self.fill_rate,
            unused_after: Duration::from_secs(self.keep_unused),
            ..AgentSettings::new(socket, memory, drives)
        })
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn folder_of(variable: &str) -> Option<PathBuf> {
    // Relative ones do not count, says the XDG base directory specification.
    std::env::var_os(variable)
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
}

fn default_socket() -> Option<PathBuf> {
    let runtime = folder_of("XDG_RUNTIME_DIR").or_else(|| is_root().then(|| PathBuf::from("/run")))?;
    Some(runtime.join("runnel/agent/agent.sock"))
}

fn default_memory_pages() -> PathBuf {
    // Not the runtime directory: it is a tenth of RAM, and this one half of it.
    Path::new("/dev/shm").join(format!("runnel-{}", rustix::process::geteuid().as_raw()))
}

fn default_drive_pages() -> Option<PathBuf> {
    if is_root() {
        return Some("/var/cache/runnel".into());
    }
    let cache = folder_of("XDG_CACHE_HOME").or_else(|| Some(folder_of("HOME")?.join(".cache")))?;
    Some(cache.join("runnel"))
}
