//! The console at a unix socket: one client at a time. What the guest printed while nobody was there, or faster than
//! the client reads, is kept up to a limit.
//!
//! Output goes out at once where the socket takes it. Otherwise it waits in a queue which the console's thread sends
//! on, so that a slow client holds up no vCPU before the queue is full.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::input::{Source, Wait};
use super::{QUEUE_BYTES_MAX, READER_WAIT};

/// The socket, and who is there.
#[derive(Debug)]
pub(super) struct ConsoleSocket {
    path: PathBuf,
    listener: UnixListener,
    /// Held for calls that do not block. No other lock is taken under it.
    line: Mutex<Line>,
    /// Told when the queue is no longer full.
    room: Condvar,
    /// Tells the console's thread that something is in the queue, or that a client has come.
    wake: EventFd,
}

#[derive(Debug, Default)]
struct Line {
    client: Option<UnixStream>,
    queue: VecDeque<u8>,
    /// The client has read nothing for [`READER_WAIT`]: until it does, a full queue loses what comes at once.
    is_given_up: bool,
}

impl ConsoleSocket {
    pub(super) fn bind(path: &Path) -> io::Result<Self> {
        let wake = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let listener = UnixListener::bind(path)?;
        let socket = Self {
            path: path.to_owned(),
            listener,
            line: Mutex::default(),
            room: Condvar::new(),
            wake,
        };
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        socket.listener.set_nonblocking(true)?;
        Ok(socket)
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        if line.client.is_none()
            && let Ok((client, _)) = self.listener.accept()
        {
            line.client = Some(client);
            line.is_given_up = false;
            line.send_queue();
            // The console's thread may be waiting at the listener, where nobody is any more: it is to wait for the
            // client instead. Fails only if the counter is full, and then it is awake.
            let _ = self.wake.write(1);
        }
        line
    }
}

impl Line {
    /// Sends as much of the queue as the socket takes. A client that is gone leaves the rest to the next one.
    fn send_queue(&mut self) {
        while let Some(client) = &self.client {
            let (front, _) = self.queue.as_slices();
            if front.is_empty() {
                return;
            }
            match send(client, front, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => {
                    self.queue.drain(..sent);
                    self.is_given_up = false;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => self.client = None,
            }
        }
    }

    fn is_full(&self) -> bool {
        self.queue.len() >= QUEUE_BYTES_MAX
    }

    /// Makes room for what is newer, where nobody is there who could read it.
    fn forget_oldest(&mut self) {
        let too_many = self.queue.len().saturating_sub(QUEUE_BYTES_MAX);
        self.queue.drain(..too_many);
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        // Whoever has knocked and was not let in yet hears what is left: a guest may have ended that soon.
        drop(self.line());
        // It may have been removed by whoever made its folder.
        let _ = fs::remove_file(&self.path);
    }
}

/// The guest's output.
pub(super) struct SocketSink(pub(super) Arc<ConsoleSocket>);

impl Write for SocketSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let is_full_for_a_client = |line: &Line| line.client.is_some() && line.is_full();
        let (mut line, _) = self
            .0
            .room
            .wait_timeout_while(self.0.line(), READER_WAIT, |line| {
                is_full_for_a_client(line) && !line.is_given_up
            })
            .unwrap_or_else(PoisonError::into_inner);
        if is_full_for_a_client(&line) {
            line.is_given_up = true;
            return Err(io::ErrorKind::WouldBlock.into());
        }
        line.queue.extend(bytes);
        line.send_queue();
        line.forget_oldest();
        if line.client.is_some() && !line.queue.is_empty() {
            // Fails only if the counter is full: the thread is awake then.
            let _ = self.0.wake.write(1);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Source for Arc<ConsoleSocket> {
    fn wait(&self) -> Option<Wait> {
        let line = self.line();
        let fd: RawFd = line
            .client
            .as_ref()
            .map_or(self.listener.as_raw_fd(), AsRawFd::as_raw_fd);
        let to_write = line.client.is_some() && !line.queue.is_empty();
        Some(Wait { fd, to_write })
    }

    fn wake(&self) -> Option<&EventFd> {
        Some(&self.wake)
    }

    fn send(&mut self) {
        self.line().send_queue();
        self.room.notify_all();
    }

    fn take(&mut self, buffer: &mut [u8]) -> usize {
        let mut line = self.line();
        let Some(client) = &line.client else { return 0 };
        // What made the thread look may have been the client's coming: there need not be anything to read.
        match recv(client, buffer, RecvFlags::DONTWAIT) {
            Ok((0, _)) => line.client = None,
            Ok((bytes, _)) => return bytes,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => line.client = None,
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn a_client_that_comes_late_is_told_what_was_printed_and_the_socket_goes_with_the_console() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let socket = Arc::new(ConsoleSocket::bind(&path).unwrap());
        let mut sink = SocketSink(Arc::clone(&socket));
        sink.write_all(b"early ").unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        sink.write_all(b"late").unwrap();
        let mut heard = [0; 10];
        client.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"early late");

        drop((sink, socket));
        assert!(!path.exists());
    }

    #[test]
    fn a_client_that_came_just_before_the_end_is_told_what_was_printed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let socket = Arc::new(ConsoleSocket::bind(&path).unwrap());
        let mut sink = SocketSink(Arc::clone(&socket));
        sink.write_all(b"and off").unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        drop((sink, socket));
        let mut heard = String::new();
        client.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "and off");
    }

