//! A host of the tests: an agent's directories, machines that ask it, and registries that misbehave.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use runnel_agent::agent::{Agent, AgentSettings};
use runnel_agent::remote::RemoteSettings;
use runnel_snapshot::blobs::Blob;
use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::protocol::{AgentSource, ConnectError, Opening};
use runnel_snapshot::source::{Arrived, ChunkFailure, ChunkId, ChunkSink, PageSource, Urgency, VolumeId};
use runnel_snapshot::units::ChunkIndex;
use tempfile::TempDir;

use super::Stored;
use super::fixture::{CHUNK, chunk_of};
use super::scripted::{Reply, Request, Scripted};

/// Longer than anything takes: only a test that has failed waits for it.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// An agent's directories, which outlive it.
pub(crate) struct Home(TempDir);

impl Home {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.0.path().join("agent.sock")
    }

    pub(crate) fn settings(&self) -> AgentSettings {
        let folder = |name| self.0.path().join(name);
        AgentSettings {
            remote: RemoteSettings {
                connections_ahead: 0,
                idle_deadline: LONG,
                ..RemoteSettings::default()
            },
            ..AgentSettings::new(self.socket(), folder("memory"), folder("drives"))
        }
    }

    pub(crate) fn start(&self) -> Agent {
        Agent::start(self.settings()).unwrap()
    }

    pub(crate) fn machine(&self, image: &str) -> Result<Machine, ConnectError> {
        let source = AgentSource::open(Opening {
            agent: self.socket(),
            image: image.to_owned(),
            machine: "test".to_owned(),
            deadline: LONG,
        })?;
        let (sender, answers) = channel();
        source.deliver_to(Arc::new(Answers(Mutex::new(sender))));
        Ok(Machine { source, answers })
    }
}

pub(crate) type Answer = (u64, Result<Arrived, ChunkFailure>);

struct Answers(Mutex<Sender<Answer>>);

impl ChunkSink for Answers {
    fn arrived(&self, chunk: ChunkId, what: Arrived) {
        let _ = self.0.lock().unwrap().send((chunk.chunk.0, Ok(what))); // the test may have ended
    }

    fn failed(&self, chunk: ChunkId, failure: ChunkFailure) {
        let _ = self.0.lock().unwrap().send((chunk.chunk.0, Err(failure)));
    }
}

/// A monitor, as far as the agent can tell.
pub(crate) struct Machine {
    pub(crate) source: AgentSource,
    pub(crate) answers: Receiver<Answer>,
}

pub(crate) fn ids(chunks: &[u64]) -> Vec<ChunkId> {
    let id = |number: &u64| ChunkId {
        volume: VolumeId(0),
        chunk: ChunkIndex(*number),
    };
    chunks.iter().map(id).collect()
}

impl Machine {
    pub(crate) fn ask(&self, chunks: &[u64]) {
        self.source.ask(&ids(chunks), Urgency::Demand);
    }

    pub(crate) fn answer(&self) -> Answer {
        self.answers.recv_timeout(LONG).unwrap()
    }

    /// Asks for a chunk until it is there.
    pub(crate) fn gets(&self, chunk: u64) {
        let begun = Instant::now();
        loop {
            self.ask(&[chunk]);
            match self.answer() {
                (_, Ok(what)) => return assert_eq!(what, Arrived::Data),
                (_, Err(failure)) => assert!(failure.transient && begun.elapsed() < LONG, "{failure}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn answers(&self, count: usize) -> Vec<Answer> {
        let mut answers: Vec<Answer> = (0..count).map(|_| self.answer()).collect();
        answers.sort_by_key(|answer| answer.0);
        answers
    }

    pub(crate) fn page_file(&self) -> Arc<File> {
        self.source.page_file(VolumeId(0))
    }

    /// Whether the page file has the chunk.
    pub(crate) fn has(&self, chunk: u64, content: u8) -> bool {
        let mut bytes = vec![0; CHUNK];
        self.page_file()
            .read_exact_at(&mut bytes, chunk * CHUNK as u64)
            .unwrap();
        bytes == chunk_of(content)
    }
}

/// A registry of one image, whose blobs are answered as the script says.
pub(crate) fn registry_of(
    stored: &Stored,
    answer: impl Fn(&BlobDigest, &Request, &[u8]) -> Reply + Send + Sync + 'static,
) -> Scripted {
    let blobs = stored.open().manifest.blobs();
    let file = |blob: &Blob| {
        (
            format!("/v2/web/blobs/{}", blob.digest),
            blob.digest,
            stored.bytes_of(blob),
        )
    };
    let files: Vec<_> = blobs.iter().map(file).collect();
    let manifest = stored.bytes_of(&stored.manifest);
    Scripted::start(move |request| {
        if request.target.starts_with("/v2/web/manifests/") {
            return Reply::ok(&manifest);
        }
        match files.iter().find(|(path, ..)| *path == request.target) {
            Some((_, digest, bytes)) => answer(digest, request, bytes),
            None => Reply::status("404 Not Found", &[]),
        }
    })
}

/// A registry of one image, whose layer is answered as the script says.
pub(crate) fn registry(
    stored: &Stored,
    layer: impl Fn(&Request, &[u8]) -> Reply + Send + Sync + 'static,
) -> Scripted {
    let its_layer = stored.layer().0.digest;
    registry_of(stored, move |digest, request, bytes| {
        if *digest == its_layer {
            layer(request, bytes)
        } else {
            Reply::part(request, bytes)
        }
    })
}

/// A registry of one image that hangs up on whoever wants its layer, for as long as it is told to be away.
pub(crate) fn registry_at_times(stored: &Stored) -> (Scripted, Arc<AtomicBool>) {
    let away = Arc::new(AtomicBool::new(false));
    let is_away = Arc::clone(&away);
    let server = registry(stored, move |request, bytes| {
        match is_away.load(Ordering::SeqCst) {
            true => Reply::Close(Vec::new()),
            false => Reply::part(request, bytes),
        }
    });
    (server, away)
}
