//! From a socket's path to an open image: what is asked, how long is waited, and what an agent's answer must hold.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::Duration;

use super::super::message::{
    BadMessage, FromAgent, FromMonitor, Hello, Opened, PROTOCOL_VERSION, VOLUMES_MAX,
};
use super::super::socket::PacketSocket;
use super::question::{Patience, ask, receive_answer};
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
    #[error("the agent hung up before it answered")]
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
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
            image: opening.image.clone(),
            digest,
            machine: opening.machine.clone(),
        };
        let socket = ask(&opening.agent, &FromMonitor::Hello(hello), &[], patience)?;
        Self::receive(socket)
    }

    /// Reads the answer to a `Hello`, which is there.
    fn receive(socket: PacketSocket) -> Result<Self, ConnectError> {
        let (answer, files) = receive_answer(&socket)?;
        match answer {
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
