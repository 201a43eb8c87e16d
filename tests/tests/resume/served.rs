//! An image behind a server and an agent, whose background fill is so slow that what nobody asks for stays away.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use runnel_agent::serve::{CONNECTIONS_MAX, ImageServer, Repositories, ServeSettings};
use runnel_tests::agent::{Agent, AgentFolders};
use serde_json::{Value, json};

/// Bytes a second of background fill.
const TRICKLE: [&str; 2] = ["--fill-rate", "256"];

/// The server can go away and come back.
pub(crate) struct Served {
    image: PathBuf,
    server: Option<ImageServer>,
    address: SocketAddr,
    agents: AgentFolders,
    _agent: Agent,
}

impl Served {
    /// Serves the image in the directory `image`.
    pub(crate) fn new(image: &Path) -> Self {
        let server = serve(image, ([127, 0, 0, 1], 0).into());
        let agents = AgentFolders::new();
        Self {
            image: image.to_owned(),
            address: server.address(),
            server: Some(server),
            _agent: agents.start(&TRICKLE),
            agents,
        }
    }

    /// The request that loads it, with `more` fields.
    pub(crate) fn request(&self, more: &Value) -> Value {
        let name = self.image.file_name().unwrap().to_str().unwrap();
        let mut request = json!({
            "image": format!("http://{}/{name}", self.address),
            "agent_path": self.agents.socket(),
            "resume_vm": true,
        });
        let fields = more.as_object().unwrap().clone();
        request.as_object_mut().unwrap().extend(fields);
        request
    }

    pub(crate) fn goes_away(&mut self) {
        self.server.take().unwrap().stop();
    }

    pub(crate) fn comes_back(&mut self) {
        self.server = Some(serve(&self.image, self.address));
    }
}

fn serve(image: &Path, listen: SocketAddr) -> ImageServer {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let mut repositories = Repositories::default();
        repositories.add(image).unwrap();
        let settings = ServeSettings {
            listen,
            repositories,
            token: None,
            tls: None,
            insecure: false,
            connections_max: CONNECTIONS_MAX,
        };
        match ImageServer::start(settings) {
            Ok(server) => return server,
            // Connections of the server before may still hold the port.
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
