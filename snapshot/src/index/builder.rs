//! Writes an index, chunk after chunk, holding no more than one segment. The blob's header is its writer's to put first.

use super::segment::{KIND_DATA, KIND_PARTS, KIND_ZERO, page_bytes};
use super::{
    Entry, IndexRoot, LAYERS_MAX, LayerNumber, SEGMENT_VOLUME_BYTES, StoredChunk, StoredPart,
    VOLUME_BYTES_MAX, parts,
};
use crate::units::{ChunkIndex, ChunkSize};
use crate::varint;

/// A volume that the format cannot describe.
#[derive(Debug, thiserror::Error)]
#[error(
    "a volume of {volume_bytes} bytes in {layers} layers is not possible: 1 to {VOLUME_BYTES_MAX} bytes in at most {LAYERS_MAX} layers are (`runnel image squash` makes an image of one layer)"
)]
pub struct IndexTooLarge {
    volume_bytes: u64,
    layers: u16,
}

/// Collects entries in the order of chunks.
pub struct IndexBuilder {
    volume_bytes: u64,
    chunk_size: ChunkSize,
    layers: u16,
    /// Chunks described so far, in the whole volume.
    chunks: u64,
    segments: Vec<(u32, [u8; 32])>,
    /// The runs of the current segment, without the open one.
    segment: Vec<u8>,
    /// Where the last frame of each layer ended in this segment.
    layer_ends: Vec<u64>,
    open: OpenRun,
}

/// The run that may still grow.
#[derive(Default)]
enum OpenRun {
    #[default]
    None,
    Zero {
        chunks: u64,
    },
    Data {
        chunks: u64,
        first: StoredChunk,
        end: u64,
        /// Lengths and digests, as they are stored.
        frames: Vec<u8>,
    },
    Parts {
        chunks: u64,
        /// The chunks' parts, as they are stored.
        stored: Vec<u8>,
    },
}

impl IndexBuilder {
    /// Begins the index of a volume.
    ///
    /// # Errors
    /// When the volume is empty, too large, or in too many layers.
    pub fn new(volume_bytes: u64, chunk_size: ChunkSize, layers: u16) -> Result<Self, IndexTooLarge> {
        if !(1..=VOLUME_BYTES_MAX).contains(&volume_bytes) || layers > LAYERS_MAX {
            return Err(IndexTooLarge { volume_bytes, layers });
        }
        Ok(Self {
            volume_bytes,
            chunk_size,
            layers,
            chunks: 0,
            segments: Vec::new(),
            segment: Vec::new(),
            layer_ends: vec![0; usize::from(layers)],
            open: OpenRun::None,
        })
    }

    /// Describes the next `chunks` chunks as zeros; finished segments go to `write`.
    ///
    /// # Errors
    /// The first error of `write`.
    ///
    /// # Panics
    /// If the volume has no more chunks than were described already.
    pub fn push_zeros<E>(
        &mut self,
        mut chunks: u64,
        mut write: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while chunks > 0 {
            let now = chunks.min(self.left_in_segment());
            match &mut self.open {
                OpenRun::Zero { chunks } => *chunks += now,
                _ => {
                    self.close_run();
                    self.open = OpenRun::Zero { chunks: now };
                }
            }
            self.advance(now, &mut write)?;
            chunks -= now;
        }
        Ok(())
    }

    /// Describes the next chunk; a finished segment goes to `write`.
    ///
    /// # Errors
    /// The first error of `write`.
    ///
    /// # Panics
    /// If the volume has no more chunks than were described already, or not that layer, or the parts are none that a
    /// chunk can have.
    pub fn push<E>(&mut self, entry: Entry, mut write: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        for stored in entry.frames() {
            let layer = stored.layer.0;
            assert!(layer < self.layers, "layer {layer} of {}", self.layers);
        }
        assert!(self.left_in_segment() > 0, "more chunks than the volume has");
        match entry {
            Entry::Zero => return self.push_zeros(1, write),
            Entry::Data(chunk) => self.push_data(chunk),
            Entry::Parts(parts) => self.push_parts(&parts),
        }
        self.advance(1, &mut write)
    }

    fn push_data(&mut self, chunk: StoredChunk) {
        match &mut self.open {
            OpenRun::Data {
                chunks, first, end, ..
            } if first.layer == chunk.layer && *end == chunk.frame.start => {
                *chunks += 1;
            }
            _ => {
                self.close_run();
                self.open = OpenRun::Data {
                    chunks: 1,
                    first: chunk,
                    end: 0,
                    frames: Vec::new(),
                };
            }
        }
        if let OpenRun::Data { end, frames, .. } = &mut self.open {
            *end = chunk.frame.start + chunk.frame.len;
            varint::append(chunk.frame.len, frames);
            frames.extend_from_slice(&chunk.digest.0);
        }
    }

