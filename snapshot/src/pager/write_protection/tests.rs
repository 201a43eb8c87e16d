//! The bookkeeping, held against a plain model of a machine of a few pages.

use std::collections::BTreeSet;
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::copy_before_write::EarlyPagesLimits;

const PAGES: u64 = 6;
/// What the image holds in each of its pages.
const IMAGE: u8 = 100;

/// What the machine, its pager and the capture may do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// The background fill maps a page of the image.
    Fill(u64),
    /// The guest, or a device, writes to a page.
    Write(u64, u8),
    /// The guest gives a page back.
    Discard(u64),
    /// The capture looks what is own by now.
    Look,
    /// It arms what it has seen then, or now if it has not looked.
    ArmAhead,
    /// The machine stands, and runs on.
    Freeze,
    /// The capture saves its next page.
    Save,
    /// It is called off.
    Lift,
}

/// A page as the kernel sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    Missing,
    OfImage,
    Own(u8),
    Discarded,
}

impl Page {
    fn content(self) -> u8 {
        match self {
            Self::Missing | Self::OfImage => IMAGE,
            Self::Own(value) => value,
            Self::Discarded => 0,
        }
    }
}

#[derive(Default)]
struct Kernel {
    protected: BTreeSet<u64>,
    pages: Vec<Page>,
}

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Kernel>>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Kernel> {
        self.0.lock().unwrap()
    }
}

impl Protector for Shared {
    fn protect(&self, first: PageIndex, count: u64) -> io::Result<()> {
        let mut kernel = self.lock();
        for page in first.0..first.0 + count {
            let what = kernel.pages[page as usize];
            assert!(
                matches!(what, Page::Own(_)),
                "page {page} is {what:?}, and is armed"
            );
            kernel.protected.insert(page);
        }
        Ok(())
    }

    fn unprotect(&self, first: PageIndex, count: u64) -> io::Result<()> {
        let gone = first.0..first.0 + count;
        self.lock().protected.retain(|page| !gone.contains(page));
        Ok(())
    }
}

impl OwnPages for Shared {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let first = PageIndex::holding(offset).0 as usize;
        for (at, bytes) in into.chunks_mut(PAGE_SIZE as usize).enumerate() {
            bytes.fill(self.lock().pages[first + at].content());
        }
        Ok(())
    }
}

/// A machine, and a capture of it.
struct Rig {
    kernel: Shared,
    protection: Arc<WriteProtection>,
    early: Arc<EarlyPages>,
    /// Pages that can be kept.
    room: u64,
    /// Writes that wait for protection to end, in order.
    waiting: Vec<(u64, u8)>,
    /// What was own when the capture looked.
    seen: Option<PageSet>,
    capture: Option<Capture>,
}

struct Capture {
    moment: Moment,
    at_freeze: Vec<Page>,
    next: u64,
}

impl Rig {
    /// Page 0 is missing, 1 the image's, the others own. `room` pages can be kept.
    fn new(room: u64) -> Self {
        let kernel = Shared::default();
        kernel.lock().pages = (0..PAGES)
            .map(|page| match page {
                0 => Page::Missing,
                1 => Page::OfImage,
                _ => Page::Own(page as u8),
            })
            .collect();
        let limits = EarlyPagesLimits {
            memory_bytes: room * PAGE_SIZE,
            file_bytes: 0,
        };
        Self {
            protection: WriteProtection::new(PAGES, Box::new(kernel.clone())),
            kernel,
            early: Arc::new(EarlyPages::new(limits, Path::new("/nonexistent"))),
            room,
            waiting: Vec::new(),
            seen: None,
            capture: None,
        }
    }

