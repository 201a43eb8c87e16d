//! Diff layers: chains of images that lie over each other read as the plain volume that they stand for, whatever
//! changed in between, and so do the images that squashing makes of them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod chain;
mod fixture;

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use runnel_snapshot::capture::squash::squash;
use runnel_snapshot::capture::{CaptureError, CaptureSettings, Job, VolumeSource};
use runnel_snapshot::causes::with_causes;
use runnel_snapshot::image::Image;
use runnel_snapshot::image::below::BelowImage;
use runnel_snapshot::image::layout::Layout;
use runnel_snapshot::image::reference::Wanted;
use runnel_snapshot::index::{Entry, LAYERS_MAX, PARTS_MAX};
use runnel_snapshot::pager::PageSet;
use runnel_snapshot::state::MachineState;
use runnel_snapshot::units::{ChunkIndex, ChunkSize, PAGE_SIZE, PageIndex};
use runnel_snapshot::volume::VolumeName;

use chain::{Chain, Change, assert_empty_but, findings, page_of, read};
use fixture::open;

const PAGE: usize = PAGE_SIZE as usize;

fn chunk_size(bytes: u32) -> ChunkSize {
    ChunkSize::new(bytes).unwrap()
}

/// What is in a full layer, as stock zstd reads it.
fn decompressed(image: &Path, layer: &str) -> Vec<u8> {
    let file = fs::File::open(image.join("blobs/sha256").join(layer)).unwrap();
    let mut plain = Vec::new();
    zstd::Decoder::new(file).unwrap().read_to_end(&mut plain).unwrap();
    plain
}

