//! A monitor's process as its users see it: an API on a socket, and a guest's console, each byte with its time.
//!
//! Runnel's and Firecracker's take the same flags and requests, so both are measured by the same code.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use runnel_tests::lab::hosts::{Host, spawn_bound};
use serde_json::{Value, json};

/// Far longer than anything here takes.
pub(crate) const DEADLINE: Duration = Duration::from_secs(300);
/// Pauses between looks at something that cannot be waited for.
const LOOK: Duration = Duration::from_micros(200);

/// Starts `command` on `host`, or here; killed when dropped.
///
/// # Errors
/// When it cannot be started.
pub(crate) fn start(command: Command, host: Option<&Host>) -> io::Result<Running> {
    let child = match host {
        Some(host) => host.spawn(command)?,
        None => spawn_bound(command)?,
    };
    Ok(Running(child))
}

/// A process that does not outlive its owner.
#[derive(Debug)]
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A monitor, ready to be asked.
#[derive(Debug)]
pub(crate) struct Vmm {
    process: Running,
    socket: PathBuf,
    console: Console,
}

impl Vmm {
    /// Starts `program` with its socket in `folder`, and waits until its API answers. Gives it and how long that took.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(crate) fn start(program: &Path, folder: &Path, host: Option<&Host>) -> io::Result<(Self, Duration)> {
        let socket = folder.join("api.sock");
        if socket.exists() {
            fs::remove_file(&socket)?; // of a monitor that was killed
        }
        let log = folder.join("vmm.log");
        fs::write(&log, "")?;
        let mut command = Command::new(program);
        command.arg("--api-sock").arg(&socket);
        command.arg("--log-path").arg(&log).args(["--level", "Error"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let started = Instant::now();
        let mut process = start(command, host)?;
        let stdout = process.0.stdout.take();
        let console = Console::of(stdout.ok_or_else(|| io::Error::other("no standard output"))?);
        wait_for_socket(&socket)?;
        let vmm = Self {
            process,
            socket,
            console,
        };
        vmm.demand("GET", "/", &Value::Null)?;
        Ok((vmm, started.elapsed()))
    }

    /// Asks for something that must succeed.
    ///
    /// # Errors
    /// When it does not.
    pub(crate) fn demand(&self, verb: &str, path: &str, body: &Value) -> io::Result<Value> {
        let (status, answer) = request(&self.socket, verb, path, body)?;
        if matches!(status, 200 | 204) {
            return Ok(answer);
        }
        Err(io::Error::other(format!(
            "{verb} {path} {body}: {status} {answer}"
        )))
    }

    /// Boots the bare guest.
    ///
    /// # Errors
    /// When a request fails.
    pub(crate) fn configure(&self, words: &str, initrd: Option<&Path>) -> io::Result<()> {
        self.configure_with(super::content::RAM_MIB, words, initrd)
    }

    /// Boots the bare guest with so much RAM.
    ///
    /// # Errors
    /// When a request fails.
    pub(crate) fn configure_with(&self, ram_mib: u64, words: &str, initrd: Option<&Path>) -> io::Result<()> {
        let machine = json!({"vcpu_count": 1, "mem_size_mib": ram_mib});
        self.demand("PUT", "/machine-config", &machine)?;
        let mut boot = json!({"kernel_image_path": runnel_tests::bare_guest(), "boot_args": words});
        if let Some(initrd) = initrd {
            boot["initrd_path"] = json!(initrd);
        }
        self.demand("PUT", "/boot-source", &boot).map(drop)
    }

    /// Types a line on the guest's console.
    ///
    /// # Errors
    /// When the monitor does not read.
    pub(crate) fn type_line(&mut self, text: &str) -> io::Result<()> {
        let stdin = self.process.0.stdin.as_mut();
        let stdin = stdin.ok_or_else(|| io::Error::other("no standard input"))?;
        writeln!(stdin, "{text}")?;
        stdin.flush()
    }

    /// The guest's console.
    pub(crate) fn console(&mut self) -> &mut Console {
        &mut self.console
    }

    /// KiB of its own that are resident: all mappings but guest RAM, which is the only one as large.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub(crate) fn own_resident(&self) -> io::Result<Resident> {
        let maps = fs::read_to_string(format!("/proc/{}/smaps", self.process.0.id()))?;
        let (mut own, mut is_guest) = (Resident::default(), false);
        for line in maps.lines() {
            let mut words = line.split_whitespace();
            let (key, value) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
            match (key, value.parse::<u64>()) {
                ("Size:", Ok(kib)) => is_guest = kib >= super::content::RAM_MIB << 10,
                ("Rss:", Ok(kib)) if !is_guest => own.all_kib += kib,
                ("Anonymous:", Ok(kib)) if !is_guest => own.anonymous_kib += kib,
                _ => {}
            }
        }
        Ok(own)
    }
}

