//! The log: lines as Firecracker writes them, to a file or named pipe.
//!
//! ```text
//! 2026-11-23T04:11:37.123456789 [anonymous-instance:main] Listening on API socket ("/run/firecracker.socket").
//! 2026-11-23T04:11:37.123456789 [anonymous-instance:api:INFO:vmm/src/api/server.rs:180] GET request on "/" …
//! ```
//!
//! Times are UTC. Until a place is given the log goes to standard error, warnings and errors alone: standard output
//! is the guest's console. A line that cannot be written (a pipe that nobody empties) is counted and forgotten: the
//! log never holds the machine up.

mod line;
mod timestamp;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::fstat;
use tracing::level_filters::LevelFilter;
use tracing::{Event, Subscriber};
use tracing_subscriber::layer::{Context, Layer};
use tracing_subscriber::prelude::*;

use crate::config::{InstanceId, LoggerBody};

/// Why the log cannot be had as asked for.
#[derive(Debug, thiserror::Error)]
pub enum LoggerError {
    /// Its file cannot be written.
    #[error("Failed to open target file {path:?}: {source}")]
    Open {
        /// Which.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A level that there is not.
    #[error(
        "Invalid value for logger level: {0:?}. Possible values: [Off, Error, Warning, Info, Debug, Trace]"
    )]
    Level(String),
    /// Somebody else logs in this process.
    #[error("the log was set up before")]
    Twice,
}

/// How important a line must be; written in any case, «warn» or «warning».
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level(LevelFilter);

impl FromStr for Level {
    type Err = LoggerError;

    fn from_str(text: &str) -> Result<Self, LoggerError> {
        Ok(Self(match text.to_ascii_lowercase().as_str() {
            "off" => LevelFilter::OFF,
            "error" => LevelFilter::ERROR,
            "warn" | "warning" => LevelFilter::WARN,
            "info" => LevelFilter::INFO,
            "debug" => LevelFilter::DEBUG,
            "trace" => LevelFilter::TRACE,
            _ => return Err(LoggerError::Level(text.to_owned())),
        }))
    }
}

/// The log of this process, settings and all; clones share them.
#[derive(Clone)]
pub struct Logger {
    shared: Arc<Shared>,
}

struct Shared {
    id: InstanceId,
    settings: RwLock<Settings>,
    missed_lines: AtomicU64,
}

struct Settings {
    /// Standard error if `None`.
    target: Option<File>,
    level: LevelFilter,
    show_level: bool,
    show_origin: bool,
    /// Lines of other modules are left out.
    module: Option<String>,
}

impl Logger {
    /// A log on standard error, warnings and errors alone.
    #[must_use]
    pub fn new(id: InstanceId) -> Self {
        let settings = Settings {
            target: None,
            level: LevelFilter::WARN,
            show_level: false,
            show_origin: false,
            module: None,
        };
        let settings = RwLock::new(settings);
        Self {
            shared: Arc::new(Shared {
                id,
                settings,
                missed_lines: AtomicU64::new(0),
            }),
        }
    }

    /// Makes it the log of this process.
    ///
    /// # Errors
    /// When there is one already.
    pub fn install(&self) -> Result<(), LoggerError> {
        let subscriber = tracing_subscriber::registry().with(self.clone());
        tracing::subscriber::set_global_default(subscriber).map_err(|_| LoggerError::Twice)
    }

    /// Changes what `body` names. As with Firecracker, a level that is left out is «Info» again.
    ///
    /// # Errors
    /// When the level makes no sense or the file cannot be written; nothing changes then.
    pub fn update(&self, body: &LoggerBody) -> Result<(), LoggerError> {
        let level = match &body.level {
            Some(text) => text.parse::<Level>()?.0,
            None => LevelFilter::INFO,
        };
        let target = body.log_path.as_deref().map(open).transpose()?;
        let mut settings = self
            .shared
            .settings
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        settings.level = level;
        if target.is_some() {
            settings.target = target;
        }
        settings.show_level = body.show_level.unwrap_or(settings.show_level);
        settings.show_origin = body.show_log_origin.unwrap_or(settings.show_origin);
        if body.module.is_some() {
            settings.module.clone_from(&body.module);
        }
        Ok(())
    }

    /// Whether it goes to standard error, by that name or as the file behind it.
    #[must_use]
    pub fn is_on_stderr(&self) -> bool {
        let settings = self
            .shared
            .settings
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let Some(file) = &settings.target else { return true };
        let [log, stderr] = [fstat(file), fstat(io::stderr())];
        matches!((log, stderr), (Ok(log), Ok(stderr)) if (log.st_dev, log.st_ino) == (stderr.st_dev, stderr.st_ino))
    }

    /// Lines that could not be written.
    #[must_use]
    pub fn missed_lines(&self) -> u64 {
        self.shared.missed_lines.load(Ordering::Relaxed)
    }
}

/// Opens a file to append to, or a named pipe without waiting for its reader.
fn open(path: &Path) -> Result<File, LoggerError> {
    OpenOptions::new()
        // A pipe that is opened for writing alone is refused until somebody reads it.
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(|source| LoggerError::Open {
            path: path.to_owned(),
            source,
        })
}

/// Writes to standard error, if it takes something now: it may be a pipe that nobody empties, and must not be told not
/// to block, since others have it too.
fn say(line: &[u8]) -> io::Result<()> {
    let mut stderr = io::stderr().lock();
    let is_ready = poll(
        &mut [PollFd::new(&stderr, PollFlags::OUT)],
        Some(&Timespec::default()),
    )?;
    if is_ready == 0 {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    stderr.write_all(line)
}

/// Says on standard error why the monitor ends, if anybody takes it: it ends all the same.
pub fn say_last(words: &str) {
    let _ = say(format!("{words}\n").as_bytes());
}

impl Settings {
    fn wants(&self, event: &Event<'_>) -> bool {
        let metadata = event.metadata();
        let module_is_wanted = match (&self.module, metadata.module_path()) {
            (None, _) => true,
            (Some(wanted), Some(module)) => module.starts_with(wanted.as_str()),
            (Some(_), None) => false,
        };
        *metadata.level() <= self.level && module_is_wanted
    }
}

impl<S: Subscriber> Layer<S> for Logger {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let settings = self
            .shared
            .settings
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        if !settings.wants(event) {
            return;
        }
        let line = line::of(event, &self.shared.id, settings.show_level, settings.show_origin);
        // One write a line, so that lines of several threads do not mix.
        let written = match &settings.target {
            Some(file) => (&mut &*file).write_all(line.as_bytes()),
            None => say(line.as_bytes()),
        };
        if written.is_err() {
            self.shared.missed_lines.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests;
