//! What the API may ask of a machine whose volumes are on their way, read from its pager.
//!
//! None of it waits for a chunk or touches guest memory: arrivals are atomics, and the lock behind a stall is held for
//! look-ups alone.

use std::time::Duration;

use runnel_snapshot::pager::MemoryPager;
use runnel_snapshot::source::{ChunkId, SourceVolume, VolumeId};
use runnel_snapshot::units::ChunkIndex;

use crate::control::{Paging, Residency, Stalled, Waits};

impl Paging for MemoryPager {
    fn stalled(&self) -> Option<Stalled> {
        let stall = self.stall()?;
        Some(Stalled {
            volume: stall.volume,
            chunk: stall.chunk,
            reason: stall.reason,
            waiting_ms: u64::try_from(stall.waiting.as_millis()).unwrap_or(u64::MAX),
        })
    }

    fn residency(&self) -> Vec<Residency> {
        let fetcher = self.fetcher();
        let has_arrived = |id| fetcher.state(id).is_some();
        (0..)
            .zip(fetcher.source().volumes())
            .map(|(id, volume)| residency(VolumeId(id), volume, has_arrived))
            .collect()
    }

    fn waits(&self) -> Waits {
        let waits = self.fetcher().waits();
        Waits {
            count: waits.count,
            p50_us: micros(waits.p50),
            p99_us: micros(waits.p99),
            longest_us: micros(waits.longest),
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Counts the chunks that have arrived: one load each, a millisecond for the largest machine.
fn residency(id: VolumeId, volume: &SourceVolume, has_arrived: impl Fn(ChunkId) -> bool) -> Residency {
    let chunks = (0..volume.chunk_size.chunks_in(volume.bytes)).map(ChunkIndex);
    let arrived = chunks.filter(|chunk| {
        has_arrived(ChunkId {
            volume: id,
            chunk: *chunk,
        })
    });
    Residency {
        volume: volume.name.clone(),
        bytes_resident: arrived.map(|chunk| volume.range_of(chunk).len).sum(),
        bytes_total: volume.bytes,
    }
}

#[cfg(test)]
mod tests {
    use runnel_snapshot::units::ChunkSize;
    use runnel_snapshot::volume::VolumeName;

    use super::*;

    #[test]
    fn what_has_arrived_is_counted_in_bytes_and_the_last_chunk_is_short() {
        let volume = SourceVolume {
            name: VolumeName::Memory,
            bytes: 2 * ChunkSize::DEFAULT.bytes() + 4096,
            chunk_size: ChunkSize::DEFAULT,
        };
        let arrived = |chunks: &'static [u64]| {
            residency(VolumeId(3), &volume, |id| {
                id.volume == VolumeId(3) && chunks.contains(&id.chunk.0)
            })
            .bytes_resident
        };
        assert_eq!(arrived(&[]), 0);
        assert_eq!(arrived(&[0]), ChunkSize::DEFAULT.bytes());
        assert_eq!(arrived(&[2]), 4096);
        assert_eq!(arrived(&[0, 1, 2]), volume.bytes);
    }
}
