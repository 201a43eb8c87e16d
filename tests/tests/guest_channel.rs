//! Guests that take part in snapshots: the bare guest plays the agent at its second serial port, word by word.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::path::{Path, PathBuf};

use runnel_tests::bare::{about, configure, refusal, resumed, start, tell};
use runnel_tests::monitor::{Monitor, Question};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Longer than a test takes.
const LONG_MS: u64 = 600_000;

/// So long that a monitor which waits for it and one that does not can be told apart, and no longer.
const SHORT_MS: u64 = 300;

fn folder() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    (folder, image)
}

/// A machine with a guest channel, in which nobody listens yet.
fn with_channel() -> Monitor {
    let mut monitor = Monitor::start();
    configure(&monitor, 1, "");
    monitor.demand("PUT", "/guest-channel", &json!({}));
    start(&mut monitor);
    monitor
}

/// One whose guest has announced itself.
fn with_agent() -> Monitor {
    let mut monitor = with_channel();
    tell(&mut monitor, "agenthello", "agenthello=done");
    assert_eq!(about(&monitor)["guest_agent"], true);
    monitor
}

fn create(image: &Path, deadline_ms: u64, otherwise: &str) -> Value {
    json!({"image_path": image, "guest_hook": {"deadline_ms": deadline_ms, "otherwise": otherwise}})
}

fn ask_for(monitor: &Monitor, body: &Value) -> Question {
    Question::put(monitor.socket(), "PUT", "/snapshot/create", body)
}

/// What the guest hears next: the word, and what comes after it.
fn hears(monitor: &mut Monitor, word: &str) -> String {
    monitor.type_line("agenthear");
    let line = monitor.wait_for_console("heard=");
    let what = line.strip_prefix(&format!("heard={word} what="));
    what.unwrap_or_else(|| panic!("not {word}, but {line}"))
        .to_owned()
}

/// Hears that it is to prepare, for as long as `deadline_ms`; for which snapshot.
fn hears_prepare(monitor: &mut Monitor, deadline_ms: u64) -> String {
    let what = hears(monitor, "prepare");
    let (id, deadline) = what.split_once(' ').unwrap();
    assert_eq!(deadline, deadline_ms.to_string());
    id.to_owned()
}

#[test]
fn a_snapshot_waits_until_the_guest_is_ready_and_whoever_goes_on_is_told() {
    let (_folder, image) = folder();
    let mut machine = with_channel();
    assert_eq!(about(&machine)["guest_agent"], false);
    tell(&mut machine, "agenthello", "agenthello=done");
    assert_eq!(about(&machine)["guest_agent"], true);

    let snapshot = ask_for(&machine, &create(&image, LONG_MS, "fail"));
    let id = hears_prepare(&mut machine, LONG_MS);
    let operation = machine.demand("GET", "/snapshot/progress", &Value::Null)["operation"].clone();
    assert_eq!(operation["phase"], "asking the guest");
    assert_eq!(
        (&operation["state"], &operation["is_holding"]),
        (&json!("running"), &json!(false))
    );
    tell(&mut machine, "count:1", "count=1");
    assert!(!image.exists());
    machine.type_line("agentready");
    assert_eq!(snapshot.answer(), (204, Value::Null));
    assert_eq!(hears(&mut machine, "resumed"), id);
    tell(&mut machine, "agenttold", "agenttold=nothing");

    let mut clones = [resumed(&image), resumed(&image)];
    let generations = clones.each_mut().map(|clone| {
        assert_eq!(about(clone)["guest_agent"], true);
        hears(clone, "restored")
    });
    assert!(generations.iter().all(|generation| generation.len() == 32));
    assert_ne!(generations[0], generations[1]);

    // It can be asked as the machine that it came from was, and is asked by another name.
    let again = image.with_extension("again");
    let snapshot = ask_for(&clones[0], &create(&again, LONG_MS, "fail"));
    assert_ne!(hears_prepare(&mut clones[0], LONG_MS), id);
    clones[0].type_line("agentready");
    assert_eq!(snapshot.answer(), (204, Value::Null));
    assert!(again.exists());
}

#[test]
fn a_guest_that_does_not_answer_costs_the_deadline_and_nothing_is_made() {
    let (_folder, image) = folder();
    let mut machine = with_agent();
    let body = create(&image, SHORT_MS, "fail");
    let reason = refusal(&machine, "PUT", "/snapshot/create", &body);
    assert!(reason.contains("did not say within 300 ms"), "{reason}");
    assert!(!image.exists());
    let id = hears_prepare(&mut machine, SHORT_MS);
    assert_eq!(hears(&mut machine, "resumed"), id);

    // An answer that comes late is none, to the next question neither.
    tell(&mut machine, "agentready", "agentready=done");
    machine.wait_for_log("too late");
    let reason = refusal(&machine, "PUT", "/snapshot/create", &body);
    assert!(reason.contains("did not say within"), "{reason}");
    tell(&mut machine, "agentready", "agentready=done");
    assert!(!image.exists());
    tell(&mut machine, "count:1", "count=1");
    assert_eq!(about(&machine)["state"], "Running");
}

