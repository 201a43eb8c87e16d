//! What a page fault in guest memory becomes.
//!
//! Guest RAM is a private mapping of the image's page file. A fault on a page whose chunk is there is answered by
//! mapping the page file's pages (`UFFDIO_CONTINUE`), for the whole chunk at once; one in a zero chunk by mapping
//! zeros; any other waits for its chunk. Pages that the guest gave back are not the image's any more: they read as
//! zeros, whatever the image holds (on a private mapping, giving a page back would otherwise bring the image's old
//! content to light again).
//!
//! **Invariant.** The lock here is never held by a thread that touches guest memory, and the installer's calls do not
//! touch it either; so the thread that answers faults cannot wait for a thread whose fault it must answer.

use std::collections::{BTreeMap, HashSet};
use std::os::unix::fs::MetadataExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use super::{Fetcher, PageSet, Stall};
use crate::source::{Arrived, ChunkId, VolumeId};
use crate::units::{ChunkIndex, ChunkSize, PAGE_SIZE, PageIndex};
use crate::volume::VolumeName;

/// Puts pages into guest memory and wakes whoever waits for them. Pages that are there already stay as they are, and
/// their waiters are woken too.
pub trait PageInstaller: Send + Sync {
    /// Maps `count` pages from `first` on as the page file holds them.
    ///
    /// # Errors
    /// [`InstallError::NotInPageFile`] if the page file has a hole there; the pages before it are mapped.
    fn map(&self, first: PageIndex, count: u64) -> Result<(), InstallError>;

    /// Maps zeros.
    ///
    /// # Errors
    /// When the host refuses.
    fn zero(&self, first: PageIndex, count: u64) -> Result<(), InstallError>;
}

/// Why pages could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The page file has no such page: evicted, or never filled.
    #[error("the page file does not hold page {}", .0.0)]
    NotInPageFile(PageIndex),
    /// The host refused.
    #[error("cannot install page {}", .0.0)]
    Host(PageIndex, #[source] std::io::Error),
}

/// What the pager has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PagerCounters {
    /// Faults on pages that the page file held already.
    pub faults_present: u64,
    /// Faults on pages that are zeros.
    pub faults_zero: u64,
    /// Faults that had to wait for a chunk.
    pub faults_waiting: u64,
    /// Pages that the guest has given back.
    pub discarded_pages: u64,
    /// Installations that the host refused.
    pub install_errors: u64,
}

#[derive(Default)]
struct Faults {
    present: AtomicU64,
    zero: AtomicU64,
    waiting: AtomicU64,
    install_errors: AtomicU64,
}

struct Pages {
    /// Chunks in which some page is being waited for.
    awaited: HashSet<ChunkIndex>,
    /// Pages that are not the image's any more, because the guest gave them back.
    discarded: PageSet,
    /// Faults that the host would not let us answer, by chunk, with what it said; tried again by
    /// [`MemoryPager::retry`].
    refused: BTreeMap<ChunkIndex, Refused>,
    /// Chunks that the page file turned out not to hold any more; asked for again once the lock is released.
    lost: Vec<ChunkIndex>,
}

struct Refused {
    reason: String,
    since: Instant,
}

/// Answers the faults in one machine's memory. See the module.
pub struct MemoryPager {
    fetcher: Arc<Fetcher>,
    volume: VolumeId,
    chunk_size: ChunkSize,
    pages_total: u64,
    installer: Box<dyn PageInstaller>,
    /// Whether a page that the page file holds was written there. Where the file has huge pages one write makes many
    /// pages, and all but what was written are zeros that are nobody's.
    has_small_pages: bool,
    /// Held while pages are installed, so that a page given back is never filled with the image's content afterwards.
    pages: Mutex<Pages>,
    /// Told when the host has refused something, by whichever thread asked it.
    on_refused: OnceLock<Box<dyn Fn() + Send + Sync>>,
    faults: Faults,
}

/// The source has no volume that could be a machine's memory.
#[derive(Debug, thiserror::Error)]
#[error("the image has no memory volume, or one that is not whole pages")]
pub struct NoMemory;

impl MemoryPager {
    /// Serves the `memory` volume of the fetcher's source.
    ///
    /// # Errors
    /// [`NoMemory`] if there is no such volume or its length is not a multiple of [`PAGE_SIZE`].
    ///
    /// # Panics
    /// If the fetcher has a pager already.
    pub fn new(fetcher: &Arc<Fetcher>, installer: Box<dyn PageInstaller>) -> Result<Arc<Self>, NoMemory> {
        let (volume, _) = fetcher.volume_named(&VolumeName::Memory).ok_or(NoMemory)?;
        // tmpfs says so (`shmem_getattr`): as its block size, if it may use huge pages.
        let about = fetcher.source().page_file(volume).metadata();
        let has_small_pages = about.is_ok_and(|about| about.blksize() <= PAGE_SIZE);
        if !has_small_pages {
            tracing::info!(
                "The page file may have huge pages: what is there already is asked for all the same."
            );
        }
        Self::over(fetcher, installer, has_small_pages)
    }

