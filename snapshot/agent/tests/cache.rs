//! The host's cache: what its quota is, what goes first, what is copied and not fetched, and that a hole is never read.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod wire;

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use runnel_agent::agent::{Agent, AgentSettings};
use runnel_snapshot::pager::{Fetcher, FetcherSettings};
use runnel_snapshot::protocol::{self, AgentSource, Opening};
use runnel_snapshot::source::{Arrived, PageSource, Urgency, VolumeId};
use wire::fixture::Part::{Data, Zeros};
use wire::fixture::{CHUNK, chunk_of};
use wire::host::{Home, LONG, Machine, ids, registry};
use wire::program::Program;
use wire::scripted::{Reply, Request, Scripted};
use wire::{Stored, serve};

/// Where marks, footer and the file system's own books go.
const BOOKS: u64 = 64 << 10;

/// Room for so many chunks.
fn quota(chunks: u64) -> Option<u64> {
    Some(chunks * CHUNK as u64 + BOOKS)
}

fn start(home: &Home, chunks: u64) -> Agent {
    Agent::start(AgentSettings {
        memory_quota: quota(chunks),
        ..home.settings()
    })
    .unwrap()
}

/// An image whose chunk N, other than the second, has the content `first + N`.
fn image(first: u8, chunks: u8) -> Stored {
    let mut parts = vec![Data(chunk_of(first)), Zeros(1)];
    parts.extend((2..chunks).map(|number| Data(chunk_of(first + number))));
    Stored::of(&parts)
}

fn page_file(home: &Home, image: &Stored) -> PathBuf {
    home.path()
        .join("memory")
        .join(image.manifest.digest.hex())
        .join("memory")
}

fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

fn is_in(home: &Home, image: &Stored, chunk: u64) -> bool {
    let file = fs::File::open(page_file(home, image)).unwrap();
    let start = chunk * CHUNK as u64;
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(start)).is_ok_and(|at| at == start)
}

/// Asks for chunks, one after the other.
fn gets(machine: &Machine, chunks: impl IntoIterator<Item = u64>) {
    for chunk in chunks {
        machine.ask(&[chunk]);
        assert_eq!(machine.answer(), (chunk, Ok(Arrived::Data)));
    }
}

#[test]
fn over_the_quota_images_that_no_machine_uses_go_first_and_the_one_longest_unused_before_others() {
    let images = [image(10, 10), image(40, 10), image(70, 10)];
    let home = Home::new();
    let agent = start(&home, 24);
    let open = |image: &Stored| home.machine(image.path().to_str().unwrap()).unwrap();
    let [first, second, third] = &images;
    let (of_first, of_second) = (open(first), open(second));
    gets(&of_first, [0, 2, 3, 4, 5, 6, 7, 8, 9]);
    gets(&of_second, [0, 2, 3, 4, 5, 6, 7, 8, 9]);
    // The one that came later goes earlier, and has been gone for longer.
    for (machine, image) in [(of_second, second), (of_first, first)] {
        drop(machine.source);
        let digest = image.manifest.digest;
        let is_unused = || {
            let images = agent.status().images;
            images
                .iter()
                .any(|image| image.digest == digest && image.machines == 0)
        };
        while !is_unused() {
            std::thread::yield_now();
        }
    }
    let of_third = open(third);
    gets(&of_third, [0, 2, 3, 4, 5, 6, 7, 8, 9]);

    let status = agent.status().cache;
    assert_eq!(status.memory.bytes_max, quota(24).unwrap());
    assert!(status.memory.bytes <= status.memory.bytes_max, "{status:?}");
    assert!(status.memory.bytes_evicted >= 3 * CHUNK as u64, "{status:?}");
    let kept: u64 = images
        .iter()
        .map(|image| allocated(&page_file(&home, image)))
        .sum();
    assert_eq!(status.memory.bytes, kept);
    assert!([0, 2, 9].iter().all(|chunk| is_in(&home, third, *chunk)));
    assert!([0, 2, 9].iter().all(|chunk| is_in(&home, first, *chunk)));
    // What came first stays: a machine that is resumed begins with it.
    assert!(is_in(&home, second, 0) && !is_in(&home, second, 9));
    let again = open(second);
    gets(&again, [9]);
    assert!(again.has(9, 49));
}

