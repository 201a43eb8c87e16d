//! Diff snapshots: what changed since the last image, over it; and Firecracker's, over its memory file.
//!
//! As in `live.rs`, the guest itself notices a memory that is not all of one moment.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use runnel_snapshot::image::Image;
use runnel_snapshot::image::manifest::ImageVolume;
use runnel_tests::bare::{MIB, begin_rounds, configure, end_rounds, load, resumed, save, start, tell};
use runnel_tests::forge::verified;
use runnel_tests::monitor::{Monitor, Question};
use serde_json::{Value, json};

/// So much is written to all the time.
const CHURN: &str = "churn:8m:4m";

/// A machine whose writes KVM logs, or not; with a drive of 16 MiB if a path is given for it.
fn booted(logs: bool, words: &str, disk: Option<&Path>) -> Monitor {
    let mut monitor = Monitor::start();
    configure(&monitor, 1, words);
    monitor.demand("PATCH", "/machine-config", &json!({"track_dirty_pages": logs}));
    if let Some(disk) = disk {
        File::create(disk).unwrap().set_len(16 << 20).unwrap();
        let drive = json!({
            "drive_id": "disk", "path_on_host": disk, "is_root_device": false, "is_read_only": false,
        });
        monitor.demand("PUT", "/drives/disk", &drive);
    }
    start(&mut monitor);
    monitor
}

fn resumed_with(image: &Path, logs: bool) -> Monitor {
    load(&json!({"image": image, "resume_vm": true, "track_dirty_pages": logs}))
}

fn diff_of(image: &Path) -> Value {
    json!({"image_path": image, "snapshot_type": "Diff"})
}

fn save_diff(monitor: &Monitor, image: &Path) {
    monitor.demand("PUT", "/snapshot/create", &diff_of(image));
}

/// The layers of a volume, and the bytes of the last.
fn layers(image: &Image, volume: usize) -> (usize, u64) {
    let volume: &ImageVolume = &image.manifest.volumes[volume];
    (volume.layers.len(), volume.layers.last().unwrap().bytes)
}

fn paths(folder: &Path) -> impl Fn(usize) -> PathBuf {
    let folder = folder.to_owned();
    move |number| folder.join(number.to_string())
}

#[test]
fn a_diff_has_what_was_written_since_the_last_image_and_lies_over_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = paths(folder.path());
    for logs in [true, false] {
        let disk = folder.path().join("disk");
        let mut machine = booted(logs, "fill:8m:16m:7 count:3", Some(&disk));
        tell(&mut machine, "diskfill:0:2m:3", "diskfill=right");
        // Without an image to lie over, all of it.
        save_diff(&machine, &path(0));
        let full = verified(&path(0));
        assert!(full.manifest.parent.is_none());
        assert!(
            full.manifest
                .volumes
                .iter()
                .all(|volume| volume.has_full_layer && volume.layers.len() == 1)
        );
        let whole = layers(&full, 0).1;

        tell(&mut machine, "fill:12m:64k:9", "fill=done");
        tell(&mut machine, "diskfill:1024:64k:5", "diskfill=right");
        save_diff(&machine, &path(1));
        let first = verified(&path(1));
        assert_eq!(first.manifest.parent, Some(full.digest()));
        for volume in [0, 1] {
            let (count, bytes) = layers(&first, volume);
            assert_eq!(count, 2);
            assert!(
                bytes < 400 << 10,
                "logs: {logs}, volume {volume}: {bytes} bytes of {whole}"
            );
            assert_eq!(
                first.manifest.volumes[volume].layers[0],
                full.manifest.volumes[volume].layers[0]
            );
        }

        // Nothing was written to the drive since: it is the volume that it was.
        tell(&mut machine, "count:1", "count=4");
        save_diff(&machine, &path(2));
        let second = verified(&path(2));
        assert_eq!(second.manifest.parent, Some(first.digest()));
        assert_eq!(
            second.manifest.volumes[1].layers,
            first.manifest.volumes[1].layers
        );
        // A full snapshot ends the chain.
        save(&machine, &path(3));
        assert_eq!(layers(&verified(&path(3)), 0).0, 1);
        drop(machine);

        // Each is complete by itself.
        for number in [0, 2] {
            fs::remove_dir_all(path(number)).unwrap();
        }
        for number in [1, 3] {
            let mut again = resumed(&path(number));
            tell(&mut again, "checkfill:11m:512k:7", "checkfill=right");
            tell(&mut again, "checkfill:12m:64k:9", "checkfill=right");
            tell(&mut again, "checkdisk:0:512k:3", "checkdisk=right");
            tell(&mut again, "checkdisk:1024:64k:5", "checkdisk=right");
            tell(
                &mut again,
                "count:1",
                if number == 1 { "count=4" } else { "count=5" },
            );
            drop(again);
            fs::remove_dir_all(path(number)).unwrap();
        }
    }
}

