//! A user of the operator's tool, with folders of his own.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use runnel_snapshot::digest::BlobDigest;
use serde_json::Value;
use tempfile::TempDir;

use crate::{bare_guest, program};

/// What runs for him is ended when he goes.
#[derive(Debug)]
pub struct User {
    folder: TempDir,
}

impl User {
    /// One who has nothing yet.
    ///
    /// # Panics
    /// When there is no room for a folder.
    #[must_use]
    pub fn new() -> Self {
        Self {
            folder: tempfile::tempdir().expect("a temporary folder"),
        }
    }

    /// What is his: state, images and caches are in it.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The folder of one of his machines.
    #[must_use]
    pub fn machine_folder(&self, name: &str) -> PathBuf {
        self.folder().join("runnel/machines").join(name)
    }

    /// The tool with `arguments`; what it prints is piped.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program("runnel"));
        command
            .args(arguments)
            .env("XDG_RUNTIME_DIR", self.folder())
            .env("RUNNEL_IMAGES", self.folder().join("images"))
            .env("XDG_CACHE_HOME", self.folder().join("cache"))
            .env("RUNNEL_VMM", program("runnel-vmm"))
            .env("RUNNEL_AGENT", program("runnel-agent"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// `run`, of a bare guest that obeys `words`.
    ///
    /// # Panics
    /// When the guest's path is no text.
    #[must_use]
    pub fn boot(&self, words: &str, more: &[&str]) -> Command {
        let kernel = bare_guest().to_str().expect("its path is text");
        let arguments = ["run", "--kernel", kernel, "--memory", "64M", "--cmdline", words];
        self.command(&[&arguments, more].concat())
    }

    /// Runs the tool to its end, whatever that is.
    ///
    /// # Panics
    /// When there is no such program.
    #[must_use]
    pub fn run(&self, arguments: &[&str]) -> Output {
        let output = self.command(arguments).output();
        output.expect("the tool can be started")
    }

    /// Runs the tool, which must succeed; what it prints.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn output(&self, arguments: &[&str]) -> String {
        succeeded(self.run(arguments))
    }

    /// Types `words` on a machine's console; what it has said until it ended.
    ///
    /// # Panics
    /// When there is no such machine.
    #[must_use]
    pub fn converse(&self, machine: &str, words: &str) -> String {
        let mut command = self.command(&["console", machine]);
        let mut console = command
            .stdin(Stdio::piped())
            .spawn()
            .expect("the tool can be started");
        let mut keyboard = console.stdin.take().expect("it is piped");
        keyboard
            .write_all(words.as_bytes())
            .expect("the console takes words");
        drop(keyboard);
        succeeded(console.wait_with_output().expect("a child can be waited for"))
    }

    /// His machines, as `ps --json` lists them.
    ///
    /// # Panics
    /// When that is no list.
    #[must_use]
    pub fn machines(&self) -> Vec<Value> {
        serde_json::from_str(&self.output(&["ps", "--json"])).expect("it is a list")
    }

    /// The state of one of his machines.
    ///
    /// # Panics
    /// When there is none of that name.
    #[must_use]
    pub fn state_of(&self, name: &str) -> Value {
        let mut machines = self.machines().into_iter();
        let machine = machines.find(|machine| machine["name"] == name);
        machine.expect("there is such a machine")["state"].clone()
    }
}

impl Default for User {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for User {
    fn drop(&mut self) {
        // What is left is what a test has failed for.
        for arguments in [["kill", "--all"], ["agent", "--stop"]] {
            let _ = self.command(&arguments).output();
        }
        // What an agent that was killed leaves in shared memory.
        let socket = self.folder().join("runnel/agent/agent.sock");
        let own = BlobDigest::of(socket.as_os_str().as_encoded_bytes()).hex();
        if let Ok(folder) = fs::metadata(self.folder()) {
            let _ = fs::remove_dir_all(format!("/dev/shm/runnel-{}-{}", folder.uid(), &own[..8]));
        }
    }
}

/// What a command has printed, which must have succeeded.
///
/// # Panics
/// When it has not.
#[allow(clippy::must_use_candidate, reason = "that it has succeeded is often all")]
#[track_caller]
pub fn succeeded(output: Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}
