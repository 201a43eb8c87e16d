//! The monitor's end: an agent's image as a [`PageSource`], across the agent's death.
//!
//! ```text
//!   connect ──Hello──► opening ──Opened──► open ──hang-up──► away ──(backoff)──► connect …
//!                         └─Refused, first time: the caller's error; later: the reason that is reported
//! ```
//!
//! What was asked for and not answered is remembered here, so a new agent is simply asked again. While the agent is
//! away every chunk asked for is reported as failed, with the reason, so that a waiting machine can say why it waits.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::message::{
    AgentStatus, BadMessage, CHUNKS_MAX, FromAgent, FromMonitor, Hello, Opened, PROTOCOL_VERSION, VOLUMES_MAX,
};
use super::socket::PacketSocket;
use crate::digest::BlobDigest;
use crate::source::{ChunkFailure, ChunkId, ChunkSink, PageSource, SourceVolume, Urgency, VolumeId};

/// How long to wait before connecting again: first this, then twice as long each time.
const RECONNECT_MIN: Duration = Duration::from_millis(20);
/// The longest such wait.
const RECONNECT_MAX: Duration = Duration::from_secs(1);

/// The longest state or manifest that is taken from an agent.
const DOCUMENT_BYTES_MAX: u64 = 16 << 20;

/// Why an image could not be opened through an agent.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody listens.
    #[error("no agent answers at {path}; start one with `runnel agent`")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The agent hung up, or the connection broke.
    #[error("the agent hung up before it opened the image")]
    HungUp(#[source] io::Error),
    /// The agent did not open the image within the time given.
    #[error("the agent did not open the image within {} ms", .0.as_millis())]
    TimedOut(Duration),
    /// The agent says why not.
    #[error("the agent cannot open the image: {0}")]
    Refused(String),
    /// What it sent is no answer.
    #[error("the agent's answer makes no sense")]
    Message(#[from] BadMessage),
    /// What it sent contradicts itself.
    #[error("the agent's answer makes no sense: {0}")]
    Answer(&'static str),
    /// It is not wanted any more.
    #[error("opening the image was called off")]
    CalledOff,
    /// This process lacks something.
    #[error("cannot talk to the agent")]
    Local(#[source] io::Error),
}

/// How an image is opened.
#[derive(Clone, Debug)]
pub struct Opening {
    /// The agent's socket.
    pub agent: PathBuf,
    /// The image, as people write it.
    pub image: String,
    /// Whose machine this is, for the agent's log.
    pub machine: String,
    /// How long the first opening may take. Later ones have no limit.
    pub deadline: Duration,
}

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
    /// Device and inode of each page file: a new agent must offer the same ones.
    inodes: Vec<(u64, u64)>,
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

/// An open connection and what came with it.
struct Connection {
    socket: PacketSocket,
    opened: Opened,
    state: Vec<u8>,
    manifest: Vec<u8>,
    page_files: Vec<File>,
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
            deadline: opening.deadline,
            give_up,
        };
        let connection = Connection::open(&opening, None, Some(&patience))?;
        let volumes = connection.opened.volumes.iter().map(|volume| SourceVolume {
            name: volume.name.clone(),
            bytes: volume.bytes,
            chunk_size: volume.chunk_size,
        });
        let volumes = volumes.collect();
        let digest = connection.opened.digest;
        let shared = Arc::new(Shared {
            opening,
            digest,
            inodes: inodes(&connection.page_files).map_err(ConnectError::Local)?,
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
            page_files: connection.page_files.into_iter().map(Arc::new).collect(),
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

impl Connection {
    fn open(
        opening: &Opening,
        digest: Option<BlobDigest>,
        patience: Option<&Patience<'_>>,
    ) -> Result<Self, ConnectError> {
        let socket = PacketSocket::connect(&opening.agent).map_err(|source| ConnectError::Connect {
            path: opening.agent.clone(),
            source,
        })?;
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
            image: opening.image.clone(),
            digest,
            machine: opening.machine.clone(),
        };
        socket
            .send(&FromMonitor::Hello(hello).to_bytes(), &[])
            .map_err(ConnectError::HungUp)?;
        if let Some(patience) = patience {
            wait_readable(&socket, patience)?;
        }
        let mut message = Vec::new();
        let files = socket.receive(&mut message).map_err(ConnectError::HungUp)?;
        if message.is_empty() {
            return Err(ConnectError::HungUp(io::ErrorKind::UnexpectedEof.into()));
        }
        match FromAgent::parse(&message)? {
            FromAgent::Opened(opened) => Self::from_answer(socket, opened, files),
            FromAgent::Refused(refused) => Err(ConnectError::Refused(refused.reason)),
            FromAgent::Arrived(_) | FromAgent::Failed(..) | FromAgent::Status(_) => {
                Err(ConnectError::Answer("chunks before the image is open"))
            }
        }
    }

    fn from_answer(socket: PacketSocket, opened: Opened, files: Vec<OwnedFd>) -> Result<Self, ConnectError> {
        if opened.volumes.len() > VOLUMES_MAX || files.len() != opened.volumes.len() + 2 {
            return Err(ConnectError::Answer("not one page file a volume"));
        }
        let mut files = files.into_iter().map(File::from);
        let mut document = || match files.next() {
            Some(file) => read_document(file),
            None => Err(ConnectError::Answer("a document is missing")),
        };
        let (state, manifest) = (document()?, document()?);
        let page_files: Vec<_> = files.collect();
        for (file, volume) in page_files.iter().zip(&opened.volumes) {
            // A page file that is too short would end in SIGBUS.
            if file.metadata().map_err(ConnectError::Local)?.len() < volume.bytes {
                return Err(ConnectError::Answer("a page file is shorter than its volume"));
            }
        }
        Ok(Self {
            socket,
            opened,
            state,
            manifest,
            page_files,
        })
    }
}

/// How long an answer is waited for.
struct Patience<'a> {
    deadline: Duration,
    give_up: &'a dyn Fn() -> bool,
}

/// How often it is asked whether to give up.
const LOOK: Duration = Duration::from_millis(50);

fn wait_readable(socket: &PacketSocket, patience: &Patience<'_>) -> Result<(), ConnectError> {
    let timed_out = || ConnectError::TimedOut(patience.deadline);
    let until = Instant::now() + patience.deadline;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let pause = Timespec::try_from(left.min(LOOK)).map_err(|_| timed_out())?;
        match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&pause)) {
            Ok(0) if left.is_zero() => return Err(timed_out()),
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(ConnectError::Local(error.into())),
        }
        if (patience.give_up)() {
            return Err(ConnectError::CalledOff);
        }
    }
}

