//! One connection to a server: opened within a deadline, read within another, TLS or not.
//!
//! It blocks its thread, and nothing else: a chunk's bytes go from the socket into the buffer where they are decoded,
//! with no other thread woken on the way.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};

use super::error::RemoteError;
use super::url::Origin;
use crate::traffic::Traffic;

/// The most addresses of one name that are tried.
const ADDRESSES_MAX: usize = 8;

/// What a server sends a second at least once it has begun, on each connection: one that trickles is as useless as one
/// that is silent. 24 readers may share a link of 6 kB/s.
const SLOWEST_BYTES_PER_SECOND: u64 = 256;

/// What a connection is opened with.
#[derive(Clone)]
pub(super) struct Dial {
    pub(super) origin: Origin,
    pub(super) tls: Option<Arc<ClientConfig>>,
    /// How long finding the address, connecting and shaking hands may each take.
    pub(super) connect_deadline: Duration,
    /// How long the server may be silent.
    pub(super) idle_deadline: Duration,
}

/// A connection between two requests, or in one.
pub(super) struct Connection {
    stream: Stream,
    /// Bytes that were read beyond what was asked for.
    pub(super) ahead: Vec<u8>,
    /// Whether a request was answered on it before: then it may have been closed meanwhile, which means nothing.
    pub(super) used: bool,
    window: Window,
}

/// How fast an answer comes: looked at each time that a server might have been silent for.
#[derive(Clone, Copy, Debug)]
struct Pace {
    /// How long nothing need come.
    idle_deadline: Duration,
    /// What has come since when, once something has.
    begun: Option<(Instant, u64)>,
}

impl Pace {
    fn new(idle_deadline: Duration) -> Self {
        Self {
            idle_deadline,
            begun: None,
        }
    }

    /// So many bytes more have come; fails if that was too slow.
    fn received(&mut self, bytes: usize, now: Instant) -> io::Result<()> {
        let Some((since, before)) = self.begun else {
            self.begun = Some((now, 0));
            return Ok(());
        };
        let bytes = before.saturating_add(bytes as u64);
        let passed = now.saturating_duration_since(since);
        if passed < self.idle_deadline {
            self.begun = Some((since, bytes));
            return Ok(());
        }
        if bytes as f64 >= passed.as_secs_f64() * SLOWEST_BYTES_PER_SECOND as f64 {
            self.begun = Some((now, 0));
            return Ok(());
        }
        let reason = format!("it sends too slowly: {bytes} bytes in {} s", passed.as_secs());
        Err(io::Error::new(io::ErrorKind::TimedOut, reason))
    }
}

/// How much a server may have sent and not yet acknowledged, as far as it can be guessed from here: its congestion
/// window begins with ten segments, grows by what is acknowledged, and falls back when nothing was sent for a while
/// (RFC 6928, RFC 5681 §4.1). What is longer takes another round trip.
#[derive(Clone, Copy, Debug)]
struct Window {
    bytes: u64,
    at: Instant,
}

impl Window {
    /// Ten segments of Ethernet, less the head of an answer.
    const FIRST_BYTES: u64 = 10 * 1448 - 480;
    /// Beyond, nothing is read that depends on it.
    const BYTES_MAX: u64 = 4 << 20;
    /// The shortest retransmission timeout, after which Linux counts a connection as idle.
    const KEPT: Duration = Duration::from_millis(200);

    fn new(now: Instant) -> Self {
        Self {
            bytes: Self::FIRST_BYTES,
            at: now,
        }
    }

    fn bytes(&self, now: Instant) -> u64 {
        match now.saturating_duration_since(self.at) < Self::KEPT {
            true => self.bytes,
            false => Self::FIRST_BYTES,
        }
    }

    fn received(&mut self, bytes: u64, now: Instant) {
        let before = self.bytes(now);
        // A window that was not half used does not grow: Linux's `tcp_is_cwnd_limited`, after RFC 7661.
        let grown = if bytes.saturating_mul(2) > before {
            bytes
        } else {
            0
        };
        self.bytes = before.saturating_add(grown).min(Self::BYTES_MAX);
        self.at = now;
    }
}

enum Stream {
    Plain(Counted),
    Tls(Box<StreamOwned<ClientConnection, Counted>>),
}

/// The socket, with what went over it counted: below TLS, which waits for whole records.
struct Counted {
    socket: TcpStream,
    traffic: Arc<Traffic>,
    pace: Pace,
}

