//! The early-page buffer: content that was taken away before the capture came to it, because somebody wants to write
//! there. Memory first, up to a cap; then a file without a name, up to another; then there is no room, and whoever
//! writes waits for the capture.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::layer::frame::is_zero;
use crate::units::PAGE_SIZE;
use crate::unnamed;

/// Pages of memory that are allocated at once: 1 MiB.
const SLAB_PAGES: u64 = 256;

/// The file may take at most one part in so many of the room that its file system has left when it begins: the image is
/// written there too, and perhaps the machine's disks.
const ROOM_SHARE: u64 = 2;

/// How much may be kept, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EarlyPagesLimits {
    /// In memory.
    pub memory_bytes: u64,
    /// In the file.
    pub file_bytes: u64,
}

impl Default for EarlyPagesLimits {
    /// 64 MiB, some seconds of a busy guest, and then 16 GiB of file.
    fn default() -> Self {
        Self {
            memory_bytes: 64 << 20,
            file_bytes: 16 << 30,
        }
    }
}

/// Where a page's old content is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kept {
    /// It is zeros.
    Zero,
    /// In memory.
    Memory(u64),
    /// In the file.
    File(u64),
}

/// Places of one kind, each for a page.
#[derive(Default)]
struct Places {
    free: Vec<u64>,
    /// How many there are, free or not.
    made: u64,
    max: u64,
}

impl Places {
    fn new(max_bytes: u64) -> Self {
        Self {
            max: max_bytes / PAGE_SIZE,
            ..Self::default()
        }
    }

    fn take(&mut self) -> Option<u64> {
        if self.max == 0 {
            return None;
        }
        self.free.pop().or_else(|| {
            (self.made < self.max).then(|| {
                self.made += 1;
                self.made - 1
            })
        })
    }

    /// Nothing more is put here.
    fn close(&mut self) {
        self.max = 0;
    }

    fn taken(&self) -> u64 {
        self.made - self.free.len() as u64
    }
}

struct State {
    memory: Places,
    slabs: Vec<Box<[u8]>>,
    file: Places,
}

/// The early-page buffer of one capture; all of its volumes share it.
pub struct EarlyPages {
    /// Held while a page is copied.
    state: Mutex<State>,
    /// `None` where no file is to be had.
    file: Option<File>,
}

impl EarlyPages {
    /// An empty buffer, whose file lies in `folder`. Where none can be made there is memory alone.
    #[must_use]
    pub fn new(limits: EarlyPagesLimits, folder: &Path) -> Self {
        let file = unnamed::create_in(folder)
            .inspect_err(|error| {
                tracing::warn!(folder = %folder.display(), %error, "early pages cannot spill to a file");
            })
            .ok();
        let room = file.as_ref().and_then(|file| rustix::fs::fstatvfs(file).ok());
        let room = room.map_or(0, |room| room.f_bavail.saturating_mul(room.f_frsize) / ROOM_SHARE);
        Self {
            state: Mutex::new(State {
                memory: Places::new(limits.memory_bytes),
                slabs: Vec::new(),
                file: Places::new(limits.file_bytes.min(room)),
            }),
            file,
        }
    }

    /// Pages that are kept in memory, and in the file.
    #[must_use]
    pub fn held(&self) -> (u64, u64) {
        let state = self.lock();
        (state.memory.taken(), state.file.taken())
    }

    /// The most pages that were kept in memory, and in the file.
    #[must_use]
    pub fn high_water(&self) -> (u64, u64) {
        let state = self.lock();
        (state.memory.made, state.file.made)
    }