/// Squashes an image into a new one beside it.
fn squashed(image: &Path) -> Image {
    let target = image.with_extension("squashed");
    let (job, state) = squash(image, &Wanted::Only, CaptureSettings::default()).unwrap();
    job.run(&target, state).unwrap();
    assert_eq!(findings(&target), "");
    open(&target).unwrap()
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    // Few pages, so that they meet; a run of them, so that whole chunks change.
    let change =
        (0_usize..90, 1_usize..12, 0_u8..5).prop_map(|(first, count, seed)| Change { first, count, seed });
    proptest::collection::vec(change, 0..8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn a_chain_reads_as_its_volume_at_every_step_and_so_does_what_is_squashed(
        log2 in 14_u32..17,
        bytes in 1_usize..80 * PAGE,
        steps in proptest::collection::vec((changes(), any::<bool>()), 1..9),
    ) {
        let volume = (0..bytes).map(|at| if at / PAGE % 3 == 1 { 0 } else { (at / PAGE) as u8 ^ (at % 97) as u8 });
        let mut chain = Chain::new(chunk_size(1 << log2), volume.collect());
        for (step, compares) in &steps {
            chain.compares = *compares;
            chain.step(step);
            let image = chain.check();
            let volume = &image.manifest.volumes[0];
            let index = image.index(volume);
            let mut used = BTreeSet::new();
            for chunk in 0..volume.root.chunks() {
                let entry = index.entry(ChunkIndex(chunk)).unwrap();
                prop_assert!(entry.frames().count() <= PARTS_MAX);
                used.extend(entry.frames().map(|stored| stored.layer));
            }
            // Each layer below is used, as far as that was known beforehand.
            prop_assert!(*compares || volume.layers.len() <= used.len() + 1, "{used:?} of {}", volume.layers.len());
        }
        let image = squashed(&chain.path());
        let volume = &image.manifest.volumes[0];
        prop_assert_eq!((volume.layers.len(), volume.has_full_layer), (1, true));
        prop_assert!(read(&image, &VolumeName::Memory) == chain.volume);
        let layer = volume.layers[0].digest.hex();
        prop_assert!(decompressed(&chain.path().with_extension("squashed"), &layer) == chain.volume);
        prop_assert_eq!(image.manifest.parent, Some(chain.image().digest()));
    }
}

#[test]
fn a_chain_of_fifty_has_one_index_that_does_not_grow_with_it() {
    let size = chunk_size(64 << 10);
    let volume: Vec<u8> = (0..64 * 16).flat_map(|page| page_of(page as u8 | 1)).collect();
    let mut chain = Chain::new(size, volume);
    let mut index_bytes = Vec::new();
    for step in 0..50_u8 {
        // A page of each fourth chunk, and one of a chunk of its own.
        let mut changes: Vec<Change> = (0..16)
            .map(|chunk| Change {
                first: chunk * 64,
                count: 1,
                seed: step + 1,
            })
            .collect();
        changes.push(Change {
            first: (usize::from(step) % 16) * 16 + 20,
            count: 1,
            seed: step + 7,
        });
        chain.step(&changes);
        let volume = &chain.image().manifest.volumes[0];
        index_bytes.push(volume.index.bytes);
        assert!(
            volume.layers.len() <= 1 + 1 + 16,
            "step {step}: {}",
            volume.layers.len()
        );
    }
    let image = chain.check();
    let volume = &image.manifest.volumes[0];
    assert!(volume.has_full_layer);
    // 64 chunks of at most a few parts.
    assert!(index_bytes[49] <= index_bytes[20] + 100, "{index_bytes:?}");
    assert!(index_bytes[49] < 64 * 35 + 64 * 90, "{index_bytes:?}");
    let (counting, counts) = chain::counting(&image);
    assert!(read(&counting, &VolumeName::Memory) == chain.volume);
    assert_eq!(counts.reads_of(&volume.index.digest), 1);
    let indexes = image.manifest.blobs().len() - volume.layers.len() - 1; // the state
    assert_eq!(indexes, 2, "one index and its root");
}

#[test]
fn a_chunk_of_which_a_page_changes_again_and_again_is_written_anew_before_it_is_of_too_many_parts() {
    let volume: Vec<u8> = (0..32).flat_map(page_of).collect();
    let mut chain = Chain::new(chunk_size(128 << 10), volume);
    let mut most = 0;
    for step in 0..3 * PARTS_MAX {
        chain.step(&[Change {
            first: step,
            count: 1,
            seed: 99 - step as u8,
        }]);
        let image = chain.check();
        let volume = &image.manifest.volumes[0];
        let parts = image.index(volume).entry(ChunkIndex(0)).unwrap().frames().count();
        // Layers of which nothing is left are gone.
        assert_eq!(volume.layers.len(), parts);
        most = most.max(parts);
        if step == PARTS_MAX - 1 {
            assert!(matches!(
                image.index(volume).entry(ChunkIndex(0)).unwrap(),
                Entry::Data(_)
            ));
            assert!(!volume.has_full_layer, "nothing of the first layer is left");
        }
    }
    assert_eq!(most, PARTS_MAX);
}

#[test]
fn there_are_as_many_layers_as_there_may_be_and_then_one_is_told_what_to_do() {
    let volume = vec![3; 130 * 4 * PAGE];
    let mut chain = Chain::new(chunk_size(16 << 10), volume);
    for step in 1..usize::from(LAYERS_MAX) {
        chain.step(&[Change {
            first: 4 * step,
            count: 1,
            seed: step as u8,
        }]);
        assert_eq!(chain.image().manifest.volumes[0].layers.len(), 1 + step);
    }
    chain.check();
    let mut changed = PageSet::new(130 * 4);
    changed.insert_run(PageIndex(0), 1);
    let next = chain.folder().join("next");
    let refused = chain.capture(&next, Arc::new(chain.volume.clone()), changed);
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("runnel image squash"), "{refused}");
    assert!(!next.exists());
}

