//! Verify: every digest of an image, and index, seek table and frames held against each other.
//!
//! What is found names blob and chunk. An image without findings resumes byte for byte, and stock `zstd -dc` of each
//! layer that lies alone is its volume.

mod diff;
mod full;
mod volume;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::Digest as _;

use crate::blobs::{Blob, BlobError, BlobStore, read_verified};
use crate::causes::with_causes;
use crate::decode::{DecodeError, ZerosError};
use crate::digest::BlobDigest;
use crate::image::layout::{DirectoryBlobs, Layout};
use crate::image::manifest::{ImageManifest, ImageVolume, MANIFEST_BYTES_MAX, Urls};
use crate::image::reference::Wanted;
use crate::image::{Image, ImageError};
use crate::index::IndexError;
use crate::layer::seek_table::SeekTableError;
use crate::state::{MachineState, STATE_BYTES_MAX, StateError};
use crate::units::{ByteRange, ChunkIndex};
use crate::volume::VolumeName;

/// Findings that are kept; a ruined image has as many as chunks.
const FINDINGS_MAX: usize = 1000;

/// Bytes of a blob that are hashed at once.
const PIECE_BYTES: usize = 1 << 20;

/// Something that is wrong with an image.
#[derive(Debug, thiserror::Error)]
pub enum Finding {
    /// A blob is missing, truncated or damaged.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// The machine state makes no sense.
    #[error("state {digest}")]
    State {
        /// The blob.
        digest: BlobDigest,
        /// What is wrong.
        #[source]
        source: StateError,
    },
    /// A place that the machine state gives for a chunk is not the index's.
    #[error("state {digest}: the place of {chunk} of {volume} is not that of the index")]
    FirstChunk {
        /// The state's blob.
        digest: BlobDigest,
        /// Which volume.
        volume: VolumeName,
        /// Which chunk.
        chunk: ChunkIndex,
    },
    /// The working set makes no sense, or is another image's.
    #[error("the recorded order of chunks")]
    WorkingSet(#[source] Box<ImageError>),
    /// Part of an index makes no sense.
    #[error("volume {volume}")]
    Index {
        /// Which volume.
        volume: VolumeName,
        /// What is wrong.
        #[source]
        source: Box<IndexError>,
    },
    /// A layer has no usable seek table.
    #[error("volume {volume}")]
    SeekTable {
        /// Which volume.
        volume: VolumeName,
        /// What is wrong.
        #[source]
        source: Box<SeekTableError>,
    },
    /// Index, seek table and volume disagree.
    #[error("volume {volume}, {chunk}, layer {layer}: {reason}")]
    Disagree {
        /// Which volume.
        volume: VolumeName,
        /// The chunk where it is noticed.
        chunk: ChunkIndex,
        /// Which layer.
        layer: BlobDigest,
        /// What disagrees with what.
        reason: String,
    },
    /// A frame is not its chunk.
    #[error("volume {volume}, {chunk}, {frame} of layer {layer}")]
    Chunk {
        /// Which volume.
        volume: VolumeName,
        /// Which chunk.
        chunk: ChunkIndex,
        /// Which layer.
        layer: BlobDigest,
        /// The bytes of the layer.
        frame: ByteRange,
        /// What is wrong.
        #[source]
        source: DecodeError,
    },
    /// A frame is not the run of zeros that the index says.
    #[error("volume {volume}, zeros from {chunk} on, {frame} of layer {layer}")]
    Zeros {
        /// Which volume.
        volume: VolumeName,
        /// The first chunk.
        chunk: ChunkIndex,
        /// Which layer.
        layer: BlobDigest,
        /// The bytes of the layer.
        frame: ByteRange,
        /// What is wrong.
        #[source]
        source: ZerosError,
    },
}

impl Finding {
    /// The finding and its causes in one line.
    #[must_use]
    pub fn trace(&self) -> String {
        with_causes(self)
    }
}

/// How far a verification is, for another thread to watch; and the word that calls it off.
#[derive(Default)]
pub struct VerifyProgress {
    total: AtomicU64,
    done: AtomicU64,
    cancelled: AtomicBool,
}

impl VerifyProgress {
    /// Bytes that were looked at, and how many there are; layers count twice, as blobs and as frames.
    #[must_use]
    pub fn bytes(&self) -> (u64, u64) {
        (
            self.done.load(Ordering::Relaxed),
            self.total.load(Ordering::Relaxed),
        )
    }

    /// Ends it soon; what was found until then is reported.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

/// What a verification came to.
#[derive(Debug)]
pub struct Report {
    /// The manifest.
    pub manifest: BlobDigest,
    /// What is wrong, at most a thousand.
    pub findings: Vec<Finding>,
    /// How much more is.
    pub findings_left_out: u64,
    /// Chunks whose bytes were held against their digest.
    pub chunks: u64,
    /// Bytes of volumes that were checked, zeros included.
    pub volume_bytes: u64,
    /// Layers that are on other hosts, and were not looked at: of a thin image.
    pub layers_elsewhere: usize,
    /// Whether it was called off before everything was looked at.
    pub cancelled: bool,
}

impl Report {
    /// Whether everything was looked at and nothing is wrong.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.findings.is_empty() && !self.cancelled
    }
}

/// What the threads of a verification share.
struct Verification<'a> {
    progress: &'a VerifyProgress,
    threads: usize,
    findings: Mutex<(Vec<Finding>, u64)>,
    chunks: AtomicU64,
    volume_bytes: AtomicU64,
}

