//! Images that are damaged, forged, incomplete or of another time: refused by name before anything runs, or, where
//! that shows only as bytes are needed, a machine that waits and says for what, and never sees a wrong byte.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use runnel_snapshot::blobs::Blob;
use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::image::Image;
use runnel_snapshot::image::layout::Layout;
use runnel_snapshot::image::reference::Wanted;
use runnel_snapshot::index::{Entry, INDEX_BLOB_HEADER, IndexBuilder, StoredChunk};
use runnel_snapshot::state::MachineState;
use runnel_snapshot::units::ChunkIndex;
use runnel_snapshot::verify::{VerifyProgress, verify};
use runnel_snapshot::volume::VolumeName;
use runnel_tests::bare::{
    about, booted, hear, load, refusal, resumed, save, tell, wait_until, wait_until_stalled,
};
use runnel_tests::forge;
use runnel_tests::monitor::Monitor;
use runnel_tests::served::{Served, TRICKLE};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A guest that has nothing to wait for answers sooner.
const SILENCE: Duration = Duration::from_millis(500);

/// An image of a machine that has 4 MiB of pattern at 8 MiB.
struct Victim {
    _folder: TempDir,
    path: PathBuf,
}

impl Victim {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        save(&booted("fill:8m:4m:7 count:3"), &path);
        Self {
            _folder: folder,
            path,
        }
    }

    fn open(&self) -> Image {
        forge::open(&self.path)
    }

    fn blob(&self, digest: &BlobDigest) -> PathBuf {
        forge::blob(&self.path, digest)
    }

    fn layer(&self) -> BlobDigest {
        self.open().volume(&VolumeName::Memory).unwrap().layers[0].digest
    }

    /// Where the frame lies that holds the byte at `offset` of memory.
    fn frame_holding(&self, offset: u64) -> (ChunkIndex, u64, u64) {
        let image = self.open();
        let volume = image.volume(&VolumeName::Memory).unwrap();
        let chunk = volume.root.chunk_size().chunk_holding(offset);
        match image.index(volume).entry(chunk).unwrap() {
            Entry::Data(stored) => (chunk, stored.frame.start, stored.frame.len),
            other => panic!("{chunk} is {other:?}"),
        }
    }

    fn manifest(&self) -> Value {
        let path = self.blob(&self.open().digest());
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    fn replace_manifest(&self, manifest: &Value) {
        forge::replace_manifest(&self.path, manifest);
    }

    /// Lets the index of memory say something else of `chunk`, and returns the index's digest.
    fn forge_entry(&self, chunk: ChunkIndex, forge: impl FnOnce(&mut StoredChunk)) -> BlobDigest {
        let image = self.open();
        let volume = image.volume(&VolumeName::Memory).unwrap();
        let index = image.index(volume);
        let mut bytes = INDEX_BLOB_HEADER.to_vec();
        let mut builder = IndexBuilder::new(volume.root.volume_bytes(), volume.root.chunk_size(), 1).unwrap();
        let mut forge = Some(forge);
        for number in 0..volume.root.chunks() {
            let mut entry = index.entry(ChunkIndex(number)).unwrap();
            if let (Entry::Data(stored), true) = (&mut entry, number == chunk.0) {
                forge.take().unwrap()(stored);
            }
            let write = |segment: &[u8]| {
                bytes.extend_from_slice(segment);
                Ok::<_, ()>(())
            };
            builder.push(entry, write).unwrap();
        }
        let root = builder.finish();
        let blob = Blob {
            digest: self.add(&bytes),
            bytes: bytes.len() as u64,
        };
        self.add(&root.to_bytes());
        forge::manifest(&self.path, |manifest| {
            let volumes = manifest.volumes.iter_mut();
            let memory = volumes
                .into_iter()
                .find(|volume| volume.name == VolumeName::Memory);
            let memory = memory.unwrap();
            (memory.index, memory.root) = (blob, root);
        });
        blob.digest
    }

    /// What `runnel verify` finds.
    fn findings(&self) -> Vec<String> {
        let layout = Layout::open(&self.path).unwrap();
        let report = verify(&layout, &Wanted::Only, 1, &VerifyProgress::default()).unwrap();
        report.findings.iter().map(|finding| finding.trace()).collect()
    }

    fn add(&self, bytes: &[u8]) -> BlobDigest {
        forge::add(&self.path, bytes)
    }

    /// Why it is not loaded. The monitor must be none the worse for it.
    fn refused(&self, monitor: &Monitor) -> String {
        let request = json!({"image": self.path, "resume_vm": true});
        let reason = refusal(monitor, "PUT", "/snapshot/load", &request);
        assert_eq!(about(monitor)["state"], "Not started", "{reason}");
        reason
    }
}

