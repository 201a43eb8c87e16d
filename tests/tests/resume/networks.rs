//! Interfaces of a resumed machine: another tap on another host, and what the guest was told of its own.

use std::path::Path;
use std::process::Command;

use runnel_tests::bare::{configure, refusal, save, start, tell};
use runnel_tests::lab::skip;
use runnel_tests::monitor::Monitor;
use serde_json::{Value, json};

/// What the guest reads at offset 8 of the configuration space of its first device, an interface whose MTU is 9000.
const NINE_THOUSAND: (&str, &str) = ("peek:0xc0001108", "peek=0x23280000");

/// A monitor in a network namespace of its own, which goes with it; `None` if this user may have none.
fn in_a_namespace(socket: &Path) -> Option<Monitor> {
    let unshare = || {
        let mut command = Command::new("unshare");
        command.arg("--net");
        command
    };
    let may = unshare().args(["test", "-c", "/dev/net/tun"]).status();
    if !may.is_ok_and(|status| status.success()) {
        skip("no network namespace or no taps for this user");
        return None;
    }
    let mut monitor = Monitor::start_by(unshare(), socket);
    monitor.wait_for_log("Listening on API socket");
    Some(monitor)
}

/// Another monitor in the namespace of `other`.
fn beside(other: &Monitor, socket: &Path) -> Monitor {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/proc/{}/ns/net", other.pid()));
    let mut monitor = Monitor::start_by(command, socket);
    monitor.wait_for_log("Listening on API socket");
    monitor
}

/// Whether the monitor's namespace has an interface `name`.
fn has_interface(monitor: &Monitor, name: &str) -> bool {
    let table = std::fs::read_to_string(format!("/proc/{}/net/dev", monitor.pid())).unwrap();
    table
        .lines()
        .any(|line| line.trim_start().starts_with(&format!("{name}:")))
}

#[test]
fn a_machine_is_loaded_onto_another_tap_and_its_guest_keeps_what_it_was_told() {
    let folder = tempfile::tempdir().unwrap();
    let socket = |name: &str| folder.path().join(name);
    let Some(mut first) = in_a_namespace(&socket("first.sock")) else {
        return;
    };
    configure(&first, 1, "count:1");
    let interface = json!({"iface_id": "eth0", "host_dev_name": "runnel0", "mtu": 9000});
    first.demand("PUT", "/network-interfaces/eth0", &interface);
    start(&mut first);
    assert!(has_interface(&first, "runnel0"));
    tell(&mut first, NINE_THOUSAND.0, NINE_THOUSAND.1);
    let image = folder.path().join("image");
    save(&first, &image);

    let request = |iface: &str| {
        json!({
            "image": image,
            "resume_vm": true,
            "network_overrides": [{"iface_id": iface, "host_dev_name": "other1"}],
        })
    };
    let mut second = in_a_namespace(&socket("second.sock")).unwrap();
    let reason = refusal(&second, "PUT", "/snapshot/load", &request("eth7"));
    assert!(
        reason.contains("eth7") && reason.contains("has the interface eth0"),
        "{reason}"
    );
    assert!(!has_interface(&second, "other1"), "a refusal leaves nothing");

    second.demand("PUT", "/snapshot/load", &request("eth0"));
    // In the first one's namespace, where its tap is.
    let third = beside(&first, &socket("third.sock"));
    let mut as_it_was = request("eth0");
    as_it_was.as_object_mut().unwrap().remove("network_overrides");
    let reason = refusal(&third, "PUT", "/snapshot/load", &as_it_was);
    assert!(
        reason.contains("in use") && reason.contains("with `network_overrides`"),
        "{reason}"
    );
    assert!(has_interface(&second, "other1") && !has_interface(&second, "runnel0"));
    let config = second.demand("GET", "/vm/config", &Value::Null);
    assert_eq!(config["network-interfaces"][0]["host_dev_name"], "other1");
    assert_eq!(config["network-interfaces"][0]["mtu"], 9000);
    tell(&mut second, "count:1", "count=2");
    tell(&mut second, NINE_THOUSAND.0, NINE_THOUSAND.1);
}
