//! Thin images: what changed since an image of another host, whose layers stay there.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod chain;
mod fixture;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use runnel_snapshot::blobs::{Blob, BlobError, BlobStore};
use runnel_snapshot::capture::{CaptureError, CaptureSettings, Captured, Job, VolumeSource};
use runnel_snapshot::causes::with_causes;
use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::image::below::{AwayImage, BelowImage};
use runnel_snapshot::image::complete::{CompleteError, complete};
use runnel_snapshot::image::layout::Layout;
use runnel_snapshot::image::manifest::{ImageVolume, Urls};
use runnel_snapshot::image::reference::Wanted;
use runnel_snapshot::image::{Image, ImageError, folder};
use runnel_snapshot::pager::PageSet;
use runnel_snapshot::state::MachineState;
use runnel_snapshot::units::{ChunkIndex, ChunkSize, PAGE_SIZE, PageIndex};
use runnel_snapshot::verify::{Report, VerifyProgress, verify};
use runnel_snapshot::volume::VolumeName;

use chain::{Chain, Change, assert_empty_but, findings, page_of, read};
use fixture::open;

const PAGE: usize = PAGE_SIZE as usize;
const PAGES: usize = 64;

/// An image as another host has it: of it this one is told what an agent tells.
struct Away {
    image: Image,
    /// What comes before a blob's digits in its URL.
    at: Vec<&'static str>,
    /// Each blob that is read.
    read: Mutex<Vec<BlobDigest>>,
    /// Whether an index was asked for.
    is_known: AtomicBool,
}

/// An index that is read over a link.
struct Line(Arc<Away>);

impl BlobStore for Line {
    fn read_range(&self, blob: &Blob, offset: u64, into: &mut [u8]) -> Result<(), BlobError> {
        self.0.read.lock().unwrap().push(blob.digest);
        self.0.image.store.read_range(blob, offset, into)
    }
}

/// As the image below, and what was read of it.
struct Below(Arc<Away>);

impl AwayImage for Below {
    fn index(&self, _: &ImageVolume, _: &dyn Fn() -> bool) -> Result<Arc<dyn BlobStore>, BlobError> {
        self.0.is_known.store(true, Ordering::Relaxed);
        Ok(Arc::new(Line(Arc::clone(&self.0))))
    }

    // As an agent tells it: with an index.
    fn urls(&self, blob: &BlobDigest) -> Vec<String> {
        if !self.0.is_known.load(Ordering::Relaxed) {
            return Vec::new();
        }
        let places = self.0.at.iter();
        places.map(|at| format!("{at}{}", blob.hex())).collect()
    }
}

