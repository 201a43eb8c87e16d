//! The lower level of an index: what each chunk of 128 MiB of volume is.

use super::{Entry, IndexRoot, LayerNumber, SegmentIndex, StoredChunk, varint};
use crate::digest::ChunkDigest;
use crate::layer::frame::frame_bytes_max;
use crate::units::ByteRange;

pub(super) const KIND_ZERO: u64 = 0;
pub(super) const KIND_DATA: u64 = 1;
const KIND_DIFF: u64 = 2;

/// Why bytes are not the segment that they should be. Chunks are counted from the segment's first.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// The index has no such segment.
    #[error("the index has no {0}")]
    Missing(SegmentIndex),
    /// The bytes are not those that the root names.
    #[error("{0} of the index does not match its digest")]
    Corrupt(SegmentIndex),
    /// The bytes are no list of runs.
    #[error("{segment} of the index is malformed at its chunk {chunk}: {reason}")]
    Malformed {
        /// Which segment.
        segment: SegmentIndex,
        /// The chunk that was described when it went wrong.
        chunk: u32,
        /// What is wrong.
        reason: &'static str,
    },
    /// A run of a kind that this Runnel does not read.
    #[error("{segment} of the index has a run of kind {kind} ({name}): use a newer Runnel")]
    UnknownKind {
        /// Which segment.
        segment: SegmentIndex,
        /// The number of the kind.
        kind: u64,
        /// Its name, as far as this version knows it.
        name: &'static str,
    },
    /// A frame that is not in its layer.
    #[error(
        "{segment} of the index places the frame of its chunk {chunk} at {frame} of layer {layer}, outside of it"
    )]
    OutsideLayer {
        /// Which segment.
        segment: SegmentIndex,
        /// Which chunk.
        chunk: u32,
        /// Which layer.
        layer: u64,
        /// The bytes of the layer.
        frame: ByteRange,
    },
    /// Two chunks share bytes of a layer. Each chunk has a frame of its own, so one of them is not where it is said.
    #[error(
        "{segment} of the index places the frame of its chunk {chunk} at {frame} of layer {layer}, over that of its chunk {other}"
    )]
    Overlap {
        /// Which segment.
        segment: SegmentIndex,
        /// The chunk whose frame begins later.
        chunk: u32,
        /// The other chunk.
        other: u32,
        /// Which layer.
        layer: u16,
        /// The bytes of the layer that `chunk` is said to have.
        frame: ByteRange,
    },
}

/// A run of chunks of one kind.
#[derive(Debug)]
struct Run {
    /// Its first chunk, counted from the segment's first.
    first: u32,
    /// Where its chunks begin in [`Segment::chunks`]; `None` for zeros.
    data: Option<u32>,
}

/// A segment, checked: every frame lies in its layer, and over no other. At most 8192 chunks, so at most half a MiB.
#[derive(Debug)]
pub struct Segment {
    chunks_covered: u32,
    runs: Vec<Run>,
    chunks: Vec<StoredChunk>,
}

impl Segment {
    /// Reads segment `number` of `root` from exactly its bytes. `layer_bytes` are the lengths of the volume's layers.
    ///
    /// # Errors
    /// When the bytes do not match the root's digest, or do not describe the chunks of the segment exactly.
    pub fn parse(
        bytes: &[u8],
        root: &IndexRoot,
        number: SegmentIndex,
        layer_bytes: &[u64],
    ) -> Result<Self, SegmentError> {
        let at = root.segment(number).ok_or(SegmentError::Missing(number))?;
        if blake3::hash(bytes) != at.digest {
            return Err(SegmentError::Corrupt(number));
        }
        Parser::new(bytes, root, number, layer_bytes).parse()
    }

    /// What the index says of a chunk, counted from the segment's first; `None` outside.
    #[must_use]
    pub fn entry(&self, chunk: u32) -> Option<Entry> {
        if chunk >= self.chunks_covered {
            return None;
        }
        // Without runs, everything is zero; with runs, the first begins at 0.
        let Some(run) = self.runs.partition_point(|run| run.first <= chunk).checked_sub(1) else {
            return Some(Entry::Zero);
        };
        let run = self.runs.get(run)?;
        Some(match run.data {
            None => Entry::Zero,
            Some(data) => Entry::Data(*self.chunks.get((data + (chunk - run.first)) as usize)?),
        })
    }

    /// How many chunks it describes.
    #[must_use]
    pub fn chunks_covered(&self) -> u32 {
        self.chunks_covered
    }
}

struct Parser<'a> {
    rest: &'a [u8],
    number: SegmentIndex,
    layer_bytes: &'a [u64],
    /// Where the last frame of each layer ended.
    layer_ends: Vec<u64>,
    frame_bytes_max: u64,
    next_chunk: u32,
    /// Whether some run begins before the end of the one before it in its layer.
    goes_back: bool,
    segment: Segment,
}

