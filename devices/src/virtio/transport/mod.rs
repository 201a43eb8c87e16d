//! The MMIO transport: the registers by which a driver finds, negotiates with and sets up a device (virtio 1.2 §4.2,
//! version 2).
//!
//! ```text
//!        ACKNOWLEDGE    DRIVER    features    FEATURES_OK    queues    DRIVER_OK
//!  reset ──────────► · ──────► · ─────────► · ──────────► · ───────► · ────────► active
//!    ▲                                                                             │
//!    └───────────────────────────── 0 written to the status ◄─────────────────────┤
//!                                                       a rule broken: NEEDS_RESET ┘
//! ```
//!
//! A register that is written in the wrong state, with the wrong width or with nonsense is left alone, and counted;
//! rings that do not lie in RAM cost the driver the device. A reset returns when the device touches nothing of the
//! guest any more, even if a request was under way: Linux frees its rings right after.
//!
//! **Lock order**: the registers, then the unit (the active half). The event loop takes only the unit.
//!
//! **Never** reads or writes guest memory itself.

use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use runnel_snapshot::block_store::GuestRam;
use runnel_snapshot::machine::Paused;
use runnel_snapshot::section::SavedSection;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::VirtioDevice;
use super::link::DriverLink;
use super::unit::{Active, Runner, Unit};
use crate::bus::{BusDevice, Offset};
use crate::event_loop::{EventLoop, EventLoopError};
use crate::interrupt::Interrupt;

mod queues;
mod state;
mod status;
#[cfg(test)]
mod tests;

use queues::QueueRegisters;
pub use queues::QueueSetupError;
pub use state::{QueueState, RestoreError, SaveError, TransportDeps, TransportState, VirtioState};

/// Addresses that a transport answers at.
pub const ADDRESS_COUNT: u64 = 0x1000;

/// Where in that range a driver writes the number of a queue to kick it: the ioeventfd of each queue lies here, as
/// wide as four bytes, matching the queue's number.
pub const QUEUE_NOTIFY: Offset = Offset(VIRTIO_MMIO_QUEUE_NOTIFY as u64);

/// «virt», little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// «RNNL»; drivers do not look at it.
const VENDOR: u32 = u32::from_le_bytes(*b"RNNL");

const ACKNOWLEDGE: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
const DRIVER: u8 = VIRTIO_CONFIG_S_DRIVER as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
const FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;

