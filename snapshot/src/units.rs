//! Units of a volume: bytes, pages and chunks are different types, so that none is taken for another.

use std::fmt;
use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};

/// Bytes in a page, the unit of dirty tracking and of page faults.
pub const PAGE_SIZE: u64 = 4096;

/// The position of a page in its volume: byte offset divided by [`PAGE_SIZE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PageIndex(pub u64);

impl PageIndex {
    /// The page that holds the byte at `offset` of the volume.
    #[must_use]
    pub const fn holding(offset: u64) -> Self {
        Self(offset / PAGE_SIZE)
    }

    /// Where the page starts in its volume, in bytes.
    #[must_use]
    pub const fn offset(self) -> u64 {
        self.0 * PAGE_SIZE
    }
}

/// The position of a chunk in its volume: byte offset divided by the volume's [`ChunkSize`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChunkIndex(pub u64);

impl fmt::Display for ChunkIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "chunk {}", self.0)
    }
}

/// How many bytes of a volume one chunk covers: a power of two from 16 KiB to 2 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct ChunkSize(NonZeroU32);

/// A chunk size that is not a power of two from 16 KiB to 2 MiB.
#[derive(Debug, thiserror::Error)]
#[error("a chunk of {0} bytes is not possible: it must be a power of two from 16384 to 2097152")]
pub struct BadChunkSize(u32);

impl ChunkSize {
    /// The smallest chunk, 16 KiB: below it, frames and index entries outweigh what they carry.
    pub const MIN: u32 = 16 << 10;
    /// The largest chunk, 2 MiB: above it, one fault waits for more than a huge page.
    pub const MAX: u32 = 2 << 20;
    /// What `runnel` writes unless told otherwise, 64 KiB.
    pub const DEFAULT: Self = match NonZeroU32::new(64 << 10) {
        Some(bytes) => Self(bytes),
        None => unreachable!(),
    };

    /// Checks `bytes`, which may come from an image.
    ///
    /// # Errors
    /// [`BadChunkSize`] unless it is a power of two from [`Self::MIN`] to [`Self::MAX`].
    pub fn new(bytes: u32) -> Result<Self, BadChunkSize> {
        match NonZeroU32::new(bytes) {
            Some(size) if bytes.is_power_of_two() && (Self::MIN..=Self::MAX).contains(&bytes) => {
                Ok(Self(size))
            }
            _ => Err(BadChunkSize(bytes)),
        }
    }

    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0.get() as u64
    }

    /// Pages in a whole chunk.
    #[must_use]
    pub const fn pages(self) -> u64 {
        self.bytes() / PAGE_SIZE
    }

    /// The chunk that holds the byte at `offset` of the volume.
    #[must_use]
    pub const fn chunk_holding(self, offset: u64) -> ChunkIndex {
        ChunkIndex(offset / self.bytes())
    }

    /// How many chunks cover a volume of `volume_bytes`; the last one may be short.
    #[must_use]
    pub const fn chunks_in(self, volume_bytes: u64) -> u64 {
        volume_bytes.div_ceil(self.bytes())
    }

    /// The bytes that `chunk` covers in a volume of `volume_bytes`; empty if the chunk lies outside.
    #[must_use]
    pub fn range_of(self, chunk: ChunkIndex, volume_bytes: u64) -> ByteRange {
        let start = chunk.0.saturating_mul(self.bytes()).min(volume_bytes);
        ByteRange {
            start,
            len: self.bytes().min(volume_bytes - start),
        }
    }
}

impl TryFrom<u32> for ChunkSize {
    type Error = BadChunkSize;

    fn try_from(bytes: u32) -> Result<Self, BadChunkSize> {
        Self::new(bytes)
    }
}

impl From<ChunkSize> for u32 {
    fn from(size: ChunkSize) -> u32 {
        size.0.get()
    }
}

/// A run of bytes of a volume or a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ByteRange {
    /// The first byte.
    pub start: u64,
    /// How many bytes.
    pub len: u64,
}

impl ByteRange {
    /// One past the last byte, or `None` where that does not fit: a range read from outside may be absurd.
    #[must_use]
    pub const fn end(self) -> Option<u64> {
        self.start.checked_add(self.len)
    }

    /// Whether all of it lies in the first `limit` bytes.
    #[must_use]
    pub fn fits_in(self, limit: u64) -> bool {
        self.end().is_some_and(|end| end <= limit)
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bytes {}+{}", self.start, self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunk_sizes_outside_the_format_are_refused() {
        for bytes in [0, 1, 8 << 10, (64 << 10) + 1, 4 << 20] {
            assert!(ChunkSize::new(bytes).is_err(), "{bytes}");
        }
        assert_eq!(ChunkSize::new(16 << 10).unwrap().pages(), 4);
        assert_eq!(ChunkSize::new(2 << 20).unwrap().pages(), 512);
    }

    #[test]
    fn the_last_chunk_of_a_volume_is_short_and_chunks_outside_are_empty() {
        let size = ChunkSize::DEFAULT;
        let volume_bytes = 3 * size.bytes() + 512;
        assert_eq!(size.chunks_in(volume_bytes), 4);
        assert_eq!(
            size.range_of(ChunkIndex(3), volume_bytes),
            ByteRange {
                start: 3 * size.bytes(),
                len: 512
            }
        );
        assert_eq!(size.range_of(ChunkIndex(4), volume_bytes).len, 0);
        assert_eq!(size.range_of(ChunkIndex(u64::MAX), volume_bytes).len, 0);
    }

    #[test]
    fn a_range_that_overflows_fits_nowhere() {
        assert!(
            !ByteRange {
                start: u64::MAX,
                len: 2
            }
            .fits_in(u64::MAX)
        );
        assert!(ByteRange { start: 2, len: 2 }.fits_in(4));
        assert!(!ByteRange { start: 2, len: 3 }.fits_in(4));
    }
}
