//! One volume: its seek table says where frames are, its index what they should be, and the frames what they are.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use super::{Finding, Verification};
use crate::blobs::{Blob, BlobStore};
use crate::decode::{ChunkDecoder, check_zeros};
use crate::digest::BlobDigest;
use crate::image::layout::{DirectoryBlobs, Layout};
use crate::image::manifest::ImageVolume;
use crate::index::{Entry, INDEX_BLOB_HEADER, IndexError, IndexReader, SegmentIndex, StoredChunk};
use crate::layer::seek_table::{FrameAt, LayerSeekTable};
use crate::state::FirstChunk;
use crate::units::{ByteRange, ChunkIndex};

/// Frames that a thread takes at once.
const BATCH: u32 = 256;

/// What the threads that look at one volume share.
struct Frames<'a> {
    verification: &'a Verification<'a>,
    volume: &'a ImageVolume,
    layer: Blob,
    store: Arc<DirectoryBlobs>,
    index: IndexReader,
    table: LayerSeekTable,
    next: AtomicU32,
}

/// Verifies a volume of one full layer.
pub(super) fn verify_volume(verification: &Verification<'_>, store: DirectoryBlobs, volume: &ImageVolume) {
    let store = Arc::new(store);
    // Reading the manifest saw to it that there is one, and that it is full.
    let [layer] = volume.layers[..] else { return };
    let index = index_of(&store, volume);
    verify_index(verification, store.as_ref(), volume, &index);
    let table = match LayerSeekTable::read(store.as_ref(), &layer) {
        Ok(table) => table,
        Err(error) => {
            let source = Box::new(error);
            return verification.find(Finding::SeekTable {
                volume: volume.name.clone(),
                source,
            });
        }
    };
    let frames = Frames {
        verification,
        volume,
        layer,
        store,
        index,
        table,
        next: AtomicU32::new(0),
    };
    if frames.table.content_bytes() != volume.root.volume_bytes() {
        let (found, expected) = (frames.table.content_bytes(), volume.root.volume_bytes());
        frames.disagree(
            ChunkIndex(0),
            format!("its frames hold {found} bytes, and the volume has {expected}"),
        );
    }
    thread::scope(|scope| {
        for _ in 1..verification.threads {
            scope.spawn(|| frames.work());
        }
        frames.work();
    });
}

/// Whether the place that a machine state gives is that of the index.
pub(super) fn agrees(layout: &Layout, volume: &ImageVolume, first: &FirstChunk) -> bool {
    let Ok(store) = layout.open_blobs([volume.index]) else {
        return true;
    }; // found already
    match index_of(&Arc::new(store), volume).entry(first.chunk) {
        Ok(entry) => entry == Entry::Data(first.stored()),
        Err(_) => first.chunk.0 < volume.root.chunks(), // found already, unless it is no chunk at all
    }
}

