//! Images that lie over each other, beside the plain volume that the last of them stands for.

#![allow(
    dead_code,
    reason = "each test file is a program of its own and uses what it needs"
)]

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, mpsc};

use runnel_snapshot::blobs::{Blob, BlobError, BlobStore};
use runnel_snapshot::capture::content::{Content, Found};
use runnel_snapshot::capture::{CaptureError, CaptureSettings, Captured, Job, VolumeSource};
use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::image::Image;
use runnel_snapshot::image::below::BelowImage;
use runnel_snapshot::image::layout::Layout;
use runnel_snapshot::image::reference::Wanted;
use runnel_snapshot::image::source::{ImageSource, SourceSettings};
use runnel_snapshot::pager::PageSet;
use runnel_snapshot::source::{Arrived, ChunkFailure, ChunkId, ChunkSink, PageSource, Urgency, VolumeId};
use runnel_snapshot::state::{FirstChunk, MachineState};
use runnel_snapshot::units::{ByteRange, ChunkIndex, ChunkSize, PAGE_SIZE, PageIndex};
use runnel_snapshot::verify::{Finding, VerifyProgress, verify};
use runnel_snapshot::volume::VolumeName;
use tempfile::TempDir;

use crate::fixture::open;

const PAGE: usize = PAGE_SIZE as usize;

/// The bytes of a page, different for each seed; zeros for 0.
pub(crate) fn page_of(seed: u8) -> Vec<u8> {
    let byte = |at: usize| if seed == 0 { 0 } else { seed ^ (at / 50) as u8 };
    (0..PAGE).map(byte).collect()
}

/// A volume each of whose pages can be read once, like that of a machine that runs.
struct ReadOnce {
    volume: Vec<u8>,
    read: Mutex<PageSet>,
}

impl ReadOnce {
    fn new(volume: Vec<u8>) -> Self {
        let read = Mutex::new(PageSet::new(volume.len().div_ceil(PAGE) as u64));
        Self { volume, read }
    }
}

impl Content for ReadOnce {
    fn bytes(&self) -> u64 {
        self.volume.bytes()
    }

    fn next_data(&self, from: u64) -> io::Result<Option<ByteRange>> {
        self.volume.next_data(from)
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Found> {
        let first = PageIndex::holding(offset);
        let count = (offset + into.len() as u64).div_ceil(PAGE_SIZE) - first.0;
        let mut read = self.read.lock().unwrap();
        if read.run_at(first, count) != (false, count) {
            return Err(io::Error::other("a page is read again"));
        }
        read.insert_run(first, count);
        self.volume.read(offset, into)
    }
}

/// So many pages from `first` on are written.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) first: usize,
    pub(crate) count: usize,
    pub(crate) seed: u8,
}

pub(crate) struct Chain {
    folder: TempDir,
    chunk_size: ChunkSize,
    /// What the last image stands for.
    pub(crate) volume: Vec<u8>,
    /// Chunks of memory whose places go into the state.
    pub(crate) first_chunks: Vec<u64>,
    images: usize,
    /// Whether all pages are named as changed, to be held against the digests below.
    pub(crate) compares: bool,
}

impl Chain {
    /// Begins with an image of a full layer.
    pub(crate) fn new(chunk_size: ChunkSize, volume: Vec<u8>) -> Self {
        let chain = Self {
            folder: tempfile::tempdir().unwrap(),
            chunk_size,
            volume,
            first_chunks: Vec::new(),
            images: 1,
            compares: false,
        };
        let source = VolumeSource::Content(Arc::new(chain.volume.clone()));
        chain.run(source, &chain.path()).unwrap();
        chain
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The last image.
    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join((self.images - 1).to_string())
    }

    pub(crate) fn image(&self) -> Image {
        open(&self.path()).unwrap()
    }

