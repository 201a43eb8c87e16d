//! What manifests are read, and which are refused by what name.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::index::{INDEX_BLOB_HEADER, IndexBuilder};
use crate::units::ChunkSize;

fn blob(of: &str) -> Blob {
    Blob {
        digest: BlobDigest::of(of.as_bytes()),
        bytes: 1000,
    }
}

/// A volume of zeros.
fn volume(name: &str) -> ImageVolume {
    let mut builder = IndexBuilder::new(1 << 30, ChunkSize::DEFAULT, 1).unwrap();
    builder
        .push_zeros((1 << 30) / (64 << 10), |_| Ok::<_, ()>(()))
        .unwrap();
    let index = Blob {
        bytes: INDEX_BLOB_HEADER.len() as u64,
        ..blob("index")
    };
    ImageVolume {
        name: name.parse().unwrap(),
        layers: vec![blob(name)],
        has_full_layer: true,
        index,
        root: builder.finish(),
    }
}

const STATE: &[u8] = b"state";

fn draft() -> ManifestDraft {
    let parent = Some(BlobDigest::of(b"parent"));
    let volumes = vec![volume("memory"), volume("drive:rootfs")];
    ManifestDraft {
        state: Blob {
            digest: BlobDigest::of(STATE),
            bytes: STATE.len() as u64,
        },
        state_inline: Some(STATE.to_vec()),
        volumes,
        working_set: Some(blob("trace")),
        parent,
        urls: Urls::from([(
            blob("memory").digest,
            vec!["http://far/v2/web/blobs/sha256:00".to_owned()],
        )]),
    }
}

/// What becomes of the manifest when its JSON is changed so.
fn changed(change: impl FnOnce(&mut Value)) -> Result<ImageManifest, ManifestError> {
    let mut json: Value = serde_json::from_slice(&draft().to_bytes().unwrap()).unwrap();
    change(&mut json);
    ImageManifest::parse(json.to_string().as_bytes())
}

#[test]
fn a_manifest_survives_its_bytes() {
    let bytes = draft().to_bytes().unwrap();
    let read = ImageManifest::parse(&bytes).unwrap();
    let ManifestDraft {
        state,
        state_inline,
        volumes,
        working_set,
        parent,
        urls,
    } = draft();
    assert_eq!(
        read,
        ImageManifest {
            digest: BlobDigest::of(&bytes),
            state,
            state_inline,
            volumes,
            working_set,
            parent,
            urls
        }
    );
    // The two volumes share an index and a root; each blob is listed once.
    assert_eq!(read.blobs().len(), 6);
}

#[test]
fn a_machine_state_is_inline_unless_it_is_large_or_an_older_runnel_wrote_it() {
    let inline = |bytes: usize| {
        let draft = ManifestDraft {
            state_inline: Some(vec![7; bytes]),
            state: Blob {
                digest: BlobDigest::of(&vec![7; bytes]),
                bytes: bytes as u64,
            },
            ..draft()
        };
        let read = ImageManifest::parse(&draft.to_bytes().unwrap()).unwrap();
        read.state_inline.map(|bytes| bytes.len())
    };
    assert_eq!(inline(INLINE_STATE_BYTES_MAX), Some(INLINE_STATE_BYTES_MAX));
    assert_eq!(inline(INLINE_STATE_BYTES_MAX + 1), None);
    let older = changed(|json| {
        json["config"].as_object_mut().unwrap().remove("data");
    });
    assert_eq!(older.unwrap().state_inline, None);
}

#[test]
fn an_inline_state_that_is_not_that_of_the_digest_is_refused() {
    let error = changed(|json| json["config"]["data"] = json!(BASE64.encode(b"stale"))).unwrap_err();
    assert!(error.to_string().contains("does not match its digest"), "{error}");
}

#[test]
fn fields_and_annotations_of_others_are_ignored() {
    let read = changed(|json| {
        json["subject"] = json!({ "any": "thing" });
        json["annotations"]["org.opencontainers.image.created"] = json!("today");
        json["layers"][2]["urls"] = json!(["http://far/an-index"]);
    });
    let read = read.unwrap();
    assert_eq!(read.volumes.len(), 2);
    assert_eq!(read.urls, draft().urls);
}

#[test]
fn of_the_urls_of_a_layer_those_are_read_that_a_request_can_go_to() {
    let with = |urls: Value| changed(|json| json["layers"][0]["urls"] = urls).unwrap().urls;
    let digest = blob("memory").digest;
    let usable = "https://far:5000/v2/web/blobs/sha256:00";
    let long = format!("http://far/{}", "a".repeat(URL_BYTES_MAX));
    let strange = json!([
        "ftp://far/x",
        "/etc/shadow",
        "http://far/x\r\nHost: near",
        long,
        "",
        usable
    ]);
    assert_eq!(with(strange), Urls::from([(digest, vec![usable.to_owned()])]));
    for none in [
        json!([]),
        json!(null),
        json!("http://far/x"),
        json!({"0": "http://far/x"}),
        json!([7, null]),
    ] {
        assert_eq!(with(none), Urls::new());
    }
    let many: Vec<String> = (0..100).map(|number| format!("http://far/{number}")).collect();
    assert_eq!(with(json!(many))[&digest], many[..URLS_MAX]);
}

