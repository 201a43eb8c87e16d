//! A drive under a driver: requests, refusals, batches, freezes while the store waits, saves and restores.

use std::io;
use std::sync::{Condvar, Mutex};

use runnel_snapshot::block_store::GuestSlice;
use runnel_snapshot::machine::Paused;
use runnel_snapshot::units::ByteRange;

use super::super::mock::*;
use super::super::registry::{self, Parts, Place};
use super::*;
use crate::event_loop::EventLoop;
use crate::interrupt::Interrupt;

const SECTORS: u64 = 64;
const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
const CONFIG_WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;

/// A drive in memory that does what tests want of it.
struct TestStore {
    bytes: Mutex<Vec<u8>>,
    read_only: bool,
    /// What was asked of it, in order.
    log: Mutex<Vec<String>>,
    /// Reads from this offset on wait, as for a chunk that cannot be had.
    stalled_from: Mutex<u64>,
    noted: Condvar,
    stall_over: Condvar,
    failing: AtomicBool,
}

impl TestStore {
    fn new(read_only: bool) -> Arc<Self> {
        let bytes = (0..SECTORS * SECTOR_BYTES)
            .map(|at| (at / SECTOR_BYTES) as u8 + 1)
            .collect();
        Arc::new(Self {
            bytes: Mutex::new(bytes),
            read_only,
            log: Mutex::default(),
            stalled_from: Mutex::new(u64::MAX),
            noted: Condvar::new(),
            stall_over: Condvar::new(),
            failing: AtomicBool::new(false),
        })
    }

    fn note(&self, what: String) {
        self.log.lock().unwrap().push(what);
        self.noted.notify_all();
    }

    fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    fn stall_from(&self, offset: u64) {
        *self.stalled_from.lock().unwrap() = offset;
    }

    fn go_on(&self) {
        *self.stalled_from.lock().unwrap() = u64::MAX;
        self.stall_over.notify_all();
    }

    /// Returns when the store has been asked to read.
    fn await_request(&self) {
        let log = self.log.lock().unwrap();
        drop(
            self.noted
                .wait_while(log, |log| !log.iter().any(|what| what.starts_with("read")))
                .unwrap(),
        );
    }
}

impl BlockStore for TestStore {
    fn bytes(&self) -> u64 {
        SECTORS * SECTOR_BYTES
    }
    fn is_read_only(&self) -> bool {
        self.read_only
    }
    fn will_read(&self, ranges: &[ByteRange]) {
        self.note(format!("will read {}", ranges.len()));
    }
    fn read_at(&self, offset: u64, into: &[GuestSlice<'_>]) -> io::Result<()> {
        self.note(format!("read {offset}"));
        drop(
            self.stall_over
                .wait_while(self.stalled_from.lock().unwrap(), |from| offset >= *from)
                .unwrap(),
        );
        if self.failing.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Other.into());
        }
        let bytes = self.bytes.lock().unwrap();
        let mut at = offset as usize;
        for slice in into {
            slice.copy_from(&bytes[at..at + slice.len()]);
            at += slice.len();
        }
        Ok(())
    }
    fn write_at(&self, offset: u64, from: &[GuestSlice<'_>]) -> io::Result<()> {
        self.note(format!("write {offset}"));
        let mut bytes = self.bytes.lock().unwrap();
        let mut at = offset as usize;
        for slice in from {
            slice.copy_to(&mut bytes[at..at + slice.len()]);
            at += slice.len();
        }
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        self.note("flush".to_owned());
        Ok(())
    }
    fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.note(format!("discard {range}"));
        Ok(())
    }
    fn write_zeroes(&self, range: ByteRange, unmap: bool) -> io::Result<()> {
        self.note(format!("zero {range} {unmap}"));
        Ok(())
    }
}

struct Rig {
    driver: Driver,
    store: Arc<TestStore>,
    event_loop: Arc<EventLoop>,
}

