//! The seek table at the end of a layer, read with every count held against the layer's true length: zstd's seekable
//! format (`contrib/seekable_format` of zstd), as a skippable frame.
//!
//! ```text
//! magic of a skippable frame, length of the rest │ (stored, content) of each frame │ frames, descriptor, magic
//! ```

use crate::blobs::{Blob, BlobError, BlobStore};
use crate::units::ByteRange;

/// The one skippable frame, of sixteen, that a seek table is.
const SKIPPABLE_MAGIC: u32 = 0x184d_2a5e;
/// The last bytes of a layer.
const SEEKABLE_MAGIC: u32 = 0x8f92_eab1;
/// Frames that the format can list.
const FRAMES_MAX: u32 = 1 << 27;
/// Number of frames, descriptor, magic: the last bytes of a layer.
const FOOTER_BYTES: u64 = 9;
/// Magic and length of the skippable frame around the table.
const SKIPPABLE_HEADER_BYTES: u64 = 8;
/// Compressed and decompressed length of one frame. Runnel writes no checksums into the table.
const ENTRY_BYTES: u64 = 8;

/// Why the end of a layer is no seek table.
#[derive(Debug, thiserror::Error)]
pub enum SeekTableError {
    /// The blob could not be read.
    #[error("the seek table cannot be read")]
    Blob(#[from] BlobError),
    /// The blob does not end in a table of the expected kind.
    #[error("layer {layer} ends in no seek table: {reason}")]
    Malformed {
        /// Which layer.
        layer: Blob,
        /// What is wrong.
        reason: String,
    },
}

/// Where one frame lies: in its layer, and its content in the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameAt {
    /// The bytes of the layer.
    pub stored: ByteRange,
    /// The bytes of the volume.
    pub content: ByteRange,
}

/// Collects frames while a layer is written.
#[derive(Default)]
pub struct SeekTableWriter {
    /// As they are written.
    entries: Vec<u8>,
    frames: u32,
}

/// A layer of more frames than the format can list.
#[derive(Debug, thiserror::Error)]
#[error("a layer holds at most {FRAMES_MAX} frames: choose a larger chunk size")]
pub struct TooManyFrames;

impl SeekTableWriter {
    /// Adds the next frame.
    ///
    /// # Errors
    /// When the table is full.
    pub fn push(&mut self, stored: u32, content: u32) -> Result<(), TooManyFrames> {
        if self.frames == FRAMES_MAX {
            return Err(TooManyFrames);
        }
        self.frames += 1;
        self.entries.extend(stored.to_le_bytes());
        self.entries.extend(content.to_le_bytes());
        Ok(())
    }

    /// The table as it goes to the end of the layer, handed over piece by piece.
    ///
    /// # Errors
    /// The first error of `write`.
    pub fn finish<E>(self, mut write: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        write(&skippable_header(self.frames))?;
        write(&self.entries)?;
        let [n0, n1, n2, n3] = self.frames.to_le_bytes();
        let [m0, m1, m2, m3] = SEEKABLE_MAGIC.to_le_bytes();
        write(&[n0, n1, n2, n3, 0, m0, m1, m2, m3])
    }
}

/// What the table of so many frames, no more than there can be, begins with.
fn skippable_header(frames: u32) -> [u8; SKIPPABLE_HEADER_BYTES as usize] {
    let rest = frames * ENTRY_BYTES as u32 + FOOTER_BYTES as u32;
    let header = u64::from(SKIPPABLE_MAGIC) | u64::from(rest) << u32::BITS;
    header.to_le_bytes()
}

/// A seek table that was read from a layer and fits to its length.
pub struct LayerSeekTable {
    /// Where each frame ends.
    ends: Vec<End>,
}

/// Where a frame ends, in the layer and in the content of all.
#[derive(Clone, Copy, Default)]
struct End {
    stored: u64,
    content: u64,
}

