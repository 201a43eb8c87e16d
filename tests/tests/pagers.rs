//! The monitor's pager over a `runnel-agent` that is killed: threads touch memory as vCPUs do, all at once, without KVM.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use runnel_snapshot::pager::{Fetcher, FetcherSettings};
use runnel_snapshot::protocol::{AgentSource, Opening};
use runnel_snapshot::units::{PAGE_SIZE, PageIndex};
use runnel_snapshot::volume::VolumeName;
use runnel_tests::agent::Agent;
use runnel_tests::bare::wait_until;
use runnel_tests::link::{Link, Wrong};
use runnel_tests::monitor::DEADLINE;
use runnel_tests::served::{Served, TRICKLE};
use runnel_vmm::pager::{HostAddress, HostMapping, Pager};
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Threads that wait at once.
const THREADS: u64 = 8;
const CHUNK: u64 = 64 << 10;
/// Where the image has 4 MiB of pattern 7.
const PATTERN: u64 = 8 << 20;

/// What the guest filled the page at `address` with.
fn word_at(address: u64) -> u64 {
    (address ^ 7).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// A machine's memory, which nothing unmaps before the process ends: a thread may still wait in it when a test fails.
#[derive(Clone, Copy)]
struct Memory(u64);

impl Memory {
    /// The word at `address`, and whether its page holds nothing else; may wait for the page.
    fn read(self, address: u64) -> (u64, bool) {
        let words = (self.0 + address) as *const u64;
        let word = |at| {
            // SAFETY: the address is page-aligned and within the mapping, which is never undone.
            let word = unsafe { words.add(at) };
            // SAFETY: as above; other threads do nothing but read this page.
            unsafe { word.read_volatile() }
        };
        let first = word(0);
        (first, (1..PAGE_SIZE as usize / 8).all(|at| word(at) == first))
    }

    fn write(self, address: u64, value: u64) {
        // SAFETY: the address is page-aligned and within the mapping, which is never undone; nobody else uses the page.
        unsafe { ((self.0 + address) as *mut u64).write_volatile(value) }
    }

    /// Reads on a thread of its own, which is left behind if it waits for ever.
    fn reader(self, address: u64) -> Receiver<(u64, bool)> {
        let (sender, read) = channel();
        thread::spawn(move || sender.send(self.read(address)));
        read
    }
}

/// An image behind a link and an agent, and a machine's memory over it.
struct Rig {
    served: Served,
    link: Link,
    agent: Option<Agent>,
    pager: Pager,
    memory: Memory,
}

impl Rig {
    fn new() -> Self {
        let served = Served::new();
        let link = Link::to(served.address());
        let agent = served.agents().start(&TRICKLE);
        let source = AgentSource::open(Opening {
            agent: served.agents().socket(),
            image: format!("http://{}/bare", link.address()),
            machine: "threads".to_owned(),
            deadline: DEADLINE,
        });
        let settings = FetcherSettings {
            neighbourhood_bytes: 0,
            fill: false,
            // Whoever waits counts at once, so that it can be seen.
            stall_after: std::time::Duration::ZERO,
            ..FetcherSettings::default()
        };
        let fetcher = Fetcher::start(Arc::new(source.unwrap()), settings).unwrap();
        let (volume, about) = fetcher.volume_named(&VolumeName::Memory).unwrap();
        let bytes = about.bytes;
        let file = fetcher.source().page_file(volume);
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
                &*file,
                0,
            )
        };
        let memory = Memory(start.unwrap() as u64);
        let mapping = HostMapping {
            start: HostAddress(memory.0),
            bytes,
            first_page: PageIndex(0),
        };
        let pager = Pager::start(&fetcher, vec![mapping]).unwrap();
        Self {
            served,
            link,
            agent: Some(agent),
            pager,
            memory,
        }
    }

    fn kill_agent(&mut self) {
        drop(self.agent.take().unwrap());
    }

    fn start_agent(&mut self) {
        self.agent = Some(self.served.agents().start(&TRICKLE));
    }

    /// Waits until so many chunks are waited for.
    fn wait_until_awaited(&self, chunks: usize) {
        wait_until("threads wait", || {
            let stall = self.pager.logic().stall();
            stall.is_some_and(|stall| stall.chunks_waited_for == chunks)
        });
    }

    /// As a balloon does it.
    fn give_back(&self, address: u64, bytes: u64) {
        let (first, count) = (PageIndex::holding(address), bytes / PAGE_SIZE);
        self.pager.write_protection().discard(first, count);
        self.pager.logic().discard(first, count);
        // SAFETY: the pages hold plain bytes that no other thread looks at.
        unsafe {
            rustix::mm::madvise(
                (self.memory.0 + address) as *mut _,
                bytes as usize,
                Advice::LinuxDontNeed,
            )
        }
        .unwrap();
    }
}

