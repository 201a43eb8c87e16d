//! Verify finds what is wrong, by name, in images that were damaged and in images that were forged.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod fixture;

use std::fs;
use std::path::{Path, PathBuf};

use runnel_snapshot::digest::ChunkDigest;
use runnel_snapshot::image::ImageError;
use runnel_snapshot::image::layout::Layout;
use runnel_snapshot::image::manifest::{ImageVolume, ManifestDraft};
use runnel_snapshot::image::publication::Publication;
use runnel_snapshot::image::reference::Wanted;
use runnel_snapshot::index::{Entry, INDEX_BLOB_HEADER, IndexBuilder, LayerNumber, StoredChunk};
use runnel_snapshot::layer::frame::append_zero_frame;
use runnel_snapshot::layer::seek_table::SeekTableWriter;
use runnel_snapshot::state::{FirstChunk, MachineState};
use runnel_snapshot::units::{ByteRange, ChunkIndex, ChunkSize};
use runnel_snapshot::verify::{Report, VerifyProgress, verify};
use runnel_snapshot::volume::VolumeName;

use fixture::{CHUNK, chunk_of, publish, read_volume};

fn check(target: &Path) -> Report {
    verify(
        &Layout::open(target).unwrap(),
        &Wanted::Only,
        2,
        &VerifyProgress::default(),
    )
    .unwrap()
}

/// Everything that was found, as people read it.
fn findings(target: &Path) -> String {
    findings_of(&check(target))
}

fn findings_of(report: &Report) -> String {
    report
        .findings
        .iter()
        .map(|finding| finding.trace() + "\n")
        .collect()
}

#[test]
fn a_sound_image_has_no_findings_and_all_of_it_was_looked_at() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("image");
    publish(&target).unwrap();
    let progress = VerifyProgress::default();
    let report = verify(&Layout::open(&target).unwrap(), &Wanted::Only, 2, &progress).unwrap();
    assert!(report.is_sound(), "{:?}", report.findings);
    assert_eq!(
        (report.chunks, report.volume_bytes),
        (3, 4 * CHUNK as u64 + CHUNK as u64 / 2)
    );
    let (done, total) = progress.bytes();
    // Frames make up a layer but for its seek table: 5 frames at most, of 8 bytes each, and 17 around them.
    assert!(done <= total && total - done <= 17 + 5 * 8, "{done} of {total}");
}

#[test]
fn any_changed_byte_of_any_blob_is_found_under_the_blobs_name_and_no_wrong_byte_is_ever_read() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("image");
    let manifest = publish(&target).unwrap();
    let image = fixture::open(&target).unwrap();
    let truth = read_volume(&image, &VolumeName::Memory);
    for blob in image.manifest.blobs() {
        assert_ne!(blob.digest, manifest.digest);
        let path = target.join("blobs/sha256").join(blob.digest.hex());
        let good = fs::read(&path).unwrap();
        for at in (0..good.len()).step_by(1 + good.len() / 40) {
            let mut bad = good.clone();
            bad[at] ^= 0x20;
            fs::write(&path, bad).unwrap();
            let found = findings(&target);
            assert!(found.contains(&blob.digest.hex()), "byte {at} of {blob}: {found}");
            // Whoever reads it all the same gets the right bytes or an error.
            if let Some(read) = fixture::try_read_volume(&target, &VolumeName::Memory) {
                assert!(read == truth, "byte {at} of {blob}");
            }
        }
        fs::write(&path, good).unwrap();
    }
    assert!(check(&target).is_sound());
}

#[test]
fn a_changed_byte_of_what_leads_to_the_blobs_is_refused_or_means_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("image");
    let manifest = publish(&target).unwrap();
    let truth = read_volume(&fixture::open(&target).unwrap(), &VolumeName::Memory);
    let files = [
        "oci-layout".into(),
        "index.json".into(),
        format!("blobs/sha256/{}", manifest.digest.hex()),
    ];
    for (file, is_blob) in files.iter().zip([false, false, true]) {
        let path = target.join(file);
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x01;
            fs::write(&path, bad).unwrap();
            if let Some(read) = fixture::try_read_volume(&target, &VolumeName::Memory) {
                assert!(read == truth && !is_blob, "byte {at} of {file}");
            }
        }
        fs::write(&path, good).unwrap();
    }
    assert!(check(&target).is_sound());
}

