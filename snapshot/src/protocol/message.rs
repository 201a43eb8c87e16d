//! The messages and their bytes.
//!
//! | byte 0 | message | rest, little-endian |
//! | --- | --- | --- |
//! | 1 | `Hello` | JSON |
//! | 2 | `Ask` | urgency `u8` (0 fill, 1 soon, 2 demand), then chunks: volume `u16`, chunk `u64` |
//! | 3 | `Cancel` | chunks |
//! | 4 | `Status` | nothing |
//! | 5 | `WantIndex` | JSON |
//! | 6 | `Adopt` | JSON, with a descriptor |
//! | 17 | `Opened` | JSON, with descriptors |
//! | 18 | `Refused` | JSON |
//! | 19 | `Arrived` | each: volume `u16`, chunk `u64`, what `u8` (0 zero, 1 data) |
//! | 20 | `Failed` | volume `u16`, chunk `u64`, transient `u8`, the reason in UTF-8 |
//! | 21 | `Status` | JSON |
//! | 22 | `Index` | JSON, with a descriptor |
//! | 23 | `Adopted` | nothing |

use serde::{Deserialize, Serialize};

use crate::digest::BlobDigest;
use crate::source::{Arrived, ChunkFailure, ChunkId, Urgency, VolumeId};
use crate::units::{ChunkIndex, ChunkSize};
use crate::volume::VolumeName;

/// The version of this protocol.
pub const PROTOCOL_VERSION: u32 = 3;

/// The longest message. It leaves room in a socket's default buffer (208 KiB) for several.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// The most chunks that one message names.
pub const CHUNKS_MAX: usize = 4096;

/// The most volumes of an image that the protocol carries; the kernel passes at most 253 descriptors at once.
pub const VOLUMES_MAX: usize = 64;

/// The longest reason that is sent; a longer one is cut.
const REASON_BYTES_MAX: usize = 4096;

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

/// What an agent has open, and what it cost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// The agent's process.
    pub process: u32,
    /// Its images.
    pub images: Vec<ImageStatus>,
    /// What their page files take, and may.
    #[serde(default)]
    pub cache: CacheStatus,
}

/// What an agent's page files take, and may.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheStatus {
    /// Those of memory.
    pub memory: PoolStatus,
    /// Those of drives.
    pub drives: PoolStatus,
}

/// Page files of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolStatus {
    /// Bytes that they take.
    pub bytes: u64,
    /// Bytes that they may take.
    pub bytes_max: u64,
    /// Bytes that were taken out of them to make room, since the agent started.
    pub bytes_evicted: u64,
}

/// One of an agent's images.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageStatus {
    /// Where it is read, or was last.
    pub image: String,
    /// The manifest's digest.
    pub digest: BlobDigest,
    /// Machines that are connected.
    pub machines: u64,
    /// Bytes that came over the network for it: manifest, state, index and chunks, with HTTP's heads and TLS's records.
    pub bytes_received: u64,
    /// Bytes that went out for it.
    pub bytes_sent: u64,
    /// Bytes that its page files take, but for those that are somebody else's.
    #[serde(default)]
    pub bytes_kept: u64,
    /// The volumes whose page files are somebody else's: the memory of a machine that the image was made of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adopted: Vec<AdoptedVolume>,
    /// Chunks that were copied from page files of other images, and not fetched.
    #[serde(default)]
    pub chunks_copied: u64,
    /// Bytes, as the image stores them, that were not fetched for these.
    #[serde(default)]
    pub bytes_saved: u64,
    /// Each place in which the last read of it failed, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
    /// What of it the agent cannot keep: volume, folder and reason of each. A full file system, most often.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unkept: Option<String>,
}

/// A volume whose page file was handed over, and is not the agent's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdoptedVolume {
    /// Which.
    pub volume: VolumeName,
    /// Bytes that the file takes, for whoever made it and the image's machines together.
    pub bytes: u64,
}

/// The most images that a [`AgentStatus`] tells of: more do not fit into a message.
const STATUS_IMAGES_MAX: usize = 100;

/// The longest name of an image in it.
const IMAGE_BYTES_MAX: usize = 256;

/// So much of an image's trouble is told where many are in trouble.
const TROUBLE_BYTES_MIN: usize = 256;

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

