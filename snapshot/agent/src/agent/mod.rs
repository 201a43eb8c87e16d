//! `runnel-agent`: fetches, verifies and keeps chunks for the machines of a host.
//!
//! It listens on a unix socket and speaks the [chunk protocol](runnel_snapshot::protocol). Each image is open once,
//! whatever number of machines run from it, and whatever number of places it can be read in: a chunk is fetched once,
//! and told to all who asked. Page files have names,
//! in directories that outlive the agent: one that is killed is followed by one that goes on with the same files,
//! holding each chunk against its digest before it counts. Together they are the host's cache, which has a quota and
//! takes chunks out again: see [`cache`].
//!
//! ```text
//!   monitor ── Line ──┐  one thread a monitor listens
//!   monitor ── Line ──┼── FanOut ◄── ImageSource ◄── RemoteBlobs ◄── server
//!   monitor ── Line ──┘     │           │ workers: read, decode, verify, write, tell
//!                    who waits for what └── page files, handed out for reading alone
//! ```

mod cache;
mod fan_out;
mod image;
mod images;
mod line;
mod pages;
mod places;
mod settings;
mod view;

pub use pages::PagesError;
pub use settings::{AgentSettings, QUOTA_BYTES_MIN, UNUSED_AFTER};

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use runnel_snapshot::protocol::{
    Adopt, AgentStatus, FromAgent, FromMonitor, Hello, IndexFound, PROTOCOL_VERSION, PacketListener,
    PacketSocket, Refused, WantIndex,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use fan_out::MachineNumber;
use images::{Images, Lease};
use line::{Ended, Line};
use pages::PageFolders;

/// Monitors at a time.
const MONITORS_MAX: usize = 1024;

/// How long the end of a process may take.
const FAREWELL: Duration = Duration::from_secs(2);

/// Why an agent cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Its directories cannot be used.
    #[error(transparent)]
    Pages(#[from] PagesError),
    /// Its socket cannot be had.
    #[error("cannot listen at {path}")]
    Listen {
        /// Where.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// There is no thread or descriptor to be had.
    #[error("the agent cannot be started")]
    Start(#[source] io::Error),
}

/// An agent at work, until it is stopped or dropped.
pub struct Agent {
    host: Arc<Host>,
    threads: Vec<JoinHandle<()>>,
}

/// What the agent's threads share.
struct Host {
    images: Arc<Images>,
    monitors: Mutex<Vec<Monitor>>,
    next_machine: AtomicU64,
    /// Wakes the listening thread for the end.
    wake: OwnedFd,
}

struct Monitor {
    line: Arc<Line>,
    thread: JoinHandle<()>,
}

impl Agent {
    /// Takes the directories and the socket, and starts to listen.
    ///
    /// # Errors
    /// When another agent has one of them, or they cannot be made.
    pub fn start(settings: AgentSettings) -> Result<Self, AgentError> {
        let folders = PageFolders::take(&settings.memory_folder, &settings.drive_folder)?;
        let path = settings.socket.clone();
        let listener = PacketListener::bind(&path).map_err(|source| AgentError::Listen { path, source })?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let host = Arc::new(Host {
            images: Arc::new(Images::new(settings, folders)),
            monitors: Mutex::default(),
            // 0 is nobody's.
            next_machine: AtomicU64::new(1),
            wake: wake.map_err(|error| AgentError::Start(error.into()))?,
        });
        let mut agent = Self {
            host,
            threads: Vec::new(),
        };
        let images = Arc::clone(&agent.host.images);
        agent.spawn("tidy", move || images.keep_tidy())?;
        let host = Arc::clone(&agent.host);
        agent.spawn("listen", move || host.listen(&listener))?;
        Ok(agent)
    }

    fn spawn(&mut self, name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), AgentError> {
        let thread = thread::Builder::new().name(name.to_owned()).spawn(work);
        self.threads.push(thread.map_err(AgentError::Start)?);
        Ok(())
    }

    /// What it has open, and what went over the wire for it.
    #[must_use]
    pub fn status(&self) -> AgentStatus {
        self.host.images.status()
    }

    /// Hangs up on all monitors and ends. Page files of images in use stay, for the next agent.
    pub fn stop(mut self) {
        self.end();
    }

    /// [`stop`](Self::stop)s, for a process that ends with it: a read from a server that is silent is waited for two
    /// seconds at most, since nothing of it would be kept.
    ///
    /// # Errors
    /// When no thread can be started that waits.
    pub fn stop_soon(self) -> io::Result<()> {
        let (sender, ended) = mpsc::sync_channel(1);
        thread::Builder::new()
            .name("farewell".to_owned())
            .spawn(move || {
                self.stop();
                let _ = sender.send(()); // nobody may wait any more
            })?;
        let _ = ended.recv_timeout(FAREWELL);
        Ok(())
    }

    fn end(&mut self) {
        self.host.images.end();
        // Fails only when the counter is full, and then the thread is being woken already.
        let _ = rustix::io::write(&self.host.wake, &1u64.to_ne_bytes());
        for thread in self.threads.drain(..) {
            // A thread that panicked said so already; as below.
            let _ = thread.join();
        }
        let monitors = std::mem::take(&mut *self.host.monitors());
        for monitor in &monitors {
            monitor.line.hang_up();
        }
        for monitor in monitors {
            let _ = monitor.thread.join();
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.end();
    }
}

impl Host {
    fn monitors(&self) -> MutexGuard<'_, Vec<Monitor>> {
        self.monitors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Accepts monitors until the agent ends.
    fn listen(self: &Arc<Self>, listener: &PacketListener) {
        loop {
            let mut fds = [
                PollFd::new(listener, PollFlags::IN),
                PollFd::new(&self.wake, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return tracing::error!(%error, "the agent cannot listen any more"),
            }
            if !fds[1].revents().is_empty() {
                return;
            }
            match listener.accept().and_then(|socket| self.attend(socket)) {
                Ok(()) => {}
                Err(error) => {
                    tracing::warn!(%error, "a monitor cannot be attended to");
                    // Out of descriptors or threads: that passes, and is not hurried by asking again at once.
                    thread::sleep(std::time::Duration::from_millis(10));
                }
            }
        }
    }

    fn attend(self: &Arc<Self>, socket: PacketSocket) -> io::Result<()> {
        let mut monitors = self.monitors();
        monitors.retain(|monitor| !monitor.thread.is_finished());
        if monitors.len() >= MONITORS_MAX {
            return Err(io::Error::other("there are too many already")); // which hangs up
        }
        let line = Arc::new(Line::new(socket)?);
        let (host, its_line) = (Arc::clone(self), Arc::clone(&line));
        let thread = thread::Builder::new().name("monitor".to_owned()).spawn(move || {
            match host.converse(&its_line) {
                Err(Ended::HungUp) | Ok(()) => {}
                Err(error) => {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "a monitor is hung up on"
                    );
                }
            }
        })?;
        monitors.push(Monitor { line, thread });
        Ok(())
    }

    /// A conversation with one monitor.
    fn converse(&self, line: &Arc<Line>) -> Result<(), Ended> {
        let mut message = Vec::new();
        let (first, files) = line.receive_with_files(&mut message)?;
        let hello = match first {
            FromMonitor::Hello(hello) => hello,
            question => return self.answer_once(question, files, line),
        };
        drop(files);
        let lease = match self.open(&hello) {
            Ok(lease) => lease,
            Err(refused) => {
                tracing::warn!(
                    machine = hello.machine,
                    image = hello.image,
                    reason = refused.reason,
                    "refused"
                );
                line.socket().send(&FromAgent::Refused(refused).to_bytes(), &[])?;
                return Ok(());
            }
        };
        let image = &lease.image;
        tracing::info!(
            machine = hello.machine,
            image = hello.image,
            "a machine runs from an image"
        );
        let opened = FromAgent::Opened(image.opened()).to_bytes();
        image.with_files(|files| line.socket().send(&opened, files))?;
        let machine = MachineNumber(self.next_machine.fetch_add(1, Ordering::Relaxed));
        image.join(machine, Arc::clone(line));
        let ended = loop {
            match line.receive(&mut message) {
                Ok(FromMonitor::Ask(urgency, chunks)) => image.ask(machine, &chunks, urgency),
                Ok(FromMonitor::Cancel(chunks)) => image.cancel(machine, &chunks),
                Ok(
                    FromMonitor::Hello(_)
                    | FromMonitor::Status
                    | FromMonitor::WantIndex(_)
                    | FromMonitor::Adopt(_),
                ) => {}
                Err(ended) => break ended,
            }
        };
        image.leave(machine);
        tracing::info!(
            machine = hello.machine,
            image = hello.image,
            "a machine needs its image no more"
        );
        Err(ended)
    }

    /// Answers somebody who opens no image, and is done with him.
    fn answer_once(&self, question: FromMonitor, files: Vec<OwnedFd>, line: &Arc<Line>) -> Result<(), Ended> {
        let (answer, file) = match question {
            FromMonitor::Status => (FromAgent::Status(self.images.status()), None),
            FromMonitor::WantIndex(want) => match self.index(&want) {
                Ok((found, file)) => (FromAgent::Index(found), Some(file)),
                Err(refused) => (FromAgent::Refused(refused), None),
            },
            FromMonitor::Adopt(adopt) => match self.adopt(&adopt, files, line) {
                Ok(()) => (FromAgent::Adopted, None),
                Err(refused) => {
                    let (machine, image, reason) = (&adopt.machine, &adopt.image, &refused.reason);
                    tracing::warn!(machine, image, reason, "a file is not taken");
                    (FromAgent::Refused(refused), None)
                }
            },
            FromMonitor::Hello(_) | FromMonitor::Ask(..) | FromMonitor::Cancel(_) => return Ok(()),
        };
        let file: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
        line.socket().send(&answer.to_bytes(), &file)?;
        Ok(())
    }

    fn open(&self, hello: &Hello) -> Result<Lease, Refused> {
        check_version(hello.protocol)?;
        self.images.open(hello)
    }

    fn index(&self, want: &WantIndex) -> Result<(IndexFound, File), Refused> {
        check_version(want.protocol)?;
        self.images.index(want)
    }

    /// Takes a file for the page file of a volume.
    fn adopt(&self, adopt: &Adopt, files: Vec<OwnedFd>, line: &Line) -> Result<(), Refused> {
        check_version(adopt.protocol)?;
        let refuse = |reason: &str| Refused {
            reason: reason.to_owned(),
            transient: false,
        };
        let [file] =
            <[OwnedFd; 1]>::try_from(files).map_err(|_| refuse("one file is taken, with its name"))?;
        self.images.adopt(adopt, file.into(), &|| !line.is_over())
    }
}

fn check_version(version: u32) -> Result<(), Refused> {
    if version == PROTOCOL_VERSION {
        return Ok(());
    }
    let reason = format!(
        "this agent speaks version {PROTOCOL_VERSION} of the protocol, and the monitor version {version}: restart the older of the two"
    );
    Err(Refused {
        reason,
        transient: false,
    })
}
