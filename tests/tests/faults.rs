//! Hosts and networks that fail while machines are saved, loaded and run: an error or a machine that waits and says
//! why, and nothing lost.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use runnel_snapshot::image::Image;
use runnel_snapshot::image::reference::Wanted;
use runnel_snapshot::volume::VolumeName;
use runnel_tests::bare::{
    about, configure, hear, refusal, resumed, save, start, tell, wait_until, wait_until_stalled,
};
use runnel_tests::lab::skip;
use runnel_tests::monitor::{Monitor, Question};
use runnel_tests::served::{Served, TRICKLE};
use serde_json::{Value, json};

fn progress(monitor: &Monitor) -> Value {
    monitor.demand("GET", "/snapshot/progress", &Value::Null)
}

fn wait_for_phase(monitor: &Monitor, phase: &str) {
    wait_until(phase, || progress(monitor)["operation"]["phase"] == phase);
}

fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn an_agent_killed_ten_times_over_loses_nothing_that_the_guest_waits_for() {
    const PIECE: u64 = 256 << 10;
    let rig = Served::new();
    let mut agent = rig.agents().start(&TRICKLE);
    let mut machine = rig.load(&json!({"resume_vm": true}));
    for round in 0..10 {
        // Memory that nobody has touched yet: its chunks are asked for while the agent dies.
        let at = (8 << 20) + round * PIECE;
        machine.type_line(&format!("checkfill:{at}:{PIECE}:7"));
        drop(agent);
        agent = rig.agents().start(&TRICKLE);
        hear(&mut machine, "checkfill=right");
    }
    tell(&mut machine, "count:1", "count=4");
    wait_until("it is not stalled", || about(&machine)["stalled"].is_null());
    drop(agent);
}

#[test]
fn an_agent_that_stays_away_stalls_the_machine_and_a_new_one_is_asked_again() {
    let rig = Served::new();
    let agent = rig.agents().start(&TRICKLE);
    let mut machine = rig.load(&json!({}));
    // Before it runs, and with it the fill: the guest asks for what is not here.
    drop(agent);
    machine.demand("PATCH", "/vm", &json!({"state": "Resumed"}));
    machine.type_line("checkfill:8m:1m:7");
    let stalled = wait_until_stalled(&machine);
    assert!(stalled["reason"].as_str().unwrap().contains("agent"), "{stalled}");
    let image = rig.image().with_file_name("again");
    let refused = refusal(&machine, "PUT", "/snapshot/create", &json!({"image_path": image}));
    assert!(refused.contains("stalled"), "{refused}");
    let _agent = rig.agents().start(&[]);
    hear(&mut machine, "checkfill=right");
    wait_until("it is not stalled", || about(&machine)["stalled"].is_null());
    save(&machine, &image);
    tell(&mut resumed(&image), "checkfill:8m:1m:7", "checkfill=right");
}

#[test]
fn a_second_agent_over_the_same_pages_is_refused_and_the_first_goes_on() {
    let rig = Served::new();
    let _agent = rig.agents().start(&[]);
    let said = rig.agents().refusal();
    assert!(said.contains("another agent"), "{said}");
    let mut machine = rig.load(&json!({"resume_vm": true}));
    tell(&mut machine, "checkfill:8m:1m:7", "checkfill=right");
}

#[test]
fn a_stalled_machine_ends_when_it_is_told_to() {
    let mut rig = Served::new();
    let _agent = rig.agents().start(&TRICKLE);
    let mut machine = rig.load(&json!({"stall_after_ms": 300}));
    // Before it runs, and with it the fill: the guest asks for what is not here.
    rig.stop_server();
    machine.demand("PATCH", "/vm", &json!({"state": "Resumed"}));
    machine.type_line("checkfill:8m:256k:7");
    let _ = wait_until_stalled(&machine);
    machine.signal("TERM");
    let (status, _) = machine.wait();
    assert_eq!(status.code(), Some(0));
    assert!(!machine.socket().exists());
}

#[test]
fn a_snapshot_that_is_called_off_leaves_machine_and_disk_as_they_were() {
    let mut rig = Served::new();
    let _agent = rig.agents().start(&TRICKLE);
    let mut machine = rig.load(&json!({"stall_after_ms": 600_000}));
    // With the server away the snapshot has something to wait for.
    rig.stop_server();
    let before = names_in(rig.image().parent().unwrap());
    let image = rig.image().with_file_name("again");
    let snapshot = Question::put(
        machine.socket(),
        "PUT",
        "/snapshot/create",
        &json!({"image_path": image}),
    );
    wait_until("the snapshot is under way", || {
        progress(&machine)["operation"]["kind"] == "create"
    });
    machine.demand("DELETE", "/snapshot/create", &Value::Null);
    let (status, fault) = snapshot.answer();
    assert_eq!(status, 400, "{fault}");
    assert_eq!(progress(&machine)["operation"]["state"], "cancelled");
    assert_eq!(names_in(rig.image().parent().unwrap()), before);
    assert_eq!(about(&machine)["state"], "Paused");
    let again = machine.ask("DELETE", "/snapshot/create", &Value::Null);
    assert_eq!(again.0, 400, "there is nothing to call off any more");

    rig.start_server();
    machine.demand("PATCH", "/vm", &json!({"state": "Resumed"}));
    tell(&mut machine, "checkfill:8m:1m:7", "checkfill=right");
    save(&machine, &image);
}

