//! Drives: writers that may wait, and captures that fail.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use super::*;

const PAGE: usize = PAGE_SIZE as usize;

/// A drive of so many bytes, all of whose pages count as its own; page `n` holds `n + 1`.
struct Rig {
    file: File,
    early: Arc<EarlyPages>,
    moment: Moment,
    writes: DriveWrites,
    saved: Arc<AtomicU64>,
}

fn rig(bytes: u64, room: u64) -> Rig {
    let file = tempfile::tempfile().unwrap();
    for page in 0..bytes.div_ceil(PAGE_SIZE) {
        let len = PAGE_SIZE.min(bytes - page * PAGE_SIZE) as usize;
        file.write_all_at(&vec![page as u8 + 1; len], page * PAGE_SIZE)
            .unwrap();
    }
    let limits = EarlyPagesLimits {
        memory_bytes: room * PAGE_SIZE,
        file_bytes: 0,
    };
    let early = Arc::new(EarlyPages::new(limits, Path::new("/nonexistent")));
    let pages = bytes.div_ceil(PAGE_SIZE);
    let mut own = PageSet::new(pages);
    own.insert_run(PageIndex(0), pages);
    let saved = Arc::new(AtomicU64::new(0));
    let count = saved.clone();
    let moment = Moment::new(
        own,
        bytes,
        Box::new(file.try_clone().unwrap()),
        early.clone(),
        move |passed| {
            if let Passed::Saved(_, pages) = passed {
                count.fetch_add(pages, Ordering::Relaxed);
            }
        },
    );
    let writes = DriveWrites::new(1 << 20);
    writes.go_by(&moment);
    Rig {
        file,
        early,
        moment,
        writes,
        saved,
    }
}

impl Rig {
    fn write(&self, first: u64, count: u64, value: u8) {
        self.writes.before(ByteRange {
            start: first * PAGE_SIZE,
            len: count * PAGE_SIZE,
        });
        let bytes = vec![value; count as usize * PAGE];
        self.file.write_all_at(&bytes, first * PAGE_SIZE).unwrap();
    }

    fn read(&self, first: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.moment.read(first * PAGE_SIZE, &mut bytes)?;
        Ok(bytes)
    }
}

#[test]
fn what_was_overwritten_is_read_as_it_was_also_the_short_last_page() {
    let rig = rig(3 * PAGE_SIZE + 512, 8);
    rig.write(1, 1, 99);
    rig.write(3, 1, 98);
    let bytes = rig.read(0, 3 * PAGE + 512).unwrap();
    let firsts: Vec<u8> = bytes.chunks(PAGE).map(|page| page[0]).collect();
    assert_eq!(firsts, [1, 2, 3, 4]);
    assert!(
        bytes
            .chunks(PAGE)
            .all(|page| page.iter().all(|byte| *byte == page[0]))
    );
    assert_eq!((rig.early.held(), rig.saved.load(Ordering::Relaxed)), ((0, 0), 4));
    rig.write(0, 4, 97);
    assert_eq!(rig.early.held(), (0, 0), "what was saved needs no copy");
}

#[test]
fn a_page_is_read_once() {
    let rig = rig(2 * PAGE_SIZE, 8);
    rig.read(0, PAGE).unwrap();
    assert!(
        rig.read(0, PAGE)
            .unwrap_err()
            .to_string()
            .contains("read already")
    );
    assert_eq!(rig.read(1, PAGE).unwrap()[0], 2);
}

#[test]
fn a_writer_without_room_waits_until_the_capture_has_come_by() {
    let rig = rig(8 * PAGE_SIZE, 1);
    thread::scope(|scope| {
        let writer = scope.spawn(|| rig.write(0, 8, 99));
        while rig.moment.writers().waiting() == 0 {
            thread::yield_now();
        }
        assert!(!writer.is_finished());
        let mut byte = [0];
        rig.file.read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(byte, [1], "it has written nothing yet");
        for page in 0..8 {
            assert_eq!(rig.read(page, PAGE).unwrap()[0], page as u8 + 1);
        }
        writer.join().unwrap();
    });
}

#[test]
fn a_writer_without_room_goes_on_when_the_capture_of_another_volume_has_made_some() {
    let first = rig(PAGE_SIZE, 1);
    let file = first.file.try_clone().unwrap();
    let mut own = PageSet::new(1);
    own.insert_run(PageIndex(0), 1);
    let second = Moment::new(own, PAGE_SIZE, Box::new(file), first.early.clone(), |_| {});
    let other = DriveWrites::new(PAGE_SIZE);
    other.go_by(&second);
    first.write(0, 1, 99);
    thread::scope(|scope| {
        let all = ByteRange {
            start: 0,
            len: PAGE_SIZE,
        };
        let writer = scope.spawn(move || other.before(all));
        while second.writers().waiting() == 0 {
            thread::yield_now();
        }
        assert!(!writer.is_finished());
        assert_eq!(first.read(0, PAGE).unwrap()[0], 1);
        writer.join().unwrap();
    });
    assert_eq!(first.early.held().0, 1, "that of the second");
}