fn parts(store: &Arc<TestStore>, cache_type: CacheType) -> Parts {
    Parts::Block(BlockParts {
        drive_id: "rootfs".to_owned(),
        store: Arc::clone(store) as _,
        cache_type,
    })
}

fn place(ram: &Arc<runnel_snapshot::block_store::GuestRam>, event_loop: &Arc<EventLoop>) -> Place {
    Place {
        ram: Arc::clone(ram),
        interrupt: Interrupt::new().unwrap(),
        event_loop: Arc::clone(event_loop),
    }
}

fn rig(store: Arc<TestStore>, cache_type: CacheType, features: u64) -> Rig {
    let (ram, event_loop) = (ram(), Arc::new(EventLoop::start("drive").unwrap()));
    let device = registry::build(parts(&store, cache_type), place(&ram, &event_loop)).unwrap();
    Rig {
        driver: Driver::set_up(device, ram, VERSION_1 | features),
        store,
        event_loop,
    }
}

fn writable_rig() -> Rig {
    rig(TestStore::new(false), CacheType::Writeback, FLUSH | CONFIG_WCE)
}

const IN: u32 = 0;
const OUT: u32 = 1;
const DO_FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Where request number `slot` has its header and status; data comes after, at [`data`].
fn header(slot: u64) -> u64 {
    DATA + slot * 0x1_0000
}

fn data(slot: u64) -> u64 {
    header(slot) + 0x1000
}

impl Rig {
    /// Makes a request available: header, data, status in a descriptor each.
    fn submit(&mut self, slot: u64, kind: u32, sector: u64, bytes: u32) {
        let mut raw = [0; 16];
        raw[..4].copy_from_slice(&kind.to_le_bytes());
        raw[8..].copy_from_slice(&sector.to_le_bytes());
        self.driver.put(header(slot), &raw);
        self.driver.put(header(slot) + 16, &[0xee]);
        let status = writable(header(slot) + 16, 1);
        let body = match kind {
            IN | GET_ID => writable(data(slot), bytes),
            _ => readable(data(slot), bytes),
        };
        let head = readable(header(slot), 16);
        if bytes == 0 {
            self.driver.submit(0, &[head, status]);
        } else {
            self.driver.submit(0, &[head, body, status]);
        }
    }

    fn status(&self, slot: u64) -> u8 {
        self.driver.get(header(slot) + 16, 1)[0]
    }

    /// Carries out one request; returns its status and how many bytes the device says it wrote.
    fn request(&mut self, kind: u32, sector: u64, bytes: u32) -> (u8, u32) {
        self.submit(0, kind, sector, bytes);
        self.driver.kick(0);
        let used = self.driver.await_used(0, 1);
        assert_eq!(used.len(), 1);
        (self.status(0), used[0].1)
    }

    fn ranges(&self, ranges: &[(u64, u32, u32)]) -> u32 {
        for (number, (sector, count, flags)) in ranges.iter().enumerate() {
            let mut raw = [0; 16];
            raw[..8].copy_from_slice(&sector.to_le_bytes());
            raw[8..12].copy_from_slice(&count.to_le_bytes());
            raw[12..].copy_from_slice(&flags.to_le_bytes());
            self.driver.put(data(0) + 16 * number as u64, &raw);
        }
        16 * ranges.len() as u32
    }
}

#[test]
fn reads_and_writes_move_the_drives_bytes() {
    let mut rig = writable_rig();
    assert_eq!(rig.request(IN, 3, 1024), (OK, 1025));
    let read = rig.driver.get(data(0), 1024);
    assert_eq!((&read[..512], &read[512..]), (&[4; 512][..], &[5; 512][..]));

    rig.driver.put(data(0), &[0xab; 512]);
    assert_eq!(rig.request(OUT, SECTORS - 1, 512), (OK, 1));
    let bytes = rig.store.bytes.lock().unwrap();
    assert_eq!(bytes[bytes.len() - 512..], [0xab; 512]);
    assert_eq!(bytes[bytes.len() - 513], SECTORS as u8 - 1);
}

