//! What a fetcher says of itself.

use std::time::Duration;

use crate::units::ChunkIndex;
use crate::volume::VolumeName;

/// Why a machine is stalled: the oldest chunk that somebody waits for and that does not come, or that there is no room
/// for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stall {
    /// The volume it belongs to.
    pub volume: VolumeName,
    /// The chunk that is missing.
    pub chunk: ChunkIndex,
    /// What the source said, or that it says nothing.
    pub reason: String,
    /// How long it has been waited for.
    pub waiting: Duration,
    /// How many chunks are waited for in all.
    pub chunks_waited_for: usize,
    /// Whether one of those who wait for it is the guest, whose access cannot be taken back.
    pub holds_guest: bool,
    /// Whether the source will go on saying no until somebody repairs what it reads. It is asked again now and then.
    pub needs_repair: bool,
}

/// What a fetcher has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FetcherCounters {
    /// Chunks that arrived with data.
    pub data_chunks: u64,
    /// Chunks that arrived as zeros.
    pub zero_chunks: u64,
    /// Chunks that somebody waited for.
    pub demanded_chunks: u64,
    /// Failures that the source reported.
    pub failures: u64,
    /// Chunks of all volumes.
    pub chunks_total: u64,
}

impl FetcherCounters {
    /// Whether every chunk has arrived. The machine needs its source again only for what is taken out of page files.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.data_chunks + self.zero_chunks == self.chunks_total
    }
}
