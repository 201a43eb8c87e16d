//! Two hosts on this machine that share nothing but a network, for tests of level 1.
//!
//! A host is a thread in a network and a mount namespace of its own; what it runs, runs there. There are no names and
//! no state outside: namespaces go with the last process in them, taps with their descriptors, and processes started
//! on a host are killed when its thread ends, so that nothing is left however this process dies.
//!
//! The source is [`SOURCE`], the target [`TARGET`], on the interface [`INTERFACE`]. With a round trip of zero they are
//! joined by a veth pair; otherwise packets pass through a [`Relay`].

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use rustix::thread::UnshareFlags;

use super::relay::{Relay, end};

/// The source's address.
pub const SOURCE: Ipv4Addr = Ipv4Addr::new(10, 20, 0, 1);
/// The target's address.
pub const TARGET: Ipv4Addr = Ipv4Addr::new(10, 20, 0, 2);
/// What the network is called on either host.
pub const INTERFACE: &str = "lan0";

/// Why there are no two hosts.
#[derive(Debug, thiserror::Error)]
pub enum HostsError {
    /// A namespace.
    #[error("cannot make the namespaces of a host: run as root")]
    Namespace(#[source] io::Error),
    /// A tap.
    #[error(transparent)]
    Tap(#[from] runnel_devices::virtio::net::TapError),
    /// A program.
    #[error("{command}: {answer}")]
    Command {
        /// What was run.
        command: String,
        /// What it said.
        answer: String,
    },
    /// The system.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The reason.
        source: io::Error,
    },
}

fn system(what: &'static str) -> impl Fn(io::Error) -> HostsError {
    move |source| HostsError::System { what, source }
}

type Job = Box<dyn FnOnce() + Send>;

/// One host. See the module documentation.
#[derive(Debug)]
pub struct Host {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    thread_id: i32,
}

impl Host {
    fn new(name: &str) -> Result<Self, HostsError> {
        let (jobs, queue) = channel::<Job>();
        let (ready, is_ready) = channel();
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let made = enter_namespaces();
                let failed = made.is_err();
                let sent = ready.send(made.map(|()| rustix::thread::gettid().as_raw_nonzero().get()));
                if sent.is_err() || failed {
                    return;
                }
                queue.iter().for_each(|job| job());
            })
            .map_err(system("start a host's thread"))?;
        let thread_id = is_ready
            .recv()
            .map_err(io::Error::other)
            .map_err(system("hear from a host's thread"))??;
        let host = Self {
            jobs: Some(jobs),
            thread: Some(thread),
            thread_id,
        };
        host.command("mount", &["--make-rprivate", "/"])?;
        // Its announcements would be in the interface's counters.
        host.run(|| std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1"))
            .or_else(|error| match error.kind() {
                io::ErrorKind::NotFound => Ok(()),
                _ => Err(system("switch IPv6 off")(error)),
            })?;
        host.command("ip", &["link", "set", "lo", "up"])?;
        Ok(host)
    }

