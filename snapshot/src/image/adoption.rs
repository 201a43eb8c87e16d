//! A file that somebody else made, taken for the page file of an image's volume: the memory of a machine that the image was
//! made of, most often, so that its clones share it with the machine.
//!
//! Nothing about it is believed. It must be sealed, so that nobody can change what was looked at, and every chunk is held
//! against the image before anybody maps a byte of it: a page that is in a page file is mapped without a question.

use std::fs::File;
use std::io;
use std::num::NonZero;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::Image;
use super::chunk_reader::{ChunkError, ChunkReader};
use super::manifest::ImageVolume;
use super::source::PageFile;
use crate::digest::ChunkDigest;
use crate::index::{Entry, IndexError, IndexReader};
use crate::layer::frame::is_zero;
use crate::source::PageFileLayout;
use crate::units::{ByteRange, ChunkIndex};
use crate::volume::VolumeName;

/// Threads that hold chunks against their digests.
const WORKERS_MAX: usize = 4;

/// Chunks that a thread takes at a time.
const BATCH: u64 = 64;

/// Why a file cannot be a page file. Nothing of it is used.
#[derive(Debug, thiserror::Error)]
pub enum AdoptionError {
    /// The image.
    #[error("the image has no volume {0}")]
    NoVolume(VolumeName),
    /// It is no memfd that nobody can change, or cannot be looked at.
    #[error("the file is no sealed memory of {bytes} bytes")]
    File {
        /// How long it must be.
        bytes: u64,
        /// What is wrong with it.
        #[source]
        source: io::Error,
    },
    /// A part of the image's index cannot be had.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// A chunk of the image cannot be had.
    #[error("{chunk} of the image cannot be read")]
    Chunk {
        /// Which.
        chunk: ChunkIndex,
        /// Why.
        #[source]
        source: Box<ChunkError>,
    },
    /// A chunk of the file cannot be read.
    #[error("{chunk} of the file cannot be read")]
    Read {
        /// Which.
        chunk: ChunkIndex,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is not the image's.
    #[error("the file holds something else than the image in {0}")]
    Differs(ChunkIndex),
    /// It is not wanted any more.
    #[error("it was called off")]
    CalledOff,
}

/// Takes `file` for the page file of the volume `name`, for as long as `goes_on` says so. It is read whole.
///
/// # Errors
/// When it is not sealed against everything, or not the volume byte for byte.
pub fn adopt(
    image: &Image,
    name: &VolumeName,
    file: File,
    goes_on: &(dyn Fn() -> bool + Sync),
) -> Result<PageFile, AdoptionError> {
    let volume = image.volume(name);
    let volume = volume.ok_or_else(|| AdoptionError::NoVolume(name.clone()))?;
    let layout = volume.as_source().layout();
    let file = PageFile::sealed(file, layout).map_err(|source| AdoptionError::File {
        bytes: layout.volume_bytes,
        source,
    })?;
    let inspection = Inspection {
        image,
        volume,
        index: image.index(volume),
        layout,
        file: &file,
        goes_on,
        next: AtomicU64::new(0),
        is_over: AtomicBool::new(false),
        failure: Mutex::new(None),
    };
    inspection.run()?;
    Ok(file)
}

/// A file being held against a volume.
struct Inspection<'a> {
    image: &'a Image,
    volume: &'a ImageVolume,
    index: IndexReader,
    layout: PageFileLayout,
    file: &'a PageFile,
    goes_on: &'a (dyn Fn() -> bool + Sync),
    /// The first chunk that nobody has taken.
    next: AtomicU64,
    is_over: AtomicBool,
    failure: Mutex<Option<AdoptionError>>,
}

impl Inspection<'_> {
    fn run(self) -> Result<(), AdoptionError> {
        let workers = thread::available_parallelism().map_or(1, NonZero::get);
        thread::scope(|scope| {
            for _ in 1..workers.min(WORKERS_MAX) {
                // This thread does it alone if it must.
                let _ = thread::Builder::new().spawn_scoped(scope, || self.work());
            }
            self.work();
        });
        match self.failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }

    fn work(&self) {
        let mut hands = Hands::default();
        while let Some(batch) = self.take() {
            for chunk in batch.map(ChunkIndex) {
                if let Err(error) = self.look_at(chunk, &mut hands) {
                    self.is_over.store(true, Ordering::Relaxed);
                    let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
                    failure.get_or_insert(error);
                    return;
                }
            }
        }
    }

    fn take(&self) -> Option<std::ops::Range<u64>> {
        let first = self.next.fetch_add(BATCH, Ordering::Relaxed);
        let chunks = self.layout.chunks();
        let is_wanted = first < chunks && !self.is_over.load(Ordering::Relaxed);
        is_wanted.then(|| first..chunks.min(first + BATCH))
    }

    fn look_at(&self, chunk: ChunkIndex, hands: &mut Hands) -> Result<(), AdoptionError> {
        if !(self.goes_on)() {
            return Err(AdoptionError::CalledOff);
        }
        let range = self.layout.range_of(chunk);
        let entry = self.index.entry(chunk)?;
        // A hole is zeros.
        if matches!(entry, Entry::Zero) && !self.file.has_data(range) {
            return Ok(());
        }
        let failed = |source| AdoptionError::Read { chunk, source };
        // The length of a chunk was capped when the index was parsed.
        hands.found.resize(range.len as usize, 0);
        self.file.read(range.start, &mut hands.found).map_err(failed)?;
        let is_right = match &entry {
            Entry::Zero => is_zero(&hands.found),
            Entry::Data(stored) => ChunkDigest::of(&hands.found) == stored.digest,
            // Nobody knows the digest of all of it.
            Entry::Parts(_) => {
                hands.wanted.resize(range.len as usize, 0);
                let (store, layers) = (self.image.store.as_ref(), &self.volume.layers);
                let read = hands.reader.read(store, layers, &entry, &mut hands.wanted);
                read.map_err(|source| AdoptionError::Chunk {
                    chunk,
                    source: Box::new(source),
                })?;
                hands.found == hands.wanted
            }
        };
        if !is_right {
            return Err(AdoptionError::Differs(chunk));
        }
        match entry {
            Entry::Zero => Ok(()),
            // What the machine never touched of a chunk is a hole, and could not be mapped by page.
            _ => self.file.fill_holes(range).map_err(failed),
        }
    }
}

/// What a thread keeps between chunks.
#[derive(Default)]
struct Hands {
    found: Vec<u8>,
    wanted: Vec<u8>,
    reader: ChunkReader,
}

impl PageFileLayout {
    fn range_of(&self, chunk: ChunkIndex) -> ByteRange {
        self.chunk_size.range_of(chunk, self.volume_bytes)
    }
}
