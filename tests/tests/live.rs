//! Machines that run on, and write, while they are saved: what is saved is what they were at the pause.
//!
//! The guest itself notices a memory or a drive that is not all of one moment: it goes round by round, and checks before
//! it writes that what is there is of the round before.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use runnel_tests::bare::{
    about, begin_rounds, booted, configure, end_rounds, refusal, resumed, save, saving, start, tell,
    wait_until,
};
use runnel_tests::forge::verified;
use runnel_tests::monitor::{Monitor, Question};
use serde_json::{Value, json};

const DISK_BYTES: u64 = 16 << 20;

/// So much is written to all the time.
const CHURN: &str = "churn:8m:24m";

/// A number in the line with which a snapshot ends.
fn figure(line: &str, name: &str) -> u64 {
    let at = line
        .find(&format!("{name}="))
        .unwrap_or_else(|| panic!("no {name} in {line}"));
    let digits = line[at + name.len() + 1..]
        .chars()
        .take_while(char::is_ascii_digit);
    digits.collect::<String>().parse().unwrap()
}

/// Saves a machine that writes, until some snapshot was met by its writes; the images.
fn saved_under_writes(machine: &mut Monitor, folder: &Path) -> Vec<PathBuf> {
    const TRIES: usize = 20;
    let mut images = Vec::new();
    for number in 0..TRIES {
        let image = folder.join(format!("live-{number}"));
        save(machine, &image);
        images.push(image);
        let line = machine.wait_for_log("Memory is not protected any more");
        if number >= 2 && figure(&line, "faults_frozen") > 0 && figure(&line, "pages_kept_in_memory") > 0 {
            return images;
        }
    }
    panic!("in {TRIES} snapshots the guest never wrote to a page that was not saved yet");
}

#[test]
fn a_booted_machine_that_writes_all_the_time_is_saved_as_it_was_at_the_pause() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = booted("count:1");
    begin_rounds(&mut machine, CHURN);
    let images = saved_under_writes(&mut machine, folder.path());
    end_rounds(&mut machine, "churn");
    for image in images {
        verified(&image);
        let mut again = resumed(&image);
        end_rounds(&mut again, "churn");
    }
}

#[test]
fn a_resumed_machine_that_writes_all_the_time_is_saved_as_it_was_at_the_pause() {
    let folder = tempfile::tempdir().unwrap();
    let first = folder.path().join("first");
    let mut machine = booted("fill:8m:8m:7");
    begin_rounds(&mut machine, CHURN);
    save(&machine, &first);
    drop(machine);
    let mut machine = resumed(&first);
    let images = saved_under_writes(&mut machine, folder.path());
    end_rounds(&mut machine, "churn");
    drop(machine);
    fs::remove_dir_all(&first).unwrap();
    for image in images {
        verified(&image);
        let mut again = resumed(&image);
        end_rounds(&mut again, "churn");
    }
}

#[test]
fn a_guest_whose_writes_find_no_room_waits_for_the_capture_and_is_saved_as_it_was() {
    const TRIES: usize = 20;
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("api.sock");
    let mut machine = Monitor::spawn_at(&socket, |mut command| {
        command.env("RUNNEL_EARLY_PAGES", "3").spawn()
    });
    machine.wait_for_log("Listening on API socket");
    configure(&machine, 1, "count:1");
    start(&mut machine);
    begin_rounds(&mut machine, CHURN);
    let image = folder.path().join("image");
    let has_waited = (0..TRIES).any(|_| {
        if image.exists() {
            fs::remove_dir_all(&image).unwrap();
        }
        save(&machine, &image);
        let line = machine.wait_for_log("Memory is not protected any more");
        assert!(figure(&line, "pages_kept_in_memory") <= 3, "{line}");
        figure(&line, "faults_held") > 0
    });
    assert!(has_waited, "in {TRIES} snapshots no write ever waited");
    end_rounds(&mut machine, "churn");
    verified(&image);
    let mut again = resumed(&image);
    end_rounds(&mut again, "churn");
}

