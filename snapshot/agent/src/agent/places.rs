//! The places where one image can be read: each URL and directory that led to it, the one to ask first in front.
//!
//! Whoever names a new place has a reason to: the old one is gone, or slow, or broken. So the newest is asked first, and
//! the others where it fails or its bytes are wrong. The one that delivers is asked first from then on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use runnel_snapshot::blobs::{Blob, BlobError, BlobStore};
use runnel_snapshot::image::reference::ImageReference;

use crate::remote::with_causes;
use crate::traffic::Traffic;

/// Places that are kept. Beyond, the one that was to be asked last is forgotten.
const PLACES_MAX: usize = 16;

/// One place.
pub(super) struct Place {
    pub(super) reference: ImageReference,
    pub(super) store: Arc<dyn BlobStore>,
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

/// All places of an image: a [`BlobStore`] over their stores. There is at least one.
pub(super) struct Places {
    list: Mutex<Vec<Arc<Place>>>,
    /// Of those that were forgotten: bytes received and sent.
    forgotten: Mutex<(u64, u64)>,
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
            traffic,
            health: Health::default(),
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
    pub(super) fn new(first: Place) -> Self {
        Self {
            list: Mutex::new(vec![Arc::new(first)]),
            forgotten: Mutex::default(),
        }
    }

    /// Whether `reference` names a place that is among these.
    pub(super) fn contain(&self, reference: &ImageReference) -> bool {
        self.list()
            .iter()
            .any(|place| place.reference.is_same_place(reference))
    }

    /// Adds a place, to be asked first. One that is there already stays, with what it knows of its server.
    pub(super) fn add(&self, place: Place) {
        let mut list = lock(&self.list);
        let known = list
            .iter()
            .position(|other| other.reference.is_same_place(&place.reference));
        let place = match known {
            Some(known) => list.remove(known),
            None => {
                tracing::info!(place = %place.reference, "an image can be read in another place too");
                Arc::new(place)
            }
        };
        list.insert(0, place);
        if list.len() > PLACES_MAX
            && let Some(last) = list.pop()
        {
            let (received, sent) = last.bytes();
            let mut forgotten = lock(&self.forgotten);
            forgotten.0 += received;
            forgotten.1 += sent;
        }
    }

    /// Where the image is read.
    pub(super) fn reference(&self) -> ImageReference {
        lock(&self.list)[0].reference.clone()
    }

    /// Why the last read of that place failed, if none has succeeded since.
    pub(super) fn trouble(&self) -> Option<String> {
        let first = Arc::clone(&lock(&self.list)[0]);
        lock(&first.health.trouble).clone()
    }

    /// Bytes received and sent for the image, in all places.
    pub(super) fn bytes(&self) -> (u64, u64) {
        let forgotten = *lock(&self.forgotten);
        let all = self.list().into_iter().map(|place| place.bytes());
        all.fold(forgotten, |sum, bytes| (sum.0 + bytes.0, sum.1 + bytes.1))
    }

    fn list(&self) -> Vec<Arc<Place>> {
        lock(&self.list).clone()
    }

    /// Asks `place` first from now on, in place of `failed`: unless another took its place meanwhile.
    fn prefer(&self, place: &Arc<Place>, failed: &Arc<Place>) {
        let mut list = lock(&self.list);
        if !Arc::ptr_eq(&list[0], failed) {
            return;
        }
        let position = list.iter().position(|other| Arc::ptr_eq(other, place));
        if let Some(position) = position {
            list[..=position].rotate_right(1);
            tracing::warn!(
                from = %failed.reference,
                to = %place.reference,
                "an image is read in another place from now on"
            );
        }
    }
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
        let places = self.list();
        let mut troubles = Vec::new();
        let mut last = Ok(false);
        let mut transient = false;
        for place in &places {
            let read = place.store.read_right(blob, offset, into, are_right);
            let trouble = match &read {
                Ok(true) => {
                    place.health.is_well();
                    if !Arc::ptr_eq(place, &places[0]) {
                        self.prefer(place, &places[0]);
                    }
                    return read;
                }
                Ok(false) => format!("its bytes of blob {} are damaged", blob.digest),
                Err(error) => {
                    transient |= error.is_transient();
                    with_causes(error)
                }
            };
            place.health.is_troubled(&trouble);
            troubles.push(format!("{}: {trouble}", place.reference));
            // What one place had wrong, another that cannot be read may have right.
            if last.is_ok() {
                last = read;
            }
        }
        match last {
            Err(_) if places.len() > 1 => Err(BlobError::Unavailable {
                digest: blob.digest,
                reason: troubles.join("; "),
                transient,
            }),
            last => last,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
