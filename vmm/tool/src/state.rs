//! The folder in which the tool remembers what runs: `$XDG_RUNTIME_DIR/runnel`, or `/run/runnel` for root.
//!
//! ```text
//! machines/<name>/   api.sock tty.sock vmm.log   the monitor's
//!                    pid info.json                   who it is and what it runs
//!                    console.lock                    held by whoever is at the console
//! ended/<name>.log   the log of a machine that has ended; <name>.1.log that of the one of that name before, and so on
//! agent/             the agent's
//! lock               held while a machine is entered or removed
//! ```
//!
//! All of it is its owner's alone, and so is the folder around it to write. An entry whose process has ended is stale, whatever ended it; every command removes
//! the stale ones that it meets. Nothing here ends a process.

mod ended;
mod error;
mod files;
mod machine;
mod name;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

pub(crate) use error::StateError;
pub(crate) use files::check_socket;
pub(crate) use machine::{ConsolePlace, Machine, MachineFolder, Record};
pub(crate) use name::MachineName;

use crate::process::{Process, ProcessId};
use error::io_error;
use files::{check_parent, private_folder, try_lock, write_whole};

/// Names that are tried for a machine that was given none.
const NUMBERS_MAX: u32 = 100_000;

/// A name taken for a machine that is about to start. Dropped before [`enter`](Self::enter), it is free again.
#[derive(Debug)]
pub(crate) struct Claim<'s> {
    state: &'s StateFolder,
    folder: MachineFolder,
    /// Locked until a process is entered, so that nobody takes the folder for a stale one.
    _lock: File,
    is_entered: bool,
}

impl Claim<'_> {
    /// The machine's folder.
    pub(crate) fn folder(&self) -> &MachineFolder {
        &self.folder
    }

    /// Says which process is the machine's monitor.
    pub(crate) fn enter(mut self, process: ProcessId) -> Result<MachineFolder, StateError> {
        let path = self.folder.path.join("pid");
        write_whole(&path, process.to_string().as_bytes()).map_err(io_error("writing", &path))?;
        self.is_entered = true;
        Ok(self.folder.clone())
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if !self.is_entered {
            // What cannot be removed now is stale, and the next command tries again. So is what there is of a log, if
            // the lock cannot be had.
            let _ = self.state.lock().and_then(|_lock| self.state.bury(&self.folder));
        }
    }
}

/// The folder of all that runs.
#[derive(Debug)]
pub(crate) struct StateFolder {
    root: PathBuf,
}

impl StateFolder {
    /// Opens the folder, and makes it if need be.
    ///
    /// # Errors
    /// When there is no place for it, or others could come in.
    pub(crate) fn open() -> Result<Self, StateError> {
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        match runtime.filter(|path| !path.as_os_str().is_empty()) {
            // Passed over, what is started would not be where whoever set it looks.
            Some(runtime) if !runtime.is_absolute() => Err(StateError::Relative(runtime)),
            Some(runtime) => {
                let state = check_parent(&runtime).and_then(|()| Self::at(runtime.join("runnel")));
                state.map_err(|error| match error {
                    StateError::Io { source, .. } => StateError::Runtime {
                        path: runtime,
                        source,
                    },
                    other => other,
                })
            }
            None if rustix::process::geteuid().is_root() => Self::at("/run/runnel".into()),
            None => Err(StateError::NoPlace),
        }
    }

    fn at(root: PathBuf) -> Result<Self, StateError> {
        let state = Self { root };
        private_folder(&state.root)?;
        for folder in [state.machines_path(), state.ended_path(), state.agent()] {
            private_folder(&folder)?;
        }
        Ok(state)
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.root
    }

    fn machines_path(&self) -> PathBuf {
        self.root.join("machines")
    }

    /// The agent's folder.
    pub(crate) fn agent(&self) -> PathBuf {
        self.root.join("agent")
    }

    /// Where this user's agent listens.
    pub(crate) fn agent_socket(&self) -> PathBuf {
        self.agent().join("agent.sock")
    }

