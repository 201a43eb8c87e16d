//! Machines whose memory is frozen as it was at the pause: they run on with memory of their own over it, and are saved from
//! there in every way.
//!
//! As in `live.rs`, the guest itself notices a memory that is not all of one moment.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::fs;
use std::path::{Path, PathBuf};

use runnel_tests::agent::AgentFolders;
use runnel_tests::bare::{begin_rounds, configure, end_rounds, load, resumed, save, start, tell};
use runnel_tests::forge::verified;
use runnel_tests::monitor::{Monitor, Question};
use serde_json::{Value, json};

/// So much is written to all the time.
const CHURN: &str = "churn:8m:4m";

/// A machine whose writes KVM logs, or not.
fn booted(logs: bool, words: &str) -> Monitor {
    let mut monitor = Monitor::start();
    configure(&monitor, 1, words);
    monitor.demand("PATCH", "/machine-config", &json!({"track_dirty_pages": logs}));
    start(&mut monitor);
    monitor
}

fn frozen_to(image: &Path) -> Value {
    json!({"image_path": image, "snapshot_type": "Diff", "freeze_memory": true})
}

fn freeze(monitor: &Monitor, image: &Path) {
    monitor.demand("PUT", "/snapshot/create", &frozen_to(image));
}

fn save_diff(monitor: &Monitor, image: &Path) {
    let diff = json!({"image_path": image, "snapshot_type": "Diff"});
    monitor.demand("PUT", "/snapshot/create", &diff);
}

fn paths(folder: &Path) -> impl Fn(usize) -> PathBuf {
    let folder = folder.to_owned();
    move |number| folder.join(number.to_string())
}

/// How the machine's memory is mapped: `s` for shared, `p` for private.
fn sharing(monitor: &Monitor) -> String {
    let maps = fs::read_to_string(format!("/proc/{}/maps", monitor.pid())).unwrap();
    let of_memory = maps.lines().filter(|line| line.contains("/memfd:guest-ram"));
    of_memory
        .map(|line| line.split(' ').nth(1).unwrap().chars().last().unwrap())
        .collect()
}

/// The layers of memory, and the bytes of the last.
fn layers(image: &Path) -> (usize, u64) {
    let image = verified(image);
    let layers = &image.manifest.volumes[0].layers;
    (layers.len(), layers.last().unwrap().bytes)
}

#[test]
fn a_machine_that_writes_all_the_time_is_frozen_as_it_was_and_saved_in_every_way_after_that() {
    let folder = tempfile::tempdir().unwrap();
    let path = paths(folder.path());
    for (logs, is_saved_before) in [(true, false), (false, false), (true, true), (false, true)] {
        let mut machine = booted(logs, "fill:20m:8m:5");
        begin_rounds(&mut machine, CHURN);
        if is_saved_before {
            save(&machine, &path(0));
        }
        assert_eq!(sharing(&machine), "s");
        freeze(&machine, &path(1));
        assert_eq!(sharing(&machine), "p");
        save_diff(&machine, &path(2));
        save_diff(&machine, &path(3));
        save(&machine, &path(4));
        // Again, as far as that can be: it has pages of its own.
        freeze(&machine, &path(5));
        save_diff(&machine, &path(6));
        end_rounds(&mut machine, "churn");
        drop(machine);
        let first = usize::from(!is_saved_before);
        for number in first..7 {
            let (count, bytes) = layers(&path(number));
            let is_whole = number == first || number == 4;
            assert_eq!(count == 1, is_whole, "logs: {logs}, {number}: {count} layers");
            let (_, whole) = layers(&path(first));
            assert!(
                is_whole || bytes < whole,
                "logs: {logs}, {number}: {bytes} of {whole}"
            );
            let mut again = resumed(&path(number));
            end_rounds(&mut again, "churn");
            tell(&mut again, "checkfill:27m:512k:5", "checkfill=right");
            drop(again);
        }
        (first..7).for_each(|number| fs::remove_dir_all(path(number)).unwrap());
    }
}

#[test]
fn a_machine_that_was_frozen_is_saved_to_two_files_whole_and_what_changed() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let files = |kind: &str| json!({"snapshot_type": kind, "snapshot_path": file("state"), "mem_file_path": file("memory")});
    for logs in [true, false] {
        let mut machine = booted(logs, "fill:8m:4m:7 count:1");
        // Of a machine that stands, too.
        machine.demand("PATCH", "/vm", &json!({"state": "Paused"}));
        freeze(&machine, &file("image"));
        machine.demand("PATCH", "/vm", &json!({"state": "Resumed"}));
        tell(&mut machine, "fill:10m:64k:9", "fill=done");
        machine.demand("PATCH", "/vm", &json!({"state": "Paused"}));
        machine.demand("PUT", "/snapshot/create", &files("Full"));
        machine.demand("PATCH", "/vm", &json!({"state": "Resumed"}));
        tell(&mut machine, "fill:30m:64k:3", "fill=done");
        machine.demand("PATCH", "/vm", &json!({"state": "Paused"}));
        machine.demand("PUT", "/snapshot/create", &files("Diff"));
        drop(machine);
        let backend = json!({"backend_type": "File", "backend_path": file("memory")});
        let request = json!({"snapshot_path": file("state"), "mem_backend": backend, "resume_vm": true});
        let mut again = load(&request);
        tell(&mut again, "checkfill:9m:512k:7", "checkfill=right");
        tell(&mut again, "checkfill:10m:64k:9", "checkfill=right");
        tell(&mut again, "checkfill:30m:64k:3", "checkfill=right");
        tell(&mut again, "count:1", "count=2");
        drop(again);
        fs::remove_dir_all(file("image")).unwrap();
        fs::remove_file(file("state")).unwrap();
        fs::remove_file(file("memory")).unwrap();
    }
}

