//! Things that no machine can be made of: refused when the machine is to start, with the reason, and the monitor goes
//! on as if nothing had been asked. What a request alone can get wrong is tested with the API, in `vmm`.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use runnel_tests::bare::{about, booted, configure, refusal, start, tell, wait_until};
use runnel_tests::lab::say;
use runnel_tests::monitor::{Monitor, ask};
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
        say(&format!(
            "skipped: no machine can be larger than this host's {all} MiB"
        ));
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

/// The paths of the API, and some that it does not have.
const PATHS: [&str; 18] = [
    "/",
    "/version",
    "/machine-config",
    "/boot-source",
    "/drives/rootfs",
    "/drives/",
    "/network-interfaces/eth0",
    "/entropy",
    "/serial",
    "/logger",
    "/actions",
    "/vm",
    "/vm/config",
    "/snapshot/create",
    "/snapshot/load",
    "/snapshot/progress",
    "/no/such/path",
    "/../etc/passwd",
];

/// Bodies that no request has: of the wrong type, with fields of nobody's, or with values that nothing takes.
fn wrong_bodies() -> Vec<Value> {
    let mut deep = json!({});
    for _ in 0..100 {
        deep = json!({"state": deep});
    }
    vec![
        json!([]),
        json!(7),
        json!("Paused"),
        json!({"no_such_field": true}),
        json!({"state": "Flying"}),
        json!({"action_type": "Fly", "state": 3}),
        json!({"mem_size_mib": -1, "vcpu_count": "two"}),
        json!({"drive_id": "x".repeat(10_000)}),
        json!({"image": 7, "snapshot_path": []}),
        deep,
    ]
}

/// Bytes that are no request of HTTP, or only part of one.
const NO_REQUESTS: [&str; 6] = [
    "\r\n\r\n",
    "GET / HTTP/9.9\r\n\r\n",
    "\u{0}\u{1}\u{2}\u{3} rubbish",
    "PUT /vm HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
    "PUT /vm HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n{}",
    "PUT /vm HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n{}",
];

fn send_what_is_no_request(socket: &Path) {
    for bytes in NO_REQUESTS {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.write_all(bytes.as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        // A reset connection is an answer, too.
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer);
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 4"),
            "{bytes:?}: {answer}"
        );
    }
}

#[test]
fn a_barrage_of_bad_requests_leaves_a_running_guest_and_its_monitor_as_they_were() {
    let mut machine = booted("fill:8m:256k:7 count:3");
    let seen = |machine: &Monitor| {
        ["/", "/vm/config", "/machine-config"].map(|path| machine.demand("GET", path, &Value::Null))
    };
    let descriptors = |machine: &Monitor| {
        let folder = format!("/proc/{}/fd", machine.pid());
        fs::read_dir(folder).unwrap().count()
    };
    let (before, open_before) = (seen(&machine), descriptors(&machine));
    let socket = machine.socket().to_owned();
    thread::scope(|scope| {
        for verb in ["GET", "PUT", "PATCH", "DELETE"] {
            let socket = &socket;
            scope.spawn(move || {
                for path in PATHS {
                    for body in wrong_bodies() {
                        let (status, answer) = ask(socket, verb, path, &body);
                        assert!(
                            (400..500).contains(&status),
                            "{verb} {path} {body}: {status} {answer}"
                        );
                        let fault = answer["fault_message"].as_str().or(answer["error"].as_str());
                        assert!(
                            !fault.unwrap_or_default().is_empty(),
                            "{verb} {path} {body}: {answer}"
                        );
                    }
                }
            });
        }
        scope.spawn(|| send_what_is_no_request(&socket));
    });
    assert_eq!(seen(&machine), before);
    wait_until("its connections are closed", || {
        descriptors(&machine) == open_before
    });
    tell(&mut machine, "checkfill:8m:256k:7 count:1", "checkfill=right");
    machine.wait_for_console("count=4");
}