impl Dial {
    /// Opens a connection; `traffic` counts what that takes.
    pub(super) fn connect(&self, traffic: &Arc<Traffic>) -> Result<Connection, RemoteError> {
        let failed = |source| RemoteError::Connect {
            origin: self.origin.clone(),
            source,
        };
        let socket = self.connect_any(&self.resolve()?).map_err(failed)?;
        socket.set_nodelay(true).map_err(failed)?;
        socket
            .set_write_timeout(Some(self.idle_deadline))
            .map_err(failed)?;
        let traffic = Arc::clone(traffic);
        let counted = Counted {
            socket,
            traffic,
            pace: Pace::new(self.connect_deadline),
        };
        let mut stream = match &self.tls {
            None => Stream::Plain(counted),
            Some(config) => {
                counted
                    .socket
                    .set_read_timeout(Some(self.connect_deadline))
                    .map_err(failed)?;
                Stream::Tls(Box::new(self.shake_hands(config, counted)?))
            }
        };
        stream
            .counted()
            .socket
            .set_read_timeout(Some(self.idle_deadline))
            .map_err(failed)?;
        stream.counted().pace = Pace::new(self.idle_deadline);
        Ok(Connection {
            stream,
            ahead: Vec::new(),
            used: false,
            window: Window::new(Instant::now()),
        })
    }

    /// The addresses of the host. The system's resolver has no deadline, so another thread waits for it.
    fn resolve(&self) -> Result<Vec<SocketAddr>, RemoteError> {
        let Origin { host, port, .. } = self.origin.clone();
        if let Ok(address) = host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(address, port)]);
        }
        let failed = |source| RemoteError::Resolve {
            origin: self.origin.clone(),
            source,
        };
        let (sender, found) = mpsc::sync_channel(1);
        let lookup = move || {
            let found = (host.as_str(), port).to_socket_addrs();
            // Nobody listens any more if it took too long.
            let _ = sender.send(found.map(|found| found.take(ADDRESSES_MAX).collect::<Vec<_>>()));
        };
        thread::Builder::new()
            .name("resolve".to_owned())
            .spawn(lookup)
            .map_err(failed)?;
        match found.recv_timeout(self.connect_deadline) {
            Ok(found) => found.map_err(failed),
            Err(_) => Err(failed(io::ErrorKind::TimedOut.into())),
        }
    }

    /// Tries one address after the other, together within the deadline.
    fn connect_any(&self, addresses: &[SocketAddr]) -> io::Result<TcpStream> {
        let until = Instant::now() + self.connect_deadline;
        let mut last = io::ErrorKind::AddrNotAvailable.into();
        for (number, address) in addresses.iter().enumerate() {
            let left = until.saturating_duration_since(Instant::now());
            let share = left / (addresses.len() - number) as u32;
            if share.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            match TcpStream::connect_timeout(address, share) {
                Ok(socket) => return Ok(socket),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn shake_hands(
        &self,
        config: &Arc<ClientConfig>,
        counted: Counted,
    ) -> Result<StreamOwned<ClientConnection, Counted>, RemoteError> {
        let origin = || self.origin.clone();
        let untrusted = |source| RemoteError::Untrusted {
            origin: origin(),
            source,
        };
        let name = ServerName::try_from(self.origin.host.clone())
            .map_err(|error| untrusted(io::Error::other(error)))?;
        let connection =
            ClientConnection::new(Arc::clone(config), name).map_err(crate::tls::TlsError::Setup)?;
        let mut stream = StreamOwned::new(connection, counted);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock).map_err(|source| {
                let cause = source
                    .get_ref()
                    .and_then(|cause| cause.downcast_ref::<rustls::Error>());
                match cause {
                    Some(rustls::Error::InvalidCertificate(reason)) if is_an_authoritys(reason) => {
                        RemoteError::Authority { origin: origin() }
                    }
                    Some(rustls::Error::InvalidCertificate(_)) => untrusted(source),
                    Some(rustls::Error::InvalidMessage(_)) => RemoteError::NoTls { origin: origin() },
                    _ => RemoteError::Connect {
                        origin: origin(),
                        source,
                    },
                }
            })?;
        }
        Ok(stream)
    }
}

/// Whether a certificate is refused since it is an authority's, though a server shows it as its own. rustls has no case
/// of its own for that: what webpki calls it is all there is.
fn is_an_authoritys(reason: &rustls::CertificateError) -> bool {
    matches!(reason, rustls::CertificateError::Other(other) if other.to_string().contains("CaUsedAsEndEntity"))
}

