//! The monitor's API, asked over its unix socket: one HTTP/1.1 exchange a connection, by hand, since a request and an
//! answer of some KiB are all there is.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use crate::fault::reworded;

/// The longest answer that is read: a configuration with every drive there can be takes some 100 KiB.
const ANSWER_BYTES_MAX: u64 = 4 << 20;

/// How long an answer may take that the monitor gives at once, whatever its machine does.
const AT_ONCE: Duration = Duration::from_secs(5);

/// Why the monitor did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    /// Nobody listens.
    #[error("the monitor's API at {socket} cannot be reached")]
    Connect {
        /// Where it should be.
        socket: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The connection broke, or nothing came in time.
    #[error("{request}: the monitor did not answer")]
    Exchange {
        /// What was asked.
        request: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// It is no more.
    #[error("the monitor has ended, before it answered {request}")]
    Ended {
        /// What was asked.
        request: String,
    },
    /// The answer is none.
    #[error("{request}: the monitor's answer makes no sense: {reason}")]
    Malformed {
        /// What was asked.
        request: String,
        /// What is wrong with it.
        reason: String,
    },
    /// It said no.
    #[error("{}", reworded(fault))]
    Refused {
        /// What was asked.
        request: String,
        /// The HTTP status.
        status: u16,
        /// Its reason, in the API's words.
        fault: String,
    },
}

/// `GET /`.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct InstanceInfo {
    /// `Not started`, `Running` or `Paused`.
    pub(crate) state: String,
    /// Why the machine is stalled, if it is.
    pub(crate) stalled: Option<Stalled>,
    /// Whether an agent in the guest has announced itself, if there is a channel for one.
    pub(crate) guest_agent: Option<bool>,
}

/// A chunk that cannot be had.
#[derive(Clone, Debug, Deserialize, serde::Serialize)]
pub(crate) struct Stalled {
    pub(crate) volume: String,
    pub(crate) chunk: u64,
    pub(crate) reason: String,
    pub(crate) waiting_ms: u64,
    /// Whether it will not come until somebody repairs the image.
    #[serde(default)]
    pub(crate) needs_repair: bool,
}

/// `GET /snapshot/progress`.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct SnapshotProgress {
    pub(crate) operation: Option<Operation>,
    pub(crate) volumes: Vec<Residency>,
}

/// An operation under way, or the last one.
#[derive(Clone, Debug, Deserialize, serde::Serialize)]
pub(crate) struct Operation {
    pub(crate) kind: String,
    pub(crate) state: String,
    pub(crate) phase: String,
    pub(crate) bytes_done: u64,
    pub(crate) bytes_total: u64,
    /// Whether a machine that runs stands for it just now.
    #[serde(default)]
    pub(crate) is_holding: bool,
    /// How long such a machine stood for it, if it did.
    pub(crate) pause_ms: Option<u64>,
}

impl Operation {
    pub(crate) fn is_under_way(&self) -> bool {
        self.state == "running"
    }
}

/// How much of a volume has arrived.
#[derive(Clone, Debug, Deserialize, serde::Serialize)]
pub(crate) struct Residency {
    pub(crate) volume: String,
    pub(crate) bytes_resident: u64,
    pub(crate) bytes_total: u64,
}

/// One monitor's API.
#[derive(Clone, Debug)]
pub(crate) struct Api {
    socket: PathBuf,
}

impl Api {
    pub(crate) fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    /// Whether somebody listens.
    pub(crate) fn is_listening(&self) -> bool {
        UnixStream::connect(&self.socket).is_ok()
    }

    /// Where the machine is in its life.
    pub(crate) fn instance_info(&self) -> Result<InstanceInfo, ApiError> {
        self.get("/")
    }

    /// How far the operation under way is.
    pub(crate) fn progress(&self) -> Result<SnapshotProgress, ApiError> {
        self.get("/snapshot/progress")
    }

    /// Whether a snapshot is being made or loaded. Asked beside it; what cannot be asked is not.
    pub(crate) fn is_saving_or_loading(&self) -> bool {
        let operation = self.progress().ok().and_then(|progress| progress.operation);
        operation.is_some_and(|operation| operation.is_under_way())
    }

    /// The whole configuration. It is answered in turn, so it may have to wait for a snapshot.
    pub(crate) fn configuration(&self) -> Result<Value, ApiError> {
        self.exchange("GET", "/vm/config", None, Some(AT_ONCE))
    }

    /// Asks for something that is answered when it is done, however long that takes.
    pub(crate) fn put(&self, path: &str, body: &Value) -> Result<(), ApiError> {
        self.exchange("PUT", path, Some(body), None).map(|_| ())
    }

    /// Changes something.
    pub(crate) fn patch(&self, path: &str, body: &Value) -> Result<(), ApiError> {
        self.exchange("PATCH", path, Some(body), None).map(|_| ())
    }

    /// Calls something off.
    pub(crate) fn delete(&self, path: &str) -> Result<(), ApiError> {
        self.exchange("DELETE", path, None, Some(AT_ONCE)).map(|_| ())
    }

    fn get<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<T, ApiError> {
        let value = self.exchange("GET", path, None, Some(AT_ONCE))?;
        serde_json::from_value(value).map_err(|error| ApiError::Malformed {
            request: format!("GET {path}"),
            reason: error.to_string(),
        })
    }