#[test]
fn a_machine_that_writes_all_the_time_is_diffed_as_it_was_at_each_pause() {
    let folder = tempfile::tempdir().unwrap();
    let path = paths(folder.path());
    for logs in [true, false] {
        let mut machine = booted(logs, "fill:20m:8m:5", None);
        begin_rounds(&mut machine, CHURN);
        save(&machine, &path(0));
        for number in 1..4 {
            save_diff(&machine, &path(number));
        }
        end_rounds(&mut machine, "churn");
        drop(machine);
        let (_, bytes) = layers(&verified(&path(3)), 0);
        let (_, whole) = layers(&verified(&path(0)), 0);
        assert!(bytes < whole, "logs: {logs}: {bytes} of {whole}");
        // On from the last of them, in a machine whose memory lies over an image.
        let mut machine = resumed_with(&path(3), logs);
        for number in 4..7 {
            save_diff(&machine, &path(number));
        }
        end_rounds(&mut machine, "churn");
        drop(machine);
        for number in 0..7 {
            verified(&path(number));
            if number % 3 == 0 {
                let mut again = resumed(&path(number));
                end_rounds(&mut again, "churn");
                tell(&mut again, "checkfill:27m:512k:5", "checkfill=right");
            }
        }
        (0..7).for_each(|number| fs::remove_dir_all(path(number)).unwrap());
    }
}

#[test]
fn a_drive_that_is_written_to_all_the_time_is_diffed_as_it_was_at_each_pause() {
    let folder = tempfile::tempdir().unwrap();
    let path = paths(folder.path());
    let disk = folder.path().join("disk");
    let mut machine = booted(true, "count:1", Some(&disk));
    tell(&mut machine, "diskfill:0:2m:3", "diskfill=right");
    begin_rounds(&mut machine, "diskchurn:16384:256k");
    save(&machine, &path(0));
    for number in 1..3 {
        save_diff(&machine, &path(number));
    }
    end_rounds(&mut machine, "diskchurn");
    drop(machine);
    fs::remove_file(&disk).unwrap();
    // An overlay now.
    let mut machine = resumed(&path(2));
    for number in 3..5 {
        save_diff(&machine, &path(number));
    }
    end_rounds(&mut machine, "diskchurn");
    tell(&mut machine, "diskdiscard:0:64k", "diskdiscard=right");
    tell(&mut machine, "diskfill:2048:64k:4", "diskfill=right");
    save_diff(&machine, &path(5));
    drop(machine);
    for number in 0..5 {
        verified(&path(number));
        let mut again = resumed(&path(number));
        end_rounds(&mut again, "diskchurn");
        tell(&mut again, "checkdisk:128:64k:3", "checkdisk=right");
    }
    let last = verified(&path(5));
    assert!(layers(&last, 1).1 < 128 << 10, "{:?}", layers(&last, 1));
    let mut again = resumed(&path(5));
    tell(&mut again, "checkdiskzero:0:64k", "checkdiskzero=right");
    tell(&mut again, "checkdisk:128:64k:3", "checkdisk=right");
    tell(&mut again, "checkdisk:2048:64k:4", "checkdisk=right");
}

#[test]
fn what_a_snapshot_that_failed_would_have_had_is_in_the_next_diff() {
    let folder = tempfile::tempdir().unwrap();
    let path = paths(folder.path());
    for logs in [true, false] {
        let disk = folder.path().join("disk");
        let mut machine = booted(logs, "fill:8m:32m:7", Some(&disk));
        tell(&mut machine, "diskfill:0:1m:3", "diskfill=right");
        save(&machine, &path(0));
        tell(&mut machine, "fill:10m:12m:9", "fill=done");
        tell(&mut machine, "diskfill:0:512k:5", "diskfill=right");
        // There is something already: refused when all was read.
        let taken = path(0);
        let (status, answer) = machine.ask("PUT", "/snapshot/create", &diff_of(&taken));
        assert_eq!(status, 400, "{answer}");
        let mut cancelled = false;
        for number in 0..20 {
            let target = folder.path().join(format!("cancelled-{number}"));
            let saving = Question::put(machine.socket(), "PUT", "/snapshot/create", &diff_of(&target));
            machine.wait_for_log("The machine runs on");
            let _ = machine.ask("DELETE", "/snapshot/create", &Value::Null);
            cancelled = saving.answer().0 == 400;
            if cancelled {
                assert!(!target.exists());
                break;
            }
            // It was faster: what it had is written anew, to be cancelled.
            tell(&mut machine, "fill:10m:12m:9", "fill=done");
            tell(&mut machine, "diskfill:0:512k:5", "diskfill=right");
        }
        assert!(cancelled, "no diff was cancelled in time");
        save_diff(&machine, &path(1));
        drop(machine);
        verified(&path(1));
        let mut again = resumed(&path(1));
        tell(&mut again, "checkfill:21m:1m:9", "checkfill=right");
        tell(&mut again, "checkfill:9m:512k:7", "checkfill=right");
        tell(&mut again, "checkdisk:0:512k:5", "checkdisk=right");
        tell(&mut again, "checkdisk:1024:512k:3", "checkdisk=right");
        drop(again);
        for entry in fs::read_dir(folder.path()).unwrap() {
            let entry = entry.unwrap().path();
            match entry.is_dir() {
                true => fs::remove_dir_all(entry).unwrap(),
                false => fs::remove_file(entry).unwrap(),
            }
        }
    }
}