#[test]
fn a_damaged_chunk_is_named_beside_its_blob() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("image");
    publish(&target).unwrap();
    let image = fixture::open(&target).unwrap();
    let volume = &image.manifest.volumes[0];
    let Entry::Data(stored) = image.index(volume).entry(ChunkIndex(3)).unwrap() else {
        panic!("chunk 3 has data")
    };
    let path = target.join("blobs/sha256").join(volume.layers[0].digest.hex());
    let mut bytes = fs::read(&path).unwrap();
    bytes[(stored.frame.start + stored.frame.len / 2) as usize] ^= 1;
    fs::write(&path, bytes).unwrap();
    let found = findings(&target);
    assert!(found.contains("volume memory, chunk 3"), "{found}");
    assert!(
        !found.contains("chunk 0") && !found.contains("chunk 4"),
        "{found}"
    );
}

#[test]
fn missing_and_truncated_blobs_are_findings_and_do_not_end_the_verification() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("image");
    publish(&target).unwrap();
    let image = fixture::open(&target).unwrap();
    let blob = |digest: &runnel_snapshot::digest::BlobDigest| target.join("blobs/sha256").join(digest.hex());
    let layer = image.manifest.volumes[0].layers[0];
    let bytes = fs::read(blob(&layer.digest)).unwrap();
    fs::write(blob(&layer.digest), &bytes[..bytes.len() / 2]).unwrap();
    fs::remove_file(blob(&image.manifest.state.digest)).unwrap();
    let found = findings(&target);
    assert!(
        found.contains(&layer.digest.hex()) && found.contains("truncated"),
        "{found}"
    );
    assert!(
        found.contains(&image.manifest.state.digest.hex()) && found.contains("not in"),
        "{found}"
    );
}

/// An image whose digests are all right, and whose layer and index are what `frames` and `entries` say.
struct Forgery {
    volume_bytes: u64,
    /// The bytes of each frame, and how much content the seek table claims for it.
    frames: Vec<(Vec<u8>, usize)>,
    entries: Vec<Entry>,
    first_chunk: Option<StoredChunk>,
    /// The format version of the machine state.
    state_version: u32,
}

fn zeros(content: usize) -> (Vec<u8>, usize) {
    let mut frame = Vec::new();
    append_zero_frame(content as u64, &mut frame);
    (frame, content)
}

fn data(plain: &[u8]) -> (Vec<u8>, usize) {
    (zstd::bulk::compress(plain, 1).unwrap(), plain.len())
}

impl Forgery {
    /// Two chunks of data and then two of zeros, nothing wrong yet.
    fn honest() -> Self {
        let frames = vec![data(&chunk_of(1)), data(&chunk_of(2)), zeros(2 * CHUNK)];
        let mut start = 0;
        let entries = [1, 2].map(|number| {
            let frame = ByteRange {
                start,
                len: frames[usize::from(number) - 1].0.len() as u64,
            };
            start += frame.len;
            let digest = ChunkDigest::of(&chunk_of(number));
            Entry::Data(StoredChunk {
                layer: LayerNumber(0),
                frame,
                digest,
            })
        });
        let entries = [&entries[..], &[Entry::Zero, Entry::Zero]].concat();
        Self {
            volume_bytes: 4 * CHUNK as u64,
            frames,
            entries,
            first_chunk: None,
            state_version: MachineState::new(0, Vec::new()).format_version,
        }
    }

    fn findings(self) -> String {
        let folder = tempfile::tempdir().unwrap();
        let target = self.write(folder.path());
        findings(&target)
    }