    fn exchange(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
        patience: Option<Duration>,
    ) -> Result<Value, ApiError> {
        let request = || format!("{method} {path}");
        let stream = UnixStream::connect(&self.socket).map_err(|source| ApiError::Connect {
            socket: self.socket.clone(),
            source,
        })?;
        let answer = converse(stream, method, path, body, patience);
        let answer = match answer {
            Ok(answer) if !answer.is_empty() => answer,
            // It hangs up without a word only when it ends.
            Ok(_) => return Err(ApiError::Ended { request: request() }),
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {
                return Err(ApiError::Ended { request: request() });
            }
            Err(source) => {
                let request = request();
                return Err(ApiError::Exchange { request, source });
            }
        };
        let answer = Answer::parse(&answer).map_err(|reason| ApiError::Malformed {
            request: request(),
            reason,
        })?;
        if !(200..300).contains(&answer.status) {
            return Err(ApiError::Refused {
                request: request(),
                status: answer.status,
                fault: answer.fault(),
            });
        }
        Ok(answer.body)
    }
}

/// Sends a request and reads until the monitor closes the connection, as it is asked to.
fn converse(
    mut stream: UnixStream,
    method: &str,
    path: &str,
    body: Option<&Value>,
    patience: Option<Duration>,
) -> io::Result<Vec<u8>> {
    stream.set_read_timeout(patience)?;
    let body = body.map(Value::to_string).unwrap_or_default();
    let content = if body.is_empty() {
        ""
    } else {
        "Content-Type: application/json\r\n"
    };
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{content}Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer)?;
    Ok(answer)
}

#[derive(Debug, PartialEq)]
struct Answer {
    status: u16,
    body: Value,
}

impl Answer {
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_owned())?;
        let (head, body) = text.split_once("\r\n\r\n").ok_or("it ends within its head")?;
        let mut lines = head.split("\r\n");
        let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1.1 "));
        let status = status.and_then(|rest| rest.get(..3)?.parse().ok());
        let status = status.ok_or("it does not begin with a status")?;
        let length = lines.find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("content-length")
                .then(|| value.trim().parse().ok())?
        });
        if length.is_some_and(|length: usize| length != body.len()) {
            return Err("it ends within its body".to_owned());
        }
        let body = match body {
            "" => Value::Null,
            _ => serde_json::from_str(body).map_err(|error| error.to_string())?,
        };
        Ok(Self { status, body })
    }

    fn fault(&self) -> String {
        match self.body.get("fault_message").and_then(Value::as_str) {
            Some(fault) => fault.to_owned(),
            None => format!("HTTP status {}", self.status),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use serde_json::json;

    use super::*;

    /// Answers one request with `answer`, and gives the request.
    fn served(answer: &'static str, ask: impl FnOnce(&Api)) -> String {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = vec![0; 64 << 10];
            let len = stream.read(&mut request).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
            String::from_utf8(request[..len].to_vec()).unwrap()
        });
        ask(&Api::new(&socket));
        server.join().unwrap()
    }

    #[test]
    fn a_request_is_what_hyper_and_firecracker_read() {
        let request = served("HTTP/1.1 204 No Content\r\n\r\n", |api| {
            api.patch("/vm", &json!({ "state": "Paused" })).unwrap();
        });
        assert!(
            request.starts_with("PATCH /vm HTTP/1.1\r\nHost: localhost\r\n"),
            "{request}"
        );
        assert!(
            request.ends_with("Content-Length: 18\r\n\r\n{\"state\":\"Paused\"}"),
            "{request}"
        );
    }

    #[test]
    fn a_refusal_says_what_the_monitor_said() {
        let answer = "HTTP/1.1 400 Bad Request\r\ncontent-length: 25\r\n\r\n{\"fault_message\":\"so so\"}";
        served(answer, |api| {
            let Err(ApiError::Refused {
                request,
                status,
                fault,
            }) = api.delete("/snapshot/create")
            else {
                panic!("it must be refused");
            };
            assert_eq!(
                (status, fault.as_str(), request.as_str()),
                (400, "so so", "DELETE /snapshot/create")
            );
        });
    }

    #[test]
    fn a_monitor_that_ends_in_the_middle_of_a_request_is_called_ended() {
        served("", |api| {
            let error = api.delete("/snapshot/create").unwrap_err();
            assert!(matches!(error, ApiError::Ended { .. }), "{error}");
        });
    }

    #[test]
    fn what_is_under_way_is_told_from_what_has_ended() {
        let answer = |state: &str| {
            format!(
                "HTTP/1.1 200 OK\r\n\r\n{{\"operation\":{{\"kind\":\"create\",\"state\":\"{state}\",\"phase\":\"\",\
                 \"bytes_done\":0,\"bytes_total\":0}},\"volumes\":[]}}"
            )
        };
        for (state, expected) in [("running", true), ("done", false)] {
            served(answer(state).leak(), |api| {
                assert_eq!(api.is_saving_or_loading(), expected, "{state}")
            });
        }
        // Nobody who does not answer is waited for.
        served("", |api| assert!(!api.is_saving_or_loading()));
    }

    #[test]
    fn a_stalled_machine_is_understood() {
        let answer = "HTTP/1.1 200 OK\r\n\r\n{\"id\":\"x\",\"state\":\"Running\",\"stalled\":{\"volume\":\"memory\",\"chunk\":7,\"reason\":\"away\",\"waiting_ms\":9},\"guest_agent\":true}";
        served(answer, |api| {
            let info = api.instance_info().unwrap();
            assert_eq!(info.state, "Running");
            assert_eq!(info.guest_agent, Some(true));
            assert_eq!(info.stalled.unwrap().chunk, 7);
        });
    }

    #[test]
    fn answers_that_are_cut_off_or_no_http_are_refused() {
        for answer in [
            "",
            "HTTP/1.1 200 OK\r\n",
            "HTTP/1.1 2\r\n\r\n",
            "SSH-2.0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}",
            "HTTP/1.1 200 OK\r\n\r\n{",
        ] {
            assert!(Answer::parse(answer.as_bytes()).is_err(), "{answer:?}");
        }
    }
}
