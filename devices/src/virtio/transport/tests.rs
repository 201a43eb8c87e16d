//! The transport under a driver that behaves, one that does not, and over saves and restores. The device behind it is
//! the entropy device, which has the least of its own.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use runnel_snapshot::machine::Paused;
use runnel_snapshot::section::SavedSection;
use vm_memory::bitmap::Bitmap as _;
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};

use super::super::mock::*;
use super::super::registry::{self, Parts, Place};
use super::*;

struct Rig {
    driver: Driver,
    event_loop: Arc<EventLoop>,
}

fn place(ram: &Arc<GuestRam>, event_loop: &Arc<EventLoop>) -> Place {
    Place {
        ram: Arc::clone(ram),
        interrupt: Interrupt::new().unwrap(),
        event_loop: Arc::clone(event_loop),
    }
}

fn device(ram: &Arc<GuestRam>, event_loop: &Arc<EventLoop>) -> Arc<dyn MmioDevice> {
    registry::build(Parts::Rng, place(ram, event_loop)).unwrap()
}

/// A device that nobody has set up.
fn found() -> Rig {
    let (ram, event_loop) = (ram(), Arc::new(EventLoop::start("test").unwrap()));
    Rig {
        driver: Driver::find(device(&ram, &event_loop), ram),
        event_loop,
    }
}

/// A device at work.
fn set_up(features: u64) -> Rig {
    let (ram, event_loop) = (ram(), Arc::new(EventLoop::start("test").unwrap()));
    Rig {
        driver: Driver::set_up(device(&ram, &event_loop), ram, features),
        event_loop,
    }
}

fn save(rig: &Rig) -> SavedSection {
    let _frozen = EventLoop::freeze_all([&*rig.event_loop], &|| false).unwrap();
    rig.driver
        .device
        .save_section("rng", &Paused::until(|| ()))
        .unwrap()
}

/// The same machine somewhere else: another loop, another line, the same RAM.
fn restore(rig: Rig, saved: SavedSection) -> Rig {
    let event_loop = Arc::new(EventLoop::start("restored").unwrap());
    let device = registry::restore(saved, Parts::Rng, place(&rig.driver.ram, &event_loop)).unwrap();
    Rig {
        driver: rig.driver.go_on(device),
        event_loop,
    }
}

fn refused(rig: &Rig) -> u64 {
    rig.driver
        .device
        .link()
        .metrics()
        .refused_accesses
        .load(Ordering::Relaxed)
}

#[test]
fn a_driver_finds_the_device_by_its_registers() {
    let Rig { driver, .. } = found();
    assert_eq!(
        [0x00, 0x04, 0x08].map(|register| driver.read(register)),
        [0x7472_6976, 2, 4]
    );
    assert_eq!(driver.read(0x34), 256, "the largest size of queue 0");
    driver.write(0x30, 1);
    assert_eq!(driver.read(0x34), 0, "there is no queue 1");
    assert_eq!(driver.read(0xb0), u32::MAX, "there is no shared memory");
}

#[test]
fn a_request_is_served_and_announced() {
    let mut rig = set_up(VERSION_1);
    let driver = &mut rig.driver;
    driver.submit(0, &[writable(DATA, 64), writable(DATA + 4096, 64)]);
    driver.kick(0);
    assert_eq!(driver.await_used(0, 1), [(0, 128)]);
    assert_ne!(driver.get(DATA, 64), [0; 64]);
    assert_ne!(driver.get(DATA + 4096, 64), [0; 64]);
}

#[test]
fn what_a_device_writes_is_marked_dirty() {
    let mut rig = set_up(VERSION_1);
    rig.driver.submit(0, &[writable(DATA + 4096, 8192)]);
    let (_, _, used) = rings(0);
    let ram = Arc::clone(&rig.driver.ram);
    let dirty = |address: u64| ram.iter().next().unwrap().bitmap().dirty_at(address as usize);
    assert!(!dirty(DATA + 4096));

    rig.driver.kick(0);
    rig.driver.await_used(0, 1);

    assert!(dirty(DATA + 4096) && dirty(DATA + 8192) && dirty(used));
    assert!(!dirty(DATA) && !dirty(DATA + 12288));
}