fn away(chain: &Chain, at: &[&'static str]) -> (BelowImage, Arc<Away>) {
    let away = Arc::new(Away {
        image: chain.image(),
        at: at.to_vec(),
        read: Mutex::default(),
        is_known: AtomicBool::new(false),
    });
    (BelowImage::Away(Arc::new(Below(Arc::clone(&away)))), away)
}

const FAR: [&str; 2] = [
    "http://far/v2/web/blobs/sha256:",
    "http://farther/web/blobs/sha256/",
];

/// A chain of two layers, with everything of the first still in use.
fn chain() -> Chain {
    let volume = (0..PAGES).flat_map(|page| page_of(1 + page as u8)).collect();
    let mut chain = Chain::new(ChunkSize::new(16 << 10).unwrap(), volume);
    chain.step(&[Change {
        first: 8,
        count: 2,
        seed: 200,
    }]);
    chain
}

/// The volume of the chain with `page` written, captured over `below`; what the volume is then.
fn changed(
    below: BelowImage,
    base: &ImageVolume,
    volume: &[u8],
    page: usize,
    target: &Path,
) -> (Result<Captured, CaptureError>, Vec<u8>) {
    let mut volume = volume.to_vec();
    volume[page * PAGE..][..PAGE].copy_from_slice(&page_of(99));
    let mut changed = PageSet::new(PAGES as u64);
    changed.insert_run(PageIndex(page as u64), 1);
    let source = VolumeSource::Changes {
        content: Arc::new(volume.clone()),
        changed,
        compares: false,
        below: below.clone(),
        base: base.clone(),
    };
    // A drive that is as it was lies there too.
    let drive = VolumeName::Drive("root".into());
    let unchanged = VolumeSource::Unchanged {
        below,
        volume: base.clone(),
    };
    let volumes = vec![(drive.clone(), unchanged), (VolumeName::Memory, source)];
    let job = Job::new(CaptureSettings::default(), volumes).unwrap();
    let job = job.with_first_chunks(vec![(drive, ChunkIndex(2)), (VolumeName::Memory, ChunkIndex(1))]);
    (job.run(target, MachineState::new(0, Vec::new())), volume)
}

/// A thin image over the chain's last one, and what its memory is.
fn thin(chain: &Chain, name: &str) -> (PathBuf, Vec<u8>, Arc<Away>) {
    let target = chain.folder().join(name);
    let (below, away) = away(chain, &FAR);
    let base = chain.image().manifest.volumes[0].clone();
    let (captured, volume) = changed(below, &base, &chain.volume, 20, &target);
    captured.unwrap();
    (target, volume, away)
}

fn verified(image: &Path) -> Report {
    let layout = Layout::open(image).unwrap();
    verify(&layout, &Wanted::Only, 2, &VerifyProgress::default()).unwrap()
}

/// The files of an image's blobs.
fn blobs(image: &Path) -> usize {
    fs::read_dir(image.join("blobs/sha256")).unwrap().count()
}

#[test]
fn what_changed_over_an_image_of_another_host_pulls_in_its_index_alone_and_says_where_the_rest_is() {
    let chain = chain();
    let (path, _, away) = thin(&chain, "thin");
    let base = away.image.manifest.volumes[0].clone();
    let read = away.read.lock().unwrap();
    assert!(!read.is_empty() && read.iter().all(|blob| *blob == base.index.digest));

    let (image, missing) = Image::open_thin(&path, &Wanted::Only).unwrap();
    assert_eq!(missing, base.layers);
    assert_eq!(image.manifest.volumes[1].layers[..2], base.layers);
    assert_eq!(image.manifest.volumes[0].layers, base.layers);
    let urls = base.layers.iter().map(|layer| {
        let urls = FAR.map(|at| format!("{at}{}", layer.digest.hex()));
        (layer.digest, urls.to_vec())
    });
    assert_eq!(image.manifest.urls, urls.collect::<Urls>());
    // Manifest, state, a layer, and two indexes with their roots.
    assert_eq!(blobs(&path), 7);

    let refused = Image::open_directory(&path, &Wanted::Only).err().unwrap();
    assert!(matches!(&refused, ImageError::Thin { layer, .. } if *layer == base.layers[0].digest));
    assert!(!refused.is_damage());
    let told = refused.to_string();
    assert!(told.contains(FAR[0]) && told.contains("image complete"), "{told}");

    let report = verified(&path);
    assert!(report.is_sound(), "{:?}", report.findings);
    assert_eq!((report.layers_elsewhere, report.chunks), (2, 0));
    let listed = folder::list(chain.folder()).unwrap();
    assert!(listed.broken.is_empty(), "{:?}", listed.broken);
    let listed: Vec<_> = listed.images.iter().map(|image| image.elsewhere.len()).collect();
    assert_eq!(listed, [0, 0, 2]);
}

#[test]
fn what_changed_over_a_thin_image_is_thin_too_and_the_layers_that_are_here_are_taken_over() {
    let chain = chain();
    let (path, volume, _) = thin(&chain, "thin");
    let (below, _) = Image::open_thin(&path, &Wanted::Only).unwrap();
    let here = BelowImage::of(Arc::new(Layout::open(&path).unwrap()), &below.manifest);
    let base = &below.manifest.volumes[1];
    assert!(here.has(base) && !here.has_here(base));
    let target = chain.folder().join("next");
    let (captured, volume) = changed(here.clone(), base, &volume, 21, &target);
    let captured = captured.unwrap();
    assert_eq!(captured.urls, below.manifest.urls);
    let (_, missing) = Image::open_thin(&target, &Wanted::Only).unwrap();
    assert_eq!(missing, chain.image().manifest.volumes[0].layers);

    // Made whole, each is what it stands for.
    for layer in missing {
        complete(
            &Layout::open(&target).unwrap(),
            &layer,
            chain.image().store.as_ref(),
            &|_| true,
        )
        .unwrap();
    }
    assert_eq!(findings(&target), "");
    assert!(read(&open(&target).unwrap(), &VolumeName::Memory) == volume);
    let made = open(&target).unwrap();
    assert_eq!(made.manifest.digest, captured.manifest.digest);
    assert!(
        BelowImage::of(Arc::new(Layout::open(&target).unwrap()), &made.manifest)
            .has_here(&made.manifest.volumes[1])
    );

    // A layer that is neither here nor anywhere is no base.
    fs::remove_file(Layout::open(&path).unwrap().blob_path(&base.layers[2].digest)).unwrap();
    assert!(!here.has(base));
}

#[test]
fn a_thin_image_is_made_whole_by_right_bytes_alone_and_stays_as_it_is_without_them() {
    /// A store whose bytes are not the blob's.
    struct Wrong(Arc<dyn BlobStore>);
    impl BlobStore for Wrong {
        fn read_range(&self, blob: &Blob, offset: u64, into: &mut [u8]) -> Result<(), BlobError> {
            self.0.read_range(blob, offset, into)?;
            into[0] ^= 1;
            Ok(())
        }
    }
    let chain = chain();
    let (path, volume, away) = thin(&chain, "thin");
    let (_, missing) = Image::open_thin(&path, &Wanted::Only).unwrap();
    let layout = Layout::open(&path).unwrap();
    let before = (blobs(&path), fs::read_dir(chain.folder()).unwrap().count());
    let is_as_before = || {
        assert_eq!(
            (blobs(&path), fs::read_dir(chain.folder()).unwrap().count()),
            before
        );
    };
    let store = away.image.store.clone();
    let failed = complete(&layout, &missing[0], &Wrong(store.clone()), &|_| true).unwrap_err();
    assert!(
        matches!(failed, CompleteError::Blob(BlobError::Corrupt { .. })),
        "{failed}"
    );
    is_as_before();
    let failed = complete(&layout, &missing[0], store.as_ref(), &|_| false).unwrap_err();
    assert!(matches!(failed, CompleteError::Cancelled), "{failed}");
    is_as_before();
    for layer in &missing {
        complete(&layout, layer, store.as_ref(), &|_| true).unwrap();
    }
    assert_eq!(findings(&path), "");
    assert!(read(&open(&path).unwrap(), &VolumeName::Memory) == volume);
    assert!(read(&open(&path).unwrap(), &VolumeName::Drive("root".into())) == chain.volume);
    // Nobody is asked for it any more.
    let report = verified(&path);
    assert_eq!((report.layers_elsewhere, report.is_sound()), (0, true));
}

#[test]
fn damage_of_what_a_thin_image_has_is_found_and_a_missing_layer_of_no_url_is_damage() {
    let chain = chain();
    let (path, ..) = thin(&chain, "thin");
    let (image, _) = Image::open_thin(&path, &Wanted::Only).unwrap();
    let own = Layout::open(&path)
        .unwrap()
        .blob_path(&image.manifest.volumes[1].layers[2].digest);
    let mut bytes = fs::read(&own).unwrap();
    bytes[20] ^= 1;
    fs::write(&own, bytes).unwrap();
    let report = verified(&path);
    assert!(!report.is_sound());
    let told: String = report.findings.iter().map(|finding| finding.trace()).collect();
    assert!(told.contains("does not match its digest"), "{told}");
    fs::remove_file(&own).unwrap();
    assert!(!verified(&path).is_sound());
    let refused = Image::open_thin(&path, &Wanted::Only).err().unwrap();
    assert!(refused.is_damage(), "{refused}");
}

#[test]
fn without_a_url_or_an_index_there_is_no_thin_image_and_nothing_is_left() {
    struct NoIndex;
    impl AwayImage for NoIndex {
        fn index(&self, volume: &ImageVolume, _: &dyn Fn() -> bool) -> Result<Arc<dyn BlobStore>, BlobError> {
            Err(BlobError::Unavailable {
                digest: volume.index.digest,
                reason: "the server is away".into(),
                transient: true,
            })
        }
        fn urls(&self, _: &BlobDigest) -> Vec<String> {
            Vec::new()
        }
    }
    let chain = chain();
    let base = chain.image().manifest.volumes[0].clone();
    let target = chain.folder().join("thin");
    for (below, reason) in [
        (away(&chain, &[]).0, "no URL of it is known"),
        (BelowImage::Away(Arc::new(NoIndex)), "the server is away"),
    ] {
        let (captured, _) = changed(below, &base, &chain.volume, 3, &target);
        let told = with_causes(&captured.unwrap_err());
        assert!(told.contains(reason), "{told}");
        assert_empty_but(chain.folder(), &["0", "1"]);
    }
}
