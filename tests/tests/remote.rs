//! A machine resumed from afar: `serve`, an agent, and a monitor that has neither image nor network.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use runnel_agent::agent::{Agent, AgentSettings};
use runnel_agent::serve::{CONNECTIONS_MAX, ImageServer, Repositories, ServeSettings};
use runnel_tests::bare_guest;
use runnel_tests::monitor::Monitor;
use serde_json::{Value, json};
use tempfile::TempDir;

/// An image of a machine with 4 MiB of pattern at 8 MiB and a counter at 3; serve and agent over it.
struct Rig {
    server: Option<ImageServer>,
    address: SocketAddr,
    agent: Option<Agent>,
    folder: TempDir,
}

impl Rig {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        save_machine(&folder.path().join("images/bare"));
        let server = serve(&folder.path().join("images/bare"), ([127, 0, 0, 1], 0).into());
        let mut rig = Self {
            address: server.address(),
            server: Some(server),
            agent: None,
            folder,
        };
        rig.start_agent();
        rig
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("agent.sock")
    }

    fn start_agent(&mut self) {
        let settings = AgentSettings::new(
            self.socket(),
            PathBuf::from("/dev/shm").join(self.folder.path().file_name().unwrap()),
            self.folder.path().join("drives"),
        );
        self.agent = Some(Agent::start(settings).unwrap());
    }

    fn load(&self, more: &Value) -> Monitor {
        let image = format!("http://{}/bare", self.address);
        let mut request = json!({"image": image, "agent_path": self.socket(), "resume_vm": true});
        request
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let monitor = Monitor::start();
        monitor.demand("PUT", "/snapshot/load", &request);
        monitor
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.agent.take();
        let shared = PathBuf::from("/dev/shm").join(self.folder.path().file_name().unwrap());
        let _ = std::fs::remove_dir_all(shared);
    }
}

fn save_machine(image: &Path) {
    std::fs::create_dir_all(image.parent().unwrap()).unwrap();
    let mut monitor = Monitor::start();
    monitor.demand(
        "PUT",
        "/machine-config",
        &json!({"vcpu_count": 1, "mem_size_mib": 64}),
    );
    let words = "fill:8m:4m:7 count:3";
    monitor.demand(
        "PUT",
        "/boot-source",
        &json!({"kernel_image_path": bare_guest(), "boot_args": words}),
    );
    monitor.demand("PUT", "/actions", &json!({"action_type": "InstanceStart"}));
    monitor.wait_for_console("listening=1");
    monitor.demand("PUT", "/snapshot/create", &json!({"image_path": image}));
}

fn serve(image: &Path, listen: SocketAddr) -> ImageServer {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let mut repositories = Repositories::default();
        repositories.add(image).unwrap();
        let settings = ServeSettings {
            listen,
            repositories,
            token: None,
            tls: None,
            insecure: false,
            connections_max: CONNECTIONS_MAX,
        };
        match ImageServer::start(settings) {
            Ok(server) => return server,
            // Connections of the server before may still hold the port.
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn tell(monitor: &mut Monitor, words: &str, answer: &str) {
    monitor.type_line(words);
    let name = answer.split('=').next().unwrap();
    assert_eq!(monitor.wait_for_console(&format!("{name}=")), answer, "{words}");
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn two_machines_run_from_one_served_image_and_each_byte_crosses_once() {
    let rig = Rig::new();
    let mut machines = [rig.load(&json!({})), rig.load(&json!({}))];
    for machine in &mut machines {
        tell(machine, "count:1", "count=4");
        tell(machine, "checkfill:8m:4m:7", "checkfill=right");
        tell(machine, "fill:8m:4m:9", "fill=done");
        tell(machine, "checkfill:8m:4m:9", "checkfill=right");
    }
    let stored: u64 = walk(&rig.folder.path().join("images/bare/blobs/sha256"));
    let sent = rig.server.as_ref().unwrap().traffic().bytes_sent();
    assert!(
        sent < stored + stored / 2,
        "{sent} bytes were sent of an image of {stored}"
    );
}

fn walk(blobs: &Path) -> u64 {
    std::fs::read_dir(blobs)
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().len())
        .sum()
}

#[test]
fn a_server_that_goes_away_stalls_the_machine_which_goes_on_when_it_is_back() {
    let mut rig = Rig::new();
    // Stopped before the fill has everything: the first word asks for a page that is not here.
    let monitor = Monitor::start();
    let image = format!("http://{}/bare", rig.address);
    let request =
        json!({"image": image, "agent_path": rig.socket(), "resume_vm": false, "stall_after_ms": 200});
    monitor.demand("PUT", "/snapshot/load", &request);
    rig.server.take().unwrap().stop();
    let mut monitor = monitor;
    monitor.demand("PATCH", "/vm", &json!({"state": "Resumed"}));
    monitor.type_line("checkfill:8m:4m:7");

    let mut about = Value::Null;
    wait_until("the machine is stalled", || {
        about = monitor.demand("GET", "/", &Value::Null);
        !about["stalled"].is_null()
    });
    assert_eq!(about["stalled"]["volume"], "memory", "{about}");
    let (status, fault) = monitor.ask("PATCH", "/vm", &json!({"state": "Paused"}));
    assert_eq!(status, 400);
    assert!(
        fault["fault_message"].as_str().unwrap().contains("stalled"),
        "{fault}"
    );

    rig.server = Some(serve(&rig.folder.path().join("images/bare"), rig.address));
    assert_eq!(monitor.wait_for_console("checkfill="), "checkfill=right");
    wait_until("the machine is not stalled", || {
        monitor.demand("GET", "/", &Value::Null)["stalled"].is_null()
    });
}

#[test]
fn a_new_agent_is_asked_again_and_nothing_is_lost() {
    let mut rig = Rig::new();
    let image = format!("http://{}/bare", rig.address);
    let mut monitor = Monitor::start();
    let request = json!({"image": image, "agent_path": rig.socket(), "resume_vm": false});
    monitor.demand("PUT", "/snapshot/load", &request);
    rig.agent.take().unwrap().stop();
    monitor.demand("PATCH", "/vm", &json!({"state": "Resumed"}));
    monitor.type_line("checkfill:8m:4m:7");
    rig.start_agent();
    assert_eq!(monitor.wait_for_console("checkfill="), "checkfill=right");
    tell(&mut monitor, "count:1", "count=4");
}
