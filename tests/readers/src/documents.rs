//! JSON of an image: the list of its layout, the manifest, the machine's state.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::image::layout::Listing;
use runnel_snapshot::image::manifest::{ImageManifest, ManifestDraft, VOLUMES_MAX};
use runnel_snapshot::image::reference::Wanted;
use runnel_snapshot::state::{FIRST_CHUNKS_MAX, FORMAT_VERSION, MachineState};
use serde_json::Value;

/// `index.json`.
pub fn index_json(bytes: &[u8]) -> bool {
    let Ok(listing) = Listing::parse(bytes) else {
        return false;
    };
    assert!(
        listing.describe().len() < 4096,
        "what is shown of a list is short"
    );
    for (blob, name) in listing.images() {
        let pinned = listing.choose(&Wanted::Pinned(blob.digest));
        assert_eq!(pinned.map(|found| found.digest), Some(blob.digest));
        if let Some(name) = name {
            assert!(listing.choose(&Wanted::Named(name.to_owned())).is_some());
        }
    }
    let only = listing.choose(&Wanted::Only);
    assert!(only.is_none() || listing.images().any(|(blob, _)| Some(blob) == only));
    only.is_some()
}

/// A manifest as it comes, or with the digests of what is inline made right: nothing behind them would be reached.
pub fn manifest(bytes: &[u8]) -> bool {
    let as_it_comes = read_manifest(bytes);
    let mended = serde_json::from_slice(bytes).is_ok_and(|mut manifest: Value| {
        mend(&mut manifest);
        read_manifest(manifest.to_string().as_bytes())
    });
    as_it_comes || mended
}

/// Makes length and digest of everything inline right, and the lengths of the indexes to which roots lead.
pub(crate) fn mend(manifest: &mut Value) {
    for path in ["/config", "/layers"] {
        match manifest.pointer_mut(path) {
            Some(Value::Array(descriptors)) => descriptors.iter_mut().for_each(mend_descriptor),
            Some(descriptor) => mend_descriptor(descriptor),
            None => {}
        }
    }
}

fn mend_descriptor(descriptor: &mut Value) {
    let inline = descriptor.get("data").and_then(Value::as_str);
    let Some(inline) = inline.and_then(|data| BASE64.decode(data).ok()) else {
        return;
    };
    descriptor["size"] = inline.len().into();
    descriptor["digest"] = BlobDigest::of(&inline).to_string().into();
}

fn read_manifest(bytes: &[u8]) -> bool {
    let Ok(manifest) = ImageManifest::parse(bytes) else {
        return false;
    };
    assert_eq!(manifest.digest, BlobDigest::of(bytes));
    assert!(manifest.volumes.len() <= VOLUMES_MAX);
    let blobs = manifest.blobs();
    for volume in &manifest.volumes {
        assert!(!volume.layers.is_empty());
        assert_eq!(volume.index.bytes, volume.root.index_bytes());
        let blob_of = |digest| blobs.iter().any(|blob| blob.digest == digest);
        assert!(blob_of(volume.index.digest) && volume.layers.iter().all(|layer| blob_of(layer.digest)));
        let _ = volume.stored_bytes();
    }
    if let Some(inline) = &manifest.state_inline {
        assert_eq!(BlobDigest::of(inline), manifest.state.digest);
    }
    let draft = ManifestDraft {
        state: manifest.state,
        state_inline: manifest.state_inline.clone(),
        volumes: manifest.volumes.clone(),
        working_set: manifest.working_set,
        parent: manifest.parent,
        urls: manifest.urls.clone(),
    };
    let written = draft.to_bytes().expect("what was read can be written");
    let again = ImageManifest::parse(&written).expect("what was written can be read");
    assert_eq!(again.volumes, manifest.volumes);
    assert_eq!(
        (again.state, again.working_set, again.parent),
        (manifest.state, manifest.working_set, manifest.parent)
    );
    true
}

/// The JSON of a machine's state, compressed here; or a blob that is compressed already.
pub fn machine_state(bytes: &[u8]) -> bool {
    if bytes.starts_with(b"{") {
        let blob = zstd::bulk::compress(bytes, 1).expect("zstd has memory");
        return read_state(&blob);
    }
    read_state(bytes)
}

fn read_state(blob: &[u8]) -> bool {
    let Ok(state) = MachineState::decode(blob) else {
        return false;
    };
    assert!(state.format_version <= FORMAT_VERSION);
    assert!(state.first_chunks.len() <= FIRST_CHUNKS_MAX);
    let again = MachineState::decode(&state.encode().expect("what was read can be written"));
    let again = again.expect("what was written can be read");
    assert_eq!(again.first_chunks, state.first_chunks);
    // Numbers with a fraction, which no section has, lose their last digit.
    let names = |state: &MachineState| -> Vec<_> {
        let sections = state.sections.iter();
        sections
            .map(|section| (section.kind.clone(), section.id.clone(), section.version))
            .collect()
    };
    assert_eq!(names(&again), names(&state));
    true
}