/// Inverts the byte at `at`; a second time repairs it.
fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[!byte[0]], at).unwrap();
}

/// As `rsync` and `install` do it: another file takes the place.
fn flip_in_another_file(path: &Path, at: u64) {
    let beside = path.with_extension("new");
    fs::copy(path, &beside).unwrap();
    flip(&beside, at);
    fs::rename(&beside, path).unwrap();
}

fn middle(path: &Path) -> u64 {
    fs::metadata(path).unwrap().len() / 2
}

#[test]
fn a_flipped_byte_in_what_is_read_at_once_is_refused_and_names_the_blob() {
    let victim = Victim::new();
    let image = victim.open();
    let monitor = Monitor::start();
    // The manifest, and the machine state once it is not inline in the manifest any more.
    let path = victim.blob(&image.digest());
    flip(&path, middle(&path));
    assert_names(&victim.refused(&monitor), &image.digest());
    flip(&path, middle(&path));

    let mut manifest = victim.manifest();
    assert!(
        manifest["config"]
            .as_object_mut()
            .unwrap()
            .remove("data")
            .is_some()
    );
    victim.replace_manifest(&manifest);
    let path = victim.blob(&image.manifest.state.digest);
    flip(&path, middle(&path));
    assert_names(&victim.refused(&monitor), &image.manifest.state.digest);
    flip(&path, middle(&path));
    // The same monitor loads it once it is whole.
    let mut monitor = monitor;
    monitor.demand(
        "PUT",
        "/snapshot/load",
        &json!({"image": victim.path, "resume_vm": true}),
    );
    tell(&mut monitor, "checkfill:8m:4m:7", "checkfill=right");
}

fn assert_names(reason: &str, digest: &BlobDigest) {
    assert!(
        reason.contains(&digest.hex()) && reason.contains("does not match its digest"),
        "{reason}"
    );
}

#[test]
fn an_index_root_that_is_not_the_one_of_its_digest_is_refused() {
    let victim = Victim::new();
    let mut manifest = victim.manifest();
    let layers = manifest["layers"].as_array_mut().unwrap();
    let root = layers.iter_mut().find(|layer| !layer["data"].is_null()).unwrap();
    let digest = root["digest"].as_str().unwrap().to_owned();
    let data = root["data"].as_str().unwrap();
    let other = if data.starts_with('A') { "B" } else { "A" };
    root["data"] = json!(format!("{other}{}", &data[1..]));
    victim.replace_manifest(&manifest);
    let reason = victim.refused(&Monitor::start());
    let hex = digest.split_once(':').unwrap().1;
    assert!(reason.contains(hex), "{reason}");
}

#[test]
fn a_truncated_blob_and_a_missing_one_are_refused_by_name() {
    let victim = Victim::new();
    let monitor = Monitor::start();
    let layer = victim.layer();
    let path = victim.blob(&layer);
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    let reason = victim.refused(&monitor);
    assert!(
        reason.contains(&layer.hex()) && reason.contains("truncated"),
        "{reason}"
    );
    fs::remove_file(&path).unwrap();
    let reason = victim.refused(&monitor);
    assert!(
        reason.contains(&layer.hex()) && reason.contains("is not in"),
        "{reason}"
    );
}

#[test]
fn an_image_of_a_newer_runnel_is_refused_and_says_so() {
    let victim = Victim::new();
    let monitor = Monitor::start();
    let manifest = victim.manifest();
    let mut newer = manifest.clone();
    newer["artifactType"] = json!("application/vnd.runnel.image.v2");
    victim.replace_manifest(&newer);
    let reason = victim.refused(&monitor);
    assert!(
        reason.contains("image.v2") && reason.contains("newer Runnel"),
        "{reason}"
    );
    let mut newer = manifest;
    for layer in newer["layers"].as_array_mut().unwrap() {
        if layer["mediaType"] == "application/vnd.runnel.volume-index.v1" {
            layer["mediaType"] = json!("application/vnd.runnel.volume-index.v2");
        }
    }
    victim.replace_manifest(&newer);
    let reason = victim.refused(&monitor);
    assert!(reason.contains("volume-index.v2"), "{reason}");
}

#[test]
fn an_index_of_a_newer_runnel_is_refused_and_says_so() {
    let victim = Victim::new();
    let mut manifest = victim.manifest();
    let layers = manifest["layers"].as_array_mut().unwrap();
    let root = layers.iter_mut().find(|layer| !layer["data"].is_null()).unwrap();
    let mut bytes = BASE64.decode(root["data"].as_str().unwrap()).unwrap();
    bytes[4] += 1;
    root["data"] = json!(BASE64.encode(&bytes));
    root["digest"] = json!(victim.add(&bytes).to_string());
    victim.replace_manifest(&manifest);
    let reason = victim.refused(&Monitor::start());
    assert!(
        reason.contains("volume memory")
            && reason.contains("index has version 2")
            && reason.contains("newer Runnel"),
        "{reason}"
    );
}

