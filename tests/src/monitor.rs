//! A `runnel-vmm` process under test: started in a folder of its own, talked to over its API, gone when dropped.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::{program, signal};

/// Far longer than anything waited for takes, with Linux in an emulated host on a busy machine too: a test that waits so
/// long has failed.
pub const DEADLINE: Duration = Duration::from_secs(180);

/// A monitor's process. Its log goes to standard error, and is shown if a test fails.
#[derive(Debug)]
pub struct Monitor {
    child: Child,
    log: Lines,
    console: Lines,
    socket: PathBuf,
    _folder: Option<TempDir>,
}

impl Monitor {
    /// One that serves its API and waits to be configured.
    ///
    /// # Panics
    /// When it does not come so far.
    #[must_use]
    pub fn start() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let socket = folder.path().join("api.sock");
        let mut monitor = Self::start_at(&socket, &[]);
        monitor._folder = Some(folder);
        monitor.log.wait_for("Listening on API socket");
        monitor
    }

    /// One with its socket at `socket` and with `arguments`; it may fail.
    ///
    /// # Panics
    /// When there is no such program.
    #[must_use]
    pub fn start_at(socket: &Path, arguments: &[&str]) -> Self {
        Self::run(Command::new(program("runnel-vmm")), socket, arguments)
    }

    /// As [`start_at`](Self::start_at), by a program that does something first and then becomes the command line that
    /// it is given.
    ///
    /// # Panics
    /// When there is no such program.
    #[must_use]
    pub fn start_by(mut first: Command, socket: &Path) -> Self {
        first.arg(program("runnel-vmm"));
        Self::run(first, socket, &[])
    }

    fn run(command: Command, socket: &Path, arguments: &[&str]) -> Self {
        Self::run_on(command, socket, arguments, |mut command| command.spawn())
    }

    /// As [`start_at`](Self::start_at), spawned by `spawn`: on another host, with another environment.
    ///
    /// # Panics
    /// When there is no such program.
    #[must_use]
    pub fn spawn_at(socket: &Path, spawn: impl FnOnce(Command) -> io::Result<Child>) -> Self {
        Self::run_on(Command::new(program("runnel-vmm")), socket, &[], spawn)
    }

    fn run_on(
        mut command: Command,
        socket: &Path,
        arguments: &[&str],
        spawn: impl FnOnce(Command) -> io::Result<Child>,
    ) -> Self {
        command
            .arg("--api-sock")
            .arg(socket)
            .args(["--log-path", "/dev/stderr", "--level", "Debug", "--show-level"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = spawn(command).expect("runnel-vmm starts");
        let log = Lines::of(child.stderr.take().expect("it is piped"));
        let console = Lines::of(child.stdout.take().expect("it is piped"));
        Self {
            child,
            log,
            console,
            socket: socket.to_owned(),
            _folder: None,
        }
    }

    /// Closes its standard input.
    pub fn hang_up(&mut self) {
        self.child.stdin.take();
    }

    /// Waits for a line of the log that contains `text`.
    ///
    /// # Panics
    /// When none comes.
    pub fn wait_for_log(&mut self, text: &str) -> String {
        self.log.wait_for(text)
    }

    /// Has `act` called as soon as the log says `text`, on the thread that reads the log: nothing is closer to it.
    pub fn when_logged(&self, text: &str, act: impl FnOnce() + Send + 'static) {
        *self.log.lock_trigger() = Some((text.to_owned(), Box::new(act)));
    }

    /// Waits for a line of the guest's console that contains `text`.
    ///
    /// # Panics
    /// When none comes.
    pub fn wait_for_console(&mut self, text: &str) -> String {
        self.console.wait_for(text)
    }

    /// Waits until the guest has said nothing for as long as `silence`; returns what it has said since it was last
    /// listened to.
    ///
    /// # Panics
    /// When it never stops.
    pub fn wait_for_silence(&mut self, silence: Duration) -> String {
        self.console.wait_for_silence(silence)
    }

    /// Types a line, and waits for a line that begins as `answer` does, up to its `=`: it must be `answer`.
    ///
    /// # Panics
    /// When it is another, or none comes.
    pub fn converse(&mut self, words: &str, answer: &str) {
        let (key, _) = answer.split_once('=').expect("an answer is key=value");
        self.type_line(words);
        assert_eq!(self.wait_for_console(&format!("{key}=")), answer);
    }

    /// Types `text` on the guest's console.
    ///
    /// # Panics
    /// When the monitor no longer reads.
    pub fn type_line(&mut self, text: &str) {
        let stdin = self.child.stdin.as_mut().expect("it is piped");
        stdin
            .write_all(format!("{text}\n").as_bytes())
            .expect("the monitor reads its standard input");
    }

    /// Asks the API; gives status and body.
    ///
    /// # Panics
    /// When no answer comes.
    #[must_use]
    pub fn ask(&self, verb: &str, path: &str, body: &Value) -> (u16, Value) {
        ask(&self.socket, verb, path, body)
    }

    /// Asks the API for something that must succeed.
    ///
    /// # Panics
    /// When it does not.
    pub fn demand(&self, verb: &str, path: &str, body: &Value) -> Value {
        let (status, answer) = self.ask(verb, path, body);
        assert!(
            matches!(status, 200 | 204),
            "{verb} {path} {body}: {status} {answer}"
        );
        answer
    }

    /// The lines that the guest has said so far, as far as they were waited for, with `text` in them.
    #[must_use]
    pub fn console_lines_with(&self, text: &str) -> Vec<String> {
        let lines = self.console.seen.iter().filter(|line| line.contains(text));
        lines.cloned().collect()
    }

    /// Where its API is.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by name: `TERM`, `KILL`.
    ///
    /// # Panics
    /// When there is no such process.
    pub fn signal(&self, name: &str) {
        signal(self.pid(), name);
    }

    /// Waits for its end, and gives its status and the log.
    ///
    /// # Panics
    /// When it does not end.
    pub fn wait(&mut self) -> (ExitStatus, String) {
        let log = self.log.rest();
        (self.child.wait().expect("a child can be waited for"), log)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // It may end in between.
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("--- the monitor's log\n{}", self.log.seen.join("\n"));
            eprintln!("--- the guest's console\n{}", self.console.seen.join("\n"));
        }
    }
}

