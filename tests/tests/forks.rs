//! Forks: machines of one image, or of a machine that runs, which share what they do not write.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::process::Stdio;

use runnel_snapshot::image::Image;
use runnel_snapshot::image::reference::Wanted;
use runnel_tests::signal;
use runnel_tests::user::{User, read_to, refusal, succeeded};
use runnel_vmm::layout::VMGENID;
use serde_json::Value;

/// A user with a machine called web, which has obeyed `words` and listens.
fn with_machine(words: &str) -> User {
    let user = User::new();
    let more = ["--detach", "--name", "web"];
    succeeded(user.boot(words, &more).output().unwrap());
    hear(&user, "web", "", "listening=1");
    user
}

/// Types `words` at a machine's console, and waits until it has said `answer`.
fn hear(user: &User, machine: &str, words: &str, answer: &str) {
    let mut command = user.command(&["console", machine]);
    let mut console = command.stdin(Stdio::piped()).spawn().unwrap();
    console
        .stdin
        .as_mut()
        .unwrap()
        .write_all(words.as_bytes())
        .unwrap();
    read_to(&mut console, answer);
    console.kill().unwrap();
    console.wait().unwrap();
}

/// The clones that `fork` says it has made.
fn forked(user: &User, arguments: &[&str]) -> Vec<String> {
    let printed = user.output(&[&["fork"], arguments].concat());
    printed.lines().map(str::to_owned).collect()
}

/// What a machine says to `words`, and then to being switched off.
fn last_words(user: &User, machine: &str, words: &str) -> String {
    user.converse(machine, &format!("{words}\npoweroff\n"))
}

/// KiB that are a process's alone.
fn private_kib(pid: &Value) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let of = |name: &str| {
        let line = rollup.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    of("Private_Clean:") + of("Private_Dirty:")
}

#[test]
fn clones_of_an_image_go_on_from_it_each_by_itself() {
    let user = with_machine("fill:8m:256k:7 count:3");
    user.output(&["snapshot", "web", "web-v1"]);
    user.output(&["kill", "web"]);
    // They stand until it is their turn: a bare guest that listens takes a processor.
    let clones = forked(&user, &["web-v1", "-n", "3", "--paused"]);
    assert_eq!(clones, ["web-v1-1", "web-v1-2", "web-v1-3"]);
    assert_eq!(user.machines().len(), 3);
    let mut identities = BTreeSet::new();
    for (number, clone) in clones.iter().enumerate() {
        user.output(&["unpause", clone]);
        // As many counts as its number says, and what the one before it wrote is not there.
        let words = format!(
            "count:{}\ncheckfill:8m:256k:7\nfill:8m:256k:{}\npeek:{:#x}\npeek:{:#x}\npeek:{:#x}",
            number + 1,
            number + 20,
            VMGENID.start,
            VMGENID.start + 8,
            VMGENID.start + 1,
        );
        let heard = last_words(&user, clone, &words);
        assert!(heard.contains("checkfill=right"), "{clone}: {heard}");
        assert!(
            heard.contains(&format!("count={}", number + 4)),
            "{clone}: {heard}"
        );
        let identity: Vec<&str> = heard.lines().filter(|line| line.contains("peek=")).collect();
        assert_eq!(identity.len(), 3, "{heard}");
        assert!(
            identities.insert(identity.join(" ")),
            "{clone} has another's VMGENID"
        );
    }
}