    /// Changes the volume, and puts an image of what changed over the last one.
    pub(crate) fn step(&mut self, changes: &[Change]) {
        let mut changed = PageSet::new(self.volume.len().div_ceil(PAGE) as u64);
        for change in changes {
            changed.insert_run(PageIndex(change.first as u64), change.count as u64);
            let bytes = (change.first * PAGE..self.volume.len())
                .step_by(PAGE)
                .take(change.count);
            for at in bytes {
                let end = self.volume.len().min(at + PAGE);
                self.volume[at..end].copy_from_slice(&page_of(change.seed)[..end - at]);
            }
        }
        if self.compares {
            changed.insert_run(PageIndex(0), changed.pages());
        }
        let next = self.folder.path().join(self.images.to_string());
        self.capture(&next, Arc::new(ReadOnce::new(self.volume.clone())), changed)
            .unwrap();
        self.images += 1;
    }

    /// Puts an image over the last one, without taking it into the chain.
    pub(crate) fn capture(
        &self,
        target: &Path,
        content: Arc<dyn Content>,
        changed: PageSet,
    ) -> Result<Captured, CaptureError> {
        self.job(content, changed)
            .run(target, MachineState::new(0, Vec::new()))
    }

    pub(crate) fn job(&self, content: Arc<dyn Content>, changed: PageSet) -> Job {
        let layout = Arc::new(Layout::open(&self.path()).unwrap());
        let base = self.image().manifest.volumes[0].clone();
        let source = VolumeSource::Changes {
            content,
            changed,
            compares: self.compares,
            below: BelowImage::whole(layout),
            base,
        };
        self.job_of(source).with_parent(self.image().digest())
    }

    /// The volume of the last image as it is.
    pub(crate) fn unchanged(&self) -> VolumeSource {
        VolumeSource::Unchanged {
            below: BelowImage::whole(Arc::new(Layout::open(&self.path()).unwrap())),
            volume: self.image().manifest.volumes[0].clone(),
        }
    }

    fn run(&self, source: VolumeSource, target: &Path) -> Result<Captured, CaptureError> {
        self.job_of(source).run(target, MachineState::new(0, Vec::new()))
    }

    fn job_of(&self, source: VolumeSource) -> Job {
        let settings = CaptureSettings {
            chunk_size: self.chunk_size,
            level: 1,
            gives_way: false,
            compressors: 3,
        };
        let first = self.first_chunks.iter();
        let first = first.map(|chunk| (VolumeName::Memory, ChunkIndex(*chunk)));
        let job = Job::new(settings, vec![(VolumeName::Memory, source)]).unwrap();
        job.with_first_chunks(first.collect())
    }

    /// Checks that the last image is sound and reads as the volume, a chunk at a time and many at once.
    pub(crate) fn check(&self) -> Image {
        assert_eq!(findings(&self.path()), "");
        let image = self.image();
        for settings in [SourceSettings::local(2), SourceSettings::remote()] {
            assert!(read_with(&image, &VolumeName::Memory, &settings) == self.volume);
        }
        image
    }
}

/// Everything that verify finds, as people read it.
pub(crate) fn findings(image: &Path) -> String {
    let layout = Layout::open(image).unwrap();
    let progress = VerifyProgress::default();
    let report = verify(&layout, &Wanted::Only, 2, &progress).unwrap();
    let findings = report.findings.iter();
    let told: String = findings.map(|finding| Finding::trace(finding) + "\n").collect();
    let manifest = &open(image).unwrap().manifest;
    let bytes: u64 = manifest
        .volumes
        .iter()
        .map(|volume| volume.root.volume_bytes())
        .sum();
    if told.is_empty() {
        assert_eq!(report.volume_bytes, bytes, "all of it was looked at");
        let (done, total) = progress.bytes();
        assert!(done <= total, "{done} of {total}");
    }
    told
}

pub(crate) fn assert_empty_but(folder: &Path, names: &[&str]) {
    let left: BTreeSet<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(left, names.iter().map(|name| (*name).to_owned()).collect());
}

/// A sink that hands answers on.
pub(crate) struct Answers(pub(crate) mpsc::Sender<(ChunkId, Result<Arrived, ChunkFailure>)>);

impl ChunkSink for Answers {
    fn arrived(&self, chunk: ChunkId, what: Arrived) {
        let _ = self.0.send((chunk, Ok(what)));
    }

    fn failed(&self, chunk: ChunkId, failure: ChunkFailure) {
        let _ = self.0.send((chunk, Err(failure)));
    }
}

