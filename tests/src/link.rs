//! A link to a server that goes wrong as a test says: a relay of HTTP/1.1 that knows where answers end, and so can
//! cut them short, lie about their length, change a byte, crawl or fall silent.
//!
//! Requests and the server's own answers pass unchanged otherwise. Only bodies of blobs go wrong: what is asked of them
//! while a machine is opened too.

use std::io::{self, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// So much is passed on at once, and paid for if the link crawls.
const PIECE: usize = 4096;

/// By so many bytes a length is wrong.
const OFF_BY: usize = 7;

/// What becomes of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// The connection ends in the middle of the body.
    Dropped,
    /// It says that it is longer than what comes, and then the connection ends.
    TooLong,
    /// It says that it is shorter than what comes.
    TooShort,
    /// It is another, shorter answer, right in itself, than was asked for.
    Truncated,
    /// One bit in its middle is another.
    Flipped,
    /// After its head nothing comes until [`Link::heal`] is called; then the connection ends.
    Silent,
}

impl Wrong {
    /// What a link may do to an answer that ends by itself.
    pub const ENDING: [Self; 5] = [
        Self::Dropped,
        Self::TooLong,
        Self::TooShort,
        Self::Truncated,
        Self::Flipped,
    ];
}

#[derive(Default)]
struct State {
    /// What goes wrong, and how often still.
    wrong: Option<(Wrong, usize)>,
    /// How many answers went wrong.
    count: usize,
    /// How many bytes a second pass, if not all that there are.
    rate: Option<u64>,
    /// Until when the link is busy.
    busy_until: Option<Instant>,
    open: Vec<TcpStream>,
    is_over: bool,
}

struct Shared {
    server: SocketAddr,
    state: Mutex<State>,
    healed: Condvar,
}

/// The link, until it is dropped.
pub struct Link {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Link {
    /// A link of this host's loopback to `server`, with which nothing is wrong.
    ///
    /// # Panics
    /// When there is no port to be had.
    #[must_use]
    pub fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port to listen at");
        let address = listener.local_addr().expect("a listener has an address");
        let shared = Arc::new(Shared {
            server,
            state: Mutex::default(),
            healed: Condvar::new(),
        });
        let relays = Arc::clone(&shared);
        let thread = thread::spawn(move || relays.accept(&listener));
        Self {
            address,
            shared,
            thread: Some(thread),
        }
    }

    /// Where the server is to be asked for.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Has so many answers go wrong from now on.
    pub fn go_wrong(&self, how: Wrong, times: usize) {
        self.shared.lock().wrong = Some((how, times));
    }

    /// Nothing goes wrong any more, however fast or slow the link is.
    pub fn heal(&self) {
        self.shared.lock().wrong = None;
        self.shared.healed.notify_all();
    }

    /// Lets no more than so many bytes a second pass, on all connections together.
    pub fn crawl(&self, bytes_per_second: u64) {
        self.shared.lock().rate = Some(bytes_per_second);
    }

    /// Lets everything pass as it comes.
    pub fn run(&self) {
        let mut state = self.shared.lock();
        state.rate = None;
        state.busy_until = None;
    }

