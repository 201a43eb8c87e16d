//! A virtio device in its place: on the MMIO bus, with its kicks and its interrupt line in the kernel.

use std::sync::Arc;

use runnel_devices::bus::MmioAddress;
use runnel_devices::virtio::transport::{ADDRESS_COUNT, MmioDevice, QUEUE_NOTIFY};
use vm_memory::GuestAddress;

use super::{BoardError, Buses};
use crate::kvm::Vm;
use crate::layout::{VirtioSlot, virtio_slot};

/// A virtio device, and where it is.
#[derive(Debug)]
pub struct Virtio {
    /// Its name: a drive's or an interface's identifier, `rng`.
    pub id: String,
    /// Where it is.
    pub slot: VirtioSlot,
    /// The device.
    pub device: Arc<dyn MmioDevice>,
}

impl Virtio {
    /// Wires `device` as the how-many-eth one of the machine: its line to `slot`'s, its kicks past the vCPU loop.
    pub(super) fn wire(
        id: String,
        slot: VirtioSlot,
        device: Arc<dyn MmioDevice>,
        buses: &mut Buses,
        vm: &Vm,
    ) -> Result<Self, BoardError> {
        const { assert!(ADDRESS_COUNT <= 4096) };
        vm.interrupt_by(device.interrupt().event(), slot.gsi)?;
        let notify = GuestAddress(slot.registers.start + QUEUE_NOTIFY.0);
        for (kick, queue) in device.kicks().iter().zip(0u32..) {
            vm.kick_by(kick, notify, queue)?;
        }
        let bus_device = Arc::clone(&device) as Arc<dyn runnel_devices::bus::BusDevice>;
        buses
            .mmio
            .insert(&id, MmioAddress(slot.registers.start), ADDRESS_COUNT, bus_device)?;
        Ok(Self { id, slot, device })
    }
}

/// The place of the next device after `taken` others.
pub(super) fn next_slot(taken: usize, id: &str) -> Result<VirtioSlot, BoardError> {
    virtio_slot(taken).ok_or_else(|| BoardError::TooManyDevices {
        id: id.to_owned(),
        max: taken,
    })
}
