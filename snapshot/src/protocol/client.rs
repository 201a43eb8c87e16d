//! The monitor's end: an agent's image as a [`PageSource`], across the agent's death.
//!
//! ```text
//!   connect ──Hello──► opening ──Opened──► open ──hang-up──► away ──(backoff)──► connect …
//!                         └─Refused, first time: the caller's error; later: the reason that is reported
//! ```
//!
//! What was asked for and not answered is remembered here, so a new agent is simply asked again. While the agent is
//! away every chunk asked for is reported as failed, with the reason, so that a waiting machine can say why it waits.

mod away;
mod opening;
mod question;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::message::{Adopt, CHUNKS_MAX, FromAgent, FromMonitor, PROTOCOL_VERSION};
use super::socket::PacketSocket;
use crate::causes::with_causes;
use crate::digest::BlobDigest;
use crate::image::source::is_sealed;
use crate::source::{ChunkFailure, ChunkId, ChunkSink, PageSource, SourceVolume, Urgency, VolumeId};
use crate::volume::VolumeName;
pub use away::AgentImage;
use opening::Connection;
#[doc(hidden)]
pub use opening::read_opening;
pub use opening::{ConnectError, Opening};
use question::Patience;
pub use question::{hand_over, is_answering, status};

/// How long to wait before connecting again: first this, then twice as long each time.
const RECONNECT_MIN: Duration = Duration::from_millis(20);
/// The longest such wait.
const RECONNECT_MAX: Duration = Duration::from_secs(1);

/// An image that an agent delivers. See the module.
pub struct AgentSource {
    volumes: Vec<SourceVolume>,
    page_files: Vec<Arc<File>>,
    digest: BlobDigest,
    state: Vec<u8>,
    manifest: Vec<u8>,
    shared: Arc<Shared>,
}

struct Shared {
    opening: Opening,
    digest: BlobDigest,
    /// The page files: a new agent must offer the same ones, but for those that need no agent any more.
    page_files: Vec<KnownFile>,
    /// Their volumes.
    names: Vec<VolumeName>,
    sink: OnceLock<Arc<dyn ChunkSink>>,
    line: Mutex<Line>,
    /// Wakes the thread: there is something to send, or the end has come.
    wake: OwnedFd,
}

/// The connection and what is owed over it.
#[derive(Default)]
struct Line {
    /// `None` while the agent is away.
    socket: Option<Arc<PacketSocket>>,
    /// Asked for and not answered yet.
    outstanding: BTreeMap<ChunkId, Urgency>,
    /// Why the agent is away, if it is.
    away: String,
    /// Messages for which the socket had no room; sent in order by the thread.
    backlog: std::collections::VecDeque<FromMonitor>,
    closed: bool,
}

impl AgentSource {
    /// Opens an image through the agent.
    ///
    /// # Errors
    /// When no agent answers, or it cannot open the image.
    pub fn open(opening: Opening) -> Result<Self, ConnectError> {
        Self::open_unless(opening, &|| false)
    }

    /// Opens an image through the agent, for somebody who may think better of it: `give_up` is asked now and then.
    ///
    /// # Errors
    /// When no agent answers, it cannot open the image, or `give_up` says so.
    pub fn open_unless(opening: Opening, give_up: &dyn Fn() -> bool) -> Result<Self, ConnectError> {
        let patience = Patience {
            deadline: Some(opening.deadline),
            give_up,
        };
        let connection = Connection::open(&opening, None, &patience)?;
        let volumes = connection.opened.volumes.iter().map(|volume| SourceVolume {
            name: volume.name.clone(),
            bytes: volume.bytes,
            chunk_size: volume.chunk_size,
        });
        let volumes: Vec<_> = volumes.collect();
        let digest = connection.opened.digest;
        let page_files: Vec<_> = connection.page_files.into_iter().map(Arc::new).collect();
        let known = page_files.iter().map(KnownFile::new).collect::<Result<_, _>>();
        let shared = Arc::new(Shared {
            opening,
            digest,
            page_files: known.map_err(ConnectError::Local)?,
            names: volumes.iter().map(|volume| volume.name.clone()).collect(),
            sink: OnceLock::new(),
            line: Mutex::new(Line {
                socket: Some(Arc::new(connection.socket)),
                ..Line::default()
            }),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|error| ConnectError::Local(error.into()))?,
        });
        Ok(Self {
            volumes,
            page_files,
            digest,
            state: connection.state,
            manifest: connection.manifest,
            shared,
        })
    }

    /// The image's digest.
    #[must_use]
    pub fn digest(&self) -> BlobDigest {
        self.digest
    }

    /// The machine state, as the image holds it.
    #[must_use]
    pub fn state(&self) -> &[u8] {
        &self.state
    }

    /// The image's manifest.
    #[must_use]
    pub fn manifest(&self) -> &[u8] {
        &self.manifest
    }
}

impl PageSource for AgentSource {
    fn volumes(&self) -> &[SourceVolume] {
        &self.volumes
    }

