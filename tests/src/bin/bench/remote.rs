//! What is measured between two hosts: `runnel serve` on the one, agent and monitor on the other.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use runnel_snapshot::index::SEGMENT_VOLUME_BYTES;
use runnel_tests::lab::hosts::{SOURCE, TwoHosts};
use runnel_tests::lab::program;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use serde_json::{Value, json};

use super::content::RAM_MIB;
use super::local::{IMAGE, resumed, touch, wait_until_resident};
use super::metrics::{Metrics, Samples};
use super::process::{Running, Vmm, start, wait_until};
use super::traces::OPTIMIZED;

const PORT: u16 = 5000;
const RESUMES: usize = 7;
const COLD_RESUMES: usize = 5;
const FILLS: usize = 3;
const TOUCHES: usize = 64;
const TOUCHED_MACHINES: usize = 4;
/// Where faults are measured: the random quarter, which background fill comes to last.
const TOUCHED_START: u64 = (RAM_MIB - RAM_MIB / 4) << 20;
const TOUCHED_BYTES: u64 = (RAM_MIB / 4) << 20;
/// Touches are scattered so that the first of them are in segments of the index that are different each.
const FIRST_TOUCHES: usize = (TOUCHED_BYTES / SEGMENT_VOLUME_BYTES) as usize;
/// How long a counter must stand still before nothing is on its way any more.
const QUIET: Duration = Duration::from_millis(300);

/// Two hosts, images on one of them.
#[derive(Debug)]
pub(crate) struct Remote<'a> {
    hosts: &'a TwoHosts,
    folder: &'a Path,
    _server: Running,
}

/// The names of the figures at one round trip.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Names {
    /// From request to first count, an agent running.
    pub(crate) resume: &'static str,
    /// The same, without one: it is started first.
    pub(crate) cold: &'static str,
}

impl<'a> Remote<'a> {
    /// Serves the image in `images` on the source; the target cannot see it.
    ///
    /// # Errors
    /// When something does not start.
    pub(crate) fn new(hosts: &'a TwoHosts, images: &Path, folder: &'a Path) -> io::Result<Self> {
        hosts.target().hide(images).map_err(io::Error::other)?;
        // The agent's pages lie on a tmpfs; one that goes with the host is left behind by nobody.
        let memory = folder.join("memory");
        fs::create_dir_all(&memory)?;
        hosts.target().hide(&memory).map_err(io::Error::other)?;
        let mut command = Command::new(program("runnel"));
        command
            .arg("serve")
            .args([IMAGE, OPTIMIZED].map(|name| images.join(name)))
            .arg("--listen")
            .arg(format!("{SOURCE}:{PORT}"))
            .args(["--insecure"])
            .stdout(Stdio::null());
        let server = start(command, Some(hosts.source()))?;
        let remote = Self {
            hosts,
            folder,
            _server: server,
        };
        wait_until("the server listens", || {
            Ok(hosts
                .source()
                .run(|| std::net::TcpStream::connect((SOURCE, PORT)).is_ok()))
        })?;
        Ok(remote)
    }

    fn agent_socket(&self) -> PathBuf {
        self.folder.join("agent.sock")
    }