#[test]
fn of_pages_that_may_have_changed_those_that_did_are_found() {
    let volume: Vec<u8> = (1..65).flat_map(page_of).collect();
    let mut chain = Chain::new(chunk_size(16 << 10), volume);
    let change = |first, count, seed| Change { first, count, seed };
    // A page of one chunk, two of another that become zero, and all of a third.
    chain.step(&[change(1, 1, 90), change(9, 2, 0), change(20, 4, 91)]);
    let entry = |image: &Image, chunk| {
        let index = image.index(&image.manifest.volumes[0]);
        index.entry(ChunkIndex(chunk)).unwrap()
    };
    chain.compares = true;
    // Frames of which not all is shown cannot be compared: what is shown of them is written once more, and then can be.
    chain.step(&[]);
    let before = chain.check();
    assert!((1..16).all(|chunk| chunk == 2 || !matches!(entry(&before, chunk), Entry::Parts(_))));
    chain.step(&[]);
    let after = chain.check();
    assert_eq!(
        after.manifest.volumes[0].layers, before.manifest.volumes[0].layers,
        "nothing changed"
    );
    chain.step(&[change(40, 1, 92)]);
    let after = chain.check();
    for chunk in 0..16 {
        assert_eq!(
            entry(&after, chunk) == entry(&before, chunk),
            chunk != 10,
            "{chunk}"
        );
    }
    // Of a chunk of parts the frame alone is written whose pages changed.
    chain.step(&[change(1, 1, 93)]);
    let Entry::Parts(parts) = entry(&chain.check(), 0) else {
        panic!("a page over the others")
    };
    assert_eq!(parts.len(), 2);
}

#[test]
fn pages_that_became_zero_take_no_bytes_and_a_volume_of_zeros_is_one() {
    let volume: Vec<u8> = (1..33).flat_map(page_of).collect();
    let mut chain = Chain::new(chunk_size(64 << 10), volume);
    chain.step(&[Change {
        first: 3,
        count: 2,
        seed: 0,
    }]);
    let image = chain.check();
    let volume = &image.manifest.volumes[0];
    assert_eq!(volume.layers.len(), 2, "a full layer alone would be the volume");
    assert_eq!(volume.layers[1].bytes, 17, "an empty seek table");
    // Nor where nothing else changed since.
    chain.step(&[]);
    assert_eq!(chain.check().manifest.volumes[0].layers.len(), 2);
    chain.step(&[Change {
        first: 0,
        count: 32,
        seed: 0,
    }]);
    let image = chain.check();
    let volume = &image.manifest.volumes[0];
    assert_eq!((volume.layers.len(), volume.has_full_layer), (1, false));
    assert_eq!(volume.index.bytes, 8);
    chain.step(&[]);
    chain.check();
    assert!(read(&squashed(&chain.path()), &VolumeName::Memory) == chain.volume);
}

#[test]
fn a_volume_of_which_nothing_changed_has_the_same_layers() {
    let volume: Vec<u8> = (1..33).flat_map(page_of).collect();
    let mut chain = Chain::new(chunk_size(64 << 10), volume);
    let before = chain.image().manifest.volumes.clone();
    chain.step(&[]);
    assert_eq!(chain.check().manifest.volumes, before);
}

#[test]
fn the_same_change_again_is_a_layer_that_is_there_twice() {
    let volume: Vec<u8> = (1..65).flat_map(page_of).collect();
    let mut chain = Chain::new(chunk_size(64 << 10), volume);
    // Two layers of the same bytes, at different places of the volume, and both used.
    chain.step(&[Change {
        first: 1,
        count: 1,
        seed: 77,
    }]);
    chain.step(&[Change {
        first: 17,
        count: 1,
        seed: 77,
    }]);
    let image = chain.check();
    let layers = &image.manifest.volumes[0].layers;
    assert_eq!(layers[1], layers[2]);
    chain.step(&[Change {
        first: 1,
        count: 1,
        seed: 5,
    }]);
    chain.check();
}

