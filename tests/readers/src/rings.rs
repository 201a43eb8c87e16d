//! Devices under a driver that writes what it likes into its rings: requests of a drive, packets of an interface.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::{Arc, Mutex};

use runnel_devices::virtio::block::{Block, BlockParts, CacheType};
use runnel_devices::virtio::fuzz::{BareDevice, Rings};
use runnel_devices::virtio::net::{Backend, GuestOffloads, Net, NetParts};
use runnel_devices::virtio::{Progress, VirtioDevice, Wake};
use runnel_snapshot::block_store::guest_io::total;
use runnel_snapshot::block_store::{BlockStore, GuestRam, GuestSlice};
use runnel_snapshot::units::ByteRange;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use crate::input::Input;

/// Guest RAM: the rings of both queues, and data behind.
pub(crate) const RAM_BYTES: u64 = 64 << 10;
/// Where data begins.
const DATA: u64 = 0x4000;
/// Descriptors of a queue.
const QUEUE_SIZE: u16 = 16;
/// How often a device is called for one input; a call serves all that there is, so the second finds nothing.
const CALLS_MAX: usize = 4;
/// Bytes of the drive.
const DRIVE_BYTES: u64 = 64 * 512;

const INDIRECT_DESC: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;

pub(crate) fn ram() -> Arc<GuestRam> {
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM_BYTES as usize)]);
    Arc::new(ram.expect("memory can be had"))
}

fn rings(queue: u64, position: u16) -> Rings {
    let base = 0x1000 * (queue + 1);
    Rings {
        size: QUEUE_SIZE,
        descriptors: base,
        driver_ring: base + 0x400,
        device_ring: base + 0x800,
        position,
    }
}

/// RAM as the input says: descriptors and available ring of each queue, then data.
///
/// A descriptor is an address in pieces of four bytes, up to four times of RAM; a length; flags; the next one. So
/// most of them lie in RAM, and some beyond its end.
fn fill(ram: &GuestRam, input: &mut Input<'_>, rings: &[Rings]) {
    let zeros = [0; RAM_BYTES as usize];
    let put = |at: u64, bytes: &[u8]| {
        ram.write_slice(bytes, GuestAddress(at))
            .expect("the rings lie in RAM");
    };
    put(0, &zeros);
    for rings in rings {
        for at in 0..u64::from(input.u8() % (QUEUE_SIZE as u8 + 1)) {
            let mut descriptor = [0; 16];
            descriptor[..8].copy_from_slice(&(u64::from(input.u16()) * 4).to_le_bytes());
            descriptor[8..12].copy_from_slice(&u32::from(input.u16()).to_le_bytes());
            let flags = input.u8();
            descriptor[12] = flags & 7;
            // A length that no RAM has.
            descriptor[11] = flags & 0x80;
            descriptor[14] = input.u8();
            put(rings.descriptors + 16 * at, &descriptor);
        }
        let offered = input.u8() % (QUEUE_SIZE as u8 + 4);
        put(rings.driver_ring, &[input.u8() & 1]);
        for number in 0..u16::from(offered.min(QUEUE_SIZE as u8)) {
            let slot = rings.position.wrapping_add(number) % QUEUE_SIZE;
            put(rings.driver_ring + 4 + 2 * u64::from(slot), &[input.u8()]);
        }
        let index = rings.position.wrapping_add(offered.into());
        put(rings.driver_ring + 2, &index.to_le_bytes());
        put(rings.device_ring + 2, &rings.position.to_le_bytes());
    }
    let data = input.rest();
    put(DATA, &data[..data.len().min((RAM_BYTES - DATA) as usize)]);
}

/// Plays a driver that breaks off at the first fault, as the transport would. Whether there was none.
fn play<D: VirtioDevice>(
    device: &mut D,
    features: u64,
    rings: &[Rings],
    calls: &[Wake],
    ram: &GuestRam,
) -> bool {
    let mut device = BareDevice::set_up(device, features, rings).expect("an event can be had");
    for why in calls {
        let mut why = *why;
        for _ in 0..CALLS_MAX {
            match device.call(why, ram) {
                Ok(Progress::Idle) => break,
                Ok(Progress::Again(queue)) => why = Wake::Queue(queue),
                Err(error) => {
                    assert!(!error.to_string().is_empty());
                    return false;
                }
            }
        }
    }
    true
}

/// A drive in memory that is not asked for what it does not have.
struct Drive {
    bytes: Mutex<Vec<u8>>,
    read_only: bool,
}

impl Drive {
    fn new(read_only: bool) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(vec![7; DRIVE_BYTES as usize]),
            read_only,
        })
    }

    fn check(range: ByteRange) {
        assert!(range.fits_in(DRIVE_BYTES), "{range} of a drive of {DRIVE_BYTES}");
    }

    fn write(&self, range: ByteRange, write: impl FnOnce(&mut [u8])) -> io::Result<()> {
        Self::check(range);
        assert!(!self.read_only, "a read-only drive is written to");
        let mut bytes = self.bytes.lock().expect("nobody has panicked");
        write(&mut bytes[range.start as usize..][..range.len as usize]);
        Ok(())
    }
}