#[test]
fn what_was_frozen_and_could_not_be_saved_is_in_the_next_diff() {
    let folder = tempfile::tempdir().unwrap();
    let path = paths(folder.path());
    for logs in [true, false] {
        let mut machine = booted(logs, "fill:8m:16m:7");
        save(&machine, &path(0));
        tell(&mut machine, "fill:10m:1m:9", "fill=done");
        // Where there is something already, nothing is frozen for it; where nobody can write, that shows too late.
        for (target, then) in [(&*path(0), "s"), (Path::new("/proc/image"), "p")] {
            let (status, answer) = machine.ask("PUT", "/snapshot/create", &frozen_to(target));
            assert_eq!(status, 400, "{answer}");
            assert_eq!(sharing(&machine), then, "{answer}");
        }
        tell(&mut machine, "fill:30m:64k:3", "fill=done");
        save_diff(&machine, &path(1));
        tell(&mut machine, "fill:31m:64k:4", "fill=done");
        save_diff(&machine, &path(2));
        drop(machine);
        assert_eq!(layers(&path(2)).0, 3);
        let mut again = resumed(&path(2));
        tell(&mut again, "checkfill:8m:2m:7", "checkfill=right");
        tell(&mut again, "checkfill:10m:1m:9", "checkfill=right");
        tell(&mut again, "checkfill:30m:64k:3", "checkfill=right");
        tell(&mut again, "checkfill:31m:64k:4", "checkfill=right");
        drop(again);
        (0..3).for_each(|number| fs::remove_dir_all(path(number)).unwrap());
    }
}

fn frozen_for(agents: &AgentFolders, image: &Path) -> Value {
    let mut create = frozen_to(image);
    create["agent_path"] = json!(agents.socket());
    create
}

fn clone_through(agents: &AgentFolders, image: &Path) -> Monitor {
    load(&json!({"image": image, "agent_path": agents.socket(), "resume_vm": true}))
}

#[test]
fn a_snapshot_whose_memory_no_agent_takes_is_a_snapshot_like_any_other() {
    let folder = tempfile::tempdir().unwrap();
    let path = paths(folder.path());
    let agents = AgentFolders::new();
    let mut machine = booted(false, "fill:8m:1m:7");
    machine.demand("PUT", "/snapshot/create", &frozen_for(&agents, &path(0)));
    machine.wait_for_log("is not shared with this machine");
    tell(&mut machine, "checkfill:8m:1m:7", "checkfill=right");
    let _agent = agents.start(&[]);
    let mut clone = clone_through(&agents, &path(0));
    tell(&mut clone, "checkfill:8m:1m:7", "checkfill=right");
    // It has page files of its own by now.
    drop(machine);
    drop(clone);
}

#[test]
fn a_monitor_that_is_killed_while_it_hands_its_memory_over_leaves_a_whole_image_and_clones_of_it() {
    let agents = AgentFolders::new();
    let _agent = agents.start(&[]);
    for hold in ["sharing memory", ""] {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        let mut machine = Monitor::spawn_at(&folder.path().join("api.sock"), |mut command| {
            command.env("RUNNEL_HOLD_PHASE", hold).spawn()
        });
        machine.wait_for_log("Listening on API socket");
        configure(&machine, 1, "fill:8m:1m:7 count:3");
        start(&mut machine);
        let saving = Question::put(
            machine.socket(),
            "PUT",
            "/snapshot/create",
            &frozen_for(&agents, &image),
        );
        machine.wait_for_log("Create of a snapshot: sharing memory");
        machine.signal("KILL");
        machine.wait();
        drop(saving);
        verified(&image);
        let mut clones = [clone_through(&agents, &image), clone_through(&agents, &image)];
        for clone in &mut clones {
            tell(clone, "checkfill:8m:1m:7", "checkfill=right");
            tell(clone, "fill:8m:64k:9", "fill=done");
            tell(clone, "count:1", "count=4");
        }
    }
}

#[test]
fn memory_of_a_machine_that_was_loaded_is_not_frozen_and_is_saved_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path = paths(folder.path());
    let machine = booted(true, "fill:8m:1m:7");
    save(&machine, &path(0));
    drop(machine);
    let mut machine = resumed(&path(0));
    tell(&mut machine, "fill:8m:64k:9", "fill=done");
    freeze(&machine, &path(1));
    tell(&mut machine, "fill:8m:128k:3", "fill=done");
    drop(machine);
    let mut again = resumed(&path(1));
    tell(&mut again, "checkfill:8m:64k:9", "checkfill=right");
    tell(&mut again, "checkfill:8256k:960k:7", "checkfill=right");
}
