//! From a socket's path to an open image: what is asked, how long is waited, and what an agent's answer must hold.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::super::message::{
    Adopt, AgentStatus, BadMessage, FromAgent, FromMonitor, Hello, Opened, PROTOCOL_VERSION, VOLUMES_MAX,
};
use super::super::socket::PacketSocket;
use crate::digest::BlobDigest;

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
    /// The agent did not answer within the time given.
    #[error("the agent did not answer within {} ms", .0.as_millis())]
    TimedOut(Duration),
    /// The agent says why not.
    #[error("the agent cannot open the image: {0}")]
    Refused(String),
    /// The agent says why it has no index of an image just now.
    #[error("the agent has no index of the image just now: {0}")]
    Busy(String),
    /// The agent says why it has no index of an image.
    #[error("the agent has no index of the image: {0}")]
    NoIndex(String),
    /// The agent says why it takes no file.
    #[error("the agent does not take the file: {0}")]
    NotAdopted(String),
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
    /// How long the first opening may take. Later ones last until the source is dropped.
    pub deadline: Duration,
}

/// An open connection and what came with it.
pub(super) struct Connection {
    pub(super) socket: PacketSocket,
    pub(super) opened: Opened,
    pub(super) state: Vec<u8>,
    pub(super) manifest: Vec<u8>,
    pub(super) page_files: Vec<File>,
}

impl Connection {
    /// Connects and asks for the image; waits for as long as `patience` says.
    pub(super) fn open(
        opening: &Opening,
        digest: Option<BlobDigest>,
        patience: &Patience<'_>,
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
        wait_readable(&socket, patience)?;
        Self::receive(socket)
    }

    /// Reads the answer to a `Hello`, which is there.
    fn receive(socket: PacketSocket) -> Result<Self, ConnectError> {
        let mut message = Vec::new();
        let files = socket.receive(&mut message).map_err(ConnectError::HungUp)?;
        if message.is_empty() {
            return Err(ConnectError::HungUp(io::ErrorKind::UnexpectedEof.into()));
        }
        match FromAgent::parse(&message)? {
            FromAgent::Opened(opened) => Self::from_answer(socket, opened, files),
            FromAgent::Refused(refused) => Err(ConnectError::Refused(refused.reason)),
            FromAgent::Arrived(_)
            | FromAgent::Failed(..)
            | FromAgent::Status(_)
            | FromAgent::Index(_)
            | FromAgent::Adopted => Err(ConnectError::Answer("chunks before the image is open")),
        }
    }

    fn from_answer(socket: PacketSocket, opened: Opened, files: Vec<OwnedFd>) -> Result<Self, ConnectError> {
        if opened.volumes.len() > VOLUMES_MAX || files.len() != opened.volumes.len() + 2 {
            return Err(ConnectError::Answer("not one page file a volume"));
        }
        let mut files = files.into_iter().map(File::from);
        let mut document = || match files.next() {
            Some(file) => read_document(&file),
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
pub(super) struct Patience<'a> {
    /// None: until somebody gives up.
    pub(super) deadline: Option<Duration>,
    pub(super) give_up: &'a dyn Fn() -> bool,
}

/// How often it is asked whether to give up; less than a second.
const LOOK: Duration = Duration::from_millis(50);

pub(super) fn wait_readable(socket: &PacketSocket, patience: &Patience<'_>) -> Result<(), ConnectError> {
    let begun = Instant::now();
    loop {
        let left = patience.deadline.map_or(LOOK, |deadline| {
            deadline.saturating_sub(begun.elapsed()).min(LOOK)
        });
        let pause = Timespec {
            tv_sec: 0,
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&pause)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(ConnectError::Local(error.into())),
        }
        if let Some(deadline) = patience.deadline
            && begun.elapsed() >= deadline
        {
            return Err(ConnectError::TimedOut(deadline));
        }
        if (patience.give_up)() {
            return Err(ConnectError::CalledOff);
        }
    }
}

/// Reads by offset: machines that open the image at the same time are handed the same descriptor, and its position.
fn read_document(file: &File) -> Result<Vec<u8>, ConnectError> {
    let bytes = file.metadata().map_err(ConnectError::Local)?.len();
    if bytes > DOCUMENT_BYTES_MAX {
        return Err(ConnectError::Answer("a state or manifest of more than 16 MiB"));
    }
    let mut document = vec![0; bytes as usize]; // at most DOCUMENT_BYTES_MAX
    file.read_exact_at(&mut document, 0)
        .map_err(ConnectError::Local)?;
    Ok(document)
}

/// What an agent's first answer, and the descriptors that came with it, are taken for: for whoever feeds it strange
/// ones. Tells what was opened, and how long state and manifest are.
///
/// # Errors
/// When they open no image.
#[doc(hidden)]
pub fn read_opening(socket: PacketSocket) -> Result<(Opened, [usize; 2]), ConnectError> {
    let connection = Connection::receive(socket)?;
    let documents = [connection.state.len(), connection.manifest.len()];
    Ok((connection.opened, documents))
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
        deadline: Some(deadline),
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

/// How long an agent may take for a file, and how long for each GiB of it more: all of it is read and hashed.
const ADOPTION: Duration = Duration::from_secs(60);

/// Hands the agent at `path` a file that is a volume of an image; it is waited for until `give_up` says otherwise, or it
/// takes far too long.
///
/// # Errors
/// When no agent answers there, or it does not take the file.
pub fn hand_over(
    path: &Path,
    adopt: Adopt,
    file: &File,
    give_up: &dyn Fn() -> bool,
) -> Result<(), ConnectError> {
    let socket = PacketSocket::connect(path).map_err(|source| ConnectError::Connect {
        path: path.to_owned(),
        source,
    })?;
    socket
        .send(&FromMonitor::Adopt(adopt).to_bytes(), &[file.as_fd()])
        .map_err(ConnectError::HungUp)?;
    let bytes = file.metadata().map_err(ConnectError::Local)?.len();
    let patience = Patience {
        deadline: Some(ADOPTION.saturating_mul(1 + (bytes >> 30) as u32)),
        give_up,
    };
    wait_readable(&socket, &patience)?;
    let mut message = Vec::new();
    socket.receive(&mut message).map_err(ConnectError::HungUp)?;
    if message.is_empty() {
        return Err(ConnectError::HungUp(io::ErrorKind::UnexpectedEof.into()));
    }
    match FromAgent::parse(&message)? {
        FromAgent::Adopted => Ok(()),
        FromAgent::Refused(refused) => Err(ConnectError::NotAdopted(refused.reason)),
        _ => Err(ConnectError::Answer("nothing was asked but to take a file")),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek as _, SeekFrom, Write as _};

    use super::*;

    #[test]
    fn documents_are_read_whole_wherever_others_who_have_them_are_reading() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"a machine's state").unwrap();
        for position in [0, 5, 17] {
            file.seek(SeekFrom::Start(position)).unwrap();
            assert_eq!(read_document(&file).unwrap(), b"a machine's state");
            assert_eq!(file.stream_position().unwrap(), position);
        }
    }
}
