//! Monitors that are ended and killed in every phase of saving and of resuming: nothing of theirs is in the way of the
//! next one at the same paths, with the same tap and over the same agent.
//!
//! The signal is sent as soon as the log says that a phase has begun. Some phases take less than a signal does, so each
//! is aimed at twice: as it runs, wherever that hits, and held at its beginning until the signal is there. The counts are
//! of the phases that the signals arrived in.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use runnel_tests::agent::AgentFolders;
use runnel_tests::bare::{begin_rounds, configure, save, start, tell, wait_until, wait_until_stalled};
use runnel_tests::forge::verified;
use runnel_tests::lab::{say, skip};
use runnel_tests::monitor::{Monitor, Question};
use runnel_tests::served::serve;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Kills in each phase, of each kind.
const KILLS: usize = 10;

const SIGNALS: [(&str, Signal); 2] = [("TERM", Signal::TERM), ("KILL", Signal::KILL)];

/// What makes a monitor wait at the beginning of a phase until it is told to end.
const HOLD: &str = "RUNNEL_HOLD_PHASE";

/// Where every monitor of a test has its socket and its image.
struct Ground {
    folder: TempDir,
    image: PathBuf,
    tap: &'static str,
}

impl Ground {
    /// With an image of a machine that has something of everything: vCPUs, a drive, and a tap if the host has any.
    fn new(tap: &'static str) -> Self {
        Self::with_pattern(tap, "4m")
    }

    /// With so much of pattern 7 at 8 MiB.
    fn with_pattern(tap: &'static str, length: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("bare");
        let drive = folder.path().join("drive");
        fs::write(&drive, vec![7; 4 << 20]).unwrap();
        let mut machine = Monitor::start();
        configure(&machine, 16, &format!("fill:8m:{length}:7 count:3"));
        machine.demand(
            "PUT",
            "/drives/data",
            &json!({"drive_id": "data", "path_on_host": drive, "is_root_device": false, "is_read_only": false}),
        );
        if rustix::process::geteuid().is_root() && Path::new("/dev/net/tun").exists() {
            let interface = json!({"iface_id": "eth0", "host_dev_name": tap});
            machine.demand("PUT", "/network-interfaces/eth0", &interface);
        } else {
            skip("only root can make a tap: nothing is known of what becomes of it");
        }
        start(&mut machine);
        save(&machine, &image);
        Self { folder, image, tap }
    }

    fn monitor(&self) -> Monitor {
        self.monitor_held_in("")
    }

