//! What a driver has written about one queue, and whether a queue can be made of it.

use std::sync::Arc;

use runnel_snapshot::block_store::GuestRam;
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueState, QueueT};

use super::super::link::DriverLink;
use super::super::queue::VirtQueue;

/// Why no queue can be made of what a driver, or an image, says about it.
#[derive(Debug, thiserror::Error)]
pub enum QueueSetupError {
    /// The size or an address breaks the specification.
    #[error(
        "a queue of {size} (at most {max}) at {descriptors:#x}, {driver_ring:#x} and {device_ring:#x}: {source}"
    )]
    Shape {
        /// Descriptors in the queue.
        size: u16,
        /// The most that the device takes.
        max: u16,
        /// Address of the descriptor table.
        descriptors: u64,
        /// Address of the available ring.
        driver_ring: u64,
        /// Address of the used ring.
        device_ring: u64,
        /// Which rule.
        source: virtio_queue::Error,
    },
    /// A ring is not in RAM.
    #[error(
        "a queue of {size} at {descriptors:#x}, {driver_ring:#x} and {device_ring:#x} does not lie in RAM"
    )]
    OutsideRam {
        /// Descriptors in the queue.
        size: u16,
        /// Address of the descriptor table.
        descriptors: u64,
        /// Address of the available ring.
        driver_ring: u64,
        /// Address of the used ring.
        device_ring: u64,
    },
    /// More chains are out than the queue has.
    #[error("a queue of {size} from which {out} chains are out")]
    Indices {
        /// Descriptors in the queue.
        size: u16,
        /// Chains taken and not given back.
        out: u16,
    },
}

/// A queue's registers.
#[derive(Debug)]
pub(super) struct QueueRegisters {
    pub(super) max: u16,
    /// As written: checked when the queue becomes ready.
    pub(super) size: u16,
    pub(super) ready: bool,
    pub(super) descriptors: u64,
    pub(super) driver_ring: u64,
    pub(super) device_ring: u64,
}

impl QueueRegisters {
    pub(super) fn new(max: u16) -> Self {
        Self {
            max,
            size: max,
            ready: false,
            descriptors: 0,
            driver_ring: 0,
            device_ring: 0,
        }
    }

    pub(super) fn reset(&mut self) {
        *self = Self::new(self.max);
    }

    /// Writes one of the registers that describe the queue.
    pub(super) fn write(&mut self, register: u32, value: u32) -> Result<(), ()> {
        let low = |address: &mut u64| *address = *address & !u64::from(u32::MAX) | u64::from(value);
        let high = |address: &mut u64| *address = *address & u64::from(u32::MAX) | u64::from(value) << 32;
        match register {
            VIRTIO_MMIO_QUEUE_NUM => {
                let size = u16::try_from(value).map_err(|_| ())?;
                if !size.is_power_of_two() || size > self.max {
                    return Err(());
                }
                self.size = size;
            }
            VIRTIO_MMIO_QUEUE_DESC_LOW => low(&mut self.descriptors),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => high(&mut self.descriptors),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => low(&mut self.driver_ring),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => high(&mut self.driver_ring),
            VIRTIO_MMIO_QUEUE_USED_LOW => low(&mut self.device_ring),
            VIRTIO_MMIO_QUEUE_USED_HIGH => high(&mut self.device_ring),
            _ => return Err(()),
        }
        Ok(())
    }

    /// Whether size, alignment and place are those of a queue, and `position` can be one in it. Looks at no byte of
    /// RAM.
    pub(super) fn check(&self, ram: &GuestRam, position: (u16, u16)) -> Result<(), QueueSetupError> {
        self.queue(ram, false, position).map(drop)
    }

    /// The queue, ready for use, at `position`: next available, next used.
    pub(super) fn build(
        &self,
        ram: &GuestRam,
        features: u64,
        position: (u16, u16),
        link: &Arc<DriverLink>,
    ) -> Result<VirtQueue, QueueSetupError> {
        let event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let indirect = features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0;
        let queue = self.queue(ram, event_idx, position)?;
        Ok(VirtQueue::new(queue, indirect, Arc::clone(link)))
    }

    fn queue(&self, ram: &GuestRam, event_idx: bool, position: (u16, u16)) -> Result<Queue, QueueSetupError> {
        let (size, descriptors, driver_ring, device_ring) =
            (self.size, self.descriptors, self.driver_ring, self.device_ring);
        let (next_avail, next_used) = position;
        let state = QueueState {
            max_size: self.max,
            next_avail,
            next_used,
            event_idx_enabled: event_idx,
            size,
            ready: true,
            desc_table: descriptors,
            avail_ring: driver_ring,
            used_ring: device_ring,
        };
        let queue = Queue::try_from(state).map_err(|source| QueueSetupError::Shape {
            size,
            max: self.max,
            descriptors,
            driver_ring,
            device_ring,
            source,
        })?;
        // The crate takes a ring at address 0 for one that was never set.
        if driver_ring == 0 || !queue.is_valid(ram) {
            return Err(QueueSetupError::OutsideRam {
                size,
                descriptors,
                driver_ring,
                device_ring,
            });
        }
        let out = next_avail.wrapping_sub(next_used);
        if out > size {
            return Err(QueueSetupError::Indices { size, out });
        }
        Ok(queue)
    }
}