    #[test]
    fn only_the_end_of_what_nobody_heard_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let socket = Arc::new(ConsoleSocket::bind(&folder.path().join("console")).unwrap());
        let mut sink = SocketSink(Arc::clone(&socket));
        sink.write_all(&vec![b'a'; QUEUE_BYTES_MAX]).unwrap();
        sink.write_all(b"end").unwrap();
        let line = socket.line();
        assert_eq!(line.queue.len(), QUEUE_BYTES_MAX);
        assert!(line.queue.iter().rev().take(3).eq(b"dne"));
    }

    #[test]
    fn a_slow_client_loses_nothing_that_fits_into_the_queue() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let mut socket = Arc::new(ConsoleSocket::bind(&path).unwrap());
        let mut client = UnixStream::connect(&path).unwrap();
        let mut sink = SocketSink(Arc::clone(&socket));
        // One byte at a time fills the socket's buffer long before so many bytes are in it.
        let said: Vec<u8> = (0..100_000u32).map(|number| number as u8).collect();
        for byte in &said {
            sink.write_all(&[*byte]).unwrap();
        }
        assert!(socket.wait().unwrap().to_write);
        let mut heard = vec![0; said.len()];
        let mut got = 0;
        while got < heard.len() {
            got += client.read(&mut heard[got..]).unwrap();
            socket.send();
        }
        assert!(heard == said);
        assert!(!socket.wait().unwrap().to_write);
    }

    #[test]
    fn a_client_that_reads_nothing_is_waited_for_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let socket = Arc::new(ConsoleSocket::bind(&path).unwrap());
        let mut client = UnixStream::connect(&path).unwrap();
        let mut sink = SocketSink(Arc::clone(&socket));
        while sink.write(&[b'a'; 1024]).is_ok() {}
        assert!(socket.line().is_given_up, "the next byte would wait again");

        let mut heard = vec![0; QUEUE_BYTES_MAX];
        client.read_exact(&mut heard[..64 << 10]).unwrap();
        Arc::clone(&socket).send();
        assert!(!socket.line().is_given_up);
        sink.write_all(b"there is room again").unwrap();
    }

    #[test]
    fn a_client_that_the_guests_output_met_first_is_listened_to_all_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let socket = Arc::new(ConsoleSocket::bind(&path).unwrap());
        let at_the_listener = socket.wait().unwrap().fd;
        let _client = UnixStream::connect(&path).unwrap();
        SocketSink(Arc::clone(&socket)).write_all(b"hello").unwrap();
        assert!(
            socket.wake.read().is_ok(),
            "whoever waits at the listener waits for ever"
        );
        assert_ne!(socket.wait().unwrap().fd, at_the_listener);
    }

    #[test]
    fn input_comes_from_the_client_and_a_client_that_leaves_makes_room_for_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let socket = Arc::new(ConsoleSocket::bind(&path).unwrap());
        let mut source = Arc::clone(&socket);
        let mut buffer = [0; 8];
        for _ in 0..2 {
            let mut client = UnixStream::connect(&path).unwrap();
            assert!(source.wait().is_some());
            client.write_all(b"key").unwrap();
            assert_eq!(source.take(&mut buffer), 3);
            drop(client);
            assert_eq!(source.take(&mut buffer), 0);
        }
    }
}
