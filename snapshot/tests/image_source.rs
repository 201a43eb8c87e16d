//! An image directory as a source of chunks: verified bytes in page files, each ask answered once, damage named.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod fixture;

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use runnel_snapshot::blobs::{Blob, BlobError, BlobStore};
use runnel_snapshot::capture::{CaptureSettings, Job, VolumeSource};
use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::image::Image;
use runnel_snapshot::image::reference::Wanted;
use runnel_snapshot::image::source::{ImageSource, SourceSettings};
use runnel_snapshot::source::{Arrived, ChunkFailure, ChunkId, ChunkSink, PageSource, Urgency, VolumeId};
use runnel_snapshot::state::MachineState;
use runnel_snapshot::units::ChunkIndex;
use runnel_snapshot::volume::VolumeName;

use rustix::fs::{FallocateFlags, fallocate};

use fixture::{CHUNK, chunk_of, publish};

type Answer = (u64, Result<Arrived, ChunkFailure>);

/// Passes every answer on to the test.
struct Answers(Sender<Answer>);

impl ChunkSink for Answers {
    fn arrived(&self, chunk: ChunkId, what: Arrived) {
        self.0.send((number(chunk), Ok(what))).unwrap();
    }

    fn failed(&self, chunk: ChunkId, failure: ChunkFailure) {
        self.0.send((number(chunk), Err(failure))).unwrap();
    }
}

/// Counts chunks of the first volume from 0 and those of the second from 50.
fn number(id: ChunkId) -> u64 {
    id.chunk.0.saturating_add(u64::from(id.volume.0) * 50)
}

fn source(image: &Image) -> (ImageSource, Receiver<Answer>) {
    let settings = SourceSettings::local(2);
    let source = ImageSource::new(image, &settings, Path::new("/tmp")).unwrap();
    let (sender, answers) = channel();
    source.deliver_to(Arc::new(Answers(sender)));
    (source, answers)
}

fn chunk(number: u64) -> ChunkId {
    ChunkId {
        volume: VolumeId(0),
        chunk: ChunkIndex(number),
    }
}

#[test]
fn chunks_that_were_asked_for_appear_in_the_page_file() {
    let folder = tempfile::tempdir().unwrap();
    publish(&folder.path().join("image")).unwrap();
    let image = Image::open_directory(&folder.path().join("image"), &Wanted::Only).unwrap();
    let (source, answers) = source(&image);
    assert_eq!(source.volumes()[0].bytes, 4 * CHUNK as u64 + CHUNK as u64 / 2);

    source.ask(&(0..5).map(chunk).collect::<Vec<_>>(), Urgency::Soon);
    let mut arrived: Vec<Answer> = answers.iter().take(5).collect();
    arrived.sort_by_key(|answer| answer.0);
    use Arrived::{Data, Zero};
    assert_eq!(
        arrived,
        [
            (0, Ok(Data)),
            (1, Ok(Zero)),
            (2, Ok(Zero)),
            (3, Ok(Data)),
            (4, Ok(Data))
        ]
    );

    let pages = source.page_file(VolumeId(0));
    let mut bytes = vec![0; CHUNK];
    pages.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, chunk_of(1));
    pages.read_exact_at(&mut bytes, 3 * CHUNK as u64).unwrap();
    assert_eq!(bytes, chunk_of(2));
    pages
        .read_exact_at(&mut bytes[..CHUNK / 2], 4 * CHUNK as u64)
        .unwrap();
    assert_eq!(bytes[..CHUNK / 2], chunk_of(3)[..CHUNK / 2]);

    // What is there already is answered again.
    source.ask(&[chunk(3)], Urgency::Demand);
    assert_eq!(answers.recv().unwrap(), (3, Ok(Data)));
}

#[test]
fn a_chunk_that_the_page_file_lost_is_read_and_verified_anew() {
    let folder = tempfile::tempdir().unwrap();
    publish(&folder.path().join("image")).unwrap();
    let image = Image::open_directory(&folder.path().join("image"), &Wanted::Only).unwrap();
    let (source, answers) = source(&image);
    source.ask(&[chunk(3)], Urgency::Demand);
    assert_eq!(answers.recv().unwrap(), (3, Ok(Arrived::Data)));

    let pages = source.page_file(VolumeId(0));
    let at = 3 * CHUNK as u64;
    let writable = fs::OpenOptions::new()
        .write(true)
        .open(format!("/proc/self/fd/{}", pages.as_raw_fd()));
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(writable.unwrap(), hole, at + 4096, 4096).unwrap();

    source.ask(&[chunk(3)], Urgency::Demand);
    assert_eq!(answers.recv().unwrap(), (3, Ok(Arrived::Data)));
    let mut bytes = vec![0; CHUNK];
    pages.read_exact_at(&mut bytes, at).unwrap();
    assert_eq!(bytes, chunk_of(2));
}

/// A store that counts how often a blob is read.
struct Counting {
    store: Arc<dyn BlobStore>,
    counted: BlobDigest,
    reads: AtomicUsize,
}

impl BlobStore for Counting {
    fn read_range(&self, blob: &Blob, offset: u64, into: &mut [u8]) -> Result<(), BlobError> {
        if blob.digest == self.counted {
            self.reads.fetch_add(1, Ordering::SeqCst);
        }
        self.store.read_range(blob, offset, into)
    }
}

