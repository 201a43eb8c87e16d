//! An image as a [`PageSource`]: worker threads read, decode and verify chunks into page files.
//!
//! Chunks are handed out by urgency. A demand costs reading, decompressing, hashing and one write. Background fill has
//! threads of its own, which give way to all others in the queue, on the link and on the processors.

mod cache;
mod chunk_set;
mod fetch;
mod making;
mod page_file;
mod queue;
mod room;

pub use cache::{Fetch, Fetching, HostCache, Uncached};
pub use page_file::{PageFile, TakeOut, is_sealed};

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};

use crate::image::Image;
use crate::image::first_chunks::fits;
use crate::index::IndexError;
use crate::source::{ChunkId, ChunkSink, PageFileLayout, PageSource, SourceVolume, Urgency, VolumeId};
use crate::state::FirstChunk;
use crate::units::ChunkIndex;
use crate::volume::VolumeName;
use cache::Copied;
use chunk_set::ChunkSet;
use fetch::{Shared, Volume};
use queue::{AskQueue, Hand, Rules};
use room::Room;

/// Chunks that are handed out together at most: what waits for the last of them is answered late.
const RUN_CHUNKS_MAX: usize = 64;

/// Recorded chunks that are handed out together: a MiB, for which somebody is likely to wait soon. Where they were laid
/// together that is two requests; where they were not, some of them follow each other, and the others are few.
const RECORDED_CHUNKS_MAX: usize = 16;

/// What an [`ImageSource`] needs to know of its host and its store.
#[derive(Clone, Debug)]
pub struct SourceSettings {
    /// Threads for what somebody waits for: at least one. A store that takes a round trip wants several times the
    /// host's processors.
    pub workers: usize,
    /// Threads for background fill: at least one.
    pub fillers: usize,
    /// Stored bytes of neighbouring chunks that are read at once; 0 for a chunk at a time.
    pub read_bytes_max: u64,
    /// Stored bytes that background fill reads a second.
    pub fill_bytes_per_second: Option<NonZeroU64>,
}

impl SourceSettings {
    /// For an image on this host's disks: as many threads as decode at once.
    #[must_use]
    pub fn local(workers: usize) -> Self {
        Self {
            workers,
            fillers: workers.div_ceil(2),
            read_bytes_max: 0,
            fill_bytes_per_second: None,
        }
    }

    /// For an image that is a round trip away. In flight at once: 20 requests of those who wait, and four of fill, half
    /// a MiB each, which keeps a gigabit of 20 ms busy and a demand from waiting behind more than that.
    ///
    /// What was recorded has half of the workers: a demand finds one that is free, and waits on the link for no more than
    /// it would behind other prefetch.
    #[must_use]
    pub fn remote() -> Self {
        Self {
            workers: 20,
            fillers: 4,
            read_bytes_max: 512 << 10,
            fill_bytes_per_second: None,
        }
    }
}

