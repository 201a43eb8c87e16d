//! The API over its socket, with a machine behind it that needs no KVM.

mod document;
mod monitor;
mod schema;

use std::io::Read;
use std::sync::mpsc;

use serde_json::{Value, json};

use self::monitor::{Client, Monitor};
use super::BODY_BYTES_MAX;
use crate::control::fake::FakeEngine;

fn fault(answer: (u16, Value)) -> String {
    assert_eq!(answer.0, 400, "{answer:?}");
    answer.1["fault_message"].as_str().unwrap().to_owned()
}

#[test]
fn the_machine_is_configured_started_paused_and_described() {
    let monitor = Monitor::start(FakeEngine::default());
    let mut client = monitor.connect();
    assert_eq!(client.ask("GET", "/", &Value::Null).1["state"], "Not started");
    let machine = json!({"vcpu_count": 2, "mem_size_mib": 256});
    assert_eq!(client.ask("PUT", "/machine-config", &machine), (204, Value::Null));
    assert_eq!(
        client.ask("PATCH", "/machine-config", &json!({"smt": true})).0,
        204
    );
    let expected = json!({
        "vcpu_count": 2, "mem_size_mib": 256, "smt": true, "track_dirty_pages": false, "huge_pages": "None"
    });
    assert_eq!(
        client.ask("GET", "/machine-config", &Value::Null),
        (200, expected.clone())
    );
    let drive = json!({
        "drive_id": "rootfs", "is_root_device": true, "is_read_only": true, "path_on_host": "/proc/self/exe"
    });
    assert_eq!(client.ask("PUT", "/drives/rootfs", &drive).0, 204);
    let interface = json!({"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:00:00:00:01"});
    assert_eq!(client.ask("PUT", "/network-interfaces/eth0", &interface).0, 204);
    assert_eq!(client.ask("PUT", "/entropy", &json!({})).0, 204);
    assert_eq!(client.ask("PUT", "/guest-channel", &json!({})).0, 204);
    assert_eq!(
        client
            .ask("PUT", "/serial", &json!({"serial_out_path": "/tmp/out"}))
            .0,
        204
    );
    assert_eq!(client.ask("PUT", "/logger", &json!({"level": "Debug"})).0, 204);

    let monitor = monitor.started();
    let about = client.ask("GET", "/", &Value::Null).1;
    assert_eq!(
        (&about["state"], &about["guest_agent"]),
        (&json!("Running"), &json!(true))
    );
    assert_eq!(client.ask("PATCH", "/vm", &json!({"state": "Paused"})).0, 204);
    assert_eq!(client.ask("GET", "/", &Value::Null).1["state"], "Paused");
    assert_eq!(client.ask("PATCH", "/vm", &json!({"state": "Resumed"})).0, 204);
    assert_eq!(
        client
            .ask("PUT", "/actions", &json!({"action_type": "FlushMetrics"}))
            .0,
        204
    );
    let (status, whole) = client.ask("GET", "/vm/config", &Value::Null);
    assert_eq!(status, 200);
    assert_eq!(whole["machine-config"], expected);
    assert_eq!(whole["drives"][0]["drive_id"], "rootfs");
    assert_eq!(whole["guest-channel"], json!({}));
    assert_eq!(whole["network-interfaces"][0]["guest_mac"], "06:00:00:00:00:01");
    assert_eq!(whole["boot-source"]["kernel_image_path"], "/proc/self/exe");
    drop(monitor);
}

#[test]
fn versions_and_headers_are_what_firecrackers_clients_look_for() {
    let monitor = Monitor::start(FakeEngine::default());
    let mut client = monitor.connect();
    client.send("GET /version HTTP/1.1\r\nHost: x\r\n\r\n");
    let (status, head, version) = client.receive();
    assert_eq!(status, 200);
    assert_eq!(version["firecracker_version"], "1.17.0");
    assert_eq!(version["runnel_version"], env!("CARGO_PKG_VERSION"));
    let head = head.to_ascii_lowercase();
    assert!(head.contains("server: firecracker api\r\n"), "{head}");
    assert!(head.contains("content-type: application/json\r\n"), "{head}");
}

