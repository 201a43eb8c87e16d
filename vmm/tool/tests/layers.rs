//! Images that lie over others, as a process shows, squashes and optimizes them.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

mod user;

use std::fs;
use std::process::Command;

use runnel_snapshot::image::Image;
use runnel_snapshot::image::reference::Wanted;
use runnel_snapshot::source::{ChunkId, VolumeId};
use runnel_snapshot::units::ChunkIndex;
use runnel_snapshot::working_set::{WorkingSet, WorkingSetFile};
use serde_json::json;
use user::{CHUNK, User, text};

#[test]
fn layers_and_the_parent_are_shown_of_an_image_that_lies_over_another() {
    let user = User::new();
    let below = user.capture("web-v1", None);
    let above = user.capture_over("web-v2", "web-v1");

    let shown = user.json(&["inspect", "web-v2", "--json"]);
    let memory = &shown["volumes"][0];
    let kinds: Vec<_> = memory["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|layer| &layer["kind"])
        .collect();
    assert_eq!(kinds, ["full", "diff"]);
    assert_eq!(
        (&memory["data_chunks"], &memory["chunks_of_parts"]),
        (&2.into(), &1.into())
    );
    assert_eq!(shown["lineage"][0]["digest"], below.manifest.digest.to_string());
    let told = user.output(&["inspect", "web-v2"]);
    let layer = above.volumes[0].layers[1];
    assert!(
        told.contains(&format!("{}  diff  {} B  memory", layer.digest, layer.bytes)),
        "{told}"
    );

    let listed = user.json(&["image", "ls", "--json"]);
    let image = listed["images"]
        .as_array()
        .unwrap()
        .iter()
        .find(|image| image["name"] == "web-v2");
    let layers = image.unwrap()["layers"].as_array().unwrap();
    let kinds: Vec<_> = layers
        .iter()
        .map(|layer| (&layer["volume"], &layer["kind"]))
        .collect();
    let [memory, root] = ["memory", "drive:root"].map(serde_json::Value::from);
    let [full, diff] = ["full", "diff"].map(serde_json::Value::from);
    assert_eq!(kinds, [(&memory, &full), (&memory, &diff), (&root, &full)]);
    let told = user.output(&["image", "ls"]);
    let line = told.lines().find(|line| line.starts_with("web-v2")).unwrap();
    assert!(
        line.split_whitespace().any(|cell| cell == "web-v1"),
        "its parent by name: {line}"
    );
    assert!(user.json(&["verify", "web-v2", "--json"])["sound"] == true);
}

#[test]
fn an_image_is_squashed_into_full_layers_and_stays_as_it_was() {
    let user = User::new();
    user.capture("web-v1", None);
    let above = user.capture_over("web-v2", "web-v1");
    let made = user.json(&["image", "squash", "web-v2", "web-base", "--json"]);
    assert_eq!((&made["layers"], &made["layers_before"]), (&2.into(), &3.into()));
    assert_eq!(made["parent"], above.manifest.digest.to_string());

    assert!(user.json(&["verify", "web-base", "--json"])["sound"] == true);
    let shown = user.json(&["inspect", "web-base", "--json"]);
    assert_eq!(shown["digest"], made["digest"]);
    let layer = shown["volumes"][0]["layers"][0]["digest"].as_str().unwrap();
    let layer = user.store().join("web-base/blobs").join(layer.replace(':', "/"));
    let plain = zstd_of(&layer);
    assert_eq!(plain.len(), 4 * CHUNK);
    assert!(
        plain[4096..8192].iter().all(|byte| *byte == 7),
        "the page that changed"
    );
    assert_eq!(
        shown["saved_at_unix_ms"],
        user.json(&["inspect", "web-v2", "--json"])["saved_at_unix_ms"]
    );
    user.output(&["verify", "web-v2"]);

    // Nothing is written over.
    let refused = user.run(&["image", "squash", "web-v2", "web-base"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        text(&refused.stderr).contains("exists already"),
        "{}",
        text(&refused.stderr)
    );
    // It needs nothing of the others.
    user.output(&["image", "rm", "web-v1", "web-v2"]);
    user.output(&["verify", "web-base"]);
    assert!(
        user.output(&["image", "squash", "web-base", "./again"])
            .contains("2 layers")
    );
}

/// As stock zstd reads it.
fn zstd_of(layer: &std::path::Path) -> Vec<u8> {
    let output = Command::new("zstd").arg("-dc").arg(layer).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    output.stdout
}

#[test]
fn squashing_that_cannot_be_done_says_why() {
    let user = User::new();
    user.capture("web", None);
    for (arguments, code, expected) in [
        (
            ["http://127.0.0.1:1/web", "base"],
            1,
            "give a directory or a name",
        ),
        (["db", "base"], 1, "runnel image ls"),
        (["web", "http://127.0.0.1:1/base"], 1, "never pushed"),
        (["web", "Web!"], 2, "cannot be an image's name"),
        (["web", "/nonexistent/base"], 1, "/nonexistent"),
    ] {
        let refused = user.run(&["image", "squash", arguments[0], arguments[1]]);
        let told = text(&refused.stderr);
        assert_eq!(refused.status.code(), Some(code), "{arguments:?}: {told}");
        assert!(told.contains(expected), "{arguments:?}: {told}");
    }
    let damaged = user.capture_over("web-v2", "web").volumes[0].layers[1].digest;
    let path = user.store().join("web-v2/blobs/sha256").join(damaged.hex());
    let mut bytes = fs::read(&path).unwrap();
    bytes[12] ^= 1;
    fs::write(&path, bytes).unwrap();
    let refused = user.run(&["image", "squash", "web-v2", "base"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        text(&refused.stderr).contains(&damaged.hex()),
        "{}",
        text(&refused.stderr)
    );
    assert!(!user.store().join("base").exists());
}

#[test]
fn squashing_is_called_off_and_leaves_nothing() {
    let user = User::new();
    user.capture("web", None);
    user.capture_over("web-v2", "web");
    let squash = user.command(&["image", "squash", "web-v2", "base"]);
    // It comes before the process has taken signals in hand, and is kept for it.
    let interrupted = [
        "--block-signal=INT",
        "sh",
        "-c",
        "kill -INT $$; exec \"$@\"",
        "sh",
    ];
    let output = Command::new("env")
        .args(interrupted)
        .arg(squash.get_program())
        .args(squash.get_args())
        .envs(squash.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .current_dir(user.folder.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", text(&output.stderr));
    assert!(
        text(&output.stderr).contains("nothing is left"),
        "{}",
        text(&output.stderr)
    );
    let left = fs::read_dir(user.store()).unwrap().count();
    assert_eq!(left, 2);
}

/// Puts down that these chunks of an image's memory were touched first.
fn record(user: &User, image: &str, file: &str, chunks: &[u64]) {
    let image = Image::open_directory(&user.store().join(image), &Wanted::Only).unwrap();
    let touched = chunks.iter().map(|chunk| ChunkId {
        volume: VolumeId(0),
        chunk: ChunkIndex(*chunk),
    });
    let set = WorkingSet::of(&image.source_volumes(), touched);
    WorkingSetFile::create(&user.store().join(file))
        .unwrap()
        .write(&set)
        .unwrap();
}

#[test]
fn an_image_is_optimized_with_what_was_recorded_beside_it_or_where_it_is_told() {
    let user = User::new();
    let below = user.capture("web-v1", None);
    let refused = user.run(&["image", "optimize", "web-v1", "fast"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("no working set was recorded"));

    record(&user, "web-v1", "web-v1.working-set", &[3]);
    let made = user.json(&["image", "optimize", "web-v1", "fast", "--json"]);
    assert_eq!((&made["chunks"], &made["layers"]), (&1.into(), &3.into()));
    assert_eq!(made["parent"], below.manifest.digest.to_string());
    assert!(user.json(&["verify", "fast", "--json"])["sound"] == true);
    let shown = user.json(&["inspect", "fast", "--json"]);
    assert!(shown["working_set_bytes"].as_u64().unwrap() > 0, "{shown}");
    // Every layer is what stock zstd reads.
    let layers = shown["volumes"][0]["layers"].as_array().unwrap();
    let layer = |number: usize| {
        let digest = layers[number]["digest"].as_str().unwrap();
        zstd_of(&user.store().join("fast/blobs").join(digest.replace(':', "/")))
    };
    let (full, hot) = (layer(0), layer(1));
    assert!(full.len() == 4 * CHUNK && hot == full[3 * CHUNK..]);

    let told = user.output(&["image", "optimize", "fast", "again"]);
    assert!(told.contains("1 chunks first"), "its own: {told}");
    record(&user, "web-v1", "other", &[3, 0]);
    let other = user.store().join("other");
    let arguments = [
        "image",
        "optimize",
        "web-v1",
        "other-fast",
        "--json",
        "--working-set",
    ];
    let made = user.json(&[&arguments[..], &[other.to_str().unwrap()]].concat());
    assert_eq!(made["chunks"], 2);
    let shown = user.json(&["inspect", "other-fast", "--json"]);
    let layers = shown["volumes"][0]["layers"].as_array().unwrap();
    let digest = layers[0]["digest"].as_str().unwrap();
    let plain = zstd_of(
        &user
            .store()
            .join("other-fast/blobs")
            .join(digest.replace(':', "/")),
    );
    let in_order = [&full[3 * CHUNK..], &full[..CHUNK]].concat();
    assert!(layers.len() == 1 && plain == in_order, "nothing is left below");
    // The files beside images are none.
    let listed = user.json(&["image", "ls", "--json"]);
    assert_eq!(listed["images"].as_array().unwrap().len(), 4);
    assert_eq!((&listed["broken"], &listed["others"]), (&json!([]), &json!([])));
}

#[test]
fn a_working_set_that_cannot_be_used_is_named_and_leaves_nothing() {
    let user = User::new();
    user.capture("web-v1", None);
    let path = user.store().join("set");
    fs::write(&path, "nonsense").unwrap();
    let set = path.to_str().unwrap();
    let arguments = ["image", "optimize", "web-v1", "fast", "--working-set", set];
    let refused = user.run(&arguments);
    assert_eq!(refused.status.code(), Some(1));
    let told = text(&refused.stderr);
    assert!(
        told.contains(set) && told.contains("it is no working set"),
        "{told}"
    );
    let refused = user.run(&["image", "optimize", "http://10.0.0.1:5000/web", "fast"]);
    let told = text(&refused.stderr);
    assert!(
        told.contains("is of another host, and is optimized there"),
        "{told}"
    );
    assert!(!user.store().join("fast").exists());
}