    /// Does `work` on this host: sockets opened there are the host's, wherever they are used afterwards.
    ///
    /// # Panics
    /// When the work does.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (sender, result) = channel();
        let job = Box::new(move || {
            // Whoever asked waits below.
            let _ = sender.send(work());
        });
        let jobs = self.jobs.as_ref().expect("there until dropped");
        jobs.send(job).expect("the host's thread lives until dropped");
        result.recv().expect("the work on the host panicked")
    }

    /// Starts a program on this host; it is killed at the latest when the host is dropped.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&self, command: Command) -> io::Result<Child> {
        self.run(move || spawn_bound(command))
    }

    /// Hides what is in `folder` from this host: it finds a tmpfs of its own there, which goes when the host goes.
    ///
    /// # Errors
    /// When nothing can be mounted there.
    pub fn hide(&self, folder: &Path) -> Result<(), HostsError> {
        self.command("mount", &["-t", "tmpfs", "hidden", &folder.to_string_lossy()])
    }

    /// Bytes that the network has brought to this host so far, by the interface's counter.
    ///
    /// # Panics
    /// When there is no such interface.
    #[must_use]
    pub fn bytes_received(&self) -> u64 {
        let table = self
            .run(|| std::fs::read_to_string("/proc/thread-self/net/dev"))
            .expect("a network namespace has counters");
        let line = table
            .lines()
            .find_map(|line| line.trim_start().strip_prefix(INTERFACE)?.strip_prefix(':'));
        line.and_then(|counters| counters.split_whitespace().next()?.parse().ok())
            .expect("the interface has counters")
    }

    /// Takes this host off the network (`down`), or puts it back (`up`): what is sent meanwhile is lost, and connections
    /// are not told.
    ///
    /// # Errors
    /// When there is no such network.
    pub fn set_link(&self, state: &str) -> Result<(), HostsError> {
        self.command("ip", &["link", "set", INTERFACE, state])
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Result<(), HostsError> {
        let text = format!("{program} {}", arguments.join(" "));
        let mut command = Command::new(program);
        command.args(arguments);
        let output = self
            .run(move || command.output())
            .map_err(|error| HostsError::Command {
                command: text.clone(),
                answer: error.to_string(),
            })?;
        if output.status.success() {
            return Ok(());
        }
        let answer = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
        Err(HostsError::Command {
            command: text,
            answer,
        })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.jobs.take();
        if let Some(thread) = self.thread.take() {
            // A panic of its work was passed on when it happened.
            let _ = thread.join();
        }
    }
}

/// Starts a program that is killed at the latest when the calling thread ends, however it ends.
///
/// # Errors
/// When it cannot be started.
pub fn spawn_bound(mut command: Command) -> io::Result<Child> {
    let bind = || {
        Ok(rustix::process::set_parent_process_death_signal(Some(
            Signal::KILL,
        ))?)
    };
    // SAFETY: between fork and exec this makes one system call, and neither allocates nor locks.
    unsafe { command.pre_exec(bind) };
    command.spawn()
}

fn enter_namespaces() -> Result<(), HostsError> {
    // SAFETY: neither flag touches the descriptors that threads share; the working directory and root, which a mount
    // namespace parts from those of the other threads, nobody here changes.
    let parted = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS) };
    parted.map_err(|errno| HostsError::Namespace(errno.into()))
}

/// Two hosts and the network between them; everything is gone when they are dropped.
#[derive(Debug)]
pub struct TwoHosts {
    // Dropped in this order: nothing is relayed between hosts that are no more.
    relay: Option<Relay>,
    source: Host,
    target: Host,
}

impl TwoHosts {
    /// Two hosts whose packets need half of `round_trip` each way.
    ///
    /// # Errors
    /// When this user may not make namespaces, or a program or device is missing.
    pub fn new(round_trip: Duration) -> Result<Self, HostsError> {
        let (source, target) = (Host::new("source")?, Host::new("target")?);
        let relay = if round_trip.is_zero() {
            let peer = target.thread_id.to_string();
            let link = [
                "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE,
            ];
            source.command("ip", &[&link[..], &["netns", &peer]].concat())?;
            None
        } else {
            let ends = [source.run(|| end(INTERFACE))?, target.run(|| end(INTERFACE))?];
            Some(Relay::start(ends, round_trip / 2).map_err(system("start the relay"))?)
        };
        for (host, address) in [(&source, SOURCE), (&target, TARGET)] {
            let address = format!("{address}/24");
            host.command("ip", &["address", "add", &address, "dev", INTERFACE])?;
            host.command("ip", &["link", "set", INTERFACE, "up"])?;
        }
        Ok(Self {
            relay,
            source,
            target,
        })
    }

    /// The host that has images.
    #[must_use]
    pub fn source(&self) -> &Host {
        &self.source
    }

    /// The host that has none.
    #[must_use]
    pub fn target(&self) -> &Host {
        &self.target
    }

    /// The processor time that the network itself has used.
    #[must_use]
    pub fn network_time(&self) -> Duration {
        self.relay.as_ref().map_or(Duration::ZERO, Relay::processor_time)
    }