#[test]
fn malformed_bodies_are_refused_and_change_nothing() {
    let monitor = Monitor::start(FakeEngine::default());
    let mut client = monitor.connect();
    let before = client.ask("GET", "/vm/config", &Value::Null);
    for (verb, path, body) in [
        ("PUT", "/machine-config", json!({"vcpu_count": 1})),
        (
            "PUT",
            "/machine-config",
            json!({"vcpu_count": "1", "mem_size_mib": 128}),
        ),
        (
            "PUT",
            "/machine-config",
            json!({"vcpu_count": 256, "mem_size_mib": 128}),
        ),
        (
            "PUT",
            "/machine-config",
            json!({"vcpu_count": 1, "mem_size_mib": 128, "cores": 1}),
        ),
        (
            "PUT",
            "/machine-config",
            json!({"vcpu_count": 1, "mem_size_mib": 128, "huge_pages": "1G"}),
        ),
        ("PATCH", "/machine-config", json!({"cores": 1})),
        ("PUT", "/boot-source", json!({"boot_args": "quiet"})),
        ("PUT", "/boot-source", json!({"kernel_image_path": 1})),
        ("PUT", "/drives/a", json!({"drive_id": "a"})),
        (
            "PUT",
            "/drives/a",
            json!({"drive_id": "a", "is_root_device": false, "speed": 1}),
        ),
        ("PUT", "/network-interfaces/a", json!({"iface_id": "a"})),
        (
            "PUT",
            "/network-interfaces/a",
            json!({"iface_id": "a", "host_dev_name": "t", "guest_mac": "1"}),
        ),
        ("PUT", "/entropy", json!({"seed": 1})),
        ("PUT", "/guest-channel", json!({"path": "x"})),
        (
            "PUT",
            "/snapshot/create",
            json!({"image_path": "i", "guest_hook": {"deadline_ms": 1, "timeout": 1}}),
        ),
        (
            "PUT",
            "/snapshot/create",
            json!({"image_path": "i", "guest_hook": {"otherwise": "wait"}}),
        ),
        ("PUT", "/serial", json!({"path": "x"})),
        ("PUT", "/logger", json!({"file": "x"})),
        ("PUT", "/actions", json!({"action_type": "Explode"})),
        (
            "PUT",
            "/actions",
            json!({"action_type": "InstanceStart", "payload": "x"}),
        ),
        ("PATCH", "/vm", json!({"state": "Running"})),
        (
            "PUT",
            "/snapshot/create",
            json!({"snapshot_path": "s", "mem_file_path": "m", "version": "1.0"}),
        ),
        ("PUT", "/snapshot/create", json!({"snapshot_path": "s"})),
        ("PUT", "/snapshot/load", json!({"snapshot_path": "s"})),
        (
            "PUT",
            "/snapshot/load",
            json!({"snapshot_path": "s", "mem_backend": {"backend_type": "File"}}),
        ),
    ] {
        let text = fault(client.ask(verb, path, &body));
        assert!(
            text.starts_with("An error occurred when deserializing the json body of a request: "),
            "{verb} {path} {body}: {text}"
        );
    }
    // What the parser has nothing against is not called its error.
    for (path, body, reason) in [
        (
            "/snapshot/create",
            json!({"snapshot_path": "s", "mem_file_path": "s", "snapshot_type": "Diff"}),
            "`snapshot_path` and `mem_file_path` name one file, s: give each its own",
        ),
        (
            "/snapshot/load",
            json!({"image": "http://10.0.0.1:5000/web"}),
            "`image` \"http://10.0.0.1:5000/web\" is not on this host: give `agent_path`",
        ),
    ] {
        let text = fault(client.ask("PUT", path, &body));
        assert!(text.starts_with(reason), "{path} {body}: {text}");
    }
    client.send("PUT /vm HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n{\"a");
    assert_eq!(client.receive().0, 400);
    assert_eq!(client.ask("GET", "/vm/config", &Value::Null), before);
}