#[test]
fn a_load_that_is_called_off_leaves_a_monitor_that_loads_something_else() {
    let rig = Served::new();
    let _agent = rig.agents().start(&[]);
    // Takes connections, and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let image = format!("http://{}/bare", silent.local_addr().unwrap());
    let mut monitor = Monitor::start();
    let request = json!({"image": image, "agent_path": rig.agents().socket(), "resume_vm": true});
    let loading = Question::put(monitor.socket(), "PUT", "/snapshot/load", &request);
    wait_for_phase(&monitor, "opening");
    monitor.demand("DELETE", "/snapshot/load", &Value::Null);
    let (status, fault) = loading.answer();
    assert_eq!(status, 400, "{fault}");
    assert!(
        fault["fault_message"].as_str().unwrap().contains("cancelled"),
        "{fault}"
    );
    assert_eq!(progress(&monitor)["operation"]["state"], "cancelled");
    assert_eq!(about(&monitor)["state"], "Not started");

    monitor.demand("PUT", "/snapshot/load", &rig.request(&json!({"resume_vm": true})));
    tell(&mut monitor, "checkfill:8m:1m:7", "checkfill=right");
}

/// A monitor with a file system of that size at `small`: its alone, so that the mount goes with it.
fn with_small_disk(small: &Path, size: &str) -> Monitor {
    let mut mounting = Command::new("unshare");
    mounting.args(["--mount", "sh", "-ec"]);
    mounting
        .arg(format!("mount -t tmpfs -o size={size} none \"$0\"; exec \"$@\""))
        .arg(small);
    let mut monitor = Monitor::start_by(mounting, &small.with_file_name("api.sock"));
    monitor.wait_for_log("Listening on API socket");
    monitor
}