#[test]
fn a_request_may_be_cut_into_buffers_anywhere() {
    let mut rig = writable_rig();
    let mut raw = [0; 16];
    raw[8] = 2;
    rig.driver.put(header(0), &raw);
    let buffers = [
        readable(header(0), 3),
        readable(header(0) + 3, 13),
        writable(data(0), 100),
        writable(data(0) + 8192, 413),
    ];
    rig.driver.submit(0, &buffers);
    rig.driver.kick(0);
    assert_eq!(rig.driver.await_used(0, 1), [(0, 513)]);
    assert_eq!(rig.driver.get(data(0), 101), [vec![3; 100], vec![0]].concat());
    assert_eq!(
        rig.driver.get(data(0) + 8192, 413),
        [vec![3; 412], vec![OK]].concat()
    );
}

#[test]
fn what_lies_outside_the_drive_or_is_no_whole_sector_fails() {
    let mut rig = writable_rig();
    for (sector, bytes) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512 + 1, 512),
        (0, 100),
        (0, 0),
    ] {
        for kind in [IN, OUT] {
            assert_eq!(
                rig.request(kind, sector, bytes),
                (IOERR, 1),
                "{kind} at {sector}+{bytes}"
            );
        }
    }
    assert!(rig.store.log().is_empty(), "the store was never asked");
    assert!(!rig.driver.needs_reset(), "such a driver is told, not punished");
}

#[test]
fn an_unknown_request_is_unsupported() {
    let mut rig = writable_rig();
    for kind in [2, 3, 14, 99, u32::MAX] {
        assert_eq!(rig.request(kind, 0, 512), (UNSUPP, 1));
    }
}

#[test]
fn a_request_without_a_header_or_a_status_costs_the_device() {
    let headless = [readable(header(0), 15), writable(data(0), 1)];
    let mute = [readable(header(0), 16), readable(data(0), 512)];
    for buffers in [&headless[..], &mute[..]] {
        let mut rig = writable_rig();
        rig.driver.submit(0, buffers);
        rig.driver.kick(0);
        assert_eq!(rig.driver.await_interrupt(), 2);
        assert!(rig.driver.needs_reset());
    }
}

#[test]
fn the_guest_reads_the_drives_identifier() {
    let mut rig = writable_rig();
    assert_eq!(rig.request(GET_ID, 0, 20), (OK, 21));
    assert_eq!(
        rig.driver.get(data(0), 20),
        [b"rootfs".as_slice(), &[0; 14]].concat()
    );
}

#[test]
fn discards_and_zeroes_reach_the_store_range_by_range() {
    let mut rig = writable_rig();
    let bytes = rig.ranges(&[(0, 8, 0), (16, 1, 0)]);
    assert_eq!(rig.request(DISCARD, 0, bytes), (OK, 1));
    let bytes = rig.ranges(&[(8, 8, 0), (SECTORS - 1, 1, 1)]);
    assert_eq!(rig.request(WRITE_ZEROES, 0, bytes), (OK, 1));
    assert_eq!(
        rig.store.log(),
        [
            "discard bytes 0+4096",
            "discard bytes 8192+512",
            "zero bytes 4096+4096 false",
            "zero bytes 32256+512 true"
        ]
    );
}