#[test]
fn values_that_make_no_sense_are_refused_with_firecrackers_prefixes() {
    let monitor = Monitor::start(FakeEngine::default());
    let mut client = monitor.connect();
    for (path, body, prefix) in [
        (
            "/machine-config",
            json!({"vcpu_count": 0, "mem_size_mib": 128}),
            "Machine config error: ",
        ),
        (
            "/machine-config",
            json!({"vcpu_count": 1, "mem_size_mib": 128, "huge_pages": "2M"}),
            "Machine config error: huge_pages",
        ),
        (
            "/boot-source",
            json!({"kernel_image_path": "/none"}),
            "Boot source error: The kernel file cannot be opened",
        ),
        (
            "/drives/a",
            json!({"drive_id": "a", "is_root_device": false}),
            "Drive config error: ",
        ),
        (
            "/drives/a",
            json!({"drive_id": "a", "is_root_device": false, "path_on_host": "/"}),
            "Drive config error: Unable to create the virtio block device: \"/\" is a directory",
        ),
        (
            "/network-interfaces/a",
            json!({"iface_id": "a", "host_dev_name": "/"}),
            "Network config error: ",
        ),
        (
            "/entropy",
            json!({"rate_limiter": {"ops": {"size": 1, "refill_time": 1}}}),
            "Entropy config error: ",
        ),
        (
            "/drives/a",
            json!({"drive_id": "b", "is_root_device": false}),
            "The id from the path does not match",
        ),
        (
            "/network-interfaces/a",
            json!({"iface_id": "b", "host_dev_name": "t"}),
            "The id from the path [a] does not",
        ),
    ] {
        let text = fault(client.ask("PUT", path, &body));
        assert!(text.starts_with(prefix), "{path} {body}: {text}");
    }
}

#[test]
fn what_comes_too_early_or_too_late_is_refused() {
    let monitor = Monitor::start(FakeEngine::default());
    let two_files = json!({"snapshot_path": "s", "mem_file_path": "m"});
    for (verb, path, body) in [
        ("PATCH", "/vm", json!({"state": "Paused"})),
        ("PUT", "/actions", json!({"action_type": "SendCtrlAltDel"})),
        ("PUT", "/snapshot/create", two_files.clone()),
    ] {
        assert!(fault(monitor.ask(verb, path, &body)).ends_with("before starting the microVM."));
    }
    let start = json!({"action_type": "InstanceStart"});
    assert!(fault(monitor.ask("PUT", "/actions", &start)).contains("without kernel configuration"));
    let monitor = monitor.started();
    for (path, body) in [
        ("/boot-source", json!({"kernel_image_path": "/proc/self/exe"})),
        ("/machine-config", json!({"vcpu_count": 1, "mem_size_mib": 128})),
        ("/snapshot/load", two_files),
        ("/actions", start),
    ] {
        assert!(fault(monitor.ask("PUT", path, &body)).ends_with("after starting the microVM."));
    }
}

#[test]
fn wrong_methods_and_paths_are_refused_and_the_connection_goes_on() {
    let monitor = Monitor::start(FakeEngine::default());
    let mut client = monitor.connect();
    assert_eq!(
        fault(client.ask("GET", "/foo", &Value::Null)),
        "Invalid request method and/or path: GET foo."
    );
    assert_eq!(
        fault(client.ask("PUT", "/vsock", &json!({}))),
        "PUT vsock is not supported by this version of Runnel."
    );
    assert_eq!(
        fault(client.ask("PUT", "/vm", &Value::Null)),
        "Empty PUT request."
    );
    assert_eq!(
        fault(client.ask("PATCH", "/machine-config", &json!({}))),
        "Empty PATCH request."
    );
    assert_eq!(
        fault(client.ask("GET", "/", &json!({}))),
        "GET request cannot have a body."
    );
    assert_eq!(client.ask("GET", "/", &Value::Null).0, 200);
}

#[test]
fn a_method_that_is_not_of_this_api_is_refused_as_firecrackers_http_layer_does() {
    let monitor = Monitor::start(FakeEngine::default());
    for verb in ["POST", "OPTIONS", "BREW"] {
        let (status, body) = monitor.ask(verb, "/", &Value::Null);
        assert_eq!(status, 400);
        assert_eq!(body["error"], "Invalid HTTP Method: Unsupported HTTP method.");
        assert_eq!(body["fault_message"], body["error"]);
    }
}

