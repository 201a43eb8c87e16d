//! How a fetcher behaves.

use std::time::Duration;

/// How a [`Fetcher`](super::Fetcher) behaves.
#[derive(Clone, Debug)]
pub struct FetcherSettings {
    /// Bytes of the aligned block around a demanded chunk whose chunks are asked for along with it; none if a chunk is as
    /// large. What a guest touches lies together: a resumed Debian demanded 789 chunks, without neighbours, until it
    /// served a web page; played back, that sequence leaves 336 waits with 256 KiB, and 122 with 1 MiB.
    pub neighbourhood_bytes: u64,
    /// Whether chunks that nobody asked for are fetched in the background, until the machine has them all.
    pub fill: bool,
    /// Background chunks under way at once. The source holds its rate; this only keeps its queue short.
    pub fill_window: usize,
    /// How long the fill stands where nothing can be had for good, and between two rounds.
    pub fill_pause: Duration,
    /// The first pause before asking again for a chunk that failed; doubles each time.
    pub retry_min: Duration,
    /// The longest such pause.
    pub retry_max: Duration,
    /// A demanded chunk that stays away this long stalls the machine, whether its source says why or is silent: an
    /// outage that is over sooner is a slow page. A failure that no waiting cures stalls it at once.
    pub stall_after: Duration,
}

impl FetcherSettings {
    /// For a source that is a round trip away, where waiting costs more than fetching what may not be needed soon.
    #[must_use]
    pub fn far() -> Self {
        Self {
            neighbourhood_bytes: 1 << 20,
            ..Self::default()
        }
    }
}

/// For a source at hand.
impl Default for FetcherSettings {
    fn default() -> Self {
        Self {
            neighbourhood_bytes: 256 << 10,
            fill: true,
            fill_window: 64,
            fill_pause: Duration::from_secs(60),
            retry_min: Duration::from_millis(50),
            retry_max: Duration::from_secs(2),
            stall_after: Duration::from_secs(15),
        }
    }
}
