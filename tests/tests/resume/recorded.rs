//! What a machine touches first, recorded, put with its image, and fetched first by the next one.

use std::fs;
use std::path::Path;

use runnel_snapshot::capture::CaptureSettings;
use runnel_snapshot::capture::optimize::optimize;
use runnel_snapshot::image::reference::Wanted;
use runnel_snapshot::source::{ChunkId, SourceVolume};
use runnel_snapshot::units::ChunkSize;
use runnel_snapshot::working_set::{WorkingSet, read_file};
use runnel_tests::bare::{booted, load, refusal, save, tell, wait_until};
use runnel_tests::forge;
use runnel_tests::monitor::Monitor;
use serde_json::{Value, json};

use super::served::Served;

const CHUNK: u64 = ChunkSize::DEFAULT.bytes();
/// Where the pattern begins in memory, in chunks.
const PATTERN: u64 = (8 << 20) / CHUNK;
/// How many chunks it has.
const CHUNKS: u64 = (4 << 20) / CHUNK;

fn saved(folder: &Path) -> std::path::PathBuf {
    let image = folder.join("image");
    save(&booted("fill:8m:4m:7 count:3"), &image);
    image
}

/// Reads a word of a chunk of the pattern.
fn peek(machine: &mut Monitor, chunk: u64) {
    machine.type_line(&format!("peek:{:#x}", (PATTERN + chunk) * CHUNK));
    machine.wait_for_console("peek=");
}

/// The chunks of the pattern that were recorded, in order.
fn of_pattern(set: &WorkingSet) -> Vec<u64> {
    let chunks = set.chunks().map(|(_, chunk)| chunk.0);
    let in_pattern = chunks.filter(|chunk| (PATTERN..PATTERN + CHUNKS).contains(chunk));
    in_pattern.map(|chunk| chunk - PATTERN).collect()
}

#[test]
fn what_a_machine_touches_is_recorded_in_order_until_it_is_paused_saved_or_ends() {
    let folder = tempfile::tempdir().unwrap();
    let image = saved(folder.path());
    let path = folder.path().join("set");
    type End = fn(&mut Monitor, &Path);
    let ends: [(&str, End); 4] = [
        ("pause", |machine, _| {
            machine.demand("PATCH", "/vm", &json!({"state": "Paused"}));
        }),
        ("save", |machine, folder| save(machine, &folder.join("again"))),
        ("poweroff", |machine, _| {
            machine.type_line("poweroff");
            assert_eq!(machine.wait().0.code(), Some(0));
        }),
        ("signal", |machine, _| {
            machine.signal("TERM");
            machine.wait();
        }),
    ];
    for (name, end) in ends {
        let mut machine = load(&json!({"image": image, "resume_vm": true, "record": {"path": path}}));
        for chunk in [40, 3, 4, 40, 17] {
            peek(&mut machine, chunk);
        }
        assert!(!path.exists(), "{name}: it is there when it is whole");
        end(&mut machine, folder.path());
        let set = read_file(&path).unwrap();
        assert_eq!(of_pattern(&set), [40, 3, 4, 17], "{name}");
        let of_vcpu = forge::open(&image).state().unwrap().first_chunks;
        assert!(!of_vcpu.is_empty());
        for first in of_vcpu {
            assert!(
                set.chunks().any(|(_, chunk)| chunk == first.chunk),
                "{name}: {}",
                first.chunk
            );
        }
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn recording_ends_with_its_time_and_replaces_what_was_recorded_before() {
    let folder = tempfile::tempdir().unwrap();
    let image = saved(folder.path());
    let path = folder.path().join("set");
    fs::write(&path, "an older one").unwrap();
    let record = json!({"path": path, "duration_ms": 1});
    let mut machine = load(&json!({"image": image, "resume_vm": true, "record": record}));
    machine.wait_for_log("What the machine touched first was recorded");
    let set = read_file(&path).unwrap();
    peek(&mut machine, 5);
    machine.demand("PATCH", "/vm", &json!({"state": "Paused"}));
    assert_eq!(read_file(&path).unwrap(), set, "it is over");
    assert_eq!(of_pattern(&set), Vec::<u64>::new());
}

#[test]
fn what_cannot_be_recorded_is_refused_and_a_machine_that_never_ran_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let image = saved(folder.path());
    let machine = Monitor::start();
    for (path, reason) in [
        (folder.path().join("none/set"), "none"),
        (folder.path().to_owned(), "is no file"),
        (image.join("set"), "would lie in the image"),
    ] {
        let request = json!({"image": image, "record": {"path": path}});
        let said = refusal(&machine, "PUT", "/snapshot/load", &request);
        assert!(said.contains(reason), "{said}");
    }
    let path = folder.path().join("set");
    let mut machine = load(&json!({"image": image, "record": {"path": path}}));
    machine.signal("TERM");
    machine.wait();
    assert!(!path.exists());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "the image alone");
}

