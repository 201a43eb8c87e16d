//! A `runnel-agent` process under test, in folders of its own.

use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::bare::wait_until;
use crate::program;

/// Where agents keep what outlives them: each new one of a test gets the same.
#[derive(Debug)]
pub struct AgentFolders {
    /// Of the socket and of drives' pages.
    folder: TempDir,
    /// Of memory's pages, on tmpfs.
    shared: TempDir,
}

impl AgentFolders {
    /// Empty ones.
    ///
    /// # Panics
    /// When there is no room.
    #[must_use]
    pub fn new() -> Self {
        Self {
            folder: tempfile::tempdir().expect("a temporary folder"),
            shared: TempDir::new_in("/dev/shm").expect("a temporary folder on tmpfs"),
        }
    }

    /// The agent's socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("agent.sock")
    }

    /// Where pages of memory lie.
    #[must_use]
    pub fn memory_pages(&self) -> PathBuf {
        self.shared.path().join("pages")
    }

    /// Removes all pages, between two agents: the next one begins with none.
    ///
    /// # Panics
    /// When they cannot be removed.
    pub fn forget(&self) {
        for pages in [self.memory_pages(), self.folder.path().join("drives")] {
            std::fs::remove_dir_all(pages).expect("pages can be removed");
        }
    }

    /// An agent to be started with these folders and `arguments`.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        self.command_at(&self.socket(), arguments)
    }

    fn command_at(&self, socket: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(program("runnel-agent"));
        command.arg("--socket").arg(socket);
        command.arg("--memory-pages").arg(self.memory_pages());
        command
            .arg("--drive-pages")
            .arg(self.folder.path().join("drives"));
        command.args(["--log-level", "warn"]).args(arguments);
        command
    }

    /// Starts an agent, and waits until it listens.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn start(&self, arguments: &[&str]) -> Agent {
        self.start_by(arguments, |mut command| command.spawn())
    }

    /// As [`start`](Self::start), spawned by `spawn`: on another host.
    ///
    /// # Panics
    /// When it does not listen.
    #[must_use]
    pub fn start_by(&self, arguments: &[&str], spawn: impl FnOnce(Command) -> io::Result<Child>) -> Agent {
        let socket = self.socket();
        let mut command = self.command(arguments);
        command.stdin(Stdio::null());
        let agent = spawn(command);
        let mut agent = Agent {
            child: agent.expect("runnel-agent starts"),
        };
        wait_until("the agent listens", || {
            let ended = agent.child.try_wait().expect("a child can be asked after");
            assert!(ended.is_none(), "the agent ended: {ended:?}");
            std::os::unix::net::UnixStream::connect(&socket)
                .is_err_and(|error| error.raw_os_error() == Some(EPROTOTYPE))
        });
        agent
    }

    /// Starts an agent at another socket that must not start; gives what it says.
    ///
    /// # Panics
    /// When it starts.
    #[must_use]
    pub fn refusal(&self) -> String {
        let socket = self.folder.path().join("second.sock");
        let mut child = self
            .command_at(&socket, &[])
            .stderr(Stdio::piped())
            .spawn()
            .expect("runnel-agent starts");
        let mut said = String::new();
        let mut stderr = child.stderr.take().expect("it is piped");
        // Ends when the agent does: one that starts would hang here, and the test with it.
        stderr.read_to_string(&mut said).expect("it says why");
        assert!(!child.wait().expect("a child can be waited for").success());
        said
    }
}

impl Default for AgentFolders {
    fn default() -> Self {
        Self::new()
    }
}

/// The agent's socket keeps packets apart, so a stream is refused like this as soon as somebody listens.
const EPROTOTYPE: i32 = 91;

/// An agent's process; killed when dropped, in the middle of whatever it does.
#[derive(Debug)]
pub struct Agent {
    child: Child,
}

impl Agent {
    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