#[test]
fn layers_below_are_linked_and_the_image_is_complete_without_them() {
    let volume: Vec<u8> = (1..65).flat_map(page_of).collect();
    let mut chain = Chain::new(chunk_size(64 << 10), volume);
    let below = chain.path();
    chain.step(&[Change {
        first: 20,
        count: 3,
        seed: 9,
    }]);
    let image = chain.image();
    let layer = image.manifest.volumes[0].layers[0].digest.hex();
    let inode = |image: &Path| {
        fs::metadata(image.join("blobs/sha256").join(&layer))
            .unwrap()
            .ino()
    };
    assert_eq!(inode(&below), inode(&chain.path()));
    let diff = image.manifest.volumes[0].layers[1];
    assert!(diff.bytes < 3 * PAGE_SIZE, "{diff}");
    assert_eq!(decompressed(&chain.path(), &diff.digest.hex()).len(), 3 * PAGE);
    fs::remove_dir_all(below).unwrap();
    chain.check();
}

#[test]
fn the_first_chunks_of_a_diff_image_are_parts_and_are_found_without_the_index() {
    let volume: Vec<u8> = (1..65).flat_map(page_of).collect();
    let mut chain = Chain::new(chunk_size(64 << 10), volume);
    chain.first_chunks = vec![1, 2];
    chain.step(&[Change {
        first: 20,
        count: 3,
        seed: 9,
    }]);
    let image = chain.check();
    let first = image.state().unwrap().first_chunks;
    assert!(matches!(&first[0].entry, Entry::Parts(parts) if parts.len() == 2));
    assert!(matches!(&first[1].entry, Entry::Data(_)));
    let (counting, counts) = chain::counting(&image);
    let page = chain::read_chunk_learned(&counting, &first, ChunkIndex(1));
    assert!(page == chain.volume[16 * PAGE..32 * PAGE]);
    assert_eq!(counts.reads_of(&image.manifest.volumes[0].index.digest), 0);
    // What is squashed has them in one piece.
    let first = squashed(&chain.path()).state().unwrap().first_chunks;
    assert!(first.iter().all(|first| matches!(&first.entry, Entry::Data(_))));
    assert_eq!(first.len(), 2);
}

#[test]
fn only_chunks_that_changed_are_read_and_of_those_changed_pages_alone() {
    let volume: Vec<u8> = (1..65).flat_map(page_of).collect();
    let chain = Chain::new(chunk_size(64 << 10), volume.clone());
    let mut changed = PageSet::new(64);
    changed.insert_run(PageIndex(18), 2);
    changed.insert_run(PageIndex(40), 1);
    let content = chain::Watched::new(volume);
    let reads = content.reads();
    chain
        .capture(&chain.folder().join("next"), Arc::new(content), changed)
        .unwrap();
    let mut reads = reads.lock().unwrap().clone();
    reads.sort_unstable();
    assert_eq!(reads, [(18 * PAGE as u64, 2 * PAGE), (40 * PAGE as u64, PAGE)]);
}

#[test]
fn what_fails_or_is_cancelled_leaves_nothing_and_the_image_below_as_it_was() {
    let volume: Vec<u8> = (1..65).flat_map(page_of).collect();
    let chain = Chain::new(chunk_size(64 << 10), volume.clone());
    let target = chain.folder().join("next");
    let all = || {
        let mut all = PageSet::new(64);
        all.insert_run(PageIndex(0), 64);
        all
    };
    let content =
        |fails: fn() -> io::Result<()>| Arc::new(chain::Watched::new(volume.clone()).failing(fails));
    let error = chain.capture(&target, content(|| Err(io::Error::other("bad sector"))), all());
    assert!(matches!(error.unwrap_err(), CaptureError::Read { .. }));
    let error = chain.capture(&target, Arc::new(vec![1; 5]), all()).unwrap_err();
    assert!(
        matches!(error, CaptureError::OtherLength { bytes: 5, .. }),
        "{error}"
    );

    let job = chain.job(Arc::new(volume.clone()), all());
    job.progress().cancel();
    let error = job.run(&target, MachineState::new(0, Vec::new())).unwrap_err();
    assert!(matches!(error, CaptureError::Cancelled), "{error}");

    let job = chain.job(content(|| panic!("on purpose")), all());
    let to = target.clone();
    let run = move || job.run(&to, MachineState::new(0, Vec::new())).map(drop);
    std::thread::spawn(run).join().unwrap_err();

    let (job, state) = squash(&chain.path(), &Wanted::Only, CaptureSettings::default()).unwrap();
    job.progress().cancel();
    assert!(matches!(
        job.run(&target, state).unwrap_err(),
        CaptureError::Cancelled
    ));
    assert_empty_but(chain.folder(), &["0"]);
    chain.check();
}

