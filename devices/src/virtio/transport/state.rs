//! What an image holds of a transport and its device, and how a device is rebuilt from it.

use std::sync::Arc;

use runnel_snapshot::block_store::GuestRam;
use runnel_snapshot::machine::Paused;
use runnel_snapshot::section::{SavedSection, Section, SectionError};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::super::counter;
use super::queues::{QueueRegisters, QueueSetupError};
use super::{
    ACKNOWLEDGE, DRIVER, DRIVER_OK, DriverLink, EventLoop, FAILED, FEATURES_OK, Interrupt, MmioDevice,
    MmioTransport, NEEDS_RESET, Registers, TransportError, VirtioDevice,
};

/// One queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// How many descriptors it has.
    pub size: u16,
    /// Whether the driver has finished setting it up.
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub driver_ring: u64,
    /// Guest-physical address of the used ring.
    pub device_ring: u64,
    /// The chain to take next.
    pub next_avail: u16,
    /// The place of the next chain given back.
    pub next_used: u16,
}

impl QueueState {
    fn position(&self) -> (u16, u16) {
        (self.next_avail, self.next_used)
    }
}

/// A transport's registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    /// The device status, `DEVICE_NEEDS_RESET` included.
    pub device_status: u8,
    /// What the driver has accepted.
    pub driver_features: u64,
    /// Which half of the offered features is visible.
    pub device_features_select: u32,
    /// Which half of the accepted features is visible.
    pub driver_features_select: u32,
    /// Which queue's registers are visible.
    pub queue_select: u32,
    /// Why the line was raised, as far as the driver has not acknowledged it.
    pub interrupt_status: u32,
    /// The queues, by number.
    pub queues: Vec<QueueState>,
}

/// A device's section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioState<S> {
    /// What every device has.
    pub transport: TransportState,
    /// What this kind of device has beside.
    pub device: S,
}

/// What a transport is rebuilt upon.
#[derive(Debug)]
pub struct TransportDeps<P> {
    /// What the device is built on.
    pub parts: P,
    /// Guest RAM. Nothing of it is read before [`MmioDevice::resume`]: it may still be on its way.
    pub ram: Arc<GuestRam>,
    /// The device's line.
    pub interrupt: Interrupt,
    /// Where the device runs.
    pub event_loop: Arc<EventLoop>,
}

