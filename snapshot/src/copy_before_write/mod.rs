//! Copy before write: the pages of a volume as they were at one moment, while the machine goes on writing to them.
//!
//! ```text
//!            ┌── the capture reads it ─────────────────────────┐
//!   unsaved ─┤                                                 ├─► saved: nobody's concern any more
//!            └── somebody wants to write ──► kept ── captured ─┘
//!                                 │   its old content is in the early-page buffer
//!                                 └─► waits, if that is full, until the capture has come by
//! ```
//!
//! A page of RAM is write-protected while it is unsaved ([`WriteProtection`](crate::pager::WriteProtection) says who
//! wants to write); a drive's writes go by [`DriveWrites`].
//!
//! **Invariant.** The lock here is never held while guest memory is touched that could be missing, so the thread that
//! answers faults can take it.

mod early_pages;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

pub use early_pages::{EarlyPages, EarlyPagesLimits};

use crate::dirty_pages::WrittenPages;
use crate::pager::PageSet;
use crate::units::{ByteRange, PAGE_SIZE, PageIndex};
use early_pages::Kept;

/// Pages of a drive that are copied aside with one read: 64 KiB.
const COPY_PAGES: u64 = 16;

/// How often whoever waits looks for himself: of room that the capture of another volume has made, nobody tells.
const LOOK: Duration = Duration::from_millis(5);

/// Where a machine's own pages are read, at their offset in the volume.
pub trait OwnPages: Send + Sync {
    /// Fills `into` from `offset` on; all of it lies in pages of the machine's own.
    ///
    /// # Errors
    /// When they cannot be read.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
}

impl OwnPages for File {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(into, offset)
    }
}

impl<P: OwnPages> OwnPages for Arc<P> {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        (**self).read(offset, into)
    }
}

/// Whether a page may be written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writable {
    /// Yes: what it held is kept, or was saved.
    Now,
    /// Not before the capture has come by: there is no room to keep what it holds.
    Later,
}

/// What becomes of the pages of a [`Moment`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passed {
    /// The capture has saved these: the first, and how many.
    Saved(PageIndex, u64),
    /// Nothing is kept any more, of none: all may be written to.
    Over,
}

/// Called with what becomes of pages. Holds no lock of ours.
type OnPassed = Box<dyn Fn(Passed) + Send + Sync>;

struct State {
    /// Pages that still hold what they held at the moment, and were not captured.
    unsaved: PageSet,
    /// What pages held that were written to since and were not captured.
    kept: HashMap<u64, Kept>,
    /// How many pages were kept in all.
    kept_in_all: u64,
    /// Writers that wait for the capture.
    waiting: u64,
    /// Why the moment is lost, if it is. Writers go on.
    failure: Option<String>,
}

/// What writers go by while a volume's own pages are captured. See the module.
pub struct CopyBeforeWrite {
    /// Where they are.
    pages: Box<dyn OwnPages>,
    /// The volume's length.
    bytes: u64,
    early: Arc<EarlyPages>,
    state: Mutex<State>,
    /// The capture has come by, or it is over.
    moved: Condvar,
}

impl fmt::Debug for CopyBeforeWrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CopyBeforeWrite")
    }
}

impl CopyBeforeWrite {
    /// To be called before these pages change, by a thread that may wait: keeps what they hold, and waits for the
    /// capture while there is no room for that.
    pub fn before_write(&self, first: PageIndex, count: u64) {
        let end = first.0.saturating_add(count);
        let mut state = self.lock();
        let mut page = first;
        while page.0 < end {
            let (unsaved, run) = state.unsaved.run_at(page, (end - page.0).min(COPY_PAGES));
            if run == 0 {
                return; // behind the volume's end
            }
            if !unsaved {
                page.0 += run;
                continue;
            }
            let kept = self.keep(&mut state, page, run);
            page.0 += kept;
            if kept < run && state.failure.is_none() {
                state.waiting += 1;
                let waited = self.moved.wait_timeout(state, LOOK);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
                state.waiting -= 1;
            }
        }
    }

