//! What the vCPUs find around them: the buses, and the devices on them.
//!
//! A board is built for a machine that boots, or rebuilt from its sections; both go through [`Builder`], so that a
//! device is wired alike either way. What stands behind drives is not decided here: see [`Stores`].
//!
//! **Never**: touches a vCPU. Guest RAM it gives to the devices, and looks at none of it.

mod build;
mod virtio;

use std::io;
use std::sync::Arc;

use runnel_devices::bus::{Bus, BusError, MmioAddress, PortAddress};
use runnel_devices::event_loop::{EventLoop, EventLoopError, Frozen, StillBusy};
use runnel_devices::i8042::{I8042, I8042Error};
use runnel_devices::serial::{Serial, SerialError};
use runnel_devices::virtio::net::TapError;
use runnel_devices::virtio::registry::RegistryError;
use runnel_devices::virtio::transport::SaveError;
use runnel_snapshot::block_store::BlockStore;
use runnel_snapshot::machine::Paused;
use runnel_snapshot::section::{SavedSection, Section, SectionError};

use crate::config;
use crate::console::{Console, ConsoleError};
use crate::guest_channel::{GuestChannel, GuestChannelError};
use crate::kvm::KvmError;
use crate::layout::VirtioSlot;
use crate::power::ResetLine;
use crate::vmgenid::VmGenId;

pub use build::{Builder, Parts};
pub use virtio::Virtio;

/// Whatever kept a drive from being opened.
pub type StoreError = Box<dyn std::error::Error + Send + Sync>;

/// Who opens what stands behind a drive: its file, or an overlay over an image's volume.
pub type Stores<'a> = dyn FnMut(&config::Drive) -> Result<Arc<dyn BlockStore>, StoreError> + 'a;

