//! A server that answers as a test says: also wrong, late, or not at all.

#![allow(
    dead_code,
    reason = "each test file is a program of its own and uses what it needs"
)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// A request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) target: String,
    head: String,
    /// How many requests came before it, on all connections.
    pub(crate) number: usize,
    /// Which connection, counted from 0.
    pub(crate) connection: usize,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    /// First and last byte of its range.
    pub(crate) fn range(&self) -> Option<(usize, usize)> {
        let (first, last) = self.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().unwrap(), last.parse().unwrap()))
    }
}

/// What to do with a request.
pub(crate) enum Reply {
    /// Send these bytes and go on.
    Keep(Vec<u8>),
    /// Send these bytes and close.
    Close(Vec<u8>),
    /// Send these bytes, and nothing more while the client waits.
    Hang(Vec<u8>),
    /// Send these bytes one by one, that much apart, as long as the client takes them.
    Trickle(Vec<u8>, Duration),
}

impl Reply {
    pub(crate) fn status(line: &str, headers: &[&str]) -> Self {
        Self::Keep(message(line, headers, b""))
    }

    pub(crate) fn ok(body: &[u8]) -> Self {
        Self::Keep(message("200 OK", &[], body))
    }

    /// The part of `whole` that was asked for.
    pub(crate) fn part(request: &Request, whole: &[u8]) -> Self {
        let (first, last) = request.range().expect("a range");
        let range = format!("Content-Range: bytes {first}-{last}/{}", whole.len());
        Self::Keep(message("206 Partial Content", &[&range], &whole[first..=last]))
    }
}

/// An answer with its length.
pub(crate) fn message(status: &str, headers: &[&str], body: &[u8]) -> Vec<u8> {
    let mut text = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n", body.len());
    for header in headers {
        text += header;
        text += "\r\n";
    }
    text += "\r\n";
    [text.as_bytes(), body].concat()
}

type Script = dyn Fn(&Request) -> Reply + Send + Sync;

struct Shared {
    script: Box<Script>,
    requests: Mutex<Vec<Request>>,
    open: Mutex<Vec<TcpStream>>,
    over: AtomicBool,
}

/// The server, until it is dropped.
pub(crate) struct Scripted {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Scripted {
    pub(crate) fn start(script: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            script: Box::new(script),
            requests: Mutex::default(),
            open: Mutex::default(),
            over: AtomicBool::new(false),
        });
        let serving = Arc::clone(&shared);
        let thread = thread::spawn(move || serving.accept(&listener));
        Self {
            address,
            shared,
            thread: Some(thread),
        }
    }

    pub(crate) fn base(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.shared.requests.lock().unwrap().clone()
    }

    /// Closes every connection there is now.
    pub(crate) fn hang_up(&self) {
        for stream in self.shared.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(std::net::Shutdown::Both); // it may be closed already
        }
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        // One more connection, so that the accepting thread looks.
        drop(TcpStream::connect(self.address));
        self.hang_up();
        self.thread.take().unwrap().join().unwrap();
    }
}

impl Shared {
    fn accept(self: &Arc<Self>, listener: &TcpListener) {
        for number in 0.. {
            let (stream, _) = listener.accept().unwrap();
            if self.over.load(Ordering::SeqCst) {
                return;
            }
            self.open.lock().unwrap().push(stream.try_clone().unwrap());
            let shared = Arc::clone(self);
            thread::spawn(move || shared.converse(stream, number));
        }
    }

    fn converse(&self, mut stream: TcpStream, connection: usize) {
        while let Some(head) = read_head(&mut stream) {
            let request = {
                let mut requests = self.requests.lock().unwrap();
                let request = Request {
                    target: head.split(' ').nth(1).unwrap().to_owned(),
                    head,
                    number: requests.len(),
                    connection,
                };
                requests.push(request.clone());
                request
            };
            match (self.script)(&request) {
                Reply::Keep(bytes) => {
                    if stream.write_all(&bytes).is_err() {
                        return;
                    }
                }
                Reply::Close(bytes) => {
                    let _ = stream.write_all(&bytes); // the client may have gone first
                    let _ = stream.shutdown(std::net::Shutdown::Both);
                    return;
                }
                Reply::Hang(bytes) => {
                    let _ = stream.write_all(&bytes);
                    let _ = stream.read(&mut [0]); // until the client gives up
                    return;
                }
                Reply::Trickle(bytes, apart) => {
                    for byte in bytes {
                        if stream.write_all(&[byte]).is_err() {
                            return;
                        }
                        thread::sleep(apart);
                    }
                }
            }
        }
    }
}

fn read_head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte).ok()? == 0 {
            return None;
        }
        head.push(byte[0]);
    }
    String::from_utf8(head).ok()
}
