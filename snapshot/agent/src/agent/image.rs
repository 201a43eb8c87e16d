//! One image, open, for all machines of the host that run from it.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

use runnel_snapshot::blobs::{BlobError, BlobStore as _};
use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::image::adoption::{AdoptionError, adopt};
use runnel_snapshot::image::layout::{Layout, LayoutError};
use runnel_snapshot::image::manifest::{ImageManifest, MANIFEST_BYTES_MAX, URL_BYTES_MAX, URLS_MAX};
use runnel_snapshot::image::reference::{ImageReference, Wanted};
use runnel_snapshot::image::source::{HostCache, ImageSource, PageFile, SourceError};
use runnel_snapshot::image::{Image, ImageError};
use runnel_snapshot::index::IndexError;
use runnel_snapshot::protocol::{ImageStatus, IndexFound, Opened, OpenedVolume, VOLUMES_MAX};
use runnel_snapshot::source::{ChunkId, PageSource, Urgency, VolumeId};
use runnel_snapshot::state::{MachineState, StateError};
use runnel_snapshot::volume::VolumeName;
use rustix::fs::{MemfdFlags, SealFlags};

use super::cache::Cache;
use super::fan_out::{FanOut, MachineNumber};
use super::line::Line;
use super::pages::PageFolders;
use super::places::{Place, Places, Rank};
use super::settings::AgentSettings;
use crate::remote::{RemoteError, RemoteImage, ThinBlobs};

/// Who asks for an image's first chunks before any machine does.
const NOBODY: MachineNumber = MachineNumber(0);

