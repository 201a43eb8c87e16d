//! An image that is served on this host, and machines that run from it through agents.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use runnel_agent::serve::{CONNECTIONS_MAX, ImageServer, Repositories, ServeError, ServeSettings};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::agent::AgentFolders;
use crate::bare::{booted, load, save};
use crate::monitor::{DEADLINE, Monitor};

/// Bytes a second of background fill, so few that all but what is demanded stays away for the length of a test, however
/// long that takes on a busy host: a chunk of a pattern is less than 200 bytes.
pub const TRICKLE: [&str; 2] = ["--fill-rate", "1"];

/// How often it is tried again to listen at an address whose last server's connections are not over yet.
const LOOK: Duration = Duration::from_millis(50);

/// An image `bare` of a machine that has 4 MiB of pattern 7 at 8 MiB and has counted to 3, served; and folders for
/// agents.
pub struct Served {
    image: PathBuf,
    server: Option<ImageServer>,
    address: SocketAddr,
    agents: AgentFolders,
    _folder: TempDir,
}

impl Served {
    /// Made and served.
    ///
    /// # Panics
    /// When there is no machine to be had, or no server.
    #[must_use]
    pub fn new() -> Self {
        Self::of(&booted("fill:8m:4m:7 count:3"))
    }

    /// As [`new`](Self::new), of another machine.
    ///
    /// # Panics
    /// When it cannot be saved, or there is no server.
    #[must_use]
    pub fn of(machine: &Monitor) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let image = folder.path().join("bare");
        save(machine, &image);
        let server = serve(&image);
        Self {
            image,
            address: server.address(),
            server: Some(server),
            agents: AgentFolders::new(),
            _folder: folder,
        }
    }

    /// The image's directory.
    #[must_use]
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// Where agents of this test are.
    #[must_use]
    pub fn agents(&self) -> &AgentFolders {
        &self.agents
    }

    /// Where the server is.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The image's address.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}/bare", self.address)
    }

    /// A request to load the image through the agent, and `more`.
    ///
    /// # Panics
    /// When `more` is no object.
    #[must_use]
    pub fn request(&self, more: &Value) -> Value {
        let mut request = json!({"image": self.url(), "agent_path": self.agents.socket()});
        let fields = request.as_object_mut().expect("it is an object");
        fields.extend(more.as_object().expect("more fields are an object").clone());
        request
    }

    /// A machine loaded from the image as [`request`](Self::request) says.
    ///
    /// # Panics
    /// When it cannot be loaded.
    #[must_use]
    pub fn load(&self, more: &Value) -> Monitor {
        load(&self.request(more))
    }

    /// Bytes that this server has sent.
    #[must_use]
    pub fn bytes_sent(&self) -> u64 {
        self.server
            .as_ref()
            .map_or(0, |server| server.traffic().bytes_sent())
    }

    /// Stops the server and closes its connections.
    pub fn stop_server(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop();
        }
    }

    /// Starts a server where the last one was.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start_server(&mut self) {
        self.server = Some(serve_at(&self.image, self.address));
    }
}

impl Default for Served {
    fn default() -> Self {
        Self::new()
    }
}

/// Serves an image on this host's loopback, at a free port.
///
/// # Panics
/// When it cannot.
#[must_use]
pub fn serve(image: &Path) -> ImageServer {
    serve_at(image, (Ipv4Addr::LOCALHOST, 0).into())
}

/// Serves an image at `listen`, where another server may just have been.
///
/// # Panics
/// When it cannot.
#[must_use]
pub fn serve_at(image: &Path, listen: SocketAddr) -> ImageServer {
    let deadline = Instant::now() + DEADLINE;
    loop {
        match try_to_serve(image, listen) {
            Ok(server) => return server,
            // Connections of the server before may still hold the port.
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        thread::sleep(LOOK);
    }
}

fn try_to_serve(image: &Path, listen: SocketAddr) -> Result<ImageServer, ServeError> {
    let mut repositories = Repositories::default();
    repositories.add(image).expect("an image can be served");
    ImageServer::start(ServeSettings {
        listen,
        repositories,
        token: None,
        tls: None,
        // What is not loopback here is a network of the test's own.
        insecure: !listen.ip().is_loopback(),
        connections_max: CONNECTIONS_MAX,
    })
}
