//! Finds Runnel's other programs, and starts them so that they outlive the tool.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::signals::unblock_all;

/// Why a program cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProgramError {
    /// It is nowhere.
    #[error("{name} is neither beside this program nor in PATH: install it there, or name it in {variable}")]
    Missing {
        /// Which program.
        name: &'static str,
        /// What can name it.
        variable: &'static str,
    },
    /// What the variable names is no program.
    #[error("{variable} names {path}, which is no program")]
    NotAProgram {
        /// The variable.
        variable: &'static str,
        /// What it names.
        path: PathBuf,
    },
}

/// The monitor: `RUNNEL_VMM`, else beside this program, else in PATH.
pub(crate) fn monitor() -> Result<PathBuf, ProgramError> {
    find("runnel-vmm", "RUNNEL_VMM")
}

fn find(name: &'static str, variable: &'static str) -> Result<PathBuf, ProgramError> {
    if let Some(path) = std::env::var_os(variable).map(PathBuf::from) {
        return match is_program(&path) {
            true => Ok(path),
            false => Err(ProgramError::NotAProgram { variable, path }),
        };
    }
    let own = std::env::current_exe().ok();
    let beside = own.as_deref().and_then(Path::parent).map(Path::to_owned);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders = beside.into_iter().chain(std::env::split_paths(&path));
    let found = folders.find_map(|folder| Some(folder.join(name)).filter(|path| is_program(path)));
    found.ok_or(ProgramError::Missing { name, variable })
}

fn is_program(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Makes of `command` a program in a session of its own: no terminal's hang-up or Ctrl-C reaches it. What it prints
/// goes to `log`.
///
/// # Errors
/// When the log cannot be written.
pub(crate) fn detach(command: &mut Command, log: &Path) -> io::Result<()> {
    let output: File = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(log)?;
    command
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output);
    let begin = || {
        rustix::process::setsid()?;
        unblock_all()
    };
    // SAFETY: between fork and exec the closure makes two system calls, and neither allocates nor takes a lock.
    unsafe { command.pre_exec(begin) };
    Ok(())
}

/// How long a log is before a program is started that adds to it.
pub(crate) fn log_bytes(log: &Path) -> u64 {
    log.metadata().map_or(0, |log| log.len())
}

/// What a program that ended at once has added to its log, its last lines, for an error's message; or why that is
/// nothing. `before` is how long the log was when the program was started, and `kept` where it is found afterwards.
pub(crate) fn last_words(log: &Path, before: u64, lines: usize, kept: &Path) -> String {
    /// Less than this a file cannot grow by.
    const ROOM_BYTES_MIN: u64 = 4 << 10;
    let said = last_lines(log, before, lines);
    if !said.is_empty() {
        return said;
    }
    let room = log.parent().and_then(|folder| rustix::fs::statvfs(folder).ok());
    match room {
        Some(room) if room.f_bavail.saturating_mul(room.f_frsize) < ROOM_BYTES_MIN => format!(
            "it could say nothing in its log, {}: that file system is full, so make room there",
            kept.display()
        ),
        _ => format!("it said nothing in its log, {}", kept.display()),
    }
}

fn last_lines(log: &Path, before: u64, lines: usize) -> String {
    const TAIL_BYTES: u64 = 4 << 10;
    let tail = || -> io::Result<String> {
        use std::io::{Read, Seek, SeekFrom};
        let mut file = File::open(log)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(TAIL_BYTES).max(before)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = tail().unwrap_or_default();
    let all: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_end_of_a_log_is_what_is_shown() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        std::fs::write(&log, format!("{}\nlast but one\n\nlast\n", "x".repeat(10_000))).unwrap();
        assert_eq!(last_words(&log, 0, 2, &log), "last but one\nlast");
        let before = log_bytes(&log);
        assert!(last_words(&log, before, 2, &log).starts_with("it said nothing in its log"));
        fs::write(&log, format!("{}new\n", fs::read_to_string(&log).unwrap())).unwrap();
        assert_eq!(last_words(&log, before, 2, &log), "new");
        assert!(last_words(&folder.path().join("none"), 0, 2, &log).starts_with("it said nothing"));
    }

    #[test]
    fn a_program_in_the_way_that_is_none_is_refused() {
        assert!(!is_program(Path::new("/")));
        assert!(!is_program(Path::new("/etc/passwd")));
        assert!(is_program(Path::new("/bin/sh")));
    }
}
