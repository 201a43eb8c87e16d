//! One volume: the seek tables of its layers say where frames are, its index what they should be, and the frames what
//! they are.
//!
//! The frames of a full layer follow the volume, so its seek table says which chunk each is; what a diff layer has, the
//! index alone can tell. Where a later layer lies over a frame, nobody knows its digest any more, and it is only held
//! against its length.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use super::{Finding, Verification};
use crate::blobs::{Blob, BlobStore};
use crate::decode::{ChunkDecoder, DecodeError};
use crate::image::layout::{DirectoryBlobs, Layout};
use crate::image::manifest::{ImageVolume, LayerKind};
use crate::index::{INDEX_BLOB_HEADER, IndexReader, SegmentIndex, StoredChunk};
use crate::layer::frame::frame_bytes_max;
use crate::layer::seek_table::{FrameAt, LayerSeekTable};
use crate::state::FirstChunk;
use crate::units::{ByteRange, ChunkIndex};

/// Frames that a thread takes at once.
pub(super) const BATCH: u32 = 256;

/// What the threads that look at one volume share.
pub(super) struct Look<'a> {
    pub(super) verification: &'a Verification<'a>,
    pub(super) volume: &'a ImageVolume,
    pub(super) store: Arc<DirectoryBlobs>,
    pub(super) index: IndexReader,
    /// By their numbers; `None` for one that is on another host.
    pub(super) layers: Vec<Option<LookedAt>>,
}

/// A layer that is looked at.
pub(super) struct LookedAt {
    pub(super) blob: Blob,
    pub(super) kind: LayerKind,
    pub(super) table: LayerSeekTable,
    /// The next frames to be taken by a thread.
    pub(super) next: AtomicU32,
    /// Of a diff layer: which of its frames the index names.
    pub(super) used: super::diff::Used,
}

/// Verifies a volume, as far as its layers are in the store.
pub(super) fn verify_volume(verification: &Verification<'_>, store: DirectoryBlobs, volume: &ImageVolume) {
    let store = Arc::new(store);
    let index = index_of(&store, volume);
    verify_index(verification, store.as_ref(), volume, &index);
    let read = |(blob, kind): (Blob, LayerKind)| {
        if !store.has(&blob) {
            return Ok(None);
        }
        let table = LayerSeekTable::read(store.as_ref(), &blob).map_err(|error| {
            verification.find(Finding::SeekTable {
                volume: volume.name.clone(),
                source: Box::new(error),
            });
        });
        table.map(|table| {
            Some(LookedAt {
                blob,
                kind,
                next: AtomicU32::new(0),
                used: super::diff::Used::new(&table, kind),
                table,
            })
        })
    };
    // All that are wrong are found. Without one of them the numbers of the others would be wrong.
    let layers: Vec<_> = volume.layers_with_kinds().map(read).collect();
    let Ok(layers) = layers.into_iter().collect() else {
        return;
    };
    let look = Look {
        verification,
        volume,
        store,
        index,
        layers,
    };
    let next_segment = AtomicU32::new(0);
    look.with_threads(|hands| {
        look.full_layer(hands);
        look.diff_layers(&next_segment, hands);
    });
    look.with_threads(|hands| look.unused(hands));
}

/// Whether the place that a machine state gives is that of the index.
pub(super) fn agrees(layout: &Layout, volume: &ImageVolume, first: &FirstChunk) -> bool {
    let Ok(store) = layout.open_blobs([volume.index]) else {
        return true;
    }; // found already
    match index_of(&Arc::new(store), volume).entry(first.chunk) {
        Ok(entry) => entry == first.entry,
        Err(_) => first.chunk.0 < volume.root.chunks(), // found already, unless it is no chunk at all
    }
}

fn index_of(store: &Arc<DirectoryBlobs>, volume: &ImageVolume) -> IndexReader {
    let store: Arc<dyn BlobStore> = Arc::<DirectoryBlobs>::clone(store);
    IndexReader::new(store, volume.index, volume.root.clone(), volume.layer_bytes())
}

/// Parses every segment, so that a broken one is found once and not with each of its chunks.
fn verify_index(
    verification: &Verification<'_>,
    store: &dyn BlobStore,
    volume: &ImageVolume,
    index: &IndexReader,
) {
    let mut header = [0; INDEX_BLOB_HEADER.len()];
    match store.read_range(&volume.index, 0, &mut header) {
        Ok(()) if header == *INDEX_BLOB_HEADER => {}
        Ok(()) => verification.find(Finding::Disagree {
            volume: volume.name.clone(),
            chunk: ChunkIndex(0),
            layer: volume.index.digest,
            reason: "the index blob does not begin as one".into(),
        }),
        Err(error) => verification.find(error.into()),
    }
    for number in (0..volume.root.segments()).map(SegmentIndex) {
        if verification.progress.is_cancelled() {
            return;
        }
        if let Err(error) = index.segment(number) {
            verification.find(Finding::Index {
                volume: volume.name.clone(),
                source: Box::new(error),
            });
        }
    }
}

