//! An image on disk: what is published opens again, half of one is never seen, and stock tools can read it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod fixture;

use std::fs;
use std::path::Path;

use runnel_snapshot::causes::with_causes;
use runnel_snapshot::decode::ChunkDecoder;
use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::image::Image;
use runnel_snapshot::image::folder::{FolderError, find, list, prune, remove};
use runnel_snapshot::image::manifest::ManifestDraft;
use runnel_snapshot::image::publication::{Publication, PublishError};
use runnel_snapshot::image::reference::Wanted;
use runnel_snapshot::index::Entry;
use runnel_snapshot::state::MachineState;
use runnel_snapshot::units::ChunkIndex;
use runnel_snapshot::volume::VolumeName;

use fixture::{CHUNK, chunk_of, publish};

fn read_chunk(image: &Image, chunk: u64) -> Vec<u8> {
    let volume = image.volume(&VolumeName::Memory).unwrap();
    let range = volume
        .root
        .chunk_size()
        .range_of(ChunkIndex(chunk), volume.root.volume_bytes());
    let mut plain = vec![0; range.len as usize];
    if let Entry::Data(stored) = image.index(volume).entry(ChunkIndex(chunk)).unwrap() {
        let mut frame = vec![0; stored.frame.len as usize];
        let layer = &volume.layers[usize::from(stored.layer.0)];
        image
            .store
            .read_range(layer, stored.frame.start, &mut frame)
            .unwrap();
        ChunkDecoder::new()
            .unwrap()
            .decode(&frame, &stored.digest, &mut plain)
            .unwrap();
    }
    plain
}

#[test]
fn what_was_published_opens_and_reads_back() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("image");
    let manifest = publish(&target).unwrap();

    for wanted in [
        Wanted::Only,
        Wanted::Named("latest".into()),
        Wanted::Pinned(manifest.digest),
    ] {
        let image = Image::open_directory(&target, &wanted).unwrap();
        assert_eq!(image.digest(), manifest.digest);
        assert_eq!(image.state().unwrap(), MachineState::new(0, Vec::new()));
        assert_eq!(read_chunk(&image, 0), chunk_of(1));
        assert_eq!(read_chunk(&image, 1), vec![0; CHUNK]);
        assert_eq!(read_chunk(&image, 2), vec![0; CHUNK]);
        assert_eq!(read_chunk(&image, 3), chunk_of(2));
        assert_eq!(read_chunk(&image, 4), chunk_of(3)[..CHUNK / 2]);
        assert!(
            image
                .index(&image.manifest.volumes[0])
                .entry(ChunkIndex(5))
                .is_err()
        );
    }
    for wanted in [Wanted::Named("other".into()), Wanted::Pinned(BlobDigest::of(b""))] {
        assert!(Image::open_directory(&target, &wanted).is_err());
    }
}

#[test]
fn an_existing_target_is_refused_and_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("image");
    let first = publish(&target).unwrap();
    assert!(matches!(publish(&target), Err(PublishError::Exists(_))));
    // It would go with that one.
    assert!(matches!(
        publish(&target.join("inner")),
        Err(PublishError::InImage { .. })
    ));
    assert_eq!(
        Image::open_directory(&target, &Wanted::Only).unwrap().digest(),
        first.digest
    );

    // Also one that appears while the image is being written.
    let late = folder.path().join("late");
    let publication = Publication::begin(&late).unwrap();
    fs::create_dir(&late).unwrap();
    fs::write(late.join("precious"), "x").unwrap();
    let state = publication.add(b"state").unwrap();
    let draft = ManifestDraft {
        state,
        state_inline: None,
        volumes: Vec::new(),
        working_set: None,
        parent: None,
        urls: Default::default(),
    };
    assert!(matches!(
        publication.publish(&draft, None),
        Err(PublishError::Exists(_))
    ));
    assert!(late.join("precious").exists());
    assert_eq!(
        fs::read_dir(folder.path()).unwrap().count(),
        2,
        "nothing hidden is left"
    );
}

#[test]
fn a_writer_that_is_dropped_leaves_nothing_and_what_a_killed_one_left_is_swept() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("image");
    // As if by a killed process: nobody holds it locked.
    let orphan = folder.path().join(".image.partial-1-1");
    fs::create_dir(&orphan).unwrap();
    fs::write(orphan.join("blob"), "half").unwrap();

    let alive = Publication::begin(&target).unwrap();
    alive.blob().unwrap().write(b"half a blob").unwrap();
    assert!(!orphan.exists());

    // A second writer spares the first, which is alive.
    drop(Publication::begin(&target).unwrap());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    drop(alive);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn images_are_readable_by_their_owner_alone() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("image");
    publish(&target).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o077;
    assert_eq!(mode(&target), 0);
    for entry in fs::read_dir(target.join("blobs/sha256")).unwrap() {
        assert_eq!(mode(&entry.unwrap().path()), 0);
    }
}

