//! `runnel serve`: image directories as the pull half of an OCI registry (OCI distribution specification 1.1).
//!
//! `GET` and `HEAD` of manifests, and of blobs with `Range`; tags and the catalog, in pages; nothing that writes. One thread serves all
//! connections. It trusts its directories' owner and nobody else: a path is parsed into names, tags and digests
//! before a file is looked for, and beyond loopback it listens only with a token and TLS, or when told that the
//! network is safe.

mod access;
mod answer;
mod body;
#[doc(hidden)]
pub mod fuzz;
mod page;
mod patience;
mod range;
mod repositories;
mod route;

pub use access::{AccessError, Token};
pub use repositories::{Inventory, Repositories, RepositoryError};

use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::num::NonZero;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::tls::{Identity, TlsError};
use crate::traffic::Traffic;
use answer::Registry;
use patience::Patient;

/// Connections at a time unless told otherwise. More wait to be accepted.
pub const CONNECTIONS_MAX: NonZero<usize> = NonZero::new(512).unwrap();

/// Bytes of a request's head, which hyper also takes as its buffer.
const HEAD_BYTES_MAX: usize = 16 << 10;

/// How long a connection may be silent: between requests, and from its start to its first.
const IDLE: Duration = Duration::from_secs(60);

/// How long a peer may take nothing of what is sent to it.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// How long answers under way may take to leave once the server ends.
const FAREWELL: Duration = Duration::from_secs(2);

/// How long to wait when no connection can be accepted: out of descriptors or memory, which pass.
const BREATH: Duration = Duration::from_millis(100);

/// Where to serve what to whom.
#[derive(Clone, Debug)]
pub struct ServeSettings {
    /// Where to listen; port 0 takes any.
    pub listen: SocketAddr,
    /// What to serve.
    pub repositories: Repositories,
    /// What clients must know.
    pub token: Option<Token>,
    /// The server's certificate and key, for TLS.
    pub tls: Option<Identity>,
    /// Whether to listen beyond loopback without the two.
    pub insecure: bool,
    /// Connections at a time: [`CONNECTIONS_MAX`], usually.
    pub connections_max: NonZero<usize>,
}

/// Why images cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Others could read along or come in.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// TLS cannot be spoken.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The address cannot be had.
    #[error("cannot listen on {address}: is it in use, or not this host's?")]
    Listen {
        /// Which address.
        address: SocketAddr,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// There is no event loop or thread to be had.
    #[error("the server cannot be started")]
    Start(#[source] io::Error),
}

/// Images being served, until this is stopped or dropped.
#[derive(Debug)]
pub struct ImageServer {
    address: SocketAddr,
    traffic: Arc<Traffic>,
    must_stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl ImageServer {
    /// Starts to serve, on a thread of its own.
    ///
    /// # Errors
    /// When it would be open to strangers, or cannot listen.
    pub fn start(settings: ServeSettings) -> Result<Self, ServeError> {
        let address = settings.listen;
        let with_tls = settings.tls.is_some();
        access::check(address, settings.token.is_some(), with_tls, settings.insecure)?;
        let tls = settings
            .tls
            .map(|identity| identity.server_config())
            .transpose()?;
        let failed = |source| ServeError::Listen { address, source };
        let listener = StdListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(ServeError::Start)?;
        let listener = {
            let _entered = runtime.enter();
            TcpListener::from_std(listener).map_err(failed)?
        };
        let traffic = Arc::new(Traffic::default());
        let host = Host {
            registry: Arc::new(Registry {
                repositories: settings.repositories,
                token: settings.token,
            }),
            tls: tls.map(TlsAcceptor::from),
            traffic: Arc::clone(&traffic),
        };
        let (must_stop, stopping) = watch::channel(false);
        let connections_max = settings.connections_max.get();
        let thread = thread::Builder::new()
            .name("serve".to_owned())
            .spawn(move || {
                runtime.block_on(serve(listener, host, connections_max, stopping));
                // A thread that waits for a disk is not waited for.
                runtime.shutdown_background();
            })
            .map_err(ServeError::Start)?;
        Ok(Self {
            address,
            traffic,
            must_stop,
            thread: Some(thread),
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What went over its connections.
    #[must_use]
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// Lets answers under way leave, for a moment, and closes all connections.
    pub fn stop(mut self) {
        self.stop_thread();
    }

    fn stop_thread(&mut self) {
        // Fails only if the thread is gone already.
        let _ = self.must_stop.send(true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the server's thread panicked");
        }
    }
}

impl Drop for ImageServer {
    fn drop(&mut self) {
        self.stop_thread();
    }
}

/// What each connection needs.
#[derive(Clone)]
struct Host {
    registry: Arc<Registry>,
    tls: Option<TlsAcceptor>,
    traffic: Arc<Traffic>,
}

async fn serve(
    listener: TcpListener,
    host: Host,
    connections_max: usize,
    mut stopping: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(connections_max));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            () = stop_of(&mut stopping) => break,
            accepted = async {
                let place = Arc::clone(&places).acquire_owned().await;
                (place, listener.accept().await)
            } => accepted,
        };
        let (Ok(place), accepted) = accepted else { break };
        match accepted {
            Ok((stream, peer)) => {
                let (host, stopping) = (host.clone(), stopping.clone());
                connections.spawn(async move {
                    tracing::debug!(%peer, "connected");
                    if let Err(error) = host.attend(stream, stopping).await {
                        tracing::debug!(%peer, error = &*error, "a connection ended");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection cannot be accepted");
                tokio::time::sleep(BREATH).await;
            }
        }
    }
    drop(listener);
    let farewell = async { while connections.join_next().await.is_some() {} };
    // Who has not taken its answer by then loses it; dropping the set closes the connections.
    let _ = tokio::time::timeout(FAREWELL, farewell).await;
}

/// Resolves once the server must stop.
async fn stop_of(stopping: &mut watch::Receiver<bool>) {
    // An error means that the server was dropped: that is a stop too.
    let _ = stopping.wait_for(|stop| *stop).await;
}

type ConnectionError = Box<dyn std::error::Error + Send + Sync>;

impl Host {
    async fn attend(self, stream: TcpStream, stopping: watch::Receiver<bool>) -> Result<(), ConnectionError> {
        // An answer's last bytes must not wait for an acknowledgement.
        stream.set_nodelay(true)?;
        let stream = Patient::new(stream, Arc::clone(&self.traffic), PATIENCE);
        match &self.tls {
            Some(tls) => {
                let stream = tokio::time::timeout(HANDSHAKE, tls.accept(stream)).await??;
                self.converse(stream, stopping).await
            }
            None => self.converse(stream, stopping).await,
        }
    }

    async fn converse<S>(self, stream: S, mut stopping: watch::Receiver<bool>) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let registry = self.registry;
        let service = service_fn(move |request| {
            let registry = Arc::clone(&registry);
            async move { Ok::<_, Infallible>(registry.answer(&request).await) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(IDLE)
            .max_buf_size(HEAD_BYTES_MAX)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        tokio::select! {
            ended = connection.as_mut() => return Ok(ended?),
            () = stop_of(&mut stopping) => connection.as_mut().graceful_shutdown(),
        }
        Ok(connection.await?)
    }
}