    /// How long a round trip takes: `times` connections from the target to the source, one after the other.
    ///
    /// # Errors
    /// When no connection comes about.
    pub fn round_trips(&self, times: usize) -> io::Result<Vec<Duration>> {
        let listener = self.source.run(|| TcpListener::bind((SOURCE, 0)))?;
        let address = listener.local_addr()?;
        let connect = move || -> io::Result<Vec<Duration>> {
            // The first one asks for the Ethernet address too.
            TcpStream::connect(address)?;
            let one = |_| {
                let started = Instant::now();
                TcpStream::connect(address).map(|_| started.elapsed())
            };
            (0..times).map(one).collect()
        };
        self.target.run(connect)
    }

    /// How long one connection takes to bring `bytes` from the source to the target.
    ///
    /// # Errors
    /// When it breaks.
    pub fn transfer(&self, bytes: u64) -> io::Result<Duration> {
        let listener = self.source.run(|| TcpListener::bind((SOURCE, 0)))?;
        let address = listener.local_addr()?;
        let sender = thread::spawn(move || -> io::Result<u64> {
            let (mut stream, _) = listener.accept()?;
            let block = vec![0x5a; 1 << 20];
            let mut left = bytes;
            while left > 0 {
                let part = usize::try_from(left).unwrap_or(usize::MAX).min(block.len());
                stream.write_all(&block[..part])?;
                left -= part as u64;
            }
            stream.flush()?;
            Ok(bytes)
        });
        let elapsed = self.target.run(move || -> io::Result<Duration> {
            let started = Instant::now();
            let mut stream = TcpStream::connect(address)?;
            let mut buffer = vec![0; 1 << 20];
            while stream.read(&mut buffer)? > 0 {}
            Ok(started.elapsed())
        })?;
        match sender.join() {
            Ok(sent) => sent.map(|_| elapsed),
            Err(_) => Err(io::Error::other("the sender panicked")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `None` where this user may not make hosts; then the test is skipped, or fails in the full lab.
    fn hosts_or_skip(round_trip: Duration) -> Option<TwoHosts> {
        match TwoHosts::new(round_trip) {
            Ok(hosts) => Some(hosts),
            Err(error) => {
                crate::lab::skip(&error.to_string());
                None
            }
        }
    }

    #[test]
    fn a_packet_takes_no_less_than_the_round_trip_and_bytes_are_counted() {
        const BYTES: u64 = 8 << 20;
        for round_trip in [Duration::ZERO, Duration::from_millis(20)] {
            let Some(hosts) = hosts_or_skip(round_trip) else {
                return;
            };
            let times = hosts.round_trips(5).expect("the hosts reach each other");
            assert!(times.iter().all(|time| *time >= round_trip), "{times:?}");
            let before = hosts.target().bytes_received();
            hosts.transfer(BYTES).expect("a connection holds");
            let counted = hosts.target().bytes_received() - before;
            assert!((BYTES..BYTES * 11 / 10).contains(&counted), "{counted}");
        }
    }

    #[test]
    fn a_host_sees_neither_the_others_loopback_nor_what_is_hidden() {
        let Some(hosts) = hosts_or_skip(Duration::ZERO) else {
            return;
        };
        let listener = hosts
            .source()
            .run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
            .expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let refused = hosts.target().run(move || TcpStream::connect(address));
        assert_eq!(
            refused.expect_err("another loopback").kind(),
            io::ErrorKind::ConnectionRefused
        );

        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("image");
        std::fs::write(&file, "bytes").expect("it can be written");
        hosts.target().hide(folder.path()).expect("root may mount");
        let there = file.clone();
        assert!(!hosts.target().run(move || there.exists()));
        assert!(file.exists());
    }

    #[test]
    fn what_was_started_on_a_host_ends_with_it() {
        let Some(hosts) = hosts_or_skip(Duration::ZERO) else {
            return;
        };
        let mut command = Command::new("sleep");
        command.arg("1000");
        let mut child = hosts.target().spawn(command).expect("sleep is there");
        drop(hosts);
        assert!(!child.wait().expect("it is a child").success());
    }
}
