//! The places where one image can be read: each URL and directory that led to it, the one to ask first in front.
//!
//! Whoever names a new place has a reason to: the old one is gone or broken. So the newest is asked first, and the others
//! where it fails or its bytes are wrong. The one that delivers is asked first from then on. A monitor that comes back
//! to a new agent names the place that it began with, which says nothing of the others.
//!
//! The places are written down beside the page files, for the next agent: by then the first ones may be gone.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use runnel_snapshot::blobs::{Blob, BlobError, BlobStore};
use runnel_snapshot::image::reference::ImageReference;

use crate::failed_reads::FailedReads;
use crate::traffic::Traffic;

/// Places that are kept. Beyond, the one that was to be asked last is forgotten.
const PLACES_MAX: usize = 16;

/// One place.
pub(super) struct Place {
    pub(super) reference: ImageReference,
    pub(super) store: Arc<dyn BlobStore>,
    /// What comes before a blob's hexadecimal digits in its URL, if others can read it there.
    blobs_at: Option<String>,
    /// What went over the network for it, if it is on one.
    pub(super) traffic: Option<Arc<Traffic>>,
    health: Health,
}

/// Why reads of a place fail. Few do, and those that do not take no lock.
#[derive(Default)]
struct Health {
    is_bad: AtomicBool,
    trouble: Mutex<Option<String>>,
}

/// All places of an image: a [`BlobStore`] over their stores.
pub(super) struct Places {
    known: Mutex<Known>,
    /// Where they are written down.
    record: PathBuf,
}

struct Known {
    /// At least one.
    list: Vec<Arc<Place>>,
    /// Bytes received and sent, of stores that are not asked any more.
    past: (u64, u64),
}

/// Where a place that was found belongs among those that are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rank {
    /// Somebody chose it.
    First,
    /// A machine has come back from it.
    Last,
}

impl Place {
    pub(super) fn new(
        reference: ImageReference,
        store: Arc<dyn BlobStore>,
        traffic: Option<Arc<Traffic>>,
    ) -> Self {
        Self {
            reference,
            store,
            blobs_at: None,
            traffic,
            health: Health::default(),
        }
    }

    /// Others can read it too: a blob's URL is this, with the hexadecimal digits of its digest behind it.
    pub(super) fn with_blobs_at(self, url: String) -> Self {
        Self {
            blobs_at: Some(url),
            ..self
        }
    }

    fn bytes(&self) -> (u64, u64) {
        let traffic = self.traffic.as_deref();
        traffic.map_or((0, 0), |traffic| (traffic.bytes_received(), traffic.bytes_sent()))
    }
}

impl Health {
    fn is_well(&self) {
        if self.is_bad.swap(false, Ordering::Relaxed) {
            *lock(&self.trouble) = None;
        }
    }

    fn is_troubled(&self, trouble: &str) {
        *lock(&self.trouble) = Some(trouble.to_owned());
        self.is_bad.store(true, Ordering::Relaxed);
    }
}

impl Places {
    /// With one place. They will be written down at `record`.
    pub(super) fn new(first: Place, record: PathBuf) -> Self {
        Self {
            known: Mutex::new(Known {
                list: vec![Arc::new(first)],
                past: (0, 0),
            }),
            record,
        }
    }

    /// Whether there is one of that reference.
    pub(super) fn contain(&self, reference: &ImageReference) -> bool {
        let mut places = self.list().into_iter();
        places.any(|place| place.reference.is_same_place(reference))
    }

    /// Adds a place. Of one that is there already the new store is used: the old one may have come to know files, or a
    /// server, that have been replaced since.
    pub(super) fn add(&self, place: Place, rank: Rank) {
        let mut known = lock(&self.known);
        let is_same = |other: &Arc<Place>| other.reference.is_same_place(&place.reference);
        let at = match (known.list.iter().position(is_same), rank) {
            (Some(old), rank) => {
                let old_place = known.list.remove(old);
                known.forget(&old_place);
                if rank == Rank::First { 0 } else { old }
            }
            (None, Rank::First) => 0,
            (None, Rank::Last) => known.list.len(),
        };
        tracing::info!(place = %place.reference, "an image can be read there");
        known.list.insert(at, Arc::new(place));
        if known.list.len() > PLACES_MAX
            && let Some(last) = known.list.pop()
        {
            known.forget(&last);
        }
        drop(known);
        self.write_down();
    }