#[test]
fn a_range_that_is_empty_outside_or_flagged_strangely_is_refused_before_any_is_done() {
    let mut rig = writable_rig();
    let cases = [
        (&[(0, 0, 0)][..], IOERR),
        (&[(0, 1, 0), (SECTORS, 1, 0)], IOERR),
        (&[(u64::MAX, 1, 0)], IOERR),
        (&[(0, u32::MAX, 0)], IOERR),
        (&[(0, 1, 2)], UNSUPP),
        (&[(0, 1, 0); 33], IOERR),
    ];
    for (ranges, status) in cases {
        for kind in [DISCARD, WRITE_ZEROES] {
            let bytes = rig.ranges(ranges);
            assert_eq!(rig.request(kind, 0, bytes), (status, 1), "{kind} {ranges:?}");
        }
    }
    assert_eq!(rig.request(DISCARD, 0, 24), (IOERR, 1), "one range and a half");
    let bytes = rig.ranges(&[(0, 1, 1)]);
    assert_eq!(
        rig.request(DISCARD, 0, bytes),
        (UNSUPP, 1),
        "a discard knows no flags"
    );
    assert!(rig.store.log().is_empty());
}

#[test]
fn a_read_only_drive_says_so_and_takes_nothing() {
    let mut rig = rig(TestStore::new(true), CacheType::Writeback, 1 << VIRTIO_BLK_F_RO);
    rig.driver.write(0x14, 0);
    let offered = u64::from(rig.driver.read(0x10));
    assert_eq!(
        offered & (1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES),
        0
    );
    assert_eq!(rig.request(OUT, 0, 512), (IOERR, 1));
    let bytes = rig.ranges(&[(0, 1, 0)]);
    assert_eq!(rig.request(DISCARD, 0, bytes), (IOERR, 1));
    assert_eq!(rig.request(IN, 0, 512), (OK, 513));
    assert_eq!(rig.store.log(), ["read 0"]);
}

#[test]
fn a_write_is_flushed_when_the_driver_does_not_flush_itself() {
    let writes = |cache_type, features, writeback: Option<u8>| {
        let mut rig = rig(TestStore::new(false), cache_type, features);
        if let Some(value) = writeback {
            rig.driver
                .device
                .write(Offset(0x100 + WRITEBACK_OFFSET as u64), &[value]);
        }
        assert_eq!(rig.request(OUT, 0, 512), (OK, 1));
        rig.store.log().len() == 2
    };
    assert!(!writes(CacheType::Unsafe, 0, None), "nobody promised anything");
    assert!(!writes(CacheType::Writeback, FLUSH, None), "the driver flushes");
    assert!(writes(CacheType::Writeback, 0, None), "the driver cannot flush");
    assert!(!writes(CacheType::Writeback, FLUSH | CONFIG_WCE, None));
    assert!(
        writes(CacheType::Writeback, FLUSH | CONFIG_WCE, Some(0)),
        "the driver chose write-through"
    );
}

#[test]
fn an_unsafe_drive_offers_no_flush() {
    let rig = rig(TestStore::new(false), CacheType::Unsafe, 0);
    rig.driver.write(0x14, 0);
    assert_eq!(u64::from(rig.driver.read(0x10)) & (FLUSH | CONFIG_WCE), 0);
}

#[test]
fn a_flush_reaches_the_store_after_the_writes_before_it() {
    let mut rig = writable_rig();
    rig.submit(0, OUT, 0, 512);
    rig.submit(1, DO_FLUSH, 0, 0);
    rig.driver.kick(0);
    rig.driver.await_used(0, 2);
    let log = rig.store.log();
    assert_eq!(
        log.iter()
            .filter(|what| !what.starts_with("will"))
            .collect::<Vec<_>>(),
        ["write 0", "flush"]
    );
}

#[test]
fn a_failing_store_fails_the_request_and_nothing_else() {
    let mut rig = writable_rig();
    rig.store.failing.store(true, Ordering::Relaxed);
    assert_eq!(rig.request(IN, 0, 512), (IOERR, 1));
    rig.store.failing.store(false, Ordering::Relaxed);
    assert_eq!(rig.request(IN, 0, 512), (OK, 513));
}