    /// Keeps what the pages from `first` on hold, as far as they are unsaved and there is room; never waits. Whether
    /// the first of them may be written to, and if so how many.
    pub fn try_before_write(&self, first: PageIndex, count: u64) -> (Writable, u64) {
        let mut state = self.lock();
        let (unsaved, run) = state.unsaved.run_at(first, count.min(COPY_PAGES));
        if !unsaved {
            return (Writable::Now, run.max(1));
        }
        match self.keep(&mut state, first, run) {
            0 if state.failure.is_none() => (Writable::Later, 0),
            0 => (Writable::Now, run),
            kept => (Writable::Now, kept),
        }
    }

    /// How many writers wait for the capture in [`before_write`](Self::before_write).
    #[must_use]
    pub fn waiting(&self) -> u64 {
        self.lock().waiting
    }

    /// Keeps a run of unsaved pages; how many of them there was room for. A page that cannot be read or kept ends the
    /// capture, not the writer.
    fn keep(&self, state: &mut State, first: PageIndex, run: u64) -> u64 {
        let mut bytes = vec![0; (run * PAGE_SIZE) as usize];
        // The last page of a drive may be short.
        let len = (run * PAGE_SIZE).min(self.bytes.saturating_sub(first.offset()));
        if let Err(error) = self.pages.read(first.offset(), &mut bytes[..len as usize]) {
            self.lose(state, &format!("page {} cannot be read: {error}", first.0));
            return 0;
        }
        let mut done = 0;
        for page in bytes.chunks_exact(PAGE_SIZE as usize) {
            match self.early.keep(page) {
                Ok(Some(kept)) => {
                    state.kept.insert(first.0 + done, kept);
                    done += 1;
                }
                Ok(None) => break,
                Err(error) => {
                    self.lose(
                        state,
                        &format!("page {} cannot be set aside: {error}", first.0 + done),
                    );
                    return 0;
                }
            }
        }
        state.unsaved.remove_run(first, done);
        state.kept_in_all += done;
        done
    }

    fn lose(&self, state: &mut State, why: &str) {
        if state.failure.is_none() {
            state.failure = Some(why.to_owned());
        }
        state.unsaved.clear();
        for (_, kept) in state.kept.drain() {
            self.early.forget(kept);
        }
        self.moved.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A volume's own pages as they were at one moment, for the capture. Each can be read once; dropped, nothing is kept
/// any more, and no writer waits.
pub struct Moment {
    writers: Arc<CopyBeforeWrite>,
    on_passed: OnPassed,
}

impl Moment {
    /// This moment, of the pages `own` of a volume of `bytes`: nobody writes to them before this has returned.
    /// `on_passed` is told of pages as they are read, and of the end.
    #[must_use]
    pub fn new(
        own: PageSet,
        bytes: u64,
        pages: Box<dyn OwnPages>,
        early: Arc<EarlyPages>,
        on_passed: impl Fn(Passed) + Send + Sync + 'static,
    ) -> Self {
        let state = State {
            unsaved: own,
            kept: HashMap::new(),
            kept_in_all: 0,
            waiting: 0,
            failure: None,
        };
        let writers = Arc::new(CopyBeforeWrite {
            pages,
            bytes,
            early,
            state: Mutex::new(state),
            moved: Condvar::new(),
        });
        Self {
            writers,
            on_passed: Box::new(on_passed),
        }
    }

    /// What writers are to go by.
    #[must_use]
    pub fn writers(&self) -> &Arc<CopyBeforeWrite> {
        &self.writers
    }
}

impl Drop for Moment {
    fn drop(&mut self) {
        let mut state = self.writers.lock();
        self.writers.lose(&mut state, "the snapshot is over");
        tracing::debug!(
            volume_bytes = self.writers.bytes,
            pages_kept = state.kept_in_all,
            "A moment of a volume is not kept any more."
        );
        drop(state);
        (self.on_passed)(Passed::Over);
    }
}

impl OwnPages for Moment {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.writers.read(offset, into)?;
        let first = PageIndex::holding(offset);
        let count = (offset + into.len() as u64).div_ceil(PAGE_SIZE) - first.0;
        (self.on_passed)(Passed::Saved(first, count));
        Ok(())
    }
}

/// What a drive's writes go by: a list of the pages that are dirty then, and a capture if one is under way.
#[derive(Debug)]
pub struct DriveWrites {
    written: Arc<WrittenPages>,
    capture: Mutex<Weak<CopyBeforeWrite>>,
}

impl DriveWrites {
    /// Of a drive of `bytes`.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        Self {
            written: WrittenPages::new(bytes),
            capture: Mutex::default(),
        }
    }

    /// Which pages were written to.
    #[must_use]
    pub fn written(&self) -> &Arc<WrittenPages> {
        &self.written
    }

    /// From now on, writes go by this capture. One before it, if it is still under way, is on its own: there is one at a
    /// time.
    pub fn go_by(&self, moment: &Moment) {
        *self.capture.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(moment.writers());
    }

    /// To be called before `range` is written to, discarded or made zeros; may wait for the capture.
    pub fn before(&self, range: ByteRange) {
        self.written.insert(range);
        let capture = self
            .capture
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .upgrade();
        if let (Some(capture), Some(end)) = (capture, range.end()) {
            let first = PageIndex::holding(range.start);
            capture.before_write(first, end.div_ceil(PAGE_SIZE) - first.0);
        }
    }
}

