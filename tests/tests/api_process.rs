//! `runnel-vmm` as a process: its flags, sockets, signals and exit codes.

use std::fs::OpenOptions;
use std::path::Path;
use std::process::Command;

use runnel_tests::bare::wait_until;
use runnel_tests::monitor::{Monitor, ask};
use runnel_tests::{bare_guest, program};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};

/// A machine with the bare guest, which obeys `words`.
fn boot(monitor: &Monitor, words: &str) {
    monitor.demand(
        "PUT",
        "/machine-config",
        &json!({"vcpu_count": 1, "mem_size_mib": 64}),
    );
    monitor.demand(
        "PUT",
        "/boot-source",
        &json!({"kernel_image_path": bare_guest(), "boot_args": words}),
    );
    monitor.demand("PUT", "/actions", &json!({"action_type": "InstanceStart"}));
}

fn config_file(folder: &Path, words: &str) -> String {
    let path = folder.join("config.json");
    let config = json!({
        "boot-source": {"kernel_image_path": bare_guest(), "boot_args": words},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 64},
        "drives": [],
    });
    std::fs::write(&path, config.to_string()).expect("the folder can be written");
    path.to_str().expect("its path is text").to_owned()
}

fn state(monitor: &Monitor) -> Value {
    monitor.demand("GET", "/", &Value::Null)["state"].clone()
}

#[test]
fn the_version_begins_as_firecrackers_clients_expect() {
    let output = Command::new(program("runnel-vmm"))
        .arg("--version")
        .output()
        .unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("Firecracker v1.17.0\n"), "{text}");
    assert!(text.lines().any(|line| line.starts_with("Runnel v")), "{text}");
}

#[test]
fn a_command_line_that_makes_no_sense_ends_with_153() {
    for arguments in [&["--no-such-flag"][..], &["--no-api"], &["--id", "a_b"]] {
        let output = Command::new(program("runnel-vmm"))
            .args(arguments)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(153), "{arguments:?}");
        assert!(!output.stderr.is_empty());
    }
}

#[test]
fn a_machine_boots_pauses_runs_on_and_switches_itself_off() {
    let mut monitor = Monitor::start();
    assert_eq!(state(&monitor), "Not started");
    boot(&monitor, "");
    monitor.wait_for_console("listening=1");
    assert_eq!(state(&monitor), "Running");
    monitor.demand("PATCH", "/vm", &json!({"state": "Paused"}));
    assert_eq!(state(&monitor), "Paused");
    monitor.demand("PATCH", "/vm", &json!({"state": "Resumed"}));
    monitor.type_line("count:1");
    monitor.wait_for_console("count=1");
    monitor.type_line("poweroff");
    let (status, _) = monitor.wait();
    assert_eq!(status.code(), Some(0));
    assert!(!monitor.socket().exists());
}

#[test]
fn each_end_of_the_guest_has_its_exit_code() {
    for (word, code) in [("poweroff", 0), ("reset", 0), ("triplefault", 3)] {
        let mut monitor = Monitor::start();
        boot(&monitor, word);
        let (status, log) = monitor.wait();
        assert_eq!(status.code(), Some(code), "{word}");
        assert!(log.contains(&format!("exit_code={code}")), "{log}");
        assert!(!monitor.socket().exists(), "{word}");
    }
}

#[test]
fn a_configuration_file_starts_a_machine_with_and_without_an_api() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("api.sock");
    let listening = config_file(folder.path(), "");
    let mut monitor = Monitor::start_at(&socket, &["--config-file", &listening, "--id", "by-file"]);
    monitor.wait_for_console("listening=1");
    assert_eq!(monitor.demand("GET", "/", &Value::Null)["id"], "by-file");
    assert_eq!(state(&monitor), "Running");
    drop(monitor);

    let socket = folder.path().join("none.sock");
    let over = config_file(folder.path(), "poweroff");
    let mut monitor = Monitor::start_at(&socket, &["--config-file", &over, "--no-api"]);
    assert_eq!(monitor.wait().0.code(), Some(0));
    assert!(!socket.exists());
}

#[test]
fn a_configuration_that_cannot_be_had_ends_with_152_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let text = path.to_str().unwrap();
    let kernel = bare_guest().to_str().unwrap();
    for (content, why) in [
        ("{", "Invalid JSON"),
        (r#"{"drives": []}"#, "missing field `boot-source`"),
        (
            r#"{"drives": [], "boot-source": {"kernel_image_path": "/nonexistent"}}"#,
            "The kernel file cannot be opened",
        ),
        (
            r#"{"drives": [], "boot-source": {"kernel_image_path": "/nonexistent"}}"#,
            "No such file",
        ),
        (
            &format!(
                r#"{{"drives": [], "boot-source": {{"kernel_image_path": "{kernel}"}}, "vsock": {{}}}}"#
            ),
            "\"vsock\" is not supported",
        ),
    ] {
        std::fs::write(&path, content).unwrap();
        let (status, log) = Monitor::start_at(&folder.path().join("s"), &["--config-file", text]).wait();
        assert_eq!(status.code(), Some(152), "{content}");
        assert_eq!(log.matches(why).count(), 1, "{log}");
    }
}