#[test]
fn the_store_hears_of_all_reads_of_a_batch_before_the_first_one_waits() {
    let mut rig = writable_rig();
    let frozen = EventLoop::freeze_all([&*rig.event_loop], &|| false).unwrap();
    for slot in 0..4 {
        rig.submit(slot, IN, slot, 512);
    }
    rig.driver.kick(0);
    drop(frozen);
    rig.driver.await_used(0, 4);
    assert_eq!(
        rig.store.log(),
        ["will read 4", "read 0", "read 512", "read 1024", "read 1536"]
    );
}

#[test]
fn a_waiting_store_holds_up_neither_registers_nor_a_freeze() {
    let mut rig = writable_rig();
    rig.request(IN, 0, 512);
    rig.store.log.lock().unwrap().clear();
    rig.store.stall_from(0);
    rig.submit(0, IN, 0, 512);
    rig.driver.kick(0);
    rig.store.await_request();
    // The first waits; a register is read all the same, and a freeze is given up.
    assert_eq!(rig.driver.status(), 15);
    assert!(EventLoop::freeze_all([&*rig.event_loop], &|| true).is_err());
    assert_eq!(rig.status(0), 0xee, "not answered, above all not with zeros");
    rig.store.go_on();
    rig.driver.await_used(0, 1);
    assert_eq!(rig.status(0), OK, "the device went on by itself");
}

#[test]
fn an_answer_does_not_wait_for_a_later_request_whose_chunk_is_missing() {
    let mut rig = writable_rig();
    let frozen = EventLoop::freeze_all([&*rig.event_loop], &|| false).unwrap();
    rig.submit(0, IN, 0, 512);
    rig.submit(1, IN, 9, 512);
    rig.store.stall_from(9 * 512);
    rig.driver.kick(0);
    drop(frozen);
    rig.driver.await_used(0, 1);
    assert_eq!([rig.status(0), rig.status(1)], [OK, 0xee]);
    rig.store.go_on();
    rig.driver.await_used(0, 1);
    assert_eq!(rig.status(1), OK);
}

#[test]
fn a_freeze_waits_for_the_request_in_hand_and_leaves_the_others_in_the_queue() {
    let mut rig = writable_rig();
    let frozen = EventLoop::freeze_all([&*rig.event_loop], &|| false).unwrap();
    for slot in 0..4 {
        rig.submit(slot, IN, slot, 512);
    }
    rig.store.stall_from(0);
    rig.driver.kick(0);
    drop(frozen);
    rig.store.await_request();
    let asked = std::cell::Cell::new(false);
    let frozen = EventLoop::freeze_all([&*rig.event_loop], &|| {
        // By now the freeze is asked for, and the request in hand may end.
        asked.set(true);
        rig.store.go_on();
        false
    });
    let frozen = frozen.unwrap();
    assert!(asked.get());
    assert_eq!(rig.driver.take_used(0).len(), 1);
    assert_eq!([rig.status(0), rig.status(1), rig.status(3)], [OK, 0xee, 0xee]);

    // Saved here, the other three are served by whoever goes on.
    let saved = rig
        .driver
        .device
        .save_section("rootfs", &Paused::until(|| ()))
        .unwrap();
    let event_loop = Arc::new(EventLoop::start("restored").unwrap());
    let parts = parts(&rig.store, CacheType::Unsafe);
    let device = registry::restore(saved, parts, place(&rig.driver.ram, &event_loop)).unwrap();
    let mut driver = rig.driver.go_on(device);
    driver.device.resume();
    assert_eq!(driver.await_used(0, 3).len(), 3);
    for slot in 0..4 {
        assert_eq!(driver.get(data(slot), 512), [slot as u8 + 1; 512]);
    }
    driver.write(0x14, 0);
    assert_ne!(
        u64::from(driver.read(0x10)) & FLUSH,
        0,
        "the saved cache type counts"
    );
    drop(frozen);
}

