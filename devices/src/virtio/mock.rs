//! A driver for tests: finds a device through its registers, sets up its queues in RAM and talks to it, as a guest
//! does, and misbehaves when told to.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::sync::mpsc::{Sender, channel};

use event_manager::{EventOps, Events, MutEventSubscriber};
use runnel_snapshot::block_store::GuestRam;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::transport::MmioDevice;
use crate::bus::Offset;
use crate::event_loop::EventLoop;

pub(crate) const RAM_BYTES: u64 = 4 << 20;
/// Where tests put data: above the rings.
pub(crate) const DATA: u64 = 1 << 20;
pub(crate) const QUEUE_SIZE: u16 = 16;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const EVENT_IDX: u64 = 1 << 29;
pub(crate) const INDIRECT_DESC: u64 = 1 << 28;

pub(crate) fn ram() -> Arc<GuestRam> {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM_BYTES as usize)]).unwrap())
}

/// Returns when the loop has dealt with everything that was waiting for it, and with what that led to.
///
/// Not by freezing it, which makes devices put work off; nor by calls from outside, any number of which may be made in
/// one round.
pub(crate) fn settle(event_loop: &EventLoop) {
    struct Echo {
        event: EventFd,
        heard: Sender<()>,
    }
    impl MutEventSubscriber for Echo {
        fn init(&mut self, ops: &mut EventOps<'_>) {
            ops.add(Events::new(&self.event, EventSet::IN)).unwrap();
        }
        fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
            self.event.read().unwrap();
            self.heard.send(()).unwrap();
        }
    }
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let (heard, rounds) = channel();
    let echo = Echo {
        event: event.try_clone().unwrap(),
        heard,
    };
    let id = event_loop.add(Box::new(echo)).unwrap();
    for _ in 0..4 {
        event.write(1).unwrap();
        rounds.recv().unwrap();
    }
    drop(event_loop.remove(id).unwrap());
}

/// A buffer of a chain.
#[derive(Clone, Copy)]
pub(crate) struct Buffer {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) write: bool,
}

pub(crate) fn readable(address: u64, len: u32) -> Buffer {
    Buffer {
        address,
        len,
        write: false,
    }
}

pub(crate) fn writable(address: u64, len: u32) -> Buffer {
    Buffer {
        address,
        len,
        write: true,
    }
}

/// The driver's side of one queue.
#[derive(Default)]
struct DriverQueue {
    next_descriptor: u16,
    avail: u16,
    seen: u16,
}

pub(crate) struct Driver {
    pub(crate) device: Arc<dyn MmioDevice>,
    pub(crate) ram: Arc<GuestRam>,
    queues: Vec<DriverQueue>,
    event_idx: bool,
}

impl Driver {
    /// Finds the device; takes no step of its set-up.
    pub(crate) fn find(device: Arc<dyn MmioDevice>, ram: Arc<GuestRam>) -> Self {
        let queues = device.kicks().iter().map(|_| DriverQueue::default()).collect();
        Self {
            device,
            ram,
            queues,
            event_idx: false,
        }
    }

    /// Sets the device up with these features, which must be among those offered.
    pub(crate) fn set_up(device: Arc<dyn MmioDevice>, ram: Arc<GuestRam>, features: u64) -> Self {
        let mut driver = Self::find(device, ram);
        driver.negotiate(features);
        for queue in 0..driver.queues.len() {
            driver.set_up_queue(queue);
        }
        driver.write(0x70, 15);
        assert_eq!(driver.status(), 15, "the device is active");
        driver
    }

    pub(crate) fn negotiate(&mut self, features: u64) {
        self.event_idx = features & EVENT_IDX != 0;
        self.write(0x70, 0);
        self.write(0x70, 1);
        self.write(0x70, 3);
        for half in 0..2 {
            self.write(0x14, half);
            let offered = self.read(0x10);
            let wanted = (features >> (32 * half)) as u32;
            assert_eq!(wanted & !offered, 0, "a test asks for what is offered");
            self.write(0x24, half);
            self.write(0x20, wanted);
        }
        self.write(0x70, 11);
    }

    pub(crate) fn set_up_queue(&self, queue: usize) {
        self.write(0x30, queue as u32);
        self.write(0x38, QUEUE_SIZE.into());
        let (table, avail, used) = rings(queue);
        for (register, address) in [(0x80, table), (0x90, avail), (0xa0, used)] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(0x44, 1);
    }