    fn page_file(&self, volume: VolumeId) -> Arc<File> {
        self.page_files[usize::from(volume.0)].clone()
    }

    fn deliver_to(&self, sink: Arc<dyn ChunkSink>) {
        assert!(
            self.shared.sink.set(sink).is_ok(),
            "chunks are delivered to one sink"
        );
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new()
            .name("agent-client".into())
            .spawn(move || shared.run());
        // Nothing could be done without the thread, and nothing is lost yet: the machine has not started.
        thread.expect("a thread for the agent's answers can be started");
    }

    fn ask(&self, chunks: &[ChunkId], urgency: Urgency) {
        let mut line = self.shared.lock();
        for part in chunks.chunks(CHUNKS_MAX) {
            for chunk in part {
                line.outstanding
                    .entry(*chunk)
                    .and_modify(|known| *known = urgency.max(*known))
                    .or_insert(urgency);
            }
            self.shared
                .send(&mut line, FromMonitor::Ask(urgency, part.to_vec()));
        }
        let away = line.socket.is_none().then(|| line.away.clone());
        drop(line);
        if let Some(reason) = away {
            self.shared.report(chunks, &reason);
        }
    }

    fn cancel(&self, chunks: &[ChunkId]) {
        let mut line = self.shared.lock();
        for part in chunks.chunks(CHUNKS_MAX) {
            for chunk in part {
                line.outstanding.remove(chunk);
            }
            self.shared.send(&mut line, FromMonitor::Cancel(part.to_vec()));
        }
    }
}

impl Drop for AgentSource {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.wake();
    }
}

/// A page file, as it is known again.
struct KnownFile {
    inode: (u64, u64),
    /// The file itself, if nobody can change it. An agent has found all of the volume in it: whatever a later one has,
    /// that is the same.
    sealed: Option<Arc<File>>,
}

impl KnownFile {
    fn new(file: &Arc<File>) -> io::Result<Self> {
        Ok(Self {
            inode: inode_of(file)?,
            sealed: is_sealed(file).then(|| Arc::clone(file)),
        })
    }

    /// Whether a machine that maps this one can go on with an agent that has another.
    fn goes_on_with(&self, inode: &(u64, u64)) -> bool {
        self.sealed.is_some() || self.inode == *inode
    }
}

/// Device and inode.
fn inode_of(file: &File) -> io::Result<(u64, u64)> {
    let about = file.metadata()?;
    Ok((about.dev(), about.ino()))
}

/// Why a connection ended.
enum Ended {
    Closed,
    Away(String),
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Fails only when the counter is full, and then the thread is being woken already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Sends now if there is room, else has the thread send it. While the agent is away nothing needs sending: a new
    /// one is asked for everything that is outstanding.
    fn send(&self, line: &mut Line, message: FromMonitor) {
        let Some(socket) = &line.socket else { return };
        if line.backlog.is_empty() && socket.try_send(&message.to_bytes()).is_ok() {
            return;
        }
        line.backlog.push_back(message);
        self.wake();
    }

    fn run(&self) {
        loop {
            let socket = self.lock().socket.clone();
            let ended = match socket {
                Some(socket) => self.serve(&socket),
                None => Ended::Away("the agent is away".to_owned()),
            };
            let Ended::Away(reason) = ended else { return };
            tracing::warn!(reason, agent = %self.opening.agent.display(), "the agent is away; connecting again");
            self.report_away(&reason);
            if !self.reconnect() {
                return;
            }
            tracing::info!(agent = %self.opening.agent.display(), "the agent is back");
        }
    }

    /// Hands on what the agent says until the connection ends.
    fn serve(&self, socket: &PacketSocket) -> Ended {
        let mut message = Vec::new();
        loop {
            let mut events = PollFlags::IN;
            {
                let mut line = self.lock();
                if line.closed {
                    return Ended::Closed;
                }
                if !flush(&mut line, socket) {
                    events |= PollFlags::OUT;
                }
            }
            let mut fds = [
                PollFd::new(socket, events),
                PollFd::new(&self.wake, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Ended::Away(format!("waiting for the agent failed: {error}")),
            }
            // Nothing to read means that nobody woke us that way.
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
            loop {
                match socket.try_receive(&mut message) {
                    Ok(_) if message.is_empty() => return Ended::Away("the agent has ended".to_owned()),
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // It had not read all that it was asked.
                    Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                        return Ended::Away("the agent has ended".to_owned());
                    }
                    Err(error) => return Ended::Away(format!("the connection to the agent broke: {error}")),
                }
                match FromAgent::parse(&message) {
                    Ok(message) => self.hand_on(message),
                    Err(error) => return Ended::Away(format!("the agent talks nonsense: {error}")),
                }
            }
        }
    }

