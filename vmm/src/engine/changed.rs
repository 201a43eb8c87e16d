//! Which pages of memory a diff has.

use std::io;

use runnel_snapshot::capture::content::add_data_pages;
use runnel_snapshot::pager::PageSet;
use runnel_snapshot::units::{PAGE_SIZE, PageIndex};

use super::KvmGuest;
use super::memory::{RamBacking, mappings, memory_file};
use super::written::Since;
use crate::pager::own_pages;

/// Pages of memory that may differ from what was saved last.
pub(super) struct ChangedMemory {
    pub(super) pages: PageSet,
    /// Whether many of them may be as they were, since nobody logs writes.
    pub(super) is_guess: bool,
}

/// Those of a machine of whose pages `dirty` were written to since then, as far as that is logged.
///
/// # Errors
/// When the host does not tell which pages the machine has.
pub(super) fn changed_memory(guest: &KvmGuest, since: Since, dirty: PageSet) -> io::Result<ChangedMemory> {
    let is_guess = !guest.written.is_logged();
    let mut pages = match is_guess {
        false => dirty,
        true => candidates(guest, since, dirty.pages())?,
    };
    if let Some(pager) = &guest.pager {
        pages.insert_all(&pager.logic().discarded());
    }
    Ok(ChangedMemory { pages, is_guess })
}

/// Pages that may have been written to since the machine was made.
fn candidates(guest: &KvmGuest, since: Since, pages: u64) -> io::Result<PageSet> {
    let layout = guest.machine.layout();
    let own = || own_pages(&mappings(guest.machine.ram(), layout)?, pages);
    let mut candidates = match (&guest.backing, since) {
        (RamBacking::Foreign, _) | (RamBacking::Frozen { is_saved: true, .. }, Since::Image) => return own(),
        (RamBacking::Frozen { .. }, Since::Files) => own()?,
        (RamBacking::Own, _) | (RamBacking::Frozen { .. }, Since::Image) => PageSet::new(pages),
    };
    match since {
        // Also what was data then, and is a hole now.
        Since::Image => candidates.insert_run(PageIndex(0), pages),
        Since::Files => {
            debug_assert_eq!(layout.bytes(), pages * PAGE_SIZE);
            add_data_pages(
                &memory_file(guest.machine.ram())?,
                layout.bytes(),
                1,
                &mut candidates,
            )?;
        }
    }
    Ok(candidates)
}
