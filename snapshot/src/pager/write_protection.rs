//! Which pages of guest memory are write-protected, and what becomes of a write to one.
//!
//! ```text
//!  off ──arm──► ahead: the machine runs; a page that is written to is simply let go of
//!                 │ freeze: the machine stands; what is own and not armed is armed
//!                 ▼
//!              frozen: the machine runs; a page that is written to is copied first
//!                 │ lift
//!  off ◄──────────┘
//! ```
//!
//! Arming takes longer than a machine may stand. Most of it is done ahead, so that at the pause only the pages are left
//! that were written to meanwhile. Pages that are not the machine's own need no arming: what they hold is the image's,
//! or zeros, and is known.
//!
//! **Invariant.** The lock here is never held by a thread that touches guest memory which could be missing, so the
//! thread that answers faults can take it.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::PageSet;
use crate::copy_before_write::{CopyBeforeWrite, EarlyPages, Moment, OwnPages, Passed, Writable};
use crate::units::{PAGE_SIZE, PageIndex};

/// Pages that are armed with one call, 2 MiB: some 70 µs, during which a write to any page waits for the lock.
const ARM_PAGES: u64 = 512;

/// Pages that are let go of together once they are saved, 2 MiB.
const LET_GO_PAGES: u64 = 512;

/// Pages that are let go of at most when writes follow each other, 64 KiB.
const WINDOW_MAX: u64 = 16;

/// Writers in sequence that are told apart.
const STREAMS: usize = 4;

/// Keeps writers off pages of guest memory.
pub trait Protector: Send + Sync {
    /// Has whoever writes to one of these pages wait.
    ///
    /// # Errors
    /// When the host refuses.
    fn protect(&self, first: PageIndex, count: u64) -> io::Result<()>;

    /// Lets whoever waits, and whoever comes, write.
    ///
    /// # Errors
    /// When the host refuses.
    fn unprotect(&self, first: PageIndex, count: u64) -> io::Result<()>;
}

/// A writer that goes from page to page.
#[derive(Clone, Copy, Default)]
struct Stream {
    /// The page that it will write to next.
    expects: u64,
    window: u64,
}

/// What was done since the last [`lift`](WriteProtection::lift).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProtectionCounters {
    /// Writes that came before the machine stood.
    pub faults_ahead: u64,
    /// Writes that came while its memory was captured.
    pub faults_frozen: u64,
    /// Those of them that had to wait for the capture.
    pub faults_held: u64,
    /// Pages that were armed while the machine stood.
    pub armed_at_pause: u64,
}

struct State {
    armed: PageSet,
    /// Pages that were given back since [`begin`](WriteProtection::begin). Armed where it is not any more, a page would
    /// leave the kernel's mark in its place, over which no zeros can be installed (`EEXIST`): whoever touched it would wait
    /// for ever. To `/proc/self/pagemap` it looks swapped out, so that it would pass for the machine's own besides.
    given_back: PageSet,
    counters: ProtectionCounters,
    /// While the memory is captured.
    frozen: Option<Arc<CopyBeforeWrite>>,
    /// Runs of pages that were saved, and are let go of together: each call costs the guest's processors an interruption.
    saved: Vec<(u64, u64)>,
    saved_pages: u64,
    /// Pages whose writers wait for the capture.
    held: BTreeSet<u64>,
    streams: [Stream; STREAMS],
    next_stream: usize,
}

/// The write protection of one machine's memory. See the module.
pub struct WriteProtection {
    protector: Box<dyn Protector>,
    /// Held while pages are armed, kept and let go of, so that none of these is undone by another.
    state: Mutex<State>,
}

impl WriteProtection {
    /// Of a memory of `pages`, none of which is protected.
    #[must_use]
    pub fn new(pages: u64, protector: Box<dyn Protector>) -> Arc<Self> {
        Arc::new(Self {
            protector,
            state: Mutex::new(State {
                armed: PageSet::new(pages),
                given_back: PageSet::new(pages),
                counters: ProtectionCounters::default(),
                frozen: None,
                saved: Vec::new(),
                saved_pages: 0,
                held: BTreeSet::new(),
                streams: [Stream::default(); STREAMS],
                next_stream: 0,
            }),
        })
    }

