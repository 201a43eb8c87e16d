//! Images with a working set: the same machine, with what it touches first laid together, in a form that everything reads
//! which reads any image.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod chain;
mod fixture;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;

use proptest::prelude::*;
use runnel_snapshot::blobs::Blob;
use runnel_snapshot::capture::CaptureSettings;
use runnel_snapshot::capture::optimize::{OptimizeError, optimize};
use runnel_snapshot::capture::squash::squash;
use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::image::layout::Layout;
use runnel_snapshot::image::manifest::ManifestDraft;
use runnel_snapshot::image::publication::Publication;
use runnel_snapshot::image::reference::Wanted;
use runnel_snapshot::image::source::{ImageSource, SourceSettings};
use runnel_snapshot::index::Entry;
use runnel_snapshot::source::{Arrived, ChunkId, PageSource, Urgency, VolumeId};
use runnel_snapshot::units::{ChunkIndex, ChunkSize, PAGE_SIZE};
use runnel_snapshot::volume::VolumeName;
use runnel_snapshot::working_set::WorkingSet;

use chain::{Answers, Chain, Change, counting, findings, read};
use fixture::open;

const PAGE: usize = PAGE_SIZE as usize;
const CHUNK: usize = 16 << 10;

fn id(chunk: u64) -> ChunkId {
    ChunkId {
        volume: VolumeId(0),
        chunk: ChunkIndex(chunk),
    }
}

/// A volume of so many chunks, each other than the others, of which every fifth is zeros.
fn volume(chunks: usize) -> Vec<u8> {
    let byte = |at: usize| match at / CHUNK % 5 {
        4 => 0,
        _ => (at / CHUNK * 7 + at / 100 + 1) as u8,
    };
    (0..chunks * CHUNK).map(byte).collect()
}

fn chain_of(chunks: usize) -> Chain {
    Chain::new(ChunkSize::new(CHUNK as u32).unwrap(), volume(chunks))
}

fn recorded(image: &Path, chunks: &[u64]) -> WorkingSet {
    WorkingSet::of(
        &open(image).unwrap().source_volumes(),
        chunks.iter().copied().map(id),
    )
}

/// Makes an image beside that one.
fn optimized(image: &Path, chunks: Option<&[u64]>) -> PathBuf {
    let target = image.with_extension(format!("hot-{}", chunks.map_or(0, <[u64]>::len)));
    let set = chunks.map(|chunks| recorded(image, chunks));
    let (job, state) = optimize(image, &Wanted::Only, set, CaptureSettings::default()).unwrap();
    job.run(&target, state).unwrap();
    assert_eq!(findings(&target), "");
    target
}

#[test]
fn hot_chunks_lie_together_in_their_order_over_the_layers_that_were_there() {
    let mut chain = chain_of(20);
    chain.first_chunks = vec![2, 6];
    // Chunks 6 and 11 are of parts.
    chain.step(&[6, 11].map(|chunk| Change {
        first: chunk * 4,
        count: 1,
        seed: 9,
    }));
    let below = chain.image();
    let path = optimized(&chain.path(), Some(&[7, 2, 4, 6, 0]));
    let image = open(&path).unwrap();
    let (old, new) = (&below.manifest.volumes[0], &image.manifest.volumes[0]);
    assert_eq!(new.layers[..2], old.layers, "the same blobs");
    assert_eq!((new.layers.len(), new.has_full_layer), (3, true));
    assert_eq!(image.manifest.parent, Some(below.digest()));

    let (index, before) = (image.index(new), below.index(old));
    let mut at = 0;
    for chunk in [7, 2, 6, 0].map(ChunkIndex) {
        let Entry::Data(stored) = index.entry(chunk).unwrap() else {
            panic!("{chunk} is of several frames");
        };
        assert_eq!((stored.layer.0, stored.frame.start), (2, at), "{chunk}");
        at += stored.frame.len;
        if let Entry::Data(same) = before.entry(chunk).unwrap() {
            assert_eq!(stored.digest, same.digest);
        }
    }
    assert_eq!(
        index.entry(ChunkIndex(4)).unwrap(),
        Entry::Zero,
        "nothing is stored of zeros"
    );
    assert_eq!(
        index.entry(ChunkIndex(1)).unwrap(),
        before.entry(ChunkIndex(1)).unwrap()
    );
    let set = image.working_set().unwrap().unwrap();
    assert_eq!(
        set.of_volumes(&image.source_volumes()).unwrap(),
        [7, 2, 4, 6, 0].map(id)
    );
    assert_eq!(image.recorded_chunks(), [7, 2, 4, 6, 0].map(id));
    assert!(read(&image, &VolumeName::Memory) == chain.volume);
    // The places that the machine state gives are those of the new layer.
    let places = image.state().unwrap().first_chunks;
    assert_eq!(places.len(), 2);
    assert!(
        places
            .iter()
            .all(|first| first.entry == index.entry(first.chunk).unwrap())
    );

    let target = chain.folder().join("squashed");
    let (job, state) = squash(&path, &Wanted::Only, CaptureSettings::default()).unwrap();
    job.run(&target, state).unwrap();
    assert_eq!(findings(&target), "");
    let squashed = open(&target).unwrap();
    assert_eq!(squashed.manifest.volumes[0].layers.len(), 1);
    assert_eq!(squashed.manifest.working_set, image.manifest.working_set);
    assert!(read(&squashed, &VolumeName::Memory) == chain.volume);
}

