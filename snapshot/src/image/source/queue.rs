//! Which chunks come next: by urgency, then in the order of asking; each chunk once, however often it is asked for.
//!
//! Those who wait get a worker for each chunk. What was recorded goes in its order, several chunks at once, to some of
//! the workers alone: there are always others for who waits. Prefetch comes after it, joined to runs of neighbours where
//! there are more chunks than workers. Background fill has fillers of its own and goes in long runs, to a rate if there
//! is one. While somebody waits or something recorded does, and for a moment after, all fillers but one stand back: link
//! and processors are then needed by what the machine asks for, one chunk after the other.

use std::collections::{HashMap, VecDeque};
use std::num::NonZeroU64;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::source::{ChunkId, Urgency};
use crate::units::ChunkIndex;

const LEVELS: usize = Urgency::Demand as usize + 1;

/// Entries of a level's line that no longer count, before they are thrown out.
const STALE_MAX: usize = 1024;

/// How long after a demand fillers stand back. A machine that has just been resumed asks for the next chunk within
/// milliseconds of the last one; one that has what it needs does not.
const STAND_BACK: Duration = Duration::from_millis(100);

/// How long somebody who waits for chunks keeps what the last ones needed.
pub(super) const REST_AFTER: Duration = Duration::from_secs(1);

/// Recorded chunks that are handed out together, if there are as many: a request for each would take longer than the
/// bytes of some more.
const RECORDED_RUN_MIN: usize = 4;

/// How often fill looks whether there is room for it again.
const ROOM_LOOK: Duration = Duration::from_secs(1);

/// How chunks are handed out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// Chunks that are handed out together; at least one.
    pub(super) run_max: usize,
    /// Of those that were recorded; at least one.
    pub(super) recorded_run_max: usize,
    /// Workers that have recorded chunks in hand at once; at least one.
    pub(super) recorded_hands_max: usize,
    /// Stored bytes of background fill a second.
    pub(super) fill_bytes_per_second: Option<NonZeroU64>,
}

/// Chunks of one volume for one worker: such that follow each other, in the volume or in what was recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// At least one.
    pub(super) chunks: Vec<ChunkId>,
    /// How urgent the first is.
    pub(super) urgency: Urgency,
}

/// Who takes chunks in hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hand {
    /// A worker, for what somebody waits for, now or soon.
    Worker,
    /// The filler of this number. The first never stands back, so that the fill comes to its end.
    Filler(usize),
}

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
    /// Workers that wait for chunks.
    idle: usize,
    /// Workers that have recorded chunks in hand.
    recorded_hands: usize,
    /// What the fill's rate has been used up to.
    fill_not_before: Option<Instant>,
    /// Until when fillers stand back.
    hurried_until: Option<Instant>,
    closed: bool,
}

/// The queue between those who ask and those who fetch.
pub(super) struct AskQueue {
    rules: Rules,
    lines: Mutex<Lines>,
    /// Wakes workers.
    asked: Condvar,
    /// Wakes fillers.
    to_fill: Condvar,
}

impl AskQueue {
    pub(super) fn new(rules: Rules) -> Self {
        Self {
            rules: Rules {
                run_max: rules.run_max.max(1),
                recorded_run_max: rules.recorded_run_max.max(1),
                recorded_hands_max: rules.recorded_hands_max.max(1),
                ..rules
            },
            lines: Mutex::default(),
            asked: Condvar::new(),
            to_fill: Condvar::new(),
        }
    }