#[test]
fn fill_stops_at_the_quota_and_takes_nothing_from_machines() {
    let image = image(10, 40);
    let server = registry(&image, Reply::part);
    let home = Home::new();
    let agent = start(&home, 16);
    let machine = home.machine(&format!("{}/web", server.base())).unwrap();
    gets(&machine, [30]);
    let fill: Vec<u64> = (4..40).filter(|chunk| *chunk != 30).collect();
    machine.source.ask(&ids(&fill), Urgency::Fill);
    let mut filled = machine.answer().0;
    // Somebody wants what the fill has no room for: until it comes it is not known how much there was.
    machine.ask(&[39, 0]);
    while machine.answer().0 != 39 {
        filled += 1;
    }
    assert!(filled > 0 && machine.has(39, 49));
    assert!(agent.status().cache.memory.bytes <= quota(16).unwrap());
    assert!(is_in(&home, &image, 30), "what was waited for goes last");
}

/// A machine's fetcher, which reads its page file as overlays and snapshots do.
fn fetcher(home: &Home, image: &str) -> (Arc<Fetcher>, Arc<AgentSource>) {
    let source = AgentSource::open(Opening {
        agent: home.socket(),
        image: image.to_owned(),
        machine: "reader".to_owned(),
        deadline: LONG,
    });
    let source = Arc::new(source.unwrap());
    let settings = FetcherSettings {
        fill: false,
        neighbourhood_bytes: 0,
        ..FetcherSettings::default()
    };
    (Fetcher::start(source.clone(), settings).unwrap(), source)
}

#[test]
fn machines_that_need_more_than_the_quota_read_what_is_theirs_and_never_a_hole() {
    const CHUNKS: u8 = 48;
    const ROUNDS: usize = 6;
    let image = image(10, CHUNKS);
    let home = Home::new();
    let agent = start(&home, 12);
    let path = image.path().to_str().unwrap().to_owned();
    let machines = [fetcher(&home, &path), fetcher(&home, &path)];
    std::thread::scope(|scope| {
        for (number, (fetcher, source)) in machines.iter().enumerate().cycle().take(4) {
            scope.spawn(move || {
                let file = source.page_file(VolumeId(0));
                for step in 0..ROUNDS * usize::from(CHUNKS) {
                    // Each its own way through, so that they meet.
                    let chunk = (step * [5, 7][number] % usize::from(CHUNKS)) as u8;
                    let id = ids(&[chunk.into()])[0];
                    let mut bytes = vec![0; CHUNK];
                    let start = u64::from(chunk) * CHUNK as u64;
                    let read = || file.read_exact_at(&mut bytes, start);
                    let what = fetcher.read_held(id, || fetcher.wait(id), read).unwrap();
                    match chunk {
                        1 => assert_eq!(what, Arrived::Zero),
                        chunk => assert!(bytes == chunk_of(10 + chunk), "chunk {chunk}"),
                    }
                }
            });
        }
    });
    let status = agent.status().cache;
    assert!(
        status.memory.bytes_evicted > CHUNK as u64 * u64::from(CHUNKS),
        "{status:?}"
    );
    machines.iter().for_each(|(fetcher, _)| fetcher.stop());
}

