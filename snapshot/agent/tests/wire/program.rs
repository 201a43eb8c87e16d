//! The agent as a process of its own.

use std::fs;
use std::process::{Child, Command, Stdio};

use runnel_snapshot::protocol;

use super::host::Home;

/// The agent as a program.
pub(crate) struct Program(Child);

impl Program {
    pub(crate) fn start(home: &Home) -> Self {
        Self::start_by(Command::new(env!("CARGO_BIN_EXE_runnel-agent")), home)
    }

    /// With a file system of that size, its alone, for pages of memory.
    pub(crate) fn start_with_little_room(home: &Home, size: &str) -> Self {
        let memory = home.path().join("memory");
        fs::create_dir(&memory).unwrap();
        let mut mounting = Command::new("unshare");
        mounting.args(["--mount", "sh", "-ec"]);
        mounting.arg(format!(
            "mount -t tmpfs -o size={size},mode=700 none \"$0\"; exec \"$@\""
        ));
        mounting.arg(&memory).arg(env!("CARGO_BIN_EXE_runnel-agent"));
        Self::start_by(mounting, home)
    }

    pub(crate) fn start_by(mut command: Command, home: &Home) -> Self {
        let folder = |name: &str| home.path().join(name);
        let child = command
            .arg("--socket")
            .arg(home.socket())
            .arg("--memory-pages")
            .arg(folder("memory"))
            .arg("--drive-pages")
            .arg(folder("drives"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let program = Self(child);
        while !protocol::is_answering(&home.socket()) {
            std::thread::yield_now();
        }
        program
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}
