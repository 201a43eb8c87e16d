//! What the guest writes, and the host has no room for.

use std::io;
use std::path::Path;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use super::queue::Queue;
use super::{Fetcher, Stall};
use crate::source::ChunkId;
use crate::units::ChunkIndex;

/// How often it is tried again.
const PAUSE: Duration = Duration::from_millis(200);

/// A write that waits for room.
pub(super) struct NoRoom {
    chunk: ChunkIndex,
    since: Instant,
    reason: String,
}

impl Fetcher {
    /// Has `write` keep what the guest has written to a chunk, in `folder`, again and again while there is no room: an
    /// error would be the loss of it. The machine is stalled meanwhile.
    ///
    /// # Errors
    /// Whatever else `write` says, and that there is no room when the fetcher is stopped.
    pub fn keep(
        &self,
        id: ChunkId,
        folder: &Path,
        mut write: impl FnMut() -> io::Result<()>,
    ) -> io::Result<()> {
        let mut waits = false;
        loop {
            let written = write();
            let error = match written {
                Err(error) if is_no_room(&error) => error,
                done if waits => {
                    self.work.lock().without_room.remove(&id.volume);
                    return done;
                }
                done => return done,
            };
            let mut queue = self.work.lock();
            if queue.stopping {
                queue.without_room.remove(&id.volume);
                return Err(error);
            }
            waits = true;
            queue.without_room.entry(id.volume).or_insert_with(|| NoRoom {
                chunk: id.chunk,
                since: Instant::now(),
                reason: format!(
                    "what the guest writes cannot be kept: {error}: make room in {}",
                    folder.display()
                ),
            });
            // Not for arrivals: they take room, if anything.
            let goes_on = |queue: &mut Queue| !queue.stopping;
            let waited = self.work.changed.wait_timeout_while(queue, PAUSE, goes_on);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// The oldest write for which there is no room.
    pub(super) fn stall_for_room(&self) -> Option<Stall> {
        let queue = self.work.lock();
        let oldest = queue.without_room.iter().min_by_key(|(_, write)| write.since);
        let (volume, write) = oldest?;
        Some(Stall {
            volume: self.volumes[usize::from(volume.0)].about.name.clone(),
            chunk: write.chunk,
            reason: write.reason.clone(),
            waiting: write.since.elapsed(),
            chunks_waited_for: queue.without_room.len(),
            holds_guest: true,
            needs_repair: false,
        })
    }
}

fn is_no_room(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
