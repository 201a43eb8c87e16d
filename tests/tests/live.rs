//! Machines that run on, and write, while they are saved: what is saved is what they were at the pause.
//!
//! The guest itself notices a memory or a drive that is not all of one moment: it goes round by round, and checks before
//! it writes that what is there is of the round before.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use runnel_snapshot::image::layout::Layout;
use runnel_snapshot::image::reference::Wanted;
use runnel_snapshot::verify::{VerifyProgress, verify};
use runnel_tests::bare::{booted, configure, resumed, save, start, tell};
use runnel_tests::monitor::{Monitor, Question};
use serde_json::{Value, json};

/// So much is written to all the time.
const CHURN: &str = "churn:8m:24m";

/// Has the guest begin to write, and waits until it does: it has gone a round when something is typed.
fn begin(machine: &mut Monitor, words: &str) {
    machine.type_line(words);
}

/// Has the guest end its round, and holds what it says against `what`.
fn end(machine: &mut Monitor, what: &str) {
    machine.type_line("");
    let answer = machine.wait_for_console(&format!("{what}="));
    assert!(answer.starts_with(&format!("{what}=right rounds=")), "{answer}");
}

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

fn verified(image: &Path) {
    let layout = Layout::open(image).unwrap();
    let report = verify(&layout, &Wanted::Only, 1, &VerifyProgress::default()).unwrap();
    assert!(report.is_sound(), "{:?}", report.findings);
}

#[test]
fn a_booted_machine_that_writes_all_the_time_is_saved_as_it_was_at_the_pause() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = booted("count:1");
    begin(&mut machine, CHURN);
    let images = saved_under_writes(&mut machine, folder.path());
    end(&mut machine, "churn");
    for image in images {
        verified(&image);
        let mut again = resumed(&image);
        end(&mut again, "churn");
    }
}

#[test]
fn a_resumed_machine_that_writes_all_the_time_is_saved_as_it_was_at_the_pause() {
    let folder = tempfile::tempdir().unwrap();
    let first = folder.path().join("first");
    let mut machine = booted("fill:8m:8m:7");
    begin(&mut machine, CHURN);
    save(&machine, &first);
    drop(machine);
    let mut machine = resumed(&first);
    let images = saved_under_writes(&mut machine, folder.path());
    end(&mut machine, "churn");
    drop(machine);
    fs::remove_dir_all(&first).unwrap();
    for image in images {
        verified(&image);
        let mut again = resumed(&image);
        end(&mut again, "churn");
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
    begin(&mut machine, CHURN);
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
    end(&mut machine, "churn");
    verified(&image);
    let mut again = resumed(&image);
    end(&mut again, "churn");
}

/// A machine with the drive `disk` at `path`, which listens.
fn with_disk(path: &Path) -> Monitor {
    File::create(path).unwrap().set_len(16 << 20).unwrap();
    let mut monitor = Monitor::start();
    configure(&monitor, 1, "count:1");
    let drive = json!({
        "drive_id": "disk", "path_on_host": path, "is_root_device": false, "is_read_only": false,
    });
    monitor.demand("PUT", "/drives/disk", &drive);
    start(&mut monitor);
    monitor
}

#[test]
fn a_drive_that_is_written_to_all_the_time_is_saved_as_it_was_at_the_pause() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = with_disk(&folder.path().join("disk"));
    // Before what changes, so that this is not saved at once.
    tell(&mut machine, "diskfill:0:2m:3", "diskfill=right");
    begin(&mut machine, "diskchurn:16384:256k");
    let first = folder.path().join("first");
    save(&machine, &first);
    end(&mut machine, "diskchurn");
    drop(machine);
    fs::remove_file(folder.path().join("disk")).unwrap();

    // An overlay now, and what is below it from afar or at hand.
    let mut machine = resumed(&first);
    let second = folder.path().join("second");
    save(&machine, &second);
    end(&mut machine, "diskchurn");
    tell(&mut machine, "diskdiscard:0:64k", "diskdiscard=right");
    tell(&mut machine, "checkdiskzero:0:64k", "checkdiskzero=right");
    drop(machine);
    fs::remove_dir_all(&first).unwrap();
    verified(&second);
    let mut again = resumed(&second);
    end(&mut again, "diskchurn");
    tell(&mut again, "checkdisk:256:256k:3", "checkdisk=right");
}

#[test]
fn what_is_discarded_while_a_drive_is_saved_is_in_its_image() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = with_disk(&folder.path().join("disk"));
    tell(&mut machine, "diskfill:0:4m:3", "diskfill=right");
    let image = folder.path().join("image");
    let saving = Question::put(
        machine.socket(),
        "PUT",
        "/snapshot/create",
        &json!({"image_path": image}),
    );
    machine.wait_for_log("The machine runs on");
    tell(&mut machine, "diskdiscard:0:4m", "diskdiscard=right");
    assert_eq!(saving.answer().0, 204);
    tell(&mut machine, "checkdiskzero:7168:512k", "checkdiskzero=right");
    drop(machine);
    let mut again = resumed(&image);
    tell(&mut again, "checkdisk:7168:512k:3", "checkdisk=right");
}

#[test]
fn a_snapshot_that_is_cancelled_leaves_the_machine_running_and_the_next_one_right() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = booted("fill:40m:20m:7");
    begin(&mut machine, CHURN);
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
    end(&mut machine, "churn");
    let mut again = resumed(&image);
    end(&mut again, "churn");
    tell(&mut again, "checkfill:59m:1m:7", "checkfill=right");
}
