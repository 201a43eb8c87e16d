//! Which pages of a resumed machine's RAM are its own, because it wrote them: the anonymous ones of a private mapping.
//!
//! The kernel knows already; no log has to be kept (Documentation/admin-guide/mm/pagemap.rst): a page of the mapping
//! that is there or was swapped out, and is not the page file's, is the machine's. So are zeros that were only read: the
//! kernel does not tell those apart here.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use runnel_snapshot::pager::PageSet;
use runnel_snapshot::units::{PAGE_SIZE, PageIndex};

use super::HostMapping;

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;

/// Bytes of one entry.
const ENTRY: usize = 8;
/// Entries that are read at once: 64 KiB, for 32 MiB of memory.
const ENTRIES_PER_READ: usize = 8192;

/// The pages in `mappings`, by their position in the volume of `pages` pages, that are this machine's own.
///
/// # Errors
/// When `/proc/self/pagemap` cannot be read.
pub fn own_pages(mappings: &[HostMapping], pages: u64) -> io::Result<PageSet> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut own = PageSet::new(pages);
    let mut buffer = vec![0; ENTRIES_PER_READ * ENTRY];
    for mapping in mappings {
        let first_entry = mapping.start.0 / PAGE_SIZE;
        let count = mapping.bytes / PAGE_SIZE;
        let mut done = 0;
        while done < count {
            let entries = (count - done).min(ENTRIES_PER_READ as u64);
            let bytes = &mut buffer[..entries as usize * ENTRY];
            pagemap.read_exact_at(bytes, (first_entry + done) * ENTRY as u64)?;
            mark_own(&mut own, PageIndex(mapping.first_page.0 + done), bytes);
            done += entries;
        }
    }
    Ok(own)
}

/// Adds the pages whose entries say so; the first entry is that of `first`.
fn mark_own(own: &mut PageSet, first: PageIndex, entries: &[u8]) {
    for (page, entry) in (first.0..).zip(entries.as_chunks::<ENTRY>().0) {
        let entry = u64::from_ne_bytes(*entry);
        if entry & OF_FILE == 0 && entry & (PRESENT | SWAPPED) != 0 {
            own.insert_run(PageIndex(page), 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_present_anonymous_and_swapped_pages_are_own() {
        let entries = [0, PRESENT, PRESENT | OF_FILE, SWAPPED, SWAPPED | OF_FILE, OF_FILE];
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|entry: &u64| entry.to_ne_bytes())
            .collect();
        let mut own = PageSet::new(8);
        mark_own(&mut own, PageIndex(1), &bytes);
        let found: Vec<_> = (0..8).filter(|page| own.contains(PageIndex(*page))).collect();
        // One of the file that is being moved looks swapped out.
        assert_eq!(found, [2, 4]);
    }
}