/// Bytes that are no message.
#[derive(Debug, thiserror::Error)]
pub enum BadMessage {
    /// No message begins so.
    #[error("a message of unknown kind {0}")]
    Kind(u8),
    /// It is cut off or too long.
    #[error("a message of kind {kind} with {bytes} bytes, which cannot be one")]
    Length {
        /// Its first byte.
        kind: u8,
        /// Its length.
        bytes: usize,
    },
    /// A number in it means nothing.
    #[error("a message of kind {kind} with the value {value} where that means nothing")]
    Value {
        /// Its first byte.
        kind: u8,
        /// The number.
        value: u8,
    },
    /// Its JSON is not what it should be.
    #[error("a message of kind {kind} that is malformed")]
    Json {
        /// Its first byte.
        kind: u8,
        /// What serde found.
        #[source]
        source: serde_json::Error,
    },
    /// No message at all.
    #[error("an empty message")]
    Empty,
}

const HELLO: u8 = 1;
const ASK: u8 = 2;
const CANCEL: u8 = 3;
const ASK_STATUS: u8 = 4;
const WANT_INDEX: u8 = 5;
const ADOPT: u8 = 6;
const OPENED: u8 = 17;
const REFUSED: u8 = 18;
const ARRIVED: u8 = 19;
const FAILED: u8 = 20;
const STATUS: u8 = 21;
const INDEX: u8 = 22;
const ADOPTED: u8 = 23;

const CHUNK_BYTES: usize = 10;

/// Cuts what an agent says of its images.
fn shorten(images: &mut [ImageStatus], trouble_bytes_max: usize) {
    let cut = |text: &mut String, bytes_max| text.truncate(text.floor_char_boundary(bytes_max));
    for image in images {
        cut(&mut image.image, IMAGE_BYTES_MAX);
        for text in image.trouble.iter_mut().chain(&mut image.unkept) {
            cut(text, trouble_bytes_max);
        }
    }
}

impl FromMonitor {
    /// The bytes of the message.
    ///
    /// # Panics
    /// If it names more than [`CHUNKS_MAX`] chunks.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Hello(hello) => json(HELLO, hello),
            Self::Ask(urgency, chunks) => {
                let mut bytes = vec![ASK, urgency_on_the_wire(*urgency)];
                put_chunks(&mut bytes, chunks);
                bytes
            }
            Self::Cancel(chunks) => {
                let mut bytes = vec![CANCEL];
                put_chunks(&mut bytes, chunks);
                bytes
            }
            Self::Status => vec![ASK_STATUS],
            Self::WantIndex(want) => json(WANT_INDEX, want),
            Self::Adopt(adopt) => json(ADOPT, adopt),
        }
    }

    /// Reads a message.
    ///
    /// # Errors
    /// When the bytes are none.
    pub fn parse(bytes: &[u8]) -> Result<Self, BadMessage> {
        let (&kind, rest) = bytes.split_first().ok_or(BadMessage::Empty)?;
        match kind {
            HELLO => parse_json(kind, rest).map(Self::Hello),
            ASK => {
                let (&urgency, rest) = rest.split_first().ok_or(BadMessage::Length {
                    kind,
                    bytes: bytes.len(),
                })?;
                let urgency = match urgency {
                    0 => Urgency::Fill,
                    1 => Urgency::Soon,
                    2 => Urgency::Demand,
                    value => return Err(BadMessage::Value { kind, value }),
                };
                Ok(Self::Ask(urgency, take_chunks(kind, rest)?))
            }
            CANCEL => take_chunks(kind, rest).map(Self::Cancel),
            ASK_STATUS if rest.is_empty() => Ok(Self::Status),
            WANT_INDEX => parse_json(kind, rest).map(Self::WantIndex),
            ADOPT => parse_json(kind, rest).map(Self::Adopt),
            kind => Err(BadMessage::Kind(kind)),
        }
    }
}