fn index_of(store: &Arc<DirectoryBlobs>, volume: &ImageVolume) -> IndexReader {
    let layer_bytes = volume.layers.iter().map(|layer| layer.bytes).collect();
    let store: Arc<dyn BlobStore> = Arc::<DirectoryBlobs>::clone(store);
    IndexReader::new(store, volume.index, volume.root.clone(), layer_bytes)
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
struct Hands {
    decoder: Option<ChunkDecoder>,
    stored: Vec<u8>,
    plain: Vec<u8>,
}

impl Frames<'_> {
    fn work(&self) {
        let mut hands = Hands::default();
        loop {
            let first = self.next.fetch_add(BATCH, Ordering::Relaxed);
            if first >= self.table.frames() {
                return;
            }
            for frame in (first..first + BATCH).map_while(|number| self.table.frame(number)) {
                if self.verification.progress.is_cancelled() {
                    return;
                }
                self.frame(frame, &mut hands);
                self.verification.progress.add(frame.stored.len);
                self.verification
                    .volume_bytes
                    .fetch_add(frame.content.len, Ordering::Relaxed);
            }
        }
    }

    fn frame(&self, frame: FrameAt, hands: &mut Hands) {
        let chunk_size = self.volume.root.chunk_size();
        let chunk = chunk_size.chunk_holding(frame.content.start);
        if !frame.content.start.is_multiple_of(chunk_size.bytes()) {
            return self.disagree(
                chunk,
                format!("a frame begins at byte {}, inside it", frame.content.start),
            );
        }
        match self.index.entry(chunk) {
            Ok(Entry::Data(stored)) => self.data(chunk, stored, frame, hands),
            Ok(Entry::Zero) => self.zeros(chunk, frame),
            Err(IndexError::Outside { .. }) => {
                self.disagree(chunk, "a frame lies behind the end of the volume".into());
            }
            Err(_) => {} // the segment was found already
        }
    }

    fn data(&self, chunk: ChunkIndex, stored: StoredChunk, frame: FrameAt, hands: &mut Hands) {
        let range = self
            .volume
            .root
            .chunk_size()
            .range_of(chunk, self.volume.root.volume_bytes());
        if frame.stored != stored.frame || frame.content != range {
            let reason = format!(
                "the index places it at {} of the layer, and the seek table at {} with {} bytes of content",
                stored.frame, frame.stored, frame.content.len
            );
            return self.disagree(chunk, reason);
        }
        // Both lengths were capped when the index was parsed.
        hands.stored.resize(frame.stored.len as usize, 0);
        hands.plain.resize(range.len as usize, 0);
        if let Err(error) = self
            .store
            .read_range(&self.layer, frame.stored.start, &mut hands.stored)
        {
            return self.verification.find(error.into());
        }
        let decoder = match &mut hands.decoder {
            Some(decoder) => decoder,
            none => match ChunkDecoder::new() {
                Ok(decoder) => none.insert(decoder),
                Err(error) => return self.disagree(chunk, format!("zstd cannot be set up: {error}")),
            },
        };
        match decoder.decode(&hands.stored, &stored.digest, &mut hands.plain) {
            Ok(()) => _ = self.verification.chunks.fetch_add(1, Ordering::Relaxed),
            Err(source) => self.verification.find(Finding::Chunk {
                volume: self.volume.name.clone(),
                chunk,
                layer: self.layer.digest,
                frame: frame.stored,
                source,
            }),
        }
    }

    fn zeros(&self, first: ChunkIndex, frame: FrameAt) {
        let root = &self.volume.root;
        let end = frame.content.start + frame.content.len; // offsets of a seek table: sums of 2^27 lengths of 32 bits
        if end > root.volume_bytes() {
            return; // found already
        }
        let chunks = root.chunk_size().chunks_in(end);
        for chunk in (first.0..chunks).map(ChunkIndex) {
            match self.index.entry(chunk) {
                Ok(Entry::Zero) => {}
                Ok(Entry::Data(_)) => {
                    return self.disagree(
                        chunk,
                        "the seek table has it in a run of zeros, and the index not".into(),
                    );
                }
                Err(_) => return, // found already
            }
        }
        if !end.is_multiple_of(root.chunk_size().bytes()) && end != root.volume_bytes() {
            return self.disagree(
                ChunkIndex(chunks - 1),
                format!("a run of zeros ends at byte {end}, inside it"),
            );
        }
        let bytes = FrameReader {
            store: self.store.as_ref(),
            layer: &self.layer,
            rest: frame.stored,
        };
        if let Err(source) = check_zeros(bytes, frame.content.len) {
            self.verification.find(Finding::Zeros {
                volume: self.volume.name.clone(),
                chunk: first,
                layer: self.layer.digest,
                frame: frame.stored,
                source,
            });
        }
    }

    fn disagree(&self, chunk: ChunkIndex, reason: String) {
        let layer: BlobDigest = self.layer.digest;
        self.verification.find(Finding::Disagree {
            volume: self.volume.name.clone(),
            chunk,
            layer,
            reason,
        });
    }
}

/// Reads a frame piece by piece: one of zeros may be of any length that the seek table claims.
struct FrameReader<'a> {
    store: &'a dyn BlobStore,
    layer: &'a Blob,
    rest: ByteRange,
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