#[test]
fn a_layer_below_that_is_missing_is_named_before_anything_is_read() {
    let volume: Vec<u8> = (1..65).flat_map(page_of).collect();
    let chain = Chain::new(chunk_size(64 << 10), volume.clone());
    let layer = chain.image().manifest.volumes[0].layers[0].digest.hex();
    let base = chain.image().manifest.volumes[0].clone();
    let layout = Arc::new(Layout::open(&chain.path()).unwrap());
    fs::remove_file(chain.path().join("blobs/sha256").join(&layer)).unwrap();
    let content = chain::Watched::new(volume);
    let reads = content.reads();
    let mut changed = PageSet::new(64);
    changed.insert_run(PageIndex(3), 1);
    let source = VolumeSource::Changes {
        content: Arc::new(content),
        changed,
        compares: false,
        below: BelowImage::whole(layout),
        base,
    };
    let job = Job::new(CaptureSettings::default(), vec![(VolumeName::Memory, source)]).unwrap();
    let target = chain.folder().join("next");
    let error = job.run(&target, MachineState::new(0, Vec::new())).unwrap_err();
    let told = with_causes(&error);
    assert!(told.contains(&layer), "{told}");
    assert_eq!(*reads.lock().unwrap(), []);
    assert_empty_but(chain.folder(), &["0"]);
}

#[test]
fn volumes_keep_their_own_chunks_and_those_that_lie_alone_are_linked_when_an_image_is_squashed() {
    let memory: Vec<u8> = (1..65).flat_map(page_of).collect();
    let mut chain = Chain::new(chunk_size(16 << 10), memory);
    chain.step(&[Change {
        first: 20,
        count: 3,
        seed: 9,
    }]);
    // Beside it a drive that never changed, cut otherwise.
    let drive = VolumeName::Drive("root".into());
    let below = chain.image();
    let volumes = vec![
        (VolumeName::Memory, chain.unchanged()),
        (
            drive.clone(),
            VolumeSource::Content(Arc::new(vec![7_u8; 200_000]) as _),
        ),
    ];
    let path = chain.folder().join("both");
    let job = Job::new(CaptureSettings::default(), volumes).unwrap();
    job.run(&path, MachineState::new(0, Vec::new())).unwrap();
    assert_eq!(
        open(&path).unwrap().volume(&VolumeName::Memory),
        below.volume(&VolumeName::Memory)
    );
    assert_eq!(findings(&path), "");

    let image = squashed(&path);
    assert!(read(&image, &VolumeName::Memory) == chain.volume);
    assert_eq!(read(&image, &drive), vec![7; 200_000]);
    assert_eq!(
        image.volume(&VolumeName::Memory).unwrap().root.chunk_size(),
        chunk_size(16 << 10)
    );
    let layer = image.volume(&drive).unwrap().layers[0].digest.hex();
    let inode = |image: &Path| {
        fs::metadata(image.join("blobs/sha256").join(&layer))
            .unwrap()
            .ino()
    };
    assert_eq!(inode(&path), inode(&path.with_extension("squashed")));
}