impl FromAgent {
    /// The bytes of the message. A reason that is too long is cut.
    ///
    /// # Panics
    /// If it names more than [`CHUNKS_MAX`] chunks.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Opened(opened) => json(OPENED, opened),
            Self::Refused(refused) => {
                let reason = cut(&refused.reason).to_owned();
                json(
                    REFUSED,
                    &Refused {
                        reason,
                        transient: refused.transient,
                    },
                )
            }
            Self::Adopted => vec![ADOPTED],
            Self::Arrived(chunks) => {
                assert!(
                    chunks.len() <= CHUNKS_MAX,
                    "a message names at most {CHUNKS_MAX} chunks"
                );
                let mut bytes = Vec::with_capacity(1 + chunks.len() * (CHUNK_BYTES + 1));
                bytes.push(ARRIVED);
                for (chunk, what) in chunks {
                    put_chunk(&mut bytes, *chunk);
                    bytes.push(u8::from(*what == Arrived::Data));
                }
                bytes
            }
            Self::Index(found) => json(INDEX, found),
            Self::Failed(chunk, failure) => {
                let mut bytes = vec![FAILED];
                put_chunk(&mut bytes, *chunk);
                bytes.push(u8::from(failure.transient));
                bytes.extend_from_slice(cut(&failure.reason).as_bytes());
                bytes
            }
            Self::Status(status) => {
                let mut status = status.clone();
                status.images.truncate(STATUS_IMAGES_MAX);
                // Whole where there is room, as there is unless many images are in trouble.
                shorten(&mut status.images, REASON_BYTES_MAX);
                let mut bytes = json(STATUS, &status);
                if bytes.len() > MESSAGE_BYTES_MAX {
                    shorten(&mut status.images, TROUBLE_BYTES_MIN);
                    bytes = json(STATUS, &status);
                }
                // Texts of odd characters are longer in JSON.
                while bytes.len() > MESSAGE_BYTES_MAX && !status.images.is_empty() {
                    status.images.truncate(status.images.len() * 3 / 4);
                    bytes = json(STATUS, &status);
                }
                bytes
            }
        }
    }

    /// Reads a message.
    ///
    /// # Errors
    /// When the bytes are none.
    pub fn parse(bytes: &[u8]) -> Result<Self, BadMessage> {
        let (&kind, rest) = bytes.split_first().ok_or(BadMessage::Empty)?;
        let bad_length = || BadMessage::Length {
            kind,
            bytes: bytes.len(),
        };
        match kind {
            OPENED => parse_json(kind, rest).map(Self::Opened),
            REFUSED => parse_json(kind, rest).map(Self::Refused),
            STATUS => parse_json(kind, rest).map(Self::Status),
            INDEX => parse_json(kind, rest).map(Self::Index),
            ADOPTED if rest.is_empty() => Ok(Self::Adopted),
            ARRIVED => {
                let (chunks, []) = rest.as_chunks::<{ CHUNK_BYTES + 1 }>() else {
                    return Err(bad_length());
                };
                if chunks.len() > CHUNKS_MAX {
                    return Err(bad_length());
                }
                let arrived = chunks.iter().map(|bytes| {
                    let (chunk, what) = bytes.split_first_chunk().ok_or_else(bad_length)?;
                    match what[0] {
                        0 => Ok((get_chunk(chunk), Arrived::Zero)),
                        1 => Ok((get_chunk(chunk), Arrived::Data)),
                        value => Err(BadMessage::Value { kind, value }),
                    }
                });
                arrived.collect::<Result<_, _>>().map(Self::Arrived)
            }
            FAILED => {
                let (chunk, rest) = rest.split_first_chunk().ok_or_else(bad_length)?;
                let (&transient, reason) = rest.split_first().ok_or_else(bad_length)?;
                if reason.len() > REASON_BYTES_MAX {
                    return Err(bad_length());
                }
                let reason = String::from_utf8_lossy(reason).into_owned();
                Ok(Self::Failed(
                    get_chunk(chunk),
                    ChunkFailure {
                        reason,
                        transient: transient != 0,
                    },
                ))
            }
            kind => Err(BadMessage::Kind(kind)),
        }
    }
}

fn json(kind: u8, body: &impl Serialize) -> Vec<u8> {
    let mut bytes = vec![kind];
    serde_json::to_writer(&mut bytes, body).expect("the messages have a JSON form");
    bytes
}

fn parse_json<'b, T: Deserialize<'b>>(kind: u8, bytes: &'b [u8]) -> Result<T, BadMessage> {
    serde_json::from_slice(bytes).map_err(|source| BadMessage::Json { kind, source })
}

/// What was recorded with an image the agent finds there itself, and asks for unasked: from a monitor it is as any other
/// prefetch.
fn urgency_on_the_wire(urgency: Urgency) -> u8 {
    match urgency {
        Urgency::Fill => 0,
        Urgency::Soon | Urgency::Recorded => 1,
        Urgency::Demand => 2,
    }
}

