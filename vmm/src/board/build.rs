//! Building a board: what a configuration names, on what the caller supplies, new or from its sections.

use std::ops::Range;
use std::sync::Arc;

use runnel_devices::boot_timer::{self, BootTimer, Moment};
use runnel_devices::bus::{BusDevice, MmioAddress, PortAddress};
use runnel_devices::event_loop::EventLoop;
use runnel_devices::i8042::{I8042, I8042Deps};
use runnel_devices::interrupt::Interrupt;
use runnel_devices::serial::{Serial, SerialDeps, Sink};
use runnel_devices::virtio::block::{BlockParts, CacheType};
use runnel_devices::virtio::net::{NetParts, Tap};
use runnel_devices::virtio::registry::{self, Parts as DeviceParts, Place};
use runnel_snapshot::block_store::GuestRam;
use runnel_snapshot::section::{SavedSection, Section};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::virtio::next_slot;
use super::{Board, BoardError, Buses, GUEST_PORT_ID, GuestPort, Stores, Virtio};
use crate::config::{self, MicrovmConfig};
use crate::console::Console;
use crate::exit::EndSignal;
use crate::guest_channel::GuestChannel;
use crate::kvm::Vm;
use crate::layout;
use crate::power::{PowerRegisters, ResetLine};
use crate::vmgenid::VmGenId;

/// The name of the entropy device among the others.
const RNG_ID: &str = "rng";

/// A serial port, and where it is.
struct SerialPlace {
    name: &'static str,
    /// What tells its section from others'.
    id: &'static str,
    ports: Range<u16>,
    gsi: u32,
}

const COM1: SerialPlace = SerialPlace {
    name: "the serial port",
    id: "",
    ports: layout::COM1_PORTS,
    gsi: layout::COM1_GSI,
};

const COM2: SerialPlace = SerialPlace {
    name: "the guest channel's port",
    id: GUEST_PORT_ID,
    ports: layout::COM2_PORTS,
    gsi: layout::COM2_GSI,
};

/// What a board is built on.
pub struct Parts<'a> {
    /// What there is to be.
    pub config: &'a MicrovmConfig,
    /// Where the devices' lines and kicks go.
    pub vm: &'a Vm,
    /// What the devices move bytes to and from.
    pub ram: Arc<GuestRam>,
    /// Who hears of power-off and reset.
    pub end: &'a EndSignal,
    /// Opens what stands behind drives.
    pub stores: &'a mut Stores<'a>,
}

/// Builds a board, device after device.
pub struct Builder<'a> {
    parts: Parts<'a>,
    /// The sections that no device has taken yet; `None` for a machine that boots.
    saved: Option<&'a mut Vec<SavedSection>>,
    buses: Buses,
    virtio: Vec<Virtio>,
    /// The first is for all devices that never wait long; each drive has its own.
    loops: Vec<Arc<EventLoop>>,
}

impl<'a> Builder<'a> {
    /// The board of a machine that boots.
    ///
    /// # Errors
    /// When a device cannot be had.
    pub fn boot(parts: Parts<'a>) -> Result<Board, BoardError> {
        Self::new(parts, None)?.build()
    }

    /// The board of a machine that was saved; takes the devices' sections out of `saved`. Devices do nothing before
    /// [`Board::resume`].
    ///
    /// # Errors
    /// When a device cannot be had, or its section is missing or makes no sense.
    pub fn restore(parts: Parts<'a>, saved: &'a mut Vec<SavedSection>) -> Result<Board, BoardError> {
        Self::new(parts, Some(saved))?.build()
    }

    fn new(parts: Parts<'a>, saved: Option<&'a mut Vec<SavedSection>>) -> Result<Self, BoardError> {
        let loops = vec![Arc::new(EventLoop::start("devices")?)];
        Ok(Self {
            parts,
            saved,
            buses: Buses::default(),
            virtio: Vec::new(),
            loops,
        })
    }

    fn build(mut self) -> Result<Board, BoardError> {
        self.add_power()?;
        let keyboard = self.add_keyboard()?;
        let vmgenid = VmGenId::new(self.line(layout::GED_GSI, "VMGenID")?);
        let (mut console, output) = Console::open(&self.parts.config.serial)?;
        let serial = self.add_serial(COM1, output)?;
        let config = self.parts.config;
        let guest_channel = config
            .guest_channel
            .then(|| self.add_guest_channel())
            .transpose()?;
        for drive in config.drives() {
            self.add_drive(drive)?;
        }
        for interface in config.interfaces() {
            self.add_interface(interface)?;
        }
        if config.entropy {
            let shared = Arc::clone(&self.loops[0]);
            self.add_virtio(RNG_ID, DeviceParts::Rng, shared)?;
        }
        console.connect(&serial)?;
        let Self {
            buses, virtio, loops, ..
        } = self;
        Ok(Board {
            buses: Arc::new(buses),
            serial,
            guest_channel,
            keyboard,
            virtio,
            vmgenid,
            loops,
            _console: console,
        })
    }

    fn add_keyboard(&mut self) -> Result<Arc<ResetLine>, BoardError> {
        const NAME: &str = "the keyboard controller";
        let reset = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
            .map_err(|source| BoardError::Event { device: NAME, source })?;
        let deps = I8042Deps {
            reset,
            interrupt: self.line(layout::KEYBOARD_GSI, NAME)?,
        };
        let controller = match self.take_section(I8042::KIND, "")? {
            None => I8042::with_keyboard(deps),
            Some(saved) => I8042::restore(deps, saved.state_of::<I8042>()?)?,
        };
        let keyboard = Arc::new(ResetLine::new(controller, self.parts.end.clone()));
        self.add_ports(NAME, &layout::I8042_PORTS, keyboard.clone())?;
        Ok(keyboard)
    }

