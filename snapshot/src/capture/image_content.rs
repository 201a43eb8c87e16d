//! A volume of an image as the [`Content`] of a capture: what writes the image anew in fewer layers reads it so.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use super::content::{Content, Found};
use crate::blobs::{Blob, BlobStore};
use crate::image::Image;
use crate::image::chunk_reader::ChunkReader;
use crate::image::manifest::ImageVolume;
use crate::index::{Entry, IndexError, IndexReader};
use crate::units::{ByteRange, ChunkIndex, ChunkSize};

/// See the module. Chunks that are damaged, or cannot be had, are errors of what reads them.
pub struct ImageContent {
    store: Arc<dyn BlobStore>,
    layers: Vec<Blob>,
    index: IndexReader,
    /// One for each thread that reads.
    readers: Mutex<Vec<ChunkReader>>,
}

impl ImageContent {
    /// The volume `volume` of `image`.
    #[must_use]
    pub fn new(image: &Image, volume: &ImageVolume) -> Self {
        Self {
            store: Arc::clone(&image.store),
            layers: volume.layers.clone(),
            index: image.index(volume),
            readers: Mutex::default(),
        }
    }

    /// How the volume is cut.
    #[must_use]
    pub fn chunk_size(&self) -> ChunkSize {
        self.index.root().chunk_size()
    }

    fn range_of(&self, chunk: ChunkIndex) -> ByteRange {
        let root = self.index.root();
        root.chunk_size().range_of(chunk, root.volume_bytes())
    }

    /// The first chunk from `from` on that is, or is not, zeros.
    fn next(&self, from: u64, is_zero: bool) -> Result<Option<u64>, IndexError> {
        let root = self.index.root();
        let mut chunk = from;
        while let Some((number, position)) = root.locate(ChunkIndex(chunk)) {
            let segment = self.index.segment(number)?;
            let end = segment.chunks_covered();
            let mut positions = match segment.is_zero() && !is_zero {
                true => end..end,
                false => position..end,
            };
            if let Some(found) = positions.find(|at| (segment.entry(*at) == Some(Entry::Zero)) == is_zero) {
                return Ok(Some(chunk + u64::from(found - position)));
            }
            chunk += u64::from(end - position);
        }
        Ok(None)
    }

    fn read_chunk(&self, chunk: ChunkIndex, into: &mut [u8]) -> io::Result<Found> {
        let entry = self.index.entry(chunk).map_err(io::Error::other)?;
        if entry == Entry::Zero {
            return Ok(Found::Zero);
        }
        let spare = self.readers.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut reader = spare.unwrap_or_default();
        let read = reader.read(self.store.as_ref(), &self.layers, &entry, into);
        self.readers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(reader);
        read.map(|()| Found::Data).map_err(io::Error::other)
    }
}

impl Content for ImageContent {
    fn bytes(&self) -> u64 {
        self.index.root().volume_bytes()
    }

    fn next_data(&self, from: u64) -> io::Result<Option<ByteRange>> {
        let first = self.chunk_size().chunk_holding(from).0;
        let Some(start) = self.next(first, false).map_err(io::Error::other)? else {
            return Ok(None);
        };
        let end = self.next(start, true).map_err(io::Error::other)?;
        let end = end.map_or(self.bytes(), |end| self.range_of(ChunkIndex(end)).start);
        let start = self.range_of(ChunkIndex(start)).start.max(from);
        Ok((start < end).then(|| ByteRange {
            start,
            len: end - start,
        }))
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Found> {
        let chunk = self.chunk_size().chunk_holding(offset);
        let range = self.range_of(chunk);
        // What captures the volume reads it chunk by chunk.
        if range.start == offset && range.len == into.len() as u64 {
            return self.read_chunk(chunk, into);
        }
        let mut plain = vec![0; range.len as usize]; // at most 2 MiB
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let chunk = self.chunk_size().chunk_holding(at);
            let range = self.range_of(chunk);
            let skip = (at - range.start) as usize;
            let len = (range.len as usize).saturating_sub(skip).min(into.len() - done);
            if len == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            plain.resize(range.len as usize, 0);
            if self.read_chunk(chunk, &mut plain)? == Found::Zero {
                plain.fill(0);
            }
            into[done..done + len].copy_from_slice(&plain[skip..skip + len]);
            done += len;
        }
        Ok(Found::Data)
    }
}
