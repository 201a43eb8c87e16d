//! The agent for guests, `resources/guest-agent`, at a terminal instead of a serial port: what it does by itself, with each
//! shell that it is made for.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::fs::{self, Permissions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;

use runnel_tests::bare::wait_until;
use runnel_tests::monitor::DEADLINE;
use tempfile::TempDir;

/// Debian's `sh`, and what small systems have.
const SHELLS: [&str; 2] = ["sh", "busybox sh"];

const FIRST: &str = "000000000000000a";
const SECOND: &str = "000000000000000b";

/// Notes what it is called for, and fails before a snapshot if it is told to.
const HOOK: &str = "#!/bin/sh\n\
    cd \"${0%/*}/..\"\n\
    echo \"$1 ${RUNNEL_SNAPSHOT:-} ${RUNNEL_GENERATION:-}\" >>log\n\
    [ \"$1\" != pre-snapshot ] || [ ! -e fail ]\n";

/// In place of the real one.
const FSFREEZE: &str = "#!/bin/sh\n\
    echo \"fsfreeze $1 ${2##*/}\" >>\"${0%/*}/../log\"\n";

/// The agent at work.
struct Agent {
    folder: TempDir,
    process: Child,
    channel: ChildStdin,
    lines: Receiver<String>,
}

impl Agent {
    /// One that freezes what `mounts` names.
    fn start(shell: &str, mounts: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in [("hooks/10-note", HOOK), ("bin/fsfreeze", FSFREEZE)] {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        }
        // Nothing of this host has such a name, whoever is asked to freeze it.
        let mounts = mounts.iter().map(|mount| format!("/nonexistent/{mount}"));
        let script =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/guest-agent/runnel-guest-agent");
        let command = format!(
            "RUNNEL_CHANNEL=$(tty) exec {shell} {} 2>{}",
            script.display(),
            folder.path().join("messages").display()
        );
        let bin = folder.path().join("bin");
        let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
        let mut process = Command::new("script")
            .args(["--quiet", "--flush", "--command", &command, "/dev/null"])
            .env("PATH", path)
            .env("SHELL", "/bin/sh")
            .env("RUNNEL_HOOKS", folder.path().join("hooks"))
            .env("RUNNEL_FREEZE", mounts.collect::<Vec<_>>().join(" "))
            .env("RUNNEL_THAW_AFTER", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let channel = process.stdin.take().unwrap();
        let said = BufReader::new(process.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in said.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut agent = Self {
            folder,
            process,
            channel,
            lines,
        };
        agent.says("hello 1");
        agent
    }

    fn says(&mut self, expected: &str) {
        let said = loop {
            match self.lines.recv_timeout(DEADLINE) {
                Ok(empty) if empty.is_empty() => {}
                Ok(line) => break line,
                Err(why) => panic!("{expected:?} did not come ({why}): {:?}", self.log()),
            }
        };
        assert_eq!(said, expected);
    }

    fn is_told(&mut self, line: &str) {
        self.channel.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    fn log(&self) -> Vec<String> {
        let log = fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
        log.lines().map(|line| line.trim_end().to_owned()).collect()
    }

    fn notes(&self, expected: &[String]) {
        wait_until(&format!("{expected:?}"), || self.log().len() >= expected.len());
        assert_eq!(self.log(), expected);
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // The terminal goes with it, and the agent with that.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn note(word: &str, id: &str) -> String {
    format!("{word} {id}").trim_end().to_owned()
}

#[test]
fn it_prepares_goes_on_and_tells_of_a_restore() {
    for shell in SHELLS {
        let mut agent = Agent::start(shell, &[]);
        agent.is_told(&format!("prepare {FIRST} 60000"));
        agent.says(&format!("ready {FIRST}"));
        // Of another snapshot, and no line of the protocol.
        agent.is_told(&format!("resumed {SECOND}\nprepare {SECOND}\nprepared"));
        agent.is_told(&format!("resumed {FIRST}"));
        let mut log = vec![note("pre-snapshot", FIRST), note("post-snapshot", FIRST)];
        agent.notes(&log);

        agent.is_told(&format!("prepare {SECOND} 60000"));
        agent.says(&format!("ready {SECOND}"));
        agent.is_told("\nrestored 00ff");
        log.extend([note("pre-snapshot", SECOND), note("post-snapshot", SECOND)]);
        log.push("restored  00ff".to_owned());
        agent.notes(&log);
        agent.is_told("restored 0fff");
        log.push("restored  0fff".to_owned());
        agent.notes(&log);
    }
}

#[test]
fn what_is_prepared_goes_on_by_itself_if_nobody_says_that_it_may() {
    for shell in SHELLS {
        let mut agent = Agent::start(shell, &[]);
        agent.is_told(&format!("prepare {FIRST} 1000"));
        agent.says(&format!("ready {FIRST}"));
        agent.notes(&[note("pre-snapshot", FIRST), note("post-snapshot", FIRST)]);
        // What comes afterwards changes nothing.
        agent.is_told(&format!("resumed {FIRST}\nprepare {SECOND} 60000"));
        agent.says(&format!("ready {SECOND}"));
        assert_eq!(agent.log().len(), 3);
    }
}

#[test]
fn file_systems_are_frozen_after_the_hooks_and_thawed_before_them() {
    let mut agent = Agent::start("sh", &["srv", "root"]);
    agent.is_told(&format!("prepare {FIRST} 60000"));
    agent.says(&format!("ready {FIRST}"));
    let frozen = [
        note("pre-snapshot", FIRST),
        "fsfreeze --freeze srv".to_owned(),
        "fsfreeze --freeze root".to_owned(),
    ];
    assert_eq!(agent.log(), frozen);
    agent.is_told(&format!("resumed {FIRST}"));
    let thawed = [
        "fsfreeze --unfreeze root".to_owned(),
        "fsfreeze --unfreeze srv".to_owned(),
        note("post-snapshot", FIRST),
    ];
    agent.notes(&[frozen, thawed].concat());
}

#[test]
fn a_hook_that_fails_is_a_refusal_and_nothing_stays_prepared() {
    for shell in SHELLS {
        let mut agent = Agent::start(shell, &["srv"]);
        fs::write(agent.folder.path().join("fail"), "").unwrap();
        agent.is_told(&format!("prepare {FIRST} 60000"));
        let hook = agent.folder.path().join("hooks/10-note");
        agent.says(&format!("failed {FIRST} {} has failed", hook.display()));
        let log = [note("pre-snapshot", FIRST), note("post-snapshot", FIRST)];
        agent.notes(&log);
        agent.is_told(&format!("resumed {FIRST}"));
        agent.is_told("restored 00ff");
        agent.notes(&[&log[..], &["restored  00ff".to_owned()]].concat());
    }
}