#[test]
fn a_start_that_fails_leaves_the_monitor_answering() {
    let mut monitor = Monitor::start();
    let folder = tempfile::tempdir().unwrap();
    let no_kernel = folder.path().join("no-kernel");
    std::fs::write(&no_kernel, vec![0; 1 << 16]).unwrap();
    monitor.demand(
        "PUT",
        "/machine-config",
        &json!({"vcpu_count": 1, "mem_size_mib": 64}),
    );
    monitor.demand("PUT", "/boot-source", &json!({"kernel_image_path": no_kernel}));
    let (status, answer) = monitor.ask("PUT", "/actions", &json!({"action_type": "InstanceStart"}));
    assert_eq!(status, 400);
    let text = answer["fault_message"].as_str().unwrap();
    assert!(text.starts_with("Start microvm error: "), "{text}");
    assert_eq!(state(&monitor), "Not started");
    boot(&monitor, "");
    monitor.wait_for_console("listening=1");
}

#[test]
fn a_signal_ends_the_monitor_in_order_whatever_its_machine_does() {
    for signal in ["TERM", "INT", "HUP"] {
        for is_booted in [false, true] {
            let mut monitor = Monitor::start();
            if is_booted {
                boot(&monitor, "spin");
            }
            monitor.signal(signal);
            let (status, _) = monitor.wait();
            assert_eq!(status.code(), Some(0), "{signal}");
            assert!(!monitor.socket().exists(), "{signal}");
        }
    }
}

#[test]
fn a_console_that_nobody_reads_holds_up_neither_a_pause_nor_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("console");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    // Both ends, and nobody reads.
    let ends = OpenOptions::new().read(true).write(true).open(&pipe).unwrap();
    let mut shell = Command::new("sh");
    shell
        .args(["-c", r#"console=$0; exec "$@" >"$console""#])
        .arg(&pipe);
    let mut monitor = Monitor::start_by(shell, &folder.path().join("api.sock"));
    monitor.wait_for_log("Listening on API socket");

    boot(&monitor, "count:0");
    let takes_more = || {
        let mut entries = [PollFd::new(&ends, PollFlags::OUT)];
        poll(&mut entries, Some(&Timespec::default())).unwrap() > 0
    };
    wait_until("the pipe is full", || !takes_more());
    monitor.demand("PATCH", "/vm", &json!({"state": "Paused"}));
    monitor.demand("PATCH", "/vm", &json!({"state": "Resumed"}));
    monitor.signal("TERM");
    assert_eq!(monitor.wait().0.code(), Some(0));
}

#[test]
fn a_console_may_end_in_a_file_or_in_a_pipe_that_need_not_be_read() {
    let folder = tempfile::tempdir().unwrap();
    let (file, pipe) = (folder.path().join("file"), folder.path().join("pipe"));
    std::fs::write(&file, "what was there\n").unwrap();
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    for (place, words) in [(&file, "poweroff"), (&pipe, "count:20000 poweroff")] {
        let mut monitor = Monitor::start();
        monitor.demand("PUT", "/serial", &json!({"serial_out_path": place}));
        boot(&monitor, words);
        assert_eq!(monitor.wait().0.code(), Some(0), "{place:?}");
    }
    let printed = std::fs::read_to_string(&file).unwrap();
    assert!(printed.starts_with("what was there\nguest=bare "), "{printed}");
}

#[test]
fn a_monitor_that_was_killed_does_not_block_the_next_one() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("api.sock");
    for _ in 0..3 {
        let mut monitor = Monitor::start_at(&socket, &[]);
        monitor.wait_for_log("Listening on API socket");
        assert_eq!(ask(&socket, "GET", "/version", &Value::Null).0, 200);
        monitor.signal("KILL");
        assert_eq!(monitor.wait().0.code(), None);
        assert!(socket.exists());
    }
}

#[test]
fn a_monitor_on_a_lifeline_ends_with_it_unless_it_has_a_machine() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("api.sock");
    let mut waits = Monitor::start_at(&socket, &["--lifeline"]);
    waits.wait_for_log("Listening on API socket");
    waits.hang_up();
    let (status, log) = waits.wait();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(!socket.exists() && log.contains("no machine yet"), "{log}");

    let mut runs = Monitor::start_at(&socket, &["--lifeline"]);
    runs.wait_for_log("Listening on API socket");
    boot(&runs, "count:1");
    runs.hang_up();
    runs.wait_for_log("goes on without whoever started it");
    assert_eq!(state(&runs), "Running");
    runs.wait_for_console("listening=1");

    // Whoever gives no such flag may close it as he likes.
    let mut without = Monitor::start();
    without.hang_up();
    boot(&without, "count:1");
    without.wait_for_console("listening=1");
}

#[test]
fn a_second_monitor_at_one_socket_is_refused_and_the_first_goes_on() {
    let first = Monitor::start();
    let (status, log) = Monitor::start_at(first.socket(), &[]).wait();
    assert_eq!(status.code(), Some(1));
    assert!(log.contains("Check that it is not already used"), "{log}");
    assert_eq!(state(&first), "Not started");
}