fn put_chunk(bytes: &mut Vec<u8>, id: ChunkId) {
    bytes.extend_from_slice(&id.volume.0.to_le_bytes());
    bytes.extend_from_slice(&id.chunk.0.to_le_bytes());
}

fn put_chunks(bytes: &mut Vec<u8>, chunks: &[ChunkId]) {
    assert!(
        chunks.len() <= CHUNKS_MAX,
        "a message names at most {CHUNKS_MAX} chunks"
    );
    bytes.reserve(chunks.len() * CHUNK_BYTES);
    chunks.iter().for_each(|chunk| put_chunk(bytes, *chunk));
}

fn get_chunk(bytes: &[u8; CHUNK_BYTES]) -> ChunkId {
    let (volume, chunk) = bytes.split_at(2);
    ChunkId {
        volume: VolumeId(u16::from_le_bytes(volume.try_into().expect("two bytes"))),
        chunk: ChunkIndex(u64::from_le_bytes(chunk.try_into().expect("eight bytes"))),
    }
}

fn take_chunks(kind: u8, bytes: &[u8]) -> Result<Vec<ChunkId>, BadMessage> {
    let (chunks, rest) = bytes.as_chunks::<CHUNK_BYTES>();
    if !rest.is_empty() || chunks.len() > CHUNKS_MAX {
        return Err(BadMessage::Length {
            kind,
            bytes: bytes.len(),
        });
    }
    Ok(chunks.iter().map(get_chunk).collect())
}

