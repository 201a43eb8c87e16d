//! Reads chunks one at a time, from wherever their frames are; what it hands out was verified.

use std::io;

use crate::blobs::{Blob, BlobError, BlobStore};
use crate::decode::{ChunkDecoder, DecodeError};
use crate::digest::BlobDigest;
use crate::index::{Entry, StoredChunk};
use crate::units::ByteRange;

/// Why a chunk cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ChunkError {
    /// Its frame cannot be had.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// Its frame is not what the index says.
    #[error("the frame at {frame} of layer {layer} is damaged")]
    Decode {
        /// Which layer.
        layer: BlobDigest,
        /// The bytes of the layer.
        frame: ByteRange,
        /// What is wrong.
        #[source]
        source: DecodeError,
    },
    /// The index names a layer that the volume does not have.
    #[error("the volume has no layer {0}")]
    NoLayer(u16),
    /// zstd lacks memory.
    #[error("zstd cannot be set up")]
    Decoder(#[source] io::Error),
}

/// What is kept between chunks.
#[derive(Default)]
pub struct ChunkReader {
    decoder: Option<ChunkDecoder>,
    frame: Vec<u8>,
    plain: Vec<u8>,
}

impl ChunkReader {
    /// Fills `chunk`, exactly as long as the chunk, with what `entry` says it is; `layers` are its volume's. The index
    /// that the entry comes from has capped each length.
    ///
    /// # Errors
    /// When a frame cannot be had, or is damaged. `chunk` then holds nothing of use.
    pub fn read(
        &mut self,
        store: &dyn BlobStore,
        layers: &[Blob],
        entry: &Entry,
        chunk: &mut [u8],
    ) -> Result<(), ChunkError> {
        match entry {
            Entry::Zero => chunk.fill(0),
            Entry::Data(stored) => self.decode(store, layers, stored, chunk)?,
            Entry::Parts(parts) => {
                chunk.fill(0);
                let mut plain = std::mem::take(&mut self.plain);
                for part in parts.iter() {
                    plain.resize(part.plain_bytes(chunk.len() as u64) as usize, 0);
                    self.decode(store, layers, &part.stored, &mut plain)?;
                    part.place(&plain, chunk);
                }
                self.plain = plain;
            }
        }
        Ok(())
    }

    /// Fills `frame` with the frame that an index names, as it is stored; nothing in it was verified. Tells the layer that
    /// it is of.
    ///
    /// # Errors
    /// When it cannot be had.
    pub fn read_frame(
        &self,
        store: &dyn BlobStore,
        layers: &[Blob],
        stored: &StoredChunk,
        frame: &mut Vec<u8>,
    ) -> Result<BlobDigest, ChunkError> {
        let number = stored.layer.0;
        let layer = layers
            .get(usize::from(number))
            .ok_or(ChunkError::NoLayer(number))?;
        frame.resize(stored.frame.len as usize, 0);
        store.read_range(layer, stored.frame.start, frame)?;
        Ok(layer.digest)
    }

    fn decode(
        &mut self,
        store: &dyn BlobStore,
        layers: &[Blob],
        stored: &StoredChunk,
        plain: &mut [u8],
    ) -> Result<(), ChunkError> {
        let number = stored.layer.0;
        let layer = layers
            .get(usize::from(number))
            .ok_or(ChunkError::NoLayer(number))?;
        let decoder = match &mut self.decoder {
            Some(decoder) => decoder,
            none => none.insert(ChunkDecoder::new().map_err(ChunkError::Decoder)?),
        };
        self.frame.resize(stored.frame.len as usize, 0);
        let mut decoded = Ok(());
        store.read_right(layer, stored.frame.start, &mut self.frame, &mut |frame| {
            decoded = decoder.decode(frame, &stored.digest, plain);
            decoded.is_ok()
        })?;
        decoded.map_err(|source| ChunkError::Decode {
            layer: layer.digest,
            frame: stored.frame,
            source,
        })
    }
}
