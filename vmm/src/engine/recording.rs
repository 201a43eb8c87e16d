//! Recording which chunks of its image a machine touches first: from its load until it is paused, saved or ends, or the
//! time for it is over. Then the file that was named is there, and not before; of a machine that never ran there is none.

use std::sync::Arc;
use std::time::{Duration, Instant};

use runnel_snapshot::pager::Fetcher;
use runnel_snapshot::working_set::{FileError, WorkingSetFile};

use crate::config::Record;

/// A recording under way. Dropped, it ends.
pub(super) struct Recording {
    fetcher: Arc<Fetcher>,
    /// Taken when it is written.
    file: Option<WorkingSetFile>,
    /// For how long the machine may run meanwhile.
    time: Option<Duration>,
    /// Since when it does.
    runs_since: Option<Instant>,
}

impl Recording {
    /// Begins. That the file can be written is found out before the machine runs.
    ///
    /// # Errors
    /// When it cannot.
    pub(super) fn begin(record: &Record, fetcher: &Arc<Fetcher>) -> Result<Self, FileError> {
        let file = WorkingSetFile::create(&record.path)?;
        fetcher.record_touches();
        Ok(Self {
            fetcher: Arc::clone(fetcher),
            file: Some(file),
            time: record.time,
            runs_since: None,
        })
    }

    /// The machine runs from `now` on.
    pub(super) fn machine_runs(&mut self, now: Instant) {
        self.runs_since.get_or_insert(now);
    }

    /// In how long its time is over, if it has one; none is left when it is to end.
    pub(super) fn left(&self, now: Instant) -> Option<Duration> {
        let has_run = now.saturating_duration_since(self.runs_since?);
        Some(self.time?.saturating_sub(has_run))
    }

    /// Writes what was recorded. The machine is not held up by a disk that refuses it.
    fn end(&mut self) {
        let Some(file) = self.file.take().filter(|_| self.runs_since.is_some()) else {
            return;
        };
        let recorded = self.fetcher.recorded();
        let path = file.target().to_owned();
        match file.write(&recorded) {
            Ok(()) => tracing::info!(
                path = %path.display(),
                chunks = recorded.len(),
                "What the machine touched first was recorded."
            ),
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::error!(error, "what the machine touched first cannot be written");
            }
        }
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.end();
    }
}
