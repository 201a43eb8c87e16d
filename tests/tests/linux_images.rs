//! An unmodified Debian guest that goes on from its image under another host kernel, and back: what the monitor's
//! programs make of it, through the API.
//!
//! The image is carried from one nested host to the next. The guest keeps a number in a shell's memory, and a disk that
//! it wrote: either must be what it was when the machine was saved.

#![allow(
    clippy::unwrap_used,
    reason = "without the standard harness clippy takes this for no test"
)]

use std::fs::{self, File};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use runnel_tests::lab;
use runnel_tests::lab::linux_guest::LinuxGuest;
use runnel_tests::lab::suite::Suite;
use runnel_tests::monitor::Monitor;
use serde_json::{Value, json};

fn main() -> ExitCode {
    Suite {
        carries: true,
        host_kernels: &["6.1-cloud", "6.12-cloud", "6.1-cloud"],
        memory_mib: 3072,
        deadline: Duration::from_secs(600),
        programs: &["runnel-vmm"],
        things: &["kernel/6.12-cloud", "guest/6.12-cloud"],
        tests: &[(
            "a_guest_goes_on_from_its_image_under_whichever_kernel_the_host_has",
            a_guest_goes_on_from_its_image_under_whichever_kernel_the_host_has,
        )],
    }
    .main()
}

fn a_guest_goes_on_from_its_image_under_whichever_kernel_the_host_has() {
    let folder = tempfile::tempdir().unwrap();
    let here = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let out = lab::leave().unwrap_or(folder.path().join("out"));
    fs::create_dir_all(&out).unwrap();
    match lab::carried().filter(|carried| carried.join("image").exists()) {
        None => {
            let mut guest = booted(folder.path());
            guest.converse("number=40", "exit=0");
            save(&guest, &out, 40);
            println!("saved under {}", here.trim());
        }
        Some(carried) => {
            let number = saved_number(&carried);
            let guest = go_on(&carried, folder.path(), number + 1);
            save(&guest, &out, number + 1);
            println!("went on under {}, and saved again", here.trim());
        }
    }
    // The host that saved it may go on with it, too; the second time that is a machine whose pages came from an image.
    let number = saved_number(&out);
    go_on(&out, folder.path(), number + 1);
}

/// A guest that has written a disk, and obeys what is typed.
fn booted(folder: &Path) -> Monitor {
    let disk = folder.join("disk");
    File::create(&disk).unwrap().set_len(8 << 20).unwrap();
    let mut monitor = LinuxGuest::new("6.12-cloud", "kernel,write:vda:runnel,shell")
        .vcpus(2)
        .drive("data", &disk, false)
        .entropy()
        .start_with_api(folder);
    assert_eq!(monitor.wait_for_console("kernel.cpus="), "kernel.cpus=2");
    assert_eq!(monitor.wait_for_console("write.vda="), "write.vda=ok");
    monitor.wait_for_console("shell=ready");
    monitor
}

/// Loads the image in `from`, lets the guest add one to its number, which then is `number`, and reads its disk past its
/// cache.
fn go_on(from: &Path, folder: &Path, number: u32) -> Monitor {
    let mut monitor = Monitor::start_at(&folder.join(format!("{number}.sock")), &[]);
    monitor.wait_for_log("Listening on API socket");
    let load = json!({"image": from.join("image"), "resume_vm": true});
    monitor.demand("PUT", "/snapshot/load", &load);
    monitor.converse(
        "number=$((number + 1)); echo number=$number",
        &format!("number={number}"),
    );
    let of_pattern = "p=$(yes runnel | head -c 1048576 | md5sum | cut -d' ' -f1)";
    let of_disk = "d=$(dd if=/dev/vda bs=64k skip=16 count=16 2>/dev/null | md5sum | cut -d' ' -f1)";
    let compare = "[ $p = $d ] && echo disk=same || echo disk=differs";
    monitor.converse(
        &format!("echo 3 >/proc/sys/vm/drop_caches; {of_pattern}; {of_disk}; {compare}"),
        "disk=same",
    );
    assert!(monitor.demand("GET", "/", &Value::Null)["stalled"].is_null());
    monitor
}

/// Saves the guest as an image in `folder`, and beside it what its number is.
fn save(monitor: &Monitor, folder: &Path, number: u32) {
    let create = json!({"image_path": folder.join("image")});
    monitor.demand("PUT", "/snapshot/create", &create);
    fs::write(folder.join("number"), number.to_string()).unwrap();
}

fn saved_number(folder: &Path) -> u32 {
    fs::read_to_string(folder.join("number"))
        .unwrap()
        .parse()
        .unwrap()
}