    /// Adds chunks, or lifts those that wait already.
    pub(super) fn ask(&self, chunks: &[ChunkId], urgency: Urgency) {
        let mut lines = self.lock();
        let mut added = 0;
        for &chunk in chunks {
            match lines.pending.get(&chunk) {
                Some(Pending::InHand) => continue,
                Some(Pending::Waiting(already)) if *already >= urgency => continue,
                _ => {}
            }
            lines.pending.insert(chunk, Pending::Waiting(urgency));
            lines.lines[urgency as usize].push_back(chunk);
            added += 1;
        }
        if urgency >= Urgency::Recorded {
            lines.hurry(Instant::now());
        }
        lines.throw_out_stale();
        let woken = added.min(lines.idle);
        drop(lines);
        if urgency == Urgency::Fill {
            if added > 0 {
                self.to_fill.notify_all(); // they are few
            }
            return;
        }
        for _ in 0..woken {
            self.asked.notify_one();
        }
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
        drop(lines);
        // Prefetch may have waited for what was recorded.
        self.asked.notify_all();
    }

    /// Waits for chunks and takes them in hand; `None` once the queue is closed. Fill waits for room too, as
    /// `has_room_to_fill` says: who waits for what it would bring asks for it, and a worker takes it then. If none come
    /// for [`REST_AFTER`], calls `rest` before it waits on.
    pub(super) fn take(
        &self,
        hand: Hand,
        has_room_to_fill: impl Fn() -> bool,
        mut rest: impl FnMut(),
    ) -> Option<Run> {
        let mut lines = self.lock();
        let mut rests_at = Some(Instant::now() + REST_AFTER);
        loop {
            if lines.closed {
                return None;
            }
            let now = Instant::now();
            let is_held = hand != Hand::Worker && lines.has_fill() && !has_room_to_fill();
            let next = match hand {
                Hand::Worker => lines.next(&self.rules),
                Hand::Filler(_) if is_held => None,
                Hand::Filler(number) => lines.next_fill(&self.rules, number, now),
            };
            if let Some(run) = next {
                if run.urgency == Urgency::Recorded {
                    lines.recorded_hands += 1;
                    if !lines.has_recorded() {
                        // Others may go on with what has waited for that.
                        self.asked.notify_all();
                    }
                }
                return Some(run);
            }
            if rests_at.is_some_and(|moment| moment <= now) {
                rests_at = None;
                drop(lines);
                rest();
                lines = self.lock();
                continue;
            }
            let until_rest = rests_at.map(|moment| moment - now);
            lines = match hand {
                Hand::Worker => {
                    lines.idle += 1;
                    let mut lines = wait(&self.asked, lines, until_rest);
                    lines.idle -= 1;
                    lines
                }
                Hand::Filler(number) => {
                    let comes = lines.fill_comes(number, now);
                    let looks = is_held.then_some(ROOM_LOOK);
                    let pause = comes.into_iter().chain(until_rest).chain(looks).min();
                    wait(&self.to_fill, lines, pause)
                }
            };
        }
    }

    /// The chunk that was in hand is about to be answered.
    pub(super) fn done(&self, chunk: ChunkId) {
        self.lock().pending.remove(&chunk);
    }

    /// All chunks of a run were answered; they took so many stored bytes.
    pub(super) fn finished(&self, urgency: Urgency, stored_bytes: u64) {
        let mut lines = self.lock();
        let now = Instant::now();
        match (urgency, self.rules.fill_bytes_per_second) {
            (Urgency::Demand, _) => lines.hurry(now),
            (Urgency::Recorded, _) => {
                lines.recorded_hands = lines.recorded_hands.saturating_sub(1);
                lines.hurry(now);
            }
            (Urgency::Fill, Some(rate)) => {
                let begins = lines.fill_not_before.map_or(now, |used_up| used_up.max(now));
                let nanoseconds = u128::from(stored_bytes) * 1_000_000_000 / u128::from(rate.get());
                let took = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
                lines.fill_not_before = begins.checked_add(took).or(Some(begins));
            }
            _ => {}
        }
    }

    /// Sends everybody home; what waits is not answered.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.asked.notify_all();
        self.to_fill.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits to be told, or for so long if that is said.
fn wait<'l>(told: &Condvar, lines: MutexGuard<'l, Lines>, pause: Option<Duration>) -> MutexGuard<'l, Lines> {
    match pause {
        Some(pause) => {
            let waited = told.wait_timeout(lines, pause);
            waited.unwrap_or_else(PoisonError::into_inner).0
        }
        None => told.wait(lines).unwrap_or_else(PoisonError::into_inner),
    }
}

