//! A monitor that this command started: `runnel-vmm` in a session of its own, its console at a socket.
//!
//! Until it is [kept](Monitor::keep), dropping it ends the process and forgets the machine: a command that fails half
//! way leaves nothing.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use runnel_snapshot::causes::with_causes;
use rustix::process::Signal;
use serde_json::json;

use crate::api::{Api, ApiError};
use crate::exit::Exit;
use crate::output::is_verbose;
use crate::process::{Process, ProcessId};
use crate::program::{self, ProgramError, last_words};
use crate::signals::Signals;
use crate::state::{MachineFolder, MachineName, StateError, StateFolder};

/// How long a monitor may take until it answers; it does so before it looks at its machine.
const START: Duration = Duration::from_secs(10);

/// How often it is looked at meanwhile.
const LOOK: Duration = Duration::from_millis(2);

/// How often signals are looked for while it is waited for.
const LOOK_FOR_SIGNALS: Duration = Duration::from_millis(100);

/// How long a monitor that was asked to end may take, before it is killed.
pub(crate) const FAREWELL: Duration = Duration::from_secs(10);

/// Why there is no monitor.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MonitorError {
    /// There is no such program.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// The machine cannot be entered.
    #[error(transparent)]
    State(#[from] StateError),
    /// It could not be started.
    #[error("{program} cannot be started")]
    Spawn {
        /// Which program.
        program: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// It ended at once.
    #[error("the monitor ended at once ({status}):\n{log}")]
    Ended {
        /// How.
        status: ExitStatus,
        /// What it said.
        log: String,
    },
    /// It does not answer, and is ended.
    #[error("the monitor does not answer; its log is {0}")]
    Silent(PathBuf),
    /// It refused the machine.
    #[error("{reason}; the log of {name} is {}", log.display())]
    Refused {
        /// What it said.
        reason: String,
        /// The machine's name.
        name: MachineName,
        /// Where its log will be, since it ends.
        log: PathBuf,
    },
    /// It refused what was typed, and the reason says what of it.
    #[error("{0}")]
    Mistyped(String),
    /// It refused to put its console there.
    #[error("the console's socket was refused")]
    Console(#[source] ApiError),
}

/// A monitor that this command started.
#[derive(Debug)]
pub(crate) struct Monitor<'s> {
    state: &'s StateFolder,
    folder: MachineFolder,
    child: Child,
    process: Process,
    is_kept: bool,
}

impl<'s> Monitor<'s> {
    /// Starts one for a machine of that name, and waits until it answers.
    ///
    /// # Errors
    /// When the name is taken, or there is no monitor to be had. Nothing is left then.
    pub(crate) fn start(state: &'s StateFolder, name: Option<&MachineName>) -> Result<Self, MonitorError> {
        let program = program::monitor()?;
        let claim = state.claim(name)?;
        let folder = claim.folder().clone();
        let failed = |source| MonitorError::Spawn {
            program: program.clone(),
            source,
        };
        let mut command = Command::new(&program);
        command.arg("--api-sock").arg(folder.api_socket());
        command.arg("--id").arg(folder.name.to_string());
        command.arg("--log-path").arg(folder.log());
        let level = if is_verbose() { "Debug" } else { "Info" };
        command.args(["--level", level, "--show-level"]);
        program::detach(&mut command, &folder.log()).map_err(failed)?;
        // Should this command be killed before the machine runs, the monitor ends too: nobody else would know of it.
        command.arg("--lifeline").stdin(Stdio::piped());
        let mut child = command.spawn().map_err(failed)?;
        // It cannot be another one of the same number before the child is waited for.
        let id = ProcessId::of(child.id());
        let Some((id, process)) = id.and_then(|id| Some((id, id.open()?))) else {
            return Err(ended(&mut child, &folder, &state.ended_log(&folder.name)));
        };
        let mut monitor = Self {
            state,
            folder,
            child,
            process,
            is_kept: false,
        };
        claim.enter(id)?;
        tracing::debug!(
            "the monitor of {} is process {}, {}; it logs to {}",
            monitor.folder.name,
            id.pid(),
            program.display(),
            monitor.folder.log().display()
        );
        monitor.wait_for_api()?;
        let socket = json!({ "serial_socket_path": monitor.folder.console_socket() });
        monitor
            .api()
            .put("/serial", &socket)
            .map_err(MonitorError::Console)?;
        Ok(monitor)
    }

    fn wait_for_api(&mut self) -> Result<(), MonitorError> {
        let deadline = Instant::now() + START;
        while !self.api().is_listening() {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                let kept = self.ended_log();
                return Err(ended(&mut self.child, &self.folder, &kept));
            }
            if Instant::now() > deadline {
                return Err(MonitorError::Silent(self.ended_log()));
            }
            thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Its API.
    pub(crate) fn api(&self) -> Api {
        Api::new(&self.folder.api_socket())
    }

    /// The machine's folder.
    pub(crate) fn folder(&self) -> &MachineFolder {
        &self.folder
    }

    /// Lets it go on when this command has ended.
    pub(crate) fn keep(mut self) {
        self.is_kept = true;
    }

    /// Where its log is once it has ended.
    pub(crate) fn ended_log(&self) -> PathBuf {
        self.state.ended_log(&self.folder.name)
    }

    /// Why this machine, which was to be started, is not.
    pub(crate) fn refused(&self, error: &ApiError) -> MonitorError {
        /// What may fail for reasons of the host. All else is what was typed, which the log knows no more of.
        const ATTEMPTS: [&str; 2] = ["PUT /actions", "PUT /snapshot/load"];
        let reason = with_causes(error);
        let is_attempt = match error {
            ApiError::Refused { request, .. } => ATTEMPTS.contains(&request.as_str()),
            _ => true,
        };
        // In the same way, a reason that names the flag to give.
        if !is_attempt || names_a_flag(&reason) {
            return MonitorError::Mistyped(reason);
        }
        MonitorError::Refused {
            reason,
            name: self.folder.name.clone(),
            log: self.ended_log(),
        }
    }

    /// Waits for its end; what was left of the machine is removed. A signal that comes first ends the monitor.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub(crate) fn wait(mut self, signals: &Signals) -> io::Result<Exit> {
        while !self.process.wait(LOOK_FOR_SIGNALS)? {
            if let Some(signal) = signals.next() {
                return Ok(Exit::Signal(signal));
            }
        }
        let status = self.child.wait()?;
        self.is_kept = true;
        // What cannot be removed now is stale, and the next command tries again.
        let _ = self.state.forget(&self.folder);
        Ok(Exit::Monitor(code_of(status)))
    }

    /// Ends it, in order if it can.
    fn end(&mut self) {
        for (signal, patience) in [(Signal::TERM, FAREWELL), (Signal::KILL, FAREWELL)] {
            // It is a child of ours: the signal is allowed, and a wait that fails is tried again with the next one.
            let _ = self.process.signal(signal);
            if self.process.wait(patience).unwrap_or(false) {
                break;
            }
        }
        let _ = self.child.wait();
    }
}

impl Drop for Monitor<'_> {
    fn drop(&mut self) {
        if !self.is_kept {
            self.end();
            let _ = self.state.forget(&self.folder);
        }
    }
}

