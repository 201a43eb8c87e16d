use std::fs::File;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Command;
use std::time::{Duration, SystemTime};

use super::ended::{EARLIER_LOGS_MAX, ENDED_LOGS_MAX};
use super::*;

fn name(text: &str) -> MachineName {
    text.parse().unwrap()
}

fn state(folder: &tempfile::TempDir) -> StateFolder {
    StateFolder::at(folder.path().join("runnel")).unwrap()
}

fn this_process() -> ProcessId {
    ProcessId::of(std::process::id()).unwrap()
}

/// The identity of a process that has ended.
fn ended_process() -> ProcessId {
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    let id = ProcessId::of(child.id()).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    id
}

#[test]
fn names_that_could_leave_the_folder_or_look_like_flags_are_refused() {
    for text in ["", ".", "..", "a/b", "a_b", "-a", "ä", "a b", &"x".repeat(65)] {
        assert!(text.parse::<MachineName>().is_err(), "{text}");
    }
    for text in ["a", "web-1", &"x".repeat(64)] {
        assert_eq!(name(text).to_string(), text);
    }
}

#[test]
fn everything_is_its_owners_alone_and_what_is_not_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let state = state(&folder);
    let claim = state.claim(Some(&name("a"))).unwrap();
    for path in [
        &state.root,
        &state.machines_path(),
        &state.agent(),
        &claim.folder().path,
    ] {
        assert_eq!(fs::metadata(path).unwrap().mode() & 0o777, 0o700, "{path:?}");
    }
    fs::set_permissions(&state.root, fs::Permissions::from_mode(0o755)).unwrap();
    let refused = StateFolder::at(state.root.clone());
    assert!(matches!(refused, Err(StateError::Exposed { mode: 0o755, .. })));
}

#[test]
fn a_running_machine_is_found_with_what_it_was_started_with() {
    let folder = tempfile::tempdir().unwrap();
    let state = state(&folder);
    let claim = state.claim(Some(&name("web"))).unwrap();
    let record = Record {
        vcpus: 2,
        image: Some("/images/web".into()),
        ..Record::now()
    };
    claim.folder().record(&record).unwrap();
    claim.enter(this_process()).unwrap();

    let machine = state.machine(&name("web")).unwrap();
    assert_eq!(machine.record, record);
    assert_eq!(machine.id, this_process());
    assert_eq!(state.machines().unwrap().len(), 1);
}

#[test]
fn the_place_at_a_console_is_one_persons_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let state = state(&folder);
    let claim = state.claim(Some(&name("web"))).unwrap();
    let first = claim.folder().take_console().unwrap();
    assert!(first.is_some());
    assert!(claim.folder().take_console().unwrap().is_none());
    drop(first);
    assert!(claim.folder().take_console().unwrap().is_some());
}

#[test]
fn a_name_in_use_is_refused_and_says_by_whom() {
    let folder = tempfile::tempdir().unwrap();
    let state = state(&folder);
    let claim = state.claim(Some(&name("web"))).unwrap();
    let starting = state.claim(Some(&name("web")));
    assert!(matches!(starting, Err(StateError::BeingTaken(_))));
    assert!(state.machines().unwrap().is_empty());

    claim.enter(this_process()).unwrap();
    let taken = state.claim(Some(&name("web"))).unwrap_err().to_string();
    assert!(taken.contains(&std::process::id().to_string()), "{taken}");
}

#[test]
fn an_entry_of_an_ended_machine_gives_way_and_its_log_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let state = state(&folder);
    let claim = state.claim(Some(&name("web"))).unwrap();
    fs::write(claim.folder().log(), "its last words").unwrap();
    claim.enter(ended_process()).unwrap();

    let unknown = state.machine(&name("web")).unwrap_err().to_string();
    let log = state.ended_log(&name("web"));
    assert!(unknown.contains(log.to_str().unwrap()), "{unknown}");
    assert_eq!(fs::read_to_string(log).unwrap(), "its last words");
    assert!(!state.folder(&name("web")).path.exists());
    state.claim(Some(&name("web"))).unwrap();
}

