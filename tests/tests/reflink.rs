//! A writable drive on a file system with reflinks: put aside at the pause, read when the machine runs again.
//!
//! The file system is XFS on a loop device, in a mount namespace that ends with the test. Where that cannot be had (no
//! root, no `mkfs.xfs`, a kernel without XFS or loop devices) the test says so and is skipped; with `RUNNEL_LAB=full`
//! that is a failure.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use runnel_tests::bare::{configure, load, save, start, tell};
use runnel_tests::lab;
use runnel_tests::monitor::{Monitor, Question};
use serde_json::json;

const TEST: &str = "a_machine_does_not_stand_for_a_drive_that_can_be_reflinked";
/// Where the file system is, for the process that runs in the namespace.
const MOUNTED: &str = "RUNNEL_TEST_REFLINKS";
/// mkfs.xfs makes none that is smaller than 300 MiB; the file is sparse.
const XFS_BYTES: u64 = 512 << 20;
const DISK_BYTES: u64 = 32 << 20;

#[test]
fn a_machine_does_not_stand_for_a_drive_that_can_be_reflinked() {
    match env::var_os(MOUNTED) {
        Some(mounted) => saves_a_drive_at(&PathBuf::from(mounted)),
        None => runs_where_reflinks_are(),
    }
}

/// Runs this test once more, in a mount namespace with an XFS.
fn runs_where_reflinks_are() {
    let folder = tempfile::tempdir().unwrap();
    let (device, mounted) = (folder.path().join("xfs"), folder.path().join("mounted"));
    File::create(&device).unwrap().set_len(XFS_BYTES).unwrap();
    fs::create_dir(&mounted).unwrap();
    let in_namespace = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-ec", script, "sh"]);
        command.args([&device, &mounted]);
        command
    };
    let tried = in_namespace("mkfs.xfs -q -f \"$1\"; mount -o loop \"$1\" \"$2\"").output();
    let reason = match &tried {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Some(format!("unshare: {error}")),
    };
    if let Some(reason) = reason {
        let reason = format!("{TEST} needs root, xfsprogs, and a kernel with XFS and loop devices: {reason}");
        lab::skip(&reason);
        return;
    }
    let status = in_namespace("mount -o loop \"$1\" \"$2\"; exec \"$3\" --exact \"$4\" --nocapture")
        .arg(env::current_exe().unwrap())
        .arg(TEST)
        .env(MOUNTED, &mounted)
        .status()
        .unwrap();
    assert!(status.success(), "in the namespace: {status}");
}

fn saves_a_drive_at(mounted: &Path) {
    let disk = mounted.join("disk");
    File::create(&disk).unwrap().set_len(DISK_BYTES).unwrap();
    let mut machine = Monitor::start();
    configure(&machine, 1, "count:1");
    machine.demand(
        "PUT",
        "/drives/disk",
        &json!({"drive_id": "disk", "path_on_host": disk, "is_root_device": false, "is_read_only": false}),
    );
    start(&mut machine);
    tell(&mut machine, "diskfill:0:2m:5", "diskfill=right");

    let first = mounted.join("first");
    let saving = Question::put(
        machine.socket(),
        "PUT",
        "/snapshot/create",
        &json!({"image_path": first}),
    );
    let aside = machine.wait_for_log("A file behind a drive");
    assert!(aside.contains("needs_pause=false"), "{aside}");
    machine.wait_for_log("The machine runs on");
    tell(&mut machine, "diskfill:0:2m:9", "diskfill=right");
    assert_eq!(saving.answer().0, 204);
    // What was written afterwards is in the next one, and not in the first.
    let second = mounted.join("second");
    save(&machine, &second);
    drop(machine);
    fs::remove_file(&disk).unwrap();

    for (image, answer) in [(&first, "checkdisk:0:2m:5"), (&second, "checkdisk:0:2m:9")] {
        let mut again = load(&json!({"image": image, "resume_vm": true}));
        tell(&mut again, answer, "checkdisk=right");
    }
}