    pub(crate) fn read(&self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.device.read(Offset(register), &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn write(&self, register: u64, value: u32) {
        self.device.write(Offset(register), &value.to_le_bytes());
    }

    pub(crate) fn status(&self) -> u32 {
        self.read(0x70)
    }

    pub(crate) fn needs_reset(&self) -> bool {
        self.status() & 0x40 != 0
    }

    /// Writes one descriptor; hostile tests write what they like.
    pub(crate) fn descriptor(&self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&address.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        self.ram.write_slice(&raw, GuestAddress(at)).unwrap();
    }

    /// Makes a chain available; does not kick.
    pub(crate) fn submit(&mut self, queue: usize, buffers: &[Buffer]) {
        let (table, ..) = rings(queue);
        let head = self.queues[queue].next_descriptor;
        for (number, buffer) in buffers.iter().enumerate() {
            let last = number + 1 == buffers.len();
            let at = (head + number as u16) % QUEUE_SIZE;
            let flags = if buffer.write { WRITE } else { 0 } | if last { 0 } else { NEXT };
            let address = table + 16 * u64::from(at);
            self.descriptor(address, buffer.address, buffer.len, flags, (at + 1) % QUEUE_SIZE);
        }
        self.queues[queue].next_descriptor = (head + buffers.len() as u16) % QUEUE_SIZE;
        self.offer(queue, head);
    }

    /// Puts a head into the available ring.
    pub(crate) fn offer(&mut self, queue: usize, head: u16) {
        let (_, avail, _) = rings(queue);
        let state = &mut self.queues[queue];
        let slot = avail + 4 + 2 * u64::from(state.avail % QUEUE_SIZE);
        self.ram.write_obj(head.to_le(), GuestAddress(slot)).unwrap();
        state.avail = state.avail.wrapping_add(1);
        self.set_avail_index(queue, self.queues[queue].avail);
    }

    pub(crate) fn set_avail_index(&self, queue: usize, index: u16) {
        let (_, avail, _) = rings(queue);
        self.ram
            .store(index.to_le(), GuestAddress(avail + 2), Ordering::Release)
            .unwrap();
    }

    /// Puts the queue where it would be if it had served this many requests.
    pub(crate) fn served_before(&mut self, queue: usize, count: u16) {
        let (_, _, used) = rings(queue);
        self.queues[queue].avail = count;
        self.queues[queue].seen = count;
        self.set_avail_index(queue, count);
        self.put(used + 2, &count.to_le_bytes());
        self.take_used(queue);
    }

    /// Whether the device asks to be kicked for the chain submitted last.
    pub(crate) fn device_wants_kick(&self, queue: usize) -> bool {
        let (_, _, used) = rings(queue);
        if self.event_idx {
            let at = used + 4 + 8 * u64::from(QUEUE_SIZE);
            let event: u16 = self.ram.load(GuestAddress(at), Ordering::Acquire).unwrap();
            event == self.queues[queue].avail.wrapping_sub(1)
        } else {
            let flags: u16 = self.ram.load(GuestAddress(used), Ordering::Acquire).unwrap();
            flags & 1 == 0
        }
    }

    /// By a plain write to the register, as without an ioeventfd.
    pub(crate) fn kick(&self, queue: usize) {
        self.write(0x50, queue as u32);
    }

    /// Chains that the device has given back: head and bytes written.
    pub(crate) fn take_used(&mut self, queue: usize) -> Vec<(u32, u32)> {
        let (_, avail, used) = rings(queue);
        let event = avail + 4 + 2 * u64::from(QUEUE_SIZE);
        let state = &mut self.queues[queue];
        let mut taken = Vec::new();
        loop {
            // «Interrupt me for the next one.» Before looking: one that comes in between says nothing of itself.
            self.ram
                .store(state.seen.to_le(), GuestAddress(event), Ordering::SeqCst)
                .unwrap();
            fence(Ordering::SeqCst);
            let index: u16 = self.ram.load(GuestAddress(used + 2), Ordering::Acquire).unwrap();
            if state.seen == index {
                return taken;
            }
            while state.seen != index {
                let at = used + 4 + 8 * u64::from(state.seen % QUEUE_SIZE);
                let head: u32 = self.ram.read_obj(GuestAddress(at)).unwrap();
                let len: u32 = self.ram.read_obj(GuestAddress(at + 4)).unwrap();
                taken.push((head, len));
                state.seen = state.seen.wrapping_add(1);
            }
        }
    }

    /// Waits for interrupts until `count` chains have come back.
    pub(crate) fn await_used(&mut self, queue: usize, count: usize) -> Vec<(u32, u32)> {
        let mut taken = self.take_used(queue);
        while taken.len() < count {
            self.await_interrupt();
            taken.extend(self.take_used(queue));
        }
        taken
    }

    /// Waits until the line is raised; returns why, and acknowledges it.
    pub(crate) fn await_interrupt(&self) -> u32 {
        let event = self.device.interrupt().event();
        let borrowed = borrow(event);
        let limit = Timespec {
            tv_sec: 20,
            tv_nsec: 0,
        };
        let ready = poll(
            &mut [PollFd::from_borrowed_fd(borrowed, PollFlags::IN)],
            Some(&limit),
        )
        .unwrap();
        assert_eq!(ready, 1, "the device has not raised its line: it is silent");
        event.read().unwrap();
        let why = self.read(0x60);
        self.write(0x64, why);
        why
    }

    pub(crate) fn put(&self, address: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(crate) fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// A driver that goes on with a restored device and its RAM where this one stopped.
    pub(crate) fn go_on(self, device: Arc<dyn MmioDevice>) -> Self {
        Self { device, ..self }
    }
}

fn borrow(event: &vmm_sys_util::eventfd::EventFd) -> std::os::fd::BorrowedFd<'_> {
    use std::os::fd::{AsRawFd, BorrowedFd};
    // SAFETY: the event outlives the borrow, which has its lifetime.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Addresses of a queue's descriptor table, available ring and used ring.
pub(crate) fn rings(queue: usize) -> (u64, u64, u64) {
    let base = 0x1_0000 * (queue as u64 + 1);
    (base, base + 0x1000, base + 0x2000)
}
