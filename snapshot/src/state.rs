//! Machine state as an image carries it: the manifest's config blob.
//!
//! JSON, compressed with zstd. An older Runnel refuses a newer format by its version; a newer one reads older images,
//! filling in what they lack by serde's defaults. What is in it is untrusted: whoever restores a section checks it.

use std::collections::BTreeMap;
use std::io::{self, Read};

use serde::{Deserialize, Serialize};

use crate::digest::ChunkDigest;
use crate::index::{Entry, LayerNumber, PARTS_MAX, PageBits, StoredChunk, StoredPart};
use crate::section::SavedSection;
use crate::units::{ByteRange, ChunkIndex};
use crate::volume::VolumeName;

/// The version that this Runnel writes, and the newest that it reads.
pub const FORMAT_VERSION: u32 = 1;

/// The longest state blob: it is some 10 KiB.
pub const STATE_BYTES_MAX: u64 = 16 << 20;

/// The longest JSON that a blob may decompress to.
const JSON_BYTES_MAX: u64 = 64 << 20;

/// The most first chunks that are read: 32 vCPUs with a page-table walk of four registers each.
pub const FIRST_CHUNKS_MAX: usize = 4096;

/// Why bytes are no machine state.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The blob does not decompress.
    #[error("the machine state does not decompress")]
    Decompress(#[source] io::Error),
    /// Its JSON is longer than any machine's.
    #[error("the machine state decompresses to more than {JSON_BYTES_MAX} bytes")]
    TooLarge,
    /// The writer was newer.
    #[error(
        "the machine state has format version {found}, written by Runnel {runnel:?}, and this Runnel reads up to {FORMAT_VERSION}: use a newer Runnel"
    )]
    Newer {
        /// The version in the image.
        found: u32,
        /// Who wrote it.
        runnel: String,
    },
    /// It is no JSON of that shape.
    #[error("the machine state is malformed")]
    Malformed(#[from] serde_json::Error),
    /// More first chunks than any machine has.
    #[error("the machine state lists {0} first chunks, and at most {FIRST_CHUNKS_MAX} are read")]
    TooManyFirstChunks(usize),
}

/// Everything of a machine that is not a volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// [`FORMAT_VERSION`] of the writer.
    pub format_version: u32,
    /// The Runnel that wrote it.
    pub runnel: String,
    /// The wall clock when the machine stood still: milliseconds since 1970.
    pub saved_at_unix_ms: u64,
    /// What a host must have for this machine, by the name of the feature. The monitor writes and checks it.
    #[serde(default)]
    pub compatibility: BTreeMap<String, serde_json::Value>,
    /// The state of each vCPU, interrupt controller, clock and device.
    pub sections: Vec<SavedSection>,
    /// Where the chunks are that the saved registers lead to: a resume asks for them in its first request, before
    /// it has any segment of an index. Chunks of zeros are left out.
    #[serde(default)]
    pub first_chunks: Vec<FirstChunk>,
}

/// A chunk together with its entry in the index, which is not that of zeros.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct FirstChunk {
    /// The volume.
    pub volume: VolumeName,
    /// The chunk.
    pub chunk: ChunkIndex,
    /// Where its bytes are.
    pub entry: Entry,
}

/// A first chunk as JSON has it: with one frame, or with parts.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    volume: VolumeName,
    chunk: ChunkIndex,
    /// The layer that holds its frame.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    layer: Option<LayerNumber>,
    /// The bytes of the layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    frame: Option<ByteRange>,
    /// The digest of its plain bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    digest: Option<ChunkDigest>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    parts: Vec<Part>,
}

/// A part of a first chunk as JSON has it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Part {
    held: PageBits,
    shown: PageBits,
    layer: LayerNumber,
    frame: ByteRange,
    digest: ChunkDigest,
}

/// A first chunk whose place is not told, or told twice.
#[derive(Debug, thiserror::Error)]
#[error("{chunk} of {volume} has neither a frame nor up to {PARTS_MAX} parts, or both")]
struct BadFirstChunk {
    volume: VolumeName,
    chunk: ChunkIndex,
}

