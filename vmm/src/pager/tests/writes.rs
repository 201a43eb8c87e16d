//! Write protection on this machine's userfaultfd: what is read of a moment while threads and system calls write.

use std::path::Path;
use std::sync::Barrier;
use std::sync::mpsc::channel;

use runnel_snapshot::copy_before_write::{EarlyPages, EarlyPagesLimits, Moment, OwnPages};
use runnel_snapshot::pager::{PageSet, WriteProtection};

use super::*;

const PAGES: u64 = BYTES / PAGE_SIZE;

impl OwnPages for Memory {
    fn read(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        let pages = (into.len() as u64).div_ceil(PAGE_SIZE);
        into.copy_from_slice(&self.slice(offset / PAGE_SIZE, pages)[..into.len()]);
        Ok(())
    }
}

fn early(pages: u64) -> Arc<EarlyPages> {
    let limits = EarlyPagesLimits {
        memory_bytes: pages * PAGE_SIZE,
        file_bytes: 0,
    };
    Arc::new(EarlyPages::new(limits, Path::new("/nonexistent")))
}

fn own(memory: Memory) -> PageSet {
    own_pages(&memory.mappings(), PAGES).unwrap()
}

/// What the capture reads of `page`, which must be the same byte all over.
fn saved(moment: &Moment, page: u64) -> u8 {
    let mut bytes = vec![0xEE; PAGE_SIZE as usize];
    moment.read(page * PAGE_SIZE, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == bytes[0]));
    bytes[0]
}

/// Tells the kernel that the guest gave a page back.
fn drop_page(memory: Memory, page: u64) {
    // SAFETY: the page holds plain bytes that no other thread looks at.
    unsafe {
        rustix::mm::madvise(
            (memory.0 + page * PAGE_SIZE) as *mut _,
            PAGE_SIZE as usize,
            Advice::LinuxDontNeed,
        )
    }
    .unwrap();
}

/// Does `act` on a thread of its own, which is left behind if it never returns.
fn in_time<T: Send + 'static>(what: &str, act: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, done) = channel();
    std::thread::spawn(move || sender.send(act()));
    done.recv_timeout(Duration::from_secs(20))
        .unwrap_or_else(|_| panic!("{what}: never done"))
}

#[test]
fn what_threads_and_system_calls_write_after_the_freeze_is_not_saved_and_is_there() {
    let source = Source::new(false);
    let (pager, memory) = start(&source);
    let protection = pager.write_protection();
    // On both sides of the cut, and in a chunk of zeros.
    let cut = CUT / PAGE_SIZE;
    let pages = [18, 2 * 16, cut - 1, cut, cut + 1];
    for page in pages {
        memory.slice(page, 1).fill(0x11);
    }
    let own = own(memory);
    protection.arm_ahead(&own).unwrap();
    // Before the machine stands: it is the last word that counts.
    memory.slice(18, 1).fill(0x22);
    let moment = protection.freeze(own, Box::new(memory), early(8)).unwrap();

    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[0x44; 3 * PAGE_SIZE as usize]).unwrap();
    file.rewind().unwrap();
    in_time("a write by a thread", move || memory.slice(18, 1).fill(0x33));
    in_time("a write by a thread", move || memory.slice(2 * 16, 1)[7] = 0x33);
    in_time("read(2) into protected pages", move || {
        file.read_exact(&mut memory.slice(cut - 1, 3)[..]).unwrap();
    });
    assert_eq!(memory.byte(18), 0x33);
    assert_eq!(memory.slice(2 * 16, 1)[6..8], [0x11, 0x33]);
    for page in cut - 1..cut + 2 {
        assert_eq!(memory.byte(page), 0x44);
    }
    let found = pages.map(|page| saved(&moment, page));
    assert_eq!(found, [0x22, 0x11, 0x11, 0x11, 0x11]);
    drop(moment);
    let counters = protection.lift();
    assert_eq!((counters.faults_ahead, counters.faults_held), (1, 0));
    assert!((3..=5).contains(&counters.faults_frozen), "{counters:?}");
    assert_eq!(counters.armed_at_pause, 1, "the page that was written ahead");
}

#[test]
fn two_writers_of_one_page_both_go_on_and_it_is_kept_once() {
    let source = Source::new(false);
    let (pager, memory) = start(&source);
    let early = early(8);
    for round in 1..=50 {
        memory.slice(18, 1).fill(round);
        let moment = pager
            .write_protection()
            .freeze(own(memory), Box::new(memory), early.clone())
            .unwrap();
        let together = Arc::new(Barrier::new(2));
        let writers = [7, 9].map(|at: usize| {
            let together = together.clone();
            std::thread::spawn(move || {
                together.wait();
                let byte = (memory.0 + 18 * PAGE_SIZE + at as u64) as *mut u8;
                // SAFETY: a byte of the mapping, which is never undone; the other thread writes to another one.
                unsafe { byte.write_volatile(0xAA) };
            })
        });
        for writer in writers {
            in_time("a writer", move || writer.join().unwrap());
        }
        assert_eq!(memory.slice(18, 1)[6..10], [round, 0xAA, round, 0xAA]);
        assert_eq!(early.held(), (1, 0));
        assert_eq!(saved(&moment, 18), round);
        drop(moment);
        pager.write_protection().lift();
    }
}

