//! Lays the chunks that a resumed machine touches first together: a layer over the others with these chunks whole, the
//! first touched first, so that a few long reads bring them all. Nothing of the volume changes; each chunk keeps its digest,
//! and its frame where that is a single one.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::below_failed;
use super::merge::Kept;
use super::writer::ChangesWriter;
use crate::blobs::{Blob, BlobStore};
use crate::capture::job::CaptureError;
use crate::capture::progress::Progress;
use crate::capture::volume_writer::{CompressedChunk, WrittenVolume};
use crate::decode::ChunkDecoder;
use crate::digest::ChunkDigest;
use crate::image::chunk_reader::{ChunkError, ChunkReader};
use crate::image::manifest::ImageVolume;
use crate::image::publication::Publication;
use crate::index::{Entry, IndexReader};
use crate::layer::frame::ChunkCompressor;
use crate::pager::PageSet;
use crate::units::{ByteRange, ChunkIndex, PAGE_SIZE, PageIndex};
use crate::volume::VolumeName;

/// What is to be laid together of one volume.
pub(in crate::capture) struct Hot<'a> {
    pub(in crate::capture) name: &'a VolumeName,
    pub(in crate::capture) store: &'a Arc<dyn BlobStore>,
    pub(in crate::capture) base: &'a ImageVolume,
    /// The index of `base`.
    pub(in crate::capture) index: &'a IndexReader,
    /// Each once, in the order in which they are to lie.
    pub(in crate::capture) chunks: &'a [ChunkIndex],
}

/// The same, and the layers below that are still used.
pub(in crate::capture) struct HotLayer<'a> {
    hot: Hot<'a>,
    kept: Kept,
}

/// What is kept between chunks.
struct Hands {
    decoder: ChunkDecoder,
    reader: ChunkReader,
    compressor: ChunkCompressor,
    frame: Vec<u8>,
    plain: Vec<u8>,
}

impl<'a> HotLayer<'a> {
    /// Finds out which layers of the base are still used.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub(in crate::capture) fn new(hot: Hot<'a>, progress: &Progress) -> Result<Self, CaptureError> {
        let root = &hot.base.root;
        let mut pages = PageSet::new(root.volume_bytes().div_ceil(PAGE_SIZE));
        for chunk in hot.chunks {
            let range = hot.range_of(*chunk);
            pages.insert_run(PageIndex::holding(range.start), range.len.div_ceil(PAGE_SIZE));
        }
        let goes_on = || !progress.is_cancelled();
        let kept = Kept::of(hot.index, &pages, &goes_on);
        let kept = kept.map_err(|error| below_failed(hot.name, error.into()))?;
        match progress.is_cancelled() {
            true => Err(CaptureError::Cancelled),
            false => Ok(Self { hot, kept }),
        }
    }

    /// The layers of the base that the new volume has too.
    pub(in crate::capture) fn kept_layers(&self) -> Vec<Blob> {
        self.kept.of_layers(&self.hot.base.layers)
    }

    /// Writes the layer and the index; `position` is that of the volume's figures in `progress`.
    ///
    /// # Errors
    /// When a chunk or the index cannot be read, the image cannot be written, or it was cancelled.
    pub(in crate::capture) fn capture(
        self,
        level: i32,
        publication: &Publication,
        (progress, position): (&Progress, usize),
        wanted: BTreeSet<ChunkIndex>,
    ) -> Result<WrittenVolume, CaptureError> {
        let Self { hot, kept } = self;
        let mut hands = Hands {
            decoder: ChunkDecoder::new().map_err(|source| CaptureError::Compressor { level, source })?,
            reader: ChunkReader::default(),
            compressor: ChunkCompressor::new(level)
                .map_err(|source| CaptureError::Compressor { level, source })?,
            frame: Vec::new(),
            plain: Vec::new(),
        };
        let goes_on = || !progress.is_cancelled();
        let mut writer = ChangesWriter::new(publication, hot.index, kept, wanted)?;
        for chunk in hot.chunks {
            if !goes_on() {
                return Err(CaptureError::Cancelled);
            }
            if let Some(compressed) = hot.frame_of(*chunk, &mut hands)? {
                writer.lay(*chunk, compressed, &hands.frame, hot.range_of(*chunk).len)?;
                progress.set_stored(position, writer.stored_bytes());
            }
        }
        writer
            .push_laid(&goes_on)
            .map_err(|error| below_failed(hot.name, error))?;
        if !goes_on() {
            return Err(CaptureError::Cancelled);
        }
        progress.add_done(position, hot.base.root.volume_bytes());
        Ok(writer.finish(hot.base, hot.name.clone())?)
    }
}

impl Hot<'_> {
    fn range_of(&self, chunk: ChunkIndex) -> ByteRange {
        let root = &self.base.root;
        root.chunk_size().range_of(chunk, root.volume_bytes())
    }

    /// Puts the frame of a chunk into `hands.frame`, verified; none of one that is zeros.
    fn frame_of(
        &self,
        chunk: ChunkIndex,
        hands: &mut Hands,
    ) -> Result<Option<CompressedChunk>, CaptureError> {
        let entry = self.index.entry(chunk);
        let entry = entry.map_err(|error| below_failed(self.name, error.into()))?;
        let range = self.range_of(chunk);
        hands.plain.resize(range.len as usize, 0); // at most 2 MiB
        let read = match &entry {
            Entry::Zero => return Ok(None),
            Entry::Data(stored) => hands
                .reader
                .read_frame(self.store.as_ref(), &self.base.layers, stored, &mut hands.frame)
                .and_then(|layer| {
                    let decoded = hands
                        .decoder
                        .decode(&hands.frame, &stored.digest, &mut hands.plain);
                    decoded.map_err(|source| ChunkError::Decode {
                        layer,
                        frame: stored.frame,
                        source,
                    })
                })
                .map(|()| CompressedChunk {
                    frame_bytes: stored.frame.len as u32, // capped as the index was parsed
                    digest: stored.digest,
                }),
            Entry::Parts(_) => {
                let read =
                    hands
                        .reader
                        .read(self.store.as_ref(), &self.base.layers, &entry, &mut hands.plain);
                match read {
                    Ok(()) => return self.compressed(range, hands).map(Some),
                    Err(error) => Err(error),
                }
            }
        };
        read.map(Some).map_err(|error| CaptureError::Read {
            volume: self.name.clone(),
            range,
            source: std::io::Error::other(error),
        })
    }

    /// A chunk that was of several frames gets one of its own.
    fn compressed(&self, range: ByteRange, hands: &mut Hands) -> Result<CompressedChunk, CaptureError> {
        hands.frame.clear();
        let frame_bytes = hands.compressor.append_frame(&hands.plain, &mut hands.frame);
        Ok(CompressedChunk {
            frame_bytes: frame_bytes.map_err(|source| CaptureError::Compress {
                volume: self.name.clone(),
                range,
                source,
            })?,
            digest: ChunkDigest::of(&hands.plain),
        })
    }
}