/// Why there is no board.
#[derive(Debug, thiserror::Error)]
pub enum BoardError {
    /// No event descriptor.
    #[error("no event descriptor is to be had for {device}")]
    Event {
        /// For what.
        device: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The serial port.
    #[error("the serial port cannot be made")]
    Serial(#[from] SerialError),
    /// The guest channel.
    #[error(transparent)]
    GuestChannel(#[from] GuestChannelError),
    /// The keyboard controller.
    #[error("the keyboard controller cannot be made")]
    Keyboard(#[from] I8042Error),
    /// A device has no place.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// No thread for devices.
    #[error(transparent)]
    Loop(#[from] EventLoopError),
    /// There is no room for another device.
    #[error("a machine has room for {max} virtio devices, and {id:?} is one more")]
    TooManyDevices {
        /// Which one.
        id: String,
        /// How many there can be.
        max: usize,
    },
    /// What stands behind a drive.
    #[error("drive {id:?} cannot be opened")]
    Store {
        /// Which drive.
        id: String,
        /// Why not.
        source: StoreError,
    },
    /// A tap.
    #[error("network interface {id:?} cannot be had")]
    Tap {
        /// Which interface.
        id: String,
        /// Why not.
        source: TapError,
    },
    /// A virtio device.
    #[error("virtio device {id:?} cannot be made")]
    Virtio {
        /// Which one.
        id: String,
        /// Why not.
        source: Box<RegistryError>,
    },
    /// A section that should be there is not.
    #[error("the image has no section {kind:?} {id:?}")]
    MissingSection {
        /// Its kind.
        kind: &'static str,
        /// Which one of its kind.
        id: String,
    },
    /// A section that makes no sense.
    #[error(transparent)]
    Section(#[from] SectionError),
}

/// The two address spaces of devices. They never change once the vCPUs exist.
#[derive(Debug, Default)]
pub struct Buses {
    /// I/O ports.
    pub ports: Bus<PortAddress>,
    /// Addresses that are not RAM.
    pub mmio: Bus<MmioAddress>,
}

/// The guest channel, and the port that it is at.
#[derive(Debug)]
struct GuestPort {
    channel: GuestChannel,
    serial: Arc<Serial>,
}

/// The guest channel's port among the sections of serial ports.
const GUEST_PORT_ID: &str = "com2";

/// All devices of a machine.
#[derive(Debug)]
pub struct Board {
    buses: Arc<Buses>,
    serial: Arc<Serial>,
    guest_channel: Option<GuestPort>,
    keyboard: Arc<ResetLine>,
    virtio: Vec<Virtio>,
    vmgenid: VmGenId,
    loops: Vec<Arc<EventLoop>>,
    /// Kept for its drop.
    _console: Console,
}

impl Board {
    /// How vCPUs reach the devices.
    #[must_use]
    pub fn buses(&self) -> &Arc<Buses> {
        &self.buses
    }

    /// COM1.
    #[must_use]
    pub fn serial(&self) -> &Serial {
        &self.serial
    }

    /// The guest channel, if there is one.
    #[must_use]
    pub fn guest_channel(&self) -> Option<&GuestChannel> {
        self.guest_channel.as_ref().map(|port| &port.channel)
    }

    /// The keyboard controller.
    #[must_use]
    pub fn keyboard(&self) -> &I8042 {
        self.keyboard.controller()
    }

    /// VMGenID.
    #[must_use]
    pub fn vmgenid(&self) -> &VmGenId {
        &self.vmgenid
    }

    /// The virtio devices, in the guest's order.
    #[must_use]
    pub fn virtio(&self) -> &[Virtio] {
        &self.virtio
    }

    /// Where the virtio devices are.
    pub fn virtio_slots(&self) -> impl Iterator<Item = VirtioSlot> {
        self.virtio.iter().map(|device| device.slot)
    }

    /// Stops the devices: none touches guest RAM while the answer lives. The vCPUs stand already.
    ///
    /// # Errors
    /// Which devices are still at work when `give_up` says so; all go on then.
    pub fn freeze(&self, give_up: &dyn Fn() -> bool) -> Result<Frozen, StillBusy> {
        EventLoop::freeze_all(self.loops.iter().map(Arc::as_ref), give_up)
    }

    /// Saves every device.
    ///
    /// # Errors
    /// When one cannot be saved.
    pub fn save(&self, paused: &Paused<'_>) -> Result<Vec<SavedSection>, BoardSaveError> {
        let serial = SavedSection::of::<Serial>("", &self.serial.save(paused)?)?;
        let virtio = self
            .virtio
            .iter()
            .map(|device| Ok(device.device.save_section(&device.id, paused)?));
        let keyboard = SavedSection::of::<I8042>("", &self.keyboard().save(paused)?)?;
        let mut sections: Vec<_> = [Ok(serial), Ok(keyboard)]
            .into_iter()
            .chain(virtio)
            .collect::<Result<_, BoardSaveError>>()?;
        if let Some(port) = &self.guest_channel {
            let serial = port.serial.save(paused)?;
            sections.push(SavedSection::of::<Serial>(GUEST_PORT_ID, &serial)?);
            let channel = port.channel.save(paused)?;
            sections.push(SavedSection::of::<GuestChannel>("", &channel)?);
        }
        Ok(sections)
    }

    /// Lets rebuilt devices go on: an interrupt or a kick may have been on its way. Once interrupt controllers and
    /// RAM are what they were, before the vCPUs run.
    pub fn resume(&self) {
        for device in &self.virtio {
            device.device.resume();
        }
        self.serial.reassert();
        if let Some(port) = &self.guest_channel {
            port.serial.reassert();
            port.channel.resume();
        }
        self.keyboard().reassert();
    }
}

/// Why a board cannot be saved.
#[derive(Debug, thiserror::Error)]
pub enum BoardSaveError {
    /// The serial port.
    #[error("the serial port cannot be saved")]
    Serial(#[from] SerialError),
    /// The guest channel.
    #[error("the guest channel cannot be saved")]
    GuestChannel(#[from] GuestChannelError),
    /// The keyboard controller.
    #[error("the keyboard controller cannot be saved")]
    Keyboard(#[from] I8042Error),
    /// A virtio device.
    #[error("a virtio device cannot be saved")]
    Virtio(#[from] SaveError),
    /// A state without a form.
    #[error(transparent)]
    Section(#[from] SectionError),
}
