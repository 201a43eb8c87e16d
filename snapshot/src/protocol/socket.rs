//! A packet socket: whole messages, with descriptors.

use std::io;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect,
    listen, recvmsg, sendmsg, socket_with, socketpair,
};

use super::message::{MESSAGE_BYTES_MAX, VOLUMES_MAX};

/// The most descriptors that come with one message: state, manifest, and a page file a volume.
const DESCRIPTORS_MAX: usize = VOLUMES_MAX + 2;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;

/// One end of a connection.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = new_socket()?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(Self(socket))
    }

    /// Two ends of a new connection.
    ///
    /// # Errors
    /// When the process has too many descriptors.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Self(one), Self(other)))
    }

    /// Sends a message with descriptors; waits for room.
    ///
    /// # Errors
    /// When the other end has hung up.
    pub fn send(&self, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_with(bytes, files, SendFlags::NOSIGNAL)
    }

    /// Sends a message if there is room for it now, else fails with [`io::ErrorKind::WouldBlock`].
    ///
    /// # Errors
    /// When there is no room, or the other end has hung up.
    pub fn try_send(&self, bytes: &[u8]) -> io::Result<()> {
        self.send_with(bytes, &[], SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
    }

    fn send_with(&self, bytes: &[u8], files: &[BorrowedFd<'_>], flags: SendFlags) -> io::Result<()> {
        debug_assert!(bytes.len() <= MESSAGE_BYTES_MAX && files.len() <= DESCRIPTORS_MAX);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(files)) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "too many descriptors for one message",
            ));
        }
        loop {
            match sendmsg(&self.0, &[IoSlice::new(bytes)], &mut ancillary, flags) {
                Ok(_) => return Ok(()), // a packet goes whole or not at all
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits for a message and puts its bytes into `message`, which is empty when the other end has hung up. Returns the
    /// descriptors that came with it. `message` is best used again: its room is kept.
    ///
    /// # Errors
    /// When the connection broke, or a message is longer than any may be.
    pub fn receive(&self, message: &mut Vec<u8>) -> io::Result<Vec<OwnedFd>> {
        self.receive_with(message, RecvFlags::CMSG_CLOEXEC)
    }

    /// Takes a message if there is one, else fails with [`io::ErrorKind::WouldBlock`].
    ///
    /// # Errors
    /// As [`receive`](Self::receive).
    pub fn try_receive(&self, message: &mut Vec<u8>) -> io::Result<Vec<OwnedFd>> {
        self.receive_with(message, RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT)
    }

    fn receive_with(&self, message: &mut Vec<u8>, flags: RecvFlags) -> io::Result<Vec<OwnedFd>> {
        message.resize(MESSAGE_BYTES_MAX, 0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            match recvmsg(&self.0, &mut [IoSliceMut::new(message)], &mut ancillary, flags) {
                Ok(received) => break received,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    message.clear();
                    return Err(error.into());
                }
            }
        };
        let files = ancillary.drain().filter_map(|part| match part {
            RecvAncillaryMessage::ScmRights(files) => Some(files),
            _ => None,
        });
        let files = files.flatten().collect();
        if received
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a message longer than any may be",
            ));
        }
        message.truncate(received.bytes);
        Ok(files)
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A socket in the file system that monitors connect to, for its owner alone.
#[derive(Debug)]
pub struct PacketListener {
    socket: OwnedFd,
    path: PathBuf,
}

impl PacketListener {
    /// Listens at `path`. The socket that a dead predecessor left there is replaced; where somebody still listens, or
    /// something else lies, it fails.
    ///
    /// # Errors
    /// When somebody listens there already, something else is there, or the socket cannot be made.
    pub fn bind(path: &Path) -> io::Result<Self> {
        if PacketSocket::connect(path).is_ok() {
            let message = format!("somebody already listens at {}", path.display());
            return Err(io::Error::new(io::ErrorKind::AddrInUse, message));
        }
        match std::fs::symlink_metadata(path) {
            Ok(about) if about.file_type().is_socket() => std::fs::remove_file(path)?,
            Ok(_) => {
                let message = format!("{} is there, and is no socket: name another path", path.display());
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, message));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let socket = new_socket()?;
        // Before it has a name: Linux gives the name the mode of the socket, so nobody else ever could connect.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        bind(&socket, &SocketAddrUnix::new(path)?)?;
        listen(&socket, BACKLOG)?;
        Ok(Self {
            socket,
            path: path.to_owned(),
        })
    }

    /// Waits for a connection.
    ///
    /// # Errors
    /// When the process has too many descriptors, for instance.
    pub fn accept(&self) -> io::Result<PacketSocket> {
        loop {
            match accept_with(&self.socket, SocketFlags::CLOEXEC) {
                Ok(socket) => return Ok(PacketSocket(socket)),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for PacketListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for PacketListener {
    fn drop(&mut self) {
        // Whoever comes next replaces it if this fails.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn new_socket() -> io::Result<OwnedFd> {
    Ok(socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_listening_socket_is_its_owners_alone_replaces_a_dead_one_and_yields_to_a_living_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent.sock");
        std::fs::write(&path, "somebody's").unwrap();
        assert_eq!(
            PacketListener::bind(&path).unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"somebody's");
        std::fs::remove_file(&path).unwrap();
        // Its name outlives it.
        drop(UnixListener::bind(&path).unwrap());
        let listener = PacketListener::bind(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(
            PacketListener::bind(&path).unwrap_err().kind(),
            io::ErrorKind::AddrInUse
        );
        drop(listener);
        assert!(!path.exists());
    }
}
