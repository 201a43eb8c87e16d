//! The folder in which the tool remembers what runs: `$XDG_RUNTIME_DIR/runnel`, or `/run/runnel` for root.
//!
//! ```text
//! machines/<name>/   api.sock console.sock vmm.log   the monitor's
//!                    pid info.json                   who it is and what it runs
//!                    console.lock                    held by whoever is at the console
//! ended/<name>.log   the log of a machine that has ended; <name>.1.log that of the one of that name before, and so on
//! agent/             the agent's
//! lock               held while a machine is entered or removed
//! ```
//!
//! All of it is its owner's alone. An entry whose process has ended is stale, whatever ended it; every command removes
//! the stale ones that it meets. Nothing here ends a process.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::process::{Process, ProcessId};

/// The longest path of a unix socket on Linux, with the zero behind it (unix(7)).
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Names that are tried for a machine that was given none.
const NUMBERS_MAX: u32 = 100_000;

/// Logs of ended machines that are kept.
const ENDED_LOGS_MAX: usize = 32;

/// Of these, those of one name that are kept beside the last: machines without a name are called alike again and again.
const EARLIER_LOGS_MAX: u32 = 7;

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
        "XDG_RUNTIME_DIR is {path}, and nothing can be kept there: set it to a directory that is there and yours alone (`mkdir -m 700`), as a login session does"
    )]
    Runtime {
        /// What it names.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Others could come in.
    #[error(
        "{path} must be yours and nobody else's, and is of user {owner} with mode {mode:o}: `chown` and `chmod 700` it, or remove it"
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
        "{0} is too long for a unix socket (at most {SOCKET_PATH_BYTES_MAX} bytes): set XDG_RUNTIME_DIR to a shorter path"
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

fn io_error<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StateError + 'a {
    move |source| StateError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

/// The name of a machine: 1 to 64 letters, digits and hyphens, as the monitor takes it; no hyphen first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct MachineName(String);

/// Text that names no machine.
#[derive(Debug, thiserror::Error)]
#[error("a machine's name is 1 to 64 letters, digits and hyphens, the first no hyphen")]
pub(crate) struct BadMachineName;

impl FromStr for MachineName {
    type Err = BadMachineName;

    fn from_str(text: &str) -> Result<Self, BadMachineName> {
        let allowed = |c: u8| c.is_ascii_alphanumeric() || c == b'-';
        let fits = (1..=64).contains(&text.len()) && text.bytes().all(allowed) && !text.starts_with('-');
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(BadMachineName)
        }
    }
}

impl std::fmt::Display for MachineName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a machine was started with: `info.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Milliseconds since 1970.
    pub(crate) started_at_unix_ms: u64,
    /// The image that it came from, if it was not booted.
    pub(crate) image: Option<String>,
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
    path: PathBuf,
}

impl MachineFolder {
    /// Where its API is.
    pub(crate) fn api_socket(&self) -> PathBuf {
        self.path.join("api.sock")
    }

    /// Where its serial console is.
    pub(crate) fn console_socket(&self) -> PathBuf {
        self.path.join("console.sock")
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

    fn process(&self) -> Option<ProcessId> {
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
            Some(runtime) => Self::at(runtime.join("runnel")).map_err(|error| match error {
                StateError::Io { source, .. } => StateError::Runtime {
                    path: runtime,
                    source,
                },
                other => other,
            }),
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

    fn ended_path(&self) -> PathBuf {
        self.root.join("ended")
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
        let lock = lock(&folder.path).map_err(io_error("locking", &folder.path))?;
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

    /// Where the log of a machine is once it has ended.
    pub(crate) fn ended_log(&self, name: &MachineName) -> PathBuf {
        self.ended_path().join(format!("{name}.log"))
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
        match lock(&folder.path) {
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

    /// Moves a log to those of ended machines, behind which earlier ones of the name stand; best effort.
    fn keep_log(&self, folder: &MachineFolder) {
        let earlier = |number: u32| match number {
            0 => self.ended_log(&folder.name),
            _ => self.ended_path().join(format!("{}.{number}.log", folder.name)),
        };
        for number in (0..EARLIER_LOGS_MAX).rev() {
            let _ = fs::rename(earlier(number), earlier(number + 1));
        }
        if fs::rename(folder.log(), earlier(0)).is_ok() {
            self.limit_ended_logs();
        }
    }

    /// Removes the oldest logs beyond the limit; best effort.
    fn limit_ended_logs(&self) {
        let Ok(entries) = fs::read_dir(self.ended_path()) else {
            return;
        };
        let age = |entry: fs::DirEntry| Some((entry.metadata().ok()?.modified().ok()?, entry.path()));
        let mut logs: Vec<_> = entries.flatten().filter_map(age).collect();
        logs.sort();
        let too_many = logs.len().saturating_sub(ENDED_LOGS_MAX);
        for (_, path) in &logs[..too_many] {
            let _ = fs::remove_file(path);
        }
    }
}

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

enum Found {
    Running(ProcessId, Process),
    Starting,
    Stale,
}

fn lock(folder: &Path) -> io::Result<File> {
    let folder = File::open(folder)?;
    rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive)?;
    Ok(folder)
}

/// Makes a folder, or sees to it that one which is there is nobody else's.
fn private_folder(path: &Path) -> Result<(), StateError> {
    let made = DirBuilder::new().mode(0o700).create(path);
    match made {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(source) => return Err(io_error("creating", path)(source)),
    }
    let found = fs::symlink_metadata(path).map_err(io_error("reading", path))?;
    let (owner, mode) = (found.uid(), found.mode() & 0o7777);
    if !found.is_dir() || owner != rustix::process::geteuid().as_raw() || mode & 0o077 != 0 {
        return Err(StateError::Exposed {
            path: path.to_owned(),
            owner,
            mode,
        });
    }
    Ok(())
}

/// Writes a file so that nobody reads half of it.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let unfinished = path.with_extension("new");
    fs::write(&unfinished, bytes)?;
    fs::rename(&unfinished, path)
}

#[cfg(test)]
mod tests;