#[test]
fn steps_out_of_order_are_not_taken() {
    let rig = found();
    let driver = &rig.driver;
    for status in [2, 4, 8, 5, 11] {
        driver.write(0x70, status);
        assert_ne!(driver.status() & status, status, "{status}");
        driver.write(0x70, 0);
    }
    driver.write(0x70, 1);
    driver.write(0x70, 3);
    driver.write(0x70, 2);
    assert_eq!(driver.status(), 3, "a step is not taken back but by a reset");
    assert_eq!(refused(&rig), 6);
}

#[test]
fn features_that_were_not_offered_or_lack_version_1_are_not_accepted() {
    for (low, high) in [(0, 0), (1, 1), (0, 3), (u32::MAX, u32::MAX)] {
        let Rig { driver, .. } = found();
        driver.write(0x70, 1);
        driver.write(0x70, 3);
        for (half, features) in [(0, low), (1, high)] {
            driver.write(0x24, half);
            driver.write(0x20, features);
        }
        driver.write(0x70, 11);
        assert_eq!(driver.status(), 3, "{low:#x} {high:#x}");
    }
}

#[test]
fn queue_registers_answer_in_their_state_alone() {
    let mut rig = found();
    rig.driver.set_up_queue(0);
    assert_eq!(rig.driver.read(0x44), 0, "before the features");
    rig.driver.negotiate(VERSION_1);
    for size in [0, 3, 512, 65536] {
        let before = refused(&rig);
        rig.driver.write(0x38, size);
        assert_eq!(refused(&rig), before + 1, "size {size}");
    }
    rig.driver.set_up_queue(0);
    assert_eq!(rig.driver.read(0x44), 1);
    let before = refused(&rig);
    rig.driver.write(0x80, 0x5000);
    assert_eq!(refused(&rig), before + 1, "a ready queue does not move");
}

#[test]
fn rings_that_cannot_be_cost_the_device_and_a_reset_brings_it_back() {
    let cases = [
        (0x80, 0, RAM_BYTES - 128),  // the table runs off RAM
        (0x80, 0, 0x1_0008),         // and is aligned to 16
        (0x90, 0xffff_ffff, 0xfffe), // the available ring is nowhere
        (0x90, 0, 0),                // and was set at all
        (0x90, 0, 0x1_1001),         // and is aligned to 2
        (0xa0, 0, RAM_BYTES - 16),   // the used ring runs off RAM
        (0xa0, 0, 0x1_2002),         // and is aligned to 4
    ];
    for (register, high, low) in cases {
        let mut rig = found();
        rig.driver.negotiate(VERSION_1);
        let (table, avail, used) = rings(0);
        rig.driver.write(0x38, QUEUE_SIZE.into());
        for (register, address) in [(0x80, table), (0x90, avail), (0xa0, used)] {
            rig.driver.write(register, address as u32);
        }
        rig.driver.write(register, low as u32);
        rig.driver.write(register + 4, high);
        rig.driver.write(0x44, 1);
        assert!(rig.driver.needs_reset(), "{register:#x} {high:#x} {low:#x}");
        assert_eq!(
            rig.driver.await_interrupt(),
            2,
            "a configuration interrupt says so"
        );
        rig.driver.write(0x70, 0);
        assert_eq!(rig.driver.status(), 0);
    }
}

/// Writes a chain that breaks the rules into queue 0.
type Crime = fn(&mut Driver);

