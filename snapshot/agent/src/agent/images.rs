//! The images that are open: each once, however many machines and names lead to it; dropped when none has for a while.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use runnel_snapshot::causes::with_causes;
use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::image::reference::{ImageReference, Wanted};
use runnel_snapshot::protocol::{Adopt, AgentStatus, Hello, IndexFound, Refused, WantIndex};
use runnel_snapshot::volume::VolumeName;

use super::cache::Cache;
use super::image::{FoundImage, OpenError, OpenImage};
use super::pages::PageFolders;
use super::places::{Rank, written_down};
use super::settings::AgentSettings;

/// Places that are looked for at a time: each takes a thread.
const SOUGHT_MAX: usize = 16;

/// How long a place is given that does not answer, each time.
const SEEK_PAUSES: [Duration; 4] = [
    Duration::ZERO,
    Duration::from_secs(1),
    Duration::from_secs(5),
    Duration::from_secs(30),
];

/// How long machines are given to come back to a new agent. They try each second at least.
const COME_BACK: Duration = Duration::from_secs(3);

/// Images that are remembered because a machine came back for one in vain.
const MISSED_MAX: usize = 1 << 10;

/// The table of open images.
pub(super) struct Images {
    settings: AgentSettings,
    folders: PageFolders,
    cache: Arc<Cache>,
    table: Mutex<Table>,
    /// Told when the agent ends.
    ends: Condvar,
}

struct Table {
    slots: HashMap<BlobDigest, Slot>,
    /// Since when page files without an open image may have been waiting for their machines to come back.
    started: Instant,
    /// When a machine last came back for an image that could not be opened. It has that image's page files, and no others
    /// will do.
    missed: HashMap<BlobDigest, Instant>,
    /// Places in which images that are open are being looked for.
    sought: HashSet<String>,
    ending: bool,
}

struct Slot {
    image: Arc<OpenedOnce>,
    /// Machines that use it, or are about to.
    users: usize,
    unused_since: Instant,
}

/// An image that is opened by the first who wants it, while the others wait.
#[derive(Default)]
struct OpenedOnce {
    door: Mutex<()>,
    image: OnceLock<Arc<OpenImage>>,
}

impl OpenedOnce {
    /// Held by whoever opens it, and waited for by those who want it open.
    fn door(&self) -> MutexGuard<'_, ()> {
        self.door.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An image in use. As long as there is one of these, it is kept.
pub(super) struct Lease {
    images: Arc<Images>,
    pub(super) image: Arc<OpenImage>,
    digest: BlobDigest,
}

impl Images {
    pub(super) fn new(settings: AgentSettings, folders: PageFolders) -> Self {
        Self {
            cache: Arc::new(Cache::new(&settings, &folders)),
            settings,
            folders,
            table: Mutex::new(Table {
                slots: HashMap::new(),
                started: Instant::now(),
                missed: HashMap::new(),
                sought: HashSet::new(),
                ending: false,
            }),
            ends: Condvar::new(),
        }
    }

    /// Opens what a monitor wants.
    pub(super) fn open(self: &Arc<Self>, hello: &Hello) -> Result<Lease, Refused> {
        let refuse = |reason: String, transient| Refused { reason, transient };
        let reference: ImageReference =
            hello
                .image
                .parse()
                .map_err(|error: runnel_snapshot::image::reference::BadReference| {
                    refuse(error.to_string(), false)
                })?;
        let lease = match hello.digest {
            // A machine that runs from it already: whatever the name leads to by now.
            Some(digest) => self.lease_again(&pinned(&reference, digest), digest),
            None => self.lease(&reference),
        };
        lease.map_err(|error| refuse(with_causes(&error), error.is_transient()))
    }

    /// The index of a volume of an image that a machine runs from.
    pub(super) fn index(self: &Arc<Self>, want: &WantIndex) -> Result<(IndexFound, File), Refused> {
        let refuse = |reason: String, transient| Refused { reason, transient };
        let lease = self.lease_open(&want.image);
        // The agent has just been started, and the machines come back to it one by one.
        let lease = lease.ok_or_else(|| refuse(format!("the image {} is not open", want.image), true))?;
        let index = lease.image.index(&want.volume);
        index.map_err(|error| refuse(with_causes(&error), error.is_transient()))
    }

