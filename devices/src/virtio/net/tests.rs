//! An interface under a driver, its other end a socket that keeps messages apart.

use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use runnel_snapshot::block_store::GuestRam;
use runnel_snapshot::block_store::guest_io::{receive_message, send_message};
use runnel_snapshot::machine::Paused;

use super::super::mock::*;
use super::super::registry::{self, Parts, Place};
use super::*;
use crate::event_loop::EventLoop;
use crate::interrupt::Interrupt;

const MRG: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const CHECKSUM: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM;
const TSO4: u64 = 1 << VIRTIO_NET_F_GUEST_TSO4;
const MTU: u64 = 1 << VIRTIO_NET_F_MTU;
const MAC: [u8; 6] = [2, 0, 0, 1, 2, 3];

struct Cable {
    socket: UnixDatagram,
    offloads: Mutex<Option<GuestOffloads>>,
}

impl Backend for Cable {
    fn descriptor(&self) -> RawFd {
        raw(&self.socket)
    }
    fn set_offloads(&self, offloads: GuestOffloads) -> io::Result<()> {
        *self.offloads.lock().unwrap() = Some(offloads);
        Ok(())
    }
    fn receive(&self, into: &[GuestSlice<'_>]) -> io::Result<usize> {
        receive_message(self.socket.as_fd(), into)
    }
    fn send(&self, from: &[GuestSlice<'_>]) -> io::Result<()> {
        send_message(self.socket.as_fd(), from).map(drop)
    }
}

struct Rig {
    driver: Driver,
    cable: Arc<Cable>,
    far: UnixDatagram,
    event_loop: Arc<EventLoop>,
}

fn place(ram: &Arc<GuestRam>, event_loop: &Arc<EventLoop>) -> Place {
    Place {
        ram: Arc::clone(ram),
        interrupt: Interrupt::new().unwrap(),
        event_loop: Arc::clone(event_loop),
    }
}

fn parts(cable: &Arc<Cable>, mac: Option<[u8; 6]>, mtu: Option<u16>) -> Parts {
    Parts::Net(NetParts {
        iface_id: "eth0".to_owned(),
        backend: Arc::clone(cable) as _,
        mac,
        mtu,
    })
}

fn rig(features: u64) -> Rig {
    rig_with_mtu(features, None)
}

fn rig_with_mtu(features: u64, mtu: Option<u16>) -> Rig {
    let (near, far) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far.set_read_timeout(Some(std::time::Duration::from_secs(20)))
        .unwrap();
    let cable = Arc::new(Cable {
        socket: near,
        offloads: Mutex::default(),
    });
    let (ram, event_loop) = (ram(), Arc::new(EventLoop::start("net").unwrap()));
    let device = registry::build(parts(&cable, Some(MAC), mtu), place(&ram, &event_loop)).unwrap();
    Rig {
        driver: Driver::set_up(device, ram, VERSION_1 | features),
        cable,
        far,
        event_loop,
    }
}

/// A packet with its header, of `len` bytes in all, distinguishable by `seed`.
fn packet(seed: u8, len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len)
        .map(|at| (at as u8).wrapping_mul(7).wrapping_add(seed))
        .collect();
    bytes[..HEADER_BYTES].fill(0);
    bytes
}

impl Rig {
    fn offer_buffers(&mut self, first: u64, count: u64, len: u32) {
        for number in first..first + count {
            self.driver
                .submit(RECEIVE, &[writable(DATA + number * 0x2_0000, len)]);
        }
    }

    /// What lies in buffer `number`, its header checked.
    fn received(&self, number: u64, len: usize, num_buffers: u8) -> Vec<u8> {
        let mut bytes = self.driver.get(DATA + number * 0x2_0000, len);
        assert_eq!(bytes[NUM_BUFFERS..][..2], [num_buffers, 0]);
        bytes[NUM_BUFFERS..][..2].fill(0);
        bytes
    }