impl Lines {
    fn next(&mut self, rules: &Rules) -> Option<Run> {
        if let Some(first) = self.pop(Urgency::Demand) {
            return Some(self.run_of(first, Urgency::Demand, 1));
        }
        if self.has_recorded() {
            return self.next_recorded(rules);
        }
        let first = self.pop(Urgency::Soon)?;
        // This one, and a fair part of what waits: the other idle workers take theirs.
        let fair = self.lines[Urgency::Soon as usize].len() / (self.idle + 1) + 1;
        Some(self.run_of(first, Urgency::Soon, fair.min(rules.run_max)))
    }

    /// Recorded chunks in their order, as long as they are of one volume.
    fn next_recorded(&mut self, rules: &Rules) -> Option<Run> {
        if self.recorded_hands >= rules.recorded_hands_max {
            return None;
        }
        let line = &self.lines[Urgency::Recorded as usize];
        let fair = line
            .len()
            .div_ceil(rules.recorded_hands_max)
            .max(RECORDED_RUN_MIN);
        let chunks_max = fair.min(rules.recorded_run_max);
        let mut chunks: Vec<ChunkId> = Vec::with_capacity(chunks_max);
        while chunks.len() < chunks_max
            && let Some(next) = self.pop(Urgency::Recorded)
        {
            if chunks.first().is_some_and(|first| first.volume != next.volume) {
                self.lines[Urgency::Recorded as usize].push_front(next);
                break;
            }
            self.pending.insert(next, Pending::InHand);
            chunks.push(next);
        }
        (!chunks.is_empty()).then_some(Run {
            chunks,
            urgency: Urgency::Recorded,
        })
    }

    /// Whether recorded chunks wait.
    fn has_recorded(&mut self) -> bool {
        let Some(first) = self.pop(Urgency::Recorded) else {
            return false;
        };
        self.lines[Urgency::Recorded as usize].push_front(first);
        true
    }

    fn next_fill(&mut self, rules: &Rules, number: usize, now: Instant) -> Option<Run> {
        if self
            .fill_may_not_before(number)
            .is_some_and(|moment| moment > now)
        {
            return None;
        }
        let first = self.pop(Urgency::Fill)?;
        Some(self.run_of(first, Urgency::Fill, rules.run_max))
    }

    fn pop(&mut self, urgency: Urgency) -> Option<ChunkId> {
        while let Some(chunk) = self.lines[urgency as usize].pop_front() {
            if self.pending.get(&chunk) == Some(&Pending::Waiting(urgency)) {
                return Some(chunk);
            }
        }
        None
    }

    /// Takes `first` in hand, and what follows it in the volume as far as that waits with the same urgency.
    fn run_of(&mut self, first: ChunkId, urgency: Urgency, chunks_max: usize) -> Run {
        let mut chunks = Vec::with_capacity(chunks_max);
        let mut next = Some(first);
        while let Some(chunk) = next.filter(|_| chunks.len() < chunks_max) {
            if self.pending.get(&chunk) != Some(&Pending::Waiting(urgency)) {
                break;
            }
            self.pending.insert(chunk, Pending::InHand);
            chunks.push(chunk);
            next = chunk.chunk.0.checked_add(1).map(|number| ChunkId {
                chunk: ChunkIndex(number),
                ..chunk
            });
        }
        Run { chunks, urgency }
    }

    /// Somebody waits for a chunk, or did until now.
    fn hurry(&mut self, now: Instant) {
        self.hurried_until = now.checked_add(STAND_BACK);
    }

    /// When this filler may go on, as far as it is kept from it.
    fn fill_may_not_before(&self, number: usize) -> Option<Instant> {
        let stands_back = self.hurried_until.filter(|_| number > 0);
        self.fill_not_before.max(stands_back)
    }

