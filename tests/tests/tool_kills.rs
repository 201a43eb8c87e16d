//! The operator's tool, its server and an agent, ended and killed at every moment of what they do: nothing of theirs is
//! in the way of the next one of the same name, at the same paths.
//!
//! They name no phases, so the moments are spread over the time that the thing takes undisturbed.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use runnel_snapshot::image::Image;
use runnel_snapshot::image::reference::Wanted;
use runnel_tests::agent::AgentFolders;
use runnel_tests::bare::wait_until;
use runnel_tests::lab::say;
use runnel_tests::monitor::Monitor;
use runnel_tests::served::{Served, TRICKLE};
use runnel_tests::signal;
use runnel_tests::user::{User, succeeded};
use serde_json::{Value, json};

/// How often each is killed by each signal, at as many moments.
const KILLS: u32 = 10;

/// How often that is tried.
const TRIES_MAX: u32 = 60;

const SIGNALS: [&str; 2] = ["TERM", "KILL"];

/// The states of his machines.
fn states(user: &User) -> Vec<String> {
    let state = |machine: &Value| machine["state"].as_str().unwrap().to_owned();
    user.machines().iter().map(state).collect()
}

/// Ends whatever machines there are; true if there were any.
fn ends_machines(user: &User) -> bool {
    let had_any = !states(user).is_empty();
    if had_any {
        user.output(&["kill", "--all"]);
    }
    assert_eq!(states(user), Vec::<String>::new());
    had_any
}

/// Nothing of his runs on: what was started for him has the folder in its arguments.
#[track_caller]
fn has_no_processes(user: &User) {
    let folder = user.folder().to_str().unwrap();
    wait_until("no process is left", || processes_about(folder).is_empty());
}

/// Processes whose arguments name a path.
fn processes_about(path: &str) -> Vec<String> {
    let arguments = |entry: std::io::Result<fs::DirEntry>| fs::read(entry.ok()?.path().join("cmdline")).ok();
    let lines = fs::read_dir("/proc").unwrap().filter_map(arguments);
    let lines = lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " "));
    lines.filter(|line| line.contains(path)).collect()
}

/// Has `start` begin something, again and again, and sends it each signal at each moment of the time that `start`'s
/// thing takes to its end undisturbed; `looks` finds what is left then. Prints how many of the kills found it alive.
fn at_every_moment(what: &str, start: &dyn Fn() -> Child, looks: &mut dyn FnMut()) {
    let mut takes = Duration::ZERO;
    // The first time, programs are built and read from disk.
    for _ in 0..2 {
        let begun = Instant::now();
        let whole = start().wait().unwrap();
        takes = begun.elapsed();
        assert!(whole.success(), "{what}, undisturbed: {whole}");
        looks();
    }
    for name in SIGNALS {
        let (mut alive, mut tries) = (0, 0);
        // It does not take the same time each time: until so many have been killed.
        while alive < KILLS && tries < TRIES_MAX {
            let mut child = start();
            thread::sleep(takes * (tries % KILLS) / KILLS);
            tries += 1;
            if child.try_wait().unwrap().is_none() {
                alive += 1;
                // A child that has not been waited for keeps its number.
                signal(child.id(), name);
            }
            child.wait().unwrap();
            looks();
        }
        say(&format!(
            "{what}: SIG{name}, {alive} of {tries} before its end, at moments spread over {takes:?}"
        ));
        assert_eq!(alive, KILLS, "{what}: it mostly ended before its signal");
    }
}

fn start(mut command: Command) -> Child {
    let quiet = command.stdout(Stdio::null()).stderr(Stdio::null());
    quiet.spawn().unwrap()
}

/// A machine `m`, whose guest obeys `words`.
fn run(user: &User, words: &str) -> Command {
    user.boot(words, &["--name", "m", "--detach"])
}

#[test]
fn a_command_that_ends_while_it_starts_a_machine_is_not_in_the_way_of_the_next() {
    let user = User::new();
    let (mut with, mut without) = (0, 0);
    at_every_moment("run", &|| start(run(&user, "count:1")), &mut || {
        // Either it runs under its name or there is none, and then no process of it for long.
        match ends_machines(&user) {
            true => with += 1,
            false => without += 1,
        }
        has_no_processes(&user);
        succeeded(run(&user, "count:1").output().unwrap());
        assert_eq!(states(&user), ["running"]);
        user.output(&["kill", "m"]);
    });
    say(&format!(
        "run: there was a machine after {with}, and none after {without}"
    ));
    assert!(with > 0 && without > 0);
}