#[test]
fn a_pause_is_not_kept_by_a_write_that_waited_for_a_snapshot_that_is_called_off() {
    const TRIES: usize = 20;
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("api.sock");
    let mut machine = Monitor::spawn_at(&socket, |mut command| {
        command.env("RUNNEL_EARLY_PAGES", "1").spawn()
    });
    machine.wait_for_log("Listening on API socket");
    configure(&machine, 1, "count:1");
    start(&mut machine);
    begin_rounds(&mut machine, CHURN);
    let image = folder.path().join("image");
    let mut called_off = 0;
    for _ in 0..TRIES {
        let snapshot = saving(&machine, &image);
        machine.wait_for_log("The machine runs on");
        let paused = Question::put(&socket, "PATCH", "/vm", &json!({"state": "Paused"}));
        let is_in_time = machine.ask("DELETE", "/snapshot/create", &Value::Null).0 == 204;
        assert_eq!(paused.answer().0, 204);
        let is_cancelled = snapshot.answer().0 == 400;
        assert!(is_in_time || !is_cancelled);
        let line = machine.wait_for_log("Memory is not protected any more");
        set_state(&machine, "Resumed", "Running");
        called_off += usize::from(is_cancelled && figure(&line, "faults_held") > 0);
        if image.exists() {
            fs::remove_dir_all(&image).unwrap();
        }
    }
    assert!(
        called_off > 0,
        "no write waited in a snapshot that was called off"
    );
    end_rounds(&mut machine, "churn");
}

/// A machine with the drive `disk` at `path`, which listens.
fn with_disk(path: &Path) -> Monitor {
    File::create(path).unwrap().set_len(DISK_BYTES).unwrap();
    let mut monitor = Monitor::start();
    configure(&monitor, 1, "count:1");
    let drive = json!({
        "drive_id": "disk", "path_on_host": path, "is_root_device": false, "is_read_only": false,
    });
    monitor.demand("PUT", "/drives/disk", &drive);
    start(&mut monitor);
    monitor
}

/// Saves a machine to `folder` until some snapshot was met by a write to its drive, as its log says; the last image.
/// `begin` has the guest write, once the machine runs on.
fn saved_until_a_drive_is_met(
    machine: &mut Monitor,
    folder: &Path,
    mut begin: impl FnMut(&mut Monitor, usize),
) -> PathBuf {
    const TRIES: usize = 20;
    for number in 0..TRIES {
        let image = folder.join(format!("met-{number}"));
        let saving = Question::put(
            machine.socket(),
            "PUT",
            "/snapshot/create",
            &json!({"image_path": image}),
        );
        machine.wait_for_log("The machine runs on");
        begin(machine, number);
        assert_eq!(saving.answer().0, 204);
        // One that nobody has written to yet is not captured, and has no moment.
        let about_the_drive = format!("volume_bytes={DISK_BYTES}");
        let mut kept = 0;
        loop {
            let line = machine.wait_for_log("any more");
            if line.contains(&about_the_drive) {
                kept = figure(&line, "pages_kept");
            } else if line.contains("Memory is not protected") {
                break;
            }
        }
        if kept > 0 {
            return image;
        }
        fs::remove_dir_all(&image).unwrap();
    }
    panic!("in {TRIES} snapshots the guest never wrote to a part of its drive that was not saved yet");
}

#[test]
fn a_drive_that_is_written_to_all_the_time_is_saved_as_it_was_at_the_pause() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = with_disk(&folder.path().join("disk"));
    // Before what changes, so that this is not saved at once.
    tell(&mut machine, "diskfill:0:2m:3", "diskfill=right");
    begin_rounds(&mut machine, "diskchurn:16384:256k");
    let first = saved_until_a_drive_is_met(&mut machine, folder.path(), |_, _| {});
    end_rounds(&mut machine, "diskchurn");
    drop(machine);
    fs::remove_file(folder.path().join("disk")).unwrap();

    // An overlay now, and what is below it from afar or at hand.
    let overlays = folder.path().join("overlays");
    fs::create_dir(&overlays).unwrap();
    let mut machine = resumed(&first);
    let second = saved_until_a_drive_is_met(&mut machine, &overlays, |_, _| {});
    end_rounds(&mut machine, "diskchurn");
    tell(&mut machine, "diskdiscard:0:64k", "diskdiscard=right");
    tell(&mut machine, "checkdiskzero:0:64k", "checkdiskzero=right");
    drop(machine);
    fs::remove_dir_all(&first).unwrap();
    verified(&second);
    let mut again = resumed(&second);
    end_rounds(&mut again, "diskchurn");
    tell(&mut again, "checkdisk:256:256k:3", "checkdisk=right");
}

