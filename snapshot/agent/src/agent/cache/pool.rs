//! How much page files of one kind take, and how much they may.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use runnel_snapshot::protocol::PoolStatus;

use crate::agent::settings::QUOTA_BYTES_MIN;

/// One part in so many of a pool stays free of what nobody waits for, and is made free at a time where there is none.
const SPARE_SHARE: u64 = 16;

/// No more than this.
const SPARE_BYTES_MAX: u64 = 256 << 20;

/// Room for page files: those of memory, or those of drives.
pub(super) struct Pool {
    folder: PathBuf,
    bytes_max: u64,
    /// About as many as there are: each write is added before it is done, and they are counted anew where that would be
    /// too many.
    bytes: AtomicU64,
    bytes_evicted: AtomicU64,
    /// Held by who takes chunks out: one at a time.
    pub(super) evicting: Mutex<()>,
}

impl Pool {
    /// Room for `bytes_max`, or for `share` (parts, of so many) of what the folder's file system has left beside
    /// `bytes`, which are there already: a file system that is full now says so, and may have room later.
    pub(super) fn new(folder: &Path, bytes_max: Option<u64>, share: (u64, u64), bytes: u64) -> Self {
        let room = || {
            available(folder).map_or(u64::MAX, |available| {
                (available.saturating_add(bytes) / share.1 * share.0).max(QUOTA_BYTES_MIN)
            })
        };
        Self {
            folder: folder.to_owned(),
            bytes_max: bytes_max.unwrap_or_else(room),
            bytes: AtomicU64::new(bytes),
            bytes_evicted: AtomicU64::new(0),
            evicting: Mutex::default(),
        }
    }

    fn spare(&self) -> u64 {
        (self.bytes_max / SPARE_SHARE).min(SPARE_BYTES_MAX)
    }

    /// So many more come; whether there is room for them as far as is known.
    pub(super) fn add(&self, more: u64) -> bool {
        self.bytes.fetch_add(more, Ordering::Relaxed).saturating_add(more) <= self.bytes_max
    }

    /// There are so many, counted just now, and `more` to come: how many to take out.
    pub(super) fn counted(&self, bytes: u64, more: u64) -> u64 {
        let bytes = bytes.saturating_add(more);
        self.bytes.store(bytes, Ordering::Relaxed);
        match bytes.checked_sub(self.bytes_max) {
            None | Some(0) => 0,
            Some(over) => over.saturating_add(self.spare()),
        }
    }

    /// How many to take out where the file system has no room for `bytes`.
    pub(super) fn wanted(&self, bytes: u64) -> u64 {
        bytes.saturating_add(self.spare())
    }

    /// So many were taken out.
    pub(super) fn evicted(&self, bytes: u64) {
        self.bytes_evicted.fetch_add(bytes, Ordering::Relaxed);
        let less = |now: u64| Some(now.saturating_sub(bytes));
        // It never fails: there is always something to store.
        let _ = self
            .bytes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// Whether what nobody waits for may come too.
    pub(super) fn has_spare(&self) -> bool {
        let bytes = self.bytes.load(Ordering::Relaxed);
        bytes.saturating_add(self.spare()) <= self.bytes_max
            && available(&self.folder).is_none_or(|available| available >= self.spare())
    }

    pub(super) fn status(&self, bytes: u64) -> PoolStatus {
        PoolStatus {
            bytes,
            bytes_max: self.bytes_max,
            bytes_evicted: self.bytes_evicted.load(Ordering::Relaxed),
        }
    }
}

/// What a folder's file system has left for its owner.
fn available(folder: &Path) -> Option<u64> {
    let about = rustix::fs::statvfs(folder).ok()?;
    Some(about.f_bavail.saturating_mul(about.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_over_its_quota_has_more_taken_out_than_is_too_much() {
        let pool = Pool::new(Path::new("/"), Some(1600), (1, 1), 1000);
        assert!(pool.has_spare());
        assert!(pool.add(600));
        assert!(!pool.has_spare() && !pool.add(1));
        assert_eq!(pool.counted(1500, 100), 0);
        assert_eq!(pool.counted(1600, 64), 64 + 100);
        pool.evicted(200);
        assert!(pool.add(100) && !pool.add(100));
        assert_eq!(pool.status(7).bytes_evicted, 200);
    }

    #[test]
    fn without_a_quota_it_is_a_share_of_what_there_is_room_for() {
        let bytes_max = |share| {
            Pool::new(Path::new("/"), None, share, 1 << 50)
                .status(0)
                .bytes_max
        };
        assert!(bytes_max((1, 2)) >= 1 << 49 && bytes_max((1, 2)) < bytes_max((3, 4)));
        // Of no room it is a share that can be worked with.
        let full = Pool::new(Path::new("/proc"), None, (3, 4), 0);
        assert_eq!(full.status(0).bytes_max, QUOTA_BYTES_MIN);
        assert_eq!(
            Pool::new(Path::new("/none"), None, (1, 2), 0).status(0).bytes_max,
            u64::MAX
        );
    }
}