    fn push_parts(&mut self, parts: &[StoredPart]) {
        let chunk = self
            .chunk_size
            .range_of(ChunkIndex(self.chunks), self.volume_bytes);
        assert_eq!(parts::check(parts, chunk.len), Ok(()), "{parts:?}");
        let (mut chunks, mut stored) = match std::mem::take(&mut self.open) {
            OpenRun::Parts { chunks, stored } => (chunks, stored),
            other => {
                self.open = other;
                self.close_run();
                (0, Vec::new())
            }
        };
        chunks += 1;
        varint::append(parts.len() as u64, &mut stored);
        let bytes = page_bytes(self.chunk_size);
        for part in parts {
            for pages in [part.held, part.shown] {
                stored.extend(pages.to_bytes().iter().take(bytes));
            }
            let StoredChunk { layer, frame, digest } = part.stored;
            varint::append(u64::from(layer.0), &mut stored);
            varint::append_signed(self.distance(layer, frame.start), &mut stored);
            varint::append(frame.len, &mut stored);
            stored.extend_from_slice(&digest.0);
            self.ends_at(layer, frame.start + frame.len);
        }
        self.open = OpenRun::Parts { chunks, stored };
    }

    /// How far a frame begins behind the end of the layer's last one.
    fn distance(&self, layer: LayerNumber, start: u64) -> i64 {
        let end = self.layer_ends.get(usize::from(layer.0)).copied().unwrap_or(0);
        start.wrapping_sub(end) as i64
    }

    fn ends_at(&mut self, layer: LayerNumber, end: u64) {
        if let Some(last) = self.layer_ends.get_mut(usize::from(layer.0)) {
            *last = end;
        }
    }

    /// Ends the index. The root says where `write` was given what.
    ///
    /// # Panics
    /// If chunks are missing.
    #[must_use]
    pub fn finish(self) -> IndexRoot {
        assert_eq!(
            self.chunks,
            self.chunk_size.chunks_in(self.volume_bytes),
            "chunks described"
        );
        IndexRoot::new(self.volume_bytes, self.chunk_size, self.layers, self.segments)
    }

    /// Takes the last layer away, of which no chunk was said to have anything.
    pub(crate) fn drop_last_layer(&mut self) {
        self.layers = self.layers.saturating_sub(1);
    }

    /// How many chunks were described.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        self.chunks
    }

    fn left_in_segment(&self) -> u64 {
        let per_segment = SEGMENT_VOLUME_BYTES / self.chunk_size.bytes();
        let left = self.chunk_size.chunks_in(self.volume_bytes) - self.chunks;
        assert!(left > 0, "more chunks than the volume has");
        left.min(per_segment - self.chunks % per_segment)
    }

    fn advance<E>(&mut self, chunks: u64, write: &mut impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        let ends_segment = chunks == self.left_in_segment();
        self.chunks += chunks;
        if !ends_segment {
            return Ok(());
        }
        // Zeros alone need no bytes.
        if !(self.segment.is_empty() && matches!(self.open, OpenRun::Zero { .. })) {
            self.close_run();
        }
        self.open = OpenRun::None;
        self.segments
            .push((self.segment.len() as u32, *blake3::hash(&self.segment).as_bytes()));
        write(&self.segment)?;
        self.segment.clear();
        self.layer_ends.fill(0);
        Ok(())
    }

    fn close_run(&mut self) {
        match std::mem::take(&mut self.open) {
            OpenRun::None => {}
            OpenRun::Zero { chunks } => varint::append(chunks << 2 | KIND_ZERO, &mut self.segment),
            OpenRun::Data {
                chunks,
                first,
                end,
                frames,
            } => {
                varint::append(chunks << 2 | KIND_DATA, &mut self.segment);
                varint::append(u64::from(first.layer.0), &mut self.segment);
                let distance = self.distance(first.layer, first.frame.start);
                varint::append_signed(distance, &mut self.segment);
                self.ends_at(first.layer, end);
                self.segment.extend_from_slice(&frames);
            }
            OpenRun::Parts { chunks, stored } => {
                varint::append(chunks << 2 | KIND_PARTS, &mut self.segment);
                self.segment.extend_from_slice(&stored);
            }
        }
    }
}