#[test]
fn what_clones_do_not_write_is_there_once() {
    const FILLED_KIB: u64 = 24 << 10;
    let user = with_machine("fill:8m:24m:7 count:1");
    user.output(&["snapshot", "web", "web-v1"]);
    user.output(&["kill", "web"]);
    let printed = user.output(&[
        "fork", "web-v1", "-n", "3", "--name", "c", "--first", "7", "--json",
    ]);
    let told: Value = serde_json::from_str(&printed).unwrap();
    let machines = told["machines"].as_array().unwrap();
    let names: Vec<&str> = machines
        .iter()
        .map(|machine| machine["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["c-7", "c-8", "c-9"]);
    // Each reads all of it.
    for name in names {
        user.output(&["unpause", name]);
        hear(&user, name, "touch:8m:24m\n", "touch=");
        user.output(&["pause", name]);
    }
    let own: Vec<u64> = user
        .machines()
        .iter()
        .map(|machine| private_kib(&machine["pid"]))
        .collect();
    assert!(
        own.iter().all(|own| *own < FILLED_KIB / 2),
        "KiB that are their own: {own:?}"
    );
    let agent: Value = serde_json::from_str(&user.output(&["agent", "--status", "--json"])).unwrap();
    let kept = agent["cache"]["memory"]["bytes"].as_u64().unwrap();
    assert!(
        (FILLED_KIB << 10..2 * (FILLED_KIB << 10)).contains(&kept),
        "{kept}"
    );
}

#[test]
fn a_machine_that_runs_is_forked_as_it_is_and_goes_on() {
    let user = with_machine("fill:8m:256k:7 count:3");
    let clones = forked(&user, &["web", "-n", "2", "--paused"]);
    assert_eq!(clones, ["web-1", "web-2"]);
    assert_eq!(user.state_of("web"), "running");
    user.output(&["unpause", "web-1"]);
    for clone in ["web-1", "web"] {
        let heard = last_words(&user, clone, "count:1\ncheckfill:8m:256k:7");
        assert!(
            heard.contains("count=4") && heard.contains("checkfill=right"),
            "{heard}"
        );
    }
    // A clone is forked in turn: what it wrote, over the image that it came from.
    let clones = forked(&user, &["web-2", "-n", "1", "--image", "again"]);
    assert_eq!(clones, ["web-2-1"]);
    let heard = last_words(&user, "web-2-1", "count:1");
    assert!(heard.contains("count=4"), "{heard}");
    let image = Image::open_directory(&user.folder().join("images/again"), &Wanted::Only).unwrap();
    assert!(image.manifest.parent.is_some());
    assert_eq!(
        image.manifest.volumes[0].layers.len(),
        2,
        "what it wrote, and nothing else"
    );
    // A second fork of one machine is of an image of its own.
    let user = with_machine("count:1");
    forked(&user, &["web", "-n", "1", "--paused"]);
    forked(&user, &["web", "-n", "1", "--name", "other", "--paused"]);
    for image in ["web-fork", "web-fork-2"] {
        assert!(user.folder().join("images").join(image).exists(), "{image}");
    }
}

/// The file behind a machine's memory, by its inode.
fn memory_file(pid: &Value) -> String {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let line = maps.lines().find(|line| line.contains("/memfd:guest-ram"));
    let line = line.unwrap_or_else(|| panic!("its memory is no machine's own: {maps}"));
    line.split_whitespace().nth(4).unwrap().to_owned()
}

#[test]
fn clones_of_a_machine_that_was_booted_share_its_memory_with_it() {
    const FILLED_KIB: u64 = 24 << 10;
    let user = with_machine("fill:8m:24m:7 count:1");
    let clones = forked(&user, &["web", "-n", "2", "--name", "c", "--paused"]);
    let all: Vec<&str> = clones.iter().map(String::as_str).chain(["web"]).collect();
    user.output(&["pause", "web"]);
    // Each reads all of it, one after the other.
    for name in &all {
        user.output(&["unpause", name]);
        hear(&user, name, "touch:8m:24m\n", "touch=");
        user.output(&["pause", name]);
    }
    let machines = user.machines();
    let files: BTreeSet<String> = machines
        .iter()
        .map(|machine| memory_file(&machine["pid"]))
        .collect();
    assert_eq!((machines.len(), files.len()), (3, 1));
    let own: Vec<u64> = machines
        .iter()
        .map(|machine| private_kib(&machine["pid"]))
        .collect();
    assert!(
        own.iter().all(|own| *own < FILLED_KIB / 2),
        "KiB that are their own: {own:?}"
    );
    let agent: Value = serde_json::from_str(&user.output(&["agent", "--status", "--json"])).unwrap();
    let kept = agent["cache"]["memory"]["bytes"].as_u64().unwrap();
    assert!(kept < FILLED_KIB << 9, "{kept} bytes are the agent's");
    let adopted = &agent["images"][0]["adopted"][0];
    assert_eq!(adopted["volume"], "memory", "{agent}");
    assert!(adopted["bytes"].as_u64().unwrap() >= FILLED_KIB << 10, "{agent}");
    let told = user.output(&["agent", "--status"]);
    assert!(told.contains("is that of the machine it was made of"), "{told}");

    // What one writes no other sees.
    for (seed, name) in (20..).zip(&all) {
        user.output(&["unpause", name]);
        hear(&user, name, "checkfill:8m:1m:7\n", "checkfill=right");
        hear(&user, name, &format!("fill:8m:1m:{seed}\n"), "fill=done");
        user.output(&["pause", name]);
    }
    for (seed, name) in (20..).zip(&all) {
        user.output(&["unpause", name]);
        let heard = last_words(&user, name, &format!("checkfill:8m:1m:{seed}\ncheckfill:9m:1m:7"));
        assert_eq!(heard.matches("checkfill=right").count(), 2, "{name}: {heard}");
    }
}

#[test]
fn a_machine_that_writes_all_the_time_is_forked_as_it_was_and_so_it_is_again() {
    let user = User::new();
    let words = "fill:20m:8m:5 count:1 churn:8m:4m";
    succeeded(user.boot(words, &["--detach", "--name", "web"]).output().unwrap());
    hear(&user, "web", "", "count=1");
    let mut clones = forked(&user, &["web", "-n", "2", "--name", "a", "--paused"]);
    clones.extend(forked(&user, &["web", "-n", "1", "--name", "b", "--paused"]));
    user.output(&["snapshot", "web", "web-full"]);
    user.output(&["verify", "web-full"]);
    for image in ["web-fork", "web-fork-2"] {
        user.output(&["verify", image]);
    }
    clones.push("web".to_owned());
    for name in clones {
        if name != "web" {
            user.output(&["unpause", &name]);
        }
        let heard = last_words(&user, &name, "\ncheckfill:27m:512k:5");
        assert!(
            heard.contains("churn=right") && heard.contains("checkfill=right"),
            "{name}: {heard}"
        );
    }
}

#[test]
fn clones_go_on_without_the_machine_that_they_are_of_and_with_another_agent() {
    let user = with_machine("fill:8m:8m:7 count:3");
    let clones = forked(&user, &["web", "-n", "2", "--name", "c", "--paused"]);
    user.output(&["kill", "web"]);
    user.output(&["unpause", &clones[0]]);
    hear(&user, &clones[0], "checkfill:8m:1m:7\n", "checkfill=right");
    user.output(&["agent", "--stop"]);
    // Which starts the next one.
    let others = forked(&user, &["web-fork", "-n", "1", "--name", "d", "--paused"]);
    user.output(&["pause", &clones[0]]);
    for name in clones.iter().chain(&others) {
        user.output(&["unpause", name]);
        let heard = last_words(
            &user,
            name,
            "count:1\ncheckfill:8m:8m:7\nfill:40m:1m:3\ncheckfill:40m:1m:3",
        );
        assert!(heard.contains("count=4"), "{name}: {heard}");
        assert_eq!(heard.matches("checkfill=wrong").count(), 0, "{name}: {heard}");
        assert!(heard.matches("checkfill=right").count() >= 2, "{name}: {heard}");
    }
}

#[test]
fn there_are_all_clones_or_none() {
    let user = with_machine("count:1");
    user.output(&["snapshot", "web", "web-v1"]);
    succeeded(user.boot("", &["--detach", "--name", "c-3"]).output().unwrap());
    let told = refusal(&user.run(&["fork", "web-v1", "-n", "5", "--name", "c"]));
    assert!(
        told.contains("c-3") && told.contains("choose another --name"),
        "{told}"
    );
    let names: Vec<Value> = user
        .machines()
        .iter()
        .map(|machine| machine["name"].clone())
        .collect();
    assert_eq!(names, ["c-3", "web"]);

    for (arguments, reason) in [
        (&["nobody", "-n", "2"][..], "no image named nobody"),
        (&["web-v1", "-n", "2", "--image", "x"], "web-v1 is none"),
        (&["web-v1", "-n", "2", "--tap", "eth0=tap"], "eth0=tap-{n}"),
        (&["web-v1", "-n", "2", "--name", "-"], "another --name"),
    ] {
        let told = refusal(&user.run(&[&["fork"], arguments].concat()));
        assert!(told.contains(reason), "{told}");
    }
    user.output(&["snapshot", "web", "web"]);
    let told = refusal(&user.run(&["fork", "web", "-n", "2"]));
    assert!(told.contains("images/web"), "{told}");
    assert_eq!(user.machines().len(), 2);
    // Its image's name says that the machine is meant.
    let clones = forked(&user, &["web", "-n", "1", "--image", "of-web", "--paused"]);
    assert_eq!(clones, ["web-1"]);
}

/// What the tool says that somebody could type, in the order in which it does.
fn commands_in(told: &str) -> Vec<Vec<&str>> {
    let quoted = told.split('`').skip(1).step_by(2);
    let commands = quoted.filter_map(|command| command.strip_prefix("runnel "));
    commands.map(|command| command.split(' ').collect()).collect()
}

#[test]
fn a_fork_of_a_machine_that_fails_leaves_its_image_and_says_how_to_go_on_with_it_or_to_remove_it() {
    let user = with_machine("fill:8m:1m:7 count:3");
    succeeded(user.boot("", &["--detach", "--name", "c-2"]).output().unwrap());
    let failed = user.run(&["fork", "web", "-n", "2", "--name", "c"]);
    assert_eq!(failed.status.code(), Some(1));
    let told = String::from_utf8(failed.stderr).unwrap();
    assert!(
        told.contains("c-2 cannot be started") && told.contains("the image web-fork was made, and stays"),
        "{told}"
    );
    let commands = commands_in(&told);
    let [again, remove, ..] = &commands[..] else {
        panic!("{told}")
    };
    // Outside the store it is no image that the tool removes.
    let elsewhere = user.folder().join("of-web");
    let elsewhere = elsewhere.to_str().unwrap();
    let failed = user.run(&["fork", "web", "-n", "2", "--name", "c", "--image", elsewhere]);
    let told = String::from_utf8(failed.stderr).unwrap();
    assert!(
        told.contains(&format!("`rm -r {elsewhere}` removes it")),
        "{told}"
    );
    fs::remove_dir_all(elsewhere).unwrap();

    user.output(&["kill", "c-2"]);
    // Which shares the machine's memory with them, as the fork would have.
    let clones = user.output(&[&again[..], &["--paused"]].concat());
    assert_eq!(clones, "c-1\nc-2\n");
    let files: BTreeSet<String> = user
        .machines()
        .iter()
        .map(|machine| memory_file(&machine["pid"]))
        .collect();
    assert_eq!(files.len(), 1);
    user.output(&["unpause", "c-1"]);
    let heard = last_words(&user, "c-1", "count:1\ncheckfill:8m:1m:7");
    assert!(
        heard.contains("count=4") && heard.contains("checkfill=right"),
        "{heard}"
    );
    user.output(&["kill", "c-2"]);
    user.output(remove);
    assert!(!user.folder().join("images/web-fork").exists());
}

#[test]
fn an_agent_that_is_killed_with_a_machines_memory_in_hand_is_replaced_and_the_clones_are_right() {
    let user = with_machine("fill:8m:1m:7 count:3");
    let mut agent = user.command(&["agent"]).spawn().unwrap();
    read_to(&mut agent, "listens at");
    // It takes what it is given, and never says anything.
    signal(agent.id(), "STOP");
    let forking = user
        .command(&["fork", "web", "-n", "2", "--name", "c", "--paused"])
        .spawn()
        .unwrap();
    runnel_tests::bare::wait_until("the memory is handed over", || {
        user.machines()[0]["operation"]["phase"] == "sharing memory"
    });
    signal(agent.id(), "KILL");
    agent.wait().unwrap();
    assert_eq!(succeeded(forking.wait_with_output().unwrap()), "c-1\nc-2\n");
    let log = fs::read_to_string(user.machine_folder("web").join("vmm.log")).unwrap();
    assert!(
        log.contains("is not shared with this machine") && log.contains("the agent hung up"),
        "{log}"
    );
    let images = fs::read_dir(user.folder().join("images")).unwrap().flatten();
    let images: Vec<_> = images.map(|entry| entry.file_name()).collect();
    assert_eq!(images, ["web-fork"]);
    user.output(&["verify", "web-fork"]);
    assert_eq!(user.state_of("web"), "running");
    for name in ["c-1", "c-2", "web"] {
        if name != "web" {
            user.output(&["unpause", name]);
        }
        let heard = last_words(&user, name, "count:1\ncheckfill:8m:1m:7");
        assert!(
            heard.contains("count=4") && heard.contains("checkfill=right"),
            "{name}: {heard}"
        );
    }
}

#[test]
fn ctrl_c_ends_the_clones_that_run_already() {
    let user = with_machine("count:1");
    user.output(&["snapshot", "web", "web-v1"]);
    let forking = user
        .command(&["fork", "web-v1", "-n", "500", "--name", "c", "--paused"])
        .spawn()
        .unwrap();
    runnel_tests::bare::wait_until("a clone runs", || user.machine_folder("c-3").exists());
    signal(forking.id(), "INT");
    let output = forking.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(130), "{told}");
    assert!(told.contains("called off"), "{told}");
    assert!(output.stdout.is_empty());
    assert_eq!(user.machines().len(), 1);
}
