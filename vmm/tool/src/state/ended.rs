//! Logs of machines that have ended: `ended/<name>.log`, and `<name>.1.log` and so on of those of that name before.

use std::fs::{self, OpenOptions};
use std::path::PathBuf;
use std::time::SystemTime;

use super::StateFolder;
use super::machine::MachineFolder;
use super::name::MachineName;

/// Logs of ended machines that are kept.
pub(super) const ENDED_LOGS_MAX: usize = 32;

/// Of these, those of one name that are kept beside the last: machines without a name are called alike again and again.
pub(super) const EARLIER_LOGS_MAX: u32 = 7;

impl StateFolder {
    pub(super) fn ended_path(&self) -> PathBuf {
        self.root.join("ended")
    }

    /// Where the log of a machine is once it has ended.
    pub(crate) fn ended_log(&self, name: &MachineName) -> PathBuf {
        self.ended_path().join(format!("{name}.log"))
    }

    /// Moves a log to those of ended machines, behind which earlier ones of the name stand; best effort.
    pub(super) fn keep_log(&self, folder: &MachineFolder) {
        let earlier = |number: u32| match number {
            0 => self.ended_log(&folder.name),
            _ => self.ended_path().join(format!("{}.{number}.log", folder.name)),
        };
        for number in (0..EARLIER_LOGS_MAX).rev() {
            let _ = fs::rename(earlier(number), earlier(number + 1));
        }
        if fs::rename(folder.log(), earlier(0)).is_ok() {
            // The age of a log is that of the end: a machine that was idle wrote its last line long before.
            let kept = OpenOptions::new().append(true).open(earlier(0));
            let _ = kept.and_then(|log| log.set_modified(SystemTime::now()));
            self.limit_ended_logs();
        }
    }

    /// Removes the oldest logs beyond the limit; best effort.
    pub(super) fn limit_ended_logs(&self) {
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
