//! What the vCPUs find around them: the buses, and the devices on them.
//!
//! **Never**: touches guest RAM or a vCPU.

use std::io;
use std::sync::Arc;

use runnel_devices::bus::{Bus, BusError, MmioAddress, PortAddress};
use runnel_devices::i8042::I8042;
use runnel_devices::interrupt::Interrupt;
use runnel_devices::serial::{Serial, SerialDeps, SerialError};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::config::MicrovmConfig;
use crate::console::{Console, ConsoleError};
use crate::exit::EndSignal;
use crate::kvm::{KvmError, Vm};
use crate::layout;
use crate::power::{PowerRegisters, ResetLine};

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
    /// A device has no place.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// The two address spaces of devices. They never change once the vCPUs exist.
#[derive(Debug, Default)]
pub struct Buses {
    /// I/O ports.
    pub ports: Bus<PortAddress>,
    /// Addresses that are not RAM.
    pub mmio: Bus<MmioAddress>,
}

/// All devices of a machine.
#[derive(Debug)]
pub struct Board {
    /// How vCPUs reach them.
    pub buses: Arc<Buses>,
    /// COM1.
    pub serial: Arc<Serial>,
    /// Where it ends; kept for its drop.
    _console: Console,
}

impl Board {
    /// The board of a machine that boots.
    ///
    /// # Errors
    /// When a device cannot be had.
    pub fn new(config: &MicrovmConfig, vm: &Vm, end: &EndSignal) -> Result<Self, BoardError> {
        let mut buses = Buses::default();
        add_power(&mut buses, end)?;

        let (mut console, output) = Console::open(&config.serial)?;
        let interrupt = line(vm, layout::COM1_GSI, "the serial port")?;
        let serial = Arc::new(Serial::new(SerialDeps { interrupt, output })?);
        add_ports(&mut buses, "the serial port", &layout::COM1_PORTS, serial.clone())?;
        console.connect(&serial)?;
        Ok(Self {
            buses: Arc::new(buses),
            serial,
            _console: console,
        })
    }
}

fn add_power(buses: &mut Buses, end: &EndSignal) -> Result<(), BoardError> {
    let failed = |source| BoardError::Event {
        device: "the keyboard controller",
        source,
    };
    let reset = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(failed)?;
    let keyboard = Arc::new(ResetLine::new(I8042::new(reset), end.clone()));
    add_ports(buses, "the keyboard controller", &layout::I8042_PORTS, keyboard)?;
    let registers = Arc::new(PowerRegisters::new(end.clone()));
    add_ports(buses, "the power registers", &layout::POWER_PORTS, registers)
}

fn add_ports(
    buses: &mut Buses,
    name: &str,
    ports: &std::ops::Range<u16>,
    device: Arc<dyn runnel_devices::bus::BusDevice>,
) -> Result<(), BoardError> {
    Ok(buses
        .ports
        .insert(name, PortAddress(ports.start), ports.len() as u64, device)?)
}

/// An interrupt of a device that raises the guest's line `gsi`.
fn line(vm: &Vm, gsi: u32, device: &'static str) -> Result<Interrupt, BoardError> {
    let interrupt = Interrupt::new().map_err(|source| BoardError::Event { device, source })?;
    vm.interrupt_by(interrupt.event(), gsi)?;
    Ok(interrupt)
}