const CRIMES: &[(&str, Crime)] = &[
    ("a loop", |driver| {
        driver.descriptor(rings(0).0, DATA, 16, NEXT | WRITE, 1);
        driver.descriptor(rings(0).0 + 16, DATA, 16, NEXT | WRITE, 0);
        driver.offer(0, 0);
    }),
    ("a head outside the table", |driver| driver.offer(0, QUEUE_SIZE)),
    ("a next outside the table", |driver| {
        driver.descriptor(rings(0).0, DATA, 16, NEXT | WRITE, QUEUE_SIZE);
        driver.offer(0, 0);
    }),
    ("an address outside RAM", |driver| {
        driver.submit(0, &[writable(RAM_BYTES, 1)])
    }),
    ("an address that wraps", |driver| {
        driver.submit(0, &[writable(u64::MAX, 2)])
    }),
    ("a buffer that runs off RAM", |driver| {
        driver.submit(0, &[writable(RAM_BYTES - 8, 16)])
    }),
    ("a huge length", |driver| {
        driver.submit(0, &[writable(DATA, u32::MAX)])
    }),
    ("readable after writable", |driver| {
        driver.submit(0, &[writable(DATA, 8), readable(DATA, 8)])
    }),
    ("readable where writable belongs", |driver| {
        driver.submit(0, &[readable(DATA, 8)])
    }),
    ("nothing but an empty buffer", |driver| {
        driver.submit(0, &[writable(DATA, 0)])
    }),
    ("an indirect table in an indirect table", |driver| {
        driver.descriptor(DATA, DATA, 16, INDIRECT, 0);
        driver.descriptor(rings(0).0, DATA, 16, INDIRECT, 0);
        driver.offer(0, 0);
    }),
    ("an indirect table with a descriptor after it", |driver| {
        driver.descriptor(rings(0).0, DATA, 16, INDIRECT | NEXT, 1);
        driver.offer(0, 0);
    }),
    ("an indirect table that is empty", |driver| {
        driver.descriptor(rings(0).0, DATA, 0, INDIRECT, 0);
        driver.offer(0, 0);
    }),
    ("an indirect table of half descriptors", |driver| {
        driver.descriptor(rings(0).0, DATA, 24, INDIRECT, 0);
        driver.offer(0, 0);
    }),
    ("an indirect table outside RAM", |driver| {
        driver.descriptor(rings(0).0, RAM_BYTES, 16, INDIRECT, 0);
        driver.offer(0, 0);
    }),
    ("an indirect chain longer than the queue", |driver| {
        for at in 0..=QUEUE_SIZE {
            driver.descriptor(DATA + 16 * u64::from(at), DATA, 1, NEXT | WRITE, at + 1);
        }
        driver.descriptor(rings(0).0, DATA, 16 * 32, INDIRECT, 0);
        driver.offer(0, 0);
    }),
    ("more chains than the queue has", |driver| {
        driver.set_avail_index(0, QUEUE_SIZE + 1)
    }),
];

#[test]
fn a_driver_that_breaks_the_rules_loses_the_device_until_it_resets_it() {
    for (name, commit) in CRIMES {
        let mut rig = set_up(VERSION_1 | INDIRECT_DESC);
        commit(&mut rig.driver);
        rig.driver.kick(0);
        assert_eq!(rig.driver.await_interrupt(), 2, "{name}");
        assert!(rig.driver.needs_reset(), "{name}");
        assert_eq!(
            rig.driver.device.link().metrics().faults.load(Ordering::Relaxed),
            1,
            "{name}"
        );
        assert!(rig.driver.take_used(0).is_empty(), "{name}");

        let (device, ram) = (Arc::clone(&rig.driver.device), Arc::clone(&rig.driver.ram));
        let (_, avail, used) = rings(0);
        rig.driver.put(avail, &[0; 64]);
        rig.driver.put(used, &[0; 256]);
        let mut driver = Driver::set_up(device, ram, VERSION_1);
        driver.submit(0, &[writable(DATA, 8)]);
        driver.kick(0);
        assert_eq!(
            driver.await_used(0, 1).len(),
            1,
            "after a reset it works again: {name}"
        );
    }
}

#[test]
fn a_lost_device_serves_nothing_more() {
    let mut rig = set_up(VERSION_1);
    rig.driver.submit(0, &[readable(DATA, 8)]);
    rig.driver.kick(0);
    rig.driver.await_interrupt();
    rig.driver.submit(0, &[writable(DATA, 8)]);
    rig.driver.device.kicks()[0].write(1).unwrap();
    settle(&rig.event_loop);
    assert!(rig.driver.take_used(0).is_empty());
    assert_eq!(rig.driver.get(DATA, 8), [0; 8]);
}

