//! Dirty pages: what was written to a volume since an image was made of it.
//!
//! ```text
//!   writes ──► WrittenPages ──take, at a pause──► DirtyPages ──saved──► gone: the new image has them
//!                   ▲                                 │
//!                   └───────────── dropped ───────────┘  the snapshot failed, or was cancelled
//! ```
//!
//! Pages that were taken and not saved go back: a later snapshot would lack them otherwise.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::pager::PageSet;
use crate::units::{ByteRange, PAGE_SIZE, PageIndex};

/// The pages of one volume that were written to since the last image of it.
#[derive(Debug)]
pub struct WrittenPages(Mutex<PageSet>);

impl WrittenPages {
    /// Of a volume of `bytes`; none was written to.
    #[must_use]
    pub fn new(bytes: u64) -> Arc<Self> {
        Arc::new(Self(Mutex::new(PageSet::new(bytes.div_ceil(PAGE_SIZE)))))
    }

    /// These bytes are written to, made zeros or discarded.
    pub fn insert(&self, range: ByteRange) {
        if let Some(end) = range.end().filter(|_| range.len > 0) {
            let first = PageIndex::holding(range.start);
            self.lock().insert_run(first, end.div_ceil(PAGE_SIZE) - first.0);
        }
    }

    /// Has `add` put in what was written to according to somebody else's books.
    pub fn insert_with(&self, add: impl FnOnce(&mut PageSet)) {
        add(&mut self.lock());
    }

    /// The pages that were written to so far.
    #[must_use]
    pub fn so_far(&self) -> PageSet {
        self.lock().clone()
    }

    /// Takes them out: what is written to from now on is new. To be called while nobody writes.
    pub fn take(self: &Arc<Self>) -> DirtyPages {
        let mut pages = self.lock();
        let nothing = PageSet::new(pages.pages());
        DirtyPages {
            pages: std::mem::replace(&mut pages, nothing),
            from: Some(Arc::clone(self)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, PageSet> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Pages that were taken for a snapshot. Dropped, they go back to where they were taken from.
#[must_use = "what is dropped was not saved, and goes back"]
#[derive(Debug)]
pub struct DirtyPages {
    pages: PageSet,
    from: Option<Arc<WrittenPages>>,
}

impl DirtyPages {
    /// Which.
    #[must_use]
    pub fn pages(&self) -> &PageSet {
        &self.pages
    }

    /// There is an image that has them.
    pub fn saved(mut self) {
        self.from = None;
    }
}

impl Drop for DirtyPages {
    fn drop(&mut self) {
        if let Some(from) = &self.from {
            from.lock().insert_all(&self.pages);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64) -> ByteRange {
        ByteRange { start, len }
    }

    fn pages(set: &PageSet) -> Vec<u64> {
        (0..set.pages())
            .filter(|page| set.contains(PageIndex(*page)))
            .collect()
    }

    #[test]
    fn pages_that_are_written_in_part_are_dirty_and_empty_writes_make_none() {
        let written = WrittenPages::new(10 * PAGE_SIZE - 512);
        written.insert(range(4095, 2));
        written.insert(range(5 * PAGE_SIZE, PAGE_SIZE));
        written.insert(range(8 * PAGE_SIZE, 0));
        written.insert(range(9 * PAGE_SIZE, PAGE_SIZE - 512));
        written.insert(range(u64::MAX, 2));
        assert_eq!(pages(&written.so_far()), [0, 1, 5, 9]);
    }

    #[test]
    fn what_was_not_saved_is_dirty_again_beside_what_was_written_since() {
        let written = WrittenPages::new(10 * PAGE_SIZE);
        written.insert(range(0, 1));
        let taken = written.take();
        written.insert(range(3 * PAGE_SIZE, 1));
        assert_eq!(pages(taken.pages()), [0]);
        assert_eq!(pages(&written.so_far()), [3]);
        drop(taken);
        assert_eq!(pages(&written.so_far()), [0, 3]);
        written.take().saved();
        assert!(written.so_far().is_empty());
    }
}