#[test]
fn an_image_that_lacks_a_blob_or_has_a_short_one_is_refused_by_the_blobs_name() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("image");
    publish(&target).unwrap();
    let image = Image::open_directory(&target, &Wanted::Only).unwrap();
    let layer = image.manifest.volumes[0].layers[0];
    let path = target.join("blobs/sha256").join(layer.digest.hex());
    let refused = || {
        let error = Image::open_directory(&target, &Wanted::Only)
            .map(|_| ())
            .unwrap_err();
        let trace = with_causes(&error);
        assert!(trace.contains(&layer.digest.hex()), "{trace}");
        trace
    };

    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    assert!(refused().contains("truncated"));
    fs::remove_file(&path).unwrap();
    assert!(refused().contains("not in"));
    // A link to the right bytes is not followed: an image may come from a stranger.
    let elsewhere = folder.path().join("elsewhere");
    fs::write(&elsewhere, &bytes).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
    refused();
    // The image that was opened before does not mind.
    assert_eq!(read_chunk(&image, 3), chunk_of(2));
}

#[test]
fn a_folder_lists_its_images_removes_them_and_sweeps_what_was_never_finished() {
    let folder = tempfile::tempdir().unwrap();
    let digests = ["b", "a"].map(|name| publish(&folder.path().join(name)).unwrap().digest);
    fs::create_dir(folder.path().join("no_image")).unwrap();
    fs::create_dir(folder.path().join(".c.partial-1-1")).unwrap();

    let listed = list(folder.path()).unwrap().images;
    assert_eq!(
        listed
            .iter()
            .map(|image| image.path.file_name().unwrap())
            .collect::<Vec<_>>(),
        ["a", "b"]
    );
    assert_eq!(listed[0].name.as_deref(), Some("latest"));
    assert_eq!(listed[0].volume_bytes(), 4 * CHUNK as u64 + CHUNK as u64 / 2);
    let blobs = fs::read_dir(folder.path().join("a/blobs/sha256")).unwrap();
    let on_disk: u64 = blobs.map(|blob| blob.unwrap().metadata().unwrap().len()).sum();
    assert!(
        listed[0].stored_bytes() < on_disk && on_disk < listed[0].stored_bytes() + 4096,
        "but for the manifest"
    );
    assert_eq!(
        find(folder.path(), &digests[0]).unwrap().unwrap().digest(),
        digests[0]
    );

    // An image of which something is wrong is listed with what it is.
    let manifest = folder.path().join("b/blobs/sha256").join(digests[0].hex());
    fs::write(
        &manifest,
        fs::read_to_string(&manifest)
            .unwrap()
            .replace("image.v1\"", "image.v9\""),
    )
    .unwrap();
    let listing = list(folder.path()).unwrap();
    let [(path, error)] = &listing.broken[..] else {
        panic!("one is broken: {listing:?}")
    };
    assert!(path.ends_with("b"), "{error}");

    // So is one of which nothing can be read, and it can be removed.
    for (file, name) in [("index.json", "junk"), ("oci-layout", "mark")] {
        let path = folder.path().join(name);
        fs::create_dir_all(path.join("blobs/sha256")).unwrap();
        fs::copy(folder.path().join("a/index.json"), path.join("index.json")).unwrap();
        fs::copy(folder.path().join("a/oci-layout"), path.join("oci-layout")).unwrap();
        fs::write(path.join(file), "junk").unwrap();
        let listing = list(folder.path()).unwrap();
        let broken = listing.broken.iter().find(|(broken, _)| *broken == path);
        let reason = broken.expect("it is listed").1.to_string();
        assert!(reason.contains(file), "{reason}");
        remove(&path).unwrap();
        assert!(!path.exists());
    }

    // What is not Runnel's stays, whatever it looks like.
    let foreign = folder.path().join("foreign");
    fs::create_dir_all(foreign.join("blobs/sha256")).unwrap();
    fs::copy(folder.path().join("a/oci-layout"), foreign.join("oci-layout")).unwrap();
    let index = fs::read_to_string(folder.path().join("a/index.json")).unwrap();
    let of_others = index.replace("image.manifest.v1", "image.index.v1");
    assert_ne!(index, of_others);
    fs::write(foreign.join("index.json"), of_others).unwrap();
    assert!(matches!(remove(&foreign), Err(FolderError::Foreign(_))));
    let listing = list(folder.path()).unwrap();
    assert!(!listing.broken.iter().any(|(path, _)| *path == foreign));
    fs::remove_dir_all(&foreign).unwrap();
    for file in ["notes", "blobs/notes", "blobs/sha256/notes"] {
        let stranger = folder.path().join("a").join(file);
        fs::write(&stranger, "mine").unwrap();
        let refusal = remove(&folder.path().join("a")).unwrap_err();
        assert!(
            refusal.to_string().contains(&stranger.display().to_string()),
            "{refusal}"
        );
        fs::remove_file(&stranger).unwrap();
    }

    remove(&folder.path().join("a")).unwrap();
    assert!(matches!(
        remove(&folder.path().join("no_image")),
        Err(FolderError::NoImage(_))
    ));
    assert_eq!(
        prune(folder.path()).unwrap(),
        [folder.path().join(".c.partial-1-1")]
    );
    let mut left: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["b", "no_image"]);
}
