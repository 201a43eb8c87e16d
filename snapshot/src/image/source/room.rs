//! Whether a page file takes what is written to it. While it does not, most often because its file system is full,
//! nothing is fetched that could not be kept; a moment later it is tried again. Those of memory and of drives lie on
//! file systems of their own: one that is full does not hold up the other.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long nothing is fetched after a write has failed.
const PAUSE: Duration = Duration::from_secs(1);

/// What became of the last writes. Few fail, and those that do not take no lock.
#[derive(Default)]
pub(super) struct Room {
    is_short: AtomicBool,
    failure: Mutex<Option<Failure>>,
}

#[derive(Clone, Copy)]
struct Failure {
    at: Instant,
    /// The system's number of the error, if it has one.
    number: Option<i32>,
    kind: io::ErrorKind,
}

impl Failure {
    fn error(self) -> io::Error {
        self.number
            .map_or_else(|| self.kind.into(), io::Error::from_raw_os_error)
    }
}

impl Room {
    /// A write was tried.
    pub(super) fn tried(&self, written: &io::Result<()>, now: Instant) {
        if written.is_ok() && !self.is_short.load(Ordering::Relaxed) {
            return;
        }
        let mut failure = self.lock();
        *failure = written.as_ref().err().map(|error| Failure {
            at: now,
            number: error.raw_os_error(),
            kind: error.kind(),
        });
        self.is_short.store(failure.is_some(), Ordering::Relaxed);
    }

    /// Fails as the last write did, if that was just now.
    pub(super) fn check(&self, now: Instant) -> io::Result<()> {
        match self.failure() {
            Some(failure) if now.saturating_duration_since(failure.at) < PAUSE => Err(failure.error()),
            _ => Ok(()),
        }
    }

    /// Why the last write failed, until one succeeds.
    pub(super) fn trouble(&self) -> Option<io::Error> {
        self.failure().map(Failure::error)
    }

    fn failure(&self) -> Option<Failure> {
        match self.is_short.load(Ordering::Relaxed) {
            true => *self.lock(),
            false => None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Failure>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_failed_write_there_is_a_pause_and_trouble_until_one_succeeds() {
        let (room, start) = (Room::default(), Instant::now());
        room.check(start).unwrap();
        room.tried(&Err(io::Error::from_raw_os_error(libc::ENOSPC)), start);
        let soon = start + PAUSE / 2;
        assert_eq!(room.check(soon).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
        room.check(start + PAUSE).unwrap();
        assert_eq!(room.trouble().unwrap().raw_os_error(), Some(libc::ENOSPC));
        room.tried(&Ok(()), start + PAUSE);
        assert!(room.trouble().is_none());
        room.check(soon).unwrap();
    }
}
