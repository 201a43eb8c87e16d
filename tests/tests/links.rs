//! Machines and snapshots behind a link that drops, crawls and delivers what is wrong, and agents that are killed
//! meanwhile: the right bytes come later, or what is wrong is said, and the machine runs on.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::fs;
use std::path::PathBuf;

use runnel_tests::agent::Agent;
use runnel_tests::bare::{
    Noise, about, begin_rounds, booted, booted_with_noise, configure, hear, load, refusal, resumed, save,
    saving, start, tell, wait_until, wait_until_stalled,
};
use runnel_tests::forge::verified;
use runnel_tests::lab::say;
use runnel_tests::link::{Link, Wrong};
use runnel_tests::monitor::Monitor;
use runnel_tests::served::{Served, TRICKLE};
use serde_json::{Value, json};

/// What the link is said to crawl at.
const CRAWL: u64 = 100_000;

/// Far longer than it takes to ask again; a machine that waits so long is stalled.
const PATIENT: u64 = 600_000;

/// What is said of a chunk of which nothing has been heard.
const NOTHING_YET: &str = "nothing of it has come yet";

/// An image behind a link.
struct Rig {
    served: Served,
    link: Link,
}

impl Rig {
    fn of(machine: &Monitor) -> Self {
        let served = Served::of(machine);
        let link = Link::to(served.address());
        Self { served, link }
    }

    /// 4 MiB of pattern 7 at 8 MiB.
    fn new() -> Self {
        Self::of(&booted("fill:8m:4m:7 count:3"))
    }

    /// So many random bytes.
    fn with_noise(bytes: u64) -> (Self, Noise) {
        let (machine, noise) = booted_with_noise(bytes, "count:3");
        (Self::of(&machine), noise)
    }

    fn start_agent(&self, arguments: &[&str]) -> Agent {
        self.served.agents().start(arguments)
    }

    fn request(&self, stall_after_ms: u64) -> Value {
        self.served.request(&json!({
            "image": format!("http://{}/bare", self.link.address()),
            "stall_after_ms": stall_after_ms,
            "resume_vm": true,
        }))
    }

    /// A machine that runs over the link.
    fn load(&self, stall_after_ms: u64) -> Monitor {
        load(&self.request(stall_after_ms))
    }

    /// Where a snapshot of this test goes.
    fn target(&self, name: &str) -> PathBuf {
        self.served.image().with_file_name(name)
    }

    /// What must not be there when nothing is under way.
    fn partials(&self) -> Vec<String> {
        let folder = fs::read_dir(self.served.image().parent().unwrap()).unwrap();
        folder
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.contains(".partial-"))
            .collect()
    }
}

fn progress(monitor: &Monitor) -> Value {
    monitor.demand("GET", "/snapshot/progress", &Value::Null)
}

/// How many bytes of a machine's memory are there, and how many there are.
fn resident(monitor: &Monitor) -> (u64, u64) {
    let memory = &progress(monitor)["volumes"][0];
    let bytes = |name: &str| memory[name].as_u64().unwrap();
    (bytes("bytes_resident"), bytes("bytes_total"))
}

/// How many waits for chunks have ended.
fn waits(monitor: &Monitor) -> u64 {
    progress(monitor)["waits"]["count"].as_u64().unwrap()
}

/// Waits until a snapshot has copied something and not all.
fn wait_until_copying(monitor: &Monitor) {
    wait_until("it copies", || {
        let operation = &progress(monitor)["operation"];
        if operation["kind"] != "create" {
            return false;
        }
        assert_eq!(operation["state"], "running", "{operation}");
        let bytes = |name: &str| operation[name].as_u64().unwrap();
        operation["phase"] == "copying"
            && bytes("bytes_done") > 0
            && bytes("bytes_done") < bytes("bytes_total")
    });
}