#[test]
fn a_reset_returns_when_the_request_in_hand_has_ended() {
    let mut rig = writable_rig();
    rig.store.stall_from(0);
    rig.submit(0, IN, 5, 512);
    rig.submit(1, IN, 6, 512);
    rig.driver.kick(0);
    rig.store.await_request();
    let device = Arc::clone(&rig.driver.device);
    let resetter = std::thread::spawn(move || device.write(Offset(0x70), &0u32.to_le_bytes()));
    rig.store.go_on();
    resetter.join().unwrap();
    assert_eq!(rig.driver.status(), 0);
    // Whatever was served was served before the reset returned: now the guest's memory is its own, and a kick that
    // comes past the registers, as an ioeventfd's does, changes nothing.
    rig.submit(2, IN, 7, 512);
    let before = rig.driver.get(0, RAM_BYTES as usize);
    rig.driver.device.kicks()[0].write(1).unwrap();
    settle(&rig.event_loop);
    assert!(rig.driver.get(0, RAM_BYTES as usize) == before);
}

#[test]
fn a_drive_that_is_not_the_one_the_guest_knows_is_refused() {
    let rig = writable_rig();
    let frozen = EventLoop::freeze_all([&*rig.event_loop], &|| false).unwrap();
    let saved = rig
        .driver
        .device
        .save_section("rootfs", &Paused::until(|| ()))
        .unwrap();
    drop(frozen);
    let mut other_size = saved.clone();
    other_size.state["device"]["sectors"] = (SECTORS + 1).into();
    let restore = |saved, store| {
        registry::restore(
            saved,
            parts(&store, CacheType::Writeback),
            place(&rig.driver.ram, &rig.event_loop),
        )
    };
    assert!(restore(other_size, TestStore::new(false)).is_err());
    assert!(restore(saved.clone(), TestStore::new(true)).is_err());
    assert!(restore(saved, TestStore::new(false)).is_ok());
}

#[test]
fn the_configuration_space_says_what_the_drive_has() {
    let rig = writable_rig();
    let mut capacity = [0xff; 8];
    rig.driver.device.read(Offset(0x100), &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), SECTORS);
    assert_eq!(rig.driver.read(0x100 + 12), SEGMENTS_MAX);
    assert_eq!(rig.driver.read(0x100 + 20), 512);
    assert_eq!(rig.driver.read(0x100 + 40), DISCARD_SEGMENTS_MAX);
    assert_eq!(rig.driver.read(0x100 + 0x200), 0, "past its end");
}

#[test]
fn a_drive_under_load_is_moved_again_and_again_and_loses_no_request() {
    const MOVES: usize = 25;
    for features in [FLUSH, FLUSH | EVENT_IDX] {
        let mut rig = rig(TestStore::new(false), CacheType::Writeback, features);
        let mut served = 0;
        for round in 0..MOVES {
            // Five in flight, each of three descriptors, and no waiting for them.
            for slot in 0..5 {
                rig.submit(slot, IN, (round as u64 + slot) % SECTORS, 512);
            }
            rig.driver.kick(0);
            // Wherever this catches the device: before, within or after its batch.
            let frozen = EventLoop::freeze_all([&*rig.event_loop], &|| false).unwrap();
            let saved = rig
                .driver
                .device
                .save_section("rootfs", &Paused::until(|| ()))
                .unwrap();
            let event_loop = Arc::new(EventLoop::start("moved").unwrap());
            let parts = parts(&rig.store, CacheType::Writeback);
            let device = registry::restore(saved, parts, place(&rig.driver.ram, &event_loop)).unwrap();
            drop((rig.event_loop, frozen));
            rig = Rig {
                driver: rig.driver.go_on(device),
                store: rig.store,
                event_loop,
            };
            rig.driver.device.resume();
            served += rig.driver.await_used(0, 5).len();
            for slot in 0..5 {
                let expected = (round as u64 + slot) % SECTORS + 1;
                assert_eq!(
                    rig.driver.get(data(slot), 512),
                    [expected as u8; 512],
                    "move {round}"
                );
            }
        }
        assert_eq!(served, 5 * MOVES);
    }
}
