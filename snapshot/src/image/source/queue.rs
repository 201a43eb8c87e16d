//! Which chunk comes next: by urgency, then in the order of asking; each chunk once, however often it is asked for.

use std::collections::{HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::source::{ChunkId, Urgency};

const LEVELS: usize = Urgency::Demand as usize + 1;

/// Entries of a level's line that no longer count, before they are thrown out.
const STALE_MAX: usize = 1024;

/// What is known of a chunk that was asked for and not answered. There is at most one of these for each chunk of the
/// volumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pending {
    Waiting(Urgency),
    InHand,
}

#[derive(Default)]
struct Lines {
    pending: HashMap<ChunkId, Pending>,
    /// One for each urgency. An entry counts only while `pending` has it waiting at that urgency: lifting and
    /// cancelling leave stale ones behind.
    lines: [VecDeque<ChunkId>; LEVELS],
    closed: bool,
}

/// The queue between those who ask and the workers.
#[derive(Default)]
pub(super) struct AskQueue {
    lines: Mutex<Lines>,
    asked: Condvar,
}

impl AskQueue {
    /// Adds chunks, or lifts those that wait already.
    pub(super) fn ask(&self, chunks: &[ChunkId], urgency: Urgency) {
        let mut lines = self.lock();
        for &chunk in chunks {
            match lines.pending.get(&chunk) {
                Some(Pending::InHand) => continue,
                Some(Pending::Waiting(already)) if *already >= urgency => continue,
                _ => {}
            }
            lines.pending.insert(chunk, Pending::Waiting(urgency));
            lines.lines[urgency as usize].push_back(chunk);
        }
        lines.throw_out_stale();
        drop(lines);
        // All: the one that would wake might be the one that keeps itself free for the urgent.
        self.asked.notify_all();
    }

    /// Forgets chunks that nobody has in hand.
    pub(super) fn cancel(&self, chunks: &[ChunkId]) {
        let mut lines = self.lock();
        for chunk in chunks {
            if matches!(lines.pending.get(chunk), Some(Pending::Waiting(_))) {
                lines.pending.remove(chunk);
            }
        }
        lines.throw_out_stale();
    }

    /// Waits for a chunk of at least that urgency and takes it in hand; `None` once the queue is closed.
    pub(super) fn take(&self, least: Urgency) -> Option<ChunkId> {
        let mut lines = self.lock();
        loop {
            if lines.closed {
                return None;
            }
            if let Some(chunk) = lines.next(least) {
                return Some(chunk);
            }
            lines = self.asked.wait(lines).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The chunk that was in hand is about to be answered.
    pub(super) fn done(&self, chunk: ChunkId) {
        self.lock().pending.remove(&chunk);
    }

    /// Sends the workers home; what waits is not answered.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.asked.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lines {
    fn next(&mut self, least: Urgency) -> Option<ChunkId> {
        for urgency in [Urgency::Demand, Urgency::Soon, Urgency::Fill] {
            if urgency < least {
                break;
            }
            while let Some(chunk) = self.lines[urgency as usize].pop_front() {
                if self.pending.get(&chunk) == Some(&Pending::Waiting(urgency)) {
                    self.pending.insert(chunk, Pending::InHand);
                    return Some(chunk);
                }
            }
        }
        None
    }

    /// Keeps the lines about as long as what waits, whatever is asked and cancelled.
    fn throw_out_stale(&mut self) {
        let Self { pending, lines, .. } = self;
        for (line, urgency) in lines
            .iter_mut()
            .zip([Urgency::Fill, Urgency::Soon, Urgency::Demand])
        {
            if line.len() > 2 * pending.len() + STALE_MAX {
                line.retain(|chunk| pending.get(chunk) == Some(&Pending::Waiting(urgency)));
            }
        }
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

    /// What comes out until nothing of at least that urgency waits.
    fn drain(queue: &AskQueue, least: Urgency) -> Vec<u64> {
        std::iter::from_fn(|| queue.lock().next(least))
            .map(|id| id.chunk.0)
            .collect()
    }

    #[test]
    fn the_more_urgent_overtakes_and_equals_keep_their_order() {
        let queue = AskQueue::default();
        queue.ask(&[chunk(1), chunk(2)], Urgency::Fill);
        queue.ask(&[chunk(3)], Urgency::Soon);
        queue.ask(&[chunk(4), chunk(5)], Urgency::Demand);
        assert_eq!(drain(&queue, Urgency::Soon), [4, 5, 3]);
        assert_eq!(drain(&queue, Urgency::Fill), [1, 2]);
    }

    #[test]
    fn asking_again_lifts_but_never_lowers_and_never_doubles() {
        let queue = AskQueue::default();
        queue.ask(&[chunk(1), chunk(2), chunk(3)], Urgency::Fill);
        queue.ask(&[chunk(3)], Urgency::Demand);
        queue.ask(&[chunk(3), chunk(3)], Urgency::Fill);
        assert_eq!(queue.take(Urgency::Demand), Some(chunk(3)));
        // In hand: it will be answered.
        queue.ask(&[chunk(3)], Urgency::Demand);
        assert_eq!(drain(&queue, Urgency::Fill), [1, 2]);
        // Answered: it is asked for anew.
        queue.done(chunk(3));
        queue.ask(&[chunk(3)], Urgency::Soon);
        assert_eq!(drain(&queue, Urgency::Fill), [3]);
    }

    #[test]
    fn what_is_cancelled_does_not_come_and_may_be_asked_for_again() {
        let queue = AskQueue::default();
        queue.ask(&[chunk(1), chunk(2)], Urgency::Soon);
        queue.cancel(&[chunk(1), chunk(9)]);
        assert_eq!(drain(&queue, Urgency::Fill), [2]);
        queue.cancel(&[chunk(2)]);
        queue.ask(&[chunk(1), chunk(2)], Urgency::Soon);
        assert_eq!(drain(&queue, Urgency::Fill), [1], "chunk 2 is in hand still");
    }

    #[test]
    fn asking_and_cancelling_for_ever_takes_no_memory() {
        let queue = AskQueue::default();
        for _ in 0..10 * STALE_MAX {
            queue.ask(&[chunk(1)], Urgency::Soon);
            queue.cancel(&[chunk(1)]);
        }
        assert!(queue.lock().lines[Urgency::Soon as usize].len() <= STALE_MAX + 2);
    }

    #[test]
    fn closing_sends_those_home_who_wait() {
        let queue = AskQueue::default();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| queue.take(Urgency::Fill));
            queue.close();
            assert_eq!(waiting.join().unwrap(), None);
        });
    }
}