/// What is to be done, once, when a line contains a text.
type Trigger = Option<(String, Box<dyn FnOnce() + Send>)>;

/// Lines that a process writes, read by a thread of their own.
struct Lines {
    lines: Receiver<String>,
    seen: Vec<String>,
    trigger: Arc<Mutex<Trigger>>,
}

impl fmt::Debug for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lines")
            .field("seen", &self.seen)
            .finish_non_exhaustive()
    }
}

impl Lines {
    fn of(stream: impl Read + Send + 'static) -> Self {
        let (sender, lines) = channel();
        let trigger = Arc::new(Mutex::new(None));
        let watched = Arc::clone(&trigger);
        thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                pull(&watched, &line);
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Self {
            lines,
            seen: Vec::new(),
            trigger,
        }
    }

    fn lock_trigger(&self) -> MutexGuard<'_, Trigger> {
        self.trigger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for(&mut self, text: &str) -> String {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match self
                .lines
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(why) => panic!("{text:?} did not come ({why}) after:\n{}", self.seen.join("\n")),
            }
        }
    }

    fn wait_for_silence(&mut self, silence: Duration) -> String {
        let deadline = Instant::now() + DEADLINE;
        let before = self.seen.len();
        while let Ok(line) = self.lines.recv_timeout(silence) {
            self.seen.push(line);
            assert!(Instant::now() < deadline, "it goes on");
        }
        self.seen[before..].join("\n")
    }

    /// All lines until the end.
    fn rest(&mut self) -> String {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match self
                .lines
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(line) => self.seen.push(line),
                Err(RecvTimeoutError::Disconnected) => return self.seen.join("\n"),
                Err(RecvTimeoutError::Timeout) => panic!("it does not end after:\n{}", self.seen.join("\n")),
            }
        }
    }
}

fn pull(trigger: &Mutex<Trigger>, line: &str) {
    let mut trigger = trigger.lock().unwrap_or_else(PoisonError::into_inner);
    if trigger.as_ref().is_some_and(|(text, _)| line.contains(text))
        && let Some((_, act)) = trigger.take()
    {
        act();
    }
}

/// Asks the API at `socket`, over a connection of its own; gives status and body.
///
/// # Panics
/// When no answer comes.
#[must_use]
pub fn ask(socket: &Path, verb: &str, path: &str, body: &Value) -> (u16, Value) {
    Question::put(socket, verb, path, body).answer()
}

/// What the API at a socket was asked, and has perhaps not answered yet.
#[derive(Debug)]
pub struct Question(UnixStream);

impl Question {
    /// Asks, over a connection of its own, and does not wait.
    ///
    /// # Panics
    /// When nobody listens.
    #[must_use]
    pub fn put(socket: &Path, verb: &str, path: &str, body: &Value) -> Self {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let mut stream = UnixStream::connect(socket).expect("the API's socket");
        stream
            .set_read_timeout(Some(DEADLINE))
            .expect("a socket can time out");
        let length = body.len();
        write!(
            stream,
            "{verb} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .expect("the API reads");
        Self(stream)
    }

    /// Waits for the answer; gives status and body.
    ///
    /// # Panics
    /// When none comes.
    #[must_use]
    pub fn answer(mut self) -> (u16, Value) {
        let mut answer = String::new();
        self.0.read_to_string(&mut answer).expect("the API answers");
        let (head, body) = answer.split_once("\r\n\r\n").expect("an answer has a head");
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok())
            .expect("an answer has a status");
        let body = if body.is_empty() {
            Value::Null
        } else {
            serde_json::from_str(body).expect("answers are JSON")
        };
        (status, body)
    }
}