/// What every queue here can do.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Why a transport cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// No event for a queue's kicks.
    #[error("a queue gets no event descriptor for its kicks")]
    Kick(#[source] std::io::Error),
    /// The event loop did not take the device.
    #[error("the device cannot be put on its event loop")]
    EventLoop(#[from] EventLoopError),
}

/// What any transport offers to whoever builds and runs the machine, whatever its device.
pub trait MmioDevice: BusDevice + fmt::Debug {
    /// The events that kick the queues, by queue number: one ioeventfd each, at [`QUEUE_NOTIFY`].
    fn kicks(&self) -> &[EventFd];

    /// The device's interrupt line, for an irqfd.
    fn interrupt(&self) -> &Interrupt;

    /// Lets a restored device go on: kicks every queue and raises the line, as a kick or an interrupt may have been
    /// on its way when the state was saved. Called when RAM and interrupt controller stand, before the vCPUs run.
    fn resume(&self);

    /// What happened between the device and its driver.
    fn link(&self) -> &DriverLink;

    /// What the device and its link to the driver counted, by name.
    fn counters(&self) -> Vec<(&'static str, u64)>;

    /// Saves the device. Its event loop stands still.
    ///
    /// # Errors
    /// When the state has no JSON form.
    fn save_section(&self, id: &str, paused: &Paused<'_>) -> Result<SavedSection, SaveError>;
}

/// What the driver has written, and the device that it wrote it to.
struct Registers<D> {
    device: D,
    status: u8,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueRegisters>,
}

impl<D: VirtioDevice> Registers<D> {
    fn new(device: D) -> Self {
        let queues = device
            .queue_sizes()
            .iter()
            .map(|max| QueueRegisters::new(*max))
            .collect();
        Self {
            device,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues,
        }
    }

    fn offered(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    fn has(&self, status: u8) -> bool {
        self.status & status == status
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(self.queue_select as usize)
    }

    /// The selected queue, if it may be set up now: after the features, before the device is active.
    fn selected_for_setup(&mut self) -> Option<&mut QueueRegisters> {
        if !self.has(FEATURES_OK) || self.has(DRIVER_OK) {
            return None;
        }
        self.queues
            .get_mut(self.queue_select as usize)
            .filter(|queue| !queue.ready)
    }

    /// The features hold together and the device has offered them all.
    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.offered() == 0 && self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0
    }
}

/// An access that made no sense; it is counted and otherwise ignored.
struct Refused;

/// A device at the address where its driver finds it. See the module documentation.
pub struct MmioTransport<D: VirtioDevice> {
    registers: Mutex<Registers<D>>,
    unit: Unit,
    link: Arc<DriverLink>,
    ram: Arc<GuestRam>,
    kicks: Vec<EventFd>,
}

impl<D: VirtioDevice> MmioTransport<D> {
    /// Puts `device`, which no driver has touched, behind a transport and on `event_loop`.
    ///
    /// # Errors
    /// When there are no descriptors left, or the loop has ended.
    pub fn new(
        device: D,
        ram: Arc<GuestRam>,
        interrupt: Interrupt,
        event_loop: &EventLoop,
    ) -> Result<Self, TransportError> {
        let link = Arc::new(DriverLink::new(interrupt, 0, false));
        Self::assemble(Registers::new(device), ram, link, event_loop)
    }

    fn assemble(
        registers: Registers<D>,
        ram: Arc<GuestRam>,
        link: Arc<DriverLink>,
        event_loop: &EventLoop,
    ) -> Result<Self, TransportError> {
        let event = |_| EventFd::new(EFD_NONBLOCK).map_err(TransportError::Kick);
        let kicks = registers
            .queues
            .iter()
            .map(event)
            .collect::<Result<Vec<_>, _>>()?;
        let unit = Unit::new(D::KIND, Arc::clone(&ram), Arc::clone(&link));
        let handles = kicks.iter().map(EventFd::try_clone).collect::<Result<_, _>>();
        event_loop.add(Box::new(Runner {
            unit: unit.clone(),
            kicks: handles.map_err(TransportError::Kick)?,
            source: registers.device.source(),
            stop: event_loop.stop_flag(),
        }))?;
        Ok(Self {
            registers: Mutex::new(registers),
            unit,
            link,
            ram,
            kicks,
        })
    }

    fn registers(&self) -> MutexGuard<'_, Registers<D>> {
        // A device that panicked in a register access has left its registers whole: they are plain values.
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kick_all(&self) {
        for kick in &self.kicks {
            // Fails only when the counter is full, and then the kick is there already.
            let _ = kick.write(1);
        }
    }

    fn read_register(&self, offset: u32) -> Result<u32, Refused> {
        let registers = self.registers();
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        Ok(match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => D::DEVICE_ID,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => half(registers.offered(), registers.device_features_select),
            VIRTIO_MMIO_QUEUE_NUM_MAX => registers.selected().map_or(0, |queue| queue.max.into()),
            VIRTIO_MMIO_QUEUE_READY => registers.selected().map_or(0, |queue| queue.ready.into()),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.link.status(),
            VIRTIO_MMIO_STATUS => self.status(&registers).into(),
            // No queue has its addresses read back, and no device has shared memory: all ones say so.
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            // The configuration changes only by what the driver itself writes, one field at a time.
            VIRTIO_MMIO_CONFIG_GENERATION => 0,
            _ => return Err(Refused),
        })
    }

    fn status(&self, registers: &Registers<D>) -> u8 {
        registers.status | if self.link.is_broken() { NEEDS_RESET } else { 0 }
    }

    fn write_register(&self, offset: u32, value: u32) -> Result<(), Refused> {
        let mut registers = self.registers();
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => registers.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => registers.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => return write_driver_features(&mut registers, value),
            VIRTIO_MMIO_QUEUE_SEL => registers.queue_select = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => return self.write_notify(&registers, value),
            VIRTIO_MMIO_INTERRUPT_ACK => self.link.acknowledge(value),
            VIRTIO_MMIO_STATUS => return self.write_status(&mut registers, value),
            VIRTIO_MMIO_QUEUE_READY => return self.write_queue_ready(&mut registers, value),
            _ => {
                let queue = registers.selected_for_setup().ok_or(Refused)?;
                return queue.write(offset, value).map_err(|_| Refused);
            }
        }
        Ok(())
    }

    fn write_notify(&self, registers: &Registers<D>, value: u32) -> Result<(), Refused> {
        let kick = self
            .kicks
            .get(value as usize)
            .filter(|_| registers.has(DRIVER_OK))
            .ok_or(Refused)?;
        self.link.metrics().register_kicks.fetch_add(1, Ordering::Relaxed);
        let _ = kick.write(1);
        Ok(())
    }

    fn write_queue_ready(&self, registers: &mut Registers<D>, value: u32) -> Result<(), Refused> {
        if value == 1 {
            let queue = registers.selected_for_setup().ok_or(Refused)?;
            queue.ready = true;
            if let Err(error) = queue.check(&self.ram, (0, 0)) {
                queue.ready = false;
                self.link.break_device(D::KIND, &error);
            }
            return Ok(());
        }
        let number = registers.queue_select as usize;
        let queue = registers.queues.get_mut(number).ok_or(Refused)?;
        queue.ready = false;
        // Waits for the call in progress: the driver may free the rings when the write returns.
        if let Some(slot) = self
            .unit
            .lock()
            .as_mut()
            .and_then(|active| active.queues.get_mut(number))
        {
            *slot = None;
        }
        Ok(())
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.registers().device.read_config(Offset(offset), data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) -> Result<(), Refused> {
        let mut registers = self.registers();
        // A driver finds the device before it writes to it (§3.1.1).
        if !registers.has(DRIVER) || self.link.is_broken() {
            return Err(Refused);
        }
        registers.device.write_config(Offset(offset), data);
        Ok(())
    }

    fn count(&self, result: Result<(), Refused>) {
        if result.is_err() {
            self.link
                .metrics()
                .refused_accesses
                .fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Half of the driver's features; only while they are being negotiated.
fn write_driver_features<D: VirtioDevice>(registers: &mut Registers<D>, value: u32) -> Result<(), Refused> {
    if !registers.has(DRIVER) || registers.has(FEATURES_OK) {
        return Err(Refused);
    }
    let shift = match registers.driver_features_select {
        0 => 0,
        1 => 32,
        // A driver may write zeros for feature bits that nobody has thought of yet.
        _ if value == 0 => return Ok(()),
        _ => return Err(Refused),
    };
    registers.driver_features &= !(u64::from(u32::MAX) << shift);
    registers.driver_features |= u64::from(value) << shift;
    Ok(())
}

/// The register at `offset`, if the access is as wide as one and starts at one.
fn register_at(offset: Offset, len: usize) -> Result<u32, Refused> {
    let offset = u32::try_from(offset.0).map_err(|_| Refused)?;
    if len == 4 && offset.is_multiple_of(4) {
        Ok(offset)
    } else {
        Err(Refused)
    }
}

impl<D: VirtioDevice> BusDevice for MmioTransport<D> {
    fn read(&self, offset: Offset, data: &mut [u8]) {
        if let Some(in_config) = offset.0.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            return self.read_config(in_config, data);
        }
        let value = register_at(offset, data.len()).and_then(|register| self.read_register(register));
        match value {
            Ok(value) => data.copy_from_slice(&value.to_le_bytes()),
            Err(refused) => {
                data.fill(0);
                self.count(Err(refused));
            }
        }
    }

    fn write(&self, offset: Offset, data: &[u8]) {
        if let Some(in_config) = offset.0.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            return self.count(self.write_config(in_config, data));
        }
        let bytes = <[u8; 4]>::try_from(data).map_err(|_| Refused);
        let written = bytes.and_then(|bytes| {
            self.write_register(register_at(offset, data.len())?, u32::from_le_bytes(bytes))
        });
        self.count(written);
    }
}

impl<D: VirtioDevice> fmt::Debug for MmioTransport<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MmioTransport")
            .field("device", &D::KIND)
            .field("link", &self.link)
            .finish_non_exhaustive()
    }
}
