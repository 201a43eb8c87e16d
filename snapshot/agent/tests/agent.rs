//! The agent over its socket, as monitors use it: chunks fetched once for all, kept across its death, never wrong.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod wire;

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use runnel_agent::agent::{Agent, AgentError, PagesError};
use runnel_snapshot::index::SEGMENT_VOLUME_BYTES;
use runnel_snapshot::protocol::{self, ConnectError};
use runnel_snapshot::source::{Arrived, PageSource, Urgency};
use wire::fixture::{CHUNK, chunk_of};
use wire::host::{Home, LONG, ids, registry, registry_at_times};
use wire::program::Program;
use wire::scripted::Reply;
use wire::{Stored, serve};

#[test]
fn a_machine_gets_the_image_of_a_server_over_the_socket() {
    let stored = Stored::new();
    let server = serve(&[&stored.path()]);
    let home = Home::new();
    let _agent = home.start();
    let machine = home.machine(&format!("http://{}/web", server.address())).unwrap();
    assert_eq!(machine.source.digest(), stored.manifest.digest);
    assert_eq!(machine.source.manifest(), stored.bytes_of(&stored.manifest));
    assert_eq!(
        machine.source.state(),
        stored.bytes_of(&stored.open().manifest.state)
    );

    machine.ask(&[0, 1, 2, 3, 4]);
    use Arrived::{Data, Zero};
    assert_eq!(
        machine.answers(5),
        [
            (0, Ok(Data)),
            (1, Ok(Zero)),
            (2, Ok(Zero)),
            (3, Ok(Data)),
            (4, Ok(Data))
        ]
    );
    assert!(machine.has(0, 1) && machine.has(3, 2));
    assert!(
        machine.page_file().write_at(b"x", 0).is_err(),
        "it is for reading alone"
    );
    machine.ask(&[5]);
    assert!(!machine.answer().1.unwrap_err().transient);

    let status = protocol::status(&home.socket(), LONG).unwrap();
    assert_eq!(status.images.len(), 1);
    assert_eq!(
        (status.images[0].machines, status.images[0].digest),
        (1, stored.manifest.digest)
    );
    assert_eq!(status.images[0].bytes_sent, server.traffic().bytes_received());
    assert!(status.images[0].bytes_received > 1000);
}

#[test]
fn a_machine_gets_the_image_of_a_directory_over_the_socket() {
    let stored = Stored::new();
    let home = Home::new();
    let agent = home.start();
    let machine = home.machine(stored.path().to_str().unwrap()).unwrap();
    machine.ask(&[3]);
    assert_eq!(machine.answer(), (3, Ok(Arrived::Data)));
    assert!(machine.has(3, 2));
    assert_eq!(agent.status().images[0].bytes_received, 0);
}

#[test]
fn what_cannot_be_opened_is_refused_with_the_reason() {
    let stored = Stored::new();
    let server = serve(&[&stored.path()]);
    let home = Home::new();
    let _agent = home.start();
    let base = format!("http://{}", server.address());
    for (image, reason) in [
        (format!("{base}/none"), "no image none"),
        (format!("{base}/web:none"), "tagged none"),
        ("/nowhere".into(), "/nowhere"),
        ("ftp://x/y".into(), "names no image"),
    ] {
        match home.machine(&image).map(|_| ()).unwrap_err() {
            ConnectError::Refused(said) => assert!(said.contains(reason), "{image}: {said}"),
            other => panic!("{image}: {other}"),
        }
    }
}

#[test]
fn a_chunk_that_two_machines_want_is_fetched_once_and_told_to_both() {
    let stored = Stored::new();
    let asked = Arc::new(AtomicUsize::new(0));
    // The server answers when both machines have asked.
    let both = Arc::new(Barrier::new(2));
    let (count, gate) = (Arc::clone(&asked), Arc::clone(&both));
    let server = registry(&stored, move |request, bytes| {
        count.fetch_add(1, Ordering::SeqCst);
        gate.wait();
        Reply::part(request, bytes)
    });
    let home = Home::new();
    let _agent = home.start();
    let image = format!("{}/web", server.base());
    let (first, second) = (home.machine(&image).unwrap(), home.machine(&image).unwrap());
    first.ask(&[3]);
    second.ask(&[3]);
    // A chunk that costs no request comes after the one before it was asked for.
    second.ask(&[1]);
    assert_eq!(second.answer(), (1, Ok(Arrived::Zero)));
    both.wait();
    assert_eq!(first.answer(), (3, Ok(Arrived::Data)));
    assert_eq!(second.answer(), (3, Ok(Arrived::Data)));
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    assert!(first.has(3, 2) && second.has(3, 2));
    // Later ones ask in vain: it is there.
    let third = home.machine(&image).unwrap();
    third.ask(&[3]);
    assert_eq!(third.answer(), (3, Ok(Arrived::Data)));
    assert_eq!(asked.load(Ordering::SeqCst), 1);
}

