//! What a machine changed that runs from an image of another host: a thin image, whose other layers stay there.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use runnel_agent::remote::{RemoteSettings, ThinBlobs};
use runnel_snapshot::image::Image;
use runnel_snapshot::image::complete::complete;
use runnel_snapshot::image::layout::Layout;
use runnel_snapshot::image::reference::Wanted;
use runnel_snapshot::verify::{VerifyProgress, verify};
use runnel_tests::agent::AgentFolders;
use runnel_tests::bare::{
    begin_rounds, booted_with_noise, configure, end_rounds, load, refusal, resumed, save, start, tell,
};
use runnel_tests::forge::verified;
use runnel_tests::monitor::{Monitor, Question};
use runnel_tests::served::{Served, TRICKLE};
use serde_json::{Value, json};

/// So much is written to all the time.
const CHURN: &str = "churn:8m:4m";

fn diff_of(image: &Path) -> Value {
    json!({"image_path": image, "snapshot_type": "Diff"})
}

fn save_diff(monitor: &Monitor, image: &Path) {
    monitor.demand("PUT", "/snapshot/create", &diff_of(image));
}

/// An image that is sound as far as it is here, and how many of its layers are not.
fn sound(path: &Path) -> (Image, usize) {
    let report = verify(
        &Layout::open(path).unwrap(),
        &Wanted::Only,
        2,
        &VerifyProgress::default(),
    )
    .unwrap();
    assert!(report.is_sound(), "{:?}", report.findings);
    let (image, away) = Image::open_thin(path, &Wanted::Only).unwrap();
    assert_eq!(away.len(), report.layers_elsewhere);
    (image, away.len())
}

/// A machine of an image of this host, through an agent.
fn through(agents: &AgentFolders, image: &Path) -> Monitor {
    load(&json!({"image": image, "agent_path": agents.socket(), "resume_vm": true}))
}

/// Fetches what a thin image lacks, as `runnel image complete` does.
fn make_whole(path: &Path) {
    let (image, away) = Image::open_thin(path, &Wanted::Only).unwrap();
    let from = ThinBlobs::open(&image, &away, &RemoteSettings::default()).unwrap();
    for layer in away {
        complete(&Layout::open(path).unwrap(), &layer, &from, &|_| true).unwrap();
    }
}

#[test]
fn a_machine_from_afar_is_saved_as_what_it_changed_and_nothing_is_pulled_in() {
    const NOISE: u64 = 12 << 20;
    let (saved, noise) = booted_with_noise(NOISE, "fill:8m:1m:7 count:3");
    let mut served = Served::of(&saved);
    drop(saved);
    let folder = tempfile::tempdir().unwrap();
    let path = |number: u32| folder.path().join(number.to_string());
    for logs in [true, false] {
        let _agent = served.agents().start(&TRICKLE);
        let mut machine = served.load(&json!({"resume_vm": true, "track_dirty_pages": logs}));
        tell(&mut machine, "fill:9m:64k:9 count:1", "count=4");
        let (first, second) = if logs { (0, 1) } else { (2, 3) };
        let before = served.bytes_sent();
        save_diff(&machine, &path(first));
        let sent = served.bytes_sent() - before;
        assert!(sent < NOISE / 8, "logs: {logs}: {sent} bytes were pulled in");
        let (image, away) = sound(&path(first));
        assert_eq!(away, 1);
        assert_eq!(
            image.manifest.parent.map(|parent| parent.to_string()),
            digest_of(served.image())
        );
        let layer = image.manifest.volumes[0].layers[0].digest;
        assert_eq!(
            image.manifest.urls[&layer],
            [format!("{}/blobs/{layer}", v2(&served))]
        );

        // The next one lies over it, and needs nothing of the other host.
        served.stop_server();
        tell(&mut machine, "fill:10m:64k:5 count:1", "count=5");
        save_diff(&machine, &path(second));
        assert_eq!(sound(&path(second)).1, 1);
        served.start_server();
        drop(machine);

        // Each is the machine that it was, wherever its pages come from.
        let agents = AgentFolders::new();
        let _other = agents.start(&[]);
        for (number, count, last) in [(first, "count=5", 0), (second, "count=6", 5)] {
            let mut again = through(&agents, &path(number));
            tell(&mut again, "checkfill:9m:64k:9", "checkfill=right");
            let words = format!("checkfill:10m:64k:{last}");
            if last == 5 {
                tell(&mut again, &words, "checkfill=right");
            }
            noise.check(&mut again);
            tell(&mut again, "count:1", count);
        }
    }
    let alone = Monitor::start();
    let refused = refusal(&alone, "PUT", "/snapshot/load", &json!({"image": path(1)}));
    assert!(
        refused.contains("is thin") && refused.contains("image complete"),
        "{refused}"
    );
    make_whole(&path(1));
    served.stop_server();
    verified(&path(1));
    let mut again = resumed(&path(1));
    noise.check(&mut again);
    tell(&mut again, "checkfill:10m:64k:5", "checkfill=right");
    tell(&mut again, "count:1", "count=6");
}

