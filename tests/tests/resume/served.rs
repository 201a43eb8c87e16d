//! An image behind a server and an agent, whose background fill is so slow that what nobody asks for stays away.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use runnel_agent::serve::ImageServer;
use runnel_tests::agent::{Agent, AgentFolders};
use runnel_tests::served::{TRICKLE, serve, serve_at};
use serde_json::{Value, json};

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
        let server = serve(image);
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
        self.server = Some(serve_at(&self.image, self.address));
    }
}
