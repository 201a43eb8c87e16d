//! What the API may ask of a machine whose volumes are on their way, read from its pager.
//!
//! None of it waits for a chunk or touches guest memory: arrivals are atomics, and the lock behind a stall is held for
//! look-ups alone.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::time::Duration;

use runnel_snapshot::pager::{MemoryPager, Stall};
use runnel_snapshot::source::{ChunkId, SourceVolume, VolumeId};
use runnel_snapshot::units::ChunkIndex;
use rustix::io::Errno;

use crate::control::{Paging, Residency, Stalled, Waits};

impl Paging for MemoryPager {
    fn stalled(&self) -> Option<Stalled> {
        let stall = stall_of(self)?;
        Some(Stalled {
            volume: stall.volume,
            chunk: stall.chunk,
            reason: stall.reason,
            waiting_ms: u64::try_from(stall.waiting.as_millis()).unwrap_or(u64::MAX),
            needs_repair: stall.needs_repair,
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

/// Why the machine is stalled, if it is, with a reason that does not name the chunk again, and that says where there is
/// no room if that is why.
pub(super) fn stall_of(pager: &MemoryPager) -> Option<Stall> {
    let stall = pager.stall()?;
    let fetcher = pager.fetcher();
    let folder = || {
        let (id, _) = fetcher.volume_named(&stall.volume)?;
        folder_of(&fetcher.source().page_file(id))
    };
    let reason = reason_of(&stall, folder);
    Some(Stall { reason, ..stall })
}

fn reason_of(stall: &Stall, folder: impl FnOnce() -> Option<PathBuf>) -> String {
    let named = format!("{} of {}: ", stall.chunk, stall.volume);
    let reason = stall.reason.strip_prefix(&named).unwrap_or(&stall.reason);
    // A source is another crate's or process's, and has nothing but text to say.
    let no_room = [Errno::NOSPC, Errno::DQUOT].map(|errno| io::Error::from(errno).to_string());
    let folder = no_room.iter().any(|text| reason.ends_with(text)).then(folder);
    match folder.flatten() {
        Some(folder) => format!("{reason}: make room in {}", folder.display()),
        None => reason.to_owned(),
    }
}

/// Where a page file lies, which may have no name; `None` for one in memory.
fn folder_of(file: &File) -> Option<PathBuf> {
    let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
    let folder = path.parent()?.to_owned();
    (!path.to_string_lossy().starts_with("/memfd:")).then_some(folder)
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
    fn a_stall_names_its_chunk_once_and_the_folder_that_is_full() {
        let stall = |reason: &str| Stall {
            volume: VolumeName::Memory,
            chunk: ChunkIndex(7),
            reason: reason.to_owned(),
            waiting: Duration::ZERO,
            chunks_waited_for: 1,
            holds_guest: true,
            needs_repair: false,
        };
        let folder = tempfile::tempdir().unwrap();
        let file = tempfile::tempfile_in(folder.path()).unwrap();
        let full =
            "chunk 7 of memory: the page file cannot be written: No space left on device (os error 28)";
        assert_eq!(
            reason_of(&stall(full), || folder_of(&file)),
            format!(
                "the page file cannot be written: No space left on device (os error 28): make room in {}",
                folder.path().display()
            )
        );
        let unknown = || panic!("nobody asks where it is");
        assert_eq!(
            reason_of(&stall("chunk 8 of memory: away"), unknown),
            "chunk 8 of memory: away"
        );
    }

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