    fn own(&self) -> PageSet {
        let mut own = PageSet::new(PAGES);
        for (page, kind) in (0..).zip(&self.kernel.lock().pages) {
            if matches!(kind, Page::Own(_)) {
                own.insert_run(PageIndex(page), 1);
            }
        }
        own
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Fill(page) => {
                let page = &mut self.kernel.lock().pages[page as usize];
                if *page == Page::Missing {
                    *page = Page::OfImage;
                }
            }
            Step::Write(page, value) => self.write(page, value),
            // What would wait for the capture waits for ever in a test of one thread: see `has_room`.
            Step::Discard(page) if self.has_room() => {
                self.protection.discard(PageIndex(page), 1);
                self.kernel.lock().pages[page as usize] = Page::Discarded;
                self.retry();
            }
            Step::Discard(_) => {}
            Step::Look if self.capture.is_none() => {
                self.protection.begin();
                self.seen = Some(self.own());
            }
            Step::ArmAhead if self.capture.is_none() => {
                let seen = self.seen.take().unwrap_or_else(|| self.own());
                self.protection.arm_ahead(&seen).unwrap();
            }
            Step::Freeze if self.capture.is_none() && self.waiting.is_empty() => {
                self.seen = None;
                let own = self.own();
                let pages = Box::new(self.kernel.clone());
                let moment = self.protection.freeze(own, pages, self.early.clone()).unwrap();
                self.capture = Some(Capture {
                    moment,
                    at_freeze: self.kernel.lock().pages.clone(),
                    next: 0,
                });
            }
            Step::Look | Step::ArmAhead | Step::Freeze => {}
            Step::Save => self.save(),
            Step::Lift => self.lift(),
        }
    }

    fn has_room(&self) -> bool {
        self.waiting.is_empty() && self.early.held().0 < self.room
    }

    fn write(&mut self, page: u64, value: u8) {
        if self.kernel.lock().protected.contains(&page) {
            self.protection.write_fault(PageIndex(page));
            if self.kernel.lock().protected.contains(&page) {
                return self.waiting.push((page, value));
            }
        }
        self.kernel.lock().pages[page as usize] = Page::Own(value);
    }

    /// Writers whose pages were let go of go on.
    fn retry(&mut self) {
        for (page, value) in std::mem::take(&mut self.waiting) {
            if self.kernel.lock().protected.contains(&page) {
                self.waiting.push((page, value));
            } else {
                self.kernel.lock().pages[page as usize] = Page::Own(value);
            }
        }
    }

    fn save(&mut self) {
        let Some(capture) = &mut self.capture else { return };
        if let Some(Page::Own(value)) = capture.at_freeze.get(capture.next as usize) {
            let mut bytes = vec![0xEE; PAGE_SIZE as usize];
            capture.moment.read(capture.next * PAGE_SIZE, &mut bytes).unwrap();
            assert!(
                bytes.iter().all(|byte| byte == value),
                "page {} was {value}, and {} is saved",
                capture.next,
                bytes[0]
            );
        }
        capture.next += 1;
        if capture.next >= PAGES {
            self.lift();
        }
        self.retry();
    }

    fn lift(&mut self) {
        self.capture = None;
        self.seen = None;
        // Whoever is to lift may wait for a writer first.
        self.retry();
        assert_eq!(self.waiting, [], "nobody waits for a capture that is over");
        self.protection.lift();
        self.assert_at_rest();
    }

    fn assert_at_rest(&self) {
        assert_eq!(self.kernel.lock().protected, BTreeSet::new());
        assert_eq!(self.waiting, [], "nobody waits when no capture is under way");
        assert_eq!(self.early.held(), (0, 0));
        assert_eq!(self.protection.held(), 0);
    }

    fn finish(mut self) {
        while self.capture.is_some() {
            self.save();
        }
        self.lift();
    }
}