#[test]
fn an_image_is_optimized_again_without_the_layer_that_it_had_for_that() {
    let chain = chain_of(20);
    let first = optimized(&chain.path(), Some(&[7, 2, 6]));
    let again = optimized(&first, Some(&[2, 6, 7, 11]));
    let volume = |path: &Path| open(path).unwrap().manifest.volumes[0].clone();
    assert_eq!(volume(&first).layers.len(), 2);
    assert_eq!(volume(&again).layers.len(), 2, "nothing is in the other any more");
    assert_eq!(volume(&again).layers[0], volume(&first).layers[0]);
    assert!(read(&open(&again).unwrap(), &VolumeName::Memory) == chain.volume);
    // Its own working set, if no other is given.
    let own = optimized(&again, None);
    assert_eq!(volume(&own).layers, volume(&again).layers);
    assert_eq!(open(&own).unwrap().recorded_chunks(), [2, 6, 7, 11].map(id));
    // All of it: nothing is left for the full layer.
    let all: Vec<u64> = (0..20).rev().collect();
    let all = optimized(&chain.path(), Some(&all));
    assert!(!volume(&all).has_full_layer && volume(&all).layers.len() == 1);
    assert!(read(&open(&all).unwrap(), &VolumeName::Memory) == chain.volume);
}

#[test]
fn what_was_recorded_is_read_in_few_requests_of_its_layer_alone() {
    let chain = chain_of(200);
    let scattered: Vec<u64> = (0..64)
        .map(|number| number * 77 % 200)
        .filter(|chunk| chunk % 5 != 4)
        .collect();
    let path = optimized(&chain.path(), Some(&scattered));
    let (image, counts) = counting(&open(&path).unwrap());
    let source = ImageSource::new(&image, &SourceSettings::remote(), chain.folder()).unwrap();
    let (sender, answers) = mpsc::channel();
    source.deliver_to(Arc::new(Answers(sender)));
    source.ask(&image.recorded_chunks(), Urgency::Recorded);
    for _ in &scattered {
        assert_eq!(answers.recv().unwrap().1, Ok(Arrived::Data));
    }
    let layers = &image.manifest.volumes[0].layers;
    let reads = [0, 1].map(|layer| counts.reads_of(&layers[layer].digest));
    assert_eq!(reads[0], 0, "nothing of what is not hot");
    assert!(
        reads[1] <= scattered.len().div_ceil(4),
        "{} for {}",
        reads[1],
        scattered.len()
    );
}

#[test]
fn a_working_set_that_is_none_of_the_image_makes_no_image() {
    let chain = chain_of(20);
    let larger = chain_of(21);
    let settings = CaptureSettings::default;
    let refused = |set| match optimize(&chain.path(), &Wanted::Only, set, settings()) {
        Ok(_) => panic!("it is one"),
        Err(error) => error,
    };
    let other = recorded(&larger.path(), &[20]);
    assert!(matches!(refused(Some(other)), OptimizeError::Misfit(_)));
    assert!(matches!(refused(None), OptimizeError::NothingRecorded));
    assert!(matches!(
        refused(Some(WorkingSet::default())),
        OptimizeError::Empty
    ));
    assert_eq!(
        std::fs::read_dir(chain.folder()).unwrap().count(),
        1,
        "the image alone"
    );
}

#[test]
fn verify_finds_a_working_set_that_is_another_images() {
    let chain = chain_of(20);
    let larger = chain_of(21);
    let image = chain.image();
    for (name, bytes, reason) in [
        (
            "other",
            recorded(&larger.path(), &[20]).to_bytes(),
            "recorded with another machine",
        ),
        ("nonsense", b"nonsense".to_vec(), "it is no working set"),
    ] {
        let target = chain.folder().join(name);
        let publication = Publication::begin(&target).unwrap();
        let from = Layout::open(&chain.path()).unwrap();
        for blob in image.manifest.blobs() {
            publication.take_over(&from, &blob).unwrap();
        }
        let working_set = publication.add(&bytes).unwrap();
        assert_eq!(
            working_set,
            Blob {
                digest: BlobDigest::of(&bytes),
                bytes: bytes.len() as u64
            }
        );
        let draft = ManifestDraft {
            state: image.manifest.state,
            state_inline: image.manifest.state_inline.clone(),
            volumes: image.manifest.volumes.clone(),
            working_set: Some(working_set),
            parent: None,
            urls: Default::default(),
        };
        publication.publish(&draft, None).unwrap();
        let told = findings(&target);
        assert!(told.contains(reason) && told.lines().count() == 1, "{told}");
        // It reads all the same.
        let image = open(&target).unwrap();
        assert_eq!(image.recorded_chunks(), []);
        assert!(read(&image, &VolumeName::Memory) == chain.volume);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]

    #[test]
    fn whatever_was_recorded_of_whatever_chain_the_volume_stays_what_it_was(
        bytes in 1_usize..40 * PAGE,
        steps in proptest::collection::vec((0_usize..40, 1_usize..9, 0_u8..4), 0..4),
        touched in proptest::collection::vec(0_u64..10, 1..12),
        first in 0_u64..10,
    ) {
        let mut chain = Chain::new(ChunkSize::new(CHUNK as u32).unwrap(), volume(10)[..bytes].to_vec());
        chain.first_chunks = vec![first];
        for (first, count, seed) in steps {
            chain.step(&[Change { first, count, seed }]);
        }
        let set = recorded(&chain.path(), &touched);
        prop_assume!(!set.is_empty());
        let target = chain.folder().join("hot");
        let (job, state) = optimize(&chain.path(), &Wanted::Only, Some(set), CaptureSettings::default()).unwrap();
        job.run(&target, state).unwrap();
        prop_assert_eq!(findings(&target), "");
        prop_assert!(read(&open(&target).unwrap(), &VolumeName::Memory) == chain.volume);
    }
}
