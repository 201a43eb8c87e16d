//! Machines that need more of their images than the host keeps: what was taken out comes again when it is touched, and
//! nobody ever sees a hole.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use runnel_snapshot::protocol::{AgentStatus, status};
use runnel_tests::agent::{Agent, AgentFolders};
use runnel_tests::bare::{
    about, booted, configure, hear, load, refusal, resumed, save, start, tell, wait_until, wait_until_stalled,
};
use runnel_tests::lab::skip;
use runnel_tests::monitor::{DEADLINE, Monitor};
use rustix::fs::FallocateFlags;
use serde_json::json;

/// The smallest that an agent takes.
const QUOTA: [&str; 4] = ["--memory-quota", "4M", "--drive-quota", "4M"];
const QUOTA_BYTES: u64 = 4 << 20;

fn status_of(agents: &AgentFolders) -> AgentStatus {
    status(&agents.socket(), DEADLINE).unwrap()
}

/// Clones of an image of this host, through the agent.
fn clones(agents: &AgentFolders, image: &Path) -> [Monitor; 2] {
    let request = json!({"image": image, "agent_path": agents.socket(), "resume_vm": true});
    [load(&request), load(&request)]
}

#[test]
fn machines_with_more_memory_than_the_quota_have_all_of_it_and_so_have_their_images() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    save(&booted("fill:8m:6m:7 count:3"), &image);
    let agents = AgentFolders::new();
    let _agent = agents.start(&QUOTA);
    let mut clones = clones(&agents, &image);
    for _ in 0..2 {
        // At once.
        clones[0].type_line("checkfill:8m:6m:7");
        clones[1].type_line("checkfill:8m:6m:7");
        clones.iter_mut().for_each(|clone| hear(clone, "checkfill=right"));
    }
    let cache = status_of(&agents).cache;
    assert!(cache.memory.bytes_evicted > 4 << 20, "{cache:?}");
    assert!(cache.memory.bytes <= QUOTA_BYTES, "{cache:?}");

    // A snapshot reads what is the image's from the page file.
    let again = folder.path().join("again");
    let [mut first, mut second] = clones;
    second.type_line("checkfill:8m:6m:7");
    save(&first, &again);
    hear(&mut second, "checkfill=right");
    tell(&mut first, "count:1", "count=4");
    assert!(about(&first)["stalled"].is_null());
    tell(&mut resumed(&again), "checkfill:8m:6m:7", "checkfill=right");
}

#[test]
fn machines_with_a_larger_drive_than_the_quota_read_all_of_it_and_never_zeros() {
    const BYTES: u64 = 6 << 20;
    let folder = tempfile::tempdir().unwrap();
    let drive = folder.path().join("drive");
    fs::File::create(&drive).unwrap().set_len(BYTES).unwrap();
    let mut original = Monitor::start();
    configure(&original, 1, "count:3");
    let about_it =
        json!({"drive_id": "data", "path_on_host": drive, "is_root_device": false, "is_read_only": false});
    original.demand("PUT", "/drives/data", &about_it);
    start(&mut original);
    tell(&mut original, "diskfill:0:6m:5", "diskfill=right");
    let image = folder.path().join("image");
    save(&original, &image);
    drop(original);

    let agents = AgentFolders::new();
    let _agent = agents.start(&QUOTA);
    let mut clones = clones(&agents, &image);
    // A part of a block is written into the image's.
    tell(&mut clones[0], "diskfill:1:4k:9", "diskfill=right");
    for _ in 0..2 {
        clones[0].type_line("checkdisk:16:5m:5");
        clones[1].type_line("checkdisk:0:6m:5");
        clones.iter_mut().for_each(|clone| hear(clone, "checkdisk=right"));
    }
    tell(&mut clones[0], "checkdisk:1:4k:9", "checkdisk=right");
    let cache = status_of(&agents).cache;
    assert!(cache.drives.bytes_evicted > 4 << 20, "{cache:?}");
    assert!(cache.drives.bytes <= QUOTA_BYTES, "{cache:?}");
}

/// The page files of memory in an agent's folder.
fn memory_files(agents: &AgentFolders) -> Vec<PathBuf> {
    let images = fs::read_dir(agents.memory_pages()).unwrap();
    let files = images.map(|image| image.unwrap().path().join("memory"));
    files.filter(|path| path.is_file()).collect()
}

