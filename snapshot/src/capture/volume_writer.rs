//! Puts the frames of one volume in order into a layer, and describes them in seek table and index as they come.

use std::collections::{BTreeMap, BTreeSet};

use crate::digest::ChunkDigest;
use crate::image::manifest::ImageVolume;
use crate::image::publication::{BlobWriter, Publication, PublishError};
use crate::index::{Entry, INDEX_BLOB_HEADER, IndexBuilder, IndexTooLarge, LayerNumber, StoredChunk};
use crate::layer::frame::{ZERO_FRAME_CONTENT_MAX, append_zero_frame};
use crate::layer::seek_table::{SeekTableWriter, TooManyFrames};
use crate::units::{ByteRange, ChunkIndex, ChunkSize};
use crate::volume::VolumeName;

/// Why a volume cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The storage refused.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// The format cannot describe it.
    #[error(transparent)]
    Volume(#[from] IndexTooLarge),
    /// The format cannot list its frames.
    #[error(transparent)]
    Frames(#[from] TooManyFrames),
}

/// One chunk that was compressed.
#[derive(Clone, Copy, Debug)]
pub struct CompressedChunk {
    /// The length of its frame.
    pub frame_bytes: u32,
    /// The digest of its plain bytes.
    pub digest: ChunkDigest,
}

/// The full layer and the index of one volume, being written in the order of chunks.
pub struct VolumeWriter {
    volume_bytes: u64,
    chunk_size: ChunkSize,
    layer: BlobWriter,
    index: BlobWriter,
    seek_table: SeekTableWriter,
    builder: IndexBuilder,
    /// Zeros that no frame holds yet: runs grow as long as they can.
    zeros_pending: u64,
    /// The chunks whose entries are wanted beside the index.
    wanted: BTreeSet<ChunkIndex>,
    found: BTreeMap<ChunkIndex, Entry>,
}

/// A volume whose layer and index are on stable storage.
pub struct WrittenVolume {
    /// As the manifest describes it.
    pub volume: ImageVolume,
    /// The entries of the chunks that were wanted, without those of zeros.
    pub wanted: BTreeMap<ChunkIndex, Entry>,
}

impl VolumeWriter {
    /// Begins a volume of `volume_bytes`; the entries of `wanted` chunks will be handed out with it.
    ///
    /// # Errors
    /// When the format cannot describe the volume, or no file can be created.
    pub fn new(
        publication: &Publication,
        volume_bytes: u64,
        chunk_size: ChunkSize,
        wanted: BTreeSet<ChunkIndex>,
    ) -> Result<Self, WriteError> {
        let builder = IndexBuilder::new(volume_bytes, chunk_size, 1)?;
        let layer = publication.blob()?;
        let mut index = publication.blob()?;
        index.write(INDEX_BLOB_HEADER)?;
        let seek_table = SeekTableWriter::default();
        let found = BTreeMap::new();
        Ok(Self {
            volume_bytes,
            chunk_size,
            layer,
            index,
            seek_table,
            builder,
            zeros_pending: 0,
            wanted,
            found,
        })
    }

    /// The next `chunks` chunks are zeros.
    ///
    /// # Errors
    /// When the index cannot be written.
    ///
    /// # Panics
    /// If the volume has no more chunks than were written already.
    pub fn push_zeros(&mut self, chunks: u64) -> Result<(), WriteError> {
        if chunks == 0 {
            return Ok(());
        }
        let start = self.next_chunk_range().start;
        let index = &mut self.index;
        self.builder.push_zeros(chunks, |bytes| index.write(bytes))?;
        self.zeros_pending += self.content_bytes() - start;
        Ok(())
    }

    /// The next chunks have these frames, back to back in `frames`.
    ///
    /// # Errors
    /// When they cannot be written.
    ///
    /// # Panics
    /// If the volume has no more chunks than were written already.
    pub fn push_frames(&mut self, frames: &[u8], chunks: &[CompressedChunk]) -> Result<(), WriteError> {
        self.flush_zeros()?;
        let mut start = self.layer.bytes();
        self.layer.write(frames)?;
        for chunk in chunks {
            let frame = ByteRange {
                start,
                len: u64::from(chunk.frame_bytes),
            };
            start += frame.len;
            let stored = StoredChunk {
                layer: LayerNumber(0),
                frame,
                digest: chunk.digest,
            };
            let number = ChunkIndex(self.builder.chunks());
            if self.wanted.contains(&number) {
                self.found.insert(number, Entry::Data(stored));
            }
            // A chunk has at most 2 MiB.
            self.seek_table
                .push(chunk.frame_bytes, self.next_chunk_range().len as u32)?;
            let index = &mut self.index;
            self.builder
                .push(Entry::Data(stored), |bytes| index.write(bytes))?;
        }
        debug_assert_eq!(start, self.layer.bytes());
        Ok(())
    }

    /// Ends layer and index and brings both to stable storage.
    ///
    /// # Errors
    /// When they cannot be written.
    ///
    /// # Panics
    /// If chunks are missing.
    pub fn finish(
        mut self,
        publication: &Publication,
        name: VolumeName,
    ) -> Result<WrittenVolume, WriteError> {
        self.flush_zeros()?;
        let layer = &mut self.layer;
        self.seek_table.finish(|bytes| layer.write(bytes))?;
        let root = self.builder.finish();
        // Inline in the manifest, and a blob of its own, as OCI wants of whatever a descriptor names.
        publication.add(&root.to_bytes())?;
        let volume = ImageVolume {
            name,
            layers: vec![self.layer.finish()?],
            has_full_layer: true,
            index: self.index.finish()?,
            root,
        };
        Ok(WrittenVolume {
            volume,
            wanted: self.found,
        })
    }

    /// How many bytes of the volume were described so far.
    #[must_use]
    pub fn content_bytes(&self) -> u64 {
        (self.builder.chunks() * self.chunk_size.bytes()).min(self.volume_bytes)
    }

    /// How many bytes the layer has so far.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.layer.bytes()
    }

    fn next_chunk_range(&self) -> ByteRange {
        self.chunk_size
            .range_of(ChunkIndex(self.builder.chunks()), self.volume_bytes)
    }

    fn flush_zeros(&mut self) -> Result<(), WriteError> {
        let mut frame = Vec::new();
        while self.zeros_pending > 0 {
            let content = self.zeros_pending.min(ZERO_FRAME_CONTENT_MAX);
            frame.clear();
            append_zero_frame(content, &mut frame);
            self.layer.write(&frame)?;
            self.seek_table.push(frame.len() as u32, content as u32)?;
            self.zeros_pending -= content;
        }
        Ok(())
    }
}
