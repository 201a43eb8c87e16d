//! What monitors and agents say to each other. How it looks in bytes is `bytes`, and what an agent says of itself `status`.

mod bytes;
mod status;

use serde::{Deserialize, Serialize};

use crate::digest::BlobDigest;
use crate::source::{Arrived, ChunkFailure, ChunkId, Urgency};
use crate::units::ChunkSize;
use crate::volume::VolumeName;
pub use bytes::BadMessage;
pub use status::{AdoptedVolume, AgentStatus, CacheStatus, ImageStatus, PoolStatus};

/// The version of this protocol.
pub const PROTOCOL_VERSION: u32 = 3;

/// The longest message. It leaves room in a socket's default buffer (208 KiB) for several.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// The most chunks that one message names.
pub const CHUNKS_MAX: usize = 4096;

/// The most volumes of an image that the protocol carries; the kernel passes at most 253 descriptors at once.
pub const VOLUMES_MAX: usize = 64;

/// What the monitor says first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`] of the monitor.
    pub protocol: u32,
    /// Which image, as people write it: a URL, or a directory of the agent's host.
    pub image: String,
    /// The image's digest, if the monitor knows it: another one is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<BlobDigest>,
    /// Whose machine this is, for the agent's log.
    #[serde(default)]
    pub machine: String,
}

/// A file that is a volume of an image, for the agent to deliver it from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adopt {
    /// [`PROTOCOL_VERSION`] of the monitor.
    pub protocol: u32,
    /// Which image, as in [`Hello`].
    pub image: String,
    /// Its digest.
    pub digest: BlobDigest,
    /// Which of its volumes.
    pub volume: VolumeName,
    /// Whose machine has the file, for the agent's log.
    #[serde(default)]
    pub machine: String,
}

/// The image is open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// The manifest's digest.
    pub digest: BlobDigest,
    /// The volumes, in the order that chunks name them by and page files come in.
    pub volumes: Vec<OpenedVolume>,
}

/// A volume of an open image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenedVolume {
    /// Its name.
    pub name: VolumeName,
    /// Its length in bytes.
    pub bytes: u64,
    /// How it is cut.
    pub chunk_size: ChunkSize,
}

/// The image cannot be opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Why, for people.
    pub reason: String,
    /// Whether trying again can help.
    #[serde(default)]
    pub transient: bool,
}

/// Asks for the index of a volume of an image that is open: what a diff over it needs, and all that it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WantIndex {
    /// [`PROTOCOL_VERSION`] of whoever asks.
    pub protocol: u32,
    /// The image.
    pub image: BlobDigest,
    /// The volume.
    pub volume: VolumeName,
}

/// The index of a volume, in the file that comes along.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexFound {
    /// Where the image's blobs can be had by others: each with the hexadecimal digits of a blob's SHA-256 behind it is the
    /// URL of that blob. None if they are in no place but a directory of this host.
    pub blobs_at: Vec<String>,
}

/// What a monitor says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromMonitor {
    /// Opens an image.
    Hello(Hello),
    /// Wants chunks.
    Ask(Urgency, Vec<ChunkId>),
    /// Wants them no more.
    Cancel(Vec<ChunkId>),
    /// Opens nothing, and wants to know what is open.
    Status,
    /// Opens nothing, and wants an index of what is open.
    WantIndex(WantIndex),
    /// Asks for nothing, and has a file; its descriptor comes along.
    Adopt(Adopt),
}

/// What an agent says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromAgent {
    /// Answers `Hello`; descriptors come along.
    Opened(Opened),
    /// Answers `Hello` or `Adopt`, and hangs up.
    Refused(Refused),
    /// Chunks are there.
    Arrived(Vec<(ChunkId, Arrived)>),
    /// A chunk could not be had this time.
    Failed(ChunkId, ChunkFailure),
    /// Answers `Status`, and hangs up.
    Status(AgentStatus),
    /// Answers `WantIndex`, and hangs up; the file comes along.
    Index(IndexFound),
    /// Answers `Adopt`, and hangs up.
    Adopted,
}
