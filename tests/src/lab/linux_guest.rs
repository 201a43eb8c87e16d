//! An unmodified Debian kernel under `runnel-vmm`, which tells on its serial console what it finds
//! (`resources/lab/guest/initramfs-init` lists what it can be asked).

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{evidence, program, thing};
use crate::monitor::Monitor;

/// How long a line may take: a software CPU that shares its cores boots a kernel in half a minute.
const LINE_DEADLINE: Duration = Duration::from_secs(120);

/// A guest to be started: one vCPU, 256 MiB, no devices but the serial port.
#[derive(Clone, Debug)]
pub struct LinuxGuest {
    kernel: String,
    image: &'static str,
    steps: String,
    argument: &'static str,
    vcpus: u8,
    memory_mib: u32,
    drives: Vec<Value>,
    interfaces: Vec<Value>,
    entropy: bool,
    tracks_dirty_pages: bool,
    guest_channel: bool,
}

impl LinuxGuest {
    /// A guest of the Debian kernel `kernel` (`6.1-cloud`), which takes `steps` (`kernel,disks,off`).
    #[must_use]
    pub fn new(kernel: &str, steps: &str) -> Self {
        Self {
            kernel: kernel.to_owned(),
            image: "vmlinuz",
            steps: steps.to_owned(),
            argument: "",
            vcpus: 1,
            memory_mib: 256,
            drives: Vec::new(),
            interfaces: Vec::new(),
            entropy: false,
            tracks_dirty_pages: false,
            guest_channel: false,
        }
    }

    /// Boots the kernel as an ELF, not as a bzImage.
    #[must_use]
    pub fn elf(self) -> Self {
        Self {
            image: "vmlinux",
            ..self
        }
    }

    /// With something more on the kernel's command line.
    #[must_use]
    pub fn argument(self, argument: &'static str) -> Self {
        Self { argument, ..self }
    }

    /// With so many vCPUs.
    #[must_use]
    pub fn vcpus(self, vcpus: u8) -> Self {
        Self { vcpus, ..self }
    }

    /// With so much RAM.
    #[must_use]
    pub fn memory_mib(self, memory_mib: u32) -> Self {
        Self { memory_mib, ..self }
    }

    /// With another drive; the first one is `vda`.
    #[must_use]
    pub fn drive(mut self, id: &str, path: &Path, is_read_only: bool) -> Self {
        self.drives.push(json!({
            "drive_id": id, "path_on_host": path, "is_root_device": false, "is_read_only": is_read_only,
        }));
        self
    }

    /// With a network interface on the host's `tap`.
    #[must_use]
    pub fn interface(mut self, tap: &str, mac: &str) -> Self {
        self.interfaces
            .push(json!({ "iface_id": tap, "host_dev_name": tap, "guest_mac": mac }));
        self
    }

    /// With an entropy device.
    #[must_use]
    pub fn entropy(self) -> Self {
        Self {
            entropy: true,
            ..self
        }
    }

    /// With KVM's log of the pages that the guest writes.
    #[must_use]
    pub fn track_dirty_pages(self) -> Self {
        Self {
            tracks_dirty_pages: true,
            ..self
        }
    }

    /// With a channel for an agent: its second serial port.
    #[must_use]
    pub fn guest_channel(self) -> Self {
        Self {
            guest_channel: true,
            ..self
        }
    }

    /// The whole machine as Firecracker's configuration file describes it.
    #[must_use]
    pub fn config(&self) -> Value {
        let mut config = json!({
            "boot-source": {
                "kernel_image_path": thing(&format!("kernel/{}", self.kernel)).join(self.image),
                "initrd_path": thing(&format!("guest/{}", self.kernel)),
                "boot_args": format!("console=ttyS0 quiet panic=-1 {} lab={}", self.argument, self.steps),
            },
            "machine-config": {
                "vcpu_count": self.vcpus, "mem_size_mib": self.memory_mib, "track_dirty_pages": self.tracks_dirty_pages,
            },
            "drives": self.drives,
            "network-interfaces": self.interfaces,
        });
        if self.entropy {
            config["entropy"] = json!({});
        }
        if self.guest_channel {
            config["guest-channel"] = json!({});
        }
        config
    }

