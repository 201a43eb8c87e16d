//! Two clients of one monitor that ask for snapshots at once: one comes after the other, each is told of its own, and
//! neither gets in the other's way.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use runnel_tests::bare::{about, booted, configure, refusal, resumed, saving, start, tell, wait_until};
use runnel_tests::forge::verified;
use runnel_tests::monitor::{Monitor, Question, ask};
use serde_json::Value;
use tempfile::TempDir;

/// The phases of a snapshot, in order.
const PHASES: [&str; 6] = [
    "starting",
    "arming",
    "pausing",
    "saving state",
    "copying",
    "publishing",
];

fn operation(monitor: &Monitor) -> Value {
    monitor.demand("GET", "/snapshot/progress", &Value::Null)["operation"].clone()
}

/// What two snapshots at once were said to be, look by look, until both were answered.
fn watched(monitor: &Monitor, targets: &[PathBuf; 2]) -> Vec<Value> {
    let is_over = Arc::new(AtomicBool::new(false));
    let (over, socket) = (is_over.clone(), monitor.socket().to_owned());
    let watcher = thread::spawn(move || {
        let mut seen = Vec::new();
        while !over.load(Ordering::SeqCst) {
            let (_, progress) = ask(&socket, "GET", "/snapshot/progress", &Value::Null);
            seen.push(progress["operation"].clone());
        }
        seen
    });
    let questions = targets.each_ref().map(|target| saving(monitor, target));
    let answers = questions.map(Question::answer);
    is_over.store(true, Ordering::SeqCst);
    let seen = watcher.join().unwrap();
    for (status, answer) in answers {
        assert_eq!(status, 204, "{answer}");
    }
    seen.into_iter()
        .filter(|operation| !operation.is_null())
        .collect()
}

/// Where in [`PHASES`] an operation is, and how long it has been under way.
fn place(operation: &Value) -> (usize, u64) {
    let phase = PHASES.iter().position(|phase| operation["phase"] == *phase);
    (
        phase.unwrap_or_else(|| panic!("{operation}")),
        operation["elapsed_ms"].as_u64().unwrap(),
    )
}

#[test]
fn two_snapshots_at_once_come_one_after_the_other_each_with_phases_and_a_pause_of_its_own() {
    const TRIES: usize = 20;
    let folder = TempDir::new().unwrap();
    let mut machine = booted("fill:8m:8m:7 count:3");
    for number in 0..TRIES {
        let targets = ["one", "two"].map(|name| folder.path().join(format!("{name}-{number}")));
        let seen = watched(&machine, &targets);
        // Those of the second begin where the first time is that it has gone back. Before those of the first there may
        // be the last look at what was before.
        let mut operations: Vec<Vec<Value>> = vec![Vec::new()];
        for look in seen {
            let last = operations.last().unwrap().last();
            let begins_anew = last.is_some_and(|last| {
                let ((phase, elapsed), (phase_before, elapsed_before)) = (place(&look), place(last));
                phase < phase_before || elapsed < elapsed_before
            });
            if begins_anew {
                operations.push(Vec::new());
            }
            operations.last_mut().unwrap().push(look);
        }
        let of_two = operations.split_off(operations.len().saturating_sub(2));
        for looks in &of_two {
            for look in looks {
                let pause = look["pause_ms"].as_u64();
                // It begins while the machine is being paused.
                match place(look).0 {
                    ..=1 => assert_eq!(pause, None, "it has not paused: {look}"),
                    3.. => assert!(pause.is_some(), "it has paused: {look}"),
                    _ => {}
                }
                assert!(pause.is_none_or(|pause| pause <= place(look).1), "{look}");
            }
            let mut pauses: Vec<_> = looks
                .iter()
                .filter(|look| place(look).0 > 3 && look["is_holding"] == false)
                .map(|look| look["pause_ms"].as_u64().unwrap())
                .collect();
            pauses.dedup();
            assert!(pauses.len() <= 1, "once it is over it is what it was: {pauses:?}");
        }
        for target in &targets {
            verified(target);
        }
        let was_watched = of_two.len() == 2
            && of_two.iter().all(|looks| {
                let phases: Vec<_> = looks.iter().map(|look| place(look).0).collect();
                phases.contains(&1) && phases.iter().any(|phase| *phase > 3)
            });
        if was_watched {
            tell(&mut machine, "count:1", "count=4");
            for target in &targets {
                let mut again = resumed(target);
                tell(&mut again, "checkfill:8m:1m:7", "checkfill=right");
                tell(&mut again, "count:1", "count=4");
            }
            return;
        }
    }
    panic!("in {TRIES} pairs of snapshots both were never seen to arm and to copy");
}

#[test]
fn of_two_snapshots_at_once_to_one_place_one_is_made_and_the_other_is_refused() {
    let folder = TempDir::new().unwrap();
    let mut machine = booted("fill:8m:8m:7 count:3");
    let target = folder.path().join("image");
    let answers = [saving(&machine, &target), saving(&machine, &target)].map(Question::answer);
    let mut statuses = answers.each_ref().map(|(status, _)| *status);
    statuses.sort_unstable();
    assert_eq!(statuses, [204, 400], "{answers:?}");
    let refused = answers.iter().find(|(status, _)| *status == 400).unwrap();
    let reason = refused.1["fault_message"].as_str().unwrap();
    assert!(
        reason.contains("exists") && reason.contains(target.to_str().unwrap()),
        "{reason}"
    );
    verified(&target);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    assert_eq!(about(&machine)["state"], "Running");
    tell(&mut machine, "count:1", "count=4");
    tell(&mut resumed(&target), "checkfill:8m:1m:7", "checkfill=right");
}

#[test]
fn who_calls_a_snapshot_off_takes_none_with_it_that_another_client_waits_for() {
    let folder = TempDir::new().unwrap();
    let socket = folder.path().join("api.sock");
    let mut machine = Monitor::spawn_at(&socket, |mut command| {
        command.env("RUNNEL_HOLD_PHASE", "copying").spawn()
    });
    machine.wait_for_log("Listening on API socket");
    configure(&machine, 1, "count:3");
    start(&mut machine);
    let targets = ["one", "two"].map(|name| folder.path().join(name));
    let [first, second] = targets.each_ref().map(|target| {
        let question = saving(&machine, target);
        // The first is under way before the second is asked for, which then waits.
        wait_until("a snapshot copies", || operation(&machine)["phase"] == "copying");
        question
    });
    // Meanwhile the machine runs, and whatever else is asked of the monitor waits or is answered.
    tell(&mut machine, "count:1", "count=4");
    let before = operation(&machine)["pause_ms"].as_u64();
    assert!(before.is_some());
    machine.demand("DELETE", "/snapshot/create", &Value::Null);
    let (status, answer) = first.answer();
    assert_eq!(status, 400, "{answer}");
    assert!(
        answer["fault_message"].as_str().unwrap().contains("cancelled"),
        "{answer}"
    );

    wait_until("the second copies", || {
        let operation = operation(&machine);
        operation["state"] == "running" && operation["phase"] == "copying"
    });
    tell(&mut machine, "count:1", "count=5");
    machine.demand("DELETE", "/snapshot/create", &Value::Null);
    assert_eq!(second.answer().0, 400);
    assert_eq!(operation(&machine)["state"], "cancelled");
    let none = refusal(&machine, "DELETE", "/snapshot/create", &Value::Null);
    assert!(!none.is_empty());
    assert!(targets.iter().all(|target| !target.exists()));
    assert_eq!(about(&machine)["state"], "Running");
    tell(&mut machine, "count:1", "count=6");
}