/// What a thread keeps between frames.
#[derive(Default)]
pub(super) struct Hands {
    decoder: Option<ChunkDecoder>,
    stored: Vec<u8>,
    plain: Vec<u8>,
}

impl Look<'_> {
    fn with_threads(&self, work: impl Fn(&mut Hands) + Sync) {
        thread::scope(|scope| {
            for _ in 1..self.verification.threads {
                scope.spawn(|| work(&mut Hands::default()));
            }
            work(&mut Hands::default());
        });
    }

    /// The next frames of a layer that nobody has taken, with their numbers; `None` when there are no more, or it was
    /// called off.
    pub(super) fn take_frames(&self, layer: &LookedAt) -> Option<std::ops::Range<u32>> {
        let first = layer.next.fetch_add(BATCH, Ordering::Relaxed);
        let frames = layer.table.frames();
        (first < frames && !self.verification.progress.is_cancelled())
            .then(|| first..frames.min(first + BATCH))
    }

    pub(super) fn range_of(&self, chunk: ChunkIndex) -> ByteRange {
        let root = &self.volume.root;
        root.chunk_size().range_of(chunk, root.volume_bytes())
    }

    /// Holds a frame that is what the index says of `chunk`, `plain_bytes` long, against its digest; false if it is not.
    pub(super) fn is_right(
        &self,
        chunk: ChunkIndex,
        layer: &LookedAt,
        stored: &StoredChunk,
        plain_bytes: u64,
        hands: &mut Hands,
    ) -> bool {
        let decode = |decoder: &mut ChunkDecoder, frame: &[u8], plain: &mut [u8]| {
            decoder.decode(frame, &stored.digest, plain)
        };
        self.decodes(chunk, layer, stored.frame, plain_bytes, hands, decode)
    }

    /// Checks that a frame of which the index says nothing any more decompresses to so many bytes, no more than a chunk.
    pub(super) fn overwritten(
        &self,
        chunk: ChunkIndex,
        layer: &LookedAt,
        frame: &FrameAt,
        hands: &mut Hands,
    ) {
        let chunk_size = self.volume.root.chunk_size();
        if frame.stored.len > frame_bytes_max(chunk_size)
            || !(1..=chunk_size.bytes()).contains(&frame.content.len)
        {
            let reason = format!(
                "the seek table has a frame at {} with {} bytes of content, which is no chunk's",
                frame.stored, frame.content.len
            );
            return self.disagree(chunk, layer, reason);
        }
        self.decodes(
            chunk,
            layer,
            frame.stored,
            frame.content.len,
            hands,
            ChunkDecoder::decompress,
        );
    }

    /// Reads and decodes a frame. Both lengths were capped.
    fn decodes(
        &self,
        chunk: ChunkIndex,
        layer: &LookedAt,
        frame: ByteRange,
        plain_bytes: u64,
        hands: &mut Hands,
        decode: impl FnOnce(&mut ChunkDecoder, &[u8], &mut [u8]) -> Result<(), DecodeError>,
    ) -> bool {
        hands.stored.resize(frame.len as usize, 0);
        hands.plain.resize(plain_bytes as usize, 0);
        let read = self.store.read_range(&layer.blob, frame.start, &mut hands.stored);
        if let Err(error) = read {
            self.verification.find(error.into());
            return false;
        }
        let decoder = match &mut hands.decoder {
            Some(decoder) => decoder,
            none => match ChunkDecoder::new() {
                Ok(decoder) => none.insert(decoder),
                Err(error) => {
                    self.disagree(chunk, layer, format!("zstd cannot be set up: {error}"));
                    return false;
                }
            },
        };
        let decoded = decode(decoder, &hands.stored, &mut hands.plain);
        let is_right = decoded.is_ok();
        if let Err(source) = decoded {
            self.verification.find(Finding::Chunk {
                volume: self.volume.name.clone(),
                chunk,
                layer: layer.blob.digest,
                frame,
                source,
            });
        }
        is_right
    }

    pub(super) fn disagree(&self, chunk: ChunkIndex, layer: &LookedAt, reason: String) {
        self.verification.find(Finding::Disagree {
            volume: self.volume.name.clone(),
            chunk,
            layer: layer.blob.digest,
            reason,
        });
    }
}

/// Reads a frame piece by piece: one of zeros may be of any length that the seek table claims.
pub(super) struct FrameReader<'a> {
    pub(super) store: &'a dyn BlobStore,
    pub(super) layer: &'a Blob,
    pub(super) rest: ByteRange,
}

impl Read for FrameReader<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let len = self.rest.len.min(into.len() as u64);
        self.store
            .read_range(self.layer, self.rest.start, &mut into[..len as usize])
            .map_err(io::Error::other)?;
        self.rest = ByteRange {
            start: self.rest.start + len,
            len: self.rest.len - len,
        };
        Ok(len as usize)
    }
}
