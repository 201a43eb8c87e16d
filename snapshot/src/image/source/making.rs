//! Chunks that are being made: which frames each still waits for, and what is there of those of several parts.

use super::cache::OwnFetch;
use crate::index::{Entry, LayerNumber, StoredChunk, StoredPart};
use crate::source::ChunkId;
use crate::units::ByteRange;

/// Bytes of chunks of parts that are made at once, or one such chunk: they wait for each other, as their frames are
/// read in the order in which they lie.
const BYTES_MAX: u64 = 2 << 20;

/// What may lie between two frames that are read at once: frames of zeros, which cost less than another request.
const GAP_BYTES_MAX: u64 = 4 << 10;

/// A frame that is wanted for a chunk.
#[derive(Clone, Copy, Debug)]
pub(super) struct FrameWanted {
    /// The chunk's position among those that are being made.
    pub(super) chunk: usize,
    pub(super) what: Wanted,
}

/// What a frame is of its chunk.
#[derive(Clone, Copy, Debug)]
pub(super) enum Wanted {
    Whole(StoredChunk),
    Part(StoredPart),
}

impl FrameWanted {
    pub(super) fn stored(&self) -> &StoredChunk {
        match &self.what {
            Wanted::Whole(stored) => stored,
            Wanted::Part(part) => &part.stored,
        }
    }

    fn place(&self) -> (LayerNumber, u64) {
        let stored = self.stored();
        (stored.layer, stored.frame.start)
    }
}

/// A chunk that waits for frames.
pub(super) struct Making {
    pub(super) id: ChunkId,
    /// The bytes of the volume that it is.
    pub(super) range: ByteRange,
    /// What is there of it; nothing of one that is a single frame. What comes into it was verified.
    pub(super) plain: Vec<u8>,
    /// How many frames are missing.
    pub(super) missing: usize,
    /// Whether whoever asked has his answer.
    pub(super) is_answered: bool,
    /// Others of the host who need the same chunk wait for this to end.
    pub(super) fetch: Option<OwnFetch>,
}

impl Making {
    /// Whoever asked is about to have his answer, and others look for themselves.
    pub(super) fn is_over(&mut self) {
        self.is_answered = true;
        self.fetch = None;
    }
}

/// The chunks of a run, all of one volume, that are not there.
#[derive(Default)]
pub(super) struct InTheMaking {
    pub(super) chunks: Vec<Making>,
    frames: Vec<FrameWanted>,
    bytes: u64,
}

impl InTheMaking {
    /// Whether such a chunk is to wait until those that are here are made.
    pub(super) fn is_full_for(&self, entry: &Entry, range: ByteRange) -> bool {
        matches!(entry, Entry::Parts(_)) && self.bytes > 0 && self.bytes + range.len > BYTES_MAX
    }

    /// Adds a chunk of the volume's `range`.
    pub(super) fn add(&mut self, id: ChunkId, entry: &Entry, range: ByteRange, fetch: Option<OwnFetch>) {
        let chunk = self.chunks.len();
        let before = self.frames.len();
        let mut plain = Vec::new();
        match entry {
            Entry::Zero => {}
            Entry::Data(stored) => self.frames.push(FrameWanted {
                chunk,
                what: Wanted::Whole(*stored),
            }),
            Entry::Parts(parts) => {
                plain = vec![0; range.len as usize]; // at most 2 MiB
                self.bytes += range.len;
                self.frames.extend(parts.iter().map(|part| FrameWanted {
                    chunk,
                    what: Wanted::Part(*part),
                }));
            }
        }
        self.chunks.push(Making {
            id,
            range,
            plain,
            missing: self.frames.len() - before,
            is_answered: false,
            fetch,
        });
    }

    /// Takes out the frames, in the order in which they lie.
    pub(super) fn take_frames(&mut self) -> Vec<FrameWanted> {
        let mut frames = std::mem::take(&mut self.frames);
        frames.sort_by_key(FrameWanted::place);
        frames
    }

    /// Ends with these chunks.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

/// How many of these frames, at least one of them, lie together so closely that they are read at once: no more than
/// `read_bytes_max` bytes, unless the first alone has more.
pub(super) fn together(frames: &[FrameWanted], read_bytes_max: u64) -> usize {
    let Some(first) = frames.first() else { return 0 };
    let follows = |pair: &&[FrameWanted]| {
        let [last, next] = pair else { return false };
        let (last, next) = (last.stored(), next.stored());
        let gap = last.frame.end().and_then(|end| next.frame.start.checked_sub(end));
        let end = next.frame.end();
        last.layer == next.layer
            && gap.is_some_and(|gap| gap <= GAP_BYTES_MAX)
            && end.is_some_and(|end| end - first.stored().frame.start <= read_bytes_max)
    };
    1 + frames.windows(2).take_while(follows).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::ChunkDigest;

    fn frame(layer: u16, start: u64, len: u64) -> FrameWanted {
        let frame = ByteRange { start, len };
        FrameWanted {
            chunk: 0,
            what: Wanted::Whole(StoredChunk {
                layer: LayerNumber(layer),
                frame,
                digest: ChunkDigest([0; 32]),
            }),
        }
    }

    #[test]
    fn frames_that_lie_together_in_one_layer_are_read_at_once_up_to_a_limit() {
        let frames = [
            frame(0, 0, 100),
            frame(0, 100, 100),
            frame(0, 4296, 4),
            frame(0, 9000, 4),
        ];
        assert_eq!(together(&frames, 1 << 20), 3, "the last is too far away");
        assert_eq!(together(&frames, 4299), 2);
        assert_eq!(together(&frames, 0), 1);
        assert_eq!(together(&[frame(0, 0, 100), frame(1, 100, 100)], 1 << 20), 1);
        assert_eq!(
            together(&[frame(0, 0, 100), frame(0, 50, 100)], 1 << 20),
            1,
            "over each other"
        );
        assert_eq!(together(&[], 1 << 20), 0);
    }
}
