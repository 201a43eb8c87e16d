//! Capture: volumes and machine state become an image.
//!
//! ```text
//! Content ─► splitter ─► compressors (a bounded pool) ─► line, in order ─► VolumeWriter ─► Publication
//!    (holes cost nothing)      read · zero? · zstd · BLAKE3      (capped)       SHA-256       fsync, rename
//! ```
//!
//! Of a volume that lies over an image's, what changed may be captured alone (`changes`), and an image of many layers
//! be written anew as one of few ([`squash`]), or with what a resumed machine touches first laid together ([`optimize`]).
//!
//! The machine may stand still meanwhile, or run on while its [`Content`] answers with what each page was at the
//! pause: nothing here knows which. Whatever fails, or a cancellation, leaves no half image and no thread behind.

mod changes;
pub mod content;
mod image_content;
mod job;
mod line;
pub mod optimize;
mod pool;
pub mod progress;
pub mod raw;
mod splitter;
pub mod squash;
pub mod volume_writer;

pub use changes::ChangesError;
pub use content::Content;
pub use image_content::ImageContent;
pub use job::{CaptureError, Captured, Job, VolumeSource};
pub use progress::Progress;

use crate::units::ChunkSize;

/// How an image is made.
#[derive(Clone, Debug)]
pub struct CaptureSettings {
    /// How volumes are cut.
    pub chunk_size: ChunkSize,
    /// zstd's level: 1 to 22, or negative for faster.
    pub level: i32,
    /// Threads that compress: at least one.
    pub compressors: usize,
    /// Whether these threads run where others leave processors idle: a machine runs meanwhile.
    pub gives_way: bool,
}

impl Default for CaptureSettings {
    /// 64 KiB, level 1, a compressor for each of the host's processors, up to 16.
    fn default() -> Self {
        // Past this the one thread that writes and hashes is the bound.
        const COMPRESSORS_MAX: usize = 16;
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            chunk_size: ChunkSize::DEFAULT,
            level: 1,
            compressors: processors.min(COMPRESSORS_MAX),
            gives_way: false,
        }
    }
}
