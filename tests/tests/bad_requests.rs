//! Things that no machine can be made of: refused when the machine is to start, with the reason, and the monitor goes
//! on as if nothing had been asked. What a request alone can get wrong is tested with the API, in `vmm`.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::fs;
use std::path::Path;

use runnel_tests::bare::{about, configure, refusal, start, tell};
use runnel_tests::monitor::Monitor;
use serde_json::{Value, json};

fn drive(path: &Path, is_read_only: bool) -> Value {
    json!({"drive_id": "data", "path_on_host": path, "is_root_device": false, "is_read_only": is_read_only})
}

fn put_drive(monitor: &Monitor, path: &Path, is_read_only: bool) {
    monitor.demand("PUT", "/drives/data", &drive(path, is_read_only));
}

/// Why the machine does not start.
fn refused_start(monitor: &Monitor) -> String {
    let reason = refusal(
        monitor,
        "PUT",
        "/actions",
        &json!({"action_type": "InstanceStart"}),
    );
    assert_eq!(about(monitor)["state"], "Not started", "{reason}");
    reason
}

#[test]
fn memory_beyond_the_host_is_refused_and_less_starts() {
    let mut monitor = Monitor::start();
    configure(&monitor, 1, "");
    let config = monitor.demand("GET", "/machine-config", &Value::Null);
    let all: u64 = fs::read_to_string("/proc/meminfo")
        .unwrap()
        .lines()
        .filter(|line| line.starts_with("MemTotal:") || line.starts_with("SwapTotal:"))
        .map(|line| line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024)
        .sum();
    let beyond = all + 1024;
    if beyond > 64 << 10 {
        eprintln!("skipped: no machine can be larger than this host's {all} MiB");
        return;
    }
    monitor.demand("PATCH", "/machine-config", &json!({"mem_size_mib": beyond}));
    let reason = refused_start(&monitor);
    assert!(reason.contains("more than this host's"), "{reason}");
    monitor.demand("PUT", "/machine-config", &config);
    start(&mut monitor);
}

#[test]
fn kernels_that_are_none_are_refused_and_a_real_one_starts() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("kernel");
    let elf = fs::read(runnel_tests::bare_guest()).unwrap();
    let mut elsewhere = elf.clone();
    // The first program header's physical address (ELF64: the table is at byte 64, p_paddr 24 bytes into an entry).
    let table = usize::try_from(u64::from_le_bytes(elf[32..40].try_into().unwrap())).unwrap();
    elsewhere[table + 24..table + 32].copy_from_slice(&(1_u64 << 40).to_le_bytes());
    let mut monitor = Monitor::start();
    for content in [
        Vec::new(),
        b"#!/bin/sh\n".to_vec(),
        vec![0; 1 << 20],
        elf[..100].to_vec(),
        elf[..elf.len() / 2].to_vec(),
        elsewhere,
    ] {
        fs::write(&kernel, &content).unwrap();
        configure(&monitor, 1, "");
        monitor.demand("PUT", "/boot-source", &json!({"kernel_image_path": kernel}));
        let reason = refused_start(&monitor);
        assert!(reason.starts_with("Start microvm error: "), "{reason}");
    }
    configure(&monitor, 1, "");
    start(&mut monitor);
}

#[test]
fn drives_that_are_none_are_refused_by_path() {
    let folder = tempfile::tempdir().unwrap();
    let monitor = Monitor::start();
    configure(&monitor, 1, "");
    let empty = folder.path().join("empty");
    fs::write(&empty, b"").unwrap();
    let missing = folder.path().join("missing");
    for path in [folder.path(), Path::new("/dev/null"), &empty, &missing] {
        // Some are refused at once; what can only be known by opening them, when the machine is to start.
        let (status, answer) = monitor.ask("PUT", "/drives/data", &drive(path, false));
        let reason = match status {
            400 => answer["fault_message"].as_str().unwrap().to_owned(),
            _ => refused_start(&monitor),
        };
        assert!(reason.contains(path.to_str().unwrap()), "{reason}");
        assert_eq!(about(&monitor)["state"], "Not started");
    }
}

#[test]
fn a_drive_that_another_machine_writes_is_refused_until_that_machine_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("drive");
    fs::write(&path, vec![0; 1 << 20]).unwrap();
    let mut first = Monitor::start();
    configure(&first, 1, "");
    put_drive(&first, &path, false);
    start(&mut first);
    for is_read_only in [false, true] {
        let second = Monitor::start();
        configure(&second, 1, "");
        put_drive(&second, &path, is_read_only);
        let reason = refused_start(&second);
        assert!(
            reason.contains("locked by another machine") && reason.contains(path.to_str().unwrap()),
            "{reason}"
        );
    }
    tell(&mut first, "count:1", "count=1");
    // However it goes.
    first.signal("KILL");
    let _ = first.wait();
    let mut second = Monitor::start();
    configure(&second, 1, "");
    put_drive(&second, &path, false);
    start(&mut second);
}

#[test]
fn readers_share_a_drive_and_keep_writers_off() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("drive");
    fs::write(&path, vec![0; 1 << 20]).unwrap();
    let _readers = [(); 2].map(|()| {
        let mut reader = Monitor::start();
        configure(&reader, 1, "");
        put_drive(&reader, &path, true);
        start(&mut reader);
        reader
    });
    let writer = Monitor::start();
    configure(&writer, 1, "");
    put_drive(&writer, &path, false);
    assert!(refused_start(&writer).contains("locked by another machine"));
}
