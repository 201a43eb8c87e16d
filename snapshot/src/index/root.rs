//! The upper level of an index: how the volume is cut, and the digest of each segment.

use std::fmt;

use super::segment::page_bytes;
use super::{INDEX_BLOB_HEADER, LAYERS_MAX, PARTS_MAX, SEGMENT_VOLUME_BYTES, VOLUME_BYTES_MAX};
use crate::units::{ByteRange, ChunkIndex, ChunkSize};

const MAGIC: &[u8; 4] = b"RNLX";
const VERSION: u8 = 1;
const HEADER_BYTES: usize = 16;
const ENTRY_BYTES: usize = 36;

/// The position of a segment in its index: byte offset in the volume divided by [`SEGMENT_VOLUME_BYTES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentIndex(pub u32);

impl fmt::Display for SegmentIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "segment {}", self.0)
    }
}

/// Where a segment lies in the index blob, and what its bytes must hash to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentAt {
    /// The bytes of the index blob.
    pub stored: ByteRange,
    /// BLAKE3 of those bytes.
    pub digest: [u8; 32],
}

/// Why bytes are no index root.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// It is not one, or it was cut off.
    #[error("the index root is malformed: {0}")]
    Malformed(&'static str),
    /// The writer was newer.
    #[error("the index has version {0}, and this Runnel reads version {VERSION}: use a newer Runnel")]
    Newer(u8),
    /// A number is beyond what the format allows.
    #[error("the index root gives {what} as {value}, beyond what the format allows")]
    OutOfRange {
        /// Which number.
        what: &'static str,
        /// Its value.
        value: u64,
    },
}

/// The root of a volume's index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexRoot {
    volume_bytes: u64,
    chunk_size: ChunkSize,
    layers: u16,
    segments: Vec<SegmentAt>,
}

impl IndexRoot {
    /// Puts a root together from the stored length and the digest of each segment, in order.
    pub(super) fn new(
        volume_bytes: u64,
        chunk_size: ChunkSize,
        layers: u16,
        segments: impl IntoIterator<Item = (u32, [u8; 32])>,
    ) -> Self {
        let mut start = INDEX_BLOB_HEADER.len() as u64;
        let segments = segments.into_iter().map(|(len, digest)| {
            let stored = ByteRange {
                start,
                len: u64::from(len),
            };
            start += stored.len;
            SegmentAt { stored, digest }
        });
        Self {
            volume_bytes,
            chunk_size,
            layers,
            segments: segments.collect(),
        }
    }

    /// Reads a root from exactly its bytes.
    ///
    /// # Errors
    /// When they are no root, of a newer version, or a number is out of range.
    pub fn parse(bytes: &[u8]) -> Result<Self, RootError> {
        let (header, entries) = bytes
            .split_at_checked(HEADER_BYTES)
            .ok_or(RootError::Malformed("it is cut off"))?;
        let [
            m0,
            m1,
            m2,
            m3,
            version,
            log2_chunk_size,
            l0,
            l1,
            volume_bytes @ ..,
        ] = header
        else {
            return Err(RootError::Malformed("it is cut off"));
        };
        if [*m0, *m1, *m2, *m3] != *MAGIC {
            return Err(RootError::Malformed("its magic number is missing"));
        }
        if *version != VERSION {
            return Err(RootError::Newer(*version));
        }
        let out_of_range = |what, value| RootError::OutOfRange { what, value };
        let chunk_size = 1_u32
            .checked_shl(u32::from(*log2_chunk_size))
            .and_then(|bytes| ChunkSize::new(bytes).ok())
            .ok_or(out_of_range(
                "the chunk size's logarithm",
                u64::from(*log2_chunk_size),
            ))?;
        let layers = u16::from_le_bytes([*l0, *l1]);
        if layers > LAYERS_MAX {
            return Err(out_of_range("the number of layers", u64::from(layers)));
        }
        let volume_bytes = volume_bytes
            .iter()
            .rfold(0, |value, byte| value << 8 | u64::from(*byte));
        if !(1..=VOLUME_BYTES_MAX).contains(&volume_bytes) {
            return Err(out_of_range("the volume's length", volume_bytes));
        }
        let segments = volume_bytes.div_ceil(SEGMENT_VOLUME_BYTES);
        if entries.len() as u64 != segments * ENTRY_BYTES as u64 {
            return Err(RootError::Malformed(
                "the number of segments does not fit the volume",
            ));
        }
        let segments = entries.chunks_exact(ENTRY_BYTES).map(parse_entry);
        let root = Self::new(volume_bytes, chunk_size, layers, segments);
        let segment_bytes_max = root.segment_bytes_max();
        match root
            .segments
            .iter()
            .find(|segment| segment.stored.len > segment_bytes_max)
        {
            Some(segment) => Err(out_of_range("the length of a segment", segment.stored.len)),
            None => Ok(root),
        }
    }