/// Why an image cannot be opened.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    #[error(transparent)]
    Remote(#[from] RemoteError),
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("the machine state cannot be read")]
    State(#[source] BlobError),
    #[error(transparent)]
    BadState(#[from] StateError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("the image has {0} volumes, and {VOLUMES_MAX} can be handed on")]
    TooManyVolumes(usize),
    #[error("the image's documents cannot be handed on")]
    Document(#[source] std::io::Error),
    #[error("the file cannot be taken for {0} of the image")]
    Adoption(VolumeName, #[source] Box<AdoptionError>),
    #[error("there is a page file for {0} of the image already")]
    HasPages(VolumeName),
}

/// The longest index that is fetched for a diff: that of a volume of some hundred GiB.
const INDEX_BYTES_MAX: u64 = 256 << 20;

/// Why an index cannot be handed on.
#[derive(Debug, thiserror::Error)]
pub(super) enum IndexNotHad {
    #[error("the image has no such volume")]
    NoVolume,
    #[error("it has {0} bytes, and at most {INDEX_BYTES_MAX} are fetched")]
    TooLarge(u64),
    #[error(transparent)]
    Blob(#[from] BlobError),
    #[error("it cannot be handed on")]
    Document(#[source] std::io::Error),
}

impl IndexNotHad {
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Blob(error) => error.is_transient(),
            Self::Document(_) => true,
            Self::NoVolume | Self::TooLarge(_) => false,
        }
    }
}

impl OpenError {
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Remote(error) => error.is_transient(),
            Self::State(error) | Self::Image(ImageError::Blob(error)) => error.is_transient(),
            Self::Document(_) => true,
            _ => false,
        }
    }
}

/// An image that was found: its manifest was read, nothing else.
pub(super) struct FoundImage {
    place: Place,
    image: Image,
    manifest: Vec<u8>,
}

impl FoundImage {
    /// Reads the manifest that `reference` leads to.
    pub(super) fn find(reference: &ImageReference, settings: &AgentSettings) -> Result<Self, OpenError> {
        match reference {
            ImageReference::Remote { base, name, wanted } => {
                let found = RemoteImage::open(base, name, wanted, settings.remote.clone())?;
                let traffic = Some(Arc::clone(found.blobs.traffic()));
                let place = Place::new(reference.clone(), found.image.store.clone(), traffic);
                Ok(Self {
                    place: place.with_blobs_at(found.blobs.before_digits()),
                    image: found.image,
                    manifest: found.manifest,
                })
            }
            ImageReference::Directory { path, wanted } => {
                let layout = Layout::open(path)?;
                let blob = layout.choose(wanted)?;
                let manifest = layout.read(&blob, MANIFEST_BYTES_MAX)?;
                // By its digest: another may have been published under the name by now.
                let (mut image, away) = Image::open_thin(path, &Wanted::Pinned(blob.digest))?;
                let mut traffic = None;
                if !away.is_empty() {
                    let thin = ThinBlobs::open(&image, &away, &settings.remote)?;
                    traffic = Some(Arc::clone(thin.traffic()));
                    image.store = Arc::new(thin);
                }
                Ok(Self {
                    place: Place::new(reference.clone(), Arc::clone(&image.store), traffic),
                    image,
                    manifest,
                })
            }
        }
    }

    pub(super) fn digest(&self) -> BlobDigest {
        self.image.digest()
    }

    /// Takes a file for the page file of a volume, once all of it was held against the image.
    pub(super) fn adopt(
        &self,
        volume: &VolumeName,
        file: File,
        goes_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<PageFile, AdoptionError> {
        adopt(&self.image, volume, file, goes_on)
    }
}

/// An open image.
pub(super) struct OpenImage {
    digest: BlobDigest,
    places: Arc<Places>,
    cache: Arc<Cache>,
    source: ImageSource,
    waiting: Arc<FanOut>,
    /// Held while chunks are asked for or let go, with the table of who waits for them: so that nobody lets go of
    /// what another has just asked for.
    asking: Mutex<()>,
    /// What a resumed machine touches first: asked for when the image is opened.
    first: HashSet<ChunkId>,
    /// What machines touched first when that was recorded, in order: known soon after the image is open, and asked for on
    /// behalf of every machine.
    recorded: OnceLock<Vec<ChunkId>>,
    /// The index is being read ahead, or was.
    index_ahead: AtomicBool,
    /// The folder of each volume's page file.
    kept_in: HashMap<VolumeName, PathBuf>,
    state: File,
    manifest: File,
    about: Arc<ImageManifest>,
}

impl OpenImage {
    /// Reads the machine state, and asks for the chunks that a resumed machine touches first: no machine has to.
    pub(super) fn open(
        found: FoundImage,
        folders: &PageFolders,
        cache: &Arc<Cache>,
        settings: &AgentSettings,
    ) -> Result<Arc<Self>, OpenError> {
        let FoundImage {
            place,
            mut image,
            manifest,
        } = found;
        let volumes = image.manifest.volumes.len();
        if volumes > VOLUMES_MAX {
            return Err(OpenError::TooManyVolumes(volumes));
        }
        let digest = image.digest();
        let how = settings.source(place.traffic.is_some());
        let state = image.state_bytes().map_err(OpenError::State)?;
        let first_chunks = MachineState::decode(&state)?.first_chunks;
        let places = Arc::new(Places::new(place, folders.places_of(&digest)));
        image.store = Arc::clone(&places) as _;
        let make_page_file = |volume: &_, layout| {
            let make = || folders.page_file(&digest, volume, layout);
            cache.page_file(&digest, volume, layout, make)
        };
        let host_cache: Arc<dyn HostCache> = Arc::clone(cache) as _;
        let source = ImageSource::with_page_files(&image, &how, &make_page_file, &host_cache)?;
        places.write_down();
        source.learn(&first_chunks);
        let waiting = Arc::new(FanOut::default());
        source.deliver_to(Arc::clone(&waiting) as _);
        let first: Vec<ChunkId> = first_chunks
            .iter()
            .filter_map(|first| {
                let mut volumes = image.manifest.volumes.iter();
                let position = volumes.position(|volume| volume.name == first.volume)?;
                Some(ChunkId {
                    volume: VolumeId(u16::try_from(position).ok()?),
                    chunk: first.chunk,
                })
            })
            .collect();
        let names = image.manifest.volumes.iter().map(|volume| &volume.name);
        let open = Arc::new(Self {
            digest,
            places,
            cache: Arc::clone(cache),
            waiting,
            asking: Mutex::new(()),
            first: first.iter().copied().collect(),
            recorded: OnceLock::new(),
            index_ahead: AtomicBool::new(false),
            kept_in: names
                .map(|name| (name.clone(), folders.folder_of(name)))
                .collect(),
            state: document("state", &state).map_err(OpenError::Document)?,
            manifest: document("manifest", &manifest).map_err(OpenError::Document)?,
            about: Arc::clone(&image.manifest),
            source,
        });
        open.go_ahead(first);
        open.fetch_recorded(image);
        Ok(open)
    }

    /// Reads the image's working set, and asks for its chunks: no machine can, as none reads it. One that cannot be used
    /// costs no machine more than the time that it would have saved.
    fn fetch_recorded(self: &Arc<Self>, image: Image) {
        if image.manifest.working_set.is_none() {
            return;
        }
        let open = Arc::clone(self);
        in_background("recorded", move || {
            let chunks = image.recorded_chunks();
            tracing::debug!(chunks = chunks.len(), image = %open.digest, "the working set of an image is known");
            let _asking = open.lock();
            let chunks = open.recorded.get_or_init(|| chunks);
            for machine in open.waiting.numbers() {
                open.waiting.expect(machine, chunks);
            }
            if open.waiting.machines() > 0 {
                open.source.ask(chunks, Urgency::Recorded);
            }
        });
    }

    /// Fetches the first chunks, and then the parts of the index around them, which the next ones wait for.
    fn go_ahead(self: &Arc<Self>, first: Vec<ChunkId>) {
        if first.is_empty() {
            return;
        }
        self.ask(NOBODY, &first, Urgency::Demand);
        let image = Arc::clone(self);
        in_background("ahead", move || {
            // Not at once: a machine starts with the chunks alone, and the link is theirs until then.
            image.waiting.wait_until_answered(NOBODY, &first);
            let read = |chunk: ChunkId| image.source.read_index_at(chunk.volume, chunk.chunk);
            tell_of_index(&first.into_iter().map(read).fold(Ok(()), Result::and));
        });
    }

    /// Reads the index, which is small beside what it tells of, once a machine goes where it has not been: what it
    /// touches from here on then takes one round trip, not the several of a first touch in a part of its own.
    fn read_index_ahead(self: &Arc<Self>, chunk: ChunkId) {
        if self.index_ahead.swap(true, Ordering::Relaxed) {
            return;
        }
        let image = Arc::clone(self);
        in_background("ahead", move || {
            let is_wanted = || image.waiting.machines() > 0;
            let read = image.source.read_index_ahead(chunk, &is_wanted);
            if read.is_err() || !is_wanted() {
                // The next machine that goes somewhere new has it tried again.
                image.index_ahead.store(false, Ordering::Relaxed);
            }
            tell_of_index(&read);
        });
    }

    /// Whether it is known that `reference` leads to this image.
    pub(super) fn is_read_at(&self, reference: &ImageReference) -> bool {
        self.places.contain(reference)
    }

    /// It was found in a place.
    pub(super) fn found_again(&self, found: FoundImage, rank: Rank) {
        self.places.add(found.place, rank);
    }

    /// What a monitor is told of the image.
    pub(super) fn opened(&self) -> Opened {
        let volumes = self.source.volumes().iter().map(|volume| OpenedVolume {
            name: volume.name.clone(),
            bytes: volume.bytes,
            chunk_size: volume.chunk_size,
        });
        Opened {
            digest: self.digest,
            volumes: volumes.collect(),
        }
    }

    /// Calls `send` with the descriptors that go with it: state, manifest, a page file a volume.
    pub(super) fn with_files<T>(&self, send: impl FnOnce(&[BorrowedFd<'_>]) -> T) -> T {
        let volumes = 0..self.source.volumes().len();
        let pages: Vec<Arc<File>> = volumes
            .map(|number| self.source.page_file(VolumeId(number as u16)))
            .collect();
        let mut files = vec![self.state.as_fd(), self.manifest.as_fd()];
        files.extend(pages.iter().map(|file| file.as_fd()));
        send(&files)
    }

    /// The index of a volume, whole, for a diff that lies over it; and where others can read the image's blobs.
    pub(super) fn index(&self, volume: &VolumeName) -> Result<(IndexFound, File), IndexNotHad> {
        let mut volumes = self.about.volumes.iter();
        let volume = volumes
            .find(|found| found.name == *volume)
            .ok_or(IndexNotHad::NoVolume)?;
        let blob = volume.index;
        if blob.bytes > INDEX_BYTES_MAX {
            return Err(IndexNotHad::TooLarge(blob.bytes));
        }
        let mut bytes = vec![0; blob.bytes as usize]; // at most INDEX_BYTES_MAX
        let mut are_right = |bytes: &[u8]| BlobDigest::of(bytes) == blob.digest;
        if !self.places.read_right(&blob, 0, &mut bytes, &mut are_right)? {
            let found = BlobDigest::of(&bytes);
            let digest = blob.digest;
            return Err(BlobError::Corrupt { digest, found }.into());
        }
        let file = document("index", &bytes).map_err(IndexNotHad::Document)?;
        let mut blobs_at = self.places.blobs_at();
        blobs_at.retain(|url| url.len() <= URL_BYTES_MAX);
        blobs_at.truncate(URLS_MAX);
        Ok((IndexFound { blobs_at }, file))
    }

    /// A machine comes. It is told of what was recorded as that arrives, or of what has, so that a touch of it finds all
    /// of a chunk.
    pub(super) fn join(&self, machine: MachineNumber, line: Arc<Line>) {
        let _asking = self.lock();
        self.waiting.join(machine, line);
        if let Some(chunks) = self.recorded.get() {
            self.waiting.expect(machine, chunks);
            self.source.ask(chunks, Urgency::Recorded);
        }
    }

    /// A machine is gone.
    pub(super) fn leave(&self, machine: MachineNumber) {
        let _asking = self.lock();
        self.source.cancel(&self.waiting.leave(machine));
    }

    /// A machine wants chunks.
    pub(super) fn ask(self: &Arc<Self>, machine: MachineNumber, chunks: &[ChunkId], urgency: Urgency) {
        {
            let _asking = self.lock();
            self.waiting.expect(machine, chunks);
            self.source.ask(chunks, urgency);
        }
        let new = chunks.iter().find(|chunk| !self.first.contains(chunk));
        if let (Urgency::Demand, Some(new)) = (urgency, new) {
            self.read_index_ahead(*new);
        }
    }

    /// A machine wants chunks no more.
    pub(super) fn cancel(&self, machine: MachineNumber, chunks: &[ChunkId]) {
        let _asking = self.lock();
        self.source.cancel(&self.waiting.forget(machine, chunks));
    }

    /// What there is to say of it.
    pub(super) fn status(&self) -> ImageStatus {
        let (bytes_received, bytes_sent) = self.places.bytes();
        let (chunks_copied, bytes_saved) = self.source.copied();
        ImageStatus {
            image: self.places.reference().to_string(),
            digest: self.digest,
            machines: self.waiting.machines() as u64,
            bytes_received,
            bytes_sent,
            bytes_kept: self.cache.bytes_of(&self.digest),
            adopted: self.cache.adopted(&self.digest),
            chunks_copied,
            bytes_saved,
            trouble: self.places.trouble(),
            unkept: self.unkept(),
        }
    }

    fn unkept(&self) -> Option<String> {
        let unkept = self.source.trouble().map(|(volume, error)| {
            let folder = self.kept_in.get(volume).map(|folder| folder.display());
            match folder {
                Some(folder) => format!("{volume} in {folder}: {error}"),
                None => format!("{volume}: {error}"),
            }
        });
        let unkept: Vec<String> = unkept.collect();
        (!unkept.is_empty()).then(|| unkept.join("; "))
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.asking.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does something in a thread of its own that no machine waits for.
fn in_background(name: &str, work: impl FnOnce() + Send + 'static) {
    if let Err(error) = thread::Builder::new().name(name.to_owned()).spawn(work) {
        tracing::debug!(%error, "nothing is read ahead");
    }
}

/// What of an index cannot be read ahead is read again by whoever needs it, and told to them.
fn tell_of_index(read: &Result<(), IndexError>) {
    if let Err(error) = read {
        let error = error as &dyn std::error::Error;
        tracing::debug!(error, "an index cannot be read ahead");
    }
}

/// A file without a name that nobody can change, whoever it is handed to.
fn document(name: &str, bytes: &[u8]) -> std::io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file: File = rustix::fs::memfd_create(format!("runnel-{name}"), flags)?.into();
    file.write_all(bytes)?;
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    rustix::fs::fcntl_add_seals(&file, seals)?;
    Ok(file)
}