#[test]
fn an_indirect_chain_without_the_feature_is_refused_and_with_it_is_served() {
    for (features, works) in [(VERSION_1, false), (VERSION_1 | INDIRECT_DESC, true)] {
        let mut rig = set_up(features);
        rig.driver.descriptor(DATA, DATA + 4096, 32, WRITE, 0);
        rig.driver.descriptor(rings(0).0, DATA, 16, INDIRECT, 0);
        rig.driver.offer(0, 0);
        rig.driver.kick(0);
        assert_eq!(rig.driver.await_interrupt(), if works { 1 } else { 2 });
        assert_eq!(rig.driver.take_used(0).len(), usize::from(works));
    }
}

#[test]
fn an_idle_queue_asks_for_a_kick_however_long_it_ran() {
    // More than once around the indices, which are 16 bits wide.
    for (features, rounds) in [(VERSION_1, 100), (VERSION_1 | EVENT_IDX, 100)] {
        let mut rig = set_up(features);
        for round in 0..rounds {
            rig.driver.submit(0, &[writable(DATA, 4)]);
            rig.driver.kick(0);
            rig.driver.await_used(0, 1);
            settle(&rig.event_loop); // the call that gave the buffer back has ended
            rig.driver.submit(0, &[writable(DATA, 4)]);
            assert!(rig.driver.device_wants_kick(0), "round {round}");
            rig.driver.kick(0);
            rig.driver.await_used(0, 1);
        }
    }
}

#[test]
fn a_driver_that_wants_no_interrupts_gets_none() {
    let mut rig = set_up(VERSION_1);
    let (_, avail, _) = rings(0);
    rig.driver.put(avail, &1u16.to_le_bytes());
    rig.driver.submit(0, &[writable(DATA, 4)]);
    rig.driver.kick(0);
    settle(&rig.event_loop);
    assert_eq!(rig.driver.take_used(0).len(), 1);
    assert!(rig.driver.device.interrupt().event().read().is_err());
}

#[test]
fn accesses_of_a_wrong_width_are_ignored() {
    let rig = found();
    let mut wide = [0xff; 8];
    rig.driver.device.read(Offset(0), &mut wide);
    assert_eq!(wide, [0; 8]);
    rig.driver.device.write(Offset(0x70), &[1]);
    rig.driver.device.write(Offset(0x71), &[1, 0, 0, 0]);
    assert_eq!(rig.driver.status(), 0);
    assert_eq!(refused(&rig), 3);
}

#[test]
fn a_request_that_was_waiting_at_the_save_is_served_after_the_restore() {
    for features in [VERSION_1, VERSION_1 | EVENT_IDX] {
        let mut rig = set_up(features);
        for _ in 0..5 {
            rig.driver.submit(0, &[writable(DATA, 4)]);
            rig.driver.kick(0);
            rig.driver.await_used(0, 1);
        }
        let frozen = EventLoop::freeze_all([&*rig.event_loop], &|| false).unwrap();
        rig.driver.submit(0, &[writable(DATA, 4)]);
        rig.driver.kick(0); // it waits in an event of the old machine, and is lost with it
        let saved = rig
            .driver
            .device
            .save_section("rng", &Paused::until(|| ()))
            .unwrap();
        let mut restored = restore(rig, saved);
        drop(frozen);

        restored.driver.device.resume();

        assert_eq!(restored.driver.await_used(0, 1), [(5, 4)]);
        restored.driver.submit(0, &[writable(DATA, 4)]);
        restored.driver.kick(0);
        assert_eq!(restored.driver.await_used(0, 1), [(6, 4)], "and it goes on");
    }
}

#[test]
fn an_interrupt_that_was_on_its_way_at_the_save_comes_after_the_restore() {
    let mut rig = set_up(VERSION_1);
    rig.driver.submit(0, &[writable(DATA, 4)]);
    rig.driver.kick(0);
    rig.driver.await_interrupt(); // the old machine's line: the guest never got to see it
    let saved = save(&rig);
    let mut restored = restore(rig, saved);
    assert!(
        restored.driver.device.interrupt().event().read().is_err(),
        "quiet until it is resumed"
    );
    restored.driver.device.resume();
    restored.driver.await_interrupt();
    assert_eq!(restored.driver.take_used(0).len(), 1);
}

