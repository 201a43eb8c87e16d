//! The agent over its socket, as monitors use it: chunks fetched once for all, kept across its death, never wrong.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod wire;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use runnel_agent::agent::{Agent, AgentError, AgentSettings, PagesError};
use runnel_agent::remote::RemoteSettings;
use runnel_snapshot::index::SEGMENT_VOLUME_BYTES;
use runnel_snapshot::protocol::{self, AgentSource, ConnectError, Opening};
use runnel_snapshot::source::{Arrived, ChunkFailure, ChunkId, ChunkSink, PageSource, Urgency, VolumeId};
use runnel_snapshot::units::ChunkIndex;
use tempfile::TempDir;
use wire::fixture::{CHUNK, chunk_of};
use wire::scripted::{Reply, Request, Scripted};
use wire::{Stored, serve};

/// Longer than anything takes: only a test that has failed waits for it.
const LONG: Duration = Duration::from_secs(60);

/// An agent's directories, which outlive it.
struct Home(TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn socket(&self) -> PathBuf {
        self.0.path().join("agent.sock")
    }

    fn settings(&self) -> AgentSettings {
        let folder = |name| self.0.path().join(name);
        AgentSettings {
            remote: RemoteSettings {
                connections_ahead: 0,
                idle_deadline: LONG,
                ..RemoteSettings::default()
            },
            ..AgentSettings::new(self.socket(), folder("memory"), folder("drives"))
        }
    }

    fn start(&self) -> Agent {
        Agent::start(self.settings()).unwrap()
    }

    fn machine(&self, image: &str) -> Result<Machine, ConnectError> {
        let source = AgentSource::open(Opening {
            agent: self.socket(),
            image: image.to_owned(),
            machine: "test".to_owned(),
            deadline: LONG,
        })?;
        let (sender, answers) = channel();
        source.deliver_to(Arc::new(Answers(Mutex::new(sender))));
        Ok(Machine { source, answers })
    }
}

type Answer = (u64, Result<Arrived, ChunkFailure>);

struct Answers(Mutex<Sender<Answer>>);

impl ChunkSink for Answers {
    fn arrived(&self, chunk: ChunkId, what: Arrived) {
        let _ = self.0.lock().unwrap().send((chunk.chunk.0, Ok(what))); // the test may have ended
    }

    fn failed(&self, chunk: ChunkId, failure: ChunkFailure) {
        let _ = self.0.lock().unwrap().send((chunk.chunk.0, Err(failure)));
    }
}

/// A monitor, as far as the agent can tell.
struct Machine {
    source: AgentSource,
    answers: Receiver<Answer>,
}

fn ids(chunks: &[u64]) -> Vec<ChunkId> {
    let id = |number: &u64| ChunkId {
        volume: VolumeId(0),
        chunk: ChunkIndex(*number),
    };
    chunks.iter().map(id).collect()
}

impl Machine {
    fn ask(&self, chunks: &[u64]) {
        self.source.ask(&ids(chunks), Urgency::Demand);
    }

    fn answer(&self) -> Answer {
        self.answers.recv_timeout(LONG).unwrap()
    }