impl LayerSeekTable {
    /// Reads the table of `layer`.
    ///
    /// # Errors
    /// When it cannot be read, or the frames it lists do not make up the layer exactly.
    pub fn read(store: &dyn BlobStore, layer: &Blob) -> Result<Self, SeekTableError> {
        let malformed = |reason: String| SeekTableError::Malformed {
            layer: *layer,
            reason,
        };
        let Some(footer_at) = layer.bytes.checked_sub(FOOTER_BYTES) else {
            return Err(malformed("it is too short".into()));
        };
        let mut footer = [0; FOOTER_BYTES as usize];
        store.read_range(layer, footer_at, &mut footer)?;
        let table_bytes = table_bytes(footer).map_err(malformed)?;
        let Some(table_at) = layer.bytes.checked_sub(table_bytes) else {
            return Err(malformed(format!("its table would have {table_bytes} bytes")));
        };
        // Bounded by the layer's length just now, and by the format's 2^27 frames.
        let mut bytes = vec![0; table_bytes as usize];
        store.read_range(layer, table_at, &mut bytes)?;
        let table = Self::parse(&bytes).map_err(malformed)?;
        if table.stored_bytes() != table_at {
            return Err(malformed(format!(
                "its frames should end at byte {}, and the table begins at {table_at}",
                table.stored_bytes()
            )));
        }
        Ok(table)
    }

    /// Reads a table from exactly its bytes.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let footer = bytes.last_chunk().ok_or("it is too short")?;
        if table_bytes(*footer)? != bytes.len() as u64 {
            return Err("the number of frames does not fit its length".into());
        }
        let (header, rest) = bytes.split_at(SKIPPABLE_HEADER_BYTES as usize);
        let entries = &rest[..rest.len() - FOOTER_BYTES as usize];
        let (entries, _) = entries.as_chunks::<{ ENTRY_BYTES as usize }>();
        if header != skippable_header(entries.len() as u32) {
            return Err("it is not in a skippable frame of its length".into());
        }
        let mut end = End::default();
        let ends = entries.iter().map(|entry| {
            let lengths = u64::from_le_bytes(*entry);
            // At most 2^27 numbers of 32 bits each.
            end.stored += lengths & u64::from(u32::MAX);
            end.content += lengths >> u32::BITS;
            end
        });
        Ok(Self { ends: ends.collect() })
    }

    /// How many frames there are.
    #[must_use]
    pub fn frames(&self) -> u32 {
        self.ends.len() as u32
    }

    /// Where the frames end and the table begins.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.end().stored
    }

    /// How many bytes the frames hold.
    #[must_use]
    pub fn content_bytes(&self) -> u64 {
        self.end().content
    }

    /// The frame at position `number`, or `None` behind the last.
    #[must_use]
    pub fn frame(&self, number: u32) -> Option<FrameAt> {
        let number = number as usize;
        let end = self.ends.get(number)?;
        let begin = number
            .checked_sub(1)
            .map_or(End::default(), |before| self.ends[before]);
        let range = |start, end| ByteRange {
            start,
            len: end - start,
        };
        Some(FrameAt {
            stored: range(begin.stored, end.stored),
            content: range(begin.content, end.content),
        })
    }

    fn end(&self) -> End {
        self.ends.last().copied().unwrap_or_default()
    }

    /// The number of the frame that begins at byte `start` of the layer.
    #[must_use]
    pub fn starting_at(&self, start: u64) -> Option<u32> {
        let number = self.ends.partition_point(|end| end.stored <= start) as u32;
        let frame = self.frame(number)?;
        (frame.stored.start == start).then_some(number)
    }
}

