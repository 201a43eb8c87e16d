//! Processes of others, told apart from later ones with the same number.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::str::FromStr;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// A process by its number and the moment it started, in clock ticks since the host's boot: a number is used again,
/// both together are not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ProcessId {
    pid: i32,
    started_ticks: u64,
}

/// Text that is no process.
#[derive(Debug, thiserror::Error)]
#[error("expected a process's number and its start")]
pub(crate) struct BadProcessId;

impl ProcessId {
    /// The process that has this number now, unless it has ended and only waits for its parent.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let pid = i32::try_from(pid).ok()?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let started_ticks = started(&stat)?;
        Some(Self { pid, started_ticks })
    }

    /// Its number.
    pub(crate) fn pid(self) -> i32 {
        self.pid
    }

    /// Takes hold of the process, if it still lives.
    pub(crate) fn open(self) -> Option<Process> {
        let pidfd = pidfd_open(Pid::from_raw(self.pid)?, PidfdFlags::empty()).ok()?;
        // Looked at with the handle open: the number cannot pass to another process in between.
        (Self::of(self.pid.cast_unsigned()) == Some(self)).then_some(Process { pidfd })
    }

    /// Bytes of memory that it has resident.
    pub(crate) fn resident_bytes(self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
        kib.checked_mul(1024)
    }
}

/// The start in a line of `/proc/PID/stat` (proc(5), field 22), of a process that is no zombie. The second field is a
/// name in parentheses that may hold anything.
fn started(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

impl FromStr for ProcessId {
    type Err = BadProcessId;

    fn from_str(text: &str) -> Result<Self, BadProcessId> {
        let (pid, started) = text.trim().split_once(' ').ok_or(BadProcessId)?;
        let pid = pid.parse().ok().filter(|pid| *pid > 0).ok_or(BadProcessId)?;
        let started_ticks = started.parse().map_err(|_| BadProcessId)?;
        Ok(Self { pid, started_ticks })
    }
}

impl std::fmt::Display for ProcessId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.pid, self.started_ticks)
    }
}

/// A living process, held so that no other can be taken for it.
#[derive(Debug)]
pub(crate) struct Process {
    pidfd: OwnedFd,
}

impl Process {
    /// Sends a signal; a process that has just ended takes none, and that is well.
    ///
    /// # Errors
    /// When the process is another user's.
    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for its end, for so long. Whether it came.
    ///
    /// # Errors
    /// When the kernel cannot wait.
    pub(crate) fn wait(&self, patience: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&left)) {
                Ok(ready) => return Ok(ready > 0),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Process {
    /// Readable once the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_start_is_found_behind_any_name_and_not_of_a_zombie() {
        let line = |name: &str, state: &str| {
            format!("7 ({name}) {state} 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 123456 9 9")
        };
        assert_eq!(started(&line("a", "S")), Some(123_456));
        assert_eq!(started(&line("a) S 1 (b", "R")), Some(123_456));
        assert_eq!(started(&line("a", "Z")), None);
        assert_eq!(started("7"), None);
    }

    #[test]
    fn another_process_of_the_same_number_is_not_taken_for_it() {
        let here = ProcessId::of(std::process::id()).unwrap();
        assert_eq!(here.to_string().parse::<ProcessId>().unwrap(), here);
        assert!(here.open().is_some());
        let other = ProcessId {
            started_ticks: here.started_ticks + 1,
            ..here
        };
        assert!(other.open().is_none());
    }

    #[test]
    fn a_process_is_signalled_and_waited_for() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = ProcessId::of(child.id()).unwrap().open().unwrap();
        assert!(!process.wait(Duration::ZERO).unwrap());
        process.signal(Signal::KILL).unwrap();
        assert!(process.wait(Duration::from_secs(60)).unwrap());
        child.wait().unwrap();
        process.signal(Signal::KILL).unwrap();
    }

    #[test]
    fn text_that_is_no_process_is_refused() {
        for text in ["", "1", "0 5", "-1 5", "1 x", "x 1", "1 2 3"] {
            assert!(text.parse::<ProcessId>().is_err(), "{text}");
        }
    }
}