    /// Asks for a chunk until it is there.
    fn gets(&self, chunk: u64) {
        let begun = Instant::now();
        loop {
            self.ask(&[chunk]);
            match self.answer() {
                (_, Ok(what)) => return assert_eq!(what, Arrived::Data),
                (_, Err(failure)) => assert!(failure.transient && begun.elapsed() < LONG, "{failure}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn answers(&self, count: usize) -> Vec<Answer> {
        let mut answers: Vec<Answer> = (0..count).map(|_| self.answer()).collect();
        answers.sort_by_key(|answer| answer.0);
        answers
    }

    fn page_file(&self) -> Arc<File> {
        self.source.page_file(VolumeId(0))
    }

    /// Whether the page file has the chunk.
    fn has(&self, chunk: u64, content: u8) -> bool {
        let mut bytes = vec![0; CHUNK];
        self.page_file()
            .read_exact_at(&mut bytes, chunk * CHUNK as u64)
            .unwrap();
        bytes == chunk_of(content)
    }
}

/// A registry of one image, all of whose volumes come with wrong bytes: layers and indexes.
fn damaged_registry(stored: &Stored) -> Scripted {
    let image = stored.open();
    let blobs = image.manifest.blobs();
    let files: Vec<_> = blobs
        .iter()
        .map(|blob| {
            let mut bytes = stored.bytes_of(blob);
            if blob.digest != image.manifest.state.digest {
                bytes.iter_mut().for_each(|byte| *byte ^= 0x10);
            }
            (format!("/v2/web/blobs/{}", blob.digest), bytes)
        })
        .collect();
    let manifest = stored.bytes_of(&stored.manifest);
    Scripted::start(move |request| {
        if request.target.starts_with("/v2/web/manifests/") {
            return Reply::ok(&manifest);
        }
        match files.iter().find(|(path, _)| *path == request.target) {
            Some((_, bytes)) => Reply::part(request, bytes),
            None => Reply::status("404 Not Found", &[]),
        }
    })
}

/// A registry of one image, whose layer is answered as the script says.
fn registry(stored: &Stored, layer: impl Fn(&Request, &[u8]) -> Reply + Send + Sync + 'static) -> Scripted {
    let image = stored.open();
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    for blob in image.manifest.blobs() {
        files.push((format!("/v2/web/blobs/{}", blob.digest), stored.bytes_of(&blob)));
    }
    let layer_path = format!("/v2/web/blobs/{}", image.manifest.volumes[0].layers[0].digest);
    let manifest = stored.bytes_of(&stored.manifest);
    Scripted::start(move |request| {
        if request.target.starts_with("/v2/web/manifests/") {
            return Reply::ok(&manifest);
        }
        match files.iter().find(|(path, _)| *path == request.target) {
            Some((path, bytes)) if *path == layer_path => layer(request, bytes),
            Some((_, bytes)) => Reply::part(request, bytes),
            None => Reply::status("404 Not Found", &[]),
        }
    })
}

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

/// The agent as a program.
struct Program(Child);

impl Program {
    fn start(home: &Home) -> Self {
        let folder = |name: &str| home.0.path().join(name);
        let child = Command::new(env!("CARGO_BIN_EXE_runnel-agent"))
            .arg("--socket")
            .arg(home.socket())
            .arg("--memory-pages")
            .arg(folder("memory"))
            .arg("--drive-pages")
            .arg(folder("drives"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let program = Self(child);
        while !protocol::is_answering(&home.socket()) {
            std::thread::yield_now();
        }
        program
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
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
    let folder = home.0.path().join("memory").join(stored.manifest.digest.hex());
    fs::create_dir_all(&folder).unwrap();
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    fs::set_permissions(home.0.path().join("memory"), private).unwrap();
    // As if it had been killed in the middle of writing.
    fs::write(folder.join("memory"), &chunk_of(1)[..CHUNK / 3]).unwrap();
    let _agent = home.start();
    let machine = home.machine(&format!("http://{}/web", server.address())).unwrap();
    machine.ask(&[0]);
    assert_eq!(machine.answer(), (0, Ok(Arrived::Data)));
    assert!(machine.has(0, 1));
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
    let away = Arc::new(AtomicBool::new(true));
    let is_away = Arc::clone(&away);
    let server = registry(&stored, move |request, bytes| {
        match is_away.load(Ordering::SeqCst) {
            true => Reply::Close(Vec::new()),
            false => Reply::part(request, bytes),
        }
    });
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
fn an_image_is_read_where_it_was_named_last_and_elsewhere_when_that_fails() {
    let stored = Stored::new();
    let gone = Arc::new(AtomicBool::new(false));
    let is_gone = Arc::clone(&gone);
    let old = registry(&stored, |_, _| Reply::Close(Vec::new()));
    let new = registry(&stored, move |request, bytes| {
        match is_gone.load(Ordering::SeqCst) {
            true => Reply::Close(Vec::new()),
            false => Reply::part(request, bytes),
        }
    });
    let home = Home::new();
    let agent = home.start();
    let first = home.machine(&format!("{}/web", old.base())).unwrap();
    first.ask(&[3]);
    assert!(first.answer().1.unwrap_err().transient);
    assert!(agent.status().images[0].trouble.is_some());

    // Another machine, and the same image in a place that delivers.
    let second = home.machine(&format!("{}/web", new.base())).unwrap();
    first.ask(&[3]);
    assert_eq!(first.answer(), (3, Ok(Arrived::Data)));
    let status = agent.status();
    assert_eq!(status.images.len(), 1);
    assert_eq!(status.images[0].image, format!("{}/web", new.base()));
    let trouble = status.images[0].trouble.clone().unwrap();
    assert!(
        trouble.contains(&old.base()) && !trouble.contains(&new.base()),
        "{trouble}"
    );

    // Neither delivers: both are named, and it passes when one does again.
    gone.store(true, Ordering::SeqCst);
    second.ask(&[4]);
    let failure = second.answer().1.unwrap_err();
    assert!(failure.transient);
    for server in [&old, &new] {
        assert!(failure.reason.contains(&server.base()), "{failure}");
    }
    gone.store(false, Ordering::SeqCst);
    second.ask(&[4]);
    assert_eq!(second.answer(), (4, Ok(Arrived::Data)));
}

#[test]
fn wrong_bytes_of_one_place_are_read_again_in_another() {
    let stored = Stored::new();
    let damaged = damaged_registry(&stored);
    let sound = serve(&[&stored.path()]);
    let sound = format!("http://{}/web", sound.address());
    for newest_is_damaged in [false, true] {
        let home = Home::new();
        let agent = home.start();
        let machine = home.machine(&format!("{}/web", damaged.base())).unwrap();
        machine.ask(&[0, 4]);
        for (_, answer) in machine.answers(2) {
            assert!(!answer.unwrap_err().transient);
        }
        let _second = home.machine(&sound).unwrap();
        if newest_is_damaged {
            let _third = home.machine(&format!("{}/web", damaged.base())).unwrap();
        }
        machine.ask(&[0, 3, 4]);
        let data = |chunk| (chunk, Ok(Arrived::Data));
        assert_eq!(machine.answers(3), [data(0), data(3), data(4)]);
        assert!(machine.has(0, 1) && machine.has(3, 2));
        // Where right bytes came from is asked first from then on.
        assert_eq!(agent.status().images[0].image, sound);
    }
}

#[test]
fn a_new_place_of_a_pinned_image_is_used_too_and_waited_for_by_nobody() {
    let stored = Stored::new();
    let old = registry(&stored, |_, _| Reply::Close(Vec::new()));
    let new = serve(&[&stored.path()]);
    let home = Home::new();
    let _agent = home.start();
    let machine = home.machine(&format!("{}/web", old.base())).unwrap();
    let pinned = |base: &str| format!("{base}/web@{}", stored.manifest.digest);
    // Nobody is there, and the machine is none the worse for it.
    home.machine(&pinned("http://127.0.0.1:1")).unwrap();
    home.machine(&pinned(&format!("http://{}", new.address())))
        .unwrap();
    machine.gets(3);
}

#[test]
fn a_place_that_is_named_again_is_looked_at_again() {
    let stored = Stored::new();
    let (layer, sound) = stored.layer();
    let path = stored.path().join("blobs/sha256").join(layer.digest.hex());
    let put_in_place = |bytes: &[u8]| {
        let beside = path.with_extension("new");
        fs::write(&beside, bytes).unwrap();
        fs::rename(&beside, &path).unwrap();
    };
    put_in_place(&vec![0x5a; sound.len()]);
    let home = Home::new();
    let _agent = home.start();
    let image = stored.path();
    let image = image.to_str().unwrap();
    let machine = home.machine(image).unwrap();
    machine.ask(&[3]);
    assert!(!machine.answer().1.unwrap_err().transient);
    put_in_place(&sound);
    let _again = home.machine(image).unwrap();
    machine.ask(&[3]);
    assert_eq!(machine.answer(), (3, Ok(Arrived::Data)));
}

#[test]
fn the_next_agent_knows_the_places_that_the_last_one_knew() {
    let stored = Stored::new();
    let old = serve(&[&stored.path()]);
    let new = serve(&[&stored.path()]);
    let home = Home::new();
    let agent = home.start();
    let machine = home.machine(&format!("http://{}/web", old.address())).unwrap();
    let other = home.machine(&format!("http://{}/web", new.address())).unwrap();
    machine.ask(&[0]);
    assert_eq!(machine.answer(), (0, Ok(Arrived::Data)));
    // Where the machine began is gone, and so is the machine that knew of the other place.
    old.stop();
    agent.stop();
    drop(other);
    let agent = home.start();
    machine.gets(3);
    let status = agent.status();
    assert_eq!(
        status.images[0].image,
        format!("http://{}/web@{}", new.address(), stored.manifest.digest)
    );
}

#[test]
fn a_machine_that_comes_back_does_not_put_its_place_before_the_one_that_delivers() {
    let stored = Stored::new();
    let old = serve(&[&stored.path()]);
    let new = serve(&[&stored.path()]);
    let home = Home::new();
    let agent = home.start();
    let machine = home.machine(&format!("http://{}/web", old.address())).unwrap();
    let _other = home.machine(&format!("http://{}/web", new.address())).unwrap();
    agent.stop();
    let agent = home.start();
    machine.gets(3);
    let read_at = &agent.status().images[0].image;
    assert!(read_at.contains(&new.address().to_string()), "{read_at}");
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
    settings.socket = home.0.path().join("other.sock");
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
    let folder = home.0.path().join("memory").join(stored.manifest.digest.hex());
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
    let folder = home.0.path().join("memory").join(stored.manifest.digest.hex());
    let machine = home.machine(&image).unwrap();
    agent.stop();
    assert!(folder.exists(), "the machine comes back for it");
    assert!(!home.socket().exists());
    drop(machine);
    // The next agent has nobody come back, and takes it away when it ends.
    home.start().stop();
    assert!(!folder.exists());
}
