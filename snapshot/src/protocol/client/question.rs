//! One question to an agent, and its answer: what whoever opens an image begins with, and all that others have to say.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::super::message::{Adopt, AgentStatus, FromAgent, FromMonitor};
use super::super::socket::PacketSocket;
use super::opening::ConnectError;

/// How long an answer is waited for.
pub(super) struct Patience<'a> {
    /// None: until somebody gives up.
    pub(super) deadline: Option<Duration>,
    pub(super) give_up: &'a dyn Fn() -> bool,
}

/// How often it is asked whether to give up; less than a second.
const LOOK: Duration = Duration::from_millis(50);

/// Asks the agent at `path` one thing, and returns what it answers, with the descriptors that come along.
pub(super) fn ask_once(
    path: &Path,
    question: &FromMonitor,
    files: &[BorrowedFd<'_>],
    patience: &Patience<'_>,
) -> Result<(FromAgent, Vec<OwnedFd>), ConnectError> {
    receive_answer(&ask(path, question, files, patience)?)
}

/// Asks the agent at `path`; the connection, once there is an answer to [receive](receive_answer).
pub(super) fn ask(
    path: &Path,
    question: &FromMonitor,
    files: &[BorrowedFd<'_>],
    patience: &Patience<'_>,
) -> Result<PacketSocket, ConnectError> {
    let socket = PacketSocket::connect(path).map_err(|source| ConnectError::Connect {
        path: path.to_owned(),
        source,
    })?;
    socket
        .send(&question.to_bytes(), files)
        .map_err(ConnectError::HungUp)?;
    wait_readable(&socket, patience)?;
    Ok(socket)
}

/// Reads an answer that is there.
pub(super) fn receive_answer(socket: &PacketSocket) -> Result<(FromAgent, Vec<OwnedFd>), ConnectError> {
    let mut message = Vec::new();
    let files = socket.receive(&mut message).map_err(ConnectError::HungUp)?;
    if message.is_empty() {
        return Err(ConnectError::HungUp(io::ErrorKind::UnexpectedEof.into()));
    }
    Ok((FromAgent::parse(&message)?, files))
}

fn wait_readable(socket: &PacketSocket, patience: &Patience<'_>) -> Result<(), ConnectError> {
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
    let patience = Patience {
        deadline: Some(deadline),
        give_up: &|| false,
    };
    match ask_once(path, &FromMonitor::Status, &[], &patience)?.0 {
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
    let bytes = file.metadata().map_err(ConnectError::Local)?.len();
    let patience = Patience {
        deadline: Some(ADOPTION.saturating_mul(1 + (bytes >> 30) as u32)),
        give_up,
    };
    match ask_once(path, &FromMonitor::Adopt(adopt), &[file.as_fd()], &patience)?.0 {
        FromAgent::Adopted => Ok(()),
        FromAgent::Refused(refused) => Err(ConnectError::NotAdopted(refused.reason)),
        _ => Err(ConnectError::Answer("nothing was asked but to take a file")),
    }
}