    fn send(&mut self, bytes: &[u8]) {
        self.driver.put(DATA + 0x20_0000, bytes);
        self.driver
            .submit(TRANSMIT, &[readable(DATA + 0x20_0000, bytes.len() as u32)]);
        self.driver.kick(TRANSMIT);
    }
}

const NUM_BUFFERS: usize = 10;

#[test]
fn a_packet_of_the_guest_comes_out_whole_however_it_is_cut() {
    let mut rig = rig(0);
    let bytes = packet(1, 300);
    rig.driver.put(DATA, &bytes);
    rig.driver.submit(
        TRANSMIT,
        &[
            readable(DATA, 5),
            readable(DATA + 5, 100),
            readable(DATA + 105, 195),
        ],
    );
    rig.driver.kick(TRANSMIT);
    let mut out = [0; 2048];
    assert_eq!(rig.far.recv(&mut out).unwrap(), 300);
    assert_eq!(out[..300], bytes);
    assert_eq!(rig.driver.await_used(TRANSMIT, 1), [(0, 0)]);
}

#[test]
fn a_packet_from_outside_reaches_the_guests_buffer() {
    let mut rig = rig(0);
    rig.offer_buffers(0, 2, 2048);
    rig.driver.kick(RECEIVE);
    let bytes = packet(2, 1000);
    rig.far.send(&bytes).unwrap();
    assert_eq!(rig.driver.await_used(RECEIVE, 1), [(0, 1000)]);
    assert_eq!(rig.received(0, 1000, 1), bytes);
    rig.far.send(&bytes[..60]).unwrap();
    assert_eq!(rig.driver.await_used(RECEIVE, 1), [(1, 60)]);
}

#[test]
fn packets_wait_outside_while_the_guest_has_no_buffers_and_keep_their_order() {
    let mut rig = rig(0);
    for seed in 0..6 {
        rig.far.send(&packet(seed, 100 + usize::from(seed))).unwrap();
    }
    settle(&rig.event_loop);
    rig.offer_buffers(0, 6, 2048);
    rig.driver.kick(RECEIVE);
    let used = rig.driver.await_used(RECEIVE, 6);
    assert_eq!(used, [(0, 100), (1, 101), (2, 102), (3, 103), (4, 104), (5, 105)]);
    for seed in 0..6 {
        let number = u64::from(seed);
        assert_eq!(
            rig.received(number, 100 + usize::from(seed), 1),
            packet(seed, 100 + usize::from(seed))
        );
    }
}

#[test]
fn a_large_packet_is_spread_over_buffers_that_appear_together() {
    let mut rig = rig(MRG | CHECKSUM | TSO4);
    rig.offer_buffers(0, 8, 10_000);
    rig.driver.kick(RECEIVE);
    let bytes = packet(3, 25_000);
    rig.far.send(&bytes).unwrap();
    assert_eq!(
        rig.driver.await_used(RECEIVE, 1),
        [(0, 10_000), (1, 10_000), (2, 5_000)]
    );
    let mut seen = rig.received(0, 10_000, 3);
    seen.extend(rig.driver.get(DATA + 0x2_0000, 10_000));
    seen.extend(rig.driver.get(DATA + 0x4_0000, 5_000));
    assert_eq!(seen, bytes);
}

#[test]
fn no_packet_is_taken_before_the_largest_would_fit() {
    let mut rig = rig(MRG | CHECKSUM | TSO4);
    rig.offer_buffers(0, 6, 10_000);
    rig.driver.kick(RECEIVE);
    rig.far.send(&packet(4, 62_000)).unwrap();
    settle(&rig.event_loop);
    assert!(
        rig.driver.take_used(RECEIVE).is_empty(),
        "60,000 bytes might not do"
    );
    rig.offer_buffers(6, 1, 10_000);
    rig.driver.kick(RECEIVE);
    assert_eq!(rig.driver.await_used(RECEIVE, 1).len(), 7);
}

#[test]
fn a_packet_for_which_there_is_no_room_outside_waits_in_the_queue() {
    let mut rig = rig(0);
    // The kernel bounds a socket's queue; find out where, from the guest's side.
    let mut sent = 0u32;
    while rig.cable_has_room(&mut sent) {}
    rig.send(&packet(200, 500));
    settle(&rig.event_loop);
    assert!(rig.driver.take_used(TRANSMIT).is_empty());
    let mut out = [0; 2048];
    for seed in 0..sent {
        let len = rig.far.recv(&mut out).unwrap();
        assert_eq!(out[..len], packet(seed as u8, 100));
    }
    assert_eq!(rig.driver.await_used(TRANSMIT, 1).len(), 1);
    let len = rig.far.recv(&mut out).unwrap();
    assert_eq!(out[..len], packet(200, 500));
}

impl Rig {
    /// Sends from the near end, past the device, until there is no room.
    fn cable_has_room(&self, sent: &mut u32) -> bool {
        let room = self.cable.socket.send(&packet(*sent as u8, 100)).is_ok();
        *sent += u32::from(room);
        room
    }
}

#[test]
fn offloads_are_those_the_driver_took_and_none_without_checksums() {
    let taken = |features| rig(features).cable.offloads.lock().unwrap().unwrap();
    assert_eq!(taken(0), GuestOffloads::default());
    assert_eq!(taken(TSO4), GuestOffloads::default());
    assert_eq!(
        taken(CHECKSUM | TSO4),
        GuestOffloads {
            checksum: true,
            tso4: true,
            ..GuestOffloads::default()
        }
    );
}

#[test]
fn a_driver_that_misuses_its_queues_loses_the_interface() {
    let crimes: [fn(&mut Driver) -> usize; 5] = [
        |driver| {
            driver.submit(TRANSMIT, &[readable(DATA, 11)]);
            TRANSMIT
        },
        |driver| {
            driver.submit(TRANSMIT, &[readable(DATA, 60), writable(DATA, 60)]);
            TRANSMIT
        },
        |driver| {
            driver.submit(RECEIVE, &[readable(DATA, 2048)]);
            RECEIVE
        },
        |driver| {
            driver.submit(RECEIVE, &[writable(DATA, 11)]);
            RECEIVE
        },
        |driver| {
            driver.submit(RECEIVE, &[writable(RAM_BYTES - 100, 2048)]);
            RECEIVE
        },
    ];
    for (number, commit) in crimes.into_iter().enumerate() {
        let mut rig = rig(0);
        let queue = commit(&mut rig.driver);
        rig.driver.kick(queue);
        assert_eq!(rig.driver.await_interrupt(), 2, "crime {number}");
        assert!(rig.driver.needs_reset());
    }
}

#[test]
fn a_packet_that_is_too_large_is_lost_and_the_queue_goes_on() {
    let mut rig = rig(0);
    rig.driver.submit(TRANSMIT, &[readable(DATA, 70_000)]);
    rig.send(&packet(9, 100));
    let mut out = [0; 2048];
    assert_eq!(rig.far.recv(&mut out).unwrap(), 100);
    assert_eq!(rig.driver.await_used(TRANSMIT, 2).len(), 2);
}

#[test]
fn a_message_without_a_header_is_dropped_and_its_buffer_used_for_the_next() {
    let mut rig = rig(0);
    rig.offer_buffers(0, 1, 2048);
    rig.driver.kick(RECEIVE);
    rig.far.send(&[1; 5]).unwrap();
    rig.far.send(&packet(5, 80)).unwrap();
    assert_eq!(rig.driver.await_used(RECEIVE, 1), [(0, 80)]);
}

#[test]
fn nothing_is_lost_over_a_save_in_mid_traffic() {
    for features in [0, EVENT_IDX] {
        let mut rig = rig(features);
        rig.offer_buffers(0, 2, 2048);
        rig.driver.kick(RECEIVE);
        rig.far.send(&packet(0, 100)).unwrap();
        rig.driver.await_used(RECEIVE, 1);

        let frozen = EventLoop::freeze_all([&*rig.event_loop], &|| false).unwrap();
        rig.far.send(&packet(1, 101)).unwrap();
        rig.send(&packet(7, 300));
        let saved = rig
            .driver
            .device
            .save_section("eth0", &Paused::until(|| ()))
            .unwrap();
        let event_loop = Arc::new(EventLoop::start("restored").unwrap());
        // Another host's tap; the packet in the old one's queue is handed over by hand here.
        let device = registry::restore(
            saved,
            parts(&rig.cable, None, None),
            place(&rig.driver.ram, &event_loop),
        )
        .unwrap();
        let mut rig = Rig {
            driver: rig.driver.go_on(device),
            ..rig
        };
        settle(&event_loop);
        assert_eq!(rig.driver.take_used(RECEIVE), [], "RAM may not be there yet");
        rig.driver.device.resume();

        assert_eq!(rig.driver.await_used(RECEIVE, 1), [(1, 101)]);
        assert_eq!(rig.received(1, 101, 1), packet(1, 101));
        let mut out = [0; 2048];
        assert_eq!(rig.far.recv(&mut out).unwrap(), 300);
        let mut mac = [0; 6];
        rig.driver.device.read(Offset(0x100), &mut mac);
        assert_eq!(mac, MAC, "the guest keeps its address");
        drop(frozen);
    }
}

#[test]
fn without_an_address_none_is_offered() {
    let device = Net::new(NetParts {
        iface_id: "eth0".to_owned(),
        backend: Arc::clone(&rig(0).cable) as _,
        mac: None,
        mtu: None,
    });
    assert_eq!(
        device.features() & (1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_MTU),
        0
    );
    assert_eq!(device.metrics().sent_packets.load(Ordering::Relaxed), 0);
}

#[test]
fn an_mtu_is_told_to_the_driver_and_again_after_a_restore_whatever_the_parts_say() {
    let rig = rig_with_mtu(MTU, Some(9000));
    let frozen = EventLoop::freeze_all([&*rig.event_loop], &|| false).unwrap();
    let saved = rig
        .driver
        .device
        .save_section("eth0", &Paused::until(|| ()))
        .unwrap();
    let event_loop = Arc::new(EventLoop::start("restored").unwrap());
    let restored = registry::restore(
        saved,
        parts(&rig.cable, None, None),
        place(&rig.driver.ram, &event_loop),
    )
    .unwrap();
    for device in [&rig.driver.device, &restored] {
        let mut mtu = [0; 2];
        device.read(Offset(0x100 + 10), &mut mtu);
        assert_eq!(u16::from_le_bytes(mtu), 9000);
        let mut features = [0; 4];
        device.write(Offset(0x014), &features); // the first word of them
        device.read(Offset(0x010), &mut features);
        assert_ne!(u64::from(u32::from_le_bytes(features)) & MTU, 0);
    }
    drop(frozen);
}

#[test]
fn a_frame_of_the_mtu_waits_for_buffers_in_which_it_fits() {
    let mut rig = rig_with_mtu(MTU | MRG, Some(9000));
    rig.offer_buffers(0, 2, 2048);
    rig.driver.kick(RECEIVE);
    rig.far.send(&packet(6, 9026)).unwrap();
    settle(&rig.event_loop);
    assert!(rig.driver.take_used(RECEIVE).is_empty(), "it would be cut");
    rig.offer_buffers(2, 3, 2048);
    rig.driver.kick(RECEIVE);
    assert_eq!(rig.driver.await_used(RECEIVE, 1).len(), 5);
}

#[test]
fn an_image_without_an_mtu_goes_on_without_and_one_with_nonsense_is_refused() {
    let cable = Arc::clone(&rig(0).cable);
    let restored = |state: &str| {
        let parts = NetParts {
            iface_id: "eth0".to_owned(),
            backend: Arc::clone(&cable) as _,
            mac: None,
            mtu: Some(1400),
        };
        Net::restore(parts, serde_json::from_str(state).unwrap())
    };
    let old = restored(r#"{"mac": null}"#).unwrap();
    assert_eq!(old.features() & MTU, 0);
    let nonsense = restored(r#"{"mac": null, "mtu": 67}"#).unwrap_err();
    assert!(matches!(nonsense, NetError::Mtu { mtu: 67, .. }), "{nonsense}");
}