    /// To be called before it is looked which pages there are to be armed ahead: of those that are given back from here
    /// on, none is.
    pub fn begin(&self) {
        self.lock().given_back.clear();
    }

    /// Arms pages while the machine runs, so that less is left to do when it stands; not those that it has given back
    /// since [`begin`](Self::begin).
    ///
    /// # Errors
    /// When the host refuses; [`lift`](Self::lift) takes back what was done.
    pub fn arm_ahead(&self, own: &PageSet) -> io::Result<()> {
        own.runs().try_for_each(|(first, count)| {
            pieces(first, count).try_for_each(|(first, count)| {
                // A lock for each piece: writers wait no longer than for one.
                let mut state = self.lock();
                let mut page = first;
                while page.0 < first.0 + count {
                    let (is_gone, run) = state.given_back.run_at(page, first.0 + count - page.0);
                    if !is_gone {
                        self.arm(&mut state, page, run)?;
                    }
                    page.0 += run;
                }
                Ok(())
            })
        })
    }

    /// Fixes the content of the pages `own`, read from `pages`: the machine stands, and may run on when this has
    /// returned.
    ///
    /// # Errors
    /// When the host refuses; [`lift`](Self::lift) takes back what was done.
    pub fn freeze(
        self: &Arc<Self>,
        own: PageSet,
        pages: Box<dyn OwnPages>,
        early: Arc<EarlyPages>,
    ) -> io::Result<Moment> {
        let mut state = self.lock();
        for (first, count) in own.runs() {
            let mut page = first;
            while page.0 < first.0 + count {
                let (is_armed, run) = state.armed.run_at(page, first.0 + count - page.0);
                if !is_armed {
                    self.arm(&mut state, page, run)?;
                    state.counters.armed_at_pause += run;
                }
                page.0 += run;
            }
        }
        let bytes = own.pages() * PAGE_SIZE;
        let this: Weak<Self> = Arc::downgrade(self);
        let passed = move |passed| match (this.upgrade(), passed) {
            (Some(this), Passed::Saved(first, count)) => this.saved(first, count),
            (Some(this), Passed::Over) => this.over(),
            (None, _) => {}
        };
        let moment = Moment::new(own, bytes, pages, early, passed);
        state.frozen = Some(moment.writers().clone());
        Ok(moment)
    }

    /// Somebody writes to a protected page, and waits.
    pub fn write_fault(&self, page: PageIndex) {
        let mut state = self.lock();
        let (is_armed, run) = state.armed.run_at(page, state.window(page));
        if !is_armed {
            // Let go of between the fault and now.
            self.let_go(&mut state, page, 1);
            return;
        }
        let (writable, count) = match &state.frozen {
            Some(frozen) => frozen.try_before_write(page, run),
            None => (Writable::Now, run),
        };
        match state.frozen {
            Some(_) => state.counters.faults_frozen += 1,
            None => state.counters.faults_ahead += 1,
        }
        match writable {
            Writable::Now => {
                self.let_go(&mut state, page, count);
                state.went_on(page, count);
            }
            Writable::Later => {
                state.counters.faults_held += 1;
                state.held.insert(page.0);
            }
        }
    }

    /// To be called before the guest gives these pages back (`MADV_DONTNEED`), by a thread that may wait: what they hold
    /// is kept, and they are armed no longer, nor again before the machine stands.
    pub fn discard(&self, first: PageIndex, count: u64) {
        let frozen = self.lock().frozen.clone();
        if let Some(frozen) = frozen {
            frozen.before_write(first, count);
        }
        let mut state = self.lock();
        state.given_back.insert_run(first, count);
        self.let_go(&mut state, first, count);
    }

    /// How many writers wait for the capture.
    #[must_use]
    pub fn held(&self) -> usize {
        self.lock().held.len()
    }