#[test]
fn a_command_that_ends_while_it_resumes_a_machine_is_not_in_the_way_of_the_next() {
    let user = User::new();
    let served = Served::new();
    let url = served.url();
    let resume = ["resume", &url, "--name", "m", "--detach"];
    let (mut with, mut without) = (0, 0);
    // With an agent to be started, each time.
    at_every_moment("resume", &|| start(user.command(&resume)), &mut || {
        match ends_machines(&user) {
            true => with += 1,
            false => without += 1,
        }
        user.output(&resume);
        assert_eq!(states(&user), ["running"]);
        user.output(&["kill", "m"]);
        user.output(&["agent", "--stop"]);
        has_no_processes(&user);
    });
    say(&format!(
        "resume: there was a machine after {with}, and none after {without}"
    ));
    assert!(with > 0 && without > 0);
}

#[test]
fn a_command_that_ends_while_it_saves_a_machine_leaves_a_whole_image_or_none() {
    let user = User::new();
    succeeded(run(&user, "fill:8m:40m:7 count:1").output().unwrap());
    let image = user.folder().join("image");
    let snapshot = ["snapshot", "m", image.to_str().unwrap()];
    let (mut with, mut without) = (0, 0);
    at_every_moment("snapshot", &|| start(user.command(&snapshot)), &mut || {
        // A monitor whose client is gone may be about to finish.
        wait_until("the machine runs on", || states(&user) == ["running"]);
        if image.exists() {
            with += 1;
            user.output(&["verify", image.to_str().unwrap()]);
            fs::remove_dir_all(&image).unwrap();
        } else {
            without += 1;
        }
        let second = user.folder().join("second");
        user.output(&["snapshot", "m", second.to_str().unwrap()]);
        Image::open_directory(&second, &Wanted::Only).unwrap();
        fs::remove_dir_all(&second).unwrap();
        wait_until("nothing unfinished is left", || {
            partials(user.folder()).is_empty()
        });
    });
    say(&format!(
        "snapshot: there was an image after {with}, and none after {without}"
    ));
    assert!(with > 0 && without > 0);
}

/// Unfinished images.
fn partials(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    names.filter(|name| name.contains(".partial-")).collect()
}

#[test]
fn a_server_that_ends_is_not_in_the_way_of_the_next() {
    let user = User::new();
    let served = Served::new();
    let image = served.image().to_str().unwrap();
    // An address of this test's own: a port that is free there stays so.
    let own = std::process::id();
    let listen = format!("127.77.{}.{}:5000", own >> 8 & 0xff, (own & 0xff).clamp(1, 254));
    let agents = AgentFolders::new();
    let _agent = agents.start(&TRICKLE);
    let url = format!("http://{listen}/bare");
    let socket = agents.socket();
    for name in SIGNALS {
        for moment in 0..KILLS {
            let mut server = start(user.command(&["serve", image, "--listen", &listen]));
            // The later moments are those of a server at work.
            thread::sleep(Duration::from_millis(5) * moment);
            signal(server.id(), name);
            server.wait().unwrap();
        }
        let server = start(user.command(&["serve", image, "--listen", &listen]));
        wait_until("it listens", || std::net::TcpStream::connect(&listen).is_ok());
        let mut machine = Monitor::start();
        let load = json!({"image": url, "agent_path": socket, "resume_vm": true});
        machine.demand("PUT", "/snapshot/load", &load);
        machine.type_line("checkfill:8m:1m:7");
        assert_eq!(machine.wait_for_console("checkfill="), "checkfill=right");
        signal(server.id(), "TERM");
        let mut server = server;
        server.wait().unwrap();
        say(&format!(
            "serve: SIG{name} at {KILLS} moments, and the next one served"
        ));
    }
    has_no_processes(&user);
}

#[test]
fn an_agent_that_ends_while_it_starts_is_not_in_the_way_of_the_next() {
    let served = Served::new();
    for name in SIGNALS {
        for moment in 0..KILLS {
            let agent = served.agents().command(&[]);
            let mut agent = start(agent);
            thread::sleep(Duration::from_millis(2) * moment);
            signal(agent.id(), name);
            agent.wait().unwrap();
            let _next = served.agents().start(&TRICKLE);
            let mut machine = served.load(&json!({"resume_vm": true}));
            machine.type_line("checkfill:8m:1m:7");
            assert_eq!(machine.wait_for_console("checkfill="), "checkfill=right");
        }
        say(&format!(
            "agent: SIG{name} at {KILLS} moments of its start, and the next one delivered"
        ));
    }
}