#[test]
fn what_comes_wrong_twice_is_asked_for_again_and_the_guest_sees_the_right_bytes() {
    let rig = Rig::new();
    for wrong in Wrong::ENDING {
        let agent = rig.start_agent(&TRICKLE);
        let mut machine = rig.load(PATIENT);
        let before = rig.link.went_wrong();
        rig.link.go_wrong(wrong, 2);
        tell(&mut machine, "checkfill:8m:4m:7", "checkfill=right");
        assert_eq!(rig.link.went_wrong(), before + 2, "{wrong:?}");
        wait_until("it is not stalled", || about(&machine)["stalled"].is_null());
        tell(&mut machine, "count:1", "count=4");
        drop((machine, agent));
        rig.served.agents().forget();
    }
}

#[test]
fn what_comes_wrong_again_and_again_stalls_the_machine_with_the_reason_until_it_comes_right() {
    let rig = Rig::new();
    for wrong in Wrong::ENDING {
        let agent = rig.start_agent(&TRICKLE);
        let mut machine = rig.load(200);
        rig.link.go_wrong(wrong, usize::MAX);
        machine.type_line("checkfill:8m:4m:7");
        let mut stalled = Value::Null;
        wait_until("it is stalled, and something was heard", || {
            stalled = about(&machine)["stalled"].clone();
            let reason = stalled["reason"].as_str().unwrap_or(NOTHING_YET);
            !reason.contains(NOTHING_YET)
        });
        let reason = stalled["reason"].as_str().unwrap();
        say(&format!("{wrong:?}: {reason}"));
        assert_eq!(stalled["volume"], "memory", "{wrong:?}: {stalled}");
        // Damage is told from an outage: only one of them may pass by itself.
        assert_eq!(
            stalled["needs_repair"],
            wrong == Wrong::Flipped,
            "{wrong:?}: {stalled}"
        );
        let paused = refusal(&machine, "PATCH", "/vm", &json!({"state": "Paused"}));
        assert!(paused.contains("stalled"), "{wrong:?}: {paused}");
        rig.link.heal();
        hear(&mut machine, "checkfill=right");
        wait_until("it is not stalled", || about(&machine)["stalled"].is_null());
        drop((machine, agent));
        rig.served.agents().forget();
    }
}

#[test]
fn a_snapshot_of_what_comes_wrong_again_and_again_fails_with_the_reason_and_the_machine_runs_on() {
    let (rig, noise) = Rig::with_noise(256 << 10);
    for wrong in Wrong::ENDING {
        let agent = rig.start_agent(&TRICKLE);
        let mut machine = rig.load(1500);
        tell(&mut machine, "count:1", "count=4");
        let (have, all) = resident(&machine);
        assert!(have < all, "{have} of {all}");
        rig.link.go_wrong(wrong, usize::MAX);
        let target = rig.target(&format!("{wrong:?}"));
        let reason = refusal(
            &machine,
            "PUT",
            "/snapshot/create",
            &json!({"image_path": target}),
        );
        say(&format!("{wrong:?}: {reason}"));
        assert!(reason.contains("chunk"), "{wrong:?}: {reason}");
        assert_eq!(progress(&machine)["operation"]["state"], "failed");
        assert!(!target.exists());
        assert_eq!(rig.partials(), [""; 0], "{wrong:?}");
        assert_eq!(about(&machine)["state"], "Running", "{wrong:?}");
        tell(&mut machine, "count:1", "count=5");

        rig.link.heal();
        // What is damaged is not asked for again at once.
        wait_until("it is right", || saving(&machine, &target).answer().0 == 204);
        drop((machine, agent));
        verified(&target);
        let mut again = resumed(&target);
        noise.check(&mut again);
        tell(&mut again, "count:1", "count=6");
        rig.served.agents().forget();
    }
}