fn step() -> impl Strategy<Value = Step> {
    let page = 0..PAGES;
    prop_oneof![
        page.clone().prop_map(Step::Fill),
        (page.clone(), 1..90u8).prop_map(|(page, value)| Step::Write(page, value)),
        (page.clone(), 1..90u8).prop_map(|(page, value)| Step::Write(page, value)),
        page.prop_map(Step::Discard),
        Just(Step::Look),
        Just(Step::ArmAhead),
        Just(Step::Freeze),
        Just(Step::Save),
        Just(Step::Save),
        Just(Step::Lift),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn each_page_is_saved_as_it_was_when_the_machine_stood(
        room in 0u64..4,
        steps in prop::collection::vec(step(), 0..60),
    ) {
        let mut rig = Rig::new(room);
        for step in steps {
            rig.step(step);
        }
        rig.finish();
    }
}

/// Every order of these steps in which each list keeps its own.
fn interleavings(lists: &[&[Step]], visit: &mut dyn FnMut(&[Step])) {
    fn go(lists: &mut Vec<&[Step]>, so_far: &mut Vec<Step>, visit: &mut dyn FnMut(&[Step])) {
        if lists.iter().all(|list| list.is_empty()) {
            return visit(so_far);
        }
        for at in 0..lists.len() {
            let Some((first, rest)) = lists[at].split_first() else {
                continue;
            };
            let whole = std::mem::replace(&mut lists[at], rest);
            so_far.push(*first);
            go(lists, so_far, visit);
            so_far.pop();
            lists[at] = whole;
        }
    }
    go(&mut lists.to_vec(), &mut Vec::new(), visit);
}

#[test]
fn every_interleaving_of_fill_write_discard_and_save_is_right() {
    let capture = [
        Step::ArmAhead,
        Step::Freeze,
        Step::Save,
        Step::Save,
        Step::Save,
        Step::Save,
    ];
    let guest = [Step::Write(2, 41), Step::Write(0, 42), Step::Write(2, 43)];
    let balloon = [Step::Discard(2), Step::Discard(3)];
    let fill = [Step::Fill(0)];
    for room in [0, 1, 3] {
        let mut seen = 0;
        interleavings(&[&capture, &guest, &balloon, &fill], &mut |steps| {
            seen += 1;
            let mut rig = Rig::new(room);
            steps.iter().for_each(|step| rig.step(*step));
            rig.finish();
        });
        assert_eq!(seen, 12 * 11 * 10 * 9 * 8 * 7 / (6 * 2), "12! / (6! 3! 2! 1!)");
    }
}

#[test]
fn a_page_that_is_given_back_before_it_is_armed_is_not_armed_and_is_when_it_is_own_again() {
    let mut rig = Rig::new(4);
    for step in [Step::Look, Step::Discard(3), Step::ArmAhead] {
        rig.step(step);
    }
    assert_eq!(rig.kernel.lock().protected, BTreeSet::from([2, 4, 5]));
    for step in [Step::Write(3, 9), Step::Look, Step::ArmAhead] {
        rig.step(step);
    }
    assert_eq!(rig.kernel.lock().protected, BTreeSet::from([2, 3, 4, 5]));
    rig.finish();
}

#[test]
fn pages_armed_ahead_are_not_armed_again_when_the_machine_stands() {
    let mut rig = Rig::new(4);
    rig.step(Step::ArmAhead);
    rig.step(Step::Write(3, 9));
    let before = rig.kernel.lock().protected.clone();
    assert_eq!(before, BTreeSet::from([2, 4, 5]));
    rig.step(Step::Freeze);
    assert_eq!(rig.kernel.lock().protected, BTreeSet::from([2, 3, 4, 5]));
    rig.finish();
}

#[test]
fn a_writer_in_sequence_waits_for_fewer_and_fewer_pages() {
    let kernel = Shared::default();
    kernel.lock().pages = vec![Page::Own(7); 256];
    let protection = WriteProtection::new(256, Box::new(kernel.clone()));
    let mut own = PageSet::new(256);
    own.insert_run(PageIndex(0), 256);
    let early = Arc::new(EarlyPages::new(
        EarlyPagesLimits::default(),
        Path::new("/nonexistent"),
    ));
    let moment = protection.freeze(own, Box::new(kernel.clone()), early).unwrap();
    let mut faults = 0;
    for page in 0..256 {
        if kernel.lock().protected.contains(&page) {
            faults += 1;
            protection.write_fault(PageIndex(page));
        }
        kernel.lock().pages[page as usize] = Page::Own(8);
    }
    assert!(faults < 30, "{faults} for 256 pages");
    let mut bytes = vec![0; 256 * PAGE_SIZE as usize];
    moment.read(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 7));
    drop(moment);
    protection.lift();
}

#[test]
fn a_page_that_the_host_does_not_let_go_of_holds_up_nobody_else() {
    /// Lets go of nothing.
    struct Stubborn;
    impl Protector for Stubborn {
        fn protect(&self, _: PageIndex, _: u64) -> io::Result<()> {
            Ok(())
        }

        fn unprotect(&self, _: PageIndex, _: u64) -> io::Result<()> {
            Err(io::Error::other("the memory map is changing"))
        }
    }
    let kernel = Shared::default();
    kernel.lock().pages = vec![Page::Own(7); 2];
    let protection = WriteProtection::new(2, Box::new(Stubborn));
    let mut own = PageSet::new(2);
    own.insert_run(PageIndex(0), 2);
    let limits = EarlyPagesLimits {
        memory_bytes: 0,
        file_bytes: 0,
    };
    let early = Arc::new(EarlyPages::new(limits, Path::new("/nonexistent")));
    let moment = protection.freeze(own, Box::new(kernel), early).unwrap();
    protection.write_fault(PageIndex(1));
    assert_eq!(protection.held(), 1);
    let mut bytes = vec![0; 2 * PAGE_SIZE as usize];
    moment.read(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 7));
    drop(moment);
    protection.lift();
    assert_eq!(protection.held(), 1, "it still waits, and is still known");
}