/// The length of the whole table, from its last bytes.
fn table_bytes(footer: [u8; FOOTER_BYTES as usize]) -> Result<u64, String> {
    let [n0, n1, n2, n3, descriptor, m0, m1, m2, m3] = footer;
    if u32::from_le_bytes([m0, m1, m2, m3]) != SEEKABLE_MAGIC {
        return Err("its magic number is missing".into());
    }
    if descriptor != 0 {
        return Err(format!(
            "its descriptor is {descriptor:#x}, and only tables without checksums are read"
        ));
    }
    let frames = u32::from_le_bytes([n0, n1, n2, n3]);
    if frames > FRAMES_MAX {
        return Err(format!(
            "it lists {frames} frames, and at most {FRAMES_MAX} are possible"
        ));
    }
    Ok(SKIPPABLE_HEADER_BYTES + u64::from(frames) * ENTRY_BYTES + FOOTER_BYTES)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn table(frames: &[(u32, u32)]) -> Vec<u8> {
        let mut writer = SeekTableWriter::default();
        for (stored, content) in frames {
            writer.push(*stored, *content).unwrap();
        }
        let mut bytes = Vec::new();
        writer
            .finish(|piece| {
                bytes.extend_from_slice(piece);
                Ok::<_, ()>(())
            })
            .unwrap();
        bytes
    }

    #[test]
    fn frames_are_found_again() {
        let frames: Vec<(u32, u32)> = (0..20_000).map(|n| (10 + n % 7, 65536)).collect();
        let read = LayerSeekTable::parse(&table(&frames)).unwrap();
        assert_eq!(read.frames(), 20_000);
        assert_eq!(read.content_bytes(), 20_000 * 65536);
        let first: u64 = frames[..12_345].iter().map(|frame| u64::from(frame.0)).sum();
        let frame = read.frame(12_345).unwrap();
        assert_eq!(
            frame.stored,
            ByteRange {
                start: first,
                len: u64::from(frames[12_345].0)
            }
        );
        assert_eq!(
            frame.content,
            ByteRange {
                start: 12_345 * 65536,
                len: 65536
            }
        );
        assert!(read.frame(20_000).is_none());
        assert_eq!(read.starting_at(first), Some(12_345));
        assert_eq!(read.starting_at(first + 1), None);
        assert_eq!(read.starting_at(read.stored_bytes()), None);
        assert_eq!(read.starting_at(u64::MAX), None);
    }

    #[test]
    fn an_empty_table_is_a_table() {
        let empty = LayerSeekTable::parse(&table(&[])).unwrap();
        assert_eq!((empty.frames(), empty.starting_at(0)), (0, None));
    }

    #[test]
    fn a_table_with_any_byte_of_its_frame_changed_is_refused_or_differs() {
        let good = table(&[(100, 65536), (200, 65536)]);
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x41;
            if let Ok(read) = LayerSeekTable::parse(&bad) {
                assert!((8..24).contains(&at), "byte {at} was ignored");
                assert!(read.stored_bytes() != 300 || read.content_bytes() != 2 * 65536);
            }
        }
        for len in 0..good.len() {
            assert!(LayerSeekTable::parse(&good[..len]).is_err());
        }
    }

    proptest! {
        #[test]
        fn hostile_tables_never_panic_and_what_is_read_adds_up(
            frames in proptest::collection::vec((any::<u32>(), any::<u32>()), 0..40),
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        ) {
            let mut bytes = table(&frames);
            for (at, byte) in &changes {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            if let Ok(read) = LayerSeekTable::parse(&bytes) {
                prop_assert_eq!(read.frames() as usize, frames.len());
                let all: Vec<FrameAt> = (0..read.frames()).filter_map(|number| read.frame(number)).collect();
                prop_assert_eq!(all.iter().map(|frame| frame.stored.len).sum::<u64>(), read.stored_bytes());
                prop_assert_eq!(all.iter().map(|frame| frame.content.len).sum::<u64>(), read.content_bytes());
            }
        }

        #[test]
        fn random_bytes_are_no_table(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            prop_assert!(LayerSeekTable::parse(&bytes).is_err());
        }
    }
}