#[test]
fn a_snapshot_that_may_proceed_is_made_of_a_guest_that_does_not_answer() {
    let (_folder, image) = folder();
    let mut machine = with_agent();
    machine.demand("PUT", "/snapshot/create", &create(&image, SHORT_MS, "proceed"));
    machine.wait_for_log("has not prepared for it");
    let id = hears_prepare(&mut machine, SHORT_MS);
    assert_eq!(hears(&mut machine, "resumed"), id);

    // What was told to the machine that was saved is still in the port; what it is now comes after it, on its own line.
    let mut clone = resumed(&image);
    assert_eq!(hears_prepare(&mut clone, SHORT_MS), id);
    hears(&mut clone, "restored");
    tell(&mut clone, "agenttold", "agenttold=nothing");
}

#[test]
fn a_guest_that_is_not_ready_says_why() {
    let (_folder, image) = folder();
    let mut machine = with_agent();
    let snapshot = ask_for(&machine, &create(&image, LONG_MS, "fail"));
    let id = hears_prepare(&mut machine, LONG_MS);
    machine.type_line("agentfailed");
    let (status, answer) = snapshot.answer();
    assert_eq!(status, 400);
    let reason = answer["fault_message"].as_str().unwrap();
    assert!(reason.contains("the bare guest will not"), "{reason}");
    assert!(!image.exists());
    assert_eq!(hears(&mut machine, "resumed"), id);
}

#[test]
fn an_agent_is_asked_by_every_snapshot_that_does_not_say_otherwise() {
    let (_folder, image) = folder();
    let mut machine = with_agent();
    machine.demand("PUT", "/snapshot/create", &create(&image, 0, "fail"));
    tell(&mut machine, "agenttold", "agenttold=nothing");

    let again = image.with_extension("again");
    let snapshot = ask_for(&machine, &json!({"image_path": again}));
    hears_prepare(&mut machine, 5000);
    machine.type_line("agentready");
    assert_eq!(snapshot.answer(), (204, Value::Null));
    hears(&mut machine, "resumed");

    // Not once it has said that it ends.
    tell(&mut machine, "agentbye", "agentbye=done");
    assert_eq!(about(&machine)["guest_agent"], false);
    machine.demand(
        "PUT",
        "/snapshot/create",
        &json!({"image_path": image.with_extension("last")}),
    );
    tell(&mut machine, "agenttold", "agenttold=nothing");
}

#[test]
fn who_insists_on_an_agent_is_told_that_there_is_none_and_who_does_not_gets_a_snapshot() {
    let (_folder, image) = folder();
    let mut machine = with_channel();
    let insisting = create(&image, LONG_MS, "fail");
    let reason = refusal(&machine, "PUT", "/snapshot/create", &insisting);
    assert!(reason.contains("no agent in the guest"), "{reason}");
    tell(&mut machine, "agenthello", "agenthello=done");
    machine.demand("PATCH", "/vm", &json!({"state": "Paused"}));
    let reason = refusal(&machine, "PUT", "/snapshot/create", &insisting);
    assert!(reason.contains("is paused"), "{reason}");
    machine.demand("PUT", "/snapshot/create", &json!({"image_path": image}));

    let mut without = Monitor::start();
    configure(&without, 1, "");
    start(&mut without);
    assert!(about(&without)["guest_agent"].is_null());
    let again = image.with_extension("again");
    let reason = refusal(
        &without,
        "PUT",
        "/snapshot/create",
        &create(&again, LONG_MS, "fail"),
    );
    assert!(reason.contains("has no guest channel"), "{reason}");
    assert!(!again.exists());
    without.demand("PUT", "/snapshot/create", &create(&again, LONG_MS, "proceed"));
    assert!(again.exists());
}

#[test]
fn a_snapshot_can_be_called_off_while_the_guest_is_asked() {
    let (_folder, image) = folder();
    let mut machine = with_agent();
    let snapshot = ask_for(&machine, &create(&image, LONG_MS, "proceed"));
    let id = hears_prepare(&mut machine, LONG_MS);
    machine.demand("DELETE", "/snapshot/create", &Value::Null);
    let (status, answer) = snapshot.answer();
    assert_eq!(status, 400);
    assert!(
        answer["fault_message"].as_str().unwrap().contains("cancelled"),
        "{answer}"
    );
    assert_eq!(hears(&mut machine, "resumed"), id);
    assert!(!image.exists());
    let progress = machine.demand("GET", "/snapshot/progress", &Value::Null);
    assert_eq!(progress["operation"]["state"], "cancelled");
}

#[test]
fn a_guest_that_ends_while_it_is_asked_ends_its_monitor() {
    let (_folder, image) = folder();
    let mut machine = with_agent();
    let _snapshot = ask_for(&machine, &create(&image, LONG_MS, "fail"));
    hears_prepare(&mut machine, LONG_MS);
    machine.type_line("poweroff");
    assert_eq!(machine.wait().0.code(), Some(0));
    assert!(!image.exists());
}

#[test]
fn noise_on_the_channel_is_ignored_and_hides_nobody() {
    let (_folder, image) = folder();
    let mut machine = with_channel();
    tell(&mut machine, "agentnoise:20000", "agentnoise=done");
    machine.wait_for_log("is ignored");
    assert_eq!(about(&machine)["guest_agent"], false);
    tell(&mut machine, "agenthello", "agenthello=done");
    let snapshot = ask_for(&machine, &create(&image, LONG_MS, "fail"));
    hears_prepare(&mut machine, LONG_MS);
    tell(&mut machine, "agentnoise:1000", "agentnoise=done");
    assert!(!image.exists());
    machine.type_line("agentready");
    assert_eq!(snapshot.answer(), (204, Value::Null));
    hears(&mut machine, "resumed");
    tell(&mut machine, "count:1", "count=1");
}