#[test]
fn the_index_is_kept_until_all_of_the_volume_is_known() {
    let folder = tempfile::tempdir().unwrap();
    publish(&folder.path().join("image")).unwrap();
    let mut image = Image::open_directory(&folder.path().join("image"), &Wanted::Only).unwrap();
    let counting = Arc::new(Counting {
        store: Arc::clone(&image.store),
        counted: image.manifest.volumes[0].index.digest,
        reads: AtomicUsize::new(0),
    });
    image.store = Arc::clone(&counting) as _;
    let (source, answers) = source(&image);
    for number in 0..5 {
        source.ask(&[chunk(number)], Urgency::Fill);
        answers.recv().unwrap().1.unwrap();
        if number == 0 {
            // Whoever filled it finds no more to do for a second, and puts away what it needed.
            std::thread::sleep(Duration::from_millis(1500));
        }
    }
    assert_eq!(counting.reads.load(Ordering::SeqCst), 1);

    // Then it is let go of, as the next who needs it finds: one whose chunk was taken out of the page file.
    let pages = source.page_file(VolumeId(0));
    let writable = fs::OpenOptions::new()
        .write(true)
        .open(format!("/proc/self/fd/{}", pages.as_raw_fd()))
        .unwrap();
    let until = Instant::now() + Duration::from_secs(60);
    while counting.reads.load(Ordering::SeqCst) == 1 {
        assert!(Instant::now() < until, "the index is kept for ever");
        std::thread::sleep(Duration::from_millis(1500));
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&writable, hole, 0, CHUNK as u64).unwrap();
        source.ask(&[chunk(0)], Urgency::Demand);
        assert_eq!(answers.recv().unwrap(), (0, Ok(Arrived::Data)));
    }
}

#[test]
fn every_volume_appears_whole_whatever_is_asked_for_again_or_cancelled_meanwhile() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("image");
    let plain = |seed: u8, bytes: usize| -> Vec<u8> {
        let chunk = |number: usize| {
            if number % 3 == 1 {
                vec![0; CHUNK]
            } else {
                chunk_of(seed ^ number as u8)
            }
        };
        (0..bytes.div_ceil(CHUNK)).flat_map(chunk).take(bytes).collect()
    };
    let memory = plain(1, 50 * CHUNK);
    let drive = plain(2, 30 * CHUNK + 512);
    let volumes = [
        (VolumeName::Memory, &memory),
        (VolumeName::Drive("rootfs".into()), &drive),
    ];
    let volumes = volumes.map(|(name, plain)| (name, VolumeSource::Content(Arc::new(plain.clone()))));
    let job = Job::new(CaptureSettings::default(), volumes.into()).unwrap();
    job.run(&target, MachineState::new(0, Vec::new())).unwrap();

    let image = Image::open_directory(&target, &Wanted::Only).unwrap();
    let (source, answers) = source(&image);
    let ids = |volume: u16, chunks: u64| {
        (0..chunks).map(move |chunk| ChunkId {
            volume: VolumeId(volume),
            chunk: ChunkIndex(chunk),
        })
    };
    let all: Vec<ChunkId> = ids(0, 50).chain(ids(1, 31)).collect();
    source.ask(&all, Urgency::Fill);
    source.cancel(&all[10..40]);
    source.ask(&all[5..60], Urgency::Demand);
    // Each is answered at least once; those that were answered in between were asked for again, and are twice.
    let mut missing: BTreeSet<u64> = (0..81).collect();
    while !missing.is_empty() {
        let (id, answer) = answers.recv().unwrap();
        answer.unwrap();
        missing.remove(&id);
    }
    for (volume, plain) in [(VolumeId(0), memory), (VolumeId(1), drive)] {
        let mut pages = vec![1; plain.len()];
        source.page_file(volume).read_exact_at(&mut pages, 0).unwrap();
        assert!(pages == plain);
    }
}

#[test]
fn a_damaged_chunk_fails_by_name_and_none_of_it_is_seen() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    publish(&path).unwrap();
    let image = Image::open_directory(&path, &Wanted::Only).unwrap();
    let layer = image.manifest.volumes[0].layers[0];
    let file = path.join("blobs/sha256").join(layer.digest.hex());
    let mut bytes = fs::read(&file).unwrap();
    bytes[20] ^= 1; // in the first frame, behind its header
    fs::write(&file, bytes).unwrap();

    let (source, answers) = source(&image);
    source.ask(&[chunk(0)], Urgency::Demand);
    let (_, answer) = answers.recv().unwrap();
    let failure = answer.unwrap_err();
    assert!(!failure.transient);
    for part in ["chunk 0", "memory", &layer.digest.hex()] {
        assert!(failure.reason.contains(part), "{}", failure.reason);
    }
    let mut seen = vec![1; CHUNK];
    source.page_file(VolumeId(0)).read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(seen, vec![0; CHUNK]);
    // The others are not affected.
    source.ask(&[chunk(3)], Urgency::Demand);
    assert_eq!(answers.recv().unwrap(), (3, Ok(Arrived::Data)));
}

#[test]
fn a_chunk_or_a_volume_that_does_not_exist_fails_for_good() {
    let folder = tempfile::tempdir().unwrap();
    publish(&folder.path().join("image")).unwrap();
    let image = Image::open_directory(&folder.path().join("image"), &Wanted::Only).unwrap();
    let (source, answers) = source(&image);
    for id in [
        chunk(5),
        chunk(u64::MAX),
        ChunkId {
            volume: VolumeId(1),
            chunk: ChunkIndex(0),
        },
    ] {
        source.ask(&[id], Urgency::Demand);
        assert!(!answers.recv().unwrap().1.unwrap_err().transient);
    }
}