impl TryFrom<Stored> for FirstChunk {
    type Error = BadFirstChunk;

    fn try_from(stored: Stored) -> Result<Self, BadFirstChunk> {
        let (volume, chunk) = (stored.volume, stored.chunk);
        let entry = match (stored.layer, stored.frame, stored.digest, stored.parts) {
            (Some(layer), Some(frame), Some(digest), parts) if parts.is_empty() => {
                Entry::Data(StoredChunk { layer, frame, digest })
            }
            (None, None, None, parts) if (1..=PARTS_MAX).contains(&parts.len()) => {
                let part = |part: Part| StoredPart {
                    stored: StoredChunk {
                        layer: part.layer,
                        frame: part.frame,
                        digest: part.digest,
                    },
                    held: part.held,
                    shown: part.shown,
                };
                Entry::Parts(parts.into_iter().map(part).collect())
            }
            _ => return Err(BadFirstChunk { volume, chunk }),
        };
        Ok(Self { volume, chunk, entry })
    }
}

impl From<FirstChunk> for Stored {
    fn from(first: FirstChunk) -> Self {
        let whole = match first.entry {
            Entry::Data(stored) => Some(stored),
            _ => None,
        };
        let parts = match &first.entry {
            Entry::Parts(parts) => &parts[..],
            _ => &[],
        };
        let part = |part: &StoredPart| Part {
            held: part.held,
            shown: part.shown,
            layer: part.stored.layer,
            frame: part.stored.frame,
            digest: part.stored.digest,
        };
        Self {
            volume: first.volume,
            chunk: first.chunk,
            layer: whole.map(|stored| stored.layer),
            frame: whole.map(|stored| stored.frame),
            digest: whole.map(|stored| stored.digest),
            parts: parts.iter().map(part).collect(),
        }
    }
}

/// What is read before anything else, of any version.
#[derive(Deserialize)]
struct Version {
    format_version: u32,
    #[serde(default)]
    runnel: String,
}

