//! Command lines, as a process: what is refused and why, and what a new user is told.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

mod user;

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::Stdio;

use serde_json::Value;
use user::{User, text};

#[test]
fn errors_name_the_next_step() {
    let user = User::new();
    for (arguments, expected) in [
        (&["inspect", "web"][..], "runnel image ls"),
        (
            &["verify", "http://127.0.0.1:1/web"],
            "give a directory or a name",
        ),
        (&["inspect", "127.0.0.1:1/web"], "http://127.0.0.1:1/web"),
        (&["image", "rm", "/srv/web"], "yours to remove"),
        (&["serve", "web"], "runnel image ls"),
        (&["console", "web"], "runnel ps"),
        (&["kill", "web"], "runnel ps"),
        (&["kill", "web"], "no machine was ended"),
        (&["agent", "--status"], "runnel resume"),
        (
            &["resume", "http://127.0.0.1:1/web", "--agent", "/nonexistent"],
            "runnel agent",
        ),
    ] {
        let output = user.run(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        let told = text(&output.stderr);
        assert!(told.contains(expected), "{arguments:?}: {told}");
        assert_eq!(told.lines().count(), 1, "{arguments:?}: {told}");
    }
}

#[test]
fn what_cannot_be_understood_ends_with_2() {
    let user = User::new();
    for arguments in [
        &[][..],
        &["run"],
        &["run", "--kernel", "k", "--memory", "lots"],
        &["run", "--kernel", "k", "--name", "a/b"],
        &["run", "--kernel", "k", "--config", "c"],
        &["resume"],
        &["resume", "web", "--json"],
        &["ps", "--strange"],
        &["serve", "--listen", "5000"],
    ] {
        assert_eq!(user.run(arguments).status.code(), Some(2), "{arguments:?}");
    }
}

#[test]
fn an_image_that_cannot_be_named_so_is_no_failure_of_a_snapshot_but_of_its_command_line() {
    let user = User::new();
    for name in ["", "Web!"] {
        let output = user.run(&["snapshot", "web", name]);
        assert_eq!(
            output.status.code(),
            Some(2),
            "{name:?}: {}",
            text(&output.stderr)
        );
    }
    assert_eq!(user.run(&["snapshot", "web", "web-v1"]).status.code(), Some(1));
}

#[test]
fn a_url_that_cannot_be_one_ends_every_command_that_takes_one_with_2_and_nothing_is_started() {
    let user = User::new();
    for url in [
        "http://127.0.0.1:99999/web",
        "http://a b/web",
        "http://h",
        "http://h/Web",
        "http://u:secret@h/web",
        "http:/h/web",
        "ftp://h/web",
    ] {
        for command in ["inspect", "verify", "resume"] {
            let output = user.run(&[command, url]);
            let told = text(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{command} {url}: {told}");
            assert!(!told.contains("secret"), "{told}");
        }
    }
    let logs = user.folder.path().join("run/runnel");
    assert!(!logs.join("agent/agent.log").exists() && !logs.join("ended/m1.log").exists());
}

#[test]
fn killing_nobody_is_told_how_to_kill_all() {
    let user = User::new();
    let output = user.run(&["kill"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("--all"), "{}", text(&output.stderr));
    user.output(&["kill", "--all"]);
}

#[test]
fn what_is_given_twice_is_refused_before_anything_starts() {
    let user = User::new();
    let drives = ["--drive", "id=a,path=one", "--drive", "id=a,path=two"];
    let output = user.run(&[&["run", "--kernel", "k"], &drives[..]].concat());
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("a twice"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn words_are_taken_for_flags_where_they_are_typed_for_them() {
    let user = User::new();
    assert!(user.output(&["help"]).contains("runnel doctor"));
    assert_eq!(
        user.output(&["help", "resume"]),
        user.output(&["resume", "--help"])
    );
    assert!(user.output(&["help", "image", "rm"]).contains("--force"));
    assert_eq!(user.run(&["help", "nothing"]).status.code(), Some(2));
    for word in ["status", "stop"] {
        let told = text(&user.run(&["agent", word]).stderr);
        assert!(told.contains("no agent runs"), "{word}: {told}");
        let twice = user.run(&["agent", word, "--status"]);
        assert_eq!(twice.status.code(), Some(2), "{word}");
    }
    assert_eq!(user.run(&["agent", "start"]).status.code(), Some(2));
}

#[test]
fn nothing_runs_for_a_new_user() {
    let user = User::new();
    assert_eq!(user.json(&["ps", "--json"]), Value::Array(Vec::new()));
    assert!(user.output(&["ps"]).starts_with("NAME"));
}

#[test]
fn doctor_reports_every_check_with_a_verdict() {
    let user = User::new();
    let output = user.run(&["doctor", "--json"]);
    let findings: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let is_missing = |finding: &Value| finding["verdict"] == "missing";
    let expected = if findings.iter().any(is_missing) { 3 } else { 0 };
    assert_eq!(output.status.code(), Some(expected));
    for check in [
        "kernel",
        "kvm",
        "userfaultfd",
        "tap",
        "monitor",
        "state",
        "agent",
        "memory",
        "tmpfs",
        "open files",
    ] {
        assert!(
            findings.iter().any(|finding| finding["check"] == check),
            "{check}"
        );
    }
}

#[test]
fn shells_and_man_know_the_commands() {
    let user = User::new();
    for shell in ["bash", "zsh", "fish"] {
        assert!(
            user.output(&["completions", shell]).contains("snapshot"),
            "{shell}"
        );
    }
    let pages = user.folder.path().join("man");
    fs::create_dir(&pages).unwrap();
    user.output(&["man", pages.to_str().unwrap()]);
    assert!(!pages.join("runnel-help.1").exists());
    for page in ["runnel.1", "runnel-resume.1", "runnel-image-prune.1"] {
        assert!(
            fs::read_to_string(pages.join(page)).unwrap().contains(".SH"),
            "{page}"
        );
    }
}

#[test]
fn an_agent_is_shown_and_ended_and_gives_way_to_none() {
    let user = User::new();
    let folder = |name: &str| user.folder.path().join(name).to_str().unwrap().to_owned();
    let (memory, drives) = (folder("memory"), folder("drives"));
    let arguments = ["agent", "--memory-pages", &memory, "--drive-pages", &drives];
    let mut agent = user.command(&arguments).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(agent.stdout.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().contains("agent.sock"));

    let status = user.json(&["agent", "--status", "--json"]);
    assert_eq!(status["process"], agent.id());
    let second = user.run(&arguments);
    assert!(
        text(&second.stderr).contains("runs already"),
        "{}",
        text(&second.stderr)
    );
    user.output(&["agent", "--stop"]);
    assert_eq!(agent.wait().unwrap().code(), Some(0));
}
