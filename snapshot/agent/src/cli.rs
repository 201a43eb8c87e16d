//! The agent's command line, for `runnel-agent` itself and for whoever starts it.

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use runnel_snapshot::digest::BlobDigest;

use crate::agent::{AgentSettings, QUOTA_BYTES_MIN};
use crate::remote::{Credentials, CredentialsError, RemoteSettings, usual_credentials};

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
pub enum ArgumentsError {
    /// There is no place for the socket.
    #[error("XDG_RUNTIME_DIR is not set, and /run/runnel is root's: name a socket with --socket")]
    NoSocket,
    /// The socket's folder is not there.
    #[error(
        "there is no directory {0} for the socket: make it (`mkdir -m 700`), or name another with --socket"
    )]
    NoSocketFolder(PathBuf),
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
    /// /dev/shm/runnel-<uid>-<id>, where <id> comes from the socket's path: agents share no directory]
    #[arg(long, value_name = "DIR")]
    pub memory_pages: Option<PathBuf>,

    /// Directory for pages of drives, on a disk [default: runnel/<id> in $XDG_CACHE_HOME, else in /var/cache for root and
    /// in ~/.cache for others]
    #[arg(long, value_name = "DIR")]
    pub drive_pages: Option<PathBuf>,

    /// How much RAM pages of memory may take, with K, M, G or T, and at least 4M. Beyond it chunks are taken out again,
    /// those that no machine needs first, and fetched anew if one does [default: three quarters of what the directory's
    /// file system has room for]
    #[arg(long, value_name = "SIZE", value_parser = parse_quota)]
    pub memory_quota: Option<u64>,

    /// How much disk pages of drives may take, likewise [default: half of what the directory's file system has room for]
    #[arg(long, value_name = "SIZE", value_parser = parse_quota)]
    pub drive_quota: Option<u64>,

    /// Certificates of the authorities to trust, in PEM, in place of the system's
    #[arg(long, value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,

    /// Who to be at registries: a file as `skopeo login --authfile` writes it [default: $REGISTRY_AUTH_FILE, else
    /// ~/.docker/config.json]
    #[arg(long, value_name = "FILE")]
    pub credentials: Option<PathBuf>,

    /// Bytes that background fill reads a second, for each image [default: no limit]
    #[arg(long, value_name = "BYTES", value_parser = parse_rate)]
    pub fill_rate: Option<NonZeroU64>,

    /// Seconds that a server may be silent in the middle of an answer, or send less than 256 bytes a second
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
            Some(path) => in_a_folder(path)?,
            None => default_socket().ok_or(ArgumentsError::NoSocket)?,
        };
        let own = own_id(&socket);
        let memory = self.memory_pages.clone();
        let memory = memory.unwrap_or_else(|| default_memory_pages(&own));
        let drives = match &self.drive_pages {
            Some(path) => path.clone(),
            None => default_drive_pages(&own).ok_or(ArgumentsError::NoCache)?,
        };
        let credentials = match self.credentials.clone().or_else(usual_credentials) {
            Some(path) => Credentials::read(&path)?,
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
            memory_quota: self.memory_quota,
            drive_quota: self.drive_quota,
            ..AgentSettings::new(socket, memory, drives)
        })
    }
}