#[test]
fn a_machine_whose_drive_has_no_room_to_arrive_says_where() {
    if !rustix::process::geteuid().is_root() {
        skip("only root can mount a small file system");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut first = with_drive(folder.path(), false);
    tell(&mut first, "diskfill:0:1m:5", "diskfill=right");
    let image = folder.path().join("image");
    save(&first, &image);
    drop(first);

    let small = folder.path().join("small");
    fs::create_dir(&small).unwrap();
    let mut machine = with_small_disk(&small, "256k");
    let load = json!({"image": image, "overlay_directory": small, "stall_after_ms": 500, "resume_vm": true});
    machine.demand("PUT", "/snapshot/load", &load);
    machine.type_line("checkdisk:0:1m:5");
    let stalled = wait_until_stalled(&machine);
    let reason = stalled["reason"].as_str().unwrap();
    assert!(
        reason.ends_with(&format!("make room in {}", small.display())),
        "{reason}"
    );
    assert!(!reason.contains("chunk"), "{reason}");
    let paused = refusal(&machine, "PATCH", "/vm", &json!({"state": "Paused"}));
    assert_eq!(paused.matches(reason).count(), 1, "{paused}");
}

#[test]
fn a_machine_that_writes_more_than_there_is_room_for_stands_until_there_is_and_loses_nothing() {
    if !rustix::process::geteuid().is_root() {
        skip("only root can mount a small file system");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let first = with_drive(folder.path(), false);
    let image = folder.path().join("image");
    save(&first, &image);
    drop(first);

    let small = folder.path().join("small");
    fs::create_dir(&small).unwrap();
    // Room for the drive, and for no more than a quarter of what is written to it.
    let mut machine = with_small_disk(&small, "1280k");
    let load = json!({"image": image, "overlay_directory": small, "resume_vm": true});
    machine.demand("PUT", "/snapshot/load", &load);
    tell(&mut machine, "count:1", "count=4");
    wait_until("the drive is there", || {
        let drive = &progress(&machine)["volumes"][1];
        drive["bytes_resident"] == drive["bytes_total"]
    });
    machine.type_line("diskfill:0:1m:9");
    let stalled = wait_until_stalled(&machine);
    assert_eq!(stalled["volume"], "drive:data", "{stalled}");
    let reason = stalled["reason"].as_str().unwrap();
    assert!(
        reason.ends_with(&format!("make room in {}", small.display())),
        "{reason}"
    );
    let refused = refusal(
        &machine,
        "PUT",
        "/snapshot/create",
        &json!({"image_path": folder.path().join("no")}),
    );
    assert!(refused.contains("make room in"), "{refused}");

    let grown = Command::new("nsenter")
        .args([
            "--mount",
            "--target",
            &machine.pid().to_string(),
            "mount",
            "-o",
            "remount,size=4m",
        ])
        .arg(&small)
        .status();
    assert!(grown.unwrap().success());
    machine.wait_for_console("diskfill=right");
    tell(&mut machine, "checkdisk:0:1m:9", "checkdisk=right");
    assert!(about(&machine)["stalled"].is_null());
}

#[test]
fn a_snapshot_that_the_disk_has_no_room_for_fails_and_the_machine_runs_on() {
    if !rustix::process::geteuid().is_root() {
        skip("only root can mount a small file system");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let small = folder.path().join("small");
    fs::create_dir(&small).unwrap();
    let random = folder.path().join("random");
    let noise = Command::new("head")
        .args(["-c", "8M", "/dev/urandom"])
        .output()
        .unwrap();
    fs::write(&random, noise.stdout).unwrap();
    let mut machine = with_small_disk(&small, "4m");
    configure(&machine, 1, "count:3");
    let kernel = runnel_tests::bare_guest();
    let boot = json!({"kernel_image_path": kernel, "initrd_path": random, "boot_args": "count:3"});
    machine.demand("PUT", "/boot-source", &boot);
    start(&mut machine);

    let inside =
        PathBuf::from(format!("/proc/{}/root", machine.pid())).join(small.strip_prefix("/").unwrap());
    let image = small.join("image");
    for is_paused in [false, true] {
        let state = if is_paused { "Paused" } else { "Resumed" };
        machine.demand("PATCH", "/vm", &json!({"state": state}));
        let reason = refusal(&machine, "PUT", "/snapshot/create", &json!({"image_path": image}));
        assert!(reason.contains("No space left"), "{reason}");
        assert!(names_in(&inside).is_empty());
        assert_eq!(
            about(&machine)["state"],
            if is_paused { "Paused" } else { "Running" }
        );
    }
    let two = json!({"snapshot_path": small.join("state"), "mem_file_path": small.join("memory")});
    let reason = refusal(&machine, "PUT", "/snapshot/create", &two);
    assert!(reason.contains("No space left"), "{reason}");
    assert!(names_in(&inside).is_empty());

    machine.demand("PATCH", "/vm", &json!({"state": "Resumed"}));
    tell(&mut machine, "count:1", "count=4");
    let elsewhere = folder.path().join("image");
    save(&machine, &elsewhere);
    tell(&mut resumed(&elsewhere), "count:1", "count=5");
}

/// A machine with a drive of 1 MiB, saved with and without it.
fn with_drive(folder: &Path, is_read_only: bool) -> Monitor {
    let path = folder.join("drive");
    fs::write(
        &path,
        (0..1 << 20).map(|at: u32| (at / 997) as u8).collect::<Vec<_>>(),
    )
    .unwrap();
    let mut machine = Monitor::start();
    configure(&machine, 1, "count:3");
    let drive = json!({
        "drive_id": "data", "path_on_host": path, "is_root_device": false, "is_read_only": is_read_only
    });
    machine.demand("PUT", "/drives/data", &drive);
    start(&mut machine);
    machine
}

#[test]
fn what_a_resumed_machine_writes_and_discards_on_its_disk_is_in_its_next_image() {
    let folder = tempfile::tempdir().unwrap();
    let images = ["one", "two"].map(|name| folder.path().join(name));
    let mut first = with_drive(folder.path(), false);
    tell(&mut first, "diskfill:0:64k:5", "diskfill=right");
    tell(&mut first, "diskfill:1024:64k:6", "diskfill=right");
    save(&first, &images[0]);
    // What the first machine does from now on is its own affair.
    tell(&mut first, "diskfill:0:64k:1", "diskfill=right");

    let mut second = resumed(&images[0]);
    tell(&mut second, "checkdisk:0:64k:5", "checkdisk=right");
    tell(&mut second, "diskfill:0:16k:9", "diskfill=right");
    tell(&mut second, "diskdiscard:1024:32k", "diskdiscard=right");
    tell(&mut second, "checkdiskzero:1024:32k", "checkdiskzero=right");
    save(&second, &images[1]);
    drop((first, second));
    fs::remove_dir_all(&images[0]).unwrap();

    let mut third = resumed(&images[1]);
    tell(&mut third, "checkdisk:0:16k:9", "checkdisk=right");
    tell(&mut third, "checkdisk:32:48k:5", "checkdisk=right");
    tell(&mut third, "checkdiskzero:1024:32k", "checkdiskzero=right");
    tell(&mut third, "checkdisk:1088:32k:6", "checkdisk=right");
    tell(&mut third, "count:1", "count=4");
}

#[test]
fn clones_of_one_image_never_see_what_another_wrote_to_disk_or_memory() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    let mut original = with_drive(folder.path(), false);
    tell(&mut original, "diskfill:0:64k:5", "diskfill=right");
    tell(&mut original, "fill:8m:64k:5", "fill=done");
    save(&original, &image);
    drop(original);
    let drive = fs::read(folder.path().join("drive")).unwrap();
    let mut clones = [resumed(&image), resumed(&image)];
    for (clone, seed) in clones.iter_mut().zip([21, 22]) {
        tell(clone, &format!("diskfill:0:16k:{seed}"), "diskfill=right");
        tell(clone, &format!("fill:8m:16k:{seed}"), "fill=done");
    }
    for (clone, seed) in clones.iter_mut().zip([21, 22]) {
        tell(clone, &format!("checkdisk:0:16k:{seed}"), "checkdisk=right");
        tell(clone, "checkdisk:32:48k:5", "checkdisk=right");
        tell(clone, &format!("checkfill:8m:16k:{seed}"), "checkfill=right");
        tell(clone, "checkfill:8208k:48k:5", "checkfill=right");
    }
    assert!(
        fs::read(folder.path().join("drive")).unwrap() == drive,
        "the file that the image was made of"
    );
}

#[test]
fn a_drive_that_was_left_out_must_be_supplied_be_as_long_and_be_nobody_elses() {
    let folder = tempfile::tempdir().unwrap();
    let machine = with_drive(folder.path(), false);
    let stranger = json!({"image_path": folder.path().join("none"), "excluded_drives": ["other"]});
    let reason = refusal(&machine, "PUT", "/snapshot/create", &stranger);
    assert!(reason.contains("other"), "{reason}");
    let image = folder.path().join("image");
    machine.demand(
        "PUT",
        "/snapshot/create",
        &json!({"image_path": image, "excluded_drives": ["data"]}),
    );
    drop(machine);

    let mut monitor = Monitor::start();
    let reason = refusal(&monitor, "PUT", "/snapshot/load", &json!({"image": image}));
    assert!(
        reason.contains("data") && reason.contains("drive_overrides"),
        "{reason}"
    );
    let other = folder.path().join("other");
    let mut request = json!({
        "image": image, "resume_vm": true, "drive_overrides": [{"drive_id": "data", "path_on_host": other}]
    });
    fs::write(&other, vec![0; 1 << 19]).unwrap();
    let reason = refusal(&monitor, "PUT", "/snapshot/load", &request);
    assert!(
        reason.contains("1048576") && reason.contains("524288"),
        "{reason}"
    );
    fs::remove_file(&other).unwrap();
    let reason = refusal(&monitor, "PUT", "/snapshot/load", &request);
    assert!(reason.contains(other.to_str().unwrap()), "{reason}");
    request["drive_overrides"][0]["drive_id"] = json!("nobody");
    let reason = refusal(&monitor, "PUT", "/snapshot/load", &request);
    assert!(reason.contains("nobody") && reason.contains("data"), "{reason}");
    assert_eq!(about(&monitor)["state"], "Not started");

    fs::write(&other, vec![0; 1 << 20]).unwrap();
    request["drive_overrides"][0]["drive_id"] = json!("data");
    monitor.demand("PUT", "/snapshot/load", &request);
    tell(&mut monitor, "count:1", "count=4");

    // It is that machine's now, and another one's as soon as that has ended.
    let second = Monitor::start();
    let reason = refusal(&second, "PUT", "/snapshot/load", &request);
    assert!(reason.contains("locked by another machine"), "{reason}");
    assert_eq!(about(&second)["state"], "Not started");
    drop(monitor);
    second.demand("PUT", "/snapshot/load", &request);
}

#[test]
fn a_read_only_drive_is_captured_once_and_its_blobs_are_shared() {
    let folder = tempfile::tempdir().unwrap();
    let machine = with_drive(folder.path(), true);
    let images = ["one", "two"].map(|name| folder.path().join(name));
    save(&machine, &images[0]);
    save(&machine, &images[1]);
    // And a machine that was resumed does not capture it again either.
    let resumed = resumed(&images[1]);
    let third = folder.path().join("three");
    save(&resumed, &third);
    let inodes: Vec<u64> = images
        .iter()
        .chain([&third])
        .map(|image| {
            let opened = Image::open_directory(image, &Wanted::Only).unwrap();
            let name = VolumeName::Drive("data".to_owned());
            let layer = opened.volume(&name).unwrap().layers[0].digest;
            let blob = image.join("blobs/sha256").join(layer.hex());
            fs::metadata(blob).unwrap().ino()
        })
        .collect();
    assert!(inodes.iter().all(|inode| *inode == inodes[0]), "{inodes:?}");
}