    fn write(self, folder: &Path) -> PathBuf {
        let target = folder.join("image");
        let publication = Publication::begin(&target).unwrap();
        let mut layer = publication.blob().unwrap();
        let mut table = SeekTableWriter::default();
        for (frame, content) in &self.frames {
            layer.write(frame).unwrap();
            table.push(frame.len() as u32, *content as u32).unwrap();
        }
        table.finish(|bytes| layer.write(bytes)).unwrap();
        let mut index = publication.blob().unwrap();
        index.write(INDEX_BLOB_HEADER).unwrap();
        let mut builder = IndexBuilder::new(self.volume_bytes, ChunkSize::DEFAULT, 1).unwrap();
        for entry in self.entries {
            builder.push(entry, |bytes| index.write(bytes)).unwrap();
        }
        let root = builder.finish();
        publication.add(&root.to_bytes()).unwrap();
        let (layers, index) = (vec![layer.finish().unwrap()], index.finish().unwrap());
        let volume = ImageVolume {
            name: VolumeName::Memory,
            layers,
            has_full_layer: true,
            index,
            root,
        };
        let mut state = MachineState::new(0, Vec::new());
        let first = self.first_chunk.map(|stored| FirstChunk {
            volume: VolumeName::Memory,
            chunk: ChunkIndex(0),
            entry: Entry::Data(stored),
        });
        state.first_chunks.extend(first);
        state.format_version = self.state_version;
        let state = publication.add(&state.encode().unwrap()).unwrap();
        let draft = ManifestDraft {
            state,
            state_inline: None,
            volumes: vec![volume],
            working_set: None,
            parent: None,
            urls: Default::default(),
        };
        publication.publish(&draft, None).unwrap();
        target
    }
}

#[test]
fn forged_images_are_found_out_although_every_digest_is_right() {
    assert_eq!(Forgery::honest().findings(), "");
    let forged = |change: fn(&mut Forgery), part: &str| {
        let mut forgery = Forgery::honest();
        change(&mut forgery);
        let found = forgery.findings();
        assert!(found.contains(part), "expected {part:?}: {found:?}");
    };
    // Frames that are not their chunks.
    forged(|f| f.frames[1] = data(&chunk_of(7)), "chunk 1");
    forged(|f| f.frames.swap(0, 1), "chunk 0");
    // The index says zeros where the layer has data, and the other way round.
    forged(|f| f.entries[1] = Entry::Zero, "chunk 1");
    forged(|f| f.frames[2] = data(&[3; 2 * CHUNK]), "other bytes");
    forged(|f| f.entries[2] = f.entries[1].clone(), "chunk 2");
    // Zeros of another length than the seek table claims, for stock zstd to stumble over.
    forged(|f| f.frames[2].0 = zeros(2 * CHUNK + 1).0, "zeros");
    forged(|f| f.frames[2].0 = zeros(CHUNK).0, "zeros");
    // Frames that cover another volume.
    forged(|f| f.frames[2] = zeros(3 * CHUNK), "the volume has");
    forged(|f| _ = f.frames.pop(), "the volume has");
    forged(|f| f.frames.push((data(b"more").0, 0)), "behind the end");
    forged(|f| f.frames.insert(2, zeros(1)), "inside it");
    // The state leads elsewhere.
    let mut forgery = Forgery::honest();
    let Entry::Data(stored) = forgery.entries[1] else {
        panic!("chunk 1 has data")
    };
    forgery.first_chunk = Some(stored);
    assert!(forgery.findings().contains("chunk 0 of memory"));
}

#[test]
fn an_image_of_a_newer_runnel_is_not_judged_and_not_called_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let mut forgery = Forgery::honest();
    forgery.state_version += 1;
    let target = forgery.write(folder.path());
    let refusal = |what: &str| {
        let layout = Layout::open(&target).map_err(ImageError::from);
        let report = layout.and_then(|layout| verify(&layout, &Wanted::Only, 2, &VerifyProgress::default()));
        let error = report.map(|report| findings_of(&report)).unwrap_err();
        let reason = error.to_string();
        assert!(
            reason.contains(what) && reason.contains("newer Runnel"),
            "{reason}"
        );
        assert!(!error.is_damage(), "{reason}");
    };
    refusal("format version 2");
    fs::write(target.join("oci-layout"), r#"{"imageLayoutVersion":"1.1.0"}"#).unwrap();
    refusal("layout of version \"1.1.0\"");
}

#[test]
fn a_cancelled_verification_says_that_it_is_not_the_whole_truth() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("image");
    publish(&target).unwrap();
    let progress = VerifyProgress::default();
    progress.cancel();
    let report = verify(&Layout::open(&target).unwrap(), &Wanted::Only, 2, &progress).unwrap();
    assert!(report.cancelled && !report.is_sound());
    assert!(
        report.findings.is_empty(),
        "what was not looked at is not a finding: {:?}",
        report.findings
    );
}