#[test]
fn a_snapshot_of_what_comes_wrong_twice_asks_again_and_is_right() {
    let (rig, noise) = Rig::with_noise(256 << 10);
    for wrong in Wrong::ENDING {
        let agent = rig.start_agent(&TRICKLE);
        let mut machine = rig.load(PATIENT);
        tell(&mut machine, "count:1", "count=4");
        let before = rig.link.went_wrong();
        rig.link.go_wrong(wrong, 2);
        let target = rig.target(&format!("{wrong:?}"));
        let (status, answer) = saving(&machine, &target).answer();
        if wrong == Wrong::Flipped {
            // Damage is not waited for: it is said at once, and may be repaired by then.
            assert_eq!(status, 400, "{answer}");
            assert!(!target.exists());
            wait_until("it is right", || saving(&machine, &target).answer().0 == 204);
        } else {
            assert_eq!(status, 204, "{wrong:?}: {answer}");
        }
        assert_eq!(rig.link.went_wrong(), before + 2, "{wrong:?}");
        drop((machine, agent));
        verified(&target);
        noise.check(&mut resumed(&target));
        rig.served.agents().forget();
    }
}

#[test]
fn a_machine_behind_a_link_that_crawls_runs_and_is_saved_while_it_comes() {
    let (rig, noise) = Rig::with_noise(512 << 10);
    let _agent = rig.start_agent(&[]);
    let mut machine = rig.load(PATIENT);
    rig.link.crawl(CRAWL);
    tell(&mut machine, "count:1", "count=4");
    let target = rig.target("again");
    let saving = saving(&machine, &target);
    wait_until_copying(&machine);
    let (have, all) = resident(&machine);
    assert!(have < all, "{have} of {all}");
    // It runs on meanwhile, and may wait for a page itself.
    machine.type_line("count:1");
    hear(&mut machine, "count=5");
    machine.type_line(&noise.words());
    assert_eq!(saving.answer().0, 204);
    assert_eq!(machine.wait_for_console("sum="), noise.answer());
    assert!(about(&machine)["stalled"].is_null());
    verified(&target);
    let mut again = resumed(&target);
    noise.check(&mut again);
    tell(&mut again, "count:1", "count=5");
}

#[test]
fn an_agent_that_is_killed_again_and_again_during_the_fill_loses_nothing() {
    const KILLS: u64 = 6;
    let (rig, noise) = Rig::with_noise(768 << 10);
    let mut agent = rig.start_agent(&[]);
    let mut machine = rig.load(PATIENT);
    rig.link.crawl(CRAWL);
    let mut last = 0;
    for _ in 0..KILLS {
        wait_until("the fill goes on", || resident(&machine).0 > last);
        drop(agent);
        let (have, all) = resident(&machine);
        assert!(have < all, "{have} of {all}");
        last = have;
        agent = rig.start_agent(&[]);
    }
    tell(&mut machine, "count:1", "count=4");
    rig.link.run();
    wait_until("all is there", || {
        let (have, all) = resident(&machine);
        have == all
    });
    noise.check(&mut machine);
    assert!(about(&machine)["stalled"].is_null());
    // Nobody is needed any more.
    drop(agent);
    let target = rig.target("again");
    save(&machine, &target);
    noise.check(&mut resumed(&target));
}

#[test]
fn an_agent_that_is_killed_while_eight_vcpus_wait_each_for_a_chunk_loses_none() {
    const VCPUS: u32 = 8;
    let mut first = Monitor::start();
    configure(&first, VCPUS, &format!("fill:8m:17m:7 vcpus:{VCPUS}"));
    start(&mut first);
    let rig = Rig::of(&first);
    drop(first);
    let mut agent = rig.start_agent(&TRICKLE);
    // Until it counts as stalled, and those that wait for nothing stand, all have come to wait.
    let mut machine = rig.load(10_000);
    // Where nobody has been: farther apart than what comes along with a chunk.
    for round in 0..2 {
        tell(&mut machine, "checktogether:8m:4k:0:7", "checktogether=right");
        let waited = waits(&machine);
        rig.link.go_wrong(Wrong::Silent, usize::MAX);
        machine.type_line(&format!(
            "checktogether:{}:64k:2m:7",
            (9 << 20) + round * (1 << 20)
        ));
        let _ = wait_until_stalled(&machine);
        drop(agent);
        agent = rig.start_agent(&TRICKLE);
        rig.link.heal();
        hear(&mut machine, "checktogether=right");
        wait_until("nobody waits", || about(&machine)["stalled"].is_null());
        let waits = waits(&machine) - waited;
        assert!(waits >= u64::from(VCPUS), "{waits} chunks were waited for");
    }
    drop(agent);
}