#[test]
fn memory_that_somebody_punches_out_of_the_page_file_comes_again() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    save(&booted("fill:8m:4m:7 count:3"), &image);
    let agents = AgentFolders::new();
    let _agent = agents.start(&[]);
    let mut clones = clones(&agents, &image);
    clones
        .iter_mut()
        .for_each(|clone| tell(clone, "checkfill:8m:4m:7", "checkfill=right"));
    let files = memory_files(&agents);
    let [path] = &files[..] else { panic!("{files:?}") };
    // As its owner may.
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    let before = file.metadata().unwrap().blocks();
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, flags, 0, runnel_tests::bare::MIB << 20).unwrap();
    assert!(file.metadata().unwrap().blocks() < before / 2);
    for clone in &mut clones {
        tell(clone, "checkfill:8m:4m:7", "checkfill=right");
        tell(clone, "count:1", "count=4");
    }
}

/// An agent whose folder of memory pages is a file system of that size: its alone, so that it goes with it.
fn start_with_little_room(agents: &AgentFolders, size: &str) -> Agent {
    agents.start_by(&[], |agent| {
        let mut mounting = Command::new("unshare");
        let words = "mkdir -m 700 \"$0\"; mount -t tmpfs -o size=$1,mode=700 none \"$0\"; shift; exec \"$@\"";
        mounting.args(["--mount", "sh", "-ec", words]);
        mounting.arg(agents.memory_pages()).arg(size);
        mounting.arg(agent.get_program()).args(agent.get_args());
        mounting.stdin(Stdio::null()).spawn()
    })
}

#[test]
fn a_machine_whose_pages_find_a_folder_that_is_smaller_runs_with_all_of_its_memory() {
    if !rustix::process::geteuid().is_root() {
        skip("only root can mount a small file system");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    save(&booted("fill:8m:6m:7 count:3"), &image);
    let agents = AgentFolders::new();
    let _agent = start_with_little_room(&agents, "2m");
    let request = json!({"image": image, "agent_path": agents.socket(), "resume_vm": true});
    let mut machine = load(&request);
    for _ in 0..2 {
        tell(&mut machine, "checkfill:8m:6m:7", "checkfill=right");
    }
    tell(&mut machine, "count:1", "count=4");
    let cache = status_of(&agents).cache;
    assert!(cache.memory.bytes_evicted > 4 << 20, "{cache:?}");
    // A snapshot reads it all, from where there is no room for it.
    let again = folder.path().join("again");
    save(&machine, &again);
    tell(&mut resumed(&again), "checkfill:8m:6m:7", "checkfill=right");
    assert!(about(&machine)["stalled"].is_null());
}

#[test]
fn a_machine_whose_pages_find_no_room_at_all_says_so_and_goes_on_when_there_is_some() {
    if !rustix::process::geteuid().is_root() {
        skip("only root can mount a small file system");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    save(&booted("fill:8m:4m:7 count:3"), &image);
    let agents = AgentFolders::new();
    let agent = start_with_little_room(&agents, "64k");
    let request = json!({"image": image, "agent_path": agents.socket(), "stall_after_ms": 500});
    let mut machine = load(&request);
    machine.demand("PATCH", "/vm", &json!({"state": "Resumed"}));
    machine.type_line("checkfill:8m:4m:7");
    let stalled = wait_until_stalled(&machine);
    assert_eq!(stalled["volume"], "memory", "{stalled}");
    let reason = stalled["reason"].as_str().unwrap();
    assert!(reason.contains("No space left"), "{reason}");
    let target = folder.path().join("again");
    let refused = refusal(
        &machine,
        "PUT",
        "/snapshot/create",
        &json!({"image_path": target}),
    );
    assert!(refused.contains("No space left"), "{refused}");
    assert!(!target.exists());

    let grown = Command::new("nsenter")
        .args(["--mount", "--target", &agent.pid().to_string()])
        .args(["mount", "-o", "remount,size=16m"])
        .arg(agents.memory_pages())
        .status();
    assert!(grown.unwrap().success());
    hear(&mut machine, "checkfill=right");
    wait_until("it is not stalled", || about(&machine)["stalled"].is_null());
    save(&machine, &target);
    tell(&mut resumed(&target), "checkfill:8m:4m:7", "checkfill=right");
}