fn comes(read: &Receiver<(u64, bool)>) -> u64 {
    let (word, is_whole) = read.recv_timeout(DEADLINE).expect("its page comes");
    assert!(is_whole);
    word
}

#[test]
fn an_agent_killed_with_eight_faults_pending_loses_none_of_them() {
    const ROUNDS: u64 = 4;
    let mut rig = Rig::new();
    for round in 0..ROUNDS {
        rig.link.go_wrong(Wrong::Silent, usize::MAX);
        let addresses: Vec<u64> = (0..THREADS)
            .map(|thread| PATTERN + (thread * ROUNDS + round) * CHUNK + thread * PAGE_SIZE)
            .collect();
        let reads: Vec<_> = addresses.iter().map(|at| rig.memory.reader(*at)).collect();
        rig.wait_until_awaited(THREADS as usize);
        rig.kill_agent();
        assert!(reads.iter().all(|read| read.try_recv().is_err()), "nothing came");
        // In every second round the next agent finds the link as it was, and is waited for.
        if round % 2 == 0 {
            rig.link.heal();
        }
        rig.start_agent();
        if round % 2 == 1 {
            let before = rig.link.went_wrong();
            wait_until("the new agent asks", || rig.link.went_wrong() > before);
            assert!(reads.iter().all(|read| read.try_recv().is_err()), "nothing came");
            rig.link.heal();
        }
        for (address, read) in addresses.iter().zip(&reads) {
            assert_eq!(comes(read), word_at(*address), "{address:#x}");
        }
        assert_eq!(rig.pager.logic().stall(), None);
    }
}

#[test]
fn what_was_given_back_stays_zeros_when_the_agent_is_killed_and_what_was_not_comes() {
    let mut rig = Rig::new();
    let (written, untouched, edge) = (PATTERN, PATTERN + CHUNK, PATTERN + 2 * CHUNK);
    // A page of the image's and one of the machine's own, then a chunk that has not come, and the beginning of another.
    assert_eq!(comes(&rig.memory.reader(written)), word_at(written));
    rig.memory.write(written + PAGE_SIZE, 7);
    rig.give_back(written, 2 * PAGE_SIZE);
    rig.give_back(untouched, CHUNK);
    rig.give_back(edge, 4 * PAGE_SIZE);
    rig.kill_agent();

    // They need no agent.
    for address in [
        written,
        written + PAGE_SIZE,
        untouched,
        untouched + CHUNK - PAGE_SIZE,
        edge,
    ] {
        assert_eq!(comes(&rig.memory.reader(address)), 0, "{address:#x}");
    }
    let others = [edge + 4 * PAGE_SIZE, edge + 9 * PAGE_SIZE, PATTERN + 3 * CHUNK];
    let reads = others.map(|address| rig.memory.reader(address));
    rig.wait_until_awaited(2);
    assert!(
        reads.iter().all(|read| read.try_recv().is_err()),
        "nobody is there"
    );

    rig.start_agent();
    for (address, read) in others.iter().zip(&reads) {
        assert_eq!(comes(read), word_at(*address), "{address:#x}");
    }
    // Their chunk is here now, and they are still not the image's.
    for page in 0..4 {
        assert_eq!(
            comes(&rig.memory.reader(edge + page * PAGE_SIZE)),
            0,
            "page {page}"
        );
    }
    assert_eq!(
        comes(&rig.memory.reader(written + 2 * PAGE_SIZE)),
        word_at(written + 2 * PAGE_SIZE)
    );
    // Used again, a page is an ordinary one.
    rig.memory.write(untouched, 9);
    assert_eq!(rig.memory.read(untouched).0, 9);
}