/// Makes an image with these chunks of the pattern recorded.
fn optimized(image: &Path, target: &Path, chunks: &[u64]) {
    let volumes = forge::open(image).source_volumes();
    let (memory, _) = memory_of(&volumes);
    let touched = chunks.iter().map(|chunk| ChunkId {
        volume: memory,
        chunk: runnel_snapshot::units::ChunkIndex(PATTERN + chunk),
    });
    let set = WorkingSet::of(&volumes, touched);
    let made = optimize(image, &Wanted::Only, Some(set), CaptureSettings::default());
    let (job, state) = made.unwrap();
    job.run(target, state).unwrap();
}

fn memory_of(volumes: &[SourceVolume]) -> (runnel_snapshot::source::VolumeId, &SourceVolume) {
    let memory = (0..)
        .zip(volumes)
        .find(|(_, volume)| volume.name.to_string() == "memory");
    let (number, volume) = memory.unwrap();
    (runnel_snapshot::source::VolumeId(number), volume)
}

/// How much of memory has arrived.
fn resident(machine: &Monitor) -> u64 {
    let progress = machine.demand("GET", "/snapshot/progress", &Value::Null);
    progress["volumes"][0]["bytes_resident"].as_u64().unwrap()
}

#[test]
fn what_was_recorded_arrives_without_being_touched_and_later_touches_wait_for_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let plain = saved(folder.path());
    let image = folder.path().join("fast");
    let recorded: Vec<u64> = (0..CHUNKS).rev().collect();
    optimized(&plain, &image, &recorded);
    let mut served = Served::new(&image);
    let mut machine = load(&served.request(&json!({"stall_after_ms": 3_600_000})));
    // Background fill brings next to nothing.
    wait_until("all of the pattern has arrived", || {
        resident(&machine) >= CHUNKS * CHUNK
    });
    served.goes_away();
    tell(&mut machine, "checkstamp:8m:4m:7", "checkstamp=right");
}

#[test]
fn a_machine_goes_on_whatever_its_images_working_set_is() {
    let folder = tempfile::tempdir().unwrap();
    let plain = saved(folder.path());
    let volumes = forge::open(&plain).source_volumes();
    let (memory, about) = memory_of(&volumes);
    let longer = SourceVolume {
        bytes: about.bytes + CHUNK,
        ..about.clone()
    };
    let behind = ChunkId {
        volume: memory,
        chunk: about.chunk_size.chunk_holding(about.bytes),
    };
    let stranger = SourceVolume {
        name: "drive:other".parse().unwrap(),
        ..about.clone()
    };
    let cases = [
        ("nonsense", b"no working set".to_vec(), "it is no working set"),
        ("newer", b"RNLXWST\x02".to_vec(), "use a newer one"),
        (
            "behind",
            WorkingSet::of(&[longer], [behind]).to_bytes(),
            "recorded with another machine",
        ),
        (
            "stranger",
            WorkingSet::of(
                &[stranger],
                [ChunkId {
                    volume: memory,
                    chunk: runnel_snapshot::units::ChunkIndex(1),
                }],
            )
            .to_bytes(),
            "recorded with another machine",
        ),
    ];
    for (name, bytes, reason) in cases {
        let image = folder.path().join(name);
        optimized(&plain, &image, &[1, 2]);
        let blob = runnel_snapshot::blobs::Blob {
            digest: forge::add(&image, &bytes),
            bytes: bytes.len() as u64,
        };
        forge::manifest(&image, |manifest| manifest.working_set = Some(blob));
        let mut machine = load(&json!({"image": image, "resume_vm": true}));
        let said = machine.wait_for_log("the working set of an image cannot be used");
        assert!(said.contains(reason), "{name}: {said}");
        tell(&mut machine, "checkstamp:8m:4m:7", "checkstamp=right");
        let served = Served::new(&image);
        let mut machine = load(&served.request(&json!({})));
        tell(&mut machine, "checkstamp:8m:4m:7", "checkstamp=right");
    }
}
