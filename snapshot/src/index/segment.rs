//! The lower level of an index: what each chunk of 128 MiB of volume is.

use super::parts::{self, PARTS_MAX};
use super::{Entry, IndexRoot, LayerNumber, PageBits, SegmentIndex, StoredChunk, StoredPart};
use crate::digest::ChunkDigest;
use crate::layer::frame::frame_bytes_max;
use crate::units::{ByteRange, ChunkIndex, ChunkSize};
use crate::varint;

pub(super) const KIND_ZERO: u64 = 0;
pub(super) const KIND_DATA: u64 = 1;
pub(super) const KIND_PARTS: u64 = 2;

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
    #[error("{segment} of the index has a run of kind {kind}: use a newer Runnel")]
    UnknownKind {
        /// Which segment.
        segment: SegmentIndex,
        /// The number of the kind.
        kind: u64,
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
    /// Two chunks, or two parts of one, share bytes of a layer. Each has a frame of its own, so one of them is not where
    /// it is said.
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
    kind: Kind,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Zero,
    /// Its chunks begin here in [`Segment::frames`].
    Data(u32),
    /// Its chunks begin here in [`Segment::of_parts`].
    Parts(u32),
}

/// Where the parts of one chunk are in [`Segment::frames`].
#[derive(Clone, Copy, Debug)]
struct PartsAt {
    frames: u32,
    parts: u32,
    /// Where their bits begin in [`Segment::pages`].
    pages: u32,
}

/// A segment, checked: every frame lies in its layer, and over no other. At most 8192 chunks, so half a MiB unless
/// there are many parts; eight times as much if all of it are.
#[derive(Debug)]
pub struct Segment {
    chunks_covered: u32,
    runs: Vec<Run>,
    /// Of full chunks and of parts.
    frames: Vec<StoredChunk>,
    of_parts: Vec<PartsAt>,
    /// The pages that each part holds, then those that it shows, in as many bytes as a chunk's bits take.
    pages: Vec<u8>,
    /// How many bytes that is.
    page_bytes: usize,
}

/// How many bytes have the bits of a chunk's pages.
pub(super) fn page_bytes(chunk_size: ChunkSize) -> usize {
    chunk_size.pages().div_ceil(8) as usize
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
        let position = (chunk - run.first) as usize;
        Some(match run.kind {
            Kind::Zero => Entry::Zero,
            Kind::Data(first) => Entry::Data(*self.frames.get(first as usize + position)?),
            Kind::Parts(first) => {
                let at = self.of_parts.get(first as usize + position)?;
                let parts = (0..at.parts as usize).map(|part| self.part(at, part));
                Entry::Parts(parts.collect::<Option<_>>()?)
            }
        })
    }

    fn part(&self, at: &PartsAt, part: usize) -> Option<StoredPart> {
        let pages = self.pages.get(at.pages as usize + part * 2 * self.page_bytes..)?;
        let (held, shown) = pages.get(..2 * self.page_bytes)?.split_at(self.page_bytes);
        Some(StoredPart {
            stored: *self.frames.get(at.frames as usize + part)?,
            held: PageBits::from_bytes(held)?,
            shown: PageBits::from_bytes(shown)?,
        })
    }

    /// How many chunks it describes.
    #[must_use]
    pub fn chunks_covered(&self) -> u32 {
        self.chunks_covered
    }

    /// Whether all of it is zeros.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.frames.is_empty()
    }

    /// How much memory it takes, about.
    pub(super) fn memory_bytes(&self) -> usize {
        self.runs.len() * size_of::<Run>()
            + self.frames.len() * size_of::<StoredChunk>()
            + self.of_parts.len() * size_of::<PartsAt>()
            + self.pages.len()
    }
}

struct Parser<'a> {
    rest: &'a [u8],
    number: SegmentIndex,
    layer_bytes: &'a [u64],
    /// Where the last frame of each layer ended.
    layer_ends: Vec<u64>,
    root: &'a IndexRoot,
    /// The segment's first chunk.
    first_chunk: u64,
    frame_bytes_max: u64,
    next_chunk: u32,
    /// Whether some run begins before the end of the one before it in its layer.
    goes_back: bool,
    segment: Segment,
}

