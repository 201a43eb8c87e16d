//! A machine saved and resumed, in another monitor and from afar: the bare guest on this host's KVM.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use runnel_snapshot::state::MachineState;
use runnel_tests::bare::{MIB, about, booted, load, refusal, resumed, save, tell};
use runnel_tests::monitor::Monitor;
use serde_json::json;
use tempfile::TempDir;

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn a_machine_goes_on_in_another_monitor_and_the_first_one_too() {
    let folder = folder();
    let image = folder.path().join("image");
    let mut first = booted("fill:8m:4m:7 count:3");
    save(&first, &image);
    assert_eq!(about(&first)["state"], "Running");

    let mut second = resumed(&image);
    tell(&mut second, "count:1", "count=4");
    tell(&mut second, "checkfill:8m:4m:7", "checkfill=right");
    tell(&mut second, "fill:8m:4m:9", "fill=done");
    tell(&mut first, "count:1", "count=4");
    tell(&mut first, "checkfill:8m:4m:7", "checkfill=right");
    second.type_line("poweroff");
    assert_eq!(second.wait().0.code(), Some(0));
}

#[test]
fn a_resumed_machine_is_saved_again_whole_although_most_of_it_was_never_touched() {
    let folder = folder();
    let images = [folder.path().join("one"), folder.path().join("two")];
    let first = booted("fill:8m:4m:7 fill:20m:2m:8 count:1");
    save(&first, &images[0]);
    drop(first);
    let mut second = resumed(&images[0]);
    tell(&mut second, "fill:20m:1m:9", "fill=done");
    save(&second, &images[1]);
    drop(second);
    std::fs::remove_dir_all(&images[0]).unwrap();
    let mut third = resumed(&images[1]);
    tell(&mut third, "checkfill:20m:1m:9", "checkfill=right");
    tell(&mut third, "checkfill:21m:1m:8", "checkfill=right");
    tell(&mut third, "checkfill:8m:4m:7", "checkfill=right");
    tell(&mut third, "count:1", "count=2");
}

#[test]
fn firecrackers_two_files_hold_a_machine_and_memory_is_raw() {
    let folder = folder();
    let (state, memory) = (folder.path().join("state"), folder.path().join("memory"));
    let first = booted("fill:8m:1m:7 poke:0x1000000:77 count:5");
    let files = json!({"snapshot_path": state, "mem_file_path": memory});
    let reason = refusal(&first, "PUT", "/snapshot/create", &files);
    assert!(reason.contains("pause it first"), "{reason}");
    first.demand("PATCH", "/vm", &json!({"state": "Paused"}));
    first.demand("PUT", "/snapshot/create", &files);
    drop(first);

    let raw = std::fs::read(&memory).unwrap();
    assert_eq!(raw.len() as u64, MIB << 20);
    assert_eq!(raw[0x100_0000], 77);
    let backend = json!({"backend_type": "File", "backend_path": memory});
    let mut second = load(&json!({"snapshot_path": state, "mem_backend": backend}));
    assert_eq!(about(&second)["state"], "Paused");
    second.demand("PATCH", "/vm", &json!({"state": "Resumed"}));
    tell(&mut second, "count:1", "count=6");
    tell(&mut second, "poke:0x1000000:78", "poke=done");
    // The file is the snapshot, and stays what it was.
    assert_eq!(std::fs::read(&memory).unwrap()[0x100_0000], 77);
}

#[test]
fn a_host_that_cannot_carry_the_machine_refuses_it_by_the_name_of_what_it_lacks() {
    let folder = folder();
    let (state, memory) = (folder.path().join("state"), folder.path().join("memory"));
    let first = booted("count:1");
    first.demand("PATCH", "/vm", &json!({"state": "Paused"}));
    first.demand(
        "PUT",
        "/snapshot/create",
        &json!({"snapshot_path": state, "mem_file_path": memory}),
    );
    let mut saved = MachineState::decode(&std::fs::read(&state).unwrap()).unwrap();
    assert!(
        saved
            .compatibility
            .insert("cpuid.vendor".to_owned(), "AcmeChips".into())
            .is_some()
    );
    std::fs::write(&state, saved.encode().unwrap()).unwrap();

    let second = Monitor::start();
    let backend = json!({"backend_type": "File", "backend_path": memory});
    let files = json!({"snapshot_path": state, "mem_backend": backend});
    let reason = refusal(&second, "PUT", "/snapshot/load", &files);
    assert!(reason.contains("AcmeChips"), "{reason}");
    assert_eq!(about(&second)["state"], "Not started");
}