impl CopyBeforeWrite {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let first = PageIndex::holding(offset);
        let count = (offset + into.len() as u64).div_ceil(PAGE_SIZE) - first.0;
        let direct = self.read_kept(first, count, into)?;
        for (start, run) in &direct {
            self.pages.read(start.offset(), part(into, first, *start, *run))?;
        }
        let mut state = self.lock();
        state.check()?;
        for (start, run) in direct {
            for page in start.0..start.0 + run {
                // Written to between: what was read may be the new content.
                if let Some(kept) = state.kept.get(&page) {
                    self.early.read(kept, part(into, first, PageIndex(page), 1))?;
                }
            }
        }
        state.unsaved.remove_run(first, count);
        let mut has_made_room = false;
        for page in first.0..first.0 + count {
            if let Some(kept) = state.kept.remove(&page) {
                self.early.forget(kept);
                has_made_room = true;
            }
        }
        let somebody_waits = state.waiting > 0;
        drop(state);
        if has_made_room || somebody_waits {
            self.moved.notify_all();
        }
        Ok(())
    }

    /// Fills in what was kept; the runs that are still where they were.
    fn read_kept(&self, first: PageIndex, count: u64, into: &mut [u8]) -> io::Result<Vec<(PageIndex, u64)>> {
        let state = self.lock();
        state.check()?;
        let mut direct = Vec::new();
        let mut page = first;
        while page.0 < first.0 + count {
            let (unsaved, run) = state.unsaved.run_at(page, first.0 + count - page.0);
            if unsaved {
                direct.push((page, run));
                page.0 += run;
                continue;
            }
            let kept = state.kept.get(&page.0).ok_or_else(|| {
                io::Error::other(format!(
                    "page {} was read already, and is not kept any longer",
                    page.0
                ))
            })?;
            self.early.read(kept, part(into, first, page, 1))?;
            page.0 += 1;
        }
        Ok(direct)
    }
}

impl State {
    fn check(&self) -> io::Result<()> {
        match &self.failure {
            Some(why) => Err(io::Error::other(why.clone())),
            None => Ok(()),
        }
    }
}

/// The part of `bytes`, which begin with page `first`, that holds a run of pages; the last may be short.
fn part(bytes: &mut [u8], first: PageIndex, start: PageIndex, run: u64) -> &mut [u8] {
    let from = ((start.0 - first.0) * PAGE_SIZE) as usize;
    let to = (from + (run * PAGE_SIZE) as usize).min(bytes.len());
    &mut bytes[from..to]
}
