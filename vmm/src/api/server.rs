//! The server: one thread, one connection a task, one request a connection at a time.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Body, Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request as HttpRequest, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{oneshot, watch};
use tokio::task::{JoinSet, LocalSet};

use super::call::{Call, Parsed, parse};
use super::error::RequestError;
use super::response::{self, Answer};
use super::route::{Verb, resolve};
use super::socket::{ApiSocket, SocketFile};
use crate::control::{Inbox, Status};
use crate::version::{FIRECRACKER_VERSION, RUNNEL_VERSION};

/// Connections at a time; one more is told so and closed. Each holds a body of up to the limit.
const CONNECTIONS_MAX: usize = 32;

/// Bytes of a request's head; more is refused by the HTTP layer.
const HEAD_BYTES_MAX: usize = 16 << 10;

/// How long an answer under way may take to leave once the monitor ends.
const FAREWELL: Duration = Duration::from_millis(500);

/// Why the API cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// There is no event loop to be had.
    #[error("cannot start the API's event loop")]
    Runtime(#[source] io::Error),
    /// There is no thread to be had.
    #[error("cannot start the API's thread")]
    Thread(#[source] io::Error),
}

/// The API being served, until it is [stopped](Self::stop) or dropped.
#[derive(Debug)]
pub struct ApiServer {
    must_stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
    /// Goes last: whoever no longer finds the file can be sure that nobody answers.
    _file: SocketFile,
}

impl ApiServer {
    /// Serves the API at `socket` on a thread of its own, to bodies of up to `body_bytes_max`.
    ///
    /// # Errors
    /// When there is no thread or event loop to be had.
    pub fn start(
        socket: ApiSocket,
        inbox: Arc<Inbox>,
        status: Arc<Status>,
        body_bytes_max: usize,
    ) -> Result<Self, ServeError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(ServeError::Runtime)?;
        let (must_stop, stopping) = watch::channel(false);
        let (listener, file) = socket.into_parts();
        let listener = {
            let _entered = runtime.enter();
            UnixListener::from_std(listener).map_err(ServeError::Runtime)?
        };
        let service = Service {
            inbox,
            status,
            body_bytes_max,
        };
        let thread = thread::Builder::new()
            .name("api".to_owned())
            .spawn(move || {
                LocalSet::new().block_on(&runtime, serve(listener, Rc::new(service), stopping));
            })
            .map_err(ServeError::Thread)?;
        Ok(Self {
            must_stop,
            thread: Some(thread),
            _file: file,
        })
    }

    /// Lets answers under way leave, closes all connections and removes the socket.
    pub fn stop(mut self) {
        self.stop_thread();
    }

    fn stop_thread(&mut self) {
        // Fails only if the thread is gone already.
        let _ = self.must_stop.send(true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the API's thread panicked");
        }
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.stop_thread();
    }
}

struct Service {
    inbox: Arc<Inbox>,
    status: Arc<Status>,
    body_bytes_max: usize,
}

async fn serve(listener: UnixListener, service: Rc<Service>, mut stopping: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            // Forgets one that was closed.
            Some(_) = connections.join_next() => continue,
            _ = stopping.wait_for(|stop| *stop) => break,
        };
        match accepted {
            Ok((stream, _)) if connections.len() >= CONNECTIONS_MAX => refuse(&stream),
            Ok((stream, _)) => {
                connections.spawn_local(connection(stream, Rc::clone(&service), stopping.clone()));
            }
            Err(error) => {
                tracing::error!("cannot accept an API connection: {error}");
                // Out of descriptors, most likely: let some be closed before trying again.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
    drop(listener);
    let all_closed = async { while connections.join_next().await.is_some() {} };
    // Whoever does not read its answer is not waited for.
    let _ = tokio::time::timeout(FAREWELL, all_closed).await;
}

/// Says that there are too many connections, in Firecracker's words; whoever does not take it at once misses it.
fn refuse(stream: &UnixStream) {
    let body = r#"{ "error": "Too many open connections" }"#;
    let answer = format!(
        "HTTP/1.1 503 \r\nServer: Firecracker API\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    if let Err(error) = stream.try_write(answer.as_bytes()) {
        tracing::debug!("a refused API connection was not told: {error}");
    }
}

async fn connection(stream: UnixStream, service: Rc<Service>, mut stopping: watch::Receiver<bool>) {
    let answer = service_fn(move |request| {
        let service = Rc::clone(&service);
        async move { Ok::<_, Infallible>(service.answer(request).await) }
    });
    let mut http = http1::Builder::new();
    http.keep_alive(true)
        .max_buf_size(HEAD_BYTES_MAX)
        .auto_date_header(false);
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), answer));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        _ = stopping.wait_for(|stop| *stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!("an API connection ended: {error}");
    }
}

