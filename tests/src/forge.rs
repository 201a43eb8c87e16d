//! Images as tests look at them: whether they are sound, and changed behind their author's back, with every digest on the
//! way made right again.

use std::fs;
use std::path::{Path, PathBuf};

use runnel_snapshot::blobs::Blob;
use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::image::Image;
use runnel_snapshot::image::layout::Layout;
use runnel_snapshot::image::manifest::{ImageManifest, ManifestDraft};
use runnel_snapshot::image::reference::Wanted;
use runnel_snapshot::state::MachineState;
use runnel_snapshot::verify::{VerifyProgress, verify};
use serde_json::{Value, json};

/// An image that is sound: every digest of it was looked at, and the index held against every frame.
///
/// # Panics
/// When it is not.
#[allow(clippy::must_use_candidate, reason = "that it is sound is often all")]
#[track_caller]
pub fn verified(image: &Path) -> Image {
    let layout = Layout::open(image).expect("an image's directory");
    let report = verify(&layout, &Wanted::Only, 1, &VerifyProgress::default());
    let report = report.expect("it can be verified");
    assert!(report.is_sound(), "{:?}", report.findings);
    open(image)
}

/// The image of a directory that has one.
///
/// # Panics
/// When it has none, or more.
#[must_use]
pub fn open(image: &Path) -> Image {
    Image::open_directory(image, &Wanted::Only).expect("the directory has an image")
}

/// Where a blob of it lies.
#[must_use]
pub fn blob(image: &Path, digest: &BlobDigest) -> PathBuf {
    image.join("blobs/sha256").join(digest.hex())
}

/// Adds a blob.
///
/// # Panics
/// When it cannot be written.
#[must_use]
pub fn add(image: &Path, bytes: &[u8]) -> BlobDigest {
    let digest = BlobDigest::of(bytes);
    fs::write(blob(image, &digest), bytes).expect("a blob can be added");
    digest
}

/// Puts another manifest in the place of the image's, with the digest that it has.
///
/// # Panics
/// When it cannot be written.
pub fn replace_manifest(image: &Path, manifest: &Value) {
    let bytes = manifest.to_string().into_bytes();
    let digest = add(image, &bytes);
    let index = image.join("index.json");
    let listing = fs::read(&index).expect("an image has a list");
    let mut listing: Value = serde_json::from_slice(&listing).expect("the list is JSON");
    listing["manifests"][0]["digest"] = json!(digest.to_string());
    listing["manifests"][0]["size"] = json!(bytes.len());
    fs::write(index, listing.to_string()).expect("the list can be replaced");
}

/// Changes what the manifest's author would write, and signs for it.
///
/// # Panics
/// When it makes no manifest.
pub fn manifest(image: &Path, forge: impl FnOnce(&mut ImageManifest)) {
    let mut manifest = ImageManifest::clone(&open(image).manifest);
    forge(&mut manifest);
    let draft = ManifestDraft {
        state: manifest.state,
        state_inline: manifest.state_inline,
        volumes: manifest.volumes,
        working_set: manifest.working_set,
        parent: manifest.parent,
        urls: manifest.urls,
    };
    let bytes = draft.to_bytes().expect("it makes a manifest");
    replace_manifest(
        image,
        &serde_json::from_slice(&bytes).expect("a manifest is JSON"),
    );
}

/// Changes the machine's state.
///
/// # Panics
/// When it makes no state.
pub fn state(image: &Path, forge: impl FnOnce(&mut MachineState)) {
    let bytes = open(image).state_bytes().expect("the state can be read");
    let mut state = MachineState::decode(&bytes).expect("it is a state");
    forge(&mut state);
    let bytes = state.encode().expect("it makes a state");
    let blob = Blob {
        digest: add(image, &bytes),
        bytes: bytes.len() as u64,
    };
    manifest(image, |manifest| {
        (manifest.state, manifest.state_inline) = (blob, Some(bytes));
    });
}

/// Has the machine be away for so long: its host's clock showed less when it was saved.
///
/// # Panics
/// When the image has no clock.
pub fn age(image: &Path, away: std::time::Duration) {
    state(image, |state| {
        let clock = state.sections.iter_mut().find(|section| section.kind == "clock");
        let saved_at = &mut clock.expect("a machine has a clock").state["host_wall_ns"];
        let away_ns = u64::try_from(away.as_nanos()).expect("it is not that long");
        let then = saved_at.as_u64().expect("it is in nanoseconds") - away_ns;
        *saved_at = then.into();
    });
}