    /// Where the image is read.
    pub(super) fn reference(&self) -> ImageReference {
        lock(&self.known).list[0].reference.clone()
    }

    /// Where others can read it, as [`Place::with_blobs_at`] has it.
    pub(super) fn blobs_at(&self) -> Vec<String> {
        let places = self.list();
        places.iter().filter_map(|place| place.blobs_at.clone()).collect()
    }

    /// Why the last read failed in each place where it did.
    pub(super) fn trouble(&self) -> Option<String> {
        let trouble = |place: &Arc<Place>| {
            let trouble = lock(&place.health.trouble).clone()?;
            Some(format!("{}: {trouble}", place.reference))
        };
        let troubles: Vec<String> = self.list().iter().filter_map(trouble).collect();
        (!troubles.is_empty()).then(|| troubles.join("; "))
    }

    /// Bytes received and sent for the image, in all places.
    pub(super) fn bytes(&self) -> (u64, u64) {
        let known = lock(&self.known);
        let all = known.list.iter().map(|place| place.bytes());
        all.fold(known.past, add)
    }

    fn list(&self) -> Vec<Arc<Place>> {
        lock(&self.known).list.clone()
    }

    /// The first that is none of `asked`.
    fn next_beside(&self, asked: &[Arc<Place>]) -> Option<Arc<Place>> {
        let known = lock(&self.known);
        let was_asked = |place: &Arc<Place>| asked.iter().any(|other| Arc::ptr_eq(other, place));
        known.list.iter().find(|place| !was_asked(place)).cloned()
    }

    /// Asks `place` first from now on, in place of `failed`: unless another took its place meanwhile.
    fn prefer(&self, place: &Arc<Place>, failed: &Arc<Place>) {
        {
            let mut known = lock(&self.known);
            let position = known.list.iter().position(|other| Arc::ptr_eq(other, place));
            let (true, Some(position)) = (Arc::ptr_eq(&known.list[0], failed), position) else {
                return;
            };
            known.list[..=position].rotate_right(1);
        }
        let trouble = lock(&failed.health.trouble).clone().unwrap_or_default();
        tracing::warn!(
            from = %failed.reference,
            to = %place.reference,
            trouble,
            "an image is read in another place from now on"
        );
        self.write_down();
    }

    /// Tells the next agent. One that is not told only finds less.
    pub(super) fn write_down(&self) {
        let lines = self.list();
        let lines: String = lines
            .iter()
            .map(|place| format!("{}\n", place.reference))
            .collect();
        if let Err(error) = fs::write(&self.record, lines) {
            tracing::debug!(path = %self.record.display(), %error, "an image's places cannot be written down");
        }
    }
}

/// The places that an earlier agent wrote down.
pub(super) fn written_down(record: &Path) -> Vec<ImageReference> {
    let text = fs::read_to_string(record).unwrap_or_default();
    // Half a line of one that was killed makes no reference, or one that leads nowhere.
    let places = text.lines().filter_map(|line| line.parse().ok());
    places.take(PLACES_MAX).collect()
}

impl Known {
    fn forget(&mut self, place: &Place) {
        self.past = add(self.past, place.bytes());
    }
}

fn add(sum: (u64, u64), bytes: (u64, u64)) -> (u64, u64) {
    (sum.0 + bytes.0, sum.1 + bytes.1)
}

impl BlobStore for Places {
    fn read_range(&self, blob: &Blob, offset: u64, into: &mut [u8]) -> Result<(), BlobError> {
        self.read_right(blob, offset, into, &mut |_| true).map(drop)
    }

    fn read_right(
        &self,
        blob: &Blob,
        offset: u64,
        into: &mut [u8],
        are_right: &mut dyn FnMut(&[u8]) -> bool,
    ) -> Result<bool, BlobError> {
        let mut asked: Vec<Arc<Place>> = Vec::new();
        let mut failed = FailedReads::default();
        // Looked at anew each time: one may have been named while another was waited for.
        while let Some(place) = self.next_beside(&asked) {
            let read = place.store.read_right(blob, offset, into, are_right);
            match failed.take(&place.reference, blob, read) {
                Ok(()) => {
                    place.health.is_well();
                    if let Some(first) = asked.first() {
                        self.prefer(&place, first);
                    }
                    return Ok(true);
                }
                Err(trouble) => place.health.is_troubled(&trouble),
            }
            asked.push(place);
        }
        failed.end(blob)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