impl Connection {
    /// A connection over which these bytes come and then its end: for whoever feeds it strange ones. They must fit into
    /// a socket.
    pub(super) fn of_bytes(bytes: &[u8]) -> io::Result<Self> {
        let (near, far) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let mut far = TcpStream::from(far);
        far.set_nonblocking(true)?;
        far.write_all(bytes)?;
        let counted = Counted {
            // A stream socket of another family: nothing here asks for what TCP alone has.
            socket: TcpStream::from(near),
            traffic: Arc::default(),
            pace: Pace::new(Duration::from_secs(1)),
        };
        Ok(Self {
            stream: Stream::Plain(counted),
            ahead: Vec::new(),
            used: false,
            window: Window::new(Instant::now()),
        })
    }

    /// Counts what goes over it from now on for somebody else.
    pub(super) fn count_in(&mut self, traffic: &Arc<Traffic>) {
        self.stream.counted().traffic = Arc::clone(traffic);
    }

    /// What may come within one round trip, if it is asked for now.
    pub(super) fn window_bytes(&self) -> u64 {
        self.window.bytes(Instant::now())
    }

    /// An answer of so many bytes was read.
    pub(super) fn widen(&mut self, bytes: u64) {
        self.window.received(bytes, Instant::now());
    }

    /// Sends a request's head in one piece.
    pub(super) fn send(&mut self, head: &[u8]) -> io::Result<()> {
        self.stream.counted().pace.begun = None;
        self.stream.write_all(head)?;
        self.stream.flush()
    }

    /// Reads what there is: bytes that were read ahead, else from the socket.
    pub(super) fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if !self.ahead.is_empty() {
            let count = self.ahead.len().min(into.len());
            into[..count].copy_from_slice(&self.ahead[..count]);
            self.ahead.drain(..count);
            return Ok(count);
        }
        loop {
            match self.stream.read(into) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // What a socket's deadline looks like.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "nothing came for too long",
                    ));
                }
                read => return read,
            }
        }
    }

    /// Reads more into `ahead`; false at the end.
    pub(super) fn read_ahead(&mut self, bytes: usize) -> io::Result<bool> {
        let kept = std::mem::take(&mut self.ahead);
        let mut more = vec![0; bytes];
        let read = self.read(&mut more);
        self.ahead = kept;
        let count = read?;
        self.ahead.extend_from_slice(&more[..count]);
        Ok(count > 0)
    }
}

impl Stream {
    fn counted(&mut self) -> &mut Counted {
        match self {
            Self::Plain(counted) => counted,
            Self::Tls(stream) => &mut stream.sock,
        }
    }
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(counted) => counted.read(into),
            Self::Tls(stream) => stream.read(into),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(counted) => counted.write(from),
            Self::Tls(stream) => stream.write(from),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(counted) => counted.flush(),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

impl Read for Counted {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.socket.read(into)?;
        self.traffic.add_received(count);
        self.pace.received(count, Instant::now())?;
        Ok(count)
    }
}

impl Write for Counted {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let count = self.socket.write(from)?;
        self.traffic.add_sent(count);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trickle_is_too_slow_once_silence_would_be_however_fast_it_began() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut pace = Pace::new(Duration::from_secs(10));
        // However long it took until it began.
        pace.received(1 << 20, at(9)).unwrap();
        pace.received(1 << 20, at(19)).unwrap();
        pace.received(1, at(28)).unwrap();
        let error = pace.received(1, at(29)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(error.to_string(), "it sends too slowly: 2 bytes in 10 s");
        // A slow link is none too slow.
        let mut pace = Pace::new(Duration::from_secs(10));
        for second in 0..120 {
            pace.received(300, at(second)).unwrap();
        }
    }

    #[test]
    fn a_window_grows_with_what_was_read_and_is_forgotten_when_nothing_is() {
        let start = Instant::now();
        let mut window = Window::new(start);
        let soon = start + Duration::from_millis(100);
        window.received(40_000, soon);
        assert_eq!(
            window.bytes(soon + Duration::from_millis(199)),
            Window::FIRST_BYTES + 40_000
        );
        assert_eq!(
            window.bytes(soon + Duration::from_millis(200)),
            Window::FIRST_BYTES
        );
        window.received(Window::FIRST_BYTES / 2, soon + Duration::from_millis(300));
        assert_eq!(
            window.bytes(soon + Duration::from_millis(300)),
            Window::FIRST_BYTES
        );
        window.received(u64::MAX, soon);
        assert_eq!(window.bytes(soon), Window::BYTES_MAX);
    }
}
