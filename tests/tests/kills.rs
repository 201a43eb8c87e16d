//! Monitors that are ended and killed in every phase of saving and of resuming: nothing of theirs is in the way of the
//! next one at the same paths, with the same tap and over the same agent.
//!
//! The signal is sent as soon as the log says that a phase has begun. Some phases take less than a signal does: where
//! the signals arrived is printed.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use runnel_snapshot::image::Image;
use runnel_snapshot::image::reference::Wanted;
use runnel_tests::agent::AgentFolders;
use runnel_tests::bare::{configure, save, start, tell};
use runnel_tests::monitor::{Monitor, Question};
use runnel_tests::served::serve;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Kills in each phase, of each kind.
const KILLS: usize = 10;

const SIGNALS: [(&str, Signal); 2] = [("TERM", Signal::TERM), ("KILL", Signal::KILL)];

/// Where every monitor of a test has its socket and its image.
struct Ground {
    folder: TempDir,
    image: PathBuf,
}

impl Ground {
    /// With an image of a machine that has something of everything: vCPUs, a drive, and a tap if the host has any.
    fn new(tap: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("bare");
        let drive = folder.path().join("drive");
        fs::write(&drive, vec![7; 4 << 20]).unwrap();
        let mut machine = Monitor::start();
        configure(&machine, 16, "fill:8m:4m:7 count:3");
        machine.demand(
            "PUT",
            "/drives/data",
            &json!({"drive_id": "data", "path_on_host": drive, "is_root_device": false, "is_read_only": false}),
        );
        if rustix::process::geteuid().is_root() && Path::new("/dev/net/tun").exists() {
            let interface = json!({"iface_id": "eth0", "host_dev_name": tap});
            machine.demand("PUT", "/network-interfaces/eth0", &interface);
        }
        start(&mut machine);
        save(&machine, &image);
        Self { folder, image }
    }

    fn monitor(&self) -> Monitor {
        let mut monitor = Monitor::start_at(&self.folder.path().join("api.sock"), &[]);
        monitor.wait_for_log("Listening on API socket");
        monitor
    }

    fn local(&self) -> Value {
        json!({"image": self.image, "resume_vm": true})
    }

    /// Checks the end of a monitor that was sent a signal; gives its log.
    fn ended(&self, monitor: &mut Monitor, signal: Signal) -> String {
        let (status, log) = monitor.wait();
        if signal == Signal::TERM {
            assert_eq!(status.code(), Some(0), "{log}");
            assert!(!monitor.socket().exists());
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains(self.folder.path().to_str().unwrap()), "{mounts}");
        log
    }

    /// What an ended monitor must not leave.
    fn partials(&self) -> Vec<String> {
        fs::read_dir(self.folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.contains(".partial-"))
            .collect()
    }
}

fn pid(monitor: &Monitor) -> Pid {
    Pid::from_raw(monitor.pid().try_into().unwrap()).unwrap()
}

/// Signals the monitor as soon as its log says that `operation` has come to `phase`.
fn signal_in_phase(monitor: &Monitor, operation: &str, phase: &str, signal: Signal) {
    let pid = pid(monitor);
    monitor.when_logged(&format!("{operation} of a snapshot: {phase}"), move || {
        // It is a child that nobody has waited for yet.
        kill_process(pid, signal).unwrap();
    });
}

/// The phase of `operation` that a log ends in.
fn last_phase(log: &str, operation: &str) -> Option<String> {
    let said = format!("{operation} of a snapshot: ");
    let line = log.lines().rfind(|line| line.contains(&said))?;
    Some(line.split_once(&said)?.1.trim().to_owned())
}

/// Aims every signal at every phase. `attempt` does so once, and says which phase the signal arrived in.
fn hit_all(phases: &[&str], mut attempt: impl FnMut(&str, Signal) -> Option<String>) {
    let mut hits: BTreeMap<(String, &str), usize> = BTreeMap::new();
    for (name, signal) in SIGNALS {
        for phase in phases {
            for _ in 0..KILLS {
                let hit = attempt(phase, signal).expect("every attempt comes as far as some phase");
                *hits.entry((hit, name)).or_default() += 1;
            }
            eprintln!("SIG{name} as {phase} began: {KILLS} times");
        }
    }
    for ((phase, signal), count) in &hits {
        eprintln!("SIG{signal} arrived while {phase}: {count} times");
    }
}