    fn over(
        fetcher: &Arc<Fetcher>,
        installer: Box<dyn PageInstaller>,
        has_small_pages: bool,
    ) -> Result<Arc<Self>, NoMemory> {
        let (volume, about) = fetcher.volume_named(&VolumeName::Memory).ok_or(NoMemory)?;
        if !about.bytes.is_multiple_of(PAGE_SIZE) {
            return Err(NoMemory);
        }
        let pages_total = about.bytes / PAGE_SIZE;
        let pager = Arc::new(Self {
            fetcher: fetcher.clone(),
            volume,
            chunk_size: about.chunk_size,
            pages_total,
            installer,
            has_small_pages,
            pages: Mutex::new(Pages {
                awaited: HashSet::new(),
                discarded: PageSet::new(pages_total),
                refused: BTreeMap::new(),
                lost: Vec::new(),
            }),
            on_refused: OnceLock::new(),
            faults: Faults::default(),
        });
        let weak = Arc::downgrade(&pager);
        fetcher.on_arrival(volume, move |chunk, what| {
            if let Some(pager) = weak.upgrade() {
                pager.arrived(chunk, what);
            }
        });
        Ok(pager)
    }

    /// A thread waits for `page`. `in_page_file` says that the page file holds it (a minor fault): then it is
    /// verified already, whoever fetched it, unless the file may have huge pages.
    pub fn fault(&self, page: PageIndex, in_page_file: bool) {
        if page.0 >= self.pages_total {
            tracing::error!(page = page.0, "a fault outside guest memory");
            return;
        }
        let chunk = self.chunk_size.chunk_holding(page.offset());
        let mut pages = self.lock();
        if pages.discarded.contains(page) {
            self.faults.zero.fetch_add(1, Ordering::Relaxed);
            self.report(self.installer.zero(page, 1), chunk, &mut pages);
            return self.finish(pages);
        }
        self.fetcher.touched(self.id(chunk));
        match self.fetcher.state(self.id(chunk)) {
            Some(what) => {
                let counter = if what == Arrived::Zero {
                    &self.faults.zero
                } else {
                    &self.faults.present
                };
                counter.fetch_add(1, Ordering::Relaxed);
                self.install(chunk, what, &mut pages);
            }
            None if in_page_file && self.has_small_pages => {
                self.faults.present.fetch_add(1, Ordering::Relaxed);
                self.report(self.installer.map(page, 1), chunk, &mut pages);
            }
            None => {
                self.faults.waiting.fetch_add(1, Ordering::Relaxed);
                pages.awaited.insert(chunk);
                drop(pages);
                return self.await_chunk(chunk);
            }
        }
        self.finish(pages);
    }

    /// The guest gives these pages back. To be called *before* the mapping is told (`MADV_DONTNEED`): from here on
    /// they are zeros, and nothing that arrives later fills them.
    pub fn discard(&self, first: PageIndex, count: u64) {
        self.lock().discarded.insert_run(first, count);
    }

    /// Answers once more the faults that the host refused to let us answer. To be called now and then while
    /// [`stall`](Self::stall) says something.
    pub fn retry(&self) {
        let mut pages = self.lock();
        for chunk in std::mem::take(&mut pages.refused).into_keys() {
            match self.fetcher.state(self.id(chunk)) {
                Some(what) => self.install(chunk, what, &mut pages),
                // A single page of it was to be installed: now the whole chunk is.
                None => {
                    pages.awaited.insert(chunk);
                    pages.lost.push(chunk);
                }
            }
        }
        self.finish(pages);
    }

    /// Has `wake` called whenever there is something to [`retry`](Self::retry): a chunk's arrival may be refused on a thread
    /// that never comes back to it. It must not block; the first one counts.
    pub fn on_refused(&self, wake: impl Fn() + Send + Sync + 'static) {
        let _ = self.on_refused.set(Box::new(wake));
    }

    /// Whether somebody waits for a page just now.
    #[must_use]
    pub fn is_awaited(&self) -> bool {
        let pages = self.lock();
        !pages.awaited.is_empty() || !pages.refused.is_empty()
    }

