//! The line between compressors and writer: pieces are taken in order, finished in any, and leave in order.
//!
//! It is bounded: who is too far ahead of the writer waits. A failure, from either side, ends it for everybody.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// A piece in line: taken, and perhaps finished.
struct State<P, T, E> {
    /// Hands out the next piece.
    pieces: P,
    /// Finished pieces by their distance from the next to leave; `None` is still being worked on.
    places: VecDeque<Option<T>>,
    /// The number of the piece at the front.
    front: u64,
    /// There are no more pieces to take.
    exhausted: bool,
    /// Nobody goes on. Holds what happened until the writer picks it up.
    stopped: bool,
    failure: Option<E>,
}

/// See the module.
pub(super) struct Line<P, T, E> {
    state: Mutex<State<P, T, E>>,
    places_max: usize,
    /// For compressors: there is room, or it is over.
    room: Condvar,
    /// For the writer: the front is finished, or it is over.
    finished: Condvar,
}

/// The number of a piece that was taken, in order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place(u64);

impl<P, T, E> Line<P, T, E> {
    /// A line of at most `places_max` pieces.
    pub(super) fn new(pieces: P, places_max: usize) -> Self {
        let state = State {
            pieces,
            places: VecDeque::with_capacity(places_max),
            front: 0,
            exhausted: false,
            stopped: false,
            failure: None,
        };
        Self {
            state: Mutex::new(state),
            places_max,
            room: Condvar::new(),
            finished: Condvar::new(),
        }
    }

    /// Waits for room and takes the next piece; `None` when there is none any more or it is over.
    pub(super) fn take<W>(&self, next: impl FnOnce(&mut P) -> Result<Option<W>, E>) -> Option<(Place, W)> {
        let mut state = self.lock();
        while state.places.len() >= self.places_max && !state.stopped {
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.stopped || state.exhausted {
            return None;
        }
        match next(&mut state.pieces) {
            Ok(Some(piece)) => {
                let place = Place(state.front + state.places.len() as u64);
                state.places.push_back(None);
                Some((place, piece))
            }
            Ok(None) => {
                state.exhausted = true;
                self.finished.notify_all();
                self.room.notify_all();
                None
            }
            Err(error) => {
                self.stop(state, Some(error));
                None
            }
        }
    }

    /// Puts a finished piece into its place.
    pub(super) fn put(&self, place: Place, piece: T) {
        let mut state = self.lock();
        let distance = (place.0 - state.front) as usize;
        if let Some(slot) = state.places.get_mut(distance) {
            *slot = Some(piece);
        }
        if distance == 0 {
            self.finished.notify_all();
        }
    }

    /// Ends it for everybody, with the first failure.
    pub(super) fn fail(&self, error: E) {
        self.stop(self.lock(), Some(error));
    }

    /// Ends it for everybody without a reason of its own.
    pub(super) fn abandon(&self) {
        self.stop(self.lock(), None);
    }

    /// Waits for the next piece in order. `Ok(None)` after the last, or when somebody abandoned the line.
    ///
    /// # Errors
    /// The first failure.
    pub(super) fn leave(&self) -> Result<Option<T>, E> {
        let mut state = self.lock();
        loop {
            if let Some(error) = state.failure.take() {
                return Err(error);
            }
            if state.stopped {
                return Ok(None);
            }
            let exhausted = state.exhausted;
            match state.places.front_mut() {
                Some(front) => {
                    if let Some(piece) = front.take() {
                        state.places.pop_front();
                        state.front += 1;
                        self.room.notify_one();
                        return Ok(Some(piece));
                    }
                }
                None if exhausted => return Ok(None),
                None => {}
            }
            state = self.finished.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn stop(&self, mut state: MutexGuard<'_, State<P, T, E>>, error: Option<E>) {
        if !state.stopped {
            state.stopped = true;
            state.failure = error;
        }
        self.room.notify_all();
        self.finished.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State<P, T, E>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;

    type Numbers = Line<Range<u32>, u32, &'static str>;

    fn take(line: &Numbers) -> Option<(Place, u32)> {
        line.take(|numbers| Ok(numbers.next()))
    }

    #[test]
    fn pieces_leave_in_the_order_in_which_they_were_taken() {
        let line: Numbers = Line::new(0..3, 8);
        let taken: Vec<_> = (0..3).map(|_| take(&line).unwrap()).collect();
        for (place, piece) in taken.into_iter().rev() {
            line.put(place, piece);
        }
        assert!(take(&line).is_none());
        let left: Vec<u32> = std::iter::from_fn(|| line.leave().unwrap()).collect();
        assert_eq!(left, [0, 1, 2]);
    }

    #[test]
    fn workers_and_writer_meet_through_a_line_shorter_than_the_work() {
        let line: Numbers = Line::new(0..10_000, 3);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while let Some((place, piece)) = take(&line) {
                        line.put(place, piece);
                    }
                });
            }
            let left: Vec<u32> = std::iter::from_fn(|| line.leave().unwrap()).collect();
            assert!(left.into_iter().eq(0..10_000));
        });
    }

    #[test]
    fn a_failure_reaches_the_writer_and_frees_everybody() {
        let line: Numbers = Line::new(0..100, 1);
        std::thread::scope(|scope| {
            let (first, _) = take(&line).unwrap();
            // Waits for room that never comes.
            let waiting = scope.spawn(|| take(&line).is_none());
            line.fail("no space");
            line.fail("another");
            assert!(waiting.join().unwrap());
            line.put(first, 0);
            assert_eq!(line.leave(), Err("no space"));
            assert_eq!(line.leave(), Ok(None));
        });
    }
}
