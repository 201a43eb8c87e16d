//! The operator's tool with machines that run: the bare guest on this host's KVM.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::protocol::is_answering;
use runnel_tests::bare::wait_until;
use runnel_tests::served::Served;
use runnel_tests::user::{User, read_to, refusal, succeeded};
use runnel_tests::{bare_guest, program, signal};
use serde_json::Value;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_foreground_machine_is_heard_to_its_last_word_and_gives_its_exit_code() {
    let user = User::new();
    let output = user.boot("count:3 poweroff", &[]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let heard = text(&output.stdout);
    assert!(
        heard.contains("guest=bare") && heard.contains("count=3"),
        "{heard}"
    );

    for (words, code, ending) in [
        ("poweroff", 0, "m1 has ended: the guest switched itself off\n"),
        ("reset", 0, "m1 has ended: the guest asked for a reset\n"),
        (
            "triplefault",
            3,
            "m1 has ended with code 3: the guest ended in a triple fault; its log is",
        ),
    ] {
        let output = user.boot(words, &[]).output().unwrap();
        let told = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{words}: {told}");
        assert!(
            told.contains(ending) && told.lines().count() == 1,
            "{words}: {told}"
        );
    }
    assert_eq!(user.machines(), Vec::<Value>::new());
}

#[test]
fn a_detached_machine_is_listed_paused_and_killed() {
    let user = User::new();
    let name = succeeded(
        user.boot("count:1", &["--detach", "--name", "web"])
            .output()
            .unwrap(),
    );
    assert_eq!(name, "web\n");
    let machines = user.machines();
    assert_eq!(machines.len(), 1);
    let machine = &machines[0];
    assert_eq!(
        (&machine["state"], &machine["vcpus"]),
        (&"running".into(), &1.into())
    );
    assert_eq!(machine["memory_mib"], 64);
    assert!(machine["resident_bytes"].as_u64().unwrap() > 0);
    assert!(user.output(&["ps"]).contains("64 MiB"));

    assert_eq!(user.output(&["pause", "web"]), "web is paused\n");
    assert_eq!(user.state_of("web"), "paused");
    assert_eq!(user.output(&["unpause", "web"]), "web runs\n");
    assert_eq!(user.state_of("web"), "running");

    let second = user.boot("", &["--detach", "--name", "web"]).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(
        text(&second.stderr).contains("choose another --name"),
        "{}",
        text(&second.stderr)
    );
    assert_eq!(user.machines().len(), 1);

    assert_eq!(user.output(&["kill", "web"]), "web has ended\n");
    assert_eq!(user.machines(), Vec::<Value>::new());
    assert!(!user.machine_folder("web").exists());
    let pid = machine["pid"].to_string();
    assert!(!Path::new("/proc").join(pid).join("exe").exists());
}

#[test]
fn a_console_is_joined_later_and_says_what_was_missed() {
    let user = User::new();
    let more = ["--detach", "--name", "web"];
    succeeded(user.boot("count:2", &more).output().unwrap());
    let mut console = user
        .command(&["console", "web"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    // A guest that has not set its port up does not hear.
    let missed = read_to(&mut console, "count=2");
    assert!(missed.contains("guest=bare"), "{missed}");
    let mut keyboard = console.stdin.take().unwrap();
    keyboard.write_all(b"count:1\npoweroff\n").unwrap();
    drop(keyboard);
    let heard = succeeded(console.wait_with_output().unwrap());
    assert!(heard.contains("count=3"), "{heard}");
    assert!(!user.machine_folder("web").exists());
}

/// Starts the tool on a terminal of its own, by util-linux.
fn on_a_terminal(tool: &Command) -> Child {
    let words: Vec<String> = std::iter::once(tool.get_program())
        .chain(tool.get_args())
        .map(|word| format!("'{}'", word.to_str().unwrap()))
        .collect();
    let mut script = Command::new("script");
    script.args(["--quiet", "--return", "--command", &words.join(" "), "/dev/null"]);
    script.envs(tool.get_envs().filter_map(|(name, value)| Some((name, value?))));
    script.stdin(Stdio::piped()).stdout(Stdio::piped());
    script
        .spawn()
        .expect("the script program is needed: apt-get install bsdutils")
}

#[test]
fn ctrl_c_while_a_machine_starts_ends_it_and_nobody_is_told_that_it_runs() {
    let user = saved();
    // Pressed as soon as there is a monitor.
    let monitor = user.folder().join("interrupting-vmm");
    let text = format!(
        "#!/bin/sh\nkill -INT $PPID\nexec '{}' \"$@\"\n",
        program("runnel-vmm").display()
    );
    fs::write(&monitor, text).unwrap();
    fs::set_permissions(&monitor, fs::Permissions::from_mode(0o700)).unwrap();
    for mut tool in [
        user.boot("count:1", &["--name", "booted"]),
        user.command(&["resume", "web", "--name", "resumed"]),
    ] {
        tool.env("RUNNEL_VMM", &monitor);
        let output = on_a_terminal(&tool).wait_with_output().unwrap();
        let shown = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(130), "{tool:?}: {shown}");
        assert!(!shown.contains("leaves its console"), "{tool:?}: {shown}");
        assert!(shown.contains("called off:"), "{tool:?}: {shown}");
    }
    assert_eq!(user.machines(), Vec::<Value>::new());
}

#[test]
fn ctrl_c_while_an_image_is_opened_says_that_nothing_was_started() {
    let user = User::new();
    let _agent = AgentOf(&user);
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/web", server.local_addr().unwrap());
    let resuming = user
        .command(&["resume", &url, "--name", "far", "--detach"])
        .spawn()
        .unwrap();
    // It is asked for the image, and does not answer.
    let _connection = server.accept().unwrap();
    signal(resuming.id(), "INT");
    let output = resuming.wait_with_output().unwrap();
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{told}");
    assert!(told.contains("called off: far was not started"), "{told}");
    assert_eq!(user.machines(), Vec::<Value>::new());
}

#[test]
fn a_log_is_printed_and_followed_to_the_end_of_its_machine_and_found_afterwards() {
    let user = User::new();
    let more = ["--detach", "--name", "web"];
    succeeded(user.boot("count:1", &more).output().unwrap());
    let begun = user.output(&["logs", "web"]);
    assert!(begun.contains("Running Runnel"), "{begun}");
    let following = user.command(&["logs", "web", "--follow"]).spawn().unwrap();
    let _ = user.converse("web", "poweroff\n");
    let followed = succeeded(following.wait_with_output().unwrap());
    assert!(followed.starts_with(&begun), "{followed}");
    assert!(followed.contains("Runnel exiting"), "{followed}");
    assert_eq!(user.output(&["logs", "web", "--follow"]), followed);
    let told = refusal(&user.run(&["logs", "nobody"]));
    assert!(told.contains("no machine named nobody"), "{told}");

    succeeded(user.boot("count:1", &more).output().unwrap());
    let mut following = user.command(&["logs", "web", "-f"]).spawn().unwrap();
    read_to(&mut following, "/actions");
    signal(following.id(), "INT");
    assert_eq!(following.wait().unwrap().code(), Some(130));
    assert_eq!(user.state_of("web"), "running");
}

#[test]
fn machines_are_waited_for_until_they_have_ended_or_the_time_is_over() {
    let user = User::new();
    for name in ["web", "db"] {
        succeeded(
            user.boot("count:1", &["--detach", "--name", name])
                .output()
                .unwrap(),
        );
    }
    let told = refusal(&user.run(&["wait", "web", "nobody"]));
    assert!(told.contains("no machine was waited for"), "{told}");

    let waiting = user.command(&["wait", "web", "db", "web"]).spawn().unwrap();
    let _ = user.converse("web", "poweroff\n");
    user.output(&["wait", "web"]);
    let over = user.run(&["wait", "web", "db", "--timeout", "100ms", "--json"]);
    assert_eq!(over.status.code(), Some(3));
    let shown: Value = serde_json::from_slice(&over.stdout).unwrap();
    assert_eq!(
        (&shown[0]["name"], &shown[0]["code"]),
        (&"web".into(), &0.into()),
        "{shown}"
    );
    assert_eq!(
        (&shown[1]["name"], &shown[1]["ended"]),
        (&"db".into(), &false.into()),
        "{shown}"
    );
    assert!(
        text(&over.stderr).contains("db did not end within"),
        "{}",
        text(&over.stderr)
    );

    let _ = user.converse("db", "triplefault\n");
    let told = succeeded(waiting.wait_with_output().unwrap());
    assert_eq!(
        told,
        "web has ended: the guest switched itself off\ndb has ended with code 3: the guest ended in a triple fault\n"
    );
    // Those that have ended are.
    assert_eq!(
        user.output(&["wait", "web"]),
        "web has ended: the guest switched itself off\n"
    );
}

#[test]
fn where_standard_output_takes_nothing_it_is_named_and_where_it_is_closed_nothing_is_said() {
    let user = User::new();
    let nowhere = || fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    for arguments in [
        &["ps"][..],
        &["ps", "--json"],
        &["image", "ls"],
        &["doctor"],
        &["completions", "bash"],
    ] {
        let output = user.command(arguments).stdout(nowhere()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        let told = text(&output.stderr);
        assert!(
            told.contains("standard output") && told.contains("No space left"),
            "{arguments:?}: {told}"
        );

        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = user.command(arguments).stdout(writer).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert!(
            !text(&output.stderr).contains("ipe"),
            "{arguments:?}: {}",
            text(&output.stderr)
        );
    }
    // A console, too: its machine goes with it.
    let output = user
        .boot("count:1", &["--name", "web"])
        .stdout(nowhere())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("standard output"),
        "{}",
        text(&output.stderr)
    );
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut closed = user.boot("count:1", &["--name", "web"]);
    let output = closed.stdout(writer).output().unwrap();
    assert_eq!(
        (output.status.code(), text(&output.stderr)),
        (Some(0), String::new())
    );
    assert_eq!(user.machines(), Vec::<Value>::new());
}

#[test]
fn a_machine_is_shown_from_where_its_agent_reads_now() {
    let user = saved();
    let _agent = AgentOf(&user);
    let servers = [user.serve(&[]), user.serve(&[])];
    let urls = servers.each_ref().map(|server| format!("{}/web", server.url()));
    for (url, name) in urls.iter().zip(["first", "second"]) {
        succeeded(user.run(&["resume", url, "--detach", "--name", name]));
    }
    let first = user.machines().remove(0);
    assert_eq!(
        (first["image"].as_str(), first["read_at"].as_str()),
        (Some(&*urls[0]), Some(&*urls[1]))
    );
    let listed = user.output(&["ps"]);
    assert!(
        listed.contains(&format!("first was resumed from {}", urls[0])),
        "{listed}"
    );
}

#[test]
fn a_snapshot_of_what_has_not_arrived_says_once_what_is_missing_and_what_to_do() {
    let user = User::new();
    let mut served = Served::new();
    let _agent = AgentOf(&user);
    let mut agent = user.command(&["agent", "--fill-rate", "256"]).spawn().unwrap();
    read_to(&mut agent, "listens at");
    let stalls = ["--stall-after", "200ms", "--detach", "--name", "web"];
    succeeded(user.run(&[&["resume", &served.url()], &stalls[..]].concat()));
    served.stop_server();
    let told = refusal(&user.run(&["snapshot", "web", "web"]));
    assert!(
        told.contains("Connection refused") && told.matches("of memory cannot be had").count() == 1,
        "{told}"
    );
    assert_eq!(told.matches("chunk ").count(), 1, "{told}");
    assert!(
        told.contains("try again") && told.contains("`runnel resume http://OTHER/bare`"),
        "{told}"
    );
    assert_eq!(user.state_of("web"), "running");
    user.output(&["kill", "web"]);
    user.output(&["agent", "--stop"]);
    agent.wait().unwrap();
}

#[test]
fn a_second_console_is_told_of_the_first_and_comes_after_it() {
    let user = User::new();
    let mut first = on_a_terminal(&user.boot("count:1", &["--name", "web"]));
    read_to(&mut first, "count=1");
    let mut second = user
        .command(&["console", "web"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(second.stderr.take().unwrap()).lines();
    let told = lines.next().unwrap().unwrap();
    assert!(told.contains("another console of web is open"), "{told}");
    first.stdin.as_mut().unwrap().write_all(b"\x1d").unwrap();
    assert!(first.wait().unwrap().success());
    let mut keyboard = second.stdin.take().unwrap();
    keyboard.write_all(b"count:1\npoweroff\n").unwrap();
    drop(keyboard);
    assert!(succeeded(second.wait_with_output().unwrap()).contains("count=2"));
}

#[test]
fn the_key_that_leaves_a_console_lets_the_machine_run_on() {
    let user = User::new();
    let mut terminal = on_a_terminal(&user.boot("count:1", &["--name", "web"]));
    read_to(&mut terminal, "count=1");
    terminal.stdin.as_mut().unwrap().write_all(b"\x1d").unwrap();
    let mut rest = String::new();
    terminal
        .stdout
        .as_mut()
        .unwrap()
        .read_to_string(&mut rest)
        .unwrap();
    assert!(terminal.wait().unwrap().success(), "{rest}");
    assert!(rest.contains("runnel console web"), "{rest}");
    assert_eq!(user.state_of("web"), "running");
}

#[test]
fn a_signal_to_the_command_ends_the_machine_in_the_foreground() {
    let user = User::new();
    let mut tool = user.boot("count:1", &["--name", "web"]).spawn().unwrap();
    read_to(&mut tool, "count=1");
    signal(tool.id(), "TERM");
    assert_eq!(tool.wait().unwrap().code(), Some(128 + 15));
    assert_eq!(user.machines(), Vec::<Value>::new());
    assert!(!user.machine_folder("web").exists());
}

#[test]
fn a_monitor_that_was_killed_gives_its_name_free_and_leaves_its_log() {
    let user = User::new();
    succeeded(user.boot("", &["--detach", "--name", "web"]).output().unwrap());
    signal(&user.machines()[0]["pid"], "KILL");
    // The kernel may take a moment; `console` would wait for what is not there.
    while !user.machines().is_empty() {
        std::thread::yield_now();
    }
    let told = text(&user.run(&["pause", "web"]).stderr);
    assert!(told.contains("it has ended; its log is"), "{told}");
    succeeded(user.boot("", &["--detach", "--name", "web"]).output().unwrap());
    assert_eq!(user.state_of("web"), "running");
}

#[test]
fn a_machine_that_cannot_be_had_leaves_nothing() {
    let user = User::new();
    let no_kernel = user.folder().join("no-kernel");
    fs::write(&no_kernel, "this is none").unwrap();
    let output = user.run(&["run", "--kernel", no_kernel.to_str().unwrap(), "--name", "web"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(!output.stderr.is_empty());
    assert_eq!(user.machines(), Vec::<Value>::new());
    assert!(!user.machine_folder("web").exists());
    // What was mistyped is said whole, and no log has more of it.
    let told = refusal(&user.run(&["run", "--kernel", "/nope", "--name", "web"]));
    assert!(told.contains("/nope") && !told.contains("log"), "{told}");
}

#[test]
fn refusals_of_the_monitor_come_in_the_tools_words_with_the_next_step() {
    let user = User::new();
    let drive = user.folder().join("drive");
    fs::write(&drive, vec![0; 1 << 20]).unwrap();
    let flag = format!("id=data,path={}", drive.display());
    let twin = format!("id=twin,path={}", drive.display());
    let twice = user
        .boot("", &["--drive", &flag, "--drive", &twin, "--name", "twins"])
        .output();
    let told = refusal(&twice.unwrap());
    assert!(told.contains("given twice to this machine"), "{told}");
    let log = told.trim_end().rsplit_once(" is ").unwrap().1;
    assert!(Path::new(log).is_file(), "{told}");

    let more = ["--detach", "--name", "web", "--drive", &flag];
    succeeded(user.boot("count:1", &more).output().unwrap());
    let told = refusal(&user.run(&["snapshot", "web", "web", "--exclude", "nobody"]));
    assert!(told.contains("`--exclude` names nobody"), "{told}");
    let nowhere = user.folder().join("no/where/web");
    let told = refusal(&user.run(&["snapshot", "web", nowhere.to_str().unwrap()]));
    assert!(told.contains("mkdir -p") && told.contains("no/where"), "{told}");
    let told = refusal(&user.run(&["stop", "web"]));
    assert!(
        told.contains("runnel kill web") && told.contains("keyboard"),
        "{told}"
    );
    assert!(!told.contains("Internal"), "{told}");

    user.output(&["snapshot", "web", "web", "--exclude", "data"]);
    user.output(&["kill", "web"]);
    let inspected = user.output(&["inspect", "web"]);
    assert!(inspected.contains("--drive data=PATH"), "{inspected}");
    let told = refusal(&user.run(&["resume", "web", "--detach"]));
    assert!(told.contains("`--drive ID=PATH`"), "{told}");
    let other = user.folder().join("other");
    fs::write(&other, vec![0; 2 << 20]).unwrap();
    let other = format!("data={}", other.display());
    let told = refusal(&user.run(&["resume", "web", "--detach", "--drive", &other]));
    assert!(told.contains("has 2097152: give the file that it had"), "{told}");
    let told = refusal(&user.run(&["resume", "web", "--detach", "--tap", "eth0=tap0"]));
    assert!(told.contains("`--tap` names eth0"), "{told}");
    assert_eq!(user.machines(), Vec::<Value>::new());
}

#[test]
fn firecrackers_configuration_file_boots() {
    let user = User::new();
    let path = user.folder().join("config.json");
    let config = serde_json::json!({
        "boot-source": { "kernel_image_path": bare_guest(), "boot_args": "count:1 poweroff" },
        "machine-config": { "vcpu_count": 2, "mem_size_mib": 64 },
        "drives": [],
    });
    fs::write(&path, config.to_string()).unwrap();
    let heard = user.output(&["run", "--config", path.to_str().unwrap()]);
    assert!(heard.contains("count=1"), "{heard}");

    let mut wrong = config;
    wrong["machine-config"]["mem_size_mib"] = "64".into();
    fs::write(&path, wrong.to_string()).unwrap();
    let told = refusal(&user.run(&["run", "--config", path.to_str().unwrap()]));
    assert!(told.contains("machine-config of the configuration"), "{told}");
    assert!(told.contains("config.json") && !told.contains("line 1"), "{told}");
}

/// The number in the last line of `count=…`.
fn last_count(heard: &str) -> u64 {
    let mut lines = heard
        .lines()
        .filter_map(|line| line.trim().strip_prefix("count="));
    lines.next_back().expect("it counted").parse().unwrap()
}

/// A user with an image `web` of a machine that has counted to 5.
fn saved() -> User {
    let user = User::new();
    let mut tool = user.boot("count:5", &["--name", "web"]).spawn().unwrap();
    read_to(&mut tool, "count=5");
    let shown: Value = serde_json::from_str(&user.output(&["snapshot", "web", "web", "--json"])).unwrap();
    assert_eq!(shown["volume_bytes"], 64 << 20);
    assert!(shown["stored_bytes"].as_u64().unwrap() < 8 << 20, "{shown}");
    assert!(
        shown["pause_ms"].as_u64() <= shown["elapsed_ms"].as_u64(),
        "{shown}"
    );
    assert!(shown["pause_ms"].is_u64(), "{shown}");
    assert_eq!(user.state_of("web"), "running");
    signal(tool.id(), "TERM");
    tool.wait().unwrap();
    user
}

#[test]
fn a_machine_is_saved_while_it_runs_and_goes_on_from_its_image() {
    let user = saved();
    user.output(&["verify", "web"]);
    let inspected = user.output(&["inspect", "web"]);
    assert!(inspected.contains("vcpu v"), "{inspected}");

    let listed: Value = serde_json::from_str(&user.output(&["image", "ls", "--json"])).unwrap();
    let modified = listed["images"][0]["modified"].as_str().unwrap();
    assert!(modified.starts_with("20") && modified.ends_with('Z'), "{listed}");

    let resumed = user.run(&["resume", "web", "--detach", "--name", "again", "--verbose"]);
    let told = text(&resumed.stderr);
    succeeded(resumed);
    assert!(told.contains("the monitor of again is process"), "{told}");
    let machine = user.machines().remove(0);
    assert_eq!(
        (&machine["vcpus"], &machine["memory_mib"]),
        (&1.into(), &64.into())
    );
    assert!(
        machine["image"].as_str().unwrap().ends_with("images/web"),
        "{machine}"
    );
    let refused = user.run(&["image", "rm", "web"]);
    assert!(
        text(&refused.stderr).contains("again"),
        "{}",
        text(&refused.stderr)
    );
    assert_eq!(last_count(&user.converse("again", "count:2\npoweroff\n")), 7);
    user.output(&["image", "rm", "web"]);
}

#[test]
fn a_machine_that_was_loaded_paused_stands_still_until_it_is_told() {
    let user = saved();
    succeeded(user.run(&["resume", "web", "--detach", "--paused", "--name", "again"]));
    assert_eq!(user.state_of("again"), "paused");
    user.output(&["unpause", "again"]);
    assert_eq!(last_count(&user.converse("again", "count:1\npoweroff\n")), 6);
}

#[test]
fn an_image_that_is_there_already_is_not_replaced() {
    let user = saved();
    succeeded(
        user.boot("count:1", &["--detach", "--name", "other"])
            .output()
            .unwrap(),
    );
    let output = user.run(&["snapshot", "other", "web"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("exists already"),
        "{}",
        text(&output.stderr)
    );
    user.output(&["verify", "web"]);
}

/// What an agent that `resume` started leaves in shared memory.
struct AgentOf<'u>(&'u User);

impl Drop for AgentOf<'_> {
    fn drop(&mut self) {
        let _ = self.0.run(&["kill", "--all"]);
        let _ = self.0.run(&["agent", "--stop"]);
        let _ = fs::remove_dir_all(pages_of(self.0));
    }
}

/// Where the user's agent keeps pages of memory.
fn pages_of(user: &User) -> PathBuf {
    let socket = user.folder().join("runnel/agent/agent.sock");
    let own = BlobDigest::of(socket.as_os_str().as_encoded_bytes()).hex();
    let uid = fs::metadata(user.folder()).unwrap().uid();
    format!("/dev/shm/runnel-{uid}-{}", &own[..8]).into()
}

#[test]
fn a_machine_is_resumed_from_a_server_by_an_agent_that_is_started_for_it() {
    let user = saved();
    let _agent = AgentOf(&user);
    let mut server = user
        .command(&["serve", "--listen", "127.0.0.1:0"])
        .spawn()
        .unwrap();
    let line = read_to(&mut server, "serving at");
    let url = line
        .split([' ', ';'])
        .find(|word| word.starts_with("http://"))
        .unwrap();
    let resumed = user.run(&["resume", &format!("{url}/web"), "--detach", "--name", "far"]);
    succeeded(resumed);
    assert_eq!(last_count(&user.converse("far", "count:2\npoweroff\n")), 7);

    let status: Value = serde_json::from_str(&user.output(&["agent", "--status", "--json"])).unwrap();
    assert!(
        status["images"][0]["bytes_received"].as_u64().unwrap() > 0,
        "{status}"
    );
    let memory = &status["cache"]["memory"];
    let bytes = |what: &str| memory[what].as_u64().unwrap();
    assert!(
        0 < bytes("bytes") && bytes("bytes") < bytes("bytes_max"),
        "{memory}"
    );
    assert!(
        status["images"][0]["bytes_kept"].as_u64().unwrap() > 0,
        "{status}"
    );
    let told = user.output(&["agent", "status"]);
    for what in ["KEPT", "SAVED", "pages of memory take ", "pages of drives take "] {
        assert!(told.contains(what), "{told}");
    }
    signal(server.id(), "TERM");
    assert!(server.wait().unwrap().success());
    user.output(&["agent", "--stop"]);
    assert_eq!(user.run(&["agent", "--status"]).status.code(), Some(1));
    assert!(!pages_of(&user).exists(), "nothing is left in shared memory");
    assert!(!user.folder().join("cache/runnel").exists(), "nor of drives");
}

#[test]
fn what_a_machine_from_afar_changed_is_saved_without_the_rest_which_is_fetched_when_it_is_wanted() {
    let user = saved();
    let _agent = AgentOf(&user);
    let server = user.serve(&["web"]);
    let url = server.url().trim_end_matches("/web");
    succeeded(user.run(&["resume", &format!("{url}/web"), "--detach", "--name", "far"]));
    let saved: Value =
        serde_json::from_str(&user.output(&["snapshot", "far", "thin", "--diff", "--json"])).unwrap();
    assert!(saved["bytes_elsewhere"].as_u64().unwrap() > 0, "{saved}");
    assert_eq!(last_count(&user.converse("far", "count:1\npoweroff\n")), 6);

    let told = user.output(&["verify", "thin"]);
    assert!(
        told.contains("is sound") && told.contains("1 layers are on other hosts"),
        "{told}"
    );
    let inspected = user.output(&["inspect", "thin"]);
    assert!(
        inspected.contains(&format!("{url}/v2/web/blobs/sha256:")),
        "{inspected}"
    );
    let told = refusal(&user.run(&["image", "squash", "thin", "squashed"]));
    assert!(told.contains("`runnel image complete`"), "{told}");
    // Through the agent, though it is an image of this host.
    succeeded(user.run(&["resume", "thin", "--detach", "--name", "again"]));
    assert_eq!(last_count(&user.converse("again", "count:2\npoweroff\n")), 7);

    let completed: Value =
        serde_json::from_str(&user.output(&["image", "complete", "thin", "--json"])).unwrap();
    assert_eq!(completed["layers_fetched"], 1, "{completed}");
    assert_eq!(completed["digest"], saved["digest"]);
    assert_eq!(completed["bytes_fetched"], saved["bytes_elsewhere"]);
    drop(server);
    let told = user.output(&["image", "complete", "thin"]);
    assert!(told.contains("nothing was missing"), "{told}");
    assert!(!user.output(&["verify", "thin"]).contains("other hosts"));
    user.output(&["agent", "--stop"]);
    succeeded(user.run(&["resume", "thin", "--detach", "--name", "here"]));
    assert_eq!(last_count(&user.converse("here", "count:2\npoweroff\n")), 7);
    user.output(&["image", "squash", "thin", "squashed"]);
}

#[test]
fn a_guest_that_takes_part_in_snapshots_is_asked_as_the_flags_say() {
    let user = User::new();
    let more = ["--detach", "--name", "web", "--guest-channel"];
    succeeded(user.boot("count:1", &more).output().unwrap());
    assert_eq!(user.machines()[0]["guest_agent"], false);
    let told = refusal(&user.run(&["snapshot", "web", "web", "--guest-hook"]));
    assert!(told.contains("no agent in the guest"), "{told}");
    user.output(&["snapshot", "web", "unasked"]);

    user.output(&["kill", "web"]);

    succeeded(user.boot("agenthello", &more).output().unwrap());
    wait_until("its agent announces itself", || {
        user.machines()[0]["guest_agent"] == true
    });
    let slow = ["--guest-hook", "--hook-deadline", "100ms"];
    let told = refusal(&user.run(&[&["snapshot", "web", "web"][..], &slow].concat()));
    assert!(told.contains("did not say within 100 ms"), "{told}");
    let slow = ["--guest-hook=proceed", "--hook-deadline", "100ms"];
    user.output(&[&["snapshot", "web", "web"][..], &slow].concat());
    user.output(&["snapshot", "web", "off", "--guest-hook=off"]);

    user.output(&["kill", "web"]);
    succeeded(
        user.boot("count:1", &["--detach", "--name", "deaf"])
            .output()
            .unwrap(),
    );
    assert_eq!(user.machines()[0]["guest_agent"], Value::Null);
    let told = refusal(&user.run(&["snapshot", "deaf", "deaf", "--guest-hook"]));
    assert!(
        told.contains("run --guest-channel") && told.contains("--guest-hook"),
        "{told}"
    );
}

#[test]
fn what_a_snapshot_that_was_cut_short_left_is_named_before_it_goes() {
    let user = User::new();
    let left = user.folder().join("images/.web.partial-1-1");
    fs::create_dir_all(&left).unwrap();
    let named = user.output(&["image", "prune", "--dry-run"]);
    assert_eq!(named, format!("would remove {}\n", left.display()));
    assert!(left.is_dir());
    let removed = user.output(&["image", "prune"]);
    assert_eq!(removed, format!("removed {}\n", left.display()));
    assert!(!left.exists());
}

#[test]
fn an_image_of_which_nothing_can_be_read_is_listed_and_can_be_removed() {
    let user = User::new();
    let images = user.folder().join("images");
    for name in ["no-list", "no-mark"] {
        fs::create_dir_all(images.join(name).join("blobs/sha256")).unwrap();
        fs::write(images.join(name).join("index.json"), "junk").unwrap();
    }
    fs::write(
        images.join("no-list/oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
    fs::create_dir(images.join("notes")).unwrap();
    let listed: Value = serde_json::from_str(&user.output(&["image", "ls", "--json"])).unwrap();
    let broken = listed["broken"].as_array().unwrap();
    let names: Vec<_> = broken
        .iter()
        .map(|broken| broken["path"].as_str().unwrap().rsplit('/').next().unwrap())
        .collect();
    assert_eq!(names, ["no-list", "no-mark"], "{listed}");
    let told = text(&user.run(&["image", "ls"]).stderr);
    assert!(told.contains("`runnel image rm no-list` removes it"), "{told}");

    user.output(&["image", "rm", "no-list", "no-mark"]);
    let told = refusal(&user.run(&["image", "rm", "notes"]));
    assert!(told.contains("no image named notes"), "{told}");
    assert!(images.join("notes").is_dir() && !images.join("no-list").exists());
}

#[test]
fn where_standard_error_takes_nothing_a_failure_is_still_one_and_an_agent_still_serves() {
    let user = User::new();
    let nowhere = || fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    for arguments in [&["pause", "nobody"][..], &["--verbose", "inspect", "nothing"]] {
        let status = user.command(arguments).stderr(nowhere()).status().unwrap();
        assert_eq!(status.code(), Some(1), "{arguments:?}");
    }

    let socket = user.folder().join("agent.sock");
    let agent = || {
        let mut command = Command::new(program("runnel-agent"));
        for (flag, name) in [("--memory-pages", "memory"), ("--drive-pages", "drives")] {
            command.arg(flag).arg(user.folder().join(name));
        }
        command.arg("--socket").arg(&socket).stderr(nowhere());
        command
    };
    let mut first = agent().spawn().unwrap();
    wait_until("the agent answers", || {
        assert_eq!(first.try_wait().unwrap(), None);
        is_answering(&socket)
    });
    // Its directories are the first one's.
    assert_eq!(agent().status().unwrap().code(), Some(1));
    signal(first.id(), "TERM");
    assert_eq!(first.wait().unwrap().code(), Some(0));
}

#[test]
fn what_cannot_be_meant_is_refused_with_what_to_do_before_anything_is_started() {
    let user = User::new();
    for (arguments, hint) in [
        (&["serve", "x="][..], "NAME=IMAGE"),
        (&["resume", "./nope"], "no such directory"),
        (&["inspect", "http:/10.0.0.1/web"], "http://"),
        (&["resume", "http://u:secret@127.0.0.1/web"], "--credentials"),
        (&["inspect", "http://127.0.0.1:99999/web"], "65535"),
        (
            &["resume", "http://127.0.0.1:9/web", "--credentials", "/nope"],
            "/nope cannot be read",
        ),
        (
            &["resume", "http://127.0.0.1:9/web", "--tls-ca", "/nope"],
            "--tls-ca",
        ),
        (&["resume", "web", "--overlay-directory", "/nope"], "mkdir -p"),
        (&["agent", "--socket", "/nope/agent.sock"], "--socket"),
    ] {
        let told = refusal(&user.run(arguments));
        assert!(
            told.contains(hint) && !told.contains("secret"),
            "{arguments:?}: {told}"
        );
    }
    for (arguments, hint) in [
        (&["run"][..], "--config"),
        (&["serve", "--max-connections", "0"], "at least 1"),
        (&["verify", "web", "--threads", "0"], "at least 1"),
        (&["run", "--kernel", "k", "--net", "tap=t,mac=zz"], "six pairs"),
        (&["resume", "web", "--drive", "rootfs"], "ID=PATH"),
    ] {
        let output = user.run(arguments);
        let told = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {told}");
        assert!(told.contains(hint), "{arguments:?}: {told}");
    }
    assert!(!user.folder().join("runnel/agent/agent.log").exists());
}

#[test]
fn a_runtime_directory_that_cannot_be_used_is_named_with_what_to_do() {
    let user = User::new();
    let told = |folder: &Path, arguments: &[&str]| {
        let output = user.command(arguments).env("XDG_RUNTIME_DIR", folder).output();
        refusal(&output.unwrap())
    };
    let missing = user.folder().join("missing");
    let refused = told(&missing, &["ps"]);
    assert!(
        refused.contains("XDG_RUNTIME_DIR is") && refused.contains("mkdir"),
        "{refused}"
    );
    let open = user.folder().join("open to all");
    fs::create_dir(&open).unwrap();
    let mine = fs::metadata(&open).unwrap().uid();
    for mode in [0o777, 0o1777, 0o770] {
        fs::set_permissions(&open, fs::Permissions::from_mode(mode)).unwrap();
        let refused = told(&open, &["ps"]);
        let found = format!("of user {mine} with mode {mode:o}");
        let advice = format!("`chmod 700 '{}'`", open.display());
        assert!(refused.contains(&found) && refused.contains(&advice), "{refused}");
        assert!(!open.join("runnel").exists());
    }
    fs::set_permissions(&open, fs::Permissions::from_mode(0o700)).unwrap();
    // Only root can make it somebody else's.
    if std::os::unix::fs::chown(&open, Some(mine + 1), None).is_ok() {
        let refused = told(&open, &["ps"]);
        assert!(
            refused.contains(&format!("of user {}", mine + 1))
                && refused.contains(&format!("must be of user {mine}")),
            "{refused}"
        );
    }
    let refused = told(Path::new("run"), &["ps"]);
    assert!(refused.contains("must be an absolute path"), "{refused}");
    let long = user.folder().join("x".repeat(100));
    fs::create_dir(&long).unwrap();
    let refused = told(&long, &["resume", "http://127.0.0.1:9/web"]);
    assert!(refused.contains("too long for a unix socket"), "{refused}");
}

#[test]
fn an_image_that_is_served_names_who_serves_it_and_stays() {
    let user = saved();
    let mut server = user
        .command(&["serve", "web", "web", "--listen", "127.0.0.1:0"])
        .spawn()
        .unwrap();
    read_to(&mut server, "/web");
    let told = refusal(&user.run(&["image", "rm", "web"]));
    let by = format!("process {}", server.id());
    assert!(
        told.contains(&by) && told.contains("nothing was removed"),
        "{told}"
    );
    signal(server.id(), "TERM");
    assert!(server.wait().unwrap().success());
    user.output(&["image", "rm", "web"]);
}

#[test]
fn an_image_is_saved_here_and_not_at_a_server_and_a_paused_console_says_so() {
    let user = User::new();
    let more = ["--detach", "--name", "web"];
    succeeded(user.boot("count:1", &more).output().unwrap());
    for (target, hint) in [
        ("http://127.0.0.1:5000/web", "never pushed"),
        ("./", "as in ./web"),
    ] {
        let told = refusal(&user.run(&["snapshot", "web", target]));
        assert!(told.contains(hint), "{told}");
    }
    user.output(&["pause", "web"]);
    let told = refusal(&user.run(&["stop", "web"]));
    for hint in ["web is paused", "`runnel unpause web`", "`runnel kill web`"] {
        assert!(told.contains(hint), "{told}");
    }
    let mut console = user.command(&["console", "web"]).spawn().unwrap();
    let mut lines = BufReader::new(console.stderr.take().unwrap()).lines();
    let told = lines.next().unwrap().unwrap();
    assert!(told.contains("`runnel unpause web`"), "{told}");
    user.output(&["kill", "web"]);
    console.wait().unwrap();
}

#[test]
fn every_command_has_a_manual_page() {
    let user = User::new();
    let pages = user.folder().join("man1");
    let told = refusal(&user.run(&["man", pages.to_str().unwrap()]));
    assert!(told.contains("its folder must be there"), "{told}");
    fs::create_dir(&pages).unwrap();
    user.output(&["man", pages.to_str().unwrap()]);
    for name in ["runnel", "runnel-resume", "runnel-image-prune", "runnel-man"] {
        let page = fs::read_to_string(pages.join(format!("{name}.1"))).unwrap();
        assert!(page.contains(".SH SYNOPSIS"), "{name}");
    }
}

/// The phase is held by the monitor, if it was built for tests.
#[test]
fn a_machine_that_stands_while_it_is_saved_is_said_to_be_saving() {
    let user = User::new();
    let boot = user
        .boot("count:1", &["--detach", "--name", "web"])
        .env("RUNNEL_HOLD_PHASE", "saving state")
        .output();
    succeeded(boot.unwrap());
    let saving = user.command(&["snapshot", "web", "web"]).spawn().unwrap();
    wait_until("it stands to be saved", || {
        user.machines()[0]["operation"]["phase"] == "saving state"
    });
    assert_eq!(user.state_of("web"), "saving");
    let listed = user.output(&["ps"]);
    assert!(
        listed.contains("web is being saved, and stands meanwhile"),
        "{listed}"
    );
    signal(saving.id(), "INT");
    assert_eq!(saving.wait_with_output().unwrap().status.code(), Some(130));
    assert_eq!(user.state_of("web"), "running");
}

#[test]
fn a_monitor_that_is_killed_while_it_saves_is_said_to_have_ended_and_its_log_is_named() {
    let user = User::new();
    let more = ["--detach", "--name", "web"];
    succeeded(user.boot("count:1", &more).output().unwrap());
    let monitor = user.machines()[0]["pid"].clone();
    // It takes connections, and answers none.
    signal(&monitor, "STOP");
    let tool = user.command(&["snapshot", "web", "web"]).spawn().unwrap();
    let sockets = || {
        let files = fs::read_dir(format!("/proc/{}/fd", tool.id())).unwrap();
        let targets = files.flatten().filter_map(|file| fs::read_link(file.path()).ok());
        targets
            .filter(|target| target.to_string_lossy().starts_with("socket:"))
            .count()
    };
    // The request's, and then that of whoever asks how far it is.
    wait_until("the tool asks twice", || sockets() == 2);
    signal(&monitor, "KILL");
    let told = refusal(&tool.wait_with_output().unwrap());
    assert!(told.contains("web has ended while it was saved"), "{told}");
    let log = user.folder().join("runnel/ended/web.log");
    assert!(told.contains(log.to_str().unwrap()) && log.is_file(), "{told}");
}