    fn hand_on(&self, message: FromAgent) {
        let Some(sink) = self.sink.get() else { return };
        match message {
            FromAgent::Arrived(chunks) => {
                {
                    let mut line = self.lock();
                    for (chunk, _) in &chunks {
                        line.outstanding.remove(chunk);
                    }
                }
                chunks
                    .into_iter()
                    .for_each(|(chunk, what)| sink.arrived(chunk, what));
            }
            FromAgent::Failed(chunk, failure) => {
                self.lock().outstanding.remove(&chunk);
                sink.failed(chunk, failure);
            }
            FromAgent::Opened(_)
            | FromAgent::Refused(_)
            | FromAgent::Status(_)
            | FromAgent::Index(_)
            | FromAgent::Adopted => {
                tracing::warn!("the agent answered a question that was not asked");
            }
        }
    }

    /// Tells the sink that nothing comes for now. What was asked for stays outstanding.
    fn report_away(&self, reason: &str) {
        let outstanding: Vec<_> = {
            let mut line = self.lock();
            line.socket = None;
            reason.clone_into(&mut line.away);
            line.backlog.clear();
            line.outstanding.keys().copied().collect()
        };
        self.report(&outstanding, reason);
    }

    fn report(&self, chunks: &[ChunkId], reason: &str) {
        let Some(sink) = self.sink.get() else { return };
        let failure = ChunkFailure {
            reason: reason.to_owned(),
            transient: true,
        };
        for chunk in chunks {
            sink.failed(*chunk, failure.clone());
        }
    }

    /// Tries until an agent has the image open again, then asks it for everything outstanding; `false` at the end.
    fn reconnect(&self) -> bool {
        let mut pause = RECONNECT_MIN;
        let mut told = String::new();
        // An agent that is reached may itself wait, for a network that is away.
        let patience = Patience {
            deadline: None,
            give_up: &|| self.lock().closed,
        };
        loop {
            self.hand_sealed_over();
            let reason = match Connection::open(&self.opening, Some(self.digest), &patience) {
                Ok(connection) if connection.opened.digest != self.digest => {
                    "the agent opened another image".to_owned()
                }
                Ok(connection) => match self.goes_on_with(&connection.page_files) {
                    Ok(true) => {
                        self.resume(connection.socket);
                        return true;
                    }
                    Ok(false) => "the new agent has other page files: start it with the same --memory-pages and --drive-pages"
                        .to_owned(),
                    Err(error) => error.to_string(),
                },
                Err(error) => with_causes(&error),
            };
            if reason != told {
                self.report_away(&reason);
                told = reason;
            }
            if self.sleep(pause) {
                return false;
            }
            pause = (pause * 2).min(RECONNECT_MAX);
        }
    }

    fn goes_on_with(&self, files: &[File]) -> io::Result<bool> {
        let inodes: Vec<_> = files.iter().map(inode_of).collect::<Result<_, _>>()?;
        let mut both = self.page_files.iter().zip(&inodes);
        Ok(inodes.len() == self.page_files.len() && both.all(|(known, inode)| known.goes_on_with(inode)))
    }

    /// Gives a new agent the page files that nobody can change, before it makes others: machines that begin with it share
    /// them then too. It has them already if another machine was faster.
    fn hand_sealed_over(&self) {
        for (known, volume) in self.page_files.iter().zip(&self.names) {
            let Some(file) = &known.sealed else { continue };
            let adopt = Adopt {
                protocol: PROTOCOL_VERSION,
                image: self.opening.image.clone(),
                digest: self.digest,
                volume: volume.clone(),
                machine: self.opening.machine.clone(),
            };
            let give_up = || self.lock().closed;
            if let Err(error) = hand_over(&self.opening.agent, adopt, file, &give_up) {
                let error = &error as &dyn std::error::Error;
                tracing::debug!(error, %volume, "the agent does not take a page file");
            }
        }
    }

    fn resume(&self, socket: PacketSocket) {
        let mut line = self.lock();
        line.socket = Some(Arc::new(socket));
        line.backlog.clear();
        for wanted in [Urgency::Demand, Urgency::Recorded, Urgency::Soon, Urgency::Fill] {
            let chunks: Vec<_> = line
                .outstanding
                .iter()
                .filter(|(_, urgency)| **urgency == wanted)
                .map(|(chunk, _)| *chunk)
                .collect();
            line.backlog.extend(
                chunks
                    .chunks(CHUNKS_MAX)
                    .map(|part| FromMonitor::Ask(wanted, part.to_vec())),
            );
        }
    }

    /// Sleeps; `true` if the source was closed meanwhile.
    fn sleep(&self, pause: Duration) -> bool {
        let until = Instant::now() + pause;
        loop {
            if self.lock().closed {
                return true;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let left = Timespec::try_from(left).unwrap_or(Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            });
            let _ = poll(&mut [PollFd::new(&self.wake, PollFlags::IN)], Some(&left));
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
    }
}

/// Sends the backlog as far as there is room; `true` if nothing is left.
fn flush(line: &mut Line, socket: &PacketSocket) -> bool {
    while let Some(message) = line.backlog.front() {
        if socket.try_send(&message.to_bytes()).is_err() {
            return false; // no room; if the agent is gone, receiving will say so
        }
        line.backlog.pop_front();
    }
    true
}

#[cfg(test)]
mod tests;
