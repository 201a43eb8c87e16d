//! A monitor without KVM, and a client that shows what comes over the socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::api::{ApiServer, ApiSocket, BODY_BYTES_MAX};
use crate::config::MicrovmConfig;
use crate::control::fake::FakeEngine;
use crate::control::{Control, Inbox, Status, run};
use crate::exit::ExitCode;
use crate::logger::Logger;

/// A monitor without KVM.
pub(super) struct Monitor {
    server: Option<ApiServer>,
    control: Option<JoinHandle<ExitCode>>,
    inbox: Arc<Inbox>,
    path: PathBuf,
    _folder: TempDir,
}

impl Monitor {
    pub(super) fn start(engine: FakeEngine) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let status = Status::new("test".parse().unwrap());
        let inbox = Inbox::new().unwrap();
        let socket = ApiSocket::bind(&path).unwrap();
        let server = ApiServer::start(socket, inbox.clone(), status.clone(), BODY_BYTES_MAX).unwrap();
        let requests = inbox.clone();
        let control = std::thread::spawn(move || {
            let logger = Logger::new("test".parse().unwrap());
            let set_logger = Box::new(move |body| Ok(logger.update(&body)?));
            let mut control = Control::new(engine, requests, status, MicrovmConfig::default(), set_logger);
            run(&mut control).unwrap()
        });
        Self {
            server: Some(server),
            control: Some(control),
            inbox,
            path,
            _folder: folder,
        }
    }

    pub(super) fn connect(&self) -> Client {
        Client {
            stream: BufReader::new(UnixStream::connect(&self.path).unwrap()),
        }
    }

    pub(super) fn ask(&self, verb: &str, path: &str, body: &Value) -> (u16, Value) {
        self.connect().ask(verb, path, body)
    }

    /// A machine that runs.
    pub(super) fn started(self) -> Self {
        let boot = json!({"kernel_image_path": "/proc/self/exe"});
        assert_eq!(self.ask("PUT", "/boot-source", &boot).0, 204);
        assert_eq!(
            self.ask("PUT", "/actions", &json!({"action_type": "InstanceStart"}))
                .0,
            204
        );
        self
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.inbox.end();
        if let Some(control) = self.control.take() {
            control.join().unwrap();
        }
        if let Some(server) = self.server.take() {
            server.stop();
        }
        assert!(!self.path.exists(), "the socket is still there");
    }
}

pub(super) struct Client {
    pub(super) stream: BufReader<UnixStream>,
}

impl Client {
    pub(super) fn ask(&mut self, verb: &str, path: &str, body: &Value) -> (u16, Value) {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        self.send(&format!(
            "{verb} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ));
        let (status, _, body) = self.receive();
        (status, body)
    }

    pub(super) fn send(&mut self, text: &str) {
        self.stream.get_mut().write_all(text.as_bytes()).unwrap();
    }

    /// Status, head and body of one answer.
    pub(super) fn receive(&mut self) -> (u16, String, Value) {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert_ne!(
                self.stream.read_line(&mut head).unwrap(),
                0,
                "the connection was closed: {head:?}"
            );
        }
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let length = head.to_ascii_lowercase().lines().find_map(|line| {
            line.strip_prefix("content-length: ")
                .map(|length| length.parse().unwrap())
        });
        let mut body = vec![0; length.unwrap_or(0)];
        self.stream.read_exact(&mut body).unwrap();
        let body = if body.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(&body).unwrap()
        };
        (status, head, body)
    }
}