/// All bytes of a volume, as a source delivers them.
pub(crate) fn read(image: &Image, name: &VolumeName) -> Vec<u8> {
    read_with(image, name, &SourceSettings::remote())
}

pub(crate) fn read_with(image: &Image, name: &VolumeName, settings: &SourceSettings) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let source = ImageSource::new(image, settings, folder.path()).unwrap();
    let (sender, answers) = mpsc::channel();
    source.deliver_to(Arc::new(Answers(sender)));
    let position = image
        .manifest
        .volumes
        .iter()
        .position(|volume| volume.name == *name);
    let volume = VolumeId(position.unwrap() as u16);
    let root = &image.volume(name).unwrap().root;
    let chunks = (0..root.chunks()).map(|chunk| ChunkId {
        volume,
        chunk: ChunkIndex(chunk),
    });
    let chunks: Vec<ChunkId> = chunks.collect();
    source.ask(&chunks, Urgency::Fill);
    for _ in &chunks {
        let (chunk, answer) = answers.recv().unwrap();
        assert!(answer.is_ok(), "{chunk:?}: {answer:?}");
    }
    let mut bytes = vec![1; root.volume_bytes() as usize];
    source.page_file(volume).read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// A chunk of the first volume, asked for before there is an index.
pub(crate) fn read_chunk_learned(image: &Image, first: &[FirstChunk], chunk: ChunkIndex) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let source = ImageSource::new(image, &SourceSettings::remote(), folder.path()).unwrap();
    source.learn(first);
    let (sender, answers) = mpsc::channel();
    source.deliver_to(Arc::new(Answers(sender)));
    let volume = VolumeId(0);
    source.ask(&[ChunkId { volume, chunk }], Urgency::Demand);
    answers.recv().unwrap().1.unwrap();
    let root = &image.manifest.volumes[0].root;
    let range = root.chunk_size().range_of(chunk, root.volume_bytes());
    let mut bytes = vec![1; range.len as usize];
    source
        .page_file(volume)
        .read_exact_at(&mut bytes, range.start)
        .unwrap();
    bytes
}

/// A store that counts how often each blob is read.
pub(crate) struct Counts {
    store: Arc<dyn BlobStore>,
    reads: Mutex<HashMap<BlobDigest, usize>>,
}

impl Counts {
    pub(crate) fn reads_of(&self, blob: &BlobDigest) -> usize {
        self.reads.lock().unwrap().get(blob).copied().unwrap_or(0)
    }
}

impl BlobStore for Counts {
    fn read_range(&self, blob: &Blob, offset: u64, into: &mut [u8]) -> Result<(), BlobError> {
        *self.reads.lock().unwrap().entry(blob.digest).or_default() += 1;
        self.store.read_range(blob, offset, into)
    }
}

/// The image over a store that counts.
pub(crate) fn counting(image: &Image) -> (Image, Arc<Counts>) {
    let counts = Arc::new(Counts {
        store: Arc::clone(&image.store),
        reads: Mutex::default(),
    });
    let image = Image {
        manifest: Arc::clone(&image.manifest),
        store: Arc::clone(&counts) as _,
    };
    (image, counts)
}

type Reads = Arc<Mutex<Vec<(u64, usize)>>>;

/// Content whose reads are written down, and may fail.
pub(crate) struct Watched {
    bytes: Vec<u8>,
    reads: Reads,
    fails: fn() -> io::Result<()>,
}

impl Watched {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            reads: Arc::default(),
            fails: || Ok(()),
        }
    }

    /// Where a read fails.
    pub(crate) fn failing(self, fails: fn() -> io::Result<()>) -> Self {
        Self { fails, ..self }
    }

    pub(crate) fn reads(&self) -> Reads {
        Arc::clone(&self.reads)
    }
}

impl Content for Watched {
    fn bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn next_data(&self, from: u64) -> io::Result<Option<ByteRange>> {
        self.bytes.next_data(from)
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Found> {
        self.reads.lock().unwrap().push((offset, into.len()));
        (self.fails)()?;
        self.bytes.read(offset, into)
    }
}