#[test]
fn a_chain_of_fifty_is_resumed_from_its_last_image_alone() {
    const LENGTH: usize = 50;
    let folder = tempfile::tempdir().unwrap();
    let path = paths(folder.path());
    let mut machine = booted(true, "fill:8m:8m:1", None);
    save(&machine, &path(0));
    for number in 1..=LENGTH {
        let at = 8192 + (number * 37) % 50 * 128;
        tell(
            &mut machine,
            &format!("fill:{at}k:4k:{}", number % 9 + 2),
            "fill=done",
        );
        save_diff(&machine, &path(number));
        fs::remove_dir_all(path(number - 1)).unwrap();
    }
    drop(machine);
    let image = verified(&path(LENGTH));
    let (count, last) = layers(&image, 0);
    assert!(
        count > LENGTH / 2 && last < 256 << 10,
        "{count} layers, the last of {last} bytes"
    );
    let mut again = resumed(&path(LENGTH));
    for number in 1..=LENGTH {
        let at = 8192 + (number * 37) % 50 * 128;
        tell(
            &mut again,
            &format!("checkfill:{at}k:4k:{}", number % 9 + 2),
            "checkfill=right",
        );
    }
    tell(&mut again, "checkfill:15m:512k:1", "checkfill=right");
}

#[test]
fn firecrackers_diff_has_the_pages_written_since_or_brings_a_memory_file_up_to_date() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let files = |kind: &str, memory: &str| json!({"snapshot_type": kind, "snapshot_path": file("state"), "mem_file_path": file(memory)});
    let mut machine = booted(true, "fill:8m:4m:7 count:1", None);
    let paused = |machine: &Monitor, body: &Value| {
        machine.demand("PATCH", "/vm", &json!({"state": "Paused"}));
        machine.demand("PUT", "/snapshot/create", body);
        machine.demand("PATCH", "/vm", &json!({"state": "Resumed"}));
    };
    paused(&machine, &files("Full", "base"));
    // Of an image's books these are not.
    save_diff(&machine, &file("image"));
    tell(&mut machine, "poke:0x1000000:77", "poke=done");
    save_diff(&machine, &file("image-2"));
    paused(&machine, &files("Diff", "diff"));
    tell(&mut machine, "poke:0x1100000:78", "poke=done");
    let (diff, base) = (
        File::open(file("diff")).unwrap(),
        File::open(file("base")).unwrap(),
    );
    assert_eq!(diff.metadata().unwrap().len(), MIB << 20);
    let data = |from: u64| rustix::fs::seek(&diff, rustix::fs::SeekFrom::Data(from)).unwrap_or(u64::MAX);
    assert_eq!(data(0x100_0000), 0x100_0000);
    assert!(data(8 << 20) >= 12 << 20, "nothing was written there since");
    // Laid over the base, as Firecracker's tool does it, it is the machine as it was.
    let over = File::options().write(true).open(file("base")).unwrap();
    let mut at = data(0);
    while at < MIB << 20 {
        let mut page = [0; 4096];
        diff.read_exact_at(&mut page, at).unwrap();
        over.write_all_at(&page, at).unwrap();
        at = data(at + 4096);
    }
    drop(base);
    let from = |memory: &str| {
        let backend = json!({"backend_type": "File", "backend_path": file(memory)});
        load(&json!({
            "snapshot_path": file("state"), "mem_backend": backend, "resume_vm": true, "track_dirty_pages": true,
        }))
    };
    let mut again = from("base");
    tell(&mut again, "checkfill:11m:512k:7", "checkfill=right");
    tell(&mut again, "peek:0x1000000", "peek=0x4d");
    tell(&mut again, "peek:0x1100000", "peek=0x0");
    drop(again);
    // Onto a memory file of the same length it is the whole memory.
    paused(&machine, &files("Diff", "base"));
    drop(machine);
    let mut again = from("base");
    tell(&mut again, "checkfill:11m:512k:7", "checkfill=right");
    tell(&mut again, "peek:0x1000000", "peek=0x4d");
    tell(&mut again, "peek:0x1100000", "peek=0x4e");
    // And so from a machine that was loaded from it, which maps it.
    tell(&mut again, "poke:0x1200000:79", "poke=done");
    paused(&again, &files("Diff", "base"));
    tell(&mut again, "checkfill:11m:512k:7", "checkfill=right");
    drop(again);
    let mut again = from("base");
    tell(&mut again, "peek:0x1000000", "peek=0x4d");
    tell(&mut again, "peek:0x1200000", "peek=0x4f");
}
