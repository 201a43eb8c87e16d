//! The chunks under way, and who waits for them.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::fill::Fill;
use super::room::NoRoom;
use crate::source::{ChunkFailure, ChunkId, Urgency, VolumeId};

/// A chunk under way.
pub(super) struct Pending {
    pub(super) urgency: Urgency,
    /// Whether it takes a place in the fill's window.
    pub(super) fills: bool,
    /// Since when somebody waits for it; `None` for prefetch.
    pub(super) demanded: Option<Instant>,
    /// Whether one of them waits until it is here; a guest's access cannot be taken back.
    pub(super) is_needed: bool,
    /// How many of them may give up.
    pub(super) may_give_up: usize,
    pub(super) failed: Option<(ChunkFailure, u32)>,
    /// When to ask again, after a failure.
    pub(super) retry_at: Option<Instant>,
}

impl Pending {
    pub(super) fn new() -> Self {
        Self {
            urgency: Urgency::Fill,
            fills: false,
            demanded: None,
            is_needed: false,
            may_give_up: 0,
            failed: None,
            retry_at: None,
        }
    }

    /// Whether its source says that asking again does not help.
    pub(super) fn is_hopeless(&self) -> bool {
        matches!(&self.failed, Some((failure, _)) if !failure.transient)
    }
}

/// How often a failure is told in the log. An agent that is away fails hundreds of chunks at once.
const COMPLAINT_PAUSE: Duration = Duration::from_secs(5);

/// Which failures are told, and how many were not.
#[derive(Default)]
pub(super) struct Complaints {
    told: Option<Instant>,
    untold: u64,
}

impl Complaints {
    /// Whether the failure of another chunk is told `now`: how many were not since the last one that was.
    pub(super) fn next(&mut self, now: Instant) -> Option<u64> {
        if self
            .told
            .is_some_and(|told| now.duration_since(told) < COMPLAINT_PAUSE)
        {
            self.untold += 1;
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.untold))
    }
}

/// All chunks under way, and how far the background fill is.
#[derive(Default)]
pub(super) struct Queue {
    pub(super) pending: BTreeMap<ChunkId, Pending>,
    pub(super) fill: Fill,
    pub(super) complaints: Complaints,
    /// Writes for which there is no room, one a volume.
    pub(super) without_room: BTreeMap<VolumeId, NoRoom>,
    /// Something came that the thread should look at; kept here because it may not be waiting yet.
    pub(super) news: bool,
    pub(super) stopping: bool,
}

impl Queue {
    /// Notes that a chunk is under way; `false` if it was already.
    pub(super) fn add(&mut self, id: ChunkId, urgency: Urgency) -> bool {
        if self.pending.contains_key(&id) {
            return false;
        }
        self.pending.insert(
            id,
            Pending {
                urgency,
                fills: urgency == Urgency::Fill,
                ..Pending::new()
            },
        );
        true
    }

    /// One who may give up does. Nobody is kept waiting by a chunk that nobody waits for: it goes on as prefetch.
    pub(super) fn give_up(&mut self, id: ChunkId) {
        let Some(pending) = self.pending.get_mut(&id) else {
            return;
        };
        pending.may_give_up = pending.may_give_up.saturating_sub(1);
        if pending.may_give_up == 0 && !pending.is_needed {
            pending.demanded = None;
            pending.urgency = pending.urgency.min(Urgency::Soon);
        }
    }
}

/// The queue and its signal, apart from the fetcher, so that the thread can wait without keeping the fetcher alive.
#[derive(Default)]
pub(super) struct Work {
    /// Held for bookkeeping only: never while the source, a hook or guest memory is touched.
    pub(super) queue: Mutex<Queue>,
    /// Told of arrivals (for [`Fetcher::wait`](super::Fetcher::wait)), of work for the thread, and of stopping.
    pub(super) changed: Condvar,
}

impl Work {
    pub(super) fn lock(&self) -> MutexGuard<'_, Queue> {
        // Every critical section leaves the queue whole, so a panic elsewhere does not spoil it.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when there are news, or after `pause`.
    pub(super) fn sleep(&self, pause: Duration) {
        let nothing_new = |queue: &mut Queue| !queue.stopping && !queue.news;
        let slept = self.changed.wait_timeout_while(self.lock(), pause, nothing_new);
        slept.unwrap_or_else(PoisonError::into_inner).0.news = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_failures_one_is_told_and_the_next_one_says_how_many_there_were() {
        let mut complaints = Complaints::default();
        let first = Instant::now();
        assert_eq!(complaints.next(first), Some(0));
        assert_eq!(complaints.next(first), None);
        assert_eq!(complaints.next(first), None);
        assert_eq!(complaints.next(first + COMPLAINT_PAUSE), Some(2));
        assert_eq!(complaints.next(first + COMPLAINT_PAUSE * 2), Some(0));
    }
}