#[test]
fn a_section_of_a_newer_runnel_and_an_unknown_one_are_refused_by_name() {
    let victim = Victim::new();
    let monitor = Monitor::start();
    let sound = forge::open(&victim.path).state_bytes().unwrap();
    let refused = |forge: &dyn Fn(&mut MachineState)| {
        forge::state(&victim.path, |state| {
            *state = MachineState::decode(&sound).unwrap();
            forge(state);
        });
        victim.refused(&monitor)
    };
    let serial = |state: &MachineState| {
        let mut sections = state.sections.iter();
        sections.position(|section| section.kind == "serial").unwrap()
    };
    let reason = refused(&|state| {
        let serial = serial(state);
        state.sections[serial].version += 1;
    });
    assert!(
        reason.contains("section \"serial\" has version 2") && reason.contains("newer Runnel"),
        "{reason}"
    );
    let reason = refused(&|state| {
        let mut other = state.sections[serial(state)].clone();
        other.kind = "teleporter".into();
        state.sections.push(other);
    });
    assert!(reason.contains("teleporter"), "{reason}");
    let reason = refused(&|state| state.format_version += 1);
    assert!(
        reason.contains("version 2") && reason.contains("newer Runnel"),
        "{reason}"
    );
}

#[test]
fn a_directory_that_is_no_image_and_none_at_all_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let monitor = Monitor::start();
    for path in [folder.path().to_owned(), folder.path().join("none")] {
        let reason = refusal(&monitor, "PUT", "/snapshot/load", &json!({"image": path}));
        assert!(reason.contains(path.to_str().unwrap()), "{reason}");
    }
    assert_eq!(about(&monitor)["state"], "Not started");
}

/// The guest waits for a chunk that is damaged; then it is repaired, and the guest goes on with the right bytes.
fn stalls_until_repaired(
    victim: &Victim,
    blob: &BlobDigest,
    at: u64,
    chunk: Option<ChunkIndex>,
    repair: fn(&Path, u64),
) {
    let path = victim.blob(blob);
    flip(&path, at);
    let mut machine = resumed(&victim.path);
    machine.type_line("checkfill:8m:4m:7");
    let stalled = wait_until_stalled(&machine);
    assert_eq!(stalled["volume"], "memory", "{stalled}");
    let reason = stalled["reason"].as_str().unwrap();
    assert!(reason.contains(&blob.hex()), "{reason}");
    if let Some(chunk) = chunk {
        assert_eq!(stalled["chunk"], chunk.0, "{stalled}");
        assert!(
            !reason.contains(&chunk.to_string()),
            "it is named beside: {reason}"
        );
    }
    // Whatever needs the machine to stand is refused with the reason, and leaves it waiting.
    let again = victim.path.with_extension("again");
    for (verb, path, body) in [
        ("PATCH", "/vm", json!({"state": "Paused"})),
        ("PUT", "/snapshot/create", json!({"image_path": again})),
    ] {
        let refused = refusal(&machine, verb, path, &body);
        assert!(
            refused.contains("stalled") && refused.contains(&blob.hex()),
            "{refused}"
        );
        if let Some(chunk) = chunk {
            assert_eq!(refused.matches(&chunk.to_string()).count(), 1, "{refused}");
        }
    }
    assert!(!again.exists());
    assert_eq!(about(&machine)["state"], "Running");

    repair(&path, at);
    hear(&mut machine, "checkfill=right");
    wait_until("it is stalled no more", || about(&machine)["stalled"].is_null());
    tell(&mut machine, "count:1", "count=4");
    // A snapshot of it is whole, too.
    save(&machine, &again);
    tell(&mut resumed(&again), "checkfill:8m:4m:7", "checkfill=right");
}

#[test]
fn a_flipped_byte_in_a_frame_stalls_the_machine_which_goes_on_when_it_is_repaired() {
    let victim = Victim::new();
    let (chunk, start, len) = victim.frame_holding(9 << 20);
    stalls_until_repaired(
        &victim,
        &victim.layer(),
        start + len / 2,
        Some(chunk),
        flip_in_another_file,
    );
}

#[test]
fn a_flipped_byte_in_the_index_stalls_the_machine_which_goes_on_when_it_is_repaired() {
    let victim = Victim::new();
    let index = victim.open().volume(&VolumeName::Memory).unwrap().index.digest;
    let at = middle(&victim.blob(&index));
    stalls_until_repaired(&victim, &index, at, None, flip);
}

