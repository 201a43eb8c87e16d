//! How long demanded chunks were waited for: a histogram that costs one addition an arrival.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Bucket `n` counts waits below 2ⁿ µs that no bucket before it counts; the last one, half an hour, all longer ones.
const BUCKETS: usize = 32;

/// Waits, as they end. Whoever reads meanwhile sees some of them.
#[derive(Default)]
pub(super) struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    longest_us: AtomicU64,
}

/// What there is to say of the waits so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waits {
    /// How many have ended.
    pub count: u64,
    /// Half of them took no longer. A power of two of microseconds: an upper bound, at most twice the truth.
    pub p50: Duration,
    /// 99 of 100 took no longer; bounded in the same way.
    pub p99: Duration,
    /// The longest, exactly.
    pub longest: Duration,
}

impl Histogram {
    pub(super) fn add(&self, wait: Duration) {
        let us = u64::try_from(wait.as_micros()).unwrap_or(u64::MAX);
        let bucket = (u64::BITS - us.leading_zeros()) as usize;
        self.buckets[bucket.min(BUCKETS - 1)].fetch_add(1, Ordering::Relaxed);
        self.longest_us.fetch_max(us, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> Waits {
        let counts: Vec<u64> = self
            .buckets
            .iter()
            .map(|bucket| bucket.load(Ordering::Relaxed))
            .collect();
        let count: u64 = counts.iter().sum();
        let longest = Duration::from_micros(self.longest_us.load(Ordering::Relaxed));
        let quantile = |per_cent: u64| {
            let wanted = (count * per_cent).div_ceil(100).max(1);
            let mut seen = 0;
            let bucket = counts.iter().position(|bucket| {
                seen += bucket;
                seen >= wanted
            });
            bucket.map_or(Duration::ZERO, |bucket| {
                Duration::from_micros(1 << bucket).min(longest)
            })
        };
        Waits {
            count,
            p50: quantile(50),
            p99: quantile(99),
            longest,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_bounds_and_the_longest_is_exact() {
        let histogram = Histogram::default();
        assert_eq!(histogram.read(), Waits::default());
        for ms in 1..=100 {
            histogram.add(Duration::from_millis(ms));
        }
        let waits = histogram.read();
        assert_eq!((waits.count, waits.longest), (100, Duration::from_millis(100)));
        assert_eq!(waits.p50, Duration::from_micros(1 << 16), "50 ms is below 65.5");
        assert_eq!(
            waits.p99,
            Duration::from_millis(100),
            "below 131, and none was longer"
        );
    }

    #[test]
    fn the_shortest_and_the_longest_wait_have_a_bucket() {
        let histogram = Histogram::default();
        histogram.add(Duration::ZERO);
        assert_eq!(histogram.read().p50, Duration::ZERO);
        histogram.add(Duration::MAX);
        assert_eq!(histogram.read().count, 2);
    }
}