/// Verifies one image of a layout with so many threads.
///
/// # Errors
/// When there is no manifest to begin with, or a newer Runnel wrote the image; everything else is a finding.
pub fn verify(
    layout: &Layout,
    wanted: &Wanted,
    threads: usize,
    progress: &VerifyProgress,
) -> Result<Report, ImageError> {
    let descriptor = layout.choose(wanted)?;
    let manifest = ImageManifest::parse(&layout.read(&descriptor, MANIFEST_BYTES_MAX)?)?;
    refuse_newer_state(layout, &manifest.state)?;
    let is_here = |blob: &&Blob| !layout.lacks(blob, &manifest.urls);
    let all = manifest.blobs();
    let blobs: Vec<Blob> = all.iter().filter(is_here).copied().collect();
    let layers = manifest.volumes.iter().flat_map(|volume| &volume.layers);
    let total = blobs
        .iter()
        .chain(layers.filter(is_here))
        .fold(0_u64, |sum, blob| sum.saturating_add(blob.bytes));
    progress.total.store(total, Ordering::Relaxed);

    let verification = Verification {
        progress,
        threads: threads.max(1),
        findings: Mutex::default(),
        chunks: AtomicU64::new(0),
        volume_bytes: AtomicU64::new(0),
    };
    let layers_elsewhere = all.len() - blobs.len();
    let sound: Vec<Blob> = blobs
        .into_iter()
        .filter(|blob| verification.blob(layout, blob))
        .collect();
    let store = layout.open_blobs(sound.iter().copied())?;
    for volume in &manifest.volumes {
        // A blob whose digest is wrong was found already; its frames are looked at nevertheless, to name chunks.
        verification.volume(layout, volume, &manifest.urls);
    }
    let is_sound = |blob: &Blob| sound.iter().any(|other| other.digest == blob.digest);
    if is_sound(&manifest.state) {
        verification.state(layout, &store, &manifest);
    }
    if manifest.working_set.as_ref().is_some_and(is_sound) {
        let image = Image {
            manifest: Arc::new(manifest.clone()),
            store: Arc::new(store),
        };
        if let Err(error) = image.working_set() {
            verification.find(Finding::WorkingSet(Box::new(error)));
        }
    }
    let (findings, findings_left_out) = verification
        .findings
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    Ok(Report {
        manifest: manifest.digest,
        findings,
        findings_left_out,
        chunks: verification.chunks.into_inner(),
        volume_bytes: verification.volume_bytes.into_inner(),
        layers_elsewhere,
        cancelled: progress.is_cancelled(),
    })
}

/// Fails if the machine state is sound as a blob and of a version that this Runnel cannot judge.
fn refuse_newer_state(layout: &Layout, state: &Blob) -> Result<(), ImageError> {
    let read = layout
        .open_blobs_or_missing([*state])
        .and_then(|store| read_verified(&store, state, STATE_BYTES_MAX));
    match read.map(|bytes| MachineState::decode(&bytes)) {
        Ok(Err(newer @ StateError::Newer { .. })) => Err(newer.into()),
        // What else is wrong is found when it is looked at.
        _ => Ok(()),
    }
}

impl Verification<'_> {
    fn find(&self, finding: Finding) {
        let mut findings = self.findings.lock().unwrap_or_else(PoisonError::into_inner);
        if findings.0.len() < FINDINGS_MAX {
            findings.0.push(finding);
        } else {
            findings.1 += 1;
        }
    }

    /// Hashes a blob; false if it is not what its name says.
    fn blob(&self, layout: &Layout, blob: &Blob) -> bool {
        match self.hash(layout, blob) {
            Ok(found) if found == blob.digest => return true,
            Ok(_) if self.progress.is_cancelled() => {}
            Ok(found) => self.find(
                BlobError::Corrupt {
                    digest: blob.digest,
                    found,
                }
                .into(),
            ),
            Err(error) => self.find(error.into()),
        }
        false
    }

    fn hash(&self, layout: &Layout, blob: &Blob) -> Result<BlobDigest, BlobError> {
        let store = layout.open_blobs_or_missing([*blob])?;
        let mut hash = sha2::Sha256::default();
        let mut piece = vec![0; PIECE_BYTES.min(usize::try_from(blob.bytes).unwrap_or(PIECE_BYTES))];
        let mut offset = 0;
        while offset < blob.bytes && !self.progress.is_cancelled() {
            let len = (blob.bytes - offset).min(piece.len() as u64);
            let piece = &mut piece[..len as usize];
            store.read_range(blob, offset, piece)?;
            hash.update(piece);
            offset += len;
            self.progress.add(len);
        }
        Ok(BlobDigest::from_hash(hash))
    }

    fn volume(&self, layout: &Layout, volume: &ImageVolume, urls: &Urls) {
        let needed = volume.layers.iter().copied().chain([volume.index]);
        let needed = needed.filter(|blob| !layout.lacks(blob, urls));
        // What cannot be opened was found when it should have been hashed.
        let Ok(store) = layout.open_blobs(needed) else {
            return;
        };
        volume::verify_volume(self, store, volume);
    }

    /// Decodes the state and compares the places that it gives with the indexes.
    fn state(&self, layout: &Layout, store: &DirectoryBlobs, manifest: &ImageManifest) {
        let digest = manifest.state.digest;
        let decoded = match read_verified(store, &manifest.state, STATE_BYTES_MAX) {
            Ok(bytes) => MachineState::decode(&bytes),
            Err(error) => return self.find(error.into()),
        };
        let state = match decoded {
            Ok(state) => state,
            Err(source) => return self.find(Finding::State { digest, source }),
        };
        for first in state.first_chunks {
            let volume = manifest.volumes.iter().find(|volume| volume.name == first.volume);
            if !volume.is_some_and(|volume| volume::agrees(layout, volume, &first)) {
                self.find(Finding::FirstChunk {
                    digest,
                    volume: first.volume,
                    chunk: first.chunk,
                });
            }
        }
    }
}