    /// Keeps a page; `None` if there is no room.
    pub(super) fn keep(&self, page: &[u8]) -> io::Result<Option<Kept>> {
        if is_zero(page) {
            return Ok(Some(Kept::Zero));
        }
        let mut state = self.lock();
        if let Some(place) = state.memory.take() {
            state.slot(place).copy_from_slice(page);
            return Ok(Some(Kept::Memory(place)));
        }
        let Some(file) = &self.file else { return Ok(None) };
        let Some(place) = state.file.take() else {
            return Ok(None);
        };
        drop(state);
        match file.write_all_at(page, place * PAGE_SIZE) {
            Ok(()) => Ok(Some(Kept::File(place))),
            Err(error) => {
                let mut state = self.lock();
                state.file.free.push(place);
                match error.kind() {
                    // Others use the file system too. What is in the file stays.
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                        state.file.close();
                        Ok(None)
                    }
                    _ => Err(error),
                }
            }
        }
    }

    /// Reads what was kept; `into` is a page or the beginning of one.
    pub(super) fn read(&self, kept: &Kept, into: &mut [u8]) -> io::Result<()> {
        match kept {
            Kept::Zero => into.fill(0),
            Kept::Memory(place) => {
                let len = into.len();
                into.copy_from_slice(&self.lock().slot(*place)[..len]);
            }
            Kept::File(place) => {
                let file = self.file.as_ref().ok_or(io::ErrorKind::NotFound)?;
                file.read_exact_at(into, place * PAGE_SIZE)?;
            }
        }
        Ok(())
    }

    /// Makes room.
    pub(super) fn forget(&self, kept: Kept) {
        match kept {
            Kept::Zero => {}
            Kept::Memory(place) => self.lock().memory.free.push(place),
            Kept::File(place) => self.lock().file.free.push(place),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn slot(&mut self, place: u64) -> &mut [u8] {
        let (slab, within) = ((place / SLAB_PAGES) as usize, place % SLAB_PAGES);
        while self.slabs.len() <= slab {
            let bytes = (SLAB_PAGES * PAGE_SIZE) as usize;
            self.slabs.push(vec![0; bytes].into_boxed_slice());
        }
        let start = (within * PAGE_SIZE) as usize;
        &mut self.slabs[slab][start..start + PAGE_SIZE as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = PAGE_SIZE as usize;

    fn buffer(memory_pages: u64, file_pages: u64) -> EarlyPages {
        let limits = EarlyPagesLimits {
            memory_bytes: memory_pages * PAGE_SIZE,
            file_bytes: file_pages * PAGE_SIZE,
        };
        EarlyPages::new(limits, &std::env::temp_dir())
    }

    #[test]
    fn pages_are_kept_in_memory_then_in_the_file_and_then_there_is_no_room() {
        let early = buffer(300, 1);
        let kept: Vec<_> = (1..=301u16)
            .map(|page| {
                let mut bytes = vec![0; PAGE];
                bytes[7..9].copy_from_slice(&page.to_le_bytes());
                early.keep(&bytes).unwrap().unwrap()
            })
            .collect();
        assert_eq!(early.held(), (300, 1));
        assert_eq!(early.keep(&[1; PAGE]).unwrap(), None);
        assert_eq!(
            early.keep(&[0; PAGE]).unwrap(),
            Some(Kept::Zero),
            "zeros need none"
        );
        let mut bytes = vec![0xFF; PAGE];
        for (page, kept) in (1u16..).zip(&kept) {
            early.read(kept, &mut bytes).unwrap();
            assert_eq!(bytes[7..9], page.to_le_bytes());
        }
        for kept in kept {
            early.forget(kept);
        }
        assert_eq!((early.held(), early.high_water()), ((0, 0), (300, 1)));
        assert!(early.keep(&[1; PAGE]).unwrap().is_some());
    }

    #[test]
    fn what_is_kept_stays_when_nothing_more_can_be() {
        let mut places = Places::new(2 * PAGE_SIZE);
        let kept = places.take().unwrap();
        places.close();
        assert_eq!((places.taken(), places.take()), (1, None));
        places.free.push(kept);
        assert_eq!((places.taken(), places.take()), (0, None));
    }

    #[test]
    fn without_a_file_there_is_memory_alone() {
        let limits = EarlyPagesLimits {
            memory_bytes: PAGE_SIZE,
            file_bytes: 1 << 30,
        };
        let early = EarlyPages::new(limits, Path::new("/nonexistent"));
        let mut short = [0; 9];
        let kept = early.keep(&[5; PAGE]).unwrap().unwrap();
        assert_eq!(early.keep(&[6; PAGE]).unwrap(), None);
        early.read(&kept, &mut short).unwrap();
        assert_eq!(short, [5; 9]);
    }
}