#[test]
fn what_is_discarded_while_a_drive_is_saved_is_in_its_image() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = with_disk(&folder.path().join("disk"));
    tell(&mut machine, "diskfill:0:4m:3", "diskfill=right");
    let image = saved_until_a_drive_is_met(&mut machine, folder.path(), |machine, number| {
        // What the last one discarded is to be discarded again.
        if number > 0 {
            tell(machine, "diskfill:0:4m:3", "diskfill=right");
        }
        tell(machine, "diskdiscard:0:4m", "diskdiscard=right");
    });
    tell(&mut machine, "checkdiskzero:7168:512k", "checkdiskzero=right");
    drop(machine);
    verified(&image);
    let mut again = resumed(&image);
    tell(&mut again, "checkdisk:7168:512k:3", "checkdisk=right");
}

#[test]
fn several_vcpus_that_write_all_the_time_are_saved_as_they_were_at_the_pause() {
    const VCPUS: u32 = 4;
    let folder = tempfile::tempdir().unwrap();
    let mut machine = Monitor::start();
    configure(&machine, VCPUS, &format!("vcpus:{VCPUS}"));
    start(&mut machine);
    // Each to memory of its own, of one moment with the others'.
    begin_rounds(&mut machine, "churntogether:8m:6m");
    let images = saved_under_writes(&mut machine, folder.path());
    end_rounds(&mut machine, "churntogether");
    drop(machine);
    let last = images.last().unwrap();
    verified(last);
    let mut again = resumed(last);
    let folder = tempfile::tempdir().unwrap();
    let images = saved_under_writes(&mut again, folder.path());
    for machine in [&mut again, &mut resumed(images.last().unwrap())] {
        end_rounds(machine, "churntogether");
        // All of them still do what they are told.
        begin_rounds(machine, "churntogether:8m:1m");
        end_rounds(machine, "churntogether");
    }
}

/// RAM on both sides of the hole below 4 GiB is two mappings, and one volume.
#[test]
fn memory_above_the_hole_that_is_written_to_all_the_time_is_saved_as_it_was_at_the_pause() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = Monitor::start();
    machine.demand(
        "PUT",
        "/machine-config",
        &json!({"vcpu_count": 1, "mem_size_mib": 5 << 10}),
    );
    machine.demand(
        "PUT",
        "/boot-source",
        &json!({"kernel_image_path": runnel_tests::bare_guest(), "boot_args": "maphigh stamp:0xbff00000:1m:5"}),
    );
    start(&mut machine);
    begin_rounds(&mut machine, "churn:0x100000000:8m");
    let images = saved_under_writes(&mut machine, folder.path());
    end_rounds(&mut machine, "churn");
    drop(machine);
    let last = images.last().unwrap();
    verified(last);
    // Not the kernel that fills in what is missing now, but the pager.
    let mut again = resumed(last);
    let folder = tempfile::tempdir().unwrap();
    let images = saved_under_writes(&mut again, folder.path());
    end_rounds(&mut again, "churn");
    let mut third = resumed(images.last().unwrap());
    end_rounds(&mut third, "churn");
    tell(&mut third, "checkstamp:0xbff00000:1m:5", "checkstamp=right");
}

