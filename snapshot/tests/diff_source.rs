//! What a source does with chunks of parts: it reads what lies together at once, verifies each part, goes on to another
//! place where one is damaged, and trusts nothing that it finds in a page file.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod chain;
mod fixture;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};

use runnel_snapshot::blobs::{Blob, BlobError, BlobStore};
use runnel_snapshot::image::Image;
use runnel_snapshot::image::source::{HostCache, ImageSource, PageFile, SourceSettings, Uncached};
use runnel_snapshot::index::Entry;
use runnel_snapshot::source::{Arrived, ChunkFailure, ChunkId, PageSource, Urgency, VolumeId};
use runnel_snapshot::units::{ChunkIndex, ChunkSize, PAGE_SIZE};
use runnel_snapshot::volume::VolumeName;

use chain::{Answers, Chain, Change, counting, findings, page_of, read};
use fixture::open;

const PAGE: usize = PAGE_SIZE as usize;

/// Sixteen chunks of 64 KiB, a page of each of which is in a layer of its own, and a page of each in another.
fn layered() -> Chain {
    let volume: Vec<u8> = (0..256).flat_map(|page| page_of(page as u8 | 1)).collect();
    let mut chain = Chain::new(ChunkSize::DEFAULT, volume);
    for (page, seed) in [(3, 201), (7, 99)] {
        let changes: Vec<Change> = (0..16)
            .map(|chunk| Change {
                first: chunk * 16 + page,
                count: 1,
                seed: seed ^ chunk as u8,
            })
            .collect();
        chain.step(&changes);
    }
    chain
}

type Answered = mpsc::Receiver<(ChunkId, Result<Arrived, ChunkFailure>)>;

fn source(image: &Image, folder: &Path) -> (ImageSource, Answered) {
    let source = ImageSource::new(image, &SourceSettings::remote(), folder).unwrap();
    let (sender, answers) = mpsc::channel();
    source.deliver_to(Arc::new(Answers(sender)));
    (source, answers)
}

fn chunk(number: u64) -> ChunkId {
    ChunkId {
        volume: VolumeId(0),
        chunk: ChunkIndex(number),
    }
}

fn ask(image: &Image, number: u64) -> Result<Vec<u8>, (ChunkFailure, Vec<u8>)> {
    let folder = tempfile::tempdir().unwrap();
    let (source, answers) = source(image, folder.path());
    source.ask(&[chunk(number)], Urgency::Demand);
    let (_, answer) = answers.recv().unwrap();
    let mut bytes = vec![1; 16 * PAGE];
    let at = number * 16 * PAGE_SIZE;
    source
        .page_file(VolumeId(0))
        .read_exact_at(&mut bytes, at)
        .unwrap();
    match answer {
        Ok(_) => Ok(bytes),
        Err(failure) => Err((failure, bytes)),
    }
}

#[test]
fn frames_that_lie_together_are_read_at_once_from_each_layer() {
    let chain = layered();
    let image = chain.check();
    let (counting, counts) = counting(&image);
    assert!(read(&counting, &VolumeName::Memory) == chain.volume);
    // The chunks may have been taken in several runs, by as many fillers.
    let layers = &image.manifest.volumes[0].layers;
    assert_eq!(layers.len(), 3);
    for layer in layers {
        let reads = counts.reads_of(&layer.digest);
        assert!((1..=8).contains(&reads), "{reads} of 16 chunks");
    }
}

/// Changes the bytes of the frame of chunk 1 in the upper layer.
fn damage(image: &Image) -> (Blob, impl Fn(u64, &mut [u8]) + Send + Sync + use<>) {
    let volume = &image.manifest.volumes[0];
    let Entry::Parts(parts) = image.index(volume).entry(ChunkIndex(1)).unwrap() else {
        panic!("it is of parts")
    };
    assert_eq!(parts.len(), 3);
    let stored = parts[2].stored;
    let layer = volume.layers[usize::from(stored.layer.0)];
    let damaged = move |offset: u64, bytes: &mut [u8]| {
        let at = stored.frame.start + stored.frame.len / 2;
        let byte = at.checked_sub(offset).and_then(|at| bytes.get_mut(at as usize));
        byte.into_iter().for_each(|byte| *byte ^= 4);
    };
    (layer, damaged)
}