#[test]
fn the_end_of_the_capture_lets_writers_go_and_keeps_nothing() {
    let Rig {
        file,
        early,
        moment,
        writes,
        ..
    } = rig(8 * PAGE_SIZE, 1);
    let writers = moment.writers().clone();
    let all = ByteRange {
        start: 0,
        len: 8 * PAGE_SIZE,
    };
    thread::scope(|scope| {
        let writer = scope.spawn(|| writes.before(all));
        while writers.waiting() == 0 {
            thread::yield_now();
        }
        drop(moment);
        writer.join().unwrap();
    });
    assert_eq!(early.held(), (0, 0));
    drop(writers);
    writes.before(all);
    assert_eq!(early.held(), (0, 0), "nobody captures");
    drop(file);
}

#[test]
fn a_page_that_cannot_be_read_ends_the_capture_and_not_the_writer() {
    struct Broken;
    impl OwnPages for Broken {
        fn read(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
            Err(io::Error::other("the disk is gone"))
        }
    }
    let mut own = PageSet::new(4);
    own.insert_run(PageIndex(0), 4);
    let early = Arc::new(EarlyPages::new(
        EarlyPagesLimits::default(),
        Path::new("/nonexistent"),
    ));
    let moment = Moment::new(own, 4 * PAGE_SIZE, Box::new(Broken), early, |_| {});
    moment.writers().before_write(PageIndex(1), 2);
    assert_eq!(
        moment.writers().try_before_write(PageIndex(3), 1),
        (Writable::Now, 1)
    );
    let error = moment.read(3 * PAGE_SIZE, &mut [0; PAGE]).unwrap_err();
    assert!(error.to_string().contains("the disk is gone"), "{error}");
}

/// What happens once, taken out by whoever has it happen.
type Happening = Arc<Mutex<Option<Box<dyn FnOnce() + Send>>>>;

/// Pages of a file that have something happen to them once, before or after the next bytes are read.
struct Interrupted {
    file: File,
    happens_first: bool,
    what: Happening,
}

impl OwnPages for Interrupted {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        // Taken out first: what happens may read here too.
        let what = self.what.lock().unwrap().take();
        match what {
            Some(what) if self.happens_first => {
                what();
                self.file.read_exact_at(into, offset)
            }
            Some(what) => {
                let read = self.file.read_exact_at(into, offset);
                what();
                read
            }
            None => self.file.read_exact_at(into, offset),
        }
    }
}

/// Four pages, of which the capture reads all at once while the second and third are overwritten; what it got, with how
/// much it was told is saved.
fn read_while_overwritten(happens_first: bool, room: u64) -> (Vec<u8>, u64) {
    let file = tempfile::tempfile().unwrap();
    for page in 0..4 {
        file.write_all_at(&[page as u8 + 1; PAGE], page * PAGE_SIZE)
            .unwrap();
    }
    let early = Arc::new(EarlyPages::new(
        EarlyPagesLimits {
            memory_bytes: room * PAGE_SIZE,
            file_bytes: 0,
        },
        Path::new("/nonexistent"),
    ));
    let mut own = PageSet::new(4);
    own.insert_run(PageIndex(0), 4);
    let what = Happening::default();
    let pages = Interrupted {
        file: file.try_clone().unwrap(),
        happens_first,
        what: what.clone(),
    };
    let saved = Arc::new(AtomicU64::new(0));
    let count = saved.clone();
    let moment = Moment::new(
        own,
        4 * PAGE_SIZE,
        Box::new(pages),
        early.clone(),
        move |passed| {
            if let Passed::Saved(_, pages) = passed {
                count.fetch_add(pages, Ordering::Relaxed);
            }
        },
    );
    let writers = moment.writers().clone();
    let (overwritten, writer) = (file.try_clone().unwrap(), Arc::new(Mutex::new(None)));
    let begun = writer.clone();
    *what.lock().unwrap() = Some(Box::new(move || {
        let waits = writers.clone();
        let thread = thread::spawn(move || {
            waits.before_write(PageIndex(1), 2);
            overwritten.write_all_at(&[99; 2 * PAGE], PAGE_SIZE).unwrap();
        });
        // It has written, or cannot before this reading is over.
        while !thread.is_finished() && writers.waiting() == 0 {
            thread::yield_now();
        }
        assert_eq!(thread.is_finished(), room >= 2);
        *begun.lock().unwrap() = Some(thread);
    }));
    let mut bytes = vec![0; 4 * PAGE];
    moment.read(0, &mut bytes).unwrap();
    writer.lock().unwrap().take().unwrap().join().unwrap();
    let mut now = vec![0; 2 * PAGE];
    file.read_exact_at(&mut now, PAGE_SIZE).unwrap();
    assert!(now.iter().all(|byte| *byte == 99));
    assert_eq!(
        early.held(),
        (0, 0),
        "nothing is kept for longer than it is needed"
    );
    let wholes = bytes.chunks(PAGE).map(|page| {
        assert!(page.iter().all(|byte| *byte == page[0]));
        page[0]
    });
    (wholes.collect(), saved.load(Ordering::Relaxed))
}

#[test]
fn what_is_overwritten_in_the_middle_of_a_reading_is_read_as_it_was() {
    for happens_first in [true, false] {
        // With room for both pages, for one of them, and for none.
        for room in [2, 1, 0] {
            let found = read_while_overwritten(happens_first, room);
            assert_eq!(
                found,
                (vec![1, 2, 3, 4], 4),
                "first: {happens_first}, room: {room}"
            );
        }
    }
}
