//! The one place where frames become bytes: decompress, then hold against the digest. What comes out is verified.

use std::io::{self, Read};

use crate::digest::ChunkDigest;
use crate::layer::frame::is_zero;

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
        self.decompress(frame, plain)?;
        match ChunkDigest::of(plain) {
            found if found == *digest => Ok(()),
            found => Err(DecodeError::Digest {
                expected: *digest,
                found,
            }),
        }
    }

    /// Fills `plain`, exactly as long as what the frame should hold, from a frame whose digest nobody knows: what comes
    /// out is not verified, and good for nothing but having come out.
    ///
    /// # Errors
    /// When the frame does not hold so many bytes.
    pub fn decompress(&mut self, frame: &[u8], plain: &mut [u8]) -> Result<(), DecodeError> {
        let expected = plain.len();
        let found = self
            .context
            .decompress_to_buffer(frame, plain)
            .map_err(|source| DecodeError::Decompress {
                stored_bytes: frame.len(),
                plain_bytes: expected,
                source,
            })?;
        match found == expected {
            true => Ok(()),
            false => Err(DecodeError::Length { expected, found }),
        }
    }
}

/// The largest window, as a power of two, that a frame of zeros may ask for: 8 MiB.
const ZEROS_WINDOW_LOG_MAX: u32 = 23;

/// Why a frame is no run of zeros.
#[derive(Debug, thiserror::Error)]
pub enum ZerosError {
    /// It cannot be read, or does not decompress.
    #[error("the frame of zeros does not decompress")]
    Decompress(#[source] io::Error),
    /// It holds something else.
    #[error("the frame of zeros holds other bytes after the first {0}")]
    NotZero(u64),
    /// It has another length.
    #[error("the frame of zeros holds {found} bytes or more instead of {expected}")]
    Length {
        /// What it should hold.
        expected: u64,
        /// What it holds.
        found: u64,
    },
}

/// Decompresses a frame of any length in little memory, and checks that it holds exactly `content` zeros.
///
/// # Errors
/// When it does not.
pub fn check_zeros(frame: impl Read, content: u64) -> Result<(), ZerosError> {
    let mut decoder = zstd::Decoder::new(frame).map_err(ZerosError::Decompress)?;
    decoder
        .window_log_max(ZEROS_WINDOW_LOG_MAX)
        .map_err(ZerosError::Decompress)?;
    let mut piece = vec![0; 128 << 10];
    let mut found = 0;
    loop {
        let len = decoder.read(&mut piece).map_err(ZerosError::Decompress)?;
        if !is_zero(&piece[..len]) {
            return Err(ZerosError::NotZero(found));
        }
        found += len as u64;
        if found > content || (len == 0 && found != content) {
            return Err(ZerosError::Length {
                expected: content,
                found,
            });
        }
        if len == 0 {
            return Ok(());
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

    /// A dependency that asks for zstd's feature `legacy` would bring them back, for all of the program.
    #[test]
    fn the_formats_of_zstd_before_its_first_version_are_unknown() {
        let versions = [
            0x1eb5_2ffd_u32,
            0xfd2f_b522,
            0xfd2f_b523,
            0xfd2f_b524,
            0xfd2f_b525,
            0xfd2f_b526,
            0xfd2f_b527,
        ];
        for magic in versions {
            let mut frame = magic.to_le_bytes().to_vec();
            frame.extend([0; 60]);
            let refused = ChunkDecoder::new().unwrap().decompress(&frame, &mut [0; 100]);
            let Err(DecodeError::Decompress { source, .. }) = refused else {
                panic!("{magic:#x} is decompressed");
            };
            assert_eq!(source.to_string(), "Unknown frame descriptor");
        }
    }

    #[test]
    fn a_frame_of_zeros_is_exactly_that() {
        let frame_of = |plain: &[u8]| zstd::bulk::compress(plain, 1).unwrap();
        check_zeros(&frame_of(&[0; 300_000])[..], 300_000).unwrap();
        assert!(matches!(
            check_zeros(&frame_of(&[0; 300_000])[..], 300_001),
            Err(ZerosError::Length { .. })
        ));
        // A bomb is given up as soon as it is too long.
        assert!(
            matches!(check_zeros(&frame_of(&[0; 30 << 20])[..], 1), Err(ZerosError::Length { found, .. }) if found <= 128 << 10)
        );
        let mut almost = vec![0; 300_000];
        almost[299_999] = 1;
        assert!(matches!(
            check_zeros(&frame_of(&almost)[..], 300_000),
            Err(ZerosError::NotZero(_))
        ));
        assert!(matches!(
            check_zeros(&b"no frame"[..], 8),
            Err(ZerosError::Decompress(_))
        ));
    }
}
