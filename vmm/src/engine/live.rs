//! A machine that runs on while its memory is saved: what is armed ahead of the pause, and what the pause fixes.

use std::io;
use std::path::Path;
use std::sync::Arc;

use runnel_snapshot::capture::Content;
use runnel_snapshot::capture::content::{FileContent, OverFile, OwnContent, add_data_pages};
use runnel_snapshot::copy_before_write::{EarlyPages, EarlyPagesLimits};
use runnel_snapshot::overlay::{IsCancelled, OverImage};
use runnel_snapshot::pager::{PageSet, ProtectionCounters, WriteProtection};
use runnel_snapshot::units::PAGE_SIZE;

use super::KvmGuest;
use super::memory::{MappedPages, RamBacking, mappings, memory_file};
use crate::pager::{WriteWatch, own_pages};

/// Holes of a booted machine's memory that are shorter are armed like data: looking at each would take longer.
const HOLE_PAGES_MIN: u64 = 64;

/// See [`limits`].
const VARIABLE: &str = "RUNNEL_EARLY_PAGES";

/// Write protection of a running machine's memory, for one snapshot; dropped, nothing is protected any more.
pub(super) struct Live {
    protection: Arc<WriteProtection>,
    early: Arc<EarlyPages>,
    /// What the machine had written when it was armed ahead.
    own: PageSet,
}

impl Live {
    /// Arms what the machine has written so far, or of it the pages `within` alone. What is taken away early spills into
    /// `folder`.
    ///
    /// `None` if the machine must stand while its memory is read: that of a raw file cannot be protected.
    ///
    /// # Errors
    /// When the host refuses.
    pub(super) fn arm(
        guest: &mut KvmGuest,
        within: Option<&PageSet>,
        folder: &Path,
    ) -> io::Result<Option<Self>> {
        let layout = guest.machine.layout();
        let pages = layout.bytes() / PAGE_SIZE;
        let mut own = PageSet::new(pages);
        let protection = if let Some(pager) = &guest.pager {
            pager.write_protection().begin();
            own = own_pages(&mappings(guest.machine.ram(), layout)?, pages)?;
            if let Some(within) = within {
                own.retain_all(within);
            }
            pager.write_protection().clone()
        } else {
            match (&guest.backing, within) {
                (RamBacking::Foreign, _) => return Ok(None),
                (RamBacking::Frozen { .. }, _) => {
                    own = own_pages(&mappings(guest.machine.ram(), layout)?, pages)?;
                    if let Some(within) = within {
                        own.retain_all(within);
                    }
                }
                (RamBacking::Own, Some(within)) => own.insert_all(within),
                (RamBacking::Own, None) => add_data_pages(
                    &memory_file(guest.machine.ram())?,
                    layout.bytes(),
                    HOLE_PAGES_MIN,
                    &mut own,
                )?,
            }
            if guest.writes.is_none() {
                let mappings = mappings(guest.machine.ram(), layout)?;
                guest.writes = Some(WriteWatch::start(mappings).map_err(io::Error::other)?);
            }
            let watch = guest.writes.as_ref().ok_or(io::ErrorKind::NotFound)?;
            watch.write_protection().clone()
        };
        let live = Self {
            protection,
            early: Arc::new(EarlyPages::new(limits(), folder)),
            own,
        };
        live.protection.arm_ahead(&live.own)?;
        Ok(Some(live))
    }

    /// The memory as it is now, or of it the pages `within` alone, while the machine stands; it may run on when this has
    /// returned.
    ///
    /// # Errors
    /// When the host refuses.
    pub(super) fn freeze(
        &mut self,
        guest: &KvmGuest,
        within: Option<&PageSet>,
        is_cancelled: IsCancelled,
    ) -> io::Result<Arc<dyn Content>> {
        let layout = guest.machine.layout();
        let pages = layout.bytes() / PAGE_SIZE;
        if guest.pager.is_none() && matches!(guest.backing, RamBacking::Own) {
            let file = memory_file(guest.machine.ram())?;
            let own = match within {
                Some(within) => within.clone(),
                None => {
                    add_data_pages(&file, layout.bytes(), HOLE_PAGES_MIN, &mut self.own)?;
                    self.own.clone()
                }
            };
            let early = self.early.clone();
            let moment = self.protection.freeze(own.clone(), Box::new(file), early)?;
            return Ok(Arc::new(OwnContent::new(own, layout.bytes(), Box::new(moment))));
        }
        let mut own = own_pages(&mappings(guest.machine.ram(), layout)?, pages)?;
        if let Some(within) = within {
            own.retain_all(within);
        }
        let mapped = Box::new(MappedPages::new(guest.machine.ram().clone(), layout));
        let moment = self.protection.freeze(own.clone(), mapped, self.early.clone())?;
        let Some(pager) = &guest.pager else {
            let file = FileContent::new(memory_file(guest.machine.ram())?, layout.bytes())?;
            return Ok(Arc::new(OverFile::new(file, own, Box::new(moment))));
        };
        let logic = pager.logic();
        Ok(Arc::new(OverImage::new(
            logic.fetcher(),
            logic.volume(),
            own,
            Box::new(moment),
            logic.discarded(),
            is_cancelled,
        )))
    }

    /// Where content goes that is taken away early, of drives too.
    pub(super) fn early(&self) -> &Arc<EarlyPages> {
        &self.early
    }

    /// Whether somebody who writes to memory waits for the capture to come by.
    pub(super) fn holds_writers(&self) -> bool {
        self.protection.held() > 0
    }
}

/// How much is kept of what is overwritten. In a monitor with debug assertions, [`VARIABLE`] in its environment says how
/// many pages of memory, without a file: a test can meet writers that wait.
fn limits() -> EarlyPagesLimits {
    let pages = if cfg!(debug_assertions) {
        std::env::var(VARIABLE)
            .ok()
            .and_then(|pages| pages.parse::<u64>().ok())
    } else {
        None
    };
    pages.map_or_else(EarlyPagesLimits::default, |pages| EarlyPagesLimits {
        memory_bytes: pages.saturating_mul(PAGE_SIZE),
        file_bytes: 0,
    })
}

impl Drop for Live {
    fn drop(&mut self) {
        let (in_memory, in_file) = self.early.high_water();
        let ProtectionCounters {
            faults_ahead,
            faults_frozen,
            faults_held,
            armed_at_pause,
        } = self.protection.lift();
        tracing::debug!(
            faults_ahead,
            armed_at_pause,
            faults_frozen,
            faults_held,
            pages_kept_in_memory = in_memory,
            pages_kept_in_file = in_file,
            "Memory is not protected any more."
        );
    }
}
