//! The way to one machine's monitor: whoever has an answer sends it himself, and what finds no room is kept in order.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use runnel_snapshot::protocol::{FromAgent, FromMonitor, PacketSocket};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// Answers that are kept for a monitor that does not read them. There is one for each chunk it asked for; a monitor
/// that goes on asking without reading is hung up on.
const BACKLOG_MAX: usize = 1 << 20;

/// A connection to a monitor.
pub(super) struct Line {
    socket: PacketSocket,
    /// Answers for which there was no room; sent by the thread that [receives](Self::receive).
    backlog: Mutex<VecDeque<Vec<u8>>>,
    /// Wakes that thread: there is a backlog, or the end has come.
    wake: OwnedFd,
    ended: std::sync::atomic::AtomicBool,
}

/// Why a conversation ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ended {
    /// The monitor hung up, or this agent ends.
    #[error("it hung up")]
    HungUp,
    /// The socket failed.
    #[error("the connection broke")]
    Broken(#[from] io::Error),
    /// The monitor talks nonsense.
    #[error("it talks nonsense")]
    Nonsense(#[from] runnel_snapshot::protocol::BadMessage),
    /// The monitor asks and does not listen.
    #[error("it asked for more than {BACKLOG_MAX} chunks and reads no answers")]
    Deaf,
}

impl Line {
    pub(super) fn new(socket: PacketSocket) -> io::Result<Self> {
        Ok(Self {
            socket,
            backlog: Mutex::default(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            ended: std::sync::atomic::AtomicBool::new(false),
        })
    }

    /// The socket, for the first exchange, before any chunk is asked for.
    pub(super) fn socket(&self) -> &PacketSocket {
        &self.socket
    }

    /// Sends an answer: at once, if there is room.
    pub(super) fn send(&self, answer: &FromAgent) {
        let bytes = answer.to_bytes();
        let mut backlog = self.lock();
        // A monitor that hung up is noticed where it is listened to.
        if backlog.is_empty() && self.socket.try_send(&bytes).is_ok() {
            return;
        }
        backlog.push_back(bytes);
        drop(backlog);
        self.wake();
    }

    /// Ends the conversation.
    pub(super) fn hang_up(&self) {
        self.ended.store(true, std::sync::atomic::Ordering::Release);
        self.wake();
    }

    /// Whether it is to end.
    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(std::sync::atomic::Ordering::Acquire)
    }

    /// Whether it is to end, or the monitor has hung up.
    pub(super) fn is_over(&self) -> bool {
        let mut socket = [PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::empty())];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // A failure says nothing; what is sent in the end does.
        let has_hung_up = poll(&mut socket, Some(&now)).is_ok() && !socket[0].revents().is_empty();
        has_hung_up || self.has_ended()
    }

    /// Waits for the monitor's next message, and sends what was kept meanwhile. `message` is room to read into.
    pub(super) fn receive(&self, message: &mut Vec<u8>) -> Result<FromMonitor, Ended> {
        // No descriptor comes later than with the first message.
        self.receive_with_files(message).map(|(message, _)| message)
    }

    /// As [`receive`](Self::receive), with the descriptors that come along.
    pub(super) fn receive_with_files(
        &self,
        message: &mut Vec<u8>,
    ) -> Result<(FromMonitor, Vec<OwnedFd>), Ended> {
        loop {
            match self.socket.try_receive(message) {
                Ok(_) if message.is_empty() => return Err(Ended::HungUp),
                Ok(files) => return Ok((FromMonitor::parse(message)?, files)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(Ended::HungUp),
                Err(error) => return Err(error.into()),
            }
            if self.has_ended() {
                return Err(Ended::HungUp);
            }
            let mut events = PollFlags::IN;
            if !self.flush()? {
                events |= PollFlags::OUT;
            }
            let mut fds = [
                PollFd::from_borrowed_fd(self.socket.as_fd(), events),
                PollFd::new(&self.wake, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
            if !fds[1].revents().is_empty() {
                // Nothing to read means that somebody read it before, and there is one thread that does.
                let _ = rustix::io::read(&self.wake, &mut [0; 8]);
            }
        }
    }

    /// Sends what was kept as far as there is room; true if nothing is left.
    fn flush(&self) -> Result<bool, Ended> {
        let mut backlog = self.lock();
        if backlog.len() > BACKLOG_MAX {
            return Err(Ended::Deaf);
        }
        while let Some(bytes) = backlog.front() {
            match self.socket.try_send(bytes) {
                Ok(()) => drop(backlog.pop_front()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(_) => return Err(Ended::HungUp),
            }
        }
        Ok(true)
    }

    fn wake(&self) {
        // Fails only when the counter is full, and then the thread is being woken already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Vec<u8>>> {
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use runnel_snapshot::source::{Arrived, ChunkId, VolumeId};
    use runnel_snapshot::units::ChunkIndex;

    use super::*;

    #[test]
    fn answers_beyond_the_sockets_room_come_in_order() {
        let (ours, theirs) = PacketSocket::pair().unwrap();
        let line = Arc::new(Line::new(ours).unwrap());
        let answer = |number: u64| {
            let chunk = ChunkId {
                volume: VolumeId(0),
                chunk: ChunkIndex(number),
            };
            FromAgent::Arrived(vec![(chunk, Arrived::Data)])
        };
        for number in 0..5000 {
            line.send(&answer(number));
        }
        assert!(!line.lock().is_empty(), "there was room for all");
        let listening = Arc::clone(&line);
        let thread = std::thread::spawn(move || listening.receive(&mut Vec::new()).unwrap_err());
        let mut message = Vec::new();
        for number in 0..5000 {
            theirs.receive(&mut message).unwrap();
            assert_eq!(FromAgent::parse(&message).unwrap(), answer(number));
        }
        line.hang_up();
        assert!(matches!(thread.join().unwrap(), Ended::HungUp));
    }
}