impl<'a> Parser<'a> {
    fn new(bytes: &'a [u8], root: &'a IndexRoot, number: SegmentIndex, layer_bytes: &'a [u64]) -> Self {
        let (first_chunk, chunks_covered) = root.chunks_of(number);
        Self {
            rest: bytes,
            number,
            layer_bytes,
            layer_ends: vec![0; layer_bytes.len()],
            root,
            first_chunk: first_chunk.0,
            frame_bytes_max: frame_bytes_max(root.chunk_size()),
            next_chunk: 0,
            goes_back: false,
            segment: Segment {
                chunks_covered,
                runs: Vec::new(),
                frames: Vec::new(),
                of_parts: Vec::new(),
                pages: Vec::new(),
                page_bytes: page_bytes(root.chunk_size()),
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
        let mut frames: Vec<(StoredChunk, u32)> = Vec::with_capacity(self.segment.frames.len());
        for chunk in 0..self.segment.chunks_covered {
            let entry = self.segment.entry(chunk);
            frames.extend(
                entry
                    .iter()
                    .flat_map(Entry::frames)
                    .map(|stored| (*stored, chunk)),
            );
        }
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
        let kind = match header & 3 {
            KIND_ZERO => {
                self.next_chunk += chunks;
                Kind::Zero
            }
            KIND_DATA => {
                let data = self.segment.frames.len() as u32;
                self.data(chunks)?;
                Kind::Data(data)
            }
            KIND_PARTS => {
                let parts = self.segment.of_parts.len() as u32;
                for _ in 0..chunks {
                    self.parts()?;
                    self.next_chunk += 1;
                }
                Kind::Parts(parts)
            }
            kind => {
                return Err(SegmentError::UnknownKind {
                    segment: self.number,
                    kind,
                });
            }
        };
        self.segment.runs.push(Run { first, kind });
        Ok(())
    }

    /// The frames of chunks that lie back to back in one layer.
    fn data(&mut self, chunks: u32) -> Result<(), SegmentError> {
        let (layer, mut start) = self.place()?;
        for _ in 0..chunks {
            let stored = self.frame(layer, start)?;
            start += stored.frame.len;
            self.segment.frames.push(stored);
            self.next_chunk += 1;
        }
        Ok(())
    }

    /// The parts of a chunk.
    fn parts(&mut self) -> Result<(), SegmentError> {
        let count = self.number()?;
        if !(1..=PARTS_MAX as u64).contains(&count) {
            return Err(self.malformed("a chunk has no parts or too many"));
        }
        let at = PartsAt {
            frames: self.segment.frames.len() as u32,
            parts: count as u32,
            pages: self.segment.pages.len() as u32,
        };
        for _ in 0..count {
            let pages = self.rest.split_at_checked(2 * self.segment.page_bytes);
            let (pages, rest) = pages.ok_or_else(|| self.malformed("the pages of a part are cut off"))?;
            self.rest = rest;
            self.segment.pages.extend_from_slice(pages);
            let (layer, start) = self.place()?;
            let stored = self.frame(layer, start)?;
            self.segment.frames.push(stored);
        }
        let parts = (0..count as usize).map(|part| self.segment.part(&at, part));
        let parts: Vec<StoredPart> = parts.flatten().collect();
        let chunk = ChunkIndex(self.first_chunk + u64::from(self.next_chunk));
        let range = self.root.chunk_size().range_of(chunk, self.root.volume_bytes());
        parts::check(&parts, range.len).map_err(|reason| self.malformed(reason))?;
        self.segment.of_parts.push(at);
        Ok(())
    }

    /// A layer, and where the next frame begins in it.
    fn place(&mut self) -> Result<(LayerNumber, u64), SegmentError> {
        let layer = self.number()?;
        let delta =
            varint::take_signed(&mut self.rest).ok_or_else(|| self.malformed("a number is malformed"))?;
        let position = usize::try_from(layer).unwrap_or(usize::MAX);
        let Some(&end) = self.layer_ends.get(position) else {
            return Err(self.malformed("it names a layer that the volume does not have"));
        };
        let start = end
            .checked_add_signed(delta)
            .ok_or_else(|| self.malformed("an offset is negative"))?;
        self.goes_back |= delta < 0;
        Ok((LayerNumber(position as u16), start)) // there are at most 128
    }

    /// The frame that begins there.
    fn frame(&mut self, layer: LayerNumber, start: u64) -> Result<StoredChunk, SegmentError> {
        let len = self.number()?;
        if len == 0 || len > self.frame_bytes_max {
            return Err(self.malformed("a frame is empty or too long"));
        }
        let frame = ByteRange { start, len };
        let position = usize::from(layer.0);
        let bytes = self.layer_bytes.get(position).copied().unwrap_or(0);
        if !frame.fits_in(bytes) {
            return Err(SegmentError::OutsideLayer {
                segment: self.number,
                chunk: self.next_chunk,
                layer: u64::from(layer.0),
                frame,
            });
        }
        let (digest, rest) = self
            .rest
            .split_first_chunk()
            .ok_or_else(|| self.malformed("a digest is cut off"))?;
        self.rest = rest;
        if let Some(end) = self.layer_ends.get_mut(position) {
            *end = start + len;
        }
        Ok(StoredChunk {
            layer,
            frame,
            digest: ChunkDigest(*digest),
        })
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