#[test]
fn a_chunk_that_another_image_has_is_copied_and_not_fetched() {
    // Chunks 2 to 9 of the first are 0 and 2 to 8 of the second, each somewhere else.
    let (first, second) = (image(10, 10), image(11, 9));
    let home = Home::new();
    let agent = home.start();
    let served = serve(&[&first.path()]);
    let fetched = Arc::new(AtomicUsize::new(0));
    let fetching = Arc::clone(&fetched);
    let server = registry(&second, move |request, bytes| {
        fetching.fetch_add(1, Ordering::SeqCst);
        Reply::part(request, bytes)
    });
    let of_first = home.machine(&format!("http://{}/web", served.address())).unwrap();
    gets(&of_first, [3, 4, 5]);
    let of_second = home.machine(&format!("{}/web", server.base())).unwrap();
    // Contents 13 to 15, which the first has, and 16, which it has not.
    gets(&of_second, [2, 3, 4, 5]);
    assert!((2..6).all(|chunk| of_second.has(chunk, 11 + chunk as u8)));
    assert_eq!(fetched.load(Ordering::SeqCst), 1);
    let status = agent.status();
    let its = |image: &Stored| {
        let digest = image.manifest.digest;
        status.images.iter().find(|image| image.digest == digest).unwrap()
    };
    assert_eq!((its(&first).chunks_copied, its(&second).chunks_copied), (0, 3));
    assert!(its(&second).bytes_saved > 0 && its(&second).bytes_kept >= 4 * CHUNK as u64);
    // And the other way round.
    gets(&of_first, [6]);
    assert!(of_first.has(6, 16));
}

/// A server that lets nobody have its layer before it is told to.
struct Gate(Mutex<bool>, Condvar);

impl Gate {
    fn closed() -> Arc<Self> {
        Arc::new(Self(Mutex::new(false), Condvar::new()))
    }

    fn open(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }

    fn pass(&self) {
        drop(self.1.wait_while(self.0.lock().unwrap(), |open| !*open).unwrap());
    }
}

/// Two images that have one content in common, that of the first chunk of the first and the third of the second; the
/// machines of both, and the servers. That of the first lets its layer through a gate, and says so; then it answers as
/// `first_answers` says. The gate opens when a machine of the second wants what it alone has.
struct Common {
    images: [Stored; 2],
    wanted: [Arc<AtomicUsize>; 2],
    gate: Arc<Gate>,
    machines: [Machine; 2],
    /// Gone before the agent, which would wait for one that is silent.
    _servers: [Scripted; 2],
    agent: Agent,
    _home: Home,
}

impl Common {
    fn new(first_answers: impl Fn(&Request, &[u8]) -> Reply + Send + Sync + 'static) -> Self {
        let images = [image(10, 4), image(8, 4)];
        let home = Home::new();
        let agent = home.start();
        let gate = Gate::closed();
        let wanted: [Arc<AtomicUsize>; 2] = Default::default();
        let (its_gate, its_wanted) = (Arc::clone(&gate), Arc::clone(&wanted[0]));
        let first = registry(&images[0], move |request, bytes| {
            its_wanted.fetch_add(1, Ordering::SeqCst);
            its_gate.pass();
            first_answers(request, bytes)
        });
        let (its_gate, its_wanted) = (Arc::clone(&gate), Arc::clone(&wanted[1]));
        let second = registry(&images[1], move |request, bytes| {
            its_wanted.fetch_add(1, Ordering::SeqCst);
            its_gate.open();
            Reply::part(request, bytes)
        });
        let servers = [first, second];
        let machines = [0, 1].map(|number: usize| {
            let url = format!("{}/web", servers[number].base());
            home.machine(&url).unwrap()
        });
        Self {
            images,
            wanted,
            gate,
            machines,
            _servers: servers,
            agent,
            _home: home,
        }
    }

    /// The first machine wants the content, and its server is asked; then the second does, and the one behind it.
    fn both_want_it(&self) {
        self.machines[0].ask(&[0]);
        while self.wanted[0].load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        // In one pair of hands.
        self.machines[1].source.ask(&ids(&[2, 3]), Urgency::Fill);
    }

    fn second_has_all(&self) {
        let answers = self.machines[1].answers(2);
        assert_eq!(answers, [(2, Ok(Arrived::Data)), (3, Ok(Arrived::Data))]);
        assert!(self.machines[1].has(2, 10) && self.machines[1].has(3, 11));
    }

    fn copied(&self) -> u64 {
        let images = self.agent.status().images.into_iter();
        let mut second = images.filter(|image| image.digest == self.images[1].manifest.digest);
        second.next().unwrap().chunks_copied
    }
}

impl Drop for Common {
    fn drop(&mut self) {
        self.gate.open();
    }
}

