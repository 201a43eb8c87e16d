//! Which chunks are being fetched: so that one that several images need at the same time is fetched for the first of them,
//! and copied by the others.
//!
//! Nobody depends on anybody else here. Who waits has no fetch of its own under way that another could wait for, so no two
//! wait for each other; and a fetch counts for a while only, so that an image whose server is slow or silent holds up the
//! machines of others no longer than that, all its chunks together.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use runnel_snapshot::digest::ChunkDigest;
use runnel_snapshot::image::source::{Fetch, Fetching};

/// How long a chunk is left to whoever began to fetch it: longer than a link of a few megabits takes for what is read at
/// once, and shorter than a server is given that is silent.
const COUNTS_FOR: Duration = Duration::from_secs(2);

/// The table. There are as many entries as the workers of all images have chunks in hand.
#[derive(Default)]
pub(super) struct UnderWay {
    fetches: Mutex<Fetches>,
    /// Told when one ends.
    ended: Condvar,
}

#[derive(Default)]
struct Fetches {
    by_digest: HashMap<ChunkDigest, Begun>,
    last_number: u64,
}

struct Begun {
    number: u64,
    at: Instant,
    is_fill: bool,
}

impl UnderWay {
    /// As [`HostCache::begin_fetch`](runnel_snapshot::image::source::HostCache::begin_fetch).
    pub(super) fn begin(&self, digest: &ChunkDigest, is_fill: bool) -> Fetching {
        let mut fetches = self.lock();
        // Whoever is waited for does not wait for the fill, which gives way to everybody.
        let counts = |begun: &&Begun| begun.at.elapsed() < COUNTS_FOR && (is_fill || !begun.is_fill);
        if let Some(begun) = fetches.by_digest.get(digest).filter(counts) {
            return Fetching::Others(Fetch {
                digest: *digest,
                number: begun.number,
            });
        }
        fetches.last_number += 1;
        let number = fetches.last_number;
        let begun = Begun {
            number,
            at: Instant::now(),
            is_fill,
        };
        fetches.by_digest.insert(*digest, begun);
        Fetching::Ours(Fetch {
            digest: *digest,
            number,
        })
    }

    /// A fetch has ended, one way or the other.
    pub(super) fn end(&self, fetch: &Fetch) {
        let mut fetches = self.lock();
        // It may have come to be another's.
        if fetches.has(fetch).is_some() {
            fetches.by_digest.remove(&fetch.digest);
            drop(fetches);
            self.ended.notify_all();
        }
    }

    /// Waits until a fetch has ended, or does not count any more.
    pub(super) fn wait_for(&self, fetch: &Fetch) {
        let mut fetches = self.lock();
        while let Some(begun) = fetches.has(fetch) {
            let left = COUNTS_FOR.saturating_sub(begun.at.elapsed());
            if left.is_zero() {
                return;
            }
            let waited = self.ended.wait_timeout(fetches, left);
            fetches = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Fetches> {
        self.fetches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Fetches {
    fn has(&self, fetch: &Fetch) -> Option<&Begun> {
        let begun = self.by_digest.get(&fetch.digest)?;
        (begun.number == fetch.number).then_some(begun)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours(fetching: Fetching) -> Fetch {
        match fetching {
            Fetching::Ours(fetch) => fetch,
            Fetching::Others(_) => panic!("another's"),
        }
    }

    fn others(fetching: Fetching) -> Fetch {
        match fetching {
            Fetching::Others(fetch) => fetch,
            Fetching::Ours(_) => panic!("nobody else's"),
        }
    }

    #[test]
    fn a_chunk_is_left_to_the_first_until_that_has_ended() {
        let under_way = UnderWay::default();
        let [one, two] = [b"one", b"two"].map(|plain| ChunkDigest::of(plain));
        let first = ours(under_way.begin(&one, false));
        let waited_for = others(under_way.begin(&one, false));
        let second = ours(under_way.begin(&two, false));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| under_way.wait_for(&waited_for));
            under_way.end(&second);
            under_way.end(&first);
            waits.join().unwrap();
        });
        // It is not waited for again, whoever has it now.
        let next = ours(under_way.begin(&one, false));
        under_way.wait_for(&waited_for);
        under_way.end(&first);
        others(under_way.begin(&one, false));
        under_way.end(&next);
        assert!(under_way.lock().by_digest.is_empty());
    }

    #[test]
    fn the_fill_is_left_to_all_and_nothing_is_left_to_the_fill_but_fill() {
        let under_way = UnderWay::default();
        let digest = ChunkDigest::of(b"chunk");
        let fill = ours(under_way.begin(&digest, true));
        others(under_way.begin(&digest, true));
        let demand = ours(under_way.begin(&digest, false));
        under_way.end(&fill);
        others(under_way.begin(&digest, true));
        under_way.end(&demand);
        ours(under_way.begin(&digest, true));
    }

    #[test]
    fn one_that_never_ends_is_not_waited_for_without_end() {
        let under_way = UnderWay::default();
        let digest = ChunkDigest::of(b"chunk");
        let silent = ours(under_way.begin(&digest, false));
        under_way.wait_for(&others(under_way.begin(&digest, false)));
        let next = ours(under_way.begin(&digest, false));
        under_way.end(&silent);
        others(under_way.begin(&digest, false));
        under_way.end(&next);
    }
}