    /// In how long this filler may go on, if there is something to do for it.
    fn fill_comes(&self, number: usize, now: Instant) -> Option<Duration> {
        let pause = self.fill_may_not_before(number)?.checked_duration_since(now)?;
        self.has_fill().then_some(pause)
    }

    fn has_fill(&self) -> bool {
        !self.lines[Urgency::Fill as usize].is_empty()
    }

    /// Keeps the lines about as long as what waits, whatever is asked and cancelled.
    fn throw_out_stale(&mut self) {
        let Self { pending, lines, .. } = self;
        for (line, urgency) in
            lines
                .iter_mut()
                .zip([Urgency::Fill, Urgency::Soon, Urgency::Recorded, Urgency::Demand])
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

    const RULES: Rules = Rules {
        run_max: 1,
        recorded_run_max: 1,
        recorded_hands_max: 1,
        fill_bytes_per_second: None,
    };

    fn chunk(number: u64) -> ChunkId {
        ChunkId {
            volume: VolumeId(0),
            chunk: ChunkIndex(number),
        }
    }

    fn numbers(run: &Run) -> Vec<u64> {
        run.chunks.iter().map(|id| id.chunk.0).collect()
    }

    /// What comes out, run by run, until nothing does.
    fn drain(queue: &AskQueue) -> Vec<u64> {
        let mut found = Vec::new();
        while let Some(run) = next(queue).or_else(|| next_fill(queue, 0)) {
            found.extend(numbers(&run));
        }
        found
    }

    fn next(queue: &AskQueue) -> Option<Run> {
        queue.lock().next(&queue.rules)
    }

    fn next_fill(queue: &AskQueue, number: usize) -> Option<Run> {
        queue.lock().next_fill(&queue.rules, number, Instant::now())
    }

    #[test]
    fn the_more_urgent_overtakes_and_equals_keep_their_order() {
        let queue = AskQueue::new(RULES);
        queue.ask(&[chunk(1), chunk(2)], Urgency::Fill);
        queue.ask(&[chunk(3)], Urgency::Soon);
        queue.ask(&[chunk(4), chunk(5)], Urgency::Demand);
        assert_eq!(drain(&queue), [4, 5, 3, 1, 2]);
    }

    #[test]
    fn asking_again_lifts_but_never_lowers_and_never_doubles() {
        let queue = AskQueue::new(RULES);
        queue.ask(&[chunk(1), chunk(2), chunk(3)], Urgency::Fill);
        queue.ask(&[chunk(3)], Urgency::Demand);
        queue.ask(&[chunk(3), chunk(3)], Urgency::Fill);
        assert_eq!(
            queue.take(Hand::Worker, || true, || ()).unwrap().chunks,
            [chunk(3)]
        );
        // In hand: it will be answered.
        queue.ask(&[chunk(3)], Urgency::Demand);
        assert_eq!(drain(&queue), [1, 2]);
        // Answered: it is asked for anew.
        queue.done(chunk(3));
        queue.ask(&[chunk(3)], Urgency::Soon);
        assert_eq!(drain(&queue), [3]);
    }

    #[test]
    fn what_is_cancelled_does_not_come_and_may_be_asked_for_again() {
        let queue = AskQueue::new(RULES);
        queue.ask(&[chunk(1), chunk(2)], Urgency::Soon);
        queue.cancel(&[chunk(1), chunk(9)]);
        assert_eq!(drain(&queue), [2]);
        queue.cancel(&[chunk(2)]);
        queue.ask(&[chunk(1), chunk(2)], Urgency::Soon);
        assert_eq!(drain(&queue), [1], "chunk 2 is in hand still");
    }

    #[test]
    fn fill_goes_in_runs_of_neighbours_and_leaves_workers_to_others() {
        let queue = AskQueue::new(Rules { run_max: 3, ..RULES });
        let other_volume = ChunkId {
            volume: VolumeId(1),
            chunk: ChunkIndex(5),
        };
        queue.ask(&[1, 2, 3, 4, 6, 7].map(chunk), Urgency::Fill);
        queue.ask(&[other_volume], Urgency::Fill);
        queue.ask(&[chunk(7)], Urgency::Demand);
        assert_eq!(numbers(&next(&queue).unwrap()), [7]);
        assert_eq!(next(&queue), None, "workers do not fill");
        assert_eq!(
            numbers(&next_fill(&queue, 0).unwrap()),
            [1, 2, 3],
            "as long as may be"
        );
        assert_eq!(
            numbers(&next_fill(&queue, 0).unwrap()),
            [4],
            "chunk 5 of another volume is no neighbour"
        );
        assert_eq!(numbers(&next_fill(&queue, 0).unwrap()), [6], "chunk 7 is in hand");
    }

    #[test]
    fn all_fillers_but_one_stand_back_while_somebody_waits() {
        let queue = AskQueue::new(RULES);
        queue.ask(&[1, 2, 3].map(chunk), Urgency::Fill);
        queue.ask(&[chunk(9)], Urgency::Demand);
        assert_eq!(next_fill(&queue, 1), None);
        assert_eq!(numbers(&next_fill(&queue, 0).unwrap()), [1]);
        let mut lines = queue.lock();
        let now = Instant::now();
        assert!(lines.fill_comes(1, now).unwrap() <= STAND_BACK);
        assert_eq!(lines.fill_comes(0, now), None, "nothing keeps it");
        let later = now + STAND_BACK;
        assert_eq!(numbers(&lines.next_fill(&RULES, 1, later).unwrap()), [2]);
        drop(lines);
        queue.finished(Urgency::Demand, 1);
        assert_eq!(next_fill(&queue, 1), None, "the next demand follows soon");
    }

    #[test]
    fn prefetch_is_spread_over_idle_workers_before_it_is_joined() {
        let queue = AskQueue::new(Rules { run_max: 8, ..RULES });
        queue.lock().idle = 3;
        queue.ask(&[1, 2, 3, 4].map(chunk), Urgency::Soon);
        assert_eq!(numbers(&next(&queue).unwrap()), [1]);
        queue.lock().idle = 0;
        assert_eq!(numbers(&next(&queue).unwrap()), [2, 3, 4]);
    }

    #[test]
    fn what_was_recorded_goes_in_its_order_before_prefetch_and_leaves_hands_to_who_waits() {
        let queue = AskQueue::new(Rules {
            run_max: 8,
            recorded_run_max: 3,
            recorded_hands_max: 2,
            ..RULES
        });
        let other = ChunkId {
            volume: VolumeId(1),
            chunk: ChunkIndex(5),
        };
        queue.ask(&[40, 41].map(chunk), Urgency::Soon);
        queue.ask(&[30, 9, 10, 2, 7].map(chunk), Urgency::Recorded);
        queue.ask(&[other, chunk(1)], Urgency::Recorded);
        queue.ask(&[chunk(9), chunk(40)], Urgency::Demand);
        let take = || queue.take(Hand::Worker, || true, || ()).unwrap();
        assert_eq!([take(), take()].map(|run| numbers(&run)), [[9], [40]]);
        let first = take();
        assert_eq!(
            (numbers(&first), first.urgency),
            (vec![30, 10, 2], Urgency::Recorded)
        );
        assert_eq!(numbers(&take()), [7], "the next is of another volume");
        assert_eq!(next(&queue), None, "two hands are enough, and prefetch waits");
        queue.ask(&[chunk(50)], Urgency::Demand);
        assert_eq!(numbers(&take()), [50]);
        queue.finished(Urgency::Recorded, 1);
        assert_eq!(take().chunks, [other]);
        queue.finished(Urgency::Recorded, 1);
        assert_eq!(numbers(&take()), [1]);
        assert_eq!(numbers(&take()), [41], "prefetch, when nothing recorded waits");
    }

    #[test]
    fn prefetch_goes_on_when_what_was_recorded_is_cancelled() {
        let queue = AskQueue::new(RULES);
        queue.ask(&[1, 2].map(chunk), Urgency::Recorded);
        queue.ask(&[chunk(3)], Urgency::Soon);
        assert_eq!(numbers(&queue.take(Hand::Worker, || true, || ()).unwrap()), [1]);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| queue.take(Hand::Worker, || true, || ()));
            queue.cancel(&[chunk(2)]);
            assert_eq!(numbers(&waiting.join().unwrap().unwrap()), [3]);
        });
    }

    #[test]
    fn fill_keeps_to_its_rate_and_others_do_not() {
        let rate = NonZeroU64::new(1000);
        let queue = AskQueue::new(Rules {
            fill_bytes_per_second: rate,
            ..RULES
        });
        queue.ask(&[1, 2].map(chunk), Urgency::Fill);
        assert_eq!(numbers(&next_fill(&queue, 0).unwrap()), [1]);
        queue.finished(Urgency::Fill, 1_000_000);
        let mut lines = queue.lock();
        let now = Instant::now();
        let pause = lines.fill_comes(0, now).unwrap();
        assert!(pause > Duration::from_secs(900) && pause <= Duration::from_secs(1000));
        assert_eq!(lines.next_fill(&RULES, 0, now), None);
        let later = now + Duration::from_secs(1000);
        assert_eq!(numbers(&lines.next_fill(&RULES, 0, later).unwrap()), [2]);
        drop(lines);
        queue.ask(&[chunk(3)], Urgency::Demand);
        assert_eq!(numbers(&queue.take(Hand::Worker, || true, || ()).unwrap()), [3]);
    }

    #[test]
    fn asking_and_cancelling_for_ever_takes_no_memory() {
        let queue = AskQueue::new(RULES);
        for _ in 0..10 * STALE_MAX {
            queue.ask(&[chunk(1)], Urgency::Soon);
            queue.cancel(&[chunk(1)]);
        }
        assert!(queue.lock().lines[Urgency::Soon as usize].len() <= STALE_MAX + 2);
    }

    #[test]
    fn who_waits_for_long_rests_once_and_takes_what_comes() {
        let queue = AskQueue::new(RULES);
        for (hand, urgency) in [(Hand::Worker, Urgency::Demand), (Hand::Filler(0), Urgency::Fill)] {
            let mut rests = 0;
            let has_room = || true;
            let run = queue.take(hand, has_room, || {
                rests += 1;
                queue.ask(&[chunk(1)], urgency);
            });
            assert_eq!((numbers(&run.unwrap()), rests), (vec![1], 1));
            queue.done(chunk(1));
        }
    }

    #[test]
    fn fill_for_which_there_is_no_room_waits_and_is_taken_by_a_worker_when_somebody_wants_it() {
        let queue = AskQueue::new(RULES);
        queue.ask(&[1, 2].map(chunk), Urgency::Fill);
        let has_room = || false;
        std::thread::scope(|scope| {
            let filler = scope.spawn(|| queue.take(Hand::Filler(0), has_room, || ()));
            queue.ask(&[chunk(1)], Urgency::Demand);
            assert_eq!(numbers(&queue.take(Hand::Worker, has_room, || ()).unwrap()), [1]);
            queue.close();
            assert_eq!(filler.join().unwrap(), None);
        });
    }

    #[test]
    fn closing_sends_those_home_who_wait() {
        let queue = AskQueue::new(RULES);
        std::thread::scope(|scope| {
            let waiting = [Hand::Worker, Hand::Filler(0)].map(|hand| {
                let queue = &queue;
                scope.spawn(move || queue.take(hand, || true, || ()))
            });
            queue.close();
            for waiting in waiting {
                assert_eq!(waiting.join().unwrap(), None);
            }
        });
    }
}
