//! Where chunks come from: the one interface that the pager and overlays know of an image, an agent or a live machine.

use std::fs::File;
use std::sync::Arc;

use crate::units::{ByteRange, ChunkIndex, ChunkSize};
use crate::volume::VolumeName;

pub(crate) mod marks;

pub use marks::{Mark, Marks, PageFileLayout};

/// A volume that a [`PageSource`] can deliver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceVolume {
    /// Its name in the image.
    pub name: VolumeName,
    /// Its length in bytes. Drives need not be whole pages.
    pub bytes: u64,
    /// How it is cut.
    pub chunk_size: ChunkSize,
}

impl SourceVolume {
    /// Where everything is in its page file, if that has marks.
    #[must_use]
    pub fn layout(&self) -> PageFileLayout {
        PageFileLayout {
            volume_bytes: self.bytes,
            chunk_size: self.chunk_size,
        }
    }

    /// The bytes that `chunk` covers; empty if it lies outside.
    #[must_use]
    pub fn range_of(&self, chunk: ChunkIndex) -> ByteRange {
        self.chunk_size.range_of(chunk, self.bytes)
    }
}

/// The position of a volume in [`PageSource::volumes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeId(pub u16);

/// One chunk of one volume of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId {
    /// Which volume.
    pub volume: VolumeId,
    /// Which chunk of it.
    pub chunk: ChunkIndex,
}

/// How much somebody waits for a chunk. Higher ones overtake lower ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Urgency {
    /// Background fill: nobody waits.
    Fill,
    /// It is likely to be touched soon: a neighbour.
    Soon,
    /// It was touched early by a machine that ran from the image before. What waits with this urgency is fetched in the
    /// order in which it was asked for.
    Recorded,
    /// A vCPU or a device waits.
    Demand,
}

/// What a chunk turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrived {
    /// Its verified bytes are in the volume's page file, at their own offset.
    Data,
    /// It is all zeros; the page file holds nothing of it.
    Zero,
}

/// Why a chunk could not be had this time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct ChunkFailure {
    /// What happened, for people: names the store, the blob, what to do.
    pub reason: String,
    /// Whether asking again can help: the link is down, against: the bytes do not match their digest.
    pub transient: bool,
}

/// Who is told about chunks that were asked for. Called from the source's threads; must not block, and must not ask
/// again from within the call.
pub trait ChunkSink: Send + Sync {
    /// The chunk is there.
    fn arrived(&self, chunk: ChunkId, what: Arrived);
    /// The chunk could not be had. Whoever waits says so, and asks again later if the failure is transient.
    fn failed(&self, chunk: ChunkId, failure: ChunkFailure);
}

/// «Give me these chunks»: an image directory, an agent, later a live machine.
///
/// Chunks appear in one *page file* a volume, at their own offset; a chunk is verified before any byte of it is
/// visible there. The page file is opened for reading alone, and other machines may map the same one. A chunk that has
/// arrived may be taken out again, to make room: who maps the file is told by the next fault, and who reads it looks at
/// its [`Marks`], and asks again.
pub trait PageSource: Send + Sync {
    /// The volumes, in the order that [`VolumeId`] counts.
    fn volumes(&self) -> &[SourceVolume];

    /// The file in which the chunks of `volume` appear.
    ///
    /// # Panics
    /// If the source has no such volume.
    fn page_file(&self, volume: VolumeId) -> Arc<File>;

    /// Who hears of chunks from now on. Called once, before the first [`ask`](Self::ask).
    fn deliver_to(&self, sink: Arc<dyn ChunkSink>);

    /// Asks for chunks; returns at once. Each chunk asked for is answered once, however often it was asked for in
    /// the meantime; asking again with a higher urgency lifts it.
    fn ask(&self, chunks: &[ChunkId], urgency: Urgency);

    /// Nobody needs these chunks any more; an answer may still come.
    fn cancel(&self, chunks: &[ChunkId]);
}

#[cfg(test)]
pub(crate) mod model;