impl Service {
    async fn answer(&self, request: HttpRequest<Incoming>) -> Answer {
        let verb = request.method().to_string();
        let path = request.uri().path().to_owned();
        match self.try_answer(request).await {
            Ok(answer) => {
                tracing::info!(
                    "{verb} request on {path:?} was answered with {}.",
                    answer.status().as_u16()
                );
                answer
            }
            Err(error) => {
                tracing::error!(
                    "{verb} request on {path:?} was refused. Status code: 400 Bad Request. Message: {error}"
                );
                response::refusal(&error)
            }
        }
    }

    async fn try_answer(&self, request: HttpRequest<Incoming>) -> Result<Answer, RequestError> {
        let verb = Verb::of(request.method()).ok_or(RequestError::Method)?;
        let path = request.uri().path().to_owned();
        let body = self.read_body(request.into_body()).await?;
        let (endpoint, name) = resolve(verb, &path, !body.is_empty())?;
        let Parsed { call, deprecation } = parse(endpoint, name, &body)?;
        let answer = self.perform(call).await?;
        match deprecation {
            Some(text) => {
                tracing::warn!("{text}");
                Ok(response::with_deprecation(answer))
            }
            None => Ok(answer),
        }
    }

    async fn read_body(&self, body: Incoming) -> Result<Bytes, RequestError> {
        let limit = self.body_bytes_max;
        // The announced length, if there is one; otherwise what came so far counts.
        let announced = body.size_hint().lower();
        if announced > limit as u64 {
            return Err(RequestError::TooLarge {
                size: announced,
                limit,
            });
        }
        match Limited::new(body, limit).collect().await {
            Ok(collected) => Ok(collected.to_bytes()),
            Err(error) if error.is::<LengthLimitError>() => Err(RequestError::TooLarge {
                size: limit as u64 + 1,
                limit,
            }),
            Err(error) => Err(RequestError::Body(error.to_string())),
        }
    }

    async fn perform(&self, call: Call) -> Result<Answer, RequestError> {
        match call {
            Call::InstanceInfo => Ok(response::ok(&self.status.instance_info())),
            Call::Version => Ok(response::ok(
                &json!({ "firecracker_version": FIRECRACKER_VERSION, "runnel_version": RUNNEL_VERSION }),
            )),
            Call::Progress => Ok(response::ok(&json!({
                "operation": self.status.progress(),
                "volumes": self.status.residency(),
                "waits": self.status.waits(),
            }))),
            Call::Cancel(kind) if self.status.cancel(kind) => Ok(response::no_content()),
            Call::Cancel(_) => Err(RequestError::NothingToCancel),
            Call::Control(request) => {
                let (answer, answered) = oneshot::channel();
                self.inbox.post(request, move |outcome| {
                    // The client may have gone away; what it asked for was done all the same.
                    let _ = answer.send(outcome);
                });
                Ok(match answered.await {
                    Ok(outcome) => {
                        if let Err(fault) = &outcome {
                            tracing::error!("Received Error. Status code: 400 Bad Request. Message: {fault}");
                        }
                        response::outcome(outcome)
                    }
                    Err(_) => response::fault(StatusCode::SERVICE_UNAVAILABLE, "The monitor is ending."),
                })
            }
        }
    }
}
