//! An unmodified Debian guest that goes on from the image of another host, which serves it over a network of 20 ms:
//! before it has arrived, and with every byte of its memory and its disk.
//!
//! The guest holds random bytes in RAM and on a disk, and keeps a number in a shell's memory.

#![allow(
    clippy::unwrap_used,
    reason = "without the standard harness clippy takes this for no test"
)]

use std::fs::File;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use runnel_tests::agent::AgentFolders;
use runnel_tests::bare::wait_until;
use runnel_tests::forge;
use runnel_tests::lab::hosts::{SOURCE, TwoHosts};
use runnel_tests::lab::linux_guest::LinuxGuest;
use runnel_tests::lab::suite::Suite;
use runnel_tests::monitor::Monitor;
use runnel_tests::served::{TRICKLE, serve_at};
use serde_json::{Value, json};

const ROUND_TRIP: Duration = Duration::from_millis(20);
const PORT: u16 = 5000;

/// How long the guest was away, as its image says it.
const AWAY: Duration = Duration::from_secs(600);

/// How long it may really have been.
const REALLY_AWAY_MAX: Duration = Duration::from_secs(300);

/// Random bytes that the guest holds in RAM, and as many on its disk.
const HELD_MIB: u64 = 24;

fn main() -> ExitCode {
    Suite {
        carries: false,
        host_kernels: &["6.12-cloud"],
        memory_mib: 3072,
        deadline: Duration::from_secs(600),
        programs: &["runnel-vmm", "runnel-agent"],
        things: &["kernel/6.12-cloud", "guest/6.12-cloud"],
        tests: &[(
            "a_guest_goes_on_from_another_hosts_image_before_it_has_arrived",
            a_guest_goes_on_from_another_hosts_image_before_it_has_arrived,
        )],
    }
    .main()
}

/// What the guest says of itself.
#[derive(Debug, PartialEq, Eq)]
struct Content {
    in_memory: String,
    on_disk: String,
}

fn a_guest_goes_on_from_another_hosts_image_before_it_has_arrived() {
    let (images, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let image = images.path().join("linux");
    let hosts = TwoHosts::new(ROUND_TRIP).unwrap();

    let mut guest = booted(images.path());
    let before = content(&mut guest);
    assert_ne!(before.in_memory, before.on_disk);
    let saved_at = wall(&mut guest);
    guest.demand("PUT", "/snapshot/create", &json!({"image_path": image}));
    drop(guest);
    forge::age(&image, AWAY);

    hosts.target().hide(images.path()).unwrap();
    let served = image.clone();
    let server = hosts
        .source()
        .run(move || serve_at(&served, (SOURCE, PORT).into()));
    let agents = AgentFolders::new();
    let spawn = |command| hosts.target().spawn(command);
    let agent = agents.start_by(&TRICKLE, spawn);
    let mut guest = Monitor::spawn_at(&own.path().join("api.sock"), spawn);
    guest.wait_for_log("Listening on API socket");
    assert!(!hosts.target().run(move || image.exists()));
    let arrived_before = hosts.target().bytes_received();
    let load = json!({
        "image": format!("http://{SOURCE}:{PORT}/linux"),
        "agent_path": agents.socket(),
        "resume_vm": true,
        "clock_realtime": true,
    });
    guest.demand("PUT", "/snapshot/load", &load);

    // It runs on from where it was, and knows what time it is, before the rest is here.
    guest.converse("number=$((number + 1)); echo number=$number", "number=41");
    let arrived = hosts.target().bytes_received() - arrived_before;
    println!("its first words needed {} KiB", arrived >> 10);
    let passed = wall(&mut guest) - saved_at;
    assert!(
        passed >= AWAY && passed <= AWAY + REALLY_AWAY_MAX,
        "{passed:?} have passed for the guest"
    );
    assert_eq!(content(&mut guest), before);

    // The next agent brings the rest, which the first one was not in a hurry to; and the guest is here to stay.
    assert!(!is_resident(&guest));
    drop(agent);
    let agent = agents.start_by(&[], spawn);
    wait_until("it is resident", || is_resident(&guest));
    server.stop();
    drop(agent);
    assert_eq!(content(&mut guest), before);
    guest.converse("number=$((number + 1)); echo number=$number", "number=42");
    assert!(guest.demand("GET", "/", &Value::Null)["stalled"].is_null());
}

/// Whether all of its volumes have arrived.
fn is_resident(guest: &Monitor) -> bool {
    let progress = guest.demand("GET", "/snapshot/progress", &Value::Null);
    let volumes = progress["volumes"].as_array().unwrap();
    assert_eq!(volumes.len(), 2, "{progress}");
    let has_arrived = |volume: &Value| volume["bytes_resident"] == volume["bytes_total"];
    volumes.iter().all(has_arrived)
}

/// A guest that holds [`HELD_MIB`] in memory and as much on a disk, and has counted to 40.
fn booted(folder: &Path) -> Monitor {
    let disk = folder.join("disk");
    File::create(&disk)
        .unwrap()
        .set_len((HELD_MIB + 8) << 20)
        .unwrap();
    let mut monitor = LinuxGuest::new("6.12-cloud", "kernel,shell")
        .vcpus(2)
        .drive("data", &disk, false)
        .entropy()
        .start_with_api(folder);
    monitor.wait_for_console("shell=ready");
    let random = format!("dd if=/dev/urandom bs=1M count={HELD_MIB} 2>/dev/null");
    monitor.converse(
        &format!("number=40; {random} of=/held && {random} of=/dev/vda && sync; echo held=$?"),
        "held=0",
    );
    monitor
}

/// Reads all that the guest holds, past its cache.
fn content(guest: &mut Monitor) -> Content {
    let mut hash = |from: &str| {
        guest.type_line(&format!(
            "echo 3 >/proc/sys/vm/drop_caches; \
             echo hash=$(dd if={from} bs=1M count={HELD_MIB} 2>/dev/null | md5sum | cut -d' ' -f1)"
        ));
        let hash = guest.wait_for_console("hash=");
        assert_eq!(hash.len(), "hash=".len() + 32, "{hash}");
        hash
    };
    Content {
        in_memory: hash("/held"),
        on_disk: hash("/dev/vda"),
    }
}

/// The guest's wall clock.
fn wall(guest: &mut Monitor) -> Duration {
    guest.type_line("echo wall=$(date +%s)");
    let shown = guest.wait_for_console("wall=");
    Duration::from_secs(shown.strip_prefix("wall=").unwrap().parse().unwrap())
}