#[test]
fn an_agent_that_is_killed_in_the_middle_of_a_snapshot_is_asked_again_and_the_image_is_right() {
    const KILLS: usize = 3;
    let (rig, noise) = Rig::with_noise(512 << 10);
    let mut agent = rig.start_agent(&TRICKLE);
    let mut machine = rig.load(PATIENT);
    // Written before and meanwhile: what is saved is of one moment.
    tell(&mut machine, "fill:20m:1m:5", "fill=done");
    rig.link.crawl(CRAWL);
    let target = rig.target("again");
    let saving = saving(&machine, &target);
    for _ in 0..KILLS {
        wait_until_copying(&machine);
        drop(agent);
        tell(&mut machine, "fill:20m:1m:6", "fill=done");
        agent = rig.start_agent(&TRICKLE);
    }
    let (status, answer) = saving.answer();
    assert_eq!(status, 204, "{answer}");
    assert_eq!(about(&machine)["state"], "Running");
    verified(&target);
    let mut again = resumed(&target);
    noise.check(&mut again);
    tell(&mut again, "checkfill:20m:1m:5", "checkfill=right");
    tell(&mut machine, "checkfill:20m:1m:6", "checkfill=right");
    noise.check(&mut machine);
    drop(agent);
}

#[test]
fn an_agent_that_stays_away_ends_a_snapshot_with_the_reason_and_the_next_one_is_right() {
    let (rig, noise) = Rig::with_noise(512 << 10);
    let agent = rig.start_agent(&TRICKLE);
    let mut machine = rig.load(1500);
    rig.link.crawl(CRAWL);
    let target = rig.target("again");
    let saving = saving(&machine, &target);
    wait_until_copying(&machine);
    drop(agent);
    let (status, answer) = saving.answer();
    assert_eq!(status, 400, "{answer}");
    let reason = answer["fault_message"].as_str().unwrap();
    assert!(reason.contains("agent"), "{reason}");
    assert!(!target.exists());
    assert_eq!(rig.partials(), [""; 0]);
    assert_eq!(about(&machine)["state"], "Running");
    tell(&mut machine, "count:1", "count=4");

    let _agent = rig.start_agent(&[]);
    rig.link.run();
    save(&machine, &target);
    verified(&target);
    noise.check(&mut resumed(&target));
}

#[test]
fn a_guest_that_switches_itself_off_while_it_is_saved_leaves_a_whole_image_of_the_moment_before() {
    let (rig, noise) = Rig::with_noise(256 << 10);
    let _agent = rig.start_agent(&TRICKLE);
    let mut machine = rig.load(PATIENT);
    rig.link.crawl(CRAWL);
    tell(&mut machine, "fill:20m:1m:5", "fill=done");
    let target = rig.target("again");
    let saving = saving(&machine, &target);
    wait_until_copying(&machine);
    tell(&mut machine, "fill:20m:1m:6", "fill=done");
    machine.type_line("poweroff");
    let (status, answer) = saving.answer();
    assert_eq!(status, 204, "{answer}");
    let (status, log) = machine.wait();
    assert_eq!(status.code(), Some(0), "{log}");
    assert_eq!(rig.partials(), [""; 0]);
    verified(&target);
    let mut again = resumed(&target);
    noise.check(&mut again);
    tell(&mut again, "checkfill:20m:1m:5", "checkfill=right");
    tell(&mut again, "count:1", "count=4");
}

