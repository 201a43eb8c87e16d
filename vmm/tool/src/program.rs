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

/// The last lines of a log, for an error's message.
pub(crate) fn last_lines(log: &Path, lines: usize) -> String {
    const TAIL_BYTES: u64 = 4 << 10;
    let tail = || -> io::Result<String> {
        use std::io::{Read, Seek, SeekFrom};
        let mut file = File::open(log)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(TAIL_BYTES)))?;
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
    use super::*;

    #[test]
    fn the_end_of_a_log_is_what_is_shown() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        std::fs::write(&log, format!("{}\nlast but one\n\nlast\n", "x".repeat(10_000))).unwrap();
        assert_eq!(last_lines(&log, 2), "last but one\nlast");
        assert_eq!(last_lines(&folder.path().join("none"), 2), "");
    }

    #[test]
    fn a_program_in_the_way_that_is_none_is_refused() {
        assert!(!is_program(Path::new("/")));
        assert!(!is_program(Path::new("/etc/passwd")));
        assert!(is_program(Path::new("/bin/sh")));
    }
}