#[test]
fn a_machine_that_goes_where_it_has_not_been_finds_the_index_of_what_is_around_read() {
    use wire::fixture::Part::{Data, Zeros};
    const CHUNKS_OF_SEGMENT: u64 = SEGMENT_VOLUME_BYTES / CHUNK as u64;
    let segment = |content: u8| [Data(chunk_of(content)), Zeros(CHUNKS_OF_SEGMENT - 1)];
    let mut parts = vec![
        Zeros(2),
        Data(chunk_of(8)),
        Data(chunk_of(9)),
        Zeros(CHUNKS_OF_SEGMENT - 4),
    ];
    parts.extend((1..4).flat_map(segment));
    let stored = Stored::of(&parts);
    let server = registry(&stored, Reply::part);
    let index = stored.open().manifest.volumes[0].index.digest.to_string();
    let read = || {
        let requests = server.requests();
        requests
            .iter()
            .filter(|request| request.target.ends_with(&index))
            .count()
    };
    let home = Home::new();
    let _agent = home.start();
    let machine = home.machine(&format!("{}/web", server.base())).unwrap();

    machine.ask(&[2 * CHUNKS_OF_SEGMENT]);
    assert_eq!(machine.answer(), (2 * CHUNKS_OF_SEGMENT, Ok(Arrived::Data)));
    let until = Instant::now() + LONG;
    while read() < 4 {
        assert!(Instant::now() < until, "{} of 4 segments were read", read());
        std::thread::sleep(Duration::from_millis(1));
    }
    for segment in [0, 1, 3] {
        let chunk = segment * CHUNKS_OF_SEGMENT + if segment == 0 { 2 } else { 0 };
        machine.ask(&[chunk]);
        assert_eq!(machine.answer(), (chunk, Ok(Arrived::Data)));
    }
    assert_eq!(read(), 4, "each once");
}

