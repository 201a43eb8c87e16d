//! What the tests of both ends share: an image, a server of it, and requests as bytes.

#![allow(
    dead_code,
    reason = "each test file is a program of its own and uses what it needs"
)]

#[path = "../../../tests/fixture/mod.rs"]
pub(crate) mod fixture;
pub(crate) mod host;
pub(crate) mod program;
pub(crate) mod scripted;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};

use runnel_agent::serve::{CONNECTIONS_MAX, ImageServer, Repositories, ServeSettings};
use runnel_snapshot::blobs::Blob;
use runnel_snapshot::capture::CaptureSettings;
use runnel_snapshot::capture::optimize::optimize;
use runnel_snapshot::image::Image;
use runnel_snapshot::image::layout::Layout;
use runnel_snapshot::image::manifest::{ManifestDraft, Urls};
use runnel_snapshot::image::publication::Publication;
use runnel_snapshot::image::reference::Wanted;
use runnel_snapshot::source::{ChunkId, VolumeId};
use runnel_snapshot::units::ChunkIndex;
use runnel_snapshot::working_set::WorkingSet;
use tempfile::TempDir;

/// An image in a directory named `web` that goes away with this.
pub(crate) struct Stored {
    folder: TempDir,
    pub(crate) manifest: Blob,
}

impl Stored {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let manifest = fixture::publish(&folder.path().join("web")).unwrap();
        Self { folder, manifest }
    }

    /// An image whose memory is these parts.
    pub(crate) fn of(parts: &[fixture::Part]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let manifest = fixture::publish_memory(&folder.path().join("web"), parts).unwrap();
        Self { folder, manifest }
    }

    /// The same with these chunks of its memory recorded, in that order.
    pub(crate) fn recorded(self, chunks: &[u64]) -> Self {
        let touched = chunks.iter().map(|chunk| ChunkId {
            volume: VolumeId(0),
            chunk: ChunkIndex(*chunk),
        });
        let set = WorkingSet::of(&self.open().source_volumes(), touched);
        let (job, state) =
            optimize(&self.path(), &Wanted::Only, Some(set), CaptureSettings::default()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let manifest = job.run(&folder.path().join("web"), state).unwrap().manifest;
        Self { folder, manifest }
    }

    /// The same without the layer of its memory, which is at these URLs.
    pub(crate) fn thin(&self, urls: Vec<String>) -> Self {
        let manifest = self.open().manifest;
        let layer = manifest.volumes[0].layers[0];
        let folder = tempfile::tempdir().unwrap();
        let publication = Publication::begin(&folder.path().join("web")).unwrap();
        let from = Layout::open(&self.path()).unwrap();
        for blob in manifest.blobs().iter().filter(|blob| blob.digest != layer.digest) {
            publication.take_over(&from, blob).unwrap();
        }
        let draft = ManifestDraft {
            state: manifest.state,
            state_inline: manifest.state_inline.clone(),
            volumes: manifest.volumes.clone(),
            working_set: manifest.working_set,
            parent: manifest.parent,
            urls: Urls::from([(layer.digest, urls)]),
        };
        let manifest = publication.publish(&draft, Some("latest")).unwrap();
        Self { folder, manifest }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join("web")
    }

    /// The folder that the image is in.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn open(&self) -> Image {
        Image::open_directory(&self.path(), &Wanted::Only).unwrap()
    }

    /// The layer of its memory, and its bytes.
    pub(crate) fn layer(&self) -> (Blob, Vec<u8>) {
        let blob = self.open().manifest.volumes[0].layers[0];
        (blob, self.bytes_of(&blob))
    }

    pub(crate) fn bytes_of(&self, blob: &Blob) -> Vec<u8> {
        std::fs::read(self.path().join("blobs/sha256").join(blob.digest.hex())).unwrap()
    }
}

/// Serves directories on loopback, to anyone.
pub(crate) fn settings(paths: &[&Path]) -> ServeSettings {
    let mut repositories = Repositories::default();
    for path in paths {
        repositories.add(path).unwrap();
    }
    ServeSettings {
        listen: "127.0.0.1:0".parse().unwrap(),
        repositories,
        token: None,
        tls: None,
        insecure: false,
        connections_max: CONNECTIONS_MAX,
    }
}

pub(crate) fn serve(paths: &[&Path]) -> ImageServer {
    ImageServer::start(settings(paths)).unwrap()
}

/// An answer as it came.
#[derive(Debug)]
pub(crate) struct Raw {
    pub(crate) status: u16,
    head: String,
    pub(crate) body: Vec<u8>,
}

impl Raw {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// Sends one request, written out, on a connection of its own and reads until the server closes.
pub(crate) fn request(address: SocketAddr, line: &str, headers: &[&str]) -> Raw {
    let mut stream = TcpStream::connect(address).unwrap();
    let mut text = format!("{line} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n");
    for header in headers {
        text += header;
        text += "\r\n";
    }
    text += "\r\n";
    stream.write_all(text.as_bytes()).unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    let end = bytes.windows(4).position(|at| at == b"\r\n\r\n").unwrap();
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let status = head[9..12].parse().unwrap();
    Raw {
        status,
        head,
        body: bytes[end + 4..].to_vec(),
    }
}