#[test]
fn a_chunk_that_two_images_want_at_the_same_time_is_fetched_once() {
    let common = Common::new(Reply::part);
    common.both_want_it();
    common.second_has_all();
    assert_eq!(common.machines[0].answer(), (0, Ok(Arrived::Data)));
    assert_eq!(common.copied(), 1);
    let wanted = common
        .wanted
        .each_ref()
        .map(|wanted| wanted.load(Ordering::SeqCst));
    assert_eq!(wanted, [1, 1], "of the second, what the first has not");
}

#[test]
fn what_was_left_to_another_image_that_cannot_have_it_is_fetched_all_the_same() {
    let common = Common::new(|_, _| Reply::status("404 Not Found", &[]));
    common.both_want_it();
    common.second_has_all();
    assert!(common.machines[0].answer().1.is_err());
    assert_eq!(common.copied(), 0);
}

#[test]
fn what_was_left_to_another_image_whose_server_is_silent_is_fetched_all_the_same() {
    let common = Common::new(|_, _| Reply::Hang(Vec::new()));
    common.both_want_it();
    common.second_has_all();
    assert_eq!(common.copied(), 0);
}

#[test]
fn images_that_have_the_same_in_other_orders_do_not_wait_for_each_other_for_ever() {
    const CHUNKS: u8 = 40;
    let forth: Vec<u8> = (1..=CHUNKS).collect();
    let orders = [0, 7, 19, 31].map(|by| {
        let mut order = forth.clone();
        order.rotate_left(by);
        // Chunk 1 is zeros, as the fixture has it.
        let data = |content: &u8| Data(chunk_of(*content));
        let mut parts = vec![data(&order[0]), Zeros(1)];
        parts.extend(order[1..].iter().map(data));
        (order, Stored::of(&parts))
    });
    let home = Home::new();
    let _agent = home.start();
    let servers = orders.each_ref().map(|(_, image)| registry(image, Reply::part));
    let machines = servers
        .each_ref()
        .map(|server| home.machine(&format!("{}/web", server.base())).unwrap());
    let chunks: Vec<u64> = (0..=u64::from(CHUNKS)).filter(|chunk| *chunk != 1).collect();
    for (machine, urgency) in
        machines
            .iter()
            .zip([Urgency::Soon, Urgency::Demand, Urgency::Soon, Urgency::Fill])
    {
        machine.source.ask(&ids(&chunks), urgency);
    }
    for (machine, (order, _)) in machines.iter().zip(&orders) {
        assert!(
            machine
                .answers(chunks.len())
                .iter()
                .all(|(_, answer)| *answer == Ok(Arrived::Data))
        );
        assert!(
            chunks
                .iter()
                .zip(order)
                .all(|(chunk, content)| machine.has(*chunk, *content))
        );
    }
}

#[test]
fn what_an_agent_inherits_counts_against_its_quota_and_is_looked_at_before_it_is_given_to_anybody() {
    let image = image(10, 12);
    let home = Home::new();
    let fetched = Arc::new(AtomicUsize::new(0));
    let fetching = Arc::clone(&fetched);
    let server = registry(&image, move |request, bytes| {
        fetching.fetch_add(1, Ordering::SeqCst);
        Reply::part(request, bytes)
    });
    let url = format!("{}/web", server.base());
    let first = home.start();
    let machine = home.machine(&url).unwrap();
    gets(&machine, [0, 2, 3, 4, 5, 6, 7, 8]);
    first.stop();
    // Somebody's disk, or hand, is not to be trusted.
    let path = page_file(&home, &image);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(b"?", 4 * CHUNK as u64 + 100).unwrap();
    drop(file);

    let agent = start(&home, 10);
    let before = fetched.load(Ordering::SeqCst);
    let heard = |chunk: u64| {
        loop {
            machine.ask(&[chunk]);
            match machine.answer() {
                (number, Ok(_)) if number == chunk => break,
                // The old agent's end.
                (_, answer) => assert!(answer.is_ok_and(|_| true) || chunk > 0),
            }
        }
    };
    heard(3);
    assert_eq!(fetched.load(Ordering::SeqCst), before, "it was there");
    heard(4);
    assert!(machine.has(4, 14));
    assert_eq!(fetched.load(Ordering::SeqCst), before + 1, "it was not right");
    assert!(agent.status().cache.memory.bytes >= 8 * CHUNK as u64);
    [9, 10, 11].into_iter().for_each(heard);
    let status = agent.status().cache.memory;
    assert!(
        status.bytes <= status.bytes_max && status.bytes_evicted > 0,
        "{status:?}"
    );
    assert!(is_in(&home, &image, 11), "what came last");
    assert!(is_in(&home, &image, 4), "what somebody has asked for");
}