impl MachineState {
    /// State of the current format, without first chunks.
    #[must_use]
    pub fn new(saved_at_unix_ms: u64, sections: Vec<SavedSection>) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            runnel: env!("CARGO_PKG_VERSION").to_owned(),
            saved_at_unix_ms,
            compatibility: BTreeMap::new(),
            sections,
            first_chunks: Vec::new(),
        }
    }

    /// The state as a blob.
    ///
    /// # Errors
    /// When it has no JSON form, or zstd lacks memory.
    pub fn encode(&self) -> Result<Vec<u8>, StateError> {
        let json = serde_json::to_vec(self)?;
        zstd::bulk::compress(&json, 3).map_err(StateError::Decompress)
    }

    /// Reads a blob.
    ///
    /// # Errors
    /// When it is malformed, absurdly large, or of a newer format.
    pub fn decode(blob: &[u8]) -> Result<Self, StateError> {
        let mut json = Vec::new();
        let mut decoder = zstd::Decoder::with_buffer(blob).map_err(StateError::Decompress)?;
        decoder
            .window_log_max(JSON_BYTES_MAX.ilog2())
            .map_err(StateError::Decompress)?;
        decoder
            .take(JSON_BYTES_MAX + 1)
            .read_to_end(&mut json)
            .map_err(StateError::Decompress)?;
        if json.len() as u64 > JSON_BYTES_MAX {
            return Err(StateError::TooLarge);
        }
        let version: Version = serde_json::from_slice(&json)?;
        if version.format_version > FORMAT_VERSION {
            let runnel = version.runnel.chars().take(40).collect();
            return Err(StateError::Newer {
                found: version.format_version,
                runnel,
            });
        }
        let state: Self = serde_json::from_slice(&json)?;
        match state.first_chunks.len() {
            0..=FIRST_CHUNKS_MAX => Ok(state),
            chunks => Err(StateError::TooManyFirstChunks(chunks)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn state() -> MachineState {
        let section = SavedSection {
            kind: "vcpu".into(),
            id: "0".into(),
            version: 1,
            state: serde_json::json!({ "rip": u64::MAX, "xsave": [1, 2, 3] }),
        };
        let mut state = MachineState::new(1_700_000_000_000, vec![section]);
        state.compatibility.insert("tsc_khz".into(), 2_400_000.into());
        let stored = StoredChunk {
            layer: LayerNumber(0),
            frame: ByteRange { start: 7, len: 9 },
            digest: ChunkDigest::of(b"x"),
        };
        let part = StoredPart {
            stored,
            held: PageBits::first(3),
            shown: PageBits::first(1),
        };
        for (chunk, entry) in [(3, Entry::Data(stored)), (4, Entry::Parts([part; 2].into()))] {
            state.first_chunks.push(FirstChunk {
                volume: VolumeName::Memory,
                chunk: ChunkIndex(chunk),
                entry,
            });
        }
        state
    }

    fn blob_of(json: &serde_json::Value) -> Vec<u8> {
        zstd::bulk::compress(json.to_string().as_bytes(), 1).unwrap()
    }

    #[test]
    fn state_survives_its_blob() {
        assert_eq!(MachineState::decode(&state().encode().unwrap()).unwrap(), state());
    }

    #[test]
    fn a_newer_format_is_refused_by_its_version_whatever_else_it_has() {
        let json = serde_json::json!({ "format_version": 2, "runnel": "9.9", "strange": true });
        let error = MachineState::decode(&blob_of(&json)).unwrap_err().to_string();
        assert!(error.contains("version 2") && error.contains("9.9"), "{error}");
    }

    #[test]
    fn what_an_older_writer_left_out_is_filled_in() {
        let mut json = serde_json::to_value(state()).unwrap();
        json.as_object_mut().unwrap().remove("first_chunks");
        assert!(
            MachineState::decode(&blob_of(&json))
                .unwrap()
                .first_chunks
                .is_empty()
        );
    }

    /// What every image before there were parts has.
    #[test]
    fn a_first_chunk_of_one_frame_keeps_its_shape_and_one_of_no_or_two_places_is_refused() {
        let digest = ChunkDigest::of(b"x").to_string();
        let json = serde_json::json!({
            "volume": "memory", "chunk": 3, "layer": 0, "frame": { "start": 7, "len": 9 }, "digest": digest,
        });
        assert_eq!(serde_json::to_value(&state().first_chunks[0]).unwrap(), json);
        let refused = |change: &dyn Fn(&mut serde_json::Value)| {
            let mut json = json.clone();
            change(&mut json);
            serde_json::from_value::<FirstChunk>(json).is_err()
        };
        assert!(!refused(&|_| {}));
        assert!(refused(&|json| _ = json.as_object_mut().unwrap().remove("frame")));
        let parts = serde_json::to_value(&state().first_chunks[1]).unwrap()["parts"].clone();
        assert!(refused(&|json| json["parts"] = parts.clone()));
        assert!(refused(
            &|json| *json = serde_json::json!({ "volume": "memory", "chunk": 3 })
        ));
        assert!(refused(&|json| json["pages"] = 1.into()));
    }

    #[test]
    fn hostile_blobs_are_refused() {
        assert!(matches!(
            MachineState::decode(b"not zstd"),
            Err(StateError::Decompress(_))
        ));
        let bomb = zstd::bulk::compress(&vec![b' '; JSON_BYTES_MAX as usize + 1], 1).unwrap();
        assert!(matches!(MachineState::decode(&bomb), Err(StateError::TooLarge)));
        let mut many = state();
        many.first_chunks = vec![many.first_chunks[0].clone(); FIRST_CHUNKS_MAX + 1];
        assert!(matches!(
            MachineState::decode(&many.encode().unwrap()),
            Err(StateError::TooManyFirstChunks(_))
        ));
    }

    proptest! {
        #[test]
        fn changed_blobs_never_panic(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
            let mut blob = state().encode().unwrap();
            for (at, byte) in &changes {
                let at = at.index(blob.len());
                blob[at] = *byte;
            }
            if let Ok(read) = MachineState::decode(&blob) {
                prop_assert!(read.format_version <= FORMAT_VERSION);
            }
        }
    }
}