#[test]
fn a_new_agent_goes_on_with_the_same_files_and_is_asked_again() {
    let stored = Stored::new();
    let asked = Arc::new(AtomicUsize::new(0));
    let answers = Arc::new(AtomicBool::new(true));
    let (count, answering) = (Arc::clone(&asked), Arc::clone(&answers));
    let server = registry(&stored, move |request, bytes| {
        if !answering.load(Ordering::SeqCst) {
            return Reply::Hang(Vec::new());
        }
        count.fetch_add(1, Ordering::SeqCst);
        Reply::part(request, bytes)
    });
    let home = Home::new();
    // What is under way when an agent is stopped is waited for, so that must not be long here.
    let start = || {
        let mut settings = home.settings();
        settings.remote.idle_deadline = Duration::from_millis(300);
        Agent::start(settings).unwrap()
    };
    let agent = start();
    let machine = home.machine(&format!("{}/web", server.base())).unwrap();
    machine.ask(&[0]);
    assert_eq!(machine.answer(), (0, Ok(Arrived::Data)));

    answers.store(false, Ordering::SeqCst);
    machine.ask(&[3]);
    agent.stop();
    // What was asked for is reported as away, and comes when there is an agent and a server again.
    let (chunk, failure) = machine.answer();
    assert_eq!(chunk, 3);
    assert!(failure.unwrap_err().transient);
    answers.store(true, Ordering::SeqCst);
    let _agent = start();
    loop {
        match machine.answer() {
            (3, Ok(Arrived::Data)) => break,
            (3, Err(failure)) => {
                assert!(failure.transient, "{failure}");
                // The server did not answer in time: a machine asks again.
                machine.ask(&[3]);
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(
        machine.has(0, 1) && machine.has(3, 2),
        "its page file is the same one"
    );
    // The chunk that the first agent fetched is not fetched again.
    let fetched = asked.load(Ordering::SeqCst);
    machine.ask(&[0]);
    let answer = loop {
        match machine.answer() {
            // Chunk 3 was asked for more than once, and each asking may have been answered.
            (3, _) => {}
            answer => break answer,
        }
    };
    assert_eq!(answer, (0, Ok(Arrived::Data)));
    assert_eq!(asked.load(Ordering::SeqCst), fetched);
}

#[test]
fn what_was_asked_of_a_killed_agent_comes_from_the_next_one() {
    let stored = Stored::new();
    let answers = Arc::new(AtomicBool::new(false));
    let answering = Arc::clone(&answers);
    let (sender, asked) = channel();
    let sender = Mutex::new(sender);
    let server = registry(&stored, move |request, bytes| {
        let _ = sender.lock().unwrap().send(()); // the test may have ended
        match answering.load(Ordering::SeqCst) {
            true => Reply::part(request, bytes),
            false => Reply::Hang(Vec::new()),
        }
    });
    let home = Home::new();
    let killed = Program::start(&home);
    let machine = home.machine(&format!("{}/web", server.base())).unwrap();
    machine.ask(&[3]);
    asked.recv_timeout(LONG).unwrap();
    drop(killed);
    let (chunk, failure) = machine.answer();
    assert_eq!(chunk, 3);
    assert!(failure.unwrap_err().transient);

    answers.store(true, Ordering::SeqCst);
    let _next = Program::start(&home);
    // It may be reported as away again before it comes, but nobody has to ask for it again.
    while machine.answer() != (3, Ok(Arrived::Data)) {}
    assert!(machine.has(3, 2));
}

#[test]
fn half_a_chunk_that_a_killed_agent_left_is_fetched_anew() {
    let stored = Stored::new();
    let server = serve(&[&stored.path()]);
    let home = Home::new();
    let agent = home.start();
    let machine = home.machine(&format!("http://{}/web", server.address())).unwrap();
    machine.gets(3);
    agent.stop();
    // As if it had been killed in the middle of writing.
    let folder = home.path().join("memory").join(stored.manifest.digest.hex());
    let path = folder.join("memory");
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&chunk_of(1)[..CHUNK / 3], 0).unwrap();
    let _agent = home.start();
    machine.gets(0);
    assert!(machine.has(0, 1) && machine.has(3, 2));
}

#[test]
fn wrong_bytes_never_reach_the_page_file() {
    let stored = Stored::new();
    let server = registry(&stored, |request, bytes| {
        let mut wrong = bytes.to_vec();
        for at in (20..wrong.len()).step_by(50) {
            wrong[at] ^= 0x10;
        }
        Reply::part(request, &wrong)
    });
    let home = Home::new();
    let _agent = home.start();
    let machine = home.machine(&format!("{}/web", server.base())).unwrap();
    machine.ask(&[0, 3]);
    for (_, answer) in machine.answers(2) {
        let failure = answer.unwrap_err();
        assert!(!failure.transient);
        assert!(failure.reason.contains("memory"), "{failure}");
    }
    let mut seen = vec![1; 4 * CHUNK];
    machine.page_file().read_exact_at(&mut seen, 0).unwrap();
    assert!(seen.iter().all(|byte| *byte == 0));
}

#[test]
fn a_server_that_goes_away_is_a_transient_failure_and_the_chunk_comes_when_it_is_back() {
    let stored = Stored::new();
    let (server, away) = registry_at_times(&stored);
    away.store(true, Ordering::SeqCst);
    let home = Home::new();
    let _agent = home.start();
    let machine = home.machine(&format!("{}/web", server.base())).unwrap();
    machine.ask(&[3]);
    let (_, failure) = machine.answer();
    assert!(failure.unwrap_err().transient);
    away.store(false, Ordering::SeqCst);
    machine.ask(&[3]);
    assert_eq!(machine.answer(), (3, Ok(Arrived::Data)));
}

#[test]
fn neighbours_in_the_background_are_read_at_once() {
    let stored = Stored::new();
    let server = registry(&stored, Reply::part);
    let home = Home::new();
    let _agent = home.start();
    let machine = home.machine(&format!("{}/web", server.base())).unwrap();
    machine.source.ask(&ids(&[0, 1, 2, 3, 4]), Urgency::Fill);
    assert!(machine.answers(5).iter().all(|(_, answer)| answer.is_ok()));
    assert!(machine.has(0, 1) && machine.has(3, 2));
    let (layer, _) = stored.layer();
    let requests = server.requests();
    let of_layer = requests
        .iter()
        .filter(|request| request.target.contains(&layer.digest.hex()));
    assert_eq!(of_layer.count(), 1);
}

#[test]
fn two_agents_do_not_share_their_directories() {
    let home = Home::new();
    let _agent = home.start();
    let mut settings = home.settings();
    settings.socket = home.path().join("other.sock");
    assert!(matches!(
        Agent::start(settings),
        Err(AgentError::Pages(PagesError::InUse(_)))
    ));
}

#[test]
fn an_image_that_no_machine_uses_is_dropped_and_its_page_files_are_removed() {
    let stored = Stored::new();
    let home = Home::new();
    let mut settings = home.settings();
    settings.unused_after = Duration::from_millis(20);
    let agent = Agent::start(settings).unwrap();
    let image = stored.path().to_str().unwrap().to_owned();
    let machine = home.machine(&image).unwrap();
    machine.ask(&[0]);
    assert_eq!(machine.answer().0, 0);
    let folder = home.path().join("memory").join(stored.manifest.digest.hex());
    let page_file = machine.page_file();
    assert!(folder.join("memory").is_file());
    drop(machine.source);
    while folder.exists() || !agent.status().images.is_empty() {
        std::thread::yield_now();
    }
    // Who has it mapped goes on.
    let mut bytes = vec![0; CHUNK];
    page_file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, chunk_of(1));
    // And it is opened anew.
    let machine = home.machine(&image).unwrap();
    machine.ask(&[0]);
    assert_eq!(machine.answer(), (0, Ok(Arrived::Data)));
}

#[test]
fn a_stopped_agent_leaves_the_files_of_machines_and_nothing_else() {
    let stored = Stored::new();
    let home = Home::new();
    let agent = home.start();
    let image = stored.path().to_str().unwrap().to_owned();
    let folder = home.path().join("memory").join(stored.manifest.digest.hex());
    let machine = home.machine(&image).unwrap();
    agent.stop();
    assert!(folder.exists(), "the machine comes back for it");
    assert!(!home.socket().exists());
    drop(machine);
    // The next agent does not wait for who comes back for it, and leaves it to one that does.
    home.start().stop();
    assert!(folder.exists());
    let agent = home.start();
    std::thread::sleep(Duration::from_secs(4));
    agent.stop();
    assert!(!folder.exists());
}

#[test]
fn page_files_of_a_machine_whose_image_is_away_for_long_are_there_when_it_is_back() {
    let stored = Stored::new();
    let home = Home::new();
    let image = stored.path();
    let agent = home.start();
    let folder = home.path().join("memory").join(stored.manifest.digest.hex());
    let machine = home.machine(image.to_str().unwrap()).unwrap();
    machine.ask(&[0]);
    assert_eq!(machine.answer(), (0, Ok(Arrived::Data)));
    let away = image.with_extension("away");
    agent.stop();
    fs::rename(&image, &away).unwrap();
    // Longer than a machine waits before it tries again.
    let start = || {
        let mut settings = home.settings();
        settings.unused_after = Duration::from_secs(2);
        Agent::start(settings).unwrap()
    };
    let agent = start();
    std::thread::sleep(Duration::from_secs(5));
    assert!(folder.exists(), "its machine has come back for it, in vain");
    agent.stop();
    assert!(folder.exists());
    let _agent = start();
    fs::rename(&away, &image).unwrap();
    // What it was told meanwhile comes first.
    while let (3, Err(failure)) = {
        machine.ask(&[3]);
        machine.answer()
    } {
        assert!(failure.transient, "{failure:?}");
    }
    assert!(machine.has(0, 1) && machine.has(3, 2));
}