#[test]
fn an_image_that_is_removed_in_use_says_what_to_do_and_goes_on_when_that_was_done() {
    let stored = Stored::new();
    let removed = registry(&stored, |_, _| Reply::status("404 Not Found", &[]));
    let home = Home::new();
    let agent = home.start();
    let url = format!("{}/web", removed.base());
    let machine = home.machine(&url).unwrap();
    machine.ask(&[0]);
    let failure = machine.answer().1.unwrap_err();
    assert!(!failure.transient, "{failure}");
    for what in [
        url.as_str(),
        "removed in use: copy it there again, or resume it from another place",
    ] {
        assert!(failure.reason.contains(what), "{failure}");
    }
    assert!(agent.status().images[0].trouble.is_some());
    let _other = home.machine(stored.path().to_str().unwrap()).unwrap();
    machine.gets(0);
    assert!(machine.has(0, 1));
}

fn is_root(what: &str) -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    assert!(
        std::env::var_os("RUNNEL_LAB").is_none_or(|lab| lab != "full"),
        "{what} needs root to be tested"
    );
    let skipped = format!("skipped: {what} needs root to be tested\n");
    std::io::stderr().write_all(skipped.as_bytes()).unwrap(); // past the test harness, which keeps back what is printed
    false
}

#[test]
fn a_full_file_system_has_what_came_first_taken_out_before_anything_fails() {
    if !is_root("a full page folder") {
        return;
    }
    let image = image(10, 9);
    let home = Home::new();
    let _agent = Program::start_with_little_room(&home, "256k");
    let machine = home.machine(image.path().to_str().unwrap()).unwrap();
    for _ in 0..3 {
        for chunk in [0, 2, 3, 4, 5, 6, 7, 8] {
            gets(&machine, [chunk]);
            assert!(machine.has(chunk, 10 + chunk as u8));
        }
    }
    let status = protocol::status(&home.socket(), LONG).unwrap();
    assert_eq!(status.images[0].unkept, None);
    assert!(status.cache.memory.bytes_evicted > 0);
}

#[test]
fn what_cannot_be_kept_is_named_and_not_fetched_again_and_again() {
    if !is_root("a full page folder") {
        return;
    }
    let stored = Stored::new();
    let fetched = Arc::new(AtomicUsize::new(0));
    let fetching = Arc::clone(&fetched);
    let server = registry(&stored, move |request, bytes| {
        fetching.fetch_add(1, Ordering::SeqCst);
        Reply::part(request, bytes)
    });
    let home = Home::new();
    // Room for where the image was found, and for less than a chunk.
    let _agent = Program::start_with_little_room(&home, "64k");
    let machine = home.machine(&format!("{}/web", server.base())).unwrap();
    for _ in 0..10 {
        machine.ask(&[3]);
        let failure = machine.answer().1.unwrap_err();
        assert!(
            failure.transient && failure.reason.contains("No space left"),
            "{failure}"
        );
    }
    let fetched = fetched.load(Ordering::SeqCst);
    assert!(fetched < 10, "{fetched} times");
    let status = protocol::status(&home.socket(), LONG).unwrap();
    let unkept = status.images[0].unkept.as_deref().unwrap();
    let memory = home.path().join("memory");
    let expected = format!("memory in {}: No space left", memory.display());
    assert!(unkept.starts_with(&expected), "{unkept}");
    assert_eq!(status.images[0].trouble, None);
}
