//! Layers: the blobs that hold chunks of one volume.
//!
//! A layer is a file in the Zstandard Seekable Format (facebook/zstd,
//! `contrib/seekable_format/zstd_seekable_compression_format.md`): one zstd frame a chunk, the seek table last. The
//! layer of a *full* volume has its frames in volume order and covers every byte, so that `zstd -dc LAYER` is byte
//! for byte the volume; runs of zeros are frames of up to 1 GiB.
//!
//! ```text
//! | frame: chunk 0 | frame: chunk 1 | frame: 1 GiB of zeros | frame: chunk 16386 | … | skippable frame: seek table |
//! ```

pub mod frame;
pub mod seek_table;