    /// The [`Moment`] is over, whatever became of it: nobody waits for the capture any more. What is armed still is
    /// [lifted](Self::lift) later, by a thread that may be waiting for such a writer now.
    fn over(&self) {
        let mut state = self.lock();
        state.frozen = None;
        while let Some(page) = state.held.first().copied().map(PageIndex) {
            if !self.let_go(&mut state, page, 1) {
                break;
            }
        }
    }

    /// Ends all protection, once the [`Moment`] is over. The machine may run or stand.
    pub fn lift(&self) -> ProtectionCounters {
        let (counters, runs): (_, Vec<_>) = {
            let mut state = self.lock();
            state.frozen = None;
            state.saved.clear();
            state.saved_pages = 0;
            (std::mem::take(&mut state.counters), state.armed.runs().collect())
        };
        for (first, count) in runs {
            for (first, count) in pieces(first, count) {
                self.let_go(&mut self.lock(), first, count);
            }
        }
        counters
    }

    /// The capture has saved these pages.
    fn saved(&self, first: PageIndex, count: u64) {
        let mut state = self.lock();
        state.saved.push((first.0, count));
        state.saved_pages += count;
        if state.saved_pages >= LET_GO_PAGES || !state.held.is_empty() {
            self.let_go_of_saved(&mut state);
        }
        // There may be room now for what others wait to have kept.
        while let Some(page) = state.held.first().copied().map(PageIndex) {
            let writable = state
                .frozen
                .as_ref()
                .map_or(Writable::Now, |frozen| frozen.try_before_write(page, 1).0);
            if writable == Writable::Later || !self.let_go(&mut state, page, 1) {
                break;
            }
        }
    }

    fn let_go_of_saved(&self, state: &mut State) {
        state.saved_pages = 0;
        let mut runs = std::mem::take(&mut state.saved);
        runs.sort_unstable();
        for run in runs.chunk_by(|left, right| left.0 + left.1 == right.0) {
            if let (Some((first, _)), Some((last, count))) = (run.first(), run.last()) {
                self.let_go(state, PageIndex(*first), last + count - first);
            }
        }
    }

    fn arm(&self, state: &mut State, first: PageIndex, count: u64) -> io::Result<()> {
        // First, so that what was done in part is taken back too.
        state.armed.insert_run(first, count);
        self.protector.protect(first, count)
    }

    /// Whether the host has done it. If not, they stay armed, and their writers wait until the capture is over.
    fn let_go(&self, state: &mut State, first: PageIndex, count: u64) -> bool {
        if let Err(error) = self.protector.unprotect(first, count) {
            tracing::error!(page = first.0, count, %error, "the write protection of pages cannot be lifted");
            return false;
        }
        state.armed.remove_run(first, count);
        if !state.held.is_empty() {
            state
                .held
                .retain(|page| !(first.0..first.0 + count).contains(page));
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// How many pages to let go of for a write to `page`: more the longer its writer has gone from page to page.
    fn window(&self, page: PageIndex) -> u64 {
        let stream = self
            .streams
            .iter()
            .find(|stream| stream.expects == page.0 && stream.window > 0);
        stream.map_or(1, |stream| (stream.window * 2).min(WINDOW_MAX))
    }

    fn went_on(&mut self, page: PageIndex, count: u64) {
        let window = self.window(page);
        let found = self
            .streams
            .iter()
            .position(|stream| stream.expects == page.0 && stream.window > 0);
        let place = found.unwrap_or_else(|| {
            self.next_stream = (self.next_stream + 1) % STREAMS;
            self.next_stream
        });
        self.streams[place] = Stream {
            expects: page.0 + count,
            window,
        };
    }
}

fn pieces(first: PageIndex, count: u64) -> impl Iterator<Item = (PageIndex, u64)> {
    (0..count)
        .step_by(ARM_PAGES as usize)
        .map(move |done| (PageIndex(first.0 + done), ARM_PAGES.min(count - done)))
}

#[cfg(test)]
mod tests;