    fn add_power(&mut self) -> Result<(), BoardError> {
        let end = self.parts.end;
        let registers = Arc::new(PowerRegisters::new(end.clone()));
        self.add_ports("the power registers", &layout::POWER_PORTS, registers)?;
        if self.parts.config.boot_timer {
            let timer = Arc::new(BootTimer::new(Moment::now()));
            let at = MmioAddress(layout::BOOT_TIMER.start);
            self.buses
                .mmio
                .insert("the boot timer", at, boot_timer::ADDRESS_COUNT, timer)?;
        }
        Ok(())
    }

    fn add_serial(&mut self, port: SerialPlace, output: Sink) -> Result<Arc<Serial>, BoardError> {
        let interrupt = self.line(port.gsi, port.name)?;
        let deps = SerialDeps { interrupt, output };
        let serial = match self.take_section(Serial::KIND, port.id)? {
            None => Serial::new(deps)?,
            Some(saved) => Serial::restore(deps, saved.state_of::<Serial>()?)?,
        };
        let serial = Arc::new(serial);
        self.add_ports(port.name, &port.ports, serial.clone())?;
        Ok(serial)
    }

    fn add_guest_channel(&mut self) -> Result<GuestPort, BoardError> {
        let mut channel = match self.take_section(GuestChannel::KIND, "")? {
            None => GuestChannel::new()?,
            Some(saved) => GuestChannel::restore((), saved.state_of::<GuestChannel>()?)?,
        };
        let serial = self.add_serial(COM2, channel.sink())?;
        channel.connect(&serial)?;
        Ok(GuestPort { channel, serial })
    }

    fn add_drive(&mut self, drive: &config::Drive) -> Result<(), BoardError> {
        let id = drive.id.as_str();
        let store = (self.parts.stores)(drive).map_err(|source| BoardError::Store {
            id: id.to_owned(),
            source,
        })?;
        let cache_type = match drive.cache_type {
            config::CacheType::Unsafe => CacheType::Unsafe,
            config::CacheType::Writeback => CacheType::Writeback,
        };
        let own = Arc::new(EventLoop::start(&format!("drive {id}"))?);
        self.loops.push(Arc::clone(&own));
        self.add_virtio(
            id,
            DeviceParts::Block(BlockParts {
                drive_id: id.to_owned(),
                store,
                cache_type,
            }),
            own,
        )
    }

    fn add_interface(&mut self, interface: &config::Interface) -> Result<(), BoardError> {
        let id = interface.id.as_str();
        let tap = Tap::open(&interface.tap).map_err(|source| BoardError::Tap {
            id: id.to_owned(),
            source,
        })?;
        let mac = interface.mac.map(|address| address.0);
        let parts = NetParts {
            iface_id: id.to_owned(),
            backend: Arc::new(tap),
            mac,
            mtu: interface.mtu,
        };
        let shared = Arc::clone(&self.loops[0]);
        self.add_virtio(id, DeviceParts::Net(parts), shared)
    }

    fn add_virtio(
        &mut self,
        id: &str,
        parts: DeviceParts,
        runs_on: Arc<EventLoop>,
    ) -> Result<(), BoardError> {
        let failed = |source| BoardError::Virtio {
            id: id.to_owned(),
            source: Box::new(source),
        };
        let slot = next_slot(self.virtio.len(), id)?;
        let interrupt = Interrupt::new().map_err(|source| BoardError::Event {
            device: "a virtio device",
            source,
        })?;
        let place = Place {
            ram: Arc::clone(&self.parts.ram),
            interrupt,
            event_loop: runs_on,
        };
        let device = match self.take_section(parts.kind(), id)? {
            None => registry::build(parts, place).map_err(failed)?,
            Some(saved) => registry::restore(saved, parts, place).map_err(failed)?,
        };
        self.virtio.push(Virtio::wire(
            id.to_owned(),
            slot,
            device,
            &mut self.buses,
            self.parts.vm,
        )?);
        Ok(())
    }

    /// The section of a device of a saved machine; `None` if the machine boots.
    fn take_section(&mut self, kind: &'static str, id: &str) -> Result<Option<SavedSection>, BoardError> {
        let Some(saved) = &mut self.saved else {
            return Ok(None);
        };
        let at = saved
            .iter()
            .position(|section| section.kind == kind && section.id == id);
        let at = at.ok_or_else(|| BoardError::MissingSection {
            kind,
            id: id.to_owned(),
        })?;
        Ok(Some(saved.remove(at)))
    }

    fn add_ports(
        &mut self,
        name: &str,
        ports: &Range<u16>,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), BoardError> {
        Ok(self
            .buses
            .ports
            .insert(name, PortAddress(ports.start), ports.len() as u64, device)?)
    }

    /// A line that raises the guest's `gsi`.
    fn line(&self, gsi: u32, device: &'static str) -> Result<Interrupt, BoardError> {
        let interrupt = Interrupt::new().map_err(|source| BoardError::Event { device, source })?;
        self.parts.vm.interrupt_by(interrupt.event(), gsi)?;
        Ok(interrupt)
    }
}