#[test]
fn a_monitor_that_ends_in_any_phase_of_a_snapshot_leaves_no_half_image_and_nothing_in_the_way() {
    let ground = Ground::new("rnlkill0");
    let target = ground.folder.path().join("target");
    let create = json!({"image_path": target});
    hit_all(
        &["pausing", "saving state", "copying", "publishing"],
        |phase, signal| {
            let mut monitor = ground.monitor();
            monitor.demand("PUT", "/snapshot/load", &ground.local());
            signal_in_phase(&monitor, "Create", phase, signal);
            let _unanswered = Question::put(monitor.socket(), "PUT", "/snapshot/create", &create);
            let log = ground.ended(&mut monitor, signal);
            if signal == Signal::TERM {
                assert_eq!(ground.partials(), [""; 0]);
            }
            if target.exists() {
                // Then all of it.
                Image::open_directory(&target, &Wanted::Only).unwrap();
                fs::remove_dir_all(&target).unwrap();
            }
            last_phase(&log, "Create")
        },
    );
    let mut monitor = ground.monitor();
    monitor.demand("PUT", "/snapshot/load", &ground.local());
    save(&monitor, &target);
    assert_eq!(ground.partials(), [""; 0], "the next snapshot sweeps");
    tell(&mut monitor, "checkfill:8m:256k:7", "checkfill=right");
}

#[test]
fn a_monitor_that_ends_in_any_phase_of_a_load_leaves_nothing_in_the_way() {
    let ground = Ground::new("rnlkill1");
    hit_all(&["opening", "restoring"], |phase, signal| {
        let mut monitor = ground.monitor();
        signal_in_phase(&monitor, "Load", phase, signal);
        let _unanswered = Question::put(monitor.socket(), "PUT", "/snapshot/load", &ground.local());
        let log = ground.ended(&mut monitor, signal);
        last_phase(&log, "Load")
    });
    let mut monitor = ground.monitor();
    monitor.demand("PUT", "/snapshot/load", &ground.local());
    tell(&mut monitor, "checkfill:8m:256k:7", "checkfill=right");
}

#[test]
fn a_monitor_that_ends_while_its_pages_come_leaves_nothing_in_the_way_of_the_next_one() {
    let ground = Ground::new("rnlkill2");
    let server = serve(&ground.image);
    let agents = AgentFolders::new();
    // So slow that the fill is never over, and so are the first faults: each round finds pages that nobody has.
    let _agent = agents.start(&["--fill-rate", "64"]);
    let image = format!("http://{}/bare", server.address());
    let request = json!({"image": image, "agent_path": agents.socket(), "resume_vm": true});
    let mut round = 0;
    hit_all(&["first faults", "fill"], |phase, signal| {
        let mut monitor = ground.monitor();
        monitor.demand("PUT", "/snapshot/load", &request);
        let at = (8 << 20) + round * (64 << 10);
        round += 1;
        monitor.type_line(&format!("checkfill:{at}:4096:7"));
        if phase == "fill" {
            assert_eq!(monitor.wait_for_console("checkfill="), "checkfill=right");
        }
        let progress = monitor.demand("GET", "/snapshot/progress", &Value::Null);
        let memory = &progress["volumes"][0];
        let is_filling = memory["bytes_resident"].as_u64().unwrap() < memory["bytes_total"].as_u64().unwrap();
        kill_process(pid(&monitor), signal).unwrap();
        ground.ended(&mut monitor, signal);
        is_filling.then(|| phase.to_owned())
    });
    let mut monitor = ground.monitor();
    monitor.demand("PUT", "/snapshot/load", &request);
    tell(&mut monitor, "checkfill:8m:1m:7", "checkfill=right");
}