/// The first part of a reason that is not too long.
fn cut(reason: &str) -> &str {
    &reason[..reason.floor_char_boundary(REASON_BYTES_MAX)]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn chunk() -> impl Strategy<Value = ChunkId> {
        (any::<u16>(), any::<u64>()).prop_map(|(volume, chunk)| ChunkId {
            volume: VolumeId(volume),
            chunk: ChunkIndex(chunk),
        })
    }

    proptest! {
        #[test]
        fn what_a_monitor_says_survives_its_bytes(
            chunks in prop::collection::vec(chunk(), 0..50),
            urgency in prop::sample::select(vec![Urgency::Fill, Urgency::Soon, Urgency::Demand]),
            image in ".{0,40}",
        ) {
            let hello = Hello { protocol: PROTOCOL_VERSION, image: image.clone(), digest: None, machine: "m".into() };
            let adopt = Adopt {
                protocol: PROTOCOL_VERSION,
                image,
                digest: BlobDigest::of(b"image"),
                volume: VolumeName::Memory,
                machine: "m".into(),
            };
            let messages = [
                FromMonitor::Hello(hello),
                FromMonitor::Ask(urgency, chunks.clone()),
                FromMonitor::Cancel(chunks),
                FromMonitor::Adopt(adopt),
            ];
            for message in messages {
                prop_assert_eq!(FromMonitor::parse(&message.to_bytes()).unwrap(), message);
            }
        }

        #[test]
        fn what_an_agent_says_survives_its_bytes(
            chunks in prop::collection::vec((chunk(), any::<bool>()), 0..50), reason in ".{0,40}", transient: bool,
        ) {
            let arrived: Vec<_> = chunks
                .iter()
                .map(|(chunk, data)| (*chunk, if *data { Arrived::Data } else { Arrived::Zero }))
                .collect();
            let id = ChunkId { volume: VolumeId(3), chunk: ChunkIndex(9) };
            let messages = [
                FromAgent::Arrived(arrived),
                FromAgent::Failed(id, ChunkFailure { reason: reason.clone(), transient }),
                FromAgent::Refused(Refused { reason, transient }),
                FromAgent::Adopted,
            ];
            for message in messages {
                prop_assert_eq!(FromAgent::parse(&message.to_bytes()).unwrap(), message);
            }
        }

        #[test]
        fn strange_bytes_are_refused_or_read_but_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = FromMonitor::parse(&bytes);
            let _ = FromAgent::parse(&bytes);
        }
    }

    #[test]
    fn messages_that_are_cut_off_or_mean_nothing_are_refused() {
        assert!(matches!(FromMonitor::parse(&[]), Err(BadMessage::Empty)));
        assert!(matches!(FromMonitor::parse(&[99]), Err(BadMessage::Kind(99))));
        assert!(matches!(
            FromMonitor::parse(&[ASK, 7]),
            Err(BadMessage::Value { value: 7, .. })
        ));
        assert!(matches!(
            FromMonitor::parse(&[ASK, 1, 0, 0]),
            Err(BadMessage::Length { .. })
        ));
        let mut too_many = vec![CANCEL];
        too_many.resize(1 + (CHUNKS_MAX + 1) * CHUNK_BYTES, 0);
        assert!(matches!(
            FromMonitor::parse(&too_many),
            Err(BadMessage::Length { .. })
        ));
        assert!(matches!(
            FromAgent::parse(&[FAILED, 1]),
            Err(BadMessage::Length { .. })
        ));
    }

    #[test]
    fn a_status_of_many_images_with_odd_names_fits_its_cap() {
        let image = ImageStatus {
            image: "\u{1}".repeat(4000),
            digest: BlobDigest::of(b"m"),
            machines: u64::MAX,
            bytes_received: u64::MAX,
            bytes_sent: u64::MAX,
            bytes_kept: u64::MAX,
            adopted: vec![AdoptedVolume {
                volume: VolumeName::Memory,
                bytes: u64::MAX,
            }],
            chunks_copied: u64::MAX,
            bytes_saved: u64::MAX,
            trouble: Some("\"".repeat(4000)),
            unkept: Some("\"".repeat(4000)),
        };
        let status = FromAgent::Status(AgentStatus {
            process: 1,
            images: vec![image; 1000],
            cache: CacheStatus::default(),
        });
        let bytes = status.to_bytes();
        assert!(bytes.len() <= MESSAGE_BYTES_MAX);
        let FromAgent::Status(read) = FromAgent::parse(&bytes).unwrap() else {
            panic!()
        };
        assert!(read.images.len() > 10, "{}", read.images.len());
    }

    #[test]
    fn a_status_of_an_agent_that_knows_less_is_read_and_says_no_more() {
        let digest = BlobDigest::of(b"m");
        let image = format!(
            r#"{{"image":"http://h/web","digest":"{digest}","machines":1,"bytes_received":2,"bytes_sent":3}}"#
        );
        let told = format!(r#"{{"process":7,"images":[{image}]}}"#);
        let FromAgent::Status(read) = FromAgent::parse(&[&[STATUS], told.as_bytes()].concat()).unwrap()
        else {
            panic!()
        };
        assert_eq!((read.process, read.images.len()), (7, 1));
        assert!(read.images[0].adopted.is_empty() && read.images[0].bytes_kept == 0);
        // What is not so takes no room.
        let said = FromAgent::Status(read).to_bytes();
        assert!(!String::from_utf8(said).unwrap().contains("adopted"));
    }

    #[test]
    fn the_trouble_of_few_images_is_told_whole() {
        let trouble = "x".repeat(REASON_BYTES_MAX);
        let image = ImageStatus {
            image: "http://h/web".into(),
            digest: BlobDigest::of(b"m"),
            machines: 1,
            bytes_received: 1,
            bytes_sent: 1,
            bytes_kept: 1,
            adopted: Vec::new(),
            chunks_copied: 1,
            bytes_saved: 1,
            trouble: Some(trouble.clone()),
            unkept: None,
        };
        let status = FromAgent::Status(AgentStatus {
            process: 1,
            images: vec![image; 3],
            cache: CacheStatus::default(),
        });
        let FromAgent::Status(read) = FromAgent::parse(&status.to_bytes()).unwrap() else {
            panic!()
        };
        assert!(
            read.images
                .iter()
                .all(|image| image.trouble.as_ref() == Some(&trouble))
        );
    }

    #[test]
    fn the_longest_message_fits_its_cap_and_a_long_reason_is_cut_between_characters() {
        let id = ChunkId {
            volume: VolumeId(0),
            chunk: ChunkIndex(0),
        };
        assert!(
            FromAgent::Arrived(vec![(id, Arrived::Data); CHUNKS_MAX])
                .to_bytes()
                .len()
                <= MESSAGE_BYTES_MAX
        );
        let reason = "ä".repeat(4000);
        let failed = FromAgent::Failed(
            id,
            ChunkFailure {
                reason,
                transient: true,
            },
        );
        let FromAgent::Failed(_, failure) = FromAgent::parse(&failed.to_bytes()).unwrap() else {
            panic!()
        };
        assert_eq!(failure.reason, "ä".repeat(2048));
    }
}
