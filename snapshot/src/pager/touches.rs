//! Which chunks the guest has touched, in the order in which it first did: what becomes a working set.
//!
//! A touch is a page fault in memory, also one on a page that is at hand: where memory is the private mapping of a page
//! file, each page's first touch is one, and the pages of a chunk that is at hand are mapped together. Of a drive it is a
//! read of the image's content. What is prefetched, filled or read for a snapshot is not touched.
//!
//! **Invariant.** The lock here is held for a push alone: a thread that answers faults may take it.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::source::ChunkId;
use crate::working_set::CHUNKS_MAX;

/// See the module. Nothing is noted unless [`begin`](Self::begin) said so.
#[derive(Default)]
pub(super) struct Touches {
    is_on: AtomicBool,
    noted: Mutex<Noted>,
}

#[derive(Default)]
struct Noted {
    order: Vec<ChunkId>,
    seen: HashSet<ChunkId>,
}

impl Touches {
    pub(super) fn begin(&self) {
        self.is_on.store(true, Ordering::Relaxed);
    }

    /// The guest touches a chunk.
    pub(super) fn note(&self, chunk: ChunkId) {
        if !self.is_on.load(Ordering::Relaxed) {
            return;
        }
        let mut noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        if noted.order.len() < CHUNKS_MAX && noted.seen.insert(chunk) {
            noted.order.push(chunk);
        }
    }

    /// Ends; what was noted, the first touched first.
    pub(super) fn end(&self) -> Vec<ChunkId> {
        self.is_on.store(false, Ordering::Relaxed);
        let mut noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *noted).order
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::VolumeId;
    use crate::units::ChunkIndex;

    fn chunk(number: u64) -> ChunkId {
        ChunkId {
            volume: VolumeId(0),
            chunk: ChunkIndex(number),
        }
    }

    #[test]
    fn first_touches_are_noted_in_order_from_the_beginning_to_the_end_and_to_a_limit() {
        let touches = Touches::default();
        touches.note(chunk(1));
        touches.begin();
        for number in [3, 2, 3, 9, 2] {
            touches.note(chunk(number));
        }
        assert_eq!(touches.end(), [3, 2, 9].map(chunk));
        touches.note(chunk(4));
        assert_eq!(touches.end(), []);
        touches.begin();
        (0..CHUNKS_MAX as u64 + 2).for_each(|number| touches.note(chunk(number)));
        assert_eq!(touches.end().len(), CHUNKS_MAX);
    }
}