/// Why an image cannot be a source.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A page file cannot be made.
    #[error("no page file of {bytes} bytes for volume {volume} can be made in {place}")]
    PageFile {
        /// For which volume.
        volume: VolumeName,
        /// How long.
        bytes: u64,
        /// Where.
        place: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// A thread cannot be started.
    #[error("no thread that decodes chunks can be started")]
    Thread(#[source] io::Error),
}

/// An image that delivers its chunks in this process.
pub struct ImageSource {
    volumes: Vec<SourceVolume>,
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// Makes the page file of a volume: its name, its length and how it is cut.
pub type MakePageFile<'a> = dyn Fn(&VolumeName, PageFileLayout) -> Result<Arc<PageFile>, SourceError> + 'a;

impl ImageSource {
    /// Starts the workers over page files without names: those of memory on tmpfs, those of drives in a folder, as a
    /// drive may be larger than RAM. Nothing is read before it is asked for.
    ///
    /// # Errors
    /// When a page file or a thread cannot be made.
    pub fn new(image: &Image, settings: &SourceSettings, drive_folder: &Path) -> Result<Self, SourceError> {
        Self::with_page_files(
            image,
            settings,
            &|volume, layout| unnamed_page_file(volume, layout.volume_bytes, drive_folder).map(Arc::new),
            &(Arc::new(Uncached) as _),
        )
    }

    /// Starts the workers over page files that the caller makes, which are part of `cache`.
    ///
    /// # Errors
    /// When a page file or a thread cannot be made.
    pub fn with_page_files(
        image: &Image,
        settings: &SourceSettings,
        make: &MakePageFile<'_>,
        cache: &Arc<dyn HostCache>,
    ) -> Result<Self, SourceError> {
        let mut volumes = Vec::new();
        let mut described = Vec::new();
        for volume in &image.manifest.volumes {
            let (bytes, chunk_size) = (volume.root.volume_bytes(), volume.root.chunk_size());
            let about = SourceVolume {
                name: volume.name.clone(),
                bytes,
                chunk_size,
            };
            let pages = make(&volume.name, about.layout())?;
            described.push(about);
            volumes.push(Volume {
                name: volume.name.clone(),
                layers: volume.layers.clone(),
                index: image.index(volume),
                pages,
                cache: Arc::clone(cache),
                copied: Copied::default(),
                room: Room::default(),
                present: ChunkSet::new(volume.root.chunks()),
                zeros: ChunkSet::new(volume.root.chunks()),
                first: OnceLock::new(),
            });
        }
        let shared = Arc::new(Shared {
            store: Arc::clone(&image.store),
            volumes,
            queue: AskQueue::new(settings.rules()),
            read_bytes_max: settings.read_bytes_max,
            sink: OnceLock::new(),
        });
        let mut source = Self {
            volumes: described,
            shared,
            workers: Vec::new(),
        };
        let workers = (0..settings.workers.max(1)).map(|number| (format!("chunks-{number}"), Hand::Worker));
        let fillers =
            (0..settings.fillers.max(1)).map(|number| (format!("fill-{number}"), Hand::Filler(number)));
        for (name, hand) in workers.chain(fillers) {
            let shared = Arc::clone(&source.shared);
            let thread = thread::Builder::new().name(name).spawn(move || shared.work(hand));
            // If this fails, dropping the source ends those that were started.
            source.workers.push(thread.map_err(SourceError::Thread)?);
        }
        Ok(source)
    }

    /// Takes entries of the index that came with the machine state, so that these chunks wait for no segment. Those
    /// that make no sense are left to the index. Only the first call counts.
    pub fn learn(&self, first_chunks: &[FirstChunk]) {
        for volume in &self.shared.volumes {
            let layer_bytes: Vec<u64> = volume.layers.iter().map(|layer| layer.bytes).collect();
            let makes_sense = |first: &&FirstChunk| {
                first.volume == volume.name && fits(first, volume.index.root(), &layer_bytes)
            };
            let entries = first_chunks.iter().filter(makes_sense);
            let entries = entries.map(|first| (first.chunk, first.entry.clone())).collect();
            // A second time changes nothing.
            let _ = volume.first.set(entries);
        }
    }

    /// The volumes whose last chunk could not be kept, and why: a full file system, most often.
    pub fn trouble(&self) -> impl Iterator<Item = (&VolumeName, io::Error)> {
        let volumes = self.shared.volumes.iter();
        volumes.filter_map(|volume| Some((&volume.name, volume.room.trouble()?)))
    }

    /// Chunks that were copied from page files of other images, and the stored bytes that were not fetched for them.
    #[must_use]
    pub fn copied(&self) -> (u64, u64) {
        let volumes = self.shared.volumes.iter().map(|volume| volume.copied.read());
        volumes.fold((0, 0), |sum, more| (sum.0 + more.0, sum.1 + more.1))
    }

    /// Reads the part of the index that tells of `chunk`, unless it is at hand.
    ///
    /// # Errors
    /// When the image has no such chunk, or the index cannot be had.
    pub fn read_index_at(&self, volume: VolumeId, chunk: ChunkIndex) -> Result<(), IndexError> {
        match self.shared.volumes.get(usize::from(volume.0)) {
            Some(volume) => volume.index.entry(chunk).map(drop),
            None => Ok(()),
        }
    }

    /// Reads the index of every volume around `chunk` or from its start, for as long as `goes_on` says so: that of
    /// `chunk.volume` first.
    ///
    /// # Errors
    /// When a part of it cannot be had: the first such error. The other volumes are read all the same.
    pub fn read_index_ahead(&self, chunk: ChunkId, goes_on: &dyn Fn() -> bool) -> Result<(), IndexError> {
        let first = usize::from(chunk.volume.0);
        let others = (0..self.shared.volumes.len()).filter(|number| *number != first);
        let mut result = Ok(());
        for number in std::iter::once(first).chain(others) {
            let start = if number == first {
                chunk.chunk
            } else {
                ChunkIndex(0)
            };
            if let Some(volume) = self.shared.volumes.get(number) {
                result = result.and(volume.index.read_ahead(start, goes_on));
            }
        }
        result
    }
}

impl SourceSettings {
    fn rules(&self) -> Rules {
        Rules {
            run_max: if self.read_bytes_max == 0 {
                1
            } else {
                RUN_CHUNKS_MAX
            },
            recorded_run_max: if self.read_bytes_max == 0 {
                1
            } else {
                RECORDED_CHUNKS_MAX
            },
            recorded_hands_max: self.workers / 2,
            fill_bytes_per_second: self.fill_bytes_per_second,
        }
    }
}

impl PageSource for ImageSource {
    fn volumes(&self) -> &[SourceVolume] {
        &self.volumes
    }

    fn page_file(&self, volume: VolumeId) -> Arc<File> {
        self.shared.volumes[usize::from(volume.0)].pages.for_reading()
    }

    fn deliver_to(&self, sink: Arc<dyn ChunkSink>) {
        assert!(
            self.shared.sink.set(sink).is_ok(),
            "chunks are delivered to one sink"
        );
    }

    fn ask(&self, chunks: &[ChunkId], urgency: Urgency) {
        self.shared.queue.ask(chunks, urgency);
    }

    fn cancel(&self, chunks: &[ChunkId]) {
        self.shared.queue.cancel(chunks);
    }
}

impl Drop for ImageSource {
    fn drop(&mut self) {
        self.shared.queue.close();
        for worker in self.workers.drain(..) {
            // A worker that panicked said so already.
            let _ = worker.join();
        }
    }
}

fn unnamed_page_file(volume: &VolumeName, bytes: u64, drive_folder: &Path) -> Result<PageFile, SourceError> {
    let (made, place) = match volume {
        VolumeName::Memory => (PageFile::in_memory(bytes), "memory".to_owned()),
        VolumeName::Drive(_) => (
            PageFile::in_folder(drive_folder, bytes),
            drive_folder.display().to_string(),
        ),
    };
    made.map_err(|source| SourceError::PageFile {
        volume: volume.clone(),
        bytes,
        place,
        source,
    })
}