#[test]
fn a_device_lost_to_its_driver_stays_so_over_a_restore() {
    let mut rig = set_up(VERSION_1);
    rig.driver.submit(0, &[readable(DATA, 8)]);
    rig.driver.kick(0);
    rig.driver.await_interrupt();
    let saved = save(&rig);
    let restored = restore(rig, saved);
    assert!(restored.driver.needs_reset());
}

#[test]
fn a_half_done_set_up_goes_on_after_a_restore() {
    let mut rig = found();
    rig.driver.negotiate(VERSION_1);
    rig.driver.set_up_queue(0);
    let saved = save(&rig);
    let mut restored = restore(rig, saved);
    restored.driver.write(0x70, 15);
    restored.driver.submit(0, &[writable(DATA, 4)]);
    restored.driver.kick(0);
    assert_eq!(restored.driver.await_used(0, 1), [(0, 4)]);
}

#[test]
fn state_that_no_driver_can_have_brought_about_is_refused() {
    let rig = set_up(VERSION_1);
    let saved = save(&rig);
    let event_loop = Arc::new(EventLoop::start("restored").unwrap());
    let spoilt = [
        ("/transport/device_status", 4u64),
        ("/transport/device_status", 0x1f),
        ("/transport/device_status", 3), // with a ready queue
        ("/transport/interrupt_status", 4),
        ("/transport/driver_features", 0),
        ("/transport/driver_features", 1 << 32 | 1),
        ("/transport/queues/0/size", 3),
        ("/transport/queues/0/size", 512),
        ("/transport/queues/0/size", 0),
        ("/transport/queues/0/descriptors", RAM_BYTES),
        ("/transport/queues/0/descriptors", 0x1_0001),
        ("/transport/queues/0/driver_ring", u64::MAX - 1),
        ("/transport/queues/0/driver_ring", 0),
        ("/transport/queues/0/device_ring", RAM_BYTES - 8),
        ("/transport/queues/0/next_avail", 17),
        ("/transport/queues/0/next_used", 1),
    ];
    for (path, value) in spoilt {
        let mut section = saved.clone();
        *section.state.pointer_mut(path).unwrap() = value.into();
        let restored = registry::restore(section, Parts::Rng, place(&rig.driver.ram, &event_loop));
        assert!(restored.is_err(), "{path} = {value:#x}");
    }
    let mut no_queue = saved.clone();
    no_queue.state["transport"]["queues"]
        .as_array_mut()
        .unwrap()
        .clear();
    let mut other_kind = saved.clone();
    other_kind.kind = "virtio-block".to_owned();
    let mut newer = saved.clone();
    newer.version += 1;
    let mut surplus = saved.clone();
    surplus.state["transport"]["more"] = 1.into();
    for section in [no_queue, other_kind, newer, surplus] {
        assert!(registry::restore(section, Parts::Rng, place(&rig.driver.ram, &event_loop)).is_err());
    }
    assert!(registry::restore(saved, Parts::Rng, place(&rig.driver.ram, &event_loop)).is_ok());
}

#[test]
fn counters_are_readable_by_name() {
    let mut rig = set_up(VERSION_1);
    rig.driver.submit(0, &[writable(DATA, 64)]);
    rig.driver.kick(0);
    rig.driver.await_used(0, 1);
    let counters: std::collections::BTreeMap<_, _> = rig.driver.device.counters().into_iter().collect();
    assert_eq!(
        ["requests", "bytes", "register_kicks", "driver_faults"].map(|name| counters[name]),
        [1, 64, 1, 0]
    );
}