    /// Whether there are faults to [`retry`](Self::retry).
    #[must_use]
    pub fn has_refused(&self) -> bool {
        !self.lock().refused.is_empty()
    }

    /// Why the machine is stalled, if it is: a chunk that does not come, or a host that cannot take it.
    #[must_use]
    pub fn stall(&self) -> Option<Stall> {
        let refused = {
            let pages = self.lock();
            let chunks_waited_for = pages.refused.len();
            pages
                .refused
                .iter()
                .min_by_key(|(_, refused)| refused.since)
                .map(|(chunk, refused)| Stall {
                    volume: VolumeName::Memory,
                    chunk: *chunk,
                    reason: refused.reason.clone(),
                    waiting: refused.since.elapsed(),
                    chunks_waited_for,
                    holds_guest: true,
                    needs_repair: false,
                })
        };
        refused.or_else(|| self.fetcher.stall())
    }

    /// Which pages are not the image's any more because the guest gave them back.
    #[must_use]
    pub fn discarded(&self) -> PageSet {
        self.lock().discarded.clone()
    }

    /// Which of the source's volumes is the memory.
    #[must_use]
    pub fn volume(&self) -> VolumeId {
        self.volume
    }

    /// The fetcher behind this pager.
    #[must_use]
    pub fn fetcher(&self) -> &Arc<Fetcher> {
        &self.fetcher
    }

    /// What has been done so far.
    #[must_use]
    pub fn counters(&self) -> PagerCounters {
        PagerCounters {
            faults_present: self.faults.present.load(Ordering::Relaxed),
            faults_zero: self.faults.zero.load(Ordering::Relaxed),
            faults_waiting: self.faults.waiting.load(Ordering::Relaxed),
            discarded_pages: self.lock().discarded.len(),
            install_errors: self.faults.install_errors.load(Ordering::Relaxed),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn id(&self, chunk: ChunkIndex) -> ChunkId {
        ChunkId {
            volume: self.volume,
            chunk,
        }
    }

    /// Demands a chunk that is in `awaited`. If it came in the meantime, its arrival may have seen it awaited or not;
    /// installing twice does no harm.
    fn await_chunk(&self, chunk: ChunkIndex) {
        if let Some(what) = self.fetcher.demand(self.id(chunk)) {
            self.arrived(chunk, what);
        }
    }

    fn arrived(&self, chunk: ChunkIndex, what: Arrived) {
        let mut pages = self.lock();
        if pages.awaited.remove(&chunk) {
            self.install(chunk, what, &mut pages);
            self.finish(pages);
        }
    }

    /// Releases the lock, then asks for what was found lost under it.
    fn finish(&self, mut pages: MutexGuard<'_, Pages>) {
        let lost = std::mem::take(&mut pages.lost);
        drop(pages);
        for chunk in lost {
            self.fetcher.lost(self.id(chunk));
        }
    }

    /// Installs the pages of a chunk that is here, those given back as zeros.
    fn install(&self, chunk: ChunkIndex, what: Arrived, pages: &mut Pages) {
        let range = self.chunk_size.range_of(chunk, self.pages_total * PAGE_SIZE);
        let mut first = PageIndex::holding(range.start);
        let end = first.0 + range.len / PAGE_SIZE;
        while first.0 < end {
            let (discarded, count) = match what {
                Arrived::Zero => (true, end - first.0),
                Arrived::Data => pages.discarded.run_at(first, end - first.0),
            };
            let result = if discarded {
                self.installer.zero(first, count)
            } else {
                self.installer.map(first, count)
            };
            self.report(result, chunk, pages);
            first.0 += count;
        }
    }

    fn report(&self, result: Result<(), InstallError>, chunk: ChunkIndex, pages: &mut Pages) {
        match result {
            Ok(()) => {}
            Err(InstallError::NotInPageFile(page)) => {
                tracing::debug!(
                    page = page.0,
                    chunk = chunk.0,
                    "the page file lost a chunk; asking for it again"
                );
                pages.awaited.insert(chunk);
                pages.lost.push(chunk);
            }
            Err(error @ InstallError::Host(..)) => {
                self.faults.install_errors.fetch_add(1, Ordering::Relaxed);
                let reason = match std::error::Error::source(&error) {
                    Some(source) => format!("{error}: {source}"),
                    None => error.to_string(),
                };
                tracing::error!(chunk = chunk.0, reason, "cannot answer a fault");
                pages.refused.entry(chunk).or_insert(Refused {
                    reason,
                    since: Instant::now(),
                });
                if let Some(wake) = self.on_refused.get() {
                    wake();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
