//! The messages in bytes.
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

use super::{CHUNKS_MAX, FromAgent, FromMonitor, Refused};
use crate::source::{Arrived, ChunkFailure, ChunkId, Urgency, VolumeId};
use crate::units::ChunkIndex;

/// The longest reason that is sent; a longer one is cut.
pub(super) const REASON_BYTES_MAX: usize = 4096;

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
            Self::Status(status) => status.cut_to_fit(|status| json(STATUS, status)),
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

    use super::super::{Adopt, Hello, MESSAGE_BYTES_MAX, PROTOCOL_VERSION};
    use super::*;
    use crate::digest::BlobDigest;
    use crate::volume::VolumeName;

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