    /// The root as it is stored.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.segments.len() * ENTRY_BYTES);
        bytes.extend_from_slice(MAGIC);
        bytes.push(VERSION);
        bytes.push(self.chunk_size.bytes().trailing_zeros() as u8);
        bytes.extend_from_slice(&self.layers.to_le_bytes());
        bytes.extend_from_slice(&self.volume_bytes.to_le_bytes());
        for segment in &self.segments {
            bytes.extend_from_slice(&(segment.stored.len as u32).to_le_bytes());
            bytes.extend_from_slice(&segment.digest);
        }
        bytes
    }

    /// The volume's length in bytes.
    #[must_use]
    pub fn volume_bytes(&self) -> u64 {
        self.volume_bytes
    }

    /// How the volume is cut.
    #[must_use]
    pub fn chunk_size(&self) -> ChunkSize {
        self.chunk_size
    }

    /// How many layers the segments may name.
    #[must_use]
    pub fn layers(&self) -> u16 {
        self.layers
    }

    /// How many chunks the volume has.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        self.chunk_size.chunks_in(self.volume_bytes)
    }

    /// The length of the blob in which the segments lie.
    #[must_use]
    pub fn index_bytes(&self) -> u64 {
        self.segments
            .last()
            .and_then(|last| last.stored.end())
            .unwrap_or(0)
    }

    /// How many segments there are.
    #[must_use]
    pub fn segments(&self) -> u32 {
        self.segments.len() as u32
    }

    /// Where a segment lies, or `None` behind the last.
    #[must_use]
    pub fn segment(&self, number: SegmentIndex) -> Option<&SegmentAt> {
        self.segments.get(number.0 as usize)
    }

    /// The segment that describes `chunk`, and the chunk's position in it; `None` outside the volume.
    #[must_use]
    pub fn locate(&self, chunk: ChunkIndex) -> Option<(SegmentIndex, u32)> {
        let per_segment = self.chunks_per_segment();
        let segment = u32::try_from(chunk.0 / per_segment).ok()?;
        (chunk.0 < self.chunks()).then_some((SegmentIndex(segment), (chunk.0 % per_segment) as u32))
    }

    /// The first chunk that a segment describes, and how many it does.
    #[must_use]
    pub fn chunks_of(&self, number: SegmentIndex) -> (ChunkIndex, u32) {
        let first = u64::from(number.0) * self.chunks_per_segment();
        let chunks = self.chunks().saturating_sub(first).min(self.chunks_per_segment());
        (ChunkIndex(first), chunks as u32)
    }

    /// The most bytes that a segment can have: every chunk a run of its own and of as many parts as may be, every number
    /// of full length. From 97 KiB, at chunks of 2 MiB, to 4.2 MiB.
    fn segment_bytes_max(&self) -> u64 {
        // A number takes up to ten bytes: those of a layer, an offset and a length. A digest takes 32.
        let part = 2 * page_bytes(self.chunk_size) as u64 + 3 * 10 + 32;
        self.chunks_per_segment() * (2 * 10 + PARTS_MAX as u64 * part)
    }

    fn chunks_per_segment(&self) -> u64 {
        SEGMENT_VOLUME_BYTES / self.chunk_size.bytes()
    }
}

/// Splits an entry of exactly [`ENTRY_BYTES`].
fn parse_entry(entry: &[u8]) -> (u32, [u8; 32]) {
    let (len, digest) = entry.split_at(4);
    let len = len.iter().rfold(0, |value, byte| value << 8 | u32::from(*byte));
    let mut copy = [0; 32];
    copy.copy_from_slice(digest);
    (len, copy)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> IndexRoot {
        let volume_bytes = 2 * SEGMENT_VOLUME_BYTES + 512;
        IndexRoot::new(
            volume_bytes,
            ChunkSize::DEFAULT,
            1,
            [(70_000, [1; 32]), (0, [2; 32]), (35, [3; 32])],
        )
    }

    #[test]
    fn a_root_survives_its_bytes_and_keeps_to_its_budget() {
        let bytes = root().to_bytes();
        assert_eq!(IndexRoot::parse(&bytes).unwrap(), root());
        assert_eq!(root().index_bytes(), 8 + 70_035);
        let one_segment = IndexRoot::new(SEGMENT_VOLUME_BYTES, ChunkSize::DEFAULT, 1, [(9, [1; 32])]);
        assert!(one_segment.to_bytes().len() < 64);
    }

    #[test]
    fn chunks_are_located_up_to_the_last_and_not_beyond() {
        let root = root();
        assert_eq!(root.locate(ChunkIndex(0)), Some((SegmentIndex(0), 0)));
        assert_eq!(root.locate(ChunkIndex(2049)), Some((SegmentIndex(1), 1)));
        assert_eq!(root.locate(ChunkIndex(4096)), Some((SegmentIndex(2), 0)));
        assert_eq!(root.locate(ChunkIndex(4097)), None);
        assert_eq!(root.locate(ChunkIndex(u64::MAX)), None);
        assert_eq!(root.chunks_of(SegmentIndex(1)), (ChunkIndex(2048), 2048));
        assert_eq!(root.chunks_of(SegmentIndex(2)), (ChunkIndex(4096), 1));
    }

    #[test]
    fn hostile_roots_are_refused() {
        let good = root().to_bytes();
        for len in 0..good.len() {
            assert!(IndexRoot::parse(&good[..len]).is_err(), "{len} bytes");
        }
        let with = |at: usize, bytes: &[u8]| {
            let mut bad = good.clone();
            bad[at..at + bytes.len()].copy_from_slice(bytes);
            IndexRoot::parse(&bad).map(|_| ()).unwrap_err().to_string()
        };
        assert!(with(0, b"X").contains("magic"));
        assert!(with(4, &[2]).contains("version 2"));
        for log2 in [0, 13, 22, 32, 64, 255] {
            assert!(with(5, &[log2]).contains("chunk size"), "{log2}");
        }
        assert!(with(6, &[0xff, 0xff]).contains("layers"));
        assert!(with(8, &u64::MAX.to_le_bytes()).contains("length"));
        assert!(with(8, &[0; 8]).contains("length"));
        assert!(with(8, &(1_u64 << 30).to_le_bytes()).contains("segments"));
        assert!(with(16, &u32::MAX.to_le_bytes()).contains("segment"));
    }
}
