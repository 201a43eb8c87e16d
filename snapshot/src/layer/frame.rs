//! Frames: how a chunk, or a run of zeros, becomes bytes of a layer (RFC 8878 §3.1.1).
//!
//! Decompression has one place only, [`crate::decode`].

use std::io;

use crate::units::ChunkSize;

/// The content of the longest zero frame: what one entry of a seek table may describe.
pub const ZERO_FRAME_CONTENT_MAX: u64 = 1 << 30;

/// The window of zero frames. A *single segment* frame of 1 GiB would ask its reader for a buffer of that size, and
/// stock `zstd` refuses it; with the window of one block it costs the reader 128 KiB.
const ZERO_WINDOW: u64 = 128 << 10;

/// Bytes in the header of a zero frame: magic, descriptor, window, content size.
const ZERO_HEADER_BYTES: usize = 4 + 1 + 1 + 4;

/// Bytes of a block that says "this byte, so many times".
const RLE_BLOCK_BYTES: usize = 3 + 1;

/// The longest frame that a chunk may have. zstd's own bound for input that does not compress lies below.
#[must_use]
pub fn frame_bytes_max(chunk_size: ChunkSize) -> u64 {
    chunk_size.bytes() + chunk_size.bytes() / 128 + 512
}

/// Appends a frame of `content` zeros to `out`.
///
/// It is written by hand, as run-length blocks: the same bytes everywhere, 32 KiB for 1 GiB, at no cost of time.
///
/// # Panics
/// Unless `content` is from 1 to [`ZERO_FRAME_CONTENT_MAX`].
pub fn append_zero_frame(content: u64, out: &mut Vec<u8>) {
    assert!(
        (1..=ZERO_FRAME_CONTENT_MAX).contains(&content),
        "a zero frame of {content} bytes"
    );
    let blocks = content.div_ceil(ZERO_WINDOW);
    out.reserve(zero_frame_bytes(content) as usize);
    out.extend_from_slice(&0xFD2F_B528_u32.to_le_bytes());
    // Content size in four bytes, not single segment, no checksum, no dictionary.
    out.push(0b1000_0000);
    // Window: exponent 7 over 2^10 in the upper five bits, no mantissa: 128 KiB.
    out.push(7 << 3);
    out.extend_from_slice(&(content as u32).to_le_bytes());
    for block in 0..blocks {
        let is_last = block + 1 == blocks;
        let len = if is_last {
            content - block * ZERO_WINDOW
        } else {
            ZERO_WINDOW
        };
        // Last block, type 1 (run length), how often the byte is repeated.
        let header = u32::from(is_last) | 1 << 1 | (len as u32) << 3;
        out.extend_from_slice(&header.to_le_bytes()[..3]);
        out.push(0);
    }
}

/// How many bytes [`append_zero_frame`] appends.
#[must_use]
pub fn zero_frame_bytes(content: u64) -> u64 {
    ZERO_HEADER_BYTES as u64 + content.div_ceil(ZERO_WINDOW) * RLE_BLOCK_BYTES as u64
}

/// Whether `bytes` are all zeros; at the speed of memory where they are, at once where they are not.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // Blocks large enough that the compiler's vector code runs, small enough that data is noticed early.
    bytes
        .chunks(512)
        .all(|block| block.iter().fold(0, |seen, byte| seen | byte) == 0)
}

/// Compresses chunks, one frame each, with a context that is kept between them.
pub struct ChunkCompressor {
    context: zstd::bulk::Compressor<'static>,
}

impl ChunkCompressor {
    /// Prepares a context for `level` (1 to 22, or negative for faster).
    ///
    /// # Errors
    /// When zstd refuses the level or lacks memory.
    pub fn new(level: i32) -> io::Result<Self> {
        // Content sizes are written, as bulk compression does by itself; checksums are not: BLAKE3 does more.
        Ok(Self {
            context: zstd::bulk::Compressor::new(level)?,
        })
    }

    /// Appends the frame of `chunk` to `out`; returns its length.
    ///
    /// # Errors
    /// When zstd lacks memory.
    pub fn append_frame(&mut self, chunk: &[u8], out: &mut Vec<u8>) -> io::Result<u32> {
        let start = out.len();
        out.reserve(zstd::zstd_safe::compress_bound(chunk.len()));
        let mut end = io::Cursor::new(&mut *out);
        end.set_position(start as u64);
        let frame = self.context.compress_to_buffer(chunk, &mut end)?;
        u32::try_from(frame).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn zero_frames_of_any_length_decode_to_that_many_zeros() {
        for content in [
            1,
            4096,
            ZERO_WINDOW - 1,
            ZERO_WINDOW,
            ZERO_WINDOW + 1,
            70 << 20,
            (64 << 20) + 512,
        ] {
            let mut frame = Vec::new();
            append_zero_frame(content, &mut frame);
            assert_eq!(frame.len() as u64, zero_frame_bytes(content));
            let mut plain = Vec::new();
            zstd::Decoder::new(&frame[..])
                .unwrap()
                .read_to_end(&mut plain)
                .unwrap();
            assert_eq!(plain.len() as u64, content);
            assert!(is_zero(&plain));
        }
    }

    #[test]
    fn the_longest_zero_frame_costs_32_kib() {
        assert!(zero_frame_bytes(ZERO_FRAME_CONTENT_MAX) < (32 << 10) + 64);
    }

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        let mut bytes = vec![0; 5000];
        assert!(is_zero(&bytes) && is_zero(&[]));
        for at in [0, 511, 512, 4999] {
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "byte {at}");
            bytes[at] = 0;
        }
    }

    #[test]
    fn frames_are_appended_and_stay_below_their_cap_for_any_chunk_size() {
        let mut seed = 1_u32;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 24) as u8
        })
        .take(ChunkSize::MAX as usize)
        .collect();
        let mut compressor = ChunkCompressor::new(1).unwrap();
        for log2 in 14..=21 {
            let size = ChunkSize::new(1 << log2).unwrap();
            let chunk = &noise[..size.bytes() as usize];
            let mut out = vec![7; 3];
            let len = compressor.append_frame(chunk, &mut out).unwrap();
            assert_eq!(out.len(), 3 + len as usize);
            assert!(u64::from(len) <= frame_bytes_max(size));
            assert!(zstd::zstd_safe::compress_bound(chunk.len()) as u64 <= frame_bytes_max(size));
            assert_eq!(zstd::bulk::decompress(&out[3..], chunk.len()).unwrap(), chunk);
        }
    }
}
