//! The one place where frames become bytes: decompress, then hold against the digest. What comes out is verified.

use std::io;

use crate::digest::ChunkDigest;

/// Why a frame is not the chunk that the index promises.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// It does not decompress.
    #[error("the frame of {stored_bytes} bytes does not decompress to a chunk of {plain_bytes} bytes")]
    Decompress {
        /// Its length.
        stored_bytes: usize,
        /// The chunk's.
        plain_bytes: usize,
        /// zstd's reason.
        #[source]
        source: io::Error,
    },
    /// It decompresses to something shorter.
    #[error("the frame decompresses to {found} bytes, and the chunk has {expected}")]
    Length {
        /// The chunk's length.
        expected: usize,
        /// The frame's.
        found: usize,
    },
    /// It decompresses to something else.
    #[error("the chunk does not match its digest: it should be {expected} and is {found}")]
    Digest {
        /// The index's digest.
        expected: ChunkDigest,
        /// That of the bytes.
        found: ChunkDigest,
    },
}

/// Decompresses and verifies chunks with a context that is kept between them.
pub struct ChunkDecoder {
    context: zstd::bulk::Decompressor<'static>,
}

impl ChunkDecoder {
    /// Prepares a context.
    ///
    /// # Errors
    /// When zstd lacks memory.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            context: zstd::bulk::Decompressor::new()?,
        })
    }

    /// Fills `plain`, exactly as long as the chunk, from its frame. After an error `plain` holds nothing of use.
    ///
    /// # Errors
    /// When the frame is not the chunk of that digest.
    pub fn decode(
        &mut self,
        frame: &[u8],
        digest: &ChunkDigest,
        plain: &mut [u8],
    ) -> Result<(), DecodeError> {
        let expected = plain.len();
        let found = self
            .context
            .decompress_to_buffer(frame, plain)
            .map_err(|source| DecodeError::Decompress {
                stored_bytes: frame.len(),
                plain_bytes: expected,
                source,
            })?;
        if found != expected {
            return Err(DecodeError::Length { expected, found });
        }
        match ChunkDigest::of(plain) {
            found if found == *digest => Ok(()),
            found => Err(DecodeError::Digest {
                expected: *digest,
                found,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_that_is_not_its_chunk_is_refused() {
        let chunk = b"the bytes of a chunk".repeat(100);
        let frame = zstd::bulk::compress(&chunk, 1).unwrap();
        let digest = ChunkDigest::of(&chunk);
        let mut decoder = ChunkDecoder::new().unwrap();
        let mut plain = vec![0; chunk.len()];

        decoder.decode(&frame, &digest, &mut plain).unwrap();
        assert_eq!(plain, chunk);

        let other = ChunkDigest::of(b"other");
        assert!(matches!(
            decoder.decode(&frame, &other, &mut plain),
            Err(DecodeError::Digest { .. })
        ));
        let mut longer = vec![0; chunk.len() + 1];
        assert!(matches!(
            decoder.decode(&frame, &digest, &mut longer),
            Err(DecodeError::Length { .. })
        ));
        let shorter = &mut plain[..chunk.len() - 1];
        assert!(matches!(
            decoder.decode(&frame, &digest, shorter),
            Err(DecodeError::Decompress { .. })
        ));
        for at in 0..frame.len() {
            let mut bad = frame.clone();
            bad[at] ^= 1;
            // Refused, or the flipped bit meant nothing: never other bytes.
            if decoder.decode(&bad, &digest, &mut plain).is_ok() {
                assert_eq!(plain, chunk);
            }
        }
        decoder.decode(&frame, &digest, &mut plain).unwrap();
    }
}
