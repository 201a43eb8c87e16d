//! An unmodified Debian guest at work that is saved again and again, and forked: it must not notice, and neither must
//! any of its clones.
//!
//! The guest compares what it reads, from memory and from a disk past its cache, with what it wrote
//! (`resources/lab/guest/work.c`), and says so if that is not the same.

#![allow(
    clippy::unwrap_used,
    reason = "without the standard harness clippy takes this for no test"
)]

use std::fs::{self, File};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use runnel_tests::agent::AgentFolders;
use runnel_tests::forge::{open, verified};
use runnel_tests::lab::linux_guest::LinuxGuest;
use runnel_tests::lab::suite::Suite;
use runnel_tests::monitor::Monitor;
use serde_json::json;

const DIFFS: usize = 20;
const CLONES: usize = 8;

/// What the guest counts rounds of.
const JOBS: [&str; 2] = ["disk", "memory"];

fn main() -> ExitCode {
    Suite {
        carries: false,
        host_kernels: &["6.12-cloud"],
        memory_mib: 3072,
        deadline: Duration::from_secs(900),
        programs: &["runnel-vmm", "runnel-agent"],
        things: &["kernel/6.12-cloud", "guest/6.12-cloud"],
        tests: &[(
            "a_linux_at_work_is_diffed_twenty_times_and_forked_eight_ways",
            a_linux_at_work_is_diffed_twenty_times_and_forked_eight_ways,
        )],
    }
    .main()
}

fn a_linux_at_work_is_diffed_twenty_times_and_forked_eight_ways() {
    let folder = tempfile::tempdir().unwrap();
    let path = |number: usize| folder.path().join(format!("image-{number}"));
    let mut guest = at_work(folder.path());
    guest.demand("PUT", "/snapshot/create", &json!({"image_path": path(0)}));
    let whole = last_layers(&path(0));
    let mut diffs = Vec::new();
    for number in 1..=DIFFS {
        let create = json!({"image_path": path(number), "snapshot_type": "Diff"});
        guest.demand("PUT", "/snapshot/create", &create);
        diffs.push(last_layers(&path(number)));
        fs::remove_dir_all(path(number - 1)).unwrap();
    }
    println!("stored bytes of memory: {whole} at first, then {diffs:?}");
    assert!(
        diffs.iter().all(|diff| *diff < whole),
        "a diff is as large as everything"
    );
    goes_on(&mut guest, "the guest that was saved");
    drop(guest);

    let image = path(DIFFS);
    verified(&image);
    let agents = AgentFolders::new();
    let _agent = agents.start(&[]);
    let load = json!({"image": image, "agent_path": agents.socket(), "resume_vm": false});
    let clones: Vec<Monitor> = (0..CLONES)
        .map(|_| {
            let clone = Monitor::start();
            clone.demand("PUT", "/snapshot/load", &load);
            clone
        })
        .collect();
    for (number, mut clone) in clones.into_iter().enumerate() {
        clone.demand("PATCH", "/vm", &json!({"state": "Resumed"}));
        goes_on(&mut clone, &format!("clone {number}"));
    }
}

/// A guest that works.
fn at_work(folder: &Path) -> Monitor {
    let disk = folder.join("disk");
    File::create(&disk).unwrap().set_len(8 << 20).unwrap();
    let mut guest = LinuxGuest::new("6.12-cloud", "kernel,shell")
        .memory_mib(128)
        .drive("data", &disk, false)
        .track_dirty_pages()
        .start_with_api(folder);
    guest.wait_for_console("shell=ready");
    guest.type_line("work disk:/dev/vda memory:4 &");
    goes_on(&mut guest, "the guest");
    guest
}

/// Waits until each of the guest's jobs has gone two rounds; none may have found anything wrong.
fn goes_on(guest: &mut Monitor, which: &str) {
    const LINES_MAX: usize = 4000;
    let first = counters(&guest.wait_for_console("work="));
    for _ in 0..LINES_MAX {
        let now = counters(&guest.wait_for_console("work="));
        if first.iter().zip(&now).all(|(first, now)| *now >= first + 2) {
            assert_eq!(
                guest.console_lines_with("error="),
                Vec::<String>::new(),
                "{which}"
            );
            return;
        }
    }
    panic!("{which} does not go on");
}

/// How many rounds each job has gone.
fn counters(line: &str) -> [u64; JOBS.len()] {
    JOBS.map(|job| {
        let mut words = line.split_whitespace();
        let count = words.find_map(|word| word.strip_prefix(job)?.strip_prefix('=')?.parse().ok());
        count.unwrap_or_else(|| panic!("no {job} in {line}"))
    })
}

/// Bytes of the last layer of memory.
fn last_layers(image: &Path) -> u64 {
    let image = open(image);
    image.manifest.volumes[0].layers.last().unwrap().bytes
}