/// Why a device cannot be rebuilt.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// No driver can have brought a device into this state.
    #[error("a saved device has {what} {value:#x}, which no driver can have brought about")]
    Register {
        /// Which register.
        what: &'static str,
        /// What it held.
        value: u64,
    },
    /// Features that the rebuilt device does not have.
    #[error(
        "the guest uses features {missing:#x} of this device that it has not here: resume it where it has them"
    )]
    Features {
        /// The bits that are not offered.
        missing: u64,
    },
    /// Another number of queues.
    #[error("a saved device has {found} queues, and its kind has {expected}")]
    QueueCount {
        /// In the image.
        found: usize,
        /// Of this kind of device.
        expected: usize,
    },
    /// A queue that cannot be.
    #[error("queue {number} of a saved device cannot be")]
    Queue {
        /// Its number.
        number: usize,
        /// Why.
        #[source]
        source: QueueSetupError,
    },
    /// The device itself.
    #[error("a saved device cannot be rebuilt")]
    Device(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The host gives no resources.
    #[error("a saved device gets no place to run")]
    Transport(#[from] TransportError),
}

/// Why a device cannot be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The device gave no state.
    #[error(transparent)]
    State(#[from] RestoreError),
    /// The state has no form that an image can hold.
    #[error(transparent)]
    Section(#[from] SectionError),
}

fn refuse(what: &'static str, value: impl Into<u64>) -> RestoreError {
    RestoreError::Register {
        what,
        value: value.into(),
    }
}

/// The steps of set-up that a driver can have taken; each needs those before it.
fn check_status(status: u8) -> Result<(), RestoreError> {
    let steps = status & !(NEEDS_RESET | FAILED);
    let possible = [
        0,
        ACKNOWLEDGE,
        ACKNOWLEDGE | DRIVER,
        ACKNOWLEDGE | DRIVER | FEATURES_OK,
        ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
    ];
    if possible.contains(&steps) {
        Ok(())
    } else {
        Err(refuse("status", status))
    }
}

impl<D: VirtioDevice> Registers<D> {
    /// Registers as they were saved, every field held against what can be.
    fn from_state(device: D, state: &TransportState, ram: &GuestRam) -> Result<Self, RestoreError> {
        check_status(state.device_status)?;
        if state.interrupt_status & !3 != 0 {
            return Err(refuse("interrupt status", state.interrupt_status));
        }
        let mut registers = Self::new(device);
        registers.status = state.device_status & !NEEDS_RESET;
        registers.driver_features = state.driver_features;
        registers.device_features_select = state.device_features_select;
        registers.driver_features_select = state.driver_features_select;
        registers.queue_select = state.queue_select;
        let missing = state.driver_features & !registers.offered();
        if registers.has(FEATURES_OK) && missing != 0 {
            return Err(RestoreError::Features { missing });
        }
        if registers.has(FEATURES_OK) && !registers.features_acceptable() {
            return Err(refuse("driver features", state.driver_features));
        }
        registers.take_queues(&state.queues, ram)?;
        Ok(registers)
    }

    fn take_queues(&mut self, saved: &[QueueState], ram: &GuestRam) -> Result<(), RestoreError> {
        let expected = self.queues.len();
        if saved.len() != expected {
            return Err(RestoreError::QueueCount {
                found: saved.len(),
                expected,
            });
        }
        let may_be_ready = self.has(FEATURES_OK);
        for (number, (queue, state)) in self.queues.iter_mut().zip(saved).enumerate() {
            *queue = QueueRegisters {
                max: queue.max,
                size: state.size,
                ready: state.ready,
                descriptors: state.descriptors,
                driver_ring: state.driver_ring,
                device_ring: state.device_ring,
            };
            if !state.size.is_power_of_two() || state.size > queue.max {
                return Err(refuse("queue size", state.size));
            }
            if state.ready && !may_be_ready {
                return Err(refuse("a ready queue in status", self.status));
            }
            if state.ready {
                queue
                    .check(ram, state.position())
                    .map_err(|source| RestoreError::Queue { number, source })?;
            }
        }
        Ok(())
    }
}

impl<D: VirtioDevice> MmioTransport<D> {
    fn transport_state(&self, registers: &Registers<D>) -> TransportState {
        let active = self.unit.lock();
        let position = |number: usize| {
            let queue = active
                .as_ref()
                .and_then(|active| active.queues.get(number)?.as_ref());
            queue.map_or((0, 0), |queue| (queue.next_avail(), queue.next_used()))
        };
        let queues = registers.queues.iter().enumerate().map(|(number, queue)| {
            let (next_avail, next_used) = position(number);
            QueueState {
                size: queue.size,
                ready: queue.ready,
                descriptors: queue.descriptors,
                driver_ring: queue.driver_ring,
                device_ring: queue.device_ring,
                next_avail,
                next_used,
            }
        });
        TransportState {
            device_status: self.status(registers),
            driver_features: registers.driver_features,
            device_features_select: registers.device_features_select,
            driver_features_select: registers.driver_features_select,
            queue_select: registers.queue_select,
            interrupt_status: self.link.status(),
            queues: queues.collect(),
        }
    }
}

impl<D: VirtioDevice> Section for MmioTransport<D> {
    const KIND: &'static str = D::KIND;
    const VERSION: u32 = D::VERSION;
    type State = VirtioState<D::State>;
    type Deps = TransportDeps<D::Parts>;
    type Error = RestoreError;

    fn save(&self, _: &Paused<'_>) -> Result<Self::State, RestoreError> {
        let registers = self.registers();
        Ok(VirtioState {
            transport: self.transport_state(&registers),
            device: registers.device.save(),
        })
    }

    /// The device does nothing until [`MmioDevice::resume`].
    fn restore(deps: Self::Deps, state: Self::State) -> Result<Self, RestoreError> {
        let saved = state.transport;
        let device =
            D::restore(deps.parts, state.device).map_err(|error| RestoreError::Device(Box::new(error)))?;
        let registers = Registers::from_state(device, &saved, &deps.ram)?;
        let broken = saved.device_status & NEEDS_RESET != 0;
        let link = Arc::new(DriverLink::new(deps.interrupt, saved.interrupt_status, broken));
        let transport = Self::assemble(registers, deps.ram, link, &deps.event_loop)?;
        if saved.device_status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK {
            let positions: Vec<_> = saved.queues.iter().map(QueueState::position).collect();
            let mut active = transport
                .activate(&mut transport.registers(), &positions)
                .map_err(RestoreError::Device)?;
            active.is_resting = true;
            *transport.unit.lock() = Some(active);
        }
        Ok(transport)
    }
}

impl<D: VirtioDevice> MmioDevice for MmioTransport<D> {
    fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    fn interrupt(&self) -> &Interrupt {
        self.link.interrupt()
    }

    fn resume(&self) {
        if self.registers().has(DRIVER_OK) {
            if let Some(active) = self.unit.lock().as_mut() {
                active.is_resting = false;
            }
            self.kick_all();
            self.link.reassert();
        }
    }

    fn link(&self) -> &DriverLink {
        &self.link
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let link = self.link.metrics();
        let mut counters = self.registers().device.counters();
        counters.extend([
            counter("interrupts", &link.interrupts),
            counter("register_kicks", &link.register_kicks),
            counter("driver_faults", &link.faults),
            counter("refused_accesses", &link.refused_accesses),
        ]);
        counters
    }

    fn save_section(&self, id: &str, paused: &Paused<'_>) -> Result<SavedSection, SaveError> {
        Ok(SavedSection::of::<Self>(id, &self.save(paused)?)?)
    }
}