    /// How many answers went wrong so far.
    #[must_use]
    pub fn went_wrong(&self) -> usize {
        self.shared.lock().count
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let open = {
            let mut state = self.shared.lock();
            state.is_over = true;
            std::mem::take(&mut state.open)
        };
        self.shared.healed.notify_all();
        for stream in open {
            // It may be closed already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        // One more connection, so that the thread that accepts them looks.
        drop(TcpStream::connect(self.address));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(self: &Arc<Self>, listener: &TcpListener) {
        while let Ok((client, _)) = listener.accept() {
            if self.lock().is_over {
                return;
            }
            let Ok(server) = TcpStream::connect(self.server) else {
                // As a link would whose other end is away.
                continue;
            };
            let both = [&client, &server].map(TcpStream::try_clone);
            self.lock().open.extend(both.into_iter().flatten());
            let shared = Arc::clone(self);
            thread::spawn(move || {
                // However it ends, both ends are told by closing.
                let _ = shared.relay(&client, &server);
                let _ = client.shutdown(Shutdown::Both);
                let _ = server.shutdown(Shutdown::Both);
            });
        }
    }

    /// Passes on requests and their answers until either end has enough, or an answer went wrong that ends it.
    fn relay(&self, client: &TcpStream, server: &TcpStream) -> io::Result<()> {
        let mut requests = BufReader::new(client);
        let mut answers = BufReader::new(server);
        while let Some(request) = read_head(&mut requests)? {
            (&*server).write_all(request.as_bytes())?;
            let Some(head) = read_head(&mut answers)? else {
                return Ok(());
            };
            let has_body = !request.starts_with("HEAD ");
            let length = if has_body { length_of(&head) } else { 0 };
            let mut body = vec![0; length];
            answers.read_exact(&mut body)?;
            let is_blob = request.contains("/blobs/") && head.starts_with("HTTP/1.1 20") && length > OFF_BY;
            match is_blob.then(|| self.next_wrong()).flatten() {
                None => {
                    (&*client).write_all(head.as_bytes())?;
                    self.send(client, &body)?;
                }
                Some(wrong) if self.send_wrong(wrong, client, &head, body)? => {}
                Some(_) => return Ok(()),
            }
        }
        Ok(())
    }

    fn next_wrong(&self) -> Option<Wrong> {
        let mut state = self.lock();
        let (wrong, times) = state.wrong?;
        state.wrong = (times > 1).then_some((wrong, times - 1));
        state.count += 1;
        Some(wrong)
    }

    /// Whether the connection goes on.
    fn send_wrong(
        &self,
        wrong: Wrong,
        mut client: &TcpStream,
        head: &str,
        mut body: Vec<u8>,
    ) -> io::Result<bool> {
        let (whole, half) = (body.len(), body.len() / 2);
        match wrong {
            Wrong::Dropped => {
                client.write_all(head.as_bytes())?;
                self.send(client, &body[..half])?;
                Ok(false)
            }
            Wrong::TooLong => {
                client.write_all(with_length(head, whole + OFF_BY).as_bytes())?;
                self.send(client, &body)?;
                Ok(false)
            }
            Wrong::TooShort => {
                client.write_all(with_length(head, whole - OFF_BY).as_bytes())?;
                self.send(client, &body)?;
                Ok(true)
            }
            Wrong::Truncated => {
                client.write_all(with_range(&with_length(head, half), whole - half).as_bytes())?;
                self.send(client, &body[..half])?;
                Ok(true)
            }
            Wrong::Flipped => {
                body[half] ^= 1;
                client.write_all(head.as_bytes())?;
                self.send(client, &body)?;
                Ok(true)
            }
            Wrong::Silent => {
                client.write_all(head.as_bytes())?;
                let is_silent = |state: &mut State| !state.is_over && state.wrong.is_some();
                drop(
                    self.healed
                        .wait_while(self.lock(), is_silent)
                        .unwrap_or_else(PoisonError::into_inner),
                );
                Ok(false)
            }
        }
    }

    fn send(&self, mut client: &TcpStream, body: &[u8]) -> io::Result<()> {
        for piece in body.chunks(PIECE) {
            self.pay_for(piece.len());
            client.write_all(piece)?;
        }
        Ok(())
    }

    /// Waits until so many bytes may pass.
    fn pay_for(&self, bytes: usize) {
        let until = {
            let mut state = self.lock();
            let Some(rate) = state.rate else { return };
            let begin = state.busy_until.unwrap_or_else(Instant::now).max(Instant::now());
            let until = begin + Duration::from_secs_f64(bytes as f64 / rate as f64);
            state.busy_until = Some(until);
            until
        };
        thread::sleep(until.saturating_duration_since(Instant::now()));
    }
}

/// A request's or an answer's head with the empty line behind it; `None` if the connection has ended.
fn read_head(stream: &mut impl io::BufRead) -> io::Result<Option<String>> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head)? == 0 {
            return Ok(None);
        }
    }
    Ok(Some(head))
}

fn length_of(head: &str) -> usize {
    let lines = head.lines().filter_map(|line| line.split_once(':'));
    let mut lengths = lines.filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    lengths
        .next()
        .and_then(|(_, length)| length.trim().parse().ok())
        .unwrap_or(0)
}

fn with_length(head: &str, length: usize) -> String {
    change(head, "content-length", |_| length.to_string())
}

/// The head of an answer whose range is so many bytes shorter.
fn with_range(head: &str, shorter: usize) -> String {
    change(head, "content-range", |range| {
        let parts = range.trim().split_once('/').and_then(|(range, all)| {
            let (first, last) = range.rsplit_once('-')?;
            Some((first, last.parse::<usize>().ok()?, all))
        });
        match parts {
            Some((first, last, all)) => format!("{first}-{}/{all}", last - shorter),
            None => range.to_owned(),
        }
    })
}

fn change(head: &str, field: &str, new: impl Fn(&str) -> String) -> String {
    let lines = head.split("\r\n").map(|line| match line.split_once(':') {
        Some((name, value)) if name.eq_ignore_ascii_case(field) => format!("{name}: {}", new(value)),
        _ => line.to_owned(),
    });
    lines.collect::<Vec<_>>().join("\r\n")
}