    /// An agent that knows nothing yet.
    ///
    /// # Errors
    /// When it does not start.
    pub(crate) fn start_agent(&self, more: &[&str]) -> io::Result<Running> {
        let memory = self.folder.join("memory/pages");
        let old = memory.clone();
        self.hosts.target().run(move || match fs::remove_dir_all(old) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        })?;
        let mut command = Command::new(program("runnel-agent"));
        command
            .arg("--socket")
            .arg(self.agent_socket())
            .arg("--memory-pages")
            .arg(memory)
            .arg("--drive-pages")
            .arg(self.folder.join("drives"))
            .args(["--log-level", "error"])
            .args(more);
        if self.agent_socket().exists() {
            fs::remove_file(self.agent_socket())?; // of one that was killed
        }
        let agent = start(command, Some(self.hosts.target()))?;
        wait_until("the agent listens", || Ok(listens(&self.agent_socket())))?;
        Ok(agent)
    }

    /// A monitor on the target.
    ///
    /// # Errors
    /// When it does not start.
    pub(crate) fn monitor(&self) -> io::Result<Vmm> {
        Ok(Vmm::start(&program("runnel-vmm"), self.folder, Some(self.hosts.target()))?.0)
    }

    fn load(&self, resume: bool) -> Value {
        self.load_of(IMAGE, resume)
    }

    /// The request that loads an image of the source.
    pub(crate) fn load_of(&self, image: &str, resume: bool) -> Value {
        let image = format!("http://{SOURCE}:{PORT}/{image}");
        json!({"image": image, "agent_path": self.agent_socket(), "resume_vm": resume})
    }

    /// Resumes with an agent running and without.
    ///
    /// # Errors
    /// When something does not work.
    pub(crate) fn resumes(&self, names: Names, metrics: &mut Metrics) -> io::Result<()> {
        let (mut warm, mut cold) = (Vec::new(), Vec::new());
        for _ in 0..RESUMES {
            let _agent = self.start_agent(&[])?;
            warm.push(resumed(&mut self.monitor()?, &self.load(true))?.until_count);
        }
        metrics.add(names.resume, Samples::milliseconds(&warm));
        for _ in 0..COLD_RESUMES {
            let mut vmm = self.monitor()?;
            let asked = Instant::now();
            let _agent = self.start_agent(&[])?;
            let started = asked.elapsed();
            cold.push(started + resumed(&mut vmm, &self.load(true))?.until_count);
        }
        metrics.add(names.cold, Samples::milliseconds(&cold));
        Ok(())
    }

    /// What crosses the network for a machine that is loaded and does not run.
    ///
    /// # Errors
    /// When something does not work.
    pub(crate) fn bytes_before_first_instruction(&self, metrics: &mut Metrics) -> io::Result<()> {
        let mut bytes = Vec::new();
        for _ in 0..FILLS {
            let _agent = self.start_agent(&[])?;
            let vmm = self.monitor()?;
            let before = self.hosts.target().bytes_received();
            vmm.demand("PUT", "/snapshot/load", &self.load(false))?;
            bytes.push((self.settled() - before) as f64);
        }
        metrics.add("bytes_before_first_instruction", Samples::new("bytes", bytes));
        Ok(())
    }

    /// What the target's interface has received.
    pub(crate) fn bytes_received(&self) -> u64 {
        self.hosts.target().bytes_received()
    }

    fn settled(&self) -> u64 {
        let mut last = self.hosts.target().bytes_received();
        loop {
            std::thread::sleep(QUIET);
            let now = self.hosts.target().bytes_received();
            if now == last {
                return now;
            }
            last = now;
        }
    }

    /// How long it takes from the request until the whole machine is here.
    ///
    /// # Errors
    /// When something does not work.
    pub(crate) fn fully_resident(&self, metrics: &mut Metrics) -> io::Result<()> {
        let mut times = Vec::new();
        for _ in 0..FILLS {
            let _agent = self.start_agent(&[])?;
            let mut vmm = self.monitor()?;
            let asked = Instant::now();
            resumed(&mut vmm, &self.load(true))?;
            // It need not print while it waits.
            vmm.type_line("tsc")?;
            wait_until_resident(&vmm)?;
            times.push(asked.elapsed());
        }
        metrics.add("fully_resident_remote_0ms_ms", Samples::milliseconds(&times));
        Ok(())
    }

    /// What a guest waits for pages that are on the other host, while background fill does its best.
    ///
    /// # Errors
    /// When something does not work.
    pub(crate) fn faults(&self, metrics: &mut Metrics) -> io::Result<()> {
        let names = [
            "fault_remote_20ms_p50_ms",
            "fault_remote_20ms_p99_ms",
            "fault_remote_20ms_indexed_p99_ms",
        ];
        let without_fill = [
            "fault_remote_20ms_without_fill_p50_ms",
            "fault_remote_20ms_without_fill_p99_ms",
            "fault_remote_20ms_without_fill_indexed_p99_ms",
        ];
        for ([p50, p99, indexed_p99], agent) in [(names, &[][..]), (without_fill, &["--fill-rate", "1"])] {
            let waits = self.touched(agent)?;
            let indexed: Vec<Samples> = waits.iter().map(|all| all.after_first(FIRST_TOUCHES)).collect();
            metrics.add(p50, quantiles(&waits, 0.5));
            metrics.add(p99, quantiles(&waits, 0.99));
            metrics.add(indexed_p99, quantiles(&indexed, 0.99));
        }
        Ok(())
    }

    fn touched(&self, agent: &[&str]) -> io::Result<Vec<Samples>> {
        let one = |_| {
            let _agent = self.start_agent(agent)?;
            let mut vmm = self.monitor()?;
            resumed(&mut vmm, &self.load(true))?;
            touch(&mut vmm, TOUCHED_START, TOUCHED_BYTES, TOUCHES)
        };
        (0..TOUCHED_MACHINES).map(one).collect()
    }
}

/// Whether an agent listens there: its socket keeps packets apart, which a stream does not.
fn listens(socket: &Path) -> bool {
    let connect = || -> rustix::io::Result<()> {
        let address = SocketAddrUnix::new(socket)?;
        let flags = SocketFlags::CLOEXEC;
        let own = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        rustix::net::connect(&own, &address)
    };
    connect().is_ok()
}

fn quantiles(machines: &[Samples], share: f64) -> Samples {
    Samples::new("ms", machines.iter().map(|waits| waits.quantile(share)).collect())
}