#[test]
fn logs_of_earlier_machines_of_a_name_are_kept_up_to_a_number() {
    let folder = tempfile::tempdir().unwrap();
    let state = state(&folder);
    let ended = ended_process();
    for number in 0..EARLIER_LOGS_MAX + 3 {
        let claim = state.claim(None).unwrap();
        fs::write(claim.folder().log(), number.to_string()).unwrap();
        let machine = claim.enter(ended).unwrap();
        state.forget(&machine).unwrap();
    }
    let said = |log: PathBuf| fs::read_to_string(log).unwrap();
    assert_eq!(
        said(state.ended_log(&name("m1"))),
        (EARLIER_LOGS_MAX + 2).to_string()
    );
    assert_eq!(
        said(state.ended_path().join("m1.1.log")),
        (EARLIER_LOGS_MAX + 1).to_string()
    );
    let kept = fs::read_dir(state.ended_path()).unwrap().count();
    assert_eq!(kept, 1 + EARLIER_LOGS_MAX as usize);
}

#[test]
fn a_start_that_was_broken_off_or_killed_leaves_the_name_free() {
    let folder = tempfile::tempdir().unwrap();
    let state = state(&folder);
    let claim = state.claim(Some(&name("web"))).unwrap();
    fs::write(claim.folder().log(), "its only words").unwrap();
    drop(claim);
    assert!(!state.folder(&name("web")).path.exists());
    assert_eq!(
        fs::read_to_string(state.ended_log(&name("web"))).unwrap(),
        "its only words"
    );

    // What a killed process leaves: a folder without a lock.
    fs::create_dir(&state.folder(&name("web")).path).unwrap();
    state
        .claim(Some(&name("web")))
        .unwrap()
        .enter(this_process())
        .unwrap();
    assert!(state.machine(&name("web")).is_ok());
}

#[test]
fn a_machine_without_a_name_gets_the_first_free_number() {
    let folder = tempfile::tempdir().unwrap();
    let state = state(&folder);
    let first = state.claim(None).unwrap();
    let second = state.claim(None).unwrap();
    assert_eq!(
        (first.folder().name.clone(), second.folder().name.clone()),
        (name("m1"), name("m2"))
    );
    drop(first);
    assert_eq!(state.claim(None).unwrap().folder().name, name("m1"));
}

#[test]
fn forgetting_spares_a_machine_that_runs() {
    let folder = tempfile::tempdir().unwrap();
    let state = state(&folder);
    let entered = state
        .claim(Some(&name("web")))
        .unwrap()
        .enter(this_process())
        .unwrap();
    state.forget(&entered).unwrap();
    assert!(state.machine(&name("web")).is_ok());
}

#[test]
fn a_path_too_long_for_sockets_is_refused_before_anything_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let deep = folder.path().join("x".repeat(80));
    fs::create_dir(&deep).unwrap();
    let state = StateFolder::at(deep.join("runnel")).unwrap();
    assert!(matches!(state.claim(None), Err(StateError::TooLong(_))));
    assert!(fs::read_dir(state.machines_path()).unwrap().next().is_none());
    assert!(check_socket(&folder.path().join("x".repeat(108))).is_err());
}

#[test]
fn only_so_many_logs_of_ended_machines_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let state = state(&folder);
    let start = SystemTime::now() - Duration::from_secs(3600);
    for number in 0..ENDED_LOGS_MAX + 5 {
        let log = File::create(state.ended_log(&name(&format!("m{number}")))).unwrap();
        log.set_modified(start + Duration::from_secs(number as u64))
            .unwrap();
    }
    // One that wrote its last line long before it ended.
    let idle = state.claim(Some(&name("idle"))).unwrap();
    let log = File::create(idle.folder().log()).unwrap();
    log.set_modified(start - Duration::from_secs(3600)).unwrap();
    state.keep_log(idle.folder());
    assert_eq!(fs::read_dir(state.ended_path()).unwrap().count(), ENDED_LOGS_MAX);
    let is_kept = |machine: &str| state.ended_log(&name(machine)).exists();
    assert!(is_kept("idle") && is_kept("m6") && !is_kept("m5"));
}
