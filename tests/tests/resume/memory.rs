//! RAM on both sides of the hole, and KVM's log of what the guest writes.

use std::fs;

use runnel_tests::bare::{configure, load, save, start, tell};
use runnel_tests::bare_guest;
use runnel_tests::monitor::Monitor;
use serde_json::{Value, json};

/// 3 GiB below the hole, 2 GiB above it.
const LARGE_MIB: u64 = 5 << 10;

#[test]
fn a_machine_with_ram_on_both_sides_of_the_hole_is_saved_and_resumed_whole() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    let mut first = Monitor::start();
    first.demand(
        "PUT",
        "/machine-config",
        &json!({"vcpu_count": 1, "mem_size_mib": LARGE_MIB}),
    );
    first.demand(
        "PUT",
        "/boot-source",
        &json!({"kernel_image_path": bare_guest(), "boot_args": "count:1"}),
    );
    first.demand("PUT", "/actions", &json!({"action_type": "InstanceStart"}));
    let guest = first.wait_for_console("guest=bare");
    assert!(guest.contains("low_end=0xc0000000"), "{guest}");
    first.wait_for_console("listening=1");
    tell(&mut first, "maphigh", "maphigh=done");
    // The last MiB below the hole, the first above it, and the last of all.
    let ends = ["0xbff00000:1m:5", "0x100000000:1m:6", "0x17ff00000:1m:7"];
    for end in ends {
        tell(&mut first, &format!("stamp:{end}"), "stamp=done");
    }
    save(&first, &image);
    drop(first);
    let stored: u64 = fs::read_dir(image.join("blobs/sha256"))
        .unwrap()
        .map(|blob| blob.unwrap().metadata().unwrap().len())
        .sum();
    assert!(stored < 4 << 20, "zeros are stored: {stored} bytes");

    let mut second = load(&json!({"image": image, "resume_vm": true}));
    for end in ends {
        tell(&mut second, &format!("checkstamp:{end}"), "checkstamp=right");
    }
    tell(&mut second, "stamp:0x17ff00000:1m:8", "stamp=done");
    tell(&mut second, "checkstamp:0x17ff00000:1m:8", "checkstamp=right");
    tell(&mut second, "sum:0x140000000:64k", "sum=0x0");
    tell(&mut second, "count:1", "count=2");
}

#[test]
fn a_loaded_machine_tracks_dirty_pages_if_it_is_asked_to_and_can_be_saved_either_way() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    save(&runnel_tests::bare::booted("fill:8m:1m:7 count:1"), &image);
    for tracks in [true, false] {
        let request = json!({"image": image, "resume_vm": true, "track_dirty_pages": tracks});
        let mut machine = load(&request);
        let config = machine.demand("GET", "/machine-config", &Value::Null);
        assert_eq!(config["track_dirty_pages"], tracks);
        tell(&mut machine, "checkfill:8m:1m:7", "checkfill=right");
        tell(&mut machine, "fill:8m:1m:9", "fill=done");
        tell(&mut machine, "checkfill:8m:1m:9", "checkfill=right");
        let again = folder.path().join(format!("again-{tracks}"));
        save(&machine, &again);
        let mut third = load(&json!({"image": again, "resume_vm": true}));
        tell(&mut third, "checkfill:8m:1m:9", "checkfill=right");
    }
}

#[test]
fn the_boot_timer_logs_when_the_guest_says_that_it_has_booted() {
    let folder = tempfile::tempdir().unwrap();
    let mut monitor = Monitor::start_at(&folder.path().join("api.sock"), &["--boot-timer"]);
    monitor.wait_for_log("Listening on API socket");
    configure(&monitor, 1, "pokebyte:0xc0000000:123");
    start(&mut monitor);
    let line = monitor.wait_for_log("Guest-boot-time");
    assert!(line.contains(" us ") && line.contains(" CPU ms"), "{line}");

    // A machine that was saved before it had booted says so where it goes on.
    let image = folder.path().join("image");
    save(&monitor, &image);
    let mut second = Monitor::start_at(&folder.path().join("second.sock"), &["--boot-timer"]);
    second.wait_for_log("Listening on API socket");
    second.demand(
        "PUT",
        "/snapshot/load",
        &json!({"image": image, "resume_vm": true}),
    );
    tell(&mut second, "pokebyte:0xc0000000:123", "pokebyte=done");
    second.wait_for_log("Guest-boot-time");
}
