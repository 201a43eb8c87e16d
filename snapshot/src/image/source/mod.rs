//! An image of this host as a [`PageSource`]: worker threads read, decode and verify chunks into page files.
//!
//! Chunks are handed out by urgency. A demand costs reading, decompressing, hashing and one write; it never waits
//! for more than the chunks that workers have in hand, and of those at least one is never mere background fill.

mod page_file;
mod queue;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};

use crate::blobs::{Blob, BlobError, BlobStore};
use crate::decode::{ChunkDecoder, DecodeError};
use crate::digest::BlobDigest;
use crate::image::Image;
use crate::index::{Entry, IndexError, IndexReader, StoredChunk};
use crate::source::{Arrived, ChunkFailure, ChunkId, ChunkSink, PageSource, SourceVolume, Urgency, VolumeId};
use crate::units::ByteRange;
use crate::volume::VolumeName;
use page_file::PageFile;
use queue::AskQueue;

/// What an [`ImageSource`] needs to know of its host.
#[derive(Clone, Debug)]
pub struct SourceSettings {
    /// Threads that decode: at least one.
    pub workers: usize,
    /// Where the page files of drives lie, unlinked and sparse: a drive may be larger than RAM. Those of memory are
    /// on tmpfs.
    pub drive_folder: PathBuf,
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

/// Why a chunk could not be delivered.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error(transparent)]
    Index(#[from] IndexError),
    #[error(transparent)]
    Blob(#[from] BlobError),
    #[error("the frame at {frame} of layer {layer} is damaged")]
    Decode {
        layer: BlobDigest,
        frame: ByteRange,
        source: Box<DecodeError>,
    },
    #[error("the page file cannot be written")]
    PageFile(#[source] io::Error),
    #[error("zstd cannot be set up")]
    Decoder(#[source] io::Error),
    #[error("the image has no such volume")]
    NoVolume,
}

impl FetchError {
    /// Whether asking again can help: not when the image's bytes are wrong.
    fn is_transient(&self) -> bool {
        match self {
            Self::Index(IndexError::Blob { source, .. }) | Self::Blob(source) => source.is_transient(),
            Self::Index(_) | Self::Decode { .. } | Self::NoVolume => false,
            // Disk full, memory short: that passes.
            Self::PageFile(_) | Self::Decoder(_) => true,
        }
    }
}

/// A volume of the image while it is being delivered.
struct Volume {
    name: VolumeName,
    layers: Vec<Blob>,
    index: IndexReader,
    pages: PageFile,
    /// One bit a chunk: its bytes are in the page file.
    present: Vec<AtomicU64>,
}

/// What workers and askers share.
struct Shared {
    store: Arc<dyn BlobStore>,
    volumes: Vec<Volume>,
    queue: AskQueue,
    sink: OnceLock<Arc<dyn ChunkSink>>,
}

/// An image directory that delivers its chunks in this process.
pub struct ImageSource {
    volumes: Vec<SourceVolume>,
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl ImageSource {
    /// Makes the page files and starts the workers; nothing is read before it is asked for.
    ///
    /// # Errors
    /// When a page file or a thread cannot be made.
    pub fn new(image: &Image, settings: &SourceSettings) -> Result<Self, SourceError> {
        let mut volumes = Vec::new();
        let mut described = Vec::new();
        for volume in &image.manifest.volumes {
            let (bytes, chunk_size) = (volume.root.volume_bytes(), volume.root.chunk_size());
            described.push(SourceVolume {
                name: volume.name.clone(),
                bytes,
                chunk_size,
            });
            volumes.push(Volume {
                name: volume.name.clone(),
                layers: volume.layers.clone(),
                index: image.index(volume),
                pages: page_file(&volume.name, bytes, settings)?,
                present: (0..volume.root.chunks().div_ceil(64))
                    .map(|_| AtomicU64::new(0))
                    .collect(),
            });
        }
        let store = Arc::clone(&image.store);
        let shared = Arc::new(Shared {
            store,
            volumes,
            queue: AskQueue::default(),
            sink: OnceLock::new(),
        });
        let mut source = Self {
            volumes: described,
            shared,
            workers: Vec::new(),
        };
        for number in 0..settings.workers.max(1) {
            let shared = Arc::clone(&source.shared);
            // One worker keeps itself free for those who wait, unless it is the only one.
            let least = if number == 0 && settings.workers > 1 {
                Urgency::Soon
            } else {
                Urgency::Fill
            };
            let thread = thread::Builder::new().name(format!("chunks-{number}"));
            // If this fails, dropping the source ends those that were started.
            source.workers.push(
                thread
                    .spawn(move || shared.work(least))
                    .map_err(SourceError::Thread)?,
            );
        }
        Ok(source)
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

impl Shared {
    fn work(&self, least: Urgency) {
        let mut hands = Hands::default();
        while let Some(chunk) = self.queue.take(least) {
            let fetched = self.fetch(chunk, &mut hands);
            // Before the sink hears of it: what is asked from then on is answered anew.
            self.queue.done(chunk);
            let Some(sink) = self.sink.get() else { continue };
            match fetched {
                Ok(what) => sink.arrived(chunk, what),
                Err(error) => sink.failed(chunk, self.failure(chunk, &error)),
            }
        }
    }

    fn fetch(&self, id: ChunkId, hands: &mut Hands) -> Result<Arrived, FetchError> {
        let volume = self
            .volumes
            .get(usize::from(id.volume.0))
            .ok_or(FetchError::NoVolume)?;
        if volume.is_present(id) {
            return Ok(Arrived::Data);
        }
        let Entry::Data(stored) = volume.index.entry(id.chunk)? else {
            return Ok(Arrived::Zero);
        };
        let root = volume.index.root();
        let range = root.chunk_size().range_of(id.chunk, root.volume_bytes());
        let plain = hands.decode(self.store.as_ref(), volume, &stored, range.len)?;
        volume
            .pages
            .for_writing()
            .write_all_at(plain, range.start)
            .map_err(FetchError::PageFile)?;
        volume.set_present(id);
        Ok(Arrived::Data)
    }

    fn failure(&self, id: ChunkId, error: &FetchError) -> ChunkFailure {
        let volume = self
            .volumes
            .get(usize::from(id.volume.0))
            .map(|volume| volume.name.to_string());
        let mut reason = format!(
            "{} of {}: {error}",
            id.chunk,
            volume.as_deref().unwrap_or("no volume")
        );
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            reason = format!("{reason}: {cause}");
            source = cause.source();
        }
        ChunkFailure {
            reason,
            transient: error.is_transient(),
        }
    }
}

impl Volume {
    fn present(&self, id: ChunkId) -> Option<(&AtomicU64, u64)> {
        let word = self.present.get(usize::try_from(id.chunk.0 / 64).ok()?)?;
        Some((word, 1 << (id.chunk.0 % 64)))
    }

    fn is_present(&self, id: ChunkId) -> bool {
        // Pairs with the release below: who sees the bit sees the bytes.
        self.present(id)
            .is_some_and(|(word, bit)| word.load(Ordering::Acquire) & bit != 0)
    }

    fn set_present(&self, id: ChunkId) {
        if let Some((word, bit)) = self.present(id) {
            word.fetch_or(bit, Ordering::Release);
        }
    }
}

/// What a worker keeps between chunks.
#[derive(Default)]
struct Hands {
    decoder: Option<ChunkDecoder>,
    frame: Vec<u8>,
    plain: Vec<u8>,
}

impl Hands {
    fn decode(
        &mut self,
        store: &dyn BlobStore,
        volume: &Volume,
        stored: &StoredChunk,
        plain_bytes: u64,
    ) -> Result<&[u8], FetchError> {
        let layer = volume
            .layers
            .get(usize::from(stored.layer.0))
            .ok_or(FetchError::NoVolume)?;
        // Both lengths were capped when the index was parsed: a few MiB at most.
        self.frame.resize(stored.frame.len as usize, 0);
        self.plain.resize(plain_bytes as usize, 0);
        store.read_range(layer, stored.frame.start, &mut self.frame)?;
        let decoder = match &mut self.decoder {
            Some(decoder) => decoder,
            none => none.insert(ChunkDecoder::new().map_err(FetchError::Decoder)?),
        };
        let damaged = |source| FetchError::Decode {
            layer: layer.digest,
            frame: stored.frame,
            source: Box::new(source),
        };
        decoder
            .decode(&self.frame, &stored.digest, &mut self.plain)
            .map_err(damaged)?;
        Ok(&self.plain)
    }
}

fn page_file(volume: &VolumeName, bytes: u64, settings: &SourceSettings) -> Result<PageFile, SourceError> {
    let (made, place) = match volume {
        VolumeName::Memory => (PageFile::in_memory(bytes), "memory".to_owned()),
        VolumeName::Drive(_) => (
            PageFile::in_folder(&settings.drive_folder, bytes),
            settings.drive_folder.display().to_string(),
        ),
    };
    made.map_err(|source| SourceError::PageFile {
        volume: volume.clone(),
        bytes,
        place,
        source,
    })
}