#[test]
fn a_damaged_part_fails_its_chunk_by_name_and_none_of_it_is_seen() {
    let chain = layered();
    let image = chain.image();
    let (layer, damage) = damage(&image);
    let path = chain.path().join("blobs/sha256").join(layer.digest.hex());
    let mut bytes = fs::read(&path).unwrap();
    damage(0, &mut bytes);
    fs::write(&path, bytes).unwrap();
    let (failure, seen) = ask(&image, 1).unwrap_err();
    assert!(!failure.transient);
    for part in ["chunk 1", "memory", &layer.digest.hex()] {
        assert!(failure.reason.contains(part), "{}", failure.reason);
    }
    assert_eq!(seen, vec![0; 16 * PAGE], "nor what was right of it");
    assert!(ask(&image, 2).unwrap() == chain.volume[32 * PAGE..48 * PAGE]);
    let found = findings(&chain.path());
    assert!(
        found.contains("chunk 1") && found.contains(&layer.digest.hex()),
        "{found}"
    );
    assert!(
        !found.contains("chunk 0") && !found.contains("chunk 2"),
        "{found}"
    );
}

/// A store that has each blob in two places, of which the first has a damaged one.
struct TwoPlaces<D> {
    store: Arc<dyn BlobStore>,
    damaged: Blob,
    damage: D,
    second: AtomicUsize,
}

impl<D: Fn(u64, &mut [u8]) + Send + Sync> BlobStore for TwoPlaces<D> {
    fn read_range(&self, blob: &Blob, offset: u64, into: &mut [u8]) -> Result<(), BlobError> {
        self.store.read_range(blob, offset, into)?;
        if *blob == self.damaged {
            (self.damage)(offset, into);
        }
        Ok(())
    }

    fn read_right(
        &self,
        blob: &Blob,
        offset: u64,
        into: &mut [u8],
        are_right: &mut dyn FnMut(&[u8]) -> bool,
    ) -> Result<bool, BlobError> {
        self.read_range(blob, offset, into)?;
        if are_right(into) {
            return Ok(true);
        }
        self.second.fetch_add(1, Ordering::SeqCst);
        self.store.read_range(blob, offset, into)?;
        Ok(are_right(into))
    }
}

#[test]
fn a_damaged_part_is_read_from_another_place() {
    let chain = layered();
    let mut image = chain.image();
    let (damaged, damage) = damage(&image);
    let places = Arc::new(TwoPlaces {
        store: Arc::clone(&image.store),
        damaged,
        damage,
        second: AtomicUsize::new(0),
    });
    image.store = Arc::clone(&places) as _;
    assert!(read(&image, &VolumeName::Memory) == chain.volume);
    assert_eq!(places.second.load(Ordering::SeqCst), 1);
}