#[test]
fn what_is_no_image_or_a_newer_one_is_refused_by_name() {
    let refused = |change: &dyn Fn(&mut Value)| changed(change).unwrap_err().to_string();
    assert!(
        refused(&|json| json["artifactType"] = json!("application/vnd.runnel.image.v2")).contains("image.v2")
    );
    assert!(refused(&|json| json["config"]["mediaType"] = json!("x/y")).contains("x/y"));
    assert!(refused(&|json| json["schemaVersion"] = json!(1)).contains("schemaVersion"));
    assert!(refused(&|json| json["layers"][0]["mediaType"] = json!("a/b")).contains("a/b"));
    assert!(refused(&|json| json["layers"][0]["annotations"][LAYER_KIND] = json!("delta")).contains("delta"));
    let over = refused(&|json| {
        let mut diff = json["layers"][0].clone();
        diff["annotations"][LAYER_KIND] = json!("diff");
        json["layers"].as_array_mut().unwrap().insert(0, diff);
    });
    assert!(
        over.contains("full layer") && over.contains("over others"),
        "{over}"
    );
    assert!(refused(&|json| json["layers"][0]["annotations"][VOLUME] = json!("drive:../x")).contains("../x"));
    assert!(refused(&|json| json["layers"][0]["annotations"] = json!({})).contains(VOLUME));
    assert!(refused(&|json| json["annotations"][PARENT] = json!("nobody")).contains("nobody"));
    assert!(ImageManifest::parse(b"{}").is_err());
    assert!(ImageManifest::parse(&vec![b' '; MANIFEST_BYTES_MAX as usize + 1]).is_err());
}

#[test]
fn volumes_that_are_not_whole_are_refused_by_name() {
    let refused = |change: &dyn Fn(&mut Vec<Value>)| {
        let read = changed(|json| change(json["layers"].as_array_mut().unwrap()));
        let error = read.unwrap_err();
        let cause = std::error::Error::source(&error)
            .map(ToString::to_string)
            .unwrap_or_default();
        format!("{error}: {cause}")
    };
    // In order: memory's layer, index and root, then the drive's.
    assert!(refused(&|layers| _ = layers.remove(0)).contains("volume memory"));
    assert!(refused(&|layers| _ = layers.remove(1)).contains("volume memory"));
    assert!(refused(&|layers| _ = layers.remove(5)).contains("volume drive:rootfs"));
    for part in 0..3 {
        assert!(
            refused(&|layers| layers.push(layers[part].clone())).contains("second"),
            "part {part}"
        );
    }
    assert!(refused(&|layers| layers.push(layers[6].clone())).contains("second working set"));
    assert!(refused(&|layers| layers[1]["size"] = json!(9)).contains("should have 8 bytes and has 9"));
    assert!(refused(&|layers| layers[2]["data"] = json!("!")).contains("base64"));
    assert!(refused(&|layers| layers[2]["data"] = json!("AAAA")).contains("digest"));
    assert!(refused(&|layers| _ = layers[2].as_object_mut().unwrap().remove("data")).contains("inline"));
    assert!(
        refused(&|layers| {
            let root = b"RNLX\x02";
            layers[2]["data"] = json!(BASE64.encode(root));
            layers[2]["digest"] = json!(BlobDigest::of(root).to_string());
            layers[2]["size"] = json!(root.len());
        })
        .contains("volume memory")
    );
    assert!(
        refused(&|layers| {
            let many = (0..=VOLUMES_MAX).map(|number| {
                let mut layer = layers[0].clone();
                layer["annotations"][VOLUME] = json!(format!("drive:{number}"));
                layer
            });
            *layers = many.collect();
        })
        .contains("more than")
    );
}

#[test]
fn lengths_that_do_not_fit_together_do_not_overflow() {
    let read = changed(|json| json["layers"][0]["size"] = json!(u64::MAX)).unwrap();
    assert_eq!(read.volumes[0].stored_bytes(), u64::MAX);
}

proptest! {
    #[test]
    fn a_changed_byte_is_refused_or_changes_the_digest(at in any::<prop::sample::Index>(), flip in 1_u8..=255) {
        let good = draft().to_bytes().unwrap();
        let mut bad = good.clone();
        let at = at.index(bad.len());
        bad[at] ^= flip;
        if let Ok(read) = ImageManifest::parse(&bad) {
            prop_assert_ne!(read.digest, BlobDigest::of(&good));
        }
    }
}