    /// For a machine that begins with what `reference` leads to.
    fn lease(self: &Arc<Self>, reference: &ImageReference) -> Result<Lease, OpenError> {
        let (ImageReference::Directory { wanted, .. } | ImageReference::Remote { wanted, .. }) = reference;
        // What is pinned and open needs no server: it may be away.
        if let Wanted::Pinned(digest) = wanted
            && let Some(lease) = self.lease_open(digest)
        {
            self.look_there_too(reference, *digest, Rank::First);
            return Ok(lease);
        }
        self.lease_found(FoundImage::find(reference, &self.settings)?)
    }

    /// For a machine that comes back, from an earlier agent or this one: where it began may be gone by now.
    fn lease_again(self: &Arc<Self>, began: &ImageReference, digest: BlobDigest) -> Result<Lease, OpenError> {
        if let Some(lease) = self.lease_open(&digest) {
            if !lease.image.is_read_at(began) {
                self.look_there_too(began, digest, Rank::Last);
            }
            return Ok(lease);
        }
        let mut places = written_down(&self.folders.places_of(&digest));
        if !places.iter().any(|place| place.is_same_place(began)) {
            places.push(began.clone());
        }
        let mut failure = None;
        for (number, place) in places.iter().enumerate() {
            match FoundImage::find(&pinned(place, digest), &self.settings)
                .and_then(|found| self.lease_found(found))
            {
                Ok(lease) => {
                    for (_, other) in places.iter().enumerate().filter(|other| other.0 != number) {
                        self.look_there_too(&pinned(other, digest), digest, Rank::Last);
                    }
                    return Ok(lease);
                }
                // Of several failures, the one that may pass.
                Err(error) if failure.as_ref().is_some_and(OpenError::is_transient) => drop(error),
                Err(error) => failure = Some(error),
            }
        }
        self.lock().miss(digest, self.settings.unused_after);
        Err(failure.expect("there is a place at least, and it failed"))
    }

    fn lease_found(self: &Arc<Self>, found: FoundImage) -> Result<Lease, OpenError> {
        let digest = found.digest();
        let slot = self.use_slot(digest);
        // Only those wait here who want the same image.
        let door = slot.door();
        let opened = match slot.image.get() {
            Some(open) => {
                open.found_again(found, Rank::First);
                Ok(Arc::clone(open))
            }
            None => OpenImage::open(found, &self.folders, &self.cache, &self.settings)
                .map(|open| Arc::clone(slot.image.get_or_init(|| open))),
        };
        drop(door);
        match opened {
            Ok(open) => Ok(self.lease_of(open, digest)),
            Err(error) => {
                self.leave_slot(&digest);
                Err(error)
            }
        }
    }