/// `kept` is where the log will be once the machine is forgotten, as it is before anybody reads of it.
fn ended(child: &mut Child, folder: &MachineFolder, kept: &Path) -> MonitorError {
    const LINES: usize = 8;
    match child.wait() {
        Ok(status) => MonitorError::Ended {
            status,
            // The folder is new, and so is its log.
            log: last_words(&folder.log(), 0, LINES, kept),
        },
        Err(_) => MonitorError::Silent(kept.to_owned()),
    }
}

/// Whether a reason tells what to give, as in «with `--drive`»; a file may have two hyphens in its name, too.
fn names_a_flag(reason: &str) -> bool {
    let is_flag = |word: &str| {
        let word = word.trim_start_matches(['`', '(']);
        word.strip_prefix("--")
            .is_some_and(|name| name.starts_with(|c: char| c.is_ascii_lowercase()))
    };
    reason.split_whitespace().any(is_flag)
}

fn code_of(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| Some(128 + status.signal()?));
    code.and_then(|code| u8::try_from(code).ok())
        .unwrap_or(crate::exit::FAILED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_hyphens_in_a_path_are_no_flag() {
        for reason in [
            "supply it with `--drive`",
            "is not trusted: name its certificate with --tls-ca: unknown issuer",
        ] {
            assert!(names_a_flag(reason), "{reason}");
        }
        for reason in [
            "cannot read /srv/a--b: no such file",
            "cannot read \"/srv/web -- old\"",
            "drive web--v1",
        ] {
            assert!(!names_a_flag(reason), "{reason}");
        }
    }
}