    /// Takes a name for a new machine: the given one, or the first free of `m1`, `m2`, …
    ///
    /// # Errors
    /// When the name is taken, or the folder cannot be made.
    pub(crate) fn claim(&self, name: Option<&MachineName>) -> Result<Claim<'_>, StateError> {
        let _lock = self.lock()?;
        if let Some(name) = name {
            return self.try_claim(name)?.map_err(|taken| match taken {
                Some(process) => StateError::Taken {
                    name: name.clone(),
                    pid: process.pid(),
                },
                None => StateError::BeingTaken(name.clone()),
            });
        }
        for number in 1..=NUMBERS_MAX {
            if let Ok(claim) = self.try_claim(&MachineName(format!("m{number}")))? {
                return Ok(claim);
            }
        }
        Err(StateError::NoFreeName)
    }

    /// Takes a name, or says who has it; nothing of one that is being started. The lock is held.
    fn try_claim(&self, name: &MachineName) -> Result<Result<Claim<'_>, Option<ProcessId>>, StateError> {
        let folder = self.folder(name);
        check_socket(&folder.console_socket())?;
        if folder.path.exists() {
            match self.look(&folder)? {
                Found::Running(id, _) => return Ok(Err(Some(id))),
                Found::Starting => return Ok(Err(None)),
                Found::Stale => self.bury(&folder)?,
            }
        }
        let made = DirBuilder::new().mode(0o700).create(&folder.path);
        made.map_err(io_error("creating", &folder.path))?;
        let lock = try_lock(&folder.path).map_err(io_error("locking", &folder.path))?;
        Ok(Ok(Claim {
            state: self,
            folder,
            _lock: lock,
            is_entered: false,
        }))
    }

    /// All machines that run, by name. Entries of others are removed.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub(crate) fn machines(&self) -> Result<Vec<Machine>, StateError> {
        let _lock = self.lock()?;
        let path = self.machines_path();
        let entries = fs::read_dir(&path).map_err(io_error("reading", &path))?;
        let mut machines = Vec::new();
        for entry in entries.flatten() {
            // What has no such name is not ours.
            let Some(name) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            machines.extend(self.find(&name)?);
        }
        machines.sort_by(|a, b| a.folder.name.cmp(&b.folder.name));
        Ok(machines)
    }

    /// The machine of that name.
    ///
    /// # Errors
    /// When none runs.
    pub(crate) fn machine(&self, name: &MachineName) -> Result<Machine, StateError> {
        let _lock = self.lock()?;
        let unknown = || {
            let log = self.ended_log(name);
            let hint = if log.exists() {
                format!(" (it has ended; its log is {})", log.display())
            } else {
                String::new()
            };
            StateError::Unknown {
                name: name.clone(),
                hint,
            }
        };
        self.find(name)?.ok_or_else(unknown)
    }

    /// The machine of that name, if it runs; if it has ended, what is left of it is removed. The lock is held.
    fn find(&self, name: &MachineName) -> Result<Option<Machine>, StateError> {
        let folder = self.folder(name);
        if !folder.path.exists() {
            return Ok(None);
        }
        match self.look(&folder)? {
            Found::Running(id, process) => {
                let record = fs::read(folder.path.join("info.json")).unwrap_or_default();
                let record = serde_json::from_slice(&record).unwrap_or_default();
                Ok(Some(Machine {
                    folder,
                    id,
                    process,
                    record,
                }))
            }
            Found::Starting => Ok(None),
            Found::Stale => self.bury(&folder).map(|()| None),
        }
    }

    /// Forgets a machine that has ended; its log is kept.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub(crate) fn forget(&self, folder: &MachineFolder) -> Result<(), StateError> {
        let _lock = self.lock()?;
        match folder.path.exists() && matches!(self.look(folder)?, Found::Stale) {
            true => self.bury(folder),
            // Another command was faster, and the name may be another machine's by now.
            false => Ok(()),
        }
    }

    fn folder(&self, name: &MachineName) -> MachineFolder {
        MachineFolder {
            name: name.clone(),
            path: self.machines_path().join(&name.0),
        }
    }

    fn lock(&self) -> Result<File, StateError> {
        let path = self.root.join("lock");
        let mut options = OpenOptions::new();
        let options = options.write(true).create(true).truncate(false).mode(0o600);
        let locked = options.open(&path).and_then(|file| {
            rustix::fs::flock(&file, FlockOperation::LockExclusive)?;
            Ok(file)
        });
        locked.map_err(io_error("locking", &path))
    }

    fn look(&self, folder: &MachineFolder) -> Result<Found, StateError> {
        if let Some(id) = folder.process() {
            let process = id.open();
            return Ok(process.map_or(Found::Stale, |process| Found::Running(id, process)));
        }
        match try_lock(&folder.path) {
            Ok(_) => Ok(Found::Stale),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Found::Starting),
            Err(source) => Err(io_error("locking", &folder.path)(source)),
        }
    }

    fn bury(&self, folder: &MachineFolder) -> Result<(), StateError> {
        // There is none of a machine that never came so far.
        if folder.log().exists() {
            self.keep_log(folder);
        }
        fs::remove_dir_all(&folder.path).map_err(io_error("removing", &folder.path))
    }
}

enum Found {
    Running(ProcessId, Process),
    Starting,
    Stale,
}

#[cfg(test)]
mod tests;