#[test]
fn a_body_of_one_byte_too_many_is_refused_announced_or_not() {
    let monitor = Monitor::start(FakeEngine::default());
    let body = |bytes: usize| {
        let frame = r#"{"kernel_image_path": ""}"#.len();
        format!(r#"{{"kernel_image_path": "{}"}}"#, "x".repeat(bytes - frame))
    };
    let put = |head: &str, body: &str| {
        let mut client = monitor.connect();
        client.send(&format!(
            "PUT /boot-source HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n{body}"
        ));
        let (status, _, answer) = client.receive();
        (status, answer["fault_message"].as_str().unwrap().to_owned())
    };
    let fits = body(BODY_BYTES_MAX);
    assert_eq!(fits.len(), BODY_BYTES_MAX);
    let (status, text) = put(&format!("Content-Length: {}", fits.len()), &fits);
    assert!(status == 400 && text.starts_with("Boot source error"), "{text}");

    let (status, text) = put(&format!("Content-Length: {}", BODY_BYTES_MAX + 1), "");
    assert!(
        status == 400 && text.contains("size 51201 is larger than the limit of 51200"),
        "{text}"
    );

    let large = body(BODY_BYTES_MAX + 1);
    let (status, text) = put(
        "Transfer-Encoding: chunked",
        &format!("{:x}\r\n{large}\r\n0\r\n\r\n", large.len()),
    );
    assert!(
        status == 400 && text.contains("is larger than the limit of 51200"),
        "{text}"
    );
}

#[test]
fn deprecated_fields_are_answered_with_a_header() {
    let monitor = Monitor::start(FakeEngine::default());
    let mut client = monitor.connect();
    let body = json!({"snapshot_path": "s", "mem_file_path": "m"}).to_string();
    client.send(&format!(
        "PUT /snapshot/load HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    ));
    let (status, head, _) = client.receive();
    assert_eq!(status, 204);
    assert!(head.to_ascii_lowercase().contains("deprecation: true"), "{head}");
}

#[test]
fn progress_and_cancel_are_answered_while_a_snapshot_keeps_the_control_thread_busy() {
    let (begun, has_begun) = mpsc::channel();
    let monitor = Monitor::start(FakeEngine {
        endless_save: Some(begun),
        ..FakeEngine::default()
    })
    .started();
    let mut client = monitor.connect();
    let nothing = client.ask("GET", "/snapshot/progress", &Value::Null);
    assert_eq!(nothing.1["operation"], Value::Null);
    assert!(fault(client.ask("DELETE", "/snapshot/create", &Value::Null)).contains("no such operation"));

    let saver = {
        let mut client = monitor.connect();
        std::thread::spawn(move || client.ask("PUT", "/snapshot/create", &json!({"image_path": "i"})))
    };
    has_begun.recv().unwrap();
    let (status, progress) = client.ask("GET", "/snapshot/progress", &Value::Null);
    assert_eq!(status, 200);
    assert_eq!(progress["operation"]["kind"], "create");
    assert_eq!(progress["operation"]["state"], "running");
    assert_eq!(progress["operation"]["phase"], "copying");
    assert_eq!(progress["operation"]["bytes_done"], 40);
    assert_eq!(progress["operation"]["bytes_total"], 100);
    assert_eq!(client.ask("GET", "/", &Value::Null).1["state"], "Running");
    assert!(fault(client.ask("DELETE", "/snapshot/load", &Value::Null)).contains("no such operation"));

    assert_eq!(client.ask("DELETE", "/snapshot/create", &Value::Null).0, 204);
    assert_eq!(fault(saver.join().unwrap()), "Create snapshot error: cancelled");
    let progress = client.ask("GET", "/snapshot/progress", &Value::Null).1;
    assert_eq!(progress["operation"]["state"], "cancelled");
    assert_eq!(
        progress["operation"]["fault_message"],
        "Create snapshot error: cancelled"
    );
}

#[test]
fn requests_on_one_connection_are_answered_in_order() {
    let monitor = Monitor::start(FakeEngine::default());
    let mut client = monitor.connect();
    client.send("GET /version HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_eq!(client.receive().2["firecracker_version"], "1.17.0");
    assert_eq!(client.receive().2["id"], "test");
}

#[test]
fn what_is_no_http_is_refused_and_others_are_served_on() {
    let monitor = Monitor::start(FakeEngine::default());
    let mut noise = monitor.connect();
    noise.send("\u{1}\u{2}\u{3} what?\r\n\r\n");
    let mut answer = String::new();
    noise.stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer:?}");
    assert_eq!(monitor.ask("GET", "/", &Value::Null).0, 200);
}

#[test]
fn one_connection_too_many_is_told_so_and_the_others_are_served_on() {
    let monitor = Monitor::start(FakeEngine::default());
    let mut clients: Vec<Client> = (0..32).map(|_| monitor.connect()).collect();
    for client in &mut clients {
        assert_eq!(client.ask("GET", "/", &Value::Null).0, 200);
    }
    let mut answer = String::new();
    monitor.connect().stream.read_to_string(&mut answer).unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 503 ") && answer.contains("Too many open connections"),
        "{answer}"
    );
    for client in &mut clients {
        assert_eq!(client.ask("GET", "/", &Value::Null).0, 200);
    }
}
