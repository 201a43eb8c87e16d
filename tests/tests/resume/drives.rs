//! What stands behind the drives of a resumed machine, and what its next snapshot makes of it.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use runnel_snapshot::image::Image;
use runnel_snapshot::image::reference::Wanted;
use runnel_snapshot::volume::VolumeName;
use runnel_tests::bare::{configure, load, refusal, save, start, tell};
use runnel_tests::monitor::{Monitor, Question};
use serde_json::json;
use tempfile::TempDir;

use crate::served::Served;

const DISK_BYTES: u64 = 8 << 20;

/// A machine with the drive `disk` over `folder/disk`, which listens.
fn with_disk(folder: &Path, is_read_only: bool) -> Monitor {
    let disk = folder.join("disk");
    File::create(&disk).unwrap().set_len(DISK_BYTES).unwrap();
    let mut monitor = Monitor::start();
    configure(&monitor, 1, "count:1");
    let drive = json!({
        "drive_id": "disk", "path_on_host": disk, "is_root_device": false, "is_read_only": is_read_only,
    });
    monitor.demand("PUT", "/drives/disk", &drive);
    start(&mut monitor);
    monitor
}

/// An image of a machine whose drive holds a pattern in its first MiB.
fn image_with_disk(folder: &TempDir) -> PathBuf {
    let mut monitor = with_disk(folder.path(), false);
    tell(&mut monitor, "diskfill:0:1m:5", "diskfill=right");
    let image = folder.path().join("image");
    save(&monitor, &image);
    image
}

/// The only layer of the volume `name` of an image on this host, as a file.
fn layer(image: &Path, name: &VolumeName) -> fs::Metadata {
    let opened = Image::open_directory(image, &Wanted::Only).unwrap();
    let layer = opened.volume(name).unwrap().layers[0];
    fs::metadata(image.join("blobs/sha256").join(layer.digest.hex())).unwrap()
}

#[test]
fn a_machine_from_afar_runs_on_before_its_drives_are_captured_and_may_write_to_them() {
    let folder = tempfile::tempdir().unwrap();
    let first = image_with_disk(&folder);
    let served = Served::new(&first);
    let mut machine = load(&served.request(&json!({})));
    tell(&mut machine, "diskfill:0:64k:6", "diskfill=right");
    tell(&mut machine, "diskdiscard:128:64k", "diskdiscard=right");

    let second = folder.path().join("second");
    let saving = Question::put(
        machine.socket(),
        "PUT",
        "/snapshot/create",
        &json!({"image_path": second}),
    );
    machine.wait_for_log("The machine runs on");
    tell(&mut machine, "diskfill:0:2m:9", "diskfill=right");
    assert_eq!(saving.answer().0, 204);
    drop((machine, served));
    fs::remove_dir_all(&first).unwrap();

    let mut again = load(&json!({"image": second, "resume_vm": true}));
    tell(&mut again, "checkdisk:0:64k:6", "checkdisk=right");
    tell(&mut again, "checkdiskzero:128:64k", "checkdiskzero=right");
    tell(&mut again, "checkdisk:256:896k:5", "checkdisk=right");
    tell(&mut again, "checkdiskzero:2048:1m", "checkdiskzero=right");
}

#[test]
fn a_drive_that_nobody_wrote_to_is_captured_once_though_it_came_from_afar() {
    let name = VolumeName::Drive("disk".to_owned());
    for is_read_only in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        save(&with_disk(folder.path(), is_read_only), &image);
        let served = Served::new(&image);
        let mut machine = load(&served.request(&json!({})));
        let images = ["one", "two"].map(|name| folder.path().join(name));
        images.iter().for_each(|image| save(&machine, image));
        let [one, two] = [&images[0], &images[1]].map(|image| layer(image, &name));
        assert_eq!(one.ino(), two.ino(), "read-only: {is_read_only}");

        if !is_read_only {
            tell(&mut machine, "diskfill:0:64k:6", "diskfill=right");
            let three = folder.path().join("three");
            save(&machine, &three);
            assert_ne!(layer(&three, &name).ino(), one.ino());
        }
    }
}

#[test]
fn overlays_lie_in_the_directory_that_is_named_and_another_is_asked_for_where_they_cannot() {
    let folder = tempfile::tempdir().unwrap();
    let image = image_with_disk(&folder);
    let overlays = folder.path().join("overlays");
    let request = json!({"image": image, "overlay_directory": overlays, "resume_vm": true});
    let monitor = Monitor::start();
    let reason = refusal(&monitor, "PUT", "/snapshot/load", &request);
    assert!(reason.contains("overlays"), "{reason}");

    fs::create_dir(&overlays).unwrap();
    let mut machine = load(&request);
    tell(&mut machine, "diskfill:0:64k:6", "diskfill=right");
    let lies_there = |entry: fs::DirEntry| {
        let target = fs::read_link(entry.path()).unwrap_or_default();
        target.starts_with(&overlays)
    };
    let open = fs::read_dir(format!("/proc/{}/fd", machine.pid())).unwrap();
    assert!(open.map(Result::unwrap).any(lies_there));
    // Without a name: nothing is left behind, however the monitor ends.
    assert_eq!(fs::read_dir(&overlays).unwrap().count(), 0);
}

#[test]
fn drives_of_firecrackers_two_files_are_opened_again_by_path_and_held_against_what_they_were() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    let (state, memory) = (folder.path().join("state"), folder.path().join("memory"));
    let mut first = with_disk(folder.path(), false);
    tell(&mut first, "diskfill:0:64k:5", "diskfill=right");
    first.demand("PATCH", "/vm", &json!({"state": "Paused"}));
    let nowhere = folder.path().join("nowhere/file");
    for (state, memory) in [(&nowhere, &memory), (&state, &nowhere)] {
        let request = json!({"snapshot_path": state, "mem_file_path": memory});
        let reason = refusal(&first, "PUT", "/snapshot/create", &request);
        assert!(
            reason.contains("nowhere does not exist: make it first"),
            "{reason}"
        );
    }
    first.demand(
        "PUT",
        "/snapshot/create",
        &json!({"snapshot_path": state, "mem_file_path": memory}),
    );
    drop(first);
    let about = fs::metadata(&memory).unwrap();
    assert_eq!(about.len(), runnel_tests::bare::MIB << 20);
    assert!(
        about.blocks() * 512 < about.len() / 4,
        "{} blocks",
        about.blocks()
    );

    let request = json!({
        "snapshot_path": state,
        "mem_backend": {"backend_type": "File", "backend_path": memory},
        "resume_vm": true,
    });
    let mut second = load(&request);
    tell(&mut second, "checkdisk:0:64k:5", "checkdisk=right");
    drop(second);

    // Somebody wrote to it: the guest's memory may not fit its file system any more.
    let file = File::options().write(true).open(&disk).unwrap();
    file.set_modified(SystemTime::now() + Duration::from_secs(3600))
        .unwrap();
    let mut third = load(&request);
    let warning = third.wait_for_log("the drive was written after the machine was saved");
    assert!(warning.contains("disk"), "{warning}");
    drop(third);

    file.set_len(DISK_BYTES / 2).unwrap();
    let reason = refusal(&Monitor::start(), "PUT", "/snapshot/load", &request);
    for part in [
        "drive disk",
        &DISK_BYTES.to_string(),
        &(DISK_BYTES / 2).to_string(),
    ] {
        assert!(reason.contains(part), "{reason}");
    }
}