    fn monitor_held_in(&self, phase: &str) -> Monitor {
        let socket = self.folder.path().join("api.sock");
        let mut monitor = Monitor::spawn_at(&socket, |mut command| command.env(HOLD, phase).spawn());
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
        let folder = self.folder.path().to_str().unwrap();
        assert!(!mounts.contains(folder), "{mounts}");
        assert_eq!(processes_about(&format!("{folder}/api.sock")), [0; 0]);
        let tap = Path::new("/sys/class/net").join(self.tap);
        wait_until("the tap is gone", || !tap.exists());
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

/// Processes whose command lines name `path`.
fn processes_about(path: &str) -> Vec<i32> {
    let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let pid = entry.unwrap().file_name().to_str()?.parse().ok()?;
        // It may end meanwhile.
        let words = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        String::from_utf8_lossy(&words).contains(path).then_some(pid)
    });
    pids.collect()
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

/// The phase of `operation` that a signal arrived in: the last one before the monitor says that it has it, or, of a
/// monitor that says nothing any more, the last one.
fn phase_hit(log: &str, operation: &str) -> Option<String> {
    let said = format!("{operation} of a snapshot: ");
    let before = log.split("Received signal").next()?;
    let line = before.lines().rfind(|line| line.contains(&said))?;
    Some(line.split_once(&said)?.1.trim().to_owned())
}

/// How often a signal arrived in a phase.
#[derive(Default)]
struct Hits(BTreeMap<(String, &'static str), usize>);

impl Hits {
    /// Aims every signal at every phase [`KILLS`] times. `attempt` does so once, and says where the signal arrived.
    fn aim(&mut self, phases: &[&str], mut attempt: impl FnMut(&str, Signal) -> Option<String>) {
        for (name, signal) in SIGNALS {
            for phase in phases {
                for _ in 0..KILLS {
                    let hit = attempt(phase, signal).expect("every attempt comes as far as some phase");
                    *self.0.entry((hit, name)).or_default() += 1;
                }
            }
        }
    }

    /// Prints them, and holds them against what there must be.
    fn suffice(&self, phases: &[&str]) {
        for ((phase, signal), count) in &self.0 {
            say(&format!("SIG{signal} arrived while {phase}: {count} times"));
        }
        for phase in phases {
            for (signal, _) in SIGNALS {
                let count = self.0.get(&((*phase).to_owned(), signal)).copied().unwrap_or(0);
                assert!(
                    count >= KILLS,
                    "SIG{signal} arrived while {phase} only {count} times"
                );
            }
        }
    }
}

#[test]
fn a_monitor_that_ends_in_any_phase_of_a_snapshot_leaves_no_half_image_and_nothing_in_the_way() {
    let ground = Ground::new("rnlkill0");
    let target = ground.folder.path().join("target");
    let create = json!({"image_path": target});
    let images = Cell::new(0);
    let attempt = |held: &str, phase: &str, signal: Signal| {
        let mut monitor = ground.monitor_held_in(held);
        monitor.demand("PUT", "/snapshot/load", &ground.local());
        // It writes all the while.
        begin_rounds(&mut monitor, "churn:16m:4m");
        signal_in_phase(&monitor, "Create", phase, signal);
        let _unanswered = Question::put(monitor.socket(), "PUT", "/snapshot/create", &create);
        let log = ground.ended(&mut monitor, signal);
        if signal == Signal::TERM {
            assert_eq!(ground.partials(), [""; 0]);
        }
        if target.exists() {
            // Then all of it.
            verified(&target);
            images.set(images.get() + 1);
            fs::remove_dir_all(&target).unwrap();
        }
        phase_hit(&log, "Create")
    };
    let phases = ["arming", "pausing", "saving state", "copying", "publishing"];
    let mut hits = Hits::default();
    hits.aim(&phases, |phase, signal| attempt("", phase, signal));
    hits.aim(&phases, |phase, signal| attempt(phase, phase, signal));
    hits.suffice(&phases);
    say(&format!(
        "{} images were whole, and there was no other",
        images.get()
    ));
    let mut monitor = ground.monitor();
    monitor.demand("PUT", "/snapshot/load", &ground.local());
    save(&monitor, &target);
    verified(&target);
    assert_eq!(ground.partials(), [""; 0], "the next snapshot sweeps");
    tell(&mut monitor, "checkfill:8m:256k:7", "checkfill=right");
}

/// Which files are at these paths.
fn inodes(paths: &[PathBuf; 2]) -> [Option<u64>; 2] {
    [0, 1].map(|which| fs::metadata(&paths[which]).ok().map(|about| about.ino()))
}

#[test]
fn a_monitor_that_ends_in_any_phase_of_writing_two_files_leaves_no_state_beside_another_ones_memory() {
    let ground = Ground::new("rnlkill3");
    let files = ["state", "memory"].map(|name| ground.folder.path().join(name));
    let create = json!({"snapshot_path": files[0], "mem_file_path": files[1]});
    let paused = |held: &str| {
        let monitor = ground.monitor_held_in(held);
        monitor.demand("PUT", "/snapshot/load", &ground.local());
        monitor.demand("PATCH", "/vm", &json!({"state": "Paused"}));
        monitor
    };
    paused("").demand("PUT", "/snapshot/create", &create);
    let attempt = |held: &str, phase: &str, signal: Signal| {
        let (before, partials) = (inodes(&files), ground.partials());
        let mut monitor = paused(held);
        signal_in_phase(&monitor, "Create", phase, signal);
        let _unanswered = Question::put(monitor.socket(), "PUT", "/snapshot/create", &create);
        let log = ground.ended(&mut monitor, signal);
        if signal == Signal::TERM {
            // One that was killed before may have left some.
            assert!(ground.partials().iter().all(|name| partials.contains(name)));
        }
        let after = inodes(&files);
        let is_new = [0, 1].map(|which| before[which] != after[which]);
        assert!(
            after[0].is_none() || is_new[0] == is_new[1],
            "{before:?} {after:?}"
        );
        phase_hit(&log, "Create")
    };
    let phases = ["copying", "publishing"];
    let mut hits = Hits::default();
    hits.aim(&phases, |phase, signal| attempt("", phase, signal));
    hits.aim(&phases, |phase, signal| attempt(phase, phase, signal));
    hits.suffice(&phases);
    paused("").demand("PUT", "/snapshot/create", &create);
    assert_eq!(ground.partials(), [""; 0], "the next snapshot sweeps");
    let mut monitor = ground.monitor();
    let load = json!({
        "snapshot_path": files[0],
        "mem_backend": {"backend_type": "File", "backend_path": files[1]},
        "drive_overrides": [{"drive_id": "data", "path_on_host": ground.folder.path().join("drive")}],
        "resume_vm": true,
    });
    monitor.demand("PUT", "/snapshot/load", &load);
    tell(&mut monitor, "checkfill:8m:256k:7", "checkfill=right");
}

/// Ends monitors in every phase of what `request` asks for, and then does it.
fn loads_that_are_ended(ground: &Ground, request: &Value) {
    let attempt = |held: &str, phase: &str, signal: Signal| {
        let mut monitor = ground.monitor_held_in(held);
        signal_in_phase(&monitor, "Load", phase, signal);
        let _unanswered = Question::put(monitor.socket(), "PUT", "/snapshot/load", request);
        phase_hit(&ground.ended(&mut monitor, signal), "Load")
    };
    let phases = ["opening", "restoring"];
    let mut hits = Hits::default();
    hits.aim(&phases, |phase, signal| attempt("", phase, signal));
    hits.aim(&phases, |phase, signal| attempt(phase, phase, signal));
    hits.suffice(&phases);
    let mut monitor = ground.monitor();
    monitor.demand("PUT", "/snapshot/load", request);
    tell(&mut monitor, "checkfill:8m:256k:7", "checkfill=right");
}

#[test]
fn a_monitor_that_ends_in_any_phase_of_a_load_leaves_nothing_in_the_way() {
    let ground = Ground::new("rnlkill1");
    loads_that_are_ended(&ground, &ground.local());
}

#[test]
fn a_monitor_that_ends_in_any_phase_of_a_load_from_afar_leaves_nothing_in_the_agents_way() {
    let ground = Ground::new("rnlkill4");
    let server = serve(&ground.image);
    let agents = AgentFolders::new();
    let _agent = agents.start(&[]);
    let image = format!("http://{}/bare", server.address());
    let request = json!({"image": image, "agent_path": agents.socket(), "resume_vm": true});
    loads_that_are_ended(&ground, &request);
}

#[test]
fn a_monitor_that_ends_while_its_pages_come_leaves_nothing_in_the_way_of_the_next_one() {
    /// What comes along with a chunk that is waited for: each round finds memory that nobody has.
    const NEIGHBOURHOOD: u64 = 1 << 20;
    let ground = Ground::with_pattern("rnlkill2", "40m");
    let server = serve(&ground.image);
    let agents = AgentFolders::new();
    // So slow that the fill is never over.
    let agent = agents.start(&["--fill-rate", "64"]);
    let agent_pid = Pid::from_raw(agent.pid().try_into().unwrap()).unwrap();
    let image = format!("http://{}/bare", server.address());
    // A machine that counts as stalled as soon as it waits shows that it does.
    let request = json!({
        "image": image, "agent_path": agents.socket(), "resume_vm": true, "stall_after_ms": 0
    });
    let mut round = 0;
    let phases = ["first faults", "fill"];
    let mut hits = Hits::default();
    hits.aim(&phases, |phase, signal| {
        let mut monitor = ground.monitor();
        monitor.demand("PUT", "/snapshot/load", &request);
        let at = (8 << 20) + round * NEIGHBOURHOOD;
        round += 1;
        if phase == "fill" {
            tell(&mut monitor, &format!("checkfill:{at}:4096:7"), "checkfill=right");
        } else {
            // Nothing comes while the agent stands still: the guest waits for a chunk when the signal is there.
            kill_process(agent_pid, Signal::STOP).unwrap();
            monitor.type_line(&format!("checkfill:{at}:4096:7"));
            let _ = wait_until_stalled(&monitor);
        }
        let progress = monitor.demand("GET", "/snapshot/progress", &Value::Null);
        let memory = &progress["volumes"][0];
        let is_filling = memory["bytes_resident"].as_u64().unwrap() < memory["bytes_total"].as_u64().unwrap();
        kill_process(pid(&monitor), signal).unwrap();
        ground.ended(&mut monitor, signal);
        kill_process(agent_pid, Signal::CONT).unwrap();
        is_filling.then(|| phase.to_owned())
    });
    hits.suffice(&phases);
    let mut monitor = ground.monitor();
    monitor.demand("PUT", "/snapshot/load", &request);
    tell(&mut monitor, "checkfill:8m:1m:7", "checkfill=right");
}