impl<'a> Parser<'a> {
    fn new(bytes: &'a [u8], root: &IndexRoot, number: SegmentIndex, layer_bytes: &'a [u64]) -> Self {
        let (_, chunks_covered) = root.chunks_of(number);
        Self {
            rest: bytes,
            number,
            layer_bytes,
            layer_ends: vec![0; layer_bytes.len()],
            frame_bytes_max: frame_bytes_max(root.chunk_size()),
            next_chunk: 0,
            goes_back: false,
            segment: Segment {
                chunks_covered,
                runs: Vec::new(),
                chunks: Vec::new(),
            },
        }
    }

    fn parse(mut self) -> Result<Segment, SegmentError> {
        if self.rest.is_empty() {
            return Ok(self.segment);
        }
        while !self.rest.is_empty() {
            self.run()?;
        }
        if self.next_chunk != self.segment.chunks_covered {
            return Err(self.malformed("it ends before the segment does"));
        }
        // Frames that only go on cannot meet, and a layer that is written in order has no others.
        if self.goes_back {
            self.find_overlap()?;
        }
        Ok(self.segment)
    }

    fn find_overlap(&self) -> Result<(), SegmentError> {
        let mut frames: Vec<(StoredChunk, u32)> = (0..self.segment.chunks_covered)
            .filter_map(|chunk| match self.segment.entry(chunk) {
                Some(Entry::Data(stored)) => Some((stored, chunk)),
                _ => None,
            })
            .collect();
        frames.sort_unstable_by_key(|(stored, _)| (stored.layer, stored.frame.start));
        for pair in frames.windows(2) {
            if let [(before, other), (after, chunk)] = pair
                && before.layer == after.layer
                && before.frame.start + before.frame.len > after.frame.start
            {
                return Err(SegmentError::Overlap {
                    segment: self.number,
                    chunk: *chunk,
                    other: *other,
                    layer: after.layer.0,
                    frame: after.frame,
                });
            }
        }
        Ok(())
    }

    fn run(&mut self) -> Result<(), SegmentError> {
        let header = self.number()?;
        let chunks = u32::try_from(header >> 2).map_err(|_| self.malformed("a run is too long"))?;
        let left = self.segment.chunks_covered - self.next_chunk;
        if chunks == 0 || chunks > left {
            return Err(self.malformed("a run is empty or reaches beyond the segment"));
        }
        let first = self.next_chunk;
        let data = match header & 3 {
            KIND_ZERO => {
                self.next_chunk += chunks;
                None
            }
            KIND_DATA => {
                let data = self.segment.chunks.len() as u32;
                self.data(chunks)?;
                Some(data)
            }
            kind => {
                let name = if kind == KIND_DIFF { "diff" } else { "unknown" };
                return Err(SegmentError::UnknownKind {
                    segment: self.number,
                    kind,
                    name,
                });
            }
        };
        self.segment.runs.push(Run { first, data });
        Ok(())
    }

    fn data(&mut self, chunks: u32) -> Result<(), SegmentError> {
        let layer = self.number()?;
        let delta =
            varint::take_signed(&mut self.rest).ok_or_else(|| self.malformed("a number is malformed"))?;
        let position = usize::try_from(layer).unwrap_or(usize::MAX);
        let (Some(&bytes), Some(&end)) = (self.layer_bytes.get(position), self.layer_ends.get(position))
        else {
            return Err(self.malformed("it names a layer that the volume does not have"));
        };
        let start = end
            .checked_add_signed(delta)
            .ok_or_else(|| self.malformed("an offset is negative"))?;
        self.goes_back |= delta < 0;
        let mut frame = ByteRange { start, len: 0 };
        for _ in 0..chunks {
            frame.len = self.number()?;
            if frame.len == 0 || frame.len > self.frame_bytes_max {
                return Err(self.malformed("a frame is empty or too long"));
            }
            if !frame.fits_in(bytes) {
                return Err(SegmentError::OutsideLayer {
                    segment: self.number,
                    chunk: self.next_chunk,
                    layer,
                    frame,
                });
            }
            let (digest, rest) = self
                .rest
                .split_first_chunk()
                .ok_or_else(|| self.malformed("a digest is cut off"))?;
            self.rest = rest;
            let layer = LayerNumber(position as u16);
            self.segment.chunks.push(StoredChunk {
                layer,
                frame,
                digest: ChunkDigest(*digest),
            });
            self.next_chunk += 1;
            frame.start += frame.len;
        }
        if let Some(end) = self.layer_ends.get_mut(position) {
            *end = frame.start;
        }
        Ok(())
    }

    fn number(&mut self) -> Result<u64, SegmentError> {
        varint::take(&mut self.rest).ok_or_else(|| self.malformed("a number is malformed"))
    }

    fn malformed(&self, reason: &'static str) -> SegmentError {
        SegmentError::Malformed {
            segment: self.number,
            chunk: self.next_chunk,
            reason,
        }
    }
}