    /// Starts it with an API, in `folder`; its console is the monitor's standard input and output.
    ///
    /// # Panics
    /// When the monitor cannot be started.
    #[must_use]
    pub fn start_with_api(&self, folder: &Path) -> Monitor {
        let config = folder.join("config.json");
        std::fs::write(&config, self.config().to_string()).expect("the configuration is written");
        let config = config.to_str().expect("its path is text");
        Monitor::start_at(&folder.join("boot.sock"), &["--config-file", config])
    }

    /// Starts it, without an API; its console is the monitor's standard input and output.
    ///
    /// # Panics
    /// When the monitor cannot be started.
    #[must_use]
    pub fn start(&self) -> RunningGuest {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let config: PathBuf = folder.path().join("config.json");
        std::fs::write(&config, self.config().to_string()).expect("the configuration is written");
        let mut monitor = Command::new(program("runnel-vmm"))
            .args(["--no-api", "--config-file"])
            .arg(&config)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("runnel-vmm starts");
        let input = monitor.stdin.take().expect("standard input is a pipe");
        let output = BufReader::new(monitor.stdout.take().expect("standard output is a pipe"));
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            // A console's bytes need not be text; the end of the pipe ends the thread.
            for line in output.split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        RunningGuest {
            monitor,
            input,
            lines,
            seen: Vec::new(),
            _folder: folder,
        }
    }
}

/// A guest that runs, until this is dropped.
#[derive(Debug)]
pub struct RunningGuest {
    monitor: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    seen: Vec<String>,
    _folder: tempfile::TempDir,
}

impl RunningGuest {
    /// Waits for the next line `key=value` and returns the value.
    ///
    /// # Panics
    /// With the end of the console, when the line does not come.
    pub fn expect(&mut self, key: &str) -> String {
        let until = Instant::now() + LINE_DEADLINE;
        loop {
            let line = match self
                .lines
                .recv_timeout(until.saturating_duration_since(Instant::now()))
            {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("{key}= did not come in time; {}", self.transcript())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("{key}= did not come before the end; {}", self.transcript())
                }
            };
            self.seen.push(line);
            let value = self
                .seen
                .last()
                .and_then(|line| line.strip_prefix(key)?.strip_prefix('='));
            if let Some(value) = value {
                return value.to_owned();
            }
        }
    }

    /// Holds the next value of each key against the one expected.
    ///
    /// # Panics
    /// When one differs or does not come.
    pub fn expect_all(&mut self, expected: &[(&str, &str)]) {
        for (key, value) in expected {
            let found = self.expect(key);
            assert_eq!(found, *value, "{key}; {}", self.transcript());
        }
    }

    /// Types a line on the guest's console.
    ///
    /// # Panics
    /// When the monitor has closed its standard input.
    pub fn type_line(&mut self, line: &str) {
        writeln!(self.input, "{line}").expect("the monitor reads its standard input");
    }

    /// The process of the monitor.
    #[must_use]
    pub fn monitor_pid(&self) -> u32 {
        self.monitor.id()
    }

    /// Reads the console to its end and returns how the monitor ended.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn end(&mut self) -> ExitStatus {
        let until = Instant::now() + LINE_DEADLINE;
        loop {
            match self
                .lines
                .recv_timeout(until.saturating_duration_since(Instant::now()))
            {
                Ok(line) => self.seen.push(line),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("the machine does not end; {}", self.transcript()),
            }
        }
        // Its output is closed, so it is about to end.
        self.monitor.wait().expect("a child can be waited for")
    }

    fn transcript(&self) -> String {
        let start = self.seen.len().saturating_sub(40);
        let console = self.seen[start..].join("\n");
        let monitor = evidence::of_monitor(self.monitor.id());
        format!("the end of the console:\n{console}\n{monitor}")
    }
}

impl Drop for RunningGuest {
    fn drop(&mut self) {
        let _ = self.monitor.kill(); // it may have ended
        let _ = self.monitor.wait();
    }
}
