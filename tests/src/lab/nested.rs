//! The nested host, from Rust: `resources/lab/run-in-nested-host` with its arguments in order.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use super::script;

/// A Debian under QEMU's software CPU, with a KVM that runs Linux, for the time of one script.
#[derive(Clone, Debug)]
pub struct NestedHost {
    kernel: String,
    memory_mib: u32,
    deadline: Duration,
    take: Option<PathBuf>,
}

impl NestedHost {
    /// A host that will run the Debian kernel `kernel`: `6.1-cloud` or `6.12-cloud`.
    #[must_use]
    pub fn of(kernel: &str) -> Self {
        Self {
            kernel: kernel.to_owned(),
            memory_mib: 4096,
            deadline: Duration::from_secs(900),
            take: None,
        }
    }

    /// With this much memory instead of 4096 MiB.
    #[must_use]
    pub fn memory_mib(self, memory_mib: u32) -> Self {
        Self { memory_mib, ..self }
    }

    /// Killed after this time instead of 15 minutes.
    #[must_use]
    pub fn deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// What the script leaves in `/lab/scratch/out` goes into `folder`.
    #[must_use]
    pub fn take(self, folder: &Path) -> Self {
        Self {
            take: Some(folder.to_owned()),
            ..self
        }
    }

    /// Runs `script` beside `files` in `/lab/in`, its output going to this process's; returns how it ended. Exit code
    /// 124 says that the deadline passed, 125 that the host died.
    ///
    /// # Panics
    /// When the lab's own script cannot be started.
    pub fn run(&self, script_path: &Path, files: &[PathBuf]) -> ExitStatus {
        let runner = script("run-in-nested-host");
        let mut command = Command::new(&runner);
        command.args(["--kernel", &self.kernel]);
        command.args(["--memory", &self.memory_mib.to_string()]);
        command.args(["--deadline", &self.deadline.as_secs().to_string()]);
        if let Some(folder) = &self.take {
            command.arg("--take").arg(folder);
        }
        let status = command.arg(script_path).args(files).status();
        status.unwrap_or_else(|error| panic!("cannot run {}: {error}", runner.display()))
    }
}
