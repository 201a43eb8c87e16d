//! One machine: its folder, what is remembered of it, and the monitor that runs it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::error::{StateError, io_error};
use super::files::write_whole;
use super::name::MachineName;
use crate::process::{Process, ProcessId};

/// What a machine was started with: `info.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Milliseconds since 1970.
    pub(crate) started_at_unix_ms: u64,
    /// The image that it came from, if it was not booted.
    pub(crate) image: Option<String>,
    /// That image's digest, and the socket of the agent that reads it, if one does and has said so.
    pub(crate) digest: Option<String>,
    /// See there.
    pub(crate) agent: Option<PathBuf>,
    /// Its kernel, if it was booted.
    pub(crate) kernel: Option<String>,
    /// How many vCPUs; 0 while that is not known.
    pub(crate) vcpus: u64,
    /// Guest memory in MiB; 0 while that is not known.
    pub(crate) memory_mib: u64,
}

impl Record {
    /// Of a machine that starts now.
    pub(crate) fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            started_at_unix_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
            ..Self::default()
        }
    }
}

/// The folder of one machine.
#[derive(Clone, Debug)]
pub(crate) struct MachineFolder {
    /// The machine's name.
    pub(crate) name: MachineName,
    pub(super) path: PathBuf,
}

impl MachineFolder {
    /// Where its API is.
    pub(crate) fn api_socket(&self) -> PathBuf {
        self.path.join("api.sock")
    }

    /// Where its serial console is.
    pub(crate) fn console_socket(&self) -> PathBuf {
        self.path.join("tty.sock")
    }

    /// Takes the place at the machine's console, which there is one of; `None` while somebody else has it.
    ///
    /// # Errors
    /// When the lock cannot be had at all.
    pub(crate) fn take_console(&self) -> Result<Option<ConsolePlace>, StateError> {
        let path = self.path.join("console.lock");
        let mut options = OpenOptions::new();
        let options = options.write(true).create(true).truncate(false).mode(0o600);
        let locked = options.open(&path).and_then(|file| {
            rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
            Ok(ConsolePlace { _lock: file })
        });
        match locked {
            Ok(place) => Ok(Some(place)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(source) => Err(io_error("locking", &path)(source)),
        }
    }

    /// What its monitor writes.
    pub(crate) fn log(&self) -> PathBuf {
        self.path.join("vmm.log")
    }

    /// Writes what the machine was started with.
    pub(crate) fn record(&self, record: &Record) -> Result<(), StateError> {
        let text = serde_json::to_vec_pretty(record).map_err(io::Error::other);
        let path = self.path.join("info.json");
        text.and_then(|text| write_whole(&path, &text))
            .map_err(io_error("writing", &path))
    }

    /// The process that was entered as its monitor, whatever became of it.
    pub(super) fn process(&self) -> Option<ProcessId> {
        fs::read_to_string(self.path.join("pid")).ok()?.parse().ok()
    }
}

/// The place at a machine's console, until this is dropped. The monitor serves one client and lets others wait without a
/// word, so those of the tool agree among themselves.
#[derive(Debug)]
pub(crate) struct ConsolePlace {
    _lock: File,
}

/// A machine that runs.
#[derive(Debug)]
pub(crate) struct Machine {
    /// Its folder.
    pub(crate) folder: MachineFolder,
    /// Its monitor.
    pub(crate) id: ProcessId,
    /// Its monitor, held.
    pub(crate) process: Process,
    /// What it was started with; nothing, if that cannot be read.
    pub(crate) record: Record,
}
