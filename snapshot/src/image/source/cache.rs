//! What the page files of several images have to do with each other on a host: the room that they share, and the chunks
//! that one has and another needs.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::fetch::{FetchError, Hands, Shared, Volume};
use super::page_file::{PageFile, Spot};
use crate::digest::ChunkDigest;
use crate::index::StoredChunk;
use crate::units::ChunkIndex;
use crate::volume::VolumeName;

/// The host's cache, as a source sees it. Called from the source's workers; may take chunks out of page files, those of
/// the source itself included.
pub trait HostCache: Send + Sync {
    /// So many bytes are about to be written to a page file of such a volume: makes room for them, if they would be too
    /// many.
    fn will_write(&self, volume: &VolumeName, bytes: u64);

    /// There was no room for so many bytes on the file system. Whether there may be now.
    fn make_room(&self, volume: &VolumeName, bytes: u64) -> bool;

    /// Whether there is room for what nobody waits for, without taking out what machines may need.
    fn has_room_to_fill(&self, volume: &VolumeName) -> bool;

    /// A verified chunk is in a page file now.
    fn keeps(&self, digest: &ChunkDigest, file: &Arc<PageFile>, chunk: ChunkIndex);

    /// Fills `plain` with the chunk of that digest if a page file of the host has it, whatever image it is of.
    fn find(&self, digest: &ChunkDigest, plain: &mut [u8]) -> bool;

    /// The chunk of that digest is about to be fetched, for the fill or for somebody, unless another is at it already.
    fn begin_fetch(&self, digest: &ChunkDigest, is_fill: bool) -> Fetching;

    /// It is there, or cannot be had.
    fn end_fetch(&self, fetch: &Fetch);

    /// Waits for the end of another's fetch, but not for ever: whoever waits then looks for himself. He has no fetch of his
    /// own under way meanwhile.
    fn wait_for(&self, fetch: &Fetch);
}

/// A fetch of a chunk, among all of a host.
#[derive(Debug)]
pub struct Fetch {
    /// What is fetched.
    pub digest: ChunkDigest,
    /// Which time.
    pub number: u64,
}

/// Who fetches a chunk.
#[derive(Debug)]
pub enum Fetching {
    /// Whoever asks.
    Ours(Fetch),
    /// Another, who began before.
    Others(Fetch),
}

/// A fetch of this source's, which ends with this.
pub(super) struct OwnFetch {
    cache: Arc<dyn HostCache>,
    fetch: Fetch,
}

impl Drop for OwnFetch {
    fn drop(&mut self) {
        self.cache.end_fetch(&self.fetch);
    }
}

/// No cache but each image's own page files.
pub struct Uncached;

impl HostCache for Uncached {
    fn will_write(&self, _: &VolumeName, _: u64) {}

    fn make_room(&self, _: &VolumeName, _: u64) -> bool {
        false
    }

    fn has_room_to_fill(&self, _: &VolumeName) -> bool {
        true
    }

    fn keeps(&self, _: &ChunkDigest, _: &Arc<PageFile>, _: ChunkIndex) {}

    fn find(&self, _: &ChunkDigest, _: &mut [u8]) -> bool {
        false
    }

    fn begin_fetch(&self, digest: &ChunkDigest, _: bool) -> Fetching {
        Fetching::Ours(Fetch {
            digest: *digest,
            number: 0,
        })
    }

    fn end_fetch(&self, _: &Fetch) {}

    fn wait_for(&self, _: &Fetch) {}
}

/// What was copied from another image's page file, and not fetched.
#[derive(Debug, Default)]
pub(super) struct Copied {
    chunks: AtomicU64,
    stored_bytes: AtomicU64,
}

impl Copied {
    /// Chunks, and the stored bytes that they would have taken to fetch.
    pub(super) fn read(&self) -> (u64, u64) {
        (
            self.chunks.load(Ordering::Relaxed),
            self.stored_bytes.load(Ordering::Relaxed),
        )
    }
}

impl Shared {
    /// Fill goes volume by volume: what has no room holds up what comes behind it.
    pub(super) fn has_room_to_fill(&self) -> bool {
        let mut volumes = self.volumes.iter();
        volumes.all(|volume| volume.cache.has_room_to_fill(&volume.name))
    }
}

impl Volume {
    /// Puts a verified chunk into the page file; `digest` is that of all of it, if there is one.
    pub(super) fn keep(
        &self,
        plain: &[u8],
        spot: Spot,
        digest: Option<&ChunkDigest>,
        is_fill: bool,
    ) -> Result<(), FetchError> {
        let bytes = plain.len() as u64;
        self.cache.will_write(&self.name, bytes);
        let mut written = self.pages.put(plain, spot, is_fill);
        if written.as_ref().is_err_and(is_no_room) && self.cache.make_room(&self.name, bytes) {
            written = self.pages.put(plain, spot, is_fill);
        }
        self.room.tried(&written, Instant::now());
        written.map_err(|error| self.not_kept(error))?;
        self.present.insert(spot.chunk);
        if let Some(digest) = digest {
            self.cache.keeps(digest, &self.pages, spot.chunk);
        }
        Ok(())
    }

    /// What a chunk that cannot be kept is told with: where to make room, if that is why.
    pub(super) fn not_kept(&self, error: io::Error) -> FetchError {
        FetchError::PageFile(match self.pages.folder().filter(|_| is_no_room(&error)) {
            Some(folder) => {
                let message = format!("{error}: make room in {}", folder.display());
                io::Error::new(error.kind(), message)
            }
            None => error,
        })
    }

    /// Whether the chunk is in the page file since an earlier process put it there.
    pub(super) fn inherits(&self, spot: Spot, digest: &ChunkDigest, hands: &mut Hands) -> bool {
        let holds = self.pages.holds(spot, digest, &mut hands.plain);
        if holds {
            self.present.insert(spot.chunk);
            self.cache.keeps(digest, &self.pages, spot.chunk);
        }
        holds
    }

    /// Begins to fetch a chunk, or says who has begun.
    pub(super) fn begin_fetch(&self, digest: &ChunkDigest, is_fill: bool) -> Result<OwnFetch, Fetch> {
        match self.cache.begin_fetch(digest, is_fill) {
            Fetching::Ours(fetch) => Ok(OwnFetch {
                cache: Arc::clone(&self.cache),
                fetch,
            }),
            Fetching::Others(fetch) => Err(fetch),
        }
    }

    /// Takes the chunk from another page file of the host, if one has it.
    pub(super) fn copies(&self, spot: Spot, stored: &StoredChunk, hands: &mut Hands) -> bool {
        // The length of a chunk was capped when the index was parsed.
        hands.plain.resize(spot.range.len as usize, 0);
        if !self.cache.find(&stored.digest, &mut hands.plain) {
            return false;
        }
        // What cannot be kept is not kept either once it was fetched, and that is told then.
        let kept = self.keep(&hands.plain, spot, Some(&stored.digest), hands.is_fill);
        if kept.is_ok() {
            self.copied.chunks.fetch_add(1, Ordering::Relaxed);
            self.copied
                .stored_bytes
                .fetch_add(stored.frame.len, Ordering::Relaxed);
        }
        kept.is_ok()
    }
}

fn is_no_room(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
