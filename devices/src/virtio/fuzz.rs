//! A device that a driver has set up, without a transport, an event loop or a thread: for whoever plays a hostile driver
//! many times a second.

use std::io;
use std::sync::Arc;

use runnel_snapshot::block_store::GuestRam;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueState};

use super::link::DriverLink;
use super::queue::VirtQueue;
use super::{ActiveDevice, Context, DeviceFault, Progress, VirtioDevice, Wake};
use crate::event_loop::StopFlag;
use crate::interrupt::Interrupt;

/// Where a queue lies in guest RAM.
#[derive(Clone, Copy, Debug)]
pub struct Rings {
    /// How many descriptors it has.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub driver_ring: u64,
    /// Guest-physical address of the used ring.
    pub device_ring: u64,
    /// Which chain comes next: the same for both rings.
    pub position: u16,
}

/// See the module.
pub struct BareDevice {
    device: Box<dyn ActiveDevice>,
    queues: Vec<Option<VirtQueue>>,
    stop: StopFlag,
}

impl BareDevice {
    /// Sets `device` up with these of its features.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    ///
    /// # Panics
    /// When the device does not start, or the rings are none.
    pub fn set_up<D: VirtioDevice>(device: &mut D, features: u64, rings: &[Rings]) -> io::Result<Self> {
        let link = Arc::new(DriverLink::new(Interrupt::new()?, 0, false));
        let has = |bit: u32| features & (1 << bit) != 0;
        let queue = |rings: &Rings| {
            let state = QueueState {
                max_size: rings.size,
                next_avail: rings.position,
                next_used: rings.position,
                event_idx_enabled: has(VIRTIO_RING_F_EVENT_IDX),
                size: rings.size,
                ready: true,
                desc_table: rings.descriptors,
                avail_ring: rings.driver_ring,
                used_ring: rings.device_ring,
            };
            let queue = Queue::try_from(state).expect("the rings are where rings can be");
            let indirect = has(VIRTIO_RING_F_INDIRECT_DESC);
            Some(VirtQueue::new(queue, indirect, Arc::clone(&link)))
        };
        Ok(Self {
            queues: rings.iter().map(queue).collect(),
            device: device.activate(features).expect("the device starts"),
            stop: StopFlag::default(),
        })
    }

    /// Calls it as its event loop would.
    ///
    /// # Errors
    /// What the driver did wrong. Then nobody would call it again.
    pub fn call(&mut self, why: Wake, ram: &GuestRam) -> Result<Progress, DeviceFault> {
        let mut context = Context {
            ram,
            queues: &mut self.queues,
            stop: &self.stop,
        };
        self.device.process(why, &mut context)
    }
}