    /// Takes a monitor's file for the page file of an image that no machine runs from yet, and opens the image: if none
    /// comes, it is dropped like any other.
    pub(super) fn adopt(
        self: &Arc<Self>,
        adopt: &Adopt,
        file: File,
        goes_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<(), Refused> {
        let refuse = |reason: String, transient| Refused { reason, transient };
        let reference = adopt.image.parse::<ImageReference>();
        let reference = reference.map_err(|error| refuse(error.to_string(), false))?;
        // Of many machines that come back with the same file, the first brings it.
        if self.cache.has_file(&adopt.digest, &adopt.volume, &file) {
            let (machine, image) = (&adopt.machine, adopt.digest);
            tracing::debug!(machine, %image, volume = %adopt.volume, "a machine's file is the page file already");
            return Ok(());
        }
        if self.cache.has(&adopt.digest, &adopt.volume) {
            let error = OpenError::HasPages(adopt.volume.clone());
            return Err(refuse(error.to_string(), false));
        }
        let found = FoundImage::find(&pinned(&reference, adopt.digest), &self.settings);
        let adopted = found.and_then(|found| self.adopt_for(found, &adopt.volume, file, goes_on));
        let lease = adopted.map_err(|error| refuse(with_causes(&error), error.is_transient()))?;
        let (machine, image) = (&adopt.machine, lease.digest);
        tracing::info!(machine, %image, volume = %adopt.volume, "a machine's file is the page file of an image");
        Ok(())
    }

    fn adopt_for(
        self: &Arc<Self>,
        found: FoundImage,
        volume: &VolumeName,
        file: File,
        goes_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<Lease, OpenError> {
        let digest = found.digest();
        let slot = self.use_slot(digest);
        let lease = {
            // Those who want the image wait here, and find it open with this page file, or open it without.
            let _door = slot.door();
            self.open_with(&slot, found, volume, file, goes_on)
        };
        match lease {
            Ok(open) => Ok(self.lease_of(open, digest)),
            Err(error) => {
                self.leave_slot(&digest);
                Err(error)
            }
        }
    }

    /// Opens the image of a slot, whose door is held, with a file that is the page file of a volume.
    fn open_with(
        &self,
        slot: &OpenedOnce,
        found: FoundImage,
        volume: &VolumeName,
        file: File,
        goes_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<Arc<OpenImage>, OpenError> {
        let digest = found.digest();
        if let Some(open) = slot.image.get()
            && self.cache.has_file(&digest, volume, &file)
        {
            return Ok(Arc::clone(open));
        }
        if slot.image.get().is_some() || self.cache.has(&digest, volume) {
            return Err(OpenError::HasPages(volume.clone()));
        }
        let file = found.adopt(volume, file, goes_on);
        let file = file.map_err(|source| OpenError::Adoption(volume.clone(), Box::new(source)))?;
        self.folders.make_for(&digest);
        self.cache.adopt(&digest, volume, file);
        let opened = OpenImage::open(found, &self.folders, &self.cache, &self.settings);
        if opened.is_err() {
            self.cache.leave_out(&digest, volume);
        }
        opened.map(|open| Arc::clone(slot.image.get_or_init(|| open)))
    }

    fn lease_open(self: &Arc<Self>, digest: &BlobDigest) -> Option<Lease> {
        if !self.lock().slots.contains_key(digest) {
            return None;
        }
        let slot = self.use_slot(*digest);
        drop(slot.door());
        let Some(open) = slot.image.get() else {
            self.leave_slot(digest);
            return None;
        };
        Some(self.lease_of(Arc::clone(open), *digest))
    }

    /// Finds out whether an open image can be read in another place too, in a thread of its own: no machine waits for
    /// that. A place that is sought already is not sought twice.
    fn look_there_too(self: &Arc<Self>, reference: &ImageReference, digest: BlobDigest, rank: Rank) {
        let place = reference.to_string();
        {
            let mut table = self.lock();
            if table.sought.len() >= SOUGHT_MAX {
                return tracing::warn!(
                    place,
                    "an image is not looked for there: {SOUGHT_MAX} others are sought"
                );
            }
            if !table.sought.insert(place.clone()) {
                return;
            }
        }
        let (images, settings) = (Arc::downgrade(self), self.settings.clone());
        let (reference, sought) = (reference.clone(), place.clone());
        let seek = move || {
            for pause in SEEK_PAUSES {
                thread::sleep(pause);
                // The agent may end meanwhile: it is not held up.
                let found = FoundImage::find(&reference, &settings);
                let Some(images) = images.upgrade() else { return };
                if images.has_ended_search(found, &reference, digest, rank) {
                    break;
                }
            }
            if let Some(images) = images.upgrade() {
                images.lock().sought.remove(&sought);
            }
        };
        if let Err(error) = thread::Builder::new().name("seek".to_owned()).spawn(seek) {
            tracing::warn!(place, %error, "an image cannot be looked for in another place");
            self.lock().sought.remove(&place);
        }
    }

    /// Takes what was found to an image that is open; true if nothing is to be looked for any more.
    fn has_ended_search(
        self: &Arc<Self>,
        found: Result<FoundImage, OpenError>,
        reference: &ImageReference,
        digest: BlobDigest,
        rank: Rank,
    ) -> bool {
        let Some(lease) = self.lease_open(&digest) else {
            return true;
        };
        match found {
            Ok(found) => {
                lease.image.found_again(found, rank);
                true
            }
            Err(error) => {
                let is_over = !error.is_transient();
                let error = &error as &dyn std::error::Error;
                tracing::warn!(place = %reference, error, "an image is open, and is not found there too");
                is_over
            }
        }
    }

    /// The lease of a user that has its place in the slot.
    fn lease_of(self: &Arc<Self>, image: Arc<OpenImage>, digest: BlobDigest) -> Lease {
        Lease {
            images: Arc::clone(self),
            image,
            digest,
        }
    }

    fn use_slot(&self, digest: BlobDigest) -> Arc<OpenedOnce> {
        let mut table = self.lock();
        let slot = table.slots.entry(digest).or_insert_with(|| Slot {
            image: Arc::default(),
            users: 0,
            unused_since: Instant::now(),
        });
        slot.users += 1;
        self.cache.used(&digest);
        Arc::clone(&slot.image)
    }

    fn leave_slot(&self, digest: &BlobDigest) {
        if let Some(slot) = self.lock().slots.get_mut(digest) {
            slot.users -= 1;
            slot.unused_since = Instant::now();
            self.cache.left(digest);
        }
    }

    /// Drops what is unused for too long, until the agent ends.
    pub(super) fn keep_tidy(&self) {
        let unused_after = self.settings.unused_after;
        let pause = (unused_after / 4).max(Duration::from_millis(10));
        let mut table = self.lock();
        while !table.ending {
            let waited = self.ends.wait_timeout_while(table, pause, |table| !table.ending);
            table = waited.unwrap_or_else(PoisonError::into_inner).0;
            let dropped = self.drop_unused(&mut table, unused_after);
            if table.started.elapsed() >= unused_after {
                self.drop_left_over(&table, unused_after);
            }
            // Not under the lock: its workers may have to finish a read.
            drop(table);
            drop(dropped);
            table = self.lock();
        }
    }

    /// Takes images out of the table, and their page files away.
    fn drop_unused(&self, table: &mut Table, unused_after: Duration) -> Vec<Slot> {
        let is_unused = |slot: &Slot| slot.users == 0 && slot.unused_since.elapsed() >= unused_after;
        let unused = table.slots.iter().filter(|(_, slot)| is_unused(slot));
        let unused: Vec<BlobDigest> = unused.map(|(digest, _)| *digest).collect();
        for digest in &unused {
            tracing::info!(%digest, "dropping an image that no machine uses");
            self.remove(digest);
        }
        unused
            .iter()
            .filter_map(|digest| table.slots.remove(digest))
            .collect()
    }

    /// Takes away what an earlier agent left, and no machine has come back for.
    fn drop_left_over(&self, table: &Table, unused_after: Duration) {
        let is_wanted = |digest: &BlobDigest| {
            let missed = table.missed.get(digest);
            table.slots.contains_key(digest) || missed.is_some_and(|at| at.elapsed() < unused_after)
        };
        let left = self.folders.images().into_iter();
        for digest in left.filter(|digest| !is_wanted(digest)) {
            tracing::info!(%digest, "removing page files of an earlier agent");
            self.remove(&digest);
        }
    }

    /// Takes an image's page files away.
    fn remove(&self, digest: &BlobDigest) {
        self.folders.remove(digest);
        self.cache.forget(digest);
    }

    /// The agent ends: what no machine uses goes with it, what one does stays for the next agent.
    pub(super) fn end(&self) {
        let dropped = {
            let mut table = self.lock();
            if std::mem::replace(&mut table.ending, true) {
                return;
            }
            let dropped = self.drop_unused(&mut table, Duration::ZERO);
            // Machines may be about to come back for what is left; if they do to the next agent, it is there.
            if table.started.elapsed() >= COME_BACK {
                self.drop_left_over(&table, self.settings.unused_after);
            }
            dropped
        };
        drop(dropped);
        self.ends.notify_all();
    }

    /// What there is to say of all images.
    pub(super) fn status(&self) -> AgentStatus {
        let slots: Vec<_> = self
            .lock()
            .slots
            .values()
            .map(|slot| Arc::clone(&slot.image))
            .collect();
        // One that is being opened has nothing to say yet, and is not waited for.
        let images = slots.iter().filter_map(|slot| slot.image.get());
        let mut images: Vec<_> = images.map(|image| image.status()).collect();
        images.sort_by(|a, b| a.image.cmp(&b.image));
        AgentStatus {
            process: std::process::id(),
            images,
            cache: self.cache.status(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The image of that digest, in the place that `reference` names.
fn pinned(reference: &ImageReference, digest: BlobDigest) -> ImageReference {
    let mut pinned = reference.clone();
    let (ImageReference::Directory { wanted, .. } | ImageReference::Remote { wanted, .. }) = &mut pinned;
    *wanted = Wanted::Pinned(digest);
    pinned
}

impl Table {
    /// A machine has come back for an image, and it cannot be opened.
    fn miss(&mut self, digest: BlobDigest, counts_for: Duration) {
        self.missed.retain(|_, at| at.elapsed() < counts_for);
        if self.missed.len() < MISSED_MAX || self.missed.contains_key(&digest) {
            self.missed.insert(digest, Instant::now());
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.images.leave_slot(&self.digest);
    }
}
