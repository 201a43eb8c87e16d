//! A user of the operator's tool, with folders of his own.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

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

    /// A server of his images, told `more`.
    ///
    /// # Panics
    /// When it does not serve.
    #[must_use]
    pub fn serve(&self, more: &[&str]) -> Server {
        let mut command = self.command(&[&["serve", "--listen", "127.0.0.1:0"], more].concat());
        let mut process = command.spawn().expect("the tool can be started");
        let line = read_to(&mut process, "serving at");
        let mut words = line.split([' ', ';']);
        let url = words.find(|word| word.starts_with("http"));
        let url = url.expect("it says where").to_owned();
        Server { process, url }
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

/// `runnel serve`, until it goes.
#[derive(Debug)]
pub struct Server {
    process: Child,
    url: String,
}

impl Server {
    /// Where it serves.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Reads what a process prints, to the line that contains `words`.
///
/// # Panics
/// When there is none.
#[allow(clippy::must_use_candidate, reason = "that it came is often all")]
#[track_caller]
pub fn read_to(child: &mut Child, words: &str) -> String {
    let mut lines = BufReader::new(child.stdout.as_mut().expect("it is piped"));
    let mut seen = String::new();
    while lines.read_line(&mut seen).expect("it prints text") > 0 {
        if seen.lines().next_back().is_some_and(|line| line.contains(words)) {
            return seen;
        }
    }
    panic!("no {words:?} in {seen:?}");
}

/// What a command that must fail says, in one line. It ends with 2 where what was typed names nothing at all.
///
/// # Panics
/// When it does not fail, or says more.
#[must_use]
#[track_caller]
pub fn refusal(output: &Output) -> String {
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        matches!(output.status.code(), Some(1 | 2)),
        "{}: {told}",
        output.status
    );
    assert_eq!(told.lines().count(), 1, "{told}");
    told
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