impl BlockStore for Drive {
    fn bytes(&self) -> u64 {
        DRIVE_BYTES
    }
    fn is_read_only(&self) -> bool {
        self.read_only
    }
    fn will_read(&self, ranges: &[ByteRange]) {
        ranges.iter().for_each(|range| Self::check(*range));
    }
    fn read_at(&self, offset: u64, into: &[GuestSlice<'_>]) -> io::Result<()> {
        Self::check(ByteRange {
            start: offset,
            len: total(into),
        });
        let bytes = self.bytes.lock().expect("nobody has panicked");
        let mut at = offset as usize;
        for slice in into {
            slice.copy_from(&bytes[at..at + slice.len()]);
            at += slice.len();
        }
        Ok(())
    }
    fn write_at(&self, offset: u64, from: &[GuestSlice<'_>]) -> io::Result<()> {
        let range = ByteRange {
            start: offset,
            len: total(from),
        };
        self.write(range, |bytes| {
            let mut at = 0;
            for slice in from {
                slice.copy_to(&mut bytes[at..at + slice.len()]);
                at += slice.len();
            }
        })
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.write(range, |bytes| bytes.fill(0))
    }
    fn write_zeroes(&self, range: ByteRange, _: bool) -> io::Result<()> {
        self.write(range, |bytes| bytes.fill(0))
    }
}

/// A drive over memory, for whoever needs one.
pub(crate) fn drive(read_only: bool, cache_type: CacheType) -> BlockParts {
    BlockParts {
        drive_id: "rootfs".to_owned(),
        store: Drive::new(read_only),
        cache_type,
    }
}

thread_local! {
    /// Filled anew for each input.
    static RAM: Arc<GuestRam> = ram();
}

/// Requests of a drive: which features and what kind of drive, where the rings stand, then RAM.
pub fn virtio_block(bytes: &[u8]) -> bool {
    let mut input = Input::new(bytes);
    let how = input.u8();
    let cache_type = match how & 1 {
        0 => CacheType::Unsafe,
        _ => CacheType::Writeback,
    };
    let mut block = Block::new(drive(how & 2 != 0, cache_type)).expect("the drive has sectors");
    let mut features = block.features();
    features |= if how & 4 != 0 { EVENT_IDX } else { 0 };
    features |= if how & 8 != 0 { INDIRECT_DESC } else { 0 };
    let rings = [rings(0, input.u16())];
    RAM.with(|ram| {
        fill(ram, &mut input, &rings);
        play(&mut block, features, &rings, &[Wake::Queue(0)], ram)
    })
}

/// The other end of a cable: packets that come, and room for so many that go.
pub(crate) struct Cable {
    /// Never readable.
    descriptor: File,
    coming: Mutex<VecDeque<usize>>,
    room: Mutex<u8>,
}

impl Cable {
    pub(crate) fn new(coming: impl IntoIterator<Item = usize>, room: u8) -> Self {
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC);
        Self {
            descriptor: File::from(event.expect("an event can be had")),
            coming: Mutex::new(coming.into_iter().collect()),
            room: Mutex::new(room),
        }
    }
}

impl Backend for Cable {
    fn descriptor(&self) -> RawFd {
        self.descriptor.as_raw_fd()
    }
    fn set_offloads(&self, _: GuestOffloads) -> io::Result<()> {
        Ok(())
    }
    fn receive(&self, into: &[GuestSlice<'_>]) -> io::Result<usize> {
        let mut coming = self.coming.lock().expect("nobody has panicked");
        let mut left = coming.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        let mut taken = 0;
        for slice in into {
            let part = left.min(slice.len());
            slice.copy_from(&vec![7; part]);
            left -= part;
            taken += part;
        }
        Ok(taken)
    }
    fn send(&self, from: &[GuestSlice<'_>]) -> io::Result<()> {
        assert!(total(from) < 66_000, "a packet is longer than any");
        let mut room = self.room.lock().expect("nobody has panicked");
        *room = room.checked_sub(1).ok_or(io::ErrorKind::WouldBlock)?;
        Ok(())
    }
}

/// An interface at the end of a cable, for whoever needs one.
pub(crate) fn interface(cable: Cable) -> NetParts {
    NetParts {
        iface_id: "eth0".to_owned(),
        backend: Arc::new(cable),
        mac: Some([2, 0, 0, 0, 0, 1]),
        mtu: None,
    }
}

/// Packets of an interface: its features, the packets that come, room for those that go, the rings' place, then RAM.
pub fn virtio_net(bytes: &[u8]) -> bool {
    let mut input = Input::new(bytes);
    let how = input.u8();
    let coming: Vec<usize> = (0..input.u8() % 4).map(|_| usize::from(input.u16())).collect();
    let mut net = Net::new(interface(Cable::new(coming, input.u8())));
    let mut features = 0;
    for (bit, with) in [
        (1, EVENT_IDX),
        (2, INDIRECT_DESC),
        (4, 1 << 15),
        (8, net.features() & !(1 << 15)),
    ] {
        features |= if how & bit != 0 { with } else { 0 };
    }
    let rings = [rings(0, input.u16()), rings(1, input.u16())];
    RAM.with(|ram| {
        fill(ram, &mut input, &rings);
        let calls = [Wake::Queue(0), Wake::Queue(1), Wake::Source];
        play(&mut net, features, &rings, &calls, ram)
    })
}