#[test]
fn a_machine_that_writes_all_the_time_is_saved_as_it_was_at_the_pause_while_it_still_comes() {
    const CHURN: &str = "churn:20m:4m";
    let ends = |machine: &mut Monitor| {
        machine.type_line("");
        let answer = machine.wait_for_console("churn=");
        assert!(answer.starts_with("churn=right rounds="), "{answer}");
    };
    let rig = Rig::new();
    let _agent = rig.start_agent(&["--fill-rate", "1"]);
    let mut machine = rig.load(PATIENT);
    tell(&mut machine, "fill:20m:4m:3", "fill=done");
    let (have, all) = resident(&machine);
    assert!(have < all, "{have} of {all}");
    begin_rounds(&mut machine, CHURN);
    // The capture comes no further than to what is not here, which lies before what the guest writes to.
    rig.link.go_wrong(Wrong::Silent, usize::MAX);
    let target = rig.target("again");
    let saving = saving(&machine, &target);
    machine.wait_for_log("The machine runs on");
    ends(&mut machine);
    begin_rounds(&mut machine, CHURN);
    assert_eq!(progress(&machine)["operation"]["state"], "running");
    rig.link.heal();
    assert_eq!(saving.answer().0, 204);
    let line = machine.wait_for_log("Memory is not protected any more");
    let kept = line.split("pages_kept_in_memory=").nth(1).unwrap();
    assert!(!kept.starts_with('0'), "no write met the capture: {line}");
    verified(&target);
    for machine in [&mut machine, &mut resumed(&target)] {
        ends(machine);
        tell(machine, "checkfill:8m:4m:7", "checkfill=right");
    }
}

#[test]
fn a_machine_whose_image_is_removed_on_its_own_host_has_all_of_it_and_is_saved_whole() {
    let folder = tempfile::tempdir().unwrap();
    let [image, again] = ["image", "again"].map(|name| folder.path().join(name));
    save(&booted("fill:8m:4m:7 count:3"), &image);
    let mut machine = load(&json!({"image": image, "stall_after_ms": 300}));
    // Before it runs, and with it the fill.
    let (have, all) = resident(&machine);
    assert!(have < all, "{have} of {all}");
    fs::remove_dir_all(&image).unwrap();
    machine.demand("PATCH", "/vm", &json!({"state": "Resumed"}));
    tell(&mut machine, "checkfill:8m:1m:7", "checkfill=right");
    save(&machine, &again);
    assert!(about(&machine)["stalled"].is_null());
    verified(&again);
    tell(&mut resumed(&again), "checkfill:8m:4m:7", "checkfill=right");
    // Nobody else has it any more.
    let gone = refusal(
        &Monitor::start(),
        "PUT",
        "/snapshot/load",
        &json!({"image": image}),
    );
    assert!(gone.contains(image.to_str().unwrap()), "{gone}");
}

#[test]
fn an_image_that_is_removed_under_its_server_stalls_its_machines_until_it_is_back() {
    let served = Served::new();
    let _agent = served.agents().start(&TRICKLE);
    let mut machine = served.load(&json!({"stall_after_ms": 300}));
    let away = served.image().with_file_name("away");
    fs::rename(served.image(), &away).unwrap();
    machine.demand("PATCH", "/vm", &json!({"state": "Resumed"}));
    machine.type_line("checkfill:8m:4m:7");
    let stalled = wait_until_stalled(&machine);
    let reason = stalled["reason"].as_str().unwrap();
    assert!(reason.contains("was removed in use"), "{reason}");
    let again = served.image().with_file_name("again");
    let refused = refusal(&machine, "PUT", "/snapshot/create", &json!({"image_path": again}));
    assert!(refused.contains("was removed in use"), "{refused}");
    assert!(!again.exists());

    fs::rename(&away, served.image()).unwrap();
    hear(&mut machine, "checkfill=right");
    wait_until("it is not stalled", || about(&machine)["stalled"].is_null());
    save(&machine, &again);
    tell(&mut resumed(&again), "checkfill:8m:1m:7", "checkfill=right");
}