/// Removes the folder in which this user's agents keep pages of drives, where one that has ended has taken its own,
/// `drive_folder`, away, and there is no other. A folder that was named is somebody else's.
pub fn tidy_up(drive_folder: &Path) {
    let folder = default_drive_folder().filter(|folder| drive_folder.parent() == Some(folder));
    if let Some(folder) = folder {
        // Fails while there is something in it, and is meant to.
        let _ = std::fs::remove_dir(folder);
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

/// A socket that was named, whose folder must be there: one that was mistyped is not made.
fn in_a_folder(socket: &Path) -> Result<PathBuf, ArgumentsError> {
    match socket.parent() {
        Some(folder) if !folder.as_os_str().is_empty() && !folder.is_dir() => {
            Err(ArgumentsError::NoSocketFolder(folder.to_owned()))
        }
        _ => Ok(socket.to_owned()),
    }
}

/// What tells the folders of the agent at that socket from those of others: two would refuse to share.
fn own_id(socket: &Path) -> String {
    let path = std::path::absolute(socket).unwrap_or_else(|_| socket.to_owned());
    let mut digest = BlobDigest::of(path.as_os_str().as_encoded_bytes()).hex();
    digest.truncate(8);
    digest
}

fn default_memory_pages(own: &str) -> PathBuf {
    // Not the runtime directory: it is a tenth of RAM, and this one half of it.
    let user = rustix::process::geteuid().as_raw();
    Path::new("/dev/shm").join(format!("runnel-{user}-{own}"))
}

fn default_drive_pages(own: &str) -> Option<PathBuf> {
    Some(default_drive_folder()?.join(own))
}

fn default_drive_folder() -> Option<PathBuf> {
    let cache = folder_of("XDG_CACHE_HOME").or_else(|| match is_root() {
        true => Some("/var/cache".into()),
        false => Some(folder_of("HOME")?.join(".cache")),
    })?;
    Some(cache.join("runnel"))
}

/// A rate in bytes a second, as somebody writes it.
fn parse_rate(text: &str) -> Result<NonZeroU64, String> {
    let rate = text.parse().ok().and_then(NonZeroU64::new);
    rate.ok_or_else(|| "give bytes a second, without a unit and at least 1, as in 10000000; without --fill-rate there is no limit".to_owned())
}

/// A quota, as somebody writes it.
fn parse_quota(text: &str) -> Result<u64, String> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let shift = match text[end..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => Some(0),
        "k" | "kib" => Some(10),
        "m" | "mib" => Some(20),
        "g" | "gib" => Some(30),
        "t" | "tib" => Some(40),
        _ => None,
    };
    let number: Option<u64> = text[..end].parse().ok();
    number
        .zip(shift)
        .and_then(|(number, shift)| number.checked_mul(1 << shift))
        .filter(|bytes| *bytes >= QUOTA_BYTES_MIN)
        .ok_or_else(|| {
            format!(
                "give at least {}M, as in 512M or 20G (powers of 1024)",
                QUOTA_BYTES_MIN >> 20
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_in_a_folder_that_is_not_there_is_refused_and_the_folder_is_not_made() {
        let folder = tempfile::tempdir().unwrap();
        let there = folder.path().join("agent.sock");
        assert_eq!(in_a_folder(&there).unwrap(), there);
        assert_eq!(
            in_a_folder(Path::new("agent.sock")).unwrap(),
            Path::new("agent.sock")
        );
        let refused = in_a_folder(&folder.path().join("nope/agent.sock"))
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("nope") && refused.contains("--socket"),
            "{refused}"
        );
        assert!(!folder.path().join("nope").exists());
    }

    #[test]
    fn a_quota_is_a_size_of_some_use() {
        assert_eq!(parse_quota("4M"), Ok(4 << 20));
        assert_eq!(parse_quota("2 GiB"), Ok(2 << 30));
        for text in ["", "0", "3M", "1.5G", "lots", "99999999999T"] {
            assert!(parse_quota(text).unwrap_err().contains("as in 512M"), "{text}");
        }
    }

    #[test]
    fn agents_at_two_sockets_have_folders_of_their_own_and_one_keeps_its() {
        let settings = |socket: &str| {
            let own = own_id(Path::new(socket));
            (default_memory_pages(&own), default_drive_pages(&own))
        };
        assert_eq!(settings("/run/a"), settings("/run/a"));
        assert_ne!(settings("/run/a").0, settings("/run/b").0);
        assert_ne!(settings("/run/a").1, settings("/run/b").1);
    }
}