fn read_document(mut file: File) -> Result<Vec<u8>, ConnectError> {
    use std::io::Seek as _;
    let bytes = file.metadata().map_err(ConnectError::Local)?.len();
    if bytes > DOCUMENT_BYTES_MAX {
        return Err(ConnectError::Answer("a state or manifest of more than 16 MiB"));
    }
    let mut document = Vec::new();
    file.rewind().map_err(ConnectError::Local)?;
    file.take(DOCUMENT_BYTES_MAX)
        .read_to_end(&mut document)
        .map_err(ConnectError::Local)?;
    Ok(document)
}

fn inodes(files: &[File]) -> io::Result<Vec<(u64, u64)>> {
    files
        .iter()
        .map(|file| file.metadata().map(|about| (about.dev(), about.ino())))
        .collect()
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
            FromAgent::Opened(_) | FromAgent::Refused(_) | FromAgent::Status(_) => {
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
        loop {
            let reason = match Connection::open(&self.opening, Some(self.digest), None) {
                Ok(connection) if connection.opened.digest != self.digest => {
                    "the agent opened another image".to_owned()
                }
                Ok(connection) => match inodes(&connection.page_files) {
                    Ok(found) if found == self.inodes => {
                        self.resume(connection.socket);
                        return true;
                    }
                    Ok(_) => "the new agent has other page files: start it with the same --memory-pages and --drive-pages"
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

    fn resume(&self, socket: PacketSocket) {
        let mut line = self.lock();
        line.socket = Some(Arc::new(socket));
        line.backlog.clear();
        for wanted in [Urgency::Demand, Urgency::Soon, Urgency::Fill] {
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

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Whether an agent listens at `path`.
#[must_use]
pub fn is_answering(path: &Path) -> bool {
    PacketSocket::connect(path).is_ok()
}

/// Asks the agent at `path` what it has open.
///
/// # Errors
/// When no agent answers there within `deadline`.
pub fn status(path: &Path, deadline: Duration) -> Result<AgentStatus, ConnectError> {
    let socket = PacketSocket::connect(path).map_err(|source| ConnectError::Connect {
        path: path.to_owned(),
        source,
    })?;
    socket
        .send(&FromMonitor::Status.to_bytes(), &[])
        .map_err(ConnectError::HungUp)?;
    let patience = Patience {
        deadline,
        give_up: &|| false,
    };
    wait_readable(&socket, &patience)?;
    let mut message = Vec::new();
    socket.receive(&mut message).map_err(ConnectError::HungUp)?;
    match FromAgent::parse(&message)? {
        FromAgent::Status(status) => Ok(status),
        _ => Err(ConnectError::Answer("it is no status")),
    }
}

#[cfg(test)]
mod tests;