#[test]
fn a_writer_for_whose_page_there_is_no_room_waits_until_it_is_saved() {
    let source = Source::new(false);
    let (pager, memory) = start(&source);
    memory.slice(18, 2).fill(0x11);
    let protection = pager.write_protection().clone();
    let moment = protection
        .freeze(own(memory), Box::new(memory), early(0))
        .unwrap();
    let (sender, written) = channel();
    std::thread::spawn(move || {
        memory.slice(19, 1).fill(0x33);
        sender.send(()).unwrap();
    });
    let deadline = Instant::now() + Duration::from_secs(60);
    while protection.held() == 0 {
        assert!(Instant::now() < deadline, "nobody waits");
        std::thread::yield_now();
    }
    assert_eq!(saved(&moment, 18), 0x11);
    assert!(written.try_recv().is_err(), "its page is not saved yet");
    assert_eq!(saved(&moment, 19), 0x11);
    written.recv_timeout(Duration::from_secs(20)).unwrap();
    assert_eq!(memory.byte(19), 0x33);
    drop(moment);
    assert_eq!(protection.lift().faults_held, 1);
    assert_eq!(protection.held(), 0);
}

/// Memory of a machine that was booted: the kernel fills in what is missing, and a page that is armed where there is
/// none has a mark of the kernel's in its place.
#[test]
fn pages_that_are_armed_where_there_are_none_are_zeros_to_read_to_write_and_to_save() {
    let file = File::from(rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(BYTES).unwrap();
    let memory = Memory::map_shared(&file);
    memory.slice(3, 1).fill(0x11);
    let watch = WriteWatch::start(memory.mappings()).unwrap();
    let protection: &Arc<WriteProtection> = watch.write_protection();
    let mut own = PageSet::new(PAGES);
    own.insert_run(PageIndex(2), 4);
    own.insert_run(PageIndex(CUT / PAGE_SIZE - 1), 2);
    protection.arm_ahead(&own).unwrap();
    let moment = protection.freeze(own, Box::new(file), early(8)).unwrap();

    assert_eq!(in_time("a read", move || memory.byte(4)), 0);
    in_time("a write after a read", move || memory.slice(4, 1).fill(0x22));
    in_time("a write", move || memory.slice(5, 1).fill(0x33));
    in_time("a write over the cut", move || {
        memory.slice(CUT / PAGE_SIZE - 1, 2).fill(0x44)
    });
    in_time("a write to data", move || memory.slice(3, 1).fill(0x55));
    let found: Vec<_> = [2, 3, 4, 5, CUT / PAGE_SIZE - 1, CUT / PAGE_SIZE]
        .map(|page| saved(&moment, page))
        .into();
    assert_eq!(found, [0, 0x11, 0, 0, 0, 0]);
    drop(moment);
    assert!(protection.lift().faults_frozen >= 4);
    // Nobody writes there before nothing is protected any more.
    in_time("a write afterwards", move || memory.slice(2, 1).fill(0x66));
    let written = [2, 3, 4, 5].map(|page| memory.byte(page));
    assert_eq!(written, [0x66, 0x55, 0x22, 0x33]);
}

#[test]
fn an_armed_page_that_is_given_back_is_zeros_and_is_saved_as_it_was() {
    let source = Source::new(false);
    let (pager, memory) = start(&source);
    memory.slice(18, 3).fill(0x11);
    let protection = pager.write_protection();
    let own = own(memory);
    protection.arm_ahead(&own).unwrap();
    let moment = protection.freeze(own, Box::new(memory), early(8)).unwrap();
    for page in [18, 20] {
        protection.discard(PageIndex(page), 1);
        pager.logic().discard(PageIndex(page), 1);
        drop_page(memory, page);
    }
    assert_eq!(
        in_time("a read of what was given back", move || memory.byte(18)),
        0
    );
    in_time("a write to it", move || memory.slice(18, 1).fill(0x22));
    in_time("a write to what was given back and not read", move || {
        memory.slice(20, 1).fill(0x33);
    });
    assert_eq!([18, 19, 20].map(|page| saved(&moment, page)), [0x11; 3]);
    drop(moment);
    protection.lift();
    assert_eq!([18, 19, 20].map(|page| memory.byte(page)), [0x22, 0x11, 0x33]);
}

/// It is looked which pages are own; one of them is given back; then all of those are armed.
#[test]
fn a_page_that_is_given_back_just_before_it_is_armed_is_zeros_and_nobody_waits() {
    let source = Source::new(false);
    let (pager, memory) = start(&source);
    memory.slice(18, 3).fill(0x11);
    let protection = pager.write_protection();
    protection.begin();
    let stale = own(memory);
    for page in [18, 20] {
        protection.discard(PageIndex(page), 1);
        pager.logic().discard(PageIndex(page), 1);
        drop_page(memory, page);
    }
    protection.arm_ahead(&stale).unwrap();
    assert_eq!(
        in_time("a read of what was given back", move || memory.byte(18)),
        0
    );
    in_time("a write to what was given back", move || {
        memory.slice(20, 1).fill(0x33)
    });

    let now = own(memory);
    let found: Vec<_> = (0..PAGES).filter(|page| now.contains(PageIndex(*page))).collect();
    // The zeros that were read count as own: the kernel does not tell those apart.
    assert_eq!(found, [18, 19, 20]);
    let moment = protection.freeze(now, Box::new(memory), early(8)).unwrap();
    in_time("a write", move || memory.slice(18, 3).fill(0x44));
    assert_eq!([18, 19, 20].map(|page| saved(&moment, page)), [0, 0x11, 0x33]);
    drop(moment);
    protection.lift();
}
