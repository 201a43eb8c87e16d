//! What was written to a machine's memory since it was last saved: KVM's log joined with what device threads marked.

use std::sync::Arc;

use runnel_snapshot::dirty_pages::{DirtyPages, WrittenPages};
use runnel_snapshot::pager::PageSet;
use runnel_snapshot::units::PageIndex;
use vm_memory::GuestMemoryBackend;

use crate::layout::RamLayout;
use crate::microvm::Microvm;

/// Which kind of snapshot pages are dirty for: each has its own books, since a diff of one lies over the last of that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Since {
    /// The last image.
    Image,
    /// The last pair of files.
    Files,
}

/// The pages of memory that were written to, if the machine is one whose writes are logged.
pub(super) struct WrittenMemory {
    is_logged: bool,
    since_image: Arc<WrittenPages>,
    since_files: Arc<WrittenPages>,
}

impl WrittenMemory {
    /// Of a machine that was just made. `is_logged` says whether KVM logs what the vCPUs write.
    pub(super) fn new(layout: RamLayout, is_logged: bool) -> Self {
        Self {
            is_logged,
            since_image: WrittenPages::new(layout.bytes()),
            since_files: WrittenPages::new(layout.bytes()),
        }
    }

    /// Whether it is known which pages were written to.
    pub(super) fn is_logged(&self) -> bool {
        self.is_logged
    }

    /// Takes down what was logged so far. While the machine stands, nothing is missing then.
    pub(super) fn gather(&self, machine: &Microvm) {
        if !self.is_logged {
            return;
        }
        let log = machine.vm().take_dirty_log();
        for books in [&self.since_image, &self.since_files] {
            books.insert_with(|pages| match &log {
                Ok(log) => add_log(machine, log, pages),
                // Part of it may be lost: any page may have been written to.
                Err(_) => pages.insert_run(PageIndex(0), pages.pages()),
            });
        }
        if let Err(error) = log {
            tracing::warn!(%error, "it is not known which pages the guest wrote: all of them are taken as written");
        }
        let marks = take_marks(machine);
        for books in [&self.since_image, &self.since_files] {
            books.insert_with(|pages| add_log(machine, &marks, pages));
        }
    }

    /// What was taken down so far.
    pub(super) fn so_far(&self, since: Since) -> PageSet {
        self.books(since).so_far()
    }

    /// What was taken down, to be saved.
    pub(super) fn take(&self, since: Since) -> DirtyPages {
        self.books(since).take()
    }

    fn books(&self, since: Since) -> &Arc<WrittenPages> {
        match since {
            Since::Image => &self.since_image,
            Since::Files => &self.since_files,
        }
    }
}

/// The marks that device threads left, one bitmap a region of RAM; cleared by this.
fn take_marks(machine: &Microvm) -> Vec<Vec<u64>> {
    let regions = machine.ram().iter();
    regions
        .map(|region| region.get_mmap().bitmap().get_and_reset())
        .collect()
}

/// Adds the pages of bitmaps, one a region of RAM.
fn add_log(machine: &Microvm, log: &[Vec<u64>], pages: &mut PageSet) {
    for (span, bitmap) in machine.layout().spans().zip(log) {
        pages.insert_bitmap(PageIndex::holding(span.volume.start), bitmap);
    }
}