/// The guest waits for what an index, forged with all its digests, places where it cannot be.
fn stalls_at_forged(forge: impl FnOnce(&mut StoredChunk), words: &str) {
    let victim = Victim::new();
    let (chunk, ..) = victim.frame_holding(9 << 20);
    let index = victim.forge_entry(chunk, forge);
    let mut machine = resumed(&victim.path);
    machine.type_line("checkfill:8m:4m:7");
    let stalled = wait_until_stalled(&machine);
    let reason = stalled["reason"].as_str().unwrap();
    assert_eq!(stalled["volume"], "memory", "{stalled}");
    assert!(
        reason.contains(&index.hex())
            && reason.contains(words)
            && reason.contains(&format!("chunk {}", chunk.0)),
        "{reason}"
    );
    let findings = victim.findings();
    assert!(
        findings
            .iter()
            .any(|finding| finding.contains(&index.hex()) && finding.contains(words)),
        "{findings:?}"
    );
    // It did not get past what it cannot have.
    assert_eq!(machine.wait_for_silence(SILENCE), "");
}

#[test]
fn frames_that_overlap_stall_the_machine_and_are_named() {
    stalls_at_forged(|stored| stored.frame.start -= 1, "over that of its chunk");
}

#[test]
fn a_frame_outside_its_layer_stalls_the_machine_and_is_named() {
    stalls_at_forged(|stored| stored.frame.start = 1 << 40, "outside of it");
}

#[test]
fn a_layer_that_is_gone_stalls_the_machine_which_goes_on_when_it_is_there_again() {
    let served = Served::new();
    let _agent = served.agents().start(&TRICKLE);
    let mut machine = served.load(&json!({"stall_after_ms": 500}));
    let image = Image::open_directory(served.image(), &Wanted::Only).unwrap();
    let layer = image.volume(&VolumeName::Memory).unwrap().layers[0].digest;
    let path = served.image().join("blobs/sha256").join(layer.hex());
    let aside = path.with_extension("aside");
    fs::rename(&path, &aside).unwrap();
    machine.demand("PATCH", "/vm", &json!({"state": "Resumed"}));
    machine.type_line("checkfill:8m:256k:7");
    let stalled = wait_until_stalled(&machine);
    let reason = stalled["reason"].as_str().unwrap();
    assert_eq!(stalled["volume"], "memory", "{stalled}");
    assert!(stalled["chunk"].is_u64(), "{stalled}");
    assert!(reason.contains(&layer.hex()), "{reason}");
    assert!(reason.contains("removed in use: copy it there again"), "{reason}");
    assert_eq!(stalled["needs_repair"], true, "{stalled}");
    fs::rename(&aside, &path).unwrap();
    hear(&mut machine, "checkfill=right");
}

#[test]
fn a_snapshot_whose_source_is_damaged_fails_with_the_reason_and_leaves_nothing() {
    let victim = Victim::new();
    let (_, start, len) = victim.frame_holding(9 << 20);
    let layer = victim.layer();
    flip(&victim.blob(&layer), start + len / 2);
    // It stands, so nothing of it waits for the chunk: only the snapshot does.
    let machine = load(&json!({"image": victim.path, "resume_vm": false}));
    let again = victim.path.with_extension("again");
    let reason = refusal(&machine, "PUT", "/snapshot/create", &json!({"image_path": again}));
    assert!(reason.contains(&layer.hex()), "{reason}");
    let left: Vec<_> = fs::read_dir(victim.path.parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["image"]);
    assert_eq!(about(&machine)["state"], "Paused");
}

#[test]
fn stock_zstd_makes_guest_ram_of_a_memory_layer_byte_for_byte() {
    let folder = tempfile::tempdir().unwrap();
    let machine = booted("fill:8m:4m:7 stamp:20m:1m:3 count:3");
    machine.demand("PATCH", "/vm", &json!({"state": "Paused"}));
    let (state, memory) = (folder.path().join("state"), folder.path().join("memory"));
    machine.demand(
        "PUT",
        "/snapshot/create",
        &json!({"snapshot_path": state, "mem_file_path": memory}),
    );
    let path = folder.path().join("image");
    save(&machine, &path);
    let victim = Victim {
        _folder: folder,
        path,
    };
    let zstd = std::process::Command::new("zstd")
        .args(["-dc", "--"])
        .arg(victim.blob(&victim.layer()))
        .output()
        .expect("the zstd program is needed: apt-get install zstd");
    assert!(zstd.status.success());
    // Not assert_eq, which would print both.
    assert!(zstd.stdout == fs::read(&memory).unwrap(), "RAM and layer differ");
}