#[test]
fn indices_wrap_without_silencing_a_queue() {
    let features = [VERSION_1, VERSION_1 | EVENT_IDX];
    // As if so many requests had been served: the indices are 16 bits wide.
    for (features, served) in features
        .into_iter()
        .flat_map(|one| [(one, 65_530u16), (one, 65_535)])
    {
        let mut rig = set_up(features);
        let mut saved = save(&rig);
        for index in ["next_avail", "next_used"] {
            saved.state["transport"]["queues"][0][index] = served.into();
        }
        rig.driver.served_before(0, served);
        let mut rig = restore(rig, saved);
        rig.driver.device.resume();
        rig.driver.await_interrupt(); // of the restore itself
        for round in 0..20 {
            rig.driver.submit(0, &[writable(DATA, 4)]);
            rig.driver.kick(0);
            assert_eq!(rig.driver.await_used(0, 1).len(), 1, "round {round}");
        }
        // A save in mid-wrap is no different.
        let saved = save(&rig);
        let mut rig = restore(rig, saved);
        rig.driver.submit(0, &[writable(DATA, 4)]);
        rig.driver.device.resume();
        assert_eq!(rig.driver.await_used(0, 1).len(), 1);
    }
}

/// What a hostile guest can do to a device.
#[derive(Clone, Debug)]
enum Act {
    Read { offset: u64, len: usize },
    Write { offset: u64, data: Vec<u8> },
    Scribble { address: u64, data: Vec<u8> },
    SetUp,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let registers = prop_oneof![4 => (0u64..0x48).prop_map(|word| word * 4), 1 => 0u64..0x1000];
    let small = prop_oneof![
        Just(0u32),
        Just(1),
        Just(3),
        Just(11),
        Just(15),
        0u32..20,
        any::<u32>()
    ];
    let word = (registers.clone(), small).prop_map(|(offset, value)| Act::Write {
        offset,
        data: value.to_le_bytes().to_vec(),
    });
    let odd = (registers.clone(), prop::collection::vec(any::<u8>(), 1..9))
        .prop_map(|(offset, data)| Act::Write { offset, data });
    let read = (registers, 1usize..9).prop_map(|(offset, len)| Act::Read { offset, len });
    // Into the rings, or into an indirect table.
    let scribble = (prop_oneof![0x1_0000u64..0x1_0100, 0x1_1000u64..0x1_1040, Just(DATA)])
        .prop_flat_map(|address| {
            (
                Just(address),
                prop::collection::vec(prop_oneof![Just(0u8), 0u8..8, any::<u8>()], 1..40),
            )
        })
        .prop_map(|(address, data)| Act::Scribble { address, data });
    prop::collection::vec(
        prop_oneof![4 => word, 1 => odd, 1 => read, 3 => scribble, 2 => Just(Act::SetUp)],
        1..60,
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// Nothing that a guest does to registers and rings keeps it from getting a working device by a reset.
    #[test]
    fn whatever_a_guest_does_a_reset_gives_it_a_working_device(acts in acts()) {
        let rig = found();
        let features = VERSION_1 | EVENT_IDX | INDIRECT_DESC;
        let (device, ram) = (Arc::clone(&rig.driver.device), Arc::clone(&rig.driver.ram));
        for act in acts {
            match act {
                Act::Read { offset, len } => device.read(Offset(offset), &mut vec![0; len]),
                Act::Write { offset, data } => device.write(Offset(offset), &data),
                Act::Scribble { address, data } => {
                    rig.driver.put(address, &data);
                    rig.driver.kick(0);
                }
                Act::SetUp => {
                    let mut driver = Driver::find(Arc::clone(&device), Arc::clone(&ram));
                    driver.negotiate(features);
                    driver.set_up_queue(0);
                    driver.write(0x70, 15);
                }
            }
        }
        // Settled, so that nothing of before is under way when the rings are cleaned.
        device.write(Offset(0x70), &[0; 4]);
        settle(&rig.event_loop);
        while device.interrupt().event().read().is_ok() {}
        for ring in [rings(0).0, rings(0).1, rings(0).2] {
            rig.driver.put(ring, &[0; 0x1000]);
        }
        let mut driver = Driver::set_up(device, ram, features);
        driver.submit(0, &[writable(DATA, 8)]);
        driver.kick(0);
        prop_assert_eq!(driver.await_used(0, 1), [(0, 8)]);
    }
}