/// Resident memory of a process but for its guest's.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Resident {
    pub(crate) all_kib: u64,
    /// What is not pages of files: heap, stacks, and what was changed of the program's data.
    pub(crate) anonymous_kib: u64,
}

/// Waits until somebody listens at `socket`.
///
/// # Errors
/// When nobody does in time.
pub(crate) fn wait_for_socket(socket: &Path) -> io::Result<()> {
    wait_until("a socket listens", || Ok(UnixStream::connect(socket).is_ok()))
}

/// Looks until something holds.
///
/// # Errors
/// When it does not in time, or cannot be looked at.
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> io::Result<bool>) -> io::Result<()> {
    let deadline = Instant::now() + DEADLINE;
    while !holds()? {
        if Instant::now() > deadline {
            return Err(io::Error::other(format!("never: {what}")));
        }
        thread::sleep(LOOK);
    }
    Ok(())
}

/// Like [`monitor::ask`](runnel_tests::monitor::ask), but over a connection that the server need not close: Firecracker
/// keeps it open. A body of `null` is none.
fn request(socket: &Path, verb: &str, path: &str, body: &Value) -> io::Result<(u16, Value)> {
    let body = match body {
        Value::Null => String::new(),
        body => body.to_string(),
    };
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    let length = body.len();
    // In one piece: half a request would be read as one.
    let request = format!(
        "{verb} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes())?;
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line)?;
    let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.ok_or_else(|| io::Error::other(format!("no status in {line:?}")))?;
    let mut length = 0;
    while line.trim_end() != "" {
        line.clear();
        stream.read_line(&mut line)?;
        let lower = line.to_ascii_lowercase();
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse().map_err(io::Error::other)?;
        }
    }
    let mut answer = vec![0; length];
    stream.read_exact(&mut answer)?;
    Ok((status, serde_json::from_slice(&answer).unwrap_or(Value::Null)))
}

/// What a guest prints, and when.
#[derive(Debug)]
pub(crate) struct Console {
    pieces: Receiver<(Instant, Vec<u8>)>,
    rest: Vec<u8>,
    /// When the last of it came.
    last: Instant,
}

impl Console {
    fn of(mut stream: impl Read + Send + 'static) -> Self {
        let (sender, pieces) = channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = stream.read(&mut buffer) {
                if sender.send((Instant::now(), buffer[..length].to_vec())).is_err() {
                    return;
                }
            }
        });
        Self {
            pieces,
            rest: Vec::new(),
            last: Instant::now(),
        }
    }

    /// Forgets what was printed so far.
    pub(crate) fn clear(&mut self) {
        while self.pieces.try_recv().is_ok() {}
        self.rest.clear();
    }

    /// When the next byte comes.
    ///
    /// # Errors
    /// When none does.
    pub(crate) fn next_byte(&mut self) -> io::Result<Instant> {
        let (when, piece) = self.pieces.recv_timeout(DEADLINE).map_err(io::Error::other)?;
        self.rest.extend(piece);
        self.last = when;
        Ok(when)
    }

    /// The next whole line that begins with `start`; what it says after that, and when it was there.
    ///
    /// # Errors
    /// When none comes.
    pub(crate) fn line(&mut self, start: &str) -> io::Result<(String, Instant)> {
        loop {
            while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line);
                if let Some(value) = line.trim_end().strip_prefix(start) {
                    return Ok((value.to_owned(), self.last));
                }
            }
            self.next_byte()?;
        }
    }

    /// The longest silence since `since`, up to the next byte from now on.
    ///
    /// # Errors
    /// When none comes.
    pub(crate) fn longest_silence(&mut self, since: Instant) -> io::Result<Duration> {
        let now = Instant::now();
        let (mut last, mut longest) = (since, Duration::ZERO);
        while last <= now {
            let when = self.next_byte()?;
            longest = longest.max(when.saturating_duration_since(last));
            last = when;
        }
        Ok(longest)
    }
}
