//! Unmodified Debian guests that take part in snapshots, with the agent of `resources/guest-agent` in them.
//!
//! That a file system was frozen when its machine was saved is seen in the image: ext4 clears the mark that says that its
//! journal must be played back, once everything is where it belongs and nobody may write.

#![allow(
    clippy::unwrap_used,
    reason = "without the standard harness clippy takes this for no test"
)]

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use runnel_snapshot::volume::VolumeName;
use runnel_tests::bare::{about, wait_until};
use runnel_tests::forge;
use runnel_tests::golden::bytes_of;
use runnel_tests::lab::linux_guest::LinuxGuest;
use runnel_tests::lab::suite::Suite;
use runnel_tests::monitor::Monitor;
use serde_json::{Value, json};

const AGENT: &str = include_str!("../../resources/guest-agent/runnel-guest-agent");

/// What the guest runs: the agent from its memory, since the disk that it lies on is frozen. It must not thaw that by
/// itself while a test looks.
const START: &str = "#!/bin/sh\n\
    cp -r /mnt/agent /mnt/hooks /tmp\n\
    RUNNEL_HOOKS=/tmp/hooks RUNNEL_FREEZE=/mnt RUNNEL_THAW_AFTER=3000 exec /tmp/agent 2>/tmp/agent.log\n";

/// Notes that it was run; and, before a snapshot, leaves something in the journal that belongs elsewhere.
const HOOK: &str = "#!/bin/sh\n\
    echo \"$1\" >>/tmp/log\n\
    [ \"$1\" != restored ] || echo \"$RUNNEL_GENERATION\" >/tmp/generation\n\
    [ \"$1\" != pre-snapshot ] || { date >/mnt/written; sync; }\n";

fn main() -> ExitCode {
    Suite {
        carries: false,
        host_kernels: &["6.12-cloud"],
        memory_mib: 3072,
        deadline: Duration::from_secs(900),
        programs: &["runnel-vmm"],
        things: &[
            "kernel/6.1-cloud",
            "kernel/6.12-cloud",
            "guest/6.1-cloud",
            "guest/6.12-cloud",
        ],
        tests: &[
            (
                "linux_6_12_is_frozen_in_its_image_and_goes_on_here_and_there",
                || is_frozen_in_its_image_and_goes_on_here_and_there("6.12-cloud"),
            ),
            (
                "linux_6_1_is_frozen_in_its_image_and_goes_on_here_and_there",
                || is_frozen_in_its_image_and_goes_on_here_and_there("6.1-cloud"),
            ),
        ],
    }
    .main()
}

fn is_frozen_in_its_image_and_goes_on_here_and_there(kernel: &str) {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    make_disk(folder.path(), &disk);
    let mut machine = LinuxGuest::new(kernel, "kernel,run:vda:start,shell")
        .drive("data", &disk, false)
        .entropy()
        .guest_channel()
        .start_with_api(folder.path());
    machine.wait_for_console("shell=ready");
    wait_until("the agent announces itself", || {
        about(&machine)["guest_agent"] == true
    });
    // Linux finds the port, and its interrupts arrive.
    machine.converse(
        "echo input=$(sed -n 's/^ *[0-9]*: *[1-9].*IO-APIC *\\([0-9]*\\)-edge.*ttyS1.*/\\1/p' /proc/interrupts)",
        "input=3",
    );

    let unasked = folder.path().join("unasked");
    machine.type_line("date >/mnt/written; sync; echo synced=1");
    machine.wait_for_console("synced=1");
    save(&machine, &unasked, &json!({"deadline_ms": 0}));
    assert!(needs_recovery(&unasked), "nobody was asked to freeze anything");

    let image = folder.path().join("image");
    save(
        &machine,
        &image,
        &json!({"deadline_ms": 60_000, "otherwise": "fail"}),
    );
    assert!(!needs_recovery(&image), "the file system was frozen");
    goes_on(&mut machine, &["pre-snapshot", "post-snapshot"]);

    let mut clone = Monitor::start_at(&folder.path().join("clone.sock"), &[]);
    clone.wait_for_log("Listening on API socket");
    clone.demand(
        "PUT",
        "/snapshot/load",
        &json!({"image": image, "resume_vm": true}),
    );
    goes_on(&mut clone, &["pre-snapshot", "post-snapshot", "restored"]);
    clone.converse("echo digits=$(($(wc -c </tmp/generation) - 1))", "digits=32");
    // It was restored, and can be asked.
    let again = folder.path().join("again");
    save(
        &clone,
        &again,
        &json!({"deadline_ms": 60_000, "otherwise": "fail"}),
    );
    assert!(!needs_recovery(&again));
    goes_on(
        &mut clone,
        &[
            "pre-snapshot",
            "post-snapshot",
            "restored",
            "pre-snapshot",
            "post-snapshot",
        ],
    );
}

/// A disk with the agent, what it runs, and what starts it.
fn make_disk(folder: &Path, disk: &Path) {
    let content = folder.join("content");
    fs::create_dir_all(content.join("hooks")).unwrap();
    for (name, text) in [("agent", AGENT), ("start", START), ("hooks/10-note", HOOK)] {
        let path = content.join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    }
    File::create(disk).unwrap().set_len(32 << 20).unwrap();
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-d"])
        .arg(&content)
        .arg(disk)
        .status();
    assert!(made.unwrap().success());
}

fn save(machine: &Monitor, image: &Path, hook: &Value) {
    let create = json!({"image_path": image, "guest_hook": hook});
    machine.demand("PUT", "/snapshot/create", &create);
}

/// Whether the journal of the file system in an image is to be played back.
fn needs_recovery(image: &Path) -> bool {
    /// Of ext4's superblock (Documentation/filesystems/ext4/super.rst).
    const SUPERBLOCK: usize = 1024;
    const MAGIC: usize = SUPERBLOCK + 0x38;
    const INCOMPATIBLE: usize = SUPERBLOCK + 0x60;
    const RECOVER: u8 = 4;
    let drive = bytes_of(&forge::open(image), &VolumeName::Drive("data".to_owned()));
    assert_eq!(drive[MAGIC..MAGIC + 2], [0x53, 0xef]);
    drive[INCOMPATIBLE] & RECOVER != 0
}

/// Holds what the hooks have noted against `words`, and writes to what was frozen.
fn goes_on(machine: &mut Monitor, words: &[&str]) {
    let lines = words.len();
    machine.converse(
        &format!(
            "while [ $(wc -l </tmp/log) -lt {lines} ]; do sleep 0.1; done; echo notes=$(tr '\\n' ' ' </tmp/log)"
        ),
        &format!("notes={}", words.join(" ")),
    );
    machine.converse("touch /mnt/after && sync && echo thawed=$?", "thawed=0");
}