#[test]
fn a_snapshot_that_is_cancelled_leaves_the_machine_running_and_the_next_one_right() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = booted("fill:40m:20m:7");
    begin_rounds(&mut machine, CHURN);
    let mut cancelled = 0;
    for number in 0..40 {
        let target = folder.path().join(format!("cancelled-{number}"));
        let saving = Question::put(
            machine.socket(),
            "PUT",
            "/snapshot/create",
            &json!({"image_path": target}),
        );
        machine.wait_for_log("The machine runs on");
        // Refused if it is over already.
        let _ = machine.ask("DELETE", "/snapshot/create", &Value::Null);
        let (status, answer) = saving.answer();
        if status == 400 {
            assert!(
                answer["fault_message"].as_str().unwrap().contains("cancelled"),
                "{answer}"
            );
            assert!(!target.exists());
            // Of those that were done there is nothing but their images.
            let left = fs::read_dir(folder.path()).unwrap();
            let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
            assert!(
                left.iter()
                    .all(|name| !name.to_string_lossy().contains("partial")),
                "{left:?}"
            );
            cancelled += 1;
        }
        machine.wait_for_log("Memory is not protected any more");
        if cancelled >= 3 {
            break;
        }
    }
    assert!(cancelled >= 3, "no snapshot was cancelled in time");
    let image = folder.path().join("image");
    save(&machine, &image);
    end_rounds(&mut machine, "churn");
    let mut again = resumed(&image);
    end_rounds(&mut again, "churn");
    tell(&mut again, "checkfill:59m:1m:7", "checkfill=right");
}

/// A machine that writes, whose monitor holds each of its operations in `phase`.
fn writing_and_held_in(phase: &str, socket: &Path) -> Monitor {
    let mut machine = Monitor::spawn_at(socket, |mut command| {
        command.env("RUNNEL_HOLD_PHASE", phase).spawn()
    });
    machine.wait_for_log("Listening on API socket");
    configure(&machine, 1, "count:1");
    start(&mut machine);
    begin_rounds(&mut machine, CHURN);
    machine
}

fn set_state(machine: &Monitor, wanted: &str, then: &str) {
    machine.demand("PATCH", "/vm", &json!({"state": wanted}));
    assert_eq!(about(machine)["state"], then);
}

#[test]
fn a_machine_is_paused_let_run_and_asked_while_its_snapshot_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    let mut machine = writing_and_held_in("publishing", &folder.path().join("api.sock"));
    let progress = |machine: &Monitor| machine.demand("GET", "/snapshot/progress", &Value::Null);

    let snapshot = saving(&machine, &image);
    wait_until("it publishes", || {
        let (status, shown) = machine.ask("GET", "/snapshot/progress", &Value::Null);
        status == 200 && shown["operation"]["phase"] == "publishing"
    });
    set_state(&machine, "Paused", "Paused");
    let config = machine.demand("GET", "/machine-config", &Value::Null);
    assert_eq!(config["vcpu_count"], 1);
    set_state(&machine, "Resumed", "Running");
    let drive = json!({
        "drive_id": "late", "path_on_host": image, "is_root_device": false, "is_read_only": false,
    });
    assert!(refusal(&machine, "PUT", "/drives/late", &drive).contains("after starting"));
    set_state(&machine, "Paused", "Paused");
    assert_eq!(progress(&machine)["operation"]["state"], "running");
    machine.demand("DELETE", "/snapshot/create", &Value::Null);
    assert_eq!(snapshot.answer().0, 400);
    // As somebody left it, and not as it was.
    assert_eq!(about(&machine)["state"], "Paused");
    assert!(!image.exists());
    set_state(&machine, "Resumed", "Running");
    end_rounds(&mut machine, "churn");
}

#[test]
fn a_machine_that_is_paused_while_it_is_saved_stays_so_and_is_saved_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = booted("count:1");
    begin_rounds(&mut machine, CHURN);
    for number in 0..3 {
        let image = folder.path().join(format!("image-{number}"));
        let snapshot = saving(&machine, &image);
        machine.wait_for_log("The machine runs on");
        set_state(&machine, "Paused", "Paused");
        assert_eq!(snapshot.answer().0, 204);
        assert_eq!(about(&machine)["state"], "Paused");
        // One that stands is let run as soon as its memory was read, or once the snapshot is there.
        let again = folder.path().join(format!("again-{number}"));
        let snapshot = saving(&machine, &again);
        set_state(&machine, "Resumed", "Running");
        assert_eq!(snapshot.answer().0, 204);
        for image in [image, again] {
            verified(&image);
            end_rounds(&mut resumed(&image), "churn");
        }
    }
    end_rounds(&mut machine, "churn");
}
