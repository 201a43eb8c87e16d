//! The background fill: round after round, until the machine has every chunk.
//!
//! A round asks for each chunk that nobody has asked for, a window of them at a time. What is damaged, or refused, it
//! leaves behind for the next round; where everything is, it stands, so that a server which has lost the image, or does
//! not let us in any more, is asked for a few chunks a minute and not for all of them.

use std::time::Instant;

use super::FetcherSettings;
use crate::source::{ChunkId, VolumeId};
use crate::units::ChunkIndex;

/// Where a round begins.
const FIRST_CHUNK: ChunkId = ChunkId {
    volume: VolumeId(0),
    chunk: ChunkIndex(0),
};

/// How far the fill is.
#[derive(Default)]
pub(super) struct Fill {
    /// Nobody has told it to begin before: what is lost until then is no gap of a round.
    has_begun: bool,
    /// Where it goes on; `None` before it begins and after a round.
    pub(super) next: Option<ChunkId>,
    pub(super) under_way: usize,
    /// Chunks were left behind.
    pub(super) has_gaps: bool,
    /// Chunks that were left behind since one arrived.
    lost_in_a_row: usize,
    pub(super) paused_until: Option<Instant>,
}

impl Fill {
    /// Begins the first round, or begins it anew.
    pub(super) fn begin(&mut self) {
        self.has_begun = true;
        self.has_gaps = false;
        self.next = Some(FIRST_CHUNK);
    }

    /// A chunk of the window has arrived.
    pub(super) fn got_one(&mut self) {
        self.under_way -= 1;
        self.lost_in_a_row = 0;
    }

    /// A chunk of the window cannot be had.
    pub(super) fn lost_one(&mut self, now: Instant, settings: &FetcherSettings) {
        self.under_way -= 1;
        self.lost_in_a_row += 1;
        if self.lost_in_a_row >= settings.fill_window {
            self.lost_in_a_row = 0;
            self.paused_until = Some(now + settings.fill_pause);
        }
    }

    /// What could not be had can be: goes on at once, with what was left behind too.
    pub(super) fn hurry(&mut self) {
        self.paused_until = None;
        if self.has_begun && self.has_gaps {
            self.begin();
        }
    }

    /// Begins another round, after a pause, if one is over that left something behind.
    pub(super) fn begin_again_if_need_be(&mut self, now: Instant, settings: &FetcherSettings) {
        let begins = self.has_begun && self.next.is_none() && self.under_way == 0 && self.has_gaps;
        if begins {
            self.begin();
            self.paused_until = Some(now + settings.fill_pause);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_fill_that_stands_goes_on_at_once_when_the_image_is_repaired() {
        let settings = FetcherSettings::default();
        let now = Instant::now();
        let mut fill = Fill::default();
        fill.hurry();
        assert_eq!(fill.next, None, "nobody has told it to begin");
        fill.begin();
        fill.next = None;
        fill.has_gaps = true;
        fill.begin_again_if_need_be(now, &settings);
        assert!(fill.paused_until > Some(now + Duration::from_secs(1)));
        fill.next = None;
        fill.has_gaps = true;
        fill.hurry();
        assert_eq!((fill.next, fill.paused_until), (Some(FIRST_CHUNK), None));
    }
}