fn v2(served: &Served) -> String {
    format!("http://{}/v2/bare", served.address())
}

fn digest_of(image: &Path) -> Option<String> {
    Some(verified(image).digest().to_string())
}

#[test]
fn drives_are_thin_too_a_machine_that_writes_is_of_one_moment_and_a_full_snapshot_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let mut saved = Monitor::start();
    configure(&saved, 1, "fill:16m:1m:3 count:3");
    for (id, bytes) in [("disk", 16 << 20), ("still", 4 << 20)] {
        File::create(path(id)).unwrap().set_len(bytes).unwrap();
        let drive = json!({
            "drive_id": id, "path_on_host": path(id), "is_root_device": false, "is_read_only": false,
        });
        saved.demand("PUT", &format!("/drives/{id}"), &drive);
    }
    start(&mut saved);
    tell(&mut saved, "diskfill:0:2m:3", "diskfill=right");
    let served = Served::of(&saved);
    drop(saved);

    let _agent = served.agents().start(&TRICKLE);
    let mut machine = served.load(&json!({"resume_vm": true}));
    tell(&mut machine, "diskfill:1024:64k:5", "diskfill=right");
    begin_rounds(&mut machine, CHURN);
    for name in ["0", "1"] {
        save_diff(&machine, &path(name));
        let (image, away) = sound(&path(name));
        // Of memory and of both drives, one of which nobody has written to.
        assert_eq!(away, 3, "{name}");
        assert_eq!(image.manifest.volumes[2].layers.len(), 1);
    }
    end_rounds(&mut machine, "churn");
    save(&machine, &path("full"));
    let full = verified(&path("full"));
    assert!(full.manifest.urls.is_empty());
    assert!(
        full.manifest
            .volumes
            .iter()
            .all(|volume| volume.layers.len() == 1)
    );
    drop(machine);

    let agents = AgentFolders::new();
    let _other = agents.start(&[]);
    for name in ["0", "1"] {
        let mut again = through(&agents, &path(name));
        end_rounds(&mut again, "churn");
        tell(&mut again, "checkdisk:0:512k:3", "checkdisk=right");
        tell(&mut again, "checkdisk:1024:64k:5", "checkdisk=right");
        tell(&mut again, "checkfill:16m:1m:3", "checkfill=right");
        // A thin image is a base as any other.
        let next = path(&format!("{name}-next"));
        save_diff(&again, &next);
        assert_eq!(sound(&next).1, 3);
    }
}

#[test]
fn an_index_is_waited_for_until_its_server_is_back_or_the_snapshot_is_called_off() {
    let mut served = Served::new();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let _agent = served.agents().start(&TRICKLE);
    let mut machine = served.load(&json!({"resume_vm": true, "stall_after_ms": 3_600_000}));
    tell(&mut machine, "fill:20m:64k:9 count:1", "count=4");
    served.stop_server();
    let create =
        |name: &str| Question::put(machine.socket(), "PUT", "/snapshot/create", &diff_of(&path(name)));
    let first = create("first");
    std::thread::sleep(Duration::from_millis(500));
    machine.demand("DELETE", "/snapshot/create", &Value::Null);
    let (status, body) = first.answer();
    assert_eq!(status, 400, "{body}");
    assert!(body.to_string().contains("cancelled"), "{body}");
    assert!(!path("first").exists());
    let second = create("second");
    std::thread::sleep(Duration::from_millis(500));
    served.start_server();
    assert_eq!(second.answer().0, 204);
    assert_eq!(sound(&path("second")).1, 1);
    tell(&mut machine, "count:1", "count=5");
}