#[test]
fn a_page_file_of_before_is_trusted_with_chunks_of_parts_only_where_it_can_be_held_against_them() {
    // The first chunk: zeros but for two pages of two layers, all of which is shown. The second: a full one below.
    let volume: Vec<u8> = [vec![0; 16 * PAGE], vec![5; 16 * PAGE]].concat();
    let mut chain = Chain::new(ChunkSize::DEFAULT, volume);
    for page in [2, 9, 20] {
        chain.step(&[Change {
            first: page,
            count: 1,
            seed: 40 + page as u8,
        }]);
    }
    let image = chain.check();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("memory");
    let deliver = || {
        let (counting, counts) = counting(&image);
        let make = |_: &VolumeName, layout| Ok(Arc::new(PageFile::named(&path, layout).unwrap()));
        let settings = SourceSettings::local(1);
        let cache: Arc<dyn HostCache> = Arc::new(Uncached);
        let source = ImageSource::with_page_files(&counting, &settings, &make, &cache).unwrap();
        let (sender, answers) = mpsc::channel();
        source.deliver_to(Arc::new(Answers(sender)));
        for number in [0, 1] {
            source.ask(&[chunk(number)], Urgency::Demand);
            answers.recv().unwrap().1.unwrap();
        }
        // Marks lie behind the volume.
        assert!(fs::read(&path).unwrap()[..chain.volume.len()] == chain.volume);
        let layers = image.manifest.volumes[0].layers.iter();
        layers
            .map(|layer| counts.reads_of(&layer.digest))
            .collect::<Vec<_>>()
    };
    let file = |at: usize, byte: u8| {
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[byte], at as u64).unwrap();
    };
    assert_eq!(deliver(), [1, 1, 1, 1]);
    assert_eq!(
        deliver(),
        [1, 0, 0, 1],
        "the second chunk alone cannot be told to be right"
    );
    // A page that is wrong, and one that should be zeros.
    for at in [2 * PAGE + 7, 3 * PAGE] {
        file(at, 1);
        assert_eq!(deliver(), [1, 1, 1, 1]);
    }
}

/// Puts other bytes into the place of a blob whose digest nobody checks here, and hands the image out.
fn with_layer(chain: &Chain, number: usize, change: impl Fn(&mut Vec<u8>)) -> String {
    let image = chain.image();
    let layer = image.manifest.volumes[0].layers[number];
    let path = chain.path().join("blobs/sha256").join(layer.digest.hex());
    let good = fs::read(&path).unwrap();
    let mut bytes = good.clone();
    change(&mut bytes);
    fs::write(&path, bytes).unwrap();
    let found = findings(&chain.path());
    fs::write(&path, good).unwrap();
    assert_eq!(findings(&chain.path()), "");
    found
}

#[test]
fn a_seek_table_of_a_diff_layer_that_is_not_the_index_is_found() {
    let chain = layered();
    // The table's entries follow eight bytes of header; the first is that of chunk 0.
    let entry = |bytes: &[u8]| bytes.len() - 9 - 16 * 8;
    let found = with_layer(&chain, 2, |bytes| {
        let at = entry(bytes) + 4; // its content
        bytes[at] = 1;
    });
    assert!(
        found.contains("volume memory, chunk 0") && found.contains("4096 bytes of content"),
        "{found}"
    );
    let found = with_layer(&chain, 2, |bytes| {
        let at = entry(bytes);
        bytes[at] += 1; // its frame is longer, and the next shorter
        bytes[at + 8] -= 1;
    });
    assert!(
        found.contains("chunk 1") && found.contains("no frame begin"),
        "{found}"
    );
}

#[test]
fn a_frame_that_nobody_uses_any_more_must_decompress_nevertheless() {
    let volume: Vec<u8> = (0..64).flat_map(|page| page_of(page | 1)).collect();
    let mut chain = Chain::new(ChunkSize::DEFAULT, volume);
    let change = |first, seed| Change {
        first,
        count: 1,
        seed,
    };
    chain.step(&[change(0, 8), change(20, 9)]);
    chain.step(&[change(0, 18)]);
    chain.step(&[
        change(48, 7),
        Change {
            first: 32,
            count: 16,
            seed: 3,
        },
    ]);
    chain.check();
    // The first frame of the first diff layer, whose page was written again; and that of a chunk all of which was.
    for (layer, frame) in [(1, 0), (0, 2)] {
        let image = chain.image();
        let blob = image.manifest.volumes[0].layers[layer];
        let table =
            runnel_snapshot::layer::seek_table::LayerSeekTable::read(image.store.as_ref(), &blob).unwrap();
        let stored = table.frame(frame).unwrap().stored;
        let found = with_layer(&chain, layer, |bytes| bytes[stored.start as usize] ^= 1);
        assert!(found.contains("does not decompress"), "{found}");
    }
    let _ = open(&chain.path()).unwrap();
}
