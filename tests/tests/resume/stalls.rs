//! A machine whose chunks do not come: whatever is in no fault stands, and goes on by itself.

use std::time::Duration;

use runnel_tests::bare::{
    about, booted, configure, hear, load, save, start, tell, wait_until, wait_until_stalled,
};
use runnel_tests::monitor::{Monitor, Question};
use serde_json::{Value, json};

use crate::served::Served;

/// A guest that beats every few milliseconds and is silent for so long stands.
const SILENCE: Duration = Duration::from_millis(500);

/// A vCPU that waits for nothing, beside a thread of the monitor that is in a fault: the drive's, which puts what the
/// guest asked for into a page that has not arrived.
#[test]
fn a_vcpu_that_is_in_no_fault_stands_while_the_machine_is_stalled() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    std::fs::write(&disk, vec![7; 1 << 20]).unwrap();
    let image = folder.path().join("image");
    let mut first = Monitor::start();
    configure(&first, 1, "fill:8m:4m:7");
    let drive = json!({"drive_id": "disk", "path_on_host": disk, "is_root_device": false});
    first.demand("PUT", "/drives/disk", &drive);
    start(&mut first);
    tell(&mut first, "diskfill:0:64k:5", "diskfill=right");
    save(&first, &image);
    drop(first);

    let mut served = Served::new(&image);
    let mut machine = load(&served.request(&json!({"stall_after_ms": 200})));
    // Brings what the guest needs to ask its drive, and to beat.
    tell(&mut machine, "checkdisk:0:64k:5 count:1", "checkdisk=right");
    hear(&mut machine, "count=1");
    served.goes_away();
    machine.type_line("diskask:0:0x900000 beat");
    let stalled = wait_until_stalled(&machine);
    assert_eq!(stalled["volume"], "memory", "{stalled}");
    machine.wait_for_log("The machine is stalled");
    machine.wait_for_silence(SILENCE);
    assert_eq!(about(&machine)["state"], "Running");

    served.comes_back();
    machine.wait_for_log("The machine is not stalled any more");
    machine.wait_for_console("count=");
    machine.type_line("checkfill:0xa00000:64k:7");
    machine.wait_for_console("checkfill=right");
    wait_until("nothing is missing", || about(&machine)["stalled"].is_null());
    // A machine that was held is paused and goes on like any other.
    machine.demand("PATCH", "/vm", &json!({"state": "Paused"}));
    machine.demand("PATCH", "/vm", &json!({"state": "Resumed"}));
    machine.type_line("sum:8m:4k");
    machine.wait_for_console("sum=");
}

fn progress(monitor: &Monitor) -> Value {
    monitor.demand("GET", "/snapshot/progress", &Value::Null)["operation"].clone()
}

/// The guest waits for a page that does not come, and does not count as stalled for a long time.
#[test]
fn a_pause_that_waits_for_a_chunk_can_be_called_off_and_does_not_keep_the_monitor_from_ending() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    save(&booted("fill:8m:4m:7"), &image);
    let mut served = Served::new(&image);
    let mut machine = load(&served.request(&json!({"stall_after_ms": 3_600_000})));
    tell(&mut machine, "count:1", "count=1");
    served.goes_away();
    machine.type_line("count:1 checkfill:8m:64k:7");
    hear(&mut machine, "count=2");
    // Nothing tells that it touches what is missing but that it says no more.
    machine.wait_for_silence(SILENCE);

    let target = json!({"image_path": folder.path().join("second")});
    let saving = Question::put(machine.socket(), "PUT", "/snapshot/create", &target);
    wait_until("it pauses", || progress(&machine)["phase"] == "pausing");
    machine.demand("DELETE", "/snapshot/create", &Value::Null);
    let (status, fault) = saving.answer();
    assert_eq!(status, 400, "{fault}");
    assert!(
        fault["fault_message"].as_str().unwrap().contains("cancelled"),
        "{fault}"
    );
    assert_eq!(progress(&machine)["state"], "cancelled");
    assert_eq!(about(&machine)["state"], "Running");

    let _pausing = Question::put(machine.socket(), "PATCH", "/vm", &json!({"state": "Paused"}));
    machine.wait_for_silence(SILENCE);
    machine.signal("TERM");
    assert_eq!(machine.wait().0.code(), Some(0));
}

/// The guest waits for a sector, and for nothing else: all of its memory that it touches is there.
#[test]
fn a_machine_that_waits_for_a_drive_alone_is_stalled_stands_and_goes_on_with_the_right_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    std::fs::write(&disk, vec![7; 8 << 20]).unwrap();
    let image = folder.path().join("image");
    let mut first = Monitor::start();
    configure(&first, 1, "");
    let drive = json!({"drive_id": "disk", "path_on_host": disk, "is_root_device": false});
    first.demand("PUT", "/drives/disk", &drive);
    start(&mut first);
    for words in ["diskfill:0:64k:5", "diskfill:8192:64k:6"] {
        tell(&mut first, words, "diskfill=right");
    }
    save(&first, &image);
    drop(first);

    let mut served = Served::new(&image);
    let mut machine = load(&served.request(&json!({"stall_after_ms": 200})));
    // Brings the page that the sector goes to, and what the guest needs to ask and to beat.
    tell(
        &mut machine,
        "poke:0x900000:1 checkdisk:0:64k:5 count:1",
        "poke=done",
    );
    hear(&mut machine, "count=1");
    served.goes_away();
    machine.type_line("diskask:8192:0x900000 beat");
    let stalled = wait_until_stalled(&machine);
    assert_eq!(stalled["volume"], "drive:disk", "{stalled}");
    machine.wait_for_log("The machine is stalled");
    machine.wait_for_silence(SILENCE);
    let (status, refused) = machine.ask("PATCH", "/vm", &json!({"state": "Paused"}));
    assert_eq!(status, 400);
    assert!(
        refused["fault_message"].as_str().unwrap().contains("drive:disk"),
        "{refused}"
    );

    served.comes_back();
    machine.wait_for_log("The machine is not stalled any more");
    machine.wait_for_console("count=");
    machine.type_line("checkdisk:8192:64k:6");
    machine.wait_for_console("checkdisk=right");
    assert!(about(&machine)["stalled"].is_null());
}
